"""What an audit asks: facts with choices, split by entity into folds, what should have been kept, and what else is known of the entities."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, zip_longest
from typing import Any, NamedTuple, TypedDict, Unpack, cast

from repedit.data import DOMAINS, Batches, Fact, Facts, Splits, TextSource, as_batches, by_domain, prose, with_choices
from repedit.data.fact_sets import builtin_domain, entity_of, fact_items, seeded_order
from repedit.data.grading import contains_answer, mentions, normalized
from repedit.errors import ArgumentError, DataError, NotEnoughRows, OverlapError

# --- The facts of an audit: T, V and retain, without near-duplicates


ENTITIES = 8
"""Fewest entities on a side."""
NEAR = 0.5
"""Two facts whose 8-grams overlap by more (Jaccard) are one."""
FREE = 6
"""Answers of more words than this, on average, are free text: asked by what the model writes."""


@dataclass(frozen=True, eq=False)
class AuditData:
    """The facts of an audit, ready to be asked."""

    forget: tuple[Fact, ...]
    folds: tuple[Splits, ...]
    """Each fact is in V once; one fold only with folds=1."""
    retain: tuple[Fact, ...]
    """Asked to see what was kept."""
    text: Batches | None
    """Its perplexity is measured to see what was kept."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the report should know of them."""

    @property
    def tested(self) -> tuple[Fact, ...]:
        """V: every fact that is in V in some fold, in the order of the folds."""
        return tuple(fact for fold in self.folds for fact in fold.test)

    @property
    def whole(self) -> Splits:
        """V asked at once, for attacks that use no answers of T."""
        return replace(self.folds[0], train=(), test=self.tested)

    @cached_property
    def fifths(self) -> tuple[Splits, ...]:
        """Five folds, each with a fifth of the tested entities in V and everything else in T.

        A fact of T that nearly repeats one of V is left out.
        """
        order = seeded_order({entity_of(fact) for fact in self.tested}, "fifths")
        parts = []
        for number in range(5):
            asked = set(order[number::5])
            test = tuple(fact for fact in self.tested if entity_of(fact) in asked)
            train = [fact for fact in self.forget if entity_of(fact) not in asked]
            repeated = {name for name, _ in _near_duplicates(train, test)}
            unrepeated = tuple(fact for fact in train if fact.id not in repeated)
            parts.append(replace(self.folds[0], train=unrepeated, test=test))
        return tuple(parts)

    @property
    def entities(self) -> dict[str, str]:
        """The entity of each fact, by id."""
        return {fact.id: entity_of(fact) for fact in self.forget}


class DataOptions(TypedDict):
    """How facts are divided, and the texts that attacks may use beside them."""

    unrelated: TextSource | None
    """Text that has to do with neither side, for harmless fine-tuning."""
    holdout: TextSource | None
    """Text or facts that no model saw."""
    folds: int
    train_fraction: float
    """The fraction of the entities in T."""
    seed: int


def audit_data(
    facts: Facts | Sequence[Fact],
    retain: Facts | TextSource | None,
    *,
    most: int | None,
    attributes: Facts | Iterable[object] | None = (),
    **options: Unpack[DataOptions],
) -> AuditData:
    """Facts with choices in folds by entity, and the retain side.

    Args:
        retain: Facts, facts or text; None for the facts' own retain side and the built-in prose.
        most: retain facts to ask at most, drawn evenly from the domains; None for all.
        attributes: facts of other domains about the entities to forget; None for those of the facts' own retain side
            and of the built-in domains.
    Raises:
        DataError: if there are no facts, or an attribute is about another entity.
        NotEnoughRows: if a side has fewer than 8 entities.
        OverlapError: if near-duplicates straddle T and V, retain facts you gave share an entity with the forget side,
            or an attribute you gave states a forgotten fact.
        ArgumentError: if folds is neither 1 nor 2.
    """
    folds, seed = options["folds"], options["seed"]
    if folds not in (1, 2):
        raise ArgumentError(f"folds={folds}; give 2 to test every fact once, or 1")
    forget = fact_items(facts)
    if not forget:
        raise DataError(f"there are no facts to audit; give at least {2 * ENTITIES}, of as many entities")
    retained, text, notes = _retained(forget, facts, retain)
    both = _with_choices((*forget, *retained), seed)
    forget, retained = both[: len(forget)], _sampled(both[len(forget) :], most, seed)
    others = _attributes(forget, facts, attributes, seed, notes)
    unrelated, holdout, train_fraction = options["unrelated"], options["holdout"], options["train_fraction"]
    halves = (Splits.of(forget, fold=i, train_fraction=train_fraction, seed=seed) for i in range(folds))
    parts = tuple(
        replace(half, retain=retained, unrelated=unrelated, holdout=holdout, attributes=others) for half in halves
    )
    for part in parts:
        _check_sides(part)
    return AuditData(forget, parts, retained, text, notes)


