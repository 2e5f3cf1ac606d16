"""Time and memory of calls on a device.

A GPU is timed by CUDA events. Before each sample the device waits until the host has queued the
call, so that the device's time is measured, as in training, where the host runs ahead. Then the L2
cache is flushed by reading other memory, which leaves no dirty lines to write back during the
sample.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch

FEWEST, SECONDS = 20, 0.5
"""The number of samples of a median, or the seconds of sampling if that gives fewer."""
_AT_LEAST = 5
_ROUND = 5
_FLUSH = 256 << 20  # bytes; the L2 cache of an H100 has 50 MB
_LONGEST_WAIT = 0.01  # seconds


@dataclass(frozen=True)
class Samples:
    """Seconds: the median and the 10 % and 90 % quantiles of the samples."""

    median: float
    low: float
    high: float
    count: int


def _samples(seconds: list[float]) -> Samples:
    seconds.sort()
    last = len(seconds) - 1
    return Samples(
        median(seconds), seconds[round(0.1 * last)], seconds[round(0.9 * last)], len(seconds)
    )


class Clock:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        if self.cuda:
            self._other = torch.zeros(_FLUSH // 4, device=device)
            self._sum = torch.zeros((), device=device)
            self._cycles = self._cycles_per_second()

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def time(self, run: Callable[[], object], reset: Callable[[], None]) -> Samples:
        """Seconds of ``run``, which must be warm; ``reset`` runs before each sample."""
        reset()
        start = perf_counter()
        run()
        host = perf_counter() - start
        self.synchronize()
        one_round = self._round_on_gpu if self.cuda else self._round_on_cpu
        seconds: list[float] = []
        start = perf_counter()
        fewest = FEWEST if self.cuda else _AT_LEAST
        while len(seconds) < fewest and (
            len(seconds) < _AT_LEAST or perf_counter() - start < SECONDS
        ):
            seconds += one_round(run, reset, host)
        reset()
        return _samples(seconds)

    def wall_time(self, run: Callable[[], object], reset: Callable[[], None]) -> Samples:
        """As `time`, by the wall clock, for a call that synchronises with its own stream."""
        seconds = []
        for _ in range(FEWEST if self.cuda else _AT_LEAST):
            reset()
            if self.cuda:
                torch.sum(self._other, 0, out=self._sum)
            self.synchronize()
            start = perf_counter()
            run()
            seconds.append(perf_counter() - start)
        reset()
        return _samples(seconds)

    def _round_on_gpu(
        self, run: Callable[[], object], reset: Callable[[], None], host: float
    ) -> list[float]:
        wait = int(min(2 * host, _LONGEST_WAIT) * self._cycles)
        pairs = []
        for _ in range(_ROUND):
            reset()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(wait)
            torch.sum(self._other, 0, out=self._sum)
            start.record()
            run()
            end.record()
            pairs.append((start, end))
        self.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    def _round_on_cpu(
        self, run: Callable[[], object], reset: Callable[[], None], host: float
    ) -> list[float]:
        reset()
        start = perf_counter()
        run()
        return [perf_counter() - start]

    def _cycles_per_second(self) -> float:
        cycles = 20_000_000
        torch.cuda._sleep(cycles)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        self.synchronize()
        return float(cycles / (start.elapsed_time(end) / 1e3))

    def copy_bandwidth(self, nbytes: int) -> float:
        """Bytes read and written per second by a copy of this many bytes."""
        source = torch.zeros(nbytes, dtype=torch.uint8, device=self.device)
        target = torch.zeros_like(source)
        target.copy_(source)
        return 2 * nbytes / self.time(lambda: target.copy_(source), lambda: None).median

    def peak_memory(self, run: Callable[[], object], reset: Callable[[], None]) -> int | None:
        """The peak memory of ``run`` in bytes beyond what was allocated; None on a CPU."""
        if not self.cuda:
            return None
        reset()
        gc.collect()
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        self.synchronize()
        peak = torch.cuda.max_memory_allocated(self.device) - before
        reset()
        return int(peak)

    def held(self) -> int:
        """The bytes that PyTorch has allocated."""
        return torch.cuda.memory_allocated(self.device) if self.cuda else 0

    def step(self, run: Callable[[], object]) -> tuple[float, int | None]:
        """Seconds of a call that takes longer than its queueing, and the peak memory in bytes."""
        self.synchronize()
        if not self.cuda:
            start = perf_counter()
            run()
            return perf_counter() - start, None
        torch.cuda.reset_peak_memory_stats(self.device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        self.synchronize()
        return begin.elapsed_time(end) / 1e3, int(torch.cuda.max_memory_allocated(self.device))

    def host_time(self, run: Callable[[], object], calls: int, repeats: int = 5) -> dict[str, Any]:
        """Seconds per call: of the host without waiting for the device, and of both together."""
        for _ in range(max(10, calls // 20)):
            run()
        alone, together = [], []
        gc.collect()
        gc.disable()
        try:
            for _ in range(repeats):
                self.synchronize()
                start = perf_counter()
                for _ in range(calls):
                    run()
                queued = perf_counter()
                self.synchronize()
                alone.append((queued - start) / calls)
                together.append((perf_counter() - start) / calls)
        finally:
            gc.enable()
        return {"host": median(alone), "with_device": median(together), "calls": calls}
