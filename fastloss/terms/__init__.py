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
from fastloss.terms.entropies import (
    BalancedCrossEntropy,
    Combo,
    KLDivergence,
    SymmetricCrossEntropy,
)
from fastloss.terms.errors import AbsoluteError, DiceSemimetric, SensitivitySpecificity
from fastloss.terms.hardest import OHEMCrossEntropy
from fastloss.terms.linear import (
    Brier,
    GeneralizedCrossEntropy,
    MeanAbsoluteError,
    PolyCrossEntropy,
)
from fastloss.terms.logarithmic import (
    ExponentialLogarithmic,
    LogarithmicCrossEntropy,
    LogarithmicDice,
    LogCoshDice,
)
from fastloss.terms.lovasz import LovaszHinge, LovaszSoftmax
from fastloss.terms.per_region import BlobDiceCE, BlobLoss, CCDiceCE, PerRegion
from fastloss.terms.region import Dice, GeneralizedDice, Jaccard, RegionTerm, Tversky
from fastloss.terms.skeletons import skeleton
from fastloss.terms.unified_focal import UnbalancedFocal, UnbalancedTversky, UnifiedFocal
from fastloss.terms.wasserstein import GeneralizedWassersteinDice

__all__ = [
    "MCC",
    "AbsoluteError",
    "BalancedCrossEntropy",
    "BlobDiceCE",
    "BlobLoss",
    "Boundary",
    "BoundaryDoU",
    "Brier",
    "CCDiceCE",
    "Combo",
    "CrossEntropy",
    "Dice",
    "DiceSemimetric",
    "ExponentialLogarithmic",
    "Focal",
    "GeneralizedCrossEntropy",
    "GeneralizedDice",
    "GeneralizedSurface",
    "GeneralizedWassersteinDice",
    "HausdorffDT",
    "Jaccard",
    "KLDivergence",
    "LogCoshDice",
    "LogarithmicCrossEntropy",
    "LogarithmicDice",
    "LovaszHinge",
    "LovaszSoftmax",
    "MeanAbsoluteError",
    "OHEMCrossEntropy",
    "PerRegion",
    "PolyCrossEntropy",
    "RegionTerm",
    "SensitivitySpecificity",
    "SkeletonRecall",
    "SymmetricCrossEntropy",
    "Term",
    "TopKCrossEntropy",
    "Tversky",
    "UnbalancedFocal",
    "UnbalancedTversky",
    "UnifiedFocal",
    "VoxelwiseTerm",
    "skeleton",
]
