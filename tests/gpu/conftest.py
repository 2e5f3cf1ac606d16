"""Every test here needs a GPU, and says so where there is none."""

from __future__ import annotations

import os

import pytest
from gpu_support import need_gpu

# JAX would take most of the memory on its first use.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@pytest.fixture(autouse=True)
def _gpu() -> None:
    need_gpu()
