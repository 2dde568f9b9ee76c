"""Ten changes that an engineer makes, each with its edit where one would look for it: the changed
scripts train, resume and predict as they should, or say plainly why they cannot."""
import csv
import shutil

import pytest
import torch

from tests.fake_food11 import draw_food11
from tests.test_run import checkpoint

LOSS_LINE = '    loss = nn.CrossEntropyLoss()\n'
MODEL_LINE = '    model = Classifier()\n'
SCHEDULE_PLACE = '        # If it is computed from `epoch`, it is right in a resumed run as well.\n'
ROW_PLACE = '        run.save_if_due(model, optimizer, scaler)\n'
ADAM = "torch.optim.Adam(model.parameters(), lr=run.settings['lr'],"
TEST_TRANSFORM = ('test_transform = transforms.Compose([\n    transforms.ToPILImage(),\n'
                  '    transforms.ToTensor(),\n')


def use(scripts, few, *arguments, epochs=1):
    """Trains, resumes, and predicts a photograph."""
    common = ('--device', 'cpu', '--batch-size', 4, '--data-dir', few, '--out', 'run', '--resume')
    for wanted in range(1, epochs + 2):
        done = scripts.call(*common, '--epochs', wanted, *arguments)
        assert done.returncode == 0, done.stderr
    photograph = next((few / 'validation').rglob('*.jpg'))
    done = scripts.call('--out', 'run', '--device', 'cpu', '--predict', photograph)
    assert done.returncode == 0 and done.stdout.count('%') == min(3, len(scripts.data.CLASSES))
    return scripts.cwd / 'run'


def test_color_jitter_and_normalize_reach_report_and_prediction(edited, few, tmp_path):
    normalize = '    transforms.Normalize([0.4, 0.5, 0.6], [0.2, 0.2, 0.2]),  # BGR\n'
    changed = edited({
        '    transforms.RandomRotation(15),': '    transforms.ColorJitter(0.2, 0.2),\n'
                                              '    transforms.RandomRotation(15),',
        '    transforms.ToTensor(),          #': f'    transforms.ToTensor(),\n{normalize}    #',
        TEST_TRANSFORM: TEST_TRANSFORM + normalize,
    })
    run = use(changed, few)
    # The network says by what it is given: once in the report, and once in --predict.
    seen = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].min().item()))
    try:
        changed.call('--out', 'run', '--device', 'cpu', '--resume', '--epochs', 2)
        assert seen and min(seen) < -1
        seen.clear()
        changed.call('--out', 'run', '--device', 'cpu', '--predict', few / 'validation' / '0_0.jpg')
        assert seen and min(seen) < -1
    finally:
        hook.remove()
    assert changed.call('--out', 'run', '--device', 'cpu', '--dreams').returncode == 0
    # A checkpoint from before the change is refused, as it would be wrong without a word.
    before = edited({})
    done = before.call('--out', run, '--device', 'cpu', '--predict', few / 'validation' / '0_0.jpg')
    assert done.returncode == 1 and 'incompatible: its test_transform was' in done.stderr


@pytest.mark.parametrize('classes', [
    [f'flower {i}' for i in range(17)], ['米饭', '面条', '汤'], ['class 1', 'class 2']])
def test_another_data_set(edited, tmp_path, classes):
    text = ("CLASSES = ['Bread', 'Dairy product', 'Dessert', 'Egg', 'Fried food', 'Meat',\n"
            "           'Noodles/Pasta', 'Rice', 'Seafood', 'Soup', 'Vegetable/Fruit']")
    changed = edited({text: f'CLASSES = {classes!r}'})
    draw_food11(tmp_path / 'flat', 2, 1, class_count=len(classes))
    for file in (tmp_path / 'flat').glob('*/*.jpg'):
        label, number = file.stem.split('_')
        folder = tmp_path / 'mine' / file.parent.name / classes[int(label)].replace(' ', '_')
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / f'{number}.jpg')
    use(changed, tmp_path / 'mine')
    model = changed.train.load_model(tmp_path / 'run' / 'best.pt', torch.device('cpu'))
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, len(classes))
    done = changed.call('--data-dir', tmp_path / 'mine', main=changed.data.main)
    assert done.returncode == 0 and done.stdout.count(classes[-1]) == 1
    assert len(done.stdout.splitlines()) == len(classes) + 5


def test_a_learning_rate_schedule_is_right_after_a_resume(edited, few):
    schedule = "        optimizer.param_groups[0]['lr'] = 0.001 * 0.5 ** (epoch - 1)\n"
    changed = edited({SCHEDULE_PLACE: SCHEDULE_PLACE + schedule})
    run = use(changed, few, epochs=2)
    assert checkpoint(run)['optimizer']['param_groups'][0]['lr'] == 0.001 * 0.25
    changed.call('--device', 'cpu', '--batch-size', 4, '--data-dir', few, '--out', 'whole',
               '--epochs', 3)
    one, other = (checkpoint(folder)['model'] for folder in (run, run.parent / 'whole'))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_resnet18_and_an_old_runs_checkpoint(edited, few, finished):
    from tests.conftest import SMALL
    changed = edited({MODEL_LINE: '    from torchvision.models import resnet18\n'
                                  '    model = resnet18(num_classes=len(data.CLASSES))\n'},
                     base={key: SMALL[key] for key in ('image_size = 128', 'save_seconds = 60')})
    use(changed, few)
    for arguments in (['--resume'], ['--predict', few / 'validation' / '0_0.jpg']):
        done = changed.call('--out', finished[0], '--device', 'cpu', *arguments)
        assert done.returncode == 1 and 'corrupt' not in done.stderr
        assert 'incompatible: its network was Sequential, now it is ResNet' in done.stderr


