"""Losses of every lesion beside Dice + cross-entropy and a loop over lesions, in one table.

    python benchmarks/lesions.py [--repeats N] [--quick]

60 balls of 1 or 3 classes, value and gradient by float32 logits. "Regions given" are those of
`Loss.fields`; without them, they are made in the call. The loop calls PyTorch for one lesion after
the other, with regions from SciPy; it is left out, by name, where PyTorch or SciPy is not there.
Functions take turns; figures are medians.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np
from metrics_lesions import lesions

import fastloss as fl
from fastloss.bench import machine, table
from fastloss.bench.measure import Timed, interleave


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="samples of each (default: 5)")
    parser.add_argument("--quick", action="store_true", help="volumes of 64³ in place of 128³")
    options = parser.parse_args()
    fl.set_num_threads(machine.threads())
    print(machine.machine_text(machine.machine()))
    found = list(rows(64 if options.quick else 128, options.repeats))
    print(table.text_table(("case", "ms", "other's ms", "other", "ratio", "demand"), found))


def rows(edge: int = 128, repeats: int = 5) -> Iterator[tuple[str, ...]]:
    """One for each comparison, in the order of the columns that `main` prints."""
    _, masks = lesions(edge)
    for classes in (2, 4):
        title = f"C{classes}, 60 lesions, {edge}³"
        print(f"{title} ...", file=sys.stderr, flush=True)
        functions = cases(masks, classes)
        seconds = interleave({name: Timed(call) for name, call in functions.items()}, repeats)
        plain, loop = "Dice + CE", "PyTorch loop"
        for name, seconds_of in seconds.items():
            if name.endswith("given"):
                ratio = seconds_of / seconds[plain]
                demand = "" if "per class" in name else "≤ 1.6 · "
                yield title, *_both(seconds, name, plain), f"{ratio:.2f}", demand + name
        if loop in seconds:
            ratio = seconds[loop] / seconds["CCDiceCE"]
            yield title, *_both(seconds, "CCDiceCE", loop), f"{ratio:.2f}", "≥ 20 · CCDiceCE made"


def _both(seconds: dict[str, float], own: str, other: str) -> tuple[str, str, str]:
    return table.milliseconds(seconds[own]), table.milliseconds(seconds[other]), other


def cases(masks: np.ndarray, classes: int) -> dict[str, Callable[[], object]]:
    numbers = fl.components(masks[None]).numbers
    labels = np.where(numbers > 0, 1 + numbers % (classes - 1), 0).astype(np.uint8)
    random = np.random.default_rng(0)
    logits = random.normal(size=(1, classes, *masks.shape)).astype(np.float32)
    out = np.empty_like(logits)

    def call(loss: Any, **options: Any) -> Callable[[], object]:
        return lambda: loss.value_and_grad(logits, labels, out=out, **options)

    cc, blob = fl.CCDiceCE(), fl.BlobLoss()
    per_class = fl.CCDiceCE(per_class=True)
    functions = {
        "Dice + CE": call(fl.Dice(include_background=False) + fl.CrossEntropy()),
        "CCDiceCE given": call(cc, **cc.fields(labels, classes=classes)),
        "BlobLoss given": call(blob, **blob.fields(labels, classes=classes)),
        "CCDiceCE per class, given": call(per_class, **per_class.fields(labels, classes=classes)),
        "CCDiceCE": call(cc),
        "BlobLoss": call(blob),
    }
    try:
        functions["PyTorch loop"] = loop(logits, labels)
    except ImportError as error:
        print(f"PyTorch loop: {error}", file=sys.stderr)
    return functions


def loop(logits: np.ndarray, labels: np.ndarray) -> Callable[[], object]:
    """CC-DiceCE as a loop: Dice and cross-entropy of each lesion by masks of the whole volume."""
    torch, ndimage = import_module("torch"), import_module("scipy.ndimage")
    torch.set_num_threads(fl.get_num_threads())
    whole = torch.from_numpy(logits)

    def run() -> object:
        target = labels[0]
        found = np.zeros(target.shape, np.int64)
        kinds = [0]
        for c in range(1, int(target.max()) + 1):
            own, count = ndimage.label(target == c, np.ones((3, 3, 3)))
            found += np.where(own > 0, own + len(kinds) - 1, 0)
            kinds += [c] * count
        places = ndimage.distance_transform_edt(
            found == 0, return_distances=False, return_indices=True
        )
        nearest = torch.from_numpy(found[tuple(places)])
        y = torch.from_numpy(target.astype(np.int64))
        x = whole.clone().requires_grad_()
        p = torch.softmax(x, 1)[0]
        losses = torch.nn.functional.cross_entropy(x, y[None], reduction="none")[0]
        each = []
        for k in range(1, len(kinds)):
            inside = (nearest == k).float()
            g = inside * (y == kinds[k])
            own = p[kinds[k]] * inside
            dice = 1 - 2 * (own * g).sum() / torch.clamp(own.sum() + g.sum(), min=1e-7)
            each.append(dice + (losses * inside).sum() / inside.sum())
        torch.stack(each).mean().backward()
        return x.grad

    return run


if __name__ == "__main__":
    main()
