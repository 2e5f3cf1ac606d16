"""Fields that terms make of arrays on a device: as in CPU memory, and without leaving it."""

from __future__ import annotations

import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import cuda_emulation
import numpy as np
import pytest
import stand_in
from device_backend import EmulatedDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_in import OnDevice
from support import _absent, example, need, norm, one_hot
from test_backends import relayout

import fastloss as fl
from fastloss import frameworks
from fastloss.backends.cuda import backend as cuda
from fastloss.backends.cuda import fields, indices
from fastloss.backends.cuda.source import PASSES
from fastloss.borrowed import Borrowed, Place, device_view
from fastloss.fields import target_of, target_on_gpu
from fastloss.frameworks.base import Adapter

TERMS = {
    "boundary": fl.Boundary,
    "hausdorff": fl.HausdorffDT,
    "surface": fl.GeneralizedSurface,
    "dou": fl.BoundaryDoU,
}


@pytest.fixture(scope="module")
def copies() -> Any:
    """The device, and a list of the copies between it and CPU memory."""
    found: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        stand_in.install(patch)
        array, numpy = stand_in.StandInPlace.array, stand_in.StandInPlace.numpy

        def upload(self: Any, values: Any, dtype: str) -> OnDevice:
            if not isinstance(values, OnDevice) and np.ndim(values):
                found.append("there")
            return array(self, values, dtype)

        def download(self: Any, values: OnDevice) -> np.ndarray:
            found.append("here")
            return numpy(self, values)

        patch.setattr(stand_in.StandInPlace, "array", upload)
        patch.setattr(stand_in.StandInPlace, "numpy", download)
        yield found


def drawn_target(draw: Any, rng: Any, shape: tuple[int, ...], ignore: int | None) -> np.ndarray:
    batch, classes, *spatial = shape
    y = rng.integers(0, draw(st.integers(1, classes)), (batch, *spatial))
    if ignore is not None:
        y[rng.random(y.shape) < 0.2] = ignore
    form = draw(st.sampled_from(["labels", "one-hot", "soft"]))
    if form == "labels":
        numbers = ["uint8", "int16", "int64", "float32", "float16"]
        return y.astype(draw(st.sampled_from(numbers)))
    g = one_hot(np.where(y < classes, y, 0), classes, "uint8")
    outside = (y >= classes)[:, None]
    if form == "one-hot":
        return np.where(outside, np.uint8(ignore or 0), g)
    soft = rng.random(g.shape).astype(draw(st.sampled_from(["float32", "float64", "float16"])))
    return np.where(outside, soft.dtype.type(ignore or 0), soft)


@settings(max_examples=60)
@given(data=st.data())
def test_values_and_gradients_are_those_of_the_processor(copies: list[str], data: Any) -> None:
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind, activation = (
        draw(st.sampled_from(list(TERMS))),
        draw(st.sampled_from(["softmax", "sigmoid"])),
    )
    spatial = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    classes, batch = draw(st.integers(2, 4)), draw(st.integers(1, 2))
    ignore = draw(st.sampled_from([None, 200, 0, 1]))
    x = (2 * rng.normal(size=(batch, classes, *spatial))).astype("float32")
    y = drawn_target(draw, rng, x.shape, ignore)
    options: dict[str, Any] = {"batch": draw(st.booleans())}
    if kind != "dou":
        options["spacing"] = draw(st.sampled_from([None, 0.7, rng.uniform(0.5, 3, len(spatial))]))
    if kind == "hausdorff":
        options |= {"alpha": draw(st.sampled_from([2.0, 1.0, 1.5])), "log": draw(st.booleans())}
    w = rng.integers(0, 3, (batch, *spatial)).astype(float) if draw(st.booleans()) else None
    layout = draw(st.sampled_from(["contiguous", "channels last", "reversed", "wide"]))
    loss = fl.Loss(TERMS[kind](**options), fl.Dice(), activation=activation, ignore_index=ignore)
    here = relayout(x, layout), relayout(y, layout), w
    there = [None if a is None else OnDevice(a) for a in here]
    expected, slope = loss.value_and_grad(*here)
    copies.clear()
    value, gradient = loss.value_and_grad(*there)
    assert copies == []
    longest = (3 * max(spatial)) ** 2
    np.testing.assert_allclose(value.values, expected, rtol=1e-5, atol=1e-6 * longest)
    assert norm(gradient.values - slope) <= 1e-5 * norm(slope) + 1e-6 * longest


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("form", ["labels", "dense", "a channel axis of one"])
def test_fields_ahead(copies: list[str], form: str, dtype: str, axis: int) -> None:
    terms = fl.Boundary(), fl.HausdorffDT(), fl.BoundaryDoU(include_background=False)
    loss = fl.Loss(*terms, channel_axis=axis, ignore_index=2)
    y = np.random.default_rng(0).integers(0, 3, (2, 5, 6, 7))
    options: dict[str, Any] = {"classes": 3, "spacing": (30_000, 1, 2), "dtype": dtype}
    if form == "dense":
        y, options["dense"] = np.moveaxis(one_hot(y, 3), 1, axis), True
    elif form != "labels":
        y = np.expand_dims(y, axis)
    expected = loss.fields(y, **options)
    copies.clear()
    found = loss.fields(OnDevice(y), **options)
    assert copies == []
    assert list(found) == list(expected)
    for name, field in found.items():
        assert isinstance(field, OnDevice)
        assert field.values.dtype == expected[name].dtype
        np.testing.assert_array_equal(field.values, expected[name])


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("kind", ["class", "voxel", "channels last", "reversed"])
def test_distances_that_the_caller_gives(copies: list[str], kind: str, dtype: str) -> None:
    axis = -1 if kind == "channels last" else 1
    loss = fl.Loss(fl.HausdorffDT(alpha=1.5), fl.GeneralizedSurface(), channel_axis=axis)
    x, y = example(2, 3, (5, 6), dtype="float32")
    x = np.ascontiguousarray(np.moveaxis(x, 1, axis))
    field = np.random.default_rng(0).uniform(0, 9, x.shape).astype(dtype)
    if kind == "voxel":
        field = field[:, 0]
    if kind == "reversed":
        field = field[:, :, ::-1]
    given = OnDevice(field)
    before = field.copy()
    copies.clear()
    value, gradient = loss.value_and_grad(OnDevice(x), OnDevice(y), fields={"distance": given})
    assert copies == []
    np.testing.assert_array_equal(field, before)
    expected, slope = loss.value_and_grad(x, y, fields={"distance": field})
    np.testing.assert_allclose(value.values, expected, rtol=2e-6)
    np.testing.assert_allclose(gradient.values, slope, rtol=1e-5, atol=1e-6)


