"""``python -m fastloss explain``: its options, and what it prints and writes."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from fastloss.evaluation.explained import Case, explained
from fastloss.evaluation.files import LabelMap


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

    made: Any = nibabel.Nifti1Image
    image = made(numbers[0].T.astype(np.float32), place.affine)
    nibabel.save(image, folder / f"{name}.nii.gz")


def _text(rows: Sequence[dict[str, str]]) -> str:
    """Rows of cells in columns."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ([c.rjust(w) for c, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(cells) for cells in padded)
