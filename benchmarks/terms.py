"""Every loss of the longer list beside Dice + cross-entropy, in one table.

    python benchmarks/terms.py [--repeats N] [--quick]

Value and gradient of 4 classes, 128³ voxels, float32 logits, into a reused buffer; of a label map,
and of soft targets where the loss is for them, each against Dice + cross-entropy of the same
target. `fastloss.distillation_loss` through PyTorch is left out where PyTorch is not there.
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

PLAIN = fl.Dice() + fl.CrossEntropy()
LOSSES: dict[str, Any] = {
    "LogCoshDice": fl.LogCoshDice(),
    "LogCoshDice + CE": fl.LogCoshDice() + fl.CrossEntropy(),
    "LogarithmicDice + CE": fl.LogarithmicDice() + fl.CrossEntropy(),
    "SymmetricCrossEntropy": fl.SymmetricCrossEntropy(),
    "UnifiedFocal": fl.UnifiedFocal(),
    "UnifiedFocal symmetric": fl.UnifiedFocal(symmetric=True),
    "ExponentialLogarithmic": fl.ExponentialLogarithmic(),
    "Combo": fl.Combo(),
    "SensitivitySpecificity": fl.SensitivitySpecificity(),
    "GeneralizedWassersteinDice": fl.GeneralizedWassersteinDice(distances=1 - np.eye(4)),
}
SOFT: dict[str, Any] = {
    "KLDivergence": fl.KLDivergence(),
    "DiceSemimetric": fl.DiceSemimetric(),
    "DiceSemimetric + CE": fl.DiceSemimetric() + fl.CrossEntropy(),
}
EXISTING = frozenset(list(LOSSES)[:6])
"""Those whose sums other losses have."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="samples of each (default: 7)")
    parser.add_argument("--quick", action="store_true", help="volumes of 64³ in place of 128³")
    options = parser.parse_args()
    fl.set_num_threads(machine.threads())
    print(machine.machine_text(machine.machine()))
    found = list(rows(64 if options.quick else 128, options.repeats))
    print(table.text_table(("target", "loss", "ms", "Dice + CE", "ratio", "demand"), found))


def rows(edge: int = 128, repeats: int = 7) -> Iterator[tuple[str, ...]]:
    """One for each loss, in the order of the columns that `main` prints."""
    random = np.random.default_rng(0)
    _, masks = lesions(edge)
    labels = (fl.components(masks[None]).numbers % 4).astype(np.uint8)
    logits = random.normal(size=(1, 4, *masks.shape)).astype(np.float32)
    soft = np.exp(random.normal(size=logits.shape)).astype(np.float32)
    soft /= soft.sum(axis=1, keepdims=True)
    out = np.empty_like(logits)
    for name, losses, target in (("labels", LOSSES, labels), ("soft", SOFT, soft)):
        print(f"C4 {edge}³, {name} ...", file=sys.stderr, flush=True)

        def call(loss: Any, target: Any = target) -> Callable[[], object]:
            return lambda: loss.value_and_grad(logits, target, out=out)

        functions = {"": call(PLAIN), **{n: call(loss) for n, loss in losses.items()}}
        if name == "soft":
            functions["Dice + KL, target_grad"] = lambda: (
                fl.Dice() + fl.KLDivergence()
            ).value_and_grad(logits, soft, out=out, target_grad=True)
            functions |= distillation(logits, soft)
        seconds = interleave({n: Timed(one) for n, one in functions.items()}, repeats)
        plain = seconds.pop("")
        for loss_name, taken in seconds.items():
            demand = "≤ 1.1" if loss_name in EXISTING else ""
            times = table.milliseconds(taken), table.milliseconds(plain)
            yield name, loss_name, *times, f"{taken / plain:.2f}", demand


def distillation(logits: np.ndarray, teacher: np.ndarray) -> dict[str, Callable[[], object]]:
    try:
        torch = import_module("torch")
    except ImportError as error:
        print(f"distillation: {error}", file=sys.stderr)
        return {}
    torch.set_num_threads(fl.get_num_threads())
    student, other = torch.from_numpy(logits).requires_grad_(), torch.from_numpy(teacher)

    def own() -> object:
        return torch.autograd.grad(fl.distillation_loss(student, other, temperature=2), student)

    def plain() -> object:
        log_p, log_g = ((a / 2).log_softmax(1) for a in (student, other))
        loss = torch.nn.functional.kl_div(log_p, log_g, log_target=True, reduction="sum")
        return torch.autograd.grad(4 * loss / student[0, 0].numel(), student)

    return {"distillation_loss, PyTorch": own, "the same in PyTorch's operations": plain}


if __name__ == "__main__":
    main()
