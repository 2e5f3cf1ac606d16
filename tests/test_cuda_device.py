"""The library's device path, on a stand-in for a GPU."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import stand_in
from stand_in import OnDevice
from support import assert_agree, example, norm, one_hot, reference

import fastloss as fl
from fastloss.backends.cuda import backend as cuda
from fastloss.backends.cuda import engine, histograms
from fastloss.backends.cuda.backend import CudaBackend
from fastloss.backends.cuda.source import source
from fastloss.sums import Sum


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return stand_in.install(monkeypatch)


class LogCosh(fl.RegionTerm):
    """A user's own term: log cosh of the Dice loss."""

    def formula(self, overlap: Any, predicted: Any, reference: Any) -> Any:
        total = predicted + reference + self.smooth_dr
        dice = (2.0 * overlap + self.smooth_nr) / total
        slope = np.tanh(1.0 - dice)
        return np.log(np.cosh(1.0 - dice)), -2.0 * slope / total, slope * dice / total


class Mistaken(fl.Term):
    """Σ (1 − g) p, a sum that no fast path takes."""

    requires = frozenset({Sum("rest", "p")})

    def combine(self, statistics: Any) -> Any:
        key = Sum("rest", "p")
        return statistics[key].sum(), lambda upstream: {key: upstream}


LOSSES = {
    "Dice and cross-entropy": fl.Dice() + 0.5 * fl.CrossEntropy(),
    "every term": fl.Loss(
        fl.CrossEntropy(weight=[0.2, 1.0, 0.7], label_smoothing=0.1),
        fl.Focal(gamma=1.5),
        fl.Dice(squared=True, batch=True),
        fl.Jaccard(include_background=False),
        fl.Tversky(alpha=0.3, beta=0.7, gamma=0.75),
        fl.GeneralizedDice(),
        ignore_index=255,
    ),
    "top-k": fl.TopKCrossEntropy(k=20, weight=[1.0, 0.0, 2.0]) + fl.Dice(),
    "sigmoid": fl.Loss(fl.Dice(), fl.Focal(gamma=2, alpha=0.25), activation="sigmoid"),
    "probabilities": fl.Loss(fl.Tversky(), fl.CrossEntropy(), activation="none"),
    "a sum of its own": 0.1 * Mistaken() + fl.Dice(),
    "a user's term": LogCosh() + fl.CrossEntropy(reduction="sum"),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_value_and_gradient(launched: list[str], name: str, dtype: str) -> None:
    loss = LOSSES[name]
    x, y = example(2, 3, (7, 9), dtype=dtype, activation=loss.activation)
    w = np.random.default_rng(0).uniform(0, 2, y.shape)
    value, gradient = loss.value_and_grad(OnDevice(x), OnDevice(y), OnDevice(w), upstream=3.0)
    assert isinstance(value, OnDevice)
    assert value.values.dtype == dtype
    assert isinstance(gradient, OnDevice)
    assert gradient.values.dtype == dtype
    assert_agree(value.values, gradient.values, reference(loss, x, y, w, upstream=3.0))
    np.testing.assert_array_equal(loss(OnDevice(x), OnDevice(y), OnDevice(w)).values, value.values)


def test_dense_target_and_channels_last(launched: list[str]) -> None:
    loss = fl.Loss(fl.Dice(), fl.CrossEntropy(), channel_axis=-1)
    x, y = example(2, 5, (4, 6), dtype=np.float32)
    expected = reference(fl.Loss(fl.Dice(), fl.CrossEntropy()), x, one_hot(y, 5))
    x, g = (np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, one_hot(y, 5)))
    value, gradient = loss.value_and_grad(OnDevice(x), OnDevice(g))
    assert_agree(value.values, np.moveaxis(gradient.values, -1, 1), expected)


@pytest.mark.parametrize("upstream", [None, "array"])
def test_one_value_per_sample_and_class(launched: list[str], upstream: str | None) -> None:
    loss = fl.Dice(reduction="none") + fl.CrossEntropy(reduction="none")
    x, y = example(2, 3, (40,), dtype=np.float32)
    u = np.random.default_rng(1).normal(size=(2, 3)) if upstream else np.ones((2, 3))
    given = None if upstream is None else OnDevice(u.astype(np.float32))
    value, gradient = loss.value_and_grad(OnDevice(x), OnDevice(y), upstream=given)
    expected = reference(loss, x, y, upstream=u.astype(np.float32).astype(np.float64))
    assert_agree(value.values, gradient.values, expected)


