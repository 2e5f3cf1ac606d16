"""Lovász losses: by a histogram of the errors, and by sorting them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BACKENDS, EMULATED, finite_differences, need, need_backend, norm, one_hot

import fastloss as fl
from fastloss import threads

HINGE = {"activation": "sigmoid"}


def jaccard_of_list(errors: np.ndarray, foreground: np.ndarray, weight: Any = 1.0) -> Any:
    """Value and ΔJ by J of every length of the sorted list, one after the other."""
    order = np.argsort(-errors, kind="stable")
    weight = np.broadcast_to(weight, errors.shape)[order]
    hits, misses = weight * foreground[order], weight * ~foreground[order]
    total = hits.sum()
    j = [0.0]
    for i in range(1, len(order) + 1):
        union = total + misses[:i].sum()
        j.append((hits[:i].sum() + misses[:i].sum()) / union if union else 0.0)
    steps = np.empty(len(order))
    steps[order] = np.diff(j)
    return float(errors @ steps), steps


def p_of(x: np.ndarray, activation: str) -> np.ndarray:
    x = x.astype(np.float64)
    if activation == "sigmoid":
        return 1 / (1 + np.exp(-x))
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def oracle(
    x: np.ndarray, g: np.ndarray, m: np.ndarray, *, kind: str, classes: Any, per_sample: bool
) -> tuple[float, np.ndarray]:
    """Value and gradient by the logits, sample by sample and class by class, in float64.

    g: (B, C, N) of 0 and 1; m: (B, N); kind: "softmax", "sigmoid" or "hinge".
    """
    batch, count = x.shape[:2]
    p = p_of(x, "sigmoid" if kind == "hinge" else kind)
    by = np.zeros(x.shape)
    rows = [[b] for b in range(batch)] if per_sample else [list(range(batch))]
    value = 0.0
    for row in rows:
        at = np.concatenate([m[b] for b in row]) > 0
        present = [c for c in range(count) if np.concatenate([g[b, c] for b in row])[at].any()]
        chosen = {"present": present, "all": range(count)}.get(classes, classes)
        for c in chosen if at.any() else ():
            mask = np.concatenate([g[b, c] for b in row])[at] > 0.5
            sign = np.where(mask, -1.0, 1.0)
            if kind == "hinge":
                raw = 1 + sign * np.concatenate([x[b, c] for b in row])[at]
            else:
                raw = mask + sign * np.concatenate([p[b, c] for b in row])[at]
            weight = np.concatenate([m[b] for b in row])[at]
            loss, steps = jaccard_of_list(np.maximum(raw, 0), mask, weight)
            share = 1 / (len(rows) * len(chosen))
            value += share * loss
            found = np.zeros(at.shape)
            found[at] = share * np.where(raw > 0, steps, 0) * sign
            by[row, c] = found.reshape(len(row), -1)
    if kind == "softmax":
        by = p * by - p * (p * by).sum(axis=1, keepdims=True)
    elif kind == "sigmoid":
        by = p * (1 - p) * by
    return value, by


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    return float(a @ b / (norm(a) * norm(b))) if norm(a) and norm(b) else float(norm(a) == norm(b))


def loss_of(kind: str, **options: Any) -> fl.Loss:
    term = fl.LovaszHinge if kind == "hinge" else fl.LovaszSoftmax
    return fl.Loss(term(**options), activation="softmax" if kind == "softmax" else "sigmoid")


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["softmax", "sigmoid", "hinge"]),
    batch=st.integers(1, 3),
    channels=st.integers(1, 5),
    spatial=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    classes=st.sampled_from(["present", "all", (0,)]),
    per_sample=st.booleans(),
    dense=st.booleans(),
    weighted=st.booleans(),
    dtype=st.sampled_from([np.float64, np.float32]),
)
def test_as_the_sorted_list(
    name: str,
    seed: int,
    kind: str,
    batch: int,
    channels: int,
    spatial: list[int],
    classes: Any,
    per_sample: bool,
    dense: bool,
    weighted: bool,
    dtype: Any,
) -> None:
    """By sorting, exactly; by a histogram, of which few voxels share a bin, nearly."""
    need_backend(name)
    rng = np.random.default_rng(seed)
    x = (2 * rng.normal(size=(batch, channels, *spatial))).astype(dtype)
    labels = rng.integers(0, max(2, channels), (batch, *spatial))
    mask = kind != "softmax" and channels == 1
    dense = dense and (channels > 1 or mask)
    labels = labels if channels > 1 or mask else np.zeros_like(labels)
    g = labels[:, None] == 1 if mask else one_hot(labels, channels)
    m = rng.integers(0, 4, labels.shape).astype(np.float32) if weighted else np.ones(labels.shape)
    target = (rng.random((batch, channels, *spatial)) < 0.4).astype(np.uint8) if dense else labels
    g = target if dense else g
    flat = tuple(a.reshape(*a.shape[: a.ndim - len(spatial)], -1) for a in (x, g, m.astype(float)))
    options = {"classes": classes, "per_sample": per_sample}
    value, gradient = oracle(*flat, kind=kind, **options)
    given = (x, target, m if weighted else None)
    with fl.use_backend(name):
        ours, our_gradient = loss_of(kind, method="exact", **options).value_and_grad(*given)
        near, near_gradient = loss_of(kind, **options).value_and_grad(*given)
    tolerance = 1e-10 if dtype == np.float64 else 3e-6
    assert ours == pytest.approx(value, rel=tolerance, abs=tolerance)
    our_gradient = our_gradient.reshape(gradient.shape)
    np.testing.assert_allclose(our_gradient, gradient, atol=3 * tolerance)
    # A class that does not occur has its largest error for a loss, known to half a bin.
    absent = classes != "present" and not g.reshape(batch, channels, -1).any(axis=2).all()
    assert near == pytest.approx(value, rel=3e-3 if absent else 1e-4, abs=1e-6)
    if not absent and near_gradient.size < 100:
        assert cosine(near_gradient, gradient) > 0.99


def volume(kind: str, seed: int = 0, edge: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of four classes, one of them rare, as a network has them at this stage."""
    rng = np.random.default_rng(seed)
    y = np.zeros((1, edge, edge, edge), np.uint8)
    y[:, 5:25, 5:25, 5:25], y[:, 30:36, 3:20, 2:9], y[:, 3:7, 3:7, 30:34] = 1, 2, 3
    true = np.moveaxis(np.eye(4)[y], -1, 1)
    x = {
        "start": 0.3 * rng.normal(size=true.shape),
        "random": 3 * rng.normal(size=true.shape),
        "trained": 6 * true + 1.5 * rng.normal(size=true.shape),
        "finished": 12 * true + 1.5 * rng.normal(size=true.shape),
        "wrong": -4 * true + rng.normal(size=true.shape),
        "ties": rng.integers(-2, 3, true.shape),
    }[kind]
    return x.astype(np.float32), y


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "hinge"])
def test_histograms_are_within_the_stated_error(kind: str) -> None:
    """1e-5 of the value, and a cosine of the gradients of 0.9999."""
    for stage in ("start", "random", "trained", "finished", "wrong", "ties"):
        x, y = volume(stage)
        if kind == "hinge":
            x = x - 1.5
        value, gradient = loss_of(kind, method="exact").value_and_grad(x, y)
        near, near_gradient = loss_of(kind).value_and_grad(x, y)
        assert abs(near - value) <= 1e-5 * value, stage
        if stage != "ties":  # where rounding decides which of equal errors is first
            assert cosine(near_gradient, gradient) >= 0.9999, stage


