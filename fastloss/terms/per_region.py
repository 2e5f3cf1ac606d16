"""Losses of every lesion: terms formed in the region of each, and their mean over lesions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from fastloss.fields import Spacing, Target
from fastloss.instances import check_connectivity, components, voronoi
from fastloss.loss import Derivatives, Loss, Pullback, Term, to_regions
from fastloss.options import REDUCTIONS, check_choice, check_number, check_spacing
from fastloss.statistics import Statistics
from fastloss.sums import as_sum
from fastloss.terms.distribution import CrossEntropy, VoxelwiseTerm
from fastloss.terms.per_class import ClassTerm, alone, with_background
from fastloss.terms.region import Dice

MODES = ("voronoi", "components+background", "given")
WEIGHTINGS = ("equal", "inverse_volume", "inverse_sqrt_volume")
_EXPONENTS = dict(zip(WEIGHTINGS, (0.0, -1.0, -0.5), strict=True))
WITHOUT = ("whole", "skip")
_SHORT = (np.int8, np.int16)


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

    Other terms of the same loss, as in ``fl.Dice() + fl.PerRegion(fl.Dice())``, are those of whole
    samples. A voxel whose region is −1 counts for nothing in any term.

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
            mean over the samples.
        include_background: whether class 0 has lesions too, where there are several channels; for
            "given" alone.
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
        include_background: bool = False,
        connectivity: int | None = None,
        spacing: Any = None,
        reduction: str = "mean",
    ) -> None:
        self.regions = check_choice("regions", regions, MODES)
        self.include_background = bool(include_background)
        if self.include_background and regions != "given":
            raise ValueError(
                "include_background: the background has no components; expected False with "
                f"regions={regions!r}"
            )
        self._set_options(weight, without, connectivity, spacing, reduction)
        self._set_parts(*terms)
        self.terms = self._parts

    def _set_options(
        self, weight: str, without: str, connectivity: int | None, spacing: Any, reduction: str
    ) -> None:
        self.weight = check_choice("weight", weight, WEIGHTINGS)
        self.without = check_choice("without", without, WITHOUT)
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
            parts += [(factor, _per_row(term)) for factor, term in each]
        if self.include_background and not all(_counts_all(term) for _, term in parts):
            raise ValueError(
                "include_background: True, but a term leaves class 0 out; expected the same of both"
            )
        self._parts = tuple(parts)
        needs = frozenset().union(*(term.requires for _, term in parts))
        self.requires: frozenset[Any] = needs

    def check(self, activation: str, classes: int) -> None:
        for _, term in self._parts:
            term.check(activation, classes)
        if activation == "softmax" and classes == 1:
            raise ValueError("logits: softmax of one channel has no lesions; use sigmoid")

    # ------------------------------------------------------------------ regions

    @property
    def making_regions(self) -> tuple[Any, ...]:
        return (self.regions, self.connectivity, self.spacing)

    def make_regions(self, target: Target, spacing: Spacing) -> tuple[np.ndarray, int]:
        if self.regions == "given":
            raise ValueError(
                "regions: expected the regions of this call, as they are 'given', got None"
            )
        check_connectivity(self.connectivity, max(1, min(target.axes, 3)))
        found = components(_class_map(target), self.connectivity)
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
        rows, each, first, share, falls = self._weighed(statistics)
        beside = each is not statistics

        # On a GPU the sums are not known here.
        may_fall = self.without == "whole" and not (
            isinstance(falls, np.ndarray) and not falls.any()
        )
        whole = statistics.of_samples() if may_fall else statistics
        value = np.zeros((rows.batch, 1), like=falls)
        pulls = []
        for factor, term in self._parts:
            if factor == 0:  # which may be infinite
                continue
            own = _of_columns(share, term, first)
            values, pull = term.combine(each)
            # What does not count may be infinite.
            total = rows.over_regions(np.where(own > 0, values, 0.0) * own)
            pulls.append((factor, own, pull, rows.fits, True))
            if may_fall:
                own = falls * _of_columns(_average(rows.classes, first), term, first)
                values, pull = term.combine(whole)
                total = total + (np.where(own > 0, values, 0.0) * own).sum(axis=1, keepdims=True)
                pulls.append((factor, own, pull, _as_it_is, False))
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
            return found

        return value, pullback

    def parts(self, statistics: Statistics) -> np.ndarray:
        """Of every lesion and its class; those of a sample without lesions are in its first row."""
        rows, each, first, share, falls = self._weighed(statistics)
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
        rows, each, first, share, falls = self._weighed(statistics)
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
        self, statistics: Statistics
    ) -> tuple[_Rows, Statistics, int, np.ndarray, np.ndarray]:
        """The rows, the sums of each with what is beside it, the first class of lesions, the share
        of every lesion, (rows, C), and of every sample that falls back on its whole, (B, 1)."""
        rows = _Rows(statistics)
        beside = self.regions == "components+background"
        first = 1 if rows.classes > 1 and not self.include_background else 0
        share, has = self._shares(statistics, rows, first, beside)
        each = rows.with_background(statistics) if beside else statistics
        # (B, 1): 1 for a sample that falls back, and how much each sample counts.
        falls = np.zeros((rows.batch, 1), like=has)
        if self.without == "whole":
            voxels = rows.over_regions(statistics.voxels[:, None])
            falls = np.where((voxels > 0) & ~has, 1.0, 0.0)
        scale: Any = 1.0
        if self.reduction == "mean":
            counted = np.where(has, 1.0, falls)
            scale = 1.0 / np.maximum(counted.sum(), 1.0)
        return rows, each, first, share * scale, falls * scale

    def _shares(
        self, statistics: Statistics, rows: _Rows, first: int, beside: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """(rows, C): the share of each lesion in the mean of its sample, 0 where there is none;
        and (B, 1): whether a sample has any."""
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
        each = share.reshape(rows.batch, rows.regions, rows.classes)
        total = each.sum(axis=(1, 2), keepdims=True)
        has = total > 0
        share = (each / np.where(has, total, 1.0)).reshape(rows.count, rows.classes)
        return share, has.reshape(rows.batch, 1)


class _Rows:
    """The rows of statistics as regions of samples."""

    def __init__(self, statistics: Statistics) -> None:
        if not statistics.regions:
            raise ValueError("statistics: expected the sums of regions, got those of samples")
        self.regions = statistics.regions
        self.count = statistics.batch_size
        self.classes = statistics.classes
        self.batch = self.count // self.regions
        self.is_background = (np.arange(self.count) % self.regions == 0)[:, None]
        """(rows, 1): whether a row is the first of its sample."""

    def over_regions(self, values: np.ndarray) -> np.ndarray:
        """(rows, columns) summed over all but the samples: (B, 1)."""
        each = values.reshape(self.batch, self.regions, values.shape[1])
        total: np.ndarray = each.sum(axis=(1, 2)).reshape(self.batch, 1)
        return total

    def fits(self, upstream: Any) -> Any:
        """An upstream gradient, one number or (B, 1), as what multiplies (rows, C)."""
        if not np.ndim(upstream):
            return upstream
        each = np.broadcast_to(upstream, (self.batch, self.regions))
        return each.reshape(self.count, 1)

    def with_background(self, statistics: Statistics) -> Statistics:
        """Those of every region together with the first of its sample."""
        slots = len(statistics.sums)
        sums = statistics.sums.reshape(slots, self.batch, self.regions, self.classes)
        voxels = statistics.voxels.reshape(self.batch, self.regions)
        return replace(
            statistics,
            sums=(sums + sums[:, :, :1]).reshape(slots, self.count, self.classes),
            voxels=(voxels + voxels[:, :1]).reshape(self.count),
            joined=None,
        )

    def from_background(self, derivative: Any) -> np.ndarray:
        """The derivative by those sums, 0 for the first region, as that by the sums themselves."""
        each = np.broadcast_to(derivative, (self.count, self.classes))
        each = each.reshape(self.batch, self.regions, self.classes)
        total = each.sum(axis=1, keepdims=True)
        first = (np.arange(self.regions) == 0)[:, None]
        return np.where(first, total, each).reshape(self.count, self.classes)


def _as_it_is(upstream: Any) -> Any:
    return upstream


def _per_row(term: Term) -> ClassTerm | VoxelwiseTerm:
    """The same term with one value for every row."""
    kind = type(term).__name__
    if not isinstance(term, (ClassTerm, VoxelwiseTerm)) or term.makes or term.ranking is not None:
        raise TypeError(f"terms: {kind} is no region term nor one of single voxels")
    if isinstance(term, ClassTerm) and term.batch:
        raise ValueError(f"terms: {kind} sums over the batch, whose lesions have nothing in common")
    if term.maps_voxels:
        raise ValueError(f"terms: {kind} has reduction='voxel', and no value of a region")
    found: Any = term.with_options({"reduction": "none"})
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
        connectivity: int | None = None,
        spacing: Any = None,
        reduction: str = "mean",
    ) -> None:
        self.dice_factor = check_number("dice_factor", dice_factor)
        self.ce_factor = check_number("ce_factor", ce_factor)
        self.smooth_nr = check_number("smooth_nr", smooth_nr)
        self.smooth_dr = check_number("smooth_dr", smooth_dr)
        self._set_options(weight, without, connectivity, spacing, reduction)
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
        weight, without, connectivity, spacing, reduction: as in `PerRegion`.

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
        weight, without, connectivity: as in `PerRegion`.
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
            connectivity=connectivity,
            **smooth,
        )
        dice = Dice(include_background=include_background, **smooth)
        whole = dice_factor * dice + ce_factor * CrossEntropy()
        super().__init__(alpha * whole, beta * blobs, **options)
