"""Losses of every lesion, against loops over the lesions."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lesion_volumes import BLOBS, CELLS, WEIGHT, volume
from support import assert_agree, finite_differences, need, need_backend, one_hot, reference

import fastloss as fl
from fastloss.backends import use_backend

# ------------------------------------------------------------------ the loop over lesions


def lesions_of(labels: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Class and mask of every component of one sample, in the order of their first voxels."""
    label = need("scipy.ndimage").label
    found = []
    for c in range(1, int(labels.max(initial=0)) + 1):
        numbers, count = label(labels == c, np.ones((3,) * labels.ndim))
        found += [(c, numbers == k) for k in range(1, count + 1)]
    return sorted(found, key=lambda lesion: int(np.flatnonzero(lesion[1])[0]))


def regions_of(labels: np.ndarray, mode: str, spacing: Any = None) -> list[tuple[int, Any, Any]]:
    """Class, own voxels and region of every lesion of one sample."""
    found = lesions_of(labels)
    if mode == BLOBS:
        return [(c, mask, mask | (labels == 0)) for c, mask in found]
    if not found:
        return []
    distance = need("scipy.ndimage").distance_transform_edt
    each = [distance(~mask, sampling=spacing) for _, mask in found]
    nearest = np.argmin(np.round(each, 9), axis=0)
    return [(c, mask, nearest == k) for k, (c, mask) in enumerate(found)]


def looped(
    part: Any,
    x: np.ndarray,
    y: np.ndarray,
    w: np.ndarray | None = None,
    *,
    mode: str = CELLS,
    weight: str = "equal",
    without: str = "whole",
    ignore: int | None = None,
    spacing: Any = None,
) -> tuple[float, np.ndarray]:
    """Value and gradient by calls of a loss with every region as the voxel weight.

    ``part(class)``: the loss of a lesion of that class; ``part(0)``: of a whole sample.
    """
    counted = np.ones(y.shape) if w is None else w.astype(float)
    labels = y
    if ignore is not None:
        counted = counted * (y != ignore)
        labels = np.where(y == ignore, 0, y)
    values, gradients = [], []
    for b in range(len(y)):
        own, total = [], 0.0
        for c, mask, region in regions_of(labels[b], mode, spacing):
            volume = float((mask * counted[b]).sum())
            if volume > 0:
                share = volume ** WEIGHT[weight]
                one = call(part(c), x, labels, counted * region, b)
                own.append((share * one[0], share * one[1]))
                total += share
        if own:
            values.append(sum(value for value, _ in own) / total)
            gradients.append(sum(gradient for _, gradient in own) / total)
        elif without == "whole" and counted[b].any():
            value, gradient = call(part(0), x, labels, counted, b)
            values.append(value)
            gradients.append(gradient)
    if not values:
        return 0.0, np.zeros_like(x)
    return float(np.mean(values)), np.mean(gradients, axis=0)


def call(loss: Any, x: Any, y: Any, w: Any, b: int) -> tuple[float, np.ndarray]:
    with use_backend("reference"):
        value, part = loss.value_and_grad(x[b : b + 1], y[b : b + 1], w[b : b + 1])
    gradient = np.zeros_like(x)
    gradient[b] = part[0]
    return float(value), gradient


def dice_ce(classes: int, activation: str = "softmax", term: Any = fl.Dice) -> Any:
    """Of a lesion: the region term of its class, and cross-entropy; of a sample: the mean."""

    def part(c: int) -> Any:
        if classes == 1:
            return fl.Loss(term() + fl.CrossEntropy(), activation=activation)
        weight = np.zeros(classes)
        if c:
            weight[c] = classes  # so that the mean over classes is the value of one
        else:
            weight[1:] = classes / (classes - 1)
        return fl.Loss(term(weight=weight) + fl.CrossEntropy(), activation=activation)

    return part


# ------------------------------------------------------------------ values and gradients


