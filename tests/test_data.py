"""chapter2_1_data.py: what it reads, what it refuses, what it shows."""
import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import unicodedata
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


def imread(file):
    """What the book's cv2.imread reads. On Windows it cannot open paths with Chinese characters."""
    with tempfile.TemporaryDirectory() as folder:
        return cv2.imread(shutil.copy(file, Path(folder, f'photograph{file.suffix}')))


def opencvs(file):
    return cv2.resize(imread(file), (128, 128))


def link(target, file):
    try:
        file.symlink_to(target)
        file.lstat()  # under Wine a link is "made" and not there
    except OSError:
        pytest.skip('no symbolic links here')


def side(name):
    """Where a photograph is that nobody has divided: 'training' or 'validation'."""
    number = int(hashlib.sha256(name.encode()).hexdigest(), 16)
    return 'validation' if number % 5 == 4 else 'training'


def names_on(wanted, folder, count):
    """Names of photographs in a class folder that are all on the same side."""
    names = (f'{folder}/{i}.jpg' for i in range(1000))
    return [name for name in names if side(name) == wanted][:count]


def relative(files, folder):
    return [(file.relative_to(folder).as_posix(), label) for file, label in files]


def refuse_listing(monkeypatch, folder):
    """As a folder without permission, or on a network drive that has dropped. (Permissions mean
    nothing to root.)"""
    def refusing(function):
        def call(path='.'):
            if os.path.abspath(path) == os.path.abspath(folder):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return function(path)
        return call
    monkeypatch.setattr(os, 'scandir', refusing(os.scandir))
    monkeypatch.setattr(os, 'listdir', refusing(os.listdir))


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
    folder = Path(os.environ['FOOD11_DIR'])
    classes, train_files, _ = data.find_photographs(folder)
    assert classes == data.CLASSES
    x, y = data.readfile(train_files)
    for image, (file, _) in list(zip(x, train_files, strict=True))[::17]:
        assert np.array_equal(image, opencvs(file))
    for label, (file, _) in zip(y, train_files, strict=True):
        if file.parent == folder / 'training':
            assert label == int(re.split('[_-]', file.name)[0])
        else:
            assert classes[label] == file.parent.name


def test_every_spelling_of_a_name(tmp_path):
    labels = {'0_9.webp': 0, '10_0.JPG': 10, '1_5.bmp': 1, '2_1.png': 2, '3-17.jpg': 3,
              '3_17.jpg': 3, '4_2.TIFF': 4, '7_1.Jpeg': 7, '8_1_flipped.jpg': 8, '9_12 汤.jp2': 9}
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
    (folder / '3_0.jpg').rename(folder / '3_0 鸡蛋 一.jpg')
    for name in ('.DS_Store', '._0_0.jpg', 'Thumbs.db', 'desktop.ini', 'labels.csv',
                 '__MACOSX/._0_0.jpg', '.cache/0_0.jpg', '@eaDir/0_0.jpg/SYNOPHOTO_THUMB_M.jpg'):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b'no photograph')
    shutil.copytree(food11 / 'validation', folder.parent / 'validation')
    classes, train_files, _ = data.find_photographs(folder.parent)
    assert classes == data.CLASSES
    x, y = data.readfile(train_files)
    assert len(x) == 44 and np.bincount(y).tolist() == [4] * 11


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
    # Whole ones, too: what is added at their end changes no pixel.
    for options in ({}, {'progressive': True}, {'restart_marker_blocks': 2}):
        file = write(tmp_path / 'whole' / '0_0.jpg', **options)
        assert np.array_equal(data.read_image(file), opencvs(file))


