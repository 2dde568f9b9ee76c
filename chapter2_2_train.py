"""Sections 2.3 and 2.4 of the book: the network, and its training on food-11.

    python chapter2_2_train.py                       the book's run: 100 epochs on ./food-11
    python chapter2_2_train.py --demo                needs no photographs: learns drawn dishes
    torchrun --nproc-per-node 2 chapter2_2_train.py  two GPUs (or CPU processes) train together

Each run has a folder for its checkpoints, history and pictures: runs/001, runs/002, ... or --out.

    python chapter2_2_train.py --out runs/001 --resume            continues a run, or starts it
    python chapter2_2_train.py --out runs/001 --predict dinner.jpg
    python chapter2_2_train.py --out runs/001 --dreams            the class images of section 1.2
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

# The drawn dishes of --demo are few and simple.
DEMO_SETTINGS = {'epochs': 5, 'batch_size': 16, 'lr': 0.0001}

# A run that is killed loses the training of so many seconds, or one epoch if that is longer.
save_seconds = 60


# ---- The network (section 2.3) ---------------------------------------------------------------

class Classifier(nn.Module):
    """Scores of the 11 classes for images: float (N, 3, 128, 128), BGR -> float (N, 11)."""

    def __init__(self):
        super().__init__()
        # The comments are the shapes of the outputs, starting from [3, 128, 128].
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
            nn.Linear(512 * 4 * 4, 1024),  # [1024]; 4 is image_size / 32
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
    """The network on its device. To train another one, change it here."""
    model = Classifier()
    # channels_last: the same numbers, in the order in memory that convolutions are fastest with.
    return model.to(device, memory_format=torch.channels_last)


# ---- Training (section 2.4) ------------------------------------------------------------------

def train_epoch(model, train_loader, loss, optimizer, device, autocast, scaler, title=''):
    """Trains the network once on every training image.

    Returns the accuracy and the mean loss per image, of the predictions made on the way.
    autocast: the context to compute in. scaler: a GradScaler. title: of the progress bar.
    """
    model.train()
    # The sums stay on the device: to read them after every batch, the GPU would have to stop.
    correct = torch.zeros((), device=device)
    loss_sum = torch.zeros((), device=device)
    images = 0
    for x, y in progress(train_loader, title):
        x = data.to_input(x, device)
        y = data.to_device(y, device)
        optimizer.zero_grad()
        with autocast:
            train_pred = model(x)
            batch_loss = loss(train_pred, y)
        # Without float16 the scaler does nothing: backward() and step(), as in the book.
        scaler.scale(batch_loss).backward()
        scaler.step(optimizer)
        scaler.update()
        correct += (train_pred.argmax(1) == y).sum()
        # batch_loss is a mean, and the last batch is smaller than the others.
        loss_sum += batch_loss.detach() * len(y)
        images += len(y)
    return accuracy_and_loss(correct, loss_sum, images)


@torch.no_grad()
def evaluate(model, val_loader, device, autocast, title=''):
    """Returns the accuracy and the mean cross-entropy per image on the validation images."""
    model.eval()
    correct = torch.zeros((), device=device)
    loss_sum = torch.zeros((), device=device)
    images = 0
    for x, y in progress(val_loader, title):
        x = data.to_input(x, device)
        y = data.to_device(y, device)
        with autocast:
            val_pred = model(x)
        # The plain cross-entropy, whatever loss the training uses: comparable between runs.
        loss_sum += nn.functional.cross_entropy(val_pred.float(), y, reduction='sum')
        correct += (val_pred.argmax(1) == y).sum()
        images += len(y)
    return accuracy_and_loss(correct, loss_sum, images)


def accuracy_and_loss(correct, loss_sum, images):
    """Divides the sums by the number of images, over all processes that train together."""
    sums = torch.stack([correct, loss_sum, torch.full_like(correct, images)])
    if distributed.is_initialized():
        distributed.all_reduce(sums)
    correct, loss_sum, images = sums.tolist()
    return correct / images, loss_sum / images


def train(model, train_loader, val_loader, loss, optimizer, device, autocast, scaler, run, rank):
    """The book's loop: train, evaluate, print a line, save. A resumed run goes on where it was.

    run: a Run. rank: the number of this process; only process 0 prints and saves.
    Raises UserError if the loss is no longer finite.
    """
    epochs = run.settings['epochs']
    seed = run.settings['seed']
    parallel_model = synchronized(model, device)
    for epoch in range(len(run.history) + 1, epochs + 1):
        start_time = time.perf_counter()
        title = f'[{epoch:03d}/{epochs:03d}]'
        # What is random in an epoch depends on the seed and the epoch only: a resumed run
        # repeats it. The last line is for layers that draw, such as Dropout.
        train_loader.sampler.set_epoch(epoch)
        train_loader.dataset.set_epoch(epoch)
        torch.manual_seed(seed + epoch)
        # A learning-rate schedule goes here. Compute the rate from `epoch`, and it is right
        # after a resume as well: optimizer.param_groups[0]['lr'] = ...

        train_acc, train_loss = train_epoch(parallel_model, train_loader, loss, optimizer,
                                            device, autocast, scaler, title)
        synchronize_buffers(model)
        val_acc, val_loss = evaluate(model, val_loader, device, autocast, f'{title} validation')

        seconds = time.perf_counter() - start_time
        if rank == 0:
            print(f'{title} {seconds:.2f} sec(s) Train Acc: {train_acc:.6f} '
                  f'Loss: {train_loss:.6f} | Val Acc: {val_acc:.6f} loss: {val_loss:.6f}',
                  flush=True)
        if not math.isfinite(train_loss + val_loss):
            raise UserError(f'epoch {epoch}: the loss is not a finite number; {run.saved()}. '
                            'Start a new run with a lower --lr, or with --no-amp')
        if rank == 0:
            # Each row becomes a line of history.csv; columns may be added.
            row = {'epoch': epoch, 'seconds': seconds, 'train_acc': train_acc,
                   'train_loss': train_loss, 'val_acc': val_acc, 'val_loss': val_loss}
            run.add_epoch(row, model, optimizer)


# ---- The script ------------------------------------------------------------------------------

def main():
    args = parse_arguments()
    if args.predict or args.dreams:
        use_run(args)
        return

    device = pick_device(args.device)
    rank, world_size = join_processes(device)
    checkpoint = checkpoint_to_resume(args, rank)
    settings = choose_settings(args, checkpoint, world_size)
    batch_size = settings['batch_size']
    seed = settings['seed']
    workers = choose_workers(args.workers, device, batch_size)
    dtype = fastest_dtype(device, settings['amp'])
    autocast = computing_in(dtype, device)
    # float16 gradients may be too small to be told from 0: the scaler makes them larger.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if rank == 0:
        print_machine(device, args.device, dtype, workers, world_size)

    if args.demo:
        draw_demo_once(rank)
    train_x, train_y, val_x, val_y = data.read_food11(settings['data_dir'])
    train_set = data.ImgDataset(train_x, train_y, data.train_transform, seed)
    # Each process evaluates every world_size-th validation image.
    val_set = data.ImgDataset(val_x[rank::world_size], val_y[rank::world_size],
                              data.test_transform)
    train_loader, val_loader = data.make_loaders(train_set, val_set, batch_size, workers,
                                                 device.type == 'cuda', rank, world_size, seed)
    if device.type != 'cpu':
        # The validation images are the same in every epoch: they stay on the GPU.
        val_loader = [(x.to(device), y.to(device)) for x, y in val_loader]

    torch.manual_seed(seed)
    model = make_model(device)
    loss = nn.CrossEntropyLoss()
    # fused: on a GPU, all weights in a few kernels.
    optimizer = torch.optim.Adam(model.parameters(), lr=settings['lr'],
                                 fused=device.type == 'cuda')
    run = Run(args.out, settings, checkpoint, rank)
    if checkpoint is not None:
        load_weights(model, checkpoint, run.folder / 'last.pt')
        load_optimizer(optimizer, checkpoint, run.folder / 'last.pt')
    run.open()

    speed_up(device, batch_size)
    with explained_errors(run, device):
        train(model, train_loader, val_loader, loss, optimizer, device, autocast, scaler, run, rank)
        if rank == 0:
            report(run.folder, val_x, val_y, batch_size, device, autocast)
    if world_size > 1:
        distributed.destroy_process_group()


# ----------------------------------------------------------------------------------------------
# This was the book's chapter. What follows makes it fast, safe to leave alone, and of use
# afterwards: command line, devices, processes, the run's folder, pictures, prediction, dreams.
# ----------------------------------------------------------------------------------------------

# ---- Command line ----------------------------------------------------------------------------

def parse_arguments():
    """The command line. None stands for what was not given; choose_settings fills that in."""
    parser = argparse.ArgumentParser(usage='%(prog)s [options]', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    data.add_data_arguments(parser)
    demo = DEMO_SETTINGS
    parser.add_argument('--epochs', type=int, metavar='N',
                        help='how often to train on all training images '
                        f'(default: {num_epoch}; with --demo {demo["epochs"]})')
    parser.add_argument('--batch-size', type=int, metavar='N',
                        help='images in a training step, of all processes together '
                        f'(default: {data.batch_size}; with --demo {demo["batch_size"]})')
    parser.add_argument('--lr', type=float, metavar='X',
                        help="Adam's learning rate "
                        f'(default: {learning_rate}; with --demo {demo["lr"]})')
    parser.add_argument('--seed', type=int, metavar='N',
                        help='the same seed gives the same numbers on the CPU (default: 0)')
    parser.add_argument('--no-amp', dest='amp', action='store_const', const=False,
                        help='compute in full precision (default: in bfloat16 or float16 where '
                        'the hardware is faster in it)')
    parser.add_argument('--workers', type=int, metavar='N',
                        help='processes that prepare training batches; 0: the main process '
                        'does it (default: for a GPU the number of CPU cores minus 1, at most '
                        '16; on the CPU 0)')
    parser.add_argument('--device', metavar='NAME',
                        help='cuda, cuda:1, mps, xpu or cpu (default: a GPU if PyTorch finds one)')
    parser.add_argument('--out', metavar='DIR',
                        help="the run's folder (default: the next of runs/001, runs/002, ...)")
    parser.add_argument('--resume', action='store_true',
                        help='continue the run in --out, or start it if there is none yet')
    parser.add_argument('--predict', nargs='+', metavar='PATH',
                        help='predict the classes of photographs with the run in --out; for a '
                        'folder, write them into predict.csv')
    parser.add_argument('--dreams', action='store_true',
                        help='draw what the classes look like to the network of the run in --out')
    parser.add_argument('--checkpoint', default='best.pt', metavar='NAME',
                        help='the file in --out that --predict and --dreams use '
                        '(default: %(default)s)')
    args = parser.parse_args()

    limits = {'epochs': (1, 10**9), 'batch_size': (1, 10**9), 'lr': (0, 1),
              'seed': (0, 2**32 - 1), 'workers': (0, 1000)}
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        # "not": comparisons with nan are false
        if value is not None and not low <= value <= high:
            option = name.replace('_', '-')
            parser.error(f'argument --{option}: {value} is not in {low}..{high}')
    if args.out is None and (args.resume or args.predict or args.dreams):
        parser.error('--resume, --predict and --dreams need the folder of a run: --out DIR')
    return args


def choose_settings(args, checkpoint, world_size):
    """The settings of a run: those of the checkpoint it continues, or the given ones, or defaults.

    Raises UserError if a resumed run is given other settings, or if the batches cannot be divided
    by the number of processes.
    """
    settings = {'data_dir': data.data_dir, 'epochs': num_epoch, 'batch_size': data.batch_size,
                'lr': learning_rate, 'seed': 0, 'amp': True}
    if args.demo:
        settings.update(DEMO_SETTINGS)
        args.data_dir = data.demo_dir
    given = {name: getattr(args, name) for name in settings if getattr(args, name) is not None}
    if checkpoint is not None:
        settings = checkpoint['settings']
        for name in ('batch_size', 'lr', 'seed', 'amp'):
            if name in given and given[name] != settings[name]:
                option = name.replace('_', '-')
                raise UserError(f'{args.out} was trained with {option} {settings[name]} and cannot '
                                f'continue with {given[name]}: leave the option out, or start '
                                'a new run in another folder')
    settings = {**settings, **given}
    if checkpoint is not None and settings['epochs'] < len(checkpoint['history']):
        raise UserError(f'{args.out} has {len(checkpoint["history"])} epochs already, more than '
                        f'--epochs {settings["epochs"]}')
    if settings['batch_size'] % world_size != 0:
        raise UserError(f'{world_size} processes cannot share batches of {settings["batch_size"]} '
                        'images equally: give another --batch-size, or torchrun another '
                        '--nproc-per-node')
    return settings


# ---- Device and precision --------------------------------------------------------------------

def pick_device(name):
    """The device called `name`; without a name CUDA, else another GPU, else the CPU.

    Raises UserError if PyTorch cannot use it here.
    """
    with_torchrun = distributed.is_torchelastic_launched()
    if name is None:
        name = 'cpu'
        if torch.accelerator.is_available():
            found = torch.accelerator.current_accelerator().type
            # Several processes can train together on CUDA and on the CPU.
            if found == 'cuda' or not with_torchrun:
                name = found
    if name == 'cuda' and with_torchrun:
        # Each process of a machine has a GPU of its own.
        name = f'cuda:{os.environ["LOCAL_RANK"]}'
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f'PyTorch {torch.__version__} cannot use the device {name} here: {reason}; '
                        '--device cpu always works') from None
    return device


def print_machine(device, wanted, dtype, workers, world_size):
    """Prints on stderr what the training will run on. wanted: what --device says, or None."""
    text = str(device)
    if device.type == 'cuda':
        text = f'{device} ({torch.cuda.get_device_name(device)})'
    elif device.type == 'cpu' and wanted is None:
        text = 'cpu (PyTorch finds no GPU: see "GPU" in README.md)'
    dtype_name = str(dtype).removeprefix('torch.')
    print(f'device {text}, precision {dtype_name}, loader workers {workers}, '
          f'processes {world_size}', file=sys.stderr)


def fastest_dtype(device, amp):
    """The type of numbers to compute in: float32, or if amp is true, what the device is fast in."""
    if amp and device.type == 'cuda':
        major, _ = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16
        if major == 7:
            return torch.float16
    if amp and device.type == 'cpu':
        # Other CPUs only emulate bfloat16, slowly.
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
            return torch.bfloat16
    return torch.float32


def computing_in(dtype, device):
    """The context in which the network computes in dtype, where that keeps its accuracy."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def available_cores():
    """How many CPU cores this process may use, where torchrun's processes share a machine."""
    cores = os.cpu_count()
    if hasattr(os, 'sched_getaffinity'):
        cores = len(os.sched_getaffinity(0))
    return max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1)))


