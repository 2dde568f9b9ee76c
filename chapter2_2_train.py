"""Trains the book's network on food-11 (sections 2.3 and 2.4) and prints one line an epoch.

    python chapter2_2_train.py                      the book's run: ./food-11, 100 epochs, batches of 128, lr 0.001
    python chapter2_2_train.py --demo               no photographs at hand: learns drawn dishes, in a minute or two
    torchrun --nproc-per-node 2 chapter2_2_train.py two GPUs, or two processes on the CPU, train one network together
    python chapter2_2_train.py >train.log           a log of the epochs and nothing else

Each run keeps its checkpoints, history and pictures in a folder of its own:

    python chapter2_2_train.py --out runs/night --resume   starts a run, or continues it: the same command again and again
    python chapter2_2_train.py --out runs/night --predict dinner.jpg food-11/testing
    python chapter2_2_train.py --out runs/night --dreams   what each class looks like to the network (section 1.2)
"""
import argparse
import contextlib
import ctypes
import io
import itertools
import json
import math
import os
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn
from tqdm import tqdm

from chapter2_1_data import (CLASSES, ImgDataset, UserError, add_data_arguments, batch_size, book_transforms, data_dir,
                             demo_dir, draw_food11, forks, list_images, make_loaders, process, read_food11, read_images, run,
                             shared_memory, to_device)

num_epoch = 100
learning_rate = 0.001
save_seconds = 60  # a checkpoint takes a second or two
DEMO = {'epochs': 5, 'batch_size': 16, 'lr': 0.0001}  # settings that suit a few drawn dishes


# ---------------------------------------------------------------------- network (2.3)

class Classifier(nn.Module):
    """Scores for the 11 classes: float (N, 3, 128, 128), BGR in 0..1 -> (N, 11). 12,833,803 parameters."""

    def __init__(self):
        super().__init__()
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
            nn.Linear(512 * 4 * 4, 1024),  # [8192] -> [1024]
            nn.ReLU(),
            nn.Linear(1024, 512),
            nn.ReLU(),
            nn.Linear(512, len(CLASSES)),  # [11]
        )

    def forward(self, x):
        x = self.convolution(x)            # [N, 512, 4, 4]
        x = x.flatten(1)                   # [N, 8192]
        return self.fc(x)


# ---------------------------------------------------------------------- training (2.4)

def mixed_precision(device, amp=True):
    """torch.autocast for the device, and its gradient scaler: bfloat16 where the hardware computes in it, float16 on
    GPUs that were the first with tensor cores. On other hardware, or without `amp`, full precision."""
    dtype = None
    if amp and device.type == 'cuda':
        major = torch.cuda.get_device_capability(device)[0]
        dtype = torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else None
    elif amp and device.type == 'cpu':
        units = ('_is_avx512_bf16_supported', '_is_amx_tile_supported')  # without them bfloat16 is slower
        dtype = torch.bfloat16 if any(getattr(torch.cpu, name, bool)() for name in units) else None
    autocast = torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()
    return autocast, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def train_epoch(model, train_loader, loss, optimizer, device, autocast, scaler, title=''):
    """One pass over the training images. Returns accuracy and mean cross-entropy per image, of the predictions
    made on the way."""
    model.train()
    correct, loss_sum, images = sums = torch.zeros(3, device=device)  # there: asking after each batch would make it wait
    for x, y in tqdm(train_loader, title, leave=False, unit='batch', disable=None):
        x, y = to_device(x, device), y.to(device, non_blocking=True)
        optimizer.zero_grad()
        with autocast:
            train_pred = model(x)
            batch_loss = loss(train_pred, y)
        scaler.scale(batch_loss * share(len(y), device)).backward()
        scaler.step(optimizer)
        scaler.update()
        correct += (train_pred.argmax(1) == y).sum()
        loss_sum += batch_loss.detach() * len(y)  # the batch's mean; the last batch is smaller than the others
        images += len(y)
    return means(sums)


