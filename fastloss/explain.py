"""Where a loss comes from: by its sums, their derivatives, and passes that write maps.

A term T is a function of sums S, to which a voxel adds s, which depends on its p. Were the voxel
predicted right, it would add s' instead, and T would fall by Σ k (s − s') to first order, where
k = ∂T/∂S: the *gain* of the voxel. Of a term that is linear in its sums Σ k s is the *share* of the
voxel in its value. Where targets g are 0 or 1, s' is linear in g, and so a gain too is one linear
combination of summands, which one pass writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from fastloss.arrays import INTEGERS, Arrays
from fastloss.backends.base import with_ranked
from fastloss.backends.reference import FUNCTIONS, WEIGHTS, Probability
from fastloss.borrowed import Extras
from fastloss.calls import Passes, moved
from fastloss.explanation import ExplainedTerm, Explanation
from fastloss.frameworks import borrow
from fastloss.histogram import HISTOGRAMS
from fastloss.maps import Map
from fastloss.request import make_request
from fastloss.statistics import Statistics
from fastloss.sums import PREDICTED, REFERENCE, UNIFORM, UNIFORM_REST, Sum, table

_TILE = 1 << 20
"""Numbers, voxels times classes, of a tile that NumPy computes."""

Slopes = Mapping[Sum, np.ndarray]
"""Per sum, the derivative by it: (rows, C)."""


def explain(
    loss: Any,
    logits: Any,
    target: Any,
    voxel_weight: Any,
    extras: Extras | None,
    spacing: Any,
    exact: bool,
) -> Explanation:
    """As `fastloss.Loss.explain` says."""
    for _, term in loss.terms:
        if not (term.ranks_errors or term.requires.isdisjoint(HISTOGRAMS)):
            raise ValueError(
                f"terms: {type(term).__name__} reads a histogram in a way of its own, and has no "
                "map of its parts"
            )
    if spacing is not None:
        terms = ((w, _with_spacing(term, spacing)) for w, term in loss.terms)
        loss = loss.with_terms(tuple(terms))
    passes = loss.passes(logits, target, voxel_weight, extras)
    loss = passes.backend.with_numbers(loss)
    _check(loss, passes, exact)
    maps = _Maps(loss, passes)
    statistics = maps.statistics
    found: list[ExplainedTerm] = []
    names: dict[str, int] = {}
    for weight, term in loss.terms:
        kind = type(term).__name__
        names[kind] = names.get(kind, 0) + 1
        name = kind if names[kind] == 1 else f"{kind} {names[kind]}"
        if term.ranks_errors:
            shares, parts = maps.ranked_shares(term, weight)
            value = weight * np.sum(term.combine(statistics)[0])
            found.append(ExplainedTerm(name, "share", _adding_up(parts, value), None, shares))
            continue
        slopes = _slopes(loss, term, weight, statistics)
        made = []
        for factor, summand in term.summands:
            own = slopes
            if summand is not term:
                own = _slopes(loss, summand, weight * factor, statistics)
            if exact and not summand.shares:
                made.append(maps.exact(summand, weight * factor))
            else:
                made.append(maps.first_order(summand, own))
        parts, regions = _parts(loss, weight, term, slopes, maps)
        shown = maps.shaped(_total(made))
        found.append(ExplainedTerm(name, "share" if term.shares else "gain", parts, regions, shown))
    batch, classes, *spatial = passes.arrays.logits.shape
    return Explanation(
        float(loss.combine(statistics)[0]),
        found,
        _total([each.map for each in found]),
        batch=batch,
        classes=classes,
        channel_axis=loss.channel_axis % (len(spatial) + 2) if maps.by_channel else None,
        exact=bool(exact),
    )


def _with_spacing(term: Any, spacing: Any) -> Any:
    """The same term, if it makes anything of a target, with another spacing."""
    return term.with_options({"spacing": spacing}) if term.makes or term.regional else term


def _check(loss: Any, passes: Passes, exact: bool) -> None:
    """Raise ValueError for what has no explanation."""
    arrays = passes.arrays
    batch, classes, *spatial = arrays.logits.shape
    regions = 0 if arrays.regions is None else arrays.rows
    shape = (batch, *spatial) if loss.maps_voxels else loss.value_shape(batch, classes, regions)
    if shape:
        raise ValueError(
            "reduction: expected a loss of one value, as its parts are to be told, got one of "
            f"shape {tuple(shape)}"
        )
    if exact and arrays.regions_by_class:
        raise ValueError(
            "exact: gains are of first order alone where every class has regions of its own; "
            "expected False"
        )
    for _, term in loss.terms if exact else ():
        for _, each in term.summands:
            if not each.shares and not _defines(each, "fall"):
                raise ValueError(
                    f"exact: {type(term).__name__} defines no `fall`, and its gains are of first "
                    "order alone"
                )
    if passes.backend.place is not None:
        passes.backend.check(passes.request, arrays)


def _defines(term: Any, name: str) -> bool:
    """Whether a method of a term is that of its `combine`, not of a class that it redefines."""
    for kind in type(term).__mro__:
        if name in vars(kind):
            return kind.__module__ != "fastloss.loss"
        if "combine" in vars(kind):
            return False
    return False


def _slopes(loss: Any, term: Any, factor: float, statistics: Statistics) -> Slopes:
    """The derivative by every sum of a term times a factor, where it is not 0."""
    found: dict[Sum, np.ndarray] = {}
    sums, index = statistics.request.sums, statistics.request.index
    for key, slope in loss.combined(term, statistics)[1](factor).items():
        total = sums[index[key]]
        found[total] = found.get(total, 0.0) + np.broadcast_to(slope, statistics.sums.shape[1:])
    return {total: slope for total, slope in found.items() if slope.any()}


def _parts(
    loss: Any, weight: float, term: Any, slopes: Slopes, maps: _Maps
) -> tuple[np.ndarray, np.ndarray | None]:
    """The parts of a term, (B, C), and those in regions, (B, R, C), with 1 where not split."""
    statistics, count = maps.statistics, maps.statistics.regions
    in_regions = bool(count) and (loss.regional is None or term.regional)
    own = statistics if in_regions else statistics.of_samples()
    value = weight * np.sum(loss.combined(term, statistics)[0])
    sums: Statistics | None = statistics if term.ranking is None else maps.ranked
    if sums is None:
        found = np.full((1, 1), value)
    elif term.shares and not term.regional:
        found = np.zeros(own.sums.shape[1:])
        for total, slope in slopes.items():
            # A sum may be infinite where it does not count.
            each = np.where(slope == 0, 0.0, sums[total]) * slope
            found += each.reshape(len(found), -1, each.shape[1]).sum(axis=1)
    else:
        found = weight * term.parts(own)
    found = _adding_up(found, value)
    if not in_regions or len(found) % count:
        return found, None
    regions = found.reshape(-1, count, found.shape[1])
    return regions.sum(axis=1), regions


def _adding_up(parts: np.ndarray, value: Any) -> np.ndarray:
    """The parts, or the whole where they are not its: of a class that redefines `combine` alone."""
    alike = np.isclose(parts.sum(), value, rtol=1e-5, atol=1e-12, equal_nan=True)
    return parts if alike else np.full((1, 1), value)


def _total(maps: list[Any]) -> Any:
    """The sum of maps, none of which changes."""
    if len(maps) == 1:
        return maps[0]
    total = maps[0] + maps[1]
    for each in maps[2:]:
        total += each
    return total


class _Maps:
    """The sums of a call, and passes over its arrays that write maps, (B, N) or (B, C, N)."""

    def __init__(self, loss: Any, passes: Passes) -> None:
        self.backend, self.adapter, self.loss = passes.backend, passes.adapter, loss
        self.arrays, self.request = passes.arrays, passes.request
        self.by_channel = self.request.activation == "sigmoid"
        self.hard = not self.arrays.dense or self.arrays.target_dtype in INTEGERS
        self.batch, self.classes, *self.spatial = self.arrays.logits.shape
        self.ranked: Statistics | None = None
        """The sums of a term that chooses voxels by sample and class; `statistics` has a total."""
        self._ahead: tuple[Any, np.ndarray, Any] | None = None
        self.statistics = self._reduce(passes)

    # ------------------------------------------------------------------ sums

    def _reduce(self, passes: Passes) -> Statistics:
        """The sums, in CPU memory; and the map of one term ahead, if the same pass writes it."""
        first = None if self.backend.place or self.arrays.regions is not None else self._mappable()
        if first is not None:
            return self._reduce_and_map(first)
        statistics = passes.reduce()
        place = self.backend.place
        if passes.ranked is not None:
            term = self.loss.ranking
            self.arrays = with_ranked(self.request, self.arrays, term, passes.ranked)
            if place is None and not term.ranks_errors:
                self.ranked = self._sums()
        if place is not None:
            sums, voxels = place.numpy(statistics.sums), place.numpy(statistics.voxels)
            statistics = replace(statistics, sums=sums, voxels=voxels)
        return statistics

    def _sums(self, voxel_map: Map | None = None) -> Statistics:
        rows = self.batch * self.arrays.rows
        sums, voxels = np.empty((self.request.slots, rows, self.classes)), np.empty(rows)
        self.backend.reduce(self.request, self.arrays, sums, voxels, voxel_map)
        regions = 0 if self.arrays.regions is None else self.arrays.rows
        return Statistics(self.request, sums, voxels, self.arrays.value_dtype, None, regions)

    def _mappable(self) -> Any:
        """A term whose map is known, but for a factor, before the sums are."""
        if self.by_channel or self.loss.ranking is not None:
            return None
        for _, term in self.loss.terms:
            fields = any(isinstance(need, Sum) and need.field for need in term.requires)
            if term.shares and not fields and hasattr(term, "linear"):
                return term
        return None

    def _reduce_and_map(self, term: Any) -> Statistics:
        coefficients = np.zeros((len(self.request.sums), self.classes))
        for key, k in term.map_coefficients(self.request, self.classes).items():
            coefficients[self.request.index[key]] += k
        out = self._empty()
        statistics = self._sums(Map("voxel", out, coefficients))
        self._ahead = (term, coefficients, out)
        return statistics

    def _made_ahead(self, term: Any, slopes: Slopes) -> Any:
        """The map that was written beside the sums, with its factor; None: it is another one."""
        if self._ahead is None or self._ahead[0] is not term:
            return None
        _, coefficients, out = self._ahead
        self._ahead = None
        wanted = np.zeros((*coefficients.shape[:1], *self.statistics.sums.shape[1:]))
        for total, slope in slopes.items():
            wanted[self.request.index[total]] = slope
        place = np.unravel_index(np.abs(coefficients).argmax(), coefficients.shape)
        if not coefficients[place] or not wanted.size:
            return None
        factor = wanted[place[0], 0, place[1]] / coefficients[place]
        if not np.allclose(wanted, factor * coefficients[:, None], rtol=1e-12, atol=0.0):
            return None
        out *= out.dtype.type(factor)
        return out

    # ------------------------------------------------------------------ maps

    def first_order(self, term: Any, slopes: Slopes) -> Any:
        """The shares of a term of these slopes, or its gains to first order."""
        if term.shares:
            ahead = self._made_ahead(term, slopes)
            return self._written(slopes) if ahead is None else ahead
        slopes = {total: k for total, k in slopes.items() if total.function != "one"}
        if self.hard:
            return self._written(_less_right(slopes))
        gains = self._written(slopes)
        gains -= self._written(slopes, right=True)
        return gains

    def exact(self, term: Any, factor: float) -> Any:
        """The gains of a term times a factor, by its value where the sums are changed."""
        statistics = self.statistics
        if self.loss.regional is not None and not term.regional:
            statistics = statistics.of_samples()
        # No term looks at histograms: these are many numbers, for every voxel.
        statistics = replace(statistics, sums=statistics.sums[: len(self.request.sums)])
        rows = max(statistics.regions, 1)
        totals = [t for t in table(term.requires, self.request.activation) if t.function != "one"]
        numbers = np.zeros((self.batch, *[self.classes] * self.by_channel, prod(self.spatial)))
        for b, place, arrays, regions in self._tiles():
            change = np.stack([self._change(total, arrays) for total in totals])
            index = [statistics.request.index[total] for total in totals]
            region = regions if rows > 1 else np.where(regions < 0, -1, 0)
            for r in np.unique(region[region >= 0]):
                row, at = b * rows + int(r), region == r
                before = statistics.sums[:, row, None]
                sums = np.repeat(before, int(at.sum()), axis=1)
                if not self.by_channel:
                    sums[index] += change[:, :, at].transpose(0, 2, 1)
                    numbers[b, place][at] = factor * term.fall(statistics, row, sums)
                    continue
                for c in range(self.classes):
                    of_channel = sums.copy()
                    of_channel[index, :, c] += change[:, c, at]
                    fall = term.fall(statistics, row, of_channel)
                    numbers[b, c, place][at] = factor * fall
        return self._here(numbers)

    def ranked_shares(self, term: Any, factor: float) -> tuple[Any, np.ndarray]:
        """The shares of the voxels in a term that `ranks_errors`; and their sums, (B, C)."""
        numbers = np.zeros((self.batch, *[self.classes] * self.by_channel, prod(self.spatial)))
        parts = np.zeros((self.batch, self.classes))
        exact, jumps = term.ranking is not None, None
        if not exact:
            jumps = term.jumps(self.statistics)
        for b, place, arrays, _ in self._tiles():

            def of(total: Sum, weighted: bool = False, arrays: Arrays = arrays) -> np.ndarray:
                own = arrays if weighted else replace(arrays, voxel_weight=None)
                return self._by_class({total: np.ones((1, self.classes))}, own)

            weight, foreground = of(Sum(), weighted=True), of(REFERENCE) > 0.5
            # 1 − p as a function that is exact where p is near 1.
            p, q = of(PREDICTED), of(Sum("one", "generalized", 1.0))
            logit = of(UNIFORM_REST) - of(UNIFORM) if term.histogram == "hinge" else p
            if exact:
                field = arrays.fields[self.request.fields.index(term.ranking.field)].array
                own = np.abs(field.reshape(p.shape)).astype(np.float64)
            else:
                own = jumps[:, :, b]  # type: ignore[index]
            each = weight * term.voxel_shares(own, p, q, logit, foreground)
            each = factor * np.where(weight == 0, 0.0, each)
            parts[b] += each.sum(axis=1)
            numbers[b][..., place] = each if self.by_channel else each.sum(axis=0)
        return self.shaped(self._here(numbers)), parts

    def _change(self, total: Sum, arrays: Arrays) -> np.ndarray:
        """By how much each voxel of a tile would change a sum, were it right: (C, n)."""
        minus: Slopes = {total: -np.ones((1, self.classes))}
        if self.hard:
            return self._by_class(_less_right(minus), arrays)
        change: np.ndarray = self._by_class(minus, arrays)
        change -= self._by_class(minus, arrays, right=True)
        return change

    def _written(self, slopes: Slopes, right: bool = False) -> Any:
        """Σ of slope times summand over the sums, and the classes; ``right``: where p = g."""
        out = self._empty(right)
        if not slopes or not prod(out.shape):
            out[...] = 0.0
            return out
        # (B, R, C) for each sum.
        each = {
            total: k.reshape(self.batch, self.arrays.rows, self.classes)
            for total, k in slopes.items()
        }
        by_class = self.arrays.regions_by_class  # a voxel may be of no region for some classes
        if by_class or not all(_are_alike(k, axis=1) for k in each.values()):
            return self._by_regions(slopes, right)
        kind = "class" if self.by_channel else "voxel"
        if all(_are_alike(k, axis=0) for k in each.values()):
            self._write(kind, {t: k[0, 0] for t, k in each.items()}, self.arrays, out, right)
            return out
        for b in range(self.batch):
            of_sample = {total: k[b, 0] for total, k in each.items()}
            self._write(kind, of_sample, _cut(self.arrays, b), out[b : b + 1], right)
        return out

    def _by_regions(self, slopes: Slopes, right: bool) -> Any:
        """As `_written`, where the slopes are others in every region of a sample."""
        numbers = np.zeros((self.batch, *[self.classes] * self.by_channel, prod(self.spatial)))
        for b, place, arrays, regions in self._tiles():
            rows = b * self.arrays.rows + np.maximum(regions, 0)
            for total, k in slopes.items():
                one: Slopes = {total: np.ones((1, self.classes))}
                summands = self._by_class(one, arrays, right)
                if regions.ndim == 1:
                    own = k[rows].T
                else:
                    own = np.where(regions < 0, 0.0, np.take_along_axis(k.T, rows, axis=1))
                each = np.where(own == 0, 0.0, summands) * own
                numbers[b][..., place] += each if self.by_channel else each.sum(axis=0)
        return self._here(numbers)

    def _tiles(self) -> Iterator[tuple[int, slice, Arrays, np.ndarray]]:
        """Parts of samples: the sample, the voxels, their arrays, and the region of each, (n,), or
        (C, n) where every class has regions of its own."""
        arrays, inner = self.arrays, prod(self.spatial[1:])
        regions = arrays.regions
        if regions is not None and self.backend.place is not None:
            regions = self.backend.to_numpy(regions)  # type: ignore[attr-defined]
        length = self.spatial[0] if self.spatial else 1
        step = max(1, _TILE // max(1, inner * self.classes))
        for b in range(self.batch):
            for start in range(0, length if inner else 0, step):
                end = min(start + step, length)
                part = _cut(arrays, b, slice(start, end) if self.spatial else None)
                if regions is None:
                    own = np.zeros((end - start) * inner, np.int64)
                else:
                    by_class = arrays.regions_by_class
                    cut = regions[b]
                    if self.spatial:
                        cut = cut[:, start:end] if by_class else cut[start:end]
                    own = cut.reshape((self.classes, -1) if by_class else (-1,)).astype(np.int64)
                    own[own >= arrays.rows] = -1
                yield b, slice(start * inner, end * inner), part, own

    def _by_class(self, slopes: Slopes, arrays: Arrays, right: bool = False) -> np.ndarray:
        """Σ of slope times summand over the sums, for all voxels of one sample: (C, n) float64."""
        count = prod(arrays.logits.shape[2:])
        out = self.backend.empty((1, self.classes, count), self._dtype(right))
        self._write("class", {t: k[0] for t, k in slopes.items()}, arrays, out, right)
        place = self.backend.place
        numbers: np.ndarray = out if place is None else place.numpy(out)
        found: np.ndarray = numbers[0].astype(np.float64)
        return found

    def _write(
        self, kind: str, slopes: Slopes, arrays: Arrays, out: Any, right: bool = False
    ) -> None:
        """One pass, of slopes (C,) for each sum."""
        whole = self.request
        activation = "none" if right else whole.activation
        needs = frozenset(slopes)
        request = make_request(activation, whole.dense, whole.ignore_index, needs)
        coefficients = np.zeros((len(request.sums), self.classes))
        for total, k in slopes.items():
            coefficients[request.index[total]] = k
        known = dict(zip(whole.fields, arrays.fields, strict=True))
        arrays = replace(arrays, fields=tuple(known[name] for name in request.fields))
        if right:
            arrays = replace(arrays, logits=arrays.target, logits_dtype=arrays.target_dtype)
        self.backend.write_map(request, arrays, Map(kind, borrow(out, "out").array, coefficients))

    # ------------------------------------------------------------------ arrays

    def _empty(self, right: bool = False) -> Any:
        """For a map of all voxels."""
        shape = (self.batch, *[self.classes] * self.by_channel, prod(self.spatial))
        return self.backend.empty(shape, self._dtype(right))

    def _dtype(self, right: bool) -> np.dtype:
        """That of a map, which passes over the target write in another one."""
        arrays = self.arrays
        own = replace(arrays, logits_dtype=arrays.target_dtype) if right else arrays
        return own.value_dtype

    def _here(self, numbers: np.ndarray) -> Any:
        """A map that NumPy computed, as the passes write one."""
        numbers = numbers.astype(self.arrays.value_dtype)
        place = self.backend.place
        return numbers if place is None else place.array(numbers, numbers.dtype.name)

    def shaped(self, out: Any) -> Any:
        """A map as the caller has it."""
        value = out.reshape((self.batch, *[self.classes] * self.by_channel, *self.spatial))
        if self.by_channel and self.loss.channel_axis != 1:
            value = moved(value, 1, self.loss.channel_axis)
        return self.adapter.result(value)


def _less_right(slopes: Slopes) -> Slopes:
    """Σ k (s − s') as a combination of summands, where targets are 0 or 1.

    Of a sum with weight w, function f and field φ, s' = m w(g) f(g) φ is m φ times w(0) f(0), and
    g times the difference to w(1) f(1).
    """
    found = dict(slopes)

    def add(total: Sum, slope: np.ndarray) -> None:
        found[total] = found[total] + slope if total in found else slope

    g = np.array([0.0, 1.0])
    with np.errstate(divide="ignore", invalid="ignore"):
        right = Probability(g, 1 - g, np.log(g), np.log1p(-g), g)
        for total, k in slopes.items():
            weight = WEIGHTS[total.weight](g)
            values = FUNCTIONS[total.function].value(right, total.parameter)
            absent, there = np.where(weight == 0, 0.0, weight * values)
            add(Sum("target", "one", 0.0, total.field), -k * (there - absent))
            if absent:
                add(Sum("one", "one", 0.0, total.field), -k * absent)
    return found


def _are_alike(slopes: np.ndarray, axis: int) -> bool:
    """Whether they are the same all along an axis."""
    first = slopes.take([0], axis)
    return np.array_equal(slopes, np.broadcast_to(first, slopes.shape), equal_nan=True)


def _cut(arrays: Arrays, sample: int, part: slice | None = None) -> Arrays:
    """One sample of a call's arrays, or a part of it along the first spatial axis."""

    def cut(array: np.ndarray, by_class: bool) -> np.ndarray:
        own = array[sample : sample + 1]
        if part is None:
            return own
        return own[:, :, part] if by_class else own[:, part]

    weight, regions = arrays.voxel_weight, arrays.regions
    return replace(
        arrays,
        logits=cut(arrays.logits, True),
        target=cut(arrays.target, arrays.dense),
        voxel_weight=None if weight is None else cut(weight, False),
        fields=tuple(f._replace(array=cut(f.array, f.kind == "class")) for f in arrays.fields),
        regions=None if regions is None else cut(regions, arrays.regions_by_class),
    )
