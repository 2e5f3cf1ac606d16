"""nnU-Net's cross-entropy losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastloss.dropin import (
    Fused,
    Recipe,
    Values,
    are_sizes,
    at_least_float32,
    evaluate,
    fixed,
    kernels_take,
    numbers_of,
    recipe,
)
from fastloss.frameworks.torch.tensors import refuse_gradient
from fastloss.terms import CrossEntropy, TopKCrossEntropy


class RobustCrossEntropyLoss(nn.CrossEntropyLoss):
    """Cross-entropy of a label map of any dtype, as nnU-Net's class of this name.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing: as
            ``torch.nn.CrossEntropyLoss``.

    Raises:
        ValueError: when it is called, tensors that do not fit each other, or a label that is
            neither a class nor ``ignore_index``.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            input: logits, (B, C, *spatial).
            target: a label map, (B, *spatial) or (B, 1, *spatial).
        """
        target = without_channel(input, target)
        fused = self.fused(input, target)
        return self._unfused(input, target.long()) if fused is None else evaluate((1.0, fused))

    def fused(self, input: Tensor, target: Tensor) -> Fused | None:
        """The term for the kernels; None if they cannot compute it."""
        numbers = None
        if self.weight is not None:
            refuse_gradient(self.weight, "weight")
            numbers = numbers_of(self.weight)
            of_classes = self.weight.shape == (input.shape[1],) and not self.weight.requires_grad
            if not (of_classes and are_sizes(numbers)):
                return None
        term = self._recipe(numbers) if kernels_take(input, target) else None
        if term is None:
            return None
        return Fused(term, "softmax", input, target, None, self.ignore_index)

    def _recipe(self, weight: Values | None) -> Recipe | None:
        if self.reduction not in ("mean", "sum") or not 0 <= self.label_smoothing <= 1:
            return None
        return recipe(
            CrossEntropy,
            weight=weight,
            label_smoothing=fixed(self.label_smoothing),
            reduction=self.reduction,
        )

    def _unfused(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(at_least_float32(input), target)


class TopKLoss(RobustCrossEntropyLoss):
    """The mean of the largest k percent of the voxels' cross-entropies.

    As nnU-Net's class of this name. Ignored voxels count among all voxels, with a loss of 0.

    Args:
        weight, ignore_index, label_smoothing: as ``torch.nn.CrossEntropyLoss``.
        k: percent of the voxels of the batch, above 0 and at most 100.

    Raises:
        ValueError: ``k`` out of its range; when it is called, as `RobustCrossEntropyLoss`.

    Source: see `fastloss.TopKCrossEntropy`.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        k: float = 10,
        label_smoothing: float = 0,
    ) -> None:
        if not 0 < k <= 100:
            raise ValueError(f"k: expected a number above 0 and at most 100, got {k!r}")
        super().__init__(
            weight, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
        )
        self.k = k

    def forward(self, inp: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            inp: logits, (B, C, *spatial).
            target: a label map, (B, 1, *spatial).
        """
        return super().forward(inp, target)

    def _recipe(self, weight: Values | None) -> Recipe | None:
        if self.label_smoothing != 0:
            return None
        return recipe(TopKCrossEntropy, weight=weight, k=fixed(self.k))

    def _unfused(self, input: Tensor, target: Tensor) -> Tensor:
        if torch.jit.is_tracing():
            raise RuntimeError(
                "label_smoothing: torch.jit.trace would record the number of voxels that the "
                "top-k cross-entropy takes; use torch.export or torch.compile"
            )
        losses = super()._unfused(input, target).flatten()
        if not losses.numel():
            return losses.sum()
        count = max(1, int(losses.numel() * self.k / 100))
        return torch.topk(losses, count, sorted=False).values.mean()


def without_channel(input: Tensor, target: Tensor) -> Tensor:
    """The label map (B, *spatial)."""
    if target.ndim != input.ndim:
        return target
    if target.shape[1] != 1:
        raise AssertionError(
            f"target: expected a label map with one channel, got shape {tuple(target.shape)}"
        )
    return target[:, 0]


def remember_weight(module: Any, _: Any = None) -> None:
    """Does nothing: pickles of older versions name it."""
