"""What a metric is where a mask is empty."""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan, nan
from typing import Any, NamedTuple


class Empty(NamedTuple):
    """The value of a metric by which masks are empty: a number, "error", or None: as its formula.

    Where a formula has no value (0 / 0) and this is None, the value is NaN.
    """

    both: float | str | None = nan
    """Neither prediction nor reference has a voxel."""
    one: float | str | None = None
    """One of them has, the other has none."""


def empties_of(empty: Any, metrics: Mapping[str, Empty]) -> dict[str, Empty]:
    """For each metric, by name, what it is where masks are empty.

    Args:
        empty: None: the defaults; a pair ``(both, one)`` for all metrics; or a mapping from some of
            their names to such pairs.
        metrics: the defaults by name.

    Raises:
        ValueError: a metric that is not computed, an unknown word.
        TypeError: an argument of another kind.
    """
    if empty is None:
        return dict(metrics)
    if not isinstance(empty, Mapping):
        return dict.fromkeys(metrics, _pair("empty", empty))
    for name in empty:
        if name not in metrics:
            known = ", ".join(map(repr, metrics))
            raise ValueError(f"empty: expected metrics among {known}, got {name!r}")
    return {
        name: _pair(f"empty[{name!r}]", empty[name]) if name in empty else default
        for name, default in metrics.items()
    }


def _pair(name: str, value: Any) -> Empty:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__len__") or len(value) != 2:
        raise TypeError(f"{name}: expected a pair (both empty, one empty), got {value!r}")
    return Empty(*(_value(name, each) for each in value))


def _value(name: str, value: Any) -> float | str | None:
    if value is None or value == "error":
        return None if value is None else "error"
    if isinstance(value, str):
        raise ValueError(f"{name}: expected a number, None or 'error', got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, None or 'error', got {value!r}") from None


def value_of(empty: Empty, predicted: bool, true: bool, where: str) -> float | None:
    """The value where a mask is empty; None: as the formula gives.

    Args:
        predicted, true: whether prediction and reference have a voxel.
        where: metric, class and sample, for the error.

    Raises:
        ValueError: the value is "error".
    """
    if predicted and true:
        return None
    value = empty.both if not (predicted or true) else empty.one
    if value == "error":
        masks = "prediction" if true else "reference" if predicted else "prediction and reference"
        raise ValueError(f"{where}: no voxel in the {masks}, and empty= asks for an error")
    assert not isinstance(value, str)
    return value


def described(empty: Empty) -> str:
    """For tables and documentation."""

    def word(value: float | str | None) -> str:
        if value is None:
            return "formula"
        if isinstance(value, str):
            return value
        return "NaN" if isnan(value) else f"{value:g}"

    return f"both: {word(empty.both)}, one: {word(empty.one)}"
