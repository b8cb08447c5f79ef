"""Losses of gradient unlearning, and what a loss sees of one micro-batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from repedit.activations.forward import at_least_float32
from repedit.data import Batch
from repedit.errors import (
    ArgumentError,
    UnknownName,
    check_finite_numbers,
    check_positive,
    is_finite,
    is_whole,
    nearest,
)
from repedit.fit.mrp_training import targets_of
from repedit.unlearning.parameters import layer_at
from repedit.unlearning.reference import Reference, bucketed

# --- What a loss sees of one micro-batch: labels, logits, hidden states, and the same of the reference where it asks


@dataclass(eq=False)
class Steering:
    """The control vectors of RMU: one a topic, and how long each is."""

    seed: int
    lengths: dict[str, float] = field(default_factory=dict)
    """Adaptive lengths by "topic layer", each measured once at the start weights."""

    def direction(self, topic: str, width: int) -> Float[Tensor, " d"]:
        """A random unit vector in the positive orthant, the same for a seed and a topic ever after."""
        digest = hashlib.sha256(f"{self.seed}:{topic}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        u = torch.rand(width, generator=generator, dtype=torch.float64)
        return u / u.norm()


@dataclass(eq=False)
class Seen:
    """One micro-batch as the model in training sees it."""

    batch: Batch
    logits: Float[Tensor, "b t v"]
    reference: Reference
    indices: Sequence[int] = ()
    """Which rows of their role the batch holds."""
    role: str = ""
    states: Mapping[int, Float[Tensor, "b t d"]] = field(default_factory=dict)
    """Residual streams after a layer."""
    depth: int = 1
    other: Seen | None = None
    """The same rows with their alternative answers."""
    steer: Steering | None = None
    topics: Sequence[str] = ()

    @cached_property
    def labels(self) -> Bool[Tensor, "b t"]:
        """True on the tokens a loss is about."""
        return targets_of(self.batch)

    @cached_property
    def targets(self) -> Int[Tensor, " n"]:
        """The label tokens, row after row."""
        return self.batch.input_ids[self.labels]

    @cached_property
    def label_logits(self) -> Float[Tensor, "n v"]:
        """The logits that predict the label tokens."""
        return at_least_float32(self.logits[:, :-1][self.labels[:, 1:]])

    @cached_property
    def token_nll(self) -> Float[Tensor, " n"]:
        """NLL of each label token."""
        return torch.nn.functional.cross_entropy(self.label_logits, self.targets, reduction="none")

    @cached_property
    def row_nll(self) -> Float[Tensor, " b"]:
        """l_i, the summed NLL of a row."""
        rows = self.labels.nonzero()[:, 0]
        return self.token_nll.new_zeros(len(self.labels)).index_add(0, rows, self.token_nll)

    @cached_property
    def row_count(self) -> Int[Tensor, " b"]:
        """n_i, the label tokens of a row."""
        return self.labels.sum(1)

    @cached_property
    def reference_rows(self) -> Float[Tensor, " b"]:
        """l_i under the reference."""
        return self.reference.rows(self.role, self.indices).to(self.token_nll)

    @cached_property
    def reference_logits(self) -> Float[Tensor, "n v"]:
        """The reference's logits at the labels."""
        return at_least_float32(self.reference.logits(self.batch)[:, :-1][self.labels[:, 1:]])

    @property
    def alternative(self) -> Seen:
        """The same rows with their alternative answers."""
        assert self.other is not None
        return self.other

    def hidden(self, layer: int | None) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]:
        """The stream after a layer at every real token but the first of its row, and the row of each."""
        mask = positions(self.batch)
        return at_least_float32(self.states[layer_of(layer, self.depth)][mask]), mask.nonzero()[:, 0]

    def reference_hidden(self, layer: int | None) -> Float[Tensor, "n d"]:
        """The same under the reference."""
        chosen = layer_of(layer, self.depth)
        return at_least_float32(self.reference.states(self.batch, [chosen])[chosen][positions(self.batch)])

    def steering(self, layer: int | None, coefficient: float, adaptive: bool) -> Float[Tensor, "b d"]:
        """c u of each row."""
        assert self.steer is not None
        chosen = layer_of(layer, self.depth)
        state = self.states[chosen]
        found = {}
        for topic in dict.fromkeys(self.topics):
            length = self.steer.lengths[f"{topic} {chosen}"] if adaptive else 1.0
            found[topic] = coefficient * length * self.steer.direction(topic, state.shape[-1])
        return torch.stack([found[topic] for topic in self.topics]).to(state.device)


def positions(batch: Batch) -> Bool[Tensor, "b t"]:
    """True on every real token but the first of its row, where attention sinks are."""
    return batch.attention_mask & (batch.attention_mask.cumsum(1) > 1)


def layer_of(layer: int | None, depth: int) -> int:
    """The layer asked for, or the one at 0.22 of the depth."""
    return layer_at(0.22, depth) if layer is None else layer


