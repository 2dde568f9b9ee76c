"""A run's folder: what it holds, how it survives being stopped and killed, what it is used for."""
import builtins
import csv
import errno
import io
import json
import os
import pickle
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn

import chapter2_1_data as data
import chapter2_2_train as train
from tests.fake_food11 import draw_food11
from tests.test_train import LINE, POSIX, SAVED_AT_THE_END, at_step

CPU = torch.device('cpu')
LINUX = pytest.mark.skipif(sys.platform != 'linux', reason='/proc, and fork without dangers')

# Imports the scripts once, which takes seconds. Then, for each line of its input, a fork of it runs
# the code in a file: a fresh process, as far as PyTorch can tell. Prints the exit status.
FORKS = '''
import os, sys
sys.path.insert(0, sys.argv[1])
import chapter2_1_data, chapter2_2_train, matplotlib.figure
for line in sys.stdin:
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code, out, *sys.argv[1:] = line.rstrip('\\n').split('\\t')
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        exec(open(code).read())
        chapter2_1_data.run_script(chapter2_2_train.main)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
'''

# Puts a system under a script that kills it at a chosen instant, such as "write 2": in the middle
# of writing last.pt for the second time; or "replace 2": when last.pt has been replaced then.
KILLER = '''
instant = sys.argv.pop(1)
fsync, replace, seen = os.fsync, os.replace, []
def now(event):
    seen.append(event)
    return instant == f'{event} {seen.count(event)}'
def fsync_or_die(file):
    name = os.path.basename(os.readlink(f'/proc/self/fd/{file}'))
    if name == 'last.pt.tmp' and now('write'):
        os.ftruncate(file, 1000)
        os.kill(os.getpid(), 9)
    fsync(file)
def replace_or_die(source, target):
    replace(source, target)
    if os.path.basename(target) == 'last.pt' and now('replace'):
        os.kill(os.getpid(), 9)
os.fsync, os.replace = fsync_or_die, replace_or_die
'''

# Sends a script two signals while it reads photographs.
INTERRUPTER = '''
import cv2, threading, time
number = int(sys.argv.pop(1))
imdecode, calls = cv2.imdecode, []
def interrupt_twice():
    for _ in range(2):
        time.sleep(.02)
        os.kill(os.getpid(), number)
def imdecode_and_interrupt(*arguments):
    calls.append(1)
    if len(calls) == 3:
        threading.Thread(target=interrupt_twice).start()
    return imdecode(*arguments)
cv2.imdecode = imdecode_and_interrupt
'''

# At the end of a script, prints how many kB of 64 MiB of new numbers are in large pages.
LARGE_PAGES = '''
import atexit
def large_pages():
    with open('/proc/self/smaps') as file:
        return sum(int(line.split()[1]) for line in file if line.startswith('AnonHugePages'))
def print_growth():
    import torch
    before = large_pages()
    numbers = torch.ones(2**24)
    print(large_pages() - before)
atexit.register(print_growth)
'''

# Starts a script in which process 1 dies as soon as process 0 has saved an epoch, but only once.
DYING = '''
import os, runpy, sys, threading, time
def die_when_saved():
    while not os.path.exists('two/curves.png'):
        time.sleep(0.01)
    open('died', 'w').close()
    os.kill(os.getpid(), 9)
if os.environ['RANK'] == '1' and not os.path.exists('died'):
    threading.Thread(target=die_when_saved, daemon=True).start()
sys.argv.pop(0)
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name='__main__')
'''


def torchrun(folder, *command):
    """Starts two processes that train together. Ends them if they wait for each other."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node',
               '2', *map(str, command)]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          encoding='utf-8', start_new_session=True) as process:
        try:
            out, err = process.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends the others
            raise
    return SimpleNamespace(returncode=process.returncode, stdout=out, stderr=err)


@pytest.fixture(scope='module')
def forks(small_folder):
    command = [sys.executable, '-c', FORKS, small_folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          encoding='utf-8') as process:
        yield process
        process.stdin.close()


@pytest.fixture
def forked(forks, tmp_path):
    """forked(code, arguments) runs the small training script in a process of its own, after the
    code in the text `code`."""
    def run(code, *arguments):
        file, out = tmp_path / 'code.py', tmp_path / 'out.txt'
        file.write_text(f'os.chdir({str(tmp_path)!r})\n{code}')
        print(file, out, *arguments, sep='\t', file=forks.stdin, flush=True)
        return SimpleNamespace(returncode=int(forks.stdout.readline()), output=out.read_text())
    return run


def history(folder):
    """The rows of history.csv, seconds aside."""
    with open(folder / 'history.csv', newline='', encoding='utf-8') as file:
        return [{name: float(value) for name, value in row.items() if name != 'seconds'}
                for row in csv.DictReader(file)]


def checkpoint(folder, name='last.pt'):
    return torch.load(folder / name, weights_only=True, map_location='cpu')


def epochs_saved(folder):
    return len(checkpoint(folder)['history'])


def same(one, other):
    """Are two checkpoints equal, bit for bit, seconds aside?"""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(
            same(one[key], other[key]) for key in one if key not in ('seconds', 'data_dir'))
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def evaluated(scripts, folder, name, data_dir, no_amp=False):
    """Accuracy and loss of a checkpoint's weights on all validation images, in one process."""
    model, classes = scripts.train.load_model(folder / name, CPU)
    val_x, val_y = scripts.data.readfile(data_dir / 'validation', classes)
    dtype = scripts.train.pick_precision(CPU, no_amp)
    autocast, _ = scripts.train.mixed_precision(CPU, dtype)
    probabilities = scripts.train.predict_probabilities(model, val_x, 4, autocast)
    losses = -np.log(probabilities[np.arange(len(val_y)), val_y])
    return (probabilities.argmax(1) == val_y).mean(), losses.mean()


# ---- The folder ------------------------------------------------------------------------------

def test_a_run_leaves_checkpoints_history_settings_and_pictures(small, finished, few):
    folder, done = finished
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(folder)) == [
        'best.pt', 'confusion.png', 'curves.png', 'history.csv', 'last.pt', 'mistakes.png',
        'settings.json']
    assert json.loads((folder / 'settings.json').read_text(encoding='utf-8')) == {
        'data_dir': str(few), 'recipe': 'book', 'epochs': 3, 'batch_size': 4, 'lr': .001, 'seed': 0,
        'no_amp': False, 'classes': data.CLASSES}
    printed = [LINE.fullmatch(line).groups() for line in done.stdout.splitlines()[:3]]
    for row, line in zip(history(folder), printed, strict=True):
        values = [row[name] for name in ('train_acc', 'train_loss', 'val_acc', 'val_loss')]
        assert int(line[0]) == row['epoch']
        assert [f'{value:.6f}' for value in values] == list(line[2:])
    best = max(history(folder), key=lambda row: row['val_acc'])
    right, loss = evaluated(small, folder, 'best.pt', few)
    assert (right, loss) == pytest.approx((best['val_acc'], best['val_loss']), rel=1e-4)
    assert done.stdout.splitlines()[-1].split()[-1] == f'{right:.1%}'
    optimizer = checkpoint(folder)['optimizer']
    assert optimizer['param_groups'][0]['lr'] == .001 and optimizer['state'][0]['step'] == 9


