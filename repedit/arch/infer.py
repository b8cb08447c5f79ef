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
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from repedit.arch.check import TOLERANCE as PROOF_TOLERANCE
from repedit.arch.check import ArchitectureReport, BlockRuns, prove, text_ids
from repedit.arch.offload import check_in_memory
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
from repedit.errors import HookError, RepeditError, UnknownArchitecture
from repedit.hooks import Hook, claimed, evaluating, installed, primary

log = logging.getLogger("repedit")

TOLERANCE = 1e-4
"""Relative error below which two tensors of a float32 forward pass count as equal."""

_KINDS: Mapping[BranchKind, re.Pattern[str]] = {
    "mlp": re.compile(r"mlp|moe|feed_?forward|ffn|expert", re.IGNORECASE),
    "mixer": re.compile(r"mamba|lstm|linear_?att|delta|conv|ssm|recurrent|rwkv|lightning|lru", re.IGNORECASE),
    "attn": re.compile(r"attn|attention", re.IGNORECASE),
}
"""What the class of a module, and then its path, must contain to be of a kind."""


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


def check_architecture(model: Any, *, tolerance: float = PROOF_TOLERANCE) -> ArchitectureReport:
    """Check a model's row of the family table, or the row inferred from it, on the model itself; the model is not changed.

    A model in a half type is checked in float32, with a copy of its weights.

    Raises:
        UnknownArchitecture: if a site does not behave as the row says, naming the sites.
        OffloadedTensors: if weights are not in memory.
    """
    check_in_memory(model, "load the model without device_map to check it")
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
    path = _block_list(model)
    _check_causal(model, path)
    config = text_config(model.config)
    count = len(model.get_submodule(path))
    runs = BlockRuns(model, [f"{path}.{i}" for i in range(count)])
    probes = [_BlockProbe(runs, i, config) for i in range(count)]
    by_shape: dict[object, tuple[BranchRow, ...]] = {}
    layers = []
    for probe in probes:
        key = probe.signature()
        if key not in by_shape:
            by_shape[key] = probe.branches()
        layers.append(by_shape[key])
    head = _path_of(model, output_embeddings(model))
    table = _path_of(model, model.get_input_embeddings())
    base = _common(path, table)
    embeddings = _embeddings(model, runs, config, base)
    readers = [len({(r.module, r.part) for r in w.readers}) for b in layers for x in b for w in x.writers
               if x.kind == "mlp" and isinstance(w, Writer)]  # fmt: skip
    experts = [w.gated for b in layers for x in b for w in x.writers if isinstance(w, Experts)]
    return Architecture(
        model_type=model.config.model_type,
        base=base,
        blocks=path.removeprefix(f"{base}.") if base else path,
        block=tuple(dict.fromkeys(layers)),
        head=head,
        transposed=any(_is_conv(module) for module in runs.block(0).modules()),
        unit_gain=any(probe.unit_gain(layer) for probe, layer in zip(probes, layers, strict=True)),
        centered=probes[0].centered(),
        gated=all(n != 1 for n in readers) and all(experts),
        parallel=any(probe.parallel(layer) for probe, layer in zip(probes, layers, strict=True)),
        block_scale=probes[0].block_scale,
        **embeddings,
    )


# --- Where the blocks and the embeddings are


def _block_list(model: nn.Module) -> str:
    """Path of the list of blocks that carry the stream of the text decoder."""
    lists = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    calls: dict[str, list[_Call]] = {path: [] for path in lists}
    with _recorded(
        {f"{path}.{i}": module for path, modules in lists.items() for i, module in enumerate(modules)}
    ) as seen:
        _run_on_text(model)
    for call in seen:
        if call.received is not None and call.returned is not None:
            calls[call.path.rpartition(".")[0]].append(call)
    chains = [path for path, own in calls.items() if _is_chain(own, len(lists[path]))]
    if len(chains) > 1:
        raise UnknownArchitecture(f"a row describes one decoder and the model has several: {', '.join(chains)}")
    if not chains:
        raise UnknownArchitecture(_why_no_chain(type(model).__name__, lists, calls))
    return chains[0]


