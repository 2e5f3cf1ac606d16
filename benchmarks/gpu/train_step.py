"""Time and peak memory of a whole training step with a network, by loss.

MONAI's BasicUNet under bfloat16 autocast, SGD. The losses take steps in turn, with the same
network, images and labels; "none" computes no loss, and its backward pass starts from a constant
gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from clock import Clock

from fastloss.bench.errors import Unavailable, reason
from fastloss.bench.inputs import Spec, device_case
from fastloss.bench.losses import SMOOTH
from fastloss.bench.nnunet_peer import nnunet

CLASSES = (14, 105)
BATCH, EDGE = 2, 128
WARM_UP, STEPS = 3, 10
LOSSES = ("none", "fastloss-monai", "monai", "nnunet")
PEERS = ("monai", "nnunet")
TITLES = {
    "none": "no loss",
    "fastloss-monai": "`fastloss.monai.DiceCELoss`",
    "monai": "MONAI `DiceCELoss`",
    "nnunet": "nnU-Net `DC_and_CE_loss`",
}
_OPTIONS: dict[str, Any] = {"to_onehot_y": True, "softmax": True}
_OPTIONS |= {"smooth_nr": SMOOTH, "smooth_dr": SMOOTH}


@dataclass
class Step:
    """The step with one loss. Seconds are medians; the peak is that of all memory in training."""

    title: str
    classes: int
    loss: str
    seconds: float | None = None
    peak: int | None = None
    note: str = ""
    samples: list[float] = field(default_factory=list, repr=False)


class Training:
    """A network with its optimiser, and one batch of images and labels."""

    def __init__(self, device: torch.device, classes: int, *, small: bool) -> None:
        try:
            from monai.networks.nets import BasicUNet
        except ImportError as error:
            raise Unavailable(f"MONAI, whose network it is, is not there ({error})") from None
        batch, edge = (1, 32) if small else (BATCH, EDGE)
        options: dict[str, Any] = {"features": (4,) * 6} if small else {}
        self.device, self.classes = device, classes
        torch.manual_seed(0)
        self.network = BasicUNet(spatial_dims=3, in_channels=1, out_channels=classes, **options)
        self.network.to(device).train()
        self.optimiser = torch.optim.SGD(self.network.parameters(), lr=1e-4)
        self.images = torch.randn(batch, 1, edge, edge, edge, device=device)
        spec = Spec("phantom", (batch, classes, *(edge,) * 3), "bfloat16", device=str(device))
        self.title = f"training step, {spec.title} autocast"
        self.labels = device_case(spec).target[:, None]

    def step(self, loss: str) -> Callable[[], None]:
        """One step with this loss.

        Raises:
            Unavailable: it is not installed.
        """
        criterion, labels = self._criterion(loss)

        def run() -> None:
            self.optimiser.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, torch.bfloat16):
                logits = self.network(self.images)
                value = None if criterion is None else criterion(logits, labels)
            if value is None:
                logits.backward(torch.full_like(logits, 1 / logits.numel()))
            else:
                value.backward()
            self.optimiser.step()

        return run

    def _criterion(self, loss: str) -> tuple[Callable[[Any, Any], Any] | None, Any]:
        """The loss, and the labels in the dtype of its library's pipeline."""
        if loss == "none":
            return None, None
        if loss == "nnunet":
            return nnunet("dice_ce")[0], self.labels.to(torch.int16)
        if loss == "monai":
            from monai.losses import DiceCELoss
        else:
            from fastloss.monai import DiceCELoss
        return DiceCELoss(**_OPTIONS), self.labels.to(torch.int64)


def measure(
    clock: Clock, classes: int, losses: tuple[str, ...] = LOSSES, *, small: bool = False
) -> list[Step]:
    """Measure the step with each of these losses, for a network with this many classes.

    Raises:
        Unavailable: MONAI is not there.
    """
    held = clock.held()
    training = Training(clock.device, classes, small=small)
    steps = [Step(training.title, classes, loss) for loss in losses]
    runs: dict[str, Callable[[], None]] = {}
    warm_up, rounds = (1, 2) if small else (WARM_UP, STEPS)
    for one in steps:
        try:
            runs[one.loss] = training.step(one.loss)
            for _ in range(warm_up):
                runs[one.loss]()
        except Exception as error:  # no failure of a peer may end the run
            one.note = f"failed: {reason(error)}"
            runs.pop(one.loss, None)
            training.optimiser.zero_grad(set_to_none=True)
    for _ in range(rounds):
        for one in steps:
            if one.loss in runs:
                training.optimiser.zero_grad(set_to_none=True)
                seconds, peak = clock.step(runs[one.loss])
                one.samples.append(seconds)
                one.peak = None if peak is None else max(peak - held, one.peak or 0)
    for one in steps:
        one.seconds = median(one.samples) if one.samples else None
    return steps
