"""Ten changes that an engineer makes, each with its edit where one would look for it: the changed
scripts train, resume and predict as they should, or say plainly why they cannot."""
import csv
import shutil

import pytest
import torch
from torch import nn

from tests.conftest import SMALL
from tests.fake_food11 import draw_food11
from tests.test_run import checkpoint, same

ADAM = 'torch.optim.Adam(model.parameters(), lr=options.lr,'
LOSS = 'nn.CrossEntropyLoss()'
MODEL = 'model = Classifier(class_count)'
SCHEDULE_PLACE = '        # A learning-rate schedule.'
AFTER_EVALUATE = '        seconds = time.perf_counter() - start_time\n'
AFTER_HISTORY = '        if epoch == 1 or time.monotonic() - saved_time'


def use_run(scripts, *arguments):
    done = scripts.call('--device', 'cpu', '--out', 'run', *arguments)
    assert done.returncode == 0, done.stderr
    return done


def train(scripts, data_dir, *arguments, epochs=1):
    """Trains until it has so many epochs. An --out in `arguments` goes before use_run's."""
    return use_run(scripts, '--data-dir', data_dir, '--batch-size', 4, '--resume',
                   '--epochs', epochs, *arguments)


def use(scripts, data_dir, epochs=2):
    """Trains one epoch, resumes, and predicts a photograph."""
    train(scripts, data_dir)
    train(scripts, data_dir, epochs=epochs)
    use_run(scripts, '--predict', next((data_dir / 'validation').rglob('*.jpg')))
    return scripts.cwd / 'run'


def history(folder):
    with open(folder / 'history.csv', newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def assert_refused(scripts, run, reason):
    """The run is of no use to the changed scripts, and is left as it was."""
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    for arguments in (['--resume', '--epochs', 9], ['--dreams']):
        done = scripts.call('--out', run, '--device', 'cpu', *arguments)
        assert done.returncode == 1 and f'.pt is incompatible: {reason}' in done.stderr
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
    # A run from before the change would be wrong without a word.
    assert_refused(edited(edits), copy_of_finished, 'its test_transform was Compose(')
    shutil.rmtree(copy_of_finished)
    # What the network is given.
    seen = []

    def see(module, inputs):
        if isinstance(module, nn.Sequential):
            seen.append(inputs[0])
    with nn.modules.module.register_module_forward_pre_hook(see):
        train(edited(edits), few)
        # As in another process, the lambda is at another address now.
        changed = edited(edits)
        train(changed, few, epochs=2)
        use_run(changed, '--predict', few / 'validation' / '0_0.jpg')
    assert all(x.dtype == torch.float32 and x.min() < -1 for x in seen)
    use_run(changed, '--dreams')


@pytest.mark.parametrize('classes, divided', [
    ([f'flower {i:02d}' for i in range(17)], True), (['cats', 'dogs'], False)])
def test_another_data_set_needs_no_edit(small, tmp_path, classes, divided):
    draw_food11(tmp_path / 'flat', 4, 2, class_count=len(classes))
    for file in (tmp_path / 'flat').glob('*/*.jpg'):
        label, number = file.stem.split('_')
        part = file.parent.name
        folder = tmp_path / 'mine' / (part if divided else '.') / classes[int(label)]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / f'{part}{number}.jpg')
    done = train(small, 'mine')
    val_count = len(small.data.find_photographs(tmp_path / 'mine')[2])
    assert val_count == 2 * len(classes) or not divided
    assert f'{len(classes)} classes, {6 * len(classes) - val_count} photographs for training, ' \
        f'{val_count} for validation' in done.stderr.splitlines()
    # On stdout are an epoch and the table, and nothing else.
    table = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [' '.join(row[1:-4]) for row in table[1:-1]] == classes
    assert table[-1][:2] == ['total', str(val_count)]
    # A resumed run knows where its photographs are.
    done = use_run(small, '--resume', '--epochs', 2)
    assert f'resumed from epoch 1 in {tmp_path / "run"}' in done.stderr
    use_run(small, '--dreams')
    # The last folder is one of a class.
    done = use_run(small, '--predict', folder / f'{part}{number}.jpg')
    assert sum(f'{name} ' in done.stdout for name in classes) == min(3, len(classes))
    # With a class more, it is another run.
    shutil.copytree(folder, tmp_path / 'mine' / ('training' if divided else '.') / 'another')
    done = small.call('--out', 'run', '--resume', '--epochs', 3, '--device', 'cpu')
    assert done.returncode == 1
    assert f'last.pt is incompatible: its classes was {classes}' in done.stderr.splitlines()[-1]