def test_upstream_on_the_device(launched: list[str]) -> None:
    loss = fl.Dice() + fl.CrossEntropy()
    x, y = example(2, 3, (40,), dtype=np.float32)
    scale = OnDevice(np.float32(65536.0))
    value, gradient = loss.value_and_grad(OnDevice(x), OnDevice(y), upstream=scale)
    assert_agree(value.values, gradient.values, reference(loss, x, y, upstream=65536.0))
    with pytest.raises(ValueError, match=r"^upstream: expected the value's shape \(\)"):
        loss.value_and_grad(OnDevice(x), OnDevice(y), upstream=OnDevice(np.ones(3, "f4")))


def test_gradient_in_place_of_the_logits(launched: list[str]) -> None:
    loss = fl.Dice() + fl.CrossEntropy()
    x, y = example(2, 3, (40,), dtype=np.float32)
    expected = reference(loss, x, y)
    device = OnDevice(x.copy())
    value, gradient = loss.value_and_grad(device, OnDevice(y), out=device)
    assert gradient is device
    assert_agree(value.values, device.values, expected)


class Boundary(fl.Term):
    """Σ φ_c p_c, a custom term that reads a field."""

    requires = frozenset({Sum("one", "p", field="phi")})

    def combine(self, statistics: Any) -> Any:
        key = Sum("one", "p", field="phi")
        return statistics[key].sum(), lambda upstream: {key: upstream}


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fields(launched: list[str], dtype: str, activation: str) -> None:
    loss = fl.Loss(fl.Dice(), 0.1 * Boundary(), fl.CrossEntropy(), activation=activation)
    x, y = example(2, 3, (7, 9), dtype=dtype)
    y = y if activation == "softmax" else one_hot(y, 3)
    phi = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    fields = {"phi": OnDevice(phi)}
    value, gradient = loss.value_and_grad(OnDevice(x), OnDevice(y), fields=fields)
    expected = reference(loss, x, y, fields={"phi": phi})
    assert_agree(value.values, gradient.values, expected, value_scale=10)
    with pytest.raises(ValueError, match=r"^fields\['phi'\]: expected an array in the memory of"):
        loss(OnDevice(x), OnDevice(y), fields={"phi": phi})


def test_top_k_beside_a_field(launched: list[str]) -> None:
    loss = fl.TopKCrossEntropy(k=20, weight=[1.0, 0.0, 2.0]) + Boundary() + fl.CrossEntropy()
    x, y = example(2, 3, (7, 9), dtype=np.float32)
    phi = np.random.default_rng(0).normal(size=y.shape).astype(np.float32)
    value, gradient = loss.value_and_grad(OnDevice(x), OnDevice(y), fields={"phi": OnDevice(phi)})
    expected = reference(loss, x, y, fields={"phi": phi})
    assert_agree(value.values, gradient.values, expected, value_scale=10)


