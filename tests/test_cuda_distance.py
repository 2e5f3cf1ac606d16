"""Distances of arrays on a device: the CUDA kernels, run on the CPU, against SciPy in float64."""

from __future__ import annotations

from typing import Any

import cuda_emulation
import numpy as np
import pytest
import stand_in
from device_backend import EmulatedDevice
from stand_in import OnDevice
from support import _absent, need, packed

import fastloss as fl
from fastloss.backends.cuda import distance, indices
from fastloss.backends.distances import CONVENTIONS
from fastloss.borrowed import Borrowed
from fastloss.distance import signed_of_masks

ndimage = need("scipy.ndimage")
BEGIN, ROWS, LINES, INDICES, COPY = (
    "fastloss_distance_begin",
    "fastloss_distance_rows",
    "fastloss_distance_lines",
    "fastloss_class_indices",
    "fastloss_copy",
)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return stand_in.install(monkeypatch)


def kernels(launched: list[str]) -> list[str]:
    return [name for name in launched if not name.startswith("empty")]


def edt(mask: np.ndarray, spacing: Any, limit: float | None) -> np.ndarray:
    """SciPy's distances; infinite without a 0, where SciPy measures to somewhere else."""
    found = np.full(mask.shape, np.inf)
    if not mask.all():
        found = ndimage.distance_transform_edt(mask, sampling=spacing)
    return found if limit is None else np.minimum(found, limit)


def signed(mask: np.ndarray, spacing: Any, convention: str, limit: float | None) -> np.ndarray:
    """One map by its definition."""
    inside, outside = edt(mask, spacing, limit), edt(~mask, spacing, limit)
    if convention != "exact" and (mask.all() or not mask.any()):
        return np.zeros(mask.shape)
    of_inside = {"kervadec": 1 - inside, "exact": -inside, "unsigned": inside}[convention]
    return np.where(mask, of_inside, outside)


def signed_maps(masks: np.ndarray, *arguments: Any) -> np.ndarray:
    """The maps of masks (B, C, *spatial)."""
    each = [signed(mask, *arguments) for sample in masks for mask in sample]
    return np.reshape(each, masks.shape)


def assert_close(found: Any, expected: np.ndarray) -> None:
    assert isinstance(found, OnDevice)
    tolerance = 1e-6 if found.values.dtype == np.float32 else 2e-3
    np.testing.assert_allclose(found.values, expected, rtol=tolerance, atol=tolerance)


def noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Voxels or boxes of any density."""
    mask = rng.random(shape) < rng.choice([0, 0.005, 0.05, 0.5, 0.95, 0.995, 1])
    if rng.random() < 0.5:
        mask = ndimage.grey_dilation(mask.view(np.uint8), size=(3,) * len(shape)).astype(bool)
    return ~mask if rng.random() < 0.5 else mask


def spacing_of(rng: np.random.Generator, axes: int) -> Any:
    return [None, 0.7, tuple(rng.uniform(0.2, 5, axes))][rng.integers(3)]


# ------------------------------------------------------------------ distances


@pytest.mark.parametrize("seed", range(4))
def test_random_masks(launched: list[str], seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(40):
        axes, batch = rng.integers(1, 4), tuple(rng.integers(1, 4, rng.integers(3)))
        shape = tuple(rng.choice([1, 2, 3, 7, 9, 17, 33], axes))
        spacing, limit = spacing_of(rng, axes), rng.choice([None, 0.5, 2.5, 9.0])
        masks = np.stack([noise(rng, shape) for _ in range(np.prod(batch, dtype=int))])
        found = fl.distance_transform(
            OnDevice(masks.reshape(*batch, *shape)),
            spacing=spacing,
            max_distance=limit,
            batch_axes=len(batch),
        )
        expected = [edt(mask, spacing, limit) for mask in masks]
        assert_close(found, np.reshape(expected, (*batch, *shape)))


@pytest.mark.parametrize("seed", range(4))
def test_random_labels(launched: list[str], seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(30):
        axes, batch, classes = rng.integers(1, 4), rng.integers(1, 3), rng.integers(1, 5)
        shape = tuple(rng.choice([1, 2, 3, 7, 9, 17], axes))
        labels = rng.integers(-1, classes + 1, (batch, *shape))
        if rng.random() < 0.5:
            labels = ndimage.grey_dilation(labels, size=(1, *(4,) * axes))
        spacing, limit = spacing_of(rng, axes), rng.choice([None, 0.5, 2.5, 9.0])
        convention, dtype = rng.choice(CONVENTIONS), rng.choice(["float32", "float16"])
        masks = np.stack([labels == c for c in range(classes)], 1)
        options = {"spacing": spacing, "convention": convention, "max_distance": limit}
        expected = signed_maps(masks, spacing, convention, limit)
        found = fl.signed_distance(OnDevice(labels), classes, dtype=dtype, **options)
        assert found.values.dtype == dtype
        assert_close(found, expected)
        assert_close(signed_of_masks(OnDevice(masks), dtype=dtype, **options), expected)


@pytest.mark.parametrize("length", [31, 32, 33, 1023, 1024, 1025, 2049, 3500])
def test_rows_of_several_tiles(launched: list[str], length: int) -> None:
    """The nearest voxel of the other kind lies in this word or tile of a row, or in another."""
    rng = np.random.default_rng(length)
    rows = rng.random((12, length)) < np.repeat([0.0005, 0.002, 0.02, 0.3], 3)[:, None]
    rows[0], rows[1], rows[2] = False, True, False
    rows[2, -1] = True  # the only one
    for masks in (rows, ~rows):
        found = signed_of_masks(OnDevice(masks[:, None]), convention="exact")
        assert_close(found, signed_maps(masks[:, None], None, "exact", None))


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("limit", [None, 2.0])
def test_one_kind_only(launched: list[str], value: bool, limit: float | None) -> None:
    masks = np.full((1, 2, 3, 4, 5), value)
    masks[0, 0, 1, 2, 3] = not value  # beside a map of both
    for convention in CONVENTIONS:
        found = signed_of_masks(OnDevice(masks), convention=convention, max_distance=limit)
        assert_close(found, signed_maps(masks, None, convention, limit))
    found = fl.distance_transform(OnDevice(masks), batch_axes=2, max_distance=limit)
    assert_close(found, np.stack([[edt(mask, None, limit) for mask in masks[0]]]))


def test_planes_of_one_kind(launched: list[str]) -> None:
    masks = np.zeros((1, 1, 9, 5, 6), bool)
    masks[0, 0, 4, 2, 3], masks[0, 0, 6:] = True, True
    masks[0, 0, 7, 1, 1] = False
    for spacing in (None, (4, 1, 1), (0.1, 1, 1)):
        found = signed_of_masks(OnDevice(masks), spacing=spacing, convention="exact")
        assert_close(found, signed_maps(masks, spacing, "exact", None))


def test_large_spacing(launched: list[str]) -> None:
    mask = np.random.default_rng(0).random((5, 6, 7)) < 0.7
    for size in (1e-12, 1e12):
        found = fl.distance_transform(OnDevice(mask), spacing=(size, 2 * size, 3 * size))
        assert_close(OnDevice(found.values / np.float32(size)), edt(mask, (1, 2, 3), None))


def test_many_maps_take_several_launches(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scratch memory does not grow with the number of maps."""
    monkeypatch.setattr(distance, "_TOGETHER", 300)
    labels = np.random.default_rng(0).integers(0, 3, (2, 4, 5, 6))
    masks = np.stack([labels == c for c in range(5)], 1)
    for dtype in ("float32", "float16"):  # two maps of 120 voxels at a time
        launched.clear()
        found = fl.signed_distance(OnDevice(labels.astype(np.uint8)), 5, dtype=dtype)
        assert_close(found, signed_maps(masks, None, "kervadec", None))
        assert kernels(launched) == [BEGIN, *[ROWS, LINES, LINES] * 5]
        assert launched.count("empty 960") == (1 if dtype == "float32" else 2)


