"""MONAI's Dice + cross-entropy, as `organs.py` calls losses, for its time and memory."""

from __future__ import annotations

from typing import Any

from monai.losses import DiceCELoss


class DiceCE:
    """That of the batch, without the background in the Dice."""

    def __init__(self) -> None:
        self.loss = DiceCELoss(to_onehot_y=True, softmax=True, batch=True, include_background=False)

    def __call__(self, logits: Any, labels: Any) -> Any:
        return self.loss(logits, labels[:, None])
