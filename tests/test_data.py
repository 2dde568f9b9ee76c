"""chapter2_1_data.py: what it reads, what it refuses, what it shows."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms.functional import convert_image_dtype

import chapter2_1_data as data
from tests.fake_food11 import draw_dish, draw_food11

FLOWERS = ['Bluebell', 'Buttercup', 'Coltsfoot', 'Cowslip', 'Crocus', 'Daffodil', 'Daisy',
           'Dandelion', 'Fritillary', 'Iris', 'Lily of the valley', 'Pansy', 'Snowdrop',
           'Sunflower', 'Tiger lily', 'Tulip', 'Windflower']
KAGGLES_FOLDERS = ['Bread', 'Dairy product', 'Dessert', 'Egg', 'Fried food', 'Meat',
                   'Noodles-Pasta', 'Rice', 'Seafood', 'Soup', 'Vegetable-Fruit']


def write(file, image=None, seed=0, **options):
    """A drawn photograph, or the given RGB picture, in the format that the file's name says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if image is None:
        image = Image.fromarray(draw_dish(0, np.random.default_rng(seed))[..., ::-1])
    image.save(file, **options)
    return file


def write_all(folder, *files):
    """Photographs such as training/Egg/1.jpg, no two the same."""
    for seed, file in enumerate(files):
        write(folder / file, seed=seed)
    return folder


def cut_off(file, missing):
    """Takes bytes from the end of a file."""
    file.write_bytes(file.read_bytes()[:-missing])


def opencvs(file):
    return cv2.resize(cv2.imread(str(file)), (128, 128))


def link(target, file):
    try:
        file.symlink_to(target)
    except OSError:
        pytest.skip('no symbolic links here')


def problem(function, *arguments):
    """The message with which `function` refuses what it is given."""
    with pytest.raises(data.UserError) as error:
        function(*arguments)
    return str(error.value)


@pytest.fixture(scope='session')
def arrays(food11):
    """train_x, train_y, val_x, val_y."""
    return *data.readfile(food11 / 'training'), *data.readfile(food11 / 'validation')


# ---- Reading ---------------------------------------------------------------------------------

def test_readfile_gives_opencvs_pixels_in_sorted_order(food11, arrays):
    x, y, _, _ = arrays
    names = sorted(os.listdir(food11 / 'training'))
    assert (x.shape, x.dtype) == ((44, 128, 128, 3), np.uint8)
    assert (y.shape, y.dtype) == ((44,), np.uint8)
    assert y.tolist() == [int(name.split('_')[0]) for name in names]
    for image, name in zip(x, names):
        assert np.array_equal(image, opencvs(food11 / 'training' / name))


@pytest.mark.skipif('FOOD11_DIR' not in os.environ, reason='FOOD11_DIR names no photographs')
def test_readfile_on_real_photographs():
    folder = Path(os.environ['FOOD11_DIR'], 'training')
    classes = data.find_classes(folder.parent)
    assert [name.replace('-', '/') for name in classes] == data.CLASSES
    files = data.list_images(folder)
    x, y = data.readfile(folder, classes)
    for image, file in list(zip(x, files, strict=True))[::17]:
        assert np.array_equal(image, opencvs(file))
    for label, file in zip(y, files, strict=True):
        if file.parent == folder:
            assert label == int(re.split('[_-]', file.name)[0])
        else:
            assert classes[label] == file.parent.name


def test_every_spelling_of_a_name(tmp_path):
    labels = {'0_9.webp': 0, '10_0.JPG': 10, '1_5.bmp': 1, '2_1.png': 2, '3-17.jpg': 3,
              '3_17.jpg': 3, '4_2.TIFF': 4, '7_1.Jpeg': 7}
    for name in labels:
        write(tmp_path / name)
    x, y = data.readfile(tmp_path)
    assert y.tolist() == [labels[name] for name in sorted(labels)]
    assert x.any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize('mode', ['L', 'CMYK'])
def test_grey_and_cmyk_photographs(tmp_path, mode):
    dish = Image.fromarray(draw_dish(9, np.random.default_rng(0))[..., ::-1])
    file = write(tmp_path / '9_0.jpg', dish.convert(mode))
    x = data.readfile(tmp_path)[0][0]
    assert np.array_equal(x, opencvs(file))
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
    assert data.find_classes(folder.parent) == data.CLASSES
    x, y = data.readfile(folder)
    assert len(x) == 44 and np.bincount(y).tolist() == [4] * 11


