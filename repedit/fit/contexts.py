"""Texts that name the entities of facts, and the hidden states of a model at those names.

An entity is what a fact is about (`Fact.entity`). The value that an early MLP writes at the last token of its name is where
much of what the model knows of it enters the stream.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from repedit.activations.forward import at_least_float32, batches, check_ids, inputs_of
from repedit.data import Batch, Batches, Fact, Facts, Tokens, prose
from repedit.data.corpus import padded
from repedit.data.encoding import entity_span, mention, prompt_ids
from repedit.data.fact_sets import fact_items
from repedit.data.grading import normalized
from repedit.errors import DataError, NotEnoughRows, NotFinite, OverlapError, UnknownName, check_seed, nearest
from repedit.hooks import Hook, evaluating, installed
from repedit.models.subject import Subject

KINDS = ("templates", "wordings", "prose", "written")
"""Where contexts come from: neutral templates; the facts' own wordings; those after a sentence of prose; text that the model
writes about the entity, followed by its name."""
TEMPLATES = (
    "I read about {}", "This is a short text about {}", "We were asked about {}", "The next entry is {}",
    "She had heard of {}", "Everybody in the room knew {}", "It was written on the first page: {}",
    "There is a long article on {}",
)  # fmt: skip
SINK = 10.0
"""A hidden state whose norm exceeds this many medians is an attention sink. Measured sinks exceed hundreds."""
_SENTENCES = 2
_WRITTEN_TOKENS = 24
_ROWS = 32


@dataclass(frozen=True)
class Context:
    """A text that ends in, or contains, the name of an entity."""

    entity: str
    """The normalized name, the same for every spelling."""
    name: str
    """The name as the text writes it."""
    text: str


@dataclass(frozen=True, eq=False)
class EntityTokens:
    """Contexts as tokens; each batch marks the last token of the name in its text, and names the entity of each row."""

    contexts: tuple[Context, ...]
    batches: Tokens
    """The ids of the rows are the numbers of their contexts."""
    names: frozenset[tuple[int, ...]]
    """Token ids of every name as it occurs."""


# --- The contexts of entities


def by_entity(facts: Facts | Iterable[Fact]) -> dict[str, tuple[Fact, ...]]:
    """The facts of each entity, by its normalized name.

    Raises:
        DataError: if there is no fact, or one names no entity.
    """
    items = fact_items(facts)
    if not items:
        raise DataError("there are no facts; give at least one")
    facts_of: dict[str, list[Fact]] = {}
    for fact in items:
        name = normalized(fact.entity)
        if not name:
            raise DataError(f"fact {fact.id!r} names no entity, so there is no token to edit; give the field entity")
        facts_of.setdefault(name, []).append(fact)
    return {name: tuple(part) for name, part in facts_of.items()}


def check_other_entities(others: Sequence[Fact], entities: Iterable[str], change: str, advice: str = "") -> None:
    """Check that facts to retain are about other entities than those to change.

    Args:
        entities: normalized names.
    Raises:
        OverlapError: with the entities that both name.
    """
    shared = sorted(set(by_entity(others)) & set(entities)) if others else []
    if shared:
        raise OverlapError(
            f"others are about {len(shared)} entities that are to be {change}, such as {shared[:3]}; leave those facts out{advice}"
        )


def contexts_of(
    subject: Subject, facts: Facts | Iterable[Fact], kinds: Sequence[str] = ("templates", "wordings"), *, seed: int = 0
) -> tuple[Context, ...]:
    """Texts that name each entity of the facts; see `KINDS`.

    Raises:
        UnknownName: if there is no such kind, or none is given.
        DataError: if a fact has no entity, or no wording of an entity's facts contains its name.
    """
    check_seed(seed=seed)
    for kind in kinds or ("",):
        if kind not in KINDS:
            raise UnknownName(f"contexts={kind!r} do not exist; {nearest(kind, KINDS)}")
    contexts: dict[Context, None] = {}
    for entity, items in by_entity(facts).items():
        names = dict.fromkeys(fact.entity for fact in items)
        wordings = [Context(entity, fact.entity, text) for fact in items for text in fact.prompts]
        named = [context for context in wordings if mention(context.text, context.name) is not None]
        if not named and {"wordings", "prose"} & set(kinds):
            raise DataError(
                f"no wording of the facts about {items[0].entity!r} contains that name, such as {items[0].prompt!r}; correct the "
                "field entity, or use contexts=('templates',)"
            )
        filled = [Context(entity, name, template.format(name)) for name in names for template in TEMPLATES]
        parts = {
            "templates": lambda filled=filled: filled,
            "wordings": lambda named=named: named,
            "prose": lambda named=named: _after_prose(named, seed),
            "written": lambda filled=filled: _written(subject, filled),
        }
        contexts |= dict.fromkeys(context for kind in kinds for context in parts[kind]())
    return tuple(contexts)


def held_out(
    contexts: Sequence[Context], share: float, seed: int = 0
) -> tuple[tuple[Context, ...], tuple[Context, ...]]:
    """The contexts in two parts, the second with about this share of each entity's, and at least one.

    Raises:
        NotEnoughRows: if an entity has fewer than two contexts.
    """
    fitted: list[Context] = []
    held: list[Context] = []
    for entity in dict.fromkeys(context.entity for context in contexts):
        own = [context for context in contexts if context.entity == entity]
        if len(own) < 2:
            raise NotEnoughRows(
                f"entity {entity!r} has one context; give more kinds of them, so that one can be held out"
            )
        random.Random(f"{seed}:{entity}").shuffle(own)
        count = min(max(1, round(share * len(own))), len(own) - 1)
        held += own[:count]
        fitted += own[count:]
    return tuple(fitted), tuple(held)


def entity_tokens(subject: Subject, contexts: Sequence[Context]) -> EntityTokens:
    """The contexts as tokens. A name that ends at the first position is left out: its states are attention sinks.

    Raises:
        DataError: if a text does not contain its name, or every context of an entity ends at the first position.
    """
    tokenizer = subject.need_tokenizer()
    tokenized: list[tuple[Context, list[int], int]] = []
    names: set[tuple[int, ...]] = set()
    for context in contexts:
        span = entity_span(tokenizer, context.text, context.name)
        if span is None:
            raise DataError(
                f"the tokens of {context.name!r} are not in {context.text[:80]!r}; correct the field entity"
            )
        ids = prompt_ids(tokenizer, context.text)
        check_ids(subject, ids, f"the context {context.text[:60]!r}")
        names.add(tuple(ids[span[0] : span[1] + 1]))
        if span[1] > 0:
            tokenized.append((context, ids, span[1]))
    missing = {c.entity for c in contexts} - {c.entity for c, _, _ in tokenized}
    if missing:
        raise DataError(
            f"every context of {min(missing)!r} ends at the first position of its text, where states are attention sinks; add "
            "contexts, such as 'templates'"
        )
    batches_ = [_batch(tokenized[i : i + _ROWS], i) for i in range(0, len(tokenized), _ROWS)]
    return EntityTokens(tuple(c for c, _, _ in tokenized), Tokens(tuple(batches_), "contexts"), frozenset(names))


def name_ends(batch: Batch, names: Iterable[tuple[int, ...]]) -> Bool[Tensor, "b t"]:
    """True where one of the names ends."""
    ids, ends = batch.input_ids, torch.zeros_like(batch.attention_mask)
    for name in names:
        size = len(name)
        if size <= ids.shape[1]:
            ends[:, size - 1 :] |= (ids.unfold(1, size, 1) == torch.tensor(name, device=ids.device)).all(-1)
    return ends


def _after_prose(contexts: Sequence[Context], seed: int) -> list[Context]:
    """The contexts after a few sentences of the built-in prose each."""
    documents = [document.text for document in prose().documents]
    after = []
    for context in contexts:
        text = random.Random(f"{seed}:{context.text}").choice(documents)
        start = ". ".join(text.split(". ")[:_SENTENCES]).rstrip(".")
        after.append(Context(context.entity, context.name, f"{start}.\n\n{context.text}"))
    return after


def _written(subject: Subject, contexts: Sequence[Context]) -> list[Context]:
    texts = subject.generate([context.text for context in contexts], max_new_tokens=_WRITTEN_TOKENS)
    return [
        Context(context.entity, context.name, f"{context.text}{text}\n\n{context.name}")
        for context, text in zip(contexts, texts, strict=True)
    ]


def _batch(rows: Sequence[tuple[Context, list[int], int]], first: int) -> Batch:
    ids, mask = padded(ids for _, ids, _ in rows)
    entity = torch.arange(mask.shape[1]) == torch.tensor([[end] for _, _, end in rows])
    return Batch(ids, mask, tuple(str(first + i) for i in range(len(rows))), entity=entity)


# --- Hidden states at marked positions

Observe = Callable[[Callable[..., None]], list[Hook]]
"""From a function of a tensor to the hooks that call it."""
Count = Callable[[Batch], Bool[Tensor, "b t"]]


def recorded(
    subject: Subject,
    source: Batches,
    count: Count,
    points: Mapping[int, Observe],
    *,
    active: Sequence[Hook] = (),
    progress: bool | None = None,
) -> Iterator[tuple[dict[int, Float[Tensor, "n d"]], Bool[Tensor, "b t"], Batch]]:
    """Batch by batch: the counted rows at each point, the mask that counted them, and the batch.

    Args:
        points: what observes each layer.
        active: hooks that change the model meanwhile.
    """
    rows: dict[int, Tensor] = {}
    mask = torch.empty(0)

    class Seen(Exception):
        """Ends a pass: no later layer is needed."""

    def keep(layer: int) -> Callable[..., None]:
        def visit(x: Tensor, *_: object) -> None:
            rows[layer] = at_least_float32(x.detach().flatten(0, -2)[mask.flatten().to(x.device)]).cpu()
            if not bool(torch.isfinite(rows[layer]).all()):
                raise NotFinite(f"a hidden state of layer {layer} is not finite; load the model in float32?")
            if len(rows) == len(points):
                raise Seen

        return visit

    hooks = [*active, *(hook for layer, observe in points.items() for hook in observe(keep(layer)))]
    read = batches(subject, source, 128, 8, progress, "collect")
    with evaluating(subject.model), installed(subject.model, hooks), torch.no_grad():
        for batch in read:
            mask = count(batch) & batch.attention_mask
            rows.clear()
            with suppress(Seen):
                subject.model.base_model(**inputs_of(batch))
            yield dict(rows), mask, batch


def entity_rows(
    subject: Subject, tokens: EntityTokens, points: Mapping[int, Observe], *, active: Sequence[Hook] = ()
) -> dict[int, Float[Tensor, "n d"]]:
    """The states at the last token of each context's name, in the order of the contexts."""

    def last(batch: Batch) -> Tensor:
        assert batch.entity is not None
        return batch.entity

    parts = [rows for rows, _, _ in recorded(subject, tokens.batches, last, points, active=active, progress=False)]
    return {layer: torch.cat([part[layer] for part in parts]) for layer in points}


def not_sinks(rows: Float[Tensor, "n d"], typical: float | None = None) -> Bool[Tensor, " n"]:
    """False for rows whose norm exceeds `SINK` times the median, or times a typical norm."""
    norms = rows.double().norm(dim=1)
    return norms <= SINK * (float(norms.median()) if typical is None else typical)
