"""An architecture as a row of data: where a family keeps its neurons, its writers and its norms."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from textwrap import indent
from typing import Any, Literal, Protocol, runtime_checkable

from repedit.arguments import checked
from repedit.errors import ArgumentError, UnknownArchitecture, nearest
from repedit.sites import Point

# --- What changes in a family that gets fewer neurons, fewer heads or a narrower stream
#
# A model that ignores one of these facts still runs, with other logits, so each row is verified by the laws of
# tests/test_slim.py and tests/test_slice.py before it may state that a width can change.


@dataclass(frozen=True)
@checked
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
# A block is a list of branches, and blocks of one model may differ. Paths are relative to a block unless stated otherwise.
# Widths are not in a row: they are read from the weights.


Layout = Literal["stacked", "interleaved", "tail", "per_head"]


@dataclass(frozen=True)
@checked
class Reader:
    """The rows of a projection that feed neurons.

    layout "stacked": neuron j is row part * f + j of [part 0; part 1; ...]; "interleaved": row parts * j + part; "tail":
    the last rows (fused q, k, v); "per_head": rows are (value heads, parts, e) and the part is that of v in each group.
    """

    module: str
    part: int = 0
    parts: int = 1
    layout: Layout = "stacked"


@dataclass(frozen=True)
@checked
class Writer:
    """A projection that writes to the residual stream, and the projections that feed its inputs, the neurons."""

    module: str
    readers: tuple[Reader, ...] = ()
    """Empty if no rows feed one neuron alone; only the columns of a pruned neuron are zeroed then."""
    norm: str = ""
    """A norm between this projection and the sum of its branch."""


@dataclass(frozen=True)
@checked
class Experts:
    """A mixture of experts, fused in memory whatever files hold."""

    module: str = "mlp.experts"
    """It holds gate_up_proj (E, 2f, d) with rows [gate; up], or up_proj (E, f, d); and down_proj (E, d, f)."""
    count: str = "num_experts"
    """Name of the config field that holds E."""
    gated: bool = True
    transposed: bool = False
    """Stored (E, in, out)."""
    interleaved: bool = False
    """The rows of gate and up alternate."""
    sorted_tokens: bool = False
    """The module receives one row per expert and token, (E * n, d), already scaled by the routing weights."""
    norm: str = ""
    """A norm between the experts and the sum of their branch."""

    @property
    def writer(self) -> Writer:
        """The projection of one expert, and those that feed its neurons."""
        name, parts = ("gate_up_proj", 2) if self.gated else ("up_proj", 1)
        layout: Layout = "interleaved" if self.interleaved else "stacked"
        readers = tuple(Reader(f"{self.module}.{name}", part, parts, layout) for part in range(parts))
        return Writer(f"{self.module}.down_proj", readers, self.norm)


BranchKind = Literal["attn", "mixer", "mlp", "ple"]


@dataclass(frozen=True)
@checked
class BranchRow:
    """A part of a block that reads the stream and adds to it.

    Kinds: attention, a mixer of tokens without attention (state space, linear attention, convolution), an MLP, per-layer
    embeddings.
    """

    kind: BranchKind
    writers: tuple[Writer | Experts, ...]
    """Their neurons follow each other in this order; their outputs, each perhaps times a number per token, add up."""
    outputs: tuple[str, ...] = ()
    """Modules whose outputs add up to what the branch adds to the stream; empty for the norm, or the only writer."""
    norm: str = ""
    """A norm between the sum and the stream."""
    scale: str | float = 1.0
    """Number that multiplies the output before it is added, or the config field that holds it."""

    @property
    def ends(self) -> tuple[str, ...]:
        """The modules whose outputs add up to what the branch adds to the stream."""
        return (self.norm,) if self.norm else self.outputs or (self.writers[0].module,)


@checked
def attention(module: str = "self_attn.o_proj", values: Reader | str = "self_attn.v_proj", norm: str = "") -> BranchRow:
    """The row of an attention, with the projection that feeds the values."""
    reader = Reader(values) if isinstance(values, str) else values
    return BranchRow("attn", (Writer(module, (reader,)),), norm=norm)


@checked
def mlp(module: str = "mlp.down_proj", *readers: Reader | str, norm: str = "") -> BranchRow:
    """The row of a dense MLP, with the projections that feed its neurons: gate and up if none is named."""
    names = readers or ("mlp.gate_proj", "mlp.up_proj")
    return BranchRow("mlp", (Writer(module, tuple(Reader(r) if isinstance(r, str) else r for r in names)),), norm=norm)


@dataclass(frozen=True)
@checked
class BiasFlag:
    """A config flag that adds a bias to every module it governs, in every layer."""

    flag: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
@checked
class Architecture:
    """One family: the paths and orientations of its modules. `resolve` fills the last fields from a config."""

    model_type: str
    base: str
    """Path of the text backbone inside the model."""
    blocks: str
    """Path of the list of blocks inside the backbone."""
    block: tuple[tuple[BranchRow, ...], ...]
    """The branches of a block in order; several lists of branches if blocks differ, each block being one of them."""
    embeddings: tuple[str, ...] = ("embed_tokens",)
    """Embeddings in the backbone that write the stream, the token embedding first."""
    embedding_scaled: bool | str | float = False
    """The token embedding is multiplied in the forward pass: True by sqrt(d), a text by that config field."""
    embedding_exact: bool = True
    """False if a norm or another function of the embeddings follows, or features of images or sound enter the stream beside
    them, so that no weights equal an edit at 0.resid.pre."""
    head: str = "lm_head"
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
    block_scale: str | float = 1.0
    """Number that multiplies the whole output of a block, the stream included, or the tensor of a block that holds it."""
    bias_flags: Mapping[Point, BiasFlag] = field(default_factory=dict)
    requires: tuple[tuple[str, object, str], ...] = ()
    """(config field, required value, what another value means), to refuse variants that the row does not describe."""

    gguf: str = ""
    """Name of the family in llama.cpp, if it differs from the model type."""
    shrink: Shrink | None = None
    """What changes with the widths of this family; None if that is not known."""

    n_layers: int = 0
    n_heads: int = 0
    layer_heads: tuple[int, ...] = ()
    """Heads of each layer, if layers differ."""
    n_experts: int = 0
    tied: bool = False
    epsilon: float = 0.0
    """What the norms of the stream add to the mean square; 0 if the stream must keep its width."""

    @property
    def experts(self) -> Experts | None:
        """The first mixture of experts of this family; None if it has none."""
        writers = (writer for branches in self.block for branch in branches for writer in branch.writers)
        return next((writer for writer in writers if isinstance(writer, Experts)), None)


_ROWS: dict[str, Architecture] = {}


@checked
def register(architecture: Architecture, *, replace: bool = False) -> None:
    """Add a family to the table; `replace=True` overrides a row.

    Raises:
        UnknownArchitecture: if the model type already has a row and `replace` is False.
        ArgumentError: if the row names no model type.
    """
    if not architecture.model_type.strip():
        raise ArgumentError(
            f"model_type={architecture.model_type!r}; give the model_type of the config, such as 'llama'"
        )
    if architecture.model_type in _ROWS and not replace:
        raise UnknownArchitecture(f"{architecture.model_type!r} already has a row; pass replace=True to override it")
    _ROWS[architecture.model_type] = architecture


@checked
def families() -> Mapping[str, Architecture]:
    """The table of families by model type."""
    return _ROWS


@runtime_checkable
class ModelConfig(Protocol):
    """The field that every config of transformers has.

    Those of the text model are in a config of their own if the model has other parts.
    """

    model_type: str


@checked
def text_config(config: ModelConfig) -> Any:
    """The config of the text decoder: the config itself, or a part of it."""
    get = getattr(config, "get_text_config", None)
    return config if get is None else get(decoder=True)


@checked
def resolve(config: ModelConfig) -> Architecture:
    """The row of the family table for a config, with heads, layers, ties and experts filled in.

    Raises:
        UnknownArchitecture: if the model type has no row, or the config is a variant the row does not describe.
    """
    row = _ROWS.get(config.model_type)
    if row is None:
        raise UnknownArchitecture(
            f"no row for model_type {config.model_type!r}; {nearest(config.model_type, _ROWS)} If it is none of them, "
            "supply one with repedit.arch.register(Architecture(model_type=..., base=..., blocks=..., block=((attention(...), "
            "mlp(...)),))) and verify it with check_architecture(model)"
        )
    return resolved(row, config)


@checked
def resolved(row: Architecture, config: ModelConfig) -> Architecture:
    """A row with the fields that a config fills in.

    Raises:
        UnknownArchitecture: if the config is a variant the row does not describe.
    """
    text = text_config(config)
    for name, value, meaning in row.requires:
        actual = getattr(text, name)
        if actual != value:
            raise UnknownArchitecture(f"{config.model_type} with {name}={actual!r} is not supported: {meaning}")

    def number(given: Any) -> Any:
        """A number of the row, or the value of the field of the config that it names."""
        return getattr(text, given) if isinstance(given, str) else given

    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text]
    attends = any(branch.kind == "attn" for branches in row.block for branch in branches)
    heads = tuple(layer.num_attention_heads for layer in layers) if attends else ()
    scaled = row.embedding_scaled
    return replace(
        row,
        block=tuple(tuple(replace(b, scale=float(number(b.scale))) for b in branches) for branches in row.block),
        n_layers=text.num_hidden_layers,
        n_heads=max(heads) if heads else 0,
        layer_heads=heads if len(set(heads)) > 1 else (),
        n_experts=getattr(text, row.experts.count) if row.experts else 0,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        embedding_scaled=float(number(scaled)) if isinstance(scaled, str) else scaled,
        epsilon=float(getattr(text, row.shrink.epsilon)) if row.shrink and not row.shrink.whole_stream else 0.0,
        parallel=bool(number(row.parallel)),
    )


# --- A row as code


@checked
def row_code(row: Architecture) -> str:
    """A row as Python code to paste, defaults left out; `eval` of it with the names of `repedit.arch` gives an equal row.

    Register it with `repedit.arch.register(...)`.
    """
    return _code(row, 100)


def _code(value: object, room: int) -> str:
    """Code of a value: on one line if that has at most `room` columns, otherwise one line for each part."""
    if isinstance(value, Point):
        return f"Point({str(value)!r})"
    if isinstance(value, tuple):
        opening, parts, closing = "(", [("", item) for item in value], ")"
    elif isinstance(value, Mapping):
        opening, parts, closing = "{", [(f"{_code(key, room)}: ", item) for key, item in value.items()], "}"
    elif is_dataclass(value):
        name, parts = _call(value)
        opening, closing = f"{name}(", ")"
    else:
        return repr(value)
    comma = "," if isinstance(value, tuple) and len(value) == 1 else ""
    line = opening + ", ".join(prefix + _code(item, sys.maxsize) for prefix, item in parts) + comma + closing
    if len(line) <= room:
        return line
    lines = [prefix + _code(item, room - 4 - len(prefix)) for prefix, item in parts]
    return "\n".join([opening, *(indent(f"{text},", "    ") for text in lines), closing])


def _call(value: Any) -> tuple[str, list[tuple[str, object]]]:
    """The function that makes a value of a row, and its arguments with the keyword before each."""
    if isinstance(value, BranchRow):
        short = _short_call(value)
        if short is not None:
            return short
    changed = [f for f in fields(value) if getattr(value, f.name) != _default(f)]
    first = () if isinstance(value, Architecture | Shrink) else ("kind", "writers", "module", "flag", "modules")
    return type(value).__name__, [
        ("" if f.name in first and f in fields(value)[:2] else f"{f.name}=", getattr(value, f.name)) for f in changed
    ]


def _default(of: Field[Any]) -> object:
    return of.default_factory() if of.default_factory is not MISSING else of.default


def _short_call(row: BranchRow) -> tuple[str, list[tuple[str, object]]] | None:
    """A branch as `attention(...)` or `mlp(...)`; None if these do not make it."""
    writer = row.writers[0]
    if not isinstance(writer, Writer) or not writer.readers:
        return None
    readers = [r.module if r == Reader(r.module) else r for r in writer.readers]
    norm: list[tuple[str, object]] = [("norm=", row.norm)] if row.norm else []
    if row == attention(writer.module, readers[0], row.norm):
        values: list[tuple[str, object]] = [] if readers == ["self_attn.v_proj"] else [("values=", readers[0])]
        return "attention", [("", writer.module), *values, *norm]
    if row == mlp(writer.module, *readers, norm=row.norm):
        arguments = [] if row == mlp(writer.module, norm=row.norm) else readers
        return "mlp", [("", writer.module), *(("", reader) for reader in arguments), *norm]
    return None
