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
import re
import sys
import tempfile
import textwrap
import threading
import time
import zipfile
from collections import ChainMap
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.transforms.functional import convert_image_dtype

from chapter2_1_data import (NO_IMAGE, ImgDataset, UserError, add_data_arguments, as_text,
                             batch_size, better_transform, data_dir, demo_dir, find_parts,
                             find_photographs, image_size, in_threads, is_for_validation, label_of,
                             list_images, make_demo, path_argument, picture_settings, progress_bar,
                             read_image, readfile, refuse_files, run_script, say, test_transform,
                             train_transform)

num_epoch = 100
learning_rate = 0.001

# The options that are saved with a run, and their defaults: the book's, as far as it gives any.
book_options = {'data_dir': data_dir, 'recipe': 'book', 'epochs': num_epoch,
                'batch_size': batch_size, 'lr': learning_rate, 'seed': 0, 'no_amp': False}

# The demo has few images. With the book's options its accuracy jumps up and down.
demo_options = {'epochs': 5, 'batch_size': 16, 'lr': 0.0001}

# How often a run is saved, in seconds, if an epoch does not take longer.
save_seconds = 60

# torchrun starts several processes, which train together, and numbers them from 0.
rank, world_size = 0, 1
if distributed.is_torchelastic_launched():
    rank, world_size = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])


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
        # Within autocast, PyTorch may compute convolutions and matrix products with 16 bits.
        with autocast:
            train_pred = model(x)
            batch_loss = loss(train_pred, y)
        if not scaler.is_enabled():
            batch_loss.backward()
            optimizer.step()
        else:
            # In float16, small gradients become 0. So the scaler multiplies the loss, and divides
            # the gradients afterwards.
            scaler.scale(batch_loss).backward()
            scaler.step(optimizer)
            scaler.update()
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
    if world_size > 1:
        distributed.all_reduce(totals)
    total_correct, total_loss, total_images = totals.tolist()
    return total_correct / total_images, total_loss / total_images


# ---- A better recipe (not in the book) -------------------------------------------------------
#
# With the book's recipe, the network learns the training photographs by heart: after 100 epochs on
# photographs of ten dishes, it was right for 99% of those for training, and for 59% of those for
# validation. With --recipe better, train_run trains this network on the images of better_transform
# (chapter2_1_data.py), with what is in this section. Then it was right for 84% of these augmented
# images, and for 72% of the photographs for validation. See .github/curves.png.

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

    if world_size > 1:
        distributed.init_process_group(distributed.get_default_backend_for_device(device))
    if args.demo and rank == 0:
        # The other processes wait in open_run.
        make_demo()
    with open_run(args.out, args.resume) as (folder, checkpoint):
        options = choose_options(args, checkpoint)
        dtype = pick_precision(device, options.no_amp)
        workers = pick_workers(args.workers, device)
        note(f'device {device_name(device)}, precision {str(dtype).removeprefix("torch.")}, '
             f'loader workers {workers}, processes {world_size}')
        note(f'the folder of the run is {folder}')
        train_run(options, device, dtype, workers, folder, checkpoint)
    if world_size > 1:
        # Without this pause, PyTorch 2.6, the oldest of requirements.txt, sometimes hangs.
        time.sleep(1)
        distributed.destroy_process_group()


