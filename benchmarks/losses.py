"""Every loss that can be compared, beside Dice + cross-entropy, in one table.

    python benchmarks/losses.py [--repeats N] [--size N] [--classes N]

Value and gradient into a buffer, by float32 logits of a network that has learnt. "Given": with the
fields that the loss makes of the labels made ahead, as in a data loader's worker; "in the call":
with them made there. Functions take turns; figures are medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

import fastloss as fl
from fastloss.bench import machine, table
from fastloss.bench.inputs import phantom_case
from fastloss.bench.measure import Timed, interleave
from fastloss.compare.losses import LOSSES

REFERENCE = "dice_ce"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="samples of each (default: 5)")
    parser.add_argument("--size", type=int, default=128, help="of an edge (default: 128)")
    parser.add_argument("--classes", type=int, default=4, help="(default: 4)")
    options = parser.parse_args()
    fl.set_num_threads(machine.threads())
    print(machine.machine_text(machine.machine()))
    functions = calls(options.size, options.classes)
    seconds = interleave({key: Timed(call) for key, call in functions.items()}, options.repeats)
    plain = seconds[REFERENCE, "given"]
    rows = []
    for name in LOSSES:
        given, made = seconds[name, "given"], seconds.get((name, "in the call"))
        rows.append(
            (name, table.milliseconds(given), table.times(given / plain))
            + (("", "") if made is None else (table.milliseconds(made), table.times(made / plain)))
        )
    print(table.text_table(("loss", "ms", "ratio", "in the call, ms", "ratio"), rows))


def calls(size: int, classes: int) -> dict[tuple[str, str], Callable[[], object]]:
    """By name, and whether fields are given."""
    case = phantom_case((size, size, size), classes)
    logits, labels = case.logits, case.target
    out = np.empty_like(logits)
    found: dict[tuple[str, str], Callable[[], object]] = {}
    for name, make in LOSSES.items():
        loss = fl.Loss(make((1.0, 1.0, 1.0), 0.5))
        fields = loss.fields(labels, classes=classes)
        found[name, "given"] = _call(loss, logits, labels, out, fields)
        if fields:
            found[name, "in the call"] = _call(loss, logits, labels, out, None)
    return found


def _call(
    loss: Any, logits: np.ndarray, labels: np.ndarray, out: np.ndarray, fields: Any
) -> Callable[[], object]:
    return lambda: loss.value_and_grad(logits, labels, out=out, fields=fields)


if __name__ == "__main__":
    main()
