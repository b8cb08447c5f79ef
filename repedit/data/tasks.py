"""LUME, the data of SemEval-2025 Task 4: stories, invented people and biographies to forget and to keep."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from repedit.data.corpus import Corpus, Document
from repedit.data.lines import folder, mappings
from repedit.data.rows import Row, Rows
from repedit.errors import DataError, NotFound, UnknownName, nearest

TASKS = ("Task1", "Task2", "Task3")
KINDS = ("sc", "qa")
PARTS = ("train", "validation")
_FIELDS = ("id", "input", "output", "task")


@dataclass(frozen=True, kw_only=True)
class TaskRow(Row):
    """A text to complete, or a question about it."""

    task: str
    """"Task1" invented stories, "Task2" invented personal data, "Task3" real biographies."""
    kind: str
    """"sc" sentence completion, "qa" question."""


@dataclass(frozen=True, eq=False)
class Tasks:
    """Rows to forget and rows to retain, and where there are any, texts for a membership test."""

    forget: Rows
    retain: Rows
    members: Corpus | None = None
    """Texts of the forget set."""
    holdout: Corpus | None = None
    """Texts like them that the model never saw."""


def lume(directory: str | Path) -> Tasks:
    """All of LUME: "forget.jsonl" and "retain.jsonl", without texts for a membership test.

    Raises:
        NotFound: if there is no such directory or file.
        DataError: if a row is malformed, with its number.
    Reference: Ramakrishna et al. 2025, arXiv:2502.15097.
    """
    place = folder(directory, "LUME, forget.jsonl and retain.jsonl")
    forget, retain = (_rows(_one(place, f"{side}.jsonl"), side) for side in ("forget", "retain"))
    return Tasks(forget, retain)


def semeval(directory: str | Path, split: str = "validation") -> Tasks:
    """One public split of SemEval-2025 Task 4, with its texts for the membership test.

    Args:
        directory: holds, at any depth, "*forget_train*.parquet" and its like, and in it "mia_data/member.jsonl"
            and its like, or "mia_data_member.jsonl" with the folders in the name.
        split: "train" or "validation".
    Raises:
        UnknownName: if there is no such split.
        NotFound: if there is no such directory or file.
        DataError: if a row is malformed, with its number.
        MissingDependency: without pyarrow.
    Reference: Ramakrishna et al. 2025, arXiv:2502.15097.
    """
    if split not in PARTS:
        raise UnknownName(f"split={split!r}; {nearest(split, PARTS)}")
    place = folder(directory, "SemEval-2025 Task 4, its parquet files and mia_data")
    forget, retain = (
        _rows(_one(place, f"*{side}_{split}*.parquet"), f"{side}/{split}") for side in ("forget", "retain")
    )
    part = "validation/" if split == "validation" else ""
    paths = [f"mia_data/{part}{side}.jsonl" for side in ("member", "nonmember")]
    return Tasks(forget, retain, *(_texts(_beside(place, path, path.replace("/", "_"))) for path in paths))


def _one(place: Path, pattern: str) -> Path:
    found = sorted(place.rglob(pattern))
    if not found:
        raise NotFound(f"{place.absolute()} holds no {pattern}; found {sorted(p.name for p in place.iterdir())[:8]}")
    return found[0]


def _beside(place: Path, *names: str) -> Path:
    """The first of some paths that is there; the same file has another name in another copy of the data."""
    for name in names:
        if (place / name).is_file():
            return place / name
    raise NotFound(
        f"{place.absolute()} holds none of {', '.join(names)}; found {sorted(p.name for p in place.iterdir())[:8]}"
    )


def _rows(path: Path, name: str) -> Rows:
    rows = []
    for number, row in enumerate(mappings(path, _FIELDS), 1):
        kind = re.search(r"(sc|qa)\d+$", str(row["id"]))
        if not kind or row["task"] not in TASKS:
            raise DataError(
                f"{path}, row {number}: id {row['id']!r}, task {row['task']!r}; an id ends in sc or qa and a number, a "
                f"task is one of {', '.join(TASKS)}"
            )
        rows.append(TaskRow(row["input"], row["output"], str(row["id"]), task=row["task"], kind=kind[1]))
    return Rows(tuple(rows), name)


def _texts(path: Path) -> Corpus:
    rows = mappings(path, ("id", "document"))
    return Corpus(tuple(Document(str(row["id"]), row["document"]) for row in rows), path.stem)
