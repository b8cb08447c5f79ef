"""The figures of the README, on SmolLM2-135M. Run as `python -m bench.figures`; about ten minutes on two cores.

Each PNG carries its command and seed in its metadata.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import repedit as rp
from bench.corpora import chunks, splits
from repedit import plot
from repedit.activations.prediction import drop

FIGURES = Path(__file__).parents[1] / "figures"
SEED = 0
READ = {"limit_tokens": 4064, "progress": False}


def save(figure: Figure, name: str) -> None:
    """Write one PNG with what made it."""
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / f"{name}.png", dpi=110, metadata={"Description": f"python -m bench.figures, seed {SEED}"})
    print(f"figures/{name}.png", flush=True)


def main() -> None:
    """Measure and draw."""
    lm = rp.load("smollm2-135m")
    halves = splits()
    fit = {name: chunks(half[0], 40, SEED) for name, half in halves.items()}
    test = {name: chunks(half[1], 24, SEED) for name, half in halves.items()}
    sides = {name: rp.collect(lm, corpus, **READ) for name, corpus in fit.items()}
    scores = rp.score(sides["code"], sides["prose"])
    edit = rp.prune(scores, fraction=0.01)
    save(plot.specialization(scores), "specialization")
    save(plot.importances(sides["code"], sides["prose"], edit=edit), "importances")
    save(plot.pruned_per_layer(edit, control=rp.random_like(edit, seed=SEED), layers=len(scores)), "pruned_per_layer")
    best = max((float(s.values.max()), site) for site, s in scores.items())[1]
    neuron = int(scores[best].values.argmax())
    save(plot.activations(lm, best, neuron, fit["code"], fit["prose"]), "activations")

    reverse = rp.prune(rp.score(sides["prose"], sides["code"]), fraction=0.01)
    edits = {"code": edit, "prose": reverse}
    base = {name: rp.predictions(lm, corpus, **READ) for name, corpus in test.items()}
    table = [
        [drop(base[name], rp.predictions(lm, test[name], edit=edits[gone], **READ)) for name in test] for gone in edits
    ]
    save(plot.transfer(table, list(test), overlap=plot.overlap(list(edits.values()))), "transfer")

    less = READ | {"limit_tokens": 2032}
    options: dict[str, Any] = {
        "collect_options": READ, "evaluate_options": less, "evaluate_forget": test["code"], "evaluate_retain": test["prose"],
    }  # fmt: skip
    runs = [
        rp.trajectory(lm, fit["code"], fit["prose"], fraction_per_step=0.004, steps=5, progress=False, **how, **options)
        for how in ({"combine": "difference"}, {"combine": "ratio", "recollect": False})
    ]
    base = {name: getattr(runs[0].steps[0], side) for name, side in (("code", "forget"), ("prose", "retain"))}
    control = []
    for seed in range(3):
        random = rp.random_like(runs[0].steps[-1].edit, seed=seed)
        after = {name: rp.predictions(lm, corpus, edit=random, **less) for name, corpus in test.items()}
        control.append((drop(base["prose"], after["prose"]), drop(base["code"], after["code"])))
    save(
        plot.trajectory(*runs, labels=["difference, collected again", "ratio, one order"], control=control),
        "trajectory",
    )


if __name__ == "__main__":
    main()
