"""Section 2.2 of the book: the food-11 photographs as arrays, as a dataset and as batches.

    python chapter2_1_data.py                     counts the photographs in ./food-11, shows some
    python chapter2_1_data.py --index 7           shows train_set[7] instead of train_set[100]
    python chapter2_1_data.py --save preview.png  writes the picture into a file, opens no window
    python chapter2_1_data.py --demo              needs no photographs: makes some fake ones first

chapter2_2_train.py imports its data from here.
"""
import argparse
import copy
import math
import os
import re
import signal
import sys
import time
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

# The position of a class in this list is its label. For photographs of your own, edit the list.
CLASSES = ['Bread', 'Dairy product', 'Dessert', 'Egg', 'Fried food', 'Meat',
           'Noodles/Pasta', 'Rice', 'Seafood', 'Soup', 'Vegetable/Fruit']

# Width and height in pixels. The first Linear layer in chapter2_2_train.py depends on it.
image_size = 128

batch_size = 128


class UserError(Exception):
    """A mistake of the user: the scripts print its message, and no traceback."""


class UnusableFile(Exception):
    """A file cannot be used as a photograph; the message says why."""


# ---- Reading the photographs (section 2.2) ---------------------------------------------------

def readfile(path, failures=None):
    """Reads the labelled photographs in a folder such as food-11/training (section 2.2).

    Returns x, uint8 (N, 128, 128, 3), BGR, and y, uint8 (N,), in the sorted order of the names.

    Raises UserError if there are no photographs, or if files cannot be used as photographs. If a
    dictionary `failures` is given, such files do not raise an error, but are added to it, with the
    reasons, and their rows of x and y are not to be used. (read_food11 needs this.)
    """
    image_files = list_images(path)
    x = np.zeros((len(image_files), image_size, image_size, 3), dtype=np.uint8)
    y = np.zeros(len(image_files), dtype=np.uint8)

    def read(i):
        x[i] = read_image(image_files[i])
        y[i] = label_of(image_files[i], path)

    # The book's loop, for i in range(len(image_files)): read(i), but on all CPU cores.
    new_failures = on_all_cores(read, image_files)
    if failures is not None:
        failures.update(new_failures)
    elif new_failures:
        raise UserError(bad_files_message(new_failures))
    return x, y


def read_food11(folder):
    """Returns train_x, train_y, val_x and val_y, as readfile reads them.

    Raises UserError if CLASSES has names that cannot be told apart, or if files cannot be used as
    photographs. In that case, the message lists those of both folders.
    """
    check_classes()
    failures = {}
    train_x, train_y = readfile(os.path.join(folder, 'training'), failures)
    val_x, val_y = readfile(os.path.join(folder, 'validation'), failures)
    if failures:
        raise UserError(bad_files_message(failures))
    return train_x, train_y, val_x, val_y


def read_image(file):
    """Reads one photograph as uint8 (128, 128, 3), BGR.

    Raises OSError if the file cannot be opened, UnusableFile if it holds no complete image.
    """
    # The book's cv2.imread cannot open a path with Chinese characters on Windows. Therefore NumPy
    # reads the bytes, and cv2.imdecode turns them into the same pixels.
    file_bytes = np.fromfile(file, dtype=np.uint8)
    if len(file_bytes) == 0:
        raise UnusableFile('empty file')
    try:
        img = cv2.imdecode(file_bytes, cv2.IMREAD_COLOR)
    except cv2.error as error:
        # For example, an image that is too large. For most unreadable files imdecode returns None.
        raise UnusableFile(f'OpenCV cannot read it ({error.err})') from None
    if img is None:
        raise UnusableFile('not an image that OpenCV can read, or cut off')
    return cv2.resize(img, (image_size, image_size))


def label_of(file, folder):
    """The label of a photograph in `folder`: 3 for folder/3_17.jpg, and for folder/Egg/17.jpg.

    Raises UnusableFile if the file has no label.
    """
    if file.parent != Path(folder):
        return label_of_class_folder(file.parent.name)
    # The book's code expects 3_17.jpg, its text says 3-17.jpg.
    match = re.match('([0-9]+)[_-]', file.name)
    if match is None:
        raise UnusableFile('no label in its name, which should be like 3_17.jpg (label_number)')
    label = int(match.group(1))
    if label >= len(CLASSES):
        raise UnusableFile(f'label {label} is not in 0..{len(CLASSES) - 1}, the positions in '
                           'CLASSES in chapter2_1_data.py')
    return label


