"""Marks and questions for `torch.compile` that need no import of torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def torch_compiles() -> bool:
    """Whether `torch.compile` or `torch.export` is at work, without an import of torch."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_compiling()


def torch_traces() -> bool:
    """Whether `torch.compile` reads this function, rather than that it runs."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_dynamo_compiling()


def fixed(number: float) -> float:
    """The number, which `torch.compile` then takes for a constant rather than for a variable."""
    return float.fromhex(float(number).hex())


def constant(function: _Function) -> _Function:
    """Mark a function whose result depends on its arguments alone.

    `torch.compile` then takes the result as it is instead of tracing into the function. It is
    `torch.compiler.assume_constant_result` without an import of torch.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
