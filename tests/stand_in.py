"""A stand-in for a GPU: arrays that claim to be on a device, and are in CPU memory.

The library's whole device path then runs with the kernels on the CPU: placement of arrays, order of
launches, and data passed between launches.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from device_backend import EmulatedDevice

from fastloss import frameworks
from fastloss.backends.cuda import backend as cuda
from fastloss.backends.cuda import prepared
from fastloss.borrowed import Borrowed, Kind, Place, device_view
from fastloss.frameworks.base import Adapter


class OnDevice:
    """An array of a minimal framework, on device number ``ordinal``."""

    def __init__(self, values: Any, ordinal: int = 0) -> None:
        self.values, self.ordinal = np.asarray(values), ordinal

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def reshape(self, *shape: Any) -> OnDevice:
        return OnDevice(self.values.reshape(*shape), self.ordinal)

    def movedim(self, source: int, to: int) -> OnDevice:
        return OnDevice(np.moveaxis(self.values, source, to), self.ordinal)

    def __add__(self, other: OnDevice) -> OnDevice:
        return OnDevice(self.values + other.values, self.ordinal)


class StandInPlace(Place):
    stream = 7

    def __init__(self, ordinal: int) -> None:
        self.ordinal = ordinal

    def empty(self, shape: tuple[int, ...], dtype: str) -> OnDevice:
        return OnDevice(np.full(shape, np.nan if "float" in dtype else 255, dtype), self.ordinal)

    def ones(self, shape: tuple[int, ...], dtype: str) -> OnDevice:
        return OnDevice(np.ones(shape, dtype), self.ordinal)

    def array(self, values: Any, dtype: str) -> OnDevice:
        values = values.values if isinstance(values, OnDevice) else values
        return OnDevice(np.array(values, dtype, order="C"), self.ordinal)

    def address(self, array: OnDevice) -> int:
        return array.values.ctypes.data

    def numpy(self, array: OnDevice) -> np.ndarray:
        return array.values


class StandInAdapter(Adapter):
    def serves(self, array: Any) -> bool:
        return isinstance(array, OnDevice)

    def borrow(self, array: Any, name: str, *, write: bool = False) -> Borrowed:
        values = array.values
        view = device_view(
            array, values.ctypes.data, values.shape, values.strides, values.dtype.name
        )
        return Borrowed(view, values.dtype.name, StandInPlace(array.ordinal))

    def empty_like(self, array: Any, borrowed: Borrowed) -> tuple[Any, Borrowed]:
        new = self.like(array)
        return new, self.borrow(new, "out")

    def kind(self, array: Any, name: str) -> Kind | None:
        if not self.serves(array):
            return None
        values = array.values
        traits = (array.ordinal, values.dtype, values.shape, values.strides)
        return Kind(traits, values.ctypes.data)

    def like(self, array: Any) -> OnDevice:
        return OnDevice(np.full_like(array.values, np.nan), array.ordinal)


class RecordingDevice(EmulatedDevice):
    """Records launches and their streams."""

    launched: list[str]

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place
        assert place.stream == 7

    def empty(self, nbytes: int) -> Any:
        self.launched.append(f"empty {nbytes}")
        return super().empty(nbytes)

    def launch(self, kernel: Any, *arguments: Any) -> None:
        self.launched.append(kernel[1])
        super().launch(kernel, *arguments)


def install(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Register `OnDevice` arrays with the library; return the list of launches."""
    launched: list[str] = []
    monkeypatch.setattr(RecordingDevice, "launched", launched, raising=False)
    monkeypatch.setattr(cuda, "CudaDevice", RecordingDevice)
    monkeypatch.setattr(cuda, "_programs", {})
    monkeypatch.setattr(prepared, "_calls", {})
    monkeypatch.setitem(frameworks._SPECIAL, OnDevice.__module__, StandInAdapter)
    return launched


def install_for_torch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Treat PyTorch's tensors in CPU memory as tensors on a device."""
    from fastloss.frameworks.torch import adapter, tensors

    class TensorPlace(tensors.TorchPlace):
        stream = 7

        def __init__(self) -> None:
            import torch

            self.device, self.ordinal = torch.device("cpu"), 0

    borrow = tensors.TensorAdapter.borrow

    def borrow_on_device(self: Any, array: Any, name: str, *, write: bool = False) -> Borrowed:
        return borrow(self, array, name, write=write)._replace(place=TensorPlace())

    monkeypatch.setattr(tensors.TensorAdapter, "borrow", borrow_on_device)
    for module in (adapter, tensors):
        monkeypatch.setattr(module, "is_on_gpu", lambda tensor: True)
    # Tensors that autograd passes on stay on the device.
    monkeypatch.setattr(tensors.TensorAdapter, "upstream", lambda self, gradient: gradient)
    return install(monkeypatch)
