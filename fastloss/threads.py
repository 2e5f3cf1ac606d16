"""How many threads compute."""

from __future__ import annotations

import operator

from fastloss.backends import current_backend, limit_threads


def set_num_threads(number: int) -> None:
    """Let at most this many threads compute a loss, on every backend.

    Results do not depend on it. Without it, ``OMP_NUM_THREADS`` and threadpoolctl decide for the
    C++ kernels (threadpoolctl's limits hold in any case), ``NUMBA_NUM_THREADS`` for Numba, which
    takes no more than that. NumPy's reference computes on one thread.

    Args:
        number: at least 1.

    Raises:
        TypeError: not an integer. ValueError: below 1.
    """
    try:
        count = operator.index(number)
    except TypeError:
        raise TypeError(f"number: expected an integer, got {number!r}") from None
    if isinstance(number, bool):
        raise TypeError(f"number: expected an integer, got {number!r}")
    if count < 1:
        raise ValueError(f"number: expected at least 1, got {number!r}")
    limit_threads(count)


def get_num_threads() -> int:
    """The number of threads that the current backend computes on."""
    return current_backend().get_num_threads()
