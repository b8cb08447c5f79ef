"""Whatever damage a file has, its door raises an error of repedit and writes nothing, or reads what the file says."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors import deserialize, safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer

import repedit as rp
from repedit import runs
from repedit.activations.collection import Collection
from repedit.auditing.report import Report
from repedit.errors import RepeditError
from repedit.io import safetensors, text
from repedit.io.checkpoint import INDEX, open_shards
from repedit.io.safetensors import read_header
from repedit.neurons.scores import Score
from repedit.rewrite.verification import verification
from repedit.unlearning import recipe as written
from repedit.unlearning import recipes
from tests.fuzz_strategies import EXAMPLES, FUZZ, damaged_bytes, emitted, strictly_read, tables
from tests.handmade_reports import clean
from tests.tiny import tiny

FACTS = [
    {"id": "a", "prompt": "The capital of A is", "answer": "B", "choices": ["B", "C", "D"], "entity": "A"},
    {"prompt": "The capital of E is", "answer": 1, "choices": ["F", "G"], "paraphrases": ["E's capital is"]},
    {"prompt": "The capital of H is", "answer": "I", "role": "retain", "translations": {"de": "Die Hauptstadt ist"}},
    {"prompt": "The capital of J is", "answer": "K", "domain": "towns", "split": "V", "alternative": "L"},
]
CORPUS = [{"text": "one text", "id": 1}, {"text": "another", "id": "b"}]
SHARDS = {"metadata": {"total_size": 33}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
TOML = """base = "npo"
lr = 5e-4
steps = 10
[options]
beta = 0.1
[combiner]
name = "weighted_sum"
[[terms]]
loss = "npo"
role = "forget"
beta = 0.2
[parameters]
layers = "0-1"
modules = ["mlp.out"]
[schedule]
"""
TOKENS = (
    "nan", "-inf", "1e999", "true", "[]", "{}", '""', '"x"', "-1", "0", "1979-05-27", "9" * 5000, "[" * 2000 + "]" * 2000,
    "[[1], [2]]", '"\\ud800"', "{a = 1}", "1.5",
)  # fmt: skip


@dataclass(frozen=True)
class Door:
    """A reader of files, the damaged files to give to it, and what must be true of a value it returns."""

    files: Callable[[], st.SearchStrategy[bytes]]
    read: Callable[[Path], Any]
    right: Callable[[Path, Any], None]
    name: str = "file.json"
    examples: int = EXAMPLES


def as_bytes(texts: st.SearchStrategy[str]) -> st.SearchStrategy[bytes]:
    return texts.flatmap(damaged_bytes)


def rows(items: list[Any]) -> st.SearchStrategy[bytes]:
    """JSON Lines, each line damaged for itself."""
    return as_bytes(st.tuples(*map(tables, items)).map(lambda lines: "\n".join(lines) + "\n"))


def objects(data: bytes) -> list[Any]:
    """The rows of JSON Lines that a door has taken."""
    return [strictly_read(line) for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip(b" \t\r")]


@st.composite
def toml(draw: Callable[..., Any]) -> str:
    lines = TOML.splitlines()
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(lines) - 1))
        line, kind = lines[at], draw(st.sampled_from(("value", "value", "remove", "repeat", "add")))
        if kind == "value" and "=" in line:
            lines[at] = line.split("=")[0] + "= " + draw(st.sampled_from(TOKENS))
        elif kind == "add":
            key = draw(
                st.sampled_from(("x", "terms", "lr", "name", ".".join("a" * 150), "sampler", "stop", "saliency"))
            )
            lines.insert(at, f"{key} = {draw(st.sampled_from(TOKENS))}")
        elif kind != "value":
            lines[at : at + 1] = [] if kind == "remove" else [line, line]
    return "\n".join(lines) + "\n"


def file_of(table: str, body: bytes) -> bytes:
    data = table.encode(errors="surrogatepass")
    return len(data).to_bytes(8, "little") + data + body


def parts_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """(header, body) of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


TENSORS = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 32]},
    "c": {"dtype": "BF16", "shape": [0, 3], "data_offsets": [32, 32]},
    "d": {"dtype": "U8", "shape": [], "data_offsets": [32, 33]},
}
BODY = bytes(range(33))


def tensor_files() -> st.SearchStrategy[bytes]:
    lengths = st.sampled_from((0, 0, 0, 0, 1, -1, 8))

    def of(draw: tuple[str, int, int]) -> bytes:
        table, pad, more = draw
        body = BODY[: len(BODY) + more] if more < 0 else BODY + bytes(more)
        return file_of(table + " " * pad, body)

    whole = st.tuples(tables(TENSORS), lengths.map(abs), lengths).map(of)
    return st.one_of(
        whole, whole, st.tuples(whole, st.integers(0, 60), st.binary(min_size=1, max_size=3)).map(_patched)
    )


