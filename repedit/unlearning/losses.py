"""Losses of gradient unlearning, what a loss reads of one micro-batch, and the reference that it compares with.

A loss returns the sum over its unit and names the unit. The training loop divides by the number of units in the whole
step, so that neither micro-batches nor ranks change the result. Notation: l_i is the summed NLL of the labels of row i,
n_i their number, and ref the reference: by default the model at the start of the training, which is never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid

from repedit.activations.forward import at_least_float32, inputs_of
from repedit.arch import HookFn, hooks_at
from repedit.arch.infer import output_embeddings
from repedit.data import Batch
from repedit.errors import (
    ArgumentError,
    ShapeError,
    check_choice,
    check_finite_numbers,
    check_positive,
    is_finite,
    is_whole,
)
from repedit.hashing import seed_of
from repedit.hooks import installed
from repedit.models.subject import Subject, shared_clone
from repedit.sites import Point, Site
from repedit.training.sampler import collate, label_logits, label_mask, logits_for
from repedit.unlearning.parameters import layer_at_depth

# --- The reference: log-probabilities and hidden states of the start weights


_HALF = (torch.bfloat16, torch.float16)
_BATCH_SIZE = 8


class Reference:
    """Forward passes of the reference, without gradients and without a second copy of any tensor."""

    def __init__(self, subject: Subject, rows: Mapping[str, Sequence[Batch]] | None = None) -> None:
        """Rows by role are those that `row_nll` and `top_log_probs` number."""
        # Modules of its own, so that hooks and the mode of the subject are not touched; the tensors are the subject's.
        model = shared_clone(subject.model).eval()
        self.subject = Subject(model, subject.tokenizer, subject.architecture)
        self.passes = 0
        """Forward passes made so far."""
        self._rows = dict(rows or {})
        self._row_nll = dict[str, Tensor]()
        self._top = dict[tuple[str, int], list[tuple[Tensor, Tensor]]]()

    def logits(self, batch: Batch) -> Float[Tensor, "b t v"]:
        """The logits of a batch."""
        self.passes += 1
        with torch.no_grad(), autocast(self.subject.model.dtype, self.subject.device):
            return self.subject.model(**inputs_of(batch)).logits

    def label_logits(self, batch: Batch) -> Float[Tensor, "n v"]:
        """The logits that predict the labels of a batch."""
        self.passes += 1
        labels = label_mask(batch)
        with torch.no_grad(), autocast(self.subject.model.dtype, self.subject.device):
            return label_logits(logits_for(self.subject, batch, labels), labels)

    def states(self, batch: Batch, layers: Sequence[int]) -> dict[int, Float[Tensor, "b t d"]]:
        """The residual stream after each of some layers."""
        states: dict[int, Tensor] = {}
        with recording_states(self.subject, layers, states):
            self.logits(batch)
        return states

    def row_nll(self, role: str, indices: Sequence[int]) -> Float[Tensor, " b"]:
        """Summed NLL of some rows of a role, in float64; all rows of the role are evaluated once, on the first call."""
        if role not in self._row_nll:
            self._row_nll[role] = torch.cat([self._batch_nll(part) for part in self._batches(role)])
        return self._row_nll[role][list(indices)]

    def top_log_probs(
        self, role: str, indices: Sequence[int], k: int
    ) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k1"]]:
        """The k most likely tokens at each label of some rows, their log-probabilities and that of all others together.

        All rows of the role are evaluated once, on the first call; from then on a label takes 12 k bytes.
        """
        if (role, k) not in self._top:
            self._top[role, k] = [row for part in self._batches(role) for row in self._batch_top(part, k)]
        tokens, log_probs = zip(*(self._top[role, k][i] for i in indices), strict=True)
        return torch.cat(tokens), torch.cat(log_probs)

    def _batches(self, role: str) -> list[Sequence[Batch]]:
        rows = self._rows[role]
        return [rows[i : i + _BATCH_SIZE] for i in range(0, len(rows), _BATCH_SIZE)]

    def _batch_nll(self, rows: Sequence[Batch]) -> Float[Tensor, " b"]:
        batch = collate(rows)
        labels = label_mask(batch)
        token_nll = nn.functional.cross_entropy(
            self.label_logits(batch), batch.input_ids[labels], reduction="none"
        ).double()
        return token_nll.new_zeros(len(rows)).index_add(0, labels.nonzero()[:, 0], token_nll)

    def _batch_top(self, rows: Sequence[Batch], k: int) -> list[tuple[Tensor, Tensor]]:
        batch = collate(rows)
        labels = label_mask(batch)
        log_probs = self.label_logits(batch).log_softmax(-1)
        tokens = log_probs.topk(k, dim=-1).indices
        sizes = labels.sum(1).tolist()
        return list(zip(tokens.split(sizes), with_rest(log_probs, tokens).split(sizes), strict=True))


def check_vocabulary(subject: Subject, reference: Subject) -> None:
    """Refuse a reference whose logits are about other tokens.

    Raises:
        ShapeError: with both vocabulary sizes.
    """
    sizes = [output_embeddings(s.model).weight.shape[0] for s in (subject, reference)]
    tokens = [None if s.tokenizer is None else s.tokenizer.get_vocab() for s in (subject, reference)]
    if sizes[0] != sizes[1] or (None not in tokens and tokens[0] != tokens[1]):
        raise ShapeError(
            f"the reference model has a vocabulary of {sizes[1]} tokens, the subject one of {sizes[0]}"
            + (", with other tokens" if sizes[0] == sizes[1] else "")
            + "; their predictions cannot be compared, give a reference of the same family"
        )


def recording_states(
    subject: Subject, layers: Sequence[int], states: dict[int, Tensor]
) -> AbstractContextManager[object]:
    """Enter the residual stream after each of some layers into `states` while a forward pass runs."""

    def record(layer: int) -> HookFn:
        def visit(x: Tensor, _channels: slice, _tokens: Tensor | None) -> None:
            states[layer] = x

        return visit

    hooks = [
        hook
        for layer in layers
        for hook in hooks_at(
            subject.model, subject.layout, Site(layer, Point.RESID_POST), record(layer), replaces=False
        )
    ]
    return installed(subject.model, hooks) if hooks else nullcontext()


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Compute in the half precision of the model although the trained tensors are float32."""
    return torch.autocast(device.type, dtype=dtype) if dtype in _HALF else nullcontext()