def count(unit: str, batch: Batch) -> int:
    """How many units of a loss a batch holds, known from the labels before any forward pass."""
    if unit == "rows":
        return len(batch.document)
    return int((targets_of(batch) if unit == "tokens" else positions(batch)).sum())


# --- Losses of gradient unlearning: each returns a sum over its unit and says what the unit is
#
# The loop divides by the count of that unit over the whole step, so that neither micro-batches nor ranks change anything.
# l_i is the summed NLL of the labels of row i, n_i their number, ref the start weights.


Unit = Literal["tokens", "rows", "positions"]
"""Label tokens, rows, or every real token but the first."""


@dataclass(frozen=True, eq=False)
class Loss:
    """What one micro-batch adds to a loss."""

    name: str
    sum: Callable[[Seen], Float[Tensor, ""]]
    """The loss summed over the units of a micro-batch."""
    unit: Unit
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: frozenset[str] = frozenset()
    """Some of "reference_rows", "reference_logits", "reference_hidden", "hidden", "alternative"."""

    def __post_init__(self) -> None:
        check_finite_numbers(**{name: value for name, value in self.options.items() if isinstance(value, float)})

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.options.items())})"


def nll() -> Loss:
    """Negative log-likelihood: sum_i l_i / sum_i n_i."""
    return Loss("nll", lambda seen: seen.token_nll.sum(), "tokens")


def negative_nll(cap: float | None = None) -> Loss:
    """Gradient ascent: - sum_i l_i / sum_i n_i. It has no minimum.

    Args:
        cap: a row whose mean NLL exceeds this many nats has no gradient.
    """
    if cap is not None and not (is_finite(cap) and cap > 0):
        raise ArgumentError(f"cap={cap}; give a number of nats above 0, or None")

    def total(seen: Seen) -> Tensor:
        if cap is None:
            return -seen.token_nll.sum()
        rows = seen.row_nll
        return -torch.where(rows / seen.row_count > cap, rows.detach(), rows).sum()

    return Loss("negative_nll", total, "tokens", {"cap": cap})


def kl(direction: str = "reference_first", cache: int | None = None) -> Loss:
    """KL divergence to the start model a label token: KL(p_ref || p), or KL(p || p_ref) with "model_first".

    Args:
        cache: read the reference once, keep its k largest probabilities at every label and put the rest in one bucket:
            no forward pass of the reference is left in a step. That is the KL of a coarser distribution, never larger than
            the true one. None reads it at every step.
    Raises:
        UnknownName: if there is no such direction.
        ArgumentError: if fewer than one token would be kept.
    """
    _known("direction", direction, ("reference_first", "model_first"))
    if cache is not None and not is_whole(cache):
        raise ArgumentError(f"cache={cache}; give a number of tokens, at least 1, or None")

    def total(seen: Seen) -> Tensor:
        q = seen.label_logits.log_softmax(-1)
        if cache is None or cache >= q.shape[1]:
            p = seen.reference_logits.log_softmax(-1)
        else:
            tokens, p = seen.reference.coarse(seen.role, seen.indices, cache)
            q, p = bucketed(q, tokens), p.to(q)
        first, second = (p, q) if direction == "reference_first" else (q, p)
        return (first.exp() * (first - second)).sum()

    return Loss("kl", total, "tokens", {"direction": direction, "cache": cache}, frozenset({"reference_logits"}))


def cross_entropy_to_reference() -> Loss:
    """- sum_v p_ref log p a label token: the gradient of `kl`, a value larger by the entropy of p_ref."""

    def total(seen: Seen) -> Tensor:
        return -(seen.reference_logits.softmax(-1) * seen.label_logits.log_softmax(-1)).sum()

    return Loss("cross_entropy_to_reference", total, "tokens", needs=frozenset({"reference_logits"}))


def npo(beta: float = 0.1) -> Loss:
    """Negative preference optimisation: -(2/beta) mean_i log sigma(beta (l_i - lref_i)).

    Reference: Zhang et al. 2024, arXiv:2404.05868, equation 3.
    """
    check_positive(beta=beta)

    def total(seen: Seen) -> Tensor:
        return -(2 / beta) * logsigmoid(beta * (seen.row_nll - seen.reference_rows)).sum()

    return Loss("npo", total, "rows", {"beta": beta}, frozenset({"reference_rows"}))


def dpo(beta: float = 0.1, alternative: bool = True) -> Loss:
    """Direct preference of another answer: -(2/beta) mean_i log sigma(beta [(lref - l)(alternative_i) - (lref - l)(i)]).

    Args:
        alternative: False leaves out the first difference, which makes it NPO.
    """
    check_positive(beta=beta)

    def total(seen: Seen) -> Tensor:
        margin = seen.row_nll - seen.reference_rows
        if alternative:
            other = seen.alternative
            margin = margin + other.reference_rows - other.row_nll
        return -(2 / beta) * logsigmoid(beta * margin).sum()

    needs = {"reference_rows"} | ({"alternative"} if alternative else set())
    return Loss("dpo", total, "rows", {"beta": beta, "alternative": alternative}, frozenset(needs))


