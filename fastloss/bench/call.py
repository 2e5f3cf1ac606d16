"""One call of one implementation, ready to run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any


class Call(ABC):
    """An implementation with its inputs in the form that it wants them, on their device."""

    loss_scale: float = 1.0
    """What the gradient is multiplied by: `fastloss.bench.losses.loss_scale`."""
    own_stream = False
    """Whether it runs on a stream that CUDA events of PyTorch's do not see."""

    @abstractmethod
    def forward(self) -> object:
        """Compute the value alone."""

    @abstractmethod
    def forward_backward(self) -> object:
        """Compute value and gradient, as a training loop would."""

    def reset(self) -> None:  # noqa: B027  most leave nothing behind
        """Drop what the last call left behind; not timed."""

    @abstractmethod
    def active(self) -> AbstractContextManager[None]:
        """Surrounds the calls; not timed."""

    @abstractmethod
    def result(self) -> tuple[float, Any]:
        """Value, and gradient times the loss scale.

        The gradient is an array or a tensor as the case has, in any floating dtype.
        """

    def with_new_gradient(self) -> object:
        """As `forward_backward`, where the gradient is a new array."""
        return self.forward_backward()
