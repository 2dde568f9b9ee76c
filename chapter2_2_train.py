"""Sections 2.3 and 2.4 of the book: the network, and its training on food-11.

    python chapter2_2_train.py                       the book's run: 100 epochs on ./food-11
    python chapter2_2_train.py --data-dir my-photos  your own, in a folder for each class
    python chapter2_2_train.py --demo                needs no photographs: learns drawn dishes
    python chapter2_2_train.py --recipe better       trains the network better than the book
    torchrun --nproc-per-node 2 chapter2_2_train.py  two GPUs train together

Each run has a folder for its checkpoints, history and pictures: runs/001, runs/002, ... or --out.

    python chapter2_2_train.py --out runs/001 --resume              continues a run, or starts it
    python chapter2_2_train.py --out runs/001 --predict dinner.jpg  names the class of a photograph
    python chapter2_2_train.py --out runs/001 --dreams              what the classes look like to it
                                                                    (section 1.2)
    python chapter2_2_train.py --out runs/001 --features dinner.jpg what its blocks see in it
"""
import argparse
import contextlib
import copy
import csv
import glob
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import struct
import sys
import tempfile
import textwrap
import time
import zipfile
import zlib
from collections import ChainMap
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.functional import convert_image_dtype

from chapter2_1_data import (NO_IMAGE, ImgDataset, UserError, add_data_arguments, batch_size,
                             better_transform, core_count, data_dir, demo_dir, find_photographs,
                             ignore_interruptions, image_size, in_threads, is_hidden,
                             labelled_files, make_demo, picture_settings, progress_bar, read_image,
                             readable, readfile, refuse_files, run_script, test_transform,
                             train_transform)

num_epoch = 100
learning_rate = 0.001

# The options that are saved with a run, with their defaults: the book's, where it says something.
book_options = {'data_dir': data_dir, 'recipe': 'book', 'epochs': num_epoch,
                'batch_size': batch_size, 'lr': learning_rate, 'seed': 0, 'no_amp': False}

# The demo has few images. With the book's options its accuracy jumps up and down.
demo_options = {'epochs': 5, 'batch_size': 16, 'lr': 0.0001}

# Seeds go from 0 to this. The loop in train_run makes a different number of each seed and epoch.
max_seed = 999_999

# How often a run is saved, in seconds, if an epoch does not take longer.
save_seconds = 60


# ---- The network (section 2.3) ---------------------------------------------------------------

class Classifier(nn.Module):
    """The book's network. Input: images, float (N, 3, 128, 128), BGR. Output: scores (N, 11)."""

    def __init__(self, class_count=11):
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
            nn.Linear(512, class_count),   # [11]
        )

    def forward(self, x):
        out = self.convolution(x)          # [N, 512, 4, 4]
        out = out.flatten(1)               # [N, 8192]
        return self.fc(out)                # [N, 11]


def make_model(class_count, device):
    """The network, on the device. To train another network, change this function."""
    model = Classifier(class_count)
    if device.type == 'mps':
        # On Apple's GPUs, channels_last gives wrong results in some versions of PyTorch.
        return model.to(device)
    # channels_last: an order of the numbers in memory with which convolutions are faster.
    return model.to(device, memory_format=torch.channels_last)


# ---- Training (section 2.4) ------------------------------------------------------------------

def train_epoch(model, train_loader, loss, optimizer, autocast, scaler):
    """Trains the network for one epoch (section 2.4).

    autocast and scaler are for computing with 16 bits (see mixed_precision).
    Returns the accuracy and the mean loss per image. (The book adds up the mean losses of the
    batches, and divides by the number of images: its losses are about 1/126 of these, as food-11
    has 78 batches for 9,866 images.)
    """
    device = next(model.parameters()).device
    model.train()
    # These sums stay on the GPU. Reading a number from there makes Python wait until the GPU has
    # computed it, so that is done once an epoch only.
    correct = torch.zeros((), device=device)
    loss_sum = torch.zeros((), device=device)
    image_count = 0
    for x, y in train_loader:
        x, y = to_device(x, y, device)
        optimizer.zero_grad()
        # Within autocast, PyTorch computes convolutions and matrix products with 16 bits.
        with autocast:
            train_pred = model(x)
            batch_loss = loss(train_pred, y)
        if scaler.is_enabled():
            # In float16, small gradients become 0. So the scaler multiplies the loss, and divides
            # the gradients afterwards.
            scaler.scale(batch_loss).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            batch_loss.backward()
            optimizer.step()
        correct += (train_pred.argmax(1) == y).sum()
        # batch_loss is the mean of the batch, and the last batch may be smaller.
        loss_sum += batch_loss.detach() * len(y)
        image_count += len(y)
    return accuracy_and_loss(correct, loss_sum, image_count)


@torch.no_grad()
def evaluate(model, val_loader, loss, autocast):
    """Returns the accuracy and the mean loss per image on the validation images (section 2.4)."""
    device = next(model.parameters()).device
    model.eval()
    correct = torch.zeros((), device=device)
    loss_sum = torch.zeros((), device=device)
    image_count = 0
    for x, y in val_loader:
        x, y = to_device(x, y, device)
        with autocast:
            val_pred = model(x)
            batch_loss = loss(val_pred, y)
        correct += (val_pred.argmax(1) == y).sum()
        loss_sum += batch_loss * len(y)
        image_count += len(y)
    return accuracy_and_loss(correct, loss_sum, image_count)


def to_device(x, y, device):
    """Copies a batch to the device: x as float32 (N, 3, 128, 128) in 0..1, y as int64 (N,)."""
    # non_blocking: while a CUDA GPU copies, Python goes on.
    x = x.to(device, non_blocking=device.type == 'cuda')
    y = y.to(device, non_blocking=device.type == 'cuda')
    # Of uint8 in 0..255 this makes float32 in 0..1, as the book's ToTensor does.
    return convert_image_dtype(x), y


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


# ---- A better recipe (not in the book) -------------------------------------------------------
#
# With the book's recipe, the network learns the training photographs by heart: after 100 epochs on
# photographs of ten dishes, it was right for 99% of those for training, and for 59% of those for
# validation. With --recipe better, train_run trains this network on the images of better_transform
# (chapter2_1_data.py), with what is in this section. Then it was right for 84% of these images, and
# for 72% of the photographs for validation. See .github/results.md.

# Used by choose_options, like demo_options.
better_options = {'batch_size': 64}


