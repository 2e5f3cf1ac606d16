"""The library against its peers: Dice + cross-entropy, value and gradient."""

from __future__ import annotations

import pytest
from conftest import BACKEND, case_of

from fastloss.bench.implementations import FRAMEWORKS, PEERS
from fastloss.bench.inputs import SIZES


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [BACKEND, *FRAMEWORKS, *PEERS])
def test_peers(size, name, prepare, timed):
    batch, classes, edge = SIZES[size]
    case = case_of(edge, classes, batch)
    timed(prepare(name, case), case, rounds=3 if name in PEERS else 7)
