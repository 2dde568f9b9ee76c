"""chapter2_2_train.py: the network, its training, the printed line, and where it runs."""
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import chapter2_1_data as data
import chapter2_2_train as train
from tests.conftest import ROOT
from tests.fake_food11 import draw_food11

LINE = re.compile(r'\[(\d{3})/(\d{3,})\] \d+\.\d\d sec\(s\) Train Acc: (\d\.\d{6}) '
                  r'Loss: (\d+\.\d{6}) \| Val Acc: (\d\.\d{6}) loss: (\d+\.\d{6})')
CPU = torch.device('cpu')
POSIX = pytest.mark.skipif(os.name == 'nt', reason='signals and terminals of POSIX')


# ---- The network -----------------------------------------------------------------------------

def test_the_books_layers_shapes_and_parameters():
    model = train.Classifier()
    assert sum(p.numel() for p in model.parameters()) == 12_833_803
    names = [type(layer).__name__ for layer in model.convolution]
    assert names == ['Conv2d', 'BatchNorm2d', 'ReLU', 'MaxPool2d'] * 5
    names = [type(layer).__name__ for layer in model.fc]
    assert names == ['Linear', 'ReLU', 'Linear', 'ReLU', 'Linear']
    x = torch.rand(2, 3, 128, 128)
    shapes = []
    for layer in model.convolution:
        x = layer(x)
        if isinstance(layer, nn.MaxPool2d):
            shapes.append(tuple(x.shape[1:]))
    assert shapes == [(64, 64, 64), (128, 32, 32), (256, 16, 16), (512, 8, 8), (512, 4, 4)]
    assert x.flatten(1).shape == (2, 8192)
    assert model(torch.rand(2, 3, 128, 128)).shape == (2, 11)


def receptive_field(layers, size, cell):
    """Height and width of the input region that one cell of the last map sees, by autograd."""
    layers = nn.Sequential(*layers).eval()
    x = torch.zeros(1, 3, size, size, requires_grad=True)
    y = layers(x)
    y[0, :, cell, cell].sum().backward()
    rows, columns = torch.nonzero(x.grad[0].abs().sum(0), as_tuple=True)
    return (rows.max() - rows.min() + 1).item(), (columns.max() - columns.min() + 1).item()


def test_one_cell_of_the_last_map_sees_94_pixels_each_way():
    layers = []
    for layer in train.Classifier().convolution:
        # What hides a pixel by chance makes way for what does not.
        if isinstance(layer, nn.Conv2d):
            nn.init.ones_(layer.weight)
        visible = {nn.MaxPool2d: nn.AvgPool2d(2), nn.ReLU: nn.Identity()}
        layers.append(visible.get(type(layer), layer))
    assert receptive_field(layers, 128, cell=1) == (94, 94)


def test_the_facts_of_chapter_1():
    pixels = torch.tensor([[12., 3, 5], [4, 6, 2], [4, 7, 9]])
    kernel = torch.tensor([[0., 1, 0], [1, 0, -1], [0, -1, 0]])
    assert F.conv2d(pixels[None, None], kernel[None, None]).item() == -2
    assert nn.Conv2d(1, 1, 3)(torch.rand(1, 1, 5, 6)).shape[2:] == (3, 4)
    maps = nn.Conv2d(1, 1, 3)(torch.rand(1, 1, 100, 100))
    assert maps.shape[2:] == (98, 98) and nn.MaxPool2d(2)(maps).shape[2:] == (49, 49)
    assert receptive_field([nn.Conv2d(3, 1, 3)], 20, 5) == (3, 3)
    assert receptive_field([nn.Conv2d(3, 1, 3), nn.Conv2d(1, 1, 3)], 20, 5) == (5, 5)
    assert receptive_field([nn.Conv2d(3, 1, 5)], 20, 5) == (5, 5)
    assert nn.Conv2d(10, 8, 3).weight.shape == (8, 10, 3, 3)


# ---- Training --------------------------------------------------------------------------------

