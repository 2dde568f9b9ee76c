"""Sections 2.3 and 2.4 of the book: the network, and its training on food-11.

    python chapter2_2_train.py                       the book's run: 100 epochs on ./food-11
    python chapter2_2_train.py --demo                needs no photographs: learns drawn dishes
    torchrun --nproc-per-node 2 chapter2_2_train.py  two GPUs (or CPU processes) train together

Each run has a folder for its checkpoints, history and pictures: runs/001, runs/002, ... or --out.

    python chapter2_2_train.py --out runs/001 --resume            continues a run, or starts it
    python chapter2_2_train.py --out runs/001 --predict dinner.jpg
    python chapter2_2_train.py --out runs/001 --dreams            what the classes look like to it
                                                                  (section 1.2)
"""
import argparse
import contextlib
import copy
import csv
import ctypes
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import struct
import sys
import threading
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from torch import distributed, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import chapter2_1_data as data
from chapter2_1_data import UserError

num_epoch = 100
learning_rate = 0.001

# The demo has few images. With the book's settings its accuracy jumps up and down.
DEMO_SETTINGS = {'data_dir': data.demo_dir, 'epochs': 5, 'batch_size': 16, 'lr': 0.0001}

# How often a run writes checkpoints, in seconds. If an epoch takes longer: after every epoch.
save_seconds = 60


# ---- The network (section 2.3) ---------------------------------------------------------------

class Classifier(nn.Module):
    """The book's network. Input: images, float (N, 3, 128, 128), BGR. Output: scores (N, 11)."""

    def __init__(self):
        super().__init__()
        # At the end of a line: the shape of the layer's output. The input is [3, 128, 128].
        self.convolution = nn.Sequential(
            nn.Conv2d(3, 64, 3, 1, 1),     # [64, 128, 128]
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2, 2, 0),         # [64, 64, 64]

            nn.Conv2d(64, 128, 3, 1, 1),   # [128, 64, 64]
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.MaxPool2d(2, 2, 0),         # [128, 32, 32]

            nn.Conv2d(128, 256, 3, 1, 1),  # [256, 32, 32]
            nn.BatchNorm2d(256),
            nn.ReLU(),
            nn.MaxPool2d(2, 2, 0),         # [256, 16, 16]

            nn.Conv2d(256, 512, 3, 1, 1),  # [512, 16, 16]
            nn.BatchNorm2d(512),
            nn.ReLU(),
            nn.MaxPool2d(2, 2, 0),         # [512, 8, 8]

            nn.Conv2d(512, 512, 3, 1, 1),  # [512, 8, 8]
            nn.BatchNorm2d(512),
            nn.ReLU(),
            nn.MaxPool2d(2, 2, 0),         # [512, 4, 4]
        )
        self.fc = nn.Sequential(
            # 4 is image_size, halved by five poolings.
            nn.Linear(512 * 4 * 4, 1024),  # [1024]
            nn.ReLU(),
            nn.Linear(1024, 512),          # [512]
            nn.ReLU(),
            nn.Linear(512, len(data.CLASSES)),  # [11]
        )

    def forward(self, x):
        out = self.convolution(x)          # [N, 512, 4, 4]
        out = out.flatten(1)               # [N, 8192]
        return self.fc(out)                # [N, 11]


def make_model(device):
    """The network, on the device. To train another network, change this function."""
    model = Classifier()
    if device.type == 'mps':
        # On Apple's GPUs, channels_last gives wrong results in some versions of PyTorch.
        return model.to(device)
    # channels_last: an order of the numbers in memory with which convolutions are faster.
    return model.to(device, memory_format=torch.channels_last)


# ---- Training (section 2.4) ------------------------------------------------------------------

def train_epoch(model, train_loader, loss, optimizer, device, autocast, scaler, title=''):
    """Trains the network for one epoch (section 2.4). title is shown beside the progress bar.

    autocast and scaler are for computing with 16 bits; with 32 bits they do nothing.
    Returns the accuracy and the mean loss per image. (The book adds up the mean losses of the
    batches, and divides by the number of images: its losses are about 1/127 of these, as food-11
    has 78 batches for 9,866 images.)
    """
    model.train()
    # These sums stay on the GPU. Reading a number from there makes Python wait until the GPU has
    # computed it, so that is done once an epoch only.
    correct = torch.zeros((), device=device)
    loss_sum = torch.zeros((), device=device)
    image_count = 0
    for x, y in progress(train_loader, title):
        x = data.to_input(x, device)
        y = data.to_device(y, device)
        optimizer.zero_grad()
        with autocast:
            train_pred = model(x)
            batch_loss = loss(train_pred, y)
        # The book's batch_loss.backward() and optimizer.step(), by way of the scaler.
        scaler.scale(batch_loss).backward()
        scaler.step(optimizer)
        scaler.update()
        correct += (train_pred.argmax(1) == y).sum()
        # batch_loss is the mean of the batch, and the last batch may be smaller.
        loss_sum += batch_loss.detach() * len(y)
        image_count += len(y)
    return accuracy_and_loss(correct, loss_sum, image_count)


@torch.no_grad()
def evaluate(model, val_loader, device, autocast, title=''):
    """Returns the accuracy and the mean loss per image on the validation images (section 2.4).

    The loss is always the cross-entropy, even if the training uses a different one. So runs can be
    compared.
    """
    model.eval()
    correct = torch.zeros((), device=device)
    loss_sum = torch.zeros((), device=device)
    image_count = 0
    for x, y in progress(val_loader, title):
        x = data.to_input(x, device)
        y = data.to_device(y, device)
        with autocast:
            val_pred = model(x)
            batch_loss = nn.functional.cross_entropy(val_pred, y)
        correct += (val_pred.argmax(1) == y).sum()
        loss_sum += batch_loss * len(y)
        image_count += len(y)
    return accuracy_and_loss(correct, loss_sum, image_count)


def accuracy_and_loss(correct, loss_sum, image_count):
    """Divides the sums by the number of images.

    If several processes train together, the sums of all processes are added up first.
    """
    # One tensor for all three, so that one all_reduce can add them up over all processes.
    totals = torch.stack([correct, loss_sum, torch.full_like(correct, image_count)])
    if distributed.is_initialized():
        distributed.all_reduce(totals)
    total_correct, total_loss, total_images = totals.tolist()
    return total_correct / total_images, total_loss / total_images


