"""Distillation: the divergence between two sets of logits as one function call."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import numpy as np

from fastloss.loss import Loss
from fastloss.options import check_choice, check_number
from fastloss.terms import KLDivergence


def distillation_loss(
    student_logits: Any, teacher_logits: Any, voxel_weight: Any = None, *,
    temperature: float = 1.0, reduction: str = "mean", activation: str = "softmax",
) -> Any:  # fmt: skip
    """T² Σ_c g_c log(g_c / p_c) of every voxel, p and g being softmax of the student's and the
    teacher's logits over T.

    `fastloss.KLDivergence` of two sets of logits. Of neither are all probabilities held at once,
    but those of some planes of a volume; beside the gradient no memory is taken. PyTorch's
    autograd differentiates it by the student's logits, once; the teacher's are constants. Of NumPy
    arrays it is the value alone.

    Args:
        student_logits, teacher_logits: (B, C, *spatial) of floating numbers, with a spatial axis.
        voxel_weight: None, or (B, *spatial) or (B, 1, *spatial), non-negative.
        temperature: T, above 0.
        reduction: "mean" over voxels, or the sum of their weights, with sigmoid over channels too;
            or "sum".
        activation: "softmax", or "sigmoid": of the two outcomes of every channel.

    Raises:
        ValueError, TypeError: an option out of its range, arrays that do not fit each other or are
            of another framework, or a teacher that requires a gradient.
        RuntimeError: it is being compiled or traced.

    Source: Hinton et al. 2015, "Distilling the knowledge in a neural network".

    >>> import numpy as np, fastloss as fl
    >>> student, teacher = np.zeros((1, 2, 1)), np.log([[[9.0], [1.0]]])
    >>> print(round(float(fl.distillation_loss(student, teacher, temperature=2)), 3))
    0.523
    """
    by = check_number("temperature", temperature)
    if by == 0:
        raise ValueError("temperature: expected a number above 0, got 0")
    mean = check_choice("reduction", reduction, ("mean", "sum")) == "mean"
    loss = _divergence(check_choice("activation", activation, ("softmax", "sigmoid")))
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(student_logits, torch.Tensor):
        from fastloss.frameworks.torch.distillation import distilled

        return distilled(loss, student_logits, teacher_logits, voxel_weight, by, mean)
    for name, array in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
            kind = getattr(array, "dtype", type(array).__name__)
            raise TypeError(
                f"{name}: expected floating numbers in tensors of PyTorch or arrays of NumPy, got "
                f"{kind}"
            )
    if student_logits.ndim < 3 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "teacher_logits: expected the shape of the student's, (B, C, *spatial), got "
            f"{teacher_logits.shape} and {student_logits.shape}"
        )
    return _of_arrays(loss, student_logits, teacher_logits, voxel_weight, by, mean)


def _of_arrays(
    loss: Loss, student: np.ndarray, teacher: np.ndarray, weight: Any, by: float, mean: bool
) -> Any:
    """The value of NumPy arrays, plane by plane."""
    batch, classes, *spatial = student.shape
    shape = (batch, *spatial)
    w = np.ones(shape, np.float32) if weight is None else np.asarray(weight)
    if w.shape not in (shape, (batch, 1, *spatial)):
        raise ValueError(f"voxel_weight: expected {shape} or with one channel, got {w.shape}")
    w = w.reshape(shape)
    softmax = loss.activation == "softmax"
    total = 0.0
    for b, plane in np.ndindex(batch, spatial[0]):
        x, g = (a[b : b + 1, :, plane : plane + 1] / by for a in (student, teacher))
        if softmax:
            g = np.exp(g - g.max(axis=1, keepdims=True))
            g /= g.sum(axis=1, keepdims=True)
        else:
            g = 1 / (1 + np.exp(-g))
        total += float(loss(x, g, w[b : b + 1, plane : plane + 1]))
    if mean:
        count = float(w.sum(dtype=np.float64)) * (1 if softmax else classes)
        total = total / count if count else 0.0
    return np.promote_types(student.dtype, np.float32).type(total * by**2)


@lru_cache(maxsize=2)
def _divergence(activation: str) -> Loss:
    return Loss(KLDivergence(reduction="sum"), activation=activation)