def train_run(options, device, dtype, workers, folder, checkpoint):
    """The book's script: its data, its network and its training (sections 2.2 to 2.4). Around it,
    under comments that say so, is what lets a run be continued and its best epoch be used.
    options: what choose_options returns. dtype: the precision. workers: loader workers.
    folder: where the run is saved. checkpoint: the state of a run that is continued, or None.
    """
    # The data (section 2.2)
    classes, train_files, val_files = find_photographs(options.data_dir)
    note(f'{len(classes)} classes, {len(train_files)} photographs for training, '
         f'{len(val_files)} for validation')
    # With several processes, each trains on a share of the photographs. The shares are equal, so
    # that all take as many steps. Each reads all of val_x, which process 0 needs at the end.
    shared = len(train_files) // world_size * world_size
    train_x, train_y = readfile(train_files[rank:shared:world_size])
    val_x, val_y = readfile(val_files)
    train_set = ImgDataset(train_x, train_y, train_transform)
    val_set = ImgDataset(val_x[rank::world_size], val_y[rank::world_size], test_transform)
    if options.recipe == 'better':
        train_set.transform = better_transform
    # Pinned memory is memory from which a CUDA GPU can copy faster. Workers that are persistent
    # are started once, and not in every epoch.
    loader_options = {'batch_size': options.batch_size // world_size, 'num_workers': workers,
                      'persistent_workers': workers > 0, 'pin_memory': device.type == 'cuda'}
    train_loader = DataLoader(train_set, shuffle=True, **loader_options)
    val_loader = DataLoader(val_set, shuffle=False, **loader_options)
    if checkpoint is None and len(train_loader) < 8 and options.batch_size > 16:
        note(f'training steps in an epoch: {len(train_loader)}. With so few photographs, '
             '--batch-size 16 --lr 0.0001 trains better')

    # The network (section 2.3)
    torch.manual_seed(options.seed)
    model = make_model(len(classes), device)
    loss = nn.CrossEntropyLoss().to(device)
    # fused: updates all weights at once, which is faster.
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, fused=True)
    # The better recipe has another loss, but only for training: so validation can be compared.
    loss_for_training = loss
    if options.recipe == 'better':
        loss_for_training, optimizer = better_loss_and_optimizer(model, options.lr, device)

    # Not in the book: computing with 16 bits, and the state of a run that is continued.
    autocast, scaler = mixed_precision(device, dtype)
    history, best_acc, best_epoch, best_model = [], -1, None, None
    if checkpoint is not None:
        # What is saved at the end if all epochs are done already: nothing has changed then.
        state = checkpoint
        history, best_epoch = checkpoint['history'], checkpoint['best_epoch']
        best_model = checkpoint['best_model']
        # The path is for error messages only.
        load_weights(model, checkpoint, folder / 'last.pt', classes)
        load_optimizer(optimizer, scaler, checkpoint, folder / 'last.pt')
        note(f'resumed from epoch {len(history)} in {folder}')
        # The best epoch is measured again, as other photographs may be for validation now.
        model.load_state_dict(best_model)
        best_acc, _ = evaluate(model, val_loader, loss, autocast)
        model.load_state_dict(checkpoint['model'])
        best_acc_then = history[best_epoch - 1]['val_acc']
        if best_acc != best_acc_then:
            note(f'the validation accuracy of the best epoch is {best_acc:.6f} now, and was '
                 f'{best_acc_then:.6f}: other photographs for validation, precision or hardware')
    if len(history) >= options.epochs:
        note(f'all {options.epochs} epochs are done; --epochs N trains longer')

    # The training (section 2.4). With several processes, backward() averages their gradients.
    parallel_model = model
    if world_size > 1:
        parallel_model = DistributedDataParallel(model)
    saved_time = time.monotonic()
    for epoch in range(len(history) + 1, options.epochs + 1):
        start_time = time.perf_counter()
        title = f'[{epoch:03d}/{options.epochs:03d}]'
        # An epoch's random numbers depend on its number: so a resumed run gets the same ones as a
        # run without interruption. (Not with loader workers, which have their own.)
        torch.manual_seed(options.seed + 1_000_000 * (epoch * world_size + rank))
        # A learning-rate schedule. As it is computed from `epoch`, it needs nothing from a
        # checkpoint.
        if options.recipe == 'better':
            rate = better_learning_rate(options.lr, epoch, options.epochs)
            optimizer.param_groups[0]['lr'] = rate

        train_acc, train_loss = train_epoch(parallel_model, progress(train_loader, title),
                                            loss_for_training, optimizer, autocast, scaler)
        if world_size > 1:
            # DDP gives all processes the batch norm statistics of process 0 before each step, but
            # not after the last one.
            for buffer in model.buffers():
                distributed.broadcast(buffer, 0)
        val_acc, val_loss = evaluate(model, progress(val_loader, f'{title} validation'),
                                     loss, autocast)

        seconds = time.perf_counter() - start_time
        if rank == 0:
            say(f'{title} {seconds:.2f} sec(s) Train Acc: {train_acc:.6f} '
                f'Loss: {train_loss:.6f} | Val Acc: {val_acc:.6f} loss: {val_loss:.6f}')
        # Not in the book: the history, the best epoch, and all that is saved.
        if not math.isfinite(train_loss + val_loss):
            raise UserError('the loss is not a finite number: continue, or start again, with a '
                            'lower --lr, or with --no-amp if the precision was not float32')
        # A row of history.csv; more columns can be added.
        history.append({'epoch': epoch, 'seconds': seconds, 'train_acc': train_acc,
                        'train_loss': train_loss, 'val_acc': val_acc, 'val_loss': val_loss})
        if val_acc > best_acc:
            best_acc, best_epoch = val_acc, epoch
            best_model = copy.deepcopy(model.state_dict())
        state = {'model': model.state_dict(), 'best_model': best_model, 'best_epoch': best_epoch,
                 'optimizer': optimizer.state_dict(), 'optimizer_kind': optimizer_kind(optimizer),
                 'scaler': scaler.state_dict(), 'history': history,
                 'options': {name: getattr(options, name) for name in book_options},
                 # What must be the same when the weights are used again:
                 'required': requirements(model, classes)}
        # The first epoch is saved at once: who stops a run in its first minute can continue it.
        if epoch == 1 or time.monotonic() - saved_time >= save_seconds:
            saved_time = time.monotonic()
            try:
                save_run(folder, state)
            except UserError as error:
                note(f'{error}; the next saving makes up for it')

    # Not in the book: the last saving, and what the best epoch's weights have learned.
    save_run(folder, state)
    if rank == 0:
        model.load_state_dict(best_model)
        probabilities = predict_probabilities(model, val_x, options.batch_size, autocast)
        counts = count_predictions(val_y, probabilities)
        print_accuracies(counts, classes, 'with the best weights')
        with picture_settings():
            write(folder / 'confusion.png', draw_confusion(counts, classes))
            write(folder / 'mistakes.png', draw_mistakes(val_x, val_files, probabilities, classes))


