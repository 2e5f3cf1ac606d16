"""Metrics that keep what they found, over batches and over the ranks of a process group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Metric(ABC):
    """A callable that measures predictions, as ``monai.metrics.Metric``."""

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What is measured."""

    def __str__(self) -> str:
        return type(self).__name__


class IterationMetric(Metric):
    """A metric of one batch, as ``monai.metrics.IterationMetric``.

    A subclass defines _compute_tensor.
    """

    def __call__(self, y_pred: Any, y: Any = None, **kwargs: Any) -> Any:
        """The metric of a batch, without gradient.

        Args:
            y_pred: (B, C, *spatial), or a list of tensors (C, *spatial), which may differ in size.
            y: the same for the reference; None if the metric needs none.
            kwargs: for the metric, such as ``spacing``.

        Raises:
            ValueError: ``y_pred`` is neither a tensor nor a list.
        """
        if isinstance(y_pred, (list, tuple)) or isinstance(y, (list, tuple)):
            return self._compute_list(y_pred, y, **kwargs)
        if not isinstance(y_pred, Tensor):
            raise ValueError(
                "y_pred: expected a tensor (batch, channels, *spatial) or a list of tensors "
                f"(channels, *spatial), got {type(y_pred).__name__}"
            )
        return self._compute_tensor(
            y_pred.detach(), y.detach() if isinstance(y, Tensor) else None, **kwargs
        )

    def _compute_list(self, y_pred: Any, y: Any = None, **kwargs: Any) -> Any:
        """Sample by sample; the results joined."""
        references = [None] * len(y_pred) if y is None else y
        found = [
            self._compute_tensor(
                p.detach().unsqueeze(0), None if g is None else g.detach().unsqueeze(0), **kwargs
            )
            for p, g in zip(y_pred, references, strict=False)
        ]
        if isinstance(found[0], Tensor):
            return torch.cat(found)
        if isinstance(found[0], (list, tuple)) and all(isinstance(i, Tensor) for i in found[0]):
            return [torch.cat(several) for several in zip(*found, strict=True)]
        return found

    @abstractmethod
    def _compute_tensor(self, y_pred: Tensor, y: Any = None, **kwargs: Any) -> Any:
        """The metric of tensors (B, C, *spatial): a tensor of B rows, or several."""


class Cumulative:
    """Buffers that rows are added to, as ``monai.metrics.Cumulative``.

    Where ``torch.distributed`` is initialised, what is read are the rows of all ranks, in the order
    of the ranks; they are gathered when first read after a change, so that all ranks must read.
    """

    def __init__(self) -> None:
        self._buffers: list[list[Tensor]] | None = None
        self._synced_tensors: list[Tensor] | None = None
        self._synced = False

    def reset(self) -> None:
        """Empty the buffers."""
        self._buffers = self._synced_tensors = None
        self._synced = False

    def extend(self, *data: Any) -> None:
        """Add rows, to a buffer for each argument: a tensor of them, or a list.

        Raises:
            TypeError: an argument has no rows.
        """
        for buffer, rows in self._with_buffers(data):
            try:
                buffer.extend(_tensor(rows).unbind(0))
            except (IndexError, RuntimeError) as error:
                raise TypeError(
                    f"data: expected a tensor of rows or a list of them, got {rows!r}: {error}"
                ) from error

    def append(self, *data: Any) -> None:
        """Add one row, to a buffer for each argument."""
        for buffer, row in self._with_buffers(data):
            buffer.append(_tensor(row))

    def aggregate(self, *args: Any, **kwargs: Any) -> Any:
        """The result over all rows."""
        raise NotImplementedError(f"{type(self).__name__} must define aggregate")

    def get_buffer(self) -> Any:
        """A copy of the rows, as a tensor, or as a list of them for several buffers; None: none.

        Raises:
            TypeError: rows of different shapes.
        """
        self._sync()
        if self._synced_tensors is None:
            return None
        copies = [tensor.detach().clone() for tensor in self._synced_tensors]
        return copies[0] if len(copies) == 1 else copies

    def __len__(self) -> int:
        """The number of rows in the longest buffer, of all ranks."""
        self._sync()
        return max(map(len, self._synced_tensors), default=0) if self._synced_tensors else 0

    def _with_buffers(self, data: Sequence[Any]) -> list[tuple[list[Tensor], Any]]:
        if self._buffers is None:
            self._buffers = [[] for _ in data]
        self._synced = False
        return list(zip(self._buffers, data, strict=False))

    def _sync(self) -> None:
        if self._synced or self._buffers is None:
            return
        try:
            self._synced_tensors = [gather(torch.stack(buffer)) for buffer in self._buffers]
        except (RuntimeError, TypeError, ValueError) as error:
            shapes = [sorted({tuple(row.shape) for row in buffer}) for buffer in self._buffers]
            raise TypeError(f"{error}: unable to sync buffers of rows {shapes}") from error
        self._synced = True


class CumulativeIterationMetric(Cumulative, IterationMetric):
    """A metric of batches, whose results are kept until ``reset``.

    As ``monai.metrics.CumulativeIterationMetric``.
    """

    def __call__(self, y_pred: Any, y: Any = None, **kwargs: Any) -> Any:
        """The metric of a batch, which is also kept: see `IterationMetric`."""
        found = super().__call__(y_pred, y, **kwargs)
        if isinstance(found, (list, tuple)):
            self.extend(*found)
        else:
            self.extend(found)
        return found

    def _rows(self) -> Tensor:
        rows = self.get_buffer()
        if not isinstance(rows, Tensor):
            kind = type(rows).__name__
            raise ValueError(f"aggregate: expected a tensor of results, got {kind}; call it first")
        return rows


def _tensor(data: Any) -> Tensor:
    if isinstance(data, Tensor):
        return data.as_subclass(Tensor)
    if isinstance(data, (list, tuple)) and data and all(isinstance(i, Tensor) for i in data):
        return torch.stack([_tensor(i) for i in data])
    return torch.as_tensor(data)


def gather(rows: Tensor) -> Tensor:
    """The rows of all ranks; each may have another number of them."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    device = rows.device
    backend = dist.get_backend()
    if backend == "nccl":
        rows = rows.to(torch.device("cuda", torch.cuda.current_device()))
    elif backend == "gloo":
        rows = rows.cpu()
    ranks = range(dist.get_world_size())
    length = torch.tensor([len(rows)], device=rows.device)
    lengths = [torch.zeros_like(length) for _ in ranks]
    dist.all_gather(lengths, length)
    longest = max(map(int, lengths))
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    padded[: len(rows)] = rows
    found = [torch.empty_like(padded) for _ in ranks]
    dist.all_gather(found, padded)
    parts = [part[: int(n)] for part, n in zip(found, lengths, strict=True)]
    return torch.cat(parts).to(device)
