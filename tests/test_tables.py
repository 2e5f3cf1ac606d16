"""Every backend agrees with the reference on any table of sums, with fields, regions and maps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import BACKENDS, need_backend
from test_backends import LAYOUTS, relayout

from fastloss.arrays import Arrays, arrange
from fastloss.backends import load_backend
from fastloss.backends.base import Backend
from fastloss.backends.reference import ReferenceBackend
from fastloss.borrowed import Borrowed
from fastloss.maps import Map
from fastloss.request import Request
from fastloss.sums import FUNCTIONS, WEIGHTS, Sum

REFERENCE = ReferenceBackend()
SPATIAL = ((), (1,), (7,), (513,), (40, 31), (5, 3, 17), (33, 64), (700,), (16, 17, 18))
OTHERS = tuple(b for b in BACKENDS if b != "reference")
FIELDS = {"voxel": "near", "class": "deep", "labels": "second"}
GAMMAS = (0.0, 0.5, 1.0, 2.0, 3.5)


def borrowed(array: np.ndarray) -> Borrowed:
    return Borrowed(array, array.dtype.name)


@st.composite
def sums(draw: st.DrawFn, kinds: tuple[str, ...]) -> frozenset[Any]:
    """Any table: named families, which fast paths take, mixed with sums that none takes."""
    families = st.sampled_from(
        ["region", "squared", "cross_entropy", "uniform", "focal:2.0", "focal:0.5"]
    )
    needs: set[Any] = set(draw(st.lists(families, max_size=2)))
    for _ in range(draw(st.integers(0 if needs else 1, 3))):
        function = draw(st.sampled_from(list(FUNCTIONS)))
        needs.add(
            Sum(
                draw(st.sampled_from(WEIGHTS)),
                function,
                draw(st.sampled_from(GAMMAS[function == "generalized" :]))
                if FUNCTIONS[function]
                else 0.0,
                draw(st.sampled_from(["", *(FIELDS[k] for k in kinds)])),
            )
        )
    return frozenset(needs)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Request, Arrays]:
    """A request and its arrays: any activation, target, layout and dtype."""
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    activation = draw(st.sampled_from(["softmax", "softmax", "sigmoid", "none"]))
    batch, spatial = draw(st.integers(1, 2)), draw(st.sampled_from(SPATIAL))
    classes = draw(st.sampled_from([1, 2, 3, 4, 5, 9, 17, 33]))
    dtype = draw(st.sampled_from(["float32", "float32", "float64", "float16"]))
    shape = (batch, classes, *spatial)

    def layout(array: np.ndarray) -> np.ndarray:
        return relayout(array, draw(st.sampled_from(("contiguous", "contiguous", *LAYOUTS))))

    if activation == "none":
        x = rng.uniform(0.05, 0.95, shape)
    else:
        x = draw(st.sampled_from([1.0, 3.0, 60.0])) * rng.normal(size=shape)
        if dtype != "float64":
            # In float32 1 − p underflows where logits are more than 87 apart.
            x = np.clip(x, -40.0, 40.0)
    labels = np.repeat(rng.integers(0, classes, 10**4), draw(st.sampled_from([1, 20, 700])))
    labels = labels[: batch * int(np.prod(spatial))].reshape(batch, *spatial)
    # Softmax over one channel has one class: its target is a label map.
    dense = (draw(st.booleans()) and classes > 1) or (classes == 1 and activation != "softmax")
    ignore = draw(st.sampled_from([None, None, 0, 255]))
    if dense:
        target = rng.uniform(0, 1, shape) * (rng.uniform(size=shape) < 0.7)
        target = target.astype(draw(st.sampled_from(["float32", "float64", "float16"])))
    else:
        if ignore == 255:
            labels = np.where(rng.uniform(size=labels.shape) < 0.1, 255, labels)
        target = labels.astype(draw(st.sampled_from(["uint8", "int64", "int16", "float32"])))
    weight = None
    if draw(st.booleans()):
        weight = rng.uniform(0, 2, (batch, *spatial)) * (rng.uniform(size=(batch, *spatial)) < 0.8)
        weight = borrowed(layout(weight.astype(draw(st.sampled_from(["float32", "float64"])))))
    kinds = tuple(draw(st.lists(st.sampled_from(list(FIELDS)), max_size=2, unique=True)))
    if classes == 1:
        kinds = tuple(k for k in kinds if k != "labels")
    request = Request(activation, dense, ignore, draw(sums(kinds)))
    fields = {}
    for kind, name in FIELDS.items():
        if name not in request.fields:
            continue
        if kind == "labels":
            numbers = rng.integers(-1, classes + 1, (batch, *spatial)).astype("int16")
        else:
            numbers = rng.normal(size=shape if kind == "class" else (batch, *spatial))
            numbers = numbers.astype(draw(st.sampled_from(["float32", "float16", "float64"])))
        fields[name] = borrowed(layout(numbers))
    regions, rows, by_class = None, 1, False
    if draw(st.integers(0, 2)) == 0:
        rows = draw(st.sampled_from([1, 2, 5, 40]))
        stretch = draw(st.sampled_from([1, 9, 300]))
        by_class = draw(st.booleans()) and classes > 1
        of_regions = shape if by_class else (batch, *spatial)
        numbers = np.resize(np.repeat(rng.integers(-1, rows, 10**4), stretch), of_regions)
        kind = draw(st.sampled_from(["int64", "int32", "int16", "int8"]))
        regions = borrowed(layout(numbers.astype(kind)))
    arrays = arrange(
        borrowed(layout(x.astype(dtype))),
        borrowed(layout(target)),
        weight,
        activation=activation,
        channel_axis=1,
        fields={name: fields[name] for name in request.fields},
        regions=regions,
        regions_by_class=by_class,
        rows=rows,
    )
    return request, arrays


def in_float64(arrays: Arrays) -> Arrays:
    """The same numbers in float64, so that the reference gets the same input."""
    return replace(arrays, logits=arrays.logits.astype(np.float64), logits_dtype="float64")


def reduced(backend: Backend, request: Request, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    batch, classes = arrays.logits.shape[:2]
    sums = np.full((len(request.sums), batch * arrays.rows, classes), np.nan)
    voxels = np.full(batch * arrays.rows, np.nan)
    backend.reduce(request, arrays, sums, voxels)
    return sums, voxels


def magnitude(request: Request, arrays: Arrays) -> np.ndarray:
    """Σ |summand| of every sum, (S, rows, C), as sums of both signs cancel."""
    fields = tuple(
        f._replace(array=np.abs(f.array)) if f.kind != "labels" else f for f in arrays.fields
    )
    return np.abs(reduced(REFERENCE, request, replace(arrays, fields=fields))[0])


@pytest.mark.parametrize("name", OTHERS)
@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_sums_and_gradients_of_any_table(name: str, problem: tuple[Request, Arrays]) -> None:
    backend = load_backend(need_backend(name))
    request, arrays = problem
    double = arrays.logits_dtype == "float64"
    own, voxels = reduced(backend, request, arrays)
    wide = in_float64(arrays)
    expected, expected_voxels = reduced(REFERENCE, request, wide)
    tolerance = 1e-11 if double else 3e-6
    assert np.allclose(voxels, expected_voxels, rtol=tolerance, atol=0)
    scale = magnitude(request, wide) + 1e-30
    assume(np.isfinite(scale).all())  # softmax over one channel: 1 − p is 0, its log infinite
    assert (np.abs(own - expected) <= tolerance * scale + 1e-12 * double).all() or np.allclose(
        own, expected, rtol=tolerance, atol=float(tolerance * scale.max()), equal_nan=True
    )
    coefficients = np.random.default_rng(0).normal(size=own.shape)
    out = np.full_like(arrays.logits, np.nan)
    backend.apply(request, arrays, coefficients, out)
    right = np.empty_like(wide.logits)
    REFERENCE.apply(request, wide, coefficients, right)
    error = np.linalg.norm((out.astype(np.float64) - right).ravel())
    step = {"float64": 1e-11, "float32": 3e-6, "float16": 1e-3}[arrays.logits_dtype]
    least = 2.0**-24 * np.sqrt(right.size) if arrays.logits_dtype == "float16" else 1e-30
    # Coefficients are near 1, so cancellation in a gradient leaves rounding errors of that size.
    cancelled = step * np.sqrt(right.size)
    assert error <= step * np.linalg.norm(right.ravel()) * 2 + least + cancelled


@pytest.mark.parametrize("name", OTHERS)
@settings(max_examples=40, deadline=None)
@given(problem=problems(), kind=st.sampled_from(["voxel", "class", "error", "label", "mask"]))
def test_maps(name: str, problem: tuple[Request, Arrays], kind: str) -> None:
    backend = load_backend(need_backend(name))
    request, arrays = problem
    (batch, classes), voxels = arrays.logits.shape[:2], int(np.prod(arrays.logits.shape[2:]))
    k = np.random.default_rng(0).uniform(size=(len(request.sums), classes))
    of_classes, whole = kind in ("class", "error", "mask"), kind in ("label", "mask")
    shape = (batch, classes, voxels) if of_classes else (batch, voxels)
    dtype = "uint8" if whole else arrays.value_dtype
    own, right = np.zeros(shape, dtype), np.zeros(shape, "uint8" if whole else "float64")
    backend.write_map(request, arrays, Map(kind, own, k))
    REFERENCE.write_map(request, in_float64(arrays), Map(kind, right, k))
    if whole:
        assert (own == right).all()
        return
    tolerance = 1e-11 if arrays.logits_dtype == "float64" else 3e-6
    assume(np.isfinite(right).all())  # as above
    scale = max(1.0, float(np.abs(right).max(initial=0.0)))
    assert np.abs(own - right).max(initial=0.0) <= tolerance * scale * 4
    if kind == "voxel":
        again = np.zeros(shape, dtype)
        sums = np.empty((len(request.sums), batch * arrays.rows, classes))
        backend.reduce(request, arrays, sums, np.empty(batch * arrays.rows), Map("voxel", again, k))
        assert np.allclose(again, own, rtol=tolerance, atol=tolerance)
