"""Section 2.2 of the book: the food-11 photographs as arrays, as a dataset and as batches.

    python chapter2_1_data.py                       counts the photographs in ./food-11, shows some
    python chapter2_1_data.py --index 7             shows train_set[7] instead of train_set[100]
    python chapter2_1_data.py --recipe better       shows the augmentation of the better recipe
    python chapter2_1_data.py --save preview.png    writes the picture into a file
    python chapter2_1_data.py --data-dir my-photos  your own photographs, in a folder for each class
    python chapter2_1_data.py --demo                needs no photographs: draws some dishes first
"""
import argparse
import contextlib
import hashlib
import io
import itertools
import os
import re
import signal
import sys
import textwrap
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.utils import make_grid
from tqdm import tqdm

data_dir = './food-11'
demo_dir = './food-11-demo'

# The names of the labels 0 to 10 in food-11, spelled as Kaggle's folders are.
CLASSES = ['Bread', 'Dairy product', 'Dessert', 'Egg', 'Fried food', 'Meat',
           'Noodles-Pasta', 'Rice', 'Seafood', 'Soup', 'Vegetable-Fruit']

# What an error says about a damaged file, after its name.
NO_IMAGE = 'cannot be read as an image; repair, rename or delete it'

# Width and height in pixels. The first Linear layer in chapter2_2_train.py depends on it.
image_size = 128

batch_size = 128


# ---- Reading the photographs -----------------------------------------------------------------

def readfile(path, classes=CLASSES):
    """Reads photographs and their labels (section 2.2).
    path: a folder such as food-11/training, as in the book, whose classes are `classes`; or, for a
    data folder of any layout, a list of pairs (file, label) that find_photographs returns.
    Returns x, uint8 (N, 128, 128, 3), BGR, and y, the labels (N,), uint8 or, above 255, uint16.
    Raises UserError if photographs have no label or are no images, OSError if one cannot be opened.
    """
    files = path
    if not isinstance(path, list):
        # The files of the folder, sorted by name. The label of 3_17.jpg is 3.
        files = labelled_files(list_images(path), path, classes)
    x = np.zeros((len(files), image_size, image_size, 3), dtype=np.uint8)
    # uint8 as in the book, if no label is above 255.
    highest_label = max((label for _, label in files), default=0)
    y = np.zeros(len(files), dtype=np.min_scalar_type(highest_label))
    bad_files = []

    def read(i):
        file, label = files[i]
        img = read_image(file)
        if img is None:
            bad_files.append(file)
            return
        x[i] = img
        y[i] = label

    # The book's loop over all i, but several photographs are read at the same time.
    in_threads(read, range(len(files)), 'reading')
    refuse_files(bad_files, NO_IMAGE)
    return x, y


