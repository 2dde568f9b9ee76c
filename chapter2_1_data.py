"""Section 2.2 of the book: the food-11 photographs as arrays, as a dataset and as batches.

    python chapter2_1_data.py                       counts the photographs in ./food-11, shows some
    python chapter2_1_data.py --index 7             shows train_set[7] instead of train_set[100]
    python chapter2_1_data.py --save preview.png    writes the picture into a file
    python chapter2_1_data.py --data-dir my-photos  your own photographs, in a folder for each class
    python chapter2_1_data.py --demo                needs no photographs: draws some dishes first
"""
import argparse
import os
import re
import sys
from collections import defaultdict
from importlib.util import find_spec
from multiprocessing.pool import ThreadPool
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from tqdm import tqdm

data_dir = './food-11'
demo_dir = './food-11-demo'

# The names of the labels 0 to 10. Photographs in folders have the folders' names instead.
CLASSES = ['Bread', 'Dairy product', 'Dessert', 'Egg', 'Fried food', 'Meat',
           'Noodles/Pasta', 'Rice', 'Seafood', 'Soup', 'Vegetable/Fruit']

# Width and height in pixels. The first Linear layer in chapter2_2_train.py depends on it.
image_size = 128

batch_size = 128


class UserError(Exception):
    """A mistake of the user: the scripts print its message, and no traceback."""


# ---- Reading the photographs -----------------------------------------------------------------

def readfile(path, classes=CLASSES):
    """Reads the labelled photographs in a folder such as food-11/training (section 2.2).

    Returns x, uint8 (N, 128, 128, 3), BGR, and y, uint8 (N,), the positions of the labels in
    `classes`, in the order of list_images. Raises UserError if there are no photographs, or if
    some files cannot be used; it names them.
    """
    image_files = list_images(path)
    x = np.zeros((len(image_files), image_size, image_size, 3), dtype=np.uint8)
    # The smallest type for the labels: uint8, as in the book, unless there are over 256 classes.
    y = np.zeros(len(image_files), dtype=np.min_scalar_type(len(classes) - 1))
    bad_files = []
    for i, img in enumerate(read_images(image_files)):
        label = label_of(image_files[i], path, classes)
        if img is None:
            bad_files.append(f'{image_files[i]}: cannot be read as an image')
        elif label is None:
            bad_files.append(f'{image_files[i]}: its folder is not one of the classes, and its '
                             f'name has no label in 0..{len(classes) - 1} in front, as in 3_17.jpg')
        else:
            x[i] = img
            y[i] = label
    if bad_files:
        raise UserError(bad_files_message(bad_files))
    return x, y


def read_images(image_files):
    """Reads photographs on all CPU cores. Returns a list of what read_image returns for each.

    A warning on stderr names those that are cut off, or ten of them.
    """
    # Silences OpenCV's own messages, which do not say which file they are about. setLogLevel is in
    # cv2.utils.logging (OpenCV 5) or in cv2 (OpenCV 4).
    getattr(cv2.utils, 'logging', cv2).setLogLevel(0)
    # Threads are enough, as OpenCV lets other threads run while it decodes. imap keeps the order.
    with ThreadPool() as threads:
        # disable=None: no progress bar if stderr is not a terminal.
        images = list(tqdm(threads.imap(read_image, image_files), 'reading', len(image_files),
                           leave=False, disable=None))
    cut_off = []
    for i, file in enumerate(image_files):
        if images[i] is None:
            images[i] = read_image(file, is_cut_off=True)
            if images[i] is not None:
                cut_off.append(str(file))
    if cut_off:
        print(f'warning: cut off, so that a part of the picture may be grey: {len(cut_off)} of '
              f'{len(image_files)} photographs, {", ".join(cut_off[:10])}', file=sys.stderr)
    return images