def train(model, train_loader, val_loader, loss, optimizer, device, autocast, scaler, run):
    """The book's loop: train, evaluate, print, save (section 2.4).

    run: a Run. Its history says how many epochs have been trained before.
    Raises UserError if the loss is not a finite number any more (in run.add_epoch).
    """
    epochs = run.settings['epochs']
    # With one process, this is the model. With several, it is the model too, but wrapped so that
    # backward() averages the gradients of all processes.
    parallel_model = share_gradients(model, device)
    for epoch in range(len(run.history) + 1, epochs + 1):
        start_time = time.perf_counter()
        title = f'[{epoch:03d}/{epochs:03d}]'
        # Random numbers depend on the number of the epoch, so a resumed run gets the same ones.
        data.set_epoch(train_loader, epoch)
        # This seed is for layers that use random numbers, such as Dropout.
        torch.manual_seed(run.settings['seed'] + epoch)
        # A learning-rate schedule belongs here: optimizer.param_groups[0]['lr'] = ...
        # If it is computed from `epoch`, it is right in a resumed run as well.

        train_acc, train_loss = train_epoch(parallel_model, train_loader, loss, optimizer,
                                            device, autocast, scaler, title)
        # With several processes on the CPU, the batch norm statistics differ: all take those of
        # process 0. With one process, this does nothing.
        share_batch_norm(model)
        val_acc, val_loss = evaluate(model, val_loader, device, autocast, f'{title} validation')

        seconds = time.perf_counter() - start_time
        # With several processes, only process 0 prints.
        if run.rank == 0:
            print(f'{title} {seconds:.2f} sec(s) Train Acc: {train_acc:.6f} '
                  f'Loss: {train_loss:.6f} | Val Acc: {val_acc:.6f} loss: {val_loss:.6f}',
                  flush=True)
        # A row of history.csv; more columns can be added.
        row = {'epoch': epoch, 'seconds': seconds, 'train_acc': train_acc,
               'train_loss': train_loss, 'val_acc': val_acc, 'val_loss': val_loss}
        run.add_epoch(row, model)
        run.save_if_due(model, optimizer, scaler)


# ---- The script ------------------------------------------------------------------------------

def main():
    args = parse_arguments()
    if args.predict or args.dreams:
        predict_or_dream(args)
        return

    device = pick_device(args.device)
    # rank: the number of this process, counted from 0; world_size: how many train together.
    rank, world_size = join_processes(device)
    run = Run(args.out, rank)
    # This locks the folder too, and takes over the history of a run that is continued.
    checkpoint = run.find_checkpoint(args.resume)
    # num_epoch, batch_size, learning_rate and so on, unless the command line or the checkpoint has
    # different ones.
    run.settings = choose_settings(args, checkpoint, world_size)
    batch_size = run.settings['batch_size']
    seed = run.settings['seed']
    workers = choose_workers(args.workers, device, batch_size, rank)
    if rank == 0:
        print_hardware(device, args.device, run.settings, workers, world_size)

    # The data (section 2.2)
    if run.settings['demo']:
        make_demo_once(run.settings['data_dir'])
    train_x, train_y, val_x, val_y = data.read_food11(run.settings['data_dir'])
    train_set = data.ImgDataset(train_x, train_y, data.train_transform, seed)
    # Each process evaluates its own part of the images. With one process, that is all of them.
    val_set = data.ImgDataset(val_x[rank::world_size], val_y[rank::world_size],
                              data.test_transform)
    train_loader, val_loader = data.make_loaders(
        train_set, val_set, batch_size, workers=workers, pin_memory=device.type == 'cuda',
        world_size=world_size, rank=rank, seed=seed)
    # With a GPU, val_loader becomes a list of batches that stay on the GPU.
    val_loader = keep_on_gpu(val_loader, device)

    # The network (section 2.3)
    torch.manual_seed(seed)
    model = make_model(device)
    loss = nn.CrossEntropyLoss()
    # fused: updates all weights at once, which is faster on a GPU.
    optimizer = torch.optim.Adam(model.parameters(), lr=run.settings['lr'],
                                 fused=device.type == 'cuda')

    # The training (section 2.4)
    autocast, scaler = mixed_precision(device, run.settings['no_amp'])
    if checkpoint is not None:
        restore(model, optimizer, scaler, checkpoint, run.folder / 'last.pt')
    tune_pytorch(device, batch_size)
    # The folder is made now, when nothing can be wrong with the settings or the data any more.
    run.start()
    # Says what is saved if the training is interrupted or runs out of memory.
    with explained_errors(run, device):
        train(model, train_loader, val_loader, loss, optimizer, device, autocast, scaler, run)
        if rank == 0:
            report(run.folder, val_x, val_y, batch_size, device, autocast)
    if distributed.is_initialized():
        distributed.destroy_process_group()


# ----------------------------------------------------------------------------------------------
# The book's chapter ends here. The rest makes the script fast, safe to run unattended, and useful
# after the training: command line, hardware, several processes, the run's folder, pictures,
# prediction, dreams.
# ----------------------------------------------------------------------------------------------


# ---- Command line ----------------------------------------------------------------------------

