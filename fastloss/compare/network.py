"""A small 3D U-Net."""

from __future__ import annotations

import torch
from torch import Tensor, nn

DIVISOR = 4
"""Edges of its input are multiples of this, as they are halved twice."""


class UNet(nn.Module):
    """(B, channels, D, H, W) to logits (B, classes, D, H, W), over three resolutions.

    Convolutions with strides halve the volume: pooling has no deterministic derivative on a GPU.
    Samples are normalised by themselves, so that batches may be small.
    """

    def __init__(self, channels: int, classes: int, width: int = 8) -> None:
        super().__init__()
        fine, middle, coarse = width, 2 * width, 4 * width
        self.fine = nn.Sequential(_block(channels, fine), _block(fine, fine))
        self.middle = nn.Sequential(_block(fine, middle, stride=2), _block(middle, middle))
        self.coarse = nn.Sequential(_block(middle, coarse, stride=2), _block(coarse, coarse))
        self.to_middle = nn.ConvTranspose3d(coarse, middle, 2, stride=2)
        self.up_middle = _block(2 * middle, middle)
        self.to_fine = nn.ConvTranspose3d(middle, fine, 2, stride=2)
        self.up_fine = _block(2 * fine, fine)
        self.head = nn.Conv3d(fine, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        fine = self.fine(image)
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        middle = self.up_middle(torch.cat([middle, self.to_middle(coarse)], dim=1))
        fine = self.up_fine(torch.cat([fine, self.to_fine(middle)], dim=1))
        logits: Tensor = self.head(fine)
        return logits


def _block(before: int, after: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        # The normalisation subtracts the mean, and a bias with it.
        nn.Conv3d(before, after, 3, stride=stride, padding=1, bias=False),
        nn.InstanceNorm3d(after, affine=True),
        nn.LeakyReLU(0.01),
    )
