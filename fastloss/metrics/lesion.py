"""Metrics of lesions: each connected component of a class counts, whatever its size.

====================================  ==========================================================
metrics                               definition
====================================  ==========================================================
``pq``, ``sq``, ``rq``                panoptic, segmentation and recognition quality (Kirillov et
                                      al. 2019, "Panoptic Segmentation"): lesions are matched one
                                      to one where their IoU is above ``lesion_threshold``
``lesion_precision``,                 the share of predicted lesions that are right, of true ones
``lesion_recall``, ``lesion_f1``      that are found, and the harmonic mean of both. They are
                                      where they share a voxel with any lesion of the other side
                                      (``lesion_match="overlap"``), or where they are matched as
                                      above ("iou")
``lesion_dice``, ``lesion_hd95``      the lesion-wise scores of the challenge BraTS 2023
``fp_volume``, ``fn_volume``          the volume of predicted lesions that share no voxel with
                                      the reference, and of true ones that share none with the
                                      prediction (the challenge autoPET), in the cube of the
                                      spacing's unit: divide mm³ by 1000 for autoPET's ml
``lesions_true``,                     how many there are
``lesions_predicted``
====================================  ==========================================================

Voxels are connected by corners too (26 in 3D), but for ``fp_volume`` and ``fn_volume`` by edges
(18), as published; ``connectivity`` sets it for all.

With a threshold below ½ a lesion may have several partners. The pair of the largest IoU is then
matched first, and of equal ones that of the lowest true, then predicted lesion. MONAI looks for the
matching of the largest sum there, adds 1e-6 to denominators, and gives 0 where nothing is matched,
where ``sq`` is NaN here; panoptica by default also matches an IoU that equals the threshold.

BraTS: the reference is dilated ``lesion_dilation`` times by its neighbours over faces and edges,
and what is one component then is one lesion. The predicted components that touch the dilated
lesion are compared with it together. The scores are added up over the true lesions of more than
``lesion_min_volume``, and divided by how many these are, plus the predicted components that touch
no dilated lesion. Those have Dice 0 and the distance ``lesion_miss``, as true lesions do that no
component touches. HD95 is that of "deepmind", see `fastloss.metrics.surface`. Where nothing is
counted, Dice is 1 and HD95 0. The challenges used: glioma, paediatric and Africa (3, 50 mm³),
meningioma (1, 50 mm³), metastases (1, 2 mm³).
Source: Saluja et al., github.com/rachitsaluja/BraTS-2023-Metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from math import inf, nan, prod
from typing import Any, NamedTuple

import numpy as np

from fastloss.backends import Backend, current_backend
from fastloss.backends.components import HIGH, LOW, SIZE, SUMS, Labelled
from fastloss.instances import check_connectivity, table_of
from fastloss.metrics.empty import Empty
from fastloss.metrics.inputs import Pair, read_pair
from fastloss.metrics.metric import Metric
from fastloss.metrics.surface import SurfaceDistances
from fastloss.metrics.surface_elements import element_areas
from fastloss.options import check_choice, check_dilations, check_number

MATCHES = ("overlap", "iou")
PUBLISHED = {"autopet": 18, "others": 26}


class Options(NamedTuple):
    """How lesions are found, matched and weighed: see `fastloss.metrics.lesion`."""

    connectivity: int | None = None
    """6, 18 or 26 in 3D, 4 or 8 in 2D; None: as published."""
    match: str = "overlap"
    threshold: float = 0.5
    dilation: int = 3
    min_volume: float = 50.0
    miss: float = 374.0


class Lesion(NamedTuple):
    """A lesion of the prediction or of the reference, and how it fits the other side."""

    sample: int
    label: str
    """The name of its class."""
    side: str
    """"prediction" or "reference"."""
    number: int
    """From 1 within its side, class and sample, in the order of the first voxels."""
    voxels: int
    volume: float
    """In the cube of the spacing's unit."""
    matched: bool
    """Whether it is right, or found: by ``lesion_match``."""
    partner: int
    """The number of the lesion of the other side whose IoU is the largest; 0 if none overlaps."""
    iou: float
    """With the partner; 0 without."""
    dice: float
    centroid: tuple[float, ...]
    """Along each spatial axis, in the unit of the spacing; that of the first voxel is 0."""


class Panoptic(NamedTuple):
    """Sums of panoptic quality."""

    tp: int
    fp: int
    fn: int
    iou: float
    """Of all matched pairs."""


class Grouped(NamedTuple):
    """BraTS's view: true lesions united by dilation, and the components that touch each."""

    dilated: Labelled
    rows: np.ndarray
    """What is known of each, dilated."""
    sizes: np.ndarray
    """Voxels of the true lesions, before dilation."""
    dice: np.ndarray
    touching: list[np.ndarray]
    """For each true lesion the numbers of predicted ones."""
    missed: int
    """Predicted lesions that touch none."""


