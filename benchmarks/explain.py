"""Maps of where a loss comes from, beside the loss and its gradient, in one table.

    python benchmarks/explain.py [--repeats N] [--quick] [--exact]

Dice + cross-entropy of 4 and 14 classes on a volume of 128³, float32: the value and the gradient,
and `Loss.explain`: parts, a map of each term, and their sum. Functions take turns; figures are
medians. ``--exact`` adds gains that are exact, which are timed once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from time import perf_counter

import numpy as np

import fastloss as fl
from fastloss.bench import machine, table
from fastloss.bench.measure import Timed, interleave

LOSS, MAPS = "Dice + CE, value and gradient", "explain"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="samples of each (default: 7)")
    parser.add_argument("--quick", action="store_true", help="volumes of 64³ in place of 128³")
    parser.add_argument("--exact", action="store_true", help="exact gains as well")
    options = parser.parse_args()
    fl.set_num_threads(machine.threads())
    print(machine.machine_text(machine.machine()))
    found = list(rows(64 if options.quick else 128, options.repeats, options.exact))
    print(table.text_table(("case", "ms", "loss, ms", "ratio", "demand"), found))


def rows(edge: int = 128, repeats: int = 7, exact: bool = False) -> Iterator[tuple[str, ...]]:
    """One for each comparison, in the order of the columns that `main` prints."""
    for classes in (4, 14):
        title = f"C{classes}, {edge}³"
        print(f"{title} ...", file=sys.stderr, flush=True)
        functions = cases(edge, classes)
        once = functions.pop("exact")
        seconds = interleave({name: Timed(call) for name, call in functions.items()}, repeats)
        if exact:
            start = perf_counter()
            once()
            seconds["exact"] = perf_counter() - start
        for name in seconds:
            if name != LOSS:
                demand = "≤ 2" if name == MAPS else ""
                ratio = f"{seconds[name] / seconds[LOSS]:.2f}"
                ms = table.milliseconds(seconds[name]), table.milliseconds(seconds[LOSS])
                yield f"{title}: {name}", *ms, ratio, demand


def cases(edge: int, classes: int) -> dict[str, Callable[[], object]]:
    random = np.random.default_rng(0)
    # Labels form runs, as in a volume.
    runs = random.integers(0, classes, (1, edge, edge, edge // 16), np.uint8)
    labels = runs.repeat(16, axis=-1)
    logits = random.normal(size=(1, classes, edge, edge, edge)).astype(np.float32)
    out = np.empty_like(logits)
    loss = fl.Dice() + fl.CrossEntropy()
    return {
        LOSS: lambda: loss.value_and_grad(logits, labels, out=out),
        MAPS: lambda: loss.explain(logits, labels),
        "exact": lambda: loss.explain(logits, labels, exact=True),
    }


if __name__ == "__main__":
    main()
