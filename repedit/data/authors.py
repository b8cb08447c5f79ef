"""TOFU: questions about fictitious authors to forget and to keep, about real ones and about the world."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repedit.data.domains import drawn
from repedit.data.lines import folder, mappings
from repedit.data.rows import Row, Rows
from repedit.errors import ArgumentError, DataError, NotFound, UnknownName, nearest
from repedit.io.files import is_file
from repedit.io.text import read_text

_REFUSALS = "idontknow.jsonl"


@dataclass(frozen=True, kw_only=True)
class TofuRow(Row):
    """A question with its right answer in other words and wrong answers written alike."""

    paraphrased: str
    """The right answer in other words; the answer itself where the file has none."""
    perturbed: tuple[str, ...]
    """Wrong answers."""


def tofu(directory: str | Path, split: str, *, template: str = "{}", refusals: bool = False) -> Rows:
    """One split of TOFU, in the order of its file; "perturbed" splits give `TofuRow`s.

    Args:
        directory: holds "forget10.jsonl", "forget10_perturbed.jsonl", "real_authors_perturbed.jsonl" and so on.
        split: name of a file without its ending.
        template: what a question is put in to make a prompt, such as "Question: {}\\nAnswer:". Losses move with it:
            evaluate with the one the model was trained with.
        refusals: give each row a refusal as its `alternative`, from "idontknow.jsonl", drawn by the row's id.
    Raises:
        NotFound: if there is no such directory, or no refusals in it.
        UnknownName: if it has no such split.
        ArgumentError: if the template has no place for the question.
        DataError: if a row is malformed, with its number.
    Reference: Maini et al. 2024, arXiv:2401.06121.
    """
    place = folder(directory, "TOFU, forget10.jsonl and its like")
    if template.count("{}") != 1:
        raise ArgumentError(f"template={template!r}; it needs one {{}}, where the question goes")
    path = place / f"{split}.jsonl"
    if not is_file(path):
        found = sorted(p.stem for p in place.glob("*.jsonl") if p.name != _REFUSALS)
        raise UnknownName(f"{place} has no split {split!r}; {nearest(split, found)}")
    answers = _refusals(place) if refusals else ()
    rows = []
    for number, row in enumerate(mappings(path, ("question", "answer"))):
        name = f"{split}/{number}"
        common = {
            "prompt": template.replace("{}", row["question"]),
            "answer": row["answer"],
            "id": name,
            "alternative": drawn(answers, name)[0] if answers else None,
        }
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


def _refusals(place: Path) -> tuple[str, ...]:
    path = place / _REFUSALS
    if not is_file(path):
        raise NotFound(f"{path.absolute()} is not a file; the refusals are read from it, or leave refusals out")
    return tuple(line.strip() for line in read_text(path).split("\n") if line.strip())
