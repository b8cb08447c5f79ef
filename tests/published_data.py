"""Published data for tests: the real files lie beside the project, never in it; small stand-ins of the same form are written here.

A test of a law (splits do not overlap, shots are answered, parts add up) runs on the stand-ins. A test of a published
number needs the published files, and is skipped with one line where they are absent.
"""

from __future__ import annotations

import atexit
import csv
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import pytest

PUBLISHED = Path(__file__).parents[2] / "shared" / "data"
SIDES = ("forget", "retain")
MEMBERS = 20


def published(*parts: str) -> Path:
    """A path in the published data; the test is skipped where it is absent."""
    path = PUBLISHED.joinpath(*parts)
    if not path.exists():
        pytest.skip("needs the published data beside the project: ../shared/data/" + "/".join(parts))
    return path


@cache
def stand_in() -> Path:
    """A folder with "tofu", "semeval_lume", "lume", "muse" and "mmlu" in the form of the published files, of invented content."""
    place = Path(tempfile.mkdtemp(prefix="repedit-stand-in-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    _tofu(place / "tofu")
    _semeval(place / "semeval_lume", place / "lume")
    _mmlu(place / "mmlu")
    _muse(place / "muse")
    return place


def _tofu(place: Path) -> None:
    """Ten invented authors with four questions each; the last is forgotten."""
    rows = [
        {"question": f"{what} of the author {name}?", "answer": f"{name} has the {what.lower()} number {i}."}
        for i, name in enumerate(f"Orlo Venn {n}" for n in range(10))
        for what in ("Birthplace", "First book", "Prize", "Teacher")
    ]
    wrong = [
        row | {"paraphrased_answer": f"It is so: {row['answer']}", "perturbed_answer": [f"{row['answer']} {x}" for x in "abcde"]}
        for row in rows
    ]  # fmt: skip
    splits = {"full": rows, "retain90": rows[:36], "forget10": rows[36:]}
    splits |= {"forget10_perturbed": wrong[36:], "retain_perturbed": wrong[:4]}
    for name in ("real_authors", "world_facts"):  # published without paraphrases
        splits[f"{name}_perturbed"] = [
            {"question": f"{name} {i}?", "answer": f"right {i}", "perturbed_answer": ["one", "two", "three"]} for i in range(4)
        ]  # fmt: skip
    for name, split in splits.items():
        _jsonl(place / f"{name}.jsonl", split)
    (place / "idontknow.jsonl").write_text("".join(f"I have no answer of kind {i}.\n" for i in range(8)))


def _muse(place: Path) -> None:
    """Two articles to forget, two that were never seen, and a question about each of two sides."""
    articles = [f"{name} walked over the bridge at noon " * 60 for name in ("Orlo", "Venn", "Tess", "Ira")]
    questions = {
        f"{side}_qa": [{"question": f"Who walked {side}?", "answer": name}]
        for side, name in (("forget", "Orlo"), ("retain", "Dov"))
    }
    files = {
        "verbmem/forget": [{"prompt": text[:800], "gt": text[800:]} for text in articles[:2]],
        "privleak/forget": articles[:2],
    }
    files |= {"privleak/holdout": articles[2:], "knowmem/forget_qa_icl": [{"question": "Who sat?", "answer": "Lea"}]}
    for name, rows in (files | {f"knowmem/{name}": rows for name, rows in questions.items()}).items():
        (place / f"{name}.json").parent.mkdir(parents=True, exist_ok=True)
        (place / f"{name}.json").write_text(json.dumps(rows))


def _semeval(place: Path, lume: Path) -> None:
    """Three documents of each task on each side, each to be continued and asked for once, in two splits."""
    whole: dict[str, list[dict[str, str]]] = {side: [] for side in SIDES}
    for split in ("train", "validation"):
        for side in SIDES:
            rows = [
                {"id": f"{side}{split}{task}{i}{kind}{i}", "input": f"{side} {split} text {task} {i} {kind} begins", "output": f"and ends {i}",
                 "task": task, "split": side}
                for task in ("Task1", "Task2", "Task3") for i in range(3) for kind in ("sc", "qa")
            ]  # fmt: skip
            whole[side] += rows
            _parquet(place / f"data_{side}_{split}-00000-of-00001.parquet", rows)
        middle = "validation_" if split == "validation" else ""
        for side in ("member", "nonmember"):
            texts = [{"id": str(i), "document": f"A {side} of {split}, text {i} of many."} for i in range(MEMBERS)]
            _jsonl(place / f"mia_data_{middle}{side}.jsonl", texts)
    for side, rows in whole.items():
        _jsonl(lume / f"{side}.jsonl", rows)


def _mmlu(place: Path) -> None:
    """Two subjects, the answers of each A, B, C, D in turn; the files of one give letters, those of the other numbers."""
    for split in ("dev", "test"):
        (place / split).mkdir(parents=True)
        for subject, letters in (("anatomy", "ABCD"), ("early_music", "0123")):
            rows = [
                [f"Question {i} of {split}?", "first", "second", "third", "fourth", letters[i % 4]] for i in range(8)
            ]
            with open(place / split / f"{subject}_{split}.csv", "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(rows)


def _jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _parquet(path: Path, rows: list[dict[str, str]]) -> None:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
