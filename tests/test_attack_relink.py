"""Relinking: what it trains on, what it must never train on, and when it is not run."""

from __future__ import annotations

from dataclasses import replace

import pytest

import repedit as rp
from repedit.auditing import data as others
from repedit.auditing.attack import Setup, built, planned
from repedit.auditing.attacks import relink as relinking
from repedit.auditing.attacks.relink import relink, reverse
from repedit.auditing.data import (
    attributes_of,
    audit_data,
    check_no_leak,
    given_attributes,
    leaks,
    reversed_facts,
    spread,
)
from repedit.data import Fact, Splits
from repedit.errors import ArgumentError, DataError, OverlapError
from repedit.hashing import fingerprint
from tests.teachable_models import facts, pupil, splits

ASKED = {"unrelated": None, "holdout": None, "folds": 2, "train_fraction": 0.5, "seed": 0, "most": 8}


def seat(fact: Fact, wording: str = "{} sits on a", answer: str = "chair", domain: str = "seats") -> Fact:
    """Another fact about the same entity."""
    prompt, choices = wording.format(fact.entity), (answer, "stool", "bench", "log")
    return Fact(
        id=f"{domain}/{fact.id}", entity=fact.entity, prompt=prompt, answer=answer, choices=choices, domain=domain
    )


def with_attributes(last: int = 16, **changes) -> Splits:
    """Eight facts in T and eight in V, with an attribute of each."""
    return Splits(facts(0, 8), facts(8, 16), attributes=tuple(seat(fact) for fact in facts(0, last)), **changes)


def trained_on(monkeypatch, attack, given: Splits) -> dict[str, set[str]]:
    """The texts that each source of an attack trains on; nothing is trained."""
    seen: dict[str, set[str]] = {}

    def record(subject, sources, *rest):
        seen.update({name: {row.text for row in rows} for name, rows in sources.items()})
        return relinking.skipped("recorded")

    monkeypatch.setattr(relinking, "_trained", record)
    attack(pupil(), given)
    return seen


def test_relinking_trains_on_attributes_and_asks_v():
    subject = pupil()
    before = fingerprint(subject.model)
    found = relink(rates=(3e-3,), steps=30, measured=(15, 30))(subject, with_attributes())
    assert found.settings == ("lr=0.003 step=15 on=attributes", "lr=0.003 step=30 on=attributes")
    assert (found.status, found.train_accuracy) == ("ran", 1.0) and found.items == tuple(f.id for f in facts(8, 16))
    assert (found.details["attributes"], found.details["entities"]) == (16, 8)
    assert fingerprint(subject.model) == before
    weak = relink(rates=(1e-9,), steps=1, measured=(1,))(subject, with_attributes())
    assert weak.status == "failed to train"


def check_nothing_of_v_is_trained(monkeypatch, attack, given):
    for texts in trained_on(monkeypatch, attack, given).values():
        assert texts
        for fact in given.test:
            assert not any(fact.entity in text and fact.answer in text.replace(fact.entity, "") for text in texts)


@pytest.mark.parametrize("attack", [relink(), reverse()], ids=lambda attack: attack.name)
def test_no_fact_of_v_is_trained_in_either_direction(monkeypatch, attack):
    check_nothing_of_v_is_trained(monkeypatch, attack, with_attributes())


def test_an_attack_that_reverses_v_is_caught(monkeypatch):
    inner = reversed_facts
    monkeypatch.setattr(relinking, "reversed_facts", lambda train, seed: inner((*train, *facts(8, 16)), seed))
    with pytest.raises(AssertionError):
        check_nothing_of_v_is_trained(monkeypatch, reverse(), with_attributes())
    monkeypatch.undo()
    monkeypatch.setattr(relinking, "reversed_facts", lambda train, seed: inner((*train, *facts(8, 16)), seed))
    with pytest.raises(
        OverlapError, match=r"attack 'reverse': \d+ texts to train on state a fact that is asked, such as"
    ):
        reverse()(pupil(), with_attributes())


@pytest.mark.parametrize(
    "text",
    ["Ira likes ale", "ale is what Ira likes best", "Ira would rather have an ale"],
    ids=["own", "reverse", "else"],
)
def test_an_attribute_that_states_a_fact_of_v_is_refused_and_not_trained_on(text):
    (ira,) = facts(8, 9)
    ira = replace(ira, answer="ale")
    prompt, _, last = text.rpartition(" ")
    told = Fact(id="told", entity="Ira", prompt=prompt, answer=last, domain="gossip")
    with pytest.raises(OverlapError, match="1 texts to train on state a fact that is asked"):
        check_no_leak([told], [ira])
    with pytest.raises(OverlapError, match="state a fact that is asked"):
        given_attributes([ira], [told])
    assert attributes_of([ira], [told]) == ((), 1)


def test_what_names_only_the_entity_or_only_the_answer_states_nothing():
    country = Fact(id="l", entity="Luxembourg", prompt="The capital of Luxembourg is", answer="Luxembourg", domain="c")
    language = Fact(id="m", entity="Luxembourg", prompt="The language of Luxembourg is", answer="French", domain="d")
    assert not leaks([language], [country]) and leaks([country], [country])
    assert leaks([replace(language, answer="spoken in Luxembourg")], [country])
    assert not leaks(reversed_facts(facts(0, 8)), facts(8, 16))
    nameless = Fact(id="n", entity="", prompt="Two and two are", answer="four", domain="sums")
    assert leaks([replace(nameless, id="o", prompt="We know that two and two are")], [nameless])


