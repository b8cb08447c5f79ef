"""What a report shows beside its verdict, and what never decides it: answers in words, and how large the edit is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from repedit.attacks.diagnosing import line, uds
from repedit.attacks.families.rounding import survival
from repedit.attacks.judging.evidence import Report
from repedit.attacks.models import Audited
from repedit.data import Fact
from repedit.metrics.generation import continuations
from repedit.models import Subject

TOKENS = 8
SCHEMES = ("int8", "int4")


def shown(report: Report, models: Mapping[str, Audited], facts: Sequence[Fact] = ()) -> Report:
    """The report with what each model writes after the examples' prompts, and what its edit is like.

    diagnostics: "update": for every changed matrix of the blocks its size, and the cosine of the rounded update with the
    true one by scheme; its mean as "survival". With facts to ask also "line", and with a reference "uds": see
    `diagnosing`. An edit that lives in hooks or changed a shape has neither update nor line, one of another width no uds. Loading costs seconds, so every model is
    opened once.
    """
    prompts = [example["prompt"] for example in report.examples]
    pair = models["edited"], models["original"]
    # Weights that hooks change, or that have another shape, have no difference.
    apart = any(model.hooked for model in pair) or pair[0].shapes != pair[1].shapes
    both = ("edited", "original") if prompts or facts or not apart else ()
    roles = (*both, *(("reference",) if "reference" in models and (prompts or facts) else ()))
    with ExitStack() as stack:
        opened = {role: stack.enter_context(models[role].opened()) for role in roles}
        words = {role: continuations(subject, prompts, tokens=TOKENS) for role, subject in opened.items()}
        found = _update(opened["edited"], opened["original"]) if opened and not apart else {}
        if facts:
            found |= _diagnosed(opened, facts, plain=not apart)
    examples = tuple(
        {**example, **{role: texts[i] for role, texts in words.items()}, "attacked": example["answer"]}
        for i, example in enumerate(report.examples)
    )
    return replace(report, examples=examples, diagnostics={**report.diagnostics, **found})


def _diagnosed(opened: Mapping[str, Subject], facts: Sequence[Fact], *, plain: bool) -> dict[str, Any]:
    edited, original = opened["edited"], opened["original"]
    if edited.quantizer or original.quantizer:
        return {}
    found = {"line": line(edited, original, facts)} if plain else {}
    # States of one model are put into another.
    same = len({subject.anatomy.width for subject in opened.values()}) == 1
    if "reference" not in opened or not same:
        return found
    return found | {"uds": uds(edited, original, opened["reference"], facts)}


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