def test_training_learns_the_drawn_dishes(scripts, tmp_path):
    draw_food11(tmp_path / 'food', training=12, validation=6)
    for file in (tmp_path / 'food').glob('*/*.jpg'):
        if not file.name.startswith(('3_', '9_')):  # eggs and soups
            file.unlink()
    done = scripts.call('--data-dir', 'food', '--epochs', 8, '--batch-size', 6, '--lr', '1e-4',
                        '--device', 'cpu')
    assert done.returncode == 0, done.stderr
    lines = [LINE.fullmatch(line).groups() for line in done.stdout.splitlines()[:8]]
    assert [line[:2] for line in lines] == [(f'00{epoch}', '008') for epoch in range(1, 9)]
    assert float(lines[-1][3]) < float(lines[0][3]) / 3
    assert max(float(line[4]) for line in lines) > .9


def linear_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 128 * 128, 11))


def test_accuracy_and_loss_count_every_image_once(food11):
    """44 images in batches of 16, 16 and 12, 22 in batches of 16 and 6, against all at once."""
    train_x, train_y, val_x, val_y = data.read_food11(food11)
    train_set = data.ImgDataset(train_x, train_y, data.test_transform)
    val_set = data.ImgDataset(val_x, val_y, data.test_transform)
    train_loader, val_loader = data.make_loaders(train_set, val_set, 16)
    model = linear_network()
    modes = []
    model.register_forward_hook(lambda *_: modes.append(model.training))
    optimizer = torch.optim.Adam(model.parameters(), lr=0)
    results = [train.train_epoch(model, train_loader, nn.CrossEntropyLoss(), optimizer, CPU,
                                 nullcontext(), torch.amp.GradScaler('cpu', enabled=False)),
               train.evaluate(model, val_loader, CPU, nullcontext())]
    assert modes == [True] * 3 + [False] * 2
    for dataset, (accuracy, loss) in zip((train_set, val_set), results):
        x, y = zip(*[dataset[i] for i in range(len(dataset))])
        scores, y = model(torch.stack(x)), torch.stack(y)
        assert accuracy == pytest.approx((scores.argmax(1) == y).double().mean().item())
        assert loss == pytest.approx(F.cross_entropy(scores, y).item(), abs=2e-6)


def test_evaluate_leaves_the_network_as_it_is(food11):
    val_x, val_y = data.readfile(food11 / 'validation')
    val_set = data.ImgDataset(val_x, val_y, data.test_transform)
    _, val_loader = data.make_loaders(val_set, val_set, 8)
    model = train.Classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train.evaluate(model, val_loader, CPU, nullcontext())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_same_seed_gives_the_same_numbers_also_with_workers(small, few):
    def numbers(*arguments):
        done = small.call('--data-dir', few, '--epochs', 1, '--batch-size', 4, '--device', 'cpu',
                          *arguments)
        assert done.returncode == 0, done.stderr
        return LINE.fullmatch(done.stdout.splitlines()[0]).groups()
    first = numbers('--seed', 5)
    assert first == numbers('--seed', 5) != numbers('--seed', 6)
    if sys.platform == 'linux':  # elsewhere the workers would have to import the edited script
        assert first == numbers('--seed', 5, '--workers', 2)


# ---- The script ------------------------------------------------------------------------------

@POSIX
def test_the_books_settings_are_the_defaults(scripts, food11, tmp_path):
    """Started without arguments, and interrupted in the second epoch."""
    shutil.copytree(food11, tmp_path / 'food-11')
    with subprocess.Popen(scripts.command(), cwd=tmp_path, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, encoding='utf-8') as process:
        line = process.stdout.readline().rstrip()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert LINE.fullmatch(line).groups()[:2] == ('001', '100')
    settings = (tmp_path / 'runs' / '001' / 'settings.json').read_text()
    assert '"epochs": 100' in settings and '"batch_size": 128' in settings
    assert '"lr": 0.001' in settings and '"seed": 0' in settings and 'food-11"' in settings
    assert process.returncode == 130 and len(errors.splitlines()) == 4
    assert 'PyTorch finds no GPU' in errors and 'holds no checkpoint yet; give the same' in errors


