"""A run's folder: what it holds, how it survives being stopped and killed, what it is used for."""
import csv
import errno
import io
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

import chapter2_1_data as data
import chapter2_2_train as train
from tests.test_data import link
from tests.test_train import LINE, POSIX, SAVED_AT_THE_END, at_step

CPU = torch.device('cpu')
LINUX = pytest.mark.skipif(sys.platform != 'linux', reason='/proc, fork and torchrun')
USE = ('--out', 'run', '--device', 'cpu')
RESUME = (*USE, '--resume')

# Starts a run three times, in forks, and kills it while it writes a file: while it saves, between
# last.pt and the other files, and while it saves again. Copies the run's folder each time.
KILLED = ('.last.pt.tmp 1', '.best.pt.tmp 1', '.last.pt.tmp 2')
KILLER = f'''
import os, shutil, signal, sys
import chapter2_1_data as data, chapter2_2_train as train, matplotlib.figure
names = []
def fsync_or_die(file):
    name = os.path.basename(os.readlink(f'/proc/self/fd/{{file}}'))
    names.append(name)
    if instant == f'{{name}} {{names.count(name)}}':
        os.ftruncate(file, 1000)
        os.kill(os.getpid(), signal.SIGKILL)
for instant in {KILLED}:
    if os.fork() == 0:
        signal.alarm(60)
        os.fsync = fsync_or_die
        sys.exit(data.run_script(train.main))
    os.wait()
    shutil.copytree('run', instant)
'''

# In each epoch, a process writes down on what it trains, and what it would draw. Process 1 dies in
# the third one, but only once: process 0 has saved the first epoch then.
EACH_EPOCH = '''
        np.save(f'share {rank}', train_x)
        Path(f'random {rank} {epoch}').write_text(str(torch.rand(1)))
        if rank == 1 and epoch == 3 and not Path('died').exists():
            Path('died').touch()
            os.kill(os.getpid(), 9)
'''


