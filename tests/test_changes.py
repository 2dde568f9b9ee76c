"""Ten changes that an engineer makes, each with its edit where one would look for it: the changed
scripts train, resume and predict as they should, or say plainly why they cannot."""
import csv
import shutil

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from tests.conftest import SMALL
from tests.fake_food11 import draw_food11

ADAM = 'torch.optim.Adam(model.parameters(), lr=options.lr,'
LOSS = 'nn.CrossEntropyLoss()'
MODEL = 'model = Classifier(class_count)'
SCHEDULE_PLACE = '        # A learning-rate schedule.'
AFTER_EVALUATE = '        seconds = time.perf_counter() - start_time\n'
AFTER_HISTORY = '        if time.monotonic() - saved_time'


def train(scripts, data_dir, *arguments, out='run', epochs=1):
    done = scripts.call('--device', 'cpu', '--batch-size', 4, '--data-dir', data_dir, '--out', out,
                        '--resume', '--epochs', epochs, *arguments)
    assert done.returncode == 0, done.stderr
    return done


def predict(scripts, photograph, *arguments):
    done = scripts.call('--device', 'cpu', '--out', 'run', '--predict', photograph, *arguments)
    assert done.returncode == 0, done.stderr
    return done


def use(scripts, data_dir, epochs=2):
    """Trains one epoch, resumes, and predicts a photograph."""
    train(scripts, data_dir)
    train(scripts, data_dir, epochs=epochs)
    predict(scripts, next((data_dir / 'validation').rglob('*.jpg')))
    return scripts.cwd / 'run'


def checkpoint(folder, name='last.pt'):
    return torch.load(folder / name, weights_only=True, map_location='cpu')


def same_weights(one, other):
    return all(torch.equal(one['model'][name], other['model'][name]) for name in one['model'])


