"""chapter2_1_data.py: what it reads, what it refuses, what it shows."""
import contextlib
import hashlib
import io
import itertools
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
from tests.fake_food11 import draw_dish

KAGGLES_FOLDERS = ['Bread', 'Dairy product', 'Dessert', 'Egg', 'Fried food', 'Meat',
                   'Noodles-Pasta', 'Rice', 'Seafood', 'Soup', 'Vegetable-Fruit']
NO_IMAGE = 'cannot be read as an image'
NO_LABEL = 'has no label'


def dish(seed=0):
    return Image.fromarray(draw_dish(0, np.random.default_rng(seed))[..., ::-1])


def write(file, image=None, **options):
    """A drawn photograph, or the given picture, in the format that the file's name says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    (image or dish()).save(file, **options)
    return file


def write_all(folder, *files):
    """Photographs such as training/Egg/1.jpg, no two the same."""
    for seed, file in enumerate(files):
        write(folder / file, dish(seed))
    return folder


def opencvs(file):
    """What the book's cv2.imread and cv2.resize make of a photograph."""
    # On Windows, imread cannot open paths with Chinese characters.
    with tempfile.TemporaryDirectory() as folder:
        img = cv2.imread(shutil.copy(file, Path(folder, f'photograph{file.suffix}')))
    return cv2.resize(img, (128, 128))


def link(target, file):
    try:
        file.symlink_to(target)
        file.lstat()  # under Wine a link is "made" and not there
    except OSError:
        pytest.skip('no symbolic links here')


def message(done):
    """What stands behind `error: `, if a script has ended with that and nothing else."""
    assert done.returncode == 1 and 'Traceback' not in done.stderr, done.stderr
    assert done.stderr.startswith('error: ') and done.stderr.count('error: ') == 1, done.stderr
    return done.stderr.removeprefix('error: ').rstrip('\n')


@pytest.fixture
def call(small):
    """Calls the data script with small images."""
    return partial(small.call, main=small.data.main)


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

def test_readfile_gives_opencvs_pixels_in_sorted_order(tmp_path):
    """For every spelling of a name, and every kind of photograph."""
    kinds = {'0_9.webp': 'RGB', '10_0.JPG': 'RGB', '1_5.bmp': 'RGB', '2_1.png': 'RGBA',
             '3-17.jpg': 'L', '3_17.jpg': 'RGB', '4_2.TIFF': 'RGB', '7_1.Jpeg': 'CMYK',
             '8_1_flipped.jpg': 'RGB', '9_12 汤.jp2': 'RGB'}
    for seed, (name, mode) in enumerate(kinds.items()):
        write(tmp_path / name, dish(seed).convert(mode))
    x, y = data.readfile(str(tmp_path))  # the book gives a text
    assert (x.shape, x.dtype, y.dtype) == ((10, 128, 128, 3), np.uint8, np.uint8)
    assert y.tolist() == [0, 10, 1, 2, 3, 3, 4, 7, 8, 9]
    assert np.array_equal(x, [opencvs(tmp_path / name) for name in kinds])
    # More classes than a byte can count.
    _, y = data.readfile([(tmp_path / '1_5.bmp', 0), (tmp_path / '1_5.bmp', 299)])
    assert y.tolist() == [0, 299] and data.ImgDataset(x[:2], y)[1][1].item() == 299


@pytest.mark.skipif('FOOD11_DIR' not in os.environ, reason='FOOD11_DIR names no photographs')
def test_readfile_on_real_photographs():
    classes, train_files, _ = data.find_photographs(os.environ['FOOD11_DIR'])
    assert classes == data.CLASSES
    x, y = data.readfile(train_files)
    for image, label, (file, _) in list(zip(x, y, train_files, strict=True))[::17]:
        assert np.array_equal(image, opencvs(file))
        assert file.parent.name == classes[label] or re.match(f'{label}[_-]', file.name)