def read_image(file, is_cut_off=False):
    """Reads one photograph as uint8 (128, 128, 3), BGR. Returns None if it cannot be read.

    is_cut_off: to read a JPEG whose end is missing, as the book's cv2.imread does too.
    """
    # cv2.imread cannot open a path with Chinese characters on Windows. Therefore Python reads the
    # bytes, and imdecode turns them into the same pixels.
    try:
        file_bytes = Path(file).read_bytes()
        if is_cut_off and file_bytes.startswith(b'\xff\xd8'):
            # Unlike imread, imdecode insists on the two bytes that are the end of a JPEG.
            file_bytes += b'\xff\xd9'
        img = cv2.imdecode(np.frombuffer(file_bytes, dtype=np.uint8), cv2.IMREAD_COLOR)
    except (OSError, cv2.error):
        return None
    if img is None:
        return None
    return cv2.resize(img, (image_size, image_size))


def list_images(path):
    """The photographs in a folder, and in the folders within it, as sorted Paths.

    If nobody has divided the photographs into training and validation, food-11/training and
    food-11/validation stand for parts of those in food-11. Raises UserError if there are none.
    """
    path = Path(path)
    # There is no food-11/training: then it stands for four fifths of what is in food-11.
    is_part = path.name in ('training', 'validation')
    if is_part and not path.is_dir() and not is_divided(path.parent):
        return every_fifth(list_images(path.parent), path.name)
    image_files = []
    # os.walk, because Path.rglob does not follow links to folders.
    for folder, _, names in os.walk(path, followlinks=True):
        image_files += [Path(folder, name) for name in names]
    image_files = [file for file in image_files if is_image(file.relative_to(path))]
    if not image_files:
        raise UserError(f'no photographs in {path.absolute()}: food-11/README.md says where to get '
                        'those of food-11, and how to arrange photographs')
    # Sorted as texts, as in the book. Windows would sort paths without regard to case.
    return sorted(image_files, key=str)


def is_divided(folder):
    """Whether the photographs in a data folder are divided into training and validation."""
    return os.path.isdir(os.path.join(folder, 'training'))


def every_fifth(image_files, part):
    """Divides photographs: every fifth is for 'validation', the others are for 'training'."""
    if len(image_files) < 5:
        raise UserError(f'{len(image_files)} photographs are too few to divide, for example '
                        f'{image_files[0]}: at least 5 are needed')
    if part == 'validation':
        return image_files[4::5]
    return [file for i, file in enumerate(image_files) if i % 5 != 4]


def is_image(file):
    """Whether a file is to be read as a photograph: not if it is hidden, or of another kind.

    A list of the endings that photographs have would leave out some, and nobody would notice.
    """
    # The first characters of hidden files and folders on Linux, macOS and Synology's disks.
    hidden = ('.', '__MACOSX', '@eaDir')
    # Notes and tables of people, and what Windows leaves behind.
    other_kinds = ('.csv', '.db', '.ini', '.json', '.md', '.txt')
    if any(part.startswith(hidden) for part in file.parts):
        return False
    return file.suffix.lower() not in other_kinds


def label_of(file, path, classes):
    """The label of a photograph in the folder `path`, or None if it has none.

    That of path/Egg/17.jpg is the position of Egg in `classes`. That of path/3_17.jpg is 3, if the
    classes are those of food-11.
    """
    *folders, name = Path(os.path.relpath(file, path)).parts
    # If the photographs are not divided, they are beside path: in ../Egg.
    folders = [folder for folder in folders if folder != '..']
    if folders:
        if folders[0] in classes:
            return classes.index(folders[0])
        return None
    # The book's code expects 3_17.jpg, its text says 3-17.jpg.
    match = re.match('([0-9]+)[_-]', name)
    if match and is_food11(classes) and int(match.group(1)) < len(classes):
        return int(match.group(1))
    return None


def is_food11(classes):
    """Whether these are CLASSES, or Kaggle's folders of them: Noodles-Pasta, Vegetable-Fruit."""
    return classes in (CLASSES, [name.replace('/', '-') for name in CLASSES])


def bad_files_message(bad_files):
    """What to tell the user about files that cannot be used. bad_files: texts 'file: reason'."""
    if len(bad_files) == 1:
        return f'{bad_files[0]}; repair, rename or delete this file'
    lines = [f'{len(bad_files)} files cannot be used; repair, rename or delete them:']
    lines += bad_files[:10]
    if len(bad_files) > 10:
        lines.append(f'and {len(bad_files) - 10} more')
    return '\n  '.join(lines)


