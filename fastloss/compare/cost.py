"""Time and memory of a loss, on one batch as it is trained on."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from fastloss.compare.patches import Patches
from fastloss.compare.records import Cost
from fastloss.compare.training import Task, start

SECONDS = 1.5
"""For the calls of the loss, and again for the steps."""
MOST = 20
UNKNOWN = -1
"""The peak of a system that does not tell it."""
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def measure(name: str, task: Task) -> Cost:
    """The cost of a loss: forward and backward of logits of the size of a training's.

    Times are medians. Fields that the loss makes of the labels, such as distances, are part of
    it. The peak is that of the resident memory of this process during one call, over that before
    (on a GPU that of PyTorch's allocator, which sees no others); -1 where the system does not tell.
    """
    device = task.settings.device
    patches = Patches(task.training, task.settings.patch, task.settings.batch, (0, 0), task.classes)
    images, labels = (torch.from_numpy(array).to(device) for array in patches.draw())
    network = start(task)
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
    peak = _peak(of_loss, device)
    return Cost(name, 1e3 * _seconds(of_loss, device), 1e3 * _seconds(step, device), peak)


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
    gc.collect()
    with suppress(AttributeError, OSError, TypeError):  # with glibc
        libc: Any = ctypes.CDLL(None)
        libc.malloc_trim(0)  # free memory that is kept would hide a peak
    try:
        _CLEAR.write_text("5")
        before = _resident("VmRSS")
        call()
        return max(0, _resident("VmHWM") - before)
    except OSError:
        return UNKNOWN


def _resident(entry: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(entry + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {entry}")