def test_a_cut_off_jpeg_is_read_as_opencv_reads_it(tmp_path):
    """And whole ones: what is added at their end changes no pixel."""
    tiny = dish().resize((24, 24))
    write(tmp_path / '1_1.jpg', tiny, progressive=True)
    whole = write(tmp_path / '1_2.jpg', tiny, restart_marker_blocks=2).read_bytes()
    # The picture begins after a marker and a header of 14 bytes.
    for length in range(whole.index(b'\xff\xda') + 15, len(whole)):
        (tmp_path / f'0_{length}.jpg').write_bytes(whole[:length])
    x, _ = data.readfile(tmp_path)
    assert len(x) > 100
    assert np.array_equal(x, [opencvs(file) for file in data.list_images(tmp_path)])


def test_eight_photographs_at_a_time_take_little_more_memory_than_the_array(tmp_path, monkeypatch):
    together, imdecode = threading.Barrier(8), cv2.imdecode

    def wait_for_seven_others(*arguments):
        together.wait(timeout=60)
        return imdecode(*arguments)
    monkeypatch.setattr(cv2, 'imdecode', wait_for_seven_others)
    files = [(write(tmp_path / '0.jpg'), 0)] * 400
    tracemalloc.start()
    data.readfile(files)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 48 * 1024 <= peak / 400 < 60 * 1024  # the array takes 48 KiB a photograph


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_photographs_are_read(call, food11, monkeypatch, number):
    """Of 44, only those are read to their ends that have begun."""
    calls, imdecode = itertools.count(1), cv2.imdecode

    def interrupt(*arguments):
        # So slow that others wait for a thread when the signal comes.
        time.sleep(.05)
        if next(calls) == 20:
            signal.raise_signal(number)
        return imdecode(*arguments)
    monkeypatch.setattr(cv2, 'imdecode', interrupt)
    # A script that left SIGTERM to the system would end the tests as well.
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    done = call('--data-dir', food11)
    signal.signal(signal.SIGTERM, handler)
    assert (done.returncode, done.stderr) == (130, 'interrupted\n')
    assert next(calls) < 40


# ---- Refusing --------------------------------------------------------------------------------

def test_all_bad_files_come_in_one_message_one_a_line(call, few, tmp_path):
    """So that they can be piped into a file."""
    training = shutil.copytree(few, tmp_path / 'food-11') / 'training'
    bad = [training / f'{i % 11}_{i}.jpg' for i in range(100, 200)]
    for i, file in enumerate(bad):
        file.write_bytes([b'', b'a text'][i % 2])
    first, *lines = message(call()).splitlines()
    assert 'these 100' in first and NO_IMAGE in first and lines == sorted(map(str, bad))
    # Names without a label are found before anything is read.
    names = ['bread.jpg', '1.jpg', '11_1.jpg', '01-05-2021.jpg', '10 minutes 3.jpg', '10.5_3.jpg']
    for name in names:
        shutil.copy(training / '2_0.jpg', training / name)
    first, *lines = message(call('--data-dir', 'food-11')).splitlines()
    assert 'these 6' in first and NO_LABEL in first
    assert lines == sorted(str(training / name) for name in names)


@pytest.mark.parametrize('name', ['training/4_0.jpg', 'validation'])
def test_what_the_system_does_not_give_is_named_and_not_left_out(
        call, few, tmp_path, monkeypatch, name):
    """A link that leads nowhere stands for OneDrive, PermissionError for a lost network drive."""
    path = shutil.copytree(few, tmp_path / 'food-11') / name
    if path.is_file():
        path.unlink()
        link(tmp_path / 'moved away', path)
    listdir = os.listdir

    def refuse(place):
        if Path(place) == path:
            raise PermissionError(13, 'Permission denied', str(place))
        return listdir(place)
    monkeypatch.setattr(os, 'listdir', refuse)
    error = message(call())
    # It may be a good photograph.
    assert error.startswith(f'{path}: ') and '\n' not in error and 'delete' not in error


@pytest.mark.parametrize('arguments, status, word', [
    ([], 1, '--demo draws some'),
    (['--data-dir', ''], 2, 'empty'),
    (['--data-dir', '~/missing'], 1, os.path.join(os.path.expanduser('~'), 'missing')),
    (['--data-dir', 'few', '--save', 'nowhere/preview.png'], 1, 'nowhere'),
    # A file in the place of the demo's folder, as a folder in which nobody may write.
    (['--demo'], 1, 'food-11-demo')], ids=str)
def test_mistakes_end_in_one_line(call, few, tmp_path, arguments, status, word):
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

