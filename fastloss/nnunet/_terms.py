"""nnU-Net's formulas on sums over voxels, where they differ from `fastloss.terms`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.distributed as dist

from fastloss.frameworks.torch.distributed import WORLD, Ranks
from fastloss.loss import Derivatives, Pullback
from fastloss.options import check_class_count, check_class_weight
from fastloss.statistics import Statistics
from fastloss.terms.boundary import SkeletonRecall
from fastloss.terms.distribution import VoxelwiseTerm
from fastloss.terms.per_class import ClassTerm
from fastloss.terms.region import RegionTerm

LEAST_SIZE = 1e-8
"""The lower bound of denominators."""


class JoinedOverRanks(ClassTerm):
    """A term whose sums over the batch are also summed over all ranks.

    A class names it first among its bases, and sets ``ddp``.
    """

    ddp: bool

    @property
    def joins_ranks(self) -> bool:
        return self.batch and self.ddp

    def join_ranks(self, statistics: Statistics) -> Statistics:
        return Ranks(WORLD, "batch").join(self._loss, statistics)[0]

    def combine(self, statistics: Statistics) -> tuple[np.ndarray, Pullback]:
        if not self.joins_ranks:
            return super().combine(statistics)
        # Reduced over ranks here rather than for the whole loss: each rank keeps its own
        # cross-entropy.
        joined = statistics.joined or self.join_ranks(statistics)
        value, pullback = super().combine(joined)
        ranks = dist.get_world_size()

        def times_ranks(upstream: np.ndarray) -> Derivatives:
            return pullback(upstream * ranks)

        return value, times_ranks


class NegativeDice(JoinedOverRanks, RegionTerm):
    """−(2 O + s_nr) / max(P + G + s_dr, 1e-8).

    Args:
        clip_tp: the least overlap, which also replaces the true positives in P and G; or None.
        ddp: with ``batch``, sum over the samples of all ranks.

    Other options as in `fastloss.RegionTerm`.
    """

    def __init__(self, *, clip_tp: float | None = None, ddp: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.clip_tp = clip_tp
        self.ddp = ddp

    def formula(
        self, overlap: np.ndarray, predicted: np.ndarray, reference: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        clipped, slope = overlap, np.ones_like(overlap)
        if self.clip_tp is not None:
            clipped = np.maximum(overlap, self.clip_tp)
            slope = (overlap >= self.clip_tp).astype(overlap.dtype)
        size = predicted + reference + 2.0 * (clipped - overlap) + self.smooth_dr
        dice = (2.0 * clipped + self.smooth_nr) / np.maximum(size, LEAST_SIZE)
        inverse = 1.0 / np.maximum(size, LEAST_SIZE)
        by_size = np.where(size >= LEAST_SIZE, dice * inverse, 0.0)
        return -dice, 2.0 * (by_size * (slope - 1.0) - inverse * slope), by_size


class NegativeSkeletonRecall(JoinedOverRanks, SkeletonRecall):
    """−(Σ p s + s_nr) / (Σ s + s_dr).

    Args:
        ddp: with ``batch``, sum over the samples of all ranks.

    Other options as in `fastloss.SkeletonRecall`, whose value is larger by 1.
    """

    def __init__(self, *, ddp: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.ddp = ddp

    def of_sums(self, *sums: np.ndarray) -> Any:
        value, slopes = super().of_sums(*sums)
        return value - 1.0, slopes


class BinaryCrossEntropy(VoxelwiseTerm):
    """Binary cross-entropy as torch.nn.BCEWithLogitsLoss, including its class weights.

    Args:
        positive, negative: the weights where the target is 1 and where it is 0, one number or one
            per channel.
        per_voxel: divide the sum by the number of voxels, not by voxels times channels.
        reduction: "mean" or "sum".
    """

    requires = frozenset({"cross_entropy"})
    number_options = ("positive", "negative")

    def __init__(
        self, *, positive: Any, negative: Any, per_voxel: bool = False, reduction: str = "mean"
    ) -> None:
        self.positive = check_class_weight("pos_weight", positive)
        self.negative = check_class_weight("weight", negative)
        self.per_voxel = per_voxel
        self.reduction = reduction

    def check(self, activation: str, classes: int) -> None:
        check_class_count("pos_weight", self.positive, classes)
        check_class_count("weight", self.negative, classes)

    def linear(self, statistics: Statistics) -> tuple[dict[str, Any], np.ndarray]:
        coefficients = {"cross_entropy": self.positive, "cross_entropy_rest": self.negative}
        channels = 1 if self.per_voxel else statistics.classes
        return coefficients, statistics.voxels * channels
