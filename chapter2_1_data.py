"""Section 2.2 of the book: the food-11 photographs as arrays, as a dataset and as batches.

    python chapter2_1_data.py                       counts the photographs in ./food-11, shows some
    python chapter2_1_data.py --index 7             shows train_set[7] instead of train_set[100]
    python chapter2_1_data.py --save preview.png    writes the picture into a file
    python chapter2_1_data.py --data-dir my-photos  your own photographs, in a folder for each class
    python chapter2_1_data.py --demo                needs no photographs: draws some dishes first
"""
import argparse
import contextlib
import hashlib
import io
import os
import re
import signal
import sys
import threading
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from tqdm import tqdm

data_dir = './food-11'
demo_dir = './food-11-demo'

# The names of the labels 0 to 10 in food-11, spelled as Kaggle's folders are.
CLASSES = ['Bread', 'Dairy product', 'Dessert', 'Egg', 'Fried food', 'Meat',
           'Noodles-Pasta', 'Rice', 'Seafood', 'Soup', 'Vegetable-Fruit']

# Width and height in pixels. The first Linear layer in chapter2_2_train.py depends on it.
image_size = 128

batch_size = 128

# Until this time.monotonic(), Ctrl-C has no effect: see ignore_interruptions.
interrupted_until = 0


# ---- Mistakes of the user --------------------------------------------------------------------

class UserError(Exception):
    """A mistake of the user: the scripts print its message, and no traceback."""


def refuse_files(files, problem):
    """Raises UserError if there are files (or folders) with a problem. The message names them, or
    the first ten. problem: what follows a file's name in a sentence."""
    if len(files) == 1:
        raise UserError(f'{files[0]} {problem}')
    if files:
        lines = [f'{len(files)} places, each of which {problem}:', *map(str, files[:10])]
        if len(files) > 10:
            lines.append(f'and {len(files) - 10} more')
        raise UserError('\n  '.join(lines))


NO_IMAGE = 'cannot be read as an image; repair, rename or delete it'


# ---- Reading the photographs -----------------------------------------------------------------