def test_the_demo_has_settings_of_its_own_and_leaves_food_11_alone(small, tmp_path):
    (tmp_path / 'food-11').mkdir()
    done = small.call('--demo', '--device', 'cpu')
    assert done.returncode == 0 and done.stdout.count('/005]') == 5
    settings = (tmp_path / 'runs' / '001' / 'settings.json').read_text()
    assert '"batch_size": 16' in settings and '"lr": 0.0001' in settings
    assert len(os.listdir(tmp_path / 'food-11-demo' / 'training')) == 330
    assert not os.listdir(tmp_path / 'food-11')
    # As how_to_continue says, without --demo.
    out = Path('runs', '001')
    assert small.call('--out', out, '--resume', '--device', 'cpu').returncode == 0
    done = small.call('--out', out, '--resume', '--device', 'cpu', '--data-dir', 'food-11')
    assert done.returncode == 1 and 'started with --demo' in done.stderr


def test_stdout_has_the_epochs_and_the_table_and_nothing_else(small, few):
    done = small.call('--data-dir', few, '--epochs', 2, '--batch-size', 4, '--device', 'cpu')
    assert done.returncode == 0
    device, folder = done.stderr.splitlines()
    assert device.startswith('device cpu, precision ') and str(Path('runs', '001')) in folder
    lines = done.stdout.splitlines()
    assert all(map(LINE.fullmatch, lines[:2])) and lines[2].split()[:2] == ['with', 'the']
    assert lines[6].split() == ['3', 'Egg', '0', '0', '-'] and len(lines) == 15


@POSIX
def test_a_terminal_shows_progress_bars(small, few, tmp_path):
    import fcntl
    import pty
    import struct
    import termios
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack('4H', 24, 100, 0, 0))  # rows, columns
    with open(end, 'w') as stderr:
        done = small.call('--data-dir', few, '--epochs', '1', '--batch-size', '1', stderr=stderr)
    seen = b''
    while chunk := read(terminal):
        seen += chunk
    assert done.returncode == 0 and LINE.fullmatch(done.stdout.splitlines()[0])
    assert b'reading:' in seen and b'[001/001]:' in seen and b'[001/001] validation:' in seen


def read(terminal):
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # Linux says so at the end
        return b''


@pytest.mark.parametrize('arguments, word', [
    (['--device', 'toaster'], 'toaster'),
    (['--device', 'cuda:99'], 'cuda:99'),
    (['--device', 'cpu', '--data-dir', 'nowhere'], 'nowhere'),
])
def test_mistakes_end_in_one_line(scripts, arguments, word):
    done = scripts.call(*arguments)
    assert done.returncode == 1 and done.stdout == ''
    error = done.stderr.splitlines()[-1]
    assert error.startswith('error: ') and word in error and 'Traceback' not in done.stderr


def test_a_full_gpu_ends_in_one_line(scripts):
    def main():
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has ...')
    done = scripts.call(main=main)
    assert done.returncode == 1 and done.stderr.count('\n') == 1
    assert done.stderr.startswith('error: CUDA out of memory') and 'README.md' in done.stderr


@pytest.mark.parametrize('arguments', [
    ['--epochs', '0'], ['--batch-size', '-1'], ['--lr', 'nan'], ['--lr', '2'], ['--workers', 'x'],
    ['--seed', '-1'], ['--demo', '--data-dir', 'elsewhere']])
def test_impossible_settings_are_refused(scripts, arguments):
    done = scripts.call(*arguments)
    assert done.returncode == 2 and f'error: argument {arguments[-2]}' in done.stderr


def test_help_says_units_and_defaults(scripts):
    done = scripts.call('--help')
    text = ' '.join(done.stdout.split())
    assert done.returncode == 0 and 'python chapter2_2_train.py --demo' in text
    for default in ('(default: 100; with --demo 5)', '(default: 128; with --demo 16)',
                    '(default: 0.001; with --demo 0.0001)', '(default: best.pt)'):
        assert default in text


# ---- Device, precision, workers, memory ------------------------------------------------------

def test_the_device_is_the_accelerator_if_there_is_one(monkeypatch):
    assert train.pick_device('cpu') == CPU
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: False)
    assert train.pick_device(None) == CPU
    # meta is a device that holds no numbers.
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: True)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda: torch.device('meta'))
    with pytest.raises(data.UserError, match='device meta'):
        train.pick_device(None)
    # Processes that train together do so on CUDA or on the CPU.
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'test')
    assert train.pick_device(None) == CPU


