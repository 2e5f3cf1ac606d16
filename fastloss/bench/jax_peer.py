"""The textbook formulas under jax.jit."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from fastloss.bench.call import Call
from fastloss.bench.errors import Unavailable
from fastloss.bench.inputs import Case
from fastloss.bench.losses import GAMMA, SMOOTH, TVERSKY_ALPHA, TVERSKY_BETA


class JaxCall(Call):
    """`jax.jit` of the value, and of `jax.value_and_grad`. Tensors are shared by DLPack.

    There is no loss scale, as the formula computes in the dtype of the logits and would overflow.
    """

    own_stream = True

    def __init__(self, case: Case, loss: str, threads: int) -> None:
        self.is_numpy = isinstance(case.logits, np.ndarray)
        cuda = not self.is_numpy and case.logits.is_cuda
        # XLA reads these once, at startup.
        for name in ("NPROC", "PJRT_NPROC"):
            os.environ.setdefault(name, str(threads))
        os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if cuda else "cpu")
        # By default JAX takes three quarters of the GPU's memory, which PyTorch shares.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        try:
            import jax
        except ImportError as error:
            raise Unavailable(
                f"JAX is not there ({error}); pip install 'fastloss[peers]'"
            ) from None
        if case.dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        self.jax = jax

        def function(logits: Any, target: Any) -> Any:
            return _formula(loss, logits, target)

        self.value = jax.jit(function)
        self.value_and_grad = jax.jit(jax.value_and_grad(function))
        if self.is_numpy:
            device = jax.devices("cpu")[0]
            self.logits = jax.device_put(case.logits, device)
            self.target = jax.device_put(case.target.astype(np.int32), device)
        else:
            self.logits, self.target = _shared(jax, case, "cuda" if cuda else "cpu")

    def forward(self) -> object:
        return self.jax.block_until_ready(self.value(self.logits, self.target))

    def forward_backward(self) -> object:
        return self.jax.block_until_ready(self.value_and_grad(self.logits, self.target))

    def active(self) -> AbstractContextManager[None]:
        return nullcontext()

    def result(self) -> tuple[float, Any]:
        value, gradient = self.jax.block_until_ready(self.value_and_grad(self.logits, self.target))
        if self.is_numpy:
            gradient = np.asarray(gradient)
        else:
            import torch

            gradient = torch.from_dlpack(gradient)
        return float(value), gradient


def _shared(jax: Any, case: Case, platform: str) -> tuple[Any, Any]:
    """Logits and labels of a case as JAX arrays, in the same memory."""
    import torch

    try:
        jax.devices(platform)
    except RuntimeError as error:
        raise Unavailable(f"JAX has no {platform} device: {error}") from None
    logits, target = case.logits.detach(), case.target.to(torch.int32)
    if not logits.is_contiguous():
        raise Unavailable("JAX's arrays are contiguous")
    if platform == "cuda":
        torch.cuda.synchronize(logits.device)
    return jax.dlpack.from_dlpack(logits), jax.dlpack.from_dlpack(target)


def _formula(loss: str, logits: Any, target: Any) -> Any:
    import jax
    import jax.numpy as jnp

    log_p = jax.nn.log_softmax(logits, axis=1)
    p = jnp.exp(log_p)
    g = jax.nn.one_hot(target, logits.shape[1], axis=1, dtype=logits.dtype)
    axes = tuple(range(2, logits.ndim))
    overlap = (p * g).sum(axes)
    predicted, reference = p.sum(axes), g.sum(axes)

    if loss == "jaccard":
        union = predicted + reference - overlap
        return (1 - (overlap + SMOOTH) / (union + SMOOTH)).mean()
    if loss == "tversky":
        false_positive, false_negative = predicted - overlap, reference - overlap
        total = overlap + TVERSKY_ALPHA * false_positive + TVERSKY_BETA * false_negative
        return (1 - (overlap + SMOOTH) / (total + SMOOTH)).mean()
    if loss == "generalized_dice":
        weight = jnp.where(reference > 0, 1 / jnp.maximum(reference, 1) ** 2, 0)
        largest = weight.max(axis=1, keepdims=True)
        weight = jnp.where(reference > 0, weight, largest)
        both = (weight * (predicted + reference)).sum(axis=1)
        return (1 - (2 * (weight * overlap).sum(axis=1) + SMOOTH) / (both + SMOOTH)).mean()
    value: Any = 0.0
    if loss in ("dice", "dice_ce", "dice_focal"):
        value += (1 - (2 * overlap + SMOOTH) / (predicted + reference + SMOOTH)).mean()
    if loss in ("cross_entropy", "dice_ce"):
        value -= (g * log_p).sum(axis=1).mean()
    if loss in ("focal", "dice_focal"):
        value -= (g * (1 - p) ** GAMMA * log_p).sum(axis=1).mean()
    return value
