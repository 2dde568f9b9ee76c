"""How fast the scripts are, as ratios of two things measured in turn in one run.

    python tests/bench.py                  under 5 minutes on 2 cores; needs no photographs
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
from tests.fake_food11 import draw_dish  # noqa: E402

# Prints the memory of a process and of the workers that prepare its batches, in bytes, shared
# pages counted once.
MEMORY = f'''
import sys
sys.path.insert(0, {str(ROOT)!r})
if __name__ == '__main__':
    import os
    import numpy as np
    import chapter2_1_data as data
    method, workers, images = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    x = np.ones((images, 128, 128, 3), np.uint8)
    train_set = data.ImgDataset(x, x[:, 0, 0, 0], data.train_transform)
    loader, _ = data.make_loaders(train_set, train_set, 128, workers)
    loader.multiprocessing_context = method
    batches = 0
    while batches < 10 * workers:  # by then Python's garbage collector has touched all it has
        batches += sum(1 for _ in loader)
    memory = 0
    for pid in [os.getpid(), *(worker.pid for worker in loader._iterator._workers)]:
        for line in open(f'/proc/{{pid}}/smaps_rollup'):
            if line.startswith('Pss:'):
                memory += int(line.split()[1]) * 1024
    print(memory, flush=True)
    loader._iterator._shutdown_workers()
'''


def fastest(rounds, unit, **ways):
    """Runs each way once a round, in turn, every second round in reverse. A way returns the number
    of things it has done; the result is things a second in each way's fastest round."""
    rates = dict.fromkeys(ways, 0)
    for i in range(rounds):
        names = list(ways)
        if i % 2:
            names.reverse()
        for name in names:
            start = time.perf_counter()
            done = ways[name]()
            rates[name] = max(rates[name], done / (time.perf_counter() - start))
    print('   ', ', '.join(f'{name} {rate:.4g} {unit}/s' for name, rate in rates.items()),
          flush=True)
    return rates


def row(what, against, ratio, wanted, at_most=False):
    missed = ratio > wanted if at_most else ratio < wanted
    limit = f'at {"most" if at_most else "least"} {wanted}{"  MISSED" if missed else ""}'
    print(f'{what:<46} | {against:<40} | {ratio:>5.2f} | {limit}', flush=True)


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
    """In a process of its own, as our settings hold for a whole process."""
    global book
    model = train.Classifier().to(device)
    loader = DataLoader(noise(count), batch_size=batch_size, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=.001)
    book = model, loader, nn.CrossEntropyLoss(), optimizer, device


def run_book():
    return book_epoch(*book)