def _patched(draw: tuple[bytes, int, bytes]) -> bytes:
    data, at, new = draw
    return data[:at] + new + data[at + len(new) :]


def as_the_library(path: Path, read: Any) -> None:
    """The entries are those that the safetensors library finds, with the same bytes."""
    data, (entries, _) = path.read_bytes(), read
    library = dict(deserialize(data))
    assert set(library) == set(entries)
    for name, entry in entries.items():
        assert data[entry.start : entry.stop] == bytes(library[name]["data"])
        assert list(entry.spec.shape) == library[name]["shape"]


@cache
def saved(kind: str) -> tuple[dict[str, Any], bytes]:
    """A saved value of repedit as (header, body)."""
    import tempfile

    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(6, 2, generator=generator)
    mask = rp.Diagonal.fill(torch.arange(6) > 1, torch.ones(6))
    chain = rp.LowRank.projection(basis, center=torch.ones(6)) @ mask
    values = {
        "edit": rp.Edit(
            {rp.Site.parse("0.mlp.out"): chain, rp.Site.parse("1.mlp.neurons"): mask}, {"seed": 1, "model": "ab"}
        ),
        "delta": rp.Delta({"a.weight": torch.ones(2, 3), "b": torch.zeros(2)}, {"method": "ga"}, ({"loss": 1.0},)),
    }
    site, other = rp.Site.parse("0.mlp.neurons"), rp.Site.parse("1.mlp.neurons")
    values["scores"] = rp.Scores(
        {s: Score(s, torch.ones(4).double(), "abs", "ratio", 0.5, (1,)) for s in (site, other)}, {"seed": 0}
    )
    activity = rp.Activity.zeros(4).update(torch.randn(3, 4, generator=generator))
    plain = {
        "model": "m",
        "corpus": "c",
        "data_hash": "d",
        "rule": {"special": False},
        "seen": 3,
        "counted": 3,
        "gated": True,
    }
    values["collection"] = Collection({site: activity}, group_sizes={site: {}}, **plain)
    values["moments"] = Collection(
        {site: rp.Moments(3).update(torch.randn(5, 3, generator=generator))}, group_sizes={site: {}}, **plain
    )
    with tempfile.TemporaryDirectory() as folder:
        values[kind].save(Path(folder) / "x.safetensors")
        return parts_of(Path(folder) / "x.safetensors")


def archives(kind: str) -> st.SearchStrategy[bytes]:
    table, body = saved(kind)
    header = json.loads(table["__metadata__"]["repedit"])
    names = {k: v for k, v in table.items() if k != "__metadata__"}

    def of(draw: tuple[str, str]) -> bytes:
        inner, outer = draw
        return file_of('{"__metadata__": {"repedit": ' + json.dumps(inner) + "}, " + outer.removeprefix("{"), body)

    return st.one_of(
        st.tuples(tables(header), st.just(emitted(names))), st.tuples(st.just(json.dumps(header)), tables(names))
    ).map(of)


def usable_edit(path: Path, edit: Any) -> None:
    for map_ in edit.maps.values():
        assert map_(torch.ones(2, map_.width)).shape == (2, map_.width)
    stored = json.loads(parts_of(path)[0]["__metadata__"]["repedit"])
    assert dict(edit.provenance) == stored["provenance"] and {str(site) for site in edit.maps} == set(stored["maps"])
    again = path.parent.parent / "again.safetensors"
    edit.save(again)
    assert rp.Edit.load(again).hash == edit.hash and edit.describe()


def usable_delta(path: Path, delta: Any) -> None:
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(delta.tensors)
        assert all(torch.equal(file.get_tensor(name), value) for name, value in delta.tensors.items())
    assert delta.summary() and (delta * 2.0).tensors


def usable_scores(path: Path, scores: Any) -> None:
    assert scores.agreement and scores.largest(2) is not None and repr(scores)
    again = path.parent.parent / "again.safetensors"
    scores.save(again)
    assert rp.Scores.load(again).keys() == scores.keys()


def usable_collection(path: Path, collection: Any) -> None:
    doubled = collection + collection
    assert all(value.mean.shape == (value.width,) for value in doubled.values()) and repr(doubled)
    again = path.parent.parent / "again.safetensors"
    collection.save(again)
    assert Collection.load(again).kind == collection.kind


def directories() -> st.SearchStrategy[bytes]:
    return as_bytes(tables(SHARDS))


