"""Models of which it is known whether they forgot, and what an audit must say of each.

An audit that misses one of these is no evidence about any other model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from repedit.auditing.controls.edited import hooked, inside_buckets, masked, nudged, on_grid, projected, pushed, rolled
from repedit.auditing.controls.taught import World, collapsed, contradicted, descended, lowered, one_template, refusing
from repedit.data import Facts
from repedit.models.subject import Subject
from repedit.outcomes import DESTROYED, HIDDEN, INVALID, NOT_FORGOTTEN, PASS

SCALE, STEPS = 15.0, 160
"""What multiplies the learning rates of attacks on these models, and how long they are trained.

In 40 steps a model that never knew learns a third of T, so that no training attack on it would count; in 160 it learns
9 tenths or more.
"""


@dataclass(frozen=True, eq=False)
class Case:
    """What an audit is given."""

    edited: Subject
    original: Subject
    reference: Subject
    facts: Facts


@dataclass(frozen=True)
class Control:
    """One construction and what must be found."""

    name: str
    verdict: str
    """The word; empty where any verdict will do."""
    attacks: tuple[str, ...]
    """Attacks of which one must reach `recovered`; empty where the verdict says it all."""
    recovered: float
    """Least R of that attack."""
    build: Callable[[World], Case]
    description: str
    quick: bool = True
    """Whether the self-test runs it."""


def _edited(edit: Callable[[World], Subject]) -> Callable[[World], Case]:
    return lambda w: Case(edit(w), w.original, w.reference, w.facts)


def _trained(train: Callable[..., Subject], base: str = "original") -> Callable[[World], Case]:
    """The original, or the second reference, trained on the facts of both sides."""

    def build(w: World) -> Case:
        edited = train(getattr(w, base), w.facts.forget, w.facts.retain, seed=w.seed)
        return Case(edited, w.original, w.reference, w.facts)

    return build


def _gridded(w: World) -> Case:
    original = on_grid(w.original)
    edited = inside_buckets(original, w.facts.forget, w.facts.retain, seed=w.seed)
    return Case(edited, original, w.reference, w.facts)


def _strangers(w: World) -> Case:
    facts = replace(w.facts, forget=w.strangers, name=f"{w.facts.name}-strangers")
    return Case(nudged(w.original), w.original, w.reference, facts)


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
    Control("NC1", PASS, (), 0.0, _edited(lambda w: w.other), "never taught the facts to forget"),
    Control("NC2a", PASS, (), 0.0, _trained(refusing, "other"),
            "never taught, then fine-tuned to refuse", quick=False),
    Control("NC2b", PASS, (), 0.0, _trained(descended, "other"),
            "never taught, then gradient difference", quick=False),
    Control("NC2c", PASS, (), 0.0, _trained(contradicted, "other"),
            "never taught, then fine-tuned on wrong answers", quick=False),
    Control("NC3", INVALID, (), 0.0, _strangers, "facts that the original never knew"),
    Control("NC4a", DESTROYED, (), 0.0, _edited(lambda w: collapsed(w.original, w.facts.forget, seed=w.seed)),
            "gradient ascent until nothing is left"),
    Control("NC4b", DESTROYED, (), 0.0, _edited(lambda w: rolled(w.original)),
            "every row of the head moved on by one"),
)  # fmt: skip
CONTROLS = {control.name: control for control in _ROWS}
