import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ['MPLBACKEND'] = 'Agg'  # the tests open no window

import chapter2_1_data as data  # noqa: E402


class Small(nn.Sequential):
    """A network in the place of Classifier, for tests of what is done with it: its epochs and checkpoints take no time."""
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16 * 16, 11))


@pytest.fixture(scope='session')
def food11(tmp_path_factory):
    """A drawn food-11 with 4 training and 2 validation images of each class; not to be written to."""
    folder = tmp_path_factory.mktemp('drawn')
    data.draw_food11(folder, training=4, validation=2)
    return folder


@pytest.fixture(scope='session')
def arrays(food11):
    """train_x, train_y, val_x, val_y of the drawn food-11."""
    return data.read_food11(food11)


@pytest.fixture(scope='session')
def photographs(tmp_path_factory):
    """One training and one validation image of each class but the eggs."""
    folder = tmp_path_factory.mktemp('few')
    data.draw_food11(folder, training=1, validation=1)
    for split in ('training', 'validation'):
        (folder / split / '3_0.jpg').unlink()
    return folder


@pytest.fixture
def script(tmp_path):
    """Runs a script as a user would, in an empty folder and without a display."""
    def start(name, *arguments):
        env = {key: value for key, value in os.environ.items() if key not in ('DISPLAY', 'WAYLAND_DISPLAY', 'MPLBACKEND')}
        return subprocess.run([sys.executable, str(ROOT / name), *map(str, arguments)], cwd=tmp_path, env=env,
                              stdin=subprocess.DEVNULL, capture_output=True, encoding='utf-8', timeout=300)
    return start


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """The same within the tests' own process, which spares the seconds that importing PyTorch takes."""
    def start(main, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr('sys.argv', ['script.py', *map(str, arguments)])
        code = 0
        try:
            data.run(main)
        except SystemExit as stop:
            code = stop.code
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)
    return start
