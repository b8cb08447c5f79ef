"""Steps of a trajectory, and a directory that keeps the finished ones so that an interrupted run goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from repedit.activations.prediction import Predictions
from repedit.edit import Edit
from repedit.errors import CheckpointError, FingerprintError
from repedit.io.files import write_text
from repedit.io.text import parse_json, read_json


@dataclass(frozen=True, eq=False)
class Step:
    """One point of a trajectory."""

    fraction: float
    """Share of all scored neurons that are pruned."""
    edit: Edit
    forget: Predictions
    retain: Predictions


class Shelf:
    """Finished steps on disk, so that an interrupted run goes on."""

    def __init__(self, folder: str | Path | None, provenance: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        text, path = json.dumps(provenance, sort_keys=True, indent=2), self.folder / "run.json"
        if path.exists() and (old := read_json(path, remedy="remove it, or give another directory")) != parse_json(
            text, "run"
        ):
            key = next(k for k in sorted({*old, *provenance}) if old.get(k) != parse_json(text, "run").get(k))
            raise FingerprintError(
                f"{self.folder} holds steps of another run: {key} was {old.get(key)}, now {provenance.get(key)}; give another directory"
            )
        write_text(path, text)

    def get(self, number: int) -> Step | None:
        """A finished step, or None."""
        if self.folder is None or not (self.folder / f"step-{number:03d}.json").exists():
            return None
        path = self.folder / f"step-{number:03d}.json"
        row = read_json(path, finite=False, remedy="remove it, and the step is made again")
        try:
            sides = {side: _predictions(row[side]) for side in ("forget", "retain")}
            fraction = float(row["fraction"])
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{path} is no step of a run: {error!r}; remove it, and it is made again") from error
        return Step(fraction, Edit.load(path.with_suffix(".safetensors")), sides["forget"], sides["retain"])

    def put(self, number: int, step: Step) -> Step:
        """Keep a step; it counts as finished once its JSON is there."""
        if self.folder is not None:
            step.edit.save(self.folder / f"step-{number:03d}.safetensors")
            row = {"fraction": step.fraction} | {side: _row(getattr(step, side)) for side in ("forget", "retain")}
            path = self.folder / f"step-{number:03d}.json"
            # The JSON marks the step as finished, so it comes last and at once.
            write_text(path, json.dumps(row))
        return step


def _row(predictions: Predictions) -> dict[str, Any]:
    return {"ids": list(predictions.ids)} | {
        k: getattr(predictions, k).tolist() for k in ("count", "hits", "hits10", "loss")
    }


def _predictions(row: Mapping[str, Any]) -> Predictions:
    arrays = {k: np.array(row[k], dtype=np.int64) for k in ("count", "hits", "hits10")}
    return Predictions(tuple(row["ids"]), **arrays, loss=np.array(row["loss"], dtype=np.float64))
