"""A small 3D U-Net learns grey and white matter by Keras' model.fit, with Dice + cross-entropy.

    python examples/train_keras.py
    KERAS_BACKEND=jax python examples/train_keras.py

See examples/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow tells much about itself

if TYPE_CHECKING:
    from brain.volume import Brain

BATCH = 4
CONTEXT = 12
"""Voxels of context on each side of the predicted part."""
DIVISOR = 4
"""The edges of the network's input must be multiples of this, as they are halved twice."""


def main() -> None:
    options = _options()
    import keras
    from brain.figures import draw_curves, draw_overlay
    from brain.history import History
    from brain.volume import CLASSES, load_brain, planes

    import fastloss.keras

    options.out.mkdir(parents=True, exist_ok=True)
    print("Reading the MNI152 template that nilearn ships ...", flush=True)
    brain = load_brain()
    keras.utils.set_random_seed(options.seed)
    model = unet(keras, len(CLASSES))
    # One Dice of the batch: per patch, a missing tissue would cost 1.
    loss = fastloss.keras.DiceCE(from_logits=True, batch=True)
    steps = options.epochs * options.steps
    schedule = keras.optimizers.schedules.CosineDecay(0.01, steps)
    optimizer = keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True)
    model.compile(optimizer, loss=loss)

    history = History(f"fastloss, Keras on {keras.backend.backend()}", "dice_ce", "float32")
    record = _recorder(keras, brain, history)
    model.fit(_patches(keras, brain, options), epochs=options.epochs, callbacks=[record])

    history.slices = [
        predict(model, brain, axis, slice(index, index + 1)).squeeze(axis)
        for axis, index in planes(brain)
    ]
    summary = {
        "backend": keras.backend.backend(),
        "step_seconds": median(history.seconds),
        "held_out_dice": history.held_out[len(history.loss)],
    }
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
    draw_curves([history], options.out / "curve.png")
    draw_overlay(brain, [history], options.out / "overlay.png")
    print(f"curve.png, overlay.png and summary.json are in {options.out}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=10, help="epochs (default: 10)")
    parser.add_argument("--steps", type=int, default=25, help="steps of an epoch (default: 25)")
    parser.add_argument(
        "--patch",
        type=int,
        default=40,
        help="edge of the training patches in voxels of 1 mm, a multiple of 4 (default: 40)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and patches (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("train_keras"), help="folder for curve and picture"
    )
    options = parser.parse_args()
    for name in ("epochs", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if options.patch < 16 or options.patch % DIVISOR:
        parser.error(f"--patch: expected a multiple of 4, at least 16, got {options.patch}")
    return options


def unet(keras: Any, classes: int, channels: int = 8) -> Any:
    """(B, D, H, W, 1) to logits (B, D, H, W, classes), over three resolutions."""
    layers = keras.layers

    def convolutions(x: Any, after: int) -> Any:
        for _ in range(2):
            x = layers.Conv3D(after, 3, padding="same", use_bias=False)(x)
            x = layers.Activation("gelu")(layers.BatchNormalization(momentum=0.9)(x))
        return x

    def up(x: Any, skipped: Any, after: int) -> Any:
        x = layers.Conv3DTranspose(after, 2, strides=2)(x)
        return convolutions(layers.Concatenate()([skipped, x]), after)

    image = keras.Input((None, None, None, 1))
    fine = convolutions(image, channels)
    middle = convolutions(layers.MaxPooling3D()(fine), 2 * channels)
    coarse = convolutions(layers.MaxPooling3D()(middle), 4 * channels)
    middle = up(coarse, middle, 2 * channels)
    logits = layers.Conv3D(classes, 1)(up(middle, fine, channels))
    return keras.Model(image, logits)


def _patches(keras: Any, brain: Brain, options: argparse.Namespace) -> Any:
    """Patches with their labels, channels last."""
    from brain.volume import Patches

    patches = Patches(brain, options.patch, options.seed)

    class Dataset(keras.utils.PyDataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return int(options.steps)

        def __getitem__(self, _: int) -> tuple[np.ndarray, np.ndarray]:
            images, labels = patches.draw(BATCH)
            return np.moveaxis(images, 1, -1), labels[:, 0]

    return Dataset()


def _recorder(keras: Any, brain: Brain, history: Any) -> Any:
    """Keeps loss and seconds of every step, and the held-out Dice after every epoch."""
    from brain.volume import CLASSES

    import fastloss as fl

    class Recorder(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.losses: list[float] = []

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            self.start = perf_counter()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            history.seconds.append(perf_counter() - self.start)
            # What Keras tells is the mean of the epoch's losses.
            count = batch + 1
            own = float(logs["loss"]) * count - sum(self.losses)
            self.losses.append(own)
            history.loss.append(own)

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            predicted = predict(self.model, brain, 1, brain.held_out)
            truth = brain.labels[:, brain.held_out]
            scores = fl.metrics.evaluate(
                predicted[None], truth[None], metrics=("dice",), classes=CLASSES
            )
            found = dict(zip(scores.classes, scores["dice"][0].tolist(), strict=True))
            history.held_out[len(history.loss)] = found
            print("held-out Dice: " + ", ".join(f"{name} {d:.3f}" for name, d in found.items()))

    return Recorder()


def predict(model: Any, brain: Brain, axis: int, part: slice) -> np.ndarray:
    """The labels of a part of the volume along one axis, predicted with its surroundings."""
    start = max(0, part.start - CONTEXT)
    around = brain.image.take(range(start, min(part.stop + CONTEXT, brain.image.shape[axis])), axis)
    image = np.pad(around, [(0, -n % DIVISOR) for n in around.shape], mode="edge")
    logits = model.predict_on_batch(image[None, ..., None])
    labels = np.asarray(logits)[0].argmax(-1).astype(np.uint8)
    labels = labels[tuple(slice(0, n) for n in around.shape)]
    return labels.take(range(part.start - start, part.stop - start), axis)


if __name__ == "__main__":
    main()