@torch.no_grad()
def evaluate(model, val_loader, loss, device, autocast, title=''):
    """Accuracy and mean cross-entropy per image of the network as it stands."""
    model.eval()
    correct, loss_sum, images = sums = torch.zeros(3, device=device)
    for x, y in tqdm(val_loader, title, leave=False, unit='batch', disable=None):
        x, y = to_device(x, device), y.to(device, non_blocking=True)
        with autocast:
            val_pred = model(x)
            batch_loss = loss(val_pred, y)
        correct += (val_pred.argmax(1) == y).sum()
        loss_sum += batch_loss * len(y)
        images += len(y)
    return means(sums)


def train(model, optimizer, train_loader, val_loader, num_epoch, device, seed, out, history, amp=True):
    """The book's loop from the epoch after `history` on. Prints a line after each epoch, and saves the run into `out`
    so often that at most `save_seconds` are lost, or one epoch where an epoch is longer."""
    def batches(epoch):
        torch.manual_seed(seed + 1_000_003 * epoch)  # all an epoch draws hangs on these two: a resumed run repeats it
        train_loader.dataset.seed.fill_(seed + 1_000_003 * epoch)
        return iter(train_loader)

    loss = nn.CrossEntropyLoss()
    autocast, scaler = mixed_precision(device, amp)
    together = nn.parallel.DistributedDataParallel(model) if process()[1] > 1 else model
    best, best_weights = max((row['val_acc'] for row in history), default=-1), None
    saved_at = time.monotonic()
    upcoming = batches(len(history) + 1) if len(history) < num_epoch else None
    for epoch in range(len(history) + 1, num_epoch + 1):
        start, title = time.perf_counter(), f'[{epoch:03}/{num_epoch:03}]'
        train_acc, train_loss = train_epoch(together, upcoming, loss, optimizer, device, autocast, scaler, title)
        for buffer in model.buffers() if together is not model else ():
            distributed.broadcast(buffer, 0)  # batch norm's, of which each process on the CPU has its own
        upcoming = batches(epoch + 1) if epoch < num_epoch else None  # prepared while the network is evaluated
        val_acc, val_loss = evaluate(model, val_loader, loss, device, autocast, title + ' validation')
        seconds = time.perf_counter() - start
        print(f'{title} {seconds:.2f} sec(s) Train Acc: {train_acc:.6f} Loss: {train_loss:.6f} | '
              f'Val Acc: {val_acc:.6f} loss: {val_loss:.6f}', flush=True)
        if not math.isfinite(train_loss + val_loss):
            raise UserError(f'epoch {epoch}: the loss is no longer a number; {saved_state(out)}. '
                            'Start a new run with a lower --lr, or with --no-amp')
        history.append(dict(zip(HISTORY, (epoch, seconds, train_acc, train_loss, val_acc, val_loss))))
        if process()[0] > 0:
            continue
        if val_acc > best:
            best, best_weights = val_acc, {name: value.clone() for name, value in model.state_dict().items()}
        if epoch == num_epoch or time.monotonic() - saved_at + seconds > save_seconds:
            save(out, model, optimizer, history, best_weights)
            saved_at, best_weights = time.monotonic(), None


# ---------------------------------------------------------------------- where it runs: one process, or several of torchrun

def pick_device(name=None):
    """The device called `name`; without one CUDA, else another accelerator, else the CPU.

    Raises UserError if PyTorch cannot use it here."""
    if name is None:
        name = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else 'cpu'
    if str(name) == 'cuda' and process()[1] > 1:
        name = f'cuda:{os.environ["LOCAL_RANK"]}'  # each process of a machine has a GPU of its own
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except Exception as error:  # each kind of device fails in its own way
        raise UserError(f'--device {name}: PyTorch {torch.__version__} cannot use it here '
                        f'({str(error).splitlines()[0]}); leave --device out to take what there is') from None
    return device


