"""Attacks with words: what is asked, that nothing is taught, and that company, order and chance decide nothing."""

import copy
import random
import re
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

import repedit as rp
from repedit.auditing import attack, data
from repedit.auditing.attack import ask
from repedit.auditing.attacks import prompts, samples
from repedit.auditing.attacks import prompts as formats
from repedit.auditing.attacks.prompts import (
    FORMATS,
    PREFIXES,
    chat_prompt,
    direct,
    first_word,
    in_context,
    misspelt,
    paraphrase,
    prefix,
    question,
    reformat,
    respelled,
    respelled_prompt,
    reverse_question,
    translate,
)
from repedit.auditing.attacks.samples import sampling
from repedit.auditing.attacks.unhook import strip
from repedit.auditing.controls import taught
from repedit.data import Fact, Splits, generated
from repedit.data.encoding import prompt_ids
from repedit.data.fact_sets import entity_of
from repedit.data.generated import SPELLINGS
from repedit.data.grading import normalized
from repedit.errors import ArgumentError, DataError, OverlapError, UnknownName
from repedit.metrics import facts as probability
from repedit.metrics.facts import FactsAccuracy
from repedit.models.subject import subject_of
from tests.saved_models import byte_tokenizer
from tests.tiny import tiny

PEOPLE = rp.data.invented(people=24, relations=2).forget
LANGUAGES = ("de", "fr")
VOCABULARY = 600
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{{ '[assistant]\n' }}"


def translated(fact: Fact) -> Fact:
    """The fact with two languages, and four of its choices."""
    choices = (*(c for c in fact.choices if c != fact.answer),)[:3]
    translations = {language: f"{language}: {fact.prompt}" for language in LANGUAGES}
    return replace(fact, translations=translations, choices=(*choices[:2], fact.answer, *choices[2:]))


def splits(tested: int = 4) -> Splits:
    """Twelve people: the facts of eight in T, some of the others' in V."""
    return Splits(PEOPLE[:16], tuple(translated(fact) for fact in PEOPLE[16 : 16 + tested]))


@cache
def _merging():
    """A tokenizer of bytes that merges those which often stand together in the facts: texts are four times shorter."""
    tokenizer = byte_tokenizer()
    texts = [text for fact in PEOPLE for text in (fact.text, *fact.paraphrases)]
    return tokenizer.train_new_from_iterator(texts, VOCABULARY, show_progress=False)


def subject():
    tokenizer = copy.deepcopy(_merging())
    tokenizer.chat_template = TEMPLATE
    return subject_of(tiny("llama", vocab_size=VOCABULARY).model, tokenizer)


ATTACKS: dict[str, Callable[[], attack.Attack]] = {
    "direct": direct, "paraphrase": paraphrase, "format": reformat, "prefix": prefix, "translate": translate,
    "in_context": lambda: in_context(counts=(2,)), "first_word": first_word, "respelled": respelled,
    "reverse_question": reverse_question, "sampling": lambda: sampling(n=4, ks=(1, 4)), "strip": strip,
}  # fmt: skip
SETTINGS = {
    "direct": ["prompt"], "paraphrase": ["phrasing 1", "phrasing 2", "phrasing 3"], "format": list(FORMATS),
    "prefix": list(PREFIXES), "translate": ["de", "fr"], "in_context": ["k=2"], "first_word": ["named once", "named twice"],
    "respelled": list(SPELLINGS), "reverse_question": ["reverse"], "sampling": ["leak@1", "leak@4"],
    "strip": ["prompt"],
}  # fmt: skip


def asked_by(monkeypatch, built: attack.Attack, given: Splits, model=None) -> dict[str, tuple[Fact, ...]]:
    """The facts as an attack with words asks them, by setting; nothing is computed."""
    calls: list[tuple[Fact, ...]] = []

    def note(_subject, facts, *_):
        calls.append(tuple(facts))
        return FactsAccuracy(np.zeros(len(facts), bool), np.zeros(len(facts)), tuple(f.id for f in facts))

    monkeypatch.setattr(prompts, "ask", note)
    monkeypatch.setattr(formats, "ask", note)
    monkeypatch.setitem(FORMATS, "yes/no", note)
    found = built(model or subject(), given)
    return dict(zip(found.settings, calls, strict=True))