def test_reading_takes_the_memory_of_the_array_and_little_more(tmp_path):
    """48 KiB a photograph are the array."""
    write(tmp_path / '0_0.jpg')
    for i in range(1, 400):
        shutil.copy(tmp_path / '0_0.jpg', tmp_path / f'0_{i}.jpg')
    tracemalloc.start()
    try:
        x, _ = data.readfile(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(x) == 400 and peak / 400 < 60 * 1024


@pytest.mark.parametrize('allowed, most', [(2, 2), (64, 8)])
def test_no_more_threads_than_allowed_cores_and_at_most_8(tmp_path, monkeypatch, allowed, most):
    """Slurm, or Docker, on a computer with 64 cores."""
    monkeypatch.setattr(os, 'cpu_count', lambda: 64)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: set(range(allowed)),
                        raising=False)
    write(tmp_path / '0_0.jpg')
    for i in range(1, 40):
        shutil.copy(tmp_path / '0_0.jpg', tmp_path / f'0_{i}.jpg')
    seen = set()
    imdecode = cv2.imdecode

    def slow(*arguments):
        seen.add(threading.get_ident())
        time.sleep(0.005)
        return imdecode(*arguments)
    monkeypatch.setattr(cv2, 'imdecode', slow)
    data.readfile(tmp_path)
    assert len(seen) == most


# ---- Refusing --------------------------------------------------------------------------------

NO_IMAGE = 'cannot be read as an image; repair, rename or delete it'
NO_LABEL = 'is not in one of the class folders (Bread, '


@pytest.mark.parametrize('name, content, reason', [
    ('0_1.jpg', b'', NO_IMAGE),
    ('0_1.jpg', b'a text file', NO_IMAGE),
    ('0_1.png', 40, NO_IMAGE),
    ('0_1.png', 1, NO_IMAGE),
    ('0_1.bmp', 1, NO_IMAGE),
    ('bread.jpg', 'copy', NO_LABEL),
    ('1.jpg', 'copy', NO_LABEL),
    ('1', 'copy', NO_LABEL),
    ('11_1.jpg', 'copy', NO_LABEL),
    ('01-05-2021.jpg', 'copy', NO_LABEL),
    ('01-05 2021.jpg', 'copy', NO_LABEL),
    ('5-star.jpg', 'copy', NO_LABEL),
    ('Pizza/1.jpg', 'copy', NO_LABEL),
])
def test_a_bad_file_is_named_with_the_reason(tmp_path, name, content, reason):
    """content: bytes, or how many are cut off, or what the file is."""
    write(tmp_path / '5_0.jpg')
    file = tmp_path / name
    if content == 'copy':
        file.parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / '5_0.jpg', file)
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        cut_off(write(file), content)
        assert imread(file) is None
    message = problem(data.readfile, tmp_path)
    if name == 'Pizza/1.jpg':
        file, reason = file.parent, 'is not one of the class folders (Bread, '
    assert message.startswith(f'{file} {reason}')
    assert '\n' not in message and '5_0.jpg' not in message


def test_all_bad_files_of_a_folder_come_in_one_message(small, food11, tmp_path):
    shutil.copytree(food11, tmp_path / 'food-11')
    for i in range(13):
        (tmp_path / 'food-11' / 'training' / f'4_bad{i:02d}.jpg').touch()
    for main in (small.data.main, small.train.main):
        done = small.call(main=main)
        message = done.stderr[done.stderr.index('error: '):].splitlines()
        assert done.returncode == 1 and len(message) == 12
        assert message[0] == f'error: 13 places, each of which {NO_IMAGE}:'
        assert '4_bad00.jpg' in message[1] and '4_bad09.jpg' in message[10]
        assert message[11] == '  and 3 more'
    # Names without a label are found before anything is read.
    for i in range(3):
        write(tmp_path / 'food-11' / 'training' / f'bad{i}.jpg')
    done = small.call(main=small.data.main)
    message = done.stderr.splitlines()
    assert done.returncode == 1 and len(message) == 4
    assert message[0].startswith(f'error: 3 places, each of which {NO_LABEL}')


