"""Facts: questions with one right answer, several phrasings and wrong choices; built in, read from files, split by entity."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from repedit.arguments import checked
from repedit.data.corpus import Batch, Row, Rows, TextSource, check_ids, row_hash
from repedit.data.encoding import Tokenizer
from repedit.data.grading import normalized, spelled
from repedit.errors import (
    ArgumentError,
    DataError,
    FractionError,
    NotEnoughRows,
    NotFound,
    OverlapError,
    UnknownName,
    check_seed,
    check_whole,
    nearest,
)
from repedit.io.files import is_file, user_path
from repedit.io.text import check_text, json_rows, parse_toml

DOMAINS = ("capitals", "symbols", "opposites", "languages", "past_tenses", "cities", "us_cities", "nouns")
"""The built-in fact domains."""
CHOICES = 8
# Field names of published data sets, by our names.
_ALIASES = {"question": "prompt", "input": "prompt", "output": "answer"}

# --- Facts


@dataclass(frozen=True, kw_only=True)
class Fact(Row):
    """A row about one entity, which can be asked in several phrasings.

    White space around the answer and the choices is removed; they follow the prompt after one space.

    Raises:
        DataError: if prompt or answer is blank, the answer is not among the choices, there is only one choice, or a
            choice is blank or appears twice.
    """

    choices: tuple[str, ...] = ()
    """The right answer and wrong ones; empty if the answer is free text."""
    domain: str = ""
    paraphrases: tuple[str, ...] = ()
    """The same question in other words; each is a complete prompt."""
    translations: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Prompts by language."""
    split: str | None = None
    """"T" or "V" if the file fixes the half: attack-train or attack-test."""

    def __post_init__(self) -> None:
        super().__post_init__()
        what = f"fact {self.id!r}"
        for name in ("choices", "paraphrases"):
            texts = getattr(self, name)
            if isinstance(texts, str) or not isinstance(texts, Sequence):
                raise DataError(f"{what}: the field {name!r} is {texts!r}; give a sequence of texts")
            for number, text in enumerate(texts):
                check_text(text, f"{what}: text {number} of the {name}")
            object.__setattr__(self, name, tuple(texts))
        for name, value in (("prompt", self.prompt), ("answer", self.answer), ("id", self.id)):
            if not value.strip():
                raise DataError(f"{what}: the field {name!r} is {value!r}; give a text")
        choices = {spelled(choice): choice.strip() for choice in self.choices}
        if "" in choices:
            raise DataError(f"{what}: a choice of {list(self.choices)} is blank; give a text or leave it out")
        if len(choices) < len(self.choices):
            names = [spelled(choice) for choice in self.choices]
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"{what}: the choice {twice!r} appears twice in {list(self.choices)}")
        if len(choices) == 1:
            raise DataError(f"{what}: one choice, {list(self.choices)}; give at least 2, or none")
        if choices and spelled(self.answer) not in choices:
            raise DataError(f"{what}: the answer {self.answer!r} is not among the choices {list(self.choices)}")
        if self.split not in (None, "T", "V"):
            raise DataError(f"{what}: the field 'split' is {self.split!r}; give 'T', 'V' or nothing")
        object.__setattr__(self, "choices", tuple(choices.values()))
        object.__setattr__(self, "answer", choices.get(spelled(self.answer), self.answer.strip()))

    @property
    def prompts(self) -> tuple[str, ...]:
        """Every phrasing, the fact's own prompt first."""
        return (self.prompt, *self.paraphrases)


