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
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import chapter2_1_data as data
import chapter2_2_train as train
from tests.conftest import SMALL
from tests.fake_food11 import draw_food11

LINE = re.compile(r'\[(\d{3})/(\d{3,})\] \d+\.\d\d sec\(s\) Train Acc: (\d\.\d{6}) '
                  r'Loss: (\d+\.\d{6}) \| Val Acc: (\d\.\d{6}) loss: (\d+\.\d{6})')
CPU, CUDA = torch.device('cpu'), torch.device('cuda', 0)
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
    hook = nn.modules.module.register_module_forward_pre_hook(count)
    try:
        yield
    finally:
        hook.remove()


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
    draw_food11(tmp_path / 'food', training=8, validation=4)
    for file in (tmp_path / 'food').glob('*/*.jpg'):
        if not file.name.startswith(('3_', '9_')):  # eggs and soups
            file.unlink()
    done = scripts.call('--data-dir', 'food', '--epochs', 4, '--batch-size', 2, '--lr', '1e-4',
                        '--device', 'cpu')
    assert done.returncode == 0, done.stderr
    lines = [LINE.fullmatch(line).groups() for line in done.stdout.splitlines()[:4]]
    assert [line[:2] for line in lines] == [(f'00{epoch}', '004') for epoch in range(1, 5)]
    assert float(lines[-1][3]) < float(lines[0][3]) / 3
    assert max(float(line[4]) for line in lines) > .9


def test_accuracy_and_loss_count_every_image_once(food11):
    """44 images in batches of 16, 16 and 12, 22 in batches of 16 and 6, against all at once."""
    train_set, val_set = (data.ImgDataset(*data.readfile(food11 / split), data.test_transform)
                          for split in ('training', 'validation'))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 128 * 128, 11))
    modes = []
    model.register_forward_hook(lambda *_: modes.append((model.training, torch.is_grad_enabled())))
    optimizer = torch.optim.Adam(model.parameters(), lr=0)
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    results = [
        train.train_epoch(model, DataLoader(train_set, batch_size=16, shuffle=True),
                          nn.CrossEntropyLoss(), optimizer, nullcontext(), scaler),
        train.evaluate(model, DataLoader(val_set, batch_size=16), nn.CrossEntropyLoss(),
                       nullcontext())]
    assert modes == [(True, True)] * 3 + [(False, False)] * 2
    for dataset, (accuracy, loss) in zip((train_set, val_set), results):
        x, y = zip(*[dataset[i] for i in range(len(dataset))])
        # What ToTensor would give.
        scores, y = model(torch.stack(x) / 255), torch.stack(y)
        assert accuracy == pytest.approx((scores.argmax(1) == y).double().mean().item())
        assert loss == pytest.approx(F.cross_entropy(scores, y).item(), abs=2e-6)


def test_evaluate_leaves_the_network_as_it_is(small, few):
    val_set = small.data.ImgDataset(*small.data.readfile(few / 'validation'),
                                    small.data.test_transform)
    model = small.train.make_model(11, CPU)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small.train.evaluate(model, DataLoader(val_set, batch_size=4), nn.CrossEntropyLoss(),
                         nullcontext())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_training_photographs_come_in_a_new_order_in_each_epoch(edited, few):
    """Validation photographs always come in the order of their names."""
    plain = edited({'    transforms.RandomHorizontalFlip(),\n'
                    '    transforms.RandomRotation(15),': ''})
    orders = {True: [], False: []}

    def see(module, inputs):
        if isinstance(module, nn.Flatten):
            orders[module.training].append(hash(images[-1].numpy().tobytes()))
        elif isinstance(module, nn.Sequential):
            images.append(inputs[0])
    images = []
    hook = nn.modules.module.register_module_forward_pre_hook(see)
    try:
        done = plain.call('--data-dir', few, '--epochs', 3, '--batch-size', 1, '--device', 'cpu')
    finally:
        hook.remove()
    assert done.returncode == 0, done.stderr
    epochs = [tuple(orders[True][i:i + 10]) for i in (0, 10, 20)]
    assert len(set(epochs)) == 3 and len({frozenset(epoch) for epoch in epochs}) == 1
    # And once more, in one batch, for the table at the end.
    assert orders[False][:10] == orders[False][10:20] == orders[False][20:30]


