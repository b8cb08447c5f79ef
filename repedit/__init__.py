"""See what a capability of a language model is made of, cut it out of the weights, and test whether it is gone."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# (module, its public names) by task, as the reference lists them; loaded on first use so that `import repedit` is cheap. The
# imports at the end repeat the table for type checkers.
_MODULES = (
    ("models.subject", "load Subject"),
    ("models.default_model", "fetch"),
    ("bridges", "wrap to_lens to_nnsight lens_hooks"),
    ("sites", "Site Point"),
    ("linear_maps", "AffineMap LowRank Diagonal Chain"),
    ("stats", "Activity Moments CrossMoments"),
    ("activations.collection", "collect peaks"),
    ("activations.examples", "max_activating"),
    ("activations.prediction", "predictions"),
    ("neurons.scores", "score"),
    ("neurons.selection", "top prune"),
    ("neurons.scores", "agreement"),
    ("neurons.selection", "random_like"),
    ("neurons.scores", "Score Scores CollinearWarning"),
    ("neurons.trajectory", "trajectory Trajectory Step"),
    ("edit", "Edit"),
    ("delta", "Delta"),
    ("unlearning.api", "unlearn"),
    ("plan", "Plan"),
    ("fit.mrp", "mrp"),
    ("fit.mrp_training", "MRPConfig"),
    ("fit.mrp", "ContinualMRP"),
    ("fit.mrp", "erase_stream"),
    ("rewrite.apply", "apply"),
    ("rewrite.certificate", "certificate Certificate"),
    ("rewrite.slim", "slimmed"),
    ("rewrite.slice", "sliced"),
    ("rewrite.export", "export"),
    ("rewrite.adapter", "export_adapter import_adapter"),
    ("rewrite.gguf", "gguf_check"),
    ("rewrite.hub", "push"),
    ("rewrite.verification", "diff reload_check"),
    ("metrics.benchmarks", "compare"),
    ("metrics.facts", "facts_accuracy"),
    ("metrics.location", "locate"),
    ("metrics.facts", "trainer_callback"),
    ("auditing.api", "audit"),
    ("auditing.classifier", "audit_classifier"),
    ("auditing.report", "Report"),
    ("arch.infer", "check_architecture"),
    ("arch", "register resolve"),
)
_NAMES = {name: f"repedit.{module}" for module, names in _MODULES for name in names.split()}
_NAMESPACES = {
    name: f"repedit.{name}"
    for name in ("arch", "data", "errors", "explore", "fit", "metrics", "plot", "report", "vision")
} | {"attack": "repedit.auditing.attack", "recipes": "repedit.unlearning.recipes"}

__all__ = [*_NAMES, *_NAMESPACES, "__version__"]  # pyright: ignore


def __getattr__(name: str) -> Any:
    if name in _NAMESPACES:
        return importlib.import_module(_NAMESPACES[name])
    if name not in _NAMES:
        raise AttributeError(f"module 'repedit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from repedit import arch, data, errors, explore, fit, metrics, plot, report, vision
    from repedit.activations.collection import collect, peaks
    from repedit.activations.examples import max_activating
    from repedit.activations.prediction import predictions
    from repedit.arch import register, resolve
    from repedit.arch.infer import check_architecture
    from repedit.auditing import attack
    from repedit.auditing.api import audit
    from repedit.auditing.classifier import audit_classifier
    from repedit.auditing.report import Report
    from repedit.bridges import lens_hooks, to_lens, to_nnsight, wrap
    from repedit.delta import Delta
    from repedit.edit import Edit
    from repedit.fit.mrp import ContinualMRP, erase_stream, mrp
    from repedit.fit.mrp_training import MRPConfig
    from repedit.linear_maps import AffineMap, Chain, Diagonal, LowRank
    from repedit.metrics.benchmarks import compare
    from repedit.metrics.facts import facts_accuracy, trainer_callback
    from repedit.metrics.location import locate
    from repedit.models.default_model import fetch
    from repedit.models.subject import Subject, load
    from repedit.neurons.scores import CollinearWarning, Score, Scores, agreement, score
    from repedit.neurons.selection import prune, random_like, top
    from repedit.neurons.trajectory import Step, Trajectory, trajectory
    from repedit.plan import Plan
    from repedit.rewrite.adapter import export_adapter, import_adapter
    from repedit.rewrite.apply import apply
    from repedit.rewrite.certificate import Certificate, certificate
    from repedit.rewrite.export import export
    from repedit.rewrite.gguf import gguf_check
    from repedit.rewrite.hub import push
    from repedit.rewrite.slice import sliced
    from repedit.rewrite.slim import slimmed
    from repedit.rewrite.verification import diff, reload_check
    from repedit.sites import Point, Site
    from repedit.stats import Activity, CrossMoments, Moments
    from repedit.unlearning import recipes
    from repedit.unlearning.api import unlearn
