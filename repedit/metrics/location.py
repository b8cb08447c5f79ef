"""Where facts enter the stream: what accuracy is left when an output is ablated at the names of entities, or elsewhere."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from repedit.activations.forward import captured
from repedit.arch import hooks_at
from repedit.arguments import checked
from repedit.data import Fact, Facts, Splits, entity_of, with_paraphrases
from repedit.data.encoding import entity_span
from repedit.data.fact_sets import fact_items
from repedit.errors import ArgumentError, DataError, UnknownName, UnknownSite, check_seed, nearest
from repedit.fit.contexts import by_entity
from repedit.fit.overwrite import goals_of
from repedit.hooks import Hook, installed
from repedit.metrics.facts import choice_scores, choice_tokens, chosen
from repedit.metrics.relearning import Relearning, relearned
from repedit.models.subject import Subject
from repedit.sites import Point, Site

POSITIONS = ("subject_last", "subject_earlier", "last", "elsewhere")
"""The last token of the entity's name; the others of it; the last token of the prompt, unless it is of the name; the rest.
The first position of a prompt, an attention sink, is none of them."""
WHOLE_SUBJECT = "subject"
"""All tokens of the entity's name: "subject_earlier" and "subject_last" together, each kind with values of its own."""
POINTS = ("attn.out", "mlp.out")
HOWS = ("mean", "exchange")
_ROWS = 32


@dataclass(frozen=True)
@checked
class Ablation:
    """What is right with one kind of output ablated at one kind of position in some layers."""

    layers: str
    point: str
    position: str
    accuracy: Mapping[str, float]
    """By set: "facts", "same subjects", "other subjects"; after relearning: "T after relearning", "V after relearning"."""
    touched: Mapping[str, int]
    """Facts of each set whose prompt has such a position."""


