"""Corpora that come with repedit, and corpora read from your files."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from repedit.data.corpus import Corpus, Document, Tokens, tokens
from repedit.errors import DataError, NotFound, UnknownName, nearest
from repedit.io.files import is_file, user_path
from repedit.io.tables import parquet_rows
from repedit.io.text import json_rows, read_text

# Not ordinary library code: tests, vendored packages, demos, generated grammars.
_SKIPPED = {
    "test",
    "tests",
    "site-packages",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "__pycache__",
    "ensurepip",
    "pydoc_data",
    "encodings",
}


def code(*, characters: int | None = 64_000, seed: int = 0) -> Corpus:
    """Python code: excerpts of the running interpreter's own standard library, each from another file.

    Args:
        characters: about how much text, in excerpts of 1,600 characters; None for every file whole.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        p
        for p in sorted(root.rglob("*.py"))
        if not _SKIPPED & set(p.relative_to(root).parts[:-1]) and p.stat().st_size >= 500
    ]
    documents = tuple(
        Document(p.relative_to(root).as_posix(), p.read_text(encoding="utf-8", errors="replace")) for p in files
    )
    whole = Corpus(documents, "code")
    return whole if characters is None else whole.excerpts(max(1, round(characters / 1600)), seed=seed)


def prose() -> Corpus:
    """About 64 KB of encyclopaedic prose on forty subjects, written for this project."""
    text = resources.files("repedit.data").joinpath("builtin/prose.txt").read_text(encoding="utf-8")
    return Corpus(_paragraphs(text, "prose"), "prose")


BUILTIN = {"code": code, "prose": prose}
"""The corpora that come with repedit, by name."""


def named(name: str) -> Corpus:
    """The built-in corpus of a name.

    Raises:
        UnknownName: if there is none.
    """
    if name not in BUILTIN:
        raise UnknownName(
            f"no built-in corpus is called {name!r}; {nearest(name, BUILTIN)} A file is read with repedit.data.read(path)"
        )
    return BUILTIN[name]()


def read(source: str | Path | Iterable[Any], *, text: str = "text", name: str | None = None) -> Corpus | Tokens:
    """A corpus from a file, a list of strings, or an iterable of tokenised batches.

    A .txt file is split into documents at blank lines; .jsonl and .parquet give one document a row, from the field
    `text`. A built-in name ("code", "prose") is accepted too.

    Raises:
        NotFound: if the file does not exist.
        DataError: if it is empty, a row lacks the field, or the kind of file is unknown.
        MissingDependency: if parquet is read without pyarrow.
    """
    if isinstance(source, str) and source in BUILTIN:
        return named(source)
    if isinstance(source, str | Path):
        path = user_path(source)
        if not is_file(path):
            raise NotFound(f"{str(path.absolute())[:300]} is not a file; {nearest(str(source)[:200], BUILTIN)}")
        readers = {".txt": _text, ".md": _text, ".jsonl": _jsonl, ".parquet": _parquet}
        if path.suffix not in readers:
            raise DataError(f"{path}: files of kind {path.suffix!r} are not read; give one of {', '.join(readers)}")
        return Corpus(readers[path.suffix](path, text), name or path.stem)
    if not isinstance(source, Iterable) or isinstance(source, Mapping):
        raise DataError(f"found {source!r:.100}; give a file, a list of strings, or an iterable of tokenised batches")
    items = list(source)
    if items and all(isinstance(item, Mapping) for item in items):
        return tokens(items, name or "tokens")
    wrong = next((i for i, item in enumerate(items) if not isinstance(item, str)), None)
    if wrong is not None:
        raise DataError(f"item {wrong} is a {type(items[wrong]).__name__}; give strings, or mappings with input_ids")
    return Corpus(tuple(Document(str(i), item) for i, item in enumerate(items)), name or "texts")


def _paragraphs(content: str, prefix: str) -> tuple[Document, ...]:
    parts = [part.strip() for part in content.replace("\r\n", "\n").split("\n\n")]
    return tuple(Document(f"{prefix}/{i}", part) for i, part in enumerate(p for p in parts if p))


def _text(path: Path, _field: str) -> tuple[Document, ...]:
    return _paragraphs(read_text(path), path.stem)


def _jsonl(path: Path, field: str) -> tuple[Document, ...]:
    return tuple(_row(path, number, row, field) for number, row in json_rows(path))


def _parquet(path: Path, field: str) -> tuple[Document, ...]:
    return tuple(_row(path, number, row, field) for number, row in enumerate(parquet_rows(path), 1))


def _row(path: Path, number: int, row: Mapping[str, Any], field: str) -> Document:
    if not isinstance(row.get(field), str):
        raise DataError(
            f"{path}, row {number}: the field {field!r} must hold a text; found {sorted(row)}. Name another with text=..."
        )
    name = row.get("id")
    return Document(f"{path.stem}/{number}" if name is None else str(name), row[field])
