"""One call of one implementation, ready to run."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any


class Call:
    """An implementation with its inputs in the form that it wants them, on their device."""

    def forward(self) -> object:
        """Compute the value alone."""
        raise NotImplementedError

    def forward_backward(self) -> object:
        """Compute value and gradient, as a training loop would."""
        raise NotImplementedError

    def reset(self) -> None:
        """Drop what the last call left behind; not timed."""

    def active(self) -> AbstractContextManager[None]:
        """Surrounds the calls; not timed."""
        raise NotImplementedError

    def result(self) -> tuple[float, Any]:
        """Value and gradient: an array or a tensor as the case has, in any floating dtype."""
        raise NotImplementedError

    def with_new_gradient(self) -> object:
        """As `forward_backward`, where the gradient is a new array."""
        return self.forward_backward()
