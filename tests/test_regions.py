"""Losses of every region of a sample: terms treat each region like a sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from lesion_volumes import stretches
from support import BACKENDS, example, need_backend, one_hot

import fastloss as fl
from fastloss.backends import use_backend

TERMS = [
    fl.Dice(),
    fl.Dice(squared=True, include_background=False, weight=[1.0, 2.0]),
    fl.Jaccard(reduction="sum"),
    fl.Tversky(alpha=0.3, beta=0.7, gamma=1.5),
    fl.GeneralizedDice(),
]
LINEAR = [
    fl.CrossEntropy(weight=[1.0, 2.0, 0.5], label_smoothing=0.1),
    fl.Focal(gamma=1.5),
    fl.Brier(),
    fl.MeanAbsoluteError(),
    fl.PolyCrossEntropy(),
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    with use_backend(need_backend(request.param)):
        yield request.param


def volume(seed: int = 0, dtype: Any = np.float64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, labels, and regions: four in the first sample, two in the second, and −1."""
    x, y = example(2, 3, (9, 10), seed=seed, dtype=dtype)
    regions = np.empty(y.shape, np.int64)
    rows, columns = np.indices(y.shape[1:])
    regions[0] = (rows > 4) * 2 + (columns > 6)
    regions[1] = columns > 3
    regions[:, 0, :4] = -1
    return x, y, regions


