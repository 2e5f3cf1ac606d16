"""Time and memory of a loss, on one batch as it is trained on."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from torch import nn

from fastloss.bench.memory import peak
from fastloss.compare.patches import Patches
from fastloss.compare.records import Cost
from fastloss.compare.training import Task, start

SECONDS = 1.5
"""For the calls of the loss, and again for the steps."""
MOST = 20
UNKNOWN = -1
"""The peak of a system that does not tell it."""


def measure(name: str, task: Task, network_of: Callable[[Task], nn.Module] = start) -> Cost:
    """The cost of a loss: forward and backward of logits of the size of a training's.

    Times are medians. Fields that the loss makes of the labels, such as distances, are part of
    it. The peak is that of the resident memory of this process during one call, over that before
    (on a GPU that of PyTorch's allocator, which sees no others); -1 where the system does not tell.
    ``network_of`` is that of `fastloss.compare.training.train`.
    """
    device = task.settings.device
    patches = Patches(task.training, task.settings.patch, task.settings.batch, (0, 0), task.classes)
    images, labels = (torch.from_numpy(array).to(device) for array in patches.draw())
    network = network_of(task).to(device)
    loss = task.loss.at(1.0)
    logits = torch.randn(
        (len(images), task.classes, *images.shape[2:]), generator=torch.Generator().manual_seed(0)
    ).to(device)
    logits.requires_grad_()

    def of_loss() -> None:
        logits.grad = None
        loss(logits, labels).backward()

    optimizer = torch.optim.AdamW(network.parameters(), 1e-9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(network(images), labels).backward()
        optimizer.step()

    of_loss()
    logits.grad = None  # that of a step is made anew, and counts
    most = _peak(of_loss, device)
    return Cost(name, 1e3 * _seconds(of_loss, device), 1e3 * _seconds(step, device), most)


def _seconds(call: Callable[[], object], device: str) -> float:
    samples: list[float] = []
    while len(samples) < 3 or (len(samples) < MOST and sum(samples) < SECONDS):
        begin = perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize(device)
        samples.append(perf_counter() - begin)
    return median(samples[1:])


def _peak(call: Callable[[], object], device: str) -> int:
    if device != "cpu":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return int(torch.cuda.max_memory_allocated(device) - before)
    found = peak(call)
    return UNKNOWN if found is None else found
