"""More than 2³¹ logits. Runs with FASTLOSS_TEST_LARGE=1, as it takes gigabytes and minutes."""

from __future__ import annotations

import os

import numpy as np
import pytest
from support import example, norm, reference

import fastloss as fl

pytestmark = pytest.mark.skipif(
    os.environ.get("FASTLOSS_TEST_LARGE") != "1", reason="FASTLOSS_TEST_LARGE is not 1"
)
ROWS, ROW = 65_537, 4096  # with 8 classes, 8 rows more than 2³¹ logits
CLASSES = 8
LOSS = fl.Loss(fl.Dice(smooth_nr=0, smooth_dr=0), fl.CrossEntropy(), fl.Focal())


def test_value_over_repeated_rows(fast_backend: str) -> None:
    """A row of voxels, broadcast by a stride of 0, has that row's value."""
    row, labels = example(1, CLASSES, (1, ROW), dtype=np.float16)
    x = np.broadcast_to(row, (1, CLASSES, ROWS, ROW))
    y = np.broadcast_to(labels.astype(np.uint8), (1, ROWS, ROW))
    assert x.size > 2**31
    assert float(LOSS(x, y)) == pytest.approx(float(reference(LOSS, row, labels)[0]), rel=1e-6)


def test_gradient_in_memory(fast_backend: str) -> None:
    """The gradient overwrites 4.3 GB of float16 logits, and reaches every part of them."""
    row, labels = example(1, CLASSES, (1, ROW), dtype=np.float16)
    x = np.empty((1, CLASSES, ROWS, ROW), np.float16)
    x[...] = row
    y = np.broadcast_to(labels.astype(np.uint8), (1, ROWS, ROW))
    expected, gradient = reference(LOSS, row, labels)
    value, out = LOSS.value_and_grad(x, y, out=x, upstream=float(ROWS))
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    for at in (0, 1, ROWS // 2, ROWS - 2, ROWS - 1):
        part = out[:, :, at : at + 1].astype(np.float64)
        assert norm(part - gradient) <= 2e-3 * norm(gradient)


def test_a_bad_label_at_the_far_end(fast_backend: str) -> None:
    row, _ = example(1, CLASSES, (1, ROW), dtype=np.float16)
    x = np.broadcast_to(row, (1, CLASSES, ROWS, ROW))
    y = np.zeros((1, ROWS, ROW), np.uint8)
    y[0, -1, -1] = 9
    with pytest.raises(ValueError, match="1 label is not; the first is 9"):
        LOSS(x, y)
