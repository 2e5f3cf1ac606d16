"""The sum over voxels that Keras' cross-entropies are."""

from __future__ import annotations

from typing import Any, ClassVar

from fastloss.options import check_class_count, check_class_weight, check_number
from fastloss.statistics import Statistics
from fastloss.sums import Sum
from fastloss.terms.distribution import VoxelwiseTerm


class Entropy(VoxelwiseTerm):
    """Σ_c a_c (h g_c + s) f(p_c), of both outcomes also Σ_c b (h (1−g_c) + s) f(1−p_c).

    f(p) is −log p, or (1−p)^γ (−log p).

    Args:
        hard, smooth: h and s.
        both: whether the other outcome of every channel counts as well.
        gamma: γ; None: 0.
        weight: a, one number or (C,); None: 1.
        rest_weight: b.
        reduction: "sum" or "voxel".
    """

    number_options: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(
        self,
        *,
        hard: float = 1.0,
        smooth: float = 0.0,
        both: bool = False,
        gamma: float | None = None,
        weight: Any = None,
        rest_weight: float = 1.0,
        reduction: str = "sum",
    ) -> None:
        self.hard, self.smooth, self.both = float(hard), float(smooth), bool(both)
        self.gamma = None if gamma is None else check_number("gamma", gamma)
        self.weight = check_class_weight("weight", weight)
        self.rest_weight = float(rest_weight)
        self.reduction = reduction
        self.requires = frozenset(self._coefficients())

    def check(self, activation: str, classes: int) -> None:
        check_class_count("alpha", self.weight, classes)

    def _coefficients(self) -> dict[Any, Any]:
        parameter = 0.0 if self.gamma is None else self.gamma
        kind = "log" if self.gamma is None else "focal"
        weight = 1.0 if self.weight is None else self.weight
        outcomes = [("target", kind, weight)]
        if self.both:
            outcomes.append(("rest", f"{kind}_rest", self.rest_weight))
        found: dict[Any, Any] = {}
        for which, function, own in outcomes:
            found[Sum(which, function, parameter)] = self.hard * own
            if self.smooth:
                found[Sum("one", function, parameter)] = self.smooth * own
        return found

    def linear(self, statistics: Statistics) -> tuple[dict[Any, Any], Any]:
        return self._coefficients(), statistics.voxels
