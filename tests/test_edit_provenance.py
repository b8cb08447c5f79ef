"""An edit that says which model it was made for is refused by others, in every form, and only by others."""

from __future__ import annotations

import copy

import pytest
import torch

import repedit as rp
from repedit.errors import FingerprintError
from tests.char_tokenizer import CharTokenizer
from tests.tiny import tiny


def subject(seed: int = 0, family: str = "llama", dtype: torch.dtype = torch.float32) -> rp.Subject:
    """The tiny model of a family; with another seed the same one with other values of its weights."""
    lm = rp.wrap(tiny(family, dtype).model, CharTokenizer())
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.mul_(1 + seed / 8)
    return lm


def pruned(lm: rp.Subject, sites="*.mlp.neurons", seed: int = 0) -> rp.Edit:
    sides = [rp.collect(lm, rp.data.read([f"{w} {i} and so on and on" for i in range(8)]), sites) for w in ("ab", "cd")]
    return rp.prune(rp.score(*sides, warn=False), fraction=0.2, scope="layer")


def erased(lm: rp.Subject, sites="", seed: int = 0) -> rp.Edit:
    return rp.erase_stream(lm, torch.randn(lm.layout.width, 2, generator=torch.Generator().manual_seed(seed)))


DOORS = {
    "hooked": lambda edit, lm, out: edit.hooked(lm).__enter__(),
    "apply": lambda edit, lm, out: rp.apply(edit, lm),
    "export": lambda edit, lm, out: rp.export(edit, rp.wrap(lm.model, None), out / "edited"),
    "collect": lambda edit, lm, out: rp.collect(lm, rp.data.read(["ab and so on"]), edit=edit),
    "predictions": lambda edit, lm, out: rp.predictions(lm, rp.data.read(["ab and so on"]), edit=edit),
    "slimmed": lambda edit, lm, out: rp.slimmed(edit, lm, layout="ragged"),
    "adapter": lambda edit, lm, out: rp.export_adapter(edit, lm, out / "adapter"),
    "a control": lambda edit, lm, out: rp.apply(rp.random_like(edit, seed=1), lm),
    "a composition": lambda edit, lm, out: rp.apply(edit | rp.random_like(edit, seed=1), lm),
}  # fmt: skip


@pytest.mark.parametrize("door", DOORS)
def test_an_edit_of_another_model_is_refused(door, tmp_path):
    edit = pruned(subject())
    with pytest.raises(
        FingerprintError, match=r"made for another model.*layers\.0\.mlp\.down_proj\.weight holds other"
    ):
        DOORS[door](edit, subject(seed=1), tmp_path)
    assert not list(tmp_path.iterdir())
    DOORS[door](edit, subject(), tmp_path)


@pytest.mark.parametrize("make", [pruned, erased], ids=["pruned", "erased"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_files_of_another_model_are_refused(make, family, tmp_path):
    edit = make(subject(family=family))
    for seed in (0, 1):
        subject(seed, family).model.save_pretrained(tmp_path / f"{seed}")
    rp.export(edit, tmp_path / "0", tmp_path / "edited")
    with pytest.raises(FingerprintError, match="made for another model"):
        rp.export(edit, tmp_path / "1", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    rp.export(edit, tmp_path / "1", tmp_path / "other", any_model=True)


def test_the_same_model_in_another_dtype_or_loaded_again_is_not_refused(tmp_path):
    half = subject(dtype=torch.bfloat16)
    half.model.save_pretrained(tmp_path / "half")
    for dtype in ("bfloat16", "float32", "float64"):
        lm = rp.wrap(rp.load(tmp_path / "half", dtype=dtype).model, CharTokenizer())
        edit = pruned(lm)
        rp.apply(edit, half)
        rp.export(edit, tmp_path / "half", tmp_path / dtype)


def test_an_edit_made_by_hand_says_that_its_making_is_not_recorded():
    assert rp.Edit({}).describe() == "made by: not recorded"


def test_an_edit_says_for_which_model_it_was_made_after_a_round_trip(tmp_path):
    edit = pruned(subject())
    edit.save(tmp_path / "edit.safetensors")
    again = rp.Edit.load(tmp_path / "edit.safetensors")
    assert again.weights == edit.weights == copy.deepcopy(edit).weights and len(edit.weights) == len(edit.maps)
    assert not any(name in again.describe() for name in again.weights) and "made by" in again.describe()
    with pytest.raises(FingerprintError):
        rp.apply(again, subject(seed=1))


def test_an_edit_made_after_one_that_names_no_model_follows_it():
    lm = subject()
    first = rp.Edit(pruned(lm, "0.mlp.neurons").maps)
    second = pruned(rp.apply(first, lm), "0.mlp.neurons")
    for change in ([first, second], first | second):
        rp.apply(change, lm)
    with pytest.raises(FingerprintError):
        rp.apply(second, lm)


def test_edits_of_other_sites_and_edits_without_a_model_go_on():
    lm = subject()
    first, second = pruned(lm, "0.mlp.neurons"), pruned(lm, "1.mlp.neurons")
    rp.apply(second, rp.apply(first, lm))
    rp.apply([first, first], lm)
    edited = rp.apply(first, lm)
    with pytest.raises(FingerprintError, match="or for this one before it was edited"):
        rp.apply(first, edited)
    rp.apply(first, edited, any_model=True, allow_identity=True)
    with rp.Edit(first.maps).hooked(edited):
        pass
    rp.apply(pruned(edited, "0.mlp.neurons"), edited, allow_identity=True)
