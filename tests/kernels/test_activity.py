"""The one-pass activity kernel against its meaning."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from repedit.kernels import reference
from repedit.kernels import triton_activity as kernel
from tests.kernels.laws import DEVICE, LAYOUTS, activity_is_the_reference, normal

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_every_sum_is_the_reference_and_padding_does_not_count(gradients, shifted):
    activity_is_the_reference(kernel.activity, gradients=gradients, shifted=shifted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_and_dtype(layout, dtype):
    z, mask = normal(37, 192).to(dtype), normal(37, seed=1) > 0
    strided = torch.stack([mask, ~mask], 1)[:, 0]
    found = kernel.activity(LAYOUTS[layout](z), strided, LAYOUTS[layout](z))
    expected = reference.activity(z.double(), mask, z.double())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-5, msg=name)


@pytest.mark.parametrize(("n", "f"), [(0, 5), (1, 1), (16, 128), (33, 760)])
def test_any_size(n, f):
    z, mask = normal(n, f), torch.ones(n, dtype=torch.bool, device=DEVICE)
    for name, value in reference.activity(z.double(), mask).items():
        torch.testing.assert_close(kernel.activity(z, mask)[name], value, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("cut", [1, 100, 198])
def test_sums_of_parts_add_up(cut):
    z, mask = normal(199, 96), normal(199, seed=1) > 0
    whole, first, rest = (kernel.activity(z[rows], mask[rows]) for rows in (slice(None), slice(cut), slice(cut, None)))
    for name, value in whole.items():
        torch.testing.assert_close(first[name] + rest[name], value, rtol=1e-6, atol=1e-5)
    assert torch.equal(first["positive"] + rest["positive"], whole["positive"])


def test_two_runs_give_the_same_bits():
    z, mask = normal(199, 130), normal(199, seed=1) > 0
    first, second = (torch.stack(list(kernel.activity(z, mask, z).values())) for _ in range(2))
    assert torch.equal(first, second)


def test_a_counted_nan_is_seen():
    z, mask = normal(5, 96), torch.ones(5, dtype=torch.bool, device=DEVICE)
    z[2, 7] = torch.nan
    assert kernel.activity(z, mask)["total"].isnan().nonzero().tolist() == [[7]]
