"""Losses on the overlap and the sizes of regions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastloss.dropin import (
    Fused,
    are_sizes,
    evaluate,
    fixed,
    in_graph,
    is_binary,
    is_size,
    numbers_of,
    overridden,
    recipe,
    times,
)
from fastloss.monai._fused import fuse
from fastloss.monai._inputs import Inputs, check_activation, check_mask, check_option
from fastloss.monai._module import REDUCTIONS, Activated, activated
from fastloss.monai._terms import GeneralizedOverlap, MaskedOverlap, Overlap

WEIGHTINGS = ("square", "simple", "uniform")


class Region(Activated):
    """A loss on overlap and sizes.

    With hard labels MONAI's formula for soft ones (``soft_label``) is the ordinary one; with soft
    ones it has no sums of products.
    """

    squared_pred = False
    smooth_nr: float
    smooth_dr: float
    batch: bool
    soft_label: bool

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            input: (B, C, *spatial).
            target: (B, C, *spatial), or with ``to_onehot_y`` a label map (B, 1, *spatial).
        """
        inputs = self._read(input, target)
        return self._value(inputs, self._fused(inputs))

    def _value(self, inputs: Inputs, fused: Fused | None) -> Tensor:
        if fused is None:
            return self._plain(*inputs.probabilities())
        value = evaluate((1.0, fused))
        return self._shaped(value, inputs.logits.ndim) if self.reduction == "none" else value

    def _shaped(self, value: Tensor, ndim: int) -> Tensor:
        """An unreduced value, (B or 1, C or 1), in MONAI's shape."""
        return value.reshape(value.shape[int(self.batch) :] + (1,) * (ndim - 2))

    def _fused(self, inputs: Inputs) -> Fused | None:
        made = self._recipe(inputs)
        return None if made is None else fuse(inputs, made)

    def _recipe(self, inputs: Inputs) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must define _recipe")

    def _common(self, inputs: Inputs) -> dict[str, Any] | None:
        """The options of a `fastloss.RegionTerm`; None if the sums do not determine the loss."""
        by_differences = self.soft_label and not self.squared_pred
        if by_differences and not (inputs.labels and inputs.activation != "none"):
            return None
        if not (is_size(self.smooth_nr) and is_size(self.smooth_dr)):
            return None
        return {
            "include_background": not inputs.first,
            "batch": bool(self.batch),
            "smooth_nr": fixed(self.smooth_nr),
            "smooth_dr": fixed(self.smooth_dr),
            "reduction": check_option("reduction", self.reduction, REDUCTIONS),
        }

    def _plain(self, p: Tensor, g: Tensor) -> Tensor:
        axes = list(range(0 if self.batch else 2, p.ndim))
        if self.batch:
            axes.remove(1)
        value = self._formula(*self._sums(p, g, axes), g.sum(axes))
        value = self._weighted(value, p.shape[1])
        if self.reduction == "mean":
            return value.mean()
        if self.reduction == "sum":
            return value.sum()
        check_option("reduction", self.reduction, REDUCTIONS)
        return self._shaped(value[None] if self.batch else value, p.ndim) if value.ndim else value

    def _sums(self, p: Tensor, g: Tensor, axes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Overlap, predicted and reference size."""
        if self.squared_pred:
            return (p * g).sum(axes), (p * p).sum(axes), (g * g).sum(axes)
        if self.soft_label:
            predicted, reference = p.abs().sum(axes), g.abs().sum(axes)
            return (predicted + reference - (p - g).abs().sum(axes)) / 2, predicted, reference
        return (p * g).sum(axes), p.sum(axes), g.sum(axes)

    def _formula(
        self, overlap: Tensor, predicted: Tensor, reference: Tensor, volume: Tensor
    ) -> Tensor:
        """The value of each sample and class; ``volume`` is Σ g whatever the sizes are."""
        raise NotImplementedError(f"{type(self).__name__} must define _formula")

    def _weighted(self, value: Tensor, channels: int) -> Tensor:
        return value


class DiceLoss(Region):
    """Soft Dice loss, or with ``jaccard`` the soft Jaccard loss, as ``monai.losses.DiceLoss``.

    Per class 1 − (2 O + smooth_nr) / (P + G + smooth_dr), with the overlap O and the sizes P of
    the prediction and G of the target; Jaccard: 1 − (2 O + smooth_nr) / (2 (P + G − O) +
    smooth_dr). ``reduction="none"`` returns (B, C, 1, …), or (C, 1, …) with ``batch``.

    Raises:
        TypeError: ``other_act`` is not callable.
        ValueError: more than one activation, an unknown reduction, or, when it is called, class
            weights that are negative or not one per class that counts.
        AssertionError: when it is called, a target that does not fit the input.

    Source: Milletari et al. 2016, "V-Net". Options: see `fastloss.monai`.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[..., Any] | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Sequence[float] | float | int | Tensor | None = None,
        soft_label: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(
            include_background, to_onehot_y, sigmoid, softmax, other_act, reduction, ignore_index
        )
        self.squared_pred = squared_pred
        self.jaccard = jaccard
        self.smooth_nr = float(smooth_nr)
        self.smooth_dr = float(smooth_dr)
        self.batch = batch
        self.soft_label = soft_label
        self._hold_weight(weight)

    def _read(self, input: Tensor, target: Tensor, *, labels: bool = False) -> Inputs:
        inputs = super()._read(input, target, labels=labels)
        self._check_weight(inputs.channels)
        return inputs

    def _check_weight(self, channels: int) -> None:
        weight = self.class_weight
        if weight is None or channels == 1:  # which a single class does not have
            return
        if weight.ndim and weight.shape[0] != channels:
            raise ValueError(
                f"weight: expected {channels} numbers, one per class that counts, got shape "
                f"{tuple(weight.shape)}"
            )
        self._weight_numbers("weight", weight)

    def _recipe(self, inputs: Inputs) -> Any:
        options = self._common(inputs)
        if options is None:
            return None
        weight = None if inputs.channels == 1 else self.class_weight
        if weight is not None:
            numbers = numbers_of(weight)
            if weight.ndim > 1 or weight.requires_grad or not are_sizes(numbers):
                return None
            one = not isinstance(numbers, Tensor) and not weight.ndim
            options["weight"] = numbers[0] if one else numbers
        part = 1.0 if self.jaccard else 0.5
        return recipe(Overlap, alpha=part, beta=part, squared=bool(self.squared_pred), **options)

    def _formula(
        self, overlap: Tensor, predicted: Tensor, reference: Tensor, volume: Tensor
    ) -> Tensor:
        size = predicted + reference
        if self.jaccard:
            size = 2 * (size - overlap)
        return 1 - (2 * overlap + self.smooth_nr) / (size + self.smooth_dr)

    def _weighted(self, value: Tensor, channels: int) -> Tensor:
        if self.class_weight is None or channels == 1:
            return value
        return value * self.class_weight.to(value)


class MaskedDiceLoss(DiceLoss):
    """`DiceLoss` within a mask, as ``monai.losses.MaskedDiceLoss``.

    Prediction and target are multiplied by the mask. Of a label map that leaves label 0 outside,
    so that with ``to_onehot_y`` all that is outside counts as background that is not predicted.
    Takes the options of `DiceLoss` without ``ignore_index``.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[..., Any] | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Sequence[float] | float | int | Tensor | None = None,
        soft_label: bool = False,
    ) -> None:
        check_activation(sigmoid, softmax, other_act)
        super().__init__(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            squared_pred=squared_pred,
            jaccard=jaccard,
            reduction=reduction,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            weight=weight,
            soft_label=soft_label,
        )
        self.pre_sigmoid = sigmoid
        self.pre_softmax = softmax
        self.pre_other_act = other_act

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss.

        Args:
            input: (B, C, *spatial).
            target: (B, C, *spatial), or with ``to_onehot_y`` a label map (B, 1, *spatial).
            mask: (B, 1, *spatial) or (1, 1, *spatial), 1 where the loss is taken.
        """
        logits, activation = activated(
            input, self.pre_sigmoid, self.pre_softmax, self.pre_other_act
        )
        if mask is None:
            warnings.warn("mask: none was given, all voxels count", stacklevel=2)
        else:
            check_mask(input, target, mask)
            if self.to_onehot_y and logits.shape[1] > 1:
                target = target * mask
        inputs = self._inputs(logits, activation, target, classes=logits.shape[1], labels=False)
        self._check_weight(inputs.channels)
        if mask is None:
            return self._value(inputs, self._fused(inputs))
        fused = self._masked(inputs, mask)
        if fused is None:
            p, g = inputs.probabilities()
            return self._plain(p * mask, g if inputs.labels else g * mask)
        value = evaluate((1.0, fused))
        return self._shaped(value, input.ndim) if self.reduction == "none" else value

    def _masked(self, inputs: Inputs, mask: Tensor) -> Fused | None:
        fused = self._fused(inputs) if _is_voxel_weight(inputs.logits, mask) else None
        if fused is None:
            return None
        if inputs.labels and not inputs.first:
            if in_graph():
                return None  # a loss cannot hold a number of voxels that may vary
            voxels = math.prod(inputs.logits.shape[2:])
            options = (*fused.recipe.options, ("voxels", voxels))
            fused = fused._replace(
                recipe=fused.recipe._replace(kind=MaskedOverlap, options=options)
            )
        weight = mask.expand(inputs.logits.shape[0], *mask.shape[1:])
        return fused._replace(voxel_weight=weight)


def _is_voxel_weight(logits: Tensor, mask: Tensor) -> bool:
    """Whether the mask is known to hold zeros and ones; a fraction would enter products squared."""
    return (
        mask.ndim == logits.ndim
        and mask.shape[1:] == (1, *logits.shape[2:])
        and not (mask.requires_grad and torch.is_grad_enabled())
        and (mask.dtype == torch.bool or (mask.is_cpu and is_binary(mask.float())))
    )


class TverskyLoss(Region):
    """Tversky loss, as ``monai.losses.TverskyLoss``.

    Per class 1 − (O + smooth_nr) / (O + α (P−O) + β (G−O) + smooth_dr): α weighs false
    positives, β false negatives. ``reduction="none"`` returns (B, C), or (C,) with ``batch``.

    Raises:
        TypeError, ValueError, AssertionError: as `DiceLoss`.

    Source: Salehi et al. 2017, "Tversky loss function for image segmentation". Options: see
    `fastloss.monai`.
    """

    scheduled = ("alpha", "beta")

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[..., Any] | None = None,
        alpha: float = 0.5,
        beta: float = 0.5,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        soft_label: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(
            include_background, to_onehot_y, sigmoid, softmax, other_act, reduction, ignore_index
        )
        self.alpha = alpha
        self.beta = beta
        self.smooth_nr = float(smooth_nr)
        self.smooth_dr = float(smooth_dr)
        self.batch = batch
        self.soft_label = soft_label

    def _shaped(self, value: Tensor, ndim: int) -> Tensor:
        return super()._shaped(value, 2)

    def _recipe(self, inputs: Inputs) -> Any:
        options = self._common(inputs)
        alpha, beta = self.operand("alpha"), self.operand("beta")
        if options is None or alpha is None or beta is None:
            return None
        # Our formula has MONAI's numerator and denominator twice.
        options.update({name: 2 * options[name] for name in ("smooth_nr", "smooth_dr")})
        return recipe(Overlap, alpha=alpha, beta=beta, **options)

    def _formula(
        self, overlap: Tensor, predicted: Tensor, reference: Tensor, volume: Tensor
    ) -> Tensor:
        alpha, beta = self.factor("alpha"), self.factor("beta")
        wrong = times(alpha, predicted - overlap) + times(beta, reference - overlap)
        loss: Tensor = 1 - (overlap + self.smooth_nr) / (overlap + wrong + self.smooth_dr)
        return loss


class GeneralizedDiceLoss(Region):
    """Generalised Dice loss, as ``monai.losses.GeneralizedDiceLoss``.

    1 − (2 Σ_c w_c O_c + smooth_nr) / (Σ_c w_c (P_c + G_c) + smooth_dr), the classes weighed by
    their volume in the target: 1/G² ("square"), 1/G ("simple") or 1 ("uniform"). An absent class
    weighs as much as the heaviest present one. ``reduction="none"`` returns (B, 1, 1, …), or
    (1, 1, …) with ``batch``.

    Raises:
        TypeError, ValueError, AssertionError: as `DiceLoss`.

    Source: Sudre et al. 2017, "Generalised Dice overlap as a deep learning loss function".
    Options: see `fastloss.monai`.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[..., Any] | None = None,
        w_type: str = "square",
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        soft_label: bool = False,
    ) -> None:
        super().__init__(include_background, to_onehot_y, sigmoid, softmax, other_act, reduction)
        w_type = w_type.strip() if isinstance(w_type, str) else w_type
        self.w_type = check_option("w_type", w_type, WEIGHTINGS)
        self.smooth_nr = float(smooth_nr)
        self.smooth_dr = float(smooth_dr)
        self.batch = batch
        self.soft_label = soft_label

    def w_func(self, grnd: Tensor) -> Tensor:
        """The weight of each class from its volume; infinite for an absent one."""
        if self.w_type == "uniform":
            return torch.ones_like(grnd)
        return 1 / (grnd * grnd if self.w_type == "square" else grnd)

    def _recipe(self, inputs: Inputs) -> Any:
        options = self._common(inputs)
        if options is None or overridden(self, GeneralizedDiceLoss, "w_func"):
            return None
        return recipe(GeneralizedOverlap, weighting=self.w_type, **options)

    def _formula(
        self, overlap: Tensor, predicted: Tensor, reference: Tensor, volume: Tensor
    ) -> Tensor:
        axis = 0 if self.batch else 1
        weight = self.w_func(volume)
        absent = torch.isinf(weight)
        weight = weight.masked_fill(absent, 0.0)
        weight = weight + absent * weight.amax(axis, keepdim=True)
        score = 2 * (weight * overlap).sum(axis, keepdim=True) + self.smooth_nr
        size = (weight * (predicted + reference)).sum(axis, keepdim=True) + self.smooth_dr
        return 1 - score / size
