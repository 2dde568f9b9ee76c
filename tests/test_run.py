"""A run's folder: what it holds, how it survives being stopped and killed, what it is used for."""
import contextlib
import csv
import errno
import io
import itertools
import json
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

import chapter2_1_data as data
import chapter2_2_train as train
from tests.conftest import Scripts
from tests.fake_food11 import draw_food11
from tests.test_train import LINE, POSIX, SAVED_AT_THE_END, at_step

CPU = torch.device('cpu')
LINUX = pytest.mark.skipif(sys.platform != 'linux', reason='/proc, and fork without dangers')
RESUME = ('--out', 'run', '--resume', '--device', 'cpu')

# Imports the scripts once, which takes seconds. Then, for each line of its input, a fork of it runs
# the code in a file: a fresh process, as far as PyTorch can tell. Prints the exit status.
FORKS = '''
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import chapter2_1_data, chapter2_2_train, matplotlib.figure
for line in sys.stdin:
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code, out, *sys.argv[1:] = line.rstrip('\\n').split('\\t')
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        signal.alarm(120)
        exec(open(code).read())
        chapter2_1_data.run_script(chapter2_2_train.main)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
'''

# Puts a system under a script that kills it while it writes a file for the n-th time: for example
# ".best.pt.tmp 1", when last.pt has been replaced.
KILLER = '''
instant = sys.argv.pop(1)
fsync, names = os.fsync, []
def fsync_or_die(file):
    name = os.path.basename(os.readlink(f'/proc/self/fd/{file}'))
    names.append(name)
    if instant == f'{name} {names.count(name)}':
        os.ftruncate(file, 1000)
        os.kill(os.getpid(), 9)
    fsync(file)
os.fsync = fsync_or_die
'''