def test_a_folder_that_holds_files_is_left_alone(small, few, tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.txt').write_text('mine')
    done = small.call('--data-dir', few, '--epochs', 1, '--device', 'cpu', '--out', 'mine')
    assert done.returncode == 1 and 'mine already holds files' in done.stderr
    assert os.listdir(tmp_path / 'mine') == ['thesis.txt']


def test_somebodys_files_are_left_alone_with_resume_too(small, few, tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'settings.json').write_text('mine')
    run = ('--data-dir', few, '--epochs', 1, '--device', 'cpu', '--resume')
    done = small.call(*run, '--out', 'mine')
    assert done.returncode == 1 and done.stderr.count('\n') == 1
    assert 'mine holds files, such as settings.json, but last.pt is missing' in done.stderr
    assert os.listdir(tmp_path / 'mine') == ['settings.json']
    assert (tmp_path / 'mine' / 'settings.json').read_text() == 'mine'
    # --out "$FOLDER", and no such variable.
    done = small.call(*run, '--out', '')
    assert done.returncode == 2 and '--out has no name' in done.stderr
    assert os.listdir(tmp_path) == ['mine']
    # What a system or a killed run has left there does not count.
    for name in ('.DS_Store', 'last.pt.tmp'):
        (tmp_path / 'new').mkdir(exist_ok=True)
        (tmp_path / 'new' / name).touch()
    assert small.call(*run, '--out', 'new').returncode == 0


def test_only_a_folder_that_the_run_has_made_is_removed(small, tmp_path):
    (tmp_path / 'mine').mkdir()
    for out in ('mine', 'new'):
        done = small.call('--data-dir', 'nowhere', '--device', 'cpu', '--out', out)
        assert done.returncode == 1 and 'nowhere' in done.stderr
    assert os.listdir(tmp_path) == ['mine']


def test_best_weights_without_a_last_checkpoint_are_left_alone(small, copy_of_finished):
    (copy_of_finished / 'last.pt').unlink()
    best = (copy_of_finished / 'best.pt').read_bytes()
    done = small.call('--out', 'run', '--resume', '--device', 'cpu')
    assert done.returncode == 1 and 'last.pt is missing' in done.stderr
    assert (copy_of_finished / 'best.pt').read_bytes() == best


def test_each_run_takes_the_next_free_folder_and_home_is_home(small, few, tmp_path, monkeypatch):
    (tmp_path / 'runs' / '001').mkdir(parents=True)
    monkeypatch.setenv('HOME', str(few))
    monkeypatch.setenv('USERPROFILE', str(few))
    done = small.call('--data-dir=~', '--epochs', 1, '--device', 'cpu')
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / 'runs')) == ['001', '002']
    assert not os.listdir(tmp_path / 'runs' / '001')
    monkeypatch.setenv('HOME', str(tmp_path / 'runs'))
    monkeypatch.setenv('USERPROFILE', str(tmp_path / 'runs'))
    done = small.call('--out=~/002', '--device', 'cpu',
                      '--predict', few / 'validation' / '0_0.jpg')
    assert done.returncode == 0, done.stderr


# ---- Resuming --------------------------------------------------------------------------------

def test_resuming_a_finished_run_writes_its_files_anew(small, finished, copy_of_finished):
    """As after a kill between the files: some are missing, one is old."""
    for name in ('best.pt', 'confusion.png', 'curves.png', 'settings.json'):
        (copy_of_finished / name).unlink()
    (copy_of_finished / 'history.csv').write_text('epoch\n1\n')
    # Fewer epochs than it has: there is nothing to train.
    done = small.call('--out', 'run', '--resume', '--device', 'cpu', '--epochs', 2)
    assert done.returncode == 0 and '[00' not in done.stdout
    assert done.stdout.splitlines() == finished[1].stdout.splitlines()[3:]
    assert sorted(os.listdir(copy_of_finished)) == sorted(os.listdir(finished[0]))
    assert history(copy_of_finished) == history(finished[0])
    for name in ('last.pt', 'best.pt'):
        assert same(checkpoint(copy_of_finished, name), checkpoint(finished[0], name))


def test_what_is_typed_on_resume_wins_and_the_rest_is_the_runs(small, few, copy_of_finished):
    resume = ('--out', 'run', '--resume', '--device', 'cpu')
    done = small.call(*resume, '--epochs', 4, '--lr', '1e-5', '--no-amp')
    assert done.returncode == 0 and done.stdout.startswith('[004/004]'), done.stderr
    last = checkpoint(copy_of_finished)
    assert last['options'] == {'data_dir': str(few), 'recipe': 'book', 'epochs': 4,
                               'batch_size': 4, 'lr': 1e-5, 'seed': 0, 'no_amp': True}
    group = last['optimizer']['param_groups'][0]
    assert group['lr'] == 1e-5 and last['optimizer']['state'][0]['step'] == 12
    # From now on, these are the run's.
    done = small.call(*resume)
    assert done.returncode == 0 and 'precision float32' in done.stderr
    settings = json.loads((copy_of_finished / 'settings.json').read_text(encoding='utf-8'))
    assert settings['lr'] == 1e-5


def test_other_photographs_on_resume_are_said(small, few, copy_of_finished, tmp_path):
    """Equally many of them, in another place."""
    shutil.copytree(few, tmp_path / 'moved')
    resume = ('--out', 'run', '--resume', '--device', 'cpu', '--data-dir', 'moved')
    done = small.call(*resume)
    assert done.returncode == 0 and 'changed' not in done.stderr
    file = tmp_path / 'moved' / 'training' / '0_0.jpg'
    file.rename(file.with_name('0_1.jpg'))
    done = small.call(*resume, '--epochs', 4)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 5
    assert line == 'the photographs for training have changed since then'
    # Now these are the run's.
    assert 'changed' not in small.call(*resume).stderr


