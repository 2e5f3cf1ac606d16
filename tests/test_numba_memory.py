"""The Numba kernels allocate nothing: Numba frees an array while only its address is in use."""

from __future__ import annotations

from support import need, run_python

CODE = """
import itertools
import numpy as np
import fastloss as fl
from fastloss.backends.numba import NumbaBackend
from numba.core.runtime import rtsys

given = 0  # arrays, for each of which Numba allocates a record of its own
run = NumbaBackend._run


def counted(self, call, kernel, *results):
    def call_kernel(*arguments):
        global given
        given += sum(isinstance(a, np.ndarray) for a in arguments)
        kernel(*arguments)

    run(self, call, call_kernel, *results)


NumbaBackend._run = counted
LOSSES = (
    fl.CrossEntropy(),
    fl.Loss(fl.Dice()),
    fl.Dice(squared=True) + fl.CrossEntropy(label_smoothing=0.1),
    fl.Focal(gamma=2) + fl.Focal(gamma=0.5),
)
rng = np.random.default_rng(0)
calls = []
for loss, classes, activation in itertools.product(LOSSES, (2, 5), ("softmax", "sigmoid")):
    loss = fl.Loss(loss, activation=activation)
    x = rng.normal(size=(1, classes, 700)).astype(np.float32)
    labels = rng.integers(0, classes, (1, 700))
    for target in (labels, np.eye(classes, dtype=np.float32)[labels].transpose(0, 2, 1)):
        calls.append((loss, x, target))
        loss.value_and_grad(x, target)
given, before = 0, rtsys.get_allocation_stats()
for loss, x, target in calls:
    loss.value_and_grad(x, target)
after = rtsys.get_allocation_stats()
assert given > 0
print(after.alloc - before.alloc - given)
"""


def test_kernels_allocate_nothing() -> None:
    need("numba")
    assert int(run_python(CODE, timeout=600, NUMBA_NRT_STATS="1", FASTLOSS_BACKEND="numba")) == 0
