"""TOFU: has a model forgotten fictitious authors, and is it still of use?"""

from repedit.metrics.tofu.definitions import (
    AGGREGATES,
    SETS,
    TERMS,
    Distance,
    Part,
    TruthRatio,
    distance,
    forget_quality,
    model_utility,
    truth_ratio,
)
from repedit.metrics.tofu.evaluation import TofuScore, evaluate
from repedit.metrics.tofu.logs import read_log, write_log

__all__ = [
    "AGGREGATES",
    "SETS",
    "TERMS",
    "Distance",
    "Part",
    "TofuScore",
    "TruthRatio",
    "distance",
    "evaluate",
    "forget_quality",
    "model_utility",
    "read_log",
    "truth_ratio",
    "write_log",
]