def read_image(file):
    """Reads one photograph, and resizes it: the book's cv2.imread and cv2.resize (section 2.2).

    Returns uint8 (128, 128, 3), BGR, or None if the file is not an image. Raises UserError with the
    system's reason if the system does not let it be read.
    """
    # cv2.imread cannot open a path with Chinese characters on Windows. Therefore Python reads the
    # bytes, and imdecode turns them into the same pixels.
    try:
        file_bytes = Path(file).read_bytes()
    except OSError as error:
        raise UserError(f'cannot read {file}: {error.strerror}') from None
    # A JPEG whose end is missing is read as far as it goes, as imread does. imdecode does so only
    # if the two bytes that end a JPEG are there. At the end of a whole one, two more do no harm.
    if file_bytes.startswith(b'\xff\xd8'):
        file_bytes += b'\xff\xd9'
    # OpenCV's own warnings do not say which file they are about. setLogLevel is in
    # cv2.utils.logging (OpenCV 5) or in cv2 (OpenCV 4).
    getattr(cv2.utils, 'logging', cv2).setLogLevel(0)
    try:
        img = cv2.imdecode(np.frombuffer(file_bytes, dtype=np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        # An empty file, or one with more pixels than OpenCV accepts.
        return None
    if img is None:
        return None
    return cv2.resize(img, (image_size, image_size))


def readfile(path, classes=CLASSES):
    """Reads photographs and their labels (section 2.2).

    path: a folder such as food-11/training, whose classes are `classes`; or a list of pairs
    (file, label), as find_photographs returns them.
    Returns x, uint8 (N, 128, 128, 3), BGR, and y, the labels (N,), uint8 or, above 255, uint16.
    Raises UserError if some photographs have no label, or if some cannot be read.
    """
    if isinstance(path, list):
        labelled = path
    else:
        # The sorted files in the folder. The label of 3_17.jpg is 3, as in the book; labelled_files
        # says what else is possible.
        labelled = all_labelled(path, classes)
    image_files = [file for file, _ in labelled]
    labels = [label for _, label in labelled]
    x = np.zeros((len(labels), image_size, image_size, 3), dtype=np.uint8)
    y = np.zeros(len(labels), dtype=np.min_scalar_type(max(labels, default=0)))
    bad_files = []
    # img is read_image(image_files[0]), then read_image(image_files[1]), and so on.
    for i, img in enumerate(in_threads(read_image, image_files, 'reading')):
        if img is None:
            bad_files.append(image_files[i])
            continue
        x[i] = img
        y[i] = labels[i]
    refuse_files(bad_files, NO_IMAGE)
    return x, y


def in_threads(function, items, title):
    """Yields function(item) for each item, in order, while several threads call the function for
    the next ones. A progress bar shows how many are done."""
    # Threads are enough, as OpenCV lets other threads run while it decodes. At most 8, because each
    # holds a whole photograph in memory.
    with (ThreadPoolExecutor(min(core_count(), 8)) as threads,
          progress_bar(items, title) as bar):
        try:
            # 64 at a time, so that not all results wait in memory if the first one takes long.
            for start in range(0, len(items), 64):
                for result in threads.map(function, items[start:start + 64]):
                    yield result
                    bar.update()
        finally:
            # After Ctrl-C, only the calls that have begun are waited for.
            threads.shutdown(cancel_futures=True)


def progress_bar(items, title):
    """tqdm's progress bar for these items, on a terminal or in a notebook, but not in a file."""
    on_terminal = isinstance(sys.stderr, io.TextIOWrapper) and sys.stderr.isatty()
    # Jupyter, Spyder and VS Code run Python in an ipykernel. IDLE's window cannot show a bar.
    in_notebook = 'ipykernel' in sys.modules
    return tqdm(items, title, leave=False, disable=not on_terminal and not in_notebook)


def core_count():
    """How many CPU cores this process may use: Slurm and Docker may allow fewer than there are."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    # On Windows and macOS, all of them.
    return os.cpu_count()


# ---- The data folder -------------------------------------------------------------------------

README = ('the photographs for training are in --data-dir; food-11/README.md says where to get '
          'some, and how to arrange them')


def find_photographs(data_dir):
    """Finds the photographs in a data folder such as ./food-11. It holds either

    - training and validation, with photographs whose names begin with the label, as 3_17.jpg;
    - training and validation, with a folder for each class in both; or
    - a folder for each class. Then about a fifth of the photographs is for validation: which ones,
      depends on their names.

    Returns classes, the names of the labels 0, 1, ...; and train_files and val_files, sorted lists
    of pairs (file, label). Raises UserError if the folder holds something else.
    """
    data_dir = Path(data_dir)
    refuse_missing(data_dir)
    train_dir, val_dir = data_dir / 'training', data_dir / 'validation'
    # lexists is true for a link that leads nowhere, too: list_images says what is wrong with it.
    if os.path.lexists(train_dir) and os.path.lexists(val_dir):
        classes = class_folders(train_dir)
        if classes:
            refuse_unless_classes(classes, train_dir)
        else:
            # The photographs lie in training itself.
            classes = CLASSES
        train_files = all_labelled(train_dir, classes)
        val_files = all_labelled(val_dir, classes)
    else:
        refuse_misplaced(data_dir)
        classes = class_folders(data_dir)
        refuse_unless_classes(classes, data_dir)
        train_files, val_files = [], []
        for file, label in all_labelled(data_dir, classes):
            if is_for_validation(file, data_dir):
                val_files.append((file, label))
            else:
                train_files.append((file, label))
    refuse_untrained(train_files, val_files, classes)
    return classes, train_files, val_files


def refuse_missing(path):
    """Raises UserError, with the system's reason, if the system finds nothing at `path`."""
    try:
        os.stat(path)
    except OSError as error:
        raise UserError(f'cannot read {path.absolute()}: {error.strerror}; {README}') from None


def list_images(folder):
    """The photographs in a folder, and in the folders within it, as sorted Paths.

    Raises UserError if there are none, or if one of the folders cannot be listed.
    """
    def refuse_folder(error):
        raise UserError(f'cannot read the folder {error.filename}: {error.strerror}')

    folder = Path(folder)
    image_files = []
    # os.walk, because Path.rglob leaves out what it cannot list.
    for parent, folders, names in os.walk(folder, onerror=refuse_folder, followlinks=True):
        # os.walk goes on with the folders that are left in its list.
        folders[:] = [name for name in folders
                      if not is_hidden(name) and not leads_back(Path(parent, name), folder)]
        image_files += [Path(parent, name) for name in names if is_image(name)]
    if not image_files:
        raise UserError(f'no photographs in {folder.absolute()}; {README}')
    # Sorted as texts, as in the book. Windows would sort paths without regard to case.
    return sorted(image_files, key=Path.as_posix)


def is_hidden(name):
    """Whether a file or folder of this name belongs to the system, and not to a person."""
    # What such names begin with on Linux, macOS, Synology's disks, and at the top of disks.
    return name.startswith(('.', '__MACOSX', '@eaDir', 'lost+found', '$RECYCLE.BIN',
                            'System Volume Information'))


def is_image(name):
    """Whether a file of this name is to be read as a photograph.

    A list of the endings that photographs have would leave out some, and nobody would notice.
    """
    # Notes and tables of people, and what Windows leaves behind.
    other_kinds = ('.csv', '.db', '.ini', '.json', '.md', '.txt')
    return not is_hidden(name) and not name.lower().endswith(other_kinds)


def leads_back(inner, folder):
    """Whether `inner` is a link that would have photographs read twice (a link into `folder`), or
    without an end (a link to what holds it, as food-11/training/Egg/link to food-11)."""
    target = inner.resolve()
    # A folder that is where its name says is no link.
    if target == inner.parent.resolve() / inner.name:
        return False
    # A link into the folder.
    if target.is_relative_to(folder.resolve()):
        return True
    # A link to what holds one of the folders on the way to it. For food-11/Egg/old/link in food-11,
    # these are food-11/Egg/old, food-11/Egg and food-11.
    holders = list(inner.parents)[:len(inner.relative_to(folder).parts)]
    return any(holder.resolve().is_relative_to(target) for holder in holders)


def readable(name):
    """The name of a file or folder as a text that can be compared, drawn and printed.

    macOS writes é, 김치 and パン with other characters than Windows does: NFC makes them the same.
    Bytes that are not UTF-8, as in zip files from a Chinese Windows, become \\x and their number.
    """
    text = os.fsencode(name).decode(errors='backslashreplace')
    return unicodedata.normalize('NFC', text)


def class_folders(folder):
    """The sorted names of the folders with photographs in a folder."""
    return sorted({readable(file.relative_to(folder).parts[0]) for file in list_images(folder)
                   if file.parent != folder})


def labelled_files(folder, classes):
    """The photographs in a folder as pairs (file, label), sorted by file. The label is None for
    those that have none, which only --predict of chapter2_2_train.py accepts.

    The label of Egg/17.jpg is the position of Egg in `classes`. That of 3_17.jpg, which lies in no
    folder, is 3 if the classes are CLASSES. The name must have two numbers: 01-05-2021.jpg has
    three, and is a date.
    """
    files = []
    for file in list_images(folder):
        label = None
        *folders, name = file.relative_to(folder).parts
        # Without the ending, which may have a number too, as .jp2.
        numbers = re.findall('[0-9]+', name.removesuffix(file.suffix))
        if folders:
            if readable(folders[0]) in classes:
                label = classes.index(readable(folders[0]))
        # The book's code expects 3_17.jpg, its text says 3-17.jpg.
        elif classes == CLASSES and re.match('[0-9]+[_-]', name) and len(numbers) == 2:
            if int(numbers[0]) < len(classes):
                label = int(numbers[0])
        files.append((file, label))
    return files


def all_labelled(folder, classes):
    """The same as labelled_files, but raises UserError if a photograph has no label."""
    folder = Path(folder)
    files = labelled_files(folder, classes)
    # Of a folder that is no class, the folder is named, and not each photograph in it.
    unlabelled = sorted({folder / file.relative_to(folder).parts[0]
                         for file, label in files if label is None})
    # os.walk lists a link that leads nowhere as a file, also in the place of a class folder. So
    # first: does each one exist?
    for path in unlabelled:
        refuse_missing(path)
    found = ', '.join(classes[:10])
    folders = [path for path in unlabelled if os.path.isdir(path)]
    refuse_files(folders, f'is not one of the class folders ({found}); rename or move it')
    problem = f'is not in one of the class folders ({found})'
    if classes == CLASSES:
        problem += (f', and has no label from 0 to {len(classes) - 1} and a number in its name, as '
                    '3_17.jpg')
    refuse_files(unlabelled, f'{problem}; rename or move it')
    return files


def is_for_validation(file, data_dir):
    """Whether a photograph that nobody has assigned to training or validation is for validation.

    Only its path within the data folder decides, such as Egg/17.jpg: adding or removing other
    photographs changes nothing.
    """
    name = readable(file.relative_to(data_dir).as_posix())
    # A number that looks random, but is always the same for a name.
    number = int(hashlib.sha256(name.encode()).hexdigest(), 16)
    return number % 5 == 4


def refuse_misplaced(data_dir):
    """Raises UserError if another folder was probably meant: not food-11 but food-11/food-11, as a
    zip file was unpacked into a folder of its own; or not food-11/training but food-11."""
    here = data_dir.resolve()
    others = [path.parent for path in (*here.glob('*/training'), *here.glob('*/*/training'))]
    if here.name in ('training', 'validation'):
        others.append(here.parent)
    for folder in others:
        if os.path.isdir(folder / 'training') and os.path.isdir(folder / 'validation'):
            raise UserError(f'{here} does not hold the folders training and validation: did you '
                            f'mean --data-dir "{folder}"?')


def refuse_unless_classes(classes, folder):
    """Raises UserError if there are fewer than two folders with photographs in `folder`, or if two
    of them are parts of a data set, and not classes: seg_train and seg_test differ in the word for
    a part only. (A class may be called train, beside bus and car.)"""
    wanted = ('a data folder holds the folders training and validation, or a folder for each of at '
              f'least two classes; the folders with photographs in {folder.absolute()}')
    found = ', '.join(classes[:10]) or 'none'
    if len(classes) < 2:
        raise UserError(f'{wanted} are: {found}; {README}')
    rests = [rest for rest in map(without_part, classes) if rest is not None]
    # Two equal rests: two parts of the same data set.
    if len(set(rests)) < len(rests):
        raise UserError(f'{wanted} are called like parts of a data set: {found}; {README}')


def without_part(name):
    """The words of a folder's name without those for a part of a data set, and without set, data
    and images: ('seg',) for seg_train and seg_test, () for train_set and 验证集. None if no word is
    one for a part."""
    part = ('(train|training|val|valid|validate|validation|test|testing|eval|evaluation|dev|pred|'
            'labell?ed|unlabell?ed)(set|data|images)?|.*(训练|验证|测试|訓練|驗證|測試).*')
    words = re.findall('[^0-9_\\W]+', name.lower())
    rest = [word for word in words if not re.fullmatch(part, word)]
    if rest == words:
        return None
    return tuple(word for word in rest if word not in ('set', 'data', 'images'))


def refuse_untrained(train_files, val_files, classes):
    """Raises UserError if a class is in validation only, or if nothing is for validation."""
    untrained = {label for _, label in val_files} - {label for _, label in train_files}
    lacking = [f'training of {classes[label]}' for label in sorted(untrained)]
    if not val_files:
        lacking.append('validation')
    if lacking:
        raise UserError(f'there are no photographs for {", ".join(lacking[:10])}; add some. Of a '
                        'folder for each class, about a fifth of the photographs is for '
                        'validation, unless you divide them into training and validation')


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
# Normalize needs float32: with it, use ToTensor in all transforms. chapter2_2_train.py leaves what
# is float32 as it is. The channels are in OpenCV's order, BGR.
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
    for label, name in enumerate(classes):
        # Long names are written on several lines.
        title = f'{label}\n' + name.replace(' ', '\n').replace('-', '-\n')
        indices = torch.nonzero(train_set.y == label)
        if len(indices) == 0:
            cells[0, label].set_title(f'{title}\n(none)', fontsize=8)
        for row, dataset in enumerate(rows):
            cells[row, label].set_axis_off()
            if len(indices) > 0:
                show_sample(cells[row, label], dataset, indices[0].item(), title)
            # Only the first row has titles.
            title = ''


def forget_notebooks_backend():
    """Lets matplotlib choose its backend (what shows pictures) where a notebook's is missing.

    A script that a notebook has started with ! inherits the environment variable MPLBACKEND. If it
    names what is missing where the script runs, importing matplotlib fails. So this must be called
    first, and matplotlib is not imported at the top of the scripts.
    """
    backend = os.environ.get('MPLBACKEND', '')
    module = backend.removeprefix('module://').split('.')[0]
    # inline is a name that older versions do not know.
    if backend == 'inline' or (backend.startswith('module://') and not find_spec(module)):
        del os.environ['MPLBACKEND']


@contextlib.contextmanager
def picture_settings():
    """matplotlib's settings for our pictures. They hold within a with-block."""
    forget_notebooks_backend()
    from matplotlib import font_manager, rc_context
    installed = {font.name for font in font_manager.fontManager.ttflist}
    # For Chinese names of classes and files: those of these fonts that are installed.
    fonts = ['Microsoft YaHei', 'SimHei', 'PingFang SC', 'Arial Unicode MS', 'Noto Sans CJK SC',
             'Noto Sans CJK JP', 'WenQuanYi Zen Hei']
    with rc_context({
            'font.family': ['sans-serif', *[font for font in fonts if font in installed]],
            # A $ in the name of a class or a file is a $, and does not begin a formula.
            'text.parse_math': False}):
        yield


def show_preview(train_set, index, classes, file=None):
    """Shows a sample and all classes in a window, or writes them into `file` as a picture.

    Where no window can be made, the picture is written into chapter2_1_data.png.
    """
    with picture_settings():
        from matplotlib import pyplot as plt
        from matplotlib.figure import Figure
        window = None
        if file is None:
            window = make_window()
        # A figure that is not pyplot's needs no window system.
        figure = window or Figure()
        figure.set_size_inches(12.6, 4.6)
        figure.set_layout_engine('constrained')
        left, right = figure.subfigures(1, 2, width_ratios=(1, 2.9))
        label = train_set.y[index].item()
        title = f'train_set[{index}]\n{label}: {classes[label]}'
        show_sample(left.subplots(), train_set, index, title)
        show_classes(right, train_set, classes)
        if window is not None:
            # block: also in IPython, where show would return at once.
            plt.show(block=True)
            plt.close(window)
            return
        file = Path(file or 'chapter2_1_data.png')
        try:
            # Without a format, savefig would add .png to a name that has no ending.
            figure.savefig(file, dpi=100, format=file.suffix[1:] or 'png')
        except (OSError, ValueError) as error:
            # ValueError: the name ends in something that is no format of pictures.
            raise UserError(f'cannot write the picture {file}: {error}') from None
    print(f'picture written to {readable(file.absolute())}')


def make_window():
    """A matplotlib figure in a window, or None where no window can be made."""
    from matplotlib import pyplot as plt
    # What plt.figure raises where no window can be made: ImportError without a display, TclError if
    # Tk is incomplete. Where there is no Tk at all, there is no TclError to catch either.
    errors = [ImportError]
    with contextlib.suppress(ImportError):
        from tkinter import TclError
        errors.append(TclError)
    try:
        figure = plt.figure()
    except tuple(errors):
        return None
    if figure.canvas.required_interactive_framework is None:
        # matplotlib has chosen a backend without windows.
        plt.close(figure)
        return None
    return figure


def print_counts(train_y, val_y, classes):
    """Prints how many images of each class there are."""
    print(f'{"class":<24} training validation')
    for label, name in enumerate(classes):
        print(f'{label:>3} {name:<20} {(train_y == label).sum():>8} {(val_y == label).sum():>10}')
    print(f'{"total":<24} {len(train_y):>8} {len(val_y):>10}')
    # Other data sets hardly have this class.
    if 'Dairy product' in classes and (len(train_y), len(val_y)) != (9866, 3430):
        print('the complete food-11 has 9866 training and 3430 validation photographs')


def print_repeated(train_x, train_files, val_x, val_files):
    """Says how many photographs are both for training and for validation, or have two labels."""
    first_places = {}
    repeated = []
    for part, x, files in (('training', train_x, train_files), ('validation', val_x, val_files)):
        for img, (file, label) in zip(x, files):
            first = first_places.setdefault(hash(img.tobytes()), (part, label, file))
            first_part, first_label, first_file = first
            if (part, label) != (first_part, first_label):
                repeated.append(readable(f'{first_file} and {file}'))
    if repeated:
        print('note: the same photograph is both for training and for validation, or has two '
              f'labels: {len(repeated)} times, for example {repeated[0]}')


# ---- The script ------------------------------------------------------------------------------

def main(arguments=None):
    """arguments: those of the command line, which a notebook may give: main(['--index', '7'])."""
    # --help begins with the text at the top of this file.
    parser = argparse.ArgumentParser(usage='%(prog)s [options]', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser, data_dir)
    parser.add_argument('--index', type=int, metavar='N',
                        help='which training image to show (default: 100)')
    parser.add_argument('--save', type=os.path.expanduser, metavar='FILE',
                        help='write the picture into FILE (default: open a window)')
    args = parser.parse_args(arguments)
    folder = args.data_dir
    if args.demo:
        folder = demo_dir
        make_demo()

    classes, train_files, val_files = find_photographs(folder)
    train_x, train_y = readfile(train_files)
    val_x, val_y = readfile(val_files)
    print(train_x.shape)
    print_counts(train_y, val_y, classes)
    print_repeated(train_x, train_files, val_x, val_files)

    train_set = ImgDataset(train_x, train_y, train_transform)
    val_set = ImgDataset(val_x, val_y, test_transform)
    train_loader = DataLoader(train_set, batch_size=batch_size, shuffle=True)
    val_loader = DataLoader(val_set, batch_size=batch_size, shuffle=False)
    print(f'batches of {batch_size}: {len(train_loader)} training, {len(val_loader)} validation')

    index = args.index
    if index is None:
        # The book's train_set[100], or the last one if there are fewer.
        index = min(100, len(train_set) - 1)
    if index not in range(len(train_set)):
        raise UserError(f'--index {index}: must be in 0..{len(train_set) - 1}, as there are '
                        f'{len(train_set)} training images')
    show_preview(train_set, index, classes, args.save)


def add_data_arguments(parser, default_dir):
    """Adds the arguments that both scripts have. default_dir: data_dir; chapter2_2_train.py gives
    SUPPRESS, because a continued run has saved its own folder."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument('--data-dir', type=os.path.expanduser, metavar='DIR', default=default_dir,
                       help='folder that holds training/ and validation/, or a folder for each '
                       'class; then a fifth of the photographs, chosen by their names, is for '
                       f'validation (default: {data_dir})')
    where.add_argument('--demo', action='store_true',
                       help=f'draw a small food-11 into {demo_dir}, and use it')


def make_demo():
    """Draws a small food-11 into demo_dir."""
    # The drawn dishes are those of the tests. Imported here, because only --demo needs them.
    from tests.fake_food11 import draw_food11
    draw_food11(demo_dir, class_count=len(CLASSES))


def run_script(main):
    """Calls the main function of a script. A mistake of the user ends in a message on stderr."""
    # If stdout goes into a file on Windows, its encoding may lack characters of a path. In IDLE,
    # Spyder and notebooks it is another object, in pythonw it is None.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            # A shell has what it starts in the background ignore Ctrl-C.
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, interrupt)
    try:
        main()
    except UserError as error:
        sys.exit(f'error: {readable(str(error))}')
    except (MemoryError, torch.OutOfMemoryError) as error:
        reason = [type(error).__name__, *str(error).splitlines()][:2]
        sys.exit('error: too little memory; in training, a smaller --batch-size needs less '
                 f'({": ".join(reason)})')
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)  # the usual status after Ctrl-C


def interrupt(number, frame):
    """What Ctrl-C does, and SIGTERM, with which systems end a program: raises KeyboardInterrupt."""
    if time.monotonic() >= interrupted_until:
        ignore_interruptions()
        raise KeyboardInterrupt


def ignore_interruptions():
    """Lets Ctrl-C and SIGTERM do nothing for ten seconds: another one would lose the line that says
    how to continue."""
    global interrupted_until
    interrupted_until = time.monotonic() + 10


if __name__ == '__main__':
    run_script(main)
