"""The loop of gradient unlearning: two sides, one gradient, one step; on one process or on several."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from repedit.activations.forward import inputs_of
from repedit.data import Batch
from repedit.distributed import Ranks
from repedit.errors import ArgumentError, TrainingError
from repedit.models.subject import Subject
from repedit.training.sampler import collated
from repedit.unlearning.combiners import Joined, Moment, join
from repedit.unlearning.losses import Seen, Steering, count, layer_of
from repedit.unlearning.parameters import Trainee
from repedit.unlearning.recipe import Term, UnlearnRecipe
from repedit.unlearning.reference import Reference, precision, watching
from repedit.unlearning.sampling import FORGET_SIDE, RETAIN_SIDE
from repedit.unlearning.schedule import Progress
from repedit.unlearning.sharding import add_gradients, divided, is_sharded, parts, whole
from repedit.unlearning.training_data import Material

# --- How a model runs while it is trained: blocks that are computed again in the backward pass, and dropout


def recompute_blocks(subject: Subject) -> None:
    """Keep the input of each block alone, and compute the block again in the backward pass: less memory, more time.

    The checkpointing of transformers works in train mode only, where dropout works too; this one does not ask the mode.
    """
    from torch.utils.checkpoint import checkpoint

    for path in subject.layout.block_paths:
        block = subject.model.get_submodule(path)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def check_dropout(subject: Subject) -> None:
    """Refuse dropout for a model that has none.

    Raises:
        ArgumentError: if no layer of the model drops anything.
    """
    rates = [module.p for module in subject.model.modules() if isinstance(module, nn.Dropout)]
    named = {name: value for name, value in subject.model.config.to_dict().items() if "drop" in name}
    if not any(isinstance(rate, int | float) and rate > 0 for rate in [*rates, *named.values()]):
        raise ArgumentError(
            f"dropout=True and this model drops nothing ({', '.join(f'{k}={v}' for k, v in named.items()) or 'no rate in its config'}); "
            "leave dropout out, or load the model with a rate"
        )


@contextmanager
def dropping(model: nn.Module, key: str | None) -> Iterator[None]:
    """Train mode, with draws that depend on the key alone, so that a resumed training repeats them; None for eval mode."""
    if key is None:
        yield
        return
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
        model.train()
        try:
            yield
        finally:
            model.eval()


# --- Trained tensors divided among ranks by FSDP2: who holds what, and how a whole one comes back
#
# Divided are the float32 copies of the trained tensors, their gradients and what the optimiser keeps of them. The model given
# stays whole on every rank, because it is the reference; tensors that are not trained are shared with it.


def check_shardable(recipe: UnlearnRecipe, ranks: int) -> None:
    """Refuse what cannot be divided.

    Raises:
        ArgumentError: for one process alone, adapters, or an optimiser that needs whole tensors.
    """
    if ranks < 2:
        raise ArgumentError(
            "shard=True and this is the only process; start several with torchrun --nproc-per-node N, or leave shard out"
        )
    if recipe.parameters.lora is not None:
        raise ArgumentError("shard=True and lora were both given; adapters are small, leave shard out")
    if recipe.optimiser.name == "adafactor":
        raise ArgumentError(
            "shard=True and optimiser adafactor were both given, and its row and column means need whole tensors; take adamw "
            "or sgd, or leave shard out"
        )


def shard(trainee: Trainee) -> None:
    """Divide what is trained among the ranks, block by block; each keeps an equal part of the first axis of every tensor.

    Gradients are summed over the ranks, not averaged: losses are divided by counts over all of them.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model = trainee.subject.model
    mesh = init_device_mesh(trainee.subject.device.type, (dist.get_world_size(),))
    # The root is let go after its forward too: a pass without backward would leave it whole, and stale after the step.
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True}
    options["ignored_params"] = {p for p in model.parameters() if not p.requires_grad}
    blocks = [model.get_submodule(path) for path in trainee.subject.layout.block_paths]
    for module in (*(b for b in blocks if any(p.requires_grad for p in b.parameters())), model):
        fully_shard(module, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    named = dict(model.named_parameters())
    trainee.tensors = {name: named[name] for name in trainee.tensors}
    trainee.mask = {n: divided(m.expand(named[n].shape), named[n]) for n, m in trainee.mask.items()}


def synchronise(model: Any, parameters: list[Tensor], *, last: bool) -> None:
    """Let the shards be summed in the backward pass of the last micro-batch of a role alone."""
    if parameters and is_sharded(parameters[0]):
        model.set_requires_gradient_sync(last)


# --- The loop of gradient unlearning: two sides, one gradient, one step
#
# Role gradients add up over micro-batches before they are combined; clipping comes after, on what the combiner gives.


SIDES = (FORGET_SIDE, RETAIN_SIDE)


@dataclass(eq=False)
class Training:
    """A model in training."""

    trainee: Trainee
    reference: Reference
    material: Material
    recipe: UnlearnRecipe
    micro_batch: int
    clip: float | None
    seed: int
    ranks: Ranks = field(default_factory=Ranks)
    dropout: bool = False
    log: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)
    """What the combiner keeps between steps."""
    forwards: int = 0

    def __post_init__(self) -> None:
        self.order = self.recipe.sampler.order(self.material.topics, self.recipe.batch_size, self.seed)
        self.total = self.recipe.steps or self.order.steps_of(self.recipe.epochs)
        self.parameters: list[Tensor] = list(self.trainee.tensors.values())
        self.optimiser = optimiser(self.parameters, self.recipe)
        self.watched = {role for rule in self.recipe.stop for role in rule.watches}
        self.steering = Steering(self.seed, self._lengths())

    def run(self, *, after: Callable[[], None], progress: bool | None = None) -> tuple[str, str]:
        """Take the steps that are left; (name of the rule that ended it, reason).

        Args:
            after: called after each step.
        Raises:
            TrainingError: if a loss or the gradient is not finite; the weights are those of the last good step.
        """
        begin = len(self.log)
        ended = self._ended() if begin else None  # a training that was killed after its last step has taken it
        if ended is not None:
            return ended
        hidden = None if progress is None and self.ranks.first else not (progress and self.ranks.first)
        bar = tqdm(range(begin, self.total), initial=begin, total=self.total, desc=self.recipe.name, leave=False,
                   disable=hidden)  # fmt: skip
        for step in bar:
            record = self._step(step)
            self.log.append(record)
            losses = ", ".join(f"{name} {value:.3g}" for name, value in record["losses"].items())
            bar.set_postfix_str(f"{losses}, cos {record['cosine']:.2f}" if record["cosine"] is not None else losses)
            after()
            ended = self._ended()
            if ended is not None:
                return ended
        return "", f"all {self.total} steps taken"

    def _ended(self) -> tuple[str, str] | None:
        """The rule that ends the training after the steps taken, with its reason."""
        taken = len(self.log)
        now = Progress(taken, taken / self.order.epoch, self.log, lambda: self.trainee.subject)
        for rule in self.recipe.stop:
            reason = self.ranks.decided(rule.reason(now))
            if reason:
                return rule.name, f"{rule.name} at step {taken - 1}: {reason}"
        return None

    def _step(self, step: int) -> dict[str, Any]:
        begin, draw = perf_counter(), self.order.at(step)
        lr = (draw.lr or self.recipe.lr) * self.recipe.schedule.factor(step, self.total)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        aside: list[Tensor | None] = [None] * len(self.parameters)
        for side in SIDES:
            for role in (role for role in side if role in draw.rows):
                self._role(role, draw.rows[role], step, sums)
            apart = side is FORGET_SIDE and self.recipe.combiner.separate
            if apart or side is RETAIN_SIDE:
                add_gradients(self.ranks, self.parameters)
                self.trainee.mask_gradients()
            if apart:
                aside = [p.grad for p in self.parameters]
                self.optimiser.zero_grad(set_to_none=True)
        values = {}
        if sums:
            values = dict(zip(sums, self.ranks.total(torch.stack(list(sums.values()))).tolist(), strict=True))
        self._check(values, step, lr, "loss")
        joined = self._join(aside, values, step)
        norm = self._clipped()
        self._check({"the combined gradient": norm}, step, lr, "norm")
        self.optimiser.step()
        self.trainee.restore_masked()
        found: dict[str, Any] = {"step": step, "epoch": round(step / self.order.epoch, 4), "norm": norm, "lr": lr}
        found |= {"rows": {role: len(rows) for role, rows in draw.rows.items()}}
        seconds = self.ranks.slowest(perf_counter() - begin, self.trainee.subject.device)
        return found | _measured(values, joined) | {"seconds": round(seconds, 4)}

    def _role(self, role: str, rows: Sequence[int], step: int, sums: dict[str, Tensor]) -> None:
        """Forward and backward of every term of a role, one forward a micro-batch."""
        weights = {t: t.weight_at(step, self.log) for t in self.recipe.terms if t.role == role}
        active = {term: weight for term, weight in weights.items() if weight != 0}
        if not active and role not in self.watched:
            return
        held = self.material.rows[role]
        units = {unit: sum(count(unit, held[i]) for i in rows) for unit in {"tokens", *(t.loss.unit for t in active)}}
        shares = parts(self.ranks, rows, self.micro_batch)
        for number, (part, counts) in enumerate(shares, 1):
            model = self.trainee.subject.model
            synchronise(model, self.parameters, last=number == len(shares))
            # Over the backward pass too: blocks that are computed again must drop the same entries.
            with dropping(model, f"{self.seed}:{step}:{role}:{list(part)}" if self.dropout else None):
                with torch.set_grad_enabled(bool(active)):
                    seen = self._forward(role, part, active)
                    loss = self._summed(seen, active, units, sums, 1.0 if counts else 0.0)
                if loss is not None:
                    loss.backward()

    def _summed(
        self,
        seen: Seen,
        active: dict[Term, float],
        units: Mapping[Any, int],
        sums: dict[str, Tensor],
        share: float = 1.0,
    ) -> Tensor | None:
        """The weighted share of a micro-batch in the losses of the step; what it adds to each is put into `sums`."""
        parts = {f"nll {seen.role}": share * seen.token_nll.detach().sum() / units["tokens"]}
        total: Tensor | None = None
        for term, weight in active.items():
            loss = share * term.loss.sum(seen) / units[term.loss.unit]
            parts[f"loss {term.name}"] = loss.detach()
            total = weight * loss if total is None else total + weight * loss
        for name, value in parts.items():
            sums[name] = sums[name] + value.double() if name in sums else value.double()
        return total

    def _forward(self, role: str, rows: Sequence[int], active: Iterable[Term]) -> Seen:
        needs = {need for term in active for need in term.loss.needs}
        layers = {layer_of(t.loss.options.get("layer"), self.depth) for t in active if "hidden" in t.loss.needs}
        seen = self._seen(role, rows, self.material.rows[role], sorted(layers))
        if "alternative" in needs:
            seen.other = self._seen("alternative", rows, self.material.alternatives[role], [])
        return seen

    def _seen(self, role: str, rows: Sequence[int], held: Sequence[Batch], layers: Sequence[int]) -> Seen:
        batch, states = collated([held[i] for i in rows]), dict[int, Tensor]()
        self.forwards += 1
        with precision(self.trainee.dtype, self.trainee.subject.device), watching(self.trainee.subject, layers, states):
            logits = self.trainee.subject.model(**inputs_of(batch)).logits
        topics = [self.material.topics[role][i] for i in rows] if role in self.material.topics else []
        return Seen(batch, logits, self.reference, rows, role, states, self.depth, None, self.steering, topics)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.trainee.subject.layout.layers)

    def _join(self, aside: list[Tensor | None], values: dict[str, float], step: int) -> Joined | None:
        if not self.recipe.combiner.separate:
            return None
        retain = sum(v for name, v in values.items() if name.startswith("loss ") and name.endswith(RETAIN_SIDE))
        return join(self.recipe.combiner, aside, self.parameters, Moment(retain, step / self.order.epoch, self.memory))

    def _clipped(self) -> float:
        limit = math.inf if self.clip is None else self.clip
        return float(whole(torch.nn.utils.clip_grad_norm_(self.parameters, limit)))

    def _check(self, values: dict[str, float], step: int, lr: float, what: str) -> None:
        bad = {name: value for name, value in values.items() if not math.isfinite(value)}
        if bad:
            name, value = next(iter(bad.items()))
            last = self.log[-1]["losses"] if self.log else None
            raise TrainingError(
                f"step {step}: {what} of {name.removeprefix('loss ')} is {value} at lr {lr:g}; the last finite losses were {last}. The "
                "model given is unchanged, and error.delta holds the last good state; lower lr, or load the model in float32"
            )

    def _lengths(self) -> dict[str, float]:
        """Mean norm of the stream over the first forget batch of each topic at the start weights, for adaptive steering."""
        terms = [t for t in self.recipe.terms if t.loss.options.get("adaptive")]
        found: dict[str, float] = {}
        for layer in {layer_of(t.loss.options["layer"], self.depth) for t in terms}:
            wanted = set(self.material.topics["forget"])
            for step in range(self.total):
                rows = self.order.at(step).rows.get("forget", ())
                for topic in {self.material.topics["forget"][i] for i in rows} & wanted:
                    mine = [self.material.rows["forget"][i] for i in rows if self.material.topics["forget"][i] == topic]
                    batch = collated(mine)
                    seen = Seen(batch, torch.empty(0, 0, 0), self.reference, depth=self.depth)
                    found[f"{topic} {layer}"] = float(seen.reference_hidden(layer).norm(dim=-1).mean())
                    wanted.remove(topic)
                if not wanted:
                    break
        return found


