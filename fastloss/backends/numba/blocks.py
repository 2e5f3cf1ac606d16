"""A call's arrays, cut to blocks of voxels: kernels see one contiguous row of a block per class.

An array that lies in memory as a kernel wants it is used where it is. Of any other NumPy copies
one block at a time, whatever its dtype and strides.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np

_LOGITS = 1 << 17  # of a block: with what kernels keep of it, it stays in the second-level cache
_LEAST, _MOST = 1 << 10, 1 << 16  # voxels of a block, if there are so many


class Block(NamedTuple):
    """Voxels that follow each other: where they are along the axes, the first, and how many."""

    index: tuple[int | slice, ...]
    first: int
    size: int


@lru_cache(maxsize=256)
def blocks_of(shape: tuple[int, ...], classes: int) -> tuple[Block, ...]:
    """The blocks of a sample, in order; they depend on nothing but these numbers."""
    most = max(_LEAST, min(_MOST, _LOGITS // classes))
    axis, inner = len(shape), 1
    while axis and inner * shape[axis - 1] <= most:
        axis -= 1
        inner *= shape[axis]
    if axis == 0:
        return (Block((), 0, inner),) if inner else ()
    # The axis before is cut to even parts, and those before it to single steps.
    *outer, length = shape[:axis]
    parts = -(-length // max(1, most // inner))
    blocks, first = [], 0
    for index in np.ndindex(*outer):
        for part in range(parts):
            start, stop = length * part // parts, length * (part + 1) // parts
            size = (stop - start) * inner
            blocks.append(Block((*index, slice(start, stop)), first, size))
            first += size
    return tuple(blocks)


class Axes(NamedTuple):
    """The spatial axes in the order in which logits lie in memory, slowest first."""

    order: tuple[int, ...]
    backwards: tuple[int, ...]

    @staticmethod
    def of(logits: np.ndarray) -> Axes:
        steps = [s if n > 1 else 0 for n, s in zip(logits.shape, logits.strides, strict=True)][2:]
        axes = range(len(steps))
        return Axes(
            tuple(sorted(axes, key=lambda i: -abs(steps[i]) if steps[i] else -np.inf)),
            tuple(i for i in axes if steps[i] < 0),
        )

    def arrange(self, array: np.ndarray) -> np.ndarray:
        """The view (B, K, *spatial) with its spatial axes in this order."""
        if self.backwards:
            index: list[slice] = [slice(None)] * array.ndim
            for i in self.backwards:
                index[2 + i] = slice(None, None, -1)
            array = array[tuple(index)]
        return array.transpose(0, 1, *(2 + i for i in self.order))


class Operand:
    """An array (B, K, *spatial) that kernels read, or write, as rows of this dtype."""

    def __init__(self, array: np.ndarray, dtype_name: str, dtype: np.dtype, axes: Axes) -> None:
        self.array = axes.arrange(array)
        self.bfloat16 = dtype_name == "bfloat16"
        self.dtype = np.dtype(dtype)
        sample = self.array[0] if len(self.array) else self.array
        self.direct = (
            sample.flags.aligned and sample.flags.c_contiguous and sample.dtype == self.dtype
        )

    def rows(self, sample: int) -> np.ndarray:
        """Of a direct operand the rows of a sample, (K, voxels)."""
        array = self.array[sample]
        return array.reshape(len(array), prod(array.shape[1:]))


class Reader:
    """Loads blocks of an operand, for one thread."""

    def __init__(self, operand: Operand) -> None:
        self.operand = operand
        self.memory = np.empty(0, operand.dtype)

    def load(self, sample: int, block: Block) -> tuple[np.ndarray, int]:
        """The rows (K, N) that hold the block, and where it begins."""
        if self.operand.direct:
            rows = self.operand.rows(sample)
            rows.flags.writeable = False  # or Numba would compile for either
            return rows, block.first
        source = self.operand.array[(sample, slice(None), *block.index)]
        if self.memory.size < source.size:
            self.memory = np.empty(source.size, self.operand.dtype)
        rows = self.memory[: source.size].reshape(source.shape)
        if self.operand.bfloat16:
            wide = rows if rows.dtype == np.float32 else np.empty(rows.shape, np.float32)
            bits = wide.view(np.uint32)
            bits[...] = source
            bits <<= 16
            rows[...] = wide
        else:
            rows[...] = source
        rows = rows.reshape(len(source), block.size)
        rows.flags.writeable = False
        return rows, 0


class Writer:
    """Takes what a kernel writes to a block of an operand, for one thread."""

    def __init__(self, operand: Operand) -> None:
        self.operand = operand
        self.memory = np.empty(0, operand.dtype)

    def rows(self, sample: int, block: Block) -> tuple[np.ndarray, int]:
        """The rows (K, N) that take the block, and where it begins."""
        if self.operand.direct:
            return self.operand.rows(sample), block.first
        classes = self.operand.array.shape[1]
        if self.memory.size < classes * block.size:
            self.memory = np.empty(classes * block.size, self.operand.dtype)
        return self.memory[: classes * block.size].reshape(classes, block.size), 0

    def store(self, sample: int, block: Block) -> None:
        """Bring the block to where it belongs."""
        if self.operand.direct:
            return
        target = self.operand.array[(sample, slice(None), *block.index)]
        rows = self.memory[: target.size].reshape(target.shape)
        target[...] = _as_bfloat16(rows) if self.operand.bfloat16 else rows


def _as_bfloat16(array: np.ndarray) -> np.ndarray:
    bits = array.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to the nearest, ties to even
    return np.where(np.isnan(array), 0x7FC0, rounded)