def torchrun(folder, *command):
    """Starts two processes that train together. Ends them if they wait for each other."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node',
               '2', *map(str, command)]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          encoding='utf-8') as process:
        try:
            out, err = process.communicate(timeout=90)
        finally:
            process.terminate()  # if torchrun has not ended, it ends the others
    return process.returncode, out, err


def rows_of(file):
    with open(file, newline='', encoding='utf-8-sig') as table:
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


@pytest.mark.parametrize('name, resume', [('a.txt', []), ('last.pt', []), ('a.pt', ['--resume'])])
def test_a_folder_that_holds_files_is_left_alone(small, few, tmp_path, name, resume):
    """With --resume too, if there is nothing to resume."""
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / name).write_text('mine')
    done = small.call('--data-dir', few, '--epochs', 1, *USE, *resume)
    assert_refused(done, f'{tmp_path / "run"} already holds files, such as {name}', '--resume')
    assert os.listdir(tmp_path / 'run') == [name]
    assert (tmp_path / 'run' / name).read_text() == 'mine'


# ---- Resuming --------------------------------------------------------------------------------

def test_what_is_typed_on_resume_wins_and_the_rest_is_the_runs(
        small, few, copy_of_finished, tmp_path):
    done = small.call(*RESUME, '--epochs', 4, '--lr', '1e-5', '--no-amp')
    assert done.returncode == 0 and done.stdout.startswith('[004/004]'), done.stderr
    assert 'epochs are done' not in done.stderr
    last = checkpoint(copy_of_finished)
    assert last['options'] == {'data_dir': str(few), 'recipe': 'book', 'epochs': 4,
                               'batch_size': 4, 'lr': 1e-5, 'seed': 0, 'no_amp': True}
    group = last['optimizer']['param_groups'][0]
    assert group['lr'] == 1e-5 and last['optimizer']['state'][0]['step'] == 12

    # From now on, these are the run's. Files that are missing or old, as after a kill between them,
    # are written anew, even if there is nothing to train.
    whole = shutil.copytree(copy_of_finished, tmp_path / 'whole')
    for name in ('best.pt', 'confusion.png', 'curves.png', 'settings.json'):
        (copy_of_finished / name).unlink()
    (copy_of_finished / 'history.csv').write_text('epoch\n1\n')
    again = small.call(*RESUME, '--epochs', 2)
    assert again.returncode == 0 and 'precision float32' in again.stderr
    assert 'all 2 epochs are done; --epochs N trains longer' in again.stderr
    assert again.stdout.splitlines() == done.stdout.splitlines()[1:]
    assert_same_run(copy_of_finished, whole)


def test_the_best_weights_stay_until_an_epoch_is_better(edited, few, tmp_path):
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
    best = checkpoint(folder, 'best.pt')

    # Now all photographs have another label, and lie elsewhere.
    photographs.rename(moved)
    for file in sorted(moved.glob('*/*.jpg')):
        label = int(file.stem.split('_')[0])
        file.rename(file.with_name(f'{(label + 1) % 11}_1.jpg'))
    assert_refused(small.call(*RESUME), str(photographs))
    done = small.call(*RESUME, '--data-dir', moved)
    assert 'of the best epoch is 0.000000 now, and was 1.000000: ' in done.stderr
    assert total(done) == (10, 0) and same(checkpoint(folder, 'best.pt'), best)
    # To be better is easy now.
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
    ('model.parameters()', ('--recipe', 'better'))])
def test_another_optimizer_on_resume_is_refused(edited, copy_of_finished, parameters, options):
    other = edited({'Adam(model.parameters(), lr=options.lr': f'Adam({parameters}, lr=options.lr'})
    done = other.call(*RESUME, '--epochs', 4, *options)
    assert_refused(done, f'{copy_of_finished / "last.pt"} is incompatible: its optimizer')
    assert epochs_saved(copy_of_finished) == 3


def test_a_new_column_of_numpys_numbers_and_the_state_of_the_scaler(edited, copy_of_finished):
    """Only float16 has such a state. Here, as it is for GPUs only, float32 gets one too."""
    for epochs, scale in ((4, 8.), (5, 2.)):
        scripts = edited({"'val_acc': val_acc, ": "'val_acc': val_acc, 'f1': np.float32(0.5), ",
                          'enabled=dtype == torch.float16': f'init_scale={scale}'})
        done = scripts.call(*RESUME, '--epochs', epochs)
        assert done.returncode == 0, done.stderr
    scaler = checkpoint(copy_of_finished)['scaler']
    assert scaler['scale'] == 8 and scaler['_growth_tracker'] == 6
    table = rows_of(copy_of_finished / 'history.csv')
    assert [row['f1'] for row in table] == ['', '', '', '0.5', '0.5']


# ---- Stopped and killed ----------------------------------------------------------------------

@LINUX
def test_killed_and_resumed_ends_as_if_never_interrupted(small, finished, few, tmp_path):
    out = tmp_path / 'run'
    out.mkdir()
    # What a system leaves there does not count, nor does an incomplete file.
    (out / '.DS_Store').touch()
    done = subprocess.run([sys.executable, '-c', KILLER, '--data-dir', few, '--epochs', '3',
                           '--batch-size', '4', *RESUME], cwd=tmp_path, timeout=200,
                          env={**os.environ, 'PYTHONPATH': str(small.folder)}, encoding='utf-8',
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    first, second, third = (tmp_path / instant for instant in KILLED)
    assert sorted(os.listdir(first)) == ['.DS_Store', '.last.pt.tmp'], done.stderr
    assert epochs_saved(second) == 1 and not (second / 'best.pt').exists()
    assert epochs_saved(third) == 2 and (third / '.last.pt.tmp').stat().st_size == 1000
    assert done.stderr.count('resumed from') == 1 == done.stderr.count(f'epoch 1 in {out}')
    done = small.call(*RESUME)
    assert done.returncode == 0 and f'resumed from epoch 2 in {out}' in done.stderr
    (out / '.DS_Store').unlink()
    assert_same_run(out, finished[0])


@POSIX
def test_a_second_run_is_refused_and_ctrl_c_says_how_to_continue(small, few, tmp_path):
    """The first run has not saved anything yet. The line can be pasted in another folder."""
    elsewhere, out, errors = tmp_path / 'elsewhere', tmp_path / 'my run', tmp_path / 'errors'
    elsewhere.mkdir()
    (tmp_path / 'link').symlink_to('my run')
    script = small.folder / 'chapter2_2_train.py'
    command = [sys.executable, os.path.relpath(script, elsewhere), '--data-dir', few, '--epochs',
               '100000', '--out', '../my run', '--workers', '1', '--device', 'cpu']

    def wait_for(condition):
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(.01)
    with (open(errors, 'w') as file,
          subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, cwd=elsewhere,
                           start_new_session=True) as process):
        try:
            wait_for(lambda: 'the folder of the run is' in errors.read_text())
            for name in ('my run', 'link'):
                second = small.call('--out', name, '--resume', '--device', 'cpu')
                assert_refused(second, f'{tmp_path / name} is in use by another run')
            wait_for((out / 'history.csv').exists)
            # As a terminal does: the workers get it too.
            os.killpg(process.pid, signal.SIGINT)
            process.wait(60)
        finally:
            process.kill()
    *said, advice, interrupted = errors.read_text().splitlines()
    assert process.returncode == 130 and interrupted == 'interrupted', said
    advised = shlex.split(advice.removeprefix('continue with: python '))
    assert advised == [str(script), '--out', str(out), '--resume']
    saved = epochs_saved(out)
    done = small.call(*advised[1:], '--epochs', saved, '--device', 'cpu')
    assert done.returncode == 0 and f'resumed from epoch {saved} in {out}' in done.stderr


@pytest.mark.parametrize('step', [1, 9], ids=['training', 'saving'])
def test_interrupted_before_anything_is_saved(small, few, tmp_path, monkeypatch, step):
    """To say how to continue would not be true. The next run can have the folder."""
    def interrupt(*_):
        signal.raise_signal(signal.SIGINT)
    run = ('--data-dir', few, '--epochs', 1, *USE)
    with monkeypatch.context() as patches, at_step(step, interrupt):
        patches.setattr(os, 'fsync', interrupt)
        done = small.call(*run)
    assert done.returncode == 130 and not (tmp_path / 'run').exists()
    assert done.stderr.splitlines()[-1] == 'interrupted' and 'continue with' not in done.stderr
    assert small.call(*run).returncode == 0


def test_a_second_signal_does_not_lose_the_line_that_says_how_to_continue(small, copy_of_finished):
    """Two quick Ctrl-C; or torchrun's SIGTERM when another process has died."""
    class SecondSignal(io.StringIO):
        def write(self, text):
            if 'continue with' in text:
                signal.raise_signal(signal.SIGTERM)
            return super().write(text)
    stderr = SecondSignal()
    with at_step(5, lambda: signal.raise_signal(signal.SIGINT)):
        done = small.call(*RESUME, '--epochs', 5, stderr=stderr)
    assert done.returncode == 130
    assert f'--out "{copy_of_finished}" --resume\n' in stderr.getvalue()
    assert 'interrupted\n' in stderr.getvalue()


