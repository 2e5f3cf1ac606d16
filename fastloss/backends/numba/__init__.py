"""The passes in Numba: compiled on first use, for machines without the C++ kernels.

The voxels of a sample are cut to blocks, the same for any number of threads. Each has its own
sums, in float64, and these are added in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numba.core import config as _untyped_config
from numba.np.ufunc import parallel

from fastloss.arrays import INTEGERS, Arrays
from fastloss.backends.base import Backend
from fastloss.backends.numba import general, softmax_labels
from fastloss.backends.numba.blocks import Axes, Block, Operand, Reader, Writer, blocks_of
from fastloss.backends.numba.functions import BY, FUNCTIONS, WEIGHTS
from fastloss.backends.numba.pool import Pool
from fastloss.backends.reference import check_dense, check_targets
from fastloss.maps import Map
from fastloss.request import ACTIVATIONS, Request

_config: Any = _untyped_config  # its attributes are made at run time

_FEW_LOGITS = 1 << 17  # with no more a second thread takes longer to wake than to help
_MAP_KINDS = {"voxel": general.VOXEL, "class": general.CLASS, "error": general.ERROR}
_FIELD_KINDS = {
    "voxel": general.FIELD_OF_VOXEL,
    "class": general.FIELD_OF_CLASS,
    "labels": general.FIELD_OF_LABELS,
}
_NO_CODES = np.empty(0, np.int32)
_NO_WEIGHT = np.empty(0, np.float64)


class NumbaBackend(Backend):
    """Compiled kernels whose blocks threads share."""

    name = "numba"

    def __init__(self) -> None:
        self._pool = Pool()
        self._threads: int | None = None

    def set_num_threads(self, number: int) -> None:
        """Compute with this many threads, at least 1 and at most ``NUMBA_NUM_THREADS``."""
        self._threads = max(1, min(int(number), _config.NUMBA_NUM_THREADS))

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
        voxel_map: Map | None = None,
    ) -> None:
        call = _Call(request, arrays)
        if voxel_map is not None:
            call.take_map(voxel_map)
        found = self._run(call, _Worker.reduce, check=True)
        sums[...] = 0
        voxels[...] = 0
        rows = arrays.rows
        # The fast path computes more sums than are asked for, in an order of its own.
        own = [softmax_labels.SUMS.index(s) for s in request.sums] if call.fast else slice(None)
        for (b, _), (rows_of_block, of_block, weights) in zip(call.turns, found, strict=True):
            at = b * rows + rows_of_block
            sums[:, at] += of_block[own]
            voxels[at] += weights

    def apply(
        self, request: Request, arrays: Arrays, coefficients: np.ndarray, out: np.ndarray
    ) -> None:
        call = _Call(request, arrays)
        call.take_gradient(coefficients, out)
        self._run(call, _Worker.apply)

    def write_map(self, request: Request, arrays: Arrays, voxel_map: Map) -> None:
        call = _Call(request, arrays)
        call.take_map(voxel_map)
        work = _Worker.label if voxel_map.kind == "label" else _Worker.reduce
        self._run(call, work, check=True)

    def _run(
        self, call: _Call, work: Callable[[_Worker, int, Block], Any], check: bool = False
    ) -> list[Any]:
        """What the work returns for every block, in their order.

        Raises:
            ValueError: with ``check``, if there are bad labels or weights.
        """
        if check and call.arrays.dense:
            check_dense(call.request, call.arrays)
        results: list[Any] = [None] * len(call.turns)
        left = deque(enumerate(call.turns))
        bad = []

        def compute() -> None:
            worker = _Worker(call)
            with np.errstate(all="ignore"):
                while True:
                    try:
                        i, (b, block) = left.popleft()
                    except IndexError:
                        break
                    results[i] = work(worker, b, block)
            bad.append(worker.bad)

        few = call.arrays.logits.size <= _FEW_LOGITS
        self._pool.run(compute, 1 if few else min(len(call.turns), self.get_num_threads()))
        if check and sum(bad):
            check_targets(call.request, call.arrays)
            raise AssertionError("a kernel found labels or weights bad that are not")
        return results


class _Call:
    """The arrays of a call as operands of kernels, and the blocks they are cut to."""

    def __init__(self, request: Request, arrays: Arrays) -> None:
        self.request, self.arrays = request, arrays
        self.dtype = dtype = arrays.value_dtype
        batch, self.classes = arrays.logits.shape[:2]
        self.axes = axes = Axes.of(arrays.logits)
        self.logits = Operand(arrays.logits, arrays.logits_dtype, dtype, axes)
        blocks = blocks_of(self.logits.array.shape[2:], self.classes)
        self.turns = [(b, block) for b in range(batch) for block in blocks]
        # The fast path takes these sums and nothing else.
        self.fast = (
            request.activation == "softmax"
            and not arrays.dense
            and arrays.regions is None
            and set(request.sums) <= set(softmax_labels.SUMS)
        )
        self.activation = ACTIVATIONS.index(request.activation)

        self.target: Operand | None = None
        self.labels: Operand | None = None
        ignore = request.ignore_index
        if arrays.dense:
            self.target = Operand(arrays.target, arrays.target_dtype, dtype, axes)
        else:
            kind = arrays.target_dtype
            labels = arrays.target.view(np.uint8) if kind == "bool" else arrays.target
            known = kind in INTEGERS | {"float32", "float64"}  # by Numba
            wanted = labels.dtype.newbyteorder("=") if known else _FLOAT32
            self.labels = Operand(labels[:, None], kind, wanted, axes)
        self.ignored = ignore is not None
        self.ignore = 0 if ignore is None else ignore
        is_class = arrays.dense and self.ignored and self.classes > 1
        is_class = is_class and 0 <= self.ignore < self.classes
        self.dense_ignore = (float(self.ignore) if self.ignored else np.nan, is_class)

        self.weight: Operand | None = None
        if arrays.voxel_weight is not None:
            weight = arrays.voxel_weight[:, None]
            self.weight = Operand(weight, arrays.weight_dtype, _FLOAT64, axes)
        self.fields = [
            Operand(f.array if f.kind == "class" else f.array[:, None], f.dtype, dtype, axes)
            for f in arrays.fields
        ]
        self.field_kinds = np.array([_FIELD_KINDS[f.kind] for f in arrays.fields], np.int64)
        self.regions: Operand | None = None
        if arrays.regions is not None:
            self.regions = Operand(arrays.regions[:, None], arrays.regions_dtype, _INT64, axes)
        self.table, self.gammas = _table(request, dtype)
        self.map_kind = 0
        self.map: Operand | None = None
        self.out: Operand | None = None
        self.map_k = np.empty((len(self.table), 0), dtype)

    def take_map(self, voxel_map: Map) -> None:
        out = voxel_map.out
        batch, classes, *spatial = self.arrays.logits.shape
        rows = classes if voxel_map.kind in ("class", "error") else 1
        out = out.reshape(batch, rows, *spatial)
        dtype = _INT32 if voxel_map.kind == "label" else self.dtype
        self.map = Operand(out, out.dtype.name, dtype, self.axes)
        self.map_kind = _MAP_KINDS.get(voxel_map.kind, 0)
        if voxel_map.coefficients is not None and self.map_kind != general.ERROR:
            self.map_k = np.ascontiguousarray(voxel_map.coefficients, self.dtype)
        self.fast = False

    def take_gradient(self, coefficients: np.ndarray, out: np.ndarray) -> None:
        self.out = Operand(out, self.arrays.logits_dtype, self.dtype, self.axes)
        batch, rows = self.arrays.logits.shape[0], self.arrays.rows
        own = coefficients.reshape(len(self.table), batch, rows, self.classes)
        with np.errstate(all="ignore"):
            if self.fast:
                k = np.zeros((batch, len(softmax_labels.SUMS), rows, self.classes), self.dtype)
                for s, total in enumerate(self.request.sums):
                    k[:, softmax_labels.SUMS.index(total)] = own[s]
            else:
                k = np.ascontiguousarray(own.transpose(1, 0, 2, 3), self.dtype)
        self.coefficients = k


class _Worker:
    """What one thread needs to compute blocks: its readers and writers, and scratch memory."""

    def __init__(self, call: _Call) -> None:
        self.call = call
        self.bad = 0
        self.logits = Reader(call.logits)
        self.target = None if call.target is None else Reader(call.target)
        self.labels = None if call.labels is None else Reader(call.labels)
        self.weight = None if call.weight is None else Reader(call.weight)
        self.regions = None if call.regions is None else Reader(call.regions)
        self.fields = [Reader(field) for field in call.fields]
        self.map = None if call.map is None else Writer(call.map)
        self.out = None if call.out is None else Writer(call.out)
        self.codes = np.empty(0, np.int32)
        classes, dtype = call.classes, call.dtype
        if call.fast:
            kept, rows, width = 2, softmax_labels.ROWS, max(64, min(1536, (1 << 15) // classes))
        else:
            kept, rows, width = general.TILES, general.ROWS, max(64, min(512, (1 << 14) // classes))
        width = min(width, max((block.size for _, block in call.turns), default=1))
        tiles = np.empty((kept, classes, width), dtype)
        self.scratch = tiles, np.empty((rows, width), dtype), np.empty((1, width), np.int32)
        self.no_target = np.empty((0, 0), dtype)
        self.no_target.flags.writeable = False
        if call.regions is not None:
            self.numbers = np.full(call.arrays.rows, -1, np.int32)

    # ------------------------------------------------------------------ what is done with a block

    def reduce(self, b: int, block: Block) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows that the block has voxels of, their sums and their voxel weights."""
        call = self.call
        codes, weight = self._codes(b, block), self._weight(b, block)
        x, first = self.logits.load(b, block)
        if call.fast:
            sums, voxels = np.zeros((len(softmax_labels.SUMS), 1, call.classes)), np.zeros(1)
            squared = softmax_labels.PREDICTED_SQUARED in call.request.index
            self.bad += softmax_labels.reduce(
                x, first, block.size, codes, weight, squared, *self.scratch, sums, voxels
            )
            return _ROW_0, sums, voxels
        rows, regions = _ROW_0, _NO_CODES
        if self.regions is not None:
            regions, rows = np.empty(block.size, np.int32), np.empty(block.size, np.int64)
            given, start = self.regions.load(b, block)
            row = given[0, start : start + block.size]
            count = general.number_rows(row, self.numbers, regions, rows)
            rows = rows[:count]
        sums, voxels = np.zeros((len(call.table), len(rows), call.classes)), np.zeros(len(rows))
        if self.map is None or not call.map_kind:
            map_out, first_map = np.empty((1, 0), call.dtype), 0
        else:
            map_out, first_map = self.map.rows(b, block)
        self.bad += general.reduce(
            *self._inputs(b, block, x, first, codes, weight, regions),
            call.map_kind,
            call.map_k,
            map_out,
            first_map,
            *self.scratch,
            sums,
            voxels,
        )
        if self.map is not None:
            self.map.store(b, block)
        return rows, sums, voxels

    def apply(self, b: int, block: Block) -> None:
        call = self.call
        codes, weight = self._codes(b, block), self._weight(b, block)
        x, first = self.logits.load(b, block)
        assert self.out is not None
        out = self.out.rows(b, block)
        if call.fast:
            softmax_labels.apply(
                x, first, block.size, codes, weight, call.coefficients[b], *out, *self.scratch
            )
        else:
            regions = _NO_CODES
            if self.regions is not None:
                given, start = self.regions.load(b, block)
                row = given[0, start : start + block.size]
                inside = (row >= 0) & (row < call.arrays.rows)
                regions = np.where(inside, row, -1).astype(np.int32)
            general.apply(
                *self._inputs(b, block, x, first, codes, weight, regions),
                call.coefficients[b],
                *out,
                *self.scratch,
            )
        self.out.store(b, block)

    def label(self, b: int, block: Block) -> None:
        """The map of labels, of all voxels, whether they count or not."""
        self._codes(b, block)
        weight = self._weight(b, block)
        self.bad += int(np.count_nonzero(~((weight >= 0) & (weight < np.inf))))
        assert self.map is not None
        x, first = self.logits.load(b, block)
        out, start = self.map.rows(b, block)
        to = out[0, start : start + block.size]
        general.largest(x, first, block.size, self.call.activation, to)
        self.map.store(b, block)

    # ------------------------------------------------------------------ what kernels are given

    def _codes(self, b: int, block: Block) -> np.ndarray:
        if self.labels is None:
            return _NO_CODES
        call = self.call
        if len(self.codes) < block.size:
            self.codes = np.empty(block.size, np.int32)
        codes = self.codes[: block.size]
        labels, first = self.labels.load(b, block)
        row = labels[0, first : first + block.size]
        self.bad += general.encode(row, call.classes, call.ignored, call.ignore, codes)
        return codes

    def _weight(self, b: int, block: Block) -> np.ndarray:
        if self.weight is None:
            return _NO_WEIGHT
        weight, first = self.weight.load(b, block)
        return weight[0, first : first + block.size]

    def _inputs(
        self,
        b: int,
        block: Block,
        x: np.ndarray,
        first: int,
        codes: np.ndarray,
        weight: np.ndarray,
        regions: np.ndarray,
    ) -> tuple[Any, ...]:
        """The arguments that the kernels of the general path share."""
        call = self.call
        target, first_target = self.no_target, 0
        if self.target is not None:
            target, first_target = self.target.load(b, block)
        most = max((field.operand.array.shape[1] for field in self.fields), default=0)
        fields = np.empty((len(self.fields), most, block.size), call.dtype)
        for f, field in enumerate(self.fields):
            rows, start = field.load(b, block)
            fields[f, : len(rows)] = rows[:, start : start + block.size]
        return (
            x,
            first,
            block.size,
            call.activation,
            codes,
            target,
            first_target,
            call.dense_ignore,
            weight,
            regions,
            fields,
            call.field_kinds,
            call.table,
            call.gammas,
        )


def _table(request: Request, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The sums as kernels read them: see `general`."""
    weights, functions, fields = list(WEIGHTS), list(FUNCTIONS), request.fields
    table = [
        (
            weights.index(total.weight),
            functions.index(total.function),
            FUNCTIONS[total.function].reads,
            BY.index(FUNCTIONS[total.function].by),
            fields.index(total.field) if total.field else -1,
        )
        for total in request.sums
    ]
    gammas = [total.parameter for total in request.sums]
    return np.array(table, np.int64).reshape(-1, 5), np.array(gammas, dtype)


_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
_INT32, _INT64 = np.dtype(np.int32), np.dtype(np.int64)
_ROW_0 = np.zeros(1, np.int64)
_NO_WEIGHT.flags.writeable = False

BACKEND = NumbaBackend()
