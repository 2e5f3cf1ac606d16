"""Losses that make the fields they read: distances, boundaries, skeletons."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest
import stand_in
from hypothesis import given
from hypothesis import strategies as st
from support import BACKENDS, example, finite_differences, need, need_backend, norm, one_hot
from test_backends import relayout

import fastloss as fl

ndimage = need("scipy.ndimage")

TERMS = {
    "boundary": fl.Boundary,
    "hausdorff": fl.HausdorffDT,
    "surface": fl.GeneralizedSurface,
    "dou": fl.BoundaryDoU,
    "skeleton": fl.SkeletonRecall,
}
DISTANCES = ("boundary", "hausdorff", "surface")


# --------------------------------------------------------------------------- the definitions


def exact(mask: np.ndarray, spacing: Any) -> np.ndarray:
    """The distance to the boundary, 0 where there is none, in float64."""
    if mask.all() or not mask.any():
        return np.zeros(mask.shape)
    edt = ndimage.distance_transform_edt
    return edt(mask, sampling=spacing) + edt(~mask, sampling=spacing)


def signed(mask: np.ndarray, spacing: Any) -> np.ndarray:
    inside = mask & (exact(mask, spacing) > 0)
    return np.where(mask, -(exact(mask, spacing) - inside), exact(mask, spacing))


def boundary(mask: np.ndarray) -> np.ndarray:
    return mask & ~ndimage.binary_erosion(mask)


def tubes(masks: np.ndarray, of_each: bool, dilations: int = 2) -> np.ndarray:
    """Of one sample, (C, *spatial)."""
    skeletonize = need("skimage.morphology").skeletonize
    found = []
    for mask in masks if of_each else [masks[1:].any(axis=0)]:
        line = skeletonize(mask) > 0 if mask.any() else np.zeros_like(mask)
        found.append(ndimage.binary_dilation(line, iterations=dilations) if dilations else line)
    return masks & np.stack(found)


def oracle(
    kind: str, options: dict[str, Any], x: Any, y: Any, w: Any, loss_options: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Value and gradient of its sum by the formulas, voxel by voxel, in float64 by PyTorch."""
    torch = need("torch")
    leaf = torch.tensor(np.asarray(x, np.float64), requires_grad=True)
    activation, ignore = loss_options.get("activation", "softmax"), loss_options.get("ignore_index")
    p = {"softmax": lambda a: torch.softmax(a, 1), "sigmoid": torch.sigmoid, "none": lambda a: a}[
        activation
    ](leaf)
    classes = x.shape[1]
    g = np.asarray(y, np.float64) if y.ndim == x.ndim else one_hot(y, classes)
    m = np.ones((len(x), *x.shape[2:])) if w is None else np.asarray(w, np.float64)
    if ignore is not None:
        if y.ndim < x.ndim:
            ignored = y == ignore
        else:
            ignored = y[:, ignore] > 0.5 if 0 <= ignore < classes else (y == ignore).any(axis=1)
        m, g = np.where(ignored, 0, m), np.where(ignored[:, None], 0, g)
    spacing = options.get("spacing")
    masks, seen = g > 0.5, (p.detach().numpy() > 0.5) & (m > 0)[:, None]
    axes = tuple(range(2, x.ndim))

    def each(function: Any, of: np.ndarray) -> Any:
        return np.stack([[function(mask, spacing) for mask in sample] for sample in of])

    def total(a: Any) -> Any:
        a = (torch.as_tensor(a) * torch.as_tensor(m)[:, None]).sum(axes)
        return a.sum(0, keepdim=True) if options.get("batch") else a

    voxels = total(np.ones_like(g))
    target = torch.as_tensor(g)
    if kind == "boundary":
        value = total(p * torch.as_tensor(each(signed, masks))) / voxels.clamp(min=1e-300)
    elif kind == "hausdorff":
        alpha = options.get("alpha", 2.0)
        far = sum(np.where(a == 0, 0, a**alpha) for a in (each(exact, masks), each(exact, seen)))
        value = total((p - target) ** 2 * torch.as_tensor(far)) / voxels.clamp(min=1e-300)
    elif kind == "surface":
        far = torch.as_tensor(each(exact, masks))
        value = 1 - total((far * (1 - target - p)) ** 2) / (total(far**2) + 1e-5)
    elif kind == "dou":
        size, edge = (
            total(target),
            total(target * torch.as_tensor(each(lambda a, _: boundary(a), masks))),
        )
        alpha = (2 * (1 - (edge + 1e-5) / (size + 1e-5)) - 1).clamp(max=0.8)
        both, overlap = total(p**2) + total(target**2), total(p * target)
        value = (both - 2 * overlap + 1e-5) / (both - (1 + alpha) * overlap + 1e-5)
    else:
        of_each = activation == "sigmoid" and y.ndim == x.ndim
        s = np.stack([tubes(sample, of_each) for sample in masks]).astype(float)
        if not of_each:
            s[:, 0] = 0
        value = 1 - (total(p * torch.as_tensor(s)) + 1e-5) / (total(s) + 1e-5)
    defaults = {"surface": False, "skeleton": False}
    value = value[:, 0 if options.get("include_background", defaults.get(kind, True)) else 1 :]
    if options.get("weight") is not None:
        value = value * torch.as_tensor(options["weight"])
    reduction = options.get("reduction", "mean")
    value = value.mean() if reduction == "mean" else value.sum() if reduction == "sum" else value
    value = torch.log(1 + value) if options.get("log") else value
    if value.requires_grad:
        value.sum().backward()
    gradient = np.zeros(x.shape) if leaf.grad is None else leaf.grad.numpy()
    return value.detach().numpy(), gradient


