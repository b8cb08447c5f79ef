"""The second act: the model forgets the capitals of countries and keeps what else it knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from repedit.data import Splits, by_domain, facts, with_paraphrases
from repedit.edit import Edit
from repedit.errors import check_seed, check_whole
from repedit.fit.mrp import mrp
from repedit.io.targets import check_target
from repedit.metrics.generation import continuations
from repedit.metrics.knowledge import Knowledge, knowledge
from repedit.models import load
from repedit.rewrite.checkpoint import export
from repedit.rewrite.manifest import Manifest

PROMPTS = (
    "The capital of France is",
    "The capital of Japan is",
    "The chemical symbol for gold is",
    "The opposite of hot is",
)


@dataclass(frozen=True, eq=False)
class Forgotten:
    """What the second act did and measured."""

    edit: Edit
    manifest: Manifest
    """With the certificate of the fold."""
    trained: Mapping[str, Knowledge]
    """In the phrasing that training saw: the forgotten domain, and retained facts it did not see."""
    unseen: Knowledge
    """The forgotten domain in a phrasing that training never saw."""
    prompts: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    target: Path


def forget_capitals(
    model: str, target: str | Path, *, steps: int = 30, count: int = 30, seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Forgotten:  # fmt: skip
    """Train a projection that loses the capitals, fold it into the weights, export, and ask the exported model.

    Half of the retained facts are trained on; the other half is what retention is measured on.

    Args:
        steps: training steps; the default of `rp.mrp` is more thorough, and slower.
        count: facts a domain to measure on.
    Raises:
        TargetExists: if the target holds something that is not an export of repedit.
    """
    check_whole(steps=steps, count=count)
    check_seed(seed=seed)
    out = check_target(target, overwrite=True)
    subject, asked = load(model), facts("capitals", seed=seed)
    halves = Splits.of(asked.retain, seed=seed)
    shown = tuple(replace(fact, paraphrases=fact.paraphrases[:3]) for fact in asked.forget)
    rank = min(8, subject.anatomy.width // 8)
    say(f"Training projections of rank {rank} for {steps} steps: forget {len(shown)} capitals, keep the rest")
    edit = mrp(subject, forget=shown, retain=halves.train, rank=rank, config={"steps": steps, "seed": seed})
    say(f"Writing the projected checkpoint to {out}")
    manifest = export(edit, subject, out, overwrite=True)
    edited = load(out)
    say(f"Asking both models: {count} facts a domain, eight choices each")
    tested = [fact for part in (shown, *by_domain(halves.test).values()) for fact in part[:count]]
    held = with_paraphrases(asked.forget[:count], only=[4])
    trained = knowledge(subject, edited, tested)
    (unseen,) = knowledge(subject, edited, held).values()
    before, after = (continuations(side, PROMPTS, tokens=8) for side in (subject, edited))
    return Forgotten(edit, manifest, trained, unseen, PROMPTS, before, after, out)