def same(a: attack.Finding, b: attack.Finding) -> bool:
    return (a.settings, a.items) == (b.settings, b.items) and bool(
        (a.correct == b.correct).all() and np.allclose(a.graded, b.graded, atol=1e-4)
    )


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_leaves_the_model_alone_and_says_the_same_twice(name):
    model, built = subject(), ATTACKS[name]()
    before = model.fingerprint()
    found = built(model, splits())
    assert (built.name, found.attack, list(found.settings), found.status) == (name, name, SETTINGS[name], "ran")
    assert same(found, built(model, splits())) and model.fingerprint() == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_that_fails_leaves_the_model_alone(name, monkeypatch):
    model, calls = subject(), iter("12")
    before = model.fingerprint()

    def fails(*_, **__):
        next(calls)
        raise DataError("no")

    for where, what in ((probability, "tree_log_probs"), (samples, "_inverse")):
        monkeypatch.setattr(where, what, fails)
    with pytest.raises(DataError, match=f"attack '{name}': no"):
        ATTACKS[name]()(model, splits())
    assert model.fingerprint() == before and next(calls) == "2"


@pytest.mark.parametrize("name", ATTACKS)
def test_order_and_number_of_the_facts_asked_together_change_nothing(name, monkeypatch):
    model, given, built = subject(), splits(), ATTACKS[name]()
    found = built(model, given)
    back = built(model, replace(given, test=given.test[::-1], train=given.train[::-1]))
    assert same(
        found, replace(back, items=back.items[::-1], correct=back.correct[:, ::-1], graded=back.graded[:, ::-1])
    )
    for where, what in ((probability, "_ROWS"), (formats, "_ROWS"), (samples, "_TOGETHER")):
        monkeypatch.setattr(where, what, 1)
    assert same(found, built(model, given))


@pytest.mark.parametrize("name", ["format", "prefix", "in_context", "respelled"])
def test_the_seed_decides_where_something_is_drawn(name):
    built = ATTACKS[name]()
    assert built.record.draws and not same(built(subject(), splits()), built.at(1)(subject(), splits()))


@pytest.mark.parametrize("name", ["direct", "paraphrase", "translate", "strip", "first_word", "reverse_question"])
def test_what_draws_nothing_says_so(name):
    assert not ATTACKS[name]().record.draws


def test_levels_and_the_use_of_answers():
    found = {name: (build().record.level, build().record.uses_train) for name, build in ATTACKS.items()}
    assert {name for name, (level, _) in found.items() if level == "W"} == {"strip"}
    assert {name for name, (_, trains) in found.items() if trains} == {"in_context"}


def test_direct_is_asking():
    found, plain = direct()(subject(), splits()), ask(subject(), splits().test)
    assert (found.correct[0] == plain.correct).all() and (found.graded[0] == plain.graded).all()


def test_paraphrases_are_asked_in_their_order(monkeypatch):
    asked = asked_by(monkeypatch, paraphrase(), splits())
    for i, facts in enumerate(asked.values()):
        assert [f.prompt for f in facts] == [f.paraphrases[i] for f in splits().test]


def test_phrasings_that_only_some_facts_have_are_left_out_and_counted():
    first, second, *_ = splits().test
    given = Splits((), (first, replace(second, paraphrases=second.paraphrases[:1])))
    found = paraphrase()(subject(), given)
    assert found.settings == ("phrasing 1",) and found.reason == "2 phrasings that only some facts have were left out"
    bare = replace(given, test=(first, replace(second, paraphrases=())))
    assert (
        found := paraphrase()(subject(), bare)
    ).status == "skipped" and found.reason == "1 of 2 facts have no paraphrases"
    none = replace(given, test=(replace(second, paraphrases=()),))
    assert paraphrase()(subject(), none).reason == "the facts have no paraphrases"


def test_languages_that_every_fact_has_are_asked(monkeypatch):
    first, second, *_ = splits().test
    given = Splits((), (first, replace(second, translations={"fr": "fr: x", "it": "it: x"})))
    assert [f.prompt for f in asked_by(monkeypatch, translate(), given)["fr"]] == [first.translations["fr"], "fr: x"]
    found = translate()(subject(), given)
    assert found.settings == ("fr",) and found.reason == "left out, since only some facts have them: de, it"
    apart = replace(given, test=(first, replace(second, translations={"it": "it: x"})))
    assert (found := translate()(subject(), apart)).status == "skipped"
    assert found.reason == "no language is common to all facts; some have ['de', 'fr', 'it']"
    bare = replace(given, test=(replace(first, translations={}),))
    assert translate()(subject(), bare).reason == "the facts have no translations"


def check_prefixes(asked: dict[str, tuple[Fact, ...]], plain: tuple[Fact, ...]) -> None:
    """The law: six different wordings, each ending as the fact's prompt does, none with the answer."""
    assert len({facts[0].prompt for facts in asked.values()} | {plain[0].prompt}) == 7
    for facts in asked.values():
        for fact, own in zip(facts, plain, strict=True):
            assert fact.prompt[-2:] == own.prompt[-2:] and replace(fact, prompt=own.prompt) == replace(
                own, paraphrases=()
            )
            assert own.answer not in fact.prompt


def test_prefixes_keep_the_question(monkeypatch):
    check_prefixes(asked_by(monkeypatch, prefix(), splits()), splits().test)