@pytest.mark.parametrize("name", ["cpu", EMULATED])
def test_backends_agree(name: str) -> None:
    need_backend(name)
    for kind, dtype in (("softmax", np.float16), ("sigmoid", np.float32), ("hinge", np.float64)):
        x, y = volume("trained", edge=37)
        if name == EMULATED:  # which takes long
            x, y = x[:, :, :, 4::3, 3::5], y[:, :, 4::3, 3::5]
        x = np.concatenate([x, x[:, ::-1]]).astype(dtype)
        y = np.concatenate([y, y])
        w = np.random.default_rng(0).uniform(0, 3, y.shape).astype(np.float32)
        w[0, :3] = 0
        x[0, :, :3] = np.nan  # where nothing counts
        for weight in (w, (w > 0).astype(np.float32)):
            loss = loss_of(kind, per_sample=kind == "sigmoid") + fl.CrossEntropy() + fl.Dice()
            with fl.use_backend("reference"):
                expected, expected_gradient = loss.value_and_grad(x, y, weight)
            with fl.use_backend(name):
                value, gradient = loss.value_and_grad(x, y, weight)
            assert value == pytest.approx(expected, rel=3e-6)
            error = norm(gradient.astype(np.float64) - expected_gradient.astype(np.float64))
            assert error <= (2e-3 if dtype == np.float16 else 1e-4) * norm(expected_gradient)
            assert not gradient[0, :, :3].any()


