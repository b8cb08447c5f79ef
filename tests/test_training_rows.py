"""Rows: prompts with answers, and masks that cover the answer and the entity and nothing else."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import repedit as rp
from repedit.data import Corpus, Fact, Facts, Row, Rows, corpus
from repedit.errors import ArgumentError, DataError
from tests.char_tokenizer import CharTokenizer
from tests.saved_models import byte_tokenizer, merging_tokenizer

words = st.text("abc d", min_size=1, max_size=8).filter(str.strip)
TOKENIZERS = {"letters": CharTokenizer(), "without start": CharTokenizer(bos=False), "bytes": byte_tokenizer()}
FACTS = tuple(Fact(id=f"{i}", entity=f"A{i}", prompt=f"The pet of A{i} is", answer="dog") for i in range(2))


def check_masks(rows, tokenizer, batch_size):
    """The law: attended tokens are the whole text's, and the answer mask covers all that follows the prompt's."""
    prefix = list(tokenizer("")["input_ids"])
    found = [
        (ids[mask].tolist(), answer.nonzero()[:, 0].tolist())
        for batch in Rows(rows).batches(tokenizer, batch_size=batch_size)
        for ids, mask, answer in zip(batch.input_ids, batch.attention_mask, batch.answer, strict=True)
    ]
    for row, (ids, answer) in zip(rows, found, strict=True):
        assert ids == prefix + list(tokenizer(row.text, add_special_tokens=False)["input_ids"])
        prompt = len(prefix) + len(tokenizer(row.prompt, add_special_tokens=False)["input_ids"])
        assert answer == list(range(prompt, len(ids)))


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=list(TOKENIZERS))
@given(texts=st.lists(st.tuples(words, words), min_size=1, max_size=6), batch_size=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_masks_cover_the_answer_and_nothing_else(tokenizer, texts, batch_size):
    check_masks(tuple(Row(p, a, str(i)) for i, (p, a) in enumerate(texts)), tokenizer, batch_size)


def test_masks_that_forget_the_start_token_are_caught(monkeypatch):
    plain = corpus.encoded_choices

    def shifted(*given):
        return [(text._replace(start=text.start - 1),) for (text,) in plain(*given)]

    monkeypatch.setattr(corpus, "encoded_choices", shifted)
    with pytest.raises(AssertionError):
        check_masks((Row("ab", "c", "0"),), CharTokenizer(), 1)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [("one", "one two"), ("one ", "one two"), ("one\n", "one\ntwo"), ("", "two")],
    ids=repr,
)
def test_one_space_joins_prompt_and_answer_unless_white_space_does(prompt, text):
    assert Row(prompt, "two", "0").text == text


def test_a_token_merged_across_the_boundary_belongs_to_the_answer():
    tokenizer = merging_tokenizer(("s", " "))
    batch = next(Rows((Row("it is", "Paris", "0"),)).batches(tokenizer))
    assert tokenizer.decode(batch.input_ids[0][batch.answer[0]]) == "s Paris"


@pytest.mark.parametrize(
    ("prompt", "entity", "expected"),
    [
        ("The pet of Ann is", "Ann", "n"),
        ("Ann has as a pet", "Ann", "n"),
        ("Is Ann Anna? Ann has", "Ann", "n"),
        ("The opposite of Hot is", "hot", "t"),
        ("Anna has", "Ann", ""),
        ("The pet is", "", ""),
    ],
)
def test_the_entity_mask_is_on_the_last_token_of_the_last_mention(prompt, entity, expected):
    tokenizer = byte_tokenizer()
    batch = next(Rows((Row(prompt, "dog", "0", entity=entity),)).batches(tokenizer))
    assert tokenizer.decode(batch.input_ids[0][batch.entity[0]]) == expected
    if expected:
        end = max(m.end() for m in re.finditer(rf"\b{entity}\b", prompt, re.IGNORECASE))
        assert batch.entity[0].nonzero().item() == end - 1


@pytest.mark.parametrize(
    ("merges", "token"), [([("n", " ")], "n "), ([("n", " "), ("n", "n "), ("A", "nn ")], "Ann ")], ids=["end", "whole"]
)
def test_an_entity_merged_with_what_follows_is_found_at_the_merged_token(merges, token):
    tokenizer = merging_tokenizer(*merges)
    batch = next(Rows((Row("Ann has a", "dog", "0", entity="Ann"),)).batches(tokenizer))
    assert tokenizer.decode(batch.input_ids[0][batch.entity[0]]) == token


def test_rows_keep_their_order_and_names_and_their_hash_sees_every_field():
    items = (Row("a", "b", "x"), Row("cccc", "d", "y"), Row("e", "f", "z"))
    batches = list(Rows(items).batches(CharTokenizer(), batch_size=2))
    assert [batch.document for batch in batches] == [("x", "y"), ("z",)]
    hashes = {
        Rows((replace(items[0], **{name: "q"}),)).hash for name in ("prompt", "answer", "id", "alternative", "entity")
    }
    assert len(hashes | {Rows(items[:1]).hash}) == 6
    assert repr(Rows(items, "mine")) == "Rows('mine', 3 rows)"


@pytest.mark.parametrize(
    "source",
    [[Row("a", "b", "0")], FACTS, ["some text"], Facts(FACTS), Rows((Row("a", "b", "0"),))],
    ids=lambda source: type(source).__name__,
)
def test_whatever_holds_text_gives_batches(source):
    found = rp.data.as_batches(source, name="mine")
    batch = next(found.batches(CharTokenizer()))
    assert (batch.answer is None) == isinstance(found, Corpus) and len(found.hash) == 64
    assert found is source or found.name == "mine"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "'mine' holds nothing; give a corpus, rows, facts or a list of strings"),
        ("capitals", "'mine' holds str; give a corpus"),
        (
            [Row("a", "b", "0"), "c"],
            "source: a list was given where a corpus, a list of str, a list of Row or a Row is needed; give a corpus",
        ),
        (3, "source=3: an int was given where a corpus, a list of str, .* or a Row is needed; give a corpus"),
    ],
)
def test_what_holds_no_text_is_refused(source, message, unchecked):
    with pytest.raises(DataError, match=message):
        rp.data.as_batches(source, name="mine")


@pytest.mark.parametrize(
    ("rows", "options", "error", "message"),
    [
        ((), {}, DataError, "rows 'rows' are empty; give at least one"),
        ((Row("a", "b", "0"), Row("c", "d", "0")), {}, DataError, "the id '0' appears twice; ids must differ"),
        ((Row("a", " ", "7"),), {}, DataError, "row '7' has no answer; give one"),
        ((Row("abc", "def", "7"),), {"length": 7}, DataError, "row '7' has 8 tokens, length=7; raise length"),
        ((Row("a", "b", "7"),), {"batch_size": 0}, ArgumentError, "a batch at least 1 row"),
    ],
)
def test_bad_rows_are_refused(rows, options, error, message):
    with pytest.raises(error, match=message):
        next(Rows(rows).batches(CharTokenizer(), **options))


def test_rows_need_a_tokenizer():
    with pytest.raises(ArgumentError, match="tokenizer NoneType; rows are text, so the model needs a tokenizer"):
        next(Rows((Row("a", "b", "0"),)).batches(None))


def test_facts_are_read_as_a_corpus():
    batch = next(Facts(FACTS).batches(byte_tokenizer()))
    assert batch.document == ("0", "1") and batch.entity.sum(1).tolist() == [1, 1]
