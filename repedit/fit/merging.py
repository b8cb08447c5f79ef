"""Merged entities: a model is changed so that it makes the same of every name, whichever entity it is of, and says none of them.

What later layers know of an entity they reach through its name. Where all names are one to the first blocks, training finds
nothing to bring back by: facts that are taught again are learnt for all entities at once. Names go from the output head as
well, because its rows can be copied to the input embeddings. The price is everything that the model knows of these
entities, every answer that is one of their names, and words that share tokens with them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from repedit.activations.forward import at_least_float32, batches_of, check_ids, inputs_of, max_positions
from repedit.arch.offload import check_in_memory
from repedit.arguments import checked, with_changes
from repedit.data import Batch, Batches, Fact, Facts, TextSource, prose, with_paraphrases
from repedit.data.corpus import padded
from repedit.data.encoding import entity_span, mentions, prompt_ids
from repedit.data.fact_sets import fact_items
from repedit.data.generated import SPELLINGS, lower_case
from repedit.data.grading import normalized
from repedit.delta import Delta
from repedit.errors import (
    ArgumentError,
    DataError,
    NotEnoughRows,
    NotFoldable,
    SelectionError,
    TrainingError,
    check_positive,
    check_seed,
    check_whole,
)
from repedit.fit.contexts import TEMPLATES, Context, by_entity, check_other_entities, contexts_of
from repedit.hashing import value_hash
from repedit.hooks import Hook, check_differentiable, evaluating, installed
from repedit.models.subject import Subject, shared_clone
from repedit.sites import Point
from repedit.training.optimizers import linear_decay, set_lr
from repedit.training.sampler import training_rows

OPENINGS = (
    "{} is", "{} was one of", "{} has a", "{} and", "{}, which", "{}: the", "{} is known for", "{} will be", "{} has always been the",
)  # fmt: skip
"""Texts that begin with a name. There it is often written with other tokens than within a text."""
CASES: tuple[Callable[[str], str], ...] = (str, lower_case, str.upper)
MISSPELLINGS = tuple(SPELLINGS[name] for name in ("letters swapped", "letter doubled"))
"""How names are misspelt in rows; letters left out are kept for the audit."""
NAME_STARTS = (
    "The city of", "The town of", "He was born in the city of", "The village of", "They moved to the city of", "The river",
    "The province of", "The port city of", "The mountain", "The island of", "She studied in the city of",
    "The football club of the city of", "A train leaves for the city of", "The lake", "The region of", "The emperor",
    "The football player", "The composer", "The writer", "The company",
)  # fmt: skip
"""After which the model writes names to retain."""
SENTENCE_STARTS = (
    "The", "In", "A", "It", "When", "This", "She", "He", "They", "On the", "For", "After", "Many", "One of the", "There",
    "We", "How", "If", "What is", "First", "During the", "As", "According to", "Some", "People in", "To",
)  # fmt: skip
"""After which it writes sentences to retain."""
_NAME = re.compile(r" ((?:[A-Z][\w'\u2019-]+)(?: (?:de |of |del |la )?[A-Z][\w'\u2019-]+){0,2})(?=[ ,.])")
_LONGEST, _SHORT = 40, 13
_NAME_TOKENS, _SENTENCE_TOKENS = 7, 36
_DECAY, _RISE = 0.4, 20
_HELD = 20
_FEWEST = 3
_ROWS = 64


@dataclass(frozen=True)
@checked
class Merging:
    """Settings of `merge`."""

    blocks: int = 3
    """How many of the first blocks are trained."""
    rare: int = 4000
    """Tokens of a name from this number on are averaged. Vocabularies of byte-pair encoding are numbered by frequency, so
    that a lower number reaches more names, and more words that share a token with one."""
    steps: int = 360
    lr: float = 3e-4
    """Of AdamW; it rises over 20 steps and falls to 0 over the last 40 %."""
    beta: float = 10.0
    """Weight of what is retained."""
    named: int = 32
    """Rows with a name in a step."""
    misspelt: int = 2
    """Rows in which a name has letters swapped or doubled, beside each three in its own letters, small and capital ones."""
    retained: int = 64
    """Retained rows in a step, three quarters of them short."""
    written_names: int = 96
    """Texts that the model writes after each of `NAME_STARTS`, whose names are retained; 0 for none."""
    written_sentences: int = 20
    """Sentences that it writes after each of `SENTENCE_STARTS`; 0 for none."""

    def __post_init__(self) -> None:
        check_whole(blocks=self.blocks, steps=self.steps, named=self.named, retained=self.retained)
        check_whole(
            0,
            rare=self.rare,
            misspelt=self.misspelt,
            written_names=self.written_names,
            written_sentences=self.written_sentences,
        )
        check_positive(lr=self.lr, beta=self.beta)

    @staticmethod
    @checked
    def of(config: Merging | Mapping[str, object] | None) -> Merging:
        """The settings, or the default ones with some of them changed.

        Raises:
            UnknownName: if there is no such setting. ArgumentError: if one is out of range.
        """
        return with_changes(Merging(), config)


@dataclass(frozen=True)
@checked
class MergeCertificate:
    """How far names are merged, and what else moved, on texts that the training did not use."""

    left: float
    """Sum of the variances over names of the stream at their last token, after over before; 0 where all are one."""
    distortion: float
    """Root mean square change of the stream at retained text over its spread."""
    tokens: int
    """Whose embeddings were averaged."""
    names: int
    losses: Mapping[str, float]
    """Means over the last 20 steps, in units of the spread of the stream: "names" and "retained"."""
    left_out: int = 0
    """Texts with a name that were not trained on, because the name is said more than once or not as one word in them."""

    @staticmethod
    @checked
    def of(delta: Delta) -> MergeCertificate:
        """The certificate of a delta that `merge` made.

        Raises:
            ArgumentError: if something else made it.
        """
        if delta.provenance.get("method") != "merge":
            raise ArgumentError(f"{delta!r} was not made by fit.merge, so it records no certificate")
        return MergeCertificate(**delta.provenance["certificate"])

    def describe(self) -> str:
        """A line, and what the numbers do not say."""
        skipped = (
            f"{self.left_out} texts say a name more than once or inside a word and were left out\n"
            if self.left_out
            else ""
        )
        return (
            f"{self.names} names, {self.tokens} tokens averaged: {self.left:.1%} of the differences between names are left in the "
            f"stream, retained text moves by {self.distortion:.3g} of its spread\n{skipped}"
            "This says nothing of other spellings and wordings, or of what training brings back: attack it."
        )

    def plain(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


# --- The fit


@checked
def merge(
    subject: Subject,
    facts: Facts | Iterable[Fact],
    *,
    answers: bool = False,
    others: Iterable[Fact] = (),
    retain: TextSource | None = None,
    never: Iterable[str] = (),
    config: Merging | Mapping[str, object] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Delta:
    """Make the first blocks of a model the same for every name of a domain, by training on the residual stream after them.

    First the embeddings of the tokens of all names of a domain are replaced by their mean in the input and in the output, names
    in capital letters and in lower case included. Names of common tokens can still be read, and other words lost a token. So
    the matrices of the first blocks minimise, over the stream h (b, t, d) after them,
    E_names ||h - h_one||^2 / s + beta E_retained ||h - h_0||^2 / s. h_one is the stream of the averaged model with one
    averaged token in place of the name, at the name and after it; h_0 that of the original model; s the median of
    ||h_0 - mean||^2. Where a state is more than twice as long as usual (attention sinks) its error counts in its own units.
    No answer and no output of the model takes part.

    Everything that the model knows of these entities goes, not only the facts, and so do facts about others whose answers are
    these names. What is retained is running text, `others`, and names and sentences that the model itself writes; rows that
    name an entity to merge are left out.

    Args:
        facts: what to forget; their entities and wordings are used. Each domain has a name of its own in the end.
        answers: merge the answers as well, so that questions the other way round ("Paris is the capital of") find
            nothing. Only for answers that are names: everything known of them goes too.
        others: facts about other entities, which are retained.
        retain: running text, rows or facts to retain; the built-in prose by default.
        never: names that no retained text that the model writes may say, such as those of a test.
        config: settings.
    Returns:
        A Delta with its certificate in the provenance; see `MergeCertificate.of`.
    Raises:
        DataError: if a fact has no entity, its wordings do not contain it, or a name is also a word of the templates.
        NotEnoughRows: if a domain has fewer than 3 names, no token of it is averaged, or nothing is retained.
        OverlapError: if `others` are about an entity to merge.
        ArgumentError: if a setting is out of range, or `never` is one name. SelectionError: if the model has no such number of
            blocks. TrainingError: if the loss is not finite.
        NotFoldable: if input embeddings are no single matrix. QuantizedModel, OffloadedTensors: if they cannot be trained.
    Reference: the averaging and the training are ours; docs/removal.md has what attacks find.
    """
    settings = Merging.of(config)
    check_seed(seed=seed)
    if isinstance(never, str):
        raise ArgumentError(f"never={never!r}: a str was given where a list of names is needed; give [{never!r}]")
    items, rest = fact_items(facts), tuple(others)
    _check(subject, items, rest, settings)
    wordings = contexts_of(subject, items, ("wordings",))
    groups = _groups(items, answers)
    averaged = _averaged_tokens(subject, groups, settings.rare)
    named = _named_rows(subject, groups, averaged, wordings, settings.misspelt, seed)
    names = {name for group in groups.values() for name in group}
    retained = _retained_rows(subject, names, rest, retain, set(never), settings, seed)
    models = _Models.of(subject, averaged, settings)
    with evaluating(subject.model):
        losses = _train(models, named.fitted, retained.fitted, settings, seed, progress)
        left, distortion = _left_over(models, named.held), _distortion(models, retained.held)
    certificate = MergeCertificate(
        left, distortion, sum(len(group.own) for group in averaged.values()), len(names), losses, named.left_out
    )
    differences = models.differences()
    return Delta(
        differences,
        {
            "method": "merge", "config": asdict(settings), "answers": answers, "seed": seed, "certificate": certificate.plain(),
            "rows": {"named": len(named.fitted), "retained": len(retained.fitted)}, "model": subject.fingerprint(),
            "start": {name: value_hash(subject.value(name)) for name in differences},
            "versions": {name: version(name) for name in ("repedit", "torch", "transformers")},
        },
    )  # fmt: skip


def _check(subject: Subject, items: Sequence[Fact], others: Sequence[Fact], settings: Merging) -> None:
    """Refuse a model, facts or settings of which no merge can be made."""
    subject.check_unquantized("trained")
    check_in_memory(subject.model, "load the model without a device_map")
    check_differentiable(subject.model)
    depth = len(subject.layout.layers)
    if settings.blocks > depth:
        raise SelectionError(f"blocks={settings.blocks}; the model has {depth}")
    if subject.model.get_input_embeddings().weight is not subject.model.get_parameter(subject.layout.embeddings[0]):
        raise NotFoldable("the input embeddings are no single matrix, so that none of their rows can be averaged")
    if any(branch.outer is Point.PLE_OUT for branches in subject.layout.layers for branch in branches):
        raise NotFoldable(
            "every layer of this model reads embeddings of the token's number, so that a name can be told from others after the first "
            "blocks too; use rp.fit.overwrite or rp.mrp"
        )
    check_other_entities(others, by_entity(items), "merged")


# --- Names, and their tokens


def _groups(items: Sequence[Fact], answers: bool) -> dict[str, tuple[str, ...]]:
    """The names by what they become one of: the entities of each domain, and its answers; a name is in one group.

    Raises:
        NotEnoughRows: if a group has fewer than 3 names.
    """
    groups: dict[str, dict[str, None]] = {}
    for fact in items:
        groups.setdefault(f"{fact.domain}: entities", {})[fact.entity] = None
    entities = {normalized(fact.entity) for fact in items}
    for fact in items if answers else ():
        if normalized(fact.answer) not in entities:
            groups.setdefault(f"{fact.domain}: answers", {})[fact.answer] = None
    for kind, group in groups.items():
        if len(group) < _FEWEST:
            raise NotEnoughRows(
                f"{kind}: {len(group)} names; one name for fewer than {_FEWEST} says which entity is meant"
            )
    return {kind: tuple(group) for kind, group in groups.items()}


def name_tokens(subject: Subject, names: Iterable[str], rare: int) -> tuple[int, ...]:
    """The tokens that are a whole name, within a text or at its start, and those from the number `rare` on that are a part of one."""
    tokenizer, tokens = subject.need_tokenizer(), set[int]()
    for name in (spell(name) for name in names for spell in CASES):
        for template in (TEMPLATES[0], OPENINGS[0]):
            text = template.format(name)
            span = entity_span(tokenizer, text, name)
            ids = [] if span is None else prompt_ids(tokenizer, text)[span[0] : span[1] + 1]
            tokens |= {token for token in ids if len(ids) == 1 or token >= rare}
    return tuple(sorted(tokens - set(getattr(tokenizer, "all_special_ids", ()))))


class _Tokens(NamedTuple):
    """The tokens whose embeddings become one, and the token that stands for every name of the group."""

    own: tuple[int, ...]
    one: int


def _averaged_tokens(subject: Subject, groups: Mapping[str, Sequence[str]], rare: int) -> dict[str, _Tokens]:
    """The tokens of each group; one that two groups use is averaged with the first.

    Raises:
        NotEnoughRows: if a group has none.
    """
    averaged: dict[str, _Tokens] = {}
    for kind, names in groups.items():
        tokens = name_tokens(subject, names, rare)
        if not tokens:
            raise NotEnoughRows(
                f"{kind}: no name is one token, and none has a token from the number rare={rare} on, so that nothing can stand for all of "
                "them; lower rare"
            )
        own = tuple(sorted({*tokens}.difference(*(other.own for other in averaged.values()))))
        averaged[kind] = _Tokens(own, (own or tokens)[0])
    return averaged


# --- Rows


class _Named(NamedTuple):
    """A text that holds a name, and one with averaged tokens in its place."""

    name: str
    ids: list[int]
    one: list[int]
    start: int
    """The first token of the name in `ids`."""
    want: list[int]
    """For every token from there on, the index in `one` of the state that it should have."""
    end: int
    kind: str


class _Split(NamedTuple):
    """Rows that the training uses, and others for the certificate."""

    fitted: list[Any]
    held: list[Any]
    left_out: int = 0


def _named_rows(
    subject: Subject,
    groups: Mapping[str, Sequence[str]],
    averaged: Mapping[str, _Tokens],
    wordings: Sequence[Context],
    misspelt: int,
    seed: int,
) -> _Split:
    """Every name in all spellings in neutral templates, at the start of texts, and entities in their facts' wordings.

    The last template is held out.

    Raises:
        DataError: if a name has no row to train on, or none that is held out.
    """
    split, left_out = _Split([], []), 0
    for kind, names in groups.items():
        texts = [(name, template.format(name)) for name in names for template in (*OPENINGS, *TEMPLATES)]
        own = sorted({(context.name, context.text) for context in wordings if context.name in set(names)})
        for name, text in (*texts, *(own if kind.endswith("entities") else ())):
            held = text == TEMPLATES[-1].format(name)
            wrong = _misspellings(0 if held else misspelt, f"{seed}:{text}")
            for spell in CASES[:1] if held else (*CASES, *wrong):
                row = _named(subject, text, name, spell, averaged[kind].one, kind)
                left_out += row is None
                if row is not None:
                    (split.held if held else split.fitted).append(row)
    said = [{row.name for row in rows} for rows in (split.fitted, split.held)]
    unsaid = sorted({name for names in groups.values() for name in names} - (said[0] & said[1]))
    if unsaid:
        raise DataError(
            f"{len(unsaid)} names cannot be told from the words around them, such as {unsaid[:3]}: a text such as "
            f"{TEMPLATES[-1].format(unsaid[0])!r} says them more than once or not at all; correct the field entity, or leave those facts out"
        )
    return split._replace(left_out=left_out)


def _misspellings(count: int, key: str) -> list[Callable[[str], str]]:
    """Ways to misspell a name, drawn by the key."""
    rng = random.Random(key)

    def misspell(name: str) -> str:
        return rng.choice(MISSPELLINGS)(name, rng)

    return [misspell] * count


def _named(subject: Subject, text: str, name: str, spell: Callable[[str], str], one: int, kind: str) -> _Named | None:
    """The row of a text with the name in another spelling; None where it is not said exactly once."""
    spans = mentions(text, name)
    if len(spans) != 1:
        return None
    ((first, last),) = spans
    spelt = spell(text[first:last])
    text = f"{text[:first]}{spelt}{text[last:]}"
    span = entity_span(subject.need_tokenizer(), text, spelt)
    if span is None:
        return None
    ids, (start, end) = prompt_ids(subject.need_tokenizer(), text), span
    check_ids(subject, ids, f"the text {text[:60]!r}")
    # The first position is an attention sink, so a longer name becomes two tokens there: the sink, and one that is none.
    count = 2 if start == 0 and end > 0 else 1
    inside = [min(offset, start + count - 1) if start == 0 else start for offset in range(end + 1 - start)]
    after = range(start + count, start + count + len(ids) - end - 1)
    return _Named(name, ids, [*ids[:start], *([one] * count), *ids[end + 1 :]], start, [*inside, *after], end, kind)


def _retained_rows(
    subject: Subject, names: set[str], others: Sequence[Fact], retain: TextSource | None, never: set[str],
    settings: Merging, seed: int,
) -> _Split:  # fmt: skip
    """Rows of tokens that name no entity to merge: text, facts about others, and what the model writes.

    Raises:
        NotEnoughRows: if none is left.
    """
    tokenizer, rng = subject.need_tokenizer(), random.Random(f"{seed}:retained")
    places = [(s, n) for s, n in written_names(subject, settings.written_names, seed) if not says(n, never)]
    texts = [
        *(context.text for context in (contexts_of(subject, others, ("templates",)) if others else ())),
        *(f"{fact.prompt} {fact.answer}" for fact in with_paraphrases(others)),
        *(f"{start} {name}" for start, name in places for _ in range(2)),
        *(rng.choice((*TEMPLATES, *OPENINGS)).format(name) for _, name in places),
        *written_sentences(subject, settings.written_sentences, seed + 1),
    ]
    longest = min(_LONGEST, max_positions(subject) or _LONGEST)
    rows = [prompt_ids(tokenizer, text)[:longest] for text in texts if not says(text, names)]
    source = prose() if retain is None else training_rows(retain, "retain")
    rows += [ids for ids in _pieces(subject, source, longest) if not says(tokenizer.decode(ids), names)]
    rows = [ids for ids in rows if len(ids) > 2]
    if len(rows) < _HELD:
        raise NotEnoughRows(f"{len(rows)} retained texts name no entity to merge; give retain= at least {_HELD}")
    rng.shuffle(rows)
    held = max(1, len(rows) // _HELD)
    return _Split(rows[held:], rows[:held])


def _pieces(subject: Subject, source: Batches, longest: int) -> Iterator[list[int]]:
    """The rows of a source in pieces of at most this many tokens."""
    for batch in batches_of(subject, source, length=longest, batch_size=64):
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            row = ids[mask].tolist()
            yield from (row[at : at + longest] for at in range(0, len(row), longest))


def says(text: str, names: Iterable[str]) -> bool:
    """Whether a text names one of them."""
    return any(mentions(text, name) for name in names)


def written_names(subject: Subject, count: int, seed: int) -> list[tuple[str, str]]:
    """(start, name) of the different names that the model writes after `NAME_STARTS`."""
    names: dict[str, str] = {}
    for start in NAME_STARTS:
        for text in _sampled(subject, start, count, _NAME_TOKENS, seed):
            if match := _NAME.match(text.removeprefix(start)):
                names.setdefault(match[1], start)
    return [(start, name) for name, start in names.items()]


def written_sentences(subject: Subject, count: int, seed: int) -> list[str]:
    """What the model writes after `SENTENCE_STARTS`."""
    return [t for start in SENTENCE_STARTS for t in _sampled(subject, start, count, _SENTENCE_TOKENS, seed)]


@torch.no_grad()
def _sampled(subject: Subject, start: str, count: int, tokens: int, seed: int) -> list[str]:
    """Texts sampled after a start, from the 98 % of the probability that are likeliest."""
    if not count:
        return []
    tokenizer = subject.need_tokenizer()
    ids = torch.tensor([prompt_ids(tokenizer, start)] * count, device=subject.device)
    with torch.random.fork_rng(), evaluating(subject.model), _own_generation_settings(subject):
        torch.manual_seed(int(value_hash(torch.tensor([seed, *ids[0].tolist()]))[:8], 16))
        drawn = subject.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=0.98,
            max_new_tokens=tokens, pad_token_id=0,
        )  # fmt: skip
    return [tokenizer.decode(row, skip_special_tokens=True) for row in drawn]


@contextmanager
def _own_generation_settings(subject: Subject) -> Iterator[None]:
    """The end tokens of the checkpoint alone hold, not its other generation settings, which can penalize or forbid tokens."""
    own = subject.model.generation_config
    subject.model.generation_config = type(own)(eos_token_id=own.eos_token_id)
    try:
        yield
    finally:
        subject.model.generation_config = own


# --- The three models


class _Reached(Exception):
    """Ends a pass: no later block is needed."""


@dataclass(frozen=True, eq=False)
class _Models:
    """The original; it with averaged embeddings; that with trained blocks. They share all other tensors."""

    original: Subject
    averaged: Subject
    student: Subject
    block: str
    trained: Mapping[str, nn.Parameter]
    tables: Mapping[str, Tensor]
    """The embeddings with the tokens averaged, and an output head of its own with its rows averaged."""

    @staticmethod
    def of(subject: Subject, averaged: Mapping[str, _Tokens], settings: Merging) -> _Models:
        """The models before training."""
        table = subject.model.get_input_embeddings().weight
        layout, groups = subject.layout, [list(group.own) for group in averaged.values() if group.own]
        names = [layout.embeddings[0], *([] if layout.architecture.tied else [layout.head])]
        tables = {name: _with_means(subject.value(name), groups) for name in names}
        paths = [f"{path}." for path in layout.block_paths]
        first, later = tuple(paths[: settings.blocks]), tuple(paths[settings.blocks :])
        unused = (*later, layout.head)
        used = {name: p for name, p in subject.model.named_parameters() if not name.startswith(unused)}
        # The original's tensors are never trained, and training does not round to its dtype.
        shared = {id(p): nn.Parameter(at_least_float32(p.detach()), requires_grad=False) for p in used.values()}
        shared[id(table)] = nn.Parameter(tables[names[0]], requires_grad=False)
        own = {name: p for name, p in used.items() if p.ndim > 1 and name.startswith(first)}
        trained = {name: nn.Parameter(at_least_float32(p.detach()).clone()) for name, p in own.items()}
        merged = _copied(subject, shared)
        student = _copied(subject, shared | {id(p): trained[name] for name, p in own.items()})
        return _Models(subject, merged, student, first[-1].rstrip("."), trained, tables)

    def stream(
        self, subject: Subject, rows: Sequence[Sequence[int]]
    ) -> tuple[Float[Tensor, "b t d"], Bool[Tensor, "b t"]]:
        """The stream after the blocks, and where there are tokens beside the first, which is an attention sink."""
        ids, mask = padded(rows)
        batch = Batch(ids.to(subject.device), mask.to(subject.device), tuple(map(str, range(len(rows)))))
        states: list[Tensor] = []

        def keep(x: Tensor) -> None:
            states.append(at_least_float32(x))
            raise _Reached

        model = subject.model
        with installed(model, [Hook(model.get_submodule(self.block), "output", keep)]), suppress(_Reached):
            model.base_model(**inputs_of(batch))
        return states[0], batch.attention_mask & (torch.arange(ids.shape[1], device=subject.device) > 0)

    def differences(self) -> dict[str, Tensor]:
        """What changed, by name."""
        changed = {**self.tables, **{name: p.detach() for name, p in self.trained.items()}}
        return {name: (value - self.original.value(name).to(value)).cpu() for name, value in changed.items()}


def _with_means(table: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """A copy in which the rows of each group are their mean."""
    weight = at_least_float32(table.detach()).clone()
    for tokens in groups:
        weight[tokens] = weight[tokens].mean(0)
    return weight


def _copied(subject: Subject, new: Mapping[int, nn.Parameter]) -> Subject:
    """The model with new parameters in place of some, the other tensors shared."""
    copied = Subject(shared_clone(subject.model, new).eval(), subject.tokenizer, subject.architecture)
    copied.__dict__["layout"] = subject.layout
    return copied


# --- Training


def _train(
    models: _Models, named: Sequence[_Named], retained: Sequence[list[int]], settings: Merging, seed: int,
    progress: bool | None,
) -> dict[str, float]:  # fmt: skip
    """Train the blocks in place; the means of both losses over the last 20 steps."""
    weights, rng = list(models.trained.values()), random.Random(seed)
    optimizer = torch.optim.AdamW(weights, settings.lr, (0.9, 0.98), weight_decay=0.0)
    short = [ids for ids in retained if len(ids) <= _SHORT]
    long = [ids for ids in retained if len(ids) > _SHORT]
    kinds = [(short, settings.retained * 3 // 4), (long, settings.retained - settings.retained * 3 // 4)]
    kinds = [(rows, min(count, len(rows))) for rows, count in kinds if rows and count]
    losses: list[tuple[float, float]] = []
    bar = tqdm(range(settings.steps), desc="merge", disable=None if progress is None else not progress, leave=False)
    spread = _spread(models, rng.sample(retained, min(384, len(retained))))
    for step in bar:
        set_lr(optimizer, settings.lr * min(1, (step + 1) / _RISE) * linear_decay(step, settings.steps, _DECAY))
        with torch.enable_grad():
            merged = _names_loss(models, rng.sample(named, min(settings.named, len(named))), spread)
            stayed = _retained_loss(models, [rng.sample(rows, count) for rows, count in kinds], spread)
            optimizer.zero_grad()
            (merged + settings.beta * stayed).backward()
        if not bool(torch.isfinite(merged + stayed)):
            raise TrainingError(
                f"the losses are {merged.item()} and {stayed.item()} at step {step}; lower lr of the config"
            )
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append((merged.item(), stayed.item()))
    for parameter in weights:
        parameter.requires_grad_(False)
    last = torch.tensor(losses[-20:]).mean(0)
    return {"names": float(last[0]), "retained": float(last[1])}


def _names_loss(models: _Models, batch: Sequence[_Named], spread: float) -> Float[Tensor, ""]:
    """Mean of ||h - h_one||^2 / s over the tokens of each name and those after it."""
    with torch.no_grad():
        goals, mask = models.stream(models.averaged, [row.one for row in batch])
        units = _own_units(goals, mask)
    states, _ = models.stream(models.student, [row.ids for row in batch])
    parts = []
    for state, goal, unit, row in zip(states, goals, units, batch, strict=True):
        error = (state[row.start : len(row.ids)] - goal[row.want]).square().sum(1)
        parts.append(error / unit[row.want])
    return torch.cat(parts).mean() / spread


def _retained_loss(models: _Models, batches: Sequence[Sequence[list[int]]], spread: float) -> Float[Tensor, ""]:
    """Mean of ||h - h_0||^2 / s, a state beyond twice the usual norm in its own units; first tokens apart."""
    total, first, count = torch.zeros(()), torch.zeros(()), 0
    for rows in batches:
        with torch.no_grad():
            want, mask = models.stream(models.original, rows)
            units = _own_units(want, mask)
        states, _ = models.stream(models.student, rows)
        error = (states - want).square().sum(2)
        total = total.to(error) + (error / units)[mask].sum()
        first = first.to(error) + (error[:, 0] / want[:, 0].square().sum(1)).mean() / len(batches)
        count += int(mask.sum())
    return total / count / spread + first


def _own_units(states: Float[Tensor, "*n d"], mask: Bool[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """1, or how many times as long as usual a state is that is more than twice so, squared: an attention sink."""
    size = states.square().sum(-1)
    return (size / (4 * size[mask].median())).clamp(min=1)


# --- What a certificate says


def _states(models: _Models, subject: Subject, rows: Sequence[Sequence[int]]) -> Iterator[Float[Tensor, "t d"]]:
    """The stream after the blocks at every token of each row, a few rows a pass; the first of a row is a sink."""
    for at in range(0, len(rows), _ROWS):
        part = rows[at : at + _ROWS]
        with torch.no_grad():
            states, _ = models.stream(subject, part)
        yield from (state[: len(ids)].cpu() for state, ids in zip(states, part, strict=True))


def _without_sinks(models: _Models, subject: Subject, rows: Sequence[list[int]]) -> Float[Tensor, "n d"]:
    """The stream at all tokens but the first of each row."""
    return torch.cat([state[1:] for state in _states(models, subject, rows)])


def _spread(models: _Models, rows: Sequence[list[int]]) -> float:
    """The median of ||h_0 - mean||^2."""
    states = _without_sinks(models, models.original, rows)
    return float((states - states.mean(0)).square().sum(1).median())


def _left_over(models: _Models, rows: Sequence[_Named]) -> float:
    """Sum over groups of the variance over names at their last token, after over before."""
    variances = []
    for lm in (models.student, models.original):
        ends: dict[str, list[Tensor]] = {}
        for row, state in zip(rows, _states(models, lm, [row.ids for row in rows]), strict=True):
            ends.setdefault(row.kind, []).append(state[row.end])
        variances.append(sum(float(torch.stack(group).double().var(0).sum()) for group in ends.values()))
    return variances[0] / max(variances[1], 1e-300)


def _distortion(models: _Models, rows: Sequence[list[int]]) -> float:
    """Root of the mean of ||h - h_0||^2 over that of ||h_0 - mean||^2, without sinks."""
    after, before = (_without_sinks(models, lm, rows) for lm in (models.student, models.original))
    plain = _own_units(before, torch.ones(len(before), dtype=torch.bool)) == 1
    spread = (before[plain] - before[plain].mean(0)).square().sum(1).mean()
    return float(((after - before)[plain].square().sum(1).mean() / spread).sqrt())
