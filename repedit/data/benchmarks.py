"""Readers of published benchmarks: TOFU, MMLU, LUME (SemEval-2025 Task 4) and MUSE."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repedit.arguments import checked
from repedit.data.corpus import Corpus, Document, Row, Rows
from repedit.data.fact_sets import Fact, seeded_order
from repedit.errors import ArgumentError, DataError, NotFound, UnknownName, check_choice, nearest
from repedit.io.files import is_file, is_folder, user_path
from repedit.io.tables import csv_rows, parquet_rows
from repedit.io.text import json_rows, parse_json, read_text

# --- Reading published files; errors name the file and the row


def folder(directory: str | Path, what: str) -> Path:
    """The path of an existing directory.

    Raises:
        NotFound: if it does not exist, with what it should hold.
    """
    path = user_path(directory)
    if not is_folder(path):
        raise NotFound(f"{path.absolute()} is not a directory; give the one that holds {what}")
    return path


def mappings(path: Path, fields: Sequence[str]) -> list[Mapping[str, Any]]:
    """The rows of a .jsonl or .parquet file, each with the given fields; all but "id" hold texts.

    Raises:
        DataError: if the file cannot be read, or a row is not an object or lacks a field, with its number.
        MissingDependency: if parquet is read without pyarrow.
    """
    rows: list[Mapping[str, Any]] = (
        [*parquet_rows(path)] if path.suffix == ".parquet" else [row for _, row in json_rows(path)]
    )
    if not rows:
        raise DataError(f"{path} holds no rows; download it again")
    for number, row in enumerate(rows, 1):
        missing = [field for field in fields if row.get(field) is None]
        if missing:
            raise DataError(f"{path}, row {number}: no {', '.join(missing)}; the row has {sorted(row)}")
        wrong = [field for field in fields if field != "id" and not isinstance(row[field], str)]
        if wrong:
            raise DataError(f"{path}, row {number}: {wrong[0]} is {row[wrong[0]]!r:.100}; a text was expected")
    return rows


# --- TOFU: questions about fictitious authors to forget and to retain, about real authors and about the world

_REFUSALS = "idontknow.jsonl"


@dataclass(frozen=True, kw_only=True)
class TofuRow(Row):
    """A question with a paraphrase of its right answer and similar wrong answers."""

    paraphrased: str
    """The right answer in other words; the answer itself if the file has no paraphrase."""
    perturbed: tuple[str, ...]
    """Wrong answers."""


@checked
def tofu(directory: str | Path, split: str, *, template: str = "{}", refusals: bool = False) -> Rows:
    """One split of TOFU, in the order of its file; "perturbed" splits give `TofuRow`s.

    Args:
        directory: holds "forget10.jsonl", "forget10_perturbed.jsonl", "real_authors_perturbed.jsonl" and so on.
        split: name of a file without its ending.
        template: makes a prompt from a question, such as "Question: {}\\nAnswer:". Losses depend on it: evaluate with
            the template the model was trained with.
        refusals: give each row a refusal from "idontknow.jsonl" as its `alternative`, selected by the row's id.
    Raises:
        NotFound: if there is no such directory, or it has no refusals.
        UnknownName: if it has no such split.
        ArgumentError: if the template does not contain {} exactly once.
        DataError: if a row is malformed, with its number.
    Reference: Maini et al. 2024, arXiv:2401.06121.
    """
    root = folder(directory, "TOFU, forget10.jsonl and its like")
    if template.count("{}") != 1:
        raise ArgumentError(f"template={template!r}; it needs one {{}}, where the question goes")
    path = root / f"{split}.jsonl"
    if not is_file(path):
        splits = sorted(p.stem for p in root.glob("*.jsonl") if p.name != _REFUSALS)
        if not splits:
            raise NotFound(f"{root} holds no .jsonl file; give the directory of TOFU, with forget10.jsonl and its like")
        raise UnknownName(f"{root} has no split {split!r}; {nearest(split, splits)}")
    answers = _refusals(root) if refusals else ()
    rows = []
    for number, row in enumerate(mappings(path, ("question", "answer"))):
        name = f"{split}/{number}"
        common = {
            "prompt": template.replace("{}", row["question"]), "answer": row["answer"], "id": name,
            "alternative": seeded_order(answers, name)[0] if answers else None,
        }  # fmt: skip
        wrong = row.get("perturbed_answer")
        paraphrased = row.get("paraphrased_answer") or row["answer"]
        if not isinstance(paraphrased, str) or not _texts(wrong or []):
            raise DataError(
                f"{path}, row {number + 1}: paraphrased_answer must be a text and perturbed_answer a list of texts"
            )
        more: dict[str, Any] = {"paraphrased": paraphrased, "perturbed": tuple(wrong or ())}
        rows.append(TofuRow(**common, **more) if wrong else Row(**common))
    return Rows(tuple(rows), split)


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _refusals(root: Path) -> tuple[str, ...]:
    path = root / _REFUSALS
    if not is_file(path):
        raise NotFound(f"{path.absolute()} is not a file; it must hold the refusals, or pass refusals=False")
    return tuple(line.strip() for line in read_text(path).split("\n") if line.strip())


# --- MMLU: questions with four choices from 57 subjects, as facts whose answer is a letter

LETTERS = ("A", "B", "C", "D")
_HEADER = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]


@checked
def mmlu(
    directory: str | Path,
    split: str = "test",
    *,
    shots: int = 0,
    subjects: Iterable[str] | None = None,
    limit: int | None = None,
) -> tuple[Fact, ...]:
    """Questions of MMLU, subject by subject; the domain of a question is its subject.

    A prompt names the subject, gives the shots with their answers, and ends in the question, the lettered choices and
    "Answer:".

    Args:
        directory: holds "dev/anatomy_dev.csv", "test/anatomy_test.csv" and so on.
        shots: answered questions of "dev" before each question, at most 5; the published numbers use 5.
        subjects: some of the subjects; None for all.
        limit: questions per subject, the first ones; None for all.
    Raises:
        NotFound: if there is no such directory or split.
        UnknownName: if there is no such subject.
        ArgumentError: if shots or limit is out of range.
        DataError: if a row is malformed, with its number.
    Reference: Hendrycks et al. 2020, arXiv:2009.03300.
    """
    root = folder(directory, "MMLU, dev/ and test/")
    if not 0 <= shots <= 5 or (limit is not None and limit < 1):
        raise ArgumentError(f"shots={shots}, limit={limit}; give 0 to 5 shots, and a limit of at least 1 or none")
    ending = f"_{split}.csv"
    names = sorted(path.name.removesuffix(ending) for path in root.glob(f"{split}/*{ending}"))
    if not names:
        raise NotFound(f"{root.absolute()} holds no {split}/*{ending}; it has {sorted(p.name for p in root.iterdir())}")
    selected = names if subjects is None else list(subjects)
    unknown = next((name for name in selected if name not in names), None)
    if unknown is not None:
        raise UnknownName(f"no subject is called {unknown!r}; {nearest(unknown, names)}")
    facts: list[Fact] = []
    for name in selected:
        header = f"The following are multiple choice questions (with answers) about {name.replace('_', ' ')}.\n\n"
        if shots:
            examples = _questions(root / "dev" / f"{name}_dev.csv")[:shots]
            header += "".join(f"{_question_text(row)} {_letter(row)}\n\n" for row in examples)
        for number, row in enumerate(_questions(root / split / f"{name}{ending}")[:limit]):
            facts.append(
                Fact(
                    id=f"{name}/{number}",
                    prompt=header + _question_text(row),
                    answer=_letter(row),
                    choices=LETTERS,
                    domain=name,
                )
            )
    return tuple(facts)


def _questions(path: Path) -> list[list[str]]:
    if not is_file(path):
        raise NotFound(f"{path.absolute()} is not a file; it must hold the shots, or pass shots=0")
    rows = csv_rows(path)
    rows = rows[1:] if rows and rows[0] == _HEADER else rows
    for number, row in enumerate(rows, 1):
        if len(row) != len(_HEADER) or row[-1] not in (*LETTERS, "0", "1", "2", "3"):
            raise DataError(f"{path}, question {number}: {len(row)} fields, the last {row[-1]!r}; give {_HEADER}")
    return rows


def _question_text(row: Sequence[str]) -> str:
    choices = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, row[1:5], strict=True))
    return f"{row[0]}\n{choices}\nAnswer:"


def _letter(row: Sequence[str]) -> str:
    """The right letter; files hold the letter or its number."""
    return LETTERS[int(row[5])] if row[5].isdigit() else row[5]


# --- LUME, the data of SemEval-2025 Task 4: stories, invented people and biographies to forget and to retain

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
@checked
class Tasks:
    """Rows to forget and rows to retain, and, if available, texts for a membership test."""

    forget: Rows
    retain: Rows
    members: Corpus | None = None
    """Texts of the forget set."""
    holdout: Corpus | None = None
    """Similar texts that the model never saw."""


@checked
def lume(directory: str | Path) -> Tasks:
    """All of LUME, from "forget.jsonl" and "retain.jsonl"; it has no texts for a membership test.

    Raises:
        NotFound: if there is no such directory or file.
        DataError: if a row is malformed, with its number.
    Reference: Ramakrishna et al. 2025, arXiv:2502.15097.
    """
    root = folder(directory, "LUME, forget.jsonl and retain.jsonl")
    forget, retain = (_rows(_first_match(root, f"{side}.jsonl"), side) for side in ("forget", "retain"))
    return Tasks(forget, retain)


@checked
def semeval(directory: str | Path, split: str = "validation") -> Tasks:
    """One public split of SemEval-2025 Task 4, with its texts for the membership test.

    Args:
        directory: holds files such as "*forget_train*.parquet" at any depth, and "mia_data/member.jsonl" or
            "mia_data_member.jsonl", with the folder in the name.
        split: "train" or "validation".
    Raises:
        UnknownName: if there is no such split.
        NotFound: if there is no such directory or file.
        DataError: if a row is malformed, with its number.
        MissingDependency: without pyarrow.
    Reference: Ramakrishna et al. 2025, arXiv:2502.15097.
    """
    check_choice(PARTS, split=split)
    root = folder(directory, "SemEval-2025 Task 4, its parquet files and mia_data")
    forget, retain = (
        _rows(_first_match(root, f"*{side}_{split}*.parquet"), f"{side}/{split}") for side in ("forget", "retain")
    )
    part = "validation/" if split == "validation" else ""
    paths = [f"mia_data/{part}{side}.jsonl" for side in ("member", "nonmember")]
    return Tasks(
        forget, retain, *(_membership_corpus(_first_file(root, path, path.replace("/", "_"))) for path in paths)
    )


def _first_match(root: Path, pattern: str) -> Path:
    matches = sorted(root.rglob(pattern))
    if not matches:
        raise NotFound(f"{root.absolute()} holds no {pattern}; it has {sorted(p.name for p in root.iterdir())[:8]}")
    return matches[0]


def _first_file(root: Path, *names: str) -> Path:
    """The first existing one of several paths; copies of the data name the same file differently."""
    for name in names:
        if (root / name).is_file():
            return root / name
    raise NotFound(
        f"{root.absolute()} holds none of {', '.join(names)}; it has {sorted(p.name for p in root.iterdir())[:8]}"
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


def _membership_corpus(path: Path) -> Corpus:
    rows = mappings(path, ("id", "document"))
    return Corpus(tuple(Document(str(row["id"]), row["document"]) for row in rows), path.stem)


# --- MUSE: news articles or novels to forget, with questions about them


@dataclass(frozen=True, eq=False)
@checked
class MuseData:
    """The parts of MUSE that `repedit.metrics.muse` measures."""

    texts: tuple[str, ...]
    """Texts to forget, each a prompt with its true continuation."""
    members: tuple[str, ...]
    """Texts to forget, for the membership test."""
    holdout: tuple[str, ...]
    """Similar texts that the model never saw."""
    forget: tuple[Row, ...]
    """Questions about the texts to forget."""
    retain: tuple[Row, ...]
    """Questions about the texts to retain."""
    forget_examples: tuple[Row, ...] = ()
    """Questions with answers that precede each question of `forget`."""
    retain_examples: tuple[Row, ...] = ()
    """The same for `retain`."""


@checked
def muse(directory: str | Path, *, limit: int | None = None) -> MuseData:
    """One corpus of MUSE, News or Books, from its published JSON files.

    Args:
        directory: holds "verbmem/forget.json", "privleak/forget.json", "privleak/holdout.json",
            "knowmem/forget_qa.json" and "knowmem/retain_qa.json", and may hold "knowmem/forget_qa_icl.json" and
            "knowmem/retain_qa_icl.json".
        limit: rows of each part, the first ones; None for all. Examples are always complete.
    Raises:
        NotFound: if there is no such directory or file.
        DataError: if a file is malformed, with the row.
        ArgumentError: if the limit is below 1.
    Reference: Shi et al. 2024, arXiv:2407.06460.
    """
    root = folder(directory, "MUSE, verbmem/, knowmem/ and privleak/")
    if limit is not None and limit < 1:
        raise ArgumentError(f"limit={limit}; give at least 1 row for each part, or none for all")
    verbatim = _muse_rows(root / "verbmem/forget.json", ("prompt", "gt"), limit)
    members, holdout = (
        tuple(row["text"] for row in _muse_rows(root / f"privleak/{side}.json", ("text",), limit))
        for side in ("forget", "holdout")
    )
    questions = {
        name: tuple(
            Row(row["question"], row["answer"], f"muse/{name}/{number}")
            for number, row in enumerate(_muse_rows(root / f"knowmem/{name}.json", ("question", "answer"), size))
        )
        for name, size in (("forget_qa", limit), ("retain_qa", limit), ("forget_qa_icl", None), ("retain_qa_icl", None))
        if not name.endswith("_icl") or is_file(root / f"knowmem/{name}.json")
    }
    return MuseData(
        tuple(row["prompt"] + row["gt"] for row in verbatim), members, holdout, questions["forget_qa"],
        questions["retain_qa"], questions.get("forget_qa_icl", ()), questions.get("retain_qa_icl", ()),
    )  # fmt: skip


def _muse_rows(path: Path, fields: Sequence[str], limit: int | None) -> list[Mapping[str, str]]:
    """The objects of a JSON list, each with the given text fields; a plain text counts as the field "text"."""
    if not is_file(path):
        raise NotFound(f"{path.absolute()} is not a file; download the data of MUSE again")
    rows = parse_json(read_text(path), str(path), DataError)
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path} holds a {type(rows).__name__} of no rows; a list of rows was expected")
    rows = [{"text": row} if isinstance(row, str) else row for row in rows[:limit]]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping) or not all(isinstance(row.get(field), str) for field in fields):
            raise DataError(f"{path}, row {number}: {row!r:.80}; give the texts {', '.join(fields)}")
    return rows