def test_with_other_validation_photographs_the_best_epoch_is_chosen_anew(
        small, few, copy_of_finished, tmp_path):
    """All labels are wrong now, as if the old best accuracy could not be reached any more."""
    shutil.copytree(few, tmp_path / 'other')
    for file in (tmp_path / 'other' / 'validation').iterdir():
        file.rename(file.with_name('0_' + file.name.removesuffix('_0.jpg') + '.jpg'))
    resume = ('--out', 'run', '--resume', '--device', 'cpu', '--lr', 0)
    for epochs in (4, 5):
        done = small.call(*resume, '--data-dir', 'other', '--epochs', epochs)
        assert done.returncode == 0, done.stderr
        assert ('the best epoch is chosen anew' in done.stderr) == (epochs == 4)
        best = checkpoint(copy_of_finished)['best_epoch']
        assert best == 4
        right, _ = evaluated(small, copy_of_finished, 'best.pt', tmp_path / 'other')
        assert right == history(copy_of_finished)[3]['val_acc']
        assert done.stdout.splitlines()[-1].split()[-1] == f'{right:.1%}'
    # Chosen anew again, but there is nothing to train: the weights are the last ones.
    done = small.call(*resume, '--data-dir', few)
    assert done.returncode == 0 and 'chosen anew' in done.stderr, done.stderr
    for name in ('last.pt', 'best.pt'):
        right, _ = evaluated(small, copy_of_finished, name, few)
        assert done.stdout.splitlines()[-1].split()[-1] == f'{right:.1%}'
    # From now on, these are the run's.
    assert 'changed' not in small.call(*resume, '--data-dir', few).stderr


def test_the_table_is_that_of_the_best_epoch(edited, few, tmp_path):
    """A network that knows its photographs, and then has a learning rate that is much too high."""
    small = edited({}, base=SAVED_AT_THE_END)
    shutil.copytree(few / 'training', tmp_path / 'same' / 'training')
    shutil.copytree(few / 'training', tmp_path / 'same' / 'validation')
    for epochs, rate in ((12, .01), (13, 1)):
        done = small.call('--data-dir', 'same', '--out', 'run', '--resume', '--epochs', epochs,
                          '--lr', rate, '--batch-size', 4, '--device', 'cpu')
        assert done.returncode == 0, done.stderr
    accuracies = [row['val_acc'] for row in history(tmp_path / 'run')]
    assert accuracies[-1] < max(accuracies)
    assert done.stdout.splitlines()[-1].split()[-1] == f'{max(accuracies):.1%}'
    right, _ = evaluated(small, tmp_path / 'run', 'best.pt', tmp_path / 'same')
    assert right == max(accuracies)


def test_another_optimizer_on_resume_is_refused_in_one_line(small, edited, few):
    sgd = edited({'torch.optim.Adam(model.parameters(), lr=options.lr,':
                  'torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9,'})
    run = ('--data-dir', few, '--device', 'cpu', '--out', 'run', '--resume', '--epochs')
    for epochs in (1, 2):
        assert sgd.call(*run, epochs).returncode == 0
    done = small.call(*run, 3)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert 'incompatible: its optimizer was SGD, now it is Adam;' in done.stderr.splitlines()[-1]


def test_the_state_of_the_scaler_is_that_of_the_run(small, few):
    """Only float16 has one."""
    states = []
    for scale in (8., 2.):
        model = small.train.make_model(11, CPU)
        optimizer = torch.optim.Adam(model.parameters())
        scaler = torch.amp.GradScaler('cpu', init_scale=scale)
        if states:
            small.train.restore(model, optimizer, scaler, states[0], Path('last.pt'), data.CLASSES)
        states.append({'model': model.state_dict(), 'optimizer': optimizer.state_dict(),
                       'optimizer_kind': 'Adam', 'scaler': scaler.state_dict(),
                       'required': small.train.requirements(model, data.CLASSES)})
    assert states[1]['scaler']['scale'] == 8


def test_photographs_that_have_moved(small, copy_of_finished, few):
    last = checkpoint(copy_of_finished)
    last['options']['data_dir'] = str(copy_of_finished / 'gone')
    torch.save(last, copy_of_finished / 'last.pt')
    done = small.call('--out', 'run', '--resume', '--device', 'cpu')
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and str(copy_of_finished / 'gone') in error
    assert 'the photographs for training are in --data-dir' in error
    assert small.call('--out', 'run', '--resume', '--device', 'cpu', '--data-dir',
                      few).returncode == 0


# ---- Stopped and killed ----------------------------------------------------------------------

@LINUX
def test_killed_and_resumed_ends_as_if_never_interrupted(small, forked, finished, few, tmp_path):
    """Killed while it saves for the first time; between last.pt and the other files; while it
    saves again."""
    arguments = ('--data-dir', few, '--epochs', 3, '--batch-size', 4, '--device', 'cpu',
                 '--out', 'run', '--resume')
    out = tmp_path / 'run'
    assert forked(KILLER, 'write 1', *arguments).returncode == -signal.SIGKILL
    assert os.listdir(out) == ['last.pt.tmp']
    done = forked(KILLER, 'replace 1', *arguments)
    assert done.returncode == -signal.SIGKILL and 'resumed' not in done.output
    assert epochs_saved(out) == 1 and os.listdir(out) == ['last.pt']
    done = forked(KILLER, 'write 2', *arguments)
    assert done.returncode == -signal.SIGKILL and 'resumed from epoch 1 in run' in done.output
    assert epochs_saved(out) == 2 and (out / 'last.pt.tmp').stat().st_size == 1000
    done = small.call('--out', 'run', '--resume', '--device', 'cpu')
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 4
    assert done.stderr.splitlines()[3] == 'resumed from epoch 2 in run'
    assert sorted(os.listdir(out)) == sorted(os.listdir(finished[0]))
    assert history(out) == history(finished[0])
    for name in ('last.pt', 'best.pt'):
        assert same(checkpoint(out, name), checkpoint(finished[0], name))


@POSIX
def test_a_second_run_is_refused_and_ctrl_c_says_how_to_continue(small, few, tmp_path):
    command = small.command('--data-dir', few, '--epochs', 1000, '--batch-size', 4, '--out',
                            'my run', '--workers', 1, '--device', 'cpu')
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
                          encoding='utf-8', start_new_session=True) as process:
        for _ in range(2):
            assert LINE.fullmatch(process.stdout.readline().rstrip())
        same_folder = os.path.join('my run', '..', 'my run')
        second = small.call('--out', same_folder, '--resume', '--device', 'cpu', '--epochs', 1)
        assert second.returncode == 1 and second.stdout == ''
        assert second.stderr.startswith(f'error: {same_folder} is in use by another run')
        assert second.stderr.count('\n') == 1
        # As a terminal does: the workers get it too.
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    lines = errors.splitlines()
    assert process.returncode == 130 and len(lines) == 5, errors
    saved = epochs_saved(tmp_path / 'my run')
    said, advised = lines[3].split('; continue with ')
    assert saved >= 1 and said == f'my run holds the state after epoch {saved}'
    assert lines[4] == 'interrupted'
    script, *advised = shlex.split(advised.removeprefix('python '))
    assert script == 'chapter2_2_train.py'
    done = small.call(*advised, '--epochs', saved, '--device', 'cpu')
    assert done.returncode == 0 and f'resumed from epoch {saved} in my run' in done.stderr


