"""The backends: C++, Numba or NumPy; for arrays on a GPU, CUDA."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module

from fastloss.backends.base import Backend

__all__ = [
    "BACKENDS",
    "REMEDIES",
    "Backend",
    "add_backend",
    "chosen_backend",
    "current_backend",
    "limit_threads",
    "load_backend",
    "use_backend",
]

BACKENDS = ("cpu", "numba", "reference")
"""The names of the backends for arrays in CPU memory, fastest first."""

REMEDIES = {
    "cpu": "install a C++ compiler and then fastloss again",
    "numba": "pip install 'fastloss[numba]'",
}
"""How to install a backend that is absent."""

_loaded: dict[str, Backend] = {}
_threads = 0  # set by limit_threads; 0: not set
_chosen: ContextVar[Backend | None] = ContextVar("fastloss_backend", default=None)
_default: list[Backend] = []


def load_backend(name: str) -> Backend:
    """The backend of this name. ValueError: no such name; ImportError: it cannot run here."""
    if name not in _loaded:
        if name not in BACKENDS:
            names = ", ".join(map(repr, BACKENDS))
            raise ValueError(f"backend: expected one of {names}, got {name!r}")
        backend: Backend = import_module(f"fastloss.backends.{name}").BACKEND
        if _threads:
            backend.set_num_threads(_threads)
        _loaded[name] = backend
    return _loaded[name]


def add_backend(backend: Backend) -> None:
    """Register a backend under a name in this process, as tests do."""
    _loaded[backend.name] = backend


def limit_threads(number: int) -> None:
    """Pass a number of threads on to every backend, now or once it is loaded."""
    global _threads
    _threads = number
    for backend in _loaded.values():
        backend.set_num_threads(number)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute with this backend inside the ``with`` block, in this thread.

    Arrays on a GPU are always computed there.

    Args:
        name: "cpu" (C++), "numba" or "reference" (NumPy, float64).

    Raises:
        ValueError: no backend has this name.
        ImportError: it cannot run here; the message says why.
    """
    token = _chosen.set(load_backend(name))
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen_backend() -> str:
    """The name of the backend of `use_backend`; empty without one."""
    chosen = _chosen.get()
    return "" if chosen is None else chosen.name


def current_backend() -> Backend:
    """The backend that `use_backend` or ``FASTLOSS_BACKEND`` chose, or the fastest one.

    The variable is read once, because reading it takes longer than the rest of this function.
    """
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    if not _default:
        name = os.environ.get("FASTLOSS_BACKEND", "")
        _default.append(load_backend(name) if name else _fastest())
    return _default[0]


def _fastest() -> Backend:
    missing = []
    for name in BACKENDS:
        try:
            backend = load_backend(name)
        except ImportError:
            missing.append(name)
            continue
        if missing:
            remedies = "; ".join(f"for {m!r}, {REMEDIES[m]}" for m in missing)
            warnings.warn(
                f"fastloss computes with the slower {name!r} backend: {remedies}", stacklevel=2
            )
        return backend
    raise AssertionError("the reference backend needs NumPy alone")