def opened(index: Path) -> Any:
    for name, file in (("a", "one.safetensors"), ("b", "two.safetensors")):
        table = {name: {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}
        (index.parent / file).write_bytes(file_of(json.dumps(table), name.encode() * 2))
    return open_shards(index.parent)


def of_the_index(index: Path, shards: Any) -> None:
    weight_map = strictly_read(index.read_bytes())["weight_map"]
    assert {name: entry.file for name, entry in shards.entries.items()} == weight_map
    assert all(shards.read(name).tolist() == [ord(name)] * 2 for name in weight_map)


def right_facts(path: Path, facts: Any) -> None:
    stored = objects(path.read_bytes())
    assert [f.prompt for f in facts.forget] == [
        r["prompt"] for r in stored if r.get("role", "forget") != "retain" or r["role"] is None
    ]
    assert len(facts.forget) + len(facts.retain) == len(stored)
    assert all(f.answer in f.choices and f.text.encode() for f in (*facts.forget, *facts.retain) if f.choices)


def small_report() -> dict[str, Any]:
    """An audit of few items, so that damage meets every field."""
    whole = json.loads(clean().to_json())
    finding = whole["findings"]["edited"][0]
    finding |= {
        "items": finding["items"][:2],
        "correct": [r[:2] for r in finding["correct"]],
        "graded": [r[:2] for r in finding["graded"]],
    }
    return whole | {
        "findings": {"edited": [finding]},
        "recoveries": whole["recoveries"][:1],
        "examples": whole["examples"][:1],
    }


def same_report(path: Path, report: Any) -> None:
    strictly_read(path.read_bytes())
    assert Report.from_json(report.to_json()).to_json() == report.to_json()


def right_recipe(path: Path, recipe: Any) -> None:
    def numbers(value: Any) -> list[float]:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return [value] if isinstance(value, float) else [n for child in inner for n in numbers(child)]

    table = tomllib.loads(path.read_text("utf-8-sig"))
    assert isinstance(recipe, rp.recipes.UnlearnRecipe) and all(map(math.isfinite, numbers(table)))
    assert "lr" not in table or recipe.lr == float(table["lr"])


SMALL = dict.fromkeys(("hidden_size", "intermediate_size"), 8) | {"vocab_size": 6, "num_hidden_layers": 1}
TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "decoder": None, "post_processor": None,
    "added_tokens": [
        {"id": 1, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {"w0": 0, "<s>": 1, "w2": 2, "w3": 3}, "unk_token": "w3"},
}  # fmt: skip


@cache
def checkpoint() -> dict[str, bytes]:
    """The files of a tiny model with a tokenizer."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        tiny("llama", **SMALL).model.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    return files | {"tokenizer.json": json.dumps(TOKENIZER).encode()}


def loaded(path: Path) -> Any:
    """The model of a directory with one damaged file."""
    folder = path.parent.parent / "model"
    folder.mkdir(exist_ok=True)
    for name, data in checkpoint().items():
        (folder / name).write_bytes(path.read_bytes() if name == path.name else data)
    return rp.load(folder)


def right_model(path: Path, subject: Any) -> None:
    stored = load_file(subject.source / "model.safetensors")
    assert all(torch.equal(p, stored[name]) for name, p in subject.model.named_parameters())
    assert subject.model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 6) and repr(subject)


def right_tokenizer(path: Path, subject: Any) -> None:
    ids = AutoTokenizer.from_pretrained(subject.source).encode("w0 w2")
    assert subject.tokenizer("w0 w2").input_ids == ids


MANIFEST = {"files": {"a.txt": "0" * 64, "b.txt": "1" * 64}, "format": 1, "sites": {"0.mlp.out": {"map": "x"}}}
RECORD = {
    "number": 1, "verb": "prune", "key": "0" * 64, "table": {"verb": "prune", "fraction": 0.1}, "command": ["prune", "x"], "exit_code": 0,
    "seconds": 1.5, "out": "edited", "files": {"a": "0" * 64}, "inputs": {}, "display": [{"kind": "line", "text": "x"}],
    "versions": {"torch": "2"},
}  # fmt: skip
DOORS = {
    "json": Door(lambda: as_bytes(tables(TENSORS)), text.read_json, lambda p, v: _equal(v, strictly_read(p.read_bytes()))),
    "json lines": Door(
        lambda: rows(FACTS), lambda p: [r for _, r in text.json_rows(p)], lambda p, v: _equal(v, objects(p.read_bytes())), "rows.jsonl"
    ),
    "toml": Door(lambda: as_bytes(toml()), lambda p: written.recipe_from_file(p, recipes.by_name), right_recipe, "recipe.toml"),
    "safetensors": Door(tensor_files, read_header, as_the_library, "model.safetensors"),
    "edit": Door(lambda: archives("edit"), rp.Edit.load, usable_edit, "edit.safetensors"),
    "delta": Door(lambda: archives("delta"), rp.Delta.load, usable_delta, "delta.safetensors"),
    "scores": Door(lambda: archives("scores"), rp.Scores.load, usable_scores, "scores.safetensors"),
    "collection": Door(lambda: archives("collection"), Collection.load, usable_collection, "c.safetensors"),
    "moments": Door(lambda: archives("moments"), Collection.load, usable_collection, "m.safetensors"),
    "index": Door(directories, opened, of_the_index, INDEX),
    "facts": Door(lambda: rows(FACTS), rp.data.facts, right_facts, "facts.jsonl"),
    "corpus": Door(
        lambda: rows(CORPUS), rp.data.read,
        lambda p, v: _equal([d.text for d in v.documents], [r["text"] for r in objects(p.read_bytes())]), "corpus.jsonl",
    ),
    "report": Door(lambda: as_bytes(tables(small_report())), Report.load, same_report, "audit.json"),
    "manifest": Door(
        lambda: as_bytes(tables(MANIFEST)), lambda p: verification(p.parent),
        lambda p, v: _equal(sorted((*v.changed, *v.missing)), sorted(json.loads(p.read_bytes())["files"])), "repedit.json",
    ),
    "config": Door(
        lambda: as_bytes(tables(json.loads(checkpoint()["config.json"]))), loaded, right_model, "config.json", max(10, EXAMPLES // 3)
    ),
    "tokenizer": Door(lambda: as_bytes(tables(TOKENIZER)), loaded, right_tokenizer, "tokenizer.json", max(10, EXAMPLES // 3)),
    "run": Door(
        lambda: rows([RECORD, RECORD | {"number": 2}]), lambda p: runs.Journal(p.with_name("run.toml")).latest(),
        lambda p, v: _equal({e.number for e in v.values()}, set(v)), "run.journal.jsonl",
    ),
}  # fmt: skip


def _equal(value: Any, expected: Any) -> None:
    assert value == expected


def through(name: str, folder: Path, configuration: settings) -> None:
    """Give damaged files to a door."""
    door, place = DOORS[name], folder / "door"
    place.mkdir()
    path = place / door.name

    @settings(configuration, max_examples=configuration.max_examples * door.examples // EXAMPLES)
    @given(door.files())
    def one(data: bytes) -> None:
        path.write_bytes(data)
        try:
            value = door.read(path)
        except RepeditError:
            value = None
        left = sorted(
            p.name for p in place.iterdir() if not p.name.endswith("one.safetensors") and p.name != "two.safetensors"
        )
        assert left == [door.name], "a reader wrote something"
        if value is not None:
            door.right(path, value)

    one()


@pytest.mark.parametrize("name", DOORS)
def test_a_door_reads_what_is_there_or_refuses_it(name, tmp_path):
    through(name, tmp_path, FUZZ)


PLANTED = {
    "a key that is given twice is taken": ("json", text, "_unique", dict),
    "any depth is taken": ("json lines", text, "_check_depth", lambda *_: None),
    "tensors may overlap": ("safetensors", safetensors, "_check_layout", lambda *_: None),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_the_fuzz_finds_a_fault_that_was_planted(fault, tmp_path, monkeypatch):
    name, module, attribute, broken = PLANTED[fault]
    monkeypatch.setattr(module, attribute, broken)
    search = settings(FUZZ, max_examples=2000, phases=(Phase.generate,), derandomize=True)
    with pytest.raises(BaseException) as caught:  # the library's own errors and hypothesis' groups of errors, too
        through(name, tmp_path, search)
    assert not isinstance(caught.value, RepeditError)


def test_undamaged_files_are_read(tmp_path):
    """The fuzz would prove nothing of a door that refuses everything."""
    facts, corpus = (("\n".join(map(json.dumps, rows)) + "\n").encode() for rows in (FACTS, CORPUS))
    plain = {
        "json": json.dumps(TENSORS).encode(), "safetensors": file_of(json.dumps(TENSORS), BODY), "toml": TOML.encode(),
        "json lines": facts, "facts": facts, "corpus": corpus, "index": json.dumps(SHARDS).encode(),
        "report": json.dumps(small_report()).encode(), "manifest": json.dumps(MANIFEST).encode(),
        "run": (json.dumps(RECORD) + "\n").encode(),
        "config": checkpoint()["config.json"], "tokenizer": checkpoint()["tokenizer.json"],
        **{kind: file_of(json.dumps(saved(kind)[0]), saved(kind)[1]) for kind in ("edit", "delta", "scores", "collection", "moments")},
    }  # fmt: skip
    assert plain.keys() == DOORS.keys()
    for name, data in plain.items():
        path = tmp_path / name / DOORS[name].name
        path.parent.mkdir()
        path.write_bytes(data)
        DOORS[name].right(path, DOORS[name].read(path))
