"""Losses of single voxels that are linear in sums which other losses have anyway."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastloss.options import check_choice, check_class_count, check_class_weight, check_number
from fastloss.statistics import Statistics
from fastloss.sums import Sum
from fastloss.terms.distribution import VOXEL_REDUCTIONS, VoxelwiseTerm


class ClassWeighted(VoxelwiseTerm):
    """A loss that sums a weighted loss of every class of a voxel.

    Its mean is over the voxels, of a sigmoid over voxels and channels.

    Args:
        weight: a weight per class, (C,), or one number; non-negative.
        reduction: "mean", "sum", "none": the mean of each sample, (B, 1), or "voxel": the loss of
            every voxel, (B, *spatial), with sigmoid (B, C, *spatial).

    Raises:
        ValueError, TypeError: an option out of its range.
    """

    number_options = ("weight",)

    def __init__(self, *, weight: Any = None, reduction: str = "mean") -> None:
        self.weight = check_class_weight("weight", weight)
        self.reduction = check_choice("reduction", reduction, VOXEL_REDUCTIONS)

    def check(self, activation: str, classes: int) -> None:
        check_class_count("weight", self.weight, classes)

    def coefficients(self, statistics: Statistics) -> dict[Any, float]:
        """Per sum, its coefficient before classes are weighed."""
        raise NotImplementedError(f"{type(self).__name__} must define coefficients")

    def linear(self, statistics: Statistics) -> tuple[dict[str, Any], np.ndarray]:
        weight = 1.0 if self.weight is None else self.weight
        each = {key: k * weight for key, k in self.coefficients(statistics).items()}
        sigmoid = statistics.request.activation == "sigmoid"
        return each, statistics.voxels * (statistics.classes if sigmoid else 1)


class Brier(ClassWeighted):
    """Brier score, Σ_c w_c (p_c − g_c)².

    Options as in `ClassWeighted`.

    Source: Brier 1950, "Verification of forecasts expressed in terms of probability".

    >>> import numpy as np, fastloss as fl
    >>> loss = fl.Loss(fl.Brier(), activation="none")
    >>> print(round(float(loss(np.array([[0.8, 0.2]]), np.array([[1.0, 0.0]]))), 3))
    0.08
    """

    requires = frozenset({"squared"})

    def coefficients(self, statistics: Statistics) -> dict[Any, float]:
        return {"predicted_squared": 1.0, "overlap": -2.0, "reference_squared": 1.0}


class MeanAbsoluteError(ClassWeighted):
    """Mean absolute error, Σ_c w_c |p_c − g_c|, which bears wrong labels better than cross-entropy.

    It is taken as linear in g, g (1−p) + (1−g) p, which is how soft targets are understood. Options
    as in `ClassWeighted`.

    Source: Ghosh et al. 2017, "Robust loss functions under label noise for deep neural networks".

    >>> import numpy as np, fastloss as fl
    >>> loss = fl.Loss(fl.MeanAbsoluteError(), activation="none")
    >>> print(round(float(loss(np.array([[0.8, 0.2]]), np.array([[1.0, 0.0]]))), 3))
    0.4
    """

    requires = frozenset({"region"})

    def coefficients(self, statistics: Statistics) -> dict[Any, float]:
        return {"reference": 1.0, "predicted": 1.0, "overlap": -2.0}


class PolyCrossEntropy(ClassWeighted):
    """Poly-1 loss, Σ_c w_c g_c (−log p_c + ε (1 − p_c)).

    Of a sigmoid the same is added for the other outcome, with 1−g and 1−p.

    Args:
        epsilon: ε, at least −1; 0 is cross-entropy.
        weight, reduction: as in `ClassWeighted`.

    Raises:
        ValueError, TypeError: an option out of its range.

    Source: Leng et al. 2022, "PolyLoss: a polynomial expansion perspective of classification loss
    functions".

    >>> import numpy as np, fastloss as fl
    >>> loss = fl.Loss(fl.PolyCrossEntropy(epsilon=2), activation="none")
    >>> print(round(float(loss(np.array([[0.8, 0.2]]), np.array([[1.0, 0.0]]))), 3))
    0.623
    """

    requires = frozenset({"cross_entropy", "region"})

    def __init__(self, *, epsilon: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.epsilon = check_number("epsilon", epsilon, -1.0)

    def coefficients(self, statistics: Statistics) -> dict[Any, float]:
        epsilon = self.epsilon
        if statistics.request.activation == "sigmoid":
            both = {"cross_entropy": 1.0, "cross_entropy_rest": 1.0}
            return {**both, "reference": epsilon, "predicted": epsilon, "overlap": -2 * epsilon}
        return {"cross_entropy": 1.0, "reference": epsilon, "overlap": -epsilon}


class GeneralizedCrossEntropy(ClassWeighted):
    """Generalised cross-entropy, Σ_c w_c g_c (1 − p_c^q) / q, for targets with some wrong labels.

    Of a sigmoid every channel's g is asked alone. Options as in `ClassWeighted`.

    Args:
        q: in (0, 1]; towards 0 it is cross-entropy, and at 1 half the mean absolute error.

    Source: Zhang & Sabuncu 2018, "Generalized cross entropy loss for training deep neural networks
    with noisy labels".
    """

    def __init__(self, *, q: float = 0.7, **options: Any) -> None:
        super().__init__(**options)
        self.q = check_number("q", q, 1e-6, 1.0)
        self.requires = frozenset({Sum("target", "generalized", self.q)})

    def coefficients(self, statistics: Statistics) -> dict[Any, float]:
        return dict.fromkeys(self.requires, 1.0)