def test_the_same_seed_gives_the_same_numbers(small, finished, few):
    def numbers(*arguments):
        done = small.call('--data-dir', few, '--epochs', 1, '--batch-size', 4, '--device', 'cpu',
                          *arguments)
        assert done.returncode == 0, done.stderr
        return LINE.fullmatch(done.stdout.splitlines()[0]).groups()[2:]
    first = LINE.fullmatch(finished[1].stdout.splitlines()[0]).groups()[2:]
    assert first == numbers('--seed', 0) != numbers('--seed', 6)
    if sys.platform == 'linux':  # elsewhere the workers would have to import the edited script
        assert numbers('--workers', 2) == numbers('--workers', 2)


# ---- The script ------------------------------------------------------------------------------

def test_the_books_options_are_the_defaults(small, few, tmp_path):
    """Ended by SIGTERM in the second epoch. An epoch has one step, and one for validation."""
    shutil.copytree(few, tmp_path / 'food-11')
    with at_step(3, lambda: signal.raise_signal(signal.SIGTERM)):
        done = small.call('--device', 'cpu')
    assert LINE.fullmatch(done.stdout.rstrip()).groups()[:2] == ('001', '100')
    settings = json.loads((tmp_path / 'runs' / '001' / 'settings.json').read_text(encoding='utf-8'))
    del settings['classes']
    assert settings == {'data_dir': str(tmp_path / 'food-11'), 'recipe': 'book', 'epochs': 100,
                        'batch_size': 128, 'lr': 0.001, 'seed': 0, 'no_amp': False}
    assert done.returncode == 130 and len(done.stderr.splitlines()) == 5
    assert 'holds the state after epoch 1; continue with ' in done.stderr


def test_the_demo_called_from_a_notebook_twice(edited, tmp_path, monkeypatch, capsys):
    (tmp_path / 'food-11').mkdir()
    main = edited({}, base=SAVED_AT_THE_END).train.main
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['ipykernel_launcher.py', '-f', 'kernel.json'])
    main(['--demo', '--device', 'cpu'])
    assert capsys.readouterr().out.count('/005]') == 5
    settings = json.loads(Path('runs', '001', 'settings.json').read_text(encoding='utf-8'))
    assert (settings['batch_size'], settings['lr']) == (16, 0.0001)
    assert Path(settings['data_dir']).name == 'food-11-demo'
    assert len(os.listdir(Path('food-11-demo', 'training'))) == 330
    assert not os.listdir('food-11')
    # What is given goes before what the demo has.
    main(['--demo', '--device', 'cpu', '--epochs', '1'])
    assert LINE.fullmatch(capsys.readouterr().out.splitlines()[0]).groups()[:2] == ('001', '001')
    # As the line after an interruption says, without --demo.
    main(['--out', 'runs/002', '--resume', '--epochs', '2', '--device', 'cpu'])
    assert capsys.readouterr().out.startswith('[002/002]')


def test_stdout_has_the_epochs_and_the_table_and_nothing_else(small, few):
    done = small.call('--data-dir', few, '--epochs', 2, '--batch-size', 4, '--device', 'cpu')
    assert done.returncode == 0
    device, folder, photographs = done.stderr.splitlines()
    assert device.startswith('device cpu') and ', precision ' in device
    assert folder.endswith(str(Path('runs', '001')))
    assert photographs == '11 classes, 10 photographs for training, 10 for validation'
    lines = done.stdout.splitlines()
    assert all(map(LINE.fullmatch, lines[:2])) and lines[2].split()[:2] == ['with', 'the']
    assert lines[6].split() == ['3', 'Egg', '0', '0', '-', '-'] and len(lines) == 15


@pytest.mark.parametrize('place', ['notebook', 'IDLE', 'pythonw'])
def test_where_stdout_is_another_object_or_none(small, few, tmp_path, monkeypatch, place):
    """Jupyter, Spyder and VS Code run a script in an ipykernel; IDLE has a window of its own."""
    class Stream(io.StringIO):
        def isatty(self):
            return place == 'IDLE'
    streams = [Stream(), Stream()]
    if place == 'notebook':
        monkeypatch.setitem(sys.modules, 'ipykernel', pytest)
    if place == 'pythonw':
        streams = [None, None]
    monkeypatch.setattr(sys, 'stdout', streams[0])
    monkeypatch.setattr(sys, 'stderr', streams[1])
    monkeypatch.chdir(tmp_path)
    small.data.run_script(lambda: small.train.main(
        ['--data-dir', str(few), '--epochs', '1', '--device', 'cpu', '--out', 'run']))
    small.data.run_script(lambda: small.data.main(['--data-dir', str(few)]))
    assert (tmp_path / 'run' / 'confusion.png').exists()
    if place != 'pythonw':
        texts = [stream.getvalue() for stream in streams]
        assert LINE.fullmatch(texts[0].splitlines()[0])
        assert texts[1].startswith('device cpu')
        assert ('reading:' in texts[1]) == (place == 'notebook')


