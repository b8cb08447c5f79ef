"""Several processes started by `torchrun`: the rank of this one, collective operations, and sharded tensors; pools of workers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from repedit.errors import FingerprintError, ProcessFailed

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


T = TypeVar("T")


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def completed(futures: Iterable[Future[T]]) -> Iterator[Future[T]]:
    """Calls of a pool, in the order in which they end.

    The wait wakes up five times a second: one without an end would sleep through an interrupt that another thread receives,
    or that comes just before it.
    """
    running = set(futures)
    while running:
        done, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
        yield from done


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that work together, and the rank of this one; a single process by default."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def broadcast(self, value: Tensor) -> Tensor:
        """The tensor of rank 0, in place."""
        if self.size > 1:
            dist.broadcast(value, src=0)
        return value

    def any(self, flag: bool, device: torch.device | str = "cpu") -> bool:
        """Whether a flag is set on any rank."""
        return bool(self._max(torch.tensor(int(flag), device=device)))

    def max(self, value: float, device: torch.device) -> float:
        """The largest of a number over the ranks."""
        return float(self._max(torch.tensor(value, dtype=torch.float64, device=device)))

    def broadcast_text(self, text: str) -> str:
        """The text of rank 0. A metric may round differently on other ranks, but all of them must stop together."""
        if self.size == 1:
            return text
        texts = [text]
        dist.broadcast_object_list(texts, src=0)
        return texts[0]

    def check_alive(self, error: Exception | None) -> None:
        """Raise the error of this rank, or name the rank that has one, so that no rank waits for one that gave up.

        Raises:
            ProcessFailed: on the ranks without an error.
        """
        if self.size > 1:
            messages = [""] * self.size
            dist.all_gather_object(messages, "" if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        if self.size > 1:
            failed = next((rank for rank, message in enumerate(messages) if message), None)
            if failed is not None:
                raise ProcessFailed(f"rank {failed} of {self.size} failed, so nothing was merged: {messages[failed]}")

    def check_same(self, **values: object) -> None:
        """Refuse ranks that would work on different inputs.

        Raises:
            FingerprintError: on every rank, with the first value that differs.
        """
        if self.size == 1:
            return
        gathered: list[Mapping[str, object]] = [{}] * self.size
        dist.all_gather_object(gathered, values)
        for rank, other in enumerate(gathered):
            for name, value in gathered[0].items():
                if other[name] != value:
                    raise FingerprintError(
                        f"ranks 0 and {rank} have different inputs: {name} is {_short(value)} and {_short(other[name])}; "
                        "give every process the same model, data and options"
                    )

    def _max(self, value: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return value


def process_group(device: torch.device) -> ProcessGroup:
    """The running process group; initialized here (NCCL on CUDA, Gloo elsewhere) if `torchrun` started this process."""
    if not dist.is_available():
        return ProcessGroup()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "MASTER_ADDR" not in os.environ:
            return ProcessGroup()
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return ProcessGroup(dist.get_rank(), dist.get_world_size())


def local_device(device: str) -> str:
    """The CUDA device of this process under `torchrun` if CUDA is requested or available; otherwise `device`."""
    local_rank = os.environ.get("LOCAL_RANK")
    if local_rank is None or device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    return f"cuda:{local_rank}"


def leave_process_group() -> bool:
    """Destroy the running process group, if there is one; whether this process was its first, or is the only one."""
    if not (dist.is_available() and dist.is_initialized()):
        return True
    is_first = dist.get_rank() == 0
    dist.destroy_process_group()
    return is_first


# --- Tensors that may be sharded over the ranks (DTensor)


def is_sharded(value: Tensor) -> bool:
    """Whether a tensor is divided among several ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    # Importing it takes seconds, and a single process never needs it.
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def full_tensor(value: Tensor) -> Tensor:
    """The whole of a tensor; every rank must call it."""
    return cast("DTensor", value).full_tensor() if is_sharded(value) else value


def local_tensor(value: Tensor) -> Tensor:
    """The part of a tensor on this rank."""
    return cast("DTensor", value).to_local() if is_sharded(value) else value


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor sharded as `like` is, without communication."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded = cast("DTensor", like)
    return distribute_tensor(value.contiguous(), sharded.device_mesh, sharded.placements, src_data_rank=None)


def sum_gradients(group: ProcessGroup, parameters: Sequence[Tensor]) -> None:
    """Sum `.grad` over the ranks; shards were summed in the backward pass already.

    A parameter that no loss reaches on any rank keeps no gradient, so an optimizer skips it as it does with one process.
    """
    if group.size == 1 or not parameters or is_sharded(parameters[0]):
        return
    reached = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=parameters[0].device)
    dist.all_reduce(reached, dist.ReduceOp.MAX)
    pending = []
    for p, is_reached in zip(parameters, reached.tolist(), strict=True):
        if is_reached:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.contiguous()
            pending.append(dist.all_reduce(p.grad, async_op=True))
    for work in pending:
        work.wait()


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