def test_launches(launched: list[str]) -> None:
    mask = np.random.default_rng(0).random((3, 4, 5)) < 0.5
    fl.distance_transform(OnDevice(mask))
    assert kernels(launched) == [BEGIN, ROWS, LINES, LINES]
    launched.clear()
    fl.distance_transform(OnDevice(mask), batch_axes=1)
    assert kernels(launched) == [BEGIN, ROWS, LINES]
    launched.clear()
    fl.signed_distance(OnDevice(mask.astype(np.int64)), 2)
    assert kernels(launched) == [INDICES, BEGIN, ROWS, LINES]


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_no_voxel(launched: list[str], shape: tuple[int, ...]) -> None:
    found = fl.distance_transform(OnDevice(np.zeros(shape, bool)), batch_axes=1)
    assert found.shape == shape
    assert fl.signed_distance(OnDevice(np.zeros(shape, int)), 2).shape == (shape[0], 2, *shape[1:])
    assert not kernels(launched)


# ------------------------------------------------------------------ any numbers and strides


def layouts(array: np.ndarray) -> list[np.ndarray]:
    spread = np.zeros([2 * n for n in array.shape], array.dtype)
    spread[tuple(slice(0, None, 2) for _ in array.shape)] = array
    return [
        array,
        np.asfortranarray(array),
        np.ascontiguousarray(array[..., ::-1])[..., ::-1],
        spread[tuple(slice(0, None, 2) for _ in array.shape)],
        packed(array),
        packed(array).view()[:, :, ::-1][:, :, ::-1],
    ]


NUMBERS = (
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
    "float16", "float32", "float64",
)  # fmt: skip


@pytest.mark.parametrize("dtype", NUMBERS)
def test_numbers_and_strides(launched: list[str], dtype: str) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2 if dtype == "bool" else 4, (2, 3, 4, 5)).astype(dtype)
    masks = np.stack([labels == c for c in range(3)], 1)
    for given in layouts(labels):
        found = fl.signed_distance(OnDevice(given), 3)
        assert_close(found, signed_maps(masks, None, "kervadec", None))
        found = fl.distance_transform(OnDevice(given), batch_axes=1)
        assert_close(found, np.stack([edt(mask != 0, None, None) for mask in labels]))


def test_a_mask_is_what_is_not_zero(launched: list[str]) -> None:
    row = np.array([0.0, -0.0, 1e-45, np.nan, -1, 0.0])
    for dtype in (np.float16, np.float32, np.float64):
        given = row.astype(dtype)
        expected = edt(given != 0, None, None)
        assert_close(fl.distance_transform(OnDevice(given)), expected)
        assert_close(fl.distance_transform(OnDevice(packed(given))), expected)
    given = np.array([0, 256, 0, -256], np.int16)
    assert_close(fl.distance_transform(OnDevice(given)), np.array([0, 1, 0, 1.0]))


def test_bfloat16(launched: list[str]) -> None:
    torch = need("torch")
    labels = torch.arange(24).reshape(1, 4, 6) % 3
    with pytest.MonkeyPatch.context() as patch:
        stand_in.install_for_torch(patch)
        found = fl.signed_distance(labels.to(torch.bfloat16), 3)
        half = fl.distance_transform(labels.to(torch.bfloat16), batch_axes=1)
    masks = np.stack([labels.numpy() == c for c in range(3)], 1)
    assert_close(OnDevice(found.numpy()), signed_maps(masks, None, "kervadec", None))
    assert_close(OnDevice(half.numpy()), edt(labels[0].numpy() != 0, None, None)[None])