@pytest.mark.parametrize('train, val, classes', [
    ('training', 'validation', KAGGLES_FOLDERS), ('train', 'val', ['汤', '米饭', '面条']),
    ('train', 'valid', [str(i) for i in range(11)])])
def test_the_folders_within_the_two_parts_are_the_classes(tmp_path, train, val, classes):
    """In sorted order: for Kaggle's food-11, that is the book's. Numbers are sorted as numbers."""
    for name in classes:
        write_all(tmp_path, f'{train}/{name}/5.jpg', f'{train}/{name}/12.jpg')
    # Other folders beside the two parts do not matter.
    write_all(tmp_path, f'{val}/{classes[-1]}/7_1.jpg', 'test/1.jpg', 'sample/a/1.jpg')
    found, train_files, val_files = data.find_photographs(tmp_path)
    assert found == classes
    assert sorted(train_files, key=lambda pair: pair[1]) == [
        (tmp_path / train / name / file, label)
        for label, name in enumerate(classes) for file in ('12.jpg', '5.jpg')]
    assert val_files == [(tmp_path / val / classes[-1] / '7_1.jpg', len(classes) - 1)]


def test_what_is_no_photograph_is_left_out(small, call, tmp_path):
    """The script is started in the folder. So its picture and its runs are among them."""
    names = [f'{name}/{i}.jpg' for name in ('Egg', 'Soup') for i in range(10, 30)]
    small.cwd = folder = write_all(tmp_path / '美食 数据', *names)
    others = ['.DS_Store', 'Thumbs.db', 'desktop.ini', 'labels.csv', 'notes.TXT', 'via.json',
              'README.md', 'all.zip', 'lost+found/1.jpg', '__MACOSX/0.jpg', '@eaDir/0.jpg/M.jpg',
              '$RECYCLE.BIN/0.jpg', 'System Volume Information/0.jpg', 'runs/001/last.pt',
              'runs/001/curves.png', 'runs/001/old/curves.png', 'Egg/film.mp4', 'Egg/IMG_1.MOV',
              'Egg/IMG_1.AAE', 'Egg/old.avi', 'Egg/1.webm', 'Egg/1.xmp']
    if os.name == 'posix':
        others.append('Egg/Icon\r')
    for name in others:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b'no photograph')
    assert call('--data-dir', '.').returncode == 0
    assert (folder / 'chapter2_1_data.png').exists()
    assert data.list_images(folder) == [folder / name for name in names]


def test_links_are_followed_and_no_photograph_is_read_twice(tmp_path):
    """Nor without an end. Each is read where it lies. The outermost folder is its class."""
    names = ['cats/1.jpg', 'dogs/1.jpg', 'dogs/2023/cats/2.jpg', 'fish/1.jpg', 'fish/old/2.jpg']
    folder = write_all(tmp_path / 'mine', 'validation/cats/3.jpg',
                       *[f'training/{name}' for name in names[:3]])
    other_disk = write_all(tmp_path / 'other disk', '1.jpg', 'old/2.jpg')
    training = folder / 'training'
    link(other_disk, training / 'fish')
    link(training, other_disk / 'back')
    link(training, training / 'cats' / 'up')
    link(training / 'dogs', training / 'cats' / 'dogs')
    link(training / 'cats', training / 'dogs' / 'cats')
    # The data folder may be a link as well.
    link(folder, tmp_path / 'link')
    classes, train_files, _ = data.find_photographs(tmp_path / 'link')
    assert classes == ['cats', 'dogs', 'fish']
    assert train_files == [(tmp_path / 'link' / 'training' / name, label)
                           for name, label in zip(names, [0, 1, 1, 2, 2])]


def test_a_fifth_is_for_validation_and_no_photograph_ever_changes_sides(tmp_path):
    """Whatever is added or deleted, and wherever the folder lies. A class may be called train."""
    def side(name):
        number = int(hashlib.sha256(name.encode()).hexdigest(), 16)
        return 'validation' if number % 5 == 4 else 'training'
    names = [f'{name}/{number}.jpg' for name in ('cats', 'train') for number in range(10, 40)]
    folder = write_all(tmp_path / 'mine', *names)
    for place in (folder, tmp_path / '美食'):
        folder = folder.rename(place)
        classes, *parts = data.find_photographs(folder)
        for files, part in zip(parts, ('training', 'validation')):
            assert [(file, classes[label]) for file, label in files] == [
                (folder / name, name.split('/')[0]) for name in names if side(name) == part]
        more = ['cats/00.jpg', *[f'ants/{i}.jpg' for i in range(5)]]
        write_all(folder, *more)
        (folder / names.pop()).unlink()
        names = sorted({*names, *more})


