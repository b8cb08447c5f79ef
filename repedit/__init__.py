"""See what a capability of a language model is made of, cut it out of the weights, and test whether it is gone."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module that holds it, loaded on first use: `import repedit` is cheap.
_NAMES = {
    "load": "repedit.models",
    "Subject": "repedit.models",
    "fetch": "repedit.fetching",
    "wrap": "repedit.bridges",
    "to_lens": "repedit.bridges",
    "to_nnsight": "repedit.bridges",
    "lens_hooks": "repedit.bridges",
    "Site": "repedit.sites",
    "Point": "repedit.sites",
    "AffineMap": "repedit.maps",
    "LowRank": "repedit.maps",
    "Diagonal": "repedit.maps",
    "Chain": "repedit.maps",
    "Activity": "repedit.stats",
    "Moments": "repedit.stats",
    "CrossMoments": "repedit.stats",
    "collect": "repedit.activations.collection",
    "peaks": "repedit.activations.distribution",
    "max_activating": "repedit.activations.examples",
    "predictions": "repedit.activations.prediction",
    "score": "repedit.importance.scoring",
    "top": "repedit.importance.selection",
    "prune": "repedit.importance.selection",
    "agreement": "repedit.importance.scoring",
    "random_like": "repedit.importance.selection",
    "Score": "repedit.importance.scores",
    "Scores": "repedit.importance.scores",
    "CollinearWarning": "repedit.importance.scoring",
    "trajectory": "repedit.importance.trajectories",
    "Trajectory": "repedit.importance.trajectories",
    "Step": "repedit.importance.shelf",
    "Edit": "repedit.edit",
    "Delta": "repedit.delta",
    "unlearn": "repedit.gradient.unlearning",
    "Plan": "repedit.plan",
    "mrp": "repedit.fit.mrp",
    "MRPConfig": "repedit.fit.training",
    "ContinualMRP": "repedit.fit.continual",
    "erase_stream": "repedit.fit.streams",
    "apply": "repedit.rewrite.live",
    "certificate": "repedit.rewrite.certificates",
    "Certificate": "repedit.rewrite.certificates",
    "slimmed": "repedit.rewrite.slim",
    "sliced": "repedit.rewrite.slice",
    "diff": "repedit.rewrite.difference",
    "export": "repedit.rewrite.checkpoint",
    "export_adapter": "repedit.rewrite.adapter",
    "gguf_check": "repedit.rewrite.gguf",
    "push": "repedit.rewrite.publishing",
    "reload_check": "repedit.rewrite.reloading",
    "compare": "repedit.metrics.comparison",
    "facts_accuracy": "repedit.metrics.probability",
    "audit": "repedit.attacks.audit",
    "audit_classifier": "repedit.attacks.classifier",
    "Report": "repedit.attacks.judging.evidence",
    "check_architecture": "repedit.arch.check",
    "register": "repedit.arch",
    "resolve": "repedit.arch",
}
_ROOMS = {
    name: f"repedit.{name}"
    for name in ("arch", "data", "errors", "explore", "fit", "metrics", "plot", "report", "vision")
} | {"recipes": "repedit.gradient.recipes"}

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
    from repedit.activations.collection import collect
    from repedit.activations.distribution import peaks
    from repedit.activations.examples import max_activating
    from repedit.activations.prediction import predictions
    from repedit.arch import register, resolve
    from repedit.arch.check import check_architecture
    from repedit.attacks.audit import audit
    from repedit.attacks.classifier import audit_classifier
    from repedit.attacks.judging.evidence import Report
    from repedit.bridges import lens_hooks, to_lens, to_nnsight, wrap
    from repedit.delta import Delta
    from repedit.edit import Edit
    from repedit.fetching import fetch
    from repedit.fit.continual import ContinualMRP
    from repedit.fit.mrp import mrp
    from repedit.fit.streams import erase_stream
    from repedit.fit.training import MRPConfig
    from repedit.gradient import recipes
    from repedit.gradient.unlearning import unlearn
    from repedit.importance.scores import Score, Scores
    from repedit.importance.scoring import CollinearWarning, agreement, score
    from repedit.importance.selection import prune, random_like, top
    from repedit.importance.shelf import Step
    from repedit.importance.trajectories import Trajectory, trajectory
    from repedit.maps import AffineMap, Chain, Diagonal, LowRank
    from repedit.metrics.comparison import compare
    from repedit.metrics.probability import facts_accuracy
    from repedit.models import Subject, load
    from repedit.plan import Plan
    from repedit.rewrite.adapter import export_adapter
    from repedit.rewrite.certificates import Certificate, certificate
    from repedit.rewrite.checkpoint import export
    from repedit.rewrite.difference import diff
    from repedit.rewrite.gguf import gguf_check
    from repedit.rewrite.live import apply
    from repedit.rewrite.publishing import push
    from repedit.rewrite.reloading import reload_check
    from repedit.rewrite.slice import sliced
    from repedit.rewrite.slim import slimmed
    from repedit.sites import Point, Site
    from repedit.stats import Activity, CrossMoments, Moments