@pytest.mark.parametrize("method", ["histogram", "exact"])
def test_gradient_by_differences(method: str) -> None:
    rng = np.random.default_rng(1)
    y = rng.integers(0, 3, (2, 3, 4))
    w = rng.uniform(0.5, 2, y.shape)
    for kind in ("softmax", "sigmoid", "hinge"):
        x = 3 * rng.normal(size=(2, 3, 3, 4))
        for per_sample in (False, True):
            loss = loss_of(kind, method=method, per_sample=per_sample, classes="all")
            gradient = loss.gradient(x, y, w)
            exact = loss_of(kind, method="exact", per_sample=per_sample, classes="all")
            expected = finite_differences(exact, x, y, w)
            if method == "exact":
                np.testing.assert_allclose(gradient, expected, atol=1e-7)
            else:
                assert cosine(gradient, expected) > 0.9999


def test_sums_with_other_terms() -> None:
    """One loss, scaled, in few passes; and beside a term that ranks by itself."""
    x, y = volume("trained", edge=37)
    x, y = x[:, :, :9, :9], y[:, :9, :9]
    parts = (fl.LovaszSoftmax(), fl.Dice(squared=True), fl.CrossEntropy(label_smoothing=0.1))
    factors = (0.5, 2.0, -1.0)
    for others in ((), (fl.LovaszSoftmax(method="exact"),), (fl.TopKCrossEntropy(k=30),)):
        terms, weights = (*parts, *others), (*factors, 0.25)
        whole = sum(f * t for f, t in zip(weights, terms, strict=False))
        value, gradient = whole.value_and_grad(x, y)
        alone = [t.value_and_grad(x, y) for t in terms]
        expected = sum(f * v for f, (v, _) in zip(weights, alone, strict=False))
        expected_gradient = sum(f * g for f, (_, g) in zip(weights, alone, strict=False))
        assert value == pytest.approx(expected, rel=1e-5)
        assert norm(gradient - expected_gradient) <= 1e-5 * norm(expected_gradient)
    both = fl.Loss(fl.LovaszSoftmax(), fl.LovaszHinge(), **HINGE)
    alone = [fl.Loss(t, **HINGE).value_and_grad(x, y) for _, t in both.terms]
    value, gradient = both.value_and_grad(x, y, upstream=2.0)
    assert value == pytest.approx(sum(v for v, _ in alone), rel=1e-6)
    np.testing.assert_allclose(gradient, 2 * sum(g for _, g in alone), rtol=1e-4, atol=1e-9)


def test_chunks_add_up() -> None:
    x, y = volume("trained")
    for per_sample, kind in ((False, "softmax"), (True, "hinge")):
        loss = loss_of(kind, per_sample=per_sample) + fl.Dice()
        value, gradient = loss.value_and_grad(x, y)
        parts = [(x[:, :, i : i + 8], y[:, i : i + 8]) for i in range(0, 40, 8)]
        total = sum(loss.statistics(*part) for part in parts)
        assert loss.value(total) == pytest.approx(value, rel=1e-7)
        found = np.concatenate([loss.gradient(*p, statistics=total) for p in parts], axis=2)
        np.testing.assert_allclose(found, gradient, rtol=1e-5, atol=1e-12)
    with pytest.raises(ValueError, match=r"^statistics: LovaszSoftmax is no function of sums"):
        fl.LovaszSoftmax(method="exact").statistics(x, y)


