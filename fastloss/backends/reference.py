"""What is right: the two passes in plain NumPy and float64, without care for speed or memory."""

from __future__ import annotations

import numpy as np

from fastloss.arrays import INTEGERS, Arrays
from fastloss.backends.base import Backend, bad_labels, bad_weights
from fastloss.request import Request
from fastloss.voxel_losses import VoxelLosses

Fields = tuple[np.ndarray, np.ndarray, np.ndarray]


class ReferenceBackend(Backend):
    name = "reference"

    def reduce(
        self,
        request: Request,
        arrays: Arrays,
        sums: np.ndarray,
        voxels: np.ndarray,
        losses: VoxelLosses | None = None,
    ) -> None:
        check_targets(request, arrays)
        for b in range(arrays.logits.shape[0]):
            x, g, m = _sample(request, arrays, b)
            with np.errstate(all="ignore"):
                p, log_p, log_q = _activate(request.activation, x)
                voxels[b] = m.sum()
                for slot, total in zip(request.slots, sums[:, b], strict=True):
                    total[:] = _field(slot, request, p, log_p, log_q, g, m).sum(axis=1)
                if losses is not None:
                    each = _field("cross_entropy", request, p, log_p, log_q, g, m)
                    losses.values[b] = _product(losses.class_weight[:, None], each).sum(axis=0)

    def apply(
        self,
        request: Request,
        arrays: Arrays,
        coefficients: np.ndarray,
        out: np.ndarray,
        losses: VoxelLosses | None = None,
    ) -> None:
        for b in range(arrays.logits.shape[0]):
            x, g, m = _sample(request, arrays, b)
            with np.errstate(all="ignore"):
                k = dict(zip(request.slots, coefficients[:, b, :, None], strict=True))
                if losses is not None:
                    k["top_k"] = k["top_k"] * losses.values[b]
                gradient = _gradient(request, k, x, g, m)
                out[b] = _store(gradient.reshape(out[b].shape), arrays.logits_dtype)


def _field(
    slot: str,
    request: Request,
    p: np.ndarray,
    log_p: np.ndarray,
    log_q: np.ndarray,
    g: np.ndarray,
    m: np.ndarray,
) -> np.ndarray:
    """The summand of one slot, (C, N); see `fastloss.request.Request`."""
    name, _, gamma = slot.partition(":")
    if name in ("reference", "top_k"):
        return m * g
    if name == "overlap":
        return m * p * g
    if name == "predicted":
        return m * p
    if name == "predicted_squared":
        return m * p**2
    if name == "reference_squared":
        return m * g**2
    if name == "cross_entropy":
        return -_product(m * g, log_p)
    if name == "cross_entropy_rest":
        return -_product(m * (1 - g), log_q)
    if name == "uniform":
        logs = log_p + log_q if request.activation == "sigmoid" else log_p
        return -_product(m, logs)
    if name == "focal":
        return -_product(m * g * _complement(request, p, log_p) ** float(gamma), log_p)
    assert name == "focal_rest", name
    return -_product(m * (1 - g) * p ** float(gamma), log_q)


def _gradient(
    request: Request, k: dict[str, np.ndarray], x: np.ndarray, g: np.ndarray, m: np.ndarray
) -> np.ndarray:
    """Σ over slots of k · (derivative of the slot's summand by each logit), (C, N)."""
    p, log_p, log_q = _activate(request.activation, x)
    q = _complement(request, p, log_p)
    by_p = np.zeros_like(x)  # through p itself
    by_log_p = np.zeros_like(x)  # through log p
    by_log_q = np.zeros_like(x)  # through log(1−p)
    for slot, c in k.items():
        name, _, gamma = slot.partition(":")
        if name == "overlap":
            by_p += c * m * g
        elif name == "predicted":
            by_p += c * m
        elif name == "predicted_squared":
            by_p += c * m * 2 * p
        elif name in ("cross_entropy", "top_k"):
            by_log_p -= c * m * g
        elif name == "cross_entropy_rest":
            by_log_q -= c * m * (1 - g)
        elif name == "uniform":
            by_log_p -= c * m
            by_log_q -= c * m
        elif name == "focal":
            by_log_p -= c * m * g * _focal_slope(p, log_p, q, float(gamma))
        elif name == "focal_rest":
            by_log_q -= c * m * (1 - g) * _focal_slope(q, log_q, p, float(gamma))
    if request.activation == "softmax":
        t = by_p * p + by_log_p
        return t - p * t.sum(axis=0)
    if request.activation == "sigmoid":
        return by_p * p * q + by_log_p * q - by_log_q * p
    return by_p + np.where(by_log_p == 0, 0.0, by_log_p / p)


