"""The account of a run: each step as it was carried out, what it read, wrote and showed, a line of JSON each, beside the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from repedit.errors import CheckpointError, DataError, NotFound
from repedit.io.files import append, file_hash, file_hashes, is_file
from repedit.io.text import JsonLines, check_fields, read_toml
from repedit.rewrite.manifest import PACKAGES


@dataclass(frozen=True)
class Entry:
    """One step as it was carried out."""

    number: int
    verb: str
    asked: Mapping[str, Any]
    """Its table in the file at that time, with the model of the file."""
    words: tuple[str, ...]
    """The command line after `repedit`."""
    code: int
    seconds: float
    out: str | None
    files: Mapping[str, str]
    """sha256 of every file it wrote, by path below `out`; "" is `out` itself where it is a file."""
    inputs: Mapping[str, str]
    """sha256 of every single file it was given."""
    shown: tuple[Mapping[str, Any], ...]
    """Tables, generations, lines and JSON, as on the console."""
    versions: Mapping[str, str]


_TYPES = {
    "number": int, "verb": str, "asked": dict, "code": int, "seconds": int | float, "out": str | None, "files": dict[str, str],
    "inputs": dict[str, str], "versions": dict[str, str], "words": list[str], "shown": list[dict],
}  # fmt: skip
"""Of the fields of an entry, as JSON gives them back."""


def account_of(file: Path) -> Path:
    """Where the account of a run lies: run.toml -> run.account.jsonl."""
    return file.with_suffix(".account.jsonl")


def tables(file: Path) -> list[dict[str, Any]]:
    """The steps a file asks for, each with the model of the file.

    Raises:
        NotFound: if there is no such file. DataError: if it is not the file of a run.
    """
    if not is_file(file):
        raise NotFound(f"{file.absolute()} is not a file; give the TOML file of a run, or the folder that holds it")
    try:
        found = read_toml(file)
        steps = [dict(step) for step in found["step"]]
        wrong = not steps or not all("verb" in step for step in steps)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file} is not the file of a run: {error!r}") from error
    if wrong:
        raise DataError(f"{file} is not the file of a run: it holds no [[step]] tables with a verb")
    model = {"model": found["model"]} if "model" in found else {}
    return [model | step for step in steps]


def enter(
    file: Path,
    number: int,
    words: Sequence[str],
    code: int,
    seconds: float,
    out: Path | None,
    shown: Sequence[Mapping[str, Any]],
    *,
    there: Path | None = None,
) -> Entry:
    """Add what a step did; paths are relative to the file, whose folder is where the process stands.

    Args:
        words: the command line, its verb first.
        there: where the output stands, if it is not moved to `out` yet.
    """
    asked = tables(file)[number - 1]
    given = [word for value in asked.values() for word in (value if isinstance(value, list) else [value])]
    wrote = [str(step["out"]) for step in tables(file) if step.get("out")]
    read = [word for word in given if isinstance(word, str) and word not in wrote and is_file(word)]
    found = Entry(
        number, words[0], asked, tuple(words), code, seconds, None if out is None else str(out),
        {} if out is None else file_hashes(there or out), {word: file_hash(Path(word)) for word in read}, tuple(shown),
        {name: version(name) for name in PACKAGES},
    )  # fmt: skip
    append(account_of(file), asdict(found))
    return found


def entries(file: Path) -> dict[int, Entry]:
    """The last entry of every step, in the order they were made; a line that was cut off is none.

    Raises:
        CheckpointError: if the account holds something else.
    """
    path, found = account_of(file), dict[int, Entry]()
    for row in JsonLines(path).rows:
        try:
            check_fields(row, _TYPES, "a step")
        except CheckpointError as error:
            raise CheckpointError(f"{path.absolute()} is not the account of a run: {error}; move it away") from error
        entry = Entry(**(row | {name: tuple(row[name]) for name in ("words", "shown")}))
        found.pop(entry.number, None)
        found[entry.number] = entry
    return found