def find_classes(folder):
    """The names of the classes of the photographs in a data folder such as ./food-11.

    If the photographs are in folders, these are the sorted names of the folders, as in
    torchvision's ImageFolder; if they lie in training itself, they are CLASSES. Raises UserError if
    it is not a data folder.
    """
    train_dir = Path(folder)
    if is_divided(folder):
        train_dir = train_dir / 'training'
    names = {file.relative_to(train_dir).parts[0] for file in list_images(train_dir)
             if file.parent != train_dir}
    if is_divided(folder) and not names:
        return CLASSES
    refuse_wrong_folder(folder, names)
    return sorted(names)


def refuse_wrong_folder(folder, names):
    """Raises UserError if the folders with these names are no classes. It says which data folder
    was probably meant."""
    here = Path(folder).resolve()
    if is_divided(folder):
        if len(names) == 1:
            raise UserError(f'{here} has only one class for training: {", ".join(names)}')
        return
    # Too high up: training, or the only folder with photographs, is further down.
    meant = [training.parent for training in (*here.glob('*/training'), *here.glob('*/*/training'))]
    if len(names) == 1 and any(path.is_dir() for path in (here / min(names)).iterdir()):
        meant.append(here / min(names))
    # Too deep: food-11/training, or food-11/training/Egg.
    if here.name in ('training', 'validation'):
        meant.append(here.parent)
    if here.parent.name in ('training', 'validation') and not names:
        meant.append(here.parent.parent)
    if meant:
        raise UserError(f'{here} does not hold the folders training and validation, nor a folder '
                        f'for each class: did you mean --data-dir "{meant[0]}"?')
    if len(names) < 2 or {'train', 'training', 'validation'} & {name.lower() for name in names}:
        raise UserError(f'{here} should hold two folders called training and validation, or a '
                        'folder for each of at least two classes: see food-11/README.md')


# ---- Dataset and transforms ------------------------------------------------------------------

class ImgDataset(Dataset):
    """Images, with labels or without (section 2.2). An item is the transformed image and its
    label, or the image alone if there are no labels.

    x: uint8 (N, 128, 128, 3), BGR. y: N labels, or None. transform: a function of one image.
    """

    def __init__(self, x, y=None, transform=None):
        # A tensor, which a loader's workers share. On Windows and macOS, each of them would get a
        # copy of an array.
        self.x = torch.as_tensor(x)
        self.y = y
        if y is not None:
            self.y = torch.as_tensor(y, dtype=torch.long)
        self.transform = transform

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        img = self.x[index].numpy()
        if self.transform is not None:
            img = self.transform(img)
        if self.y is None:
            return img
        return img, self.y[index]


# The book ends with ToTensor, which makes float32 in 0..1 of the bytes. PILToTensor leaves them as
# uint8 in 0..255, a quarter of the size; chapter2_2_train.py makes the float32 on the GPU.
# Normalize needs float32: with it, use ToTensor in all transforms. The channels are in OpenCV's
# order, BGR.
train_transform = transforms.Compose([
    transforms.ToPILImage(),
    transforms.RandomHorizontalFlip(),
    transforms.RandomRotation(15),  # by up to 15 degrees in either direction
    transforms.PILToTensor(),       # uint8 [3, 128, 128]
])

test_transform = transforms.Compose([
    transforms.ToPILImage(),
    transforms.PILToTensor(),
])

# Not in the book: for --recipe better of chapter2_2_train.py, instead of train_transform. It
# changes the images much more, so that the network cannot easily learn the photographs by heart.
better_transform = transforms.Compose([
    transforms.ToPILImage(),
    # A rectangle with 35% to 100% of the area, stretched to the whole size.
    transforms.RandomResizedCrop(image_size, scale=(0.35, 1)),
    transforms.RandomHorizontalFlip(),
    # One of 13 changes, such as rotation, contrast or sharpness, of a random strength, or none.
    transforms.TrivialAugmentWide(),
    transforms.PILToTensor(),
])


