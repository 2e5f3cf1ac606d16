"""The focal loss."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss.dropin import (
    Fused,
    Values,
    after_zeros,
    evaluate,
    fixed,
    fixed_count,
    is_binary,
    is_size,
    numbers_of,
    product,
    recipe,
)
from fastloss.monai._fused import fuse
from fastloss.monai._inputs import Inputs, check_option
from fastloss.monai._module import REDUCTIONS, Component
from fastloss.monai._terms import ChannelFocal


class FocalLoss(Component):
    """Focal loss, as ``monai.losses.FocalLoss``.

    Per voxel and channel, with p of the sigmoid, −α (1−p)^γ log p where the target is 1 and
    −(1−α) p^γ log(1−p) where it is 0; a sequence α weighs the positives of each channel alone.
    With ``use_softmax``, −α_c (1−p)^γ log p where the target is 1, over the channels that count;
    a number α weighs channel 0 by 1−α and the others by α.

    The mean is over voxels and channels; with ``ignore_index`` the sum over channels and the
    mean over the voxels that count. "sum" adds up the means over voxels of samples and channels.
    "none" returns (B, C, *spatial).

    Raises:
        ValueError: an unknown reduction; when it is called, a target that does not fit the input
            or weights or α that are not one per channel that counts.

    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection". Options: see
    `fastloss.monai`.
    """

    scheduled = ("alpha",)

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        gamma: float = 2.0,
        alpha: float | Sequence[float] | None = None,
        weight: Sequence[float] | float | int | Tensor | None = None,
        reduction: str = "mean",
        use_softmax: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(include_background, to_onehot_y, reduction, ignore_index)
        self.gamma = gamma
        self.alpha: float | Tensor | None
        if alpha is None or isinstance(alpha, (float, int)):
            self.alpha = None if alpha is None else float(alpha)
        else:
            self.alpha = torch.as_tensor(alpha)
        self.use_softmax = use_softmax
        self._hold_weight(weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            input: logits, (B, C, *spatial).
            target: (B, C, *spatial), or with ``to_onehot_y`` a label map (B, 1, *spatial).
        """
        inputs = self._read(input, target)
        return self._value(inputs, self._fused(inputs))

    def _read(self, input: Tensor, target: Tensor, *, labels: bool = False) -> Inputs:
        activation = "softmax" if self.use_softmax else "sigmoid"
        inputs = self._inputs(
            input, activation, target, classes=input.shape[1], labels=labels, error=ValueError
        )
        if self.use_softmax and not self.include_background and self._one_alpha() is not None:
            warnings.warn(
                "alpha: a number is ignored with softmax and without background", stacklevel=3
            )
        self._alpha_factors(inputs.channels)
        self._weight_factors(inputs.channels)
        return inputs

    def _value(self, inputs: Inputs, fused: Fused | None) -> Tensor:
        return self._plain(*inputs.expanded()) if fused is None else evaluate((1.0, fused))

    # ------------------------------------------------------------------ numbers of the channels

    def takes(self, name: str, value: Any) -> bool:
        return is_size(value) and value <= 1  # else the negatives are weighed by less than 0

    def _one_alpha(self) -> Any:
        """α, if it was given as a number."""
        operand = self.operand("alpha")
        if operand is not None:
            return operand
        return self.alpha if isinstance(self.alpha, float) else None

    def _alpha_factors(self, channels: int) -> tuple[Values | None, Values | None]:
        """The factors of positives and negatives of each channel that α stands for; None: 1."""
        alpha = self._one_alpha()
        if alpha is not None:
            if self.use_softmax and not self.include_background:
                return None, None
        elif self.alpha is None:
            return None, None
        else:
            given: Any = self.alpha
            if not isinstance(given, Tensor):
                given = torch.as_tensor(given)
            numbers = numbers_of(given)
            if given.ndim:
                if given.shape[0] != channels:
                    raise ValueError(
                        f"alpha: expected {channels} numbers, one per channel that counts, got "
                        f"{given.shape[0]}"
                    )
                return numbers, None
            alpha = numbers if isinstance(numbers, Tensor) else numbers[0]
        if isinstance(alpha, Tensor):
            alpha = alpha.double().reshape(1)
            if self.use_softmax:
                return torch.cat([1 - alpha, alpha.expand(channels - 1)]), None
            return alpha.expand(channels), (1 - alpha).expand(channels)
        if self.use_softmax:
            return (1 - alpha,) + (alpha,) * (channels - 1), None
        return (alpha,) * channels, (1 - alpha,) * channels

    def _weight_factors(self, channels: int) -> Values:
        weight = self.class_weight
        if weight is None:
            return (1.0,) * channels
        if weight.ndim and channels == 1:
            raise ValueError("weight: expected one number for a single channel, got a sequence")
        if weight.ndim and weight.numel() != channels:
            raise ValueError(
                f"weight: expected {channels} numbers, one per channel that counts, got "
                f"{weight.numel()}"
            )
        numbers = self._weight_numbers("weight", weight)
        if isinstance(numbers, Tensor):
            return numbers.reshape(-1).expand(channels)
        return numbers if weight.ndim else numbers * channels

    # ------------------------------------------------------------------ the two ways to compute

    def _fused(self, inputs: Inputs) -> Fused | None:
        check_option("reduction", self.reduction, REDUCTIONS)
        first, channels = inputs.first, fixed_count(inputs.channels)
        masked = inputs.ignore_index is not None
        weight = self.class_weight
        if self.reduction == "none" or not is_size(self.gamma):
            return None
        if weight is not None and weight.requires_grad:
            return None
        without = bool(self.use_softmax and first)  # softmax over the other channels alone
        # A voxel of background has no label then, but still counts in the mean.
        unlabelled = without and inputs.labels
        if (self.use_softmax and channels == 1) or (unlabelled and masked):
            return None
        factors = self._weight_factors(channels)
        hidden = 0 if without else first
        positive, negative = (
            after_zeros(hidden, product(alphas, factors, inputs.logits.device))
            for alphas in self._alpha_factors(channels)
        )
        both = (positive, negative)
        fused = fuse(
            inputs,
            recipe(
                ChannelFocal,
                gamma=fixed(self.gamma),
                positive=positive,
                negative=negative,
                channels=1 if masked else channels,
                reduction=self.reduction,
                voxels=1 if unlabelled else None,
                signed=any(not isinstance(n, Tensor) and min(n) < 0 for n in both),
            ),
        )
        if fused is None:
            return None
        if without:
            fused = fused._replace(logits=fused.logits[:, 1:])
            if not unlabelled:
                return fused._replace(target=fused.target[:, 1:])
            labels = fused.target.to(torch.int32) - 1
            voxels = math.prod(labels.shape[2:])
            return fused._replace(target=labels, ignore_index=-1, divisor=voxels)
        if self.use_softmax or inputs.labels or is_binary(inputs.target):
            return fused
        return None  # MONAI's factor (1−p)^γ is not linear in a soft target

    def _plain(self, x: Tensor, g: Tensor, mask: Tensor | None) -> Tensor:
        g = g.to(x.dtype)
        if mask is not None:
            x, g = x * mask, g * mask
        shape = (-1,) + (1,) * (x.ndim - 2)
        positive, negative = (
            1.0 if f is None else torch.as_tensor(f, dtype=x.dtype, device=x.device).view(shape)
            for f in self._alpha_factors(x.shape[1])
        )
        if self.use_softmax:
            log_p = x.log_softmax(1)
            loss = -positive * (1 - log_p.exp()) ** self.gamma * log_p * g
        else:
            entropy = F.binary_cross_entropy_with_logits(x, g, reduction="none")
            loss = (self.gamma * F.logsigmoid(x * (1 - 2 * g))).exp() * entropy
            # A number is not looked at: compiled code would be made for it.
            if self._one_alpha() is None and _are_several(self.alpha):
                loss = loss * torch.where(g == 1, positive, negative)
            else:
                loss = loss * (g * positive + (1 - g) * negative)
        if mask is not None:
            loss = loss * mask
        if self.class_weight is not None:
            weight = self.class_weight.to(loss)
            loss = loss * (weight.view(shape) if weight.ndim else weight)
        if self.reduction == "none":
            return loss
        axes = list(range(2, loss.ndim))
        if mask is None:
            return loss.mean() if self.reduction == "mean" else loss.mean(axes).sum()
        least = torch.finfo(mask.dtype).eps
        if self.reduction == "mean":
            return loss.sum() / mask.sum().clamp(min=least)
        return (loss.sum(axes) / mask.sum(axes).clamp(min=least)).sum()


def _are_several(alpha: Any) -> bool:
    return isinstance(alpha, (list, tuple)) or (isinstance(alpha, Tensor) and bool(alpha.ndim))
