"""Soft skeletons of tensors, as an operator that `torch.compile`, `torch.export` and autograd know.

The kernels compute them where there are any for the tensor; else PyTorch's pooling does. Ordinary
eager calls do without the operator, which costs more than a small skeleton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastloss.backends import current_backend
from fastloss.frameworks.torch.tensors import TENSORS, is_traced, no_second_derivative, plain

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_library = torch.library.Library("fastloss", "FRAGMENT")
_library.define("soft_skeleton(Tensor p, int iterations) -> Tensor")
_library.define("soft_skeleton_gradient(Tensor p, Tensor upstream, int iterations) -> Tensor")


def soft_skeleton(p: Tensor, iterations: int = 3) -> Tensor:
    """The soft skeleton of every sample and channel, by an operator that is differentiable by p.

    Each iteration peels a layer off by erosion, the least of the minima over three neighbours
    along each axis, and adds what an opening of the rest would lose; the maximum of a dilation is
    over 3 neighbours along every axis at once. Where neighbours are equal, the gradient goes where
    that of PyTorch's pooling would.

    Args:
        p: probabilities, (B, C, *spatial), with 1 to 3 spatial axes.
        iterations: at least 0, and about the radius of the thickest structure in voxels.

    Returns:
        Of the shape and dtype of p; in [0, 1] where p is.

    Raises:
        TypeError: p does not hold floating numbers, or iterations is no integer. ValueError:
            another number of axes, or a negative number of iterations.

    Source: Shit et al. 2021, "clDice – A Novel Topology-Preserving Loss Function for Tubular
    Structure Segmentation".
    """
    if p.dtype not in _FLOATS:
        raise TypeError(f"p: expected floating numbers, got {p.dtype}")
    if not 3 <= p.ndim <= 5:
        raise ValueError(
            "p: expected (batch, channels, *spatial) with 1 to 3 spatial axes, got shape "
            f"{tuple(p.shape)}"
        )
    if not isinstance(iterations, int):
        raise TypeError(f"iterations: expected an integer, got {iterations!r}")
    if iterations < 0:
        raise ValueError(f"iterations: expected at least 0, got {iterations}")
    result: Tensor
    if is_traced(p):
        result = torch.ops.fastloss.soft_skeleton(p, iterations)
    elif p.requires_grad and torch.is_grad_enabled():
        result = _SoftSkeleton.apply(plain(p), iterations)
    else:
        result = _skeleton(plain(p), iterations)
    return result


def _skeleton(p: Tensor, iterations: int) -> Tensor:
    return _skeleton_on_cpu(p, iterations) if p.is_cpu else _by_pooling(p, iterations)


def _gradient(p: Tensor, upstream: Tensor, iterations: int) -> Tensor:
    compute = _gradient_on_cpu if p.is_cpu else _gradient_by_pooling
    return compute(p, upstream, iterations)


class _SoftSkeleton(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, iterations: int) -> Tensor:
        ctx.save_for_backward(p)
        ctx.iterations = iterations
        return _skeleton(p, iterations)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        (p,) = ctx.saved_tensors
        return _Gradient.apply(p, upstream, ctx.iterations), None


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, upstream: Tensor, iterations: int) -> Tensor:
        return _gradient(p, upstream, iterations)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        no_second_derivative(ctx, *upstream)


# ------------------------------------------------------------------ by the kernels


def _by_kernels(p: Tensor, iterations: int, upstream: Tensor | None = None) -> Tensor | None:
    """The skeleton or its gradient; None where no kernels are to compute it."""
    backend = current_backend()
    if not backend.skeletonizes:
        return None
    out = torch.empty_like(p)
    borrowed = TENSORS.borrow(p.detach(), "p")
    given = None
    if upstream is not None:
        given = TENSORS.borrow(upstream.detach().to(p.dtype).resolve_neg(), "upstream").array
    to = TENSORS.borrow(out, "out", write=True).array
    backend.soft_skeleton(borrowed.array, borrowed.dtype, to, iterations, given)
    return out


@torch.library.impl(_library, "soft_skeleton", "CPU")
def _skeleton_on_cpu(p: Tensor, iterations: int) -> Tensor:
    found = _by_kernels(p, iterations)
    return _by_pooling(p, iterations) if found is None else found


@torch.library.impl(_library, "soft_skeleton_gradient", "CPU")
def _gradient_on_cpu(p: Tensor, upstream: Tensor, iterations: int) -> Tensor:
    found = _by_kernels(p, iterations, upstream)
    return _gradient_by_pooling(p, upstream, iterations) if found is None else found


# ------------------------------------------------------------------ by pooling


def _parts(*arrays: Tensor) -> list[tuple[Tensor, ...]]:
    """What to compute at once: pooling takes many times the memory of what it pools."""
    count = arrays[0].numel()
    if not count:  # which pooling refuses
        return []
    step = 1 if count >= 1 << 22 else len(arrays[0])
    return list(zip(*(a.split(step) for a in arrays), strict=True))


@torch.library.impl(_library, "soft_skeleton", "CUDA")
def _by_pooling(p: Tensor, iterations: int) -> Tensor:
    out = torch.empty_like(p)
    axes = p.ndim - 2
    for part, to in _parts(p, out):
        x = _working(part)
        s: Any = None
        for _ in range(iterations + 1):
            eroded = _erode(x, axes)
            d = functional.relu(x - _dilate(eroded))
            s = d if s is None else s + functional.relu(d - s * d)
            x = eroded
        to.copy_(s.reshape(part.shape))
    return out


@torch.library.impl(_library, "soft_skeleton_gradient", "CUDA")
def _gradient_by_pooling(p: Tensor, upstream: Tensor, iterations: int) -> Tensor:
    out = torch.empty_like(p)
    for part, given, to in _parts(p, upstream, out):
        gradient = _gradient_of_part(_working(part), _working(given), iterations, p.ndim - 2)
        to.copy_(gradient.reshape(part.shape))
    return out


def _working(x: Tensor) -> Tensor:
    """As pooling takes it: float32 or float64, and of a line an image."""
    x = x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x
    return x.unsqueeze(2) if x.ndim == 3 else x


def _gradient_of_part(p: Tensor, upstream: Tensor, iterations: int, axes: int) -> Tensor:
    # csrc/cpu/soft_skeleton.cpp derives the formulas.
    eroded, slopes, depths = [p], [], []
    s = torch.zeros_like(p)
    for _ in range(iterations + 1):
        x = eroded[-1]
        eroded.append(_erode(x, axes))
        u = x - _dilate(eroded[-1])
        d = functional.relu(u)
        t = d - s * d
        slopes.append((1 - s) * ((t > 0) & (u > 0)))
        depths.append(d * (t > 0))
        s = s + functional.relu(t)
    by_difference = [p] * (iterations + 1)
    for i in range(iterations, -1, -1):
        by_difference[i] = upstream * slopes.pop()
        upstream = upstream - upstream * depths.pop()
    gradient: Tensor | None = None
    for i in range(iterations + 1, -1, -1):
        x = eroded[i]
        below = None if gradient is None else _from_erosion(x, gradient, axes) + by_difference[i]
        above = None if i == 0 else _from_pooling(x, by_difference[i - 1], _block(x))
        if below is None or above is None:
            gradient = -above if below is None and above is not None else below
        else:
            gradient = below - above
    assert gradient is not None
    return gradient


def _block(x: Tensor) -> list[int]:
    """The kernel of a dilation."""
    return [3] * (x.ndim - 2)


def _kernels(x: Tensor, axes: int) -> list[list[int]]:
    """Those of an erosion along the last axes: a line has one, though it is pooled as an image."""
    own = range(x.ndim - 2)
    return [[3 if i == axis else 1 for i in own] for axis in own[-axes:]]


def _pool(x: Tensor, kernel: list[int]) -> Tensor:
    pool = functional.max_pool2d if len(kernel) == 2 else functional.max_pool3d
    return pool(x, kernel, 1, [k // 2 for k in kernel])


def _dilate(x: Tensor) -> Tensor:
    return _pool(x, _block(x))


def _minima(x: Tensor, axes: int) -> list[Tensor]:
    return [-_pool(-x, kernel) for kernel in _kernels(x, axes)]


def _erode(x: Tensor, axes: int) -> Tensor:
    first, *others = _minima(x, axes)
    for other in others:
        first = torch.minimum(first, other)
    return first


def _from_erosion(x: Tensor, upstream: Tensor, axes: int) -> Tensor:
    """The derivative by x, given that by its erosion."""
    first, *others = _minima(x, axes)
    totals = [first]
    for other in others:
        totals.append(torch.minimum(totals[-1], other))
    total: Any = 0.0
    kernels = _kernels(x, axes)
    for axis in range(len(others), 0, -1):
        a, b = totals[axis - 1], others[axis - 1]
        half = upstream / 2 * (a == b)
        # Both mins of min(min(z, y), x) give each side half of what they have where both are equal.
        total = total - _from_pooling(-x, -(upstream * (b < a) + half), kernels[axis])
        upstream = upstream * (a < b) + half
    return total - _from_pooling(-x, -upstream, kernels[0])  # type: ignore[no-any-return]


def _from_pooling(x: Tensor, upstream: Tensor, kernel: list[int]) -> Tensor:
    """The derivative by x, given that by its maxima."""
    two = len(kernel) == 2
    aten = torch.ops.aten
    pool = aten.max_pool2d_with_indices if two else aten.max_pool3d_with_indices
    back = aten.max_pool2d_with_indices_backward if two else aten.max_pool3d_with_indices_backward
    ones, padding = [1] * len(kernel), [k // 2 for k in kernel]
    x, upstream = x.contiguous(), upstream.contiguous()
    indices = pool(x, kernel, ones, padding, ones, False)[1]
    result: Tensor = back(upstream, x, kernel, ones, padding, ones, False, indices)
    return result


# ------------------------------------------------------------------ autograd, and torch.compile


@torch.library.register_fake("fastloss::soft_skeleton", lib=_library)
@torch.library.register_fake("fastloss::soft_skeleton_gradient", lib=_library)
def _fake(p: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(p)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    p, ctx.iterations = inputs
    ctx.save_for_backward(p)


def _backward(ctx: Any, upstream: Tensor) -> Any:
    (p,) = ctx.saved_tensors
    return torch.ops.fastloss.soft_skeleton_gradient(p, upstream, ctx.iterations), None


def _keep_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


torch.library.register_autograd(
    "fastloss::soft_skeleton", _backward, setup_context=_keep, lib=_library
)
torch.library.register_autograd(
    "fastloss::soft_skeleton_gradient",
    no_second_derivative,
    setup_context=_keep_nothing,
    lib=_library,
)
