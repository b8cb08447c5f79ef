"""What a training step and a question of an audit cost on SmolLM2-135M, part by part and in several ways of computing them.

CPU seconds of one thread; the ways alternate in one process on the same batches. `python -m bench.audit --part training`.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import repedit as rp
from repedit.activations.forward import inputs_of
from repedit.auditing.api import _invented
from repedit.auditing.attack import Scratch, ask
from repedit.auditing.attacks import tuning
from repedit.auditing.attacks.finetune import benign, rtt
from repedit.auditing.attacks.tuning import Draw, Example, examples, items_loss, masked_loss, shuffled, stacked
from repedit.auditing.data import AuditData, DataOptions, audit_data
from repedit.data import Splits
from repedit.metrics import facts as metrics
from repedit.models.subject import Subject
from repedit.training.optimizers import OPTIMIZERS, added_in_place, zero_gradients

Loss = Callable[[Subject, Sequence[Example]], Tensor]


def training() -> list[dict[str, Any]]:
    """Rows of seconds: a step by part and way, the questions by way, two attacks carried out, and what an audit sums to."""
    torch.set_num_threads(1)
    data, invented = _data()
    splits, fresh = data.folds[0], invented.folds[0].test
    original = rp.load("smollm2-135m")
    subject = Scratch(original).subject
    rows = []
    for name, items in (
        ("answers", examples(subject, splits.train)),
        ("text of 24 tokens", examples(subject, splits.unrelated or (), max_tokens=24)),
    ):
        rows += _steps(subject, name, shuffled(items, 8, 0), pairs=5 if name == "answers" else 3)
        print(rows[-4:], flush=True)
    rows += _questions(original, (*splits.test, *fresh))
    print(rows[-2:], flush=True)
    asked = Splits(splits.train, (*splits.test, *fresh), retain=splits.retain, unrelated=splits.unrelated)
    for label, attack in (
        ("rtt, one rate of three, one fold", rtt(rates=(5e-5,), steps=40, measured=(0, 20, 40))),
        (
            "benign, one rate of two, two texts of three, 8 of 40 steps",
            benign(rates=(5e-5,), steps=8, measured=(8,), few=0, length=24),
        ),
    ):
        start = time.process_time()
        finding = attack(original, asked)
        rows.append({"part": "attack", "name": label, "seconds": time.process_time() - start, "status": finding.status})
        print(rows[-1], flush=True)
    rows.append({"part": "memory", "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20})
    return rows


def _data() -> tuple[AuditData, AuditData]:
    """The capitals and invented facts, as the fast budget asks them."""
    options: DataOptions = {
        "unrelated": rp.data.prose(), "holdout": None, "folds": 2, "train_fraction": 0.5, "seed": 0,
    }  # fmt: skip
    data = audit_data(rp.data.facts("capitals"), None, most=160, attributes=None, **options)
    invented = _invented(data, "fast", options)
    assert invented is not None
    return data, invented


def _whole_rows(subject: Subject, items: Sequence[Example]) -> Tensor:
    """The loss as it was computed before: rows padded on the left and read to their last token."""
    batch = stacked(subject, items)
    assert batch.answer is not None
    first = max(1, int(batch.answer.any(0).to(torch.uint8).argmax()))
    logits = subject.model(**inputs_of(batch), logits_to_keep=batch.input_ids.shape[1] - first + 1).logits
    learned = batch.answer[:, first:]
    each = nn.functional.cross_entropy(logits[:, :-1][learned], batch.input_ids[:, first:][learned], reduction="none")
    return (each * (learned / learned.sum(1, keepdim=True))[learned].to(each)).sum() / len(items)


def _rows(subject: Subject, items: Sequence[Example]) -> Tensor:
    return masked_loss(subject, stacked(subject, items))


WAYS: dict[str, tuple[Loss, bool]] = {
    "before": (_whole_rows, False),
    "without the last token": (_rows, False),
    "as a tree where it is worth it": (items_loss, False),
    "and embedding gradients in place": (items_loss, True),
}
"""Each with what the one before it does; the loss, and whether gradients are added in place."""


def _steps(subject: Subject, name: str, draw: Draw, pairs: int) -> list[dict[str, Any]]:
    parameters = [p.requires_grad_(True) for p in subject.model.parameters()]
    optimizer = OPTIMIZERS["adamw"](parameters, lr=1e-9, weight_decay=0.0)
    seconds: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with torch.enable_grad():
        # The first round warms up memory and is not counted.
        for step in range(pairs + 1):
            for way, (loss, in_place) in WAYS.items():
                with added_in_place(subject.model) if in_place else nullcontext([]) as kept:
                    parts = _step(parameters, kept, optimizer, partial(loss, subject, draw(step)))
                seconds[way] += [parts] * bool(step)
    zero_gradients(parameters)
    before = [sum(parts.values()) for parts in seconds["before"]]
    return [
        {
            "part": "step", "texts": name, "way": way, "pairs": pairs,
            "seconds": median(sum(parts.values()) for parts in found),
            "ratio": median(sum(parts.values()) / b for parts, b in zip(found, before, strict=True)),
            **{f"seconds_{part}": median(parts[part] for parts in found) for part in found[0]},
        }
        for way, found in seconds.items()
    ]  # fmt: skip


def _step(
    parameters: list[nn.Parameter],
    kept: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[], Tensor],
) -> dict[str, float]:
    """CPU seconds of each part of a step."""
    marks = [time.process_time()]
    zero_gradients(parameters, kept)
    loss = loss_of()
    marks.append(time.process_time())
    loss.backward()
    marks.append(time.process_time())
    tuning._clipped(parameters, 1.0)
    marks.append(time.process_time())
    optimizer.step()
    marks.append(time.process_time())
    names = ("forward", "backward", "clipping", "optimizer")
    return {name: end - start for name, start, end in zip(names, marks[:-1], marks[1:], strict=True)}


def _questions(subject: Subject, facts: Sequence[Any]) -> list[dict[str, Any]]:
    """Asking V and the invented facts, row by row on a cache and as trees; the largest difference of a log-probability."""
    ask(subject, facts[:4])
    start = time.process_time()
    tree = ask(subject, facts)
    middle = time.process_time()
    with patch.object(metrics, "tree_capacity", lambda subject: 0):
        rows = ask(subject, facts)
    end = time.process_time()
    different = {
        "largest_difference": float(abs(tree.graded - rows.graded).max()),
        "decided_otherwise": int((tree.correct != rows.correct).sum()),
    }
    return [
        {"part": "questions", "way": "before", "facts": len(facts), "seconds": end - middle, "ratio": 1.0},
        {
            "part": "questions", "way": "as trees", "facts": len(facts), "seconds": middle - start,
            "ratio": (middle - start) / (end - middle), **different,
        },
    ]  # fmt: skip
