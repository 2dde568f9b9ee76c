"""What runs on a GPU: with fake CUDA tensors on any machine, and on the machine's accelerator.

A fake tensor has a device, a shape and a type, but no numbers; PyTorch stops at any operation in
which devices or types do not match. Two things need a real device and have stand-ins: the backward
pass, and reading numbers back.
"""
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import chapter2_2_train as train
from tests.conftest import ROOT
from tests.test_run import history

CUDA = torch.device('cuda', 0)


# ---- Fake CUDA tensors -----------------------------------------------------------------------

@pytest.fixture
def fake_gpu(monkeypatch):
    """Yields a list for the network's weights."""
    version = tuple(int(part) for part in torch.__version__.split('.')[:2])
    if version < (2, 14):
        pytest.skip('PyTorch 2.6 crashes at fake CUDA tensors; the versions up to 2.13 are untried')

    def backward(scores):
        """Gives every weight a gradient, if the loss has come to a number on the GPU."""
        assert scores.device == CUDA and scores.shape == () and scores.dtype == torch.float32
        for parameter in weights:
            parameter.grad = torch.empty_like(parameter)
    weights = []
    monkeypatch.setattr(torch.Tensor, 'backward', backward)
    monkeypatch.setattr(FakeTensor, 'tolist', lambda tensor: [1] * len(tensor))
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda *_: True)
    monkeypatch.setattr(torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False)
    with FakeTensorMode():
        yield weights


def on_gpu(model):
    """What model.to('cuda') is, which does not work for fake tensors."""
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(value.shape, device=CUDA)))
        for name, value in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(value.shape, dtype=value.dtype, device=CUDA))
    return model


@pytest.mark.parametrize('recipe', ['book', 'better'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32])
def test_a_training_epoch_and_an_evaluation(fake_gpu, dtype, recipe):
    model = on_gpu(train.Classifier())
    fake_gpu += model.parameters()
    seen = []
    model.fc[-1].register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=.001, fused=True)
    if recipe == 'better':
        loss, optimizer = train.better_loss_and_optimizer(model, .001, CUDA)
    autocast, scaler = train.mixed_precision(CUDA, dtype)
    assert scaler.is_enabled() == (dtype == torch.float16)
    x = torch.empty(4, 3, 128, 128, dtype=torch.uint8)
    batches = [(x, torch.zeros(4, dtype=torch.long))] * 2
    train.train_epoch(model, batches, loss, optimizer, autocast, scaler)
    train.evaluate(model, batches, nn.CrossEntropyLoss(), autocast)
    assert seen == [dtype] * 4
    assert all(value.device == CUDA for state in optimizer.state.values()
               for value in state.values())


# ---- The machine's accelerator ---------------------------------------------------------------

ACCELERATOR = pytest.mark.skipif(not torch.accelerator.is_available(),
                                 reason='PyTorch finds no accelerator here')


@ACCELERATOR
def test_an_epoch_gives_the_same_numbers_as_on_the_cpu(scripts, food11, tmp_path):
    accelerator = torch.accelerator.current_accelerator().type
    for device in ('cpu', accelerator):
        done = scripts.call('--data-dir', food11, '--device', device, '--out', device, '--no-amp',
                            '--batch-size', 16, '--epochs', 1, '--workers', 0, '--lr', 1e-5)
        assert done.returncode == 0, done.stderr
    cpu, gpu = (history(tmp_path / device)[0] for device in ('cpu', accelerator))
    for name in ('train_loss', 'val_loss'):
        assert gpu[name] == pytest.approx(cpu[name], rel=.01)


@ACCELERATOR
@pytest.mark.parametrize('amp', [(), ('--no-amp',)])
def test_a_run_begun_on_one_device_resumes_on_the_other(scripts, food11, tmp_path, amp):
    """With the default number of workers, and pinned memory."""
    accelerator = torch.accelerator.current_accelerator().type
    common = ('--data-dir', food11, '--batch-size', 16, '--out', 'run', '--resume', *amp)
    for epochs, device in enumerate((accelerator, 'cpu', accelerator), 1):
        done = scripts.run(*common, '--device', device, '--epochs', epochs)
        assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stderr
    done = scripts.run('--out', 'run', '--predict', food11 / 'validation', '--dreams')
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='there are no two GPUs here')
def test_two_gpus_train_together(scripts, food11, tmp_path):
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2',
         ROOT / 'chapter2_2_train.py', '--data-dir', food11, '--epochs', '2', '--batch-size', '16',
         '--out', 'run'], cwd=tmp_path, capture_output=True, encoding='utf-8', timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'run' / 'confusion.png').exists()
    assert len(history(tmp_path / 'run')) == 2