@pytest.mark.parametrize(
    "loss",
    [
        fl.Dice() + fl.CrossEntropy(),
        fl.Loss(fl.Tversky(batch=True), fl.Focal(), activation="sigmoid"),
        fl.Loss(fl.Dice(reduction="none")),
    ],
    ids=["softmax", "sigmoid, joined", "of every region"],
)
def test_regions(launched: list[str], loss: fl.Loss) -> None:
    x, y = example(2, 3, (7, 9), dtype=np.float32)
    y = y if loss.activation == "softmax" else one_hot(y, 3)
    regions = np.repeat(np.arange(-1, 3), 16)[:63].reshape(7, 9)
    regions = np.stack([regions, np.minimum(regions, 1)])
    value, gradient = loss.value_and_grad(
        OnDevice(x), OnDevice(y), regions=OnDevice(regions), region_count=4
    )
    expected = reference(loss, x, y, regions=regions, region_count=4)
    assert_agree(value.values, gradient.values, expected)
    statistics = loss.statistics(
        OnDevice(x), OnDevice(y), regions=OnDevice(regions), region_count=4
    )
    np.testing.assert_array_equal(loss.value(statistics).values, value.values)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_losses_of_every_voxel(
    launched: list[str], activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CudaBackend, "to_numpy", lambda self, view: view.copy())
    loss = fl.Loss(
        fl.CrossEntropy(reduction="voxel", label_smoothing=0.1),
        fl.Focal(reduction="voxel"),
        activation=activation,
    )
    x, y = example(2, 3, (7, 9), dtype=np.float32)
    y = y if activation == "softmax" else one_hot(y, 3)
    value, gradient = loss.value_and_grad(OnDevice(x), OnDevice(y))
    assert_agree(value.values, gradient.values, reference(loss, x, y))
    upstream = np.random.default_rng(0).normal(size=value.shape).astype(np.float32)
    _, gradient = loss.value_and_grad(OnDevice(x), OnDevice(y), upstream=OnDevice(upstream))
    assert_agree(value.values, gradient.values, reference(loss, x, y, upstream=upstream))
    if activation == "softmax":
        y[0, 2, 3] = 3
        assert np.isnan(loss(OnDevice(x), OnDevice(y)).values[0, 2, 3])
        with pytest.raises(ValueError, match=r"^target: .* the first is 3$"):
            fl.Loss(loss, validate=True)(OnDevice(x), OnDevice(y))


def test_other_ways_to_choose_voxels(launched: list[str]) -> None:
    class Hardest(fl.TopKCrossEntropy):
        kept_percent = None

    x, y = example(2, 3, (7, 9), dtype=np.float32)
    with pytest.raises(TypeError, match=r"^terms: on a GPU .* Hardest does not"):
        Hardest()(OnDevice(x), OnDevice(y))
    with pytest.raises(TypeError, match=r"^terms: on a GPU .* LovaszSoftmax does not"):
        fl.LovaszSoftmax(method="exact")(OnDevice(x), OnDevice(y))

    class Counted(fl.Term):
        requires = frozenset({"errors"})

    with pytest.raises(TypeError, match=r"^terms: Counted reads a histogram"):
        Counted()(OnDevice(x), OnDevice(y))


def test_lovasz_losses(launched: list[str]) -> None:
    """With all options, beside others that read the same bins, other bins and fields."""
    soft, hinge = fl.LovaszSoftmax, fl.LovaszHinge
    sigmoid = {"activation": "sigmoid"}
    losses = {
        "alone": fl.Loss(soft()),
        "by sample": 0.5 * soft(per_sample=True) + fl.Dice() + fl.CrossEntropy(),
        "ignored": fl.Loss(soft(classes=(0, 2)), fl.Focal(), ignore_index=1),
        "the same bins": soft()
        - 0.25 * soft(classes="all", per_sample=True)
        + fl.TopKCrossEntropy(),
        "hinge": fl.Loss(hinge(), **sigmoid),
        "all kinds": fl.Loss(2 * hinge(per_sample=True), fl.Dice(), soft(classes="all"), **sigmoid),
        "of every class": soft() + fl.Dice(reduction="none"),
        "probabilities": fl.Loss(soft(), activation="none"),
    }
    for seed, (name, loss) in enumerate(losses.items()):
        for dtype, samples, weighted in (
            ("float32", 3, False),
            ("float32", 1, True),
            ("float64", 2, True),
            ("float16", 2, False),
        ):
            x, y = example(samples, 3, (7, 9), seed=seed, dtype=dtype, activation=loss.activation)
            y[0][y[0] == 2] = 0  # a class that is not in all samples
            w = np.random.default_rng(seed).integers(0, 4, y.shape).astype(np.float32)
            target = one_hot(y, 3, np.uint8) if seed % 2 and not loss.ranking else y
            arrays = (x, target, w if weighted else None)
            there = [a if a is None else OnDevice(a) for a in arrays]
            up = np.full(loss.value_shape(samples, 3), 3.0, "f8" if dtype == "float64" else "f4")
            value, gradient = loss.value_and_grad(*there, upstream=OnDevice(up))
            expected = reference(loss, *arrays, upstream=up.astype(float))
            # As float32, in which errors are counted, p of either may fall in another bin.
            message, near = f"{name}, {dtype}", 1e-6 if dtype == "float64" else 3e-6
            np.testing.assert_allclose(value.values, expected[0], near, 1e-6, err_msg=message)
            error = norm(gradient.values.astype(float) - expected[1])
            allowed = 2e-3 if dtype == "float16" else 1e-5
            assert error <= allowed * norm(expected[1]) + 1e-9, message