# ---- Saving ----------------------------------------------------------------------------------

def test_the_first_epoch_is_saved_then_one_a_minute(edited, few, tmp_path, monkeypatch):
    """And the last, in the next free folder. An epoch has one training step of 25 seconds."""
    steps, saved, replace = [], [], os.replace

    def note_and_replace(source, target):
        if os.path.basename(target) == 'last.pt':
            saved.append(len(steps))
        replace(source, target)
    (tmp_path / 'runs' / '001').mkdir(parents=True)
    monkeypatch.setattr(os, 'replace', note_and_replace)
    monkeypatch.setattr(time, 'monotonic', lambda: 25 * len(steps))
    with register_optimizer_step_post_hook(lambda *_: steps.append(1)):
        done = edited({}, base=SAVED_AT_THE_END).call('--data-dir', few, '--epochs', 8,
                                                      '--device', 'cpu')
    assert done.returncode == 0 and f'the run is {tmp_path / "runs" / "002"}' in done.stderr
    assert saved == [1, 4, 7, 8] and epochs_saved(tmp_path / 'runs' / '002') == 8
    assert not os.listdir(tmp_path / 'runs' / '001')


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
        done = small.call('--data-dir', few, '--epochs', 3, '--batch-size', 4, *USE)
    assert done.returncode == 0 and 'error: ' not in done.stderr, done.stderr
    file = tmp_path / 'run' / 'last.pt'
    assert f'cannot write {file}: {os.strerror(number)}; what was saved before' in done.stderr
    assert done.stderr.count('cannot write') == 1
    assert_same_run(tmp_path / 'run', finished[0])


