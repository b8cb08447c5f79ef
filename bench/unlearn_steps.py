"""What a step of gradient unlearning costs on SmolLM2-135M, beside a loop that keeps a second model as reference.

Every loop trains what writes mlp.out in layers 20-29 (RMU its own three layers), on 8 rows of capitals and 8 of symbols a step, in a fresh process, so
that its peak is its own. Time is CPU time of one thread, the median over steps after the first two; memory is the peak above
the imports, with the model. Run as `python -m bench.unlearn --part steps`.
"""

from __future__ import annotations

import copy
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

import repedit as rp
from bench.record import record
from repedit.activations.forward import inputs_of
from repedit.data import Batch
from repedit.models.subject import Subject
from repedit.training.sampler import BatchSampler, label_mask, training_rows
from repedit.unlearning.recipe import UnlearnRecipe
from repedit.unlearning.schedule import Stop

STEPS, SKIPPED = 7, 2
RECIPES = ("grad_diff", "npo_gdr", "npo_klr", "rmu", "blur_ga", "blur_npo", "sure:npo_gdr")
NAIVE = "npo_gdr, second model"
LAYERS = range(20, 30)


def main() -> None:
    """Measure every loop, write bench/results/unlearn-steps.json and print a table."""
    rows = []
    for name in (NAIVE, *RECIPES):
        rows.append(json.loads(_alone(name)))
        print(rows[-1], flush=True)
    naive, plain = (next(row for row in rows if row["name"] == name) for name in (NAIVE, "grad_diff"))
    for row in rows:
        row |= {f"{what} to a second model": row[what] / naive[what] for what in ("seconds", "gib")}
        row |= {f"{what} to grad_diff": row[what] / plain[what] for what in ("seconds", "gib")}
    print(record("unlearn-steps", rows, module="unlearn"))
    print("| recipe | CPU seconds a step | peak GiB | time to a second model | memory | time to grad_diff | memory |")
    print("|---" * 7 + "|")
    for row in rows:
        print(f"| {' | '.join(v if isinstance(v, str) else f'{v:.2f}' for v in row.values())} |")


def _alone(name: str) -> str:
    command = [sys.executable, "-c", f"from bench.unlearn_steps import measured; measured({name!r})"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]


def measured(name: str) -> None:
    """Print the seconds and the peak of one loop, in this process."""
    torch.set_num_threads(1)
    base = _peak()
    lm = rp.load("smollm2-135m")
    forget, retain = (rp.data.facts(domain).forget for domain in ("capitals", "symbols"))
    times: list[float] = [time.process_time()]
    if name == NAIVE:
        _second_model(lm, forget, retain, times)
    else:
        clock = Stop("clock", lambda _: times.append(time.process_time()) or "")
        recipe = rp.recipes.by_name(f"small:{name}")
        assert isinstance(recipe, UnlearnRecipe)
        recipe = replace(recipe, steps=STEPS, stop=(clock,))
        rp.unlearn(lm, recipe=recipe, forget=forget, retain=retain, progress=False)
    steps = [after - before for before, after in pairwise(times)][SKIPPED:]
    print(json.dumps({"name": name, "seconds": median(steps), "gib": _peak() - base}))


def _second_model(lm: Subject, forget: Any, retain: Any, times: list[float]) -> None:
    """NPO and NLL of retain as scripts write them: both models read every forget row, and all logits are made."""
    reference, model = copy.deepcopy(lm.model), lm.model
    weights = [model.model.layers[i].mlp.down_proj.weight for i in LAYERS]
    for p in model.parameters():
        p.requires_grad_(any(p is w for w in weights))
    optimizer = torch.optim.AdamW(weights, lr=5e-4, weight_decay=0.0)
    sides = [BatchSampler(lm, training_rows(rows, "rows"), 8, length=64, seed=0) for rows in (forget, retain)]
    for step in range(STEPS):
        bad, good = (side.at(step) for side in sides)
        with torch.no_grad():
            before = _nll(reference, bad)
        loss = -2 / 0.1 * logsigmoid(0.1 * (_nll(model, bad) - before)).mean() + _nll(model, good).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time())


def _nll(model: Any, batch: Batch) -> Tensor:
    """The summed NLL of the labels of each row."""
    logits, use = model(**inputs_of(batch)).logits[:, :-1], label_mask(batch)[:, 1:]
    found = cross_entropy(logits.transpose(1, 2), batch.input_ids[:, 1:], reduction="none")
    return (found * use).sum(1)


def _peak() -> float:
    """GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
