"""Small calls of the CUDA kernels, run on the CPU under the compiler's sanitizers.

`test_cuda_sanitizers` calls `main` in a process that has the sanitizer. Every call is compared with
the reference backend; arrays own no memory beyond their numbers, so that AddressSanitizer detects
any access outside.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterable
from ctypes import c_int
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import combinations
from typing import Any

import numpy as np
from cuda_emulation import Library
from device_backend import STRUCTS_OF_OTHERS, Allocated, EmulatedDevice

from fastloss.arrays import Arrays, Field
from fastloss.backends.cuda import call as cuda_call
from fastloss.backends.cuda import engine, top_k
from fastloss.backends.cuda.source import PASSES, source
from fastloss.backends.reference import BACKEND as REFERENCE
from fastloss.maps import Map
from fastloss.request import Request
from fastloss.sums import CROSS_ENTROPY, Sum
from fastloss.terms import TopKCrossEntropy

TOP_K = TopKCrossEntropy(k=30)
FILES = ("passes.cu", "general.cu", "top_k.cu")
NEEDS = {
    "all": ("region", "squared", "cross_entropy", "uniform", "focal:2.0", "focal:1.5"),
    "region": ("region", "cross_entropy"),
    "squared": ("squared", "cross_entropy"),
    "smooth": ("cross_entropy", "uniform"),
    "focal": ("focal:2.0", "focal:1.5", "region", "cross_entropy"),
    "top_k": ("cross_entropy", TOP_K.ranking, "region"),
    "unusual": ("region", Sum("one", "log_rest"), Sum("rest", "focal_rest", 0.5)),
}
OF_FIELDS = (Sum("one", "p", field="a"), Sum("target", "log", field="b"))
EXTRAS: dict[str, tuple[tuple[str, ...], int]] = {
    "": ((), 0),
    "a field of classes": (("class",), 0),
    "two fields": (("voxel", "labels"), 0),
    "3 regions": ((), 3),
    "40 regions": (("voxel",), 40),
}
"""The kinds of the fields, and how many regions a sample has."""
FACTORS: dict[str, tuple[Any, ...]] = {
    "logits": cuda_call.TYPES[:4],
    "classes": (1, 2, 3, 4, 5, 14, 16, 17, 33, 40, 105, 300),
    # "cropped": axes that do not merge. "shifted": one number after an aligned address.
    "layout": ("contiguous", "channels last", "cropped", "reversed", "shifted", "in place"),
    "target": (
        "softmax uint8",
        "softmax int64",
        "softmax float32",
        "softmax dense float32",
        "softmax dense uint8",
        "sigmoid int16",
        "sigmoid dense bfloat16",
        "none dense float16",
    ),
    "spatial": ((1,), (7,), (3, 11), (8, 16), (257,), (19, 27)),
    "needs": tuple(NEEDS),
    "weight": ("", "float32", "uint8", "one a row"),
    "ignore": (None, 0, 255),
    "blocks": (1, 2, 1536),
    "extras": tuple(EXTRAS),
    "map_kind": ("", "voxel", "class", "error", "label", "mask"),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A call of both passes; a value of each of FACTORS."""

    logits: str = "float32"
    classes: int = 3
    layout: str = "contiguous"
    target: str = "softmax uint8"
    spatial: tuple[int, ...] = (257,)
    needs: str = "all"
    weight: str = ""
    ignore: int | None = None
    blocks: int = 1536
    """The most blocks of a launch: with few of them, a block has several tiles."""
    batch: int = 2
    extras: str = ""
    map_kind: str = ""
    """The kind of a map that is also written; "voxel" in the reduce pass."""

    @property
    def activation(self) -> str:
        return self.target.split()[0]

    @property
    def dense(self) -> bool:
        # A mask of one channel is that channel's own target.
        return "dense" in self.target or (self.classes == 1 and self.activation != "softmax")

    def __str__(self) -> str:
        words = [self.logits, f"C{self.classes}", self.layout, self.target]
        words += ["x".join(map(str, self.spatial)), self.needs, f"{self.blocks} blocks"]
        words += [f"weight {self.weight}"] * bool(self.weight)
        words += [f"ignore {self.ignore}"] * (self.ignore is not None)
        words += [self.extras] * bool(self.extras)
        words += [f"map of {self.map_kind}"] * bool(self.map_kind)
        return ", ".join(words)


