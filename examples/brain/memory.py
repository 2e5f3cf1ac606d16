"""The peak memory of a call."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak(call: Callable[[], object]) -> int | None:
    """The peak resident memory of this process during the call over that before it, in bytes.

    None where it cannot be measured: only Linux can reset the peak.
    """
    gc.collect()
    with suppress(AttributeError, OSError, TypeError):  # with glibc
        ctypes.CDLL(None).malloc_trim(0)  # cached free memory would hide a peak
    try:
        _CLEAR.write_text("5")
        before = _resident("VmRSS")
        call()
        return max(0, _resident("VmHWM") - before)
    except OSError:
        return None


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")