def test_a_photograph_that_the_system_does_not_give(small, few, copy_of_finished, tmp_path):
    """A link that leads nowhere stands for OneDrive, and for a lack of permission. It may be a good
    photograph, so nobody is to delete it."""
    shutil.copytree(few, tmp_path / 'food-11')
    file = tmp_path / 'food-11' / 'validation' / '4_0.jpg'
    file.unlink()
    link(tmp_path / 'moved away', file)
    for arguments in ([], ['--out', 'run', '--predict', file.parent],
                      ['--out', 'run', '--features', file]):
        done = small.call('--device', 'cpu', *arguments)
        error = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and 'Traceback' not in done.stderr
        assert str(file) in error and 'delete' not in error
        if '--features' not in arguments:
            assert error.startswith(f'error: cannot read {file}: ')


@pytest.mark.parametrize('name', ['training/Egg', 'training/Egg/old', 'validation', 'undivided'])
def test_a_folder_that_cannot_be_listed_is_not_left_out(
        small, copy_of_finished, tmp_path, monkeypatch, name):
    folder = write_all(tmp_path / 'mine', 'training/Egg/1.jpg', 'training/Egg/old/2.jpg',
                       'training/Soup/3.jpg', 'training/Rice/3.jpg', 'validation/Soup/4.jpg')
    if name == 'undivided':
        folder, name = folder / 'training', 'Egg'
        folder = folder.rename(tmp_path / 'other')
    refuse_listing(monkeypatch, folder / name)
    for arguments in (['--data-dir', folder], ['--out', 'run', '--predict', folder]):
        done = small.call('--device', 'cpu', *arguments)
        error = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and done.stdout == ''
        assert error == (f'error: cannot read the folder {folder / name}: '
                         f'{os.strerror(errno.EACCES)}')


def test_an_empty_and_a_missing_folder(tmp_path):
    (tmp_path / '.DS_Store').touch()
    assert f'no photographs in {tmp_path}' in problem(data.readfile, tmp_path)
    missing = tmp_path / 'food-11'
    message = problem(data.find_photographs, missing)
    assert f'cannot read {missing}: ' in message
    assert 'food-11/README.md' in message and '--data-dir' in message
    write(missing / 'training' / '0_1.jpg')
    (missing / 'validation').mkdir()
    assert f'no photographs in {missing / "validation"}' in problem(data.find_photographs, missing)


# ---- Classes ---------------------------------------------------------------------------------

@pytest.mark.parametrize('classes', [FLOWERS, KAGGLES_FOLDERS, ['汤', '米饭', '面条'], ['a', 'b']],
                         ids=len)
def test_the_folders_of_training_are_the_classes(tmp_path, classes):
    """The labels are in sorted order: for Kaggle's food-11, that is the book's."""
    for name in reversed(classes):
        write_all(tmp_path, f'training/{name}/12.jpg', f'training/{name}/5.jpg')
    write(tmp_path / 'validation' / classes[-1] / '7_1.jpg')
    found, train_files, val_files = data.find_photographs(tmp_path)
    assert found == classes
    x, y = data.readfile(train_files)
    assert y.tolist() == [label for label in range(len(classes)) for _ in range(2)]
    assert np.array_equal(x[1], opencvs(tmp_path / 'training' / classes[0] / '5.jpg'))
    assert data.readfile(val_files)[1].tolist() == [len(classes) - 1]
    # As in the book.
    assert np.array_equal(data.readfile(tmp_path / 'training', classes)[0], x)


def test_photographs_in_folders_within_class_folders_are_read(tmp_path):
    folder = write_all(tmp_path / 'mine', 'training/dogs/1.jpg', 'training/dogs/2023/summer/2.jpg',
                       'training/cats/1.jpg', 'validation/cats/2.jpg')
    write_all(tmp_path / 'other disk', '1.jpg', 'old/2.jpg')
    link(tmp_path / 'other disk', folder / 'training' / 'fish')
    # The folder may be a link as well.
    link(folder, tmp_path / 'link')
    for data_dir in (folder, tmp_path / 'link'):
        classes, train_files, _ = data.find_photographs(data_dir)
        assert classes == ['cats', 'dogs', 'fish']
        assert [label for _, label in train_files] == [0, 1, 1, 2, 2]


