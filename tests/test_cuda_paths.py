"""Kinds of calls with special CUDA paths: two classes, and few channels-last classes.

These tests use kernels compiled for one kind of call, as on a GPU; the tests of all backends use
the build that serves any call.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import stand_in
from device_backend import EmulatedDevice
from support import EMULATED, assert_agree, example, need_backend, one_hot, reference

import fastloss as fl
from fastloss.arrays import Arrays
from fastloss.backends import load_backend
from fastloss.backends.cuda import call as cuda_call
from fastloss.backends.cuda import engine
from fastloss.backends.cuda.layout import WIDEST, layout_of
from fastloss.backends.reference import BACKEND as REFERENCE
from fastloss.request import Request
from fastloss.sums import NAMED, Sum, as_sum

DICE_CE = fl.Dice() + fl.CrossEntropy()
LOSSES = {
    "dice_ce": DICE_CE,
    "many terms": fl.Loss(
        fl.CrossEntropy(label_smoothing=0.1), fl.Focal(gamma=1.5), fl.Dice(squared=True)
    ),
    "top-k": fl.TopKCrossEntropy(k=30) + fl.Dice(),
}


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Any:
    backend = load_backend(need_backend(EMULATED))
    monkeypatch.setattr(backend, "device", EmulatedDevice(special=True))
    with fl.use_backend(EMULATED):
        yield


def channels_last(array: np.ndarray) -> np.ndarray:
    """The same numbers in channels-last layout."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)


def check(loss: Any, x: np.ndarray, y: np.ndarray, w: Any = None) -> None:
    expected = reference(loss, x, y, w)
    assert_agree(*loss.value_and_grad(x, y, w), expected)
    assert_agree(*loss.value_and_grad(x, y, w, out=x), expected)  # in place


# Every path compiles kernels of its own: all losses in float32, and one in all dtypes.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in LOSSES), ("dice_ce", "float16"), ("dice_ce", "float64")],
)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("classes", [2, 4])
def test_few_classes(name: str, classes: int, last: bool, dtype: str) -> None:
    x, y = example(2, classes, (8, 6, 24), dtype=dtype)
    y = y.astype(np.uint8)
    check(LOSSES[name], channels_last(x) if last else x, y)


@pytest.mark.parametrize("spatial", [(1,), (2,), (6,), (31,), (4, 33)])
def test_few_classes_last_of_any_size(spatial: tuple[int, ...]) -> None:
    """Numbers of voxels and addresses may be no multiple of a 16-byte access."""
    for classes in (2, 4):
        x, y = example(3, classes, spatial, dtype=np.float32)
        check(DICE_CE, channels_last(x), y)


def test_two_classes_weighted_and_ignored() -> None:
    x, y = example(2, 2, (8, 32), dtype=np.float32)
    y[:, 2] = 255
    x[0, :, 2, :4] = [[np.nan], [np.inf]]  # of ignored voxels
    w = np.random.default_rng(0).uniform(0, 2, y.shape).astype(np.float32)
    w[1, 5] = 0
    loss = fl.Loss(fl.CrossEntropy(weight=[0.3, 2.0]), fl.Dice(), ignore_index=255)
    for logits in (x, channels_last(x)):
        check(loss, logits.copy(), y, w)
        check(loss, logits.copy(), y)


@pytest.mark.parametrize("term", [fl.Dice(), fl.CrossEntropy(), fl.Tversky(alpha=0.2, beta=0.8)])
def test_one_term_of_two_classes(term: fl.Term) -> None:
    x, y = example(2, 2, (8, 32), dtype=np.float32)
    check(fl.Loss(term), x, y)