def cores():
    """How many cores each process of this run has on this machine."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return max(1, here // int(os.environ.get('LOCAL_WORLD_SIZE', 1)))


def default_workers(device, train_set, batch_size):
    """A process a core, but for the main process's, prepares batches for a GPU: as many as shared memory holds the
    batches of, which is little in a container. None on the CPU, whose cores have enough to do."""
    if device.type == 'cpu' or not (forks() or train_set.x.is_shared()):
        return 0
    workers = min(cores() - 1, 4 if os.name == 'nt' else 16)  # on Windows each takes gigabytes of page file
    return min(workers, shared_memory() // (4 * batch_size * train_set.x[0].nbytes))


def keep_memory(batch_size):
    """Has Linux's malloc keep the memory of one step for the next, which otherwise waits while the system clears it anew:
    up to 40 % of the time of training on the CPU. That takes up to 70 % more memory; not where it might run short."""
    with contextlib.suppress(AttributeError, OSError, TypeError, ValueError):  # not glibc's
        memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
        with contextlib.suppress(OSError, ValueError):
            memory = min(memory, int(Path('/sys/fs/cgroup/memory.max').read_text()))  # a container's
        if memory > 100e6 * batch_size:
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-1, -1)  # M_TRIM_THRESHOLD
            mallopt(-4, 0)   # M_MMAP_MAX


def join_processes(device):
    """Joins torchrun's processes into one run."""
    if process()[1] > 1:
        if device.type == 'cuda':
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(cores())  # torchrun says 1
        store, rank, world = next(distributed.rendezvous('env://'))
        if os.environ['GROUP_WORLD_SIZE'] == '1':  # one machine. A restarted process must not find the dead ones' addresses
            store = distributed.PrefixStore(os.environ['TORCHELASTIC_RESTART_COUNT'], store)
        distributed.init_process_group('nccl' if device.type == 'cuda' else 'gloo', store=store, rank=rank, world_size=world)


def of_first(value):
    """What `value` is in process 0."""
    values = [value]
    if process()[1] > 1:
        distributed.broadcast_object_list(values)
    return values[0]


def share(images, device):
    """What a process's mean loss weighs where DistributedDataParallel averages over the processes: 1 but for a last
    batch of which they have unequal numbers of images."""
    if process()[1] == 1:
        return 1
    in_all = torch.full((), images, dtype=torch.float32, device=device)
    distributed.all_reduce(in_all)
    return images * process()[1] / in_all


def means(sums):
    """Accuracy and mean loss from the numbers of right answers, of loss and of images, summed over all processes."""
    if process()[1] > 1:
        distributed.all_reduce(sums)
    correct, loss_sum, images = sums.tolist()
    return correct / images, loss_sum / images


# ---------------------------------------------------------------------- the run's folder

FILES = ('settings.json', 'last.pt', 'best.pt', 'history.csv', 'curves.png', 'confusion.png', 'mistakes.png')
HISTORY = ('epoch', 'seconds', 'train_acc', 'train_loss', 'val_acc', 'val_loss')


def write(path, save):
    """Makes what `save(file)` writes the file `path`, whole or not at all: beside it, flushed to the disk, put in place."""
    beside, content = path.with_name(path.name + '.tmp'), io.BytesIO()
    save(content)
    try:
        with open(beside, 'wb') as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        try:
            os.replace(beside, path)
        except PermissionError:  # Windows, while Excel or a viewer holds the old file open
            print(f'{path} is in use by another program: left as it was', file=sys.stderr)
    except OSError as error:
        raise UserError(f'cannot write {path}: {error.strerror}; what was saved before is whole') from None
    finally:
        beside.unlink(missing_ok=True)


def write_text(path, text):
    write(path, lambda file: file.write(text.encode()))


