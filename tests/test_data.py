"""Corpora: what is read, how it is split, and the chunks every measurement shares."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import repedit as rp
from repedit.data import Corpus, Document, Tokens
from repedit.data.corpus import tokens
from repedit.errors import ArgumentError, DataError, NotEnoughRows, NotFound, UnknownName
from tests.char_tokenizer import CharTokenizer

texts = st.lists(st.text("abc \n", min_size=1, max_size=30), min_size=1, max_size=12)


def _corpus(items, name="texts"):
    return Corpus(tuple(Document(str(i), text) for i, text in enumerate(items)), name)


def _rows(corpus, tokenizer=None, **options):
    """(document, ids without padding) of every chunk."""
    for batch in corpus.batches(tokenizer or CharTokenizer(), **options):
        for name, ids, mask in zip(batch.document, batch.input_ids, batch.attention_mask, strict=True):
            yield name, ids[mask].tolist()


@pytest.mark.parametrize(("corpus", "documents"), [(rp.data.code, 40), (rp.data.prose, 40)], ids=["code", "prose"])
def test_builtin_corpora_hold_about_64_000_characters(corpus, documents):
    found = corpus()
    assert 50_000 < found.characters < 70_000 and len(found) >= documents
    assert found.hash == corpus().hash
    assert repr(found) == f"Corpus({found.name!r}, {len(found)} documents, {found.characters} characters)"


def test_code_is_python_from_different_files_and_depends_on_the_seed():
    found = rp.data.code(characters=48_000)
    files = [d.id.split("@")[0] for d in found.documents]
    assert len(set(files)) == len(files) == 30
    assert all(name.endswith(".py") and "test" not in Path(name).parts for name in files)
    assert rp.data.code(characters=48_000, seed=1).hash != found.hash


def test_names_of_builtin_corpora():
    assert rp.data.builtin_corpus("prose").name == rp.data.read("prose").name == "prose"
    with pytest.raises(
        UnknownName, match=r"no built-in corpus is called 'cod', and a file is read with .*; did you mean 'code'"
    ):
        rp.data.builtin_corpus("cod")


@given(items=texts, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_halves_share_no_text_and_lose_none(items, seed):
    corpus = _corpus(["zzz", "yyy", *items])
    a, b = corpus.halves(seed)
    assert not {d.text for d in a.documents} & {d.text for d in b.documents}
    written = [d for d in corpus.documents if d.text.strip()]
    assert sorted((*a.documents, *b.documents), key=lambda d: d.id) == sorted(written, key=lambda d: d.id)
    assert [half.hash for half in corpus.halves(seed)] == [a.hash, b.hash]


def test_halves_are_about_equal_named_and_depend_on_the_seed():
    a, b = rp.data.prose().halves()
    assert 0.8 < a.characters / b.characters < 1.25
    assert (a.name, b.name) == ("prose/collect", "prose/evaluate")
    assert rp.data.prose().halves(1)[0].hash != a.hash


def test_membership_does_not_depend_on_the_order_of_documents():
    corpus = _corpus([f"text {i}" for i in range(9)])
    turned = Corpus(corpus.documents[::-1], "texts")
    assert {d.id for d in corpus.halves(3)[0].documents} == {d.id for d in turned.halves(3)[0].documents}


@pytest.mark.parametrize("items", [["one"], ["same", "same"], ["one", " \n"]], ids=str)
def test_halves_need_two_texts_that_differ(items):
    with pytest.raises(NotEnoughRows, match="corpus 'texts' has 1 distinct document, halves need at least 2"):
        _corpus(items).halves()


def test_excerpts_begin_at_lines_and_come_from_different_documents():
    corpus = _corpus(["\n".join(f"{name} line {i}" for i in range(50)) for name in "abcd"])
    found = corpus.excerpts(4, characters=100)
    assert {d.text[0] for d in found.documents} == set("abcd")
    assert all(re.match(r"[abcd] line \d", d.text) and len(d.text) == 100 for d in found.documents)
    assert found.hash == corpus.excerpts(4, characters=100).hash != corpus.excerpts(4, characters=100, seed=1).hash
    assert len(corpus.excerpts(9, characters=100)) == 9


@given(items=texts, length=st.integers(3, 9), batch_size=st.integers(1, 4), bos=st.booleans())
@settings(max_examples=60, deadline=None)
def test_chunks_hold_every_token_but_a_last_lonely_one(items, length, batch_size, bos):
    tokenizer, corpus = CharTokenizer(bos=bos), _corpus([*items, "some"])
    found = dict.fromkeys((d.id for d in corpus.documents), ())
    for name, ids in _rows(corpus, tokenizer, length=length, batch_size=batch_size):
        assert len(ids) <= length and ids[: int(bos)] == tokenizer.prefix
        found[name] = (*found[name], *ids[int(bos) :])
    step = length - int(bos)
    for document in corpus.documents:
        whole = tokenizer(document.text, add_special_tokens=False)["input_ids"]
        kept = len(whole) - (len(whole) % step == 1)
        assert list(found[document.id]) == whole[:kept]


def test_batches_are_padded_on_the_right_longest_first():
    batches = list(_corpus(["ab", "abcdef", "abcd"]).batches(CharTokenizer(), length=5, batch_size=2))
    assert [batch.document for batch in batches] == [("1", "2"), ("0", "1")]
    assert batches[1].attention_mask.tolist() == [[True] * 3, [True] * 3]
    mixed = next(_corpus(["ab", "abcd"]).batches(CharTokenizer()))
    assert mixed.attention_mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert mixed.input_ids[1].tolist()[3:] == [0, 0]


def test_a_tokenizer_without_padding_token_pads_with_zero():
    batch = next(_corpus(["ab", "abcd"]).batches(CharTokenizer(pad=None)))
    assert batch.input_ids[1].tolist()[3:] == [0, 0]


@pytest.mark.parametrize("options", [{"length": 2}, {"length": 0}, {"batch_size": 0}], ids=str)
def test_chunks_that_predict_nothing_are_refused(options):
    with pytest.raises(ArgumentError, match=r"a chunk needs at least 3 tokens \(1 of them the tokenizer's own"):
        next(_corpus(["abc"]).batches(CharTokenizer(), **options))


def _write(path, content):
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist([json.loads(line) for line in content.splitlines()]), path)
    else:
        path.write_text(content, encoding="utf-8")
    return path


FILES = {
    "a.txt": "first\n\nsecond, on\ntwo lines\n\n\n\nthird",
    "a.md": "\ufefffirst\r\n\r\nsecond, on\r\ntwo lines\r\n\r\nthird\r\n",
    "a.jsonl": '{"text": "first"}\n\n{"text": "second, on\\ntwo lines", "id": null}\n{"text": "third", "n": 1}\n',
    "a.parquet": '{"text": "first"}\n{"text": "second, on\\ntwo lines"}\n{"text": "third"}',
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_as_documents(name, tmp_path):
    found = rp.data.read(_write(tmp_path / name, FILES[name]))
    assert [d.text for d in found.documents] == ["first", "second, on\ntwo lines", "third"]
    assert found.name == "a" and len({d.id for d in found.documents}) == 3


def test_jsonl_fields_ids_and_odd_line_breaks(tmp_path):
    path = _write(tmp_path / "a.jsonl", '{"id": 7, "body": "one\u2028line\x85still"}\n{"id": "b", "body": "two"}')
    found = rp.data.read(str(path), text="body", name="mine")
    assert [(d.id, d.text) for d in found.documents] == [("7", "one\u2028line\x85still"), ("b", "two")]
    assert found.name == "mine"


def test_lists_and_token_batches_are_read():
    assert [d.text for d in rp.data.read(["one", "two"]).documents] == ["one", "two"]
    ids, mask = torch.tensor([[3, 4, 5], [6, 7, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    found = rp.data.read(({"input_ids": i, "attention_mask": m} for i, m in [(ids, mask)]), name="mine")
    assert isinstance(found, Tokens) and found.name == "mine"
    assert list(_rows(found)) == [("0.0", [3, 4, 5]), ("0.1", [6, 7])]
    assert rp.data.read([{"input_ids": ids}]).hash != found.hash


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x", r"cannot read files of kind '.csv'; give one of .txt, .md, .jsonl, .parquet"),
        ("a.txt", " \n\n ", "corpus 'a' is empty: 0 documents, none with text"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"body": "b"}',
            r"row 2: the field 'text' must hold a text; the row has \['body'\]",
        ),
        ("a.jsonl", '{"text": "a"}\n\n{"text": 3}', r"row 3: the field 'text' must hold a text"),
        ("a.jsonl", '"a"', "row 1: found a str; one object a line is expected"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', "row 2: not JSON: Expecting value"),
        ("a.jsonl", '{"id": 1, "text": "a"}\n{"id": "1", "text": "b"}', "document id '1' appears twice"),
        ("a.parquet", '{"text": "a"}\n{"text": null}', "row 2: the field 'text' must hold a text"),
    ],
)
def test_a_bad_file_is_refused_with_the_row(name, content, message, tmp_path):
    with pytest.raises(DataError, match=message):
        rp.data.read(_write(tmp_path / name, content))


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"a.txt is not UTF-8: .*position 3"):
        rp.data.read(tmp_path / "a.txt")


def test_a_missing_file_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(NotFound, match=r"nowhere.jsonl is not a file"):
        rp.data.read(tmp_path / "nowhere.jsonl")
    with pytest.raises(NotFound, match="pros is not a file; did you mean 'prose'"):
        rp.data.read("pros")


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "corpus 'texts' is empty: 0 documents"),
        (["", "  "], "corpus 'texts' is empty: 2 documents, none with text"),
        (["a", 3], "item 1 is a int; give strings, or mappings with input_ids"),
        ([{"ids": torch.ones(1)}], r"batch 0 has fields \['ids'\], input_ids is needed"),
    ],
)
def test_a_bad_list_is_refused(items, message):
    with pytest.raises(DataError, match=message):
        rp.data.read(items)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32])
def test_ids_of_any_width_are_read(dtype):
    (batch,) = tokens([{"input_ids": torch.tensor([[5, 6]]).to(dtype)}]).batches()
    assert batch.input_ids.dtype is torch.int64 and batch.input_ids.tolist() == [[5, 6]] and batch.attention_mask.all()
