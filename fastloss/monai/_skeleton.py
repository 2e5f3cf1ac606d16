"""Losses on the overlap of each side with the soft skeleton of the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastloss.dropin import as_built, times
from fastloss.frameworks.torch.skeleton import soft_skeleton
from fastloss.monai._inputs import (
    Inputs,
    check_option,
    check_pair,
    ignored_for_one_channel,
    one_hot,
)
from fastloss.monai._module import REDUCTIONS, Activated, Module
from fastloss.monai._region import DiceLoss


class SoftclDiceLoss(Activated):
    """Soft centerline Dice (clDice) loss, as ``monai.losses.SoftclDiceLoss``.

    Per sample 1 − 2 T S / (T + S + smooth), with the precision T = (Σ s(p) g + smooth_nr) /
    (Σ s(p) + smooth_dr) and the sensitivity S = (Σ s(g) p + smooth_nr) / (Σ s(g) + smooth_dr) of
    the topology. The sums are over voxels and channels, and s is the soft skeleton.
    ``reduction="none"`` returns (B,).

    Args:
        iter_: iterations of the skeleton, about the radius of the thickest structure in voxels.
        smooth_nr, smooth_dr: added to numerator and denominator of T and S.
        smooth: added to the denominator of their harmonic mean; above 0.

    Raises:
        TypeError: ``other_act`` is not callable, or ``iter_`` is no integer.
        ValueError: more than one activation, an unknown reduction, a negative ``iter_``, a
            ``smooth`` that is not above 0, or, when it is called, other than 1 to 3 spatial axes.
        AssertionError: when it is called, a target that does not fit the input.

    Source: Shit et al. 2021, "clDice – A Novel Topology-Preserving Loss Function for Tubular
    Structure Segmentation". Other options: see `fastloss.monai`.
    """

    stored: ClassVar[dict[str, str]] = {"iter_": "iter"}

    def __init__(
        self,
        iter_: int = 3,
        smooth_nr: float = 1.0,
        smooth_dr: float = 1.0,
        smooth: float = 1e-4,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[..., Any] | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(include_background, to_onehot_y, sigmoid, softmax, other_act, reduction)
        if not isinstance(iter_, int):
            raise TypeError(f"iter_: expected an integer, got {type(iter_).__name__}")
        if iter_ < 0:
            raise ValueError(f"iter_: expected at least 0, got {iter_}")
        if smooth <= 0:
            raise ValueError(f"smooth: expected a number above 0, got {smooth}")
        self.iter = iter_
        self.smooth_nr = float(smooth_nr)
        self.smooth_dr = float(smooth_dr)
        self.smooth = float(smooth)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            input: (B, C, *spatial), with 1 to 3 spatial axes.
            target: (B, C, *spatial), or with ``to_onehot_y`` a label map (B, 1, *spatial).
        """
        return self._value(self._read(input, target))

    def _value(self, inputs: Inputs) -> Tensor:
        if not 3 <= inputs.logits.ndim <= 5:
            raise ValueError(
                "input: expected (batch, channels, *spatial) with 1 to 3 spatial axes, got shape "
                f"{tuple(inputs.logits.shape)}"
            )
        p, g = inputs.probabilities()
        precision = self._share(soft_skeleton(p, self.iter), g)
        sensitivity = self._share(soft_skeleton(at_least(g, p), self.iter), p)
        mean = precision * sensitivity / (precision + sensitivity + self.smooth)
        value = 1 - 2 * mean
        reduction = check_option("reduction", self.reduction, REDUCTIONS)
        if reduction == "none":
            return value
        return value.mean() if reduction == "mean" else value.sum()

    def _share(self, skeleton: Tensor, other: Tensor) -> Tensor:
        """How much of the skeleton of one side lies within the other, per sample."""
        within = (skeleton * other).flatten(1).sum(1) + self.smooth_nr
        return within / (skeleton.flatten(1).sum(1) + self.smooth_dr)


def at_least(g: Tensor, p: Tensor) -> Tensor:
    """The target in the dtype of the probabilities, unless its own holds more."""
    return g.to(torch.promote_types(g.dtype, p.dtype))


class SoftDiceclDiceLoss(Module):
    """(1 − α) · `DiceLoss` + α · `SoftclDiceLoss`, as ``monai.losses.SoftDiceclDiceLoss``.

    Args:
        iter_, smooth: for the clDice loss.
        alpha: α, in [0, 1].
        smooth_nr, smooth_dr: for both.

    Raises:
        TypeError, ValueError, AssertionError: as `DiceLoss` and `SoftclDiceLoss`; ValueError for
            an ``alpha`` outside of [0, 1] and, when it is called, for tensors that do not fit each
            other.

    Source: Shit et al. 2021, "clDice – A Novel Topology-Preserving Loss Function for Tubular
    Structure Segmentation". Other options: see `fastloss.monai`.
    """

    scheduled = ("alpha",)

    def __init__(
        self,
        iter_: int = 3,
        alpha: float = 0.5,
        smooth_nr: float = 1.0,
        smooth_dr: float = 1.0,
        smooth: float = 1e-4,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[..., Any] | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")
        shared: dict[str, Any] = {
            "include_background": include_background,
            "sigmoid": sigmoid,
            "softmax": softmax,
            "other_act": other_act,
            "reduction": reduction,
            "smooth_nr": smooth_nr,
            "smooth_dr": smooth_dr,
        }
        self.dice = DiceLoss(**shared)
        self.cldice = SoftclDiceLoss(iter_=iter_, smooth=smooth, **shared)
        self.alpha = alpha
        self.to_onehot_y = to_onehot_y

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            input: (B, C, *spatial), with 1 to 3 spatial axes.
            target: (B, C, *spatial), or with ``to_onehot_y`` a label map (B, 1, *spatial).
        """
        check_pair(input, target)
        labels = bool(self.to_onehot_y and input.shape[1] > 1)
        if self.to_onehot_y and not labels:
            ignored_for_one_channel("to_onehot_y=True")
        alpha = self.factor("alpha")
        dice = self._of_part(self.dice, input, target, labels)
        skeleton = self._of_part(self.cldice, input, target, labels)
        total: Tensor = times(1.0 - alpha, dice) + times(alpha, skeleton)
        return total

    def _of_part(self, part: Any, input: Tensor, target: Tensor, labels: bool) -> Tensor:
        value: Tensor
        if as_built(part, DiceLoss):
            inputs = part._read(input, target, labels=labels)
            value = part._value(inputs, part._fused(inputs))
        elif as_built(part, SoftclDiceLoss):
            value = part._value(part._read(input, target, labels=labels))
        else:
            value = part(input, one_hot(target, input.shape[1], input.dtype) if labels else target)
        return value
