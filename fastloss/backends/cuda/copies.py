"""Aligned copies of misaligned arrays, such as fields of packed records.

A GPU accesses numbers only at multiples of their size. A launch gets aligned copies, and an output
is copied back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import numpy as np

from fastloss.backends.cuda.axes import merge_axes
from fastloss.backends.cuda.call import MAX_AXES, OUT, SIZES, Copy, Operand, Operands
from fastloss.backends.cuda.device import Device
from fastloss.backends.cuda.source import source

_MOST_AXES = 2 + MAX_AXES
# Mirrors `struct CopyCall` in csrc/cuda/copy.cu.
COPY_CALL = np.dtype(
    [
        ("array", np.int64),
        ("copy", np.int64),
        ("count", np.int64),
        ("shape", np.int64, _MOST_AXES),
        ("array_stride", np.int64, _MOST_AXES),
        ("copy_stride", np.int64, _MOST_AXES),
        ("axes", np.int32),
        ("item", np.int32),
        ("back", np.int32),
    ],
    align=True,
)
_RECORD = np.dtype(("V", COPY_CALL.itemsize))
KERNELS = ("fastloss_copy",)
_THREADS, _BLOCKS = 256, 4096
# In the order of the addresses of a call, the fields last.
_NAMES = ("logits", "target", "voxel_weight", "out", "regions", "fields")


def align(operands: Operands) -> tuple[Operands, tuple[Copy, ...]]:
    """The arrays as operands of a kernel, and the copies of the misaligned ones.

    Raises:
        ValueError: such an array has too many axes without an even step.
    """
    copies: list[Copy] = []

    def aligned(place: int, o: Operand) -> Operand:
        item = SIZES[o.type]
        steps = [s for s, n in zip(o.strides, operands.shape, strict=True) if n > 1]
        if o.alignment() >= item and not any(s % item for s in steps):
            return o
        copy, o = _copy(place, o, operands.shape)
        copies.append(copy)
        return o

    seen = operands._replace(
        logits=aligned(0, operands.logits),
        target=aligned(1, operands.target),
        weight=operands.weight and aligned(2, operands.weight),
        out=operands.out and aligned(OUT, operands.out),
        regions=operands.regions and aligned(4, operands.regions),
        fields=tuple((kind, aligned(5 + i, o)) for i, (kind, o) in enumerate(operands.fields)),
    )
    return seen, tuple(copies)


def _copy(place: int, o: Operand, shape: tuple[int, ...]) -> tuple[Copy, Operand]:
    """The copy of an array, contiguous in the order of its axes in memory, and its operand."""
    lengths = [n if s else 1 for s, n in zip(o.strides, shape, strict=True)]  # broadcast: one
    strides, step = [0] * len(shape), SIZES[o.type]
    for axis in sorted(range(len(shape)), key=lambda axis: abs(o.strides[axis])):
        if lengths[axis] > 1:
            strides[axis] = step
        step *= lengths[axis]
    name = _NAMES[min(place, len(_NAMES) - 1)]
    call, offsets = _call(name, lengths, o.strides, strides, SIZES[o.type], place == OUT)
    copy = Copy(place, step, offsets, call.tobytes(), _grid(call))
    return copy, Operand(o.type, tuple(strides), 0)


def _call(
    name: str,
    lengths: Sequence[int],
    array_strides: Sequence[int],
    copy_strides: Sequence[int],
    item: int,
    back: bool,
) -> tuple[np.ndarray, tuple[int, int]]:
    """The record of a copy, without addresses, and the offsets of the first number in both."""
    offsets, axes = merge_axes(lengths, [array_strides, copy_strides])
    if len(axes) > _MOST_AXES:
        raise ValueError(
            f"{name}: at most {_MOST_AXES} axes without an even step between them can be copied "
            f"to where a GPU reads them, got {len(axes)}; pass a contiguous copy"
        )
    call = np.zeros(1, COPY_CALL)
    call["count"], call["axes"], call["item"] = prod(lengths), len(axes), item
    call["back"] = back
    call["shape"][0, : len(axes)] = [n for n, _ in axes]
    call["array_stride"][0, : len(axes)] = [steps[0] for _, steps in axes]
    call["copy_stride"][0, : len(axes)] = [steps[1] for _, steps in axes]
    return call, (offsets[0], offsets[1])


def _grid(call: np.ndarray) -> int:
    return max(1, min(_BLOCKS, -(-int(call["count"][0]) // _THREADS)))


@contextmanager
def aligned(
    device: Device, copies: tuple[Copy, ...], addresses: tuple[int, ...]
) -> Iterator[tuple[int, ...]]:
    """A context with the addresses for a launch, where copies replace misaligned arrays."""
    memory = {copy.place: device.empty(copy.nbytes) for copy in copies}
    for copy in copies:
        if copy.place != OUT:
            _launch(device, copy, addresses[copy.place], memory[copy.place].address)
    yield tuple(memory[i].address if i in memory else a for i, a in enumerate(addresses))
    if OUT in memory:
        out = next(copy for copy in copies if copy.place == OUT)
        _launch(device, out, addresses[OUT], memory[OUT].address)


def _launch(device: Device, copy: Copy, array: int, scratch: int) -> None:
    call = np.frombuffer(bytearray(copy.record), COPY_CALL)
    call["array"], call["copy"] = array + copy.offsets[0], scratch + copy.offsets[1]
    (kernel,) = device.kernels(source("copy.cu"), KERNELS)
    device.launch(kernel, copy.grid, (_THREADS, 1), 0, call.view(_RECORD))


def copy_back(device: Device, address: int, out: np.ndarray) -> None:
    """Write numbers that lie in C order at an address to an output in any strides and alignment.

    Raises:
        ValueError: the output has too many axes without an even step.
    """
    strides = [out.itemsize * prod(out.shape[axis + 1 :]) for axis in range(out.ndim)]
    call, offsets = _call("out", out.shape, out.strides, strides, out.itemsize, True)
    to: int = out.__array_interface__["data"][0]
    _launch(device, Copy(OUT, out.nbytes, offsets, call.tobytes(), _grid(call)), to, address)
