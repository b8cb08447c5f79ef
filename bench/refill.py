"""Does narrowing the stream stop the cheapest attack? Null-space refill on an erased and on a sliced model of one edit.

Tiny models were taught 120 facts to forget and 120 to retain. What tells the answers of the former apart in the state that
predicts them is erased from the residual stream (the span of its covariance with the sixteen answers). The erased model keeps its shape and has a null space in every writer; the sliced one has the same logits and fewer coordinates. Both
are attacked with half of the forgotten facts and asked the other half: `refill`, which trains the null space alone, and
`rtt`, which trains everything. R = (A - B) / (C - B): A the attacked model, B the same attack on an erased model that never
met the facts (its direct answer where there is nothing to fill), C the original. Run as `python -m bench.refill --seeds 0,1,2`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import repedit as rp
from bench.mrp_report import shown
from bench.record import record
from repedit.activations.collection import positions
from repedit.auditing.attack import Attack, Finding
from repedit.auditing.attacks.finetune import rtt
from repedit.auditing.attacks.refill import refill
from repedit.auditing.controls import SCALE
from repedit.auditing.controls.taught import World, world
from repedit.data import Batch, Splits
from repedit.edit import Edit
from repedit.models.subject import Subject

ATTACKS: dict[str, Attack] = {"refill": refill(scale=SCALE), "rtt": rtt(steps=40, measured=(0, 20, 40), scale=SCALE)}


def fitted(here: World) -> Callable[[Subject], Edit]:
    """What takes the answers to forget out of the stream of a model; it is fitted on the original."""
    rows, count = rp.data.Rows(here.facts.forget, "forget"), positions("before_answer")
    tokenizer = here.original.need_tokenizer()
    answers = sorted(
        {tokenizer(f" {fact.answer}", add_special_tokens=False)["input_ids"][0] for fact in here.facts.forget}
    )
    classes = torch.tensor(answers)

    def labels(batch: Batch) -> Tensor:
        following = torch.cat([batch.input_ids[:, 1:], batch.input_ids[:, :1]], 1)
        return (following[..., None] == classes).float()

    site, options = "1.resid.post", {"count": count, "progress": False}
    xx = rp.collect(here.original, rows, site, statistic=rp.Moments, **options)[site]
    xz = rp.collect(here.original, rows, site, statistic=rp.CrossMoments, labels=labels, **options)[site]
    kept = rp.collect(here.original, rp.data.Rows(here.facts.retain, "retain"), site, statistic=rp.Moments, **options)[
        site
    ]
    # Without cov(x, z) no linear probe is left; the model's heads ask for a width they divide.
    span = rp.fit.leace(xx, xz, affine=False).u
    return lambda lm: rp.erase_stream(lm, span, multiple=4, retain=kept)


def rows(seed: int) -> Iterator[dict[str, Any]]:
    """One row a model: what is answered, and what each attack brings back."""
    here = world(seed)
    splits = Splits.of(here.facts.forget, seed=seed)
    erasure = fitted(here)
    edit, blank = erasure(here.original), rp.apply(erasure(here.reference), here.reference)
    models = {"erased": rp.apply(edit, here.original), "sliced": rp.sliced(edit, here.original)}
    floor = {name: best(attack.at(seed)(blank, splits), blank, splits) for name, attack in ATTACKS.items()}
    known = rp.facts_accuracy(here.original, splits.test).accuracy
    for name, lm in models.items():
        row: dict[str, Any] = {"name": name, "seed": seed, "width": lm.layout.width}
        row |= {side: rp.facts_accuracy(lm, getattr(here.facts, side)).accuracy for side in ("forget", "retain")}
        for attack, make in ATTACKS.items():
            found = make.at(seed)(lm, splits)
            got = best(found, lm, splits)
            row |= {attack: got, f"{attack} status": f"{found.status} {found.reason}".strip(), f"{attack} T": found.train_accuracy,
                    f"{attack} floor": floor[attack], f"{attack} R": (got - floor[attack]) / (known - floor[attack])}  # fmt: skip
        yield row


def best(found: Finding, lm: Subject, splits: Splits) -> float:
    """The best accuracy of the settings; what is answered without the attack where it could not be made."""
    return max(found.accuracy.values(), default=rp.facts_accuracy(lm, splits.test).accuracy)


def main() -> None:
    """Attack both models of each seed, write bench/results/refill.json and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    torch.set_num_threads(1)
    found = []
    for seed in parser.parse_args().seeds.split(","):
        for row in rows(int(seed)):
            print(row, flush=True)
            found.append(row)
    print(record("refill", found))
    columns = ("forget", "retain", "refill", "refill R", "rtt", "rtt R")
    print(f"| model | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for name in ("erased", "sliced"):
        mine = [row for row in found if row["name"] == name]
        print(f"| {name} | {' | '.join(shown([row[key] for row in mine]) for key in columns)} |")


if __name__ == "__main__":
    main()
