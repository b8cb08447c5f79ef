"""Bases, unions, angles and leading eigenvectors."""

import pytest
import torch

import repedit as rp
from repedit.errors import NotConverged
from repedit.fit import linalg
from tests.structured_rows import EXACT, D, K, normal, pair, spanning

pytestmark = pytest.mark.numeric


def test_a_basis_is_reduced_to_its_rank():
    basis = normal(D, 3)
    found = rp.fit.orthonormal(torch.cat([basis, basis @ normal(3, 4), torch.zeros(D, 1)], 1))
    assert found.shape == (D, 3) and found.dtype == torch.float64
    torch.testing.assert_close(found.T @ found, torch.eye(3, dtype=torch.float64), rtol=0, atol=EXACT)
    assert rp.fit.orthonormal(torch.zeros(D, 0)).shape == rp.fit.orthonormal(torch.zeros(D, 2)).shape == (D, 0)
    assert rp.fit.orthonormal(basis * torch.tensor([1.0, 1e-7, 1.0])).shape == (D, 2)


def test_a_union_removes_what_its_parts_remove():
    parts = [linalg.projector(spanning(D, 3, seed=s), torch.float64) for s in (1, 2)]
    parts += [parts[0], rp.LowRank(torch.zeros(D, 0), torch.zeros(D, 0))]
    whole = rp.fit.union(*parts)
    p = whole.as_matrix()
    assert whole.rank_removed == 6
    for part in parts:
        q = part.as_matrix()
        assert float((p @ q - p).abs().max()) <= 1e-10 and float((q @ p - p).abs().max()) <= 1e-10


def test_extending_adds_what_retain_uses_least():
    retain, basis = pair()[1], spanning(D, 2)
    found = rp.fit.extend(basis, retain, 5)
    torch.testing.assert_close(found.T @ found, torch.eye(5, dtype=torch.float64), rtol=0, atol=EXACT)
    assert float(rp.fit.principal_angles(found[:, :2], basis).min()) == pytest.approx(1.0)
    added = float((found[:, 2:].T @ retain.second @ found[:, 2:]).trace())
    for seed in range(5):
        other = linalg.complement(basis) @ spanning(D - 2, 3, seed=seed)
        assert added <= float((other.T @ retain.second @ other).trace())


@pytest.mark.parametrize("solver", ["eigh", "eigsh"])
def test_eigenvectors_are_the_leading_ones_in_order(solver):
    c = pair()[0].second
    values, vectors = rp.fit.top_eigenvectors(c, 4, solver=solver)
    expected = torch.linalg.eigvalsh(c).flip(0)[:4]
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(c @ vectors, vectors * values, rtol=0, atol=1e-8 * float(c.norm()))
    assert bool((vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all())
    assert torch.equal(vectors, rp.fit.top_eigenvectors(c, 4, solver=solver)[1]), "not deterministic"


def test_wide_matrices_are_solved_by_lanczos():
    factor = normal(1100, 40) * torch.logspace(0, -1, 40, dtype=torch.float64)
    c = factor @ factor.T
    (_, fast), (_, slow) = (rp.fit.top_eigenvectors(c, 8, solver=s) for s in ("auto", "eigh"))
    assert 1 - float(rp.fit.principal_angles(fast, slow).min()) <= 1e-10
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-8)
    assert not torch.equal(fast, slow), "auto took eigh"


def test_a_solver_that_stops_early_is_caught(monkeypatch):
    import scipy.sparse.linalg

    whole = scipy.sparse.linalg.eigsh

    def early(matrix, **options):
        values, vectors = whole(matrix, **options)
        return values, vectors + 1e-4

    monkeypatch.setattr(scipy.sparse.linalg, "eigsh", early)
    c = pair()[0].second
    with pytest.raises(NotConverged, match=r"eigsh left a residual of .*, 1e-08 is allowed; use solver='eigh'"):
        rp.fit.top_eigenvectors(c, 3, solver="eigsh")
    wide = torch.diag(torch.linspace(1, 2, 1100, dtype=torch.float64))
    assert float(rp.fit.top_eigenvectors(wide, 1)[0]) == pytest.approx(2.0), "auto goes on with eigh"


def test_angles_between_spans():
    basis = spanning(D, 4)
    turned = torch.stack([basis[:, 0], (basis[:, 1] + basis[:, 2]) / 2**0.5, basis[:, 3] * 5], 1)
    found = rp.fit.principal_angles(basis[:, [0, 1]], turned)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.5**0.5]).double())


@pytest.mark.parametrize("previous", [None, linalg.projector(spanning(D, 5, seed=9), torch.float64)])
def test_a_random_basis_is_seeded(previous):
    first, again, other = (rp.fit.random_basis(D, rank=K, seed=s, previous=previous) for s in (0, 0, 1))
    assert torch.equal(first.u, again.u) and not torch.equal(first.u, other.u)
    assert previous is None or float((first.u.T @ previous.u).abs().max()) <= EXACT
