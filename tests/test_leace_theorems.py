"""The theorems of least-squares concept erasure (Belrose et al. 2023, arXiv 2306.03819), held on our eraser.

Nothing here reads the published code, except where both erasers are fitted to the same rows.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F

import repedit as rp
from repedit.stats import CrossMoments, Moments
from tests.structured_rows import D, normal, statistics_of
from tests.tolerances import close, relative, short, within

pytestmark = pytest.mark.numeric


CODES = ["one number", 2, 3, 5, 10]
"""Classes, one-hot; two of them also as one column of zeros and ones."""
SLOPE = 1e-12
"""Of a loss over weights, float64; measured at most 3e-15."""


def _rows(code, n=1200):
    """Rows (n, D) whose means differ between classes of unequal sizes; their classes and what codes them."""
    classes = 2 if code == "one number" else code
    sizes = torch.arange(1, classes + 1).double()
    y = torch.multinomial(sizes, n, replacement=True, generator=torch.Generator().manual_seed(3))
    x = normal(n, D, seed=1) @ normal(D, D, seed=2) + 2.0 * normal(classes, D, seed=4)[y] + 3.0
    z = y.double()[:, None] if code == "one number" else F.one_hot(y, classes).double()
    return x, y, z


def _erased(x, z, **options):
    return rp.fit.leace(*statistics_of(x, z), **({"shrinkage": False} | options))(x)


def _orthogonal(x, z):
    """The orthogonal projection off everything that x and z share: as guarded, and larger than it must be."""
    return rp.LowRank.projection(torch.linalg.qr(_shared(x, z)).Q, x.mean(0))


def _shared(x, z):
    """A basis of the span of cov(x, z): with one-hot classes, which sum to one, a column is left out."""
    return _cross(x, z)[:, : max(1, z.shape[1] - 1)]


def _cross(x, z):
    return (x - x.mean(0)).T @ (z - z.mean(0)) / len(x)


# Theorem 3.1 and its converse: z and x uncorrelated, equal class means, no affine predictor better than a constant.

LOSSES = {
    "logistic": (lambda out, y: F.cross_entropy(out, y), lambda p: p.log()),
    "squares": (lambda out, y: (out - F.one_hot(y, out.shape[1])).square().mean(), lambda p: p),
    "boosting": (
        lambda out, y: torch.exp(-out * (2.0 * F.one_hot(y, out.shape[1]) - 1)).mean(),
        lambda p: (p / (1 - p)).log() / 2,
    ),
}
"""Convex losses of one output a class, with the constant that is best for classes of sizes p."""


def _slope(x, y, loss):
    """The largest derivative of the loss by a weight where the best constant is predicted: 0 means it cannot fall."""
    value, best = LOSSES[loss]
    weight = torch.zeros(D, int(y.max()) + 1, dtype=torch.float64, requires_grad=True)
    bias = best(torch.bincount(y).double() / len(y)).requires_grad_()
    value(x @ weight + bias, y).backward()
    assert float(bias.grad.abs().max()) <= 1e-12, "the constant is not the best one"
    return float(weight.grad.abs().max())


def _guards(erased, code, loss):
    x, y, z = _rows(code)
    assert _slope(x, y, loss) > 1e-2, "nothing could be predicted to begin with"
    slope = _slope(erased(x, z), y, loss)
    assert slope <= SLOPE, f"the loss still falls, by {slope:.1e}"


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"shrinkage": True}], ids=str)
def test_no_convex_loss_falls_below_a_constant(options, code, loss):
    _guards(lambda x, z: _erased(x, z, **options), code, loss)


def test_one_class_too_few_is_caught():
    with pytest.raises(AssertionError, match="the loss still falls"):
        _guards(lambda x, z: _erased(x, z[:, :2]), 5, "logistic")


@pytest.mark.parametrize("code", CODES)
def test_class_means_are_one_point(code):
    x, y, z = _rows(code)
    after = _erased(x, z)
    means, before = (torch.stack([rows[y == c].mean(0) for c in y.unique()]) for rows in (after, x))
    assert float((before[1:] - before[:-1]).abs().max()) > 0.5
    torch.testing.assert_close(means, after.mean(0).expand_as(means), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(after.mean(0), x.mean(0), rtol=1e-10, atol=1e-10)
    assert int((torch.linalg.svdvals(x - after) > 1e-8).sum()) == max(1, z.shape[1] - 1)


def _weights(x, y, kind):
    """The largest weight that a solver gives the rows; without an L2 penalty where it can do without one."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import LinearSVC

    rows = (x - x.mean(0)).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        probe = {
            "logistic": LogisticRegression(C=float("inf"), tol=1e-12, max_iter=2000),
            "hinge": LinearSVC(dual=False, intercept_scaling=1e6, tol=1e-10),
        }[kind]
        return float(abs(probe.fit(rows, y.numpy()).coef_).max())


@pytest.mark.parametrize("kind", ["logistic", "hinge"])
@pytest.mark.parametrize("code", [2, 5])
def test_solvers_give_the_rows_no_weight(code, kind):
    x, y, z = _rows(code)
    assert _weights(x, y, kind) > 0.05
    assert _weights(_erased(x, z), y, kind) < 1e-7
    assert _weights(_orthogonal(x, z[:, :1] if code == 5 else normal(len(x), 2))(x), y, kind) > 0.01