def better_loss_and_optimizer(model, lr, device):
    """Returns the loss for training, and the optimizer."""
    # Label smoothing: with 11 classes, the right one is to get a probability of 0.91, not of 1. So
    # a network that is already right does not go on making its scores larger.
    loss = nn.CrossEntropyLoss(label_smoothing=0.1).to(device)
    # AdamW is Adam that also makes all weights a little smaller in each step. Small weights make a
    # smoother function, which fits fewer accidents of the training images.
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05, fused=True)
    return loss, optimizer


def better_learning_rate(highest, epoch, epochs):
    """The learning rate of an epoch, counted from 1: it rises for a fifth of the epochs, as the
    first steps of a new network are wild, and then falls towards zero along a cosine, so that the
    last steps only refine."""
    # How much of the training is done in the middle of this epoch: 0 is nothing, 1 is all.
    done = (epoch - 0.5) / epochs
    if done < 0.2:
        return highest * done / 0.2
    return highest * (1 + math.cos(math.pi * (done - 0.2) / 0.8)) / 2


# ---- The script ------------------------------------------------------------------------------

def main(arguments=None):
    """arguments: those of the command line, which a notebook may give: main(['--epochs', '5'])."""
    # On Linux, a CPU is faster with large pages of memory. To be set before the first tensor.
    os.environ['THP_MEM_ALLOC_ENABLE'] = '1'
    # cuDNN tries several algorithms for each convolution, and then uses the fastest.
    torch.backends.cudnn.benchmark = True
    args = parse_arguments(arguments)
    device = pick_device(args.device)
    if args.predict or args.dreams or args.features:
        use_run(args, device)
        return

    # torchrun starts several processes, which train together.
    join_processes(device)
    if args.demo and rank() == 0:
        make_demo()
    # checkpoint: the state of a run that is continued, or None.
    with open_run(args.out, args.resume) as (folder, checkpoint):
        options = choose_options(args, checkpoint)
        dtype = pick_precision(device, options.no_amp)
        workers = pick_workers(options.workers, device)
        say(f'device {device_name(device)}, precision {str(dtype).removeprefix("torch.")}, '
            f'loader workers {workers}, processes {world_size()}')
        say(f'the folder of the run is {folder}')
        if options.recipe == 'better':
            say('recipe better: its training accuracy and loss are those of strongly augmented '
                'images, and label smoothing makes this loss larger still')
        train_run(options, device, dtype, workers, folder, checkpoint)
    leave_processes()


def train_run(options, device, dtype, workers, folder, checkpoint):
    """The book's script: its data, its network and its training (sections 2.2 to 2.4). Around it,
    under comments that say so, is what lets a run be continued and its best epoch be used.

    options: what choose_options returns. dtype: the precision. workers: loader workers.
    folder: where the run is saved. checkpoint: the state of a run that is continued, or None.
    """
    # With several processes, each has a share of a batch, and a part of the images.
    own_batch_size = share_of_batch(options.batch_size)

    # The data (section 2.2)
    classes, train_files, val_files = find_photographs(options.data_dir)
    say(f'{len(classes)} classes, {len(train_files)} photographs for training, '
        f'{len(val_files)} for validation')
    train_x, train_y = readfile(train_files)
    val_x, val_y = readfile(val_files)
    train_set = ImgDataset(train_x, train_y, train_transform)
    val_set = ImgDataset(val_x, val_y, test_transform)
    if options.recipe == 'better':
        train_set.transform = better_transform
    # Pinned memory is memory from which a CUDA GPU can copy faster. Workers that are persistent
    # are started once, and not in every epoch.
    loader_options = {'num_workers': workers, 'persistent_workers': workers > 0,
                      'pin_memory': device.type == 'cuda'}
    # same_size: so that all processes take the same number of training steps.
    train_loader = DataLoader(own_part(train_set, same_size=True), batch_size=own_batch_size,
                              shuffle=True, **loader_options)
    val_loader = DataLoader(own_part(val_set), batch_size=own_batch_size, shuffle=False,
                            **loader_options)

    # The network (section 2.3)
    torch.manual_seed(options.seed)
    model = make_model(len(classes), device)
    loss = nn.CrossEntropyLoss().to(device)
    # The better recipe has another loss, but only for training: so validation can be compared.
    if options.recipe == 'book':
        training_loss = loss
        # fused: updates all weights at once, which is faster.
        optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, fused=True)
    else:
        training_loss, optimizer = better_loss_and_optimizer(model, options.lr, device)

    # Not in the book: computing with 16 bits, and the state of a run that is continued.
    autocast, scaler = mixed_precision(device, dtype)
    checksums = {'training': checksum(train_files, options.data_dir),
                 'validation': checksum(val_files, options.data_dir)}
    history, best_acc, best_epoch, best_model = [], -1, None, None
    if checkpoint is not None:
        # The path is for error messages only.
        restore(model, optimizer, scaler, checkpoint, folder / 'last.pt', classes)
        say(f'resumed from epoch {len(checkpoint["history"])} in {folder}')
        # If other photographs are for validation now, this changes what the best epoch is.
        adapt_to_photographs(checkpoint, checksums)
        history, best_acc = checkpoint['history'], checkpoint['best_acc']
        best_epoch, best_model = checkpoint['best_epoch'], checkpoint['best_model']

    # The training (section 2.4). With several processes, the network is wrapped.
    parallel_model = parallel(model)
    saved_time = time.monotonic()
    for epoch in range(len(history) + 1, options.epochs + 1):
        start_time = time.perf_counter()
        title = f'[{epoch:03d}/{options.epochs:03d}]'
        # An epoch's random numbers depend on its number: so a resumed run gets the same ones as a
        # run without interruption. (Not with loader workers, which have their own.)
        torch.manual_seed(options.seed + (max_seed + 1) * (epoch * world_size() + rank()))
        # A learning-rate schedule. As it is computed from `epoch`, it needs nothing from a
        # checkpoint.
        if options.recipe == 'better':
            rate = better_learning_rate(options.lr, epoch, options.epochs)
            optimizer.param_groups[0]['lr'] = rate

        train_acc, train_loss = train_epoch(parallel_model, progress(train_loader, title),
                                            training_loss, optimizer, autocast, scaler)
        # With several processes, their batch norm may differ. (With one, this does nothing.)
        share_batch_norm(model)
        val_acc, val_loss = evaluate(model, progress(val_loader, f'{title} validation'),
                                     loss, autocast)

        seconds = time.perf_counter() - start_time
        if rank() == 0:
            print(f'{title} {seconds:.2f} sec(s) Train Acc: {train_acc:.6f} '
                  f'Loss: {train_loss:.6f} | Val Acc: {val_acc:.6f} loss: {val_loss:.6f}',
                  flush=True)
        # Not in the book: the history, the best epoch, and all that is saved.
        if not math.isfinite(train_loss + val_loss):
            raise UserError('the loss is not a finite number: give a lower --lr, or --no-amp if '
                            'the precision was not float32, to a new run or to this one: '
                            f'--out "{folder}" --resume')
        # A row of history.csv; more columns can be added.
        history.append({'epoch': epoch, 'seconds': seconds, 'train_acc': train_acc,
                        'train_loss': train_loss, 'val_acc': val_acc, 'val_loss': val_loss})
        if val_acc > best_acc:
            best_acc, best_epoch = val_acc, epoch
            best_model = copy.deepcopy(model.state_dict())
        checkpoint = {'model': model.state_dict(), 'best_model': best_model,
                      'optimizer': optimizer.state_dict(),
                      'optimizer_kind': type(optimizer).__name__, 'scaler': scaler.state_dict(),
                      'history': history, 'best_acc': best_acc, 'best_epoch': best_epoch,
                      'checksums': checksums,
                      'options': {name: getattr(options, name) for name in book_options},
                      # What must be the same when the weights are used again:
                      'required': requirements(model, classes)}
        if time.monotonic() - saved_time >= save_seconds:
            save_run(folder, checkpoint)
            saved_time = time.monotonic()

    # Not in the book: what the best epoch's weights have learned. If there was nothing to train,
    # checkpoint is still the one that the run was continued from.
    if rank() == 0:
        is_saved = save_run(folder, checkpoint)
        model.load_state_dict(best_model)
        probabilities = predict_probabilities(model, val_x, options.batch_size, autocast)
        counts = count_predictions(val_y, probabilities)
        print_accuracies(counts, classes, 'with the best weights')
        write_figure(folder / 'confusion.png', draw_confusion, counts, classes)
        write_figure(folder / 'mistakes.png', draw_mistakes, val_x, val_files, probabilities,
                     classes)
        # Now that there is nothing else to do:
        if not is_saved:
            raise UserError('the end of the run is not saved completely: close the program that '
                            f'uses its files, and give --out "{folder}" --resume')