def test_a_data_folder_above_or_below_the_right_one(small, call, tmp_path):
    """A zip file unpacked into a folder of its own; cd training, and then --data-dir . ."""
    meant = write_all(tmp_path / 'my data' / 'food-11', 'train/Egg/1.jpg', 'train/Soup/1.jpg',
                      'val/Egg/2.jpg', 'val/Soup/2.jpg')
    # A neighbour, which must not pass for a class.
    write_all(meant.parent, 'holidays/1.jpg')
    for place in (meant.parent, meant / 'train', meant / 'val'):
        small.cwd = place
        error = message(call('--data-dir', '.'))
        assert error.endswith(f'did you mean --data-dir "{meant}"?')


@pytest.mark.parametrize('files, words', [
    # Of a folder that is no class, the folder is named, and not its photographs.
    ('training/Egg/1 training/Soup/1 validation/Pizza/1 validation/Pizza/2',
     [f'Pizza {NO_LABEL}', 'Egg, Soup']),
    ('training/0_1 validation/0_2 validation/3_1', ['no photographs for training of Egg;']),
    # By their names, both are for training.
    ('a/1 b/1', ['no photographs for validation;']),
    ('training/a/1 validation/a/1', ['no photographs for a second class;']),
    # No class, one class.
    ('1 2', ['photographs: none']), ('a/1 a/2', ['photographs: a)']),
    # Other people's names for the parts of a data set. A test set must not choose the epoch.
    *[(' '.join(f'{name}/a/{i}' for name in names.split(', ') for i in (1, 2)),
       [f'photographs: {names})'])
      for names in ('test, train', 'Test_set, Train', 'dev, train', 'labeled, unlabeled',
                    'seg_pred, seg_test, seg_train', '测试集, 训练集, 验证集')]])
def test_what_does_not_make_two_classes_for_both_parts(call, tmp_path, files, words):
    folder = write_all(tmp_path / 'mine', *[f'{file}.jpg' for file in files.split()])
    error = message(call('--data-dir', 'mine'))
    assert str(folder) in error and '\n' not in error
    assert all(word in error for word in words), error
    assert NO_LABEL in error or 'food-11/README.md' in error


def test_names_of_every_kind(small, call, tmp_path):
    """macOS writes é as two characters, and a folder copied from there keeps them. A zip file from
    a Chinese Windows, unpacked on Linux, has names that are not UTF-8. $_$ is no formula."""
    soup = os.fsdecode('汤'.encode('gbk')) if sys.platform == 'linux' else 'soup'
    creme = 'crème brûlée'
    decomposed = unicodedata.normalize('NFD', creme)
    folder = write_all(tmp_path / 'mine', *[
        f'{part}/{name}/{name}.jpg' for part in ('training', 'validation')
        for name in (decomposed, soup, 'a$_$b')])
    (folder / 'validation' / decomposed).rename(folder / 'validation' / creme)
    done = call('--data-dir', folder, '--save', 'preview.png')
    assert done.returncode == 0 and done.stderr == '', done.stderr
    rows = {' '.join(line.split()[1:]) for line in done.stdout.splitlines()}
    printed_soup = r'\xcc\xc0' if sys.platform == 'linux' else soup
    assert rows > {f'{creme} 1 1', f'{printed_soup} 1 1', 'a$_$b 1 1'}
    # Training draws and writes such names as well.
    for options in ('--data-dir', folder, '--epochs', 1), ('--predict', folder / 'validation'):
        done = small.call(*options, '--out', 'run', '--device', 'cpu')
        assert done.returncode == 0, done.stderr
    (folder / 'training' / soup / f'{soup}.jpg').write_bytes(b'')
    assert f'{printed_soup}.jpg {NO_IMAGE}' in message(call('--data-dir', folder))


