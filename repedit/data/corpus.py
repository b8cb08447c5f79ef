"""Corpora of documents, built in or read from files, rows of prompts with answers, and the batches of both."""

from __future__ import annotations

import hashlib
import json
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from repedit.arguments import check_fields, checked
from repedit.data.encoding import (
    Encoded,
    Tokenizer,
    encoded_choices,
    entity_end,
    prefix_ids,
    prompt_with_answer,
    text_ids,
)
from repedit.errors import (
    ArgumentError,
    DataError,
    NotEnoughRows,
    NotFound,
    UnknownName,
    check_seed,
    check_whole,
    nearest,
)
from repedit.io.files import is_file, user_path
from repedit.io.tables import parquet_rows
from repedit.io.text import check_text, json_rows, read_text

# --- Corpora and batches


@dataclass(frozen=True)
@checked
class Document:
    """A text with an id that is unique in its corpus."""

    id: str
    text: str
    origin: str = ""
    """Id of the document of which this is an excerpt; a split never separates excerpts of one document."""


@dataclass(frozen=True, eq=False)
@checked
class Batch:
    """Token chunks padded on the right to one length."""

    input_ids: Int[Tensor, "b t"]
    attention_mask: Bool[Tensor, "b t"]
    document: tuple[str, ...]
    """Id of the document of each chunk."""
    answer: Bool[Tensor, "b t"] | None = None
    """True on the tokens of the answer; None if the text has no answers."""
    entity: Bool[Tensor, "b t"] | None = None
    """True on the last token of the entity in the prompt; False everywhere in a row without an entity."""


@runtime_checkable
class Batches(Protocol):
    """What measurements need of a corpus: a name, a hash and batches of tokens."""

    @property
    def name(self) -> str: ...
    @property
    def hash(self) -> str: ...
    def batches(self, tokenizer: Tokenizer | None, *, length: int = 128, batch_size: int = 8) -> Iterator[Batch]: ...