# ----------------------------------------------------------------------------------------------
# The book's chapter ends here. The rest makes the script fast, safe to run unattended, and useful
# after the training: command line, hardware, the run's folder, pictures, prediction, dreams.
# ----------------------------------------------------------------------------------------------


# ---- Command line ----------------------------------------------------------------------------

def parse_arguments(arguments):
    """Returns what is on the command line. Options that are saved with a run are None if they are
    not typed: choose_options knows their values. --demo sets data_dir, as if it had been typed."""
    # --help begins with the text at the top of this file.
    parser = argparse.ArgumentParser(usage='%(prog)s [options]', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    demo, better = demo_options, better_options
    parser.add_argument('--recipe', choices=['book', 'better'],
                        help="train as the book does, or with better's augmentation, batch size, "
                        'loss, optimizer and learning rates (default: book)')
    parser.add_argument('--epochs', type=int, metavar='N',
                        help='how many times to train on all training images '
                        f'(default: {num_epoch}; with --demo {demo["epochs"]})')
    parser.add_argument('--batch-size', type=int, metavar='N',
                        help='images in a training step, of all processes together (default: '
                        f'{batch_size}; with --recipe better {better["batch_size"]}; with --demo '
                        f'{demo["batch_size"]})')
    parser.add_argument('--lr', type=float, metavar='X',
                        help='learning rate; with --recipe better, the highest one '
                        f'(default: {learning_rate}; with --demo {demo["lr"]})')
    parser.add_argument('--seed', type=int, metavar='N',
                        help='on the CPU, a run with the same seed gives the same results '
                        f'(default: {book_options["seed"]})')
    parser.add_argument('--no-amp', action='store_true', default=None,
                        help='no automatic mixed precision: compute with 32 bits (default: with '
                        '16 bits where that is faster)')
    parser.add_argument('--workers', type=int, metavar='N',
                        help='processes that prepare training batches, and as many for validation; '
                        '0: the training process does it (default: for a GPU as many as CPU cores, '
                        'at most 8, on Windows and macOS 2; on the CPU 0)')
    parser.add_argument('--device', metavar='NAME',
                        help='cuda, cuda:1, mps, xpu or cpu (default: a GPU if PyTorch finds one)')
    parser.add_argument('--out', type=path_argument, metavar='DIR',
                        help="the run's folder (default: the next of runs/001, runs/002, ...)")
    parser.add_argument('--resume', action='store_true',
                        help='continue the run in --out, or start it if there is none yet')
    parser.add_argument('--predict', nargs='+', type=path_argument, metavar='PATH',
                        help='predict the classes of photographs with the run in --out; those of a '
                        'folder are written into predict.csv and predict_names.csv, with their '
                        'accuracy if they are named or arranged like those for training')
    parser.add_argument('--dreams', action='store_true',
                        help='dreams.png: what the classes look like to the network in --out')
    parser.add_argument('--features', type=path_argument, metavar='PHOTO',
                        help='features.png: the strongest feature maps of the network in --out')
    parser.add_argument('--checkpoint', default='best.pt', metavar='NAME',
                        help='the file in --out that --predict, --dreams and --features use '
                        '(default: %(default)s)')
    args = parser.parse_args(arguments)
    if args.out is None and (args.resume or args.predict or args.dreams or args.features):
        parser.error('--resume, --predict, --dreams and --features need the folder of a run: '
                     '--out DIR')
    for name, lowest in {'epochs': 1, 'batch_size': 1, 'lr': 0, 'seed': 0, 'workers': 0}.items():
        value = getattr(args, name)
        # Written with "not", so that nan is refused as well.
        if value is not None and not value >= lowest:
            parser.error(f'--{name.replace("_", "-")} {value}: must be at least {lowest}')
    if args.demo:
        args.data_dir = demo_dir
    return args


def choose_options(args, checkpoint=None):
    """The options of a run: those that are typed, or else those that the run has saved, or else
    those of the demo, of the better recipe, or of the book. (No option switches a saved --no-amp
    off.) Raises UserError if the processes cannot share a batch."""
    # An option is taken from the first map that has it.
    options = ChainMap({name: value for name, value in vars(args).items() if value is not None})
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
    if chosen.batch_size % world_size != 0:
        raise UserError(f'{world_size} processes cannot share batches of {chosen.batch_size} '
                        'images equally: choose a different --batch-size or --nproc-per-node')
    return chosen


def note(message):
    """Prints a message on stderr. If there are several processes, only process 0 does."""
    if rank == 0:
        say(message, sys.stderr)


def progress(batches, title):
    """The batches, with a progress bar that only process 0 shows."""
    if rank > 0:
        return batches
    return progress_bar(batches, title)


# ---- Hardware --------------------------------------------------------------------------------

def pick_device(name):
    """The device called `name`. If name is None: CUDA, else another kind of GPU, else the CPU.
    Raises UserError if PyTorch cannot use the device here.
    """
    if name is None:
        name = 'cpu'
        if torch.accelerator.is_available():
            name = torch.accelerator.current_accelerator().type
    if name == 'cuda':
        # Each of the processes that torchrun starts on a machine gets a GPU of its own.
        name = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    try:
        device = torch.device(name)
        if device.type == 'cuda':
            # Otherwise PyTorch would take some memory on GPU 0 as well.
            torch.cuda.set_device(device)
        # Some devices fail only when they have to compute something.
        torch.ones(1, device=device).item()
    except Exception as error:
        # Asked for a device that it has not been built for, PyTorch raises anything, even an
        # AttributeError or an AssertionError.
        reason = str(error).partition('\n')[0][:200]
        raise UserError(f'PyTorch {torch.__version__} cannot use the device {name} here: {reason}; '
                        'see .github/install.md. --device cpu always works') from None
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
    if sys.platform in ('win32', 'darwin'):
        # There, each worker has a PyTorch of its own: hundreds of MB of memory, and on Windows
        # gigabytes of the page file.
        return 2
    # Slurm, or Docker's --cpuset-cpus, may allow fewer cores than there are.
    cores = len(os.sched_getaffinity(0))
    processes_here = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    return min(cores // processes_here, 8)


# ---- The run's folder ------------------------------------------------------------------------

@contextlib.contextmanager
def open_run(out, resume):
    """Opens the folder of a run for a with-block. out, resume: what --out and --resume say.
    Yields the folder, and the checkpoint to continue from, or None. No other run on this computer
    can open the folder meanwhile. If the block ends in an error or is interrupted, says how to
    continue. Raises UserError or OSError if the folder cannot be used.
    """
    if rank > 0:
        # Process 0 opens the folder, and tells the others.
        opened = [None, None]
        distributed.broadcast_object_list(opened)
        yield opened
        return
    if out is None:
        numbered = (Path('runs', f'{number:03d}').absolute() for number in itertools.count(1))
        out = next(folder for folder in numbered if not folder.exists())
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    # The lock is a file in the system's folder for temporary files, because network drives such as
    # Google Drive have no reliable locks.
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    lock_file = os.path.join(tempfile.gettempdir(), f'food-11-{name}.lock')
    try:
        lock = FileLock(lock_file).acquire(timeout=0)
    except Timeout:
        raise UserError(f'{folder} is in use by another run: wait until that has ended, or choose '
                        'a different --out') from None
    with lock:
        opened = [folder, find_checkpoint(folder, resume)]
        if world_size > 1:
            distributed.broadcast_object_list(opened)
        try:
            yield opened
        except BaseException:
            if (folder / 'last.pt').exists():
                script = os.path.abspath(__file__)
                line = f'continue with: python "{script}" --out "{folder}" --resume'
                # In a thread, because a second Ctrl-C cannot interrupt a thread.
                thread = threading.Thread(target=note, args=[line])
                thread.start()
                thread.join()
            raise
        finally:
            # Only an empty folder can be removed: it is not left behind.
            with contextlib.suppress(OSError):
                folder.rmdir()


def find_checkpoint(folder, resume):
    """Returns the checkpoint in the folder of a run; None if it is a new run.
    Raises UserError if the run would replace files, of another run or of anybody.
    """
    # Hidden files are the system's, or left by a run that was killed while it saved.
    files = sorted(name for name in os.listdir(folder) if not name.startswith('.'))
    if not files:
        return None
    if not resume or 'last.pt' not in files:
        raise UserError(f'{folder} already holds files, such as {files[0]}: choose a different '
                        '--out. (--resume continues a run, if its last.pt is there)')
    # 'optimizer_kind': a best.pt under the name of last.pt would have none.
    return load_checkpoint(folder / 'last.pt', 'optimizer_kind')


def save_run(folder, state):
    """Writes last.pt, which holds all that is needed to continue, and what people want to have of
    it: best.pt, settings.json, curves.png and history.csv. Only process 0 does.
    Raises UserError if one of them cannot be written.
    """
    if rank > 0:
        return
    # If somebody adds a column of NumPy's numbers, these become Python's, as load_checkpoint would
    # refuse NumPy's.
    history = json.loads(json.dumps(state['history'], default=float))
    required = state['required']
    write(folder / 'last.pt', {**state, 'history': history})
    write(folder / 'best.pt', {'model': state['best_model'], 'required': required})
    write(folder / 'settings.json', {**state['options'], 'classes': required['classes']})
    with picture_settings():
        write(folder / 'curves.png', draw_curves(history, state['best_epoch']))
    # At the end, as Excel may have it open: then Windows does not allow replacing it.
    write(folder / 'history.csv', history)


def write(path, content):
    """Writes a file in such a way that it is complete, or else as it was before.
    content: for .pt a checkpoint, for .png a matplotlib figure, for .csv the rows of a table as
    dicts, and for .json what JSON can hold.
    Raises UserError if the file cannot be written: for example if the disk is full, or if another
    program has it open on Windows.
    """
    file_bytes = io.BytesIO()
    if path.suffix == '.pt':
        torch.save(content, file_bytes)
    elif path.suffix == '.png':
        # The layout finds room for long names only when it is drawn a second time.
        content.draw_without_rendering()
        content.savefig(file_bytes, format='png')
    else:
        text = io.StringIO()
        if path.suffix == '.csv':
            # Older rows may lack new columns of the script: restval='' leaves a gap. Or they have
            # more columns: extrasaction='ignore' leaves these out.
            table = csv.DictWriter(text, list(content[-1]), restval='', extrasaction='ignore',
                                   lineterminator='\n')
            table.writeheader()
            table.writerows(content)
        else:
            json.dump(content, text, indent=1, ensure_ascii=False)
        # surrogateescape: names of files that are not Unicode, on Linux, are written as they are.
        file_bytes.write(text.getvalue().encode(errors='surrogateescape'))
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(file_bytes.getbuffer())
            # The content must be on the disk before the old file goes: the power may fail.
            file.flush()
            os.fsync(file.fileno())
        # Tried for two seconds, as on Windows another program may have the file open. The last
        # attempt may raise.
        for _ in range(20):
            with contextlib.suppress(PermissionError):
                os.replace(temporary, path)
                return
            time.sleep(0.1)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f'cannot write {path}: {error.strerror}; what was saved before is intact'
                        ) from None
    finally:
        # If all went well, it is not there any more.
        with contextlib.suppress(OSError):
            temporary.unlink()


def load_checkpoint(path, part):
    """Reads a checkpoint into the CPU's memory. Program code in it is not executed.
    part: what must be in it, such as 'model'. Raises UserError if it is not, or if the file is
    corrupt or not a checkpoint of this script; OSError if it cannot be opened.
    """
    file = io.BytesIO(Path(path).read_bytes())
    try:
        # A checkpoint is a zip file, but PyTorch does not check the checksums in it.
        if zipfile.ZipFile(file).testzip() is not None:
            raise zipfile.BadZipFile
        file.seek(0)
        checkpoint = torch.load(file, weights_only=True, map_location='cpu')
    except Exception as error:
        # zipfile and torch.load raise almost anything if a bit of the file is wrong.
        raise UserError(f'{path} is corrupt, or not a checkpoint ({type(error).__name__}): replace '
                        'it by a copy, or start a new run in a different folder') from None
    if not (isinstance(checkpoint, dict) and {part, 'required'} <= checkpoint.keys()):
        raise UserError(f'{path} is incompatible: it has no {part}, or is of an older version of '
                        'the script; start a new run in a different folder')
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


def optimizer_kind(optimizer):
    """What must be the same when an optimizer is continued: the name of its class, and the shapes
    of the parameters in each of its groups."""
    return [type(optimizer).__name__,
            [[list(parameter.shape) for parameter in group['params']]
             for group in optimizer.param_groups]]


def load_optimizer(optimizer, scaler, checkpoint, path):
    """Puts the saved states of the optimizer, such as Adam's averages, and of the scaler into them.
    Raises UserError, naming `path`, if another kind of optimizer is saved."""
    # PyTorch does not compare shapes. With other ones, it would write beyond its memory.
    if checkpoint['optimizer_kind'] != optimizer_kind(optimizer):
        raise UserError(f'{path} is incompatible: its optimizer was another one than '
                        f'{type(optimizer).__name__}, or trained other parameters; give the same '
                        '--recipe, undo this change, or start a new run in a different folder')
    # The optimizer's options stay those of the script and the command line: so a lower --lr or an
    # edited weight decay takes effect.
    optimizer.load_state_dict({**optimizer.state_dict(), 'state': checkpoint['optimizer']['state']})
    # Empty if the run has not computed with float16.
    if checkpoint['scaler']:
        scaler.load_state_dict(checkpoint['scaler'])


def load_model(path, device):
    """Returns the network with the weights of a checkpoint, on the device, and the names of its
    classes. Raises UserError if the file is corrupt, or does not fit the script, and OSError if it
    cannot be opened.

    In a program of your own, beside the scripts:

        import contextlib, torch, chapter2_1_data as data, chapter2_2_train as train
        model, classes = train.load_model('runs/001/best.pt', torch.device('cpu'))
        x = data.read_image('dinner.jpg')[None]  # uint8 (1, 128, 128, 3), BGR
        y = train.predict_probabilities(model, x, 1, contextlib.nullcontext())  # (1, 11)
        print(classes[y[0].argmax()])
    """
    checkpoint = load_checkpoint(path, 'model')
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
    epochs = [row['epoch'] for row in history]
    for axes, name, title in zip(figure.subplots(1, 2), ('acc', 'loss'),
                                 ('accuracy', 'mean loss per image')):
        axes.plot(epochs, [row[f'train_{name}'] for row in history], marker='.',
                  label='training, augmented images')
        axes.plot(epochs, [row[f'val_{name}'] for row in history], marker='.', label='validation')
        best_value = history[best_epoch - 1][f'val_{name}']
        axes.axvline(best_epoch, color='grey', linestyle=':',
                     label=f'best: epoch {best_epoch}, {best_value:.3f}')
        axes.set(title=title, xlabel='epoch')
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def draw_confusion(counts, classes):
    """confusion.png from counts (11, 11): a row for each true class, a column for each predicted.
    Each cell shows a number of images, and its share of all images of the true class. With more
    than 40 classes there are only colours, as nobody could read texts.
    """
    side = 4 + 0.5 * min(len(classes), 40)
    figure = new_figure(side, side)
    axes = figure.subplots()
    # Each row is divided by its total; a class without images by 1 instead of 0.
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    # vmax: so that no colour is too dark for black numbers.
    axes.imshow(shares, 'Blues', vmin=0, vmax=1.6)
    accuracy = np.trace(counts) / counts.sum()
    axes.set(title=f'{accuracy:.1%} of the validation images are right', xlabel='predicted',
             ylabel='true')
    if len(classes) <= 40:
        for true, predicted in np.argwhere(counts > 0):
            axes.text(predicted, true, f'{counts[true, predicted]}\n{shares[true, predicted]:.0%}',
                      ha='center', va='center', fontsize=8)
        names = [wrapped(name) for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=90)
        axes.set_yticks(range(len(classes)), names)
    return figure


def wrapped(text):
    """The text on several lines, so that it is no wider than a picture of 1.6 inches."""
    width = 20
    if not text.isascii():
        # Chinese characters are twice as wide.
        width = 10
    return textwrap.fill(text, width)


def draw_images(images, titles, heading):
    """Images, RGB (H, W, 3) or grey (H, W), at most eight in a row, with their titles."""
    columns = max(1, min(len(images), 8))
    rows = max(1, math.ceil(len(images) / columns))
    titles = ['\n'.join(map(wrapped, title.splitlines())) for title in titles]
    most_lines = max((len(title.splitlines()) for title in titles), default=0)
    figure = new_figure(1.6 * columns, (1.7 + 0.16 * most_lines) * rows + 0.6)
    figure.suptitle(textwrap.fill(heading, 20 * columns), fontsize=10)
    for i, (image, title) in enumerate(zip(images, titles)):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.set_axis_off()
        axes.imshow(image, 'gray')
        axes.set_title(title, fontsize=8)
    return figure


def draw_mistakes(val_x, val_files, probabilities, classes):
    """mistakes.png: the 24 wrong predictions with the highest probabilities.
    val_x: uint8 (N, 128, 128, 3), BGR. val_files: pairs (file, label).
    """
    val_y = np.array([label for _, label in val_files])
    predicted = probabilities.argmax(1)
    confidence = probabilities.max(1)
    wrong = np.flatnonzero(predicted != val_y)
    most_confident_first = np.argsort(-confidence[wrong], kind='stable')
    wrong = wrong[most_confident_first][:24]
    titles = [f'{as_text(val_files[i][0].name)}\n{classes[val_y[i]]}\npredicted:\n'
              f'{classes[predicted[i]]} {confidence[i]:.0%}' for i in wrong]
    heading = 'the most confident mistakes on the validation images'
    if len(wrong) == 0:
        heading = 'no mistakes on the validation images'
    return draw_images(val_x[wrong][..., ::-1], titles, heading)  # BGR -> RGB


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
    np.add.at(counts, (labels, probabilities.argmax(1)), 1)
    return counts


def print_accuracies(counts, classes, heading):
    """Prints for each class how many of its images are right (accuracy), and how many of the
    images that are predicted as this class are right (precision)."""
    say(f'{heading:<24} images  right accuracy precision')
    for label, name in enumerate(classes):
        right, images, predicted = counts[label, label], counts[label].sum(), counts[:, label].sum()
        say(f'{label:>3} {name:<20} {images:>6} {right:>6} {percent(right, images):>8} '
            f'{percent(right, predicted):>9}')
    right, images = np.trace(counts), counts.sum()
    say(f'{"total":<24} {images:>6} {right:>6} {percent(right, images):>8}')


def percent(part, whole):
    """part/whole as a text such as 12.5%; a dash if whole is 0."""
    if whole == 0:
        return '-'
    return f'{part / whole:.1%}'


def use_run(args, device):
    """Does what --predict, --dreams and --features ask for, with a checkpoint of the run in
    --out."""
    folder = Path(args.out)
    model, classes = load_model(folder / args.checkpoint, device)
    if args.dreams:
        images, probabilities = dream(model, len(classes))
        titles = [f'{name}\n{y:.1%}' for name, y in zip(classes, probabilities)]
        with picture_settings():
            write(folder / 'dreams.png', draw_images(images[..., ::-1], titles,  # BGR -> RGB
                                                     'what the classes look like to the network'))
        say(f'picture written to {folder / "dreams.png"}')
    if args.features:
        image = read_image(args.features)
        if image is None:
            raise UserError(f'{args.features} {NO_IMAGE}')
        with picture_settings():
            write(folder / 'features.png', draw_features(model, image))
        say(f'picture written to {folder / "features.png"}')
    if args.predict:
        # --no-amp and --batch-size are those of this command, not those of the run.
        options = choose_options(args)
        autocast, _ = mixed_precision(device, pick_precision(device, options.no_amp))
        predict(args.predict, model, classes, folder, options.batch_size, autocast)


def predict(paths, model, classes, run_folder, batch_size, autocast):
    """Predicts the classes of photographs, or of those in a folder. Those in a folder are written
    into two tables in run_folder; if they are labelled as those for training are, also prints the
    accuracy.
    Raises UserError at the end if some files are no images; it names them. A file that cannot be
    opened ends it at once, with OSError.
    """
    files = []
    for path in paths:
        # Windows does not replace a pattern such as *.jpg by names, as Linux and macOS do.
        matches = sorted(glob.glob(path))
        if os.path.exists(path) or not matches:
            matches = [path]
        files += map(Path, matches)
    folders = [file for file in files if os.path.isdir(file)]
    if folders and len(files) > 1:
        raise UserError('--predict takes photographs, or one folder, as predict.csv is one table')
    if folders:
        files = list_images(folders[0])
    if not files:
        raise UserError(f'no photographs in {folders[0]}')
    x = np.zeros((len(files), image_size, image_size, 3), dtype=np.uint8)
    bad_files = []

    def read(i):
        img = read_image(files[i])
        if img is None:
            bad_files.append(files[i])
        else:
            x[i] = img

    in_threads(read, range(len(files)), 'reading')
    probabilities = predict_probabilities(model, x, batch_size, autocast)
    # Without the files that are no images, which are black in x.
    predictions = {file: row for file, row in zip(files, probabilities) if file not in bad_files}
    if folders and predictions:
        say(f'{folders[0]}: {len(predictions)} of {len(files)} photographs predicted, in '
            f'{run_folder / "predict.csv"}')
        print_folder_accuracies(predictions, classes, folders[0], run_folder)
        write_predictions(predictions, classes, folders[0], run_folder)
    else:
        for file, row in predictions.items():
            names = [f'{classes[label]} {row[label]:.1%}' for label in np.argsort(-row)[:3]]
            say(f'{file}: {", ".join(names)}')
    refuse_files(bad_files, NO_IMAGE)


def print_folder_accuracies(predictions, classes, folder, run_folder):
    """Prints the accuracy of each class over the photographs in `folder`, if all have labels.
    predictions: the probabilities (11,) of each file. Photographs that have trained the network do
    not count. If nothing is left to count, says so on stderr.
    """
    labels = {file: label_of(file, folder, classes) for file in predictions}
    unlabelled = [file for file, label in labels.items() if label is None]
    if unlabelled:
        note(f'no accuracy, because {len(unlabelled)} of {len(labels)} photographs have no label, '
             f'for example {unlabelled[0]}')
        return
    counted = [file for file in predictions if not has_trained(file, folder, run_folder)]
    if not counted:
        note('no accuracy, because all these photographs have trained the network')
        return
    heading = 'labels from the names'
    if len(counted) < len(labels):
        heading = 'those that did not train'
        say(f'{len(labels) - len(counted)} of them have trained the network, and do not count')
    counts = count_predictions([labels[file] for file in counted],
                               np.stack([predictions[file] for file in counted]))
    print_accuracies(counts, classes, heading)


def has_trained(file, folder, run_folder):
    """Whether a photograph in `folder` lies among those that the run takes for training."""
    settings = run_folder / 'settings.json'
    if not settings.exists():
        return False
    text = settings.read_text(encoding='utf-8', errors='surrogateescape')
    # The folders may be reached by links.
    run_data_dir = Path(json.loads(text)['data_dir']).resolve()
    file = folder.resolve() / file.relative_to(folder)
    parts = find_parts(run_data_dir)
    if parts is not None:
        return file.is_relative_to(parts[0].resolve())
    return file.is_relative_to(run_data_dir) and not is_for_validation(file, run_data_dir)


def write_predictions(predictions, classes, folder, run_folder):
    """predict.csv, as the course's Kaggle page takes it: an Id and a label for each photograph. And
    predict_names.csv for people: file, class and probability.
    The Id is the number that is the photograph's name (12 for 0012.jpg). If not all names are
    different numbers, it is the whole name.
    """
    names = [file.relative_to(folder).as_posix() for file in predictions]
    ids = [os.path.splitext(name)[0] for name in names]
    if all(text.isdecimal() for text in ids) and len(set(map(int, ids))) == len(ids):
        ids = [int(text) for text in ids]
    else:
        ids = names
    labels = [row.argmax() for row in predictions.values()]
    write(run_folder / 'predict.csv',
          [{'Id': photo_id, 'Category': label} for photo_id, label in zip(ids, labels)])
    # \ufeff, as without this mark at the beginning, Excel does not read Chinese.
    write(run_folder / 'predict_names.csv',
          [{'\ufefffile': name, 'class': classes[label], 'probability': f'{row[label]:.4f}'}
           for name, label, row in zip(names, labels, predictions.values())])


# ---- Feature maps (chapter 1) ----------------------------------------------------------------

@torch.no_grad()
def feature_maps(model, image):
    """What the blocks of Classifier make of an image, uint8 (128, 128, 3), BGR.
    Returns for each block its feature maps after the pooling, float (64, 64, 64) for the first
    one, and its receptive field: how many pixels of the image, in each direction, a number in them
    depends on. Raises UserError if the network has no `convolution`.
    """
    if not hasattr(model, 'convolution'):
        raise UserError('--features needs a network with `convolution`, as Classifier has it')
    model.eval()
    device = next(model.parameters()).device
    x = convert_image_dtype(test_transform(image)).unsqueeze(0).to(device)
    blocks = []
    receptive_field = 1
    # How many pixels of the image two neighbours in x are apart.
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
    """features.png: a row for each block of the network: the photograph, and of the block's feature
    maps the seven with the largest means. White is the largest number in a feature map."""
    images, titles = [], []
    for number, (maps, receptive_field) in enumerate(feature_maps(model, image), start=1):
        images.append(image[..., ::-1])  # BGR -> RGB
        titles.append(f'block {number}: {maps.shape[1]} × {maps.shape[2]}\n'
                      f'receptive field\n{receptive_field} × {receptive_field}')
        for channel in np.argsort(-maps.mean((1, 2)))[:7]:
            images.append(maps[channel])
            titles.append(f'channel {channel}')
    return draw_images(images, titles, 'what each block sees in the photograph')


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
    model.eval()
    torch.manual_seed(0)
    # Grey with a little noise, one image for each class.
    x = 0.4 + 0.1 * torch.rand(class_count, 3, image_size, image_size)
    x = x.to(device).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for step in progress(range(steps), 'dreaming'):
        # The images are shifted by a different distance in each step. So only shapes make the
        # probability large, wherever they are. Without this, the images would be speckle.
        shift = torch.randint(-max_shift, max_shift + 1, (2,)).tolist()
        scores = model(x.roll(shift, dims=(2, 3)))
        # log y_i is large where y_i is large, but has a gradient also where y_i is near 0.
        # diagonal: of image i, only the probability of class i counts.
        log_y = scores.log_softmax(1).diagonal()
        objective = log_y.sum() - c * x.abs().sum()
        # Only the images get a gradient, and not the weights. An optimizer makes its objective
        # small, so it gets the negative.
        x.grad = torch.autograd.grad(-objective, x)[0]
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
