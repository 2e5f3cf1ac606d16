"""Metrics of arrays on a device: those of the processor, and computed without leaving it."""

from __future__ import annotations

from math import prod
from typing import Any

import cuda_emulation
import numpy as np
import pytest
import stand_in
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_in import OnDevice
from support import _absent, need
from test_backends import relayout

import fastloss as fl
from fastloss import frameworks
from fastloss.backends.cuda import backend as cuda
from fastloss.metrics import ConfusionAccumulator, evaluate, surface_distances

OVERLAP = ("dice", "iou", "precision", "recall", "specificity", "volume_difference", "mcc")
SURFACE = ("hausdorff", "hd95", "hd50", "assd", "asd", "nsd", "surface_recall")
INTEGERS = ("uint8", "int8", "uint16", "int16", "int32", "int64", "uint64")
FLOATS = ("float16", "float32", "float64")
LAYOUTS = ("contiguous", "channels last", "reversed", "wide", "fortran")


@pytest.fixture(scope="module")
def copies() -> Any:
    """The device, and a list of the numbers that came from it."""
    found: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        stand_in.install(patch)
        numpy = stand_in.StandInPlace.numpy

        def download(self: Any, values: OnDevice) -> np.ndarray:
            found.append(values.values.size)
            return numpy(self, values)

        patch.setattr(stand_in.StandInPlace, "numpy", download)
        yield found


def there(array: Any) -> Any:
    return None if array is None else OnDevice(array)


def assert_same(found: fl.metrics.Scores, true: fl.metrics.Scores) -> None:
    assert found.classes == true.classes
    for name, values in true.values.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, err_msg=name)


