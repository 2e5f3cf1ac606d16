"""A loss as adapters and backends see it: two passes, a step between them, and numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np

from fastloss.borrowed import Borrowed, Kind
from fastloss.statistics import Statistics


class FusedLoss(Protocol):
    """The part of `fastloss.Loss` that lower layers use."""

    # Options.
    @property
    def activation(self) -> str: ...
    @property
    def ignore_index(self) -> int | None: ...
    @property
    def channel_axis(self) -> int: ...
    @property
    def validate(self) -> bool: ...

    # Terms, and the arrays and sums that they read.
    @property
    def terms(self) -> Any: ...

    needs: Any
    fields: tuple[str, ...]
    ranking: Any
    maps_voxels: bool

    @property
    def additive(self) -> bool: ...
    @property
    def sums_over_batch(self) -> bool: ...
    def check_additive(self, name: str) -> None: ...

    # The structure, and the numbers apart from it.
    given: tuple[Any, ...]

    @property
    def structure(self) -> str: ...
    @property
    def key(self) -> tuple[str, ...]: ...
    @property
    def operands(self) -> tuple[np.ndarray, ...]: ...
    @property
    def reads_again(self) -> bool: ...
    def with_operands(self, operands: Sequence[Any]) -> FusedLoss: ...
    def with_given(self, given: Sequence[Any]) -> FusedLoss: ...
    def given_to(self, term: Any, name: str) -> Any: ...

    # The steps of a call.
    def passes(self, logits: Any, target: Any, voxel_weight: Any, extras: Any = None) -> Any: ...
    def request(self, arrays: Any) -> Any: ...
    def combine(self, statistics: Statistics) -> tuple[Any, Callable[[Any], np.ndarray]]: ...
    def formulas(self, statistics: Statistics) -> tuple[Any, Callable[[Any], np.ndarray]]: ...
    def map_coefficients(self, request: Any, classes: int) -> np.ndarray: ...


class GpuAdapter(Protocol):
    """The part of `fastloss.frameworks.base.Adapter` that calls on a GPU use."""

    def kind(self, array: Any, name: str) -> Kind | None: ...
    def like(self, array: Any) -> Any: ...
    def written(self, array: Any) -> None: ...
    def borrow(self, array: Any, name: str, *, write: bool = False) -> Borrowed: ...


LossLike: TypeAlias = Any
"""A loss, a term, which is one alone, or a function that makes one."""


def as_loss(loss: Any) -> Any:
    """The loss itself, the one that a term is, or the one that a function makes."""
    if type(loss) is partial:
        return loss()
    return getattr(loss, "_loss", loss)
