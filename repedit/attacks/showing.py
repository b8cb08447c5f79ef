"""What a report shows beside its verdict, and what never decides it: answers in words, and how large the edit is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from repedit.attacks.families.rounding import survival
from repedit.attacks.judging.evidence import Report
from repedit.attacks.models import Audited
from repedit.metrics.generation import continuations
from repedit.models import Subject

TOKENS = 8
SCHEMES = ("int8", "int4")


def shown(report: Report, models: Mapping[str, Audited]) -> Report:
    """The report with what each model writes after the examples' prompts, and how much of the edit rounding leaves.

    diagnostics: "update": for every changed matrix of the blocks its size, and the cosine of the rounded update with the
    true one by scheme; its mean as "survival". An edit that lives in hooks has no such numbers. Loading costs seconds,
    so every model is opened once.
    """
    prompts = [example["prompt"] for example in report.examples]
    hooked = models["edited"].hooked or models["original"].hooked
    words: dict[str, tuple[str, ...]] = {}
    update: dict[str, Any] = {}
    if prompts or not hooked:
        with models["edited"].opened() as edited, models["original"].opened() as original:
            words = {"edited": _written(edited, prompts), "original": _written(original, prompts)}
            update = {} if hooked else _update(edited, original)
    if prompts and "reference" in models:
        with models["reference"].opened() as reference:
            words["reference"] = _written(reference, prompts)
    examples = tuple(
        {**example, **{role: texts[i] for role, texts in words.items()}, "attacked": example["answer"]}
        for i, example in enumerate(report.examples)
    )
    return replace(report, examples=examples, diagnostics={**report.diagnostics, **update})


def _written(subject: Subject, prompts: Sequence[str]) -> tuple[str, ...]:
    return continuations(subject, prompts, tokens=TOKENS)


def _update(edited: Subject, original: Subject) -> dict[str, Any]:
    if edited.quantizer or original.quantizer:
        return {}
    found = {scheme: survival(edited, original, scheme) for scheme in SCHEMES}
    names = found[SCHEMES[0]]
    return {
        "update": {
            name: {"relative": names[name]["relative"], **{scheme: found[scheme][name]["cosine"] for scheme in SCHEMES}}
            for name in names
        },
        "survival": {s: sum(c["cosine"] for c in found[s].values()) / len(names) for s in SCHEMES if names},
    }  # fmt: skip
