"""The interface of a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from fastloss.arrays import Arrays, Field
from fastloss.backends import components, counts, distances, surfaces
from fastloss.backends.targets import target_of_sample
from fastloss.borrowed import Place
from fastloss.maps import Map
from fastloss.protocol import FusedLoss
from fastloss.request import Request, make_request
from fastloss.statistics import Statistics
from fastloss.sums import Sum, slopes_by_target


class Backend:
    """The passes over the voxels. It knows the request, never a framework or a term.

    A backend defines `reduce`, `apply` and `write_map`. The steps of a loss are built on them.

    A row is a sample or, with regions, one of the `Arrays.rows` regions of a sample; the rows of a
    sample are consecutive. Voxels of weight 0, of the ignored label or of no region contribute
    nothing, whatever logits and fields hold there. Where every class has regions of its own, a
    voxel of no region contributes nothing to the sums of that class, and the voxel weights are
    summed over the regions of class 0.
    """

    name = ""

    place: Place | None = None
    """The GPU in whose memory it computes; None: CPU memory."""

    counts_errors = False
    """Whether it computes requests with histograms. The reference is the fallback for those."""

    def reduce(
        self,
        request: Request,
        arrays: Arrays,
        sums: np.ndarray,
        voxels: np.ndarray,
        voxel_map: Map | None = None,
    ) -> None:
        """Write the sums of ``request.sums``, (S, rows, C), and of the voxel weights, (rows,).

        Behind the sums of the table are those of its histograms, of which there are none with
        regions.
        Also writes a map of kind "voxel", if one is requested, in the same pass.

        Raises:
            ValueError: a label outside [0, C) that is not ignored, an integer other than 0 and 1 in
                a dense target, or a negative voxel weight.
        """
        raise NotImplementedError(f"{type(self).__name__} must define reduce")

    def apply(
        self, request: Request, arrays: Arrays, coefficients: np.ndarray, out: np.ndarray
    ) -> None:
        """Write the gradient by the logits, given the derivative by each sum, (S, rows, C).

        ``out`` has the shape and dtype of ``arrays.logits`` and may be the same memory. The
        arrays are those of an earlier `reduce`, which checked them.
        """
        raise NotImplementedError(f"{type(self).__name__} must define apply")

    def apply_target(
        self, request: Request, arrays: Arrays, coefficients: np.ndarray, out: np.ndarray
    ) -> None:
        """Write the gradient by a dense target, given the derivative by each sum, (S, rows, C).

        It is a map of every sample: Σ coefficient · m · field · the derivative of weight ·
        function by g. With regions, every one of them takes a pass.

        Args:
            out: (B, C, voxels) in C order, of the value's dtype.
        """
        slopes = [slopes_by_target(total) for total in request.sums]
        needs = frozenset(total for each in slopes for _, total in each)
        wanted = make_request(request.activation, True, request.ignore_index, needs)
        known = dict(zip(request.fields, arrays.fields, strict=True))
        found = np.empty_like(out[:1])
        for row in range(coefficients.shape[1]):
            b, region = divmod(row, arrays.rows)
            k = np.zeros((len(wanted.sums), coefficients.shape[2]))
            for s, each in enumerate(slopes):
                for factor, total in each:
                    k[wanted.index[total]] += factor * coefficients[s, row]
            one = slice(b, b + 1)
            sample = replace(
                arrays,
                logits=arrays.logits[one],
                target=arrays.target[one],
                fields=tuple(
                    known[name]._replace(array=known[name].array[one]) for name in wanted.fields
                ),
                rows=1,
            )
            if arrays.voxel_weight is not None:
                sample.voxel_weight = arrays.voxel_weight[one]
            mine = None if arrays.regions is None else arrays.regions[one] == region
            if arrays.regions_by_class:
                sample.regions = None
            elif mine is not None:
                sample.regions, sample.regions_dtype = np.where(mine, 0, -1).astype("int8"), "int8"
            self.write_map(wanted, sample, Map("class", found, k))
            if mine is not None and arrays.regions_by_class:
                np.copyto(found, 0.0, where=~mine.reshape(found.shape))
            if region:
                out[one] += found
            else:
                out[one] = found

    def write_map(self, request: Request, arrays: Arrays, voxel_map: Map) -> None:
        """Write one number per voxel, or per voxel and class: see `Map`.

        Raises:
            ValueError: as `reduce`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define write_map")

    # ------------------------------------------------------------------ distances

    def distance_transform(
        self, mask: np.ndarray, spacing: Sequence[float], limit: float, out: np.ndarray
    ) -> None:
        """As `fastloss.backends.distances.distance_transform`; all in C order."""
        distances.distance_transform(mask, spacing, limit, out)

    def signed_distance(
        self,
        classes: np.ndarray,
        first: int,
        spacing: Sequence[float],
        convention: str,
        limit: float,
        out: np.ndarray,
    ) -> None:
        """As `fastloss.backends.distances.signed_distance`; all in C order."""
        distances.signed_distance(classes, first, spacing, convention, limit, out)

    def class_indices(self, labels: np.ndarray, classes: int, out: np.ndarray) -> int:
        """As `fastloss.backends.distances.class_indices`, of labels in any strides."""
        return distances.class_indices(labels, classes, out)

    def bounds(self, numbers: np.ndarray) -> tuple[int, int]:
        """The least and the largest of integers in CPU memory, of which there is one at least."""
        return int(numbers.min()), int(numbers.max())

    # ------------------------------------------------------------------ metrics

    def likeliest(self, scores: np.ndarray, dtype: str, out: np.ndarray) -> None:
        """As `fastloss.backends.counts.likeliest`."""
        counts.likeliest(scores, dtype, out)

    def confusion(self, prediction: np.ndarray, reference: np.ndarray, found: np.ndarray) -> None:
        """As `fastloss.backends.counts.confusion`."""
        counts.confusion(prediction, reference, found)

    def surface_distances(
        self,
        prediction: np.ndarray,
        reference: np.ndarray,
        structures: np.ndarray,
        axes: int,
        spacing: Sequence[float],
        areas: np.ndarray | None,
        counted: np.ndarray | None,
    ) -> list[tuple[surfaces.Directed, surfaces.Directed]]:
        """As `fastloss.backends.surfaces.surface_distances`."""
        return surfaces.surface_distances(
            prediction, reference, structures, axes, spacing, areas, counted
        )

    # ------------------------------------------------------------------ instances

    def components(
        self, classes: np.ndarray, table: np.ndarray, connectivity: int
    ) -> components.Labelled:
        """As `fastloss.backends.components.NumpyLabelled`."""
        return components.NumpyLabelled(classes, table, connectivity)

    def voronoi(self, numbers: np.ndarray, spacing: Sequence[float], out: np.ndarray) -> None:
        """As `fastloss.backends.components.voronoi`; all in C order."""
        components.voronoi(numbers, spacing, out)

    # ------------------------------------------------------------------ skeletons

    skeletonizes = False
    """Whether it defines `soft_skeleton`."""

    def soft_skeleton(
        self,
        p: np.ndarray,
        dtype: str,
        out: np.ndarray,
        iterations: int,
        upstream: np.ndarray | None = None,
    ) -> None:
        """Write the soft skeleton of p, (B, C, *spatial) with 1 to 3 spatial axes, to ``out``.

        With ``upstream``, the derivative of something by the skeleton, write its derivative by p
        in place of the skeleton. ``dtype`` is that of all arrays: NumPy lacks bfloat16. ``out``
        shares no memory with the others.
        """
        raise NotImplementedError(f"{type(self).__name__} must define soft_skeleton")

    # ------------------------------------------------------------------ the steps of a loss

    def statistics(
        self, loss: FusedLoss, request: Request, arrays: Arrays
    ) -> tuple[Statistics, Field | None]:
        """The sums of a loss, and the field that its ranking term makes, if it has one.

        Raises:
            ValueError: as `reduce`.
        """
        classes, batch = arrays.logits.shape[1], arrays.logits.shape[0] * arrays.rows
        regions = 0 if arrays.regions is None else arrays.rows
        voxels = np.empty(batch)
        term = loss.ranking
        if term is None:
            sums = np.empty((request.slots, batch, classes))
            self.reduce(request, arrays, sums, voxels)
            return Statistics(request, sums, voxels, arrays.value_dtype, None, regions), None
        sums = np.zeros((request.slots, batch, classes))
        if term.ranks_weighted:
            field = self._rank_weighted(term, request, arrays, sums, voxels)
        else:
            field = self._rank_unweighted(term, request, arrays, sums, voxels)
        return Statistics(request, sums, voxels, arrays.value_dtype, None, regions), field

    def _rank_weighted(
        self, term: Any, request: Request, arrays: Arrays, sums: np.ndarray, voxels: np.ndarray
    ) -> Field:
        """The field of a ranking term, of the map that the pass over the other sums writes."""
        others = without_field(request, term.ranking.field)
        shape, dtype = arrays.target.shape, arrays.value_dtype
        losses = np.empty((shape[0], prod(shape[1:])), dtype)
        found = np.empty((others.slots, *sums.shape[1:]))
        voxel_map = Map("voxel", losses, term.ranks_by(others, sums.shape[2]))
        self.reduce(others, arrays, found, voxels, voxel_map)
        _place(found, others, sums, request)
        total = term.choose(losses)
        if sums.size:
            sums[request.index[term.ranking], 0, 0] = total
        return Field(losses.reshape(shape), dtype.name, "voxel")

    def _rank_unweighted(
        self, term: Any, request: Request, arrays: Arrays, sums: np.ndarray, voxels: np.ndarray
    ) -> Field:
        """The field of a term that ranks voxels, or voxels and classes, whatever they weigh."""
        others = without_field(request, term.ranking.field)
        found = np.empty((others.slots, *sums.shape[1:]))
        self.reduce(others, arrays, found, voxels)
        _place(found, others, sums, request)
        (batch, classes), spatial = arrays.logits.shape[:2], arrays.logits.shape[2:]
        shape = (batch, classes, *spatial) if term.ranks_classes else (batch, *spatial)
        numbers = np.empty((*shape[: 1 + term.ranks_classes], prod(spatial)), arrays.value_dtype)
        kind = "class" if term.ranks_classes else "voxel"
        plain = replace(arrays, voxel_weight=None)
        self.write_map(others, plain, Map(kind, numbers, term.ranks_by(others, classes)))
        targets = [target_of_sample(request, arrays, b) for b in range(batch)]
        sums[request.index[term.ranking], :1, :1] = term.rank(numbers, targets)
        field = Field(numbers.reshape(shape), arrays.value_dtype.name, kind)
        if term.sums_chosen:
            self.reduce(request, with_ranked(request, arrays, term, field), sums, voxels)
        return field

    def combine(self, loss: FusedLoss, statistics: Statistics) -> tuple[Any, Callable[[Any], Any]]:
        """The value, and its pullback from upstream to the coefficients for `gradient`."""
        return loss.combine(statistics)

    def gradient(
        self, request: Request, arrays: Arrays, coefficients: Any, out: np.ndarray
    ) -> None:
        """As `apply`, given the result of `combine`'s pullback."""
        self.apply(request, arrays, coefficients, out)

    def check(self, request: Request, arrays: Arrays) -> None:
        """Raise ValueError for bad labels and weights, if `write_map` writes NaN instead."""

    def with_numbers(self, loss: FusedLoss) -> FusedLoss:
        """The loss with its numbers in CPU memory."""
        return loss

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """A new array in C order in the backend's memory."""
        return np.empty(shape, dtype)

    def get_num_threads(self) -> int:
        """The number of threads that compute."""
        return 1

    def set_num_threads(self, number: int) -> None:
        """Let at most this many threads compute, where the backend has threads."""


def without_field(request: Request, field: str) -> Request:
    """The request without the sums of this field."""
    needs = {need for need in request.needs if not (isinstance(need, Sum) and need.field == field)}
    return make_request(request.activation, request.dense, request.ignore_index, frozenset(needs))


def _place(found: np.ndarray, own: Request, sums: np.ndarray, request: Request) -> None:
    """Write the sums of a request where those of a request of more sums are."""
    keys: list[str | Sum] = [*own.sums, *own.histograms]
    for key in keys:
        sums[request.index[key]] = found[own.index[key]]


def with_ranked(request: Request, arrays: Arrays, term: Any, ranked: Field) -> Arrays:
    """The arrays with the field that a ranking term computed, in the order of the request."""
    given = iter(arrays.fields)
    fields = (ranked if name == term.ranking.field else next(given) for name in request.fields)
    return replace(arrays, fields=tuple(fields))
