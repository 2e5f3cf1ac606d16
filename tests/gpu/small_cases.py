"""A dozen small losses on a GPU, checked against the reference: for compute-sanitizer.

    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/gpu/small_cases.py

Every array is a separate allocation, so that accesses beyond its end are detected. Exits with 1 if
a result is wrong. Through CuPy, or through PyTorch (``small_cases.py torch``); on a CPU,
``small_cases.py numpy`` tests the script itself.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NamedTuple

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # before PyTorch starts

import numpy as np

import fastloss as fl


class SmallCase(NamedTuple):
    loss: Any
    classes: int
    dtype: str = "float32"
    layout: str = "contiguous"
    labels: str = "uint8"
    spatial: tuple[int, ...] = (7, 9, 11)
    weighted: bool = False
    dense: bool = False


DICE_CE = fl.Dice() + fl.CrossEntropy()
CASES = [
    SmallCase(DICE_CE, 2),
    SmallCase(DICE_CE, 2, "float16", spatial=(8, 8, 8)),
    SmallCase(DICE_CE, 14, labels="int64", weighted=True),
    SmallCase(DICE_CE, 14, "float32", "channels last"),
    SmallCase(DICE_CE, 14, "float16", "channels last", spatial=(8, 8, 8)),
    SmallCase(DICE_CE, 33, "float64"),
    SmallCase(DICE_CE, 33, "float32", "slice"),
    SmallCase(DICE_CE, 105, "float16"),
    SmallCase(DICE_CE, 105, "float32", "channels last"),
    SmallCase(DICE_CE, 300),
    SmallCase(DICE_CE, 300, "float32", "channels last"),
    SmallCase(DICE_CE, 14, "bfloat16"),
    SmallCase(fl.Loss(fl.Dice(squared=True), fl.Focal(gamma=2.0), ignore_index=1), 14),
    SmallCase(fl.Dice() + fl.CrossEntropy(label_smoothing=0.1), 105),
    SmallCase(fl.Loss(DICE_CE, activation="sigmoid"), 33, dense=True),
    SmallCase(fl.Dice() + fl.TopKCrossEntropy(k=10), 14),
    SmallCase(fl.Dice(reduction="none") + fl.CrossEntropy(), 3),
]


class Unsupported(Exception):
    """A feature that a framework lacks."""


def to_cupy(array: np.ndarray, dtype: str) -> Any:
    import cupy

    cupy.cuda.set_allocator(None)  # straight from the driver, not from a pool
    if dtype == "bfloat16":
        raise Unsupported("CuPy has no bfloat16 of its own")
    return cupy.asarray(array.astype(dtype))


def to_numpy(array: np.ndarray, dtype: str) -> Any:
    if dtype == "bfloat16":
        raise Unsupported("NumPy has no bfloat16 of its own")
    return array.astype(dtype)


def to_torch(array: np.ndarray, dtype: str) -> Any:
    import torch

    return torch.from_numpy(array).cuda().to(getattr(torch, dtype))


def from_device(array: Any) -> np.ndarray:
    if hasattr(array, "get"):
        array = array.get()
    elif hasattr(array, "cpu"):
        array = (array.double() if array.is_floating_point() else array).cpu().numpy()
    numbers: np.ndarray = np.asarray(array)
    return numbers.astype(np.float64) if numbers.dtype.kind == "f" else numbers


def run(case: SmallCase, move: Any) -> str | None:
    """The error, or None."""
    rng = np.random.default_rng(0)
    shape = (2, case.classes, *case.spatial)
    labels = rng.integers(0, case.classes, (2, *case.spatial))
    target = rng.uniform(size=shape) < 0.3 if case.dense else labels
    x = move(2 * rng.normal(size=shape), case.dtype)
    y = move(target.astype(np.uint8 if case.dense else np.int64), case.labels)
    arguments = [y]
    if case.weighted:
        arguments.append(move(rng.uniform(0.5, 2.0, labels.shape), "float32"))
    numbers = [from_device(a) for a in (x, *arguments)]
    if case.layout == "channels last":
        memory = move(np.moveaxis(numbers[0], 1, -1).copy(), case.dtype)
        x = memory.movedim(-1, 1) if hasattr(memory, "movedim") else memory.transpose(0, 4, 1, 2, 3)
    elif case.layout == "slice":
        wide = np.zeros((*shape[:-1], shape[-1] + 3))
        wide[..., 2:-1] = numbers[0]
        x = move(wide, case.dtype)[..., 2:-1]
    value, gradient = case.loss.value_and_grad(x, *arguments)
    with fl.use_backend("reference"):
        expected, right = case.loss.value_and_grad(*numbers)
    value, gradient = from_device(value), from_device(gradient)
    allowed = {"float64": 1e-12, "float16": 1e-3, "bfloat16": 8e-3}.get(case.dtype, 1e-6)
    error = np.linalg.norm(gradient - right) / np.linalg.norm(right)
    off = np.max(np.abs(value - expected) / np.abs(expected))
    if not (off <= (1e-12 if case.dtype == "float64" else 2e-6) and error <= 2 * allowed):
        return f"value off by {off:.1e}, gradient by {error:.1e}"
    return None


def main(through: str) -> int:
    wrong = 0
    move = {"cupy": to_cupy, "torch": to_torch, "numpy": to_numpy}[through]
    for case in CASES:
        terms = " + ".join(type(term).__name__ for _, term in fl.Loss(case.loss).terms)
        title = f"{terms}, {case.classes} classes, {case.dtype}, {case.layout}"
        try:
            found = run(case, move)
        except Unsupported as error:
            print(f"left out: {title}: {error}")
            continue
        wrong += found is not None
        print(f"right: {title}" if found is None else f"WRONG: {title}: {found}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1] if len(sys.argv) > 1 else "cupy"))
