"""chapter2_1_data.py: what it reads, what it refuses, what it shows."""
import contextlib
import errno
import hashlib
import io
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import tracemalloc
import unicodedata
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
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
NO_IMAGE = 'cannot be read as an image'
NO_LABEL = 'has no label'
BLUE, YELLOW, RED = (0, 0, 255), (255, 255, 0), (255, 0, 0)  # RGB


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


def opencvs(file):
    """What the book's cv2.imread and cv2.resize make of a photograph, or None."""
    # On Windows, imread cannot open paths with Chinese characters.
    with tempfile.TemporaryDirectory() as folder:
        img = cv2.imread(shutil.copy(file, Path(folder, f'photograph{file.suffix}')))
    return None if img is None else cv2.resize(img, (128, 128))


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


def message(done):
    """What stands behind `error: `, if a script has ended with that and nothing else."""
    assert done.returncode == 1 and 'Traceback' not in done.stderr, done.stderr
    assert done.stderr.startswith('error: ') and done.stderr.count('error: ') == 1, done.stderr
    return done.stderr.removeprefix('error: ').rstrip('\n')


def colours(file):
    """How many pixels are blue, yellow and red in the sample (left), and in the grid of classes."""
    picture = np.asarray(Image.open(file).convert('RGB'))
    parts = np.split(picture, [picture.shape[1] // 5], axis=1)
    return [[int((part == colour).all(-1).sum()) for colour in (BLUE, YELLOW, RED)]
            for part in parts]


@pytest.fixture(scope='session')
def arrays(food11):
    """train_x, train_y, val_x, val_y."""
    return *data.readfile(food11 / 'training'), *data.readfile(food11 / 'validation')


@pytest.fixture
def call(small):
    """Calls the data script with small images."""
    return partial(small.call, main=small.data.main)


@pytest.fixture
def counts(call):
    """counts(arguments): the printed numbers of photographs, as {'Egg': (4, 2), 'total': …}."""
    def count(*arguments):
        done = call(*arguments)
        assert done.returncode == 0 and done.stderr == '', done.stderr
        rows = re.findall(r'^(?: *\d+ )?(.*?) +(\d+) +(\d+)$', done.stdout, re.MULTILINE)
        return {name: (int(training), int(validation)) for name, training, validation in rows}
    return count


@pytest.fixture
def window(monkeypatch):
    """Lets matplotlib seem to have windows. Returns the figures that it has shown."""
    shown = []

    def show(block=None):
        assert block is True  # IPython would go on at once
        # The layout settles when a figure is drawn for the second time.
        plt.gcf().canvas.draw()
        plt.gcf().canvas.draw()
        shown.append(plt.gcf())
    monkeypatch.setattr(plt.figure().canvas.__class__, 'required_interactive_framework', 'qt')
    plt.close()
    monkeypatch.setattr(plt, 'show', show)
    return shown


# ---- Reading ---------------------------------------------------------------------------------

def test_readfile_gives_opencvs_pixels_in_sorted_order(food11, arrays):
    x, y, _, _ = arrays
    names = sorted(os.listdir(food11 / 'training'))
    assert (x.shape, x.dtype) == ((44, 128, 128, 3), np.uint8)
    assert (y.shape, y.dtype) == ((44,), np.uint8)
    assert y.tolist() == [int(name.split('_')[0]) for name in names]
    assert np.array_equal(x, [opencvs(food11 / 'training' / name) for name in names])
    # The book gives a text.
    assert np.array_equal(data.readfile(str(food11 / 'training'))[0], x)


@pytest.mark.skipif('FOOD11_DIR' not in os.environ, reason='FOOD11_DIR names no photographs')
def test_readfile_on_real_photographs():
    classes, train_files, _ = data.find_photographs(os.environ['FOOD11_DIR'])
    assert classes == data.CLASSES
    x, y = data.readfile(train_files)
    for image, label, (file, _) in list(zip(x, y, train_files, strict=True))[::17]:
        assert np.array_equal(image, opencvs(file))
        assert file.parent.name == classes[label] or re.match(f'{label}[_-]', file.name)


def test_every_spelling_of_a_name_and_every_kind_of_photograph(tmp_path):
    kinds = {'0_9.webp': 'RGB', '10_0.JPG': 'RGB', '1_5.bmp': 'RGB', '2_1.png': 'RGBA',
             '3-17.jpg': 'L', '3_17.jpg': 'RGB', '4_2.TIFF': 'RGB', '7_1.Jpeg': 'CMYK',
             '8_1_flipped.jpg': 'RGB', '9_12 汤.jp2': 'RGB'}
    dish = Image.fromarray(draw_dish(9, np.random.default_rng(0))[..., ::-1])
    for name, mode in kinds.items():
        write(tmp_path / name, dish.convert(mode))
    x, y = data.readfile(tmp_path)
    assert y.tolist() == [int(re.match('[0-9]+', name)[0]) for name in sorted(kinds)]
    for image, name in zip(x, sorted(kinds)):
        assert np.array_equal(image, opencvs(tmp_path / name)), name
        picture = dish.convert(kinds[name]).convert('RGB').resize((128, 128))
        assert abs(image.astype(int) - np.asarray(picture)[..., ::-1]).mean() < 8, name


def test_a_jpeg_is_read_as_opencv_reads_it_wherever_its_picture_is_cut_off(tmp_path):
    dish = Image.fromarray(draw_dish(0, np.random.default_rng(0))[..., ::-1]).resize((24, 24))
    whole = write(tmp_path / 'whole.jpg', dish).read_bytes()
    # Whole ones, too: what is added at their end changes no pixel.
    write(tmp_path / 'cut' / '1_1.jpg', dish, progressive=True)
    write(tmp_path / 'cut' / '1_2.jpg', dish, restart_marker_blocks=2)
    # The picture begins after a marker and a header of 14 bytes.
    for length in range(whole.index(b'\xff\xda') + 15, len(whole)):
        (tmp_path / 'cut' / f'0_{length}.jpg').write_bytes(whole[:length])
    x, _ = data.readfile(tmp_path / 'cut')
    assert len(x) > 100
    for image, file in zip(x, data.list_images(tmp_path / 'cut'), strict=True):
        assert np.array_equal(image, opencvs(file)), file


def test_reading_takes_the_memory_of_the_array_and_little_more(tmp_path):
    """48 KiB a photograph are the array."""
    files = [(write(tmp_path / '0.jpg'), 0)] * 400
    tracemalloc.start()
    try:
        data.readfile(files)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 48 * 1024 <= peak / 400 < 60 * 1024


def test_eight_photographs_are_read_at_the_same_time_and_no_more(tmp_path, monkeypatch):
    """On any computer: each thread holds a whole photograph in memory."""
    together, threads, imdecode = threading.Barrier(8), set(), cv2.imdecode

    def wait_for_seven_others(*arguments):
        threads.add(threading.get_ident())
        together.wait(timeout=60)
        return imdecode(*arguments)
    monkeypatch.setattr(cv2, 'imdecode', wait_for_seven_others)
    data.readfile([(write(tmp_path / '0.jpg'), 0)] * 32)
    assert len(threads) == 8


@pytest.mark.skipif(os.name != 'posix', reason='Windows has no such signals')
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_photographs_are_read(call, tmp_path, monkeypatch, number):
    """Only those that have been begun are read to their end."""
    folder = write_all(tmp_path / 'mine', 'training/0_0.jpg', 'validation/0_1.jpg')
    for i in range(1, 600):
        shutil.copy(folder / 'training' / '0_0.jpg', folder / 'training' / f'0_{i}.jpg')
    begun, imdecode = [], cv2.imdecode

    def interrupt(*arguments):
        begun.append(1)
        if len(begun) == 80:
            os.kill(os.getpid(), number)
        time.sleep(0.01)
        return imdecode(*arguments)
    monkeypatch.setattr(cv2, 'imdecode', interrupt)
    # Otherwise, a script that ignores the signal would end the tests.
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        done = call('--data-dir', 'mine')
    except KeyboardInterrupt:
        pytest.fail('a traceback')
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (130, 'interrupted')
    assert len(begun) < 500


# ---- Refusing --------------------------------------------------------------------------------

def test_all_bad_files_come_in_one_message_one_a_line(call, food11, tmp_path):
    """So that they can be piped into a file."""
    training = shutil.copytree(food11, tmp_path / 'food-11') / 'training'
    png, bmp = (write(training / f'0_1.{kind}').read_bytes() for kind in ('png', 'bmp'))
    contents = {'png': png[:-1], 'bmp': bmp[:-1], 'apng': png[:-40], 'jpg': b'', 'jpeg': b'a text'}
    bad = [training / f'{i % 11}_{i}.{kind}' for i in range(100, 160) for kind in contents]
    for file in bad:
        file.write_bytes(contents[file.suffix[1:]])
    assert all(opencvs(file) is None for file in bad[:5])
    first, *lines = message(call()).splitlines()
    assert '300' in first and NO_IMAGE in first and lines == sorted(map(str, bad))
    # Names without a label are found before anything is read.
    names = ['bread.jpg', '1.jpg', '1', '11_1.jpg', '01-05-2021.jpg', '01-05 2021.jpg', '_1.jpg',
             '5-star.jpg', '10 minutes 3.jpg', '10minutes_3.jpg', '10.5_3.jpg', '3_1_2.jpg']
    for name in names:
        shutil.copy(training / '3_0.jpg', training / name)
    first, *lines = message(call('--data-dir', 'food-11')).splitlines()
    assert '12' in first and NO_LABEL in first
    assert lines == sorted(str(training / name) for name in names)


@pytest.mark.parametrize('name', ['training/4_0.jpg', 'training/Egg', 'validation'])
def test_what_the_system_does_not_give_is_named_and_not_left_out(
        call, few, tmp_path, monkeypatch, name):
    """A link that leads nowhere stands for OneDrive; PermissionError for a folder of somebody else,
    or a network drive that has dropped. (Permissions mean nothing to root.)"""
    path = shutil.copytree(few, tmp_path / 'food-11') / name
    if name.endswith('.jpg'):
        path.unlink()
        link(tmp_path / 'moved away', path)
    path.parent.joinpath('Egg').mkdir()

    def refuse(function, place='.'):
        if os.path.abspath(place) == str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
        return function(place)
    for function in ('listdir', 'scandir'):
        monkeypatch.setattr(os, function, partial(refuse, getattr(os, function)))
    error = message(call())
    # It may be a good photograph.
    assert error.startswith(f'{path}: ') and '\n' not in error and 'delete' not in error


@pytest.mark.parametrize('arguments, status, word', [
    ([], 1, '--demo draws some'),
    (['--data-dir', 'missing'], 1, 'missing'),
    (['--data-dir', ''], 2, 'empty'),
    (['--data-dir', 'few', '--save', ''], 2, 'empty'),
    (['--data-dir', '~/mine'], 1, os.path.join('home', 'mine')),
    (['--data-dir', 'few', '--save', 'nowhere/preview.png'], 1, 'nowhere'),
    (['--data-dir', 'few/training/0_0.jpg'], 1, '0_0.jpg'),
    (['--data-dir', 'few', '--demo'], 2, 'not allowed with'),
    # A file in the place of the demo's folder, as a folder in which nobody may write.
    (['--demo'], 1, 'food-11-demo'),
    (['--recipe', 'bettr'], 2, "'bettr'")], ids=str)
def test_mistakes_end_in_one_line(call, few, tmp_path, monkeypatch, arguments, status, word):
    # expanduser asks for either of them.
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('USERPROFILE', str(tmp_path / 'home'))
    shutil.copytree(few, tmp_path / 'few')
    (tmp_path / 'food-11-demo').touch()
    # As the project comes.
    (tmp_path / 'food-11').mkdir()
    (tmp_path / 'food-11' / 'README.md').touch()
    done = call(*arguments)
    assert done.returncode == status and 'Traceback' not in done.stderr
    assert word in done.stderr.splitlines()[-1] and done.stderr.count('error: ') == 1


def test_an_engineers_mistake_keeps_its_traceback(small):
    def main(_):
        raise OSError('it names no file')
    with pytest.raises(OSError, match='it names no file'):
        small.call(main=main)


# ---- The data folder and its classes ---------------------------------------------------------

@pytest.mark.parametrize('classes', [
    FLOWERS, KAGGLES_FOLDERS, ['汤', '米饭', '面条'], ['a', 'b'], [str(i) for i in range(11)],
    ['0', '10', '9', 'a']], ids=str)
def test_the_folders_of_training_are_the_classes(tmp_path, classes):
    """In sorted order: for Kaggle's food-11, that is the book's. Numbers are sorted as numbers."""
    for name in reversed(classes):
        write_all(tmp_path, f'training/{name}/5.jpg', f'training/{name}/12.jpg')
    write(tmp_path / 'validation' / classes[-1] / '7_1.jpg')
    found, train_files, val_files = data.find_photographs(tmp_path)
    assert found == classes
    assert sorted(train_files, key=lambda pair: pair[1]) == [
        (tmp_path / 'training' / name / file, label)
        for label, name in enumerate(classes) for file in ('12.jpg', '5.jpg')]
    assert [label for _, label in val_files] == [len(classes) - 1]
    # As in the book.
    for one, other in zip(data.readfile(tmp_path / 'training', classes),
                          data.readfile(train_files)):
        assert np.array_equal(one, other)


@pytest.mark.parametrize('files, expected', [
    # On Kaggle's disk nothing can be renamed. Other folders beside the two parts do not matter.
    *[([f'{train}/a/1.jpg', f'{train}/b/1.jpg', f'{train}/b/2.jpg', f'{val}/a/1.jpg', 'test/1.jpg',
        'sample/a/1.jpg'], {'a': (1, 1), 'b': (2, 0), 'total': (3, 1)})
      for train, val in [('train', 'val'), ('train', 'valid'), ('training', 'val')]],
    # A class may be called train.
    ([file for name in ('bus', 'test track', 'train')
      for file in (*names_on('training', name, 2), *names_on('validation', name, 1))],
     {'bus': (2, 1), 'test track': (2, 1), 'train': (2, 1), 'total': (6, 3)})], ids=len)
def test_other_peoples_names(counts, tmp_path, files, expected):
    write_all(tmp_path / 'mine', *files)
    assert counts('--data-dir', 'mine') == expected


def test_what_is_no_photograph_is_left_out(small, counts, tmp_path):
    """The script is started in the folder, whose name is Chinese. So its picture and its runs are
    among the photographs."""
    names = [name for folder in ('Egg', 'Soup') for part in ('training', 'validation')
             for name in names_on(part, folder, 3)]
    small.cwd = folder = write_all(tmp_path / '美食 数据', *names)
    others = ['.DS_Store', '._0_0.jpg', 'Thumbs.db', 'desktop.ini', 'labels.csv', 'notes.TXT',
              'via.json', 'README.md', 'all.zip', 'lost+found/1.jpg', '__MACOSX/0_0.jpg',
              '.cache/0_0.jpg', '@eaDir/0_0.jpg/SYNOPHOTO_THUMB_M.jpg', '$RECYCLE.BIN/0.jpg',
              'System Volume Information/0.jpg', 'runs/001/last.pt', 'runs/001/curves.png',
              'my run/last.pt', 'my run/old/curves.png', 'Egg/film.mp4', 'Egg/IMG_1.MOV',
              'Egg/IMG_1.AAE', 'Egg/old.avi', 'Egg/1.xmp']
    if os.name == 'posix':
        others.append('Egg/Icon\r')
    for name in others:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b'no photograph')
    for data_dir, place in ('.', ''), ('.', 'Egg'), ('..', ''):
        assert counts('--data-dir', data_dir) == {'Egg': (3, 3), 'Soup': (3, 3), 'total': (6, 6)}
        assert (small.cwd / 'chapter2_1_data.png').exists()
        small.cwd = folder / place


def test_folders_within_the_folders_of_classes_and_links_to_elsewhere(tmp_path):
    """The outermost folder is the class."""
    folder = write_all(tmp_path / 'mine', 'training/dogs/1.jpg', 'training/dogs/2023/cats/2.jpg',
                       'training/cats/1.jpg', 'validation/cats/2.jpg')
    write_all(tmp_path / 'other disk', '1.jpg', 'old/2.jpg')
    link(tmp_path / 'other disk', folder / 'training' / 'fish')
    # The folder may be a link as well.
    link(folder, tmp_path / 'link')
    for data_dir in (folder, tmp_path / 'link'):
        classes, train_files, _ = data.find_photographs(data_dir)
        assert classes == ['cats', 'dogs', 'fish']
        assert train_files == [(data_dir / 'training' / name, label) for name, label in [
            ('cats/1.jpg', 0), ('dogs/1.jpg', 1), ('dogs/2023/cats/2.jpg', 1), ('fish/1.jpg', 2),
            ('fish/old/2.jpg', 2)]]


@pytest.mark.parametrize('links', [
    {'a/up': '.'}, {'a/up': '.', 'b/up': '.'}, {'a/b': 'b', 'b/a': 'a'}, {'a/z/c': 'c'},
    {'a/home': '..'}, {'b/self': 'b'}, {'a/there': '../other', '../other/back': '.'}], ids=str)
def test_no_photograph_is_read_twice_however_many_links_lead_to_it(tmp_path, links):
    """Nor without an end. Each is read where it lies."""
    photographs = ['a/1.jpg', 'a/z/2.jpg', 'b/1.jpg', 'c/1.jpg']
    folder = write_all(tmp_path / 'mine', *photographs)
    (tmp_path / 'other').mkdir()
    for name, target in links.items():
        link((folder / target).resolve(), folder / name)
    assert [file.relative_to(folder).as_posix() for file in data.list_images(folder)] == photographs


def test_a_fifth_is_for_validation_and_no_photograph_ever_changes_sides(tmp_path):
    """Whatever is added or deleted, and wherever the folder lies."""
    names = [f'{name}/{number}.jpg' for name in ('cats', 'dogs') for number in range(10, 40)]
    folder = write_all(tmp_path / 'mine', *names)
    for place in (folder, tmp_path / '美食'):
        folder = folder.rename(place)
        classes, *parts = data.find_photographs(folder)
        for files, part in zip(parts, ('training', 'validation')):
            assert [(file, classes[label]) for file, label in files] == [
                (folder / name, name.split('/')[0]) for name in sorted(names) if side(name) == part]
        assert 6 <= len(parts[1]) <= 18
        more = ['cats/00.jpg', 'ants/1.jpg', *names_on('training', 'ants', 1)]
        write_all(folder, *more)
        (folder / names.pop()).unlink()
        names = sorted({*names, *more})


@pytest.mark.parametrize('files', [
    ['training/Egg/1.jpg', 'training/Soup/1.jpg', 'validation/Egg/2.jpg', 'validation/Soup/2.jpg'],
    ['training/3_1.jpg', 'validation/3_2.jpg'], ['train/a/1.jpg', 'train/b/2.jpg', 'val/b/1.jpg']],
    ids=['folders', 'names', 'train'])
def test_a_data_folder_above_or_below_the_right_one(small, call, tmp_path, files):
    """A zip file unpacked into a folder of its own; cd training, and then --data-dir . ."""
    meant = write_all(tmp_path / 'my data' / 'food-11', *files)
    # A neighbour, which must not pass for a class.
    write_all(tmp_path, 'my data/holidays/1.jpg')
    for place in (meant.parent, meant / Path(files[0]).parts[0], meant / Path(files[-1]).parts[0]):
        small.cwd = place
        error = message(call('--data-dir', '.'))
        assert error.endswith(f'did you mean --data-dir "{meant}"?')


@pytest.mark.parametrize('files, words', [
    # Of a folder that is no class, the folder is named, and not its photographs.
    (['training/Egg/1.jpg', 'training/Soup/1.jpg', 'validation/Pizza/1.jpg',
      'validation/Pizza/2.jpg'], [f'Pizza {NO_LABEL}', 'Egg, Soup']),
    # The course's food-11 of 2021: the folders with numbers are classes.
    (['training/labeled/00/1.jpg', 'training/unlabeled/00/2.jpg', 'validation/00/3.jpg',
      'validation/01/4.jpg'], [NO_LABEL, 'labeled, unlabeled', '00\n', '01']),
    ([*names_on('training', 'cats', 3), *names_on('validation', 'dogs', 1),
      *names_on('validation', '鸟', 2)], ['no photographs for training of dogs, training of 鸟;']),
    (['training/0_1.jpg', 'validation/0_2.jpg', 'validation/3_1.jpg'],
     ['no photographs for training of Egg;']),
    ([*names_on('training', 'a', 1), *names_on('training', 'b', 2)],
     ['no photographs for validation;']),
    (['training/a/1.jpg', 'validation/a/1.jpg'], ['no photographs for a second class;'])])
def test_classes_that_are_not_in_both_parts(call, tmp_path, files, words):
    folder = write_all(tmp_path / 'mine', *files)
    error = message(call('--data-dir', 'mine'))
    assert str(folder) in error and all(word in error for word in words), error


@pytest.mark.parametrize('folders', [
    # Other people's names for the parts of a data set. A test set must not choose the epoch.
    'train/a train/b test/a test/b', 'Train/a Train/b Test/a Test/b', 'training/a testing/a',
    'Training/a Training/b VALIDATION/a', 'training_set/a test_set/a', 'train dev',
    'seg_train/a seg_test/a seg_pred/a', '训练集/a 验证集/a 测试集/a', 'TrainSet ValSet',
    'train2017 val2017', 'flowers_train flowers_test', 'labeled unlabeled', 'train validation_set',
    # No class, one class.
    '.', 'a'])
def test_folders_that_do_not_make_two_classes(call, tmp_path, folders):
    names = folders.split()
    folder = write_all(tmp_path / 'mine', *[f'{name}/{i}.jpg' for name in names for i in (1, 2)])
    if 'VALIDATION/a' in names and (folder / 'training').exists():
        pytest.skip('upper and lower case are the same here')
    error = message(call('--data-dir', 'mine'))
    assert str(folder) in error and '\n' not in error
    assert 'food-11/README.md' in error
    assert all(name.split('/')[0] in error for name in names)


def test_names_of_every_kind(small, call, tmp_path):
    """macOS writes é as two characters, and a folder copied from there keeps them. A zip file from
    a Chinese Windows, unpacked on Linux, has names that are not Unicode. $_$ is no formula."""
    folder, soup = tmp_path / 'mine', 'soup'
    if sys.platform == 'linux':
        folder, soup = (tmp_path / os.fsdecode(name.encode('gbk')) for name in ('数据', '汤'))
        soup = soup.name
    creme = 'crème brûlée'
    decomposed = unicodedata.normalize('NFD', creme)
    write_all(folder, *[f'{part}/{name}/{name}.jpg' for part in ('training', 'validation')
                        for name in (decomposed, soup, 'a$_$b')])
    (folder / 'validation' / decomposed).rename(folder / 'validation' / creme)
    done = call('--data-dir', folder, '--save', 'preview.png')
    assert done.returncode == 0 and done.stderr == '', done.stderr
    table = [line.split(maxsplit=1)[1].split() for line in done.stdout.splitlines()[2:5]]
    assert [*creme.split(), '1', '1'] in table and ['a$_$b', '1', '1'] in table
    assert soup == 'soup' or [r'\xcc\xc0', '1', '1'] in table
    # Training draws such names as well, and finds the classes again, also on a Windows disk.
    run = ('--out', 'run', '--device', 'cpu')
    assert small.call('--data-dir', folder, '--epochs', 1, *run).returncode == 0
    assert (tmp_path / 'run' / 'mistakes.png').exists()
    (folder / 'training' / decomposed).rename(folder / 'training' / creme)
    for options in (['--resume', '--epochs', 2], ['--predict', folder / 'validation'],
                    ['--predict', folder / 'validation' / soup / f'{soup}.jpg']):
        done = small.call(*options, *run)
        assert done.returncode == 0, done.stderr
    # Undivided, a photograph keeps its side.
    sides = [data.is_for_validation(tmp_path / unicodedata.normalize(form, f'é{i}.jpg'), tmp_path)
             for form in ('NFC', 'NFD') for i in range(20)]
    assert sides[:20] == sides[20:] and any(sides)
    (folder / 'training' / soup / f'{soup}.jpg').write_bytes(b'')
    error = message(call('--data-dir', folder))
    assert NO_IMAGE in error and (soup == 'soup' or r'\xca\xfd' in error)


def test_more_classes_than_a_byte_can_count(counts, tmp_path):
    for i in range(300):
        picture = Image.new('RGB', (8, 8), (i % 256, i // 256, 0))
        write(tmp_path / 'mine' / 'training' / f'{i:03d}' / '1.png', picture)
    write(tmp_path / 'mine' / 'validation' / '299' / '1.png', Image.new('RGB', (9, 9)))
    found = counts('--data-dir', 'mine', '--index', 239)
    assert found['298'] == (1, 0) and found['299'] == (1, 1)
    _, train_files, _ = data.find_photographs(tmp_path / 'mine')
    x, y = data.readfile(train_files)
    assert y.tolist() == list(range(300)) and data.ImgDataset(x, y)[299][1].item() == 299
    assert data.readfile(train_files[:256])[1].dtype == np.uint8


def test_photographs_in_training_and_in_validation_are_said(call, tmp_path):
    folder = write_all(tmp_path / 'mine', 'training/a/1.jpg', 'training/a/2.jpg',
                       'training/b/3.jpg', 'validation/a/1.jpg', 'validation/b/1.jpg')
    # Twice in training is no harm.
    shutil.copy(folder / 'training/b/3.jpg', folder / 'training/b/again.jpg')
    assert 'note' not in call('--data-dir', 'mine').stdout
    # The last of training is the first of validation.
    shutil.copy(folder / 'training/b/again.jpg', folder / 'validation/a/0.jpg')
    shutil.copy(folder / 'training/a/2.jpg', folder / 'validation/a/5.jpg')
    note, = (line for line in call('--data-dir', 'mine').stdout.splitlines() if 'note' in line)
    assert ' 2 times' in note and str(folder / 'training' / 'b') in note
    assert note.endswith(f' and {folder / "validation" / "a" / "0.jpg"}')


def test_the_totals_of_the_complete_food_11_stand_there_if_they_differ(capsys):
    train_y = np.repeat(np.arange(11), [994, 429, 1500, 986, 848, 1325, 440, 280, 855, 1500, 709])
    val_y = np.repeat(np.arange(11), [362, 144, 500, 327, 326, 449, 147, 96, 347, 500, 232])
    assert data.CLASSES == KAGGLES_FOLDERS
    # With one photograph fewer; complete; another data set.
    for missing, classes, said in (1, data.CLASSES, 1), (0, data.CLASSES, 0), (1, FLOWERS[:11], 0):
        data.print_counts(train_y[missing:], val_y, classes)
        lines = capsys.readouterr().out.splitlines()
        assert lines[7].split() == ['6', classes[6], '440', '147']
        assert lines[12].split() == ['total', str(9866 - missing), '3430']
        assert len(lines) == 13 + said and ('9866 training and 3430' in lines[-1]) == bool(said)


# ---- Dataset and batches ---------------------------------------------------------------------

def test_imgdataset_with_and_without_labels(arrays):
    x, y = arrays[:2]
    train_set = data.ImgDataset(x, y, data.test_transform)
    image, label = train_set[5]
    assert label.dtype == torch.long and label.item() == y[5]
    assert image.dtype == torch.uint8
    assert np.array_equal(image.numpy(), x[5].transpose(2, 0, 1))
    assert torch.equal(data.ImgDataset(x, transform=data.test_transform)[5], image)
    assert np.array_equal(data.ImgDataset(x)[5], x[5])
    assert len(data.ImgDataset(x)) == 44
    # On Windows and macOS, a loader's workers get it like this: with a handle to the same images.
    assert len(ForkingPickler.dumps(train_set)) < x.nbytes / 10


def test_train_transform_flips_half_and_rotates_to_15_degrees():
    """A white bar right of the middle shows by its angle and its side what was done to it."""
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


# ---- Looking ---------------------------------------------------------------------------------

def test_the_demo_called_as_from_a_notebook(scripts, tmp_path, monkeypatch, capsys):
    """There, sys.argv holds the arguments of the notebook's kernel."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['ipykernel_launcher.py', '-f', 'kernel.json'])
    scripts.data.main(['--demo', '--index', '7'])
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == '' and lines[0] == '(330, 128, 128, 3)'
    assert lines[5].split() == ['3', 'Egg', '30', '10']
    assert lines[13].split() == ['total', '330', '110']
    assert lines[-1] == f'picture written to {tmp_path / "chapter2_1_data.png"}'
    # Readable, and fits a small screen.
    width, height = Image.open(tmp_path / 'chapter2_1_data.png').size
    assert 1000 < width < 1366 and 400 < height < 768


# Engineers' edits. INVERTED makes yellow of blue.
INVERTED = {'    transforms.TrivialAugmentWide(),\n': '    transforms.RandomInvert(1),\n'}
NORMALIZED = {
    f'{before}    transforms.PILToTensor(),{after}\n':
    f'{before}    transforms.ToTensor(),\n    transforms.Normalize([0.5] * 3, [0.2] * 3),\n'
    for before, after in {
        '  # by up to 15 degrees in either direction\n': '       # uint8 [3, 128, 128]',
        'test_transform = transforms.Compose([\n    transforms.ToPILImage(),\n': '',
        '    transforms.TrivialAugmentWide(),\n': ''}.items()}


@pytest.mark.parametrize('edits, recipe', [(INVERTED, 'book'), (INVERTED, 'better'),
                                           (NORMALIZED, 'book')],
                         ids=['book', 'better', 'normalized'])
def test_the_preview_has_true_colours_and_the_recipes_augmentation(
        edited, tmp_path, caplog, edits, recipe):
    """Of the grid, the first row of five has no augmentation. The classes' list is edited, too."""
    start = "CLASSES = ['Bread', 'Dairy product', 'Dessert', 'Egg', 'Fried food', 'Meat',\n"
    mine = edited({**edits, start: "CLASSES = ['T-shirt', '$',\n"})
    for name in ('training/0_1.png', 'training/1_1.png', 'validation/6_1.png', 'training/6_1.png'):
        write(tmp_path / 'mine' / name, Image.new('RGB', (64, 64), BLUE))
    done = mine.call('--data-dir', 'mine', '--recipe', recipe, '--save', 'preview.png',
                     main=mine.data.main)
    assert done.returncode == 0 and 'T-shirt' in done.stdout, done.stderr
    # matplotlib warns when it cuts off what is not in 0..1.
    assert done.stderr == '' and not caplog.records
    sample, grid = colours(tmp_path / 'preview.png')
    assert sample[2] == grid[2] == 0
    if recipe == 'book':
        assert sample[0] > 10_000 and sample[1] == 0 and grid[0] > 50_000 and grid[1] == 0
    else:
        assert sample[0] == 0 and sample[1] > 10_000 and 3 * grid[0] < grid[1] < 5 * grid[0]


def test_a_users_settings_of_matplotlib_neither_change_the_picture_nor_are_changed(
        call, few, tmp_path):
    """A matplotlibrc for LaTeX, or one for a publisher; a notebook's plots."""
    pictures = []
    for settings in {}, {'text.usetex': True, 'image.origin': 'lower', 'axes.grid': True,
                         'savefig.dpi': 50, 'font.size': 30}:
        with matplotlib.rc_context(settings):
            before = dict(matplotlib.rcParams)
            torch.manual_seed(0)
            done = call('--data-dir', few, '--save', 'preview.png')
            assert done.returncode == 0, done.stderr
            assert dict(matplotlib.rcParams) == before and plt.get_fignums() == []
        pictures.append((tmp_path / 'preview.png').read_bytes())
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize('classes', [FLOWERS[:3], KAGGLES_FOLDERS, FLOWERS,
                                     [f'class {i:02d}' for i in range(25)]], ids=len)
def test_names_in_the_preview_can_be_read_and_images_are_large(call, tmp_path, window, classes):
    """The first 20 classes are shown."""
    for i, name in enumerate(classes):
        for part in ('training', 'validation'):
            write(tmp_path / 'mine' / part / name / '1.png', Image.new('RGB', (32, 32), (i, 9, 9)))
    assert call('--data-dir', 'mine').returncode == 0
    figure, = window
    page, names = figure.bbox, figure.axes[1].get_xticklabels()
    boxes = [name.get_window_extent() for name in names]
    assert [name.get_text() for name in names] == [
        f'{label} {name}' for label, name in enumerate(classes[:20])]
    assert all(box.x0 > 0 and box.x1 < page.width and box.y1 < page.height for box in boxes)
    # The names are slanted lines that begin at the same height.
    assert len({round(box.y0) for box in boxes}) == 1
    distances = np.diff([box.x0 for box in boxes]) * np.sin(np.radians(names[0].get_rotation()))
    names[0].set_rotation(0)
    assert distances.min() > names[0].get_window_extent().height
    grid = figure.axes[1].images[0].get_window_extent()
    assert grid.height > 0.7 * page.height or grid.width > 0.7 * page.width
    # In a file, nothing is cut off either.
    assert call('--data-dir', 'mine', '--save', 'preview.png').returncode == 0
    picture = np.asarray(Image.open(tmp_path / 'preview.png').convert('L'))
    for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
        assert edge.min() == 255


def test_with_a_display_the_preview_opens_in_a_window(call, few, tmp_path, window):
    """A class without photographs is left out, and an index is as near as possible."""
    for index, title in [('7', 'train_set[7]\n7: Rice'), ('100', 'train_set[9]\n9: Soup'),
                         ('-1', 'train_set[0]\n0: Bread')]:
        done = call('--data-dir', few, '--index', index)
        assert done.returncode == 0 and 'picture' not in done.stdout, done.stderr
        sample, grid = window[-1].axes
        assert sample.get_title() == title
    assert [name.get_text() for name in grid.get_xticklabels()] == [
        f'{label} {name}' for label, name in enumerate(data.CLASSES) if label != 3]
    assert os.listdir(tmp_path) == [] and plt.get_fignums() == []


@pytest.mark.parametrize('error', [ImportError, OSError, Exception])
def test_where_no_window_can_be_made_the_picture_is_written(
        call, few, tmp_path, monkeypatch, error):
    """MPLBACKEND=TkAgg on a server; a Tk without its files, as on some Windows: its TclError is
    none of the usual errors, and cannot be imported without Tk."""
    def fail(*_, **__):
        raise type('TclError', (error,), {})("Can't find a usable init.tcl")
    monkeypatch.setattr(plt, 'figure', fail)
    # A name may have any ending, or none.
    for arguments, name in [([], 'chapter2_1_data.png'), (['--save', '预览.jpg'], '预览.jpg'),
                            (['--save', 'preview'], 'preview')]:
        done = call('--data-dir', few, *arguments)
        assert done.returncode == 0 and done.stderr == '', done.stderr
        assert done.stdout.splitlines()[-1] == f'picture written to {tmp_path / name}'
        assert Image.open(tmp_path / name).format == 'PNG'


# ---- Where the script runs -------------------------------------------------------------------

@pytest.mark.parametrize('stdout', ['| head', '/dev/full'])
def test_started_by_a_notebook_without_a_display_and_where_nothing_can_be_printed(
        small, few, tmp_path, stdout):
    """It inherits the notebook's MPLBACKEND, which may not be installed for it."""
    env = {key: value for key, value in os.environ.items()
           if key not in ('DISPLAY', 'WAYLAND_DISPLAY', 'PYTHONUNBUFFERED')}
    env['MPLBACKEND'] = 'module://matplotlib_inline.backend_inline'
    # Windows and macOS always have a display: a window would open, and wait.
    save = [] if sys.platform == 'linux' else ['--save', 'chapter2_1_data.png']
    if stdout == '| head':
        # head has ended already.
        end, file = os.pipe()
        os.close(end)
    elif sys.platform == 'linux':
        file = os.open(stdout, os.O_WRONLY)
    else:
        pytest.skip('no /dev/full')
    done = small.run('--data-dir', few, *save, script='chapter2_1_data.py', env=env, stdout=file)
    os.close(file)
    assert done.returncode == 0 and done.stderr == '', done.stderr
    assert (tmp_path / 'chapter2_1_data.png').stat().st_size > 10_000


class IdlesWindow(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize('place, stream', [
    ('notebook', io.StringIO()), ('IDLE', IdlesWindow()), ('pythonw', None),
    ('file', io.TextIOWrapper(io.BytesIO(), 'ascii'))])
def test_where_stdout_is_another_object_or_none(small, few, tmp_path, monkeypatch, place, stream):
    """Jupyter, Spyder and VS Code run a script in an ipykernel, and show progress bars; IDLE's
    window cannot. A file on an English Windows holds no Chinese characters."""
    if place == 'notebook':
        monkeypatch.setitem(sys.modules, 'ipykernel', pytest)
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        small.data.run_script(lambda: small.data.main(
            ['--data-dir', str(few), '--save', '预览.png']))
    signal.signal(signal.SIGTERM, handler)
    assert (tmp_path / '预览.png').exists()
    if stream is not None:
        stream.seek(0)
        text = stream.read()
        assert '预览.png' in text or r'\u9884\u89c8.png' in text
        assert ('reading' in text) == (place == 'notebook')


def test_fake_photographs_are_all_different_and_always_the_same(food11, tmp_path):
    files = [file.read_bytes() for file in data.list_images(food11)]
    assert len(set(files)) == 66
    draw_food11(tmp_path, training=4, validation=2)
    assert [file.read_bytes() for file in data.list_images(tmp_path)] == files
