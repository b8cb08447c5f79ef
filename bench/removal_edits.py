"""The edits that `bench.removal` compares: each makes SmolLM2-135M forget the capitals, and says what its certificate says.

Training halves of the other domains may be seen, their test halves never; languages, which are about the same countries, are
seen by gradient methods and not by overwrites. No setting was chosen by an attack.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

import repedit as rp
from bench.mrp import seen
from bench.relearning import gradient_difference
from bench.removal_rows import FORGET, Rows, share
from repedit.auditing.data import reversed_facts, with_entity
from repedit.data import Fact, entity_of
from repedit.fit.overwrite import OverwriteCertificate
from repedit.models.subject import Subject, subject_of
from repedit.unlearning.recipe import UnlearnRecipe
from repedit.unlearning.sampling import paired
from repedit.unlearning.schedule import metric

REGRESSION: Mapping[str, Any] = {"steps": 550, "lr": 1e-3, "beta": 3.0, "vocabulary": 8192}
SOLVED: Mapping[str, Any] = REGRESSION | {"steps": 150, "rows": 384, "retain_rows": 1152, "solved": 2, "lr": 2e-3}
ERASED: Mapping[str, Any] = SOLVED | {"steps": 300, "rows": 768, "retain_rows": 2048, "vocabulary": 24576, "beta": 60.0}
SPELT = (str, str.lower, str.upper)
"""The spellings of which `names_erased` averages rare pieces."""
HIDDEN = 0.15
"""Single trainings end below this direct accuracy, about that of a model that sees the choices alone."""
RARE = 8000
"""Tokens of byte-pair encoding are numbered in the order of merges; names share earlier ones with common words."""
SMALL: Mapping[str, Any] = {"batch_size": 8, "length": 32, "sampler": paired(0.5)}
"""Of recipes of gradient unlearning: 8 rows to forget and 4 to retain a step, so that an edit takes minutes on one core."""
Made = tuple[Subject, dict[str, Any]]


def others(rows: Rows) -> tuple[Fact, ...]:
    """The training half of the domains about other subjects."""
    return seen([fact for name, items in rows.train.items() if name not in (FORGET, "languages") for fact in items])


def places(rows: Rows) -> tuple[Fact, ...]:
    """Those about places."""
    return seen([fact for name in ("cities", "us_cities") for fact in rows.train[name]])


def overwritten(about: Callable[[Rows], tuple[Fact, ...]] = others, **options: Any) -> Callable[[Rows, int], Made]:
    """A value overwrite; only the wordings that training may see are among its contexts."""

    def make(rows: Rows, seed: int) -> Made:
        change = rp.fit.overwrite(
            rows.lm,
            seen(rows.capitals),
            **({"layers": "0-1", "others": about(rows), "seed": seed, "progress": False} | options),
        )
        settings = {key: change.provenance.get(key) for key in ("target", "options", "config", "layers_selected")}
        return rp.apply(change, rows.lm), {"certificate": OverwriteCertificate.of(change).plain()["layers"], **settings}

    return make


def difference(rows: Rows, seed: int) -> Made:
    """Gradient difference until the direct accuracy is at most .15."""
    student, steps = gradient_difference(
        rows.lm, seen(rows.capitals), rows.retain_of([FORGET]), rp.data.prose(), seed=seed,
        until=lambda lm: rows.accuracy(lm, rows.capitals, 0) <= 0.15,
    )  # fmt: skip
    return student, {"steps": steps}


def recipe(name: str, **options: Any) -> Callable[[Rows, int], Made]:
    """A recipe of gradient unlearning; half of the retained facts, and prose, are retained.

    Like gradient difference, a single training ends once the direct accuracy is below .15, asked every 20 steps.
    """

    def make(rows: Rows, seed: int) -> Made:
        kept: dict[str, Any] = {domain: seen(rows.train[domain]) for domain in rows.train if domain != FORGET}

        def direct(lm: Subject) -> float:
            return share(rows.asked(lm, rows.capitals))

        chosen = rp.recipes.by_name(name, **options)
        delta = rp.unlearn(
            rows.lm, recipe=chosen, forget=seen(rows.capitals), retain=kept | {"prose": rp.data.prose()}, seed=seed,
            stop=[metric(direct, below=HIDDEN, every=20)] if isinstance(chosen, UnlearnRecipe) else (), progress=False,
        )  # fmt: skip
        notes = {
            "recipe": name,
            "options": {key: str(value) for key, value in options.items()},
            "steps": len(delta.log),
        }
        return rp.apply(delta, rows.lm), notes | {"stopped": delta.provenance["stopped"]["reason"]}

    return make


def names_erased(**options: Any) -> Callable[[Rows, int], Made]:
    """The embeddings of the tokens of countries and capitals averaged, and the values of early MLPs at the names that are left.

    A name that is written with common tokens keeps them, so what layers 0 and 1 write at its last token is replaced by the
    mean over such names: countries as the facts write them and in lower case, capitals as reverse questions write them.
    """

    def make(rows: Rows, seed: int) -> Made:
        directions = both_directions(rows, seed)
        lm, averaged = averaged_names(rows, directions)
        forward, backward = directions.values()
        left = [
            fact for fact in (*forward, *in_lower_case(forward), *backward)
            if not set(tokens_within(lm, fact.entity)) <= {*averaged[fact.domain]}
        ]  # fmt: skip
        named = {fact.entity.lower() for fact in left}
        retained = [fact for fact in others(rows) if fact.entity.lower() not in named]
        change = rp.fit.overwrite(
            lm, left, layers="0-1", target="mean", method="regression", form="delta", others=retained, seed=seed,
            progress=False, **options,
        )  # fmt: skip
        notes = {"untied": True, "tokens": sum(map(len, averaged.values())), "names overwritten": len(left)}
        settings = {key: change.provenance.get(key) for key in ("target", "options", "config", "layers_selected")}
        return rp.apply(change, lm), notes | {
            "certificate": OverwriteCertificate.of(change).plain()["layers"]
        } | settings

    return make


def names_averaged(rare: int) -> Callable[[Rows, int], Made]:
    """The embeddings of the tokens of countries and capitals averaged, in all spellings; pieces from the number `rare` on."""

    def make(rows: Rows, seed: int) -> Made:
        lm, averaged = averaged_names(rows, both_directions(rows, seed), rare)
        return lm, {"untied": True, "rare": rare, "tokens": sum(map(len, averaged.values()))}

    return make


def averaged_names(
    rows: Rows, directions: Mapping[str, Sequence[Fact]], rare: int = RARE
) -> tuple[Subject, dict[str, list[int]]]:
    """A copy with one embedding for the tokens of all entities of a domain, and these tokens."""
    lm = untied(rows.lm)
    weight, before = lm.model.get_input_embeddings().weight.data, rows.lm.model.get_input_embeddings().weight
    averaged: dict[str, list[int]] = {}
    for domain, facts in directions.items():
        averaged[domain] = name_tokens(lm, [fact.entity for fact in facts], SPELT, rare)
        weight[averaged[domain]] = before[averaged[domain]].mean(0)
    return lm, averaged


def both_directions(rows: Rows, seed: int) -> dict[str, tuple[Fact, ...]]:
    """By domain: the facts, about countries, and their reverse questions, about capitals."""
    backward = [
        replace(fact, entity=known.answer, domain="capitals in reverse")
        for fact, known in zip(reversed_facts(rows.capitals, seed), rows.capitals, strict=True)
    ]
    return {FORGET: seen(rows.capitals), "capitals in reverse": tuple(backward)}


def in_lower_case(facts: Sequence[Fact]) -> tuple[Fact, ...]:
    """The facts with their entities in lower case, under ids of their own."""
    return tuple(
        replace(
            fact, id=f"{fact.id} in lower case", entity=fact.entity.lower(), prompt=texts[0], paraphrases=tuple(texts[1:])
        )
        for fact in facts
        for texts in [[with_entity(replace(fact, prompt=text), str.lower) for text in fact.prompts]]
    )  # fmt: skip


def tokens_within(lm: Subject, name: str) -> list[int]:
    """The tokens of a name within a text."""
    return list(lm.need_tokenizer().encode(f" {name}", add_special_tokens=False))


def names_replaced(target: str, of: Sequence[str] = ("entity",)) -> Callable[[Rows, int], Made]:
    """The embeddings of the tokens of the names: their mean for each, or exchanged in one seeded cycle. No training.

    Input and output embeddings become two matrices, and the output keeps its own: names can still be answers.

    Args:
        target: "mean", "exchange" or "language" (the mean over the names that share an official language; names whose
            language no other has, or whose language is not listed, share one mean).
        of: "entity" for the countries, "answer" for the capitals; each kind has means of its own.
    """

    def make(rows: Rows, seed: int) -> Made:
        groups: list[list[int]] = []
        for kind in of:
            names = [fact.entity if kind == "entity" else fact.answer for fact in rows.capitals]
            tokens = name_tokens(rows.lm, names)
            groups += language_groups(rows, tokens) if target == "language" else [tokens]
        lm = untied(rows.lm)
        weight = lm.model.get_input_embeddings().weight.data
        for number, group in enumerate(groups):
            if target == "exchange":
                order = random.Random(f"{seed}:names:{number}").sample(group, len(group))
                weight[order] = weight[[*order[1:], order[0]]]
            else:
                weight[group] = rows.lm.model.get_input_embeddings().weight[group].mean(0)
        counts = {"tokens": sum(map(len, groups)), "groups": len(groups)}
        return lm, {"target": target, "of": list(of), "untied": True, **counts}

    return make


def language_groups(rows: Rows, tokens: Sequence[int]) -> list[list[int]]:
    """The tokens by the language of the country whose name they are of; a token of several languages is in the group of the rest."""
    spoken = {entity_of(fact): fact.answer for fact in rows.languages}
    members = Counter(spoken[entity_of(fact)] for fact in rows.capitals if entity_of(fact) in spoken)
    languages: dict[int, set[str | None]] = {}
    for fact in rows.capitals:
        language = spoken.get(entity_of(fact))
        for token in name_tokens(rows.lm, [fact.entity]):
            languages.setdefault(token, set()).add(language if language and members[language] > 1 else None)
    groups: dict[str | None, list[int]] = {}
    for token in tokens:
        (language,) = languages[token] if len(languages[token]) == 1 else (None,)
        groups.setdefault(language, []).append(token)
    return list(groups.values())


def name_tokens(
    lm: Subject, names: Iterable[str], spelt: Sequence[Callable[[str], str]] = (str,), rare: int = RARE
) -> list[int]:
    """The tokens that are a whole name, as written within and at the start of a text or in capital letters; rare pieces of
    the spellings `spelt`.
    """
    tokenizer, found = lm.need_tokenizer(), set[int]()
    for name in names:
        pieces = {f"{space}{spell(name)}" for spell in spelt for space in (" ", "")}
        for text in {f" {name.upper()}", name.upper()} | pieces:
            ids = tokenizer.encode(text, add_special_tokens=False)
            if len(ids) == 1 or text in pieces:
                found |= {token for token in ids if len(ids) == 1 or token >= rare}
    return sorted(found)


def untied(lm: Subject) -> Subject:
    """A copy whose input and output embeddings are two matrices."""
    model = copy.deepcopy(lm.model)
    model.config.tie_word_embeddings = False
    model.get_output_embeddings().weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    return subject_of(model, lm.tokenizer)


EDITS: dict[str, Callable[[Rows, int], Made]] = {
    "difference": difference,
    "linear-mean": overwritten(places, target="mean", lam=0.3),
    "exchange": overwritten(target="exchange", method="regression", config=REGRESSION),
    "solved-exchange": overwritten(target="exchange", method="regression", config=SOLVED),
    "solved-mean": overwritten(target="mean", method="regression", config=SOLVED),
    "localized": recipe("localized", **SMALL, layers="0-11", lr=5e-4, steps=80),
    "cir": recipe("cir", **SMALL, steps=80),
    "rep_select": recipe("rep_select", **SMALL, steps=80),
    "mudman": recipe("mudman", **SMALL, steps=80),
    "sam": recipe("small:sam:npo_gdr", **SMALL),
    "undo": recipe("undo", **SMALL, inner="small:npo_gdr", steps=60),
    "layered": recipe("layered", **SMALL, inner="small:npo_gdr", steps=30),
    "block_by_block": recipe("block_by_block", **SMALL, layers="0-11", rounds=2, steps=12, lr=3e-4, repair_steps=20),
    "names-mean": names_replaced("mean"),
    "names-exchange": names_replaced("exchange"),
    "names-language": names_replaced("language"),
    "names-both": names_replaced("mean", of=("entity", "answer")),
    "names-erased": names_erased(config=ERASED),
    "names-4000": names_averaged(4000),
    "names-2000": names_averaged(2000),
    "answers-mean": names_replaced("mean", of=("answer",)),
}
EDITS["original"] = lambda rows, seed: (rows.lm, {})
