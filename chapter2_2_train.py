"""Trains the book's network on food-11 (sections 2.3 and 2.4) and prints one line an epoch.

    python chapter2_2_train.py                      the book's run: ./food-11, 100 epochs, batches of 128, lr 0.001
    python chapter2_2_train.py --demo               no photographs at hand: learns drawn dishes, in a minute or two
    python chapter2_2_train.py --workers 4          four processes prepare the batches, so that a GPU waits less
    python chapter2_2_train.py >train.log           a log of the epochs and nothing else
"""
import argparse
import sys
import time

import torch
from torch import nn
from tqdm import tqdm

from chapter2_1_data import (CLASSES, ImgDataset, UserError, add_data_arguments, batch_size, demo_dir, draw_food11,
                             make_loaders, read_food11, run, test_transform, train_transform)

num_epoch = 100
learning_rate = 0.001
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

def train_epoch(model, train_loader, loss, optimizer, device, title=''):
    """One pass over the training images. Returns accuracy and mean cross-entropy per image, of the predictions
    made on the way."""
    model.train()
    correct, loss_sum = torch.zeros(2, device=device)  # summed there: asking after each batch would make it wait
    for x, y in tqdm(train_loader, title, leave=False, unit='batch', disable=None):
        x, y = x.to(device), y.to(device)
        optimizer.zero_grad()
        train_pred = model(x)
        batch_loss = loss(train_pred, y)
        batch_loss.backward()
        optimizer.step()
        correct += (train_pred.argmax(1) == y).sum()
        loss_sum += batch_loss.detach() * len(y)  # the batch's mean; the last batch is smaller than the others
    return correct.item() / len(train_loader.dataset), loss_sum.item() / len(train_loader.dataset)


@torch.no_grad()
def evaluate(model, val_loader, loss, device, title=''):
    """Accuracy and mean cross-entropy per image of the network as it stands."""
    model.eval()
    correct, loss_sum = torch.zeros(2, device=device)
    for x, y in tqdm(val_loader, title, leave=False, unit='batch', disable=None):
        x, y = x.to(device), y.to(device)
        val_pred = model(x)
        correct += (val_pred.argmax(1) == y).sum()
        loss_sum += loss(val_pred, y) * len(y)
    return correct.item() / len(val_loader.dataset), loss_sum.item() / len(val_loader.dataset)


def train(model, train_loader, val_loader, num_epoch, lr, device):
    """The book's loop. Prints a line after each epoch."""
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for epoch in range(1, num_epoch + 1):
        start, title = time.perf_counter(), f'[{epoch:03}/{num_epoch:03}]'
        train_acc, train_loss = train_epoch(model, train_loader, loss, optimizer, device, title)
        val_acc, val_loss = evaluate(model, val_loader, loss, device, title + ' validation')
        print(f'{title} {time.perf_counter() - start:.2f} sec(s) Train Acc: {train_acc:.6f} Loss: {train_loss:.6f} | '
              f'Val Acc: {val_acc:.6f} loss: {val_loss:.6f}', flush=True)


def pick_device(name=None):
    """The device called `name`; without one CUDA, else another accelerator, else the CPU.

    Raises UserError if PyTorch cannot use it here."""
    if name is None:
        name = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else 'cpu'
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'--device {name}: PyTorch {torch.__version__} cannot use it here '
                        f'({str(error).splitlines()[0]}); leave --device out to take what there is') from None
    return device


# ---------------------------------------------------------------------- the script

def number(kind, low, high=2**63 - 1):
    """An argparse type: a number of `kind` within low..high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f'{text} is not in {low}..{high}')
        return value
    parse.__name__ = kind.__name__
    return parse


def main():
    parser = argparse.ArgumentParser(usage='%(prog)s [options]', description="Trains the book's network on food-11.")
    add_data_arguments(parser)
    parser.add_argument('--epochs', type=number(int, 1), metavar='N',
                        help=f'passes over the training images (default: {num_epoch}; with --demo {DEMO["epochs"]})')
    parser.add_argument('--batch-size', type=number(int, 1), metavar='N',
                        help=f'images a step (default: {batch_size}; with --demo {DEMO["batch_size"]})')
    parser.add_argument('--lr', type=number(float, 0, 1), metavar='X',
                        help=f"Adam's learning rate (default: {learning_rate}; with --demo {DEMO['lr']})")
    parser.add_argument('--seed', type=number(int, 0), default=0, metavar='N',
                        help='the same seed gives the same numbers again on the CPU (default: %(default)s)')
    parser.add_argument('--workers', type=number(int, 0), default=0, metavar='N',
                        help='processes that prepare batches; 0: the main process does (default: %(default)s)')
    parser.add_argument('--device', metavar='NAME', help='cuda, cuda:1, mps, xpu, cpu (default: CUDA if there is one, '
                        'else another accelerator, else the CPU)')
    args = parser.parse_args()
    book = {'epochs': num_epoch, 'batch_size': batch_size, 'lr': learning_rate}
    for name, value in (DEMO if args.data_dir == demo_dir else book).items():
        if getattr(args, name) is None:
            setattr(args, name, value)

    device = pick_device(args.device)
    if args.data_dir == demo_dir:
        draw_food11(demo_dir)
    train_x, train_y, val_x, val_y = read_food11(args.data_dir)
    about = (f' ({torch.cuda.get_device_name(device)})' if device.type == 'cuda' else
             ' (PyTorch finds no GPU: see "GPU" in README.md)' if device.type == 'cpu' and args.device is None else '')
    print(f'{len(train_x)} training and {len(val_x)} validation images, on {device}{about}', file=sys.stderr)

    torch.manual_seed(args.seed)
    model = Classifier().to(device, memory_format=torch.channels_last)  # the layout that convolutions are fastest in
    train_set = ImgDataset(train_x, train_y, train_transform)
    val_set = ImgDataset(val_x, val_y, test_transform)
    train_loader, val_loader = make_loaders(train_set, val_set, args.batch_size, args.workers)
    try:
        train(model, train_loader, val_loader, args.epochs, args.lr, device)
    except torch.OutOfMemoryError:
        raise UserError(f'{device} has too little memory for batches of {args.batch_size}: '
                        'try --batch-size 64, or less') from None


if __name__ == '__main__':
    run(main)