def parse_arguments():
    """Reads the command line. Settings that are not given are None: see choose_settings."""
    parser = argparse.ArgumentParser(usage='%(prog)s [options]', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    data.add_data_arguments(parser)
    demo = DEMO_SETTINGS
    parser.add_argument('--epochs', type=int, metavar='N',
                        help='how many times to train on all training images '
                        f'(default: {num_epoch}; with --demo {demo["epochs"]})')
    parser.add_argument('--batch-size', type=int, metavar='N',
                        help='images in a training step, of all processes together '
                        f'(default: {data.batch_size}; with --demo {demo["batch_size"]})')
    parser.add_argument('--lr', type=float, metavar='X',
                        help="Adam's learning rate "
                        f'(default: {learning_rate}; with --demo {demo["lr"]})')
    parser.add_argument('--seed', type=int, metavar='N',
                        help='on the CPU, a run with the same seed gives the same results '
                        '(default: 0)')
    # store_true would give False if the option is missing; choose_settings needs None then.
    parser.add_argument('--no-amp', action='store_const', const=True,
                        help='no automatic mixed precision: compute with 32 bits (default: with '
                        '16 bits where that is faster)')
    parser.add_argument('--workers', type=int, metavar='N',
                        help='processes that prepare training batches; 0: the training process '
                        'does it (default: for a GPU the number of CPU cores minus 1, at most '
                        '16, on Windows 4, fewer if there is little shared memory; on the CPU 0)')
    parser.add_argument('--device', metavar='NAME',
                        help='cuda, cuda:1, mps, xpu or cpu (default: a GPU if PyTorch finds one)')
    parser.add_argument('--out', metavar='DIR',
                        help="the run's folder (default: the next of runs/001, runs/002, ...)")
    parser.add_argument('--resume', action='store_true',
                        help='continue the run in --out, or start it if there is none yet')
    parser.add_argument('--predict', nargs='+', metavar='PATH',
                        help='predict the classes of photographs with the run in --out; for a '
                        'folder, write them into predict.csv, and print the accuracy if the '
                        'photographs are named like those for training')
    parser.add_argument('--dreams', action='store_true',
                        help='write dreams.png: what the classes look like to the network of the '
                        'run in --out')
    parser.add_argument('--checkpoint', default='best.pt', metavar='NAME',
                        help='the file in --out that --predict and --dreams use '
                        '(default: %(default)s)')
    args = parser.parse_args()

    limits = {'epochs': (1, 10**9), 'batch_size': (1, 10**9), 'lr': (0, 1),
              'seed': (0, 2**32 - 1), 'workers': (0, 1000)}
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        # Written with "not", so that nan is refused as well.
        if value is not None and not low <= value <= high:
            parser.error(f'argument {option_of(name)}: {value} is not in {low}..{high}')
    if args.out is not None and os.path.isfile(args.out):
        parser.error(f'argument --out: {args.out} is a file, but should be a folder')
    if args.out is None:
        for name in ('resume', 'predict', 'dreams'):
            if getattr(args, name):
                parser.error(f'argument {option_of(name)}: needs the folder of a run, --out DIR')
    return args


def option_of(setting):
    """The option for a setting: --batch-size for batch_size."""
    return '--' + setting.replace('_', '-')


def choose_settings(args, checkpoint, world_size):
    """The settings of a run: what is given in args, else what the checkpoint has, else defaults.

    checkpoint: that of the run to be continued, or None. Raises UserError if a run cannot be
    continued with the given settings, or the processes cannot share the batches equally.
    """
    defaults = {'data_dir': data.data_dir, 'epochs': num_epoch, 'batch_size': data.batch_size,
                'lr': learning_rate, 'seed': 0, 'no_amp': False, 'demo': False}
    given = {}
    for name in ('data_dir', 'epochs', 'batch_size', 'lr', 'seed', 'no_amp'):
        value = getattr(args, name)
        if value is not None:
            given[name] = value
    if args.demo:
        defaults.update(DEMO_SETTINGS)
        given['demo'] = True
    elif args.data_dir is not None:
        # --data-dir means: not the demo. refuse_other_settings needs to know.
        given['demo'] = False
    saved = {}
    if checkpoint is not None:
        saved = checkpoint['settings']
        refuse_other_settings(args.out, given, checkpoint)
    settings = {**defaults, **saved, **given}
    # The run may be continued from a different current folder.
    settings['data_dir'] = os.path.abspath(settings['data_dir'])
    if settings['batch_size'] % world_size != 0:
        raise UserError(f'{world_size} processes cannot share batches of {settings["batch_size"]} '
                        'images equally: choose a different --batch-size, or start torchrun with '
                        'a different --nproc-per-node')
    return settings


def refuse_other_settings(folder, given, checkpoint):
    """Raises UserError if the given settings would change the training of the run in `folder`."""
    saved = checkpoint['settings']
    advice = 'resume it without this option, or start a new run in a different folder'
    # data_dir may change, as the photographs may have been moved.
    for name in ('batch_size', 'lr', 'seed'):
        if name in given and given[name] != saved[name]:
            option = option_of(name)
            raise UserError(f'the run in {folder} was started with {option} {saved[name]} and '
                            f'cannot continue with {option} {given[name]}: {advice}')
    if 'no_amp' in given and not saved['no_amp']:
        raise UserError(f'the run in {folder} was started without --no-amp: {advice}')
    if given.get('demo') is True and not saved['demo']:
        raise UserError(f'the run in {folder} was started without --demo: {advice}')
    if given.get('demo') is False and saved['demo']:
        raise UserError(f'the run in {folder} was started with --demo and cannot continue with '
                        f'--data-dir: {advice}')
    trained = len(checkpoint['history'])
    if 'epochs' in given and given['epochs'] < trained:
        raise UserError(f'the run in {folder} has trained {trained} epochs already, more than '
                        f'--epochs {given["epochs"]}')


# ---- Hardware --------------------------------------------------------------------------------

def pick_device(name):
    """The device called `name`. If name is None: CUDA, else another kind of GPU, else the CPU.

    Raises UserError if PyTorch cannot use the device here.
    """
    with_torchrun = distributed.is_torchelastic_launched()
    if name is None:
        name = 'cpu'
        if torch.accelerator.is_available():
            found = torch.accelerator.current_accelerator().type
            # On GPUs without CUDA, several processes cannot train together.
            if found == 'cuda' or not with_torchrun:
                name = found
    if name == 'cuda' and with_torchrun:
        # Each process of a machine gets a GPU of its own.
        name = f'cuda:{os.environ["LOCAL_RANK"]}'
    try:
        device = torch.device(name)
        # Some devices fail only when they have to compute something.
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        # PyTorch raises any of these, depending on the kind of device.
        raise UserError(unusable_device_message(name, error)) from None
    return device


def unusable_device_message(name, error):
    """What to tell the user about a device that PyTorch cannot use."""
    lines = str(error).splitlines() or [type(error).__name__]
    message = f'PyTorch {torch.__version__} cannot use the device {name} here: {lines[0]}'
    gpu_count = torch.cuda.device_count()
    if 'no kernel image' in str(error):
        major, minor = torch.cuda.get_device_capability(name)
        message += (f'. It is built without support for the {torch.cuda.get_device_name(name)} '
                    f'(compute capability {major}.{minor}): install a PyTorch that supports it, '
                    'see "Troubleshooting" in README.md')
    elif 'invalid device ordinal' in str(error):
        message += (f'. There are {gpu_count} CUDA GPUs here, numbered from 0; torchrun can use '
                    f'--nproc-per-node {gpu_count}')
    return message + '; --device cpu always works'


def print_hardware(device, wanted, settings, workers, world_size):
    """Prints on stderr what the run is going to use. wanted: what --device says, or None."""
    name = str(device)
    if device.type == 'cuda':
        name += f' ({torch.cuda.get_device_name(device)})'
        gpu_count = torch.cuda.device_count()
        if gpu_count > 1 and world_size == 1:
            print(f'{gpu_count} GPUs are here, one is used: torchrun --nproc-per-node {gpu_count} '
                  'chapter2_2_train.py uses all of them', file=sys.stderr)
    if device.type == 'cpu' and wanted is None and not torch.accelerator.is_available():
        print('PyTorch finds no GPU: see "Troubleshooting" in README.md', file=sys.stderr)
    dtype = str(fastest_dtype(device, settings['no_amp'])).removeprefix('torch.')
    print(f'device {name}, precision {dtype}, loader workers {workers}, processes {world_size}',
          file=sys.stderr)


def fastest_dtype(device, no_amp):
    """The type of numbers to compute with: float32, or a 16-bit type if that is faster."""
    if no_amp:
        return torch.float32
    if device.type == 'cuda':
        generation, _ = torch.cuda.get_device_capability(device)
        # 8: Ampere (A100, RTX 30) and newer; 7: Volta and Turing (V100, T4, RTX 20).
        if generation >= 8:
            return torch.bfloat16
        # The GTX 16 is a Turing that computes 16 bits no faster, and sometimes wrong.
        if generation == 7 and 'GTX 16' not in torch.cuda.get_device_name(device):
            return torch.float16
    if device.type == 'cpu':
        # Only CPUs with these instructions are fast with bfloat16. PyTorch has no public functions
        # for this.
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
            return torch.bfloat16
    return torch.float32


def mixed_precision(device, no_amp):
    """Automatic mixed precision (amp): the autocast and the scaler that train_epoch takes.

    Inside autocast PyTorch computes with 16 bits wherever that does not harm the accuracy.
    """
    dtype = fastest_dtype(device, no_amp)
    autocast = contextlib.nullcontext()
    if dtype != torch.float32:
        autocast = torch.autocast(device.type, dtype)
    # Many gradients are too small for float16 and would become 0. The scaler multiplies the loss,
    # and divides the gradients again before the step.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return autocast, scaler


def available_cores():
    """How many CPU cores this process may use, if all processes of the run share them."""
    cores = os.cpu_count()
    if hasattr(os, 'process_cpu_count'):
        cores = os.process_cpu_count()  # since Python 3.13
    elif hasattr(os, 'sched_getaffinity'):
        cores = len(os.sched_getaffinity(0))
    # A container may be limited to fewer cores. cpu.max then holds two numbers of microseconds: the
    # CPU time that the container gets in each period, and the length of a period. "400000 100000"
    # means 4 cores, "max 100000" no limit.
    container_limit = Path('/sys/fs/cgroup/cpu.max')
    if container_limit.exists():
        quota, period = container_limit.read_text().split()
        if quota != 'max':
            cores = min(cores, math.ceil(int(quota) / int(period)))
    processes_here = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    return max(1, cores // processes_here)


def choose_workers(wanted, device, batch_size, rank):
    """How many worker processes prepare the training batches. wanted: what --workers says."""
    if wanted is not None:
        return wanted
    if device.type == 'cpu':
        # The cores are needed for the network.
        return 0
    workers = min(available_cores() - 1, 16)
    if sys.platform == 'win32':
        # On Windows each worker reserves gigabytes of the page file.
        workers = min(workers, 4)
    if os.path.isdir('/dev/shm'):
        # Workers send batches through shared memory, and Docker provides only 64 MB of that. For
        # each worker there must be room for four: two waiting, one being made, and one in use.
        # (Several processes have smaller batches each, which together are as large.)
        # The transform decides how many bytes an image has, so a blank image is transformed.
        blank = np.zeros((1, data.image_size, data.image_size, 3), dtype=np.uint8)
        blank_set = data.ImgDataset(blank, transform=data.train_transform)
        sample = data.as_bytes(blank_set)[0]
        batch_bytes = np.asarray(sample).nbytes * batch_size
        possible = shutil.disk_usage('/dev/shm').free // (4 * batch_bytes)
        if possible < workers:
            workers = possible
            if rank == 0:
                print(f'only {workers} loader workers, because /dev/shm is small: '
                      'docker run --shm-size 2g makes it larger', file=sys.stderr)
    return workers


def keep_on_gpu(val_loader, device):
    """The validation batches: on a GPU they stay there, as they are the same in every epoch."""
    if device.type == 'cpu':
        return val_loader
    return [(x.to(device), y.to(device)) for x, y in val_loader]


def tune_pytorch(device, batch_size):
    """Settings that make the training faster. They apply to everything in this process."""
    # cuDNN tries several algorithms for each convolution, and then uses the fastest.
    torch.backends.cudnn.benchmark = True
    if device.type == 'cpu' and sys.platform == 'linux':
        keep_freed_memory(batch_size)


def keep_freed_memory(batch_size):
    """Lets the C library keep the memory that a training step frees, for the next step.

    Otherwise Linux takes it back, and has to fill it with zeros before the next step can use it:
    up to 40% of the time of training on the CPU. With this, the process needs up to 70% more
    memory, so it is done only where there is plenty.
    """
    memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')  # bytes
    # A container may have less: the file holds a number of bytes, or "max".
    container_limit = Path('/sys/fs/cgroup/memory.max')
    if container_limit.exists():
        text = container_limit.read_text().strip()
        if text.isdecimal():
            memory = min(memory, int(text))
    # The training was seen to use 3000 bytes for each pixel of each image in a batch. Twice that
    # is on the safe side.
    bytes_per_pixel = 6000
    needed = bytes_per_pixel * data.image_size ** 2 * batch_size
    # CDLL(None): the C library that Python itself uses.
    c_library = ctypes.CDLL(None)
    # Only the GNU C library has mallopt: see "man mallopt".
    if memory < needed or not hasattr(c_library, 'mallopt'):
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    # Do not return freed memory to the system ...
    c_library.mallopt(M_TRIM_THRESHOLD, -1)
    # ... and take large blocks from that memory too. Otherwise each of them is a separate piece
    # of memory, which goes back to the system when it is freed.
    c_library.mallopt(M_MMAP_MAX, 0)


# ---- Several processes, started by torchrun --------------------------------------------------

def join_processes(device):
    """Connects the processes that torchrun has started, so that they can train together.

    Returns rank, the number of this process, and world_size, how many there are. Without
    torchrun that is 0 and 1.
    """
    if not distributed.is_torchelastic_launched():
        return 0, 1
    backend = 'gloo'
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        backend = 'nccl'
    else:
        # torchrun has limited each process to one thread.
        torch.set_num_threads(available_cores())
    # rendezvous connects to the store, a small server of torchrun's in which each process leaves
    # its address for the others. env://: environment variables say where it is. next: rendezvous
    # is a generator, and its first item is enough.
    store, rank, world_size = next(distributed.rendezvous('env://'))
    one_machine = os.environ['GROUP_WORLD_SIZE'] == '1'
    if one_machine:
        # torchrun can restart the processes (--max-restarts). The store then still contains the
        # addresses of the dead ones, so each attempt puts a different prefix before its own.
        # With several machines there is no prefix, as each may count the attempts differently.
        attempt = os.environ['TORCHELASTIC_RESTART_COUNT']
        store = distributed.PrefixStore(attempt, store)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return rank, world_size


def broadcast(value):
    """Returns in every process the value that process 0 has given."""
    if not distributed.is_initialized():
        return value
    values = [value]
    with explained_connection_errors():
        distributed.broadcast_object_list(values)
    return values[0]


def share_gradients(model, device):
    """The network for training. With several processes, it averages the gradients of all."""
    if not distributed.is_initialized():
        return model
    if device.type == 'cuda':
        # Replaces the batch norm layers inside the model by layers that use the images of all
        # processes for their mean and variance.
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return nn.parallel.DistributedDataParallel(model)


def share_batch_norm(model):
    """Gives all processes the batch norm statistics of process 0: on the CPU they differ."""
    if distributed.is_initialized():
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)


def progress(batches, title):
    """The batches, with a progress bar on a terminal. Only process 0 shows it."""
    # For tqdm None means: hidden unless stderr is a terminal.
    hidden = None
    if distributed.is_initialized() and distributed.get_rank() > 0:
        hidden = True
    return tqdm(batches, title, unit='batch', leave=False, disable=hidden)


def make_demo_once(folder):
    """Makes the photographs of the demo: one process of each machine does, the others wait."""
    if int(os.environ.get('LOCAL_RANK', 0)) == 0:
        data.make_demo(folder)
    if distributed.is_initialized():
        with explained_connection_errors():
            distributed.barrier()


@contextlib.contextmanager
def explained_connection_errors():
    """For a with-block in which processes wait for each other: if one of them has ended, raises
    UserError instead of PyTorch's error."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(lost_process_message(error)) from None


def lost_process_message(error):
    """What to tell the user if the connection to another process is lost."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return (f'another process has ended or cannot be reached, so this one ends as well '
            f'({lines[-1]}). If these are GPUs in a Docker container, it may need more shared '
            'memory: docker run --shm-size 2g')