@pytest.mark.parametrize("broken", [lambda f, seed: f.text, lambda f, seed: f.prompt, lambda f, seed: f.prompt + "?"])
def test_a_broken_prefix_is_caught(broken, monkeypatch):
    monkeypatch.setitem(PREFIXES, "sure", broken)
    with pytest.raises(AssertionError):
        check_prefixes(asked_by(monkeypatch, prefix(), splits()), splits().test)


def check_first(asked: dict[str, tuple[Fact, ...]], plain: tuple[Fact, ...]) -> None:
    """The law: the entity is the first word, stands once or twice, and answer and choices are those of the fact."""
    for times, setting in enumerate(("named once", "named twice"), 1):
        for fact, own in zip(asked[setting], plain, strict=True):
            name = own.entity.lower()
            assert fact.prompt.lower().startswith(name) and fact.prompt.lower().count(name) == times
            assert replace(fact, prompt=own.prompt) == replace(own, paraphrases=())


def first_asked(monkeypatch) -> tuple[dict[str, tuple[Fact, ...]], tuple[Fact, ...]]:
    """A fact of each relation, the first of which has phrasings that begin with the name."""
    plain = tuple(replace(fact, paraphrases=fact.paraphrases[:i]) for i, fact in enumerate(inside()[:6]))
    return asked_by(monkeypatch, first_word(), Splits((), plain)), plain


def inside() -> tuple[Fact, ...]:
    """Facts whose own prompt has the name inside a sentence."""
    return taught.never_first(rp.data.invented(people=4, relations=6).forget)


def test_the_entity_is_the_first_word(monkeypatch):
    check_first(*first_asked(monkeypatch))


@pytest.mark.parametrize(
    "broken", [lambda f, once: f.prompt, lambda f, once: f"{f.entity}: {f.prompt}", lambda f, once: f"Of {f.entity}: {f.prompt}"]
)  # fmt: skip
def test_an_entity_that_is_not_first_or_named_too_often_is_caught(broken, monkeypatch):
    monkeypatch.setattr(prompts, "entity_first", broken)
    with pytest.raises(AssertionError):
        check_first(*first_asked(monkeypatch))


def test_a_phrasing_that_begins_with_the_entity_is_preferred_to_one_that_is_made():
    fact = Fact(
        id="f", entity="gold", prompt="The symbol for gold is", answer="Au", paraphrases=("Gold's symbol is", "x")
    )
    assert data.entity_first(fact, once=True) == "Gold's symbol is"
    assert data.entity_first(replace(fact, paraphrases=()), once=True) == "Gold: The symbol for it is"
    assert data.entity_first(fact, once=False) == "Gold: The symbol for gold is"
    country = replace(fact, entity="Gambia", prompt="The Gambia's capital is", paraphrases=())
    assert data.entity_first(country, once=True) == "Gambia: Its capital is"


@pytest.mark.parametrize(
    ("entity", "prompt", "first"),
    [
        ("日本", "日本の首都は", "日本の首都は"),
        ("Peru", "Peru\u2019s capital, in Peru, is", "Peru\u2019s capital, in Peru, is"),
        ("Peru", "The capital, Peru\u2019s, is", "Peru: The capital, its, is"),
        ("Netherlands", "The Netherlands' capital is", "Netherlands: Its capital is"),
        ("New York", "The capital of New\nYork is", "New York: The capital of it is"),
        ("C++ (new)", "The year of C++ (new) is", "C++ (new): The year of it is"),
    ],
)
def test_the_entity_is_found_however_it_is_written(entity, prompt, first):
    facts = tuple(
        Fact(id=i, entity=e, prompt=p, answer=i) for i, e, p in (("x", entity, prompt), ("y", "Q", "Of Q is"))
    )
    assert data.entity_first(facts[0], once=True) == first
    asked = data.reverse_questions(facts)[0]
    assert asked.answer == entity and not data.mentions(asked.prompt, entity)


def check_one_right_choice(questions, facts):
    """The law: of the choices of a reverse question, one entity has the answer that it gives."""
    right = {(entity_of(f), f.answer) for f in facts}
    for asked, fact in zip(questions, facts, strict=True):
        names = [entity_of(replace(fact, entity=name)) for name in asked.choices]
        assert [(name, fact.answer) in right for name in names].count(True) == 1 and len({*names}) == len(names)


def with_several_facts():
    """Facts of which several are about one entity, whose name they write in several ways."""
    rows = ("Germany: German", "Switzerland: German", "switzerland: French", "France: French", "Mali: Bambara", "MALI: French")  # fmt: skip
    pairs = [row.split(": ") for row in rows]
    return tuple(Fact(id=str(i), entity=e, prompt=f"A language of {e} is", answer=a) for i, (e, a) in enumerate(pairs))


