"""One run from end to end: what it changes, what it leaves alone, what it writes down."""

from __future__ import annotations

import pytest
import torch

import repedit as rp
from repedit.delta import Delta
from tests.test_delta import export_equals_apply
from tests.unlearned import sides, subject, values

QUICK = {"steps": 3, "batch_size": 3, "lr": 1e-3, "progress": False}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_unlearned_applies_exports_and_reloads_bitwise(family, dtype, tmp_path):
    lm = subject(family, dtype)
    before = values(lm)
    delta = rp.unlearn(lm, recipe=rp.recipes.grad_diff(), **sides(), **QUICK)
    assert all(torch.equal(p, before[n]) for n, p in values(lm).items())
    delta.save(tmp_path / "d.safetensors")
    export_equals_apply(lm, Delta.load(tmp_path / "d.safetensors"), tmp_path / "out")
    assert [record["step"] for record in delta.log] == [0, 1, 2]


@pytest.mark.parametrize("recipe", ["ga", "grad_diff", "npo_gdr"])
def test_forgetting_raises_the_forget_loss(recipe):
    delta = rp.unlearn(
        subject(), recipe=getattr(rp.recipes, recipe)(), **sides(), steps=8, batch_size=6, lr=1e-3, progress=False
    )
    assert delta.log[-1]["nll"]["forget"] > delta.log[0]["nll"]["forget"]