def _complement(request: Request, p: np.ndarray, log_p: np.ndarray) -> np.ndarray:
    """1 − p, exact where p is near 1 as well."""
    return 1 - p if request.activation == "none" else -np.expm1(log_p)


def _focal_slope(p: np.ndarray, log_p: np.ndarray, q: np.ndarray, gamma: float) -> np.ndarray:
    """The derivative of q^γ log p by log p, with q = 1−p."""
    if gamma == 0:
        return np.ones_like(p)
    # Near p = 1 it is like −q^γ, which below γ = 1 is no longer seen from its factors.
    product = np.where(q == 0, 0.0, _product(_product(p, log_p), q ** (gamma - 1)))
    return q**gamma - gamma * product


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a b, and 0 where a factor is 0 though the other be infinite: the limit of x log x."""
    return np.where((a == 0) & ~np.isnan(b) | (b == 0) & ~np.isnan(a), 0.0, a * b)


def _activate(activation: str, x: np.ndarray) -> Fields:
    """p, log p and log(1−p)."""
    if activation == "softmax":
        largest = x.max(axis=0)
        # Classes that share an infinite maximum share the probability.
        d = np.where(x == largest, 0.0, x - largest)
        log_p = d - np.log(np.exp(d).sum(axis=0))
        p = np.exp(log_p)
        return p, log_p, log_p
    if activation == "sigmoid":
        log_p, log_q = -np.logaddexp(0, -x), -np.logaddexp(0, x)
        return np.exp(log_p), log_p, log_q
    return x, np.log(x), np.log1p(-x)


def _sample(request: Request, arrays: Arrays, b: int) -> Fields:
    """Logits and dense target (C, N) and voxel weights (N,) of one sample, in float64."""
    classes = arrays.logits.shape[1]
    x = _load(arrays.logits[b], arrays.logits_dtype).reshape(classes, -1)
    y = _load(arrays.target[b], arrays.target_dtype)
    if arrays.voxel_weight is None:
        m = np.ones(x.shape[1])
    else:
        m = _load(arrays.voxel_weight[b], arrays.weight_dtype).reshape(-1)
    ignore = request.ignore_index
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
    # A voxel that counts for nothing does so even if it holds NaN.
    return np.where(m == 0, 0.0, x), np.where(m == 0, 0.0, g), m


def check_targets(request: Request, arrays: Arrays) -> None:
    """Raise ValueError for labels that are no class and for bad voxel weights.

    In a dense target integers are 0 or 1, as labels are classes; floating numbers are free.
    """
    classes = arrays.logits.shape[1]
    if arrays.dense:
        check_dense(request, arrays)
    else:
        labels = _load(arrays.target, arrays.target_dtype)
        good = (labels >= 0) & (labels < classes) & (labels == np.floor(labels))
        if request.ignore_index is not None:
            good |= labels == request.ignore_index
        if not good.all():
            raise bad_labels(int((~good).sum()), labels[~good][0], request, classes)
    if arrays.voxel_weight is not None:
        weight = _load(arrays.voxel_weight, arrays.weight_dtype)
        good = (weight >= 0) & (weight < np.inf)
        if not good.all():
            raise bad_weights(int((~good).sum()), weight[~good][0])


def check_dense(request: Request, arrays: Arrays) -> None:
    """Raise ValueError for integers in a dense target that are neither 0 nor 1 nor ignored."""
    if arrays.target_dtype not in INTEGERS:
        return
    classes = arrays.logits.shape[1]
    numbers = np.moveaxis(arrays.target, 1, -1)  # the first is one of the first voxel's
    if arrays.target_dtype == "bool":
        numbers = numbers.view(np.uint8)
    bad = (numbers != 0) & (numbers != 1)
    if request.ignores_number(classes):
        bad &= numbers != request.ignore_index
    if bad.any():
        raise bad_labels(int(bad.sum()), numbers[bad][0], request, classes)


def _load(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


def _store(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype != "bfloat16":
        return array.astype(dtype)
    bits = array.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to the nearest, ties to even
    return np.where(np.isnan(array), 0x7FC0, rounded).astype(np.uint16)


BACKEND = ReferenceBackend()
