"""See what a capability of a language model is made of, cut it out of the weights, and test whether it is gone."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module that holds it, loaded on first use: `import repedit` is cheap.
_NAMES = {
    "load": "repedit.models.subject",
    "Subject": "repedit.models.subject",
    "fetch": "repedit.models.default_model",
    "wrap": "repedit.bridges",
    "to_lens": "repedit.bridges",
    "to_nnsight": "repedit.bridges",
    "lens_hooks": "repedit.bridges",
    "Site": "repedit.sites",
    "Point": "repedit.sites",
    "AffineMap": "repedit.linear_maps",
    "LowRank": "repedit.linear_maps",
    "Diagonal": "repedit.linear_maps",
    "Chain": "repedit.linear_maps",
    "Activity": "repedit.stats",
    "Moments": "repedit.stats",
    "CrossMoments": "repedit.stats",
    "collect": "repedit.activations.collection",
    "peaks": "repedit.activations.collection",
    "max_activating": "repedit.activations.examples",
    "predictions": "repedit.activations.prediction",
    "score": "repedit.neurons.scores",
    "top": "repedit.neurons.selection",
    "prune": "repedit.neurons.selection",
    "agreement": "repedit.neurons.scores",
    "random_like": "repedit.neurons.selection",
    "Score": "repedit.neurons.scores",
    "Scores": "repedit.neurons.scores",
    "CollinearWarning": "repedit.neurons.scores",
    "trajectory": "repedit.neurons.trajectory",
    "Trajectory": "repedit.neurons.trajectory",
    "Step": "repedit.neurons.trajectory",
    "Edit": "repedit.edit",
    "Delta": "repedit.delta",
    "unlearn": "repedit.unlearning.api",
    "Plan": "repedit.plan",
    "mrp": "repedit.fit.mrp",
    "MRPConfig": "repedit.fit.mrp_training",
    "ContinualMRP": "repedit.fit.mrp",
    "erase_stream": "repedit.fit.stream",
    "apply": "repedit.rewrite.apply",
    "certificate": "repedit.rewrite.certificate",
    "Certificate": "repedit.rewrite.certificate",
    "slimmed": "repedit.rewrite.slim",
    "sliced": "repedit.rewrite.slice",
    "diff": "repedit.rewrite.diff",
    "export": "repedit.rewrite.export",
    "export_adapter": "repedit.rewrite.adapter",
    "gguf_check": "repedit.rewrite.gguf",
    "push": "repedit.rewrite.hub",
    "reload_check": "repedit.rewrite.verification",
    "compare": "repedit.metrics.benchmarks",
    "facts_accuracy": "repedit.metrics.facts",
    "audit": "repedit.auditing.api",
    "audit_classifier": "repedit.auditing.classifier",
    "Report": "repedit.auditing.report",
    "check_architecture": "repedit.arch.check",
    "register": "repedit.arch",
    "resolve": "repedit.arch",
}
_ROOMS = {
    name: f"repedit.{name}"
    for name in ("arch", "data", "errors", "explore", "fit", "metrics", "plot", "report", "vision")
} | {"recipes": "repedit.unlearning.recipes"}

__all__ = [*_NAMES, *_ROOMS, "__version__"]  # pyright: ignore


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(_ROOMS[name])
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
    from repedit.arch.check import check_architecture
    from repedit.auditing.api import audit
    from repedit.auditing.classifier import audit_classifier
    from repedit.auditing.report import Report
    from repedit.bridges import lens_hooks, to_lens, to_nnsight, wrap
    from repedit.delta import Delta
    from repedit.edit import Edit
    from repedit.fit.mrp import ContinualMRP, mrp
    from repedit.fit.mrp_training import MRPConfig
    from repedit.fit.stream import erase_stream
    from repedit.linear_maps import AffineMap, Chain, Diagonal, LowRank
    from repedit.metrics.benchmarks import compare
    from repedit.metrics.facts import facts_accuracy
    from repedit.models.default_model import fetch
    from repedit.models.subject import Subject, load
    from repedit.neurons.scores import CollinearWarning, Score, Scores, agreement, score
    from repedit.neurons.selection import prune, random_like, top
    from repedit.neurons.trajectory import Step, Trajectory, trajectory
    from repedit.plan import Plan
    from repedit.rewrite.adapter import export_adapter
    from repedit.rewrite.apply import apply
    from repedit.rewrite.certificate import Certificate, certificate
    from repedit.rewrite.diff import diff
    from repedit.rewrite.export import export
    from repedit.rewrite.gguf import gguf_check
    from repedit.rewrite.hub import push
    from repedit.rewrite.slice import sliced
    from repedit.rewrite.slim import slimmed
    from repedit.rewrite.verification import reload_check
    from repedit.sites import Point, Site
    from repedit.stats import Activity, CrossMoments, Moments
    from repedit.unlearning import recipes
    from repedit.unlearning.api import unlearn