def test_lovasz_losses_of_odd_input(launched: list[str]) -> None:
    by_sample = fl.LovaszSoftmax(per_sample=True) + fl.Dice()
    for loss in (fl.Loss(fl.LovaszSoftmax(), ignore_index=9), fl.Loss(by_sample, ignore_index=9)):
        x, y = example(2, 3, (40,), dtype=np.float32)
        broken, ignored = x.copy(), np.full_like(y, 9)
        broken[1, 1, 3] = np.nan
        assert np.isnan(loss(OnDevice(broken), OnDevice(y)).values)
        assert np.isnan(loss.gradient(OnDevice(broken), OnDevice(y)).values[0]).all()
        assert np.isnan(loss(OnDevice(x), OnDevice(np.full_like(y, 7))).values)
        expected = loss.value_and_grad(x, ignored)
        value, gradient = loss.value_and_grad(OnDevice(x), OnDevice(ignored))
        assert value.values == expected[0]
        assert not gradient.values.any()
        for arrays in ((x[:0], y[:0]), (x[:, :, :0], y[:, :0])):
            assert loss(*map(OnDevice, arrays)).values == loss(*arrays)


def test_lovasz_losses_of_chunks(launched: list[str]) -> None:
    loss = fl.LovaszSoftmax() + fl.Dice()
    x, y = example(2, 3, (40,), dtype=np.float32)
    parts = [(OnDevice(x[..., i : i + 8].copy()), OnDevice(y[:, i : i + 8].copy()))
             for i in range(0, 40, 8)]  # fmt: skip
    total = sum(loss.statistics(*part) for part in parts)
    value, gradient = loss.value_and_grad(x, y)
    np.testing.assert_allclose(loss.value(total).values, value, 1e-6)
    found = [loss.gradient(*part, statistics=total).values for part in parts]
    np.testing.assert_allclose(np.concatenate(found, axis=2), gradient, 1e-4, 1e-8)