def test_images_of_224_pixels(edited, few, finished):
    changed = edited({'image_size = 128': 'image_size = 224',
                      'nn.Linear(512 * 4 * 4, 1024)': 'nn.Linear(512 * 7 * 7, 1024)'}, base={})
    done = changed.call('--device', 'cpu', '--batch-size', 10, '--data-dir', few, '--out', 'run',
                        '--epochs', 1)
    assert done.returncode == 0, done.stderr
    photograph = few / 'validation' / '0_0.jpg'
    done = changed.call('--out', 'run', '--device', 'cpu', '--predict', photograph)
    assert done.returncode == 0
    unchanged = edited({}, base={})
    done = unchanged.call('--out', 'run', '--device', 'cpu', '--predict', photograph)
    assert done.returncode == 1
    assert 'incompatible: its image_size was 224, now it is 128' in done.stderr


def test_a_log_and_a_checkpoint_every_second_epoch(edited, few, tmp_path):
    """The log stands for TensorBoard's."""
    changed = edited({ROW_PLACE: ROW_PLACE + (
        '        if run.rank == 0:\n'
        '            with open("log.txt", "a") as log:\n'
        '                print(epoch, row["val_acc"], file=log)\n'
        '            if epoch % 2 == 0:\n'
        '                path = run.folder / f"epoch_{epoch:03d}.pt"\n'
        '                write_checkpoint(path, weights_checkpoint(model))\n')})
    run = use(changed, few, epochs=3)
    lines = (tmp_path / 'log.txt').read_text().splitlines()
    assert [line.split()[0] for line in lines] == ['1', '2', '3', '4']
    assert sorted(file.name for file in run.glob('epoch_*')) == ['epoch_002.pt', 'epoch_004.pt']
    done = changed.call('--out', 'run', '--device', 'cpu', '--checkpoint', 'epoch_002.pt',
                        '--predict', few / 'validation' / '0_0.jpg')
    assert done.returncode == 0


def test_label_smoothing_changes_the_training_loss_only(edited, few, tmp_path):
    rows = {}
    for smoothing in (0, 0.9):
        smoothed = f'    loss = nn.CrossEntropyLoss(label_smoothing={smoothing})\n'
        # lr=0: the weights stay the same.
        changed = edited({LOSS_LINE: smoothed, ADAM: ADAM.replace("run.settings['lr']", '0')})
        done = changed.call('--device', 'cpu', '--data-dir', few, '--epochs', 1,
                            '--out', f'run {smoothing}')
        assert done.returncode == 0, done.stderr
        with open(tmp_path / f'run {smoothing}' / 'history.csv', newline='') as file:
            rows[smoothing], = csv.DictReader(file)
    assert rows[0]['val_loss'] == rows[0.9]['val_loss']
    assert rows[0]['train_loss'] != rows[0.9]['train_loss']


def test_another_figure_in_the_line_and_the_history_of_an_old_run(edited, few, copy_of_finished):
    changed = edited({"'val_loss': val_loss}": "'val_loss': val_loss, 'val_top5': 0.75}",
                      "loss: {val_loss:.6f}',": "loss: {val_loss:.6f} Top5: 0.75',"})
    done = changed.call('--out', 'run', '--resume', '--epochs', 4, '--device', 'cpu')
    assert done.returncode == 0 and 'Top5: 0.75' in done.stdout
    with open(copy_of_finished / 'history.csv', newline='') as file:
        assert [row['val_top5'] for row in csv.DictReader(file)] == ['', '', '', '0.75']


def test_weight_decay_holds_in_a_resumed_run(edited, few, copy_of_finished):
    changed = edited({ADAM: f'{ADAM} weight_decay=0.5,'})
    done = changed.call('--out', 'run', '--resume', '--epochs', 4, '--device', 'cpu')
    assert done.returncode == 0, done.stderr
    optimizer = checkpoint(copy_of_finished)['optimizer']
    assert optimizer['param_groups'][0]['weight_decay'] == 0.5
    assert optimizer['state'][0]['step'] == 12


def test_another_optimizer_does_not_take_adams_state(edited, few, copy_of_finished):
    changed = edited({ADAM: ADAM.replace('Adam', 'AdamW')})
    done = changed.call('--out', 'run', '--resume', '--epochs', 4, '--device', 'cpu')
    assert done.returncode == 1
    assert 'incompatible: its optimizer was Adam, now it is AdamW' in done.stderr
