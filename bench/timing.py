"""Ratios on a noisy machine: strict alternation, thread CPU time, quantiles, and an A/A control beside each A/B."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True)
class Ratio:
    """Median of the pair ratios b / a with 20 % and 80 % quantiles, and the same for a / a."""

    median: float
    q20: float
    q80: float
    n: int
    control: tuple[float, float]

    def verdict(self, passes: Callable[[float], bool]) -> str:
        """Pass or fail where both quantiles agree, and the median as far off as the control is; else "not resolved"."""
        noisy = [self.median / self.control[0], self.median / self.control[1]]
        found = {passes(value) for value in (self.q20, self.q80, *noisy)}
        return "not resolved" if len(found) > 1 else ("pass" if found == {True} else "fail")

    def row(self, name: str, bar: str, passes: Callable[[float], bool], **extra: Any) -> dict[str, Any]:
        """A row of the results file."""
        return {"name": name, **asdict(self), "bar": bar, "status": self.verdict(passes), **extra}


def paired(a: Callable[[], object], b: Callable[[], object], *, pairs: int = 7, seed: int = 0) -> Ratio:
    """CPU time of b over a, alternating in shuffled order after one warm-up of each."""
    return ratio(alternated(lambda: cpu(a), lambda: cpu(b), pairs=pairs, seed=seed))


def alternated(a: Callable[[], T], b: Callable[[], T], *, pairs: int, seed: int = 0) -> list[dict[str, T]]:
    """What a, b and a again measure, in rounds of shuffled order after one warm-up of each."""
    rng = random.Random(seed)
    a(), b()
    rounds = []
    for _ in range(pairs):
        order = [("a", a), ("b", b), ("again", a)]
        rng.shuffle(order)
        rounds.append({name: run() for name, run in order})
    return rounds


def ratio(rounds: Sequence[Mapping[str, float]]) -> Ratio:
    """b over a within each round, and a again over a."""
    q20, median, q80 = np.quantile([each["b"] / each["a"] for each in rounds], [0.2, 0.5, 0.8])
    low, high = np.quantile([each["again"] / each["a"] for each in rounds], [0.2, 0.8])
    return Ratio(float(median), float(q20), float(q80), len(rounds), (float(low), float(high)))


def cpu(run: Callable[[], object]) -> float:
    """Seconds of CPU of this thread."""
    start = time.thread_time()
    run()
    return time.thread_time() - start
