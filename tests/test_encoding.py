"""A text has the special tokens it should: its beginning once, no end before what follows, one space before an answer."""

# Full-width marks are among the cases.
# ruff: noqa: RUF001

import ast
from pathlib import Path

import numpy as np
import pytest
from tokenizers import processors

import repedit as rp
from repedit.auditing.attacks.search import Prefixed
from repedit.data import Corpus, Document, Fact, Row, Rows
from repedit.data.encoding import (
    Encoded,
    chat_ids,
    encoded,
    encoded_choices,
    entity_end,
    entity_span,
    prefix_ids,
    prompt_ids,
    prompt_with_answer,
    question_ids,
    text_ids,
)
from repedit.errors import ArgumentError, DataError
from repedit.io.text import check_text
from repedit.metrics.facts import facts_accuracy
from repedit.metrics.generation import generate, side_by_side
from repedit.metrics.membership import scores
from tests.char_tokenizer import CharTokenizer
from tests.saved_models import byte_tokenizer, merging_tokenizer
from tests.test_attack_weights import small

TEMPLATES = ("$A", "<s> $A", "<s> $A </s>", "$A </s>", "<s> <s> $A </s> </s>", "</s> $A", "<pad> <s> $A </s>")


def adding(template: str, chat: str | None = None):
    """The byte tokenizer with special tokens that its post-processor adds."""
    tokenizer = byte_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<pad>", 0), ("<s>", 1), ("</s>", 2)]
    )
    tokenizer.chat_template = chat
    return tokenizer


def expected(template: str) -> list[int]:
    """The beginning that a template asks for, by hand."""
    return {"<s> <s> $A </s> </s>": [1], "<pad> <s> $A </s>": [0, 1], "</s> $A": [2]}.get(
        template, [1] * ("<s>" in template)
    )


def check_every_door(template: str) -> None:
    tokenizer = adding(template)
    start, hello = expected(template), byte_tokenizer()("hello", add_special_tokens=False)["input_ids"]
    space = byte_tokenizer()(" you", add_special_tokens=False)["input_ids"]
    assert prefix_ids(tokenizer) == start and prompt_ids(tokenizer, "hello") == start + hello
    row = encoded(tokenizer, "hello", "you")
    assert row.ids == start + hello + space and row.start == len(start + hello)
    (batch,) = rp.data.read(["hello"]).batches(tokenizer)
    assert batch.input_ids.tolist() == [start + hello]
    (batch,) = Rows((Row("hello", "you", "a", entity="hello"),)).batches(tokenizer)
    assert batch.input_ids.tolist() == [row.ids] and batch.entity[0].nonzero().tolist() == [[row.start - 1]]
    behind = Prefixed(tokenizer, [9, 9])
    assert prompt_ids(behind, "hello") == [*start, 9, 9, *hello], "an attack's own prefix keeps its tokens"


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_text_has_its_beginning_once_and_no_end(template):
    check_every_door(template)


def test_an_end_before_the_continuation_is_caught(monkeypatch):
    monkeypatch.setattr("repedit.data.encoding.prefix_ids", lambda tokenizer: list(tokenizer("")["input_ids"]))
    with pytest.raises(AssertionError):
        check_every_door("<s> $A </s>")


@pytest.mark.parametrize("text", ["<s>hello", "<s><s>hello"])
@pytest.mark.parametrize("template", ["$A", "<s> $A </s>", "<s> <s> $A"])
def test_a_text_that_carries_its_beginning_has_it_once(template, text):
    assert prompt_ids(adding(template), text) == [1, *byte_tokenizer()("hello", add_special_tokens=False)["input_ids"]]
    row = encoded(adding(template), text, "you")
    assert row.ids.count(1) == 1 and row.start == 6


def test_a_model_reads_and_writes_the_same_with_any_end():
    def seen(template):
        subject = small("llama")
        lm = rp.wrap(subject.model, adding(template))
        facts = [Fact(id="a", prompt="hello", answer="you", choices=("you", "me"))]
        return (
            generate(lm, ["hello"], max_new_tokens=4),
            facts_accuracy(lm, facts).graded,
            scores(lm, ["hello"])["loss"],
        )

    for one, other in zip(seen("<s> $A"), seen("<s> $A </s>"), strict=True):
        assert one == other


def test_special_tokens_inside_a_text_are_its_own():
    ids = prompt_ids(adding("<s> $A </s>"), "a</s>b")
    assert ids.count(1) == 1 and ids.count(2) == 1 and ids[2] == 2
    (batch,) = rp.data.read(["<s>ab</s>"]).batches(adding("<s> $A </s>"))
    assert batch.input_ids[0, [0, -1]].tolist() == [1, 2] and batch.input_ids.shape == (1, 4)