# ---- The run's folder ------------------------------------------------------------------------

class Run:
    """A run: its folder, its settings, and its history. Only process 0 writes into the folder.

    folder: a Path, or None until start() has chosen one.
    rank: the number of this process.
    settings: a dictionary, see choose_settings. It must be set before start().
    history: a list with a dictionary for each trained epoch, which is a row of history.csv.
    """

    def __init__(self, out, rank):
        self.folder = None
        if out is not None:
            self.folder = Path(out)
        self.rank = rank
        self.settings = {}
        self.history = []
        self.lock = None
        # The best validation accuracy so far.
        self.best_acc = -1.0
        # The weights of that epoch, if best.pt does not hold them yet.
        self.best_checkpoint = None
        # When last.pt was written, or this object was made.
        self.saved_time = time.monotonic()

    def find_checkpoint(self, resume):
        """Returns, in every process, the checkpoint to continue from, or None for a new run.

        If the folder exists, this also locks it; and it takes over the history of the checkpoint.
        Raises UserError if there are files in the folder but `resume` is false, if another
        process uses the folder, or if a checkpoint in it cannot be used.
        """
        checkpoint = None
        if self.rank == 0 and self.folder is not None and self.folder.exists():
            if self.files() and not resume:
                raise UserError(f'{self.folder} already holds files: continue the run in it with '
                                '--resume, or choose a different --out')
            # Locked first: so no other run writes a checkpoint after this one has looked for it.
            self.lock_folder()
            if 'last.pt' in self.files():
                checkpoint = load_checkpoint(self.folder / 'last.pt')
                if 'optimizer' not in checkpoint:
                    raise UserError(f'{self.folder / "last.pt"} is incompatible: it holds weights '
                                    'only, as best.pt does')
                # The report at the end needs this file. Checked now, not after hours of training.
                load_checkpoint(self.folder / 'best.pt')
            elif 'history.csv' in self.files():
                raise UserError(f'{self.folder} holds a run, but its last.pt is missing, so it '
                                'cannot be continued: choose a different --out')
        checkpoint = broadcast(checkpoint)
        if checkpoint is not None:
            self.history = checkpoint['history']
            self.best_acc = max(row['val_acc'] for row in self.history)
        return checkpoint

    def files(self):
        """The names of everything in the folder, except the lock file."""
        return [file.name for file in self.folder.iterdir() if file.name != '.lock']

    def lock_folder(self):
        """Keeps other runs out of the folder until this process ends."""
        self.lock = FileLock(self.folder / '.lock')
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f'{self.folder} is in use by another run: wait until that has ended, '
                            'or choose a different --out') from None

    def start(self):
        """Makes the folder of a new run, or gets that of a continued one ready."""
        if self.rank == 0:
            if self.folder is None:
                self.folder = make_next_folder()
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.lock is None:
                # There was no folder to lock before. A different run may have made it since then.
                self.lock_folder()
                if self.files():
                    raise UserError(f'{self.folder} has just been used by another run: choose a '
                                    'different --out')
            # For people to read. The script itself keeps the settings in last.pt.
            write_text(self.folder / 'settings.json', json.dumps(self.settings, indent=1) + '\n')
            if self.history:
                print(f'resumed from epoch {len(self.history)} in {self.folder}', file=sys.stderr)
                # If the run was killed right after last.pt was written, history.csv and
                # curves.png are older than that.
                self.write_history()
            else:
                print(f'the folder of the run is {self.folder}', file=sys.stderr)
        self.folder = broadcast(self.folder)

    def add_epoch(self, row, model):
        """Adds the results of an epoch to the history, and keeps the weights if they are the best.

        Raises UserError if the loss is not finite.
        """
        if not math.isfinite(row['train_loss'] + row['val_loss']):
            raise UserError(f'epoch {row["epoch"]}: the loss is not a finite number; '
                            f'{self.describe_saved()}. Start a new run with a lower --lr, or with '
                            '--no-amp if this one computed with 16 bits')
        self.history.append(row)
        if row['val_acc'] > self.best_acc:
            self.best_acc = row['val_acc']
            self.best_checkpoint = copy.deepcopy(weights_checkpoint(model))

    def save_if_due(self, model, optimizer, scaler):
        """Saves the run after its last epoch, and if last.pt would be older than save_seconds
        after one more epoch."""
        # Saving can take as long as an epoch on a fast GPU, so not every epoch is saved.
        age_after_next_epoch = time.monotonic() - self.saved_time + self.history[-1]['seconds']
        finished = len(self.history) == self.settings['epochs']
        if self.rank == 0 and (finished or age_after_next_epoch > save_seconds):
            self.save(model, optimizer, scaler)

    def save(self, model, optimizer, scaler):
        """Writes best.pt, last.pt, history.csv and curves.png."""
        # best.pt first: if the run is killed between the two, it continues from an earlier epoch,
        # and reaches that of best.pt again. In the other order, the best weights would be lost.
        if self.best_checkpoint is not None:
            if write_checkpoint(self.folder / 'best.pt', self.best_checkpoint):
                self.best_checkpoint = None
        checkpoint = weights_checkpoint(model)
        checkpoint['optimizer_class'] = type(optimizer).__name__
        checkpoint['optimizer'] = optimizer.state_dict()
        checkpoint['scaler'] = scaler.state_dict()
        checkpoint['settings'] = self.settings
        checkpoint['history'] = self.history
        write_checkpoint(self.folder / 'last.pt', checkpoint)
        self.saved_time = time.monotonic()
        self.write_history()

    def write_history(self):
        """Writes history.csv and curves.png."""
        text = io.StringIO()
        # Columns may have been added to or removed from the script since the first epochs:
        # restval='' leaves a gap, extrasaction='ignore' leaves the rest out.
        table = csv.DictWriter(text, fieldnames=list(self.history[-1]), restval='',
                               extrasaction='ignore', lineterminator='\n')
        table.writeheader()
        table.writerows(self.history)
        write_text(self.folder / 'history.csv', text.getvalue())
        write_figure(self.folder / 'curves.png', draw_curves(self.history))

    def describe_saved(self):
        """Says what the folder holds that the run can be continued from."""
        if self.rank > 0:
            return 'see the message of process 0 for what is saved'
        epochs = self.saved_epochs()
        if epochs == 0:
            return f'{self.folder} holds no checkpoint yet'
        return f'{self.folder} holds the state after epoch {epochs}'

    def how_to_continue(self):
        """Says what the folder holds, and which command continues the run."""
        if self.rank > 0:
            return self.describe_saved()
        if self.saved_epochs() == 0:
            command = 'give the same command again, with --resume if it has --out'
        else:
            command = f'continue with python chapter2_2_train.py --out "{self.folder}" --resume'
        return f'{self.describe_saved()}; {command}'

    def saved_epochs(self):
        """How many epochs last.pt contains; 0 if there is no last.pt."""
        path = self.folder / 'last.pt'
        if not path.exists():
            return 0
        # mmap: does not read the weights.
        checkpoint = torch.load(path, weights_only=True, map_location='cpu', mmap=True)
        return len(checkpoint['history'])


