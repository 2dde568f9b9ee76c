"""chapter2_1_data.py: what it reads, what it refuses, what it shows."""
import os
import re
import shutil
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torchvision import transforms

import chapter2_1_data as data
from tests.fake_food11 import draw_dish


def write(file, image=None, **options):
    """A drawn photograph, or the given RGB picture, in the format that the file's name says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if image is None:
        image = Image.fromarray(draw_dish(0, np.random.default_rng(len(file.name)))[..., ::-1])
    image.save(file, **options)
    return file


def problem(path):
    """The message with which reading `path` is refused."""
    with pytest.raises(data.UserError) as error:
        data.readfile(path)
    return str(error.value)


@pytest.fixture(scope='session')
def arrays(food11):
    """train_x, train_y, val_x, val_y."""
    return data.read_food11(food11)


# ---- Reading ---------------------------------------------------------------------------------

def test_readfile_gives_opencvs_pixels_in_sorted_order(food11):
    x, y = data.readfile(food11 / 'training')
    names = sorted(os.listdir(food11 / 'training'))
    assert (x.shape, x.dtype) == ((44, 128, 128, 3), np.uint8)
    assert (y.shape, y.dtype) == ((44,), np.uint8)
    assert y.tolist() == [int(name.split('_')[0]) for name in names]
    for image, name in zip(x, names):
        whole = cv2.imread(str(food11 / 'training' / name))
        assert np.array_equal(image, cv2.resize(whole, (128, 128)))


@pytest.mark.skipif('FOOD11_DIR' not in os.environ, reason='FOOD11_DIR names no photographs')
def test_readfile_on_real_photographs():
    folder = Path(os.environ['FOOD11_DIR'], 'training')
    x, y = data.readfile(folder)
    for image, file in list(zip(x, data.list_images(folder), strict=True))[::17]:
        assert np.array_equal(image, cv2.resize(cv2.imread(str(file)), (128, 128)))
    for label, file in zip(y, data.list_images(folder), strict=True):
        if file.parent == folder:
            assert label == int(re.split('[_-]', file.name)[0])
        else:
            assert data.CLASSES[label].replace('/', '-') == file.parent.name


def test_every_spelling_of_a_name(tmp_path):
    labels = {'0_9.webp': 0, '10_0.JPG': 10, '1_5.bmp': 1, '2_1.png': 2, '3-2.jpg': 3,
              '3_1.jpg': 3, '4_2.TIFF': 4, '7_1.Jpeg': 7}
    for name in labels:
        write(tmp_path / name)
    x, y = data.readfile(tmp_path)
    assert y.tolist() == [labels[name] for name in sorted(labels)]
    assert x.any(axis=(1, 2, 3)).all()


def test_kaggles_folders_are_the_classes(tmp_path):
    folders = ['Bread', 'Dairy product', 'Dessert', 'Egg', 'Fried food', 'Meat',
               'Noodles-Pasta', 'Rice', 'Seafood', 'Soup', 'Vegetable-Fruit']
    for name in folders:
        write(tmp_path / name / '12.jpg')
        write(tmp_path / name / '5.jpg')
    assert data.readfile(tmp_path)[1].tolist() == [label for label in range(11) for _ in range(2)]


@pytest.mark.parametrize('mode', ['L', 'CMYK'])
def test_grey_and_cmyk_photographs(tmp_path, mode):
    dish = Image.fromarray(draw_dish(9, np.random.default_rng(0))[..., ::-1])
    file = write(tmp_path / '9_0.jpg', dish.convert(mode))
    x = data.readfile(tmp_path)[0][0]
    assert np.array_equal(x, cv2.resize(cv2.imread(str(file)), (128, 128)))
    expected = np.asarray(dish.convert(mode).convert('RGB').resize((128, 128)))[..., ::-1]
    assert abs(x.astype(int) - expected).mean() < 8


def test_chinese_names_spaces_and_what_systems_leave_behind(food11, tmp_path):
    folder = tmp_path / '美食 数据' / 'training'
    shutil.copytree(food11 / 'training', folder)
    (folder / '3_0.jpg').rename(folder / '3_鸡蛋 一.jpg')
    for name in ('.DS_Store', '._0_0.jpg', 'Thumbs.db', 'desktop.ini', 'labels.csv',
                 '__MACOSX/._0_0.jpg', '.cache/0_0.jpg', '@eaDir/0_0.jpg/SYNOPHOTO_THUMB_M.jpg'):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b'no photograph')
    x, y = data.readfile(folder)
    assert len(x) == 44 and np.bincount(y).tolist() == [4] * 11


# ---- Classes of one's own --------------------------------------------------------------------

def test_folders_find_their_class_whatever_its_script(tmp_path, monkeypatch):
    monkeypatch.setattr(data, 'CLASSES', ['米饭', '面条', 'class 1', 'class 2', 'Café/Thé'])
    folders = ['米饭', '面条', 'Class-1', 'class_2', unicodedata.normalize('NFD', 'café thé')]
    for name in folders:
        write(tmp_path / name / '1.jpg')
    x, y = data.readfile(tmp_path)
    expected = [label for _, label in sorted(zip(folders, range(5)))]
    assert y.tolist() == expected
    write(tmp_path / '汤' / '1.jpg')
    assert "its folder '汤'" in problem(tmp_path)


@pytest.mark.parametrize('names', [['C++', 'C#'], ['Egg', 'egg'], ['Egg', 'Egg'], ['a/b', 'a b']])
def test_classes_that_cannot_be_told_apart_are_refused(tmp_path, monkeypatch, names):
    monkeypatch.setattr(data, 'CLASSES', ['Bread', *names])
    write(tmp_path / 'training' / '0_1.jpg')
    with pytest.raises(data.UserError) as error:
        data.read_food11(tmp_path)
    assert repr(names[0]) in str(error.value) and repr(names[1]) in str(error.value)


def test_more_classes_than_uint8_has_labels_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data, 'CLASSES', [f'class {i}' for i in range(257)])
    write(tmp_path / 'training' / '256_1.jpg')
    with pytest.raises(data.UserError, match='at most 256'):
        data.read_food11(tmp_path)


# ---- Refusing --------------------------------------------------------------------------------

@pytest.mark.parametrize('name, content, reason', [
    ('0_1.jpg', b'', 'empty file'),
    ('0_1.jpg', b'a text file', 'not an image'),
    ('0_1.jpg', 'baseline', 'cut off'),
    ('0_1.jpg', 'progressive', 'cut off'),
    ('0_1.png', 'png', 'cut off'),
    ('bread.jpg', 'whole', 'no label'),
    ('1.jpg', 'whole', 'no label'),
    ('1', 'copy', 'no label'),
    ('11_1.jpg', 'whole', 'label 11 is not in 0..10'),
    ('Pizza/1.jpg', 'whole', "folder 'Pizza'"),
    ('00/1.jpg', 'whole', "folder '00' is not named like any of the CLASSES in chapter2_1_data.py "
                          "(Hung-yi Lee's course of 2021"),
    ('0_2.jpg', 'link', 'No such file'),
])
def test_a_bad_file_is_named_with_the_reason(tmp_path, name, content, reason):
    write(tmp_path / '5_0.jpg')
    file = tmp_path / name
    if content == 'link':
        try:
            file.symlink_to(tmp_path / 'moved away')
        except OSError:
            pytest.skip('no symbolic links here')
    elif content == 'copy':
        shutil.copy(tmp_path / '5_0.jpg', file)
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        write(file, progressive=content == 'progressive')
        if content != 'whole':
            file.write_bytes(file.read_bytes()[:-40])
    message = problem(tmp_path)
    assert str(file) in message and reason in message
    assert message.endswith('; repair, rename or delete this file')
    assert '\n' not in message and '5_0.jpg' not in message


def test_all_bad_files_of_both_folders_come_in_one_message(food11, tmp_path):
    shutil.copytree(food11, tmp_path, dirs_exist_ok=True)
    for i in range(9):
        (tmp_path / 'training' / f'4_bad{i}.jpg').touch()
    for i in range(4):
        (tmp_path / 'validation' / f'bad{i}.jpg').touch()
    with pytest.raises(data.UserError) as error:
        data.read_food11(tmp_path)
    lines = str(error.value).splitlines()
    assert lines[0] == '13 files cannot be used; repair, rename or delete them:'
    assert len(lines) == 12 and 'and 3 more' in lines[-1]
    assert '4_bad0.jpg' in lines[1] and 'bad0.jpg' in lines[10]


def test_an_empty_and_a_missing_folder(tmp_path):
    (tmp_path / '.DS_Store').touch()
    assert f'no photographs in {tmp_path}' in problem(tmp_path)
    # The course of 2021 had other photographs, in folders of folders.
    write(tmp_path / '2021' / '0_0.jpg')
    for name in ('Labeled', 'unlabeled'):
        write(tmp_path / '2021' / name / '00' / '0.jpg')
    message = problem(tmp_path / '2021')
    assert 'course of 2021' in message and 'food-11/README.md' in message
    write(tmp_path / 'labeled' / '0_0.jpg')  # a folder of one's own
    assert len(data.list_images(tmp_path / 'labeled')) == 1
    missing = tmp_path / 'food-11' / 'training'
    assert str(missing) in problem(missing) and 'food-11/README.md' in problem(missing)
    # Unpacked one folder too deep.
    (tmp_path / 'food-11' / 'Food-11' / 'training').mkdir(parents=True)
    assert f'--data-dir "{tmp_path / "food-11" / "Food-11"}"' in problem(missing)
    # Named one folder too deep.
    (tmp_path / 'training').mkdir()
    assert f'--data-dir "{tmp_path}"' in problem(tmp_path / 'training' / 'training')


# ---- Dataset and batches ---------------------------------------------------------------------

def test_imgdataset_with_and_without_labels(arrays):
    x, y = arrays[:2]
    image, label = data.ImgDataset(x, y, data.test_transform)[5]
    assert label.dtype == torch.long and label.item() == y[5]
    assert image.dtype == torch.float32
    assert np.array_equal(image.numpy(), x[5].transpose(2, 0, 1).astype(np.float32) / 255)
    assert torch.equal(data.ImgDataset(x, transform=data.test_transform)[5], image)
    assert np.array_equal(data.ImgDataset(x)[5], x[5])
    assert len(data.ImgDataset(x)) == 44
    assert np.array_equal(data.ImgDataset(x[:, ::-1])[5], x[5][::-1])


def test_train_transform_flips_half_and_rotates_to_15_degrees():
    """A white bar right of the middle shows by its angle and its side what was done to it."""
    steps = [type(step).__name__ for step in data.train_transform.transforms]
    assert steps == ['ToPILImage', 'RandomHorizontalFlip', 'RandomRotation', 'ToTensor']
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


def test_augmentation_depends_on_seed_epoch_and_index_once_an_epoch_is_set(arrays):
    train_set = data.ImgDataset(*arrays[:2], data.train_transform)
    # As in the book, every draw is another one ...
    assert len({train_set[3][0].numpy().tobytes() for _ in range(9)}) > 5
    seen = {}
    for seed in (0, 1):
        train_set = data.ImgDataset(*arrays[:2], data.train_transform, seed)
        for epoch in (1, 2):
            train_set.set_epoch(epoch)
            for index in (3, 7):
                seen[seed, epoch, index] = train_set[index][0]
    # ... and then it can be repeated, in any order, and leaves the generator of others alone.
    torch.manual_seed(9)
    undisturbed = torch.rand(1)
    torch.manual_seed(9)
    for (seed, epoch, index), image in reversed(seen.items()):
        train_set = data.ImgDataset(*arrays[:2], data.train_transform, seed)
        train_set.set_epoch(epoch)
        assert torch.equal(train_set[index][0], image)
        assert torch.equal(train_set[index - 44][0], image)
    assert torch.equal(torch.rand(1), undisturbed)
    assert len({image.numpy().tobytes() for image in seen.values()}) == 8


def test_loaders_give_every_image_once_an_epoch(arrays):
    train_x, train_y, val_x, val_y = arrays
    ids = torch.arange(44)  # in the place of labels, to see where each image goes
    train_set = data.ImgDataset(train_x, ids, data.train_transform)
    val_set = data.ImgDataset(val_x, val_y, data.test_transform)
    train_loader, val_loader = data.make_loaders(train_set, val_set, 16)
    epochs = []
    for epoch in (1, 2):
        data.set_epoch(train_loader, epoch)
        epochs.append(torch.cat([y for _, y in train_loader]))
        assert torch.equal(epochs[-1].sort()[0], ids) and not torch.equal(epochs[-1], ids)
    assert not torch.equal(*epochs)
    assert [len(y) for _, y in train_loader] == [16, 16, 12]
    assert torch.cat([y for _, y in val_loader]).tolist() == val_y.tolist()


def test_batches_become_the_numbers_of_the_books_transforms(arrays):
    train_set = data.ImgDataset(*arrays[:2], data.train_transform, seed=5)
    val_set = data.ImgDataset(*arrays[2:], data.test_transform)
    train_set.set_epoch(2)
    train_loader, val_loader = data.make_loaders(train_set, val_set, 128, seed=5)
    order = list(train_loader.sampler)
    for loader, items in ((train_loader, [train_set[i] for i in order]),
                          (val_loader, [val_set[i] for i in range(22)])):
        x, y = next(iter(loader))
        assert x.dtype == torch.uint8 and y.tolist() == [label.item() for _, label in items]
        x = data.to_input(x, torch.device('cpu'))
        assert torch.equal(x, torch.stack([image for image, _ in items]))


@pytest.mark.parametrize('transform', [
    transforms.Compose([transforms.ToTensor(), transforms.Normalize([.5] * 3, [.25] * 3)]),
    lambda image: torch.from_numpy(image).permute(2, 0, 1) / 127.5 - 1,
])
def test_transforms_of_ones_own_reach_the_network_as_they_are(arrays, transform):
    val_set = data.ImgDataset(*arrays[2:], transform)
    _, val_loader = data.make_loaders(val_set, val_set, 128)
    x, _ = next(iter(val_loader))
    x = data.to_input(x, torch.device('cpu'))
    assert torch.equal(x, torch.stack([val_set[i][0] for i in range(22)])) and x.min() < 0


@pytest.mark.parametrize('world_size', [1, 2, 4, 8, 16, 32, 64, 128])
def test_processes_share_the_real_sets_batches(world_size):
    train_set = data.ImgDataset(np.zeros((9866, 1, 1, 3), np.uint8), range(9866))
    batches = []
    for rank in range(world_size):
        train_loader, _ = data.make_loaders(train_set, train_set, 128, rank=rank,
                                            world_size=world_size)
        batches.append(list(train_loader.batch_sampler))
    assert {len(of_rank) for of_rank in batches} == {78}  # the same number of steps everywhere
    seen = [index for of_rank in batches for batch in of_rank for index in batch]
    assert set(seen) == set(range(9866)) and len(seen) < 9866 + world_size
    if world_size > 1:
        train_loader, _ = data.make_loaders(train_set, train_set, 128)
        first = [index for of_rank in batches for index in of_rank[0]]
        assert sorted(first) == sorted(next(iter(train_loader.batch_sampler)))


def test_workers_that_are_not_forked_share_the_images_and_see_each_epoch(arrays):
    train_set = data.ImgDataset(*arrays[:2], data.train_transform)
    train_loader, _ = data.make_loaders(train_set, train_set, 128, workers=1)
    train_loader.multiprocessing_context = 'spawn'
    for epoch in (1, 2):
        data.set_epoch(train_loader, epoch)
        (x, y), = train_loader
        expected = [train_set[i] for i in train_loader.sampler]
        assert torch.equal(data.to_input(x, torch.device('cpu')),
                           torch.stack([image for image, _ in expected]))
        assert y.tolist() == [label.item() for _, label in expected]
    # The images have been moved into shared memory: a worker that changed them would be seen.
    assert train_set.x.is_shared()


# ---- Looking ---------------------------------------------------------------------------------

def test_preview_shows_true_colours_and_every_class():
    blue = np.zeros((3, 128, 128, 3), np.uint8)
    blue[...] = (255, 0, 0)  # BGR
    train_set = data.ImgDataset(blue, [4, 4, 10], data.train_transform)
    left, right = Figure(figsize=(12, 5)).subplots(1, 2)
    torch.manual_seed(0)
    data.show_sample(left, train_set, 2)
    assert (left.get_title(), left.get_xlabel()) == ('10: Vegetable/Fruit', 'train_set[2]')
    assert (np.asarray(left.images[0].get_array())[64, 64] == (0, 0, 1)).all()  # RGB

    data.show_classes(right, train_set)
    names = [name.get_text().split() for name in right.get_xticklabels()]
    assert names[3] == ['3', 'Egg', '(none)'] and names[4] == ['4', 'Fried', 'food']
    assert names[6] == ['6', 'Noodles/', 'Pasta', '(none)']
    grid = np.asarray(right.images[0].get_array())
    rows, columns = right.get_yticks().astype(int), right.get_xticks().astype(int)
    assert (grid[np.ix_(rows, columns[[3]])] == 1).all()
    assert (grid[np.ix_(rows, columns[[4, 10]])] == (0, 0, 1)).all()
    # What is rotated has black corners; the first row is as it is.
    corners = grid[np.ix_(rows - 60, columns[[4, 10]] - 60)]
    assert (corners[0] == (0, 0, 1)).all() and (corners[1:] == 0).all(axis=-1).any()


def test_data_script_on_the_demo(scripts, tmp_path):
    (tmp_path / 'food-11').mkdir()
    env = {key: value for key, value in os.environ.items()
           if key not in ('DISPLAY', 'WAYLAND_DISPLAY', 'MPLBACKEND')}
    done = scripts.run('--demo', script='chapter2_1_data.py', env=env)
    assert done.returncode == 0 and done.stderr == ''
    lines = done.stdout.splitlines()
    assert lines[0] == '(330, 128, 128, 3)'
    assert lines[5].split() == ['3', 'Egg', '30', '10']
    assert lines[13].split() == ['total', '330', '110']
    assert not [line for line in lines if 'food-11' in line and str(tmp_path) not in line]
    assert str(tmp_path / 'chapter2_1_data.png') in lines[-1]
    width, height = Image.open(tmp_path / 'chapter2_1_data.png').size
    assert 1000 < width < 1366 and 400 < height < 768  # readable, and fits a small screen
    assert not os.listdir(tmp_path / 'food-11')


def test_the_counts_stand_beside_those_of_food_11_if_they_differ(scripts, food11, capsys):
    done = scripts.call('--data-dir', food11, main=scripts.data.main)
    lines = done.stdout.splitlines()
    assert lines[1].endswith('food-11 training food-11 validation')
    assert lines[8].split() == ['6', 'Noodles/Pasta', '4', '2', '440', '147']
    assert lines[13].split() == ['total', '44', '22', '9866', '3430']
    # The complete food-11, and another data set.
    train_y = np.repeat(np.arange(11), [994, 429, 1500, 986, 848, 1325, 440, 280, 855, 1500, 709])
    val_y = np.repeat(np.arange(11), [362, 144, 500, 327, 326, 449, 147, 96, 347, 500, 232])
    scripts.data.print_counts(train_y, val_y)
    assert 'food-11' not in capsys.readouterr().out
    scripts.data.print_counts(train_y[1:], val_y)
    assert 'food-11 training' in capsys.readouterr().out


def test_with_a_display_the_preview_opens_in_a_window(scripts, food11, tmp_path, monkeypatch):
    from matplotlib import pyplot as plt
    shown = []
    monkeypatch.setattr(plt.figure().canvas.__class__, 'required_interactive_framework', 'qt')
    monkeypatch.setattr(plt, 'show', lambda: shown.append(plt.gcf().axes[0].get_xlabel()))
    for arguments in (['--index', '7'], []):
        done = scripts.call('--data-dir', food11, *arguments, main=scripts.data.main)
        assert done.returncode == 0
    assert shown == ['train_set[7]', 'train_set[43]'] and os.listdir(tmp_path) == []


def test_data_scripts_mistakes_end_in_one_line(scripts, food11, tmp_path):
    for arguments, word in [((), 'food-11/README.md'),
                            (('--data-dir', food11, '--index', 44), '0..43'),
                            (('--data-dir', ''), 'no folder'),
                            (('--data-dir', food11, '--save', 'preview.xyz'), '.png, .jpg'),
                            (('--data-dir', food11, '--save', 'preview.pgf'), 'preview.pgf'),
                            (('--data-dir', food11, '--save', 'nowhere/preview.png'), 'nowhere')]:
        done = scripts.call(*arguments, main=scripts.data.main)
        assert done.returncode == 1 and done.stderr.startswith('error: ')
        assert word in done.stderr and done.stderr.count('\n') == 1
    done = scripts.call('--data-dir', food11, '--save', '预览.jpg', main=scripts.data.main)
    assert done.returncode == 0 and (tmp_path / '预览.jpg').stat().st_size > 10_000


def test_the_demo_follows_a_shorter_list_of_classes(scripts, edited):
    assert scripts.call('--demo', main=scripts.data.main).returncode == 0
    names = ",\n           ".join([", ".join(repr(name) for name in data.CLASSES[:6]),
                                   ", ".join(repr(name) for name in data.CLASSES[6:])])
    three = edited({f'CLASSES = [{names}]': "CLASSES = ['米饭', '面条', '汤']"})
    done = three.call('--demo', main=three.data.main)
    assert done.returncode == 0 and done.stdout.splitlines()[0].startswith('(90, ')


def test_help_opens_with_the_examples(scripts):
    done = scripts.call('--help', main=scripts.data.main)
    assert done.returncode == 0
    assert done.stdout.index('python chapter2_1_data.py --index 7') < done.stdout.index('--save')


def test_fake_photographs_are_all_different_and_always_the_same(arrays):
    train_x, _, val_x, _ = arrays
    assert len({image.tobytes() for image in [*train_x, *val_x]}) == 66
    one, again = (draw_dish(3, np.random.default_rng(1)) for _ in range(2))
    assert np.array_equal(one, again)