def test_lovasz_loss_of_more_voxels_than_a_word_counts(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample then has parts, whose tallies are added."""
    monkeypatch.setattr(histograms, "PART_BITS", 6)
    monkeypatch.setattr(engine, "_plans", {})
    x, y = example(2, 3, (11, 37), dtype=np.float32)
    w = np.random.default_rng(0).uniform(0, 2, y.shape)
    for weight in (None, w):
        there = None if weight is None else OnDevice(weight)
        value, gradient = fl.LovaszSoftmax().value_and_grad(OnDevice(x), OnDevice(y), there)
        expected = reference(fl.LovaszSoftmax(), x, y, weight)
        np.testing.assert_allclose(value.values, expected[0], 1e-6)
        assert norm(gradient.values - expected[1]) <= 1e-5 * norm(expected[1])


def test_lovasz_losses_take_no_detour(launched: list[str]) -> None:
    """Every step is a launch: nothing is copied to the processor's memory in between."""
    x, y = example(2, 3, (40,), dtype=np.float32)
    (fl.LovaszSoftmax() + fl.Dice()).value_and_grad(OnDevice(x), OnDevice(y))
    kernels = [name for name in launched if not name.startswith("empty")]
    assert kernels == [
        "fastloss_histogram_clear", "fastloss_reduce", "fastloss_finish",
        "fastloss_histogram_finish", "fastloss_lovasz_scan", "fastloss_lovasz_value",
        "fastloss_combine", "fastloss_lovasz_slopes", "fastloss_apply",
    ]  # fmt: skip


def test_hardest_voxels(launched: list[str]) -> None:
    rng = np.random.default_rng(0)
    for threshold, kept in ((0.5, 0), (0.5, 100), (0.05, 3), (1.0, 0), (0.01, 10**6)):
        for weight in (None, [1.0, 0.0, 2.0]):
            term = fl.OHEMCrossEntropy(threshold=threshold, min_kept=kept, weight=weight)
            loss = fl.Loss(term, fl.Dice(), ignore_index=255)
            x, y = example(2, 3, (7, 9), dtype=np.float32)
            x[0, :, 0], y[0, 0] = 0.0, 1  # equal losses
            y[1, :2] = 255
            for w in (None, rng.integers(0, 3, y.shape).astype(np.float32)):
                there = None if w is None else OnDevice(w)
                value, gradient = loss.value_and_grad(OnDevice(x), OnDevice(y), there, upstream=2.0)
                expected = reference(loss, x, y, w, upstream=2.0)
                assert_agree(value.values, gradient.values, expected)
    broken = x.copy()
    broken[0, 1, 2] = np.nan
    assert np.isnan(loss(OnDevice(broken), OnDevice(y)).values)
    x, y = example(2, 3, (7, 9), dtype=np.float64)
    value, gradient = fl.OHEMCrossEntropy(min_kept=9).value_and_grad(OnDevice(x), OnDevice(y))
    assert_agree(value.values, gradient.values, reference(fl.OHEMCrossEntropy(min_kept=9), x, y))


def test_gradients_by_soft_targets(launched: list[str]) -> None:
    """They exist for all kinds of sums, in any layout, of samples, regions and single voxels."""
    x, _ = example(2, 3, (5, 6), dtype=np.float64)
    rng = np.random.default_rng(0)
    g = np.moveaxis(rng.dirichlet(np.ones(3), (2, 5, 6)), -1, 1).copy()
    w = rng.uniform(0, 2, (2, 5, 6))
    w[0, 0, 0] = 0.0
    regions = np.repeat(np.arange(-1, 4), 6)[:30].reshape(5, 6)
    regions = np.stack([regions, np.minimum(regions, 1)])
    by_class = np.stack([regions, regions[:, ::-1], np.maximum(regions, 0)], axis=1)
    lesions = fl.PerRegion(fl.Dice(), fl.CrossEntropy(), regions="given", per_class=True)
    field = rng.normal(size=x.shape)
    all_kinds = fl.Dice() + fl.DiceSemimetric() + fl.KLDivergence() + fl.MeanAbsoluteError()
    cases: list[tuple[Any, dict[str, Any]]] = [
        (all_kinds, {}),
        (fl.Loss(all_kinds, activation="sigmoid"), {}),
        (fl.Dice(squared=True, batch=True) + fl.CrossEntropy(weight=[1.0, 2.0, 0.5]), {}),
        (fl.Dice() + fl.KLDivergence(), {"regions": regions, "region_count": 5}),
        (fl.Loss(lesions), {"regions": by_class, "region_count": 5}),
        (fl.Dice(reduction="none") + fl.MCC(), {}),
        (fl.Loss(fl.CrossEntropy(reduction="voxel")), {}),
        (fl.GeneralizedSurface() + fl.Focal(), {"fields": {"distance": field}}),
    ]
    for loss, more in cases:
        value = loss(x, g, w, **more)
        upstream = rng.normal(size=np.shape(value)) if np.ndim(value) else np.float64(3.0)
        expected = loss.value_and_grad(x, g, w, upstream=upstream, target_grad=True, **more)
        there = dict(more)
        if "regions" in more:
            there["regions"] = OnDevice(more["regions"])
        if "fields" in more:
            there["fields"] = {name: OnDevice(a) for name, a in more["fields"].items()}
        arrays = (OnDevice(x), OnDevice(g), OnDevice(w))
        found = loss.value_and_grad(*arrays, upstream=OnDevice(upstream), target_grad=True, **there)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one.values, other, 1e-9, 1e-12, err_msg=repr(loss)[:60])
        assert not found[2].values[0, :, 0, 0].any()
    last = fl.Loss(all_kinds, channel_axis=-1)
    moved = [OnDevice(np.moveaxis(a, 1, -1)) for a in (x.astype("f4"), g.astype("f2"))]
    found = last.value_and_grad(*moved, OnDevice(w), target_grad=True)[2]
    assert found.values.dtype == np.float16
    wanted = all_kinds.value_and_grad(x, g, w, target_grad=True)[2]
    np.testing.assert_allclose(np.moveaxis(found.values, -1, 1), wanted, 1e-2, 1e-3)
    with pytest.raises(ValueError, match=r"^target: LovaszSoftmax chooses or ranks"):
        fl.LovaszSoftmax().value_and_grad(OnDevice(x), OnDevice(g), target_grad=True)


