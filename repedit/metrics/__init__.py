"""Measurements of a model's behaviour, one module per benchmark; a verdict stands beside every aggregate."""

import importlib
from typing import TYPE_CHECKING, Any

# Loaded on first use: statistics and text packages take seconds.
_MODULES = (
    "answers", "benchmarks", "collapse", "facts", "generation", "harness", "location", "membership", "muse",
    "relearning", "semeval", "tofu",
)  # fmt: skip

__all__ = [*_MODULES]  # pyright: ignore


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'repedit.metrics' has no attribute {name!r}")
    return importlib.import_module(f"repedit.metrics.{name}")


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from repedit.metrics import (
        answers,
        benchmarks,
        collapse,
        facts,
        generation,
        harness,
        location,
        membership,
        muse,
        relearning,
        semeval,
        tofu,
    )
