"""Statistics joined over the ranks of a process group, between the two passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from fastloss.statistics import Statistics

if TYPE_CHECKING:
    from fastloss.loss import Loss

SHARDS = ("batch", "volume")
WORLD = "world"


class Ranks(NamedTuple):
    """Which processes hold parts of the data, and which parts.

    Named rather than held: a name can be pickled, copied, and kept in a compiled graph.
    """

    group: str
    """The name of a process group; "world" for the default one."""
    shard: str
    """"batch": each rank holds other samples. "volume": each holds parts of the same samples."""

    def join(self, loss: Loss, statistics: Statistics) -> tuple[Statistics, int]:
        """The sums over all ranks, and the place of this rank's first sample among them."""
        loss.check_additive("process_group")
        sums, voxels = statistics.sums, statistics.voxels
        first = 0
        if self.shard == "batch" and not loss.sums_over_batch:
            sums, voxels, first = self._gather(sums, voxels)
        else:
            if self.shard == "batch":
                sums, voxels = sums.sum(axis=1, keepdims=True), voxels.sum(keepdims=True)
            both = torch.from_numpy(np.concatenate([sums.reshape(-1), voxels]))
            dist.all_reduce(both, group=self._process_group())
            sums, voxels = _split(both.numpy(), sums.shape)
        return Statistics(statistics.request, sums, voxels, statistics.dtype), first

    def own(self, coefficients: np.ndarray, first: int, batch: int) -> np.ndarray:
        """This rank's part of the derivatives by the joined sums.

        Times the number of ranks, as DistributedDataParallel divides the sum of the gradients by
        it.
        """
        if coefficients.shape[1] == 1:
            coefficients = np.repeat(coefficients, batch, axis=1)
        own: np.ndarray = coefficients[:, first : first + batch] * self._process_group().size()
        return own

    def _gather(self, sums: np.ndarray, voxels: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        group = self._process_group()
        slots, batch, classes = sums.shape
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size())]
        dist.all_gather(sizes, torch.tensor([batch]), group=group)
        batches = [int(size) for size in sizes]
        # Ranks may hold unequal numbers of samples; what is sent must be of one size.
        padded = torch.zeros(max(batches), slots * classes + 1, dtype=torch.float64)
        padded[:batch, :-1] = torch.from_numpy(sums).transpose(0, 1).reshape(batch, -1)
        padded[:batch, -1] = torch.from_numpy(voxels)
        parts = [torch.empty_like(padded) for _ in batches]
        dist.all_gather(parts, padded, group=group)
        rows = torch.cat([part[:n] for part, n in zip(parts, batches, strict=True)]).numpy()
        joined = rows[:, :-1].reshape(-1, slots, classes).transpose(1, 0, 2)
        first = sum(batches[: group.rank()])
        return np.ascontiguousarray(joined), np.ascontiguousarray(rows[:, -1]), first

    def _process_group(self) -> Any:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "process_group: torch.distributed is not initialised; call "
                "torch.distributed.init_process_group first"
            )
        if self.group == WORLD:
            return dist.group.WORLD
        name: Any = self.group
        return dist.distributed_c10d._resolve_process_group(name)


def ranks(process_group: Any, shard: str) -> Ranks | None:
    """From the options of a module; None for one process.

    Raises:
        TypeError: no process group. ValueError: an unknown kind of shard.
    """
    if shard not in SHARDS:
        raise ValueError(f"shard: expected one of 'batch', 'volume', got {shard!r}")
    if process_group is None:
        return None
    if process_group is True or process_group == WORLD:
        return Ranks(WORLD, shard)
    name = getattr(process_group, "group_name", None)
    if not isinstance(name, str):
        raise TypeError(
            "process_group: expected a process group of torch.distributed, True for the default "
            f"one, or None, got {process_group!r}"
        )
    return Ranks(name, shard)


def _split(both: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    size = int(np.prod(shape))
    return both[:size].reshape(shape), both[size:].copy()
