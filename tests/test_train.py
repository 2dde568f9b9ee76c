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
    with nn.modules.module.register_module_forward_pre_hook(count):
        yield


# ---- The network -----------------------------------------------------------------------------

def test_the_books_layers_shapes_and_parameters():
    model = train.Classifier()
    assert sum(p.numel() for p in model.parameters()) == 12_833_803
    names = [type(layer).__name__ for layer in model.convolution]
    assert names == ['Conv2d', 'BatchNorm2d', 'ReLU', 'MaxPool2d'] * 5
    names = [type(layer).__name__ for layer in model.fc]
    assert names == ['Linear', 'ReLU', 'Linear', 'ReLU', 'Linear']
    x = torch.rand(2, 3, 128, 128)
    scores, shapes = model(x), []
    for layer in model.convolution:
        x = layer(x)
        if isinstance(layer, nn.MaxPool2d):
            shapes.append(tuple(x.shape[1:]))
    assert shapes == [(64, 64, 64), (128, 32, 32), (256, 16, 16), (512, 8, 8), (512, 4, 4)]
    assert scores.shape == (2, 11)


def test_its_weights_are_in_the_order_that_is_fast_but_not_on_apples_gpus(monkeypatch):
    weights = train.make_model(11, CPU).convolution[4].weight
    assert weights.is_contiguous(memory_format=torch.channels_last)
    moves = []
    monkeypatch.setattr(nn.Module, 'to', lambda model, *place, **order: moves.append(order))
    train.make_model(11, torch.device('mps'))
    assert moves == [{}]


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
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 128 * 128, 11)).eval()
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


def test_training_photographs_come_in_a_new_order_in_each_epoch(edited, few):
    """Validation photographs always come in the order of their names."""
    plain = edited({'    transforms.RandomHorizontalFlip(),\n'
                    '    transforms.RandomRotation(15),': ''})
    orders = {True: [], False: []}

    def see(module, inputs):
        if isinstance(module, nn.Sequential):
            orders[module.training].append(hash(inputs[0].numpy().tobytes()))
    with nn.modules.module.register_module_forward_pre_hook(see):
        done = plain.call('--data-dir', few, '--epochs', 3, '--batch-size', 1, '--device', 'cpu')
    assert done.returncode == 0, done.stderr
    epochs = [tuple(orders[True][i:i + 10]) for i in (0, 10, 20)]
    assert len(set(epochs)) == 3 and len({frozenset(epoch) for epoch in epochs}) == 1
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


def test_a_validation_loss_that_is_no_number_ends_the_run(small, copy_of_finished):
    """Here the training loss is one. What was saved stays."""
    def overflow(module, inputs, out):
        if isinstance(module, nn.Flatten) and not module.training:
            return out * float('nan')
    last = (copy_of_finished / 'last.pt').read_bytes()
    with nn.modules.module.register_module_forward_hook(overflow):
        done = small.call('--out', 'run', '--resume', '--epochs', 5, '--device', 'cpu')
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and done.stdout.count('[00') == 1
    assert error.startswith('error: the loss is not a finite number') and 'lower --lr' in error
    assert (copy_of_finished / 'last.pt').read_bytes() == last


# ---- The script ------------------------------------------------------------------------------

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
    settings = json.loads((tmp_path / 'runs' / '001' / 'settings.json').read_text(encoding='utf-8'))
    del settings['classes']
    assert settings == {'data_dir': str(tmp_path / 'food-11'), 'recipe': 'book', 'epochs': 100,
                        'batch_size': 128, 'lr': 0.001, 'seed': 0, 'no_amp': False}
    assert done.returncode == 130 and done.stderr.splitlines()[-1] == 'interrupted'
    assert '\ncontinue with: python ' in done.stderr


