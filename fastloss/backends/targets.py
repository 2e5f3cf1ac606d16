"""The target in float64, as the reference and terms that rank voxels read it, and its faults."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastloss.arrays import INTEGERS, Arrays
from fastloss.request import Request


def target_of_sample(request: Request, arrays: Arrays, b: int) -> tuple[np.ndarray, np.ndarray]:
    """g, (C, N), and the voxel weights m, (N,), 0 where voxels are ignored, both in float64."""
    classes, ignore = arrays.logits.shape[1], request.ignore_index
    y = load(arrays.target[b], arrays.target_dtype)
    count = y.size // classes if arrays.dense else y.size
    if arrays.voxel_weight is None:
        m = np.ones(count)
    else:
        m = load(arrays.voxel_weight[b], arrays.weight_dtype).reshape(-1)
    if arrays.dense:
        g = y.reshape(classes, -1)
        if ignore is not None:
            is_class = classes > 1 and 0 <= ignore < classes
            ignored = g[ignore] > 0.5 if is_class else (g == ignore).any(axis=0)
            m = np.where(ignored, 0.0, m)
    else:
        labels = y.reshape(-1)
        g = (labels == np.arange(classes)[:, None]).astype(np.float64)
        if ignore is not None:
            m = np.where(labels == ignore, 0.0, m)
    return g, m


def check_targets(request: Request, arrays: Arrays) -> None:
    """Raise ValueError for labels that are no class and for bad voxel weights.

    Integers in a dense target must be 0 or 1; floating-point numbers may be anything.
    """
    classes = arrays.logits.shape[1]
    if arrays.dense:
        check_dense(request, arrays)
    else:
        labels = load(arrays.target, arrays.target_dtype)
        good = (labels >= 0) & (labels < classes) & (labels == np.floor(labels))
        if request.ignore_index is not None:
            good |= labels == request.ignore_index
        if not good.all():
            raise bad_labels(int((~good).sum()), labels[~good][0], request, classes)
    if arrays.voxel_weight is not None:
        weight = load(arrays.voxel_weight, arrays.weight_dtype)
        good = (weight >= 0) & (weight < np.inf)
        if not good.all():
            raise bad_weights(int((~good).sum()), weight[~good][0])


def check_dense(request: Request, arrays: Arrays) -> None:
    """Raise ValueError for integers in a dense target that are neither 0 nor 1 nor ignored."""
    if arrays.target_dtype not in INTEGERS:
        return
    classes = arrays.logits.shape[1]
    numbers = np.moveaxis(arrays.target, 1, -1)  # so that the first bad number is in voxel order
    if arrays.target_dtype == "bool":
        numbers = numbers.view(np.uint8)
    bad = (numbers != 0) & (numbers != 1)
    if request.ignores_number(classes):
        bad &= numbers != request.ignore_index
    if bad.any():
        raise bad_labels(int(bad.sum()), numbers[bad][0], request, classes)


def load(array: np.ndarray, dtype: str) -> np.ndarray:
    """An array of this dtype in float64; NumPy has bfloat16 as uint16."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


def bad_labels(count: int, first: Any, request: Request, classes: int) -> ValueError:
    """The error for labels that are no class; for a dense target that of `bad_numbers`."""
    if request.dense:
        number = request.ignore_index if request.ignores_number(classes) else None
        return bad_numbers(count, first, number, classes)
    ignored = "" if request.ignore_index is None else f" or ignore_index={request.ignore_index}"
    shown = int(first) if float(first).is_integer() else float(first)
    plural = "label is" if count == 1 else "labels are"
    return ValueError(
        f"target: expected labels in [0, {classes}){ignored}, but {count} {plural} not; the first "
        f"is {shown}"
    )


def bad_numbers(count: int, first: Any, ignored: int | None, classes: int) -> ValueError:
    """The error for integers in a dense target that are neither 0 nor 1 nor ``ignored``."""
    allowed = "0 or 1" if ignored is None else f"0 or 1 or ignore_index={ignored}"
    kind = "a mask" if classes == 1 else "a dense target"
    plural = "number is" if count == 1 else "numbers are"
    return ValueError(
        f"target: expected {allowed} in {kind} of integers, but {count} {plural} not; the first is "
        f"{int(first)}"
    )


def bad_weights(count: int, first: Any) -> ValueError:
    """The error for negative or undefined voxel weights."""
    plural = "number is" if count == 1 else "numbers are"
    return ValueError(
        f"voxel_weight: expected finite numbers of at least 0, but {count} {plural} not; the first "
        f"is {float(first):g}"
    )