def test_a_file_that_another_program_has_open(small, few, copy_of_finished, monkeypatch):
    """Windows does not allow replacing it: while a virus scanner reads last.pt, for a moment; while
    Excel shows a table, for hours."""
    held, slept, replace = {'last.pt': 5}, [], os.replace

    def replace_if_free(source, target):
        name = os.path.basename(target)
        if held.get(name):
            held[name] -= 1
            raise PermissionError(errno.EACCES, 'in use')
        replace(source, target)
    monkeypatch.setattr(os, 'replace', replace_if_free)
    monkeypatch.setattr(time, 'sleep', slept.append)
    done = small.call(*RESUME, '--epochs', 4)
    assert done.returncode == 0 and 'cannot write' not in done.stderr and sum(slept) > .3
    for command, name in (([*RESUME, '--epochs', 5], 'history.csv'),
                          ([*USE, '--predict', few / 'validation'], 'predict.csv')):
        held[name] = 1000
        done = small.call(*command)
        assert done.returncode == 1
        assert f'error: cannot write {copy_of_finished / name}: in use' in done.stderr
        assert ('continue with' in done.stderr) == (name == 'history.csv')
    assert epochs_saved(copy_of_finished) == 5 and len(history(copy_of_finished)) == 4
    assert not list(copy_of_finished.glob('.*'))


class Malicious:
    def __reduce__(self):
        return os.mkdir, ('executed',)


@pytest.mark.parametrize('kind', ['cut off', 'malicious', 'foreign', 'a bit of a weight'])
@pytest.mark.parametrize('name', ['last.pt', 'best.pt'])
def test_a_bad_checkpoint_is_named_and_not_executed(
        small, copy_of_finished, few, tmp_path, kind, name):
    file, problem = copy_of_finished / name, 'corrupt'
    if kind == 'cut off':
        file.write_bytes(file.read_bytes()[:-1000])
    elif kind == 'malicious':
        torch.save({'model': Malicious(), 'required': {}, 'optimizer_kind': 'Adam'}, file)
    elif kind == 'foreign':
        torch.save({'required': {}}, file)  # something is missing in both
        problem = 'incompatible'
    else:
        changed = bytearray(file.read_bytes())
        weights = checkpoint(copy_of_finished, name)['model']['4.weight']
        changed[changed.index(weights.numpy().tobytes()) + 2] ^= 16
        file.write_bytes(changed)
    predict = ('--predict', few / 'validation' / '0_0.jpg')
    done = small.call(*USE, *(['--resume'] if name == 'last.pt' else predict))
    assert_refused(done, f'{file} is {problem}', 'start a new run')
    assert not (tmp_path / 'executed').exists()