def alone(
    term: fl.Term, x: np.ndarray, y: np.ndarray, regions: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Value and gradient of every region, by calls with that region as the voxel weight."""
    values, gradients = [], []
    for b in range(len(x)):
        for r in range(regions[b].max() + 1):
            mask = (regions[b : b + 1] == r).astype(np.float64)
            value, gradient = term.value_and_grad(x[b : b + 1], y[b : b + 1], mask)
            whole = np.zeros_like(x)
            whole[b] = gradient[0]
            values.append(value)
            gradients.append(whole)
    return values, gradients


@pytest.mark.parametrize("term", TERMS, ids=repr)
def test_region_terms(backend: str, term: fl.Term) -> None:
    x, y, regions = volume()
    values, gradients = alone(term, x, y, regions)
    over = np.sum if term.reduction == "sum" else np.mean
    value, gradient = term.value_and_grad(x, y, regions=regions)
    assert value == pytest.approx(over(values), rel=1e-10)
    assert np.allclose(gradient, over(gradients, axis=0), atol=1e-12)


@pytest.mark.parametrize("term", LINEAR, ids=repr)
def test_terms_of_single_voxels(backend: str, term: fl.VoxelwiseTerm) -> None:
    x, y, regions = volume()
    each = type(term)(**{**vars_of(term), "reduction": "none"})
    values, _ = alone(term, x, y, regions)
    found = each(x, y, regions=regions)
    assert found.shape == (8, 1)
    assert np.allclose(found[[0, 1, 2, 3, 4, 5], 0], values, rtol=1e-10)
    assert (found[[6, 7]] == 0).all()  # the second sample has two regions
    # In sums over all voxels, regions only decide which voxels count.
    counted = (regions >= 0).astype(np.float64)
    right = term.value_and_grad(x, y, counted)
    value, gradient = term.value_and_grad(x, y, regions=regions)
    assert value == pytest.approx(right[0], rel=1e-12)
    assert np.allclose(gradient, right[1], atol=1e-13)


def vars_of(term: fl.Term) -> dict[str, Any]:
    names = ("weight", "label_smoothing", "gamma", "alpha", "epsilon")
    return {name: getattr(term, name) for name in names if hasattr(term, name)}


def test_every_region_has_a_value_of_its_own(backend: str) -> None:
    x, y, regions = volume()
    value = fl.Dice(reduction="none")(x, y, regions=regions)
    assert value.shape == (8, 3)
    values, _ = alone(fl.Dice(reduction="none"), x, y, regions)
    assert np.allclose(value[:6], np.concatenate(values), rtol=1e-10)
    assert (value[6:] == 0).all()


def test_batch_joins_the_regions_of_one_number(backend: str) -> None:
    x, y, regions = volume()
    term = fl.Dice(batch=True, reduction="none")
    value, gradient = term.value_and_grad(
        x, y, regions=regions, upstream=np.ones((4, 3), np.float64)
    )
    for r in range(4):
        mask = (regions == r).astype(np.float64)
        assert np.allclose(value[r], term(x, y, mask)[0], rtol=1e-10)
    whole = sum(
        term.value_and_grad(x, y, (regions == r).astype(np.float64), upstream=np.ones((1, 3)))[1]
        for r in range(4)
    )
    assert np.allclose(gradient, whole, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["int8", "uint8", "int32", "uint64"])
def test_dtypes_and_strides(backend: str, dtype: str, kind: str) -> None:
    x, y, regions = volume(dtype=dtype)
    regions = np.maximum(regions, 0)
    loss = fl.Dice() + fl.CrossEntropy()
    wide = np.repeat(regions.astype(kind), 3, axis=-1)[..., ::3]
    value, gradient = loss.value_and_grad(x, y, regions=wide[:, None])
    right = loss.value_and_grad(x.astype(np.float64), y, regions=regions)
    assert value == pytest.approx(right[0], rel=1e-6)
    assert gradient.dtype == x.dtype
    assert np.allclose(gradient, right[1], atol=1e-3 if dtype == "float16" else 1e-7)


def test_hundreds_of_regions_ignored_labels_dense_targets_and_sigmoid(backend: str) -> None:
    rng = np.random.default_rng(5)
    x, y = example(1, 3, (30, 40), dtype=np.float64)
    regions = np.arange(1200).reshape(1, 30, 40) // 4
    y[0, :3] = 255
    loss = fl.Loss(fl.Dice(), fl.CrossEntropy(), ignore_index=255)
    # A region whose voxels are all ignored is excluded from the mean.
    values = [
        fl.Loss(fl.Dice(), ignore_index=255)(x, y, (regions == r).astype(float))
        for r in range(30, 300)
    ]
    right = np.mean(values) + fl.Loss(fl.CrossEntropy(), ignore_index=255)(x, y)
    assert loss(x, y, regions=regions) == pytest.approx(right, rel=1e-10)
    dense = one_hot(rng.integers(0, 3, (1, 30, 40)), 3)
    sigmoid = fl.Loss(fl.Dice(), activation="sigmoid")
    values = [sigmoid(x, dense, (regions == r).astype(float)) for r in range(300)]
    assert sigmoid(x, dense, regions=regions) == pytest.approx(np.mean(values), rel=1e-10)


def test_chunks_may_lack_regions(backend: str) -> None:
    x, y, regions = volume()
    loss = fl.Dice() + fl.CrossEntropy()
    right = loss.value_and_grad(x, y, regions=regions)
    cuts = [slice(0, 2), slice(2, 9)]  # the first chunk lacks two regions
    chunks = [(x[:, :, c], y[:, c], regions[:, c]) for c in cuts]
    total = sum(loss.statistics(a, b, regions=r) for a, b, r in chunks)
    assert loss.value(total) == pytest.approx(right[0], rel=1e-12)
    parts = [loss.gradient(a, b, regions=r, statistics=total) for a, b, r in chunks]
    assert np.allclose(np.concatenate(parts, axis=2), right[1], atol=1e-14)


def test_bits_for_any_number_of_threads() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 4, 40, 41, 42)).astype(np.float32)
    y = rng.integers(0, 4, (2, 40, 41, 42), dtype=np.uint8)
    regions = rng.integers(-1, 60, y.shape)
    regions.reshape(2, -1)[:, :60] = np.arange(60)
    before, found = fl.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            fl.set_num_threads(threads)
            found.append((fl.Dice() + fl.Focal()).value_and_grad(x, y, regions=regions))
    finally:
        fl.set_num_threads(before)
    for value, gradient in found[1:]:
        assert value == found[0][0]
        assert (gradient == found[0][1]).all()


def regions_in_stretches(
    rng: np.random.Generator, voxels: int, numbers: int, longest: int
) -> np.ndarray:
    each = stretches(rng, voxels, numbers, longest)
    each[-numbers:] = np.arange(numbers)  # none is left out
    return each


RUNS = [
    (2, "int8", 90, 40),
    (2, "uint8", 50, 30),
    (3, "int16", 200, 24),
    (3, "int16", 25, 40),
    (4, "uint8", 7, 600),
    (4, "int8", 60, 20),
    (4, "int64", 130, 33),
]


@pytest.mark.parametrize(("classes", "kind", "count", "longest"), RUNS)
def test_runs_of_voxels(classes: int, kind: str, count: int, longest: int) -> None:
    """Regions and labels in stretches of any length, as lesions and cells have them."""
    rng = np.random.default_rng(classes + longest)
    voxels = 24_007
    x = (3 * rng.normal(size=(2, classes, voxels))).astype(np.float32)
    y = np.stack([stretches(rng, voxels, classes, 4 * longest) for _ in x])
    regions = np.stack([regions_in_stretches(rng, voxels, count, longest) for _ in x])
    loss = fl.Dice(include_background=False) + fl.CrossEntropy()
    with use_backend("reference"):
        right = loss.value_and_grad(x.astype(np.float64), y, regions=regions)
    without = regions.copy()
    without[0, 9_000:9_100] = -1
    far = x.copy()
    far[:, :, 3000:3010] *= 40
    for labels in (y.astype(np.uint8), y):
        value, gradient = loss.value_and_grad(x, labels, regions=regions.astype(kind))
        assert value == pytest.approx(right[0], rel=1e-6)
        assert np.allclose(gradient, right[1], rtol=1e-4, atol=1e-9)
        for logits, given in ((x, without), (far, regions)):
            value, gradient = loss.value_and_grad(logits, labels, regions=given)
            with use_backend("reference"):
                other = loss.value_and_grad(logits.astype(np.float64), y, regions=given)
            assert value == pytest.approx(other[0], rel=1e-6)
            assert np.allclose(gradient, other[1], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("classes", [2, 3, 4, 5])
def test_bits_of_runs(classes: int, dtype: str) -> None:
    """For any number of threads, and wherever the gradient lies, which decides on the tiles."""
    rng = np.random.default_rng(classes)
    voxels = (1 << 20) // (np.dtype(dtype).itemsize * classes) + 1037
    x = (3 * rng.normal(size=(1, classes, voxels))).astype(dtype)
    x[0, :, rng.choice(voxels, 30, replace=False)] *= 30
    y = stretches(rng, voxels, classes, 90)[None].astype(np.uint8)
    loss = fl.Dice() + fl.CrossEntropy()
    memory = np.empty(x.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64
    before = fl.get_num_threads()
    for count in (20, 50, 70):
        regions = regions_in_stretches(rng, voxels, count, 40)[None].astype(np.int8)
        regions[0, :3000] = 5
        found = []
        try:
            for threads, offset in ((1, 0), (2, 0), (5, 4), (1, 16), (1, 48), (1, 60)):
                fl.set_num_threads(threads)
                out = memory[start + offset :][: x.nbytes].view(dtype).reshape(x.shape)
                value, gradient = loss.value_and_grad(x, y, regions=regions, out=out)
                found.append((value, gradient.copy()))
        finally:
            fl.set_num_threads(before)
        for value, gradient in found[1:]:
            assert value == found[0][0]
            assert gradient.tobytes() == found[0][1].tobytes()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda r: r.astype(np.float32), TypeError, "regions: expected integers, got float32"),
        (lambda r: r >= 0, TypeError, "regions: expected integers, got bool"),
        (lambda r: r[:1], ValueError, r"regions: expected \(2, 9, 10\).* got shape \(1, 9, 10\)"),
        (
            lambda r: np.where(r > 0, 2 * r, r),
            ValueError,
            r"regions: .*sample 0 has none of region 1",
        ),
        (lambda r: np.where(r < 0, -2, r), ValueError, r"regions: expected numbers in .* got -2"),
        (lambda r: "lesions", TypeError, "regions: .*str"),
    ],
)
def test_bad_regions_are_named(change: Any, kind: type[Exception], message: str) -> None:
    x, y, regions = volume()
    with pytest.raises(kind, match=message):
        fl.Dice()(x, y, regions=change(regions))


@pytest.mark.parametrize(
    ("count", "kind", "message"),
    [
        (3, ValueError, r"regions: expected numbers in \[-1, 3\), got 3"),
        (0, ValueError, "region_count: expected a number of at least 1"),
        (2.0, TypeError, "region_count: expected an integer, got 2.0"),
    ],
)
def test_bad_region_counts_are_named(count: Any, kind: type[Exception], message: str) -> None:
    x, y, regions = volume()
    with pytest.raises(kind, match=message):
        fl.Dice()(x, y, regions=regions, region_count=count)


def test_bad_numbers_of_every_type_are_named() -> None:
    voxels = 200_003
    x, y = np.zeros((1, 2, voxels), np.float32), np.zeros((1, voxels), np.uint8)
    loss = fl.Dice() + fl.CrossEntropy()
    kinds = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    for place, kind in enumerate(kinds):
        most = int(np.iinfo(kind).max)
        for wrong in [most, -2] if kind.startswith("i") else [most]:
            regions = np.full((1, voxels), 3, kind)
            regions[0, (place * 30_011) % voxels] = wrong
            with pytest.raises(ValueError, match=rf"expected numbers in \[-1, 9\), got {wrong}$"):
                loss(x, y, regions=regions, region_count=9)
