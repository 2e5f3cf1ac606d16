"""The loss on the correlation of prediction and target."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastloss.dropin import evaluate, fixed, is_size, recipe
from fastloss.monai._fused import fuse
from fastloss.monai._inputs import check_option
from fastloss.monai._module import REDUCTIONS, Activated
from fastloss.monai._terms import MatthewsCorrelation


class MCCLoss(Activated):
    """Matthews correlation coefficient loss, as ``monai.losses.MCCLoss``.

    Per class 1 − (TP TN − FP FN + smooth_nr) / √(product of the four margins + smooth_dr), where
    the entries of the confusion matrix are soft: TP = Σ p g, FP = Σ p (1−g), FN = Σ (1−p) g and
    TN = Σ (1−p)(1−g), and the margins are TP+FP, TP+FN, TN+FP and TN+FN. A class without FP and
    FN has the loss 0. ``reduction="none"`` returns (B, C), or (C,) with ``batch``.

    Raises:
        TypeError: ``other_act`` is not callable.
        ValueError: more than one activation, or an unknown reduction.
        AssertionError: when it is called, a target that does not fit the input.

    Source: Abhishek & Hamarneh 2021, "Matthews correlation coefficient loss for deep convolutional
    networks: application to skin lesion segmentation". Options: see `fastloss.monai`.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[..., Tensor] | None = None,
        reduction: str = "mean",
        smooth_nr: float = 0.0,
        smooth_dr: float = 1e-5,
        batch: bool = False,
    ) -> None:
        super().__init__(include_background, to_onehot_y, sigmoid, softmax, other_act, reduction)
        self.smooth_nr = float(smooth_nr)
        self.smooth_dr = float(smooth_dr)
        self.batch = batch

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            input: (B, C, *spatial).
            target: (B, C, *spatial), or with ``to_onehot_y`` a label map (B, 1, *spatial).
        """
        reduction = check_option("reduction", self.reduction, REDUCTIONS)
        inputs = self._read(input, target)
        fused = None
        if is_size(self.smooth_nr) and is_size(self.smooth_dr):
            made = recipe(
                MatthewsCorrelation,
                include_background=not inputs.first,
                batch=bool(self.batch),
                smooth_nr=fixed(self.smooth_nr),
                smooth_dr=fixed(self.smooth_dr),
                reduction=reduction,
            )
            fused = fuse(inputs, made)
        if fused is None:
            return self._plain(*inputs.probabilities(), reduction)
        value = evaluate((1.0, fused))
        return value[0] if reduction == "none" and self.batch else value

    def _plain(self, p: Tensor, g: Tensor, reduction: str) -> Tensor:
        axes = [0] * bool(self.batch) + list(range(2, p.ndim))
        tp, fp = (p * g).sum(axes), (p * (1 - g)).sum(axes)
        fn, tn = ((1 - p) * g).sum(axes), ((1 - p) * (1 - g)).sum(axes)
        margins = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
        mcc = (tp * tn - fp * fn + self.smooth_nr) / torch.sqrt(margins + self.smooth_dr)
        value = torch.where((fp == 0) & (fn == 0), torch.zeros_like(mcc), 1 - mcc)
        if reduction == "none":
            return value
        return value.mean() if reduction == "mean" else value.sum()
