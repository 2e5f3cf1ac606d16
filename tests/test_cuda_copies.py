"""Misaligned arrays, which a GPU cannot read in place: what is copied, when, and how often."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import stand_in
from device_backend import EmulatedDevice
from stand_in import OnDevice
from support import assert_agree, example, packed, reference

import fastloss as fl
from fastloss.arrays import Arrays
from fastloss.backends.cuda import engine
from fastloss.backends.cuda.call import FLOAT32, Operand, Operands
from fastloss.backends.cuda.copies import align, aligned
from fastloss.backends.reference import BACKEND as REFERENCE
from fastloss.maps import Map
from fastloss.request import Request
from fastloss.sums import CROSS_ENTROPY

COPY, REDUCE, APPLY = "fastloss_copy", "fastloss_reduce", "fastloss_apply"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return stand_in.install(monkeypatch)


def kernels(launched: list[str]) -> list[str]:
    return [name for name in launched if name in (COPY, REDUCE, APPLY)]


def test_one_launch_for_each_array_that_is_not_aligned(launched: list[str]) -> None:
    loss = fl.Dice() + fl.CrossEntropy()
    x, y = example(2, 3, (40,), dtype="float32")
    w = np.random.default_rng(0).uniform(0, 2, y.shape)
    expected = reference(loss, x, y, w)
    for unaligned in ((0, 1, 2, 3), (1,), (3,), ()) * 2:  # the second time with the cached plan
        inputs, out = [x, y, w], OnDevice(np.zeros_like(x))
        for place in unaligned:
            if place == 3:
                out = OnDevice(packed(x))
            else:
                inputs[place] = packed(inputs[place])
        launched.clear()
        value, gradient = loss.value_and_grad(*map(OnDevice, inputs), out=out)
        assert_agree(value.values, gradient.values, expected)
        before, behind = [COPY] * len({0, 1, 2} & {*unaligned}), [COPY] * (3 in unaligned)
        assert kernels(launched) == [*before, REDUCE, *before, APPLY, *behind]


@pytest.mark.parametrize("special", [False, True])
def test_maps(special: bool) -> None:
    """Both passes can write maps to misaligned addresses."""
    x, y = example(2, 3, (5, 8))
    request = Request("softmax", False, None, frozenset({CROSS_ENTROPY}))
    arrays = Arrays(x, "float64", y, "int64", False, None, "")
    device: Any = EmulatedDevice(special)
    coefficients = np.zeros((len(request.sums), 3))
    coefficients[request.index[CROSS_ENTROPY]] = 1, 2, 3
    sums, voxels = np.empty((2, len(request.sums), 2, 3)), np.empty((2, 2))
    for kind, shape in (("voxel", (2, 40)), ("class", (2, 3, 40)), ("label", (2, 40))):
        right = np.empty(shape, "int32" if kind == "label" else "float64")
        memory = np.zeros(right.nbytes + 32, np.uint8)
        start = -memory.ctypes.data % 16 + 1
        out = np.ndarray(shape, right.dtype, memory, start)
        numbers = None if kind == "label" else coefficients
        REFERENCE.write_map(request, arrays, Map(kind, right, numbers))
        engine.write_map(device, request, arrays, Map(kind, out, numbers))
        np.testing.assert_allclose(out, right, rtol=1e-12)
        if kind == "voxel":
            out[...] = 0
            at = sums[0].ctypes.data, voxels[0].ctypes.data
            engine.reduce(device, request, arrays, *at, Map(kind, out, numbers))
            REFERENCE.reduce(request, arrays, sums[1], voxels[1], Map(kind, right, numbers))
            np.testing.assert_allclose(out, right, rtol=1e-12)
            np.testing.assert_allclose(*sums, rtol=1e-12)
        assert not memory[:start].any()
        assert not memory[start + right.nbytes :].any()


def of_logits(array: np.ndarray, strides: tuple[int, ...] | None = None) -> Operands:
    o = Operand(FLOAT32, strides or array.strides, array.ctypes.data % 16)
    return Operands(array.shape, o, Operand(FLOAT32, (0,) * array.ndim, 0))


@pytest.mark.parametrize("layout", ["in order", "transposed", "reversed", "broadcast", "many axes"])
def test_copies_are_contiguous_in_the_order_of_the_axes(layout: str) -> None:
    x = packed(np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32))
    if layout == "transposed":
        x = x.transpose(0, 3, 1, 2)
    elif layout == "reversed":
        x = x[:, ::-1, :, ::-1]
    elif layout == "broadcast":
        x = np.broadcast_to(x[:1, :, :, :1], x.shape)
    elif layout == "many axes":  # 18 that do not merge
        x = packed(np.zeros((3,) * 2 + (2,) * 16, np.float32))[:2, :2]
        x = x.transpose(*range(0, 18, 2), *range(1, 18, 2))
        x[...] = np.arange(x.size).reshape(x.shape)
    operands, (copy,) = align(of_logits(x))
    strides = operands.logits.strides
    assert copy.nbytes == 4 * (12 if layout == "broadcast" else x.size)
    device = EmulatedDevice()
    with aligned(device, (copy,), (x.ctypes.data, 1)) as (there, other):
        assert other == 1
        memory = np.frombuffer((ctypes.c_char * copy.nbytes).from_address(there))
        same = np.ndarray(x.shape, np.float32, memory.view(np.uint8), 0, strides)
        np.testing.assert_array_equal(same, x)
    order = sorted(range(x.ndim), key=lambda axis: strides[axis])
    assert order == sorted(range(x.ndim), key=lambda axis: abs(x.strides[axis]))


def test_too_many_axes_are_named() -> None:
    x = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (2,) * 19, (0,) * 19)
    steps = [5 * 3**axis for axis in range(19)]
    with pytest.raises(ValueError, match=r"^logits: at most 18 axes .*, got 19; pass a contiguous"):
        align(of_logits(x, tuple(steps)))
