"""The caller's arrays, checked and brought to one shape: what a kernel is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from fastloss.borrowed import Borrowed

FLOATS = frozenset({"float32", "float16", "bfloat16", "float64"})
INTEGERS = frozenset(
    {"bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"}
)


class Field(NamedTuple):
    """An array that terms read beside the target.

    Attributes:
        array: (B, *spatial), or (B, C, *spatial) of kind "class".
        dtype: its name; bfloat16 is stored as uint16.
        kind: "voxel": one number for all classes of a voxel; "class": one for each; "labels": the
            number of class c is 1 where the label is c, else 0.
    """

    array: np.ndarray
    dtype: str
    kind: str


@dataclass(eq=False)  # frozen, it would take a microsecond longer to make
class Arrays:
    """Views of the caller's memory, in any strides.

    Attributes:
        logits: (B, C, *spatial).
        target: a label map (B, *spatial), or dense (B, C, *spatial).
        voxel_weight: (B, *spatial) or None.
        logits_dtype, target_dtype, weight_dtype: dtype names; bfloat16 is stored as uint16.
        dense: whether the target is dense.
        fields: in the order of `fastloss.request.Request.fields`.
        regions: None, or the region of every voxel, (B, *spatial) of integers; a voxel whose number
            is not in [0, rows) is of none. Of shape (B, C, *spatial) the sums of each class have
            regions of their own.
        rows: how many regions a sample has at most; 1 without regions.
    """

    logits: np.ndarray
    logits_dtype: str
    target: np.ndarray
    target_dtype: str
    dense: bool
    voxel_weight: np.ndarray | None
    weight_dtype: str
    fields: tuple[Field, ...] = ()
    regions: np.ndarray | None = None
    regions_dtype: str = ""
    rows: int = 1

    @property
    def regions_by_class(self) -> bool:
        """Whether every class has a map of regions of its own."""
        return self.regions is not None and self.regions.ndim == self.logits.ndim

    @property
    def value_dtype(self) -> np.dtype:
        return _FLOAT64 if self.logits_dtype == "float64" else _FLOAT32


_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


def arrange(
    logits: Borrowed,
    target: Borrowed,
    voxel_weight: Borrowed | None,
    activation: str,
    channel_axis: int,
    *,
    fields: Mapping[str, Borrowed] | None = None,
    regions: Borrowed | None = None,
    regions_by_class: bool = False,
    rows: int = 1,
) -> Arrays:
    """Check the arrays against each other and move the channel axis to 1, without a copy.

    Args:
        fields: by name, in the order in which they are kept.
        regions_by_class: whether there is a map of regions for each class; of a single class it is
            kept as that of all.
        rows: how many regions a sample has at most.

    Raises:
        TypeError: a dtype that has no meaning for its argument.
        ValueError: a rank or shape that does not fit.
    """
    x, y = logits.array, target.array
    if logits.dtype not in FLOATS:
        raise TypeError(
            "logits: expected float16, bfloat16, float32 or float64, got " + logits.dtype
        )
    if target.dtype not in FLOATS and target.dtype not in INTEGERS:
        raise TypeError(f"target: expected integers, bool or floating numbers, got {target.dtype}")
    ndim = x.ndim
    if ndim < 2:
        raise ValueError(
            f"logits: expected (batch, channels, *spatial) with a channel axis, got shape {x.shape}"
        )
    if channel_axis != 1:
        x = channels_second(x, channel_axis, "logits")
        y = channels_second(y, channel_axis, "target") if y.ndim == ndim else y
    batch, classes = x.shape[:2]
    spatial = x.shape[2:]
    if classes == 0:
        raise ValueError(f"logits: expected at least one channel, got shape {logits.array.shape}")

    single = classes == 1 and activation != "softmax"
    if y.ndim == ndim and y.shape == x.shape and (classes > 1 or single):
        dense = True
    elif y.ndim == ndim and y.shape[1] == 1 and y.shape[0] == batch and y.shape[2:] == spatial:
        y, dense = y[:, 0], False
    elif y.shape == (batch, *spatial):
        # The mask of a single channel is that channel's own target.
        y, dense = (y[:, None], True) if single else (y, False)
    else:
        raise ValueError(
            f"target: for logits {logits.array.shape} expected a label map "
            f"{(batch, *spatial)} or {_with_channel(batch, 1, spatial, channel_axis)}, or a dense "
            f"target {logits.array.shape}, got shape {target.array.shape}"
        )

    w = None
    if voxel_weight is not None:
        w = voxel_weight.array
        if voxel_weight.dtype not in FLOATS and voxel_weight.dtype not in INTEGERS:
            raise TypeError(
                f"voxel_weight: expected floating numbers, integers or bool, got "
                f"{voxel_weight.dtype}"
            )
        if w.ndim == ndim:
            w = channels_second(w, channel_axis, "voxel_weight")
            w = w[:, 0] if w.shape[1] == 1 else w
        if w.shape == (1, *spatial) and batch != 1:  # the same of every sample
            w = as_strided(w, (batch, *spatial), (0, *w.strides[1:]))
        if w.shape != (batch, *spatial):
            raise ValueError(
                f"voxel_weight: expected {(batch, *spatial)} or "
                f"{_with_channel(batch, 1, spatial, channel_axis)}, or one sample for all, got "
                f"shape {voxel_weight.array.shape}"
            )
    weight_dtype = "" if voxel_weight is None else voxel_weight.dtype
    usual = (x, logits.dtype, y, target.dtype, dense, w, weight_dtype)
    if not fields and regions is None:
        return Arrays(*usual)
    kept = tuple(_field(f, n, x.shape, channel_axis) for n, f in (fields or {}).items())
    if regions is None:
        return Arrays(*usual, kept)
    if regions.dtype not in INTEGERS or regions.dtype == "bool":
        raise TypeError(f"regions: expected integers, got {regions.dtype}")
    if regions_by_class and classes > 1:
        map_of_regions = regions.array
        if map_of_regions.ndim == ndim:
            map_of_regions = channels_second(map_of_regions, channel_axis, "regions")
        if map_of_regions.shape != x.shape:
            raise ValueError(
                f"regions: expected {logits.array.shape}, a map for each class, got shape "
                f"{regions.array.shape}"
            )
    else:
        map_of_regions = _of_voxels(regions.array, "regions", x.shape, channel_axis)
    return Arrays(*usual, kept, map_of_regions, regions.dtype, rows)


def _field(field: Borrowed, name: str, shape: tuple[int, ...], channel_axis: int) -> Field:
    """A field of logits of this shape, (B, C, *spatial)."""
    called = f"fields[{name!r}]"
    if field.dtype not in FLOATS and field.dtype not in INTEGERS:
        raise TypeError(f"{called}: expected floating numbers, integers or bool, got {field.dtype}")
    a = field.array
    if a.ndim == len(shape):
        a = channels_second(a, channel_axis, called)
        if a.shape == shape:
            return Field(a, field.dtype, "class")
    a = _of_voxels(field.array, called, shape, channel_axis, or_classes=True)
    # With one class a map of integers is that class's mask, as a target is.
    labels = field.dtype in INTEGERS and field.dtype != "bool" and shape[1] > 1
    return Field(a, field.dtype, "labels" if labels else "voxel")


def _of_voxels(
    array: np.ndarray,
    name: str,
    shape: tuple[int, ...],
    channel_axis: int,
    or_classes: bool = False,
) -> np.ndarray:
    """(B, *spatial), of an array that may have a channel axis of 1, for logits of this shape."""
    batch, spatial = shape[0], shape[2:]
    a = array
    if a.ndim == len(shape):
        a = channels_second(a, channel_axis, name)
        a = a[:, 0] if a.shape[1] == 1 else a
    if a.shape != (batch, *spatial):
        wanted = [(batch, *spatial), _with_channel(batch, 1, spatial, channel_axis)]
        if or_classes:
            wanted[1] = _with_channel(batch, shape[1], spatial, channel_axis)
        raise ValueError(f"{name}: expected {wanted[0]} or {wanted[1]}, got shape {array.shape}")
    return a


def check_out(out: Borrowed, logits: Borrowed, others: list[tuple[str, Borrowed]]) -> None:
    """Check that the gradient can be written to ``out``; it may be the logits themselves."""
    a, x = out.array, logits.array
    if a.shape != x.shape:
        raise ValueError(f"out: expected the logits' shape {x.shape}, got {a.shape}")
    if out.dtype != logits.dtype:
        raise TypeError(f"out: expected the logits' dtype {logits.dtype}, got {out.dtype}")
    if a.size and _overlaps_itself(a):
        raise ValueError("out: expected an array whose elements do not share memory")
    if a is not x and np.may_share_memory(a, x):
        start = a.__array_interface__["data"][0] == x.__array_interface__["data"][0]
        if not (start and a.strides == x.strides) and np.shares_memory(a, x):
            raise ValueError("out: overlaps the logits without being the same array")
    for name, other in others:
        if np.may_share_memory(a, other.array) and np.shares_memory(a, other.array):
            raise ValueError(f"out: overlaps the {name}, which the gradient would overwrite")


def _overlaps_itself(array: np.ndarray) -> bool:
    """Whether two elements may share memory: an axis steps less than the finer ones reach."""
    if array.flags.c_contiguous:
        return False
    reach = array.itemsize
    axes = zip(array.strides, array.shape, strict=True)
    for stride, size in sorted((abs(s), n) for s, n in axes if n > 1):
        if stride < reach:
            return True
        reach += stride * (size - 1)
    return False


def channels_second(array: np.ndarray, channel_axis: int, name: str) -> np.ndarray:
    """The view with the channel axis moved to position 1."""
    axis = channel_axis + array.ndim if channel_axis < 0 else channel_axis
    if not 1 <= axis < array.ndim:
        raise ValueError(
            f"channel_axis: {channel_axis} is no axis of {name} after the batch axis, whose shape "
            f"is {array.shape}"
        )
    return array if axis == 1 else np.moveaxis(array, axis, 1)


def _with_channel(
    batch: int, channels: int, spatial: tuple[int, ...], channel_axis: int
) -> tuple[int, ...]:
    shape = [batch, *spatial]
    position = channel_axis if channel_axis >= 0 else len(shape) + 1 + channel_axis
    shape.insert(position, channels)
    return tuple(shape)