def save(out, model, optimizer, history, best_weights=None):
    """Writes best.pt (if there are new best weights), last.pt, history.csv and curves.png."""
    if best_weights:  # first: a run killed after this line finds these weights again on its way
        write(out / 'best.pt', lambda file: torch.save({'model': best_weights}, file))
    state = {'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'history': history}
    write(out / 'last.pt', lambda file: torch.save(state, file))
    write_history(out, history)


def write_history(out, history):
    """Writes history.csv and curves.png."""
    rows = [','.join(f'{value:.6f}' if isinstance(value, float) else str(value) for value in row.values()) for row in history]
    write_text(out / 'history.csv', '\n'.join([','.join(HISTORY), *rows, '']))
    write(out / 'curves.png', draw_curves(history).savefig)


def saved_state(out):
    """A phrase that says what a run could be resumed from."""
    if not (out / 'last.pt').exists():
        return f'{out} holds no checkpoint yet'
    return f'{out} holds the state after epoch {len(torch.load(out / "last.pt", weights_only=True)["history"])}'


def load(path, device, model, optimizer=None):
    """Puts a checkpoint's weights (and Adam's state) in place and returns its history. Executes nothing that is in it.

    Raises UserError if it is missing, damaged or none of ours."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        if not all(value.isfinite().all() for value in state['model'].values()):
            raise ValueError('damaged weights')
        model.load_state_dict(state['model'])
        if optimizer:
            for group in state['optimizer']['param_groups']:
                group['fused'] = optimizer.defaults['fused']  # of this device, not of the one it was saved on
            optimizer.load_state_dict(state['optimizer'])
            return [{name: (int if name == 'epoch' else float)(row[name]) for name in HISTORY} for row in state['history']]
    except FileNotFoundError:
        raise UserError(f'no {path.name} in {path.parent}: --out must name the folder of a run that has saved one') from None
    except Exception:  # whatever a foreign file may lead torch.load to
        raise UserError(f'{path} is damaged, or no checkpoint of this script; nothing in it was executed') from None


# ---------------------------------------------------------------------- pictures of a run

def new_figure(width, height, **options):
    """A matplotlib figure (inches) that needs no display. Imported here, as --predict need not wait for it."""
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout='constrained', **options)


def draw_curves(history):
    """curves.png: accuracy and loss over the epochs, the best epoch marked."""
    figure = new_figure(10, 4)
    epochs = [row['epoch'] for row in history]
    best = max(history, key=lambda row: row['val_acc'])
    for axes, what, name in zip(figure.subplots(1, 2), ('acc', 'loss'), ('accuracy', 'mean cross-entropy per image')):
        for split, label in (('train', 'training'), ('val', 'validation')):
            axes.plot(epochs, [row[f'{split}_{what}'] for row in history], marker='.', label=label)
        axes.axvline(best['epoch'], color='grey', linestyle=':', label=f'best: epoch {best["epoch"]}, {best[f"val_{what}"]:.3f}')
        axes.plot(best['epoch'], best[f'val_{what}'], 'o', color='C1')
        axes.set(title=name, xlabel='epoch', xlim=(0, epochs[-1] + 1), ylim=(0, 1.02 if what == 'acc' else None))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=.3)
        axes.legend()
    return figure


def draw_confusion(counts):
    """confusion.png from counts (11, 11): a row for each true class, a column for each predicted one."""
    figure = new_figure(9, 8.5)
    axes = figure.subplots()
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    axes.imshow(shares, 'Blues', vmin=0, vmax=1)
    middle = {'ha': 'center', 'va': 'center', 'fontsize': 8}
    for true, predicted in zip(*np.nonzero(counts)):
        share = shares[true, predicted]
        axes.text(predicted, true, f'{counts[true, predicted]}\n{share:.0%}', color='white' if share > .5 else 'black', **middle)
    for true in np.flatnonzero(counts.sum(1) == 0):
        axes.text(len(CLASSES) / 2 - .5, true, 'no images of this class', color='grey', **middle)
    axes.set_xticks(range(len(CLASSES)), CLASSES, rotation=45, ha='right')
    axes.set_yticks(range(len(CLASSES)), CLASSES)
    axes.set(xlabel='predicted', ylabel='true',
             title=f'{np.trace(counts) / counts.sum():.1%} of the validation images are right')
    return figure


def draw_grid(images, titles, columns, title):
    """Images, uint8 or float (N, 128, 128, 3), BGR, in rows of `columns` under their titles."""
    rows = max(1, math.ceil(len(images) / columns))
    figure = new_figure(1.5 * columns, 2 * rows + .5)
    figure.suptitle(title)
    for i, axes in enumerate(figure.subplots(rows, columns).flat):
        axes.set_axis_off()
        if i < len(images):
            axes.imshow(images[i][..., ::-1])  # OpenCV's BGR as RGB
            axes.set_title(titles[i], fontsize=8)
    return figure


def report(model, val_x, val_y, device, out, amp=True):
    """What the run's best weights make of the validation images: a table, confusion.png and mistakes.png."""
    load(out / 'best.pt', device, model)
    with mixed_precision(device, amp)[0]:  # as they were evaluated
        chances = probabilities(model, val_x, device)
    predicted = chances.argmax(1)
    counts = np.zeros((len(CLASSES), len(CLASSES)), int)
    np.add.at(counts, (val_y, predicted), 1)
    print(f'{"with the best weights":<22} {"images":>6} {"right":>6} {"accuracy":>8}')
    for label, name in enumerate(CLASSES):
        images, right = counts[label].sum(), counts[label, label]
        print(f'{label:>2} {name:<19} {images:>6} {right:>6} ' + (f'{right / images:>8.1%}' if images else f'{"-":>8}'))
    print(f'{"in all":<22} {counts.sum():>6} {np.trace(counts):>6} {np.trace(counts) / counts.sum():>8.1%}', flush=True)
    write(out / 'confusion.png', draw_confusion(counts).savefig)
    wrong = np.flatnonzero(predicted != val_y)
    wrong = wrong[np.argsort(-chances[wrong].max(1), kind='stable')][:24]
    titles = [f'{CLASSES[val_y[i]]}\ntaken for\n{CLASSES[predicted[i]]} {chances[i].max():.0%}' for i in wrong]
    title = 'the surest wrong answers on the validation images' if len(wrong) else 'no wrong answer on the validation images'
    write(out / 'mistakes.png', draw_grid(val_x[wrong], titles, 8, title).savefig)


def dream(model, device, steps=100):
    """Gradient ascent on the input (section 1.2): for each class i an image x for which y_i - c * sum |x| is large
    (formula 1.2.2; with c = 0 it is 1.2.1), as float (11, 128, 128, 3), BGR in 0..1, and its probability y_i."""
    model.eval().requires_grad_(False)
    torch.manual_seed(0)
    classes = torch.arange(len(CLASSES), device=device)
    x = (.4 + .1 * torch.rand(len(CLASSES), 3, 128, 128)).to(device).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=.05)
    for step in tqdm(range(steps), 'dreaming', leave=False, disable=None):
        optimizer.zero_grad()
        shift = torch.randint(-8, 9, (2,)).tolist()  # pixels; what must do in many places is a shape and no speckle
        y = model(x.roll(shift, (2, 3))).log_softmax(1)[classes, classes]  # log y_i: largest where y_i is, never flat
        (1e-4 * x.abs().sum() - y.sum()).backward()
        optimizer.step()
        with torch.no_grad():
            if step % 4 == 0 and step < steps - 10:
                x.copy_(nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False))  # smooths out the speckle left
            x.clamp_(0, 1)  # a picture still
    with torch.no_grad():
        y = model(x).softmax(1)[classes, classes]
    return x.detach().permute(0, 2, 3, 1).cpu().numpy(), y.cpu().numpy()