def blobs(rng: Any, shape: tuple[int, ...], classes: int) -> np.ndarray:
    """Label maps with pieces of some size."""
    labels = rng.integers(0, classes, [-(-n // 2) for n in shape])
    for axis, n in enumerate(shape):
        labels = labels.repeat(2, axis).take(range(n), axis)
    return np.where(rng.random(shape) < 0.05, rng.integers(0, classes, shape), labels)


@settings(max_examples=40)
@given(data=st.data())
def test_metrics_are_those_of_the_processor(copies: list[int], data: Any) -> None:
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spatial = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    batch, classes = draw(st.integers(1, 2)), draw(st.integers(2, 4))
    labels = blobs(rng, (batch, *spatial), classes)
    ignore = draw(st.sampled_from([None, 0, 1, -1, 255]))
    activation = draw(st.sampled_from(["labels", "softmax", "sigmoid", "none"]))
    form = draw(st.sampled_from(["labels", "masks"] if activation != "labels" else ["labels"]))
    layout = draw(st.sampled_from(LAYOUTS))
    integers = [dtype for dtype in INTEGERS if ignore is None or ignore >= 0 or dtype[0] == "i"]
    dtype = draw(st.sampled_from([*integers, *FLOATS]))
    if ignore == 255 and dtype == "int8":
        dtype = "int16"
    if activation == "labels":
        other = np.where(rng.random(labels.shape) < 0.2, 1, labels)
        prediction = other.astype(draw(st.sampled_from([*INTEGERS, *FLOATS])))
    else:
        # Few values, so that there are ties.
        scores = rng.integers(-2, 3, (batch, classes, *spatial)) / 4 + 0.25
        prediction = scores.astype(draw(st.sampled_from(FLOATS)))
    if form == "masks":
        reference = (rng.random(prediction.shape) < 0.4).astype(dtype)
        ignore = ignore if ignore is None or ignore >= 0 or dtype in FLOATS else None
    else:
        reference = labels.astype(dtype)
    if ignore is not None:
        reference[rng.random(reference.shape) < 0.1] = ignore
    if draw(st.booleans()):
        reference[0] = 0  # no class but the background
    mask = None
    if draw(st.booleans()):
        mask = (rng.random((batch, *spatial)) < 0.8).astype(
            draw(st.sampled_from(["bool", "int32"]))
        )
    definition = draw(
        st.sampled_from(["monai", "deepmind", "medpy"] if len(spatial) > 1 else ["monai"])
    )
    options: dict[str, Any] = {
        "metrics": (*OVERLAP, *SURFACE),
        "activation": activation,
        "ignore_index": ignore,
        "spacing": tuple(rng.choice([0.3, 0.7, 1.0, 3.0, 20.0], len(spatial))),
        "definition": definition,
        "tolerance": float(rng.choice([0.0, 0.3, 0.9, 1.0, 1.4, 3.0])),
        "classes": draw(st.sampled_from([None, {"one": 1, "all": tuple(range(1, classes))}])),
    }
    here = relayout(prediction, layout), relayout(reference, layout)
    true = evaluate(*here, mask=mask, **options)
    copies.clear()
    found = evaluate(*map(there, here), mask=there(mask), **options)
    assert_same(found, true)


def test_no_volume_comes_to_cpu_memory(copies: list[int]) -> None:
    rng = np.random.default_rng(0)
    y = np.zeros((1, 24, 26, 28), np.uint8)
    y[:, 5:12, 6:14, 7:15] = 1
    x = rng.normal(size=(1, 2, *y.shape[1:])).astype("float32") * 0.1
    x[:, 1] += np.roll(y, 2, 1) * 2.0 - 1
    mask = np.ones(y.shape, bool)
    copies.clear()
    assert_same(evaluate(*map(there, (x, y)), mask=there(mask)), evaluate(x, y, mask=mask))
    assert sum(copies) < y.size


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_unusual_scores(copies: list[int], dtype: str) -> None:
    """The first of equal ones wins; NaN is the largest, and above no threshold."""
    least = np.finfo(dtype).smallest_subnormal
    values = np.array([0, -0.0, least, -least, 1, -1, np.inf, -np.inf, np.nan, -np.nan], dtype)
    x = np.stack(np.meshgrid(values, values, values), 0).reshape(1, 3, -1)
    y = np.arange(x.shape[2])[None] % 3
    total = ConfusionAccumulator(classes=3).update(OnDevice(x), OnDevice(y))
    known = np.zeros((3, 3), int)
    np.add.at(known, (y[0], x[0].argmax(0)), 1)
    np.testing.assert_array_equal(total.matrix, known)
    total = ConfusionAccumulator(activation="sigmoid").update(OnDevice(x), OnDevice(y))
    np.testing.assert_array_equal(total.matrix[:, :, 1].sum(1), (x[0] > 0).sum(1))


@pytest.mark.parametrize("shape", [(3, 5, 67), (1, 8, 64), (2, 1, 1)])
@pytest.mark.parametrize("classes", [3, 200, 300, 1500])
def test_counts_of_many_classes(copies: list[int], classes: int, shape: tuple[int, ...]) -> None:
    """In shared memory, in global memory, and by sorting."""
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, classes, (2, *shape))
    p = np.where(rng.random(shape) < 0.5, y, p)
    dtype = np.uint8 if classes < 256 else np.uint16
    # At an odd address, the volumes are copied, or read number by number.
    odd = np.concatenate([np.zeros(1, dtype), p.ravel().astype(dtype)])[1:].reshape(shape)
    options: Any = {"classes": classes, "metrics": OVERLAP, "include_background": True}
    for prediction, reference in ((p, y), (odd, y.astype(dtype))):
        found = evaluate(OnDevice(prediction), OnDevice(reference), **options)
        assert_same(found, evaluate(p, y, **options))


@pytest.mark.parametrize("definition", ["deepmind", "monai"])
def test_distances_are_exact(copies: list[int], definition: str) -> None:
    """Float32 would round them: they then lie on the other side of a tolerance."""
    a, b = np.zeros((2, 1, 6, 20, 9), np.uint8)
    a[:, 2:4, 2:5, 3:6], b[:, 2:4, 5:8, 3:6] = 1, 1
    for size in (0.1, 0.7, 1 / 3):
        options: Any = {"definition": definition, "spacing": (0.9, size, 1.1)}
        for found, true in zip(
            surface_distances(OnDevice(a), OnDevice(b), **options)[0][0][:2],
            surface_distances(a, b, **options)[0][0][:2],
            strict=True,
        ):
            np.testing.assert_array_equal(found.distances, true.distances)
        options |= {"metrics": ("nsd",), "tolerance": 3 * size}
        assert_same(evaluate(OnDevice(a), OnDevice(b), **options), evaluate(a, b, **options))


@pytest.mark.parametrize("spacing", [(1e-3, 1.0, 1e4), (1e-6, 1.0, 1.0), (1e12, 3e12, 1e12)])
def test_spacings_that_are_far_apart(copies: list[int], spacing: tuple[float, ...]) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 1, 7, 8, 9)) < 0.05
    found, true = (
        surface_distances(of(a), of(b), classes=2, spacing=spacing)[0][0]
        for of in (OnDevice, np.uint8)
    )
    for each, known in zip(found[:2], true[:2], strict=True):
        np.testing.assert_allclose(each.distances, known.distances, rtol=1e-6)
        assert each.areas.sum() == pytest.approx(known.areas.sum(), rel=1e-6)


@pytest.mark.parametrize("empty", ["prediction", "reference", "both", "nothing counts"])
@pytest.mark.parametrize("definition", ["deepmind", "monai"])
def test_empty_masks(copies: list[int], empty: str, definition: str) -> None:
    a, b = np.zeros((2, 1, 5, 6, 7), np.uint8)
    a[:, 1:3, 2:4, 2:4], b[:, 1:3, 3:5, 2:4] = 1, 1
    if empty in ("prediction", "both"):
        a[...] = 0
    if empty in ("reference", "both"):
        b[...] = 0
    mask = np.full(a.shape, empty != "nothing counts")
    options: Any = {"classes": 2, "definition": definition}
    true = surface_distances(a, b, mask=mask, **options)[0][0]
    found = surface_distances(OnDevice(a), OnDevice(b), mask=OnDevice(mask), **options)[0][0]
    for each, known in zip(found[:2], true[:2], strict=True):
        np.testing.assert_array_equal(each.distances, known.distances)
    found = evaluate(OnDevice(a), OnDevice(b), mask=OnDevice(mask), **options)
    assert_same(found, evaluate(a, b, mask=mask, **options))


