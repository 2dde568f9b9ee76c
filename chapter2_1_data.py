"""Section 2.2 of the book: the food-11 photographs as arrays, as a dataset and as batches.

    python chapter2_1_data.py                     counts the photographs in ./food-11, shows some
    python chapter2_1_data.py --index 7           shows train_set[7] instead of train_set[100]
    python chapter2_1_data.py --save preview.png  writes the picture into a file, opens no window
    python chapter2_1_data.py --demo              needs no photographs: draws some dishes first

chapter2_2_train.py imports its data from here.
"""
import argparse
import copy
import os
import re
import signal
import sys
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import torch
from matplotlib import font_manager, rcParams
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler
from torchvision import transforms
from torchvision.utils import make_grid
from tqdm.contrib.concurrent import thread_map

data_dir = './food-11'
demo_dir = './food-11-demo'

# The place of a class in this list is its label. For photographs of your own, edit the list.
CLASSES = ['Bread', 'Dairy product', 'Dessert', 'Egg', 'Fried food', 'Meat',
           'Noodles/Pasta', 'Rice', 'Seafood', 'Soup', 'Vegetable/Fruit']

# Pixels. The first Linear layer of the network in chapter2_2_train.py depends on it.
image_size = 128

batch_size = 128


class UserError(Exception):
    """A mistake of the user: the scripts print its message on one line, without a traceback."""


class BadFiles(UserError):
    """Files that cannot be used as photographs; `reasons` says for each file (a Path) why."""

    def __init__(self, reasons):
        self.reasons = reasons
        lines = [f'{file}: {reason}' for file, reason in sorted(reasons.items())]
        if len(lines) == 1:
            message = f'{lines[0]}; repair or delete this file'
        else:
            heading = f'{len(lines)} files cannot be used; repair or delete them:'
            if len(lines) > 10:
                lines[10:] = [f'and {len(lines) - 10} more']
            message = '\n  '.join([heading, *lines])
        super().__init__(message)


# ---- Reading the photographs (section 2.2) ---------------------------------------------------

def readfile(path):
    """Reads the labelled photographs in a folder such as food-11/training (section 2.2).

    Returns x, uint8 (N, 128, 128, 3), BGR, and y, uint8 (N,), in the sorted order of the names.
    Raises UserError if there is no photograph, BadFiles if there are files that cannot be used.
    """
    path = Path(path)
    image_files = list_images(path)
    x, bad_files = read_images(image_files)
    y = np.zeros(len(image_files), dtype=np.uint8)
    labels = labels_by_name()
    for i, file in enumerate(image_files):
        try:
            y[i] = label_of(file, path, labels)
        except ValueError as error:
            bad_files[file] = str(error)
    if bad_files:
        raise BadFiles(bad_files)
    return x, y