@dataclass(frozen=True)
@checked
class Location:
    """The accuracies under every ablation, and those without."""

    rows: tuple[Ablation, ...]
    before: Mapping[str, float]
    counts: Mapping[str, int]
    """Facts in each set."""
    how: str
    seed: int
    model: str
    """Fingerprint of the weights."""

    def table(self) -> tuple[tuple[str, ...], ...]:
        """A header, the accuracies without an ablation, and a row for each ablation, as text."""
        sets = tuple(self.before)
        first = ("-", "-", "none", *(f"{self.before[name]:.3f}" for name in sets))
        body = ((r.layers, r.point, r.position, *(f"{r.accuracy[name]:.3f}" for name in sets)) for r in self.rows)
        return (("layers", "point", "position", *sets), first, *body)

    def to_json(self) -> str:
        """One JSON document with all fields."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @checked
    def grid(self, on: str = "facts") -> tuple[list[str], list[str], list[list[float]]]:
        """(layers, "point at position", accuracies on a set by layers and the rest).

        Raises:
            UnknownName: if there is no such set.
        """
        if on not in self.before:
            raise UnknownName(f"on={on!r} was not measured; {nearest(on, self.before)}")
        layers = list(dict.fromkeys(row.layers for row in self.rows))
        columns = list(dict.fromkeys(f"{row.point} at {row.position}" for row in self.rows))
        cells = {(row.layers, f"{row.point} at {row.position}"): row.accuracy[on] for row in self.rows}
        return layers, columns, [[cells[layer, column] for column in columns] for layer in layers]


@checked
def locate(
    subject: Subject,
    facts: Facts | Iterable[Fact],
    *,
    against: Iterable[Fact] = (),
    layers: str | Sequence[str] = "*",
    positions: Sequence[str] = POSITIONS,
    points: Sequence[str] = POINTS,
    how: str = "mean",
    seed: int = 0,
    relearning: Relearning | None = None,
) -> Location:
    """Accuracy on facts when what attention or MLPs add is ablated at some positions of the prompts, layers together.

    "mean" replaces the output by its mean over the entities of a domain at that kind of position, in the unedited
    model; "exchange" by that of another entity, counted from the end of the positions of that kind, which keeps its
    statistics. Choices are then compared on top of the ablated prompt, as in `facts_accuracy`.

    With `relearning`, a copy of the model is trained on half of the facts (T) for every ablation, and once without any,
    with the ablation held at the same values in every prompt it reads; the other half (V) is then asked, ablated as well.
    What V gains is knowledge that reaches the answers past the ablated outputs.

    Args:
        facts: facts with choices whose prompts contain their entity.
        against: other facts, reported apart for those about the same entities and about others.
        layers: "*" for each layer alone, or ranges such as "0-11,2-11,5", each ablated as a whole.
        positions: see `POSITIONS`; "subject" is all tokens of the entity's name.
        points: "attn.out", "mlp.out".
        how: "mean" or "exchange".
        seed: of the exchange.
        relearning: how each copy is trained; None for no training. It needs how="mean", and takes minutes for each ablation.
    Raises:
        ArgumentError: if there is `relearning` and `how` is not "mean".
        DataError: if a fact names no entity or has no choices, or a prompt or trained wording does not contain its entity.
        NotEnoughRows: if a domain has fewer than 3 entities.
        UnknownName, UnknownSite: if a position, point, way or layer does not exist.
        NotFinite: if a log-probability is not finite.
    """
    check_seed(seed=seed)
    known_positions = (*POSITIONS, WHOLE_SUBJECT)
    for name, values, valid in (
        ("positions", positions, known_positions), ("points", points, POINTS), ("how", (how,), HOWS),
    ):  # fmt: skip
        for value in values or ("",):
            if value not in valid:
                raise UnknownName(f"{name}={value!r} does not exist; {nearest(value, valid)}")
    if relearning is not None and how != "mean":
        raise ArgumentError(f'how={how!r} with relearning; only values of "mean" can be held in every wording')
    spans = _spans(subject, layers, points)
    items = fact_items(facts)
    own, rest = set(by_entity(items)), tuple(against)
    sets = {
        "facts": items,
        "same subjects": tuple(fact for fact in rest if entity_of(fact) in own),
        "other subjects": tuple(fact for fact in rest if entity_of(fact) not in own),
    }
    sites = sorted({Site(layer, Point(point)) for part in spans.values() for layer in part for point in points})
    measured = {name: _Prompts(subject, part, sites, how, seed) for name, part in sets.items() if part}
    counts = {name: len(prompts.items) for name, prompts in measured.items()}
    held = None if relearning is None else _Held(subject, items, measured["facts"], relearning)

    def accuracies(ablated: Sequence[Site], position: str) -> dict[str, float]:
        plain = {name: prompts.accuracy(ablated, position) for name, prompts in measured.items()}
        return plain if held is None else plain | held.accuracies(ablated, position)

    def touched(position: str) -> dict[str, int]:
        counts = {name: prompts.touched(position) for name, prompts in measured.items()}
        return counts if held is None else counts | {name: part.touched(position) for name, part in held.halves.items()}

    rows = tuple(
        Ablation(
            name, point, position, accuracies([Site(layer, Point(point)) for layer in span], position), touched(position)
        )
        for name, span in spans.items() for point in points for position in positions
    )  # fmt: skip
    counts |= {} if held is None else {name: len(part.items) for name, part in held.halves.items()}
    return Location(rows, accuracies((), POSITIONS[0]), counts, how, seed, subject.fingerprint())


def _spans(subject: Subject, layers: str | Sequence[str], points: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Name -> layers, all of which have every point."""
    texts = [layers] if isinstance(layers, str) else layers
    names = [part.strip() for text in texts for part in text.split(",")]
    if not names:
        raise ArgumentError("layers names none; give '*' or ranges such as '0-11'")
    if any("." in name for name in names):
        raise UnknownSite(f"layers={layers!r}; give layers alone, such as '0-11', and points apart")
    layers_of: dict[str, tuple[int, ...]] = {}
    for name in names:
        sites = subject.select([f"{name}.{point}" for point in points])
        numbers = tuple(dict.fromkeys(site.layer for site in sites))
        layers_of |= {str(number): (number,) for number in numbers} if name == "*" else {name: numbers}
    return layers_of


