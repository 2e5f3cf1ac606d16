"""The loss that knows how far classes are from each other."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fastloss.dropin import (
    Fused,
    at_least_float32,
    evaluate,
    fixed,
    in_graph,
    is_size,
    kernels_take,
    recipe,
)
from fastloss.monai._inputs import check_option
from fastloss.monai._module import REDUCTIONS, Module
from fastloss.terms import GeneralizedWassersteinDice


class GeneralizedWassersteinDiceLoss(Module):
    """Generalised Wasserstein Dice loss, as ``monai.losses.GeneralizedWassersteinDiceLoss``.

    W(x) = Σ_c M[y(x), c] p_c(x), p being softmax of the input; 1 − (2 T + smooth_nr) / (2 T + Σ W +
    smooth_dr) with T = Σ (1 − W) over the foreground, or with "GDL" voxels weighed by the inverse
    size of their class, and Σ α (2 − W) + smooth_dr below. ``reduction="none"`` returns (B,).

    Args:
        dist_matrix: M, (C, C), an array or tensor; it is divided by its largest number.
        weighting_mode: "default" or "GDL".
        reduction: "mean", "sum" or "none".
        smooth_nr, smooth_dr: added to numerator and denominator.

    Raises:
        ValueError: a matrix that is not square, or an option that is none of these; in a call, a
            label that is no class.

    Source: Fidon et al. 2017, "Generalised Wasserstein Dice score for imbalanced multi-class
    segmentation using holistic convolutional networks".
    """

    stored: ClassVar[dict[str, str]] = {"dist_matrix": "m", "weighting_mode": "alpha_mode"}

    def __init__(
        self,
        dist_matrix: np.ndarray | Tensor,
        weighting_mode: str = "default",
        reduction: str = "mean",
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
    ) -> None:
        super().__init__(reduction=check_option("reduction", reduction, REDUCTIONS))
        shape = tuple(dist_matrix.shape)
        if shape[0] != shape[1]:
            raise ValueError(f"dist_matrix: expected (C, C), got shape {shape}")
        if weighting_mode not in ("default", "GDL"):
            raise ValueError(f"weighting_mode: expected 'default' or 'GDL', got {weighting_mode!r}")
        m = torch.from_numpy(dist_matrix) if isinstance(dist_matrix, np.ndarray) else dist_matrix
        self.m = m if m.max() == 1 else m / m.max()
        self._rows = tuple(tuple(row) for row in self.m.tolist())
        self.alpha_mode = weighting_mode
        self.num_classes = self.m.size(0)
        self.smooth_nr = float(smooth_nr)
        self.smooth_dr = float(smooth_dr)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            input: logits, (B, C, *spatial), or (B, C).
            target: labels, (B, 1, *spatial) or (B, *spatial).
        """
        reduction = check_option("reduction", self.reduction, REDUCTIONS)
        logits = input if input.ndim > 2 else input[..., None]
        labels = target.reshape(len(target), *logits.shape[2:])
        fused = None if in_graph() else self._fused(logits, labels, reduction)
        if fused is None:
            return self._plain(logits, labels, reduction)
        value = evaluate((1.0, fused))
        value = value[:, 0] if reduction == "none" else value
        m = self.m
        return (
            value.to(torch.promote_types(value.dtype, m.dtype)) if m.is_floating_point() else value
        )

    def _fused(self, logits: Tensor, labels: Tensor, reduction: str) -> Fused | None:
        known = is_size(self.smooth_nr) and is_size(self.smooth_dr)
        if not known or not kernels_take(logits, labels) or logits.numel() == 0:
            return None
        if not all(0 <= d < math.inf for row in self._rows for d in row):
            return None
        made = recipe(
            GeneralizedWassersteinDice,
            distances=self._rows,
            weighting=self.alpha_mode,
            smooth_nr=fixed(self.smooth_nr),
            smooth_dr=fixed(self.smooth_dr),
            reduction=reduction,
        )
        return Fused(made, "softmax", logits, labels)

    def _plain(self, logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        p = torch.softmax(at_least_float32(logits).flatten(2), 1)
        y = labels.flatten(1).long()
        m = self.m.to(p.device)
        distance = (m[y].movedim(2, 1) * p).sum(1)  # (B, voxels)
        if self.alpha_mode == "GDL":
            sizes = torch.zeros(p.shape[:2], device=p.device).scatter_add_(
                1, y, torch.ones(y.shape, device=p.device)
            )
            alpha = (1.0 / (sizes + 1.0)).gather(1, y)
            right = (alpha * (1.0 - distance)).sum(1)
            whole = (alpha * (2.0 - distance)).sum(1)
        else:
            right = ((y != 0).to(p.dtype) * (1.0 - distance)).sum(1)
            whole = 2.0 * right + distance.sum(1)
        value = 1.0 - (2.0 * right + self.smooth_nr) / (whole + self.smooth_dr)
        if reduction == "none":
            return value
        return value.mean() if reduction == "mean" else value.sum()
