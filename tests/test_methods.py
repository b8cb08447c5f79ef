"""The methods that users look for on an edit, a delta and a model do what the public functions do."""

from __future__ import annotations

import pytest
import torch

import repedit as rp
from repedit.delta import Delta
from repedit.errors import ArgumentError, NotFinite, OffloadedTensors, QuantizedModel, TargetExists
from repedit.io.checkpoint import SINGLE
from repedit.metrics.generation import generate
from tests.edits import mask, projection
from tests.saved_models import byte_tokenizer
from tests.tiny import logits, tiny


@pytest.fixture
def loaded(tmp_path):
    """A model that was read from files."""
    tiny("llama").model.save_pretrained(tmp_path / "in")
    return rp.load(tmp_path / "in")


def test_an_edit_tells_its_sites_and_rank():
    subject = tiny("llama")
    edit = projection(subject, "1.mlp.out") | mask(subject, "0.mlp.neurons")
    assert len(edit) == 2 and edit.sites == (rp.Site.parse("0.mlp.neurons"), rp.Site.parse("1.mlp.out"))
    assert edit.rank == sum(edit.maps[site].rank_removed for site in edit.sites) > 0
    assert len(rp.Edit({})) == rp.Edit({}).rank == 0


def test_apply_is_the_public_function():
    subject = tiny("llama")
    name = "model.layers.1.mlp.down_proj.weight"
    delta = Delta({name: torch.full_like(subject.model.get_parameter(name), 0.1)})
    for change in (mask(subject, "1.mlp.neurons"), delta):
        assert torch.equal(logits(change.apply(subject)), logits(rp.apply(change, subject)))
    edited = mask(subject, "1.mlp.neurons").apply(subject, sides="output", inplace=True)
    assert edited.model is subject.model


def test_generate_takes_one_prompt_or_several():
    subject = rp.wrap(tiny("llama", vocab_size=260).model, byte_tokenizer())
    expected = generate(subject, ["ab", "cd"], max_new_tokens=5, progress=False)
    assert subject.generate(["ab", "cd"], max_new_tokens=5) == expected
    assert subject.generate("ab", max_new_tokens=5) == expected[0]


def test_a_moved_model_belongs_to_its_files_and_a_cast_one_does_not(loaded, tmp_path):
    assert loaded.to("cpu") is loaded and loaded.files == loaded.source
    assert loaded.to("cpu", "bfloat16").model.dtype == torch.bfloat16 and loaded.files is None
    assert rp.load(loaded.save(tmp_path / "half")).model.dtype == torch.bfloat16


def test_save_streams_the_files_and_never_replaces_others(loaded, tmp_path):
    folder = loaded.save(tmp_path / "out")
    assert (folder / SINGLE).read_bytes() == (loaded.source / SINGLE).read_bytes()
    assert torch.equal(logits(rp.load(folder)), logits(loaded))
    with pytest.raises(TargetExists):
        loaded.save(folder)
    edited = mask(loaded, "1.mlp.neurons").apply(loaded)
    assert torch.equal(logits(rp.load(edited.save(tmp_path / "edited"))), logits(edited))


def test_what_cannot_be_moved_is_refused(loaded):
    with pytest.raises(ArgumentError, match="device='nowhere' cannot be used"):
        loaded.to("nowhere")
    with torch.no_grad():
        loaded.model.get_parameter("model.norm.weight")[0] = 1e30
    with pytest.raises(NotFinite, match=r"float16 cannot represent weight 'model\.norm\.weight' at"):
        loaded.to(dtype="float16")
    assert loaded.model.dtype == torch.float32
    loaded.model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(QuantizedModel, match=r"quantised \(gptq\) and cannot be moved or cast"):
        loaded.to("cpu")
    away = rp.wrap(tiny("llama").model.to("meta"))
    with pytest.raises(OffloadedTensors, match="load the model again with another device_map"):
        away.to("cpu")