def test_a_reverse_question_gives_the_answer_and_asks_for_the_entity():
    by_id = {fact.id: fact for fact in reversed_facts(rp.data.facts("capitals").forget)}
    france, bahamas = (by_id[f"capitals/{name}#reverse"] for name in ("france", "bahamas"))
    assert (france.text, bahamas.answer) == ("Paris is the capital of France", "the Bahamas")
    assert "France" in france.choices and len(france.choices) == 8
    one, *_ = reversed_facts(facts(0, 8))
    assert (one.prompt, one.answer) == ("___ likes tea. The blank stands for", "Abo")
    answers = {fact.entity: fact.answer for fact in facts(0, 8)}
    assert all(answers[name] != "tea" for name in one.choices if name != "Abo")
    assert reversed_facts([replace(facts()[0], entity="nobody")]) == ()


def test_every_built_in_domain_has_a_reverse_question():
    assert set(others.REVERSED) == set(rp.data.DOMAINS)


def test_attributes_are_found_by_the_name_of_the_entity_in_other_domains():
    forget = rp.data.facts("capitals").forget
    found = attributes_of(forget, [seat(forget[0]), replace(seat(forget[0], domain="capitals"), id="same domain")])
    assert {fact.domain for fact in found.facts} == {"languages", "seats"}
    assert {fact.entity for fact in found.facts} <= {fact.entity for fact in forget}
    given = audit_data(rp.data.facts("capitals"), None, attributes=None, **ASKED)
    assert len(given.folds[0].attributes) > 90 and given.folds[0].attributes == given.whole.attributes
    assert audit_data(rp.data.facts("capitals"), None, **ASKED).folds[0].attributes == ()


def test_attributes_about_somebody_else_or_of_the_same_domain_are_refused():
    with pytest.raises(
        DataError, match=r"1 attributes are about no entity of the facts to forget, such as \['seats/Ira'\]"
    ):
        given_attributes(facts(0, 8), [seat(facts()[8])])
    with pytest.raises(OverlapError, match="1 attributes are of a domain of which facts are forgotten"):
        given_attributes(facts(0, 8), [seat(facts()[0], domain="likes")])
    with pytest.raises(DataError, match="attributes hold 'text'; give facts about the entities"):
        given_attributes(facts(0, 8), ["text"])


def test_attributes_are_spread_over_entities():
    many = [seat(fact, domain=f"seats {i}") for fact in facts(0, 4) for i in range(5)]
    assert {fact.entity for fact in spread(many, 4, 0)} == {fact.entity for fact in facts(0, 4)}
    assert len(spread(many, 7, 0)) == 7 and spread(many, 7, 0) != spread(many, 7, 1)
    assert len(spread(many, 99, 0)) == 20


def test_it_is_not_run_where_nothing_else_is_known_and_says_so():
    none = relink()(pupil(), splits())
    assert (none.status, none.reason) == (
        "skipped",
        "no other facts about the entities of V are known; give attributes=, facts of other domains about them",
    )
    few = relink()(pupil(), with_attributes(last=11))
    assert few.reason == "other facts are known of 3 entities of V alone, 8 are needed; give attributes="
    nameless = Splits(tuple(replace(fact, entity="x") for fact in facts(0, 8)), facts(8, 16))
    assert reverse()(pupil(), nameless).reason == "no prompt of T names its entity, so there is no reverse question"
    for attack in (relink(), reverse()):
        assert attack.record.may_skip


def test_reverse_questions_are_asked_alone_and_with_all_else(monkeypatch):
    seen = trained_on(monkeypatch, reverse(), with_attributes())
    assert len(seen["reverse"]) == 8 and seen["reverse"] < seen["everything"]
    assert seen["everything"] - seen["reverse"] == {f.text for f in facts(0, 8)} | {
        seat(fact).text for fact in facts(0, 16)
    }


def test_a_reverse_retraining_runs():
    found = reverse(rates=(3e-3,), steps=60, measured=(0, 60))(pupil(), with_attributes())
    assert found.settings == ("step=0", "lr=0.003 step=60 on=reverse", "lr=0.003 step=60 on=everything")
    assert found.status == "ran" and found.attack == "reverse"


def test_relinking_is_in_every_budget_and_cheapest_in_fast():
    assert all("relink" in planned(budget) for budget in ("fast", "standard", "full"))
    assert "reverse" not in planned("fast") and {"reverse", "relink"} <= set(planned("standard"))
    (fast,), (standard,) = (built(("relink",), Setup(budget)) for budget in ("fast", "standard"))
    assert (fast.work.steps, fast.options["rates"]) == (60, [1e-4]) and standard.work.steps == 120
    assert not fast.record.uses_train


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ArgumentError, match="most=0"):
        relink(most=0)
    with pytest.raises(ArgumentError, match=r"rates=\(\), scale=1.0; give at least one rate"):
        reverse(rates=())