def choose_workers(wanted, device, batch_size):
    """How many processes prepare the training batches: `wanted`, unless that is None."""
    if wanted is not None:
        return wanted
    if device.type == 'cpu':
        # Its cores are busy with the network.
        return 0
    workers = min(available_cores() - 1, 16)
    if sys.platform == 'win32':
        # There each worker reserves gigabytes of the page file.
        workers = min(workers, 4)
    if os.path.isdir('/dev/shm'):
        # Batches travel in shared memory, of which a container may have only 64 MB. Each worker
        # has two batches ready and one in the making.
        batch_bytes = 3 * data.image_size ** 2 * batch_size
        fitting = shutil.disk_usage('/dev/shm').free // (4 * batch_bytes)
        if fitting < workers:
            print(f'only {fitting} of {workers} workers, as /dev/shm is small: '
                  'docker run --shm-size 2g makes it larger', file=sys.stderr)
            workers = fitting
    return workers


def speed_up(device, batch_size):
    """Settings of PyTorch and of the system that hold for the whole process."""
    # cuDNN tries its algorithms at the first batches, and stays with the fastest.
    torch.backends.cudnn.benchmark = True
    if device.type == 'cpu' and sys.platform == 'linux':
        keep_freed_memory(batch_size)


def keep_freed_memory(batch_size):
    """Lets Linux's malloc keep the memory that a training step frees, for the next step.

    Otherwise the system takes it back and clears it anew for every step, which takes up to 40% of
    the time of training on the CPU. The process then needs up to 70% more memory, so this is done
    only where the machine has plenty.
    """
    machine_bytes = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    # The limit of a container: a number, or "max".
    limit = Path('/sys/fs/cgroup/memory.max')
    if limit.exists() and limit.read_text().strip().isdecimal():
        machine_bytes = min(machine_bytes, int(limit.read_text()))
    # About twice what Classifier was seen to need: 50 MB for an image of 128 x 128 pixels.
    needed_bytes = 6000 * data.image_size ** 2 * batch_size
    libc = ctypes.CDLL(None)
    if machine_bytes > needed_bytes and hasattr(libc, 'mallopt'):
        # From malloc.h; see mallopt(3).
        M_TRIM_THRESHOLD = -1
        M_MMAP_MAX = -4
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_MMAP_MAX, 0)


