"""Arguments that MONAI has renamed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any


def renamed(**names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A method whose arguments are taken by these older names as well, with a FutureWarning."""

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(self: Any, *arguments: Any, **named: Any) -> Any:
            for old, new in names.items():
                if old in named:
                    warnings.warn(
                        f"{old}: MONAI 1.5 renamed this argument, and 1.8 is to remove the name; "
                        f"use {new}",
                        FutureWarning,
                        stacklevel=2,
                    )
                    named.setdefault(new, named.pop(old))
            return method(self, *arguments, **named)

        return call

    return decorate