def test_interrupted_before_anything_is_saved(small, few, tmp_path):
    with at_step(2, lambda: signal.raise_signal(signal.SIGTERM)):
        done = small.call('--data-dir', few, '--batch-size', 4, '--out', 'run', '--device', 'cpu')
    assert done.returncode == 130 and not (tmp_path / 'run').exists()
    line, interrupted = done.stderr.splitlines()[3:]
    assert line == 'nothing is saved yet'
    assert interrupted == 'interrupted'


class SecondSignal(io.StringIO):
    """A stderr at which more signals arrive while the line that says how to continue is printed:
    two quick Ctrl-C, or torchrun's SIGTERM after a process has died."""

    def write(self, text):
        if 'state after epoch' in text or 'interrupted' in text:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_a_second_signal_does_not_lose_the_line_that_says_how_to_continue(small, few):
    stderr = SecondSignal()
    with at_step(7, lambda: signal.raise_signal(signal.SIGINT)):
        done = small.call('--data-dir', few, '--batch-size', 4, '--out', 'run', '--device', 'cpu',
                          stderr=stderr)
    assert done.returncode == 130
    line, interrupted = stderr.getvalue().splitlines()[-2:]
    assert line.startswith('run holds the state after epoch 1; continue with python')
    assert interrupted == 'interrupted'


def test_a_second_signal_at_the_end_of_the_data_script(small, few, monkeypatch):
    imdecode, stderr = cv2.imdecode, SecondSignal()

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return imdecode(*arguments)
    monkeypatch.setattr(cv2, 'imdecode', interrupted)
    try:
        done = small.call('--data-dir', few, main=small.data.main, stderr=stderr)
    except KeyboardInterrupt:
        pytest.fail('the second signal was not ignored')
    assert done.returncode == 130 and stderr.getvalue() == 'interrupted\n'


def test_a_signal_after_an_error_does_not_lose_that_line_either(small, copy_of_finished):
    """torchrun's SIGTERM, when the other process has died."""
    def fail():
        raise RuntimeError('Connection closed by peer')
    stderr = SecondSignal()
    with at_step(1, fail), pytest.raises(RuntimeError, match='Connection closed'):
        small.call('--out', 'run', '--resume', '--epochs', 5, '--device', 'cpu', stderr=stderr)
    assert 'run holds the state after epoch 3; continue with' in stderr.getvalue()


def test_what_a_shell_starts_in_the_background_ignores_ctrl_c(small):
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        small.data.run_script(lambda: None)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)


def test_interrupted_with_a_damaged_checkpoint(small, copy_of_finished):
    def damage():
        spoil(copy_of_finished / 'last.pt', 'cut off')
        signal.raise_signal(signal.SIGINT)
    with at_step(1, damage):
        done = small.call('--out', 'run', '--resume', '--epochs', 5, '--device', 'cpu')
    assert done.returncode == 130 and 'Traceback' not in done.stderr
    line, interrupted = done.stderr.splitlines()[-2:]
    assert f'{Path("run", "last.pt")} is corrupt' in line and interrupted == 'interrupted'


def test_a_run_in_a_thread(small, few, tmp_path, monkeypatch):
    """As Gradio, Streamlit and tkinter programs start it."""
    monkeypatch.chdir(tmp_path)
    arguments = ['--data-dir', str(few), '--epochs', '1', '--device', 'cpu', '--out', 'run']
    with ThreadPoolExecutor() as threads:
        threads.submit(small.train.main, arguments).result()
        threads.submit(small.data.run_script, lambda: small.train.main(
            [*arguments, '--resume', '--epochs', '2'])).result()
    assert epochs_saved(tmp_path / 'run') == 2


@LINUX
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_photographs_are_read(forked, few, copy_of_finished, tmp_path, number):
    """Large ones, so that threads are at work when the process ends."""
    photograph = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    jpeg = cv2.imencode('.jpg', cv2.resize(photograph, (3000, 2250)))[1].tobytes()
    for part in ('training', 'validation'):
        (tmp_path / 'large' / part).mkdir(parents=True)
        for i in range(40):
            (tmp_path / 'large' / part / f'{i % 11}_{i}.jpg').write_bytes(jpeg)
    for arguments in (['--data-dir', 'large', '--out', 'new'],
                      ['--out', 'run', '--predict', tmp_path / 'large' / 'training']):
        done = forked(INTERRUPTER, int(number), *arguments, '--device', 'cpu')
        assert done.returncode == 130, done.output
        assert done.output.splitlines()[-1] == 'interrupted' and 'Traceback' not in done.output
    assert not (tmp_path / 'new').exists()


def test_interrupted_while_saving_for_the_first_time(small, few, monkeypatch):
    """What the line says is true."""
    command = ('--data-dir', few, '--epochs', 1, '--out', 'run', '--device', 'cpu')
    with monkeypatch.context() as patches:
        patches.setattr(os, 'fsync', lambda file: signal.raise_signal(signal.SIGINT))
        done = small.call(*command)
    assert done.returncode == 130
    assert 'nothing is saved yet' in done.stderr
    done = small.call(*command)
    assert done.returncode == 0, done.stderr


def test_a_notebooks_interrupted_cell_releases_the_lock(small, few, tmp_path, monkeypatch):
    """`error` keeps the variables of main alive."""
    monkeypatch.chdir(tmp_path)
    resume = ['--data-dir', str(few), '--epochs', '2', '--out', 'run', '--resume',
              '--device', 'cpu']
    with at_step(3, lambda: signal.raise_signal(signal.SIGINT)):
        with pytest.raises(KeyboardInterrupt) as error:
            small.train.main(resume)
    done = small.call(*resume)
    assert done.returncode == 0 and 'resumed from epoch 1 in run' in done.stderr
    assert any('optimizer' in entry.frame.f_locals for entry in error.traceback)


def test_a_system_without_locks_does_not_stop_a_run(small, copy_of_finished, monkeypatch):
    fcntl = pytest.importorskip('fcntl')

    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(fcntl, 'flock', flock)
    done = small.call('--out', 'run', '--resume', '--epochs', 4, '--device', 'cpu')
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 4, done.stderr
    assert epochs_saved(copy_of_finished) == 4