# ---- Several processes, started by torchrun --------------------------------------------------

def join_processes(device):
    """Connects the processes that torchrun has started.

    Returns rank, the number of this process, and world_size, how many there are: without
    torchrun 0 and 1.
    """
    if not distributed.is_torchelastic_launched():
        return 0, 1
    backend = 'gloo'
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        backend = 'nccl'
    else:
        # torchrun has set it to 1.
        torch.set_num_threads(available_cores())
    store, rank, world_size = next(distributed.rendezvous('env://'))
    if os.environ['GROUP_WORLD_SIZE'] == '1':
        # After a restart (--max-restarts) torchrun's store still has the addresses of the dead
        # processes: each attempt gets names of its own. (Several machines count differently.)
        store = distributed.PrefixStore(os.environ['TORCHELASTIC_RESTART_COUNT'], store)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return rank, world_size


def broadcast(value):
    """What `value` is in process 0, in every process."""
    if not distributed.is_initialized():
        return value
    values = [value]
    try:
        distributed.broadcast_object_list(values)
    except RuntimeError as error:
        raise UserError(another_ended(error)) from None
    return values[0]


def synchronized(model, device):
    """The network for training: with several processes, one that averages their gradients."""
    if not distributed.is_initialized():
        return model
    if device.type == 'cuda':
        # Batch norm takes the mean and variance of the images of all processes.
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return nn.parallel.DistributedDataParallel(model)