# ----------------------------------------------------------------------------------------------
# The book's chapter ends here. The rest makes the script fast, safe to run unattended, and useful
# after the training: command line, hardware, several processes, the run's folder, pictures,
# prediction, dreams.
# ----------------------------------------------------------------------------------------------


# ---- Command line ----------------------------------------------------------------------------

def parse_arguments(arguments):
    """Returns what is on the command line. Options that are saved with a run are only there if they
    are typed: choose_options knows the others. --demo sets data_dir, as if it had been typed."""
    # --help begins with the text at the top of this file.
    parser = argparse.ArgumentParser(usage='%(prog)s [options]', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    absent, demo, better = argparse.SUPPRESS, demo_options, better_options
    add_data_arguments(parser, absent)
    parser.add_argument('--recipe', choices=['book', 'better'], default=absent,
                        help="how to train: as the book does, or with better's augmentation, batch "
                        'size, loss, optimizer and learning rates (default: book)')
    parser.add_argument('--epochs', type=int, metavar='N', default=absent,
                        help='how many times to train on all training images '
                        f'(default: {num_epoch}; with --demo {demo["epochs"]})')
    parser.add_argument('--batch-size', type=int, metavar='N', default=absent,
                        help='images in a training step, of all processes together '
                        f'(default: {batch_size}; with --recipe better {better["batch_size"]}; '
                        f'with --demo {demo["batch_size"]})')
    parser.add_argument('--lr', type=float, metavar='X', default=absent,
                        help='learning rate; with --recipe better, the highest one '
                        f'(default: {learning_rate}; with --demo {demo["lr"]})')
    parser.add_argument('--seed', type=int, metavar='N', default=absent,
                        help='on the CPU, a run with the same seed gives the same results '
                        f'(default: {book_options["seed"]})')
    parser.add_argument('--no-amp', action='store_true', default=absent,
                        help='no automatic mixed precision: compute with 32 bits (default: with '
                        '16 bits where that is faster)')
    parser.add_argument('--workers', type=int, metavar='N',
                        help='processes that prepare training batches, and as many for validation; '
                        '0: the training process does it (default: for a GPU the number of CPU '
                        'cores, at most 8, on Windows 2; on the CPU 0)')
    parser.add_argument('--device', metavar='NAME',
                        help='cuda, cuda:1, mps, xpu or cpu (default: a GPU if PyTorch finds one)')
    parser.add_argument('--out', type=os.path.expanduser, metavar='DIR',
                        help="the run's folder (default: the next of runs/001, runs/002, ...)")
    parser.add_argument('--resume', action='store_true',
                        help='continue the run in --out, or start it if there is none yet')
    parser.add_argument('--predict', nargs='+', type=os.path.expanduser, metavar='PATH',
                        help='predict the classes of photographs with the run in --out; for a '
                        'folder, write them into predict.csv, and print the accuracy if the '
                        'photographs are named or arranged like those for training')
    parser.add_argument('--dreams', action='store_true',
                        help='write dreams.png: what the classes look like to the network of the '
                        'run in --out')
    parser.add_argument('--features', type=os.path.expanduser, metavar='PHOTO',
                        help='write features.png: the strongest feature maps of each block of the '
                        'network of the run in --out, for a photograph')
    parser.add_argument('--checkpoint', default='best.pt', metavar='NAME',
                        help='the file in --out that --predict, --dreams and --features use '
                        '(default: %(default)s)')
    args = parser.parse_args(arguments)
    if args.out is None and (args.resume or args.predict or args.dreams or args.features):
        parser.error('--resume, --predict, --dreams and --features need the folder of a run: '
                     '--out DIR')
    if args.out == '':
        parser.error('--out has no name of a folder after it')
    limits = {'epochs': (1, 10**9), 'batch_size': (1, 10**9), 'lr': (0, 1), 'seed': (0, max_seed),
              'workers': (0, 1000)}
    for name, (low, high) in limits.items():
        value = getattr(args, name, None)
        # Written with "not", so that nan is refused as well.
        if value is not None and not low <= value <= high:
            parser.error(f'--{name.replace("_", "-")} {value}: must be in {low}..{high}')
    if args.demo:
        args.data_dir = demo_dir
    return args


def choose_options(args, checkpoint=None):
    """The options of a run: those that are typed, or else those that the run has saved, or else
    those of the demo, of the better recipe, or of the book. (No option switches a saved --no-amp
    off.)"""
    # Each map is asked only if those before it do not have an option.
    options = ChainMap(vars(args))
    if checkpoint is not None:
        options.maps.append(checkpoint['options'])
    if args.demo:
        options.maps.append(demo_options)
    if options.get('recipe') == 'better':
        options.maps.append(better_options)
    options.maps.append(book_options)
    chosen = argparse.Namespace(**options)
    # The run may be continued from a different current folder.
    chosen.data_dir = os.path.abspath(chosen.data_dir)
    return chosen


# ---- Hardware --------------------------------------------------------------------------------

def pick_device(name):
    """The device called `name`. If name is None: CUDA, else another kind of GPU, else the CPU.

    Raises UserError if PyTorch cannot use the device here.
    """
    found = 'cpu'
    if torch.accelerator.is_available():
        found = torch.accelerator.current_accelerator().type
    name = name or found
    if name == 'cuda':
        # Each of the processes that torchrun starts on a machine gets a GPU of its own.
        name = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    problem = f'PyTorch {torch.__version__} cannot use the device {name} here'
    cure = 'see .github/install.md. --device cpu always works'
    try:
        device = torch.device(name)
        if device.type not in ('cpu', found):
            # Asked all the same, PyTorch would answer with anything, even an AttributeError.
            raise UserError(f'{problem}: it finds no such device; {cure}')
        if device.type == 'cuda':
            # Otherwise PyTorch would take some memory on GPU 0 as well.
            torch.cuda.set_device(device)
        # Some devices fail only when they have to compute something.
        torch.ones(1, device=device).item()
    except RuntimeError as error:
        raise UserError(f'{problem}: {str(error).splitlines()[0]}; {cure}') from None
    return device


def device_name(device):
    """What to call the device in a message."""
    if device.type == 'cuda':
        return f'{device} ({torch.cuda.get_device_name(device)})'
    if not torch.accelerator.is_available():
        return f'{device} (PyTorch finds no GPU: see .github/install.md)'
    return str(device)


def pick_precision(device, no_amp):
    """The type of numbers to compute with: float32, or a 16-bit type if that is faster."""
    if no_amp:
        return torch.float32
    if device.type == 'cuda':
        generation, _ = torch.cuda.get_device_capability(device)
        # 8: Ampere (A100, RTX 30) and newer; 7: Volta and Turing (V100, T4, RTX 20).
        if generation >= 8:
            return torch.bfloat16
        # The GTX 16 is a Turing that sometimes computes wrong numbers with 16 bits.
        if generation == 7 and 'GTX 16' not in torch.cuda.get_device_name(device):
            return torch.float16
    if device.type == 'cpu':
        # Only CPUs with these instructions are fast with bfloat16. PyTorch has no public functions
        # for this, and these may go.
        for name in ('_is_avx512_bf16_supported', '_is_amx_tile_supported'):
            if hasattr(torch.cpu, name) and getattr(torch.cpu, name)():
                return torch.bfloat16
    return torch.float32


def mixed_precision(device, dtype):
    """Automatic mixed precision (amp): the autocast and the scaler that train_epoch takes.

    With float32 they do nothing; the scaler is for float16 only, which cannot hold small numbers.
    """
    autocast = contextlib.nullcontext()
    if dtype != torch.float32:
        autocast = torch.autocast(device.type, dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return autocast, scaler


def pick_workers(wanted, device):
    """How many worker processes each loader has. wanted: what --workers says, or None."""
    if wanted is not None:
        return wanted
    if device.type == 'cpu':
        # The cores are needed for the network.
        return 0
    if sys.platform == 'win32':
        # On Windows each worker reserves gigabytes of the page file.
        return 2
    processes_here = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    return min(core_count() // processes_here, 8)


# ---- Several processes, started by torchrun --------------------------------------------------

def join_processes(device):
    """Connects the processes that torchrun has started. Without torchrun, does nothing."""
    if distributed.is_torchelastic_launched():
        backend = 'gloo'
        if device.type == 'cuda':
            backend = 'nccl'
        distributed.init_process_group(backend)


def leave_processes():
    """Ends what join_processes has begun."""
    if distributed.is_initialized():
        if distributed.get_backend() == 'gloo':
            # Without this pause, PyTorch 2.6 sometimes waits for itself forever.
            time.sleep(1)
        distributed.destroy_process_group()


def rank():
    """The number of this process, counted from 0."""
    if distributed.is_initialized():
        return distributed.get_rank()
    return 0


def world_size():
    """How many processes train together."""
    if distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def as_process_0_has(value):
    """Returns in every process the value that process 0 has, for which the others wait."""
    values = [value]
    if distributed.is_initialized():
        distributed.broadcast_object_list(values)
    return values[0]


def say(message):
    """Prints a message on stderr. If there are several processes, process 0 does."""
    if rank() == 0:
        print(readable(message), file=sys.stderr)


def share_of_batch(batch_size):
    """How many images of a batch each process has. Raises UserError if the shares are unequal."""
    if batch_size % world_size() != 0:
        raise UserError(f'{world_size()} processes cannot share batches of {batch_size} images '
                        'equally: choose a different --batch-size or --nproc-per-node')
    return batch_size // world_size()


def own_part(dataset, same_size=False):
    """The part of a dataset that this process trains or evaluates on; with one process, all of it.

    same_size: whether all parts must have the same size, so that all processes take the same
    number of training steps. Then some images at the end are left out, fewer than processes.
    """
    if world_size() == 1:
        return dataset
    end = len(dataset)
    if same_size:
        end -= end % world_size()
    return Subset(dataset, range(rank(), end, world_size()))


def parallel(model):
    """The network for training. With several processes, backward() averages their gradients."""
    if world_size() == 1:
        return model
    if distributed.get_backend() == 'nccl':
        # Changes the batch norm layers inside `model`: they use the images of all processes.
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return DistributedDataParallel(model)


def share_batch_norm(model):
    """Gives all processes the batch norm statistics of process 0: on CPUs they differ. With one
    process, does nothing."""
    if world_size() > 1:
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)


def progress(batches, title):
    """The batches, with a progress bar that only process 0 shows."""
    if rank() > 0:
        return batches
    return progress_bar(batches, title)


# ---- The run's folder ------------------------------------------------------------------------

@contextlib.contextmanager
def open_run(out, resume):
    """Opens the folder of a run for a with-block. out, resume: what --out and --resume say.

    Yields the folder, and the checkpoint to continue from, or None; process 0 tells the others.
    If the block is interrupted, says how to continue. Raises UserError if the folder cannot be
    used.
    """
    if rank() > 0:
        # Waits for process 0. If that fails before, torchrun ends this process.
        yield as_process_0_has(None)
        return
    folder, is_new = make_folder(out)
    try:
        with locked(folder):
            yield as_process_0_has((folder, find_checkpoint(folder, resume)))
    except BaseException as error:
        # Ctrl-C, full memory, or an error in the script. A UserError says itself what to do.
        if not isinstance(error, UserError):
            ignore_interruptions()
            say(how_to_continue(folder))
        raise
    finally:
        if is_new:
            # Only an empty folder can be removed: it is not left behind.
            with contextlib.suppress(OSError):
                folder.rmdir()


def make_folder(out):
    """Makes the folder `out`, or, if that is None, the next of runs/001, runs/002, ...

    Returns it, and whether it is new.
    """
    try:
        if out is not None:
            folder = Path(out)
            is_new = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            return folder, is_new
        Path('runs').mkdir(exist_ok=True)
        for number in itertools.count(1):
            folder = Path('runs', f'{number:03d}')
            # If it exists, it belongs to another run, perhaps to one that has just begun.
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder, True
    except OSError as error:
        raise UserError(f'cannot make the folder {error.filename}: {error.strerror}; --out names '
                        'another place') from None


def find_checkpoint(folder, resume):
    """Returns the checkpoint in the folder of a run; None if it is a new run.

    Raises UserError if the run would replace files, of another run or of anybody.
    """
    try:
        # last.pt.tmp: a run was killed while it saved for the first time.
        files = [name for name in os.listdir(folder)
                 if name != 'last.pt.tmp' and not is_hidden(name)]
    except OSError as error:
        raise UserError(f'cannot read the folder {folder}: {error.strerror}') from None
    if not os.access(folder, os.W_OK):
        raise UserError(f'cannot write into the folder {folder}: --out names another place')
    if not files:
        return None
    if not resume:
        raise UserError(f'{folder} already holds files: continue the run in it with --resume, or '
                        'choose a different --out')
    if 'last.pt' not in files:
        raise UserError(f'{folder} holds files, such as {files[0]}, but last.pt is missing: no run '
                        'can be continued there; choose a different --out')
    checkpoint = load_checkpoint(folder / 'last.pt')
    if 'optimizer_kind' not in checkpoint:
        raise UserError(f'{folder / "last.pt"} is incompatible: it is of an older version of the '
                        'script, or holds only weights, as best.pt does; start a new run in a '
                        'different folder')
    return checkpoint


@contextlib.contextmanager
def locked(folder):
    """Keeps other runs on this computer out of the folder as long as the with-block runs."""
    # The lock is a file in the system's folder for temporary files, because network drives such as
    # Google Drive have no reliable locks.
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    try:
        file = os.path.join(tempfile.gettempdir(), f'food-11-{name}.lock')
        lock = FileLock(file).acquire(timeout=0)
    # Before OSError, because it is one too.
    except Timeout:
        raise UserError(f'{folder} is in use by another run: wait until that has ended, or choose '
                        'a different --out') from None
    except (OSError, NotImplementedError):
        # No lock is possible here either. It is not worth giving up a night's training.
        lock = contextlib.nullcontext()
    with lock:
        yield


def save_run(folder, checkpoint):
    """Writes last.pt, which holds all that is needed to continue, and what people want to have of
    it: best.pt, history.csv, curves.png and settings.json. Only process 0 does.

    Returns whether all are written. If another program holds one of them open, says so, and writes
    the others: the next saving makes up for it.
    """
    if rank() > 0:
        return False
    # If somebody adds a column of NumPy's numbers, these become Python's, as load_checkpoint would
    # refuse NumPy's.
    history = json.loads(json.dumps(checkpoint['history'], default=float))
    checkpoint = {**checkpoint, 'history': history}
    text = io.StringIO()
    # Columns may have been added to or removed from the script since the first epochs:
    # restval='' leaves a gap, extrasaction='ignore' leaves the rest out.
    table = csv.DictWriter(text, fieldnames=list(history[-1]), restval='', extrasaction='ignore',
                           lineterminator='\n')
    table.writeheader()
    table.writerows(history)
    settings = json.dumps({**checkpoint['options'], 'classes': checkpoint['required']['classes']},
                          indent=1, ensure_ascii=False)
    best = {'model': checkpoint['best_model'], 'required': checkpoint['required']}
    all_are_written = True
    # Each is called as write_file(folder / name, *content). write_figure gets a function that
    # draws, and its arguments.
    for write_file, name, *content in (
            (write_checkpoint, 'last.pt', checkpoint),
            (write_checkpoint, 'best.pt', best),
            (write_text, 'history.csv', text.getvalue()),
            (write_figure, 'curves.png', draw_curves, history, checkpoint['best_epoch']),
            (write_text, 'settings.json', f'{settings}\n')):
        try:
            write_file(folder / name, *content)
        except FileInUse as error:
            say(str(error))
            all_are_written = False
    return all_are_written


def how_to_continue(folder):
    """What is saved in the folder of a run, and which command continues the run."""
    if not os.path.exists(folder / 'last.pt'):
        return 'nothing is saved yet'
    try:
        checkpoint = load_checkpoint(folder / 'last.pt')
    except UserError as error:
        return str(error)
    return (f'{folder} holds the state after epoch {len(checkpoint["history"])}; continue with '
            f'python chapter2_2_train.py --out "{folder}" --resume')


def checksum(files, data_dir):
    """A text that is different if the names or the labels of photographs are different."""
    names = sorted((readable(file.relative_to(data_dir).as_posix()), label)
                   for file, label in files)
    return hashlib.sha256(repr(names).encode()).hexdigest()


def adapt_to_photographs(checkpoint, checksums):
    """Says if the photographs have changed since the checkpoint was saved. checksums: those of the
    photographs for training and for validation.

    If those for validation have changed, the old best accuracy cannot be compared any more. So the
    checkpoint's best_acc becomes -1, which makes the next epoch the best one; until then, the last
    one is.
    """
    for part in ('training', 'validation'):
        if checksums[part] != checkpoint['checksums'][part]:
            say(f'the photographs for {part} have changed since then')
    if checksums['validation'] != checkpoint['checksums']['validation']:
        say('the best epoch is chosen anew: until the next epoch, it is the last one')
        checkpoint.update(best_acc=-1, best_epoch=len(checkpoint['history']),
                          best_model=checkpoint['model'])
    checkpoint['checksums'] = checksums


# ---- Files -----------------------------------------------------------------------------------

class FileInUse(UserError):
    """Another program holds a file open, so that Windows does not allow replacing it."""


def write(path, content):
    """Writes a file of these bytes in such a way that it is complete, or else as it was before.

    Raises FileInUse if another program holds the file open, and UserError if it cannot be written
    for another reason, for example because the disk is full.
    """
    temporary = path.with_name(path.name + '.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(content)
            # The content must be on the disk before the old file goes: the power may fail.
            file.flush()
            os.fsync(file.fileno())
        replace_patiently(temporary, path)
    except OSError as error:
        raise UserError(f'cannot write {path}: {error.strerror}; what was saved before is intact'
                        ) from None
    finally:
        # If all went well, it is not there any more.
        with contextlib.suppress(OSError):
            temporary.unlink()


def replace_patiently(temporary, path):
    """Puts the temporary file in the place of `path`. If that is in use, tries for two seconds."""
    for _ in range(20):
        try:
            os.replace(temporary, path)
            return
        except PermissionError:
            time.sleep(0.1)
    raise FileInUse(f'{path} is in use by another program, and was left as it was')


def write_text(path, text):
    """Writes a text file, as `write` does."""
    # surrogateescape: Linux allows file names that are not Unicode. They are written as they are.
    write(path, text.encode(errors='surrogateescape'))


def write_figure(path, draw, *arguments):
    """Writes the matplotlib figure draw(*arguments) as a PNG file, as `write` does."""
    content = io.BytesIO()
    with picture_settings():
        draw(*arguments).savefig(content, format='png')
    write(path, content.getvalue())


def write_checkpoint(path, checkpoint):
    """Writes a checkpoint, as `write` does."""
    # Into memory first: torch.save has no clear error for a full disk.
    content = io.BytesIO()
    torch.save(checkpoint, content)
    write(path, content.getbuffer())


def load_checkpoint(path):
    """Reads a checkpoint into the CPU's memory. Program code in it is not executed.

    Raises UserError if it is missing, corrupt, or not a checkpoint of this script, or with the
    system's reason if the system does not let it be read.
    """
    try:
        content = io.BytesIO(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f'there is no {path}: is {os.path.dirname(path)} the folder of a run that '
                        'has saved a checkpoint?') from None
    except OSError as error:
        raise UserError(f'cannot read {path}: {error.strerror}') from None
    try:
        # A checkpoint is a zip file, but PyTorch does not check the checksums in it.
        if zipfile.ZipFile(content).testzip() is not None:
            raise zipfile.BadZipFile
        content.seek(0)
        checkpoint = torch.load(content, weights_only=True, map_location='cpu')
    except (zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError, RuntimeError,
            ValueError, LookupError, EOFError, OSError) as error:
        # zipfile and torch.load raise any of these if a bit of the file is wrong.
        raise UserError(f'{path} is corrupt, or not a checkpoint ({type(error).__name__}): replace '
                        'it by a copy, or start a new run in a different folder') from None
    if not isinstance(checkpoint, dict) or 'required' not in checkpoint:
        raise UserError(f'{path} is incompatible: not a checkpoint of this version of the script; '
                        'start a new run in a different folder')
    return checkpoint


def requirements(model, classes):
    """What must be the same when the weights of the network are used again."""
    # The text of a transform may contain the address of a function in memory, which is different
    # each time the script runs.
    transform = re.sub(' at 0x[0-9a-fA-F]+', '', ' '.join(str(test_transform).split()))
    return {'network': type(model).__name__, 'classes': list(classes), 'image_size': image_size,
            'test_transform': transform}


def load_weights(model, checkpoint, path, classes):
    """Puts the weights of a checkpoint into the network.

    path: where the checkpoint comes from, for error messages.
    Raises UserError if they require a different network, different classes or different images.
    """
    cure = 'undo this change, or start a new run in a different folder'
    for name, now in requirements(model, classes).items():
        then = checkpoint['required'].get(name)
        if then != now:
            raise UserError(f'{path} is incompatible: its {name} was {then}, now it is {now}; '
                            f'{cure}')
    try:
        model.load_state_dict(checkpoint['model'])
    except RuntimeError:
        raise UserError(f'{path} is incompatible: its weights have other names or shapes than '
                        f'those of the network {type(model).__name__} now; {cure}') from None


def restore(model, optimizer, scaler, checkpoint, path, classes):
    """Brings all that the training changes into the state that the checkpoint has.

    path: where the checkpoint comes from, for error messages.
    Raises UserError as load_weights does, and if the optimizer is of another kind.
    """
    load_weights(model, checkpoint, path, classes)
    then, now = checkpoint['optimizer_kind'], type(optimizer).__name__
    if then != now:
        raise UserError(f'{path} is incompatible: its optimizer was {then}, now it is {now}; give '
                        'the same --recipe, undo a change of the script, or start a new run in a '
                        'different folder')
    # Only Adam's averages come from the checkpoint; its options are those of the script and the
    # command line, so that a lower --lr or an edited weight decay takes effect.
    state_dict = optimizer.state_dict()
    state_dict['state'] = checkpoint['optimizer']['state']
    optimizer.load_state_dict(state_dict)
    # Empty if the run has not computed with float16.
    if checkpoint['scaler']:
        scaler.load_state_dict(checkpoint['scaler'])


def load_model(path, device):
    """Returns the network with the weights of a checkpoint, on the device, and the names of its
    classes. Raises UserError if the file is missing or corrupt, or does not fit the script.

    In a program of your own, beside the scripts:

        import contextlib, torch, chapter2_1_data as data, chapter2_2_train as train
        model, classes = train.load_model('runs/001/best.pt', torch.device('cpu'))
        x = data.read_image('dinner.jpg')[None]  # uint8 (1, 128, 128, 3), BGR
        y = train.predict_probabilities(model, x, 1, contextlib.nullcontext())  # (1, 11)
        print(classes[y[0].argmax()])
    """
    checkpoint = load_checkpoint(path)
    classes = checkpoint['required']['classes']
    model = make_model(len(classes), device)
    load_weights(model, checkpoint, path, classes)
    return model, classes


# ---- Pictures --------------------------------------------------------------------------------

def new_figure(width, height):
    """An empty matplotlib figure; width and height in inches."""
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout='constrained')


def draw_curves(history, best_epoch):
    """curves.png: accuracy and loss over the epochs, with the best epoch marked."""
    figure = new_figure(10, 4)
    left, right = figure.subplots(1, 2)
    epochs = [row['epoch'] for row in history]
    best = history[best_epoch - 1]
    for axes, name, title in ((left, 'acc', 'accuracy'), (right, 'loss', 'mean loss per image')):
        best_value = best[f'val_{name}']
        axes.plot(epochs, [row[f'train_{name}'] for row in history], marker='.',
                  label='training, augmented images')
        axes.plot(epochs, [row[f'val_{name}'] for row in history], marker='.', label='validation')
        axes.axvline(best_epoch, color='grey', linestyle=':',
                     label=f'best: epoch {best_epoch}, {best_value:.3f}')
        axes.plot(best_epoch, best_value, 'o', color='C1')
        axes.set_title(title)
        axes.set_xlabel('epoch')
        axes.set_xlim(0, epochs[-1] + 1)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    left.set_ylim(0, 1.02)
    right.set_ylim(bottom=0)
    return figure


def draw_confusion(counts, classes):
    """confusion.png from counts (11, 11): a row for each true class, a column for each predicted.

    Each cell shows a number of images, and its share of all images of the true class.
    """
    # Half an inch for each class, and what the longest name takes; but no picture that is too large
    # to open.
    side = min(3.5 + 0.5 * len(classes) + 0.08 * max(map(len, classes)), 40)
    figure = new_figure(side, side)
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
        axes.text(len(classes) / 2 - 0.5, true, 'no images of this class', color='grey', **centered)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha='right')
    axes.set_yticks(range(len(classes)), classes)
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


def draw_mistakes(val_x, val_files, probabilities, classes):
    """mistakes.png: the 24 wrong predictions with the highest probabilities.

    val_files: pairs (file, label).
    """
    val_y = np.array([label for _, label in val_files])
    predicted = probabilities.argmax(1)
    confidence = probabilities.max(1)
    wrong = np.flatnonzero(predicted != val_y)
    most_confident_first = np.argsort(-confidence[wrong], kind='stable')
    wrong = wrong[most_confident_first][:24]
    # Long names are written on several lines.
    names = [textwrap.fill(name, 20) for name in classes]
    titles = [f'{readable(val_files[i][0].name)}\n{names[val_y[i]]}\npredicted:\n'
              f'{names[predicted[i]]} {confidence[i]:.0%}' for i in wrong]
    heading = 'the most confident mistakes on the validation images'
    if len(wrong) == 0:
        heading = 'no mistakes on the validation images'
    return draw_images(val_x[wrong], titles, 8, heading)


# ---- Prediction ------------------------------------------------------------------------------

@torch.no_grad()
def predict_probabilities(model, x, batch_size, autocast):
    """Softmax probabilities, float32 (N, 11), of images x, uint8 (N, 128, 128, 3), BGR."""
    device = next(model.parameters()).device
    model.eval()
    probabilities = []
    for images in DataLoader(ImgDataset(x, transform=test_transform), batch_size=batch_size):
        with autocast:
            scores = model(convert_image_dtype(images.to(device)))
        probabilities.append(scores.float().softmax(1).cpu())
    return torch.cat(probabilities).numpy()


def count_predictions(labels, probabilities):
    """counts (11, 11): counts[i, j] is how many images of class i are predicted as class j."""
    class_count = probabilities.shape[1]
    counts = np.zeros((class_count, class_count), dtype=int)
    for label, predicted in zip(labels, probabilities.argmax(1)):
        counts[label, predicted] += 1
    return counts


def print_accuracies(counts, classes, heading):
    """Prints for each class how many of its images are right (accuracy), and how many of the
    images that are predicted as this class are right (precision)."""
    print(f'{heading:<24} images  right accuracy precision')
    for label, name in enumerate(classes):
        right, images, predicted = counts[label, label], counts[label].sum(), counts[:, label].sum()
        print(f'{label:>3} {name:<20} {images:>6} {right:>6} {percent(right, images):>8} '
              f'{percent(right, predicted):>9}')
    right, images = np.trace(counts), counts.sum()
    print(f'{"total":<24} {images:>6} {right:>6} {percent(right, images):>8}', flush=True)


def percent(part, whole):
    """part/whole as a text such as 12.5%; a dash if whole is 0."""
    if whole == 0:
        return '-'
    return f'{part / whole:.1%}'


def use_run(args, device):
    """Does what --predict, --dreams and --features ask for, with a checkpoint of the run in
    --out."""
    # --no-amp and --batch-size are those typed now, not those of the run.
    options = choose_options(args)
    folder = Path(args.out)
    model, classes = load_model(folder / args.checkpoint, device)
    if args.dreams:
        images, probabilities = dream(model, len(classes))
        titles = [f'{name}\n{y:.1%}' for name, y in zip(classes, probabilities)]
        write_figure(folder / 'dreams.png', draw_images, images, titles, 6,
                     'what the classes look like to the network')
        print(f'picture written to {folder / "dreams.png"}')
    if args.features:
        image = read_image(args.features)
        if image is None:
            refuse_files([args.features], NO_IMAGE)
        write_figure(folder / 'features.png', draw_features, model, image)
        print(f'picture written to {folder / "features.png"}')
    if args.predict:
        autocast, _ = mixed_precision(device, pick_precision(device, options.no_amp))
        predict(args.predict, model, classes, folder / 'predict.csv', options.batch_size, autocast)


def predict(paths, model, classes, csv_file, batch_size, autocast):
    """Predicts the classes of photographs, or of those in a folder. Those in a folder are written
    into csv_file; if they are named or arranged like those for training, also prints the accuracy.

    Raises UserError at the end if some files are no images; it says which. A file that the system
    does not let be read ends it at once.
    """
    paths = find_paths(paths)
    folders = [path for path in paths if os.path.isdir(path)]
    if folders and len(paths) > 1:
        raise UserError('--predict takes photographs, or one folder, as predict.csv is one table')
    if folders:
        files = labelled_files(folders[0], classes)
    else:
        files = [(path, None) for path in paths]
    # images[i] will be the photograph of good_files[i], a pair (file, label).
    images, good_files, bad_files = [], [], []
    image_files = [file for file, _ in files]
    for pair, img in zip(files, in_threads(read_image, image_files, 'reading')):
        if img is None:
            bad_files.append(pair[0])
        else:
            images.append(img)
            good_files.append(pair)
    if images:
        probabilities = predict_probabilities(model, np.stack(images), batch_size, autocast)
        if folders:
            print(f'{readable(folders[0])}: {len(images)} of {len(files)} photographs predicted, '
                  f'in {readable(csv_file)}')
            print_test_accuracies(good_files, probabilities, classes)
            write_predictions(csv_file, folders[0], good_files, probabilities)
        else:
            print_likeliest(good_files, probabilities, classes)
    refuse_files(bad_files, NO_IMAGE)


def find_paths(paths):
    """The files and folders that --predict names, as Paths."""
    found = []
    for path in paths:
        folder, name = os.path.split(path)
        # A name; else a pattern, which Windows does not replace by names, as Linux and macOS do;
        # else a pattern in a folder that has brackets in its name: "photos [2024]/*.jpg".
        matches = (glob.glob(glob.escape(path)) or glob.glob(path)
                   or glob.glob(os.path.join(glob.escape(folder), name)))
        found += map(Path, sorted(matches) or [path])
    return found


def print_likeliest(files, probabilities, classes):
    """Prints the three likeliest classes of each photograph."""
    for (file, _), row in zip(files, probabilities):
        names = [f'{classes[label]} {row[label]:.1%}' for label in np.argsort(-row)[:3]]
        print(f'{readable(file)}: {", ".join(names)}')


def print_test_accuracies(files, probabilities, classes):
    """Prints the accuracy of each class, if all of the photographs have labels. If not, says so on
    stderr. files: pairs (file, label), the label None if it has none."""
    labels = [label for _, label in files]
    if None in labels:
        example, _ = files[labels.index(None)]
        print(f'no accuracy, because {labels.count(None)} of {len(labels)} photographs have no '
              f'label, for example {readable(example)}', file=sys.stderr)
    else:
        print_accuracies(count_predictions(labels, probabilities), classes,
                         'labels from the names')


def write_predictions(csv_file, folder, files, probabilities):
    """predict.csv, as the course's Kaggle page takes it: an Id and a label for each photograph.

    The Id is the number that is the photograph's name (12 for 0012.jpg). If not all names are
    different numbers, it is the whole name.
    """
    ids = [file.relative_to(folder).with_suffix('').as_posix() for file, _ in files]
    if all(name.isdecimal() for name in ids) and len(set(map(int, ids))) == len(ids):
        ids = [int(name) for name in ids]
    else:
        ids = [file.relative_to(folder).as_posix() for file, _ in files]
    text = io.StringIO()
    table = csv.writer(text, lineterminator='\n')
    table.writerow(['Id', 'Category'])
    table.writerows(zip(ids, probabilities.argmax(1)))
    write_text(csv_file, text.getvalue())


# ---- Feature maps (chapter 1) ----------------------------------------------------------------

@torch.no_grad()
def feature_maps(model, image):
    """What the blocks of Classifier make of an image, uint8 (128, 128, 3), BGR.

    Returns for each block its feature maps after the pooling, float (64, 64, 64) for the first
    one, and its receptive field: how many pixels of the image, in each direction, a number in them
    depends on.
    """
    model.eval()
    device = next(model.parameters()).device
    x = convert_image_dtype(test_transform(image)).unsqueeze(0).to(device)
    blocks = []
    receptive_field = 1
    # How many pixels of the image lie between two neighbours in x.
    distance = 1
    for layer in model.convolution:
        x = layer(x)
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d)):
            # max, because PyTorch has a number for each direction, or one for both.
            receptive_field += (np.max(layer.kernel_size) - 1) * distance
            distance *= np.max(layer.stride)
        if isinstance(layer, nn.MaxPool2d):
            blocks.append((x[0].cpu().numpy(), receptive_field))
    return blocks