# ---------------------------------------------------------------------- using a run

@torch.no_grad()
def probabilities(model, x, device):
    """Softmax probabilities (N, 11) of images `x`, uint8 (N, 128, 128, 3), BGR."""
    model.eval()
    chances = [np.zeros((0, len(CLASSES)), np.float32)]
    for i in range(0, len(x), 256):
        batch = to_device(torch.from_numpy(x[i:i + 256]), device)
        chances.append(model(batch).float().softmax(1).cpu().numpy())
    return np.concatenate(chances)


def predict(paths, model, device, out):
    """Prints the three likeliest classes of each photograph in `paths`; for a folder, writes predict.csv into `out` as
    the course's Kaggle page takes it. Returns how many photographs could not be read; stderr names each of them."""
    if sum(map(os.path.isdir, paths)) > 1:
        raise UserError('--predict takes one folder at a time: predict.csv is one table')
    unreadable = 0
    for path in map(Path, paths):
        try:
            files = list_images(path) if path.is_dir() else [path]
        except UserError as error:
            print(error, file=sys.stderr)
            unreadable += 1
            continue
        x, problems = read_images(files)
        for file, reason in sorted(problems.items()):
            print(f'{file}: {reason}', file=sys.stderr)
        unreadable += len(problems)
        read = [i for i, file in enumerate(files) if file not in problems]
        chances = probabilities(model, x[read], device)
        if path.is_dir():
            labels = chances.argmax(1)
            write_text(out / 'predict.csv', ''.join(['Id,Category\n', *(f'{i},{label}\n' for i, label in zip(read, labels))]))
            counts = ', '.join(f'{np.sum(labels == label)} {CLASSES[label]}' for label in np.unique(labels))
            print(f'{path}: {len(read)} of {len(files)} photographs predicted ({counts}) in {out / "predict.csv"}')
        elif read:
            likeliest = chances[0].argsort()[:-4:-1]
            print(f'{path}: ' + ', '.join(f'{CLASSES[label]} {chances[0, label]:.1%}' for label in likeliest))
    return unreadable


