"""Figures: every function takes values and returns a matplotlib Figure without showing it.

Save a figure with `figure.savefig("drops.png", dpi=200)`; a notebook shows it as the last value of a cell. Orange is
forget and blue is retain. Colours come from the palette of Okabe and Ito, cividis and PuOr; markers, hatches or line
styles repeat the information, so that a grey print is readable.
"""

from repedit.plot.classifiers import condensed, gap, membership
from repedit.plot.gradients import delta, saliency, semeval, tradeoff, training
from repedit.plot.neurons import activations, importances, overlap, pruned_per_layer, specialization, transfer
from repedit.plot.projections import (
    TradeOff,
    ablations,
    continual,
    layer_rank,
    leakage,
    principal_angles,
    rank_tradeoff,
    spectra,
)
from repedit.plot.prunings import selectivity_strip, trajectory
from repedit.plot.reports import audits, lenses, recovery, relearning

__all__ = [
    "TradeOff", "ablations", "activations", "audits", "condensed", "continual", "delta", "gap", "importances",
    "layer_rank", "leakage", "lenses", "membership", "overlap", "principal_angles", "pruned_per_layer",
    "rank_tradeoff", "recovery", "relearning", "saliency", "selectivity_strip", "semeval", "specialization",
    "spectra", "tradeoff", "training", "trajectory", "transfer",
]  # fmt: skip
