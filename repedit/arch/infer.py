"""A row of the family table, derived from a model: from its modules, the shapes of its weights and probing forward passes.

Nothing is taken from names but the kind of a branch. The branches are the outputs of modules that add up to the change of the
stream; a projection writes to it if a change of its weights along one direction moves the branch along that direction for
every token; rows feed a neuron if zeroing them makes that neuron zero and leaves the others. The row is then proved by
`repedit.arch.check.prove`, like any other.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from repedit.arch.check import TOLERANCE as PROOF_TOLERANCE
from repedit.arch.check import ArchitectureReport, prove, rewritten
from repedit.arch.layout import rows_of
from repedit.arch.offload import check_in_memory
from repedit.arch.passes import Call, Passes
from repedit.arch.spec import (
    Architecture,
    BranchKind,
    BranchRow,
    Experts,
    Reader,
    Writer,
    families,
    resolve,
    resolved,
    row_code,
    text_config,
)
from repedit.arguments import checked
from repedit.errors import RepeditError, UnknownArchitecture
from repedit.hooks import Hook, evaluating, primary
from repedit.linear_maps import Diagonal

log = logging.getLogger("repedit")

TOLERANCE = 1e-4
"""Relative error below which two tensors of a float32 forward pass count as equal."""

_KINDS: Mapping[BranchKind, re.Pattern[str]] = {
    "mlp": re.compile(r"mlp|moe|feed_?forward|ffn|expert", re.IGNORECASE),
    "mixer": re.compile(r"mamba|lstm|linear_?att|delta|conv|ssm|recurrent|rwkv|lightning|lru", re.IGNORECASE),
    "attn": re.compile(r"attn|attention", re.IGNORECASE),
}
"""What the class of a module, and then its path, must contain to be of a kind."""


@checked
@torch.no_grad()
def infer(model: Any) -> Architecture:
    """A row that describes a model, proved on it; the model is not changed.

    Args:
        model: a causal model of transformers, or one with images or sound around a causal text decoder, in memory.
    Raises:
        UnknownArchitecture: if no row describes the model, with what was found and the proof that failed.
        OffloadedTensors: if weights are not in memory.
    """
    check_in_memory(model, "load the model without device_map to infer its row")
    try:
        with evaluating(model):
            row = _row(model)
    except UnknownArchitecture as error:
        raise UnknownArchitecture(f"no row describes {model.config.model_type}: {error}") from error
    except RepeditError:
        raise
    except Exception as error:  # modules of a family may need other inputs, or shapes that no probe expects
        raise UnknownArchitecture(
            f"no row describes {model.config.model_type}: a pass over token ids alone fails: {type(error).__name__}: {error}"
        ) from error
    try:
        prove(model, resolved(row, model.config))
    except UnknownArchitecture as error:
        raise UnknownArchitecture(
            f"no row describes {model.config.model_type}: the inferred row holds for some layers or sites and not for all: {error}. To "
            f"correct it by hand, start from\n{row_code(row)}"
        ) from error
    return row


@checked
def check_architecture(model: Any, *, tolerance: float = PROOF_TOLERANCE) -> ArchitectureReport:
    """Check a model's row of the family table, or the row inferred from it, on the model itself; the model is not changed.

    A model in a half type is checked in float32, with a copy of its weights.

    Raises:
        UnknownArchitecture: if a site does not behave as the row says, naming the sites.
        OffloadedTensors: if weights are not in memory.
    """
    return prove(model, row_of(model), tolerance=tolerance)


_inferred: dict[object, Architecture] = {}


def row_of(model: Any) -> Architecture:
    """The resolved row of a model: of the family table, or inferred and proved when a model of its config is first used.

    Raises:
        UnknownArchitecture: if there is no row, and none was proved.
        OffloadedTensors: if the type has no row and weights are not in memory.
    """
    row = inferred_row(model)
    if row is None:
        return resolve(model.config)
    head, table = output_embeddings(model), model.get_input_embeddings()
    return replace(resolved(row, model.config), tied=head.weight is table.weight)


def inferred_row(model: Any) -> Architecture | None:
    """The row inferred for a model, as `infer` returns it; None if its type has a row in the family table.

    Raises:
        UnknownArchitecture, OffloadedTensors: as `infer`.
    """
    config = model.config
    if config.model_type in families():
        return None
    # Two models share a row if the config, and the class of every module with its `forward`, are the same.
    classes = tuple((name, type(m), type(m).forward) for name, m in model.named_modules())
    key = config.to_json_string(use_diff=False), classes
    if key not in _inferred:
        _inferred[key] = infer(model)
        kinds = dict.fromkeys(", ".join(branch.kind for branch in branches) for branches in _inferred[key].block)
        log.info(
            "no row for %s in the family table: inferred from the model and proved on it (blocks of %s); `repedit doctor` prints it",
            config.model_type, " or ".join(kinds),
        )  # fmt: skip
    return _inferred[key]


def output_embeddings(model: Any) -> Any:
    """The head that gives the logits, of the model or of the whole causal model within it; None if there is none."""
    decoder: Any = getattr(model, "language_model", None)
    head = model.get_output_embeddings()
    return decoder.get_output_embeddings() if head is None and decoder is not None else head


def _row(model: Any) -> Architecture:
    """The row before it is proved."""
    passes = Passes(model)
    path = _block_list(passes)
    _check_causal(passes, path)
    config, count = text_config(model.config), len(passes.lists[path])
    blocks = [_Block(passes, path, layer, config) for layer in range(count)]
    by_shape: dict[object, tuple[BranchRow, ...]] = {}
    for block in blocks:
        if block.signature not in by_shape:
            by_shape[block.signature] = block.branches()
    layers = [by_shape[block.signature] for block in blocks]
    base = ".".join(_shared(path.split("."), _path_of(model, model.get_input_embeddings()).split(".")))
    mlps = [w for rows in layers for row in rows for w in row.writers if isinstance(w, Experts) or row.kind == "mlp"]
    return Architecture(
        model_type=model.config.model_type,
        base=base,
        blocks=path.removeprefix(f"{base}.") if base else path,
        block=tuple(dict.fromkeys(layers)),
        head=_path_of(model, output_embeddings(model)),
        transposed=any(_is_conv(module) for module in blocks[0].modules.values()),
        unit_gain=any(block.unit_gain(rows) for block, rows in zip(blocks, layers, strict=True)),
        centered=blocks[0].centered(),
        gated=all(
            w.gated if isinstance(w, Experts) else len({(r.module, r.part) for r in w.readers}) != 1 for w in mlps
        ),
        parallel=any(block.parallel(rows) for block, rows in zip(blocks, layers, strict=True)),
        block_scale=blocks[0].scale,
        **_embeddings(passes, f"{path}.0", config, base),
    )


# --- Where the blocks and the embeddings are


def _block_list(passes: Passes) -> str:
    """Path of the list of blocks that carry the stream of the text decoder."""
    calls: dict[str, list[Call]] = {path: [] for path in passes.lists}
    for call in passes.calls:
        parent = call.path.rpartition(".")[0]
        if parent in calls and call.received is not None and call.returned is not None:
            calls[parent].append(call)
    chains = [path for path, own in calls.items() if _is_chain(own, len(passes.lists[path]))]
    if len(chains) > 1:
        raise UnknownArchitecture(f"a row describes one decoder and the model has several: {', '.join(chains)}")
    if not chains:
        raise UnknownArchitecture(_why_no_chain(passes, calls))
    return chains[0]


def _is_chain(calls: Sequence[Call], count: int) -> bool:
    """Whether each block ran once, in order, on what the block before it returned."""
    if _numbers(calls) != list(range(count)) or calls[0].received.ndim != 3:
        return False
    same = all(call.received.shape == call.returned.shape == calls[0].received.shape for call in calls)
    return same and all(torch.equal(one.returned, other.received) for one, other in pairwise(calls))


def _numbers(calls: Sequence[Call]) -> list[int]:
    """The places of modules in their list."""
    return [int(call.path.rpartition(".")[2]) for call in calls]


def _why_no_chain(passes: Passes, calls: Mapping[str, Sequence[Call]]) -> str:
    """What the largest list of modules that ran does instead of passing one stream from block to block."""
    sizes = {path: sum(p.numel() for p in passes.lists[path].parameters()) for path, own in calls.items() if own}
    if not sizes:
        return f"no list of blocks ran on token ids: {type(passes.model).__name__}"
    path = max(sizes, key=lambda path: sizes[path])
    numbers, count = _numbers(calls[path]), len(passes.lists[path])
    if len(set(numbers)) < len(numbers):
        return f"its blocks run several times in one pass, so that an edit of one changes the stream at several places: {path}"
    if numbers != list(range(count)):
        return f"blocks do not run on text alone, so that nothing can be proved of them: {sorted(set(range(count)) - set(numbers))} of {path}"
    if calls[path][0].received.ndim > 3:
        return f"its blocks pass several streams at a time (hyper-connections or AltUp): {path}"
    return f"its blocks do not pass one stream from block to block: {path}"


def _check_causal(passes: Passes, path: str) -> None:
    """Refuse a model in which a token changes the stream at earlier tokens.

    Raises:
        UnknownArchitecture: naming the model.
    """
    ids, last = passes.ids.clone(), f"{path}.{len(passes.lists[path]) - 1}"
    ids[:, -1] = ids[:, 0]
    other = next(call.returned for call in passes.run(ids=ids) if call.path == last)
    if not _close(passes.by_path[last].returned[:, :-1], other[:, :-1]):
        raise UnknownArchitecture(
            f"it is not a causal decoder, because a token changes the stream at tokens before it: {type(passes.model).__name__}"
        )


def _path_of(model: nn.Module, module: nn.Module) -> str:
    return next(path for path, m in model.named_modules() if m is module)


def _shared(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """What two sequences begin with alike."""
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return [item for item, _ in pairs]


def _embeddings(passes: Passes, first: str, config: Any, base: str) -> dict[str, Any]:
    """The embeddings whose sum is the stream before the first block, and what multiplies the token embedding.

    Features of images and of sound enter the stream beside the embeddings, where no weight of an embedding reaches them.
    """
    model, stream = passes.model, passes.by_path[first].received
    table = model.get_input_embeddings()
    token, rows = _path_of(model, table), table.weight.float()[passes.ids]
    towers = (name for name in model.config.sub_configs if any(w in name for w in ("vision", "audio", "image")))
    terms = {token: rows} if rows.shape == stream.shape and config is model.config and not any(towers) else {}
    sizes = (stream.numel(), stream[0].numel())
    for path, x in ((call.path, call.returned) for call in passes.calls if call.path != token and terms):
        if isinstance(model.get_submodule(path), nn.Embedding) and x.numel() in sizes and x.shape[-1] == rows.shape[-1]:
            terms[path] = x.expand(stream.shape)
    weights = _coefficients(stream, terms) or {}
    scale = weights.get(token, 0.0)
    if not scale or any(abs(c - 1) > 1e-3 for path, c in weights.items() if path != token):
        return {"embeddings": (token.removeprefix(f"{base}."),), "embedding_exact": False}
    paths, root = tuple(path.removeprefix(f"{base}.") for path in weights), rows.shape[-1] ** 0.5
    if abs(scale - 1) < 1e-3:
        return {"embeddings": paths}
    return {"embeddings": paths, "embedding_scaled": abs(scale - root) < 1e-3 * root or _named_scale(scale, config)}


def _named_scale(value: float, config: Any) -> str | float:
    """A number, or the field of a config that holds it."""
    if abs(value - 1) < 1e-3:
        return 1.0
    fields = {k: v for k, v in vars(config).items() if isinstance(v, float) and abs(v - value) < 1e-4 * abs(value)}
    named = sorted(fields, key=lambda name: ("multiplier" not in name and "scale" not in name, name))
    return named[0] if named else value


# --- Sums: which outputs add up to a tensor


def _coefficients(target: Tensor, terms: Mapping[str, Tensor]) -> dict[str, float] | None:
    """The numbers with which some of the terms add up to the target; None if they do not. Equal terms count once."""
    distinct: dict[str, Tensor] = {}
    for path, x in terms.items():
        equal = next((p for p, other in distinct.items() if _close(x.reshape(target.shape), other)), None)
        if equal is not None:
            del distinct[equal]  # the later one is nearer to the stream
        if float(x.abs().max()) > 0:
            distinct[path] = x.reshape(target.shape)
    if not distinct:
        return None
    # On the CPU: an accelerator has no solver for terms that depend on each other.
    y = target.flatten().cpu().double()
    matrix = torch.stack([x.flatten().cpu().double() for x in distinct.values()], 1)
    sizes = matrix.norm(dim=0)
    large = _solution(matrix / sizes, y).abs() > 1e-3 * y.norm()
    weights = _solution(matrix[:, large], y)
    if not large.any() or float((matrix[:, large] @ weights - y).norm()) > TOLERANCE * float(y.norm()):
        return None
    paths = [path for path, keep in zip(distinct, large.tolist(), strict=True) if keep]
    return dict(zip(paths, weights.tolist(), strict=True))


def _solution(matrix: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.lstsq(matrix, y[:, None], driver="gelsd").solution[:, 0]


def _close(x: Tensor, y: Tensor) -> bool:
    return float((x - y).norm()) <= 1e-5 * float(y.norm())


# --- One block


class _Block:
    """A block of a model, and what its modules receive and return."""

    def __init__(self, passes: Passes, blocks: str, layer: int, config: Any) -> None:
        self.passes, self.layer, self.config, self.path = passes, layer, config, f"{blocks}.{layer}"
        block = passes.model.get_submodule(self.path)
        self.kind = type(block).__name__
        self.modules: dict[str, Any] = {name: m for name, m in block.named_modules() if name}
        self.buffers = dict(block.named_buffers())
        shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
        self.signature: object = shapes, tuple(type(m).__name__ for m in self.modules.values())
        """What layers with equal branches share: the class of every module, and shapes."""
        self.generator = torch.Generator().manual_seed(layer)
        self.inputs, self.outputs = self._run()
        self.pre, self.post = self.inputs[""], self.outputs[""]
        self.width = self.pre.shape[-1]
        same = (n for n, x in self.outputs.items() if n and x.shape[-1] == self.width and x.numel() == self.pre.numel())
        self.summands = {name: self.outputs[name] for name in same if list(self.modules[name].parameters())}
        """The outputs that may be terms of the stream."""
        self.candidates: dict[str, tuple[str, bool]] = {}
        """The weight of every projection that may write to the stream, and whether its outputs are its last axis."""
        for name, module in self.modules.items():
            down = module._parameters.get("down_proj")
            if down is not None and down.ndim == 3:
                self.candidates[name] = "down_proj", getattr(module, "is_transposed", down.shape[-1] == self.width)
            elif _outputs(module) == self.width:
                self.candidates[name] = "weight", _is_conv(module)
        self.scale: str | float = 1.0
        """What multiplies the whole output of the block."""

    def _run(
        self, changed: Mapping[str, Tensor] | None = None, hooks: Sequence[Hook] = ()
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The inputs and outputs of every module of the block by path, in the order in which they finished; "" is the block."""
        ran = self.passes.run_block(self.path, changed, hooks)
        calls = {call.path[len(self.path) + 1 :]: call for call in ran}
        inputs = {path: call.received for path, call in calls.items() if call.received is not None}
        return inputs, {path: call.returned for path, call in calls.items() if call.returned is not None}

    def branches(self) -> tuple[BranchRow, ...]:
        """The branches of this block, in the order in which they ran."""
        self._check_all_ran()
        groups: list[dict[str, float]] = []
        for path, scale in self._terms().items():
            before = next(reversed(groups[-1])) if groups else path
            if before != path and self._kind(before) == self._kind(path) == "mlp" and self._read_the_same(before, path):
                groups[-1][path] = scale
            else:
                groups.append({path: scale})
        kinds = [self._kind(next(iter(group))) for group in groups]
        rows = []
        for number, (group, kind) in enumerate(zip(groups, kinds, strict=True)):
            later: BranchKind = "ple" if kind == "mlp" and "mlp" in kinds[:number] else kind
            rows.append(self._branch(group, later))
        if len({row.kind for row in rows}) < len(rows):
            raise UnknownArchitecture(
                f"a block has several branches of one kind, whose sites would share a name: {', '.join(kinds)} in {self.path}"
            )
        return tuple(rows)

    def _check_all_ran(self) -> None:
        """Refuse a block with a projection that may write to the stream and did not run, because it waits for images or sound."""
        idle = next((name for name in self.candidates if name not in self.outputs), None)
        if idle is not None:
            raise UnknownArchitecture(
                "a projection that may write to the stream does not run on text, so that nothing can be proved of it: "
                f"{self.path}.{idle}"
            )

    # What adds up to the stream

    def _terms(self) -> dict[str, float]:
        """The modules whose outputs, with the input, add up to the output of the block, and their numbers."""
        for weights in self._sums(self.post, self._differs, {"": self.pre}):
            if abs(weights.get("", 0.0)) > 1e-3 and len(weights) > 1:
                stream = weights.pop("")
                buffers = (n for n, t in self.buffers.items() if t.numel() == 1 and abs(float(t) / stream - 1) < 1e-3)
                self.scale = 1.0 if abs(stream - 1) < 1e-3 else next(buffers, stream)
                return {self._last_norm(path): c / stream for path, c in weights.items()}
        raise UnknownArchitecture(f"{self._why_no_sum()}: {self.path} ({self.kind})")

    def _sums(
        self, target: Tensor, among: Callable[[str], bool], stream: Mapping[str, Tensor] | None = None
    ) -> Iterator[dict[str, float]]:
        """The outputs that add up to a tensor, with their numbers, at each depth of the module tree; the outermost first."""
        for depth in range(1, 5):
            weights = _coefficients(target, {**(stream or {}), **self._level(depth, among)})
            if weights:
                yield weights

    def _level(self, depth: int, among: Callable[[str], bool]) -> dict[str, Tensor]:
        """Outputs of the width of the stream at one depth of the module tree; of leaves also above it."""
        own = {name for name in self.summands if name.count(".") == depth - 1}
        own |= {n for n in self.summands if n.count(".") < depth and not list(self.modules[n].children())}
        return {name: x for name, x in self.summands.items() if name in own and among(name)}

    def _differs(self, path: str) -> bool:
        """Whether a module returns something else than the block."""
        return not _close(self.outputs[path].reshape(self.post.shape), self.post)

    def _last_norm(self, path: str) -> str:
        """The norm inside a module that makes its output; the module itself if there is none."""
        x, inner = self.outputs[path], (n for n in self.outputs if n.startswith(f"{path}.") and self._is_norm(n))
        return next((n for n in inner if self.outputs[n].shape == x.shape and _close(self.outputs[n], x)), path)

    def _why_no_sum(self) -> str:
        """What a block does instead of adding the outputs of modules to its input."""
        embedded = self.passes.model.get_input_embeddings().weight.shape[1]
        if self.width > embedded and self.width % embedded == 0:
            return "its blocks pass several streams at a time (hyper-connections)"
        same = (name for depth in range(1, 5) for name in self._level(depth, lambda name: not self._differs(name)))
        if any(map(self._is_norm, same)):
            return "a norm follows the sum of the stream and a branch (post-norm), so that no weights equal an edit of the branch"
        sums = list(self._sums(self.post, self._differs))
        if any(self._is_norm(name) for weights in sums for name in weights):
            return "a block passes on a normalised stream instead of its input, so that no weights equal an edit of the stream"
        if sums:
            return "a block does not pass its input on, but starts the stream anew"
        levels = (self._by_channel(self._level(depth, self._differs)) for depth in range(1, 5))
        stream = next((weights for weights in levels if weights is not None), None)
        if stream is not None and _close(stream, torch.ones_like(stream)):
            return "a block adds a bias outside of its projections to the stream"
        if stream is not None:
            return "a block multiplies the stream channel by channel"
        return "a block is not its input plus the outputs of modules, because the stream is gated or mixed on its way"

    def _by_channel(self, level: Mapping[str, Tensor]) -> Tensor | None:
        """What multiplies each channel of the stream if a channel is a sum of those of its input, outputs and a constant."""
        pre, post = (x.reshape(-1, self.width).cpu().double() for x in (self.pre, self.post))
        others = [x.cpu().double() for n, x in level.items() if not self._is_norm(n) and bool(x.any())]
        terms = [x.reshape(post.shape) for x in others]
        matrix = torch.stack([pre, *terms, torch.ones_like(pre)], -1).movedim(1, 0)
        if matrix.shape[2] * 2 > matrix.shape[1]:
            return None
        weights = torch.linalg.lstsq(matrix, post.T[..., None]).solution
        return weights[:, 0, 0] if _close((matrix @ weights)[..., 0].T, post) else None

    def _read_the_same(self, *paths: str) -> bool:
        x, y = (self.inputs.get(path, torch.empty(0)) for path in paths)
        return x.numel() == y.numel() > 0 and _close(x.reshape(y.shape), y)

    def _kind(self, path: str) -> BranchKind:
        """The kind of a branch, by the class and the path of its module, or of the module before its norm."""
        if self._is_norm(path):
            path = next(iter(self._sources(path)))
        name = type(self.modules[path]).__name__
        # AfmoeAttention in AfmoeDecoderLayer is an "Attention".
        for text in (name[len(_shared(name, self.kind)) :], path):
            for kind, pattern in _KINDS.items():
                if pattern.search(text):
                    return kind
        return "mixer" if "mixer" in path else "mlp"

    def _is_norm(self, path: str) -> bool:
        """Whether a module is a norm with a gain: it scales its normalised input channel by channel."""
        shapes = {name: p.ndim for name, p in self.modules[path].named_parameters()}
        return bool(shapes) and shapes.keys() <= {"weight", "bias"} and set(shapes.values()) == {1}

    def _sources(self, norm: str) -> dict[str, float]:
        """The modules whose outputs add up to the input of a norm, and their numbers."""
        before = set(takewhile(lambda name: name != norm, self.outputs))
        for weights in self._sums(self.inputs[norm], before.__contains__):
            return weights
        raise UnknownArchitecture(
            f"a norm within a branch reads something else than the sum of the outputs of modules: {self.path}.{norm}"
        )

    # The writers of a branch

    def _branch(self, terms: Mapping[str, float], kind: BranchKind) -> BranchRow:
        scales = {_named_scale(scale, self.config) for scale in terms.values()}
        if len(scales) != 1:
            raise UnknownArchitecture(
                f"parts of one branch are multiplied by different numbers: {scales} in {self.path}"
            )
        first = next(iter(terms))
        norm = first if len(terms) == 1 and self._is_norm(first) else ""
        writers = [w for path in (self._sources(norm) if norm else terms) for w in self._writers(path, kind)]
        plain = len(writers) == 1 and isinstance(writers[0], Writer) and not writers[0].norm
        x = self.outputs[first]
        plain = plain and _close(self.outputs[writers[0].module].reshape(x.shape), x)
        writers.sort(key=lambda writer: isinstance(writer, Writer))  # experts first, then shared ones
        return BranchRow(kind, tuple(writers), () if norm or plain else tuple(terms), norm, scales.pop())

    def _writers(self, path: str, kind: BranchKind) -> list[Writer | Experts]:
        """The projections within a module that write its output, or the input of a norm."""
        if self._is_norm(path):
            return [replace(w, norm=path) for source in self._sources(path) for w in self._writers(source, kind)]
        inside = {n: m for n, m in self.modules.items() if n == path or n.startswith(f"{path}.")}
        writers: list[Writer | Experts] = []
        for name in filter(self.candidates.__contains__, inside):
            leaf, outputs_last = self.candidates[name]
            if self._writes(path, f"{self.path}.{name}.{leaf}", outputs_last=outputs_last):
                fused = leaf == "down_proj"
                writers.append(self._experts(name, outputs_last) if fused else Writer(name, self._readers(name, kind)))
        if not writers:
            where = f"{self.path}.{path} ({type(self.modules[path]).__name__})"
            raise UnknownArchitecture(f"{_why_no_writer(inside.values())}: {where}")
        return writers

    def _writes(self, path: str, tensor: str, *, outputs_last: bool) -> bool:
        """Whether a change of a weight along one direction of its outputs moves the output of a module along it only."""
        weight = self.passes.parameters[tensor]
        direction = torch.randn(self.width, generator=self.generator).to(weight)
        direction /= direction.norm()
        inputs = torch.randn(weight.shape[-2 if outputs_last else -1], generator=self.generator)
        outer = (inputs.to(weight) * weight.float().std())[:, None] * direction
        changed = self._run({tensor: weight + (outer if outputs_last else outer.mT)})[1].get(path)
        if changed is None or changed.shape[-1] != self.width:
            return False
        difference = changed - self.outputs[path]
        size = difference.norm()
        rest = difference - (difference @ direction)[..., None] * direction
        return bool(size > 1e-4 * self.outputs[path].norm() and rest.norm() < 1e-3 * size)

    def _experts(self, name: str, transposed: bool) -> Experts:
        module = self.modules[name]
        count = module.down_proj.shape[0]
        fields = {*vars(self.config), *getattr(self.config, "attribute_map", {})}
        named = [k for k in fields if "expert" in k and (v := getattr(self.config, k)) == count and type(v) is int]
        if not named:
            raise UnknownArchitecture(
                f"no field of the config holds the number of experts: {count} in {self.path}.{name}"
            )
        return Experts(
            name,
            count=min(named, key=lambda k: ("per_tok" in k or "shared" in k or "top" in k, k)),
            gated="gate_up_proj" in module._parameters,
            transposed=transposed,
            interleaved=not getattr(module, "is_concatenated", True),
            sorted_tokens=len(inspect.signature(module.forward).parameters) == 1,
            norm=next((f"{name}.{n}" for n, _ in module.named_children() if self._is_norm(f"{name}.{n}")), ""),
        )

    # The readers of neurons

    def _readers(self, writer: str, kind: BranchKind) -> tuple[Reader, ...]:
        """The projections whose rows feed one neuron each, in the order in which they ran."""
        if kind in ("mixer", "ple") or writer not in self.inputs:
            return ()
        differ = getattr(self.config, "is_heterogeneous", False)
        config = self.config.per_layer_config[self.layer] if differ else self.config
        heads, width = config.num_attention_heads if kind == "attn" else 0, self.inputs[writer].shape[-1]
        parent = writer.rpartition(".")[0]
        scope = f"{parent}." if parent else ""
        readers: dict[Reader, bool] = {}
        for name in self.outputs:
            inside = name.startswith(scope) and name not in ("", writer)
            for reader in _layouts(name, _outputs(self.modules[name]), width, heads) if inside else ():
                zeroes = self._feeds(writer, reader, heads)
                if zeroes and kind == "attn":
                    return (reader,)
                if zeroes is not None and not any((r.module, r.part) == (reader.module, reader.part) for r in readers):
                    readers[reader] = zeroes
        return tuple(readers) if any(readers.values()) else ()

    def _feeds(self, writer: str, reader: Reader, heads: int) -> bool | None:
        """Whether zeroing rows makes the neurons that they feed zero; None if it changes others, or not these."""
        z, module, path = self.inputs[writer], self.modules[reader.module], f"{self.path}.{reader.module}"
        view_and_group = rows_of(reader, _outputs(module), z.shape[-1], heads, transposed=_is_conv(module))
        if view_and_group is None:
            return None
        view, group = view_and_group
        # The neurons of each row; of a pruned neuron no row shows whom it feeds.
        fed = torch.arange(z.shape[-1]).view(-1, group, z.shape[-1] // (heads or z.shape[-1])).mT.flatten(0, 1)
        live = z.flatten(0, -2).any(0).cpu()[fed].any(1).nonzero()[:, 0]
        rows = live[torch.randperm(len(live), generator=self.generator)[: (len(live) + 1) // 2]]
        zeroed = Diagonal.mask(torch.ones(len(fed), dtype=torch.bool).index_fill(0, rows, False))
        names = [n for n in (f"{path}.weight", f"{path}.bias") if n in self.passes.parameters]
        changes = [(replace(view, tensor=name), zeroed.left) for name in names]
        after = self._run(rewritten(self.passes.parameters, changes))[0].get(writer)
        if after is None or after.shape != z.shape:
            return None
        neurons = fed[rows].flatten().to(z.device)
        change = (after - z).abs().flatten(0, -2).sum(0)
        others = float(change.index_fill(0, neurons, 0.0).sum())
        if not change[neurons].any() or others > 1e-5 * float(z.norm()):
            return None
        return not after[..., neurons].any()

    # Facts of the whole row

    def parallel(self, rows: Sequence[BranchRow]) -> bool:
        """Whether the second branch ignores the output of the first."""
        if len(rows) < 2 or rows[0].kind == "mlp" or rows[1].kind != "mlp":
            return False
        first, second = (row.ends for row in rows[:2])
        turned = self._run(hooks=[Hook(self.modules[first[-1]], "output", lambda x: x.flip(-1))])[1]
        return all(_close(turned[path], self.outputs[path]) for path in second)

    def unit_gain(self, rows: Sequence[BranchRow]) -> bool:
        """Whether the post-norms multiply by 1 + weight: they return something although their weights are zero."""
        norms = {name for row in rows for name in (row.norm, *(w.norm for w in row.writers)) if name}
        return any(bool(self._normed(name, self.pre, 0.0).any()) for name in norms)

    def centered(self) -> bool:
        """Whether the first norm of the block subtracts the mean."""
        for name, x in self.inputs.items():
            kind = type(self.modules[name]).__name__.lower() if name else ""
            if "norm" in kind and x.shape == self.pre.shape and _close(x, self.pre):
                return _close(self._normed(name, x + 3 * x.std()), self._normed(name, x))
        return False

    def _normed(self, norm: str, x: Tensor, scale: float = 1.0) -> Tensor:
        """What a norm makes of another input, its weights multiplied by a number."""
        names = [name for name, _ in self.modules[norm].named_parameters()]
        weights = {name: scale * self.passes.parameters[f"{self.path}.{norm}.{name}"] for name in names}
        return primary(functional_call(self.modules[norm], weights, (x,)))


def _why_no_writer(modules: Iterable[nn.Module]) -> str:
    """What a module has in place of a projection that writes its output."""
    others = [
        m for m in modules if not _outputs(m) and any(p.ndim > 1 for p in m._parameters.values() if p is not None)
    ]
    if others and all(type(m).__name__.startswith("Conv") for m in others):
        return "a convolution over tokens follows the projection of a branch, so that no weights equal an edit of the branch"
    if others:
        return "the weights that write a branch are in a form that no row describes"
    return "a function of its output follows the projection of a branch, so that no weights equal an edit of the branch"


def _outputs(module: nn.Module) -> int:
    """The number of outputs of a projection; 0 of another module."""
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 2 or not (isinstance(module, nn.Linear) or _is_conv(module)):
        return 0
    return weight.shape[1 if _is_conv(module) else 0]


def _is_conv(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # as in GPT-2: a linear map, stored (in, out)


def _layouts(name: str, rows: int, width: int, heads: int) -> list[Reader]:
    """How the rows of a projection may feed neurons, or the values of heads."""
    if not heads:
        halves = [Reader(name, part, 2, layout) for layout in ("stacked", "interleaved") for part in (0, 1)]
        return [Reader(name), *halves]
    groups = (rows * heads // width - heads) // 2  # if the rows are those of queries, keys and values
    parts = heads // groups + 2 if groups > 0 else 1
    return [Reader(name), Reader(name, layout="tail"), Reader(name, parts - 1, parts, "per_head")]
