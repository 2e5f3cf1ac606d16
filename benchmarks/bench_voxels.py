"""How does the time grow with the number of voxels? Four classes."""

from __future__ import annotations

import pytest
from conftest import BACKEND, case_of


@pytest.mark.parametrize("size", [16, 32, 64, 96, 128, 160])
def test_voxels(size, prepare, timed):
    case = case_of(size, 4)
    timed(prepare(BACKEND, case), case, rounds=9 if size > 64 else 25)