TURNS = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>", "$A"])
@pytest.mark.parametrize("written", ["<s>{{ messages[0].content }}", "<s><s>{{ messages[0].content }}"])
def test_a_chat_template_writes_the_beginning_itself(template, written):
    assert chat_ids(adding(template, written), TURNS) == [1, *text_ids(byte_tokenizer(), "hi")]


@pytest.mark.parametrize("chat", [
    "{{ raise_exception('roles must alternate') }}", "{{ messages[0].content.absent() }}", "{% for %}", "{{ 1 / 0 }}",
])  # fmt: skip
def test_a_template_that_refuses_is_told(chat):
    lm = rp.wrap(small("llama").model, adding("$A", chat))
    for call in (lambda: generate(lm, ["hi"], chat=True), lambda: side_by_side([lm], [TURNS])):
        with pytest.raises(
            DataError, match=r"the chat template of the tokenizer refuses messages of the roles \['user'\]"
        ):
            call()


def spaced(lead: str, prompt: str = "The capital is", end: str = "") -> Fact:
    return Fact(id="a", prompt=prompt + end, answer=f"{lead}Rome", choices=tuple(lead + c for c in ("Rome", "Paris")))


@pytest.mark.parametrize("lead", [" ", "  ", "\t", "\n", "\u00a0"])
def test_an_answer_brings_its_own_space(lead):
    lm = rp.wrap(small("llama").model, adding("<s> $A"))
    plain, own = spaced(""), spaced(lead)
    assert own.answer == "Rome" and own.text == plain.text == "The capital is Rome"
    for how in ("choice", "greedy"):
        one, other = (facts_accuracy(lm, [fact], how=how) for fact in (plain, own))
        np.testing.assert_array_equal(one.graded, other.graded)
        assert one.correct.tolist() == other.correct.tolist()


@pytest.mark.parametrize("lead", ["", " "])
def test_a_prompt_brings_the_space_before_its_answer(lead):
    tokenizer, plain, own = adding("<s> $A"), spaced(""), spaced(lead, end=" ")
    one, other = (encoded(tokenizer, fact.prompt, fact.answer) for fact in (plain, own))
    assert own.text == plain.text and one.ids == other.ids and other.start == one.start + 1
    assert question_ids(tokenizer, own.prompt) == question_ids(tokenizer, plain.prompt), (
        "what is written begins with the space"
    )


def test_an_answer_with_a_space_among_choices_without():
    fact = Fact(id="a", prompt="It is", answer=" Rome", choices=("Rome", "Paris"))
    assert fact.answer == "Rome" and fact.choices.index(fact.answer) == 0


@pytest.mark.parametrize(("prompt", "answer", "text"), [
    ("a", "b", "a b"), ("a", " b", "a b"), ("a ", "b", "a b"), ("a ", " b", "a b"), ("", " b", " b"), ("a:", "\nb", "a:\nb"),
    ("def f():\n", "    return", "def f():\n    return"), ("日本の首都は", "東京", "日本の首都は東京"), ("首都は、", "Paris", "首都は、Paris"),
    ("เมืองหลวงคือ", "กรุงเทพ", "เมืองหลวงคือกรุงเทพ"), ("서울은", "수도", "서울은 수도"), ("答案：", "北京", "答案：北京"),
])  # fmt: skip
def test_prompt_and_answer_are_joined_as_the_script_writes(prompt, answer, text):
    assert prompt_with_answer(prompt, answer) == text


@pytest.mark.parametrize("template", TEMPLATES)
def test_many_choices_are_encoded_as_each_is_alone(template):
    tokenizer = adding(template)
    questions = [("hello", ("you", "", " two")), ("", ("a", "b")), ("<s>hi", ("you", "<s>")), ("hello", ("you",))]
    alone = [tuple(one_choice(tokenizer, prompt, answer) for answer in answers) for prompt, answers in questions]
    assert encoded_choices(tokenizer, questions) == alone
    # A wrapper that takes one text at a time is called so, whatever it says of the tokenizer inside.
    behind = Prefixed(tokenizer, [9])
    assert encoded_choices(behind, questions) == [
        tuple(one_choice(behind, prompt, answer) for answer in answers) for prompt, answers in questions
    ]


def one_choice(tokenizer, prompt: str, answer: str) -> Encoded:
    """Prompt and answer encoded with one call for each text."""
    start, alone = prefix_ids(tokenizer), text_ids(tokenizer, prompt)
    ids = text_ids(tokenizer, prompt_with_answer(prompt, answer))
    same = next((i for i, (a, b) in enumerate(zip(ids, alone, strict=False)) if a != b), min(len(ids), len(alone)))
    return Encoded(start + ids, len(start) + same)


