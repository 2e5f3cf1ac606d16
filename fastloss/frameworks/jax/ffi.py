"""Host functions that programs compiled by JAX call, by XLA's interface.

`jax.pure_callback`, the fallback for versions of JAX without that interface, copies all operands
and results.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from ctypes import c_void_p
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fastloss.frameworks.xla import frame, host

ON_GPU = (
    "logits: a program that JAX compiles for a GPU cannot call fastloss; call the loss outside "
    "jax.jit, where it computes on the GPU (jax.value_and_grad of it, or loss.value_and_grad), "
    "or compile the program for the CPU"
)


@cache
def _version() -> tuple[int, int]:
    """Of the interface that this jaxlib has."""
    text = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text("utf-8")
    major, minor = (
        int(re.findall(rf"^#define XLA_FFI_API_{name} (\d+)$", text, re.MULTILINE)[0])
        for name in ("MAJOR", "MINOR")
    )
    return major, minor


def _refuse(*_: Any) -> None:
    raise NotImplementedError(ON_GPU)


_handlers = (frame.function(_version, host.run), frame.function(_version, _refuse))


@cache
def is_there() -> bool:
    """Whether XLA can call; registers the functions."""
    try:
        ffi = jax.ffi
        if _version()[0] != 0:
            return False
    except (AttributeError, OSError, IndexError):
        return False
    for handler, platform in zip(_handlers, ("cpu", "CUDA"), strict=True):
        pointer = ctypes.cast(handler, c_void_p).value
        ffi.register_ffi_target(frame.NAME, ffi.pycapsule(pointer), platform=platform)
    return True


def call(
    text: str, results: Sequence[Any], operands: Sequence[Any], aliases: Any = None
) -> Sequence[Any]:
    """The results of the host function for these tracers."""
    if is_there():
        function = jax.ffi.ffi_call(
            frame.NAME, list(results), vmap_method="expand_dims", input_output_aliases=aliases
        )
        found: Sequence[Any] = function(*operands, **{frame.ATTRIBUTE: text})
        return found
    encoded = text.encode()

    def callback(*arrays: Any) -> list[np.ndarray]:
        made = [np.empty(r.shape, r.dtype) for r in results]
        host.run(encoded, [np.asarray(a) for a in arrays], made)
        return made

    # Under vmap it is called in a loop, which versions do that have no option for it.
    named = "vmap_method" in signature(jax.pure_callback).parameters
    options: dict[str, Any] = {"vmap_method": "sequential"} if named else {}
    copied: Sequence[Any] = jax.pure_callback(callback, list(results), *operands, **options)
    return copied
