"""Prune in small steps and watch both capabilities: each step is an edit, nothing writes weights.

Selective pruning, Pochinkov and Schoots 2024 (arXiv 2403.01267), section 3: collect on the current model, score, remove
the next few neurons, evaluate, repeat.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from repedit.activations import collect
from repedit.data import Batches, Corpus
from repedit.edit import Edit
from repedit.errors import FingerprintError, FractionError, OverlapError, SelectionError
from repedit.importance import GRADIENT_IMPORTANCES, score
from repedit.models import Subject
from repedit.prediction import Predictions, drop, predictions
from repedit.scores import Scores
from repedit.selection import check_fraction, prune
from repedit.sites import Site


@dataclass(frozen=True, eq=False)
class Step:
    """One point of a trajectory."""

    fraction: float
    """Share of all scored neurons that are pruned."""
    edit: Edit
    forget: Predictions
    retain: Predictions


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Steps of growing edits; the first one prunes nothing."""

    steps: tuple[Step, ...]
    provenance: Mapping[str, Any]

    def drops(self) -> list[tuple[float, float]]:
        """(retain drop, forget drop) of each step, per cent of the original top-1 accuracy."""
        first = self.steps[0]
        return [(drop(first.retain, s.retain), drop(first.forget, s.forget)) for s in self.steps]

    def selectivities(self) -> list[float]:
        """Forget drop minus retain drop of each step, in points."""
        return [forget - retain for retain, forget in self.drops()]

    def best(self, retain_drop_at_most: float | None = 10.0) -> Step:
        """The step of largest selectivity whose retain drop, in per cent, is within the limit (None: no limit).

        Raises:
            SelectionError: if no step that prunes anything is within the limit.
        """
        points = list(zip(self.steps, self.drops(), strict=True))[1:]
        allowed = [(f - r, step) for step, (r, f) in points if retain_drop_at_most is None or r <= retain_drop_at_most]
        if not allowed:
            raise SelectionError(f"no step keeps the retain drop within {retain_drop_at_most} %; take smaller steps")
        return max(allowed, key=lambda pair: pair[0])[1]

    def max_selectivity(self, retain_drop_at_most: float | None = 10.0) -> float:
        """The selectivity of `best`."""
        best = self.best(retain_drop_at_most)
        return self.selectivities()[self.steps.index(best)]

    def area(self) -> float:
        """Separability: area under (acc_retain, acc_forget) over the triangle 0.5 acc_retain0 acc_forget0."""
        retain, forget = (np.array([getattr(s, side).top1 for s in self.steps]) for side in ("retain", "forget"))
        order = np.argsort(retain)
        return float(np.trapezoid(forget[order], retain[order]) / (0.5 * retain[0] * forget[0]))

    def to_json(self) -> str:
        """Fractions, drops and losses of every step, with the provenance."""
        rows = [
            {"fraction": s.fraction, "retain_drop": r, "forget_drop": f, "selectivity": f - r}
            | {"forget_loss": s.forget.mean_loss, "retain_loss": s.retain.mean_loss}
            for s, (r, f) in zip(self.steps, self.drops(), strict=True)
        ]
        return json.dumps({"steps": rows, "provenance": dict(self.provenance)}, indent=2, sort_keys=True)