# --------------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", TERMS)
@given(data=st.data())
def test_as_defined(kind: str, name: str, data: Any) -> None:
    draw = data.draw
    need_backend(name)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    least = 2 if kind == "skeleton" else 1
    spatial = draw(st.lists(st.integers(1, 7), min_size=least, max_size=3))
    activation = draw(st.sampled_from(["softmax", "sigmoid", "none"]))
    classes, batch = draw(st.integers(2, 5)), draw(st.integers(1, 3))
    options: dict[str, Any] = {
        "include_background": draw(st.booleans()),
        "batch": draw(st.booleans()),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }
    if draw(st.booleans()):
        counted = classes - (not options["include_background"])
        options["weight"] = rng.uniform(0.5, 2, counted).tolist()
    if kind in DISTANCES and draw(st.booleans()):
        options["spacing"] = rng.uniform(0.5, 3, len(spatial)).tolist()
    if kind == "hausdorff":
        options["alpha"] = draw(st.sampled_from([2.0, 1.0, 1.5]))
        options["log"] = draw(st.booleans()) and options["reduction"] == "mean"
    dtype = draw(st.sampled_from(["float64", "float32", "float16"]))
    x = 2 * rng.normal(size=(batch, classes, *spatial))
    if activation == "none":
        x = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    x = x.astype(dtype)
    y = rng.integers(0, draw(st.integers(1, classes)), (batch, *spatial))
    ignore = draw(st.sampled_from([None, 255, 0]))
    if ignore == 255:
        y[rng.random(y.shape) < 0.3] = ignore
    form = draw(st.sampled_from(["labels", "dense", "soft"]))
    if form == "soft":
        soft = rng.random(x.shape).astype(np.float32)
        y = np.where((y == 255)[:, None], np.float32(255), soft)
    elif form == "dense":
        dense = one_hot(y, classes, "uint8")
        if draw(st.booleans()) and activation == "sigmoid":
            dense |= rng.random(dense.shape) < 0.3
        y = np.where((y == 255)[:, None], np.uint8(255), dense)
    w = rng.uniform(0, 2, (batch, *spatial)) if draw(st.booleans()) else None
    if w is not None:
        w[rng.random(w.shape) < 0.2] = 0
    loss = fl.Loss(TERMS[kind](**options), activation=activation, ignore_index=ignore)
    layout = draw(st.sampled_from(["contiguous", "channels last", "reversed", "wide"]))
    with fl.use_backend(name):
        value, gradient = loss.value_and_grad(relayout(x, layout), relayout(y, layout), w)
    right, right_gradient = oracle(
        kind, options, x, y, w, {"activation": activation, "ignore_index": ignore}
    )
    wide = dtype == "float64"
    # The size of what cancels: distances of both signs; D² (p² − 2 g p + g²) in float32.
    longest = 3 * max(spatial)
    scale = {"boundary": longest, "hausdorff": 1 if wide else longest**2}.get(kind, 1)
    scale *= max(options.get("weight", [1]))
    if options["reduction"] == "sum":
        scale *= classes * batch
    fine = 1e-7 if wide else 1e-6
    np.testing.assert_allclose(value, right, rtol=10 * fine, atol=fine * scale)
    error = norm(gradient.astype(np.float64) - right_gradient)
    rounding = 2e-3 if dtype == "float16" else 10 * fine
    step = 2.0**-24 * np.sqrt(x.size) if dtype == "float16" else 0.0
    assert error <= rounding * norm(right_gradient) + fine * scale + step


