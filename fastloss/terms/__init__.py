"""The losses, as formulas on sums over voxels."""

from fastloss.loss import Term
from fastloss.terms.distribution import CrossEntropy, Focal, TopKCrossEntropy, VoxelwiseTerm
from fastloss.terms.linear import (
    Brier,
    GeneralizedCrossEntropy,
    MeanAbsoluteError,
    PolyCrossEntropy,
)
from fastloss.terms.region import Dice, GeneralizedDice, Jaccard, RegionTerm, Tversky

__all__ = [
    "Brier",
    "CrossEntropy",
    "Dice",
    "Focal",
    "GeneralizedCrossEntropy",
    "GeneralizedDice",
    "Jaccard",
    "MeanAbsoluteError",
    "PolyCrossEntropy",
    "RegionTerm",
    "Term",
    "TopKCrossEntropy",
    "Tversky",
    "VoxelwiseTerm",
]