def test_a_learning_rate_schedule_is_right_after_a_resume(edited, few, tmp_path):
    schedule = "        optimizer.param_groups[0]['lr'] = 0.001 * 0.5 ** (epoch - 1)\n"
    changed = edited({SCHEDULE_PLACE: schedule + SCHEDULE_PLACE})
    resumed = checkpoint(use(changed, few, epochs=3))
    assert resumed['optimizer']['param_groups'][0]['lr'] == 0.001 * 0.25
    train(changed, few, '--out', 'whole', epochs=3)
    assert same(resumed, checkpoint(tmp_path / 'whole'))


def test_a_ready_network(edited, few, copy_of_finished):
    changed = edited({MODEL: 'from torchvision.models import shufflenet_v2_x0_5\n'
                             '    model = shufflenet_v2_x0_5(num_classes=class_count)'})
    assert_refused(changed, copy_of_finished, 'its network was Sequential, now it is ShuffleNetV2')
    shutil.rmtree(copy_of_finished)
    use(changed, few)


def test_another_layer_in_the_network(edited, copy_of_finished):
    network = SMALL[MODEL].replace('nn.Conv2d(3, 4, 8, 8)', 'nn.Conv2d(3, 4, 8, 8, bias=False)')
    assert_refused(edited({MODEL: network}), copy_of_finished, 'its weights have other names or')


def test_images_of_224_pixels(edited, scripts, tmp_path):
    draw_food11(tmp_path / 'three', 1, 1, class_count=3)
    changed = edited({'image_size = 128': 'image_size = 224',
                      'nn.Linear(512 * 4 * 4, 1024)': 'nn.Linear(512 * 7 * 7, 9)',
                      # Not necessary, but files with 1024 of these are large.
                      'nn.Linear(1024, 512)': 'nn.Linear(9, 512)'}, base={})
    train(changed, 'three')
    predict = ('--predict', tmp_path / 'three' / 'validation' / '0_0.jpg')
    use_run(changed, *predict)
    done = changed.call('--data-dir', 'three', '--save', 'preview.png', main=changed.data.main)
    assert done.returncode == 0 and done.stdout.startswith('(3, 224, 224, 3)')
    done = scripts.call('--out', 'run', '--device', 'cpu', *predict)
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
    lines = [line.split() for line in (tmp_path / 'log.txt').read_text().splitlines()]
    assert lines == [[row['epoch'], row['val_acc']] for row in history(run)]
    assert sorted(file.name for file in run.glob('epoch_*')) == ['epoch_002.pt', 'epoch_004.pt']
    use_run(changed, '--predict', few / 'validation' / '0_0.jpg', '--checkpoint', 'epoch_002.pt')


def test_label_smoothing_and_class_weights(small, edited, few, tmp_path):
    changed = edited({LOSS: 'nn.CrossEntropyLoss(label_smoothing=0.9, '
                            'weight=torch.tensor([9., 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]))'})
    # With the learning rate 0, the weights stay the same.
    train(small, few, '--lr', 0, '--out', 'before')
    train(changed, few, '--lr', 0)
    (before,), (after,) = history(tmp_path / 'before'), history(tmp_path / 'run')
    assert all(before[name] == after[name] for name in ('train_acc', 'val_acc'))
    assert all(before[name] != after[name] for name in ('train_loss', 'val_loss'))
    # Another loss does not make a run unusable.
    train(changed, few, '--lr', 0.001, '--out', 'before', epochs=2)


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
    # The change is undone.
    train(small, few, epochs=5)
    assert [len(row) for row in history(copy_of_finished)] == [6] * 5


def test_weight_decay_holds_in_a_resumed_run(edited, few, copy_of_finished):
    train(edited({ADAM: f'{ADAM} weight_decay=0.5,'}), few, epochs=4)
    optimizer = checkpoint(copy_of_finished)['optimizer']
    assert optimizer['param_groups'][0]['weight_decay'] == 0.5
    # Adam's averages are still those of the run: 4 epochs of 3 steps.
    assert optimizer['state'][0]['step'] == 12