def list_images(path):
    """The photographs in a folder, or in a subfolder for each class, sorted by name.

    Raises UserError if the folder is missing or holds no photograph.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(missing_folder(path))
    visible = [entry for entry in path.iterdir() if not entry.name.startswith('.')]
    subfolders = [entry for entry in visible if entry.is_dir()]
    image_files = [file for file in visible if is_image(file)]
    for subfolder in subfolders:
        image_files += [file for file in subfolder.iterdir() if is_image(file)]
    if not image_files:
        raise UserError(f'no photographs in {path}: it should hold files such as 0_0.jpg '
                        '(see food-11/README.md)')
    return sorted(image_files, key=lambda file: file.parts)


def is_image(file):
    """False for folders and for what else lies around in such folders, True for all others.

    A file of unknown type counts as an image: if it is none, it is better refused than ignored.
    """
    # Thumbs.db and desktop.ini are made by Windows; macOS makes hidden files such as ._0_0.jpg.
    others = {'.csv', '.db', '.html', '.ini', '.json', '.md', '.py', '.txt', '.zip'}
    hidden = file.name.startswith('.')
    return not hidden and file.suffix.lower() not in others and not file.is_dir()


def read_images(image_files):
    """Reads photographs on all cores.

    Returns x, uint8 (N, 128, 128, 3), BGR, and a dictionary from each file that cannot be read
    to the reason.
    """
    x = np.zeros((len(image_files), image_size, image_size, 3), dtype=np.uint8)
    bad_files = {}

    def read(i):
        file = image_files[i]
        try:
            x[i] = read_image(file)
        except OSError as error:
            bad_files[file] = error.strerror
        except ValueError as error:
            bad_files[file] = str(error)

    silence_opencv()
    # Threads are enough: OpenCV lets the other threads run while it decodes a photograph.
    thread_map(read, range(len(image_files)), max_workers=os.cpu_count(),
               desc='reading', unit='img', leave=False, disable=None)
    return x, bad_files


def read_image(file):
    """One photograph as uint8 (128, 128, 3), BGR.

    Raises OSError if the file cannot be opened, ValueError if it holds no whole image.
    """
    # The book's cv2.imread cannot open a path with Chinese characters on Windows.
    file_bytes = np.fromfile(file, dtype=np.uint8)
    if len(file_bytes) == 0:
        raise ValueError('empty file')
    try:
        img = cv2.imdecode(file_bytes, cv2.IMREAD_COLOR)
    except cv2.error:
        raise ValueError('more pixels than OpenCV can read') from None
    if img is None:
        raise ValueError('not an image that OpenCV can read, or cut off')
    return cv2.resize(img, (image_size, image_size))


def label_of(file, path, labels):
    """The label of a photograph in the folder `path`: 3 for path/3_17.jpg and path/Egg/17.jpg.

    `labels` comes from labels_by_name. Raises ValueError if the file has no label.
    """
    if file.parent != path:
        folder = file.parent.name
        if simplified(folder) not in labels:
            raise ValueError(f'its folder {folder!r} is not named like any of the CLASSES in '
                             'chapter2_1_data.py')
        return labels[simplified(folder)]
    # The book's code has 3_17.jpg, its text 3-17.jpg.
    number = re.split('[_-]', file.name)[0]
    if not number.isdecimal():
        raise ValueError('no label in its name, which should be like 3_17.jpg (label_number)')
    if int(number) >= len(CLASSES):
        raise ValueError(f'label {number} is not in 0..{len(CLASSES) - 1}')
    return int(number)


def labels_by_name():
    """A dictionary from the simplified name of each class to its label.

    Raises UserError if two names are the same when simplified, or there are too many classes.
    """
    if len(CLASSES) > 256:
        raise UserError(f'CLASSES has {len(CLASSES)} names, but labels are uint8: at most 256')
    labels = {}
    for label, name in enumerate(CLASSES):
        key = simplified(name)
        if key in labels:
            raise UserError(f'CLASSES has {CLASSES[labels[key]]!r} and {name!r}, which cannot be '
                            'told apart as folder names: letters and digits must differ')
        labels[key] = label
    return labels


def simplified(name):
    """A name without upper case, spaces and punctuation: no folder can be called Noodles/Pasta."""
    name = unicodedata.normalize('NFKC', name).casefold()
    return ''.join(character for character in name if character.isalnum())


def missing_folder(path):
    """The message for a folder of photographs that does not exist."""
    # The archive may have been unpacked one folder too deep, or --data-dir may be too deep itself.
    nearby = [*path.parent.glob(f'*/{path.name}'), *path.parent.parent.glob(path.name)]
    if nearby:
        return f'no folder {path.absolute()}: did you mean --data-dir "{nearby[0].parent}"?'
    return (f'no folder {path.absolute()}: food-11/README.md says where to get the photographs; '
            f'expected are {path.parent / "training" / "0_0.jpg"} and so on; '
            '--data-dir names another place, --demo needs no photographs')


def silence_opencv():
    """Turns off OpenCV's own messages on stderr: they do not say which file they are about."""
    # OpenCV 5 has moved the function.
    if hasattr(cv2, 'setLogLevel'):
        cv2.setLogLevel(0)
    else:
        cv2.utils.logging.setLogLevel(0)


def read_food11(folder):
    """train_x, train_y, val_x and val_y, by the book's two calls of readfile.

    Raises UserError; the files of both folders that cannot be used come in one BadFiles.
    """
    arrays = []
    bad_files = {}
    for split in ('training', 'validation'):
        try:
            x, y = readfile(Path(folder, split))
            arrays += [x, y]
        except BadFiles as error:
            bad_files.update(error.reasons)
    if bad_files:
        raise BadFiles(bad_files)
    train_x, train_y, val_x, val_y = arrays
    return train_x, train_y, val_x, val_y


# ---- Dataset and batches (section 2.2) -------------------------------------------------------

# The images have OpenCV's channel order, BGR: keep that in mind for ColorJitter or Normalize.
train_transform = transforms.Compose([
    transforms.ToPILImage(),
    transforms.RandomHorizontalFlip(),
    transforms.RandomRotation(15),  # degrees, in either direction
    transforms.ToTensor(),          # uint8 [128, 128, 3] in 0..255 -> float32 [3, 128, 128] in 0..1
])

test_transform = transforms.Compose([
    transforms.ToPILImage(),
    transforms.ToTensor(),
])


