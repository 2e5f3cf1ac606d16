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
from fastloss.terms.hardest import OHEMCrossEntropy
from fastloss.terms.linear import (
    Brier,
    GeneralizedCrossEntropy,
    MeanAbsoluteError,
    PolyCrossEntropy,
)
from fastloss.terms.lovasz import LovaszHinge, LovaszSoftmax
from fastloss.terms.per_region import BlobDiceCE, BlobLoss, CCDiceCE, PerRegion
from fastloss.terms.region import Dice, GeneralizedDice, Jaccard, RegionTerm, Tversky
from fastloss.terms.skeletons import skeleton

__all__ = [
    "MCC",
    "BlobDiceCE",
    "BlobLoss",
    "Boundary",
    "BoundaryDoU",
    "Brier",
    "CCDiceCE",
    "CrossEntropy",
    "Dice",
    "Focal",
    "GeneralizedCrossEntropy",
    "GeneralizedDice",
    "GeneralizedSurface",
    "HausdorffDT",
    "Jaccard",
    "LovaszHinge",
    "LovaszSoftmax",
    "MeanAbsoluteError",
    "OHEMCrossEntropy",
    "PerRegion",
    "PolyCrossEntropy",
    "RegionTerm",
    "SkeletonRecall",
    "Term",
    "TopKCrossEntropy",
    "Tversky",
    "VoxelwiseTerm",
    "skeleton",
]