def test_launches(launched: list[str]) -> None:
    """A value takes two launches, a gradient one, with nothing in between."""
    loss = fl.Dice() + fl.CrossEntropy()
    x, y = example(2, 3, (40,), dtype=np.float32)
    loss.value_and_grad(OnDevice(x), OnDevice(y))
    kernels = [name for name in launched if not name.startswith("empty")]
    assert kernels == ["fastloss_reduce", "fastloss_combine", "fastloss_apply"]
    launched.clear()
    loss(OnDevice(x), OnDevice(y))
    kernels = [name for name in launched if not name.startswith("empty")]
    assert kernels == ["fastloss_reduce", "fastloss_combine"]


def test_memory_beside_the_gradient_is_small(launched: list[str]) -> None:
    loss = fl.Dice() + fl.CrossEntropy()
    x, y = example(1, 4, (40_000,), dtype=np.float32)
    loss.value_and_grad(OnDevice(x), OnDevice(y))
    taken = sum(int(name.split()[1]) for name in launched if name.startswith("empty"))
    assert taken < x.nbytes / 8


def test_statistics_of_chunks_add_up_on_the_device(launched: list[str]) -> None:
    loss = fl.Dice(batch=True) + fl.CrossEntropy()
    x, y = example(2, 3, (40,), dtype=np.float32)
    parts = [(OnDevice(x[..., i : i + 8]), OnDevice(y[..., i : i + 8])) for i in range(0, 40, 8)]
    total = sum(loss.statistics(*part) for part in parts)
    expected = reference(loss, x, y)
    np.testing.assert_allclose(loss.value(total).values, expected[0], rtol=1e-6)
    gradients = [loss.gradient(*part, statistics=total).values for part in parts]
    gradient = np.concatenate(gradients, axis=-1)
    assert_agree(loss.value(total).values, gradient, expected)


def test_statistics_in_different_memories(launched: list[str]) -> None:
    loss = fl.Dice()
    x, y = example(2, 3, (40,), dtype=np.float32)
    here, there = loss.statistics(x, y), loss.statistics(OnDevice(x), OnDevice(y))
    with pytest.raises(ValueError, match=r"^statistics: .*numpy and stand_in"):
        here + there
    with pytest.raises(ValueError, match=r"^statistics: .*numpy and stand_in"):
        loss.gradient(OnDevice(x), OnDevice(y), statistics=here)


def test_validate_is_true_or_false() -> None:
    with pytest.raises(TypeError, match=r"^validate: .*'no'"):
        fl.Loss(fl.Dice(), validate="no")  # type: ignore[arg-type]


def test_bad_labels_and_weights_make_nan(launched: list[str]) -> None:
    loss = fl.Dice(reduction="none")
    x, y = example(2, 3, (40,), dtype=np.float32)
    y[1, 5] = 3
    value = loss(OnDevice(x), OnDevice(y)).values
    assert np.isnan(value[1]).all()
    np.testing.assert_allclose(value[0], reference(loss, x[:1], y[:1])[0][0], rtol=1e-6)
    assert np.isnan((fl.Dice() + fl.CrossEntropy())(OnDevice(x), OnDevice(y)).values)
    w = np.ones(y.shape)
    w[0, 0] = -1.0
    assert np.isnan(loss(OnDevice(x), OnDevice(y * 0), OnDevice(w)).values[0]).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
@pytest.mark.parametrize("classes", [1, 3, 40])
def test_bad_numbers_of_a_mask_make_nan(launched: list[str], classes: int, dtype: Any) -> None:
    loss = fl.Loss(fl.Dice(reduction="none"), activation="sigmoid")
    x, _ = example(2, classes, (40,), dtype=np.float32)
    g = np.ones(x.shape, dtype)
    g[1, -1, 39] = 255
    value, gradient = loss.value_and_grad(OnDevice(x), OnDevice(g))
    assert np.isnan(value.values[1]).all()
    assert np.isnan(gradient.values[1]).all()
    expected, slope = reference(loss, x[:1], g[:1])
    assert_agree(value.values[:1], gradient.values[:1], (expected, slope))


ALONE = [
    fl.CrossEntropy(),
    fl.CrossEntropy(reduction="sum", weight=[1, 0, 1]),
    fl.CrossEntropy(reduction="none"),
    fl.Focal(),
    fl.TopKCrossEntropy(),
    fl.Dice(),
    fl.Dice(batch=True, reduction="none"),
    fl.Jaccard(include_background=False),
    fl.Tversky(gamma=1.5),
    fl.GeneralizedDice(smooth_nr=0, smooth_dr=0),
]