def noise(count):
    """An ImgDataset of as many images."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (count, data.image_size, data.image_size, 3), np.uint8)
    return data.ImgDataset(x, np.arange(count) % 11, data.train_transform)


def reading(rounds, count):
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for i in range(count):
            size = (512, 384 + i % 3 * 64)
            dish = cv2.resize(draw_dish(i % 11, rng), size, interpolation=cv2.INTER_CUBIC)
            jpeg = cv2.imencode('.jpg', dish)[1].tobytes()
            Path(folder, f'{i % 11}_{i}.jpg').write_bytes(jpeg)

        def one_core():
            cv2.setNumThreads(1)
            for file in sorted(os.listdir(folder)):
                cv2.resize(cv2.imread(os.path.join(folder, file)), (128, 128))
            cv2.setNumThreads(-1)
            return count

        rates = fastest(rounds, 'images', one_core=one_core,
                        readfile=lambda: len(data.readfile(folder)[0]))
    row('readfile', 'one core reading and resizing', rates['readfile'] / rates['one_core'], 1.6)


def loading(rounds, train_set):
    book_loader = DataLoader(train_set, batch_size=128, shuffle=True)
    ours, _ = data.make_loaders(noise(len(train_set)), train_set, 128, workers=2)
    data.set_epoch(ours, 1)
    next(iter(ours))  # its processes have started
    rates = fastest(rounds, 'images', book=lambda: sum(len(y) for _, y in book_loader),
                    ours=lambda: sum(len(y) for _, y in ours))
    row('loader alone, 2 workers', "the book's loader, main process",
        rates['ours'] / rates['book'], 1.8)


def our_training(count, batch_size, device, no_amp):
    """What train_epoch takes, as main makes it; the photographs are noise."""
    train_set = noise(count)
    model = train.make_model(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=.001, fused=device.type == 'cuda')
    workers = train.choose_workers(None, device, batch_size, rank=0)
    train_loader, _ = data.make_loaders(train_set, train_set, batch_size, workers,
                                        pin_memory=device.type == 'cuda')
    data.set_epoch(train_loader, 1)
    autocast, scaler = train.mixed_precision(device, no_amp)
    return train_loader, (model, nn.CrossEntropyLoss(), optimizer, device, autocast, scaler)


def training(rounds, count, batch_size, device, no_amp, least):
    """An epoch of ours against the book's, and against the same steps on one batch that lies on
    the device."""
    train_loader, (model, *others) = our_training(count, batch_size, device, no_amp)
    x, y = next(iter(train_loader))
    resident = [(x.to(device), y.to(device))] * (count // batch_size)

    def ours(batches):
        train.train_epoch(model, batches, *others)
        return count if batches is train_loader else len(resident) * batch_size

    with ProcessPoolExecutor(1, get_context('spawn'), start_book,
                             (count, batch_size, device)) as book_process:
        # The first time does not count: cuDNN chooses its algorithms, memory grows.
        book_process.submit(run_book).result()
        ours(train_loader)
        ours(resident)
        rates = fastest(rounds, 'images', book=lambda: book_process.submit(run_book).result(),
                        ours=lambda: ours(train_loader), limit=lambda: ours(resident))
    kind = f'training, {device.type}, {"full" if no_amp else "mixed"} precision'
    row(kind, "the book's loop, full precision", rates['ours'] / rates['book'], least)
    row(kind, 'the same steps on a batch on the device', rates['ours'] / rates['limit'],
        .95 if device.type == 'cpu' else .9)


def memory(method, workers, images):
    """What `images` more images add to the memory of all processes, in sizes of their array. The
    main process has one array of its own, and shares another with the workers unless they are
    forked."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, 'memory.py')
        script.write_text(MEMORY)
        few, many = (int(subprocess.run([sys.executable, '-W', 'ignore', script, method,
                                         str(workers), str(n)],
                                        check=True, stdout=subprocess.PIPE).stdout)
                     for n in (1024, 1024 + images))
    print(f'    {few / 2**20:.0f} MiB with 1024 images, {many / 2**20:.0f} MiB with {images} more',
          flush=True)
    row(f'memory of a loader with {workers} workers, {method}', 'the size of the images',
        (many - few) / (images * 3 * 128**2), 1.2 if method == 'fork' else 2.2, at_most=True)


def hundred_epochs(device):
    """The whole script on noise, saving and pictures included."""
    with tempfile.TemporaryDirectory() as folder:
        for split, count in (('training', 9866), ('validation', 3430)):
            Path(folder, split).mkdir()
            x = noise(count).x.numpy()
            for i, image in enumerate(x):
                cv2.imwrite(str(Path(folder, split, f'{i % 11}_{i}.bmp')), image)
        start = time.perf_counter()
        subprocess.run([sys.executable, ROOT / 'chapter2_2_train.py', '--data-dir', folder,
                        '--device', device.type, '--out', Path(folder, 'run')], check=True,
                       stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
    row('100 epochs of 9866 + 3430 images', 'seconds', seconds, 60, at_most=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--device', metavar='NAME',
                        help='as in chapter2_2_train.py (default: a GPU if PyTorch finds one)')
    parser.add_argument('--quick', action='store_true', help='smaller batches, one round')
    args = parser.parse_args()
    warnings.filterwarnings('ignore', category=DeprecationWarning)  # of fork, since Python 3.12
    device = train.pick_device(args.device)
    name = platform.processor() or platform.machine()
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    print(f'{device} ({name}), {train.available_cores()} cores, Python '
          f'{platform.python_version()}, PyTorch {torch.__version__}, {platform.system()}'
          f'{", quick" if args.quick else ""}')
    rounds = 1 if args.quick else 3

    reading(2 * rounds, 100 if args.quick else 300)
    loading(2 * rounds, noise(1024 if args.quick else 3072))
    if device.type == 'cpu':
        batch_size = 16 if args.quick else 64
        train.tune_pytorch(device, batch_size)
        if train.fastest_dtype(device, no_amp=False) == torch.bfloat16:
            training(rounds, 2 * batch_size, batch_size, device, False, 3)
        else:
            print('    this CPU has no bfloat16 support: mixed precision is off')
        training(rounds, 2 * batch_size, batch_size, device, True, 1.2)
    else:
        train.tune_pytorch(device, 128)
        count = 2048 if args.quick else 9866
        training(rounds, count, 128, device, False, 5)
        training(rounds, count, 128, device, True, 1.2)
        if device.type == 'cuda' and not args.quick:
            hundred_epochs(device)
    if platform.system() == 'Linux':
        for method in ('spawn',) if args.quick else ('fork', 'forkserver', 'spawn'):
            memory(method, 2 if args.quick else 8, 2048 if args.quick else 9866)


if __name__ == '__main__':
    main()
