"""The whole pruning job: collect on one half of each corpus, prune, measure on the other half beside random controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

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
    given,
)
from repedit.fit import gates
from repedit.models.subject import Subject
from repedit.neurons.scores import Scores, needs_gradients, score
from repedit.neurons.selection import check_fraction, prune, random_like
from repedit.neurons.trajectory import trajectory


class _Reading(TypedDict):
    """How much of a corpus is read, and how many rows at a time."""

    limit_tokens: int | None
    batch_size: int


@dataclass(frozen=True)
class PruningOptions:
    """Options of `run_pruning`.

    Raises:
        ArgumentError: if a number is out of range. FractionError: if a fraction does not lie in [0, 1].
    """

    fraction: float | None = None
    """Fraction of the scored neurons; not used by a learned mask, which finds its own size."""
    sites: str | None = None
    """MLP neurons by default; MLP and attention neurons for a learned mask."""
    learned: bool = False
    """Learn the mask by gradient (repedit.fit.gates) instead of scoring."""
    importance: str = "abs"
    combine: str = "difference"
    steps: int = 1
    max_retain_drop: float | None = None
    """Per cent of the original top-1 accuracy."""
    cap_per_layer: float | None = None
    control: int = 0
    """Number of random controls to measure."""
    tokens: int = 8000
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole(steps=self.steps, tokens=self.tokens, batch_size=self.batch_size)
        check_whole(0, control=self.control)
        check_seed(seed=self.seed)
        check_finite_numbers(**given(max_retain_drop=self.max_retain_drop))
        for name in ("fraction", "cap_per_layer"):
            if getattr(self, name) is not None:
                check_fraction(name, getattr(self, name))
        if self.fraction is None and not self.learned:
            raise ArgumentError("a fraction is needed, such as 0.01, unless the mask is learned")

    @property
    def reading(self) -> _Reading:
        """The options of `collect` and `predictions`."""
        return {"limit_tokens": self.tokens, "batch_size": self.batch_size}


@dataclass(frozen=True, eq=False)
class PruningResult:
    """An edit and its effect on both sets."""

    edit: Edit
    effects: Mapping[str, tuple[Effect, Effect]]
    """(forget, retain) of the edit and of each control."""
    exceeded: bool
    """Whether the retain drop exceeds the limit."""

    @property
    def count(self) -> int:
        """Number of pruned neurons."""
        return sum(map_.rank_removed for map_ in self.edit.maps.values())


def run_pruning(
    subject: Subject,
    forget: str,
    retain: str,
    options: PruningOptions,
    *,
    scores: Scores | None = None,
    on_stage: Callable[[str], None] = lambda text: None,
) -> PruningResult:
    """Prune, and measure the effect on documents that were not collected on.

    Args:
        scores: used instead of collecting.
        on_stage: called with a line of text before each stage.
    Raises:
        FingerprintError: if the scores were made on another model.
    """
    corpora = [_read_corpus(name) for name in (forget, retain)]
    (forget_fit, forget_eval), (retain_fit, retain_eval) = (c.halves(options.seed) for c in corpora)
    edit = _make_edit(subject, forget_fit, retain_fit, options, scores, on_stage)
    on_stage(f"Measuring on {forget_eval} and {retain_eval}")
    controls = {f"random {i}": random_like(edit, seed=options.seed + i) for i in range(options.control)}
    effects: dict[str, list[Effect]] = {}
    for corpus in (forget_eval, retain_eval):
        original = predictions(subject, corpus, **options.reading)
        for label, change in ({"pruned": edit} | controls).items():
            edited = predictions(subject, corpus, edit=change, **options.reading)
            effects.setdefault(label, []).append(effect(original, edited, seed=options.seed))
    limit = options.max_retain_drop
    # A drop that is not defined is within no limit.
    exceeded = limit is not None and not effects["pruned"][1].drop <= limit
    return PruningResult(edit, {label: (sides[0], sides[1]) for label, sides in effects.items()}, exceeded)


def collect_pair(
    subject: Subject,
    forget: data.Batches,
    retain: data.Batches,
    sites: str,
    importance: str,
    combine: str,
    *,
    tokens: int | None = None,
    batch_size: int = 8,
) -> tuple[Collection, Collection]:
    """The (forget, retain) collections of a score, with gradients where it needs them."""
    gradients = needs_gradients(importance, combine)
    first, last = (
        collect(subject, corpus, sites, gradients=gradients, limit_tokens=tokens, batch_size=batch_size)
        for corpus in (forget, retain)
    )
    return first, last


def load_collection(path: str | Path, subject: Subject) -> Collection:
    """Load a collection and check that it is of this model.

    Raises:
        FingerprintError: if it was collected on another model.
        CheckpointError: if the file does not hold a saved collection.
    """
    collection = Collection.load(path)
    if collection.model != subject.fingerprint():
        raise FingerprintError(
            f"{path} was collected on model {collection.model[:12]}, this model is {subject.fingerprint()[:12]}; "
            "collect on this one"
        )
    return collection


def _make_edit(
    subject: Subject,
    forget: Corpus,
    retain: Corpus,
    options: PruningOptions,
    scores: Scores | None,
    on_stage: Callable[[str], None],
) -> Edit:
    if options.learned:
        on_stage(f"Learning a mask on {forget} and {retain}")
        sites = options.sites or "*.mlp.neurons,*.attn.neurons"
        return gates(subject, forget, retain, sites=sites, seed=options.seed)
    assert options.fraction is not None
    if scores is not None:
        _check_scores(scores, subject)
        return prune(scores, fraction=options.fraction, cap_per_layer=options.cap_per_layer)
    sites = options.sites or "*.mlp.neurons"
    if options.steps > 1:
        on_stage(f"Pruning in {options.steps} steps, collecting again before each")
        return _best_step(subject, forget, retain, sites, options.fraction / options.steps, options)
    on_stage(f"Collecting on {forget} and {retain}")
    importance, combine = options.importance, options.combine
    collections = collect_pair(
        subject, forget, retain, sites, importance, combine, tokens=options.tokens, batch_size=options.batch_size
    )
    computed = score(*collections, importance=importance, combine=combine)
    return prune(computed, fraction=options.fraction, cap_per_layer=options.cap_per_layer)


def _best_step(
    subject: Subject, forget: Corpus, retain: Corpus, sites: str, fraction_per_step: float, options: PruningOptions
) -> Edit:
    """The best step of a trajectory, chosen on documents that are used for neither collecting nor the reported effects."""
    (forget_fit, forget_choose), (retain_fit, retain_choose) = (c.halves(options.seed + 1) for c in (forget, retain))
    path = trajectory(
        subject, forget_fit, retain_fit, sites=sites, fraction_per_step=fraction_per_step, steps=options.steps,
        importance=options.importance, combine=options.combine, evaluate_forget=forget_choose,
        evaluate_retain=retain_choose, max_retain_drop=options.max_retain_drop, cap_per_layer=options.cap_per_layer,
        seed=options.seed, collect_options=options.reading, evaluate_options=options.reading,
    )  # fmt: skip
    try:
        return path.best(options.max_retain_drop).edit
    except SelectionError:
        return path.steps[1].edit


def _read_corpus(name: str) -> Corpus:
    corpus = data.read(name)
    if not isinstance(corpus, Corpus):
        raise DataError(f"{name!r} holds token batches; pruning needs documents, to split them")
    return corpus


def _check_scores(scores: Scores, subject: Subject) -> None:
    model = scores.provenance.get("model")
    if model != subject.fingerprint():
        raise FingerprintError(
            f"the scores are of model {str(model)[:12]}, this model is {subject.fingerprint()[:12]}; score this one"
        )
