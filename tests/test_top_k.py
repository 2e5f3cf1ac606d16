"""Cross-entropy of the hardest voxels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import BACKENDS, example, finite_differences, need, need_backend, norm

import fastloss as fl


def oracle(x: np.ndarray, y: np.ndarray, k: float, **options: Any) -> tuple[float, np.ndarray]:
    """Value and gradient by PyTorch, in float64."""
    torch = need("torch")
    if options.get("weight") is not None:
        options["weight"] = torch.tensor(options["weight"], dtype=torch.float64)
    logits = torch.tensor(x.astype(np.float64), requires_grad=True)
    losses = torch.nn.functional.cross_entropy(
        logits, torch.tensor(y.astype(np.int64)), reduction="none", **options
    ).reshape(-1)
    kept = max(1, int(losses.numel() * k / 100))
    value = torch.topk(losses, kept, sorted=False)[0].mean()
    value.backward()
    return float(value.detach()), logits.grad.numpy()


@pytest.mark.parametrize("name", BACKENDS)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 3),
    classes=st.integers(1, 40),
    spatial=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    k=st.floats(0.5, 100),
    weighted=st.booleans(),
    ignored=st.booleans(),
    channels_last=st.booleans(),
)
def test_as_pytorch(
    name: str,
    seed: int,
    batch: int,
    classes: int,
    spatial: list[int],
    k: float,
    weighted: bool,
    ignored: bool,
    channels_last: bool,
) -> None:
    need_backend(name)
    rng = np.random.default_rng(seed)
    x = 3 * rng.normal(size=(batch, classes, *spatial))
    if channels_last:
        x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    y = rng.integers(0, classes, (batch, *spatial))
    if ignored:
        y[rng.random(y.shape) < 0.2] = 255
    weight = rng.uniform(0.5, 2, classes).tolist() if weighted else None
    value, gradient = oracle(x, y, k, weight=weight, ignore_index=255)
    with fl.use_backend(name):
        loss = fl.Loss(fl.TopKCrossEntropy(k=k, weight=weight), ignore_index=255)
        ours, our_gradient = loss.value_and_grad(x, y)
    assert ours == pytest.approx(value, rel=1e-9, abs=1e-12)
    if classes > 1 and value > 0:  # where all losses are 0, all of them tie
        np.testing.assert_allclose(our_gradient, gradient, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_narrow_logits(backend: str, dtype: Any) -> None:
    for classes in (2, 3, 14, 40):
        x, y = example(2, classes, (11, 13), dtype=dtype)
        value, gradient = fl.TopKCrossEntropy(k=20).value_and_grad(x, y)
        expected, expected_gradient = oracle(x, y, 20)
        assert value.dtype == np.float32
        assert gradient.dtype == dtype
        assert value == pytest.approx(expected, rel=1e-6)
        rounding = 2e-6 if dtype == np.float32 else 2e-3
        assert norm(gradient.astype(np.float64) - expected_gradient) <= rounding * norm(gradient)


def test_beside_other_terms(backend: str) -> None:
    x, y = example(2, 4, (5, 6))
    parts = (fl.TopKCrossEntropy(k=30), fl.Dice(squared=True), fl.CrossEntropy(), fl.Focal())
    whole = sum(f * t for f, t in zip((0.5, 2.0, 1.0, -1.0), parts, strict=True))
    alone = [t.value_and_grad(x, y) for t in parts]
    value, gradient = whole.value_and_grad(x, y)
    expected = sum(f * v for f, (v, _) in zip((0.5, 2.0, 1.0, -1.0), alone, strict=True))
    expected_gradient = sum(f * g for f, (_, g) in zip((0.5, 2.0, 1.0, -1.0), alone, strict=True))
    assert value == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-9, atol=1e-14)


def test_beside_terms_of_other_sums(backend: str) -> None:
    """Of sums that the passes of Dice and cross-entropy do not form; the map of explain too."""
    x, y = example(2, 4, (5, 6))
    top = fl.TopKCrossEntropy(k=30)
    for other in (fl.KLDivergence(), fl.DiceSemimetric(), fl.GeneralizedCrossEntropy()):
        value, gradient = (top + other).value_and_grad(x, y)
        parts = [term.value_and_grad(x, y) for term in (top, other)]
        assert value == pytest.approx(sum(v for v, _ in parts), rel=1e-9), other
        np.testing.assert_allclose(gradient, sum(g for _, g in parts), 1e-8, 1e-13, str(other))
        for ours in (top, fl.CrossEntropy()):
            found = (other + ours).explain(x, y).maps[type(ours).__name__]
            np.testing.assert_allclose(found.sum(), ours(x, y), 1e-9, err_msg=str(other))


def test_voxel_weights_multiply_the_losses(backend: str) -> None:
    x, y = example(1, 3, (20,))
    w = np.random.default_rng(1).uniform(0, 2, y.shape)
    w[0, :5] = 0
    losses = np.sort((w * -np.log(softmax_of_label(x, y))).reshape(-1))
    loss = fl.TopKCrossEntropy(k=25)
    assert loss(x, y, w) == pytest.approx(losses[-5:].mean(), rel=1e-12)
    gradient = loss.gradient(x, y, w)
    np.testing.assert_allclose(gradient, finite_differences(loss, x, y, w), atol=1e-8)


def softmax_of_label(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    p = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    return np.take_along_axis(p, y[:, None], 1)[:, 0]


def test_all_voxels_are_cross_entropy(backend: str) -> None:
    x, y = example(2, 3, (4, 5))
    assert fl.TopKCrossEntropy(k=100)(x, y) == pytest.approx(fl.CrossEntropy()(x, y), rel=1e-12)


def test_at_least_one_voxel(backend: str) -> None:
    x, y = example(1, 3, (7,))
    hardest = (-np.log(softmax_of_label(x, y))).max()
    assert fl.TopKCrossEntropy(k=0.01)(x, y) == pytest.approx(hardest, rel=1e-12)


def test_ties_share_the_last_places(backend: str) -> None:
    x, y = np.zeros((1, 2, 8)), np.zeros((1, 8), np.uint8)
    x[0, 0, 0] = -3  # the hardest voxel; the others tie for the second of two places
    gradient = fl.TopKCrossEntropy(k=25).gradient(x, y)
    hard = np.exp(3) / (1 + np.exp(3)) / 2
    np.testing.assert_allclose(gradient[0, 1], [hard, *[0.25 / 7] * 7], rtol=1e-12)


def test_nothing_is_left_out_for_nan(backend: str) -> None:
    x, y = example(1, 3, (8,), dtype=np.float32)
    x[0, 1, 4] = np.nan
    assert np.isnan(fl.TopKCrossEntropy(k=50)(x, y))


def test_a_class_of_weight_0_costs_nothing(backend: str) -> None:
    x, y = np.zeros((1, 2, 4), np.float32), np.array([[0, 1, 1, 1]])
    x[0, 0, 0] = -np.inf
    loss = fl.TopKCrossEntropy(k=100, weight=[0, 1])
    assert loss(x, y) == pytest.approx(0.75 * np.log(2), rel=1e-6)


def test_all_ignored(backend: str) -> None:
    x, y = example(1, 3, (8,))
    loss = fl.Loss(fl.TopKCrossEntropy(), ignore_index=9)
    value, gradient = loss.value_and_grad(x, np.full_like(y, 9))
    assert value == 0
    assert not gradient.any()


def test_the_gradient_may_take_the_logits_place(backend: str) -> None:
    x, y = example(2, 5, (6, 7), dtype=np.float32)
    loss = fl.TopKCrossEntropy(k=15) + fl.Dice()
    expected = loss.gradient(x, y)
    loss.value_and_grad(x, y, out=x)
    np.testing.assert_array_equal(x, expected)


def test_autograd(backend: str) -> None:
    torch = need("torch")
    x, y = example(2, 4, (5, 6))
    loss = fl.Dice() + fl.TopKCrossEntropy(k=30)
    logits = torch.tensor(x, requires_grad=True)
    (3 * loss(logits, torch.tensor(y))).backward()
    np.testing.assert_allclose(logits.grad.numpy(), 3 * loss.gradient(x, y), rtol=1e-12)


def test_compiled() -> None:
    torch = need("torch")
    x, y = example(2, 4, (5, 6))
    loss = fl.Dice() + fl.TopKCrossEntropy(k=30, weight=[1, 2, 3, 4])
    logits, labels = torch.tensor(x, requires_grad=True), torch.tensor(y)
    torch.compile(lambda a, b: loss(2 * a, b), fullgraph=True, backend="aot_eager")(
        logits, labels
    ).backward()
    np.testing.assert_allclose(logits.grad.numpy(), 2 * loss.gradient(2 * x, y), rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k: expected a number above 0"),
        ({"k": 101}, r"k: expected a finite number in \[0, 100\]"),
        ({"k": float("nan")}, "k: expected"),
        ({"weight": [-1, 1]}, "weight: expected"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fl.TopKCrossEntropy(**options)


def test_bad_use(backend: str) -> None:
    x, y = example(1, 3, (8,))
    term = fl.TopKCrossEntropy()
    with pytest.raises(ValueError, match=r"activation: .* 'softmax', got 'sigmoid'"):
        fl.Loss(term, activation="sigmoid")(x, y)
    with pytest.raises(ValueError, match="target: TopKCrossEntropy takes a label map"):
        term(x, np.ones_like(x) / 3)
    with pytest.raises(ValueError, match="weight: expected 3 numbers"):
        fl.TopKCrossEntropy(weight=[1, 2])(x, y)
    with pytest.raises(ValueError, match="at most one TopKCrossEntropy"):
        fl.TopKCrossEntropy() + fl.TopKCrossEntropy(k=50)
    with pytest.raises(ValueError, match="statistics: TopKCrossEntropy is no function of sums"):
        (fl.Dice() + term).statistics(x, y)
    with pytest.raises(ValueError, match="target: expected labels"):
        term(x, y + 1)


def test_the_function_is_the_term(backend: str) -> None:
    x, y = example(2, 3, (8,))
    loss = fl.Loss(fl.TopKCrossEntropy(k=40, weight=[1, 2, 3]), ignore_index=1)
    function = fl.top_k_cross_entropy_loss
    assert function(x, y, k=40, weight=[1, 2, 3], ignore_index=1) == loss(x, y)
