"""The additive sums that a loss is a function of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastloss.request import Request


@dataclass(frozen=True, eq=False)
class Statistics:
    """Sums over voxels, per sample and class. Adding two of them joins two chunks of a volume.

    Attributes:
        request: what was summed; ``request.slots`` names the first axis of ``sums``.
        sums: (S, B, C) float64.
        voxels: (B,) float64, the sum of the voxel weights of each sample.
        dtype: the dtype of the loss value: float32, or float64 for float64 logits.
        joined: the same over all ranks and samples, where a term asks for them.

    Of arrays on a GPU the sums are there as well, in arrays of the same framework.
    """

    request: Request
    sums: np.ndarray
    voxels: np.ndarray
    dtype: np.dtype
    joined: Statistics | None = None

    def __getitem__(self, slot: str) -> np.ndarray:
        """The (B, C) sums of one slot, for example ``"overlap"``."""
        return self.sums[self.request.index[slot]]

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
        return f"{self.request.slots} of {kind} for batch {self.batch_size}, {self.classes} classes"
