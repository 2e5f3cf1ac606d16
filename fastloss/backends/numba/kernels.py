"""How the kernels are compiled, and kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from numba import njit

OPTIONS = {"error_model": "numpy", "fastmath": {"contract"}}
"""A product and a sum may be one instruction; no other flag leaves NaN and infinities alone."""


@cache
def _sources() -> str:
    """A digest of all the files that kernels are made of."""
    digest = blake2b(digest_size=8)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def inner(function: Callable[..., Any]) -> Any:
    """A function that kernels call."""
    return njit(**OPTIONS)(function)


def kernel(function: Callable[..., Any]) -> Any:
    """A function that Python calls: it releases the GIL, and is kept on disk.

    Numba finds what it kept by the name and by the function's own file alone, so the name changes
    with all the files.
    """
    function.__qualname__ = f"{function.__qualname__}_{_sources()}"
    return njit(cache=True, nogil=True, **OPTIONS)(function)
