"""Losses of every lesion: terms formed in the region of each, and their mean over lesions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from fastloss.fields import Spacing, Target
from fastloss.instances import check_connectivity, components, voronoi
from fastloss.loss import Derivatives, Loss, Pullback, Term, to_regions
from fastloss.options import REDUCTIONS, check_choice, check_number, check_spacing, check_switch
from fastloss.request import make_request
from fastloss.statistics import Statistics
from fastloss.sums import Sum, as_sum, family
from fastloss.terms.distribution import CrossEntropy, VoxelwiseTerm
from fastloss.terms.per_class import ClassTerm, alone, with_background
from fastloss.terms.region import Dice

MODES = ("voronoi", "components+background", "given")
WEIGHTINGS = ("equal", "inverse_volume", "inverse_sqrt_volume")
_EXPONENTS = dict(zip(WEIGHTINGS, (0.0, -1.0, -0.5), strict=True))
WITHOUT = ("whole", "skip")
_SHORT = (np.int8, np.int16)
_VOXELS = Sum()
_REFERENCE = as_sum("reference")
"""The sum of the voxel weights in the regions of each class."""


class PerRegion(Term):
    """Terms of every lesion: their mean over the lesions of a sample, then over the samples.

    A lesion is a connected component of a class of the target. All voxels of its region count, in
    every term, as if the region were a sample. Of region terms (Dice, Tversky, …) the class of the
    lesion counts alone; terms of single voxels (cross-entropy, focal, …) are means over the region.

    Regions are made of the target in every call, or ahead by `fastloss.Loss.fields`, under the name
    ``"regions"``; the array that it makes is passed as ``fields={"regions": …}`` or as
    ``regions``:

    - "voronoi": each voxel belongs to the region of the lesion that is nearest to it, of whatever
      class, as `fastloss.voronoi` finds it. The array has k − 1 for component k, and 0 throughout a
      sample without lesions.
    - "components+background": the region of a lesion is the lesion and the background, and other
      lesions are left out. The array is that of `fastloss.components`: k for component k, and 0 for
      the background.
    - "given": the caller passes ``regions`` in every call, numbered as `fastloss.Loss` says but for
      numbers that may be left out. A class of which a region has voxels is a lesion there; a region
      without any counts for nothing.

    With ``per_class`` the lesions of each class are apart from those of the others. Every class is
    then a task of its own, the class against the rest: its lesions share the volume among
    themselves, whatever lesions of other classes lie there, and its value is what the same term
    gives, with a sigmoid's formulas, for the mask of the class and its p. So cross-entropy is the
    mean over a region of −log p in the class and −log(1−p) outside: which other class took the
    probability is no matter of this lesion. A sample has the mean over its classes of their means
    over lesions; a class of which it has no lesions adds what ``without`` says. Dice and
    cross-entropy of two classes are the same as without ``per_class``. The regions are
    (B, C, *spatial), a map for each class, numbered in each as above. Channels may overlap, as
    those of a sigmoid do.

    Other terms of the same loss, as in ``fl.Dice() + fl.PerRegion(fl.Dice())``, are those of whole
    samples. A voxel whose region is −1 counts for nothing in any term; with ``per_class``, for
    nothing in the sums of that class, and means over voxels leave it out where it is −1 in the map
    of class 0.

    Ignored voxels are of no lesion and count for nothing; voxel weights multiply the sums, and a
    lesion of whose voxels none counts is none. Statistics add over the chunks of a volume, and over
    ranks, if they are given regions cut from those of the whole volume.

    Args:
        *terms: region terms and terms of single voxels, or sums of these, with factors. Of each,
            ``reduction`` is not looked at, and ``batch`` may not be set. Terms that make a field or
            choose voxels have no meaning here.
        regions: "voronoi", "components+background" or "given".
        weight: how lesions are weighed in the mean over a sample: "equal", "inverse_volume" or
            "inverse_sqrt_volume", of the sum of the voxel weights of the lesion.
        without: what a sample without lesions adds: "whole", the terms of the whole sample, of
            region terms the mean over the classes; or "skip", nothing, and it is left out of the
            mean over the samples. With ``per_class`` the same of a class without lesions.
        per_class: whether each class has regions of its own. Terms may then have no weights of
            several classes, and their ``include_background`` is not looked at.
        include_background: whether class 0 has lesions too, where there are several channels; for
            "given" and ``per_class`` alone.
        connectivity: as in `fastloss.components`.
        spacing: the size of a voxel for "voronoi", one number or one per spatial axis; None: 1.
        reduction: "mean" over the samples, "sum", or "none": (B, 1), 0 for samples that are left
            out.

    Raises:
        ValueError, TypeError: an option out of its range, or a term that has no meaning here. In a
            call: regions that are not given and cannot be made: of overlapping channels, in
            compiled code, or of a part of a volume.

    >>> import numpy as np, fastloss as fl
    >>> labels = np.array([[1, 1, 0, 0, 0, 0, 0, 1]])
    >>> p = np.array([[0, 1.0, 0, 0, 0, 0, 0, 1]])  # half of a lesion, and one as it is
    >>> dice = fl.PerRegion(fl.Dice(smooth_nr=0, smooth_dr=0))
    >>> print(fl.Loss(dice, activation="none")(np.stack([1 - p, p], 1), labels).round(4))
    0.1667
    """

    regional: ClassVar[bool] = True
    regions: str

    def __init__(
        self,
        *terms: Term | Loss,
        regions: str = "voronoi",
        weight: str = "equal",
        without: str = "whole",
        per_class: bool = False,
        include_background: bool = False,
        connectivity: int | None = None,
        spacing: Any = None,
        reduction: str = "mean",
    ) -> None:
        self.regions = check_choice("regions", regions, MODES)
        self.include_background = check_switch("include_background", include_background)
        if self.include_background and regions != "given" and not per_class:
            raise ValueError(
                "include_background: the background has no components; expected False with "
                f"regions={regions!r}, or per_class=True"
            )
        self._set_options(weight, without, per_class, connectivity, spacing, reduction)
        self._set_parts(*terms)
        self.terms = self._parts

    def _set_options(
        self,
        weight: str,
        without: str,
        per_class: bool,
        connectivity: int | None,
        spacing: Any,
        reduction: str,
    ) -> None:
        self.weight = check_choice("weight", weight, WEIGHTINGS)
        self.without = check_choice("without", without, WITHOUT)
        self.per_class = check_switch("per_class", per_class)
        self.connectivity = connectivity
        self.spacing = check_spacing(spacing)
        self.reduction = check_choice("reduction", reduction, REDUCTIONS)

    def _set_parts(self, *terms: Term | Loss) -> None:
        parts: list[tuple[float, ClassTerm | VoxelwiseTerm]] = []
        if not terms:
            raise ValueError("terms: expected at least one term")
        for given in terms:
            if isinstance(given, Loss) and given._options:
                names = ", ".join(sorted(given._options))
                raise ValueError(
                    f"terms: {names} are those of the whole loss; pass terms without them here"
                )
            if not isinstance(given, (Term, Loss)):
                raise TypeError(f"terms: expected terms or losses, got {given!r}")
            each = given.terms if isinstance(given, Loss) else ((1.0, given),)
            parts += [(factor, _per_row(term, self.per_class)) for factor, term in each]
        if (
            self.include_background
            and not self.per_class
            and not all(_counts_all(term) for _, term in parts)
        ):
            raise ValueError(
                "include_background: True, but a term leaves class 0 out; expected the same of both"
            )
        self._parts = tuple(parts)
        needs: frozenset[Any] = frozenset().union(*(term.requires for _, term in parts))
        if self.per_class:
            families = {need for need in needs if isinstance(need, str)}
            sums = {total for each in families for total in family(each, "sigmoid")}
            needs = needs - families | sums | {_VOXELS}
        self.requires = needs

    def check(self, activation: str, classes: int) -> None:
        for _, term in self._parts:
            term.check(*(("sigmoid", 1) if self.per_class else (activation, classes)))
        if activation == "softmax" and classes == 1:
            raise ValueError("logits: softmax of one channel has no lesions; use sigmoid")

    # ------------------------------------------------------------------ regions

    @property
    def regions_by_class(self) -> bool:  # type: ignore[override]
        return self.per_class

    @property
    def making_regions(self) -> tuple[Any, ...]:
        own = (self.regions, self.connectivity, self.spacing)
        return (*own, self.per_class, self.include_background) if self.per_class else own

    def make_regions(self, target: Target, spacing: Spacing) -> tuple[np.ndarray, int]:
        if self.regions == "given":
            raise ValueError(
                "regions: expected the regions of this call, as they are 'given', got None"
            )
        check_connectivity(self.connectivity, max(1, min(target.axes, 3)))
        if not self.per_class or target.classes == 1:
            return self._regions_of(_class_map(target), spacing)
        each = [self._regions_of(mask, spacing) for mask in self._masks(target)]
        maps, rows = [numbers for numbers, _ in each], max(rows for _, rows in each)
        if not self.include_background:
            maps.insert(0, np.zeros_like(maps[0]))
        return np.stack(maps, axis=1), rows

    def _masks(self, target: Target) -> Iterator[np.ndarray]:
        """Where the voxels of each class are that has lesions, (B, *spatial)."""
        for c in range(0 if self.include_background else 1, target.classes):
            yield target.labels == c if target.masks is None else target.masks[:, c]

    def _regions_of(self, labels: np.ndarray, spacing: Spacing) -> tuple[np.ndarray, int]:
        """The regions of the components of a map, and how many a sample has at most."""
        found = components(labels, self.connectivity)
        most = max((len(classes) for classes in found.classes), default=0)
        numbers: np.ndarray = found.numbers
        rows = most + 1 if self.regions == "components+background" else max(most, 1)
        if self.regions == "voronoi" and most:
            numbers = voronoi(found, spacing=spacing)
            numbers -= 1
            np.maximum(numbers, 0, out=numbers)  # a sample without lesions is one region
        # Read in both passes, and kept by data loaders.
        for dtype in _SHORT:
            if rows - 1 <= np.iinfo(dtype).max:
                return numbers.astype(dtype), rows
        return numbers, rows

    # ------------------------------------------------------------------ the value

    @property
    def sums_over_batch(self) -> bool:
        return False

    def value_shape(self, batch: int, classes: int, regions: int = 0) -> tuple[int, ...]:
        return (batch, 1) if self.reduction == "none" else ()

    @property
    def summands(self) -> tuple[tuple[float, Term], ...]:
        each = ((factor, ((1.0, term),)) for factor, term in self._parts)
        return tuple((factor, self.with_options({"_parts": part})) for factor, part in each)

    @property
    def shares(self) -> bool:
        return all(term.shares for _, term in self._parts)

    def combine(self, statistics: Statistics) -> tuple[np.ndarray, Pullback]:
        if not self.per_class:
            return self._combine(statistics, 1)
        tasks = _Tasks(statistics, self.include_background)
        value, pull = self._combine(tasks.statistics, tasks.count)

        def pullback(upstream: np.ndarray) -> Derivatives:
            return {key: tasks.by_class(by) for key, by in pull(upstream).items()}

        return value, pullback

    def _combine(self, statistics: Statistics, tasks: int) -> tuple[np.ndarray, Pullback]:
        """As `combine`, of as many samples for each sample of a call as there are tasks."""
        rows, each, first, share, falls = self._weighed(statistics, tasks)
        beside = each is not statistics

        # On a GPU the sums are not known here.
        may_fall = self.without == "whole" and not (
            isinstance(falls, np.ndarray) and not falls.any()
        )
        whole = statistics.of_samples() if may_fall else statistics
        value = np.zeros((rows.batch, 1), like=falls)
        moves = statistics.for_target and _EXPONENTS[self.weight] != 0  # the shares, by the target
        weighed: Any = 0.0
        pulls = []
        for factor, term in self._parts:
            if factor == 0:  # which may be infinite
                continue
            own = _of_columns(share, term, first)
            values, pull = term.combine(each)
            # What does not count may be infinite.
            total = rows.over_regions(np.where(own > 0, values, 0.0) * own)
            pulls.append((factor, own, pull, rows.fits, True))
            if moves:
                weighed = weighed + factor * _by_class(values, share, term)
            if may_fall:
                own = falls * _of_columns(_average(rows.classes, first), term, first)
                values, pull = term.combine(whole)
                total = total + rows.over_tasks(np.where(own > 0, values, 0.0) * own)
                pulls.append((factor, own, pull, rows.fits_tasks, False))
            value = value + factor * total
        if self.reduction != "none":
            value = value.sum()

        def pullback(upstream: np.ndarray) -> Derivatives:
            found: dict[Any, np.ndarray] = {}
            for factor, own, pull, fits, of_rows in pulls:
                for key, derivative in pull(own * fits(upstream) * factor).items():
                    if not of_rows:
                        derivative = to_regions(derivative, statistics)
                    elif beside:
                        derivative = rows.from_background(derivative)
                    total = as_sum(key) if isinstance(key, str) else key
                    found[total] = found[total] + derivative if total in found else derivative
            if moves:
                by_volume = self._by_volume(statistics, rows, share, weighed)
                found[_REFERENCE] = found.get(_REFERENCE, 0.0) + rows.fits(upstream) * by_volume
            return found

        return value, pullback

    def _by_volume(
        self, statistics: Statistics, rows: _Rows, share: np.ndarray, weighed: np.ndarray
    ) -> np.ndarray:
        """The derivative by the volume of every lesion, which its share depends on, (rows, C).

        Shares are s = V^e / Σ V^e, so that of Σ s v it is e s (v − Σ s v) / V. ``weighed`` is s v.
        """
        own, each = (a.reshape(-1, rows.regions, rows.classes) for a in (share, weighed))
        whole, total = (a.sum(axis=(1, 2), keepdims=True) for a in (own, each))
        apart = each - own * (total / np.where(whole > 0, whole, 1.0))
        volume = np.where(share > 0, statistics["reference"], 1.0)
        found: np.ndarray = apart.reshape(rows.count, rows.classes) / volume
        return _EXPONENTS[self.weight] * found

    def parts(self, statistics: Statistics) -> np.ndarray:
        """Of every lesion and its class; those of a sample without lesions are in its first row."""
        if not self.per_class:
            return self._parts_of(statistics, 1)
        tasks = _Tasks(statistics, self.include_background)
        return tasks.by_class(self._parts_of(tasks.statistics, tasks.count))

    def _parts_of(self, statistics: Statistics, tasks: int) -> np.ndarray:
        rows, each, first, share, falls = self._weighed(statistics, tasks)
        whole, average = statistics.of_samples(), _average(rows.classes, first)
        found = np.zeros((rows.count, rows.classes))
        for factor, term in self._parts:
            if factor == 0:
                continue
            found += factor * _by_class(term.combine(each)[0], share, term)
            if self.without == "whole":
                values = term.combine(whole)[0]
                found[:: rows.regions] += factor * _by_class(values, falls * average, term)
        return found

    def fall(self, statistics: Statistics, row: int, sums: np.ndarray) -> np.ndarray:
        rows, each, first, share, falls = self._weighed(statistics, 1)
        sample, region = divmod(row, rows.regions)
        change = sums - statistics.sums[:, row, None]
        found = np.zeros(sums.shape[1])

        def add(now: Statistics, row: int, weight: np.ndarray) -> None:
            """What changes in one row, whose classes have these weights."""
            if not weight.any():
                return
            before = now.sums[:, row, None]
            for factor, term in self._parts:
                if factor == 0:
                    continue
                own = factor * _of_columns(weight[None], term, first)
                then, at = (
                    term.combine(alone(now, s, now.voxels[row]))[0]
                    for s in (before + change, before)
                )
                found[...] += (np.where(own != 0, at - then, 0.0) * own).sum(axis=1)

        lesions = [row]
        if each is not statistics and region == 0:  # the background is part of every region
            lesions = list(range(row + 1, row + rows.regions))
        for lesion in lesions:
            add(each, lesion, share[lesion])
        add(statistics.of_samples(), sample, falls[sample] * _average(rows.classes, first)[0])
        return found

    def _weighed(
        self, statistics: Statistics, tasks: int
    ) -> tuple[_Rows, Statistics, int, np.ndarray, np.ndarray]:
        """The rows, the sums of each with what is beside it, the first class of lesions, the share
        of every lesion, (rows, C), and of every task that falls back on its whole, (B · T, 1)."""
        rows = _Rows(statistics, tasks)
        beside = self.regions == "components+background"
        first = 1 if rows.classes > 1 and not self.include_background else 0
        share, has = self._shares(statistics, rows, first, beside)
        each = rows.with_background(statistics) if beside else statistics
        # (B · T, 1): 1 for a task that falls back, and how much each of them counts.
        falls = np.zeros((rows.batch * tasks, 1), like=has)
        if self.without == "whole":
            voxels = statistics.voxels.reshape(-1, rows.regions).sum(axis=1, keepdims=True)
            falls = np.where((voxels > 0) & ~has, 1.0, 0.0)
        scale: Any = 1.0
        counted = np.where(has, 1.0, falls)
        if tasks > 1:
            of_sample = rows.over_tasks(counted)
            scale = rows.fits_tasks(1.0 / np.maximum(of_sample, 1.0))
            share = (share.reshape(rows.batch * tasks, -1) * scale).reshape(share.shape)
            falls, counted = falls * scale, np.where(of_sample > 0, 1.0, 0.0)
        scale = 1.0 / np.maximum(counted.sum(), 1.0) if self.reduction == "mean" else 1.0
        return rows, each, first, share * scale, falls * scale

    def _shares(
        self, statistics: Statistics, rows: _Rows, first: int, beside: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """(rows, C): the share of each lesion in the mean of its sample, 0 where there is none;
        and (B · T, 1): whether a task has any."""
        reference = statistics["reference"]
        is_lesion = reference > 0
        if first:
            is_lesion = is_lesion & (np.arange(rows.classes) >= first)
        if beside:
            is_lesion = is_lesion & ~rows.is_background
        share = np.where(is_lesion, 1.0, 0.0)
        exponent = _EXPONENTS[self.weight]
        if exponent:
            share = share * np.power(np.where(is_lesion, reference, 1.0), exponent)
        each = share.reshape(-1, rows.regions, rows.classes)
        total = each.sum(axis=(1, 2), keepdims=True)
        has = total > 0
        share = (each / np.where(has, total, 1.0)).reshape(rows.count, rows.classes)
        return share, has.reshape(rows.batch * rows.tasks, 1)


class _Tasks:
    """The sums of every class of a sample as those of a sample of its own, of one class."""

    def __init__(self, statistics: Statistics, include_background: bool) -> None:
        request, regions = statistics.request, _regions(statistics)
        slots, rows, classes = statistics.sums.shape
        self.first = 0 if include_background or classes == 1 else 1
        self.count = classes - self.first
        self.shape = (rows // regions, self.count, regions)
        sums = statistics.sums.reshape(slots, rows // regions, regions, classes)
        sums = sums[..., self.first :].transpose(0, 1, 3, 2).reshape(slots, -1, 1)
        # Terms read the sums of both outcomes.
        request = make_request(
            "sigmoid", request.dense, request.ignore_index, frozenset(request.sums)
        )
        voxels = sums[request.index[_VOXELS]].reshape(-1)
        self.statistics = replace(
            statistics, request=request, sums=sums, voxels=voxels, joined=None
        )

    def by_class(self, each: Any) -> np.ndarray:
        """Numbers of the rows, (B · T · R, 1), as those of the rows of a call, (B · R, C)."""
        batch, tasks, regions = self.shape
        each = np.broadcast_to(each, (batch * tasks * regions, 1)).reshape(self.shape)
        found: np.ndarray = each.transpose(0, 2, 1).reshape(batch * regions, tasks)
        return with_background(found) if self.first else found


def _regions(statistics: Statistics) -> int:
    if not statistics.regions:
        raise ValueError("statistics: expected the sums of regions, got those of samples")
    return statistics.regions


class _Rows:
    """The rows of statistics as regions of samples, of which each has a number of tasks."""

    def __init__(self, statistics: Statistics, tasks: int) -> None:
        self.regions, self.tasks = _regions(statistics), tasks
        self.count = statistics.batch_size
        self.classes = statistics.classes
        self.batch = self.count // (self.regions * tasks)
        self.is_background = (np.arange(self.count) % self.regions == 0)[:, None]
        """(rows, 1): whether a row is the first of its task."""

    def over_regions(self, values: np.ndarray) -> np.ndarray:
        """(rows, columns) summed over all but the samples: (B, 1)."""
        each = values.reshape(self.batch, self.tasks * self.regions, values.shape[1])
        total: np.ndarray = each.sum(axis=(1, 2)).reshape(self.batch, 1)
        return total

    def over_tasks(self, values: np.ndarray) -> np.ndarray:
        """(B · T, columns) summed over all but the samples: (B, 1)."""
        each = values.reshape(self.batch, self.tasks * values.shape[1])
        total: np.ndarray = each.sum(axis=1, keepdims=True)
        return total

    def fits_tasks(self, upstream: Any) -> Any:
        """One number or (B, 1), as what multiplies (B · T, C)."""
        if not np.ndim(upstream):
            return upstream
        each = np.broadcast_to(upstream, (self.batch, self.tasks))
        return each.reshape(self.batch * self.tasks, 1)

    def fits(self, upstream: Any) -> Any:
        """An upstream gradient, one number or (B, 1), as what multiplies (rows, C)."""
        if not np.ndim(upstream):
            return upstream
        each = np.broadcast_to(upstream, (self.batch, self.tasks * self.regions))
        return each.reshape(self.count, 1)

    def with_background(self, statistics: Statistics) -> Statistics:
        """Those of every region together with the first of its task."""
        slots = len(statistics.sums)
        sums = statistics.sums.reshape(slots, -1, self.regions, self.classes)
        voxels = statistics.voxels.reshape(-1, self.regions)
        return replace(
            statistics,
            sums=(sums + sums[:, :, :1]).reshape(slots, self.count, self.classes),
            voxels=(voxels + voxels[:, :1]).reshape(self.count),
            joined=None,
        )

    def from_background(self, derivative: Any) -> np.ndarray:
        """The derivative by those sums, 0 for the first region, as that by the sums themselves."""
        each = np.broadcast_to(derivative, (self.count, self.classes))
        each = each.reshape(-1, self.regions, self.classes)
        total = each.sum(axis=1, keepdims=True)
        first = (np.arange(self.regions) == 0)[:, None]
        return np.where(first, total, each).reshape(self.count, self.classes)


def _per_row(term: Term, per_class: bool) -> ClassTerm | VoxelwiseTerm:
    """The same term with one value for every row; ``per_class``: of rows that have one class."""
    kind = type(term).__name__
    if not isinstance(term, (ClassTerm, VoxelwiseTerm)) or term.makes or term.ranking is not None:
        raise TypeError(f"terms: {kind} is no region term nor one of single voxels")
    if isinstance(term, ClassTerm) and term.batch:
        raise ValueError(f"terms: {kind} sums over the batch, whose lesions have nothing in common")
    if term.maps_voxels:
        raise ValueError(f"terms: {kind} has reduction='voxel', and no value of a region")
    options: dict[str, Any] = {"reduction": "none"}
    if per_class:
        known = term.described
        for name, numbers in zip(known.names, known.arrays, strict=True):
            if numbers.size > 1:
                raise ValueError(
                    f"{name}: {kind} weighs classes, of which each is a task of its own with "
                    f"per_class=True; expected one number, got {numbers.size}"
                )
        if isinstance(term, ClassTerm):
            options["include_background"] = True
    found: Any = term.with_options(options)
    return found  # type: ignore[no-any-return]


def _counts_all(term: ClassTerm | VoxelwiseTerm) -> bool:
    return isinstance(term, VoxelwiseTerm) or term.include_background


def _of_columns(share: np.ndarray, term: ClassTerm | VoxelwiseTerm, first: int) -> np.ndarray:
    """The shares, (rows, C), as what multiplies the term's values of each row."""
    if isinstance(term, VoxelwiseTerm) or term.couples_classes:
        total: np.ndarray = share.sum(axis=1, keepdims=True)
        return total
    return share if term.include_background else share[:, 1:]