def trajectory(
    subject: Subject,
    forget: Corpus,
    retain: Corpus,
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
    """Prune `fraction_per_step` of the neurons at a time, evaluating both sets after each step.

    Where no evaluation corpora are given, each corpus is split by document into a half to collect on and a half to
    evaluate on.

    Args:
        recollect: collect and score again on the pruned model before each step; False takes longer prefixes of one order.
        stop: called with the trajectory so far; True ends it.
        max_retain_drop: end after the first step whose retain drop exceeds this many per cent.
        resume: a directory; finished steps are saved there, and a later call with the same inputs goes on from them.
        allow_overlap: accept evaluation chunks that were collected on; the provenance then says so.
    Raises:
        FractionError: if steps * fraction_per_step exceeds 1.
        OverlapError: if collection and evaluation share chunks.
        FingerprintError: if `resume` holds steps of another run.
    """
    check_fraction("fraction_per_step", fraction_per_step)
    if steps * fraction_per_step > 1 + 1e-9:
        raise FractionError(
            f"{steps} steps of {fraction_per_step} prune more than everything; at most {int(1 / fraction_per_step + 1e-9)} steps"
        )
    forget_fit, forget_eval = (forget, evaluate_forget) if evaluate_forget is not None else forget.halves(seed)
    retain_fit, retain_eval = (retain, evaluate_retain) if evaluate_retain is not None else retain.halves(seed)
    shared = sum(_shared(subject, a, b) for a, b in ((forget_fit, forget_eval), (retain_fit, retain_eval)))
    if shared and not allow_overlap:
        raise OverlapError(
            f"collection and evaluation share {shared} chunks of tokens; split by document, or pass allow_overlap=True"
        )
    provenance = {
        "method": "trajectory", "importance": importance, "combine": combine, "fraction_per_step": fraction_per_step,
        "recollect": recollect, "sites": str(sites), "seed": seed, "model": subject.fingerprint(), "overlap": shared,
        "data": {role: c.hash for role, c in (("forget", forget_fit), ("retain", retain_fit), ("evaluate_forget", forget_eval), ("evaluate_retain", retain_eval))},
        "options": {"collect": _plain(collect_options), "score": _plain(score_options), "cap": cap_per_layer},
    }  # fmt: skip
    shelf = _Shelf(resume, provenance)

    def scored(edit: Edit | None) -> Scores:
        options = {
            "gradients": importance in GRADIENT_IMPORTANCES or combine == "rank",
            "progress": progress,
            **(collect_options or {}),
        }
        sides = [collect(subject, c, sites, edit=edit, **options) for c in (forget_fit, retain_fit)]
        return score(
            sides[0], sides[1], importance=importance, combine=combine, warn=edit is None, **(score_options or {})
        )

    def evaluated(fraction: float, edit: Edit) -> Step:
        options = {"progress": progress, **(evaluate_options or {})}
        sides = [predictions(subject, c, edit=edit, **options) for c in (forget_eval, retain_eval)]
        return Step(fraction, edit, sides[0], sides[1])

    done = [shelf.get(0) or shelf.put(0, evaluated(0.0, Edit({}, {"method": "none", "model": provenance["model"]})))]
    order: Scores | None = None
    for number in tqdm(range(1, steps + 1), desc="trajectory", disable=None if progress is None else not progress):
        step = shelf.get(number)
        if step is None:
            if order is None or recollect:
                order = scored(done[-1].edit if number > 1 else None)
            edit = _grown(done[-1].edit, order, number, fraction_per_step, cap_per_layer)
            step = shelf.put(number, evaluated(number * fraction_per_step, edit))
        done.append(step)
        so_far = Trajectory(tuple(done), provenance)
        if (stop is not None and stop(so_far)) or (
            max_retain_drop is not None and so_far.drops()[-1][0] > max_retain_drop
        ):
            break
    return Trajectory(tuple(done), provenance)


def _grown(edit: Edit, scores: Scores, number: int, per_step: float, cap: float | None) -> Edit:
    """The edit with the next neurons added; what is pruned already scores highest, so it stays and counts."""
    pruned = {site: ~map_.kept for site, map_ in edit.maps.items()}  # type: ignore[attr-defined]
    marked = {}
    for site, found in scores.items():
        values = found.values.clone()
        if site in pruned:
            values[pruned[site]] = torch.inf
        marked[site] = replace(found, values=values)
    return prune(Scores(marked, scores.provenance), fraction=min(1.0, number * per_step), cap_per_layer=cap)


def _plain(options: Mapping[str, Any] | None) -> dict[str, str]:
    return {key: str(value) for key, value in sorted((options or {}).items())}


def _shared(subject: Subject, first: Batches, second: Batches) -> int:
    """How many token chunks two corpora have in common."""

    def chunks(corpus: Batches) -> set[bytes]:
        return {
            hashlib.sha256(ids[mask].numpy().tobytes()).digest()
            for batch in corpus.batches(subject.tokenizer)
            for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
        }

    return len(chunks(first) & chunks(second))


class _Shelf:
    """Finished steps on disk, so that an interrupted run goes on."""

    def __init__(self, folder: str | Path | None, provenance: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        text, path = json.dumps(provenance, sort_keys=True, indent=2), self.folder / "run.json"
        if path.exists() and path.read_text() != text:
            old = json.loads(path.read_text())
            key = next(k for k in sorted({*old, *provenance}) if old.get(k) != json.loads(text).get(k))
            raise FingerprintError(
                f"{self.folder} holds steps of another run: {key} was {old.get(key)}, now {provenance.get(key)}; give another directory"
            )
        path.write_text(text)

    def get(self, number: int) -> Step | None:
        if self.folder is None or not (self.folder / f"step-{number:03d}.json").exists():
            return None
        row = json.loads((self.folder / f"step-{number:03d}.json").read_text())
        sides = {side: _predictions(row[side]) for side in ("forget", "retain")}
        return Step(
            row["fraction"], Edit.load(self.folder / f"step-{number:03d}.safetensors"), sides["forget"], sides["retain"]
        )

    def put(self, number: int, step: Step) -> Step:
        if self.folder is not None:
            step.edit.save(self.folder / f"step-{number:03d}.safetensors")
            row = {"fraction": step.fraction} | {side: _row(getattr(step, side)) for side in ("forget", "retain")}
            path = self.folder / f"step-{number:03d}.json"
            # The JSON marks the step as finished, so it comes last and at once.
            path.with_suffix(".tmp").write_text(json.dumps(row))
            path.with_suffix(".tmp").rename(path)
        return step


def _row(predictions: Predictions) -> dict[str, Any]:
    return {"ids": list(predictions.ids)} | {
        k: getattr(predictions, k).tolist() for k in ("count", "hits", "hits10", "loss")
    }


def _predictions(row: Mapping[str, Any]) -> Predictions:
    arrays = {k: np.array(row[k], dtype=np.int64) for k in ("count", "hits", "hits10")}
    return Predictions(tuple(row["ids"]), **arrays, loss=np.array(row["loss"], dtype=np.float64))
