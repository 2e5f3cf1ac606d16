"""Losses that compare distributions: sums of a function of each voxel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastloss.loss import Derivatives, Pullback, Term
from fastloss.options import (
    REDUCTIONS,
    check_choice,
    check_class_count,
    check_class_weight,
    check_number,
)
from fastloss.request import Request
from fastloss.statistics import Statistics
from fastloss.sums import CROSS_ENTROPY, Sum

VOXEL_REDUCTIONS = (*REDUCTIONS, "voxel")


class VoxelwiseTerm(Term):
    """A loss that is linear in its sums: Σ coefficient · sum, divided by a normaliser.

    Subclass it, name the sums in ``requires``, set ``reduction`` and define `linear`; the term then
    fuses, adds and scales like the built-in ones on every backend.

    ``reduction`` is "mean", "sum", "none" (the mean of each sample, (B, 1)) or "voxel": the loss of
    every voxel, (B, *spatial), or with sigmoid of every voxel and channel, (B, C, *spatial), times
    the voxel weight and 0 where voxels are ignored.
    """

    reduction: str

    def linear(self, statistics: Statistics) -> tuple[dict[str, Any], np.ndarray]:
        """Per slot, the coefficient of each class; and each sample's normaliser, (B,), or what it
        is the sum of, (B, C)."""
        raise NotImplementedError(f"{type(self).__name__} must define linear")

    @property
    def maps_voxels(self) -> bool:
        return self.reduction == "voxel"

    @property
    def shares(self) -> bool:
        return True

    def map_coefficients(self, request: Request, classes: int) -> Mapping[Any, Any]:
        # Any sums will do, as the coefficients do not depend on them.
        sums, voxels = np.zeros((len(request.sums), 1, classes)), np.zeros(1)
        return self.linear(Statistics(request, sums, voxels, np.dtype(np.float64)))[0]

    @property
    def sums_over_batch(self) -> bool:
        return self.reduction != "none"

    def value_shape(self, batch: int, classes: int, regions: int = 0) -> tuple[int, ...]:
        return (batch * max(regions, 1), 1) if self.reduction == "none" else ()

    def combine(self, statistics: Statistics) -> tuple[np.ndarray, Pullback]:
        coefficients, normaliser = self.linear(statistics)
        axis = 1 if self.reduction == "none" else None
        value: Any = 0.0
        for slot, coefficient in coefficients.items():
            sums = statistics[slot]
            if isinstance(coefficient, float):
                if coefficient != 0:
                    value = value + coefficient * sums.sum(axis)
            else:
                # A class of weight 0 counts for nothing, even where its sum is infinite.
                value = value + (np.where(coefficient == 0, 0.0, sums) * coefficient).sum(axis)
        if self.reduction == "none":
            value = np.broadcast_to(value, statistics.batch_size)[:, None]
            scale = inverse(normaliser if normaliser.ndim == 1 else normaliser.sum(axis=1))[:, None]
        else:
            scale = inverse(normaliser.sum()) if self.reduction == "mean" else 1.0
        value = value * scale

        def pullback(upstream: np.ndarray) -> Derivatives:
            factor = upstream * scale
            return {slot: factor * c for slot, c in coefficients.items()}

        return value, pullback


def inverse(normaliser: Any) -> Any:
    """1 / normaliser, and 0 where nothing was counted: the mean over no voxel is 0."""
    if isinstance(normaliser, float):  # NumPy's are
        return 1.0 / normaliser if normaliser > 0 else 0.0
    return np.divide(1.0, normaliser, out=np.zeros_like(normaliser), where=normaliser > 0)


class CrossEntropy(VoxelwiseTerm):
    """Cross-entropy, with the conventions of ``torch.nn.CrossEntropyLoss``.

    softmax, label map y: −[(1−ε) w_y log p_y + (ε/C) Σ_c w_c log p_c], its mean over Σ w_y.
    softmax, dense target g: −Σ_c w_c [(1−ε) g_c + ε/C] log p_c, its mean over the voxels.
    sigmoid: binary cross-entropy of every channel, the mean over voxels and channels; smoothing
    moves each target towards ½. No activation: the softmax formulas on the given probabilities.
    Voxel weights multiply both the sum and what it is divided by; the mean over no voxel is 0.

    Args:
        weight: a weight per class, (C,), or one number; non-negative.
        label_smoothing: ε in [0, 1] (Szegedy et al. 2016, "Rethinking the Inception
            Architecture").
        reduction: "mean", "sum", "none": the mean of each sample, (B, 1), or "voxel": the loss of
            every voxel, (B, *spatial), with sigmoid (B, C, *spatial).

    Raises:
        ValueError, TypeError: an option out of its range.

    >>> import numpy as np, fastloss as fl
    >>> loss = fl.Loss(fl.CrossEntropy(), activation="none")
    >>> print(round(float(loss(np.array([[0.8, 0.2]]), np.array([[1.0, 0.0]]))), 3))
    0.223
    """

    number_options = ("weight",)

    def __init__(
        self, *, weight: Any = None, label_smoothing: float = 0.0, reduction: str = "mean"
    ) -> None:
        self.weight = check_class_weight("weight", weight)
        self.label_smoothing = check_number("label_smoothing", label_smoothing, 0.0, 1.0)
        self.reduction = check_choice("reduction", reduction, VOXEL_REDUCTIONS)
        smoothing = {"uniform"} if self.label_smoothing else set()
        self.requires = frozenset({"cross_entropy"} | smoothing)

    def check(self, activation: str, classes: int) -> None:
        check_class_count("weight", self.weight, classes)

    def linear(self, statistics: Statistics) -> tuple[dict[str, Any], np.ndarray]:
        weight = 1.0 if self.weight is None else self.weight
        epsilon, request = self.label_smoothing, statistics.request
        if request.activation == "sigmoid":
            hard, smooth = (1 - epsilon) * weight, epsilon / 2 * weight
            coefficients = {"cross_entropy": hard, "cross_entropy_rest": hard}
            normaliser = statistics.voxels * statistics.classes
        else:
            smooth = epsilon / statistics.classes * weight
            coefficients = {"cross_entropy": (1 - epsilon) * weight}
            if request.dense:
                normaliser = statistics.voxels
            else:
                reference = statistics["reference"]
                normaliser = reference if self.weight is None else weight * reference
        if epsilon:
            coefficients["uniform"] = smooth
            if request.activation == "sigmoid":
                coefficients["uniform_rest"] = smooth
        return coefficients, normaliser


class Focal(VoxelwiseTerm):
    """Focal loss (Lin et al. 2017, "Focal Loss for Dense Object Detection").

    softmax: −α_y (1−p_y)^γ log p_y, the mean over voxels. sigmoid, every channel:
    −[α g (1−p)^γ log p + (1−α) (1−g) p^γ log(1−p)], the mean over voxels and channels. Both are
    linear in g, which is how soft targets are understood. No activation: as softmax.

    Args:
        gamma: the focusing exponent γ, at least 0; 0 is cross-entropy.
        alpha: α, one number or one per class. None: no weighting (α and 1−α are both 1).
            For sigmoid in [0, 1].
        reduction: "mean", "sum", "none": the mean of each sample, (B, 1), or "voxel": the loss of
            every voxel, (B, *spatial), with sigmoid (B, C, *spatial).

    Raises:
        ValueError, TypeError: an option out of its range.
    """

    number_options = ("alpha",)

    def __init__(self, *, gamma: float = 2.0, alpha: Any = None, reduction: str = "mean") -> None:
        self.gamma = check_number("gamma", gamma)
        self.alpha = check_class_weight("alpha", alpha)
        self.reduction = check_choice("reduction", reduction, VOXEL_REDUCTIONS)
        self.requires = frozenset({f"focal:{self.gamma!r}"})

    def check(self, activation: str, classes: int) -> None:
        check_class_count("alpha", self.alpha, classes)
        if activation == "sigmoid" and self.alpha is not None and np.max(self.alpha) > 1:
            raise ValueError(f"alpha: with sigmoid expected numbers in [0, 1], got {self.alpha!r}")

    def largest(self, name: str, activation: str) -> float:
        return 1.0 if activation == "sigmoid" else np.inf

    def linear(self, statistics: Statistics) -> tuple[dict[str, Any], np.ndarray]:
        alpha, slot = self.alpha, f"focal:{self.gamma!r}"
        coefficients: dict[str, Any] = {slot: 1.0 if alpha is None else alpha}
        if statistics.request.activation != "sigmoid":
            return coefficients, statistics.voxels
        coefficients[f"focal_rest:{self.gamma!r}"] = 1.0 if alpha is None else 1.0 - alpha
        return coefficients, statistics.voxels * statistics.classes


class TopKCrossEntropy(Term):
    """Cross-entropy of the hardest voxels: the mean of the largest k percent of all voxels' losses.

    The loss of a voxel of label y is −w_y log p_y times its voxel weight, and 0 where it is
    ignored; the largest are taken over the whole batch, whose voxels all count, ignored ones
    too, at least one. Voxels that tie for the last places share them. Softmax of a label map
    only; one such term in a loss.

    It is no function of sums over voxels: chunks of a volume and the ranks of a process group
    cannot be joined, and the backward pass of a framework reads the logits once more than other
    losses do. One number per voxel is held in addition.

    Args:
        k: percent of the voxels, above 0 and at most 100.
        weight: a weight per class, (C,), or one number; non-negative.

    Raises:
        ValueError, TypeError: an option out of its range.

    Source: Wu et al. 2016, "Bridging Category-level and Instance-level Semantic Image
    Segmentation" (online bootstrapping), in the form that nnU-Net uses.

    >>> import numpy as np, fastloss as fl
    >>> logits = np.array([[[0.0, 3.0, 1.0, 5.0], [0.0, 0.0, 0.0, 0.0]]])
    >>> print(round(float(fl.TopKCrossEntropy(k=25)(logits, np.zeros((1, 4), int))), 3))
    0.693
    """

    ranking = Sum("target", "log", field="top_k")
    requires = frozenset({"cross_entropy", ranking})
    number_options = ("weight",)

    def __init__(self, *, k: float = 10.0, weight: Any = None) -> None:
        self.k = check_number("k", k, 0.0, 100.0)
        if self.k == 0:
            raise ValueError("k: expected a number above 0, got 0")
        self.weight = check_class_weight("weight", weight)

    @property
    def shares(self) -> bool:
        return True

    @property
    def kept_percent(self) -> float:  # type: ignore[override]
        return self.k

    def check(self, activation: str, classes: int) -> None:
        if activation != "softmax":
            raise ValueError(
                f"activation: top-k cross-entropy is defined for 'softmax', got {activation!r}"
            )
        check_class_count("weight", self.weight, classes)

    def class_weight(self, classes: int) -> np.ndarray:
        """The weight of every class, (C,)."""
        weight = 1.0 if self.weight is None else self.weight
        return np.array(np.broadcast_to(weight, (classes,)), np.float64)

    def combine(self, statistics: Statistics) -> tuple[np.ndarray, Pullback]:
        weight = np.ones(statistics.classes) * (1.0 if self.weight is None else self.weight)

        def pullback(upstream: np.ndarray) -> Derivatives:
            return {self.ranking: upstream * weight}

        return statistics[self.ranking].sum(), pullback

    def ranks_by(self, request: Request, classes: int) -> np.ndarray:
        coefficients = np.zeros((len(request.sums), classes))
        coefficients[request.index[CROSS_ENTROPY]] = self.class_weight(classes)
        return coefficients

    def choose(self, losses: np.ndarray) -> float:
        """The share of every voxel in the mean of the largest losses, and that mean.

        Where more than one voxel has the smallest loss that is kept, all of them share the places
        that are left.
        """
        flat = losses.reshape(-1)
        if not flat.size:
            return 0.0
        kept = max(1, int(flat.size * self.k / 100))
        threshold = np.partition(flat, flat.size - kept)[flat.size - kept]
        above, at = ~(flat <= threshold), flat == threshold  # NaN is above all
        places = kept - int(np.count_nonzero(above))
        total = flat.sum(where=above, dtype=np.float64)
        if places > 0:
            total += places * np.float64(threshold)
        flat[...] = 0.0
        flat[above] = 1.0 / kept
        flat[at] = places / (kept * max(1, int(np.count_nonzero(at))))
        return float(total / kept)