def with_rest(log_probs: Float[Tensor, "n v"], tokens: Int[Tensor, "n k"]) -> Float[Tensor, "n k1"]:
    """The log-probabilities of some tokens, and that of all other tokens together."""
    rest = log_probs.scatter(1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(1, tokens), rest], 1)


# --- What a loss reads: labels, logits, hidden states, and the same values of the reference on request


@dataclass(eq=False)
class ControlVectors:
    """The control vectors of RMU: one direction for each topic, and their lengths."""

    seed: int
    lengths: dict[str, float] = field(default_factory=dict)
    """Adaptive lengths by "topic layer", each measured once at the start of the training."""

    def direction(self, topic: str, width: int) -> Float[Tensor, " d"]:
        """A random unit vector in the positive orthant that depends on the seed and the topic alone."""
        generator = torch.Generator().manual_seed(seed_of(f"{self.seed}:{topic}"))
        u = torch.rand(width, generator=generator, dtype=torch.float64)
        return u / u.norm()


@dataclass(eq=False)
class ForwardPass:
    """The forward pass of the trained model on one micro-batch."""

    batch: Batch
    logits: Float[Tensor, "b s v"]
    """Those of all positions, or those that `logits_for` gives."""
    reference: Reference
    indices: Sequence[int] = ()
    """Numbers of the rows within their role."""
    role: str = ""
    states: Mapping[int, Float[Tensor, "b t d"]] = field(default_factory=dict)
    """Layer -> the residual stream after it."""
    depth: int = 1
    """Number of layers of the model."""
    other: ForwardPass | None = None
    """The same rows with their alternative answers."""
    control: ControlVectors | None = None
    topics: Sequence[str] = ()
    """The topic of each row."""

    @cached_property
    def labels(self) -> Bool[Tensor, "b t"]:
        """True on the tokens a loss is about."""
        return label_mask(self.batch)

    @cached_property
    def targets(self) -> Int[Tensor, " n"]:
        """The label tokens, row after row."""
        return self.batch.input_ids[self.labels]

    @cached_property
    def label_logits(self) -> Float[Tensor, "n v"]:
        """The logits that predict the label tokens."""
        return label_logits(self.logits, self.labels)

    @cached_property
    def token_nll(self) -> Float[Tensor, " n"]:
        """NLL of each label token."""
        return cross_entropy(self.label_logits, self.targets, reduction="none")

    @cached_property
    def row_nll(self) -> Float[Tensor, " b"]:
        """l_i, the summed NLL of each row."""
        rows = self.labels.nonzero()[:, 0]
        return self.token_nll.new_zeros(len(self.labels)).index_add(0, rows, self.token_nll)

    @cached_property
    def row_count(self) -> Int[Tensor, " b"]:
        """n_i, the number of label tokens of each row."""
        return self.labels.sum(1)

    @cached_property
    def reference_row_nll(self) -> Float[Tensor, " b"]:
        """l_i under the reference."""
        return self.reference.row_nll(self.role, self.indices).to(self.token_nll)

    @cached_property
    def reference_logits(self) -> Float[Tensor, "n v"]:
        """The logits of the reference that predict the label tokens."""
        return self.reference.label_logits(self.batch)

    @property
    def alternative(self) -> ForwardPass:
        """The same rows with their alternative answers."""
        assert self.other is not None
        return self.other

    def hidden(self, layer: int | None) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]:
        """The residual stream after a layer at every real token but the first of its row, and the row of each."""
        mask = token_positions(self.batch)
        return at_least_float32(self.states[steering_layer(layer, self.depth)][mask]), mask.nonzero()[:, 0]

    def reference_hidden(self, layer: int | None) -> Float[Tensor, "n d"]:
        """The same values under the reference."""
        number = steering_layer(layer, self.depth)
        return at_least_float32(self.reference.states(self.batch, [number])[number][token_positions(self.batch)])

    def control_vectors(self, layer: int | None, coefficient: float, adaptive: bool) -> Float[Tensor, "b d"]:
        """The control vector c u of each row."""
        assert self.control is not None
        number = steering_layer(layer, self.depth)
        vectors = {}
        for topic in dict.fromkeys(self.topics):
            length = self.control.lengths[f"{topic} {number}"] if adaptive else 1.0
            vectors[topic] = coefficient * length * self.control.direction(topic, self.states[number].shape[-1])
        return torch.stack([vectors[topic] for topic in self.topics]).to(self.states[number].device)


