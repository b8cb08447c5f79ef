"""Texts, prompts and the published benchmarks on two models side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repedit.activations.prediction import Effect, Predictions, effect, predictions
from repedit.data import Batches, mmlu, semeval
from repedit.errors import NotFound, UnknownName, check_whole, nearest
from repedit.io.files import is_folder
from repedit.metrics.generation import continuations
from repedit.metrics.membership import auc, tpr
from repedit.metrics.semeval import evaluate as semeval_score
from repedit.metrics.semeval import membership_scores
from repedit.metrics.tofu import evaluate as tofu_score
from repedit.models.subject import Subject

# --- Two models on the same texts and prompts, side by side


@dataclass(frozen=True, eq=False)
class Comparison:
    """What changed from one model to another."""

    base: Mapping[str, Predictions]
    """By corpus name."""
    edited: Mapping[str, Predictions]
    prompts: tuple[str, ...]
    base_text: tuple[str, ...]
    edited_text: tuple[str, ...]

    def effect(self, name: str) -> Effect:
        """The relative drop of top-1 accuracy on a corpus, with its interval."""
        return effect(self.base[name], self.edited[name])


def compare(
    base: Subject,
    edited: Subject,
    corpora: Sequence[Batches] = (),
    *,
    prompts: Sequence[str] = (),
    tokens: int = 40,
    **options: Any,
) -> Comparison:
    """Perplexity and top-1 accuracy of both models on each corpus, and their greedy continuations of each prompt.

    Args:
        options: passed to `predictions`: length, batch_size, limit_tokens, progress.
    """
    sides = [{corpus.name: predictions(subject, corpus, **options) for corpus in corpora} for subject in (base, edited)]
    texts = [continuations(subject, prompts, tokens=tokens) for subject in (base, edited)]
    return Comparison(sides[0], sides[1], tuple(prompts), texts[0], texts[1])


# --- The published benchmarks on two models side by side: every part before and after, and one verdict on the edit


FOLDERS = {"tofu": ("tofu",), "semeval": ("semeval", "semeval_lume"), "mmlu": ("mmlu",)}


@dataclass(frozen=True, eq=False)
class Beside:
    """One benchmark on both models."""

    values: Mapping[str, tuple[float, float]]
    """(base, edited) of every part and aggregate."""
    verdict: str
    """On the edited model, beside the base; for membership what 1 means."""


def measured(
    base: Subject, edited: Subject, names: Sequence[str], directory: str | Path, *, limit: int | None = None
) -> dict[str, Beside]:
    """Benchmarks by name: "tofu" (forget10), "semeval" (validation split, with MMLU), "membership" (texts of SemEval).

    Args:
        directory: holds the data, or one folder of each: "tofu", "semeval" or "semeval_lume", "mmlu".
        limit: rows of each part and questions of each subject, the first ones; None for all, as published.
    Raises:
        UnknownName: if there is no such benchmark.
        NotFound: if there is no such directory, or it lacks the data of one.
        ArgumentError, DataError, MetricError, MissingDependency: as the benchmarks do.
    """
    check_whole(limit=limit)
    for name in names:
        if name not in SUITES:
            raise UnknownName(f"metrics={name!r}; {nearest(name, SUITES)}")
    if not is_folder(directory):
        raise NotFound(f"{directory} is no directory; give the one that holds the data of {', '.join(names)}")
    return {name: SUITES[name](base, edited, Path(directory), limit) for name in names}


def _tofu(base: Subject, edited: Subject, directory: Path, limit: int | None) -> Beside:
    place = _folder(directory, "tofu")
    before = tofu_score(base, place, limit=limit)
    after = tofu_score(edited, place, limit=limit, original=before)
    values = {
        f"{part} {term}": (value, after.parts[part].means[term])
        for part, found in before.parts.items()
        for term, value in found.means.items()
    }
    return Beside({**values, "model utility": (before.model_utility, after.model_utility)}, str(after.judgement))


def _semeval(base: Subject, edited: Subject, directory: Path, limit: int | None) -> Beside:
    place, questions = _folder(directory, "semeval"), mmlu(_folder(directory, "mmlu"), limit=limit)
    before = semeval_score(base, place, questions, limit=limit)
    after = semeval_score(edited, place, questions, limit=limit, original=before)
    values = {name: (value, after.parts[name]) for name, value in before.parts.items()}
    for name in ("task_aggregate", "membership", "mmlu", "final"):
        values[name.replace("_", " ")] = (getattr(before, name), getattr(after, name))
    return Beside(values, str(after.judgement))


def _membership(base: Subject, edited: Subject, directory: Path, limit: int | None) -> Beside:
    data = semeval(_folder(directory, "semeval"))
    found = []
    for subject in (base, edited):
        scored = membership_scores(subject, data)
        member, other = (scored[side][:limit] for side in ("member", "nonmember"))
        found.append((auc(member, other), tpr(member, other)))
    (auc_before, tpr_before), (auc_after, tpr_after) = found
    values = {"AUC": (auc_before, auc_after), "TPR at 1 % FPR": (tpr_before, tpr_after)}
    return Beside(values, "an AUC of 1 means member, .5 that members are not told from other texts")


def _folder(directory: Path, name: str) -> Path:
    return next((directory / folder for folder in FOLDERS[name] if (directory / folder).is_dir()), directory)


SUITES: Mapping[str, Callable[[Subject, Subject, Path, int | None], Beside]] = {
    "tofu": _tofu,
    "semeval": _semeval,
    "membership": _membership,
}
"""Every benchmark by its name."""