def test_the_demo_called_from_a_notebook_twice(edited, tmp_path, monkeypatch, capsys):
    (tmp_path / 'food-11').mkdir()
    main = edited({}, base=SAVED_AT_THE_END).train.main
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['ipykernel_launcher.py', '-f', 'kernel.json'])

    def call(*arguments):
        main(['--device', 'cpu', *arguments])
        return capsys.readouterr(), json.loads(settings.read_text(encoding='utf-8'))
    settings = tmp_path / 'runs' / '001' / 'settings.json'
    # What is given goes before what the demo has.
    printed, options = call('--demo', '--epochs', '2', '--lr', '0.0002')
    assert printed.out.count('/002]') == 2
    assert (options['batch_size'], options['lr']) == (16, 0.0002)
    assert options['data_dir'] == str(tmp_path / 'food-11-demo')
    assert len(os.listdir(tmp_path / 'food-11-demo' / 'training')) == 330
    assert not os.listdir('food-11')
    # And so does what the run has saved.
    printed, options = call('--demo', '--out', 'runs/001', '--resume')
    assert 'all 2 epochs are done' in printed.err and options['lr'] == 0.0002
    # As the line after an interruption says, without --demo.
    printed, options = call('--out', 'runs/001', '--resume', '--epochs', '3')
    assert printed.out.startswith('[003/003]') and options['batch_size'] == 16
    options = train.choose_options(train.parse_arguments(['--demo', '--recipe', 'better']))
    assert (options.batch_size, options.epochs, options.lr) == (16, 5, .0001)


def test_stdout_has_the_epochs_and_the_table_and_nothing_else(finished):
    folder, done = finished
    notes, lines = done.stderr.splitlines(), done.stdout.splitlines()
    assert notes[0].startswith('device cpu') and ', precision ' in notes[0]
    assert notes[1].endswith(f'folder of the run is {folder}')
    assert notes[2] == '11 classes, 10 photographs for training, 10 for validation'
    assert all(map(LINE.fullmatch, lines[:3])) and lines[3].startswith('with the best weights ')
    assert lines[7].split() == ['3', 'Egg', '0', '0', '-', '-'] and len(lines) == 16


def test_advice_for_few_photographs_of_ones_own(small, few, tmp_path):
    """Who follows it does not get it again."""
    shutil.copytree(few / 'validation', tmp_path / 'mine' / 'validation')
    (tmp_path / 'mine' / 'training').mkdir()
    for file in (few / 'training').iterdir():
        for i in range(12):
            shutil.copy(file, tmp_path / 'mine' / 'training' / file.name.replace('_0', f'_{i}'))
    # 120 photographs make 8 batches of 17, or 7 of 18.
    for data_dir, batch_size, advised in (('mine', 17, 0), ('mine', 18, 1), (few, 16, 0)):
        done = small.call('--data-dir', data_dir, '--epochs', 1, '--batch-size', batch_size,
                          '--device', 'cpu')
        assert done.returncode == 0, done.stderr
        assert done.stderr.count('only 7 training steps') == advised
        assert done.stderr.count('--batch-size 16 --lr 0.0001 trains better') == advised


@pytest.mark.parametrize('place', ['terminal', 'notebook', 'IDLE', 'pythonw'])
def test_where_the_streams_are_other_objects_or_none(small, few, tmp_path, monkeypatch, place):
    """Jupyter, Spyder and VS Code run a script in an ipykernel. IDLE's window says that it is a
    terminal, but it cannot show a progress bar."""
    class Window(io.StringIO):
        def isatty(self):
            return place == 'IDLE'

    class Terminal(io.TextIOWrapper):
        def isatty(self):
            return True
    streams = [Window(), Window()]
    if place == 'notebook':
        monkeypatch.setitem(sys.modules, 'ipykernel', pytest)
    if place == 'terminal':
        streams = [Terminal(io.BytesIO(), encoding='utf-8', newline='') for _ in range(2)]
    if place == 'pythonw':
        streams = [None, None]
    monkeypatch.setattr(sys, 'stdout', streams[0])
    monkeypatch.setattr(sys, 'stderr', streams[1])
    monkeypatch.chdir(tmp_path)
    small.data.run_script(lambda: small.train.main(
        ['--data-dir', str(few), '--epochs', '1', '--device', 'cpu', '--out', 'run']))
    assert (tmp_path / 'run' / 'confusion.png').exists()
    if place != 'pythonw':
        for stream in streams:
            stream.seek(0)
        assert LINE.fullmatch(streams[0].readline().rstrip())
        seen = streams[1].read()
        assert seen.startswith('device cpu')
        for title in ('reading:', '[001/001]:', '[001/001] validation:'):
            assert (title in seen) == (place in ('terminal', 'notebook'))


