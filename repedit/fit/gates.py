"""A mask of neurons learned by gradient through the frozen model: which ones to drop so that one text suffers alone.

Slower than a score from statistics, and far more selective: it sees what neurons do together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import cycle, islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from repedit.activations.forward import batches_of
from repedit.arch import hooks_at
from repedit.data import Batch, Batches, Corpus
from repedit.edit import Edit
from repedit.errors import (
    ArgumentError,
    NotFinite,
    OverlapError,
    SelectionError,
    check_seed,
    is_finite,
    is_whole,
)
from repedit.hooks import evaluating, installed
from repedit.linear_maps import Diagonal
from repedit.models.subject import Subject
from repedit.quantization import check_unquantized
from repedit.sites import Site

# Characters of an excerpt that gives one chunk of 128 tokens of code or prose.
_CHARACTERS_A_TOKEN = 5.5


def gates(
    subject: Subject,
    forget: Batches,
    retain: Batches,
    *,
    sites: str | Site | list[str | Site] = "*.mlp.neurons,*.attn.neurons",
    steps: int = 140,
    batch_size: int = 2,
    length: int = 128,
    learning_rate: float = 0.1,
    retain_weight: float = 4.0,
    seed: int = 0,
    progress: bool | None = None,
) -> Edit:
    """The mask that a gradient search finds: z_j -> [theta_j > 0] z_j, with theta trained and the weights frozen.

    Loss = mean max(0, 1 + s_y - max_{v != y} s_v) on forget (the right token y must lose to another by a margin of 1
    nat) + retain_weight * KL(original || masked) on retain. Gates are 0 or 1 in every forward pass, and the gradient
    with respect to a gate moves its theta (straight-through estimator): what is trained is what is applied. theta
    starts at 0.5, is kept in [-1, 1] and moves by Adam steps whose size falls linearly over the last 40 % of the steps.

    Args:
        batch_size: chunks of each set a step; a Corpus is sampled in excerpts, each seen once where there are enough.
        retain_weight: larger keeps more of the retain set.
    Raises:
        OverlapError: if both sets are the same data. SelectionError: if no gate closed.
        NotFinite: if a loss is not finite; the model is as it was.
    Reference: hard gates with a straight-through gradient, Bengio et al. 2013 (arXiv 1308.3432); learned neuron masks for
        localisation, Chang et al. 2024 (arXiv 2311.09060).
    """
    if forget.hash == retain.hash:
        raise OverlapError(
            f"forget and retain are the same data ({forget.name!r}); nothing could be forgotten and kept at once"
        )
    check_seed(seed=seed)
    whole = is_whole(steps) and is_whole(batch_size)
    finite = is_finite(learning_rate) and is_finite(retain_weight)
    if not whole or not finite or learning_rate <= 0 or retain_weight < 0:
        raise ArgumentError(
            f"steps={steps}, batch_size={batch_size}, learning_rate={learning_rate}, retain_weight={retain_weight}: all must be positive"
        )
    check_unquantized(subject.quantizer, subject.specs, "differentiated")
    search = _Search(subject, subject.select(sites), learning_rate)
    streams = [_stream(subject, c, steps, batch_size, length, seed) for c in (forget, retain)]
    pairs = islice(zip(*streams, strict=False), steps)
    history = []
    for step, (bad, good) in enumerate(
        tqdm(pairs, desc="gates", total=steps, disable=None if progress is None else not progress)
    ):
        with evaluating(subject.model):
            losses = search.step(bad, good, retain_weight, min(1.0, (steps - step) / (0.4 * steps)))
        history.append([round(value, 4) for value in losses])
    options = {
        "steps": steps,
        "batch_size": batch_size,
        "length": length,
        "learning_rate": learning_rate,
        "retain_weight": retain_weight,
    }
    return search.edit({
        "method": "learned gates",
        "options": options | {"sites": str(sites), "fill": "zero"},
        "seed": seed,
        **subject.made_for(subject.select(sites)),
        "data": {role: {"name": c.name, "hash": c.hash} for role, c in (("forget", forget), ("retain", retain))},
        "losses": {"what": "forget margin, retain KL (nats), every tenth step", "values": history[::10] + history[-1:]},
    })  # fmt: skip


class _Search:
    """Gate parameters of every site, and one optimisation step on them."""

    def __init__(self, subject: Subject, sites: tuple[Site, ...], rate: float) -> None:
        self.subject, self.rate, self.count = subject, rate, 0
        width = subject.layout.width_of
        self.theta = {s: torch.full((width(s.layer, s.point),), 0.5, device=subject.device) for s in sites}
        self.first = {s: torch.zeros_like(t) for s, t in self.theta.items()}
        self.second = {s: torch.zeros_like(t) for s, t in self.theta.items()}
        self.open: dict[Site, Tensor] = {}

    def step(self, forget: Batch, retain: Batch, weight: float, shrink: float) -> tuple[float, float]:
        """One Adam step; returns the forget and the retain loss."""
        with torch.no_grad():
            teacher = self._logits(retain).log_softmax(-1)
        self.open = {site: (theta > 0).float().requires_grad_() for site, theta in self.theta.items()}
        inputs = list(self.open.values())
        hooks = [
            h
            for s in self.open
            for h in hooks_at(self.subject.model, self.subject.layout, s, self._visit(s), replaces=True)
        ]
        with installed(self.subject.model, hooks), torch.enable_grad():
            bad = margin(self._logits(forget), _targets(forget))
            gradient = torch.autograd.grad(bad, inputs)
            student = self._logits(retain).log_softmax(-1)
            good = functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1).mean()
            held = torch.autograd.grad(good, inputs)
        if not bool(torch.isfinite(bad + good)):
            raise NotFinite(
                f"step {self.count}: forget loss {bad.item()}, retain loss {good.item()}; load the model in float32?"
            )
        self._adam({s: g + weight * h for s, g, h in zip(self.open, gradient, held, strict=True)}, self.rate * shrink)
        return float(bad.detach()), float(good.detach())

    def edit(self, provenance: Mapping[str, Any]) -> Edit:
        """The masks of the gates that are closed."""
        kept = {site: (theta > 0).cpu() for site, theta in self.theta.items()}
        maps = {site: Diagonal.mask(keep) for site, keep in kept.items() if not bool(keep.all())}
        if not maps:
            raise SelectionError(
                f"no gate closed in {self.count} steps; take more steps, a larger learning rate or a smaller retain_weight"
            )
        return Edit(maps, provenance)

    def _adam(self, gradients: Mapping[Site, Tensor], rate: float) -> None:
        self.count += 1
        for site, g in gradients.items():
            self.first[site].mul_(0.9).add_(g, alpha=0.1)
            self.second[site].mul_(0.99).addcmul_(g, g, value=0.01)
        second = {site: value / (1 - 0.99**self.count) for site, value in self.second.items()}
        for site, value in second.items():
            # The rms over all neurons of a kind as epsilon: those with tiny gradients do not drift at full speed.
            alike = torch.cat([v.cpu() for other, v in second.items() if other.point is site.point])
            step = (
                self.first[site] / (1 - 0.9**self.count) / (value.sqrt() + alike.mean().sqrt().to(value.device) + 1e-12)
            )
            self.theta[site] = (self.theta[site] - rate * step).clamp(-1, 1)

    def _visit(self, site: Site) -> Any:
        return lambda x, at, _tokens: x * self.open[site][at].to(x.dtype)

    def _logits(self, batch: Batch) -> Float[Tensor, "n v"]:
        mask = batch.attention_mask
        logits = self.subject.model(input_ids=batch.input_ids, attention_mask=mask.long(), use_cache=False).logits
        return logits[:, :-1][mask[:, :-1] & mask[:, 1:]].float()


def margin(logits: Float[Tensor, "n v"], targets: Tensor) -> Tensor:
    """mean max(0, 1 + s_y - max_{v != y} s_v): zero once every right token loses by 1 nat."""
    own = logits.gather(1, targets[:, None])
    rival = logits.scatter(1, targets[:, None], -torch.inf).amax(1)
    return functional.relu(1 + own[:, 0] - rival).mean()


def _targets(batch: Batch) -> Tensor:
    mask = batch.attention_mask
    return batch.input_ids[:, 1:][mask[:, :-1] & mask[:, 1:]]


def _stream(subject: Subject, corpus: Batches, steps: int, batch_size: int, length: int, seed: int) -> Iterator[Batch]:
    """Batches without end; a Corpus gives one chunk an excerpt, so that steps see many documents."""
    if isinstance(corpus, Corpus):
        corpus = corpus.excerpts(steps * batch_size, characters=int(length * _CHARACTERS_A_TOKEN), seed=seed)
    items = list(batches_of(subject, corpus, length=length, batch_size=batch_size))[:steps]
    device = subject.device
    return cycle([Batch(b.input_ids.to(device), b.attention_mask.to(device), b.document) for b in items])
