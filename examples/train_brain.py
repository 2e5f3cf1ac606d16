"""A small 3D U-Net learns grey and white matter, with the loss of fastloss, MONAI, or both in turn.

    python examples/train_brain.py --loss-impl both
    python examples/train_brain.py --loss dice_ce_boundary

See examples/README.md.
"""

from __future__ import annotations

import argparse
import csv
import json
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from math import isfinite
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from brain.history import History

IMPLEMENTATIONS = ("fastloss", "monai")
LOSSES = ("dice_ce", "dice_ce_boundary")
FIRST_STEPS = 5
"""The steps before training amplifies rounding errors."""


def main() -> None:
    parser, options = _options()
    implementations = IMPLEMENTATIONS if options.loss_impl == "both" else (options.loss_impl,)
    _check_packages(parser, implementations)

    from brain.figures import draw_curves, draw_distances, draw_overlay
    from brain.volume import load_brain

    options.out.mkdir(parents=True, exist_ok=True)
    print("Reading the MNI152 template that nilearn ships ...", flush=True)
    brain = load_brain()
    if options.patch > brain.largest_patch:
        parser.error(f"--patch: at most {brain.largest_patch} fit, got {options.patch}")
    arguments = (options.loss, brain, options.steps, options.patch, options.seed, options.dtype)
    histories = [_train_apart(name, *arguments) for name in implementations]

    _write_curve(histories, options.out / "curve.csv")
    summary = _summary(options, histories)
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
    draw_curves(histories, options.out / "curve.png")
    draw_overlay(brain, histories, options.out / "overlay.png")
    pictures = "curve.png, overlay.png"
    if options.loss == "dice_ce_boundary":
        draw_distances(brain, options.out / "distances.png")
        pictures += ", distances.png"
    print()
    _print_table(histories)
    if "difference" in summary:
        _print_difference(summary["difference"])
    print(f"\n{pictures}, curve.csv and summary.json are in {options.out}")


def _options() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=250, help="training steps (default: 250)")
    parser.add_argument(
        "--patch",
        type=int,
        default=40,
        help="edge of the training patches in voxels of 1 mm, a multiple of 4 (default: 40)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the network's start and the patches (default: 0)"
    )
    parser.add_argument(
        "--loss", choices=LOSSES, default="dice_ce", help="which loss (default: dice_ce)"
    )
    parser.add_argument(
        "--loss-impl", choices=[*IMPLEMENTATIONS, "both"], default="fastloss", help="whose loss"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float64"],
        default="float32",
        help="of network and loss; float64 shows that the curves differ by rounding alone",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("train_brain"), help="folder for curves and pictures"
    )
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps: expected at least 1, got {options.steps}")
    if options.patch < 16 or options.patch % 4:
        parser.error(f"--patch: expected a multiple of 4, at least 16, got {options.patch}")
    if options.seed < 0:
        parser.error(f"--seed: expected at least 0, got {options.seed}")
    return parser, options


def _check_packages(parser: argparse.ArgumentParser, implementations: tuple[str, ...]) -> None:
    remedies = dict.fromkeys(
        ("fastloss", "torch", "nilearn", "nibabel", "matplotlib"),
        "pip install '.[examples]' in the folder of the repository",
    )
    if "monai" in implementations:
        remedies["monai"] = "pip install monai, or --loss-impl fastloss"
    for package, remedy in remedies.items():
        if find_spec(package) is None:
            parser.error(f"the package {package} is not there: {remedy}")


