"""chapter2_2_train.py: the network, its training, the printed line, and where it runs."""
import contextlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import chapter2_1_data as data
import chapter2_2_train as train
from tests.conftest import SMALL
from tests.fake_food11 import draw_food11

LINE = re.compile(r'\[(\d{3})/(\d{3,})\] \d+\.\d\d sec\(s\) Train Acc: (\d\.\d{6}) '
                  r'Loss: (\d+\.\d{6}) \| Val Acc: (\d\.\d{6}) loss: (\d+\.\d{6})')
CPU, CUDA = torch.device('cpu'), torch.device('cuda', 0)
RESUME = ('--out', 'run', '--resume', '--epochs', 5, '--device', 'cpu')
SAVED_AT_THE_END = {old: new for old, new in SMALL.items() if not old.startswith('save_seconds')}
POSIX = pytest.mark.skipif(os.name == 'nt', reason='signals and terminals of POSIX')


@contextlib.contextmanager
def at_step(number, action):
    """Calls `action` in the step with this number, counted from 1, in which the small network
    computes. Validation has steps too."""
    steps = itertools.count(1)

    def count(module, inputs):
        if isinstance(module, nn.Flatten) and next(steps) == number:
            action()
    with nn.modules.module.register_module_forward_pre_hook(count):
        yield


# ---- The network and its training ------------------------------------------------------------

def test_the_books_layers_and_parameters():
    model = train.Classifier()
    names = [[type(layer).__name__ for layer in part] for part in (model.convolution, model.fc)]
    assert names == [['Conv2d', 'BatchNorm2d', 'ReLU', 'MaxPool2d'] * 5,
                     ['Linear', 'ReLU', 'Linear', 'ReLU', 'Linear']]
    assert sum(p.numel() for p in model.parameters()) == 12_833_803
    assert model(torch.rand(2, 3, 128, 128)).shape == (2, 11)


def test_its_weights_are_in_the_order_that_is_fast_but_not_on_apples_gpus(monkeypatch):
    weights = train.make_model(11, CPU).convolution[4].weight
    assert weights.is_contiguous(memory_format=torch.channels_last)
    moves = []
    monkeypatch.setattr(nn.Module, 'to', lambda model, *place, **order: moves.append(order))
    train.make_model(11, torch.device('mps'))
    assert moves == [{}]


def test_training_learns_the_drawn_dishes(scripts, tmp_path):
    draw_food11(tmp_path / 'food', training=8, validation=4, class_count=2)
    done = scripts.call('--data-dir', 'food', '--epochs', 4, '--batch-size', 2, '--lr', '1e-4',
                        '--device', 'cpu')
    lines = [LINE.fullmatch(line).groups() for line in done.stdout.splitlines()[:4]]
    assert [line[:2] for line in lines] == [(f'00{epoch}', '004') for epoch in range(1, 5)]
    assert float(lines[-1][3]) < float(lines[0][3]) / 3
    assert max(float(line[4]) for line in lines) > .9


def test_accuracy_and_loss_count_every_image_once(food11):
    """44 images in batches of 16, 16 and 12, 22 in batches of 16 and 6, against all at once."""
    train_set, val_set = (data.ImgDataset(*data.readfile(food11 / split), data.test_transform)
                          for split in ('training', 'validation'))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 128 * 128, 11)).eval()
    modes = []
    model.register_forward_hook(lambda *_: modes.append((model.training, torch.is_grad_enabled())))
    optimizer, loss = torch.optim.Adam(model.parameters(), lr=0), nn.CrossEntropyLoss()
    autocast, scaler = train.mixed_precision(CPU, torch.float32)
    results = [train.train_epoch(model, DataLoader(train_set, batch_size=16, shuffle=True), loss,
                                 optimizer, autocast, scaler),
               train.evaluate(model, DataLoader(val_set, batch_size=16), loss, autocast)]
    assert modes == [(True, True)] * 3 + [(False, False)] * 2
    for dataset, (accuracy, mean_loss) in zip((train_set, val_set), results):
        x, y = next(iter(DataLoader(dataset, batch_size=44)))
        # What ToTensor would give.
        scores = model(x / 255)
        assert accuracy == pytest.approx((scores.argmax(1) == y).double().mean().item())
        assert mean_loss == pytest.approx(nn.functional.cross_entropy(scores, y).item(), abs=2e-6)