def synchronize_buffers(model):
    """Gives every process the batch norm statistics of process 0 (on the CPU they differ)."""
    if distributed.is_initialized():
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)


def progress(batches, title):
    """The batches, with a progress bar if stderr is a terminal and this is process 0."""
    hidden = None  # tqdm then looks whether stderr is a terminal
    if distributed.is_initialized() and distributed.get_rank() > 0:
        hidden = True
    return tqdm(batches, title, unit='batch', leave=False, disable=hidden)


def draw_demo_once(rank):
    """Draws the demo's photographs in one process of each machine; the others wait for it."""
    if int(os.environ.get('LOCAL_RANK', 0)) == 0:
        data.draw_demo()
    if distributed.is_initialized():
        distributed.barrier()


def another_ended(error):
    """The message for a broken connection between the processes."""
    reason = str(error).strip().splitlines()[-1]
    return ('another process of this run has ended, or cannot be reached, and so this one ends '
            f'({reason}); continue with --out and --resume')


# ---- The run's folder ------------------------------------------------------------------------

class Run:
    """A run's folder, with its settings and its history so far. Only process 0 writes into it.

    folder: a Path. history: a dictionary for each epoch. rank: the number of this process.
    """

    def __init__(self, out, settings, checkpoint, rank):
        self.folder = None
        if out is not None:
            self.folder = Path(out)
        self.settings = settings
        self.rank = rank
        self.history = []
        if checkpoint is not None:
            self.history = checkpoint['history']
        self.saved_epochs = len(self.history)
        self.saved_at = time.monotonic()
        self.best_acc = max((row['val_acc'] for row in self.history), default=-1)
        self.best_checkpoint = None

    def open(self):
        """Makes the folder if need be, and keeps other runs out of it until this process ends."""
        if self.rank == 0:
            self.open_folder()
        self.folder = broadcast(self.folder)

    def open_folder(self):
        if self.folder is None:
            self.folder = next_free_folder()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.folder / '.lock')
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f'{self.folder} is in use by another run: wait until that has ended, '
                            'or choose another --out') from None
        # For people to read; nothing reads it back.
        write_text(self.folder / 'settings.json', json.dumps(self.settings, indent=1) + '\n')
        message = f'the folder of the run is {self.folder}'
        if self.history:
            message = f'resumed from epoch {len(self.history)} in {self.folder}'
            # A run that was killed just after it had written last.pt lacks its last lines.
            self.write_history()
        print(message, file=sys.stderr)

    def add_epoch(self, row, model, optimizer):
        """Takes the results of an epoch, and saves the run if it is time to."""
        self.history.append(row)
        if row['val_acc'] > self.best_acc:
            self.best_acc = row['val_acc']
            self.best_checkpoint = copy.deepcopy(weights_of(model))
        # On a fast GPU an epoch takes no longer than writing a checkpoint: not every epoch then.
        # Now is the time if the end of the next epoch would be too late.
        next_end = time.monotonic() + row['seconds']
        finished = len(self.history) == self.settings['epochs']
        if finished or next_end - self.saved_at > save_seconds:
            self.save(model, optimizer)

    def save(self, model, optimizer):
        """Writes best.pt, last.pt, history.csv and curves.png."""
        # best.pt first: a run that is killed after it finds the same weights again on its way.
        if self.best_checkpoint is not None:
            written = write_checkpoint(self.folder / 'best.pt', self.best_checkpoint)
            if written:
                self.best_checkpoint = None
        checkpoint = {**weights_of(model), 'optimizer_class': type(optimizer).__name__,
                      'optimizer': optimizer.state_dict(), 'settings': self.settings,
                      'history': self.history}
        if write_checkpoint(self.folder / 'last.pt', checkpoint):
            self.saved_epochs = len(self.history)
        self.saved_at = time.monotonic()
        self.write_history()

    def write_history(self):
        """Writes history.csv and curves.png."""
        text = io.StringIO()
        # The epochs of an older version of the script may lack a column.
        columns = list(self.history[-1])
        table = csv.DictWriter(text, columns, restval='', extrasaction='ignore',
                               lineterminator='\n')
        table.writeheader()
        table.writerows(self.history)
        write_text(self.folder / 'history.csv', text.getvalue())
        write(self.folder / 'curves.png', draw_curves(self.history).savefig)

    def saved(self):
        """What the folder holds to continue from, in words."""
        if self.rank > 0:
            return 'what is saved, process 0 says'
        if self.saved_epochs == 0:
            return f'{self.folder} holds no checkpoint yet'
        return f'{self.folder} holds the state after epoch {self.saved_epochs}'


