"""The machine and the versions of a measurement."""

from __future__ import annotations

import os
import platform
import subprocess
import warnings
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
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
    """The available memory in bytes, where the system reports it."""
    try:
        with open("/proc/meminfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("MemAvailable"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def threads() -> int:
    """The number of threads of the measurements: that of the default backend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a missing faster backend is reported elsewhere
        backend = current_backend()
    # The reference has one thread, which would slow down the others needlessly.
    return cores() if backend.name == "reference" else backend.get_num_threads()


def instruction_sets() -> tuple[str, tuple[str, ...]]:
    """The instruction set that the C++ backend chose, and those it supports; empty without it."""
    try:
        backend: Any = load_backend("cpu")
    except ImportError:
        return "", ()
    return str(getattr(backend, "isa", "")), tuple(getattr(backend, "isas", ()))


def machine(device: Any = None) -> dict[str, Any]:
    """Processor, cores, threads, instruction set and versions, ready for JSON.

    Args:
        device: a torch.device; for a GPU, its name and driver are included.
    """
    made: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": processor(),
        "cores": cores(),
        "threads": threads(),
        "instruction_set": instruction_sets()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "fastloss": fastloss.__version__,
        "packages": {name: _version(name) for name in _PACKAGES},
    }
    if device is not None and device.type == "cuda":
        made |= _gpu(device, made["packages"])
    return made


def _gpu(device: Any, packages: dict[str, str | None]) -> dict[str, Any]:
    import torch

    packages |= {"cuda": torch.version.cuda, "driver": _driver()}
    properties: Any = torch.cuda.get_device_properties(device)
    found = {
        "gpu": torch.cuda.get_device_name(device),
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_cache": getattr(properties, "L2_cache_size", None),
    }
    if find_spec("cupy") is not None:
        import cupy

        packages["cupy"] = cupy.__version__
        found["cupy_cuda_runtime"] = cupy.cuda.runtime.runtimeGetVersion()
    return found


def _driver() -> str | None:
    try:
        result = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = result.stdout.split()
    return found[0] if found and result.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def machine_text(made: dict[str, Any]) -> str:
    """The machine in a line."""
    isa = f", {made['instruction_set']}" if made["instruction_set"] else ""
    text = f"{made['processor']}, {made['cores']} cores, {made['threads']} threads{isa}"
    return f"{made['gpu']}; {text}" if made.get("gpu") else text


def versions_text(made: dict[str, Any], packages: Iterable[str]) -> str:
    """The versions of these packages in a line, if installed."""
    found = {"fastloss": made["fastloss"], "Python": made["python"], "NumPy": made["numpy"]}
    found |= {name: made["packages"].get(name) for name in packages}
    return ", ".join(f"{name} {number}" for name, number in found.items() if number)
