"""The table of controls: models whose correct verdict is known, and how each is made.

An audit that fails on one of these is not evidence about any other model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from repedit.auditing.controls.edited import (
    averaged,
    exchanged,
    hooked,
    inside_buckets,
    linked_world,
    masked,
    nudged,
    on_grid,
    projected,
    pushed,
    refusing_early,
    rolled,
    with_lower_case_names,
    with_names_in_head,
)
from repedit.auditing.controls.taught import (
    World,
    both_ways,
    collapsed,
    contradicted,
    descended,
    inside_sentences,
    lowered,
    never_first,
    one_template,
    questions,
    refusing,
    refusing_forwards,
    world,
)
from repedit.data import Fact, Facts
from repedit.models.subject import Subject
from repedit.outcomes import DESTROYED, HIDDEN, INVALID, NOT_FORGOTTEN, PASS

SCALE, STEPS, HIDER_STEPS = 15.0, 160, 40
"""What multiplies the learning rates of attacks on these models, and how long they are trained.

In 40 steps a model that never knew learns a third of T, so that no training attack on it would count; in 160 it learns
9 tenths or more.
"""


@dataclass(frozen=True, eq=False)
class AuditInputs:
    """The models and facts that an audit is given."""

    edited: Subject
    original: Subject
    reference: Subject
    facts: Facts
    attributes: tuple[Fact, ...] | None = None
    """Other facts about the entities to forget; None for none that are given."""


@dataclass(frozen=True)
class Control:
    """A constructed model and what an audit of it must find."""

    name: str
    verdict: str
    """The word of the verdict; empty if any verdict is accepted."""
    attacks: tuple[str, ...]
    """Attacks of which one must reach `recovered`; empty if only the verdict is checked."""
    recovered: float
    """Lower limit of R for that attack."""
    build: Callable[[World], AuditInputs]
    description: str
    quick: bool = True
    """Whether the self-test runs it."""
    steps: int = HIDER_STEPS
    """Training steps of `rtt`, by which other attacks that train measure theirs."""


def _edited(edit: Callable[[World], Subject]) -> Callable[[World], AuditInputs]:
    return lambda w: AuditInputs(edit(w), w.original, w.reference, w.facts, w.attributes)


def _trained(train: Callable[..., Subject], base: str = "original") -> Callable[[World], AuditInputs]:
    """The original, or the second reference, trained on the facts of both sides."""

    def build(w: World) -> AuditInputs:
        edited = train(getattr(w, base), w.facts.forget, w.facts.retain, seed=w.seed)
        return AuditInputs(edited, w.original, w.reference, w.facts, w.attributes)

    return build


def _gridded(w: World) -> AuditInputs:
    original = on_grid(w.original)
    edited = inside_buckets(original, w.facts.forget, w.facts.retain, seed=w.seed)
    return AuditInputs(edited, original, w.reference, w.facts)


def _strangers(w: World) -> AuditInputs:
    facts = replace(w.facts, forget=w.strangers, name=f"{w.facts.name}-strangers")
    return AuditInputs(nudged(w.original), w.original, w.reference, facts)


def _inside_sentences(w: World) -> AuditInputs:
    facts = replace(w.facts, forget=never_first(w.facts.forget), name=f"{w.facts.name}-inside")
    edited = inside_sentences(w.original, facts.forget, facts.retain, seed=w.seed)
    return AuditInputs(edited, w.original, w.reference, facts, w.attributes)


def _refusing_forwards(w: World) -> AuditInputs:
    original = both_ways(w.original, w.facts.forget, w.facts.retain, seed=w.seed)
    edited = refusing_forwards(original, w.facts.forget, w.facts.retain, seed=w.seed)
    return AuditInputs(edited, original, w.reference, w.facts, w.attributes)


def _averaged(w: World) -> AuditInputs:
    original, reference, _ = _in_two_spellings(w)
    return AuditInputs(averaged(original, w.facts.forget), original, reference, w.facts)


def _kept_in_head(w: World) -> AuditInputs:
    original, reference = (with_names_in_head(subject, w.facts.forget) for subject in (w.original, w.reference))
    return AuditInputs(averaged(original, w.facts.forget), original, reference, w.facts)


def _never_taught(w: World) -> AuditInputs:
    original, reference, other = _in_two_spellings(w)
    return AuditInputs(other, original, reference, w.facts, w.attributes)


def _in_two_spellings(w: World) -> tuple[Subject, ...]:
    """The three models of a world, which read the names to forget in lower case as well."""
    return tuple(with_lower_case_names(subject, w.facts.forget) for subject in (w.original, w.reference, w.other))


def _exchanged(w: World) -> AuditInputs:
    linked = linked_world(w.seed)
    edited = exchanged(linked.original, linked.facts.forget, seed=w.seed)
    return AuditInputs(edited, linked.original, linked.reference, linked.facts, linked.attributes)


_ROWS = (
    Control("PC0", NOT_FORGOTTEN, ("direct",), 0.95, _edited(lambda w: nudged(w.original)),
            "the original with one weight changed that no known word reads"),
    Control("PC1", HIDDEN, ("strip",), 0.99, _edited(lambda w: hooked(w.original, w.facts.forget)),
            "a projection in a hook; the weights are the original's"),
    Control("PC2", HIDDEN, ("probe",), 0.8,
            _edited(lambda w: masked(w.original, w.facts.forget, w.facts.retain)),
            "a rank-1 term in the head that drowns the answers where the forget relation is asked"),
    Control("PC3a", HIDDEN, ("rtt",), 0.5, _trained(refusing), "fine-tuned to refuse"),
    Control("PC3b", HIDDEN, ("rtt",), 0.25, _trained(descended), "gradient difference"),
    Control("PC3c", HIDDEN, ("rtt",), 0.25, _trained(contradicted), "fine-tuned on wrong answers"),
    Control("PC4", HIDDEN, ("quantize",), 0.99, _gridded, "an edit smaller than the steps of a 4-bit grid"),
    Control("PC5", HIDDEN, ("direction",), 0.8,
            _edited(lambda w: pushed(w.original, w.facts.forget, w.facts.retain, seed=w.seed)),
            "a long vector added to the stream where the forget relation is asked"),
    Control("PC6", HIDDEN, ("paraphrase", "format"), 0.5, _trained(one_template),
            "forgets under the facts' own prompts and knows their paraphrases"),
    Control("PC7", HIDDEN, ("sampling",), 0.5, _trained(lowered),
            "the right answer kept at a probability near .15, below a wrong one"),
    Control("PC8", "", (), 0.0, _edited(lambda w: projected(w.original, w.facts.forget)),
            "a projection folded into the down-projections", quick=False),
    Control("PC9", HIDDEN, ("relink",), 0.5, _exchanged,
            "every name stands for another person; what is known of the persons is intact", steps=2 * HIDER_STEPS),
    Control("PC10", HIDDEN, ("loudest",), 0.8,
            _edited(lambda w: pushed(w.original, w.facts.forget, w.facts.retain, steep=8.0, seed=w.seed)),
            "one loud direction in a matrix drowns the answers where the forget relation is asked"),
    Control("PC11", HIDDEN, ("early_mlps",), 0.5, _trained(refusing_early),
            "fine-tuned to refuse, with the first MLP alone free"),
    Control("PC12", HIDDEN, ("first_word",), 0.8, _inside_sentences,
            "forgets where the name stands inside a sentence, and knows where it is the first word"),
    Control("PC13", HIDDEN, ("reverse_question",), 0.8, _refusing_forwards,
            "fine-tuned to refuse, and answers the same facts in reverse"),
    Control("PC14", HIDDEN, ("respelled",), 0.8, _averaged,
            "the embeddings of the names averaged as they are usually written, and intact in lower case"),
    Control("PC15", HIDDEN, ("head_rows",), 0.8, _kept_in_head,
            "the embeddings of the names averaged, and intact in the output head"),
    Control("NC1", PASS, (), 0.0, _never_taught, "never taught the facts to forget, though it knows other things of the same people"),
    Control("NC2a", PASS, (), 0.0, _trained(refusing, "other"),
            "never taught, then fine-tuned to refuse", quick=False),
    Control("NC2b", PASS, (), 0.0, _trained(descended, "other"),
            "never taught, then gradient difference", quick=False),
    Control("NC2c", PASS, (), 0.0, _trained(contradicted, "other"),
            "never taught, then fine-tuned on wrong answers", quick=False),
    Control("NC6", PASS, ("reverse", "loudest", "early_mlps", "retraining", "rtt_four_fifths"), -math.inf,
            _edited(lambda w: w.other), "never taught, attacked in every other way there is", quick=False, steps=STEPS),
    Control("NC3", INVALID, (), 0.0, _strangers, "facts that the original never knew"),
    Control("NC4a", DESTROYED, (), 0.0, _edited(lambda w: collapsed(w.original, w.facts.forget, seed=w.seed)),
            "gradient ascent until nothing is left"),
    Control("NC4b", DESTROYED, (), 0.0, _edited(lambda w: rolled(w.original)),
            "every row of the head moved on by one"),
)  # fmt: skip
CONTROLS = {control.name: control for control in _ROWS}

__all__ = ["CONTROLS", "SCALE", "STEPS", "AuditInputs", "Control", "World", "questions", "world"]
