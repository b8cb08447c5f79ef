"""The low-rank kernel in every tiling against its meaning, on sizes that are multiples of nothing."""

from __future__ import annotations

from itertools import product

import pytest
import torch

pytest.importorskip("triton")
from repedit.errors import KernelUnavailable
from repedit.kernels import triton_project as kernel
from repedit.kernels.tiles import TILINGS, tile
from tests.kernels.laws import (
    DEVICE,
    LAYOUTS,
    case,
    error,
    gradients_are_those_of_the_reference,
    kernel_is_the_reference,
    normal,
    projecting_twice_is_projecting_once,
)

pytestmark = pytest.mark.numeric


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS, WIDTHS, RANKS = (1, 33, 199), (96, 130, 192, 576, 760), (0, 1, 5, 16)
every_tiling = pytest.mark.parametrize("tiling", TILINGS)
# Every pair of (rows, width), (width, rank) and (rank, layout) that differs in kind: edges of tiles, of chunks, of R.
FEW = [
    (1, 96, 1, "contiguous", False),
    (33, 130, 5, "transposed", True),
    (33, 130, 0, "contiguous", True),
    (37, 192, 16, "column_slice", False),
    (199, 130, 5, "row_slice", True),
    (33, 760, 16, "row_slice", True),
    (33, 576, 20, "column_slice", True),
]


def check(tiling, n, d, k, dtype, layout, center, residual=False):
    plan = tile(d, k, dtype.itemsize, tiling)
    if plan is None:
        assert tiling == "resident" and (d > 576 or k > 16)
        return
    kernel_is_the_reference(kernel.launch, case(n, d, k, dtype, LAYOUTS[layout], center, residual), plan)


@every_tiling
@pytest.mark.parametrize(("n", "d", "k", "layout", "center"), FEW)
def test_kernel_is_the_reference(tiling, n, d, k, layout, center):
    for dtype in DTYPES if d < 200 else DTYPES[:1]:
        check(tiling, n, d, k, dtype, layout, center, residual=center)


@pytest.mark.slow
@every_tiling
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("center", [False, True])
def test_kernel_is_the_reference_in_full(tiling, dtype, layout, center):
    for n, d, k in product(ROWS, WIDTHS, RANKS):
        check(tiling, n, d, k, dtype, layout, center, residual=k == 5)


@every_tiling
@pytest.mark.parametrize("rank", [64, 200])
def test_ranks_above_one_tile_of_a_tensor_instruction(tiling, rank):
    check(tiling, 33, 230, rank, torch.float32, "contiguous", True)


@every_tiling
def test_projecting_twice_is_projecting_once(tiling):
    projecting_twice_is_projecting_once(lambda *c: kernel.project(*c, tiling=tiling))


@every_tiling
def test_gradients_are_those_of_the_reference(tiling):
    c = case(33, 130, 5, residual=True)
    gradients_are_those_of_the_reference(lambda *a, **r: kernel.project(*a, **r, tiling=tiling), c)


@pytest.mark.parametrize("asked", range(5))
def test_one_operand_alone_may_ask_for_a_gradient(asked):
    operands = [
        t.detach().requires_grad_(i == asked) for i, t in enumerate(vars(case(9, 96, 3, residual=True)).values())
    ]
    kernel.project(*operands[:4], residual=operands[4]).square().sum().backward()
    assert [t.grad is not None for t in operands] == [i == asked for i in range(5)]


def test_the_operator_is_registered_as_torch_expects():
    c = case(33, 130, 5)
    arguments = (c.x.requires_grad_(), c.u, c.v.requires_grad_(), normal(5), None, "split", True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.repedit.project.default, arguments, test_utils=tests)


def test_a_compiler_sees_one_graph():
    c = case(33, 130, 5)
    compiled = torch.compile(lambda x: 2 * kernel.project(x, c.u, c.v, c.center), backend="aot_eager", fullgraph=True)
    assert error(compiled(c.x), 2 * c.expected) <= 1e-6


@every_tiling
def test_two_runs_give_the_same_bits(tiling):
    c = case(199, 130, 5)
    first, second = (kernel.project(c.x, c.u, c.v, c.center, tiling=tiling) for _ in range(2))
    assert torch.equal(first, second)


@every_tiling
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weight_is_rewritten_in_place(tiling, layout):
    c = case(33, 130, 5, layout=LAYOUTS[layout], center=False)
    expected = c.x.double() - (c.x.double() @ c.u.double()) @ c.v.double().T
    apart, pointer = kernel.right(c.x, c.u, c.v, tiling=tiling), c.x.data_ptr()
    inside = kernel.right(c.x, c.u, c.v, out=c.x, tiling=tiling)
    assert inside.data_ptr() == pointer and torch.equal(inside, apart)
    assert error(c.x, expected) <= 1e-6


def test_rows_keep_their_axes():
    c = case(24, 130, 5)
    shaped = kernel.project(c.x.reshape(2, 3, 4, 130), c.u, c.v, c.center)
    assert torch.equal(shaped.reshape(24, 130), kernel.project(c.x, c.u, c.v, c.center))
    assert kernel.project(c.x[:0], c.u, c.v).shape == (0, 130)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter ignores the precision of a product")
@pytest.mark.parametrize("rank", [16, 64])
def test_float32_stays_float32_on_the_device(rank):
    c = case(4096, 576, rank)
    assert error(kernel.project(c.x, c.u, c.v, c.center, tiling="split"), c.expected) <= 1e-6


def test_a_tiling_that_does_not_exist_is_refused():
    c = case(4, 4096, 64, center=False)
    with pytest.raises(
        KernelUnavailable, match=r"'resident' does not exist for rows of 4096 .* at rank 64; use 'auto'"
    ):
        kernel.project(c.x, c.u, c.v, tiling="resident")