@pytest.mark.parametrize("mode", [CELLS, BLOBS])
@pytest.mark.parametrize(
    ("classes", "weight"), [(2, "equal"), (4, "inverse_volume"), (3, "inverse_sqrt_volume")]
)
def test_loop_over_lesions(backend: str, mode: str, classes: int, weight: str) -> None:
    x, y = volume(classes, 3, classes, (6, 7, 8))
    y[1] = 0  # no lesion
    for without in ("whole", "skip"):
        term = fl.PerRegion(
            fl.Dice() + fl.CrossEntropy(), regions=mode, weight=weight, without=without
        )
        expected = looped(dice_ce(classes), x, y, mode=mode, weight=weight, without=without)
        value, gradient = term.value_and_grad(x, y)
        assert value == pytest.approx(expected[0], rel=1e-9)
        assert np.allclose(gradient, expected[1], atol=1e-12)
        if without == "skip":
            assert not gradient[1].any()


@settings(max_examples=20)
@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 3),
    classes=st.integers(2, 4),
    spatial=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    density=st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0]),
    mode=st.sampled_from([CELLS, BLOBS]),
    without=st.sampled_from(["whole", "skip"]),
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
    without: str,
    ignored: bool,
    weighted: bool,
) -> None:
    x, y = volume(seed, batch, classes, tuple(spatial), density)
    rng = np.random.default_rng(seed)
    ignore = 255 if ignored else None
    if ignored:
        y = np.where(rng.uniform(size=y.shape) < 0.2, 255, y)
    w = rng.choice([0.0, 0.5, 2.0], y.shape) if weighted else None
    term = fl.PerRegion(fl.Tversky(), fl.CrossEntropy(), regions=mode, without=without)
    loss = fl.Loss(term, ignore_index=ignore)
    part = dice_ce(classes, term=fl.Tversky)
    expected = looped(part, x, y, w, mode=mode, without=without, ignore=ignore)
    for name in ("cpu", "reference"):
        with use_backend(need_backend(name)):
            value, gradient = loss.value_and_grad(x, y, w)
        assert value == pytest.approx(expected[0], rel=1e-9, abs=1e-12)
        assert np.allclose(gradient, expected[1], atol=1e-12)


def test_pytorch_loop_of_the_paper() -> None:
    """Values and gradient of CC-DiceCE as autograd finds them, one lesion after the other."""
    torch = need("torch")
    x, y = volume(5, 2, 2, (6, 6, 6), 0.05)
    z = torch.tensor(x, requires_grad=True)
    total = 0.0
    for b in range(2):
        p, each = torch.softmax(z[b], 0)[1], []
        for _, mask, cell in regions_of(y[b], CELLS):
            g, inside = torch.tensor(mask), torch.tensor(cell)
            dice = 1 - 2 * p[g].sum() / torch.clamp(p[inside].sum() + g.sum(), min=1e-7)
            log_p = torch.log_softmax(z[b], 0)
            ce = -torch.where(g, log_p[1], log_p[0])[inside].mean()
            each.append(dice + ce)
        total = total + torch.stack(each).mean() / 2
    total.backward()
    value, gradient = fl.CCDiceCE(smooth_nr=0, smooth_dr=0).value_and_grad(x, y)
    assert value == pytest.approx(total.item(), rel=1e-12)
    assert np.allclose(gradient, z.grad.numpy(), atol=1e-14)


def test_pytorch_loop_of_the_blob_loss() -> None:
    torch = need("torch")
    x, y = volume(6, 2, 2, (5, 6, 7), 0.05)
    z = torch.tensor(x, requires_grad=True)

    def dice_ce_of(b: int, counted: Any, target: Any) -> Any:
        p = torch.softmax(z[b], 0)[1][counted]
        g = target[counted]
        dice = 1 - (2 * (p * g).sum() + 1e-5) / (p.sum() + g.sum() + 1e-5)
        return dice - torch.log(torch.where(g, p, 1 - p)).mean()

    whole = blobs = 0.0
    for b in range(2):
        p, g = torch.softmax(z[b], 0)[1], torch.tensor(y[b] > 0)
        whole = whole + (1 - (2 * p[g].sum() + 1e-5) / (p.sum() + g.sum() + 1e-5)) / 2
        whole = whole - torch.log(torch.where(g, p, 1 - p)).mean() / 2
        each = [
            dice_ce_of(b, torch.tensor(region), torch.tensor(mask))
            for _, mask, region in regions_of(y[b], BLOBS)
        ]
        blobs = blobs + torch.stack(each).mean() / 2
    total = 2 * whole + 0.5 * blobs
    total.backward()
    value, gradient = fl.BlobLoss(alpha=2, beta=0.5).value_and_grad(x, y)
    assert value == pytest.approx(total.item(), rel=1e-12)
    assert np.allclose(gradient, z.grad.numpy(), atol=1e-13)