@dataclass(frozen=True, eq=False)
@checked
class Facts:
    """Facts to forget and facts to retain. As a corpus, this is the facts to forget in their own prompts.

    Raises:
        NotEnoughRows: if there are fewer than two facts to forget.
        DataError: if an id appears twice on one side, or a prompt with two answers.
        OverlapError: if the sides share an id, or a prompt with its answer.
    """

    forget: tuple[Fact, ...]
    retain: tuple[Fact, ...] = ()
    name: str = "facts"

    def __post_init__(self) -> None:
        if len(self.forget) < 2:
            raise NotEnoughRows(f"facts {self.name!r}: {len(self.forget)} to forget; give at least 2")
        check_ids(self.forget, f"facts {self.name!r}, forget")
        check_ids(self.retain, f"facts {self.name!r}, retain")
        ids: dict[str, str] = {}
        for fact in self.forget:
            other = ids.setdefault(normalized(fact.text), fact.id)
            if other != fact.id:
                raise DataError(
                    f"facts {self.name!r}: {other!r} and {fact.id!r} have the same prompt and answer; remove one"
                )
        _check_one_answer((*self.forget, *self.retain), f"facts {self.name!r}")
        for what, key in (("ids", lambda f: f.id), ("prompts with answers", lambda f: normalized(f.text))):
            both = sorted({key(f) for f in self.forget} & {key(f) for f in self.retain})
            if both:
                raise OverlapError(
                    f"facts {self.name!r}: forget and retain share {len(both)} {what}, such as {both[:5]}; "
                    "remove them from one side"
                )

    def __len__(self) -> int:
        return len(self.forget)

    def __repr__(self) -> str:
        return f"Facts({self.name!r}, {len(self.forget)} to forget, {len(self.retain)} to retain)"

    @cached_property
    def hash(self) -> str:
        """sha256 over every field of every fact of both sides, in order."""
        return hashlib.sha256(f"{row_hash(self.forget)} {row_hash(self.retain)}".encode()).hexdigest()

    @checked
    def batches(self, tokenizer: Tokenizer | None, *, length: int = 128, batch_size: int = 8) -> Iterator[Batch]:
        """The facts to forget as rows; see `Rows.batches`."""
        yield from Rows(self.forget, self.name).batches(tokenizer, length=length, batch_size=batch_size)


def _check_one_answer(items: Iterable[Fact], where: str) -> None:
    """Refuse facts with the same prompt and different answers: they cannot both be right."""
    first: dict[str, Fact] = {}
    for fact in items:
        other = first.setdefault(" ".join(fact.prompt.split()), fact)
        if spelled(other.answer) != spelled(fact.answer):
            raise DataError(
                f"{where}: {other.id!r} and {fact.id!r} ask {fact.prompt[:80]!r} and have the answers {other.answer!r} and "
                f"{fact.answer!r}; keep one, or make the prompts different"
            )


@checked
def by_domain(items: Iterable[Fact]) -> dict[str, tuple[Fact, ...]]:
    """The facts by domain; domains and facts keep their order."""
    domains: dict[str, list[Fact]] = {}
    for fact in items:
        domains.setdefault(fact.domain, []).append(fact)
    return {domain: tuple(part) for domain, part in domains.items()}


@checked
def with_paraphrases(items: Iterable[Fact], *, only: Sequence[int] | None = None) -> tuple[Fact, ...]:
    """One fact per phrasing: the fact itself, then its paraphrases with the ids "capitals/france#1", "#2" and so on.

    Args:
        only: numbers of the phrasings, where 0 is the fact's own prompt; None for all.
    Raises:
        ArgumentError: if a fact has no phrasing with such a number.
    """
    phrased = []
    for fact in items:
        for number in range(len(fact.prompts)) if only is None else only:
            if not 0 <= number < len(fact.prompts):
                raise ArgumentError(f"fact {fact.id!r} has phrasings 0 to {len(fact.paraphrases)}, not {number}")
            name = f"{fact.id}#{number}" if number else fact.id
            phrased.append(replace(fact, id=name, prompt=fact.prompts[number], paraphrases=()))
    return tuple(phrased)


def fact_of(name: str) -> str:
    """The id of the fact that a phrasing belongs to: "capitals/france" for "capitals/france#1"."""
    return name.partition("#")[0]


