"""Diagnostics, which are shown beside a verdict and never decide it: where a model still knows, and how large the edit is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from repedit.activations.forward import at_least_float32, captured, lengths
from repedit.arch import hooks_at
from repedit.auditing.attack import Scratch, ask
from repedit.auditing.attacks.weights import survival
from repedit.auditing.report import Report
from repedit.auditing.runner import Audited
from repedit.data import Fact
from repedit.data.encoding import Tokenizer, encoded, entity_end
from repedit.errors import NotFinite
from repedit.hooks import evaluating, installed
from repedit.metrics.generation import continuations
from repedit.models.subject import Subject
from repedit.sites import Point, Site

# --- Diagnostics of an edit that decide nothing: what lies between two models, and where the edited one still knows


BETWEEN = (0.25, 0.5, 0.75)
LEAST = 0.05
"""A layer counts where the state of the reference costs the answer at least so many nats."""
_ROWS = 32


class _Item(NamedTuple):
    """Prompt and answer in tokens, where the answer begins, and the last token of the entity."""

    ids: list[int]
    start: int
    entity: int
    name: str


def line(edited: Subject, original: Subject, facts: Sequence[Fact]) -> dict[str, Any]:
    """Accuracy on the straight line between two models, (1 - t) original + t edited, and their distance.

    "distance": the L2 norm of the difference of all weights; "accuracy", by t, at 1/4, 1/2 and 3/4 of the way.
    """
    scratch = Scratch(original)
    ends = [dict(subject.model.named_parameters()) for subject in (original, edited)]
    squared = sum(float((b.detach() - ends[0][name].detach()).double().square().sum()) for name, b in ends[1].items())
    accuracy = {}
    for t in BETWEEN:
        with torch.no_grad():
            for name, value in scratch.subject.model.named_parameters():
                value.copy_(torch.lerp(ends[0][name], ends[1][name].to(ends[0][name]), t))
        accuracy[f"{t:g}"] = ask(scratch.subject, facts).accuracy
    return {"distance": squared**0.5, "accuracy": accuracy}


def uds(edited: Subject, original: Subject, reference: Subject, facts: Sequence[Fact]) -> dict[str, Any]:
    """How far the states at the entity lack the answer: 1 as in a model that never knew it, 0 as in the original.

    At each layer l the residual stream at the entity's last token is taken from another model and put into the
    original; D_l is the mean drop of log P(answer), D1 with the reference's state, D2 with the edited model's. Over the
    layers where D1 is above .05 nats

        UDS = sum D1 clip(D2 / D1, 0, 1) / sum D1.

    "score" is None where no layer of the reference costs anything; "layers": by layer D1 and D2; "facts": how many
    name their entity in the prompt, the others are left out.
    Reference: arXiv:2605.24614.
    """
    tokenizer = original.need_tokenizer()
    items = [item for fact in facts if (item := _item(tokenizer, fact)) is not None]
    whole = _graded(original, items, None)
    drops: list[list[float]] = []
    for other in (reference, edited):
        states = _states(other, items)
        drops.append([float((whole - _graded(original, items, (site, x))).mean()) for site, x in states.items()])
    pairs = [(d1, d2) for d1, d2 in zip(*drops, strict=True) if d1 > LEAST]
    total = sum(d1 for d1, _ in pairs)
    score = sum(min(max(d2, 0.0), d1) for d1, d2 in pairs) / total if pairs else None
    layers = {str(i): {"D1": d1, "D2": d2} for i, (d1, d2) in enumerate(zip(*drops, strict=True))}
    return {"score": score, "layers": layers, "facts": len(items)}


def _item(tokenizer: Tokenizer, fact: Fact) -> _Item | None:
    ids, start = encoded(tokenizer, fact.prompt, fact.answer)
    entity = entity_end(tokenizer, fact.prompt, fact.entity)
    return None if entity is None or not 0 < start < len(ids) else _Item(ids, start, min(entity, start - 1), fact.id)


def _states(subject: Subject, items: Sequence[_Item]) -> Mapping[Site, Float[Tensor, "n d"]]:
    """The residual stream after every layer at the last token of each entity."""
    sites = [Site(layer, Point.RESID_POST) for layer in range(len(subject.layout.layers))]
    rows: dict[Site, list[Tensor]] = {site: [torch.empty(0)] * len(items) for site in sites}
    for part, captures in captured(subject, [item.ids for item in items], sites):
        for site, x in captures.items():
            for i, state in zip(part, x, strict=True):
                rows[site][i] = state[items[i].entity]
    return {site: torch.stack(states) for site, states in rows.items()}


def _graded(
    subject: Subject, items: Sequence[_Item], replacement: tuple[Site, Float[Tensor, "n d"]] | None
) -> Float[Tensor, " n"]:
    """log P(answer) of each item in nats, with a state in the place of the model's own at the entity if one is given."""
    log_probabilities = torch.zeros(len(items), dtype=torch.float64)
    for part in lengths([item.ids for item in items], _ROWS):
        ids = torch.tensor([items[i].ids for i in part], device=subject.device)
        hooks = []
        if replacement is not None:
            site, states = replacement
            visit = _putting([items[i].entity for i in part], states[part])
            hooks = hooks_at(subject.model, subject.layout, site, visit, replaces=True)
        with torch.no_grad(), evaluating(subject.model), installed(subject.model, hooks):
            logs = at_least_float32(subject.model(input_ids=ids, use_cache=False).logits).log_softmax(-1)
        for row, i in enumerate(part):
            span = torch.arange(items[i].start, len(items[i].ids), device=subject.device)
            log_probabilities[i] = logs[row, span - 1, ids[row, span]].double().sum().cpu()
            if not bool(torch.isfinite(log_probabilities[i])):
                raise NotFinite(
                    f"fact {items[i].name!r}: log P(answer) is {log_probabilities[i]}; load the model in float32?"
                )
    return log_probabilities