# Theorem 4.2: of the affine maps after which z is not predicted, no other changes x less, in any inner product.


def _change(x, after, metric):
    """Mean squared change in an inner product."""
    return float(((after - x) @ metric * (after - x)).sum(1).mean())


def _others(x, z):
    """Affine maps that guard z as well: they differ by something that sees nothing of what x and z share."""
    shared = torch.linalg.qr(_shared(x, z)).Q
    blind = torch.eye(D, dtype=torch.float64) - shared @ shared.T
    for seed, size in enumerate((1e-3, 0.1, 1.0)):
        yield (x - x.mean(0)) @ (size * normal(D, D, seed=seed) @ blind).T + size * normal(D, seed=seed + 9)


def _is_smallest(erased, code):
    x, y, z = _rows(code)
    after = erased(x, z)
    for seed in range(3):
        root = normal(D, D, seed=seed + 20)
        metric = root @ root.T / D
        least = _change(x, after, metric)
        for more in _others(x, z):
            assert _slope(after + more, y, "squares") <= 1e-8, "the other map does not guard"
            # Pythagoras: what the other does beyond is at a right angle to the change.
            beyond = float((more @ metric * more).sum(1).mean())
            assert _change(x, after + more, metric) == pytest.approx(least + beyond, rel=1e-9), "another changes less"


@pytest.mark.parametrize("code", CODES)
def test_no_affine_map_that_guards_changes_less(code):
    _is_smallest(_erased, code)


@pytest.mark.parametrize(
    "larger",
    [
        lambda x, z: _orthogonal(x, z)(x),
        lambda x, z: _erased(x, z, affine=False),
        lambda x, z: _erased(x, z, shrinkage=True),
    ],
    ids=["orthogonal", "through the origin", "shrunk"],
)
def test_maps_that_guard_and_change_more_are_caught(larger):
    with pytest.raises(AssertionError, match="another changes less"):
        _is_smallest(larger, 5)


def test_the_orthogonal_one_does_guard():
    _guards(lambda x, z: _orthogonal(x, z)(x), 5, "squares")


@pytest.mark.parametrize("code", CODES)
def test_what_reads_the_label_itself_can_change_less_still(code):
    x, _, z = _rows(code)
    eye = torch.eye(D, dtype=torch.float64)
    cross, labels = _cross(x, z), z - z.mean(0)
    least = float((cross @ torch.linalg.pinv(labels.T @ labels / len(z)) @ cross.T).trace())
    assert 0 < least < _change(x, _erased(x, z), eye) < _change(x, _orthogonal(x, z)(x), eye)


@pytest.mark.parametrize("code", [2, 5])
def test_erasing_and_a_change_of_coordinates_commute(code):
    x, _, z = _rows(code)
    turn = normal(D, D, seed=30)
    torch.testing.assert_close(_erased(x @ turn, z), _erased(x, z) @ turn, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shrinkage", [True, False])
def test_total_variance_does_not_grow(shrinkage):
    x, _, z = _rows(5)
    xx, xz = statistics_of(x, z)
    p = rp.fit.leace(xx, xz, shrinkage=shrinkage).as_matrix()
    sigma = rp.fit.shrunk(xx.covariance, xx.count) if shrinkage else xx.covariance
    assert float((p @ sigma @ p.T).trace()) <= float(sigma.trace())


# Statistics in a stream, and the published eraser on the same rows.


def _streamed(x, z, order, dtype=torch.float64):
    xx, xz = Moments(D), CrossMoments(D, z.shape[1])
    for rows in torch.tensor_split(order, 7):
        xx.update(x[rows].to(dtype))
        xz.update(x[rows].to(dtype), z[rows].to(dtype))
    return xx, xz


@pytest.mark.parametrize("code", CODES)
def test_a_stream_in_any_order_gives_one_eraser(code):
    x, _, z = _rows(code)
    whole = rp.fit.leace(*statistics_of(x, z)).as_matrix()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    for rows in (torch.arange(len(x)), order):
        torch.testing.assert_close(rp.fit.leace(*_streamed(x, z, rows)).as_matrix(), whole, rtol=1e-9, atol=1e-9)
    less = rp.fit.leace(*_streamed(x, z, order[:-100])).as_matrix()
    assert float((less - whole).abs().max()) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("code", CODES)
def test_the_stream_of_the_published_fitter_gives_our_eraser(code, dtype):
    peer = pytest.importorskip("concept_erasure", reason="concept-erasure is not installed (the dev extra has it)")
    x, _, z = _rows(code)
    fitter = peer.LeaceFitter(D, z.shape[1], dtype=dtype)  # with its defaults: shrinkage, a bias, a cap on the trace
    for rows in torch.arange(len(x)).tensor_split(7):
        fitter.update(x[rows].to(dtype), z[rows].to(dtype))
    ours = rp.fit.leace(*_streamed(x, z, torch.arange(len(x)), dtype))
    name = f"published eraser, {short(dtype)}"
    close(ours.as_matrix().to(dtype), fitter.eraser.P, name)
    rows = x.to(dtype)  # of size up to 30
    within(relative(ours(rows), fitter.eraser(rows)), name)
