"""Reading answers off the inside of a model: its streams at the last token of a prompt, seen through its own end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from repedit.activations.passes import at_least_float32, check_ids
from repedit.arch import hooks_at
from repedit.attacks.attack import Attack, Outcome
from repedit.data import Fact, Splits
from repedit.errors import ArgumentError, NotFinite, UnknownSite
from repedit.hooks import evaluating, installed
from repedit.metrics.probability import FactsAccuracy, choice_tokens, lengths
from repedit.models import Subject
from repedit.sites import Point, Site

STREAMS = ("resid.post", "mlp.out", "attn.out", "resid.mid")
# Prompts of one length read together, and states that go through the head together.
_ROWS, _STATES = 32, 256


class Question(NamedTuple):
    """The tokens that all choices of a fact begin with, and the tokens of each choice after them."""

    prompt: list[int]
    answers: list[list[int]]
    right: int
    """Index of the right answer."""
    free: bool
    """Whether the fact has no choices; its answer is the only one here then."""


def logit_lens(*, streams: Sequence[str] = STREAMS, layers: Sequence[int] | None = None) -> Attack:
    """What the model's own final norm and head read off every stream at the last token of the prompt.

    A fact is right where the first token of its answer is strictly likelier than those of all other choices; without
    choices, where it is the likeliest of all tokens. A fact whose answer shares its first token with another choice
    is wrong, and counted in the details. Settings are named "resid.post 3"; layers None are all. Graded is the
    log-probability of the first token.

    Raises:
        UnknownSite: if there is no such point or layer; points that a family lacks (resid.mid) are left out and named.
        NotFinite: in the call, if a logit is not finite.
    Reference: Patil et al. 2023, arXiv:2309.17410.
    """
    check_streams(streams)

    def run(subject: Subject, splits: Splits, seed: int) -> Outcome:
        sites = stream_sites(subject, streams, layers)
        asked = [question(subject, fact) for fact in splits.test]
        seen = states(subject, [item.prompt for item in asked], sites)
        ids = tuple(fact.id for fact in splits.test)
        found = {named(site): FactsAccuracy(*_read(subject, seen[site], asked), ids) for site in sites}
        alike = sum(item.answers[item.right][0] in _other_heads(item) for item in asked)
        return Outcome(found, details={"same_first_token": alike, "absent": absent(subject, streams)})

    settings = {"streams": list(streams), "layers": None if layers is None else list(layers)}
    return Attack("logit_lens", "reading", "W", False, settings, run, draws=False)


def question(subject: Subject, fact: Fact, choices: Sequence[str] | None = None) -> Question:
    """A fact in tokens; `choices` None are the fact's own, or its answer alone.

    Raises:
        DataError: if no token stands before the answers, a choice has no token of its own, or one is out of the model's range.
    """
    options = list(choices or fact.choices or (fact.answer,))
    prompt, answers = choice_tokens(subject.need_tokenizer(), fact, options)
    for answer in answers:
        check_ids(subject, prompt + answer, f"fact {fact.id!r}")
    return Question(prompt, answers, options.index(fact.answer), not (choices or fact.choices))


def states(subject: Subject, prompts: Sequence[list[int]], sites: Sequence[Site]) -> dict[Site, Float[Tensor, "n d"]]:
    """The tensor at each site at the last token of each prompt, on the CPU in float32 or better."""
    found: dict[Site, list[Tensor]] = {site: [torch.empty(0)] * len(prompts) for site in sites}
    for part, seen in captured(subject, prompts, sites, lambda x: x[:, -1]):
        for site, x in seen.items():
            for row, state in zip(part, x, strict=True):
                found[site][row] = state
    return {site: torch.stack(rows) for site, rows in found.items()}


def captured(
    subject: Subject, prompts: Sequence[list[int]], sites: Sequence[Site], keep: Callable[[Tensor], Tensor]
) -> Iterator[tuple[list[int], dict[Site, Tensor]]]:
    """(numbers of prompts, keep(x) at each site) for prompts of one length together, so that nothing is padded.

    x is (b, t, d); what is kept lies on the CPU in float32 or better. No head is run and no hook stays.
    """
    for i, tokens in enumerate(prompts):
        check_ids(subject, tokens, f"prompt {i}")
    for part in lengths(prompts, _ROWS):
        ids = torch.tensor([prompts[i] for i in part], device=subject.device)
        seen: dict[Site, Tensor] = {}
        hooks = [
            hook
            for site in sites
            for hook in hooks_at(
                subject.model, subject.anatomy, site, _keeper(seen, site, ids.shape, keep), replaces=False
            )
        ]
        with torch.no_grad(), evaluating(subject.model), installed(subject.model, hooks):
            subject.model.base_model(input_ids=ids, use_cache=False)
        yield part, seen


def lens(subject: Subject, seen: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
    """The logits that the model's own end gives to states of its residual stream.

    The states take the place of the last block's output, so whatever follows it (final norm, head, a cap on the
    logits) is the model's own.
    """
    last = Site(len(subject.anatomy.layers) - 1, Point.RESID_POST)

    def put(x: Tensor, _at: slice, _tokens: Tensor | None) -> Tensor:
        return seen.to(x)[None]

    one = torch.zeros(1, 1, dtype=torch.long, device=subject.device)
    hooks = hooks_at(subject.model, subject.anatomy, last, put, replaces=True)
    with torch.no_grad(), evaluating(subject.model), installed(subject.model, hooks):
        logits = subject.model(input_ids=one, use_cache=False).logits
    return at_least_float32(logits.reshape(len(seen), -1))


def stream_sites(subject: Subject, streams: Sequence[str], layers: Sequence[int] | None) -> tuple[Site, ...]:
    """The sites of some streams at some layers (None: all), stream by stream; points the family lacks are left out."""
    count = len(subject.anatomy.layers)
    odd = [layer for layer in layers or () if not 0 <= layer < count]
    if odd:
        raise UnknownSite(f"layers {odd} do not exist; layers are 0..{count - 1}")
    points = [Point(s) for s in streams if Point(s) in subject.architecture.points]
    return tuple(Site(layer, point) for point in points for layer in (range(count) if layers is None else layers))


def absent(subject: Subject, streams: Sequence[str]) -> list[str]:
    """The streams this family does not have."""
    return [stream for stream in streams if Point(stream) not in subject.architecture.points]


def named(site: Site) -> str:
    """The name of a setting that reads a site, such as "resid.post 3"."""
    return f"{site.point} {site.layer}"


def _keeper(
    seen: dict[Site, Tensor], site: Site, shape: torch.Size, keep: Callable[[Tensor], Tensor]
) -> Callable[[Tensor, slice, Tensor | None], None]:
    def visit(x: Tensor, _at: slice, _tokens: Tensor | None) -> None:
        # OPT flattens its tokens before the MLP.
        seen[site] = at_least_float32(keep(x.reshape(*shape, -1)).detach()).cpu().clone()

    return visit


def _read(
    subject: Subject, seen: Float[Tensor, "n d"], asked: Sequence[Question]
) -> tuple[np.ndarray[Any, np.dtype[np.bool_]], np.ndarray[Any, np.dtype[np.float64]]]:
    correct, graded = [], []
    for start in range(0, len(asked), _STATES):
        logits = lens(subject, seen[start : start + _STATES])
        total = logits.logsumexp(-1)
        if not bool(torch.isfinite(total).all()):
            raise NotFinite("the logits of a stream are not finite; load the model in float32?")
        for row, end, item in zip(logits, total, asked[start : start + _STATES], strict=True):
            own = row[item.answers[item.right][0]]
            rivals = row if item.free else row[[answer[0] for answer in item.answers]]
            correct.append(int((rivals >= own).sum()) == 1)
            graded.append(float(own - end))
    return np.array(correct, dtype=bool), np.array(graded, dtype=np.float64)


def _other_heads(item: Question) -> list[int]:
    return [answer[0] for i, answer in enumerate(item.answers) if i != item.right]


def check_streams(streams: Sequence[str]) -> None:
    if not streams:
        raise ArgumentError(f"streams={streams!r}; give at least one of {STREAMS}")
    for stream in streams:
        if stream not in STREAMS:
            raise UnknownSite(f"stream {stream!r}; there are {', '.join(STREAMS)}")