# ---- Several processes -----------------------------------------------------------------------

@LINUX
def test_two_processes_train_together_and_one_that_dies_ends_the_run(edited, tmp_path):
    """The demo has an odd number of photographs here, so one is not trained on, and one process has
    a photograph more for validation. The same line starts the run and continues it."""
    schedule = '        # A learning-rate schedule.'
    small = edited({'draw_food11(demo_dir, class': 'draw_food11(demo_dir, 1, 1, class',
                    schedule: EACH_EPOCH + schedule})
    command = (small.folder / 'chapter2_2_train.py', '--demo', '--epochs', 4, '--batch-size', 4,
               '--no-amp', *RESUME)
    code, out, err = torchrun(tmp_path, *command)
    assert code != 0 and '[004/004]' not in out
    assert err.count(f'--out "{tmp_path / "run"}" --resume') == 1, err
    code, out, err = torchrun(tmp_path, *command)
    assert code == 0, err
    # One of them speaks.
    assert out.count('[004/004]') == out.count('total') == 1, out
    for words in ('processes 2', 'the folder of the run', 'resumed from'):
        assert err.count(words) == 1, err
    last = checkpoint(tmp_path / 'run')
    assert [row['epoch'] for row in last['history']] == [1, 2, 3, 4]
    # Each validation image has counted once, and the batch norm is that of process 0.
    right, loss = evaluated(small, tmp_path / 'run', 'last.pt', tmp_path / 'food-11-demo',
                            no_amp=True)
    row = last['history'][-1]
    assert (row['val_acc'], row['val_loss']) == pytest.approx((right, loss), rel=1e-5)
    # Of a batch of 4, each process has had 2: for its 5 photographs, these are 3 steps an epoch.
    assert last['optimizer']['state'][0]['step'] == 3 * 4
    shares = [np.load(tmp_path / f'share {rank}.npy') for rank in (0, 1)]
    assert len(shares[0]) == 5 and len(np.unique(np.concatenate(shares), axis=0)) == 10
    assert len({file.read_text() for file in tmp_path.glob('random * *')}) == 2 * 4


def test_batches_that_the_processes_cannot_share_are_refused(edited, few, tmp_path, monkeypatch):
    for name, value in (('RANK', '0'), ('WORLD_SIZE', '3'), ('TORCHELASTIC_RUN_ID', 'test')):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda backend: None)
    monkeypatch.setattr(torch.distributed, 'broadcast_object_list', lambda values: None)
    done = edited({}).call('--data-dir', few, '--batch-size', 4, *USE)
    assert_refused(done, '3 processes cannot share batches of 4 images equally')
    assert not (tmp_path / 'run').exists()


# ---- Prediction ------------------------------------------------------------------------------

def test_predict_names_three_classes_and_writes_two_tables(small, copy_of_finished, few, tmp_path):
    """One of the photographs is none: the others are predicted all the same."""
    folder = tmp_path / '测试'
    folder.mkdir()
    for i, name in enumerate(['0000', '0001', '0002', 'my, dinner']):
        shutil.copy(few / 'validation' / f'{i * 2}_0.jpg', folder / f'{name}.jpg')
    (folder / '0001.jpg').write_bytes(b'no photograph')
    done = small.call(*USE, '--no-amp', '--predict', folder)
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
    assert rows_of(copy_of_finished / 'predict_names.csv') == [
        {'file': name, 'class': data.CLASSES[label], 'probability': f'{row[label]:.4f}'}
        for name, label, row in zip(names, labels, probabilities)]

    # On Windows, patterns come as they are.
    done = small.call(*USE, '--no-amp', '--predict', tmp_path / '测*' / '000?.jpg')
    assert done.returncode == 1 and '0001.jpg cannot be read' in done.stderr.splitlines()[-1]
    values, labels = probabilities[0].topk(3)
    expected = [f'{data.CLASSES[label]} {value:.1%}' for value, label in zip(values, labels)]
    first, second = done.stdout.splitlines()
    assert first == f'{folder / "0000.jpg"}: {", ".join(expected)}'
    assert second.startswith(f'{folder / "0002.jpg"}: ')


