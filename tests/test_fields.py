"""Arrays that a term reads beside the target: distance maps, skeletons, second label maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BACKENDS, example, finite_differences, need, need_backend, one_hot
from test_backends import relayout

import fastloss as fl
from fastloss.backends import use_backend

PHI = fl.Sum("one", "p", 0.0, "distance")


class Boundary(fl.VoxelwiseTerm):
    """The mean over the voxels of Σ_c p_c φ_c (Kervadec et al. 2019)."""

    requires = frozenset({PHI})

    def __init__(self, reduction: str = "mean") -> None:
        self.reduction = reduction

    def linear(self, statistics: fl.Statistics) -> tuple[dict[Any, Any], np.ndarray]:
        return {PHI: 1.0}, statistics.voxels


class Recall(fl.Term):
    """1 − Σ p s / Σ s over all classes, with a field s; s is a map of labels or numbers."""

    requires = frozenset(
        {fl.Sum("one", "p", 0.0, "skeleton"), fl.Sum("one", "one", 0.0, "skeleton")}
    )

    def combine(self, statistics: fl.Statistics) -> Any:
        hit = statistics[fl.Sum("one", "p", 0.0, "skeleton")].sum()
        size = statistics[fl.Sum("one", "one", 0.0, "skeleton")].sum()

        def pullback(upstream: Any) -> Any:
            return {fl.Sum("one", "p", 0.0, "skeleton"): -upstream / size}

        return 1.0 - hit / size, pullback


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    with use_backend(need_backend(request.param)):
        yield request.param


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "bool", "bfloat16"])
def test_a_field_of_every_class(backend: str, dtype: str) -> None:
    x, y = example(2, 4, (5, 6, 7))
    phi = np.random.default_rng(1).normal(size=x.shape)
    kind = need("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    phi = (phi > 0) if dtype == "bool" else phi.astype(kind)
    loss = Boundary() + fl.Dice()
    given: Any = phi
    if dtype == "bfloat16":
        given = need("torch").from_numpy(phi.view(np.int16)).view(need("torch").bfloat16)
    value, gradient = loss.value_and_grad(x, y, fields={"distance": given})
    expected = (softmax(x) * phi.astype(np.float64)).sum(axis=1).mean() + fl.Dice()(x, y)
    assert value == pytest.approx(expected, rel=1e-9)
    if dtype == "float64":

        def of(z: np.ndarray, y: Any, w: Any) -> Any:
            return loss(z, y, w, fields={"distance": phi})

        assert np.allclose(gradient, finite_differences(of, x, y), atol=1e-8)


@pytest.mark.parametrize("logits", ["contiguous", "channels last"])
def test_strides_do_not_matter(backend: str, logits: str) -> None:
    for layout in ("channels last", "reversed", "stepped", "wide", "packed"):
        x, y = example(2, 3, (9, 8), dtype=np.float32)
        phi = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
        shared = phi[:, 0]
        loss = fl.Dice() + Boundary()
        right = loss.value_and_grad(x, y, fields={"distance": phi})
        value, gradient = loss.value_and_grad(
            relayout(x, logits), y, fields={"distance": relayout(phi, layout)}
        )
        assert value == pytest.approx(right[0], rel=1e-6)
        assert np.allclose(gradient, right[1], atol=1e-7)
        # One number per voxel equals the same number for each class.
        value, gradient = loss.value_and_grad(x, y, fields={"distance": relayout(shared, layout)})
        right = loss.value_and_grad(x, y, fields={"distance": np.stack([shared] * 3, axis=1)})
        assert value == pytest.approx(right[0], rel=1e-6)
        assert np.allclose(gradient, right[1], atol=1e-7)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64"])
def test_a_field_of_integers_is_a_second_label_map(backend: str, dtype: str) -> None:
    x, y = example(2, 3, (6, 7))
    labels = np.random.default_rng(2).integers(0, 4, y.shape)  # 3 is no class
    loss = Recall() + fl.CrossEntropy()
    value, gradient = loss.value_and_grad(x, y, fields={"skeleton": labels.astype(dtype)})
    dense = one_hot(labels, 3)
    right = loss.value_and_grad(x, y, fields={"skeleton": dense})
    assert value == pytest.approx(right[0], rel=1e-12)
    assert np.allclose(gradient, right[1], atol=1e-12)
    hits = (softmax(x) * dense).sum() / dense.sum()
    assert value == pytest.approx(1 - hits + fl.CrossEntropy()(x, y), rel=1e-9)


def test_voxels_that_do_not_count_may_hold_anything(backend: str) -> None:
    x, y = example(2, 3, (40, 20), dtype=np.float32)
    phi = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    weight = (np.random.default_rng(3).uniform(size=y.shape) < 0.7).astype(np.float32)
    loss = Boundary() + fl.Dice()
    right = loss.value_and_grad(x, y, weight, fields={"distance": phi})
    phi[:, 0][weight == 0], phi[:, 1][weight == 0] = np.nan, np.inf
    value, gradient = loss.value_and_grad(x, y, weight, fields={"distance": phi})
    assert value == right[0]
    assert (gradient == right[1]).all()


def test_channels_last_and_sigmoid(backend: str) -> None:
    x, y = example(2, 3, (6, 7))
    dense = one_hot(y, 3)
    phi = np.random.default_rng(1).normal(size=x.shape)
    loss = fl.Loss(fl.Dice(), Boundary(), activation="sigmoid")
    last = fl.Loss(fl.Dice(), Boundary(), activation="sigmoid", channel_axis=-1)
    right = loss.value_and_grad(x, dense, fields={"distance": phi})
    value, gradient = last.value_and_grad(
        *(np.moveaxis(a, 1, -1) for a in (x, dense)), fields={"distance": np.moveaxis(phi, 1, -1)}
    )
    assert value == pytest.approx(right[0], rel=1e-12)
    assert np.allclose(np.moveaxis(gradient, -1, 1), right[1], atol=1e-13)
    p = 1 / (1 + np.exp(-x))
    dice = fl.Loss(fl.Dice(), activation="sigmoid")(x, dense)
    assert right[0] == pytest.approx((p * phi).sum(axis=1).mean() + dice, rel=1e-9)


def test_chunks_cut_fields_with_the_logits(backend: str) -> None:
    x, y = example(1, 3, (12, 5, 6))
    phi = np.random.default_rng(1).normal(size=x.shape)
    loss = Boundary() + fl.Dice()
    right = loss.value_and_grad(x, y, fields={"distance": phi})
    cuts = [slice(0, 5), slice(5, 12)]
    chunks = [(x[:, :, c], y[:, c], {"distance": phi[:, :, c]}) for c in cuts]
    total = sum(loss.statistics(a, b, fields=f) for a, b, f in chunks)
    assert loss.value(total) == pytest.approx(right[0], rel=1e-12)
    parts = [loss.gradient(a, b, fields=f, statistics=total) for a, b, f in chunks]
    assert np.allclose(np.concatenate(parts, axis=2), right[1], atol=1e-14)


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        (None, ValueError, "fields: the terms of this loss read 'distance', got none"),
        ({}, ValueError, "fields: .*'distance', got none"),
        ({"distances": np.zeros((2, 3, 6))}, ValueError, "fields: .*'distance', got 'distances'"),
        ([np.zeros((2, 3, 6))], TypeError, "fields: expected a mapping .*list"),
        ({"distance": np.zeros((2, 2, 6))}, ValueError, r"fields\['distance'\]: .*\(2, 2, 6\)"),
        ({"distance": np.zeros((1, 3, 6))}, ValueError, r"fields\['distance'\]: .*\(1, 3, 6\)"),
        ({"distance": np.zeros((2, 3, 6), complex)}, TypeError, r"fields\['distance'\]: .*complex"),
        ({"distance": "far"}, TypeError, r"fields\['distance'\]: .*str"),
    ],
)
def test_bad_fields_are_named(fields: Any, kind: type[Exception], message: str) -> None:
    x, y = example(2, 3, (6,))
    with pytest.raises(kind, match=message):
        Boundary()(x, y, fields=fields)


def test_fields_that_no_term_reads_are_an_error() -> None:
    x, y = example(2, 3, (6,))
    with pytest.raises(
        ValueError, match="fields: the terms of this loss read none, got 'distance'"
    ):
        fl.Dice()(x, y, fields={"distance": x})


def test_the_gradient_may_not_overwrite_a_field() -> None:
    x, y = example(2, 3, (6,))
    phi = x.copy()
    with pytest.raises(ValueError, match=r"out: overlaps the fields\['distance'\]"):
        (Boundary() + fl.Dice()).value_and_grad(x, y, fields={"distance": phi}, out=phi)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_field_of_every_class_beside_usual_terms(data: st.DataObject) -> None:
    """The C++ kernels take Σ φ p along with Dice and cross-entropy, whatever else is asked for."""
    need_backend("cpu")
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    classes = data.draw(st.sampled_from([2, 3, 4, 5, 14, 40]))
    shape = tuple(data.draw(st.lists(st.integers(1, 17), min_size=1, max_size=3)))
    dtype = data.draw(st.sampled_from(["float32", "float64", "float16"]))
    size = data.draw(st.sampled_from([3.0, 60.0]))
    x = relayout(
        (size * random.standard_normal((2, classes, *shape))).astype(dtype),
        data.draw(st.sampled_from(["contiguous", "channels last", "cropped"])),
    )
    y = random.integers(0, classes, (2, *shape)).astype(np.uint8)
    kind = data.draw(st.sampled_from(["float32", "float16", "float64", "int8"]))
    phi = (5 * random.standard_normal(x.shape)).astype(kind)
    if data.draw(st.booleans()):
        phi = relayout(phi, "channels last")
    weight = None
    if data.draw(st.booleans()):
        weight = random.integers(0, 2, y.shape).astype(np.float32)
        phi = np.where(weight[:, None] == 0, phi.dtype.type(0), phi)
    smoothing = data.draw(st.sampled_from([0.0, 0.1]))
    parts = [
        fl.Dice(squared=data.draw(st.booleans())),
        fl.CrossEntropy(label_smoothing=smoothing),
        0.3 * Boundary(),
    ]
    if data.draw(st.booleans()):
        parts.append(fl.Focal(gamma=2.0))
    loss = fl.Loss(*parts, ignore_index=data.draw(st.sampled_from([None, 0])))
    found = {}
    for name in ("cpu", "reference"):
        with use_backend(name):
            found[name] = loss.value_and_grad(x, y, weight, fields={"distance": phi})
    (value, gradient), (wanted, slope) = found["cpu"], found["reference"]
    near = 2e-3 if dtype == "float16" else 2e-6
    assert value == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    slope = slope.astype(np.float64)
    apart = np.linalg.norm(gradient.astype(np.float64) - slope)
    assert apart <= near * np.linalg.norm(slope) + 1e-7