class _Prompts:
    """The prompts of a set of facts: the kind of each position, and what is written there in the unedited model."""

    def __init__(self, subject: Subject, items: Sequence[Fact], sites: Sequence[Site], how: str, seed: int) -> None:
        self.subject, self.items, self.how = subject, items, how
        bare = next((fact.id for fact in items if not fact.choices), None)
        if bare is not None:
            raise DataError(f"fact {bare!r} has no choices; give some, such as rp.data.with_choices does")
        by_entity(items)
        pairs = [_kinds(subject, fact) for fact in items]
        self.ids, self.kinds = [ids for ids, _ in pairs], [kinds for _, kinds in pairs]
        self.donors = _donors(items, seed)
        self.means: dict[tuple[Site, str, int], Tensor] = {}
        """By site, domain and kind."""
        self.states: dict[tuple[Site, int, int], Tensor] = {}
        """By site, fact and kind; for an exchange alone."""
        self._collect(sites)

    def part(self, entities: frozenset[str]) -> _Prompts:
        """The prompts about some entities, with the values of all."""
        chosen = copy.copy(self)
        numbers = [i for i, fact in enumerate(self.items) if entity_of(fact) in entities]
        chosen.items = [self.items[i] for i in numbers]
        chosen.ids, chosen.kinds = [self.ids[i] for i in numbers], [self.kinds[i] for i in numbers]
        return chosen

    def touched(self, position: str) -> int:
        """The number of facts that have such a position."""
        return sum(any(bool((kinds == kind).any()) for kind in _kinds_of(position)) for kinds in self.kinds)

    def accuracy(self, sites: Sequence[Site], position: str, student: Subject | None = None) -> float:
        """Share of right answers with the outputs at some sites replaced, in the model or a trained copy of it."""
        asked = student or self.subject

        def ablated(part: Sequence[int]) -> AbstractContextManager[None]:
            return installed(asked.model, self._hooks(sites, position, part, student))

        options = [fact.choices for fact in self.items]
        scores = choice_scores(asked, self.items, options, _ROWS, prompts=ablated)
        right = chosen(self.items, options, [summed for summed, _ in scores])
        return sum(right) / len(right)

    def _collect(self, sites: Sequence[Site]) -> None:
        if not sites:
            return
        totals: dict[tuple[Site, str, int], list[Tensor]] = {}
        for part, captures in captured(self.subject, self.ids, sites):
            for site, rows in captures.items():
                for row, i in enumerate(part):
                    for kind in range(len(POSITIONS)):
                        states = rows[row][self.kinds[i] == kind]
                        if len(states):
                            totals.setdefault((site, self.items[i].domain, kind), []).append(states)
                            if self.how == "exchange":
                                self.states[site, i, kind] = states
        self.means = {key: torch.cat(parts).double().mean(0) for key, parts in totals.items()}

    def _hooks(
        self,
        sites: Sequence[Site],
        position: str,
        part: Sequence[int],
        student: Subject | None = None,
        width: int | None = None,
    ) -> list[Hook]:
        """Hooks that replace the outputs at some positions of these prompts.

        Args:
            width: of a batch in which more tokens follow the prompts; None if all prompts have one length and nothing follows.
        """
        width = len(self.ids[part[0]]) if width is None else width
        kinds = _kinds_of(position)
        mask = torch.stack([torch.isin(_filled(self.kinds[i], width), torch.tensor(kinds)) for i in part])
        if not bool(mask.any()):
            return []

        def replaced(site: Site) -> Callable[..., Tensor]:
            new = torch.cat(
                [self._replacement(site, i, kind) for i in part for kind in kinds if (self.kinds[i] == kind).any()]
            )

            def visit(x: Tensor, *_: object) -> Tensor:
                rows = x.reshape(-1, x.shape[-1]).clone()
                rows[mask.flatten().to(x.device)] = new.to(rows)
                return rows.reshape(x.shape)

            return visit

        model, layout = (student or self.subject).model, self.subject.layout
        return [hook for s in sites for hook in hooks_at(model, layout, s, replaced(s), replaces=True)]

    def _replacement(self, site: Site, number: int, kind: int) -> Float[Tensor, "n d"]:
        """What replaces the outputs at one kind of position of a prompt."""
        count = int((self.kinds[number] == kind).sum())
        fact = self.items[number]
        mean = self.means.get((site, fact.domain, kind))
        if mean is None:  # of a wording that is trained on
            raise DataError(
                f"fact {fact.id!r}: {fact.prompt!r} has a token {POSITIONS[kind]!r}, and no first wording of domain "
                f"{fact.domain!r} has one whose mean could be held; leave out this position or this wording"
            )
        donor = self.states.get((site, self.donors[number], kind)) if self.how == "exchange" else None
        if donor is None:  # for an exchange: the other prompt has no such position
            return mean.expand(count, -1)
        order = [max(len(donor) - 1 - back, 0) for back in range(count)][::-1]
        return donor[order].double()


