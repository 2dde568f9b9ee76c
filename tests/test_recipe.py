"""--recipe better: another way to train the same network. And --features."""
import signal

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import chapter2_2_train as train
from tests.test_run import checkpoint, evaluated, history, same
from tests.test_train import CPU, SAVED_AT_THE_END, at_step


def call(scripts, *arguments, recipe='better'):
    done = scripts.call('--device', 'cpu', '--recipe', recipe, *arguments)
    assert done.returncode == 0, done.stderr
    return done


# ---- The recipe ------------------------------------------------------------------------------

def test_stopped_in_the_middle_of_its_schedule_and_resumed(small, few, tmp_path):
    """An epoch has 3 training steps, and 3 for validation."""
    options = ('--data-dir', few, '--batch-size', 4, '--epochs', 6, '--no-amp')
    call(small, *options, '--out', 'whole')
    with at_step(3 * 6 + 2, lambda: signal.raise_signal(signal.SIGTERM)):
        done = small.call('--device', 'cpu', '--recipe', 'better', *options, '--out', 'run')
    assert done.returncode == 130 and done.stdout.count('/006]') == 3
    # The run knows its recipe.
    done = small.call('--device', 'cpu', '--out', 'run', '--resume')
    assert done.returncode == 0 and done.stdout.startswith('[004/006]'), done.stderr
    for name in ('last.pt', 'best.pt'):
        assert same(checkpoint(tmp_path / 'run', name), checkpoint(tmp_path / 'whole', name))
    assert history(tmp_path / 'run') == history(tmp_path / 'whole')
    # The schedule's last rate, and as much weight decay as was measured.
    group = checkpoint(tmp_path / 'run')['optimizer']['param_groups'][0]
    assert group['lr'] == train.better_learning_rate(.001, 6, 6) and group['weight_decay'] == .05
    # The smoothed loss is for training only.
    best = max(history(tmp_path / 'run'), key=lambda row: row['val_acc'])
    right, loss = evaluated(small, tmp_path / 'run', 'best.pt', few, no_amp=True)
    assert (right, loss) == pytest.approx((best['val_acc'], best['val_loss']), rel=1e-4)


def test_its_options_and_what_is_typed(small, few, tmp_path):
    call(small, '--data-dir', few, '--epochs', 1, '--out', 'better')
    call(small, '--data-dir', few, '--epochs', 1, '--out', 'typed', '--batch-size', 9, '--lr', .01)
    better, typed = (checkpoint(tmp_path / name)['options'] for name in ('better', 'typed'))
    assert (better['recipe'], better['batch_size'], better['lr']) == ('better', 64, .001)
    assert (typed['recipe'], typed['batch_size'], typed['lr']) == ('better', 9, .01)


def test_the_images_are_those_of_its_transform(edited, few):
    """Here its transform makes every image black, and leaves validation alone."""
    black = edited({'    transforms.TrivialAugmentWide(),':
                    '    lambda img: img.point([0] * 768),'})
    seen = []

    def see(module, inputs):
        if isinstance(module, nn.Sequential):
            seen.append((module.training, inputs[0].max().item() > 0))
    with nn.modules.module.register_module_forward_pre_hook(see):
        for recipe in ('book', 'better'):
            call(black, '--data-dir', few, '--epochs', 1, '--out', recipe, recipe=recipe)
    assert [bright for training, bright in seen if training] == [True, False]
    assert all(bright for training, bright in seen if not training)


def test_the_loss_for_training_is_smoothed():
    loss, _ = train.better_loss_and_optimizer(nn.Linear(1, 1), .001, CPU)
    certain_and_right = torch.tensor([[99., 0, 0]])
    assert loss(certain_and_right, torch.tensor([0])) > 1


def test_the_learning_rate_rises_for_a_fifth_and_falls_to_zero():
    rates = [train.better_learning_rate(.001, epoch, 100) for epoch in range(1, 101)]
    peak = int(np.argmax(rates))
    assert peak in (19, 20) and .0009 < rates[peak] <= .001
    assert rates[:peak] == sorted(rates[:peak]) and 0 < rates[0] < .0001
    assert rates[peak:] == sorted(rates[peak:], reverse=True) and 0 < rates[-1] < 1e-6