def test_a_line_that_cannot_be_printed_ends_no_training(small, few, tmp_path):
    """As after `| head -1`, or in a log on a full disk."""
    reading_end, stdout = os.pipe()
    os.close(reading_end)
    # Without this variable, what could not be printed is still there when Python ends.
    done = small.run('--data-dir', few, '--epochs', 2, '--device', 'cpu', '--out', 'run',
                     stdout=stdout, env={**os.environ, 'PYTHONUNBUFFERED': ''})
    os.close(stdout)
    assert done.returncode == 0 and 'Error' not in done.stderr, done.stderr
    assert len((tmp_path / 'run' / 'history.csv').read_text().splitlines()) == 3
    assert (tmp_path / 'run' / 'mistakes.png').exists()


@pytest.mark.parametrize('arguments, word', [
    (['--data-dir', 'nowhere'], 'nowhere'),
    (['--out', os.path.join('notes.txt', 'run')], 'notes.txt'),
    (['--out', 'nowhere', '--dreams'], os.path.join('nowhere', 'best.pt'))])
def test_mistakes_end_in_one_line_and_leave_no_folder(scripts, tmp_path, arguments, word):
    (tmp_path / 'notes.txt').touch()
    done = scripts.call('--device', 'cpu', *arguments)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and done.stdout == '' and done.stderr.count('error: ') == 1
    assert error.startswith('error: ') and str(tmp_path / word) in error
    assert not list(tmp_path.rglob('001')) and not (tmp_path / 'nowhere').exists()


@pytest.mark.parametrize('arguments, words', [
    *[([option, value], f'{option} {value}: must be at least') for option, value in (
        ('--epochs', '0'), ('--batch-size', '-1'), ('--lr', 'nan'), ('--lr', '-0.1'),
        ('--workers', '-1'), ('--seed', '-1'))],
    (['--workers', 'x'], 'invalid int'),
    (['--recipe', 'best'], 'better'),
    (['--demo', '--data-dir', 'elsewhere'], 'not allowed with'),
    # As from --out "$FOLDER", and no such variable.
    *[([option, ''], 'path is empty') for option in ('--data-dir', '--out', '--features')],
    (['--out', 'run', '--features'], 'expected one argument'),
    *[([*use], 'need the folder of a run: --out DIR') for use in (
        ['--resume'], ['--predict', 'x.jpg'], ['--dreams'], ['--features', 'x.jpg'])]])
def test_impossible_options_are_refused(scripts, tmp_path, arguments, words):
    done = scripts.call(*arguments)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and words in error and ': error: ' in error
    assert not os.listdir(tmp_path)


def test_help_says_units_and_defaults(scripts):
    done = scripts.call('--help')
    text = ' '.join(done.stdout.split())
    assert done.returncode == 0 and 'python chapter2_2_train.py --demo' in text
    for words in ('(default: 100; with --demo 5)', 'images in a training step',
                  '(default: 128; with --recipe better 64; with --demo 16)',
                  '(default: 0.001; with --demo 0.0001)', '(default: 0)', '(default: best.pt)',
                  '(default: ./food-11)', 'runs/001, runs/002, ...'):
        assert words in text


@pytest.mark.parametrize('error', [
    torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 64 GiB.\nGPU 0 has ...'),
    MemoryError('Unable to allocate 64 GiB for an array'), MemoryError()], ids=str)