# ---------------------------------------------------------------------- the script

def number(kind, low, high):
    """An argparse type: a number of `kind` within low..high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f'{text} is not in {low}..{high}')
        return value
    parse.__name__ = kind.__name__
    return parse


def settings_for(args):
    """The settings to train with: the given ones, else those of the run that is resumed, else the defaults; and the
    settings that this run was started with. Raises UserError if the two do not fit, or --out holds a run to keep."""
    defaults = {'data_dir': data_dir, 'epochs': num_epoch, 'batch_size': batch_size, 'lr': learning_rate, 'seed': 0, 'amp': True}
    defaults |= DEMO | {'data_dir': demo_dir} if args.demo else {}
    earlier = {}
    if args.out and any(Path(args.out, name).exists() for name in FILES):
        if not args.resume:
            raise UserError(f'{args.out} already holds a run: continue it with --resume, or choose another --out')
        try:
            earlier = {'amp': True} | json.loads(Path(args.out, 'settings.json').read_text(encoding='utf-8'))
            earlier = {name: type(default)(earlier[name]) for name, default in {**defaults, 'data': 0}.items()}
        except (OSError, ValueError, LookupError, TypeError):
            raise UserError(f'{args.out} holds a run, but its settings.json is missing or damaged') from None
    given = {name: value for name, value in vars(args).items() if name in defaults and value is not None}
    settings = defaults | earlier | given
    other = [f'--{name.replace("_", "-")} {settings[name]} (it has {earlier[name]})'
             for name in ('batch_size', 'lr', 'seed') if earlier and settings[name] != earlier[name]]
    if other:
        raise UserError(f'{args.out} cannot go on with {", ".join(other)}: leave that out, or start another run')
    return settings, earlier


def next_free_folder():
    """Makes and returns the first of runs/001, runs/002, ... that there is not yet."""
    os.makedirs('runs', exist_ok=True)
    for n in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            os.mkdir(f'runs/{n:03}')
            return Path(f'runs/{n:03}')


def begin(out, settings, history):
    """Makes the folder of a run, or makes it ready to go on after the epochs in `history`."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ('mistakes.png', *(f'{name}.tmp' for name in FILES)):  # leftovers; mistakes.png, the last, means finished
        (out / name).unlink(missing_ok=True)
    write_text(out / 'settings.json', json.dumps(settings, indent=1) + '\n')
    if history:
        write_history(out, history)  # a run killed right after last.pt lacks its last lines