def test_jpegs_that_are_cut_off_are_named_in_one_warning(tmp_path, capsys):
    """Even complete pictures may lack the two bytes of the end marker."""
    whole = write(tmp_path / '0_0.jpg')
    cut_off(write(tmp_path / '1_0.jpg'), 2)
    cut_off(write(tmp_path / '2_0.jpg'), whole.stat().st_size // 2)
    cut_off(write(tmp_path / '3_0.jpg', progressive=True), whole.stat().st_size // 2)
    assert data.readfile(tmp_path)[1].tolist() == [0, 1, 2, 3]
    warning, = capsys.readouterr().err.splitlines()
    assert warning.startswith('warning: cut off') and '3 of 4 photographs' in warning
    for label in (1, 2, 3):
        assert str(tmp_path / f'{label}_0.jpg') in warning
    assert str(whole) not in warning


def test_predict_names_the_jpegs_that_are_cut_off_too(small, copy_of_finished, tmp_path):
    whole = write(tmp_path / 'photographs' / '0_0.jpg')
    cut_off(write(tmp_path / 'photographs' / '1_0.jpg'), whole.stat().st_size // 2)
    for path in ('photographs', os.path.join('photographs', '1_0.jpg')):
        done = small.call('--out', 'run', '--device', 'cpu', '--predict', path)
        assert done.returncode == 0, done.stderr
        warning, = done.stderr.splitlines()
        assert warning.startswith('warning: cut off') and '1_0.jpg' in warning


def test_a_jpeg_is_read_as_opencv_reads_it_wherever_its_picture_is_cut_off(tmp_path):
    dish = Image.fromarray(draw_dish(0, np.random.default_rng(0))[..., ::-1]).resize((24, 24))
    whole = write(tmp_path / 'whole.jpg', dish).read_bytes()
    (tmp_path / 'cut').mkdir()
    # The picture begins after a marker and a header of 14 bytes.
    for length in range(whole.index(b'\xff\xda') + 15, len(whole)):
        (tmp_path / 'cut' / f'0_{length}.jpg').write_bytes(whole[:length])
    x, _ = data.readfile(tmp_path / 'cut')
    assert len(x) > 100
    for image, file in zip(x, data.list_images(tmp_path / 'cut'), strict=True):
        assert np.array_equal(image, opencvs(file)), file


# ---- Refusing --------------------------------------------------------------------------------

NO_IMAGE = 'cannot be read as an image'
NO_LABEL = 'its folder is not one of the classes, and its name has no label in 0..10 in front'


@pytest.mark.parametrize('name, content, reason', [
    ('0_1.jpg', b'', NO_IMAGE),
    ('0_1.jpg', b'a text file', NO_IMAGE),
    ('0_1.png', 40, NO_IMAGE),
    ('0_1.png', 1, NO_IMAGE),
    ('0_1.bmp', 1, NO_IMAGE),
    ('0_2.jpg', 'link', NO_IMAGE),
    ('bread.jpg', 'copy', NO_LABEL),
    ('1.jpg', 'copy', NO_LABEL),
    ('1', 'copy', NO_LABEL),
    ('11_1.jpg', 'copy', NO_LABEL),
    ('Pizza/1.jpg', 'copy', NO_LABEL),
])
def test_a_bad_file_is_named_with_the_reason(tmp_path, name, content, reason):
    """content: bytes, or how many are cut off, or what the file is."""
    write(tmp_path / '5_0.jpg')
    file = tmp_path / name
    if content == 'link':
        link(tmp_path / 'moved away', file)
    elif content == 'copy':
        file.parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / '5_0.jpg', file)
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        cut_off(write(file), content)
        assert cv2.imread(str(file)) is None
    message = problem(data.readfile, tmp_path)
    assert str(file) in message and reason in message
    assert message.endswith('; repair, rename or delete this file')
    assert '\n' not in message and '5_0.jpg' not in message


def test_all_bad_files_of_a_folder_come_in_one_message(small, food11, tmp_path):
    shutil.copytree(food11, tmp_path / 'food-11')
    for i in range(9):
        (tmp_path / 'food-11' / 'training' / f'4_bad{i}.jpg').touch()
    for i in range(4):
        shutil.copy(food11 / 'training' / '0_0.jpg',
                    tmp_path / 'food-11' / 'training' / f'bad{i}.jpg')
    for main in (small.data.main, small.train.main):
        done = small.call(main=main)
        message = done.stderr[done.stderr.index('error: '):].splitlines()
        assert done.returncode == 1 and len(message) == 12
        assert message[0] == 'error: 13 files cannot be used; repair, rename or delete them:'
        assert f'4_bad0.jpg: {NO_IMAGE}' in message[1]
        assert f'bad0.jpg: {NO_LABEL}' in message[10] and message[11] == '  and 3 more'


def test_an_empty_and_a_missing_folder(tmp_path):
    (tmp_path / '.DS_Store').touch()
    assert f'no photographs in {tmp_path}' in problem(data.readfile, tmp_path)
    missing = tmp_path / 'food-11'
    message = problem(data.find_classes, missing)
    assert str(missing) in message and 'food-11/README.md' in message
    write(missing / 'training' / '0_1.jpg')
    assert data.find_classes(missing) == data.CLASSES
    assert str(missing / 'validation') in problem(data.readfile, missing / 'validation')


# ---- Classes ---------------------------------------------------------------------------------

@pytest.mark.parametrize('classes', [FLOWERS, KAGGLES_FOLDERS, ['汤', '米饭', '面条'], ['a', 'b']],
                         ids=len)
def test_the_folders_of_training_are_the_classes(tmp_path, classes):
    """The labels are in sorted order: for Kaggle's food-11, that is the book's."""
    for name in reversed(classes):
        write_all(tmp_path, f'training/{name}/12.jpg', f'training/{name}/5.jpg')
    write(tmp_path / 'validation' / classes[-1] / '7_1.jpg')
    assert data.find_classes(tmp_path) == classes
    x, y = data.readfile(tmp_path / 'training', classes)
    assert y.tolist() == [label for label in range(len(classes)) for _ in range(2)]
    assert np.array_equal(x[1], opencvs(tmp_path / 'training' / classes[0] / '5.jpg'))
    assert data.readfile(tmp_path / 'validation', classes)[1].tolist() == [len(classes) - 1]


def test_photographs_in_folders_within_class_folders_are_read(tmp_path):
    folder = write_all(tmp_path / 'mine', 'dogs/1.jpg', 'dogs/2023/summer/2.jpg', 'cats/1.jpg')
    write_all(tmp_path / 'other disk', '1.jpg', 'old/2.jpg')
    link(tmp_path / 'other disk', folder / 'fish')
    classes = data.find_classes(folder)
    assert classes == ['cats', 'dogs', 'fish']
    assert data.readfile(folder, classes)[1].tolist() == [0, 1, 1, 2, 2]
    # The folder may be a link as well.
    link(folder, tmp_path / 'link')
    assert data.find_classes(tmp_path / 'link') == classes
    assert len(data.readfile(tmp_path / 'link', classes)[0]) == 5


def test_a_class_that_training_lacks_is_refused(small, tmp_path):
    write_all(tmp_path / 'food-11', 'training/Egg/1.jpg', 'training/Soup/1.jpg',
                 'validation/Soup/1.jpg', 'validation/Pizza/1.jpg')
    for main in (small.data.main, small.train.main):
        done = small.call(main=main)
        assert done.returncode == 1
        file = os.path.join('validation', 'Pizza', '1.jpg')
        assert f'{file}: its folder is not one of the classes' in done.stderr


def test_the_outermost_folder_is_the_class(tmp_path):
    write_all(tmp_path / 'validation', 'Egg/Soup/1.jpg', 'Soup/1.jpg')
    assert data.readfile(tmp_path / 'validation', ['Egg', 'Soup'])[1].tolist() == [0, 1]
    write(tmp_path / 'validation' / 'Pizza' / 'Soup' / '1.jpg')
    message = problem(data.readfile, tmp_path / 'validation', ['Egg', 'Soup'])
    assert os.path.join('Pizza', 'Soup', '1.jpg') in message and '\n' not in message


def test_every_fifth_photograph_is_for_validation_if_nobody_has_divided_them(small, tmp_path):
    names = [f'{name}/{number}.jpg' for name in ('cats', 'dogs') for number in range(10, 21)]
    write_all(tmp_path / 'mine', *names)
    train_files, val_files = (data.list_images(tmp_path / 'mine' / name)
                              for name in ('training', 'validation'))
    assert [file.relative_to(tmp_path / 'mine').as_posix() for file in val_files] == names[4::5]
    assert sorted([*train_files, *val_files]) == [tmp_path / 'mine' / name for name in names]
    done = small.call('--data-dir', 'mine', main=small.data.main)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert 'mine has no folder training: every fifth photograph is for validation' in lines
    assert '(18, 32, 32, 3)' in lines
    assert [line.split() for line in lines[3:6]] == [
        ['0', 'cats', '9', '2'], ['1', 'dogs', '9', '2'], ['total', '18', '4']]


@pytest.mark.parametrize('files, too_deep', [
    (['training/Egg/1.jpg', 'training/Soup/1.jpg', 'validation/Egg/2.jpg', 'validation/Soup/2.jpg'],
     ['training', 'validation', 'training/Egg', 'validation/Soup']),
    (['training/3_1.jpg', 'validation/3_2.jpg'], ['training', 'validation'])],
    ids=['folders', 'names'])
def test_a_data_folder_above_or_below_the_right_one(small, tmp_path, files, too_deep):
    meant = write_all(tmp_path / 'my data' / 'food-11', *files)
    # Neighbours, which must not pass for classes.
    write_all(tmp_path, 'holidays/1.jpg', 'my data/holidays/1.jpg')
    cure = f'did you mean --data-dir "{meant.resolve()}"?'
    for folder in (meant.parent, meant.parent.parent, *[meant / name for name in too_deep]):
        assert cure in problem(data.find_classes, folder)
    # A folder above class folders that nobody has divided.
    undivided = write_all(tmp_path / 'archive' / 'flowers', 'rose/1.jpg', 'tulip/1.jpg')
    assert f'--data-dir "{undivided.resolve()}"?' in problem(data.find_classes, undivided.parent)
    done = small.call('--data-dir', meant.parent)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith('error: ')
    assert done.stderr.splitlines()[-1].endswith(cure)


@pytest.mark.parametrize('folders', [
    # Common names that are not those of the book's folders.
    ('train/a', 'train/b', 'val/a', 'val/b'), ('Train/a', 'Train/b', 'Test/a', 'Test/b'),
    ('Training/a', 'Training/b', 'Validation/a', 'Validation/b'),
    # No class.
    ('',)])
def test_folders_that_do_not_make_two_classes(tmp_path, folders):
    for folder in folders:
        write(tmp_path / folder / '1.jpg')
        write(tmp_path / folder / '2.jpg')
    if 'Training/a' in folders and (tmp_path / 'training').exists():
        pytest.skip('upper and lower case are the same here')
    message = problem(data.find_classes, tmp_path)
    assert str(tmp_path) in message and '\n' not in message
    assert 'training and validation' in message and 'food-11/README.md' in message


def test_a_single_class_is_refused(tmp_path):
    folder = write_all(tmp_path / 'mine', 'training/a/1.jpg', 'validation/a/1.jpg')
    assert problem(data.find_classes, folder).endswith('has only one class for training: a')


def test_labels_in_names_are_positions_in_an_edited_list(edited, tmp_path):
    names = ",\n           ".join([", ".join(map(repr, data.CLASSES[:6])),
                                   ", ".join(map(repr, data.CLASSES[6:]))])
    mine = edited({f'CLASSES = [{names}]': "CLASSES = ['T-shirt', '米饭/面条']"})
    write_all(tmp_path / 'mine', *[f'{part}/{label}_1.jpg' for part in ('training', 'validation')
                                   for label in (0, 1)])
    done = mine.call('--data-dir', 'mine', main=mine.data.main)
    assert done.returncode == 0, done.stderr
    assert '0 T-shirt' in done.stdout and 'food-11' not in done.stdout


def test_too_few_photographs_to_divide_are_refused(small, tmp_path):
    write_all(tmp_path / 'mine', 'a/1.jpg', 'a/2.jpg', 'b/1.jpg', 'b/2.jpg')
    for main in (small.data.main, small.train.main):
        done = small.call('--data-dir', 'mine', main=main)
        assert done.returncode == 1
        assert 'error: 4 photographs are too few to divide' in done.stderr.splitlines()[-1]


def test_names_that_look_like_formulas(small, tmp_path):
    write_all(tmp_path / 'mine', 'training/a$_$b/1.jpg', 'training/c/1.jpg',
              'validation/a$_$b/x$_$1.jpg', 'validation/c/x$_$2.jpg')
    done = small.call('--data-dir', 'mine', main=small.data.main)
    assert done.returncode == 0, done.stderr
    done = small.call('--data-dir', 'mine', '--epochs', 1, '--device', 'cpu', '--out', 'run')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'run' / 'mistakes.png').exists()


def test_more_classes_than_a_byte_can_count(small, tmp_path):
    picture = Image.new('RGB', (8, 8))
    for i in range(300):
        picture.putpixel((0, 0), (i % 256, i // 256, 0))
        write(tmp_path / 'mine' / f'{i:03d}' / '1.png', picture)
    classes = data.find_classes(tmp_path / 'mine')
    _, y = data.readfile(tmp_path / 'mine', classes)
    assert y.tolist() == list(range(300))
    _, label = data.ImgDataset(np.zeros((300, 1, 1, 3), np.uint8), y)[299]
    assert label.item() == 299 and label.dtype == torch.long
    done = small.call('--data-dir', 'mine', '--index', 239, main=small.data.main)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ['298', '298', '1', '0'] in lines and ['299', '299', '0', '1'] in lines


def test_photographs_that_are_there_twice_are_noted(small, tmp_path):
    folder = write_all(tmp_path / 'mine', 'training/a/1.jpg', 'training/a/2.jpg',
                          'training/b/1.jpg', 'training/b/2.jpg', 'training/b/3.jpg',
                          'validation/a/1.jpg', 'validation/b/1.jpg')
    done = small.call('--data-dir', 'mine', main=small.data.main)
    assert done.returncode == 0 and 'note' not in done.stdout
    # Twice under the same label in training is no harm.
    shutil.copy(folder / 'training/b/1.jpg', folder / 'training/b/again.jpg')
    for original, copy in (('training/a/1.jpg', 'validation/a/5.jpg'),
                           ('training/b/2.jpg', 'validation/b/6.jpg'),
                           ('training/a/2.jpg', 'training/b/7.jpg')):
        shutil.copy(folder / original, folder / copy)
    done = small.call('--data-dir', 'mine', main=small.data.main)
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stdout.splitlines() if line.startswith('note: ')]
    in_both, two_labels = (
        ' and '.join(os.path.join('mine', *name.split('/')) for name in names)
        for names in (('training/a/1.jpg', 'validation/a/5.jpg'),
                      ('training/a/2.jpg', 'training/b/7.jpg')))
    assert notes == [
        'note: photographs that are both in training and in validation: 2, for example '
        f'{in_both}',
        f'note: photographs that are under more than one label: 1, for example {two_labels}']


# ---- Dataset and batches ---------------------------------------------------------------------

def test_imgdataset_with_and_without_labels(arrays):
    x, y = arrays[:2]
    image, label = data.ImgDataset(x, y, data.test_transform)[5]
    assert label.dtype == torch.long and label.item() == y[5]
    assert image.dtype == torch.uint8
    assert np.array_equal(image.numpy(), x[5].transpose(2, 0, 1))
    assert torch.equal(data.ImgDataset(x, transform=data.test_transform)[5], image)
    assert np.array_equal(data.ImgDataset(x)[5], x[5])
    assert len(data.ImgDataset(x)) == 44


def test_train_transform_flips_half_and_rotates_to_15_degrees():
    """A white bar right of the middle shows by its angle and its side what was done to it."""
    steps = [type(step).__name__ for step in data.train_transform.transforms]
    assert steps == ['ToPILImage', 'RandomHorizontalFlip', 'RandomRotation', 'PILToTensor']
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


def test_batches_become_the_numbers_of_the_books_transforms(arrays):
    """The book's transforms end with ToTensor, which makes float32 in 0..1."""
    x = arrays[0].copy()
    x[0, :2].flat = np.arange(256, dtype=np.uint8)  # all numbers that a byte can be
    for transform in (data.train_transform, data.test_transform):
        books = transforms.Compose([*transform.transforms[:-1], transforms.ToTensor()])
        batches = []
        for steps in (transform, books):
            torch.manual_seed(3)
            batch, = DataLoader(data.ImgDataset(x, transform=steps), batch_size=len(x))
            batches.append(batch)
        assert batches[0].dtype == torch.uint8
        assert torch.equal(convert_image_dtype(batches[0]), batches[1])
        # What is float already, as after a Normalize, stays as it is.
        normalized = batches[1] * 4 - 2
        assert torch.equal(convert_image_dtype(normalized), normalized)


def test_workers_that_are_not_forked_share_the_images(arrays):
    """As on Windows and macOS."""
    val_set = data.ImgDataset(*arrays[2:], data.test_transform)
    loader = DataLoader(val_set, batch_size=20, num_workers=1, multiprocessing_context='spawn')
    x, y = (torch.cat(parts) for parts in zip(*loader))
    assert torch.equal(x, torch.stack([val_set[i][0] for i in range(22)]))
    assert y.tolist() == arrays[3].tolist()
    # They are in memory that all processes see: there is no copy for each worker.
    assert val_set.x.is_shared()


# ---- Looking ---------------------------------------------------------------------------------

def test_preview_shows_true_colours_and_every_class():
    blue = np.zeros((3, 128, 128, 3), np.uint8)
    blue[...] = (255, 0, 0)  # BGR
    train_set = data.ImgDataset(blue, [4, 4, 10], data.train_transform)
    left, right = Figure(figsize=(12, 5)).subfigures(1, 2)
    torch.manual_seed(0)
    axes = left.subplots()
    data.show_sample(axes, train_set, 2, 'a title')
    assert axes.get_title() == 'a title'
    assert (np.asarray(axes.images[0].get_array())[64, 64] == (0, 0, 255)).all()  # RGB

    data.show_classes(right, train_set, data.CLASSES)
    cells = np.reshape(right.axes, (5, 11))
    titles = [axes.get_title().split() for axes in cells[0]]
    assert titles[3] == ['3', 'Egg', '(none)'] and titles[4] == ['4', 'Fried', 'food']
    assert titles[6] == ['6', 'Noodles/', 'Pasta', '(none)']
    assert not any(axes.images for axes in cells[:, 3])
    images = np.array([[axes.images[0].get_array() for axes in row[[4, 10]]] for row in cells])
    assert (images[:, :, 64, 64] == (0, 0, 255)).all()
    # What is rotated has black corners; the first row is as it is.
    assert (images[0, :, 4, 4] == (0, 0, 255)).all() and (images[1:, :, 4, 4] == 0).all(-1).any()


def test_the_demo_called_as_from_a_notebook(scripts, tmp_path, monkeypatch, capsys):
    """There, sys.argv holds the arguments of the notebook's kernel."""
    (tmp_path / 'food-11').mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['ipykernel_launcher.py', '-f', 'kernel.json'])
    scripts.data.main(['--demo', '--index', '7'])
    out, err = capsys.readouterr()
    assert err == ''
    lines = out.splitlines()
    assert lines[0] == '(330, 128, 128, 3)'
    assert lines[5].split() == ['3', 'Egg', '30', '10']
    assert lines[13].split() == ['total', '330', '110']
    assert str(tmp_path / 'chapter2_1_data.png') in lines[-1]
    width, height = Image.open(tmp_path / 'chapter2_1_data.png').size
    assert 1000 < width < 1366 and 400 < height < 768  # readable, and fits a small screen
    assert not os.listdir(tmp_path / 'food-11')


def test_without_a_display_and_with_a_notebooks_backend(small, few, tmp_path):
    """A script that a notebook starts in another environment inherits MPLBACKEND."""
    env = {key: value for key, value in os.environ.items()
           if key not in ('DISPLAY', 'WAYLAND_DISPLAY')}
    env['MPLBACKEND'] = 'module://some_missing_module.backend'
    # Both at the same time, as most of it is waiting for PyTorch's import.
    starts = [small.command('--data-dir', few, script='chapter2_1_data.py'),
              small.command('--data-dir', few, '--device', 'cpu', '--epochs', 1, '--out', 'run')]
    processes = [subprocess.Popen(start, env=env, cwd=tmp_path, stdout=subprocess.DEVNULL,
                                  stderr=subprocess.PIPE, encoding='utf-8') for start in starts]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert errors[0] == '' and 'backend' not in errors[1]
    assert (tmp_path / 'chapter2_1_data.png').stat().st_size > 10_000
    assert (tmp_path / 'run' / 'mistakes.png').stat().st_size > 1000


def test_the_totals_of_the_complete_food_11_stand_there_if_they_differ(capsys):
    line = 'the complete food-11 has 9866 training and 3430 validation photographs'
    train_y = np.repeat(np.arange(11), [994, 429, 1500, 986, 848, 1325, 440, 280, 855, 1500, 709])
    val_y = np.repeat(np.arange(11), [362, 144, 500, 327, 326, 449, 147, 96, 347, 500, 232])
    for classes in (data.CLASSES, KAGGLES_FOLDERS):
        data.print_counts(train_y, val_y, classes)
        lines = capsys.readouterr().out.splitlines()
        assert lines[7].split() == ['6', *classes[6].split(), '440', '147']
        assert lines[-1].split() == ['total', '9866', '3430']
        data.print_counts(train_y[1:], val_y, classes)
        assert capsys.readouterr().out.splitlines()[-1] == line
    # Another data set.
    data.print_counts(train_y[1:], val_y, FLOWERS[:11])
    assert 'complete' not in capsys.readouterr().out


def test_with_a_display_the_preview_opens_in_a_window(small, food11, tmp_path, monkeypatch):
    from matplotlib import pyplot as plt
    shown = []
    monkeypatch.setattr(plt.figure().canvas.__class__, 'required_interactive_framework', 'qt')
    monkeypatch.setattr(plt, 'show', lambda: shown.append(plt.gcf().axes[0].get_title()))
    for arguments in (['--index', '7'], []):
        done = small.call('--data-dir', food11, *arguments, main=small.data.main)
        assert done.returncode == 0, done.stderr
    assert [title.split('\n')[0] for title in shown] == ['train_set[7]', 'train_set[43]']
    assert os.listdir(tmp_path) == []


def test_the_data_scripts_mistakes_end_in_one_line(small, few, tmp_path, monkeypatch):
    for name in ('HOME', 'USERPROFILE'):
        monkeypatch.setenv(name, str(tmp_path / 'home'))
    for arguments, word in [((), 'food-11/README.md'),
                            (('--data-dir', ''), 'no photographs'),
                            (['--data-dir=~/mine'], os.path.join(tmp_path, 'home', 'mine')),
                            (('--data-dir', few, '--index', 10), '0..9'),
                            (('--data-dir', few, '--index', -1), '0..9'),
                            (('--data-dir', few, '--save', 'preview.xyz'), 'preview.xyz'),
                            (('--data-dir', few, '--save', 'nowhere/preview.png'), 'nowhere')]:
        done = small.call(*arguments, main=small.data.main)
        assert done.returncode == 1 and done.stderr.startswith('error: ')
        assert word in done.stderr and done.stderr.count('\n') == 1


@pytest.mark.parametrize('name', ['预览.jpg', 'preview'])
def test_the_preview_is_where_the_script_says(small, few, name):
    done = small.call('--data-dir', few, '--save', name, main=small.data.main)
    assert done.returncode == 0, done.stderr
    file = re.search('picture written to (.*)', done.stdout).group(1)
    assert Path(file).stat().st_size > 10_000


def test_help_opens_with_the_examples(scripts):
    done = scripts.call('--help', main=scripts.data.main)
    assert done.returncode == 0
    assert done.stdout.index('python chapter2_1_data.py --index 7') < done.stdout.index('--save')


def test_fake_photographs_are_all_different_and_always_the_same(food11, tmp_path):
    files = [file.read_bytes() for file in data.list_images(food11)]
    assert len(set(files)) == 66
    draw_food11(tmp_path, training=4, validation=2)
    assert [file.read_bytes() for file in data.list_images(tmp_path)] == files
