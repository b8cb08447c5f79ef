"""Trained tensors that are divided among ranks (FSDP2): who holds what, and how a whole one comes back."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def is_sharded(value: Tensor) -> bool:
    """Whether a tensor lies in parts on several ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    # Four seconds of imports, which one process alone never needs.
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)
