"""How does the time depend on the dtype of the logits? The limit scales with its size."""

from __future__ import annotations

import pytest
from conftest import BACKEND, case_of

from fastloss.bench.errors import BadArgument
from fastloss.bench.inputs import DTYPES, with_dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gradient", [False, True], ids=["value", "gradient"])
def test_dtype(dtype, gradient, prepare, timed):
    try:
        case = with_dtype(case_of(96, 4), dtype)
    except BadArgument as error:
        pytest.skip(str(error))
    timed(prepare(BACKEND, case), case, gradient=gradient, rounds=9)
