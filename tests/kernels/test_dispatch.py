"""Which implementation runs, why, and what is refused; the blocked reference against the plain expression."""

from __future__ import annotations

import subprocess
import sys

import jaxtyping
import pytest
import torch
from typer.testing import CliRunner

import repedit as rp
from repedit.cli import app
from repedit.errors import ArgumentError, DeviceError, DtypeError, KernelUnavailable, ShapeError, UnknownName
from repedit.kernels import dispatch, reference
from repedit.kernels.dispatch import choose, choose_activity
from repedit.kernels.tiles import tile
from tests.kernels.laws import DEVICE, LAYOUTS, case, error, normal
from tests.saved_models import saved

HALF = torch.bfloat16


@pytest.fixture
def card(monkeypatch):
    """A CUDA device of compute capability 9.0 that is only looked at."""
    dispatch._cached_choice.cache_clear()
    monkeypatch.setattr(dispatch, "_capability", lambda device: (9, 0))
    yield monkeypatch
    dispatch._cached_choice.cache_clear()


TABLE = [
    (576, 16, "resident", "64 rows"), (1024, 16, "resident", "64 rows"), (2048, 16, "resident", "32 rows"),
    (4096, 16, "resident", "16 rows"), (8192, 16, "split", "64 rows"), (576, 64, "resident", "64 rows"),
    (1024, 64, "resident", "64 rows"), (2048, 64, "split", "64 rows"), (576, 128, "split", "64 rows"),
    (16384, 256, "split", "64 rows"), (130, 5, "resident", "64 rows"),
]  # fmt: skip


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(("width", "rank", "name", "rows"), TABLE)
def test_the_table_of_bfloat16(width, rank, name, rows):
    chosen, reason = choose("cuda", HALF, (width, rank), rows=16384)
    assert chosen == name and rows in reason and f"width {width}, rank {rank}" in reason


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("device", "dtype", "shape", "rows", "reason"),
    [
        ("cpu", HALF, (576, 16), None, "cpu tensors: blocked torch code"),
        ("cuda", torch.float64, (576, 16), None, "torch.float64: the kernels compute in float32"),
        ("cuda", HALF, (576, 0), None, "rank 0: nothing to remove"),
        ("cuda", HALF, (576, 257), None, "rank 257 is above 256"),
        ("cuda", HALF, (576, 16), 113, "fewer than 65536 elements"),
    ],
)
def test_the_reference_runs_for_a_reason(device, dtype, shape, rows, reason):
    name, found = choose(device, dtype, shape, rows=rows)
    assert name == "reference" and reason in found


def test_an_old_card_and_a_missing_triton_are_reasons(card):
    card.setattr(dispatch, "_capability", lambda device: (7, 5))
    assert choose("cuda", HALF, (576, 16)) == ("reference", "compute capability 7.5 is below 8.0")
    card.setattr(dispatch, "HAS_TRITON", False)
    assert choose("cuda", HALF, (576, 17)) == ("reference", "triton is not installed")
    assert choose_activity("cuda", HALF, 10**6) == ("reference", "triton is not installed")


@pytest.mark.usefixtures("card")
def test_an_implementation_can_be_asked_for():
    assert choose("cuda", HALF, (576, 16), want="split")[0] == "split"
    assert choose("cuda", HALF, (4096, 16), rows=1, want="two_sweeps")[0] == "two_sweeps"
    assert choose("cuda", HALF, (576, 16), want="reference") == ("reference", "asked for")
    assert choose_activity("cuda", HALF, 10**6)[0] == "one_pass"
    assert "fewer than" in choose_activity("cuda", HALF, 10)[1]


@pytest.mark.usefixtures("card")
def test_a_kernel_that_cannot_run_is_refused():
    with pytest.raises(KernelUnavailable, match=r"'split' cannot run on cpu: cpu tensors: .*; use want='auto'"):
        choose("cpu", HALF, (576, 16), want="split")
    with pytest.raises(KernelUnavailable, match=r"'split' cannot run on cuda: rank 300 is above 256"):
        choose("cuda", HALF, (576, 300), want="split")
    with pytest.raises(
        KernelUnavailable, match=r"rows of 8192 elements of torch.bfloat16 at rank 16 do not fit the reg"
    ):
        choose("cuda", HALF, (8192, 16), want="resident")
    with pytest.raises(UnknownName, match=r"no implementation named 'slpit'; did you mean 'split'"):
        choose("cuda", HALF, (576, 16), want="slpit")


