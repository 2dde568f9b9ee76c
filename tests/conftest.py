"""What the tests share: fake photographs, and ways to start the scripts."""
import contextlib
import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.fake_food11 import draw_food11

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ('chapter2_1_data', 'chapter2_2_train')

os.environ['MPLBACKEND'] = 'Agg'  # the tests open no window
# A shell that starts the tests in the background has them ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ['OMP_NUM_THREADS'] = '1'  # more threads only wait for each other in small networks

# The scripts with a small network, small images, few mistakes to draw, and a checkpoint after every
# epoch: for tests of what is done with a network. An engineer would make the same edits.
SMALL = {
    'image_size = 128': 'image_size = 32',
    'save_seconds = 60': 'save_seconds = 0',
    'wrong[most_confident_first][:24]': 'wrong[most_confident_first][:2]',
    'model = Classifier(class_count)':
        'model = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4), nn.ReLU(), '
        'nn.Flatten(), nn.Linear(4 * 4 * 4, class_count))',
}


class Scripts:
    """A folder with both scripts. run starts one as a user does; call does so in this process,
    which saves the seconds that importing PyTorch takes. Both run in the folder `cwd`."""

    def __init__(self, folder, cwd):
        self.folder = folder
        self.cwd = cwd
        self.data, self.train = import_scripts(folder)

    def run(self, *arguments, script='chapter2_2_train.py', **options):
        command = [sys.executable, str(self.folder / script), *map(str, arguments)]
        options = {'cwd': self.cwd, 'timeout': 300, 'stdin': subprocess.DEVNULL,
                   'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, **options}
        return subprocess.run(command, encoding='utf-8', **options)

    def call(self, *arguments, main=None, stderr=None):
        main = main or self.train.main
        # Streams as Python makes them.
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding='utf-8', newline='') for _ in range(2))
        # A script does not put it back, as its process ends.
        handler = signal.getsignal(signal.SIGTERM)
        folder, code = os.getcwd(), 0
        os.chdir(self.cwd)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(stderr or err):
                self.data.run_script(lambda: main(list(map(str, arguments))))
        except SystemExit as stop:
            code = stop.code
            if isinstance(code, str):
                print(code, file=err)
                code = 1
        finally:
            os.chdir(folder)
            signal.signal(signal.SIGTERM, handler)
        for stream in (out, err):
            stream.seek(0)
        return SimpleNamespace(returncode=code or 0, stdout=out.read(), stderr=err.read())


def import_scripts(folder):
    """The modules in `folder`, leaving those alone that other tests have imported."""
    others = {name: sys.modules.pop(name) for name in SCRIPTS if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        return [importlib.import_module(name) for name in SCRIPTS]
    finally:
        sys.path.remove(str(folder))
        for name in SCRIPTS:
            sys.modules.pop(name, None)
        sys.modules.update(others)


def edited_copy(folder, edits):
    """Copies the scripts into `folder`; each key of `edits`, which must be there once, is replaced
    by its value."""
    shutil.copytree(ROOT / 'tests', folder / 'tests', ignore=shutil.ignore_patterns('__pycache__'))
    texts = {name: (ROOT / f'{name}.py').read_text(encoding='utf-8') for name in SCRIPTS}
    for old, new in edits.items():
        assert sum(text.count(old) for text in texts.values()) == 1, old
        texts = {name: text.replace(old, new) for name, text in texts.items()}
    for name, text in texts.items():
        (folder / f'{name}.py').write_text(text, encoding='utf-8')
    return folder


@pytest.fixture
def scripts(tmp_path):
    """The scripts as they are, run in an empty folder."""
    return Scripts(ROOT, tmp_path)


@pytest.fixture(scope='session')
def small_folder(tmp_path_factory):
    return edited_copy(tmp_path_factory.mktemp('small'), SMALL)


@pytest.fixture
def small(small_folder, tmp_path):
    """The scripts with a small network and small images, run in an empty folder."""
    return Scripts(small_folder, tmp_path)


@pytest.fixture
def edited(tmp_path, tmp_path_factory):
    """edited(edits, base) makes small scripts with further edits."""
    def make(edits, base=SMALL):
        return Scripts(edited_copy(tmp_path_factory.mktemp('edited'), {**base, **edits}), tmp_path)
    return make


@pytest.fixture(scope='session')
def food11(tmp_path_factory):
    """A fake food-11 with 4 training and 2 validation images of each class."""
    folder = tmp_path_factory.mktemp('food11')
    draw_food11(folder, training=4, validation=2)
    return folder


@pytest.fixture(scope='session')
def few(tmp_path_factory):
    """One training and one validation image of each class but the eggs."""
    folder = tmp_path_factory.mktemp('few')
    draw_food11(folder, training=1, validation=1)
    for eggs in folder.glob('*/3_0.jpg'):
        eggs.unlink()
    return folder


@pytest.fixture(scope='session')
def finished(small_folder, few, tmp_path_factory):
    """The folder of an uninterrupted run of 3 epochs, and what it printed. Not to be changed."""
    scripts = Scripts(small_folder, tmp_path_factory.mktemp('finished'))
    done = scripts.call('--data-dir', few, '--epochs', 3, '--batch-size', 4, '--device', 'cpu',
                        '--out', 'run')
    return scripts.cwd / 'run', done


@pytest.fixture
def copy_of_finished(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / 'run')
