"""Threads and processes: any number gives the same bits, and others are not disturbed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from support import NATIVE, example, need, need_backend, one_hot, run_python

import fastloss as fl

LOSS = fl.Dice() + fl.Dice(squared=True) + fl.CrossEntropy(label_smoothing=0.1) + fl.Focal()


@pytest.fixture(autouse=True)
def _threads_as_before(_reference: None) -> Iterator[None]:
    before = 1
    for name in NATIVE:
        with suppress(ImportError), fl.use_backend(name):
            before = max(before, fl.get_num_threads())
    yield
    fl.set_num_threads(before)


def same_bits(a: Any, b: Any) -> None:
    for one, other in zip(a, b, strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("classes", [1, 2, 5, 40])
def test_the_same_bits_for_any_number_of_threads(
    native_backend: str, classes: int, dtype: str
) -> None:
    for activation in ("softmax", "sigmoid", "none"):
        loss = fl.Loss(LOSS, activation=activation)
        voxels = 100_000 // classes + 37
        x, y = example(2, classes, (voxels,), dtype=dtype, activation=activation)
        if classes == 1:
            y[:] = 0
        results = []
        for threads in (1, 2, 7, 2):
            fl.set_num_threads(threads)
            results.append(loss.value_and_grad(x, y))
        for result in results[1:]:
            same_bits(result, results[0])


@pytest.mark.parametrize("kind", ["dense", "weighted", "channels last"])
def test_the_same_bits_for_other_inputs(native_backend: str, kind: str) -> None:
    x, y = example(3, 4, (37, 501), dtype=np.float32)
    target: Any = one_hot(y, 4) if kind == "dense" else y
    w = np.random.default_rng(0).uniform(size=y.shape) if kind == "weighted" else None
    if kind == "channels last":
        x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    results = []
    for threads in (1, 2, 7):
        fl.set_num_threads(threads)
        results.append(LOSS.value_and_grad(x, target, w))
    for result in results[1:]:
        same_bits(result, results[0])


def test_the_same_bits_from_run_to_run(backend: str) -> None:
    x, y = example(2, 5, (20_000,), dtype=np.float32)
    first = LOSS.value_and_grad(x, y)
    for _ in range(10):
        same_bits(LOSS.value_and_grad(x, y), first)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("classes", [2, 3, 4, 9, 40])
def test_the_same_bits_wherever_the_gradient_lies(
    native_backend: str, classes: int, dtype: str
) -> None:
    for loss in (fl.Dice() + fl.CrossEntropy(), fl.Dice() + fl.Focal(), fl.UnifiedFocal(), LOSS):
        size = np.dtype(dtype).itemsize
        # More than 1 MiB is written with non-temporal stores, by whole cache lines.
        voxels = (1 << 20) // (size * classes) // 2 + 1037
        x, y = example(2, classes, (voxels,), dtype=dtype)
        y[0] = np.arange(voxels) // 97 % classes
        y[1, voxels // 2 :] = np.arange(voxels - voxels // 2) // 1500 % classes
        rng = np.random.default_rng(0)
        some = rng.choice(voxels, 40, replace=False)
        x[:, :, some[:20]] *= 30
        x[0, 0, some[20:25]] = np.inf
        x[1, 1, some[25:30]] = -np.inf
        x[0, :, some[30:]] += 50
        memory = np.empty(x.nbytes + 128, np.uint8)
        start = -memory.ctypes.data % 64
        for target in (y, y.astype(np.uint8)):
            results = []
            for offset in (0, size, 16, 48, 64 - size):
                out = memory[start + offset :][: x.nbytes].view(dtype).reshape(x.shape)
                results.append(loss.value_and_grad(x, target, out=out)[1].copy())
            for result in results[1:]:
                same_bits([result], [results[0]])


def test_several_threads_at_once(backend: str) -> None:
    cases = [example(2, 3, (30_000 + i,), seed=i, dtype=np.float32) for i in range(4)]
    expected = [LOSS.value_and_grad(*case) for case in cases]

    def compute(i: int) -> Any:
        with fl.use_backend(backend):
            return LOSS.value_and_grad(*cases[i % 4])

    with ThreadPoolExecutor(6) as pool:
        for i, result in enumerate(pool.map(compute, range(36))):
            same_bits(result, expected[i % 4])


def test_a_backend_is_chosen_per_thread(backend: str) -> None:
    x, y = example(1, 3, (3000,), dtype=np.float32)
    expected = LOSS.gradient(x, y)

    def other(_: int) -> None:
        with fl.use_backend("reference"):
            LOSS.gradient(x, y)

    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(other, range(4)):
            same_bits([LOSS.gradient(x, y)], [expected])


# ------------------------------------------------------------------ the number of threads


@pytest.mark.parametrize("wrong", [1.5, "2", None, [1]])
def test_a_number_of_threads_that_is_no_number(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"^number: "):
        fl.set_num_threads(wrong)


@pytest.mark.parametrize("wrong", [0, -1])
def test_a_number_of_threads_below_one(wrong: int) -> None:
    with pytest.raises(ValueError, match=r"^number: "):
        fl.set_num_threads(wrong)


def test_set_and_get(native_backend: str) -> None:
    fl.set_num_threads(1)
    assert fl.get_num_threads() == 1
    fl.set_num_threads(np.int64(2))
    assert fl.get_num_threads() in (1, 2)  # Numba has no more than it started with


def test_set_before_the_backend_is_loaded(native_backend: str) -> None:
    out = run_python(
        "import fastloss as fl\nfl.set_num_threads(1)\n"
        f"with fl.use_backend({native_backend!r}):\n    print(fl.get_num_threads())\n"
    )
    assert int(out) == 1


def test_environment_limits_threads(native_backend: str) -> None:
    for threads in (1, 2):
        out = run_python(
            "import fastloss as fl; print(fl.get_num_threads())",
            FASTLOSS_BACKEND=native_backend,
            OMP_NUM_THREADS=str(threads),
            NUMBA_NUM_THREADS=str(threads),
        )
        assert int(out) == threads


def test_threadpoolctl_limits_threads() -> None:
    need("threadpoolctl")
    need_backend("cpu")
    out = run_python(
        "import numpy as np, threadpoolctl, fastloss as fl\n"
        "x, y = np.zeros((1, 2, 9999), 'f4'), np.zeros((1, 9999), int)\n"
        "fl.Dice().value_and_grad(x, y)\n"
        "before = fl.get_num_threads()\n"
        "with threadpoolctl.threadpool_limits(1):\n"
        "    print(fl.get_num_threads())\n"
        "    fl.Dice().value_and_grad(x, y)\n"
        "assert fl.get_num_threads() == before\n",
        FASTLOSS_BACKEND="cpu",
    )
    assert int(out) == 1


# ------------------------------------------------------------------ processes

PREPARE = """
import os, sys, signal
import numpy as np, fastloss as fl
loss = fl.Dice() + fl.CrossEntropy()
rng = np.random.default_rng(0)
x = rng.normal(size=(1, 3, 50_000)).astype(np.float32)
y = rng.integers(0, 3, (1, 50_000))
fl.set_num_threads(2)
value, gradient = loss.value_and_grad(x, y)
def check(_=None):
    again, other = loss.value_and_grad(x, y)
    return bool(again == value and np.array_equal(other, gradient))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_computes(native_backend: str) -> None:
    """A forked worker of a data loader computes, even if its parent has computed before."""
    out = run_python(
        PREPARE + "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(60)\n"
        "    os._exit(0 if check() else 3)\n"
        "status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])\n"
        "print(status, check())\n",
        FASTLOSS_BACKEND=native_backend,
    )
    assert out.split() == ["0", "True"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_pool_of_forked_processes_computes(native_backend: str) -> None:
    out = run_python(
        PREPARE + "import multiprocessing\n"
        "with multiprocessing.get_context('fork').Pool(3) as pool:\n"
        "    print(all(pool.map_async(check, range(8)).get(timeout=60)))\n"
        "print(check())\n",
        FASTLOSS_BACKEND=native_backend,
    )
    assert out.split() == ["True", "True"]


def test_a_spawned_process_computes_from_a_pickled_loss(native_backend: str) -> None:
    out = run_python(
        "import multiprocessing, numpy as np, fastloss as fl\n"
        "if __name__ == '__main__':\n"
        "    x, y = np.zeros((1, 2, 999), 'f4'), np.zeros((1, 999), int)\n"
        "    loss = fl.Dice() + fl.CrossEntropy()\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        value = pool.apply_async(loss, (x, y)).get(timeout=100)\n"
        "    print(value == loss(x, y))\n",
        FASTLOSS_BACKEND=native_backend,
    )
    assert out.strip() == "True"


# ------------------------------------------------------------------ the process's floating point


def test_denormal_numbers_survive(backend: str) -> None:
    """A library linked with -ffast-math would flush them to zero in the whole process."""
    out = run_python(
        "import threading, numpy as np\n"
        "def small():\n"
        "    a, b = np.float32(1e-38), np.array([5e-324, 1e-310])\n"
        "    c = np.full(1000, 1e-38, np.float32)\n"
        "    return bool(a / np.float32(8) > 0 and (b * 1.0 > 0).all() and 5e-324 / 1 > 0\n"
        "                and (c / 8 > 0).all() and (c / 8 + np.float32(0) > 0).all())\n"
        "results = [small()]\n"
        "import fastloss as fl\n"
        "results.append(small())\n"
        "loss = fl.Dice() + fl.CrossEntropy()\n"
        "loss.value_and_grad(np.ones((1, 2, 99999), 'f4'), np.zeros((1, 99999), int))\n"
        "results.append(small())\n"
        "thread = threading.Thread(target=lambda: results.append(small()))\n"
        "thread.start(); thread.join()\n"
        "print(all(results), len(results))\n",
        FASTLOSS_BACKEND=backend,
    )
    assert out.split() == ["True", "4"]


def test_small_gradients_are_not_flushed_to_zero(backend: str) -> None:
    """A float32 gradient below 1e-38 is stored as a denormal number."""
    x, y = example(1, 3, (300,), dtype=np.float32)
    gradient = fl.CrossEntropy().gradient(x, y, upstream=1e-37)
    assert (gradient != 0).all()
    expected = fl.CrossEntropy().gradient(x, y).astype(np.float64) * 1e-37
    np.testing.assert_allclose(gradient.astype(np.float64), expected, rtol=1e-2, atol=3e-45)


def test_no_floating_point_warning_escapes(backend: str) -> None:
    x, y = example(1, 3, (300,), dtype=np.float32)
    x[0, :, 0] = [np.inf, -np.inf, 0]
    x[0, :, 1] = 1e30
    with np.errstate(all="raise"):
        fl.Dice().value_and_grad(x, y)
