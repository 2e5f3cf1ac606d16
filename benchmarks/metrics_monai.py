"""MONAI's metrics and their drop-ins, in turn, on one case of 14 classes.

    python benchmarks/metrics_monai.py [--edge N] [--repeats N]

One-hot float32 as MONAI takes it: a phantom of organs, and the same moved a little with noise in a
tenth of its blocks. The surface metrics have a spacing of (1, 1, 3).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from fastloss.bench import machine, table
from fastloss.bench.measure import Timed, interleave
from fastloss.bench.phantom import phantom

CLASSES = 14
SPACING = (1.0, 1.0, 3.0)
HEADER = ("case", "ms", "MONAI's ms", "ratio")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edge", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(machine.machine_text(machine.machine()))
    print(table.text_table(HEADER, rows(options.edge, options.repeats)))


def rows(edge: int = 128, repeats: int = 3) -> list[tuple[str, ...]]:
    """A row for each metric: see `HEADER`. ImportError: PyTorch or MONAI is not installed."""
    torch = import_module("torch")
    torch.set_num_threads(machine.threads())
    modules = {name: import_module(name) for name in ("fastloss.monai.metrics", "monai.metrics")}
    found = []
    p, g = (torch.from_numpy(_one_hot(labels)) for labels in pair(edge))
    warnings.simplefilter("ignore")
    for title, name, made, more in _cases():
        print(f"{title} ...", file=sys.stderr, flush=True)
        seconds = interleave(
            {
                module: Timed(_call(getattr(modules[module], name), made, p, g, more))
                for module in modules
            },
            repeats,
        )
        own, other = seconds.values()
        found.append(
            (
                f"{title}, C{CLASSES} {edge}³",
                table.milliseconds(own),
                table.milliseconds(other),
                f"{other / own:.1f}",
            )
        )
    return found


def pair(edge: int) -> tuple[np.ndarray, np.ndarray]:
    """Label maps of a prediction and its reference."""
    reference = phantom((edge,) * 3, CLASSES).astype(np.uint8)
    prediction = np.roll(reference, (1, -1, 2), (0, 1, 2))
    rng = np.random.default_rng(0)
    coarse = rng.random([edge // 8] * 3) < 0.1
    blocks = coarse.repeat(8, 0).repeat(8, 1).repeat(8, 2)
    prediction[: blocks.shape[0], : blocks.shape[1], : blocks.shape[2]][blocks] = 0
    return prediction, reference


def _one_hot(labels: np.ndarray) -> np.ndarray:
    return np.stack([labels == c for c in range(CLASSES)])[None].astype(np.float32)


def _cases() -> Any:
    """Titles, classes, their options, and those of a call."""
    spaced = {"spacing": SPACING}
    tolerances = {"class_thresholds": [1.0] * (CLASSES - 1)}
    yield "Dice", "DiceMetric", {}, {}
    yield "IoU", "MeanIoU", {}, {}
    yield "generalised Dice", "GeneralizedDiceScore", {}, {}
    yield "confusion matrix", "ConfusionMatrixMetric", {}, {}
    yield "HD95", "HausdorffDistanceMetric", {"percentile": 95}, spaced
    yield "ASSD", "SurfaceDistanceMetric", {"symmetric": True}, spaced
    yield "NSD", "SurfaceDiceMetric", tolerances, spaced
    yield "NSD of areas", "SurfaceDiceMetric", {**tolerances, "use_subvoxels": True}, spaced


def _call(
    metric: Any, made: dict[str, Any], p: Any, g: Any, more: dict[str, Any]
) -> Callable[[], object]:
    return lambda: metric(**made)(p, g, **more)


if __name__ == "__main__":
    main()