def _why_no_chain(name: str, lists: Mapping[str, nn.ModuleList], calls: Mapping[str, list[_Call]]) -> str:
    """What the largest list of modules that ran does instead of passing one stream from block to block."""
    sizes = {path: sum(p.numel() for p in lists[path].parameters()) for path, seen in calls.items() if seen}
    if not sizes:
        return f"no list of blocks ran on token ids: {name}"
    path = max(sizes, key=lambda path: sizes[path])
    numbers, count = [call.number for call in calls[path]], len(lists[path])
    if numbers != list(range(count)):
        if len(set(numbers)) < len(numbers):
            return f"its blocks run several times in one pass, so that an edit of one changes the stream at several places: {path}"
        return f"blocks do not run on text alone, so that nothing can be proved of them: {sorted(set(range(count)) - set(numbers))} of {path}"
    if calls[path][0].received.ndim > 3:
        return f"its blocks pass several streams at a time (hyper-connections or AltUp): {path}"
    return f"its blocks do not pass one stream from block to block: {path}"


def _check_causal(model: nn.Module, path: str) -> None:
    """Refuse a model in which a token changes the stream at earlier tokens.

    Raises:
        UnknownArchitecture: naming the model.
    """
    last = model.get_submodule(path)[-1]  # type: ignore[index]
    ids, streams = text_ids(model), []
    other = ids.clone()
    other[:, -1] = ids[:, 0]
    with claimed(model), installed(model, [Hook(last, "output", lambda x: streams.append(x.float()))]):
        for tokens in (ids, other):
            model(input_ids=tokens, use_cache=False)
    if not _close(streams[0][:, :-1], streams[1][:, :-1]):
        raise UnknownArchitecture(
            f"it is not a causal decoder, because a token changes the stream at tokens before it: {type(model).__name__}"
        )


def _is_chain(seen: Sequence[_Call], count: int) -> bool:
    """Whether each block ran once, in order, on what the block before it returned."""
    if [call.number for call in seen] != list(range(count)) or seen[0].received.ndim != 3:
        return False
    same = all(call.received.shape == call.returned.shape == seen[0].received.shape for call in seen)
    return same and all(torch.equal(one.returned, other.received) for one, other in pairwise(seen))


def _run_on_text(model: nn.Module) -> None:
    with claimed(model):
        model(input_ids=text_ids(model), use_cache=False)


def _path_of(model: nn.Module, module: nn.Module) -> str:
    return next(path for path, m in model.named_modules() if m is module)


def _common(first: str, second: str) -> str:
    """The longest common path."""
    pairs = zip(first.split("."), second.split("."), strict=False)
    shared = []
    for a, b in pairs:
        if a != b:
            break
        shared.append(a)
    return ".".join(shared)


