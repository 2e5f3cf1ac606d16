"""A small U-Net learns the organs of a CT, with two losses in turn; MONAI's beside them for cost.

    python examples/organs.py

See examples/README.md.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from volumes import Scan, load_organs

import fastloss as fl
from fastloss.compare.cost import measure
from fastloss.compare.data import Volume, normalised
from fastloss.compare.losses import TrainingLoss
from fastloss.compare.records import Cost
from fastloss.compare.training import Predict, Settings, Task, train

HELD_OUT = slice(52, 66)
"""Axial slices of 3 mm that are never trained on: of 112, from the feet."""
WINDOW = (-160.0, 240.0)
"""Hounsfield units: soft tissues differ by some tens, of the 4000 that a CT has."""
CONTEXT = 8
"""Slices around them that the network sees when it predicts them."""
LEAST = 60
"""Voxels that an organ has in the held-out slab, and beside it, to be judged."""
METRICS = ("dice", "nsd", "hd95")
TOLERANCE = 3.0


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    print("Reading the CT ...", flush=True)
    scan = _largest(load_organs(), options.organs)
    whole = Volume("ct", normalised(np.clip(scan.image, *WINDOW))[None], scan.labels, scan.spacing)
    below, above = slice(0, HELD_OUT.start), slice(HELD_OUT.stop, None)
    training = [_part(whole, part) for part in (below, above)]
    slab = _part(whole, slice(HELD_OUT.start - CONTEXT, HELD_OUT.stop + CONTEXT))
    truth = scan.labels[HELD_OUT]

    settings = Settings(
        steps=options.steps, patch=(options.patch,) * 3, width=options.width, points=6
    )
    results, predictions = {}, {}
    for name in options.losses:
        print(f"\n{name}: {len(scan.classes) - 1} organs, {settings.steps} steps", flush=True)

        def validate(predict: Predict, name: str = name) -> float:
            found = _judged(_held_out(predict, slab), truth, scan, ("dice",))["dice"]
            print(f"  held-out Dice of {name}: {np.nanmean(found):.3f}", flush=True)
            return float(np.nanmean(found))

        trained = train(_task(name, training, scan, settings, validate))
        predictions[name] = _held_out(trained.predict, slab)
        results[name] = _judged(predictions[name], truth, scan, METRICS)
        print(f"  {trained.curve[-1].seconds / settings.steps * 1e3:.0f} ms a step")

    judged = _common(scan)
    _print_organs(scan, results, judged)
    costs = [_cost(name, training, scan, settings) for name in [*options.losses, "monai"]]
    print("\nThe loss alone, forward and backward, and a step of the same loop with it")
    for cost in costs:
        print(
            f"{cost.loss:<20}{cost.loss_ms:>9.1f} ms{cost.peak_bytes / 2**20:>9.1f} MiB"
            f"{cost.step_ms:>9.1f} ms a step"
        )
    _write(scan, results, judged, options.out / "organs.csv")
    _draw(scan, predictions, results, judged, options.out / "organs.png")
    print(
        f"\norgans.png and organs.csv are in {options.out}.\n"
        "It is one patient, and a slab between two trained parts of one body: this shows that\n"
        "both losses train with many classes, and what they cost, not how well organs of others\n"
        "would be found, nor which loss is better: for that, python -m fastloss compare."
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--losses", nargs="+", default=["dice_ce", "dice_ce_boundary"], help="registered names of "
        "python -m fastloss compare (default: dice_ce dice_ce_boundary)")  # fmt: skip
    add("--organs", type=int, default=20, help="the largest ones, 61 at most (default: 20)")
    add("--steps", type=int, default=300, help="(default: 300)")
    add("--patch", type=int, default=32, help="edge in voxels of 3 mm (default: 32)")
    add("--width", type=int, default=12, help="channels of the network (default: 12)")
    add("--threads", type=int, default=2, help="(default: 2)")
    add("--out", type=Path, default=Path("organs"), help="folder of the results (default: organs)")
    options = parser.parse_args()
    for name in ("organs", "steps", "width", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if options.patch < 16 or options.patch % 4:
        parser.error(f"--patch: expected a multiple of 4, at least 16, got {options.patch}")
    return options


def _largest(scan: Scan, count: int) -> Scan:
    """With the largest organs alone; the others are background."""
    sizes = np.bincount(scan.labels.ravel(), minlength=len(scan.classes))
    order = sorted(range(1, len(scan.classes)), key=lambda i: -sizes[i])[:count]
    kept = sorted(order)
    table = np.zeros(len(scan.classes), np.uint8)
    table[kept] = np.arange(1, len(kept) + 1)
    classes = ("background", *(scan.classes[i] for i in kept))
    return scan._replace(labels=table[scan.labels], classes=classes)


def _part(whole: Volume, part: slice) -> Volume:
    return whole._replace(image=whole.image[:, part], labels=whole.labels[part])


def _task(name: str, training: list[Volume], scan: Scan, settings: Settings, validate: Any) -> Task:
    loss = TrainingLoss(name, scan.spacing)
    rate = settings.learning_rate
    return Task(loss, 0, 0, training, len(scan.classes), 1, rate, settings, validate)


def _held_out(predict: Predict, slab: Volume) -> np.ndarray:
    return predict(slab.image)[CONTEXT:-CONTEXT]


def _judged(
    predicted: np.ndarray, truth: np.ndarray, scan: Scan, metrics: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """By metric a value for each organ."""
    scores = fl.metrics.evaluate(
        predicted[None],
        truth[None],
        metrics=metrics,
        classes=scan.classes,
        spacing=scan.spacing,
        tolerance=TOLERANCE,
    )
    return {name: scores[name][0] for name in metrics}


def _common(scan: Scan) -> list[int]:
    """Organs that are in the held-out slab and beside it: what is in neither is not judged."""
    count = len(scan.classes)
    inside = np.bincount(scan.labels[HELD_OUT].ravel(), minlength=count)
    outside = np.bincount(scan.labels.ravel(), minlength=count) - inside
    return [i for i in range(1, count) if min(inside[i], outside[i]) >= LEAST]


def _print_organs(scan: Scan, results: dict[str, Any], judged: list[int]) -> None:
    width = 30
    print(f"\n{'':<{width}}" + "".join(f"{name:>27}" for name in results))
    heads = "".join(f"{'Dice':>12}{'NSD':>6}{'HD95 mm':>9}" for _ in results)
    print(f"{'organ in the held-out slab':<{width}}{heads}")
    for i in judged:
        cells = "".join(
            f"{found['dice'][i - 1]:>12.3f}{found['nsd'][i - 1]:>6.2f}{found['hd95'][i - 1]:>9.1f}"
            for found in results.values()
        )
        print(f"{scan.classes[i]:<{width}}{cells}")
    means = "".join(
        f"{np.nanmean([found['dice'][i - 1] for i in judged]):>12.3f}"
        f"{np.nanmean([found['nsd'][i - 1] for i in judged]):>6.2f}"
        f"{np.nanmedian([found['hd95'][i - 1] for i in judged]):>9.1f}"
        for found in results.values()
    )
    print(f"{'mean (of HD95 the median)':<{width}}{means}")


def _cost(name: str, training: list[Volume], scan: Scan, settings: Settings) -> Cost:
    spec = "organs_monai:DiceCE" if name == "monai" else name
    loss = TrainingLoss(spec, scan.spacing)
    rate = settings.learning_rate
    task = Task(loss, 0, 0, training, len(scan.classes), 1, rate, settings, lambda predict: 0.0)
    return measure(name, task)


def _write(scan: Scan, results: dict[str, Any], judged: list[int], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["loss", "organ", *METRICS])
        for name, found in results.items():
            for i in judged:
                values = [float(found[metric][i - 1]) for metric in METRICS]
                writer.writerow([name, scan.classes[i], *values])


def _draw(
    scan: Scan, predictions: dict[str, Any], results: dict[str, Any], judged: list[int], path: Path
) -> None:
    """Slices in the slab with the organs over them, and the Dice of each organ by its size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {"reference": scan.labels[HELD_OUT], **predictions}
    figure, axes = plt.subplots(2, len(panels), figsize=(4.2 * len(panels), 8), squeeze=False)
    middle = (HELD_OUT.stop - HELD_OUT.start) // 2
    colours = np.vstack([[0, 0, 0], plt.get_cmap("hsv")(np.linspace(0, 1, 62))[:, :3]])
    order = np.random.default_rng(1).permutation(62) + 1  # neighbours differ in colour
    grey = np.clip((scan.image[HELD_OUT][middle] + 160) / 400, 0, 1)[..., None]
    for ax, (name, labels) in zip(axes[0], panels.items(), strict=True):
        shown = np.repeat(grey, 3, axis=2)
        where = labels[middle] > 0
        chosen = colours[order[labels[middle][where].astype(int) - 1]]
        shown[where] = 0.4 * shown[where] + 0.6 * chosen
        ax.imshow(shown, origin="lower", interpolation="nearest")
        ax.set_title(name)
        ax.axis("off")
    sizes = np.bincount(scan.labels.ravel(), minlength=len(scan.classes)) * np.prod(scan.spacing)
    for ax in axes[1]:
        ax.remove()
    ax = figure.add_subplot(2, 1, 2)
    for marker, (name, found) in zip("ox^sv", results.items(), strict=False):
        ax.semilogx(
            sizes[judged] / 1000,
            [found["dice"][i - 1] for i in judged],
            marker,
            label=name,
            alpha=0.7,
        )
    ax.set(xlabel="volume of the organ, ml", ylabel="Dice in the held-out slab", ylim=(-0.02, 1))
    ax.grid(alpha=0.3)
    ax.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
