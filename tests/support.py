"""Helpers of several test modules: arrays, skips, and two sources of the right answer."""

from __future__ import annotations

import importlib
import mmap
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastloss as fl
from fastloss.backends import add_backend

EMULATED = "emulated cuda"
"""The CUDA kernels, run on the CPU."""
NATIVE = ("cpu", "numba", "reference")
BACKENDS = (*NATIVE, EMULATED)
if os.environ.get("FASTLOSS_TEST_DEVICE") == "cuda":
    BACKENDS += ("cuda",)  # the kernels on a GPU, over copies of the arrays
ROOT = Path(__file__).resolve().parent.parent
REQUIRED = frozenset(filter(None, os.environ.get("FASTLOSS_REQUIRE", "").split(",")))
"""The packages installed in continuous integration: their absence is a failure, not a skip."""


def need(module: str) -> Any:
    """The optional module; skip with its name if missing, or fail if FASTLOSS_REQUIRE lists it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        return _absent(module, error)


def need_gloo() -> None:
    """Skip where PyTorch has no gloo backend; fail where PyTorch is required."""
    distributed = need("torch.distributed")
    if not (distributed.is_available() and distributed.is_gloo_available()):
        _absent("torch.distributed", ImportError("built without gloo"))


def need_lazy_free() -> None:
    """Skip (fail if required) where the system has no MADV_FREE, or does not report its pages."""
    try:
        before = lazily_freed()
        trial = mmap.mmap(-1, 1 << 24, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        trial[:: mmap.PAGESIZE] = bytes((1 << 24) // mmap.PAGESIZE)
        trial.madvise(mmap.MADV_FREE)
        marked = lazily_freed() - before
    except (AttributeError, OSError) as error:
        _absent("lazy-free", ImportError(f"memory cannot be marked as free: {error}"))
    else:
        if marked < 1 << 23:
            _absent("lazy-free", ImportError("memory that is marked as free is not told of"))


def lazily_freed() -> int:
    """Bytes of this process that are marked as free and not yet reclaimed."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("LazyFree")) * 1024


def need_backend(name: str) -> str:
    """The name of a backend that runs here; skip (fail if required) with its name otherwise."""
    if name in (EMULATED, "cuda"):
        _add_device(name)
    try:
        with fl.use_backend(name):
            return name
    except ImportError as error:
        _absent(name, error)
        raise


@cache
def _add_device(name: str) -> None:
    from device_backend import CudaTestBackend, EmulatedBackend

    add_backend(EmulatedBackend(name) if name == EMULATED else CudaTestBackend(name))


def _absent(name: str, error: ImportError) -> None:
    if name.partition(".")[0] in REQUIRED:
        pytest.fail(f"{name} is required by FASTLOSS_REQUIRE, but: {error}", pytrace=False)
    pytest.skip(f"{name}: {error}", allow_module_level=True)


