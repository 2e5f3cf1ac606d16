"""Times the loss in frameworks that compile: against their own formulas, and against NumPy.

    python benchmarks/frameworks.py [--framework NAME] [--sizes C4-128,C14-96] [--repeats 3]
                                     [--keep-memory] [--cold]

Dice + cross-entropy, value and gradient, float32 logits and a label map. Implementations
take turns in one process, each in a loop of 0.4 s as in training, of which the second half counts,
as `python -m fastloss bench` does; a row gives medians. With ``--cold`` each is called once in its
turn, with logits that other calls have driven out of the caches. A framework that is not installed
is named and left out. Set the number of threads by OMP_NUM_THREADS and, for XLA, NPROC.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
from frameworks_tensorflow import WITHOUT, keras_step, tensorflow

import fastloss as fl
from fastloss.bench.measure import Timed, interleave

SIZES = {"C4-32": (4, 32), "C4-128": (4, 128), "C14-96": (14, 96)}
Call = Callable[[], object]
SMOOTH = 1e-5


def arrays(classes: int, edge: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits (1, C, *edge³) and labels that are constant in blocks, as organs are."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1, classes, edge, edge, edge)).astype(np.float32)
    coarse = rng.integers(0, classes, (1, *[-(-edge // 8)] * 3), dtype=np.int32)
    for axis in (1, 2, 3):
        coarse = coarse.repeat(8, axis=axis)
    return logits, np.ascontiguousarray(coarse[:, :edge, :edge, :edge])


def jax(logits: np.ndarray, labels: np.ndarray) -> tuple[dict[str, Call], dict[str, str]]:
    """The calls, and of which the ratios to ours are wanted, with the demand."""
    import jax
    import jax.numpy as jnp
    import optax

    loss = fl.Dice() + fl.CrossEntropy()
    last = fl.Loss(fl.Dice(), fl.CrossEntropy(), channel_axis=-1)
    classes = logits.shape[1]
    x, y = jnp.asarray(logits), jnp.asarray(labels)
    x_last = jnp.asarray(np.ascontiguousarray(np.moveaxis(logits, 1, -1)))

    def plain(x: Any, y: Any) -> Any:
        log_p = jax.nn.log_softmax(x, axis=1)
        p, g = jnp.exp(log_p), jax.nn.one_hot(y, classes, axis=1, dtype=x.dtype)
        o, size, truth = ((a).sum((2, 3, 4)) for a in (p * g, p, g))
        dice = 1 - (2 * o + SMOOTH) / (size + truth + SMOOTH)
        return dice.mean() - (g * log_p).sum(1).mean()

    def optax_own(x: Any, y: Any) -> Any:
        g = jax.nn.one_hot(y, classes, dtype=x.dtype)
        entropy = optax.softmax_cross_entropy(x, g).mean()
        return optax.losses.dice_loss(x, g, smooth=SMOOTH).mean() + entropy

    def compiled(function: Any, *arrays: Any) -> Call:
        call = jax.jit(jax.value_and_grad(function))
        return lambda: jax.block_until_ready(call(*arrays))

    eager = jax.value_and_grad(loss.__call__)
    calls = {
        "fastloss, NumPy, fresh gradient": lambda: loss.value_and_grad(logits, labels),
        "fastloss, jit": compiled(loss.__call__, x, y),
        "fastloss, jit, channels last": compiled(last.__call__, x_last, y),
        "fastloss, not compiled": lambda: jax.block_until_ready(eager(x, y)),
        "plain formula, jit": compiled(plain, x, y),
        "optax, jit": compiled(optax_own, x_last, y),
    }
    return calls, {
        "fastloss, NumPy, fresh gradient": "≥ 0.8×",
        "plain formula, jit": "≥ 12×",
        "optax, jit": "≥ 12×",
    }


FRAMEWORKS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "jax": (jax, ("jax", "optax")),
    "tensorflow": (tensorflow, ("tensorflow", "keras")),
    "keras": (keras_step, ("tensorflow", "keras")),
}
"""By name: the function that makes the calls, with "fastloss, jit" or another for ours, and the
packages that it needs."""
OURS = {"jax": "fastloss, jit", "tensorflow": "fastloss, tf.function", "keras": "fastloss"}


def one_by_one(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Median seconds of single calls in turn, after two calls to warm up."""
    for call in calls.values():
        call()
        call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - start)
    return {name: median(own) for name, own in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--framework", choices=FRAMEWORKS, action="append", help="default: all")
    parser.add_argument("--sizes", default="C4-128,C14-96", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--repeats", type=int, default=3, help="loops of every call (default: 3)")
    parser.add_argument("--cold", action="store_true", help="single calls in turn, no loops")
    parser.add_argument(
        "--keep-memory", action="store_true", help="call fastloss.jax.keep_memory() first"
    )
    options = parser.parse_args()
    if options.keep_memory and not importlib.import_module("fastloss.jax").keep_memory():
        parser.error("--keep-memory: this C library cannot do it")
    unknown = set(options.sizes.split(",")) - set(SIZES)
    if unknown:
        parser.error(f"--sizes: expected some of {', '.join(SIZES)}, got {', '.join(unknown)}")
    print(f"{fl.get_num_threads()} threads; ms, and the ratio to ours in the framework\n")
    for framework in options.framework or FRAMEWORKS:
        make, packages = FRAMEWORKS[framework]
        absent = [name for name in packages if not _is_there(name)]
        if absent:
            print(f"{framework}: left out, as {', '.join(absent)} is not installed\n")
            continue
        for size in options.sizes.split(","):
            calls, demands = make(*arrays(*SIZES[size]))
            if options.cold:
                found = one_by_one(calls, 10 * options.repeats)
            else:
                timed = {name: Timed(call) for name, call in calls.items()}
                found = interleave(timed, options.repeats)
            without = found.pop(WITHOUT, 0.0)
            if without:
                print(f"without the loss a step takes {1e3 * without:.2f} ms, which are taken off")
                found = {name: own - without for name, own in found.items()}
            ours = found[OURS[framework]]
            print(f"{framework}, {size}³")
            for name, own in found.items():
                demand = f"  demanded {demands[name]}" if name in demands else ""
                print(f"  {name:34} {1e3 * own:9.2f} {own / ours:7.2f}×{demand}")
            print(flush=True)


def _is_there(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    main()
