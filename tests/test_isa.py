"""The C++ kernels of every instruction set that this processor supports."""

from __future__ import annotations

import pytest
from support import need_backend, python, run_python

import fastloss as fl

MATRIX = """
import numpy as np, fastloss as fl
from support import assert_agree, example, one_hot, reference
fl.set_num_threads(1)  # the instructions matter here; other tests see to threads
count = 0
terms = fl.Dice() + fl.Dice(squared=True) + fl.CrossEntropy(label_smoothing=0.1) \\
    + fl.Focal() + fl.Focal(gamma=0.5)
try:
    from ml_dtypes import bfloat16
except ImportError:
    bfloat16 = np.float16
plain = fl.Dice() + fl.CrossEntropy()
smooth = fl.Dice() + fl.CrossEntropy(label_smoothing=0.1)
cases = [(terms, "softmax"), (terms, "sigmoid"), (terms, "none"), (plain, "softmax"),
         (smooth, "softmax")]
for parts, activation in cases:
    loss = fl.Loss(parts, activation=activation, ignore_index=255)
    for dtype in (np.float32, np.float16, bfloat16, np.float64):
        sizes = (1, 257), (2, 7), (2, 1030), (3, 255), (5, 1), (14, 300), (33, 257)
        for classes, voxels in sizes:
            x, y = example(2, classes, (voxels,), dtype=dtype, activation=activation)
            last = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
            y[:, ::11] = 255
            w = np.random.default_rng(1).uniform(size=y.shape).astype(np.float32)
            targets = [(y.astype(np.uint8), None), (y, w)]
            if classes > 1:
                targets.append((one_hot(y, classes, np.float32), None))
            for target, weight in targets:
                expected = reference(loss, x, target, weight)
                for given in (x, last):
                    value, gradient = loss.value_and_grad(given, target, weight)
                    assert_agree(value, gradient, expected, 3 / np.sqrt(2 * voxels))
                    count += 1
for dtype in (np.float32, np.float64):
    x, y = example(1, 4, (64,), dtype=dtype)
    x.view(f"i{x.itemsize}")[0, 1, 3] = -1  # all bits: another NaN than NumPy's
    assert np.isnan(plain(x, y))
# Few classes and a label for every voxel; tiles are told apart by having one label or several.
# Logits that decide nothing, all that a number can hold, or more.
random = np.random.default_rng(2)
for dtype in (np.float32, np.float16, bfloat16, np.float64):
    for classes in (2, 3, 4):
        for y in (np.zeros((1, 1040)), np.ones((1, 1040)), random.integers(0, classes, (1, 1040))):
            for apart in (0, 1, 60, 88, 300):
                x = (apart * random.uniform(0.98, 1, (1, classes, 1040)) / 2).astype(dtype)
                x *= random.choice([-1, 1], x.shape).astype(dtype)
                for infinite in (False, True):
                    if infinite:
                        x[0, :2, 600] = np.inf  # which both share
                        x[0, int(y[0, 601]), 601] = np.inf
                        x[0, -1, y[0] == 0] = -np.inf
                    last = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
                    expected = reference(plain, x, y)
                    for target, given in ((y.astype(np.uint8), x), (y.astype(np.int64), last)):
                        value, gradient = plain.value_and_grad(given, target)
                        assert_agree(value, gradient, expected, 3 / np.sqrt(2 * 1040))
                        count += 1
# Gradients that are written past the caches, from any place in memory.
for dtype in (np.float32, np.float16, bfloat16, np.float64):
    for classes, order in ((2, "first"), (2, "last"), (3, "last"), (4, "last"), (5, "first"),
                           (14, "last")):
        x, y = example(1, classes, (900_000 // classes,), dtype=dtype)
        if order == "last":
            x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
        expected = plain.gradient(x, y, out=np.empty(x.shape, dtype))
        for shift in (0, 1, 4, 7, 8):
            memory = np.full(x.size + 32, 7, dtype)
            aligned = -memory.ctypes.data % 64 // x.itemsize
            out = memory[aligned + shift :][: x.size]
            out = out.reshape(1, -1, classes) if order == "last" else out.reshape(x.shape)
            out = np.moveaxis(out, -1, 1) if order == "last" else out
            plain.gradient(x, y, out=out)
            assert (out == expected).all(), (dtype, classes, order, shift)
            assert (memory[: aligned + shift] == 7).all()
            assert (memory[aligned + shift + x.size :] == 7).all()
# Maps of regions of every class: few of them or many, and voxels without one; logits that are far
# apart.
for dtype in (np.float32, np.float16, bfloat16, np.float64):
    for classes, regions, spread in ((2, 20, 5), (3, 50, 1), (4, 20, 40), (4, 90, 1), (6, 20, 5)):
        shape = (1, classes, 1100)
        x = (spread * random.normal(size=shape)).astype(dtype)
        y = np.repeat(random.integers(0, classes, (1, 55)), 20, -1)
        cells = np.repeat(random.integers(0, regions, (1, classes, 220)), 5, -1).astype(np.int8)
        loss = fl.Loss(fl.PerRegion(plain, regions="given", per_class=True), ignore_index=255)
        for holes in (False, True):
            if holes:
                y[:, ::11], cells[:, :, ::7] = 255, -1
            found = loss.value_and_grad(x, y.astype(np.uint8), regions=cells)
            expected = reference(loss, x, y, regions=cells)
            assert_agree(*found, expected, 1.0, max(abs(expected[0]), 0.5))
            count += 1
# The likeliest class; NaN counts as larger than all numbers, and the first of equal numbers wins.
for dtype in (np.float32, np.float16, bfloat16, np.float64):
    for classes, voxels in ((2, 530), (3, 16), (5, 1100), (9, 31)):
        x = random.integers(-2, 3, (2, classes, voxels)).astype(dtype)
        x[random.random(x.shape) < 0.1] = np.nan
        expected = x.astype(np.float64).argmax(1)
        for given in (x, np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)):
            matrix = fl.metrics.confusion_matrix(given, expected)
            assert np.trace(matrix) == matrix.sum() == 2 * voxels, (dtype, classes, voxels)
print(fl.backends.load_backend("cpu").isa, count)
"""


