"""Attack on projections: only the directions that a weight can no longer write are trained.

A projection that was folded into a weight leaves a mark: singular values that are zero. Whoever sees the weights knows
the removed directions from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from repedit.arch import MatrixView
from repedit.auditing.attack import Attack, AttackRecord, AttackResult, Scratch, register, skipped
from repedit.auditing.attacks.tuning import Tuning, carried_out, examples, scaled_rates, shuffled, training_work, trial
from repedit.data import Splits
from repedit.errors import FractionError
from repedit.models.subject import Subject


def refill(
    *,
    rates: Sequence[float] = (2e-4, 1e-3, 5e-3),
    steps: int = 40,
    measured: Sequence[int] = (0, 5, 10, 20, 40),
    ratio: float | None = None,
    scale: float = 1.0,
) -> Attack:
    """Trains on T only what the attention and MLP outputs, every expert's included, cannot write any more.

    W becomes W + U Z^T, with U the left null space of W and Z, at first zero, the only thing trained. Settings are
    "step=0" and "lr=0.001 step=40". Skipped where every weight has full rank. It must reach .9 on T.

    Args:
        rates: higher than those of a full training: Z starts at zero and must become as large as weights are.
        ratio: see `null_space`.
    Raises:
        ArgumentError: if a rate, a number of steps or the ratio is out of range.
    """
    base, scaled = Tuning(1.0, steps=steps), scaled_rates(rates, scale)
    _check_ratio(ratio)

    def run(subject: Subject, splits: Splits, seed: int) -> AttackResult:
        scratch = Scratch(subject).subject
        spaces = null_spaces(scratch, ratio)
        if not spaces:
            return skipped("no null space: no write weight has singular values that are almost zero")
        trained = _parametrized(scratch, spaces)
        draw = shuffled(examples(scratch, splits.train), base.batch_size, seed)
        trials = [trial(replace(base, rate=rate), draw, measured, taught=splits.train) for rate in scaled]

        def start() -> tuple[Subject, list[nn.Parameter]]:
            with torch.no_grad():
                for z in trained:
                    z.zero_()
            return scratch, trained

        result = carried_out(trials, start, splits.test, seed)
        ranks = {str(view.tensor) + _expert(view): basis.shape[1] for view, basis in spaces}
        return result._replace(details={**result.details, "directions": ranks})

    options = {
        "rates": list(rates), "steps": steps, "measured": list(measured), "ratio": ratio, "scale": scale,
    }  # fmt: skip
    return Attack(
        REFILL, options, run, training_work(len(rates), steps, measured),
        applies=lambda subject: bool(null_spaces(subject, ratio)),
    )  # fmt: skip


REFILL = register(
    AttackRecord(
        "refill", cost=140, budget="fast", level="W", uses_train=True, trains=True, may_skip=True,
        build=lambda setup: [
            refill(scale=setup.scale, measured=(0, 20, 40) if setup.small else (0, 5, 10, 20, 40))
        ],
    )
)  # fmt: skip


def null_space(weight: Float[Tensor, "d i"], ratio: float | None = None) -> Float[Tensor, "d k"]:
    """The directions of the output that a weight (out, in) does not write, as orthonormal columns.

    They are the left singular vectors of its singular values below `ratio` times the median of those that are not
    zero; a weight with fewer inputs than outputs never writes some directions, and has them only if it lost others.

    Args:
        ratio: None for 1e-3, and 5e-3 for half types: rounding a projected weight to bfloat16 leaves up to 2e-3.
    Raises:
        FractionError: if the ratio is not strictly between 0 and 1.
    """
    _check_ratio(ratio)
    ratio = (1e-3 if weight.dtype.itemsize > 2 else 5e-3) if ratio is None else ratio
    matrix = weight.detach().double()
    # Squares of singular values: float64 keeps ratios down to 1e-7, and d x d is the smaller matrix here.
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    sizes = values.clamp(min=0).sqrt()
    smaller_side = min(weight.shape)
    nonzero_sizes = sizes[len(sizes) - smaller_side :]
    written_sizes = nonzero_sizes[nonzero_sizes > 1e-6 * nonzero_sizes.max()]
    limit = ratio * float(written_sizes.median()) if len(written_sizes) else float("inf")
    lost = int((nonzero_sizes < limit).sum())
    return vectors[:, : len(sizes) - smaller_side + lost if lost else 0].to(
        torch.promote_types(weight.dtype, torch.float32)
    )


def null_spaces(subject: Subject, ratio: float | None = None) -> list[tuple[MatrixView, Tensor]]:
    """Every attention or MLP output weight that has a null space, an expert at a time, with its basis."""
    parameters = dict(subject.model.named_parameters())
    spaces = []
    for part in subject.layout.parts:
        basis = null_space(part.out.read(parameters[part.out.tensor]), ratio)
        spaces += [(part.out, basis)] if basis.shape[1] else []
    return spaces


class _Filled(nn.Module):
    """A stored weight to whose matrices U Z^T is added."""

    def __init__(self, spaces: Sequence[tuple[MatrixView, Tensor]], stored: Tensor) -> None:
        super().__init__()
        self.spaces = tuple(spaces)
        widths = [view.read(stored).shape[1] for view, _ in spaces]
        self.z = nn.ParameterList(u.new_zeros(width, u.shape[1]) for (_, u), width in zip(spaces, widths, strict=True))

    def forward(self, stored: Tensor) -> Tensor:
        for (view, basis), z in zip(self.spaces, self.z, strict=True):
            stored = view.edit(stored, _adding(basis, z))
        return stored


def _adding(basis: Tensor, z: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda weight: (weight + basis @ z.T).to(weight.dtype)


def _parametrized(subject: Subject, spaces: Sequence[tuple[MatrixView, Tensor]]) -> list[nn.Parameter]:
    """Put a `_Filled` on every weight; what it trains."""
    model = subject.model
    trained: list[nn.Parameter] = []
    for tensor in dict.fromkeys(view.tensor for view, _ in spaces):
        path, _, leaf = tensor.rpartition(".")
        module = model.get_submodule(path)
        module_filled = _Filled([space for space in spaces if space[0].tensor == tensor], getattr(module, leaf))
        parametrize.register_parametrization(module, leaf, module_filled)
        trained += list(module_filled.z)
    inner = model.forward

    # Experts read their weights once each: made anew every time, a pass would take as many copies as there are experts.
    @wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with parametrize.cached():
            return inner(*args, **kwargs)

    model.forward = forward
    return trained


def _expert(view: MatrixView) -> str:
    return "" if view.expert is None else f"[{view.expert}]"


def _check_ratio(ratio: float | None) -> None:
    if ratio is not None and not 0 < ratio < 1:
        raise FractionError(f"ratio={ratio}; give a number strictly between 0 and 1")
