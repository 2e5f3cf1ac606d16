"""The interface of an adapter for a framework's arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastloss.borrowed import Borrowed, Extras, Kind
from fastloss.frameworks.memory import empty_like
from fastloss.protocol import FusedLoss, LossLike, as_loss
from fastloss.structure import Recipe

if TYPE_CHECKING:
    from fastloss.backends.cuda.prepared import Prepared


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
        """Cache key and address of a plain GPU array; None if it needs the full checks.

        None also for what `borrow` might refuse.
        """
        return None

    def prepared(
        self, loss: FusedLoss, logits: Any, target: Any, voxel_weight: Any
    ) -> tuple[Prepared, tuple[int, ...]] | None:
        """The launch plan of such a call on a GPU and the addresses of these arrays; or None."""
        kind = self.kind(logits, "logits")
        if kind is None or loss.field_names or loss.regional is not None:
            return None
        from fastloss.backends.cuda.prepared import find

        return find(loss, self, kind, logits, target, voxel_weight)

    def like(self, array: Any) -> Any:
        """The new array of `empty_like`, for one that has a `kind`."""
        raise NotImplementedError(f"{type(self).__name__} must define like")

    def written(self, array: Any) -> None:
        """Mark an array that has a `kind` as written, as `borrow` with ``write`` does."""

    def result(self, value: Any) -> Any:
        """The value of a loss as the caller knows numbers."""
        return value

    def wrap(self, numbers: np.ndarray, like: Any) -> Any:
        """A new array of NumPy's as one of the framework, where ``like`` lies."""
        place = self.borrow(like, "array").place
        return self.result(numbers) if place is None else place.array(numbers, numbers.dtype.name)

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
        ready = self.prepared(loss, logits, target, voxel_weight) if extras is None else None
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
