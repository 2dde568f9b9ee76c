"""chapter2_2_train.py: the network, the facts about it, the training and its printed line."""
import contextlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import chapter2_1_data as data
import chapter2_2_train as train
from conftest import ROOT, Small

LINE = re.compile(r'\[(\d{3})/(\d{3,})\] \d+\.\d\d sec\(s\) Train Acc: (\d\.\d{6}) Loss: (\d+\.\d{6}) \| '
                  r'Val Acc: (\d\.\d{6}) loss: (\d+\.\d{6})')
CPU = torch.device('cpu')


# ---------------------------------------------------------------------- the network

def test_the_books_layers_shapes_and_parameters():
    model = train.Classifier()
    assert sum(p.numel() for p in model.parameters()) == 12_833_803
    assert [type(layer).__name__ for layer in model.convolution] == ['Conv2d', 'BatchNorm2d', 'ReLU', 'MaxPool2d'] * 5
    assert [type(layer).__name__ for layer in model.fc] == ['Linear', 'ReLU', 'Linear', 'ReLU', 'Linear']
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
    for layer in train.Classifier().convolution:  # what hides a pixel by chance makes way for what does not
        if isinstance(layer, nn.Conv2d):
            nn.init.ones_(layer.weight)
        layers.append({nn.MaxPool2d: nn.AvgPool2d(2), nn.ReLU: nn.Identity()}.get(type(layer), layer))
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


# ---------------------------------------------------------------------- training

def test_training_learns_the_drawn_dishes(tmp_path, capsys):
    data.draw_food11(tmp_path, training=12, validation=6)
    train_x, train_y, val_x, val_y = data.read_food11(tmp_path)
    some, others = np.isin(train_y, (3, 9)), np.isin(val_y, (3, 9))  # eggs and soups
    train_loader, val_loader = data.make_loaders(
        data.ImgDataset(train_x[some], train_y[some], data.train_transform),
        data.ImgDataset(val_x[others], val_y[others], data.test_transform), batch_size=6)
    torch.manual_seed(0)
    model = train.Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    train.train(model, optimizer, train_loader, val_loader, num_epoch=8, device=CPU, seed=0, out=tmp_path, history=[])
    lines = [LINE.fullmatch(line).groups() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines] == [(f'00{epoch}', '008') for epoch in range(1, 9)]
    assert float(lines[-1][3]) < float(lines[0][3]) / 3
    assert max(float(line[4]) for line in lines) > .9


def test_printed_means_count_every_image_once(arrays, capsys, tmp_path):
    """44 images in batches of 16, 16 and 12, against all 44 at once."""
    train_x, train_y, val_x, val_y = arrays
    train_set = data.ImgDataset(train_x, train_y, data.test_transform)
    val_set = data.ImgDataset(val_x[:21], val_y[:21], data.test_transform)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 128 * 128, 11)).eval()
    modes = []
    model.register_forward_hook(lambda *_: modes.append(model.training))
    train.train(model, torch.optim.Adam(model.parameters(), lr=0), *data.make_loaders(train_set, val_set, batch_size=16),
                num_epoch=1, device=CPU, seed=0, out=tmp_path, history=[], amp=False)
    printed = [float(text) for text in LINE.fullmatch(capsys.readouterr().out.strip()).groups()[2:]]
    assert modes == [True] * 3 + [False] * 2
    expected = []
    for dataset in (train_set, val_set):
        x, y = zip(*dataset)
        scores, y = model(torch.stack(x)), torch.stack(y)
        expected += [(scores.argmax(1) == y).double().mean().item(), F.cross_entropy(scores, y).item()]
    assert printed == pytest.approx(expected, abs=2e-6)


def test_evaluate_leaves_the_network_as_it_is(arrays):
    val_set = data.ImgDataset(*arrays[2:], data.test_transform)
    _, val_loader = data.make_loaders(val_set, val_set, batch_size=8)
    torch.manual_seed(0)
    model = train.Classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    accuracy, loss = train.evaluate(model, val_loader, nn.CrossEntropyLoss(), CPU, contextlib.nullcontext())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    x, y = next(iter(data.make_loaders(val_set, val_set)[1]))
    scores = model.eval()(data.to_device(x, CPU))
    assert accuracy == pytest.approx((scores.argmax(1) == y).double().mean().item())
    assert loss == pytest.approx(F.cross_entropy(scores, y).item(), abs=1e-5)


