"""Attack by ablating a direction of the residual stream, which undoes edits that hide answers behind one."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor

from repedit.activations.forward import captured
from repedit.arch import HookFn, hooks_at
from repedit.auditing.attack import Attack, AttackRecord, AttackResult, Work, ask, register, skipped
from repedit.data import Fact, Splits
from repedit.data.encoding import prompt_ids
from repedit.errors import FingerprintError, NotEnoughRows, NotFinite
from repedit.hooks import installed
from repedit.metrics.facts import FactsAccuracy
from repedit.models.subject import Subject
from repedit.sites import Point, Site

ITEMS = 64
# Models of up to SHALLOW layers are tried at each layer; deeper ones at every STEP-th layer.
SHALLOW, STEP = 8, 4
# Least norm of a difference as a fraction of the norm of a state; smaller differences are rounding.
_LEAST = 1e-6

Rows = dict[int, Float[Tensor, "n d"]]


def direction(contrast: Subject | None = None, *, items: int = ITEMS) -> Attack:
    """Ask the facts while one direction d of each layer is ablated: h - (h . d) d at resid.post, at all tokens.

    With a contrast, d is the mean state of the prompts of T in the model minus that in the contrast ("edited -
    original"). Without one, it is the mean state over the prompts of T minus that over the retain prompts ("forget -
    retain"). "first PC" is the first principal component, without centering, of the differences between both models
    or, without a contrast, of the states of T minus the mean retain state. At most 64 facts of T are read, without the
    first position of each prompt. States whose component along d is more than 3 standard deviations from the mean are
    dropped, and d is computed again.

    Each direction is ablated at all layers at once ("edited - original, all layers") and at single layers ("edited -
    original, layer 3"): every layer of models of up to 8 layers, else every fourth; the details list them. At layers
    where the models do not differ nothing is ablated. The attack is skipped if there is neither a contrast nor a
    retain fact.

    Args:
        contrast: the model before the edit.
        items: most facts of T that are read.
    Raises:
        FingerprintError: during the attack, if the contrast has another number of layers or another width.
        NotEnoughRows: during the attack, if no prompt has a second token.
        NotFinite: during the attack, if a state is not finite.
    Reference: Arditi et al. 2024, arXiv:2406.11717; Lucki et al. 2024, arXiv:2409.18025.
    """

    def run(subject: Subject, splits: Splits, seed: int) -> AttackResult:
        if contrast is None and not splits.retain:
            return skipped("needs the original to compare with, or retain facts")
        by_kind = _directions(subject, contrast, splits, items, seed)
        layers = list(range(len(subject.layout.layers)))
        layers_tried = layers if len(layers) <= SHALLOW else layers[STEP - 1 :: STEP]
        answers: dict[str, FactsAccuracy] = {}
        unchanged: list[FactsAccuracy] = []
        for kind, directions in by_kind.items():
            for name, chosen in (("all layers", layers), *((f"layer {layer}", [layer]) for layer in layers_tried)):
                removed = {layer: directions[layer] for layer in chosen if layer in directions}
                if not removed and not unchanged:
                    unchanged.append(ask(subject, splits.test))
                answers[f"{kind}, {name}"] = _asked_without(subject, removed, splits.test) if removed else unchanged[0]
        details = {
            "layers": layers_tried,
            "without": {kind: sorted(set(layers) - set(d)) for kind, d in by_kind.items()},
        }
        return AttackResult(answers, details=details)

    options = {"contrast": contrast.fingerprint() if contrast else None, "items": items}
    return Attack(DIRECTION, options, run, Work(12.0))


DIRECTION = register(
    AttackRecord(
        "direction", cost=120, budget="standard", build=lambda setup: [direction(setup.original)], level="W",
        uses_train=True, compares=True,
    )
)  # fmt: skip


def without(subject: Subject, directions: Mapping[int, Float[Tensor, " d"]]) -> AbstractContextManager[None]:
    """A context in which the unit direction of each layer is ablated from the output of its block, at all tokens."""
    sites = {Site(layer, Point.RESID_POST): d for layer, d in directions.items()}
    hooks = [
        hook
        for site, d in sites.items()
        for hook in hooks_at(subject.model, subject.layout, site, _ablation(d), replaces=True)
    ]
    return installed(subject.model, hooks)


def mean_direction(rows: Float[Tensor, "n d"], other_rows: Float[Tensor, "m d"]) -> Float[Tensor, " d"]:
    """mean(rows) - mean(other_rows), not normalized, without rows whose component along that difference is an outlier."""
    rough = rows.mean(0) - other_rows.mean(0)
    return rows[usual(rows, rough)].mean(0) - other_rows[usual(other_rows, rough)].mean(0)


def usual(rows: Float[Tensor, "n d"], d: Float[Tensor, " d"]) -> Tensor:
    """True for rows whose |row . d| is within 3 standard deviations of its mean."""
    size = (rows @ d).abs()
    return (size - size.mean()).abs() <= 3 * size.std(correction=0)


def first_component(rows: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """The first principal component of the rows, without centering."""
    n, width = rows.shape
    if n < width:
        return torch.nn.functional.normalize(rows.T @ torch.linalg.eigh(rows @ rows.T)[1][:, -1], dim=0)
    return torch.linalg.eigh(rows.T @ rows)[1][:, -1]


def _directions(
    subject: Subject, contrast: Subject | None, splits: Splits, items: int, seed: int
) -> dict[str, dict[int, Tensor]]:
    """Unit directions by kind and layer; layers where the states do not differ have none."""
    facts = _sample(splits.train, items, seed)
    forget_states = _rows(subject, subject, facts)
    if contrast is not None:
        _check_alike(subject, contrast)
        other_states = _rows(contrast, subject, facts)
    else:
        other_states = _rows(subject, subject, _sample(splits.retain, items, seed))
    mean_kind = "forget - retain" if contrast is None else "edited - original"
    by_kind: dict[str, dict[int, Tensor]] = {mean_kind: {}, "first PC": {}}
    for layer, h in forget_states.items():
        mean = mean_direction(h, other_states[layer])
        if float(mean.norm()) > 0:
            usual_rows = usual(h, mean)
            differences = h[usual_rows] - (
                other_states[layer].mean(0) if contrast is None else other_states[layer][usual_rows]
            )
        else:
            differences = h - (other_states[layer].mean(0) if contrast is None else other_states[layer])
        least = _LEAST * float(h.norm(dim=1).mean())
        if float(mean.norm()) > least:
            by_kind[mean_kind][layer] = mean / mean.norm()
        if float(differences.norm(dim=1).mean()) > least:
            by_kind["first PC"][layer] = first_component(differences)
    return by_kind


def _rows(subject: Subject, asked: Subject, facts: Sequence[Fact]) -> Rows:
    """States after every block at all positions but the first; prompts are encoded by the tokenizer of `asked`."""
    tokenizer = asked.need_tokenizer()
    prompts = [prompt_ids(tokenizer, fact.prompt) for fact in facts]
    usable = [ids for ids in prompts if len(ids) > 1]
    if not usable:
        raise NotEnoughRows("no prompt has a second token, and the first position is not read; give longer prompts")
    sites = [Site(layer, Point.RESID_POST) for layer in range(len(subject.layout.layers))]
    states: dict[int, list[Tensor]] = {site.layer: [] for site in sites}
    for _, captured_states in captured(subject, usable, sites, lambda x: x[:, 1:].flatten(0, 1)):
        for site, x in captured_states.items():
            if not bool(torch.isfinite(x).all()):
                raise NotFinite(f"{site}: a state is not finite; load the model in float32?")
            states[site.layer].append(x)
    return {layer: torch.cat(parts) for layer, parts in states.items()}


def _asked_without(subject: Subject, removed: Mapping[int, Tensor], facts: Sequence[Fact]) -> FactsAccuracy:
    with without(subject, removed):
        return ask(subject, facts)


def _ablation(d: Tensor) -> HookFn:
    def visit(x: Tensor, _at: slice, _tokens: Tensor | None) -> Tensor:
        v = d.to(x)
        return x - (x @ v)[..., None] * v

    return visit


def _sample(facts: Sequence[Fact], count: int, seed: int) -> list[Fact]:
    return random.Random(seed).sample(list(facts), min(count, len(facts)))


def _check_alike(subject: Subject, contrast: Subject) -> None:
    shapes = [(len(s.layout.layers), s.layout.width) for s in (subject, contrast)]
    if shapes[0] != shapes[1]:
        raise FingerprintError(
            f"the contrast has {shapes[1][0]} layers of width {shapes[1][1]}, the model {shapes[0][0]} of {shapes[0][1]}; "
            "give the model it was edited from"
        )