def test_infinite_logits_of_two_classes() -> None:
    x, y = example(1, 2, (64,), dtype=np.float32)
    x[0, :, 0], x[0, :, 1], x[0, :, 2] = np.inf, -np.inf, [-np.inf, 3.0]
    y[0, 2] = 1  # the likely class, so that the loss is finite
    check(DICE_CE, x.copy(), y)
    y[0, 2] = 0
    with np.errstate(invalid="ignore"):
        assert DICE_CE(x, y) == np.inf
    x[0, 0, 7] = np.nan
    assert np.isnan(DICE_CE(x, y))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_many_equal_logits_of_two_classes(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each voxel doubles the product of 1 + e, whose logarithm is taken before it overflows."""
    monkeypatch.setattr(cuda_call, "_BLOCKS", 1)  # which then processes all tiles
    x = np.zeros((1, 2, 40, 32, 32), dtype)
    y = np.ones((1, 40, 32, 32), np.uint8)
    value, gradient = fl.CrossEntropy().value_and_grad(x, y)
    np.testing.assert_allclose(value, math.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient[:, 0] * y.size, 0.5, rtol=1e-3)


@pytest.mark.parametrize("confident", [8.0, 30.0])
def test_small_losses_of_two_classes_are_exact(confident: float) -> None:
    """Where 1 + e^−d is 1 in float32, the loss is still e^−d."""
    x = np.zeros((1, 2, 4, 64), np.float32)
    y = np.random.default_rng(0).integers(0, 2, (1, 4, 64))
    np.put_along_axis(x, y[:, None], confident, axis=1)
    expected = math.log1p(math.exp(-confident))
    np.testing.assert_allclose(fl.CrossEntropy()(x, y), expected, rtol=2e-6)


@pytest.mark.parametrize("label", [2, 200])
def test_bad_labels_among_bytes(label: int) -> None:
    x, y = example(1, 2, (64,), dtype=np.float32)
    y = y.astype(np.uint8)
    y[0, 13] = label
    with pytest.raises(ValueError, match=rf"^target: .*the first is {label}$"):
        DICE_CE(x, y)


@pytest.mark.parametrize("weight", [None, 0.5])
@pytest.mark.parametrize(
    "loss",
    [
        fl.Loss(fl.Dice(), fl.CrossEntropy(label_smoothing=0.1), activation="sigmoid"),
        fl.Loss(fl.Focal(gamma=2, alpha=0.25), activation="sigmoid"),
    ],
    ids=["smooth", "focal"],
)
def test_infinite_logits_of_sigmoid(loss: fl.Loss, weight: float | None) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 40)).astype(np.float32)
    y = rng.integers(0, 2, x.shape).astype(np.uint8)
    w = None if weight is None else np.full((2, 40), weight, np.float32)
    x[0, 1, 5], y[0, 1, 5] = np.inf, 1
    x[1, 2, 9], y[1, 2, 9] = -np.inf, 0
    with np.errstate(invalid="ignore"):
        expected = reference(loss, x, y, w)
        assert_agree(*loss.value_and_grad(x, y, w), expected)
        y[0, 1, 5] = 0  # the most unlikely class
        assert loss(x, y, w) == np.inf
        x[0, 0, 0] = np.nan
        assert np.isnan(loss(x, y, w))


@pytest.mark.parametrize("classes", [2, 3, 20])
@pytest.mark.parametrize("kind", ["softmax", "softmax dense", "sigmoid dense", "none dense"])
def test_each_sum_alone(kind: str, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path computes each of its sums without those that usually accompany it."""
    for name in (*NAMED, "focal:2.0", "focal_rest:2.0"):
        backend = load_backend(EMULATED)
        monkeypatch.setattr(backend, "device", EmulatedDevice())
        activation, _, dense = kind.partition(" ")
        request = Request(activation, bool(dense), None, frozenset({as_sum(name)}))
        x, y = example(2, classes, (5, 8), activation=activation)
        target = one_hot(y, classes) if dense else y
        arrays = Arrays(x, "float64", target, target.dtype.name, bool(dense), None, "")
        shape = (len(request.sums), 2, classes)
        found = [(np.empty(shape), np.empty(2), np.empty_like(x)) for _ in range(2)]
        coefficients = np.random.default_rng(0).normal(size=shape)
        for (sums, voxels, out), each in zip(found, (backend, REFERENCE), strict=True):
            each.reduce(request, arrays, sums, voxels)
            each.apply(request, arrays, coefficients, out)
        for own, expected in zip(*found, strict=True):
            np.testing.assert_allclose(own, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("item", [2, 4])
def test_layouts_of_any_number_of_classes(item: int, last: bool) -> None:
    """The warps' threads hold all classes, and blocks have a valid number of warps."""
    for classes, sums in itertools.product(range(1, 16 * 24), (0, 1, 2, 3)):
        layout = layout_of(classes, item, sums, last, sums > 0, 2)
        each = -(-classes // layout.warps)
        assert each <= WIDEST
        assert layout.groups * layout.warps <= 32
        assert each * sums <= layout.held


@pytest.mark.parametrize("classes", [2, 14, 105, 200])
def test_what_a_call_holds(classes: int) -> None:
    """The sums of all blocks take less than 1 MiB, however large the volume."""
    x = np.empty((2, classes, 128, 128, 128), np.float32)
    y = np.empty((2, 128, 128, 128), np.uint8)
    passes = DICE_CE.passes(x, y, None)
    work = engine.Work("reduce")
    plan, _ = engine.plan_of(EmulatedDevice(), passes.request, passes.arrays, None, work)
    assert plan.grid >= EmulatedDevice.multiprocessors * 0.8
    assert plan.partial + 16 * len(passes.request.sums) * 2 * classes < 1 << 20


@pytest.mark.parametrize("classes", [2, 14, 40])
def test_a_fault_in_one_block(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault makes the whole loss NaN, even if the combine step adds up the blocks' sums."""
    launched = stand_in.install(monkeypatch)
    x, y = example(2, classes, (40, 32), dtype=np.float32)
    y[1, 39, 31] = classes
    value, gradient = DICE_CE.value_and_grad(stand_in.OnDevice(x), stand_in.OnDevice(y))
    assert "fastloss_finish" not in launched
    assert np.isnan(value.values)
    assert np.isnan(gradient.values[1]).all()


def test_thousands_of_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums of the blocks stay within their memory limit."""
    backend: Any = load_backend(EMULATED)
    monkeypatch.setattr(backend, "device", EmulatedDevice())
    rows, total = 20_000, Sum("one", "p")
    x, y = example(1, 2, (80, 90), activation="none")
    regions = np.arange(y.size).reshape(y.shape) * rows // y.size
    request = Request("none", False, None, frozenset({"cross_entropy", total}))
    arrays = Arrays(x, "float64", y, "int64", False, None, "", (), regions, "int64", rows)
    plan, _ = engine.plan_of(backend.device, request, arrays, None, engine.Work("reduce"))
    assert plan.partial <= 64 << 20
    assert plan.grid > 1
    sums, voxels = np.empty((len(request.sums), rows, 2)), np.empty(rows)
    backend.reduce(request, arrays, sums, voxels)
    np.testing.assert_array_equal(voxels, np.bincount(regions.reshape(-1), minlength=rows))
    expected = [np.bincount(regions.reshape(-1), p.reshape(-1), rows) for p in x[0]]
    np.testing.assert_allclose(sums[request.index[total]].T, expected, rtol=1e-12)


def test_cross_entropy_alone_of_many_classes() -> None:
    """Cross-entropy alone needs only sums of weight g, none over all classes."""
    x, y = example(2, 20, (64,), dtype=np.float32)
    check(fl.Loss(fl.CrossEntropy()), x, y)


@pytest.mark.parametrize(
    ("classes", "dtype"),
    [
        *((classes, "float32") for classes in (2, 3, 6, 8, 14, 16, 20, 33, 40)),
        *((classes, "float16") for classes in (2, 3, 8, 14, 33)),
        *((classes, "float64") for classes in (3, 20)),
    ],
)
def test_channels_last_of_any_row(classes: int, dtype: str) -> None:
    """Staged tiles work with accesses of all widths, padded rows, and partial tiles."""
    for batch in (1, 2):  # the second sample may be misaligned for 16-byte accesses
        x, y = example(batch, classes, (5, 63), dtype=dtype)
        check(DICE_CE, channels_last(x), y)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("classes", [3, 14, 40])
def test_channels_last_of_sigmoid(classes: int, dtype: str) -> None:
    x, y = example(1, classes, (5, 63), dtype=dtype)
    check(fl.Loss(fl.Dice(), fl.CrossEntropy(), activation="sigmoid"), channels_last(x), y)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("classes", [14, 40])
def test_channels_last_that_do_not_count(classes: int, dtype: str) -> None:
    x, y = example(1, classes, (5, 64), dtype=dtype)
    y[:, 2] = 255
    x[0, :, 2, :4] = np.nan
    loss = fl.Loss(fl.CrossEntropy(), fl.Dice(), ignore_index=255)
    w = np.random.default_rng(0).integers(0, 3, y.shape).astype(np.float32)
    check(loss, channels_last(x), y)
    check(loss, channels_last(x), y, w)
