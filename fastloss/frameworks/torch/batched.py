"""Gradients for a batch of upstream gradients: `torch.autograd.grad(is_grads_batched=True)`.

PyTorch hands such a batch over as one tensor that hides its batch axis. Its dispatcher can take it
apart and stack the results: it calls the kernel of an operator without a batching rule once for
each.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor

from fastloss.frameworks.torch.tensors import no_second_derivative

Function = Callable[[Tensor], Tensor]

_numbers = count()
_functions: dict[int, Function] = {}
_library = torch.library.Library("fastloss_batched", "DEF")
_library.define("each(Tensor upstream, Tensor like, int function) -> Tensor")


def each(function: Function, upstream: Tensor, like: Tensor) -> Tensor:
    """The function of every upstream gradient, each a new tensor like ``like``.

    A second derivative, by the upstream gradient or by ``like``, raises RuntimeError.
    """
    number = next(_numbers)
    _functions[number] = function
    try:
        result: Tensor = torch.ops.fastloss_batched.each(upstream, like, number)
        return result
    finally:
        del _functions[number]


@torch.library.impl(_library, "each", "CompositeExplicitAutograd")
def _each(upstream: Tensor, like: Tensor, function: int) -> Tensor:
    return _functions[function](upstream)


def _each_of_vmap(
    info: Any, in_dims: tuple[int | None, ...], upstream: Tensor, like: Tensor, function: int
) -> tuple[Tensor, int]:
    """For `torch.func.vmap`, which warns of operators without a rule."""
    upstreams = upstream.movedim(in_dims[0] or 0, 0).unbind()
    call = torch.ops.fastloss_batched.each
    return torch.stack([call(u, like, function) for u in upstreams]), 0


def _save_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


torch.library.register_autograd(
    "fastloss_batched::each", no_second_derivative, setup_context=_save_nothing, lib=_library
)
if hasattr(torch.library, "register_vmap"):  # older versions fall back, and say so
    torch.library.register_vmap("fastloss_batched::each", _each_of_vmap, lib=_library)