def label_of_class_folder(name):
    """The label of the class that a folder is named after, as in Kaggle's copy of food-11.

    Raises UnusableFile if there is no such class.
    """
    for label, class_name in enumerate(CLASSES):
        if simplified(class_name) == simplified(name):
            return label
    reason = f'its folder {name!r} is not named like any of the CLASSES in chapter2_1_data.py'
    if name.isdecimal():
        reason += (" (Hung-yi Lee's course of 2021 has numbered folders, but that is a different "
                   'data set)')
    raise UnusableFile(reason)


def simplified(name):
    """A name in lower case, without spaces and punctuation: Noodles-Pasta equals Noodles/Pasta."""
    # NFKC: in Unicode, é can be one character, or e and an accent. Afterwards it is one.
    name = unicodedata.normalize('NFKC', name).casefold()
    return ''.join(character for character in name if character.isalnum())


def check_classes():
    """Raises UserError if two CLASSES have the same simplified name, or there are too many."""
    names = {}
    for name in CLASSES:
        key = simplified(name)
        if key in names:
            raise UserError(f'CLASSES has {names[key]!r} and {name!r}: folders with these names '
                            'cannot be told apart, as only letters and digits count')
        names[key] = name
    if len(CLASSES) > 256:
        raise UserError(f'CLASSES has {len(CLASSES)} names, but labels are uint8: at most 256')


def list_images(path):
    """The photographs in a folder and in its subfolders (one for each class), sorted by name.

    Raises UserError if the folder is missing, holds no photograph, or is that of another data set.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(missing_folder_message(path))
    folders = [path]
    for entry in path.iterdir():
        if entry.is_dir() and not entry.name.startswith('.'):
            folders.append(entry)
    if {'labeled', 'unlabeled'} <= {folder.name.lower() for folder in folders}:
        raise UserError(f'{path} has folders called labeled and unlabeled: this is the data set of '
                        "Hung-yi Lee's course of 2021, a different one; food-11/README.md says "
                        'where to get food-11')
    image_files = []
    for folder in folders:
        image_files += [file for file in folder.iterdir() if is_image(file)]
    if not image_files:
        raise UserError(f'no photographs in {path}, nor in the folders in it; food-11/README.md '
                        'says how to arrange those of food-11')
    # Sorted as strings, as in the book. Windows would sort paths without regard to case.
    return sorted(image_files, key=str)


def is_image(file):
    """Whether something in a folder is to be read as a photograph.

    That is every file, except hidden ones and those of the types below. A list of image types
    instead would leave out photographs with an unusual ending, and nobody would notice.
    """
    # Notes and tables that people keep beside photographs; Windows makes .db and .ini files.
    not_images = {'.csv', '.db', '.ini', '.json', '.md', '.txt'}
    if file.name.startswith('.') or file.suffix.lower() in not_images:
        return False
    return not file.is_dir()


def on_all_cores(read, image_files):
    """Calls read(0), read(1), ... once for each file, on all CPU cores, with a progress bar.

    Returns a dictionary {file: reason} of the files for which read raised OSError or UnusableFile.
    """
    failures = {}

    def read_or_note(i):
        try:
            read(i)
        except OSError as error:
            failures[image_files[i]] = error.strerror or str(error)
        except UnusableFile as error:
            failures[image_files[i]] = str(error)

    silence_opencv()
    # Threads are enough, as OpenCV lets other threads run while it decodes a photograph.
    # disable=None: no progress bar if stderr is not a terminal.
    thread_map(read_or_note, range(len(image_files)), max_workers=os.cpu_count(),
               desc='reading', unit='img', leave=False, disable=None)
    return failures


def silence_opencv():
    """Turns off OpenCV's own messages on stderr, which do not say which file they are about."""
    if hasattr(cv2, 'setLogLevel'):
        cv2.setLogLevel(0)  # 0: silent
    else:
        # OpenCV 5 has it here.
        cv2.utils.logging.setLogLevel(0)


def bad_files_message(failures):
    """What to tell the user about files that cannot be used. failures: {file: reason}."""
    lines = [f'{file}: {reason}' for file, reason in sorted(failures.items())]
    if len(lines) == 1:
        return f'{lines[0]}; repair, rename or delete this file'
    heading = f'{len(lines)} files cannot be used; repair, rename or delete them:'
    shown = lines[:10]
    if len(lines) > 10:
        shown.append(f'and {len(lines) - 10} more')
    return '\n  '.join([heading, *shown])


