"""All metrics of a prediction in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastloss.metrics import lesion, overlap, surface
from fastloss.metrics.empty import empties_of, value_of
from fastloss.metrics.inputs import read_pair
from fastloss.metrics.metric import Metric, find_metrics
from fastloss.metrics.scores import Scores

METRICS: dict[str, Metric] = {**overlap.METRICS, **surface.METRICS, **lesion.METRICS}
"""All metrics by name, but for those whose name holds a number, such as "hd95" and "f2"."""
PATTERNS = (*overlap.PATTERNS, *surface.PATTERNS)
DEFAULT = ("dice", "iou", "hd95", "assd", "nsd")


def evaluate(
    prediction: Any,
    reference: Any,
    *,
    metrics: Sequence[str] | str = DEFAULT,
    classes: Any = None,
    include_background: bool | None = None,
    activation: str | None = None,
    ignore_index: int | None = None,
    mask: Any = None,
    spacing: Any = None,
    definition: str = "deepmind",
    tolerance: Any = 1.0,
    connectivity: int | None = None,
    lesion_match: str = "overlap",
    lesion_threshold: float = 0.5,
    lesion_dilation: int = 3,
    lesion_min_volume: float = 50.0,
    lesion_miss: float = 374.0,
    empty: Any = None,
    samples: Sequence[str] | None = None,
) -> Scores:
    """Metrics of a batch of predictions, for every sample and class.

    Args:
        prediction: a label map (B, \\*spatial) or (B, 1, \\*spatial), or scores (B, C, \\*spatial):
            logits or probabilities, see ``activation``. One to three spatial axes; an axis of one
            behind the batch is one of channels, unless ``spacing`` has a number for it. NumPy,
            PyTorch, CuPy, or another array that DLPack passes on.
        reference: a label map, or masks (B, C, \\*spatial).
        metrics: names in `METRICS`, or with a number: "hd95" (any percentile), "f2" (any beta).
        classes: how many classes there are; or their names; or names with the label, or the labels
            that are united to a region: ``{"whole tumour": (1, 2, 4), "core": (1, 4)}``. By default
            the channels of the prediction, or the labels up to the largest one, at least 1.
        include_background: whether class 0 is evaluated, where ``classes`` does not name labels.
            By default it is where masks may overlap ("sigmoid" and "none"), as none of them is the
            background, and else it is not.
        activation: what a prediction holds. "labels": label maps. "softmax": scores, of which the
            largest wins. "sigmoid": logits of masks that may overlap, each above 0.
            "none": probabilities of such masks, each above ½; masks of 0 and 1 too. By default
            "labels" if both arrays have one shape but for a channel axis of one, else "softmax".
        ignore_index: voxels of this label in the reference count for nothing.
        mask: (B, \\*spatial); voxels where it is 0 count for nothing.
        spacing: the distance between voxels: one number, or one for each spatial axis; 1 by
            default. Distances and tolerances have its unit.
        definition: of surfaces and their distances; see `fastloss.metrics.surface`.
        tolerance: of "nsd", "surface_precision" and "surface_recall": one number, one for each
            class, or a mapping from names of classes.
        connectivity: of lesions: 26, 18 or 6 in 3D, 8 or 4 in 2D; as each metric was published by
            default. For this and what follows see `fastloss.metrics.lesion`.
        lesion_match: when a lesion counts as found, or as right: "overlap", where it shares a voxel
            with any of the other side, or "iou", where it is matched one to one by
            ``lesion_threshold``.
        lesion_threshold: the IoU above which lesions are matched, in [0, 1].
        lesion_dilation: of "lesion_dice" and "lesion_hd95": how often the reference is dilated.
        lesion_min_volume: of those: true lesions up to this volume are left out; mm³ if the spacing
            is in mm.
        lesion_miss: of "lesion_hd95": the distance of a lesion that is missed or made up.
        empty: what a metric is where masks are empty: a pair (both empty, one empty), or such pairs
            by metric. Each is a number, "error", or None, for what the formula gives.
            ``METRICS[name].empty`` has the default.
        samples: names of the samples; numbers by default.

    Returns:
        A `Scores` table.

    Raises:
        ValueError: arrays that do not fit, labels outside the classes, an unknown metric, class or
            definition, an option out of range; an empty mask where ``empty`` is "error".
        TypeError: an argument of another kind.

    >>> import numpy as np, fastloss as fl
    >>> reference = np.zeros((1, 8, 8, 8), np.uint8)
    >>> reference[:, 2:5, 2:5, 2:5] = 1
    >>> scores = fl.metrics.evaluate(np.roll(reference, 1, 1), reference, metrics=("dice", "hd95"))
    >>> print(scores)
    Scores of 1 sample
            dice    hd95
    1     0.6667  1.0000
    mean  0.6667  1.0000
    """
    wanted = find_metrics(metrics, METRICS, PATTERNS)
    empties = empties_of(empty, {name: metric.empty for name, metric in wanted.items()})
    pair = read_pair(
        prediction,
        reference,
        classes=classes,
        include_background=include_background,
        activation=activation,
        ignore_index=ignore_index,
        mask=mask,
        spacing=spacing,
    )
    names = _samples(samples, pair.batch)
    tolerances = check_tolerance(tolerance, pair.classes)
    families = {metric.family for metric in wanted.values()}
    # Lesions tell by themselves whether there are any.
    counts = overlap.count(pair) if families != {"lesion"} else None
    distances = surface.measure(pair, definition) if "surface" in families else None
    how = lesion.check_options(
        pair.axes,
        connectivity,
        lesion_match,
        lesion_threshold,
        lesion_dilation,
        lesion_min_volume,
        lesion_miss,
    )
    lesions = lesion.compare(pair, how) if "lesion" in families else None
    table = {name: np.full((pair.batch, len(pair.classes)), np.nan) for name in wanted}
    for b, sample in enumerate(names):
        for k, label in enumerate(pair.classes):
            measured: dict[str, Any] = {}
            if counts is not None:
                voxels = measured["overlap"] = counts[b][k]
                predicted, true = voxels.tp + voxels.fp > 0, voxels.tp + voxels.fn > 0
            if distances is not None:
                measured["surface"] = surface.Measured(distances[b][k], tolerances[k])
            if lesions is not None:
                measured["lesion"] = lesions[b][k]
                if counts is None:
                    true, predicted = map(bool, lesions[b][k].counts)
            for name, metric in wanted.items():
                where = f"{name} of class {label!r}, sample {sample!r}"
                value = value_of(empties[name], predicted, true, where)
                if value is None:
                    value = metric.formula(measured[metric.family])
                table[name][b, k] = value
    about: dict[str, Any] = {"spacing": list(pair.spacing[3 - pair.axes :])}
    if distances is not None:
        about |= {"definition": definition, "tolerance": tolerances}
    if lesions is not None:
        about["lesions"] = how._asdict()
    return Scores(table, samples=names, classes=pair.classes, about=about)


def check_tolerance(tolerance: Any, classes: Sequence[str]) -> list[float]:
    """One tolerance for each class, at least 0."""
    if isinstance(tolerance, Mapping):
        missing = [name for name in classes if name not in tolerance]
        if missing:
            raise ValueError(f"tolerance: expected one for each class, but {missing} have none")
        tolerance = [tolerance[name] for name in classes]
    try:
        found = np.array(tolerance, np.float64)
    except (TypeError, ValueError):
        raise TypeError(
            f"tolerance: expected a number, or one for each class, got {tolerance!r}"
        ) from None
    if found.shape not in ((), (len(classes),)):
        raise ValueError(
            f"tolerance: expected a number, or {len(classes)}, one for each class, got shape "
            f"{found.shape}"
        )
    if not (found >= 0).all():
        raise ValueError(f"tolerance: expected numbers of at least 0, got {tolerance!r}")
    return [float(each) for each in np.broadcast_to(found, (len(classes),))]


def _samples(samples: Sequence[str] | None, batch: int) -> list[str]:
    if samples is None:
        return [str(b) for b in range(batch)]
    if isinstance(samples, str) or len(samples) != batch:
        raise ValueError(f"samples: expected {batch} names, one for each sample, got {samples!r}")
    return [str(name) for name in samples]
