"""Weighted sums of a region loss and a voxel-wise one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastloss.dropin import (
    Fused,
    Numbers,
    as_built,
    at_least_float32,
    evaluate,
    fixed,
    is_size,
    overridden,
    recipe,
)
from fastloss.monai._focal import FocalLoss
from fastloss.monai._fused import fuse
from fastloss.monai._inputs import (
    Inputs,
    check_option,
    check_pair,
    ignored_for_one_channel,
    one_hot,
)
from fastloss.monai._module import Module
from fastloss.monai._region import DiceLoss, GeneralizedDiceLoss, TverskyLoss
from fastloss.monai._terms import BinaryCrossEntropy
from fastloss.terms import CrossEntropy

_REGIONS = (DiceLoss, GeneralizedDiceLoss, TverskyLoss)


def check_factor(name: str, value: Any) -> Any:
    if value < 0.0:
        raise ValueError(f"{name}: expected a number of at least 0, got {value!r}")
    return value


def joined(a: Any, part: Fused | None, b: Any, other: Fused | None) -> Tensor | None:
    """a · part + b · other in one pass; None if they do not read the same."""
    if part is None or other is None or not (is_size(a) and is_size(b)):
        return None
    same = (
        part.logits is other.logits
        and part.target is other.target
        and part.voxel_weight is other.voxel_weight
        and part.activation == other.activation
        and part.ignore_index == other.ignore_index
        and part.divisor == other.divisor == 1
    )
    return evaluate((fixed(a), part), (fixed(b), other)) if same else None


class DiceCELoss(Module):
    """λ_dice · `DiceLoss` + λ_ce · cross-entropy, as ``monai.losses.DiceCELoss``.

    The cross-entropy is that of softmax, whatever activation the Dice loss has; of a single
    channel it is the binary one, in which ``weight`` multiplies the positives.

    Args:
        weight: a tensor with one number per class, background included.
        lambda_dice, lambda_ce: at least 0.
        label_smoothing: in [0, 1], for the cross-entropy.

    Raises:
        TypeError: ``other_act`` is not callable, or ``weight`` is no tensor.
        ValueError: more than one activation, a negative factor, a reduction other than "mean"
            and "sum"; when it is called, tensors that do not fit each other.
        AssertionError: when it is called, a target of another shape.

    Other options: see `fastloss.monai`.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        weight: Tensor | None = None,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        reduction = reduction.strip() if isinstance(reduction, str) else reduction
        reduction = check_option("reduction", reduction, ("mean", "sum"))
        self.dice = DiceLoss(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            squared_pred=squared_pred,
            jaccard=jaccard,
            reduction=reduction,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            weight=weight if weight is None or include_background else weight[1:],
        )
        self.cross_entropy = nn.CrossEntropyLoss(
            weight=weight, reduction=reduction, label_smoothing=label_smoothing
        )
        self.binary_cross_entropy = nn.BCEWithLogitsLoss(pos_weight=weight, reduction=reduction)
        self.lambda_dice = check_factor("lambda_dice", lambda_dice)
        self.lambda_ce = check_factor("lambda_ce", lambda_ce)
        self._numbers = Numbers()
        self._positive_numbers = Numbers()
        _remember(self)
        self.register_load_state_dict_post_hook(_remember)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            input: logits, (B, C, *spatial).
            target: (B, C, *spatial), or with ``to_onehot_y`` a label map (B, 1, *spatial).
        """
        check_pair(input, target)
        inputs = part = None
        if as_built(self.dice, *_REGIONS):
            inputs = self.dice._read(input, target)
            part = self.dice._fused(inputs)
        entropy = self._fused(input, target)
        if part is not None and self.dice.reduction != "none":
            other = _counting_all(entropy) if part.ignore_index is None else entropy
            value = joined(self.lambda_dice, part, self.lambda_ce, other)
            if value is not None:
                return value
        dice = self.dice(input, target) if inputs is None else self.dice._value(inputs, part)
        if entropy is not None:
            ce = evaluate((1.0, entropy))
        else:
            ce = self.ce(input, target) if input.shape[1] != 1 else self.bce(input, target)
        return self.lambda_dice * dice + self.lambda_ce * ce

    def ce(self, input: Tensor, target: Tensor) -> Tensor:
        """The cross-entropy of several channels alone, by PyTorch."""
        if target.shape[1] == 1 and input.shape[1] != 1:
            target = target.squeeze(1).long()
        elif not target.is_floating_point():
            target = target.to(input.dtype)
        if type(self.cross_entropy) is nn.CrossEntropyLoss:
            input = at_least_float32(input)
        value: Tensor = self.cross_entropy(input, target)
        return value

    def bce(self, input: Tensor, target: Tensor) -> Tensor:
        """The binary cross-entropy of a single channel alone, by PyTorch."""
        if not target.is_floating_point():
            target = target.to(input.dtype)
        if type(self.binary_cross_entropy) is nn.BCEWithLogitsLoss:
            input = at_least_float32(input)
        value: Tensor = self.binary_cross_entropy(input, target)
        return value

    def _fused(self, input: Tensor, target: Tensor) -> Fused | None:
        if input.shape[1] == 1:
            return self._fused_binary(input, target)
        part: Any = self.cross_entropy
        if not as_built(part, nn.CrossEntropyLoss) or overridden(self, DiceCELoss, "ce"):
            return None
        if part.reduction not in ("mean", "sum") or not 0 <= part.label_smoothing <= 1:
            return None
        numbers = None
        if part.weight is not None:
            numbers = self._numbers(part.weight)
            if part.weight.shape != input.shape[1:2]:
                return None
            if not _are_weights(part.weight, numbers):
                return None
        labels = target.shape[1] == 1
        index = part.ignore_index
        if not labels:
            if index >= 0:
                return None  # which PyTorch has for label maps alone
            index = None
        made = recipe(
            CrossEntropy,
            weight=numbers,
            label_smoothing=fixed(part.label_smoothing),
            reduction=part.reduction,
        )
        return fuse(Inputs(input, "softmax", target, labels, 0, index), made)

    def _fused_binary(self, input: Tensor, target: Tensor) -> Fused | None:
        part: Any = self.binary_cross_entropy
        if not as_built(part, nn.BCEWithLogitsLoss) or overridden(self, DiceCELoss, "bce"):
            return None
        if part.reduction not in ("mean", "sum") or part.weight is not None:
            return None
        positive = part.pos_weight
        factors = (1.0,) if positive is None else self._positive_numbers(positive)
        if len(factors) != 1 or not _are_weights(positive, factors):
            return None  # such a weight is broadcast along the axes of space
        made = recipe(BinaryCrossEntropy, positive=factors[0], reduction=part.reduction)
        return fuse(Inputs(input, "sigmoid", target, False, 0), made)


def _counting_all(entropy: Fused | None) -> Fused | None:
    """The cross-entropy beside a Dice loss that counts all voxels.

    A label that is no class is then an error, whether or not the cross-entropy ignores it.
    """
    if entropy is None or entropy.ignore_index in range(entropy.logits.shape[1]):
        return entropy
    return entropy._replace(ignore_index=None)


def _are_weights(tensor: Tensor | None, numbers: tuple[float, ...]) -> bool:
    constant = tensor is None or not tensor.requires_grad
    return constant and all(0 <= n < math.inf for n in numbers)


def _remember(loss: Any, _: Any = None) -> None:
    """Read the class weights while nothing is being compiled."""
    of_classes, of_one = loss.cross_entropy, loss.binary_cross_entropy
    if type(of_classes) is nn.CrossEntropyLoss and of_classes.weight is not None:
        loss._numbers(of_classes.weight)
    if type(of_one) is nn.BCEWithLogitsLoss and of_one.pos_weight is not None:
        loss._positive_numbers(of_one.pos_weight)


class DiceFocalLoss(Module):
    """λ_dice · `DiceLoss` + λ_focal · `FocalLoss`, as ``monai.losses.DiceFocalLoss``.

    The focal loss is that of sigmoid, whatever activation the Dice loss has. With
    ``reduction="none"`` the Dice loss of each class is added to each voxel.

    Args:
        gamma, alpha: for the focal loss.
        weight: for both, one number or one per class that counts.
        lambda_dice, lambda_focal: at least 0.

    Raises:
        TypeError, ValueError, AssertionError: as `DiceLoss` and `FocalLoss`; ValueError for a
            negative factor.

    Other options: see `fastloss.monai`.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable | None = None,
        squared_pred: bool = False,
        jaccard: bool = False,
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        gamma: float = 2.0,
        weight: Sequence[float] | float | int | Tensor | None = None,
        lambda_dice: float = 1.0,
        lambda_focal: float = 1.0,
        alpha: float | None = None,
    ) -> None:
        super().__init__()
        self.dice = DiceLoss(
            include_background=include_background,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            squared_pred=squared_pred,
            jaccard=jaccard,
            reduction=reduction,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            weight=weight,
        )
        self.focal = FocalLoss(
            include_background=include_background,
            gamma=gamma,
            weight=weight,
            alpha=alpha,
            reduction=reduction,
        )
        self.lambda_dice = check_factor("lambda_dice", lambda_dice)
        self.lambda_focal = check_factor("lambda_focal", lambda_focal)
        self.to_onehot_y = to_onehot_y

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            input: logits, (B, C, *spatial).
            target: (B, C, *spatial), or with ``to_onehot_y`` a label map (B, 1, *spatial).
        """
        check_pair(input, target)
        labels = bool(self.to_onehot_y and input.shape[1] > 1)
        if self.to_onehot_y and not labels:
            ignored_for_one_channel("to_onehot_y=True")
        return _with_focal(
            self.lambda_dice, self.dice, self.lambda_focal, self.focal, input, target, labels
        )


class GeneralizedDiceFocalLoss(Module):
    """λ_gdl · `GeneralizedDiceLoss` + λ_focal · `FocalLoss`.

    As ``monai.losses.GeneralizedDiceFocalLoss``. The focal loss is that of sigmoid, whatever
    activation the generalised Dice loss has.

    Args:
        w_type: for the generalised Dice loss.
        gamma: for the focal loss.
        weight: for the focal loss, one number or one per class that counts.
        lambda_gdl, lambda_focal: at least 0.

    Raises:
        TypeError, ValueError, AssertionError: as `GeneralizedDiceLoss` and `FocalLoss`;
            ValueError for a negative factor.

    Other options: see `fastloss.monai`.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable | None = None,
        w_type: str = "square",
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        batch: bool = False,
        gamma: float = 2.0,
        weight: Sequence[float] | float | int | Tensor | None = None,
        lambda_gdl: float = 1.0,
        lambda_focal: float = 1.0,
    ) -> None:
        super().__init__()
        self.generalized_dice = GeneralizedDiceLoss(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            w_type=w_type,
            reduction=reduction,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
        )
        self.focal = FocalLoss(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            gamma=gamma,
            weight=weight,
            reduction=reduction,
        )
        self.lambda_gdl = check_factor("lambda_gdl", lambda_gdl)
        self.lambda_focal = check_factor("lambda_focal", lambda_focal)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            input: logits, (B, C, *spatial).
            target: (B, C, *spatial), or with ``to_onehot_y`` a label map (B, 1, *spatial).
        """
        check_pair(input, target)
        return _with_focal(
            self.lambda_gdl, self.generalized_dice, self.lambda_focal, self.focal, input, target
        )


def _with_focal(
    a: Any,
    region: Any,
    b: Any,
    focal: Any,
    input: Tensor,
    target: Tensor,
    labels: bool = False,
) -> Tensor:
    """a · region + b · focal; ``labels``: of a label map, which MONAI gives to both as one-hot."""
    of_region = of_focal = part = other = None
    if as_built(region, *_REGIONS):
        of_region = region._read(input, target, labels=labels)
        part = region._fused(of_region)
    if as_built(focal, FocalLoss):
        of_focal = focal._read(input, target, labels=labels)
        other = focal._fused(of_focal)
    if part is not None and region.reduction != "none":
        value = joined(a, part, b, other)
        if value is not None:
            return value
    if labels and (of_region is None or of_focal is None):
        target = one_hot(target, input.shape[1], torch.float32)
    first = region(input, target) if of_region is None else region._value(of_region, part)
    second = focal(input, target) if of_focal is None else focal._value(of_focal, other)
    return a * first + b * second