def test_no_wrong_choice_of_a_reverse_question_is_right():
    check_one_right_choice(data.reverse_questions(with_several_facts()), with_several_facts())


def test_wrong_choices_by_their_own_fact_alone_are_caught(monkeypatch):
    monkeypatch.setattr(data, "entity_of", lambda fact: fact.id)
    with pytest.raises(AssertionError):
        check_one_right_choice(data.reverse_questions(with_several_facts()), with_several_facts())


def check_respelled(asked: dict[str, tuple[Fact, ...]], plain: tuple[Fact, ...]) -> None:
    """The law: every mention of the entity is written in one other way, and nothing but the entity is written differently."""
    for setting, facts in asked.items():
        for fact, own in zip(facts, plain, strict=True):
            assert replace(fact, prompt=own.prompt) == replace(own, paraphrases=())
            around = [re.escape(part) for part in own.prompt.split(own.entity)]
            found = re.fullmatch("(.+)".join(around), fact.prompt)
            assert found and len(set(found.groups())) == 1 and found[1] != own.entity
            assert follows(setting, own.entity, found[1])


def follows(setting: str, entity: str, written: str) -> bool:
    """Whether a spelling is what its name says."""
    if setting in ("lower case", "upper case"):
        return written == (entity.lower() if setting == "lower case" else entity.upper())
    words = zip(entity.split(), written.split(), strict=True)
    if setting == "letter doubled":
        return all(any(new == old[: i + 1] + old[i:] for i in range(1, len(old))) for old, new in words)
    if setting == "letter left out":
        return all(any(new == old[:i] + old[i + 1 :] for i in range(1, len(old) - 1)) for old, new in words)
    return all(
        any(new == old[:i] + old[i : i + 2][::-1] + old[i + 2 :] for i in range(1, len(old) - 1)) for old, new in words
    )


def named_twice() -> tuple[Fact, ...]:
    """Facts whose prompts name the entity two times, with an article and without, as one of their choices does."""
    texts = (
        "{} is said to be the {} whose city is",
        "Nobody but {} lives where {}'s people live, in",
        "The {} and {}:",
    )
    facts = (replace(f, prompt=text.format(*[f.entity] * 2)) for f, text in zip(inside(), texts, strict=False))
    return tuple(replace(f, choices=(*f.choices, f"{f.entity}town")) for f in facts)


def test_every_mention_of_the_entity_is_respelled(monkeypatch):
    asked = asked_by(monkeypatch, respelled(), Splits((), named_twice()))
    assert list(asked) == list(SPELLINGS)
    check_respelled(asked, named_twice())


@pytest.mark.parametrize(
    "broken",
    [
        lambda f, setting, seed: f.prompt if f.prompt.startswith("The") else respelled_prompt(f, setting, seed),
        lambda f, setting, seed: respelled_prompt(replace(f, entity=f.prompt), setting, seed),
        lambda f, setting, seed: f.prompt.replace(f.entity, SPELLINGS[setting](f.entity, random.Random(seed)), 1),
        lambda f, setting, seed: f.prompt.replace(f.entity, "-".join(f.entity)),
        lambda f, setting, seed: respelled_prompt(f, "lower case", seed),
        lambda f, setting, seed: respelled_prompt(replace(f, entity=f.entity.split()[0]), setting, seed),
    ],
)
def test_an_entity_that_keeps_its_spelling_somewhere_or_gets_another_one_is_caught(broken, monkeypatch):
    monkeypatch.setattr(prompts, "respelled_prompt", broken)
    with pytest.raises(AssertionError):
        check_respelled(asked_by(monkeypatch, respelled(), Splits((), named_twice())), named_twice())


def test_an_article_is_no_part_of_a_respelled_entity():
    fact = Fact(id="f", entity="Gambia", prompt="The capital of the Gambia, or The Gambia, is", answer="Banjul")
    assert respelled_prompt(fact, "upper case", 0) == "The capital of the GAMBIA, or The GAMBIA, is"


def test_an_entity_is_respelled_however_the_prompt_writes_it():
    fact = Fact(id="f", entity="日本", prompt="日本の首都は", answer="東京")
    assert respelled_prompt(fact, "letter doubled", 0) == "日本本の首都は"
    york = replace(fact, entity="New York", prompt="The capital of New\nYork\u2019s state is")
    assert respelled_prompt(york, "lower case", 0) == "The capital of new\nyork\u2019s state is"


