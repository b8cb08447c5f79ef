"""SemEval-2025 Task 4: twelve parts, a membership test and MMLU, with a verdict beside the aggregate of them."""

from repedit.metrics.semeval.evaluation import evaluate
from repedit.metrics.semeval.mmlu import Mmlu, mmlu_accuracy
from repedit.metrics.semeval.score import AWARD, PARTS, SemEvalScore, aggregate, final

__all__ = ["AWARD", "PARTS", "Mmlu", "SemEvalScore", "aggregate", "evaluate", "final", "mmlu_accuracy"]
