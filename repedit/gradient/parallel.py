"""Several processes train one model: each takes its share of the rows of a step, and all take the same step."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from repedit.errors import FingerprintError
from repedit.gradient.tensors import is_sharded


class Part(NamedTuple):
    """Rows of one forward pass."""

    rows: Sequence[int]
    counts: bool
    """False where a rank has no rows left and only keeps step with the others: its loss is multiplied by 0."""


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, and which of them this is; one alone by default."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def parts(self, rows: Sequence[int], micro_batch: int) -> list[Part]:
        """Rows rank, rank + size, ... in micro-batches; as many on every rank."""
        mine = rows[self.rank :: self.size]
        longest = -(-len(rows) // self.size)
        found = [mine[start : start + micro_batch] for start in range(0, longest, micro_batch)]
        return [Part(part, True) if part else Part(rows[:1], False) for part in found]

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Sum `.grad` over the ranks; shards were summed in the backward pass already.

        A parameter that no loss reaches on any rank keeps no gradient, so an optimiser leaves it alone as with one process.
        """
        if self.size == 1 or not parameters or is_sharded(parameters[0]):
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

    def slowest(self, seconds: float, device: torch.device) -> float:
        """The largest of a duration over the ranks, so that their logs agree."""
        if self.size == 1:
            return seconds
        found = torch.tensor(seconds, dtype=torch.float64, device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return float(found)

    def decided(self, reason: str) -> str:
        """What the first rank decided: a metric may round differently elsewhere, and all must stop together."""
        if self.size == 1:
            return reason
        held = [reason]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def check_same(self, **values: Any) -> None:
        """Refuse ranks that would train different things.

        Raises:
            FingerprintError: on every rank, with the first value that differs.
        """
        if self.size == 1:
            return
        held: list[Mapping[str, Any]] = [{}] * self.size
        dist.all_gather_object(held, values)
        for rank, other in enumerate(held):
            for name, value in held[0].items():
                if other[name] != value:
                    raise FingerprintError(
                        f"ranks 0 and {rank} do not train the same: {name} is {_short(value)} and {_short(other[name])}; give every "
                        "process the same model, recipe, sets and options"
                    )


def joined_ranks(device: torch.device) -> Ranks:
    """The ranks of the running process group; begun here, with nccl on CUDA and gloo elsewhere, if `torchrun` started us."""
    if not dist.is_available():
        return Ranks()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "MASTER_ADDR" not in os.environ:
            return Ranks()
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size())


def own_device(device: str) -> str:
    """Under `torchrun` the CUDA device of this process, where CUDA was asked for or is there; else what was asked for."""
    local = os.environ.get("LOCAL_RANK")
    if local is None or device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    return f"cuda:{local}"


def leave() -> bool:
    """End the running process group, if there is one; whether this process was its first, or alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return True
    first = dist.get_rank() == 0
    dist.destroy_process_group()
    return first


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
