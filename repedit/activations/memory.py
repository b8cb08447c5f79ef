"""Less at a time where memory does not suffice."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from repedit.errors import RepeditError

T = TypeVar("T")


def out_of_memory(error: BaseException) -> bool:
    """Whether the machine had no more memory; a size that repedit itself refuses is another thing."""
    if isinstance(error, RepeditError):
        return False
    # On a CPU torch raises a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


def halving(run: Callable[[int], T], size: int) -> tuple[T, int]:
    """(run(size), size), with half the size for as long as memory does not suffice.

    Raises:
        Exception: what `run` raised, if memory does not suffice for a size of 1 either, or if it was something else.
    """
    while True:
        try:
            return run(size), size
        except (MemoryError, RuntimeError) as error:
            if size <= 1 or not out_of_memory(error):
                raise
        size //= 2
