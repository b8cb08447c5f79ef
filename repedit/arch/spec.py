"""An architecture as a row of data: where a family keeps its neurons, its writers and its norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

from repedit.errors import UnknownArchitecture, nearest
from repedit.sites import Point

# --- What changes in a family that gets fewer neurons, fewer heads or a narrower stream
#
# A model that ignores one of these facts still runs, with other logits, so each row is verified by the laws of
# tests/test_slim.py and tests/test_slice.py before it may state that a width can change.


@dataclass(frozen=True)
class Shrink:
    """The config fields and modules that depend on a width; paths are relative to a block."""

    mlp: str = "intermediate_size"
    """Config field that holds the number of neurons of an MLP."""
    expert: str = ""
    """Config field for the neurons of one expert, if dense layers have another field."""
    heads: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Modules of queries, keys and values; one module if their rows are stacked in this order."""
    attention_norm: str = "input_layernorm"
    """The norm whose output the attention reads."""
    mlp_norm: str = "post_attention_layernorm"
    """The norm whose output the MLP and a router read."""
    final_norm: str = "norm"
    """The norm in the backbone whose output the head reads."""
    epsilon: str = "rms_norm_eps"
    """Config field of the epsilon that norms add to the mean square."""
    head_norms: Mapping[str, str] = field(default_factory=dict)
    """Module of `heads` -> the norm of head width that follows it, with the same epsilon."""
    heads_must_divide_width: bool = False
    """Whether the config requires that the number of heads divides the width of the stream."""
    whole_heads: str = ""
    """Why the number of heads cannot change; empty if it can."""
    whole_stream: str = ""
    """Why the width of the stream cannot change; empty if it can."""


# --- The row of a family
#
# Paths are relative to a block unless stated otherwise. Widths are not in a row: they are read from the weights.


@dataclass(frozen=True)
class Writer:
    """A projection whose output is added to the residual stream, after the post-norm `norm` if there is one."""

    module: str
    norm: str | None = None


@dataclass(frozen=True)
class Reader:
    """The rows of a projection that feed neurons.

    layout "stacked": neuron j is row part * f + j of [part 0; part 1; ...]; "tail": the last rows (fused q, k, v);
    "per_head": rows are (head, 3, e) and the part picks q, k or v of each head.
    """

    module: str
    part: int = 0
    parts: int = 1
    layout: Literal["stacked", "tail", "per_head"] = "stacked"


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: fused tensors in memory, one tensor per expert on disk."""

    module: str = "mlp.experts"
    """In memory: gate_up_proj (E, 2f, d) with rows [gate; up], and down_proj (E, d, f)."""
    block: str = "mlp"
    """The module whose output is the routed sum, added to the stream."""
    gate: str = "mlp.experts.{e}.gate_proj.weight"
    up: str = "mlp.experts.{e}.up_proj.weight"
    down: str = "mlp.experts.{e}.down_proj.weight"
    count: str = "num_experts"
    """Name of the config field that holds E."""


@dataclass(frozen=True)
class BiasFlag:
    """A config flag that adds a bias to every module it governs, in every layer."""

    flag: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """One family: the paths and orientations of its modules. `resolve` fills the last fields from a config."""

    model_type: str
    base: str
    """Name of the backbone inside the causal model; old checkpoints may leave this prefix out."""
    blocks: str
    """Path of the list of blocks inside the backbone."""
    attention: Writer
    values: Reader
    mlp: Writer | None
    readers: tuple[Reader, ...]
    experts: Experts | None = None
    embeddings: tuple[str, ...] = ("embed_tokens",)
    """Embeddings in the backbone that write the stream, the token embedding first."""
    embedding_scaled: bool = False
    """The token embedding is multiplied by sqrt(d) in the forward pass."""
    head: str = "lm_head"
    disk_head: str = "lm_head"
    transposed: bool = False
    """Projections are Conv1D, stored (in, out)."""
    unit_gain: bool = False
    """Norms multiply by 1 + weight."""
    centered: bool = False
    """Norms subtract the mean of the stream first (LayerNorm)."""
    gated: bool = True
    """z = act(gate) * up, so the sign of z has no meaning."""
    parallel: bool | str = False
    """Whether attention and MLP read the same stream (no resid.mid), or the config flag that says so."""
    bias_flags: Mapping[Point, BiasFlag] = field(default_factory=dict)
    requires: tuple[tuple[str, object, str], ...] = ()
    """(config field, required value, what another value means), to refuse variants that the row does not describe."""

    gguf: str = ""
    """Name of the family in llama.cpp, if it differs from the model type."""
    shrink: Shrink | None = None
    """What changes with the widths of this family; None if that is not known."""

    n_layers: int = 0
    n_heads: int = 0
    n_experts: int = 0
    tied: bool = False
    epsilon: float = 0.0
    """What the norms of the stream add to the mean square; 0 if the stream must keep its width."""

    @property
    def points(self) -> tuple[Point, ...]:
        """The points this family has, in forward order."""
        return tuple(p for p in Point if not (p is Point.RESID_MID and self.parallel))


_ROWS: dict[str, Architecture] = {}


def register(architecture: Architecture, *, replace: bool = False) -> None:
    """Add a family to the table; `replace=True` overrides a row.

    Raises:
        UnknownArchitecture: if the model type already has a row and `replace` is False.
    """
    if architecture.model_type in _ROWS and not replace:
        raise UnknownArchitecture(f"{architecture.model_type!r} already has a row; pass replace=True to override it")
    _ROWS[architecture.model_type] = architecture


def families() -> Mapping[str, Architecture]:
    """The table of families by model type."""
    return _ROWS


@runtime_checkable
class ModelConfig(Protocol):
    """The fields that every config of transformers has and that `resolve` reads."""

    model_type: str
    num_hidden_layers: int
    num_attention_heads: int
    tie_word_embeddings: bool


def resolve(config: ModelConfig) -> Architecture:
    """The row of the family table for a config, with heads, layers, ties and experts filled in.

    Raises:
        UnknownArchitecture: if the model type has no row, or the config is a variant the row does not describe.
    """
    row = _ROWS.get(config.model_type)
    if row is None:
        raise UnknownArchitecture(
            f"no row for model_type {config.model_type!r}; {nearest(config.model_type, _ROWS)} "
            "Supply one with repedit.arch.register(Architecture(model_type=..., base=..., blocks=..., attention=Writer(...), "
            "values=Reader(...), mlp=Writer(...), readers=(Reader(...), ...))) and verify it with check_architecture(model)"
        )
    for name, value, meaning in row.requires:
        actual = getattr(config, name)
        if actual != value:
            raise UnknownArchitecture(f"{config.model_type} with {name}={actual!r} is not supported: {meaning}")
    return replace(
        row,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_experts=getattr(config, row.experts.count) if row.experts else 0,
        tied=bool(config.tie_word_embeddings),
        epsilon=float(getattr(config, row.shrink.epsilon)) if row.shrink and not row.shrink.whole_stream else 0.0,
        parallel=bool(getattr(config, row.parallel)) if isinstance(row.parallel, str) else row.parallel,
    )