def test_by_hand(backend: str) -> None:
    def of(term: fl.Term, labels: list[Any], p: list[Any]) -> float:
        foreground = np.array([p], float)
        probabilities = np.stack([1 - foreground, foreground], axis=1)
        return float(fl.Loss(term, activation="none")(probabilities, np.array([labels])))

    # D is 2, 1, 1, 2.
    surface, labels = fl.GeneralizedSurface(smooth_dr=0), [0, 0, 1, 1]
    assert of(surface, labels, labels) == pytest.approx(0)
    assert of(surface, labels, [1, 1, 0, 0]) == pytest.approx(1)
    assert of(surface, labels, [0, 1, 1, 1]) == pytest.approx(1 - 9 / 10)
    assert of(fl.Boundary(include_background=False), labels, [1, 0, 0, 1]) == 1 / 4
    # Two of three voxels at the boundary: α = −1/3; Z = 2, Y = 3, I = 2.
    dou = fl.BoundaryDoU(include_background=False)
    assert of(dou, [0, 1, 1, 1, 0], [0, 1, 1, 0, 0]) == pytest.approx(3 / 11, rel=1e-4)
    # A line is its own skeleton.
    line = np.zeros((3, 7), int)
    line[1, 1:6] = 1
    p = np.where(line == 1, 0.25, 1.0)
    assert of(fl.SkeletonRecall(), line.tolist(), p.tolist()) == pytest.approx(0.75, rel=1e-5)
    # D_p is 1, 1, 2, 3, and D_g is 3, 2, 1, 1; they differ at the two voxels between.
    hausdorff = fl.HausdorffDT(include_background=False, alpha=1)
    assert of(hausdorff, [0, 0, 0, 1], [0, 1, 1, 1]) == pytest.approx((1 + 2 + 2 + 1) / 4)


@pytest.mark.parametrize("kind", TERMS)
def test_finite_differences(kind: str) -> None:
    x, y = example(2, 3, (5, 6), seed=3)
    loss = TERMS[kind](reduction="none") + 0.5 * fl.Dice(
        reduction="none", include_background=kind in ("boundary", "hausdorff", "dou")
    )
    upstream = np.random.default_rng(0).normal(size=loss(x, y).shape)
    gradient = loss.value_and_grad(x, y, upstream=upstream)[1]
    expected = finite_differences(loss, x, y, upstream=upstream)
    np.testing.assert_allclose(gradient, expected, atol=1e-7)


@pytest.mark.parametrize("kind", TERMS)
def test_nothing_of_a_class_and_nothing_else_are_finite(kind: str, backend: str) -> None:
    x, _ = example(2, 3, (5, 6), dtype=np.float32)
    absent = {"boundary": 0.0, "surface": 1.0}
    for label in (0, 1, 255):
        y = np.full((2, 5, 6), label)
        loss = fl.Loss(TERMS[kind](include_background=True, reduction="none"), ignore_index=255)
        value, gradient = loss.value_and_grad(x, y)
        assert np.isfinite(value).all()
        assert np.isfinite(gradient).all()
        if kind in absent:
            assert (value == absent[kind]).all()
            assert not gradient.any()
    alone = TERMS[kind](include_background=True).value_and_grad(x[:, :1], np.zeros((2, 5, 6), int))
    assert np.isfinite(alone[0])
    nothing = TERMS[kind]()(np.zeros((0, 3, 5, 6)), np.zeros((0, 5, 6), int))
    assert np.isfinite(nothing)


