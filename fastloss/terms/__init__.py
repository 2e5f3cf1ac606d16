"""The losses, as formulas on sums over voxels."""

from fastloss.loss import Term
from fastloss.terms.boundary import (
    Boundary,
    BoundaryDoU,
    GeneralizedSurface,
    HausdorffDT,
    SkeletonRecall,
)
from fastloss.terms.correlation import MCC
from fastloss.terms.distribution import CrossEntropy, Focal, TopKCrossEntropy, VoxelwiseTerm
from fastloss.terms.linear import (
    Brier,
    GeneralizedCrossEntropy,
    MeanAbsoluteError,
    PolyCrossEntropy,
)
from fastloss.terms.region import Dice, GeneralizedDice, Jaccard, RegionTerm, Tversky
from fastloss.terms.skeletons import skeleton

__all__ = [
    "MCC",
    "Boundary",
    "BoundaryDoU",
    "Brier",
    "CrossEntropy",
    "Dice",
    "Focal",
    "GeneralizedCrossEntropy",
    "GeneralizedDice",
    "GeneralizedSurface",
    "HausdorffDT",
    "Jaccard",
    "MeanAbsoluteError",
    "PolyCrossEntropy",
    "RegionTerm",
    "SkeletonRecall",
    "Term",
    "TopKCrossEntropy",
    "Tversky",
    "VoxelwiseTerm",
    "skeleton",
]