def missing_folder_message(path):
    """What to tell the user if the folder `path` does not exist."""
    # The archive may have been unpacked one folder too deep: there is food-11/food-11/training
    # instead of food-11/training.
    similar = list(path.parent.glob(f'*/{path.name}'))
    # Or --data-dir food-11/training was given instead of food-11, so food-11/training/training is
    # missing, but there is food-11/training.
    one_folder_up = path.parent.parent / path.name
    if one_folder_up.is_dir():
        similar.append(one_folder_up)
    if similar:
        return f'no folder {path.absolute()}: did you mean --data-dir "{similar[0].parent}"?'
    return (f'no folder {path.absolute()}, which should hold photographs such as 0_0.jpg or '
            'Bread/0.jpg: food-11/README.md says where to get those of food-11. --data-dir names '
            'another place, --demo needs no photographs')


# ---- Dataset and batches (section 2.2) -------------------------------------------------------

class ImgDataset(Dataset):
    """Images, with labels or without (section 2.2). An item is the transformed image and its
    label, or the image alone if there are no labels.

    x: uint8 (N, 128, 128, 3), BGR. y: N labels, or None. transform: a function of one image.

    A random transform gives a different result each time, as in the book. To make a run
    repeatable, call set_epoch(epoch) before each epoch: then the result depends on seed, epoch and
    index only. This works for transforms that use PyTorch's random numbers, as torchvision's do.
    """

    NO_EPOCH = -1

    def __init__(self, x, y=None, transform=None, seed=0):
        # As a tensor: the loader's workers are separate processes. On Windows and macOS, PyTorch
        # shares tensors with them, but would copy an array for each of them.
        # ascontiguousarray: PyTorch does not accept an array such as x[::-1] as it is.
        self.x = torch.as_tensor(np.ascontiguousarray(x))
        self.y = None
        if y is not None:
            self.y = torch.as_tensor(y, dtype=torch.long)
        self.transform = transform
        self.seed = seed
        # In shared memory, because worker processes must see it when set_epoch changes it. They
        # would not see the change of a plain number.
        self.epoch = torch.tensor(self.NO_EPOCH).share_memory_()

    def set_epoch(self, epoch):
        """To be called before each epoch, with its number, if a run is to be repeatable."""
        self.epoch.fill_(epoch)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        img = self.x[index].numpy()
        if self.transform is not None:
            img = self.apply_transform(img, index)
        if self.y is None:
            return img
        return img, self.y[index]

    def apply_transform(self, img, index):
        """The transformed image. After set_epoch it is the same each time, until the next epoch."""
        epoch = self.epoch.item()
        if epoch == self.NO_EPOCH:
            return self.transform(img)
        # One seed from three numbers: Python's hash of numbers is the same in every process.
        # An index of -1 stands for the last image, therefore % len(self).
        image_seed = hash((self.seed, epoch, index % len(self)))
        # After the with-block, PyTorch's random generator goes on as if this had not happened.
        # devices=[]: only the CPU's generator is used here.
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the generators of all GPUs too, which takes longer.
            torch.default_generator.manual_seed(image_seed)
            return self.transform(img)


# The channels of the images are in OpenCV's order, BGR. That matters for ColorJitter or Normalize.
train_transform = transforms.Compose([
    transforms.ToPILImage(),
    transforms.RandomHorizontalFlip(),
    transforms.RandomRotation(15),  # by up to 15 degrees in either direction
    transforms.ToTensor(),          # float32 [3, 128, 128], in 0..1
])

test_transform = transforms.Compose([
    transforms.ToPILImage(),
    transforms.ToTensor(),
])


def as_bytes(dataset):
    """The same dataset without its last step ToTensor: its images are uint8 (128, 128, 3).

    ToTensor makes float32 of the bytes of an image: four times as much to send to the GPU. So the
    images are sent as bytes, and to_input does this step on the GPU. If the transform does not
    begin with ToPILImage and end with ToTensor, the dataset is returned as it is.
    """
    if not isinstance(dataset.transform, transforms.Compose):
        return dataset
    steps = dataset.transform.transforms
    if not steps or not isinstance(steps[-1], transforms.ToTensor):
        return dataset
    # pil_to_bytes takes PIL images.
    if not isinstance(steps[0], transforms.ToPILImage):
        return dataset
    # A shallow copy: only the transform differs.
    dataset = copy.copy(dataset)
    dataset.transform = transforms.Compose([*steps[:-1], pil_to_bytes])
    return dataset


