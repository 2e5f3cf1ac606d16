"""The record of one training, without PyTorch, so that reading it does not import PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class History:
    """The record of training with one implementation."""

    implementation: str
    loss_name: str
    """Which loss: "dice_ce" or "dice_ce_boundary"."""
    dtype: str
    """The dtype of the network and its logits."""
    loss: list[float] = field(default_factory=list)
    """The loss at each step."""
    seconds: list[float] = field(default_factory=list)
    """The seconds of each step."""
    held_out: dict[int, dict[str, float]] = field(default_factory=dict)
    """By step: the Dice of each tissue in the held-out slab."""
    hd95: dict[int, dict[str, float]] = field(default_factory=dict)
    """The same for the 95th percentile of the distances between surfaces, in mm."""
    nsd: dict[int, dict[str, float]] = field(default_factory=dict)
    """The same for the normalised surface Dice."""
    evaluation_seconds: list[float] = field(default_factory=list)
    """The seconds of each evaluation, without the prediction."""
    slices: list[np.ndarray] = field(default_factory=list)
    """The predicted labels in the planes of `planes`."""
    loss_seconds: float = 0.0
    """The seconds of forward and backward of the loss alone, on the last step's logits."""
    step_memory: int | None = None
    """The peak memory of forward and backward of a step in bytes, over that before it."""
    loss_memory: int | None = None
    """The same for the loss alone, including its gradient by the logits."""

    @property
    def measured(self) -> tuple[dict[int, dict[str, float]], ...]:
        """Dice, HD95 and NSD."""
        return self.held_out, self.hd95, self.nsd
