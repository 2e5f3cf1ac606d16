"""Which classes are evaluated: their names, and the labels that each unites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MOST_LABEL = 65534


def read_classes(
    classes: Any, found: int, include_background: bool, channels: int | None = None
) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Names of classes, and the labels that each unites.

    Args:
        found: how many there are where ``classes`` does not say.
        channels: how many there must be.
    """
    if classes is None:
        classes = found
    if isinstance(classes, Mapping):
        names = tuple(map(str, classes))
        labels = tuple(_labels(f"classes[{name!r}]", each) for name, each in classes.items())
        for name, each in zip(names, labels, strict=True):
            if channels is not None and each[-1] >= channels:
                raise ValueError(
                    f"classes[{name!r}]: expected labels in [0, {channels}), the channels of the "
                    f"prediction, got {each[-1]}"
                )
    elif isinstance(classes, Sequence) and not isinstance(classes, (str, bytes)):
        if not all(isinstance(name, str) for name in classes):
            raise TypeError(
                "classes: expected a number of classes, their names, or names with labels, got "
                f"{classes!r}"
            )
        first = _first(len(classes), include_background, channels)
        names, labels = tuple(classes)[first:], tuple((i,) for i in range(first, len(classes)))
    elif isinstance(classes, (int, np.integer)) and not isinstance(classes, bool):
        if not 1 <= classes <= MOST_LABEL + 1:
            raise ValueError(f"classes: expected a number in [1, {MOST_LABEL + 1}], got {classes}")
        first = _first(int(classes), include_background, channels)
        labels = tuple((i,) for i in range(first, int(classes)))
        names = tuple(str(i) for (i,) in labels)
    else:
        raise TypeError(
            f"classes: expected a number of classes, their names, or names with labels, got "
            f"{classes!r}"
        )
    if not names:
        raise ValueError(f"classes: expected at least one class, got {classes!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"classes: expected names that differ, got {list(names)}")
    return names, labels


def size_of(classes: Any, labels: tuple[tuple[int, ...], ...], most: int) -> int:
    """How many class indices label maps have.

    Args:
        classes, labels: what `read_classes` got, and returned.
        most: the largest label that is found.
    """
    if classes is None or isinstance(classes, Mapping):
        return 1 + max(most, *(label for each in labels for label in each))
    return len(classes) if isinstance(classes, Sequence) else int(classes)


def members_of(labels: tuple[tuple[int, ...], ...], size: int) -> np.ndarray:
    """Which of the class indices, and of that of no class behind them, make up each class."""
    members = np.zeros((len(labels), size + 1), bool)
    for row, each in zip(members, labels, strict=True):
        row[list(each)] = True
    return members


def _first(number: int, include_background: bool, channels: int | None) -> int:
    """The first class that is evaluated, of so many."""
    if channels is not None and number != channels:
        raise ValueError(
            f"classes: expected {channels}, one for each channel of the prediction, got {number}"
        )
    return 0 if include_background or number == 1 else 1


def _labels(name: str, value: Any) -> tuple[int, ...]:
    several = value if isinstance(value, (list, tuple, set, frozenset, range)) else (value,)
    found = []
    for label in several:
        if isinstance(label, bool) or not isinstance(label, (int, np.integer)):
            raise TypeError(f"{name}: expected a label or several, got {value!r}")
        if not 0 <= label <= MOST_LABEL:
            raise ValueError(f"{name}: expected labels in [0, {MOST_LABEL}], got {label}")
        found.append(int(label))
    if not found:
        raise ValueError(f"{name}: expected at least one label, got none")
    return tuple(sorted(set(found)))
