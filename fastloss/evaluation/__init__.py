"""Files of predictions and references, evaluated case by case: ``python -m fastloss evaluate``."""

from fastloss.evaluation.files import LabelMap, Mismatch, match, read_label_map
from fastloss.evaluation.results import Results
from fastloss.evaluation.run import Settings, evaluate_files

__all__ = [
    "LabelMap",
    "Mismatch",
    "Results",
    "Settings",
    "evaluate_files",
    "match",
    "read_label_map",
]