@pytest.mark.parametrize('names, ids', [
    (['0000.jpg', '0012.jpg', '3.png'], ['0', '12', '3']),
    (['0012.jpg', '12.jpg', '3.png'], ['0012.jpg', '12.jpg', '3.png'])])
def test_each_photograph_has_an_id_of_its_own(small, copy_of_finished, few, tmp_path, names, ids):
    (tmp_path / 'test').mkdir()
    for name in names:
        shutil.copy(few / 'validation' / '0_0.jpg', tmp_path / 'test' / name)
    small.call(*USE, '--predict', 'test')
    assert [row['Id'] for row in rows_of(copy_of_finished / 'predict.csv')] == ids
    assert [row['file'] for row in rows_of(copy_of_finished / 'predict_names.csv')] == names


def test_predict_on_labelled_photographs(small, finished, few, copy_of_finished, tmp_path):
    """Of the eggs there are none."""
    done = small.call(*USE, '--predict', few / 'validation')
    assert done.returncode == 0 and done.stderr == ''
    first, heading, *table = done.stdout.splitlines()
    assert '10 of 10 photographs' in first and heading.startswith('labels from the names')
    pairs = [(int(row['file'].split('_')[0]), data.CLASSES.index(row['class']))
             for row in rows_of(copy_of_finished / 'predict_names.csv')]
    true, predicted = zip(*pairs)
    for label, name in enumerate(data.CLASSES):
        right, images = pairs.count((label, label)), true.count(label)
        accuracy = f'{right / images:.1%}' if images else '-'
        precision = f'{right / predicted.count(label):.1%}' if label in predicted else '-'
        assert table[label].split() == [str(label), *name.split(), str(images), str(right),
                                        accuracy, precision]
    assert total(done) == (10, sum(label == guess for label, guess in pairs))
    # That is what the run has printed at its end.
    assert table == finished[1].stdout.splitlines()[4:]

    # Those that have trained the network do not count, nor if they are on another disk.
    (tmp_path / 'links').mkdir()
    for data_dir in (few, tmp_path / 'links'):
        if data_dir != few:
            link(few / 'training', data_dir / 'training')
            link(few / 'validation', data_dir / 'validation')
            assert small.call(*RESUME, '--data-dir', data_dir, '--epochs', 4).returncode == 0
        done = small.call(*USE, '--predict', data_dir / 'training')
        assert done.returncode == 0 and 'total' not in done.stdout
        assert 'all these photographs have trained the network' in done.stderr


@pytest.mark.filterwarnings('ignore:Glyph')  # there may be no Chinese font
def test_an_accuracy_is_only_of_what_the_names_choose_for_validation(small, food11, tmp_path):
    """As there are no folders for the two parts. So the run has printed it at its end."""
    photos = tmp_path / 'photos'
    for file in (food11 / 'training').iterdir():
        folder = photos / f'米饭{file.name.split("_")[0]}'
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder)
    trained = small.call('--data-dir', photos, '--epochs', 2, *USE)
    # Chinese names are written as they are.
    assert '"米饭0"' in (tmp_path / 'run' / 'settings.json').read_text(encoding='utf-8')
    for folder in (photos, tmp_path / 'link'):
        if folder != photos:
            link(photos, folder)
        done = small.call(*USE, '--predict', folder)
        images, right = total(done)
        assert done.returncode == 0 and (images, right) == total(trained) and 0 < images < 44
        assert f'{44 - images} of them have trained the network' in done.stdout
        # They are predicted all the same. The table begins with the mark that Excel needs.
        assert len(rows_of(tmp_path / 'run' / 'predict.csv')) == 44
        assert (tmp_path / 'run' / 'predict_names.csv').read_bytes().startswith(b'\xef\xbb\xbf')
        assert (tmp_path / 'run' / 'predict.csv').read_bytes().startswith(b'Id,')


