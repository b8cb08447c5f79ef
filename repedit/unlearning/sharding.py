"""Training on several processes: each takes its share of the rows of a step, and FSDP2 divides what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from repedit.distributed import ProcessGroup, is_sharded, shard_like
from repedit.errors import ArgumentError
from repedit.unlearning.parameters import TrainableCopy
from repedit.unlearning.recipe import UnlearnRecipe


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
