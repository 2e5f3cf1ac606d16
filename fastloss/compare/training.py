"""One training: the same network, start and patches whatever the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import cos, isfinite, pi
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from fastloss.compare.data import Volume
from fastloss.compare.losses import TrainingLoss
from fastloss.compare.network import UNet
from fastloss.compare.patches import Patches
from fastloss.compare.prediction import predict, probabilities

Predict = Callable[[np.ndarray], np.ndarray]
"""Of an image (channels, D, H, W) the index of the likeliest class of each voxel, (D, H, W)."""
WARM_UP = 10
"""Steps in which the learning rate grows to its full."""
CLIP = 12.0
"""The norm that gradients are cut to."""


@dataclass(frozen=True)
class Settings:
    """The same for every loss."""

    steps: int = 240
    batch: int = 2
    patch: tuple[int, int, int] = (32, 32, 32)
    width: int = 8
    """Channels of the finest resolution of the network."""
    learning_rate: float = 2e-2
    points: int = 4
    """How often the held-out cases are judged during a training, and the loss noted."""
    device: str = "cpu"


@dataclass(frozen=True)
class Task:
    """The argument of a trainer. Held-out cases are in it only behind `validate`.

    A trainer of the user's, ``--trainer module:function``, is called with a task and returns
    `Trained`, or a function that predicts a label map from an image.

    Attributes:
        loss: ``task.loss.at(done)`` is a function of logits and labels, ``done`` being the part of
            the training that is done.
        seed, fold: which of the trainings it is; the start and the patches depend on nothing else.
        training: the cases to train on.
        classes, channels: how many.
        learning_rate: that of the settings, or what a search found for this loss.
        settings: of all trainings.
        validate: the mean Dice of held-out cases with a function that predicts. It is for the curve
            alone: what chooses by it has seen the held-out cases.
    """

    loss: TrainingLoss
    seed: int
    fold: int
    training: Sequence[Volume]
    classes: int
    channels: int
    learning_rate: float
    settings: Settings
    validate: Callable[[Predict], float]


class Point(NamedTuple):
    """As `fastloss.compare.records.CurvePoint`."""

    step: int
    loss_value: float
    metric: float
    seconds: float


@dataclass
class Trained:
    """The result of a training."""

    predict: Predict
    curve: list[Point] = field(default_factory=list)
    probabilities: Callable[[np.ndarray], np.ndarray] | None = None
    """Of an image those of each class, (classes, D, H, W), for maps of the loss."""


class Diverged(ArithmeticError):
    """The loss is no finite number."""


def start(task: Task) -> nn.Module:
    """The U-Net as every training of this seed and fold begins."""
    torch.manual_seed(1_000_003 * task.fold + task.seed)
    return UNet(task.channels, task.classes, task.settings.width)


def train(task: Task, network_of: Callable[[Task], nn.Module] = start) -> Trained:
    """Train a network with AdamW, the learning rate falling by a cosine after a short warm-up.

    Args:
        network_of: of a task the network, (B, channels, D, H, W) to logits (B, classes, D, H, W).
            For a fair comparison its start depends on seed and fold alone.

    Raises:
        Diverged: the loss is NaN or infinite in some step.
    """
    settings = task.settings
    network = network_of(task).to(settings.device)
    optimizer = torch.optim.AdamW(network.parameters(), task.learning_rate, weight_decay=1e-4)
    patches = Patches(
        task.training, settings.patch, settings.batch, (task.seed, task.fold), task.classes
    )

    def told(ask: Callable[..., np.ndarray], image: np.ndarray) -> np.ndarray:
        network.eval()
        found = ask(network, image, settings.patch, settings.device)
        network.train()
        return found

    predicted = partial(told, predict)

    steps = settings.steps
    marks = {round(steps * (i + 1) / settings.points) for i in range(settings.points)}
    curve: list[Point] = []
    losses: list[float] = []
    seconds = 0.0
    for step in range(steps):
        begin = perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = task.learning_rate * rate(step, steps)
        images, labels = (torch.from_numpy(array).to(settings.device) for array in patches.draw())
        loss = task.loss.at(step / max(steps - 1, 1))(network(images), labels)
        losses.append(float(loss.detach()))
        if not isfinite(losses[-1]):
            raise Diverged(f"the loss is {losses[-1]} in step {step + 1} of {steps}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        seconds += perf_counter() - begin
        if step + 1 in marks:
            mean = sum(losses) / len(losses)
            curve.append(Point(step + 1, mean, task.validate(predicted), seconds))
            losses = []
    return Trained(predicted, curve, partial(told, probabilities))


def rate(step: int, steps: int) -> float:
    """The learning rate of a step, as a share of the full one."""
    warm = min(WARM_UP, max(1, steps // 10))
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + cos(pi * step / steps))