def pil_to_bytes(img):
    """A PIL image as uint8 (128, 128, 3), or (128, 128, 1) after transforms.Grayscale."""
    return np.atleast_3d(np.array(img))


def to_input(x, device):
    """Brings a batch of images to the device, as float32 (N, 3, 128, 128)."""
    x = to_device(x, device)
    if x.dtype == torch.uint8:
        # From as_bytes. This is what ToTensor does: channels first, numbers in 0..1.
        x = x.permute(0, 3, 1, 2) / 255
    return x


def to_device(tensor, device):
    """Copies a tensor to the device."""
    # non_blocking: Python does not wait until the copy is complete. CUDA computes with it only
    # then; other devices might use numbers that have not arrived yet.
    return tensor.to(device, non_blocking=device.type == 'cuda')


def make_loaders(train_set, val_set, images_per_step, workers=0, pin_memory=False,
                 world_size=1, rank=0, seed=0):
    """The book's train_loader, which shuffles, and its val_loader, which does not.

    The batches hold images as bytes (see as_bytes), so call to_input(x, device) before model(x).
    images_per_step: the book's batch_size, the number of images in a training step. If several
    processes train together, they share these images.
    val_set: with several processes, only the part of the images that this process evaluates. (The
    sampler that divides train_set may repeat images, which would count twice in the accuracy.)
    workers: how many processes prepare the training batches; 0: the training process does it.
    pin_memory: whether to keep batches in memory from which a CUDA GPU can copy them faster.
    world_size, rank: how many processes train together, and the number of this one, counted from
    0 (see chapter2_2_train.py). seed: for the shuffling.

    Call set_epoch(train_loader, epoch) before each epoch, or all epochs have the same order.
    """
    # Like shuffle=True in the book, but the order depends only on seed and epoch, so that a run can
    # be repeated. And several processes get equal shares of the images (to make the shares equal,
    # a few images may occur twice).
    sampler = DistributedSampler(train_set, num_replicas=world_size, rank=rank, shuffle=True,
                                 seed=seed)
    # How workers are started; None stands for the system's default.
    start_method = None
    if workers > 0 and sys.platform == 'linux':
        # Forked workers can read the images in the memory of the training process. Otherwise the
        # images would have to be in shared memory, and in Docker that is small.
        start_method = 'fork'
    # as_bytes: train_set without its step ToTensor, which to_input does on the GPU.
    # persistent_workers: they are started once, not in every epoch.
    train_loader = DataLoader(as_bytes(train_set), sampler=sampler,
                              batch_size=images_per_step // world_size,
                              num_workers=workers, pin_memory=pin_memory,
                              persistent_workers=workers > 0, multiprocessing_context=start_method)
    val_loader = DataLoader(as_bytes(val_set), batch_size=images_per_step // world_size,
                            shuffle=False)
    return train_loader, val_loader


def set_epoch(train_loader, epoch):
    """Sets the order and the augmentation of the images in the next epoch."""
    train_loader.sampler.set_epoch(epoch)
    train_loader.dataset.set_epoch(epoch)


# ---- Looking at the data (section 2.2) -------------------------------------------------------

# How many training and validation photographs the complete food-11 has.
FOOD11_COUNTS = {'Bread': (994, 362), 'Dairy product': (429, 144), 'Dessert': (1500, 500),
                 'Egg': (986, 327), 'Fried food': (848, 326), 'Meat': (1325, 449),
                 'Noodles/Pasta': (440, 147), 'Rice': (280, 96), 'Seafood': (855, 347),
                 'Soup': (1500, 500), 'Vegetable/Fruit': (709, 232)}


def print_counts(train_y, val_y, compare=True):
    """Prints how many images of each class there are.

    If the classes are food-11's, and the counts differ from those of the complete food-11, prints
    these beside them. compare=False: never.
    """
    titles = ['training', 'validation']
    counts = np.stack([np.bincount(train_y, minlength=len(CLASSES)),
                       np.bincount(val_y, minlength=len(CLASSES))], axis=1)  # [11, 2]
    if compare and CLASSES == list(FOOD11_COUNTS):
        complete = np.array(list(FOOD11_COUNTS.values()))                    # [11, 2]
        if not np.array_equal(counts, complete):
            titles += ['food-11 training', 'food-11 validation']
            counts = np.hstack([counts, complete])                           # [11, 4]

    print_row('class', cells=titles, titles=titles)
    for label, name in enumerate(CLASSES):
        print_row(f'{label:>2} {name}', counts[label], titles)
    print_row('total', counts.sum(0), titles)
    if len(titles) > 2:
        print('The columns on the right are those of the complete food-11 (food-11/README.md).')