def test_the_same_bits_of_any_number_of_threads() -> None:
    need_backend("cpu")
    x, y = volume("random")
    w = np.random.default_rng(0).uniform(0, 3, y.shape).astype(np.float32)
    before = fl.get_num_threads()
    found = []
    try:
        for number in (1, 2, 5):
            threads.set_num_threads(number)
            for weight in (None, w):
                for kind in ("softmax", "hinge"):
                    value, gradient = loss_of(kind).value_and_grad(x, y, weight)
                    found.append((number, value.tobytes(), gradient.tobytes()))
    finally:
        threads.set_num_threads(before)
    assert [f[1:] for f in found[:4]] == [f[1:] for f in found[4:8]] == [f[1:] for f in found[8:]]


def test_degenerate_inputs() -> None:
    x, y = volume("random")
    x, y = x[:, :, :4, :4, :4], y[:, :4, :4, :4]
    for method in ("histogram", "exact"):
        loss = fl.Loss(fl.LovaszSoftmax(method=method), ignore_index=9)
        value, gradient = loss.value_and_grad(x, np.full_like(y, 9))  # all ignored
        assert value == 0
        assert not gradient.any()
        assert loss(x[:, :, :0], y[:, :0]) == 0
        assert loss(x[:0], y[:0]) == 0
        perfect = np.where(np.moveaxis(np.eye(4)[y], -1, 1) > 0, 200.0, 0).astype(np.float32)
        assert loss(perfect, y) == 0
        assert loss(-perfect, y) == pytest.approx(1, abs=1e-6)
        broken = x.copy()
        broken[0, 1, 2, 2, 2] = np.nan
        assert np.isnan(loss(broken, y))
        broken[0, 1, 2, 2, 2] = np.inf
        assert np.isfinite(loss(broken, y))
        assert loss(x[:, :, :1, :1, :1], y[:, :1, :1, :1]) == pytest.approx(
            1 - p_of(x, "softmax")[0, y[0, 0, 0, 0], 0, 0, 0], rel=1e-6
        )
        far = np.array([[[3e5, -3e5]]])  # hinges far out of range
        assert fl.Loss(fl.LovaszHinge(method=method), **HINGE)(far, np.array([[1, 0]])) == 0


def test_ignored_voxels_and_functions() -> None:
    x, y = volume("trained", edge=37)
    y = y.copy()
    y[:, 20:] = 255
    for method in ("histogram", "exact"):
        value, gradient = fl.Loss(fl.LovaszSoftmax(method=method), ignore_index=255).value_and_grad(
            x, y
        )
        inside = fl.LovaszSoftmax(method=method).value_and_grad(x[:, :, :20], y[:, :20])
        assert value == pytest.approx(inside[0], rel=1e-6)
        np.testing.assert_allclose(gradient[:, :, :20], inside[1], rtol=1e-5, atol=1e-12)
        assert not gradient[:, :, 20:].any()
        options = {"classes": [1, 3], "per_sample": True, "method": method, "ignore_index": 255}
        assert fl.lovasz_softmax_loss(x, y, **options) == fl.Loss(
            fl.LovaszSoftmax(classes=(1, 3), per_sample=True, method=method), ignore_index=255
        )(x, y)
    hinge = fl.Loss(fl.LovaszHinge(), activation="sigmoid", ignore_index=255)
    assert fl.lovasz_hinge_loss(x, y, ignore_index=255) == hinge(x, y)


