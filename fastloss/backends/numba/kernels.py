"""How functions are compiled and cached on disk."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numba

OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}
"""FMA contraction only: the other flags that help would break NaN and infinities."""

_INNER: dict[str, Any] = {**OPTIONS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
_SUMMING: dict[str, Any] = {**_INNER, "fastmath": {"contract", "reassoc"}}


def named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Give a generated function a unique name.

    Cached code refers to functions by name, argument types and a number that depends on what else
    the process has compiled: equal names would be confused in code that several have compiled.
    """
    function.__name__ = function.__qualname__ = name
    return function


def inner(function: Callable[..., Any]) -> Any:
    """A function that kernels call."""
    return numba.njit(**_INNER)(function)


def summing(function: Callable[..., Any]) -> Any:
    """An `inner` function with reassociated sums, in an order that depends only on their length."""
    return numba.njit(**_SUMMING)(function)


def kernel(function: Callable[..., Any]) -> Any:
    """A function that Python calls: it releases the GIL, and is cached on disk.

    Numba's cache key has only the name and its own file: the name includes a digest of all files.
    """
    function.__qualname__ = f"{function.__qualname__}_{_sources()}"
    return numba.njit(cache=True, nogil=True, **OPTIONS)(function)


@cache
def _sources() -> str:
    """A digest of all the files of the kernels."""
    digest = blake2b(digest_size=8)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
