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
        advise = _function("madvise", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        advise(first, length, _ADVICE)  # a wish: it does not matter if it is refused


def is_resident(address: int) -> bool:
    """Whether there is a page under this address already, as something was written near it."""
    page = mmap.PAGESIZE
    known = ctypes.c_ubyte(0)
    function = _function("mincore", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    failed = function(address // page * page, page, ctypes.byref(known))
    return not failed and bool(known.value & 1)


@cache
def _function(name: str, *arguments: Any) -> Any:
    function = ctypes.CDLL(None)[name]
    function.argtypes = arguments
    return function
