"""Figures of what was measured: every function takes values and returns a matplotlib Figure, and shows nothing.

Save one with `figure.savefig("drops.png", dpi=200)`; a notebook shows it when it is the last value of a cell. Orange
is forget and blue is retain. Colours come from Okabe and Ito's set, cividis and PuOr, and marks, hatches or line
styles repeat what colour says, so that a grey print can be read.
"""

from repedit.plot.changes import delta
from repedit.plot.classifiers import condensed, gap, membership
from repedit.plot.cloud import importances
from repedit.plot.descent import training
from repedit.plot.drops import selectivity_strip, trajectory
from repedit.plot.energies import spectra
from repedit.plot.heat import specialization
from repedit.plot.histogram import activations
from repedit.plot.layers import layer_rank
from repedit.plot.leaks import leakage
from repedit.plot.parts import semeval
from repedit.plot.recoveries import audits, lenses, recovery, relearning
from repedit.plot.regions import tradeoff
from repedit.plot.removal import overlap, pruned_per_layer, transfer
from repedit.plot.selected import saliency
from repedit.plot.tasks import continual, principal_angles
from repedit.plot.tradeoffs import TradeOff, rank_tradeoff

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
