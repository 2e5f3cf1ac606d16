"""Fields that a loss makes by itself: of the target, and of what is predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fastloss.arrays import Arrays, Field

Spacing = float | tuple[float, ...] | None
_MOST = float(np.finfo(np.float16).max)


class Target(NamedTuple):
    """The class of every voxel, or the masks of the classes, as fields are made of them.

    Attributes:
        labels: (B, *spatial) of integers; a voxel that is ignored, or whose label is not in
            [0, C), is of no class. None of a dense target.
        masks: (B, C, *spatial) bool: where a dense target is above ½, and no voxel is ignored.
            None of a label map.
        classes: C.
        activation: that of the loss.
    """

    labels: np.ndarray | None
    masks: np.ndarray | None
    classes: int
    activation: str

    @property
    def axes(self) -> int:
        """The number of spatial axes."""
        if self.labels is not None:
            return self.labels.ndim - 1
        assert self.masks is not None
        return self.masks.ndim - 2


class Form(NamedTuple):
    """A field that a term makes: its dtype, and whether there is one number for each class."""

    dtype: str
    by_class: bool


def target_of(
    array: np.ndarray, dtype: str, dense: bool, *, classes: int, ignore: int | None, activation: str
) -> Target:
    """The target of these numbers, (B, *spatial) or (B, C, *spatial) if ``dense``."""
    if dtype == "bool":
        array = array.view(np.uint8)
    if dense:
        if dtype == "bfloat16":
            array = numbers(array, dtype)
        masks = array > 0.5
        if ignore is not None:
            if classes > 1 and 0 <= ignore < classes:
                ignored = masks[:, ignore]
            else:
                ignored = (array == ignore).any(axis=1)
            masks &= ~ignored[:, None]
        return Target(None, masks, classes, activation)
    if array.dtype.kind == "f" or dtype == "bfloat16":
        array = numbers(array, dtype)
        array = np.where((array >= 0) & (array < classes), array, -1).astype(np.int32)
    if ignore is not None and 0 <= ignore < classes:
        array = np.where(array == ignore, -1, array.astype(np.int32))
    return Target(array, None, classes, activation)


def numbers(array: np.ndarray, dtype: str) -> np.ndarray:
    """A copy in float32, in C order; of float64 too, as distances are of float32."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, order="C")


def distances_of(name: str, array: np.ndarray, dtype: str, kind: str, classes: int) -> np.ndarray:
    """A field that another is derived from, (B, C, *spatial), as a copy."""
    if kind == "labels":
        raise TypeError(f"fields[{name!r}]: expected floating numbers, got a map of {dtype}")
    own = numbers(array, dtype)
    if kind == "voxel":
        own = np.repeat(own[:, None], classes, axis=1)
    return own


def make(
    loss: Any,
    names: Iterable[str],
    given: Mapping[str, Callable[[], np.ndarray]],
    target: Callable[[], Target],
    mask: Callable[[], np.ndarray],
) -> dict[str, np.ndarray]:
    """The fields of these names, those of the sums of the loss.

    Args:
        given: functions that copy the fields which others are derived from, by name.
        target: a function that reads the target.
        mask: a function that finds where p > ½, (B, C, *spatial) bool.
    """
    known: dict[str, np.ndarray] = {}
    read: list[Target] = []

    def source(term: Any) -> np.ndarray:
        if term.makes in given:
            return given[term.makes]()
        if term.makes not in known:
            if not read:
                read.append(target())
            known[term.makes] = term.make_field(read[0], term.spacing)
        return known[term.makes]

    made = {}
    for name in names:
        term = loss.makers[name]
        if name == term.makes:
            made[name] = source(term)
        else:
            made[name] = term.derive_field(source(term), mask() if term.looks else None)
    return made


def narrowed(field: np.ndarray, dtype: str) -> np.ndarray:
    """A field of floating numbers in this dtype, any other as it is."""
    if field.dtype.kind != "f" or field.dtype.name == dtype:
        return field
    if dtype == "float16":
        field = np.clip(field, -_MOST, _MOST)
    return field.astype(dtype)


def as_field(array: np.ndarray, view: np.ndarray, arrays: Arrays) -> Field:
    """A field that was made, as kernels take it; ``view``: where it lies."""
    kind = "labels" if array.dtype.kind in "iu" and arrays.logits.shape[1] > 1 else "voxel"
    return Field(view, array.dtype.name, "class" if array.ndim == arrays.logits.ndim else kind)


def spacing_of(spacing: Any, axes: int) -> tuple[float, ...]:
    """One number for each spatial axis.

    Raises:
        ValueError: not as many as there are axes.
    """
    if spacing is None or isinstance(spacing, (int, float)):
        return (1.0 if spacing is None else float(spacing),) * axes
    if len(spacing) != axes:
        raise ValueError(
            f"spacing: expected {axes} numbers, one for each spatial axis, got {len(spacing)}"
        )
    return tuple(spacing)
