"""A run's folder: what it holds, how it survives being stopped and killed, and what it is used for."""
import csv
import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

import chapter2_1_data as data
import chapter2_2_train as train
from conftest import ROOT, Small
from test_train import LINE

CPU = torch.device('cpu')
POSIX = pytest.mark.skipif(os.name == 'nt', reason='the signals of POSIX')

# Runs the training script, with a checkpoint after every epoch, and lets a test kill it at a chosen instant.
DRIVER = f'''
import os, sys
sys.path[:0] = {str(ROOT)!r}, {str(ROOT / 'tests')!r}
import chapter2_1_data as data, chapter2_2_train as train
train.save_seconds, instant = 0, sys.argv.pop(1)
if instant != 'full disk':
    import conftest
    train.Classifier = conftest.Small
kill = lambda: os.kill(os.getpid(), 9)
evaluate, fsync, replace, seen = train.evaluate, os.fsync, os.replace, []
def count(event):
    seen.append(event)
    return seen.count(event)
def evaluate_or_die(*arguments):
    if count('epoch') == 2 and instant == 'epoch': kill()
    return evaluate(*arguments)
def fsync_or_die(file):
    if os.path.basename(os.readlink(f'/proc/self/fd/{{file}}')) == 'last.pt.tmp' and instant == 'write':
        os.ftruncate(file, 1000)
        kill()
    fsync(file)
def replace_or_die(source, target):
    if os.path.basename(target) == 'last.pt' and instant == 'replace': kill()
    replace(source, target)
    if os.path.basename(target) == 'last.pt' and instant == 'last' and count('last') == 2: kill()
train.evaluate, os.fsync, os.replace = evaluate_or_die, fsync_or_die, replace_or_die
data.run(train.main)
'''


def command(photographs, *arguments, instant='never'):
    return [sys.executable, '-c', DRIVER, instant, '--data-dir', str(photographs), '--batch-size', '4', '--device', 'cpu',
            *map(str, arguments)]


def start(*arguments, **options):
    return subprocess.run(command(*arguments, **options), capture_output=True, encoding='utf-8', timeout=120)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(train, 'Classifier', Small)


@pytest.fixture(scope='module')
def finished(photographs, tmp_path_factory):
    """The folder of an uninterrupted run of 3 epochs, and what it printed."""
    out = tmp_path_factory.mktemp('finished') / 'run'
    return out, start(photographs, '--epochs', 3, '--out', out)


def history(out):
    with open(out / 'history.csv', newline='') as file:
        return [{name: value for name, value in row.items() if name != 'seconds'} for row in csv.DictReader(file)]


def same(one, other):
    """Are two checkpoints equal, bit for bit, seconds aside?"""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one if key != 'seconds')
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# ---------------------------------------------------------------------- the folder

def test_a_run_leaves_its_checkpoints_history_settings_and_pictures(finished, photographs):
    out, done = finished
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(out)) == ['best.pt', 'confusion.png', 'curves.png', 'history.csv', 'last.pt', 'mistakes.png',
                                       'settings.json']
    settings = json.loads((out / 'settings.json').read_text())
    assert {**settings, 'data': 0} == {'data_dir': str(photographs), 'epochs': 3, 'batch_size': 4, 'lr': .001, 'seed': 0, 'amp': True,
                                        'data': 0}
    printed = [LINE.fullmatch(line).groups() for line in done.stdout.splitlines()[:3]]
    assert [(row['epoch'], row['train_acc'], row['train_loss'], row['val_acc'], row['val_loss']) for row in history(out)] == [
        (str(int(line[0])), *line[2:]) for line in printed]
    table = done.stdout.splitlines()[3:]
    assert table[4].split() == ['3', 'Egg', '0', '0', '-'] and table[5].split()[:4] == ['4', 'Fried', 'food', '1']
    best = torch.load(out / 'best.pt', weights_only=True)['model']
    model = train.Classifier()
    model.load_state_dict(best)
    val_x, val_y = data.readfile(photographs / 'validation')
    with train.mixed_precision(CPU)[0]:
        right = (train.probabilities(model, val_x, CPU).argmax(1) == val_y).mean()
    assert right == pytest.approx(max(float(row['val_acc']) for row in history(out)), abs=1e-6)
    assert table[-1].split()[-1] == f'{right:.1%}'


