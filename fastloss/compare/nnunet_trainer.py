"""Mixins of the nnU-Net trainers that ``compare --export-nnunet`` writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastloss.compare.losses import LOSSES, TrainingLoss
from fastloss.torch import DeepSupervision


class Seeded:
    """A network that starts from the weights of a seed. nnU-Net's data loading has none."""

    compared_seed = 0

    def initialize(self) -> None:
        torch.manual_seed(self.compared_seed)
        base: Any = super()
        base.initialize()


class ComparedLoss:
    """The loss of ``compared_loss``, as `fastloss.compare.losses.TrainingLoss` takes it.

    With deep supervision each output has it, by nnU-Net's weights. An ignore label counts for
    nothing.

    Raises:
        TypeError: when the loss is built, for a data set with regions.
        UnknownLoss: the same, if it is not there.
    """

    compared_loss = "dice_ce"

    label_manager: Any
    configuration_manager: Any

    def _build_loss(self) -> torch.nn.Module:
        if self.label_manager.has_regions:
            raise TypeError(
                f"{type(self).__name__}: the losses that are compared are of a softmax, and the "
                "data set has regions"
            )
        base: Any = super()
        weights = getattr(base._build_loss(), "weight_factors", None)
        spacing = tuple(float(size) for size in self.configuration_manager.spacing)
        loss = TrainingLoss(self.compared_loss, spacing, self.label_manager.ignore_label).at(1.0)
        if self.compared_loss not in LOSSES:
            loss = _of_integers(loss)
        return DeepSupervision(loss, weights)


def _of_integers(loss: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """For a function of the user's, which gets labels (B, D, H, W) in each training alike."""

    def called(logits: torch.Tensor, target: torch.Tensor) -> Any:
        return loss(logits, target[:, 0].long())

    return called