@checked
def with_choices(items: Sequence[Fact], *, seed: int = 0, count: int = 8) -> tuple[Fact, ...]:
    """The facts with their choices in an order that depends on the seed.

    A fact without choices gets up to `count` - 1 wrong ones, drawn from the other answers of its domain.

    Raises:
        ArgumentError: if the seed or the count is out of range.
    """
    check_seed(seed=seed)
    check_whole(2, count=count)
    pools = {
        domain: sorted({normalized(fact.answer): fact.answer for fact in part}.items())
        for domain, part in by_domain(items).items()
    }
    shuffled = []
    for fact in items:
        choices = fact.choices
        if not choices:
            pool = pools[fact.domain]
            others = random.Random(f"{seed}:{fact.id}").sample(pool, min(len(pool), count))
            wrong = [answer for key, answer in others if key != normalized(fact.answer)][: count - 1]
            choices = (fact.answer, *wrong) if wrong else ()
        shuffled.append(_with_order(fact, choices, seed))
    return tuple(shuffled)


@lru_cache(maxsize=4096)  # most commands read all 1,159 built-in facts
def _with_order(fact: Fact, choices: tuple[str, ...], seed: int) -> Fact:
    return replace(fact, choices=seeded_order(choices, f"{seed}:order:{fact.id}"))


def seeded_order(items: Iterable[str], key: str) -> tuple[str, ...]:
    """The items in a pseudo-random order that depends on the key and the items, not on their given order."""
    return tuple(sorted(items, key=lambda item: hashlib.sha256(f"{key}\0{item}".encode()).digest()))


# --- Facts from a file with one JSON object per line


def read_facts(path: Path) -> tuple[tuple[Fact, ...], tuple[Fact, ...]]:
    """The facts of a file as (forget, retain): rows with `"role": "retain"` are retained, all others forgotten.

    `question` and `input` are read as `prompt`, `output` as `answer`; an integer `answer` is an index into `choices`.
    The default of `id` is the file's name and the row number, the default of `entity` is the id.

    Raises:
        DataError: if the file cannot be read or a row is malformed, with the row, the id, the field and its value.
    """
    sides: dict[str, list[Fact]] = {"forget": [], "retain": []}
    for number, row in json_rows(path):
        try:
            role, fact = _fact(row, path.stem, number)
        except DataError as error:
            raise DataError(f"{path}, row {number}: {error}") from error
        sides[role].append(fact)
    return tuple(sides["forget"]), tuple(sides["retain"])


def _fact(row: Mapping[str, object], stem: str, number: int) -> tuple[str, Fact]:
    fields = {_ALIASES.get(key, key): value for key, value in row.items() if value is not None}
    name = str(fields.get("id", f"{stem}/{number}"))
    role = fields.get("role", "forget")
    if role not in ("forget", "retain"):
        raise DataError(f"fact {name!r}: the field 'role' is {role!r}; give 'forget' or 'retain'")
    translations = fields.get("translations", {})
    if not isinstance(translations, dict) or not all(isinstance(text, str) for text in translations.values()):
        raise DataError(f"fact {name!r}: the field 'translations' is {translations!r}; give prompts by language")
    choices = _texts(fields, "choices", name)
    answer = fields.get("answer")
    if isinstance(answer, int) and not isinstance(answer, bool) and choices:
        if not 0 <= answer < len(choices):
            raise DataError(f"fact {name!r}: the answer {answer} is not an index into {len(choices)} choices")
        fields["answer"] = choices[answer]
    fact = Fact(
        id=name, prompt=_text(fields, "prompt", name), answer=_text(fields, "answer", name),
        entity=_text(fields, "entity", name, name), domain=_text(fields, "domain", name, stem), choices=choices,
        paraphrases=_texts(fields, "paraphrases", name), translations=translations,
        alternative=_text(fields, "alternative", name) if "alternative" in fields else None,
        split=_text(fields, "split", name) if "split" in fields else None,
    )  # fmt: skip
    return str(role), fact


def _text(fields: Mapping[str, object], field: str, name: str, default: str | None = None) -> str:
    value = fields.get(field, default)
    if not isinstance(value, str):
        what = f"it is {value!r}" if value is not None else f"it is missing; the row has {sorted(fields)}"
        raise DataError(f"fact {name!r}: the field {field!r} must be a text; {what}")
    return value