def _putting(places: Sequence[int], states: Float[Tensor, "b d"]) -> Callable[[Tensor, slice, Tensor | None], Tensor]:
    def visit(x: Tensor, _at: slice, _tokens: Tensor | None) -> Tensor:
        changed = x.clone()
        changed[torch.arange(len(places)), list(places)] = states.to(x)
        return changed

    return visit


# --- What a report shows beside its verdict, and what never decides it: answers in words, and how large the edit is


TOKENS = 8
SCHEMES = ("int8", "int4")


def with_examples_and_diagnostics(report: Report, models: Mapping[str, Audited], facts: Sequence[Fact] = ()) -> Report:
    """The report with what each model writes after the examples' prompts, and what its edit is like.

    diagnostics: "update": for every changed matrix of the blocks its size, and the cosine of the rounded update with
    the true one by scheme; its mean as "survival". With facts to ask also "line", and with a reference "uds". An edit
    that lives in hooks, changed a shape or untied the head has neither update nor line, one of another width no uds.
    """
    prompts = [example["prompt"] for example in report.examples]
    pair = models["edited"], models["original"]
    # Weights that hooks change, that have another shape or that are no parameter of the other have no difference.
    apart = any(model.hooked for model in pair) or pair[0].shapes != pair[1].shapes
    both = ("edited", "original") if prompts or facts or not apart else ()
    roles = (*both, *(("reference",) if "reference" in models and (prompts or facts) else ()))
    with ExitStack() as stack:
        opened = {role: stack.enter_context(models[role].opened()) for role in roles}
        words = {role: continuations(subject, prompts, tokens=TOKENS) for role, subject in opened.items()}
        diagnostics = _update(opened["edited"], opened["original"]) if opened and not apart else {}
        if facts:
            diagnostics |= _diagnosed(opened, facts, plain=not apart)
    examples = tuple(
        {**example, **{role: texts[i] for role, texts in words.items()}, "attacked": example["answer"]}
        for i, example in enumerate(report.examples)
    )
    return replace(report, examples=examples, diagnostics={**report.diagnostics, **diagnostics})


def _diagnosed(opened: Mapping[str, Subject], facts: Sequence[Fact], *, plain: bool) -> dict[str, Any]:
    edited, original = opened["edited"], opened["original"]
    if edited.quantizer or original.quantizer:
        return {}
    diagnostics = {"line": line(edited, original, facts)} if plain else {}
    # States of one model are put into another.
    same = len({subject.layout.width for subject in opened.values()}) == 1
    if "reference" not in opened or not same:
        return diagnostics
    return diagnostics | {"uds": uds(edited, original, opened["reference"], facts)}


def _update(edited: Subject, original: Subject) -> dict[str, Any]:
    if edited.quantizer or original.quantizer:
        return {}
    by_scheme = {scheme: survival(edited, original, scheme) for scheme in SCHEMES}
    names = by_scheme[SCHEMES[0]]
    return {
        "update": {
            name: {"relative": names[name]["relative"], **{scheme: by_scheme[scheme][name]["cosine"] for scheme in SCHEMES}}
            for name in names
        },
        "survival": {s: sum(c["cosine"] for c in by_scheme[s].values()) / len(names) for s in SCHEMES if names},
    }  # fmt: skip