def test_photographs_in_training_and_in_validation_are_said(call, tmp_path):
    folder = write_all(tmp_path / 'mine', 'training/a/1.jpg', 'training/a/2.jpg',
                       'training/b/3.jpg', 'validation/a/1.jpg')
    # The last of training is the first of validation. Twice in training is no harm.
    for copy in ('training/a/0.jpg', 'validation/a/0.jpg', 'validation/a/5.jpg'):
        shutil.copy(folder / 'training/b/3.jpg', folder / copy)
    note, = (line for line in call('--data-dir', 'mine').stdout.splitlines() if 'note' in line)
    assert ' 2 times' in note and str(folder / 'training' / 'b' / '3.jpg') in note
    assert note.endswith(f' and {folder / "validation" / "a" / "0.jpg"}')


def test_the_totals_of_the_complete_food_11_stand_there_if_they_differ(capsys):
    assert data.CLASSES == KAGGLES_FOLDERS
    # With one photograph fewer; complete; another data set.
    for count, classes, said in [(9865, data.CLASSES, True), (9866, data.CLASSES, False),
                                 (9865, ['cats', 'dogs'], False)]:
        data.print_counts(np.zeros(count), np.zeros(3430), classes)
        assert ('9866 training and 3430' in capsys.readouterr().out) == said


# ---- Dataset and batches ---------------------------------------------------------------------

def test_imgdataset_with_and_without_labels(food11):
    x, y = data.readfile(food11 / 'training')
    train_set = data.ImgDataset(x, y, data.test_transform)
    image, label = train_set[5]
    assert (image.dtype, label.dtype, label.item()) == (torch.uint8, torch.long, y[5])
    assert np.array_equal(image.numpy(), x[5].transpose(2, 0, 1))
    assert torch.equal(data.ImgDataset(x, transform=data.test_transform)[5], image)
    assert np.array_equal(data.ImgDataset(x)[5], x[5]) and len(data.ImgDataset(x)) == 44
    # On Windows and macOS, a loader's workers get it like this: with a handle to the same images.
    assert len(ForkingPickler.dumps(train_set)) < x.nbytes / 10


def test_train_transform_flips_half_and_rotates_to_15_degrees():
    """A white bar right of the middle shows by its angle and its side what was done to it."""
    bar = np.zeros((128, 128, 3), np.uint8)
    bar[62:66, 80:120] = 255
    torch.manual_seed(0)
    angles, flips = [], 0
    for _ in range(400):
        lit = torch.nonzero(data.train_transform(bar)[0])
        rows, columns = lit.float().mean(0) - 63.5
        flips += bool(columns < 0)
        angles.append(torch.rad2deg(torch.atan(rows / columns)).item())
    assert 160 < flips < 240
    assert -15.5 < min(angles) < -13 and 13 < max(angles) < 15.5


@pytest.mark.parametrize('transform', [data.train_transform, data.test_transform])
def test_batches_become_the_numbers_of_the_books_transforms(transform):
    """The book's transforms end with ToTensor, which makes float32 in 0..1."""
    # All numbers that a byte can be.
    x = np.resize(np.arange(256, dtype=np.uint8), (4, 128, 128, 3))
    batches = []
    for steps in (transform, transforms.Compose([*transform.transforms[:-1],
                                                 transforms.ToTensor()])):
        torch.manual_seed(3)
        batches += DataLoader(data.ImgDataset(x, transform=steps), batch_size=len(x))
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
    assert err == '' and lines[0] == '(330, 128, 128, 3)' and 'note' not in out
    assert lines[5].split() == ['3', 'Egg', '30', '10']
    assert lines[13].split() == ['total', '330', '110']
    assert lines[-1] == f'picture written to {tmp_path / "chapter2_1_data.png"}'


# Engineers' edits. INVERTED makes yellow of blue.
INVERTED = {'    transforms.TrivialAugmentWide(),\n': '    transforms.RandomInvert(1),\n'}
TO_FLOAT = '    transforms.ToTensor(),\n    transforms.Normalize([0.5] * 3, [0.2] * 3),\n'
NORMALIZED = {
    '    transforms.PILToTensor(),       #': f'{TO_FLOAT}    #',
    '    transforms.ToPILImage(),\n    transforms.PILToTensor(),\n':
        f'    transforms.ToPILImage(),\n{TO_FLOAT}'}


