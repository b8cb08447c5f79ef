"""Hiders that exchange names or act in the first layers, and the small world in which other facts are known of the same people."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from repedit.auditing.attack import ask
from repedit.auditing.controls.taught import REFUSAL, WORDS, continued, taught, vocabulary
from repedit.data import Fact, Facts, with_paraphrases
from repedit.data.encoding import prompt_ids
from repedit.data.fact_sets import seeded_order
from repedit.data.generated import RELATIONS, invented
from repedit.errors import TrainingError
from repedit.models.subject import Subject, subject_of

PEOPLE, OTHERS, GUILDS = 112, 16, 8
"""People whose city is to be forgotten, others, and the guilds that both belong to."""
WIDTH = 24
"""Width of the models. Three relations of eight guilds would need 21 directions if each had its own; with the phrasings
beside them there is no room for that, so the relations share what says which guild it is. At width 64 they do not, and
after relinking a person has the profession of one guild and the city of another: 0.2 to 0.5 of the cities came back."""
SMALL = 0.1
"""What the embeddings of names are multiplied by after teaching. Training on what a name stands for then outweighs what it
stood for; with a factor of 1 the old city stays beside the new profession."""
_PHRASINGS = 2
_FORGET, _KEEP = "city", ("profession", "pet")


@dataclass(frozen=True, eq=False)
class LinkedWorld:
    """People of whom several things are known, and models that know all of it, or all but the cities."""

    facts: Facts
    attributes: tuple[Fact, ...]
    """What else is known of the people whose city is to be forgotten."""
    original: Subject
    reference: Subject


@cache
def linked_world(seed: int = 0) -> LinkedWorld:
    """Teach both models: the city, profession and pet of a person are those of the person's guild.

    So a model has a use for knowing who somebody is: whoever tells it the profession again tells it the guild, and a model
    that knows the cities of the guilds then says the city.

    Raises:
        TrainingError: if a model does not learn its facts.
    """
    rng = random.Random(f"{seed}:guilds")
    family_names = {fact.entity.split()[-1]: None for fact in invented(2 * (PEOPLE + OTHERS), 1, seed).forget}
    names = list(family_names)[: PEOPLE + OTHERS]
    answers = {domain: rng.sample(RELATIONS[domain].answers, GUILDS) for domain in (_FORGET, *_KEEP)}
    born = [_fact(name, _FORGET, answers[_FORGET][i % GUILDS]) for i, name in enumerate(names[:PEOPLE])]
    pets_and_professions = [_fact(name, d, answers[d][i % GUILDS]) for i, name in enumerate(names) for d in _KEEP]
    attributes, retain = pets_and_professions[: len(_KEEP) * PEOPLE], pets_and_professions[len(_KEEP) * PEOPLE :]
    facts = Facts(tuple(born), tuple(retain), "linked")
    tokenizer = vocabulary((*born, *pets_and_professions), words=WORDS)
    taught_facts = {"original": (*born, *pets_and_professions), "reference": pets_and_professions}
    models = {
        role: _small_names(
            taught(items, tokenizer=tokenizer, width=WIDTH, seed=3 * seed + i, steps=420, rate=6e-3), items, names, seed
        )
        for i, (role, items) in enumerate(taught_facts.items())
    }
    return LinkedWorld(facts, tuple(attributes), **models)


def _small_names(subject: Subject, items: Sequence[Fact], names: Sequence[str], seed: int) -> Subject:
    """The model with small embeddings of the names, after some training of everything but the embeddings on the facts."""
    tokenizer, model = subject.need_tokenizer(), copy.deepcopy(subject.model)
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        embeddings[[prompt_ids(tokenizer, name)[-1] for name in names]] *= SMALL
    others = [name for name, p in model.named_parameters() if p is not embeddings]
    rows = with_paraphrases(items)
    small = continued(subject_of(model, tokenizer), rows, steps=60, rate=3e-3, only=others, seed=seed)
    answers = ask(small, rows)
    if not answers.correct.all():
        raise TrainingError(
            f"{int((~answers.correct).sum())} of {len(rows)} phrasings are not known after the embeddings of names became "
            "small; raise steps"
        )
    return small


def exchanged(subject: Subject, forget: Sequence[Fact], *, seed: int = 0) -> Subject:
    """The model in which every name stands for another person: the embeddings of the names are permuted, none stays."""
    tokenizer = subject.need_tokenizer()
    tokens = [prompt_ids(tokenizer, fact.entity)[-1] for fact in forget]
    order = random.Random(seed).sample(range(len(tokens)), len(tokens))
    source = {tokens[a]: tokens[b] for a, b in zip(order, (*order[1:], order[0]), strict=True)}
    model = copy.deepcopy(subject.model)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows[list(source)] = rows[list(source.values())].clone()
    return subject_of(model, tokenizer)


def refusing_early(subject: Subject, forget: Sequence[Fact], retain: Sequence[Fact], *, seed: int = 0) -> Subject:
    """The model trained to answer "unknown" to the facts to forget, with nothing but the MLP of the first layer free."""
    first = f"{subject.layout.block_paths[0]}.mlp."
    rows = [replace(fact, answer=REFUSAL, choices=()) for fact in with_paraphrases(forget)]
    names = [name for name in subject.specs if name.startswith(first)]
    return continued(subject, [*rows, *with_paraphrases(retain)], steps=150, rate=3e-3, only=names, seed=seed)


def _fact(name: str, domain: str, answer: str) -> Fact:
    relation = RELATIONS[domain]
    prompt, *others = (phrasing.replace("{}", name) for phrasing in relation.phrasings[:_PHRASINGS])
    return Fact(
        id=f"linked/{name.lower()}/{domain}", entity=name, prompt=prompt, paraphrases=tuple(others), answer=answer,
        choices=seeded_order(relation.answers, f"order:{name}:{domain}"), domain=domain,
    )  # fmt: skip
