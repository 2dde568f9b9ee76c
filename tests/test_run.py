"""A run's folder: what it holds, how it survives being stopped and killed, what it is used for."""
import builtins
import csv
import errno
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

import chapter2_1_data as data
import chapter2_2_train as train
from tests.conftest import SMALL
from tests.test_train import LINE, POSIX

CPU = torch.device('cpu')
ROOT_ON_LINUX = pytest.mark.skipif(sys.platform != 'linux' or os.geteuid() != 0,
                                   reason='only root on Linux can make a small file system')

# Starts a script with a system under it that kills the process at a chosen instant, such as
# "write 2": in the middle of writing last.pt for the second time.
KILLER = '''
import os, runpy, sys
script, instant = sys.argv[1:3]
sys.argv = [script, *sys.argv[3:]]
sys.path.insert(0, os.path.dirname(script))
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
runpy.run_path(script, run_name='__main__')
'''


def history(folder):
    """The rows of history.csv, seconds aside."""
    with open(folder / 'history.csv', newline='') as file:
        return [{name: float(value) for name, value in row.items() if name != 'seconds'}
                for row in csv.DictReader(file)]


def checkpoint(folder, name='last.pt'):
    return torch.load(folder / name, weights_only=True, map_location='cpu')


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


# ---- The folder ------------------------------------------------------------------------------

def test_a_run_leaves_checkpoints_history_settings_and_pictures(small, finished, few):
    folder, done = finished
    assert done.returncode == 0, done.stderr
    visible = sorted(name for name in os.listdir(folder) if name != '.lock')
    assert visible == ['best.pt', 'confusion.png', 'curves.png', 'history.csv', 'last.pt',
                       'mistakes.png', 'settings.json']
    assert json.loads((folder / 'settings.json').read_text()) == {
        'data_dir': str(few), 'epochs': 3, 'batch_size': 4, 'lr': .001, 'seed': 0,
        'no_amp': False, 'demo': False}
    printed = [LINE.fullmatch(line).groups() for line in done.stdout.splitlines()[:3]]
    for row, line in zip(history(folder), printed, strict=True):
        values = [row[name] for name in ('train_acc', 'train_loss', 'val_acc', 'val_loss')]
        assert int(line[0]) == row['epoch']
        assert [f'{value:.6f}' for value in values] == list(line[2:])
    model = small.train.load_model(folder / 'best.pt', CPU)
    val_x, val_y = small.data.readfile(few / 'validation')
    autocast, _ = small.train.mixed_precision(CPU, no_amp=False)
    probabilities = small.train.predict_probabilities(model, val_x, 4, CPU, autocast)
    right = (probabilities.argmax(1) == val_y).mean()
    assert right == pytest.approx(max(row['val_acc'] for row in history(folder)))
    assert done.stdout.splitlines()[-1].split()[-1] == f'{right:.1%}'
    optimizer = checkpoint(folder)['optimizer']
    assert checkpoint(folder)['optimizer_class'] == 'Adam'
    assert optimizer['param_groups'][0]['lr'] == .001 and optimizer['state'][0]['step'] == 9