# ---------------------------------------------------------------------- the script

def test_script_prints_a_line_an_epoch_and_nothing_else(script, photographs):
    done = script('chapter2_2_train.py', '--data-dir', photographs, '--epochs', 2, '--batch-size', 4, '--workers', 1,
                  '--device', 'cpu')
    assert done.returncode == 0
    assert done.stderr == f'10 training and 10 validation images, on cpu, into {Path("runs/001")}\n'
    lines = done.stdout.splitlines()
    assert all(map(LINE.fullmatch, lines[:2])) and lines[2].split() == ['with', 'the', 'best', 'weights', 'images', 'right', 'accuracy']


@pytest.mark.skipif(os.name == 'nt', reason='a terminal of POSIX')
def test_a_terminal_shows_progress_bars(photographs, tmp_path):
    import fcntl
    import pty
    import struct
    import termios
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack('4H', 24, 100, 0, 0))  # rows, columns
    done = subprocess.run([sys.executable, train.__file__, '--data-dir', photographs, '--epochs', '1', '--batch-size', '4', '--device', 'cpu'],
                          cwd=tmp_path, stdout=subprocess.PIPE, stderr=stderr, encoding='utf-8')
    os.close(stderr)
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


@pytest.mark.parametrize('arguments, epochs, batch, lr', [([], 100, 128, .001), (['--demo'], 5, 16, .0001)])
def test_the_books_settings_are_the_defaults(call, food11, tmp_path, monkeypatch, arguments, epochs, batch, lr):
    def look(model, optimizer, train_loader, val_loader, num_epoch, *_):
        assert (num_epoch, train_loader.batch_size, train_loader.num_workers) == (epochs, batch, 0)
        assert type(optimizer).__name__ == 'Adam' and optimizer.param_groups[0]['lr'] == lr
        steps = [[type(step).__name__ for step in loader.dataset.transform.transforms] for loader in (train_loader, val_loader)]
        assert [len(names) for names in steps] == [4, 2] and steps[0][1:3] == ['RandomHorizontalFlip', 'RandomRotation']
        looked.append(len(train_loader.dataset))
    looked = []
    monkeypatch.setattr(train, 'train', look)
    monkeypatch.setattr(train, 'report', lambda *_: None)
    (tmp_path / 'food-11').symlink_to(food11, target_is_directory=True)
    done = call(train.main, *arguments, '--device', 'cpu')
    assert done.returncode == 0 and looked == [330 if arguments else 44]
    assert len(os.listdir(food11 / 'training')) == 44


def test_the_device_is_the_accelerator_if_there_is_one(monkeypatch):
    assert train.pick_device('cpu') == CPU
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: False)
    assert train.pick_device() == CPU
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: True)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda: torch.device('meta'))  # which holds no numbers
    with pytest.raises(data.UserError, match='--device meta'):
        train.pick_device()


