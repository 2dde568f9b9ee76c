"""Food-11 as arrays, a dataset and batches (the book's section 2.2).

    python chapter2_1_data.py                     the photographs in ./food-11: counts and a picture
    python chapter2_1_data.py --index 7           with another sample than train_set[100]
    python chapter2_1_data.py --save preview.png  into a file instead of a window
    python chapter2_1_data.py --demo              no photographs at hand: dishes drawn by this script

chapter2_2_train.py imports what it trains on from here.
"""
import argparse
import contextlib
import copy
import functools
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

CLASSES = ('Bread', 'Dairy product', 'Dessert', 'Egg', 'Fried food', 'Meat',
           'Noodles/Pasta', 'Rice', 'Seafood', 'Soup', 'Vegetable/Fruit')
CLUTTER = {'__macosx', '@eadir'}  # folders that systems leave behind; names that begin with a dot are left out as well
NOT_IMAGES = {'.csv', '.db', '.html', '.ini', '.json', '.md', '.py', '.txt', '.zip'}  # Thumbs.db, desktop.ini, notes

data_dir = './food-11'
demo_dir = './food-11-demo'
batch_size = 128
image_size = 128  # pixels; the network's first layer and its fully connected part are made for it


class UserError(Exception):
    """A mistake that the user can mend; the message says what is wrong, where, and what to do."""


class BadFiles(UserError):
    """Every file that cannot be used, in one message: the first ten and how many in all."""

    def __init__(self, problems):
        self.problems = problems  # {Path: reason}
        lines = [f'{file}: {reason}' for file, reason in sorted(problems.items())]
        if len(lines) == 1:
            super().__init__(f'{lines[0]}; mend or remove the file')
        else:
            more = [f'and {len(lines) - 10} more'] if len(lines) > 10 else []
            super().__init__('\n  '.join([f'{len(lines)} files cannot be used; mend or remove them:', *lines[:10], *more]))


# ---------------------------------------------------------------------- reading (2.2)

def list_images(path):
    """Paths of the photographs in the folder `path` and below it, sorted by name, clutter left out.

    Raises UserError if the folder is missing or holds no photograph.
    """
    path = Path(path)
    if not path.is_dir():  # perhaps unpacked a folder too deep, or --data-dir names training itself
        near = [*path.parent.glob(f'*/{path.name}'), *path.parent.parent.glob(path.name)]
        raise UserError(f'no folder {path.absolute()}: ' + (
            f'give --data-dir "{near[0].parent}" if {near[0]} is meant' if near else
            f'food-11 must lie as {path.parent}/training/0_0.jpg and {path.parent}/validation/0_0.jpg; food-11/README.md says '
            'how to get it (python -m gdown 19CzXudqN58R3D-1G8KeFWk8UDQwlb8is -O food-11.zip, and unpack); --data-dir names '
            'another place, and --demo needs no photographs'))

    def photographs(folder, parts=()):
        for entry in os.scandir(folder):
            if entry.name.startswith('.') or entry.name.lower() in CLUTTER:
                continue
            if not entry.is_dir():
                if os.path.splitext(entry.name)[1].lower() not in NOT_IMAGES:
                    yield *parts, entry.name
            elif not parts:
                yield from photographs(entry, (entry.name,))

    files = [path.joinpath(*parts) for parts in sorted(photographs(path))]
    if not files:
        raise UserError(f'no photographs in {path}: it should hold files such as 0_0.jpg (food-11/README.md)')
    return files


def letters(name):
    return re.sub('[^a-z]', '', name.lower())  # no folder can be called Noodles/Pasta; Kaggle has Noodles-Pasta


def label_of(file, path):
    """Label 0..10 of a photograph in the split folder `path`: the number before `_` or `-` in its name
    (`3_17.jpg`), or the class its folder is named after (`Egg/17.jpg`). Raises ValueError if there is none."""
    if file.parent != path:
        classes = [letters(name) for name in CLASSES]
        if letters(file.parent.name) not in classes:
            raise ValueError(f'its folder {file.parent.name!r} is not named after a class such as Bread or Noodles-Pasta')
        return classes.index(letters(file.parent.name))
    number = re.match(r'([0-9]+)[_-]', file.name)
    if not number:
        raise ValueError('no label in its name, which should look like 3_17.jpg (label_number)')
    if int(number[1]) >= len(CLASSES):
        raise ValueError(f'label {number[1]} is not in 0..{len(CLASSES) - 1}')
    return int(number[1])


