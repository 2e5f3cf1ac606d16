"""Selects the largest losses on a GPU, without synchronisation."""

from __future__ import annotations

import numpy as np

from fastloss.backends.cuda.engine import Device, Memory
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
        ("least", np.float64),
        ("is_double", np.int32),
        ("blocks", np.int32),
        ("round", np.int32),
    ],
    align=True,
)
_RECORD = np.dtype(("V", TOP_K_CALL.itemsize))
_NAMES = ("begin", "count", "choose", "share", "mean", "mark")
KERNELS = tuple(f"fastloss_top_k_{name}" for name in _NAMES)
_DIGITS, _THREADS, _BLOCKS = 256, 256, 1024


def keep_largest(
    device: Device, losses: int, count: int, dtype: np.dtype, percent: float, mean: int
) -> None:
    """As `fastloss.TopKCrossEntropy.choose`, for losses at an address.

    The losses become shares in the mean of the largest ``percent``, which is written to the address
    ``mean`` as float64.
    """
    if count:
        kept = max(1, int(count * percent / 100))
        call, _scratch = _chosen(device, losses, count, dtype, kept)
        call["mean"] = mean
        *_, share, average, _ = device.kernels(source("top_k.cu"), KERNELS)
        record = call.view(_RECORD)
        device.launch(share, int(call["blocks"][0]), (_THREADS, 1), 0, record)
        device.launch(average, 1, (32, 1), 0, record)


def keep_above(
    device: Device, losses: int, count: int, dtype: np.dtype, least: float, kept: int
) -> None:
    """Turn losses at an address into 1 or 0: 1 for those above ``least``, and for the ``kept``
    largest with all that equal the last of these."""
    if count:
        call, _scratch = _chosen(device, losses, count, dtype, min(kept, count))
        call["least"] = least
        *_, mark = device.kernels(source("top_k.cu"), KERNELS)
        device.launch(mark, int(call["blocks"][0]), (_THREADS, 1), 0, call.view(_RECORD))


def _chosen(
    device: Device, losses: int, count: int, dtype: np.dtype, kept: int
) -> tuple[np.ndarray, Memory]:
    """The TopKCall, (1,), once the least of the largest losses is found; and its memory."""
    rounds = dtype.itemsize
    blocks = min(_BLOCKS, -(-count // _THREADS))
    chunk = -(-count // (blocks * _THREADS)) * _THREADS
    blocks = -(-count // chunk)
    scratch = device.empty(8 * (2 + rounds * _DIGITS + blocks))
    call = np.zeros(1, TOP_K_CALL)
    call["losses"], call["found"] = losses, scratch.address
    call["histogram"] = scratch.address + 16
    call["partial"] = scratch.address + 8 * (2 + rounds * _DIGITS)
    call["count"], call["chunk"], call["blocks"] = count, chunk, blocks
    call["kept"] = kept
    call["is_double"] = dtype.itemsize == 8
    begin, histogram, choose, *_ = device.kernels(source("top_k.cu"), KERNELS)
    record = call.view(_RECORD)
    device.launch(begin, rounds, (_DIGITS, 1), 0, record)
    for number in range(rounds if kept else 0):
        call["round"] = number
        record = call.copy().view(_RECORD)
        device.launch(histogram, blocks, (_THREADS, 1), 0, record)
        device.launch(choose, 1, (1, 1), 0, record)
    return call, scratch
