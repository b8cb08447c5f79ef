"""Quantisers of other packages: what they leave is near the weight and on few levels; absent ones are named."""

from __future__ import annotations

import pytest
import torch

from repedit import quantization
from repedit.auditing.attack import Setup, built
from repedit.auditing.attacks.weights import quantize
from repedit.errors import MissingDependency
from repedit.quantization import PACKAGED, fake_quantize, installed_schemes
from tests.teachable_models import pupil, splits


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def coarse(monkeypatch):
    """A scheme of a package that is always there: whole numbers, a group at a time."""
    seen = []

    def rounding(matrix, group):
        seen.append((tuple(matrix.shape), matrix.dtype, group))
        return matrix.round()

    monkeypatch.setitem(quantization.PACKAGED, "hqq-int4", ("torch", rounding))
    return seen


def test_a_package_gets_matrices_in_float32_and_its_result_keeps_shape_and_type(coarse):
    for shape, group in (((4, 128), 64), ((2, 3, 70), 70)):
        for dtype in (torch.float32, torch.bfloat16):
            given = weight(*shape).to(dtype)
            found = fake_quantize(given, "hqq-int4")
            assert torch.equal(found, given.float().round().to(dtype)) and found.dtype == dtype
            assert coarse[-1] == ((given.numel() // shape[-1], shape[-1]), torch.float32, group)


def test_what_is_installed_is_tried_above_the_fast_budget(coarse):
    schemes = {b: built(["quantize"], Setup(budget=b))[0].options["schemes"] for b in ("fast", "standard")}
    assert "hqq-int4" in schemes["standard"] and not set(schemes["fast"]) & set(PACKAGED)
    found = quantize(schemes=("int8", "hqq-int4"))(pupil(), splits())
    assert found.settings == ("int8", "hqq-int4") and not (found.graded[1] == found.graded[0]).any()


def test_an_absent_package_is_named(monkeypatch):
    monkeypatch.setitem(quantization.PACKAGED, "hqq-int4", ("no_such_package", None))
    assert "hqq-int4" not in installed_schemes()
    with pytest.raises(MissingDependency, match="'hqq-int4' is that of no_such_package: pip install no_such_package"):
        fake_quantize(weight(4, 64), "hqq-int4")


@pytest.mark.parametrize("scheme", PACKAGED)
@pytest.mark.parametrize("width", [128, 70])
def test_the_real_packages_round_to_few_levels(scheme, width):
    package = PACKAGED[scheme][0]
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -e .[quantizers]")
    given = weight(6, width)
    found = fake_quantize(given, scheme)
    error = float((found - given).norm() / given.norm())
    assert (0.001 < error < 0.01) if "int8" in scheme else (0.05 < error < 0.15)
    group = 64 if width % 64 == 0 and "int8" not in scheme else width
    levels = 256 if "int8" in scheme else 16
    assert all(len(set(part.tolist())) <= levels for row in found for part in row.split(group))