def read_image(file):
    """One photograph as uint8 (128, 128, 3), BGR: OpenCV's read and default resize.

    Raises OSError or ValueError if it cannot be read."""
    data = np.fromfile(file, np.uint8)  # cv2.imread cannot open non-ASCII paths on Windows
    if not data.size:
        raise ValueError('empty file')
    try:
        image = cv2.imdecode(data, cv2.IMREAD_COLOR)
    except cv2.error:  # more pixels than OpenCV takes
        image = None
    if image is None:
        raise ValueError('cut off, or no image that OpenCV can read')
    return cv2.resize(image, (image_size, image_size))


def forks():
    """Are processes started as copies of this one, as on Linux before Python 3.14?"""
    return (multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]) == 'fork'


def shared_memory():
    """Bytes of shared memory that are free: few in a container."""
    return shutil.disk_usage('/dev/shm').free if os.path.isdir('/dev/shm') else sys.maxsize


def empty_images(n):
    """Room for `n` images, uint8 (n, 128, 128, 3), that the loaders' processes see without a copy: in shared memory,
    unless they are forked, and so see everything."""
    x = torch.empty(n, image_size, image_size, 3, dtype=torch.uint8)
    if not forks() and shared_memory() > x.nbytes:
        with contextlib.suppress(RuntimeError):  # a system that has none
            x.share_memory_()
    return x.numpy()


def read_images(files):
    """Reads photographs with all cores: `x`, uint8 (N, 128, 128, 3), and {file: what is wrong with it}."""
    x, problems = empty_images(len(files)), {}

    def read(start):
        for i in range(start, min(start + 16, len(files))):
            try:
                x[i] = read_image(files[i])
            except (OSError, ValueError) as error:
                problems[files[i]] = getattr(error, 'strerror', None) or error
            progress.update()

    (getattr(cv2, 'setLogLevel', None) or cv2.utils.logging.setLogLevel)(0)  # OpenCV's own lines name no file
    with (tqdm(desc='reading', total=len(files), leave=False, unit='img', disable=None) as progress,
          ThreadPoolExecutor(os.cpu_count()) as pool):  # threads suffice: OpenCV releases the GIL
        list(pool.map(read, range(0, len(files), 16)))
    return x, problems


def readfile(path):
    """The labelled photographs of one folder, such as food-11/training, in sorted name order.

    Returns `x`, uint8 (N, 128, 128, 3), BGR, and `y`, uint8 (N,).
    Raises UserError (BadFiles) if the folder or any file in it cannot be used.
    """
    files, y, problems, path = list_images(path), [], {}, Path(path)
    for file in files:
        try:
            y.append(label_of(file, path))
        except ValueError as error:
            problems[file] = error
    x, unreadable = read_images(files)
    if problems or unreadable:
        raise BadFiles(problems | unreadable)
    return x, np.array(y, np.uint8)


def read_testing(path):
    """The unlabelled photographs of a folder such as food-11/testing: `x` as in readfile, and their file names."""
    files = list_images(path)
    x, problems = read_images(files)
    if problems:
        raise BadFiles(problems)
    return x, [file.relative_to(path).as_posix() for file in files]


def read_food11(data_dir):
    """train_x, train_y, val_x, val_y. The bad files of both folders come in one error."""
    arrays, problems = [], {}
    for split in ('training', 'validation'):
        try:
            arrays += readfile(Path(data_dir, split))
        except BadFiles as error:
            problems |= error.problems
    if problems:
        raise BadFiles(problems)
    return arrays


# ---------------------------------------------------------------------- dataset and batches (2.2)

@functools.cache
def book_transforms():
    """train_transform and test_transform."""
    from torchvision import transforms  # here: importing it takes longer than predicting a photograph
    train_transform = transforms.Compose([
        transforms.ToPILImage(),
        transforms.RandomHorizontalFlip(),
        transforms.RandomRotation(15),  # degrees, to either side
        transforms.ToTensor(),          # uint8 (128, 128, 3) in 0..255 -> float32 (3, 128, 128) in 0..1
    ])
    test_transform = transforms.Compose([transforms.ToPILImage(), transforms.ToTensor()])
    return train_transform, test_transform


def __getattr__(name):  # so that `from chapter2_1_data import train_transform` works as in the book
    if name in ('train_transform', 'test_transform'):
        return book_transforms()[name == 'test_transform']
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