class _Held:
    """The halves of the facts, and copies of the model that learn one of them with an ablation held."""

    def __init__(self, subject: Subject, items: Sequence[Fact], asked: _Prompts, relearning: Relearning) -> None:
        self.subject, self.relearning = subject, relearning
        split = Splits.of(items, seed=relearning.split)
        by_entity(with_paraphrases(split.train))
        self.halves = {
            f"{side} after relearning": asked.part(frozenset(entity_of(fact) for fact in part))
            for side, part in (("T", split.train), ("V", split.test))
        }
        self.taught = _Prompts(subject, with_paraphrases(split.train), (), asked.how, 0)
        self.taught.means = asked.means  # the values that are held are those that replace the outputs of asked prompts

    def accuracies(self, sites: Sequence[Site], position: str) -> dict[str, float]:
        """Share of right answers in both halves, after training and with the outputs at some sites still replaced."""

        def ablated(student: Subject, part: Sequence[int], width: int) -> list[Hook]:
            return self.taught._hooks(sites, position, part, student, width)

        student = relearned(self.subject, self.taught.items, ablated, self.relearning)
        return {name: prompts.accuracy(sites, position, student) for name, prompts in self.halves.items()}


def _kinds_of(position: str) -> tuple[int, ...]:
    """The kinds of token that a position stands for, in the order in which they follow each other in a prompt."""
    names = ("subject_earlier", "subject_last") if position == WHOLE_SUBJECT else (position,)
    return tuple(map(POSITIONS.index, names))


def _filled(kinds: Int[Tensor, " t"], width: int) -> Int[Tensor, " w"]:
    """Kinds of the tokens of a row: none behind the prompt."""
    return torch.cat([kinds, kinds.new_full((width - len(kinds),), -1)])


def _kinds(subject: Subject, fact: Fact) -> tuple[list[int], Int[Tensor, " t"]]:
    """(token ids of the prompt, index of each position's kind; -1 at the first)."""
    tokenizer = subject.need_tokenizer()
    ids, _ = choice_tokens(tokenizer, fact, fact.choices)
    span = entity_span(tokenizer, fact.prompt, fact.entity)
    if span is None or span[1] >= len(ids):
        raise DataError(f"fact {fact.id!r}: the tokens of {fact.entity!r} are not in the prompt {fact.prompt!r}")
    kinds = torch.full((len(ids),), POSITIONS.index("elsewhere"))
    kinds[-1] = POSITIONS.index("last")
    kinds[span[0] : span[1]] = POSITIONS.index("subject_earlier")
    kinds[span[1]] = POSITIONS.index("subject_last")
    kinds[0] = -1
    return ids, kinds


def _donors(items: Sequence[Fact], seed: int) -> list[int]:
    """For each fact the number of a fact of its domain about another entity."""
    first: dict[tuple[str, str], int] = {}
    for number, fact in enumerate(items):
        first.setdefault((fact.domain, entity_of(fact)), number)
    goals = {
        domain: goals_of([f for f in items if f.domain == domain], "exchange", seed)
        for domain in {f.domain for f in items}
    }
    return [first[fact.domain, goals[fact.domain][entity_of(fact)][0]] for fact in items]
