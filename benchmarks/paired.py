"""Times two checkouts of the library on the same calls, in turn: is one slower?

    git worktree add ../before COMMIT && (cd ../before && python setup.py build_ext --inplace)
    python benchmarks/paired.py ../before [CASE ...] [--restarts N] [--pairs N]

Each checkout runs in its own process. The two time every call alternately, and both processes are
restarted several times, as the addresses of arrays change times by some per cent. A row gives the
median ratio of this checkout's time to the other's, and its quartiles.

A CASE is SIZE/DTYPE/LAYOUT/TARGET/LOSS/THREADS/HOW, as in the rows; parts may be shell patterns,
and several cases may be given. Default: all.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from statistics import quantiles
from typing import Any

SIZES = {
    "tiny": (1, 2, 16, 16, 16),
    "small": (1, 4, 32, 32, 32),
    "C2": (2, 2, 96, 96, 96),
    "C4": (1, 4, 96, 96, 96),
    "C14": (1, 14, 80, 80, 80),
    "C105": (1, 105, 48, 48, 48),
}
SLICE = 0.06  # seconds of calls that make one sample


def cases() -> list[str]:
    """Small calls by every way of calling; large ones in every dtype, layout and kind of loss."""
    found = []
    for size in ("tiny", "small"):
        ways = ("value", "gradient", "autograd", "numpy-value", "numpy-gradient", "function")
        found += [f"{size}/f4/first/u1/dice_ce/1/{how}" for how in ways]
        found += [f"{size}/f4/first/u1/dice_focal/1/gradient"]
        found += [f"{size}/f4/first/dense/sigmoid/1/gradient"]
    for size in ("C2", "C4", "C14", "C105"):
        found += [
            f"{size}/{dtype}/first/u1/dice_ce/1/gradient" for dtype in ("f4", "f2", "bf", "f8")
        ]
        found += [f"{size}/{dtype}/first/u1/dice_ce/1/value" for dtype in ("f4", "bf")]
        found += [f"{size}/{dtype}/last/u1/dice_ce/1/gradient" for dtype in ("f4", "bf")]
        found += [f"{size}/f4/first/{target}/dice_ce/1/gradient" for target in ("i8", "dense")]
        found += [f"{size}/{dtype}/first/dense/sigmoid/1/gradient" for dtype in ("f4", "bf")]
        found += [f"{size}/f4/first/dense/none/1/gradient"]
        kinds = ("dice_focal", "top_k", "smoothed", "weighted", "ce", "tversky")
        found += [f"{size}/f4/first/u1/{kind}/1/gradient" for kind in kinds]
        found += [f"{size}/f4/first/u1/dice_ce/1/autograd"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("other", type=Path, help="another checkout, its kernels built in place")
    parser.add_argument("cases", nargs="*", default=["*"])
    parser.add_argument("--restarts", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    names = [n for n in cases() if any(fnmatch(n, pattern) for pattern in options.cases)]
    if not names:
        parser.error(f"no case is like {', '.join(options.cases)}")
    roots = [options.other.resolve(), Path(__file__).resolve().parents[1]]
    for root in roots:
        if not (root / "fastloss").is_dir():
            parser.error(f"expected a checkout of fastloss, got {root}")
    ratios: dict[str, list[float]] = defaultdict(list)
    times: dict[str, float] = {}
    for _ in range(options.restarts):
        workers = [Worker(root) for root in roots]
        for name in names:
            seconds = max(worker.ask(name, 2) for worker in workers)
            count = max(1, int(SLICE / seconds))
            for turn in range(options.pairs):
                order = workers if turn % 2 == 0 else workers[::-1]
                took = {worker: worker.ask(name, count) for worker in order}
                ratios[name].append(took[workers[1]] / took[workers[0]])
                times[name] = took[workers[1]]
        for worker in workers:
            worker.end()
    print(f"{'case':<42} {'µs':>9}  ratio (quartiles)")
    for name in names:
        low, middle, high = quantiles(ratios[name], n=4, method="inclusive")
        print(f"{name:<42} {times[name] * 1e6:9.1f}  {middle:.3f} ({low:.3f}–{high:.3f})")


class Worker:
    """A process that imports one checkout."""

    def __init__(self, root: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
        )

    def ask(self, name: str, count: int) -> float:
        """Seconds per call, over this many consecutive calls."""
        assert self.process.stdin
        assert self.process.stdout
        print(name, count, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{name}: the process of {self.process.args!r} ended")
        return float(answer)

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def work(root: str) -> None:
    """Answer the questions of `Worker.ask`."""
    sys.path.insert(0, root)
    import fastloss

    if not fastloss.__file__.startswith(root):
        raise SystemExit(f"expected the library of {root}, got {fastloss.__file__}")
    made, call = "", None
    for line in sys.stdin:
        name, count = line.split()
        if name != made:
            call = None  # frees its arrays before allocating others
            made, call = name, make(name)
            call()
        assert call is not None
        start = time.perf_counter()
        for _ in range(int(count)):
            call()
        print((time.perf_counter() - start) / int(count), flush=True)


def make(name: str) -> Callable[[], Any]:
    """The call of a case."""
    import numpy as np
    import torch

    import fastloss as fl

    size, dtype, layout, target, kind, threads, how = name.split("/")
    rng, shape = np.random.default_rng(0), SIZES[size]
    batch, classes, *spatial = shape
    fl.set_num_threads(int(threads))
    x = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    if layout == "last":
        x = x.to(memory_format=torch.channels_last_3d)
    types = {"f4": torch.float32, "f2": torch.float16, "bf": torch.bfloat16, "f8": torch.float64}
    if kind == "none":
        x = x.softmax(1)
    x = x.to(types[dtype])
    # Labels form runs, as in a volume.
    runs = rng.integers(0, classes, (batch, *spatial[:-1], 1), np.uint8)
    labels = np.repeat(runs, spatial[-1], -1)
    if target == "dense":
        y = torch.from_numpy(np.moveaxis(np.eye(classes, dtype=np.float32)[labels], -1, 1).copy())
    else:
        y = torch.from_numpy(labels.astype(target))
    arrays = [x, y]
    if kind == "weighted":
        arrays.append(torch.from_numpy(rng.random((batch, *spatial), np.float32)))
    losses: dict[str, Callable[[], Any]] = {
        "dice_ce": lambda: fl.Dice() + fl.CrossEntropy(),
        "weighted": lambda: fl.Dice() + fl.CrossEntropy(),
        "dice_focal": lambda: fl.Dice() + fl.Focal(),
        "top_k": lambda: fl.Dice() + fl.TopKCrossEntropy(),
        "ce": lambda: fl.CrossEntropy(),
        "tversky": lambda: fl.Tversky(),
        "sigmoid": lambda: fl.Loss(fl.Dice(), fl.CrossEntropy(), activation="sigmoid"),
        "none": lambda: fl.Loss(fl.Dice(), activation="none"),
        "smoothed": lambda: fl.Loss(
            fl.Dice(include_background=False),
            fl.CrossEntropy(label_smoothing=0.1),
            ignore_index=255,
        ),
    }
    loss, out = losses[kind](), torch.empty_like(x)
    if how == "autograd":
        leaf = x.clone().requires_grad_()

        def step() -> None:
            leaf.grad = None
            loss(leaf, *arrays[1:]).backward()

        return step
    if how.startswith("numpy"):
        arrays, out = [array.numpy() for array in arrays], out.numpy()
    if how.endswith("gradient"):
        return lambda: loss.value_and_grad(*arrays, out=out)
    if how == "function":
        return lambda: fl.dice_ce_loss(*arrays)
    return lambda: loss(*arrays)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2])
    else:
        main()
