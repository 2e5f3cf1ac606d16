"""A small 3D U-Net."""

from __future__ import annotations

import torch
from torch import Tensor, nn

DIVISOR = 4
"""The edges of its input must be multiples of this, as they are halved twice."""
SMALLEST_PATCH = 16


def _convolutions(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, after):
        # The normalisation subtracts the mean, and a bias with it.
        layers.append(nn.Conv3d(channels, after, 3, padding=1, bias=False))
        layers.append(nn.BatchNorm3d(after))
        # Smooth: at a kink rounding would change the gradient, and two runs that differ only by
        # rounding would soon diverge.
        layers.append(nn.GELU())
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """(B, 1, D, H, W) to logits (B, classes, D, H, W), over three resolutions."""

    def __init__(self, classes: int, channels: int = 8) -> None:
        super().__init__()
        fine, middle, coarse = channels, 2 * channels, 4 * channels
        self.down_fine = _convolutions(1, fine)
        self.down_middle = _convolutions(fine, middle)
        self.bottom = _convolutions(middle, coarse)
        self.to_middle = nn.ConvTranspose3d(coarse, middle, 2, stride=2)
        self.up_middle = _convolutions(2 * middle, middle)
        self.to_fine = nn.ConvTranspose3d(middle, fine, 2, stride=2)
        self.up_fine = _convolutions(2 * fine, fine)
        self.head = nn.Conv3d(fine, classes, 1)
        self.halve = nn.MaxPool3d(2)

    def forward(self, image: Tensor) -> Tensor:
        fine = self.down_fine(image)
        middle = self.down_middle(self.halve(fine))
        coarse = self.bottom(self.halve(middle))
        middle = self.up_middle(torch.cat([middle, self.to_middle(coarse)], dim=1))
        fine = self.up_fine(torch.cat([fine, self.to_fine(middle)], dim=1))
        return self.head(fine)