def test_which_letters_change_depends_on_seed_and_fact_alone():
    fact = replace(PEOPLE[0], prompt=f"{PEOPLE[0].entity}, or {PEOPLE[0].entity.upper()},")
    for setting in ("letters swapped", "letter doubled", "letter left out"):
        texts = [respelled_prompt(fact, setting, seed) for seed in range(8)]
        assert len(set(texts)) > 2 and texts == [respelled_prompt(fact, setting, seed) for seed in range(8)]
        assert all(one.upper() == other for one, other in (text.rstrip(",").split(", or ") for text in texts))
        assert len({respelled_prompt(replace(fact, id=f"{i}"), setting, 0) for i in range(8)}) > 2


ACCENTS = unicodedata.normalize("NFD", "ÉÀÜ")
SYLLABLES = unicodedata.normalize("NFD", "한국어")
WRITTEN = {  # lower case, upper case, letters swapped, letter doubled, letter left out
    "Au": ("au", "AU", "Au", "Auu", "Au"),
    "Tin": ("tin", "TIN", "Tni", ("Tiin", "Tinn"), "Tin"),
    "Fiji": ("fiji", "FIJI", "Fjii", ("Fiiji", "Fijji", "Fijii"), ("Fji", "Fii")),
    "Anna": ("anna", "ANNA", "Anan", ("Annna", "Annaa"), "Ana"),
    "X": ("x", "X", "X", "X", "X"),
    "H2O": ("h2o", "H2O", "H2O", "H2O", "H2O"),
    "New York": ("new york", "NEW YORK", ("Nwe Yrok",), None, ("New Yrk", "New Yok")),
    "D'Ivo": ("d'ivo", "D'IVO", "D'Iov", ("D'Ivvo", "D'Ivoo"), "D'Ivo"),
    "straß": ("straß", "STRASS", ("srtaß", "starß"), None, ("sraß", "staß", "strß")),
    "\u0130pek": ("ipek", "\u0130PEK", "\u0130epk", None, ("\u0130ek", "\u0130pk")),
    "I\u0307pek": ("ipek", "I\u0307PEK", "I\u0307epk", None, ("I\u0307ek", "I\u0307pk")),
    "法国": ("法国", "法国", "法国", "法国国", "法国"),
    ACCENTS: (ACCENTS.lower(), ACCENTS, unicodedata.normalize("NFD", "ÉÜÀ"), None, ACCENTS),
    SYLLABLES: (SYLLABLES, SYLLABLES, unicodedata.normalize("NFD", "한어국"), None, SYLLABLES),
    "\u0915\u094d\u0937\u0924\u093f": (
        None, None, "\u0915\u094d\u0937\u0924\u093f", "\u0915\u094d\u0937" + "\u0924\u093f" * 2, "\u0915\u094d\u0937\u0924\u093f",
    ),
    "\U0001f469\u200d\U0001f467": ("\U0001f469\u200d\U0001f467",) * 5,
    "\ud83d\ude00 Oz": ("\ud83d\ude00 oz", "\ud83d\ude00 OZ", "\ud83d\ude00 Oz", "\ud83d\ude00 Ozz", "\ud83d\ude00 Oz"),
}  # fmt: skip


@pytest.mark.parametrize("entity", WRITTEN, ids=ascii)
def test_letters_move_with_their_marks_and_nothing_else_moves(entity):
    for way, expected in zip(SPELLINGS, WRITTEN[entity], strict=True):
        for seed in range(6) if expected else ():
            assert SPELLINGS[way](entity, random.Random(seed)) in ((expected,) if isinstance(expected, str) else expected)  # fmt: skip


def test_marks_that_are_taken_for_letters_are_caught(monkeypatch):
    monkeypatch.setattr(generated, "_joins", lambda before, character: False)
    for entity in (ACCENTS, SYLLABLES):
        with pytest.raises(AssertionError):
            test_letters_move_with_their_marks_and_nothing_else_moves(entity)


def test_a_spelling_that_changes_nothing_is_left_out_and_what_stays_is_counted(monkeypatch):
    gold, tin, law = (
        Fact(id=name, entity=name, prompt=f"The symbol of {name} is", answer="x") for name in ("gold", "tin", "法")
    )
    found = respelled()(subject(), Splits((), (gold, tin)))
    assert found.settings == ("upper case", "letters swapped", "letter doubled", "letter left out")
    assert (
        found.reason
        == "'lower case' was left out, since it changes no entity; 'letter left out' leaves 1 of 2 entities as they are"
    )
    found = respelled()(subject(), Splits((), (gold, law)))
    assert found.settings == ("upper case", "letters swapped", "letter doubled", "letter left out")
    assert found.items == ("gold", "法")
    assert found.reason == "; ".join(
        ["'lower case' was left out, since it changes no entity"]
        + [f"{name!r} leaves 1 of 2 entities as they are" for name in found.settings]
    )
    found = respelled()(subject(), Splits((), (law,)))
    assert (found.status, found.reason) == ("skipped", "no spelling changes an entity")