@pytest.mark.parametrize('edits, recipe', [(INVERTED, 'book'), (INVERTED, 'better'),
                                           (NORMALIZED, 'book')])
def test_the_preview_has_true_colours_and_the_recipes_augmentation(
        edited, tmp_path, caplog, edits, recipe):
    """Of the grid, the first row of five has no augmentation."""
    mine = edited(edits)
    for name in ('training/0_1.png', 'training/1_1.png', 'validation/6_1.png', 'training/6_1.png'):
        write(tmp_path / 'mine' / name, Image.new('RGB', (64, 64), 'blue'))
    done = mine.call('--data-dir', 'mine', '--recipe', recipe, '--save', 'preview.png',
                     main=mine.data.main)
    # matplotlib warns when it cuts off what is not in 0..1.
    assert done.returncode == 0 and done.stderr == '' and not caplog.records, done.stderr
    picture = np.asarray(Image.open(tmp_path / 'preview.png').convert('RGB'))
    # The numbers of pixels that are blue, and yellow, in the sample (left) and in the grid.
    sample, grid = ([(part == colour).all(-1).sum() for colour in ([0, 0, 255], [255, 255, 0])]
                    for part in np.split(picture, [picture.shape[1] // 5], axis=1))
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
            assert call('--data-dir', few, '--save', 'preview.png').returncode == 0
            assert dict(matplotlib.rcParams) == before and plt.get_fignums() == []
        pictures.append((tmp_path / 'preview.png').read_bytes())
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize('count', [3, 11, 17, 25])
def test_names_in_the_preview_can_be_read_and_images_are_large(call, tmp_path, window, count):
    """On a small screen. The first 20 classes are shown."""
    classes = [f'Lily of the valley {i:02d}' for i in range(count)]
    for i, name in enumerate(classes):
        for part in ('training', 'validation'):
            write(tmp_path / 'mine' / part / name / '1.png', Image.new('RGB', (32, 32), (i, 9, 9)))
    assert call('--data-dir', 'mine').returncode == 0
    figure, = window
    page, names = figure.bbox, figure.axes[1].get_xticklabels()
    assert 1000 < page.width < 1366 and 400 < page.height < 768
    boxes = [name.get_window_extent() for name in names]
    assert len(names) == min(count, 20)
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


def test_where_no_window_can_be_made_the_picture_is_written(call, few, tmp_path, monkeypatch):
    """MPLBACKEND=TkAgg on a server; a Tk without its files, whose error is none of the usual."""
    def fail(*_, **__):
        raise type('TclError', (Exception,), {})("Can't find a usable init.tcl")
    monkeypatch.setattr(plt, 'figure', fail)
    # A name may have any ending.
    for arguments, name in ([], 'chapter2_1_data.png'), (['--save', '预览.jpg'], '预览.jpg'):
        done = call('--data-dir', few, *arguments)
        assert done.returncode == 0 and done.stderr == '', done.stderr
        assert done.stdout.splitlines()[-1] == f'picture written to {tmp_path / name}'
        assert Image.open(tmp_path / name).format == 'PNG'


# ---- Where the script runs -------------------------------------------------------------------

def test_started_by_a_notebook_and_where_nothing_can_be_printed(small, few, tmp_path):
    """It inherits the notebook's MPLBACKEND, which may not be installed. The disk is full."""
    env = {**os.environ, 'MPLBACKEND': 'module://matplotlib_inline.backend_inline',
           'PYTHONUNBUFFERED': ''}
    with open('/dev/full' if sys.platform == 'linux' else os.devnull, 'w') as stdout:
        done = small.run('--data-dir', few, '--save', 'preview.png',
                         script='chapter2_1_data.py', env=env, stdout=stdout)
    assert done.returncode == 0 and done.stderr == '', done.stderr
    assert (tmp_path / 'preview.png').stat().st_size > 10_000


@pytest.mark.parametrize('place, stream', [
    ('IDLE', type('Window', (io.StringIO,), {'isatty': lambda _: True})()),
    ('notebook', io.StringIO()), ('pythonw', None),
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
