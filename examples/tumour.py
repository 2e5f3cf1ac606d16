"""A small U-Net learns the tumour of one patient, with three losses; a second patient is held out.

    python examples/tumour.py
    python examples/tumour.py --site lung

See examples/README.md.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from volumes import SITES, load_tumour

import fastloss as fl
from fastloss.compare.data import Volume, normalised
from fastloss.compare.losses import TrainingLoss
from fastloss.compare.pictures import picture
from fastloss.compare.training import Predict, Settings, Task, train
from fastloss.evaluation.png import png

METRICS = ("dice", "nsd", "hd95", "lesion_recall", "lesion_precision")
TOLERANCE = 2.0
SPACINGS = {"brain": 1.5, "lung": 1.8}
"""mm between voxels of a slice, at least; slices stay as far apart as they are."""
MARGIN = 40
"""Voxels of a lung's slices that are kept around the tumour, so that it takes minutes."""


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"Reading two patients with a tumour of the {options.site} ...", flush=True)
    patients = [load(options.site, number) for number in (1, 2)]
    training, other = patients if options.site == "brain" else patients[::-1]
    for role, case in (("trained on", training), ("held out", other)):
        size = "×".join(f"{each:.2f}" for each in case.spacing)
        count = int(case.labels.sum())
        ml = count * np.prod(case.spacing) / 1000
        print(f"{role}: {case.labels.shape} voxels of {size} mm, the tumour {count} ({ml:.1f} ml)")

    settings = Settings(steps=options.steps, patch=(16, 48, 48), points=3)
    rows = []
    for name in options.losses:
        print(f"\n{name}, {settings.steps} steps", flush=True)

        def validate(predict: Predict) -> float:
            values = [_scores(predict(case.image), case)["dice"] for case in (training, other)]
            print("  Dice: patient trained on {:.3f}, held out {:.3f}".format(*values), flush=True)
            return values[1]

        loss = TrainingLoss(name, training.spacing)
        rate = settings.learning_rate
        trained = train(Task(loss, 0, 0, [training], 2, 1, rate, settings, validate))
        for role, case in (("trained on", training), ("held out", other)):
            predicted = trained.predict(case.image)
            rows.append([name, role, *_scores(predicted, case).values()])
            image = picture(name, role, case, predicted).image
            (options.out / f"{name}_{role.replace(' ', '_')}.png").write_bytes(png(image))

    print(f"\n{'loss':<18}{'patient':<12}" + "".join(f"{metric:>18}" for metric in METRICS))
    for name, role, *values in rows:
        print(f"{name:<18}{role:<12}" + "".join(f"{value:>18.3f}" for value in values))
    with (options.out / "tumour.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["loss", "patient", *METRICS], *rows])
    print(
        f"\nPictures (image, reference, prediction) and tumour.csv are in {options.out}.\n"
        "One patient is trained on: a high Dice there says that the loss trains. The other has\n"
        "another tumour, of another size, and a single case cannot say how often a tumour is\n"
        "found, nor which loss is better: for that, python -m fastloss compare --data CASES."
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--site", choices=SITES, default="brain", help="(default: brain)")
    add("--losses", nargs="+", default=["dice_ce", "dice_ce_boundary", "cc_dice_ce"],
        help="registered names of python -m fastloss compare (default: Dice + CE alone, with the "
        "boundary loss, and with that of every lesion)")  # fmt: skip
    add("--steps", type=int, default=200, help="(default: 200)")
    add("--threads", type=int, default=2, help="(default: 2)")
    add("--out", type=Path, default=Path("tumour"), help="folder of the results (default: tumour)")
    options = parser.parse_args()
    for name in ("steps", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    return options


def load(site: str, number: int) -> Volume:
    """A patient; of the lung the part around the tumour."""
    scan = load_tumour(site, number)
    step = max(1, round(SPACINGS[site] / scan.spacing[1]))
    image, labels = _coarser(scan.image, step), _coarser(scan.labels.astype(np.float32), step)
    labels = (labels >= 0.5).astype(np.uint8)
    if site == "lung":
        where = np.argwhere(labels)
        low, high = where.min(0)[1:] - MARGIN, where.max(0)[1:] + MARGIN + 1
        box = tuple(slice(max(0, int(a)), int(b)) for a, b in zip(low, high, strict=True))
        image, labels = image[:, box[0], box[1]], labels[:, box[0], box[1]]
    d, h, w = scan.spacing
    spacing = (d, h * step, w * step)
    return Volume(f"{site}{number}", normalised(image)[None], labels, spacing)


def _coarser(volume: np.ndarray, step: int) -> np.ndarray:
    """The mean of squares of voxels in each slice."""
    d, h, w = (n // s * s for n, s in zip(volume.shape, (1, step, step), strict=True))
    parts = volume[:d, :h, :w].reshape(d, h // step, step, w // step, step)
    found: np.ndarray = parts.mean(axis=(2, 4), dtype=np.float32)
    return found


def _scores(predicted: np.ndarray, case: Volume) -> dict[str, float]:
    scores = fl.metrics.evaluate(
        predicted[None],
        case.labels[None],
        metrics=METRICS,
        classes=("background", "tumour"),
        spacing=case.spacing,
        tolerance=TOLERANCE,
    )
    return {name: float(scores[name][0, 0]) for name in METRICS}


if __name__ == "__main__":
    main()
