"""Takes many training steps of a small volume in JAX and TensorFlow, and watches the memory.

    python benchmarks/leaks.py [--steps 10000] [--framework NAME]

Dice + cross-entropy and its gradient, 3 classes of 8³. The resident memory of the process is read
after a tenth of the steps and at the end. The script fails where it has grown by more than 100
bytes a step, and 1 MB in all. A framework that is not installed is named and left out. For systems
with /proc.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import fastloss as fl

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
LOSS = fl.Dice() + fl.CrossEntropy()
LIMIT = 100
"""Bytes a step: a gradient of this size has 6144."""
Steps = Iterator[tuple[str, Callable[[], object]]]


def jax(logits: np.ndarray, labels: np.ndarray) -> Steps:
    import jax

    x, y = jax.numpy.asarray(logits), jax.numpy.asarray(labels)
    own = jax.value_and_grad(LOSS.__call__)
    compiled = jax.jit(own)
    yield "jax, jit", lambda: jax.block_until_ready(compiled(x, y))
    yield "jax, not compiled", lambda: jax.block_until_ready(own(x, y))


def tensorflow(logits: np.ndarray, labels: np.ndarray) -> Steps:
    import tensorflow as tf

    x, y = tf.constant(logits), tf.constant(labels)

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = LOSS(x, y)
        return value, tape.gradient(value, x)

    graph, compiled = tf.function(step), tf.function(step, jit_compile=True)
    yield "tensorflow, eager", lambda: step(x, y)
    yield "tensorflow, tf.function", lambda: graph(x, y)
    yield "tensorflow, jit_compile", lambda: compiled(x, y)


FRAMEWORKS = {"jax": jax, "tensorflow": tensorflow}


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=10_000, help="of each (default: 10000)")
    parser.add_argument("--framework", choices=FRAMEWORKS, action="append", help="default: all")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1, 3, 8, 8, 8)).astype(np.float32)
    labels = rng.integers(0, 3, (1, 8, 8, 8), dtype=np.int32)
    leaks = []
    for framework in options.framework or FRAMEWORKS:
        try:
            steps = list(FRAMEWORKS[framework](logits, labels))
        except ImportError as error:
            print(f"{framework}: left out, {error}")
            continue
        for name, step in steps:
            for _ in range(options.steps // 10):
                step()
            before, start = resident(), time.perf_counter()
            for _ in range(options.steps):
                step()
            grown, seconds = resident() - before, time.perf_counter() - start
            print(
                f"{name:26} {options.steps} steps, {1e6 * seconds / options.steps:7.1f} µs each, "
                f"{grown / 1e6:+.2f} MB",
                flush=True,
            )
            if grown > max(LIMIT * options.steps, 1_000_000):
                leaks.append(name)
    if leaks:
        sys.exit(f"memory grows: {', '.join(leaks)}")


if __name__ == "__main__":
    main()