def test_autograd_and_modules() -> None:
    torch = need("torch")
    import fastloss.torch as ft

    x, y = volume("trained", edge=37)
    for method in ("histogram", "exact"):
        loss = fl.LovaszSoftmax(method=method) + 0.5 * fl.CrossEntropy() + fl.Dice()
        value, gradient = loss.value_and_grad(x, y)
        logits = torch.tensor(x, requires_grad=True)
        result = loss(logits, torch.tensor(y))
        (3 * result).backward()
        assert float(result.detach()) == value
        np.testing.assert_allclose(logits.grad.numpy(), 3 * gradient, rtol=1e-5, atol=1e-12)
        module = ft.LovaszSoftmax(method=method, reuse_logits=method == "histogram")
        value, gradient = fl.LovaszSoftmax(method=method).value_and_grad(x, y)
        logits = torch.tensor(x, requires_grad=True)
        module(logits * 1, torch.tensor(y)[:, None]).backward()
        np.testing.assert_allclose(logits.grad.numpy(), gradient, rtol=1e-6)
    # gradcheck's differences, by the exact loss.
    few = torch.tensor(3 * np.random.default_rng(0).normal(size=(1, 3, 7)), requires_grad=True)
    labels = torch.tensor([[0, 1, 2, 0, 1, 1, 2]])
    for module in (ft.LovaszSoftmax(method="exact"), ft.LovaszHinge(method="exact")):
        assert torch.autograd.gradcheck(lambda z, f=module: f(z, labels), few)
    outputs = [torch.tensor(x[:, :, ::s, ::s, ::s], requires_grad=True) for s in (1, 2)]
    deep = ft.DeepSupervision(ft.LovaszSoftmax())  # as nnU-Net's outputs
    deep(outputs, torch.tensor(y)).backward()
    assert all(torch.isfinite(o.grad).all() for o in outputs)


@pytest.mark.parametrize("method", ["histogram", "exact"])
def test_shares_of_voxels_are_those_of_a_sort(method: str) -> None:
    """The error of a voxel times the step of its place in the list; they add up to the value."""
    rng = np.random.default_rng(0)
    for kind in ("softmax", "sigmoid", "hinge"):
        for classes, per_sample in (("present", False), ("all", True), ((0, 2), False)):
            x = 3 * rng.normal(size=(2, 4, 5, 6))
            y = rng.integers(0, 3, (2, 5, 6))  # a class does not occur
            m = rng.integers(0, 3, y.shape).astype(float)
            g = one_hot(y, 4).astype(np.uint8)
            x[0, :, 0, 0], m[0, 0, 0] = np.nan, 0.0
            flat = [a.reshape(*a.shape[:-2], -1) for a in (x, g, m)]
            value, shares = shares_of_list(*flat, kind, classes, per_sample)
            term = loss_of(kind, method=method, classes=classes, per_sample=per_sample)
            for loss, factor in ((term, 1.0), (0.5 * term + fl.Dice() + fl.CrossEntropy(), 0.5)):
                found = loss.explain(x, y if kind == "softmax" else g, m)
                name = "LovaszHinge" if kind == "hinge" else "LovaszSoftmax"
                wanted = shares if kind != "softmax" else shares.sum(axis=1)
                own = np.asarray(found.maps[name]).reshape(wanted.shape)
                # Voxels of one bin of a histogram have the mean of their steps.
                close = 1e-6 if method == "exact" else 3e-3
                if method == "exact":
                    np.testing.assert_allclose(own, factor * wanted, atol=close * wanted.max())
                assert cosine(own, wanted) > 0.999
                assert found.kinds[name] == "share"
                assert found.parts[name].shape == (2, 4)
                parts = factor * shares.sum(axis=2)
                np.testing.assert_allclose(found.parts[name], parts, atol=close * value)
                assert found.terms[name] == pytest.approx(own.sum(), rel=1e-6)
                alone = factor * float(term(x, y if kind == "softmax" else g, m))
                assert found.terms[name] == pytest.approx(alone, rel=1e-6)
                assert found.value == pytest.approx(
                    float(loss(x, y if kind == "softmax" else g, m))
                )
    # Many voxels in few bins, as float32 has them, and gains beside them that are exact.
    x, y = volume("trained", edge=37)
    for method in ("histogram", "exact"):
        loss = fl.LovaszSoftmax(method=method) + fl.Dice()
        found = loss.explain(x[..., :9, :9], y[..., :9, :9], exact=True)
        shown = found.maps["LovaszSoftmax"].astype(np.float64)
        assert shown.sum() == pytest.approx(found.terms["LovaszSoftmax"], rel=1e-6)
        assert found.parts["LovaszSoftmax"].shape == (1, 4)
        near = shares_of_list(
            x[..., :9, :9].reshape(1, 4, -1),
            one_hot(y[..., :9, :9], 4).reshape(1, 4, -1),
            np.ones((1, 37 * 81)),
            "softmax", "present", False,
        )[1].sum(axis=1)  # fmt: skip
        assert cosine(shown, near) > 0.9999


