"""Trained tensors divided among ranks by FSDP2: who holds what, and how a whole one comes back.

Divided are the float32 copies of the trained tensors, their gradients and what the optimiser keeps of them. The model given
stays whole on every rank, because it is the reference; tensors that are not trained are shared with it.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from repedit.errors import ArgumentError
from repedit.gradient.parameters import Trainee
from repedit.gradient.recipe import UnlearnRecipe
from repedit.gradient.tensors import divided, is_sharded


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
    blocks = [model.get_submodule(path) for path in trainee.subject.anatomy.block_paths]
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
