"""Numba's kernels cached on disk by several processes work together."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import need_backend, run_python

SCRIPT = """
import numpy as np, fastloss as fl
rng = np.random.default_rng(0)
x, y = rng.normal(size=(1, 3, 50)), np.eye(3)[rng.integers(0, 3, (1, 50))].swapaxes(1, 2).copy()
loss = fl.Focal() + fl.Brier()
"""
VALUE = "with fl.use_backend('numba'): loss(x, y)"
GRADIENT = """
with fl.use_backend("numba"): gradient = loss.gradient(x, y)
with fl.use_backend("reference"): expected = loss.gradient(x, y)
np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-12)
"""


@pytest.mark.slow
def test_kernels_that_different_processes_compiled_agree(tmp_path: Path) -> None:
    """One process validates, another trains, and a third loads the kernels that both compiled."""
    need_backend("numba")
    for step in (VALUE, GRADIENT, GRADIENT):
        run_python(SCRIPT + step, NUMBA_CACHE_DIR=str(tmp_path))
