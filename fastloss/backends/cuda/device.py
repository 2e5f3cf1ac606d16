"""The interface of a GPU to the engine."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np


class Memory(Protocol):
    """Memory of a device, from the caller's allocator."""

    @property
    def address(self) -> int:
        """Its address."""


class Device(Protocol):
    """The GPU and the stream of the caller's framework."""

    shared_bytes: int
    """The most shared memory of a block."""
    multiprocessors: int

    def empty(self, nbytes: int) -> Memory:
        """New memory, used only on this stream."""

    def upload(self, numbers: np.ndarray) -> Memory:
        """A copy of a few float64 numbers, queued on the stream."""

    def passes(self, constants: tuple[tuple[str, object], ...], kernel: str) -> tuple[Any, ...]:
        """The compiled kernels: "reduce" with "finish", or others of `PASSES`."""

    def kernels(self, source: str, names: tuple[str, ...]) -> tuple[Any, ...]:
        """Other kernels, compiled."""

    def launch(
        self, kernel: Any, grid: int, block: tuple[int, int], shared: int, call: np.ndarray
    ) -> None:
        """Run a kernel on the stream; ``call``, (1,), is its only argument, a struct's bytes."""
