"""Kinds of calls of the CUDA passes, and the kernels that they compile.

The arrays have the shapes and strides of a real call and are never read: a recording device
replaces the GPU, so the kernels are those that `fastloss.backends.cuda.engine` requests.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

import fastloss as fl
from fastloss.arrays import Arrays, Field
from fastloss.backends.cuda import engine
from fastloss.backends.cuda.by_target import KERNELS as TARGET_KERNELS
from fastloss.backends.cuda.call import GENERAL, NO_TYPE
from fastloss.backends.cuda.combine.program import trace
from fastloss.backends.cuda.copies import KERNELS as COPY_KERNELS
from fastloss.backends.cuda.distance import KERNELS as DISTANCE_KERNELS
from fastloss.backends.cuda.fields import BOUNDARY_KERNELS, POWER_KERNELS
from fastloss.backends.cuda.histograms import KERNELS as HISTOGRAM_KERNELS
from fastloss.backends.cuda.indices import KERNELS as INDEX_KERNELS
from fastloss.backends.cuda.lovasz import KERNELS as LOVASZ_KERNELS
from fastloss.backends.cuda.metrics import CONFUSION_KERNELS, READ_KERNELS
from fastloss.backends.cuda.source import PASSES, source, specialised
from fastloss.backends.cuda.surfaces import KERNELS as SURFACE_KERNELS
from fastloss.backends.cuda.top_k import KERNELS as TOP_K_KERNELS
from fastloss.maps import Map
from fastloss.request import ACTIVATIONS, Request, make_request
from fastloss.sums import CROSS_ENTROPY, Sum

BATCH = 2
LOSSES: dict[str, Any] = {
    "dice+ce": lambda: fl.Dice() + fl.CrossEntropy(),
    "squared+smooth": lambda: fl.Dice(squared=True) + fl.CrossEntropy(label_smoothing=0.1),
    "focal2+dice": lambda: fl.Focal(gamma=2.0) + fl.Dice(),
    "focal1.5": lambda: fl.Loss(fl.Focal(gamma=1.5)),
    "tversky": lambda: fl.Loss(fl.Tversky(alpha=0.3, beta=0.7)),
    "ce": lambda: fl.Loss(fl.CrossEntropy()),
    "top_k": lambda: fl.Dice() + fl.TopKCrossEntropy(),
}
FACTORS: dict[str, tuple[Any, ...]] = {
    "kernel": ("reduce", "apply"),
    "logits": ("float32", "float16", "bfloat16", "float64"),
    # "odd": a number of voxels that no vector length divides. "strided": axes that do not merge.
    # "large": these, and more voxels than 32 bits count. "last": channels last.
    "layout": ("contiguous", "last", "strided", "odd", "last odd", "large"),
    "classes": (1, 2, 3, 4, 8, 14, 16, 20, 33, 64, 105, 200, 300),
    "activation": ACTIVATIONS,
    "target": ("uint8", "int64", "dense float32", "dense uint8"),
    "terms": tuple(LOSSES),
    "weight": ("", "float32", "uint8"),
    "ignore": (None, 255, 0),
    "upstream": (NO_TYPE, engine.FLOAT32),
}  # fmt: skip


class Kind(NamedTuple):
    """A kind of call: one value of each of FACTORS, in their order."""

    kernel: str
    logits: str
    layout: str
    classes: int
    activation: str
    target: str
    terms: str
    weight: str = ""
    ignore: int | None = None
    upstream: int = NO_TYPE

    def __str__(self) -> str:
        words = [self.kernel, self.logits, f"C{self.classes}", self.layout, self.activation]
        words += [self.target, self.terms]
        words += [f"weight:{self.weight}"] * bool(self.weight)
        words += [f"ignore:{self.ignore}"] * (self.ignore is not None)
        words += ["upstream"] * (self.upstream != NO_TYPE)
        return " ".join(words)


@dataclass(frozen=True)
class Compiled:
    """The kernels that a call compiles and launches."""

    kind: Kind | GeneralKind
    constants: tuple[tuple[str, object], ...]
    text: str
    names: tuple[str, ...]
    threads: int
    """Threads per block of the first kernel."""
    shared: int
    """Bytes of dynamic shared memory of the first kernel."""

    def constant(self, name: str) -> Any:
        return dict(self.constants)[name]


def possible(kind: Kind) -> bool:
    """Whether such calls exist."""
    if kind.kernel == "reduce" and kind.upstream != NO_TYPE:
        return False
    dense = kind.target.startswith("dense")
    return kind.terms != "top_k" or (kind.activation == "softmax" and not dense)


def curated() -> list[Kind]:
    """The most common calls; and classes that fill shared memory with sums or coefficients."""
    most = [
        Kind(kernel, logits, layout, classes, "softmax", "uint8", "dice+ce")
        for classes in (2, 4, 14, 105)
        for logits, layout in (
            ("float32", "contiguous"),
            ("float16", "contiguous"),
            ("bfloat16", "last"),
        )
        for kernel in ("reduce", "apply")
    ]
    many = [
        Kind(kernel, "float32", "contiguous", 1500, activation, target, "squared+smooth")
        for kernel in ("reduce", "apply")
        for activation, target in (("softmax", "uint8"), ("sigmoid", "dense uint8"))
    ]
    # Numbers that take two registers each.
    wide = [
        Kind("reduce", "float64", "contiguous", 200, "softmax", "uint8", "dice+ce"),
        Kind("reduce", "float64", "last", 150, "softmax", "uint8", "tversky", "uint8", 0),
        Kind("reduce", "float64", "strided", 150, "sigmoid", "dense float32", "tversky", "uint8"),
        Kind("reduce", "float64", "odd", 20, "softmax", "uint8", "top_k", "", 255),
        Kind("apply", "float64", "odd", 200, "softmax", "dense float32", "focal1.5", "float32"),
        Kind("apply", "float64", "large", 16, "softmax", "int64", "squared+smooth", "", 255),
    ]
    # Much data per voxel beside its logits.
    beside = [
        Kind(
            "reduce",
            "bfloat16",
            "contiguous",
            200,
            "softmax",
            "int64",
            "squared+smooth",
            "float32",
            0,
        ),
        Kind("apply", "float16", "contiguous", 14, "softmax", "int64", "top_k", "float32", 0),
    ]
    return most + many + wide + beside


def at_random(count: int, seed: int) -> list[Kind]:
    """This many random kinds."""
    generator = random.Random(seed)
    return [_random_kind(generator, _ANY) for _ in range(count)]


@cache
def kinds() -> tuple[Kind, ...]:
    """The most common calls, then kinds that cover every pair of values of two factors."""
    chosen = curated()
    left = set(_pairs_of_all()) - {pair for kind in chosen for pair in pairs(kind)}
    generator = random.Random(0)
    while left:
        first = min(left, key=repr)
        candidates = (_random_kind(generator, first) for _ in range(60))
        best = max(candidates, key=lambda kind: len(left.intersection(pairs(kind))))
        chosen.append(best)
        left.difference_update(pairs(best))
    return tuple(chosen)


def covering(start: int) -> list[Kind]:
    """Some of `kinds`, from the ``start``-th on, that cover every value of every factor."""
    order = kinds()[start:] + kinds()[:start]
    left = {value for kind in order for value in zip(FACTORS, kind, strict=True)}
    chosen = []
    while left:
        best = max(order, key=lambda kind: len(left.intersection(zip(FACTORS, kind, strict=True))))
        chosen.append(best)
        left.difference_update(zip(FACTORS, best, strict=True))
    return chosen


Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairs(kind: Kind) -> Iterator[Pair]:
    """Any two fields with their values."""
    return combinations(zip(FACTORS, kind, strict=True), 2)


def _pairs_of_all() -> Iterator[Pair]:
    """The pairs that occur in some possible kind of call."""
    simple = {"kernel": "apply", "activation": "softmax", "target": "uint8", "terms": "ce"}
    for (a, of_a), (b, of_b) in combinations(FACTORS.items(), 2):
        for x in of_a:
            for y in of_b:
                rest = {name: values[0] for name, values in FACTORS.items()} | simple
                if possible(Kind(**{**rest, a: x, b: y})):
                    yield (a, x), (b, y)


_ANY: Any = ()


def _random_kind(generator: random.Random, pair: Pair) -> Kind:
    while True:
        values = {name: generator.choice(values) for name, values in FACTORS.items()}
        kind = Kind(**{**values, **dict(pair)})
        if possible(kind):
            return kind


class _Address(NamedTuple):
    address: int


class _Recorder:
    """A device that records its compilations and launches."""

    shared_bytes = 48 << 10
    multiprocessors = 132

    def __init__(self) -> None:
        self.passes_asked: list[tuple[tuple[tuple[str, object], ...], str]] = []
        self.launches: list[tuple[tuple[int, int], int]] = []

    def empty(self, nbytes: int) -> _Address:
        return _Address(1 << 20)

    def constant(self, numbers: np.ndarray) -> _Address:
        return _Address(1 << 20)

    upload = constant

    def passes(self, constants: tuple[tuple[str, object], ...], kernel: str) -> tuple[Any, ...]:
        self.passes_asked.append((constants, kernel))
        return (None,) * len(PASSES[kernel])

    def kernels(self, text: str, names: tuple[str, ...]) -> tuple[Any, ...]:
        assert names == HISTOGRAM_KERNELS, "a pass launches no kernels but its own"
        return names

    def launch(
        self, kernel: Any, grid: int, block: tuple[int, int], shared: int, call: np.ndarray
    ) -> None:
        if kernel not in HISTOGRAM_KERNELS:
            self.launches.append((block, shared))


def compiled(kind: Kind) -> Compiled:
    """The kernels that a call of this kind asks for."""
    loss = fl.Loss(LOSSES[kind.terms](), activation=kind.activation)
    *dense_word, target_dtype = kind.target.split()
    dense = bool(dense_word) or (kind.classes == 1 and kind.activation != "softmax")
    request = make_request(kind.activation, dense, kind.ignore, loss.needs)
    shape = (BATCH, kind.classes, *_spatial(kind.layout))
    logits, out = (_array(shape, kind.logits, kind.layout) for _ in range(2))
    flat = (shape[0], *shape[2:])
    target = _array(shape if dense else flat, target_dtype, kind.layout)
    weight = _array(flat, kind.weight, kind.layout) if kind.weight else None
    arrays = Arrays(logits, kind.logits, target, target_dtype, dense, weight, kind.weight)
    device = _Recorder()
    voxel_map, ranked = None, ""
    if loss.ranking is not None:
        ranked = "top_k"
        voxels = _array((BATCH, prod(shape[2:])), arrays.value_dtype.name, "contiguous")
        coefficients = np.zeros((len(request.sums), kind.classes))
        coefficients[request.index[CROSS_ENTROPY]] = 1
        voxel_map = Map("voxel", voxels, coefficients)
        if kind.kernel == "apply":
            field = _array(flat, arrays.value_dtype.name, "contiguous")
            fields = (Field(field, arrays.value_dtype.name, "voxel"),)
            arrays = replace(arrays, fields=fields)
    if kind.kernel == "reduce":
        engine.reduce(device, request, arrays, 1, 1, voxel_map, ranked)
    else:
        _apply(device, request, arrays, out, kind.upstream)
    return _asked(kind, device)


def _apply(
    device: _Recorder, request: Request, arrays: Arrays, out: np.ndarray, upstream: int = NO_TYPE
) -> None:
    steps = {"slot_stride": 1, "row_stride": 1}
    engine.apply(device, request, arrays, 1, out, upstream=1, upstream_type=upstream, **steps)


def _asked(kind: Kind | GeneralKind, device: _Recorder) -> Compiled:
    ((constants, kernel),) = (asked for asked in device.passes_asked if asked[1] == kind.kernel)
    ((x, y), shared), *_ = device.launches
    text = specialised(constants, kernel)
    return Compiled(kind, constants, text, PASSES[kernel], x * y, shared)


class GeneralKind(NamedTuple):
    """A call of the general kernel."""

    kernel: str
    logits: str
    layout: str
    classes: int
    activation: str
    target: str
    needs: tuple[Any, ...]
    fields: tuple[str, ...] = ()
    """The kinds of the fields, in the order of their names."""
    regions: bool = False
    map_kind: str = ""
    """The kind of the map, or of the one that the reduce pass writes."""
    weight: str = ""

    def __str__(self) -> str:
        words = [self.kernel, self.logits, f"C{self.classes}", self.layout, self.activation]
        words += [self.target, *map(str, self.needs), *self.fields, "regions" * self.regions]
        return " ".join(filter(None, [*words, self.map_kind]))


def general_kinds() -> list[GeneralKind]:
    """Common tables that no fast path takes."""
    boundary = Sum("one", "p", field="phi")
    weighted = Sum("target", "log", field="weight")
    unusual = (Sum("one", "log_rest"), Sum("target", "focal", 1.5), Sum("rest", "focal_rest", 0.5))
    tables: list[tuple[Any, ...]] = [
        # activation, target, classes, needs, kinds of fields, regions, map
        ("sigmoid", "dense float32", 3, ("region", "cross_entropy"), (), True, ""),
        ("softmax", "uint8", 14, ("region", "cross_entropy", boundary), ("class",), False, ""),
        ("softmax", "uint8", 3, ("region", "cross_entropy"), (), True, ""),
        ("softmax", "int64", 105, ("region", weighted), ("voxel",), False, "voxel"),
        ("softmax", "dense float32", 4, unusual, (), False, ""),
        ("none", "dense uint8", 2, ("squared", boundary), ("labels",), True, ""),
    ]
    kinds = [
        GeneralKind(kernel, logits, layout, c, activation, target, needs, fields, regions, of_map)
        for activation, target, c, needs, fields, regions, of_map in tables
        for logits, layout in (("float32", "contiguous"), ("float16", "last"))
        for kernel in ("reduce", "apply")
    ]
    maps = [
        GeneralKind("map", "float32", "contiguous", c, activation, "uint8", needs, map_kind=kind)
        for kind, activation, c, needs in (
            ("voxel", "softmax", 14, ("cross_entropy", "uniform")),
            ("class", "sigmoid", 3, ("focal:2.0",)),
            ("error", "softmax", 14, ()),
            ("label", "softmax", 14, ()),
            ("target", "softmax", 14, ("cross_entropy", "divergence")),
        )
    ]
    odd = [
        GeneralKind("reduce", "float64", "strided", 9, "softmax", "uint8", (boundary,), ("class",)),
        GeneralKind("apply", "float64", "strided", 9, "softmax", "uint8", (boundary,), ("class",)),
        GeneralKind("apply", "bfloat16", "large", 2, "softmax", "uint8", unusual, (), True),
    ]
    counted = [
        GeneralKind(kernel, "float32", "contiguous", c, activation, target, needs, weight=weight)
        for kernel in ("reduce", "apply", "largest")
        for activation, target, c, needs, weight in (
            ("softmax", "uint8", 14, ("region", "cross_entropy", "errors"), ""),
            ("sigmoid", "dense uint8", 3, ("region", "uniform", "errors", "hinge"), "float32"),
        )
        if weight or kernel != "largest"
    ]
    return kinds + maps + odd + counted


def compiled_general(kind: GeneralKind) -> Compiled:
    """The kernels that a call of this kind asks for."""
    *dense_word, target_dtype = kind.target.split()
    dense = bool(dense_word) or (kind.classes == 1 and kind.activation != "softmax")
    request = Request(kind.activation, dense, None, frozenset(kind.needs))
    shape = (BATCH, kind.classes, *_spatial(kind.layout))
    flat = (shape[0], *shape[2:])
    logits, out = (_array(shape, kind.logits, kind.layout) for _ in range(2))
    fields = tuple(
        Field(_array(shape, "float32", kind.layout), "float32", of_kind)
        if of_kind == "class"
        else Field(_array(flat, "int16", kind.layout), "int16", of_kind)
        for of_kind in kind.fields
    )
    arrays = Arrays(
        logits,
        kind.logits,
        _array(shape if dense else flat, target_dtype, kind.layout),
        target_dtype,
        dense,
        _array(flat, kind.weight, kind.layout) if kind.weight else None,
        kind.weight,
        fields,
        _array(flat, "int32", kind.layout) if kind.regions else None,
        "int32" if kind.regions else "",
        5 if kind.regions else 1,
    )
    device = _Recorder()
    voxel_map = None
    if kind.map_kind:
        of_map = (BATCH, prod(shape[2:]))
        if kind.map_kind in ("class", "error", "target"):
            of_map = (BATCH, kind.classes, prod(shape[2:]))
        dtype = "uint8" if kind.map_kind == "label" else arrays.value_dtype.name
        coefficients = np.ones((len(request.sums), kind.classes))
        voxel_map = Map(kind.map_kind, _array(of_map, dtype, "contiguous"), coefficients)
    if kind.kernel in ("reduce", "largest"):
        engine.reduce(device, request, arrays, 1, 1, voxel_map)
    elif kind.map_kind == "target":
        assert voxel_map is not None
        steps = {"slot_stride": 1, "row_stride": 1}
        engine.write_map_by_rows(device, request, arrays, 1, voxel_map.out, **steps)
    elif kind.kernel == "map":
        assert voxel_map is not None
        engine.write_map(device, request, arrays, voxel_map)
    else:
        _apply(device, request, arrays, out)
    made = _asked(kind, device)
    assert made.constant("path") == GENERAL, f"{kind}: a fast path"
    return made


def _spatial(layout: str) -> tuple[int, int, int]:
    if layout == "large":
        return (2048, 1024, 1024)
    return (5, 7, 9) if "odd" in layout else (8, 8, 16)


def _array(shape: tuple[int, ...], dtype: str, layout: str) -> np.ndarray:
    """An array (B, C, *spatial) or (B, *spatial) without memory, which must not be read."""
    kind = np.dtype(dtype if dtype != "bfloat16" else np.uint16)
    order = list(range(len(shape)))
    if layout.startswith("last") and len(shape) == 5:
        order = [0, 2, 3, 4, 1]
    apart = 2 if layout in ("strided", "large") else 1  # no two spatial axes merge
    strides = [0] * len(shape)
    step = kind.itemsize
    for axis in reversed(order):
        strides[axis] = apart * step
        step = strides[axis] * shape[axis]
    buffer = np.empty(512, np.uint8)
    start = -buffer.ctypes.data % 256  # aligned as by GPU allocators
    return as_strided(buffer[start : start + kind.itemsize].view(kind), shape, strides)


def other_kernels() -> dict[str, tuple[str, tuple[str, ...]]]:
    """By name, the text and the kernels of the other sources."""
    found = {
        "copy": (source("copy.cu"), COPY_KERNELS),
        "top k": (source("top_k.cu"), TOP_K_KERNELS),
        "distance": (source("distance.cu"), DISTANCE_KERNELS),
        "class indices": (source("class_indices.cu"), INDEX_KERNELS),
        "powers": (source("powers.cu"), POWER_KERNELS),
        "boundary voxels": (source("boundary_voxels.cu"), BOUNDARY_KERNELS),
        "metrics": (source("metrics.cu"), READ_KERNELS),
        "confusion": (source("confusion.cu"), CONFUSION_KERNELS),
        "surface": (source("surface.cu"), SURFACE_KERNELS),
        "histograms": (source("histograms.cu"), HISTOGRAM_KERNELS),
        "by target": (source("by_target.cu"), TARGET_KERNELS),
        "Lovász": (source("lovasz.cu"), LOVASZ_KERNELS),
    }
    losses = {
        "dice+ce": (fl.Dice() + fl.CrossEntropy(), 2, 14),
        "generalised dice, batch": (fl.Loss(fl.GeneralizedDice(batch=True)), 4, 105),
        "focal tversky": (fl.Tversky(gamma=0.75) + fl.Focal(), 2, 4),
        "of every sample": (fl.Loss(fl.Dice(reduction="none")), 2, 8),
    }
    for name, (loss, batch, classes) in losses.items():
        request = make_request(loss.activation, False, None, loss.needs)
        program = trace(loss, request, batch, classes, np.dtype(np.float32))
        names = ("fastloss_combine",) + ("fastloss_pullback",) * bool(program.value_shape)
        found[f"combine {name}"] = (program.sources, names)
    return found
