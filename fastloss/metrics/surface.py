"""Distances between the surfaces of a prediction and a reference, by three definitions.

============  ===========================  ===================================================
definition    surface                      percentiles of distances
============  ===========================  ===================================================
"deepmind"    between voxels: the area of  of the area; the larger of both directions'
              marching cubes
"monai"       voxels with a neighbour      of the voxels, interpolated; the larger of both
              outside, each counts 1       directions'
"medpy"       the same voxels              of the voxels of both directions pooled,
                                           interpolated
============  ===========================  ===================================================

Mean distances and shares weigh elements by their area, or voxels alike; ``assd`` and ``nsd`` pool
both directions, but that ``nsd`` of "medpy", which MedPy lacks, is panoptica's: the mean of both
directions' shares.

"deepmind" is the default. Only it measures area: in the others a voxel counts as one whatever it
shows of the surface, so that a slanted surface, or one across thick slices, weighs less than its
area, and percentiles and normalised surface Dice shift with the orientation and the spacing. It is
also the definition that normalised surface Dice was published with. Its points lie on either side
of a curved surface, so that distances are up to half a voxel short: between spheres of 9 and 12 mm
on voxels of 0.5 mm, "deepmind" finds 2.7 mm and "monai" 2.9. "monai" and "medpy" are here to
compare with what was published with those tools.

Sources: Nikolov et al. 2021, "Clinically Applicable Segmentation of Head and Neck Anatomy for
Radiotherapy" (surface Dice, areas); MONAI 1.6.1; MedPy 0.5; on how tools differ, Podobnik & Vrtovec
2024, "Metrics Revolutions".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import inf, nan
from typing import Any, NamedTuple

import numpy as np

from fastloss.backends import current_backend
from fastloss.backends.surfaces import Directed
from fastloss.metrics.empty import Empty
from fastloss.metrics.inputs import Pair, read_pair
from fastloss.metrics.metric import Metric, Pattern
from fastloss.metrics.surface_elements import element_areas
from fastloss.options import check_choice

DEFINITIONS = ("deepmind", "monai", "medpy")


class SurfaceDistances(NamedTuple):
    """The distances between the two surfaces of one class of one sample.

    Each direction has distances in ascending order, and the areas of the elements that they start
    from (None: each counts the same). Distances to a surface without an element are infinite.
    """

    to_reference: Directed
    """From the surface of the prediction."""
    to_prediction: Directed
    """From the surface of the reference."""
    definition: str

    def hausdorff(self, percentile: float = 100.0) -> float:
        """The Hausdorff distance, or its percentile in [0, 100]; NaN without any element."""
        if self.definition == "medpy" and percentile < 100:
            pooled = np.concatenate([each.distances for each in self[:2]])
            return _quantile(np.sort(pooled), None, percentile)
        return _largest(_quantile(*each, percentile) for each in self[:2])

    def average(self) -> tuple[float, float]:
        """The average distance from the prediction's surface, and from the reference's."""
        return _average(self.to_reference), _average(self.to_prediction)

    def average_symmetric(self) -> float:
        """The average symmetric surface distance (ASSD)."""
        totals = [_total(each) for each in self[:2]]
        weight = sum(total[1] for total in totals)
        return sum(total[0] for total in totals) / weight if weight else nan

    def overlap(self, tolerance: float) -> tuple[float, float]:
        """The share of the prediction's surface within a tolerance, and of the reference's."""
        shares = []
        for each in self[:2]:
            near, all_of_it = _within(each, tolerance)
            shares.append(near / all_of_it if all_of_it else nan)
        return shares[0], shares[1]

    def surface_dice(self, tolerance: float) -> float:
        """The normalised surface Dice (NSD) at a tolerance, in [0, 1]."""
        if self.definition == "medpy":
            return sum(self.overlap(tolerance)) / 2
        parts = [_within(each, tolerance) for each in self[:2]]
        both = sum(part[1] for part in parts)
        return sum(part[0] for part in parts) / both if both else nan


def surface_distances(
    prediction: Any,
    reference: Any,
    *,
    definition: str = "deepmind",
    **options: Any,
) -> list[list[SurfaceDistances]]:
    """The distances between surfaces, for every sample a list with one for every class.

    Args:
        prediction, reference, options: as `evaluate` has them: ``classes``, ``include_background``,
            ``activation``, ``ignore_index``, ``mask``, ``spacing``.
        definition: "deepmind", "monai" or "medpy"; see `fastloss.metrics.surface`.

    Raises:
        ValueError, TypeError: as `evaluate`.

    >>> import numpy as np, fastloss as fl
    >>> reference = np.zeros((1, 8, 8, 8), np.uint8)
    >>> reference[:, 2:5, 2:5, 2:5] = 1
    >>> found = fl.metrics.surface_distances(np.roll(reference, 2, 1), reference, spacing=(3, 1, 1))
    >>> print(found[0][0].hausdorff())
    6.0
    """
    return measure(read_pair(prediction, reference, **options), definition)


def measure(pair: Pair, definition: str) -> list[list[SurfaceDistances]]:
    """As `surface_distances`."""
    check_choice("definition", definition, DEFINITIONS)
    areas = None
    if definition == "deepmind":
        if pair.axes < 2:
            raise ValueError(
                "definition: 'deepmind' needs two or three spatial axes, got one; 'monai' takes one"
            )
        areas = element_areas(pair.spacing[3 - pair.axes :])
    backend = current_backend()
    found: list[list[SurfaceDistances]] = [[] for _ in range(pair.batch)]
    for group in pair.groups:
        for b, of_sample in enumerate(found):
            counted = None if pair.counted is None else pair.counted[b]
            reference = group.reference[b]
            if counted is not None:
                # Where nothing counts, the reference has no surface but the prediction's.
                reference = np.where(counted, reference, group.prediction[b])
            of_sample += [
                SurfaceDistances(*directed, definition)
                for directed in backend.surface_distances(
                    group.prediction[b],
                    reference,
                    group.members,
                    pair.axes,
                    pair.spacing,
                    areas,
                    counted,
                )
            ]
    return found


def _quantile(distances: np.ndarray, areas: np.ndarray | None, percentile: float) -> float:
    """Of values in ascending order."""
    n = len(distances)
    if not n:
        return nan
    if percentile >= 100 or distances[-1] == inf:
        return float(distances[-1])
    if areas is not None:
        share = np.cumsum(areas)
        place = int(np.searchsorted(share / areas.sum(), percentile / 100))
        return float(distances[min(place, n - 1)])
    whole, part = divmod((n - 1) * percentile / 100, 1)
    low = float(distances[int(whole)])
    return low + part * (float(distances[min(int(whole) + 1, n - 1)]) - low)


def _largest(values: Any) -> float:
    """The largest that is a number; NaN if none is."""
    numbers = [value for value in values if value == value]
    return max(numbers, default=nan)


def _total(directed: Directed) -> tuple[float, float]:
    """The sum of distances times areas, and of areas."""
    distances, areas = directed
    if areas is None:
        return float(distances.sum()), float(len(distances))
    return float(distances @ areas), float(areas.sum())


def _average(directed: Directed) -> float:
    total, weight = _total(directed)
    return total / weight if weight else nan


def _within(directed: Directed, tolerance: float) -> tuple[float, float]:
    """The area within the tolerance, and all of it."""
    distances, areas = directed
    count = int(np.searchsorted(distances, tolerance, side="right"))
    if areas is None:
        return float(count), float(len(distances))
    return float(areas[:count].sum()), float(areas.sum())


class Measured(NamedTuple):
    """What a surface metric is computed from."""

    distances: SurfaceDistances
    tolerance: float


_DISTANCE = Empty(nan, inf)
_SHARE = Empty(nan, 0.0)


def _metric(
    name: str, formula: Callable[[Measured], float], empty: Empty, better: str, summary: str
) -> Metric:
    return Metric(name, "surface", formula, empty, better, summary)


METRICS = {
    metric.name: metric
    for metric in (
        _metric("hausdorff", lambda m: m.distances.hausdorff(), _DISTANCE, "lower",
                "the largest distance from one surface to the other"),
        _metric("assd", lambda m: m.distances.average_symmetric(), _DISTANCE, "lower",
                "the average symmetric surface distance"),
        _metric("asd", lambda m: m.distances.average()[0], _DISTANCE, "lower",
                "the average distance from the prediction's surface to the reference's"),
        _metric("nsd", lambda m: m.distances.surface_dice(m.tolerance), _SHARE, "higher",
                "normalised surface Dice: the share of both surfaces within the tolerance"),
        _metric("surface_precision", lambda m: m.distances.overlap(m.tolerance)[0], _SHARE,
                "higher", "the share of the prediction's surface within the tolerance"),
        _metric("surface_recall", lambda m: m.distances.overlap(m.tolerance)[1], _SHARE,
                "higher", "the share of the reference's surface within the tolerance"),
    )
}  # fmt: skip


def _percentile(name: str, number: float) -> Metric:
    return _metric(
        name,
        lambda m: m.distances.hausdorff(number),
        _DISTANCE,
        "lower",
        f"the {number:g}th percentile of the distances between surfaces",
    )


PATTERNS = (Pattern(re.compile(r"hd(100|\d?\d(?:\.\d+)?)"), _percentile, "hd95"),)