class ImgDataset(Dataset):
    """Images `x`, uint8 (N, 128, 128, 3), with labels `y` (N,) or without.

    An item is the transformed image and its label (a LongTensor), or the image alone when there are no labels. With a
    `seed` of 0 or more, what the transform draws for an image hangs on that and the index alone, not on which process
    draws it.
    """

    def __init__(self, x, y=None, transform=None):
        made_here = isinstance(getattr(x, 'base', None), torch.Tensor)  # by empty_images
        self.x = x.base if made_here else torch.as_tensor(np.ascontiguousarray(x))
        self.y = None if y is None else torch.as_tensor(y, dtype=torch.long)
        self.transform = transform
        self.seed = torch.tensor(-1).share_memory_()  # a worker that lives for several epochs sees each one's

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        x = self.x[index].numpy()
        if self.seed >= 0:
            torch.default_generator.manual_seed(int(self.seed) + index)
        if self.transform is not None:
            x = self.transform(x)
        return x if self.y is None else (x, self.y[index])


class Shuffle(Sampler):
    """The indices of `train_set` in an order that hangs on its seed; of each `batch_size` of them, every `world`-th from
    `rank` on: one process's share where `world` of them train together."""

    def __init__(self, train_set, batch_size, rank=0, world=1):
        self.train_set, self.batch_size, self.rank, self.world = train_set, batch_size, rank, world

    def __iter__(self):
        seed = int(self.train_set.seed)
        order = torch.randperm(len(self.train_set), generator=torch.Generator().manual_seed(seed) if seed >= 0 else None)
        for batch in order.split(self.batch_size):
            yield from batch[self.rank::self.world].tolist()

    def __len__(self):
        whole, rest = divmod(len(self.train_set), self.batch_size)
        return whole * (self.batch_size // self.world) + len(range(self.rank, rest, self.world))


def in_bytes(dataset):
    """The dataset with images in uint8 (128, 128, 3), a quarter of the bytes to send: what ToTensor does at the end of its
    transform is left to `to_device`."""
    from torchvision import transforms
    steps = getattr(dataset.transform, 'transforms', None) or [None]
    if isinstance(steps[-1], transforms.ToTensor):
        dataset = copy.copy(dataset)
        dataset.transform = transforms.Compose([*steps[:-1], np.array])
    return dataset


def to_device(x, device):
    """A batch of images on the device, uint8 (N, 128, 128, 3) as float (N, 3, 128, 128) in 0..1: the numbers that
    ToTensor gives, in the layout (channels last) that convolutions are fastest in."""
    x = x.to(device, non_blocking=True)
    return x.permute(0, 3, 1, 2) / 255 if x.dtype == torch.uint8 else x


def make_loaders(train_set, val_set, batch_size=batch_size, workers=0, rank=0, world=1, pin_memory=False):
    """train_loader, shuffled anew every epoch, and val_loader, in order. Their images are uint8 (N, 128, 128, 3), for
    `to_device`. `workers`: processes that load ahead, 0 to load in the main process; `rank` and `world` as in Shuffle."""
    train_set = in_bytes(train_set)
    train_loader = DataLoader(train_set, batch_size // world, sampler=Shuffle(train_set, batch_size, rank, world),
                              num_workers=workers, persistent_workers=workers > 0, pin_memory=pin_memory)
    return train_loader, DataLoader(in_bytes(val_set), batch_size)


# ---------------------------------------------------------------------- looking at it (2.2)

def print_counts(train_y, val_y):
    """A table of images per class and split."""
    counts = [np.bincount(y, minlength=len(CLASSES)) for y in (train_y, val_y)]
    print(f'{"class":<18} {"training":>8} {"validation":>10}')
    for label, name in enumerate(CLASSES):
        print(f'{label:>2} {name:<15} {counts[0][label]:>8} {counts[1][label]:>10}')
    print(f'{"in all":<18} {len(train_y):>8} {len(val_y):>10}')


def rgb(image):
    """A (3, 128, 128) BGR tensor as a (128, 128, 3) RGB array, which is what matplotlib shows."""
    return image.permute(1, 2, 0).numpy()[..., ::-1]


def draw_preview(figure, train_set, index, draws=4):
    """On a matplotlib figure: `train_set[index]`, and beside it the first image of each class, as it is and in `draws`
    augmentations."""
    left, right = figure.subplots(1, 2, width_ratios=(1, 2.9))
    image, label = train_set[index]
    left.imshow(rgb(image))
    left.set(title=f'{label}: {CLASSES[label]}', xlabel=f'train_set[{index}]', xticks=(), yticks=())

    tile, names = image_size + 8, []  # pixels; a white margin of 4
    tiles = np.ones((1 + draws, len(CLASSES), tile, tile, 3))
    for label, name in enumerate(CLASSES):
        found = torch.nonzero(train_set.y == label).flatten().tolist()
        names.append(f'{label}\n' + re.sub('([ /])', '\\1\n', name) + ('' if found else '\n(none)'))
        for row in range(1 + draws if found else 0):
            tiles[row, label, 4:-4, 4:-4] = rgb(train_set[found[0]][0]) if row else train_set.x[found[0]].flip(2) / 255
    right.imshow(tiles.transpose(0, 2, 1, 3, 4).reshape((1 + draws) * tile, len(CLASSES) * tile, 3))
    right.xaxis.tick_top()
    right.set_xticks(tile * (np.arange(len(CLASSES)) + .5), names, fontsize=8)
    right.set_yticks(tile * (np.arange(1 + draws) + .5), ['as it is', *['augmented'] * draws], fontsize=8)
    right.tick_params(length=0)
    right.spines[:].set_visible(False)


def show_preview(train_set, index, save=None):
    """Opens the preview in a window; with `save`, or without a display, writes it as a picture instead."""
    from matplotlib import pyplot as plt  # here: the training needs no pyplot
    figure = plt.figure(figsize=(12.6, 4.6), layout='constrained')  # inches; fits a 1366 x 768 screen
    draw_preview(figure, train_set, index)
    if save is None and figure.canvas.required_interactive_framework:
        plt.show()
        return
    save = Path(save or 'chapter2_1_data.png')
    try:
        figure.savefig(save, dpi=100, format=save.suffix[1:] or 'png')
    except (OSError, ValueError) as error:  # ValueError: an ending that matplotlib cannot write
        raise UserError(f'cannot write the picture {save}: {error}') from None
    print(f'picture written to {save.absolute()}')


# ---------------------------------------------------------------------- drawn dishes, to try everything without a download

def draw_dish(label, rng):
    """One drawn dish of class `label` as uint8 (160, 160, 3), BGR; `rng` varies place, size, turn, colour and noise."""
    image = np.full((160, 160, 3), rng.integers(60, 200, 3), np.uint8)
    centre, radius, turn = rng.uniform(68, 92, 2), rng.uniform(46, 62), rng.uniform(-.6, .6)
    cos, sin = radius * np.cos(turn), radius * np.sin(turn)

    def place(points):  # from the dish's own coordinates, -1..1, to pixels
        return np.int32(np.asarray(points) @ [[cos, sin], [-sin, cos]] + centre).reshape(-1, 2)

    def shade(colour):
        return np.clip(np.add(colour, rng.integers(-18, 19, 3)), 0, 255).tolist()

    def disc(x, y, width, height, colour, angle=0):
        axes = (max(1, int(width * radius)), max(1, int(height * radius)))
        cv2.ellipse(image, place([x, y])[0].tolist(), axes, np.degrees(turn) + angle, 0, 360, shade(colour), -1, cv2.LINE_AA)

    def shape(points, colour):
        cv2.fillPoly(image, [place(points)], shade(colour), cv2.LINE_AA)

    def line(points, colour, width):
        cv2.polylines(image, [place(points)], False, shade(colour), max(1, int(width * radius)), cv2.LINE_AA)

    disc(0, 0, 1.15, 1.15, (235, 235, 235))  # the plate
    if label == 0:    # a loaf with three cuts
        disc(0, 0, .95, .55, (60, 120, 190))
        for x in (-.5, 0, .5):
            line([(x - .1, -.3), (x + .1, .3)], (130, 190, 235), .1)
    elif label == 1:  # a wedge of cheese
        shape([(-.9, .5), (.9, .5), (.5, -.5)], (70, 210, 250))
        for x, y in ((-.2, .3), (.3, .2), (.4, -.2)):
            disc(x, y, .12, .12, (40, 160, 210))
    elif label == 2:  # a cupcake with a cherry
        shape([(-.6, .1), (.6, .1), (.4, .8), (-.4, .8)], (60, 80, 130))
        disc(0, 0, .75, .45, (190, 150, 250))
        disc(0, -.5, .18, .18, (40, 20, 200))
    elif label == 3:  # a fried egg
        disc(0, 0, .95, .75, (250, 252, 252), rng.uniform(0, 180))
        disc(.1, 0, .35, .35, (30, 170, 250))
    elif label == 4:  # chips
        for x in np.linspace(-.7, .7, 7):
            line([(x, -.7), (x + rng.uniform(-.3, .3), .7)], (60, 190, 240), .16)
    elif label == 5:  # a steak on its bone
        disc(0, 0, .9, .65, (150, 170, 230))
        disc(0, 0, .78, .54, (50, 50, 140))
        disc(.35, 0, .18, .18, (225, 230, 235))
    elif label == 6:  # noodles
        for y in np.linspace(-.6, .6, 8):
            t = np.linspace(-.8, .8, 30)
            line(np.stack([t, y + .12 * np.sin(9 * t + rng.uniform(0, 6))], 1), (110, 210, 240), .07)
    elif label == 7:  # rice in a dark bowl
        disc(0, 0, 1, 1, (70, 50, 40))
        for x, y in rng.normal(0, .35, (150, 2)):
            disc(x, y, .12, .04, (238, 242, 245), rng.uniform(0, 180))
    elif label == 8:  # a fish
        disc(-.15, 0, .75, .38, (190, 150, 110))
        shape([(.4, 0), (.95, -.4), (.95, .4)], (170, 130, 90))
        disc(-.6, -.08, .07, .07, (20, 20, 20))
    elif label == 9:  # tomato soup with herbs
        disc(0, 0, .95, .95, (40, 90, 225))
        for x, y in rng.uniform(-.55, .55, (8, 2)):
            disc(x, y, .09, .05, (60, 150, 60), rng.uniform(0, 180))
    else:             # an apple with its leaf
        disc(0, .1, .68, .68, (50, 40, 205))
        line([(0, -.5), (.08, -.85)], (30, 60, 90), .08)
        disc(.35, -.75, .3, .13, (60, 170, 70))
    return np.clip(image + rng.normal(0, 9, image.shape), 0, 255).astype(np.uint8)


def draw_food11(folder, training=30, validation=10):
    """Draws a food-11 into `folder`: so many JPEGs of each class for training and for validation, no two alike."""
    for split, count in enumerate((training, validation)):
        target = Path(folder, ('training', 'validation')[split])
        target.mkdir(parents=True, exist_ok=True)
        for label in range(len(CLASSES)):
            for i in range(count):
                image = draw_dish(label, np.random.default_rng((split, label, i)))
                (target / f'{label}_{i}.jpg').write_bytes(cv2.imencode('.jpg', image)[1].tobytes())


# ---------------------------------------------------------------------- the script

def process():
    """The number of this process and how many there are: 0 and 1, or as torchrun has started them. Only number 0
    speaks and writes."""
    if 'TORCHELASTIC_RUN_ID' not in os.environ:
        return 0, 1
    return int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])


