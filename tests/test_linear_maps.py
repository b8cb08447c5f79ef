"""Affine maps: one meaning through call, left, right and as_matrix; composition is function composition."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import repedit as rp
from repedit.errors import RankError, ShapeError

pytestmark = pytest.mark.numeric


WIDTH, RANK = 7, 3
# Worst error over the cases of this file, float64: 2e-14 (products of condition 1e2).
CLOSE = {"rtol": 1e-10, "atol": 1e-11}


def _normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _keep(seed: int = 0) -> torch.Tensor:
    return torch.arange(WIDTH) % 3 != seed % 3


U, V, CENTER = _normal(WIDTH, RANK, seed=1), _normal(WIDTH, RANK, seed=2), _normal(WIDTH, seed=3)
EMPTY = torch.zeros(WIDTH, 0, dtype=torch.float64)
LINKS = {
    "projection": rp.LowRank.projection(U),
    "projection, center": rp.LowRank.projection(V, CENTER),
    "oblique": rp.LowRank.oblique(U, V),
    "oblique, center": rp.LowRank.oblique(V, U, 2 * CENTER),
    "steering": rp.LowRank(0.5 * U, V, CENTER),
    "empty": rp.LowRank.projection(EMPTY),
    "empty, center": rp.LowRank(EMPTY, EMPTY, CENTER),
    "mask": rp.Diagonal.mask(_keep()),
    "fill": rp.Diagonal.fill(_keep(1), CENTER),
    "scale": rp.Diagonal(_normal(WIDTH, seed=4), _normal(WIDTH, seed=5)),
}
MAPS = LINKS | {
    "chain": rp.Chain((LINKS["mask"], LINKS["projection"])),
    "chain, offsets": rp.Chain((LINKS["fill"], LINKS["oblique, center"], LINKS["scale"])),
}
every_map = pytest.mark.parametrize("map_", MAPS.values(), ids=MAPS)
PAIRS = list(product(MAPS, MAPS))


def _offset(map_: rp.AffineMap) -> torch.Tensor:
    return torch.zeros(map_.width, dtype=torch.float64) if map_.offset is None else map_.offset.double()


@every_map
def test_calling_is_the_matrix_and_the_offset(map_):
    x = _normal(4, 5, WIDTH, seed=9)
    torch.testing.assert_close(map_(x), x @ map_.as_matrix().T + _offset(map_), **CLOSE)


@every_map
def test_left_maps_outputs_and_right_maps_inputs(map_):
    w, m = _normal(WIDTH, 4, seed=9), map_.as_matrix()
    torch.testing.assert_close(map_.left(w), m @ w, **CLOSE)
    torch.testing.assert_close(map_.right(w.T), w.T @ m, **CLOSE)


@every_map
def test_rank_removed_is_the_rank_of_the_matrix(map_):
    assert map_.rank_removed == WIDTH - int(torch.linalg.matrix_rank(map_.as_matrix(), rtol=1e-6))


@pytest.mark.parametrize(("last", "first"), PAIRS, ids=[f"{a} after {b}" for a, b in PAIRS])
def test_composition_is_function_composition(last, first):
    a, b, x = MAPS[last], MAPS[first], _normal(6, WIDTH, seed=9)
    joined = a @ b
    torch.testing.assert_close(joined(x), a(b(x)), **CLOSE)
    torch.testing.assert_close(joined.as_matrix(), a.as_matrix() @ b.as_matrix(), **CLOSE)
    torch.testing.assert_close(_offset(joined), a(_offset(b)), **CLOSE)


@given(seed=st.integers(0, 10**6), width=st.integers(1, 9), ranks=st.tuples(st.integers(0, 9), st.integers(0, 9)))
@settings(max_examples=40, deadline=None)
def test_composed_projections_of_any_size(seed, width, ranks):
    a, b = (rp.LowRank.projection(_normal(width, min(k, width), seed=seed + i)) for i, k in enumerate(ranks))
    x = _normal(3, width, seed=seed + 2)
    torch.testing.assert_close((a @ b)(x), a(b(x)), rtol=1e-5, atol=3e-6)


@given(seed=st.integers(0, 10**6), rank=st.integers(0, 6), centered=st.booleans())
@settings(max_examples=40, deadline=None)
def test_projection_is_idempotent_of_its_rank_and_symmetric(seed, rank, centered):
    map_ = rp.LowRank.projection(_normal(WIDTH, rank, seed=seed), CENTER if centered else None)
    x = _normal(4, WIDTH, seed=seed + 1)
    torch.testing.assert_close(map_(map_(x)), map_(x), **CLOSE)
    torch.testing.assert_close(map_.as_matrix(), map_.as_matrix().T, **CLOSE)
    assert map_.rank_removed == rank


def test_projection_removes_the_span_and_keeps_the_center():
    map_ = rp.LowRank.projection(U, CENTER)
    torch.testing.assert_close(U.T @ (map_(_normal(WIDTH, seed=9)) - CENTER), torch.zeros(RANK).double(), **CLOSE)
    torch.testing.assert_close(map_(CENTER), CENTER, **CLOSE)


def test_oblique_kills_u_and_leaves_nothing_along_v():
    map_ = rp.LowRank.oblique(U, V)
    torch.testing.assert_close(map_.as_matrix() @ U, torch.zeros_like(U), **CLOSE)
    torch.testing.assert_close(V.T @ map_.as_matrix(), torch.zeros_like(V.T), **CLOSE)


@pytest.mark.parametrize("make", [rp.LowRank.projection, lambda empty: rp.LowRank.oblique(empty, empty)])
def test_an_empty_basis_is_the_identity(make):
    map_, x = make(EMPTY), _normal(2, WIDTH)
    assert torch.equal(map_(x), x) and map_.rank_removed == 0
    joined = map_ @ map_
    assert isinstance(joined, rp.LowRank) and joined.u.shape == (WIDTH, 0)


def test_a_repeated_projection_stays_of_rank_k():
    once = rp.LowRank.projection(U.float(), CENTER.float())
    twice = once @ (once @ once)
    assert isinstance(twice, rp.LowRank) and twice.u.shape == (WIDTH, RANK)
    torch.testing.assert_close(twice(CENTER.float()), once(CENTER.float()), rtol=1e-5, atol=1e-5)


def test_masks_compose_to_a_mask():
    joined = rp.Diagonal.mask(_keep(1)) @ rp.Diagonal.mask(_keep(2))
    assert isinstance(joined, rp.Diagonal) and joined.is_mask
    assert torch.equal(joined.kept, _keep(1) & _keep(2))


def test_two_reflections_at_different_centers_are_a_shift_and_stay_a_chain():
    # Their linear parts cancel, and no center of an empty basis gives the offset.
    q = rp.LowRank.projection(U[:, :1]).u
    a, b = rp.LowRank(2 * q, q, CENTER), rp.LowRank(2 * q, q, -CENTER)
    joined, x = a @ b, _normal(WIDTH, seed=9)
    assert isinstance(joined, rp.Chain)
    torch.testing.assert_close(joined(x) - x, a(b(x)) - x, **CLOSE)
    assert float((joined(x) - x).norm()) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_map
def test_half_types_are_computed_in_float32_and_rounded_once(map_, dtype):
    x = _normal(5, WIDTH, seed=9, dtype=dtype)
    assert torch.equal(map_(x), map_(x.float()).to(dtype))
    assert torch.equal(map_.left(x.T), map_.left(x.T.float()).to(dtype))
    assert torch.equal(map_.right(x), map_.right(x.float()).to(dtype))


@every_map
def test_float64_offsets_are_exact_for_float32_maps(map_):
    links = map_.maps if isinstance(map_, rp.Chain) else (map_,)
    narrow = [type(m)(**{k: None if t is None else t.float() for k, t in vars(m).items()}) for m in links]
    single = rp.Chain(tuple(narrow)) if isinstance(map_, rp.Chain) else narrow[0]
    torch.testing.assert_close(_offset(single), single(torch.zeros(WIDTH, dtype=torch.float64)), **CLOSE)


def test_a_center_of_another_dtype_is_accepted():
    map_ = rp.LowRank.projection(U.float(), CENTER)
    torch.testing.assert_close(map_.offset.double(), map_(torch.zeros(WIDTH, dtype=torch.float64)), **CLOSE)


def test_fill_holds_pruned_neurons_at_their_value():
    filled = rp.Diagonal.fill(_keep(), CENTER)(_normal(4, WIDTH))
    torch.testing.assert_close(filled[:, ~_keep()], CENTER[~_keep()].expand(4, -1), rtol=1e-6, atol=0)
    assert torch.equal(filled[:, _keep()], _normal(4, WIDTH)[:, _keep()])


def test_a_shift_of_zeros_is_no_offset():
    assert rp.Diagonal.fill(_keep(), torch.zeros(WIDTH)).offset is None


@pytest.mark.parametrize(
    "basis",
    [torch.cat([U, U[:, :1]], 1), torch.zeros(WIDTH, 1), _normal(3, 4)],
    ids=["repeated column", "zero", "more columns than width"],
)
def test_a_basis_without_full_rank_is_refused(basis):
    with pytest.raises(RankError, match=r"not of full column rank; remove dependent columns"):
        rp.LowRank.projection(basis)


def test_a_float32_basis_dependent_up_to_rounding_is_refused():
    a, b = _normal(64, 2, dtype=torch.float32).T
    with pytest.raises(RankError, match=r"shape \(64, 3\) is not of full column rank"):
        rp.LowRank.projection(torch.stack([a, b, 0.3 * a + 0.7 * b], 1))


def test_columns_of_very_different_length_are_a_basis():
    assert rp.LowRank.projection(U * torch.tensor([1.0, 1e-12, 1e12])).rank_removed == RANK


def test_a_singular_oblique_projection_is_refused():
    with pytest.raises(RankError, match=r"V\^T U is singular"):
        rp.LowRank.oblique(torch.eye(WIDTH)[:, :1], torch.eye(WIDTH)[:, 1:2])


@pytest.mark.parametrize("call", [lambda m: m(torch.ones(2, 4)), lambda m: m.left(torch.ones(4, 2)), lambda m: m.right(torch.ones(2, 4))])  # fmt: skip
@pytest.mark.parametrize("map_", MAPS.values(), ids=MAPS)
def test_a_tensor_of_another_width_is_refused(map_, call):
    with pytest.raises(ShapeError, match="map has width 7, the tensor has width 4; was the edit fitted on another"):
        call(map_)


@pytest.mark.usefixtures("unchecked")
def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match=r"u \(7, 3\), v \(7, 2\), center None do not fit"):
        rp.LowRank(U, V[:, :2])
    with pytest.raises(ShapeError, match=r"center \(4,\) do not fit"):
        rp.LowRank(U, V, torch.zeros(4))
    with pytest.raises(ShapeError, match=r"scale \(3,\) and shift \(4,\) do not fit: give"):
        rp.Diagonal(torch.ones(3), torch.ones(4))
    with pytest.raises(ShapeError, match="cannot compose maps of widths 7 and 3"):
        LINKS["mask"] @ rp.Diagonal(torch.ones(3))
    with pytest.raises(ShapeError, match=r"a chain needs at least one map and one width, the widths are \[7, 3\]"):
        rp.Chain((LINKS["mask"], rp.Diagonal(torch.ones(3))))