def history(folder):
    with open(folder / 'history.csv', newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def assert_refused(scripts, run, photograph, reason):
    """The run is of no use to the changed scripts, and is left as it was."""
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    for arguments in (['--resume', '--epochs', 9], ['--predict', photograph], ['--dreams']):
        done = scripts.call('--out', run, '--device', 'cpu', *arguments)
        assert done.returncode == 1 and 'corrupt' not in done.stderr
        assert f'.pt is incompatible: {reason}' in done.stderr.splitlines()[-1]
        assert done.stderr.count('error: ') == 1
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before


def test_color_jitter_and_normalize(edited, few, copy_of_finished, tmp_path):
    steps = ('    transforms.ToTensor(),\n'
             '    transforms.Normalize([0.4, 0.5, 0.6], [0.2, 0.2, 0.2]),  # BGR\n')
    changed = edited({
        '    transforms.RandomRotation(15),': '    transforms.ColorJitter(0.2, 0.2),\n'
                                              '    transforms.RandomRotation(15),',
        '    transforms.PILToTensor(),       #': f'{steps}    #',
        '    transforms.ToPILImage(),\n    transforms.PILToTensor(),\n':
            f'    transforms.ToPILImage(),\n{steps}',
    })
    photograph = few / 'validation' / '0_0.jpg'
    # A run from before the change would be wrong without a word.
    assert_refused(changed, copy_of_finished, photograph, 'its test_transform was Compose(')
    shutil.rmtree(copy_of_finished)
    # What the network is given: 3 batches for training, 3 for validation, 3 for the report.
    seen = []

    def see(module, inputs):
        if isinstance(module, torch.nn.Sequential):
            seen.append(inputs[0])
    hook = torch.nn.modules.module.register_module_forward_pre_hook(see)
    try:
        train(changed, few)
        assert len(seen) == 9
        predict(changed, photograph)
        assert len(seen) == 10
    finally:
        hook.remove()
    assert all(x.dtype == torch.float32 and x.min() < -1 for x in seen)
    train(changed, few, epochs=2)
    done = changed.call('--out', 'run', '--device', 'cpu', '--dreams')
    assert done.returncode == 0, done.stderr
    done = changed.call('--data-dir', few, '--save', 'preview.png', main=changed.data.main)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('classes, divided', [
    ([f'flower {i:02d}' for i in range(17)], True), (['汤', '米饭', '面条'], True),
    (['cats', 'dogs'], False)], ids=['17', 'chinese', 'undivided'])
@pytest.mark.filterwarnings('ignore:Glyph')  # there may be no Chinese font
def test_another_data_set_needs_no_edit(small, tmp_path, monkeypatch, classes, divided):
    draw_food11(tmp_path / 'flat', 4, 2, class_count=len(classes))
    for file in (tmp_path / 'flat').glob('*/*.jpg'):
        label, number = file.stem.split('_')
        folder = tmp_path / 'mine' / classes[int(label)]
        if divided:
            folder = tmp_path / 'mine' / file.parent.name / classes[int(label)]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / f'{file.parent.name}{number}.jpg')
    # The texts in the pictures.
    texts = {}

    def savefig(figure, *arguments, **options):
        for text in figure.findobj(Text):
            texts.setdefault(len(figure.axes), set()).update(text.get_text().splitlines())
        return original(figure, *arguments, **options)
    original = Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', savefig)

    done = train(small, 'mine')
    val_count = 2 * len(classes)
    if not divided:
        val_count = len(small.data.find_photographs(tmp_path / 'mine')[2])
        assert 0 < val_count < 6
    assert f'{len(classes)} classes, {6 * len(classes) - val_count} photographs for training, ' \
        f'{val_count} for validation' in done.stderr.splitlines()
    table = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row[1] for row in table[1:-1]] == [name.split()[0] for name in classes]
    assert table[-1][:2] == ['total', str(val_count)]
    assert set(classes) <= texts[1]  # confusion.png
    # A resumed run knows where its photographs are.
    done = small.call('--out', 'run', '--resume', '--epochs', 2, '--device', 'cpu')
    assert done.returncode == 0 and 'resumed from epoch 1 in run' in done.stderr
    assert 'changed' not in done.stderr

    texts.clear()
    assert small.call('--out', 'run', '--device', 'cpu', '--dreams').returncode == 0
    assert set(classes) <= texts[len(classes)]
    folder = tmp_path / 'mine'
    if divided:
        folder = folder / 'validation'
    photograph = next(folder.rglob('*.jpg'))
    done = predict(small, photograph)
    assert done.stdout.startswith(f'{photograph}: ')
    assert sum(f'{name} ' in done.stdout for name in classes) == min(3, len(classes))
    done = predict(small, folder)
    table = [line.split() for line in done.stdout.splitlines()]
    assert all([str(i), *name.split()] == table[i + 2][:1 + len(name.split())]
               for i, name in enumerate(classes))
    # With a class more, it is another run.
    another = tmp_path / 'mine' / 'another'
    if divided:
        another = tmp_path / 'mine' / 'training' / 'another'
    shutil.copytree(folder / classes[0], another)
    before = (tmp_path / 'run' / 'last.pt').read_bytes()
    done = small.call('--out', 'run', '--resume', '--epochs', 3, '--device', 'cpu')
    assert done.returncode == 1
    assert f'last.pt is incompatible: its classes was {classes}' in done.stderr.splitlines()[-1]
    assert (tmp_path / 'run' / 'last.pt').read_bytes() == before


def test_a_learning_rate_schedule_is_right_after_a_resume(edited, few, tmp_path):
    schedule = "        optimizer.param_groups[0]['lr'] = 0.001 * 0.5 ** (epoch - 1)\n"
    changed = edited({SCHEDULE_PLACE: schedule + SCHEDULE_PLACE})
    resumed = checkpoint(use(changed, few, epochs=3))
    assert resumed['optimizer']['param_groups'][0]['lr'] == 0.001 * 0.25
    train(changed, few, out='whole', epochs=3)
    assert same_weights(resumed, checkpoint(tmp_path / 'whole'))


def test_resnet18(edited, few, copy_of_finished):
    changed = edited({MODEL: 'from torchvision.models import resnet18\n'
                             '    model = resnet18(num_classes=class_count)'},
                     base={key: value for key, value in SMALL.items() if key != MODEL})
    assert_refused(changed, copy_of_finished, few / 'validation' / '0_0.jpg',
                   'its network was Sequential, now it is ResNet')
    shutil.rmtree(copy_of_finished)
    use(changed, few)


def test_images_of_224_pixels(edited, scripts, tmp_path):
    draw_food11(tmp_path / 'three', 1, 1, class_count=3)
    changed = edited({'image_size = 128': 'image_size = 224',
                      'nn.Linear(512 * 4 * 4, 1024)': 'nn.Linear(512 * 7 * 7, 9)',
                      # Not necessary, but files with 1024 of these are large.
                      'nn.Linear(1024, 512)': 'nn.Linear(9, 512)'}, base={})
    train(changed, 'three')
    photograph = tmp_path / 'three' / 'validation' / '0_0.jpg'
    predict(changed, photograph)
    done = changed.call('--data-dir', 'three', '--save', 'preview.png', main=changed.data.main)
    assert done.returncode == 0 and done.stdout.startswith('(3, 224, 224, 3)')
    done = scripts.call('--out', 'run', '--device', 'cpu', '--predict', photograph)
    assert done.returncode == 1
    assert 'incompatible: its image_size was 224, now it is 128' in done.stderr


