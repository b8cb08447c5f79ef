"""Tensors that may lie in parts on several ranks: the own part, the whole, and a part of what is whole."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


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
