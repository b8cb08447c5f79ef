"""Edits of the names of countries and capitals: one embedding for their tokens, one value for what early MLPs write at them."""

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
from bench.removal_rows import FORGET, Rows, others
from repedit.auditing.data import reversed_facts, with_entity
from repedit.data import Fact, entity_of, with_paraphrases
from repedit.data.encoding import prompt_ids
from repedit.fit.overwrite import OverwriteCertificate
from repedit.models.subject import Subject, subject_of

SPELT = (str, str.lower, str.upper)
"""The spellings in which rare pieces of a name are averaged."""
RARE = 8000
"""Tokens of byte-pair encoding are numbered in the order of merges; names share earlier ones with common words."""
RANKS = (16, 48, 128)
Made = tuple[Subject, dict[str, Any]]


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


def names_averaged_in_both(rare: int) -> Callable[[Rows, int], Made]:
    """As `names_averaged`, with one matrix for input and output: no name can be read, and none can be said."""

    def make(rows: Rows, seed: int) -> Made:
        separate, averaged = averaged_names(rows, both_directions(rows, seed), rare)
        model = copy.deepcopy(rows.lm.model)
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(separate.model.get_input_embeddings().weight)
        notes = {"rare": rare, "tokens": sum(map(len, averaged.values()))}
        return subject_of(model, rows.lm.tokenizer), notes

    return make


def names_merged(rows: Rows, seed: int) -> Made:
    """Countries and capitals merged (`rp.fit.merge`); no retained text says a name that another domain is tested on."""
    tested = {fact.entity for items in rows.test.values() for fact in items}
    delta = rp.fit.merge(
        rows.lm,
        seen(rows.capitals),
        answers=True,
        others=others(rows),
        never=tested,
        config={"misspelt": 0},
        seed=seed,
        progress=False,
    )
    return rp.apply(delta, rows.lm), {key: delta.provenance[key] for key in ("config", "certificate", "rows")}


def names_unread(rows: Rows, seed: int) -> Made:
    """As `names_merged`, with the output head of the original: names cannot be read, but said."""
    merged, notes = names_merged(rows, seed)
    lm = untied(merged)
    lm.model.get_output_embeddings().weight.data.copy_(rows.lm.model.get_output_embeddings().weight)
    return lm, notes | {"untied": True}


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


def head_ranks(rows: Rows, lm: Subject, seed: int) -> dict[str, Any]:
    """What the head needs to say the names, and what the same rows tell of them as input embeddings of the original.

    The rows U of the names in the head, less their mean, are replaced by the matrix of rank k that is nearest in the metric of the
    final states, [U C^1/2]_k C^-1/2 with C = E[h h^T] over prose and other facts.
    """
    tokens = sorted({t for own in averaged_names(rows, both_directions(rows, seed), 4000)[1].values() for t in own})
    table = lm.model.get_input_embeddings().weight.detach()
    values, vectors = torch.linalg.eigh(_final_moments(rows, lm))
    root = vectors * values.clamp(min=1e-6 * float(values.max())).sqrt()
    mean = table[tokens].mean(0)
    left, sizes, right = torch.linalg.svd((table[tokens] - mean).double() @ root, full_matrices=False)
    measured: dict[str, Any] = {}
    for rank in RANKS:
        few = ((left[:, :rank] * sizes[:rank]) @ right[:rank] @ torch.linalg.inv(root)).float() + mean
        read, said = untied(lm), untied(lm)
        read.model.get_input_embeddings().weight.data[tokens] = few
        said.model.get_output_embeddings().weight.data[tokens] = few
        asked = rp.facts_accuracy(read, with_paraphrases(rows.capitals, only=[0])).accuracy
        measured[str(rank)] = {"capitals, as input": asked, "domains, as head": rows.keeping(said, [FORGET])}
    return measured


@torch.no_grad()
def _final_moments(rows: Rows, lm: Subject) -> torch.Tensor:
    """E[h h^T] of the states before the head, (d, d)."""
    texts = [f"{prompt} {fact.answer}" for fact in others(rows) for prompt in fact.prompts]
    texts += [document.text[:1500] for document in rp.data.prose().documents]
    tokenizer = lm.need_tokenizer()
    states = [
        lm.model.base_model(torch.tensor([prompt_ids(tokenizer, text)[:256]])).last_hidden_state[0, 1:]
        for text in texts
    ]
    h = torch.cat(states).double()
    return h.T @ h / len(h)


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