def start_training(args):
    """What the script does without --predict and --dreams."""
    device, (rank, world) = pick_device(args.device), process()
    join_processes(device)
    settings, earlier = of_first(settings_for(args) if rank == 0 else None)
    if settings['batch_size'] % world:
        raise UserError(f'{world} processes cannot share batches of {settings["batch_size"]} evenly: give another --batch-size, '
                        'or torchrun another --nproc-per-node')
    if device.type == 'cpu':
        keep_memory(settings['batch_size'])
    torch.manual_seed(settings['seed'])
    torch.backends.cudnn.benchmark = True  # cuDNN tries its ways to compute a convolution, and keeps the fastest
    model = Classifier().to(device, memory_format=torch.channels_last)  # the layout that convolutions are fastest in
    if world > 1 and device.type == 'cuda':
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # which takes mean and variance of the processes' batches together
    optimizer = torch.optim.Adam(model.parameters(), lr=settings['lr'], fused=device.type == 'cuda')
    history, out = [], args.out and Path(args.out)
    if rank == 0 and earlier and (out / 'last.pt').exists():
        load(out / 'best.pt', device, model)  # whether it can be read shows now, not after the last epoch
        history = load(out / 'last.pt', device, model, optimizer)
    history, finished = of_first((history, len(history) >= settings['epochs'] and (out / 'mistakes.png').exists()))
    if finished:
        print(f'{out} is finished: it has its {len(history)} epochs', file=sys.stderr)
        return
    if history and world > 1:
        optimizer.load_state_dict(of_first(optimizer.state_dict()))

    if args.demo:
        if int(os.environ.get('LOCAL_RANK', 0)) == 0:
            draw_food11(demo_dir)
        if world > 1:
            distributed.barrier()
    train_x, train_y, val_x, val_y = read_food11(settings['data_dir'])
    settings['data'] = 0
    for array in (train_x, train_y, val_x, val_y):
        settings['data'] = zlib.crc32(array, settings['data'])
    if of_first(settings['data']) != settings['data']:
        raise UserError(f'process {rank}: {settings["data_dir"]} holds other photographs than that of process 0')
    if earlier and settings['data'] != earlier['data']:
        raise UserError(f'{out} cannot go on with --data-dir {settings["data_dir"]}: it was trained on other photographs')
    if 0 < len(train_x) % settings['batch_size'] < world:
        raise UserError(f'the last batch has only {len(train_x) % settings["batch_size"]} images for {world} processes: '
                        'give another --batch-size')
    out = of_first(out or next_free_folder() if rank == 0 else None)
    if rank == 0:
        begin(out, settings, history)
    about = (f' ({torch.cuda.get_device_name(device)})' if device.type == 'cuda' else
             ' (PyTorch finds no GPU: see "GPU" in README.md)' if device.type == 'cpu' and args.device is None else '')
    about += f' in {world} processes' if world > 1 else ''
    print(f'{len(train_x)} training and {len(val_x)} validation images, on {device}{about}, into {out}', file=sys.stderr)
    if history:
        print(f'resumed from epoch {len(history)}', file=sys.stderr)

    train_transform, test_transform = book_transforms()
    train_set = ImgDataset(train_x, train_y, train_transform)
    val_set = ImgDataset(val_x[rank::world], val_y[rank::world], test_transform)
    workers = default_workers(device, train_set, settings['batch_size']) if args.workers is None else args.workers
    if workers and not (forks() or train_set.x.is_shared()):
        raise UserError('too little shared memory for processes that prepare batches: give --workers 0, or docker --shm-size 2g')
    train_loader, val_loader = make_loaders(train_set, val_set, settings['batch_size'], workers, rank, world,
                                            pin_memory=device.type == 'cuda')
    if device.type != 'cpu':
        val_loader = [(x.to(device), y.to(device)) for x, y in val_loader]  # the same every epoch: it stays there
    try:
        train(model, optimizer, train_loader, val_loader, settings['epochs'], device, settings['seed'], out, history,
              settings['amp'])
        if rank == 0:
            report(model, val_x, val_y, device, out, settings['amp'])
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f'interrupted: {saved_state(out)}; continue with '
                                f'python chapter2_2_train.py --out "{out}" --resume') from None
    except RuntimeError as error:
        if 'tried to allocate' in str(error).lower():
            raise UserError(f'{device} has too little memory for batches of {settings["batch_size"]}: '
                            'try --batch-size 64, or less') from None
        if 'DataLoader worker' in str(error):
            raise UserError('a process that prepares batches has failed, perhaps for lack of memory, or of shared memory (docker '
                            f'--shm-size): {saved_state(out)}; continue with --resume, with --workers 0 if need be') from None
        raise