# ---- Looking at the data ---------------------------------------------------------------------

def show_sample(axes, train_set, index, title):
    """The book's sample: an image of a dataset, on matplotlib axes."""
    img, _ = train_set[index]
    img = img.permute(1, 2, 0)  # [3, 128, 128] -> [128, 128, 3]
    img = img.flip(2)           # BGR -> RGB
    axes.imshow(img.numpy())
    axes.set_title(title, fontsize=8)


def show_classes(figure, train_set, classes):
    """A grid with a column for each class, at most 20: the class's first image at the top, and
    under it the same image, augmented four times."""
    plain_set = ImgDataset(train_set.x, train_set.y, test_transform)
    rows = [plain_set, train_set, train_set, train_set, train_set]
    classes = classes[:20]
    cells = figure.subplots(len(rows), len(classes), squeeze=False)
    for row, dataset in enumerate(rows):
        for label, name in enumerate(classes):
            axes = cells[row, label]
            axes.set_axis_off()
            # Long names are written on several lines.
            title = f'{label}\n' + name.replace(' ', '\n').replace('/', '/\n')
            if row > 0:
                title = ''
            indices = torch.nonzero(train_set.y == label)
            if len(indices) > 0:
                show_sample(axes, dataset, indices[0].item(), title)
            elif row == 0:
                axes.set_title(f'{title}\n(none)', fontsize=8)


def show_preview(train_set, index, classes, file=None):
    """Shows a sample and all classes in a window, or writes them into `file` as a picture.

    Without a display, the picture is written into chapter2_1_data.png.
    """
    prepare_matplotlib()
    from matplotlib import pyplot as plt
    figure = plt.figure(figsize=(12.6, 4.6), layout='constrained')  # inches
    left, right = figure.subfigures(1, 2, width_ratios=(1, 2.9))
    label = train_set.y[index].item()
    show_sample(left.subplots(), train_set, index, f'train_set[{index}]\n{label}: {classes[label]}')
    show_classes(right, train_set, classes)
    # matplotlib knows no framework for windows if there is no display.
    has_display = figure.canvas.required_interactive_framework is not None
    if file is None and has_display:
        plt.show()
        return
    file = Path(file or 'chapter2_1_data.png')
    try:
        # Without a format, savefig would add .png to a name that has no ending.
        figure.savefig(file, dpi=100, format=file.suffix[1:] or 'png')
    except (OSError, ValueError) as error:
        # ValueError: the name ends in something that is no format of pictures.
        raise UserError(f'cannot write the picture {file}: {error}') from None
    print(f'picture written to {file.absolute()}')


def prepare_matplotlib():
    """To be called before the first picture is drawn. Imports matplotlib, which is not imported
    at the top of the scripts, as its import fails if the backend is missing."""
    # The backend is what shows pictures. A script that a notebook has started with ! inherits the
    # notebook's, a module that may be missing where the script runs.
    backend = os.environ.get('MPLBACKEND', '')
    module = backend.removeprefix('module://').split('.')[0]
    if backend == 'inline' or (backend.startswith('module://') and not find_spec(module)):
        del os.environ['MPLBACKEND']
    from matplotlib import font_manager, rcParams
    # A $ in the name of a class or a file is a $, and does not begin a formula.
    rcParams['text.parse_math'] = False
    # For Chinese names of classes and files: those of these fonts that are installed.
    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ['Microsoft YaHei', 'SimHei', 'PingFang SC', 'Arial Unicode MS', 'Noto Sans CJK SC',
             'Noto Sans CJK JP', 'WenQuanYi Zen Hei']
    rcParams['font.family'] = ['sans-serif', *[font for font in fonts if font in installed]]


def print_counts(train_y, val_y, classes):
    """Prints how many images of each class there are."""
    print(f'{"class":<24} training validation')
    for label, name in enumerate(classes):
        print(f'{label:>3} {name:<20} {(train_y == label).sum():>8} {(val_y == label).sum():>10}')
    print(f'{"total":<24} {len(train_y):>8} {len(val_y):>10}')
    # CLASSES may have been edited for other photographs.
    if is_food11(classes) and 'Bread' in classes and (len(train_y), len(val_y)) != (9866, 3430):
        print('the complete food-11 has 9866 training and 3430 validation photographs')