def optimiser(parameters: Sequence[Tensor], recipe: UnlearnRecipe) -> torch.optim.Optimizer:
    """The optimiser of a recipe; AdamW in one fused pass over the weights."""
    chosen = recipe.optimiser
    common: dict[str, Any] = {"lr": recipe.lr, "weight_decay": chosen.weight_decay}
    if chosen.name == "adamw":
        return torch.optim.AdamW(parameters, betas=chosen.betas, fused=True, **common)
    return {"sgd": torch.optim.SGD, "adafactor": torch.optim.Adafactor}[chosen.name](parameters, **common)


def _measured(values: Mapping[str, float], joined: Joined | None) -> dict[str, Any]:
    dots = None if joined is None else joined.dots
    return {
        "losses": {name.removeprefix("loss "): v for name, v in values.items() if name.startswith("loss ")},
        "nll": {name.removeprefix("nll "): v for name, v in values.items() if name.startswith("nll ")},
        "cosine": None if dots is None or math.isnan(dots.cosine) else dots.cosine,
        "forget_norm": None if dots is None else math.sqrt(dots.forget),
        "retain_norm": None if dots is None else math.sqrt(dots.retain),
        "c": None if dots is None or dots.vanished else dots.both / dots.forget,
        "fallback": bool(joined is not None and joined.fallback),
    }
