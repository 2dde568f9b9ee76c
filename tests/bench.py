"""How fast the scripts are, as ratios of two things measured in turn in one run.

    python tests/bench.py                  some minutes on 2 cores; needs no photographs
    python tests/bench.py --quick          under two, and rougher
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
from torchvision import transforms  # noqa: E402

import chapter2_1_data as data  # noqa: E402
import chapter2_2_train as train  # noqa: E402
from tests.fake_food11 import draw_dish  # noqa: E402

book_transform = transforms.Compose([
    transforms.ToPILImage(),
    transforms.RandomHorizontalFlip(),
    transforms.RandomRotation(15),
    transforms.ToTensor(),
])

# Prints the memory of a process and of the workers that prepare its batches, in bytes, shared
# pages counted once.
MEMORY = f'''
import sys
sys.path.insert(0, {str(ROOT)!r})
if __name__ == '__main__':
    import os
    import numpy as np
    from torch.utils.data import DataLoader
    import chapter2_1_data as data
    method, workers, images = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    x = np.ones((images, 128, 128, 3), np.uint8)
    train_set = data.ImgDataset(x, x[:, 0, 0, 0], data.train_transform)
    loader = DataLoader(train_set, 128, shuffle=True, num_workers=workers, persistent_workers=True,
                        multiprocessing_context=method)
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


def noise(count, transform):
    """An ImgDataset of as many images."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (count, data.image_size, data.image_size, 3), np.uint8)
    return data.ImgDataset(x, np.arange(count) % 11, transform)


# ---- Training: each way in a process of its own, as some settings hold for a whole process ----

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
    global run
    model = train.Classifier().to(device)
    loader = DataLoader(noise(count, book_transform), batch_size=batch_size, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=.001)

    def run():
        return book_epoch(model, loader, nn.CrossEntropyLoss(), optimizer, device)


def start_ours(count, batch_size, device, no_amp, on_device):
    """As main does it; on_device: the same steps, on one batch that lies on the device."""
    global run
    os.environ['THP_MEM_ALLOC_ENABLE'] = '1'
    torch.backends.cudnn.benchmark = True
    model = train.make_model(11, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=.001, fused=True)
    loss = nn.CrossEntropyLoss().to(device)
    autocast, scaler = train.mixed_precision(device, train.pick_precision(device, no_amp))
    workers = train.pick_workers(None, device)
    loader = DataLoader(noise(count, data.train_transform), batch_size=batch_size, shuffle=True,
                        num_workers=workers, pin_memory=device.type == 'cuda',
                        persistent_workers=workers > 0)
    if on_device:
        x, y = next(iter(loader))
        loader = [(x.to(device), y.to(device))] * (count // batch_size)

    def run():
        train.train_epoch(model, loader, loss, optimizer, autocast, scaler)
        return len(loader) * batch_size


def call_run():
    return run()


def peak_memory():
    """The most memory that this process has had, in MiB, on Linux."""
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def training(rounds, count, batch_size, device, no_amp, least):
    """An epoch of ours against the book's, and against the same steps without a loader."""
    settings = (count, batch_size, device)
    starts = {'book': (start_book, settings), 'ours': (start_ours, (*settings, no_amp, False)),
              'limit': (start_ours, (*settings, no_amp, True))}
    processes = {name: ProcessPoolExecutor(1, get_context('spawn'), start, arguments)
                 for name, (start, arguments) in starts.items()}
    ways = {name: lambda process=process: process.submit(call_run).result()
            for name, process in processes.items()}
    for way in ways.values():
        way()  # the first time does not count: cuDNN chooses its algorithms, memory grows
    rates = fastest(rounds, 'images', **ways)
    kind = f'training, {device.type}, {"full" if no_amp else "mixed"} precision'
    row(kind, "the book's loop, full precision", rates['ours'] / rates['book'], least)
    row(kind, 'the same steps on a batch on the device', rates['ours'] / rates['limit'],
        .95 if device.type == 'cpu' else .9)
    if platform.system() == 'Linux' and device.type == 'cpu':
        book, ours = (processes[name].submit(peak_memory).result() for name in ('book', 'ours'))
        print(f"    memory: book {book:.0f} MiB, ours {ours:.0f} MiB")
        row(f'{kind}, memory', "the book's loop", ours / book, 1.05, at_most=True)
    for process in processes.values():
        process.shutdown()


# ---- Reading, loading, the whole ---------------------------------------------------------------

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


def loading(rounds, count):
    book = DataLoader(noise(count, book_transform), batch_size=128, shuffle=True)
    ours = DataLoader(noise(count, data.train_transform), batch_size=128, shuffle=True,
                      num_workers=2, persistent_workers=True)
    next(iter(ours))  # its processes have started
    rates = fastest(rounds, 'images', book=lambda: sum(len(y) for _, y in book),
                    ours=lambda: sum(len(y) for _, y in ours))
    row('loader alone, 2 workers', "the book's loader, main process",
        rates['ours'] / rates['book'], 1.7)


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
            x = noise(count, None).x.numpy()
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
    print(f'{device} ({name}), {os.cpu_count()} cores, Python {platform.python_version()}, '
          f'PyTorch {torch.__version__}, {platform.system()}{", quick" if args.quick else ""}')
    rounds = 1 if args.quick else 3

    reading(2 * rounds, 100 if args.quick else 300)
    loading(2 * rounds, 1024 if args.quick else 3072)
    if device.type == 'cpu':
        batch_size = 16 if args.quick else 64
        if train.pick_precision(device, no_amp=False) == torch.bfloat16:
            training(rounds, 2 * batch_size, batch_size, device, False, 3)
        else:
            print('    this CPU has no bfloat16 support: mixed precision is off')
        training(rounds, 2 * batch_size, batch_size, device, True, 1.5)
    else:
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