def print_repeated(train_x, train_y, val_x, val_y, files):
    """Says how many photographs are both in training and in validation, or have two labels.

    They make the validation accuracy too high, or too low. files: those of train_x and val_x.
    """
    labels = np.concatenate([train_y, val_y])
    # For each different image, the positions at which it stands: first those in train_x.
    positions = defaultdict(list)
    for i, img in enumerate([*train_x, *val_x]):
        positions[hash(img.tobytes())].append(i)
    in_both = [same for same in positions.values() if same[0] < len(train_x) <= same[-1]]
    two_labels = [same for same in positions.values() if len(set(labels[same])) > 1]
    for repeated, what in ((in_both, 'both in training and in validation'),
                           (two_labels, 'under more than one label')):
        if repeated:
            example = ' and '.join(str(files[i]) for i in repeated[0])
            print(f'note: photographs that are {what}: {len(repeated)}, for example {example}')


# ---- The script ------------------------------------------------------------------------------

def main(arguments=None):
    """arguments: those of the command line, which a notebook may give: main(['--index', '7'])."""
    # --help begins with the text at the top of this file.
    parser = argparse.ArgumentParser(usage='%(prog)s [options]', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument('--index', type=int, metavar='N',
                        help='which training image to show (default: 100)')
    parser.add_argument('--save', type=os.path.expanduser, metavar='FILE',
                        help='write the picture into FILE (default: open a window)')
    args = parser.parse_args(arguments)
    folder = args.data_dir
    if args.demo:
        folder = demo_dir
        make_demo()

    classes = find_classes(folder)
    train_dir = os.path.join(folder, 'training')
    val_dir = os.path.join(folder, 'validation')
    train_x, train_y = readfile(train_dir, classes)
    val_x, val_y = readfile(val_dir, classes)
    print(train_x.shape)
    if not is_divided(folder):
        print(f'{folder} has no folder training: every fifth photograph is for validation')
    print_counts(train_y, val_y, classes)
    print_repeated(train_x, train_y, val_x, val_y, list_images(train_dir) + list_images(val_dir))

    train_set = ImgDataset(train_x, train_y, train_transform)
    val_set = ImgDataset(val_x, val_y, test_transform)
    train_loader = DataLoader(train_set, batch_size=batch_size, shuffle=True)
    val_loader = DataLoader(val_set, batch_size=batch_size, shuffle=False)
    print(f'batches of {batch_size}: {len(train_loader)} training, {len(val_loader)} validation')

    index = args.index
    if index is None:
        index = min(100, len(train_set) - 1)
    if index not in range(len(train_set)):
        raise UserError(f'--index {index}: must be in 0..{len(train_set) - 1}, as there are '
                        f'{len(train_set)} training images')
    show_preview(train_set, index, classes, args.save)


def add_data_arguments(parser):
    """Adds the arguments that both scripts have."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument('--data-dir', type=os.path.expanduser, metavar='DIR', default=data_dir,
                       help='folder that holds training/ and validation/, or a folder for each '
                       'class (default: %(default)s)')
    where.add_argument('--demo', action='store_true',
                       help=f'draw a small food-11 into {demo_dir}, and use it')


def make_demo():
    """Draws a small food-11 into demo_dir."""
    # The drawn dishes are those of the tests. Imported here, because only --demo needs them.
    from tests.fake_food11 import draw_food11
    draw_food11(demo_dir, class_count=len(CLASSES))


def run_script(main):
    """Calls the main function of a script. A mistake of the user ends in one line on stderr."""
    # If stdout goes into a file on Windows, its encoding may lack characters of a path.
    sys.stdout.reconfigure(errors='backslashreplace')
    try:
        main()
    except UserError as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)  # the usual status after Ctrl-C


if __name__ == '__main__':
    run_script(main)
