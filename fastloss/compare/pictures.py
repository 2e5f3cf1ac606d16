"""Pictures of held-out cases: image, reference, prediction and loss side by side."""

from __future__ import annotations

import numpy as np

from fastloss.compare.data import Volume
from fastloss.compare.records import Picture

HEIGHT = 200
"""Pixels of a picture, at least."""
GAP = 6
HEAT = (255, 60, 190)
# Colours that are told apart by people who see no red or no green, too; then by their hue.
COLOURS = (
    (0, 158, 235), (240, 150, 0), (0, 170, 120), (225, 110, 180), (245, 230, 70), (215, 70, 0),
    (130, 90, 220), (120, 200, 250),
)  # fmt: skip
OPACITY = 0.55


def picture(
    loss: str, words: str, case: Volume, prediction: np.ndarray, parts: np.ndarray | None = None
) -> Picture:
    """The slice with the most wrong voxels: the image, the reference over it, the prediction, and
    where the loss comes from.

    Slices are across the first axis, the axial ones of a NIfTI file. Up is where the second axis
    grows.

    Args:
        words: "best" or "worst", for the caption.
        parts: a number for each voxel; shown from 0, as the image is, to the largest of the slice.
    """
    counted = case.labels < 1 + int(max(prediction.max(), _largest(case)))
    wrong = (prediction != case.labels) & counted
    each = wrong.reshape(len(wrong), -1).sum(axis=1)
    if not each.any():
        each = (case.labels > 0).reshape(len(wrong), -1).sum(axis=1)
    index = int(each.argmax())
    grey = _window(case.image[0, index])
    panels = [_coloured(grey, None)]
    panels += [_coloured(grey, labels[index]) for labels in (case.labels, prediction)]
    caption = (
        f"{words} case of {loss}: {case.name}, slice {index}; the image, the reference, "
        "the prediction"
    )
    if parts is not None:
        panels.append(_heated(grey, parts[index]))
        caption += ", and where the loss comes from"
    spacing = case.spacing[1:]
    scale = max(1.0, HEIGHT / (grey.shape[0] * spacing[0] / min(spacing)))
    shown = [_scaled(panel, [scale * step / min(spacing) for step in spacing]) for panel in panels]
    gap = np.full((len(shown[0]), GAP, 3), 255, np.uint8)
    image = np.concatenate([part for panel in shown for part in (panel, gap)][:-1], axis=1)
    return Picture(loss, case.name, caption, image)


def _largest(case: Volume) -> int:
    return int(case.labels.max())


def _window(image: np.ndarray) -> np.ndarray:
    low, high = np.percentile(image, (1, 99))
    found: np.ndarray = np.clip((image - low) / max(float(high - low), 1e-9), 0, 1)
    return found


def _coloured(grey: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    found = np.repeat(255 * grey[..., None], 3, axis=2)
    if labels is not None:
        table = np.array([COLOURS[i % len(COLOURS)] for i in range(int(labels.max()) + 1)])
        where = labels > 0
        colours = table[labels[where].astype(int) - 1]
        found[where] = (1 - OPACITY) * found[where] + OPACITY * colours
    return found.astype(np.uint8)[::-1]


def _heated(grey: np.ndarray, parts: np.ndarray) -> np.ndarray:
    share = np.clip(parts / max(float(parts.max()), 1e-30), 0, 1)[..., None]
    found: np.ndarray = (1 - share) * (160 * grey[..., None]) + share * np.array(HEAT)
    return found.astype(np.uint8)[::-1]


def _scaled(panel: np.ndarray, factors: list[float]) -> np.ndarray:
    rows, columns = (
        np.minimum((np.arange(max(1, round(n * f))) / f).astype(int), n - 1)
        for n, f in zip(panel.shape, factors, strict=False)
    )
    return panel[np.ix_(rows, columns)]