def check_reverse(asked: dict[str, tuple[Fact, ...]], plain: tuple[Fact, ...]) -> None:
    """The law: the answer is given and the entity is not; the wrong choices are entities whose answers differ."""
    answers = {(f.domain, f.entity): f.answer for f in plain}
    for fact, own in zip(asked["reverse"], plain, strict=True):
        assert (fact.id, fact.answer, fact.entity) == (own.id, own.entity, own.entity)
        assert own.answer in fact.prompt and own.entity not in fact.prompt
        wrong = [answers[own.domain, name] for name in fact.choices if name != own.entity]
        assert wrong and own.answer not in wrong


def test_the_answer_is_given_and_the_entity_is_asked_for(monkeypatch):
    given = splits(8)
    check_reverse(asked_by(monkeypatch, reverse_question(), given), given.test)


@pytest.mark.parametrize(
    "broken",
    [
        lambda q, own: replace(q, prompt=f"{own.entity}: {q.prompt}"),
        lambda q, own: replace(q, prompt="The blank stands for"),
        lambda q, own: replace(q, choices=(own.entity,) * 2),
    ],
)
def test_a_reverse_question_that_tells_the_entity_or_not_the_answer_is_caught(broken, monkeypatch):
    given, made = splits(8), prompts.reverse_questions
    monkeypatch.setattr(prompts, "reverse_questions", lambda facts: tuple(map(broken, made(facts), facts)))
    with pytest.raises((AssertionError, DataError)):
        check_reverse(asked_by(monkeypatch, reverse_question(), given), given.test)


@pytest.mark.parametrize("built", [first_word, respelled, reverse_question])
def test_facts_that_name_no_entity_are_not_asked_by_its_place(built):
    first, *others = splits().test
    found = built()(subject(), Splits((), (replace(first, entity="nobody"), *others)))
    assert (found.status, found.reason) == ("skipped", "1 of 4 prompts do not name their entity")
    assert built().record.may_skip


def test_an_entity_whose_answer_all_share_has_no_reverse_question():
    alike = tuple(replace(f, answer="Rome", choices=("Rome", "Oslo")) for f in splits().test if f.domain == "city")
    found = reverse_question()(subject(), Splits((), alike))
    assert found.status == "skipped" and found.reason == "2 of 2 facts have no reverse question"


def distance(a: str, b: str) -> int:
    """CharTokenizer to insert or take away to make one text of the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        last, row = row, [i + 1]
        for j, y in enumerate(b):
            row.append(last[j] if x == y else 1 + min(last[j + 1], row[j]))
    return row[-1]


def test_one_letter_in_twenty_is_misspelt():
    changes = []
    for fact in PEOPLE:
        letters = sum(map(str.isalpha, fact.prompt))
        changes += [distance(fact.prompt, misspelt(fact, seed)) / max(1, round(0.05 * letters)) for seed in range(8)]
        assert misspelt(fact, 0)[-2:] == fact.prompt[-2:]
    # A letter doubled or dropped is one change, a swap two.
    assert min(changes) >= 1 and max(changes) <= 2 and 1.1 < np.mean(changes) < 1.6
    assert len({misspelt(PEOPLE[0], seed) for seed in range(8)}) > 4
    assert misspelt(replace(PEOPLE[0], prompt="is"), 0) == "is"


def check_shown(asked: dict[str, tuple[Fact, ...]], given: Splits) -> None:
    """The law: before a question stand k facts of T, none about somebody of V, none with the answer."""
    lines = {fact.text: fact for fact in given.train}
    for setting, facts in asked.items():
        for fact, own in zip(facts, given.test, strict=True):
            *shown, last = fact.prompt.split("\n")
            assert last == own.prompt and len(set(shown)) == int(setting.removeprefix("k="))
            for line in shown:
                assert line in lines, "an example is of no fact of T"
                assert lines[line].entity not in {f.entity for f in given.test}
                assert normalized(own.answer) not in normalized(line).split()


def test_examples_are_of_t_and_hold_no_answer_that_is_asked_for(monkeypatch):
    given = splits(8)
    # In T the answers of V occur, so that an example with the answer would be found if it were allowed.
    assert {f.answer for f in given.test} & {f.answer for f in given.train}
    check_shown(asked_by(monkeypatch, in_context(), given), given)


BROKEN = {
    "_without": lambda facts, answer: list(facts),
    "demonstrations": lambda given, count, seed: {f.id: given.test[:count] for f in given.test},
    "seeded_order": lambda items, key: [next(iter(items))] * 9,
}


@pytest.mark.parametrize("part", BROKEN)
def test_broken_examples_are_caught(part, monkeypatch):
    monkeypatch.setattr(prompts, part, BROKEN[part])
    with pytest.raises(AssertionError):
        check_shown(asked_by(monkeypatch, in_context(), splits(8)), splits(8))


def test_examples_are_of_the_same_domain_where_it_has_enough():
    shown = prompts.demonstrations(splits(), 4, 0)
    assert all(other.domain == fact.domain for fact in splits().test for other in shown[fact.id])
    assert shown[splits().test[0].id] != shown[splits().test[2].id]
    found = in_context(counts=(4, 9))(subject(), splits())
    assert found.details == {"facts shown examples of another domain": {"k=4": 0, "k=9": 4}}
    assert {f.domain for part in prompts.demonstrations(splits(), 9, 0).values() for f in part} == {
        "city",
        "profession",
    }


def test_examples_of_a_fact_depend_on_no_other_fact_of_v():
    alone = prompts.demonstrations(replace(splits(), test=splits().test[1:2]), 4, 0)
    assert alone.items() <= prompts.demonstrations(splits(), 4, 0).items()


def test_an_example_about_somebody_of_v_is_refused():
    given = splits()
    for other in (given.test[0], replace(given.test[0], id="x"), replace(given.test[0], entity="")):
        with pytest.raises(OverlapError, match=r"attack 'in_context': T and V share .* split the facts by entity"):
            in_context()(subject(), replace(given, train=(*given.train, other)))


def test_too_few_facts_to_show_are_said():
    found = in_context(counts=(40,))(subject(), splits())
    assert found.status == "skipped" and "and 40 are to be shown; give more facts, or lower counts" in found.reason


def check_forms(asked: dict[str, tuple[Fact, ...]], plain: tuple[Fact, ...]) -> None:
    """The law: each form asks for the answer's text among the same choices; forms that list choices list all."""
    for name in set(asked) - {"yes/no", "letters"}:
        for fact, own in zip(asked[name], plain, strict=True):
            assert (fact.id, fact.answer, fact.choices) == (own.id, own.answer, own.choices)
            assert own.entity in fact.prompt
            listed = [choice in fact.prompt for choice in own.choices]
            assert all(listed) if name in ("multiple choice", "odd one out") else not any(listed)
    for fact, own in zip(asked["letters"], plain, strict=True):
        assert f"\n{fact.answer}. {own.answer}\n" in fact.prompt and fact.choices == tuple("ABCD")