def draw_features(model, image):
    """features.png: the image, and a row for each block of the network: of its feature maps, the
    eight with the largest means. White is the largest number in a feature map."""
    blocks = feature_maps(model, image)
    rows, columns = 1 + len(blocks), 8
    figure = new_figure(1.5 * columns, 1.6 * rows)
    no_ticks = {'xticks': [], 'yticks': []}
    axes = figure.add_subplot(rows, columns, 1, title='the photograph', **no_ticks)
    axes.imshow(image[:, :, ::-1])  # BGR -> RGB
    axes.set_ylabel(f'{image.shape[0]} × {image.shape[1]}')
    for row, (maps, receptive_field) in enumerate(blocks, start=1):
        strongest = np.argsort(-maps.mean((1, 2)))[:columns]
        for column, channel in enumerate(strongest, start=1):
            axes = figure.add_subplot(rows, columns, row * columns + column,
                                      title=f'channel {channel}', **no_ticks)
            axes.imshow(maps[channel], 'gray')
            if column == 1:
                axes.set_ylabel(f'block {row}: {maps.shape[1]} × {maps.shape[2]}\n'
                                f'receptive field\n{receptive_field} × {receptive_field}')
    return figure


# ---- Dreams (section 1.2) --------------------------------------------------------------------

def dream(model, class_count, steps=100):
    """Gradient ascent on the input (section 1.2): for each class, an image that the network
    classifies as that class.

    Formula 1.2.2 of the book: the image x of class i makes y_i - sum |x| large, where y_i is the
    probability of the class. Here it is log y_i - c * sum |x|. The logarithm grows with y_i, so
    c = 0 gives formula 1.2.1.
    Returns the images, float (11, 128, 128, 3), BGR in 0..1, and their probabilities y_i (11,).

    If test_transform ends with Normalize, the start and the clamp to 0..1 must be changed too.
    """
    # The numbers in this function were chosen by eye. The book's c is 1, but then the sum of
    # 49,152 numbers would count more than a probability, and the images would be black.
    c = 1e-4
    max_shift = 8  # pixels
    device = next(model.parameters()).device
    model.eval().requires_grad_(False)
    torch.manual_seed(0)
    # Grey with a little noise, one image for each class.
    x = 0.4 + 0.1 * torch.rand(class_count, 3, image_size, image_size)
    x = x.to(device).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for step in progress(range(steps), 'dreaming'):
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
    run_script(main)
