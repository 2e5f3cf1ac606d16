"""Dice + cross-entropy in float64 by plain PyTorch operations, a slab of the volume at a time.

Written apart from the library, and checked against its reference backend on a part of the input.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import fastloss as fl
from fastloss.bench.losses import SMOOTH, make_loss

_SLAB = 1 << 25  # logits at a time


class Truth:
    """The value of these arrays, and how far others' results are from what is right."""

    def __init__(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        batch, classes = logits.shape[:2]
        self._logits, self._labels = logits.detach(), labels
        self._overlap, self._size = (
            torch.zeros(batch, classes, dtype=torch.float64, device=logits.device) for _ in range(2)
        )
        entropy = 0.0
        for b, part in self._slabs():
            log_p, one_hot = self._activate(b, part)
            p = log_p.exp()
            self._overlap[b] += (p * one_hot).sum((1, 2, 3))
            self._size[b] += p.sum((1, 2, 3)) + one_hot.sum((1, 2, 3))
            entropy -= float((log_p * one_hot).sum())
        self._voxels = labels.numel()
        dice = 1 - (2 * self._overlap + SMOOTH) / (self._size + SMOOTH)
        self.value = float(dice.mean()) + entropy / self._voxels

    def _slabs(self) -> Iterator[tuple[int, slice]]:
        batch, classes, depth, height, width = self._logits.shape
        step = max(1, _SLAB // (classes * height * width))
        for b in range(batch):
            for first in range(0, depth, step):
                yield b, slice(first, first + step)

    def _activate(self, b: int, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        log_p = torch.log_softmax(self._logits[b, :, part].double(), 0)
        one_hot = torch.zeros_like(log_p)
        one_hot.scatter_(0, self._labels[b, part].long()[None], 1.0)
        return log_p, one_hot

    def value_error(self, value: float) -> float:
        """|value − truth| / |truth|."""
        return abs(value - self.value) / abs(self.value)

    def gradient_error(self, gradient: torch.Tensor) -> float:
        """‖gradient − truth‖ / ‖truth‖."""
        batch, classes = self._overlap.shape
        wrong = norm = 0.0
        for b, part in self._slabs():
            log_p, one_hot = self._activate(b, part)
            p = log_p.exp()
            size = (self._size[b] + SMOOTH)[:, None, None, None]
            overlap = (2 * self._overlap[b] + SMOOTH)[:, None, None, None]
            by_p = (overlap / size - 2 * one_hot) / (size * batch * classes)
            right = p * (by_p - (by_p * p).sum(0)) + (p - one_hot) / self._voxels
            wrong += float((gradient[b, :, part].double() - right).square().sum())
            norm += float(right.square().sum())
        return float((wrong / norm) ** 0.5)


def check_against_reference(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """How far this truth and the library's float64 reference are apart, on the input's middle."""
    edge = min(32, logits.shape[-1])
    middle = slice((logits.shape[-1] - edge) // 2, (logits.shape[-1] + edge) // 2)
    x = logits.detach()[:1, :, middle, middle, middle].float().contiguous()
    y = labels[:1, middle, middle, middle].contiguous()
    with fl.use_backend("reference"):
        value, gradient = make_loss("dice_ce").value_and_grad(
            x.cpu().double().numpy(), y.cpu().numpy()
        )
    truth = Truth(x, y)
    return {
        "shape": list(x.shape),
        "value_error": truth.value_error(float(value)),
        "gradient_error": truth.gradient_error(torch.from_numpy(gradient).to(x.device)),
    }