def _average(classes: int, first: int) -> np.ndarray:
    """(1, C): the weights of a mean over the classes from ``first`` on."""
    average = np.ones((1, classes)) / (classes - first)
    average[:, :first] = 0.0
    return average


def _by_class(values: np.ndarray, share: np.ndarray, term: ClassTerm | VoxelwiseTerm) -> np.ndarray:
    """The term's values of each row, as the shares divide them among the classes: (rows, C)."""
    if isinstance(term, ClassTerm) and not (term.include_background or term.couples_classes):
        values = with_background(values)
    found: np.ndarray = np.where(share > 0, values, 0.0) * share  # others may be infinite
    return found


def _class_map(target: Target) -> np.ndarray:
    """The class of every voxel, (B, *spatial), 0 where it has none."""
    if target.masks is not None:
        classes = target.masks.shape[1]
        if classes == 1:
            masked: np.ndarray = target.masks[:, 0]
            return masked
        if target.activation == "sigmoid":
            raise ValueError(
                f"regions: of {classes} channels that may overlap no regions are made; give regions"
            )
        classes_of: np.ndarray = target.masks.argmax(axis=1)  # 0 where it is of none
        return classes_of
    labels: np.ndarray = target.labels
    known = (labels >= 0) & (labels < target.classes)
    return labels if known.all() else np.where(known, labels, 0)