def print_row(name, cells, titles):
    """Prints a row of a table. Each cell is as wide as the title of its column."""
    row = f'{name:<18}'
    for cell, title in zip(cells, titles):
        row += f' {cell:>{len(title)}}'
    print(row)


def show_sample(axes, train_set, index):
    """The book's sample: one training image, with its label as title, on matplotlib axes."""
    img, label = train_set[index]
    axes.imshow(to_rgb(img))
    axes.set_title(f'{label.item()}: {CLASSES[label]}')
    axes.set_xlabel(f'train_set[{index}]')
    axes.set_xticks([])
    axes.set_yticks([])


def to_rgb(img):
    """A float (3, H, W) BGR tensor as a (H, W, 3) RGB array, which is what matplotlib shows."""
    img = img.permute(1, 2, 0)  # [H, W, 3]
    img = img.flip(2)           # BGR -> RGB
    # After a step such as Normalize, there are numbers outside of 0..1.
    return img.clamp(0, 1).numpy()


def show_classes(axes, train_set, augmentations=4):
    """A grid with a column for each class: the class's first image at the top, and under it the
    same image, augmented several times."""
    first_indices = [first_of_class(train_set.y, label) for label in range(len(CLASSES))]
    plain_set = ImgDataset(train_set.x, train_set.y, test_transform)
    # A dataset for each row. train_set gives a different augmentation in each of its rows.
    datasets = [plain_set] + [train_set] * augmentations
    white = torch.ones(3, image_size, image_size)
    cells = []
    for dataset in datasets:
        for index in first_indices:
            img = white
            if index is not None:
                img, _ = dataset[index]
            cells.append(img)
    margin = 8  # pixels between the images
    # nrow: the number of images in a row. pad_value: 1 is white.
    grid = make_grid(cells, nrow=len(CLASSES), padding=margin, pad_value=1)
    axes.imshow(to_rgb(grid))

    column_names = []
    for label, index in enumerate(first_indices):
        # Long names are written on several lines.
        name = CLASSES[label].replace(' ', '\n').replace('/', '/\n')
        if index is None:
            name += '\n(none)'
        column_names.append(f'{label}\n{name}')
    row_names = ['as it is'] + ['augmented'] * augmentations
    name_columns_and_rows(axes, column_names, row_names, margin)


