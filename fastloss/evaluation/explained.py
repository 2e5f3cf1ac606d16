"""``python -m fastloss explain``: where the loss of one prediction comes from."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from fastloss.evaluation.costs import Cost, costs
from fastloss.evaluation.files import (
    ENDINGS,
    LabelMap,
    Mismatch,
    check_reader,
    read_image,
    read_label_map,
)
from fastloss.evaluation.named_loss import loss_of
from fastloss.evaluation.results import shown
from fastloss.explanation import Explanation
from fastloss.loss import Loss
from fastloss.version import __version__

KEYS = ("logits", "probabilities", "softmax", "labels", "target")
"""Names of arrays in .npz files, which may hold others."""


@dataclass(frozen=True)
class Case:
    """An explained prediction, as it is printed and shown."""

    explanation: Explanation
    numbers: np.ndarray
    """The map of the loss, (B, \\*spatial), or of overlapping channels (B, C, \\*spatial)."""
    prediction: np.ndarray
    reference: np.ndarray
    """The same of labels, or of masks; −1 in the reference where a voxel counts for nothing."""
    costs: tuple[Cost, ...]
    by_channel: bool
    place: LabelMap | None
    """Where the voxels are, of a target in NIfTI."""
    image: np.ndarray | None
    """(\\*spatial)."""
    about: dict[str, Any]

    def share(self, cost: float) -> str:
        """That of the whole map, in per cent."""
        total = float(self.numbers.sum(dtype=np.float64))
        return f"{100 * cost / total:.3g} %" if total > 0 and np.isfinite(cost / total) else "–"

    def rows(self) -> list[dict[str, str]]:
        """A row for each of the regions, as text."""
        return [self._row(each) for each in self.costs]

    def _row(self, each: Cost) -> dict[str, str]:
        row = {"sample": str(each.sample)} if len(self.numbers) > 1 else {}
        if each.channel is None:
            row |= {"class": str(each.label), "predicted": str(each.predicted)}
        else:
            row |= {"channel": str(each.channel), "": "missed" if each.label else "too much"}
        row["voxels"] = str(each.voxels)
        if self.place is not None:
            row["mm³" if len(self.place.spacing) == 3 else "mm²"] = shown(
                each.voxels * float(np.prod(self.place.spacing))
            )
        # As the file has its axes, x first.
        index = each.peak if self.place is None else each.peak[::-1]
        row["worst voxel"] = "(" + ", ".join(map(str, index)) + ")"
        return row | {"cost": f"{each.cost:.4g}", "of the map": self.share(each.cost)}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "The table has the parts of the value by class and term. A region is a connected set of\n"
        "wrong voxels with one pair of labels; it costs the sum of the map over it. The map is,\n"
        "of terms that sum over voxels, the loss of each voxel, and of other terms by how much\n"
        "the loss would fall if this voxel alone were right.\n"
        "exit status: 0, or 2 for wrong arguments."
    )
    add = parser.add_argument
    add(
        "logits",
        metavar="LOGITS",
        help="the network's output, .npy or .npz: (C, *spatial) or (B, C, *spatial), spatial axes "
        "as z, y, x",
    )
    add(
        "target",
        metavar="TARGET",
        help="labels, (*spatial) or (B, *spatial), or masks of the shape of the logits: .npy, "
        ".npz, or a NIfTI label map",
    )
    add(
        "--loss",
        default="dice_ce",
        metavar="LOSS",
        help="names of terms, as dice_ce, cross_entropy, or Dice+0.5*Focal; or MODULE:OBJECT "
        "(default: %(default)s)",
    )
    add(
        "--activation",
        choices=("softmax", "sigmoid", "none"),
        default=None,
        help="none: LOGITS holds probabilities (default: the loss's own, softmax)",
    )
    add(
        "--ignore-index",
        type=int,
        default=None,
        metavar="LABEL",
        help="voxels of this label count for nothing",
    )
    add(
        "--spacing",
        type=float,
        nargs="+",
        default=None,
        metavar="SIZE",
        help="of a voxel, z y x or one number, for distances and lesions that the loss finds "
        "(default: the loss's own)",
    )
    add("--exact", action="store_true", help="exact gains in place of those of first order: slow")
    add("--image", type=Path, metavar="FILE", help="NIfTI or .npy, shown below the map")
    add("--worst", type=int, default=10, metavar="N", help="regions in the table (default: 10)")
    add("--pictures", type=int, default=3, metavar="N", help="of them in the page (default: 3)")
    add(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="write parts.csv, regions.csv and the maps, NIfTI where the target is, else .npy",
    )
    add("--html", type=Path, metavar="FILE", help="write a page with tables and pictures")


def run(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    arguments: Sequence[str],
) -> int:
    """The exit status. Wrong arguments exit by ``parser.error``."""
    try:
        _check_outputs(options)
        found = explained(options, arguments)
    except (TypeError, ValueError, ImportError) as error:
        parser.error(" ".join(str(error).split()))
    print(f"{options.loss} of {options.logits}")
    print(found.explanation)
    rows = found.rows()
    if rows:
        print(f"\nwrong regions that cost most: {len(rows)}")
        print(_text(rows))
    else:
        print("\nno voxel is wrong")
    try:
        if options.out is not None:
            _write_files(options.out, found)
        if options.html is not None:
            from fastloss.evaluation.explained_page import page

            text = page(found, pictures=options.pictures)
            options.html.write_text(text, encoding="utf-8")
    except OSError as error:
        parser.error(str(error))
    return 0


def explained(options: argparse.Namespace, arguments: Sequence[str]) -> Case:
    """The case of these options.

    Raises:
        ValueError, TypeError, ImportError: a file that cannot be read, arrays that do not fit, an
            unknown loss.
    """
    given: dict[str, Any] = {"activation": options.activation, "ignore_index": options.ignore_index}
    loss = Loss(loss_of(options.loss), **given)
    if loss.channel_axis != 1:
        loss = Loss(*(weight * term for weight, term in loss.terms), **given)
    logits, target, place = _read(Path(options.logits), Path(options.target))
    spacing = options.spacing
    if spacing is not None:
        spacing = spacing[0] if len(spacing) == 1 else tuple(spacing)
    if logits.ndim not in (3, 4, 5):
        raise Mismatch(f"LOGITS: expected one to three spatial axes, got shape {logits.shape}")
    explanation = loss.explain(logits, target, spacing=spacing, exact=options.exact)
    by_channel = loss.activation == "sigmoid"
    prediction, reference = _classes(loss, logits, target)
    numbers = explanation.numbers()
    dearest = costs(numbers, prediction, reference, by_channel=by_channel, most=options.worst)
    return Case(
        explanation,
        numbers,
        prediction,
        reference,
        tuple(dearest),
        by_channel,
        place,
        None if options.image is None else _image(options.image, logits.shape[2:]),
        {
            "Prediction": str(options.logits),
            "Reference": str(options.target),
            "Loss": repr(loss),
            "Gains": "exact" if options.exact else "of first order",
            "fastloss": __version__,
            "Date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "Command": "python -m fastloss " + shlex.join(arguments),
        },
    )


def _read(logits_path: Path, target_path: Path) -> tuple[np.ndarray, np.ndarray, LabelMap | None]:
    """Logits (B, C, \\*spatial), the target that fits them, and where its voxels are."""
    logits = _array(logits_path, "LOGITS")
    place = None
    if target_path.name.lower().endswith(ENDINGS):
        check_reader()
        place = read_label_map(target_path)
        target = place.voxels
    else:
        target = _array(target_path, "TARGET")
    x, y = logits.shape, target.shape
    if y in (x[1:], x) and not (y == x and len(x) == 5):
        return logits[None], target[None], place
    if len(x) > 2 and y == x[2:] and x[0] == 1:
        return logits, target[None], place
    if len(x) > 2 and y in (x, (x[0], *x[2:])):
        return logits, target, place
    hint = "; its axes are those of x, y, z reversed" if y == x[:0:-1] else ""
    raise Mismatch(
        f"TARGET: for logits of shape {x} expected {x[1:]} of labels, a batch of them, or masks "
        f"{x}, got shape {y}{hint}"
    )


def _array(path: Path, role: str) -> np.ndarray:
    """The array in a file of NumPy's. Mismatch: it cannot be read."""
    try:
        found: Any = np.load(path, allow_pickle=False)
        if isinstance(found, np.lib.npyio.NpzFile):
            with found:
                names = [name for name in KEYS if name in found.files] or found.files
                if len(names) != 1 and len(found.files) != 1:
                    there = ", ".join(found.files)
                    raise Mismatch(
                        f"{role}: {path}: expected one array, or one called {' or '.join(KEYS)}, "
                        f"got {there or 'none'}"
                    )
                found = found[names[0]]
    except Mismatch:
        raise
    except Exception as error:  # those of zip files, and of NumPy's format
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Mismatch(f"{role}: {path}: cannot be read: {reason}") from None
    array: np.ndarray = found
    return array