def test_a_gpu_that_this_pytorch_has_no_kernels_for(monkeypatch):
    """Kaggle's P100 with a build for CUDA 13."""
    def fail(*_, **__):
        raise RuntimeError('CUDA error: no kernel image is available for execution on the device\n'
                           'CUDA kernel errors might be asynchronously reported')
    monkeypatch.setattr(torch, 'ones', fail)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'Tesla P100-PCIE-16GB')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (6, 0))
    with pytest.raises(data.UserError) as error:
        train.pick_device('cuda')
    for words in ('no kernel image', 'Tesla P100-PCIE-16GB', '6.0', 'README.md', '--device cpu'):
        assert words in str(error.value)
    assert '\n' not in str(error.value)


def test_more_processes_than_gpus(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError('CUDA error: invalid device ordinal')
    monkeypatch.setattr(torch, 'ones', fail)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'test')
    monkeypatch.setenv('LOCAL_RANK', '2')
    with pytest.raises(data.UserError, match='device cuda:2 here.* 2 CUDA GPUs .*-per-node 2'):
        train.pick_device('cuda')


def test_the_first_lines_say_what_the_run_uses(monkeypatch, capsys):
    settings = {'no_amp': False}
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'NVIDIA A100')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    train.print_hardware(torch.device('cuda'), None, settings, 15, 1)
    hint, line = capsys.readouterr().err.splitlines()
    assert 'torchrun --nproc-per-node 4' in hint
    assert line == 'device cuda (NVIDIA A100), precision bfloat16, loader workers 15, processes 1'
    train.print_hardware(torch.device('cuda', 0), None, settings, 15, 4)
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize('name, capability, dtype', [
    ('NVIDIA H100', (9, 0), torch.bfloat16), ('Tesla T4', (7, 5), torch.float16),
    ('NVIDIA GeForce GTX 1650', (7, 5), torch.float32), ('Tesla P4', (6, 1), torch.float32)])
def test_a_gpu_computes_in_what_it_is_fast_in(monkeypatch, name, capability, dtype):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    cuda = torch.device('cuda')
    assert train.fastest_dtype(cuda, no_amp=False) == dtype
    assert train.fastest_dtype(cuda, no_amp=True) == torch.float32
    assert train.fastest_dtype(torch.device('mps'), no_amp=False) == torch.float32


@pytest.mark.parametrize('supported', [True, False])
def test_a_cpu_computes_in_bfloat16_only_if_it_supports_it(monkeypatch, supported):
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: supported)
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: False)
    autocast, scaler = train.mixed_precision(CPU, no_amp=False)
    with autocast:
        computed = nn.Linear(3, 3)(torch.rand(2, 3)).dtype
    assert (computed == torch.bfloat16) == supported and not scaler.is_enabled()


def machine(monkeypatch, cores, quota='max 100000'):
    """A machine with these cores, in a container with this quota."""
    monkeypatch.setattr(os, 'process_cpu_count', lambda: cores, raising=False)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(cores)), raising=False)
    read_text, exists = Path.read_text, Path.exists

    def is_quota(path):
        return path.as_posix() == '/sys/fs/cgroup/cpu.max'
    monkeypatch.setattr(Path, 'read_text', lambda path, *arguments, **options:
                        quota if is_quota(path) else read_text(path, *arguments, **options))
    monkeypatch.setattr(Path, 'exists', lambda path: is_quota(path) or exists(path))


@pytest.mark.parametrize('quota, processes, cores', [
    ('max 100000', 1, 16), ('400000 100000', 1, 4), ('150000 100000', 1, 2), ('max 100000', 4, 4),
    ('10000 100000', 4, 1)])
def test_cores_of_a_container_and_of_several_processes(monkeypatch, quota, processes, cores):
    machine(monkeypatch, 16, quota)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))
    assert train.available_cores() == cores


@pytest.mark.parametrize('cores, free, workers', [
    (16, 2**34, 15), (2, 2**34, 1), (1, 2**34, 0), (64, 2**34, 16), (16, 64 * 2**20, 2),
    (16, 2**20, 0)])
