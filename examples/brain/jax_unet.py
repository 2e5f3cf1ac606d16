"""A small 3D U-Net in plain JAX, channels last."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

DIVISOR = 4
"""The edges of its input must be multiples of this, as they are halved twice."""

Weights = dict[str, Any]


def init(key: jax.Array, classes: int, channels: int = 8) -> Weights:
    """Random weights for one input channel and so many classes."""
    fine, middle, coarse = channels, 2 * channels, 4 * channels
    shapes = {
        "down_fine": (3, 1, fine), "down_fine_2": (3, fine, fine),
        "down_middle": (3, fine, middle), "down_middle_2": (3, middle, middle),
        "bottom": (3, middle, coarse), "bottom_2": (3, coarse, coarse),
        "to_middle": (1, coarse, middle),
        "up_middle": (3, 2 * middle, middle), "up_middle_2": (3, middle, middle),
        "to_fine": (1, middle, fine),
        "up_fine": (3, 2 * fine, fine), "up_fine_2": (3, fine, fine),
        "head": (1, fine, classes),
    }  # fmt: skip
    weights: Weights = {}
    for own, (name, (edge, before, after)) in zip(
        jax.random.split(key, len(shapes)), shapes.items(), strict=True
    ):
        scale = (2 / (edge**3 * before)) ** 0.5
        kernel = scale * jax.random.normal(own, (edge, edge, edge, before, after))
        weights[name] = {"kernel": kernel, "bias": jnp.zeros(after), "gain": jnp.ones(after)}
    return weights


def apply(weights: Weights, image: jax.Array) -> jax.Array:
    """(B, D, H, W, 1) to logits (B, D, H, W, classes), over three resolutions."""
    fine = _twice(weights, "down_fine", image)
    middle = _twice(weights, "down_middle", _halve(fine))
    coarse = _twice(weights, "bottom", _halve(middle))
    up = _convolve(weights["to_middle"], _double(coarse))
    middle = _twice(weights, "up_middle", jnp.concatenate([middle, up], axis=-1))
    up = _convolve(weights["to_fine"], _double(middle))
    fine = _twice(weights, "up_fine", jnp.concatenate([fine, up], axis=-1))
    return _convolve(weights["head"], fine)


def _twice(weights: Weights, name: str, x: jax.Array) -> jax.Array:
    for own in (weights[name], weights[name + "_2"]):
        x = jax.nn.gelu(_normalise(own, _convolve(own, x)))
    return x


def _convolve(own: Weights, x: jax.Array) -> jax.Array:
    kernel = own["kernel"]
    if kernel.shape[0] == 1:
        return x @ kernel[0, 0, 0] + own["bias"]
    # The normalisation adds the bias. XLA's 3D convolutions on a CPU take five times as long as
    # those of the planes, once for each plane of the kernel.
    batch, depth, *plane, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    total: jax.Array | None = None
    for shift, of_plane in enumerate(kernel):
        planes = padded[:, shift : shift + depth].reshape(batch * depth, *plane, channels)
        part = jax.lax.conv_general_dilated(
            planes, of_plane, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        total = part if total is None else total + part
    assert total is not None
    return total.reshape(batch, depth, *plane, -1)


def _normalise(own: Weights, x: jax.Array) -> jax.Array:
    """Of every sample and channel; a patch and a slab are normalised alike."""
    mean = x.mean(axis=(1, 2, 3), keepdims=True)
    spread = jnp.sqrt(x.var(axis=(1, 2, 3), keepdims=True) + 1e-5)
    return (x - mean) / spread * own["gain"] + own["bias"]


def _halve(x: jax.Array) -> jax.Array:
    b, d, h, w, c = x.shape
    return x.reshape(b, d // 2, 2, h // 2, 2, w // 2, 2, c).max(axis=(2, 4, 6))


def _double(x: jax.Array) -> jax.Array:
    for axis in (1, 2, 3):
        x = jnp.repeat(x, 2, axis=axis)
    return x