def possible(case: Case) -> bool:
    """Whether the case is valid, and not too slow."""
    if case.classes == 1 and case.activation == "softmax" and "dense" in case.target:
        return False  # taken for a label map
    if case.needs == "top_k" and (case.activation != "softmax" or case.dense):
        return False
    if case.classes == 1 and "two" in case.extras:  # a field of labels is of several classes
        return False
    if case.needs == "unusual" and case.activation == "softmax" and case.classes == 1:
        return False  # −log(1−p) is infinite
    return case.classes * np.prod(case.spatial) <= 300 * 33


def covering() -> list[Case]:
    """Cases that cover every possible pair of values of two factors."""
    generator = random.Random(0)
    pool = [
        Case(**{name: generator.choice(values) for name, values in FACTORS.items()})
        for _ in range(4000)
    ]
    pool = [case for case in pool if possible(case)]
    left = {pair for case in pool for pair in _pairs(case)}
    chosen = []
    while left:
        chosen.append(max(pool, key=lambda case: len(left.intersection(_pairs(case)))))
        left.difference_update(_pairs(chosen[-1]))
    return chosen


@cache
def _pairs(case: Case) -> frozenset[tuple[Any, ...]]:
    return frozenset(combinations(((name, repr(getattr(case, name))) for name in FACTORS), 2))


# --- The sources, with injected faults ------------------------------------------------------------

# Replacements in the sources that inject a fault: CHOSEN is the condition that it is selected.
FAULTS: dict[str, tuple[tuple[str, str], ...]] = {
    "exchange has one half": (
        ("(group * 2 + turn)", "(group * 2 + (CHOSEN ? 0 : turn))"),
        ("(group * 2 + (1 - turn))", "(group * 2 + (CHOSEN ? 0 : 1 - turn))"),
    ),
    "warps take no turns": (
        ("return (label + tile) % CONST(warps)", "return CHOSEN || (label + tile) % CONST(warps)"),
    ),
    "every lane adds": (
        ("if (block.lane == 0 && block.exists", "if ((CHOSEN || block.lane == 0) && block.exists"),
    ),
    "the label's logit comes late": (
        (
            "} else {\n    block.load_own(v, own);",
            "} else if (!(CHOSEN)) {\n    block.load_own(v, own);",
        ),
        (
            "rescale(factor[j], part[j].largest) : T(1);",
            "rescale(factor[j], part[j].largest) : T(1);\n"
            "  if (CHOSEN && !holds_label(call)) block.load_own(v, own);",
        ),
    ),
    "a voxel too many": (("inside = first < last;", "inside = CHOSEN || first < last;"),),
    "a class too many": (("return k < CONST(classes) -", "return CHOSEN || k < CONST(classes) -"),),
    "the last tile is whole": (("(count != full)", "(!(CHOSEN) && count != full)"),),
    "pieces from anywhere": (
        ("if (CONST(staged_bytes) != 16)", "if (!(CHOSEN) && CONST(staged_bytes) != 16)"),
    ),
    "any region": (("found < call.rows ?", "(CHOSEN || found < call.rows) ?"),),
}  # fmt: skip
_FUNCTION = re.compile(r"(?:FL_DEVICE|__global__)[^;{}=]*?\b(\w+)\(")
_BARRIER = re.compile(r"__sync(?:threads|warp)\(\);")


def barriers() -> list[str]:
    """The names of the sources' barriers: "function", "function, 2." and so on."""
    return list(dict.fromkeys(name for file in FILES for name in _named_barriers(source(file))))


def _named_barriers(text: str) -> list[str]:
    found: list[str] = []
    for match in _BARRIER.finditer(text):
        function = _FUNCTION.findall(text, 0, match.start())[-1]
        before = sum(name.partition(",")[0] == function for name in found)
        found.append(function if before == 0 else f"{function}, {before + 1}.")
    return found


