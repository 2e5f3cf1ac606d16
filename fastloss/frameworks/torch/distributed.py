"""Statistics joined over the ranks of a process group, between the two passes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from fastloss.protocol import FusedLoss
    from fastloss.statistics import Statistics

SHARDS = ("batch", "volume")
WORLD = "world"
T = TypeVar("T")


class Ranks(NamedTuple):
    """Which processes hold parts of the data, and which parts.

    Named rather than held: a name can be pickled, copied, and kept in a compiled graph.
    """

    group: str
    """The name of a process group; "world" for the default one."""
    shard: str
    """"batch": each rank holds other samples. "volume": each holds parts of the same samples."""

    def join(self, loss: FusedLoss, statistics: Statistics) -> tuple[Statistics, int]:
        """The sums over all ranks, and the place of this rank's first sample among them."""
        loss.check_additive("process_group", parts=self.shard == "volume")
        on_device = isinstance(statistics.sums, torch.Tensor)
        sums, voxels = _tensor(statistics.sums), _tensor(statistics.voxels)
        first = 0
        if self.shard == "batch" and (statistics.regions or not loss.sums_over_batch):
            sums, voxels, first = self._gather(sums, voxels)
        else:
            if loss.sums_over_batch and not statistics.regions:
                sums, voxels = sums.sum(dim=1, keepdim=True), voxels.sum().reshape(1)
            else:
                sums, voxels = self._with_all_samples(sums, voxels)
            both = torch.cat([sums.reshape(-1), voxels])
            dist.all_reduce(both, group=self._process_group())
            sums, voxels = both[: sums.numel()].reshape(sums.shape), both[sums.numel() :]
        total: Any = sums.contiguous()
        weight: Any = voxels.clone()
        if not on_device:
            total, weight = total.numpy(), weight.numpy()
        return replace(statistics, sums=total, voxels=weight), first

    def own(self, coefficients: Any, first: int, batch: int) -> Any:
        """This rank's part, ``batch`` rows, of the derivatives by the joined sums.

        Times the number of ranks, as DistributedDataParallel divides the sum of the gradients by
        it.
        """
        ranks = self._process_group().size()
        if not isinstance(coefficients, np.ndarray):
            return coefficients.part(first, ranks)
        if coefficients.shape[1] == 1:
            coefficients = np.repeat(coefficients, batch, axis=1)
        return coefficients[:, first : first + batch] * ranks

    def _with_all_samples(
        self, sums: torch.Tensor, voxels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums of a rank, with zeros for the samples of which it holds no part.

        A rank may come without any: then how many there are is known to the others alone.
        """
        slots, batch, classes = sums.shape
        most = torch.full((1,), batch, dtype=torch.int64, device=sums.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self._process_group())
        if batch == 0:  # only such a rank waits for the number, if it is on a GPU
            batch = int(most)
            sums, voxels = sums.new_zeros(slots, batch, classes), voxels.new_zeros(batch)
        return sums, voxels

    def _gather(
        self, sums: torch.Tensor, voxels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        group = self._process_group()
        slots, batch, classes = sums.shape
        one = torch.tensor([batch], device=sums.device)
        sizes = [torch.zeros_like(one) for _ in range(group.size())]
        dist.all_gather(sizes, one, group=group)
        batches = [int(size) for size in sizes]
        # Ranks may hold unequal numbers of samples; what is sent must be of one size.
        padded = sums.new_zeros(max(batches), slots * classes + 1)
        padded[:batch, :-1] = sums.transpose(0, 1).reshape(batch, slots * classes)
        padded[:batch, -1] = voxels
        parts = [torch.empty_like(padded) for _ in batches]
        dist.all_gather(parts, padded, group=group)
        rows = torch.cat([part[:n] for part, n in zip(parts, batches, strict=True)])
        joined = rows[:, :-1].reshape(len(rows), slots, classes).transpose(0, 1)
        return joined, rows[:, -1], sum(batches[: group.rank()])

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


def gathered(part: T, process_group: Any) -> list[T]:
    """This object of every process of a group, in their order.

    Raises:
        RuntimeError: torch.distributed is not initialised. TypeError: no process group.
    """
    named = ranks(process_group, "batch")
    if named is None:
        return [part]
    group = named._process_group()
    parts: list[Any] = [None] * group.size()
    dist.all_gather_object(parts, part, group=group)
    return parts


def _tensor(sums: Any) -> torch.Tensor:
    return sums if isinstance(sums, torch.Tensor) else torch.from_numpy(sums)
