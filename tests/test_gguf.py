"""A slimmed or sliced checkpoint goes into llama.cpp's format where the check says so; transformers reads it back."""

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

import repedit as rp
from repedit.errors import CheckpointError, NotFound, UnknownArchitecture
from repedit.io.checkpoint import open_shards
from repedit.models.loading import mlp_widths
from repedit.rewrite.gguf import gguf_check
from tests.edits import mask
from tests.tiny import logits, tiny

NAMED = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "gpt2",
    "smollm3",
    "cohere",
)


def written(directory, path, kind="F32"):
    """A GGUF file of a Llama checkpoint; what a converter does, by the names of the check. Norms stay as they are."""
    architecture, shards = rp.resolve(rp.load(directory).model.config), open_shards(directory)
    config = rp.load(directory).model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, architecture.n_layers)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    for name in shards.entries:
        tensor = shards.read(name)
        for leaf, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if leaf in name:  # the format keeps the two halves of a rotation side by side
                tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
        stored = gguf.GGMLQuantizationType[kind if tensor.ndim > 1 else "F32"]
        data = gguf.quants.quantize(tensor.float().numpy(), stored)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(path):
    """The model in a GGUF file, by plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32, attn_implementation="eager",
        quantization_config=GgufConfig(dequantize=True),
    )  # fmt: skip
    return rp.wrap(model.eval())


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
DAMAGED = {
    "empty": (lambda p: cut(p, 0), "cannot be loaded: ValueError: .*empty"),
    "cut": (lambda p: cut(p, 0.6), "cannot be loaded: .*are its files those of this model"),
    "text": (lambda p: p.write_text("x" * 999), "cannot be loaded: ValueError: .*magic"),
    "pointer": (lambda p: p.write_bytes(POINTER), r"is a Git LFS pointer, not the file itself"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused_by_its_name(damage, message, tmp_path):
    tiny("llama").model.save_pretrained(tmp_path / "plain")
    path = tmp_path / "model.gguf"
    written(tmp_path / "plain", path)
    damage(path)
    with pytest.raises(CheckpointError, match=rf"model\.gguf {message}"):
        rp.load(path)


def slimmed(folder, layout="uniform", multiple=8):
    subject = tiny("llama")
    edit = mask(subject, "0.mlp.neurons") | mask(subject, "1.mlp.neurons", share=0.3, seed=1)
    rp.export(edit, subject, folder, structure="slim", layout=layout, multiple=multiple)
    return edit, subject


def test_a_slimmed_model_survives_the_format(tmp_path):
    edit, subject = slimmed(tmp_path / "slim")
    found = gguf_check(tmp_path / "slim")
    assert (
        found.convertible
        and found.architecture == "llama"
        and found.describe().startswith("llama: every tensor has a name")
    )
    written(tmp_path / "slim", tmp_path / "slim.gguf")
    again, small = read(tmp_path / "slim.gguf"), rp.load(tmp_path / "slim", attention="eager")
    assert set(mlp_widths(again.layout).values()) == set(mlp_widths(small.layout).values()) < {*range(40)}
    assert torch.allclose(logits(again), logits(small), atol=1e-5)
    assert torch.allclose(logits(again), logits(rp.apply(edit, subject)), atol=1e-4)


def test_ragged_widths_are_said_to_fit_nowhere(tmp_path):
    slimmed(tmp_path / "ragged", layout="ragged", multiple=1)
    found = gguf_check(tmp_path / "ragged")
    assert not found.convertible and not found.unnamed and set(found.widths) == {0, 1}
    assert "layers of different widths" in found.describe() and "layout='uniform'" in found.describe()


def test_blocks_that_do_not_fit_are_named(tmp_path):
    slimmed(tmp_path / "slim")
    found = gguf_check(tmp_path / "slim")
    bad = found.unfit["Q8_0"]
    assert "model.layers.0.self_attn.q_proj.weight" in bad
    assert f"Q8_0: {len(bad)} matrices have rows that are not a multiple of 32, such as {bad[0]}" in found.describe()
    assert "multiple=256" in found.describe()


@pytest.mark.parametrize("family", NAMED)
def test_families_of_the_format_have_a_name_for_every_tensor(family, tmp_path):
    tiny(family).model.save_pretrained(tmp_path / "in")
    assert gguf_check(tmp_path / "in").unnamed == ()


def test_a_tensor_without_a_name_is_found(tmp_path, monkeypatch):
    tiny("llama").model.save_pretrained(tmp_path / "in")
    short = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    monkeypatch.setattr(gguf, "get_tensor_name_map", lambda *_: short)
    found = gguf_check(tmp_path / "in")
    assert not found.convertible and all(".layers.1." in name for name in found.unnamed)
    assert "no name for model.layers.1" in found.describe()


def test_families_that_the_format_has_not_are_refused(tmp_path):
    tiny("gpt_neo").model.save_pretrained(tmp_path / "in")
    with pytest.raises(UnknownArchitecture, match=r"no family 'gpt_neo'.*safetensors alone"):
        gguf_check(tmp_path / "in")
    with pytest.raises(NotFound, match=r"is not a directory; give the one that export wrote"):
        gguf_check(tmp_path / "none")


@pytest.mark.slow
@pytest.mark.model
def test_smollm2_slimmed_to_blocks_is_read_back_also_quantised(tmp_path):
    subject = rp.load("smollm2-135m")
    keep = torch.rand(1536, generator=torch.Generator().manual_seed(0)) > 0.08
    edit = rp.Edit(dict.fromkeys(subject.select("*.mlp.neurons"), rp.Diagonal.mask(keep)), {"method": "test"})
    rp.export(edit, subject, tmp_path / "slim", structure="slim", multiple=32)
    found, small = gguf_check(tmp_path / "slim"), rp.load(tmp_path / "slim", attention="eager")
    assert found.convertible and not found.unfit["Q8_0"] and not found.unfit["Q4_0"]
    expected = logits(small)
    for kind, most in (("F32", 1e-4), ("Q8_0", 2.0)):
        written(tmp_path / "slim", tmp_path / f"{kind}.gguf", kind)
        error = float((logits(read(tmp_path / f"{kind}.gguf")) - expected).abs().max())
        assert error <= most, f"{kind}: {error}"