def test_labels_that_are_no_class(launched: list[str]) -> None:
    """Among them those with a fraction, as counting them would synchronise."""
    given = np.array([[0, 1, 1.5, np.nan, -1, 2, np.inf, 1e30, -0.5, 1, 1]])
    masks = np.stack([given == c for c in range(2)], 1)
    for dtype in (np.float32, np.float64):
        found = fl.signed_distance(OnDevice(given.astype(dtype)), 2)
        assert_close(found, signed_maps(masks, None, "kervadec", None))
    for whole in (np.array([[0, 2**63 + 1, 1]], np.uint64), np.array([[0, -(2**40) + 1, 1]])):
        masks = np.stack([whole == c for c in range(2)], 1)
        found = fl.signed_distance(OnDevice(whole), 2)
        assert_close(found, signed_maps(masks, None, "kervadec", None))


@pytest.mark.parametrize("classes", [255, 256, 300])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32"])
def test_many_classes(launched: list[str], classes: int, dtype: str) -> None:
    labels = np.array([[0, 254, 255, 255, 3, 299, 299, 400]])
    labels = np.where(labels < 256, labels, 7 if dtype == "uint8" else labels)
    masks = np.stack([labels == c for c in range(classes)], 1)
    found = fl.signed_distance(OnDevice(labels.astype(dtype)), classes, convention="exact")
    assert_close(found, signed_maps(masks, None, "exact", None))


def test_broadcast_labels(launched: list[str]) -> None:
    row = np.random.default_rng(0).integers(0, 3, (1, 1, 1, 9))
    labels = np.broadcast_to(row, (2, 3, 4, 9))
    masks = np.stack([labels == c for c in range(3)], 1)
    found = fl.signed_distance(OnDevice(labels), 3)
    assert_close(found, signed_maps(masks, None, "kervadec", None))


# ------------------------------------------------------------------ results


def test_into_an_output_of_any_strides(launched: list[str]) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (2, 3, 4, 5)).astype(np.uint8)
    for dtype in ("float32", "float16"):
        expected = fl.signed_distance(OnDevice(labels), 3, dtype=dtype)
        for number, values in enumerate(layouts(np.zeros((2, 3, 3, 4, 5), dtype))):
            launched.clear()
            out = OnDevice(values)
            assert fl.signed_distance(OnDevice(labels), 3, dtype=dtype, out=out) is out
            np.testing.assert_array_equal(values, expected.values)
            assert launched.count(COPY) == (number > 0)
    out = OnDevice(np.zeros((5, 4, 3, 2), np.float32).T)
    expected = fl.distance_transform(OnDevice(labels), batch_axes=1)
    assert fl.distance_transform(OnDevice(labels), batch_axes=1, out=out) is out
    np.testing.assert_array_equal(out.values, expected.values)
    masks = OnDevice(labels[:, None] == np.arange(3)[None, :, None, None, None])
    out = OnDevice(np.zeros((2, 3, 3, 4, 5), np.float32))
    assert signed_of_masks(masks, out=out) is out
    np.testing.assert_array_equal(out.values, fl.signed_distance(OnDevice(labels), 3).values)


def test_bad_outputs(launched: list[str]) -> None:
    mask = OnDevice(np.zeros((3, 4), np.float32))
    for out, error, message in (
        (np.zeros((3, 4), np.float32), TypeError, "device 0, as mask .* got one in CPU memory"),
        (OnDevice(np.zeros((3, 4), np.float32), 1), TypeError, "device 0, .* CUDA device 1"),
        (OnDevice(np.zeros((4, 3), np.float32)), ValueError, r"shape \(3, 4\), got \(4, 3\)"),
        (OnDevice(np.zeros((3, 4))), TypeError, "expected float32, got float64"),
        (mask, ValueError, "overlaps mask"),
    ):
        with pytest.raises(error, match=f"^out: .*{message}"):
            fl.distance_transform(mask, out=out)
    with pytest.raises(TypeError, match=r"^out: .* CPU memory, as mask .* CUDA device 0"):
        fl.distance_transform(mask.values, out=OnDevice(np.zeros((3, 4), np.float32)))
    assert not launched


