"""Any exporter of DLPack: PyTorch, JAX, TensorFlow, …, bfloat16 included."""

from __future__ import annotations

from typing import Any

from fastloss.borrowed import Borrowed
from fastloss.frameworks.base import Adapter
from fastloss.frameworks.capsules import device_of, export, view_of


class DlpackAdapter(Adapter):
    def serves(self, array: Any) -> bool:
        return hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__")

    def borrow(self, array: Any, name: str, *, write: bool = False) -> Borrowed:
        kind = type(array).__module__.partition(".")[0]
        if write and kind in ("jax", "jaxlib"):
            raise ValueError(f"{name}: expected a writable array, got an immutable JAX array")
        where, number = device_of(array, name)
        if where == "other":
            raise TypeError(
                f"{name}: expected an array in CPU memory or on a CUDA device, got a "
                f"{type(array).__name__} on DLPack device type {number}"
            )
        if getattr(array, "requires_grad", False):
            # Taking the memory would cut the graph without a word.
            raise TypeError(
                f"{name}: got a tensor that requires a gradient, which the arrays-only interface "
                "does not record; pass tensor.detach() and take the gradient from value_and_grad"
            )
        if where == "cuda":
            return _cuda(name).borrow(array, name, write=write)
        return view_of(export(array, name), name, write)

    def empty_like(self, array: Any, borrowed: Borrowed) -> tuple[Any, Borrowed]:
        if borrowed.place is not None:
            return _cuda("logits").empty_like(array, borrowed)
        return super().empty_like(array, borrowed)


def _cuda(name: str) -> Adapter:
    try:
        from fastloss.frameworks.cupy import EXPORTER
    except ImportError as error:
        raise ImportError(
            f"{name}: got an array on a CUDA device, which needs CuPy: pip install "
            "'fastloss[cuda13]', or 'fastloss[cuda12]' for CUDA 12"
        ) from error
    return EXPORTER
