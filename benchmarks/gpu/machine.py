"""The device, and the versions of what runs on it."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

import fastloss
from fastloss.bench.machine import cores, instruction_sets, processor, threads

_PACKAGES = ("torch", "triton", "monai", "nnunetv2", "numba", "jax")


def describe(device: torch.device) -> dict[str, Any]:
    """Ready for JSON; None for what is not there."""
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "driver": _driver(device),
        "cuda": torch.version.cuda,
        "fastloss": fastloss.__version__,
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "processor": processor(),
        "cores": cores(),
        "threads": threads(),
        "instruction_set": instruction_sets()[0],
        "packages": {name: _version(name) for name in _PACKAGES},
        "cupy": None,
    }
    if device.type == "cuda":
        found["gpu"] = found["device"]
        properties = torch.cuda.get_device_properties(device)
        found["memory"] = properties.total_memory
        found["multiprocessors"] = properties.multi_processor_count
        found["l2_cache"] = getattr(properties, "L2_cache_size", None)
        if find_spec("cupy") is not None:
            import cupy

            found["cupy"] = cupy.__version__
            found["cupy_cuda_runtime"] = cupy.cuda.runtime.runtimeGetVersion()
    return found


def _driver(device: torch.device) -> str | None:
    if device.type == "cpu":
        return None
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
    return (result.stdout.split() or [None])[0] if result.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
