"""Prune in small steps and evaluate both capabilities after each; every step is an edit, and no weight is written.

Selective pruning, Pochinkov and Schoots 2024 (arXiv 2403.01267), section 3: collect on the current model, score, remove
the next few neurons, evaluate, repeat.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from repedit.activations.collection import collect
from repedit.activations.forward import batches_of
from repedit.activations.prediction import Predictions, drop, predictions
from repedit.arguments import checked
from repedit.data import Batches, Corpus, Tokens
from repedit.edit import Edit
from repedit.errors import (
    ArgumentError,
    CheckpointError,
    FingerprintError,
    FractionError,
    OverlapError,
    SelectionError,
    check_finite_numbers,
    check_seed,
    check_whole,
    given,
)
from repedit.io.files import make_folder, user_path, write_text
from repedit.io.store import JsonStore, content_hash
from repedit.io.text import json_copy, read_json
from repedit.models.subject import Subject
from repedit.neurons.scores import Scores, needs_gradients, score
from repedit.neurons.selection import check_fraction, prune
from repedit.sites import Site


@dataclass(frozen=True, eq=False)
@checked
class Step:
    """One point of a trajectory."""

    fraction: float
    """Fraction of all scored neurons that are pruned."""
    edit: Edit
    forget: Predictions
    retain: Predictions


@dataclass(frozen=True, eq=False)
@checked
class Trajectory:
    """Steps of growing edits; the first one prunes nothing."""

    steps: tuple[Step, ...]
    provenance: Mapping[str, Any]

    def __repr__(self) -> str:
        retain, forget = self.drops()[-1]
        drops = ", ".join(
            f"{name} drop {'not defined' if math.isnan(value) else f'{value:.1f} %'}"
            for name, value in (("forget", forget), ("retain", retain))
        )
        return f"Trajectory({len(self.steps)} steps to {self.steps[-1].fraction:.3g}: {drops})"

    def drops(self) -> list[tuple[float, float]]:
        """(retain drop, forget drop) of each step, per cent of the original top-1 accuracy; NaN where that is zero."""
        first = self.steps[0]
        return [(drop(first.retain, s.retain), drop(first.forget, s.forget)) for s in self.steps]

    def selectivities(self) -> list[float]:
        """Forget drop minus retain drop of each step, in percentage points."""
        return [forget - retain for retain, forget in self.drops()]

    @checked
    def best(self, retain_drop_at_most: float | None = 10.0) -> Step:
        """The step of largest selectivity whose retain drop, in per cent, is within the limit (None: no limit).

        Raises:
            SelectionError: if no step that prunes anything is within the limit, or the original predicts nothing right.
        """
        self._check_defined()
        points = list(zip(self.steps, self.drops(), strict=True))[1:]
        allowed = [(f - r, step) for step, (r, f) in points if retain_drop_at_most is None or r <= retain_drop_at_most]
        if not allowed:
            raise SelectionError(f"no step keeps the retain drop within {retain_drop_at_most} %; take smaller steps")
        return max(allowed, key=lambda pair: pair[0])[1]

    def area(self) -> float:
        """Separability: area under (acc_retain, acc_forget) over the triangle 0.5 acc_retain0 acc_forget0.

        Raises:
            SelectionError: if the original predicts nothing right, so that there is no triangle.
        """
        self._check_defined()
        # Backwards and stable: steps of equal retain accuracy stay in the order of the path.
        path = self.steps[::-1]
        retain, forget = (np.array([getattr(step, side).top1 for step in path]) for side in ("retain", "forget"))
        order = np.argsort(retain, kind="stable")
        return float(np.trapezoid(forget[order], retain[order]) / (0.5 * retain[-1] * forget[-1]))

    def _check_defined(self) -> None:
        for side in ("forget", "retain"):
            if not getattr(self.steps[0], side).top1:
                raise SelectionError(
                    f"no token of the {side} set was predicted right before the edit, so no drop is defined; give other text"
                )

    def to_json(self) -> str:
        """Fractions, drops and losses of every step, with the provenance."""
        rows = [
            {"fraction": s.fraction}
            | {
                k: None if math.isnan(v) else v
                for k, v in {"retain_drop": r, "forget_drop": f, "selectivity": f - r}.items()
            }
            | {"forget_loss": s.forget.mean_loss, "retain_loss": s.retain.mean_loss}
            for s, (r, f) in zip(self.steps, self.drops(), strict=True)
        ]
        return json.dumps({"steps": rows, "provenance": dict(self.provenance)}, indent=2, sort_keys=True)


@checked
def trajectory(
    subject: Subject,
    forget: Corpus | Tokens,
    retain: Corpus | Tokens,
    *,
    sites: str | Site | list[str | Site] = "*.mlp.neurons",
    fraction_per_step: float = 0.01,
    steps: int = 10,
    recollect: bool = True,
    importance: str = "abs",
    combine: str = "difference",
    evaluate_forget: Batches | None = None,
    evaluate_retain: Batches | None = None,
    stop: Callable[[Trajectory], bool] | None = None,
    max_retain_drop: float | None = None,
    seed: int = 0,
    resume: str | Path | None = None,
    allow_overlap: bool = False,
    collect_options: Mapping[str, Any] | None = None,
    score_options: Mapping[str, Any] | None = None,
    evaluate_options: Mapping[str, Any] | None = None,
    cap_per_layer: float | None = None,
    progress: bool | None = None,
) -> Trajectory:
    """Prune `fraction_per_step` of the neurons at a time, and evaluate both sets after each step.

    Without evaluation corpora, each corpus is split by document into a half to collect on and a half to evaluate on.

    Args:
        recollect: collect and score again on the pruned model before each step; if False, every step takes the next
            neurons of one order.
        stop: called with the trajectory so far; True ends it.
        max_retain_drop: end after the first step whose retain drop exceeds this many per cent.
        resume: a folder; finished steps are saved there, and a later call with the same inputs resumes from them.
        allow_overlap: accept evaluation chunks that were collected on; the provenance records their number.
    Raises:
        FractionError: if steps * fraction_per_step exceeds 1.
        OverlapError: if collection and evaluation share chunks.
        ArgumentError: if tokenised batches come without a corpus to evaluate on.
        FingerprintError: if `resume` holds steps of another run.
    """
    check_fraction("fraction_per_step", fraction_per_step)
    check_whole(steps=steps)
    check_seed(seed=seed)
    check_finite_numbers(**given(max_retain_drop=max_retain_drop))
    if steps * fraction_per_step > 1 + 1e-9:
        raise FractionError(
            f"{steps} steps of {fraction_per_step} prune more than everything; at most {int(1 / fraction_per_step + 1e-9)} steps"
        )
    forget_fit, forget_eval = _collect_and_evaluate_corpora("forget", forget, evaluate_forget, seed)
    retain_fit, retain_eval = _collect_and_evaluate_corpora("retain", retain, evaluate_retain, seed)
    run = _Run(
        subject, sites, (forget_fit, retain_fit), (forget_eval, retain_eval),
        collecting={"gradients": needs_gradients(importance, combine), "progress": progress, **(collect_options or {})},
        scoring={"importance": importance, "combine": combine, **(score_options or {})},
        evaluating={"progress": progress, **(evaluate_options or {})},
        fraction_per_step=fraction_per_step, recollect=recollect, cap_per_layer=cap_per_layer,
    )  # fmt: skip
    provenance = run.provenance() | {"seed": seed, "overlap": run.overlap(allow_overlap)}

    def ended(path: Trajectory) -> bool:
        over = max_retain_drop is not None and not path.drops()[-1][0] <= max_retain_drop
        return over or (stop is not None and stop(path))

    numbers = tqdm(range(1, steps + 1), desc="trajectory", disable=None if progress is None else not progress)
    return run.run(numbers, _SavedSteps(resume, provenance), provenance, ended)


@dataclass(frozen=True)
class _Run:
    """The inputs and options of every step of a trajectory."""

    subject: Subject
    sites: str | Site | list[str | Site]
    fit: tuple[Batches, Batches]
    """(forget, retain)"""
    evaluation: tuple[Batches, Batches]
    collecting: Mapping[str, Any]
    scoring: Mapping[str, Any]
    evaluating: Mapping[str, Any]
    fraction_per_step: float
    recollect: bool
    cap_per_layer: float | None

    def run(
        self,
        numbers: Iterable[int],
        saved: _SavedSteps,
        provenance: Mapping[str, Any],
        ended: Callable[[Trajectory], bool],
    ) -> Trajectory:
        """Take step 0, which prunes nothing, and the given steps until one ends the path; saved steps are loaded."""
        unpruned = Edit({}, {"method": "none", "model": provenance["model"]})
        path = Trajectory((saved.get(0) or saved.put(0, self.evaluate(0.0, unpruned)),), provenance)
        order: Scores | None = None
        for number in numbers:
            step, last = saved.get(number), path.steps[-1].edit
            if step is None:
                if order is None or self.recollect:
                    order = self.scores_of(last if number > 1 and self.recollect else None)
                edit = _extended(last, order, number, self.fraction_per_step, self.cap_per_layer)
                step = saved.put(number, self.evaluate(number * self.fraction_per_step, edit))
            path = replace(path, steps=(*path.steps, step))
            if ended(path):
                break
        return path

    def scores_of(self, edit: Edit | None) -> Scores:
        sides = [collect(self.subject, c, self.sites, edit=edit, **self.collecting) for c in self.fit]
        return score(sides[0], sides[1], **({"warn": edit is None} | dict(self.scoring)))

    def evaluate(self, fraction: float, edit: Edit) -> Step:
        sides = [predictions(self.subject, c, edit=edit, **self.evaluating) for c in self.evaluation]
        return Step(fraction, edit, sides[0], sides[1])

    def overlap(self, allowed: bool) -> int:
        """Number of chunks that are both collected and evaluated on."""
        shared = sum(_count_shared_chunks(self.subject, a, b) for a, b in zip(self.fit, self.evaluation, strict=True))
        if shared and not allowed:
            raise OverlapError(
                f"collection and evaluation share {shared} chunks of tokens; split by document, or pass allow_overlap=True"
            )
        return shared

    def provenance(self) -> dict[str, Any]:
        names = ("forget", "retain", "evaluate_forget", "evaluate_retain")
        data = {name: c.hash for name, c in zip(names, (*self.fit, *self.evaluation), strict=True)}
        options = {
            "collect": _recorded(self.collecting),
            "score": _recorded(self.scoring),
            "evaluate": _recorded(self.evaluating),
        }
        return {
            "method": "trajectory", "sites": str(self.sites), "model": self.subject.fingerprint(), "data": data,
            "options": options, "fraction_per_step": self.fraction_per_step, "recollect": self.recollect,
            "cap_per_layer": self.cap_per_layer,
        }  # fmt: skip


def _collect_and_evaluate_corpora(
    role: str, corpus: Corpus | Tokens, evaluate: Batches | None, seed: int
) -> tuple[Batches, Batches]:
    if evaluate is not None:
        return corpus, evaluate
    if isinstance(corpus, Corpus):
        return corpus.halves(seed)
    raise ArgumentError(f"the {role} batches are tokens, which have no documents to split by; pass evaluate_{role}")


def _extended(edit: Edit, scores: Scores, number: int, per_step: float, cap: float | None) -> Edit:
    """The edit with the next neurons added; pruned neurons get the highest scores, so they remain and count."""
    pruned = {site: ~map_.kept for site, map_ in edit.maps.items()}  # type: ignore[attr-defined]
    by_site = {}
    for site, current in scores.items():
        values = current.values.clone()
        if site in pruned:
            values[pruned[site]] = torch.inf
        by_site[site] = replace(current, values=values)
    return prune(Scores(by_site, scores.provenance), fraction=min(1.0, number * per_step), cap_per_layer=cap)


def _recorded(options: Mapping[str, Any]) -> dict[str, str]:
    # A function is recorded by its name, because its address differs from run to run.
    return {k: getattr(v, "__qualname__", str(v)) for k, v in sorted(options.items()) if k != "progress"}


def _count_shared_chunks(subject: Subject, first: Batches, second: Batches) -> int:
    """Number of token chunks that two corpora have in common."""

    def chunks(corpus: Batches) -> set[bytes]:
        return {
            hashlib.sha256(ids[mask].cpu().numpy().tobytes()).digest()
            for batch in batches_of(subject, corpus)
            for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
        }

    return len(chunks(first) & chunks(second))


# --- Finished steps in a folder


class _SavedSteps:
    """The finished steps of a trajectory in a folder, so that an interrupted one is resumed; without a folder, none.

    run.json holds the provenance, step-NNN.json the predictions and step-NNN.safetensors the edit.
    """

    def __init__(self, folder: str | Path | None, provenance: Mapping[str, Any]) -> None:
        self._folder = Path() if folder is None else user_path(folder)
        self._store = JsonStore(None if folder is None else self._folder, remedy="remove it, and it is computed again")
        self._key = content_hash(provenance)
        if self._store.folder is None:
            return
        make_folder(self._folder)
        path, current = self._folder / "run.json", json_copy(provenance, "the provenance of a trajectory")
        if path.exists():
            saved = read_json(path, remedy="remove it, or give another directory")
            different = [key for key in sorted({*saved, *current}) if saved.get(key) != current.get(key)]
            if different:
                key = different[0]
                raise FingerprintError(
                    f"{self._folder} holds steps of another run: {key} was {saved.get(key)}, now {current.get(key)}; give another directory"
                )
        write_text(path, json.dumps(current, sort_keys=True, indent=2))

    def get(self, number: int) -> Step | None:
        """A finished step, or None."""
        name = f"step-{number:03d}"
        row = self._store.get(name, self._key)
        if row is None:
            return None
        try:
            forget, retain = (_predictions(row[side]) for side in ("forget", "retain"))
            fraction = float(row["fraction"])
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            path = self._folder / f"{name}.json"
            raise CheckpointError(
                f"{path} is not a step of a run: {error!r}; remove it, and it is computed again"
            ) from error
        return Step(fraction, Edit.load(self._folder / f"{name}.safetensors"), forget, retain)

    def put(self, number: int, step: Step) -> Step:
        """Save a step; it counts as finished once its JSON file exists, which is therefore written last."""
        if self._store.folder is not None:
            name = f"step-{number:03d}"
            step.edit.save(self._folder / f"{name}.safetensors")
            row = {"fraction": step.fraction, "forget": _row(step.forget), "retain": _row(step.retain)}
            self._store.put(name, self._key, row)
        return step


def _row(predictions: Predictions) -> dict[str, Any]:
    return {"ids": list(predictions.ids)} | {
        k: getattr(predictions, k).tolist() for k in ("count", "hits", "hits10", "loss")
    }


def _predictions(row: Mapping[str, Any]) -> Predictions:
    arrays = {k: np.array(row[k], dtype=np.int64) for k in ("count", "hits", "hits10")}
    return Predictions(tuple(row["ids"]), **arrays, loss=np.array(row["loss"], dtype=np.float64))
