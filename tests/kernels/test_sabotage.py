"""Each law of the kernels must catch its broken twin."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from repedit.kernels import triton_activity, triton_project
from repedit.kernels.tiles import TILINGS, tile
from tests.kernels.laws import (
    activity_is_the_reference,
    case,
    gradients_are_those_of_the_reference,
    kernel_is_the_reference,
    projecting_twice_is_projecting_once,
    transposed,
)


def strides_ignored(x, u, v, *rest):
    """U as if it were stored by rows."""
    triton_project.launch(x, u.T.contiguous().view(u.shape), v, *rest)


def center_forgotten(x, u, v, c, *rest):
    triton_project.launch(x, u, v, None, *rest)


def swapped(x, u, v, *rest):
    triton_project.launch(x, v, u, *rest)


def residual_forgotten(x, u, v, c, residual, *rest):
    triton_project.launch(x, u, v, c, None, *rest)


def last_rows_unwritten(x, u, v, c, residual, out, t, plan):
    triton_project.launch(x[:-1], u, v, c, residual[:-1], out[:-1], t[:-1], plan)


def written_outside(x, u, v, c, residual, out, t, plan):
    triton_project.launch(x, u, v, c, residual, out, t, plan)
    out.as_strided((1,), (1,), out.storage_offset() - 1).zero_()


BROKEN = (strides_ignored, center_forgotten, swapped, residual_forgotten, last_rows_unwritten, written_outside)


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("run", BROKEN, ids=lambda f: f.__name__)
def test_a_broken_projection_is_caught(run, tiling):
    c = case(33, 130, 5, layout=transposed, residual=True)
    with pytest.raises(AssertionError):
        kernel_is_the_reference(run, c, tile(130, 5, 4, tiling))


def test_an_operator_that_is_no_projection_is_caught():
    with pytest.raises(AssertionError):
        projecting_twice_is_projecting_once(lambda x, u, v, m: triton_project.project(x, 0.5 * u, v, m))


@pytest.mark.parametrize("wrong", ["u", "v", "center"])
def test_a_missing_gradient_term_is_caught(wrong):
    def project(x, u, v, m, residual):
        operands = {"u": u, "v": v, "center": m}
        operands[wrong] = operands[wrong].detach() + 0 * operands[wrong]
        return triton_project.project(x, *operands.values(), residual=residual)

    with pytest.raises(AssertionError):
        gradients_are_those_of_the_reference(project, replace(case(33, 130, 5), residual=None))


def padding_counted(z, mask, *rest):
    return triton_activity.activity(z, torch.ones_like(mask), *rest)


def padding_multiplied(z, mask, *rest):
    """0 * NaN is NaN: a mask is not a multiplication."""
    return triton_activity.activity(z * mask[:, None], torch.ones_like(mask), *rest)


def shift_forgotten(z, mask, grad, shift):
    return triton_activity.activity(z, mask, grad, None)


def zeros_are_positive(z, mask, grad, shift):
    return triton_activity.activity(z, mask, grad, shift) | {"positive": mask.sum().double().expand(z.shape[1])}


@pytest.mark.parametrize(
    "activity", [padding_counted, padding_multiplied, shift_forgotten, zeros_are_positive], ids=lambda f: f.__name__
)
def test_broken_sums_are_caught(activity):
    with pytest.raises(AssertionError):
        activity_is_the_reference(activity, gradients=True, shifted=True)
