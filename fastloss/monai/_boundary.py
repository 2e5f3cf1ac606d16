"""Losses on the distances to the boundary of the target."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastloss.distance import signed_of_masks
from fastloss.dropin import Fused, evaluate, fixed, overridden, recipe
from fastloss.monai._fused import fuse
from fastloss.monai._inputs import Inputs, check_option
from fastloss.monai._module import REDUCTIONS, Activated
from fastloss.terms import Boundary, HausdorffDT


class Distances(Activated):
    """A loss on distances, of two or three spatial axes."""

    batch: bool

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            input: (B, C, H, W) or (B, C, D, H, W).
            target: of the same shape, or with ``to_onehot_y`` a label map (B, 1, *spatial).

        Raises:
            ValueError: an input of another rank. AssertionError: a target of another shape.
        """
        if input.dim() not in (4, 5):
            raise ValueError(
                f"input: expected (B, C, H, W) or (B, C, D, H, W), got shape {tuple(input.shape)}"
            )
        inputs = self._read(input, target)
        check_option("reduction", self.reduction, REDUCTIONS)
        fused = self._fused(inputs)
        if fused is None:
            return self._plain(*inputs.probabilities())
        value = evaluate((1.0, fused))
        return self._shaped(value, input.ndim) if self.reduction == "none" else value

    def _common(self, inputs: Inputs) -> dict[str, Any]:
        return {
            "include_background": not inputs.first,
            "batch": bool(self.batch),
            "reduction": self.reduction,
        }

    def _fused(self, inputs: Inputs) -> Fused | None:
        raise NotImplementedError(f"{type(self).__name__} must define _fused")

    def _plain(self, p: Tensor, g: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _plain")

    def _shaped(self, value: Tensor, ndim: int) -> Tensor:
        return value

    def _reduced(self, value: Tensor) -> Tensor:
        if self.reduction == "mean":
            return value.mean()
        return value.sum() if self.reduction == "sum" else value


class BoundaryLoss(Distances):
    """Boundary loss, as ``monai.losses.BoundaryLoss``: the mean over the voxels of p φ.

    φ is −(d − 1) within a class, d being the distance to the nearest voxel outside, and the
    distance to the class elsewhere; 0 where a sample has no voxel of it, or no other.
    ``reduction="none"`` returns (B, C), or (C,) with ``batch``.

    Raises:
        TypeError: ``other_act`` is not callable.
        ValueError: more than one activation, an unknown reduction, or, when it is called, an input
            that is not of two or three spatial axes.
        AssertionError: when it is called, a target that does not fit the input.

    Source: Kervadec et al. 2019, "Boundary loss for highly unbalanced segmentation". Options: see
    `fastloss.monai`.
    """

    def __init__(
        self,
        include_background: bool = True,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[..., Any] | None = None,
        reduction: str = "mean",
        batch: bool = False,
    ) -> None:
        super().__init__(include_background, to_onehot_y, sigmoid, softmax, other_act, reduction)
        self.batch = batch

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss; of a label map the channel axis may be left out."""
        if self.to_onehot_y and input.shape[1:2] != (1,) and target.dim() == input.dim() - 1:
            target = target.unsqueeze(1)
        return super().forward(input, target)

    @torch.no_grad()
    def compute_distance_map(self, target: Tensor) -> Tensor:
        """φ of a one-hot target, (B, C, *spatial) float32."""
        found: Tensor = signed_of_masks(target.detach() > 0.5)
        return found

    def _fused(self, inputs: Inputs) -> Fused | None:
        if overridden(self, BoundaryLoss, "compute_distance_map"):
            return None
        return fuse(inputs, recipe(Boundary, **self._common(inputs)))

    def _plain(self, p: Tensor, g: Tensor) -> Tensor:
        value = (p * self.compute_distance_map(g)).sum(list(range(2, p.ndim)))
        value = value / math.prod(p.shape[2:]) if math.prod(p.shape[2:]) else value * math.nan
        return self._reduced(value.mean(0) if self.batch else value)

    def _shaped(self, value: Tensor, ndim: int) -> Tensor:
        return value[0] if self.batch else value


class HausdorffDTLoss(Distances):
    """Hausdorff loss, as ``monai.losses.HausdorffDTLoss``: the mean of (p − g)² (D_p^α + D_g^α).

    D is the distance to the boundary of the voxels above ½, 0 where there is none; it has no
    gradient. ``reduction="none"`` returns (B, C, 1, …), or (1, C, 1, …) with ``batch``.

    Args:
        alpha: the exponent α.

    Raises:
        TypeError, ValueError, AssertionError: as `BoundaryLoss`.

    Source: Karimi & Salcudean 2019, "Reducing the Hausdorff distance in medical image segmentation
    with convolutional neural networks". Options: see `fastloss.monai`.
    """

    log = False

    def __init__(
        self,
        alpha: float = 2.0,
        include_background: bool = False,
        to_onehot_y: bool = False,
        sigmoid: bool = False,
        softmax: bool = False,
        other_act: Callable[..., Any] | None = None,
        reduction: str = "mean",
        batch: bool = False,
    ) -> None:
        super().__init__(include_background, to_onehot_y, sigmoid, softmax, other_act, reduction)
        self.alpha = alpha
        self.batch = batch

    @torch.no_grad()
    def distance_field(self, img: Tensor) -> Tensor:
        """The distance to the boundary of the voxels above ½, (B, C, *spatial) float32."""
        found: Tensor = signed_of_masks(img.detach() > 0.5, convention="unsigned")
        return found

    def _fused(self, inputs: Inputs) -> Fused | None:
        alpha = self.alpha
        known = isinstance(alpha, (int, float)) and 0 < alpha < math.inf
        if not known or overridden(self, HausdorffDTLoss, "distance_field"):
            return None
        options = self._common(inputs)
        return fuse(inputs, recipe(HausdorffDT, alpha=fixed(alpha), log=self.log, **options))

    def _plain(self, p: Tensor, g: Tensor) -> Tensor:
        far = [self.distance_field(a[:, [c]]).float() for a in (p, g) for c in range(p.shape[1])]
        distances = torch.cat(far[: p.shape[1]], 1) ** self.alpha
        distances = distances + torch.cat(far[p.shape[1] :], 1) ** self.alpha
        axes = list(range(0 if self.batch else 2, p.ndim))
        if self.batch:
            axes.remove(1)
        value = self._reduced(((p - g) ** 2 * distances).mean(axes, keepdim=True))
        return torch.log(value + 1) if self.log else value

    def _shaped(self, value: Tensor, ndim: int) -> Tensor:
        return value.reshape(value.shape + (1,) * (ndim - 2))


class LogHausdorffDTLoss(HausdorffDTLoss):
    """log(1 + `HausdorffDTLoss`), as ``monai.losses.LogHausdorffDTLoss``.

    Options as in `HausdorffDTLoss`.
    """

    log = True