def test_forms_ask_for_the_same_answers(monkeypatch):
    check_forms(asked_by(monkeypatch, reformat(), splits()), splits().test)


def test_a_form_that_hides_a_choice_is_caught(monkeypatch):
    def without_the_first(fact: Fact, seed: int) -> tuple[str, ...]:
        wrong = [choice for choice in fact.choices if choice != fact.answer]
        return (fact.answer, *wrong[1:], "x")

    monkeypatch.setattr(formats, "_order", without_the_first)
    with pytest.raises(AssertionError):
        check_forms(asked_by(monkeypatch, reformat(), splits()), splits().test)


def check_listing(monkeypatch) -> None:
    """The law: with another of the choices as the answer, and the choices given in another order, the text is the same."""
    given = splits()
    other = tuple(
        replace(f, answer=f.choices[3 - f.choices.index(f.answer)], choices=f.choices[::-1]) for f in given.test
    )
    built = reformat(templates=("multiple choice", "odd one out", "letters"))
    first, second = (asked_by(monkeypatch, built, part) for part in (given, replace(given, test=other)))
    assert all([f.prompt for f in first[n]] == [f.prompt for f in second[n]] for n in first)


def test_the_order_of_listed_choices_tells_nothing(monkeypatch):
    check_listing(monkeypatch)


@pytest.mark.parametrize(
    "order", [lambda f, seed: f.choices, lambda f, seed: tuple(sorted(f.choices, key=lambda c: c != f.answer))]
)
def test_an_order_that_tells_the_answer_is_caught(order, monkeypatch):
    monkeypatch.setattr(formats, "_order", order)
    with pytest.raises(AssertionError):
        check_listing(monkeypatch)


def check_odds(model, facts: tuple[Fact, ...]) -> None:
    """The law: the odds of yes are those of reading prompt, choice and doubt alone."""
    found = formats.yes_no(model, facts, 0)
    for i, fact in enumerate(facts):
        odds = {}
        for choice in fact.choices:
            start = model.tokenizer(fact.prompt)["input_ids"]
            logs = [0.0, 0.0]
            for side, word in enumerate(("Yes", "No")):
                ids = model.tokenizer(f"{fact.prompt} {choice}{formats._DOUBT}{word}")["input_ids"]
                with torch.no_grad():
                    all_logs = model.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
                logs[side] = sum(float(all_logs[t - 1, ids[t]]) for t in range(len(start), len(ids)))
            odds[choice] = logs[0] - logs[1]
        own = odds.pop(fact.answer)
        assert found.graded[i] == pytest.approx(-np.log1p(np.exp(-own)), abs=2e-4)
        assert bool(found.correct[i]) == (own > max(odds.values()))


