"""Lovász-Softmax beside the sorting formula in PyTorch, and how near its histogram comes.

    python benchmarks/ranking.py [--repeats N] [--quick]

Value and gradient by float32 logits of 128³ voxels with 4 and with 14 classes, as a network has
them at random and when it is trained. The other is the formula of the paper, written for PyTorch:
softmax, and for every class a sort of the errors, two cumulative sums and a dot product,
differentiated by autograd. It is left out, by name, where PyTorch is not there. Functions take
turns; figures are medians. A second table has the relative error of the value and the cosine of the
gradient of `fastloss.LovaszSoftmax`'s histogram, against its exact method.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np

import fastloss as fl
from fastloss.bench import machine, table
from fastloss.bench.measure import Timed, interleave

LOSSES = {
    "LovaszSoftmax": fl.Loss(fl.LovaszSoftmax()),
    "LovaszSoftmax + Dice + CE": fl.LovaszSoftmax() + fl.Dice() + fl.CrossEntropy(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="samples of each (default: 5)")
    parser.add_argument("--quick", action="store_true", help="volumes of 64³ in place of 128³")
    options = parser.parse_args()
    edge = 64 if options.quick else 128
    fl.set_num_threads(machine.threads())
    print(machine.machine_text(machine.machine()))
    found = list(rows(edge, options.repeats))
    print(table.text_table(("case", "loss", "ms", "PyTorch's ms", "ratio", "demand"), found))
    print()
    head = ("case", "value", "relative error", "demand", "1 − cosine", "demand")
    print(table.text_table(head, list(accuracy(edge))))


def volume(classes: int, edge: int, stage: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels: a block of each class, of which the last is small."""
    random = np.random.default_rng(classes)
    labels = np.zeros((1, edge, edge, edge), np.uint8)
    for c in range(1, classes):
        size = max(3, edge // 3 if c < classes - 1 else edge // 20)
        z, y, x = random.integers(0, edge - size, 3)
        labels[:, z : z + size, y : y + size, x : x + size] = c
    logits = random.normal(size=(1, classes, *labels.shape[1:])).astype(np.float32)
    if stage == "trained":
        logits *= 1.5
        for c in range(classes):
            logits[:, c] += 6 * (labels == c)
    return logits, labels


def rows(edge: int = 128, repeats: int = 5) -> Iterator[tuple[str, ...]]:
    """One for each case and loss, in the order of the columns that `main` prints."""
    for classes in (4, 14):
        for stage in ("random", "trained"):
            title = f"C{classes}, {stage}, {edge}³"
            print(f"{title} ...", file=sys.stderr, flush=True)
            logits, labels = volume(classes, edge, stage)
            out = np.empty_like(logits)
            functions: dict[str, Callable[[], object]] = {
                name: _call(loss, logits, labels, out) for name, loss in LOSSES.items()
            }
            try:
                functions["PyTorch"] = sorting(logits, labels)
            except ImportError as error:
                print(f"PyTorch: {error}", file=sys.stderr)
            seconds = interleave({name: Timed(call) for name, call in functions.items()}, repeats)
            other = seconds.get("PyTorch")
            for name in LOSSES:
                known = ("—", "—") if other is None else (
                    table.milliseconds(other), f"{other / seconds[name]:.1f}"
                )  # fmt: skip
                demand = "≥ 10" if name == "LovaszSoftmax" else ""
                yield title, name, table.milliseconds(seconds[name]), *known, demand


def _call(loss: Any, logits: np.ndarray, labels: np.ndarray, out: np.ndarray) -> Any:
    return lambda: loss.value_and_grad(logits, labels, out=out)


def sorting(logits: np.ndarray, labels: np.ndarray) -> Callable[[], object]:
    """The loss as its paper has it: sorted errors times the steps of the Jaccard loss."""
    torch = import_module("torch")
    torch.set_num_threads(fl.get_num_threads())
    target = torch.from_numpy(labels.astype(np.int64)).reshape(-1)
    given = torch.from_numpy(logits)

    def run() -> object:
        x = given.clone().requires_grad_()
        p = torch.softmax(x, dim=1).movedim(1, -1).reshape(-1, x.shape[1])
        each = []
        for c in range(p.shape[1]):
            mask = (target == c).to(p.dtype)
            if not mask.any():
                continue
            errors, order = torch.sort((mask - p[:, c]).abs(), descending=True)
            sorted_mask = mask[order]
            inside = sorted_mask.sum() - sorted_mask.cumsum(0)
            jaccard = 1 - inside / (sorted_mask.sum() + (1 - sorted_mask).cumsum(0))
            steps = torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])
            each.append(torch.dot(errors, steps))
        torch.stack(each).mean().backward()
        return x.grad

    return run


def accuracy(edge: int = 128) -> Iterator[tuple[str, ...]]:
    """The error of a histogram for each case, in the order of the columns that `main` prints."""
    exact, near = fl.LovaszSoftmax(method="exact"), fl.LovaszSoftmax()
    for classes in (4, 14):
        for stage in ("random", "trained"):
            title = f"C{classes}, {stage}, {edge}³"
            print(f"{title}, sorted ...", file=sys.stderr, flush=True)
            logits, labels = volume(classes, edge, stage)
            value, gradient = exact.value_and_grad(logits, labels)
            own, own_gradient = near.value_and_grad(logits, labels)
            error = abs(float(own) - float(value)) / float(value)
            a, b = gradient.ravel().astype(np.float64), own_gradient.ravel().astype(np.float64)
            lost = 1 - float(a @ b) / float(np.sqrt((a @ a) * (b @ b)))
            yield title, f"{value:.4f}", f"{error:.1e}", "≤ 1e-5", f"{lost:.1e}", "≤ 1e-4"


if __name__ == "__main__":
    main()
