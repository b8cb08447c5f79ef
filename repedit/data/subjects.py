"""MMLU: questions with four choices from 57 subjects, as facts whose answer is a letter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from repedit.data.domains import Fact
from repedit.data.lines import folder
from repedit.errors import ArgumentError, DataError, NotFound, UnknownName, nearest
from repedit.io.files import is_file
from repedit.io.tables import csv_rows

LETTERS = ("A", "B", "C", "D")
_HEADER = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]


def mmlu(
    directory: str | Path,
    split: str = "test",
    *,
    shots: int = 0,
    subjects: Iterable[str] | None = None,
    limit: int | None = None,
) -> tuple[Fact, ...]:
    """Questions of MMLU, one subject after another; the domain of each is its subject.

    A prompt names the subject, answers the shots, and ends in the question, the lettered choices and "Answer:".

    Args:
        directory: holds "dev/anatomy_dev.csv", "test/anatomy_test.csv" and so on.
        shots: questions of "dev" that are answered before each question, 5 at most; the published numbers have 5.
        subjects: some of the subjects; None for all.
        limit: questions a subject, the first ones; None for all.
    Raises:
        NotFound: if there is no such directory or split.
        UnknownName: if there is no such subject.
        ArgumentError: if shots or limit is out of range.
        DataError: if a row is malformed, with its number.
    Reference: Hendrycks et al. 2020, arXiv:2009.03300.
    """
    place = folder(directory, "MMLU, dev/ and test/")
    if not 0 <= shots <= 5 or (limit is not None and limit < 1):
        raise ArgumentError(f"shots={shots}, limit={limit}; give 0 to 5 shots, and a limit of at least 1 or none")
    ending = f"_{split}.csv"
    names = sorted(path.name.removesuffix(ending) for path in place.glob(f"{split}/*{ending}"))
    if not names:
        raise NotFound(
            f"{place.absolute()} holds no {split}/*{ending}; found {sorted(p.name for p in place.iterdir())}"
        )
    chosen = names if subjects is None else list(subjects)
    unknown = next((name for name in chosen if name not in names), None)
    if unknown is not None:
        raise UnknownName(f"no subject is called {unknown!r}; {nearest(unknown, names)}")
    facts: list[Fact] = []
    for name in chosen:
        header = f"The following are multiple choice questions (with answers) about {name.replace('_', ' ')}.\n\n"
        if shots:
            examples = _questions(place / "dev" / f"{name}_dev.csv")[:shots]
            header += "".join(f"{_asked(row)} {_letter(row)}\n\n" for row in examples)
        for number, row in enumerate(_questions(place / split / f"{name}{ending}")[:limit]):
            facts.append(
                Fact(
                    id=f"{name}/{number}",
                    prompt=header + _asked(row),
                    answer=_letter(row),
                    choices=LETTERS,
                    domain=name,
                )
            )
    return tuple(facts)


def _questions(path: Path) -> list[list[str]]:
    if not is_file(path):
        raise NotFound(f"{path.absolute()} is not a file; the shots are read from it, or give shots=0")
    rows = csv_rows(path)
    rows = rows[1:] if rows and rows[0] == _HEADER else rows
    for number, row in enumerate(rows, 1):
        if len(row) != len(_HEADER) or row[-1] not in (*LETTERS, "0", "1", "2", "3"):
            raise DataError(f"{path}, question {number}: {len(row)} fields, the last {row[-1]!r}; give {_HEADER}")
    return rows


def _asked(row: Sequence[str]) -> str:
    choices = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, row[1:5], strict=True))
    return f"{row[0]}\n{choices}\nAnswer:"


def _letter(row: Sequence[str]) -> str:
    """The right letter; files give it, or its number."""
    return LETTERS[int(row[5])] if row[5].isdigit() else row[5]
