"""The additive sums that a loss is a function of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastloss.request import Request
from fastloss.sums import Sum, as_sum, name_of


@dataclass(frozen=True, eq=False)
class Statistics:
    """Sums over voxels, per row and class. Adding two of them joins two chunks of a volume.

    A row is a sample or, of a loss that was given regions, a region of a sample.

    Attributes:
        request: the sums' names; ``request.sums`` is the first axis of ``sums``.
        sums: (S, rows, C) float64.
        voxels: (rows,) float64, the sum of the voxel weights of each row.
        dtype: the dtype of the loss value: float32, or float64 for float64 logits.
        joined: the same over all ranks and samples, where a term asks for them.

    Of arrays on a GPU the sums are there as well, in arrays of the same framework.
    """

    request: Request
    sums: np.ndarray
    voxels: np.ndarray
    dtype: np.dtype
    joined: Statistics | None = None

    def __getitem__(self, key: str | Sum) -> np.ndarray:
        """One of the sums, (rows, C): by its name, for example ``"overlap"``, or by a `Sum`."""
        return self.sums[self.request.index[as_sum(key)]]

    @property
    def batch_size(self) -> int:
        return self.sums.shape[1]

    @property
    def classes(self) -> int:
        return self.sums.shape[2]

    def __add__(self, other: Statistics) -> Statistics:
        if not isinstance(other, Statistics):
            return NotImplemented
        if other.request != self.request or other.sums.shape != self.sums.shape:
            raise ValueError(
                "statistics: only sums of the same loss, kind of target, batch size and class "
                f"count add; got {self._describe()} and {other._describe()}"
            )
        self.check_place(other)
        dtype = np.promote_types(self.dtype, other.dtype)
        return Statistics(
            self.request, self.sums + other.sums, self.voxels + other.voxels, np.dtype(dtype)
        )

    def __radd__(self, other: object) -> Statistics:
        if isinstance(other, int) and other == 0:  # the start value of the builtin sum()
            return self
        return NotImplemented

    def check_place(self, other: Statistics) -> None:
        """Raise ValueError if the sums of the other lie in arrays of another kind."""
        kinds = [type(s.sums).__module__.partition(".")[0] for s in (self, other)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"statistics: expected sums in arrays of one framework, got {kinds[0]} and "
                f"{kinds[1]}; those of arrays on a GPU lie there"
            )

    def _describe(self) -> str:
        kind = "dense" if self.request.dense else "labels"
        names = ", ".join(map(name_of, self.request.sums))
        return f"{names} of {kind} for batch {self.batch_size}, {self.classes} classes"
