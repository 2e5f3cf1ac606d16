"""One call: its arrays as operands of kernels, and a thread's work on a block."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from fastloss.arrays import INTEGERS, Arrays
from fastloss.backends.numba import general, labels, softmax_labels
from fastloss.backends.numba.blocks import Block, Operand, Order, Window, blocks_of
from fastloss.backends.numba.functions import FUNCTIONS, WEIGHTS
from fastloss.maps import Map
from fastloss.request import ACTIVATIONS, Request

_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
_INT32, _INT64 = np.dtype(np.int32), np.dtype(np.int64)
_LABELS = INTEGERS | {"float32", "float64"}  # dtypes that Numba supports
_BY = {"p": general.BY_P, "log_p": general.BY_LOG_P, "log_q": general.BY_LOG_Q}
_MAP_KINDS = {k: getattr(general, k.upper()) for k in ("voxel", "class", "error", "mask")}
# Logits of a block: with the scratch memory of kernels it stays in the L2 cache, and a copy of it
# is small beside the arrays.
_LOGITS, _LOGITS_COPIED = 1 << 19, 1 << 15


def _constant(array: np.ndarray) -> np.ndarray:
    """The array as read-only: Numba compiles separately for writable arrays."""
    array.flags.writeable = False
    return array


_NO_NUMBERS, _NO_REGIONS = np.empty(0, np.int32), np.empty((1, 0), np.int32)
_NO_WEIGHT, _ROW_0 = _constant(np.empty(0, np.float64)), np.zeros(1, np.int64)


class Part(NamedTuple):
    """The numbers of bad labels and weights of a block; its rows, their sums and weights."""

    bad: int
    rows: np.ndarray = _ROW_0
    sums: np.ndarray = _NO_WEIGHT
    voxels: np.ndarray = _NO_WEIGHT


class Call:
    """The arrays of a call as operands of kernels, and the blocks they are cut to."""

    def __init__(
        self,
        request: Request,
        arrays: Arrays,
        *,
        voxel_map: Map | None = None,
        coefficients: np.ndarray | None = None,
        out: np.ndarray | None = None,
    ) -> None:
        self.request, self.arrays = request, arrays
        self.dtype = dtype = arrays.value_dtype
        x, kind = arrays.logits, arrays.target_dtype
        batch, self.classes = x.shape[:2]
        self.activation = ACTIVATIONS.index(request.activation)
        # The fast path takes only these sums.
        fast = (
            request.activation == "softmax"
            and not arrays.dense
            and arrays.regions is None
            and voxel_map is None
            and set(request.sums) <= set(softmax_labels.SUMS)
        )
        self.kernels: ModuleType = softmax_labels if fast else general
        self.table, self.gammas = _table(request, dtype, fast)
        order = Order.of(x)

        def operand(array: np.ndarray | None, name: str, dtype: np.dtype) -> Operand | None:
            """An array (B, *spatial) with an axis of classes added."""
            if array is None:
                return None
            return Operand(array if array.ndim == x.ndim else array[:, None], name, dtype, order)

        self.logits = Operand(x, arrays.logits_dtype, dtype, order)
        self.target = operand(arrays.target, kind, dtype) if arrays.dense else None
        self.labels = None
        if not arrays.dense:
            numbers = arrays.target.view(np.uint8) if kind == "bool" else arrays.target
            wanted = numbers.dtype.newbyteorder("=") if kind in _LABELS else _FLOAT32
            self.labels = Operand(numbers[:, None], kind, wanted, order)
        self.weight = operand(arrays.voxel_weight, arrays.weight_dtype, _FLOAT64)
        self.regions = operand(arrays.regions, arrays.regions_dtype, _INT64)
        self.fields = [operand(f.array, f.dtype, dtype) for f in arrays.fields]
        self.out = operand(out, arrays.logits_dtype, dtype)

        ignore = request.ignore_index
        self.ignored, self.ignore = ignore is not None, ignore or 0
        is_class = self.ignored and self.classes > 1 and 0 <= self.ignore < self.classes
        self.ignore_dense = (float(self.ignore) if self.ignored else np.nan, is_class)

        self.map: Operand | None = None
        self.map_kind, self.map_k = 0, np.empty((0, 0), dtype)
        if voxel_map is not None:
            self.map_kind = _MAP_KINDS.get(voxel_map.kind, 0)
            rows = self.classes if voxel_map.kind in ("class", "error", "mask") else 1
            numbers = voxel_map.out.reshape(batch, rows, *x.shape[2:])
            wanted = _INT32 if voxel_map.kind == "label" else dtype
            self.map = Operand(numbers, numbers.dtype.name, wanted, order)
            if self.map_kind in (general.VOXEL, general.CLASS):
                self.map_k = np.ascontiguousarray(voxel_map.coefficients, dtype)
        if coefficients is not None:  # (B, S, rows, C)
            k = coefficients.reshape(len(request.sums), batch, arrays.rows, self.classes)
            with np.errstate(all="ignore"):
                self.coefficients = k.transpose(1, 0, 2, 3).astype(dtype, order="C")

        of_classes = (self.logits, self.target, self.out, *self.fields)
        copied = any(o is not None and not o.direct for o in of_classes)
        most = (_LOGITS_COPIED if copied else _LOGITS) // self.classes
        blocks = blocks_of(self.logits.array.shape[2:], max(1 << 10, min(1 << 17, most)))
        self.turns = [(sample, block) for sample in range(batch) for block in blocks]


@lru_cache(maxsize=256)
def _table(request: Request, dtype: np.dtype, fast: bool) -> tuple[np.ndarray, np.ndarray]:
    """The sums as arguments of `general`'s or `softmax_labels`'s kernels, and their parameters."""
    if fast:
        slots = [request.index.get(total, -1) for total in softmax_labels.SUMS]
        return np.array(slots, np.int64), np.empty(0, dtype)
    weights, functions, fields = list(WEIGHTS), list(FUNCTIONS), request.fields
    table = [
        (
            weights.index(total.weight),
            functions.index(total.function),
            FUNCTIONS[total.function].reads,
            _BY[FUNCTIONS[total.function].by],
            fields.index(total.field) if total.field else -1,
        )
        for total in request.sums
    ]
    gammas = [total.parameter for total in request.sums]
    return np.array(table, np.int64).reshape(-1, 5), np.array(gammas, dtype)


class Worker:
    """One thread's windows on the operands, its scratch memory, and its work."""

    def __init__(self, call: Call) -> None:
        self.call = call
        dtype, classes, kernels = call.dtype, call.classes, call.kernels
        self.logits = Window(call.logits)
        self.target = Window(call.target) if call.target else None
        self.labels = Window(call.labels) if call.labels else None
        self.weight = Window(call.weight) if call.weight else None
        self.regions = Window(call.regions) if call.regions else None
        self.fields = [Window(field) for field in call.fields if field]
        self.map = Window(call.map) if call.map else None
        self.out = Window(call.out) if call.out else None
        self.codes = np.empty(0, np.int32)
        self.no_target = (_constant(np.empty((0, 0), dtype)), 0)
        self.no_map = (np.empty((1, 0), dtype), 0)
        width = max(128, min(kernels.WIDTH, kernels.LOGITS_OF_TILE // classes))
        width = min(width, max((block.size for _, block in call.turns), default=1))
        self.scratch = (
            np.empty((classes, kernels.TILES, width), dtype),
            np.empty((kernels.ROWS, width), dtype),
            np.empty((2, width), np.float64),
            np.empty((1, width), np.int32),
        )

    def reduce(self, sample: int, block: Block) -> Part:
        """Compute the sums over the block, and write its map."""
        call = self.call
        inputs, rows, bad = self._inputs(sample, block)
        sums = np.zeros((len(call.request.sums), len(rows), call.classes))
        voxels = np.zeros(len(rows))
        to = self.map.rows(sample, block) if self.map else self.no_map
        bad += call.kernels.reduce(*inputs, call.map_kind, call.map_k, to, sums, voxels)
        if self.map:
            self.map.store(sample, block)
        return Part(bad, rows, sums, voxels)

    def apply(self, sample: int, block: Block) -> None:
        """Write the gradient of the block."""
        inputs, rows, _ = self._inputs(sample, block)
        k = self.call.coefficients[sample]
        k = k if self.regions is None else np.ascontiguousarray(k[:, rows])
        assert self.out
        self.call.kernels.apply(*inputs, k, self.out.rows(sample, block))
        self.out.store(sample, block)

    def label(self, sample: int, block: Block) -> Part:
        """Write the map of labels, for all voxels, including ignored ones."""
        _, bad = self._codes(sample, block)
        weight = self._row(self.weight, sample, block, _NO_WEIGHT)
        bad += int(np.count_nonzero(~((weight >= 0) & (weight < np.inf))))
        assert self.map
        out, first = self.map.rows(sample, block)
        to = out[0, first : first + block.size]
        labels.largest(*self.logits.read(sample, block), self.call.activation, to)
        self.map.store(sample, block)
        return Part(bad)

    def _inputs(self, sample: int, block: Block) -> tuple[tuple[Any, ...], np.ndarray, int]:
        """The arguments that all kernels share, the rows of the block, and the bad labels."""
        call = self.call
        codes, bad = self._codes(sample, block)
        regions, rows = _NO_REGIONS, _ROW_0
        if self.regions:
            all_rows, first = self.regions.read(sample, block)
            given = all_rows[:, first : first + block.size]
            inside = (given >= 0) & (given < call.arrays.rows)
            found = np.bincount(given[inside], minlength=call.arrays.rows) > 0
            rows = np.flatnonzero(found) if found.any() else _ROW_0
            regions = np.where(inside, (np.cumsum(found) - 1)[given * inside], -1).astype(np.int32)
        fields = np.empty((len(self.fields), call.classes, block.size), call.dtype)
        for numbers, window, field in zip(fields, self.fields, call.arrays.fields, strict=True):
            given, first = window.read(sample, block)
            given = given[:, first : first + block.size]
            is_labels = field.kind == "labels"
            numbers[...] = given == np.arange(call.classes)[:, None] if is_labels else given
        target = self.target.read(sample, block) if self.target else self.no_target
        weight = self._row(self.weight, sample, block, _NO_WEIGHT)
        inputs = (
            block.size, call.activation, self.logits.read(sample, block), codes, target,
            call.ignore_dense, weight, regions, fields, call.table, call.gammas, self.scratch,
        )  # fmt: skip
        return inputs, rows, bad

    def _codes(self, sample: int, block: Block) -> tuple[np.ndarray, int]:
        """Encoded labels, empty for a dense target, and how many are bad."""
        if self.labels is None:
            return _NO_NUMBERS, 0
        if len(self.codes) < block.size:
            self.codes = np.empty(block.size, np.int32)
        codes, call = self.codes[: block.size], self.call
        given = self._row(self.labels, sample, block)
        return codes, labels.encode(given, call.classes, call.ignored, call.ignore, codes)

    def _row(
        self, window: Window | None, sample: int, block: Block, absent: np.ndarray = _NO_NUMBERS
    ) -> np.ndarray:
        """The block's part of an array with one row, (n,)."""
        if window is None:
            return absent
        rows, first = window.read(sample, block)
        return rows[0, first : first + block.size]