@pytest.mark.parametrize("term", ALONE, ids=repr)
@pytest.mark.parametrize("fault", ["label", "weight"])
def test_no_term_hides_a_fault(launched: list[str], term: fl.Term, fault: str) -> None:
    x, y = example(2, 3, (40,), dtype=np.float32)
    w = np.ones(y.shape)
    if fault == "label":
        y[1, 5] = 7
    else:
        w[1, 5] = -1.0
    value, gradient = term.value_and_grad(OnDevice(x), OnDevice(y), OnDevice(w))
    assert np.isnan(value.values).any()
    assert np.isnan(np.delete(gradient.values[1], 5, axis=-1)).all()


def test_arrays_that_run_backwards(launched: list[str]) -> None:
    loss = fl.Dice() + fl.CrossEntropy()
    x, y = example(2, 4, (40,), dtype=np.float32)
    memory, labels = np.zeros((2, 4, 48), np.float32), np.zeros((2, 48), np.uint8)
    for first in range(8):  # with different alignment at both ends
        flipped = memory[:, :, first : first + 40][:, :, ::-1]
        flipped_labels = labels[:, first : first + 40][:, ::-1]
        flipped[...], flipped_labels[...] = x, y
        value, gradient = loss.value_and_grad(OnDevice(flipped), OnDevice(flipped_labels))
        assert_agree(value.values, gradient.values, reference(loss, x, y))


def test_many_classes_and_many_sums(launched: list[str]) -> None:
    """Sums that exceed a block's shared memory are still right."""
    terms = fl.Dice(squared=True), fl.Jaccard(), fl.CrossEntropy(label_smoothing=0.1)
    loss = fl.Loss(*terms, fl.Focal(gamma=1), fl.Focal(gamma=2), fl.Focal(gamma=3))
    x, y = example(1, 250, (300,))
    value, gradient = loss.value_and_grad(OnDevice(x), OnDevice(y))
    assert_agree(value.values, gradient.values, reference(loss, x, y))


def test_validate_asks_for_the_exact_error(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CudaBackend, "to_numpy", lambda self, view: view.copy())
    loss = fl.Loss(fl.Dice(), validate=True)
    x, y = example(2, 3, (40,), dtype=np.float32)
    assert np.isfinite(loss(OnDevice(x), OnDevice(y)).values)
    y[1, 5:7] = 3
    with pytest.raises(ValueError, match=r"^target: .*but 2 labels are not; the first is 3$"):
        loss(OnDevice(x), OnDevice(y))
    w = np.ones(y.shape)
    w[0, 0] = -1.0
    with pytest.raises(ValueError, match=r"^voxel_weight: .*the first is -1$"):
        loss(OnDevice(x), OnDevice(y * 0), OnDevice(w))
    loss, mask = fl.Loss(loss, activation="sigmoid"), np.zeros((2, 40), np.uint8)
    mask[1, 7:] = 255
    with pytest.raises(ValueError, match=r"^target: .*but 33 numbers are not; the first is 255$"):
        loss(OnDevice(x[:, :1]), OnDevice(mask))


def test_arrays_in_different_memories(launched: list[str]) -> None:
    loss = fl.Dice()
    x, y = example(2, 3, (40,), dtype=np.float32)
    w = np.ones(y.shape)
    with pytest.raises(ValueError, match=r"^target: .*CUDA device 0 .*in CPU memory$"):
        loss(OnDevice(x), y)
    with pytest.raises(ValueError, match=r"^target: .*in CPU memory like .*CUDA device 0$"):
        loss(x, OnDevice(y))
    with pytest.raises(ValueError, match=r"^voxel_weight: .*CUDA device 0 .*CUDA device 1$"):
        loss(OnDevice(x), OnDevice(y), OnDevice(w, 1))
    with pytest.raises(ValueError, match=r"^out: .*CUDA device 0 .*CPU memory$"):
        loss.value_and_grad(OnDevice(x), OnDevice(y), out=x)
    with pytest.raises(ValueError, match=r"^out: .*CPU memory .*CUDA device 0$"):
        loss.value_and_grad(x, y, out=OnDevice(x))
    assert not launched


