"""Training with one implementation of the loss, and the cost of its steps."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from statistics import median
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

import fastloss as fl
from brain.history import History
from brain.unet import DIVISOR, SMALLEST_PATCH, UNet
from brain.volume import CLASSES, SPACING, Brain, Patches, planes
from fastloss.bench.memory import peak

BATCH = 4
LEARNING_RATE = 0.01
"""Low enough that steps do not overshoot, which would amplify rounding errors."""
SMOOTH = 1e-5
POINTS = 12
"""How often the held-out slab is evaluated, at equal intervals."""
METRICS = ("dice", "hd95", "nsd")
DEFINITION = "deepmind"
"""Of surfaces: `fastloss.metrics.surface` has the others."""
TOLERANCE = 1.0
"""The tolerance of NSD in mm: a voxel."""
CONTEXT = 12
"""Voxels of context on each side of the predicted part."""

BOUNDARY_FACTORS = (0.01, 0.1)
"""Of the boundary loss, in the first step and the last: it grows linearly."""

LossFunction = Callable[[Tensor, Tensor, float], Tensor]


def make_loss(implementation: str, loss_name: str) -> LossFunction:
    """A function of logits (B, C, D, H, W), a label map (B, 1, D, H, W), and the boundary's factor.

    The Dice is that of the whole batch: per patch, a missing tissue would cost 1. The boundary loss
    is that of the tissues, and measures the distances of a patch in each call.
    """
    with_boundary = loss_name == "dice_ce_boundary"
    if implementation == "monai":
        from monai.losses import BoundaryLoss, DiceCELoss

        region = DiceCELoss(
            to_onehot_y=True, softmax=True, batch=True, smooth_nr=SMOOTH, smooth_dr=SMOOTH
        )
        boundary = BoundaryLoss(to_onehot_y=True, softmax=True, include_background=False)

        def monai_loss(logits: Tensor, labels: Tensor, factor: float) -> Tensor:
            value = region(logits, labels)
            return value + factor * boundary(logits, labels) if with_boundary else value

        return monai_loss

    dice_ce = fl.Dice(batch=True, smooth_nr=SMOOTH, smooth_dr=SMOOTH) + fl.CrossEntropy()
    distances = fl.Boundary(include_background=False)

    def fused_loss(logits: Tensor, labels: Tensor, factor: float) -> Tensor:
        loss = dice_ce + factor * distances if with_boundary else dice_ce
        return loss(logits, labels)

    return fused_loss


def boundary_factor(step: int, steps: int) -> float:
    """That of one of the steps, 1 … ``steps``."""
    first, last = BOUNDARY_FACTORS
    return first + (last - first) * (step - 1) / max(steps - 1, 1)


def train(
    implementation: str,
    loss_name: str,
    brain: Brain,
    steps: int,
    size: int,
    seed: int,
    dtype: str,
) -> History:
    """Train a new network, and print its progress. Run it in a fresh process."""
    history = History(implementation, loss_name, dtype)
    torch.set_default_dtype(getattr(torch, dtype))
    brain = replace(brain, image=brain.image.astype(dtype))
    # First, as memory left by training would hide a peak.
    history.loss_memory, history.step_memory = _peak_memory(implementation, loss_name, brain, size)
    torch.manual_seed(seed)
    net = UNet(len(CLASSES))
    loss_function = make_loss(implementation, loss_name)
    optimizer = torch.optim.SGD(net.parameters(), LEARNING_RATE, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    patches = Patches(brain, size, seed)
    every = max(1, steps // POINTS)
    for step in range(1, steps + 1):
        image, labels = map(torch.from_numpy, patches.draw(BATCH))
        start = perf_counter()
        optimizer.zero_grad()
        logits = net(image)
        loss = loss_function(logits, labels, boundary_factor(step, steps))
        loss.backward()
        optimizer.step()
        history.seconds.append(perf_counter() - start)
        history.loss.append(loss.item())
        schedule.step()
        if step == 1 or step % every == 0 or step == steps:
            predicted = _predict(net, brain, 1, brain.held_out)
            start = perf_counter()
            scores = evaluate(predicted, brain.labels[:, brain.held_out])
            history.evaluation_seconds.append(perf_counter() - start)
            for values, name in zip(history.measured, METRICS, strict=True):
                values[step] = dict(zip(scores.classes, scores[name][0].tolist(), strict=True))
            _report(history, steps)
    history.loss_seconds = _seconds(loss_function, logits.detach(), labels)
    history.slices = [
        _predict(net, brain, axis, slice(index, index + 1)).squeeze(axis)
        for axis, index in planes(brain)
    ]
    return history


def evaluate(predicted: np.ndarray, truth: np.ndarray) -> fl.metrics.Scores:
    """The metrics of each tissue in a part of the volume, from its labels."""
    return fl.metrics.evaluate(
        predicted[None],
        truth[None],
        metrics=METRICS,
        classes=CLASSES,
        spacing=SPACING,
        definition=DEFINITION,
        tolerance=TOLERANCE,
    )


def _report(history: History, steps: int) -> None:
    step = len(history.loss)
    found = {
        "Dice": [f"{value:.3f}" for value in history.held_out[step].values()],
        "HD95": [f"{value:.1f}" for value in history.hd95[step].values()],
        "NSD": [f"{value:.3f}" for value in history.nsd[step].values()],
    }
    values = ", ".join(f"{name} {' '.join(each)}" for name, each in found.items())
    print(
        f"{history.implementation:>8}  step {step:>{len(str(steps))}}/{steps}"
        f"  loss {history.loss[-1]:.4f}  {median(history.seconds):.3f} s/step"
        f"  held-out {' and '.join(history.held_out[step])}: {values}"
        f"  ({1e3 * history.evaluation_seconds[-1]:.0f} ms)",
        flush=True,
    )


def _seconds(loss_function: LossFunction, logits: Tensor, labels: Tensor) -> float:
    """Median seconds of forward and backward into a new gradient."""
    logits.requires_grad_(True)
    samples = []
    for _ in range(21):
        logits.grad = None
        start = perf_counter()
        loss_function(logits, labels, BOUNDARY_FACTORS[1]).backward()
        samples.append(perf_counter() - start)
    return median(samples[1:])


def _peak_memory(
    implementation: str, loss_name: str, brain: Brain, size: int
) -> tuple[int | None, int | None]:
    """The peak memory of the loss alone, and of forward and backward of a whole step."""
    loss_function = partial(make_loss(implementation, loss_name), factor=BOUNDARY_FACTORS[1])
    net = UNet(len(CLASSES))
    image, labels = map(torch.from_numpy, Patches(brain, size, seed=0).draw(BATCH))
    logits = torch.randn(BATCH, len(CLASSES), size, size, size, requires_grad=True)

    # Once on a corner, for one-time initialisation.
    edge = slice(0, SMALLEST_PATCH)
    corner = (..., edge, edge, edge)
    loss_function(net(image[corner]), labels[corner]).backward()
    net.zero_grad()

    alone = peak(lambda: loss_function(logits, labels).backward())
    logits.grad = None
    return alone, peak(lambda: loss_function(net(image), labels).backward())


# ---------------------------------------------------------------------- prediction


@torch.inference_mode()
def _predict(net: UNet, brain: Brain, axis: int, part: slice) -> np.ndarray:
    """The labels of a part of the volume along one axis, predicted with its surroundings."""
    start = max(0, part.start - CONTEXT)
    around = brain.image.take(range(start, min(part.stop + CONTEXT, brain.image.shape[axis])), axis)
    pad = [(0, -n % DIVISOR) for n in around.shape]
    # In float32 whatever the training dtype: PyTorch's float64 convolutions take gigabytes here.
    trained = deepcopy(net).float().eval()
    image = np.pad(around, pad, mode="edge").astype(np.float32)
    logits = trained(torch.from_numpy(image)[None, None])
    labels = logits[0].argmax(dim=0).to(torch.uint8).numpy()
    labels = labels[tuple(slice(0, n) for n in around.shape)]
    return labels.take(range(part.start - start, part.stop - start), axis)
