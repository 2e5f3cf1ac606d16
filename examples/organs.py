"""A small U-Net learns the organs of one CT, with two losses; slabs between those are held out.

    python examples/organs.py

MONAI's loss, where it is installed, is measured beside them. See examples/README.md.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn
from volumes import Scan, load_organs

import fastloss as fl
from fastloss.compare.cost import UNKNOWN, measure
from fastloss.compare.data import Volume
from fastloss.compare.losses import TrainingLoss, UnknownLoss, read_losses
from fastloss.compare.network import DIVISOR, UNet
from fastloss.compare.records import Cost
from fastloss.compare.training import Point, Predict, Settings, Task, train

HELD_OUT = (slice(30, 36), slice(58, 64), slice(86, 92))
"""Axial slices, from the feet, whose labels nothing is trained on."""
GAP = 2
"""Slices on each side of them that are not trained on either: neighbours are nearly the same."""
DEPTH = 16
"""Slices of a patch. Parts that are trained on are no thinner, and a held-out slab fits in with its
surroundings."""
WINDOW = (-160.0, 240.0)
"""Hounsfield units: soft tissues differ by some tens, of the 4000 that a CT has."""
LEAST = 60
"""Voxels that an organ has in the held-out slabs, and beside them, to be judged."""
METRICS = ("dice", "nsd", "hd95")
TOLERANCE = 3.0
"""The tolerance of NSD in mm: a voxel."""
MONAI = "MONAI's dice_ce"


class Result(NamedTuple):
    """The outcome of one loss."""

    predicted: np.ndarray
    """The labels of the held-out slabs, and 0 elsewhere."""
    scores: fl.metrics.Scores
    curve: list[Point]


def main() -> None:
    parser, options, losses = _options()
    torch.set_num_threads(options.threads)
    fl.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    print("Reading the CT ...", flush=True)
    scan = largest(load_organs(), options.organs)
    judged = common(scan)
    if not judged:
        parser.error("--organs: none of so few is in the held-out slabs and beside them")
    settings = Settings(
        steps=options.steps,
        patch=(DEPTH, *(-(-n // Halved.DIVISOR) * Halved.DIVISOR for n in scan.labels.shape[1:])),
        width=options.width,
        points=6,
    )
    whole = volume(scan)
    training = [part(whole, where) for where in trained_on(scan.labels.shape[0])]
    share = 100 * sum(len(each.labels) for each in training) / len(scan.labels)
    print(
        f"{len(scan.classes) - 1} organs, {scan.labels.shape} voxels of 3 mm. Trained on: "
        f"{share:.0f} % of the slices. Held out: {_listed(HELD_OUT)}, with {len(judged)} organs",
        flush=True,
    )

    results: dict[str, Result] = {}
    for name, spec in losses.items():
        print(f"\n{name}, {settings.steps} steps", flush=True)
        results[name] = _trained(_task(spec, training, scan, settings), whole, scan, judged)

    _print_organs(scan, results, judged)
    specs = dict(losses) | ({MONAI: "monai_losses:dice_ce"} if find_spec("monai") else {})
    costs = [
        measure(name, _task(spec, training, scan, settings), Halved.of)
        for name, spec in specs.items()
    ]
    _print_costs(costs, len(scan.classes))
    _write(scan, results, judged, options.out / "organs.csv")
    _draw_slices(scan, results, options.out / "slices.png")
    _draw_dice(scan, results, judged, options.out / "dice.png")
    print(
        f"\nslices.png, dice.png and organs.csv are in {options.out}.\n"
        "It is one patient. The held-out slabs lie between parts of the same organs, and the\n"
        "network is told where in the body a voxel is: this shows that the losses train with many\n"
        "classes, and what they cost. It does not show how well organs of another patient would\n"
        "be found, nor which loss is better: that takes several patients and trainings, as in\n"
        "python -m fastloss compare --data CASES."
    )


def _options() -> tuple[argparse.ArgumentParser, argparse.Namespace, dict[str, str]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--losses", default="dice_ce,dice_ce_boundary", metavar="LIST", help="as those of "
        "python -m fastloss compare (default: %(default)s)")  # fmt: skip
    add("--organs", type=int, default=24, help="the largest, 61 at most (default: 24)")
    add("--steps", type=int, default=300, help="(default: 300)")
    add("--width", type=int, default=16, help="channels of the network (default: 16)")
    add("--threads", type=int, default=1, help="of PyTorch and of the loss (default: 1)")
    add("--out", type=Path, default=Path("organs"), help="folder of the results (default: organs)")
    options = parser.parse_args()
    for name in ("organs", "steps", "width", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    try:
        return parser, options, read_losses(options.losses)
    except (UnknownLoss, ValueError) as error:
        parser.error(str(error))


# ---------------------------------------------------------------------- the CT and its slabs


def largest(scan: Scan, count: int) -> Scan:
    """With the largest organs alone, in the order of the scan; the others are background."""
    sizes = np.bincount(scan.labels.ravel(), minlength=len(scan.classes))
    kept = sorted(sorted(range(1, len(scan.classes)), key=lambda i: -sizes[i])[:count])
    table = np.zeros(len(scan.classes), np.uint8)
    table[kept] = np.arange(1, len(kept) + 1)
    classes = ("background", *(scan.classes[i] for i in kept))
    return scan._replace(labels=table[scan.labels], classes=classes)


def volume(scan: Scan) -> Volume:
    """Four channels: the CT, and where a voxel is, by height, from back to front, side to side."""
    window = np.clip(scan.image, *WINDOW)
    # Places have a deviation of 1 like grey values: augmentation varies both alike.
    z, y, x = (np.linspace(-1.7, 1.7, n, dtype=np.float32) for n in scan.image.shape)
    channels = ((window - window.mean()) / window.std(), z[:, None, None], y[:, None], x)
    image = np.stack([np.broadcast_to(each, scan.image.shape) for each in channels])
    return Volume("ct", image.astype(np.float32), scan.labels, scan.spacing)


def trained_on(depth: int) -> list[slice]:
    """The slices between the held-out slabs, and without their neighbours."""
    starts = [0, *(each.stop + GAP for each in HELD_OUT)]
    stops = [*(each.start - GAP for each in HELD_OUT), depth]
    return [slice(a, b) for a, b in zip(starts, stops, strict=True)]


def part(whole: Volume, where: slice) -> Volume:
    return whole._replace(image=whole.image[:, where], labels=whole.labels[where])


def common(scan: Scan) -> list[int]:
    """Organs that are in the held-out slabs and in what is trained on."""
    count = len(scan.classes)
    inside, outside = (
        sum(np.bincount(scan.labels[where].ravel(), minlength=count) for where in places)
        for places in (HELD_OUT, trained_on(len(scan.labels)))
    )
    return [i for i in range(1, count) if min(inside[i], outside[i]) >= LEAST]


# ---------------------------------------------------------------------- training


class Halved(nn.Module):
    """A U-Net at half the resolution whose logits have the full one, at an eighth of the time.

    Cubes of 2³ voxels become channels before it, and channels become cubes of logits behind it, so
    that nothing of the image is lost. Places, all channels but the first, also go past it: it
    normalises each channel of a patch, which takes the height of a slab away.
    """

    DIVISOR = 2 * DIVISOR

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.inner = UNet(8 * channels, 8 * classes, width)
        self.place = nn.Sequential(
            nn.Conv3d(8 * (channels - 1), 2 * width, 1),
            nn.LeakyReLU(0.01),
            nn.Conv3d(2 * width, 2 * width, 1),
            nn.LeakyReLU(0.01),
            nn.Conv3d(2 * width, 8 * classes, 1),
        )

    @classmethod
    def of(cls, task: Task) -> nn.Module:
        """The same start for every loss."""
        torch.manual_seed(task.seed)
        return cls(task.channels, task.classes, task.settings.width)

    def forward(self, image: Tensor) -> Tensor:
        b, channels, *sizes = image.shape
        d, h, w = (n // 2 for n in sizes)
        cubes = image.view(b, channels, d, 2, h, 2, w, 2).permute(0, 1, 3, 5, 7, 2, 4, 6)
        cubes = cubes.reshape(b, 8 * channels, d, h, w)
        logits = self.inner(cubes) + self.place(cubes[:, 8:])
        cubes = logits.view(b, self.classes, 2, 2, 2, d, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return cubes.reshape(b, self.classes, *sizes)


def _task(spec: str, training: Sequence[Volume], scan: Scan, settings: Settings) -> Task:
    return Task(
        loss=TrainingLoss(spec, scan.spacing),
        seed=0,
        fold=0,
        training=training,
        classes=len(scan.classes),
        channels=len(training[0].image),
        learning_rate=settings.learning_rate,
        settings=settings,
        validate=lambda predict: 0.0,
    )


def _trained(task: Task, whole: Volume, scan: Scan, judged: Sequence[int]) -> Result:
    def validate(predict: Predict) -> float:
        found = _mean(judge(_held_out(predict, whole), scan, ("dice",)), "dice", judged)
        print(f"  held-out Dice, mean of {len(judged)} organs: {found:.3f}", flush=True)
        return found

    done = train(replace(task, validate=validate), Halved.of)
    predicted = _held_out(done.predict, whole)
    return Result(predicted, judge(predicted, scan, METRICS), done.curve)


def _held_out(predict: Predict, whole: Volume) -> np.ndarray:
    """The labels of the slabs, predicted with the slices around them; 0 elsewhere."""
    found = np.zeros_like(whole.labels)
    for slab in HELD_OUT:
        around = (DEPTH - (slab.stop - slab.start)) // 2
        first = slab.start - around
        labels = predict(whole.image[:, first : slab.stop + around])
        found[slab] = labels[slab.start - first : slab.stop - first]
    return found


def judge(predicted: np.ndarray, scan: Scan, metrics: Sequence[str]) -> fl.metrics.Scores:
    """The scores of all held-out slabs together."""
    truth = np.zeros_like(scan.labels)
    for slab in HELD_OUT:
        truth[slab] = scan.labels[slab]
    return fl.metrics.evaluate(
        predicted[None],
        truth[None],
        metrics=metrics,
        classes=scan.classes,
        spacing=scan.spacing,
        tolerance=TOLERANCE,
    )


def _mean(scores: fl.metrics.Scores, metric: str, judged: Sequence[int]) -> float:
    return float(np.nanmean(scores[metric][0][np.array(judged) - 1]))


# ---------------------------------------------------------------------- results


def _print_organs(scan: Scan, results: Mapping[str, Result], judged: Sequence[int]) -> None:
    width = max(len(name) for name in scan.classes) + 1
    form = "{:>12.3f}{:>7.2f}{:>9.1f}"
    print(f"\n{'':{width}}" + "".join(f"{name:>28}" for name in results))
    heads = f"{'Dice':>12}{'NSD':>7}{'HD95 mm':>9}" * len(results)
    print(f"{'held-out slabs':{width}}{heads}")
    for i in judged:
        values = [[each.scores[m][0, i - 1] for m in METRICS] for each in results.values()]
        print(f"{scan.classes[i]:{width}}" + "".join(form.format(*each) for each in values))
    means = [
        (
            _mean(each.scores, "dice", judged),
            _mean(each.scores, "nsd", judged),
            np.median(each.scores["hd95"][0][np.array(judged) - 1]),
        )
        for each in results.values()
    ]
    name = "mean (HD95: median)"
    print(f"{name:{width}}" + "".join(form.format(*each) for each in means))


def _print_costs(costs: Sequence[Cost], classes: int) -> None:
    print(f"\n{f'{classes} classes':<20}{'loss alone':>14}{'its memory':>14}{'whole step':>14}")
    for each in costs:
        mib = "not told" if each.peak_bytes == UNKNOWN else f"{each.peak_bytes / 2**20:.0f} MiB"
        times = f"{each.loss_ms:.1f} ms", f"{each.step_ms:.0f} ms"
        print(f"{each.loss:<20}{times[0]:>14}{mib:>14}{times[1]:>14}")


def _write(scan: Scan, results: Mapping[str, Result], judged: Sequence[int], path: Path) -> None:
    rows = [
        [name, scan.classes[i], *(float(each.scores[m][0, i - 1]) for m in METRICS)]
        for name, each in results.items()
        for i in judged
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["loss", "organ", *METRICS], *rows])


def _draw_slices(scan: Scan, results: Mapping[str, Result], path: Path) -> None:
    """Rows: a slice of each held-out slab; columns: the CT, the reference, the predictions."""
    panels = {"CT": np.zeros_like(scan.labels), "reference": scan.labels}
    panels |= {name: each.predicted for name, each in results.items()}
    figure = Figure(figsize=(3.4 * len(panels), 9.4), layout="constrained", facecolor="black")
    colours = _colours(len(scan.classes) - 1)
    grid = figure.subplots(len(HELD_OUT), len(panels))
    low, high = WINDOW
    for axes, slab in zip(grid[::-1], HELD_OUT, strict=True):  # the head is above
        index = (slab.start + slab.stop) // 2
        grey = np.clip((scan.image[index] - low) / (high - low), 0, 1)[..., None]
        for ax, (name, labels) in zip(axes, panels.items(), strict=True):
            shown = grey.repeat(3, axis=2)
            where = labels[index] > 0
            shown[where] = 0.35 * shown[where] + 0.65 * colours[labels[index][where] - 1]
            ax.imshow(shown, origin="lower", interpolation="nearest")
            ax.set_title(f"{name}, slice {index}", color="white", fontsize=10)
            ax.axis("off")
    handles = [
        Patch(color=colour, label=name)
        for name, colour in zip(scan.classes[1:], colours, strict=True)
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=6,
        fontsize=8,
        labelcolor="white",
        facecolor="black",
    )
    figure.savefig(path, dpi=100)


def _colours(count: int) -> np.ndarray:
    """(count, 3), of which neighbours differ much."""
    hues = (np.arange(count) * 0.381966) % 1
    kinds = [(1.0, 1.0), (0.5, 1.0), (1.0, 0.65), (0.4, 0.75)]
    return np.array([hsv_to_rgb((hue, *kinds[i % 4])) for i, hue in enumerate(hues)])


def _draw_dice(
    scan: Scan, results: Mapping[str, Result], judged: Sequence[int], path: Path
) -> None:
    """The Dice of each organ, the largest first, and the mean over the training."""
    figure = Figure(figsize=(11, 1.2 + 0.24 * len(judged)), layout="constrained")
    organs, training = figure.subplots(1, 2, width_ratios=[1.4, 1])
    sizes = np.bincount(scan.labels.ravel(), minlength=len(scan.classes))
    order = sorted(judged, key=lambda i: sizes[i])
    places = np.arange(len(order))
    for number, (name, each) in enumerate(results.items()):
        mark = "osD^v"[number % 5]
        dice = each.scores["dice"][0][np.array(order) - 1]
        organs.plot(dice, places, mark, label=name, alpha=0.75)
        training.plot(
            [point.step for point in each.curve],
            [point.metric for point in each.curve],
            f"-{mark}",
            label=name,
        )
    organs.set_yticks(places, [scan.classes[i] for i in order])
    organs.set(xlabel="Dice in the held-out slabs", xlim=(-0.02, 1))
    training.set(xlabel="step", ylabel="mean of the organs at the left", ylim=(0, 1))
    for ax in (organs, training):
        ax.grid(alpha=0.3)
        ax.legend()
    figure.savefig(path, dpi=100)


def _listed(slabs: Sequence[slice]) -> str:
    return "slices " + ", ".join(f"{each.start} to {each.stop - 1}" for each in slabs)


if __name__ == "__main__":
    main()
