"""Large new arrays on huge pages, where the system has them on request."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

PAGE = 1 << 21
LEAST = 1 << 25
"""Bytes above which allocators commonly take memory from the system each time, and give it back."""
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)


def has_huge_pages() -> bool:
    """Whether this system takes the advice."""
    return _ADVICE is not None


def advise_huge_pages(address: int, nbytes: int) -> None:
    """Ask for huge pages under memory that nothing was written to yet.

    Pages of 4 KiB are made one by one when the memory is first written, which for a gradient can
    take longer than to compute it. Pages that lie in the memory in part stay as they are.
    """
    first = -(-address // PAGE) * PAGE
    length = (address + nbytes) // PAGE * PAGE - first
    if length > 0:
        _madvise()(first, length, _ADVICE)  # a wish: it does not matter if it is refused


@cache
def _madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