@dataclass(frozen=True, eq=False)
@checked
class Corpus:
    """Documents under one name. Splits separate documents, never chunks: chunks of one document are not independent."""

    documents: tuple[Document, ...]
    name: str = "corpus"

    def __post_init__(self) -> None:
        ids = [d.id for d in self.documents]
        for number, document in enumerate(self.documents):
            check_text(document.id, f"corpus {self.name!r}: the id of document {number}")
            check_text(document.text, f"corpus {self.name!r}: document {document.id!r}")
        if not any(d.text.strip() for d in self.documents):
            raise DataError(f"corpus {self.name!r} is empty: {len(ids)} documents, none with text")
        if len(set(ids)) != len(ids):
            raise DataError(
                f"corpus {self.name!r}: document id {next(i for i in ids if ids.count(i) > 1)!r} appears twice"
            )

    def __len__(self) -> int:
        return len(self.documents)

    def __repr__(self) -> str:
        return f"Corpus({self.name!r}, {len(self)} documents, {self.characters} characters)"

    @property
    def characters(self) -> int:
        """Total length of the texts."""
        return sum(len(d.text) for d in self.documents)

    @cached_property
    def hash(self) -> str:
        """sha256 over ids and texts, in order."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(f"{document.id}\0{document.text}\0".encode())
        return digest.hexdigest()

    @checked
    def halves(self, seed: int = 0) -> tuple[Corpus, Corpus]:
        """Two corpora of about equal length that share no document: one to collect on, one to evaluate on.

        Documents with the same text, and excerpts of one document, stay together; blank documents are left out. The
        half of a document depends on the seed and its text (for an excerpt: its origin) alone.

        Raises:
            NotEnoughRows: if fewer than two documents differ.
            ArgumentError: if the seed is no whole number from 0.
        """
        check_seed(seed=seed)
        groups: dict[str, list[Document]] = {}
        for document in (d for d in self.documents if d.text.strip()):
            key = hashlib.sha256(f"{seed}:{document.origin or document.text}".encode()).hexdigest()
            groups.setdefault(key, []).append(document)
        if len(groups) < 2:
            raise NotEnoughRows(f"corpus {self.name!r} has {len(groups)} distinct document, halves need at least 2")
        order = [groups[key] for key in sorted(groups)]
        lengths = [sum(len(document.text) for document in group) for group in order]
        cut, total = 1, lengths[0]
        while cut < len(order) - 1 and total < self.characters / 2:
            total += lengths[cut]
            cut += 1
        collect, evaluate = ([d for group in part for d in group] for part in (order[:cut], order[cut:]))
        return Corpus(tuple(collect), f"{self.name}/collect"), Corpus(tuple(evaluate), f"{self.name}/evaluate")

    @checked
    def excerpts(self, count: int, *, characters: int = 1600, seed: int = 0) -> Corpus:
        """`count` random excerpts of about `characters` characters, each from another document if there are enough.

        An excerpt begins at the start of a line, so that code keeps its indentation.

        Raises:
            ArgumentError: if a number is out of range.
        """
        check_whole(count=count, characters=characters)
        check_seed(seed=seed)
        rng = random.Random(seed)
        order = [d for d in self.documents if d.text.strip()]
        rng.shuffle(order)
        excerpts = []
        for number in range(count):
            document = order[number % len(order)]
            ends = document.text[: max(0, len(document.text) - characters)]
            starts = [0, *(match.end() for match in re.finditer("\n", ends))]
            start = rng.choice(starts)
            text = document.text[start : start + characters]
            excerpts.append(Document(f"{document.id}@{start}#{number}", text, document.origin or document.id))
        return Corpus(tuple(excerpts), self.name)

    @checked
    def batches(self, tokenizer: Tokenizer | None, *, length: int = 128, batch_size: int = 8) -> Iterator[Batch]:
        """Consecutive chunks of at most `length` tokens, longest first, padded on the right.

        Each chunk starts with the beginning-of-sequence token if the tokenizer adds one. A last chunk of one token
        predicts nothing and is left out.

        Raises:
            ArgumentError: if there is no tokenizer, or chunks of that length predict nothing.
        """
        if tokenizer is None:
            raise ArgumentError(f"corpus {self.name!r} is text and the model has no tokenizer; wrap the model with one")
        prefix = prefix_ids(tokenizer)
        if length < len(prefix) + 2 or batch_size < 1:
            raise ArgumentError(
                f"length={length}, batch_size={batch_size}: a chunk needs at least {len(prefix) + 2} tokens "
                f"({len(prefix)} of them the tokenizer's own), a batch at least 1 chunk"
            )
        chunks: list[tuple[str, list[int]]] = []
        for document in self.documents:
            ids = text_ids(tokenizer, document.text)
            step = length - len(prefix)
            chunks += [(document.id, prefix + ids[i : i + step]) for i in range(0, len(ids), step) if len(ids) - i > 1]
        chunks.sort(key=lambda chunk: -len(chunk[1]))
        pad = getattr(tokenizer, "pad_token_id", None) or 0
        for i in range(0, len(chunks), batch_size):
            part = chunks[i : i + batch_size]
            yield Batch(*padded((ids for _, ids in part), pad), tuple(name for name, _ in part))


@dataclass(frozen=True, eq=False)
@checked
class Tokens:
    """Batches that are already tokenized."""

    items: tuple[Batch, ...]
    name: str = "tokens"

    @cached_property
    def hash(self) -> str:
        """sha256 over the token ids and masks."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(f"{item.input_ids.tolist()}{item.attention_mask.tolist()}".encode())
        return digest.hexdigest()

    @checked
    def batches(self, tokenizer: Tokenizer | None = None, *, length: int = 128, batch_size: int = 8) -> Iterator[Batch]:
        """The batches as given; tokenizer, length and batch_size are ignored."""
        yield from self.items


