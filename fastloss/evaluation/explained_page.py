"""The page of an explained prediction: one file that needs nothing else."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np

from fastloss.evaluation.costs import Cost
from fastloss.evaluation.explained import Case
from fastloss.evaluation.html import document, facts, gallery, html_table
from fastloss.evaluation.overlay import Picture, Turn, grey_of_labels, slices, window
from fastloss.evaluation.results import shown

PERCENTILE = 99.5
"""Of the numbers above 0 in a map: those above have the full colour."""
MOST_OPAQUE = 0.85


def page(case: Case, *, pictures: int = 3) -> str:
    """The page as text.

    Args:
        case: what is shown.
        pictures: of how many regions, those that cost most.
    """
    found = case.explanation
    title = f"Where the loss comes from: {shown(found.value)}"
    return document(title, [f"<h1>{title}</h1>", facts(case.about), _parts(case),
                            _regions(case), *_pictures(case, pictures)])  # fmt: skip


def _parts(case: Case) -> str:
    found = case.explanation
    rows = [
        [label, *(shown(parts[n]) if n in parts else "" for n in found.terms), _sum(parts)]
        for label, parts in (*found.by_class().items(), ("sum", found.terms))
    ]
    header = ["class", *(f"{escape(n)}<small>{kind}</small>" for n, kind in found.kinds.items())]
    return (
        "<h2>By class and term</h2><p>What each adds to the value. The map of a term has the "
        "<i>share</i> of every voxel in it, or the <i>gain</i>: by how much the loss would fall if "
        "this voxel alone were predicted right.</p>" + html_table([*header, "total"], rows)
    )


def _sum(parts: dict[str, float]) -> str:
    return shown(sum(parts.values()))


def _regions(case: Case) -> str:
    parts = ["<h2>Wrong regions that cost most</h2>"]
    rows = case.rows()
    if not rows:
        return parts[0] + "<p>No voxel is wrong.</p>"
    parts.append(
        "<p>Connected voxels with one pair of labels; the cost is the sum of the map over them.</p>"
    )
    cells = [[str(i + 1), *map(escape, row.values())] for i, row in enumerate(rows)]
    parts.append(html_table(["", *map(escape, rows[0])], cells))
    lesions = case.explanation.region_rows()[: len(rows)]
    if lesions:
        parts.append(
            "<h2>Lesions that cost most</h2><p>The parts of the terms that are formed in the "
            "region of each; numbers are those of the regions.</p>"
        )
        each = [[escape(str(row[k])) for k in row if k != "part"] + [shown(row["part"])]
                for row in lesions]  # fmt: skip
        parts.append(html_table(list(lesions[0]), each))
    return "\n".join(parts)


def _pictures(case: Case, most: int) -> list[str]:
    shape = case.numbers.shape[1 + case.by_channel :]
    wanted = case.costs[:most]
    if not wanted or len(shape) == 1:
        return []
    parts = [
        "<h2>Pictures</h2><p>Slices through the dearest voxel of the dearest regions: "
        '<span class="reference">reference</span> and <span class="prediction">prediction</span> '
        'of the class, and <span class="heat">the map</span> of the loss. '
        + (
            "In axial and coronal slices left is the patient's right, in sagittal ones left is the "
            "front.</p>"
            if case.place is not None
            else "The axes are those of the arrays.</p>"
        )
    ]
    for i, each in enumerate(wanted):
        found, brightest = _slices(case, each)
        about = ", ".join(f"{name} {value}".strip() for name, value in case.rows()[i].items())
        parts.append(
            f'<section class="case"><h3>{i + 1}</h3><p>{escape(about)}; full colour from '
            f"{brightest:.3g} a voxel</p>{gallery(found, f'region {i + 1}')}</section>"
        )
    return parts


def _slices(case: Case, each: Cost) -> tuple[tuple[Picture, ...], float]:
    """Three slices through a region, or one, and the number of the map that has the full colour."""
    at: Any = each.sample if each.channel is None else (each.sample, each.channel)
    numbers, prediction, reference = (
        array[at] for array in (case.numbers, case.prediction, case.reference)
    )
    # Of a voxel that is taken for the background, or is of it, the other class.
    label = 1 if each.channel is not None else each.label or each.predicted
    above = numbers[numbers > 0]
    brightest = float(np.percentile(above, PERCENTILE)) if len(above) else 1.0
    heat = np.sqrt(np.clip(np.nan_to_num(numbers) / brightest, 0.0, 1.0)) * MOST_OPAQUE
    if case.image is None:
        grey = grey_of_labels(np.maximum(reference, 0))
    else:
        grey = window(case.image)
    affine, spacing = np.diag([-1.0, -1.0, -1.0, 1.0]), (1.0,) * numbers.ndim
    if case.place is not None:
        affine, spacing = case.place.affine, case.place.spacing
    around = np.zeros(numbers.shape, bool)
    around[each.box] = True
    turn = Turn(affine, numbers.ndim)
    pictures = slices(
        turn(grey),
        turn(prediction == label),
        turn(reference == label),
        turn.place(each.peak, numbers.shape),
        turn.sizes(spacing),
        turn(heat),
        turn(around),
    )
    if case.place is None and numbers.ndim == 3:
        names = [f"axis {axis}, slice {each.peak[axis]}" for axis in range(3)]
        pictures = tuple(p._replace(view=v) for p, v in zip(pictures, names, strict=True))
    return pictures, brightest
