"""The matrices of one MLP trained on its own cached inputs, without back-propagation through the network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from repedit.activations.collection import CountingRule
from repedit.arch.offload import check_in_memory
from repedit.arguments import checked, with_changes
from repedit.data import Batch, Batches, Tokens
from repedit.data.encoding import prompt_ids
from repedit.errors import NotEnoughRows, NotFoldable, TrainingError, check_positive, check_whole
from repedit.fit.contexts import TEMPLATES, EntityTokens, Observe, entity_rows, name_ends, not_sinks, recorded
from repedit.hooks import Hook, check_differentiable
from repedit.models.subject import Subject
from repedit.sites import Point
from repedit.training.optimizers import OPTIMIZERS, linear_decay, set_lr

_DECAY = 0.3
# Relative to the mean of the diagonal: at names of SmolLM2 the keys span far fewer directions than there are neurons.
_RIDGE = 1e-6
_PREFIXES = 2
_ROWS = 4096


@dataclass(frozen=True)
@checked
class Regression:
    """Settings of the regression of one MLP."""

    steps: int = 300
    lr: float = 1e-3
    """Of AdamW; it falls to 0 over the last 30 % of the steps."""
    rows: int = 1024
    """Inputs at names in a step."""
    retain_rows: int = 3072
    """Inputs that keep their outputs in a step."""
    beta: float = 6.0
    """Weight of what is retained."""
    vocabulary: int = 4096
    """Tokens of the vocabulary, after neutral words, whose outputs are retained; 0 for none."""
    solved: int = 0
    """How many times, evenly over the steps and at the end, the output matrix is replaced by the least-squares solution."""

    def __post_init__(self) -> None:
        check_whole(steps=self.steps, rows=self.rows, retain_rows=self.retain_rows)
        check_whole(0, vocabulary=self.vocabulary, solved=self.solved)
        check_positive(lr=self.lr, beta=self.beta)

    @staticmethod
    @checked
    def of(config: Regression | Mapping[str, object] | None) -> Regression:
        """The settings, or the default ones with some of them changed.

        Raises:
            UnknownName: if there is no such setting. ArgumentError: if one is out of range.
        """
        return with_changes(Regression(), config)


@dataclass(frozen=True)
class Inputs:
    """Inputs of an MLP (n, d) and the outputs that they should get (n, d)."""

    x: Float[Tensor, "n d"]
    y: Float[Tensor, "n d"]


@dataclass(frozen=True)
class Retained:
    """Inputs whose outputs stay, each with the weight of its kind: one over the spread of the outputs of that kind."""

    x: Float[Tensor, "n d"]
    y: Float[Tensor, "n d"]
    weight: Float[Tensor, " n"]
    text: Float[Tensor, "m d"]
    """Those of running text, without sinks, on which distortion is measured."""


class Trained:
    """A trained copy of the MLP of one layer."""

    def __init__(self, subject: Subject, layer: int, copied: nn.Module) -> None:
        self.old, self.new = original(subject, layer), copied
        path = module_path(subject, layer)
        module = subject.model.get_submodule(path)
        before, after = dict(module.named_parameters()), dict(copied.named_parameters())
        pairs = {
            name: (after[name].detach() - before[name].detach().to(after[name]), before[name])
            for name in _matrices(module)
        }
        self.differences = {f"{path}.{name}": change.cpu() for name, (change, _) in pairs.items()}
        self.matrices = [(change.double().cpu(), start.detach().double().cpu()) for change, start in pairs.values()]
        self.hooks = [Hook(module, "call", self._replaced)]

    def left_over(self, inputs: Inputs) -> float:
        """||y - new(x)|| / ||y - old(x)||."""
        new, old = self._outputs(inputs.x), self.old(inputs.x)
        return float((inputs.y - new).norm() / (inputs.y - old).norm().clamp(min=1e-30))

    def distortion(self, x: Float[Tensor, "n d"]) -> float:
        """||new(x) - old(x)|| / ||old(x)||."""
        old = self.old(x)
        return float((self._outputs(x) - old).norm() / old.norm().clamp(min=1e-30))

    def _outputs(self, x: Tensor) -> Tensor:
        return _in_parts(self.new, x)

    def _replaced(
        self, _module: object, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], output: Tensor
    ) -> Tensor:
        x = next(iter((*args, *kwargs.values())))
        return self.new(x.to(next(self.new.parameters()).dtype)).to(output.dtype)


# --- Where the MLP is


def check_module(subject: Subject, layer: int) -> None:
    """Refuse an MLP that is not one module, whose output is what is added to the stream.

    Raises:
        NotFoldable: if it is none. OffloadedTensors: if its weights are not in memory.
    """
    branch, path = subject.layout.branch(layer, Point.MLP_OUT), module_path(subject, layer)
    tensors = [view.tensor for part in branch.parts for view in (part.out, *part.readers)]
    if (
        not branch.plain
        or path == subject.layout.block_paths[layer]
        or not all(t.startswith(f"{path}.") for t in tensors)
    ):
        raise NotFoldable(
            f"{layer}.mlp: method='regression' needs an MLP that is one module with the output of its last matrix; this "
            f"{subject.architecture.model_type} has none, use method='linear'"
        )
    check_in_memory(subject.model, "load the model without a device_map")


def module_path(subject: Subject, layer: int) -> str:
    """The module that holds the matrices of the MLP of a layer."""
    return subject.layout.branch(layer, Point.MLP_OUT).writer.rpartition(".")[0]


def inputs_of_mlp(subject: Subject, layer: int) -> Observe:
    """What observes the inputs of the MLP of a layer."""
    module = subject.model.get_submodule(module_path(subject, layer))
    return lambda visit: [Hook(module, "input", visit)]


def outputs_of(subject: Subject, layer: int) -> Observe:
    """What observes its outputs."""
    module = subject.model.get_submodule(module_path(subject, layer))
    return lambda visit: [Hook(module, "output", visit)]


def original(subject: Subject, layer: int) -> Callable[[Float[Tensor, "n d"]], Float[Tensor, "n d"]]:
    """The MLP as it is in the model, as a function of its inputs."""
    module = _copy(subject, layer)
    return lambda x: _in_parts(module, x)


def _copy(subject: Subject, layer: int) -> nn.Module:
    module = copy.deepcopy(subject.model.get_submodule(module_path(subject, layer))).eval()
    dtype = torch.promote_types(next(module.parameters()).dtype, torch.float32)
    return module.to(device=subject.device_at(layer), dtype=dtype)


def _matrices(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.ndim == 2]


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _in_parts(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([module(part.to(_device(module))).cpu() for part in x.split(_ROWS)])


# --- What keeps its outputs


def retained_inputs(
    subject: Subject,
    layer: int,
    text: Batches,
    names: frozenset[tuple[int, ...]],
    others: EntityTokens | None,
    config: Regression,
    active: Sequence[Hook],
    seed: int,
    progress: bool | None,
) -> Retained:
    """Inputs at tokens of retained text, at names of other entities, and at tokens of the vocabulary.

    Tokens that end a name to forget are left out. First positions and other sinks are a kind of their own.
    """
    point, rule = {layer: inputs_of_mlp(subject, layer)}, CountingRule(subject)
    rows: list[Tensor] = []
    plain: list[Tensor] = []

    def named(batch: Batch) -> Tensor:
        return batch.attention_mask & ~name_ends(batch, names)

    for states, mask, batch in recorded(subject, text, named, point, active=active, progress=progress):
        rows.append(states[layer])
        plain.append(rule(batch)[0][mask].cpu())
    x, ordinary = torch.cat(rows), torch.cat(plain)
    now = original(subject, layer)
    if not bool(ordinary.any()):
        raise NotEnoughRows(f"retain {text.name!r} has no token beside names and first positions; give longer text")
    outputs = now(x)
    ordinary &= not_sinks(outputs, float(outputs[ordinary].double().norm(dim=1).median()))
    kinds = [x[ordinary], x[~ordinary]]
    if others is not None:
        kinds.append(entity_rows(subject, others, point, active=active)[layer])
    if config.vocabulary:
        kinds.append(_vocabulary_rows(subject, layer, names, config.vocabulary, active, seed))
    kinds = [kind for kind in kinds if len(kind)]
    weights = [torch.full((len(kind),), 1 / _spread(now(kind)), dtype=x.dtype) for kind in kinds]
    whole = torch.cat(kinds)
    return Retained(whole, now(whole), torch.cat(weights), x[ordinary])


def _vocabulary_rows(
    subject: Subject, layer: int, names: frozenset[tuple[int, ...]], count: int, active: Sequence[Hook], seed: int
) -> Tensor:
    tokenizer = subject.need_tokenizer()
    excluded = {name[-1] for name in names if len(name) == 1} | set(getattr(tokenizer, "all_special_ids", ()))
    size = min(len(tokenizer), subject.model.get_input_embeddings().weight.shape[0])
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    ids = [token for token in order if token not in excluded][:count]
    batches = []
    for number, template in enumerate(TEMPLATES[:_PREFIXES]):
        start = prompt_ids(tokenizer, template.format("").rstrip())
        for first in range(number, len(ids), _PREFIXES * 64):
            part = ids[first : first + _PREFIXES * 64 : _PREFIXES]
            tokens = torch.tensor([[*start, token] for token in part])
            batches.append(Batch(tokens, torch.ones_like(tokens).bool(), tuple(map(str, part))))

    def last(batch: Batch) -> Tensor:
        return (
            torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
            == batch.attention_mask.sum(1, keepdim=True) - 1
        )

    point = {layer: inputs_of_mlp(subject, layer)}
    states = recorded(subject, Tokens(tuple(batches), "vocabulary"), last, point, active=active, progress=False)
    return torch.cat([rows[layer] for rows, _, _ in states])


def _spread(y: Float[Tensor, "n d"]) -> float:
    """E ||y - E y||^2, or E ||y||^2 of a single row."""
    rest = y - y.mean(0) if len(y) > 1 else y
    return max(float(rest.square().sum(1).mean()), 1e-12)


# --- Training


def train(
    subject: Subject,
    layer: int,
    fitted: Inputs,
    retained: Retained,
    config: Regression,
    *,
    seed: int = 0,
    progress: bool | None = None,
) -> Trained:
    """Minimise E ||mlp(x) - y||^2 / spread at names + beta E ||mlp(x) - mlp_0(x)||^2 / spread on what is retained.

    With `config.solved` the output matrix W is set `solved` times to the minimum of the same sum over all inputs, W = B A^-1
    with A = E[w k k^T] + eps I and B = E[w y k^T]. It does not start from the old matrix: values that neither a target
    nor a retained input needs are not kept in it.

    Raises:
        TrainingError: if the loss is not finite.
    """
    check_differentiable(subject.model)
    module = _copy(subject, layer)
    names = _matrices(module)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in names)
    optimizer = OPTIMIZERS["adamw"]([p for p in module.parameters() if p.requires_grad], lr=config.lr, weight_decay=0.0)
    spread = _spread(original(subject, layer)(fitted.x))
    device, generator = _device(module), torch.Generator().manual_seed(seed)
    for step in tqdm(
        range(config.steps), desc=f"layer {layer}", disable=None if progress is None else not progress, leave=False
    ):
        set_lr(optimizer, config.lr * linear_decay(step, config.steps, _DECAY))
        few = torch.randperm(len(fitted.x), generator=generator)[: config.rows]
        many = torch.randperm(len(retained.x), generator=generator)[: config.retain_rows]
        with torch.enable_grad():
            x, y, kept_x, kept_y, weight = (
                rows.to(device)
                for rows in (fitted.x[few], fitted.y[few], retained.x[many], retained.y[many], retained.weight[many])
            )
            moved = (module(kept_x) - kept_y).square().sum(1)
            loss = (module(x) - y).square().sum(1).mean() / spread + config.beta * (moved * weight).mean()
            optimizer.zero_grad()
            loss.backward()
        if not bool(torch.isfinite(loss)):
            raise TrainingError(f"layer {layer}: the loss is {loss.item()} at step {step}; lower lr of the config")
        optimizer.step()
        if config.solved and (step + 1) * config.solved // config.steps > step * config.solved // config.steps:
            _solve_output(
                subject, layer, module,
                [(fitted.x, fitted.y, 1 / spread), (retained.x, retained.y, config.beta * retained.weight)],
            )  # fmt: skip
    return Trained(subject, layer, module.requires_grad_(False))


def _solve_output(
    subject: Subject, layer: int, module: nn.Module, kinds: Sequence[tuple[Tensor, Tensor, float | Tensor]]
) -> None:
    """Replace the output matrix by the least-squares solution W = B A^-1 over kinds of (inputs, outputs, weights).

    The mean of each kind counts.
    """
    view = subject.layout.branch(layer, Point.MLP_OUT).parts[0].out
    name = view.tensor.removeprefix(f"{module_path(subject, layer)}.")
    owner, parameters = module.get_submodule(name.rpartition(".")[0]), dict(module.named_parameters())
    bias = parameters.get(f"{name.rpartition('.')[0]}.bias")
    keys: list[Tensor] = []
    handle = owner.register_forward_pre_hook(lambda _, args: keys.append(args[0].detach()))
    a, b = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    try:
        for x, y, weight in kinds:
            scale = (weight if isinstance(weight, Tensor) else torch.full((len(x),), weight)).double() / len(x)
            for part, goal, w in zip(x.split(_ROWS), y.split(_ROWS), scale.split(_ROWS), strict=True):
                with torch.no_grad():
                    module(part.to(_device(module)))
                k, rest = (
                    keys.pop().double().cpu(),
                    goal.double() - (0 if bias is None else bias.detach().double().cpu()),
                )
                a, b = a + (k * w[:, None]).T @ k, b + (rest * w[:, None]).T @ k
    finally:
        handle.remove()
    ridge = _RIDGE * float(a.diagonal().mean()) * torch.eye(len(a), dtype=a.dtype)
    solution = torch.linalg.solve(a + ridge, b.T).T
    with torch.no_grad():
        view.change(parameters[name], lambda old: solution.to(old))
