"""The divergence between two sets of logits, slab by slab: none is turned into probabilities whole.

Each pass makes the teacher's probabilities of a slab of voxels anew, so that nothing of the size of
the logits is held but the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastloss.frameworks.torch.tensors import is_traced, refuse_gradient

_LOGITS = 1 << 20  # of a slab
_LOGITS_ON_GPU = 1 << 24


def distilled(
    loss: Any,
    student: Tensor,
    teacher: Any,
    voxel_weight: Any,
    temperature: float,
    mean: bool,
) -> Tensor:
    """The value of ``loss``, a sum over voxels, times T², of softened logits.

    ``mean``: divided by the number of voxels, or the sum of their weights.

    Raises:
        TypeError, ValueError: tensors that do not fit.
    """
    if not isinstance(teacher, Tensor):
        raise TypeError(f"teacher_logits: expected a tensor, got {type(teacher).__name__}")
    if is_traced(student):
        raise RuntimeError("student_logits: distillation_loss cannot be compiled or traced")
    refuse_gradient(teacher, "teacher_logits")
    if not (student.is_floating_point() and teacher.is_floating_point()):
        raise TypeError(
            f"logits: expected floating numbers, got {student.dtype} and {teacher.dtype}"
        )
    if student.ndim < 3 or student.shape != teacher.shape:
        raise ValueError(
            "teacher_logits: expected the shape of the student's, (B, C, *spatial), got "
            f"{tuple(teacher.shape)} and {tuple(student.shape)}"
        )
    shape = (len(student), *student.shape[2:])
    if voxel_weight is not None:
        voxel_weight = torch.as_tensor(voxel_weight, device=student.device)
        refuse_gradient(voxel_weight, "voxel_weight")
        if voxel_weight.ndim == student.ndim and voxel_weight.shape[1] == 1:
            voxel_weight = voxel_weight[:, 0]
        if tuple(voxel_weight.shape) != shape:
            raise ValueError(
                f"voxel_weight: expected {shape} or with one channel, got "
                f"{tuple(voxel_weight.shape)}"
            )
    value: Tensor = _Distilled.apply(student, teacher, voxel_weight, loss, temperature, mean)
    return value


def _places(shape: torch.Size, limit: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slabs of a sample, along its first spatial axis, of about ``limit`` logits each."""
    planes = shape[2]
    step = max(1, limit * planes // max(1, shape[1:].numel()))
    for b in range(shape[0]):
        for start in range(0, planes, step):
            yield slice(b, b + 1), slice(None), slice(start, start + step)


class _Distilled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        voxel_weight: Tensor | None,
        loss: Any,
        temperature: float,
        mean: bool,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        for _, x, g, w in _slabs(student, teacher, voxel_weight, loss, temperature):
            total += loss(x, g, w)
        scale = torch.full_like(total, temperature**2)
        if mean:
            voxels = student.numel() // max(1, student.shape[1])
            count = torch.full_like(total, voxels)
            if voxel_weight is not None:
                count = voxel_weight.sum(dtype=torch.float64)
            if loss.activation == "sigmoid":
                count = count * student.shape[1]
            scale = torch.where(count > 0, scale / count, 0.0)  # the mean over no voxel is 0
        ctx.save_for_backward(student, teacher, voxel_weight)
        ctx.loss, ctx.temperature, ctx.scale = loss, temperature, scale
        return (total * scale).to(torch.promote_types(student.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        student, teacher, voxel_weight = ctx.saved_tensors
        loss, temperature = ctx.loss, ctx.temperature
        gradient = torch.empty_like(student)
        factor = upstream * ctx.scale / temperature
        for place, x, g, w in _slabs(student, teacher, voxel_weight, loss, temperature):
            wide = torch.promote_types(x.dtype, torch.float32)  # before it is scaled
            gradient[place] = loss.gradient(x.to(wide), g, w) * factor
        return gradient, None, None, None, None, None


def _slabs(
    student: Tensor, teacher: Tensor, voxel_weight: Tensor | None, loss: Any, by: float
) -> Iterator[tuple[Any, Tensor, Tensor, Tensor | None]]:
    """Each slab: its place, the student's logits over T, the teacher's probabilities, weights."""
    for place in _places(student.shape, _LOGITS if student.is_cpu else _LOGITS_ON_GPU):
        x, g = student[place], teacher[place]
        g = g.to(torch.promote_types(g.dtype, torch.float32)) / by
        g = g.softmax(1) if loss.activation == "softmax" else g.sigmoid()
        if by != 1:
            x = x.to(torch.promote_types(x.dtype, torch.float32)) / by
        w = None if voxel_weight is None else voxel_weight[place[0], place[2]]
        yield place, x, g, w
