"""How does the time depend on the layout: contiguous or channels-last, label maps or dense?"""

from __future__ import annotations

import pytest
from conftest import BACKEND, case_of

from fastloss.bench.inputs import channels_last, dense, with_label_dtype


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("classes", [4, 14])
def test_logits(layout, classes, prepare, timed):
    case = case_of(80, classes)
    if layout == "channels_last":
        case = channels_last(case)
    timed(prepare(BACKEND, case), case, rounds=9)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "int64", "float32"])
def test_label_map(dtype, prepare, timed):
    case = with_label_dtype(case_of(80, 4), dtype)
    timed(prepare(BACKEND, case), case, rounds=9)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_dense(dtype, prepare, timed):
    """Dense targets are also read twice; the share of the limit excludes their bytes."""
    case = dense(case_of(80, 4), dtype)
    timed(prepare(BACKEND, case), case, rounds=9)