def test_what_voxels_hold_that_do_not_count_does_not_matter(backend: str) -> None:
    x, y = example(2, 3, (6, 7), dtype=np.float32)
    w = (np.random.default_rng(0).random(y.shape) < 0.7).astype(np.float32)
    loss = fl.HausdorffDT(include_background=True) + fl.Boundary()
    right = loss.value_and_grad(x, y, w)
    spoilt = np.where(w[:, None] == 0, np.float32(np.nan), x)
    value, gradient = loss.value_and_grad(spoilt, y, w)
    assert value == right[0]
    np.testing.assert_array_equal(gradient, right[1])


@pytest.mark.parametrize("kind", TERMS)
@pytest.mark.parametrize("batch", [False, True])
def test_regions_take_the_place_of_samples(kind: str, batch: bool, backend: str) -> None:
    x, y = example(2, 3, (6, 7))
    regions = np.zeros(y.shape, np.int16)
    regions[:, 3:], regions[:, 0] = 1, -1
    # Voxels of no region are not predicted, for HausdorffDT; what lies in another region is.
    term = TERMS[kind](include_background=True, batch=batch, reduction="none")
    fields = term.fields(y, classes=3)
    value, gradient = term.value_and_grad(x, y, fields=fields, regions=regions)
    if kind == "hausdorff":
        seen = (softmax(x) > 0.5) & (regions >= 0)[:, None]
        far = np.stack([[exact(m, None) ** 2 for m in sample] for sample in seen])
        far = far + fields["distance"].astype(np.float64) ** 2
        each = (softmax(x) - one_hot(y, 3)) ** 2 * far
        right = [np.where(regions == r, each.swapaxes(0, 1), 0) for r in (0, 1)]
        sums = np.stack([r.sum(axis=(2, 3)).T for r in right], axis=1)
        sizes = np.array([2, 3]) * 7.0
        sums = sums.sum(axis=0, keepdims=True) / 2 if batch else sums
        np.testing.assert_allclose(value.reshape(sums.shape), sums / sizes[:, None], rtol=1e-6)
    else:
        right = [term(x, y, regions == r, fields=fields) for r in (0, 1)]
        np.testing.assert_allclose(value, np.stack(right, axis=1).reshape(value.shape), rtol=1e-9)
    assert not gradient[:, :, 0].any()


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


# --------------------------------------------------------------------------- given and made


def whole() -> fl.Loss:
    """All terms, with options that matter for the fields."""
    return fl.Loss(
        fl.Boundary(spacing=(2, 1)),
        fl.HausdorffDT(spacing=(1.0, 3.0)),
        0.5 * fl.HausdorffDT(spacing=(1.0, 3.0), alpha=1, include_background=False),
        fl.GeneralizedSurface(spacing=(1, 3)),
        fl.BoundaryDoU(batch=True),
        fl.SkeletonRecall(dilations=1),
        fl.Dice(),
        ignore_index=1,
    )


NAMES = ["boundary", "boundary_voxels", "distance", "skeleton"]


@pytest.mark.parametrize("target", ["labels", "dense", "floats"])
def test_given_fields_are_those_that_are_made(target: str, backend: str) -> None:
    x, y = example(2, 4, (7, 8))
    y = {"labels": y, "dense": one_hot(y, 4), "floats": y.astype(np.float32)}[target]
    loss = whole()
    fields = loss.fields(y, classes=4, dense=target == "dense")
    assert list(fields) == NAMES
    assert all(len(field) == 2 for field in fields.values())
    before = {name: field.copy() for name, field in fields.items()}
    right = loss.value_and_grad(x, y)
    value, gradient = loss.value_and_grad(x, y, fields=fields)
    assert value == right[0]
    np.testing.assert_array_equal(gradient, right[1])
    for name, field in fields.items():
        np.testing.assert_array_equal(field, before[name])
        # Those that are left out are made.
        assert loss(x, y, fields={name: field}) == value


