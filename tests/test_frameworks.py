"""JAX and TensorFlow in many steps, in other processes, and absent."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import ROOT, need, run_python

import fastloss as fl

pytestmark = pytest.mark.slow

LOSS = fl.Dice() + fl.CrossEntropy()


def steps(name: str) -> list[Callable[[], Any]]:
    """Training steps of a volume of 8³."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1, 3, 8, 8, 8)).astype(np.float32)
    labels = rng.integers(0, 3, (1, 8, 8, 8), dtype=np.int32)
    if name == "jax":
        jax = need("jax")
        x, y = jax.numpy.asarray(logits), jax.numpy.asarray(labels)
        compiled = jax.jit(jax.value_and_grad(LOSS.__call__))
        return [lambda: jax.block_until_ready(compiled(x, y))]
    support = need("tensorflow_support")
    tf = support.tf
    x, y = tf.constant(logits), tf.constant(labels)
    functions = [tf.function(support.by_tape, jit_compile=jit) for jit in (False, True)]
    return [lambda f=f: f(LOSS, x, y) for f in functions]


@pytest.mark.parametrize("name", ["jax", "tensorflow"])
def test_steps_leave_no_memory_behind(name: str) -> None:
    """Of 600 steps, less than a tenth of their gradients; benchmarks/leaks.py takes 10 000."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("/proc: this system tells no resident memory")
    for step in steps(name):
        for _ in range(100):
            step()
        before = int(statm.read_text("ascii").split()[1])
        for _ in range(600):
            step()
        grown = (int(statm.read_text("ascii").split()[1]) - before) * os.sysconf("SC_PAGE_SIZE")
        assert grown < 600 * 3 * 8**3 * 4 / 10


CHILDREN = """
import multiprocessing, os, sys
import numpy as np
import fastloss as fl

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
FRAMEWORK, LOSS = sys.argv[1], fl.Dice() + fl.CrossEntropy()
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(1, 3, 9, 9)).astype("f4"), RNG.integers(0, 3, (1, 9, 9))


def in_numpy(_=None):
    return np.asarray(LOSS.value_and_grad(X, Y)[1])


def in_framework(_=None):
    if FRAMEWORK == "jax":
        import jax

        return np.asarray(jax.jit(jax.grad(LOSS.__call__))(X, Y))
    import tensorflow as tf

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = LOSS(x, y)
        return tape.gradient(value, x)

    return step(X, Y).numpy()


def same(method, function):
    with multiprocessing.get_context(method).Pool(1) as pool:
        found = pool.map_async(function, [0]).get(timeout=100)[0]
    np.testing.assert_allclose(found, in_numpy(), rtol=1e-6, atol=1e-9)


if __name__ == "__main__":
    if hasattr(os, "fork"):
        same("fork", in_framework)  # before this process has used the framework
    np.testing.assert_allclose(in_framework(), in_numpy(), rtol=1e-6, atol=1e-9)
    if hasattr(os, "fork"):
        same("fork", in_numpy)  # as a worker that loads data, after it has
    same("spawn", in_framework)
    print("equal")
"""


@pytest.mark.parametrize("name", ["jax", "tensorflow"])
def test_child_processes_compute_the_same(name: str, tmp_path: Path) -> None:
    """Forked and spawned ones, before and after their parent has.

    Neither JAX nor TensorFlow itself works in a child that is forked after its parent has used it:
    there the loss of NumPy's arrays does.
    """
    need(name)
    script = tmp_path / "children.py"
    script.write_text(CHILDREN)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    result = subprocess.run(
        [sys.executable, "-W", "ignore", script, name],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )
    assert result.stdout.strip() == "equal", result.stderr


def test_absent_frameworks_are_named() -> None:
    """Tests that need one are skipped by its name, none fails, and the loss works."""
    absent = ("jax", "optax", "tensorflow", "keras", "dask")
    files = [str(path) for name in absent for path in (ROOT / "tests").glob(f"test_{name}*.py")]
    out = run_python(
        f"import sys\nfor name in {absent!r}: sys.modules[name] = None\n"
        "import numpy as np, pytest, fastloss as fl\n"
        "assert fl.Dice()(np.zeros((1, 2, 9), 'f4'), np.zeros((1, 9), int)) > 0\n"
        f"options = ['-q', '-rs', '-o', 'addopts=', '-p', 'no:cacheprovider', *{files!r}]\n"
        "sys.exit(pytest.main(options) not in (0, pytest.ExitCode.NO_TESTS_COLLECTED))\n",
        FASTLOSS_REQUIRE=None,
    )
    skipped = [line for line in out.splitlines() if line.startswith("SKIPPED")]
    for name in ("jax: ", "tensorflow: ", "dask"):  # the others need these
        assert any(name in line for line in skipped), out
