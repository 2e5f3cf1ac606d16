"""Connected components and nearest components, against other libraries and brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import NATIVE, need, need_backend

import fastloss as fl

ndimage = need("scipy.ndimage")
CHOICES = {1: {2: 1}, 2: {4: 1, 8: 2}, 3: {6: 1, 18: 2, 26: 3}}
"""By axes and connectivity: SciPy's and scikit-image's rank of it."""


def in_order(numbers):
    """The same partition, numbered in the order of first voxels."""
    inside = numbers > 0
    _, first, which = np.unique(numbers[inside], return_index=True, return_inverse=True)
    found = np.zeros(numbers.shape, np.int32)
    found[inside] = np.argsort(np.argsort(first))[which] + 1
    return found


def by_scipy(labels, rank):
    """Each class for itself."""
    structure = ndimage.generate_binary_structure(labels.ndim, rank)
    found = np.zeros(labels.shape, np.int64)
    for label in np.unique(labels[labels > 0]):
        own, count = ndimage.label(labels == label, structure)
        found[own > 0] = own[own > 0] + found.max()
        assert count or not (labels == label).any()
    return in_order(found)


SEEDS = st.integers(0, 2**32 - 1).map(np.random.default_rng)
"""Shapes and densities come from these too: Hypothesis itself likes the smallest best."""


def label_map(random, axes, most=9):
    shape = random.integers(1, most + 1, axes)
    density = random.choice([0.0, 0.1, 0.2, 0.3, 0.6, 1.0])
    labels = random.integers(1, random.integers(1, 4), shape, endpoint=True)
    return np.where(random.random(shape) < density, labels, 0).astype(np.uint8)


@pytest.mark.parametrize("backend", NATIVE)
@settings(max_examples=60)
@given(random=SEEDS, kind=st.sampled_from([(a, c) for a, few in CHOICES.items() for c in few]))
def test_components_are_those_of_scipy(backend, random, kind):
    need_backend(backend)
    axes, connectivity = kind
    rank = CHOICES[axes][connectivity]
    labels = np.stack([label_map(random, axes)] * 2)
    labels[1] = labels[1][::-1]
    with fl.use_backend(backend):
        found = fl.components(labels, connectivity)
    assert found.numbers.dtype == np.int32
    for sample, numbers, classes in zip(labels, found.numbers, found.classes, strict=True):
        np.testing.assert_array_equal(numbers, by_scipy(sample, rank))
        assert len(classes) == numbers.max(initial=0)
        np.testing.assert_array_equal(np.append(0, classes)[numbers], sample)


@pytest.mark.parametrize("connectivity", [6, 18, 26])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_components_are_those_of_cc3d_and_scikit_image(backend, connectivity):
    random = np.random.default_rng(connectivity)
    labels = random.integers(0, 9, (1, 13, 21, 70)).astype(np.uint16) % 5 * 300
    with fl.use_backend(need_backend(backend)):
        found = fl.components(labels, connectivity).numbers[0]
    others = {
        "cc3d": lambda m: m.connected_components(labels[0], connectivity=connectivity),
        "skimage.measure": lambda m: m.label(labels[0], connectivity=CHOICES[3][connectivity]),
    }
    for name, label in others.items():
        np.testing.assert_array_equal(found, in_order(label(need(name)).astype(np.int64)), name)


def test_classes_that_touch_at_corners_are_joined_crosswise(backend):
    # Runs of both rows end at the same place, and each touches what follows the other.
    labels = np.array([[[1, 1, 2, 2], [2, 2, 1, 1]]])
    assert fl.components(labels, 8).numbers.tolist() == [[[1, 1, 2, 2], [2, 2, 1, 1]]]
    assert fl.components(labels, 4).numbers.tolist() == [[[1, 1, 2, 2], [3, 3, 4, 4]]]


def test_any_number_of_threads_gives_the_same_components():
    need_backend("cpu")
    random = np.random.default_rng(0)
    walls = np.ones((1, 31, 40, 40), np.uint8)  # one long passage up and down through all planes
    walls[:, :-1, 1::4] = walls[:, 1:, 3::4] = 0
    for labels in (random.integers(0, 3, (1, 31, 17, 66)), walls):
        before = fl.get_num_threads()
        try:
            found = []
            for threads in (1, 2, 7):
                fl.set_num_threads(threads)
                with fl.use_backend("cpu"):
                    numbers = fl.components(labels, 6).numbers
                    found.append((numbers, fl.voronoi(numbers, spacing=(3, 1, 0.7))))
        finally:
            fl.set_num_threads(before)
        np.testing.assert_array_equal(found[0][0][0], by_scipy(labels[0], 1))
        for other in found[1:]:
            np.testing.assert_array_equal(found[0], other)


def test_labels_of_any_kind_give_the_same(backend):
    labels = np.random.default_rng(1).integers(0, 3, (2, 5, 6, 7))
    wanted = fl.components(labels)
    for dtype in (np.uint8, np.int8, np.int16, np.uint32, np.float16, np.float32, np.float64):
        found = fl.components(labels.astype(dtype))
        np.testing.assert_array_equal(found.numbers, wanted.numbers)
        np.testing.assert_array_equal(found.classes[1], wanted.classes[1])
    turned = np.asfortranarray(labels.astype(np.uint8))
    np.testing.assert_array_equal(fl.components(turned).numbers, wanted.numbers)
    mask = labels == 1
    np.testing.assert_array_equal(
        fl.components(mask).numbers, fl.components(mask.astype(int)).numbers
    )
    for ignored, dtype in [(-1, int), (255, np.uint8), (2, np.uint8)]:
        holes = np.where(labels == 2, ignored, labels).astype(dtype)
        found = fl.components(holes, ignore_index=ignored).numbers
        np.testing.assert_array_equal(found, fl.components(mask).numbers)


def test_tensors_give_tensors():
    torch = need("torch")
    labels = torch.tensor([[[1, 0, 0, 2]]])
    found = fl.components(labels)
    assert isinstance(found.numbers, torch.Tensor)
    assert found.numbers.tolist() == [[[1, 0, 0, 2]]]
    assert fl.voronoi(found).tolist() == [[[1, 1, 2, 2]]]


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (1, 3, 0), (2, 3, 4)])
def test_nothing_has_no_components(backend, shape):
    found = fl.components(np.zeros(shape, np.uint8))
    assert [len(classes) for classes in found.classes] == [0] * shape[0]
    for numbers in (found.numbers, fl.voronoi(found)):
        assert numbers.shape == shape
        assert not numbers.any()


# ------------------------------------------------------------------ the nearest component


def nearest(numbers, spacing):
    """Of all seeds the least pair (squared distance, number); whole spacings are exact."""
    seeds = np.argwhere(numbers > 0)
    if not len(seeds):
        return np.zeros(numbers.shape, np.int32)
    own = numbers[tuple(seeds.T)]
    found = np.empty(numbers.shape, np.int32)
    for place in np.ndindex(numbers.shape):
        squared = (((seeds - place) * spacing) ** 2).sum(1)
        found[place] = own[squared == squared.min()].min()
    return found


def component_map(random, axes, most):
    shape = random.integers(1, most + 1, axes)
    numbers = random.integers(1, random.choice([1, 2, 5, 400]), shape, endpoint=True)
    return np.where(random.random(shape) < random.choice([0, 0.01, 0.05, 0.3, 1]), numbers, 0)


@pytest.mark.parametrize("backend", NATIVE)
@settings(max_examples=50)
@given(random=SEEDS, axes=st.integers(1, 3))
def test_the_nearest_component_is_the_lowest_of_those_equally_far(backend, random, axes):
    need_backend(backend)
    numbers = component_map(random, axes, {1: 40, 2: 18, 3: 9}[axes])
    spacing = None if random.random() < 0.3 else tuple(random.integers(1, 5, axes).tolist())
    with fl.use_backend(backend):
        found = fl.voronoi(numbers[None], spacing=spacing)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found[0], nearest(numbers, spacing or (1,) * axes))


@settings(max_examples=40)
@given(random=SEEDS, axes=st.integers(1, 3))
def test_distances_to_the_nearest_component_are_the_least(random, axes):
    need_backend("cpu")
    numbers = component_map(random, axes, 40 if axes < 3 else 24)
    spacing = tuple((20 ** random.uniform(-1, 1, axes)).tolist())
    found = {}
    for backend in ("cpu", "reference"):
        with fl.use_backend(backend):
            found[backend] = fl.voronoi(numbers[None].astype(np.int16), spacing=spacing)[0]
    np.testing.assert_array_equal(found["cpu"], found["reference"])
    if not numbers.any():
        return
    least = ndimage.distance_transform_edt(numbers == 0, sampling=spacing)
    for number in np.unique(found["cpu"])[:9]:
        cell = found["cpu"] == number
        own = ndimage.distance_transform_edt(numbers != number, sampling=spacing)
        np.testing.assert_allclose(own[cell], least[cell], rtol=1e-12)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fl.components(np.zeros(3, int)), ValueError, r"labels: expected \(batch"),
        (lambda: fl.components(np.zeros((1, 2, 2, 2, 2), int)), ValueError, "labels: expected"),
        (lambda: fl.components([[1]]), TypeError, "labels: expected a NumPy array"),
        (lambda: fl.components(np.zeros((1, 2), complex)), TypeError, "labels: expected integers"),
        (lambda: fl.components(np.array([[1, -1]])), ValueError, "labels: .* got -1 to 1"),
        (lambda: fl.components(np.array([[0, 65535]])), ValueError, "labels: .* got 0 to 65535"),
        (lambda: fl.components(np.array([[0.5, 1]])), ValueError, "labels: .* 1 label is not"),
        (lambda: fl.components(np.array([[np.nan, 1]])), ValueError, "labels: expected numbers"),
        (lambda: fl.components(np.zeros((1, 2, 2), int), 26), ValueError, "connectivity: .* 4 or"),
        (lambda: fl.components(np.zeros((1, 2, 2), int), "8"), TypeError, "connectivity: .* '8'"),
        (lambda: fl.voronoi(np.zeros((1, 2))), TypeError, "components: expected integers"),
        (lambda: fl.voronoi(np.zeros(2, int)), ValueError, r"components: expected \(batch"),
        (lambda: fl.voronoi(np.array([[2**31]])), ValueError, "components: expected numbers below"),
        (lambda: fl.voronoi(np.zeros((1, 2), int), spacing=0), ValueError, "spacing"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