def make_next_folder():
    """Makes and returns the first of runs/001, runs/002, ... that does not exist yet."""
    for number in itertools.count(1):
        folder = Path('runs', f'{number:03d}')
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder


@contextlib.contextmanager
def explained_errors(run, device):
    """If the training in the with-block is interrupted, loses another process, or has too little
    memory, says so, and how to continue."""
    try:
        yield
    except KeyboardInterrupt:
        data.ignore_signals()
        silence_threads()
        if run.rank == 0:
            print(f'interrupted: {run.how_to_continue()}', file=sys.stderr)
        sys.exit(130)  # the usual status after Ctrl-C
    except RuntimeError as error:
        # PyTorch raises RuntimeError for all of these. Only the text tells them apart.
        text = str(error)
        if 'tried to allocate' in text.lower():
            raise UserError(f'{device} has too little memory for batches of '
                            f'{run.settings["batch_size"]} images: start a new run with a smaller '
                            '--batch-size, in a different folder') from None
        if (text.startswith('DataLoader worker (pid')
                or 'unable to allocate shared memory' in text):
            silence_threads()
            raise UserError('a worker process has died, perhaps for lack of memory, or of shared '
                            f'memory (docker run --shm-size 2g helps then): '
                            f'{run.how_to_continue()}; add --workers 0 if it happens again'
                            ) from None
        if distributed.is_initialized():
            if isinstance(error, distributed.DistError) or 'gloo/transport' in text:
                # torchrun sends SIGTERM to the processes that are left, perhaps right now.
                data.ignore_signals()
                raise UserError(f'{lost_process_message(error)}; {run.how_to_continue()}'
                                ) from None
        raise
    except OSError as error:
        if error.errno is not None and error.filename is None:
            # For example "Broken pipe", if stdout has been closed.
            raise UserError(f'{error.strerror}; {run.how_to_continue()}') from None
        # Any other OSError is a bug, as `write` raises UserError for the files of the run. It is
        # raised as a RuntimeError, because run_script prints an OSError without a traceback.
        raise RuntimeError('the training has failed') from error


