"""Exact Euclidean distances, against SciPy's, which finds the nearest voxels, and edt's."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import NATIVE, need, need_backend

import fastloss as fl
from fastloss.distance import signed_of_masks

ndimage = need("scipy.ndimage")


def definition(mask, spacing=None, limit=np.inf):
    """SciPy's distances; infinite without a zero, where SciPy measures to somewhere else."""
    if mask.all():
        found = np.full(mask.shape, np.inf)
    else:
        found = ndimage.distance_transform_edt(mask, sampling=spacing)
    return np.minimum(found, limit)


def signed(mask, spacing, convention, limit=np.inf):
    """One map by its definition, from two of SciPy's."""
    inside, outside = definition(mask, spacing, limit), definition(~mask, spacing, limit)
    if convention != "exact" and (mask.all() or not mask.any()):
        return np.zeros(mask.shape)
    kinds = {"kervadec": 1 - inside, "exact": -inside, "unsigned": inside}
    return np.where(mask, kinds[convention], outside)


def close(found, wanted, dtype="float32"):
    tolerance = 1e-6 if dtype == "float32" else 2e-3
    assert np.array_equal(np.isinf(found), np.isinf(wanted))
    finite = np.isfinite(wanted)
    assert np.array_equal(found[~finite], wanted[~finite])
    np.testing.assert_allclose(found[finite], wanted[finite], rtol=tolerance, atol=tolerance)


@st.composite
def masks(draw, axes=3, most=24):
    """Noise of any density, or blobs, and what is not in them."""
    shape = draw(st.lists(st.integers(1, most), min_size=1, max_size=axes))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    density = draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0]))
    mask = random.random(shape) < density
    if draw(st.booleans()):
        mask = ndimage.binary_dilation(mask, iterations=draw(st.integers(1, 5)))
    return ~mask if draw(st.booleans()) else mask


@st.composite
def spacings(draw, axes):
    kind = draw(st.sampled_from(["none", "one", "each"]))
    size = st.floats(0.05, 20)
    if kind == "none":
        return None
    return draw(size) if kind == "one" else tuple(draw(size) for _ in range(axes))


@pytest.mark.parametrize("backend", NATIVE)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_distances_are_those_to_the_nearest_zero(backend, data):
    need_backend(backend)
    mask = data.draw(masks())
    spacing = data.draw(spacings(mask.ndim))
    limit = data.draw(st.none() | st.floats(0.1, 30))
    with fl.use_backend(backend):
        found = fl.distance_transform(mask, spacing=spacing, max_distance=limit)
    assert found.dtype == np.float32
    close(found, definition(mask, spacing, np.inf if limit is None else limit))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_distances_are_those_of_edt(data):
    """A second library, of another method: parabolas in float32."""
    edt = need("edt")
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    shape = data.draw(st.lists(st.integers(1, 20), min_size=2, max_size=3))
    sizes = data.draw(st.tuples(*[st.floats(0.2, 8)] * len(shape)))
    classes = data.draw(st.integers(2, 4))
    labels = random.integers(0, classes, shape)
    if data.draw(st.booleans()):
        labels = ndimage.grey_dilation(labels, size=data.draw(st.integers(2, 6)))
    found = fl.signed_distance(labels[None], classes, spacing=sizes, convention="exact")[0]
    for c, signed_map in enumerate(found):
        mask = np.ascontiguousarray(labels == c)
        inside, outside = (edt.edt(m, anisotropy=sizes).astype(float) for m in (mask, ~mask))
        if mask.all() or not mask.any():  # edt's mark of "nowhere" is not infinite
            inside[mask], outside[~mask] = np.inf, np.inf
        tolerance = {"rtol": 1e-5, "atol": 1e-5}
        wanted = np.where(mask, inside, 0)
        np.testing.assert_allclose(fl.distance_transform(mask, spacing=sizes), wanted, **tolerance)
        np.testing.assert_allclose(signed_map, np.where(mask, -inside, outside), **tolerance)


def test_many_small_masks():
    """All lines of some sizes, and 20,000 random masks, most of which have several sizes of gap."""
    for n in range(1, 13):
        lines = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        found = fl.distance_transform(lines, batch_axes=1)
        apart = np.abs(np.subtract.outer(np.arange(n), np.arange(n))).astype(float)
        wanted = np.where(lines[:, None, :] == 0, apart, np.inf).min(axis=2)
        assert np.array_equal(found, wanted)
    random = np.random.default_rng(5)
    for shape in [(2, 3, 4), (2, 1, 9), (4, 5, 1), (1, 9, 2)]:
        many = random.random((5_000, *shape)) < random.choice([0.6, 0.9, 0.97], (5_000, 1, 1, 1))
        sizes = random.uniform(0.3, 4, 3)
        found = fl.distance_transform(many, spacing=sizes, batch_axes=1)
        grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, 3)
        between = np.sqrt((((grid[:, None] - grid[None]) * sizes) ** 2).sum(-1))
        flat = many.reshape(len(many), -1)
        wanted = np.full(flat.shape, np.inf)
        for seed in range(flat.shape[1]):
            nearer = np.minimum(wanted, between[seed])
            wanted = np.where(flat[:, seed, None], wanted, nearer)
        close(found.reshape(flat.shape), wanted)