class _DiceCE(PerRegion):
    """Dice + cross-entropy of every lesion, made from options that are numbers and words."""

    include_background = False

    def __init__(
        self,
        *,
        dice_factor: float = 1.0,
        ce_factor: float = 1.0,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        weight: str = "equal",
        without: str,
        per_class: bool = False,
        connectivity: int | None = None,
        spacing: Any = None,
        reduction: str = "mean",
    ) -> None:
        self.dice_factor = check_number("dice_factor", dice_factor)
        self.ce_factor = check_number("ce_factor", ce_factor)
        self.smooth_nr = check_number("smooth_nr", smooth_nr)
        self.smooth_dr = check_number("smooth_dr", smooth_dr)
        self._set_options(weight, without, per_class, connectivity, spacing, reduction)
        dice = Dice(smooth_nr=self.smooth_nr, smooth_dr=self.smooth_dr)
        self._set_parts(self.dice_factor * dice, self.ce_factor * CrossEntropy())


class CCDiceCE(_DiceCE):
    """Connected-component Dice + cross-entropy, the mean over the lesions of a sample.

    Each voxel belongs to the lesion that is nearest to it, and each lesion has the Dice loss of its
    class and the mean cross-entropy in its region: `PerRegion` of both, whose ``regions`` are
    "voronoi". A lesion of 10 voxels thus counts as much as one of 10,000.

    Args:
        dice_factor, ce_factor: of the two losses, at least 0.
        smooth_nr, smooth_dr: as in `RegionTerm`.
        weight, without, per_class, connectivity, spacing, reduction: as in `PerRegion`.

    Raises:
        ValueError, TypeError: as `PerRegion`.

    Source: Bouteille et al. 2025, "Learning to Look Closer: a new instance-wise loss for small
    cerebral lesion segmentation".

    >>> import numpy as np, fastloss as fl
    >>> labels = np.zeros((1, 8, 8), np.uint8)
    >>> labels[:, :3, :3] = labels[:, 6, 6] = 1
    >>> print(fl.CCDiceCE()(np.zeros((1, 2, 8, 8), np.float32), labels).round(3))
    1.502
    """

    regions = "voronoi"

    def __init__(self, *, without: str = "whole", **options: Any) -> None:
        super().__init__(without=without, **options)