class Comparison:
    """The lesions of one class of one sample. What is asked for is computed once."""

    def __init__(
        self,
        prediction: np.ndarray,
        reference: np.ndarray,
        members: np.ndarray,
        axes: int,
        spacing: Sequence[float],
        options: Options,
    ) -> None:
        """Class indices (z, y, x), and which of them are the class."""
        self.prediction, self.reference, self.members = prediction, reference, members
        self.axes, self.spacing, self.options = axes, spacing, options
        self.volume = prod(spacing)
        """Of a voxel."""
        self._backend: Backend = current_backend()
        self._found: dict[tuple[str, int], Labelled] = {}

    # ------------------------------------------------------------------ components

    @cached_property
    def predicted(self) -> Labelled:
        return self._components("prediction", self._connectivity("others"))

    @cached_property
    def true(self) -> Labelled:
        return self._components("reference", self._connectivity("others"))

    @cached_property
    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """What is known of each true lesion, and of each predicted one."""
        return self.true.rows, self.predicted.rows

    @property
    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Voxels of the true lesions, and of the predicted ones."""
        return self.rows[0][:, SIZE], self.rows[1][:, SIZE]

    def _connectivity(self, metric: str) -> int:
        given = self.options.connectivity
        return PUBLISHED[metric] if given is None else check_connectivity(given, self.axes)

    def _components(self, side: str, connectivity: int) -> Labelled:
        if self.axes < 3 and connectivity == 18:
            connectivity = 26  # which are the same
        key = side, connectivity
        if key not in self._found:
            classes = getattr(self, side)
            table = table_of(self.members, classes.dtype)
            self._found[key] = self._backend.components(classes, table, connectivity)
        return self._found[key]

    @cached_property
    def overlaps(self) -> np.ndarray:
        """Rows (true, predicted, shared voxels), numbers from 1."""
        return self.true.overlaps(self.predicted)

    @cached_property
    def ious(self) -> np.ndarray:
        """Of every row of `overlaps`."""
        (true, predicted, shared), (theirs, ours) = self.overlaps.T, self.sizes
        ious: np.ndarray = shared / (theirs[true - 1] + ours[predicted - 1] - shared)
        return ious

    # ------------------------------------------------------------------ matching

    @cached_property
    def matches(self) -> np.ndarray:
        """The rows of `overlaps` whose lesions are matched."""
        enough = np.flatnonzero(self.ious > self.options.threshold)
        if self.options.threshold >= 0.5:  # there can be no other
            return enough
        kept, taken_true, taken_predicted = [], set(), set()
        for row in enough[np.argsort(-self.ious[enough], kind="stable")]:
            true, predicted, _ = self.overlaps[row].tolist()
            if true not in taken_true and predicted not in taken_predicted:
                taken_true.add(true)
                taken_predicted.add(predicted)
                kept.append(row)
        return np.array(sorted(kept), np.int64)

    @property
    def panoptic(self) -> Panoptic:
        tp, (true, predicted) = len(self.matches), self.counts
        return Panoptic(tp, predicted - tp, true - tp, float(self.ious[self.matches].sum()))

    @property
    def counts(self) -> tuple[int, int]:
        """Of true lesions, and of predicted ones."""
        return len(self.sizes[0]), len(self.sizes[1])

    def detected(self) -> tuple[np.ndarray, np.ndarray]:
        """Which true lesions are found, and which predicted ones are right, by `Options.match`."""
        rows = self.overlaps
        if self.options.match == "iou":
            rows = rows[self.matches]
        found, right = (np.zeros(count, bool) for count in self.counts)
        found[rows[:, 0] - 1] = right[rows[:, 1] - 1] = True
        return found, right

    def precision(self) -> float:
        return _ratio(self.detected()[1].sum(), self.counts[1])

    def recall(self) -> float:
        return _ratio(self.detected()[0].sum(), self.counts[0])

    def f1(self) -> float:
        precision, recall = self.precision(), self.recall()
        if precision == recall == 0:
            return 0.0
        return _ratio(2 * precision * recall, precision + recall)

    # ------------------------------------------------------------------ autoPET

    def wrong_volume(self, side: str) -> float:
        """Of the lesions of one side that share no voxel with the other."""
        other = {"prediction": "reference", "reference": "prediction"}[side]
        connectivity = self._connectivity("autopet")
        found, others = (self._components(each, connectivity) for each in (side, other))
        sizes = found.rows[:, SIZE]
        alone = np.ones(len(sizes), bool)
        alone[found.overlaps(others)[:, 0] - 1] = False
        return float(sizes[alone].sum()) * self.volume

    # ------------------------------------------------------------------ BraTS

    @cached_property
    def grouped(self) -> Grouped:
        dilated = self.true.dilated(self.options.dilation, self._connectivity("others"))
        rows, (theirs, ours) = dilated.rows, self.sizes
        count = len(rows)
        # Every true component lies within one dilated one.
        within = self.true.overlaps(dilated)[:, 1] - 1
        sizes = np.bincount(within, theirs, count)
        true, _, shared = self.overlaps.T
        shared = np.bincount(within[true - 1], shared, count)
        lesion, touching, _ = dilated.overlaps(self.predicted).T
        covered = np.bincount(lesion - 1, ours[touching - 1], count)
        ends = np.searchsorted(lesion, np.arange(1, count + 2))
        return Grouped(
            dilated,
            rows,
            sizes,
            2 * shared / (covered + sizes),
            [touching[a:b] for a, b in pairwise(ends)],
            len(ours) - len(np.unique(touching)),
        )

    @cached_property
    def _counted(self) -> np.ndarray:
        """Which of BraTS's true lesions are large enough."""
        counted: np.ndarray = self.grouped.sizes * self.volume > self.options.min_volume
        return counted

    def brats_dice(self) -> float:
        total = self._counted.sum() + self.grouped.missed
        return float(self.grouped.dice[self._counted].sum() / total) if total else 1.0

    def brats_hd95(self) -> float:
        if self.axes < 2:
            raise ValueError("lesion_hd95: expected two or three spatial axes, got one")
        total = self._counted.sum() + self.grouped.missed
        if not total:
            return 0.0
        distances = [self._hd95(k) for k in np.flatnonzero(self._counted).tolist()]
        return (sum(distances) + self.grouped.missed * self.options.miss) / int(total)

    def _hd95(self, k: int) -> float:
        """Of one of BraTS's true lesions, in the box that holds both masks."""
        group, (_, rows) = self.grouped, self.rows
        touching = group.touching[k]
        if not len(touching):
            return self.options.miss
        boxes = np.concatenate([rows[touching - 1], group.rows[k : k + 1]])
        low, high = boxes[:, LOW].min(0), boxes[:, HIGH].max(0)

        def numbers(labelled: Labelled) -> np.ndarray:
            out = np.empty((high - low).tolist(), np.int32)
            labelled.write(out, *low.tolist())
            return out

        table = np.zeros(len(rows) + 1, np.uint8)
        table[touching] = 1
        ours = table[numbers(self.predicted)]
        theirs = (numbers(group.dilated) == k + 1) & (numbers(self.true) > 0)
        directed = self._backend.surface_distances(
            ours, theirs.view(np.uint8), np.array([[False, True]]), self.axes, self.spacing,
            element_areas(tuple(self.spacing[3 - self.axes :])), None,
        )[0]  # fmt: skip
        found = SurfaceDistances(*directed, "deepmind").hausdorff(95)
        return self.options.miss if found == inf else found

    # ------------------------------------------------------------------ the lesions themselves

    def lesions(self, sample: int, label: str) -> list[Lesion]:
        found, right = self.detected()
        sides = [("reference", found), ("prediction", right)]
        listed = []
        for column, (side, matched) in enumerate(sides):
            rows = self.rows[column]
            best, partner = np.zeros(len(rows)), np.zeros(len(rows), np.int64)
            for row in np.argsort(self.ious, kind="stable")[::-1]:
                own = self.overlaps[row, column] - 1
                if self.ious[row] > best[own]:
                    best[own], partner[own] = self.ious[row], self.overlaps[row, 1 - column]
            centroids = rows[:, SUMS] / rows[:, [SIZE]] * np.array(self.spacing)
            listed += [
                Lesion(sample, label, side, i + 1, size, size * self.volume, bool(matched[i]),
                       int(partner[i]), float(best[i]), float(2 * best[i] / (1 + best[i])),
                       tuple(centroids[i, 3 - self.axes :].tolist()))
                for i, size in enumerate(rows[:, SIZE].tolist())
            ]  # fmt: skip
        return listed