@pytest.mark.parametrize('links', [
    {'a/up': 'a/..'}, {'a/up': 'a/..', 'b/up': 'a/..'}, {'a/b': 'b', 'b/a': 'a'},
    {'a/home': 'a/../..'}, {'a/self': 'a/self'}], ids=str)
def test_links_that_lead_back_do_not_make_reading_endless(tmp_path, links):
    """Photographs are read once."""
    names = [name for letter in 'abc' for name in names_on('training', letter, 3)]
    folder = write_all(tmp_path / 'mine', *names, *names_on('validation', 'c', 1))
    for name, target in links.items():
        link(folder / target, folder / name)
    if links == {'a/self': 'a/self'}:
        # Nothing that could be read: said, and not left out.
        assert 'self' in problem(data.readfile, folder, ['a', 'b', 'c'])
    else:
        assert len(data.list_images(folder)) == 10


def test_a_link_out_of_the_folder_is_followed_but_not_back(tmp_path):
    folder = write_all(tmp_path / 'mine', 'cats/1.jpg')
    write_all(tmp_path, 'other/1.jpg', 'third/1.jpg')
    link(tmp_path / 'other', folder / 'dogs')
    link(tmp_path / 'third', tmp_path / 'other' / 'third')
    link(tmp_path / 'other', tmp_path / 'third' / 'other')
    link(folder, tmp_path / 'third' / 'mine')
    names = [file.relative_to(folder).as_posix() for file in data.list_images(folder)]
    assert names == ['cats/1.jpg', 'dogs/1.jpg', 'dogs/third/1.jpg']


def test_the_folder_of_a_class_that_is_a_broken_link(tmp_path):
    folder = write_all(tmp_path / 'mine', 'cats/1.jpg', 'dogs/1.jpg')
    link(tmp_path / 'gone', folder / 'birds')
    for path in (folder, folder / 'birds'):
        message = problem(data.find_photographs, path)
        assert f'cannot read {folder / "birds"}: ' in message


def test_a_class_that_training_lacks_is_refused(small, tmp_path):
    """Its folder is named, and not each of its photographs."""
    write_all(tmp_path / 'food-11', 'training/Egg/1.jpg', 'training/Soup/1.jpg',
              'validation/Soup/1.jpg', 'validation/Pizza/1.jpg', 'validation/Pizza/2.jpg')
    for main in (small.data.main, small.train.main):
        done = small.call(main=main)
        assert done.returncode == 1
        error = done.stderr.splitlines()[-1]
        assert f'{os.path.join("validation", "Pizza")} is not one of the class folders' in error


def test_a_data_folder_named_from_within(tmp_path, monkeypatch):
    """cd cats, and then --data-dir .. ."""
    for name in ('cats', 'dogs'):
        write_all(tmp_path / 'mine', *names_on('training', name, 2))
    write_all(tmp_path / 'mine', *names_on('validation', 'cats', 2))
    monkeypatch.chdir(tmp_path / 'mine' / 'cats')
    classes, train_files, val_files = data.find_photographs('..')
    assert classes == ['cats', 'dogs'] and (len(train_files), len(val_files)) == (4, 2)
    monkeypatch.chdir('..')
    assert [len(part) for part in data.find_photographs('.')] == [2, 4, 2]