def _retained(
    forget: tuple[Fact, ...], facts: Facts | Sequence[Fact], retain: Facts | TextSource | None
) -> tuple[tuple[Fact, ...], Batches | None, list[str]]:
    forgotten = {normalized(fact.entity) for fact in forget if fact.entity}
    if retain is None:
        own = facts.retain if isinstance(facts, Facts) else ()
        retained = tuple(fact for fact in own if normalized(fact.entity) not in forgotten)
        note = f"retain: {len(retained)} facts of the facts' own retain side and the built-in prose"
        note += (
            f"; {len(own) - len(retained)} facts about forgotten entities are left out"
            if len(retained) < len(own)
            else ""
        )
        return retained, prose(), [note]
    items: TextSource = retain.forget if isinstance(retain, Facts) else retain
    if not isinstance(items, Batches | str) and isinstance(items, Iterable):
        rows = tuple(items)
        facts_to_retain = tuple(item for item in rows if isinstance(item, Fact))
        if rows and len(facts_to_retain) == len(rows):
            shared = sorted({fact.entity for fact in facts_to_retain if normalized(fact.entity) in forgotten})
            if shared:
                raise OverlapError(
                    f"retain and forget share {len(shared)} entities, such as {shared[:5]}; training on them would teach what "
                    "is tested; take them out of retain"
                )
            return facts_to_retain, None, []
        items = cast(TextSource, rows)
    return (), as_batches(items, name="retain"), []


def _attributes(
    forget: tuple[Fact, ...],
    facts: Facts | Sequence[Fact],
    attributes: Facts | Iterable[object] | None,
    seed: int,
    notes: list[str],
) -> tuple[Fact, ...]:
    own = facts.retain if isinstance(facts, Facts) else ()
    others = attributes_of(forget, own) if attributes is None else given_attributes(forget, attributes)
    if others.left_out:
        notes.append(f"{others.left_out} other facts about forgotten entities state a forgotten fact and are left out")
    return _with_choices(others.facts, seed) if others.facts else ()


def _with_choices(facts: Sequence[Fact], seed: int) -> tuple[Fact, ...]:
    """Facts with short answers get choices of their domain; those whose answers are free text stay without."""
    free = {
        domain for domain, part in by_domain(facts).items()
        if sum(len(fact.answer.split()) for fact in part) / len(part) > FREE
    }  # fmt: skip
    chosen = iter(with_choices([f for f in facts if f.choices or f.domain not in free], seed=seed))
    return tuple(next(chosen) if f.choices or f.domain not in free else f for f in facts)


