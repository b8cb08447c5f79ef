"""Learned gates: a mask of neurons found by gradient through the frozen model, whose removal harms one text alone.

This is slower than a score from statistics and far more selective, because it sees what neurons do together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import cycle, islice

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from repedit.activations.forward import batches_of
from repedit.arch import HookFn, hooks_at
from repedit.arguments import checked
from repedit.data import Batch, Batches, Corpus
from repedit.edit import Edit
from repedit.errors import ArgumentError, NotFinite, OverlapError, SelectionError, check_seed, is_finite, is_whole
from repedit.hooks import check_differentiable, evaluating, installed
from repedit.linear_maps import Diagonal
from repedit.models.subject import Subject
from repedit.sites import Site
from repedit.training.optimizers import PooledAdam, linear_decay, set_lr
from repedit.training.sampler import label_logits, label_mask, logits_for

# Characters of an excerpt that give one chunk of 128 tokens of code or prose.
_CHARACTERS_PER_TOKEN = 5.5
_DECAY = 0.4


@checked
def gates(
    subject: Subject,
    forget: Batches,
    retain: Batches,
    *,
    sites: str | Site | list[str | Site] = "*.mlp.neurons,*.attn.neurons",
    steps: int = 140,
    batch_size: int = 2,
    length: int = 128,
    lr: float = 0.1,
    retain_weight: float = 4.0,
    seed: int = 0,
    progress: bool | None = None,
) -> Edit:
    """The mask that a gradient search finds: z_j -> [theta_j > 0] z_j, with theta trained and the weights frozen.

    Loss = mean max(0, 1 + s_y - max_{v != y} s_v) on forget (the right token y must lose to another by a margin of 1
    nat) + retain_weight * KL(original || masked) on retain. Gates are 0 or 1 in every forward pass, and the gradient
    with respect to a gate moves its theta (straight-through estimator): what is trained is what is applied. theta
    starts at 0.5, is kept in [-1, 1] and moves by steps of `PooledAdam`, one group for each kind of neuron, whose learning
    rate falls linearly over the last 40 % of the steps.

    Args:
        batch_size: chunks of each set in a step; a Corpus is sampled in excerpts, each seen once where there are enough.
        retain_weight: larger keeps more of the retain set.
    Raises:
        OverlapError: if both sets are the same data. SelectionError: if no gate closed.
        NotFinite: if a loss is not finite; the model is unchanged.
    Reference: hard gates with a straight-through gradient, Bengio et al. 2013 (arXiv 1308.3432); learned neuron masks for
        localisation, Chang et al. 2024 (arXiv 2311.09060).
    """
    if forget.hash == retain.hash:
        raise OverlapError(
            f"forget and retain are the same data ({forget.name!r}); the same text cannot be both forgotten and retained"
        )
    check_seed(seed=seed)
    check_differentiable(subject.model)
    counts = is_whole(steps) and is_whole(batch_size)
    rates = is_finite(lr) and lr > 0 and is_finite(retain_weight) and retain_weight >= 0
    if not (counts and rates):
        raise ArgumentError(
            f"steps={steps}, batch_size={batch_size}, lr={lr}, retain_weight={retain_weight}: steps and batch_size must be "
            "whole numbers of at least 1, lr above 0, retain_weight at least 0"
        )
    subject.check_unquantized("differentiated")
    chosen = subject.select(sites)
    search = _Search(subject, chosen)
    streams = [_batches(subject, c, steps, batch_size, length, seed) for c in (forget, retain)]
    pairs = islice(zip(*streams, strict=False), steps)
    history = []
    for step, (forget_batch, retain_batch) in enumerate(
        tqdm(pairs, desc="gates", total=steps, disable=None if progress is None else not progress)
    ):
        with evaluating(subject.model):
            losses = search.step(forget_batch, retain_batch, retain_weight, lr * linear_decay(step, steps, _DECAY))
        history.append([round(value, 4) for value in losses])
    return search.edit({
        "method": "learned gates",
        "options": {
            # "learning_rate" is the name in the files of earlier versions.
            "steps": steps, "batch_size": batch_size, "length": length, "learning_rate": lr, "retain_weight": retain_weight,
            "sites": str(sites), "fill": "zero",
        },
        "seed": seed,
        **subject.made_for(chosen),
        "data": {role: {"name": c.name, "hash": c.hash} for role, c in (("forget", forget), ("retain", retain))},
        "losses": {"what": "forget margin, retain KL (nats), every tenth step", "values": history[::10] + history[-1:]},
    })  # fmt: skip


class _Search:
    """Gate parameters of every site, and one optimization step on them."""

    def __init__(self, subject: Subject, sites: tuple[Site, ...]) -> None:
        self.subject, self.steps = subject, 0
        width = subject.layout.width_of
        self.theta = {s: torch.full((width(s.layer, s.point),), 0.5, device=subject.device) for s in sites}
        points = dict.fromkeys(site.point for site in sites)
        groups = [{"params": [t for site, t in self.theta.items() if site.point is point]} for point in points]
        self.optimizer = PooledAdam(groups, betas=(0.9, 0.99), eps=1e-12)
        self.open: dict[Site, Tensor] = {}
        """1 where a gate is open, 0 where it is closed."""

    def step(self, forget: Batch, retain: Batch, retain_weight: float, lr: float) -> tuple[float, float]:
        """One step; returns the forget and the retain loss."""
        with torch.no_grad():
            original = self._logits(retain).log_softmax(-1)
        self.open = {site: (theta > 0).float().requires_grad_() for site, theta in self.theta.items()}
        gates = list(self.open.values())
        model, layout = self.subject.model, self.subject.layout
        hooks = [hook for s in self.open for hook in hooks_at(model, layout, s, self._visit(s), replaces=True)]
        with installed(model, hooks), torch.enable_grad():
            forget_loss = margin(self._logits(forget), forget.input_ids[label_mask(forget)])
            forget_gradients = torch.autograd.grad(forget_loss, gates)
            masked = self._logits(retain).log_softmax(-1)
            retain_loss = functional.kl_div(masked, original, log_target=True, reduction="none").sum(-1).mean()
            retain_gradients = torch.autograd.grad(retain_loss, gates)
        if not bool(torch.isfinite(forget_loss + retain_loss)):
            raise NotFinite(
                f"step {self.steps}: forget loss {forget_loss.item()}, retain loss {retain_loss.item()}; load the model in float32?"
            )
        for theta, f, r in zip(self.theta.values(), forget_gradients, retain_gradients, strict=True):
            theta.grad = f + retain_weight * r
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        for theta in self.theta.values():
            theta.clamp_(-1, 1)
        self.steps += 1
        return float(forget_loss.detach()), float(retain_loss.detach())

    def edit(self, provenance: Mapping[str, object]) -> Edit:
        """The masks of the closed gates."""
        keep = {site: (theta > 0).cpu() for site, theta in self.theta.items()}
        maps = {site: Diagonal.mask(mask) for site, mask in keep.items() if not bool(mask.all())}
        if not maps:
            raise SelectionError(
                f"no gate closed in {self.steps} steps; use more steps, a larger lr or a smaller retain_weight"
            )
        return Edit(maps, provenance)

    def _visit(self, site: Site) -> HookFn:
        return lambda x, channels, _tokens: x * self.open[site][channels].to(x.dtype)

    def _logits(self, batch: Batch) -> Float[Tensor, "n v"]:
        labels = label_mask(batch)
        return label_logits(logits_for(self.subject, batch, labels, whole=True), labels)


def margin(logits: Float[Tensor, "n v"], targets: Tensor) -> Float[Tensor, ""]:
    """mean max(0, 1 + s_y - max_{v != y} s_v): zero once every right token loses by 1 nat."""
    own = logits.gather(1, targets[:, None])
    rival = logits.scatter(1, targets[:, None], -torch.inf).amax(1)
    return functional.relu(1 + own[:, 0] - rival).mean()


def _batches(subject: Subject, corpus: Batches, steps: int, batch_size: int, length: int, seed: int) -> Iterator[Batch]:
    """Batches without end, of whole texts; a Corpus gives one chunk of each excerpt, so that steps see many documents."""
    if isinstance(corpus, Corpus):
        corpus = corpus.excerpts(steps * batch_size, characters=int(length * _CHARACTERS_PER_TOKEN), seed=seed)
    batches = islice(batches_of(subject, corpus, length=length, batch_size=batch_size), steps)
    device = subject.device
    return cycle([Batch(b.input_ids.to(device), b.attention_mask.to(device), b.document) for b in batches])