def _embeddings(model: nn.Module, runs: BlockRuns, config: Any, base: str) -> dict[str, Any]:
    """The embeddings whose sum is the stream before the first block, and what multiplies the token embedding.

    Features of images and of sound enter the stream beside the embeddings, where no weight of an embedding reaches them.
    """
    token = _path_of(model, model.get_input_embeddings())  # type: ignore[operator]
    width, shape = runs.embedded.shape[-1], runs.embedded.shape
    hook_only = {"embeddings": (token.removeprefix(f"{base}."),), "embedding_exact": False}
    others_enter = config is not model.config or any(
        word in name for name in model.config.sub_configs for word in ("vision", "audio", "image")
    )
    rows = model.get_input_embeddings().weight.float()[runs.ids]  # type: ignore[operator]
    if rows.shape[-1] != width or others_enter:
        return hook_only
    embeddings = {p: m for p, m in model.named_modules() if isinstance(m, nn.Embedding) and p != token}
    with _recorded({p: m for p, m in embeddings.items() if m.weight.shape[1] == width}) as seen:
        _run_on_text(model)
    sizes = (shape.numel(), shape[1:].numel())
    terms = {token: rows} | {call.path: call.returned.expand(shape) for call in seen if call.returned.numel() in sizes}
    weights = _coefficients(runs.embedded, terms)
    if (
        weights is None
        or any(abs(c - 1) > 1e-3 for path, c in weights.items() if path != token)
        or token not in weights
    ):
        return hook_only
    paths = tuple(path.removeprefix(f"{base}.") for path in weights)
    scale = weights[token]
    if abs(scale - 1) < 1e-3:
        return {"embeddings": paths}
    root = abs(scale - width**0.5) < 1e-3 * width**0.5
    return {"embeddings": paths, "embedding_scaled": root or _named_scale(scale, config)}


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
    matrix = torch.stack([x.flatten().double() for x in distinct.values()], 1)
    sizes, y = matrix.norm(dim=0), target.flatten().double()
    weights = torch.linalg.lstsq(matrix / sizes, y[:, None], driver="gelsd").solution[:, 0] / sizes
    large = (weights.abs() * sizes) > 1e-3 * y.norm()
    paths = [path for path, keep in zip(distinct, large.tolist(), strict=True) if keep]
    if not paths:
        return None
    chosen = matrix[:, large]
    weights = torch.linalg.lstsq(chosen, y[:, None], driver="gelsd").solution[:, 0]
    if float((chosen @ weights - y).norm()) > TOLERANCE * float(y.norm()):
        return None
    return dict(zip(paths, weights.tolist(), strict=True))


def _close(x: Tensor, y: Tensor) -> bool:
    return float((x - y).norm()) <= 1e-5 * float(y.norm())


# --- One block


@dataclass
class _Term:
    """A module whose output is a part of a sum, and the number it is multiplied with."""

    path: str
    scale: float