def test_food_11_of_the_course_of_2021_is_no_food_11(small, tmp_path):
    """Its folders with numbers are classes, but those in training are not."""
    names = [f'{folder}/{label:02d}/{label}_{i}.jpg' for label in range(3) for i in range(4)
             for folder in ('training/labeled', 'training/unlabeled', 'validation', 'testing')]
    write_all(tmp_path / 'food-11', *names)
    for main in (small.data.main, small.train.main):
        error = small.call(main=main).stderr.splitlines()[-1]
        assert error.startswith('error: ') and 'labeled, unlabeled; ' in error
        assert 'delete' not in error and '.jpg' not in error


def test_the_outermost_folder_is_the_class(tmp_path):
    write_all(tmp_path / 'validation', 'Egg/Soup/1.jpg', 'Soup/1.jpg')
    assert data.readfile(tmp_path / 'validation', ['Egg', 'Soup'])[1].tolist() == [0, 1]
    write(tmp_path / 'validation' / 'Pizza' / 'Soup' / '1.jpg')
    message = problem(data.readfile, tmp_path / 'validation', ['Egg', 'Soup'])
    assert message.startswith(f'{tmp_path / "validation" / "Pizza"} is not one of the class')


def test_a_fifth_is_for_validation_and_no_photograph_ever_changes_sides(small, tmp_path):
    names = [f'{name}/{number}.jpg' for name in ('cats', 'dogs') for number in range(10, 40)]
    folder = write_all(tmp_path / 'mine', *names)
    classes, *before = data.find_photographs(folder)
    for files, part in zip(before, ('training', 'validation')):
        assert relative(files, folder) == [(name, classes.index(name[:4])) for name in names
                                           if side(name) == part]
    assert 6 <= len(before[1]) <= 18
    done = small.call('--data-dir', 'mine', main=small.data.main)
    total = ['total', *[str(len(files)) for files in before]]
    assert done.returncode == 0 and total in [line.split() for line in done.stdout.splitlines()]

    write_all(folder, 'cats/00.jpg', 'birds/1.jpg', *names_on('training', 'birds', 1))
    (folder / 'dogs' / '20.jpg').unlink()
    _, *after = data.find_photographs(folder)
    for one, other in (before, after), (before[::-1], after):
        moved = {name for name, _ in relative(one[0], folder)}
        moved &= {name for name, _ in relative(other[1], folder)}
        assert (not moved) == (one is before)
    # Another folder, another system: the same sides.
    (tmp_path / '美食').mkdir()
    moved = folder.rename(tmp_path / '美食' / 'mine')
    assert [relative(files, moved) for files in data.find_photographs(moved)[1:]] == [
        relative(files, folder) for files in after]


def test_a_class_that_would_have_no_photograph_for_training_is_named(small, tmp_path):
    folder = write_all(tmp_path / 'mine', *names_on('training', 'cats', 3),
                       *names_on('validation', 'dogs', 1), *names_on('validation', '鸟', 2))
    for main in (small.data.main, small.train.main):
        done = small.call('--data-dir', 'mine', main=main)
        error = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and 'for training of dogs, training of 鸟;' in error
    write_all(folder, *names_on('training', 'dogs', 1), *names_on('training', '鸟', 1))
    assert len(data.find_photographs(folder)[1]) == 5
    # None for validation.
    for name in (*names_on('validation', 'dogs', 1), *names_on('validation', '鸟', 2)):
        (folder / name).unlink()
    assert 'no photographs for validation;' in problem(data.find_photographs, folder)
    # In the other layouts, too.
    write_all(tmp_path / 'flat', 'training/0_1.jpg', 'validation/0_2.jpg', 'validation/3_1.jpg')
    assert 'for training of Egg;' in problem(data.find_photographs, tmp_path / 'flat')


@pytest.mark.parametrize('files, too_deep', [
    (['training/Egg/1.jpg', 'training/Soup/1.jpg', 'validation/Egg/2.jpg', 'validation/Soup/2.jpg'],
     ['training', 'validation']),
    (['training/3_1.jpg', 'validation/3_2.jpg'], ['training', 'validation'])],
    ids=['folders', 'names'])