def test_full_memory_ends_in_one_line(small, copy_of_finished, monkeypatch, error):
    """Of a GPU, or of the computer."""
    def full(*_, **__):
        raise error
    monkeypatch.setattr(nn.Conv2d, 'forward', full)
    for use, goodbyes in ((('--resume', '--epochs', 5), 1), (('--dreams',), 0)):
        done = small.call('--out', 'run', *use, '--device', 'cpu')
        message = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and done.stderr.count('error: ') == 1
        assert message.startswith('error: too little memory') and 'smaller --batch-size' in message
        assert ('64 GiB' in message) == bool(error.args)
        assert done.stderr.count('continue with: python ') == goodbyes


@pytest.mark.parametrize('edit, mistake', [
    (('    transforms.RandomRotation(15),', '    lambda image: 1 / 0,'), ZeroDivisionError),
    # In a thread.
    (('cv2.IMREAD_COLOR', 'cv2.IMREAD_GRAYSCALE'), ValueError)])
def test_an_engineers_mistake_keeps_its_traceback(edited, copy_of_finished, edit, mistake):
    """The last line before the traceback says how to continue."""
    stderr = io.StringIO()
    with pytest.raises(mistake):
        edited(dict([edit])).call('--out', 'run', '--resume', '--epochs', 5, '--device', 'cpu',
                                  stderr=stderr)
    line = stderr.getvalue().splitlines()[-1]
    assert line.startswith('continue with: python ') and str(copy_of_finished) in line


# ---- Device, precision, workers --------------------------------------------------------------

def test_the_device_is_the_accelerator_if_there_is_one(monkeypatch):
    assert train.pick_device('cpu') == CPU
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: False)
    assert train.pick_device(None) == CPU
    assert 'no GPU: see .github/install.md' in train.device_name(CPU)
    # meta is a device that holds no numbers.
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: True)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda: torch.device('meta'))
    with pytest.raises(data.UserError, match='device meta'):
        train.pick_device(None)


def test_each_process_takes_a_gpu_of_its_own_and_no_memory_on_another(monkeypatch):
    events = []
    ones = torch.ones
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: events.append(str(device)))
    monkeypatch.setattr(torch, 'ones', lambda *size, device: events.append('tensor') or ones(*size))
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert train.pick_device('cuda') == torch.device('cuda', 1)
    assert train.pick_device('cuda:2') == torch.device('cuda', 2)
    assert events == ['cuda:1', 'tensor', 'cuda:2', 'tensor']


@pytest.mark.parametrize('name, module, error', [
    # Kaggle's P100 with a build for CUDA 13.
    ('cuda:0', torch, RuntimeError('CUDA error: no kernel image\nCUDA kernel errors')),
    # Builds for CPUs, as requirements.txt brings to Windows.
    ('cuda:0', torch.cuda, AssertionError('Torch not compiled with CUDA enabled')),
    ('cuda:1', torch.cuda, AttributeError("module has no attribute '_cuda_setDevice'")),
    ('mps', torch, NotImplementedError(f'Could not run {"aten::empty " * 100}')),
    ('toaster', torch, None)])
def test_a_device_that_pytorch_cannot_use(scripts, tmp_path, monkeypatch, name, module, error):
    def fail(*_, **__):
        raise error
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    monkeypatch.setattr(module, {torch: 'ones', torch.cuda: 'set_device'}[module], fail)
    done = scripts.call('--demo', '--device', name)
    line, = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith('error: ') and len(line) < 400
    for words in (f'cannot use the device {name}', 'install.md', '--device cpu'):
        assert words in line
    assert error is None or str(error).partition('\n')[0][:99] in line
    assert not os.listdir(tmp_path)


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
    for platform in ('win32', 'darwin'):
        monkeypatch.setattr(sys, 'platform', platform)
        assert train.pick_workers(None, CUDA) == 2