def test_training_photographs_come_in_a_new_order_in_each_epoch(edited, few):
    """Validation photographs always come in the order of their names."""
    plain = edited({'    transforms.RandomHorizontalFlip(),\n'
                    '    transforms.RandomRotation(15),': ''})
    orders = {True: [], False: []}

    def see(module, inputs):
        if isinstance(module, nn.Sequential):
            orders[module.training].append(hash(inputs[0].numpy().tobytes()))
    with nn.modules.module.register_module_forward_pre_hook(see):
        plain.call('--data-dir', few, '--epochs', 3, '--batch-size', 1, '--device', 'cpu')
    epochs = [tuple(orders[True][i:i + 10]) for i in (0, 10, 20)]
    assert len(set(epochs)) == 3 and len({frozenset(epoch) for epoch in epochs}) == 1
    assert orders[False][:10] == orders[False][10:20] == orders[False][20:30]


def test_the_same_seed_gives_the_same_numbers(small, finished, few):
    def numbers(done):
        return LINE.fullmatch(done.stdout.splitlines()[0]).groups()[2:]
    same, other = (small.call('--data-dir', few, '--epochs', 1, '--batch-size', 4, '--device',
                              'cpu', '--seed', seed) for seed in (0, 6))
    assert numbers(finished[1]) == numbers(same) != numbers(other)


def test_a_validation_loss_that_is_no_number_ends_the_run(small, copy_of_finished):
    """Here the training loss is one. What was saved stays."""
    def overflow(module, inputs, out):
        if isinstance(module, nn.Flatten) and not module.training:
            return out * float('nan')
    last = (copy_of_finished / 'last.pt').read_bytes()
    with nn.modules.module.register_module_forward_hook(overflow):
        done = small.call(*RESUME)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and done.stdout.count('[00') == 1
    assert error.startswith('error: the loss is not a finite number') and 'lower --lr' in error
    assert (copy_of_finished / 'last.pt').read_bytes() == last


# ---- Command line and printed lines ----------------------------------------------------------

def test_the_books_options_are_the_defaults_and_a_log_has_each_line_at_once(small, few, tmp_path):
    """Ended by SIGTERM in the second epoch. An epoch has one step, and one for validation."""
    shutil.copytree(few, tmp_path / 'food-11')
    log = []

    def end():
        # What has left Python for the file.
        log.append(sys.stdout.buffer.getvalue().decode())
        signal.raise_signal(signal.SIGTERM)
    with at_step(3, end):
        done = small.call('--device', 'cpu')
    assert LINE.fullmatch(done.stdout.rstrip()).groups()[:2] == ('001', '100')
    assert log == [done.stdout]
    # PyTorch's switch for large pages of memory, with which a CPU is faster.
    assert os.environ['THP_MEM_ALLOC_ENABLE'] == '1'
    settings = json.loads((tmp_path / 'runs' / '001' / 'settings.json').read_text(encoding='utf-8'))
    del settings['classes']
    assert settings == {'data_dir': str(tmp_path / 'food-11'), 'recipe': 'book', 'epochs': 100,
                        'batch_size': 128, 'lr': 0.001, 'seed': 0, 'no_amp': False}


def test_what_is_typed_goes_before_what_the_run_has_saved_and_that_before_the_demos(
        edited, tmp_path):
    small = edited({}, base=SAVED_AT_THE_END)
    for arguments, printed in (
            (['--demo', '--epochs', 2, '--lr', 0.0002], '[001/002]'),
            (['--demo', '--resume'], 'with the best weights'),
            # As the line after an interruption says.
            (['--resume', '--epochs', 3], '[003/003]')):
        done = small.call('--device', 'cpu', '--out', 'run', *arguments)
        assert done.stdout.startswith(printed), done.stderr
        options = json.loads((tmp_path / 'run' / 'settings.json').read_text(encoding='utf-8'))
        assert (options['batch_size'], options['lr']) == (16, 0.0002)
        assert options['data_dir'] == str(tmp_path / 'food-11-demo')


