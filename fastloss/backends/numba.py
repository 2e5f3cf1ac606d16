"""The two passes in Numba: compiled on first use, for machines without the C++ kernels.

The logits go through in tiles of some hundred voxels that stay in the cache. Tiles make up
blocks, the same for any number of threads; each block has its own sums, in float64, and these are
added in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numba.core import config as _untyped_config
from numba.np.ufunc import parallel

from fastloss.arrays import Arrays
from fastloss.backends import (
    _numba_channels,
    _numba_softmax_dense,
    _numba_softmax_labels,
    _numba_tile,
    _numba_two_classes,
)
from fastloss.backends._axes import merge_axes
from fastloss.backends._numba_rows import loader, settle, storer
from fastloss.backends._numba_threads import Pool
from fastloss.backends._numba_tile import WIDTH
from fastloss.backends.base import Backend, bad_labels, bad_weights
from fastloss.backends.reference import check_dense
from fastloss.request import Request
from fastloss.voxel_losses import VoxelLosses

_config: Any = _untyped_config  # its attributes are made at run time

_STREAMED = 1 << 20  # bytes of a gradient that is written past the caches
_TILE_BYTES = 1 << 18  # of the logits of a tile: they stay in the second-level cache
_BLOCK_VOXELS = 4096
_BLOCK_LOGITS = 1 << 18
_BLOCKS = 1024  # at most, of a sample: the sums of the blocks take little memory beside the logits
_OF_TWO = frozenset(("region", "cross_entropy"))  # all that the kernels of two classes compute
_LINE = 64  # bytes of a cache line
_FEW_LOGITS = 1 << 17  # with no more a second thread takes longer to wake than to help


class NumbaBackend(Backend):
    """Compiled kernels that share their blocks among threads."""

    name = "numba"

    def __init__(self) -> None:
        self._pool = Pool()
        self._threads: int | None = None

    def set_num_threads(self, n: int) -> None:
        """Compute with ``n`` threads, at least 1 and at most ``NUMBA_NUM_THREADS``."""
        self._threads = max(1, min(int(n), _config.NUMBA_NUM_THREADS))

    def get_num_threads(self) -> int:
        """How many threads compute: if not set here, as `numba.get_num_threads` says."""
        if self._threads is not None:
            return self._threads
        # Asking would start Numba's own threads; not yet started, they were not limited either.
        if getattr(parallel, "_is_initialized", True):
            return int(parallel.get_num_threads())
        return int(_config.NUMBA_NUM_THREADS)

    def reduce(
        self,
        request: Request,
        arrays: Arrays,
        sums: np.ndarray,
        voxels: np.ndarray,
        losses: VoxelLosses | None = None,
    ) -> None:
        if arrays.dense:
            check_dense(request, arrays)
        call = _Call(request, arrays, None, losses)
        batch, channels = arrays.logits.shape[:2]
        slots = len(request.slots)
        # What one thread writes and another does shares no cache line.
        apart = -(-_LINE // (8 * channels))
        partial = np.zeros((batch * call.blocks, slots + apart, channels))
        counts = np.zeros((batch * call.blocks, _numba_tile.COUNTS + _LINE // 8))
        self._run(call, call.kernels.reduce, partial, counts)

        counts = counts.reshape(batch, call.blocks, counts.shape[1])
        bad = counts.sum(axis=(0, 1))
        if bad[_numba_tile.BAD_LABELS]:
            raise bad_labels(
                int(bad[_numba_tile.BAD_LABELS]),
                _first_bad_label(request, arrays),
                request,
                channels,
            )
        if bad[_numba_tile.BAD_WEIGHTS]:
            raise bad_weights(int(bad[_numba_tile.BAD_WEIGHTS]), _first_bad_weight(arrays))
        partial = partial.reshape(batch, call.blocks, slots + apart, channels)
        sums[...] = partial[:, :, :slots].sum(axis=1).transpose(1, 0, 2)
        voxels[:] = counts[:, :, _numba_tile.WEIGHT_SUM].sum(axis=1)
        if bad[_numba_tile.UNDEFINED]:
            # A voxel with NaN has no probabilities; they enter all sums of all its classes.
            undefined = counts[:, :, _numba_tile.UNDEFINED].any(axis=1)
            for slot, total in zip(request.slots, sums, strict=True):
                if not slot.startswith("reference"):
                    total[undefined] = np.nan

    def apply(
        self,
        request: Request,
        arrays: Arrays,
        coefficients: np.ndarray,
        out: np.ndarray,
        losses: VoxelLosses | None = None,
    ) -> None:
        call = _Call(request, arrays, out, losses)
        self._run(call, call.kernels.apply, np.ascontiguousarray(coefficients, arrays.value_dtype))

    def _run(self, call: _Call, kernel: Any, *results: np.ndarray) -> None:
        blocks = int(call.plan[_numba_tile.BATCH] * call.blocks)
        if not blocks:
            return
        turn = np.zeros(1, np.intp)

        def compute() -> None:
            kernel(turn, *call.inputs, *call.scratch(), *results, *call.options)
            if call.stream:
                settle()

        few = call.arrays.logits.size <= _FEW_LOGITS
        self._pool.run(compute, 1 if few else min(blocks, self.get_num_threads()))


class _Call:
    """What a kernel takes, and the arrays whose addresses are in it."""

    def __init__(
        self,
        request: Request,
        arrays: Arrays,
        out: np.ndarray | None,
        losses: VoxelLosses | None,
    ) -> None:
        x, w = arrays.logits, arrays.voxel_weight
        self.arrays, self.out = arrays, out
        self.dtype = arrays.value_dtype
        self.plan, strides = _layout(
            x.shape,
            x.strides,
            arrays.target.strides,
            None if w is None else w.strides,
            None if out is None else out.strides,
            arrays.dense,
            request.ignore_index,
            self.dtype.itemsize,
        )
        self.blocks = int(self.plan[_numba_tile.BLOCKS])
        # In place the lines are in the caches already, and a small gradient is better left there.
        self.stream = out is not None and out.nbytes >= _STREAMED and _address(out) != _address(x)
        if request.activation != "softmax":
            self.kernels: Any = _numba_channels
            self.options: tuple[Any, ...] = (arrays.dense, request.activation == "sigmoid")
        else:
            if arrays.dense:
                self.kernels = _numba_softmax_dense
            elif x.shape[1] == 2 and request.needs <= _OF_TWO:
                self.kernels = _numba_two_classes
            else:
                self.kernels = _numba_softmax_labels
            self.options = ()
            if self.kernels is _numba_softmax_labels:
                nothing = np.empty(0, self.dtype)
                self.options = (
                    nothing if losses is None else losses.values.reshape(-1),
                    nothing if losses is None else losses.class_weight.astype(self.dtype),
                )

        operands = strides.copy()
        computed = self.dtype.name
        first = _numba_tile.ADDRESS
        operands[_numba_tile.LOGITS, first] += _address(x)
        operands[_numba_tile.LOGITS, _numba_tile.ROW] = loader(arrays.logits_dtype, computed)
        for array, direct, size in (
            (_numba_tile.LOGITS, arrays.logits_dtype == computed, self.dtype.itemsize),
            (_numba_tile.TARGET, arrays.target_dtype in ("uint8", "bool"), 1),
            (_numba_tile.OUT, self.stream and arrays.logits_dtype == computed, self.dtype.itemsize),
        ):
            steps = operands[array, _numba_tile.STRIDES :]
            contiguous = len(steps) == 1 and steps[0] == size
            operands[array, _numba_tile.DIRECT] = direct and contiguous
        operands[_numba_tile.TARGET, first] += _address(arrays.target)
        if arrays.dense:
            operands[_numba_tile.TARGET, _numba_tile.ROW] = loader(arrays.target_dtype, computed)
        elif _fits_int32(arrays.target_dtype, request.ignore_index):
            operands[_numba_tile.TARGET, _numba_tile.ROW] = loader(arrays.target_dtype, "int32")
        if not arrays.dense or request.ignore_index is not None:
            operands[_numba_tile.TARGET, _numba_tile.ROW64] = loader(arrays.target_dtype, "float64")
        if w is not None:
            operands[_numba_tile.WEIGHT, first] += _address(w)
            operands[_numba_tile.WEIGHT, _numba_tile.ROW64] = loader(arrays.weight_dtype, "float64")
        if out is not None:
            operands[_numba_tile.OUT, first] += _address(out)
            operands[_numba_tile.OUT, _numba_tile.ROW] = storer(arrays.logits_dtype, self.stream)
        self.inputs = (self.plan, operands, *_numbers(request))

    def scratch(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Memory for one thread, which kernels share out: what they made themselves would be freed
        as soon as nothing but its address is used.
        """
        copies = {_numba_softmax_labels: 1, _numba_softmax_dense: 3}.get(self.kernels, 0)
        channels = int(self.plan[_numba_tile.CHANNELS])
        elements = self.kernels.ROWS * WIDTH + copies * channels * int(self.plan[_numba_tile.TILE])
        return (
            _aligned(elements + 3 * channels, self.dtype),
            np.empty(WIDTH + channels, np.int32),
            np.empty(2 * WIDTH + max(channels, _numba_tile.COUNTS), np.float64),
        )


