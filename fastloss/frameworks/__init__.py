"""An adapter per framework, imported when an array of that framework first arrives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastloss.borrowed import Borrowed
from fastloss.frameworks.base import Adapter
from fastloss.frameworks.dlpack import DlpackAdapter
from fastloss.frameworks.numpy import NumpyAdapter

__all__ = ["Adapter", "adapter_of", "borrow"]

_NUMPY = NumpyAdapter()
_DLPACK = DlpackAdapter()


def _torch() -> Adapter:
    # A statement: torch.compile follows it, as it does not follow `import_module`.
    from fastloss.frameworks.torch.adapter import ADAPTER

    return ADAPTER


def _cupy() -> Adapter:
    from fastloss.frameworks.cupy import CUPY

    return CUPY


def _jax() -> Adapter:
    from fastloss.frameworks.jax.adapter import ADAPTER

    return ADAPTER


def _tensorflow() -> Adapter:
    from fastloss.frameworks.tensorflow.adapter import ADAPTER

    return ADAPTER


# From the root package of an array's type to the adapter that serves it. Frameworks that are not
# listed are borrowed by DLPack.
_SPECIAL: dict[str, Callable[[], Adapter]] = {
    "torch": _torch,
    "cupy": _cupy,
    "jax": _jax,
    "jaxlib": _jax,
    "tensorflow": _tensorflow,
}
_adapters: dict[type, Adapter | None] = {}


def adapter_of(array: Any, name: str) -> Adapter:
    """The adapter for an array; TypeError naming the argument if it is of no known kind."""
    if _NUMPY.serves(array):
        return _NUMPY
    kind = type(array)
    if kind not in _adapters:
        _adapters[kind] = _special(array)
    adapter = _adapters[kind]
    if adapter is not None:
        return adapter
    if _DLPACK.serves(array):
        return _DLPACK
    raise TypeError(
        f"{name}: expected a NumPy array or an array with __dlpack__, got {type(array).__name__}"
    )


def _special(array: Any) -> Adapter | None:
    """The adapter of the framework that the array's type, or a base of it, belongs to."""
    for base in type(array).__mro__:
        load = _SPECIAL.get(base.__module__.partition(".")[0])
        if load is not None:
            adapter = load()
            return adapter if adapter.serves(array) else None
    return None


def borrow(array: Any, name: str, *, write: bool = False) -> Borrowed:
    """A NumPy view of anybody's array, sharing its memory."""
    return adapter_of(array, name).borrow(array, name, write=write)
