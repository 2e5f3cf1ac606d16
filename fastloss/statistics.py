"""The additive sums that a loss is a function of."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fastloss.request import Request
from fastloss.sums import Sum, name_of


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
        regions: how many rows a sample has, those of its regions; 0 where a row is a sample. A
            sample of fewer regions has rows of no voxels at its end, which no term counts.
        for_target: whether the derivatives by sums of the target alone are asked for as well.

    Of arrays on a GPU the sums are there as well, in arrays of the same framework.
    """

    request: Request
    sums: np.ndarray
    voxels: np.ndarray
    dtype: np.dtype
    joined: Statistics | None = None
    regions: int = 0
    for_target: bool = False

    def __getitem__(self, key: str | Sum) -> np.ndarray:
        """One of the sums, (rows, C): by its name, for example ``"overlap"``, or by a `Sum`."""
        found: np.ndarray = self.sums[self.request.index[key]]
        return found

    @property
    def batch_size(self) -> int:
        """The number of rows."""
        return int(self.sums.shape[1])

    @property
    def classes(self) -> int:
        return int(self.sums.shape[2])

    def of_samples(self) -> Statistics:
        """The same with the regions of each sample joined, so that a row is a sample."""
        regions = self.regions
        if not regions:
            return self
        slots, _, classes = self.sums.shape
        sums = self.sums.reshape(slots, -1, regions, classes).sum(axis=2)
        voxels = self.voxels.reshape(-1, regions).sum(axis=1)
        return replace(self, sums=sums, voxels=voxels, regions=0)

    def __add__(self, other: Statistics) -> Statistics:
        if not isinstance(other, Statistics):
            return NotImplemented
        self.check_place(other)
        if self.regions and other.regions:
            most = max(self.regions, other.regions)
            self, other = self._with_regions(most), other._with_regions(most)
        alike = (self.request, self.sums.shape, self.regions)
        if alike != (other.request, other.sums.shape, other.regions):
            raise ValueError(
                "statistics: only sums of the same loss, kind of target, batch size and class "
                f"count add; got {self._describe()} and {other._describe()}"
            )
        return replace(
            self,
            sums=self.sums + other.sums,
            voxels=self.voxels + other.voxels,
            dtype=np.dtype(np.promote_types(self.dtype, other.dtype)),
            joined=None,
        )

    def _with_regions(self, count: int) -> Statistics:
        """The same with rows for more regions, of which these chunks have no voxel."""
        if count == self.regions:
            return self
        if not isinstance(self.sums, np.ndarray):
            raise ValueError(
                "statistics: on a GPU the chunks of a volume need one region_count, got "
                f"{self.regions} and {count}"
            )
        more, slots = [(0, 0), (0, count - self.regions)], len(self.sums)
        each = self.sums.reshape(slots, -1, self.regions, self.classes)
        sums = np.pad(each, [(0, 0), *more, (0, 0)]).reshape(slots, -1, self.classes)
        voxels = np.pad(self.voxels.reshape(-1, self.regions), more).reshape(-1)
        return replace(self, sums=sums, voxels=voxels, regions=count)

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
        rows = f"batch {self.batch_size}"
        if self.regions:
            rows = f"batch {self.batch_size // self.regions} of {self.regions} regions"
        return f"{names} of {kind} for {rows}, {self.classes} classes"