class ImgDataset(Dataset):
    """Images with their labels, or without (section 2.2).

    x: uint8 (N, 128, 128, 3), BGR. y: N labels, or None. transform: what is done to an image.
    An item is the transformed image and its label, or the image alone if y is None.

    Random transforms draw from PyTorch's generator, as torchvision's do. Once set_epoch has been
    called, what they draw for an image depends on seed, epoch and index only; before, it is
    different every time, as in the book.
    """

    def __init__(self, x, y=None, transform=None, seed=0):
        # A tensor: PyTorch hands it to worker processes in shared memory, without copies.
        self.x = torch.as_tensor(np.ascontiguousarray(x))
        self.y = None
        if y is not None:
            self.y = torch.as_tensor(y, dtype=torch.long)
        self.transform = transform
        self.seed = seed
        # In shared memory too: workers, which live for many epochs, see what set_epoch writes.
        # -1 means that set_epoch has not been called.
        self.epoch = torch.tensor(-1).share_memory_()

    def set_epoch(self, epoch):
        """Call it before each epoch, with the number of the epoch, to make a run repeatable."""
        self.epoch.fill_(epoch)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        img = self.x[index].numpy()
        if self.transform is not None:
            img = self.transformed(img, index)
        if self.y is None:
            return img
        return img, self.y[index]

    def transformed(self, img, index):
        epoch = self.epoch.item()
        if epoch < 0:
            return self.transform(img)
        # NumPy's SeedSequence makes one well-mixed seed of several numbers.
        seed = np.random.SeedSequence([self.seed, epoch, index % len(self)]).generate_state(1)[0]
        # fork_rng: nobody else who draws from PyTorch's generator notices the seeding.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(seed))
            return self.transform(img)


def make_loaders(train_set, val_set, images_per_step, workers=0, pin_memory=False,
                 rank=0, world_size=1, seed=0):
    """The book's train_loader, in a new random order every epoch, and val_loader, in order.

    images_per_step: the batch size of all processes together.
    workers: processes that prepare the training batches; 0: the main process does it.
    rank, world_size: the number of this process, and how many train together with torchrun.
    """
    # As shuffle=True does, but repeatable, and the processes of a run share the images.
    sampler = DistributedSampler(train_set, world_size, rank, seed=seed)
    start_method = None
    if workers > 0 and sys.platform == 'linux':
        # Forked workers see the images without shared memory, which containers have little of.
        start_method = 'fork'
    train_loader = DataLoader(bytes_only(train_set), batch_size=images_per_step // world_size,
                              sampler=sampler, num_workers=workers, pin_memory=pin_memory,
                              persistent_workers=workers > 0, multiprocessing_context=start_method)
    val_loader = DataLoader(bytes_only(val_set), batch_size=images_per_step, shuffle=False)
    return train_loader, val_loader


def bytes_only(dataset):
    """The same dataset, but its images stay uint8 (3, 128, 128) in 0..255 if possible.

    That is a quarter of the data to send from the workers to the GPU. What is left out, ToTensor's
    division by 255, is done by to_input on the GPU. Where ToTensor is not the last step (if
    Normalize follows, say), the dataset stays as it is and the images are sent as floats.
    """
    steps = getattr(dataset.transform, 'transforms', [])
    if not steps or not isinstance(steps[-1], transforms.ToTensor):
        return dataset
    # A shallow copy: the images and the epoch are those of `dataset`.
    in_bytes = copy.copy(dataset)
    in_bytes.transform = transforms.Compose([*steps[:-1], transforms.PILToTensor()])
    return in_bytes


def to_device(tensor, device):
    """The tensor on the device."""
    # The program need not wait for the copy. Only with CUDA, for which pin_memory makes that safe.
    return tensor.to(device, non_blocking=device.type == 'cuda')


def to_input(x, device):
    """A batch of images as the network takes it: float32 (N, 3, 128, 128) on the device."""
    x = to_device(x, device)
    if x.dtype == torch.uint8:
        x = x / 255
    return x


# ---- Looking at the data (section 2.2) -------------------------------------------------------

def print_counts(train_y, val_y):
    """Prints how many images of each class there are."""
    train_counts = np.bincount(train_y, minlength=len(CLASSES))
    val_counts = np.bincount(val_y, minlength=len(CLASSES))
    print(f'{"class":<18} {"training":>8} {"validation":>10}')
    for label, name in enumerate(CLASSES):
        print(f'{label:>2} {name:<15} {train_counts[label]:>8} {val_counts[label]:>10}')
    print(f'{"total":<18} {len(train_y):>8} {len(val_y):>10}')


def to_rgb(image):
    """A float (3, H, W) BGR tensor as a (H, W, 3) RGB array, which is what matplotlib shows."""
    image = image.permute(1, 2, 0)  # [128, 128, 3]
    image = image.flip(2)           # BGR -> RGB
    return image.clamp(0, 1).numpy()


def draw_sample(axes, train_set, index):
    """The book's sample: one training image, with its label as title."""
    image, label = train_set[index]
    axes.imshow(to_rgb(image))
    axes.set_title(f'{label}: {CLASSES[label]}')
    axes.set_xlabel(f'train_set[{index}]')
    axes.set_xticks([])
    axes.set_yticks([])


