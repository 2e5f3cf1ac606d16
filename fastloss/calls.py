"""One call of a loss: its arrays, the two passes over them and the step between, once for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from fastloss.arrays import FLOATS, INTEGERS, Arrays, Field, arrange, channels_second, check_out
from fastloss.backends import Backend, current_backend, load_backend
from fastloss.backends.base import with_ranked
from fastloss.borrowed import Borrowed, Extras, Place
from fastloss.fields import (
    Target,
    as_field,
    distances_of,
    distances_on_gpu,
    make,
    narrowed,
    target_of,
    target_on_gpu,
)
from fastloss.frameworks import adapter_of, borrow
from fastloss.maps import Map
from fastloss.protocol import FusedLoss
from fastloss.request import Request, make_request
from fastloss.statistics import Statistics

UPSTREAM = "upstream"
"""The field by which the gradient of a loss of every voxel is multiplied."""


class PerVoxel(NamedTuple):
    """The derivative of a loss of every voxel: k, (S, C), times its upstream gradient."""

    coefficients: np.ndarray
    upstream: Borrowed


def _pull_map(
    shape: tuple[int, ...], coefficients: np.ndarray, place: Place | None, upstream: Any
) -> PerVoxel:
    """The derivative of a map of this shape, given its upstream gradient; None: 1."""
    if upstream is None:
        one = np.broadcast_to(np.ones((), np.float32), shape)
        upstream = one if place is None else place.ones(shape, "float32")
    elif tuple(np.shape(upstream)) != shape:
        raise ValueError(
            f"upstream: expected the value's shape {shape}, got {tuple(np.shape(upstream))}"
        )
    elif place is not None and isinstance(upstream, np.ndarray):
        upstream = place.array(upstream, "float32")
    return PerVoxel(coefficients, borrow(upstream, "upstream"))


def value_and_grad(
    loss: FusedLoss,
    logits: Any,
    target: Any,
    voxel_weight: Any,
    extras: Extras | None = None,
    out: Any = None,
    upstream: Any = None,
    target_grad: bool = False,
) -> tuple[Any, ...]:
    """The value and the gradient, as `fastloss.Loss.value_and_grad` says."""
    if upstream is None and extras is None and not target_grad:
        adapter = adapter_of(logits, "logits")
        ready = adapter.prepared(loss, logits, target, voxel_weight)
        arrays = (logits, target, voxel_weight)
        if ready is not None and (
            out is None or ready[0].takes(loss, adapter, arrays, ready[1], out)
        ):
            call, addresses = ready
            value, kept = call.value(loss, addresses)
            return value, call.gradient(loss, adapter, arrays, addresses, kept, out=out)
    passes = loss.passes(logits, target, voxel_weight, extras)
    out, view = passes.output(out)
    if target_grad:
        passes.differentiate_target()
    value, pullback = passes.forward()
    coefficients = pullback(passes.upstream(upstream))
    if target_grad:  # before the logits may be overwritten
        by_target = passes.target_gradient(coefficients, target)
        passes.apply(coefficients, view)
        return passes.adapter.result(value), out, by_target
    passes.apply(coefficients, view)
    return passes.adapter.result(value), out


def fields_of(
    loss: FusedLoss,
    target: Any,
    *,
    classes: int,
    spacing: Any,
    dtype: str,
    dense: bool,
    axes: int | None,
) -> dict[str, Any]:
    """The fields of a target, as `fastloss.Loss.fields` says."""
    adapter = adapter_of(target, "target")
    view, kind, place = adapter.borrow(target, "target")
    if kind not in FLOATS and kind not in INTEGERS:
        raise TypeError(f"target: expected integers, bool or floating numbers, got {kind}")
    axis = loss.channel_axis
    arranged = partial(_arranged_target, classes=classes, dense=dense, axes=axes, channel_axis=axis)
    view = arranged(view)
    if not dense and classes == 1 and loss.activation != "softmax":
        view, dense = view[:, None], True  # the mask of a single channel
    options: dict[str, Any] = {"classes": classes, "ignore": loss.ignore_index}
    options["activation"] = loss.activation

    @cache
    def read(on_gpu: bool) -> Target:
        if on_gpu:
            return target_on_gpu(Borrowed(view, kind, place), dense, **options)
        if place is None:
            return target_of(view, kind, dense, **options)
        own = arranged(adapter.numbers(target, "target")).reshape(view.shape)
        return target_of(own, "float64", dense, **options)

    made: dict[str, Any] = {}
    for term in loss.makers.values():
        if term.makes not in made:
            on_gpu = place is not None and term.on_gpu
            found = read(on_gpu)
            own = term.make_field(found, term.spacing if spacing is None else spacing)
            own = narrowed(own, dtype)
            if axis != 1 and len(own.shape) == found.axes + 2:
                own = moved(own, 1, axis)
            made[term.makes] = own if on_gpu else adapter.wrap(own, target)
    if loss.regional is not None:
        term = loss.regional
        found = read(False)
        regions, _ = term.make_regions(found, term.spacing if spacing is None else spacing)
        if axis != 1 and regions.ndim == found.axes + 2:
            regions = moved(regions, 1, axis)
        made["regions"] = adapter.wrap(regions, target)
    return {name: made[name] for name in sorted(made)}


def _arranged_target(
    array: np.ndarray, *, classes: int, dense: bool, axes: int | None, channel_axis: int
) -> np.ndarray:
    """A target as (B, *spatial), or if ``dense`` (B, C, *spatial); ValueError if it is none."""
    shape = array.shape
    whole = axes is not None and array.ndim == axes + 2
    if dense or whole:
        if array.ndim < 2:
            raise ValueError(f"target: expected (batch, channels, *spatial), got shape {shape}")
        array = channels_second(array, channel_axis, "target") if channel_axis != 1 else array
    if dense:
        fits = array.shape[1] == classes and axes in (None, array.ndim - 2)
    else:
        array = array[:, 0] if whole and array.shape[1] == 1 else array
        fits = array.ndim > 0 and axes in (None, array.ndim - 1)
    if not fits:
        wanted = f"a dense target of {classes} channels" if dense else "a label map"
        of = "" if axes is None else f" of {axes} spatial axes"
        raise ValueError(f"target: expected {wanted}{of}, got shape {shape}")
    return array


def moved(array: Any, source: int, to: int) -> Any:
    """The array with this axis elsewhere."""
    move = getattr(array, "movedim", None)  # of tensors, where NumPy has a function
    return np.moveaxis(array, source, to) if move is None else move(source, to)


_NO_EXTRAS = Extras()


class Passes:
    """One call's arrays, and the two passes over them."""

    _made: Mapping[str, Any] = MappingProxyType({})
    """The fields that were made in this call, where there are any."""
    _for_target = False
    """Whether there is to be a gradient by the target."""
    _region_bounds = (0, 0)
    """The least and the largest number of the regions given, in the processor's memory."""
    _made_regions: Any = None
    """The regions that were made in this call, where they were."""
    more: Mapping[str, Borrowed] = MappingProxyType({})
    """Fields and regions, by what errors call them."""
    ranked: Field | None = None
    """The field that the ranking term made."""

    def __init__(
        self,
        loss: FusedLoss,
        logits: Any,
        target: Any,
        voxel_weight: Any,
        extras: Extras | None = None,
    ) -> None:
        self.loss = loss
        self.adapter = adapter_of(logits, "logits")
        self.caller_logits = logits
        self.logits = self.adapter.borrow(logits, "logits")
        self.target = borrow(target, "target")
        self.voxel_weight = None if voxel_weight is None else borrow(voxel_weight, "voxel_weight")
        places: tuple[Place | None, ...]
        places = (self.logits.place, self.target.place, self.voxel_weight and self.voxel_weight[2])
        given: dict[str, Any] = {}
        self._extras = extras or _NO_EXTRAS
        if extras is not None or loss.field_names:
            given = self._borrow(self._extras)
            places += tuple(b.place for b in self.more.values())
        # Which backend computes is a choice for arrays in CPU memory.
        self.backend: Backend
        if any(places):
            self.backend = on_device(self.logits, self.target, self.voxel_weight, **self.more)
        else:
            self.backend = current_backend()
        usual = (self.logits, self.target, self.voxel_weight, loss.activation, loss.channel_axis)
        self.arrays = arrange(*usual, **given) if given else arrange(*usual)
        self.request = loss.request(self.arrays)
        if self.request.histograms and not self.backend.counts_errors:
            self.backend = load_backend("reference")
        if loss.makers:
            self._make_fields(target)
        if loss.lacks_regions(self._extras):
            self._make_regions(target)
        elif self.arrays.regions is not None and self.backend.place is None:
            self._check_regions()

    def _borrow(self, extras: Extras) -> dict[str, Any]:
        """Borrow fields and regions: what `arrange` takes beside the usual arrays."""
        self.loss.check_field_names(extras.names)
        fields = {name: borrow(array, f"fields[{name!r}]") for name, array in extras.fields}
        more = {f"fields[{name!r}]": field for name, field in fields.items()}
        self.more = more
        if extras.regions is None:
            return {"fields": fields}
        regions = more["regions"] = borrow(extras.regions, "regions")
        rows = extras.region_count
        if rows is None and regions.place is not None:
            raise ValueError(
                "region_count: expected how many regions a sample has at most, as to look for it "
                "would wait for the GPU, got None"
            )
        array = regions.array
        if regions.place is None and array.dtype.kind in "iu" and array.size:
            self._region_bounds = current_backend().bounds(array)
        if rows is None:
            rows = max(self._region_bounds[1] + 1, 1)
        by_class = self.loss.regions_by_class
        return {"fields": fields, "regions": regions, "rows": rows, "regions_by_class": by_class}

    def _make_fields(self, target: Any) -> None:
        """Make the fields that the sums read and the caller left out.

        On a GPU they are made there, but for those of terms that are not ``on_gpu``: for these the
        target is copied to the processor's memory, and the field back.
        """
        loss, arrays, place = self.loss, self.arrays, self.backend.place
        names, given = self._extras.names, dict(self._extras.fields)
        known = dict(zip(names, arrays.fields, strict=True))
        missing = loss.lacks(names)
        there = [name for name in missing if place is not None and loss.makers[name].on_gpu]
        here = [name for name in missing if name not in there]

        def made_by(names: list[str], on_gpu: bool) -> dict[str, Any]:
            sources = {
                name: partial(self._distances, name, given[name], known[name], on_gpu)
                for name in known
                if name not in loss.field_names
            }
            own = partial(self._target_of, target, on_gpu)
            return make(loss, names, sources, own, partial(self._mask, on_gpu))

        made = made_by(there, True) if there else {}
        for name, array in made_by(here, False).items() if here else ():
            made[name] = array if place is None else place.array(array, array.dtype.name)
        for name, own in made.items():
            known[name] = as_field(borrow(own, name), arrays)
        self._made = made
        self.arrays = replace(arrays, fields=tuple(known[name] for name in loss.field_names))

    def _make_regions(self, target: Any) -> None:
        """Make the regions that a term reads and the caller left out.

        They are made in the processor's memory. On a GPU there are places for a power of 2 of them,
        as kernels are compiled for each number of rows.
        """
        term, place = self.loss.regional, self.backend.place
        made, rows = term.make_regions(self._target_of(target, False), term.spacing)
        if place is not None:
            made, rows = place.array(made, made.dtype.name), max(8, 1 << (rows - 1).bit_length())
        view = borrow(made, "regions")
        self._made_regions = made
        self.arrays = replace(self.arrays, regions=view.array, regions_dtype=view.dtype, rows=rows)

    def _distances(self, name: str, given: Any, field: Field, on_gpu: bool) -> Any:
        """A field that the caller gave and another is derived from."""
        (array, dtype, kind), place = field, self.backend.place
        classes = self.arrays.logits.shape[1]
        if on_gpu:
            return distances_on_gpu(name, given, Borrowed(array, dtype, place), kind, classes)
        if place is not None:
            array, dtype = self._fetch(given, array), "float64"
        return distances_of(name, array, dtype, kind, classes)

    def _target_of(self, target: Any, on_gpu: bool) -> Target:
        loss, arrays, place = self.loss, self.arrays, self.backend.place
        array, dtype = arrays.target, arrays.target_dtype
        options: dict[str, Any] = {
            "classes": arrays.logits.shape[1],
            "ignore": loss.ignore_index,
            "activation": loss.activation,
        }
        if on_gpu:
            return target_on_gpu(Borrowed(array, dtype, place), arrays.dense, **options)
        if place is not None:
            array, dtype = self._fetch(target, array), "float64"
        return target_of(array, dtype, arrays.dense, **options)

    def _fetch(self, array: Any, like: np.ndarray) -> np.ndarray:
        """A copy of a caller's array on a GPU, in the shape in which the kernels take it."""
        own = adapter_of(array, "array").numbers(array, "array")
        axis = self.loss.channel_axis
        if axis != 1 and own.ndim == self.arrays.logits.ndim:
            own = channels_second(own, axis, "array")
        return own.reshape(like.shape)

    def _mask(self, on_gpu: bool) -> Any:
        """Where p > ½, (B, C, *spatial) of bool; ``on_gpu``: of uint8, there."""
        (batch, classes), spatial = self.arrays.logits.shape[:2], self.arrays.logits.shape[2:]
        whole = self.request
        request = make_request(whole.activation, whole.dense, whole.ignore_index, frozenset())
        out = self.backend.empty((batch, classes, prod(spatial)), np.dtype(np.uint8))
        view = borrow(out, "out").array
        self.backend.write_map(request, replace(self.arrays, fields=()), Map("mask", view))
        if on_gpu:
            return out.reshape(batch, classes, *spatial)
        own: np.ndarray = out if self.backend.place is None else self.backend.place.numpy(out)
        return own.view(np.bool_).reshape(batch, classes, *spatial)

    @property
    def whole_extras(self) -> Extras:
        """Regions, and all fields that the sums read: the caller's, and those that were made."""
        extras = self._extras
        axis = self.loss.channel_axis

        def as_given(array: Any) -> Any:
            if axis != 1 and len(array.shape) == self.arrays.logits.ndim:
                array = moved(array, 1, axis)
            return self.adapter.result(array)

        if self._made_regions is not None:
            regions = as_given(self._made_regions)
            extras = extras._replace(regions=regions, region_count=self.arrays.rows)
        if not self._made:
            return extras
        known = dict(self._extras.fields)
        for name, array in self._made.items():
            known[name] = as_given(array)
        fields = tuple((name, known[name]) for name in self.loss.field_names)
        return extras._replace(fields=fields)

    def _check_regions(self) -> None:
        """Raise ValueError for numbers that are no region."""
        (least, most), rows = self._region_bounds, self.arrays.rows
        if least < -1 or most >= rows:
            wrong = least if least < -1 else most
            raise ValueError(f"regions: expected numbers in [-1, {rows}), got {wrong}")

    def _check_holes(self, voxels: np.ndarray) -> None:
        """Raise ValueError for a number without voxels below another one of the same sample."""
        regions, rows = self.arrays.regions, self.arrays.rows
        assert regions is not None
        for b, of_sample in enumerate(voxels.reshape(-1, rows)):
            if of_sample.all() or not regions.size:
                continue
            present = np.zeros(rows + 1, bool)
            present[regions[b]] = True  # -1 is behind all
            count = int(np.flatnonzero(present[:-1])[-1]) + 1 if present[:-1].any() else 0
            if not present[:count].all():
                hole = int(np.flatnonzero(~present[:count])[0])
                raise ValueError(
                    f"regions: expected voxels of every region in [0, {count}), but sample {b} has "
                    f"none of region {hole}"
                )

    def reduce(self, whole: bool = True) -> Statistics:
        """The sums; not ``whole``: of a chunk, which may lack regions."""
        statistics, self.ranked = self.backend.statistics(self.loss, self.request, self.arrays)
        numbered = self.arrays.regions is not None and self.backend.place is None
        if whole and numbered and self.loss.regional is None:
            self._check_holes(statistics.voxels)
        return statistics

    def forward(self) -> tuple[Any, Callable[[Any], Any]]:
        """The value of these arrays, and from its upstream gradient what `apply` takes."""
        return self._map() if self.loss.maps_voxels else self.combine(self.reduce())

    def upstream(self, gradient: Any) -> Any:
        """The upstream gradient, as the pullback takes it."""
        return gradient if self.loss.maps_voxels else self.adapter.upstream(gradient)

    def _map(self) -> tuple[Any, Callable[[Any], PerVoxel]]:
        """The loss of every voxel."""
        loss, request, arrays = self.loss, self.request, self.arrays
        batch, classes, *spatial = arrays.logits.shape
        coefficients = self._map_coefficients()
        by_class = request.activation == "sigmoid"
        shape = (batch, *[classes] * by_class, *spatial)
        flat = (*shape[: 1 + by_class], prod(spatial))
        out = self.backend.empty(flat, arrays.value_dtype)
        view = borrow(out, "out").array
        voxel_map = Map("class" if by_class else "voxel", view, coefficients)
        if loss.validate:
            self.backend.check(request, arrays)
        self.backend.write_map(request, arrays, voxel_map)
        value = out.reshape(shape)
        if by_class and loss.channel_axis != 1:
            value = moved(value, 1, loss.channel_axis)
        pull = partial(_pull_map, tuple(value.shape), coefficients, self.backend.place)
        return value, pull

    def pull_map(self, upstream: Any) -> PerVoxel:
        """For `apply`, of a loss of every voxel."""
        place, shape = self.backend.place, tuple(upstream.shape)
        return _pull_map(shape, self._map_coefficients(), place, upstream)

    def _map_coefficients(self) -> np.ndarray:
        loss = self.backend.with_numbers(self.loss)
        return loss.map_coefficients(self.request, self.arrays.logits.shape[1])

    @property
    def rows(self) -> int:
        """The number of rows of the statistics."""
        return int(self.arrays.logits.shape[0] * self.arrays.rows)

    def _apply_per_voxel(self, by: PerVoxel, out: np.ndarray) -> None:
        """The gradient of the loss of every voxel: the upstream gradient is one more field."""
        self.backend.apply(*self._of_every_voxel(by), out)

    def _of_every_voxel(self, by: PerVoxel) -> tuple[Request, Arrays, np.ndarray]:
        """What `Backend.apply` takes for a loss of every voxel."""
        loss, arrays = self.loss, self.arrays
        upstream = by.upstream.array
        by_class = self.request.activation == "sigmoid"
        if by_class and loss.channel_axis != 1:
            upstream = channels_second(upstream, loss.channel_axis, "upstream")
        whole = self.request
        weighted = {s: s._replace(field=UPSTREAM) for s in whole.sums}
        request = make_request(
            whole.activation, whole.dense, whole.ignore_index, frozenset(weighted.values())
        )
        rows, classes = arrays.logits.shape[0] * arrays.rows, arrays.logits.shape[1]
        coefficients = np.zeros((len(request.sums), rows, classes))
        for s, k in zip(whole.sums, by.coefficients, strict=True):
            coefficients[request.index[weighted[s]]] = k
        field = Field(upstream, by.upstream.dtype, "class" if by_class else "voxel")
        return request, replace(arrays, fields=(field,)), coefficients

    def combine(self, statistics: Statistics) -> tuple[Any, Callable[[Any], Any]]:
        """The value, and from its upstream gradient what `apply` takes."""
        if self._for_target:
            statistics = replace(statistics, for_target=True)
        return self.backend.combine(self.loss, statistics)

    def differentiate_target(self) -> None:
        """Have the results of the pullback fit for `target_gradient`.

        Raises:
            ValueError: there is no gradient by such a target.
        """
        arrays = self.arrays
        ranked = self.loss.counting or self.loss.ranking
        if ranked is not None:
            raise ValueError(
                f"target: {type(ranked).__name__} chooses or ranks voxels, and has no gradient by "
                "the target; pass target.detach()"
            )
        if not arrays.dense or arrays.target_dtype not in FLOATS:
            raise ValueError(
                "target: expected a dense target of floating numbers, by which there is a "
                f"gradient, got {arrays.target_dtype} of shape {self.target.array.shape}"
            )
        self._for_target = True

    def target_gradient(self, coefficients: Any, target: Any) -> Any:
        """The gradient by the target, in its shape and dtype, given what `apply` takes."""
        request, arrays = self.request, self.arrays
        if isinstance(coefficients, PerVoxel):
            request, arrays, coefficients = self._of_every_voxel(coefficients)
        batch, classes, *spatial = arrays.logits.shape
        found = self.backend.empty((batch, classes, prod(spatial)), arrays.value_dtype)
        self.backend.apply_target(request, arrays, coefficients, borrow(found, "target").array)
        whole = found.reshape(arrays.logits.shape)
        if self.loss.channel_axis != 1 and self.target.array.ndim == arrays.logits.ndim:
            whole = moved(whole, 1, self.loss.channel_axis)
        whole = whole.reshape(self.target.array.shape)
        adapter, place, dtype = adapter_of(target, "target"), self.backend.place, self.target.dtype
        if place is not None:
            same = dtype in ("bfloat16", arrays.value_dtype.name)
            return adapter.result(whole if same else place.array(whole, dtype))
        if dtype != "bfloat16":  # which NumPy lacks
            whole = whole.astype(dtype, copy=False)
        return adapter.wrap(whole, target)

    def output(self, out: Any) -> tuple[Any, Borrowed]:
        """The array that takes the gradient, as the caller sees it, and its view."""
        if out is None:
            return self.adapter.empty_like(self.caller_logits, self.logits)
        return out, self.borrow_output(out, write=True)

    def borrow_output(self, out: Any, *, write: bool = False) -> Borrowed:
        """The view of an array that can take the gradient."""
        view = borrow(out, "out", write=write)
        if self.backend.place is not None or view.place is not None:
            on_device(self.logits, None, None, view)
        self.check_output(view)
        return view

    def gradient_view(self, out: Borrowed) -> np.ndarray:
        """The gradient's array with the channel axis where kernels look for it."""
        axis = self.loss.channel_axis
        return out.array if axis == 1 else channels_second(out.array, axis, "out")

    def check_output(self, view: Borrowed) -> None:
        """Raise ValueError or TypeError if the gradient cannot be written here."""
        others = [("target", self.target)]
        if self.voxel_weight is not None:
            others.append(("voxel_weight", self.voxel_weight))
        others += self.more.items()
        check_out(view, self.logits, others)

    def apply(self, coefficients: Any, out: Borrowed) -> None:
        """Write the gradient, given what `combine` returns for the upstream gradient."""
        view = self.gradient_view(out)
        if isinstance(coefficients, PerVoxel):
            self._apply_per_voxel(coefficients, view)
            return
        arrays, term = self.arrays, self.loss.ranking
        if term is not None:
            if self.ranked is None:
                self.reduce(whole=False)  # in another call than the first
            assert self.ranked is not None
            arrays = with_ranked(self.request, arrays, term, self.ranked)
        self.backend.gradient(self.request, arrays, coefficients, view)


def on_device(logits: Borrowed, *others: Borrowed | None, **more: Borrowed) -> Backend:
    """For arrays on a GPU. ValueError, naming the argument, if they do not all lie there."""
    from fastloss.backends.cuda.backend import CudaBackend, check_places

    check_places(logits, *others, **more)
    assert logits.place is not None
    return CudaBackend(logits.place)