def test_fields_of_half_the_size_and_of_another_spacing() -> None:
    x, y = example(2, 3, (7, 8))
    loss = fl.Boundary() + fl.GeneralizedSurface() + fl.SkeletonRecall()
    fields = loss.fields(y, classes=3, spacing=(2, 1), dtype="float16")
    assert {k: v.dtype.name for k, v in fields.items()} == {
        "boundary": "float16",
        "distance": "float16",
        "skeleton": "uint8",
    }
    spaced = fl.Boundary(spacing=(2, 1)) + fl.GeneralizedSurface(spacing=(2, 1))
    spaced = spaced + fl.SkeletonRecall()
    assert loss(x, y, fields=fields) == pytest.approx(spaced(x, y), rel=1e-3)
    far = fl.Boundary(spacing=1e5).fields(y, classes=3, dtype="float16")
    assert np.isfinite(far["boundary"]).all()


def test_fields_know_the_layout_of_the_target() -> None:
    _, y = example(2, 3, (7, 8))
    right = fl.Boundary().fields(y, classes=3)["boundary"]
    assert right.shape == (2, 3, 7, 8)
    for target, options in (
        (y[:, None], {"spatial_axes": 2}),
        (y[:, None], {"spacing": (1, 1)}),
        (one_hot(y, 3), {"dense": True}),
    ):
        own = fl.Boundary().fields(target, classes=3, **options)
        np.testing.assert_array_equal(own["boundary"], right)
    last = fl.Loss(fl.Boundary(), channel_axis=-1)
    own = last.fields(np.moveaxis(one_hot(y, 3), 1, -1), classes=3, dense=True)
    np.testing.assert_array_equal(np.moveaxis(own["boundary"], -1, 1), right)
    x = np.moveaxis(example(2, 3, (7, 8))[0], 1, -1)
    assert last(x, y, fields=own) == pytest.approx(last(x, y), rel=1e-12)
    mask = fl.Loss(fl.Boundary(), activation="sigmoid").fields(y == 1, classes=1)
    np.testing.assert_array_equal(mask["boundary"], right[:, 1:2])
    assert fl.Dice().fields(y, classes=3) == {}


def test_chunks_take_the_fields_of_the_whole(backend: str) -> None:
    x, y = example(1, 3, (12, 6))
    loss = fl.Boundary() + fl.GeneralizedSurface() + fl.BoundaryDoU() + fl.SkeletonRecall()
    fields = loss.fields(y, classes=3)
    right = loss.value_and_grad(x, y)

    def cut(array: np.ndarray, part: slice) -> np.ndarray:
        return array[:, :, part] if array.ndim == x.ndim else array[:, part]

    chunks = []
    for part in (slice(0, 5), slice(5, 12)):
        chunks.append((cut(x, part), y[:, part], {k: cut(f, part) for k, f in fields.items()}))
    total = sum(loss.statistics(a, b, fields=f) for a, b, f in chunks)
    assert loss.value(total) == pytest.approx(right[0], rel=1e-12)
    parts = [loss.gradient(a, b, fields=f, statistics=total) for a, b, f in chunks]
    np.testing.assert_allclose(np.concatenate(parts, axis=2), right[1], atol=1e-14)
    with pytest.raises(ValueError, match=r"statistics: a part .* 'boundary' was not given"):
        loss.statistics(*chunks[0][:2])
    with pytest.raises(ValueError, match=r"statistics: a part .* 'boundary' was not given"):
        loss.gradient(*chunks[0][:2], statistics=total)
    with pytest.raises(ValueError, match="statistics: HausdorffDT measures distances"):
        fl.HausdorffDT().statistics(x, y)


def test_beside_a_loss_that_chooses_voxels() -> None:
    x, y = example(2, 3, (5, 6))
    parts = (fl.TopKCrossEntropy(k=30), fl.Boundary(), fl.SkeletonRecall())
    loss = parts[0] + parts[1] + parts[2]
    assert loss(x, y) == pytest.approx(sum(part(x, y) for part in parts), rel=1e-12)