def silence_threads():
    """Lets threads end without a traceback. PyTorch's pin_memory thread would print one, because
    the workers that it waits for have ended."""
    threading.excepthook = lambda args: None


# ---- Files -----------------------------------------------------------------------------------

def write(path, write_content):
    """Writes a file in such a way that it is complete, or else as it was before.

    write_content: a function that writes the content into an open file.
    Returns False if another program uses the file, so that Windows does not allow replacing it.
    Raises UserError if the file cannot be written, for example because the disk is full.
    """
    # Into memory first: torch.save has no clear error for a full disk.
    content = io.BytesIO()
    write_content(content)
    temporary = path.with_name(path.name + '.tmp')
    try:
        written = replace_patiently(path, temporary, content.getbuffer())
    except OSError as error:
        raise UserError(f'cannot write {path}: {error.strerror}; '
                        'what was saved before is intact') from None
    finally:
        # If it cannot be deleted now, the next `write` replaces it.
        with contextlib.suppress(PermissionError):
            temporary.unlink(missing_ok=True)
    if not written:
        print(f'{path} is in use by another program and was left as it was', file=sys.stderr)
    return written


def replace_patiently(path, temporary, content):
    """Replaces a file. While another program uses it (on Windows), tries again, for two seconds.

    Returns whether it succeeded.
    """
    for _ in range(20):
        try:
            replace_file(path, temporary, content)
            return True
        except PermissionError:
            if not os.access(path.parent, os.W_OK):
                # It is the folder that cannot be written to. Waiting does not help.
                raise
            time.sleep(0.1)
    return False


def replace_file(path, temporary, content):
    """Writes the bytes into the temporary file, and puts that in the place of `path`."""
    with open(temporary, 'wb') as file:
        file.write(content)
        # The content must be on the disk before the old file goes: the power may fail.
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_text(path, text):
    """Writes a text file, as `write` does."""
    # surrogateescape: Linux allows file names that are not Unicode. They are written as they are.
    return write(path, lambda file: file.write(text.encode(errors='surrogateescape')))


def write_figure(path, figure):
    """Writes a matplotlib figure as a PNG file, as `write` does."""
    return write(path, lambda file: figure.savefig(file, format='png'))


def write_checkpoint(path, checkpoint):
    """Writes a checkpoint, as `write` does."""
    return write(path, lambda file: torch.save(checkpoint, file))


def weights_checkpoint(model):
    """A checkpoint that is enough for --predict: the weights, and what they require."""
    return {'model': model.state_dict(), 'requirements': requirements(model)}


def requirements(model):
    """What must be the same when the weights are used again."""
    # The text of a transform may contain the address of a function in memory, which is different
    # each time the script runs.
    test_transform = re.sub(' at 0x[0-9a-fA-F]+', '', str(data.test_transform))
    return {'network': type(model).__name__, 'CLASSES': list(data.CLASSES),
            'image_size': data.image_size, 'test_transform': test_transform}


def load_checkpoint(path):
    """Reads a checkpoint into the CPU's memory. Program code in it is not executed.

    Raises UserError if it is missing, corrupt, or not a checkpoint of this script.
    """
    if not path.exists():
        raise UserError(f'there is no {path}: is {path.parent} the folder of a run that has saved '
                        'a checkpoint?')
    # What zipfile and torch.load raise when bits of a file are wrong.
    errors_of_corrupt_files = (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError,
                               pickle.UnpicklingError, ValueError, LookupError, EOFError, OSError)
    with open(path, 'rb') as file:
        try:
            check_zip_file(file)
            file.seek(0)
            checkpoint = torch.load(file, weights_only=True, map_location='cpu')
        except errors_of_corrupt_files as error:
            raise UserError(f'{path} is corrupt, or not a checkpoint ({type(error).__name__}): '
                            'replace it by a copy, or start a new run in a different folder'
                            ) from None
    if not isinstance(checkpoint, dict) or 'requirements' not in checkpoint:
        raise UserError(f'{path} is incompatible: not a checkpoint of this version of the script; '
                        'start a new run in a different folder')
    return checkpoint


def check_zip_file(file):
    """Raises BadZipFile if a bit of a checkpoint is wrong. A checkpoint is a zip file, but PyTorch
    does not check the checksums in it."""
    with zipfile.ZipFile(file) as archive:
        bad_part = archive.testzip()
        # testzip does not check the attributes of the parts, which are always 0 in PyTorch's files.
        # A wrong bit there could turn a part into a folder, whose weights PyTorch would not read.
        has_attributes = any(part.external_attr != 0 for part in archive.infolist())
    if bad_part is not None or has_attributes:
        raise zipfile.BadZipFile


# What to do if a checkpoint does not fit the script.
undo_or_new_run = 'undo this change of the scripts, or start a new run in a different folder'


def load_weights(model, checkpoint, path):
    """Puts the weights of a checkpoint into the network.

    path: where the checkpoint comes from, for error messages.
    Raises UserError if they require a different network, different classes or different images.
    """
    for name, now in requirements(model).items():
        then = checkpoint['requirements'].get(name)
        if then != now:
            raise UserError(f'{path} is incompatible: its {name} was {then}, now it is {now}; '
                            f'{undo_or_new_run}')
    try:
        model.load_state_dict(checkpoint['model'])
    except RuntimeError:
        raise UserError(f'{path} is incompatible: its weights have other names or shapes than '
                        f'those of the network {type(model).__name__} now; {undo_or_new_run}'
                        ) from None