def test_shapes_are_checked_before_anything_is_launched(launched: list[str]) -> None:
    x, y = example(2, 3, (40,), dtype=np.float32)
    with pytest.raises(ValueError, match=r"^target: "):
        fl.Dice()(OnDevice(x), OnDevice(y[:, :7]))
    memory = np.zeros(300, np.float32)
    overlapping = memory[:240].reshape(2, 3, 40), memory[40:280].reshape(2, 3, 40)
    with pytest.raises(ValueError, match=r"^out: overlaps"):
        fl.Dice().value_and_grad(
            OnDevice(overlapping[0]), OnDevice(y), out=OnDevice(overlapping[1])
        )
    assert not launched


def test_formulas_that_branch_on_their_sums(launched: list[str]) -> None:
    class Branching(fl.RegionTerm):
        def formula(self, overlap: Any, predicted: Any, reference: Any) -> Any:
            if (overlap > 0).all():
                return overlap, overlap, overlap
            return predicted, predicted, predicted

    x, y = example(2, 3, (40,), dtype=np.float32)
    with pytest.raises(TypeError, match=r"np\.where"):
        Branching()(OnDevice(x), OnDevice(y))


def test_the_choice_of_a_backend_is_for_arrays_in_cpu_memory(launched: list[str]) -> None:
    x, y = example(2, 3, (40,), dtype=np.float32)
    with fl.use_backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("error")
        fl.Dice()(OnDevice(x), OnDevice(y))
    assert "fastloss_reduce" in launched


def test_what_is_compiled_is_ascii(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled sources are ASCII, as CuPy writes them in the locale's encoding."""
    texts = [source("passes.cu"), source("top_k.cu")]
    kernels = stand_in.RecordingDevice.kernels
    monkeypatch.setattr(
        stand_in.RecordingDevice,
        "kernels",
        lambda self, text, names: texts.append(text) or kernels(self, text, names),
    )
    x, y = example(2, 3, (40,), dtype=np.float32)
    (fl.GeneralizedDice(batch=True) + fl.Focal())(OnDevice(x), OnDevice(y))
    assert len(texts) == 3
    assert all(text.isascii() for text in texts)


def test_no_voxel_and_no_sample(launched: list[str]) -> None:
    loss = fl.Dice() + fl.CrossEntropy()
    for shape in ((2, 3, 0), (0, 3, 4)):
        x, y = np.zeros(shape, np.float32), np.zeros((shape[0], shape[2]), np.uint8)
        value, gradient = loss.value_and_grad(OnDevice(x), OnDevice(y))
        assert value.values == reference(loss, x, y)[0]
        assert gradient.shape == shape


@pytest.mark.parametrize("protocol", [False, True])
def test_launches_on_streams_of_others(monkeypatch: pytest.MonkeyPatch, protocol: bool) -> None:
    """Foreign streams use CuPy's protocol where it exists, not the class that warns."""

    class Stream:
        def __init__(self, address: int) -> None:
            self.ptr = address

        if protocol:

            @classmethod
            def from_external(cls, given: Any) -> Any:
                version, address = given.__cuda_stream__()
                assert version == 0
                return cls(address)

    class ExternalStream(Stream):
        def __init__(self, address: int, ordinal: int) -> None:
            assert not protocol, "ExternalStream is deprecated"
            super().__init__(address)

    runtime = SimpleNamespace(
        getDevice=lambda: 0,
        cudaDevAttrMultiProcessorCount=16,
        deviceGetAttribute=lambda attribute, ordinal: 132,
    )
    cupy = SimpleNamespace(
        cuda=SimpleNamespace(Stream=Stream, ExternalStream=ExternalStream, runtime=runtime)
    )
    monkeypatch.setattr(cuda, "_cupy", lambda: cupy)
    cuda._stream.cache_clear()
    seen = []
    for address in (0, 1, 7 << 40):
        place = stand_in.StandInPlace(0)
        place.stream = address
        device = cuda.CudaDevice(place)
        device.launch(lambda *given: seen.append(given[-1].ptr), 1, (32, 1), 0, np.zeros(1))
    cuda._stream.cache_clear()
    assert seen == [0, 1, 7 << 40]