@pytest.mark.parametrize("spacing", [None, (0.4, 0.4, 6.5)])
def test_long_lines(spacing):
    """Longer than a vector, a block of lines and a task, with distances of hundreds of voxels."""
    random = np.random.default_rng(1)
    mask = np.ones((14, 60, 530), bool)
    mask[tuple(random.integers(0, n, 12) for n in mask.shape)] = False
    mask[4:9, 20:40, 100:300] = False
    close(fl.distance_transform(mask, spacing=spacing), definition(mask, spacing))


@pytest.mark.parametrize("backend", NATIVE)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_signed_distances(backend, data):
    need_backend(backend)
    shape = data.draw(st.lists(st.integers(1, 16), min_size=1, max_size=3))
    batch, classes = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 5))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    labels = random.integers(-1, classes + 1, (batch, *shape))
    if data.draw(st.booleans()):
        labels = ndimage.grey_dilation(labels, size=(1,) + (5,) * len(shape))
    if data.draw(st.integers(0, 9)) == 0:
        labels[...] = classes - 1
    spacing = data.draw(spacings(len(shape)))
    convention = data.draw(st.sampled_from(["kervadec", "exact", "unsigned"]))
    limit = data.draw(st.none() | st.floats(0.5, 10))
    dtype = data.draw(st.sampled_from(["float32", "float16"]))
    with fl.use_backend(backend):
        found = fl.signed_distance(
            labels, classes, spacing=spacing, convention=convention, max_distance=limit, dtype=dtype
        )
        assert found.dtype == dtype
        assert found.shape == (batch, classes, *shape)
        each = np.stack([labels == c for c in range(classes)], 1)
        of_masks = signed_of_masks(
            each, spacing=spacing, convention=convention, max_distance=limit, dtype=dtype
        )
    assert np.array_equal(found, of_masks)
    for b in range(batch):
        for c in range(classes):
            wanted = signed(each[b, c], spacing, convention, np.inf if limit is None else limit)
            if dtype == "float16":
                wanted = wanted.astype(np.float16).astype(np.float64)
            close(found[b, c].astype(np.float64), wanted, dtype)


@pytest.mark.parametrize("backend", NATIVE)
def test_any_numbers_and_strides(backend):
    need_backend(backend)
    random = np.random.default_rng(2)
    whole = random.integers(0, 4, (2, 9, 14, 22))
    wanted = np.stack([definition(volume != 0) for volume in whole])
    maps = fl.signed_distance(whole, 4)
    kinds = ["bool", "int8", "uint8", "int16", "uint16", "int64", "float16", "float32", "float64"]
    with fl.use_backend(backend):
        for kind in kinds:
            own = whole.astype(kind)
            kept = own.copy()
            close(fl.distance_transform(own, batch_axes=1), wanted)
            if kind != "bool":
                close(fl.signed_distance(own, 4), maps)
            turned = np.ascontiguousarray(own.transpose(3, 0, 2, 1)).transpose(1, 3, 2, 0)[
                :, :, ::-1
            ]
            close(fl.distance_transform(turned[:, :, ::-1], batch_axes=1), wanted)
            if kind != "bool":
                close(fl.signed_distance(turned[:, :, ::-1], 4), maps)
            assert np.array_equal(own, kept)
        odd = np.array([0.0, -0.0, 5e-324, np.nan, -np.inf])
        assert fl.distance_transform(odd).tolist() == [0, 0, 1, 2, 3]
        wide = random.integers(0, 400, (1, 30, 40))
        close(
            fl.signed_distance(wide, 400),
            signed_of_masks((wide == np.arange(400)[:, None, None])[None]),
        )


@pytest.mark.parametrize("bits", ["float32", "float16", "bfloat16"])
def test_tensors_stay_tensors(bits):
    torch = need("torch")
    mask = (torch.rand(2, 7, 8, 9) > 0.4).to(getattr(torch, bits))
    found = fl.distance_transform(mask, batch_axes=1)
    assert isinstance(found, torch.Tensor)
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), fl.distance_transform(mask.float().numpy(), batch_axes=1))
    maps = fl.signed_distance(mask, 2, dtype="float16")
    assert maps.dtype == torch.float16
    assert maps.shape == (2, 2, 7, 8, 9)
    out = torch.empty(2, 9, 8, 7).permute(0, 3, 2, 1)
    assert fl.distance_transform(mask, batch_axes=1, out=out) is out
    assert torch.equal(out, found)


