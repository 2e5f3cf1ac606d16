"""The implementations that are measured, and their calls."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np

import fastloss as fl
from fastloss.backends import BACKENDS, REMEDIES, load_backend
from fastloss.bench.call import Call
from fastloss.bench.errors import Unavailable
from fastloss.bench.inputs import Case
from fastloss.bench.losses import loss_scale, make_loss

PEERS = ("monai", "monai-compile", "nnunet", "nnunet-compile", "jax")

FRAMEWORKS = ("torch",)
"""The library under the automatic differentiation of a framework."""

TITLES = {
    "cpu": "fastloss (C++)",
    "numba": "fastloss (Numba)",
    "reference": "fastloss (reference)",
    "torch": "fastloss in PyTorch",
    "torch-out": "fastloss in PyTorch, out=",
    "torch-compile": "fastloss in PyTorch, compiled",
    "monai": "MONAI",
    "monai-compile": "MONAI, compiled",
    "nnunet": "nnU-Net",
    "nnunet-compile": "nnU-Net, compiled",
    "jax": "JAX, jit",
}


class FastlossCall(Call):
    """This library, writing the gradient into a reused buffer."""

    def __init__(self, backend: str, case: Case, loss: str) -> None:
        self.backend, self.loss = backend, make_loss(loss)
        self.logits, self.target = case.logits, case.target
        self.out = np.empty_like(case.logits)
        self.loss_scale = loss_scale(case.dtype)
        self.upstream = None if self.loss_scale == 1 else self.loss_scale

    def forward(self) -> object:
        return self.loss(self.logits, self.target)

    def forward_backward(self) -> object:
        return self._value_and_grad(self.out)

    def active(self) -> AbstractContextManager[None]:
        return fl.use_backend(self.backend)

    def result(self) -> tuple[float, np.ndarray]:
        with self.active():
            value, gradient = self._value_and_grad(self.out)
        return float(value), gradient

    def with_new_gradient(self) -> object:
        # Freed before the new one is allocated, or both would count.
        self.out = np.empty(0)
        return self._value_and_grad(None)

    def _value_and_grad(self, out: np.ndarray | None) -> tuple[Any, np.ndarray]:
        return self.loss.value_and_grad(self.logits, self.target, out=out, upstream=self.upstream)


def make_call(name: str, case: Case, loss: str, threads: int) -> Call:
    """The call of a backend or peer by name.

    Raises:
        Unavailable: it is not installed, cannot run here, or lacks this loss.
    """
    if name in BACKENDS:
        try:
            load_backend(name)
        except ImportError as error:
            raise Unavailable(backend_remedy(name, error)) from None
        return FastlossCall(name, case, loss)
    if name == "jax":
        from fastloss.bench.jax_peer import JaxCall

        return JaxCall(case, loss, threads)
    from fastloss.bench.torch_peers import TorchCall

    return TorchCall(name, case, loss, threads)


def backend_remedy(name: str, error: ImportError) -> str:
    """Why a backend is missing, and how to get it."""
    return f"{error}; {REMEDIES[name]}" if name in REMEDIES else str(error)


def backends_that_run() -> list[str]:
    """The names of the backends that can be loaded, fastest first."""
    found = []
    for name in BACKENDS:
        try:
            load_backend(name)
        except ImportError:
            continue
        found.append(name)
    return found