# At the end of a script, prints how many kB of 64 MiB of new numbers are in large pages.
LARGE_PAGES = '''
import atexit, re, torch
def large_pages():
    with open('/proc/self/smaps') as file:
        return sum(map(int, re.findall('AnonHugePages: *([0-9]+)', file.read())))
def print_growth():
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


def rows_of(file):
    with open(file, newline='', encoding='utf-8') as table:
        return list(csv.DictReader(table))


def history(folder):
    """The rows of history.csv, seconds aside."""
    return [{name: float(value) for name, value in row.items() if name != 'seconds'}
            for row in rows_of(folder / 'history.csv')]


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


def assert_same_run(folder, other):
    """Do two folders hold the same run, and nothing else?"""
    assert sorted(os.listdir(folder)) == sorted(os.listdir(other))
    assert history(folder) == history(other)
    for name in ('last.pt', 'best.pt'):
        assert same(checkpoint(folder, name), checkpoint(other, name))


def evaluated(scripts, folder, name, data_dir, no_amp=False):
    """Accuracy and loss of a checkpoint's weights on all validation images, in one process."""
    model, classes = scripts.train.load_model(folder / name, CPU)
    val_x, val_y = scripts.data.readfile(data_dir / 'validation', classes)
    dtype = scripts.train.pick_precision(CPU, no_amp)
    autocast, _ = scripts.train.mixed_precision(CPU, dtype)
    probabilities = scripts.train.predict_probabilities(model, val_x, 4, autocast)
    losses = -np.log(probabilities[np.arange(len(val_y)), val_y])
    return (probabilities.argmax(1) == val_y).mean(), losses.mean()


def total(done):
    """The numbers of images and of right ones in the last line of a table."""
    word, images, right, accuracy = done.stdout.splitlines()[-1].split()
    assert word == 'total' and accuracy == f'{int(right) / int(images):.1%}'
    return int(images), int(right)


def assert_refused(done, *words):
    """Ends in one line on stderr, which holds the words, and trains and predicts nothing."""
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and done.stdout == '', done
    assert line.startswith('error: ') and all(word in line for word in words), done.stderr
    assert done.stderr.count('error: ') == 1 and 'Traceback' not in done.stderr


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
    assert total(done) == (10, round(10 * right))
    optimizer = checkpoint(folder)['optimizer']
    assert optimizer['param_groups'][0]['lr'] == .001 and optimizer['state'][0]['step'] == 9


@pytest.mark.parametrize('name, resume', [
    ('thesis.txt', []), ('last.pt', []), ('best.pt', ['--resume'])])
def test_a_folder_that_holds_files_is_left_alone(small, few, tmp_path, name, resume):
    """With --resume too, if there is nothing to resume."""
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / name).write_text('mine')
    done = small.call('--data-dir', few, '--epochs', 1, '--device', 'cpu', '--out', 'mine', *resume)
    assert_refused(done, f'{tmp_path / "mine"} already holds files, such as {name}', '--resume')
    assert os.listdir(tmp_path / 'mine') == [name]
    assert (tmp_path / 'mine' / name).read_text() == 'mine'


@pytest.mark.parametrize('arguments, word', [
    (('--data-dir', 'nowhere', '--out', 'new'), 'nowhere'),
    # Here, no folder can be made.
    (('--out', 'file/new'), 'file')])
def test_a_start_that_fails_leaves_no_folder(small, tmp_path, arguments, word):
    (tmp_path / 'file').touch()
    assert_refused(small.call('--device', 'cpu', *arguments), str(tmp_path / word))
    assert os.listdir(tmp_path) == ['file']


def test_each_run_takes_the_next_free_folder_and_home_is_home(small, few, tmp_path, monkeypatch):
    (tmp_path / 'runs' / '001').mkdir(parents=True)
    monkeypatch.setenv('HOME', str(few))
    monkeypatch.setenv('USERPROFILE', str(few))
    done = small.call('--data-dir=~', '--epochs', 1, '--device', 'cpu')
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / 'runs')) == ['001', '002']
    assert not os.listdir(tmp_path / 'runs' / '001')
    assert f'the folder of the run is {tmp_path / "runs" / "002"}' in done.stderr


# ---- Resuming --------------------------------------------------------------------------------

def test_resuming_a_finished_run_writes_its_files_anew(small, finished, copy_of_finished):
    """As after a kill between the files: some are missing, one is old."""
    for name in ('best.pt', 'confusion.png', 'curves.png', 'settings.json'):
        (copy_of_finished / name).unlink()
    (copy_of_finished / 'history.csv').write_text('epoch\n1\n')
    # Fewer epochs than it has: there is nothing to train.
    done = small.call(*RESUME, '--epochs', 2)
    assert done.returncode == 0 and '[00' not in done.stdout
    assert 'all 2 epochs are done; --epochs N trains longer' in done.stderr
    assert done.stdout.splitlines() == finished[1].stdout.splitlines()[3:]
    assert_same_run(copy_of_finished, finished[0])


def test_what_is_typed_on_resume_wins_and_the_rest_is_the_runs(small, few, copy_of_finished):
    done = small.call(*RESUME, '--epochs', 4, '--lr', '1e-5', '--no-amp')
    assert done.returncode == 0 and done.stdout.startswith('[004/004]'), done.stderr
    assert 'epochs are done' not in done.stderr
    last = checkpoint(copy_of_finished)
    assert last['options'] == {'data_dir': str(few), 'recipe': 'book', 'epochs': 4,
                               'batch_size': 4, 'lr': 1e-5, 'seed': 0, 'no_amp': True}
    group = last['optimizer']['param_groups'][0]
    assert group['lr'] == 1e-5 and last['optimizer']['state'][0]['step'] == 12
    # From now on, these are the run's.
    done = small.call(*RESUME)
    assert done.returncode == 0 and 'precision float32' in done.stderr
    settings = json.loads((copy_of_finished / 'settings.json').read_text(encoding='utf-8'))
    assert settings['lr'] == 1e-5


def test_the_best_weights_stay_until_an_epoch_is_better_on_the_photographs_there_are(
        edited, few, tmp_path):
    """A network that knows its photographs, and then has a learning rate that is much too high:
    its last weights are worse than its best ones."""
    small = edited({}, base=SAVED_AT_THE_END)
    folder, photographs, moved = tmp_path / 'run', tmp_path / 'same', tmp_path / 'moved'
    for part in ('training', 'validation'):
        shutil.copytree(few / 'training', photographs / part)
    for epochs, rate in ((12, .01), (13, .2)):
        done = small.call(*RESUME, '--data-dir', photographs, '--epochs', epochs, '--lr', rate,
                          '--batch-size', 4)
        assert done.returncode == 0 and 'best epoch is' not in done.stderr, done.stderr
    accuracies = [row['val_acc'] for row in history(folder)]
    assert accuracies[-1] < max(accuracies) == 1 and total(done) == (10, 10)
    assert evaluated(small, folder, 'best.pt', photographs)[0] == 1
    best = checkpoint(folder, 'best.pt')

    # Now all photographs have another label, and lie elsewhere.
    assert_refused(small.call(*RESUME, '--data-dir', tmp_path / 'typo'), str(tmp_path / 'typo'))
    photographs.rename(moved)
    for file in sorted(moved.glob('*/*.jpg')):
        label = int(file.stem.split('_')[0])
        file.rename(file.with_name(f'{(label + 1) % 11}_1.jpg'))
    assert_refused(small.call(*RESUME), str(photographs))
    done = small.call(*RESUME, '--data-dir', moved)
    assert done.returncode == 0, done.stderr
    assert 'of the best epoch is 0.000000 now, and was 1.000000: the photographs' in done.stderr
    assert total(done) == (10, 0) and same(checkpoint(folder, 'best.pt'), best)
    # To be better is easy now. These photographs are the run's.
    done = small.call(*RESUME, '--data-dir', moved, '--epochs', 25, '--lr', .01)
    accuracy = max(row['val_acc'] for row in history(folder)[13:])
    assert accuracy > 0 and checkpoint(folder)['best_epoch'] > 13
    assert evaluated(small, folder, 'best.pt', moved)[0] == pytest.approx(accuracy)
    assert total(done) == (10, round(10 * accuracy))


@pytest.mark.parametrize('parameters, options', [
    ('[{"params": [p]} for p in model.parameters()]', ()),
    ('model[4].parameters()', ()),
    # Equally many, of other shapes.
    ('reversed(list(model.parameters()))', ()),
    # AdamW
    ('model.parameters()', ('--recipe', 'better'))])
def test_another_optimizer_on_resume_is_refused(edited, copy_of_finished, parameters, options):
    other = edited({'Adam(model.parameters(), lr=options.lr': f'Adam({parameters}, lr=options.lr'})
    done = other.call(*RESUME, '--epochs', 4, *options)
    assert_refused(done, f'{copy_of_finished / "last.pt"} is incompatible: its optimizer')
    assert epochs_saved(copy_of_finished) == 3


def test_the_state_of_the_scaler_is_that_of_the_run(edited, copy_of_finished):
    """Only float16 has one. Here, as it is for GPUs only, float32 gets one too."""
    for scale, epochs in ((8., 4), (2., 5)):
        scripts = edited({'enabled=dtype == torch.float16': f'init_scale={scale}'})
        done = scripts.call(*RESUME, '--epochs', epochs)
        assert done.returncode == 0, done.stderr
        scaler = checkpoint(copy_of_finished)['scaler']
        assert scaler['scale'] == 8 and scaler['_growth_tracker'] == 3 * (epochs - 3)


def test_a_history_with_a_column_of_numpys_numbers_can_be_continued(edited, copy_of_finished):
    scripts = edited({"'val_acc': val_acc, ": "'val_acc': val_acc, 'f1': np.float32(0.5), "})
    for epochs in (4, 5):
        done = scripts.call(*RESUME, '--epochs', epochs)
        assert done.returncode == 0, done.stderr
    table = rows_of(copy_of_finished / 'history.csv')
    assert [row['f1'] for row in table] == ['', '', '', '0.5', '0.5']


# ---- Stopped and killed ----------------------------------------------------------------------

@LINUX
def test_killed_and_resumed_ends_as_if_never_interrupted(small, forked, finished, few, tmp_path):
    """Killed while it saves for the first time; between last.pt and the other files; while it
    saves again."""
    arguments = ('--data-dir', few, '--epochs', 3, '--batch-size', 4, *RESUME)
    out = tmp_path / 'run'
    assert forked(KILLER, '.last.pt.tmp 1', *arguments).returncode == -signal.SIGKILL
    assert os.listdir(out) == ['.last.pt.tmp']
    # That does not count, and neither does what a system leaves there.
    (out / '.DS_Store').touch()
    done = forked(KILLER, '.best.pt.tmp 1', *arguments)
    assert done.returncode == -signal.SIGKILL and 'resumed from' not in done.output
    assert epochs_saved(out) == 1 and not (out / 'best.pt').exists()
    done = forked(KILLER, '.last.pt.tmp 2', *arguments)
    assert done.returncode == -signal.SIGKILL and f'resumed from epoch 1 in {out}' in done.output
    assert epochs_saved(out) == 2 and (out / '.last.pt.tmp').stat().st_size == 1000
    done = small.call(*RESUME)
    assert done.returncode == 0 and f'resumed from epoch 2 in {out}' in done.stderr
    (out / '.DS_Store').unlink()
    assert_same_run(out, finished[0])


@POSIX
def test_a_second_run_is_refused_and_ctrl_c_says_how_to_continue(small, few, tmp_path):
    """The line can be pasted in another folder."""
    elsewhere, out = tmp_path / 'elsewhere', tmp_path / 'my run'
    elsewhere.mkdir()
    (tmp_path / 'link').symlink_to('my run')
    script = small.folder / 'chapter2_2_train.py'
    command = [sys.executable, os.path.relpath(script, elsewhere), '--data-dir', few, '--epochs',
               100_000, '--out', '../my run', '--workers', 1, '--device', 'cpu']
    with (open(tmp_path / 'errors', 'w+', encoding='utf-8') as errors,
          subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=errors,
                           cwd=elsewhere, start_new_session=True) as process):
        try:
            deadline = time.monotonic() + 60
            while not (out / 'history.csv').exists() and time.monotonic() < deadline:
                assert process.poll() is None
                time.sleep(.02)
            second = small.call('--out', 'link', '--resume', '--device', 'cpu', '--epochs', 1)
            # As a terminal does: the workers get it too.
            os.killpg(process.pid, signal.SIGINT)
            process.wait(60)
        finally:
            process.kill()
        errors.seek(0)
        said = errors.read()
    assert_refused(second, f'{tmp_path / "link"} is in use by another run')
    assert process.returncode == 130 and 'Traceback' not in said
    *_, advice, interrupted = said.splitlines()
    assert interrupted == 'interrupted' and advice.startswith('continue with: python ')
    advised = shlex.split(advice.removeprefix('continue with: python '))
    assert advised == [str(script), '--out', str(out), '--resume']
    saved = epochs_saved(out)
    done = small.call(*advised[1:], '--epochs', saved, '--device', 'cpu')
    assert done.returncode == 0 and f'resumed from epoch {saved} in {out}' in done.stderr


def test_a_second_start_does_not_disturb_a_run_that_has_not_saved_yet(small, few, tmp_path):
    """The first run is in a thread, as Gradio's, Streamlit's and tkinter's programs start it."""
    trains, go_on, out = threading.Event(), threading.Event(), tmp_path / 'run'

    def wait():
        trains.set()
        go_on.wait(60)
    arguments = ['--data-dir', str(few), '--epochs', '1', '--device', 'cpu', '--out', str(out)]
    with ThreadPoolExecutor() as threads, at_step(1, wait):
        run = threads.submit(small.train.main, arguments)
        try:
            assert trains.wait(60)
            second = small.call(*RESUME)
            left = list(out.iterdir())
        finally:
            go_on.set()
        run.result(60)
    assert_refused(second, f'{out} is in use by another run')
    assert left == [] and epochs_saved(out) == 1


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize('moment', ['reading', 'training', 'saving'])
def test_interrupted_before_anything_is_saved(
        small, food11, tmp_path, monkeypatch, moment, number):
    """To say how to continue would not be true. The next run can have the folder."""
    calls, imdecode = itertools.count(1), cv2.imdecode

    def interrupt(*_):
        signal.raise_signal(number)

    def slow_imdecode(*arguments):
        # So long that all photographs wait for a thread when the signal comes.
        time.sleep(.03)
        if next(calls) == 3:
            interrupt()
        return imdecode(*arguments)
    run = ('--data-dir', food11, '--epochs', 1, '--device', 'cpu', '--out', 'run')
    with monkeypatch.context() as patches, contextlib.ExitStack() as stack:
        # A script that left SIGTERM to the system would end the tests as well.
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, signal.SIG_IGN))
        if moment == 'reading':
            patches.setattr(cv2, 'imdecode', slow_imdecode)
        elif moment == 'training':
            stack.enter_context(at_step(1, interrupt))
        else:
            patches.setattr(os, 'fsync', interrupt)
        done = small.call(*run)
    assert done.returncode == 130 and not (tmp_path / 'run').exists()
    assert done.stderr.splitlines()[-1] == 'interrupted' and 'Traceback' not in done.stderr
    assert 'continue with' not in done.stderr
    # Of 44 photographs, only those are read to their ends that have begun.
    assert next(calls) < 30
    assert small.call(*run).returncode == 0


def fail():
    raise RuntimeError('Connection closed by peer')


@pytest.mark.parametrize('first', [lambda: signal.raise_signal(signal.SIGINT), fail])
def test_a_second_signal_does_not_lose_the_line_that_says_how_to_continue(
        small, copy_of_finished, first):
    """Two quick Ctrl-C; or torchrun's SIGTERM when another process has died."""
    class SecondSignal(io.StringIO):
        def write(self, text):
            if 'continue with' in text:
                signal.raise_signal(signal.SIGTERM)
            return super().write(text)
    stderr = SecondSignal()
    # The first step measures the best epoch again.
    with at_step(5, first):
        done = small.call(*RESUME, '--epochs', 5, stderr=stderr)
    assert done.returncode == 130
    assert f'--out "{copy_of_finished}" --resume\n' in stderr.getvalue()
    assert 'interrupted\n' in stderr.getvalue()


def test_a_notebooks_interrupted_cell_releases_the_lock(small, few, tmp_path, monkeypatch):
    """`error` keeps the variables of main alive."""
    monkeypatch.chdir(tmp_path)
    resume = ['--data-dir', str(few), '--epochs', '2', *RESUME]
    with at_step(3, lambda: signal.raise_signal(signal.SIGINT)):
        with pytest.raises(KeyboardInterrupt) as error:
            small.train.main(resume)
    done = small.call(*resume)
    assert done.returncode == 0 and 'resumed from epoch 1 in' in done.stderr
    assert any('optimizer' in entry.frame.f_locals for entry in error.traceback)


# ---- Saving ----------------------------------------------------------------------------------

def test_the_first_epoch_is_saved_then_one_a_minute_and_the_last(
        edited, few, tmp_path, monkeypatch):
    """Each epoch has one training step, which takes 25 seconds."""
    small = edited({}, base=SAVED_AT_THE_END)
    steps, saved, replace = [], [], os.replace

    def note_and_replace(source, target):
        if os.path.basename(target) == 'last.pt':
            saved.append(len(steps))
        replace(source, target)
    monkeypatch.setattr(os, 'replace', note_and_replace)
    monkeypatch.setattr(time, 'monotonic', lambda: 25 * len(steps))
    with register_optimizer_step_post_hook(lambda *_: steps.append(1)):
        done = small.call('--data-dir', few, '--epochs', 8, '--device', 'cpu', '--out', 'run')
    assert done.returncode == 0, done.stderr
    assert saved == [1, 4, 7, 8] and epochs_saved(tmp_path / 'run') == 8


@pytest.mark.parametrize('function, number', [('fsync', errno.ENOSPC), ('replace', errno.EIO)])
def test_a_saving_that_fails_is_told_and_the_next_one_makes_up_for_it(
        small, finished, few, tmp_path, monkeypatch, function, number):
    """A disk that is full for an epoch; a network drive that drops."""
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    def disturb():
        patches.setattr(os, function, refuse)
        # The temporary file cannot be removed either.
        patches.setattr(os, 'unlink', refuse)
    # An epoch has three steps for training, and three for validation.
    with monkeypatch.context() as patches, at_step(7, disturb), at_step(13, patches.undo):
        done = small.call('--data-dir', few, '--epochs', 3, '--batch-size', 4, '--device', 'cpu',
                          '--out', 'run')
    assert done.returncode == 0 and 'error: ' not in done.stderr, done.stderr
    file = tmp_path / 'run' / 'last.pt'
    assert f'cannot write {file}: {os.strerror(number)}; what was saved before' in done.stderr
    assert done.stderr.count('cannot write') == 1
    assert_same_run(tmp_path / 'run', finished[0])


def test_a_file_that_another_program_has_open(small, few, copy_of_finished, monkeypatch):
    """Windows does not allow replacing it: while a virus scanner reads last.pt, for a moment; while
    Excel shows a table, for hours."""
    held, tries, slept, replace = {'last.pt': 5}, Counter(), [], os.replace

    def replace_if_free(source, target):
        name = os.path.basename(target)
        tries[name] += 1
        if tries[name] <= held.get(name, 0):
            raise PermissionError(errno.EACCES, 'in use')
        replace(source, target)
    monkeypatch.setattr(os, 'replace', replace_if_free)
    monkeypatch.setattr(time, 'sleep', slept.append)
    done = small.call(*RESUME, '--epochs', 4)
    assert done.returncode == 0 and 'cannot write' not in done.stderr
    assert tries['last.pt'] > 5 and sum(slept) > .3

    use = ('--out', 'run', '--device', 'cpu')
    for command, name, printed in (
            ([*RESUME, '--epochs', 5], 'history.csv', '[005/005]'),
            # The accuracy is printed, although the table cannot be written.
            ([*use, '--predict', few / 'validation'], 'predict.csv', 'total'),
            ([*use, '--dreams'], 'dreams.png', '')):
        held[name] = 1000
        done = small.call(*command)
        error = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and 'Traceback' not in done.stderr and printed in done.stdout
        assert error.startswith(f'error: cannot write {copy_of_finished / name}: in use')
        assert ('continue with' in done.stderr) == (name == 'history.csv')
    assert epochs_saved(copy_of_finished) == 5 and len(history(copy_of_finished)) == 4
    assert not list(copy_of_finished.glob('.*'))
    held.clear()
    assert small.call(*RESUME).returncode == 0 and len(history(copy_of_finished)) == 5


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
        torch.save({'model': Malicious(), 'required': {}, 'optimizer_kind': 'Adam'}, file)
    elif kind == 'foreign':
        torch.save({'weight': torch.zeros(3)}, file)
    elif kind == 'compression bit':
        # The part's entry in the list of contents says that it is compressed in an unknown way.
        changed = bytearray(whole)
        changed[whole.index(b'PK\1\2') + 10] ^= 8
        file.write_bytes(changed)
    else:
        # One bit of a tensor, which is in the file as it is.
        tensor = checkpoint(file.parent, file.name)['model'][kind.removeprefix('bit of ')]
        changed = bytearray(whole)
        changed[whole.index(tensor.numpy().tobytes()) + 2] ^= 16
        file.write_bytes(changed)


@pytest.mark.parametrize('kind', ['cut off', 'empty', 'pickle', 'malicious', 'foreign',
                                  'bit of 1.weight', 'bit of 4.weight', 'compression bit'])
@pytest.mark.parametrize('name', ['last.pt', 'best.pt'])
def test_a_bad_checkpoint_is_named_and_not_executed(
        small, copy_of_finished, few, tmp_path, kind, name):
    spoil(copy_of_finished / name, kind)
    use = RESUME
    if name == 'best.pt':
        use = ('--out', 'run', '--device', 'cpu', '--predict', few / 'validation' / '0_0.jpg')
    problem = 'incompatible' if kind == 'foreign' else 'corrupt'
    done = small.call(*use)
    assert_refused(done, f'{copy_of_finished / name} is {problem}', 'start a new run')
    # Nothing can be continued.
    assert 'continue with' not in done.stderr and not (tmp_path / 'executed').exists()


@POSIX
def test_what_stands_in_for_the_last_checkpoint(small, copy_of_finished):
    """The best weights are not enough to continue. A link to itself stands for a lack of
    permission, and for OneDrive: the file is not called corrupt."""
    last = copy_of_finished / 'last.pt'
    for source, words in (('best.pt', f'{last} is incompatible'),
                          ('last.pt', f'error: {last}: {os.strerror(errno.ELOOP)}')):
        last.unlink()
        last.symlink_to(source)
        assert_refused(small.call(*RESUME), words)


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
    assert '[004/004]' not in done.stdout
    assert done.stderr.count(f'--out "{tmp_path / "two"}" --resume') == 1, done.stderr
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
              '        Path(f"random {rank} {epoch}").write_text(str(torch.rand(1)))\n'
              '        # A learning-rate schedule.',
          'draw_food11(demo_dir, class': 'draw_food11(demo_dir, 2, 1, class'}


@POSIX
def test_two_processes_train_the_demo_as_one_does(edited, tmp_path):
    """11 validation images, so that one process has 6 and the other 5. One of them speaks."""
    linear = edited({}, base=LINEAR)
    options = ('--demo', '--batch-size', 22, '--epochs', 3, '--no-amp', '--device', 'cpu',
               '--recipe', 'better')
    done = torchrun(tmp_path, linear.folder / 'chapter2_2_train.py', *options, '--out', 'two')
    assert done.returncode == 0, done.stderr
    for words in ('[003/003]', 'total'):
        assert done.stdout.count(words) == 1, done.stdout
    for words in ('processes 2', 'the folder of the run', 'photographs for training'):
        assert done.stderr.count(words) == 1, done.stderr
    assert len({file.read_text() for file in tmp_path.glob('random * *')}) == 2 * 3
    one = linear.call(*options, '--out', 'one')
    assert one.returncode == 0 and one.stdout.splitlines()[3:] == done.stdout.splitlines()[3:]
    for row, expected in zip(history(tmp_path / 'two'), history(tmp_path / 'one'), strict=True):
        assert list(row.values()) == pytest.approx(list(expected.values()), rel=1e-4)
    # In one process.
    done = linear.call('--device', 'cpu', '--out', 'two', '--epochs', 4, '--resume')
    assert done.returncode == 0 and done.stdout.startswith('[004/004]')


@pytest.mark.parametrize('started_by', ['torchrun', 'Slurm'])
def test_batches_that_the_processes_cannot_share_are_refused(
        edited, few, tmp_path, monkeypatch, started_by):
    """Slurm and MPI set two of these variables for a script that they start once on each node."""
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('WORLD_SIZE', '3')
    if started_by == 'torchrun':
        monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'test')
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda backend: None)
    monkeypatch.setattr(torch.distributed, 'broadcast_object_list', lambda values: None)
    done = edited({}).call('--data-dir', few, '--batch-size', 4, '--epochs', 1, '--device', 'cpu',
                           '--out', 'run')
    if started_by == 'torchrun':
        assert_refused(done, '3 processes cannot share batches of 4 images equally')
        assert not (tmp_path / 'run').exists()
    else:
        assert done.returncode == 0 and 'processes 1' in done.stderr


# ---- Prediction ------------------------------------------------------------------------------

def test_predict_names_three_classes_and_writes_two_tables(small, copy_of_finished, few, tmp_path):
    """One of the photographs is none: the others are predicted all the same."""
    folder = tmp_path / '测试'
    folder.mkdir()
    for i, name in enumerate(['0000', '0001', '0002', 'my, dinner']):
        shutil.copy(few / 'validation' / f'{i * 2}_0.jpg', folder / f'{name}.jpg')
    (folder / '0001.jpg').write_bytes(b'no photograph')
    predict = ('--out', 'run', '--device', 'cpu', '--no-amp', '--predict')
    done = small.call(*predict, folder)
    assert done.returncode == 1 and 'no accuracy, because 3 of 3' in done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f'error: {folder / "0001.jpg"} cannot be read as an image')
    assert '3 of 4 photographs' in done.stdout and 'predict.csv' in done.stdout
    names = ['0000.jpg', '0002.jpg', 'my, dinner.jpg']
    model, _ = small.train.load_model(copy_of_finished / 'best.pt', CPU)
    images = [small.data.read_image(folder / name) for name in names]
    x = torch.stack([small.data.test_transform(image) for image in images]) / 255
    probabilities = model.eval()(x).softmax(1).detach()
    labels = probabilities.argmax(1).tolist()
    assert rows_of(copy_of_finished / 'predict.csv') == [
        {'Id': name, 'Category': str(label)} for name, label in zip(names, labels)]
    table = rows_of(copy_of_finished / 'predict_names.csv')
    assert [(row['file'], row['class']) for row in table] == [
        (name, data.CLASSES[label]) for name, label in zip(names, labels)]
    assert [float(row['probability']) for row in table] == pytest.approx(
        probabilities.max(1).values.tolist(), abs=1e-4)

    # On Windows, patterns come as they are.
    done = small.call(*predict, folder / '000[012].jpg')
    assert done.returncode == 1 and '0001.jpg cannot be read' in done.stderr.splitlines()[-1]
    values, labels = probabilities[0].topk(3)
    expected = [f'{data.CLASSES[label]} {value:.1%}' for value, label in zip(values, labels)]
    first, second = done.stdout.splitlines()
    assert first == f'{folder / "0000.jpg"}: {", ".join(expected)}'
    assert second.startswith(f'{folder / "0002.jpg"}: ')
    shutil.copy(folder / '0002.jpg', folder / '0[a].jpg')
    done = small.call(*predict, folder / '0[a].jpg', tmp_path / '测*' / 'my*')
    assert [line.split(': ')[0] for line in done.stdout.splitlines()] == [
        str(folder / '0[a].jpg'), str(folder / 'my, dinner.jpg')]


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
    assert [row['Id'] for row in rows_of(copy_of_finished / 'predict.csv')] == ids
    assert [row['file'] for row in rows_of(copy_of_finished / 'predict_names.csv')] == names


@pytest.fixture(scope='module')
def own_classes(small_folder, tmp_path_factory):
    """A run on a folder for each of three classes, where names decide what is for validation; and
    what it printed."""
    folder = tmp_path_factory.mktemp('own')
    draw_food11(folder / 'drawn', 12, 1, class_count=3)
    for label, name in enumerate(['dumplings', '汤', '米饭']):
        (folder / 'photos' / name).mkdir(parents=True)
        for i in range(12):
            shutil.copy(folder / 'drawn' / 'training' / f'{label}_{i}.jpg',
                        folder / 'photos' / name / f'{i}.jpg')
    done = Scripts(small_folder, folder).call('--data-dir', 'photos', '--epochs', 2, '--device',
                                              'cpu', '--out', 'run')
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.mark.parametrize('layout', ['3_17.jpg', 'own classes', "Kaggle's folders"])
def test_predict_on_labelled_photographs_prints_accuracy_and_precision(
        small, finished, own_classes, few, tmp_path, layout):
    """Of the second class there is none."""
    run, classes = shutil.copytree(finished[0], tmp_path / 'run'), data.CLASSES
    if layout == 'own classes':
        run, classes = own_classes[0] / 'run', ['dumplings', '汤', '米饭']
    draw_food11(tmp_path / 'food', 0, 2, class_count=3)
    folder = tmp_path / 'food' / 'validation'
    for file in sorted(folder.iterdir()):
        label, number = file.stem.split('_')
        if label == '1':
            file.unlink()
        elif layout != '3_17.jpg':
            (folder / classes[int(label)]).mkdir(exist_ok=True)
            file.rename(folder / classes[int(label)] / f'{number}.jpg')
    done = small.call('--out', run, '--device', 'cpu', '--predict', folder)
    assert done.returncode == 0 and done.stderr == ''
    lines = done.stdout.splitlines()
    assert '4 of 4 photographs' in lines[0] and len(lines) == len(classes) + 3
    assert lines[1].startswith('labels from the names')
    predicted = [int(row['Category']) for row in rows_of(run / 'predict.csv')]
    true = [0, 0, 2, 2]
    pairs = list(zip(true, predicted, strict=True))
    for label, name in enumerate(classes):
        right, images = pairs.count((label, label)), true.count(label)
        accuracy = f'{right / images:.1%}' if images else '-'
        precision = f'{right / predicted.count(label):.1%}' if label in predicted else '-'
        assert lines[2 + label].split() == [str(label), *name.split(), str(images), str(right),
                                            accuracy, precision]
    assert total(done) == (4, sum(label == guess for label, guess in pairs))


@pytest.mark.parametrize('part', ['photos', 'a link'])
def test_photographs_that_have_trained_the_network_do_not_count(small, own_classes, tmp_path, part):
    """So the accuracy is that which the run has printed at its end."""
    folder, trained = own_classes
    predicted = folder / 'photos'
    if part == 'a link':
        predicted = tmp_path / 'link'
        try:
            predicted.symlink_to(folder / 'photos')
        except OSError:
            pytest.skip('this system makes no links')
    done = small.call('--out', folder / 'run', '--device', 'cpu', '--predict', predicted)
    images, right = total(done)
    assert done.returncode == 0 and (images, right) == total(trained) and 0 < images < 36
    assert f'{36 - images} of them have trained the network' in done.stdout
    assert 'for validation only' in done.stdout
    # Chinese names are written as they are.
    assert '"米饭"' in (folder / 'run' / 'settings.json').read_text(encoding='utf-8')
    # They are predicted all the same.
    assert len(rows_of(folder / 'run' / 'predict.csv')) == 36


def test_an_accuracy_is_only_printed_for_validations_part(small, finished, few, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / 'run')
    predict = ('--out', 'run', '--device', 'cpu', '--predict')
    done = small.call(*predict, few / 'validation')
    assert done.returncode == 0 and total(done) == total(finished[1])
    assert 'for validation only' not in done.stdout
    done = small.call(*predict, few / 'training')
    assert done.returncode == 0 and 'total' not in done.stdout
    assert 'all these photographs have trained the network' in done.stderr
    assert len(rows_of(run / 'predict.csv')) == 10


def test_mistakes_in_the_use_of_a_run(small, copy_of_finished, few, tmp_path):
    """--checkpoint goes without the best weights; the rest does not."""
    (tmp_path / 'empty').mkdir()
    photograph = few / 'validation' / '0_0.jpg'
    (copy_of_finished / 'best.pt').rename(copy_of_finished / 'other.pt')
    use = ('--out', 'run', '--device', 'cpu')
    assert_refused(small.call(*use, '--dreams'), f'{copy_of_finished / "best.pt"}: ')
    for arguments, words in ((['--predict', 'empty'], 'no photographs in '),
                             (['--predict', photograph, 'gone.jpg'], 'gone.jpg: '),
                             (['--predict', '*.jpg'], '*.jpg: '), (['--predict', '[a-'], '[a-: '),
                             (['--predict', 'empty', '.'], 'photographs, or one folder'),
                             (['--features', 'gone.jpg'], 'gone.jpg: '),
                             # The small network has another structure.
                             (['--features', photograph], '`convolution`')):
        assert_refused(small.call(*use, '--checkpoint', 'other.pt', *arguments), words)
    done = small.call(*use, '--checkpoint', 'other.pt', '--predict', photograph)
    assert done.returncode == 0 and done.stdout.startswith(str(photograph))


@pytest.mark.parametrize('options, dtype', [((), torch.bfloat16), (['--no-amp'], torch.float32)])
def test_predict_computes_with_16_bits_where_training_does(
        small, copy_of_finished, few, monkeypatch, options, dtype):
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: True, raising=False)
    seen = set()

    def note_type(module, inputs, output):
        if isinstance(module, nn.Linear):
            seen.add(output.dtype)
    with register_module_forward_hook(note_type):
        done = small.call('--out', 'run', '--device', 'cpu', *options, '--predict',
                          few / 'validation')
    assert done.returncode == 0 and seen == {dtype}, done.stderr


def memory(name):
    """What Linux says of this process under a name such as VmRSS, in KiB."""
    return int(Path('/proc/self/status').read_text().split(f'{name}:')[1].split()[0])


@LINUX
def test_a_photograph_takes_no_more_memory_than_its_pixels(edited, few, copy_of_finished, tmp_path):
    """48 KiB. A network for images of the book's size that needs no memory itself."""
    scripts = edited({'image_size = 128': 'image_size = 128', 'model = Classifier(class_count)':
                      'model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), '
                      'nn.Linear(3, class_count))'})
    options = ('--device', 'cpu', '--batch-size', 4, '--out', 'own')
    assert scripts.call(*options, '--data-dir', few, '--epochs', 1).returncode == 0
    for folder, count in (('one', 1), ('many', 1500)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            os.link(few / 'validation' / '0_0.jpg', tmp_path / folder / f'{i}.jpg')
        try:
            # From now on, the highest value is noted anew.
            Path('/proc/self/clear_refs').write_text('5')
        except OSError:
            pytest.skip('this system does not say how much memory a process has taken')
        before = memory('VmRSS')
        done = scripts.call(*options, '--predict', folder)
        assert done.returncode == 0 and f'{count} of {count} photographs' in done.stdout
    assert 40 < (memory('VmHWM') - before) / 1500 < 60


# ---- Dreams and pictures ---------------------------------------------------------------------

def test_a_dream_brightens_what_its_class_is_known_by_and_nothing_else():
    """For a network that tells class i by the brightness of the i-th band of 11 rows."""
    weights = torch.zeros(11, 3, 128, 128)
    for label in range(11):
        weights[label, :, 11 * label:11 * label + 11] = .01
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 128 * 128, 11))
    model[1].weight.data = weights.flatten(1)
    model[1].bias.requires_grad_(False).zero_()
    images, probabilities = train.dream(model, 11, steps=60)
    assert images.shape == (11, 128, 128, 3) and images.min() >= 0 and images.max() <= 1
    for label, image in enumerate(images):
        bands = image[:121].reshape(11, -1).mean(1)
        assert bands.argmax() == label and bands[label] > .3
        # The image is shifted in a ring.
        assert all(band < .1 for i, band in enumerate(bands) if 2 < abs(i - label) < 9)
        assert probabilities[label] > .9
    # The network learns as before, when it is trained on.
    assert model[1].weight.requires_grad and not model[1].bias.requires_grad
    assert model[1].weight.grad is None


def test_dreams_come_out_the_same_and_show_shapes_wherever_they_are():
    """A network that looks at four by four pixels. As the image is shifted, many get bright."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 128 * 128, 2, bias=False))
    model[1].weight.data.zero_()
    model[1].weight.data[0].view(3, 128, 128)[:, 64:68, 64:68] = 1
    (image, _), (again, _) = (train.dream(model, 2, steps=40)[0] for _ in range(2))
    for pixels in np.nonzero(image.mean(2) > .1):
        assert np.ptp(pixels) > 12
    assert (image == again).all()


def test_dreams_are_drawn_with_a_runs_weights_in_their_colours(small, copy_of_finished):
    """Class 0 is known by blue, class 1 by green, class 2 by red."""
    best = checkpoint(copy_of_finished, 'best.pt')
    model = best['model']
    for tensor in model.values():
        tensor.zero_()
    model['1.weight'] += 1
    model['1.running_var'] += 1
    for channel in range(3):
        model['0.weight'][channel, channel] = 1 / 64
        model['4.weight'][channel, 16 * channel:16 * channel + 16] = 1
    torch.save(best, copy_of_finished / 'best.pt')
    done = small.call('--out', 'run', '--dreams', '--device', 'cpu')
    assert done.returncode == 0 and str(copy_of_finished / 'dreams.png') in done.stdout
    picture = cv2.imread(str(copy_of_finished / 'dreams.png')).astype(int)
    columns = []
    for channel in range(3):
        others = np.delete(picture, channel, 2).max(2)
        columns.append(np.nonzero(picture[..., channel] > others + 100)[1].mean())
    assert columns == sorted(columns)


def test_the_curves_mark_the_best_epoch():
    rows = [{'epoch': epoch, 'train_acc': .1 * epoch, 'train_loss': 2., 'val_acc': acc,
             'val_loss': 1.5} for epoch, acc in ((1, .2), (2, .6), (3, .4))]
    figure = train.draw_curves(rows, best_epoch=2)
    assert [axes.get_title() for axes in figure.axes] == ['accuracy', 'mean loss per image']
    for axes, value in zip(figure.axes, ('0.600', '1.500')):
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert f'best: epoch 2, {value}' in labels and len(set(labels)) == 3
        # Nothing lies outside the frame.
        assert axes.get_ylim()[0] == 0
        assert axes.get_ylim()[1] >= max(line.get_ydata().max() for line in axes.lines[:2])
    training, validation, *_ = figure.axes[0].lines
    assert training.get_label().startswith('training') and validation.get_label() == 'validation'
    assert training.get_ydata() == pytest.approx([.1, .2, .3])
    assert validation.get_ydata().tolist() == [.2, .6, .4]


def test_the_confusion_shows_counts_and_shares_of_the_true_class():
    """Of the other classes there are no images."""
    labels = np.array([0, 0, 0, 0, 10, 10, 10, 10, 10])
    predicted = np.eye(11)[[0, 0, 0, 9, 10, 10, 10, 10, 10]]
    figure = train.draw_confusion(train.count_predictions(labels, predicted), data.CLASSES)
    axes, = figure.axes
    # Of a position, x is first.
    assert {(text.get_position(), text.get_text()) for text in axes.texts} == {
        ((0, 0), '3\n75%'), ((9, 0), '1\n25%'), ((10, 10), '5\n100%')}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ('predicted', 'true')
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in ticks] == data.CLASSES
    assert '88.9%' in axes.get_title()
    assert axes.images[0].get_array()[0].tolist() == [.75] + [0] * 8 + [.25, 0]


@pytest.mark.parametrize('count, texts', [(40, 40), (41, 0), (101, 0)])
def test_the_confusion_of_many_classes_has_only_colours(count, texts):
    figure = train.draw_confusion(np.eye(count, dtype=int), [f'class {i}' for i in range(count)])
    axes, = figure.axes
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert len(axes.texts) == texts and ('class 1' in ticks) == (texts > 0)
    assert max(figure.get_size_inches()) * figure.dpi <= 5000


def test_the_confusion_has_room_for_names_of_50_letters():
    """PlantVillage's. Each cell has room for its numbers, and no name is cut off."""
    names = [f'Tomato___Spider_mites_Two-spotted_spider_mite_{i:04d}' for i in range(15)]
    figure = train.draw_confusion(np.eye(15, dtype=int), names)
    FigureCanvasAgg(figure).draw()
    axes, = figure.axes
    assert axes.get_window_extent().width / 15 > 35  # pixels
    for label in [*axes.get_xticklabels(), *axes.get_yticklabels()]:
        box = label.get_window_extent()
        assert min(box.x0, box.y0) >= 0
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


def draw_mistakes(files, predictions, classes=data.CLASSES):
    """The figure for blue photographs. files: pairs (name, label). predictions: for each file, a
    label and its probability."""
    val_x = np.zeros((len(files), 128, 128, 3), np.uint8)
    val_x[..., 0] = 255  # BGR
    probabilities = np.full((len(files), len(classes)), .01)
    for i, (label, value) in enumerate(predictions):
        probabilities[i, label] = value
    return train.draw_mistakes(val_x, [(Path(name), label) for name, label in files],
                               probabilities, classes)


def test_the_mistakes_are_named_and_the_most_confident_ones_come_first():
    figure = draw_mistakes([(f'0_{i}.jpg', label) for i, label in enumerate([0, 0, 4, 0])],
                           [(2, .5), (3, .8), (4, .9), (5, .6)])
    titles = [axes.get_title().split('\n') for axes in figure.axes]
    assert titles == [['0_1.jpg', 'Bread', 'predicted:', 'Egg 80%'],
                      ['0_3.jpg', 'Bread', 'predicted:', 'Meat 60%'],
                      ['0_0.jpg', 'Bread', 'predicted:', 'Dessert 50%']]
    assert (figure.axes[0].images[0].get_array() == (0, 0, 255)).all()


@pytest.mark.parametrize('name, classes', [
    ('IMG-20230101-WA00{}.jpg', data.CLASSES),
    ('0a1b2c3d-4e5f-6789-abcd-ef0123456789___RS_HL {}.JPG',
     ['Tomato___Spider_mites_Two-spotted_spider_mite', 'Corn_(maize)___Northern_Leaf_Blight'])])
def test_long_names_of_mistakes_cover_nothing(name, classes):
    """WhatsApp's and PlantVillage's. There are 24 mistakes, in three rows."""
    figure = draw_mistakes([(name.format(10 + i), 0) for i in range(30)], [(1, .5)] * 30, classes)
    FigureCanvasAgg(figure).draw()
    assert len(figure.axes) == 24
    boxes = [axes.title.get_window_extent() for axes in figure.axes]
    boxes += [axes.images[0].get_window_extent() for axes in figure.axes]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)


@pytest.mark.parametrize('label, heading', [(1, 'the most confident mistakes'),
                                            (0, 'no mistakes')])
def test_one_mistake_or_none_is_a_small_picture(label, heading):
    figure = draw_mistakes([('0_0.jpg', 0)], [(label, .5)])
    FigureCanvasAgg(figure).draw()
    assert max(figure.get_size_inches()) < 4
    title = figure.get_suptitle().replace('\n', ' ')
    assert title.startswith(heading)
    # It is readable.
    box = figure._suptitle.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
