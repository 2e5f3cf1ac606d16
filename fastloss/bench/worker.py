"""The process that `fastloss.bench.apart` starts; its task is a JSON argument."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import fastloss
from fastloss.bench.call import Call
from fastloss.bench.implementations import make_call
from fastloss.bench.inputs import Case, load_case
from fastloss.bench.measure import forward_backward
from fastloss.bench.memory import peak, reset_peak


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
        if reset_peak():
            if warm:  # one-time memory, such as compiled code, does not count
                call.with_new_gradient()
                call.reset()
            return peak(call.with_new_gradient)
        if compiles:
            return None
        # The peak of the whole process, which only this first call has raised.
        highest = _peak_so_far()
        keep = call.with_new_gradient()
        del keep
        return None if highest is None else max(0, (_peak_so_far() or 0) - highest)


def _peak_so_far() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


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
