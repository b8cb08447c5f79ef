"""Facts: the built-in domains, and facts in files."""

import json
import re
import tomllib
from collections import Counter
from importlib import resources

import pytest

import repedit as rp
from repedit.data import DOMAINS, Fact, Facts
from repedit.data.grading import normalized
from repedit.errors import (
    ArgumentError,
    DataError,
    NotEnoughRows,
    NotFound,
    OverlapError,
    UnknownName,
)


def fact(number: int = 0, **changes) -> Fact:
    """A fact about entity A0, A1, ..."""
    values = {"id": f"f{number}", "entity": f"A{number}", "prompt": f"The pet of A{number} is", "answer": "dog"}
    return Fact(**(values | {"choices": ("dog", "cat"), "domain": "pets"} | changes))


# Built-in domains


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_built_in_fact_is_whole(domain):
    items = rp.data.facts(domain).forget
    assert len({f.entity for f in items}) == len({f.id for f in items}) == len(items) >= 100
    for f in items:
        assert len(set(map(normalized, f.choices))) == len(f.choices) == 8 and f.answer in f.choices, f.id
        assert len(set(f.prompts)) == len(f.prompts) >= 4, f.id
        for prompt in f.prompts:
            assert re.search(rf"(?<!\w){re.escape(f.entity)}(?!\w)", prompt, re.IGNORECASE), (f.id, prompt)
            assert not prompt.endswith(" ") and "{" not in prompt and "  " not in prompt
        assert f.domain == domain and f.id.startswith(f"{domain}/") and re.fullmatch(r"[\w/-]+", f.id)


@pytest.mark.parametrize("domain", DOMAINS)
def test_phrasings_differ_in_more_than_a_word(domain):
    first = rp.data.facts(domain).forget[0]
    kinds = [set(normalized(p.replace(first.entity, "")).split()) for p in first.prompts]
    for i, a in enumerate(kinds):
        assert all(len(a & b) < 0.75 * len(a | b) for b in kinds[:i])
    assert sum(p.startswith("Question:") and "?\nAnswer:" in p for p in first.prompts) == 1
    assert len({p.index(first.entity) for p in first.prompts}) > 3


@pytest.mark.parametrize("domain", DOMAINS)
def test_answers_cannot_be_guessed_from_their_place_or_their_frequency(domain):
    items = rp.data.facts(domain).forget
    places = Counter(f.choices.index(f.answer) for f in items)
    assert max(places.values()) < 0.25 * len(items)
    ((common, _),) = Counter(f.answer for f in items).most_common(1)
    assert sum(f.answer == common for f in items) < 0.25 * len(items)


def test_a_known_fact():
    found = next(f for f in rp.data.facts("capitals").forget if f.id == "capitals/france")
    assert (found.entity, found.answer, found.prompt) == ("France", "Paris", "The capital of France is")


def test_facts_can_be_put_in_sets():
    items = rp.data.facts("symbols").forget
    assert len(set(items)) == len(items) == len({*items, *items})


def test_names_that_take_an_article_have_it_in_sentences_only():
    found = next(f for f in rp.data.facts("capitals").forget if f.entity == "Philippines")
    assert all("the Philippines" in p or p.startswith("The Philippines") for p in found.prompts)


def _groups(domain):
    text = resources.files("repedit.data").joinpath(f"builtin/{domain}.toml").read_text(encoding="utf-8")
    return [group for group in tomllib.loads(text).values() if isinstance(group, dict)]


def test_wrong_choices_come_from_the_group_where_it_is_large_enough():
    choices = {f.entity: f.choices for f in rp.data.facts("capitals").forget}
    groups = [group for group in _groups("capitals") if len(group) > 7]
    assert len(groups) == 4 and all(set(choices[e]) <= set(group.values()) for group in groups for e in group)


def test_words_that_would_be_right_too_are_no_wrong_choices():
    right = {e: answers for group in _groups("opposites") for e, answers in group.items() if isinstance(answers, list)}
    choices = {f.entity: f.choices for f in rp.data.facts("opposites").forget}
    assert all(set(choices[entity]) & set(answers) == {answers[0]} for entity, answers in right.items())


