"""What every term of a loss has in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from fastloss.frameworks import adapter_of
from fastloss.frameworks.base import Extras, constant
from fastloss.request import Request
from fastloss.statistics import Statistics
from fastloss.sums import Sum

if TYPE_CHECKING:
    from fastloss.loss import Loss

Derivatives = Mapping[Any, np.ndarray]
"""Per sum, or the name of one, the derivative of the loss by it: what broadcasts to (rows, C)."""
Pullback = Callable[[np.ndarray], Derivatives]
"""From the gradient of the term's value to the derivative by each sum."""

REDUCTIONS = ("mean", "sum", "none")


class Term:
    """One loss, defined on the sums over voxels; terms add and scale into a `fastloss.Loss`."""

    requires: frozenset[str | Sum] = frozenset()
    """The sums that the term reads, or the names of families of them: `fastloss.sums.family`."""

    ranking: Sum | None = None
    """For a term that chooses voxels by a map of their losses: the sum whose field it so makes."""

    kept_percent: float | None = None
    """For such a term that takes the mean of the largest losses: of how many percent of all voxels.

    A GPU chooses so and in no other way.
    """

    def check(self, activation: str, classes: int) -> None:
        """Raise ValueError if the term has no meaning for this activation and class count."""

    def combine(self, statistics: Statistics) -> tuple[np.ndarray, Pullback]:
        """The term's value and its pullback, from the sums alone."""
        raise NotImplementedError(f"{type(self).__name__} must define combine")

    def ranks_by(self, request: Request, classes: int) -> np.ndarray:
        """The coefficients, (S, C), of the map by which a term with a `ranking` chooses voxels."""
        raise NotImplementedError(f"{type(self).__name__} must define ranks_by")

    def choose(self, losses: np.ndarray) -> float:
        """Turn that map, (B, voxels), into the field, in place; return the sum over all voxels."""
        raise NotImplementedError(f"{type(self).__name__} must define choose")

    @property
    def per_voxel(self) -> bool:
        """Whether the value is a map: one number per voxel, of a sigmoid per voxel and channel."""
        return False

    def map_coefficients(self, request: Request, classes: int) -> Mapping[Any, Any]:
        """Per sum, its coefficient in the map of a term that is `per_voxel`: what fits (C,)."""
        raise NotImplementedError(f"{type(self).__name__} must define map_coefficients")

    @property
    def sums_over_batch(self) -> bool:
        """Whether `combine` sums over the samples first, and so needs no sums of each."""
        return False

    @property
    def joins_ranks(self) -> bool:
        """Whether `combine` reads ``statistics.joined``."""
        return False

    def join_ranks(self, statistics: Statistics) -> Statistics:
        """The sums over all ranks and samples, for terms that join them by themselves."""
        raise NotImplementedError(f"{type(self).__name__} must define join_ranks")

    def value_shape(self, batch: int, classes: int, regions: int = 0) -> tuple[int, ...]:
        """The shape of the value that `combine` returns: (), if it is not defined anew.

        ``regions``: how many regions a sample has; 0 where a call names none.
        """
        return ()

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v!r}" for k, v in options_of(self).items())
        return f"{type(self).__name__}({shown})"

    @constant
    def graph_name(self) -> str:
        """As `fastloss.Loss.graph_name`."""
        from fastloss.naming import text_of

        return text_of(self)

    # A term alone is a loss too.

    @cached_property
    def _loss(self) -> Loss:
        from fastloss.loss import Loss  # which is built on terms

        return Loss(self)

    def __call__(
        self,
        logits: Any,
        target: Any,
        voxel_weight: Any = None,
        *,
        fields: Any = None,
        regions: Any = None,
        region_count: int | None = None,
    ) -> Any:
        """As `fastloss.Loss.__call__`, with the default options."""
        extras = Extras.of(fields, regions, region_count)
        return adapter_of(logits, "logits").value(self, logits, target, voxel_weight, extras=extras)

    def value_and_grad(
        self, logits: Any, target: Any, voxel_weight: Any = None, **options: Any
    ) -> tuple[Any, Any]:
        """As `fastloss.Loss.value_and_grad`, with the default options."""
        return self._loss.value_and_grad(logits, target, voxel_weight, **options)

    def gradient(self, logits: Any, target: Any, voxel_weight: Any = None, **options: Any) -> Any:
        """As `fastloss.Loss.gradient`, with the default options."""
        return self._loss.gradient(logits, target, voxel_weight, **options)

    def statistics(
        self, logits: Any, target: Any, voxel_weight: Any = None, **options: Any
    ) -> Statistics:
        """As `fastloss.Loss.statistics`, with the default options."""
        return self._loss.statistics(logits, target, voxel_weight, **options)

    def value(self, statistics: Statistics) -> Any:
        """As `fastloss.Loss.value`."""
        return self._loss.value(statistics)

    def __add__(self, other: Any) -> Loss:
        return self._loss + other

    def __radd__(self, other: Any) -> Loss:
        return self._loss.__radd__(other)

    def __mul__(self, factor: Any) -> Loss:
        return self._loss * factor

    __rmul__ = __mul__


def options_of(term: Term) -> dict[str, Any]:
    """The options that the term was made with, where it keeps them under their own names."""
    return {k: v for k, v in vars(term).items() if k not in ("requires", "_loss")}


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return str(value)


def check_number(name: str, value: Any, low: float = 0.0, high: float = np.inf) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None
    if not (low <= number <= high) or number == np.inf:
        bounds = f"of at least {low:g}" if high == np.inf else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name}: expected a finite number {bounds}, got {value!r}")
    return number


def check_class_weight(name: str, value: Any) -> np.ndarray | float | None:
    """A weight per class: None, one number, or a 1-D array of non-negative finite numbers."""
    if value is None:
        return None
    try:
        weight = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name}: expected a number or a sequence of one per class, got {value!r}"
        ) from None
    if weight.ndim > 1:
        raise ValueError(f"{name}: expected one number per class, got shape {weight.shape}")
    if weight.size and not (np.isfinite(weight).all() and weight.min() >= 0):
        raise ValueError(f"{name}: expected finite numbers of at least 0, got {value!r}")
    if weight.ndim == 0:
        return float(weight)
    weight.flags.writeable = False
    return weight


def check_class_count(name: str, weight: np.ndarray | float | None, classes: int) -> None:
    if isinstance(weight, np.ndarray) and weight.size != classes:
        raise ValueError(f"{name}: expected {classes} numbers, one per class, got {weight.size}")