def test_empty_arrays():
    assert fl.distance_transform(np.ones((0, 3))).shape == (0, 3)
    assert fl.distance_transform(np.ones((2, 0, 3)), batch_axes=1).shape == (2, 0, 3)
    assert fl.signed_distance(np.ones((0, 3), int), 2).shape == (0, 2, 3)


def test_extreme_spacings():
    """Squares of sizes in metres, or in nanometres, would leave the range of float32."""
    mask = np.ones((5, 6, 7), bool)
    mask[2, 3, 4] = False
    for size in (1e-30, 1e-12, 1e9, 1e30):
        found = fl.distance_transform(mask, spacing=size)
        np.testing.assert_allclose(found, definition(mask) * size, rtol=1e-6)


def test_the_same_bits_for_any_number_of_threads():
    labels = np.random.default_rng(0).integers(0, 3, (2, 20, 30, 40))
    labels = ndimage.grey_dilation(labels, size=(1, 6, 6, 6))
    before = fl.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            fl.set_num_threads(threads)
            found.append(fl.signed_distance(labels, 3, spacing=(3, 1, 1)).tobytes())
    finally:
        fl.set_num_threads(before)
    assert len(set(found)) == 1


def test_every_instruction_set():
    """Each in a process of its own, against NumPy."""
    need_backend("cpu")
    with fl.use_backend("cpu"):
        from fastloss.backends import current_backend

        isas = current_backend().isas
    program = """
import numpy as np, fastloss as fl
labels = np.random.default_rng(0).integers(0, 3, (1, 9, 21, 37))
labels[:, 3:7, 5:15, 4:30] = 1
for dtype in ("float32", "float16"):
    with fl.use_backend("cpu"):
        own = fl.signed_distance(labels, 3, spacing=(3, 1, 0.7), dtype=dtype)
    with fl.use_backend("reference"):
        wanted = fl.signed_distance(labels, 3, spacing=(3, 1, 0.7), dtype=dtype)
    np.testing.assert_allclose(own, wanted, rtol=1e-6 if dtype == "float32" else 1e-3, atol=1e-6)
"""
    for isa in isas:
        environment = {**os.environ, "FASTLOSS_ISA": isa}
        subprocess.run([sys.executable, "-c", program], check=True, env=environment)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"spacing": (1, 1)}, ValueError, "spacing: expected 3 numbers"),
        ({"spacing": 0}, ValueError, "spacing: expected finite numbers above 0"),
        ({"spacing": (1, -1, 1)}, ValueError, "spacing: expected finite"),
        ({"spacing": (1, np.nan, 1)}, ValueError, "spacing: expected finite"),
        ({"spacing": "x"}, TypeError, "spacing: expected a number"),
        ({"spacing": True}, TypeError, "spacing: expected a number"),
        ({"max_distance": 0}, ValueError, "max_distance: expected a finite number above 0"),
        ({"max_distance": np.nan}, ValueError, "max_distance"),
        ({"max_distance": "far"}, TypeError, "max_distance: expected a number"),
        ({"batch_axes": 3}, ValueError, "batch_axes: expected one to 3 spatial axes"),
        ({"batch_axes": -1}, ValueError, "batch_axes"),
        ({"batch_axes": 1.0}, TypeError, "batch_axes: expected an integer"),
        ({"out": np.empty((2, 3, 4))}, TypeError, "out: expected float32, got float64"),
        ({"out": np.empty((2, 3, 5), "f4")}, ValueError, r"out: expected shape \(2, 3, 4\)"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        fl.distance_transform(np.ones((2, 3, 4)), **options)


def test_bad_arrays():
    with pytest.raises(TypeError, match="mask: expected a NumPy array"):
        fl.distance_transform([[0, 1]])
    with pytest.raises(TypeError, match="mask: expected integers, bool or floating"):
        fl.distance_transform(np.ones(3, complex))
    shared = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match="out: overlaps mask"):
        fl.distance_transform(shared, out=shared)
    labels = np.zeros((1, 3, 4))
    with pytest.raises(ValueError, match="labels: expected whole numbers, but 2 labels are"):
        fl.signed_distance(np.array([[0.5, 1, 9.5, np.nan]]), 2)
    with pytest.raises(ValueError, match=r"classes: expected a number in \[1, 65535\], got 0"):
        fl.signed_distance(labels, 0)
    with pytest.raises(TypeError, match="classes: expected an integer"):
        fl.signed_distance(labels, 2.0)
    with pytest.raises(ValueError, match=r"labels: expected .* one to 3 spatial axes"):
        fl.signed_distance(np.zeros((1, 1, 2, 2, 2)), 2)
    with pytest.raises(ValueError, match="convention: expected one of"):
        fl.signed_distance(labels, 2, convention="inner")
    with pytest.raises(ValueError, match="dtype: expected one of"):
        fl.signed_distance(labels, 2, dtype="float64")