def test_an_end_token_that_an_answer_brings_counts_once():
    lm = rp.wrap(small("llama").model, adding("<s> $A"))
    one, two = (rp.metrics.answers.answer_nll(lm, [Row("hi", text, "a")]) for text in ("you", "you</s>"))
    assert one.count.tolist() == two.count.tolist() == [5] and one.sum == two.sum


@pytest.mark.parametrize("value", ["\ud83d", "a\0", "\udc00\ud83d"])
def test_what_is_no_text_is_refused_where_it_comes_in(value):
    lm = small("llama")
    for call, where in (
        (lambda: generate(lm, ["a", value], max_new_tokens=2), "the prompt"), (lambda: scores(lm, ["abc", value]), "text 1"),
        (lambda: Corpus((Document("a", "b"), Document("c", value)), "mine"), "corpus 'mine': document 'c'"),
        (lambda: Row("a", value, "r"), "row 'r': the answer"), (lambda: side_by_side([lm], [value], max_new_tokens=2), "the prompt"),
        (lambda: rp.compare(lm, lm, prompts=[value]), "the prompt"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=f"{where}.* holds (half of a surrogate pair|a null character)"):
            call()


@pytest.mark.parametrize("value", [None, 3, b"a", ["a"]])
def test_what_is_no_string_is_refused(value):
    with pytest.raises(DataError, match=f"row 'r' is a {type(value).__name__}; a text was expected"):
        check_text(value, "row 'r'")


def test_a_prompt_that_is_over_is_refused():
    lm = rp.wrap(small("llama").model, adding("<s> $A"))
    with pytest.raises(DataError, match="the prompt 'hi</s>' ends in '</s>', which ends a text; remove it"):
        generate(lm, ["hi</s>"])
    fact = Fact(id="a", prompt="hi</s>", answer="you", choices=("you", "me"))
    for how in ("choice", "greedy"):
        with pytest.raises(DataError, match="the prompt 'hi</s>' ends in '</s>', which ends a text"):
            facts_accuracy(lm, [fact], how=how)
    with pytest.raises(ArgumentError, match="prompts='hi': a str was given where a list of str is needed"):
        generate(lm, "hi")


def test_a_prompt_that_carries_the_separator_of_wordpiece_is_over():
    tokenizer = adding("<s> $A </s>")
    tokenizer.cls_token, tokenizer.sep_token, tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>", None, None
    assert encoded(tokenizer, "<s>hi", "you").ids == encoded(adding("<s> $A"), "hi", "you").ids
    with pytest.raises(DataError, match="the prompt '<s>hi</s>' ends in '</s>', which ends a text"):
        encoded(tokenizer, "<s>hi</s>", "you")


def test_a_tokenizer_that_changes_the_text_is_refused():
    class Odd(CharTokenizer):
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [7, 8] if add_special_tokens else [9]}

    with pytest.raises(
        DataError, match=r"the tokenizer gives \[9\] for 'a' without its special tokens and \[7, 8\] with them"
    ):
        prompt_ids(Odd(), "hello")


def test_a_tokenizer_is_asked_in_one_place():
    """Apart from it the fingerprint of an audit compares tokenizers as they are, and loading tries whether one encodes at all."""
    package = Path(rp.__file__).parent
    asked = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and (
            getattr(node.func, "id", "") == "tokenizer"
            or getattr(node.func, "attr", "") in ("need_tokenizer()", "apply_chat_template")
        )
    }
    assert asked == {"data/encoding.py", "auditing/runner.py", "models/loading.py"}


@pytest.mark.parametrize(
    ("prompt", "entity", "marked"),
    [
        ("The map of New York shows", "new york", " New York"), ("Paris, then Paris again", "Paris", " Paris"),
        ("Paris is", "Paris", "Paris"), ("parisian air", "Paris", None), ("nothing", "", None),
    ],
)  # fmt: skip
def test_the_tokens_of_the_last_mention_of_an_entity_are_found(prompt, entity, marked):
    tokenizer = merging_tokenizer((" ", "N"), (" ", "P"))
    span = entity_span(tokenizer, prompt, entity)
    if marked is None:
        assert span is None and entity_end(tokenizer, prompt, entity) is None
        return
    assert span is not None and span[1] == entity_end(tokenizer, prompt, entity)
    assert tokenizer.decode(encoded(tokenizer, prompt, "x").ids[span[0] : span[1] + 1]) == marked