def isas() -> list[str]:
    try:
        from fastloss.backends.cpu import BACKEND
    except ImportError:
        return ["none"]
    return list(BACKEND.isas)


@pytest.mark.slow
@pytest.mark.parametrize("name", isas())
def test_every_instruction_set_is_right(name: str) -> None:
    need_backend("cpu")
    # Fresh memory from malloc holds 0x7f bytes, large numbers, so that use before initialisation
    # shows.
    out = run_python(
        MATRIX, FASTLOSS_BACKEND="cpu", FASTLOSS_ISA=name, MALLOC_PERTURB_="128", timeout=300
    )
    chosen, count = out.split()
    assert chosen == name
    assert int(count) > 400


def test_unknown_instruction_set() -> None:
    need_backend("cpu")
    result = python(
        "import numpy as np, fastloss as fl\n"
        "fl.Dice()(np.zeros((1, 2, 9), 'f4'), np.zeros((1, 9), int))",
        FASTLOSS_BACKEND="cpu",
        FASTLOSS_ISA="quantum",
    )
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "FASTLOSS_ISA" in last
    assert "quantum" in last
    assert all(name in last for name in isas())


def test_the_best_instruction_set_is_the_default() -> None:
    need_backend("cpu")
    names = isas()
    out = run_python(
        "import fastloss as fl; print(fl.backends.load_backend('cpu').isa)",
        FASTLOSS_ISA=None,
        FASTLOSS_BACKEND=None,
    )
    assert out.strip() in names
    assert fl.backends.load_backend("cpu").isa in names
