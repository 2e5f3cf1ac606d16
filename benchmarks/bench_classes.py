"""How does the time grow with the number of classes? The number of logits is about the same."""

from __future__ import annotations

import pytest
from conftest import BACKEND, case_of


@pytest.mark.parametrize(
    ("classes", "size"), [(2, 128), (4, 96), (8, 80), (14, 64), (32, 48), (105, 32), (512, 20)]
)
def test_classes(classes, size, prepare, timed):
    case = case_of(size, classes)
    timed(prepare(BACKEND, case), case, rounds=9)