def interrupt(*_):
    """Ctrl-C or SIGTERM ends a script in its own time, however often it comes: torchrun repeats what a terminal sends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def run(main):
    """Runs a script's `main`; a user's mistake ends it with one message on stderr and exit status 1."""
    rank, streams = process()[0], (sys.stdout, sys.stderr)
    if hasattr(sys.stdout, 'reconfigure'):  # not in IDLE
        sys.stdout.reconfigure(errors='backslashreplace')  # a Windows pipe may lack the characters of a path
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, signal.SIG_DFL if rank else interrupt)
    try:
        if rank:
            sys.stdout = sys.stderr = open(os.devnull, 'w', encoding='utf-8')
        main()
    except (UserError, OSError) as error:
        if rank:
            time.sleep(5)  # by then torchrun has ended this process, if process 0 has said the same
        else:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which would cut the line off
        sys.exit(f'error: {error}')
    except SystemExit as stop:
        time.sleep(5 if rank and stop.code else 0)
        raise
    except KeyboardInterrupt as stop:
        print(str(stop) or 'interrupted', file=sys.stderr)
        sys.exit(130)
    finally:
        sys.stdout, sys.stderr = streams


def add_data_arguments(parser):
    where = parser.add_mutually_exclusive_group()
    where.add_argument('--data-dir', default=data_dir, metavar='DIR',
                       help='folder that holds training/ and validation/ (default: %(default)s)')
    where.add_argument('--demo', action='store_true',
                       help=f'draw a small food-11 into {demo_dir} and use that: needs no photographs')


def main():
    parser = argparse.ArgumentParser(usage='%(prog)s [options]', description='Reads food-11 and shows samples of it.')
    add_data_arguments(parser)
    parser.add_argument('--index', type=int, metavar='N', help='the training sample to show (default: 100)')
    parser.add_argument('--save', metavar='FILE', help='write the picture into FILE (default: open a window; '
                        'without a display, write chapter2_1_data.png)')
    args = parser.parse_args()

    if args.demo:
        draw_food11(demo_dir)
    train_x, train_y, val_x, val_y = read_food11(demo_dir if args.demo else args.data_dir)
    print(train_x.shape)
    print_counts(train_y, val_y)
    index = min(100, len(train_x) - 1) if args.index is None else args.index
    if not 0 <= index < len(train_x):
        raise UserError(f'--index {index}: there are {len(train_x)} training images, so it must be in 0..{len(train_x) - 1}')
    show_preview(ImgDataset(train_x, train_y, book_transforms()[0]), index, args.save)


if __name__ == '__main__':
    run(main)
