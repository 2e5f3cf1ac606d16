"""Training in JAX with optax: one compiled step, the loss within it."""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fastloss as fl
from brain import jax_unet
from brain.history import History
from brain.volume import CLASSES, SPACING, Brain, Patches, planes

BATCH = 2
LEARNING_RATE = 2e-3
POINTS = 8
"""How often the held-out Dice is measured, at equal intervals."""
CONTEXT = 12
"""Voxels of context on each side of the predicted part."""


def train(brain: Brain, steps: int, size: int, seed: int) -> History:
    """Train a new network, and print its progress."""
    history = History("fastloss, JAX", "dice_ce", "float32")
    loss_function = fl.Loss(fl.Dice(batch=True), fl.CrossEntropy(), channel_axis=-1)
    weights = jax_unet.init(jax.random.key(seed), len(CLASSES))
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))
    state = optimizer.init(weights)

    @jax.jit
    def step(weights: Any, state: Any, image: jax.Array, labels: jax.Array) -> Any:
        def loss_of(weights: Any) -> jax.Array:
            logits = jax_unet.apply(weights, image)  # (B, D, H, W, 3)
            return loss_function(logits, labels)  # labels (B, D, H, W)

        loss, gradient = jax.value_and_grad(loss_of)(weights)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(weights, updates), state, loss

    patches = Patches(brain, size, seed)
    every = max(1, steps // POINTS)
    for number in range(1, steps + 1):
        image, labels = patches.draw(BATCH)
        start = perf_counter()
        weights, state, loss = step(weights, state, np.moveaxis(image, 1, -1), labels[:, 0])
        history.loss.append(float(loss))
        history.seconds.append(perf_counter() - start)
        if number == 1 or number % every == 0 or number == steps:
            predicted = _predict(weights, brain, 1, brain.held_out)
            _measure(history, predicted, brain.labels[:, brain.held_out])
            _report(history, steps)
    logits = jax_unet.apply(weights, jnp.moveaxis(image, 1, -1))
    history.loss_seconds = _seconds(loss_function, logits, jnp.asarray(labels[:, 0]))
    history.slices = [
        _predict(weights, brain, axis, slice(index, index + 1)).squeeze(axis)
        for axis, index in planes(brain)
    ]
    return history


def _report(history: History, steps: int) -> None:
    number = len(history.loss)
    found = ", ".join(f"{name} {value:.3f}" for name, value in history.held_out[number].items())
    print(
        f"step {number:>{len(str(steps))}}/{steps}  loss {history.loss[-1]:.4f}"
        f"  {median(history.seconds):.3f} s/step  held-out Dice: {found}",
        flush=True,
    )


def _seconds(loss_function: fl.Loss, logits: jax.Array, labels: jax.Array) -> float:
    """Median seconds of the loss alone, forward and backward, compiled."""
    call = jax.jit(jax.value_and_grad(loss_function.__call__))
    samples = []
    for _ in range(21):
        start = perf_counter()
        jax.block_until_ready(call(logits, labels))
        samples.append(perf_counter() - start)
    return median(samples[1:])


def _measure(history: History, predicted: np.ndarray, truth: np.ndarray) -> None:
    """Dice, and HD95 in mm, of each tissue in the held-out slab."""
    scores = fl.metrics.evaluate(
        predicted[None],
        truth[None],
        metrics=("dice", "hd95"),
        classes=CLASSES,
        spacing=SPACING,
        definition="deepmind",
    )
    for name, values in (("dice", history.held_out), ("hd95", history.hd95)):
        found = zip(scores.classes, scores[name][0].tolist(), strict=True)
        values[len(history.loss)] = dict(found)


@jax.jit
def _likeliest(weights: Any, image: jax.Array) -> jax.Array:
    return jax_unet.apply(weights, image).argmax(axis=-1).astype(jnp.uint8)


def _predict(weights: Any, brain: Brain, axis: int, part: slice) -> np.ndarray:
    """The labels of a part of the volume along one axis, predicted with its surroundings."""
    start = max(0, part.start - CONTEXT)
    around = brain.image.take(range(start, min(part.stop + CONTEXT, brain.image.shape[axis])), axis)
    pad = [(0, -n % jax_unet.DIVISOR) for n in around.shape]
    image = np.pad(around, pad, mode="edge")[None, ..., None]
    labels = np.asarray(_likeliest(weights, image))[0]
    labels = labels[tuple(slice(0, n) for n in around.shape)]
    return labels.take(range(part.start - start, part.stop - start), axis)