def token_positions(batch: Batch) -> Bool[Tensor, "b t"]:
    """True on every real token but the first of its row, which is an attention sink."""
    return batch.attention_mask & (batch.attention_mask.cumsum(1) > 1)


def steering_layer(layer: int | None, depth: int) -> int:
    """The layer given, or by default the one at 0.22 of the depth."""
    return layer_at_depth(0.22, depth) if layer is None else layer


# --- Losses


Unit = Literal["tokens", "rows", "positions"]
"""Label tokens, rows, or every real token but the first."""
Requirement = Literal["hidden", "alternative"]
"""What the loop must compute besides logits: hidden states, or the rows with their alternative answers."""


@dataclass(frozen=True, eq=False)
class Loss:
    """A loss as a sum over the units of a micro-batch."""

    name: str
    sum: Callable[[ForwardPass], Float[Tensor, ""]]
    """The loss summed over the units of a micro-batch."""
    unit: Unit
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: frozenset[Requirement] = frozenset()

    def __post_init__(self) -> None:
        check_finite_numbers(**{name: value for name, value in self.options.items() if isinstance(value, float)})

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.options.items())})"


def unit_count(unit: Unit, batch: Batch) -> int:
    """Number of units in a batch, known from the labels before any forward pass."""
    if unit == "rows":
        return len(batch.document)
    return int((label_mask(batch) if unit == "tokens" else token_positions(batch)).sum())


_C = TypeVar("_C", bound=Callable[..., Loss])
LOSSES: dict[str, Callable[..., Loss]] = {}
"""Constructors of losses by name."""


def register_loss(constructor: _C) -> _C:
    """Enter a constructor into `LOSSES` under its own name, so that recipe files can name it."""
    LOSSES[constructor.__name__] = constructor
    return constructor


def by_name(name: str) -> Callable[..., Loss]:
    """The constructor of a loss.

    Raises:
        UnknownName: with the nearest names.
    """
    check_choice(LOSSES, loss=name)
    return LOSSES[name]


@register_loss
def nll() -> Loss:
    """Negative log-likelihood: sum_i l_i / sum_i n_i."""
    return Loss("nll", lambda forward: forward.token_nll.sum(), "tokens")


