"""Ratios on a noisy machine: strict alternation, thread CPU time, quantiles, and an A/A control beside each A/B."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Ratio:
    """Median of the pair ratios b / a with 20 % and 80 % quantiles, and the same for a / a."""

    median: float
    q20: float
    q80: float
    n: int
    control: tuple[float, float]

    def verdict(self, passes: Callable[[float], bool]) -> str:
        """Pass or fail where both quantiles agree; "not resolved" otherwise."""
        low, high = passes(self.q20), passes(self.q80)
        return "not resolved" if low != high else ("pass" if low else "fail")

    def row(self, name: str, bar: str, passes: Callable[[float], bool], **extra: Any) -> dict[str, Any]:
        """A row of the results file."""
        return {"name": name, **asdict(self), "bar": bar, "status": self.verdict(passes), **extra}


def paired(a: Callable[[], object], b: Callable[[], object], *, pairs: int = 7, seed: int = 0) -> Ratio:
    """CPU time of b over a, alternating in shuffled order after one warm-up of each."""
    rng = random.Random(seed)
    cpu(a), cpu(b)
    ratios, controls = [], []
    for _ in range(pairs):
        order = [("a", a), ("b", b), ("again", a)]
        rng.shuffle(order)
        times = {name: cpu(run) for name, run in order}
        ratios.append(times["b"] / times["a"])
        controls.append(times["again"] / times["a"])
    q20, median, q80 = np.quantile(ratios, [0.2, 0.5, 0.8])
    low, high = np.quantile(controls, [0.2, 0.8])
    return Ratio(float(median), float(q20), float(q80), pairs, (float(low), float(high)))


def cpu(run: Callable[[], object]) -> float:
    """Seconds of CPU of this thread."""
    start = time.thread_time()
    run()
    return time.thread_time() - start
