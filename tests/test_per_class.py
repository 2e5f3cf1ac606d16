"""Losses of the lesions of each class apart, against loops over classes and lesions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lesion_volumes import BLOBS, CELLS, WEIGHT, stretches, volume
from support import assert_agree, finite_differences, need, need_backend, one_hot, reference

import fastloss as fl
from fastloss.backends import use_backend

SMOOTH = 1e-5


# ------------------------------------------------------------------ the loops


def regions_of(mask: np.ndarray, mode: str, spacing: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """The voxels and the region of every lesion of one class in one sample."""
    ndimage = need("scipy.ndimage")
    numbers, count = ndimage.label(mask, np.ones((3,) * mask.ndim))
    lesions = [numbers == k for k in range(1, count + 1)]
    if mode == BLOBS:
        return [(lesion, lesion | ~mask) for lesion in lesions]
    if not lesions:
        return []
    each = [ndimage.distance_transform_edt(~lesion, sampling=spacing) for lesion in lesions]
    nearest = np.argmin(np.round(each, 9), axis=0)
    return [(lesion, nearest == k) for k, lesion in enumerate(lesions)]


def dice_ce(p: np.ndarray, g: np.ndarray, m: np.ndarray) -> tuple[float, np.ndarray]:
    """Dice and cross-entropy of a class and the rest, and the derivative by p."""
    above, below = 2 * (m * p * g).sum() + SMOOTH, (m * (p + g)).sum() + SMOOTH
    losses = -np.where(g, np.log(p), np.log1p(-p))
    slopes = -np.where(g, 1 / p, -1 / (1 - p))
    value = 1 - above / below + (m * losses).sum() / m.sum()
    return value, m * (above / below**2 - 2 * g / below + slopes / m.sum())


def looped(
    x: np.ndarray,
    masks: np.ndarray,
    w: np.ndarray,
    *,
    activation: str = "softmax",
    mode: str = CELLS,
    weight: str = "equal",
    without: str = "whole",
    spacing: Any = None,
    first: int = 1,
) -> tuple[float, np.ndarray]:
    """Value and gradient: one class, one lesion after the other."""
    if activation == "softmax":
        p = np.exp(x - x.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
    else:
        p = 1 / (1 + np.exp(-x))
    by_p, values, counted = np.zeros(x.shape), [], []
    for b in range(len(x)):
        of_classes = []
        for c in range(first, x.shape[1]):
            lesions = []
            for lesion, region in regions_of(masks[b, c], mode, spacing):
                volume = float((lesion * w[b]).sum())
                if volume > 0:
                    one = dice_ce(p[b, c], masks[b, c], w[b] * region)
                    lesions.append((volume ** WEIGHT[weight], *one))
            if not lesions and without == "whole" and w[b].any():
                lesions = [(1.0, *dice_ce(p[b, c], masks[b, c], w[b]))]
            if lesions:
                total = sum(share for share, _, _ in lesions)
                of_classes.append(sum(share * value for share, value, _ in lesions) / total)
                by_p[b, c] = sum(share * slope for share, _, slope in lesions) / total
        if of_classes:
            values.append(np.mean(of_classes))
            by_p[b] /= len(of_classes)
            counted.append(b)
    if not values:
        return 0.0, np.zeros_like(x)
    by_p /= len(values)
    if activation == "softmax":
        return float(np.mean(values)), p * (by_p - (p * by_p).sum(axis=1, keepdims=True))
    return float(np.mean(values)), p * (1 - p) * by_p


# ------------------------------------------------------------------ values and gradients


@pytest.mark.parametrize("mode", [CELLS, BLOBS])
def test_loops_over_classes_and_lesions(backend: str, mode: str) -> None:
    x, y = volume(1, 3, 4, (6, 7, 8))
    y[0][y[0] == 2] = 0  # a class without lesions
    y[1] = 0  # no lesion at all
    w = np.ones(y.shape)
    for options in (
        {},
        {"without": "skip", "weight": "inverse_volume"},
        {"weight": "inverse_sqrt_volume"},
    ):
        expected = looped(x, one_hot(y, 4, bool), w, mode=mode, **options)
        loss = fl.PerRegion(fl.Dice() + fl.CrossEntropy(), regions=mode, per_class=True, **options)
        value, gradient = loss.value_and_grad(x, y)
        assert value == pytest.approx(expected[0], rel=1e-9)
        assert np.allclose(gradient, expected[1], atol=1e-12)
        if "without" in options:
            assert not gradient[1].any()
    narrow = x.astype(np.float32)
    assert_agree(*loss.value_and_grad(narrow, y), reference(loss, narrow, y))


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 3),
    classes=st.integers(2, 4),
    spatial=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    density=st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0]),
    mode=st.sampled_from([CELLS, BLOBS]),
    weight=st.sampled_from(list(WEIGHT)),
    without=st.sampled_from(["whole", "skip"]),
    overlap=st.booleans(),
    ignored=st.booleans(),
    weighted=st.booleans(),
)
def test_any_lesions(
    seed: int,
    batch: int,
    classes: int,
    spatial: list[int],
    density: float,
    mode: str,
    weight: str,
    without: str,
    overlap: bool,
    ignored: bool,
    weighted: bool,
) -> None:
    x, y = volume(seed, batch, classes, tuple(spatial), density)
    rng = np.random.default_rng(seed)
    options: dict[str, Any] = {"mode": mode, "weight": weight, "without": without}
    w = rng.choice([0.0, 0.5, 2.0], y.shape) if weighted else np.ones(y.shape)
    counted, target, masks = w, y, one_hot(y, classes, bool)
    if overlap:
        masks = rng.uniform(size=x.shape) < density
        target = masks.astype(rng.choice(["uint8", "float32"]))
        options |= {"activation": "sigmoid", "first": 0}
    elif ignored:
        target = np.where(rng.uniform(size=y.shape) < 0.2, 255, y)
        counted, masks = w * (target != 255), one_hot(target, classes, bool)
    expected = looped(x, masks, counted, **options)
    term = fl.PerRegion(
        fl.Dice() + fl.CrossEntropy(),
        regions=mode,
        weight=weight,
        without=without,
        per_class=True,
        include_background=overlap,
    )
    activation = "sigmoid" if overlap else "softmax"
    loss = fl.Loss(term, activation=activation, ignore_index=255)
    for name in ("cpu", "reference"):
        with use_backend(need_backend(name)):
            value, gradient = loss.value_and_grad(x, target, w)
        assert value == pytest.approx(expected[0], rel=1e-9, abs=1e-12)
        assert np.allclose(gradient, expected[1], atol=1e-11)


def test_each_class_is_a_task_of_its_own(backend: str) -> None:
    """The mean over the channels of what the same terms give for each alone."""
    rng = np.random.default_rng(2)
    x, masks = 2 * rng.normal(size=(2, 3, 6, 7)), rng.uniform(size=(2, 3, 6, 7)) < 0.15
    masks[:, 2] = False  # falls back on the whole sample
    terms = fl.GeneralizedDice() + 0.3 * fl.Focal() + fl.MCC() + 0.5 * fl.Brier()
    for mode in (CELLS, BLOBS):
        one = fl.Loss(fl.PerRegion(terms, regions=mode), activation="sigmoid")
        all_of_them = fl.PerRegion(terms, regions=mode, per_class=True, include_background=True)
        each = [one.value_and_grad(x[:, [c]], masks[:, [c]]) for c in range(3)]
        value, gradient = fl.Loss(all_of_them, activation="sigmoid").value_and_grad(x, masks)
        assert value == pytest.approx(np.mean([v for v, _ in each]), rel=1e-9)
        right = np.concatenate([g for _, g in each], axis=1) / 3
        assert np.allclose(gradient, right, atol=1e-12)


def test_two_classes_are_as_without_it() -> None:
    x, y = volume(3, 2, 2, (5, 6, 7))
    for kind in (fl.CCDiceCE, fl.BlobLoss):
        value, gradient = kind(per_class=True).value_and_grad(x, y)
        right = kind().value_and_grad(x, y)
        assert value == pytest.approx(right[0], rel=1e-12)
        assert np.allclose(gradient, right[1], atol=1e-14)
    assert fl.cc_dice_ce_loss(x, y, per_class=True) == fl.CCDiceCE(per_class=True)(x, y)
    assert fl.blob_loss(x, y, per_class=True) == fl.BlobLoss(per_class=True)(x, y)


def test_lesions_of_another_class_take_no_voxels() -> None:
    """A lesion keeps its cell where one of another class lies in it."""
    y = np.zeros((1, 9, 9), int)
    y[0, 1, 1] = 1
    wrong = np.zeros((1, 3, 9, 9))
    wrong[0, 1, 7, 7] = 1.0  # a false positive of class 1 beside a lesion of class 2
    both = y.copy()
    both[0, 8, 8] = 2
    apart, together = (
        fl.Loss(fl.PerRegion(fl.Dice(), per_class=own), activation="none") for own in (True, False)
    )
    right = wrong.copy()
    right[0, 1, 1, 1] = 1.0
    right[0, 2, 8, 8] = 1.0
    # The lesion of class 1 is found, with one voxel too many: Dice is 2 / 3.
    assert apart(right, both) == pytest.approx((1 / 3 + 0) / 2, abs=1e-4)
    assert together(right, both) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    "loss",
    [
        fl.CCDiceCE(weight="inverse_volume", per_class=True) + fl.Dice(),
        fl.BlobLoss(per_class=True),
        fl.PerRegion(
            fl.Tversky(), fl.CrossEntropy(label_smoothing=0.1), fl.LogCoshDice(), per_class=True
        ),
    ],
    ids=lambda loss: str(loss)[:30],
)
def test_finite_differences(loss: Any) -> None:
    x, y = volume(4, 2, 3, (3, 5), 0.3)
    y[1] = 0
    numeric = finite_differences(loss, x, y)
    assert np.allclose(loss.value_and_grad(x, y)[1], numeric, atol=1e-8)


def test_reductions() -> None:
    x, y = volume(5, 3, 4, (6, 7), 0.2)
    y[2] = 0
    each = [fl.CCDiceCE(per_class=True).value_and_grad(x[b : b + 1], y[b : b + 1]) for b in (0, 1)]
    none = fl.CCDiceCE(per_class=True, reduction="none", without="skip")
    found, gradient = none.value_and_grad(x, y, upstream=np.array([[1.0], [2.0], [3.0]]))
    assert found.shape == (3, 1)
    assert np.allclose(found[:, 0], [each[0][0], each[1][0], 0], rtol=1e-12)
    right = np.concatenate([each[0][1], 2 * each[1][1]])
    assert np.allclose(gradient[:2], right, atol=1e-14)
    assert not gradient[2].any()
    whole = fl.CCDiceCE(per_class=True, reduction="sum", without="skip")(x, y)
    assert whole == pytest.approx(each[0][0] + each[1][0], rel=1e-12)


# ------------------------------------------------------------------ regions made ahead, and parts


def test_regions_made_ahead(backend: str) -> None:
    x, y = volume(6, 2, 3, (6, 7, 5))
    loss = fl.CCDiceCE(per_class=True) + 0.5 * fl.Dice()
    ahead = loss.fields(y, classes=3)
    assert ahead["regions"].shape == (2, 3, 6, 7, 5)
    right = loss.value_and_grad(x, y)
    last = fl.Loss(loss, channel_axis=-1)
    of_last = last.fields(y, classes=3)
    assert of_last["regions"].shape == (2, 6, 7, 5, 3)
    for own, z, options in (
        (loss, x, {"fields": ahead}),
        (loss, x, {**ahead, "region_count": 100}),
        (last, np.moveaxis(x, 1, -1), {}),
        (last, np.moveaxis(x, 1, -1), of_last),
    ):
        value, gradient = own.value_and_grad(z, y, **options)
        assert value == pytest.approx(right[0], rel=1e-12)
        gradient = np.moveaxis(gradient, -1, 1) if own is last else gradient
        assert np.allclose(gradient, right[1], atol=1e-14)


def test_voxels_of_no_region(backend: str) -> None:
    """Where a class's map is −1, a voxel counts in the other classes' sums alone."""
    x, y = volume(7, 1, 3, (8, 9), 0.3)
    regions = np.zeros((1, 3, 8, 9), np.int16)
    regions[:, 1, :, 5:] = -1
    regions[:, 2, :4] = 1
    loss = fl.PerRegion(fl.Dice(), fl.CrossEntropy(), regions="given", per_class=True)
    value, gradient = loss.value_and_grad(x, y, regions=regions)
    p = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    places = [(1, np.s_[:, :5]), (2, np.s_[:4]), (2, np.s_[4:])]
    found = []
    for c, part in places:
        g = (y[0] == c)[part]
        found.append(dice_ce(p[0, c][part], g, np.ones(g.shape))[0])
    assert value == pytest.approx((found[0] + np.mean(found[1:])) / 2, rel=1e-9)
    for moved in (0.0, 1.0):  # softmax of the same numbers: p does not change
        x[:, :, :, 5:] += moved
        assert loss(x, y, regions=regions) == pytest.approx(value, rel=1e-9)
    with use_backend("reference"):
        expected = loss.value_and_grad(x, y, regions=regions)[1]
    assert np.allclose(gradient, expected, atol=1e-12)


def test_chunks(backend: str) -> None:
    x, y = volume(8, 2, 3, (9, 6, 5))
    loss = fl.CCDiceCE(per_class=True) + fl.Dice()
    right = loss.value_and_grad(x, y)
    regions = loss.fields(y, classes=3)["regions"]
    parts = [slice(0, 2), slice(2, 9)]
    chunks = [(x[:, :, c], y[:, c], {"regions": regions[:, :, c]}) for c in parts]
    total = sum(loss.statistics(a, b, **r) for a, b, r in chunks)
    assert loss.value(total) == pytest.approx(right[0], rel=1e-12)
    found = [loss.gradient(a, b, statistics=total, **r) for a, b, r in chunks]
    assert np.allclose(np.concatenate(found, axis=2), right[1], atol=1e-14)


def test_other_terms_are_those_of_whole_samples(backend: str) -> None:
    x, y = volume(9, 2, 3, (6, 7), 0.2)
    other = fl.Dice(batch=True) + fl.CrossEntropy(weight=[1.0, 2.0, 3.0])
    alone, lesions = other.value_and_grad(x, y), fl.CCDiceCE(per_class=True).value_and_grad(x, y)
    value, gradient = (0.5 * other + fl.CCDiceCE(per_class=True)).value_and_grad(x, y)
    assert value == pytest.approx(0.5 * alone[0] + lesions[0], rel=1e-10)
    assert np.allclose(gradient, 0.5 * alone[1] + lesions[1], atol=1e-13)


def test_gradient_by_soft_targets() -> None:
    rng = np.random.default_rng(10)
    x, g = rng.normal(size=(2, 3, 7)), rng.uniform(0.1, 0.9, (2, 3, 7))
    regions = rng.integers(-1, 2, (2, 3, 7))
    loss = fl.PerRegion(fl.Dice(), fl.CrossEntropy(), regions="given", per_class=True)
    found = loss.value_and_grad(x, g, regions=regions, target_grad=True)[2]
    for i in np.ndindex(g.shape):
        ends = []
        for step in (1e-6, -1e-6):
            moved = g.copy()
            moved[i] += step
            ends.append(float(loss(x, moved, regions=regions)))
        assert found[i] == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-7)


def test_explained() -> None:
    """Parts add up to the value, and a gain is the slope towards the right prediction."""
    x, y = volume(11, 2, 3, (6, 7), 0.2)
    loss = fl.Dice() + fl.PerRegion(fl.Dice(), fl.CrossEntropy(), per_class=True)
    found = loss.explain(x, y)
    assert sum(found.terms.values()) == pytest.approx(float(loss(x, y)))
    one = fl.Loss(fl.PerRegion(fl.CrossEntropy(), per_class=True))
    assert one.explain(x, y).map.sum() == pytest.approx(float(one(x, y)), rel=1e-9)
    p = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    dice = fl.Loss(fl.PerRegion(fl.Dice(), per_class=True), activation="none")
    gain = dice.explain(p, y).map
    slope = dice.value_and_grad(p, y)[1]
    right = ((p - one_hot(y, 3)) * slope).sum(axis=1)
    assert np.allclose(gain, right, atol=1e-12)
    with pytest.raises(ValueError, match="exact: gains are of first order"):
        loss.explain(x, y, exact=True)


# ------------------------------------------------------------------ maps in stretches, as lesions


def maps(
    rng: np.random.Generator, shape: tuple[int, int, int], count: int, longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Labels, (B, N), and regions of every class, (B, C, N), in stretches that do not coincide."""
    batch, classes, voxels = shape
    y = np.stack([stretches(rng, voxels, classes, longest) for _ in range(batch)])
    regions = [stretches(rng, voxels, count, longest) for _ in range(batch * classes)]
    return y, np.stack(regions).reshape(shape)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 2),
    classes=st.integers(2, 6),
    voxels=st.sampled_from([1, 15, 64, 530, 1600, 1601]),
    dtype=st.sampled_from(["float32", "float32", "float16", "bfloat16", "float64"]),
    kind=st.sampled_from(["int8", "int16", "int32", "int64"]),
    count=st.sampled_from([1, 3, 20, 60, 300]),
    longest=st.sampled_from([1, 5, 40, 700]),
    spread=st.sampled_from([1.0, 5.0, 40.0]),
    scattered=st.sets(st.sampled_from(["ignored", "weighted", "none", "infinite", "last"])),
)
def test_any_maps(
    seed: int,
    batch: int,
    classes: int,
    voxels: int,
    dtype: str,
    kind: str,
    count: int,
    longest: int,
    spread: float,
    scattered: set[str],
) -> None:
    """Sums and gradients of all voxels of every region, in tiles of any kind."""
    rng = np.random.default_rng(seed)
    shape = (batch, classes, voxels)
    x, (y, regions) = rng.normal(size=shape), maps(rng, shape, count, longest)
    x[:, :, voxels // 2 :] *= spread
    if "infinite" in scattered:
        place, of_sample = rng.integers(voxels), np.arange(batch)
        x[of_sample, y[:, place], place] = np.inf  # p is 1, or shared
        x[0, :2, place] = np.inf
        y[0, place] = rng.integers(2)
    regions = np.minimum(regions, 100) if kind == "int8" else regions
    if "none" in scattered:
        regions[rng.uniform(size=shape) < 0.02] = -1
    w = rng.choice([0.0, 0.5, 2.0], y.shape) if "weighted" in scattered else None
    if "ignored" in scattered:
        y[rng.uniform(size=y.shape) < 0.05] = 255
    x = x.astype(need("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    given = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    lesions = fl.PerRegion(
        fl.Dice(),
        fl.CrossEntropy(),
        regions="given",
        per_class=True,
        include_background=seed % 2 == 0,
    )
    loss = fl.Loss(lesions, fl.Dice(), 0.5 * fl.CrossEntropy(), ignore_index=255)
    expected = reference(loss, x, y, w, regions=regions)
    labels = y.astype(np.uint8 if seed % 3 else np.int64)
    with use_backend(need_backend("cpu")):
        found = loss.value_and_grad(
            given if "last" in scattered else x, labels, w, regions=regions.astype(kind)
        )
    assert_agree(*found, expected, 1.0, max(abs(float(expected[0])), 0.5))


def test_same_bits_for_any_number_of_threads() -> None:
    """Nor do they depend on where the gradient lies, which decides on the tiles."""
    rng = np.random.default_rng(12)
    loss = fl.CCDiceCE(per_class=True) + fl.Dice()
    before = fl.get_num_threads()
    for classes, dtype, count in (
        (2, "float32", 20),
        (3, "float16", 50),
        (4, "float32", 90),
        (4, "float64", 20),
        (5, "float32", 20),
    ):
        voxels = (1 << 20) // (np.dtype(dtype).itemsize * classes) + 1037
        shape = (1, classes, voxels)
        x = (3 * rng.normal(size=shape)).astype(dtype)
        x[0, :, rng.choice(voxels, 30, replace=False)] *= 30
        y, regions = maps(rng, shape, count, 40)
        memory, found = np.empty(x.nbytes + 128, np.uint8), []
        start = -memory.ctypes.data % 64
        with use_backend(need_backend("cpu")):
            try:
                for threads, offset in ((1, 0), (2, 0), (5, 8), (1, 16), (3, 48)):
                    fl.set_num_threads(threads)
                    out = memory[start + offset :][: x.nbytes].view(dtype).reshape(x.shape)
                    value, gradient = loss.value_and_grad(
                        x, y.astype(np.uint8), regions=regions.astype(np.int8), out=out
                    )
                    found.append((value, gradient.copy()))
            finally:
                fl.set_num_threads(before)
        for value, gradient in found[1:]:
            assert value == found[0][0]
            assert gradient.tobytes() == found[0][1].tobytes()
        assert_agree(*found[0], reference(loss, x, y, regions=regions))


def test_what_does_not_fit_is_named() -> None:
    x, y = volume(13, 1, 3, (4, 5), 0.3)
    loss = fl.CCDiceCE(per_class=True)
    for shape in ((1, 4, 5), (1, 1, 4, 5), (1, 2, 4, 5)):
        with pytest.raises(ValueError, match=r"regions: expected \(1, 3, 4, 5\), a map for each"):
            loss(x, y, regions=np.zeros(shape, int))
    with pytest.raises(ValueError, match=r"regions: expected \(1, 4, 5\)"):
        fl.CCDiceCE()(x, y, regions=np.zeros((1, 3, 4, 5), int))
    with pytest.raises(ValueError, match="weight: Dice weighs classes"):
        fl.PerRegion(fl.Dice(weight=[1, 2]), per_class=True)
    with pytest.raises(ValueError, match=r"regions: .*take different regions"):
        fl.CCDiceCE(per_class=True) + fl.CCDiceCE()