def tokens(batches: Iterable[Mapping[str, Any]], name: str = "tokens") -> Tokens:
    """Wrap an iterable of tokenized batches (`input_ids`, and `attention_mask` if rows are padded).

    Raises:
        DataError: if it is empty, or a batch has no input_ids, or they are not a table of integers with a mask of the
            same shape.
    """
    items = []
    for number, batch in enumerate(batches):
        if "input_ids" not in batch:
            raise DataError(f"batch {number} has fields {sorted(batch)}, input_ids is needed")
        try:
            ids = torch.as_tensor(batch["input_ids"])
            mask = torch.as_tensor(batch.get("attention_mask", torch.ones_like(ids))).bool()
        except (TypeError, ValueError) as error:
            raise DataError(
                f"batch {number}: input_ids are not a table of integers: {error}; pad the rows to one length"
            ) from error
        if ids.ndim != 2 or not ids.numel() or ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
            raise DataError(
                f"batch {number}: input_ids are {ids.dtype} of shape {tuple(ids.shape)}; give integers (rows, tokens), and give "
                "at least one token"
            )
        if mask.shape != ids.shape:
            raise DataError(
                f"batch {number}: attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}; give one entry a token"
            )
        # An embedding takes 64 or 32 bits only; tokenized corpora are often stored in 16.
        items.append(Batch(ids.long(), mask, tuple(f"{number}.{row}" for row in range(ids.shape[0]))))
    if not items:
        raise DataError(f"corpus {name!r} is empty: no batches")
    return Tokens(tuple(items), name)