def sim_npo(beta: float = 4.5, delta: float = 0.0) -> Loss:
    """NPO without a reference: -(2/beta) mean_i log sigma(beta (l_i / n_i - delta)).

    Reference: Fan et al. 2024, arXiv:2410.07163, equation 4.
    """
    check_positive(beta=beta)

    def total(seen: Seen) -> Tensor:
        return -(2 / beta) * logsigmoid(beta * (seen.row_nll / seen.row_count - delta)).sum()

    return Loss("sim_npo", total, "rows", {"beta": beta, "delta": delta})


def wga(beta: float = 1.0) -> Loss:
    """Weighted gradient ascent: - mean over label tokens of p^beta (detached) x NLL, p the probability of the label."""
    return Loss("wga", lambda seen: _weighted(seen, beta, 0.0), "tokens", {"beta": beta})


def satimp(beta1: float = 5.0, beta2: float = 1.0) -> Loss:
    """Saturation and importance: - mean over label tokens of p^beta1 (1 - p)^beta2 (detached) x NLL."""
    return Loss("satimp", lambda seen: _weighted(seen, beta1, beta2), "tokens", {"beta1": beta1, "beta2": beta2})


def undial(beta: float = 10.0) -> Loss:
    """Self-distillation to lowered logits: mean over label tokens of CE(softmax(z_ref - beta onehot(label)), z).

    Reference: Dong et al. 2024, arXiv:2402.10052.
    """
    check_positive(beta=beta)

    def total(seen: Seen) -> Tensor:
        lowered = seen.reference_logits.scatter_add(
            1, seen.targets[:, None], torch.full_like(seen.reference_logits[:, :1], -beta)
        )
        return -(lowered.softmax(-1) * seen.label_logits.log_softmax(-1)).sum()

    return Loss("undial", total, "tokens", {"beta": beta}, frozenset({"reference_logits"}))


def signed_nll(factor: float) -> Loss:
    """factor x the mean token NLL of a row, a row: -1 unlearns, a positive factor retains."""
    return Loss("signed_nll", lambda seen: factor * (seen.row_nll / seen.row_count).sum(), "rows", {"factor": factor})


def logit_margin() -> Loss:
    """Mean over label tokens of (max_v z - mean_v z)^2: it flattens what the model predicts."""

    def total(seen: Seen) -> Tensor:
        return (seen.label_logits.amax(-1) - seen.label_logits.mean(-1)).square().sum()

    return Loss("logit_margin", total, "tokens")


def rmu_forget(layer: int | None = None, coefficient: float = 2.0, adaptive: bool = False) -> Loss:
    """Steers the residual stream of the forget set away: mean over positions of ||h - c u||^2 / d, h at `layer`.resid.post.

    u is a random unit vector in the positive orthant, one a topic, drawn once by the seed.

    Args:
        layer: None for the layer at 0.22 of the depth.
        adaptive: c is `coefficient` x the mean norm of h over the first forget batch of the topic at the start weights.
    Reference: Li et al. 2024, arXiv:2403.03218, section 4; adaptive: Huu-Tien et al. 2024, arXiv:2408.06223.
    """

    def total(seen: Seen) -> Tensor:
        hidden, rows = seen.hidden(layer)
        target = seen.steering(layer, coefficient, adaptive)[rows].to(hidden)
        return (hidden - target).square().sum() / hidden.shape[1]

    options = {"layer": layer, "coefficient": coefficient, "adaptive": adaptive}
    return Loss("rmu_forget", total, "positions", options, frozenset({"hidden"}))


def rmu_retain(layer: int | None = None) -> Loss:
    """Keeps the residual stream of the retain set: mean over positions of ||h - h_ref||^2 / d, h at `layer`.resid.post."""

    def total(seen: Seen) -> Tensor:
        hidden, _ = seen.hidden(layer)
        return (hidden - seen.reference_hidden(layer).to(hidden)).square().sum() / hidden.shape[1]

    return Loss("rmu_retain", total, "positions", {"layer": layer}, frozenset({"hidden", "reference_hidden"}))


LOSSES: Mapping[str, Callable[..., Loss]] = {
    f.__name__: f
    for f in (nll, negative_nll, kl, cross_entropy_to_reference, npo, dpo, sim_npo, wga, satimp, undial, signed_nll,
              logit_margin, rmu_forget, rmu_retain)
}  # fmt: skip


def named(name: str) -> Callable[..., Loss]:
    """The constructor of a loss by its name.

    Raises:
        UnknownName: with the nearest names.
    """
    _known("loss", name, LOSSES)
    return LOSSES[name]


def _weighted(seen: Seen, own: float, rest: float) -> Tensor:
    probability = torch.exp(-seen.token_nll.detach())
    return -(probability**own * (1 - probability) ** rest * seen.token_nll).sum()


def _known(what: str, name: str, valid: Any) -> None:
    if name not in valid:
        raise UnknownName(f"{what}={name!r}; {nearest(name, valid)}")