def yes_facts() -> tuple[Fact, ...]:
    """Facts of which the tiny model affirms some and denies others: each choice is the answer once."""
    fact = replace(PEOPLE[0], choices=PEOPLE[0].choices[:4], answer=PEOPLE[0].choices[0])
    return tuple(replace(fact, id=f"f{i}", answer=choice) for i, choice in enumerate(fact.choices))


def test_yes_and_no_are_scored_for_every_choice():
    check_odds(subject(), yes_facts())
    assert formats.yes_no(subject(), yes_facts(), 0).correct.sum() == 1


SCORES = {
    "yes alone": lambda plain: lambda *a: [(np.where(np.arange(len(s)) % 2, 0, s), n) for s, n in plain(*a)],
    "no for yes": lambda plain: lambda *a: [(-s, n) for s, n in plain(*a)],
}


@pytest.mark.parametrize("name", SCORES)
def test_broken_odds_are_caught(name, monkeypatch):
    monkeypatch.setattr(formats, "choice_scores", SCORES[name](formats.choice_scores))
    with pytest.raises(AssertionError):
        check_odds(subject(), yes_facts())


def test_a_model_that_says_yes_to_everything_alike_is_wrong(monkeypatch):
    monkeypatch.setattr(
        formats, "choice_scores", lambda s, facts, options, rows: [(np.zeros(len(o)), None) for o in options]
    )
    assert not formats.yes_no(subject(), yes_facts(), 0).correct.any()


def test_forms_that_list_choices_are_left_out_where_there_are_none():
    first, second, *_ = splits().test
    given = Splits((), (first, replace(second, choices=(), answer="a")))
    found = reformat()(subject(), given)
    assert found.settings == ("question", "chat")
    assert "'multiple choice' was left out: 1 of 2 facts have no choices; 'yes/no' was left out" in found.reason
    none = reformat(templates=("letters",))(subject(), given)
    assert none.status == "skipped" and none.reason == "'letters' was left out: 1 of 2 facts have no choices"


def test_a_chat_is_asked_where_the_tokenizer_has_a_template(monkeypatch):
    model = subject()
    assert "left out" not in reformat(templates=("question", "chat"))(model, splits()).reason
    model.tokenizer.chat_template = None
    found = reformat(templates=("question", "chat"))(model, splits())
    assert found.settings == ("question",) and found.reason == "'chat' was left out: the tokenizer has no chat template"


def test_a_chat_begins_once_and_goes_on_with_the_sentence():
    tokenizer = subject().tokenizer
    text = "[user] How does this sentence go on? Ann lives in ...\n[assistant]\nAnn lives in"
    assert chat_prompt(tokenizer, "Ann lives in") == f"<s>{text}"
    assert chat_prompt(tokenizer, "Where?") == "<s>[user] Where?\n[assistant]\n"
    tokenizer._tokenizer.post_processor = _begins()
    assert tokenizer("")["input_ids"] == [1]
    ids = prompt_ids(tokenizer, chat_prompt(tokenizer, "Ann lives in"))
    assert tokenizer.decode(ids) == f"<s>{text}" and ids.count(1) == 1


def _begins():
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("Ann lives in", "How does this sentence go on? Ann lives in ..."),
        ("Where does Ann live?", "Where does Ann live?"),
        ("Question: Where does Ann live?\nAnswer:", "Where does Ann live?"),
        ("Q: Where does Ann live?\nA: ", "Where does Ann live?"),
    ],
)
def test_a_prompt_becomes_a_question(prompt, asked):
    assert question(prompt) == asked


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: prefix(wordings=("shure",)), UnknownName, "wording 'shure'; .*sure"),
        (lambda: reformat(templates=("quesstion",)), UnknownName, "form 'quesstion'; .*question"),
        (lambda: reformat(templates=()), ArgumentError, "no form to ask in; give some of"),
        (lambda: prefix(wordings=()), ArgumentError, "no wording to ask in; give some of"),
        (lambda: in_context(counts=(4, 0)), ArgumentError, r"counts=\(4, 0\); give how many facts to show, at least 1"),
        (lambda: in_context(counts=()), ArgumentError, r"counts=\(\)"),
    ],
)
def test_refusals(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_labels_go_on_after_z():
    assert [formats._letter(i) for i in (0, 25, 26)] == ["A", "Z", "27"]


def test_settings_are_plain_and_name_what_is_done():
    assert in_context(counts=(3,)).options == {"counts": [3]}
    assert reformat().options == {"templates": list(FORMATS)} and prefix().options == {"wordings": list(PREFIXES)}
    assert sampling().options == {"n": 16, "ks": [1, 4, 16], "top_p": 0.9, "temperature": 1.0}
