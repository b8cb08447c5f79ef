"""Figures of what was measured: every function takes values and returns a matplotlib Figure, and shows nothing.

Save one with `figure.savefig("drops.png", dpi=200)`; a notebook shows it when it is the last value of a cell. Orange
is forget and blue is retain. Colours come from Okabe and Ito's set, cividis and PuOr, and marks, hatches or line
styles repeat what colour says, so that a grey print can be read.
"""

from repedit.plot.classifiers import condensed, gap, membership
from repedit.plot.gradients import delta, saliency, semeval, tradeoff, training
from repedit.plot.neurons import activations, importances, overlap, pruned_per_layer, specialization, transfer
from repedit.plot.projections import TradeOff, continual, layer_rank, leakage, principal_angles, rank_tradeoff, spectra
from repedit.plot.prunings import selectivity_strip, trajectory
from repedit.plot.reports import audits, lenses, recovery, relearning

__all__ = [
    "TradeOff",
    "activations",
    "audits",
    "condensed",
    "continual",
    "delta",
    "gap",
    "importances",
    "layer_rank",
    "leakage",
    "lenses",
    "membership",
    "overlap",
    "principal_angles",
    "pruned_per_layer",
    "rank_tradeoff",
    "recovery",
    "relearning",
    "saliency",
    "selectivity_strip",
    "semeval",
    "specialization",
    "spectra",
    "tradeoff",
    "training",
    "trajectory",
    "transfer",
]
