"""A small 3D U-Net learns grey and white matter in JAX, with optax and the loss of fastloss.

    python examples/train_jax.py

See examples/README.md.
"""

from __future__ import annotations

import argparse
import csv
import json
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from brain.history import History


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=160, help="training steps (default: 160)")
    parser.add_argument(
        "--patch", type=int, default=32,
        help="edge of the training patches in voxels of 1 mm, a multiple of 4 (default: 32)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of weights and patches (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("train_jax"), help="folder for curve and pictures"
    )
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps: expected at least 1, got {options.steps}")
    if options.patch < 16 or options.patch % 4:
        parser.error(f"--patch: expected a multiple of 4, at least 16, got {options.patch}")
    if options.seed < 0:
        parser.error(f"--seed: expected at least 0, got {options.seed}")
    for package in ("fastloss", "jax", "optax", "nilearn", "nibabel", "matplotlib"):
        if find_spec(package) is None:
            parser.error(
                f"the package {package} is not there: pip install '.[examples,jax]' optax in the "
                "folder of the repository"
            )

    from brain.figures import draw_curves, draw_overlay
    from brain.jax_training import train
    from brain.volume import load_brain

    options.out.mkdir(parents=True, exist_ok=True)
    print("Reading the MNI152 template that nilearn ships ...", flush=True)
    brain = load_brain()
    if options.patch > brain.largest_patch:
        parser.error(f"--patch: at most {brain.largest_patch} fit, got {options.patch}")
    history = train(brain, options.steps, options.patch, options.seed)
    _write(history, options.out)
    draw_curves([history], options.out / "curve.png")
    draw_overlay(brain, [history], options.out / "overlay.png")
    step = median(history.seconds)
    print(
        f"\na step {1e3 * step:.0f} ms, of which the loss alone, forward and backward, "
        f"{1e3 * history.loss_seconds:.2f} ms"
    )
    for tissue, distance in history.hd95[options.steps].items():
        found = f"{distance:.2f} mm" if isfinite(distance) else "none found"
        print(f"held-out HD95, {tissue}: {found}")
    print(f"curve.png, overlay.png, curve.csv and summary.json are in {options.out}")


def _write(history: History, folder: Path) -> None:
    tissues = list(history.held_out[1])
    with (folder / "curve.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss", "seconds", *tissues])
        rows = zip(history.loss, history.seconds, strict=True)
        for step, (loss, seconds) in enumerate(rows, start=1):
            dice = history.held_out.get(step, {})
            writer.writerow([step, loss, seconds, *(dice.get(tissue, "") for tissue in tissues)])
    summary = {
        "steps": len(history.loss),
        "step_seconds": median(history.seconds),
        "loss_seconds": history.loss_seconds,
        "held_out_dice": history.held_out[len(history.loss)],
        "held_out_hd95_mm": {
            tissue: distance if isfinite(distance) else None  # JSON has no other
            for tissue, distance in history.hd95[len(history.loss)].items()
        },
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
