"""Times of several implementations, measured in turn."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from time import perf_counter, sleep
from typing import TypeVar

from fastloss.bench.call import Call

K = TypeVar("K", bound=Hashable)


_LOOP = 0.4  # seconds
_MOST = 100  # calls


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Timed:
    """A function to time; ``reset`` and ``active`` surround it and are not timed."""

    run: Callable[[], object]
    reset: Callable[[], None] = _nothing
    active: Callable[[], AbstractContextManager[None]] = nullcontext
    number: int = 1
    """Consecutive calls per sample, for functions that take microseconds."""

    def sample(self) -> float:
        """Seconds per call, in a loop as in training: the median of its second half.

        Calls then reuse the memory of earlier calls. Memory that was unused for seconds costs more,
        most of all on a virtual machine, whose host may have reclaimed it.
        """
        seconds: list[float] = []
        while len(seconds) < _MOST and sum(seconds) * self.number < _LOOP:
            seconds.append(self._once())
        return median(seconds[len(seconds) // 2 :])

    def _once(self) -> float:
        self.reset()
        collecting = gc.isenabled()
        gc.disable()
        try:
            with self.active():
                start = perf_counter()
                for _ in range(self.number):
                    self.run()
                return (perf_counter() - start) / self.number
        finally:
            if collecting:
                gc.enable()


def forward(call: Call, number: int = 1) -> Timed:
    return Timed(call.forward, call.reset, call.active, number)


def forward_backward(call: Call, number: int = 1) -> Timed:
    return Timed(call.forward_backward, call.reset, call.active, number)


def interleave(
    timed: Mapping[K, Timed],
    repeats: int,
    *,
    budget: float = 6.0,
    also: Callable[[], None] = _nothing,
) -> dict[K, float]:
    """Median seconds of each, sampled in turn, so that drift of the machine affects all alike.

    Args:
        timed: the functions to time; each is first called once, untimed.
        repeats: samples of each.
        budget: seconds after which a function with 3 samples is sampled no more.
        also: called once per round.
    """
    for one in timed.values():
        one.sample()
        one.reset()
    samples: dict[K, list[float]] = {name: [] for name in timed}
    for _ in range(repeats):
        also()
        for name, one in timed.items():
            seen = samples[name]
            if len(seen) >= 3 and sum(seen) * one.number > budget:
                continue
            # Threads of the previous function may still spin, waiting for work.
            sleep(0.005)
            seen.append(one.sample())
            one.reset()
    return {name: median(seen) for name, seen in samples.items()}
