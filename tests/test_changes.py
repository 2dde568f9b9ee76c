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
AFTER_HISTORY = '        if epoch == 1 or time.monotonic() - saved_time'


def train(scripts, data_dir, *arguments, out='run', epochs=1):
    done = scripts.call('--device', 'cpu', '--batch-size', 4, '--data-dir', data_dir, '--out', out,
                        '--resume', '--epochs', epochs, *arguments)
    assert done.returncode == 0, done.stderr
    return done


def use_run(scripts, *arguments):
    done = scripts.call('--device', 'cpu', '--out', 'run', *arguments)
    assert done.returncode == 0, done.stderr
    return done


def use(scripts, data_dir, epochs=2):
    """Trains one epoch, resumes, and predicts a photograph."""
    train(scripts, data_dir)
    train(scripts, data_dir, epochs=epochs)
    use_run(scripts, '--predict', next((data_dir / 'validation').rglob('*.jpg')))
    return scripts.cwd / 'run'


def checkpoint(folder, name='last.pt'):
    return torch.load(folder / name, weights_only=True, map_location='cpu')


def same_weights(one, other):
    return all(torch.equal(one['model'][name], other['model'][name]) for name in one['model'])


def history(folder):
    with open(folder / 'history.csv', newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def assert_refused(scripts, run, reason):
    """The run is of no use to the changed scripts, and is left as it was."""
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    for arguments in (['--resume', '--epochs', 9], ['--dreams']):
        done = scripts.call('--out', run, '--device', 'cpu', *arguments)
        assert done.returncode == 1 and done.stderr.count('error: ') == 1
        assert f'.pt is incompatible: {reason}' in done.stderr.splitlines()[-1]
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before


def test_color_jitter_and_normalize(edited, few, copy_of_finished):
    steps = ('    transforms.ToTensor(),\n'
             '    transforms.Normalize([0.4, 0.5, 0.6], [0.2, 0.2, 0.2]),  # BGR\n'
             '    lambda img: img,\n')
    edits = {
        '    transforms.RandomRotation(15),': '    transforms.ColorJitter(0.2, 0.2),\n'
                                              '    transforms.RandomRotation(15),',
        '    transforms.PILToTensor(),       #': f'{steps}    #',
        '    transforms.ToPILImage(),\n    transforms.PILToTensor(),\n':
            f'    transforms.ToPILImage(),\n{steps}'}
    changed = edited(edits)
    # A run from before the change would be wrong without a word.
    assert_refused(changed, copy_of_finished, 'its test_transform was Compose(')
    shutil.rmtree(copy_of_finished)
    # What the network is given.
    seen = []

    def see(module, inputs):
        if isinstance(module, torch.nn.Sequential):
            seen.append(inputs[0])
    with torch.nn.modules.module.register_module_forward_pre_hook(see):
        train(changed, few)
        # As in another process, the lambda is at another address now.
        changed = edited(edits)
        train(changed, few, epochs=2)
        use_run(changed, '--predict', few / 'validation' / '0_0.jpg')
    # 3 batches for training, for validation and for the table; when it is continued, 3 more for the
    # best epoch; and 1.
    assert len(seen) == 9 + 12 + 1
    assert all(x.dtype == torch.float32 and x.min() < -1 for x in seen)
    use_run(changed, '--dreams')


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
    done = use_run(small, '--resume', '--epochs', 2)
    assert f'resumed from epoch 1 in {tmp_path / "run"}' in done.stderr
    texts.clear()
    use_run(small, '--dreams')
    assert set(classes) <= texts[len(classes)]
    folder = tmp_path / 'mine'
    if divided:
        folder = folder / 'validation'
    photograph = next(folder.rglob('*.jpg'))
    done = use_run(small, '--predict', photograph)
    assert done.stdout.startswith(f'{photograph}: ')
    assert sum(f'{name} ' in done.stdout for name in classes) == min(3, len(classes))
    done = use_run(small, '--predict', folder)
    assert f'\ntotal {val_count}' in '\n'.join(
        ' '.join(line.split()) for line in done.stdout.splitlines())
    # With a class more, it is another run.
    another = tmp_path / 'mine' / 'another'
    if divided:
        another = tmp_path / 'mine' / 'training' / 'another'
    shutil.copytree(folder / classes[0], another)
    done = small.call('--out', 'run', '--resume', '--epochs', 3, '--device', 'cpu')
    assert done.returncode == 1
    assert f'last.pt is incompatible: its classes was {classes}' in done.stderr.splitlines()[-1]


def test_a_learning_rate_schedule_is_right_after_a_resume(edited, few, tmp_path):
    schedule = "        optimizer.param_groups[0]['lr'] = 0.001 * 0.5 ** (epoch - 1)\n"
    changed = edited({SCHEDULE_PLACE: schedule + SCHEDULE_PLACE})
    resumed = checkpoint(use(changed, few, epochs=3))
    assert resumed['optimizer']['param_groups'][0]['lr'] == 0.001 * 0.25
    train(changed, few, out='whole', epochs=3)
    assert same_weights(resumed, checkpoint(tmp_path / 'whole'))


def test_a_ready_network(edited, few, copy_of_finished):
    changed = edited({MODEL: 'from torchvision.models import shufflenet_v2_x0_5\n'
                             '    model = shufflenet_v2_x0_5(num_classes=class_count)'},
                     base={key: value for key, value in SMALL.items() if key != MODEL})
    assert_refused(changed, copy_of_finished, 'its network was Sequential, now it is ShuffleNetV2')
    shutil.rmtree(copy_of_finished)
    use(changed, few)


@pytest.mark.parametrize('layer', ['nn.Conv2d(3, 4, 8, 8, bias=False)', 'nn.Conv2d(3, 4, 4, 8)'])
def test_another_layer_in_the_network(edited, copy_of_finished, layer):
    """A weight less, and a weight of another shape."""
    network = SMALL[MODEL].replace('nn.Conv2d(3, 4, 8, 8)', layer)
    assert_refused(edited({MODEL: network}), copy_of_finished, 'its weights have other names or')


def test_images_of_224_pixels(edited, scripts, tmp_path):
    draw_food11(tmp_path / 'three', 1, 1, class_count=3)
    changed = edited({'image_size = 128': 'image_size = 224',
                      'nn.Linear(512 * 4 * 4, 1024)': 'nn.Linear(512 * 7 * 7, 9)',
                      # Not necessary, but files with 1024 of these are large.
                      'nn.Linear(1024, 512)': 'nn.Linear(9, 512)'}, base={})
    train(changed, 'three')
    photograph = tmp_path / 'three' / 'validation' / '0_0.jpg'
    use_run(changed, '--predict', photograph)
    done = changed.call('--data-dir', 'three', '--save', 'preview.png', main=changed.data.main)
    assert done.returncode == 0 and done.stdout.startswith('(3, 224, 224, 3)')
    done = scripts.call('--out', 'run', '--device', 'cpu', '--predict', photograph)
    assert done.returncode == 1
    assert 'incompatible: its image_size was 224, now it is 128' in done.stderr


def test_a_log_and_a_checkpoint_every_second_epoch(edited, few, tmp_path):
    """The log stands for TensorBoard's."""
    changed = edited({AFTER_HISTORY: (
        '        if rank == 0:\n'
        '            with open("log.txt", "a") as log:\n'
        '                print(epoch, val_acc, file=log)\n'
        '            if epoch % 2 == 0:\n'
        '                write(folder / f"epoch_{epoch:03d}.pt", {\n'
        '                    "model": model.state_dict(),\n'
        '                    "required": requirements(model, classes)})\n'
    ) + AFTER_HISTORY})
    run = use(changed, few, epochs=4)
    lines = (tmp_path / 'log.txt').read_text().splitlines()
    assert [line.split() for line in lines] == [[row['epoch'], row['val_acc']]
                                                for row in history(run)]
    assert sorted(file.name for file in run.glob('epoch_*')) == ['epoch_002.pt', 'epoch_004.pt']
    use_run(changed, '--predict', few / 'validation' / '0_0.jpg', '--checkpoint', 'epoch_002.pt')
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
    assert all(before[name] == after[name] for name in ('train_acc', 'val_acc'))
    assert all(before[name] != after[name] for name in ('train_loss', 'val_loss'))
    # Another loss does not make a run unusable.
    train(changed, few, '--lr', 0.001, out='before', epochs=2)


def test_top5_in_the_line_and_in_the_history_of_an_old_run(small, edited, few, copy_of_finished):
    changed = edited({
        AFTER_EVALUATE:
            '        p = predict_probabilities(model, val_x, options.batch_size, autocast)\n'
            '        best5 = p.argsort(1)[:, -5:]\n'
            '        val_top5 = (best5 == val_y[:, np.newaxis]).any(1).mean()\n'
            + AFTER_EVALUATE,
        "'val_loss': val_loss}": "'val_loss': val_loss, 'val_top5': val_top5}",
        "loss: {val_loss:.6f}'": "loss: {val_loss:.6f} Top5: {val_top5:.6f}'"})
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