def test_mistakes_in_the_use_of_a_run(small, copy_of_finished, few, tmp_path):
    """--checkpoint goes without the best weights; the rest does not."""
    (tmp_path / 'empty').mkdir()
    photograph = few / 'validation' / '0_0.jpg'
    (copy_of_finished / 'best.pt').rename(copy_of_finished / 'other.pt')
    assert_refused(small.call(*USE, '--dreams'), f'error: {copy_of_finished / "best.pt"}: ')
    for arguments, words in ((['--predict', 'empty'], 'no photographs in '),
                             (['--predict', photograph, 'gone.jpg'], 'gone.jpg: '),
                             (['--predict', '*.jpg'], '*.jpg: '),
                             (['--predict', 'empty', '.'], 'photographs, or one folder'),
                             # The small network has another structure.
                             (['--features', photograph], '`convolution`')):
        assert_refused(small.call(*USE, '--checkpoint', 'other.pt', *arguments), words)
    done = small.call(*USE, '--checkpoint', 'other.pt', '--predict', photograph)
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
        done = small.call(*USE, *options, '--predict', few / 'validation')
    assert done.returncode == 0 and seen == {dtype}, done.stderr


@LINUX
def test_a_photograph_takes_no_more_memory_than_its_pixels(edited, few, tmp_path):
    """48 KiB. A network for images of the book's size that needs no memory itself."""
    def memory(name):  # in KiB
        return int(Path('/proc/self/status').read_text().split(f'{name}:')[1].split()[0])
    scripts = edited({'image_size = 128': 'image_size = 128', 'model = Classifier(class_count)':
                      'model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), '
                      'nn.Linear(3, class_count))'})
    assert scripts.call(*USE, '--data-dir', few, '--epochs', 1).returncode == 0
    (tmp_path / 'many').mkdir()
    for i in range(1500):
        os.link(few / 'validation' / '0_0.jpg', tmp_path / 'many' / f'{i}.jpg')
    try:
        # From now on, the highest value is noted anew.
        Path('/proc/self/clear_refs').write_text('5')
    except OSError:
        pytest.skip('this system does not say how much memory a process has taken')
    before = memory('VmRSS')
    done = scripts.call(*USE, '--batch-size', 4, '--predict', 'many')
    assert done.returncode == 0 and '1500 of 1500 photographs' in done.stdout
    # Less than 48 if memory of earlier tests is used again.
    assert (memory('VmHWM') - before) / 1500 < 60


# ---- Dreams and pictures ---------------------------------------------------------------------