@POSIX
def test_a_terminal_shows_progress_bars(small, few):
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
    (['--device', 'cpu', '--out', os.path.join('notes.txt', 'run')], 'notes.txt'),
    (['--out', 'nowhere', '--dreams', '--device', 'cpu'], os.path.join('nowhere', 'best.pt'))])
def test_mistakes_end_in_one_line_and_leave_no_folder(scripts, tmp_path, arguments, word):
    (tmp_path / 'notes.txt').touch()
    done = scripts.call(*arguments)
    assert done.returncode == 1 and done.stdout == ''
    error = done.stderr.splitlines()[-1]
    assert error.startswith('error: ') and word in error and 'Traceback' not in done.stderr
    assert not list(tmp_path.rglob('001')) and not (tmp_path / 'nowhere').exists()


@pytest.mark.parametrize('arguments', [
    ['--epochs', '0'], ['--batch-size', '-1'], ['--lr', 'nan'], ['--lr', '2'], ['--workers', 'x'],
    ['--seed', '-1'], ['--demo', '--data-dir', 'elsewhere']])
def test_impossible_options_are_refused(scripts, arguments):
    done = scripts.call(*arguments)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and arguments[-2] in error and ': error: ' in error


def test_the_use_of_a_run_needs_one(scripts):
    for arguments in (['--resume'], ['--predict', 'x.jpg'], ['--dreams'], ['--features', 'x.jpg']):
        done = scripts.call(*arguments)
        assert done.returncode == 2 and 'need the folder of a run: --out DIR' in done.stderr


def test_help_says_units_and_defaults(scripts):
    done = scripts.call('--help')
    text = ' '.join(done.stdout.split())
    assert done.returncode == 0 and 'python chapter2_2_train.py --demo' in text
    for default in ('(default: 100; with --demo 5)',
                    '(default: 128; with --recipe better 64; with --demo 16)',
                    '(default: 0.001; with --demo 0.0001)', '(default: best.pt)'):
        assert default in text


@pytest.mark.parametrize('error', [
    torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 64 GiB.\nGPU 0 has ...'),
    MemoryError('Unable to allocate 64 GiB for an array'), MemoryError()], ids=str)
def test_full_memory_ends_in_one_line_and_says_how_to_continue(
        small, copy_of_finished, monkeypatch, error):
    """Of a GPU, or of the computer."""
    def full(*_, **__):
        raise error
    monkeypatch.setattr(nn.Conv2d, 'forward', full)
    done = small.call('--out', 'run', '--resume', '--epochs', 5, '--device', 'cpu')
    assert done.returncode == 1 and done.stderr.count('\n') == 6
    line, message = done.stderr.splitlines()[-2:]
    assert line.startswith('run holds the state after epoch 3; continue with python')
    assert message.startswith('error: too little memory') and 'smaller --batch-size' in message
    assert ('64 GiB' in message) == bool(error.args)
    done = small.call('--out', 'run', '--dreams', '--device', 'cpu')
    assert done.returncode == 1 and done.stderr.count('\n') == 1
    assert done.stderr.startswith('error: too little memory')


def test_an_engineers_mistake_keeps_its_traceback(edited, copy_of_finished, few):
    """The last line before the traceback says how to continue."""
    resume = ('--out', 'run', '--resume', '--epochs', 5, '--device', 'cpu')
    broken = edited({'    transforms.RandomRotation(15),': '    lambda image: 1 / 0,'})
    stderr = io.StringIO()
    with pytest.raises(ZeroDivisionError):
        broken.call(*resume, stderr=stderr)
    line = stderr.getvalue().splitlines()[-1]
    assert line.startswith('run holds the state after epoch 3; continue with python')
    broken = edited({'cv2.IMREAD_COLOR': 'cv2.IMREAD_GRAYSCALE'})
    with pytest.raises(ValueError, match='broadcast'):
        broken.call('--data-dir', few, '--device', 'cpu')


# ---- Device, precision, workers --------------------------------------------------------------

