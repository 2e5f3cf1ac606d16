"""The asymmetric unified focal loss, and its two parts, for a background and one class."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from fastloss.dropin import (
    Fused,
    Recipe,
    as_built,
    at_least_float32,
    evaluate,
    fixed,
    in_graph,
    is_size,
    kernels_take,
    recipe,
    times,
)
from fastloss.monai._inputs import check_option, ignore_mask, ignored_for_one_channel, one_hot
from fastloss.monai._module import REDUCTIONS, Module
from fastloss.terms import UnbalancedFocal, UnbalancedTversky

_EPSILON = 1e-7


class _Part(Module):
    """One part: probabilities and target, of which channels 0 and 1 count."""

    def __init__(
        self,
        to_onehot_y: bool,
        delta: float,
        gamma: float,
        epsilon: float,
        reduction: str,
        ignore_index: int | None,
    ) -> None:
        super().__init__(reduction=check_option("reduction", reduction, REDUCTIONS))
        self.to_onehot_y = to_onehot_y
        self.delta = delta
        self.gamma = gamma
        self.epsilon = epsilon
        self.ignore_index = ignore_index

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """The loss.

        Args:
            y_pred: probabilities, (B, 2, *spatial).
            y_true: of the same shape, or with ``to_onehot_y`` a label map (B, 1, *spatial).

        Raises:
            ValueError: a target of another shape.
        """
        reduction = check_option("reduction", self.reduction, REDUCTIONS)
        mask = ignore_mask(y_true, self.ignore_index)
        labels = self.to_onehot_y and y_pred.shape[1] != 1
        if self.to_onehot_y and not labels:
            ignored_for_one_channel("to_onehot_y=True")
        if labels and y_true.shape[1] != 1:
            raise AssertionError(
                f"y_true: expected a label map with one channel, got {tuple(y_true.shape)}"
            )
        shape = (len(y_true), y_pred.shape[1], *y_true.shape[2:]) if labels else y_true.shape
        if tuple(shape) != tuple(y_pred.shape):
            raise ValueError(
                f"y_true: expected the shape of y_pred, {tuple(y_pred.shape)}, got "
                f"{tuple(y_true.shape)}"
            )
        p = torch.clamp(at_least_float32(y_pred), self.epsilon, 1.0 - self.epsilon)
        if mask is None:
            made = self.recipe(reduction)
            if made is not None and fits(p, y_true):
                return evaluate((made[0], Fused(made[1], "none", p, y_true)))
        if labels:
            if self.ignore_index is not None and not 0 <= self.ignore_index < p.shape[1]:
                y_true = torch.where(y_true == self.ignore_index, 0, y_true)
            y_true = one_hot(y_true, p.shape[1], torch.float32)
        return self._plain(p, y_true, mask, reduction)

    def recipe(self, reduction: str) -> tuple[float, Recipe] | None:
        """The term of the kernels, and its factor; None where they do not compute it."""
        raise NotImplementedError(f"{type(self).__name__} must define recipe")

    def _plain(self, p: Tensor, g: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _plain")

    def _is_usual(self, most: float) -> bool:
        """Whether the kernels take these options; ``most``: above γ."""
        numbers = is_size(self.delta) and self.delta <= 1 and is_size(self.gamma)
        return numbers and self.gamma < most


def fits(p: Tensor, target: Tensor) -> bool:
    """Whether the kernels take these tensors."""
    return p.shape[1] == 2 and p.numel() > 0 and kernels_take(p, target)


class AsymmetricFocalTverskyLoss(_Part):
    """1 − TI of the background and (1 − TI)^(1−γ) of the foreground, as in
    ``monai.losses.unified_focal_loss``.

    TI = (TP + ε) / (TP + δ FN + (1−δ) FP + ε). ``reduction="none"`` returns (B, 2).

    Args:
        to_onehot_y: the target is a label map.
        delta, gamma, epsilon: δ, γ and ε; the input is clamped to [ε, 1 − ε].
        reduction: "mean", "sum" or "none".
        ignore_index: see `fastloss.monai`.

    Source: Yeung et al. 2022, "Unified focal loss: generalising Dice and cross entropy-based losses
    to handle class imbalanced medical image segmentation".
    """

    def __init__(
        self,
        to_onehot_y: bool = False,
        delta: float = 0.7,
        gamma: float = 0.75,
        epsilon: float = _EPSILON,
        reduction: str = "mean",
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(to_onehot_y, delta, gamma, epsilon, reduction, ignore_index)

    def recipe(self, reduction: str) -> tuple[float, Recipe] | None:
        if not self._is_usual(1.0) or not is_size(self.epsilon):
            return None
        made = recipe(
            UnbalancedTversky,
            delta=fixed(self.delta),
            gamma=fixed(self.gamma),
            smooth_nr=fixed(self.epsilon),
            smooth_dr=fixed(self.epsilon),
            reduction=reduction,
        )
        return 1.0, made

    def _plain(self, p: Tensor, g: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
        if mask is not None:
            p, g = p * mask, g * mask
        axes = list(range(2, p.ndim))
        right, missed = (g * p).sum(axes), (g * (1 - p)).sum(axes)
        wrong = ((1 - g) * p).sum(axes)
        size = right + self.delta * missed + (1 - self.delta) * wrong
        loss = 1 - (right + self.epsilon) / (size + self.epsilon)
        return _reduced(torch.stack([loss[:, 0], loss[:, 1] ** (1 - self.gamma)], -1), reduction)


class AsymmetricFocalLoss(_Part):
    """−(1−δ) (1−p)^γ log p of the background and −δ log p of the foreground, as in
    ``monai.losses.unified_focal_loss``.

    ``reduction="none"`` returns (B, 2, *spatial). Options as in `AsymmetricFocalTverskyLoss`.
    """

    def __init__(
        self,
        to_onehot_y: bool = False,
        delta: float = 0.7,
        gamma: float = 2,
        epsilon: float = _EPSILON,
        reduction: str = "mean",
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(to_onehot_y, delta, gamma, epsilon, reduction, ignore_index)

    def recipe(self, reduction: str) -> tuple[float, Recipe] | None:
        if reduction == "none" or not self._is_usual(torch.inf):
            return None
        made = recipe(
            UnbalancedFocal, delta=fixed(self.delta), gamma=fixed(self.gamma), reduction=reduction
        )
        return 0.5 if reduction == "mean" else 1.0, made  # the mean is over both classes

    def _plain(self, p: Tensor, g: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
        entropy = -g * torch.log(p)
        entropy = entropy if mask is None else entropy * mask
        background = (1 - self.delta) * (1 - p[:, 0]) ** self.gamma * entropy[:, 0]
        loss = torch.stack([background, self.delta * entropy[:, 1]], 1)
        if reduction == "mean" and mask is not None:
            count = mask.expand_as(loss).sum().clamp(min=self.epsilon)
            return (loss * mask).sum() / count
        return _reduced(loss, reduction)


class AsymmetricUnifiedFocalLoss(Module):
    """Asymmetric unified focal loss, as ``monai.losses.AsymmetricUnifiedFocalLoss``.

    ``weight`` · `AsymmetricFocalLoss` + (1 − ``weight``) · `AsymmetricFocalTverskyLoss` of
    probabilities: in MONAI too no activation is applied. One number, whatever the ``reduction``.

    Args:
        to_onehot_y: the target is a label map (B, 1, *spatial).
        num_classes: 2.
        weight: the share of the first part.
        gamma, delta: of both parts.
        reduction: "mean", "sum" or "none".
        ignore_index: see `fastloss.monai`.

    Raises:
        ValueError: an unknown reduction; in a call, an input that is not of two or three spatial
            axes, a target that does not fit it, or numbers in it above ``num_classes`` − 1.

    Source: Yeung et al. 2022, "Unified focal loss: generalising Dice and cross entropy-based losses
    to handle class imbalanced medical image segmentation".
    """

    def __init__(
        self,
        to_onehot_y: bool = False,
        num_classes: int = 2,
        weight: float = 0.5,
        gamma: float = 0.5,
        delta: float = 0.7,
        reduction: str = "mean",
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(reduction=check_option("reduction", reduction, REDUCTIONS))
        self.to_onehot_y = to_onehot_y
        self.num_classes = num_classes
        self.gamma = gamma
        self.delta = delta
        self.weight: float = weight
        self.asy_focal_loss = AsymmetricFocalLoss(gamma=gamma, delta=delta)
        self.asy_focal_tversky_loss = AsymmetricFocalTverskyLoss(gamma=gamma, delta=delta)
        self.ignore_index = ignore_index

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """The loss.

        Args:
            y_pred: probabilities, (B, 2, *spatial), or (B, 1, *spatial) of the foreground.
            y_true: of the same shape, or with ``to_onehot_y`` a label map (B, 1, *spatial).
        """
        check_option("reduction", self.reduction, REDUCTIONS)
        if y_pred.ndim not in (4, 5):
            raise ValueError(
                f"y_pred: expected two or three spatial axes, got shape {tuple(y_pred.shape)}"
            )
        single = y_pred.shape[1] == 1
        if single and self.to_onehot_y:
            ignored_for_one_channel("to_onehot_y=True")
        if single and self.ignore_index is not None:
            warnings.warn(
                "the prediction has a single channel: ignore_index is a label of the target",
                stacklevel=2,
            )
        labels = self.to_onehot_y and not single
        if not labels and y_true.shape != y_pred.shape and not (single and y_true.shape[1] == 1):
            raise ValueError(
                f"y_true: expected the shape of y_pred, {tuple(y_pred.shape)}, got "
                f"{tuple(y_true.shape)}"
            )
        if labels and y_true.shape[1] != 1:
            raise AssertionError(
                f"y_true: expected a label map with one channel, got {tuple(y_true.shape)}"
            )
        mask = ignore_mask(y_true, self.ignore_index)
        if single:
            y_pred = torch.cat([1 - y_pred, y_pred], 1)
            y_true = torch.cat([1 - y_true, y_true], 1)
        if mask is None and not labels:
            self._check_numbers(y_true)
        p = at_least_float32(y_pred)
        parts = self._parts(p, y_true, labels) if mask is None else None
        if parts is not None:
            return evaluate(*parts)
        if labels:
            if self.ignore_index is not None and not 0 <= self.ignore_index < self.num_classes:
                y_true = torch.where(y_true == self.ignore_index, 0, y_true)
            y_true = one_hot(y_true, self.num_classes, torch.float32)
        if mask is not None:
            p, y_true = p * mask, y_true * mask
        focal, tversky = (
            part(p, y_true) for part in (self.asy_focal_loss, self.asy_focal_tversky_loss)
        )
        value: Tensor = times(self.weight, focal) + times(1 - self.weight, tversky)
        return (
            value.sum()
            if self.reduction == "sum"
            else value.mean()
            if self.reduction == "mean"
            else value
        )

    def _check_numbers(self, y_true: Tensor) -> None:
        if not in_graph() and y_true.numel() and y_true.max() > self.num_classes - 1:
            raise ValueError(
                f"y_true: expected numbers of at most {self.num_classes - 1}, got "
                f"{y_true.max().item()}"
            )

    def _parts(self, p: Tensor, target: Tensor, labels: bool) -> list[tuple[Any, Fused]] | None:
        """What the kernels compute at once, if they compute both parts."""
        kinds = AsymmetricFocalLoss, AsymmetricFocalTverskyLoss
        pair = self.asy_focal_loss, self.asy_focal_tversky_loss
        if not all(as_built(part, kind) for part, kind in zip(pair, kinds, strict=True)):
            return None
        same = pair[0].epsilon == pair[1].epsilon and self.num_classes == 2
        plain = all(part.ignore_index is None and not part.to_onehot_y for part in pair)
        if not (same and plain and is_size(self.weight) and self.weight <= 1 and fits(p, target)):
            return None
        if any(part.reduction != "mean" for part in pair):
            return None
        clamped = torch.clamp(p, pair[0].epsilon, 1.0 - pair[0].epsilon)
        found: list[tuple[Any, Fused]] = []
        for share, part in zip((self.weight, 1 - self.weight), pair, strict=True):
            made = part.recipe("mean")
            if made is None:
                return None
            found.append((share * made[0], Fused(made[1], "none", clamped, target)))
        return found


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()