@pytest.mark.parametrize(
    "loss",
    [
        fl.CCDiceCE(weight="inverse_volume"),
        fl.BlobLoss(),
        fl.PerRegion(fl.GeneralizedDice(), 0.3 * fl.Focal(), fl.Dice(squared=True, weight=[1, 2])),
        fl.Jaccard(batch=True) + 2 * fl.PerRegion(fl.MCC(include_background=False)),
    ],
    ids=lambda loss: str(loss)[:30],
)
def test_finite_differences(loss: Any) -> None:
    x, y = volume(7, 2, 2, (3, 5), 0.2)
    y[1] = 0
    numeric = finite_differences(loss, x, y)
    assert np.allclose(loss.value_and_grad(x, y)[1], numeric, atol=1e-8)


def test_one_channel_and_dense_targets(backend: str) -> None:
    x, y = volume(8, 2, 2, (6, 9), 0.1)
    part, one = dice_ce(1, "sigmoid"), x[:, 1:]
    loss = fl.Loss(fl.CCDiceCE(), activation="sigmoid")
    masks = y[:, None]
    expected = looped_of_masks(part, one, y)
    for target in (y, masks.astype(np.float32)):
        value, gradient = loss.value_and_grad(one, target)
        assert value == pytest.approx(expected[0], rel=1e-9)
        assert np.allclose(gradient, expected[1], atol=1e-12)
    right = fl.CCDiceCE().value_and_grad(x, y)
    value, gradient = fl.CCDiceCE().value_and_grad(x, one_hot(y, 2))
    assert value == pytest.approx(right[0], rel=1e-12)
    assert np.allclose(gradient, right[1], atol=1e-14)