def test_a_loss_can_be_sent_to_a_worker() -> None:
    _, y = example(2, 4, (7, 8))
    loss = whole()
    again = pickle.loads(pickle.dumps(loss))
    for name, field in again.fields(y, classes=4).items():
        np.testing.assert_array_equal(field, loss.fields(y, classes=4)[name])
    assert again.structure == loss.structure
    json.loads(loss.structure)


def test_a_skeleton_is_the_field(backend: str) -> None:
    need("skimage")
    x, y = example(2, 3, (9, 10))
    given = fl.skeleton(y.astype(np.uint8))
    assert given.dtype == np.uint8
    assert given.shape == y.shape
    loss = fl.SkeletonRecall()
    assert loss(x, y, fields={"skeleton": given}) == loss(x, y)
    torch = need("torch")
    assert torch.equal(fl.skeleton(torch.tensor(y)), torch.tensor(given).long())


def test_skeletons_need_scikit_image(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "skimage.morphology", None)
    with pytest.raises(ImportError, match=r"scikit-image, .* pip install"):
        fl.skeleton(np.ones((1, 4, 4), int))


# --------------------------------------------------------------------------- PyTorch


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_autograd(dtype: str) -> None:
    torch = need("torch")
    x, y = example(2, 4, (7, 8))
    loss = whole()
    leaf = torch.tensor(x).to(getattr(torch, dtype)).requires_grad_()
    value = loss(leaf, torch.tensor(y))
    (2 * value).backward()
    right = loss.value_and_grad(leaf.detach().double().numpy(), y)
    exact = 1e-12 if dtype == "float64" else 1e-5
    assert float(value.detach()) == pytest.approx(right[0], rel=exact)
    rounding = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}[dtype]
    error = norm(leaf.grad.double().numpy() - 2 * right[1])
    assert error <= rounding * norm(2 * right[1])
    fields = loss.fields(torch.tensor(y), classes=4)
    assert all(isinstance(field, torch.Tensor) for field in fields.values())
    assert torch.equal(loss(leaf, torch.tensor(y), fields=fields), value)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = loss(torch.nn.functional.conv2d(leaf.float(), torch.eye(4)[..., None, None]), y)
    assert mixed.dtype == torch.float32
    assert torch.isfinite(mixed)


