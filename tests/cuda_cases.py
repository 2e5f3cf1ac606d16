"""Small calls of the CUDA kernels, run on the CPU under the compiler's sanitizers.

`test_cuda_sanitizers` calls `main` in a process that has the sanitizer. Every call is compared with
the reference backend; arrays have no memory beyond their numbers, so that AddressSanitizer sees any
access outside.
"""

from __future__ import annotations

import json
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterable
from ctypes import c_int
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations
from typing import Any

import numpy as np
from cuda_emulation import Library
from device_backend import PASSES, Allocated, EmulatedDevice

from fastloss.arrays import Arrays
from fastloss.backends import _cuda_call, _cuda_engine, _cuda_top_k
from fastloss.backends._cuda_source import source, specialised
from fastloss.backends.reference import BACKEND as REFERENCE
from fastloss.request import Request
from fastloss.voxel_losses import VoxelLosses

TOP_K = 30.0  # percent
NEEDS = {
    "all": ("region", "squared", "cross_entropy", "uniform", "focal:2.0", "focal:1.5"),
    "region": ("region", "cross_entropy"),
    "squared": ("squared", "cross_entropy"),
    "smooth": ("cross_entropy", "uniform"),
    "focal": ("focal:2.0", "focal:1.5", "region", "cross_entropy"),
    "top_k": ("top_k", "region"),
}
FACTORS: dict[str, tuple[Any, ...]] = {
    "logits": _cuda_call.TYPES[:4],
    "classes": (1, 2, 3, 4, 5, 14, 16, 17, 33, 40, 105, 300),
    # "cropped": axes that do not merge. "shifted": one number behind an aligned address.
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
    """Most blocks of a launch: with few of them, a block has several tiles."""
    batch: int = 2

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
        return ", ".join(words)


def possible(case: Case) -> bool:
    """Whether there are such calls, which here are not too slow either."""
    if case.classes == 1 and case.activation == "softmax" and "dense" in case.target:
        return False  # taken for a label map
    if case.needs == "top_k" and (case.activation != "softmax" or case.dense):
        return False
    return case.classes * np.prod(case.spatial) <= 300 * 33


def covering() -> list[Case]:
    """Cases in which any two values of two factors that go together occur together."""
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


# --- The sources, with faults to choose from ------------------------------------------------------

# Texts of the sources, and what they become so that a fault can be chosen: CHOSEN is whether it is.
FAULTS: dict[str, tuple[tuple[str, str], ...]] = {
    "exchange has one half": (
        ("(group * 2 + turn)", "(group * 2 + (CHOSEN ? 0 : turn))"),
        ("(group * 2 + (1 - turn))", "(group * 2 + (CHOSEN ? 0 : 1 - turn))"),
    ),
    "warps take no turns": (
        ("block.warp_in_group == tile %", "(CHOSEN || block.warp_in_group == tile %"),
        ("tile % CONST(warps)) {", "tile % CONST(warps))) {"),
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
}  # fmt: skip
_FUNCTION = re.compile(r"(?:FL_DEVICE|__global__)[^;{}=]*?\b(\w+)\(")
_BARRIER = "__syncthreads();"


def barriers() -> list[str]:
    """The barriers of the sources: "function", or "function, 2." and so on."""
    return [name for file in ("passes.cu", "top_k.cu") for name in _named_barriers(source(file))]


def _named_barriers(text: str) -> list[str]:
    found: list[str] = []
    for match in re.finditer(re.escape(_BARRIER), text):
        function = _FUNCTION.findall(text, 0, match.start())[-1]
        before = sum(name.partition(",")[0] == function for name in found)
        found.append(function if before == 0 else f"{function}, {before + 1}.")
    return found


@cache
def _numbers() -> dict[str, int]:
    """Of the faults; 0 is none."""
    text = source("passes.cu") + source("top_k.cu")
    absent = [old for changes in FAULTS.values() for old, _ in changes if old not in text]
    assert not absent, f"the sources have changed: {absent}"
    names = [*FAULTS, *(f"no barrier in {name}" for name in barriers())]
    assert len(set(names)) == len(names), names
    return {name: number for number, name in enumerate(names, 1)}


def breakable(text: str, logits: tuple[str, ...]) -> str:
    """A source in which faults can be chosen, and which is compiled for these logits alone."""
    numbers = _numbers()
    for name, changes in FAULTS.items():
        for old, new in changes:
            text = text.replace(old, new.replace("CHOSEN", f"fl_fault == {numbers[name]}"))
    places = [match.start() for match in re.finditer(re.escape(_BARRIER), text)]
    for name, place in reversed([*zip(_named_barriers(text), places, strict=True)]):
        condition = f"if (fl_fault != {numbers[f'no barrier in {name}']}) "
        text = text[:place] + condition + text[place:]
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
        """Whether this kernel runs under the sanitizer, for which 1024 threads are many."""

    def empty(self, nbytes: int) -> Allocated:
        array = exactly((nbytes,), np.uint8)
        return Allocated(array.ctypes.data, array)

    def passes(self, constants: tuple[tuple[str, object], ...], kernel: str) -> tuple[Any, ...]:
        names = PASSES[:2] if kernel == "reduce" else PASSES[2:]
        text = specialised(constants, kernel) if self.special else source("passes.cu")
        compiled = names if self.special else PASSES
        return tuple((self._kernels(text, compiled, "Call"), name) for name in names)

    def kernels(self, text: str, names: tuple[str, ...]) -> tuple[Any, ...]:
        return tuple((self._kernels(text, names, "TopKCall"), name) for name in names)

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
        optimise="-O0",  # compiles in a fraction of the time, and keeps every access
    )


# --- The arrays of a case -------------------------------------------------------------------------


def exactly(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that fills its memory, at a multiple of 16, with bits that are NaN and no label."""
    array = np.empty(shape, dtype)
    assert array.ctypes.data % 16 == 0
    array.view(np.uint8)[...] = 0xFF
    return array


def placed(numbers: np.ndarray, layout: str, channels: bool) -> np.ndarray:
    """The same numbers in memory that is laid out so."""
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
    else:
        view = exactly(shape, dtype)
    view[...] = numbers
    return view


def gaps(view: np.ndarray) -> np.ndarray:
    """The memory that a view lies in, with zeros in its own place."""
    base = view
    while base.base is not None:
        base = base.base
    everything = base.copy()
    start = view.ctypes.data - base.ctypes.data
    np.ndarray(view.shape, view.dtype, everything.data, start, view.strides)[...] = 0
    return everything


def stored(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers as a dtype; bfloat16 are cut off, and stored as uint16."""
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
    weight, kind = None, case.weight if case.weight != "one a row" else "float64"
    if case.weight:
        w = rng.integers(0, 3, ignored.shape) + (0.5 if kind == "float32" else 0)
        weight = placed(w.astype(kind), case.layout, False)
        if case.weight == "one a row":
            row = placed(w[..., :1].astype(kind), "contiguous", False)
            weight = np.broadcast_to(row, ignored.shape)
    return Arrays(
        placed(stored(x, case.logits), case.layout, True),
        case.logits,
        placed(stored(y, dtype), case.layout, case.dense),
        dtype,
        case.dense,
        weight,
        kind,
    )


# --- What a case must compute ---------------------------------------------------------------------


def run(case: Case, device: EmulatedDevice) -> list[np.ndarray]:
    """Both passes, compared with the reference backend; and what the device computed."""
    rng = np.random.default_rng(len(str(case)))
    arrays = arrays_of(case, rng)
    request = Request(case.activation, case.dense, case.ignore, frozenset(NEEDS[case.needs]))
    shape = (len(request.slots), case.batch, case.classes)
    fine = 1e-11 if case.logits == "float64" else 1e-5

    sums, voxels = exactly(shape, np.float64), exactly((case.batch,), np.float64)
    expected_sums, expected_voxels = np.zeros(shape), np.zeros(case.batch)
    losses = expected_losses = None
    addresses = []
    if case.needs == "top_k":
        class_weight = rng.uniform(0.5, 2, case.classes)
        numbers = exactly((case.batch, int(np.prod(case.spatial))), arrays.value_dtype)
        losses = VoxelLosses(numbers, class_weight)
        expected_losses = VoxelLosses(np.zeros_like(numbers), class_weight)
        addresses = [losses.values.ctypes.data, class_weight.ctypes.data]
    _cuda_engine.reduce(device, request, arrays, sums.ctypes.data, voxels.ctypes.data, *addresses)
    REFERENCE.reduce(request, arrays, expected_sums, expected_voxels, expected_losses)
    if losses is not None and expected_losses is not None:
        expected_sums[request.index["top_k"]] = 0
        np.testing.assert_allclose(
            np.sort(losses.values), np.sort(expected_losses.values), rtol=fine, atol=fine
        )
        mean = exactly((1,), np.float64)
        _cuda_top_k.keep_largest(
            device, addresses[0], numbers.size, numbers.dtype, TOP_K, mean.ctypes.data
        )
        expected_mean = expected_losses.keep_largest(TOP_K)
        np.testing.assert_allclose(mean[0], expected_mean, rtol=fine, atol=fine)
    np.testing.assert_allclose(voxels, expected_voxels, rtol=1e-12)
    np.testing.assert_allclose(sums, expected_sums, rtol=fine, atol=fine)

    coefficients = rng.normal(size=shape)
    upstream = np.array([0.5], np.float32 if case.blocks == 2 else np.float64)
    none = case.blocks == 1
    out = arrays.logits
    expected = np.zeros(out.shape, out.dtype)
    REFERENCE.apply(request, arrays, coefficients, expected, expected_losses)
    if case.layout != "in place":
        out = placed(np.zeros_like(out), case.layout, True)
    beside = gaps(out)
    _cuda_engine.apply(
        device,
        request,
        arrays,
        coefficients.ctypes.data,
        out,
        slot_stride=case.batch * case.classes,
        sample_stride=case.classes,
        upstream=0 if none else upstream.ctypes.data,
        upstream_type=_cuda_call.NO_TYPE if none else _cuda_call.TYPES.index(upstream.dtype.name),
        scale=1.0 if none else 2.0,
        losses=addresses[0] if addresses else 0,
    )
    np.testing.assert_array_equal(gaps(out), beside)
    got, expected = loaded(out, case.logits), loaded(expected, case.logits)
    error = np.linalg.norm((got.astype(np.float64) - expected).ravel())
    coarse = {"float16": 1e-3, "bfloat16": 8e-3}.get(case.logits, fine)
    least = 2.0**-24 if case.logits == "float16" else 0.0
    size = np.linalg.norm(expected.astype(np.float64).ravel())
    allowed = coarse * size + (0.1 * fine + least) * np.sqrt(out.size)
    assert error <= allowed, f"gradient off by {error:.3g}, allowed {allowed:.3g}"
    return [sums, voxels, out, *([] if losses is None else [losses.values, mean])]


def main(jobs: list[dict[str, Any]], sanitize: str) -> None:
    """Run every job in a process of its own, and print their exit codes and what they said."""
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
    """Of a process forked for one case: its exit code, and what it said."""
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 2)
            try:
                _cuda_call._BLOCKS = case.blocks  # before any plan is made
                run(case, device)
            except BaseException as error:
                os.write(2, f"{type(error).__name__}: {error}".encode())
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        said.seek(0)
        return os.waitstatus_to_exitcode(status), said.read().decode(errors="replace")