def test_skeletons_are_made_in_cpu_memory(copies: list[str]) -> None:
    need("skimage")
    loss = fl.SkeletonRecall() + fl.Boundary() + fl.BoundaryDoU()
    x, y = example(1, 3, (9, 10))
    copies.clear()
    value = loss(OnDevice(x), OnDevice(y))
    assert copies == ["here", "there"]
    np.testing.assert_allclose(value.values, loss(x, y), rtol=1e-6)


def test_a_term_of_ones_own_gets_arrays_of_numpy(copies: list[str]) -> None:
    class Squared(fl.Boundary):
        def make_field(self, target: Any, spacing: Any) -> np.ndarray:
            assert isinstance(target.labels, np.ndarray)
            return np.square(super().make_field(target, spacing))

    x, y = example(1, 3, (9, 10))
    np.testing.assert_allclose(Squared()(OnDevice(x), OnDevice(y)).values, Squared()(x, y))
    made = Squared().fields(OnDevice(y), classes=3)["boundary"]
    np.testing.assert_array_equal(made.values, Squared().fields(y, classes=3)["boundary"])


NUMBERS = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")


@pytest.mark.parametrize("dtype", [*NUMBERS, "float16", "float32", "float64"])
@pytest.mark.parametrize("ignore", [None, 1, 0, 255, -1])
def test_targets_of_any_numbers(copies: list[str], dtype: str, ignore: int | None) -> None:
    """The class of a voxel, or its masks, whatever the target is made of."""
    rng = np.random.default_rng(0)
    numbers = np.array([0, 1, 2, 3, 7, 255])[rng.integers(0, 6, (2, 3, 4, 5))]
    if "u" not in dtype and dtype != "bool":
        numbers[0, 0, 0] = -1
    y = numbers.astype(dtype)
    if "float" in dtype:
        y[1, 1] += np.array([0, 0.5, np.nan, 0.25, -0.0], dtype)
    for array in (y, y[:, ::-1], np.asfortranarray(y)):
        for dense in (False, True):
            options: Any = {"classes": 3, "ignore": ignore, "activation": "sigmoid"}
            here = target_of(array, dtype, dense, **options)
            there = target_on_gpu(frameworks.borrow(OnDevice(array), "y"), dense, **options)
            if dense:
                np.testing.assert_array_equal(there.masks.values, here.masks)
            else:
                known = (here.labels >= 0) & (here.labels < 3)
                np.testing.assert_array_equal(there.labels.values, np.where(known, here.labels, 3))


def test_more_than_255_classes_by_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = need("torch")
    y = torch.from_numpy(np.random.default_rng(0).integers(250, 260, (1, 6, 7)))
    x = torch.randn(1, 260, 6, 7, generator=torch.Generator().manual_seed(0))
    loss = fl.Loss(fl.Boundary(), fl.BoundaryDoU(), ignore_index=255)
    expected = loss(x, y)
    launched = stand_in.install_for_torch(monkeypatch)
    leaf = x.requires_grad_()
    value = loss(leaf, y)
    torch.testing.assert_close(value, expected)
    value.backward()
    assert leaf.grad.isfinite().all()
    assert "fastloss_boundary_voxels" in launched
    assert launched.count("fastloss_distance_begin") == 1  # not again in the backward pass


# ------------------------------------------------------------------ no memory of the host