@pytest.mark.parametrize("value", [-1, 7, 1.5, np.nan, 70_000])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("classes", [None, 3])
def test_errors_are_those_of_the_processor(
    copies: list[int], classes: int | None, which: int, value: float
) -> None:
    arrays = list(np.zeros((2, 1, 4, 5), "float32"))
    arrays[which][0, 2, 3] = value
    if value == 7 and classes is None:  # a label like others
        assert_same(evaluate(*map(OnDevice, arrays)), evaluate(*arrays))
        return
    with pytest.raises(ValueError, match=r"expected") as true:
        evaluate(*arrays, classes=classes)
    with pytest.raises(ValueError, match=r"expected") as found:
        evaluate(*map(OnDevice, arrays), classes=classes)
    assert str(found.value) == str(true.value)


def test_lesions_and_arrays_beside(copies: list[int]) -> None:
    """Lesions are found in CPU memory; a reference and a mask may be there."""
    rng = np.random.default_rng(0)
    y = blobs(rng, (1, 9, 10, 11), 2).astype("int64")
    p = np.where(rng.random(y.shape) < 0.1, 1 - y, y)
    mask = rng.random(y.shape) < 0.9
    options: Any = {"metrics": ("dice", "pq", "lesion_recall", "hd95")}
    true = evaluate(p, y, mask=mask, **options)
    assert_same(evaluate(OnDevice(p), OnDevice(y), mask=OnDevice(mask), **options), true)
    assert_same(evaluate(OnDevice(p), y, mask=mask, **options), true)
    assert_same(evaluate(p, OnDevice(y), mask=OnDevice(mask), **options), true)


def test_without_cupy_they_are_computed_in_cpu_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.install(monkeypatch)

    def absent(place: Any) -> Any:
        raise ImportError("no CuPy")

    monkeypatch.setattr(cuda, "CudaDevice", absent)
    y = np.arange(24).reshape(1, 4, 6) % 3
    assert_same(evaluate(OnDevice(y), OnDevice(y[:, ::-1])), evaluate(y, y[:, ::-1]))


def test_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = need("torch")
    x = torch.randn(1, 300, 6, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = x.argmax(1).roll(1, 2)
    options: Any = {"metrics": ("dice", "hd95"), "classes": {"many": tuple(range(150))}}
    true = evaluate(x.float(), y, **options)
    launched = stand_in.install_for_torch(monkeypatch)
    assert_same(evaluate(x.requires_grad_(), y, **options), true)
    for kernel in ("likeliest", "confusion", "surface_distances"):
        assert f"fastloss_{kernel}" in launched


# ------------------------------------------------------------------ memory


def run_on(device: Any) -> None:
    """The kernels, over arrays that end where their memory does."""
    cuda.CudaDevice = lambda place: device  # type: ignore[assignment, misc]
    frameworks._SPECIAL[OnDevice.__module__] = stand_in.StandInAdapter  # type: ignore[assignment]
    kept = []

    def exact(self: Any, shape: tuple[int, ...], dtype: str) -> Any:
        memory = device.empty(prod(shape) * np.dtype(dtype).itemsize)
        kept.append(memory)
        return OnDevice(np.ndarray(shape, dtype, memory.owner))

    def copied(self: Any, values: Any, dtype: str) -> Any:
        made = exact(self, np.shape(values), dtype)
        made.values[...] = values
        return made

    stand_in.StandInPlace.empty = exact  # type: ignore[method-assign]
    stand_in.StandInPlace.array = copied  # type: ignore[method-assign]
    place = stand_in.StandInPlace(0)
    rng = np.random.default_rng(0)
    for shape, classes, definition in (
        ((2, 5, 6, 7), 3, "deepmind"),
        ((1, 9, 35), 3, "deepmind"),
        ((1, 5, 9), 300, "monai"),
    ):
        y = blobs(rng, shape, 3)
        x = rng.normal(size=(shape[0], classes, *shape[1:])).astype("float32")
        mask = rng.random(shape) < 0.7
        for prediction in (x, x.argmax(1)):
            arrays = [place.array(a, a.dtype.name) for a in (prediction, y, mask)]
            options: Any = {"classes": classes, "definition": definition, "ignore_index": 2}
            found = evaluate(*arrays[:2], mask=arrays[2], **options)
            with fl.use_backend("reference"):
                assert_same(found, evaluate(prediction, y, mask=mask, **options))


def test_memory() -> None:
    """Under the compiler's sanitizers; a report ends the process."""
    try:
        cuda_emulation._command("address")
    except OSError as error:
        _absent("sanitizer.address,undefined", error)
    script = (
        "import sys, cuda_cases, test_cuda_metrics as t;"
        "t.run_on(cuda_cases.SanitizedDevice(sys.argv[1], ()))"
    )
    found = cuda_emulation.sanitized_python(script, "address", "address,undefined")
    assert (found.returncode, found.stderr) == (0, "")
