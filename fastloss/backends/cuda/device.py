"""What the engine asks of a GPU."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np


class Memory(Protocol):
    """Memory of a device, from the caller's allocator."""

    @property
    def address(self) -> int:
        """Where it lies."""


class Device(Protocol):
    """A GPU and a stream on it, as the caller's framework sees them."""

    shared_bytes: int
    """The most shared memory that a block can have."""
    multiprocessors: int

    def empty(self, nbytes: int) -> Memory:
        """New memory, which is used on the stream alone."""

    def upload(self, numbers: np.ndarray) -> Memory:
        """A copy of a few float64 numbers, queued on the stream."""

    def passes(self, constants: tuple[tuple[str, object], ...], kernel: str) -> tuple[Any, ...]:
        """The compiled kernels: "reduce" with "finish", or "apply", or "map"."""

    def kernels(self, source: str, names: tuple[str, ...]) -> tuple[Any, ...]:
        """Other kernels, compiled."""

    def launch(
        self, kernel: Any, grid: int, block: tuple[int, int], shared: int, call: np.ndarray
    ) -> None:
        """Run a kernel on the stream; ``call``, (1,), is its one argument, a struct's bytes."""
