"""What Numba keeps on disk is used again only while the kernels are the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any


@cache
def _sources() -> str:
    """A digest of all the files that kernels are made of."""
    digest = blake2b(digest_size=8)
    for path in sorted(Path(__file__).parent.glob("_numba_*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def renamed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under a name that changes with the kernels' files.

    Numba finds what it kept by the name, and by itself looks at the function's own file alone.
    """
    name = function.__qualname__
    if not name.endswith(_sources()):
        function.__qualname__ = f"{name}_{_sources()}"
    return function
