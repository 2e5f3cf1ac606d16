"""What an adapter for a framework's arrays offers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Borrowed(NamedTuple):
    """A view of somebody's memory. bfloat16, which NumPy lacks, is seen as uint16."""

    array: np.ndarray
    dtype: str
    """The name of the dtype: "float32", "bfloat16", "uint8", …"""


class Adapter:
    """Borrows a framework's arrays, allocates results, and hooks its automatic differentiation.

    It is handed the two passes as functions and knows nothing of losses.
    """

    def serves(self, array: Any) -> bool:
        raise NotImplementedError(f"{type(self).__name__} must define serves")

    def borrow(self, array: Any, name: str, *, write: bool = False) -> Borrowed:
        """A NumPy view that shares the array's memory; ``name`` is the argument, for errors."""
        raise NotImplementedError(f"{type(self).__name__} must define borrow")

    def empty_like(self, array: Any, borrowed: Borrowed) -> tuple[Any, Borrowed]:
        """A new uninitialised array of the same shape, layout and dtype, and its view."""
        if borrowed.dtype != "bfloat16":
            new = np.empty_like(borrowed.array)
            return new, Borrowed(new, borrowed.dtype)
        try:
            from ml_dtypes import bfloat16
        except ImportError:
            raise TypeError(
                "out: NumPy has no bfloat16 of its own to return the gradient in; pass out= with "
                "a bfloat16 array (the logits themselves will do), or install ml_dtypes"
            ) from None
        new = np.empty_like(borrowed.array)
        return new.view(bfloat16), Borrowed(new, "bfloat16")

    def differentiable(
        self,
        forward: Callable[[], tuple[np.ndarray, Any]],
        backward: Callable[[Any, np.ndarray], Any],
        logits: Any,
    ) -> Any:
        """The loss value for the caller, differentiable where the framework is.

        Args:
            forward: the reduce pass; returns the value and what the backward pass needs.
            backward: the apply pass; takes that and the gradient of the value, and returns the
                gradient of the logits in the caller's kind of array.
            logits: the caller's array.
        """
        return forward()[0]
