"""The C++ kernels of every instruction set that this processor runs."""

from __future__ import annotations

import pytest
from support import need_backend, python, run_python

import fastloss as fl

MATRIX = """
import numpy as np, fastloss as fl
from support import assert_agree, example, norm, one_hot, reference
count = 0
terms = fl.Dice() + fl.Dice(squared=True) + fl.CrossEntropy(label_smoothing=0.1) \\
    + fl.Focal() + fl.Focal(gamma=0.5)
try:
    from ml_dtypes import bfloat16
except ImportError:
    bfloat16 = np.float16
for activation in ("softmax", "sigmoid", "none"):
    loss = fl.Loss(terms, activation=activation, ignore_index=255)
    for dtype in (np.float32, np.float16, bfloat16, np.float64):
        for classes in (1, 2, 3, 14, 17, 105):
            for voxels in (1, 7, 255, 257, 1030):
                x, y = example(2, classes, (voxels,), dtype=dtype, activation=activation)
                y[:, ::11] = 255
                if classes == 1 and activation != "softmax":
                    y[:, 1::3] = 1
                targets = [y.astype(np.uint8), y]
                if classes > 1:
                    targets.append(one_hot(y, classes, np.float32))
                w = np.random.default_rng(1).uniform(size=y.shape).astype(np.float32)
                for target in targets:
                    for weight in (None, w):
                        for back in (False, True):
                            expected = reference(loss, x, target, weight)
                            scale = 3 / np.sqrt(2 * voxels) * max(1.0, np.abs(w).max())
                            given = x
                            if back:
                                given = np.ascontiguousarray(np.moveaxis(x, 1, -1))
                                given = np.moveaxis(given, -1, 1)
                            value, gradient = loss.value_and_grad(given, target, weight)
                            assert_agree(value, gradient, expected, scale)
                            count += 1
                    if voxels > 257:
                        break
print(fl.backends.load_backend("cpu").isa, count)
"""


def isas() -> list[str]:
    try:
        from fastloss.backends.cpu import BACKEND
    except ImportError:
        return ["none"]
    return list(BACKEND.isas)


@pytest.mark.parametrize("name", isas())
def test_every_instruction_set_is_right(name: str) -> None:
    need_backend("cpu")
    out = run_python(MATRIX, FASTLOSS_BACKEND="cpu", FASTLOSS_ISA=name, timeout=300)
    chosen, count = out.split()
    assert chosen == name
    assert int(count) > 500


def test_unknown_instruction_set() -> None:
    need_backend("cpu")
    result = python(
        "import numpy as np, fastloss as fl\n"
        "fl.Dice()(np.zeros((1, 2, 9), 'f4'), np.zeros((1, 9), int))",
        FASTLOSS_BACKEND="cpu", FASTLOSS_ISA="quantum",
    )
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "FASTLOSS_ISA" in last and "quantum" in last
    assert all(name in last for name in isas())


def test_the_best_instruction_set_is_the_default() -> None:
    need_backend("cpu")
    names = isas()
    out = run_python(
        "import fastloss as fl; print(fl.backends.load_backend('cpu').isa)",
        FASTLOSS_ISA=None, FASTLOSS_BACKEND=None,
    )
    assert out.strip() in names
    assert fl.backends.load_backend("cpu").isa in names
