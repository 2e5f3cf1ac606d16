"""Dice + cross-entropy by backend: value alone, and value with gradient."""

from __future__ import annotations

import pytest
from conftest import case_of

from fastloss.backends import BACKENDS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", [False, True], ids=["value", "gradient"])
def test_backend(backend, gradient, prepare, timed):
    # The reference takes seconds where the others take milliseconds.
    case = case_of(48 if backend == "reference" else 96, 4)
    rounds = 3 if backend == "reference" else 9
    timed(prepare(backend, case), case, gradient=gradient, rounds=rounds)