def _texts(fields: Mapping[str, object], field: str, name: str) -> tuple[str, ...]:
    value = fields.get(field, ())
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise DataError(f"fact {name!r}: the field {field!r} must be a list of texts; it is {value!r}")
    return tuple(value)


# --- Facts by name: built-in domains, or a file
#
# A built-in domain is a TOML table: its phrasings, and groups of entities with their answers. Wrong choices come from
# the same group first, so that they are answers of the same kind.


def fact_items(given: Facts | Iterable[Fact]) -> tuple[Fact, ...]:
    """The facts to forget of Facts, or the facts that are given.

    Raises:
        DataError: if something else is given.
    """
    if isinstance(given, Facts):
        return given.forget
    items = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
    wrong = next((item for item in items if not isinstance(item, Fact)), None)
    if wrong is not None or given is None:
        raise DataError(
            f"a {type(given).__name__} with {wrong!r:.60} was given as facts; give rp.data.facts(...), or facts"
        )
    return items


@checked
def facts(name: str | Path, *, retain: str | Path | Facts | Iterable[Fact] | None = None, seed: int = 0) -> Facts:
    """The facts of a built-in domain, of several domains such as "capitals+symbols", or of a .jsonl file.

    For built-in names the facts of all other built-in domains are retained, for a file its rows with `"role":
    "retain"`.

    Args:
        retain: other facts to retain: a name or file (its facts to forget), Facts (likewise), or facts.
        seed: of the order of the choices, and of the wrong choices for facts without choices.
    Raises:
        UnknownName: if no domain has the name.
        NotFound: if the file does not exist.
        DataError: if a row is malformed, with its number.
        OverlapError: if forget and retain share a fact.
        ArgumentError: if the seed is no whole number from 0.
    """
    check_seed(seed=seed)
    forget, others = _items(name)
    if retain is not None:
        others = _retained(retain)
    both = with_choices((*forget, *others), seed=seed)
    label = name if isinstance(name, str) and not _is_file(name) else Path(name).stem
    return Facts(both[: len(forget)], both[len(forget) :], str(label))


def _items(name: str | Path) -> tuple[tuple[Fact, ...], tuple[Fact, ...]]:
    if _is_file(name):
        path = user_path(name)
        if not is_file(path):
            raise NotFound(f"{path.absolute()} is not a file; {nearest(str(name), DOMAINS)}")
        return read_facts(path)
    selected = str(name).split("+")
    for part in selected:
        if part not in DOMAINS:
            raise UnknownName(
                f"no built-in facts are called {part!r}, and a file ends in .jsonl; {nearest(part, DOMAINS)}"
            )
    forget, rest = (
        [fact for d in DOMAINS if (d in selected) == side for fact in builtin_domain(d)] for side in (True, False)
    )
    return tuple(forget), tuple(rest)


def _is_file(name: str | Path) -> bool:
    return isinstance(name, Path) or name.endswith(".jsonl")


def _retained(source: str | Path | Facts | Iterable[Fact]) -> tuple[Fact, ...]:
    if isinstance(source, Facts):
        return source.forget
    return _items(source)[0] if isinstance(source, str | Path) else tuple(source)


@cache
def builtin_domain(name: str) -> tuple[Fact, ...]:
    """The facts of one built-in domain, the right answer first among the choices."""
    text = resources.files("repedit.data").joinpath(f"builtin/{name}.toml").read_text(encoding="utf-8")
    table = parse_toml(text, f"{name}.toml")
    groups = [value for value in table.values() if isinstance(value, dict)]
    all_answers = set().union(*map(_answers, groups))
    return tuple(
        _builtin_fact(name, table, entity, answers, (_answers(group), all_answers))
        for group in groups
        for entity, answers in group.items()
    )