def read_image(file):
    """Reads one photograph, and resizes it: the book's cv2.imread and cv2.resize (section 2.2).
    Returns uint8 (128, 128, 3), BGR, or None if the file is no image. Raises OSError if it cannot
    be opened.
    """
    # cv2.imread cannot open a path with Chinese characters on Windows. Therefore Python reads the
    # bytes, and imdecode turns them into the same pixels.
    file_bytes = Path(file).read_bytes()
    # A JPEG whose end is missing is read as far as it goes, as imread does. imdecode does so only
    # if the two bytes that end a JPEG are there. At the end of a whole one, two more do no harm.
    if file_bytes.startswith(b'\xff\xd8'):
        file_bytes += b'\xff\xd9'
    try:
        img = cv2.imdecode(np.frombuffer(file_bytes, dtype=np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        # An empty file, or one with more pixels than OpenCV accepts.
        return None
    if img is None:
        return None
    return cv2.resize(img, (image_size, image_size))


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

# Not in the book: for --recipe better, instead of train_transform. It changes the images much more,
# so that the network cannot easily learn the photographs by heart.
better_transform = transforms.Compose([
    transforms.ToPILImage(),
    # A rectangle with 35% to 100% of the area, stretched to the whole size.
    transforms.RandomResizedCrop(image_size, scale=(0.35, 1)),
    transforms.RandomHorizontalFlip(),
    # One of 13 changes, such as rotation, contrast or sharpness, of a random strength, or none.
    transforms.TrivialAugmentWide(),
    transforms.PILToTensor(),
])


# ---- The script ------------------------------------------------------------------------------

def main(arguments=None):
    """arguments: those of the command line, which a notebook may give: main(['--index', '7'])."""
    # --help begins with the text at the top of this file.
    parser = argparse.ArgumentParser(usage='%(prog)s [options]', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument('--recipe', choices=['book', 'better'], default='book',
                        help='whose augmentation to show: train_transform or better_transform '
                        '(default: %(default)s)')
    parser.add_argument('--index', type=int, metavar='N', default=100,
                        help='which training image to show; the nearest one if there is none of '
                        'that number (default: %(default)s)')
    parser.add_argument('--save', type=path_argument, metavar='FILE',
                        help='write the picture, a PNG, into FILE (default: open a window)')
    args = parser.parse_args(arguments)
    if args.demo:
        args.data_dir = demo_dir
        make_demo()

    classes, train_files, val_files = find_photographs(args.data_dir or data_dir)
    train_x, train_y = readfile(train_files)
    val_x, val_y = readfile(val_files)
    say(train_x.shape)
    print_counts(train_y, val_y, classes)
    print_repeated(train_x, train_files, val_x, val_files)

    train_set = ImgDataset(train_x, train_y, train_transform)
    val_set = ImgDataset(val_x, val_y, test_transform)
    if args.recipe == 'better':
        train_set.transform = better_transform
    train_loader = DataLoader(train_set, batch_size=batch_size, shuffle=True)
    val_loader = DataLoader(val_set, batch_size=batch_size, shuffle=False)
    say(f'batches of {batch_size}: {len(train_loader)} training, {len(val_loader)} validation')

    index = min(max(args.index, 0), len(train_set) - 1)
    show_preview(train_set, index, classes, args.save)


def add_data_arguments(parser):
    """Adds the arguments that both scripts have."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument('--data-dir', type=path_argument, metavar='DIR',
                       help='folder that holds training/ and validation/, or a folder for each '
                       'class; then a fifth of the photographs, chosen by their names, is for '
                       f'validation (default: {data_dir})')
    where.add_argument('--demo', action='store_true',
                       help=f'draw a small food-11 into {demo_dir}, and use it')


def path_argument(text):
    """The type of the arguments that are paths: makes an absolute path."""
    # An empty path would be the current folder: --data-dir "$FOLDER", and no such variable.
    if not text:
        raise argparse.ArgumentTypeError('the path is empty')
    return os.path.abspath(os.path.expanduser(text))


def make_demo():
    """Draws a small food-11 into demo_dir."""
    # The drawn dishes are those of the tests. Imported here, because only --demo needs them.
    from tests.fake_food11 import draw_food11
    draw_food11(demo_dir, class_count=len(CLASSES))


def print_counts(train_y, val_y, classes):
    """Prints how many images of each class there are."""
    say(f'{"class":<24} training validation')
    for label, name in enumerate(classes):
        say(f'{label:>3} {name:<20} {(train_y == label).sum():>8} {(val_y == label).sum():>10}')
    say(f'{"total":<24} {len(train_y):>8} {len(val_y):>10}')
    if classes == CLASSES and (len(train_y), len(val_y)) != (9866, 3430):
        say('the complete food-11 has 9866 training and 3430 validation photographs')


def print_repeated(train_x, train_files, val_x, val_files):
    """Says how many of the photographs for validation are for training as well."""
    # A hash instead of the image: it is short, and different images hardly ever have the same.
    training_file = {hash(img.tobytes()): file for img, (file, _) in zip(train_x, train_files)}
    keys = [hash(img.tobytes()) for img in val_x]
    repeated = [f'{training_file[key]} and {file}'
                for key, (file, _) in zip(keys, val_files) if key in training_file]
    if repeated:
        say('note: the same photograph is both for training and for validation: '
            f'{len(repeated)} times, for example {repeated[0]}')


def show_sample(axes, img, title):
    """Shows an image (3, H, W), BGR, such as that of train_set[100], on matplotlib axes."""
    if img.is_floating_point():
        # In the range that it has: after Normalize, that is not 0..1.
        img = (img - img.min()) / (img.max() - img.min())
    img = img.permute(1, 2, 0)  # [3, 128, 128] -> [128, 128, 3]
    img = img.flip(2)           # BGR -> RGB
    axes.imshow(img.numpy())
    axes.set(title=title, xticks=[], yticks=[])


def show_classes(axes, train_set, classes):
    """A picture with a column for each class that has images: at the top the first image of the
    class, and under it the same image, augmented four times. Of 20 classes at most, as more would
    be too small to see."""
    plain_set = ImgDataset(train_set.x, train_set.y, test_transform)
    labels = train_set.y.unique().tolist()[:20]
    indices = [torch.nonzero(train_set.y == label)[0].item() for label in labels]
    rows = [plain_set, train_set, train_set, train_set, train_set]
    images = [dataset[index][0] for dataset in rows for index in indices]
    # White gaps between the images, which are uint8, or float32 in any range.
    gap, white = 8, torch.stack(images).max().item()
    grid = make_grid(images, nrow=len(labels), padding=gap, pad_value=white)
    show_sample(axes, grid, '')
    middles = [gap / 2 + (image_size + gap) * (column + 0.5) for column in range(len(labels))]
    axes.set_xticks(middles, [f'{label} {classes[label]}' for label in labels], rotation=40,
                    ha='left', rotation_mode='anchor')
    axes.xaxis.tick_top()


def show_preview(train_set, index, classes, file=None):
    """Shows a sample and all classes in a window, or writes them into `file` as a PNG picture:
    where no window can be made, into chapter2_1_data.png."""
    with picture_settings():
        from matplotlib import pyplot as plt
        from matplotlib.figure import Figure
        figure = Figure()
        if file is None:
            # Where no window can be made, each of matplotlib's window systems has its own error,
            # and some of these errors cannot even be imported there.
            with contextlib.suppress(Exception):
                figure = plt.figure()
        figure.set_size_inches(13, 5.5)
        figure.set_layout_engine('constrained')
        left, right = figure.subplots(1, 2, width_ratios=(1, 4))
        img, label = train_set[index]
        name = textwrap.fill(f'{label}: {classes[label]}', 20)
        show_sample(left, img, f'train_set[{index}]\n{name}')
        show_classes(right, train_set, classes)
        # Not None: a window system shows this figure.
        if figure.canvas.required_interactive_framework is not None:
            # block: also in IPython, where show would return at once.
            plt.show(block=True)
        else:
            file = os.path.abspath(file or 'chapter2_1_data.png')
            # The layout finds room for long names only when it is drawn a second time.
            figure.draw_without_rendering()
            figure.savefig(file, format='png')
            say(f'picture written to {file}')
        plt.close(figure)


@contextlib.contextmanager
def picture_settings():
    """matplotlib's settings for our pictures, which hold within a with-block: its defaults, and
    Chinese characters."""
    # A script that a notebook has started with ! inherits the notebook's backend, which shows
    # nothing there. If that backend is not installed, importing matplotlib fails.
    if 'inline' in os.environ.get('MPLBACKEND', '') and 'ipykernel' not in sys.modules:
        del os.environ['MPLBACKEND']
    from matplotlib import font_manager, style
    installed = {font.name for font in font_manager.fontManager.ttflist}
    # For Chinese names of classes and files: those of these fonts that are installed.
    fonts = ['Microsoft YaHei', 'SimHei', 'PingFang SC', 'Arial Unicode MS', 'Noto Sans CJK SC',
             'Noto Sans CJK JP', 'WenQuanYi Zen Hei']
    ours = {'font.family': ['sans-serif', *[font for font in fonts if font in installed]],
            # A $ in the name of a class or a file is a $, and does not begin a formula.
            'text.parse_math': False}
    with style.context(['default', ours]):
        yield


# ---- Not in the book: the data folder --------------------------------------------------------

ADVICE = ('food-11/README.md says where to get photographs, and how to arrange them; --demo draws '
          'some')

# Beginnings of names that a system gave, and not a person.
HIDDEN = ('.', '__MACOSX', '@eaDir', 'lost+found', '$RECYCLE.BIN', 'System Volume Information')

# Endings of other files that lie among photographs, such as this script's picture. A list of the
# endings that photographs have would leave out some, and nobody would notice.
NO_PHOTOGRAPHS = ('.csv', '.json', '.md', '.txt', '.zip', '.avi', '.m4v', '.mkv', '.mov', '.mp4',
                  '.webm', '.aae', '.xmp', '.db', '.ini', 'icon\r', 'chapter2_1_data.png')


def find_photographs(folder):
    """Finds the photographs in a data folder such as ./food-11. It holds either

    - training and validation, with photographs whose names begin with the label, as 3_17.jpg;
    - training and validation, with a folder for each class in both; or
    - a folder for each class. Then about a fifth of the photographs is for validation: which ones,
      depends on their names.
    Returns classes, the names of the labels 0, 1, ...; and train_files and val_files, sorted lists
    of pairs (file, label). Raises UserError if the folder holds something else.
    """
    folder = Path(folder).absolute()
    if not os.path.isdir(folder):
        raise UserError(f'there is no folder {folder}; {ADVICE}')
    parts = find_parts(folder)
    if parts is not None:
        train_dir, val_dir = parts
        train_images, val_images = list_images(train_dir), list_images(val_dir)
        classes = class_names(train_images, train_dir)
        # If at least half of the photographs lie in training itself:
        if 2 * sum(file.parent == train_dir for file in train_images) >= len(train_images):
            classes = CLASSES
        train_files = labelled_files(train_images, train_dir, classes)
        val_files = labelled_files(val_images, val_dir, classes)
    else:
        images = list_images(folder)
        classes = class_names(images, folder)
        refuse_unless_classes(classes, folder)
        files = labelled_files(images, folder, classes)
        train_files = [pair for pair in files if not is_for_validation(pair[0], folder)]
        val_files = [pair for pair in files if is_for_validation(pair[0], folder)]

    only_val = {label for _, label in val_files} - {label for _, label in train_files}
    lacking = [f'training of {classes[label]}' for label in sorted(only_val)]
    if not val_files:
        lacking.append('validation')
    if len(classes) < 2:
        lacking.append('a second class')
    if lacking:
        raise UserError(f'{folder} has no photographs for {", ".join(lacking)}; {ADVICE}')
    return classes, train_files, val_files


def find_parts(folder):
    """The folders for training and for validation in a data folder, or None if one is missing."""
    for train_name, val_name in itertools.product(('training', 'train'),
                                                  ('validation', 'val', 'valid')):
        if os.path.isdir(folder / train_name) and os.path.isdir(folder / val_name):
            return folder / train_name, folder / val_name
    return None


def list_images(folder):
    """The files below a folder that may be photographs, as sorted Paths.
    Links are followed, but no folder is listed twice, however many links lead to it. Raises OSError
    if a folder cannot be listed.
    """
    image_files, listed = [], set()
    # The list grows as the loop runs, so that higher folders come first: a folder is listed in its
    # own place, and not in that of a link which lies deeper.
    folders = [Path(folder)]
    for parent in folders:
        if parent.resolve() in listed:
            continue
        listed.add(parent.resolve())
        names = sorted(os.listdir(parent))
        if 'last.pt' in names:
            # The folder of a run holds no photographs, but pictures.
            continue
        for name in names:
            if name.startswith(HIDDEN):
                continue
            if os.path.isdir(parent / name):
                folders.append(parent / name)
            elif not name.lower().endswith(NO_PHOTOGRAPHS):
                image_files.append(parent / name)
    # Sorted as texts, as in the book. Windows would sort paths without regard to case.
    return sorted(image_files, key=Path.as_posix)


def class_names(image_files, folder):
    """The sorted names of the folders in `folder` that these photographs are in."""
    names = sorted({as_text(file.relative_to(folder).parts[0])
                    for file in image_files if file.parent != folder})
    if all(name.isdecimal() for name in names):
        # So that 10 comes after 9.
        names.sort(key=int)
    return names


def label_of(file, folder, classes):
    """The label of a photograph in `folder`, or None. That of Egg/17.jpg is the position of Egg in
    `classes`. If the classes are CLASSES, that of 3_17.jpg, which is in no folder, is 3."""
    *folders, _ = file.relative_to(folder).parts
    if folders and as_text(folders[0]) in classes:
        return classes.index(as_text(folders[0]))
    # The book's code expects 3_17.jpg, its text says 3-17.jpg. 01-05-2021.jpg is a date.
    numbers = re.fullmatch('([0-9]+)[_-][0-9]+[^0-9]*', file.stem)
    if not folders and classes == CLASSES and numbers and int(numbers[1]) < len(classes):
        return int(numbers[1])
    return None


def labelled_files(image_files, folder, classes):
    """The photographs in `folder` as pairs (file, label). Raises UserError if one has no label."""
    files = [(file, label_of(file, folder, classes)) for file in image_files]
    # Of a folder that is no class, the folder is named, and not each photograph in it.
    unlabelled = {Path(folder, file.relative_to(folder).parts[0])
                  for file, label in files if label is None}
    refuse_files(unlabelled, f'has no label: it is neither in the folder of a class '
                 f'({", ".join(classes)}) nor, for food-11, named as 3_17.jpg with a label '
                 'from 0 to 10; rename, move or delete it')
    return files


def is_for_validation(file, folder):
    """Whether a photograph that nobody has assigned to training or validation is for validation.
    Only its path within the data folder decides, such as Egg/17.jpg: adding or removing other
    photographs changes nothing.
    """
    name = as_text(file.relative_to(folder).as_posix())
    # A number that looks random, but is always the same for a name.
    number = int(hashlib.sha256(name.encode()).hexdigest(), 16)
    return number % 5 == 4


# What the names of the parts of a data set have in them, in lower case.
PART_WORDS = ('train', 'val', 'test', 'dev', 'pred', 'label', '训练', '验证', '测试', '訓練',
              '驗證', '測試')


def refuse_unless_classes(classes, folder):
    """Raises UserError if the folders with photographs in `folder`, which are called `classes`, are
    no classes: if there are fewer than two, if all are called like parts of a data set, or if
    another folder was probably meant."""
    # Typed food-11, meant food-11/food-11, as a zip file was unpacked there; or typed
    # food-11/training, meant food-11.
    meant = [other for other in sorted(folder.iterdir()) if find_parts(other)]
    if folder in (find_parts(folder.parent) or ()):
        meant.append(folder.parent)
    are_parts = all(any(word in name.lower() for word in PART_WORDS) for name in classes)
    if meant or len(classes) < 2 or are_parts:
        advice = ADVICE
        if meant:
            advice = f'did you mean --data-dir "{meant[0]}"?'
        found = ', '.join(classes) or 'none'
        raise UserError(f'{folder} cannot be the data folder (folders with photographs: {found}); '
                        f'{advice}')


def as_text(name):
    """The name of a file or folder as a text that can be compared and drawn. macOS writes é, 김치
    and パン with other characters than Windows does: NFC makes them the same."""
    return unicodedata.normalize('NFC', printable(name))


# ---- Not in the book: threads, messages, signals ---------------------------------------------

def in_threads(function, items, title):
    """Calls function(item) for each item, in eight threads, with a progress bar. Raises what a call
    has raised."""
    # Threads are enough, as OpenCV lets other threads run while it decodes. Eight, because each
    # holds a whole photograph in memory.
    threads = ThreadPoolExecutor(8)
    try:
        calls = [threads.submit(function, item) for item in items]
        for call in progress_bar(calls, title):
            call.result()
    finally:
        # After an error or Ctrl-C, only the calls that have begun are waited for.
        threads.shutdown(cancel_futures=True)


def progress_bar(items, title):
    """The items, with tqdm's progress bar on a terminal or in a notebook, but not in a file."""
    # No TextIOWrapper: IDLE's window, which cannot show a bar, and pythonw's None.
    on_terminal = isinstance(sys.stderr, io.TextIOWrapper) and sys.stderr.isatty()
    # Jupyter, Spyder and VS Code run Python in an ipykernel.
    in_notebook = 'ipykernel' in sys.modules
    return tqdm(items, title, leave=False, disable=not (on_terminal or in_notebook))


class UserError(Exception):
    """What the user can put right: the scripts print its message, and no traceback."""


def refuse_files(files, problem):
    """Raises UserError if there are files (or folders) with a problem, and names all of them.
    problem: what follows a file's name in a sentence."""
    paths = sorted(os.path.abspath(file) for file in files)
    if len(paths) == 1:
        raise UserError(f'{paths[0]} {problem}')
    if paths:
        # One a line, so that the list can be piped into another program.
        raise UserError('\n'.join([f'each of these {len(paths)} {problem}:', *paths]))


def printable(text):
    """The text with \\x and a number for each byte that is not UTF-8, as in names of files from zip
    files of a Chinese Windows."""
    return os.fsencode(text).decode(errors='backslashreplace')


def say(line, file=None):
    """Prints a line on stdout, or on `file`. Where it cannot be printed, as on a full disk or after
    `| head`, the script goes on."""
    with contextlib.suppress(OSError):
        print(printable(str(line)), file=file, flush=True)


def run_script(main):
    """Calls the main function of a script. What a user can put right ends in a line on stderr."""
    # If stdout goes into a file on Windows, its encoding may lack characters of a path. In IDLE,
    # Spyder and notebooks it is another object, in pythonw it is None.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')
    # OpenCV's own warnings do not say which file they are about. setLogLevel is in
    # cv2.utils.logging (OpenCV 5) or in cv2 (OpenCV 4).
    getattr(cv2.utils, 'logging', cv2).setLogLevel(0)
    # SIGTERM, with which systems end a program, does what Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except UserError as error:
        sys.exit(printable(f'error: {error}'))
    except (MemoryError, torch.OutOfMemoryError) as error:
        reason = str(error).partition('\n')[0]
        sys.exit('error: too little memory; in training, a smaller --batch-size needs less. '
                 f'{type(error).__name__}: {reason}')
    except OSError as error:
        # Most errors about no file are mistakes in the script, and keep their traceback.
        if error.filename is None:
            raise
        sys.exit(printable(f'error: {os.path.abspath(error.filename)}: {error.strerror}'))
    except KeyboardInterrupt:
        say('interrupted', sys.stderr)
        sys.exit(130)  # the usual status after Ctrl-C
    finally:
        # If `say` could not print something, Python would try again at its end, and complain.
        for name in ('stdout', 'stderr'):
            try:
                print(end='', file=getattr(sys, name), flush=True)
            except OSError:
                setattr(sys, name, None)


if __name__ == '__main__':
    run_script(main)
