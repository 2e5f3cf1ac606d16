"""The passes in Numba: compiled on first use, for machines without the C++ kernels.

The voxels of a sample are cut into blocks, the same for any number of threads. Each block has its
own float64 sums, which are added in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import Any

import numpy as np
from numba.core import config as _untyped_config
from numba.np.ufunc import parallel

from fastloss.arrays import Arrays
from fastloss.backends.base import Backend
from fastloss.backends.numba.blocks import Block
from fastloss.backends.numba.call import Call, Worker
from fastloss.backends.targets import check_dense, check_targets
from fastloss.maps import Map
from fastloss.request import Request

_config: Any = _untyped_config  # its attributes are created at run time

_FEW_LOGITS = 1 << 17  # below this, starting a second thread costs more than it saves


class NumbaBackend(Backend):
    """Compiled kernels; threads share the blocks."""

    name = "numba"

    _threads: int | None = None

    def set_num_threads(self, number: int) -> None:
        """Compute with this many threads, at least 1 and at most ``NUMBA_NUM_THREADS``."""
        self._threads = max(1, min(int(number), _config.NUMBA_NUM_THREADS))

    def get_num_threads(self) -> int:
        """How many threads compute: by default `numba.get_num_threads`."""
        if self._threads is not None:
            return self._threads
        # Asking would start Numba's own threads; before they start there is no limit to ask for.
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
        if arrays.dense:
            check_dense(request, arrays)
        call = Call(request, arrays, voxel_map=voxel_map)
        found = self._run(call, Worker.reduce)
        sums[...] = 0
        voxels[...] = 0
        for (sample, _), part in zip(call.turns, found, strict=True):
            at = sample * arrays.rows + part.rows
            sums[:, at] += part.sums
            voxels[at] += part.voxels

    def apply(
        self, request: Request, arrays: Arrays, coefficients: np.ndarray, out: np.ndarray
    ) -> None:
        self._run(Call(request, arrays, coefficients=coefficients, out=out), Worker.apply)

    def write_map(self, request: Request, arrays: Arrays, voxel_map: Map) -> None:
        if arrays.dense:
            check_dense(request, arrays)
        work = Worker.label if voxel_map.kind == "label" else Worker.reduce
        self._run(Call(request, arrays, voxel_map=voxel_map), work)

    def _run(self, call: Call, work: Callable[[Worker, int, Block], Any]) -> list[Any]:
        """Run the work on every block; return the results in block order.

        Raises:
            ValueError: a kernel has found bad labels or voxel weights.
        """
        results: list[Any] = [None] * len(call.turns)
        left = deque(enumerate(call.turns))

        def compute() -> None:
            worker = Worker(call)
            with np.errstate(all="ignore"):
                while True:
                    try:
                        i, (sample, block) = left.popleft()
                    except IndexError:
                        return
                    results[i] = work(worker, sample, block)

        few = call.arrays.logits.size <= _FEW_LOGITS
        _run_on(compute, 1 if few else min(len(call.turns), self.get_num_threads()))
        if any(part and part.bad for part in results):
            check_targets(call.request, call.arrays)
            raise AssertionError("a kernel found labels or weights bad that are not")
        return results


def _run_on(function: Callable[[], None], threads: int) -> None:
    """Call the function from this many threads, the caller's included.

    Numba's own threading layers are unsafe: one aborts if two Python threads use it at once,
    another in a process forked from one that used it. The kernels release the GIL, so plain threads
    suffice.
    """
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    others = []
    with suppress(RuntimeError):  # no more threads can start, as at process exit
        for _ in range(threads - 1):
            thread = Thread(target=guarded)
            thread.start()
            others.append(thread)
    try:
        function()
    finally:
        for thread in others:
            thread.join()
    if errors:
        raise errors[0]


BACKEND = NumbaBackend()