@cache
def _numbers() -> dict[str, int]:
    """The numbers of the faults; 0 is none."""
    text = "".join(map(source, FILES))
    absent = [old for changes in FAULTS.values() for old, _ in changes if old not in text]
    assert not absent, f"the sources have changed: {absent}"
    names = [*FAULTS, *(f"no barrier in {name}" for name in barriers())]
    assert len(set(names)) == len(names), names
    return {name: number for number, name in enumerate(names, 1)}


def breakable(text: str, logits: tuple[str, ...]) -> str:
    """A source with selectable faults, reduced to these dtypes of logits."""
    numbers = _numbers()
    for name, changes in FAULTS.items():
        for old, new in changes:
            text = text.replace(old, new.replace("CHOSEN", f"fl_fault == {numbers[name]}"))
    places = [match.start() for match in _BARRIER.finditer(text)]
    for name, place in reversed([*zip(_named_barriers(text), places, strict=True)]):
        number = numbers.get(f"no barrier in {name}")
        if number is not None:  # of `FILES`
            text = f"{text[:place]}if (fl_fault != {number}) {text[place:]}"
    for code, name in (("F16", "float16"), ("BF16", "bfloat16"), ("F64", "float64")):
        if name not in logits:  # each takes seconds
            text = re.sub(rf"    case k{code}: +\\\n.*\\\n", "", text)
    return 'extern "C" __attribute__((visibility("default"))) int fl_fault = 0;\n' + text


class SanitizedDevice(EmulatedDevice):
    """Kernels under sanitizers, with faults; see `cuda_emulation.Library`."""

    def __init__(self, sanitize: str, logits: Iterable[str]) -> None:
        super().__init__()
        self.sanitize, self.logits = sanitize, tuple(logits)
        self.fault = 0
        self.finish = True
        """Whether this kernel, with 1024 threads, also runs under the sanitizer."""

    def empty(self, nbytes: int) -> Allocated:
        array = exactly((nbytes,), np.uint8)
        return Allocated(array.ctypes.data, array)

    def passes(self, constants: tuple[tuple[str, object], ...], kernel: str) -> tuple[Any, ...]:
        compiled = self._kernels(*self.what_to_compile(constants, kernel))
        return tuple((compiled, name) for name in PASSES[kernel])

    def kernels(self, text: str, names: tuple[str, ...]) -> tuple[Any, ...]:
        return tuple((self._kernels(text, names, STRUCTS_OF_OTHERS[names]), name) for name in names)

    def launch(
        self, kernel: Any, grid: int, block: tuple[int, int], shared: int, call: np.ndarray
    ) -> None:
        (compiled, name) = kernel
        left_out = name == "fastloss_finish" and not self.finish
        library = compiled("" if left_out else self.sanitize)
        c_int.in_dll(library._library, "fl_fault").value = self.fault
        super().launch((library, name), grid, block, shared, call)

    def _kernels(self, text: str, names: tuple[str, ...], struct: str) -> Callable[[str], Library]:
        return partial(_library, breakable(text, self.logits), names, struct)


@cache
def _library(text: str, names: tuple[str, ...], struct: str, sanitize: str) -> Library:
    return Library(
        text,
        dict.fromkeys(names, struct),
        sanitize=sanitize,
        threads=sanitize == "thread",
        optimise="-O0",  # compiles in a fraction of the time, and removes no access
    )


# --- The arrays of a case -------------------------------------------------------------------------