def test_a_dream_brightens_what_its_class_is_known_by_and_nothing_else():
    """For a network that knows class i by the i-th band of 11 rows, but class 0 by 4 x 4 pixels."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 128 * 128, 11)).requires_grad_(False)
    weights = model[1].weight.zero_().view(11, 3, 128, 128)
    for label in range(1, 11):
        weights[label, :, 11 * label:11 * label + 11] = .01
    weights[0, :, 64:68, 64:68] = 1
    model[1].weight.requires_grad_()
    (images, probabilities), (again, _) = (train.dream(model, 11, steps=60) for _ in range(2))
    assert images.shape == (11, 128, 128, 3) and images.min() >= 0 and images.max() <= 1
    assert (images == again).all() and probabilities.min() > .9
    # The images are shifted in a ring.
    for pixels in np.nonzero(images[0].mean(2) > .1):
        assert np.ptp(pixels) > 12
    for label, image in list(enumerate(images))[1:]:
        bands = image[:121].reshape(11, -1).mean(1)
        assert bands.argmax() == label and bands[label] > .3
        assert all(band < .1 for i, band in enumerate(bands) if 2 < abs(i - label) < 9)
    # The network learns as before, when it is trained on.
    assert model[1].weight.requires_grad and not model[1].bias.requires_grad
    assert model[1].weight.grad is None


def test_dreams_are_drawn_in_their_colours(small, copy_of_finished, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, 'savefig', lambda figure, *_, **__: figures.append(figure))
    done = small.call(*USE, '--dreams')
    assert done.returncode == 0 and str(copy_of_finished / 'dreams.png') in done.stdout
    model, classes = small.train.load_model(copy_of_finished / 'best.pt', CPU)
    images, _ = small.train.dream(model, 11)
    for axes, image, name in zip(figures[0].axes, images, classes, strict=True):
        assert axes.get_title().startswith(name)
        assert (axes.images[0].get_array() == image[..., ::-1]).all()  # BGR


def test_the_curves_mark_the_best_epoch():
    rows = [{'epoch': epoch, 'train_acc': .1 * epoch, 'train_loss': 2., 'val_acc': acc,
             'val_loss': 1.5} for epoch, acc in ((1, .2), (2, .6), (3, .4))]
    figure = train.draw_curves(rows, best_epoch=2)
    assert [axes.get_title() for axes in figure.axes] == ['accuracy', 'mean loss per image']
    for axes, value in zip(figure.axes, ('0.600', '1.500')):
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert f'best: epoch 2, {value}' in labels and len(set(labels)) == 3
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


def drawn_boxes(figure, artists):
    """Where these are in the drawn figure. None is cut off."""
    figure.draw_without_rendering()
    boxes = [artist.get_window_extent() for artist in artists]
    for box in boxes:
        assert min(box.x0, box.y0) >= 0
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    return boxes


@pytest.mark.parametrize('count, texts', [(15, 15), (40, 40), (41, 0), (101, 0)])
def test_the_confusion_of_many_classes_with_long_names(count, texts):
    """PlantVillage's have 50 letters. Each text has room; where it has not, there is none."""
    names = [f'Tomato___Spider_mites_Two-spotted_spider_mite_{i:04d}' for i in range(count)]
    figure = train.draw_confusion(np.eye(count, dtype=int), names)
    axes, = figure.axes
    ticks = [*axes.get_xticklabels(), *axes.get_yticklabels()]
    assert len(axes.texts) == texts and (len(ticks) == 2 * count) == (texts > 0)
    assert max(figure.get_size_inches()) * figure.dpi <= 5000
    if texts:
        drawn_boxes(figure, ticks)
        assert axes.get_window_extent().width / count > 35  # pixels


def draw_mistakes(files, predictions, classes=data.CLASSES):
    """The figure for blue photographs. files: pairs (name, label). predictions: for each file, a
    label and its probability."""
    val_x = np.tile(np.uint8([255, 0, 0]), (len(files), 128, 128, 1))  # BGR
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


def test_long_names_of_mistakes_cover_nothing():
    """PlantVillage's. There are 24 mistakes, in three rows."""
    files = [(f'0a1b2c3d-4e5f-6789-abcd-ef0123456789___RS_HL {i}.JPG', 0) for i in range(30)]
    figure = draw_mistakes(files, [(1, .5)] * 30, [
        'Tomato___Spider_mites_Two-spotted_spider_mite', 'Corn_(maize)___Northern_Leaf_Blight'])
    assert len(figure.axes) == 24
    boxes = drawn_boxes(figure, [artist for axes in figure.axes
                                 for artist in (axes.title, axes.images[0])])
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_one_mistake_or_none_is_a_small_picture():
    for label, heading in ((1, 'the most confident mistakes'), (0, 'no mistakes')):
        figure = draw_mistakes([('0_0.jpg', 0)], [(label, .5)])
        assert max(figure.get_size_inches()) < 4
        assert figure.get_suptitle().replace('\n', ' ').startswith(heading)
        drawn_boxes(figure, [figure._suptitle])