def _builtin_fact(
    name: str, table: Mapping[str, Any], entity: str, answers: str | list[str], pools: Iterable[set[str]]
) -> Fact:
    # A list holds the answer, then words that are also right and therefore cannot be wrong choices.
    right = [answers] if isinstance(answers, str) else answers
    identity = f"{name}/{normalized(entity).replace(' ', '-')}"
    wrong = [answer for pool in pools for answer in seeded_order(pool - set(right), identity)]
    noun = f"the {entity}" if entity in table.get("the", ()) else entity
    prompt, *paraphrases = (_phrased(template, noun) for template in (table["prompt"], *table["paraphrases"]))
    return Fact(
        id=identity, entity=entity, prompt=prompt, answer=right[0],
        choices=tuple(dict.fromkeys([right[0], *wrong]))[:CHOICES], domain=name, paraphrases=tuple(paraphrases),
    )  # fmt: skip


def _answers(group: Mapping[str, str | list[str]]) -> set[str]:
    return {answer if isinstance(answer, str) else answer[0] for answer in group.values()}


def _phrased(template: str, entity: str) -> str:
    text = template.replace("{}", entity)
    return text[:1].upper() + text[1:]


# --- Splits: halves of facts that share no entity, one for the attacker to train on and one to test the attack on


@dataclass(frozen=True)
@checked
class Splits:
    """Facts and texts by their role in an attack."""

    train: tuple[Fact, ...]
    """T: answers the attacker may use."""
    test: tuple[Fact, ...]
    """V: what the attack is scored on."""
    retain: tuple[Fact, ...] = ()
    unrelated: TextSource | None = None
    """Text that is unrelated to the facts."""
    holdout: TextSource | None = None
    """Text or facts that the model never saw."""
    attributes: tuple[Fact, ...] = ()
    """Other facts about the entities of T and V."""

    def __repr__(self) -> str:
        return f"Splits({len(self.train)} facts in T, {len(self.test)} in V, {len(self.retain)} to retain)"

    @classmethod
    @checked
    def of(cls, facts: Facts | Sequence[Fact], *, fold: int = 0, train_fraction: float = 0.5, seed: int = 0) -> Splits:
        """Split the facts to forget by entity; the result depends on the seed and the entities alone.

        A fact whose `split` is "T" or "V" stays there with its entity; the other entities are divided. Fold 1 swaps the
        sides of fold 0, so that over both folds every fact is tested once.

        Raises:
            FractionError: unless the fraction is strictly between 0 and 1.
            ArgumentError: if the fold is neither 0 nor 1.
            NotEnoughRows: if a side would be empty.
            OverlapError: if the facts fix one entity on both sides.
        """
        if not 0 < train_fraction < 1:
            raise FractionError(f"train_fraction={train_fraction}; give a fraction strictly between 0 and 1")
        check_seed(seed=seed)
        if fold not in (0, 1):
            raise ArgumentError(f"fold={fold}; there are two, 0 and 1")
        items, retain = (facts.forget, facts.retain) if isinstance(facts, Facts) else (tuple(facts), ())
        train = _train_entities(items, train_fraction, seed)
        sides = tuple(tuple(fact for fact in items if (entity_of(fact) in train) == side) for side in (True, False))
        if not all(sides):
            raise NotEnoughRows(
                f"{len({entity_of(fact) for fact in items})} entities give {len(sides[0])} facts to train on and "
                f"{len(sides[1])} to test; both sides need one"
            )
        first, second = reversed(sides) if fold else sides
        return cls(first, second, retain)


def _train_entities(items: Sequence[Fact], fraction: float, seed: int) -> set[str]:
    fixed = {side: {entity_of(fact) for fact in items if fact.split == side} for side in ("T", "V")}
    both = sorted(fixed["T"] & fixed["V"])
    if both:
        raise OverlapError(f"{len(both)} entities are fixed both in T and in V, such as {both[:5]}")
    free = seeded_order({entity_of(fact) for fact in items} - fixed["T"] - fixed["V"], str(seed))
    return fixed["T"] | set(free[: min(max(round(fraction * len(free)), 1), max(len(free) - 1, 0))])


@checked
def entity_of(fact: Fact) -> str:
    """What a fact is about, for splitting: its normalized entity, or its id if it names none."""
    return normalized(fact.entity) or fact.id
