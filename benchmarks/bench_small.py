"""What does a small call cost, where the overhead shows? Two classes."""

from __future__ import annotations

import pytest
from conftest import BACKEND, case_of


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("gradient", [False, True], ids=["value", "gradient"])
def test_small(size, gradient, prepare, timed):
    case = case_of(size, 2)
    iterations = 3 if BACKEND == "reference" else 50
    timed(prepare(BACKEND, case), case, gradient=gradient, rounds=20, iterations=iterations)