def padded(rows: Iterable[Sequence[int]], pad: int = 0, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """(token ids, mask) of rows of tokens, filled up with `pad` on the right or on the left."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    side = "left" if left else "right"
    ids = pad_sequence(tensors, batch_first=True, padding_value=pad, padding_side=side)
    ones = [torch.ones_like(row, dtype=torch.bool) for row in tensors]
    return ids, pad_sequence(ones, batch_first=True, padding_side=side)


# --- Built-in corpora

# Not ordinary library code: tests, vendored packages, demos, generated grammars.
_SKIPPED = {
    "test", "tests", "site-packages", "idlelib", "lib2to3", "turtledemo", "__pycache__", "ensurepip", "pydoc_data", "encodings",
}  # fmt: skip


@checked
def code(*, characters: int | None = 64_000, seed: int = 0) -> Corpus:
    """Python code: excerpts of the standard library of the running interpreter, each from another file.

    Args:
        characters: approximate amount of text, in excerpts of 1,600 characters; None for all files in full.
    Raises:
        ArgumentError: if a number is out of range.
    """
    check_seed(seed=seed)
    if characters is not None:
        check_whole(characters=characters)
    return _code(characters, seed)


@cache  # reading the standard library takes a second
def _code(characters: int | None, seed: int) -> Corpus:
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


@checked
def prose() -> Corpus:
    """About 64 KB of encyclopaedic prose on forty subjects, written for this project."""
    text = resources.files("repedit.data").joinpath("builtin/prose.txt").read_text(encoding="utf-8")
    return Corpus(_paragraphs(text, "prose"), "prose")


BUILTIN = {"code": code, "prose": prose}
"""The corpora that come with repedit, by name."""


@checked
def builtin_corpus(name: str) -> Corpus:
    """The built-in corpus with a name.

    Raises:
        UnknownName: if there is none.
    """
    if name not in BUILTIN:
        raise UnknownName(
            f"no built-in corpus is called {name!r}, and a file is read with repedit.data.read(path); {nearest(name, BUILTIN)}"
        )
    return BUILTIN[name]()


# --- Corpora from files and lists


@checked
def read(source: str | Path | Iterable[Any], *, text: str = "text", name: str | None = None) -> Corpus | Tokens:
    """A corpus from a file, a list of strings, or an iterable of tokenized batches.

    A .txt or .md file is split into documents at blank lines; .jsonl and .parquet files give one document per row, from
    the field `text`. The name of a built-in corpus ("code", "prose") is also accepted.

    Raises:
        NotFound: if the file does not exist.
        DataError: if it is empty, a row lacks the field, or the kind of file is unknown.
        MissingDependency: if parquet is read without pyarrow.
    """
    if isinstance(source, str) and source in BUILTIN:
        return builtin_corpus(source)
    if isinstance(source, str | Path):
        path = user_path(source)
        if not is_file(path):
            raise NotFound(f"{str(path.absolute())[:300]} is not a file; {nearest(str(source)[:200], BUILTIN)}")
        return Corpus(_documents(path, text), name or path.stem)
    if not isinstance(source, Iterable) or isinstance(source, Mapping):
        raise DataError(
            f"the source is {source!r:.100}; give a file, a list of strings, or an iterable of tokenized batches"
        )
    items = list(source)
    if items and all(isinstance(item, Mapping) for item in items):
        return tokens(items, name or "tokens")
    wrong = next((i for i, item in enumerate(items) if not isinstance(item, str)), None)
    if wrong is not None:
        raise DataError(f"item {wrong} is a {type(items[wrong]).__name__}; give strings, or mappings with input_ids")
    return Corpus(tuple(Document(str(i), item) for i, item in enumerate(items)), name or "texts")


def _documents(path: Path, field: str) -> tuple[Document, ...]:
    if path.suffix in (".txt", ".md"):
        return _paragraphs(read_text(path), path.stem)
    if path.suffix == ".jsonl":
        return tuple(_row(path, number, row, field) for number, row in json_rows(path))
    if path.suffix == ".parquet":
        return tuple(_row(path, number, row, field) for number, row in enumerate(parquet_rows(path), 1))
    raise DataError(f"{path}: cannot read files of kind {path.suffix!r}; give one of .txt, .md, .jsonl, .parquet")


def _paragraphs(content: str, prefix: str) -> tuple[Document, ...]:
    parts = [part.strip() for part in content.replace("\r\n", "\n").split("\n\n")]
    return tuple(Document(f"{prefix}/{i}", part) for i, part in enumerate(p for p in parts if p))


def _row(path: Path, number: int, row: Mapping[str, Any], field: str) -> Document:
    if not isinstance(row.get(field), str):
        raise DataError(
            f"{path}, row {number}: the field {field!r} must hold a text; the row has {sorted(row)}. Name another field with text=..."
        )
    name = row.get("id")
    return Document(f"{path.stem}/{number}" if name is None else str(name), row[field])


# --- Rows, each a prompt with an answer, and batches of rows that mark the tokens of the answers


@dataclass(frozen=True)
class Row:
    """A prompt and the answer that should follow it.

    Raises:
        DataError: if a field is not a text.
    """

    prompt: str
    answer: str
    id: str
    alternative: str | None = None
    """Another answer, for preference losses."""
    entity: str = ""
    """What the row is about, as written in the prompt; empty if there is no entity."""

    def __post_init__(self) -> None:
        for name in ("id", "prompt", "answer", "entity"):
            check_text(getattr(self, name), f"row {self.id!r}: the {name}")
        if self.alternative is not None:
            check_text(self.alternative, f"row {self.id!r}: the alternative")
        check_fields(self)

    @property
    def text(self) -> str:
        """Prompt and answer as one text."""
        return prompt_with_answer(self.prompt, self.answer)


@dataclass(frozen=True, eq=False)
@checked
class Rows:
    """Rows in the given order; their batches mark the answers and the entities."""

    items: tuple[Row, ...]
    name: str = "rows"

    def __post_init__(self) -> None:
        if not self.items:
            raise DataError(f"rows {self.name!r} are empty; give at least one")
        check_ids(self.items, f"rows {self.name!r}")
        blank = next((row.id for row in self.items if not row.answer.strip()), None)
        if blank is not None:
            raise DataError(f"rows {self.name!r}: row {blank!r} has no answer; give one")

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        return f"Rows({self.name!r}, {len(self)} rows)"

    @cached_property
    def hash(self) -> str:
        """sha256 over every field of every row, in order."""
        return row_hash(self.items)

    @checked
    def batches(self, tokenizer: Tokenizer | None, *, length: int = 128, batch_size: int = 8) -> Iterator[Batch]:
        """The rows in order, padded on the right, with `answer` and `entity` masks; nothing is truncated.

        Each row starts with the beginning-of-sequence token if the tokenizer adds one.

        Raises:
            DataError: if a row is longer than `length` tokens, or its answer has no token of its own.
            ArgumentError: if there is no tokenizer, or the batch size is below 1.
        """
        if tokenizer is None or batch_size < 1:
            raise ArgumentError(
                f"rows {self.name!r}: batch_size={batch_size}, tokenizer {type(tokenizer).__name__}; rows are text, so "
                "the model needs a tokenizer, and a batch at least 1 row"
            )
        pad = getattr(tokenizer, "pad_token_id", None) or 0
        for i in range(0, len(self.items), batch_size):
            part = self.items[i : i + batch_size]
            texts = [text for (text,) in encoded_choices(tokenizer, [(row.prompt, (row.answer,)) for row in part])]
            for row, (ids, start) in zip(part, texts, strict=True):
                if len(ids) > length:
                    raise DataError(f"row {row.id!r} has {len(ids)} tokens, length={length}; raise length")
                if len(ids) == start:
                    raise DataError(f"row {row.id!r}: the answer {row.answer!r} has no token of its own; give another")
            ends = [entity_end(tokenizer, row.prompt, row.entity) for row in part]
            yield _batch_of_rows(part, texts, ends, pad)


TextSource = Batches | Iterable[str] | Iterable[Row] | Row
"""What holds text: a Corpus, Tokens, Rows or Facts; several rows or facts, or one; several strings."""


@checked
def as_batches(source: TextSource, *, name: str = "rows") -> Batches:
    """The batches of whatever holds text.

    Raises:
        DataError: if the source is none of these, mixes them, or is empty.
    """
    if isinstance(source, Batches):
        return source
    items: list[object] = list(source) if isinstance(source, Iterable) and not isinstance(source, str) else [source]
    rows = [item for item in items if isinstance(item, Row)]
    texts = [item for item in items if isinstance(item, str)]
    if items and len(rows) == len(items):
        return Rows(tuple(rows), name)
    if items and len(texts) == len(items) and not isinstance(source, str):
        return Corpus(tuple(Document(str(i), text) for i, text in enumerate(texts)), name)
    kinds = sorted({type(item).__name__ for item in items})
    raise DataError(
        f"{name!r} holds {', '.join(kinds) or 'nothing'}; give a corpus, rows, facts or a list of strings "
        "(a file is read with repedit.data.read or repedit.data.facts)"
    )


def check_ids(items: Sequence[Row], where: str) -> None:
    """Refuse rows with the same id.

    Raises:
        DataError: with the id.
    """
    ids: set[str] = set()
    for row in items:
        if row.id in ids:
            raise DataError(f"{where}: the id {row.id!r} appears twice; ids must differ")
        ids.add(row.id)


def row_hash(items: Sequence[Row]) -> str:
    """sha256 over every field of every row, in order."""
    digest = hashlib.sha256()
    for row in items:
        digest.update(json.dumps(asdict(row), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _batch_of_rows(rows: Sequence[Row], texts: Sequence[Encoded], ends: Sequence[int | None], pad: int) -> Batch:
    input_ids, mask = padded((ids for ids, _ in texts), pad)
    position = torch.arange(mask.shape[1])
    start = torch.tensor([[start] for _, start in texts])
    end = torch.tensor([[-1 if end is None else end] for end in ends])
    return Batch(
        input_ids=input_ids, attention_mask=mask, document=tuple(row.id for row in rows),
        answer=(position >= start) & mask, entity=position == end,
    )  # fmt: skip