def test_a_folder_for_temporary_files_that_does_not_work(small, few, tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    monkeypatch.setattr(tempfile, 'gettempdir', lambda: str(tmp_path / 'file' / 'folder'))
    done = small.call('--data-dir', few, '--epochs', 1, '--device', 'cpu')
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 3, done.stderr


def test_no_folder_for_temporary_files(small, few, monkeypatch):
    def gettempdir():
        raise FileNotFoundError(errno.ENOENT, 'No usable temporary directory found')
    monkeypatch.setattr(tempfile, 'gettempdir', gettempdir)
    done = small.call('--data-dir', few, '--epochs', 1, '--device', 'cpu')
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 3, done.stderr


@pytest.fixture
def disk(tmp_path):
    """A small file system, in the folder `disk`."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    if sys.platform != 'linux' or os.geteuid() != 0 or subprocess.run(
            ['mount', '-t', 'tmpfs', '-o', 'size=4m', 'none', folder]).returncode:
        pytest.skip('only root on Linux can make a small file system')
    yield folder
    subprocess.run(['umount', folder], check=True)


def test_a_full_and_a_read_only_disk(small, few, disk):
    run = ('--data-dir', few, '--batch-size', 4, '--device', 'cpu', '--out', 'disk/run')
    assert small.call(*run, '--epochs', 1).returncode == 0
    files = {file: file.read_bytes() for file in disk.glob('run/*')}
    with open(disk / 'film', 'wb', buffering=0) as film:
        try:
            while film.write(bytes(1000)):
                pass
        except OSError:
            pass
    done = small.call(*run, '--resume', '--epochs', 2)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert error.startswith(f'error: cannot write {Path("disk", "run")}')
    assert f'{os.strerror(errno.ENOSPC)}; what was saved before is intact' in error
    assert {file: file.read_bytes() for file in disk.glob('run/*')} == files

    # The advice comes before the photographs are read: there are none.
    subprocess.run(['mount', '-o', 'remount,ro', disk], check=True)
    for out in ('disk/run', 'disk/another'):
        done = small.call('--out', out, '--resume', '--device', 'cpu', '--data-dir', 'nowhere')
        assert done.returncode == 1 and done.stderr.count('\n') == 1
        assert out in done.stderr and '--out' in done.stderr, done.stderr
    # The table is printed, although it cannot be written.
    done = small.call('--out', 'disk/run', '--device', 'cpu', '--predict', few / 'validation')
    assert done.returncode == 1 and done.stdout.splitlines()[-1].startswith('total')
    assert done.stderr.startswith('error: cannot write') and done.stderr.count('\n') == 1


@pytest.mark.parametrize('number', [errno.EROFS, errno.EIO])
def test_a_disk_that_turns_read_only_or_drops_meanwhile(
        small, copy_of_finished, monkeypatch, number):
    """Then the temporary file cannot be removed either. A network drive that drops cannot be read
    at all, until it is back."""
    before = (copy_of_finished / 'last.pt').read_bytes()

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    def refuse_in_run(function):
        def call(path, *arguments, **options):
            if 'run' in Path(str(path)).parts:
                refuse()
            return function(path, *arguments, **options)
        return call

    def disturb():
        patches.setattr(os, 'fsync', refuse)
        patches.setattr(os, 'unlink', refuse)
        if number == errno.EIO:
            patches.setattr(os, 'stat', refuse_in_run(os.stat))
            patches.setattr(builtins, 'open', refuse_in_run(open))

    with monkeypatch.context() as patches, at_step(2, disturb):
        done = small.call('--out', 'run', '--resume', '--epochs', 5, '--device', 'cpu')
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert error.startswith('error: cannot write') and os.strerror(number) in error
    assert 'what was saved before is intact' in error
    assert (copy_of_finished / 'last.pt').read_bytes() == before


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_state_before(
        edited, copy_of_finished):
    infinite = edited({'lr=options.lr,': "lr=float('inf'),"})
    done = infinite.call('--out', 'run', '--resume', '--epochs', 5, '--device', 'cpu')
    assert done.returncode == 1 and done.stdout.startswith('[004/005]')
    error = done.stderr.splitlines()[-1]
    assert 'the loss is not a finite number' in error and 'lower --lr' in error
    assert epochs_saved(copy_of_finished) == len(history(copy_of_finished)) == 3


def test_files_that_another_program_holds_open_do_not_end_the_run(
        small, few, tmp_path, monkeypatch):
    """What Windows answers while Excel shows history.csv, and while another program reads last.pt
    for longer than the script waits. What could not be saved is saved the next time."""
    replace, tries = os.replace, []

    def held(source, target):
        name = os.path.basename(target)
        tries.append(name)
        if name == held_file and tries.count(name) <= limit:
            raise PermissionError(errno.EACCES, 'in use')
        replace(source, target)
    monkeypatch.setattr(os, 'replace', held)
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    run = ('--data-dir', few, '--epochs', 2, '--batch-size', 4, '--device', 'cpu')
    held_file, limit = 'last.pt', 20
    done = small.call(*run, '--out', 'run')
    assert done.returncode == 0 and done.stderr.count('last.pt is in use') == 1
    assert epochs_saved(tmp_path / 'run') == 2
    # At the end it is an error, after all else is done.
    for held_file in ('last.pt', 'history.csv'):
        tries.clear()
        limit = 1000
        done = small.call(*run, '--out', held_file)
        error = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and f'{held_file} is in use' in done.stderr
        assert error.startswith('error: the end of the run is not saved completely')
        assert done.stdout.splitlines()[-1].startswith('total')
        assert (tmp_path / held_file / 'mistakes.png').exists()
        assert not (tmp_path / held_file / held_file).exists()
    for command in (['--predict', few / 'validation'], ['--dreams']):
        held_file = command[0].removeprefix('--') + '.csv'
        if command == ['--dreams']:
            held_file = 'dreams.png'
        done = small.call('--out', 'run', '--device', 'cpu', *command)
        assert done.returncode == 1 and done.stderr.count('\n') == 1
        assert done.stderr.startswith(f'error: {Path("run", held_file)} is in use')
    # As the message advises.
    limit = 0
    done = small.call('--out', 'history.csv', '--resume', '--device', 'cpu')
    assert done.returncode == 0 and len(history(tmp_path / 'history.csv')) == 2


# ---- Checkpoints that are not what they should be --------------------------------------------

class Malicious:
    def __reduce__(self):
        return os.mkdir, ('executed',)


def spoil(file, kind):
    whole = file.read_bytes()
    if kind == 'cut off':
        file.write_bytes(whole[:-1000])
    elif kind == 'empty':
        file.write_bytes(b'')
    elif kind == 'pickle':
        file.write_bytes(pickle.dumps(Malicious(), 2))
    elif kind == 'malicious':
        torch.save({'model': Malicious(), 'requirements': {}}, file)
    elif kind == 'foreign':
        torch.save({'weight': torch.zeros(3)}, file)
    elif kind == 'old version':
        requirements = {'network': 'Sequential', 'CLASSES': data.CLASSES, 'image_size': 32,
                        'test_transform': 'Compose( ToPILImage() ToTensor() )'}
        torch.save({'model': checkpoint(file.parent, file.name)['model'], 'settings': {},
                    'requirements': requirements}, file)
    elif kind == 'compression bit':
        # The part's entry in the list of contents says that it is compressed in an unknown way.
        changed = bytearray(whole)
        changed[whole.index(b'PK\1\2') + 10] ^= 8
        file.write_bytes(changed)
    else:
        # One bit in the middle of the smallest or the largest tensor.
        with zipfile.ZipFile(file) as archive:
            parts = [part for part in archive.infolist() if '/data/' in part.filename]
        part = {'small': min, 'large': max}[kind.split()[0]](parts, key=lambda part: part.file_size)
        name_length, extra_length = struct.unpack_from('<HH', whole, part.header_offset + 26)
        start = part.header_offset + 30 + name_length + extra_length
        changed = bytearray(whole)
        changed[start + part.file_size // 2] ^= 16
        file.write_bytes(changed)


@pytest.mark.parametrize('kind', ['cut off', 'empty', 'pickle', 'malicious', 'foreign',
                                  'old version', 'small bit', 'large bit', 'compression bit'])
@pytest.mark.parametrize('name', ['last.pt', 'best.pt'])
def test_a_bad_checkpoint_is_named_in_one_line_and_not_executed(
        small, copy_of_finished, few, tmp_path, kind, name):
    spoil(copy_of_finished / name, kind)
    use = ['--resume']
    if name == 'best.pt':
        use = ['--predict', few / 'validation' / '0_0.jpg']
    done = small.call('--out', 'run', '--device', 'cpu', *use)
    assert done.returncode == 1 and done.stdout == '' and done.stderr.count('\n') == 1
    assert f'{Path("run", name)} is ' in done.stderr
    assert ('incompatible' in done.stderr) == (kind in ('foreign', 'old version'))
    assert ('corrupt' in done.stderr) == (kind not in ('foreign', 'old version'))
    assert 'start a new run' in done.stderr
    assert not (tmp_path / 'executed').exists()


@POSIX
def test_a_checkpoint_that_the_system_does_not_give_is_not_called_corrupt(
        small, copy_of_finished, few):
    """A link to itself stands for a lack of permission, and for OneDrive."""
    for name, use in (('last.pt', ['--resume']),
                      ('best.pt', ['--predict', few / 'validation' / '0_0.jpg'])):
        (copy_of_finished / name).unlink()
        (copy_of_finished / name).symlink_to(name)
        done = small.call('--out', 'run', '--device', 'cpu', *use)
        assert done.returncode == 1
        reason = os.strerror(errno.ELOOP)
        assert done.stderr == f'error: cannot read {Path("run", name)}: {reason}\n'


def test_best_weights_in_the_place_of_the_last_checkpoint(small, copy_of_finished):
    """They are not enough to continue."""
    shutil.copy(copy_of_finished / 'best.pt', copy_of_finished / 'last.pt')
    done = small.call('--out', 'run', '--device', 'cpu', '--resume')
    assert done.returncode == 1 and done.stderr.count('\n') == 1
    assert f'{Path("run", "last.pt")} is incompatible' in done.stderr


# ---- A process of its own, several processes -------------------------------------------------

@LINUX
def test_the_cpu_takes_large_pages(forked, few):
    mode = Path('/sys/kernel/mm/transparent_hugepage/enabled')
    if not mode.exists() or '[madvise]' not in mode.read_text():
        pytest.skip('this system has no large pages, or gives them unasked')
    done = forked(LARGE_PAGES, '--data-dir', few, '--epochs', 1, '--device', 'cpu')
    assert done.returncode == 0
    assert int(done.output.splitlines()[-1]) > 2**15


@LINUX
def test_a_process_that_dies_ends_the_run_and_it_can_be_continued(small, few, tmp_path):
    """There are 9 images of each kind. For validation, the processes do not have equally many; for
    training, they must, and one is left out."""
    shutil.copytree(few, tmp_path / 'odd')
    for part in ('training', 'validation'):
        (tmp_path / 'odd' / part / '0_0.jpg').unlink()
    (tmp_path / 'dying.py').write_text(DYING)
    command = ('dying.py', small.folder / 'chapter2_2_train.py', '--data-dir', 'odd', '--epochs',
               4, '--batch-size', 4, '--device', 'cpu', '--out', 'two', '--resume', '--no-amp')
    done = torchrun(tmp_path, *command)
    assert done.returncode != 0 and (tmp_path / 'died').exists()
    assert 'two holds the state after epoch' in done.stderr and '[004/004]' not in done.stdout
    # Each validation image has counted once, and the batch norm is that of process 0.
    right, loss = evaluated(small, tmp_path / 'two', 'last.pt', tmp_path / 'odd', no_amp=True)
    last = checkpoint(tmp_path / 'two')
    row = last['history'][-1]
    # Of a batch of 4, each process has had 2: for its 4 images, these are 2 steps an epoch.
    assert last['optimizer']['state'][0]['step'] == 2 * len(last['history'])
    assert (row['val_acc'], row['val_loss']) == pytest.approx((right, loss), rel=1e-5)
    # The same line again, here for one process.
    done = small.call(*command[2:])
    assert done.returncode == 0 and 'resumed from epoch' in done.stderr
    assert done.stdout.count('[004/004]') == 1
    assert [row['epoch'] for row in checkpoint(tmp_path / 'two')['history']] == [1, 2, 3, 4]


# A network without batch norm, and photographs that are not augmented: then two halves of a batch
# give the same gradients as the batch. The demo with fewer dishes.
LINEAR = {**SAVED_AT_THE_END,
          'model = Classifier(class_count)':
              'model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, class_count))',
          '    transforms.RandomHorizontalFlip(),\n    transforms.RandomRotation(15),': '',
          '    transforms.RandomResizedCrop(image_size, scale=(0.35, 1)),\n'
          '    transforms.RandomHorizontalFlip(),\n': '',
          '    transforms.TrivialAugmentWide(),': '',
          # What each process would draw in an epoch.
          '        # A learning-rate schedule.':
              '        Path(f"random {rank()} {epoch}").write_text(str(torch.rand(1)))\n'
              '        # A learning-rate schedule.',
          'draw_food11(demo_dir, class': 'draw_food11(demo_dir, 2, 1, class'}


@POSIX
def test_two_processes_train_the_demo_as_one_does(edited, tmp_path):
    """11 validation images, so that one process has 6 and the other 5."""
    linear = edited({}, base=LINEAR)
    options = ('--demo', '--batch-size', 22, '--epochs', 3, '--no-amp', '--device', 'cpu',
               '--recipe', 'better')
    done = torchrun(tmp_path, linear.folder / 'chapter2_2_train.py', *options, '--out', 'two')
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('[003/003]') == 1 and 'processes 2' in done.stderr
    assert len({file.read_text() for file in tmp_path.glob('random * *')}) == 2 * 3
    one = linear.call(*options, '--out', 'one')
    assert one.returncode == 0
    for row, expected in zip(history(tmp_path / 'two'), history(tmp_path / 'one'), strict=True):
        assert list(row.values()) == pytest.approx(list(expected.values()), rel=1e-4)
    # In one process.
    done = linear.call('--device', 'cpu', '--out', 'two', '--epochs', 4, '--resume')
    assert done.returncode == 0 and done.stdout.startswith('[004/004]')


def test_batches_that_the_processes_cannot_share_are_refused(small, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'test')
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda backend: None)
    monkeypatch.setattr(torch.distributed, 'get_rank', lambda: 0)
    monkeypatch.setattr(torch.distributed, 'get_world_size', lambda: 3)
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.distributed, 'broadcast_object_list', lambda values: None)
    done = small.call('--batch-size', 4, '--device', 'cpu', '--out', 'run')
    assert done.returncode == 1
    assert '3 processes cannot share batches of 4' in done.stderr.splitlines()[-1]
    assert os.listdir(tmp_path) == []


# ---- Prediction ------------------------------------------------------------------------------

def test_predict_names_three_classes_and_writes_kaggles_table(
        small, copy_of_finished, few, tmp_path):
    folder = tmp_path / '测试'
    folder.mkdir()
    for i, name in enumerate(['0000', '0001', '0002', 'my, dinner']):
        shutil.copy(few / 'validation' / f'{i * 2}_0.jpg', folder / f'{name}.jpg')
    (folder / '0001.jpg').write_bytes(b'no photograph')
    predict = ('--out', 'run', '--device', 'cpu', '--no-amp', '--predict')
    done = small.call(*predict, folder)
    assert done.returncode == 1
    unlabelled, error = done.stderr.splitlines()
    assert unlabelled.startswith('no accuracy, because 3 of 3') and '0000.jpg' in unlabelled
    assert error.startswith(f'error: {folder / "0001.jpg"} cannot be read as an image')
    summary, = done.stdout.splitlines()
    # On Windows, patterns come as they are. Brackets in the folder's name are no pattern.
    bracketed = shutil.copytree(folder, tmp_path / '测试 [2024]')
    done = small.call(*predict, bracketed / '000[02].jpg')
    single, second = done.stdout.replace(str(bracketed), str(folder)).splitlines()
    # A name goes before a pattern.
    shutil.copy(folder / '0002.jpg', folder / '000[02].jpg')
    done = small.call(*predict, folder / '000[02].jpg', tmp_path / '测*' / '0002.*')
    assert sorted(line.split(': ')[0] for line in done.stdout.splitlines()) == sorted([
        str(folder / '000[02].jpg'), str(folder / '0002.jpg'), str(bracketed / '0002.jpg')])
    model, _ = small.train.load_model(copy_of_finished / 'best.pt', CPU)
    images = [small.data.read_image(folder / name) for name in
              ('0000.jpg', '0002.jpg', 'my, dinner.jpg')]
    x = torch.stack([small.data.test_transform(image) for image in images]) / 255
    probabilities = model.eval()(x).softmax(1).detach()
    values, labels = probabilities[0].topk(3)
    expected = [f'{data.CLASSES[label]} {value:.1%}' for value, label in zip(values, labels)]
    assert single == f'{folder / "0000.jpg"}: {", ".join(expected)}'
    assert second.startswith(f'{folder / "0002.jpg"}: ')
    assert '3 of 4 photographs' in summary and 'predict.csv' in summary
    with open(copy_of_finished / 'predict.csv', newline='', encoding='utf-8') as file:
        table = list(csv.reader(file))
    labels = [str(label) for label in probabilities.argmax(1).tolist()]
    assert table == [['Id', 'Category'], ['0000.jpg', labels[0]], ['0002.jpg', labels[1]],
                     ['my, dinner.jpg', labels[2]]]


@pytest.mark.parametrize('names, ids', [
    (['0000.jpg', '0012.jpg', '3.png'], ['0', '12', '3']),
    (['0012.jpg', '12.jpg', '12.png'], ['0012.jpg', '12.jpg', '12.png']),
    (['1.jpg', 'more/2.jpg'], ['1.jpg', 'more/2.jpg'])])
def test_each_photograph_has_an_id_of_its_own(small, copy_of_finished, few, tmp_path, names, ids):
    for name in names:
        (tmp_path / 'test' / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(few / 'validation' / '0_0.jpg', tmp_path / 'test' / name)
    done = small.call('--out', 'run', '--device', 'cpu', '--predict', 'test')
    assert done.returncode == 0, done.stderr
    with open(copy_of_finished / 'predict.csv', newline='', encoding='utf-8') as file:
        assert [row['Id'] for row in csv.DictReader(file)] == ids


@pytest.mark.parametrize('layout', ['3_17.jpg', 'class folders'])
def test_predict_on_labelled_photographs_prints_accuracy_and_precision(
        small, copy_of_finished, tmp_path, layout):
    """In folders, with a run that has classes of its own. Of the second class there is none."""
    draw_food11(tmp_path / 'food', 4, 2, class_count=3)
    classes, run, folder = data.CLASSES, copy_of_finished, tmp_path / 'food' / 'validation'
    if layout == 'class folders':
        classes, run = ['dumplings', '汤', '米饭'], tmp_path / 'own'
        for file in (tmp_path / 'food').glob('*/*.jpg'):
            label, number = file.stem.split('_')
            (file.parent / classes[int(label)]).mkdir(exist_ok=True)
            file.rename(file.parent / classes[int(label)] / f'{number}.jpg')
        done = small.call('--data-dir', 'food', '--device', 'cpu', '--epochs', 1, '--out', run)
        assert done.returncode == 0, done.stderr
        assert [line.split()[1] for line in done.stdout.splitlines()[2:5]] == classes
    for file in [*folder.glob('1_*.jpg'), *folder.glob('汤/*.jpg')]:
        file.unlink()

    done = small.call('--out', run, '--device', 'cpu', '--predict', folder)
    assert done.returncode == 0 and done.stderr == ''
    lines = done.stdout.splitlines()
    assert '4 of 4 photographs' in lines[0] and len(lines) == len(classes) + 3
    with open(run / 'predict.csv', newline='', encoding='utf-8') as table:
        predicted = [int(row['Category']) for row in csv.DictReader(table)]
    # In the order of the names.
    pairs = list(zip([0, 0, 2, 2], predicted, strict=True))
    for label, name in enumerate(classes):
        right, images = pairs.count((label, label)), [0, 0, 2, 2].count(label)
        accuracy = f'{right / images:.1%}' if images else '-'
        precision = f'{right / predicted.count(label):.1%}' if label in predicted else '-'
        assert lines[2 + label].split() == [str(label), *name.split(), str(images), str(right),
                                            accuracy, precision]
    right = sum(true == guess for true, guess in pairs)
    assert lines[-1].split() == ['total', '4', str(right), f'{right / 4:.1%}']


def test_a_run_on_the_courses_names_finds_the_labels_of_kaggles_folders(
        small, copy_of_finished, few, tmp_path):
    for label, name in enumerate(data.CLASSES):
        (tmp_path / 'evaluation' / name).mkdir(parents=True)
        if label != 3:
            shutil.copy(few / 'validation' / f'{label}_0.jpg',
                        tmp_path / 'evaluation' / name / '12.jpg')
    assert 'Noodles-Pasta' in os.listdir(tmp_path / 'evaluation')
    done = small.call('--out', 'run', '--device', 'cpu', '--predict', 'evaluation')
    expected = small.call('--out', 'run', '--device', 'cpu', '--predict', few / 'validation')
    assert done.returncode == 0 and done.stderr == ''
    # The same photographs, the same table.
    assert done.stdout.splitlines()[1:] == expected.stdout.splitlines()[1:]
    assert done.stdout.splitlines()[-1].split()[:2] == ['total', '10']
    # A date is no label.
    shutil.copy(few / 'validation' / '0_0.jpg', tmp_path / 'evaluation' / '01-05-2021.jpg')
    done = small.call('--out', 'run', '--device', 'cpu', '--predict', 'evaluation')
    assert done.returncode == 0 and '1 of 11 photographs have no label' in done.stderr


def test_predict_takes_one_folder_with_photographs(small, finished, tmp_path):
    (tmp_path / 'empty').mkdir()
    for folders, message in ((['empty'], 'no photographs in '),
                             (['gone.jpg'], 'cannot read gone.jpg'),
                             (['*.jpg'], 'cannot read *.jpg'), (['[a-'], 'cannot read [a-'),
                             (['empty', 'gone.jpg'], 'photographs, or one folder'),
                             (['empty', '.'], 'photographs, or one folder')):
        done = small.call('--out', finished[0], '--device', 'cpu', '--predict', *folders)
        assert done.returncode == 1 and message in done.stderr and done.stderr.count('\n') == 1


def test_predict_can_use_another_checkpoint(small, finished, few):
    photograph = few / 'validation' / '0_0.jpg'
    done = small.call('--out', finished[0], '--device', 'cpu', '--predict', photograph,
                      '--checkpoint', 'last.pt')
    assert done.returncode == 0 and done.stdout.startswith(str(photograph))
    done = small.call('--out', finished[0], '--device', 'cpu', '--predict', photograph,
                      '--checkpoint', 'epoch_010.pt')
    assert done.returncode == 1 and 'epoch_010.pt' in done.stderr


# ---- Dreams and pictures ---------------------------------------------------------------------

def test_a_dream_brightens_what_its_class_is_known_by_and_nothing_else():
    """For a network that tells class i by the brightness of the i-th band of 11 rows."""
    weights = torch.zeros(11, 3, 128, 128)
    for label in range(11):
        weights[label, :, 11 * label:11 * label + 11] = .01
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 128 * 128, 11, bias=False))
    model[1].weight.data = weights.flatten(1)
    images, probabilities = train.dream(model, 11, steps=60)
    assert images.shape == (11, 128, 128, 3) and images.min() >= 0 and images.max() <= 1
    for label, image in enumerate(images):
        bands = image[:121].reshape(11, -1).mean(1)
        assert bands.argmax() == label and bands[label] > .3
        # The image is shifted in a ring.
        assert all(band < .1 for i, band in enumerate(bands) if 2 < abs(i - label) < 9)
        assert probabilities[label] > .9


def test_dreams_are_drawn_with_a_runs_weights(small, copy_of_finished):
    done = small.call('--out', 'run', '--dreams', '--device', 'cpu')
    assert done.returncode == 0 and 'dreams.png' in done.stdout
    assert (copy_of_finished / 'dreams.png').stat().st_size > 10_000


def test_the_curves_mark_the_best_epoch():
    rows = [{'epoch': epoch, 'train_acc': .1 * epoch, 'train_loss': 2., 'val_acc': acc,
             'val_loss': 1.5} for epoch, acc in ((1, .2), (2, .6), (3, .4))]
    figure = train.draw_curves(rows, best_epoch=2)
    assert [axes.get_title() for axes in figure.axes] == ['accuracy', 'mean loss per image']
    for axes, value in zip(figure.axes, ('0.600', '1.500')):
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert f'best: epoch 2, {value}' in labels
    assert figure.axes[0].lines[1].get_ydata().tolist() == [.2, .6, .4]


def test_the_confusion_shows_counts_shares_and_a_class_without_images():
    counts = np.zeros((11, 11), int)
    counts[0, 0], counts[0, 9], counts[10, 10] = 3, 1, 5
    axes, = train.draw_confusion(counts, data.CLASSES).axes
    texts = {(text.get_position(), text.get_text()) for text in axes.texts}
    assert {((0, 0), '3\n75%'), ((9, 0), '1\n25%'), ((10, 10), '5\n100%'),
            ((5.0, 3), 'no images of this class')} <= texts
    assert [label.get_text() for label in axes.get_yticklabels()] == data.CLASSES
    assert '88.9%' in axes.get_title()


def test_the_confusion_of_101_classes_is_a_picture_that_can_be_opened():
    names = [f'class {i}' for i in range(101)]
    figure = train.draw_confusion(np.eye(101, dtype=int), names)
    axes, = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == names
    assert len(axes.texts) == 101 and max(figure.get_size_inches()) * figure.dpi <= 5000


def test_the_confusion_has_room_for_names_of_50_letters():
    """PlantVillage's. Each cell has room for its numbers, and no name is cut off."""
    names = [f'Tomato___Spider_mites_Two-spotted_spider_mite_{i:04d}' for i in range(15)]
    figure = train.draw_confusion(np.eye(15, dtype=int), names)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axes, = figure.axes
    assert axes.get_window_extent().width / 15 > 35  # pixels
    for label in [*axes.get_xticklabels(), *axes.get_yticklabels()]:
        box = label.get_window_extent()
        assert min(box.x0, box.y0) >= 0
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


def test_pictures_of_photographs_have_true_colours():
    blue = np.zeros((1, 128, 128, 3), np.uint8)
    blue[..., 0] = 255  # BGR
    axes, = train.draw_images(blue, ['Rice'], 2, 'heading').axes
    assert (axes.images[0].get_array() == (0, 0, 255)).all() and axes.get_title() == 'Rice'


def test_the_mistakes_are_named_and_the_most_confident_ones_come_first():
    val_x = np.zeros((4, 128, 128, 3), np.uint8)
    files = [(Path('validation', f'0_{i}.jpg'), label) for i, label in enumerate([0, 0, 4, 0])]
    probabilities = np.full((4, 11), .01)
    for i, (label, value) in enumerate([(2, .5), (3, .8), (4, .9), (5, .6)]):
        probabilities[i, label] = value
    axes = train.draw_mistakes(val_x, files, probabilities, data.CLASSES).axes
    titles = [ax.get_title().split('\n') for ax in axes if ax.get_title()]
    assert titles == [['0_1.jpg', 'Bread', 'predicted:', 'Egg 80%'],
                      ['0_3.jpg', 'Bread', 'predicted:', 'Meat 60%'],
                      ['0_0.jpg', 'Bread', 'predicted:', 'Dessert 50%']]