def test_advice_for_few_photographs_of_ones_own(small, few, tmp_path):
    """Who follows it does not get it again."""
    draw_food11(tmp_path / 'mine', training=12, validation=1, class_count=10)
    # 120 photographs make 8 batches of 17, or 7 of 18.
    for data_dir, batch_size, advised in (('mine', 17, 0), ('mine', 18, 1), (few, 16, 0)):
        done = small.call('--data-dir', data_dir, '--epochs', 1, '--batch-size', batch_size,
                          '--device', 'cpu')
        assert done.returncode == 0, done.stderr
        assert done.stderr.count('--batch-size 16 --lr 0.0001 trains better') == advised


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


@pytest.mark.parametrize('stream', [Terminal(io.BytesIO(), 'utf-8'), io.StringIO(), None],
                         ids=['terminal', 'IDLE', 'pythonw'])
def test_where_the_streams_are_terminals_other_objects_or_none(small, few, tmp_path, stream):
    arguments = ['--data-dir', str(few), '--epochs', '1', '--device', 'cpu',
                 '--out', str(tmp_path / 'run')]
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        small.data.run_script(lambda: small.train.main(arguments))
    assert (tmp_path / 'run' / 'confusion.png').exists()
    if stream is not None:
        stream.seek(0)
        seen = stream.read()
        assert LINE.search(seen) and seen.startswith('device cpu')
        for title in ('reading:', '[001/001]:', '[001/001] validation:'):
            assert (title in seen) == isinstance(stream, Terminal)


def test_a_line_that_cannot_be_printed_ends_no_training(small, few, tmp_path):
    """stdout as after `| head -1`, and on Linux, stderr in a log on a full disk."""
    reading_end, stdout = os.pipe()
    os.close(reading_end)
    with open('/dev/full' if sys.platform == 'linux' else os.devnull, 'w') as stderr:
        # Without this variable, what could not be printed is still there when Python ends.
        done = small.run('--data-dir', few, '--epochs', 2, '--device', 'cpu', '--out', 'run',
                         stdout=stdout, stderr=stderr, env={**os.environ, 'PYTHONUNBUFFERED': ''})
    os.close(stdout)
    assert done.returncode == 0
    assert len((tmp_path / 'run' / 'history.csv').read_text().splitlines()) == 3
    assert (tmp_path / 'run' / 'mistakes.png').exists()


@pytest.mark.parametrize('arguments, word', [
    (['--data-dir', 'nowhere', '--out', 'new'], 'nowhere'), (['--out', 'file/new'], 'file')])
def test_a_start_that_fails_ends_in_one_line_and_leaves_no_folder(
        scripts, tmp_path, arguments, word):
    (tmp_path / 'file').touch()
    done = scripts.call('--device', 'cpu', *arguments)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and error.startswith('error: ') and str(tmp_path / word) in error
    assert os.listdir(tmp_path) == ['file']


@pytest.mark.parametrize('arguments', [
    '--epochs 0', '--batch-size -1', '--lr nan', '--workers -1', '--seed -1', '--resume',
    '--dreams', '--demo --data-dir elsewhere',
    # As from --out "$FOLDER", and no such variable.
    '--data-dir=', '--out='])
def test_impossible_options_are_refused(scripts, tmp_path, arguments):
    done = scripts.call(*arguments.split())
    _, error = done.stderr.splitlines()[-1].split(': error: ')
    assert done.returncode == 2 and re.match('--[a-z-]+', arguments).group() in error
    assert not os.listdir(tmp_path)


def test_help_says_units_and_defaults(scripts):
    text = ' '.join(scripts.call('--help').stdout.split())
    for words in ('python chapter2_2_train.py --demo', '(default: 100; with --demo 5)',
                  'images in a training step', '(default: 0.001; with --demo 0.0001)',
                  '(default: 128; with --recipe better 64; with --demo 16)', '(default: 0)',
                  '(default: best.pt)', '(default: ./food-11)', 'runs/001, runs/002, ...'):
        assert words in text


@pytest.mark.parametrize('error', [
    torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 64 GiB.\nGPU 0 has ...'),
    MemoryError('Unable to allocate 64 GiB for an array')], ids=str)
def test_full_memory_ends_in_one_line(small, copy_of_finished, error):
    """Of a GPU, or of the computer."""
    def fail():
        raise error
    with at_step(4, fail):
        done = small.call(*RESUME)
    goodbye, message = done.stderr.splitlines()[-2:]
    assert done.returncode == 1 and goodbye.startswith('continue with: python ')
    for words in ('error: too little memory', 'smaller --batch-size', '64 GiB'):
        assert words in message


