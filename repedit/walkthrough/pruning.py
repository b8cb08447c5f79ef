"""The first act: find the neurons of code, prune them, export, measure, draw.

Every step is a public call that a notebook can repeat.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from repedit import plot
from repedit.activations.collection import Collection, collect
from repedit.activations.prediction import Effect, effect, predictions
from repedit.data import Corpus, code, prose
from repedit.edit import Edit
from repedit.errors import check_seed, check_whole
from repedit.importance.scores import Scores
from repedit.importance.scoring import score
from repedit.importance.selection import prune, random_like
from repedit.io.targets import add_to_manifest, check_target
from repedit.metrics.comparison import Comparison, compare
from repedit.models import load
from repedit.rewrite.checkpoint import export
from repedit.rewrite.manifest import Manifest
from repedit.rewrite.reloading import Reload, reload_check

PROMPTS = ("def factorial(n):\n", "The capital of France is")
FRACTION = 0.01


@dataclass(frozen=True, eq=False)
class Walkthrough:
    """What the demo did and measured."""

    edit: Edit
    manifest: Manifest
    comparison: Comparison
    control: dict[str, Effect]
    """The effect of pruning as many random neurons in each layer."""
    reload: Reload
    total: int
    """Neurons that were scored."""
    target: Path
    figures: tuple[Path, ...]


def walkthrough(
    model: str, target: str | Path, *, tokens: int = 3000, seed: int = 0, say: Callable[[str], None] = lambda text: None
) -> Walkthrough:
    """Prune the neurons a model uses for code and hardly for prose, export the result and compare it with the original.

    Collection and evaluation use different documents. The target directory is replaced if an earlier export is there.

    Args:
        tokens: counted tokens to collect, and to evaluate, on each set.
        say: called with a line about each stage.
    Raises:
        TargetExists: if the target holds something that is not an export of repedit.
    """
    check_whole(tokens=tokens)
    check_seed(seed=seed)
    out = check_target(target, overwrite=True)
    say(f"Loading {model}")
    subject = load(model)
    (forget, forget_eval), (retain, retain_eval) = code(seed=seed).halves(seed), prose().halves(seed)
    say(f"Collecting neuron activations on {forget.name} and {retain.name}, {tokens} tokens each")
    sides = [collect(subject, c, limit_tokens=tokens) for c in (forget, retain)]
    scores = score(sides[0], sides[1])
    edit = prune(scores, fraction=FRACTION)
    say(f"Writing the pruned checkpoint to {out}")
    figures = out.parent / f".{out.name}.figures"
    _draw(figures, sides, scores, edit, seed)
    manifest = export(edit, subject, out, overwrite=True)
    shutil.move(str(figures), out / "figures")
    add_to_manifest(out, [f"figures/{path.name}" for path in (out / "figures").iterdir()])
    say("Reloading it with plain transformers, in a process that cannot import repedit")
    reload = reload_check(out)
    say(
        f"Measuring the original, the exported checkpoint and a random control on other documents, {tokens} tokens a set"
    )
    named = (Corpus(forget_eval.documents, "code"), Corpus(retain_eval.documents, "prose"))
    comparison = compare(subject, load(out), named, prompts=PROMPTS, limit_tokens=tokens)
    control = random_like(edit, seed=seed)
    random = {
        c.name: effect(comparison.base[c.name], predictions(subject, c, edit=control, limit_tokens=tokens))
        for c in named
    }
    total = sum(len(s.values) for s in scores.values())
    pictures = tuple(sorted((out / "figures").glob("*.png")))
    return Walkthrough(edit, manifest, comparison, random, reload, total, out, pictures)


def _draw(folder: Path, sides: list[Collection], scores: Scores, edit: Edit, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        "specialization": plot.specialization(scores),
        "importances": plot.importances(sides[0], sides[1], edit=edit),
        "pruned_per_layer": plot.pruned_per_layer(edit, control=random_like(edit, seed=seed), layers=len(scores)),
    }
    for name, figure in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=150, metadata={"Description": f"repedit demo, seed {seed}"})