def test_a_folder_with_other_files_keeps_them(call, photographs, tmp_path):
    for name in ('thesis.tmp', 'mistakes.png'):
        (tmp_path / name).write_text('mine')
    arguments = ['--data-dir', photographs, '--epochs', 1, '--device', 'cpu', '--out', tmp_path]
    assert call(train.main, *arguments).returncode == 1  # would replace mistakes.png
    (tmp_path / 'mistakes.png').unlink()
    assert call(train.main, *arguments).returncode == 0 and (tmp_path / 'thesis.tmp').read_text() == 'mine'


def test_each_run_takes_the_next_free_folder(call, photographs, tmp_path):
    (tmp_path / 'runs' / '001').mkdir(parents=True)
    for _ in range(2):
        assert call(train.main, '--data-dir', photographs, '--epochs', 1, '--device', 'cpu').returncode == 0
    assert sorted(os.listdir(tmp_path / 'runs')) == ['001', '002', '003'] and not os.listdir(tmp_path / 'runs' / '001')


def test_a_finished_run_is_neither_overwritten_nor_trained_again(call, finished, photographs):
    out = finished[0]
    before = {name: (out / name).stat().st_mtime_ns for name in os.listdir(out)}
    done = call(train.main, '--data-dir', photographs, '--out', out)
    assert done.returncode == 1 and f'{out} already holds a run' in done.stderr and done.stderr.count('\n') == 1
    done = call(train.main, '--out', out, '--resume', '--device', 'cpu')
    assert done.returncode == 0 and 'finished' in done.stderr and done.stdout == ''
    assert {name: (out / name).stat().st_mtime_ns for name in os.listdir(out)} == before


@pytest.mark.parametrize('flag, value', [('--batch-size', '8'), ('--lr', '0.01'), ('--seed', '1'), ('--data-dir', 'other')])
def test_resuming_with_other_settings_is_refused(call, finished, food11, flag, value):
    value = food11 if value == 'other' else value
    done = call(train.main, '--out', finished[0], '--resume', '--epochs', 4, '--device', 'cpu', flag, value)
    assert done.returncode == 1 and f'{flag} {value}' in done.stderr and done.stderr.count('\n') == 1
    assert len(history(finished[0])) == 3


# ---------------------------------------------------------------------- stopped and killed

@POSIX
@pytest.mark.skipif(sys.platform != 'linux', reason='/proc')
def test_killed_and_resumed_ends_as_if_never_interrupted(finished, photographs, tmp_path):
    """Killed in the middle of its second epoch, while writing a checkpoint, just before putting it in place, and
    between the last checkpoint and its history; and continued with another number of workers."""
    out = tmp_path / 'run'
    for instant, epochs in (('epoch', 1), ('write', 1), ('replace', 1)):
        done = start(photographs, '--epochs', 3, '--out', out, '--resume', instant=instant)
        assert done.returncode == -signal.SIGKILL
        assert ('resumed from epoch 1' in done.stderr) == (instant != 'epoch')
        assert len(torch.load(out / 'last.pt', weights_only=True)['history']) == epochs
        assert (out / 'last.pt.tmp').exists() == (instant != 'epoch')
    assert start(photographs, '--epochs', 3, '--out', out, '--resume', '--workers', 1, instant='last').returncode == -signal.SIGKILL
    done = start(photographs, '--epochs', 3, '--out', out, '--resume')
    assert done.returncode == 0 and 'resumed from epoch 3' in done.stderr
    assert sorted(os.listdir(out)) == sorted(os.listdir(finished[0]))
    assert history(out) == history(finished[0])
    for name in ('last.pt', 'best.pt'):
        assert same(*(torch.load(folder / name, weights_only=True) for folder in (out, finished[0])))