@register_loss
def negative_nll(cap: float | None = None) -> Loss:
    """Gradient ascent: - sum_i l_i / sum_i n_i. It has no minimum.

    Args:
        cap: rows whose mean NLL exceeds this many nats have no gradient.
    """
    if cap is not None and not (is_finite(cap) and cap > 0):
        raise ArgumentError(f"cap={cap}; give a number of nats above 0, or None")

    def total(forward: ForwardPass) -> Tensor:
        if cap is None:
            return -forward.token_nll.sum()
        rows = forward.row_nll
        return -torch.where(rows / forward.row_count > cap, rows.detach(), rows).sum()

    return Loss("negative_nll", total, "tokens", {"cap": cap})


@register_loss
def kl(direction: str = "reference_first", cache: int | None = None) -> Loss:
    """KL divergence to the reference at each label token: KL(p_ref || p), or KL(p || p_ref) with "model_first".

    Args:
        cache: evaluate the reference once, keep its `cache` largest probabilities at every label and treat all other
            tokens as one. Steps then need no forward pass of the reference. This is the KL of a coarser distribution,
            which is never larger. None evaluates the reference in every step.
    Raises:
        UnknownName: if there is no such direction.
        ArgumentError: if fewer than one token would be kept.
    """
    check_choice(("reference_first", "model_first"), direction=direction)
    if cache is not None and not is_whole(cache):
        raise ArgumentError(f"cache={cache}; give a number of tokens, at least 1, or None")

    def total(forward: ForwardPass) -> Tensor:
        q = forward.label_logits.log_softmax(-1)
        if cache is None or cache >= q.shape[1]:
            p = forward.reference_logits.log_softmax(-1)
        else:
            tokens, p = forward.reference.top_log_probs(forward.role, forward.indices, cache)
            q, p = with_rest(q, tokens), p.to(q)
        first, second = (p, q) if direction == "reference_first" else (q, p)
        return (first.exp() * (first - second)).sum()

    return Loss("kl", total, "tokens", {"direction": direction, "cache": cache})


@register_loss
def cross_entropy_to_reference() -> Loss:
    """- sum_v p_ref log p at each label token: the gradient of `kl`, its value plus the entropy of p_ref."""

    def total(forward: ForwardPass) -> Tensor:
        return -(forward.reference_logits.softmax(-1) * forward.label_logits.log_softmax(-1)).sum()

    return Loss("cross_entropy_to_reference", total, "tokens")


@register_loss
def npo(beta: float = 0.1) -> Loss:
    """Negative preference optimization: -(2/beta) mean_i log sigma(beta (l_i - lref_i)).

    Reference: Zhang et al. 2024, arXiv:2404.05868, equation 3.
    """
    check_positive(beta=beta)

    def total(forward: ForwardPass) -> Tensor:
        return -(2 / beta) * logsigmoid(beta * (forward.row_nll - forward.reference_row_nll)).sum()

    return Loss("npo", total, "rows", {"beta": beta})


@register_loss
def dpo(beta: float = 0.1, alternative: bool = True) -> Loss:
    """Direct preference optimization of another answer.

    -(2/beta) mean_i log sigma(beta [(lref - l)(alternative_i) - (lref - l)(i)]).

    Args:
        alternative: False omits the first difference, which makes it NPO.
    """
    check_positive(beta=beta)

    def total(forward: ForwardPass) -> Tensor:
        margin = forward.row_nll - forward.reference_row_nll
        if alternative:
            other = forward.alternative
            margin = margin + other.reference_row_nll - other.row_nll
        return -(2 / beta) * logsigmoid(beta * margin).sum()

    needs: frozenset[Requirement] = frozenset({"alternative"} if alternative else ())
    return Loss("dpo", total, "rows", {"beta": beta, "alternative": alternative}, needs)


@register_loss
def sim_npo(beta: float = 4.5, delta: float = 0.0) -> Loss:
    """NPO without a reference: -(2/beta) mean_i log sigma(beta (l_i / n_i - delta)).

    Reference: Fan et al. 2024, arXiv:2410.07163, equation 4.
    """
    check_positive(beta=beta)

    def total(forward: ForwardPass) -> Tensor:
        return -(2 / beta) * logsigmoid(beta * (forward.row_nll / forward.row_count - delta)).sum()

    return Loss("sim_npo", total, "rows", {"beta": beta, "delta": delta})


