"""The loop of gradient unlearning: forward and backward passes by role, one combined gradient, one step.

The gradients of a role add up over micro-batches and ranks before they are combined; clipping applies to the combined
one. On several processes each takes its share of the rows of a step, and FSDP2 divides what is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from repedit.data import Batch
from repedit.data.fact_sets import fact_of
from repedit.distributed import ProcessGroup, full_tensor, is_sharded, shard_like, sum_gradients
from repedit.errors import ArgumentError, TrainingError
from repedit.hashing import seed_of
from repedit.models.subject import Subject
from repedit.training.optimizers import OPTIMIZERS, set_lr
from repedit.training.sampler import collate, label_mask, logits_for
from repedit.unlearning.combiners import Combination, StepContext, combine
from repedit.unlearning.forget_gradient import ForgetGradient
from repedit.unlearning.losses import (
    ControlVectors,
    ForwardPass,
    Reference,
    Unit,
    autocast,
    nll,
    recording_states,
    steering_layer,
    unit_count,
)
from repedit.unlearning.parameters import TrainableCopy
from repedit.unlearning.recipe import Term, UnlearnRecipe
from repedit.unlearning.sampling import FORGET_SIDE, RETAIN_SIDE
from repedit.unlearning.schedule import Progress
from repedit.unlearning.training_data import TrainingData


@dataclass(eq=False)
class Training:
    """A model in training."""

    trainable: TrainableCopy
    reference: Reference
    data: TrainingData
    recipe: UnlearnRecipe
    micro_batch: int
    clip: float | None
    seed: int
    group: ProcessGroup = field(default_factory=ProcessGroup)
    dropout: bool = False
    log: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)
    """What the combiner keeps between steps."""
    forwards: int = 0
    """Forward passes of the trained model so far."""

    def __post_init__(self) -> None:
        self.order = self.recipe.sampler.order(self.data.topics, self.recipe.batch_size, self.seed)
        self.total_steps = self.recipe.steps or self.order.steps_for(self.recipe.epochs)
        self.parameters: list[Tensor] = list(self.trainable.tensors.values())
        self.optimizer = _optimizer(self.parameters, self.recipe)
        self.watched = {role for rule in self.recipe.stop for role in rule.watches}
        self.control = ControlVectors(self.seed, self._control_lengths())
        self.forget_gradient = ForgetGradient(
            trainable=self.trainable,
            adversary=self.recipe.adversary,
            filter=self.recipe.gradient_filter,
            agreement=self.recipe.agreement,
            seed=self.seed,
            # Wordings of a fact are named fact, fact#1, ...
            facts=[fact_of(row.document[0]) for row in self.data.rows.get("forget", [])],
            batch_size=self.recipe.batch_size,
            steps_per_epoch=self.order.steps_per_epoch,
            backward=self._backward_forget,
            group=self.group,
        )

    def run(self, *, after_step: Callable[[], None], progress: bool | None = None) -> tuple[str, str]:
        """Take the remaining steps; (name of the rule that stopped the training, reason).

        Raises:
            TrainingError: if a loss or the gradient is not finite; the weights are those of the last good step.
        """
        begin = len(self.log)
        stopped = self._stopped() if begin else None  # a training that was killed after its last step
        if stopped is not None:
            return stopped
        disable = None if progress is None and self.group.is_first else not (progress and self.group.is_first)
        bar = tqdm(range(begin, self.total_steps), initial=begin, total=self.total_steps, desc=self.recipe.name, leave=False,
                   disable=disable)  # fmt: skip
        for step in bar:
            record = self._step(step)
            self.log.append(record)
            losses = ", ".join(f"{name} {value:.3g}" for name, value in record["losses"].items())
            bar.set_postfix_str(f"{losses}, cos {record['cosine']:.2f}" if record["cosine"] is not None else losses)
            after_step()
            stopped = self._stopped()
            if stopped is not None:
                return stopped
        return "", f"all {self.total_steps} steps taken"

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.trainable.subject.layout.layers)

    def _stopped(self) -> tuple[str, str] | None:
        """The rule that stops the training after the steps taken, with its reason."""
        taken = len(self.log)
        now = Progress(taken, taken / self.order.steps_per_epoch, self.log, lambda: self.trainable.subject)
        for rule in self.recipe.stop:
            reason = self.group.broadcast_text(rule.reason(now))
            if reason:
                return rule.name, f"{rule.name} at step {taken - 1}: {reason}"
        return None

    def _step(self, step: int) -> dict[str, Any]:
        begin, drawn = perf_counter(), self.order.at(step)
        lr = (drawn.lr or self.recipe.lr) * self.recipe.schedule.factor(step, self.total_steps)
        set_lr(self.optimizer, lr)
        sums: dict[str, Tensor] = {}
        self.forget_gradient.take(step, drawn.rows, sums)
        forget_gradients: list[Tensor | None] = []
        if self.recipe.combiner.separate:
            forget_gradients = [p.grad for p in self.parameters]
            self.optimizer.zero_grad(set_to_none=True)
        self._backward_side(RETAIN_SIDE, drawn.rows, step, sums, self.recipe.terms)
        self._reduce_gradients()
        values: dict[str, float] = {}
        if sums:
            values = dict(zip(sums, self.group.sum(torch.stack(list(sums.values()))).tolist(), strict=True))
        self._check_finite(values, step, lr, "loss")
        self.forget_gradient.agree(forget_gradients)
        combination = self._combine(forget_gradients, values, step) if self.recipe.combiner.separate else None
        norm = self._clip()
        self._check_finite({"the combined gradient": norm}, step, lr, "norm")
        self.optimizer.step()
        self.trainable.restore_masked()
        record = {"step": step, "epoch": round(step / self.order.steps_per_epoch, 4), "norm": norm, "lr": lr}
        seconds = self.group.max(perf_counter() - begin, self.trainable.subject.device)
        rows = {role: len(indices) for role, indices in drawn.rows.items()}
        return record | {"rows": rows} | _measurements(values, combination) | {"seconds": round(seconds, 4)}

    def _backward_forget(
        self, rows: Mapping[str, Sequence[int]], step: int, sums: dict[str, Tensor], *, relearn: bool = False
    ) -> None:
        """Replace the gradients by those of the forget side; summed over the ranks where they are needed by themselves."""
        self.optimizer.zero_grad(set_to_none=True)
        self._backward_side(FORGET_SIDE, rows, step, sums, (Term(nll(), "forget"),) if relearn else self.recipe.terms)
        if self.recipe.combiner.separate:
            self._reduce_gradients()

    def _backward_side(
        self,
        side: Sequence[str],
        rows: Mapping[str, Sequence[int]],
        step: int,
        sums: dict[str, Tensor],
        terms: Sequence[Term],
    ) -> None:
        for role in (role for role in side if role in rows):
            self._backward_role(role, rows[role], step, sums, terms)

    def _backward_role(
        self, role: str, rows: Sequence[int], step: int, sums: dict[str, Tensor], terms: Sequence[Term]
    ) -> None:
        """Forward and backward passes of every term of a role, one of each for a micro-batch."""
        weights = {t: t.weight_at(step, self.log) for t in terms if t.role == role}
        active = {term: weight for term, weight in weights.items() if weight != 0}
        if not active and role not in self.watched:
            return
        batches = self.data.rows[role]
        units: set[Unit] = {"tokens", *(term.loss.unit for term in active)}
        totals = {unit: sum(unit_count(unit, batches[i]) for i in rows) for unit in units}
        parts = micro_batches(self.group, rows, self.micro_batch)
        model = self.trainable.subject.model
        for number, part in enumerate(parts, 1):
            set_gradient_sync(model, self.parameters, enabled=number == len(parts))
            # Around the backward pass too: blocks that are recomputed must drop the same entries.
            with dropout(model, f"{self.seed}:{step}:{role}:{list(part.rows)}" if self.dropout else None):
                with torch.set_grad_enabled(bool(active)):
                    forward = self._forward(role, part.rows, active)
                    loss = _weighted_loss(forward, active, totals, sums, 1.0 if part.is_real else 0.0)
                if loss is not None:
                    loss.backward()

    def _forward(self, role: str, rows: Sequence[int], active: Iterable[Term]) -> ForwardPass:
        losses = [term.loss for term in active]
        layers = {steering_layer(loss.options.get("layer"), self.depth) for loss in losses if "hidden" in loss.needs}
        forward = self._forward_pass(role, rows, self.data.rows[role], sorted(layers))
        if any("alternative" in loss.needs for loss in losses):
            forward.other = self._forward_pass("alternative", rows, self.data.alternatives, [])
        return forward

    def _forward_pass(
        self, role: str, rows: Sequence[int], batches: Sequence[Batch], layers: Sequence[int]
    ) -> ForwardPass:
        batch, states, subject = collate([batches[i] for i in rows]), dict[int, Tensor](), self.trainable.subject
        self.forwards += 1
        with autocast(self.trainable.dtype, subject.device), recording_states(subject, layers, states):
            logits = logits_for(subject, batch, label_mask(batch), whole=bool(layers))
        topics = [self.data.topics[role][i] for i in rows] if role in self.data.topics else []
        return ForwardPass(batch, logits, self.reference, rows, role, states, self.depth, None, self.control, topics)

    def _reduce_gradients(self) -> None:
        sum_gradients(self.group, self.parameters)
        self.trainable.mask_gradients()

    def _combine(self, forget: list[Tensor | None], values: dict[str, float], step: int) -> Combination:
        retain_loss = sum(v for name, v in values.items() if name.startswith("loss ") and name.endswith(RETAIN_SIDE))
        context = StepContext(retain_loss, step / self.order.steps_per_epoch, self.memory)
        return combine(self.recipe.combiner, forget, self.parameters, context)

    def _clip(self) -> float:
        limit = math.inf if self.clip is None else self.clip
        return float(full_tensor(torch.nn.utils.clip_grad_norm_(self.parameters, limit)))

    def _check_finite(self, values: dict[str, float], step: int, lr: float, what: str) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                last = self.log[-1]["losses"] if self.log else None
                raise TrainingError(
                    f"step {step}: {what} of {name.removeprefix('loss ')} is {value} at lr {lr:g}; the last finite losses were "
                    f"{last}. The model given is unchanged, and error.delta holds the last good state; lower lr, or load the "
                    "model in float32"
                )

    def _control_lengths(self) -> dict[str, float]:
        """Mean norm of the stream over the first forget batch of each topic at the start, for adaptive control vectors."""
        losses = [term.loss for term in self.recipe.terms if term.loss.options.get("adaptive")]
        lengths: dict[str, float] = {}
        for layer in {steering_layer(loss.options["layer"], self.depth) for loss in losses}:
            topics, batches = self.data.topics["forget"], self.data.rows["forget"]
            missing = set(topics)
            for step in range(self.total_steps):
                rows = self.order.at(step).rows.get("forget", ())
                for topic in {topics[i] for i in rows} & missing:
                    batch = collate([batches[i] for i in rows if topics[i] == topic])
                    forward = ForwardPass(batch, torch.empty(0, 0, 0), self.reference, depth=self.depth)
                    lengths[f"{topic} {layer}"] = float(forward.reference_hidden(layer).norm(dim=-1).mean())
                    missing.remove(topic)
                if not missing:
                    break
        return lengths


def _optimizer(parameters: Sequence[Tensor], recipe: UnlearnRecipe) -> torch.optim.Optimizer:
    config = recipe.optimizer
    betas = {"betas": config.betas} if config.name == "adamw" else {}
    return OPTIMIZERS[config.name](parameters, lr=recipe.lr, weight_decay=config.weight_decay, **betas)


def _weighted_loss(
    forward: ForwardPass,
    active: Mapping[Term, float],
    totals: Mapping[Unit, int],
    sums: dict[str, Tensor],
    share: float,
) -> Tensor | None:
    """The weighted contribution of a micro-batch to the losses of the step; its parts are added to `sums`."""
    parts = {f"nll {forward.role}": share * forward.token_nll.detach().sum() / totals["tokens"]}
    total: Tensor | None = None
    for term, weight in active.items():
        loss = share * term.loss.sum(forward) / totals[term.loss.unit]
        parts[f"loss {term.name}"] = loss.detach()
        total = weight * loss if total is None else total + weight * loss
    for name, value in parts.items():
        sums[name] = sums[name] + value.double() if name in sums else value.double()
    return total


def _measurements(values: Mapping[str, float], combination: Combination | None) -> dict[str, Any]:
    products = None if combination is None else combination.products
    return {
        "losses": {name.removeprefix("loss "): v for name, v in values.items() if name.startswith("loss ")},
        "nll": {name.removeprefix("nll "): v for name, v in values.items() if name.startswith("nll ")},
        "cosine": None if products is None or math.isnan(products.cosine) else products.cosine,
        "forget_norm": None if products is None else math.sqrt(products.forget),
        "retain_norm": None if products is None else math.sqrt(products.retain),
        "c": None if products is None or products.is_vanishing else products.both / products.forget,
        "fallback": combination is not None and combination.fallback,
    }


# --- How the model runs while it is trained: recomputed blocks, and dropout


def recompute_blocks(subject: Subject) -> None:
    """Keep only the input of each block and recompute the block in the backward pass: less memory, more time.

    Gradient checkpointing of transformers needs train mode, in which dropout is active; this does not depend on the
    mode.
    """
    from torch.utils.checkpoint import checkpoint

    for path in subject.layout.block_paths:
        block = subject.model.get_submodule(path)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def check_dropout(subject: Subject) -> None:
    """Refuse dropout for a model that has none.

    Raises:
        ArgumentError: if no layer of the model has a dropout rate above 0.
    """
    module_rates = [module.p for module in subject.model.modules() if isinstance(module, nn.Dropout)]
    config_rates = {name: value for name, value in subject.model.config.to_dict().items() if "drop" in name}
    if not any(isinstance(rate, int | float) and rate > 0 for rate in [*module_rates, *config_rates.values()]):
        rates = ", ".join(f"{name}={value}" for name, value in config_rates.items())
        raise ArgumentError(
            f"dropout=True and this model drops nothing ({rates or 'no rate in its config'}); omit dropout, or load the model "
            "with a rate"
        )


@contextmanager
def dropout(model: nn.Module, key: str | None) -> Iterator[None]:
    """Train mode with random numbers that depend on the key alone, so that a resumed training repeats them.

    None leaves the model in eval mode.
    """
    if key is None:
        yield
        return
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed_of(key))
        model.train()
        try:
            yield
        finally:
            model.eval()


# --- Several processes: rows by rank, and FSDP2


class MicroBatch(NamedTuple):
    """The rows of one forward pass."""

    rows: Sequence[int]
    is_real: bool
    """False where a rank has no rows left and runs a forward pass only because the others do: its loss counts as 0."""


def micro_batches(group: ProcessGroup, rows: Sequence[int], size: int) -> list[MicroBatch]:
    """Rows rank, rank + group size, ... in micro-batches of `size`; every rank gets the same number of them."""
    own = rows[group.rank :: group.size]
    longest = -(-len(rows) // group.size)
    parts = [own[start : start + size] for start in range(0, longest, size)]
    return [MicroBatch(part, True) if part else MicroBatch(rows[:1], False) for part in parts]


def check_shardable(recipe: UnlearnRecipe, processes: int) -> None:
    """Refuse a training that cannot be sharded.

    Raises:
        ArgumentError: for a single process, adapters, or an optimizer or forget gradient that needs whole tensors.
    """
    if processes < 2:
        raise ArgumentError(
            "shard=True and this is the only process; start several with torchrun --nproc-per-node N, or omit shard"
        )
    if recipe.parameters.lora is not None:
        raise ArgumentError("shard=True and lora were both given; adapters are small, omit shard")
    if recipe.adversary or recipe.gradient_filter or recipe.agreement or recipe.noise:
        raise ArgumentError(
            f"shard=True and recipe {recipe.name!r} takes its forget gradient at other weights, filters or masks it, or adds "
            "noise, which needs whole tensors; omit shard"
        )
    if recipe.optimizer.name == "adafactor":
        raise ArgumentError(
            "shard=True and optimizer adafactor were both given, and its row and column means need whole tensors; use "
            "adamw or sgd, or omit shard"
        )


def shard(trainable: TrainableCopy) -> None:
    """Shard the trained tensors, their gradients and the optimizer state block by block, each along its first axis.

    The model given stays whole on every rank, because it is the reference; tensors that are not trained are shared with
    it. Gradients are summed over the ranks, not averaged: losses are divided by counts over all ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model = trainable.subject.model
    mesh = init_device_mesh(trainable.subject.device.type, (dist.get_world_size(),))
    frozen = {p for p in model.parameters() if not p.requires_grad}
    blocks = [model.get_submodule(path) for path in trainable.subject.layout.block_paths]
    for module in (*(b for b in blocks if any(p.requires_grad for p in b.parameters())), model):
        # The root is resharded after its forward too: a pass without backward would leave it whole, and stale after the
        # step.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=frozen)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    sharded = dict(model.named_parameters())
    trainable.tensors = {name: sharded[name] for name in trainable.tensors}
    trainable.mask = {n: shard_like(m.expand(sharded[n].shape), sharded[n]) for n, m in trainable.mask.items()}


def set_gradient_sync(model: nn.Module, parameters: Sequence[Tensor], *, enabled: bool) -> None:
    """Sum the gradients of shards in this backward pass only if enabled: for the last micro-batch of a role."""
    if parameters and is_sharded(parameters[0]):
        from torch.distributed.fsdp import FSDPModule

        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(enabled)
