"""The shares of the classes among the neighbours of every voxel."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

_CUT = 4.0  # standard deviations of a Gaussian that are looked at


@torch.no_grad()
def neighbour_shares(
    labels: Tensor, classes: int, *, size: int = 3, sigma: float | None = None
) -> Tensor:
    """The one-hot labels, smoothed: (B, C, *spatial) of float32. Outside the array all are 0.

    Args:
        labels: (B, *spatial) of integers, with 1 to 3 spatial axes; of one that is not in [0, C)
            all classes are 0.
        classes: C.
        size: the edge of the cube whose mean is taken, at least 1.
        sigma: the standard deviation of a Gaussian in place of the cube, above 0.
    """
    labels = labels.long()
    known = (labels >= 0) & (labels < classes)
    shares = torch.zeros((len(labels), classes, *labels.shape[1:]), device=labels.device)
    there = known.to(shares.dtype)[:, None]
    shares.scatter_(1, torch.where(known, labels, 0)[:, None], there)
    if sigma is None:
        kernel = torch.full((size,), 1.0 / size)
    else:
        tail = int(max(sigma * _CUT, 0.5) + 0.5)
        x = torch.arange(-tail, tail + 1, dtype=torch.float32)
        ends = [torch.erf((x + end) / (sigma * math.sqrt(2))) for end in (0.5, -0.5)]
        kernel = (0.5 * (ends[0] - ends[1])).clamp(min=0)  # of the voxel, not at its centre
    kernel = kernel.to(shares.device)
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[shares.ndim - 3]
    for axis in range(2, shares.ndim):  # both are products over the axes
        shape = [1] * shares.ndim
        shape[axis] = len(kernel)
        flat = shares.reshape(-1, 1, *shares.shape[2:])
        around = [0, 0] * (shares.ndim - 1 - axis) + [(len(kernel) - 1) // 2, len(kernel) // 2]
        flat = functional.pad(flat, around)
        shares = convolve(flat, kernel.reshape(shape)).reshape(shares.shape)
    return shares