def test_a_data_folder_above_or_below_the_right_one(small, tmp_path, files, too_deep):
    meant = write_all(tmp_path / 'my data' / 'food-11', *files)
    # Neighbours, which must not pass for classes.
    write_all(tmp_path, 'holidays/1.jpg', 'my data/holidays/1.jpg')
    cure = f'did you mean --data-dir "{meant.resolve()}"?'
    for folder in (meant.parent, meant.parent.parent, *[meant / name for name in too_deep]):
        assert cure in problem(data.find_photographs, folder)
    # A folder above class folders that nobody has divided.
    undivided = write_all(tmp_path / 'archive' / 'flowers', 'rose/1.jpg', 'tulip/1.jpg')
    assert 'are: flowers; ' in problem(data.find_photographs, undivided.parent)
    done = small.call('--data-dir', meant.parent)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith('error: ')
    assert done.stderr.splitlines()[-1].endswith(cure)


@pytest.mark.parametrize('folders', [
    # Other people's names for the parts of a data set.
    ('train/a', 'train/b', 'val/a', 'val/b'), ('Train/a', 'Train/b', 'Test/a', 'Test/b'),
    ('Training/a', 'Training/b', 'Validation/a', 'Validation/b'), ('training/a', 'testing/a'),
    ('training_set/a', 'test_set/a'), ('seg_train/a', 'seg_test/a', 'seg_pred/a'), ('train', 'dev'),
    ('训练集/a', '验证集/a', '测试集/a'), ('TrainSet', 'ValSet'), ('train2017', 'val2017'),
    ('train', 'val', 'sample'), ('flowers_train', 'flowers_test'), ('train', 'validation set'),
    # No class, one class.
    ('',), ('a',)])
def test_folders_that_do_not_make_two_classes(tmp_path, folders):
    for folder in folders:
        write(tmp_path / folder / '1.jpg')
        write(tmp_path / folder / '2.jpg')
    if 'Training/a' in folders and (tmp_path / 'training').exists():
        pytest.skip('upper and lower case are the same here')
    message = problem(data.find_photographs, tmp_path)
    assert str(tmp_path) in message and '\n' not in message
    assert 'training and validation' in message and 'food-11/README.md' in message
    for folder in filter(None, folders):
        assert folder.split('/')[0] in message


def test_a_class_may_be_called_train(tmp_path):
    names = ['bus', 'steam train', 'test track', 'train']
    for name in names:
        write_all(tmp_path, *names_on('training', name, 2), *names_on('validation', name, 1))
    classes, train_files, val_files = data.find_photographs(tmp_path)
    assert classes == names and len(train_files) == 8


def test_a_single_class_is_refused(tmp_path):
    folder = write_all(tmp_path / 'mine', 'training/a/1.jpg', 'validation/a/1.jpg')
    message = problem(data.find_photographs, folder)
    assert f'at least two classes; the folders with photographs in {folder / "training"} are: a;' \
        in message


@pytest.mark.filterwarnings('ignore:Glyph')  # there may be no Korean font
def test_a_class_is_the_same_however_a_system_writes_its_letters(small, tmp_path):
    """macOS writes é as two characters, and a folder copied from there keeps them."""
    classes = ['crème brûlée', '김치', 'パン']
    folder = tmp_path / 'mine'
    for name in classes:
        name = unicodedata.normalize('NFD', name)
        write_all(folder, f'training/{name}/1.jpg', f'training/{name}/2.jpg')
    for name in classes:
        write_all(folder, f'validation/{name}/1.jpg')
    run = ('--out', 'run', '--device', 'cpu')
    done = small.call('--data-dir', 'mine', '--epochs', 1, *run)
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines()[2:5]] == ['crème', 'パン', '김치']
    # On a Windows disk.
    for name in classes:
        decomposed = folder / 'training' / unicodedata.normalize('NFD', name)
        decomposed.rename(folder / 'training' / name)
    done = small.call('--resume', '--epochs', 2, *run)
    assert done.returncode == 0 and 'changed' not in done.stderr
    done = small.call('--predict', folder / 'training', *run)
    assert done.returncode == 0 and done.stderr == ''
    # Undivided, a photograph keeps its side.
    assert data.is_for_validation(tmp_path / unicodedata.normalize('NFC', 'é.jpg'), tmp_path) == \
        data.is_for_validation(tmp_path / unicodedata.normalize('NFD', 'é.jpg'), tmp_path)


