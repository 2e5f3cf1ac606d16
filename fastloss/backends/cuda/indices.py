"""Class indices and masks on a GPU, of labels and dense targets of any number type and strides."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from fastloss.backends.cuda.axes import merge_axes
from fastloss.backends.cuda.backend import CudaBackend
from fastloss.backends.cuda.call import TYPES
from fastloss.backends.cuda.device import Device
from fastloss.backends.cuda.source import source
from fastloss.borrowed import Borrowed

AXES = 18
# Mirrors `struct IndexCall` in csrc/cuda/class_indices.cu.
INDEX_CALL = np.dtype(
    [
        ("from", np.int64),
        ("to", np.int64),
        ("count", np.int64),
        ("shape", np.int64, AXES),
        ("from_stride", np.int64, AXES),
        ("to_stride", np.int64, AXES),
        ("from_channel", np.int64),
        ("to_channel", np.int64),
        ("ignored", np.float64),
        ("axes", np.int32),
        ("type", np.int32),
        ("aligned", np.int32),
        ("classes", np.int32),
        ("ignores", np.int32),
        ("wide", np.int32),
    ],
    align=True,
)
_RECORD = np.dtype(("V", INDEX_CALL.itemsize))
KERNELS = ("fastloss_class_indices", "fastloss_dense_masks")
THREADS, BLOCKS = 256, 4096
_NUMBER, _CLASS = 1, 2  # of `enum Ignore`


class Indices(NamedTuple):
    """Class indices or a mask, in C order.

    Attributes:
        item: bytes of each.
        any: whether all but 0 are inside; else, those of a map's class.
        owner: what keeps the memory alive until the launches are queued.
    """

    address: int
    item: int
    any: bool
    owner: Any


def readable(device: Device, array: Borrowed, name: str, classes: int) -> Indices:
    """The array itself where a kernel can read it as it is, else a copy.

    Args:
        name: the argument, for errors.
        classes: C; 0 of a mask.
    """
    view, any_inside = array.array, not classes
    kept = ("bool", "uint8", "uint16") if classes else ("bool", "uint8", "int8", "uint16", "int16")
    address = address_of(view)
    if array.dtype in kept and view.flags.c_contiguous and not address % view.itemsize:
        return Indices(address, view.itemsize, any_inside, view)
    item = 1 + (classes > 255)
    memory = device.empty(view.size * item)
    _write_indices(device, array, name, classes, item, memory.address)
    return Indices(memory.address, item, any_inside, memory)


def class_indices(labels: Borrowed, classes: int, ignore: int | None) -> Any:
    """Class indices of a label map, a new array of uint8 or uint16 in its shape.

    C stands for a label outside [0, C), with a fraction, or equal to ``ignore``.
    """
    place = labels.place
    assert place is not None
    wide = classes > 255
    made = place.empty(labels.array.shape, "uint16" if wide else "uint8")
    device, to = CudaBackend(place).device, place.address(made)
    _write_indices(device, labels, "target", classes, 1 + wide, to, ignore)
    return made


def dense_masks(target: Borrowed, ignore: int | None) -> Any:
    """Where a dense target, (B, C, *spatial), is above ½: a new array of uint8 in its shape.

    Nowhere where a voxel is ignored: where its class ``ignore`` is above ½, or where there is none
    of that number or no other, where any of its numbers is ``ignore``.
    """
    view, place = target.array, target.place
    assert place is not None
    made = place.empty(view.shape, "uint8")
    batch, classes, *spatial = view.shape
    if view.size:
        strides = _contiguous(view.shape, 1)
        from_steps, to_steps = ([s[0], *s[2:]] for s in (view.strides, strides))
        call = _call(target, "target", (batch, *spatial), from_steps, to_steps)
        call["from"] += address_of(view)
        call["to"] += place.address(made)
        call["from_channel"], call["to_channel"] = view.strides[1], strides[1]
        call["classes"] = classes
        if ignore is not None:
            call["ignored"] = ignore
            call["ignores"] = _CLASS if classes > 1 and 0 <= ignore < classes else _NUMBER
        _launch(CudaBackend(place).device, 1, call)
    return made


def _write_indices(
    device: Device,
    array: Borrowed,
    name: str,
    classes: int,
    item: int,
    to: int,
    ignore: int | None = None,
) -> None:
    view = array.array
    if not view.size:
        return
    call = _call(array, name, view.shape, view.strides, _contiguous(view.shape, item))
    call["from"] += address_of(view)
    call["to"] += to
    call["classes"], call["wide"] = classes, item == 2
    if ignore is not None:
        call["ignored"], call["ignores"] = ignore, _NUMBER
    _launch(device, 0, call)


def _call(
    array: Borrowed,
    name: str,
    shape: Sequence[int],
    from_strides: Sequence[int],
    to_strides: Sequence[int],
) -> np.ndarray:
    """The record of a launch, with offsets in place of addresses."""
    offsets, axes = merged(name, shape, [from_strides, to_strides])
    call = np.zeros(1, INDEX_CALL)
    call["from"], call["to"] = offsets
    call["count"], call["axes"] = prod(shape), len(axes)
    call["shape"][0, : len(axes)] = [n for n, _ in axes]
    call["from_stride"][0, : len(axes)] = [by[0] for _, by in axes]
    call["to_stride"][0, : len(axes)] = [by[1] for _, by in axes]
    call["type"], call["aligned"] = type_of(array), is_aligned(array.array)
    return call


def _launch(device: Device, which: int, call: np.ndarray) -> None:
    kernel = device.kernels(source("class_indices.cu"), KERNELS)[which]
    device.launch(kernel, blocks_for(call), (THREADS, 1), 0, call.view(_RECORD))


# ------------------------------------------------------------------ arrays of any strides


def merged(
    name: str, shape: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[list[int], list[tuple[int, list[int]]]]:
    """As `merge_axes`; ValueError where more axes are left than a kernel takes."""
    offsets, axes = merge_axes(shape, strides)
    if len(axes) > AXES:
        raise ValueError(
            f"{name}: at most {AXES} axes without an even step between them can be read, "
            f"got {len(axes)}; pass a contiguous copy"
        )
    return offsets, axes


def type_of(array: Borrowed) -> int:
    """The code of its number type."""
    return TYPES.index("uint8" if array.dtype == "bool" else array.dtype)


def is_aligned(view: np.ndarray) -> bool:
    """Whether all numbers lie at multiples of their size."""
    steps = [s for s, n in zip(view.strides, view.shape, strict=True) if n > 1]
    return not any(step % view.itemsize for step in (address_of(view), *steps))


def blocks_for(call: np.ndarray) -> int:
    """The blocks of a launch with a thread for each of ``count``, or for several."""
    return min(BLOCKS, -(-int(call["count"][0]) // THREADS))


def address_of(view: np.ndarray) -> int:
    """Where the first number lies."""
    address: int = view.__array_interface__["data"][0]
    return address


def _contiguous(shape: Sequence[int], item: int) -> list[int]:
    """The strides of an array in C order."""
    return [item * prod(shape[axis + 1 :]) for axis in range(len(shape))]
