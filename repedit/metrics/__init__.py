"""Measurements of a model's behaviour, one family a room; each aggregate has a verdict beside it."""

import importlib
from typing import TYPE_CHECKING, Any

# Loaded on first use: statistics and text packages take seconds.
_ROOMS = (
    "benchmarks",
    "collapse",
    "generation",
    "harness",
    "margins",
    "membership",
    "muse",
    "plain",
    "probability",
    "semeval",
    "separation",
    "shadows",
    "streaming",
    "tofu",
)

__all__ = [*_ROOMS]  # pyright: ignore


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'repedit.metrics' has no attribute {name!r}")
    return importlib.import_module(f"repedit.metrics.{name}")


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from repedit.metrics import benchmarks, collapse, facts, generation, harness, membership, muse, semeval, tofu
    from repedit.metrics import collapse as plain
    from repedit.metrics import generation as streaming
    from repedit.metrics import membership as margins
    from repedit.metrics import membership as separation
    from repedit.metrics import membership as shadows
