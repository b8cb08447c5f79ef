"""Every numeric tolerance of the tests, with what is computed and the worst error measured.

A worst error is the largest seen over every test that names the row, under each of ATEN_CPU_CAPABILITY=default, avx2 and
avx512 with 1 and with 2 threads; a tolerance is at least ten times that. `make test-cpus` measures them again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
"""Dtypes in which the laws are tested."""


class Tolerance(NamedTuple):
    """How far two computations of one number may be apart."""

    limit: float
    worst: float
    """Measured, see above."""
    computed: str
    """What is computed, and in what precision."""


TABLE = {
    "sums in float64": Tolerance(
        1e-12, 1.1e-14, "sums over tokens of float64 values, relative to the sum of absolute terms"
    ),
    "sums in float32": Tolerance(
        1e-4, 4e-6, "the same of float32, bfloat16 and float16 values, whose squares are float32"
    ),
    "padding, float64": Tolerance(
        1e-12, 5.5e-14, "statistics of a model in float64 throughout (laws.wide); the order of additions"
    ),
    "padding, float32 attention": Tolerance(1e-5, 7.4e-7, "the same where attention is in float32 (gpt_neo, gptj)"),
    "padding, float32": Tolerance(
        1e-3, 5.1e-5, "the same in float32, relative to one neuron's sum, which a ReLU may all but silence"
    ),
    "logits, float64": Tolerance(1e-11, 1.2e-14, "logits over their spread: one edit applied in two ways, largest"),
    "logits, float32": Tolerance(1e-4, 8.6e-6, "the same in float32"),
    "logits, bfloat16": Tolerance(
        0.3, 0.019, "the same in bfloat16, root mean square: a rounded weight against a rounded activation"
    ),
    "branch, float32": Tolerance(
        1e-4, 3e-6, "what one branch adds to the stream over its spread: one edit applied in two ways, largest"
    ),
    "branch, bfloat16": Tolerance(0.07, 6.4e-3, "the same in bfloat16, root mean square"),
    "leak, float64": Tolerance(1e-12, 5.1e-16, "||V^T out|| / ||out|| after a projection"),
    "leak, float32": Tolerance(1e-5, 8.7e-8, "the same in float32"),
    "leak, bfloat16": Tolerance(4e-2, 1.7e-3, "the same in bfloat16"),
    "residue, float64": Tolerance(1e-14, 6.1e-16, "share of the removed rows that a folded weight still holds"),
    "residue, float32": Tolerance(2e-6, 1.7e-7, "the same in float32"),
    "residue, bfloat16": Tolerance(3e-2, 2.8e-3, "the same in bfloat16"),
    "slimmed, float32": Tolerance(1e-4, 3e-6, "logits over their spread: neurons and heads cut out against zeroed"),
    "sliced, float64": Tolerance(
        1e-11, 7.5e-14, "logits of a narrower stream against those of the erased one, norms in float64"
    ),
    "sliced, float32": Tolerance(1e-4, 8.7e-6, "the same in float32"),
    "sliced, bfloat16": Tolerance(0.3, 0.027, "the same where every weight is rounded once more"),
    "model, float32": Tolerance(
        1e-4, 7e-6, "states, logits and log-probabilities of a tiny model, computed in batches or by another program"
    ),
    "gradient, float32": Tolerance(
        1e-5, 2.9e-7, "of a loss by its parameters, and the loss, padded against alone; relative"
    ),
    "finite difference": Tolerance(
        2e-3, 1.9e-4, "slope of a loss through float32 norms, step 1e-3, against its gradient"
    ),
    "published eraser, float64": Tolerance(1e-12, 1.3e-14, "LEACE of a stream against concept-erasure's"),
    "published eraser, float32": Tolerance(1e-4, 2.8e-6, "the same in float32, theirs the larger part of the error"),
    "steps of a training, float32": Tolerance(
        1e-5, 1.6e-7, "projections after three SGD steps, batches in another order"
    ),
}


def short(dtype: torch.dtype) -> str:
    """A dtype as rows of the table name it."""
    return str(dtype).removeprefix("torch.")


SHARES: dict[str, float] = {}
"""The largest share of each tolerance that this process has used."""


def within(error: float, name: str) -> None:
    """Assert that an error is within a tolerance of the table."""
    limit = TABLE[name].limit
    assert error <= limit, f"{name}: {error:.1e} exceeds {limit:.0e}"
    SHARES[name] = max(SHARES.get(name, 0.0), error / limit)


def close(found: Any, expected: Any, name: str) -> None:
    """Assert that numbers differ by at most a tolerance times 1 + the size of the expected one."""
    found, expected = (torch.as_tensor(x).detach().double() for x in (found, expected))
    assert found.shape == expected.shape
    within(float(((found - expected).abs() / (1 + expected.abs())).max()), name)


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value expected."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-300))
