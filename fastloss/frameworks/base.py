"""What an adapter for a framework's arrays offers."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from fastloss.frameworks.memory import empty_like

if TYPE_CHECKING:
    from fastloss.loss import Loss
    from fastloss.structure import Recipe
    from fastloss.terms import Term

    LossLike: TypeAlias = Loss | Term | partial[Loss]
    """A loss, a term, which is one alone, or a function that makes one."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


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
    """What stands for an array in a GPU's memory in `Borrowed`; strides in bytes.

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
    def arrays(self) -> tuple[Any, ...]:
        """The fields, then the regions."""
        return (*(array for _, array in self.fields), self.regions)

    def with_arrays(self, arrays: Sequence[Any]) -> Extras:
        """The same with other arrays, as `arrays` has them."""
        named = zip(self.fields, arrays[:-1], strict=True)
        return self._replace(fields=tuple((n, a) for (n, _), a in named), regions=arrays[-1])


class Adapter:
    """Borrows a framework's arrays, allocates results, and hooks its automatic differentiation.

    Of a loss it knows no more than that there are two passes and a step between them.
    """

    def serves(self, array: Any) -> bool:
        raise NotImplementedError(f"{type(self).__name__} must define serves")

    def borrow(self, array: Any, name: str, *, write: bool = False) -> Borrowed:
        """A NumPy view that shares the array's memory; ``name`` is the argument, for errors."""
        raise NotImplementedError(f"{type(self).__name__} must define borrow")

    def numbers(self, array: Any, name: str) -> np.ndarray:
        """The numbers of a small array, float64, wherever it lies."""
        view, dtype, place = self.borrow(array, name)
        if place is not None:
            return place.numpy(array).astype(np.float64)
        if dtype == "bfloat16":
            view = (view.astype(np.uint32) << 16).view(np.float32)
        return view.astype(np.float64)

    def empty_like(self, array: Any, borrowed: Borrowed) -> tuple[Any, Borrowed]:
        """A new uninitialised array of the same shape, layout and dtype, and its view."""
        if borrowed.dtype != "bfloat16":
            new = empty_like(borrowed.array)
            return new, Borrowed(new, borrowed.dtype)
        try:
            from ml_dtypes import bfloat16
        except ImportError:
            raise TypeError(
                "out: NumPy has no bfloat16 of its own to return the gradient in; pass out= with "
                "a bfloat16 array (the logits themselves will do), or install ml_dtypes"
            ) from None
        new = empty_like(borrowed.array)
        return new.view(bfloat16), Borrowed(new, "bfloat16")

    def kind(self, array: Any, name: str) -> Kind | None:
        """What `borrow` would find out, without a view; None for all but plain arrays on a GPU.

        None also for what `borrow` might refuse.
        """
        return None

    def like(self, array: Any) -> Any:
        """The new array of `empty_like`, for one that has a `kind`."""
        raise NotImplementedError(f"{type(self).__name__} must define like")

    def written(self, array: Any) -> None:
        """What `borrow` does to an array that will be written to, for one that has a `kind`."""

    def result(self, value: Any) -> Any:
        """The value of a loss as the caller knows numbers."""
        return value

    def upstream(self, gradient: Any) -> Any:
        """The gradient of the final result by the value, as something NumPy takes.

        On a GPU it stays what it is, as NumPy is not asked.
        """
        return gradient

    def value(
        self,
        loss: LossLike,
        logits: Any,
        target: Any,
        voxel_weight: Any,
        *,
        extras: Extras | None = None,
    ) -> Any:
        """The loss of these arrays for the caller, differentiable where the framework is.

        ``passes`` of the loss borrows the arrays, runs the two passes over them, and the step
        between.
        """
        loss = as_loss(loss)
        ready = loss.prepared(self, logits, target, voxel_weight) if extras is None else None
        if ready is not None:
            call, addresses = ready
            return call.value(loss, addresses)[0]
        passes = loss.passes(logits, target, voxel_weight, extras)
        return self.result(passes.forward()[0])

    def takes_numbers(self, logits: Any, options: Iterable[Any]) -> bool:
        """Whether numbers among these options are to be operands rather than to be read here."""
        return False

    def evaluate(
        self,
        options: tuple[tuple[str, Any], ...],
        recipes: Sequence[Recipe],
        logits: Any,
        target: Any,
        voxel_weight: Any,
        extras: Extras | None = None,
    ) -> Any:
        """As `value`, of a loss that is not made yet, if the adapter `takes_numbers`."""
        raise NotImplementedError(f"{type(self).__name__} must define evaluate")


def as_loss(loss: LossLike) -> Loss:
    """The loss itself, the one that a term is, or the one that a function makes."""
    if type(loss) is partial:
        return loss()
    return getattr(loss, "_loss", loss)  # type: ignore[arg-type]


def torch_compiles() -> bool:
    """Whether `torch.compile` or `torch.export` is at work, without an import of torch."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_compiling()


def torch_traces() -> bool:
    """Whether `torch.compile` reads this function, rather than that it runs."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_dynamo_compiling()


def fixed(number: float) -> float:
    """The number, which `torch.compile` then takes for a constant rather than for a variable."""
    return float.fromhex(float(number).hex())


def constant(function: _Function) -> _Function:
    """Mark a function whose result depends on its arguments alone.

    `torch.compile` then takes the result as it is instead of tracing into the function. It is
    `torch.compiler.assume_constant_result` without an import of torch.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
