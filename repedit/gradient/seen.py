"""What a loss sees of one micro-batch: labels, logits, hidden states, and the same of the reference where it asks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from repedit.activations.passes import at_least_float32
from repedit.data import Batch
from repedit.fit.objective import targets_of
from repedit.gradient.parameters import layer_at
from repedit.gradient.reference import Reference


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
