"""What the numbers were measured on and with."""

from __future__ import annotations

import os
import platform
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

import fastloss
from fastloss.backends import current_backend, load_backend

_PACKAGES = (
    "torch",
    "triton",
    "monai",
    "nnunetv2",
    "jax",
    "jaxlib",
    "numba",
    "ml_dtypes",
    "nilearn",
    "nibabel",
)


def processor() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int | None:
    """The bytes that processes can still take, where the system tells."""
    try:
        with open("/proc/meminfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("MemAvailable"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def threads() -> int:
    """The threads that everything is measured on: those of the default backend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a faster backend is missing is said elsewhere
        backend = current_backend()
    # The reference has one thread, which would slow down the others for no reason.
    return cores() if backend.name == "reference" else backend.get_num_threads()


def instruction_sets() -> tuple[str, tuple[str, ...]]:
    """The instruction set that the C++ backend chose, and those it has; empty without it."""
    try:
        backend: Any = load_backend("cpu")
    except ImportError:
        return "", ()
    return str(getattr(backend, "isa", "")), tuple(getattr(backend, "isas", ()))


def machine() -> dict[str, Any]:
    """Processor, cores, threads, instruction set and versions, ready for JSON."""
    packages: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "processor": processor(),
        "cores": cores(),
        "threads": threads(),
        "instruction_set": instruction_sets()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "fastloss": fastloss.__version__,
        "packages": packages,
    }