def _fits_int32(dtype: str, ignore: int | None) -> bool:
    """Whether int32 holds all labels of a map of this dtype, and the one that is ignored."""
    if dtype not in ("bool", "uint8", "int8", "uint16", "int16", "int32"):
        return False
    return ignore is None or -(1 << 31) <= ignore < 1 << 31


def _address(array: np.ndarray) -> int:
    return array.ctypes.data


def _aligned(elements: int, dtype: np.dtype) -> np.ndarray:
    """An array that begins with a cache line, as vectors that lie across two are slower."""
    array = np.empty(elements + 64 // dtype.itemsize, dtype)
    first = (-array.ctypes.data % 64) // dtype.itemsize
    return array[first : first + elements]


@lru_cache(maxsize=256)
def _numbers(request: Request) -> tuple[np.ndarray, np.ndarray]:
    """The ignored label and the gammas; and the indices of the slots."""
    ignore = np.nan if request.ignore_index is None else float(request.ignore_index)
    names = [
        "reference",
        "overlap",
        "predicted",
        "predicted_squared",
        "reference_squared",
        "cross_entropy",
        "cross_entropy_rest",
        "uniform",
        "top_k",
    ]
    for gamma in request.gammas:
        names += [f"focal:{gamma!r}", f"focal_rest:{gamma!r}"]
    slots = [request.index.get(name, -1) for name in names]
    return np.array([ignore, *request.gammas]), np.array(slots, np.int64)


Strides = tuple[int, ...]


@lru_cache(maxsize=256)
def _layout(
    shape: tuple[int, ...],
    logits: Strides,
    target: Strides,
    weight: Strides | None,
    out: Strides | None,
    dense: bool,
    ignore: int | None,
    itemsize: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The plan of a kernel, and its operands without their addresses."""
    batch, channels, *spatial = shape
    nothing = (0,) * len(spatial)
    operands = [
        (logits[0], logits[1], logits[2:]),
        (target[0], target[1], target[2:]) if dense else (target[0], 0, target[1:]),
        (weight[0], 0, weight[1:]) if weight else (0, 0, nothing),
        (out[0], out[1], out[2:]) if out else (0, 0, nothing),
    ]
    offsets, merged = merge_axes(spatial, [steps for _, _, steps in operands])

    voxels = 1
    for n in spatial:
        voxels *= n
    width = WIDTH
    while width > 16 and width * channels * itemsize > _TILE_BYTES:
        width //= 2
    block = max(width, min(_BLOCK_VOXELS, _BLOCK_LOGITS // channels // width * width))
    block = max(block, -(-voxels // _BLOCKS // width) * width)
    kind = 0
    if ignore is not None:
        kind = 2 if dense and channels > 1 and 0 <= ignore < channels else 1
    plan = np.array(
        [
            channels,
            voxels,
            width,
            block,
            -(-voxels // block),
            batch,
            kind,
            len(merged),
            *(n for n, _ in merged),
        ],
        np.int64,
    )
    table = np.zeros((4, _numba_tile.STRIDES + len(merged)), np.int64)
    for i, (by_sample, by_channel, _) in enumerate(operands):
        table[i, _numba_tile.ADDRESS] = offsets[i]
        table[i, _numba_tile.BY_SAMPLE] = by_sample
        table[i, _numba_tile.BY_CHANNEL] = by_channel
        table[i, _numba_tile.STRIDES :] = [steps[i] for _, steps in merged]
    return plan, table


def _first_bad_label(request: Request, arrays: Arrays) -> Any:
    for labels in _pieces(arrays.target, arrays.target_dtype):
        good = (labels >= 0) & (labels < arrays.logits.shape[1]) & (labels == np.floor(labels))
        if request.ignore_index is not None:
            good |= labels == request.ignore_index
        if not good.all():
            return labels[~good][0]
    raise AssertionError("the kernel found a bad label")


def _first_bad_weight(arrays: Arrays) -> Any:
    assert arrays.voxel_weight is not None
    for weight in _pieces(arrays.voxel_weight, arrays.weight_dtype):
        good = (weight >= 0) & (weight < np.inf)
        if not good.all():
            return weight[~good][0]
    raise AssertionError("the kernel found a bad weight")


def _pieces(array: np.ndarray, dtype: str) -> Iterator[np.ndarray]:
    """The array in float64, piece by piece in C order."""
    for sample in array:
        for piece in sample.reshape(1) if sample.ndim == 0 else sample:
            if dtype == "bfloat16":
                yield (np.asarray(piece, np.uint32) << 16).view(np.float32).astype(np.float64)
            else:
                yield np.asarray(piece, np.float64)


BACKEND = NumbaBackend()
