"""The memory bandwidth of this machine: the limit that losses are compared with."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from time import perf_counter
from typing import Any

import numpy as np

from fastloss.backends import load_backend

_NBYTES = 128 << 20  # far more than the caches hold


class Bandwidth:
    """One measurement per call, to be spread over a run.

    The C++ backend copies with non-temporal stores, on the threads that the losses run on. Without
    it, NumPy copies with as many threads, which can fall short of the machine's bandwidth.
    """

    def __init__(self, threads: int, nbytes: int = _NBYTES) -> None:
        self.threads, self.nbytes = threads, nbytes
        backend: Any = None
        with suppress(ImportError):
            backend = load_backend("cpu")
        self._copy = getattr(backend, "copy_bandwidth", None)
        self._read = getattr(backend, "read_bandwidth", None)

    @property
    def method(self) -> str:
        return "NumPy" if self._copy is None or self._read is None else "C++"

    def copy(self) -> float:
        """Bytes read plus bytes written per second, of a copy."""
        if self._copy is not None:
            return float(self._copy(self.nbytes))
        source, target = self._arrays
        seconds = self._time(lambda part: np.copyto(target[part], source[part]))
        return 2 * source.nbytes / seconds

    def read(self) -> float:
        """Bytes read per second."""
        if self._read is not None:
            return float(self._read(self.nbytes))
        source, _ = self._arrays
        return source.nbytes / self._time(lambda part: np.maximum.reduce(source[part]))

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        count = self.nbytes // 4
        # Written now, as the first touch of a page costs more than the copy.
        return np.ones(count, np.float32), np.ones(count, np.float32)

    def _time(self, work: Callable[[slice], object]) -> float:
        # Blocks too large for any cache, and small enough that the threads end together.
        count, step = self.nbytes // 4, 1 << 20
        parts = [slice(i, i + step) for i in range(0, count, step)]
        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(work, parts[: self.threads]))  # starts the threads
            start = perf_counter()
            list(pool.map(work, parts))
            return perf_counter() - start
