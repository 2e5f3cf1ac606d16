"""What the metrics share: the channels and voxels that count, and clear errors."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
from torch import Tensor


def without_background(y_pred: Any, y: Any, include_background: bool) -> tuple[Any, Any]:
    """Both without channel 0, unless that is their only one."""
    if include_background:
        return y_pred, y
    y_pred, y = (t[:, 1:] if t.shape[1] > 1 else t for t in (y_pred, y))
    return y_pred, y


def check_tensors(y_pred: Any, y: Any) -> None:
    for name, value in (("y_pred", y_pred), ("y", y)):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a PyTorch tensor, got {type(value).__name__}")


def check_axes(y_pred: Tensor, least: int) -> None:
    if y_pred.ndim < least:
        shape = "(batch, channels, *spatial)" if least > 2 else "(batch, channels)"
        raise ValueError(
            f"y_pred: expected at least {least} axes, {shape}, got shape {tuple(y_pred.shape)}"
        )


def check_same_shape(y_pred: Any, y: Any) -> None:
    if y_pred.shape != y.shape:
        raise ValueError(
            f"y: expected the shape of y_pred, {tuple(y_pred.shape)}, got {tuple(y.shape)}"
        )


def plain(tensor: Tensor) -> Tensor:
    """Without gradient, and of no subclass, whose operations take longer."""
    return tensor.detach().as_subclass(Tensor)


def scipy(module: str, why: str) -> Any:
    """A module of SciPy. ImportError: it is not installed."""
    try:
        return importlib.import_module(f"scipy.{module}")
    except ImportError as error:
        raise ImportError(f"{why} needs SciPy: pip install scipy") from error


def deprecated(name: str, instead: str) -> None:
    warnings.warn(f"{name}: deprecated as in MONAI; {instead}", FutureWarning, stacklevel=3)


def nan_like(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, torch.nan)
