"""Options of terms and losses: what they may be, and clear errors for what they may not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastloss.frameworks import adapter_of
from fastloss.tracing import torch_traces

REDUCTIONS = ("mean", "sum", "none")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return str(value)


def check_switch(name: str, value: Any) -> bool:
    """True or False, of Python or of NumPy, or the numbers 1 and 0."""
    if not isinstance(value, (bool, int, np.bool_, np.integer)) or value not in (0, 1):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def check_number(name: str, value: Any, low: float = 0.0, high: float = np.inf) -> float:
    refuse_gradient(name, value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None
    if not (low <= number <= high) or number == np.inf:
        bounds = f"of at least {low:g}" if high == np.inf else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name}: expected a finite number {bounds}, got {value!r}")
    return number


def factor_of(name: str, value: Any) -> float | None:
    """The number that a loss is multiplied by; None if this is not one.

    Raises:
        TypeError: an array of several numbers, or a tensor that requires a gradient.
        ValueError: a number that is not finite.
    """
    if not isinstance(value, (int, float)) and hasattr(value, "ndim"):
        if value.ndim:
            shape = tuple(value.shape)
            raise TypeError(f"{name}: expected a number, got an array of shape {shape}")
        if getattr(value, "requires_grad", False):
            raise TypeError(
                f"{name}: got a tensor that requires a gradient, but gradients flow to the logits "
                f"alone; pass {name}.detach(), or multiply the value of the loss by it"
            )
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not -np.inf < value < np.inf:
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return float(value)


def check_class_weight(name: str, value: Any) -> np.ndarray | float | None:
    """A weight per class: None, one number, or a 1-D array of non-negative finite numbers.

    Anybody's array is copied, wherever it lies. TypeError for one that requires a gradient.
    """
    if value is None:
        return None
    if isinstance(value, (int, float)):
        return check_number(name, value)
    if torch_traces():
        raise RuntimeError(
            f"{name}: a term with a weight for each class cannot be made inside a compiled "
            "function; make it outside, and call it inside"
        )
    for one in value if isinstance(value, (list, tuple)) else (value,):
        refuse_gradient(name, one)
    try:
        weight = np.array(readable(name, value), dtype=np.float64)
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


def refuse_gradient(name: str, value: Any) -> None:
    """Raise TypeError for a tensor whose gradient would be lost without a word."""
    if isinstance(value, (int, float)):
        return
    if getattr(value, "requires_grad", False) is True:
        raise TypeError(
            f"{name}: got a tensor that requires a gradient, but gradients flow to the logits "
            f"alone; pass {name}.detach()"
        )


def readable(name: str, value: Any) -> Any:
    """A framework's array as one that NumPy reads; any other value itself."""
    if isinstance(value, (list, tuple)):
        return [readable(name, one) for one in value]
    if isinstance(value, (int, float, np.ndarray)):
        return value
    try:
        return adapter_of(value, name).numbers(value, name)
    except TypeError:  # no array; NumPy will say so
        return value


def check_class_count(name: str, weight: np.ndarray | float | None, classes: int) -> None:
    if isinstance(weight, np.ndarray) and weight.size != classes:
        raise ValueError(f"{name}: expected {classes} numbers, one per class, got {weight.size}")


def check_count(name: str, value: Any) -> int:
    """An integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected a number of at least 1, got {value}")
    return int(value)


def check_dilations(value: Any) -> int:
    """How often something is dilated: an integer of at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"dilations: expected an integer, got {value!r}")
    if value < 0:
        raise ValueError(f"dilations: expected a number of at least 0, got {value}")
    return int(value)


def check_spacing(value: Any) -> float | tuple[float, ...] | None:
    """The size of a voxel: None (1), one number, or one per spatial axis, above 0 and finite."""
    if value is None:
        return None
    several = readable("spacing", value)
    if isinstance(several, np.ndarray):
        several = several.tolist()
    each = several if _is_sequence(several) else (several,)
    try:
        if any(isinstance(size, (bool, str)) for size in each):
            raise TypeError
        sizes = tuple(float(size) for size in each)
    except (TypeError, ValueError):
        raise TypeError(
            f"spacing: expected a number, or one for each spatial axis, got {value!r}"
        ) from None
    if not sizes or not all(0 < size < np.inf for size in sizes):
        raise ValueError(f"spacing: expected finite numbers above 0, got {value!r}")
    return sizes if _is_sequence(several) else sizes[0]


def check_axes(spacing: Any, spatial_axes: Any) -> int | None:
    """How many spatial axes there are, by what is known of the spacing; None: not known."""
    if spatial_axes is not None:
        return check_count("spatial_axes", spatial_axes)
    checked = check_spacing(spacing)
    return len(checked) if isinstance(checked, tuple) else None


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (list, tuple))
