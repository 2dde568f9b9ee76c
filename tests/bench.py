"""How fast the scripts are, as ratios of two things measured in turn in one run; needs no photographs.

    python tests/bench.py                  under 5 minutes on 2 cores
    python tests/bench.py --quick          under one, and rougher
    python tests/bench.py --device cuda    a GPU, and 100 epochs against the clock
"""
import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

import chapter2_1_data as data  # noqa: E402
import chapter2_2_train as train  # noqa: E402

# Prints the memory of a process and of the workers that prepare its batches, in bytes, shared pages counted once.
MEMORY = f'''
import glob, multiprocessing, os, sys
sys.path.insert(0, {str(ROOT)!r})
if __name__ == '__main__':
    multiprocessing.set_start_method(sys.argv[1])
    import chapter2_1_data as data
    x = data.empty_images(int(sys.argv[3]))
    x[:] = 1
    train_set = data.ImgDataset(x, x[:, 0, 0, 0], data.train_transform)
    loader, _ = data.make_loaders(train_set, train_set, workers=int(sys.argv[2]))
    for _ in zip(range(3 * int(sys.argv[2])), loader):
        pass
    processes = [os.getpid(), *(worker.pid for worker in loader._iterator._workers)]
    print(sum(int(open(f'/proc/{{pid}}/smaps_rollup').read().split('Pss:')[1].split()[0]) for pid in processes) * 1024)
'''


def fastest(rounds, unit, **ways):
    """Runs each way once a round, in turn, every second round in reverse. A way returns the number of things it has done;
    the result is things a second in each way's fastest round."""
    rates = dict.fromkeys(ways, 0)
    for i in range(rounds):
        for name, way in list(ways.items())[::-1 if i % 2 else 1]:
            start = time.perf_counter()
            done = way()
            rates[name] = max(rates[name], done / (time.perf_counter() - start))
    print('   ', ', '.join(f'{name} {rate:.0f} {unit}/s' if rate > 99 else f'{name} {rate:.1f} {unit}/s'
                           for name, rate in rates.items()), flush=True)
    return rates


def row(what, against, ratio, wanted, most=False):
    good = ratio <= wanted if most else ratio >= wanted
    print(f'{what:<44} | {against:<42} | {ratio:>5.2f} | {"at most" if most else "at least"} {wanted}{"" if good else "  MISSED"}', flush=True)


def book_epoch(model, train_loader, loss, optimizer, device):
    """The book's loop, as plain as it stands there."""
    model.train()
    correct, loss_sum, images = 0, 0., 0
    for x, y in train_loader:
        optimizer.zero_grad()
        train_pred = model(x.to(device))
        batch_loss = loss(train_pred, y.to(device))
        batch_loss.backward()
        optimizer.step()
        correct += (train_pred.argmax(1) == y.to(device)).sum().item()
        loss_sum += batch_loss.item()
        images += len(y)
    return images


def start_book(count, batch_size, device):
    """In a process of its own, as the settings of ours hold for a whole process."""
    global book
    model = train.Classifier().to(device)
    loader = DataLoader(noise(count), batch_size=batch_size, shuffle=True)
    book = model, loader, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), lr=.001), device


def run_book():
    return book_epoch(*book)


def noise(count):
    """An ImgDataset of so many images."""
    x = data.empty_images(count)
    x[:] = np.random.default_rng(0).integers(0, 256, x.shape, np.uint8)
    return data.ImgDataset(x, np.arange(count) % 11, data.train_transform)


def reading(rounds, count):
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for i in range(count):
            dish = cv2.resize(data.draw_dish(i % 11, rng), (512, 384 + i % 3 * 64), interpolation=cv2.INTER_CUBIC)
            Path(folder, f'{i % 11}_{i}.jpg').write_bytes(cv2.imencode('.jpg', dish)[1].tobytes())

        def one_core():
            cv2.setNumThreads(1)
            for file in sorted(os.listdir(folder)):
                cv2.resize(cv2.imread(os.path.join(folder, file)), (128, 128))
            cv2.setNumThreads(-1)
            return count

        rates = fastest(rounds, 'images', one_core=one_core, readfile=lambda: len(data.readfile(folder)[0]))
    row('readfile', 'one core reading and resizing', rates['readfile'] / rates['one_core'], 1.8)


def loading(rounds, train_set):
    book = DataLoader(train_set, batch_size=128, shuffle=True)
    ours, _ = data.make_loaders(train_set, train_set, 128, workers=2)
    next(iter(ours))  # its processes have started
    rates = fastest(rounds, 'images', book=lambda: sum(len(y) for _, y in book), ours=lambda: sum(len(y) for _, y in ours))
    row('loader alone, 2 workers', "the book's loader, main process", rates['ours'] / rates['book'], 1.8)


