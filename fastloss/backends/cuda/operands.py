"""The numbers of a loss on a GPU: changing them needs neither recompilation nor synchronisation."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastloss.backends.cuda.engine import Device, Memory
from fastloss.backends.cuda.source import source
from fastloss.protocol import FusedLoss

if TYPE_CHECKING:
    from fastloss.borrowed import Place

MOST = 384
"""How many numbers fit the launch arguments: 3 KiB of 4."""
KERNELS = ("fastloss_operand",)
# Mirrors `struct OperandCall` in csrc/cuda/operands.cu.
OPERAND_CALL = np.dtype(
    [
        ("to", np.int64),
        ("from", np.int64),
        ("count", np.int64),
        ("step", np.int32),
        ("is_float", np.int32),
        ("numbers", np.float64, MOST),
    ],
    align=True,
)
_RECORD = np.dtype(("V", OPERAND_CALL.itemsize))

HOST = "host"
Layout = tuple[str | bytes, ...]
"""Where each operand of a loss is: a launch argument (`HOST`); an array on the device, of this
dtype; or, for a term whose numbers cannot change, a constant of the program."""


class Operands(NamedTuple):
    """The numbers of a loss in one call.

    Attributes:
        layout: the cache key of a program, together with the structure of the loss.
        host: the numbers that are launch arguments.
        addresses: the addresses of the arrays on the device.
        kept: objects that must stay alive until the launch is queued.
    """

    layout: Layout
    host: bytes
    addresses: tuple[int, ...]
    kept: Any


def operands_of(loss: FusedLoss, place: Place) -> Operands:
    """The numbers of a loss, and where they are now."""
    layout: list[str | bytes] = []
    host: list[bytes] = []
    addresses: list[int] = []
    kept: list[Any] = []
    numbers = loss.operands
    given = loss.given or (None,) * len(numbers)
    for operand, array, recorded in zip(numbers, given, recorded_of(loss), strict=True):
        if array is None:
            own = operand.tobytes()
            layout.append(HOST if recorded else own)
            host += [own] * recorded
        elif recorded:
            dtype, address, owner = place.operand(array)
            layout.append(dtype)
            addresses.append(address)
            kept.append(owner)
        else:
            layout.append(np.asarray(place.numpy(array), np.float64).tobytes())
    return Operands(tuple(layout), b"".join(host), tuple(addresses), kept)


def recorded_of(loss: FusedLoss) -> list[bool]:
    """Per operand of a loss, whether its formulas accept a recording array."""
    found = [True]
    for _, term in loss.terms:
        kind: Any = type(term)
        recordable = _recordable(kind)
        found += [name in recordable for name in term.described.names]
    return found


@lru_cache(maxsize=1024)
def _recordable(kind: Any) -> tuple[str, ...]:
    names: tuple[str, ...] = kind.recordable()
    return names


def on_device(device: Device, numbers: bytes) -> Memory:
    """Float64 numbers, written to the device."""
    size = len(numbers) // 8
    memory = device.empty(8 * max(size, 1))
    for first in range(0, size, MOST):
        own = np.frombuffer(numbers, np.float64, min(MOST, size - first), 8 * first)
        call = np.zeros(1, OPERAND_CALL)
        call["to"], call["count"], call["step"] = memory.address + 8 * first, own.size, 1
        call["numbers"][0, : own.size] = own
        _launch(device, call)
    return memory


def repeat(
    device: Device, to: int, dtype: str, address: int, count: int, step: int, owner: Any
) -> None:
    """Write float64 numbers from an array on the device; ``step`` 0: always its first one.

    The ``owner`` keeps the array alive until the launch is queued.
    """
    call = np.zeros(1, OPERAND_CALL)
    call["to"], call["from"], call["count"], call["step"] = to, address, count, step
    call["is_float"] = dtype == "float32"
    _launch(device, call)


def _launch(device: Device, call: np.ndarray) -> None:
    (kernel,) = device.kernels(source("operands.cu"), KERNELS)
    device.launch(kernel, 1, (256, 1), 0, call.view(_RECORD))
