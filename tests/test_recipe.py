"""--recipe better: another way to train the same network. And --features."""
import signal

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import chapter2_2_train as train
from tests.test_run import checkpoint, evaluated, history, same
from tests.test_train import CPU, at_step


def call(scripts, *arguments, recipe='better', returncode=0):
    done = scripts.call('--device', 'cpu', '--recipe', recipe, *arguments)
    assert done.returncode == returncode, done.stderr
    return done


# ---- The recipe ------------------------------------------------------------------------------

def test_stopped_in_the_middle_of_its_schedule_and_resumed(small, few, tmp_path):
    """An epoch has 3 training steps, and 3 for validation."""
    options = ('--data-dir', few, '--batch-size', 4, '--epochs', 6, '--no-amp')
    call(small, *options, '--out', 'whole')
    with at_step(3 * 6 + 2, lambda: signal.raise_signal(signal.SIGTERM)):
        call(small, *options, '--out', 'run', returncode=130)
    # The run knows its recipe.
    done = small.call('--device', 'cpu', '--out', 'run', '--resume')
    assert done.returncode == 0 and done.stdout.startswith('[004/006]'), done.stderr
    for name in ('last.pt', 'best.pt'):
        assert same(checkpoint(tmp_path / 'run', name), checkpoint(tmp_path / 'whole', name))
    # The schedule's last rate, and as much weight decay as was measured.
    group = checkpoint(tmp_path / 'run')['optimizer']['param_groups'][0]
    assert group['lr'] == train.better_learning_rate(.001, 6, 6) and group['weight_decay'] == .05
    # The smoothed loss is for training only.
    best = max(history(tmp_path / 'run'), key=lambda row: row['val_acc'])
    right, loss = evaluated(small, tmp_path / 'run', 'best.pt', few, no_amp=True)
    assert (right, loss) == pytest.approx((best['val_acc'], best['val_loss']), rel=1e-4)


@pytest.mark.parametrize('arguments, values', [
    ([], (64, 100, .001)), (['--demo'], (16, 5, .0001)),
    (['--demo', '--batch-size', '9', '--lr', '.01'], (9, 5, .01))])
def test_its_options_the_demos_and_those_that_are_typed(arguments, values):
    options = train.choose_options(train.parse_arguments(['--recipe', 'better', *arguments]))
    assert (options.batch_size, options.epochs, options.lr) == values


def test_the_images_are_those_of_its_transform(edited, few):
    """Here its transform makes every image black, and leaves validation alone."""
    black = edited({'    transforms.TrivialAugmentWide(),':
                    '    lambda img: img.point([0] * 768),'})
    bright = {True: [], False: []}

    def see(module, inputs):
        if isinstance(module, nn.Sequential):
            bright[module.training].append(inputs[0].max().item() > 0)
    with nn.modules.module.register_module_forward_pre_hook(see):
        for recipe in ('book', 'better'):
            call(black, '--data-dir', few, '--epochs', 1, '--out', recipe, recipe=recipe)
    assert bright[True] == [True, False] and all(bright[False])


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


# ---- Feature maps ----------------------------------------------------------------------------

def test_the_feature_maps_and_receptive_fields_of_the_five_blocks():
    """Batch norm neither learns from the photograph nor depends on it alone."""
    torch.manual_seed(0)
    model = train.make_model(11, CPU)
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    x = torch.as_tensor(image).permute(2, 0, 1)[None] / 255
    expected = model.eval().convolution[:4](x)[0].detach().numpy()
    blocks = train.feature_maps(model.train(), image)
    assert np.allclose(blocks[0][0], expected, atol=1e-5)
    assert [field for _, field in blocks] == [4, 10, 22, 46, 94]
    assert [maps.shape for maps, _ in blocks] == [
        (64, 64, 64), (128, 32, 32), (256, 16, 16), (512, 8, 8), (512, 4, 4)]


def test_features_draws_the_photograph_and_the_strongest_maps(scripts, few, tmp_path, monkeypatch):
    drawn = []
    original = Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda figure, *arguments, **options: (
        drawn.append(figure), original(figure, *arguments, **options)))
    model = train.make_model(11, CPU)
    torch.save({'model': model.state_dict(),
                'required': train.requirements(model, scripts.data.CLASSES)}, tmp_path / 'best.pt')
    photograph = few / 'validation' / '0_0.jpg'
    done = call(scripts, '--out', tmp_path, '--features', photograph)
    assert done.stdout == f'picture written to {tmp_path / "features.png"}\n'
    # Five rows of eight.
    rows = np.reshape(drawn[0].axes, (5, 8))
    image = scripts.data.read_image(photograph)
    for (first, *others), (maps, field) in zip(rows, train.feature_maps(model, image)):
        assert (first.images[0].get_array() == image[:, :, ::-1]).all()
        assert first.get_title().endswith(f'\nreceptive field\n{field} × {field}')
        for axes, channel in zip(others, maps.mean((1, 2)).argsort()[::-1]):
            assert axes.get_title() == f'channel {channel}'
            assert (axes.images[0].get_array() == maps[channel]).all()
    done = call(scripts, '--out', tmp_path, '--features', __file__, returncode=1)
    assert done.stderr.startswith(f'error: {__file__} cannot be read as an image')
