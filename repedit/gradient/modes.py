"""How a model runs while it is trained: blocks that are computed again in the backward pass, and dropout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from repedit.errors import ArgumentError
from repedit.models import Subject


def recompute_blocks(subject: Subject) -> None:
    """Keep the input of each block alone, and compute the block again in the backward pass: less memory, more time.

    The checkpointing of transformers works in train mode only, where dropout works too; this one does not ask the mode.
    """
    from torch.utils.checkpoint import checkpoint

    for path in subject.anatomy.block_paths:
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
