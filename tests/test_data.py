"""chapter2_1_data.py: what it reads, what it refuses, what it shows."""
import os
import pickle
import shutil

import cv2
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import chapter2_1_data as data


def write(file, image=None, **options):
    """A drawn photograph, or the given RGB picture, in the format that the file's ending asks for."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if image is None:
        image = Image.fromarray(data.draw_dish(0, np.random.default_rng(len(file.name)))[..., ::-1])
    image.save(file, **options)
    return file


def problem(path):
    """The message with which reading `path` is refused."""
    with pytest.raises(data.UserError) as error:
        data.readfile(path)
    return str(error.value)


# ---------------------------------------------------------------------- reading

def test_readfile_gives_opencvs_pixels_in_sorted_name_order(food11):
    x, y = data.readfile(food11 / 'training')
    names = sorted(os.listdir(food11 / 'training'))
    assert (x.shape, x.dtype) == ((44, 128, 128, 3), np.uint8)
    assert (y.shape, y.dtype) == ((44,), np.uint8)
    assert y.tolist() == [int(name.split('_')[0]) for name in names]
    for image, name in zip(x, names):
        assert np.array_equal(image, cv2.resize(cv2.imread(str(food11 / 'training' / name)), (128, 128)))


@pytest.mark.skipif('FOOD11_DIR' not in os.environ, reason='FOOD11_DIR names no folder with real photographs')
def test_readfile_on_real_photographs():
    folder = os.path.join(os.environ['FOOD11_DIR'], 'training')
    x, y = data.readfile(folder)
    for image, label, name in list(zip(x, y, sorted(os.listdir(folder)), strict=True))[::17]:
        assert label == int(name.split('_')[0])
        assert np.array_equal(image, cv2.resize(cv2.imread(os.path.join(folder, name)), (128, 128)))


def test_every_spelling_of_a_name(tmp_path):
    for name in ('3_1.jpg', '3-2.jpg', '10_0.JPG', '7_1.Jpeg', '2_1.png', '1_5.bmp', '0_9.webp', '4_2.TIFF'):
        write(tmp_path / name)
    x, y = data.readfile(tmp_path)
    assert dict(zip(sorted(os.listdir(tmp_path)), y.tolist())) == {
        '0_9.webp': 0, '10_0.JPG': 10, '1_5.bmp': 1, '2_1.png': 2, '3-2.jpg': 3, '3_1.jpg': 3, '4_2.TIFF': 4, '7_1.Jpeg': 7}
    assert x.any(axis=(1, 2, 3)).all()


def test_kaggles_folders_are_read_in_label_order(tmp_path):
    folders = ['Bread', 'Dairy product', 'Dessert', 'Egg', 'Fried food', 'Meat',
               'Noodles-Pasta', 'Rice', 'Seafood', 'Soup', 'Vegetable-Fruit']
    for name in folders:
        write(tmp_path / name / '12.jpg')
        write(tmp_path / name / '5.jpg')
    assert data.readfile(tmp_path)[1].tolist() == [label for label in range(11) for _ in range(2)]


@pytest.mark.parametrize('mode', ['L', 'CMYK'])
def test_grey_and_cmyk_photographs(tmp_path, mode):
    dish = Image.fromarray(data.draw_dish(9, np.random.default_rng(0))[..., ::-1])
    file = write(tmp_path / '9_0.jpg', dish.convert(mode))
    x = data.readfile(tmp_path)[0][0]
    assert np.array_equal(x, cv2.resize(cv2.imread(str(file)), (128, 128)))
    assert abs(x.astype(int) - np.asarray(dish.convert(mode).convert('RGB').resize((128, 128)))[..., ::-1]).mean() < 8


def test_chinese_names_spaces_and_clutter(food11, tmp_path):
    folder = tmp_path / '美食 数据' / 'training'
    shutil.copytree(food11 / 'training', folder)
    (folder / '3_0.jpg').rename(folder / '3_鸡蛋 一.jpg')
    for clutter in ('.DS_Store', '._0_0.jpg', 'Thumbs.db', 'desktop.ini', 'labels.csv', '__MACOSX/._0_0.jpg', '.cache/0_0.jpg'):
        (folder / clutter).parent.mkdir(exist_ok=True)
        (folder / clutter).write_bytes(b'no photograph')
    x, y = data.readfile(folder)
    assert len(x) == 44 and np.bincount(y).tolist() == [4] * 11


def test_the_testing_folder_has_names_and_no_labels(tmp_path):
    for name in ('0002.jpg', '0000.jpg', '0001.jpg'):
        write(tmp_path / name)
    x, names = data.read_testing(tmp_path)
    assert x.shape == (3, 128, 128, 3) and names == ['0000.jpg', '0001.jpg', '0002.jpg']


# ---------------------------------------------------------------------- refusing

@pytest.mark.parametrize('name, content, reason', [
    ('0_1.jpg', b'', 'empty file'),
    ('0_1.jpg', b'a text file', 'no image that OpenCV can read'),
    ('0_1.jpg', 'baseline', 'cut off'),
    ('0_1.jpg', 'progressive', 'cut off'),
    ('0_1.png', 'png', 'cut off'),
    ('bread.jpg', 'whole', 'no label'),
    ('1.jpg', 'whole', 'no label'),
    ('11_1.jpg', 'whole', 'label 11 is not in 0..10'),
    ('Pizza/1.jpg', 'whole', "folder 'Pizza'"),
    ('0_2.jpg', 'link', 'No such file'),
])
def test_a_bad_file_is_named_with_its_reason(tmp_path, name, content, reason):
    write(tmp_path / '5_0.jpg')
    file = tmp_path / name
    if content == 'link':
        file.symlink_to(tmp_path / 'moved away')
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        write(file, progressive=content == 'progressive')
        if content != 'whole':
            file.write_bytes(file.read_bytes()[:-40])
    message = problem(tmp_path)
    assert str(file) in message and reason in message
    assert '\n' not in message and '5_0.jpg' not in message


def test_all_bad_files_of_both_folders_come_in_one_message(food11, tmp_path):
    shutil.copytree(food11, tmp_path, dirs_exist_ok=True)
    for i in range(9):
        (tmp_path / 'training' / f'4_bad{i}.jpg').touch()
    for i in range(4):
        (tmp_path / 'validation' / f'bad{i}.jpg').touch()
    with pytest.raises(data.BadFiles) as error:
        data.read_food11(tmp_path)
    lines = str(error.value).splitlines()
    assert lines[0].startswith('13 files cannot be used')
    assert len(lines) == 12 and 'and 3 more' in lines[-1]
    assert '4_bad0.jpg' in lines[1] and 'bad0.jpg' in lines[10]


def test_an_empty_and_a_missing_folder(tmp_path):
    (tmp_path / '.DS_Store').touch()
    assert f'no photographs in {tmp_path}' in problem(tmp_path)
    message = problem(tmp_path / 'food-11' / 'training')
    assert str(tmp_path / 'food-11' / 'training') in message and 'gdown' in message and 'training/0_0.jpg' in message
    (tmp_path / 'food-11' / 'Food-11' / 'training').mkdir(parents=True)  # unpacked one folder too deep
    assert f'--data-dir "{tmp_path / "food-11" / "Food-11"}"' in problem(tmp_path / 'food-11' / 'training')
    (tmp_path / 'training').mkdir()  # one folder too deep named
    assert f'--data-dir "{tmp_path}"' in problem(tmp_path / 'training' / 'training')


# ---------------------------------------------------------------------- dataset and batches

def test_imgdataset_with_and_without_labels(arrays):
    x, y = arrays[:2]
    image, label = data.ImgDataset(x, y, data.test_transform)[5]
    assert label.dtype == torch.long and label.item() == y[5]
    assert image.dtype == torch.float32
    assert np.array_equal(image.numpy(), x[5].transpose(2, 0, 1).astype(np.float32) / 255)
    assert torch.equal(data.ImgDataset(x, transform=data.test_transform)[5], image)
    assert np.array_equal(data.ImgDataset(x)[5], x[5])
    assert len(data.ImgDataset(x)) == 44


def test_train_transform_flips_half_and_rotates_to_15_degrees():
    """A white bar right of the middle shows by its angle and its side what was done to the image."""
    steps = data.train_transform.transforms
    assert [type(step).__name__ for step in steps] == ['ToPILImage', 'RandomHorizontalFlip', 'RandomRotation', 'ToTensor']
    bar = np.zeros((128, 128, 3), np.uint8)
    bar[62:66, 80:120] = 255
    torch.manual_seed(0)
    angles, flips = [], 0
    for _ in range(400):
        rows, columns = torch.nonzero(data.train_transform(bar)[0] > 0, as_tuple=True)
        rows, columns = rows.float().mean() - 63.5, columns.float().mean() - 63.5
        flips += bool(columns < 0)
        angles.append(torch.rad2deg(torch.atan(rows / columns)).item())
    assert 160 < flips < 240
    assert -15.5 < min(angles) < -13 and 13 < max(angles) < 15.5


def test_loaders(arrays):
    train_x, train_y, val_x, val_y = arrays
    ids = torch.arange(44)  # in the place of labels, to see where each image went
    train_loader, val_loader = data.make_loaders(data.ImgDataset(train_x, ids, data.train_transform),
                                                 data.ImgDataset(val_x, val_y, data.test_transform), batch_size=16)
    epochs = [torch.cat([y for _, y in train_loader]) for _ in range(2)]
    assert [x.shape for x, _ in train_loader] == [(16, 128, 128, 3)] * 2 + [(12, 128, 128, 3)]
    assert all(torch.equal(epoch.sort()[0], ids) for epoch in epochs)
    assert not torch.equal(epochs[0], ids) and not torch.equal(*epochs)
    assert torch.cat([y for _, y in val_loader]).tolist() == val_y.tolist()


def test_batches_in_bytes_become_the_numbers_of_the_books_transforms(arrays):
    train_set, val_set = (data.ImgDataset(x, y, transform) for x, y, transform in (
        (*arrays[:2], data.train_transform), (*arrays[2:], data.test_transform)))
    train_set.seed.fill_(5)
    train_loader, val_loader = data.make_loaders(train_set, val_set)
    assert train_loader.batch_size == 128 and len(list(val_loader)) == 1
    order = list(train_loader.sampler)
    for loader, items in ((train_loader, [train_set[i] for i in order]), (val_loader, list(val_set))):
        x, y = next(iter(loader))
        assert x.dtype == torch.uint8 and y.tolist() == [label.item() for _, label in items]
        x = data.to_device(x, torch.device('cpu'))
        assert torch.equal(x, torch.stack([image for image, _ in items])) and x.is_contiguous(memory_format=torch.channels_last)
    floats = data.ImgDataset(arrays[0], arrays[1], lambda image: torch.from_numpy(image).permute(2, 0, 1) / 127.5 - 1)
    x, _ = next(iter(data.make_loaders(floats, val_set)[0]))  # a reader's own transform stays as it is
    assert data.to_device(x, torch.device('cpu')).min() < 0


def test_the_shares_of_several_processes_make_up_the_batches_of_one():
    train_set = data.ImgDataset(np.zeros((23, 1, 1, 3), np.uint8), range(23))
    train_set.seed.fill_(3)
    whole, *shares = (data.make_loaders(train_set, train_set, 8, rank=rank, world=world)[0]
                      for rank, world in ((0, 1), (0, 2), (1, 2)))
    assert len(whole) == len(shares[0]) == len(shares[1]) == 3 and [len(share.sampler) for share in shares] == [12, 11]
    for (_, y), *parts in zip(whole, *shares, strict=True):
        assert sorted(torch.cat([part for _, part in parts]).tolist()) == sorted(y.tolist())


def test_workers_that_are_not_forked_have_no_copy_of_the_images(food11, monkeypatch):
    monkeypatch.setattr(data, 'forks', lambda: False)
    x, y = data.readfile(food11 / 'validation')
    val_set = data.ImgDataset(x, y, data.test_transform)
    loader, _ = data.make_loaders(val_set, val_set, workers=1)
    loader.multiprocessing_context = 'spawn'
    loader.dataset.seed.fill_(1)
    (images, labels), = loader
    order = list(loader.sampler)
    assert np.array_equal(images, x[order]) and labels.tolist() == y[order].tolist()
    x[:] = 7  # which the worker sees, and the seed of the next epoch as well
    loader.dataset.seed.fill_(2)
    (images, labels), = loader
    assert (images == 7).all() and labels.tolist() == y[list(loader.sampler)].tolist() != y[order].tolist()


# ---------------------------------------------------------------------- looking

def test_preview_shows_true_colours_and_every_class():
    blue = np.zeros((3, 128, 128, 3), np.uint8)
    blue[...] = (255, 0, 0)  # BGR
    train_set = data.ImgDataset(blue, [4, 4, 10], data.train_transform)
    figure = Figure(figsize=(12, 5))
    torch.manual_seed(0)
    data.draw_preview(figure, train_set, index=2)
    left, right = figure.axes
    assert (left.get_title(), left.get_xlabel()) == ('10: Vegetable/Fruit', 'train_set[2]')
    names = [name.get_text().split() for name in right.get_xticklabels()]
    assert names[3] == ['3', 'Egg', '(none)'] and names[4] == ['4', 'Fried', 'food'] and names[6] == ['6', 'Noodles/', 'Pasta', '(none)']
    tiles = np.asarray(right.images[0].get_array()).reshape(5, 136, 11, 136, 3).transpose(0, 2, 1, 3, 4)
    assert (tiles[:, 3] == 1).all()
    for label in (4, 10):
        assert (tiles[0, label, 4:-4, 4:-4] == (0, 0, 1)).all()  # RGB
        corners = tiles[1:, label, 6, 6].tolist()
        assert [0, 0, 0] in corners and (tiles[1:, label, 68, 68] == (0, 0, 1)).all()  # turned ones have black corners


def test_data_script_on_the_demo(script, tmp_path):
    (tmp_path / 'food-11').mkdir()
    done = script('chapter2_1_data.py', '--demo')
    assert done.returncode == 0 and done.stderr == ''
    lines = done.stdout.splitlines()
    assert lines[0] == '(330, 128, 128, 3)'
    assert lines[5].split() == ['3', 'Egg', '30', '10'] and lines[13].split() == ['in', 'all', '330', '110']
    assert str(tmp_path / 'chapter2_1_data.png') in lines[14]
    width, height = Image.open(tmp_path / 'chapter2_1_data.png').size
    assert 1000 < width < 1366 and 400 < height < 768  # readable, and fits a small screen
    assert not os.listdir(tmp_path / 'food-11')


def test_with_a_display_the_preview_opens_in_a_window(call, tmp_path, monkeypatch):
    from matplotlib import pyplot as plt
    shown = []
    monkeypatch.setattr(plt.figure().canvas.__class__, 'required_interactive_framework', 'qt')
    monkeypatch.setattr(plt, 'show', lambda: shown.append(plt.gcf().axes[0].get_xlabel()))
    for arguments in (['--index', '7'], []):
        assert call(data.main, '--demo', *arguments).returncode == 0
    assert shown == ['train_set[7]', 'train_set[100]'] and os.listdir(tmp_path) == ['food-11-demo']


def test_data_scripts_mistakes_end_in_one_line(call, food11, tmp_path):
    for arguments, word in [((), 'gdown'),
                            (('--data-dir', food11, '--index', 44), '0..43'),
                            (('--data-dir', food11, '--save', 'preview.xyz'), 'preview.xyz'),
                            (('--data-dir', food11, '--save', 'nowhere/preview.png'), 'nowhere')]:
        done = call(data.main, *arguments)
        assert done.returncode == 1 and done.stderr.startswith('error: ')
        assert word in done.stderr and done.stderr.count('\n') == 1
    done = call(data.main, '--data-dir', food11, '--save', '预览.jpg')
    assert done.returncode == 0 and (tmp_path / '预览.jpg').stat().st_size > 10_000


def test_drawn_images_are_all_different(arrays):
    train_x, _, val_x, _ = arrays
    assert len({image.tobytes() for image in [*train_x, *val_x]}) == 66
    assert pickle.dumps(data.draw_dish(3, np.random.default_rng(1))) == pickle.dumps(data.draw_dish(3, np.random.default_rng(1)))