@pytest.mark.skipif(sys.platform != 'linux', reason='only there can names be any bytes')
def test_names_that_are_not_unicode(small, tmp_path):
    """A zip file from a Chinese Windows, unpacked on Linux."""
    soup, noodles = (os.fsdecode(name.encode('gbk')) for name in ('汤', '面条'))
    folder = tmp_path / os.fsdecode('数据'.encode('gbk'))
    write_all(folder, f'training/{soup}/1.jpg', f'training/{noodles}/2.jpg',
              f'validation/{soup}/{soup}.jpg', f'validation/{noodles}/{noodles}.jpg')
    run = ('--out', 'run', '--device', 'cpu')
    done = small.call('--data-dir', folder, '--save', 'preview.png', main=small.data.main)
    assert done.returncode == 0, done.stderr
    assert r'\xcc\xc0' in done.stdout
    for options in (['--data-dir', folder, '--epochs', 1], ['--resume', '--epochs', 2],
                    ['--predict', folder / 'validation'],
                    ['--predict', folder / 'validation' / soup / f'{soup}.jpg']):
        done = small.call(*run, *options)
        assert done.returncode == 0 and r'\xcc\xc0' in done.stdout, done.stderr
        assert 'changed' not in done.stderr
    assert (tmp_path / 'run' / 'mistakes.png').exists()
    (folder / 'training' / soup / '1.jpg').write_bytes(b'')
    done = small.call('--data-dir', folder, main=small.data.main)
    assert done.returncode == 1 and r'\xca\xfd' in done.stderr


