"""Tensors that lie in parts on several ranks, and gradients added over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from repedit.distributed import Ranks

# --- Tensors that may lie in parts on several ranks: the own part, the whole, and a part of what is whole


def is_sharded(value: Tensor) -> bool:
    """Whether a tensor lies in parts on several ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    # Seconds of imports, which one process alone never needs.
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def whole(value: Tensor) -> Tensor:
    """All of a tensor; every rank must ask."""
    return _any(value).full_tensor() if is_sharded(value) else value


def local(value: Tensor) -> Tensor:
    """The part of a tensor that lies here."""
    return _any(value).to_local() if is_sharded(value) else value


def divided(value: Tensor, like: Tensor) -> Tensor:
    """The same part of a whole tensor that this rank holds of `like`; nothing is sent."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    held = _any(like)
    return distribute_tensor(value.contiguous(), held.device_mesh, held.placements, src_data_rank=None)


def _any(value: Tensor) -> Any:
    return value


# --- Several processes train one model: each takes its share of the rows of a step, and all take the same step


class Part(NamedTuple):
    """Rows of one forward pass."""

    rows: Sequence[int]
    counts: bool
    """False where a rank has no rows left and only keeps step with the others: its loss is multiplied by 0."""


def parts(ranks: Ranks, rows: Sequence[int], micro_batch: int) -> list[Part]:
    """Rows rank, rank + size, ... in micro-batches; as many on every rank."""
    mine = rows[ranks.rank :: ranks.size]
    longest = -(-len(rows) // ranks.size)
    found = [mine[start : start + micro_batch] for start in range(0, longest, micro_batch)]
    return [Part(part, True) if part else Part(rows[:1], False) for part in found]


def add_gradients(ranks: Ranks, parameters: Sequence[Tensor]) -> None:
    """Sum `.grad` over the ranks; shards were summed in the backward pass already.

    A parameter that no loss reaches on any rank keeps no gradient, so an optimiser leaves it alone as with one process.
    """
    if ranks.size == 1 or not parameters or is_sharded(parameters[0]):
        return
    reached = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=parameters[0].device)
    dist.all_reduce(reached, dist.ReduceOp.MAX)
    pending = []
    for p, anywhere in zip(parameters, reached.tolist(), strict=True):
        if anywhere:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.contiguous()
            pending.append(dist.all_reduce(p.grad, async_op=True))
    for work in pending:
        work.wait()
