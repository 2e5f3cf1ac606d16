"""Metrics beside their peers, all in one run, as a table.

    python benchmarks/metrics.py [overlap] [surface] [lesions] [--repeats N] [--quick]

Functions take turns; figures are medians. Peers that are not installed (torch, monai, torchmetrics)
are left out, by name. A section is a function that yields cases; `SECTIONS` lists them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

import fastloss as fl
from fastloss.bench import machine, table
from fastloss.bench.measure import Timed, interleave
from fastloss.bench.phantom import phantom


class Case(NamedTuple):
    """Functions that compute the same, and by name how much faster than each ours is to be."""

    title: str
    functions: dict[str, Callable[[], object]]
    """Our own is the first."""
    demands: dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="samples of each (default: 5)")
    parser.add_argument("--quick", action="store_true", help="volumes of 64³ in place of 128³")
    options = parser.parse_args()
    for name in options.sections:
        if name not in SECTIONS:
            parser.error(f"sections: expected some of {', '.join(SECTIONS)}, got {name!r}")
    fl.set_num_threads(machine.threads())
    print(machine.machine_text(machine.machine()))
    rows = []
    for name in options.sections or SECTIONS:
        for case in SECTIONS[name](64 if options.quick else 128):
            rows += measured(case, options.repeats)
    print(table.text_table(("case", "ms", "other's ms", "other", "ratio", "demand"), rows))


def measured(case: Case, repeats: int) -> list[tuple[str, ...]]:
    print(f"{case.title} ...", file=sys.stderr, flush=True)
    seconds = interleave({name: Timed(run) for name, run in case.functions.items()}, repeats)
    own = seconds.pop(next(iter(case.functions)))
    return [
        (
            case.title,
            table.milliseconds(own),
            table.milliseconds(other),
            name,
            f"{other / own:.1f}",
            case.demands.get(name, ""),
        )
        for name, other in seconds.items()
    ]


def peer(name: str) -> Any:
    """A module that may not be installed: None then, and a line that says so."""
    try:
        return import_module(name)
    except ImportError:
        print(f"{name}: not installed", file=sys.stderr)
        return None


def blurred(labels: np.ndarray, classes: int) -> np.ndarray:
    """Logits (1, C, *spatial) as after training: the target, blurred, and noise."""
    random = np.random.default_rng(0)
    logits = np.empty((1, classes, *labels.shape), np.float32)
    for c in range(classes):
        mask = (labels == c).astype(np.float32)
        for axis in range(mask.ndim):
            mask = sum(np.roll(mask, shift, axis) for shift in range(-3, 4)) / 7
        logits[0, c] = 8 * mask + 0.5 * random.standard_normal(mask.shape, np.float32)
    return logits


# ------------------------------------------------------------------ overlap


def overlap(edge: int) -> Iterator[Case]:
    """Dice and IoU of a batch of logits."""
    torch, monai, torchmetrics = peer("torch"), peer("monai.metrics"), peer("torchmetrics")
    if torch is not None:
        torch.set_num_threads(machine.threads())
    for classes in (2, 14):
        labels = phantom((edge,) * 3, classes).astype(np.uint8)
        x, y = blurred(labels, classes), labels[None].astype(np.int64)

        def ours(scores: Any, target: Any) -> object:
            return fl.metrics.evaluate(scores, target, metrics=("dice", "iou"))

        functions: dict[str, Callable[[], object]] = {
            "fastloss": lambda ours=ours, x=x, y=y: ours(x, y)
        }
        logits = target = None
        if torch is not None:
            logits, target = torch.from_numpy(x), torch.from_numpy(y)
            functions["fastloss"] = lambda ours=ours, x=logits, y=target: ours(x, y)
        if torch is not None and monai is not None:
            functions["monai"] = _monai(torch, monai, logits, target)
        if torch is not None and torchmetrics is not None:
            functions["torchmetrics"] = _torchmetrics(torchmetrics, logits, target)
        functions["numpy"] = _numpy(x, y)
        demands = {"monai": "≥ 10", "torchmetrics": "≥ 10"}
        yield Case(f"Dice + IoU of logits, C{classes} {edge}³", functions, demands)
        if classes == 14:
            # The two steps for themselves, beside a copy of what they read.
            maps = x.argmax(1).astype(np.uint8)
            functions = {
                "fastloss": lambda maps=maps, y=labels[None]: fl.metrics.confusion_matrix(maps, y)
            }
            functions["numpy"] = lambda maps=maps, y=y: np.bincount(14 * y.ravel() + maps.ravel())
            yield Case(f"confusion matrix of label maps, C14 {edge}³", functions, {})


def _monai(torch: Any, metrics: Any, logits: Any, target: Any) -> Callable[[], object]:
    classes = logits.shape[1]
    options = {"include_background": False, "reduction": "none"}
    dice, iou = metrics.DiceMetric(**options), metrics.MeanIoU(**options)

    def one_hot(labels: Any) -> Any:
        return torch.nn.functional.one_hot(labels, classes).movedim(-1, 1)

    def run() -> object:
        prediction, reference = one_hot(logits.argmax(1)), one_hot(target)
        return dice(prediction, reference), iou(prediction, reference)

    def once() -> object:
        dice.reset()
        iou.reset()
        return run()

    return once


def _torchmetrics(torchmetrics: Any, logits: Any, target: Any) -> Callable[[], object]:
    functional = torchmetrics.functional
    options = {"num_classes": logits.shape[1], "average": "none"}

    def run() -> object:
        dice = functional.classification.multiclass_f1_score(logits, target, **options)
        return dice, functional.classification.multiclass_jaccard_index(logits, target, **options)

    return run


def _numpy(scores: np.ndarray, reference: np.ndarray) -> Callable[[], object]:
    classes = scores.shape[1]

    def run() -> object:
        pairs = classes * reference.ravel() + scores.argmax(1).ravel()
        matrix = np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
        both, sizes = np.diagonal(matrix), matrix.sum(0) + matrix.sum(1)
        return 2 * both / sizes, both / (sizes - both)

    return run


def lesions(edge: int) -> Iterator[Case]:
    """60 lesions; `metrics_lesions` runs these alone."""
    yield from (Case(*case) for case in import_module("metrics_lesions").cases(edge))


def surface(edge: int) -> Iterator[Case]:
    """HD95, ASSD and NSD; `metrics_surface` has the cases."""
    yield from (Case(*case) for case in import_module("metrics_surface").cases(edge))


SECTIONS: dict[str, Callable[[int], Iterator[Case]]] = {
    "overlap": overlap,
    "surface": surface,
    "lesions": lesions,
}


if __name__ == "__main__":
    main()
