"""Somebody's memory: where it lies, and how it is seen without a copy."""

from __future__ import annotations

import ctypes
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Place:
    """A GPU and the stream that work is queued on, and its memory in arrays of one framework.

    Attributes:
        ordinal: the number of the CUDA device.
    """

    ordinal: int

    @property
    def stream(self) -> int:
        """The address of the stream that is current."""
        raise NotImplementedError(f"{type(self).__name__} must define stream")

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A new array in C order, from the framework's own allocator."""
        raise NotImplementedError(f"{type(self).__name__} must define empty")

    def ones(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A new array in C order, of ones."""
        raise NotImplementedError(f"{type(self).__name__} must define ones")

    def array(self, values: Any, dtype: str) -> Any:
        """Anybody's numbers as an array here, in C order."""
        raise NotImplementedError(f"{type(self).__name__} must define array")

    def address(self, array: Any) -> int:
        """Where an array of the framework lies."""
        raise NotImplementedError(f"{type(self).__name__} must define address")

    def scalar(self, number: Any, dtype: str) -> Any:
        """As `array`, of one number, which itself will do."""
        return self.array(number, dtype)

    def operand(self, array: Any) -> tuple[str, int, Any]:
        """Numbers that are read there: their dtype, "float32" or "float64", where they lie in C
        order, and what holds them. Nothing waits."""
        own = self.array(array, "float64")
        return "float64", self.address(own), own

    def numpy(self, array: Any) -> np.ndarray:
        """A copy in the processor's memory, once all that is queued is done."""
        raise NotImplementedError(f"{type(self).__name__} must define numpy")


class Kind(NamedTuple):
    """An array in a GPU's memory: its device, dtype, shape and strides, and where it lies."""

    traits: Hashable
    address: int


class Borrowed(NamedTuple):
    """A view of somebody's memory. bfloat16, which NumPy lacks, is seen as uint16.

    Where ``place`` is given, the memory is a GPU's: of ``array`` the shape, strides and address
    may be looked at, the numbers not.
    """

    array: np.ndarray
    dtype: str
    """The name of the dtype: "float32", "bfloat16", "uint8", …"""
    place: Place | None = None


def device_view(
    owner: Any, address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str
) -> np.ndarray:
    """A stand-in, for `Borrowed`, of an array in a GPU's memory; strides in bytes.

    The ``owner`` of the memory lives as long as the view.
    """
    item = np.dtype(np.uint16 if dtype == "bfloat16" else dtype)
    if 0 in shape:
        return np.empty(shape, item)
    below, above = _reach(shape, strides)
    memory: Any = (ctypes.c_char * (above + item.itemsize - below)).from_address(address + below)
    memory.owner = owner
    view: np.ndarray = np.ndarray(shape, item, memory, -below, strides)
    return view


def byte_bounds(array: np.ndarray) -> tuple[int, int]:
    """The addresses of an array's first byte and of the one behind its last."""
    address: int = array.__array_interface__["data"][0]
    if not array.size:
        return address, address
    below, above = _reach(array.shape, array.strides)
    return address + below, address + above + array.itemsize


def _reach(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int]:
    """How far before and behind the first number others start."""
    steps = [(n - 1) * s for n, s in zip(shape, strides, strict=True)]
    return sum(s for s in steps if s < 0), sum(s for s in steps if s > 0)


class Extras(NamedTuple):
    """The arrays of a call beside logits, target and voxel weight, as the caller gave them."""

    fields: tuple[tuple[str, Any], ...] = ()
    """Names and arrays, in the order of the names."""
    regions: Any = None
    region_count: int | None = None

    @classmethod
    def of(cls, fields: Any, regions: Any, region_count: Any) -> Extras | None:
        """None where there are none.

        Raises:
            TypeError: ``fields`` is no mapping of names, ``region_count`` no integer.
            ValueError: a ``region_count`` below 1, or without regions.
        """
        if fields is None and regions is None and region_count is None:
            return None
        if fields is not None and not (
            isinstance(fields, Mapping) and all(isinstance(name, str) for name in fields)
        ):
            raise TypeError(
                f"fields: expected a mapping from names to arrays, got {type(fields).__name__}"
            )
        if fields is not None and regions is None and "regions" in fields:
            fields = dict(fields)  # as `fastloss.Loss.fields` returns them
            regions = fields.pop("regions")
        if region_count is not None:
            if isinstance(region_count, bool) or not isinstance(region_count, (int, np.integer)):
                raise TypeError(f"region_count: expected an integer, got {region_count!r}")
            if regions is None or region_count < 1:
                raise ValueError(
                    "region_count: expected a number of at least 1 beside regions, got "
                    f"{region_count}" + (" without regions" if regions is None else "")
                )
            region_count = int(region_count)
        ordered = tuple(sorted((fields or {}).items(), key=lambda item: item[0]))
        return cls(ordered, regions, region_count)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the fields."""
        return tuple(name for name, _ in self.fields)

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The fields, then the regions."""
        return (*(array for _, array in self.fields), self.regions)

    def with_arrays(self, arrays: Sequence[Any]) -> Extras:
        """The same with other arrays, as `arrays` has them."""
        named = zip(self.fields, arrays[:-1], strict=True)
        return self._replace(fields=tuple((n, a) for (n, _), a in named), regions=arrays[-1])