def lesions(
    prediction: Any,
    reference: Any,
    *,
    connectivity: int | None = None,
    lesion_match: str = "overlap",
    lesion_threshold: float = 0.5,
    **options: Any,
) -> list[Lesion]:
    """All lesions of a batch of predictions and references, one row each.

    Args:
        prediction, reference, options: as `evaluate` has them: ``classes``, ``include_background``,
            ``activation``, ``ignore_index``, ``mask``, ``spacing``.
        connectivity, lesion_match, lesion_threshold: as `evaluate` has them.

    Returns:
        A `Lesion` for each: first the samples in their order, within them the classes, and of each
        the lesions of the reference, then those of the prediction. ``pandas.DataFrame`` takes it.

    Raises:
        ValueError, TypeError: as `evaluate`.

    >>> import numpy as np, fastloss as fl
    >>> reference = np.array([[[1, 1, 0, 0, 1]]])
    >>> prediction = np.array([[[1, 0, 0, 0, 0]]])
    >>> for lesion in fl.metrics.lesions(prediction, reference):
    ...     print(lesion.side, lesion.number, lesion.voxels, lesion.matched, lesion.iou)
    reference 1 2 True 0.5
    reference 2 1 False 0.0
    prediction 1 1 True 0.5
    """
    pair = read_pair(prediction, reference, **options)
    how = check_options(pair.axes, connectivity, lesion_match, lesion_threshold)
    return [
        lesion
        for b, of_sample in enumerate(compare(pair, how))
        for label, comparison in zip(pair.classes, of_sample, strict=True)
        for lesion in comparison.lesions(b, label)
    ]


