"""Fixtures, and the settings of Hypothesis."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before anything loads OpenMP: workers share the cores, and threads that wait for each other
    # there take many times as long. Tests of threads set their number.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from support import BACKENDS, NATIVE, need_backend

import fastloss as fl

# No deadline, as the first call on a backend may compile. The `backend` fixture may span all
# examples of a test.
_COMMON = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
# The same examples in every run; HYPOTHESIS_PROFILE=thorough searches for new ones.
settings.register_profile("default", max_examples=40, derandomize=True, **_COMMON)
settings.register_profile("short", max_examples=25, derandomize=True, **_COMMON)
settings.register_profile("thorough", max_examples=1500, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or "default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Numba compiles for a minute where nothing is cached. Its tests come last, in the part of one
    # worker, so that others find most of it done.
    items.sort(key=lambda item: "numba" in item.nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of ``-n auto``: one worker per core, and eight at most, as each compiles kernels anew."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, 8)


@pytest.fixture(autouse=True)
def _reference() -> Iterator[None]:
    """Tests without a `backend` fixture run on the reference, which is always available."""
    with fl.use_backend("reference"):
        yield


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn, selected for the test; its name."""
    with fl.use_backend(need_backend(request.param)):
        yield request.param


@pytest.fixture(params=[name for name in BACKENDS if name != "reference"])
def fast_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same without the reference, for sizes and properties that it does not guarantee."""
    with fl.use_backend(need_backend(request.param)):
        yield request.param


@pytest.fixture(params=[name for name in NATIVE if name != "reference"])
def native_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Backends for arrays in CPU memory with their own threads."""
    with fl.use_backend(need_backend(request.param)):
        yield request.param