def test_a_folder_that_holds_files_is_left_alone(small, few, tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.txt').write_text('mine')
    done = small.call('--data-dir', few, '--epochs', 1, '--device', 'cpu', '--out', 'mine')
    assert done.returncode == 1 and 'mine already holds files' in done.stderr
    assert os.listdir(tmp_path / 'mine') == ['thesis.txt']


def test_best_weights_without_a_last_checkpoint_are_left_alone(small, copy_of_finished):
    (copy_of_finished / 'last.pt').unlink()
    best = (copy_of_finished / 'best.pt').read_bytes()
    done = small.call('--out', 'run', '--resume', '--device', 'cpu')
    assert done.returncode == 1 and 'last.pt is missing' in done.stderr
    assert (copy_of_finished / 'best.pt').read_bytes() == best


def test_a_run_started_while_another_one_reads_its_photographs(small, few, tmp_path, monkeypatch):
    """The second one makes the folder, and has trained before the first one gets there."""
    started = []

    def cpu_count():  # the cores are counted when the photographs are read
        if not started:
            started.append(small.run('--data-dir', few, '--epochs', 1, '--device', 'cpu',
                                     '--out', 'run'))
        return 2
    monkeypatch.setattr(os, 'cpu_count', cpu_count)
    done = small.call('--data-dir', few, '--epochs', 2, '--device', 'cpu', '--out', 'run',
                      '--resume')
    assert started[0].returncode == 0, started[0].stderr
    assert done.returncode == 1 and 'just been used by another run' in done.stderr
    assert len(checkpoint(tmp_path / 'run')['history']) == 1


def test_each_run_takes_the_next_free_folder(small, few, tmp_path):
    (tmp_path / 'runs' / '001').mkdir(parents=True)
    for _ in range(2):
        done = small.call('--data-dir', few, '--epochs', 1, '--device', 'cpu')
        assert done.returncode == 0
    assert sorted(os.listdir(tmp_path / 'runs')) == ['001', '002', '003']
    assert not os.listdir(tmp_path / 'runs' / '001')


def test_a_mistake_leaves_no_folder_behind(small, tmp_path):
    assert small.call('--data-dir', 'nowhere', '--device', 'cpu').returncode == 1
    assert small.call('--data-dir', 'nowhere', '--device', 'cpu', '--out', 'run').returncode == 1
    assert os.listdir(tmp_path) == []


def test_resuming_a_finished_run_draws_its_pictures_anew(small, finished, copy_of_finished):
    (copy_of_finished / 'confusion.png').unlink()
    (copy_of_finished / 'history.csv').unlink()
    weights = (copy_of_finished / 'last.pt').read_bytes()
    done = small.call('--out', 'run', '--resume', '--device', 'cpu')
    assert done.returncode == 0 and '/003]' not in done.stdout
    assert (copy_of_finished / 'confusion.png').exists()
    assert (copy_of_finished / 'last.pt').read_bytes() == weights
    assert history(copy_of_finished) == history(finished[0])


@pytest.mark.parametrize('arguments', [('--batch-size', '8'), ('--lr', '0.01'), ('--seed', '1'),
                                       ('--no-amp',), ('--epochs', '2'), ('--demo',)])
def test_resuming_with_other_settings_is_refused(small, copy_of_finished, arguments):
    before = (copy_of_finished / 'last.pt').read_bytes()
    done = small.call('--out', 'run', '--resume', '--device', 'cpu', *arguments)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and error.startswith('error: the run in run') and not done.stdout
    assert arguments[0].strip('-') in error
    assert (copy_of_finished / 'last.pt').read_bytes() == before


# ---- Stopped and killed ----------------------------------------------------------------------

@pytest.mark.skipif(sys.platform != 'linux', reason='/proc')
def test_killed_and_resumed_ends_as_if_never_interrupted(small, finished, few, tmp_path):
    """Killed while it writes its second checkpoint, after the best weights, and between its last
    checkpoint and its history; and continued with another number of workers."""
    (tmp_path / 'killer.py').write_text(KILLER)
    script = str(small.folder / 'chapter2_2_train.py')

    def start(instant, *arguments):
        return subprocess.run(
            [sys.executable, tmp_path / 'killer.py', script, instant, '--data-dir', few,
             '--epochs', '3', '--batch-size', '4', '--device', 'cpu', '--out', 'run', '--resume',
             *arguments], cwd=tmp_path, capture_output=True, encoding='utf-8', timeout=120)

    out = tmp_path / 'run'
    assert start('write 2').returncode == -signal.SIGKILL
    assert len(checkpoint(out)['history']) == 1 and (out / 'last.pt.tmp').exists()
    done = start('replace 2', '--workers', '1')
    assert done.returncode == -signal.SIGKILL and 'resumed from epoch 1' in done.stderr
    assert len(checkpoint(out)['history']) == 3 and len(history(out)) == 2
    done = small.call('--out', 'run', '--resume', '--device', 'cpu')
    assert done.returncode == 0 and 'resumed from epoch 3' in done.stderr
    assert history(out) == history(finished[0])
    assert not list(out.glob('*.tmp'))
    for name in ('last.pt', 'best.pt'):
        assert same(checkpoint(out, name), checkpoint(finished[0], name))


@POSIX
def test_a_second_run_is_refused_and_ctrl_c_says_how_to_continue(small, few, tmp_path):
    command = small.command('--data-dir', few, '--epochs', 1000, '--batch-size', 4, '--out', 'run',
                            '--workers', 1, '--device', 'cpu')
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
                          encoding='utf-8', start_new_session=True) as process:
        for _ in range(2):
            assert LINE.fullmatch(process.stdout.readline().rstrip())
        second = small.call('--out', 'run', '--resume', '--device', 'cpu')
        assert second.returncode == 1 and second.stdout == ''
        assert second.stderr.startswith('error: run is in use') and second.stderr.count('\n') == 1
        assert process.poll() is None
        # As a terminal does: the workers get it too. And once more, as torchrun does.
        os.killpg(process.pid, signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    lines = errors.splitlines()
    assert process.returncode == 130 and len(lines) == 3, errors
    saved = len(checkpoint(tmp_path / 'run')['history'])
    assert saved >= 1 and f'the state after epoch {saved}; continue with ' in lines[2]
    assert 'python chapter2_2_train.py --out "run" --resume' in lines[2]
    done = small.call('--out', 'run', '--resume', '--epochs', saved, '--device', 'cpu')
    assert done.returncode == 0, done.stderr


@ROOT_ON_LINUX
def test_a_full_disk_ends_in_one_line_and_keeps_what_was_saved(scripts, few, tmp_path):
    """300 MB hold the first checkpoint (154 MB and 51 MB of best weights), and no second one."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=300m', 'none', disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('mounting is not allowed here')
    try:
        arguments = ('--data-dir', few, '--batch-size', 10, '--device', 'cpu', '--out', 'disk/run')
        assert scripts.call(*arguments, '--epochs', 1).returncode == 0
        done = scripts.call(*arguments, '--resume', '--epochs', 2)
        assert done.returncode == 1
        error = done.stderr.splitlines()[-1]
        assert f'{os.strerror(errno.ENOSPC)}; what was saved before is intact' in error
        assert len(checkpoint(disk / 'run')['history']) == 1
        assert not list(disk.glob('run/*.tmp'))
    finally:
        subprocess.run(['umount', disk], check=True)


@POSIX
def test_a_closed_stdout_ends_with_a_line_that_says_how_to_continue(small, few, tmp_path):
    command = small.command('--data-dir', few, '--epochs', 1000, '--batch-size', 4, '--out', 'run',
                            '--device', 'cpu')
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
                          encoding='utf-8') as process:
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    assert f'error: {os.strerror(errno.EPIPE)}; run holds the state after epoch' in errors
    assert 'Traceback' not in errors


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_state_before(
        edited, copy_of_finished, few):
    """Resumed with an infinite learning rate, which the checkpoint does not know of."""
    infinite = edited({"lr=run.settings['lr'],": "lr=float('inf'),"})
    done = infinite.call('--out', 'run', '--resume', '--epochs', 5, '--device', 'cpu')
    assert done.returncode == 1 and done.stdout.startswith('[004/005]')
    error = done.stderr.splitlines()[-1]
    assert 'epoch 4: the loss is not a finite number; run holds the state after epoch 3' in error
    assert len(checkpoint(copy_of_finished)['history']) == len(history(copy_of_finished)) == 3


def test_files_that_another_program_holds_open_do_not_end_the_run(
        small, few, tmp_path, monkeypatch):
    """What Windows answers while Excel shows history.csv, and while a virus scanner reads best.pt
    of the first epoch."""
    replace, tries = os.replace, []

    def held(source, target):
        name = os.path.basename(target)
        tries.append(name)
        if name == 'history.csv' or name == 'best.pt' and tries.count(name) <= 20:
            raise PermissionError(errno.EACCES, 'in use')
        replace(source, target)
    monkeypatch.setattr(os, 'replace', held)
    # And a file that has just been written, for an instant.
    really_open, opened = open, []

    def held_open(file, *arguments, **options):
        if str(file).endswith('curves.png.tmp'):
            opened.append(file)
            if len(opened) % 3:
                raise PermissionError(errno.EACCES, 'in use')
        return really_open(file, *arguments, **options)
    monkeypatch.setattr(builtins, 'open', held_open)
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    done = small.call('--data-dir', few, '--epochs', 2, '--batch-size', 4, '--out', 'run',
                      '--device', 'cpu')
    assert done.returncode == 0
    assert 'history.csv is in use' in done.stderr and 'best.pt is in use' in done.stderr
    assert (tmp_path / 'run' / 'best.pt').exists()
    assert not (tmp_path / 'run' / 'history.csv').exists()
    assert (tmp_path / 'run' / 'curves.png').exists() and len(opened) == 6
    assert not list((tmp_path / 'run').glob('*.tmp'))


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
    elif kind == 'attribute bit':
        # It makes PyTorch take a tensor for a folder, and leave its memory as it was.
        changed = bytearray(whole)
        entry = whole.index(b'/data/0', whole.rindex(b'PK\1\2', 0, whole.rindex(b'/data/0'))) - 46
        changed[whole.rindex(b'PK\1\2', 0, entry + 46) + 38] ^= 16
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
                                  'small bit', 'large bit', 'attribute bit'])
@pytest.mark.parametrize('name', ['last.pt', 'best.pt'])
def test_a_bad_checkpoint_is_named_in_one_line_and_not_executed(
        small, copy_of_finished, few, tmp_path, kind, name):
    spoil(copy_of_finished / name, kind)
    uses = [['--resume']]
    if name == 'best.pt':
        uses.append(['--predict', few / 'validation' / '0_0.jpg'])
    for use in uses:
        done = small.call('--out', 'run', '--device', 'cpu', *use)
        assert done.returncode == 1 and done.stdout == '' and done.stderr.count('\n') == 1
        assert f'{copy_of_finished.name}{os.sep}{name} is ' in done.stderr
        assert ('incompatible' if kind == 'foreign' else 'corrupt') in done.stderr
        assert 'start a new run' in done.stderr
    assert not (tmp_path / 'executed').exists()


# ---- Several processes -----------------------------------------------------------------------

# A network without batch norm, whose numbers depend on how many images a process has. In the
# first attempt of torchrun, process 1 dies as soon as process 0 has saved an epoch.
LINEAR = {**SMALL, 'model = Classifier()':
          'model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 11))'}


@pytest.fixture
def torchrun(tmp_path, few):
    """Trains on 10 photographs in batches of 4, 4 and 2, in two processes."""
    (tmp_path / 'dying.py').write_text('''
import os, runpy, sys, threading, time
def die_when_saved(path):
    while not os.path.exists(path):
        time.sleep(0.01)
    os.kill(os.getpid(), 9)
if os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':
    path = os.path.join(sys.argv[sys.argv.index('--out') + 1], 'curves.png')
    threading.Thread(target=die_when_saved, args=[path], daemon=True).start()
sys.argv.pop(0)
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name='__main__')
''')

    def start(scripts, *arguments, restarts=0):
        return subprocess.run(
            [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2',
             '--max-restarts', str(restarts), 'dying.py', scripts.folder / 'chapter2_2_train.py',
             '--data-dir', few, '--batch-size', '4', '--device', 'cpu', *map(str, arguments)],
            cwd=tmp_path, capture_output=True, encoding='utf-8', timeout=120)
    return start


@POSIX
def test_two_processes_of_which_one_dies_and_is_restarted_train_as_one_does(
        edited, torchrun, few, tmp_path):
    linear = edited({}, base=LINEAR)
    done = torchrun(linear, '--epochs', 8, '--out', 'two', '--resume', '--no-amp', restarts=1)
    assert done.returncode == 0, done.stderr
    assert 'resumed from epoch' in done.stderr and done.stdout.count('[008/008]') == 1
    one = linear.call('--data-dir', few, '--batch-size', 4, '--device', 'cpu', '--out', 'one',
                      '--epochs', 8, '--no-amp')
    assert one.returncode == 0
    two, one = (history(tmp_path / name) for name in ('two', 'one'))
    assert len(two) == len(one) == 8
    for row, expected in zip(two, one):
        assert list(row.values()) == pytest.approx(list(expected.values()), rel=1e-3)
    done = linear.call('--data-dir', few, '--batch-size', 4, '--device', 'cpu', '--out', 'two',
                       '--epochs', 9, '--resume')  # in one process
    assert done.returncode == 0 and done.stdout.startswith('[009/009]')


@POSIX
def test_a_process_that_dies_ends_the_run_of_two(small, torchrun, few, tmp_path):
    done = torchrun(small, '--out', 'run', '--epochs', 1000)
    assert done.returncode != 0 and '[rank' not in done.stderr
    # Process 0 is left. It sees that the other one is gone, or torchrun's SIGTERM comes first.
    assert ('error: another process has ended or cannot be reached' in done.stderr
            or 'interrupted: run holds the state after epoch' in done.stderr)
    assert '--shm-size' in done.stderr or 'interrupted' in done.stderr
    assert '--out "run" --resume' in done.stderr
    last = checkpoint(tmp_path / 'run')
    # Each validation image has counted once, and the batch norm is that of process 0.
    model = small.train.make_model(CPU)
    model.load_state_dict(last['model'])
    val_x, val_y = small.data.readfile(few / 'validation')
    autocast, _ = small.train.mixed_precision(CPU, no_amp=False)
    probabilities = small.train.predict_probabilities(model, val_x, 4, CPU, autocast)
    right = (probabilities.argmax(1) == val_y).mean()
    assert last['history'][-1]['val_acc'] == pytest.approx(right)


def test_batches_that_the_processes_cannot_share_are_refused(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['script.py', '--batch-size', '4'])
    with pytest.raises(data.UserError, match='3 processes cannot share batches of 4'):
        train.choose_settings(train.parse_arguments(), None, world_size=3)


def test_only_process_0_predicts(small, finished, few, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    done = small.call('--out', finished[0], '--device', 'cpu', '--predict', few / 'validation')
    assert done.returncode == 0 and done.stdout == ''
    assert not (finished[0] / 'predict.csv').exists()


@ROOT_ON_LINUX
def test_too_little_shared_memory(scripts, few):
    """300 kB: a batch of 10 photographs takes 491."""
    before = ['unshare', '-m', 'sh', '-c',
              'mount -t tmpfs -o size=300k none /dev/shm || exit 77; exec "$@"', 'sh']
    done = scripts.run('--data-dir', few, '--batch-size', 10, '--epochs', 1, '--device', 'cpu',
                       '--workers', 2, before=before)
    if done.returncode == 77 or 'unshare' in done.stderr:
        pytest.skip('mounting is not allowed here')
    # Older versions of PyTorch write a line of their own before that.
    assert done.returncode == 1 and done.stderr.count('error: a worker process has died') == 1
    assert 'Traceback' not in done.stderr and '--shm-size' in done.stderr


# ---- Prediction ------------------------------------------------------------------------------

def test_predict_names_three_classes_and_writes_kaggles_table(
        small, copy_of_finished, few, tmp_path):
    folder = tmp_path / '测试'
    folder.mkdir()
    for i, name in enumerate(['0000', '0001', '0002', 'my, dinner']):
        shutil.copy(few / 'validation' / f'{i * 2}_0.jpg', folder / f'{name}.jpg')
    (folder / '0001.jpg').write_bytes(b'no photograph')
    done = small.call('--out', 'run', '--device', 'cpu', '--no-amp',
                      '--predict', folder / '0000.jpg', folder)
    assert done.returncode == 1
    unlabelled, error = done.stderr.splitlines()
    assert unlabelled.startswith('no accuracy, because 3 of 3') and '0000.jpg' in unlabelled
    assert error.startswith(f'error: {folder / "0001.jpg"}: ') and 'repair' in error
    single, summary = done.stdout.splitlines()
    model = small.train.load_model(copy_of_finished / 'best.pt', CPU)
    images = [small.data.read_image(folder / name) for name in
              ('0000.jpg', '0002.jpg', 'my, dinner.jpg')]
    x = torch.stack([small.data.test_transform(image) for image in images])
    probabilities = model.eval()(x).softmax(1).detach()
    values, labels = probabilities[0].topk(3)
    expected = [f'{data.CLASSES[label]} {value:.1%}' for value, label in zip(values, labels)]
    assert single == f'{folder / "0000.jpg"}: {", ".join(expected)}'
    assert '3 of 4 photographs' in summary and 'predict.csv' in summary
    with open(copy_of_finished / 'predict.csv', newline='') as file:
        table = list(csv.reader(file))
    labels = [str(label) for label in probabilities.argmax(1).tolist()]
    assert table == [['Id', 'Category'], ['0', labels[0]], ['2', labels[1]],
                     ['my, dinner.jpg', labels[2]]]


@pytest.mark.parametrize('layout', ['label_number', 'class folders'])
def test_predict_on_labelled_photographs_prints_the_accuracy(
        small, copy_of_finished, few, tmp_path, layout):
    folder = tmp_path / 'evaluation'
    folder.mkdir()
    files = [(label, f'{label}_{i}.jpg') for label, i in [(0, 0), (0, 1), (6, 0), (10, 0)]]
    for label, name in files:
        target = folder
        if layout == 'class folders':
            target = folder / data.CLASSES[label].replace('/', '-')
            target.mkdir(exist_ok=True)
        shutil.copy(few / 'validation' / f'{label}_0.jpg', target / name)
    done = small.call('--out', 'run', '--device', 'cpu', '--predict', folder)
    assert done.returncode == 0 and done.stderr == ''
    lines = done.stdout.splitlines()
    assert '4 of 4 photographs' in lines[0] and len(lines) == 14
    predicted = {}
    with open(copy_of_finished / 'predict.csv', newline='') as table:
        for row in csv.DictReader(table):
            predicted[row['Id'].split('/')[-1]] = int(row['Category'])
    for label, images in ((0, 2), (6, 1), (10, 1)):
        right = sum(predicted[name] == label for true, name in files if true == label)
        assert lines[2 + label].split()[-3:] == [str(images), str(right), f'{right / images:.1%}']
    right = sum(predicted[name] == label for label, name in files)
    assert lines[3].split()[-3:] == ['0', '0', '-']  # no photograph of this class
    assert lines[-1].split() == ['total', '4', str(right), f'{right / 4:.1%}']

    # One photograph without a label: no accuracy, and the reason.
    shutil.copy(few / 'validation' / '0_0.jpg', folder / '0000.jpg')
    done = small.call('--out', 'run', '--device', 'cpu', '--predict', folder)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1
    assert '1 of 5' in done.stderr and '0000.jpg' in done.stderr


def test_photographs_whose_numbers_are_not_unique_keep_their_names(
        small, copy_of_finished, few, tmp_path):
    folder = tmp_path / 'test'
    folder.mkdir()
    for name in ('1.jpg', '01.jpg'):
        shutil.copy(few / 'validation' / '0_0.jpg', folder / name)
    assert small.call('--out', 'run', '--device', 'cpu', '--predict', folder).returncode == 0
    text = (copy_of_finished / 'predict.csv').read_text()
    assert [line.split(',')[0] for line in text.splitlines()] == ['Id', '01.jpg', '1.jpg']


def test_predict_takes_one_folder_with_photographs(small, finished, tmp_path):
    (tmp_path / 'empty').mkdir()
    for folders, message in ((['empty'], 'no photographs in empty'),
                             (['gone.jpg'], 'no file or folder gone.jpg'),
                             (['empty', '.'], 'one folder at a time')):
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


def test_the_use_of_a_run_needs_one(small, tmp_path):
    for arguments in (['--resume'], ['--predict', 'x.jpg'], ['--dreams']):
        assert small.call(*arguments).returncode == 2
    done = small.call('--out', 'nowhere', '--dreams', '--device', 'cpu')
    missing = os.path.join('nowhere', 'best.pt')
    assert done.returncode == 1 and f'there is no {missing}' in done.stderr
    assert not (tmp_path / 'nowhere').exists()
    (tmp_path / 'notes.txt').touch()
    done = small.call('--out', 'notes.txt')
    assert done.returncode == 2 and 'notes.txt is a file' in done.stderr


# ---- Dreams and pictures ---------------------------------------------------------------------

def test_a_dream_brightens_what_its_class_is_known_by_and_nothing_else():
    """For a network that tells class i by the brightness of the i-th band of 11 rows."""
    weights = torch.zeros(11, 3, 128, 128)
    for label in range(11):
        weights[label, :, 11 * label:11 * label + 11] = .01
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 128 * 128, 11, bias=False))
    model[1].weight.data = weights.flatten(1)
    images, probabilities = train.dream(model, CPU, steps=60)
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
    figure = train.draw_curves(rows)
    assert [axes.get_title() for axes in figure.axes] == ['accuracy', 'mean loss per image']
    for axes, value in zip(figure.axes, ('0.600', '1.500')):
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert f'best: epoch 2, {value}' in labels
    assert figure.axes[0].lines[1].get_ydata().tolist() == [.2, .6, .4]


def test_the_confusion_shows_counts_shares_and_a_class_without_images():
    counts = np.zeros((11, 11), int)
    counts[0, 0], counts[0, 9], counts[10, 10] = 3, 1, 5
    axes, = train.draw_confusion(counts).axes
    texts = {(text.get_position(), text.get_text()) for text in axes.texts}
    assert {((0, 0), '3\n75%'), ((9, 0), '1\n25%'), ((10, 10), '5\n100%'),
            ((5.0, 3), 'no images of this class')} <= texts
    assert [label.get_text() for label in axes.get_yticklabels()] == list(data.CLASSES)
    assert '88.9%' in axes.get_title()


def test_pictures_of_photographs_have_true_colours():
    blue = np.zeros((1, 128, 128, 3), np.uint8)
    blue[..., 0] = 255  # BGR
    axes, = train.draw_images(blue, ['Rice'], 2, 'heading').axes
    assert (axes.images[0].get_array() == (0, 0, 255)).all() and axes.get_title() == 'Rice'


def test_the_mistakes_are_the_most_confident_ones_first():
    val_x = np.zeros((4, 128, 128, 3), np.uint8)
    probabilities = np.full((4, 11), .01)
    for i, (label, value) in enumerate([(2, .5), (3, .8), (4, .9), (5, .6)]):
        probabilities[i, label] = value
    axes = train.draw_mistakes(val_x, np.array([0, 0, 4, 0]), probabilities).axes
    titles = [ax.get_title().split('\n')[-1] for ax in axes if ax.get_title()]
    assert titles == ['Egg 80%', 'Meat 60%', 'Dessert 50%']
