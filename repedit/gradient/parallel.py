"""Several processes train one model: each takes its share of the rows of a step, and all take the same step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from repedit.gradient.tensors import is_sharded
from repedit.ranks import Ranks


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
