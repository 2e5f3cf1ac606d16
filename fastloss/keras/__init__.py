"""Losses for Keras 3, computed by the fused kernels.

A model changes one import::

    from fastloss.keras import Dice, DiceCE  # was: from keras.losses import Dice

`Dice`, `Tversky`, `BinaryCrossentropy`, `CategoricalCrossentropy`, `SparseCategoricalCrossentropy`,
`BinaryFocalCrossentropy` and `CategoricalFocalCrossentropy` are subclasses of Keras' own (3.15):
signatures, defaults, values, gradients, reductions, sample weights, masks and configurations are
theirs. `DiceCE`, `Jaccard`, `FocalTversky`, `GeneralizedDice` and `Boundary` are what Keras lacks,
and `Loss` makes a Keras loss of any `fastloss.Loss`. `cross_entropy_loss` and `dice_loss` are plain
functions.

They run on Keras' TensorFlow, JAX and PyTorch backends, in eager code and in graphs. Channels-last
arrays, Keras' default, are read where they lie. Predictions in half precision are read as they are
and computed in float32; targets keep their dtype. On the TensorFlow backend they run under
``jit_compile=True`` too (Keras' default, "auto", does not use XLA on a CPU).

``DiceCE(smooth=1e-7)`` is the sum of ``Dice(axis=(1, 2, 3))`` and ``SparseCategoricalCrossentropy``
in the passes of one loss, and takes labels for both. In a graph of TensorFlow these two are
computed in the same passes as well, where both are given labels or what `keras.ops.one_hot` made of
them, or both the same one-hot array; and so are other losses here of one prediction.

Where they differ from Keras' classes:

- Negative sample weights raise ValueError, as do labels that are no class; integers in a one-hot
  target are 0 and 1.
- With ``from_logits=True`` focal losses are computed from the logits; Keras clips their
  probabilities to [ε, 1 − ε], ε = 1e-7, which is seen where a logit is beyond ±16.
- ``from_logits=False``, Keras' default, clips probabilities (and of categories divides them by
  their sum) as Keras does, in operations of the backend, before the kernels read them. Pass logits
  where you can: it takes about a third of the time. (In graphs of TensorFlow the logits of a
  softmax or sigmoid that ends the model are found, as Keras finds them for cross-entropies; here
  also for `Dice` and `Tversky`. Gradients then flow to the logits, and not by the probabilities.)
- What no kernel computes is left to Keras: `Dice` and `Tversky` over other axes than all, the
  voxels, or those and one of batch and channels; the binary focal loss of soft targets.
"""

from fastloss.keras._entropy import (
    BinaryCrossentropy,
    BinaryFocalCrossentropy,
    CategoricalCrossentropy,
    CategoricalFocalCrossentropy,
    SparseCategoricalCrossentropy,
)
from fastloss.keras._functions import cross_entropy_loss, dice_loss
from fastloss.keras._losses import Boundary, DiceCE, FocalTversky, GeneralizedDice, Jaccard, Loss
from fastloss.keras._region import Dice, Tversky

__all__ = [
    "BinaryCrossentropy",
    "BinaryFocalCrossentropy",
    "Boundary",
    "CategoricalCrossentropy",
    "CategoricalFocalCrossentropy",
    "Dice",
    "DiceCE",
    "FocalTversky",
    "GeneralizedDice",
    "Jaccard",
    "Loss",
    "SparseCategoricalCrossentropy",
    "Tversky",
    "cross_entropy_loss",
    "dice_loss",
]
