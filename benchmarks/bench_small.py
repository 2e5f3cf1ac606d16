"""What is the overhead of a small call? Two classes."""

from __future__ import annotations

import pytest
from conftest import BACKEND, case_of

from fastloss.bench.implementations import FRAMEWORKS


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("gradient", [False, True], ids=["value", "gradient"])
@pytest.mark.parametrize("name", [BACKEND, *FRAMEWORKS])
def test_small(size, gradient, name, prepare, timed):
    case = case_of(size, 2)
    iterations = 3 if BACKEND == "reference" else 50
    timed(prepare(name, case), case, gradient=gradient, rounds=20, iterations=iterations)