@pytest.mark.parametrize('capability, dtype', [((9, 0), torch.bfloat16), ((7, 5), torch.float16), ((6, 1), None)])
def test_a_gpu_computes_in_the_type_it_is_fast_in(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    seen = []
    monkeypatch.setattr(torch, 'autocast', lambda kind, dtype: seen.append((kind, dtype)))
    monkeypatch.setattr(torch.amp, 'GradScaler', lambda kind, enabled: seen.append(enabled))
    train.mixed_precision(torch.device('cuda'))
    assert seen == [*[('cuda', dtype)] * (dtype is not None), dtype is torch.float16]
    seen.clear()
    train.mixed_precision(torch.device('cuda'), amp=False)
    assert seen == [False]


def test_a_cpu_computes_in_bfloat16_only_if_it_has_units_for_it(monkeypatch):
    for units in (True, False):
        for name in ('_is_avx512_bf16_supported', '_is_amx_tile_supported'):
            monkeypatch.setattr(torch.cpu, name, lambda found=units and 'avx512' in name: found)
        with train.mixed_precision(CPU)[0]:
            assert (nn.Linear(3, 3)(torch.rand(2, 3)).dtype == torch.bfloat16) == units


def test_workers_by_default(monkeypatch):
    train_set = data.ImgDataset(np.zeros((5, 128, 128, 3), np.uint8))
    monkeypatch.setattr(data, 'forks', lambda: True)
    monkeypatch.setattr(train, 'forks', lambda: True)
    monkeypatch.setattr(os, 'name', 'posix')
    monkeypatch.setattr(os.path, 'isdir', lambda path: True)
    for cores, free, workers in ((16, 2**34, 15), (2, 2**34, 1), (1, 2**34, 0), (64, 2**34, 16), (16, 64 * 2**20, 2), (16, 2**20, 0)):
        monkeypatch.setattr(train, 'cores', lambda: cores)
        monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(2**34, 2**34 - free, free))
        assert train.default_workers(torch.device('cuda'), train_set, 128) == workers
        assert train.default_workers(CPU, train_set, 128) == 0
    monkeypatch.setattr(train, 'forks', lambda: False)  # and no shared memory for the images
    assert train.default_workers(torch.device('cuda'), train_set, 128) == 0


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='of glibc')
def test_memory_is_kept_for_the_next_step_where_there_is_plenty():
    """Of the pages that 64 MiB need, the system gives none anew once they have been there; but for huge batches it does."""
    code = """if True:
        import resource, torch, chapter2_2_train
        faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for batch_size in 10**9, 1:
            chapter2_2_train.keep_memory(batch_size)
            for i in range(15):
                before = before if i > 12 else faults()
                torch.ones(2**24)
            print(faults() - before)
    """
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert kept < 10 < given_back


def test_the_same_seed_gives_the_same_numbers(call, photographs, monkeypatch):
    monkeypatch.setattr(train, 'Classifier', Small)
    first, again, other = [call(train.main, '--data-dir', photographs, '--epochs', 1, '--batch-size', 4, '--seed', seed,
                                '--device', 'cpu').stdout.split('sec')[1] for seed in (5, 5, 6)]
    assert first == again != other


@pytest.mark.parametrize('arguments, word', [
    (['--device', 'toaster'], 'toaster'),
    (['--device', 'cuda:99'], 'cuda:99'),
    (['--data-dir', 'nowhere'], 'nowhere'),
])
def test_mistakes_end_in_one_line(call, arguments, word):
    done = call(train.main, *arguments)
    assert done.returncode == 1 and done.stdout == ''
    assert done.stderr.startswith('error: ') and word in done.stderr and done.stderr.count('\n') == 1


@pytest.mark.parametrize('arguments', [['--epochs', '0'], ['--batch-size', '-1'], ['--lr', 'nan'], ['--workers', 'x'],
                                       ['--seed', '-1'], ['--demo', '--data-dir', 'elsewhere']])
def test_impossible_settings_are_refused(call, arguments):
    done = call(train.main, *arguments)
    assert done.returncode == 2 and f'error: argument {arguments[-2]}' in done.stderr


def test_too_little_memory_names_the_batch_size(call, food11, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 64 GiB')
    monkeypatch.setattr(train, 'train', full)
    done = call(train.main, '--data-dir', food11, '--device', 'cpu')
    assert done.returncode == 1 and 'batches of 128: try --batch-size 64' in done.stderr


class Die:
    """A transform that ends the process it runs in, as Linux does when memory runs out."""
    def __call__(self, image):
        os.kill(os.getpid(), getattr(signal, 'SIGKILL', signal.SIGTERM))


def test_a_worker_that_dies_ends_the_run_in_one_line(call, photographs, monkeypatch):
    monkeypatch.setattr(train, 'book_transforms', lambda: (Die(), data.test_transform))
    done = call(train.main, '--data-dir', photographs, '--device', 'cpu', '--workers', 1)
    assert done.returncode == 1 and done.stderr.count('\n') == 2
    assert 'a process that prepares batches has failed' in done.stderr.splitlines()[-1]
