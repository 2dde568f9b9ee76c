"""What runs on a GPU: with fake CUDA tensors on any machine, and on the machine's accelerator.

A fake tensor has a device, a shape and a type, but no numbers; PyTorch stops at any operation in
which devices or types do not match. Two things need a real device and have stand-ins: the backward
pass, and reading numbers back.
"""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import chapter2_2_train as train
from tests.conftest import ROOT
from tests.test_run import checkpoint, history

CPU, CUDA = torch.device('cpu'), torch.device('cuda', 0)


# ---- Fake CUDA tensors -----------------------------------------------------------------------

@pytest.fixture(params=['bfloat16', 'float16', 'float32'])
def fake_gpu(request, monkeypatch):
    """A GPU that computes in this type. Yields the type, and a list for the network's weights."""
    version = tuple(int(part) for part in torch.__version__.split('.')[:2])
    if version < (2, 14):
        pytest.skip('PyTorch 2.6 crashes at fake CUDA tensors; the versions up to 2.13 are untried')
    capability = {'bfloat16': (8, 0), 'float16': (7, 5), 'float32': (6, 1)}[request.param]
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device=None: 'Fake GPU')
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda *_: True)

    def backward(scores):
        """Gives every weight a gradient, if the loss has come to a number on the GPU."""
        assert scores.device == CUDA and scores.shape == () and scores.dtype == torch.float32
        for parameter in weights:
            parameter.grad = torch.empty_like(parameter)
    weights = []
    monkeypatch.setattr(torch.Tensor, 'backward', backward)
    monkeypatch.setattr(FakeTensor, 'tolist', lambda tensor: [1] * len(tensor))
    monkeypatch.setattr(torch.Tensor, 'share_memory_', lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False)
    with FakeTensorMode():
        yield getattr(torch, request.param), weights


def on_gpu(model):
    """What model.to('cuda') is, which does not work for fake tensors."""
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            layout = torch.channels_last if value.dim() == 4 else torch.contiguous_format
            fake = torch.empty(value.shape, device=CUDA, memory_format=layout)
            setattr(module, name, nn.Parameter(fake))
        for name, value in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(value.shape, dtype=value.dtype, device=CUDA))
    return model


@pytest.mark.parametrize('batch', [
    torch.zeros(4, 128, 128, 3, dtype=torch.uint8).shape, (4, 3, 128, 128)])
def test_a_training_epoch_and_an_evaluation(fake_gpu, batch):
    dtype, weights = fake_gpu
    model = on_gpu(train.Classifier())
    weights += model.parameters()
    seen = []
    model.fc[-1].register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    optimizer = torch.optim.Adam(model.parameters(), lr=.001, fused=True)
    autocast, scaler = train.mixed_precision(CUDA, no_amp=False)
    assert scaler.is_enabled() == (dtype == torch.float16)
    x = torch.empty(batch, dtype=torch.uint8 if batch[-1] == 3 else torch.float32)
    batches = [(x, torch.zeros(4, dtype=torch.long))] * 2
    train.train_epoch(model, batches, nn.CrossEntropyLoss(), optimizer, CUDA, autocast, scaler)
    train.evaluate(model, batches, CUDA, autocast)
    assert seen == [dtype] * 4
    assert all(value.device == CUDA for state in optimizer.state.values()
               for value in state.values())


def test_predictions_and_dreams(fake_gpu, monkeypatch):
    dtype, weights = fake_gpu
    model = on_gpu(train.Classifier())
    autocast, _ = train.mixed_precision(CUDA, no_amp=False)
    gone = []
    monkeypatch.setattr(FakeTensor, 'numpy', lambda tensor: gone.append(tensor) or tensor)

    def ascend(objective):
        assert objective.device == CUDA and objective.shape == ()
    monkeypatch.setattr(torch.Tensor, 'backward', ascend)
    monkeypatch.setattr(train, 'DataLoader', lambda dataset, batch_size: [
        torch.empty(batch_size, 3, 128, 128)])
    train.predict_probabilities(model, np.zeros((0, 128, 128, 3), np.uint8), 4, CUDA, autocast)
    assert gone[-1].shape == (4, 11) and gone[-1].device == CPU
    images, y = train.dream(model, CUDA, steps=2)
    assert images.shape == (11, 128, 128, 3) and images.device == y.device == CPU