def test_a_built_in_name_retains_every_other_domain():
    found = rp.data.facts("capitals+symbols")
    assert list(rp.data.by_domain(found.forget)) == ["capitals", "symbols"]
    assert list(rp.data.by_domain(found.retain)) == [d for d in DOMAINS if d not in ("capitals", "symbols")]
    assert found.name == "capitals+symbols" and len(found) == len(found.forget)
    assert repr(found) == f"Facts('capitals+symbols', {len(found)} to forget, {len(found.retain)} to retain)"


def test_the_seed_orders_the_choices_and_nothing_else():
    a, b = (rp.data.facts("symbols", seed=seed) for seed in (0, 1))
    assert a.hash == rp.data.facts("symbols").hash != b.hash
    assert all(
        set(x.choices) == set(y.choices) and x.prompts == y.prompts for x, y in zip(a.forget, b.forget, strict=True)
    )


@pytest.mark.parametrize(
    "retain", ["languages", rp.data.facts("languages"), rp.data.facts("languages").forget, ()], ids=type
)
def test_retain_can_be_given(retain):
    found = rp.data.facts("capitals", retain=retain).retain
    assert set(rp.data.by_domain(found)) == ({"languages"} if retain else set())


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "capitols",
            UnknownName,
            "no built-in facts are called 'capitols', and a file ends in .jsonl; did you mean 'capitals'",
        ),
        (
            "capitals+",
            UnknownName,
            "no built-in facts are called '', and a file ends in .jsonl; valid names: capitals, symbols",
        ),
        ("nowhere.jsonl", NotFound, "nowhere.jsonl is not a file"),
    ],
)
def test_unknown_names_are_refused(name, error, message):
    with pytest.raises(error, match=message):
        rp.data.facts(name)


def test_forget_and_retain_must_differ():
    with pytest.raises(
        OverlapError, match=r"share \d+ ids, such as \['capitals/afghanistan', .*; remove them from one side"
    ):
        rp.data.facts("capitals", retain="capitals+symbols")
    same = fact(1, id="other", prompt="the pet of A0, is", entity="A0")
    with pytest.raises(OverlapError, match=r"share 1 prompts with answers, such as \['the pet of a0 is dog'\]"):
        Facts((fact(), fact(2)), (same,))


@pytest.mark.parametrize(
    ("forget", "error", "message"),
    [
        ((fact(),), NotEnoughRows, "facts 'facts': 1 to forget; give at least 2"),
        ((), NotEnoughRows, "facts 'facts': 0 to forget; give at least 2"),
        ((fact(), fact()), DataError, "facts 'facts', forget: the id 'f0' appears twice"),
        ((fact(), fact(id="g")), DataError, "facts 'facts': 'f0' and 'g' have the same prompt and answer; remove one"),
    ],
)
def test_sets_that_cannot_be_scored_are_refused(forget, error, message):
    with pytest.raises(error, match=message):
        Facts(forget)


def test_the_hash_sees_both_sides():
    items = [fact(i) for i in range(5)]
    sides = [((0, 1), ()), ((0, 1), (2,)), ((0, 1), (3,)), ((0, 2), (3,)), ((2, 0), (3,))]
    assert len({Facts(*(tuple(items[i] for i in side) for side in pair)).hash for pair in sides}) == 5


def test_phrasings_become_facts():
    items = (fact(paraphrases=("A0 has a", "At home A0 keeps a")),)
    found = rp.data.with_paraphrases(items)
    assert [(f.id, f.prompt) for f in found] == [
        ("f0", "The pet of A0 is"), ("f0#1", "A0 has a"), ("f0#2", "At home A0 keeps a"),
    ]  # fmt: skip
    assert all(f.entity == "A0" and f.choices == ("dog", "cat") and not f.paraphrases for f in found)
    assert rp.data.with_paraphrases(items, only=[2]) == found[2:]
    with pytest.raises(ArgumentError, match="fact 'f0' has phrasings 0 to 2, not 3"):
        rp.data.with_paraphrases(items, only=[3])


# Files