def shares_of_list(
    x: np.ndarray, g: np.ndarray, m: np.ndarray, kind: str, classes: Any, per_sample: bool
) -> tuple[float, np.ndarray]:
    """The value, and of every voxel and class its part of it, by the sorted list."""
    batch, count = x.shape[:2]
    x = np.where(m[:, None] > 0, x, 0.0)
    p = p_of(x, "sigmoid" if kind == "hinge" else kind)
    g = g > 0
    e = np.maximum(1 + np.where(g, -x, x), 0) if kind == "hinge" else np.abs(g - p)
    rows = [[b] for b in range(batch)] if per_sample else [list(range(batch))]
    found = np.zeros(x.shape)
    for row in rows:
        at = m[row] > 0
        present = [c for c in range(count) if g[row, c][at].any()]
        chosen = {"present": present, "all": range(count)}.get(classes, classes)
        for c in chosen:
            steps = np.zeros(at.shape)
            steps[at] = jaccard_of_list(e[row, c][at], g[row, c][at], m[row][at])[1]
            found[row, c] = steps * e[row, c] / (len(rows) * len(chosen))
    return float(found.sum()), found


def test_compiled_by_torch() -> None:
    torch = need("torch")
    x, y = volume("trained", edge=37)
    loss = fl.LovaszSoftmax() + fl.CrossEntropy()
    compiled = torch.compile(lambda a, b: loss(a, b), fullgraph=True, backend="eager")
    logits = torch.tensor(x[..., :9], requires_grad=True)
    value = compiled(logits, torch.tensor(y[..., :9]))
    value.backward()
    expected = loss.value_and_grad(x[..., :9], y[..., :9])
    assert float(value.detach()) == pytest.approx(expected[0], rel=1e-6)
    np.testing.assert_allclose(logits.grad.numpy(), expected[1], rtol=1e-5, atol=1e-12)


def test_jax() -> None:
    jax = need("jax")
    x, y = volume("trained", edge=37)
    x, y = x[..., :9], y[..., :9]
    for loss in (fl.LovaszSoftmax() + fl.CrossEntropy(), fl.LovaszSoftmax(method="exact")):
        expected = loss.value_and_grad(x, y)
        step = jax.jit(jax.value_and_grad(lambda a, f=loss: f(a, jax.numpy.asarray(y))))
        value, gradient = step(jax.numpy.asarray(x))
        assert float(value) == pytest.approx(expected[0], rel=1e-6)
        np.testing.assert_allclose(gradient, expected[1], rtol=1e-5, atol=1e-12)


def test_errors() -> None:
    x, y = np.zeros((1, 3, 4)), np.zeros((1, 4), int)
    term = fl.LovaszSoftmax
    for error, message, call in (
        (ValueError, r"^classes: expected numbers in \[0, 3\)", lambda: term(classes=[3])(x, y)),
        (ValueError, "^classes: expected one of", lambda: term(classes="some")),
        (ValueError, "^classes: expected different", lambda: term(classes=[1, 1])),
        (ValueError, "^classes: expected at least one", lambda: term(classes=[])),
        (TypeError, "^classes: expected class numbers", lambda: term(classes=[0.5])),
        (TypeError, "^classes: expected 'present'", lambda: term(classes=1)),
        (ValueError, "^method: expected one of", lambda: term(method="sort")),
        (ValueError, "^activation: LovaszHinge is defined", lambda: fl.LovaszHinge()(x, y)),
        (ValueError, "^regions: LovaszSoftmax ranks", lambda: term()(x, y, regions=y)),
        (
            ValueError,
            "^regions: LovaszSoftmax ranks",
            lambda: (term() + fl.CCDiceCE())(x[..., None], y[..., None]),
        ),
        (
            ValueError,
            "^terms: expected at most one LovaszSoftmax",
            lambda: term(method="exact") + term(method="exact"),
        ),
        (TypeError, "^terms: LovaszSoftmax is no region", lambda: fl.PerRegion(term())),
    ):
        with pytest.raises(error, match=message):
            call()
