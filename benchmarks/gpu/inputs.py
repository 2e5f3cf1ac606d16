"""What is measured: sizes, dtypes and layouts, and tensors of them made on the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch

from fastloss.bench.phantom import phantom

SIZES: dict[str, tuple[int, int, int]] = {
    "B2C2-128": (2, 2, 128),
    "B2C4-128": (2, 4, 128),
    "B2C14-128": (2, 14, 128),
    "B2C105-128": (2, 105, 128),
    "B1C14-256": (1, 14, 256),
}
"""Batch, classes and edge of the volume."""
DTYPES = ("float32", "float16", "bfloat16")
LAYOUTS = ("contiguous", "channels_last_3d")
MAIN = "B2C14-128"
"""The size on which int64 labels are measured, and compiled peers in every dtype and layout."""


@dataclass(frozen=True)
class Case:
    """One input; ``edge`` is smaller than that of the size in a smoke run."""

    size: str
    edge: int
    dtype: str = "float32"
    layout: str = "contiguous"
    labels: str = "uint8"

    @property
    def shape(self) -> tuple[int, ...]:
        batch, classes, _ = SIZES[self.size]
        return (batch, classes, *(self.edge,) * 3)

    @property
    def nbytes(self) -> int:
        """The bytes of the logits."""
        return prod(self.shape) * getattr(torch, self.dtype).itemsize

    @property
    def title(self) -> str:
        batch, classes, *_ = self.shape
        parts = [f"B{batch} C{classes} {self.edge}³", self.dtype]
        if self.layout != "contiguous":
            parts.append("channels-last")
        if self.labels != "uint8":
            parts.append(f"{self.labels} labels")
        return ", ".join(parts)


def all_cases(sizes: tuple[str, ...], smoke: bool) -> list[Case]:
    """Every input of these sizes, float32 and contiguous before the others."""
    cases = []
    for size in sizes:
        edge = max(8, SIZES[size][2] // 16) if smoke else SIZES[size][2]
        cases += [
            Case(size, edge, dtype, layout)
            for layout in LAYOUTS
            for dtype in DTYPES
        ]  # fmt: skip
        if size == MAIN:
            cases.append(Case(size, edge, labels="int64"))
    return cases


@lru_cache(maxsize=4)
def _labels(edge: int, classes: int) -> torch.Tensor:
    return torch.from_numpy(phantom((edge,) * 3, classes).astype("uint8"))


def make(case: Case, device: torch.device, seed: int = 0) -> tuple[Any, Any]:
    """Logits that favour the label of the phantom torso, with noise; and the labels."""
    batch, classes, *spatial = case.shape
    one = _labels(case.edge, classes).to(device)
    labels = torch.stack([one if b % 2 == 0 else one.flip(0) for b in range(batch)])
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.empty(
        case.shape,
        dtype=getattr(torch, case.dtype),
        device=device,
        memory_format=getattr(
            torch, "channels_last_3d" if "last" in case.layout else "contiguous_format"
        ),
    )
    for b in range(batch):  # a sample at a time, for the sake of memory
        sample = torch.randn((classes, *spatial), generator=generator, device=device)
        favoured = torch.full((1, *spatial), 4.0, device=device)
        sample.scatter_add_(0, labels[b].long()[None], favoured)
        logits[b] = sample
    return logits, labels.to(getattr(torch, case.labels))
