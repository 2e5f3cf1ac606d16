"""Selects the largest losses on a GPU, without synchronisation."""

from __future__ import annotations

import numpy as np

from fastloss.backends.cuda.engine import Device
from fastloss.backends.cuda.source import source

# Mirrors `struct TopKCall` in csrc/cuda/top_k.cu.
TOP_K_CALL = np.dtype(
    [
        ("losses", np.int64),
        ("mean", np.int64),
        ("found", np.int64),
        ("histogram", np.int64),
        ("partial", np.int64),
        ("count", np.int64),
        ("chunk", np.int64),
        ("kept", np.int64),
        ("is_double", np.int32),
        ("blocks", np.int32),
        ("round", np.int32),
    ],
    align=True,
)
_RECORD = np.dtype(("V", TOP_K_CALL.itemsize))
KERNELS = tuple(f"fastloss_top_k_{name}" for name in ("begin", "count", "choose", "share", "mean"))
_DIGITS, _THREADS, _BLOCKS = 256, 256, 1024


def keep_largest(
    device: Device, losses: int, count: int, dtype: np.dtype, percent: float, mean: int
) -> None:
    """As `fastloss.TopKCrossEntropy.choose`, for losses at an address.

    The losses become shares in the mean of the largest ``percent``, which is written to the address
    ``mean`` as float64.
    """
    if not count:
        return
    rounds = dtype.itemsize
    blocks = min(_BLOCKS, -(-count // _THREADS))
    chunk = -(-count // (blocks * _THREADS)) * _THREADS
    blocks = -(-count // chunk)
    scratch = device.empty(8 * (2 + rounds * _DIGITS + blocks))
    call = np.zeros(1, TOP_K_CALL)
    call["losses"], call["mean"], call["found"] = losses, mean, scratch.address
    call["histogram"] = scratch.address + 16
    call["partial"] = scratch.address + 8 * (2 + rounds * _DIGITS)
    call["count"], call["chunk"], call["blocks"] = count, chunk, blocks
    call["kept"] = max(1, int(count * percent / 100))
    call["is_double"] = dtype.itemsize == 8
    begin, histogram, choose, share, average = device.kernels(source("top_k.cu"), KERNELS)
    record = call.view(_RECORD)
    device.launch(begin, rounds, (_DIGITS, 1), 0, record)
    for number in range(rounds):
        call["round"] = number
        record = call.copy().view(_RECORD)
        device.launch(histogram, blocks, (_THREADS, 1), 0, record)
        device.launch(choose, 1, (1, 1), 0, record)
    device.launch(share, blocks, (_THREADS, 1), 0, record)
    device.launch(average, 1, (32, 1), 0, record)