@pytest.mark.parametrize("given", [(), ("distance",), tuple(NAMES)])
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_compiled_and_exported(given: tuple[str, ...], channel_axis: int) -> None:
    torch = need("torch")
    torch._dynamo.reset()
    loss = fl.Loss(whole(), channel_axis=channel_axis)
    x, y = example(2, 4, (7, 8), dtype=np.float32)
    x = np.ascontiguousarray(np.moveaxis(x, 1, channel_axis))
    labels = torch.tensor(y)
    fields = {k: v for k, v in loss.fields(labels, classes=4).items() if k in given}
    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="inductor")):
        leaf = torch.tensor(x, requires_grad=True)
        value = function(leaf, labels, fields=fields)
        value.backward()
        found.append((value.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)

    class Model(torch.nn.Module):
        def forward(self, a: Any, b: Any, f: Any) -> Any:
            return loss(a, b, fields=f)

    arrays = torch.tensor(x), labels, fields
    exported = torch.export.export(Model(), arrays).module()
    torch.testing.assert_close(exported(*arrays), found[0][0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["boundary", "hausdorff"])
def test_a_growing_factor_compiles_nothing_anew(kind: str) -> None:
    torch = need("torch")
    torch._dynamo.reset()
    x, y = example(2, 3, (7, 8), dtype=np.float32)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    term = TERMS[kind]()

    def step(logits: Any, labels: Any, factor: Any) -> Any:
        return (fl.GeneralizedDice() + factor * term)(2 * logits, labels)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = fl.GeneralizedDice() + 0.01 * term

        def forward(self, logits: Any, labels: Any) -> Any:
            return self.loss(2 * logits, labels)

    model = Model()
    fast = torch.compile(model, fullgraph=True, backend=counter)
    for factor in (0.01, 0.02, 0.5, 1.0):
        model.loss = fl.GeneralizedDice() + factor * term
        leaf = torch.tensor(x, requires_grad=True)
        value = fast(leaf, torch.tensor(y))
        value.backward()
        right = step(torch.tensor(x, requires_grad=True), torch.tensor(y), factor)
        torch.testing.assert_close(value, right)
    assert counter.frame_count == 1


def test_made_inside_compiled_code_and_traced() -> None:
    torch = need("torch")
    torch._dynamo.reset()
    x, y = map(torch.tensor, example(2, 3, (7, 8), dtype=np.float32))

    def function(logits: Any, labels: Any, factor: float) -> Any:
        loss = fl.Dice() + factor * fl.Boundary(spacing=(2, 1)) + fl.HausdorffDT(alpha=1.5)
        return (loss + fl.SkeletonRecall() + fl.BoundaryDoU())(logits, labels)

    fast = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for width, factor in ((8, 0.1), (7, 0.2), (6, 0.3)):
        found = []
        for call in (fast, function):
            leaf = x[..., :width].clone().requires_grad_()
            value = call(leaf, y[..., :width], factor)
            value.backward()
            found.append((value.detach(), leaf.grad))
        torch.testing.assert_close(found[0], found[1])
    loss = whole()
    x, y = map(torch.tensor, example(2, 4, (7, 8), dtype=np.float32))
    traced = torch.jit.trace(lambda a, b: loss(a, b), (x, y))
    torch.testing.assert_close(traced(x.flip(2), y), loss(x.flip(2), y))
    dense = torch.nn.functional.one_hot(y, 4).movedim(-1, 1)
    for target in (y, dense):
        operator = torch.ops.fastloss.made_fields.default
        torch.library.opcheck(operator, (x, target, None, [], None, 0, "", loss.structure))


def test_what_is_saved_for_the_backward_pass_can_be_moved() -> None:
    torch = need("torch")
    x, y = example(2, 4, (7, 8))
    moved = []
    leaf = torch.tensor(x, requires_grad=True)

    def move(tensor: Any) -> Any:
        moved.append(tensor.shape)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(move, lambda t: t):
        value = whole()(leaf, torch.tensor(y))
    value.backward()
    np.testing.assert_allclose(leaf.grad.numpy(), whole().gradient(x, y), atol=1e-14)
    assert moved.count(leaf.shape) > 3  # the fields too


def _rank(rank: int, address: str) -> None:
    import torch
    import torch.distributed as dist

    import fastloss.torch as ft

    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    x, y = map(torch.tensor, example(2, 3, (6, 7)))
    loss = fl.HausdorffDT() + fl.Boundary(batch=True) + fl.Dice()
    whole = x.clone().requires_grad_()
    right = loss(whole, y)
    right.backward()
    part = slice(rank, rank + 1)
    own = x[part].clone().requires_grad_()
    value = ft.Loss(loss, process_group=True)(own, y[part])
    value.backward()
    torch.testing.assert_close(value, right)
    torch.testing.assert_close(own.grad, 2 * whole.grad[part])
    cut = (slice(None), slice(3 * rank, 3 * rank + 3))
    of_volume = ft.Loss(fl.Boundary(), process_group=True, shard="volume")
    with pytest.raises(ValueError, match=r"shard: a part .* 'boundary' was not given"):
        of_volume(x[:, :, cut[1]], y[cut])
    fields = {"boundary": fl.Boundary().fields(y, classes=3)["boundary"][:, :, cut[1]]}
    value = of_volume(x[:, :, cut[1]], y[cut], fields=fields)
    torch.testing.assert_close(value, fl.Boundary()(x, y))
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks(tmp_path: Any) -> None:
    from support import need_gloo

    torch = need("torch")
    need_gloo()
    torch.multiprocessing.spawn(_rank, (f"file://{tmp_path}/meeting",), nprocs=2)


# --------------------------------------------------------------------------- arrays on a GPU


def test_fields_of_arrays_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    need_backend("emulated cuda")
    stand_in.install(monkeypatch)
    loss = whole()
    x, y = example(2, 4, (7, 8))
    right = loss.value_and_grad(x, y)
    there = stand_in.OnDevice(x), stand_in.OnDevice(y)
    value, gradient = loss.value_and_grad(*there)
    np.testing.assert_allclose(value.values, right[0], rtol=1e-12)
    np.testing.assert_allclose(gradient.values, right[1], atol=1e-13)
    fields = loss.fields(there[1], classes=4)
    assert all(isinstance(field, stand_in.OnDevice) for field in fields.values())
    again = loss(*there, fields={name: fields[name] for name in ("distance", "skeleton")})
    np.testing.assert_allclose(again.values, right[0], rtol=1e-12)


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("kind", TERMS)
@pytest.mark.parametrize(
    ("spacing", "error", "message"),
    [
        ((1, 0), ValueError, "above 0"),
        (-1, ValueError, "above 0"),
        ((1, float("nan")), ValueError, "above 0"),
        (float("inf"), ValueError, "above 0"),
        ((), ValueError, "above 0"),
        ("far", TypeError, "a number, or one for each"),
        (((1, 1), (1, 1)), TypeError, "a number, or one for each"),
    ],
)
def test_bad_spacing(kind: str, spacing: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"spacing: expected .*{message}"):
        TERMS[kind](spacing=spacing)
    with pytest.raises(error, match=f"spacing: expected .*{message}"):
        TERMS[kind]().fields(np.zeros((1, 4, 4), int), classes=2, spacing=spacing)


@pytest.mark.parametrize("kind", TERMS)
def test_bad_calls(kind: str) -> None:
    x, y = example(2, 3, (5, 6))
    with pytest.raises(ValueError, match=r"spacing: expected 2 numbers, .* got 3"):
        TERMS[kind](spacing=(1, 1, 1))(x, y)
    name = TERMS[kind].makes
    with pytest.raises(ValueError, match=rf"fields\['{name}'\]: expected .*\(2, 3, 5, 5\)"):
        TERMS[kind]()(x, y, fields={name: x[..., :5]})
    with pytest.raises(
        ValueError, match=f"fields: the terms of this loss read '{name}', got 'far'"
    ):
        TERMS[kind]()(x, y, fields={"far": x})
    with pytest.raises(ValueError, match="target: expected labels"):
        TERMS[kind]()(x, np.full_like(y, 7))
    with pytest.raises(ValueError, match="weight: expected"):
        TERMS[kind](weight=[1] * 7)(x, y)
    with pytest.raises(ValueError, match="reduction: expected"):
        TERMS[kind](reduction="voxel")
    for options, error, message in (
        ({"classes": 0}, ValueError, "classes: expected a number of at least 1"),
        ({"classes": 2.0}, TypeError, "classes: expected an integer"),
        ({"classes": 3, "dtype": "int8"}, ValueError, "dtype: expected one of"),
        ({"classes": 3, "dense": True}, ValueError, "target: expected a dense target of 3"),
        ({"classes": 3, "spatial_axes": 3}, ValueError, "target: expected a label map of 3"),
    ):
        with pytest.raises(error, match=message):
            TERMS[kind]().fields(y, **options)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="alpha: expected a number above 0"):
        fl.HausdorffDT(alpha=0)
    with pytest.raises(ValueError, match="smooth: expected a number above 0"):
        fl.BoundaryDoU(smooth=0)
    with pytest.raises(ValueError, match="dilations: expected a number of at least 0"):
        fl.SkeletonRecall(dilations=-1)
    with pytest.raises(ValueError, match=r"terms: .* make the field 'distance' in different ways"):
        fl.HausdorffDT() + fl.GeneralizedSurface(spacing=2)
    x, y = example(2, 3, (5, 6))
    with pytest.raises(TypeError, match=r"fields\['distance'\]: expected floating numbers"):
        fl.HausdorffDT()(x, y, fields={"distance": y})
    with pytest.raises(ValueError, match="spatial ax"):
        fl.Boundary()(np.zeros((2, 3)), np.zeros(2, int))
    with pytest.raises(TypeError, match="labels: expected integers or bool, got float64"):
        fl.skeleton(np.zeros((1, 4, 4)))
    with pytest.raises(ValueError, match="labels: expected"):
        fl.skeleton(np.zeros((4, 4), int))