def test_labels_in_names_are_positions_in_an_edited_list(edited, tmp_path):
    names = ",\n           ".join([", ".join(map(repr, data.CLASSES[:6])),
                                   ", ".join(map(repr, data.CLASSES[6:]))])
    mine = edited({f'CLASSES = [{names}]': "CLASSES = ['T-shirt', '米饭/面条']"})
    write_all(tmp_path / 'mine', *[f'{part}/{label}_1.jpg' for part in ('training', 'validation')
                                   for label in (0, 1)])
    done = mine.call('--data-dir', 'mine', main=mine.data.main)
    assert done.returncode == 0, done.stderr
    assert '0 T-shirt' in done.stdout and 'food-11' not in done.stdout


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
        write(tmp_path / 'mine' / 'training' / f'{i:03d}' / '1.png', picture)
    write(tmp_path / 'mine' / 'validation' / '299' / '1.png', Image.new('RGB', (9, 9)))
    _, train_files, val_files = data.find_photographs(tmp_path / 'mine')
    _, y = data.readfile(train_files)
    assert y.tolist() == list(range(300))
    assert data.readfile(train_files[:256])[1].dtype == np.uint8
    assert data.readfile(train_files[:257])[1].tolist()[-1] == 256
    assert data.readfile(val_files)[1].tolist() == [299]
    _, label = data.ImgDataset(np.zeros((300, 1, 1, 3), np.uint8), y)[299]
    assert label.item() == 299 and label.dtype == torch.long
    done = small.call('--data-dir', 'mine', '--index', 239, main=small.data.main)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ['298', '298', '1', '0'] in lines and ['299', '299', '1', '1'] in lines


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
    example = ' and '.join(os.path.join('mine', *name) for name in (
        ('training', 'a', '2.jpg'), ('training', 'b', '7.jpg')))
    assert notes == ['note: the same photograph is both for training and for validation, or has '
                     f'two labels: 3 times, for example {example}']
    # The first of validation is the last of training.
    folder = write_all(tmp_path / 'other', 'training/a/1.jpg', 'training/b/1.jpg',
                       'validation/a/1.jpg', 'validation/b/1.jpg')
    shutil.copy(folder / 'training/b/1.jpg', folder / 'validation/a/1.jpg')
    done = small.call('--data-dir', 'other', main=small.data.main)
    assert 'two labels: 1 times' in done.stdout


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
    assert titles[6] == ['6', 'Noodles-', 'Pasta', '(none)']
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
    # Windows and macOS always have a display: a window would open, and wait.
    save = ['--save', 'chapter2_1_data.png']
    if sys.platform == 'linux':
        save = []
    # Both at the same time, as most of it is waiting for PyTorch's import.
    starts = [small.command('--data-dir', few, *save, script='chapter2_1_data.py'),
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
    assert data.CLASSES == KAGGLES_FOLDERS
    data.print_counts(train_y, val_y, data.CLASSES)
    lines = capsys.readouterr().out.splitlines()
    assert lines[7].split() == ['6', 'Noodles-Pasta', '440', '147']
    assert lines[-1].split() == ['total', '9866', '3430']
    data.print_counts(train_y[1:], val_y, data.CLASSES)
    assert capsys.readouterr().out.splitlines()[-1] == line
    # Another data set.
    data.print_counts(train_y[1:], val_y, FLOWERS[:11])
    assert 'complete' not in capsys.readouterr().out


def test_with_a_display_the_preview_opens_in_a_window(small, food11, tmp_path, monkeypatch):
    from matplotlib import pyplot as plt
    shown = []
    monkeypatch.setattr(plt.figure().canvas.__class__, 'required_interactive_framework', 'qt')
    plt.close()
    monkeypatch.setattr(plt, 'show', lambda **_: shown.append(plt.gcf().axes[0].get_title()))
    for arguments in (['--index', '7'], []):
        done = small.call('--data-dir', food11, *arguments, main=small.data.main)
        assert done.returncode == 0, done.stderr
    assert [title.split('\n')[0] for title in shown] == ['train_set[7]', 'train_set[43]']
    assert os.listdir(tmp_path) == [] and plt.get_fignums() == []


@pytest.mark.parametrize('error', ['no display', 'broken Tk'])
def test_where_no_window_can_be_made_the_picture_is_written(
        small, few, tmp_path, monkeypatch, error):
    """MPLBACKEND=TkAgg on a server; a Tk without its files, as on some Windows."""
    from matplotlib import pyplot as plt

    def fail(*_, **__):
        if error == 'no display':
            raise ImportError("Cannot load backend 'TkAgg' which requires the 'tk' interactive "
                              "framework, as 'headless' is currently running")
        raise pytest.importorskip('tkinter').TclError("Can't find a usable init.tcl")
    monkeypatch.setattr(plt, 'figure', fail)
    for arguments, file in ([], 'chapter2_1_data.png'), (['--save', 'mine.png'], 'mine.png'):
        done = small.call('--data-dir', few, *arguments, main=small.data.main)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / file).stat().st_size > 10_000


def test_a_notebooks_plots_stay_as_they_are(small, few, copy_of_finished, tmp_path, monkeypatch):
    import matplotlib
    from matplotlib import pyplot as plt
    monkeypatch.chdir(tmp_path)
    before = dict(matplotlib.rcParams)
    small.data.main(['--data-dir', str(few)])
    small.train.main(['--out', 'run', '--device', 'cpu', '--dreams'])
    small.train.main(['--data-dir', str(few), '--device', 'cpu', '--epochs', '1'])
    assert dict(matplotlib.rcParams) == before
    assert plt.get_fignums() == []


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
