"""The prediction of a whole volume, in windows that overlap."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import torch
from torch import Tensor

WINDOWS = 4
"""How many go through the network at once."""


def predict(
    network: Callable[[Tensor], Tensor],
    image: np.ndarray,
    patch: tuple[int, int, int],
    device: str = "cpu",
) -> np.ndarray:
    """The likeliest class of every voxel, (D, H, W) of uint16; as `probabilities`."""
    found: np.ndarray = probabilities(network, image, patch, device).argmax(axis=0)
    return found.astype(np.uint16)


@torch.no_grad()
def probabilities(
    network: Callable[[Tensor], Tensor],
    image: np.ndarray,
    patch: tuple[int, int, int],
    device: str = "cpu",
) -> np.ndarray:
    """The probability of every class and voxel, (classes, D, H, W) of float32.

    Windows of the patch's size overlap by half at least; their probabilities are averaged, weighed
    by a tent that is highest in the middle of a window.

    Args:
        network: (B, channels, *patch) to logits.
        image: (channels, D, H, W).
    """
    shape = image.shape[1:]
    pad = [(0, max(0, n - have)) for n, have in zip(patch, shape, strict=True)]
    padded = torch.from_numpy(np.pad(image, [(0, 0), *pad], mode="edge"))
    tent = torch.from_numpy(_tent(patch)).to(device)
    starts = [_starts(have, n) for have, n in zip(padded.shape[1:], patch, strict=True)]
    places = [
        (slice(None), *(slice(a, a + n) for a, n in zip(start, patch, strict=True)))
        for start in product(*starts)
    ]
    total: Tensor | None = None
    for first in range(0, len(places), WINDOWS):
        some = places[first : first + WINDOWS]
        batch = torch.stack([padded[place] for place in some]).to(device)
        each = torch.softmax(network(batch).float(), 1) * tent
        if total is None:
            total = torch.zeros((each.shape[1], *padded.shape[1:]), device=device)
        for place, one in zip(some, each, strict=True):
            total[place] += one
    assert total is not None
    total /= total.sum(0)
    inner = (slice(None), *(slice(0, n) for n in shape))
    found: np.ndarray = total[inner].cpu().numpy()
    return np.ascontiguousarray(found)


def _starts(size: int, patch: int) -> list[int]:
    """Where windows begin: evenly, at most half a window apart."""
    if size <= patch:
        return [0]
    steps = -(-(size - patch) // max(1, patch // 2))
    return sorted({round(i * (size - patch) / steps) for i in range(steps + 1)})


def _tent(patch: tuple[int, int, int]) -> np.ndarray:
    found = np.ones(patch, np.float32)
    for axis, n in enumerate(patch):
        line = 1 - np.abs(np.arange(n) + 0.5 - n / 2) / (n / 2 + 0.5)
        found *= line.astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
    return found