@POSIX
@pytest.mark.parametrize('number, workers', [(signal.SIGINT, 1), (signal.SIGTERM, 0)])
def test_a_signal_ends_with_one_line_that_says_how_to_continue(photographs, tmp_path, number, workers):
    out = tmp_path / 'run'
    with subprocess.Popen(command(photographs, '--epochs', 1000, '--out', out, '--workers', workers), stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, encoding='utf-8', start_new_session=True) as process:
        for _ in range(2):
            assert LINE.fullmatch(process.stdout.readline().rstrip())
        os.killpg(process.pid, number)  # as a terminal does: the loader's processes get it too
        _, errors = process.communicate(timeout=60)
    lines = errors.splitlines()
    assert process.returncode == 130 and len(lines) == 2, errors
    saved = len(torch.load(out / 'last.pt', weights_only=True)['history'])
    assert saved >= 1 and f'the state after epoch {saved}; continue with python chapter2_2_train.py --out "{out}" --resume' in lines[1]


@pytest.mark.skipif(sys.platform != 'linux' or os.geteuid() != 0, reason='only root on Linux can make a small file system')
def test_a_full_disk_ends_in_one_line_and_keeps_what_was_saved(photographs, tmp_path):
    """300 MB hold the first checkpoint (154 MB and 51 MB of best weights), and the next one not beside it."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=300m', 'none', disk], capture_output=True).returncode:
        pytest.skip('mounting is not allowed here')
    try:
        done = start(photographs, '--epochs', 3, '--out', disk / 'run', instant='full disk')
        assert done.returncode == 1 and done.stderr.count('\n') == 2
        assert f'{os.strerror(errno.ENOSPC)}; what was saved before is whole' in done.stderr.splitlines()[-1]
        assert len(torch.load(disk / 'run' / 'last.pt', weights_only=True)['history']) == 1
        assert not list(disk.glob('run/*.tmp'))
    finally:
        subprocess.run(['umount', disk], check=True)


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_state_before(call, photographs, tmp_path, monkeypatch):
    train_epoch = train.train_epoch
    losses = iter([1., float('nan')])
    monkeypatch.setattr(train, 'save_seconds', 0)
    monkeypatch.setattr(train, 'train_epoch', lambda *arguments: (train_epoch(*arguments)[0], next(losses)))
    done = call(train.main, '--data-dir', photographs, '--out', 'run', '--device', 'cpu')
    assert done.returncode == 1 and 'epoch 2: the loss is no longer a number; run holds the state after epoch 1' in done.stderr
    last = torch.load(tmp_path / 'run' / 'last.pt', weights_only=True)
    assert [row['epoch'] for row in last['history']] == [1] and len(history(tmp_path / 'run')) == 1


def test_a_file_that_another_program_holds_open_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    """What Windows answers while Excel shows history.csv."""
    def held(*_):
        raise PermissionError(errno.EACCES, 'in use')
    file = tmp_path / 'history.csv'
    file.write_text('old')
    monkeypatch.setattr(os, 'replace', held)
    train.write_text(file, 'new')
    assert file.read_text() == 'old' and os.listdir(tmp_path) == ['history.csv'] and str(file) in capsys.readouterr().err


class Malicious:
    def __reduce__(self):
        return os.mkdir, ('executed',)


@pytest.mark.parametrize('kind', ['cut off', 'empty', 'foreign', 'malicious', 'no numbers'])
def test_a_bad_checkpoint_gives_one_line_and_is_not_executed(call, finished, tmp_path, kind):
    out = tmp_path / 'run'
    out.mkdir()
    (out / 'settings.json').write_bytes((finished[0] / 'settings.json').read_bytes())
    for name in ('last.pt', 'best.pt'):
        if kind == 'no numbers':
            state = torch.load(finished[0] / name, weights_only=True)
            state['model']['4.bias'][3] = float('nan')
            torch.save(state, out / name)
        elif kind == 'foreign':
            torch.save({'model': {'weight': torch.zeros(3)}}, out / name)
        else:
            content = {'cut off': (finished[0] / name).read_bytes()[:-1000], 'empty': b'', 'malicious': pickle.dumps(Malicious(), 2)}
            (out / name).write_bytes(content[kind])
    for arguments in (['--resume'], ['--predict', 'dinner.jpg']):
        done = call(train.main, '--out', out, '--device', 'cpu', *arguments)
        assert done.returncode == 1 and done.stderr.count('\n') == 1 and f'{out / "best.pt"} is damaged' in done.stderr
    (out / 'best.pt').write_bytes((finished[0] / 'best.pt').read_bytes())
    done = call(train.main, '--out', out, '--device', 'cpu', '--resume')
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and f'{out / "last.pt"} is damaged' in done.stderr
    assert not (tmp_path / 'executed').exists()


# ---------------------------------------------------------------------- several processes

class Linear(nn.Sequential):  # without batch norm, whose numbers hang on how many images a process has
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(3 * 128 * 128, 11))


# What torchrun starts twice: process 1 dies in the second epoch of the first attempt, when process 0 has saved the first.
SHARED = f'''
import os, sys, time
sys.path[:0] = {str(ROOT)!r}, {str(ROOT / 'tests')!r}
import chapter2_1_data as data, chapter2_2_train as train, conftest, test_run
train.Classifier = getattr(test_run, sys.argv.pop(1))
train.save_seconds, train_epoch = 0, train.train_epoch
def train_epoch_or_die(*arguments):
    if '[002' in arguments[-1] and os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':
        while not os.path.exists(sys.argv[sys.argv.index('--out') + 1] + '/last.pt'): time.sleep(.1)
        os.kill(os.getpid(), 9)
    return train_epoch(*arguments)
train.train_epoch = train_epoch_or_die
if __name__ == '__main__':
    data.run(train.main)
'''


@pytest.fixture
def torchrun(tmp_path):
    """Trains a network of this module in two processes on 11 photographs in batches of 4, 4 and 3."""
    data.draw_food11(tmp_path / 'food', training=1, validation=1)
    (tmp_path / 'shared.py').write_text(SHARED)

    def start(network, *arguments, restarts=0):
        return subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '--max-restarts',
                               str(restarts), 'shared.py', network, '--data-dir', 'food', '--batch-size', '4', '--device', 'cpu',
                               *map(str, arguments)], cwd=tmp_path, capture_output=True, encoding='utf-8', timeout=120)
    return start


@POSIX
def test_two_processes_of_which_one_dies_and_is_restarted_train_as_one_does(call, torchrun, tmp_path, monkeypatch):
    done = torchrun('Linear', '--epochs', 3, '--out', 'two', '--resume', '--no-amp', restarts=1)
    assert done.returncode == 0, done.stderr
    assert 'resumed from epoch 1' in done.stderr and done.stdout.count('[001/003]') == done.stdout.count('[003/003]') == 1
    monkeypatch.setattr(train, 'Classifier', Linear)
    arguments = ['--data-dir', 'food', '--batch-size', 4, '--device', 'cpu', '--out']
    assert call(train.main, *arguments, 'one', '--epochs', 3, '--no-amp').returncode == 0
    for two, one in zip(history(tmp_path / 'two'), history(tmp_path / 'one'), strict=True):
        assert [float(value) for value in two.values()] == pytest.approx([float(value) for value in one.values()], rel=1e-3)
    two, one = (torch.load(tmp_path / name / 'last.pt', weights_only=True)['optimizer']['state'] for name in ('two', 'one'))
    assert two[0]['step'] == one[0]['step'] == 9
    done = call(train.main, *arguments, 'two', '--epochs', 4, '--resume')  # in one process
    assert done.returncode == 0 and done.stdout.startswith('[004/004]')


@POSIX
def test_a_process_that_dies_ends_the_run_of_two(torchrun, tmp_path):
    done = torchrun('Small', '--out', 'run')
    assert done.returncode != 0 and done.stdout.count('\n') == 1 and '[rank' not in done.stderr
    last = torch.load(tmp_path / 'run' / 'last.pt', weights_only=True)
    model = train.Classifier()
    model.load_state_dict(last['model'])
    val_x, val_y = data.readfile(tmp_path / 'food' / 'validation')
    with train.mixed_precision(CPU)[0]:
        right = (train.probabilities(model, val_x, CPU).argmax(1) == val_y).mean()
    assert last['history'][-1]['epoch'] == 1 and last['history'][-1]['val_acc'] == pytest.approx(right)


def test_batches_that_the_processes_cannot_share_are_refused(call, photographs, monkeypatch):
    monkeypatch.setattr(train, 'process', lambda: (0, 3))
    monkeypatch.setattr(train, 'join_processes', lambda device: None)
    monkeypatch.setattr(train, 'of_first', lambda value: value)
    for size, message in ((4, '3 processes cannot share batches of 4'), (9, 'the last batch has only 1 images for 3 processes')):
        done = call(train.main, '--data-dir', photographs, '--batch-size', size, '--device', 'cpu')
        assert done.returncode == 1 and message in done.stderr and done.stderr.count('\n') == 1


@pytest.mark.parametrize('arguments', [['--data-dir', 'nowhere'], ['--epochs', 'x']])
def test_a_mistake_is_left_to_process_0_to_tell(call, monkeypatch, arguments):
    """The others end later, lest torchrun stops process 0 before it has said it."""
    waited = []
    monkeypatch.setattr(data, 'process', lambda: (1, 2))
    monkeypatch.setattr(time, 'sleep', waited.append)
    done = call(train.main, '--device', 'cpu', *arguments)
    assert done.returncode != 0 and waited == [5] and done.stdout == ''


def test_only_process_0_predicts(call, finished, photographs, monkeypatch):
    monkeypatch.setattr(train, 'process', lambda: (1, 2))
    done = call(train.main, '--out', finished[0], '--device', 'cpu', '--predict', photographs / 'validation')
    assert done.returncode == 0 and done.stdout == '' and not (finished[0] / 'predict.csv').exists()


@pytest.mark.skipif(sys.platform != 'linux' or os.geteuid() != 0, reason='only root on Linux can make a small file system')
@pytest.mark.parametrize('workers', [0, 2])
def test_little_shared_memory(tmp_path, photographs, workers):
    """300 kB, of which the 10 photographs would take 491; processes are not forked."""
    script = tmp_path / 'script.py'
    script.write_text(f"""