def _sampled(facts: tuple[Fact, ...], most: int | None, seed: int) -> tuple[Fact, ...]:
    if most is None or len(facts) <= most:
        return facts
    domains = by_domain(facts)
    share = -(-most // len(domains))
    return tuple(
        fact
        for name, part in domains.items()
        for fact in random.Random(f"{seed}:{name}").sample(part, min(share, len(part)))
    )


def _check_sides(part: Splits) -> None:
    for name, side in (("T", part.train), ("V", part.test)):
        count = len({entity_of(fact) for fact in side})
        if count < ENTITIES:
            raise NotEnoughRows(
                f"{name} has {count} entities; an audit needs at least {ENTITIES} on each side; "
                f"give facts to forget about {2 * ENTITIES} entities or more"
            )
    pairs = _near_duplicates(part.train, part.test)
    if pairs:
        raise OverlapError(f"{len(pairs)} near-duplicates straddle T and V, such as {pairs[:5]}; keep one of each pair")


def _near_duplicates(train: Sequence[Fact], test: Sequence[Fact]) -> list[tuple[str, str]]:
    """(id in T, id in V) of facts that are nearly the same text."""
    texts = {normalized(fact.text): fact.id for fact in train}
    grams = {fact.id: _grams(fact) for fact in train}
    pairs = [(texts[normalized(f.text)], f.id) for f in test if normalized(f.text) in texts]
    for fact in test:
        own = _grams(fact)
        pairs += [(other, fact.id) for other, other_grams in grams.items() if own and len(own & other_grams) > NEAR * len(own | other_grams)]  # fmt: skip
    return pairs


def _grams(fact: Fact) -> frozenset[tuple[str, ...]]:
    words = normalized(fact.text).split()
    return frozenset(tuple(words[i : i + 8]) for i in range(len(words) - 7))


# --- Attributes: facts of other domains about the same entities, which an attacker may know


class Attributes(NamedTuple):
    """Facts about the entities that are forgotten, none of which states a forgotten fact."""

    facts: tuple[Fact, ...]
    left_out: int
    """Built-in facts, and facts of the retain side, that state a forgotten fact."""


def attributes_of(forget: Sequence[Fact], own: Iterable[Fact] = ()) -> Attributes:
    """Attributes of the entities among `own` facts and the built-in domains, found by the name of the entity.

    A domain of which facts are forgotten gives no attributes.
    """
    entities, domains = {entity_of(fact) for fact in forget}, {fact.domain for fact in forget}
    builtin = (fact for name in DOMAINS for fact in builtin_domain(name))
    others = {
        fact.id: fact for fact in (*own, *builtin) if fact.domain not in domains and normalized(fact.entity) in entities
    }
    leaking = {row.id for row, _ in leaks(tuple(others.values()), forget)}
    return Attributes(tuple(fact for name, fact in others.items() if name not in leaking), len(leaking))


def given_attributes(forget: Sequence[Fact], attributes: Facts | Iterable[object]) -> Attributes:
    """The attributes that a user gives as facts or Facts, each about an entity of `forget`.

    Raises:
        DataError: if something else than facts is given, or a fact is about no such entity.
        OverlapError: if one states a forgotten fact, or is of a domain of which facts are forgotten.
    """
    items: tuple[Any, ...] = tuple(attributes.forget if isinstance(attributes, Facts) else attributes)
    wrong = next((item for item in items if not isinstance(item, Fact)), None)
    if wrong is not None:
        raise DataError(f"attributes hold {wrong!r}; give facts about the entities of the facts to forget")
    entities, domains = {entity_of(fact) for fact in forget}, {fact.domain for fact in forget}
    strangers = [fact.id for fact in items if normalized(fact.entity) not in entities]
    if strangers:
        raise DataError(
            f"{len(strangers)} attributes are about no entity of the facts to forget, such as {strangers[:5]}; leave them out"
        )
    same = [fact.id for fact in items if fact.domain in domains]
    if same:
        raise OverlapError(
            f"{len(same)} attributes are of a domain of which facts are forgotten, such as {same[:5]}; give facts of other "
            "domains"
        )
    check_no_leak(items, forget)
    return Attributes(items, 0)


def spread(items: Sequence[Fact], most: int, seed: int) -> tuple[Fact, ...]:
    """At most `most` of the facts: one of every entity, then a second one of every entity, and so on."""
    by_entity: dict[str, list[Fact]] = {}
    by_id = {fact.id: fact for fact in items}
    for name in seeded_order(by_id, f"{seed}:attributes"):
        by_entity.setdefault(entity_of(by_id[name]), []).append(by_id[name])
    rounds = chain.from_iterable(zip_longest(*by_entity.values()))
    return tuple([fact for fact in rounds if fact is not None][:most])


# --- The entity in a prompt


class Mention(NamedTuple):
    """Where a text names the entity of a fact, in characters."""

    start: int
    end: int
    article: int
    """Where an article before it begins, or `start`."""


def entity_mention(fact: Fact, text: str) -> Mention | None:
    """The first place where a text names the entity of a fact, as a whole word; None if it does not."""
    return next(iter(_entity_mentions(fact, text)), None)


def _entity_mentions(fact: Fact, text: str) -> list[Mention]:
    spans = mentions(text, fact.entity)
    articles = [re.search(r"(?<!\w)the $", text[:start], re.IGNORECASE) for start, _ in spans]
    return [
        Mention(*span, span[0] if word is None else word.start()) for span, word in zip(spans, articles, strict=True)
    ]


def with_entity(fact: Fact, written: Callable[[str], str]) -> str:
    """The prompt with every mention of the entity as `written` writes it; an article before the entity stays."""
    text = fact.prompt
    for start, end, _ in reversed(_entity_mentions(fact, text)):
        text = f"{text[:start]}{written(text[start:end])}{text[end:]}"
    return text


def entity_first(fact: Fact, *, once: bool) -> str:
    """A prompt that begins with the entity, for a fact whose prompt names it.

    Once: the first phrasing that begins with the entity; without one, the entity and a colon before the prompt, in which
    "it" stands for the entity ("France: The capital of it is"). Not once: the entity and a colon before the prompt as it is.
    """
    entity = fact.entity.strip()
    first = entity[:1].upper() + entity[1:] if entity.islower() else entity
    if not once:
        return f"{first}: {fact.prompt}"
    own = next((p for p in fact.prompts if (named := entity_mention(fact, p)) is not None and not named.start), None)
    if own is not None:
        return own
    text = fact.prompt
    for _, end, article in reversed(_entity_mentions(fact, text)):
        possessive = re.compile(r"['\u2019](s\b|(?<=s.)(?= ))").match(text, end)
        pronoun = ("it" if article else "It") + ("" if possessive is None else "s")
        text = text[:article] + pronoun + text[end if possessive is None else possessive.end() :]
    return f"{first}: {text}"


# --- Reverse questions: the answer is given and the entity is asked for


REVERSED: Mapping[str, str] = {
    "capitals": "{} is the capital of",
    "symbols": "{} is the chemical symbol of the element",
    "opposites": "{} is the opposite of",
    "languages": "{} is the official language of",
    "past_tenses": "{} is the past tense of the verb",
    "cities": "A well-known city in {} is",
    "us_cities": "A well-known city in the state of {} is",
    "nouns": "{} is the noun formed from the verb",
}
"""Reverse questions of the built-in domains; {} is the answer of the fact."""
_BLANK = "{} {}. The blank stands for"


def reversed_facts(items: Sequence[Fact], seed: int = 0) -> tuple[Fact, ...]:
    """The facts asked the other way round: "Paris is the capital of" -> "France".

    A built-in domain has its own wording. Any other fact becomes its own prompt with a blank in place of the entity:
    "The river through ___ is the Seine. The blank stands for" -> "Paris"; a fact whose prompt does not name its entity
    has no reverse question. The wrong choices are entities with other answers.
    """
    asked = [(fact, pair) for fact in items if (pair := _reverse(fact)) is not None]
    right = {(f.domain, entity_of(f), normalized(f.answer)) for f, _ in asked}
    reverse = []
    for fact, (prompt, entity) in asked:
        pool: dict[str, str] = {}  # a name of each entity
        for other, (_, name) in asked:
            known = (fact.domain, entity_of(other), normalized(fact.answer)) in right
            if other.domain == fact.domain and not known:
                pool.setdefault(entity_of(other), name)
        wrong = seeded_order(dict.fromkeys(pool.values()), f"{seed}:{fact.id}")[:7]
        choices = seeded_order((entity, *wrong), f"{seed}:order:{fact.id}") if wrong else ()
        reverse.append(
            replace(
                fact,
                id=f"{fact.id}#reverse",
                prompt=prompt,
                answer=entity,
                choices=choices,
                paraphrases=(),
                translations={},
            )
        )
    return tuple(reverse)


def _reverse(fact: Fact) -> tuple[str, str] | None:
    """(prompt, entity as the prompt names it) of the reverse question."""
    entity, named = fact.entity.strip(), entity_mention(fact, fact.prompt)
    if named is None:
        return None
    if fact.domain in REVERSED and fact.id.startswith(f"{fact.domain}/"):
        return REVERSED[fact.domain].format(fact.answer), f"the {entity}" if named.article < named.start else entity
    blank = fact.prompt.rstrip()
    for start, end, _ in reversed(_entity_mentions(fact, blank)):
        blank = f"{blank[:start]}___{blank[end:]}"
    return _BLANK.format(blank, fact.answer), entity


def reverse_questions(items: Sequence[Fact]) -> tuple[Fact, ...]:
    """`reversed_facts` under the ids of the facts; those without choices are left out."""
    reverse = reversed_facts(items)
    return tuple(replace(fact, id=fact.id.removesuffix("#reverse")) for fact in reverse if fact.choices)


# --- What must not be trained on


def leaks(rows: Sequence[Fact], test: Sequence[Fact]) -> list[tuple[Fact, Fact]]:
    """(row, fact): rows that state a fact, in its own direction or in reverse.

    A row states a fact that names the entity of the fact and its answer, in any order, or that holds one of its
    phrasings with the answer.
    """
    words = [normalized(row.text) for row in rows]
    stated = []
    for fact in test:
        entity, phrasings = normalized(fact.entity), [normalized(f"{prompt} {fact.answer}") for prompt in fact.prompts]
        stated += [
            (row, fact)
            for row, text in zip(rows, words, strict=True)
            if (entity and entity in text and _answered(text, entity, fact.answer)) or any(p in text for p in phrasings)
        ]
    return stated


def _answered(text: str, entity: str, answer: str) -> bool:
    """Whether a text that names an entity also holds the answer."""
    if not contains_answer(text, answer):
        return False
    # An answer that stands in the name of its entity ("Luxembourg") is stated by the rest of the text alone.
    return not contains_answer(entity, answer) or contains_answer(text.replace(entity, " ", 1), answer)


def check_no_leak(rows: Sequence[Fact], test: Sequence[Fact]) -> None:
    """Refuse to train on rows that state a fact which is to be forgotten or asked.

    Raises:
        OverlapError: with the first rows and facts.
    """
    pairs = leaks(rows, test)
    if pairs:
        shown = [(row.text, fact.id) for row, fact in pairs[:3]]
        raise OverlapError(
            f"{len(pairs)} texts to train on state a fact that is asked, such as {shown}; training on them would teach "
            "what is tested; leave them out"
        )