def restore(model, optimizer, scaler, checkpoint, path):
    """Brings everything that the training changes into the state that the checkpoint has.

    path: where the checkpoint comes from, for error messages.
    The optimizer's options, such as weight decay, remain those of the script.
    Raises UserError if the checkpoint does not fit the script.
    """
    load_weights(model, checkpoint, path)
    then, now = checkpoint['optimizer_class'], type(optimizer).__name__
    if then != now:
        raise UserError(f'{path} is incompatible: its optimizer was {then}, now it is {now}; '
                        f'{undo_or_new_run}')
    # Only Adam's averages come from the checkpoint, so that an edited option takes effect.
    state_dict = optimizer.state_dict()
    state_dict['state'] = checkpoint['optimizer']['state']
    optimizer.load_state_dict(state_dict)
    # On a different kind of device, weights may have a different order in memory (channels_last).
    # Adam's averages must have the same one.
    for weights, averages in optimizer.state.items():
        for name, value in averages.items():
            if value.shape == weights.shape:
                averages[name] = torch.empty_like(weights).copy_(value)
    # The scaler's state is empty if the checkpoint was written on a device without float16.
    if scaler.is_enabled() and checkpoint['scaler']:
        scaler.load_state_dict(checkpoint['scaler'])


def load_model(path, device):
    """The network with the weights of a checkpoint, on the device. path: a Path or a string.

    Raises UserError if the file is missing or corrupt, or does not fit the script.
    """
    path = Path(path)
    model = make_model(device)
    load_weights(model, load_checkpoint(path), path)
    return model


# ---- Pictures --------------------------------------------------------------------------------

def new_figure(width, height):
    """An empty figure; width and height in inches."""
    data.use_chinese_font()
    return Figure(figsize=(width, height), layout='constrained')


def draw_curves(history):
    """curves.png: accuracy and loss over the epochs, with the best epoch marked."""
    figure = new_figure(10, 4)
    left, right = figure.subplots(1, 2)
    draw_curve(left, history, 'acc', 'accuracy')
    draw_curve(right, history, 'loss', 'mean loss per image')
    left.set_ylim(0, 1.02)
    right.set_ylim(bottom=0)
    return figure


def draw_curve(axes, history, name, title):
    """One half of curves.png; name: 'acc' or 'loss'."""
    epochs = [row['epoch'] for row in history]
    best = max(history, key=lambda row: row['val_acc'])
    best_value = best[f'val_{name}']
    axes.plot(epochs, [row[f'train_{name}'] for row in history], marker='.', label='training')
    axes.plot(epochs, [row[f'val_{name}'] for row in history], marker='.', label='validation')
    axes.axvline(best['epoch'], color='grey', linestyle=':',
                 label=f'best: epoch {best["epoch"]}, {best_value:.3f}')
    axes.plot(best['epoch'], best_value, 'o', color='C1')
    axes.set_title(title)
    axes.set_xlabel('epoch')
    axes.set_xlim(0, epochs[-1] + 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()


def draw_confusion(counts):
    """confusion.png from counts (11, 11): a row for each true class, a column for each predicted.

    Each cell shows a number of images, and its share of all images of the true class.
    """
    figure = new_figure(9, 8.5)
    axes = figure.subplots()
    totals = counts.sum(1)
    # Each row is divided by its total; a class without images by 1 instead of 0.
    shares = counts / np.maximum(totals, 1)[:, np.newaxis]
    axes.imshow(shares, 'Blues', vmin=0, vmax=1)
    centered = {'ha': 'center', 'va': 'center', 'fontsize': 8}
    for true, predicted in np.argwhere(counts > 0):
        share = shares[true, predicted]
        color = 'black'
        if share > 0.5:
            color = 'white'
        axes.text(predicted, true, f'{counts[true, predicted]}\n{share:.0%}', color=color,
                  **centered)
    for true in np.flatnonzero(totals == 0):
        axes.text(len(data.CLASSES) / 2 - 0.5, true, 'no images of this class', color='grey',
                  **centered)
    axes.set_xticks(range(len(data.CLASSES)), data.CLASSES, rotation=45, ha='right')
    axes.set_yticks(range(len(data.CLASSES)), data.CLASSES)
    axes.set_xlabel('predicted')
    axes.set_ylabel('true')
    accuracy = np.trace(counts) / counts.sum()
    axes.set_title(f'{accuracy:.1%} of the validation images are right')
    return figure


def draw_images(images, titles, columns, heading):
    """Images (N, 128, 128, 3), BGR, uint8 or float in 0..1, in rows, with their titles."""
    rows = max(1, math.ceil(len(images) / columns))
    figure = new_figure(1.5 * columns, 2 * rows + 0.5)
    figure.suptitle(heading)
    for i, (image, title) in enumerate(zip(images, titles)):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.set_axis_off()
        axes.imshow(image[:, :, ::-1])  # BGR -> RGB
        axes.set_title(title, fontsize=8)
    return figure


def draw_mistakes(val_x, val_y, probabilities):
    """mistakes.png: the 24 wrong predictions with the highest probabilities."""
    predicted = probabilities.argmax(1)
    confidence = probabilities.max(1)
    wrong = np.flatnonzero(predicted != val_y)
    most_confident_first = np.argsort(-confidence[wrong], kind='stable')
    wrong = wrong[most_confident_first][:24]
    titles = [f'{data.CLASSES[val_y[i]]}\npredicted:\n{data.CLASSES[predicted[i]]} '
              f'{confidence[i]:.0%}' for i in wrong]
    heading = 'the most confident mistakes on the validation images'
    if len(wrong) == 0:
        heading = 'no mistakes on the validation images'
    return draw_images(val_x[wrong], titles, 8, heading)


# ---- Evaluation of a finished run, and prediction --------------------------------------------

def report(folder, val_x, val_y, batch_size, device, autocast):
    """Evaluates the best weights of the run in `folder` on the validation images.

    Prints the accuracy of each class, and writes confusion.png and mistakes.png.
    """
    model = load_model(folder / 'best.pt', device)
    probabilities = predict_probabilities(model, val_x, batch_size, device, autocast)
    counts = count_predictions(val_y, probabilities.argmax(1))
    print_accuracies(counts, 'with the best weights')
    write_figure(folder / 'confusion.png', draw_confusion(counts))
    write_figure(folder / 'mistakes.png', draw_mistakes(val_x, val_y, probabilities))


@torch.no_grad()
def predict_probabilities(model, x, batch_size, device, autocast):
    """Softmax probabilities, float32 (N, 11), of images x, uint8 (N, 128, 128, 3), BGR."""
    model.eval()
    dataset = data.ImgDataset(x, transform=data.test_transform)
    # An empty start, so that the result has 11 columns even if there are no images.
    probabilities = [torch.zeros(0, len(data.CLASSES))]
    for images in DataLoader(dataset, batch_size=batch_size):
        with autocast:
            scores = model(data.to_input(images, device))
        probabilities.append(scores.float().softmax(1).cpu())
    return torch.cat(probabilities).numpy()


def count_predictions(labels, predicted):
    """counts (11, 11): counts[i, j] is how many images of class i are predicted as class j."""
    counts = np.zeros((len(data.CLASSES), len(data.CLASSES)), dtype=int)
    for label, predicted_label in zip(labels, predicted):
        counts[label, predicted_label] += 1
    return counts


def print_accuracies(counts, heading):
    """Prints the accuracy of each class, with a heading of at most 22 characters."""
    print(f'{heading:<22} {"images":>6} {"right":>6} {"accuracy":>8}')
    for label, name in enumerate(data.CLASSES):
        total = counts[label].sum()
        right = counts[label, label]
        accuracy = '-'
        if total > 0:
            accuracy = f'{right / total:.1%}'
        print(f'{label:>2} {name:<19} {total:>6} {right:>6} {accuracy:>8}')
    total = counts.sum()
    right = np.trace(counts)
    print(f'{"total":<22} {total:>6} {right:>6} {right / total:>8.1%}', flush=True)


def predict_or_dream(args):
    """Does what --predict and --dreams ask for, with a checkpoint of the run in --out."""
    # If torchrun has started several processes, the first one does it.
    if int(os.environ.get('RANK', 0)) > 0:
        return
    device = pick_device(args.device)
    folder = Path(args.out)
    model = load_model(folder / args.checkpoint, device)
    if args.dreams:
        write_figure(folder / 'dreams.png', draw_dreams(model, device))
        print(f'picture written to {folder / "dreams.png"}')
    if args.predict:
        autocast, _ = mixed_precision(device, args.no_amp)
        batch_size = args.batch_size or data.batch_size
        predict(args.predict, model, folder, batch_size, device, autocast)


def predict(paths, model, run_folder, batch_size, device, autocast):
    """Predicts the classes of photographs. A folder stands for all photographs in it: their
    predictions are written into predict.csv. If they are named like those for training, also
    prints the accuracy.

    Raises UserError at the end if some photographs cannot be read; it says which.
    """
    folders = [path for path in paths if os.path.isdir(path)]
    if len(folders) > 1:
        raise UserError('--predict takes one folder at a time, as predict.csv is one table')
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f'there is no file or folder {path}')
    failures = {}
    for path in map(Path, paths):
        image_files = [path]
        if path.is_dir():
            image_files = data.list_images(path)
        x, readable = read_readable(image_files, failures)
        probabilities = predict_probabilities(model, x, batch_size, device, autocast)
        if path.is_dir():
            write_predictions(run_folder / 'predict.csv', path, readable, probabilities)
            print(f'{path}: {len(readable)} of {len(image_files)} photographs predicted, '
                  f'in {run_folder / "predict.csv"}')
            print_test_accuracies(path, readable, probabilities)
        elif readable:
            print(f'{path}: {three_likeliest(probabilities[0])}')
    if failures:
        raise UserError(data.bad_files_message(failures))