@register_loss
def wga(beta: float = 1.0) -> Loss:
    """Weighted gradient ascent: - mean over label tokens of p^beta (detached) x NLL, p the probability of the label."""
    return Loss("wga", lambda forward: _weighted_ascent(forward, beta, 0.0), "tokens", {"beta": beta})


@register_loss
def satimp(beta1: float = 5.0, beta2: float = 1.0) -> Loss:
    """Saturation and importance: - mean over label tokens of p^beta1 (1 - p)^beta2 (detached) x NLL."""
    options = {"beta1": beta1, "beta2": beta2}
    return Loss("satimp", lambda forward: _weighted_ascent(forward, beta1, beta2), "tokens", options)


@register_loss
def undial(beta: float = 10.0) -> Loss:
    """Self-distillation to lowered logits: mean over label tokens of CE(softmax(z_ref - beta onehot(label)), z).

    Reference: Dong et al. 2024, arXiv:2402.10052.
    """
    check_positive(beta=beta)

    def total(forward: ForwardPass) -> Tensor:
        reference = forward.reference_logits
        lowered = reference.scatter_add(1, forward.targets[:, None], torch.full_like(reference[:, :1], -beta))
        return -(lowered.softmax(-1) * forward.label_logits.log_softmax(-1)).sum()

    return Loss("undial", total, "tokens", {"beta": beta})


@register_loss
def signed_nll(factor: float) -> Loss:
    """factor x the mean token NLL of each row, averaged over rows: -1 unlearns, a positive factor retains."""
    options = {"factor": factor}
    return Loss("signed_nll", lambda forward: factor * (forward.row_nll / forward.row_count).sum(), "rows", options)


@register_loss
def negative_entropy() -> Loss:
    """Mean over label tokens of sum_v p log p, which is least where all tokens are equally likely."""

    def total(forward: ForwardPass) -> Tensor:
        log_probs = forward.label_logits.log_softmax(-1)
        return (log_probs.exp() * log_probs).sum()

    return Loss("negative_entropy", total, "tokens")


@register_loss
def logit_margin() -> Loss:
    """Mean over label tokens of (max_v z - mean_v z)^2, which flattens the predictions."""

    def total(forward: ForwardPass) -> Tensor:
        return (forward.label_logits.amax(-1) - forward.label_logits.mean(-1)).square().sum()

    return Loss("logit_margin", total, "tokens")


@register_loss
def rmu_forget(layer: int | None = None, coefficient: float = 2.0, adaptive: bool = False) -> Loss:
    """Steer the residual stream of the forget set: mean over positions of ||h - c u||^2 / d, h at `layer`.resid.post.

    u is a random unit vector in the positive orthant, one for each topic, drawn once from the seed.

    Args:
        layer: None for the layer at 0.22 of the depth.
        adaptive: c is `coefficient` times the mean norm of h over the first forget batch of the topic at the start.
    Reference: Li et al. 2024, arXiv:2403.03218, section 4; adaptive: Huu-Tien et al. 2024, arXiv:2408.06223.
    """

    def total(forward: ForwardPass) -> Tensor:
        hidden, rows = forward.hidden(layer)
        target = forward.control_vectors(layer, coefficient, adaptive)[rows].to(hidden)
        return (hidden - target).square().sum() / hidden.shape[1]

    options = {"layer": layer, "coefficient": coefficient, "adaptive": adaptive}
    return Loss("rmu_forget", total, "positions", options, frozenset({"hidden"}))


@register_loss
def rmu_retain(layer: int | None = None) -> Loss:
    """Keep the residual stream of the retain set: mean over positions of ||h - h_ref||^2 / d, h at `layer`.resid.post."""

    def total(forward: ForwardPass) -> Tensor:
        hidden, _ = forward.hidden(layer)
        return (hidden - forward.reference_hidden(layer).to(hidden)).square().sum() / hidden.shape[1]

    return Loss("rmu_retain", total, "positions", {"layer": layer}, frozenset({"hidden"}))


def _weighted_ascent(forward: ForwardPass, power: float, complement_power: float) -> Tensor:
    p = torch.exp(-forward.token_nll.detach())
    return -(p**power * (1 - p) ** complement_power * forward.token_nll).sum()
