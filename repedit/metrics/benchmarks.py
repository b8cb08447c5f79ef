"""Two models side by side: on texts and prompts, and on the published benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

from repedit.activations.prediction import Effect, Predictions, effect, predictions
from repedit.arguments import checked
from repedit.data import Batches, mmlu
from repedit.data import muse as muse_data
from repedit.data import semeval as semeval_data
from repedit.errors import ArgumentError, NotFound, check_choice, check_whole, given
from repedit.io.files import is_folder
from repedit.metrics import muse, semeval, tofu
from repedit.metrics.generation import continuations
from repedit.metrics.membership import auc, tpr
from repedit.models.subject import Subject

# --- Texts and prompts


class PredictionOptions(TypedDict, total=False):
    """Options of `repedit.predictions`."""

    length: int
    batch_size: int
    limit_tokens: int | None
    progress: bool | None


@dataclass(frozen=True, eq=False)
@checked
class Comparison:
    """Predictions and generations of two models."""

    base: Mapping[str, Predictions]
    """By corpus name."""
    edited: Mapping[str, Predictions]
    prompts: tuple[str, ...]
    base_text: tuple[str, ...]
    edited_text: tuple[str, ...]

    def __repr__(self) -> str:
        effects = "; ".join(f"{name}: {self.effect(name)}" for name in self.base)
        return f"Comparison({effects or 'no text'}; {len(self.prompts)} prompts)"

    @checked
    def effect(self, name: str) -> Effect:
        """The relative drop of top-1 accuracy on a corpus, with its interval."""
        return effect(self.base[name], self.edited[name])


@checked
def compare(
    base: Subject,
    edited: Subject,
    corpora: Sequence[Batches] = (),
    *,
    prompts: Sequence[str] = (),
    tokens: int = 40,
    **options: Unpack[PredictionOptions],
) -> Comparison:
    """Perplexity and top-1 accuracy of both models on each corpus, and their greedy continuations of each prompt.

    Args:
        tokens: length of the continuations.
        options: passed to `predictions`: length, batch_size, limit_tokens, progress.
    Raises:
        ArgumentError: if two corpora have one name.
    """
    names = [corpus.name for corpus in corpora]
    if len({*names}) < len(names):
        raise ArgumentError(f"the corpora {names} do not have a name each; give one to repedit.data.read(..., name=)")
    sides = [{corpus.name: predictions(subject, corpus, **options) for corpus in corpora} for subject in (base, edited)]
    texts = [continuations(subject, prompts, tokens=tokens) for subject in (base, edited)]
    return Comparison(sides[0], sides[1], tuple(prompts), texts[0], texts[1])


# --- Published benchmarks

FOLDERS = {
    "tofu": ("tofu",), "semeval": ("semeval", "semeval_lume"), "muse": ("muse", "muse_news", "muse_books"),
    "mmlu": ("mmlu",),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
@checked
class BenchmarkComparison:
    """One benchmark on both models."""

    values: Mapping[str, tuple[float, float]]
    """(base, edited) of every part and aggregate."""
    verdict: str
    """On the edited model, judged against the base; for membership, how to read the values."""


@checked
def compare_benchmarks(
    base: Subject, edited: Subject, names: Sequence[str], directory: str | Path, *, limit: int | None = None
) -> dict[str, BenchmarkComparison]:
    """Benchmarks by name.

    "tofu" (forget10), "semeval" (validation split, with MMLU), "muse", "membership" (texts of SemEval).

    Args:
        directory: holds the data, or one folder for each benchmark: "tofu", "semeval" or "semeval_lume", "muse",
            "muse_news" or "muse_books", "mmlu".
        limit: rows of each part and questions of each subject, the first ones; None for all, as published.
    Raises:
        UnknownName: if there is no such benchmark.
        NotFound: if there is no such directory, or the data of a benchmark is missing.
        ArgumentError, DataError, MetricError, MissingDependency: as the benchmarks do.
    """
    check_whole(**given(limit=limit))
    check_suites(names, directory)
    return {name: SUITES[name](base, edited, Path(directory), limit) for name in names}


@checked
def check_suites(names: Sequence[str], directory: str | Path) -> None:
    """Refuse benchmarks that do not exist, and a directory that holds no data.

    Raises:
        UnknownName, NotFound: as `compare_benchmarks`.
    """
    for name in names:
        check_choice(SUITES, metrics=name)
    if not is_folder(directory):
        raise NotFound(f"{directory} is not a directory; give the one that holds the data of {', '.join(names)}")


def _tofu(base: Subject, edited: Subject, directory: Path, limit: int | None) -> BenchmarkComparison:
    root = _folder(directory, "tofu")
    before = tofu.evaluate(base, root, limit=limit)
    after = tofu.evaluate(edited, root, limit=limit, original=before)
    values = {
        f"{name} {term}": (value, after.parts[name].means[term])
        for name, part in before.parts.items()
        for term, value in part.means.items()
    }
    values["model utility"] = (before.model_utility, after.model_utility)
    return BenchmarkComparison(values, str(after.judgement))


def _semeval(base: Subject, edited: Subject, directory: Path, limit: int | None) -> BenchmarkComparison:
    root, questions = _folder(directory, "semeval"), mmlu(_folder(directory, "mmlu"), limit=limit)
    before = semeval.evaluate(base, root, questions, limit=limit)
    after = semeval.evaluate(edited, root, questions, limit=limit, original=before)
    values = {name: (value, after.parts[name]) for name, value in before.parts.items()}
    for name in ("task_aggregate", "membership", "mmlu", "final"):
        values[name.replace("_", " ")] = (getattr(before, name), getattr(after, name))
    return BenchmarkComparison(values, str(after.judgement))


def _muse(base: Subject, edited: Subject, directory: Path, limit: int | None) -> BenchmarkComparison:
    data = muse_data(_folder(directory, "muse"), limit=limit)
    before = muse.evaluate_data(base, data)
    after = muse.evaluate_data(edited, data, original=before)
    values = {
        "verbatim memorization": (before.verbatim.mean, after.verbatim.mean),
        "knowledge of forget": (before.knowledge_forget.mean, after.knowledge_forget.mean),
        "knowledge of retain": (before.knowledge_retain.mean, after.knowledge_retain.mean),
        "membership AUC": (before.membership_auc, after.membership_auc),
        "PrivLeak": (before.privleak, after.privleak),
    }
    return BenchmarkComparison(values, str(after.judgement))


def _membership(base: Subject, edited: Subject, directory: Path, limit: int | None) -> BenchmarkComparison:
    data = semeval_data(_folder(directory, "semeval"))
    values: dict[str, list[float]] = {"AUC": [], "TPR at 1 % FPR": []}
    for subject in (base, edited):
        scores = semeval.membership_scores(subject, data)
        member, other = (scores[side][:limit] for side in ("member", "nonmember"))
        values["AUC"].append(auc(member, other))
        values["TPR at 1 % FPR"].append(tpr(member, other))
    note = "an AUC of 1 means member, .5 that members are not told from other texts"
    return BenchmarkComparison({name: (before, after) for name, (before, after) in values.items()}, note)


def _folder(directory: Path, name: str) -> Path:
    return next((directory / folder for folder in FOLDERS[name] if (directory / folder).is_dir()), directory)


SUITES: Mapping[str, Callable[[Subject, Subject, Path, int | None], BenchmarkComparison]] = {
    "tofu": _tofu,
    "semeval": _semeval,
    "muse": _muse,
    "membership": _membership,
}
"""The benchmarks by name."""
