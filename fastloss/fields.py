"""Fields that a loss makes by itself: of the target, and of what is predicted.

They are NumPy's, or arrays on a GPU, as the call's are: a function here takes either, and of the
latter queues work on the current stream, without waiting for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from fastloss.arrays import Arrays, Field
from fastloss.borrowed import Borrowed
from fastloss.frameworks import borrow

Spacing = float | tuple[float, ...] | None
_MOST = float(np.finfo(np.float16).max)


class Target(NamedTuple):
    """The class of every voxel, or the masks of the classes, as fields are made of them.

    Attributes:
        labels: (B, *spatial) of integers; a voxel that is ignored, or whose label is not in
            [0, C), is of no class. None of a dense target.
        masks: (B, C, *spatial) bool, on a GPU 0 and 1 of uint8: where a dense target is above ½,
            and no voxel is ignored. None of a label map.
        classes: C.
        activation: that of the loss.
    """

    labels: Any
    masks: Any
    classes: int
    activation: str

    @property
    def axes(self) -> int:
        """The number of spatial axes."""
        if self.labels is not None:
            return len(self.labels.shape) - 1
        return len(self.masks.shape) - 2


class Form(NamedTuple):
    """A field that a term makes: its dtype, and whether there is one number for each class."""

    dtype: str
    by_class: bool


def target_of(
    array: np.ndarray, dtype: str, dense: bool, *, classes: int, ignore: int | None, activation: str
) -> Target:
    """The target of these numbers, (B, *spatial) or (B, C, *spatial) if ``dense``.

    Labels with a fraction are of no class.
    """
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
        known = (array >= 0) & (array < classes) & (array == np.floor(array))
        array = np.where(known, array, -1).astype(np.int32)
    if ignore is not None and 0 <= ignore < classes:
        array = np.where(array == ignore, -1, array.astype(np.int32))
    return Target(array, None, classes, activation)


def target_on_gpu(
    target: Borrowed, dense: bool, *, classes: int, ignore: int | None, activation: str
) -> Target:
    """As `target_of`, of an array on a GPU."""
    kernels = _indices()
    if dense:
        return Target(None, kernels.dense_masks(target, ignore), classes, activation)
    ignored = ignore if ignore is not None and 0 <= ignore < classes else None
    return Target(kernels.class_indices(target, classes, ignored), None, classes, activation)


def numbers(array: np.ndarray, dtype: str) -> np.ndarray:
    """A copy in float32, in C order; of float64 too, as distances are of float32."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, order="C")


def distances_of(name: str, array: np.ndarray, dtype: str, kind: str, classes: int) -> np.ndarray:
    """A field that another is derived from, (B, C, *spatial), as a copy."""
    _refuse_labels(name, dtype, kind)
    own = numbers(array, dtype)
    if kind == "voxel":
        own = np.repeat(own[:, None], classes, axis=1)
    return own


def distances_on_gpu(name: str, given: Any, field: Borrowed, kind: str, classes: int) -> Any:
    """As `distances_of`, of an array on a GPU: ``given`` itself if it is such a field.

    Args:
        field: its view, in the shape in which kernels take it.
    """
    _refuse_labels(name, field.dtype, kind)
    view = field.array
    if kind == "voxel":
        shape = (len(view), classes, *view.shape[1:])
        field = field._replace(array=np.broadcast_to(view[:, None], shape))
    elif field.dtype == "float32" and view.flags.c_contiguous and given.shape == view.shape:
        return given
    return _kernels().powers(1.0, [field])


def _refuse_labels(name: str, dtype: str, kind: str) -> None:
    if kind == "labels":
        raise TypeError(f"fields[{name!r}]: expected floating numbers, got a map of {dtype}")


def powers(exponent: float, first: Any, second: Any = None) -> Any:
    """x^e of distances, or x^e + y^e; then ``first`` may be overwritten."""
    if isinstance(first, np.ndarray):
        raised = _raised(exponent, first, None if second is None else first)
        if second is not None:
            raised += _raised(exponent, second)
        return raised
    arrays = [borrow(a, "fields") for a in (first, second) if a is not None]
    return _kernels().powers(exponent, arrays, out=None if second is None else first)


def _raised(exponent: float, array: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    found: np.ndarray
    found = np.square(array, out=out) if exponent == 2 else np.power(array, exponent, out=out)
    return found


def boundary_voxels(target: Target) -> Any:
    """Where a voxel of a class shares a face with one that is not of it, or lies at the edge.

    Of a label map (B, *spatial), whose voxels of no class are all alike; of masks (B, C, *spatial),
    within each.
    """
    labels, masks = target.labels, target.masks
    array = labels if masks is None else masks
    if not isinstance(array, np.ndarray):
        return _kernels().boundary_voxels(borrow(array, "target"), masks is not None)
    if masks is not None:
        found = _differs(masks, 2)
        found &= masks
        return found
    known = (labels >= 0) & (labels < target.classes)
    return _differs(np.where(known, labels.astype(np.int32), -1), 1)


def _differs(array: np.ndarray, first: int) -> np.ndarray:
    """Where a voxel differs from one that shares a face with it, or lies at the edge."""
    found = np.zeros(array.shape, bool)
    for axis in range(first, array.ndim):
        moved, edges = np.moveaxis(array, axis, 0), np.moveaxis(found, axis, 0)
        if not len(moved):
            continue
        change = moved[1:] != moved[:-1]
        edges[1:] |= change
        edges[:-1] |= change
        edges[0] = edges[-1] = True
    return found


def _kernels() -> Any:
    # Where no array is on a GPU, nothing of it is imported.
    from fastloss.backends.cuda import fields

    return fields


def _indices() -> Any:
    from fastloss.backends.cuda import indices

    return indices


def make(
    loss: Any,
    names: Iterable[str],
    given: Mapping[str, Callable[[], Any]],
    target: Callable[[], Target],
    mask: Callable[[], Any],
) -> dict[str, Any]:
    """The fields of these names, those of the sums of the loss.

    Args:
        given: functions that read the fields which others are derived from, by name.
        target: a function that reads the target.
        mask: a function that finds where p > ½, (B, C, *spatial).
    """
    known: dict[str, Any] = {}
    read: list[Target] = []

    def source(term: Any) -> Any:
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


def narrowed(field: Any, dtype: str) -> Any:
    """A field of floating numbers in this dtype, any other as it is."""
    if not isinstance(field, np.ndarray):
        found = borrow(field, "fields")
        if "float" not in found.dtype or found.dtype == dtype:
            return field
        return _kernels().powers(1.0, [found], dtype)
    if field.dtype.kind != "f" or field.dtype.name == dtype:
        return field
    if dtype == "float16":
        field = np.clip(field, -_MOST, _MOST)
    return field.astype(dtype)


def as_field(made: Borrowed, arrays: Arrays) -> Field:
    """A field that was made, as kernels take it."""
    view, dtype, _ = made
    kind = "labels" if view.dtype.kind in "iu" and arrays.logits.shape[1] > 1 else "voxel"
    return Field(view, dtype, "class" if view.ndim == arrays.logits.ndim else kind)


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