def _file(tmp_path, *rows):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_a_file_is_read_with_its_roles_aliases_and_defaults(tmp_path):
    path = _file(
        tmp_path,
        {"id": "a", "entity": "Ann", "prompt": "Ann has a", "answer": "dog", "choices": ["cat", "dog"], "split": "V"},
        {"question": "Bob has a", "output": "cat", "paraphrases": ["A pet of Bob is the"], "domain": None},
        "",
        {
            "input": "Cyd has a",
            "answer": 1,
            "choices": ["cat", "cow"],
            "role": "retain",
            "translations": {"de": "Cyd hat"},
        },
    )
    found = rp.data.facts(path)
    a, b = found.forget
    assert (found.name, a.split, set(a.choices), b.id, b.entity, b.domain) == (
        "mine",
        "V",
        {"cat", "dog"},
        "mine/2",
        "mine/2",
        "mine",
    )
    assert b.choices and set(b.choices) == {"cat", "dog", "cow"} and b.paraphrases == ("A pet of Bob is the",)
    assert (found.retain[0].answer, found.retain[0].translations) == ("cow", {"de": "Cyd hat"})
    assert rp.data.facts(str(path)).hash == found.hash
    assert set(rp.data.by_domain(rp.data.facts(path, retain="symbols").retain)) == {"symbols"}


def test_wrong_choices_are_drawn_from_other_answers_of_the_domain_by_the_seed(tmp_path):
    rows = [{"prompt": f"{i} is", "answer": f"a{i % 12}", "domain": "one"} for i in range(24)]
    path = _file(tmp_path, *rows, *[{"prompt": f"{i} has", "answer": f"b{i}", "domain": "two"} for i in range(3)])
    found = rp.data.facts(path)
    assert all(len(set(f.choices)) == 8 and {c[0] for c in f.choices} == {"a"} for f in found.forget[:24])
    assert all(set(f.choices) == {"b0", "b1", "b2"} for f in found.forget[24:])
    other = rp.data.facts(path, seed=1)
    assert [set(f.choices) for f in found.forget] != [set(f.choices) for f in other.forget]


GOOD = {"id": "a", "prompt": "Ann has a", "answer": "dog"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"id": "a", "prompt": "Ann has a"},
            r"row 2: fact 'a': the field 'answer' must be a text; it is missing; the row has",
        ),
        (
            {"id": "a", "answer": "dog"},
            r"row 2: fact 'a': the field 'prompt' must be a text; it is missing; the row has",
        ),
        (GOOD | {"answer": " "}, "row 2: fact 'a': the field 'answer' is ' '; give a text"),
        (GOOD | {"answer": 3}, "row 2: fact 'a': the field 'answer' must be a text; it is 3"),
        (GOOD | {"answer": 2, "choices": ["x", "y"]}, "row 2: fact 'a': the answer 2 is not an index into 2 choices"),
        (
            GOOD | {"choices": ["cat", "cow"]},
            r"row 2: fact 'a': the answer 'dog' is not among the choices \['cat', 'cow'\]",
        ),
        (GOOD | {"choices": ["dog", "cat", "dog"]}, "row 2: fact 'a': the choice 'dog' appears twice in"),
        (GOOD | {"choices": ["dog"]}, r"row 2: fact 'a': one choice, \['dog'\]; give at least 2, or none"),
        (GOOD | {"choices": "dog"}, "row 2: fact 'a': the field 'choices' must be a list of texts; it is 'dog'"),
        (GOOD | {"paraphrases": [1]}, r"row 2: fact 'a': the field 'paraphrases' must be a list of texts; it is \[1\]"),
        (
            GOOD | {"translations": ["x"]},
            "row 2: fact 'a': the field 'translations' is .*; give prompts by language",
        ),
        (GOOD | {"split": "test"}, "row 2: fact 'a': the field 'split' is 'test'; give 'T', 'V' or nothing"),
        (GOOD | {"role": "keep"}, "row 2: fact 'a': the field 'role' is 'keep'; give 'forget' or 'retain'"),
        (GOOD | {"id": "b"}, "facts 'mine', forget: the id 'b' appears twice"),
        ('{"id": ', "row 2: not JSON: Expecting value"),
        ("3", "row 2: found a int; one object a line is expected"),
    ],
)
def test_a_bad_row_is_refused_with_its_number(row, message, tmp_path):
    with pytest.raises(DataError, match=message):
        rp.data.facts(_file(tmp_path, {"id": "b", "prompt": "Bob has a", "answer": "cat"}, row))


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"a.jsonl is not UTF-8: .*; convert it first"):
        rp.data.facts(tmp_path / "a.jsonl")