class Nowhere(NamedTuple):
    """An array at an address where there is no memory."""

    shape: tuple[int, ...]
    dtype: str
    at: int = 1 << 45

    def reshape(self, *shape: int) -> Nowhere:
        return self._replace(shape=shape)


class NowherePlace(Place):
    stream, ordinal = 7, 0

    def empty(self, shape: tuple[int, ...], dtype: str) -> Nowhere:
        return Nowhere(shape, dtype)

    def address(self, array: Nowhere) -> int:
        return array.at


class NowhereAdapter(Adapter):
    def serves(self, array: Any) -> bool:
        return isinstance(array, Nowhere)

    def borrow(self, array: Nowhere, name: str, *, write: bool = False) -> Borrowed:
        shape, item = array.shape, np.dtype(array.dtype).itemsize
        steps = tuple(item * prod(shape[i + 1 :]) for i in range(len(shape)))
        view = device_view(array, array.at, shape, steps, array.dtype)
        return Borrowed(view, array.dtype, NowherePlace())

    def empty_like(self, array: Nowhere, borrowed: Borrowed) -> tuple[Any, Borrowed]:
        new = array._replace(at=array.at + (1 << 40))
        return new, self.borrow(new, "out")


class IdleDevice(EmulatedDevice):
    """Launches nothing."""

    def __init__(self, place: Place) -> None:
        super().__init__()

    def passes(self, constants: Any, kernel: str) -> tuple[Any, ...]:
        return PASSES[kernel]

    def kernels(self, text: str, names: tuple[str, ...]) -> tuple[Any, ...]:
        return names

    def launch(self, *arguments: Any) -> None:
        pass


def run_nowhere() -> None:
    cuda.CudaDevice = IdleDevice  # type: ignore[assignment, misc]
    frameworks._SPECIAL[Nowhere.__module__] = NowhereAdapter
    shape = (2, 3, 8, 9, 10)
    x = Nowhere(shape, "float32")
    targets = Nowhere((2, 8, 9, 10), "int64"), Nowhere(shape, "float16")
    for y in targets:
        for kind, term in TERMS.items():
            loss = fl.Loss(term(), fl.Dice(), ignore_index=1)
            loss.value_and_grad(x, y)
            loss.fields(y, classes=3, dense=y.shape == shape, dtype="float16")
            if kind in ("hausdorff", "surface"):
                given = Nowhere(shape, "float16")
                loss.value_and_grad(x, y, fields={"distance": given})
    print("done")


def test_nothing_reads_the_arrays_but_kernels() -> None:
    """All arrays lie where the processor has no memory: to read one there ends the process."""
    found = subprocess.run(
        [sys.executable, "-c", "import test_cuda_fields as t; t.run_nowhere()"],
        env={"PYTHONPATH": f"{Path(__file__).parent}:{Path(fl.__file__).parents[1]}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stdout) == (0, "done\n"), found.stderr


# ------------------------------------------------------------------ memory


def run_on(device: Any) -> None:
    """The kernels, over arrays that end where their memory does."""
    place = stand_in.StandInPlace(0)
    empty, cuda.CudaDevice = place.empty, lambda place: device  # type: ignore[assignment, misc]
    kept = []

    def exact(shape: tuple[int, ...], dtype: str) -> Any:
        memory = device.empty(prod(shape) * np.dtype(dtype).itemsize)
        kept.append(memory)
        made = empty(shape, dtype)
        made.values = np.ndarray(shape, dtype, memory.owner)
        return made

    place.empty = exact  # type: ignore[method-assign]
    rng = np.random.default_rng(0)
    for shape, classes in (((2, 3, 5, 7), 3), ((1, 4, 9), 300)):
        labels = rng.integers(0, 3, shape)
        own = exact(shape, "int64")
        own.values[...] = labels
        found = indices.class_indices(Borrowed(own.values, "int64", place), classes, 1)
        wanted = np.where(labels == 1, classes, labels)
        np.testing.assert_array_equal(found.values, wanted)
        edges = fields.boundary_voxels(
            Borrowed(found.values, found.values.dtype.name, place), False
        )
        assert edges.values[0, 0].all()
        masks = indices.dense_masks(Borrowed(own.values[:, None], "int64", place), 2)
        np.testing.assert_array_equal(masks.values[:, 0], labels == 1)
        edges = fields.boundary_voxels(Borrowed(masks.values, "uint8", place), True)
        assert not edges.values[masks.values == 0].any()
        two = [Borrowed(a.values, a.values.dtype.name, place) for a in (own, found)]
        both = fields.powers(1.5, two, "float16")
        np.testing.assert_allclose(both.values, labels**1.5 + wanted**1.5, rtol=1e-3)


def test_memory() -> None:
    """Under the compiler's sanitizers; a report ends the process."""
    try:
        cuda_emulation._command("address")
    except OSError as error:
        _absent("sanitizer.address,undefined", error)
    script = (
        "import sys, cuda_cases, test_cuda_fields as t;"
        "t.run_on(cuda_cases.SanitizedDevice(sys.argv[1], ()))"
    )
    found = cuda_emulation.sanitized_python(script, "address", "address,undefined")
    assert (found.returncode, found.stderr) == (0, "")