def looped_of_masks(part: Any, x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    values, gradients = [], []
    for b in range(len(y)):
        own = [
            call(part(c), x, y, np.stack([r] * len(y)), b) for c, _, r in regions_of(y[b], CELLS)
        ]
        values.append(np.mean([value for value, _ in own]))
        gradients.append(np.mean([gradient for _, gradient in own], axis=0))
    return float(np.mean(values)), np.mean(gradients, axis=0)


def test_spacing_and_connectivity() -> None:
    x, y = volume(9, 1, 2, (5, 6, 7), 0.06)
    spacing = (3.0, 1.0, 0.5)
    expected = looped(dice_ce(2), x, y, spacing=spacing)
    assert fl.CCDiceCE(spacing=spacing)(x, y) == pytest.approx(expected[0], rel=1e-9)
    diagonal = np.eye(4, dtype=int)[None]
    z = x[:, :, 0, :4, :4]
    one = fl.CCDiceCE()(z, diagonal)
    four = fl.CCDiceCE(connectivity=4)(z, diagonal)
    assert one == pytest.approx(
        (fl.Dice(include_background=False) + fl.CrossEntropy())(z, diagonal)
    )
    assert four != pytest.approx(one, rel=1e-3)


def test_small_lesions_count_as_much_as_large_ones() -> None:
    y = np.zeros((1, 10, 10), int)
    y[0, :6, :6] = y[0, 9, 9] = 1
    p = np.where(y, 0.0, 1e-9)  # all background
    found = p.copy()
    found[0, 9, 9] = 1.0
    loss = fl.Loss(fl.PerRegion(fl.Dice()), activation="none")
    missed, one = (loss(np.stack([1 - q, q], 1), y) for q in (p, found))
    assert missed == pytest.approx(1, abs=1e-4)
    assert one == pytest.approx(0.5, abs=1e-4)


def test_hundreds_of_lesions(backend: str) -> None:
    rng = np.random.default_rng(1)
    y = np.zeros((1, 48, 48), np.uint8)
    y[:, 1::3, 1::3] = rng.integers(1, 3, (16, 16))
    x = rng.normal(size=(1, 3, 48, 48))
    assert len(fl.components(y).classes[0]) == 256
    expected = looped(dice_ce(3), x, y)
    value, gradient = fl.CCDiceCE().value_and_grad(x, y)
    assert value == pytest.approx(expected[0], rel=1e-9)
    assert np.allclose(gradient, expected[1], atol=1e-12)


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("loss", [fl.CCDiceCE() + fl.Dice(), fl.BlobLoss()], ids=["cc", "blob"])
def test_many_voxels(classes: int, dtype: str, loss: Any) -> None:
    """Whole tiles of one region and of several, of one label and of several, in any layout."""
    rng = np.random.default_rng(classes)
    x = (3 * rng.normal(size=(2, classes, 9, 20, 64))).astype(dtype)
    y = np.zeros((2, 9, 20, 64), np.uint8)
    for b, z, row in ((0, 1, 3), (0, 7, 12), (1, 4, 9)):
        for column, size in ((2, 6), (20, 1), (40, 17)):
            label = 1 + (z + column) % (classes - 1)
            y[b, z : z + 2, row : row + 3, column : column + size] = label
    y[0, 5] = 9
    loss = fl.Loss(loss, ignore_index=9)
    expected = reference(loss, x, y)
    last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    for logits in (x, np.moveaxis(last, -1, 1)):
        for labels in (y, y.astype(np.int64)):
            with use_backend(need_backend("cpu")):
                found = loss.value_and_grad(logits, labels)
            assert_agree(*found, expected)
    far = x.copy()
    far[0, 0, 0, 0, :8] = np.inf
    far[0, :, 0, 0, 8:12] = 60000
    far[1, 1, 0, 0, 3] = -60000
    with use_backend(need_backend("cpu")):
        value, gradient = loss.value_and_grad(far, y)
    right = reference(loss, far, y)
    assert value == pytest.approx(right[0], rel=1e-5)
    assert np.allclose(gradient, right[1], atol=1e-5)


def test_each_sample_alone_and_sums() -> None:
    x, y = volume(10, 3, 3, (6, 7), 0.15)
    y[2] = 0
    each = [float(fl.CCDiceCE()(x[b : b + 1], y[b : b + 1])) for b in range(3)]
    none = fl.CCDiceCE(reduction="none", without="skip")
    found, gradient = none.value_and_grad(x, y, upstream=np.array([[1.0], [2.0], [3.0]]))
    assert found.shape == (3, 1)
    assert np.allclose(found[:, 0], [each[0], each[1], 0], rtol=1e-12)
    parts = [fl.CCDiceCE().value_and_grad(x[b : b + 1], y[b : b + 1])[1] for b in range(2)]
    assert np.allclose(gradient[:2], np.concatenate([parts[0], 2 * parts[1]]), atol=1e-14)
    assert fl.CCDiceCE(reduction="sum")(x, y) == pytest.approx(sum(each), rel=1e-12)
    assert fl.CCDiceCE()(x, y) == pytest.approx(np.mean(each), rel=1e-12)


def test_nothing_to_count() -> None:
    x, y = volume(11, 2, 2, (4, 5), 0.0)
    value, gradient = fl.CCDiceCE(without="skip").value_and_grad(x, y)
    assert value == 0
    assert not gradient.any()
    empty = fl.CCDiceCE().value_and_grad(x[:0], y[:0])
    assert empty[0] == 0
    assert empty[1].shape == (0, 2, 4, 5)
    full = fl.BlobLoss()(x, np.ones_like(y))  # no voxel of the background
    alone = fl.Loss(fl.Dice(include_background=False) + fl.CrossEntropy())(x, np.ones_like(y))
    assert full == pytest.approx(3 * alone, rel=1e-6)


# ------------------------------------------------------------------ regions made ahead, and parts


@pytest.mark.parametrize(
    "loss", [fl.CCDiceCE() + 0.5 * fl.Dice(), fl.BlobLoss()], ids=["cc", "blob"]
)
def test_regions_made_ahead(backend: str, loss: Any) -> None:
    x, y = volume(12, 2, 3, (6, 7, 5))
    y[1] = 0
    ahead = loss.fields(y, classes=3)
    assert list(ahead) == ["regions"]
    right = loss.value_and_grad(x, y)
    for options in ({"fields": ahead}, ahead, {**ahead, "region_count": 100}):
        value, gradient = loss.value_and_grad(x, y, **options)
        assert value == pytest.approx(right[0], rel=1e-12)
        assert np.allclose(gradient, right[1], atol=1e-14)


def test_regions_of_the_caller(backend: str) -> None:
    x, y = volume(13, 2, 2, (8, 9), 0.3)
    regions = (np.arange(9) // 3 * 2)[None, None] * np.ones((2, 8, 1), int)  # 0, 2, 4
    y[:, :, 3:6] = 0  # no lesion in one of them
    term = fl.PerRegion(fl.Dice(), fl.CrossEntropy(), regions="given")
    values = []
    for b in range(2):
        own = [call(dice_ce(2)(1), x, y, (regions == r).astype(float), b)[0] for r in (0, 4)]
        values.append(np.mean(own))
    assert term(x, y, regions=regions) == pytest.approx(np.mean(values), rel=1e-9)
    with pytest.raises(ValueError, match="regions: expected the regions of this call"):
        term(x, y)


def test_a_lesion_that_is_background_is_none() -> None:
    x, y = np.random.default_rng(4).normal(size=(1, 2, 9)), np.array([[1, 1, 0, 0, 1, 0, 0, 1, 0]])
    numbers = fl.components(y).numbers
    regions = np.where(numbers == 2, 0, np.where(numbers == 3, 2, numbers))
    masks = [((regions == k) | (regions == 0)).astype(float) for k in (1, 2)]
    right = np.mean([call(dice_ce(2)(1), x, y, mask, 0)[0] for mask in masks])
    assert fl.BlobDiceCE()(x, y, regions=regions) == pytest.approx(right, rel=1e-9)


def test_other_terms_are_those_of_whole_samples(backend: str) -> None:
    x, y = volume(14, 2, 3, (6, 7), 0.2)
    others = [fl.Dice(batch=True), fl.CrossEntropy(weight=[1.0, 2.0, 3.0]), fl.GeneralizedDice()]
    for other in others:
        alone, lesions = other.value_and_grad(x, y), fl.CCDiceCE().value_and_grad(x, y)
        value, gradient = (0.5 * other + fl.CCDiceCE()).value_and_grad(x, y)
        assert value == pytest.approx(0.5 * alone[0] + lesions[0], rel=1e-10)
        assert np.allclose(gradient, 0.5 * alone[1] + lesions[1], atol=1e-13)


@pytest.mark.parametrize("loss", [fl.CCDiceCE() + fl.Dice(), fl.BlobLoss()], ids=["cc", "blob"])
def test_chunks(backend: str, loss: Any) -> None:
    x, y = volume(15, 2, 3, (9, 6, 5))
    right = loss.value_and_grad(x, y)
    regions = loss.fields(y, classes=3)["regions"]
    parts = [slice(0, 2), slice(2, 9)]
    chunks = [(x[:, :, c], y[:, c], {"regions": regions[:, c]}) for c in parts]
    total = sum(loss.statistics(a, b, **r) for a, b, r in chunks)
    assert loss.value(total) == pytest.approx(right[0], rel=1e-12)
    found = [loss.gradient(a, b, statistics=total, **r) for a, b, r in chunks]
    assert np.allclose(np.concatenate(found, axis=2), right[1], atol=1e-14)
    with pytest.raises(ValueError, match=r"statistics: .*needs the regions of the whole"):
        loss.statistics(x[:, :, :2], y[:, :2])


def test_same_bits_for_any_number_of_threads() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(1, 2, 40, 40, 40)).astype(np.float32)
    y = (rng.uniform(size=(1, 40, 40, 40)) < 0.002).astype(np.uint8)
    before, found = fl.get_num_threads(), []
    with use_backend(need_backend("cpu")):
        try:
            for threads in (1, 3):
                fl.set_num_threads(threads)
                found.append(fl.CCDiceCE().value_and_grad(x, y))
        finally:
            fl.set_num_threads(before)
    assert found[0][0] == found[1][0]
    assert (found[0][1] == found[1][1]).all()


# ------------------------------------------------------------------ as losses and functions


def test_the_function_has_the_defaults_of_the_class() -> None:
    found, own = (inspect.signature(what).parameters for what in (fl.blob_loss, fl.BlobLoss))
    shared = [name for name in own if name != "options"]
    assert [found[name].default for name in shared] == [own[name].default for name in shared]


def test_functions_and_copies() -> None:
    x, y = volume(16, 2, 2, (6, 7), 0.1)
    right = fl.CCDiceCE(weight="inverse_volume")(x, y)
    assert fl.cc_dice_ce_loss(x, y, weight="inverse_volume") == right
    blob = fl.BlobLoss(alpha=1, beta=3)
    assert fl.blob_loss(x, y, alpha=1, beta=3) == blob(x, y)
    for loss in (fl.CCDiceCE(), blob, fl.PerRegion(fl.Dice() + fl.Focal())):
        for again in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            assert again(x, y) == loss(x, y)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: fl.PerRegion(), ValueError, "terms: expected at least one term"),
        (lambda: fl.PerRegion(fl.Dice), TypeError, "terms: expected terms or losses"),
        (lambda: fl.PerRegion(fl.Boundary()), TypeError, "terms: Boundary is no region term"),
        (lambda: fl.PerRegion(fl.TopKCrossEntropy()), TypeError, "terms: TopKCrossEntropy is no"),
        (lambda: fl.PerRegion(fl.Dice(batch=True)), ValueError, "terms: Dice sums over the batch"),
        (
            lambda: fl.PerRegion(fl.Loss(fl.Dice(), ignore_index=3)),
            ValueError,
            "terms: ignore_index",
        ),
        (lambda: fl.PerRegion(fl.Dice(), regions="cells"), ValueError, "regions: .*got 'cells'"),
        (lambda: fl.CCDiceCE(weight="volume"), ValueError, "weight: .*got 'volume'"),
        (lambda: fl.CCDiceCE(without=None), (ValueError, TypeError), "without: "),
        (lambda: fl.CCDiceCE(spacing=-1), ValueError, "spacing: "),
        (lambda: fl.BlobLoss(per_class="yes"), TypeError, "per_class: .*got 'yes'"),
        (lambda: fl.CCDiceCE(dice_factor=-1), ValueError, "dice_factor: "),
        (
            lambda: fl.PerRegion(fl.Dice(), include_background=True),
            ValueError,
            "include_background: the background has no components",
        ),
        (lambda: fl.CCDiceCE() + fl.BlobLoss(), ValueError, "regions: .*take different regions"),
    ],
)
def test_bad_options_are_named(make: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize(
    ("loss", "spatial", "message"),
    [
        (fl.CCDiceCE(connectivity=5), (4, 5), "connectivity: expected 4 or 8 .*got 5"),
        (fl.CCDiceCE(spacing=(1, 2)), (4, 5, 6), "spacing: expected 3 numbers"),
        (fl.CCDiceCE(), (2, 2, 2, 2), "one to 3 spatial axes"),
    ],
)
def test_bad_calls_are_named(loss: Any, spatial: tuple[int, ...], message: str) -> None:
    x, y = volume(17, 1, 2, spatial, 0.3)
    with pytest.raises(ValueError, match=message):
        loss(x, y)


def test_overlapping_channels_need_regions() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(1, 3, 6, 6)), rng.integers(0, 2, (1, 3, 6, 6))
    loss = fl.Loss(fl.CCDiceCE(), activation="sigmoid")
    with pytest.raises(ValueError, match="regions: of 3 channels that may overlap"):
        loss(x, y)
    given_ = fl.Loss(
        fl.PerRegion(fl.Dice(), regions="given", include_background=True), activation="sigmoid"
    )
    one = fl.Loss(fl.Dice(reduction="none"), activation="sigmoid")
    regions = np.zeros((1, 6, 6), int)
    assert given_(x, y, regions=regions) == pytest.approx(one(x, y).mean(), rel=1e-9)