def made_once(folder: Path, name: str, make: Callable[[], Any]) -> Any:
    """What a costly function makes, in one of the workers that share the folder, for all."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return make()
    from cuda_emulation import locked

    path = folder / f"{name}.pickle"
    with locked(path):
        if not path.exists():
            path.write_bytes(pickle.dumps(make()))
        return pickle.loads(path.read_bytes())


def python(
    code: str, *, timeout: float = 300, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """Run a script in a fresh interpreter, with these environment variables set (None: unset)."""
    if environment.get("FASTLOSS_BACKEND") == EMULATED:  # which only tests know
        environment["FASTLOSS_BACKEND"] = None
        start = f"import support, fastloss.backends as b; support.need_backend({EMULATED!r})\n"
        code = start + f"_chosen = b.use_backend({EMULATED!r}); _chosen.__enter__()\n" + code
    variables = dict(os.environ)
    for name, value in environment.items():
        if value is None:
            variables.pop(name, None)
        else:
            variables[name] = value
    # The script must not depend on the environment of the test suite.
    path = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=variables,
        check=False,
    )


def run_python(code: str, *, timeout: float = 300, **environment: str | None) -> str:
    """As `python`, for a script that must succeed; its output."""
    result = python(code, timeout=timeout, **environment)
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stdout}{result.stderr}"
    return result.stdout


def example(
    batch: int = 2,
    classes: int = 3,
    spatial: tuple[int, ...] = (3, 4),
    *,
    seed: int = 0,
    dtype: Any = np.float64,
    activation: str = "softmax",
) -> tuple[np.ndarray, np.ndarray]:
    """Logits (or probabilities for "none") and a label map in which every class occurs."""
    rng = np.random.default_rng(seed)
    shape = (batch, classes, *spatial)
    if activation == "none":
        x = rng.uniform(0.05, 0.95, shape)
        x = x / x.sum(axis=1, keepdims=True) if classes > 1 else x
    else:
        x = 2 * rng.normal(size=shape)
    y = rng.integers(0, classes, (batch, *spatial))
    y.reshape(batch, -1)[:, :classes] = np.arange(classes)[: y[0].size]
    return x.astype(dtype), y


def packed(array: np.ndarray) -> np.ndarray:
    """The same numbers as a misaligned field of packed records."""
    records = np.zeros(array.shape, [("skipped", "u1"), ("numbers", array.dtype)])
    records["numbers"] = array
    return records["numbers"]


def one_hot(labels: np.ndarray, classes: int, dtype: Any = np.float64) -> np.ndarray:
    """(B, *spatial) to (B, C, *spatial); labels that are no class are 0 in all channels."""
    return np.stack([labels == c for c in range(classes)], axis=1).astype(dtype)


def norm(array: Any) -> float:
    return float(np.linalg.norm(np.asarray(array, np.float64).ravel()))


def finite_differences(
    loss: Any, x: np.ndarray, y: Any, w: Any = None, upstream: Any = None, step: float = 1e-6
) -> np.ndarray:
    """The gradient of Σ upstream · loss by central differences, in float64."""
    x = x.astype(np.float64)
    gradient = np.empty_like(x)
    with fl.use_backend("reference"):
        for i in np.ndindex(x.shape):
            ends = []
            for sign in (1, -1):
                moved = x.copy()
                moved[i] += sign * step
                ends.append(np.asarray(loss(moved, y, w)))
            slope = (ends[0] - ends[1]) / (2 * step)
            gradient[i] = np.sum(slope if upstream is None else upstream * slope)
    return gradient


def reference(loss: Any, x: Any, y: Any, w: Any = None, **options: Any) -> tuple[Any, np.ndarray]:
    """Value and gradient by the reference backend, from the same numbers in float64."""
    with fl.use_backend("reference"):
        return loss.value_and_grad(np.asarray(x).astype(np.float64), y, w, **options)


def tolerances(dtype: Any) -> tuple[float, float, float]:
    """Tolerances: relative for values, in norm for gradients, and the dtype's least step."""
    return {
        "float64": (1e-12, 1e-12, 0.0),
        "float32": (1e-6, 1e-6, 0.0),
        "float16": (1e-6, 1e-3, 2.0**-24),
        "bfloat16": (1e-6, 8e-3, 0.0),
    }[np.dtype(dtype).name]


def assert_agree(
    value: Any,
    gradient: Any,
    expected: tuple[Any, np.ndarray],
    scale: float = 0.0,
    value_scale: float = 0.5,
) -> None:
    """Value and gradient agree with a float64 evaluation, to what the dtype promises.

    ``scale`` is the norm of the gradient, and ``value_scale`` the size of the value, without
    cancellation: after cancellation only rounding errors remain.
    """
    expected_value, expected_gradient = expected
    gradient = np.asarray(gradient)
    by_value, by_gradient, step = tolerances(gradient.dtype)
    np.testing.assert_allclose(value, expected_value, rtol=by_value, atol=by_value * value_scale)
    error = norm(gradient.astype(np.float64) - expected_gradient)
    fine = 1e-12 if gradient.dtype == np.float64 else 1e-6
    allowed = by_gradient * norm(expected_gradient) + fine * scale + step * np.sqrt(gradient.size)
    assert error <= allowed, f"gradient off by {error:.3g}, allowed {allowed:.3g}"
