"""A call's arrays, cut into blocks of voxels: kernels see one contiguous row of a block per class.

An array of suitable layout and dtype is used in place. Any other array is copied by NumPy, one
block at a time.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np


class Block(NamedTuple):
    """Consecutive voxels: their slices along the axes, the first voxel, and their number."""

    place: tuple[int | slice, ...]
    first: int
    size: int


@lru_cache(maxsize=256)
def blocks_of(shape: tuple[int, ...], most: int) -> tuple[Block, ...]:
    """The blocks of a sample, of about ``most`` voxels and no more, in order."""
    axis, inner = len(shape), 1
    while axis and inner * shape[axis - 1] <= most:
        axis -= 1
        inner *= shape[axis]
    if axis == 0:
        return (Block((), 0, inner),) if inner else ()
    # The preceding axis is cut into even parts, and those before it into single steps.
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


class Order(NamedTuple):
    """The spatial axes in the memory order of the logits, slowest first."""

    axes: tuple[int, ...]
    backwards: tuple[int, ...]

    @staticmethod
    def of(logits: np.ndarray) -> Order:
        axes = range(2, logits.ndim)
        steps = {i: logits.strides[i] if logits.shape[i] > 1 else 0 for i in axes}
        return Order(
            tuple(sorted(axes, key=lambda i: -abs(steps[i]))),
            tuple(i for i in axes if steps[i] < 0),
        )

    def arrange(self, array: np.ndarray) -> np.ndarray:
        """The view (B, K, *spatial) with its spatial axes in this order and positive strides."""
        view: np.ndarray = np.flip(array, self.backwards).transpose(0, 1, *self.axes)
        return view


class Operand:
    """An array (B, K, *spatial) that kernels read or write as rows of this dtype."""

    def __init__(self, array: np.ndarray, dtype_name: str, dtype: np.dtype, order: Order) -> None:
        self.array = order.arrange(array)
        self.bfloat16 = dtype_name == "bfloat16"
        self.dtype = np.dtype(dtype)
        of_one = all(sample.flags.c_contiguous for sample in self.array[:1])
        self.direct = of_one and self.array.flags.aligned and array.dtype == self.dtype

    def part(self, sample: int, block: Block) -> np.ndarray:
        """The view of a block, (K, *axes)."""
        place: tuple[int | slice, ...] = (sample, slice(None), *block.place)
        return self.array[place]

    def rows(self, sample: int) -> np.ndarray:
        """The rows of a sample, (K, voxels), of an operand that is used in place."""
        array: np.ndarray = self.array[sample]
        return array.reshape(len(array), prod(array.shape[1:]))


class Window:
    """One block of an operand at a time, for one thread: (K, N) rows, and the block's offset."""

    def __init__(self, operand: Operand) -> None:
        self.operand = operand
        self.memory = np.empty(0, operand.dtype)

    def read(self, sample: int, block: Block) -> tuple[np.ndarray, int]:
        """The rows that hold the block, read-only."""
        rows, first = self.rows(sample, block)
        if not self.operand.direct:
            source = self.operand.part(sample, block)
            copy = rows.reshape(source.shape)
            if self.operand.bfloat16:
                copy[...] = (source.astype(np.uint32) << 16).view(np.float32)
            else:
                copy[...] = source
        rows.flags.writeable = False  # or Numba would compile for both kinds
        return rows, first

    def rows(self, sample: int, block: Block) -> tuple[np.ndarray, int]:
        """The rows that a kernel writes the block to, before `store`."""
        operand = self.operand
        if operand.direct:
            return operand.rows(sample), block.first
        size = operand.array.shape[1] * block.size
        if len(self.memory) < size:
            self.memory = np.empty(size, operand.dtype)
        return self.memory[:size].reshape(-1, block.size), 0

    def store(self, sample: int, block: Block) -> None:
        """Copy the written rows to the block."""
        if not self.operand.direct:
            target = self.operand.part(sample, block)
            rows = self.memory[: target.size].reshape(target.shape)
            target[...] = _as_bfloat16(rows) if self.operand.bfloat16 else rows


def _as_bfloat16(array: np.ndarray) -> np.ndarray:
    """Rounded to nearest even; the array is overwritten."""
    undefined = np.isnan(array)
    bits = array.view(np.uint32)
    bits += (bits >> 16 & 1) + 0x7FFF
    bits >>= 16
    bits[undefined] = 0x7FC0
    return bits
