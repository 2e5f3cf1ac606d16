"""The peak memory of a call."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastloss.frameworks.memory import forget

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak(call: Callable[[], object]) -> int | None:
    """The peak resident memory of this process during a call, over that before it, in bytes.

    One-time memory counts, such as that of code that the first call compiles.

    Returns:
        None where the system does not let the peak be reset: only Linux does.
    """
    gc.collect()
    _trim()
    before = _resident("VmRSS")
    if not reset_peak():
        return None
    call()
    return max(0, _resident("VmHWM") - before)


def reset_peak() -> bool:
    """Set the peak to the memory that is now in use; False where the system does not allow it."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return _resident("VmHWM") <= _resident("VmRSS") + (1 << 20)


def _resident(entry: str) -> int:
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(entry + ":"):
                return int(line.split()[1]) * 1024
    return 0


def _trim() -> None:
    """Return memory that is free to the system: what is kept would hide a peak."""
    forget()
    with suppress(AttributeError, OSError, TypeError):  # with glibc
        libc: Any = ctypes.CDLL(None)
        libc.malloc_trim(0)