@pytest.mark.parametrize("major", [8, 9, 10, 12])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("rank", [1, 16, 17, 64, 256])
def test_every_shape_has_a_tile_that_covers_its_rank(rank, size, major):
    for width in (1, 576, 1024, 2048, 4096, 16384):
        plan = tile(width, rank, size, major=major)
        assert plan.rank >= rank and plan.rank & (plan.rank - 1) == 0 and plan.rows >= 16
        assert plan.tiling == "split" or plan.rows * width * size <= 2**17


X, U, M, TALL = normal(6, 7), normal(7, 3), normal(7), normal(8, 7)
REFUSED = {
    "width": (lambda: dispatch.project(normal(6, 5), U, U), ShapeError, r"the basis \(7, 3\) has width 7, x \(6, 5\) has width 5; was the basis fitted on another model\?"),
    "u and v": (lambda: dispatch.project(X, U, U[:, :2]), ShapeError, r"u \(7, 3\) and v \(7, 2\) must both be \(d, k\)"),
    "center of width k": (lambda: dispatch.project(X, U, U, M[:3]), ShapeError, r"center \(3,\) must be \(7,\), the width of the basis \(7, 3\); was the"),
    "residual": (lambda: dispatch.project(X, U, U, residual=X[:2]), ShapeError, r"residual \(2, 7\) must have the shape of x, \(6, 7\)"),
    "left": (lambda: dispatch.left(X, U, U), ShapeError, r"has width 7, the weight \(6, 7\) has width 6; was"),
    "right": (lambda: dispatch.right(X.T, U, U), ShapeError, r"has width 7, the weight \(7, 6\) has width 6; was"),
    "integers": (lambda: dispatch.project(X.long(), U, U), DtypeError, "x is torch.int64; supported: float16, bfloat16, float32, float64"),
    "fp8": (lambda: dispatch.right(X.to(torch.float8_e4m3fn), U, U), DtypeError, "the weight is torch.float8_e4m3fn; supported"),
    "mixed factors": (lambda: dispatch.project(X, U, U.double()), DtypeError, "u is torch.float32 and v is torch.float64; give both"),
    "mixed residual": (lambda: dispatch.project(X, U, U, residual=X.half()), DtypeError, "residual is torch.float16 and x is torch.float32"),
    "device": (lambda: dispatch.project(X, U.to("meta"), U.to("meta")), DeviceError, r"x is on (cpu|cuda:0), u is on meta; move one of them"),
    "out": (lambda: dispatch.right(X, U, U, out=X.half()), ShapeError, r"out is torch.float16 \(6, 7\) on .* the weight is torch.float32 \(6, 7\)"),
    "overlap": (lambda: dispatch.left(TALL[:7], U, U, out=TALL[1:]), ArgumentError, "out overlaps the weight in memory without being it; give out=w"),
    "mask, a mark a token": (lambda: dispatch.activity(X, torch.ones(2, 3, 1)), ShapeError, r"mask \(2, 3, 1\) must hold one value for each row of the activations, \(6,\)"),
    "mask, fractions": (lambda: dispatch.activity(X, torch.full((6,), 0.37, device=DEVICE)), ArgumentError, "a mask holds 0 and 1; found 0.37"),
    "mask, device": (lambda: dispatch.activity(X, torch.ones(6, device="meta")), DeviceError, "mask is on meta"),
    "grad": (lambda: dispatch.activity(X, None, X[:3]), ShapeError, r"grad \(3, 7\) must have the shape of the activations, \(6, 7\)"),
    "shift": (lambda: dispatch.activity(X, None, None, M[:2]), ShapeError, r"shift \(2,\) must hold one number for each neuron, \(7,\)"),
    "activity of integers": (lambda: dispatch.activity(X.int()), DtypeError, "z is torch.int32; supported"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(call, kind, message):
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(kind, match=message):
            call()
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", [1, 10**4, 2**18])
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_blocks_do_not_change_the_reference(monkeypatch, layout, block, rank):
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", block)
    for dtype, bound in ((torch.float64, 1e-14), (torch.float32, 1e-6), (torch.float16, 5e-4), (HALF, 2.5e-3)):
        c = case(199, 130, rank, dtype, LAYOUTS[layout], residual=True)
        before = c.x.clone()
        assert error(dispatch.project(*list(vars(c).values())[:4], residual=c.residual), c.expected) <= bound
        w, u, v = (t.double() for t in (c.x, c.u, c.v))
        for f, data, expected in (
            (dispatch.left, c.x.T, w.T - u @ (v.T @ w.T)),
            (dispatch.right, c.x, w - (w @ u) @ v.T),
        ):
            assert error(f(data, c.u, c.v), expected) <= bound and torch.equal(c.x, before)
            here = data.clone(memory_format=torch.preserve_format)
            assert f(here, c.u, c.v, out=here).data_ptr() == here.data_ptr()
            assert error(here, expected) <= bound


def test_the_reference_can_be_differentiated():
    c = case(6, 7, 3, torch.float64, residual=True)
    inputs = tuple(t.requires_grad_() for t in vars(c).values())
    assert torch.autograd.gradcheck(lambda x, u, v, m, r: reference.project(x, u, v, m, residual=r), inputs)
    assert torch.autograd.gradcheck(reference.left, (inputs[0].T, *inputs[1:3]))
    assert torch.autograd.gradcheck(reference.right, inputs[:3])


def test_the_formulas_of_the_backward_pass():
    x, u, v, m = (t.requires_grad_() for t in list(vars(case(9, 7, 3, torch.float64)).values())[:4])
    g = normal(9, 7, seed=5).double()
    reference.project(x, u, v, m).backward(g)
    hidden, gu = (x - m) @ v, g @ u
    for found, formula in ((x, g - gu @ v.T), (u, -g.T @ hidden), (v, -(x - m).T @ gu), (m, v @ gu.sum(0))):
        torch.testing.assert_close(found.grad, formula, rtol=1e-12, atol=1e-12)


def test_a_map_reaches_the_kernels_of_its_tensors_device():
    c = case(2048, 130, 5)
    map_ = rp.LowRank(c.u.cpu(), c.v.cpu().double(), c.center.cpu())
    for _ in range(2):
        assert error(map_(c.x), c.expected) <= 1e-6
    map_.v.zero_()
    assert torch.equal(map_(c.x), c.x), "a stale copy was used"


def test_doctor_says_what_runs_at_the_widths_of_the_model(tmp_path):
    model = str(saved(tmp_path / "tiny"))
    result = CliRunner().invoke(app, ["doctor", model, "--device", "cpu"])
    said = " ".join(result.stdout.split())
    assert "projection of rank 16 at width 24: reference (cpu tensors: blocked torch code)" in said


ONE_GRAPH = """
import torch, repedit as rp
map_ = rp.LowRank.projection(torch.randn(96, 5), torch.randn(96))
x = torch.randn(33, 96)
compiled = torch.compile(lambda x: 2 * map_(x), backend="aot_eager", fullgraph=True)
torch.testing.assert_close(compiled(x), 2 * map_(x), rtol=1e-5, atol=1e-5)
"""


@pytest.mark.slow
def test_a_compiler_sees_one_graph():
    # In a process without the shape-checked imports, which a compiler cannot follow.
    assert subprocess.run([sys.executable, "-c", ONE_GRAPH]).returncode == 0


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_large_tensors_take_the_kernel_on_the_device(dtype):
    c = case(4096, 576, 16, dtype)
    assert choose(c.x.device, dtype, (576, 16), rows=4096)[0] == "resident"
    assert error(dispatch.project(c.x, c.u, c.v, c.center), c.expected) <= 2.5e-3