def training(rounds, count, batch_size, device, amp, least):
    """An epoch of ours against the book's, and against the same steps on one batch that lies on the device."""
    train_set, loss = noise(count), nn.CrossEntropyLoss()
    model = train.Classifier().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=.001, fused=device.type == 'cuda')
    workers = train.default_workers(device, train_set, batch_size)
    train_loader, _ = data.make_loaders(train_set, train_set, batch_size, workers, pin_memory=device.type == 'cuda')
    autocast, scaler = train.mixed_precision(device, amp)
    x, y = next(iter(train_loader))
    resident = [(x.to(device), y.to(device))] * (count // batch_size)

    def ours(batches):
        train.train_epoch(model, batches, loss, optimizer, device, autocast, scaler)
        return count if batches is train_loader else len(resident) * batch_size

    with ProcessPoolExecutor(1, get_context('spawn'), start_book, (count, batch_size, device)) as book_process:
        book_process.submit(run_book).result()  # the first time of all three does not count: cuDNN chooses, memory grows
        ours(train_loader)
        ours(resident)
        rates = fastest(rounds, 'images', book=lambda: book_process.submit(run_book).result(),
                        ours=lambda: ours(train_loader), limit=lambda: ours(resident))
    kind = f'training epoch, {device.type}, ' + ('mixed precision' if amp else 'full precision')
    row(kind, "the book's loop, full precision", rates['ours'] / rates['book'], least)
    row(kind, 'the same steps on a batch on the device', rates['ours'] / rates['limit'], .95 if device.type == 'cpu' else .9)


def memory(method, workers, images):
    """What `images` more images add to the memory of all processes, in sizes of their array."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, 'memory.py')
        script.write_text(MEMORY)
        few, many = (int(subprocess.run([sys.executable, '-W', 'ignore', script, method, str(workers), str(n)], check=True,
                                        stdout=subprocess.PIPE).stdout) for n in (128, 128 + images))
    print(f'    {few / 2**20:.0f} MiB with 128 images, {many / 2**20:.0f} MiB with {images} more', flush=True)
    row(f'memory of a loader with {workers} workers, {method}', 'the size of the arrays', (many - few) / (images * 3 * 128**2), 1.2, most=True)


def hundred_epochs(train_set, val_set, device):
    train_loader, val_loader = data.make_loaders(train_set, val_set, 128, train.default_workers(device, train_set, 128), pin_memory=True)
    model = train.Classifier().to(device, memory_format=torch.channels_last)
    start = time.perf_counter()
    val_loader = [(x.to(device), y.to(device)) for x, y in val_loader]
    with tempfile.TemporaryDirectory() as out:
        train.train(model, torch.optim.Adam(model.parameters(), fused=True), train_loader, val_loader, 100, device, 0, Path(out), [])
    row(f'100 epochs of {len(train_set)} + {len(val_set)} images', 'seconds', time.perf_counter() - start, 60, most=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--device', metavar='NAME', help='as in chapter2_2_train.py (default: the best there is)')
    parser.add_argument('--quick', action='store_true', help='smaller batches, one round')
    args = parser.parse_args()
    warnings.filterwarnings('ignore', category=DeprecationWarning)  # of fork, in Python 3.12 and 3.13
    device = train.pick_device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.processor() or platform.machine()
    print(f'{device} ({name}), {train.cores()} cores, Python {platform.python_version()}, PyTorch {torch.__version__}, '
          f'{platform.system()}{", quick" if args.quick else ""}')
    rounds = 1 if args.quick else 3

    torch.backends.cudnn.benchmark = True
    reading(2 * rounds, 100 if args.quick else 300)
    loading(2 * rounds, noise(1024 if args.quick else 3072))
    if device.type == 'cpu':
        batch_size = 16 if args.quick else 64
        train.keep_memory(batch_size)
        if isinstance(train.mixed_precision(device)[0], torch.autocast):
            training(rounds, 2 * batch_size, batch_size, device, True, 3)
        else:
            print('    no bfloat16 units in this CPU: mixed precision is off')
        training(rounds, 2 * batch_size, batch_size, device, False, 1.2)
    else:
        count = 2048 if args.quick else 9866
        training(rounds, count, 128, device, True, 5)
        training(rounds, count, 128, device, False, 1.2)
        if device.type == 'cuda' and not args.quick:
            hundred_epochs(noise(9866), noise(3430), device)
    if platform.system() == 'Linux':
        for method in ('spawn',) if args.quick else ('fork', 'forkserver', 'spawn'):
            memory(method, 2 if args.quick else 8, 2048 if args.quick else 9866)


if __name__ == '__main__':
    main()