def test_it_learns(edited, food11, tmp_path):
    """A small network, which would guess one dish of 11."""
    call(edited({}, base=SAVED_AT_THE_END), '--data-dir', food11, '--epochs', 40,
         '--batch-size', 8, '--lr', .01, '--no-amp')
    accuracies = [row['val_acc'] for row in history(tmp_path / 'runs' / '001')]
    assert max(accuracies) > .35, accuracies


# ---- Feature maps ----------------------------------------------------------------------------

def test_the_receptive_fields_and_sizes_of_the_five_blocks():
    image = np.zeros((128, 128, 3), np.uint8)
    blocks = train.feature_maps(train.make_model(11, CPU), image)
    assert [field for _, field in blocks] == [4, 10, 22, 46, 94]
    assert [maps.shape for maps, _ in blocks] == [
        (64, 64, 64), (128, 32, 32), (256, 16, 16), (512, 8, 8), (512, 4, 4)]


def test_feature_maps_are_those_of_a_network_in_use():
    """Its batch norm does not learn from the photograph, and does not depend on it alone."""
    torch.manual_seed(0)
    model = train.make_model(11, CPU)
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    x = torch.as_tensor(image).permute(2, 0, 1)[None] / 255
    expected = model.eval().convolution[:4](x)[0].detach().numpy()
    (maps, _), *_ = train.feature_maps(model.train(), image)
    assert np.allclose(maps, expected, atol=1e-5)


def test_the_receptive_field_is_that_of_the_layers():
    model = nn.Module()
    model.convolution = nn.Sequential(
        nn.Conv2d(3, 8, (5, 5), 2, 2), nn.MaxPool2d(3, 2), nn.Conv2d(8, 8, 3), nn.MaxPool2d(2))
    blocks = train.feature_maps(model, np.zeros((128, 128, 3), np.uint8))
    # 5; 5 + 2·2 = 9; 9 + 2·4 = 17; 17 + 1·4 = 21
    assert [field for _, field in blocks] == [9, 21]


def test_features_draws_the_photograph_and_the_strongest_maps(scripts, few, tmp_path, monkeypatch):
    drawn = []
    original = Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda figure, *arguments, **options: (
        drawn.append(figure), original(figure, *arguments, **options)))
    model = train.make_model(11, CPU)
    (tmp_path / 'run').mkdir()
    torch.save({'model': model.state_dict(),
                'required': train.requirements(model, scripts.data.CLASSES)},
               tmp_path / 'run' / 'best.pt')
    photograph = few / 'validation' / '0_0.jpg'
    done = scripts.call('--out', 'run', '--features', photograph, '--device', 'cpu')
    file = tmp_path / 'run' / 'features.png'
    assert done.returncode == 0 and str(file) in done.stdout, done.stderr
    assert file.stat().st_size > 10_000
    # Five rows of eight.
    assert len(drawn[-1].axes) == 5 * 8
    image = scripts.data.read_image(photograph)
    for block, (maps, field) in enumerate(train.feature_maps(model, image)):
        first, *others = drawn[-1].axes[8 * block:8 * block + 8]
        assert (first.images[0].get_array() == image[:, :, ::-1]).all()
        size = f'{maps.shape[1]} × {maps.shape[2]}'
        assert first.get_title() == f'block {block + 1}: {size}\nreceptive field\n{field} × {field}'
        strongest = maps.mean((1, 2)).argsort()[::-1][:7]
        assert [axes.get_title() for axes in others] == [f'channel {i}' for i in strongest]
        assert all((axes.images[0].get_array() == maps[i]).all()
                   for axes, i in zip(others, strongest))

    # A folder, no image, and nothing.
    (tmp_path / 'notes.jpg').write_text('notes')
    for wrong in (tmp_path, tmp_path / 'notes.jpg', tmp_path / 'none.jpg'):
        done = scripts.call('--out', 'run', '--features', wrong, '--device', 'cpu')
        assert done.returncode == 1 and done.stderr.count('error: ') == 1
        assert done.stderr.splitlines()[-1].startswith(f'error: {wrong}')
