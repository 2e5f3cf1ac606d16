"""What each loss means, on sums over voxels."""

from fastloss.terms.base import Term
from fastloss.terms.distribution import CrossEntropy, Focal, TopKCrossEntropy
from fastloss.terms.region import Dice, GeneralizedDice, Jaccard, RegionTerm, Tversky

__all__ = [
    "CrossEntropy",
    "Dice",
    "Focal",
    "GeneralizedDice",
    "Jaccard",
    "RegionTerm",
    "Term",
    "TopKCrossEntropy",
    "Tversky",
]