def check_options(
    axes: int,
    connectivity: Any = None,
    match: Any = "overlap",
    threshold: Any = 0.5,
    dilation: Any = 3,
    min_volume: Any = 50.0,
    miss: Any = 374.0,
) -> Options:
    """As `evaluate` takes them.

    Raises:
        ValueError, TypeError: an option that is out of range, or of another kind.
    """
    if connectivity is not None:
        check_connectivity(connectivity, axes)
    check_choice("lesion_match", match, MATCHES)
    threshold = check_number("lesion_threshold", threshold, 0.0, 1.0)
    try:
        dilation = check_dilations(dilation)
    except (TypeError, ValueError) as error:
        raise type(error)(f"lesion_{str(error).replace('dilations', 'dilation', 1)}") from None
    return Options(
        connectivity,
        match,
        threshold,
        dilation,
        check_number("lesion_min_volume", min_volume),
        check_number("lesion_miss", miss),
    )


def compare(pair: Pair, options: Options) -> list[list[Comparison]]:
    """For every sample a list with the comparison of every class."""
    found: list[list[Comparison]] = [[] for _ in range(pair.batch)]
    for group in pair.groups:
        nothing = int(np.flatnonzero(~group.members.any(axis=0))[0])
        for b, of_sample in enumerate(found):
            sides = group.prediction[b], group.reference[b]
            if pair.counted is not None:
                sides = tuple(
                    np.where(pair.counted[b], side, side.dtype.type(nothing)) for side in sides
                )
            of_sample += [
                Comparison(*sides, members, pair.axes, pair.spacing, options)
                for members in group.members
            ]
    return found


def _ratio(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else nan


def _quality(p: Panoptic, part: float) -> float:
    return _ratio(part, p.tp + p.fp / 2 + p.fn / 2)


_SHARE = Empty(nan, 0.0)
_COUNT = Empty(None, None)


def _metric(
    name: str, formula: Callable[[Comparison], float], empty: Empty, better: str, summary: str
) -> Metric:
    return Metric(name, "lesion", formula, empty, better, summary)


METRICS = {
    metric.name: metric
    for metric in (
        _metric("pq", lambda c: _quality(c.panoptic, c.panoptic.iou), _SHARE, "higher",
                "panoptic quality: SQ · RQ"),
        _metric("sq", lambda c: _ratio(c.panoptic.iou, c.panoptic.tp), Empty(nan, None), "higher",
                "segmentation quality: the mean IoU of matched lesions"),
        _metric("rq", lambda c: _quality(c.panoptic, c.panoptic.tp), _SHARE, "higher",
                "recognition quality: F1 of matched lesions"),
        _metric("lesion_precision", Comparison.precision, _SHARE, "higher",
                "the share of predicted lesions that are right"),
        _metric("lesion_recall", Comparison.recall, _SHARE, "higher",
                "the share of true lesions that are found"),
        _metric("lesion_f1", Comparison.f1, _SHARE, "higher",
                "the harmonic mean of lesion precision and recall"),
        _metric("lesion_dice", Comparison.brats_dice, _COUNT, "higher",
                "lesion-wise Dice of BraTS 2023"),
        _metric("lesion_hd95", Comparison.brats_hd95, _COUNT, "lower",
                "lesion-wise HD95 of BraTS 2023"),
        _metric("fp_volume", lambda c: c.wrong_volume("prediction"), _COUNT, "lower",
                "the volume of predicted lesions that overlap no true one"),
        _metric("fn_volume", lambda c: c.wrong_volume("reference"), _COUNT, "lower",
                "the volume of true lesions that overlap no predicted one"),
        _metric("lesions_true", lambda c: float(c.counts[0]), _COUNT, "",
                "how many lesions the reference has"),
        _metric("lesions_predicted", lambda c: float(c.counts[1]), _COUNT, "",
                "how many lesions the prediction has"),
    )
}  # fmt: skip
