"""Prints the seconds until a first result, in a separate process, as JSON.

    python benchmarks/gpu/startup.py DEVICE

Kernels come from the folder CUPY_CACHE_DIR if cached there, and otherwise are compiled.
"""

from __future__ import annotations

import json
import sys
from time import perf_counter

start = perf_counter()
import torch  # noqa: E402

seconds = {"import torch": perf_counter() - start}


def lap(name: str) -> None:
    global start
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    now = perf_counter()
    seconds[name], start = now - start, now


start = perf_counter()
device = torch.device(sys.argv[1])
logits = torch.randn(1, 14, 32, 32, 32, device=device, requires_grad=True)
labels = torch.randint(0, 14, (1, 32, 32, 32), device=device, dtype=torch.uint8)
torch.ones((), device=device, requires_grad=True).backward()  # starts autograd's threads
lap("start PyTorch's device")
if device.type == "cuda":
    import cupy

    cupy.zeros(1)
    lap("import CuPy")
import fastloss as fl  # noqa: E402

loss = fl.Dice() + fl.CrossEntropy()
lap("import fastloss")
value = loss(logits, labels)
lap("first value")
value.backward()
lap("first gradient")
loss(logits, labels).backward()
lap("second value and gradient")
print(json.dumps(seconds))
