"""Every law over every family, in three dtypes."""

from pathlib import Path

import pytest
import torch

from tests import laws
from tests.edits import fill, mask, projection
from tests.tiny import FAMILIES, tiny
from tests.tolerances import DTYPES, TABLE

POST_NORM = ("gemma2", "gemma3_text", "olmo2")
ROUTED = ("mixtral", "olmoe", "qwen3_moe")
PRE_NORM = tuple(f for f in FAMILIES if f not in POST_NORM)
NEURONS = ("1.mlp.neurons", "0.attn.neurons")
OUTS = ("1.mlp.out", "0.attn.out")

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
every_family = pytest.mark.parametrize("family", FAMILIES)


@every_dtype
@every_family
@pytest.mark.parametrize("site", NEURONS)
def test_pruning_as_hook_equals_pruning_in_weights(family, site, dtype):
    subject = tiny(family, dtype)
    laws.hooked_equals_rewritten(subject, mask(subject, site))


@pytest.mark.numeric
@every_dtype
@pytest.mark.parametrize("family", PRE_NORM)
@pytest.mark.parametrize("site", [*OUTS, "0.resid.pre"])
def test_projection_as_hook_equals_projection_in_weights(family, site, dtype):
    subject = tiny(family, dtype)
    laws.hooked_equals_rewritten(subject, projection(subject, site))


@pytest.mark.numeric
@every_dtype
@every_family
@pytest.mark.parametrize("site", OUTS)
def test_projected_subspace_is_gone(family, site, dtype):
    subject = tiny(family, dtype)
    laws.subspace_is_gone(subject, projection(subject, site))


@every_family
@pytest.mark.parametrize("site", [*NEURONS, "0.resid.pre", "1.mlp.out"])
def test_exported_equals_rewritten(family, site, tmp_path: Path):
    subject = tiny(family)
    edit = mask(subject, site) if "neurons" in site else projection(subject, site)
    laws.rewritten_equals_exported(subject, edit, tmp_path)


@every_family
def test_bfloat16_exports_too(family, tmp_path: Path):
    subject = tiny(family, torch.bfloat16)
    laws.rewritten_equals_exported(subject, mask(subject, "1.mlp.neurons"), tmp_path)


@every_family
def test_original_is_untouched(family):
    subject = tiny(family)
    laws.original_is_untouched(subject, mask(subject, "1.mlp.neurons") | mask(subject, "0.attn.neurons"))
    laws.original_is_untouched(subject, projection(subject, "0.resid.pre"))


@pytest.mark.numeric
@every_family
def test_composition_of_masks_and_projections(family):
    subject = tiny(family, torch.float64)
    laws.composition(subject, mask(subject, "1.mlp.neurons", seed=1), mask(subject, "1.mlp.neurons", seed=2))
    if family in PRE_NORM:
        laws.composition(subject, projection(subject, "1.mlp.out", seed=1), projection(subject, "1.mlp.out", seed=2))
        laws.composition(subject, mask(subject, "1.mlp.out", 0.2), projection(subject, "1.mlp.out"))


@every_family
def test_hooks_are_gone_after_an_exception(family):
    subject = tiny(family)
    laws.hooks_are_gone(subject, mask(subject, "1.mlp.neurons") | projection(subject, "0.resid.post"))


BIASED = ("gpt2", "gpt_neo", "gptj", "gpt_neox", "opt", "phi", "starcoder2")
SLOTS = {"1.mlp.neurons": (*BIASED, "llama", "smollm3"), "0.attn.neurons": tuple(f for f in FAMILIES if f not in (
    "mistral", "qwen2", "phi3", "stablelm", "mixtral", "gpt_neo", "gptj"))}  # fmt: skip


@pytest.mark.parametrize(("site", "family"), [(site, family) for site, names in SLOTS.items() for family in names])
def test_fill_goes_to_a_bias(family, site, tmp_path: Path):
    subject = tiny(family)
    edit = fill(subject, site)
    laws.hooked_equals_rewritten(subject, edit)
    laws.rewritten_equals_exported(subject, edit, tmp_path)


@pytest.mark.parametrize("family", [*BIASED, "llama", "smollm3"])
def test_centered_projection_goes_to_a_bias(family, tmp_path: Path):
    subject = tiny(family)
    edit = projection(subject, "1.mlp.out", center=True)
    laws.hooked_equals_rewritten(subject, edit)
    laws.rewritten_equals_exported(subject, edit, tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_edit_round_trip(family, tmp_path: Path):
    subject = tiny(family)
    edit = (
        fill(subject, "1.mlp.neurons")
        | projection(subject, "0.attn.out", center=True)
        | projection(subject, "1.resid.post", 0)
    )
    laws.round_trip(edit, tmp_path / "edit.safetensors")


def test_every_tolerance_leaves_a_decade():
    assert not [name for name, row in TABLE.items() if row.limit < 10 * row.worst]