def test_the_device_is_the_accelerator_if_there_is_one(monkeypatch):
    assert train.pick_device('cpu') == CPU
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: False)
    assert train.pick_device(None) == CPU
    # meta is a device that holds no numbers.
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: True)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda: torch.device('meta'))
    with pytest.raises(data.UserError, match='device meta'):
        train.pick_device(None)


def test_each_process_takes_a_gpu_of_its_own_and_no_memory_on_another(monkeypatch):
    events = []
    ones = torch.ones
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: True)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda: CUDA)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: events.append(str(device)))
    monkeypatch.setattr(torch, 'ones', lambda *size, device: events.append('tensor') or ones(*size))
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert train.pick_device('cuda') == torch.device('cuda', 1)
    assert train.pick_device('cuda:2') == torch.device('cuda', 2)
    assert events == ['cuda:1', 'tensor', 'cuda:2', 'tensor']


def test_a_gpu_that_this_pytorch_has_no_kernels_for(monkeypatch):
    """Kaggle's P100 with a build for CUDA 13."""
    def fail(*_, **__):
        raise RuntimeError('CUDA error: no kernel image is available for execution on the device\n'
                           'CUDA kernel errors might be asynchronously reported')
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: True)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda: CUDA)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    monkeypatch.setattr(torch, 'ones', fail)
    with pytest.raises(data.UserError) as error:
        train.pick_device('cuda')
    for words in ('cuda:0', 'no kernel image', 'install.md', '--device cpu'):
        assert words in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['cuda', 'cuda:1', 'mps', 'xpu'])
def test_a_gpu_that_this_pytorch_does_not_know_at_all(scripts, monkeypatch, name):
    """A build for CPUs, which requirements.txt brings to Windows: PyTorch's own answer would be an
    AttributeError, or 1,000 characters for mps."""
    def fail(device):
        raise AttributeError("module 'torch._C' has no attribute '_cuda_setDevice'")
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'set_device', fail)
    done = scripts.call('--demo', '--device', name)
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and len(done.stderr) < 200
    for words in (f'cannot use the device {name}', 'install.md', '--device cpu'):
        assert words in done.stderr


@pytest.mark.parametrize('name, capability, dtype', [
    ('NVIDIA H100', (9, 0), torch.bfloat16), ('Tesla T4', (7, 5), torch.float16),
    ('NVIDIA GeForce GTX 1650', (7, 5), torch.float32), ('Tesla P4', (6, 1), torch.float32)])
def test_a_gpu_computes_in_what_it_is_fast_in(monkeypatch, name, capability, dtype):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    assert train.pick_precision(CUDA, no_amp=False) == dtype
    assert train.pick_precision(CUDA, no_amp=True) == torch.float32
    assert train.pick_precision(torch.device('mps'), no_amp=False) == torch.float32
    assert train.device_name(CUDA) == f'cuda:0 ({name})'


@pytest.mark.parametrize('supported', [True, False])
def test_a_cpu_computes_in_bfloat16_only_if_it_supports_it(monkeypatch, supported):
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: supported)
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: False)
    autocast, scaler = train.mixed_precision(CPU, train.pick_precision(CPU, no_amp=False))
    with autocast:
        computed = nn.Linear(3, 3)(torch.rand(2, 3)).dtype
    assert (computed == torch.bfloat16) == supported and not scaler.is_enabled()
    # They are private functions, which a future PyTorch may not have.
    monkeypatch.delattr(torch.cpu, '_is_avx512_bf16_supported')
    monkeypatch.delattr(torch.cpu, '_is_amx_tile_supported')
    assert train.pick_precision(CPU, no_amp=False) == torch.float32


@pytest.mark.parametrize('cores, processes, workers', [
    (16, 1, 8), (2, 1, 2), (1, 1, 1), (64, 4, 8), (8, 4, 2), (2, 4, 0)])
def test_workers_by_default(monkeypatch, cores, processes, workers):
    """Of the computer's 64 cores, Slurm or Docker allow some."""
    monkeypatch.setattr(os, 'cpu_count', lambda: 64)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: set(range(cores)), raising=False)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))
    monkeypatch.setattr(sys, 'platform', 'linux')
    assert train.pick_workers(None, CUDA) == workers
    assert train.pick_workers(None, CPU) == 0
    assert train.pick_workers(3, CPU) == 3
    monkeypatch.setattr(sys, 'platform', 'win32')
    assert train.pick_workers(None, CUDA) == 2