def next_free_folder():
    """Makes and returns the first of runs/001, runs/002, ... that does not exist yet."""
    for number in itertools.count(1):
        folder = Path('runs', f'{number:03d}')
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder


def write(path, save):
    """Makes `path` what `save(file)` writes: completely, or not at all.

    Returns False if another program holds `path` open, which Windows does not let be replaced.
    Raises UserError if the disk is full, say; the old file is left as it was.
    """
    # First into memory: what torch.save raises on a full disk does not say so.
    content = io.BytesIO()
    save(content)
    temporary = path.with_name(path.name + '.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(content.getbuffer())
            # Onto the disk before it replaces the old file: the power may fail.
            file.flush()
            os.fsync(file.fileno())
        replaced = replace(temporary, path)
    except OSError as error:
        raise UserError(f'cannot write {path}: {error.strerror}; '
                        'what was saved before is intact') from None
    finally:
        temporary.unlink(missing_ok=True)
    if not replaced:
        print(f'{path} is in use by another program and was left as it was', file=sys.stderr)
    return replaced


def replace(source, target):
    """os.replace that waits up to two seconds for programs that hold the target open (Windows)."""
    for _ in range(20):
        try:
            os.replace(source, target)
            return True
        except PermissionError:
            time.sleep(0.1)
    return False


def write_text(path, text):
    return write(path, lambda file: file.write(text.encode()))


def write_checkpoint(path, checkpoint):
    return write(path, lambda file: torch.save(checkpoint, file))


def weights_of(model):
    """The part of a checkpoint that --predict needs: the weights, and what they were made for."""
    return {'model': model.state_dict(), 'made_for': what_a_model_is_made_for(model)}


def what_a_model_is_made_for(model):
    """What must be the same when a checkpoint is used again, apart from the weights' shapes."""
    # The address of a function in memory differs between two runs of a program.
    test_transform = re.sub(' at 0x[0-9a-fA-F]+', '', str(data.test_transform))
    return {'network': type(model).__name__, 'CLASSES': list(data.CLASSES),
            'image_size': data.image_size, 'test_transform': test_transform}


def checkpoint_to_resume(args, rank):
    """The checkpoint of the run that --resume continues, in every process; None for a new run.

    Raises UserError if --out holds files and --resume is not given, or a checkpoint is corrupt.
    """
    checkpoint = None
    if rank == 0 and args.out is not None:
        folder = Path(args.out)
        if not args.resume and folder.exists():
            if any(file.name != '.lock' for file in folder.iterdir()):
                raise UserError(f'{folder} already holds files: continue the run in it with '
                                '--resume, or choose another --out')
        if args.resume and (folder / 'last.pt').exists():
            checkpoint = load_checkpoint(folder / 'last.pt')
            if 'optimizer' not in checkpoint:
                raise UserError(f'{folder / "last.pt"} is incompatible: it holds only weights')
            # The final report needs it: better to know now than in the morning.
            load_checkpoint(folder / 'best.pt')
    return broadcast(checkpoint)


def load_checkpoint(path):
    """Reads a checkpoint into the CPU's memory. Nothing that is in it gets executed.

    Raises UserError if it is missing, corrupt, or not a checkpoint of this script.
    """
    if not path.exists():
        raise UserError(f'there is no {path}: --out must name the folder of a run that has saved '
                        'a checkpoint')
    # What zipfile and torch.load were seen to raise for files with flipped bits.
    corrupt_file_errors = (zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError,
                           RuntimeError, ValueError, EOFError, OSError)
    with open(path, 'rb') as file:
        try:
            # PyTorch writes a checksum of each tensor, but does not check it.
            intact = zipfile.ZipFile(file).testzip() is None
            file.seek(0)
            checkpoint = torch.load(file, weights_only=True, map_location='cpu')
        except corrupt_file_errors:
            intact = False
    if not intact:
        raise UserError(f'{path} is corrupt, or not a checkpoint; nothing in it was executed')
    if not isinstance(checkpoint, dict) or not {'model', 'made_for'} <= checkpoint.keys():
        raise UserError(f'{path} is incompatible: not a checkpoint of this version of the script')
    return checkpoint


def load_weights(model, checkpoint, path):
    """Puts the weights of a checkpoint into the network.

    Raises UserError if they were made for another network, other classes or images.
    """
    for name, now in what_a_model_is_made_for(model).items():
        then = checkpoint['made_for'].get(name)
        if then != now:
            raise UserError(f'{path} is incompatible: it was made for {name} {then}, '
                            f'but the scripts have {now}')
    try:
        model.load_state_dict(checkpoint['model'])
    except RuntimeError:
        raise UserError(f'{path} is incompatible: its weights do not fit the network '
                        f'{type(model).__name__} as it is in the script') from None


def load_optimizer(optimizer, checkpoint, path):
    """Restores what the optimizer has computed; its options are those of the code.

    Raises UserError if the checkpoint is of another optimizer.
    """
    then = checkpoint['optimizer_class']
    if then != type(optimizer).__name__:
        raise UserError(f'{path} is incompatible: it was trained with {then}, the script has '
                        f'{type(optimizer).__name__}')
    state_dict = optimizer.state_dict()
    state_dict['state'] = checkpoint['optimizer']['state']
    optimizer.load_state_dict(state_dict)


def load_model(path, device):
    """The network with the weights of a checkpoint, on the device."""
    model = make_model(device)
    load_weights(model, load_checkpoint(path), path)
    return model


@contextlib.contextmanager
def explained_errors(run, device):
    """Says in one line what ended the training from outside, what is saved, and what to do."""
    resume = f'continue with python chapter2_2_train.py --out "{run.folder}" --resume'
    try:
        yield
    except KeyboardInterrupt:
        if run.rank == 0:
            print(f'interrupted: {run.saved()}; {resume}', file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        text = str(error)
        if 'tried to allocate' in text.lower():
            raise UserError(f'{device} has too little memory for batches of '
                            f'{run.settings["batch_size"]} images: start a new run with a smaller '
                            '--batch-size') from None
        if text.startswith('DataLoader worker (pid'):
            raise UserError('a worker process has died, perhaps for lack of memory, or of shared '
                            f'memory (docker run --shm-size 2g): {run.saved()}; {resume}, '
                            'and --workers 0 if it dies again') from None
        if isinstance(error, distributed.DistError) or 'gloo' in text:
            raise UserError(another_ended(error)) from None
        raise


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

    Each cell has a number of images, and its share of the images of the true class.
    """
    figure = new_figure(9, 8.5)
    axes = figure.subplots()
    totals = counts.sum(1)
    shares = counts / totals.clip(1)[:, None]
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
    """Images (N, 128, 128, 3), BGR, uint8 or float in 0..1, in rows under their titles."""
    rows = max(1, math.ceil(len(images) / columns))
    figure = new_figure(1.5 * columns, 2 * rows + 0.5)
    figure.suptitle(heading)
    grid = figure.subplots(rows, columns)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, image, title in zip(grid.flat, images, titles):
        axes.imshow(image[:, :, ::-1])  # BGR -> RGB
        axes.set_title(title, fontsize=8)
    return figure


def draw_mistakes(val_x, val_y, probabilities):
    """mistakes.png: the 24 wrong predictions that the network is most confident of."""
    predicted = probabilities.argmax(1)
    confidence = probabilities.max(1)
    wrong = np.flatnonzero(predicted != val_y)
    wrong = wrong[np.argsort(-confidence[wrong], kind='stable')][:24]
    titles = [f'{data.CLASSES[val_y[i]]}\npredicted:\n{data.CLASSES[predicted[i]]} '
              f'{confidence[i]:.0%}' for i in wrong]
    heading = 'the most confident mistakes on the validation images'
    if len(wrong) == 0:
        heading = 'no mistakes on the validation images'
    return draw_images(val_x[wrong], titles, 8, heading)


# ---- Prediction ------------------------------------------------------------------------------

@torch.no_grad()
def predict_probabilities(model, x, images_per_step, device, autocast):
    """Softmax probabilities, float32 (N, 11), of images x, uint8 (N, 128, 128, 3), BGR."""
    model.eval()
    dataset = data.ImgDataset(x, transform=data.test_transform)
    probabilities = [torch.zeros(0, len(data.CLASSES))]
    for images in DataLoader(dataset, batch_size=images_per_step):
        with autocast:
            scores = model(data.to_input(images, device))
        probabilities.append(scores.float().softmax(1).cpu())
    return torch.cat(probabilities).numpy()


def report(folder, val_x, val_y, images_per_step, device, autocast):
    """What the best weights of the run in `folder` make of the validation images.

    Prints the accuracy of each class, and writes confusion.png and mistakes.png.
    """
    model = load_model(folder / 'best.pt', device)
    probabilities = predict_probabilities(model, val_x, images_per_step, device, autocast)
    counts = np.zeros((len(data.CLASSES), len(data.CLASSES)), dtype=int)
    np.add.at(counts, (val_y, probabilities.argmax(1)), 1)
    print_accuracies(counts)
    write(folder / 'confusion.png', draw_confusion(counts).savefig)
    write(folder / 'mistakes.png', draw_mistakes(val_x, val_y, probabilities).savefig)


def print_accuracies(counts):
    """Prints a table from counts (11, 11): a row for each true class, a column per prediction."""
    print(f'{"with the best weights":<22} {"images":>6} {"right":>6} {"accuracy":>8}')
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


def use_run(args):
    """Does what --dreams and --predict ask for, with a checkpoint of the run in --out."""
    # If torchrun has started several processes, the first one does it.
    if int(os.environ.get('RANK', 0)) > 0:
        return
    device = pick_device(args.device)
    folder = Path(args.out)
    model = load_model(folder / args.checkpoint, device)
    if args.dreams:
        write(folder / 'dreams.png', draw_dreams(model, device).savefig)
        print(f'picture written to {folder / "dreams.png"}')
    if args.predict:
        full_precision = args.amp is False
        autocast = computing_in(fastest_dtype(device, not full_precision), device)
        all_read = predict(args.predict, model, folder, device, autocast)
        if not all_read:
            sys.exit(1)


def predict(paths, model, run_folder, device, autocast):
    """Predicts photographs, and all photographs of a folder.

    Returns whether all of them could be read; those that could not are named on stderr.
    """
    if sum(os.path.isdir(path) for path in paths) > 1:
        raise UserError('--predict takes one folder at a time, as predict.csv is one table')
    all_read = True
    for path in map(Path, paths):
        image_files = [path]
        if path.is_dir():
            image_files = data.list_images(path)
        x, bad_files = data.read_images(image_files)
        for file, reason in sorted(bad_files.items()):
            print(f'{file}: {reason}', file=sys.stderr)
            all_read = False
        readable = [i for i, file in enumerate(image_files) if file not in bad_files]
        read_files = [image_files[i] for i in readable]
        probabilities = predict_probabilities(model, x[readable], data.batch_size, device, autocast)
        if path.is_dir():
            write_predictions(run_folder / 'predict.csv', path, read_files, probabilities)
            print(f'{path}: {len(read_files)} of {len(image_files)} photographs predicted, '
                  f'in {run_folder / "predict.csv"}')
        elif read_files:
            print(f'{path}: {likeliest(probabilities[0])}')
    return all_read


def likeliest(probabilities):
    """The three likeliest classes of a photograph, in words, from its probabilities (11,)."""
    top = torch.from_numpy(probabilities).topk(min(3, len(data.CLASSES)))
    names = [f'{data.CLASSES[label]} {probability:.1%}'
             for probability, label in zip(top.values.tolist(), top.indices.tolist())]
    return ', '.join(names)


def write_predictions(path, folder, image_files, probabilities):
    """predict.csv, as the course's Kaggle page takes it: an Id and a label for each photograph."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator='\n')
    table.writerow(['Id', 'Category'])
    for id_, label in zip(ids_of(folder, image_files), probabilities.argmax(1)):
        table.writerow([id_, label])
    write_text(path, text.getvalue())


def ids_of(folder, image_files):
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
        # 1.jpg and 01.jpg, say: their names tell them apart.
        return names
    return ids


# ---- Dreams (section 1.2) --------------------------------------------------------------------

def draw_dreams(model, device):
    """dreams.png: for each class the image that dream finds, and how sure the network is of it."""
    images, probabilities = dream(model, device)
    titles = [f'{name}\n{y:.1%}' for name, y in zip(data.CLASSES, probabilities)]
    return draw_images(images, titles, 6, 'what the classes look like to the network')


def dream(model, device, steps=100):
    """Gradient ascent on the input (section 1.2): for each class i, an image x with a large
    y_i - c * sum |x| (formula 1.2.2; with c = 0 it is 1.2.1).

    Returns the images, float (11, 128, 128, 3), BGR in 0..1, and their probabilities y_i (11,).
    The images are what the network takes as input: after test_transform. Should that end in
    Normalize, they are normalized images, and their colours are not those of photographs.
    """
    model.eval().requires_grad_(False)
    torch.manual_seed(0)
    size = data.image_size
    classes = torch.arange(len(data.CLASSES), device=device)
    # Grey, with some noise.
    x = 0.4 + 0.1 * torch.rand(len(classes), 3, size, size)
    x = x.to(device).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for step in tqdm(range(steps), 'dreaming', leave=False, disable=None):
        optimizer.zero_grad()
        # Shifted a little, differently in each step: what is good for the class at many places is
        # a shape, and not speckle.
        shift = torch.randint(-8, 9, (2,)).tolist()
        shifted = x.roll(shift, dims=(2, 3))
        # The logarithm of y_i is largest where y_i is, and has a gradient where y_i is near 0.
        log_y = model(shifted).log_softmax(1)[classes, classes]
        (1e-4 * x.abs().sum() - log_y.sum()).backward()
        optimizer.step()
        with torch.no_grad():
            if step % 4 == 0 and step < steps - 10:
                # Smooths out the speckle that is left.
                x.copy_(nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
            # It must stay a picture.
            x.clamp_(0, 1)
    with torch.no_grad():
        y = model(x).softmax(1)[classes, classes]
    return x.detach().permute(0, 2, 3, 1).cpu().numpy(), y.cpu().numpy()


if __name__ == '__main__':
    data.run_script(main)
