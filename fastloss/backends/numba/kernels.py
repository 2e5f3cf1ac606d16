"""How functions are compiled, and kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numba

OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}
"""A product and a sum may be one instruction; no other flag leaves NaN and infinities alone."""

_INNER: dict[str, Any] = {**OPTIONS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
_SUMMING: dict[str, Any] = {**_INNER, "fastmath": {"contract", "reassoc"}}


def named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function that is made by another one, under a name of its own.

    In what is kept on disk functions find each other by name, argument types and a number that
    depends on what else the process has compiled. Two functions of one name would be confused once
    kernels that several processes have compiled meet in one.
    """
    function.__name__ = function.__qualname__ = name
    return function


def inner(function: Callable[..., Any]) -> Any:
    """A function that kernels call."""
    return numba.njit(**_INNER)(function)


def summing(function: Callable[..., Any]) -> Any:
    """One that may sum in any order that depends on nothing but the number of summands."""
    return numba.njit(**_SUMMING)(function)


def kernel(function: Callable[..., Any]) -> Any:
    """A function that Python calls: it releases the GIL, and is kept on disk.

    Numba finds what it kept by the name and by the function's own file alone, so the name changes
    with all the files.
    """
    function.__qualname__ = f"{function.__qualname__}_{_sources()}"
    return numba.njit(cache=True, nogil=True, **OPTIONS)(function)


@cache
def _sources() -> str:
    """A digest of all the files that kernels are made of."""
    digest = blake2b(digest_size=8)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