class BlobDiceCE(_DiceCE):
    """Dice + cross-entropy of every lesion together with the background, as in `BlobLoss`.

    `PerRegion` of both, whose ``regions`` are "components+background". Options as in `CCDiceCE`,
    but that samples without lesions are left out by default.
    """

    regions = "components+background"

    def __init__(self, *, without: str = "skip", **options: Any) -> None:
        super().__init__(without=without, **options)


class BlobLoss(Loss):
    """Blob loss, α · (Dice + cross-entropy) + β · the mean of that over the lesions of a sample.

    For a lesion the other lesions are left out, and the background counts: see `BlobDiceCE`. Of
    other terms the same is ``alpha * terms + beta * fl.PerRegion(terms,
    regions="components+background", without="skip")``.

    Args:
        alpha, beta: α and β.
        dice_factor, ce_factor: of the two losses, at least 0.
        include_background: whether class 0 counts in the Dice of the whole sample.
        weight, without, per_class, connectivity: as in `PerRegion`.
        smooth_nr, smooth_dr: as in `RegionTerm`.
        **options: activation, ignore_index, channel_axis and validate of `Loss`.

    Raises:
        ValueError, TypeError: an option out of its range.

    Source: Kofler et al. 2023, "blob loss: instance imbalance aware loss functions for semantic
    segmentation".
    """

    def __init__(
        self,
        *,
        alpha: float = 2.0,
        beta: float = 1.0,
        dice_factor: float = 1.0,
        ce_factor: float = 1.0,
        include_background: bool = False,
        weight: str = "equal",
        without: str = "skip",
        per_class: bool = False,
        connectivity: int | None = None,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        **options: Any,
    ) -> None:
        smooth: dict[str, Any] = {"smooth_nr": smooth_nr, "smooth_dr": smooth_dr}
        blobs = BlobDiceCE(
            dice_factor=dice_factor,
            ce_factor=ce_factor,
            weight=weight,
            without=without,
            per_class=per_class,
            connectivity=connectivity,
            **smooth,
        )
        dice = Dice(include_background=include_background, **smooth)
        whole = dice_factor * dice + ce_factor * CrossEntropy()
        super().__init__(alpha * whole, beta * blobs, **options)