def test_a_log_and_a_checkpoint_every_second_epoch(edited, few, tmp_path):
    """The log stands for TensorBoard's."""
    changed = edited({AFTER_HISTORY: (
        '        if rank() == 0:\n'
        '            with open("log.txt", "a") as log:\n'
        '                print(epoch, val_acc, file=log)\n'
        '            if epoch % 2 == 0:\n'
        '                write_checkpoint(folder / f"epoch_{epoch:03d}.pt", {\n'
        '                    "model": model.state_dict(),\n'
        '                    "required": requirements(model, classes)})\n'
    ) + AFTER_HISTORY})
    run = use(changed, few, epochs=4)
    lines = (tmp_path / 'log.txt').read_text().splitlines()
    assert [line.split() for line in lines] == [[row['epoch'], row['val_acc']]
                                                for row in history(run)]
    assert sorted(file.name for file in run.glob('epoch_*')) == ['epoch_002.pt', 'epoch_004.pt']
    predict(changed, few / 'validation' / '0_0.jpg', '--checkpoint', 'epoch_002.pt')
    train(changed, few, out='two', epochs=2)
    assert same_weights(checkpoint(run, 'epoch_002.pt'), checkpoint(tmp_path / 'two'))


@pytest.mark.parametrize('loss', [
    'nn.CrossEntropyLoss(label_smoothing=0.9)',
    'nn.CrossEntropyLoss(weight=torch.tensor([9., 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]))'])
def test_label_smoothing_and_class_weights(small, edited, few, loss, tmp_path):
    changed = edited({LOSS: loss})
    # With the learning rate 0, the weights stay the same.
    train(small, few, '--lr', 0, out='before')
    train(changed, few, '--lr', 0)
    (before,), (after,) = history(tmp_path / 'before'), history(tmp_path / 'run')
    for name in ('train_acc', 'val_acc'):
        assert before[name] == after[name]
    for name in ('train_loss', 'val_loss'):
        assert before[name] != after[name]
    # Another loss does not make a run unusable.
    train(changed, few, '--lr', 0.001, out='before', epochs=2)
    predict(changed, few / 'validation' / '0_0.jpg')


def test_top5_in_the_line_and_in_the_history_of_an_old_run(small, edited, few, copy_of_finished):
    changed = edited({
        AFTER_EVALUATE:
            '        p = predict_probabilities(model, val_x, options.batch_size, autocast)\n'
            '        best5 = p.argsort(1)[:, -5:]\n'
            '        val_top5 = (best5 == val_y[:, np.newaxis]).any(1).mean()\n'
            + AFTER_EVALUATE,
        "'val_loss': val_loss}": "'val_loss': val_loss, 'val_top5': val_top5}",
        "loss: {val_loss:.6f}',": "loss: {val_loss:.6f} Top5: {val_top5:.6f}',"})
    done = train(changed, few, epochs=4)
    rows = history(copy_of_finished)
    assert [row['val_top5'] for row in rows[:3]] == ['', '', '']
    assert float(rows[3]['val_acc']) <= float(rows[3]['val_top5']) <= 1
    assert done.stdout.splitlines()[0].endswith(f' Top5: {float(rows[3]["val_top5"]):.6f}')
    train(changed, few, epochs=5)
    assert history(copy_of_finished)[:4] == rows
    # The change is undone.
    train(small, few, epochs=6)
    assert [len(row) for row in history(copy_of_finished)] == [6] * 6


def test_weight_decay_holds_in_a_resumed_run(small, edited, few, copy_of_finished, tmp_path):
    changed = edited({ADAM: f'{ADAM} weight_decay=0.5,'})
    shutil.copytree(copy_of_finished, tmp_path / 'without')
    train(small, few, out='without', epochs=4)
    train(changed, few, epochs=4)
    without, decayed = checkpoint(tmp_path / 'without'), checkpoint(copy_of_finished)
    assert decayed['optimizer']['param_groups'][0]['weight_decay'] == 0.5
    # Adam's averages are still those of the run: 4 epochs of 3 steps.
    assert decayed['optimizer']['state'][0]['step'] == 12
    norms = [sum(weights.float().norm() for weights in run['model'].values())
             for run in (decayed, without)]
    assert norms[0] < norms[1]
