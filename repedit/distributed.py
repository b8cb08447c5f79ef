"""The processes of one `torchrun`: which of them this is, and what they find together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from repedit.errors import FingerprintError, ProcessFailed


@dataclass(frozen=True)
class Ranks:
    """The processes that work together, and which of them this is; one alone by default."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def of_first(self, value: Tensor) -> Tensor:
        """The first rank's tensor, in place."""
        if self.size > 1:
            dist.broadcast(value, src=0)
        return value

    def any(self, flag: bool, device: torch.device | str = "cpu") -> bool:
        """Whether a flag is set on some rank."""
        if self.size == 1:
            return flag
        found = torch.tensor(int(flag), device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

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

    def check_alive(self, error: Exception | None) -> None:
        """Raise this rank's error, or name the rank that has one: nobody waits for a rank that gave up.

        Raises:
            ProcessFailed: on the ranks that have none.
        """
        if error is not None and self.size == 1:
            raise error
        if self.size == 1:
            return
        held = [""] * self.size
        dist.all_gather_object(held, "" if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        failed = next((rank for rank, text in enumerate(held) if text), None)
        if failed is not None:
            raise ProcessFailed(f"rank {failed} of {self.size} failed, so nothing was merged: {held[failed]}")

    def check_same(self, **values: Any) -> None:
        """Refuse ranks that would work on different things.

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
                        f"ranks 0 and {rank} do not work on the same: {name} is {_short(value)} and {_short(other[name])}; give every "
                        "process the same model, data and options"
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
