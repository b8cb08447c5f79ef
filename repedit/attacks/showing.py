"""What a report shows beside its verdict, and what never decides it: answers in words, and how large the edit is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from repedit.attacks.families.rounding import survival
from repedit.attacks.judging.evidence import Report
from repedit.attacks.models import Audited
from repedit.metrics.generation import continuations

TOKENS = 8
SCHEMES = ("int8", "int4")


def shown(report: Report, models: Mapping[str, Audited]) -> Report:
    """The report with what each model writes after the examples' prompts, and how much of the edit rounding leaves.

    diagnostics: "update": for every changed matrix of the blocks its size, and the cosine of the rounded update with the
    true one by scheme; its mean as "survival". An edit that lives in hooks has no such numbers.
    """
    words = {role: _written(report, model) for role, model in models.items()} if report.examples else {}
    examples = tuple(
        {**example, **{role: texts[i] for role, texts in words.items()}, "attacked": example["answer"]}
        for i, example in enumerate(report.examples)
    )
    return replace(report, examples=examples, diagnostics={**report.diagnostics, **_update(models)})


def _written(report: Report, model: Audited) -> tuple[str, ...]:
    with model.opened() as subject:
        return continuations(subject, [example["prompt"] for example in report.examples], tokens=TOKENS)


def _update(models: Mapping[str, Audited]) -> dict[str, Any]:
    if models["edited"].hooked or models["original"].hooked:
        return {}
    with models["edited"].opened() as edited, models["original"].opened() as original:
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
