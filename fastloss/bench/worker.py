"""The process that `fastloss.bench.apart` starts; its task is a JSON argument."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import fastloss
from fastloss.bench.call import Call
from fastloss.bench.implementations import make_call
from fastloss.bench.inputs import Case, load_case
from fastloss.bench.measure import forward_backward
from fastloss.frameworks.memory import forget

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def main(order: dict[str, Any]) -> dict[str, Any]:
    case = load_case(Path(order["folder"]))
    fastloss.set_num_threads(order["threads"])
    if order["task"] == "memory":
        name = order["implementation"]
        call = make_call(name, case, order["loss"], order["threads"])
        compiles = name == "numba" or name.endswith(("compile", "jax"))
        return {"peak": _peak(call, compiles=compiles, warm=name != "reference")}
    return {"seconds": _time(case, order)}


def _peak(call: Call, *, compiles: bool, warm: bool) -> int | None:
    """The peak resident memory of one call, over that before it.

    Without ``warm`` it is that of a first call, for implementations that take seconds.
    """
    with call.active():
        if _reset_peak():
            if warm:  # one-time memory, such as compiled code, does not count
                call.with_new_gradient()
                call.reset()
            gc.collect()
            _trim()
            before = _status("VmRSS")
            _reset_peak()
            keep = call.with_new_gradient()
            peak = _status("VmHWM")
            del keep
            return max(0, peak - before)
        if compiles:
            return None
        # The peak of the whole process, which only this first call has raised.
        highest = _peak_so_far()
        keep = call.with_new_gradient()
        del keep
        return None if highest is None else max(0, (_peak_so_far() or 0) - highest)


def _reset_peak() -> bool:
    """Reset the peak to the memory now in use, where the system allows it."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return _status("VmHWM") <= _status("VmRSS") + (1 << 20)


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _peak_so_far() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _trim() -> None:
    """Return freed memory, with glibc, and memory cached for gradients to the system."""
    forget()
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _time(case: Case, order: dict[str, Any]) -> float:
    """Median seconds for value and gradient, in a process that has used PyTorch or has not."""
    call = make_call(order["implementation"], case, order["loss"], order["threads"])
    timed = forward_backward(call)
    timed.sample()
    if order["after_torch"]:
        import torch

        torch.set_num_threads(order["threads"])
        layer = torch.nn.Conv3d(1, 4, 3)
        volume = torch.ones(1, 1, 32, 32, 32)
        for _ in range(3):
            layer(volume).sum().backward()
    timed.sample()
    return median(timed.sample() for _ in range(order["repeats"]))


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
