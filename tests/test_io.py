"""The doors through which files come in and go out."""

from __future__ import annotations

import ast
import inspect
import json
import os
import socket
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import deserialize
from safetensors.torch import load_file, save_file

import repedit as rp
from repedit.activations.collection import Collection
from repedit.auditing.attack import Finding
from repedit.auditing.report import Report
from repedit.auditing.store import FindingStore
from repedit.edit import Edit
from repedit.errors import ArgumentError, CheckpointError, DataError, NotFound, RepeditError
from repedit.io import archive, files, tables, text
from repedit.io.checkpoint import open_shards
from repedit.io.safetensors import read_header, write_file
from repedit.io.targets import check_target
from repedit.rewrite import hub
from repedit.rewrite.gguf import gguf_check
from repedit.rewrite.verification import verification
from repedit.training.resume import state_path
from tests import handmade_reports
from tests.handmade_reports import report
from tests.saved_models import saved

PACKAGE = Path(rp.__file__).parent
MASK = rp.Edit({rp.Site.parse("0.mlp.neurons"): rp.Diagonal.mask(torch.arange(4) > 1)}, {"seed": 1})


# --- regular files -------------------------------------------------------------------------------------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def endless(path: Path) -> None:
    path.symlink_to(path)


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


NOT_FILES = {
    "pipe": (pipe, "is a named pipe, not a regular file"),
    "socket": (listening, "is a socket, not a regular file"),
    "directory": (Path.mkdir, "is a directory, not a regular file"),
    "device": (lambda p: p.symlink_to("/dev/zero"), "is a device, not a regular file"),
    "dangling": (dangling, "no such file"),
    "endless": (endless, "symbolic links"),
    "pointer": (pointer, "is a Git LFS pointer.* git lfs pull"),
    "absent": (lambda p: None, "no such file"),
}


@pytest.fixture(params=NOT_FILES)
def not_a_file(request, tmp_path, monkeypatch):
    """(path, message) of something that no reader may wait for."""
    monkeypatch.chdir(tmp_path)  # the name of a socket has at most 107 characters
    make, message = NOT_FILES[request.param]
    make(tmp_path / "x")
    return tmp_path / "x", message


def test_only_a_regular_file_is_opened(not_a_file):
    path, message = not_a_file
    with pytest.raises(CheckpointError, match=message):
        files.open_regular(path)


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "\ud800", Path("/proc/self/mem/x")], ids=repr)
def test_what_is_no_path_is_refused(path):
    with pytest.raises(DataError, match="cannot be opened"):
        files.open_regular(path, DataError)
    assert not files.is_file(path)