def test_workers_by_default(monkeypatch, capsys, cores, free, workers):
    machine(monkeypatch, cores)
    monkeypatch.setattr(sys, 'platform', 'linux')
    monkeypatch.setattr(os.path, 'isdir', lambda path: True)
    monkeypatch.setattr(shutil, 'disk_usage',
                        lambda path: shutil._ntuple_diskusage(2**34, 2**34 - free, free))
    assert train.choose_workers(None, torch.device('cuda'), 128, rank=0) == workers
    hint = capsys.readouterr().err
    assert ('--shm-size' in hint) == (free < 2**30) and hint.count('\n') <= 1
    assert train.choose_workers(None, CPU, 128, rank=0) == 0
    assert train.choose_workers(3, CPU, 128, rank=0) == 3


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='of glibc')
def test_memory_is_kept_for_the_next_step_where_there_is_plenty():
    """Of the pages that 64 MiB need, the system gives none anew once they have been there; but
    for huge batches it does."""
    code = """if True:
        import resource, torch, chapter2_2_train
        faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for batch_size in 10**9, 1:
            chapter2_2_train.tune_pytorch(torch.device('cpu'), batch_size)
            for i in range(15):
                before = before if i > 12 else faults()
                torch.ones(2**24)
            print(faults() - before)
    """
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE,
                          check=True)
    given_back, kept = map(int, done.stdout.split())
    assert kept < 10 < given_back


def test_too_little_memory_names_the_batch_size(scripts, food11, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 64 GiB')
    monkeypatch.setattr(F, 'conv2d', full)
    monkeypatch.setattr(nn.Conv2d, 'forward', full)
    done = scripts.call('--data-dir', food11, '--device', 'cpu')
    assert done.returncode == 1 and done.stderr.count('\n') == 3
    assert 'batches of 128 images' in done.stderr and 'smaller --batch-size' in done.stderr


def test_a_worker_that_dies_ends_the_run_in_one_line(edited, few):
    """The worker is killed, as Linux does when memory runs out."""
    dying = edited({'    transforms.RandomRotation(15),': '    Die(),',
                    'train_transform = transforms.Compose([':
                        'class Die:\n'
                        '    def __call__(self, image):\n'
                        '        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))\n'
                        '\n\ntrain_transform = transforms.Compose(['})
    # Where workers are not forked, they must be able to import the edited script.
    start = dying.call if sys.platform == 'linux' else dying.run
    done = start('--data-dir', few, '--device', 'cpu', '--workers', 1)
    assert done.returncode == 1 and done.stderr.count('\n') == 3, done.stderr
    assert 'a worker process has died' in done.stderr.splitlines()[-1]


@POSIX
def test_ctrl_c_that_python_swallows_can_be_pressed_again():
    """Python drops exceptions that are raised in a callback or __del__."""
    numbers = (signal.SIGINT, signal.SIGCHLD)
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        signal.signal(signal.SIGINT, data.interrupt)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
            # torchrun's SIGTERM after a Ctrl-C is no second one.
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.1)
    finally:
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)


def test_an_engineers_mistake_keeps_its_traceback(edited, few):
    broken = edited({'    transforms.RandomRotation(15),': '    lambda image: 1 / 0,'})
    with pytest.raises(ZeroDivisionError):
        broken.call('--data-dir', few, '--device', 'cpu')
    broken = edited({'    transforms.RandomRotation(15),': '    lambda image: open("none.png"),'})
    with pytest.raises(RuntimeError) as error:
        broken.call('--data-dir', few, '--device', 'cpu')
    assert isinstance(error.value.__cause__, FileNotFoundError)
    if sys.platform == 'linux':
        with pytest.raises(RuntimeError) as error:
            broken.call('--data-dir', few, '--device', 'cpu', '--workers', 1)
        assert isinstance(error.value.__cause__, FileNotFoundError)
    broken = edited({'cv2.IMREAD_COLOR': 'cv2.IMREAD_GRAYSCALE'})
    with pytest.raises(ValueError, match='broadcast'):
        broken.call('--data-dir', few, '--device', 'cpu')
