"""What a model that never knew the facts gets right: guesses, choices without a question, invented entities."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from repedit.auditing import floors
from repedit.auditing.attacks.prompts import REVERSE_QUESTION
from repedit.auditing.data import audit_data, reverse_questions
from repedit.auditing.floors import (
    COMMON_BEGINNING,
    choices_only,
    choices_only_baseline,
    fresh_facts,
    heuristic_values,
    question_values,
    renamed_facts,
    spelling_values,
)
from repedit.data import DOMAINS, Fact, Facts, Splits, facts, invented
from repedit.data.grading import normalized
from repedit.errors import ArgumentError, DataError
from repedit.metrics.facts import facts_accuracy
from tests.char_tokenizer import CharTokenizer
from tests.tiny import tiny


def fact(name: str, answer: str, *choices: str, domain: str = "d") -> Fact:
    return Fact(id=name, entity=name, prompt=f"Of {name} it is", answer=answer, choices=choices, domain=domain)


T = (
    fact("t1", "aa", "aa", "b", "cccc"), fact("t2", "aa", "aa", "b", "cccc"), fact("t3", "b", "aa", "b", "cccc"),
)  # fmt: skip


def values(*test: Fact, train=T, **options) -> dict[str, list[float]]:
    return {name: found.tolist() for name, found in heuristic_values([Splits(train, test)], **options).items()}


def test_guesses_are_right_where_they_should_be():
    found = values(
        fact("v1", "aa", "b", "cccc", "aa"), fact("v2", "cccc", "cccc", "b", "aa"), fact("v3", "b", "b", "aa")
    )
    assert found == {
        "chance": [1 / 3, 1 / 3, 1 / 2],
        "majority answer": [1, 0, 0],
        "majority letter": [0, 1, 1],
        "longest choice": [0, 1, 0],
        "shortest choice": [0, 0, 1],
    }


def test_a_guess_that_cannot_tell_choices_apart_takes_one_at_random():
    found = values(fact("v", "x", "x", "y", "zz"))
    assert found["majority answer"] == [1 / 3] and found["shortest choice"] == [1 / 2]
    other = values(fact("v", "aa", "aa", "y", "zz", domain="another"))
    assert other["majority answer"] == [1 / 3]  # what is frequent in one domain says nothing about another


def test_the_median_number_is_that_of_train():
    years = tuple(fact(f"t{y}", str(y), str(y), "1000") for y in (1900, 1950, 1990))
    one = fact("v", "1,960", "1,960", "1880", "2020")
    assert values(one, train=years)["median number"] == [1.0]
    assert values(one, train=years[:1])["median number"] == [0.0]
    assert values(replace(one, answer="2020"), train=years)["median number"] == [0.0]
    assert "median number" not in values(fact("v", "1960", "1960", "no number"), train=years)


def test_free_answers_are_guessed_by_the_majority():
    train = tuple(fact(f"t{i}", answer) for i, answer in enumerate(("Rome", "rome", "Oslo")))
    found = values(fact("v1", "ROME"), fact("v2", "Oslo"), train=train)
    assert found["majority answer"] == [1, 0] and found["chance"] == [0, 0] == found["longest choice"]


def check_nothing_is_learned_from_the_test_side():
    test = tuple(fact(f"v{i}", "cccc", "aa", "b", "cccc") for i in range(5))
    found = values(*test)
    assert found["majority answer"] == [0.0] * 5 == found["majority letter"]


def test_nothing_is_learned_from_the_test_side():
    check_nothing_is_learned_from_the_test_side()


def test_learning_from_the_test_side_is_caught(monkeypatch):
    leaky = floors._GUESSES | {"majority answer": lambda fact, train: [float(c == fact.answer) for c in fact.choices]}
    monkeypatch.setattr(floors, "_GUESSES", leaky)
    with pytest.raises(AssertionError):
        check_nothing_is_learned_from_the_test_side()


def test_every_fact_is_tested_once_over_both_folds():
    items = facts("languages")
    parts = [Splits.of(items, fold=fold) for fold in (0, 1)]
    found = heuristic_values(parts)
    assert {len(array) for array in found.values()} == {len(items)}
    assert found["chance"].mean() == pytest.approx(0.125) and found["majority answer"].mean() > 0.2
    with pytest.raises(DataError, match=r"facts are tested, \d+ of them different"):
        heuristic_values([parts[0], parts[0]])
    with pytest.raises(DataError, match=r"splits with 0 facts to fit on"):
        heuristic_values([Splits((), parts[0].test)])


def test_spelling_shows_what_the_form_of_an_entity_gives_away():
    given = {name: spelling_values(Splits.of(facts(name)).test).mean() for name in ("nouns", "capitals")}
    assert given["nouns"] > 0.9 and given["capitals"] < 0.3
    assert "spelling" not in heuristic_values([Splits.of(facts("nouns"))])
    assert spelling_values([replace(f, choices=()) for f in facts("nouns").forget[:2]]).tolist() == [0, 0]


def test_without_the_question_only_the_choices_are_read():
    subject = replace(tiny("llama"), tokenizer=CharTokenizer())
    items = tuple(fact(f"v{i}", answer, "ab", "cd", "ef") for i, answer in enumerate(("ab", "cd", "ef")))
    found = choices_only(subject, items)
    assert found.ids == ("v0", "v1", "v2")
    assert found.correct.sum() == 1  # one list of choices has one likeliest choice, whatever was asked
    longer = tuple(replace(f, prompt=f"{f.prompt} and so on it is") for f in items)
    np.testing.assert_array_equal(choices_only(subject, longer).graded, found.graded)
    assert not np.array_equal(facts_accuracy(subject, longer).graded, facts_accuracy(subject, items).graded)


# Fresh facts


def mentions(text: str, entity: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(entity)}(?!\w)", text, re.IGNORECASE) is not None


def check_no_entity_is_left(name: str) -> None:
    items = facts(name)
    found = fresh_facts(items, len(items))
    taken = {w for f in (*items.forget, *items.retain) for t in (*f.prompts, *f.choices) for w in normalized(t).split()}
    # The words of the templates themselves may stay: some entities, such as "see", are among them.
    words = Counter(w for f in items.forget for w in set(normalized(" ".join(f.prompts)).split()))
    framed = {word for word, count in words.items() if count == len(items)}
    names = "|".join(re.escape(f.entity) for f in items.forget if not set(normalized(f.entity).split()) & framed)
    assert len({f.id for f in found}) == len({f.entity for f in found}) == len(items)
    for f in found:
        text = "\n".join(f.prompts)
        assert f.id.startswith("fresh/") and not taken & set(normalized(f.entity).split())
        assert all(mentions(prompt, f.entity) for prompt in f.prompts)
        assert not re.search(rf"(?<!\w)({names})(?!\w)", text), text
        assert f.answer in f.choices and len(f.choices) == 8


@pytest.mark.parametrize("name", DOMAINS)
def test_no_entity_is_left_in_a_fresh_fact(name):
    check_no_entity_is_left(name)


def test_an_entity_left_in_a_paraphrase_is_caught(monkeypatch):
    good = floors._with_name
    monkeypatch.setattr(floors, "_with_name", lambda text, f, name: text if "star" in text else good(text, f, name))
    with pytest.raises(AssertionError):
        check_no_entity_is_left("capitals")


def test_names_are_written_like_the_entity():
    (one,) = fresh_facts([fact("San Jose", "a", "a", "b")], 1)
    assert re.fullmatch(r"[A-Z][a-z]+ [A-Z][a-z]+", one.entity) and one.prompt == f"Of {one.entity} it is"
    (low,) = fresh_facts(
        [replace(fact("see", "a", "a", "b"), prompt="See? To see is", paraphrases=("I see; see it",))], 1
    )
    assert low.entity.islower()
    assert low.prompts == (f"{low.entity.capitalize()}? To {low.entity} is", f"I {low.entity}; {low.entity} it")


def test_words_that_only_contain_the_entity_stay():
    (one,) = fresh_facts([replace(fact("come", "a", "a", "b"), prompt="It becomes come")], 1)
    assert one.prompt == f"It becomes {one.entity}"


def test_the_answer_is_any_choice_of_another_fact():
    items = [fact("Aa", "a", "a", "b"), fact("Bb", "c", "c", "d"), fact("Cc", "x", "x", "y", domain="other")]
    found = fresh_facts(items, 300)
    seen = Counter((f.domain, f.answer) for f in found)
    assert sum(seen.values()) == 300 and len({f.id for f in found}) == 300
    assert Counter(f.domain for f in found) == {"d": 200, "other": 100}
    assert all(30 < seen["d", answer] < 70 for answer in "abcd") and 30 < seen["other", "y"] < 70
    parts = [Splits.of(found, fold=fold) for fold in (0, 1)]
    assert max(v.mean() for v in heuristic_values(parts).values()) < 0.62  # two choices: no guess is far from a half
    assert fresh_facts([replace(f, choices=()) for f in items], 3)[0].choices == ()


def test_fresh_facts_follow_their_seed():
    items = invented(people=8, relations=2)
    assert fresh_facts(items, 12) == fresh_facts(items, 12) != fresh_facts(items, 12, seed=1)
    assert {f.domain for f in fresh_facts(items, 8)} == {"city", "profession"}


def both_renamed(seed=0):
    """Facts and attributes of the same people, and both under invented names."""
    people = invented(people=8, relations=2)
    items = (*people.forget, *people.retain)
    cities, professions = (tuple(f for f in items if f.domain == name) for name in ("city", "profession"))
    renamed, attributes = renamed_facts(cities, professions, seed)
    return cities, professions, renamed.forget, attributes


def check_one_name_for_a_person(before, after):
    """The facts differ in the names of their people alone, and each person has one name."""
    names = {f.entity: g.entity for f, g in zip(before, after, strict=True)}
    for f, g in zip(before, after, strict=True):
        assert g.entity == names[f.entity] and (g.answer, g.choices, g.domain) == (f.answer, f.choices, f.domain)
        assert g.prompts == tuple(text.replace(f.entity, g.entity) for text in f.prompts) != f.prompts
    assert len(set(names.values())) == len(names) and not set(names.values()) & set(names)


def test_renamed_facts_and_attributes_differ_in_names_alone():
    cities, professions, renamed, attributes = both_renamed()
    check_one_name_for_a_person((*cities, *professions), (*renamed, *attributes))
    assert both_renamed() == both_renamed() != both_renamed(seed=1)


def test_renaming_facts_and_attributes_apart_is_caught():
    cities, professions, renamed, _ = both_renamed()
    apart, _ = renamed_facts(professions, (), seed=1)
    with pytest.raises(AssertionError):
        check_one_name_for_a_person((*cities, *professions), (*renamed, *apart.forget))


def test_an_attribute_that_does_not_name_its_entity_cannot_be_renamed():
    with pytest.raises(DataError, match="the entity 'Aa' does not stand in 'It is'"):
        renamed_facts(
            [fact("Aa", "a", "a", "b")], [replace(fact("Aa", "c", "c", "d", domain="other"), id="1", prompt="It is")]
        )


@pytest.mark.parametrize(
    ("items", "count", "error", "message"),
    [
        ([fact("Aa", "a", "a", "b")], 0, ArgumentError, "0 fresh facts like 1 given"),
        ([], 3, ArgumentError, "3 fresh facts like 0 given"),
        ([replace(fact("Aa", "a", "a", "b"), id="f/0", entity="f/0")], 1, DataError, "fact 'f/0' names no entity.*field 'entity'"),
        ([replace(fact("Aa", "a", "a", "b"), entity="Zz")], 1, DataError, "fact 'Aa': the entity 'Zz' does not stand in 'Of Aa"),
        ([replace(fact("Aa", "a", "a", "b"), entity="")], 1, DataError, "fact 'Aa': the entity '' does not stand"),
        ([replace(fact("Aa", "a", "a", "b"), paraphrases=("It is",))], 1, DataError, "does not stand in 'It is'"),
    ],
)  # fmt: skip
def test_fresh_refusals(items, count, error, message):
    with pytest.raises(error, match=message):
        fresh_facts(items, count)


def test_names_run_out(monkeypatch):
    monkeypatch.setattr(floors, "_ENDS", ("ax",))
    monkeypatch.setattr(floors, "_MIDDLES", ("lv",))
    with pytest.raises(DataError, match=r"all 112 invented names are used up"):
        fresh_facts([fact("Aa", "a", "a", "b")], 113)


def test_names_that_are_retained_are_not_invented():
    items = [fact("Aa", "a", "a", "b"), fact("Bb", "c", "c", "d")]
    first = fresh_facts(items, 1)[0].entity
    held = Facts(tuple(items), (fact(first, "a", "a", "b"),))
    assert first not in {f.entity for f in fresh_facts(held, 50)}


# What the questions of an attack give away, where they are not the facts themselves


def best_guess(domain: str, guesses=lambda folds: question_values(REVERSE_QUESTION, folds)) -> tuple[str, float]:
    """The best guess about the reverse questions of a built-in domain, with its share of right answers."""
    items = facts(domain).forget
    data = audit_data(items, None, most=8, unrelated=None, holdout=None, folds=2, train_fraction=0.5, seed=0)
    return max(((name, float(values.mean())) for name, values in guesses(data.folds).items()), key=lambda item: item[1])


def test_the_floor_of_reverse_questions_is_guessed_from_their_own_choices():
    """The verb in a noun that is formed from it is known to everybody."""
    name, right = best_guess("nouns")
    assert name == COMMON_BEGINNING and right > 0.9
    assert best_guess("capitals")[1] < 0.25


def test_a_floor_guessed_from_the_choices_of_the_facts_is_caught():
    assert best_guess("nouns", heuristic_values)[1] < 0.3


def test_the_choices_of_reverse_questions_are_shown_alone():
    subject, items = replace(tiny("llama"), tokenizer=CharTokenizer()), invented(people=16, relations=1).forget
    found = choices_only_baseline(REVERSE_QUESTION)(subject, Splits((), items))
    assert (found.attack, found.items) == ("choices only, reverse_question", tuple(f.id for f in items))
    assert (found.graded[0] == choices_only(subject, reverse_questions(items)).graded).all()
    nameless = (replace(items[0], entity="x"), *items[1:])
    assert choices_only_baseline(REVERSE_QUESTION)(subject, Splits((), nameless)).items == ()