READERS = {
    "edit": (rp.Edit.load, "e.safetensors"), "delta": (rp.Delta.load, "d.safetensors"),
    "report": (Report.load, "audit.json"), "header": (read_header, "m.safetensors"),
    "data": (rp.data.read, "c.jsonl"), "text": (rp.data.read, "c.txt"), "parquet": (rp.data.read, "c.parquet"),
    "facts": (rp.data.facts, "f.jsonl"), "recipe": (rp.recipes.read, "r.toml"), "journal": (text.JsonLines, "j.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_FILES)
@pytest.mark.parametrize("name", READERS)
def test_every_reader_refuses_what_is_no_file(name, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read, file = READERS[name]
    NOT_FILES[kind][0](tmp_path / file)
    if (name, kind) == ("journal", "absent"):
        assert read(tmp_path / file).rows == []
        return
    with pytest.raises(RepeditError):
        read(tmp_path / file)


@pytest.mark.parametrize("kind", ["pipe", "pointer", "dangling"])
@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model"],
)
def test_a_checkpoint_with_a_file_to_hang_on_is_refused(kind, name, tmp_path, source):
    folder = copied(source, tmp_path)
    (folder / name).unlink(missing_ok=True)
    NOT_FILES[kind][0](folder / name)
    for attempt in (rp.load, lambda f: rp.export(MASK, f, tmp_path / "out")):
        with pytest.raises(CheckpointError):
            attempt(folder)
    assert not (tmp_path / "out").exists()


def copied(source: Path, place: Path) -> Path:
    import shutil

    return Path(shutil.copytree(source, place / "in"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("checkpoint") / "llama")


@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"a": 1, "a": 2}', '{"a": ' + "[" * 200 + "]" * 200 + "}", '"\\ud800"', "\ufeff{}"]
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_settings_that_are_no_json_object_are_refused(name, content, tmp_path, source):
    folder = copied(source, tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{name} (cannot be read as JSON|holds a JSON list)"):
        open_shards(folder)


# --- JSON, JSON Lines, TOML ----------------------------------------------------------------------------------------

REFUSED = {
    "[" * 101 + "]" * 101: "nested deeper than 100 levels",
    "[" * 100_000 + "]" * 100_000: "nested deeper than 100 levels",
    '{"a":' * 101 + "1" + "}" * 101: "nested deeper than 100 levels",
    '{"a": {"b": 1, "b": 1}}': "the key 'b' is given twice",
    '{"a": NaN}': "the number NaN is not finite",
    '{"a": [-Infinity]}': "the number -Infinity is not finite",
    '{"a": 1e999}': "the number 1e999 is not finite",
    '{"a": ' + "7" * 301 + "}": "an integer of 301 digits",
    '{"a": "x\\ud83d y"}': r"holds half of a surrogate pair \('\\\\ud83d'\)",
    '{"a": "x\\ud83d\\\\ude00"}': "holds half of a surrogate pair",
    '{"\\udc00": 1}': "holds half of a surrogate pair",
    "": "not JSON", "{'a': 1}": "not JSON", '{"a": 1} x': "not JSON", '{"a": "\t"}': "not JSON",
}  # fmt: skip


@pytest.mark.parametrize("content", REFUSED, ids=lambda c: c[:12])
def test_json_that_says_nothing_certain_is_refused(content, tmp_path):
    with pytest.raises(DataError, match=f"here:? .*{REFUSED[content]}"):
        text.parse_json(content, "here")
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n' + content + "\n" if content else "{}\n,\n")
    with pytest.raises(DataError, match=r"x\.jsonl, row 2"):
        list(text.json_rows(path))


@pytest.mark.parametrize("line", ["\x1c", "\u2028", "\xa0", "\x00"])
def test_a_line_of_another_blank_is_no_blank_line(line, tmp_path):
    (tmp_path / "x.jsonl").write_text(f'{{"text": "a"}}\n \t\r\n{line}\n')
    with pytest.raises(DataError, match=r"x\.jsonl, row 3: not JSON"):
        rp.data.read(tmp_path / "x.jsonl")


@pytest.mark.parametrize("value", ["\\ud83d\\ude00", "\\\\ud83d", "\\u00e9", "\\\\\\\\ud800"])
def test_whole_pairs_and_escaped_backslashes_are_read(value):
    assert text.parse_json(f'{{"a": "{value}"}}', "here") == {"a": json.loads(f'"{value}"')}
    assert text.parse_json("[" * 100 + "]" * 100, "here")


def test_the_line_of_half_a_pair_is_named(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1,\n\n"b": "\\ud800"}')
    with pytest.raises(CheckpointError, match=r"x\.json, line 3 holds half of a surrogate pair"):
        text.read_json(tmp_path / "x.json")
    for name in ("c.jsonl", "f.jsonl"):
        (tmp_path / name).write_text(
            '{"text": "a", "prompt": "p", "answer": "q"}\n{"text": "\\ud83d", "prompt": "\\ud83d", "answer": "q"}\n'
        )
    for read, name in ((rp.data.read, "c.jsonl"), (rp.data.facts, "f.jsonl")):
        with pytest.raises(DataError, match=rf"{name}, row 2 holds half of a surrogate pair"):
            read(tmp_path / name)


@pytest.mark.parametrize("make", [
    lambda bad: rp.data.read(["fine", bad]), lambda bad: rp.data.Row("p", bad, "1"), lambda bad: rp.data.Row(bad, "a", "1"),
    lambda bad: rp.data.Fact("1", bad, "a", "e"),
])  # fmt: skip
def test_half_a_pair_in_memory_is_refused(make):
    with pytest.raises(DataError, match="holds half of a surrogate pair"):
        make("an emoji cut in half \ud83d")


@pytest.mark.parametrize(("data", "message"), [
    (b'{"text": "a"}\n{"text": "\xe9"}\n', "is not UTF-8: line 2"), ("text".encode("utf-16"), "is not UTF-8: line 1"),
])  # fmt: skip
def test_another_encoding_is_refused_with_the_line(data, message, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(data)
    with pytest.raises(DataError, match=message):
        rp.data.read(tmp_path / "x.jsonl")


@pytest.mark.parametrize(("content", "message"), [
    ("a = nan", "not finite"), ("a = -inf", "not finite"), ("a = 1e999", "not finite"), ("a = 1\na = 2", "no readable TOML"),
    ("a = " + "[" * 300 + "]" * 300, "nested deeper"), (".".join("a" * 200) + " = 1", "nested deeper"), ("a = '\\ud800", "no readable TOML"),
    ("a = " + "[" * 9999 + "]" * 9999, "nested deeper"), ("a = " + "1" * 5000, "no readable TOML"), ("\x00", "no readable TOML"),
])  # fmt: skip
def test_toml_that_says_nothing_certain_is_refused(content, message, tmp_path):
    (tmp_path / "x.toml").write_text(content)
    with pytest.raises(DataError, match=message):
        text.read_toml(tmp_path / "x.toml")


@pytest.mark.parametrize(
    "content",
    ["lr = 'x'", "terms = 3", "terms = [1]", "options = 3", "base = 3", "combiner = 'x'", "lr = []", "parameters = 1"],
)
def test_a_recipe_with_values_of_another_kind_is_refused(content, tmp_path):
    (tmp_path / "x.toml").write_text(content if content.startswith("base") else f'base = "npo"\n{content}')
    with pytest.raises(RepeditError):
        rp.recipes.read(tmp_path / "x.toml")


def test_what_is_no_plain_value_has_no_place_in_a_provenance():
    with pytest.raises(ArgumentError, match="the provenance of an edit must hold plain JSON values"):
        rp.Edit({}, {"made": object()})


# --- tables and text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source", [None, 3, object(), b"bytes", {"a": 1}, [1], [None]], ids=lambda source: type(source).__name__
)
def test_what_is_no_corpus_is_refused(source):
    with pytest.raises(DataError):
        inspect.unwrap(rp.data.read)(source)  # without the type checks of the tests


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b.txt", "~nobody-of-this-name/x.txt"])
def test_an_impossible_path_is_not_found(name):
    for read in (rp.data.read, lambda n: rp.data.facts(n + ".jsonl")):
        with pytest.raises((NotFound, DataError)):
            read(name)


NOBODY = "~nobody-of-this-name/x"
TAKERS = {
    "source": lambda: rp.export(rp.Edit({}), NOBODY, "out"),
    "target": lambda: check_target(NOBODY, overwrite=False),
    "source beside a target": lambda: check_target("out", overwrite=False, source=NOBODY) and open_shards(NOBODY),
    "verification": lambda: verification(NOBODY),
    "push": lambda: hub.push(NOBODY, "a/b"),
    "gguf": lambda: gguf_check(NOBODY),
    "certificate": lambda: rp.certificate(NOBODY, rp.Edit({}), NOBODY),
    "load": lambda: rp.load(NOBODY),
    "no path": lambda: rp.load(3),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS)
def test_the_home_of_nobody_is_not_found(take, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        RepeditError,
        match=r"not a directory|does not exist|cannot be found|no repedit\.json|neither a valid path|a path is needed|holds no",
    ):
        take()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("data", [b"no", b"PAR1" + bytes(40) + b"PAR1", b""])
def test_a_damaged_parquet_file_is_refused(data, tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "x.parquet").write_bytes(data)
    with pytest.raises(DataError, match=r"x\.parquet cannot be read as Parquet"):
        rp.data.read(tmp_path / "x.parquet")


@pytest.mark.parametrize("data", [b'"a', b'"a"b,c\n', b"a\0b", b'"' + b"x" * 200_000 + b'"'])
def test_a_damaged_csv_file_is_refused(data, tmp_path):
    (tmp_path / "x.csv").write_bytes(data)
    if data == b"a\0b":
        assert tables.csv_rows(tmp_path / "x.csv") == [["a\0b"]]
        return
    with pytest.raises(DataError, match=r"x\.csv, line 1: not CSV"):
        tables.csv_rows(tmp_path / "x.csv")


def test_a_pickle_is_not_opened_in_place_of_an_archive(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.array([{}], dtype=object))
    np.save(tmp_path / "y.npz.npy", np.ones(2))
    for name in ("x.npz", "y.npz.npy"):
        with pytest.raises(DataError, match="is damaged or lacks an array"):
            tables.npz_arrays(tmp_path / name, ("a",))


# --- safetensors and archives --------------------------------------------------------------------------------------


def test_a_written_file_is_read_by_the_library(tmp_path):
    tensors = {
        "a": torch.ones(3, dtype=torch.bool),
        "b": torch.randn(2, 3),
        "c": torch.zeros(0, 4),
        "d": torch.ones(2).double(),
    }
    write_file(tmp_path / "x", tensors, {"k": "é"})
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(tmp_path / "x").items())
    assert all(entry.start % entry.spec.dtype.itemsize == 0 for entry in read_header(tmp_path / "x")[0].values())


STRICTER = {
    b' {"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}': "does not begin with",
    b'{"a":["U8",[0],[0,0]]}': "has no dtype, shape and data_offsets",
    b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}': "given twice",
    b'{"__metadata__":{"a":"1","a":"2"}}': "given twice",
    b'{"a":{"dtype":"F32","shape":[0,9223372036854775807],"data_offsets":[0,0]}}': "more elements than a file can hold",
    b'{"a":{"dtype":"F4","shape":[0],"data_offsets":[0,0]}}': "dtype F4, which is not supported",
}


@pytest.mark.parametrize("head", STRICTER, ids=lambda h: str(STRICTER[h])[:15])
def test_what_the_library_takes_and_the_header_reader_does_not(head, tmp_path):
    data = len(head).to_bytes(8, "little") + head
    deserialize(data)
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(CheckpointError, match=STRICTER[head]):
        read_header(tmp_path / "x")


def test_a_header_of_more_than_100_mb_is_refused(tmp_path):
    with open(tmp_path / "x", "wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)
    with pytest.raises(CheckpointError, match="header length 100000001"):
        read_header(tmp_path / "x")


def test_a_loaded_edit_outlives_its_file(tmp_path):
    MASK.save(tmp_path / "e.safetensors")
    edit = rp.Edit.load(tmp_path / "e.safetensors")
    with open(tmp_path / "e.safetensors", "r+b") as file:
        file.write(bytes(file.seek(0, 2)))
        file.truncate(0)
    assert edit.hash == MASK.hash


def rewritten(path: Path, header: object = None, **tensors: torch.Tensor) -> Path:
    """A saved edit with another header, or more tensors."""
    MASK.save(path)
    start = json.loads(read_header(path)[1]["repedit"])
    content = header if isinstance(header, str) else json.dumps(start if header is None else header)
    save_file(load_file(path) | tensors, path, metadata={"repedit": content})
    return path


HEAD = {"format": 1, "kind": "edit", "provenance": {}, "maps": {"0.mlp.neurons": ["Diagonal"]}}
HEADERS: dict[str, tuple[object, str]] = {
    "cut": ("{", "not JSON"), "list": ("[1]", "is a list"), "deep": ("[" * 999 + "]" * 999, "nested deeper"),
    "empty": ({"format": 1, "kind": "edit"}, "no 'maps'"), "no provenance": ({k: v for k, v in HEAD.items() if k != "provenance"}, "no 'provenance'"),
    "format": (HEAD | {"format": 2}, "is not a saved edit of format 1"), "kind": (HEAD | {"kind": "delta"}, "is not a saved edit"),
    "map": (HEAD | {"maps": {"0.mlp.neurons": ["X"]}}, "has the maps"), "no map": (HEAD | {"maps": {"0.mlp.neurons": []}}, "has the maps"),
    "maps": (HEAD | {"maps": 3}, "damaged"), "site": (HEAD | {"maps": {"x": ["Diagonal"]}}, "not a site"),
    "other site": (HEAD | {"maps": {"1.mlp.neurons": ["Diagonal"]}}, "damaged"), "none": (HEAD | {"maps": {}}, "belong to no map"),
    "provenance": (HEAD | {"provenance": 3}, "damaged"), "other map": (HEAD | {"maps": {"0.mlp.neurons": ["LowRank"]}}, "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_an_edit_whose_header_does_not_describe_it_is_refused(name, tmp_path):
    header, message = HEADERS[name]
    with pytest.raises(CheckpointError, match=message):
        rp.Edit.load(rewritten(tmp_path / "e.safetensors", header))


@pytest.mark.parametrize("name", ["x", "0.mlp.neurons/1/scale", "0.mlp.neurons/0/x"])
def test_an_edit_with_a_tensor_too_many_is_refused(name, tmp_path):
    with pytest.raises(CheckpointError, match="damaged"):
        rp.Edit.load(rewritten(tmp_path / "e.safetensors", **{name: torch.ones(4)}))


def test_what_is_no_saved_value_says_so_by_kind(tmp_path):
    MASK.save(tmp_path / "e")
    for load in (rp.Delta.load, rp.Scores.load, Collection.load):
        with pytest.raises(CheckpointError, match=r"write (one|them) with"):
            load(tmp_path / "e")
    assert archive.kind_of(tmp_path / "e") == "edit" and archive.kind_of(tmp_path / "none") is None


# --- writing -------------------------------------------------------------------------------------------------------


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path):
    path = tmp_path / "x"
    path.write_text("before")
    path.chmod(0o640)
    with pytest.raises(ZeroDivisionError), files.atomic_write(path) as file:
        file.write(b"half")
        _ = 1 / 0
    assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["x"]
    files.write_text(path, "after")
    assert path.read_text() == "after" and mode(path) == 0o640


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    MASK.save(tmp_path / "e")
    before = (tmp_path / "e").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device; nothing there was changed"):
        rp.Edit({}).save(tmp_path / "e")
    assert (tmp_path / "e").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_link_is_followed_to_the_file_it_names(tmp_path):
    (tmp_path / "link").symlink_to("file")
    MASK.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and rp.Edit.load(tmp_path / "file").hash == MASK.hash


SAVERS = {
    "edit": MASK.save, "delta": rp.Delta({"a": torch.ones(2)}).save, "text": lambda p: files.write_text(p, "x"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAVERS)
@pytest.mark.parametrize("kind", ["pipe", "socket", "directory", "device"])
def test_nothing_but_a_file_is_replaced(name, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, message = NOT_FILES[kind]
    make(tmp_path / "x")
    with pytest.raises(CheckpointError, match=message):
        SAVERS[name](tmp_path / "x")
    assert os.path.lexists(tmp_path / "x") and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", SAVERS)
@pytest.mark.parametrize("path", ["no/x", "a\0b", "x" * 300])
def test_a_file_without_a_place_is_refused(name, path, tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written"):
        SAVERS[name](f"{tmp_path}/{path}")
    assert not list(tmp_path.iterdir())


# --- caches and journals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", '{"key": "k"}', '{"key": "k", "finding": 3}', '{"key": "k", "finding": {"settings": 3}}'],
)
@pytest.mark.parametrize(("folder", "file"), [(None, "findings/k.json"), ("audit", "audit/findings/direct.json")])
def test_a_damaged_finding_is_as_if_absent(folder, file, content, tmp_path, monkeypatch):
    monkeypatch.setenv("REPEDIT_CACHE", str(tmp_path))
    store, shared = FindingStore(folder and tmp_path / folder), folder is None
    finding: Finding = report().findings["edited"][0]
    store.put("direct", "k", finding, sharing=shared)
    assert store.get("direct", "k", sharing=shared) is not None
    (tmp_path / file).write_text(content)
    assert store.get("direct", "k", sharing=shared) is None
    store.put("direct", "k", finding, sharing=shared)
    assert store.get("direct", "k", sharing=shared) is not None


@pytest.mark.parametrize("line", ["{", "[1]", "3", "\ud83d", '"\\ud800"'])
def test_a_damaged_line_of_a_journal_is_named(line, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line.encode(errors="surrogatepass") + b"\n")
    with pytest.raises(CheckpointError, match="line 2"):
        text.JsonLines(path)


@pytest.mark.parametrize(
    "content",
    ["null", "[]", "{}", '{"schema": 1}', "[" * 5000 + "]" * 5000, '{"schema": ' + "9" * 999 + "}", '"\\ud800"', "{"],
)
def test_a_damaged_report_is_refused(content, tmp_path):
    (tmp_path / "audit.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"audit\.json"):
        Report.load(tmp_path)


# --- one door ------------------------------------------------------------------------------------------------------

PARSERS = {
    "json": ("load", "loads"), "tomllib": ("load", "loads"), "yaml": ("load", "safe_load"), "csv": ("reader", "DictReader"),
    "pickle": ("load", "loads", "Unpickler"), "torch": ("load",), "np": ("load", "loadtxt", "genfromtxt", "fromfile"),
    "numpy": ("load", "loadtxt", "genfromtxt", "fromfile"), "gzip": ("open",), "parquet": ("read_table",),
}  # fmt: skip
NAMES = {"safe_open", "load_file", "read_table", "save_file"}


def parsers(tree: ast.AST) -> set[str]:
    """Calls and imports that parse a file without a door."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.attr in PARSERS.get(node.value.id, ())
        ):
            found.add(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.ImportFrom):
            found |= {
                alias.name
                for alias in node.names
                if alias.name in NAMES or alias.name in PARSERS.get(node.module or "", ())
            }
    return found


@pytest.mark.parametrize(
    "path", sorted(p for p in PACKAGE.rglob("*.py") if p.parent.name != "io"), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_files_are_parsed_by_the_doors_alone(path):
    assert not parsers(ast.parse(path.read_text()))


def test_a_parser_outside_a_door_is_caught():
    code = "import json\nfrom json import loads\nfrom safetensors import safe_open\njson.load(open('x'))\ntorch.load('x')\n"
    assert parsers(ast.parse(code)) == {"loads", "safe_open", "json.load", "torch.load"}


PATHS = {
    "edit": (lambda path: Edit({}).save(path), Edit.load, "e.safetensors"),
    "delta": (lambda path: rp.Delta({"w": torch.ones(2)}).save(path), rp.Delta.load, "d.safetensors"),
    "report": (lambda path: handmade_reports.clean().save(path), Report.load, "audit"),
    "pages": (lambda path: rp.report.write(handmade_reports.clean(), path), Report.load, "pages"),
    "resume": (lambda path: state_path(path), state_path, "state"),
}


@pytest.mark.parametrize("name", PATHS)
def test_the_home_folder_is_meant_by_a_tilde(name, tmp_path, monkeypatch):
    """Where something is written is where it is read, and where the checks of a target look."""
    write, read, file = PATHS[name]
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    for path in (f"~/{file}", Path("~") / file):
        write(path)
        assert (tmp_path / "home" / file).exists() and not list((tmp_path / "here").iterdir())
        read(path)


def test_an_address_of_the_hub_is_not_written_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ArgumentError, match=r"is an address of the hub; write a file, or upload the value with repedit\.push"
    ):
        Edit({}).save("hf://owner/name/edit.safetensors")