def name_columns_and_rows(axes, column_names, row_names, margin):
    """Writes names above the columns and beside the rows of a grid of images."""
    first_centre = margin + image_size / 2
    distance = margin + image_size
    axes.xaxis.tick_top()
    axes.set_xticks(first_centre + distance * np.arange(len(column_names)), column_names,
                    fontsize=8)
    axes.set_yticks(first_centre + distance * np.arange(len(row_names)), row_names, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def first_of_class(y, label):
    """The index of the first image with this label, or None if there is none."""
    indices = torch.nonzero(y == label)
    if len(indices) == 0:
        return None
    return indices[0].item()


def use_chinese_font():
    """Lets matplotlib draw Chinese class names, if one of these fonts is installed."""
    if ''.join(CLASSES).isascii():
        return
    installed = {font.name for font in font_manager.fontManager.ttflist}
    # Noto's file holds a font for each of several languages. Older versions of matplotlib see only
    # the first one, the Japanese, which has the Chinese characters too.
    fonts = ['Microsoft YaHei', 'SimHei', 'PingFang SC', 'Arial Unicode MS', 'Noto Sans CJK SC',
             'Noto Sans CJK JP', 'WenQuanYi Zen Hei']
    rcParams['font.family'] = ['sans-serif', *[font for font in fonts if font in installed]]


def show_preview(train_set, index, file=None):
    """Shows a sample and all classes in a window, or writes them into `file` as a picture.

    Without a display, the picture is written into chapter2_1_data.png.
    """
    # pyplot is the part of matplotlib that opens windows. chapter2_2_train.py does not need it, so
    # it is imported here only.
    from matplotlib import pyplot as plt
    use_chinese_font()
    figure = plt.figure(figsize=(12.6, 4.6), layout='constrained')  # inches
    left, right = figure.subplots(1, 2, width_ratios=(1, 2.9))
    show_sample(left, train_set, index)
    show_classes(right, train_set)
    # None: matplotlib has found no display to open windows on.
    has_display = figure.canvas.required_interactive_framework is not None
    if file is None and has_display:
        plt.show()
        return
    file = Path(file or 'chapter2_1_data.png')
    # Without a format, savefig would add .png to a name that has no ending.
    picture_format = file.suffix[1:].lower() or 'png'
    if picture_format not in ('png', 'jpg', 'jpeg', 'pdf', 'svg'):
        raise UserError(f'cannot write the picture {file}: its name must end in .png, .jpg, .pdf '
                        'or .svg')
    try:
        figure.savefig(file, dpi=100, format=picture_format)
    except OSError as error:
        raise UserError(f'cannot write the picture {file}: {error.strerror}') from None
    print(f'picture written to {file.absolute()}')


# ---- The script ------------------------------------------------------------------------------

def main():
    # --help begins with the text at the top of this file. RawDescription keeps its lines.
    parser = argparse.ArgumentParser(usage='%(prog)s [options]', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument('--index', type=int, metavar='N',
                        help='which training image to show (default: 100)')
    parser.add_argument('--save', metavar='FILE',
                        help='write the picture into FILE (default: open a window)')
    args = parser.parse_args()

    folder = data_dir
    if args.data_dir is not None:
        folder = args.data_dir
    if args.demo:
        folder = demo_dir
        make_demo(folder)
    train_x, train_y, val_x, val_y = read_food11(folder)
    print(train_x.shape)
    print_counts(train_y, val_y, compare=not args.demo)

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


def add_data_arguments(parser):
    """Adds the arguments that both scripts have."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument('--data-dir', metavar='DIR',
                       help=f'folder that holds training/ and validation/ (default: {data_dir})')
    where.add_argument('--demo', action='store_true',
                       help=f'make a small food-11 of drawn dishes in {demo_dir}, and use it')


def make_demo(folder):
    """Makes a small food-11 of drawn dishes in a folder."""
    # The fake photographs are those of the tests. Imported here, because only --demo needs them.
    from tests.fake_food11 import draw_food11
    # Deletes the dishes of an earlier demo whose classes have been removed from CLASSES since.
    for file in Path(folder).glob('*/*_*.jpg'):
        label = file.name.split('_')[0]
        if label.isdecimal() and int(label) >= len(CLASSES):
            file.unlink()
    draw_food11(folder, class_count=len(CLASSES))


def run_script(script_main):
    """Calls a script's main function. A UserError ends in a message on stderr and status 1."""
    # If stdout goes into a file on Windows, its encoding may lack characters of a path. They are
    # then written as numbers. (stdout in a notebook cannot be reconfigured, and need not be.)
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='backslashreplace')
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        script_main()
    except (UserError, OSError) as error:
        # OSError: a file or folder cannot be read or written. Its text says which one.
        sys.exit(f'error: {error}')
    except torch.OutOfMemoryError as error:
        # Of a GPU. Its text goes on with advice for programmers.
        sys.exit(f'error: {str(error).splitlines()[0]} See "Troubleshooting" in README.md')
    except KeyboardInterrupt:
        ignore_signals()
        print('interrupted', file=sys.stderr)
        sys.exit(130)  # the usual status after Ctrl-C


# When the last signal was handled, in seconds.
interrupted_time = -math.inf


def interrupt(number, frame):
    """Turns Ctrl-C (SIGINT) and the system's request to end (SIGTERM) into a KeyboardInterrupt."""
    global interrupted_time
    # A second signal within a second is ignored: torchrun sends SIGTERM right after a Ctrl-C.
    if time.monotonic() - interrupted_time < 1:
        return
    interrupted_time = time.monotonic()
    if hasattr(signal, 'SIGCHLD'):
        # A terminal sends Ctrl-C to the loader's workers as well, and they end. SIGCHLD says so to
        # PyTorch, which would raise an error while the script prints its last message.
        signal.signal(signal.SIGCHLD, ignore)
    raise KeyboardInterrupt


def ignore_signals():
    """Ignores further signals, so that they do not interrupt what the script still has to say."""
    signal.signal(signal.SIGINT, ignore)
    signal.signal(signal.SIGTERM, ignore)


def ignore(number, frame):
    """A signal handler that does nothing.

    Used instead of signal.SIG_IGN: if a signal has arrived just before, Python still calls the
    handler for it, and would print an error because SIG_IGN is not a function.
    """


if __name__ == '__main__':
    run_script(main)