def draw_classes(axes, train_set, draws=4):
    """A grid: the first image of each class as it is, and below it what augmentation does to it."""
    plain_set = ImgDataset(train_set.x, train_set.y, test_transform)
    missing = torch.ones(3, image_size, image_size)
    images = []
    for dataset in [plain_set] + [train_set] * draws:
        for label in range(len(CLASSES)):
            places = torch.nonzero(train_set.y == label)
            if len(places) > 0:
                image, _ = dataset[places[0].item()]
            else:
                image = missing
            images.append(image)
    padding = 8
    axes.imshow(to_rgb(make_grid(images, nrow=len(CLASSES), padding=padding, pad_value=1)))

    names = []
    for label, name in enumerate(CLASSES):
        name = name.replace(' ', '\n').replace('/', '/\n')
        if not (train_set.y == label).any():
            name += '\n(none)'
        names.append(f'{label}\n{name}')
    first = padding + image_size / 2
    step = padding + image_size
    axes.xaxis.tick_top()
    axes.set_xticks(first + step * np.arange(len(CLASSES)), names, fontsize=8)
    axes.set_yticks(first + step * np.arange(1 + draws), ['as it is'] + ['augmented'] * draws,
                    fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def use_chinese_font():
    """Lets matplotlib draw Chinese class names, if one of these fonts is installed."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ['Microsoft YaHei', 'SimHei', 'PingFang SC', 'Noto Sans CJK SC', 'WenQuanYi Zen Hei']
    rcParams['font.family'] = ['sans-serif', *[font for font in fonts if font in installed]]


def show_preview(train_set, index, file=None):
    """Shows a sample and the classes in a window, or writes them into `file`.

    Without a display, the picture is written into chapter2_1_data.png.
    """
    # Imported here, as chapter2_2_train.py needs no windows.
    from matplotlib import pyplot as plt
    use_chinese_font()
    figure = plt.figure(figsize=(12.6, 4.6), layout='constrained')  # inches
    left, right = figure.subplots(1, 2, width_ratios=(1, 2.9))
    draw_sample(left, train_set, index)
    draw_classes(right, train_set)
    # matplotlib falls back to a canvas that cannot open windows where there is no display.
    has_display = figure.canvas.required_interactive_framework is not None
    if file is None and has_display:
        plt.show()
        return
    file = Path(file or 'chapter2_1_data.png')
    try:
        figure.savefig(file, dpi=100, format=file.suffix[1:] or 'png')
    except (OSError, ValueError) as error:  # ValueError: a format that matplotlib does not know
        raise UserError(f'cannot write the picture {file}: {error}') from None
    print(f'picture written to {file.absolute()}')


# ---- The script ------------------------------------------------------------------------------

def add_data_arguments(parser):
    """The arguments that both scripts have."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument('--data-dir', metavar='DIR',
                       help=f'folder that holds training/ and validation/ (default: {data_dir})')
    where.add_argument('--demo', action='store_true',
                       help=f'draw a small food-11 into {demo_dir} and use it')


def draw_demo():
    """Draws a small fake food-11 into demo_dir."""
    # Imported here, as only the demo needs what the tests use.
    from tests.fake_food11 import draw_food11
    draw_food11(demo_dir, class_count=len(CLASSES))


def interrupt(number, frame):
    """Handles Ctrl-C, and SIGTERM like Ctrl-C, but only once: torchrun sends both."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def run_script(main):
    """Calls a script's main; a user's mistake ends in a message on stderr and exit status 1."""
    # Windows may redirect stdout in an encoding that lacks the characters of a path.
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='backslashreplace')
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)


def main():
    parser = argparse.ArgumentParser(description='Counts the photographs of food-11, shows some.')
    add_data_arguments(parser)
    parser.add_argument('--index', type=int, metavar='N',
                        help='which training image to show (default: 100)')
    parser.add_argument('--save', metavar='FILE',
                        help='write the picture into FILE (default: open a window)')
    args = parser.parse_args()

    folder = args.data_dir or data_dir
    if args.demo:
        draw_demo()
        folder = demo_dir
    train_x, train_y, val_x, val_y = read_food11(folder)
    print(train_x.shape)
    print_counts(train_y, val_y)

    train_set = ImgDataset(train_x, train_y, train_transform)
    val_set = ImgDataset(val_x, val_y, test_transform)
    train_loader, val_loader = make_loaders(train_set, val_set, batch_size)
    print(f'batches of {batch_size}: {len(train_loader)} training, {len(val_loader)} validation')

    index = args.index
    if index is None:
        index = min(100, len(train_set) - 1)
    if not 0 <= index < len(train_set):
        raise UserError(f'--index {index}: must be in 0..{len(train_set) - 1}, as there are '
                        f'{len(train_set)} training images')
    show_preview(train_set, index, args.save)


if __name__ == '__main__':
    run_script(main)