def _image(path: Path, spatial: Sequence[int]) -> np.ndarray:
    """Numbers of the shape of a sample."""
    if path.name.lower().endswith(ENDINGS):
        image = read_image(path).voxels
    else:
        image = _array(path, "--image")
    if image.shape != tuple(spatial):
        raise Mismatch(f"--image: expected shape {tuple(spatial)}, got {image.shape}")
    return image


def _classes(loss: Loss, logits: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is predicted and what is there, as `Case` has them."""
    classes, dense = logits.shape[1], target.ndim == logits.ndim
    by_channel, ignored = loss.activation == "sigmoid", loss.ignore_index
    if by_channel:
        prediction = (logits > 0).astype(np.int32)
        masks = (
            target.reshape(logits.shape)
            if dense or classes == 1
            else (np.moveaxis(target[..., None] == np.arange(classes), -1, 1))
        )
        reference = (masks > 0.5).astype(np.int32)
    elif classes == 1:
        prediction = (logits[:, 0] > 0.5).astype(np.int32)
        reference = (target.reshape(prediction.shape) > 0.5).astype(np.int32)
    else:
        prediction = logits.argmax(axis=1).astype(np.int32)
        reference = (target.argmax(axis=1) if dense else target).astype(np.int32)
    if ignored is not None:
        if not dense:
            away = target == ignored
        elif classes > 1 and 0 <= ignored < classes:
            away = target[:, ignored] > 0.5
        else:
            away = (target == ignored).any(axis=1)
        reference[np.broadcast_to(away[:, None] if by_channel else away, reference.shape)] = -1
    return prediction, reference


def _check_outputs(options: argparse.Namespace) -> None:
    """Better said now than after the work."""
    for name in ("worst", "pictures"):
        if getattr(options, name) < 0:
            raise ValueError(f"--{name}: expected at least 0, got {getattr(options, name)}")
    path = options.html
    if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
        raise ValueError(f"--html: expected a file in a folder there is, got {str(path)!r}")
    if options.out is not None and not options.out.resolve().parent.is_dir():
        raise ValueError(f"--out: expected a folder in one there is, got {str(options.out)!r}")


def _write_files(folder: Path, case: Case) -> None:
    folder.mkdir(exist_ok=True)
    found = case.explanation
    found.to_csv(folder / "parts.csv")
    _write_rows(folder / "regions.csv", case)
    _write_map(folder, "map", case.numbers, case.place)
    if len(found.maps) > 1:
        for name in found.maps:
            of_term = "map_" + name.replace(" ", "_")
            _write_map(folder, of_term, found.numbers(name), case.place)


def _write_rows(path: Path, case: Case) -> None:
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        axes = case.numbers.ndim - 1 - case.by_channel
        names = ("sample", "channel", "label", "predicted", "voxels", "cost")
        places = [f"peak {i}" for i in range(axes)] if case.place is None else list("xyz"[:axes])
        writer.writerow([*names, *places])
        for each in case.costs:
            peak = each.peak if case.place is None else each.peak[::-1]
            channel = "" if each.channel is None else each.channel
            writer.writerow(
                [each.sample, channel, each.label, each.predicted, each.voxels, each.cost, *peak]
            )


def _write_map(folder: Path, name: str, numbers: np.ndarray, place: LabelMap | None) -> None:
    if place is None or not find_spec("nibabel") or len(numbers) > 1:
        np.save(folder / f"{name}.npy", numbers)
        return
    import nibabel

    image: Any = nibabel.Nifti1Image(numbers[0].T.astype(np.float32), place.affine)
    nibabel.save(image, folder / f"{name}.nii.gz")


def _text(rows: Sequence[dict[str, str]]) -> str:
    """Rows of cells in columns."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ([c.rjust(w) for c, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(cells) for cells in padded)