def _train_apart(*arguments: Any) -> History:
    """Train in a fresh process, without another implementation's memory or threads."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_train, *arguments).result()


def _train(*arguments: Any) -> History:
    from brain.training import train

    return train(*arguments)


# ---------------------------------------------------------------------- results between processes


def _write_curve(histories: list[History], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        tissues = list(histories[0].held_out[1])
        writer.writerow(["implementation", "step", "loss", "seconds", *tissues])
        for history in histories:
            rows = zip(history.loss, history.seconds, strict=True)
            for step, (loss, seconds) in enumerate(rows, start=1):
                dice = history.held_out.get(step, {})
                values = [dice.get(tissue, "") for tissue in tissues]
                writer.writerow([history.implementation, step, loss, seconds, *values])


def _summary(options: argparse.Namespace, histories: list[History]) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "loss": options.loss,
        "steps": options.steps,
        "patch": options.patch,
        "seed": options.seed,
        "dtype": options.dtype,
        "implementations": {
            history.implementation: {
                "step_seconds": median(history.seconds),
                "loss_seconds": history.loss_seconds,
                "step_peak_bytes": history.step_memory,
                "loss_peak_bytes": history.loss_memory,
                "held_out_dice": history.held_out[options.steps],
                "held_out_hd95_mm": {
                    tissue: distance if isfinite(distance) else None  # JSON has no infinity
                    for tissue, distance in history.hd95[options.steps].items()
                },
                "held_out_nsd": history.nsd[options.steps],
                "evaluation_seconds": median(history.evaluation_seconds),
            }
            for history in histories
        },
    }
    if len(histories) == 2:
        summary["difference"] = _difference(*histories)
    return summary


def _difference(first: History, second: History) -> dict[str, Any]:
    """The distance of two curves: relative for the losses, absolute for the held-out Dice."""
    apart = [abs(a - b) / abs(b) for a, b in zip(first.loss, second.loss, strict=True)]
    dice = [
        abs(first.held_out[step][tissue] - value)
        for step, values in second.held_out.items()
        for tissue, value in values.items()
    ]
    return {
        "first_steps": len(apart[:FIRST_STEPS]),
        "loss_first_steps": max(apart[:FIRST_STEPS]),
        "loss": max(apart),
        "at_step": apart.index(max(apart)) + 1,
        "held_out_dice": max(dice),
    }


def _print_table(histories: list[History]) -> None:
    rows: dict[str, list[str]] = {"": [history.implementation for history in histories]}
    rows["step, median"] = [f"{1e3 * median(h.seconds):.0f} ms" for h in histories]
    rows["loss alone, forward + backward"] = [f"{1e3 * h.loss_seconds:.2f} ms" for h in histories]
    rows["its share of the step"] = [
        f"{100 * h.loss_seconds / median(h.seconds):.1f} %" for h in histories
    ]
    rows["peak memory of a step"] = [_mebibytes(h.step_memory) for h in histories]
    rows["peak memory of the loss alone"] = [_mebibytes(h.loss_memory) for h in histories]
    for tissue in histories[0].held_out[1]:
        final = [list(history.held_out.values())[-1][tissue] for history in histories]
        rows[f"held-out Dice, {tissue}"] = [f"{dice:.4f}" for dice in final]
    for tissue in histories[0].held_out[1]:
        distances = [list(history.hd95.values())[-1][tissue] for history in histories]
        rows[f"held-out HD95, {tissue}"] = [
            f"{distance:.2f} mm" if isfinite(distance) else "none found" for distance in distances
        ]
    for tissue in histories[0].held_out[1]:
        shares = [list(history.nsd.values())[-1][tissue] for history in histories]
        rows[f"held-out NSD, {tissue}"] = [f"{share:.4f}" for share in shares]
    rows["these metrics, an evaluation"] = [
        f"{1e3 * median(h.evaluation_seconds):.1f} ms" for h in histories
    ]
    width = max(map(len, rows))
    for name, values in rows.items():
        print(f"{name:<{width}}" + "".join(f"{value:>12}" for value in values))


def _mebibytes(count: int | None) -> str:
    return "not told" if count is None else f"{count / 2**20:.1f} MiB"


def _print_difference(difference: dict[str, Any]) -> None:
    print(
        f"\nThe losses differ by at most {difference['loss_first_steps']:.1e} (relative) in the "
        f"first {difference['first_steps']} steps: rounding.\n"
        f"Over all steps by at most {difference['loss']:.1e}, at step {difference['at_step']}, and "
        f"the held-out Dice by at most {difference['held_out_dice']:.1e}.\n"
        "Training amplifies the rounding of each step; with --dtype float64 there is less of it."
    )


if __name__ == "__main__":
    main()