def test_an_engineers_mistake_keeps_its_traceback(small, copy_of_finished):
    """The last line before the traceback says how to continue."""
    stderr = io.StringIO()
    with at_step(4, lambda: 1 / 0), pytest.raises(ZeroDivisionError):
        small.call(*RESUME, stderr=stderr)
    line = stderr.getvalue().splitlines()[-1]
    assert line.startswith('continue with: python ') and str(copy_of_finished) in line


# ---- Device, precision, workers --------------------------------------------------------------

def test_the_device_is_the_accelerator_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: False)
    assert train.pick_device(None) == CPU
    assert 'no GPU: see .github/install.md' in train.device_name(CPU)
    # meta is a device that holds no numbers.
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: True)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda: torch.device('meta'))
    with pytest.raises(data.UserError, match='device meta'):
        train.pick_device(None)


def test_each_process_takes_a_gpu_of_its_own_and_no_memory_on_another(monkeypatch):
    events, ones = [], torch.ones
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: events.append(str(device)))
    monkeypatch.setattr(torch, 'ones', lambda *size, device: events.append('tensor') or ones(*size))
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert train.pick_device('cuda') == torch.device('cuda', 1)
    assert train.pick_device('cuda:2') == torch.device('cuda', 2)
    assert events == ['cuda:1', 'tensor', 'cuda:2', 'tensor']


@pytest.mark.parametrize('error', [
    # Kaggle's P100 with a build for CUDA 13.
    RuntimeError('CUDA error: no kernel image\nCUDA kernel errors'),
    # Builds for CPUs, as requirements.txt brings to Windows.
    AssertionError('Torch not compiled with CUDA enabled'),
    AttributeError("module has no attribute '_cuda_setDevice'"),
    # Apple's.
    NotImplementedError(f'Could not run {"aten::empty " * 100}')])
def test_a_device_that_pytorch_cannot_use(scripts, tmp_path, monkeypatch, error):
    def fail(device):
        raise error
    monkeypatch.setattr(torch.cuda, 'set_device', fail)
    done = scripts.call('--demo', '--device', 'cuda:0')
    line, = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith('error: ') and len(line) < 400
    for words in ('cannot use the device cuda:0', 'install.md', '--device cpu',
                  str(error).partition('\n')[0][:99]):
        assert words in line
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize('name, capability, dtype', [
    ('NVIDIA H100', (9, 0), torch.bfloat16), ('Tesla T4', (7, 5), torch.float16),
    ('NVIDIA GeForce GTX 1650', (7, 5), torch.float32), ('Tesla P4', (6, 1), torch.float32)])
def test_a_gpu_computes_in_what_it_is_fast_in(monkeypatch, name, capability, dtype):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    assert train.pick_precision(CUDA, no_amp=False) == dtype
    assert train.pick_precision(CUDA, no_amp=True) == torch.float32
    assert train.device_name(CUDA) == f'cuda:0 ({name})'


@pytest.mark.parametrize('supported, dtype', [
    (True, torch.bfloat16), (False, torch.float32), (None, torch.float32)])
def test_a_cpu_computes_in_bfloat16_only_if_it_supports_it(monkeypatch, supported, dtype):
    """PyTorch's functions for this are private: a future version may not have them."""
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: supported)
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: False)
    if supported is None:
        monkeypatch.delattr(torch.cpu, '_is_avx512_bf16_supported')
        monkeypatch.delattr(torch.cpu, '_is_amx_tile_supported')
    assert train.pick_precision(CPU, no_amp=False) == dtype


@pytest.mark.parametrize('cores, processes, workers', [(16, 1, 8), (2, 1, 2), (8, 4, 2)])
def test_workers_by_default(monkeypatch, cores, processes, workers):
    """Of the computer's 64 cores, Slurm or Docker allow some."""
    monkeypatch.setattr(os, 'cpu_count', lambda: 64)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: set(range(cores)), raising=False)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))
    for platform, expected in (('linux', workers), ('win32', 2), ('darwin', 2)):
        monkeypatch.setattr(sys, 'platform', platform)
        assert train.pick_workers(None, CUDA) == expected
        assert train.pick_workers(None, CPU) == 0
        assert train.pick_workers(3, CPU) == 3
