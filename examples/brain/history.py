"""What is kept of one training. Without PyTorch, so that its reader does not need to load it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class History:
    """What was seen while one implementation trained."""

    implementation: str
    dtype: str
    """Of the network and its logits."""
    loss: list[float] = field(default_factory=list)
    """At each step."""
    seconds: list[float] = field(default_factory=list)
    """Of each step."""
    held_out: dict[int, dict[str, float]] = field(default_factory=dict)
    """By step: the Dice of each tissue in the held-out slab."""
    slices: list[np.ndarray] = field(default_factory=list)
    """The labels predicted in the planes of `planes`."""
    loss_seconds: float = 0.0
    """Forward and backward of the loss alone, on the last step's logits."""
    step_memory: int | None = None
    """Bytes that forward and backward of a step take at most, over those before it."""
    loss_memory: int | None = None
    """The same for the loss alone, its gradient by the logits among them."""
