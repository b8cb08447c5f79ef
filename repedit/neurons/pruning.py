"""The whole pruning job: collect on one half of each corpus, prune, measure on the other half beside random controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repedit import data
from repedit.activations.collection import Collection, collect
from repedit.activations.prediction import Effect, effect, predictions
from repedit.data import Corpus
from repedit.edit import Edit
from repedit.errors import (
    ArgumentError,
    DataError,
    FingerprintError,
    SelectionError,
    check_finite_numbers,
    check_seed,
    check_whole,
)
from repedit.fit import gates
from repedit.models.subject import Subject
from repedit.neurons.scores import GRADIENT_IMPORTANCES, Scores, score
from repedit.neurons.selection import check_fraction, prune, random_like
from repedit.neurons.trajectory import trajectory


@dataclass(frozen=True)
class PruningOptions:
    """Options of `run_pruning`.

    Raises:
        ArgumentError: if a number is out of range. FractionError: if a share does not lie in [0, 1].
    """

    fraction: float | None = None
    """Share of the scored neurons; a learned mask finds its own."""
    sites: str | None = None
    """MLP neurons by default; a learned mask takes attention neurons too."""
    learned: bool = False
    """Learn the mask by gradient (repedit.fit.gates) in place of scoring."""
    importance: str = "abs"
    combine: str = "difference"
    steps: int = 1
    max_retain_drop: float | None = None
    """Per cent of the original top-1 accuracy."""
    cap_per_layer: float | None = None
    control: int = 0
    """Random controls to measure."""
    tokens: int = 8000
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole(steps=self.steps, tokens=self.tokens, batch_size=self.batch_size)
        check_whole(0, control=self.control)
        check_seed(seed=self.seed)
        check_finite_numbers(max_retain_drop=self.max_retain_drop)
        for name in ("fraction", "cap_per_layer"):
            if getattr(self, name) is not None:
                check_fraction(name, getattr(self, name))
        if self.fraction is None and not self.learned:
            raise ArgumentError("a fraction is needed, such as 0.01, unless the mask is learned")


@dataclass(frozen=True, eq=False)
class PruningResult:
    """An edit and what it does to both sets."""

    edit: Edit
    effects: Mapping[str, tuple[Effect, Effect]]
    """(forget, retain) of the edit and of each control."""
    exceeded: bool
    """The retain drop exceeds the limit."""

    @property
    def count(self) -> int:
        """Neurons pruned."""
        return sum(map_.rank_removed for map_ in self.edit.maps.values())


def run_pruning(
    subject: Subject,
    forget: str,
    retain: str,
    options: PruningOptions,
    *,
    scores: str | Path | None = None,
    on_stage: Callable[[str], None] = lambda text: None,
) -> PruningResult:
    """Prune, and measure on documents that were not collected on.

    Args:
        scores: a file of `Scores.save`, in place of collecting.
    Raises:
        FingerprintError: if the scores were made on another model.
    """
    corpora = [_corpus(name) for name in (forget, retain)]
    (forget_fit, forget_eval), (retain_fit, retain_eval) = (c.halves(options.seed) for c in corpora)
    edit = _edit(subject, forget_fit, retain_fit, options, scores, on_stage)
    reading: dict[str, Any] = {"limit_tokens": options.tokens, "batch_size": options.batch_size}
    on_stage(f"Measuring on {forget_eval} and {retain_eval}")
    named = {"pruned": edit} | {f"random {i}": random_like(edit, seed=options.seed + i) for i in range(options.control)}
    effects: dict[str, list[Effect]] = {label: [] for label in named}
    for corpus in (forget_eval, retain_eval):
        base = predictions(subject, corpus, **reading)
        for label, change in named.items():
            effects[label].append(effect(base, predictions(subject, corpus, edit=change, **reading), seed=options.seed))
    limit = options.max_retain_drop
    # A drop that is not defined is within no limit.
    exceeded = limit is not None and not effects["pruned"][1].drop <= limit
    return PruningResult(edit, {label: (found[0], found[1]) for label, found in effects.items()}, exceeded)


def collect_pair(
    subject: Subject,
    forget: data.Batches,
    retain: data.Batches,
    sites: str,
    importance: str,
    combine: str,
    *,
    tokens: int | None = None,
    **options: Any,
) -> tuple[Collection, Collection]:
    """Both collections a score needs, with gradients where it needs them."""
    if tokens is not None:
        options["limit_tokens"] = tokens
    gradients = importance in GRADIENT_IMPORTANCES or combine == "rank"
    first, last = (collect(subject, c, sites, gradients=gradients, **options) for c in (forget, retain))
    return first, last


def load_collection(path: str | Path, subject: Subject) -> Collection:
    """A saved collection of this model.

    Raises:
        FingerprintError: if it is another model's.
        CheckpointError: if the file is not a saved collection.
    """
    found = Collection.load(path)
    if found.model != subject.fingerprint():
        raise FingerprintError(
            f"{path} was collected on model {found.model[:12]}, this model is {subject.fingerprint()[:12]}; collect on this one"
        )
    return found


def _edit(
    subject: Subject,
    forget: Corpus,
    retain: Corpus,
    options: PruningOptions,
    scores: str | Path | None,
    on_stage: Callable[[str], None],
) -> Edit:
    if options.learned:
        on_stage(f"Learning a mask on {forget} and {retain}")
        sites = options.sites or "*.mlp.neurons,*.attn.neurons"
        return gates(subject, forget, retain, sites=sites, seed=options.seed)
    assert options.fraction is not None
    if scores is not None:
        return prune(_loaded(scores, subject), fraction=options.fraction, cap_per_layer=options.cap_per_layer)
    if options.steps > 1:
        on_stage(f"Pruning in {options.steps} steps, collecting again before each")
        return _stepped(subject, forget, retain, options.fraction / options.steps, options)
    on_stage(f"Collecting on {forget} and {retain}")
    reading = {"limit_tokens": options.tokens, "batch_size": options.batch_size}
    sites = options.sites or "*.mlp.neurons"
    sides = collect_pair(subject, forget, retain, sites, options.importance, options.combine, **reading)
    found = score(sides[0], sides[1], importance=options.importance, combine=options.combine)
    return prune(found, fraction=options.fraction, cap_per_layer=options.cap_per_layer)


def _stepped(subject: Subject, forget: Corpus, retain: Corpus, per_step: float, options: PruningOptions) -> Edit:
    """The best step of a trajectory, chosen on documents that are neither collected on nor reported on."""
    (forget_fit, forget_choose), (retain_fit, retain_choose) = (c.halves(options.seed + 1) for c in (forget, retain))
    reading = {"limit_tokens": options.tokens, "batch_size": options.batch_size}
    found = trajectory(
        subject,
        forget_fit,
        retain_fit,
        sites=options.sites or "*.mlp.neurons",
        fraction_per_step=per_step,
        steps=options.steps,
        importance=options.importance,
        combine=options.combine,
        evaluate_forget=forget_choose,
        evaluate_retain=retain_choose,
        max_retain_drop=options.max_retain_drop,
        cap_per_layer=options.cap_per_layer,
        seed=options.seed,
        collect_options=reading,
        evaluate_options=reading,
    )
    try:
        return found.best(options.max_retain_drop).edit
    except SelectionError:
        return found.steps[1].edit


def _corpus(name: str) -> Corpus:
    found = data.read(name)
    if not isinstance(found, Corpus):
        raise DataError(f"{name!r} holds token batches; pruning needs documents, to split them")
    return found


def _loaded(path: str | Path, subject: Subject) -> Scores:
    found = Scores.load(path)
    if found.provenance.get("model") != subject.fingerprint():
        raise FingerprintError(
            f"{path} holds scores of model {str(found.provenance.get('model'))[:12]}, this model is {subject.fingerprint()[:12]}; score this one"
        )
    return found