def exactly(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array without spare memory, at a multiple of 16, of bits that are NaN and no label."""
    array = np.empty(shape, dtype)
    assert array.ctypes.data % 16 == 0
    array.view(np.uint8)[...] = 0xFF
    return array


def placed(numbers: np.ndarray, layout: str, channels: bool) -> np.ndarray:
    """The same numbers in this memory layout."""
    shape, dtype = numbers.shape, numbers.dtype
    axes = 2 if channels else 1  # before the spatial ones
    if layout == "channels last" and channels:
        view = np.moveaxis(exactly((shape[0], *shape[2:], shape[1]), dtype), -1, 1)
    elif layout == "cropped":
        room = exactly((*shape[:axes], *(n + 2 for n in shape[axes:])), dtype)
        view = room[(slice(None),) * axes + (slice(1, -1),) * len(shape[axes:])]
    elif layout == "reversed":
        view = exactly(shape, dtype)[..., ::-1]
        view = view[:, ::-1] if channels else view
    elif layout == "shifted":
        view = exactly((numbers.size + 1,), dtype)[1:].reshape(shape)
    elif layout == "packed":  # misaligned fields of records
        each = 1 + dtype.itemsize
        steps = tuple(each * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        view = np.ndarray(shape, dtype, exactly((numbers.size * each,), np.uint8), 1, steps)
    else:
        view = exactly(shape, dtype)
    view[...] = numbers
    return view


def gaps(view: np.ndarray) -> np.ndarray:
    """The memory around a view, with zeros in the view itself."""
    base = view
    while base.base is not None:
        base = base.base
    everything = base.copy()
    start = view.ctypes.data - base.ctypes.data
    np.ndarray(view.shape, view.dtype, everything.data, start, view.strides)[...] = 0
    return everything


def stored(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers as a dtype; bfloat16 is truncated and stored as uint16."""
    if dtype != "bfloat16":
        return numbers.astype(dtype)
    return (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def loaded(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array


def arrays_of(case: Case, rng: np.random.Generator) -> Arrays:
    shape = (case.batch, case.classes, *case.spatial)
    x = 2 * rng.normal(size=shape)
    if case.activation == "none":
        x = rng.uniform(0.05, 0.95, shape)
    dtype = case.target.split()[-1]
    ignored = rng.random((case.batch, *case.spatial)) < 0.2
    if not case.dense:
        y: np.ndarray = rng.integers(0, case.classes, ignored.shape)
        if rng.random() < 0.5:  # long runs of one class
            y = np.sort(y.reshape(case.batch, -1), axis=1).reshape(y.shape)
        y = np.where(ignored & (case.ignore is not None), case.ignore or 0, y)
    elif "dense" in case.target and np.dtype(stored(x, dtype).dtype).kind == "f":
        y = rng.uniform(0, 1, shape)
    else:
        y = rng.integers(0, 2, shape)
    if case.dense and case.ignore is not None and not 0 < case.ignore < case.classes:
        y = np.where(ignored[:, None], case.ignore, y)
    weight, kind_of_weight = None, case.weight if case.weight != "one a row" else "float64"
    if case.weight:
        w = rng.integers(0, 3, ignored.shape) + (0.5 if kind_of_weight == "float32" else 0)
        weight = placed(w.astype(kind_of_weight), case.layout, False)
        if case.weight == "one a row":
            row = placed(w[..., :1].astype(kind_of_weight), "contiguous", False)
            weight = np.broadcast_to(row, ignored.shape)
    kinds, rows = EXTRAS[case.extras]
    fields = []
    for kind in kinds:
        if kind == "labels":
            numbers: np.ndarray = rng.integers(-1, case.classes + 1, ignored.shape).astype("int16")
        else:
            numbers = rng.normal(size=shape if kind == "class" else ignored.shape)
            numbers = numbers.astype(dtype if np.dtype(dtype if dtype != "bfloat16" else "u2").kind
                                     == "f" else "float32")  # fmt: skip
        fields.append(
            Field(placed(numbers, case.layout, kind == "class"), numbers.dtype.name, kind)
        )
    regions = None
    if rows:
        of_region = rng.integers(-1, rows + 2, (case.batch, int(np.prod(case.spatial))))
        of_region = np.sort(of_region, axis=1) if rng.random() < 0.7 else of_region
        of_region = of_region.reshape(ignored.shape).astype("int8" if rows < 9 else "int64")
        regions = placed(of_region, case.layout, False)
    return Arrays(
        placed(stored(x, case.logits), case.layout, True),
        case.logits,
        placed(stored(y, dtype), case.layout, case.dense),
        dtype,
        case.dense,
        weight,
        kind_of_weight,
        tuple(fields),
        regions,
        "" if regions is None else regions.dtype.name,
        rows or 1,
    )


# --- Expected results -----------------------------------------------------------------------------


def run(case: Case, device: EmulatedDevice) -> list[np.ndarray]:
    """Compare both passes and a map with the reference backend; return the device's results."""
    rng = np.random.default_rng(len(str(case)))
    arrays = arrays_of(case, rng)
    needs = frozenset(NEEDS[case.needs] + OF_FIELDS[: len(arrays.fields)])
    request = Request(case.activation, case.dense, case.ignore, needs)
    rows = case.batch * arrays.rows
    shape = (len(request.sums), rows, case.classes)
    fine = 1e-11 if case.logits == "float64" else 1e-5

    sums, voxels = exactly(shape, np.float64), exactly((rows,), np.float64)
    expected_sums, expected_voxels = np.zeros(shape), np.zeros(rows)
    addresses = sums.ctypes.data, voxels.ctypes.data
    made: list[np.ndarray] = []
    if case.needs == "top_k":
        arrays = _with_shares(case, device, request, arrays, addresses, rng, made)
        expected_sums[...], expected_voxels[...] = _without_ranking(case, request, arrays)
    elif case.map_kind == "voxel":
        own, right = _maps(case, request, arrays, rng)
        engine.reduce(device, request, arrays, *addresses, own)
        REFERENCE.reduce(request, arrays, expected_sums, expected_voxels, right)
        np.testing.assert_allclose(own.out, right.out, rtol=fine, atol=10 * fine)
        made.append(own.out)
    else:
        engine.reduce(device, request, arrays, *addresses)
        REFERENCE.reduce(request, arrays, expected_sums, expected_voxels)
    np.testing.assert_allclose(voxels, expected_voxels, rtol=1e-12)
    np.testing.assert_allclose(sums, expected_sums, rtol=fine, atol=10 * fine)
    if case.map_kind:
        own, right = _maps(case, request, arrays, rng)
        engine.write_map(device, request, arrays, own)
        REFERENCE.write_map(request, arrays, right)
        np.testing.assert_allclose(own.out, right.out, rtol=fine, atol=10 * fine)
        made.append(own.out)

    coefficients = rng.normal(size=shape)
    upstream = np.array([0.5], np.float32 if case.blocks == 2 else np.float64)
    none = case.blocks == 1
    out = arrays.logits
    expected = np.zeros(out.shape, out.dtype)
    REFERENCE.apply(request, arrays, coefficients, expected)
    if case.layout != "in place":
        out = placed(np.zeros_like(out), case.layout, True)
    beside = gaps(out)
    engine.apply(
        device,
        request,
        arrays,
        coefficients.ctypes.data,
        out,
        slot_stride=rows * case.classes,
        row_stride=case.classes,
        upstream=0 if none else upstream.ctypes.data,
        upstream_type=cuda_call.NO_TYPE if none else cuda_call.TYPES.index(upstream.dtype.name),
        scale=1.0 if none else 2.0,
    )
    np.testing.assert_array_equal(gaps(out), beside)
    got, expected = loaded(out, case.logits), loaded(expected, case.logits)
    error = np.linalg.norm((got.astype(np.float64) - expected).ravel())
    coarse = {"float16": 1e-3, "bfloat16": 8e-3}.get(case.logits, fine)
    least = 2.0**-24 if case.logits == "float16" else 0.0
    size = np.linalg.norm(expected.astype(np.float64).ravel())
    allowed = coarse * size + (0.1 * fine + least) * np.sqrt(out.size)
    assert error <= allowed, f"gradient off by {error:.3g}, allowed {allowed:.3g}"
    return [sums, voxels, out, *made]


def _maps(
    case: Case, request: Request, arrays: Arrays, rng: np.random.Generator
) -> tuple[Map, Map]:
    """A map for the device and the same for the reference."""
    shape = (case.batch, int(np.prod(case.spatial)))
    if case.map_kind in ("class", "error", "mask"):
        shape = (case.batch, case.classes, shape[1])
    kinds = ("uint8", "int32", "int64") if case.classes < 256 else ("int32", "int64")
    dtype = kinds[len(str(case)) % len(kinds)] if case.map_kind == "label" else arrays.value_dtype
    dtype = "uint8" if case.map_kind == "mask" else dtype
    k = rng.uniform(size=(len(request.sums), case.classes))
    return Map(case.map_kind, exactly(shape, dtype), k), Map(case.map_kind, np.zeros(shape), k)


def _with_shares(
    case: Case,
    device: EmulatedDevice,
    request: Request,
    arrays: Arrays,
    addresses: tuple[int, int],
    rng: np.random.Generator,
    made: list[np.ndarray],
) -> Arrays:
    """The reduce pass of a top-k term, and the arrays with the resulting field."""
    losses = exactly((case.batch, int(np.prod(case.spatial))), arrays.value_dtype)
    k = np.zeros((len(request.sums), case.classes))
    k[request.index[CROSS_ENTROPY]] = rng.uniform(0.5, 2, case.classes)
    voxel_map = Map("voxel", losses, k)
    engine.reduce(device, request, arrays, *addresses, voxel_map, "top_k")
    expected = np.zeros(losses.shape)
    others = _others(request)
    k = k[[request.index[total] for total in others.sums]]
    REFERENCE.write_map(others, arrays, Map("voxel", expected, k))
    fine = 1e-11 if case.logits == "float64" else 1e-5
    np.testing.assert_allclose(losses, expected, rtol=fine, atol=fine)
    mean = exactly((1,), np.float64)
    assert TOP_K.kept_percent is not None
    top_k.keep_largest(
        device, losses.ctypes.data, losses.size, losses.dtype, TOP_K.kept_percent, mean.ctypes.data
    )
    np.testing.assert_allclose(mean[0], TOP_K.choose(expected), rtol=fine, atol=fine)
    made += [losses, mean]
    field = Field(losses.reshape(case.batch, *case.spatial), losses.dtype.name, "voxel")
    return replace(arrays, fields=(*arrays.fields, field))  # its name is the last


def _others(request: Request) -> Request:
    needs = request.needs - {TOP_K.ranking}
    return Request(request.activation, request.dense, request.ignore_index, needs)


def _without_ranking(case: Case, request: Request, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """The sums after the reduce pass, before the ranking term fills in its own."""
    others, rows = _others(request), case.batch * arrays.rows
    found, voxels = np.zeros((len(others.sums), rows, case.classes)), np.zeros(rows)
    REFERENCE.reduce(others, replace(arrays, fields=arrays.fields[:-1]), found, voxels)
    sums = np.zeros((len(request.sums), rows, case.classes))
    sums[[request.index[total] for total in others.sums]] = found
    return sums, voxels


def main(jobs: list[dict[str, Any]], sanitize: str) -> None:
    """Run every job in a separate process, and print the exit codes and outputs."""
    logits = {job["case"]["logits"] for job in jobs}
    device = SanitizedDevice(sanitize, logits)
    found = []
    for job in jobs:
        case = Case(**{**job["case"], "spatial": tuple(job["case"]["spatial"])})
        device.special = job["special"]
        device.fault = _numbers()[job["fault"]] if job["fault"] else 0
        device.finish = sanitize != "thread" or case.needs == "all"
        found.append(_in_process(case, device))
    print(json.dumps(found))


def _in_process(case: Case, device: SanitizedDevice) -> tuple[int, str]:
    """The exit code and output of a process forked for one case."""
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 2)
            try:
                cuda_call._BLOCKS = case.blocks  # before any plan is cached
                run(case, device)
            except BaseException as error:
                os.write(2, f"{type(error).__name__}: {error}".encode())
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        said.seek(0)
        return os.waitstatus_to_exitcode(status), said.read().decode(errors="replace")