def test_too_many_axes(launched: list[str]) -> None:
    """The axes are those that do not merge; NumPy of old has 32 in all."""
    shape = (2,) * 20
    row = np.zeros(3**20 // 2 + 1, np.uint8)
    steps = (*(3**i for i in reversed(range(18))), 0, 0)
    mask = np.lib.stride_tricks.as_strided(row, shape, steps)
    with pytest.raises(ValueError, match=r"^mask: at most 18 axes .*; pass a contiguous copy"):
        fl.distance_transform(OnDevice(mask), batch_axes=17)


def test_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = need("torch")
    launched = stand_in.install_for_torch(monkeypatch)
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (2, 4, 5)))
    found = fl.signed_distance(labels, 3, dtype="float16")
    assert isinstance(found, torch.Tensor)
    assert found.dtype == torch.float16
    masks = labels[:, None] == torch.arange(3)[:, None, None]
    expected = signed_maps(masks.numpy(), None, "kervadec", None)
    assert_close(OnDevice(found.numpy()), expected)
    out = torch.zeros(2, 3, 4, 5)
    version = out._version
    assert signed_of_masks(masks.movedim(1, -1).contiguous().movedim(-1, 1), out=out) is out
    assert out._version > version
    assert_close(OnDevice(out.numpy()), expected)
    assert kernels(launched) == [INDICES, BEGIN, ROWS, LINES] * 2


# ------------------------------------------------------------------ order, memory


GRIDS = (((3, 9, 37), 2), ((1, 1, 1100), 2), ((5, 1, 3), 1))
FEW_THREADS = (((2, 1, 37), 1),)
"""For a sanitizer that takes a thread of the system for each of a block."""


def run_on(device: Any, dtype: str, grids: Any = GRIDS) -> list[bytes]:
    """Results on this device, by the bytes."""
    rng = np.random.default_rng(0)
    found = []
    for grid, per_volume in grids:
        labels = rng.integers(0, per_volume + 1, (2, *grid)).astype(np.uint16)
        labels = np.ascontiguousarray(np.repeat(labels[..., ::2], 2, axis=-1)[..., : grid[-1]])
        masks = np.stack([labels == c for c in range(per_volume)], 1)
        expected = signed_maps(masks, (2, 1, 1), "kervadec", 7.5)
        for given in (labels, packed(labels), packed(labels.astype(np.float64))):
            out = np.zeros((2, per_volume, *grid), dtype)
            array = Borrowed(given, given.dtype.name)
            own = indices.readable(device, array, "labels", per_volume)
            distance._launch(
                device, own, 2, per_volume, grid, (2, 1, 1), "kervadec", 7.5, dtype,
                out.ctypes.data,
            )  # fmt: skip
            assert_close(OnDevice(out), expected)
            found.append(out.tobytes())
    return found


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_results_do_not_depend_on_the_order_of_blocks_and_threads(dtype: str) -> None:
    expected = run_on(EmulatedDevice(), dtype)
    for order in ("reverse", "random"):
        assert run_on(EmulatedDevice(order=order), dtype) == expected


@pytest.mark.slow
@pytest.mark.parametrize("sanitize", ["address,undefined", "thread"])
def test_memory_and_races(sanitize: str) -> None:
    """Under the compiler's sanitizers; a report ends the process."""
    sanitizer = sanitize.partition(",")[0]
    script = (
        "import sys, cuda_cases, test_cuda_distance as t;"
        "t.run_on(cuda_cases.SanitizedDevice(sys.argv[1], ()), sys.argv[2], "
        f"t.{'FEW_THREADS' if sanitizer == 'thread' else 'GRIDS'})"
    )
    try:
        cuda_emulation._command(sanitizer)
    except OSError as error:
        _absent(f"sanitizer.{sanitize}", error)
    for dtype in ("float32", "float16")[: 1 if sanitizer == "thread" else 2]:
        found = cuda_emulation.sanitized_python(script, sanitizer, sanitize, dtype)
        assert (found.returncode, found.stderr) == (0, "")