def use_run(args):
    """--dreams and --predict, with the best weights of the run in --out."""
    device, out = pick_device(args.device), Path(args.out)
    model = Classifier().to(device, memory_format=torch.channels_last)
    load(out / 'best.pt', device, model)
    if args.dreams:
        images, chances = dream(model, device)
        titles = [f'{name}\n{chance:.1%}' for name, chance in zip(CLASSES, chances)]
        write(out / 'dreams.png', draw_grid(images, titles, 6, 'what the network takes for ...').savefig)
        print(f'picture written to {out / "dreams.png"}')
    if args.predict and predict(args.predict, model, device, out):
        sys.exit(1)


def main():
    parser = argparse.ArgumentParser(usage='%(prog)s [options]', description="Trains the book's network on food-11.")
    add_data_arguments(parser)
    parser.add_argument('--epochs', type=number(int, 1, 10**9), metavar='N',
                        help=f'passes over the training images (default: {num_epoch}; with --demo {DEMO["epochs"]})')
    parser.add_argument('--batch-size', type=number(int, 1, 10**9), metavar='N',
                        help=f'images a step (default: {batch_size}; with --demo {DEMO["batch_size"]})')
    parser.add_argument('--lr', type=number(float, 0, 1), metavar='X',
                        help=f"Adam's learning rate (default: {learning_rate}; with --demo {DEMO['lr']})")
    parser.add_argument('--seed', type=number(int, 0, 2**32 - 1), metavar='N',
                        help='the same seed gives the same numbers again on the CPU (default: 0)')
    parser.add_argument('--workers', type=number(int, 0, 1000), metavar='N',
                        help='processes that prepare batches; 0: the main process does (default: one a core, but for one '
                        'core, up to 16; on the CPU 0)')
    parser.add_argument('--no-amp', dest='amp', action='store_const', const=False,
                        help='compute in full precision (default: in bfloat16 or float16 where the hardware is faster in it)')
    parser.add_argument('--device', metavar='NAME', help='cuda, cuda:1, mps, xpu, cpu (default: CUDA if there is one, '
                        'else another accelerator, else the CPU)')
    parser.add_argument('--out', metavar='DIR', help="the run's folder (default: the next free one of runs/001, runs/002, ...)")
    parser.add_argument('--resume', action='store_true',
                        help='continue the run in --out from its last checkpoint, or start it if there is none')
    parser.add_argument('--predict', nargs='+', metavar='PATH',
                        help='say what the run in --out takes photographs for; for a folder, in predict.csv')
    parser.add_argument('--dreams', action='store_true', help='draw what each class looks like to the run in --out')
    parser.set_defaults(data_dir=None)  # so that a resumed run finds its own
    args = parser.parse_args()
    if not args.out and (args.resume or args.predict or args.dreams):
        parser.error('--resume, --predict and --dreams need the folder of a run: --out DIR')
    if args.predict or args.dreams:
        return use_run(args) if process()[0] == 0 else None
    try:
        start_training(args)
    except RuntimeError as error:
        if process()[1] == 1 or not ('gloo' in str(error) or isinstance(error, distributed.DistError)):
            raise
        raise UserError('another process of this run has ended, and so does this one; continue with --out and --resume') from None
    if process()[1] > 1:
        distributed.destroy_process_group()


if __name__ == '__main__':
    run(main)