class _BlockProbe:
    """Forward passes of one block with hooks and with changed weights."""

    def __init__(self, runs: BlockRuns, layer: int, config: Any) -> None:
        self.runs, self.layer, self.config = runs, layer, config
        self.block, self.path = runs.block(layer), runs.block_paths[layer]
        self.modules = {name: m for name, m in self.block.named_modules() if name}
        self.generator = torch.Generator().manual_seed(layer)
        self.inputs, self.outputs = self._tensors()
        self.width = self.inputs[""].shape[-1]
        self.block_scale: str | float = 1.0

    def signature(self) -> object:
        """What layers with equal branches share: the class of every module, and shapes."""
        shapes = tuple((name, tuple(p.shape)) for name, p in self.block.named_parameters())
        return shapes, tuple(type(m).__name__ for m in self.modules.values())

    def branches(self) -> tuple[BranchRow, ...]:
        """The branches of this block, in the order in which they ran."""
        self._check_all_ran()
        groups: list[list[_Term]] = []
        for term in self._terms():
            previous = groups[-1][-1] if groups else None
            shared = previous is not None and self._kind(previous.path) == self._kind(term.path) == "mlp"
            if previous and shared and _close(*self._inputs_of(previous.path, term.path)):
                groups[-1].append(term)
            else:
                groups.append([term])
        kinds = [self._kind(group[0].path) for group in groups]
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
        for name, module in self.modules.items():
            down = module._parameters.get("down_proj")
            writes = _is_projection(module) and _outputs(module) == self.width
            if name not in self.outputs and (writes or (down is not None and down.ndim == 3)):
                raise UnknownArchitecture(
                    "a projection that may write to the stream does not run on text, so that nothing can be proved of it: "
                    f"{self.path}.{name}"
                )

    # What adds up to the stream

    def _terms(self) -> list[_Term]:
        """The modules whose outputs, with the input, add up to the output of the block."""
        for weights in self._sums(self.outputs[""], self._differs, {"": self.inputs[""]}):
            if abs(weights.get("", 0.0)) > 1e-3 and len(weights) > 1:
                stream = weights.pop("")
                self.block_scale = self._scalar(stream)
                return [_Term(self._last_norm(path), c / stream) for path, c in weights.items()]
        raise UnknownArchitecture(f"{self._why_no_sum()}: {self.path} ({type(self.block).__name__})")

    def _sums(
        self, target: Tensor, among: Callable[[str], bool], stream: Mapping[str, Tensor] | None = None
    ) -> Iterator[dict[str, float]]:
        """The outputs that add up to a tensor, with their numbers, at each depth of the module tree; the outermost first."""
        for depth in range(1, 5):
            terms = {n: x for n, x in self._level(depth).items() if among(n)}
            weights = _coefficients(target, {**(stream or {}), **terms})
            if weights:
                yield weights

    def _differs(self, path: str) -> bool:
        """Whether a module returns something else than the block."""
        post = self.outputs[""]
        return not _close(self.outputs[path].reshape(post.shape), post)

    def _last_norm(self, path: str) -> str:
        """The norm inside a module that makes its output; the module itself if there is none."""
        x, inner = self.outputs[path], [n for n in self.outputs if n.startswith(f"{path}.")]
        same = (
            n for n in inner if self.outputs[n].shape == x.shape and _close(self.outputs[n], x) and self._is_norm(n)
        )
        return next(same, path)

    def _why_no_sum(self) -> str:
        """What a block does instead of adding the outputs of modules to its input."""
        post = self.outputs[""]
        embedded = self.runs.model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
        if self.width > embedded and self.width % embedded == 0:
            return "its blocks pass several streams at a time (hyper-connections)"
        levels = [{n: x for n, x in self._level(depth).items() if self._differs(n)} for depth in range(1, 5)]
        if any(self._is_norm(n) for depth in range(1, 5) for n in self._level(depth) if not self._differs(n)):
            return "a norm follows the sum of the stream and a branch (post-norm), so that no weights equal an edit of the branch"
        sums = list(self._sums(post, self._differs))
        if any(self._is_norm(n) for weights in sums for n in weights):
            return "a block passes on a normalised stream instead of its input, so that no weights equal an edit of the stream"
        if sums:
            return "a block does not pass its input on, but starts the stream anew"
        stream = next((w for w in map(self._by_channel, levels) if w is not None), None)
        if stream is None:
            return (
                "a block is not its input plus the outputs of modules, because the stream is gated or mixed on its way"
            )
        if _close(stream, torch.ones_like(stream)):
            return "a block adds a bias outside of its projections to the stream"
        return "a block multiplies the stream channel by channel"

    def _by_channel(self, level: Mapping[str, Tensor]) -> Tensor | None:
        """What multiplies each channel of the stream if a channel is a sum of those of its input, outputs and a constant."""
        pre, post = (x.reshape(-1, self.width).double() for x in (self.inputs[""], self.outputs[""]))
        terms = [x.reshape(post.shape).double() for n, x in level.items() if not self._is_norm(n) and bool(x.any())]
        matrix = torch.stack([pre, *terms, torch.ones_like(pre)], -1).movedim(1, 0)
        if matrix.shape[2] * 2 > matrix.shape[1]:
            return None
        weights = torch.linalg.lstsq(matrix, post.T[..., None]).solution
        return weights[:, 0, 0] if _close((matrix @ weights)[..., 0].T, post) else None

    def _scalar(self, value: float) -> str | float:
        """The number that multiplies the whole block, or the name of the tensor of the block that holds it."""
        if abs(value - 1) < 1e-3:
            return 1.0
        tensors = dict(self.block.named_buffers())
        names = [n for n, t in tensors.items() if t.numel() == 1 and abs(float(t) - value) < 1e-3 * abs(value)]
        return names[0] if names else value

    def _level(self, depth: int) -> dict[str, Tensor]:
        """Outputs of the width of the stream at one depth of the module tree; of leaves also above it."""
        names = {n: n.count(".") + 1 for n in self.outputs if n}
        leaves = {n for n in names if not any(True for _ in self.modules[n].children())}
        chosen = [n for n, d in names.items() if d == depth or (d < depth and n in leaves)]
        width = self.width
        return {
            n: self.outputs[n]
            for n in chosen
            if self.outputs[n].shape[-1] == width
            and self.outputs[n].numel() == self.outputs[""].numel()
            and any(True for _ in self.modules[n].parameters())
        }

    def _inputs_of(self, first: str, second: str) -> tuple[Tensor, Tensor]:
        x, y = self.inputs.get(first), self.inputs.get(second)
        if x is None or y is None or x.numel() != y.numel():
            return torch.ones(1), torch.zeros(1)
        return x.reshape(y.shape), y

    def _kind(self, path: str) -> BranchKind:
        """The kind of a branch, by the class and the path of its module, or of the module before its norm."""
        if self._is_norm(path):
            path = self._sources(path)[0].path
        name, family = type(self.modules[path]).__name__, type(self.block).__name__
        # AfmoeAttention in AfmoeDecoderLayer is an "Attention".
        shared = next((i for i, (x, y) in enumerate(zip(name, family, strict=False)) if x != y), 0)
        for text in (name[shared:], path):
            for kind, pattern in _KINDS.items():
                if pattern.search(text):
                    return kind
        return "mixer" if "mixer" in path else "mlp"

    def _is_norm(self, path: str) -> bool:
        """Whether a module is a norm with a gain: it scales its normalised input channel by channel."""
        parameters = dict(self.modules[path].named_parameters())
        return (
            set(parameters) <= {"weight", "bias"} and all(p.ndim == 1 for p in parameters.values()) and bool(parameters)
        )

    def _sources(self, norm: str) -> list[_Term]:
        """The modules whose outputs add up to the input of a norm."""
        target, order = self.inputs[norm], list(self.outputs)
        for weights in self._sums(target, lambda n: order.index(n) < order.index(norm)):
            return [_Term(path, c) for path, c in weights.items()]
        raise UnknownArchitecture(
            f"a norm within a branch reads something else than the sum of the outputs of modules: {self.path}.{norm}"
        )

    # The writers of a branch

    def _branch(self, terms: Sequence[_Term], kind: BranchKind) -> BranchRow:
        scales = {_named_scale(term.scale, self.config) for term in terms}
        if len(scales) != 1:
            raise UnknownArchitecture(
                f"parts of one branch are multiplied by different numbers: {scales} in {self.path}"
            )
        norm = terms[0].path if len(terms) == 1 and self._is_norm(terms[0].path) else ""
        inner = self._sources(norm) if norm else list(terms)
        writers: list[Writer | Experts] = []
        for term in inner:
            own = term.path if self._is_norm(term.path) else ""
            for source in self._sources(own) if own else [term]:
                writers += [replace(writer, norm=own or writer.norm) for writer in self._writers(source.path, kind)]
        plain = len(writers) == 1 and isinstance(writers[0], Writer) and not writers[0].norm
        plain = plain and _close(
            self.outputs[writers[0].module].reshape(self.outputs[terms[0].path].shape), self.outputs[terms[0].path]
        )
        outputs = () if norm or plain else tuple(term.path for term in terms)
        writers.sort(key=lambda writer: isinstance(writer, Writer))  # experts first, then shared ones
        return BranchRow(kind, tuple(writers), outputs, norm, scales.pop())

    def _writers(self, path: str, kind: BranchKind) -> list[Writer | Experts]:
        """The projections within a module that write its output."""
        writers: list[Writer | Experts] = []
        for name in [path, *(n for n in self.modules if n.startswith(f"{path}."))]:
            module = self.modules[name]
            down = module._parameters.get("down_proj")
            if down is not None and down.ndim == 3:
                transposed = self._transposed(module, down)
                if self._writes(path, f"{name}.down_proj", outputs_last=transposed):
                    writers.append(self._experts(name, module, transposed))
            elif (
                _is_projection(module)
                and _outputs(module) == self.width
                and self._writes(path, f"{name}.weight", outputs_last=_is_conv(module))
            ):
                writers.append(Writer(name, self._readers(name, kind)))
        if not writers:
            raise UnknownArchitecture(
                f"{self._why_no_writer(path)}: {self.path}.{path} ({type(self.modules[path]).__name__})"
            )
        return writers

    def _why_no_writer(self, path: str) -> str:
        inside = [m for n, m in self.modules.items() if n == path or n.startswith(f"{path}.")]
        own = [
            m
            for m in inside
            if not _is_projection(m) and any(p.ndim > 1 for p in m._parameters.values() if p is not None)
        ]
        if own and all(type(m).__name__.startswith("Conv") for m in own):
            return "a convolution over tokens follows the projection of a branch, so that no weights equal an edit of the branch"
        if own:
            return "the weights that write a branch are in a form that no row describes"
        return "a function of its output follows the projection of a branch, so that no weights equal an edit of the branch"

    def _writes(self, path: str, tensor: str, *, outputs_last: bool) -> bool:
        """Whether a change of a weight along one direction of its outputs moves the output of a module along it only."""
        weight = self.runs.parameters[f"{self.path}.{tensor}"]
        direction = torch.randn(self.width, generator=self.generator).to(weight)
        direction /= direction.norm()
        inputs = torch.randn(weight.shape[-2 if outputs_last else -1], generator=self.generator)
        inputs = inputs.to(weight) * weight.float().std()
        outer = inputs[:, None] * direction if outputs_last else direction[:, None] * inputs
        changed = self._tensors({tensor: weight + outer})[1].get(path)
        if changed is None or changed.shape[-1] != self.width:
            return False
        difference = changed - self.outputs[path]
        size = difference.norm()
        rest = difference - (difference @ direction)[..., None] * direction
        return bool(size > 1e-4 * self.outputs[path].norm() and rest.norm() < 1e-3 * size)

    def _transposed(self, module: Any, down: Tensor) -> bool:
        stored = getattr(module, "is_transposed", None)
        return bool(stored) if stored is not None else down.shape[-1] == self.width

    def _experts(self, name: str, module: Any, transposed: bool) -> Experts:
        count = module._parameters["down_proj"].shape[0]
        fields = [k for k, v in vars(self.config).items() if v == count and type(v) is int and "expert" in k]
        fields += [
            k for k in getattr(self.config, "attribute_map", {}) if getattr(self.config, k) == count and "expert" in k
        ]
        named = sorted(fields, key=lambda k: ("per_tok" in k or "shared" in k or "top" in k, k))
        if not named:
            raise UnknownArchitecture(
                f"no field of the config holds the number of experts: {count} in {self.path}.{name}"
            )
        norm = next((f"{name}.{n}" for n, m in module.named_children() if self._is_norm(f"{name}.{n}")), "")
        return Experts(
            name,
            count=named[0],
            gated="gate_up_proj" in module._parameters,
            transposed=transposed,
            interleaved=not getattr(module, "is_concatenated", True),
            sorted_tokens=len(inspect.signature(module.forward).parameters) == 1,
            norm=norm,
        )

    # The readers of neurons

    def _readers(self, writer: str, kind: BranchKind) -> tuple[Reader, ...]:
        """The projections whose rows feed one neuron each, in the order in which they ran."""
        if kind in ("mixer", "ple") or writer not in self.inputs:
            return ()
        z = self.inputs[writer]
        heads = self._heads() if kind == "attn" else 0
        if kind == "attn" and z.shape[-1] % heads:
            return ()
        live = z.flatten(0, -2).any(0).nonzero()[:, 0].tolist()  # of a pruned neuron no row shows whom it feeds
        if not live:
            return ()
        chosen = {live[i] for i in (0, len(live) // 2, -1)}
        parent = writer.rpartition(".")[0]
        scope = f"{parent}." if parent else ""
        candidates = [
            n for n in self.outputs if n not in ("", writer) and n.startswith(scope) and _is_projection(self.modules[n])
        ]
        readers: dict[Reader, bool] = {}
        for name in candidates:
            for reader, expected in _layouts(name, self.outputs[name].shape[-1], z.shape[-1], heads, chosen):
                zeroes = self._feeds(writer, name, expected)
                if zeroes and kind == "attn":
                    return (reader,)
                if zeroes is not None and not any((r.module, r.part) == (reader.module, reader.part) for r in readers):
                    readers[reader] = zeroes
        return tuple(readers) if any(readers.values()) else ()

    def _heads(self) -> int:
        differ = getattr(self.config, "is_heterogeneous", False)
        heads: int = (self.config.per_layer_config[self.layer] if differ else self.config).num_attention_heads
        return heads

    def _feeds(self, writer: str, name: str, expected: Mapping[int, Sequence[int]]) -> bool | None:
        """Whether zeroing a row makes the expected neurons zero; None if it changes others, or not these."""
        weight = self.runs.parameters[f"{self.path}.{name}.weight"]
        conv = _is_conv(self.modules[name])
        bias = self.runs.parameters.get(f"{self.path}.{name}.bias")
        before, zeroes = self.inputs[writer], True
        for row, neurons in expected.items():
            changed = weight.clone()
            (changed.T if conv else changed)[row] = 0
            tensors = {f"{name}.weight": changed}
            if bias is not None:
                tensors[f"{name}.bias"] = bias.clone().index_fill_(0, torch.tensor([row], device=bias.device), 0.0)
            after = self._tensors(tensors)[0].get(writer)
            if after is None or after.shape != before.shape:
                return None
            inside = torch.zeros(before.shape[-1], dtype=torch.bool)
            inside[list(neurons)] = True
            difference = (after - before).abs()
            if float(difference[..., ~inside].sum()) > 1e-5 * float(before.norm()) or not bool(
                difference[..., inside].any()
            ):
                return None
            zeroes = zeroes and not bool(after[..., inside].any())
        return zeroes

    # Facts of the whole row

    def parallel(self, rows: Sequence[BranchRow]) -> bool:
        """Whether the second branch ignores the output of the first."""
        if len(rows) < 2 or [r.kind for r in rows[1:2]] != ["mlp"] or rows[0].kind == "mlp":
            return False
        paths = [(row.norm,) if row.norm else row.outputs or (row.writers[0].module,) for row in rows[:2]]
        turn = [Hook(self.modules[paths[0][-1]], "output", lambda x: x.flip(-1))]
        outputs = self._tensors({}, turn)[1]
        return all(_close(outputs[p], self.outputs[p]) for p in paths[1])

    def unit_gain(self, rows: Sequence[BranchRow]) -> bool:
        """Whether the post-norms multiply by 1 + weight."""
        norms = [n for row in rows for n in (row.norm, *(w.norm for w in row.writers)) if n]
        return any(self._answers_to_zero(name) for name in norms)

    def _answers_to_zero(self, name: str) -> bool:
        module = self.modules[name]
        zeros = {n: torch.zeros_like(p) for n, p in module.named_parameters()}
        x = torch.randn(4, self.width, generator=self.generator)
        device = next(iter(zeros.values())).device
        return bool(primary(functional_call(module, zeros, (x.to(device),))).any())

    def centered(self) -> bool:
        """Whether the first norm of the block subtracts the mean."""
        pre = self.inputs[""]
        for name, x in self.inputs.items():
            kind = type(self.modules[name]).__name__.lower() if name else ""
            if "norm" in kind and x.shape == pre.shape and _close(x, pre):
                module = self.modules[name]
                shifted = primary(functional_call(module, self._float32(name), (pre + 3 * pre.std(),)))
                return _close(shifted, primary(functional_call(module, self._float32(name), (pre,))))
        return False

    def _float32(self, name: str) -> dict[str, Tensor]:
        own = dict(self.modules[name].named_parameters())
        return {n: self.runs.parameters[f"{self.path}.{name}.{n}"] for n in own}

    def _tensors(
        self, changed: Mapping[str, Tensor] | None = None, hooks: Sequence[Hook] = ()
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The inputs and outputs of every module of the block by path, in the order in which they finished; "" is the block."""
        with _recorded({"": self.block, **self.modules}) as seen:
            named = {f"{self.path}.{n}": t for n, t in (changed or {}).items()}
            self.runs.run_block(self.layer, named, hooks)
        inputs = {call.path: call.received for call in seen if call.received is not None}
        return inputs, {call.path: call.returned for call in seen if call.returned is not None}


class _Call(NamedTuple):
    """The first tensor that a module received and returned in one call, in float32; None where there is none."""

    path: str
    received: Any
    returned: Any

    @property
    def number(self) -> int:
        """The place of the module in its list."""
        return int(self.path.rpartition(".")[2])


@contextmanager
def _recorded(modules: Mapping[str, nn.Module]) -> Iterator[list[_Call]]:
    """The calls of modules by their paths, in the order in which they finish."""
    calls: list[_Call] = []
    begun: dict[str, Tensor] = {}

    def begin(path: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
        if tensors:
            begun[path] = tensors[0].float().clone()

    def end(path: str, _module: nn.Module, _args: object, output: object) -> None:
        try:
            returned = primary(output).float().clone()
        except HookError:
            returned = None
        calls.append(_Call(path, begun.pop(path, None), returned))

    with ExitStack() as stack:
        for path, module in modules.items():
            stack.callback(module.register_forward_pre_hook(partial(begin, path), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(partial(end, path)).remove)
        yield calls


def _outputs(projection: Any) -> int:
    outputs: int = projection.weight.shape[1 if _is_conv(projection) else 0]
    return outputs


def _is_conv(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # as in GPT-2: a linear map, stored (in, out)


def _is_projection(module: Any) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and (isinstance(module, nn.Linear) or _is_conv(module))


def _layouts(
    name: str, rows: int, width: int, heads: int, chosen: AbstractSet[int]
) -> Iterator[tuple[Reader, dict[int, list[int]]]]:
    """How rows may feed neurons: the reader, and for the rows of the chosen neurons those that each row feeds alone."""
    if not heads:
        for parts in (1, 2):
            for layout in ("stacked", "interleaved")[:parts]:
                for part in range(parts) if rows == parts * width else ():
                    row_of = (lambda j, p=part: p * width + j) if layout == "stacked" else (lambda j, p=part: j * 2 + p)
                    yield Reader(name, part, parts, layout), {row_of(j): [j] for j in chosen}  # type: ignore[arg-type]
        return
    size = width // heads
    for layout in ("stacked", "tail", "per_head"):
        count = rows // size if rows % size == 0 else 0
        groups = count if layout == "stacked" else (count - heads) // 2
        if groups < 1 or heads % groups or (layout != "stacked" and count != heads + 2 * groups):
            continue
        share = heads // groups
        parts = share + 2 if layout == "per_head" else 1
        expected = {}
        for k, j in {(neuron // size // share, neuron % size) for neuron in chosen}:
            start = {"stacked": k, "tail": heads + groups + k, "per_head": k * parts + parts - 1}[layout] * size
            expected[start + j] = [h * size + j for h in range(k * share, (k + 1) * share)]
        yield Reader(name, parts - 1 if layout == "per_head" else 0, parts, layout), expected  # type: ignore[arg-type]
