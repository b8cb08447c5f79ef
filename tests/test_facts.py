"""Facts: the built-in domains, files, invented people, and halves that share no entity."""

import json
import re
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import repedit as rp
from repedit.data import DOMAINS, Fact, Facts, Splits
from repedit.data.domains import normalized
from repedit.errors import (
    ArgumentError,
    DataError,
    FractionError,
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
    assert sum(p.startswith("Question:") and p.endswith("Answer:") for p in first.prompts) == 1


@pytest.mark.parametrize("domain", DOMAINS)
def test_answers_cannot_be_guessed_from_their_place_or_their_frequency(domain):
    items = rp.data.facts(domain).forget
    places = Counter(f.choices.index(f.answer) for f in items)
    assert max(places.values()) < 0.25 * len(items)
    ((common, _),) = Counter(f.answer for f in items).most_common(1)
    assert sum(f.answer == common for f in items) < 0.25 * len(items)


def test_a_known_fact():
    found = next(f for f in rp.data.facts("capitals").forget if f.id == "capitals/france")
    assert (found.entity, found.answer, found.prompt) == ("France", "Paris", "The capital of France is the city of")


def test_names_that_take_an_article_have_it_in_sentences_only():
    found = next(f for f in rp.data.facts("capitals").forget if f.entity == "Netherlands")
    assert all("the Netherlands" in p or p.startswith("The Netherlands") for p in found.prompts)


def test_words_that_would_be_right_too_are_no_wrong_choices():
    found = next(f for f in rp.data.facts("opposites").forget if f.entity == "big")
    assert found.answer == "small" and not {"little", "tiny"} & set(found.choices)


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
        ("capitols", UnknownName, "no built-in facts are called 'capitols'; did you mean 'capitals'"),
        ("capitals+", UnknownName, "no built-in facts are called ''; valid names: capitals, symbols"),
        ("nowhere.jsonl", NotFound, "nowhere.jsonl is not a file"),
    ],
)
def test_unknown_names_are_refused(name, error, message):
    with pytest.raises(error, match=message):
        rp.data.facts(name)


