"""The true result, in float64, and the errors of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np

import fastloss as fl
from fastloss.bench.errors import Unavailable
from fastloss.bench.inputs import Case
from fastloss.bench.losses import SMOOTH, make_loss

_CHUNK = 1 << 21  # logits at a time: the reference backend holds about twenty arrays of that size
_SLAB = 1 << 25  # logits at a time on a device


@dataclass(frozen=True, eq=False)
class Truth:
    """The value, and the gradient in parts, each with its index."""

    value: float
    parts: Callable[[], Iterator[tuple[Any, Any]]]

    def value_error(self, value: float) -> float:
        """|value − truth| / |truth|."""
        return abs(value - self.value) / abs(self.value)

    def gradient_error(self, gradient: Any, scale: float = 1.0) -> float:
        """‖gradient / scale − truth‖ / ‖truth‖; the gradient may be of any floating dtype."""
        wrong = norm = 0.0
        for where, right in self.parts():
            part = gradient[where]
            part = part.astype(np.float64) if isinstance(part, np.ndarray) else part.double()
            wrong += float(((part / scale - right) ** 2).sum())
            norm += float((right**2).sum())
        return float((wrong / norm) ** 0.5)


def find_truth(case: Case, loss: str) -> Truth:
    """The truth for arrays by the reference backend, for tensors by a formula on their device."""
    if isinstance(case.logits, np.ndarray):
        return reference_truth(case.logits, case.target, loss)
    if loss != "dice_ce":
        raise Unavailable(f"on a device there is no float64 formula of {loss}")
    return formula_truth(case.logits, case.target)


def reference_truth(logits: np.ndarray, target: np.ndarray, loss_name: str) -> Truth:
    """Computed chunk by chunk from the unconverted logits."""
    loss = make_loss(loss_name)
    depth = logits.shape[2]
    step = max(1, _CHUNK * depth // logits.size)
    chunks = [slice(i, i + step) for i in range(0, depth, step)]
    dense = target.ndim == logits.ndim

    def chunk(part: slice) -> tuple[np.ndarray, np.ndarray]:
        own = target[:, :, part] if dense else target[:, part]
        return logits[:, :, part].astype(np.float64), own

    gradient = np.empty(logits.shape)
    with fl.use_backend("reference"):
        statistics = reduce(add, (loss.statistics(*chunk(part)) for part in chunks))
        value = float(loss.value(statistics))
        for part in chunks:
            gradient[:, :, part] = loss.gradient(*chunk(part), statistics=statistics)
    return Truth(
        value, lambda: ((where, gradient[where]) for where in np.ndindex(logits.shape[:2]))
    )


def formula_truth(logits: Any, labels: Any) -> Truth:
    """Dice + cross-entropy by plain PyTorch operations, independent of the library."""
    import torch

    batch, classes, depth, height, width = logits.shape
    logits, voxels = logits.detach(), labels.numel()
    step = max(1, _SLAB // (classes * height * width))
    slabs = [(b, slice(i, i + step)) for b in range(batch) for i in range(0, depth, step)]
    overlap, size = (
        torch.zeros(batch, classes, dtype=torch.float64, device=logits.device) for _ in range(2)
    )

    def activate(b: int, part: slice) -> tuple[Any, Any]:
        log_p = torch.log_softmax(logits[b, :, part].double(), 0)
        one_hot = torch.zeros_like(log_p)
        one_hot.scatter_(0, labels[b, part].long()[None], 1.0)
        return log_p, one_hot

    entropy = 0.0
    for b, part in slabs:
        log_p, one_hot = activate(b, part)
        p = log_p.exp()
        overlap[b] += (p * one_hot).sum((1, 2, 3))
        size[b] += p.sum((1, 2, 3)) + one_hot.sum((1, 2, 3))
        entropy -= float((log_p * one_hot).sum())
    above, below = 2 * overlap + SMOOTH, size + SMOOTH

    def parts() -> Iterator[tuple[Any, Any]]:
        for b, part in slabs:
            log_p, one_hot = activate(b, part)
            p = log_p.exp()
            n, d = (sums[b][:, None, None, None] for sums in (above, below))
            by_p = (n / d - 2 * one_hot) / (d * batch * classes)
            right = p * (by_p - (by_p * p).sum(0)) + (p - one_hot) / voxels
            yield (b, slice(None), part), right

    return Truth(float((1 - above / below).mean()) + entropy / voxels, parts)


def check_formula(case: Case) -> dict[str, Any]:
    """The difference between the formula and the reference backend, on the middle of a case."""
    import torch

    _, _, *size = case.spec.shape
    z, y, x = (slice(max(0, n // 2 - 16), n // 2 + 16) for n in size)
    logits = case.logits.detach()[:1, :, z, y, x].float().contiguous()
    labels = case.target[:1, z, y, x].contiguous()
    right = reference_truth(logits.cpu().numpy(), labels.cpu().numpy(), "dice_ce")
    gradient = torch.empty(logits.shape, dtype=torch.float64, device=logits.device)
    for where, part in right.parts():
        gradient[where] = torch.from_numpy(part).to(logits.device)
    truth = formula_truth(logits, labels)
    return {
        "shape": list(logits.shape),
        "value_error": truth.value_error(right.value),
        "gradient_error": truth.gradient_error(gradient),
    }
