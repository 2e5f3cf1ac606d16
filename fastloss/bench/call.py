"""One call of one implementation, ready to run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any


class Call(ABC):
    """An implementation with its inputs in the form that it expects, on their device."""

    loss_scale: float = 1.0
    """The factor of the gradient: `fastloss.bench.losses.loss_scale`."""
    own_stream = False
    """Whether it runs on a stream that PyTorch's CUDA events do not time."""

    @abstractmethod
    def forward(self) -> object:
        """Compute the value alone."""

    @abstractmethod
    def forward_backward(self) -> object:
        """Compute value and gradient, as a training loop would."""

    def reset(self) -> None:  # noqa: B027  most leave nothing behind
        """Drop the results of the last call; not timed."""

    @abstractmethod
    def active(self) -> AbstractContextManager[None]:
        """A context around the calls; not timed."""

    @abstractmethod
    def result(self) -> tuple[float, Any]:
        """Value, and gradient times the loss scale.

        The gradient is an array or a tensor, like the case's, in any floating dtype.
        """

    def with_new_gradient(self) -> object:
        """As `forward_backward`, with a newly allocated gradient."""
        return self.forward_backward()