@pytest.mark.parametrize('layout', [torch.channels_last, torch.contiguous_format])
def test_adams_averages_take_the_layout_of_their_weights(layout):
    """A checkpoint from a device with the other layout; fused Adam on CUDA insists on it."""
    def trained(memory_format):
        model = nn.Conv2d(3, 4, 3).to(memory_format=memory_format)
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.rand(1, 3, 8, 8)).sum().backward()
        optimizer.step()
        return model, optimizer
    other = {torch.channels_last: torch.contiguous_format}.get(layout, torch.channels_last)
    model, optimizer = trained(other)
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    saved = {**train.weights_checkpoint(model), 'optimizer_class': 'Adam', 'scaler': {},
             'optimizer': optimizer.state_dict()}
    averages = [state['exp_avg'].clone() for state in optimizer.state.values()]
    model, optimizer = trained(layout)
    train.restore(model, optimizer, scaler, saved, 'last.pt')
    assert model.weight.is_contiguous(memory_format=layout)
    for expected, (weights, state) in zip(averages, optimizer.state.items(), strict=True):
        assert torch.equal(state['exp_avg'], expected) and state['step'] == 1
        assert state['exp_avg'].stride() == state['exp_avg_sq'].stride() == weights.stride()


# ---- The machine's accelerator ---------------------------------------------------------------

ACCELERATOR = pytest.mark.skipif(not torch.accelerator.is_available(),
                                 reason='PyTorch finds no accelerator here')
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason='there are no two GPUs here')


@ACCELERATOR
def test_an_epoch_gives_the_same_numbers_as_on_the_cpu(scripts, food11, tmp_path):
    accelerator = torch.accelerator.current_accelerator().type
    for device in ('cpu', accelerator):
        done = scripts.call('--data-dir', food11, '--device', device, '--out', device, '--no-amp',
                            '--batch-size', 16, '--epochs', 1, '--workers', 0, '--lr', 1e-5)
        assert done.returncode == 0, done.stderr
    cpu, gpu = (history(tmp_path / device)[0] for device in ('cpu', accelerator))
    assert gpu['train_loss'] == pytest.approx(cpu['train_loss'], rel=.01)
    assert gpu['val_loss'] == pytest.approx(cpu['val_loss'], rel=.01)


@ACCELERATOR
@pytest.mark.parametrize('amp', [(), ('--no-amp',)])
def test_a_run_begun_on_one_device_resumes_on_the_other(scripts, food11, tmp_path, amp):
    """With the default number of workers, and pinned memory."""
    accelerator = torch.accelerator.current_accelerator().type
    common = ('--data-dir', food11, '--batch-size', 16, '--out', 'run', '--resume', *amp)
    for epochs, device in enumerate((accelerator, 'cpu', accelerator), 1):
        done = scripts.run(*common, '--device', device, '--epochs', epochs)
        assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stderr
    assert len(checkpoint(tmp_path / 'run')['history']) == 3
    done = scripts.run('--out', 'run', '--predict', food11 / 'validation', '--dreams')
    assert done.returncode == 0, done.stderr


@TWO_GPUS
def test_two_gpus_train_together(scripts, food11, tmp_path):
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2',
         ROOT / 'chapter2_2_train.py', '--data-dir', food11, '--epochs', '2', '--batch-size', '16',
         '--out', 'run'], cwd=tmp_path, capture_output=True, encoding='utf-8', timeout=300)
    assert done.returncode == 0, done.stderr
    assert os.path.exists(tmp_path / 'run' / 'confusion.png')
    assert len(checkpoint(tmp_path / 'run')['history']) == 2