def read_readable(image_files, failures):
    """Reads those photographs that can be read. The others are added to failures: {file: reason}.

    Returns x, uint8 (N, 128, 128, 3), BGR, and the list of the N files that could be read.
    """
    images = {}

    def read(i):
        images[i] = data.read_image(image_files[i])

    failures.update(data.on_all_cores(read, image_files))
    numbers = sorted(images)
    x = np.zeros((len(numbers), data.image_size, data.image_size, 3), dtype=np.uint8)
    for row, i in enumerate(numbers):
        x[row] = images[i]
    return x, [image_files[i] for i in numbers]


def print_test_accuracies(folder, image_files, probabilities):
    """Prints the accuracy of each class, if the photographs are named like those for training.

    If they are not, says so on stderr.
    """
    labels = []
    unlabelled = []
    for file in image_files:
        try:
            labels.append(data.label_of(file, folder))
        except data.UnusableFile as error:
            unlabelled.append(f'{file}: {error}')
    if unlabelled:
        print(f'no accuracy, because {len(unlabelled)} of {len(image_files)} photographs have no '
              f'label, for example {unlabelled[0]}', file=sys.stderr)
    elif labels:
        counts = count_predictions(labels, probabilities.argmax(1))
        print_accuracies(counts, 'labels from the names')


def three_likeliest(probabilities):
    """The three likeliest classes as a text, from the probabilities (11,) of a photograph."""
    labels = np.argsort(-probabilities)[:3]
    return ', '.join(f'{data.CLASSES[label]} {probabilities[label]:.1%}' for label in labels)


def write_predictions(path, folder, image_files, probabilities):
    """predict.csv, as the course's Kaggle page takes it: an Id and a label for each photograph."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator='\n')
    table.writerow(['Id', 'Category'])
    table.writerows(zip(photograph_ids(folder, image_files), probabilities.argmax(1)))
    write_text(path, text.getvalue())


def photograph_ids(folder, image_files):
    """For each photograph the number that is its name (12 for 0012.jpg), else its whole name."""
    names = [file.relative_to(folder).as_posix() for file in image_files]
    ids = []
    for name in names:
        stem, _ = os.path.splitext(name)
        if stem.isdecimal():
            ids.append(int(stem))
        else:
            ids.append(name)
    if len(set(ids)) < len(ids):
        # Two photographs have the same number, such as 1.jpg and 01.jpg. Their names differ.
        return names
    return ids


# ---- Dreams (section 1.2) --------------------------------------------------------------------

def draw_dreams(model, device):
    """dreams.png: for each class the image that dream finds, and its probability."""
    images, probabilities = dream(model, device)
    titles = [f'{name}\n{y:.1%}' for name, y in zip(data.CLASSES, probabilities)]
    return draw_images(images, titles, 6, 'what the classes look like to the network')


def dream(model, device, steps=100):
    """Gradient ascent on the input (section 1.2): for each class, an image that the network
    classifies as that class.

    Formula 1.2.2 of the book: the image x of class i makes y_i - sum |x| large, where y_i is the
    probability of the class. Here it is log y_i - c * sum |x|. The logarithm grows with y_i, so
    c = 0 gives formula 1.2.1.
    Returns the images, float (11, 128, 128, 3), BGR in 0..1, and their probabilities y_i (11,).

    The images are what the network takes as input, after test_transform. If that ends with
    Normalize, the images are normalized too: their colours are not those of photographs.
    """
    # The numbers in this function were chosen by eye. The book's c is 1, but then the sum of
    # 49,152 numbers would count more than a probability, and the images would be black.
    c = 1e-4
    max_shift = 8  # pixels
    model.eval().requires_grad_(False)
    torch.manual_seed(0)
    classes = len(data.CLASSES)
    # Grey with a little noise, one image for each class.
    x = 0.4 + 0.1 * torch.rand(classes, 3, data.image_size, data.image_size)
    x = x.to(device).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for step in tqdm(range(steps), 'dreaming', leave=False, disable=None):
        optimizer.zero_grad()
        # The images are shifted by a different distance in each step. So only shapes make the
        # probability large, wherever they are. Without this, the images would be speckle.
        shift = torch.randint(-max_shift, max_shift + 1, (2,)).tolist()
        scores = model(x.roll(shift, dims=(2, 3)))
        # log y_i is large where y_i is large, but has a gradient also where y_i is near 0.
        # diagonal: of image i, only the probability of class i counts.
        log_y = scores.log_softmax(1).diagonal()
        objective = log_y.sum() - c * x.abs().sum()
        # An optimizer makes its objective small, so it gets the negative.
        (-objective).backward()
        optimizer.step()
        with torch.no_grad():
            if step % 4 == 0 and step < steps - 10:
                # Smooths out the speckle that is left, but not in the last steps.
                x.copy_(nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
            x.clamp_(0, 1)
    with torch.no_grad():
        y = model(x).softmax(1).diagonal()
    return x.detach().permute(0, 2, 3, 1).cpu().numpy(), y.cpu().numpy()


if __name__ == '__main__':
    data.run_script(main)
