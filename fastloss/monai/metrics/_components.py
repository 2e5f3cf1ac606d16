"""The Dice score of each component of a reference."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fastloss.monai.metrics._options import scipy


def component_dice(y_pred: Tensor, y: Tensor, ignore_empty: bool) -> Tensor:
    """The mean over the components of the reference of one sample, (1,) float32.

    Every voxel belongs to the nearest component. Components are those of SciPy, and so are the
    borders between them, as in MONAI: where two are as near, another way may choose otherwise.

    Args:
        y_pred, y: (1, 2, *spatial), or class indices (1, *spatial).
        ignore_empty: NaN where the reference is empty; if False, 1 if the prediction is empty too,
            and 0 otherwise.

    Raises:
        ImportError: SciPy is not installed.
    """
    if y_pred.ndim == y.ndim:
        y_pred, y = y_pred.to(_wide(y_pred)).argmax(1), y.to(_wide(y)).argmax(1)
    predicted, reference = (t[0].cpu().numpy() > 0 for t in (y_pred, y))
    if reference.any():
        score = float(_of_components(predicted, reference).mean())
    elif ignore_empty:
        score = math.nan
    else:
        score = float(not predicted.any())
    return torch.tensor([score], dtype=torch.float32, device=y.device)


def _of_components(predicted: np.ndarray, reference: np.ndarray) -> np.ndarray:
    ndimage = scipy("ndimage", "per_component")
    touching = np.ones((3,) * reference.ndim)
    components, count = ndimage.label(reference, touching)
    nearest = ndimage.distance_transform_edt(
        components == 0, return_distances=False, return_indices=True
    )
    region = components[tuple(nearest)]
    sizes = [
        np.bincount(region[mask], minlength=count + 1)[1:]
        for mask in (predicted & reference, predicted, reference)
    ]
    scores: np.ndarray = 2 * sizes[0] / (sizes[1] + sizes[2])
    return scores


def _wide(tensor: Tensor) -> torch.dtype:
    """PyTorch finds no largest of bools."""
    return torch.uint8 if tensor.dtype == torch.bool else tensor.dtype
