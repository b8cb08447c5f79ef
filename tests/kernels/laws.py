"""What the kernels must do, as functions that the tests call and that their broken twins must fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from repedit.kernels import reference
from repedit.kernels.tiles import Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Root-mean-square error over that of the float64 result, operands as rounded to the dtype. Largest seen in the
# interpreter: 3.6e-7 (split, 199 x 576, rank 16, columns of v of length 24; its products are float32 in every dtype).
# float16 and bfloat16 allow what rounding the output on a device costs.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 2.5e-3}
GUARD = 777.0


@dataclass(frozen=True, eq=False)
class Case:
    """Operands of one projection."""

    x: Tensor
    u: Tensor
    v: Tensor
    center: Tensor | None = None
    residual: Tensor | None = None

    @property
    def expected(self) -> Tensor:
        """The result in float64."""
        return self._wide(torch.float64)

    @property
    def eager(self) -> Tensor:
        """The result of the plain expression in the dtype of x."""
        return self._wide(self.x.dtype)

    def _wide(self, dtype: torch.dtype) -> Tensor:
        x, u, v, center, residual = (None if t is None else t.to(dtype) for t in vars(self).values())
        y = x - ((x if center is None else x - center) @ v) @ u.T
        return y if residual is None else y + residual


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


def transposed(t: Tensor) -> Tensor:
    return t.T.contiguous().T


def column_slice(t: Tensor) -> Tensor:
    """Columns of a wider tensor whose other columns are NaN."""
    wide = torch.full((t.shape[0], t.shape[1] + 7), torch.nan, dtype=t.dtype, device=t.device)
    wide[:, 3 : 3 + t.shape[1]] = t
    return wide[:, 3 : 3 + t.shape[1]]


def row_slice(t: Tensor) -> Tensor:
    """Every second row of a tensor whose other rows are NaN."""
    tall = torch.full((2 * t.shape[0] + 1, t.shape[1]), torch.nan, dtype=t.dtype, device=t.device)
    tall[1::2] = t
    return tall[1::2]


LAYOUTS = {f.__name__: f for f in (contiguous, transposed, column_slice, row_slice)}


def case(
    n: int,
    d: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    layout: Callable[[Tensor], Tensor] = contiguous,
    center: bool = True,
    residual: bool = False,
) -> Case:
    """Random operands; U and V differ, and the mean is as large as the spread."""
    u, v = (torch.linalg.qr(normal(d, k, seed=s))[0] for s in (1, 2))
    made = [layout(t.to(dtype)) for t in (normal(n, d) + 1, u, 0.7 * v + 0.1 * u)]
    mean = normal(d, seed=3).to(dtype) + 1 if center else None
    return Case(*made, mean, layout(normal(n, d, seed=4).to(dtype)) if residual else None)


def offset(c: Case) -> Tensor | None:
    """c = m V in float32, as the launcher is given it."""
    return None if c.center is None else c.center.float() @ c.v.float()


def error(y: Tensor, expected: Tensor) -> float:
    """Root-mean-square error over root-mean-square value; NaN stays NaN."""
    return float((y.double() - expected).norm() / expected.norm().clamp(min=1e-300))


def kernel_is_the_reference(run: Callable[..., None], c: Case, plan: Tile) -> None:
    """The error is within tolerance and that of eager code, every element is written, and nothing around them is."""
    n, d = c.x.shape
    kind = c.x.dtype if DEVICE == "cuda" else torch.float32
    around = torch.full((n + 2, d + 4), GUARD, dtype=kind, device=DEVICE)
    out, t = around[1:-1, 2:-2], torch.full((n + 1, c.u.shape[1]), GUARD, device=DEVICE)
    out.fill_(torch.nan)
    run(c.x, c.u, c.v, offset(c), c.residual, out, t[:n], plan)
    wrong = error(out, c.expected)
    assert wrong <= TOLERANCE[c.x.dtype], wrong
    assert wrong <= 1.1 * error(c.eager, c.expected) + 1e-6
    frame = torch.cat([around[0], around[-1], around[:, :2].flatten(), around[:, -2:].flatten(), t[n]])
    assert bool((frame == GUARD).all()), "written outside"
    hidden = c.x.double() if c.center is None else c.x.double() - c.center.double()
    torch.testing.assert_close(t[:n].double(), hidden @ c.v.double(), rtol=1e-4, atol=1e-4)


def projecting_twice_is_projecting_once(project: Callable[..., Tensor]) -> None:
    """U = V orthonormal: the second pass changes nothing."""
    c = case(33, 130, 5)
    q = torch.linalg.qr(c.u)[0]
    once = project(c.x, q, q, c.center)
    torch.testing.assert_close(project(once, q, q, c.center), once, rtol=1e-5, atol=2e-6)
    assert float((once - c.x).norm() / c.x.norm()) > 0.1, "nothing was removed"


def gradients_are_those_of_the_reference(project: Callable[..., Tensor], c: Case) -> None:
    """Of a loss that is not symmetric, for every operand; float32 against autograd in float64."""
    weight = normal(*c.x.shape, seed=9)
    found, expected = [], []
    for f, dtype, gradients in ((project, torch.float32, found), (reference.project, torch.float64, expected)):
        x, u, v, m, r = (None if t is None else t.detach().to(dtype).requires_grad_() for t in vars(c).values())
        y = f(x, u, v, m, residual=r)
        ((y + 0.3 * y.square()) * weight).sum().backward()
        gradients += [t.grad for t in (x, u, v, m, r) if t is not None]
    assert all(error(a, b) <= 3e-6 for a, b in zip(found, expected, strict=True))


def activity_is_the_reference(activity: Callable[..., dict[str, Tensor]], *, gradients: bool, shifted: bool) -> None:
    """Every sum, with NaN in the rows that do not count."""
    z, g, shift = normal(199, 130) + 1, normal(199, 130, seed=1), normal(130, seed=2)
    mask = normal(199, seed=3) > -0.3
    z[~mask], g[~mask] = torch.nan, torch.nan
    arguments = (g if gradients else None, shift if shifted else None)
    found = activity(z, mask, *arguments)
    kept = [None if t is None else t.double() for t in (arguments[0][mask] if gradients else None, arguments[1])]
    expected = reference.activity(z[mask].double(), mask[mask], *kept)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-4, msg=name)
    assert torch.equal(found["positive"], expected["positive"])
