"""Fixtures of the benchmarks: inputs, the machine's bandwidth, and timed calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from statistics import median
from typing import Any

import pytest

import fastloss
from fastloss.bench import machine
from fastloss.bench.bandwidth import Bandwidth
from fastloss.bench.call import Call
from fastloss.bench.errors import Unavailable
from fastloss.bench.implementations import backends_that_run, make_call
from fastloss.bench.inputs import Case, phantom_case

BACKEND = backends_that_run()[0]
"""The fastest available backend, measured unless backends are compared."""


@lru_cache(maxsize=4)
def case_of(size: int, classes: int, batch: int = 1) -> Case:
    """The phantom torso, float32."""
    return phantom_case(size, classes, batch=batch)


@pytest.fixture(scope="session")
def threads() -> int:
    number = machine.threads()
    fastloss.set_num_threads(number)  # for all backends alike
    return number


@pytest.fixture(scope="session")
def limits(threads: int) -> dict[str, float]:
    """Bytes per second of a copy and of reading, medians of several measurements."""
    bandwidth = Bandwidth(threads)
    return {
        "copy": median(bandwidth.copy() for _ in range(5)),
        "read": median(bandwidth.read() for _ in range(5)),
    }


@pytest.fixture
def prepare(threads: int) -> Callable[..., Call]:
    """A call by name; skips the test if it is not available."""

    def make(name: str, case: Case, loss: str = "dice_ce") -> Call:
        try:
            return make_call(name, case, loss, threads)
        except Unavailable as error:
            pytest.skip(f"{name}: {error}")

    return make


@pytest.fixture
def timed(benchmark: Any, limits: dict[str, float]) -> Callable[..., None]:
    """Benchmark a call's value, or value and gradient, and record derived figures.

    extra_info gets ``ns_per_logit`` and ``share_of_limit``: the least time to move the necessary
    bytes at this machine's bandwidth, over the median time.
    """

    def run(
        call: Call, case: Case, *, gradient: bool = True, rounds: int = 7, iterations: int = 1
    ) -> None:
        function = call.forward_backward if gradient else call.forward
        with call.active():
            if iterations == 1:
                benchmark.pedantic(function, setup=call.reset, rounds=rounds, warmup_rounds=1)
            else:
                benchmark.pedantic(function, rounds=rounds, iterations=iterations, warmup_rounds=1)
        call.reset()
        if benchmark.stats is None:  # --benchmark-disable
            return
        seconds = benchmark.stats.stats.median
        least = 3 * case.nbytes / limits["copy"] if gradient else case.nbytes / limits["read"]
        benchmark.extra_info["ns_per_logit"] = round(seconds / case.count * 1e9, 4)
        benchmark.extra_info["share_of_limit"] = round(least / seconds, 4)

    return run
