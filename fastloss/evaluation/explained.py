"""A prediction in files, and where its loss comes from."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
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
            unit = "mm³" if len(self.place.spacing) == 3 else "mm²"
            row[unit] = f"{each.voxels * float(np.prod(self.place.spacing)):.0f}"
        # As the file has its axes, x first.
        index = each.peak if self.place is None else each.peak[::-1]
        row["worst voxel"] = "(" + ", ".join(map(str, index)) + ")"
        return row | {"cost": f"{each.cost:.4g}", "of the map": self.share(each.cost)}


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
    if y in (x[1:], x) and len(x) < 5:  # else there would be four spatial axes
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