def test_forget_and_retain_must_differ():
    with pytest.raises(
        OverlapError, match=r"share \d+ ids, such as \['capitals/afghanistan', .*; take them out of one side"
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
        ((fact(), fact(id="g")), DataError, "facts 'facts': 'f0' and 'g' have one prompt and answer; drop one"),
    ],
)
def test_sets_that_cannot_be_scored_are_refused(forget, error, message):
    with pytest.raises(error, match=message):
        Facts(forget)


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
            r"row 2: fact 'a': the field 'answer' must be a text; it is missing; found",
        ),
        ({"id": "a", "answer": "dog"}, r"row 2: fact 'a': the field 'prompt' must be a text; it is missing; found"),
        (GOOD | {"answer": " "}, "row 2: fact 'a': the field 'answer' is ' '; give a text"),
        (GOOD | {"answer": 3}, "row 2: fact 'a': the field 'answer' must be a text; found 3"),
        (GOOD | {"answer": 2, "choices": ["x", "y"]}, "row 2: fact 'a': the answer 2 is no index into 2 choices"),
        (
            GOOD | {"choices": ["cat", "cow"]},
            r"row 2: fact 'a': the answer 'dog' is not among the choices \['cat', 'cow'\]",
        ),
        (GOOD | {"choices": ["dog", "cat", "dog"]}, "row 2: fact 'a': the choice 'dog' appears twice in"),
        (GOOD | {"choices": ["dog"]}, r"row 2: fact 'a': one choice, \['dog'\]; give at least 2, or none"),
        (GOOD | {"choices": "dog"}, "row 2: fact 'a': the field 'choices' must be a list of texts; found 'dog'"),
        (GOOD | {"paraphrases": [1]}, r"row 2: fact 'a': the field 'paraphrases' must be a list of texts; found \[1\]"),
        (
            GOOD | {"translations": ["x"]},
            "row 2: fact 'a': the field 'translations' must map languages to prompts; found",
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


# Halves

entities = st.lists(st.integers(0, 30), min_size=2, max_size=40).filter(lambda found: len(set(found)) > 1)


def _about(numbers):
    return tuple(fact(n, id=f"{i}", prompt=f"{i}: the pet of A{n} is") for i, n in enumerate(numbers))


def check_halves(items, seed):
    """The law: no entity on both sides, no fact lost, equal numbers of entities, whatever the order."""
    a, b = Splits.of(items, seed=seed), Splits.of(items[::-1], seed=seed)
    sides = [{f.entity for f in side} for side in (a.train, a.test)]
    assert not sides[0] & sides[1] and abs(len(sides[0]) - len(sides[1])) <= 1
    assert sorted(f.id for f in (*a.train, *a.test)) == sorted(f.id for f in items)
    assert {f.id for f in a.train} == {f.id for f in b.train}


@given(numbers=entities, seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_halves_share_no_entity_and_do_not_depend_on_the_order(numbers, seed):
    check_halves(_about(numbers), seed)


def test_halves_by_row_are_caught(monkeypatch):
    monkeypatch.setattr("repedit.data.splits._entity", lambda f: f.id)
    with pytest.raises(AssertionError):
        check_halves(_about([*range(20), *range(20)]), 0)


def test_folds_swap_the_sides_and_the_fraction_counts_entities():
    items = rp.data.facts("capitals", retain="symbols")
    a, b = (Splits.of(items, fold=fold, train_fraction=0.8) for fold in (0, 1))
    assert (a.train, a.test) == (b.test, b.train) and a.retain == items.retain
    assert len(a.train) == round(0.8 * len(items)) and a.unrelated is a.holdout is None
    assert a.train != Splits.of(items, train_fraction=0.8, seed=1).train


def test_a_fixed_split_is_kept_with_its_entity():
    fixed = [replace(f, split={1: "T", 2: "V"}.get(i)) for i, f in enumerate(_about([1, 2, 3, 2, 4, 5]))]
    for seed in range(5):
        found = Splits.of(fixed, seed=seed)
        assert "1" in {f.id for f in found.train} and {"1", "3"} - {f.id for f in found.train} == set()
        assert "2" in {f.id for f in found.test}


@pytest.mark.parametrize(
    ("items", "options", "error", "message"),
    [
        (_about([1, 2]), {"train_fraction": 1.0}, FractionError, "train_fraction=1.0; give a fraction strictly between"),
        (_about([1, 2]), {"fold": 2}, ArgumentError, "fold=2; there are two, 0 and 1"),
        (_about([1, 1]), {}, NotEnoughRows, "1 entities give .* both sides need one"),
        (
            [replace(f, split=side) for f, side in zip(_about([1, 1, 2]), "TVT", strict=True)],
            {}, OverlapError, r"1 entities are fixed both in T and in V, such as \['a1'\]",
        ),
    ],
)  # fmt: skip
def test_halves_that_cannot_be_made_are_refused(items, options, error, message):
    with pytest.raises(error, match=message):
        Splits.of(items, **options)


# Invented people


@pytest.mark.parametrize(("people", "relations", "seed"), [(4, 1, 0), (40, 4, 0), (33, 6, 5), (240, 2, 1)])
def test_invented_facts_are_even_and_halved_by_person(people, relations, seed):
    found = rp.data.invented(people, relations, seed)
    sides = [{f.entity for f in side} for side in (found.forget, found.retain)]
    assert [len(side) for side in sides] == [people // 2, people - people // 2] and not sides[0] & sides[1]
    for part in rp.data.by_domain((*found.forget, *found.retain)).values():
        assert len(part) == people and len(rp.data.by_domain(found.forget)) == relations
        counts = Counter(f.answer for f in part)
        assert max(counts.values()) - min(counts.values()) <= 1
        assert all(len(set(f.choices)) == 8 and len(f.paraphrases) >= 3 for f in part)
        assert all(f.entity in prompt for f in part for prompt in f.prompts)


def test_invented_facts_follow_the_seed():
    assert rp.data.invented().hash == rp.data.invented().hash != rp.data.invented(seed=1).hash
    assert rp.data.invented().name == "invented-40-4-0" and len(rp.data.invented()) == 80


@pytest.mark.parametrize("options", [{"people": 3}, {"people": 10_000}, {"relations": 0}, {"relations": 7}], ids=str)
def test_impossible_inventions_are_refused(options):
    with pytest.raises(ArgumentError, match="there can be 4 to 1536 people and 1 to 6 relations"):
        rp.data.invented(**options)
