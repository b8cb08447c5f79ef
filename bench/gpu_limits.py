"""Time on a GPU, and what the card can do at best: copying, reading, its second-level cache, and matrix products."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

REPEATS = 25
DEVICE = "cuda"


@dataclass(frozen=True)
class Time:
    """Microseconds a call, and the ratio of two measurements of the same thing: a smaller difference is noise."""

    median: float
    q20: float
    q80: float
    n: int
    control: float


def microseconds(call: Callable[[int], object], count: int) -> Time:
    """Device time of `call(i)`, i < count, replayed as one CUDA graph; measured twice."""
    for i in range(count):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(i)
    first, second = _replays(graph, count), _replays(graph, count)
    q20, median, q80 = np.quantile(first + second, [0.2, 0.5, 0.8])
    return Time(float(median), float(q20), float(q80), 2 * REPEATS, float(np.median(second) / np.median(first)))


def _replays(graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPEATS)]
    graph.replay()
    for start, end in marks:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 / count for start, end in marks]


def rotated(make: Callable[[], Tensor], most: int = 16) -> list[Tensor]:
    """Copies enough that one turn through them passes three times the second-level cache; random data."""
    first = make()
    size = first.numel() * first.element_size()
    count = min(most, max(2, -(-3 * torch.cuda.get_device_properties(0).L2_cache_size // size)))
    return [first, *(make() for _ in range(count - 1))]


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.float32).to(dtype)


def limits() -> dict[str, float]:
    """GB/s of a copy (read + write), a read and the cache; TFLOP/s of a bfloat16 product."""
    big = rotated(lambda: normal(16384, 14336), 3)
    out = torch.empty_like(big[0])
    size = out.numel() * out.element_size()
    copy = microseconds(lambda i: out.copy_(big[i]), len(big)).median
    # A sum reads everything once and writes next to nothing.
    read = microseconds(lambda i: big[i].sum(), len(big)).median
    small = normal(2048, 2048)
    target = torch.empty_like(small)
    cache = microseconds(lambda i: target.copy_(small), 20).median
    a, b = normal(8192, 8192), normal(8192, 8192)
    product = microseconds(lambda i: a @ b, 4).median
    small_size = small.numel() * small.element_size()
    return {
        "copy_gb_s": 2 * size / copy / 1e3,
        "read_gb_s": size / read / 1e3,
        "l2_copy_gb_s": 2 * small_size / cache / 1e3,
        "bf16_tflop_s": 2 * 8192**3 / product / 1e6,
    }


def device() -> dict[str, Any]:
    """Name and sizes of the card, and its driver."""
    card = torch.cuda.get_device_properties(0)
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {
        "name": card.name,
        "sm": card.multi_processor_count,
        "capability": f"{card.major}.{card.minor}",
        "l2_bytes": card.L2_cache_size,
        "driver": driver,
    }