import multiprocessing, sys
sys.path[:0] = {str(ROOT)!r}, {str(ROOT / 'tests')!r}
import chapter2_1_data as data, chapter2_2_train as train, conftest
train.Classifier = conftest.Small
if __name__ == '__main__':
    multiprocessing.set_start_method('spawn')
    data.run(train.main)
""")
    inner = ['sh', '-c', 'mount -t tmpfs -o size=300k none /dev/shm || exit 77; exec "$@"', 'sh', sys.executable, str(script),
             '--data-dir', str(photographs), '--batch-size', '10', '--epochs', '1', '--device', 'cpu', '--workers', str(workers)]
    done = subprocess.run(['unshare', '-m', *inner], cwd=tmp_path, capture_output=True, encoding='utf-8', timeout=120)
    if done.returncode == 77 or 'unshare' in done.stderr:
        pytest.skip('mounting is not allowed here')
    errors = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert (done.returncode, len(errors)) == ((1, 1) if workers else (0, 0)), done.stderr
    assert 'Traceback' not in done.stderr and (not workers or '--shm-size' in errors[0])


# ---------------------------------------------------------------------- seen and used

def test_predict_names_three_classes_and_writes_kaggles_table(call, finished, photographs, tmp_path):
    folder = tmp_path / '测试'
    folder.mkdir()
    for i in range(3):
        (folder / f'000{i}.jpg').write_bytes((photographs / 'validation' / f'{i}_0.jpg').read_bytes())
    (folder / '0001.jpg').write_bytes(b'no photograph')
    done = call(train.main, '--out', finished[0], '--device', 'cpu', '--predict', folder / '0000.jpg', 'gone.jpg', folder)
    assert done.returncode == 1
    errors = done.stderr.splitlines()
    assert [error.split(':')[0] for error in errors] == ['gone.jpg', str(folder / '0001.jpg')]
    single, summary = done.stdout.splitlines()
    model = train.Classifier()
    train.load(finished[0] / 'best.pt', CPU, model)
    x = np.stack([data.read_image(folder / name) for name in ('0000.jpg', '0002.jpg')])
    chances = train.probabilities(model, x, CPU)
    assert np.allclose(chances.sum(1), 1)
    expected = [f'{data.CLASSES[label]} {chances[0, label]:.1%}' for label in np.argsort(-chances[0])[:3]]
    assert single == f'{folder / "0000.jpg"}: {", ".join(expected)}'
    assert '2 of 3 photographs' in summary and str(finished[0] / 'predict.csv') in summary
    table = (finished[0] / 'predict.csv').read_bytes().decode()
    assert table == f'Id,Category\n0,{chances[0].argmax()}\n2,{chances[1].argmax()}\n'
    (finished[0] / 'predict.csv').unlink()


def test_predict_takes_one_folder_with_photographs(call, finished, tmp_path):
    (tmp_path / 'empty').mkdir()
    for folders, message in ((['empty'], 'no photographs in empty'), (['empty', '.'], 'one folder at a time')):
        done = call(train.main, '--out', finished[0], '--device', 'cpu', '--predict', *folders)
        assert done.returncode == 1 and message in done.stderr and done.stderr.count('\n') == 1


def test_predicting_waits_for_no_library_that_it_does_not_need():
    done = subprocess.run([sys.executable, '-c', 'import sys, chapter2_2_train; print(*sys.modules)'], cwd=ROOT,
                          capture_output=True, encoding='utf-8')
    assert not {'torchvision', 'matplotlib'} & set(done.stdout.split())


def test_a_dream_brightens_what_its_class_is_known_by_and_nothing_else():
    """For a network that tells class i by the brightness of the i-th band of 11 rows, and cares for nothing else."""
    weights = torch.zeros(11, 3, 128, 128)
    for label in range(11):
        weights[label, :, 11 * label:11 * label + 11] = .01
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 128 * 128, 11, bias=False))
    model[1].weight.data = weights.flatten(1)
    images, chances = train.dream(model, CPU, steps=60)
    assert images.shape == (11, 128, 128, 3) and images.min() >= 0 and images.max() <= 1
    for label, image in enumerate(images):
        bands = image[:121].reshape(11, -1).mean(1)
        assert bands.argmax() == label and bands[label] > .3
        assert all(band < .1 for i, band in enumerate(bands) if 2 < abs(i - label) < 9)  # the image is shifted in a ring
        assert chances[label] > .9


def test_dreams_are_drawn_from_a_runs_best_weights(call, finished, monkeypatch):
    monkeypatch.setattr(train.dream, '__defaults__', (1,))  # one step does
    done = call(train.main, '--out', finished[0], '--dreams', '--device', 'cpu')
    assert done.returncode == 0 and 'dreams.png' in done.stdout
    (finished[0] / 'dreams.png').unlink()


def test_the_use_of_a_run_needs_one(call, tmp_path):
    for arguments in (['--resume'], ['--predict', 'x.jpg'], ['--dreams']):
        assert call(train.main, *arguments).returncode == 2
    done = call(train.main, '--out', 'nowhere', '--dreams', '--device', 'cpu')
    assert done.returncode == 1 and 'no best.pt in nowhere' in done.stderr and not (tmp_path / 'nowhere').exists()


def test_the_curves_mark_the_best_epoch():
    rows = [dict(zip(train.HISTORY, (epoch, 1., .1 * epoch, 2., acc, 1.5))) for epoch, acc in ((1, .2), (2, .6), (3, .4))]
    figure = train.draw_curves(rows)
    assert [axes.get_title() for axes in figure.axes] == ['accuracy', 'mean cross-entropy per image']
    for axes, value in zip(figure.axes, ('0.600', '1.500')):
        assert f'best: epoch 2, {value}' in [text.get_text() for text in axes.get_legend().get_texts()]
    assert figure.axes[0].lines[1].get_ydata().tolist() == [.2, .6, .4]


def test_the_confusion_shows_counts_shares_and_a_class_without_images():
    counts = np.zeros((11, 11), int)
    counts[0, 0], counts[0, 9], counts[10, 10] = 3, 1, 5
    axes, = train.draw_confusion(counts).axes
    texts = {(text.get_position(), text.get_text()) for text in axes.texts}
    assert {((0, 0), '3\n75%'), ((9, 0), '1\n25%'), ((10, 10), '5\n100%'), ((5.0, 3), 'no images of this class')} <= texts
    assert [label.get_text() for label in axes.get_yticklabels()] == list(data.CLASSES)
    assert '88.9%' in axes.get_title()


def test_pictures_of_photographs_have_true_colours():
    blue = np.zeros((1, 128, 128, 3), np.uint8)
    blue[..., 0] = 255  # BGR
    axes = train.draw_grid(blue, ['Rice'], 2, 'title').axes
    assert (axes[0].images[0].get_array() == (0, 0, 255)).all() and axes[0].get_title() == 'Rice' and not axes[1].images
