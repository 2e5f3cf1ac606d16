"""Tests that need a GPU; without one they are skipped with a message."""

from __future__ import annotations

import os

import pytest
from gpu_support import need_gpu

# By default JAX allocates most of the memory on first use.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@pytest.fixture(autouse=True)
def _gpu() -> None:
    need_gpu()
