"""Quantised checkpoints: dequantised they hold the values that were encoded, and otherwise nothing edits them."""

from __future__ import annotations

import json
import logging
import re
import shlex
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GptOssConfig
from typer.testing import CliRunner

import repedit as rp
from repedit.cli import app
from repedit.errors import CheckpointError, MissingDependency, QuantizedModel
from repedit.models import loading
from repedit.models.dequantization import check_stored, check_unquantized, dequantized_when, dequantizing, ordinary
from tests.edits import mask
from tests.quantized_models import FILE, fp8, mxfp4, set_quantization
from tests.saved_models import saved
from tests.tiny import logits, tiny

UP = "model.layers.0.mlp.up_proj.weight"
EXPERTS = "model.layers.0.mlp.experts.down_proj"


@pytest.fixture
def plain(tmp_path) -> Path:
    return saved(tmp_path / "stored")


def gpt_oss(folder: Path) -> Path:
    """A tiny gpt-oss checkpoint that is not quantised."""
    config = GptOssConfig(
        vocab_size=61, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def check_values(model: torch.nn.Module, values: dict[str, Tensor], dtype: torch.dtype) -> None:
    """The weights are the encoded values, rounded once to the dtype."""
    for name, value in values.items():
        weight = model.get_parameter(name)
        assert weight.dtype == dtype and torch.equal(weight, value.to(dtype)), name


# --- Dequantised


@pytest.mark.parametrize("scales", [torch.float32, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_is_dequantised_to_the_values_that_were_encoded(dtype, scales, plain):
    values = fp8(plain, scales=scales)
    lm = rp.load(plain, dequantize=True, dtype=dtype)
    check_values(lm.model, values, getattr(torch, dtype))
    assert lm.quantizer is None and lm.files is None and lm.source is None
    assert lm.origin.quantizer == "fp8" and lm.origin.dequantized and "in memory" in repr(lm)


def test_scales_beside_their_block_are_found_out(plain):
    values = fp8(plain, shift=1)
    with pytest.raises(AssertionError, match="_proj"):
        check_values(rp.load(plain, dequantize=True).model, values, torch.float32)


def test_blocks_that_are_not_full_are_dequantised(plain, monkeypatch, tmp_path):
    tiny("llama").model.save_pretrained(tmp_path / "other")  # 40 neurons are 2.5 blocks, 24 rows are 1.5
    values, others = fp8(plain), fp8(tmp_path / "other")
    check_values(rp.load(tmp_path / "other", dequantize=True).model, others, torch.float32)
    monkeypatch.setattr(loading, "partial_blocks", nullcontext)
    with pytest.raises(CheckpointError, match="automatic conversion of the weights"):
        rp.load(tmp_path / "other", dequantize=True)
    with pytest.raises(AssertionError, match="_proj"):
        check_values(rp.load(plain, dequantize=True).model, values, torch.float32)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_plain_copy_holds_the_values_under_their_names_on_disk(family, tmp_path):
    values = fp8(saved(tmp_path / "stored", family))
    rp.load(tmp_path / "stored", dequantize=True).save(tmp_path / "plain")
    stored = load_file(tmp_path / "plain" / FILE)
    assert all(torch.equal(stored[name], value) for name, value in values.items())
    assert not any(name.endswith("_scale_inv") for name in stored)
    assert rp.load(tmp_path / "plain").quantizer is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0, 1])
def test_mxfp4_is_dequantised_to_the_values_that_were_encoded(shift, dtype, tmp_path):
    values = mxfp4(gpt_oss(tmp_path / "g"), shift)
    config = dequantizing(AutoConfig.from_pretrained(tmp_path / "g"), tmp_path)
    model = ordinary(AutoModelForCausalLM.from_pretrained(tmp_path / "g", config=config, dtype=dtype), tmp_path)
    with pytest.raises(AssertionError, match="experts") if shift else nullcontext():
        check_values(model, values, dtype)
    model.save_pretrained(tmp_path / "plain")
    stored = load_file(tmp_path / "plain" / FILE)
    assert not any(name.endswith(("_blocks", "_scales")) for name in stored)
    assert torch.equal(stored[EXPERTS], model.get_parameter(EXPERTS))
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_a_dequantised_model_is_edited_and_exported_as_a_plain_one(plain, tmp_path):
    fp8(plain)
    lm = rp.load(plain, dequantize=True)
    edit = mask(lm, "1.mlp.neurons")
    (plain / "hf_quant_config.json").write_text("{}")
    record = rp.export(edit, lm, tmp_path / "out")
    assert record.left_out["hf_quant_config.json"] == "the config of a quantiser, and the exported weights are plain"
    assert record.base["dequantized_from"] == "fp8" and record.base["in_memory"]
    assert "The weights were dequantised from fp8 of stored" in (tmp_path / "out" / "README.md").read_text()
    again = rp.load(tmp_path / "out")
    assert again.quantizer is None and again.files is not None
    assert torch.equal(logits(again), logits(rp.apply(edit, lm))) and not torch.equal(logits(again), logits(lm))


def test_a_model_that_transformers_dequantised_is_exported_as_a_plain_one(plain, tmp_path, monkeypatch):
    names = fp8(plain)
    model = AutoModelForCausalLM.from_pretrained(plain, config=dequantizing(AutoConfig.from_pretrained(plain), plain))
    with monkeypatch.context() as patch:  # the broken twin: transformers writes float8 again, and a plain config
        patch.setattr("repedit.rewrite.export.forget_conversions", lambda model: None)
        with pytest.raises(
            QuantizedModel, match=r"weight holds torch\.float8_e4m3fn, and the config names no quantiser"
        ):
            rp.wrap(model).save(tmp_path / "broken")
    saved_again = rp.load(rp.wrap(model).save(tmp_path / "out")).model
    check_values(saved_again, {name: model.get_parameter(name) for name in names}, torch.float32)


def test_a_plain_model_is_loaded_as_always(plain, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "repedit"):
        lm = rp.load(plain, dequantize=True)
    assert "dequantize=True changes nothing" in caplog.text
    assert lm.files == plain and torch.equal(logits(lm), logits(rp.load(plain)))
    assert "dequantized_from" not in rp.export(mask(lm, "1.mlp.neurons"), lm, tmp_path / "out").base


# --- Not dequantised


def test_a_quantised_model_is_measured_and_not_edited(plain, tmp_path, caplog):
    values = fp8(plain)
    with caplog.at_level(logging.INFO, "repedit"):
        lm = rp.load(plain)
    assert "transformers dequantised the fp8 weights" in caplog.text and lm.quantizer == "fp8"
    check_values(lm.model, values, torch.float32)
    edit = mask(lm, "1.mlp.neurons")
    for act in (
        lambda: rp.apply(edit, lm),
        lambda: rp.export(edit, lm, tmp_path / "out"),
        lambda: rp.export(edit, plain, tmp_path / "out"),
        lambda: lm.to(dtype="float64"),
    ):
        with pytest.raises(QuantizedModel, match=r"quantised \(fp8\) and cannot be .*; make a plain copy and use that"):
            act()


def test_the_message_holds_the_call_and_the_command_that_make_a_plain_copy(plain, tmp_path, monkeypatch):
    values = fp8(plain)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QuantizedModel) as caught:
        rp.apply(mask(tiny("llama"), "1.mlp.neurons"), rp.load(plain), any_model=True)
    call, command = re.findall(
        r"(rp\.load\(.*?\)\.save\('plain'\)).*?(repedit apply .*? --out plain)", str(caught.value)
    )[0]
    eval(call, {"rp": rp})
    check_values(rp.load("plain").model, values, torch.float32)
    words = [*shlex.split(command)[1:-1], "copy", "--no-verify"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert (Path("copy") / FILE).read_bytes() == (Path("plain") / FILE).read_bytes()


def test_a_verb_edits_a_quantised_model_that_it_dequantises(plain, tmp_path):
    fp8(plain)
    lm, edit, out = rp.load(plain, dequantize=True), tmp_path / "edit.safetensors", tmp_path / "out"
    made = mask(lm, "1.mlp.neurons")
    made.save(edit)
    words = ["apply", str(edit), str(plain), "--out", str(out), "--no-verify"]
    assert isinstance(CliRunner().invoke(app, words).exception, QuantizedModel) and not out.exists()
    assert CliRunner().invoke(app, [*words, "--dequantize"]).exit_code == 0
    assert torch.equal(logits(rp.load(out)), logits(rp.apply(made, lm)))


@pytest.mark.parametrize("quantizer", ["gptq", "awq", "x"])
def test_what_transformers_cannot_dequantise_is_refused_by_name(quantizer, plain):
    assert dequantized_when(quantizer) is None
    set_quantization(plain, {"quant_method": quantizer, "bits": 4})
    with pytest.raises(
        QuantizedModel, match=rf"stored is quantised \({quantizer}\), and transformers cannot dequantise"
    ):
        rp.load(plain, dequantize=True)
    lm = tiny("llama")
    lm.model.config.quantization_config = {"quant_method": quantizer}
    with pytest.raises(QuantizedModel, match=f"the unquantised base: transformers cannot dequantise {quantizer}"):
        lm.check_unquantized("edited exactly")


def test_a_format_whose_package_is_missing_is_refused(plain, monkeypatch):
    assert dequantized_when("bitsandbytes") == "loaded" and dequantized_when("compressed-tensors") == "loading"
    monkeypatch.setattr("transformers.utils.quantization_config.is_compressed_tensors_available", lambda: False)
    set_quantization(plain, {"quant_method": "compressed-tensors", "format": "dense"})
    with pytest.raises(MissingDependency, match=r"stored needs a package that is not installed: .*compressed-tensors"):
        rp.load(plain, dequantize=True)


def test_quantised_weights_of_other_shapes_are_refused_as_such():
    model = tiny("llama").model
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    packed = torch.nn.Parameter(torch.zeros(288, 1, dtype=torch.uint8), requires_grad=False)
    model.model.layers[0].self_attn.o_proj.weight = packed
    with pytest.raises(
        QuantizedModel, match=r"quantised \(bitsandbytes\) in a format that repedit does not read; make a"
    ):
        rp.wrap(model)


def test_a_weight_that_stays_quantised_is_refused(plain):
    model = rp.load(plain).model
    model.get_parameter(UP).data = model.get_parameter(UP).data.to(torch.float8_e4m3fn)
    with pytest.raises(
        QuantizedModel, match=rf"transformers left {UP} of here quantised \(Parameter, torch\.float8_e4m3fn\)"
    ):
        ordinary(model, "here")


# --- Files that are not stored as their config says


def changed(folder: Path, tensors: dict[str, Tensor | None]) -> None:
    """Replace tensors of a checkpoint; None leaves one out."""
    stored = load_file(folder / FILE) | tensors
    save_file({n: t for n, t in stored.items() if t is not None}, folder / FILE, metadata={"format": "pt"})


def specs_of(folder: Path):
    """The tensors that the files of a checkpoint hold."""
    return loading.open_shards(folder).specs


FP8_LIES = [
    ({f"{UP}_scale_inv": None}, f"{UP} holds torch.float8_e4m3fn, and there is no {UP}_scale_inv"),
    ({f"{UP}_scale_inv": torch.ones(4, 3)}, r"has \[4, 3\] scales, blocks of \[16, 8\] need \[8, 3\]"),
    ({UP: torch.ones(128, 24)}, f"{UP} holds torch.float32 and has scales, {UP}_scale_inv"),
]


@pytest.mark.parametrize(("tensors", "message"), FP8_LIES, ids=["no scale", "grid", "plain weight"])
def test_fp8_that_is_not_stored_as_its_config_says_is_refused(tensors, message, plain):
    fp8(plain)
    changed(plain, tensors)
    for dequantize in (True, False):
        with pytest.raises(CheckpointError, match=rf"stored is not stored as its config says \(fp8\): .*{message}"):
            rp.load(plain, dequantize=dequantize)


MXFP4_LIES = [
    ({f"{EXPERTS}_scales": None}, f"there is {EXPERTS}_blocks, and no {EXPERTS}_scales"),
    ({f"{EXPERTS}_blocks": None}, f"there is {EXPERTS}_scales, and no {EXPERTS}_blocks"),
    ({f"{EXPERTS}_scales": torch.ones(4, 64, 2).byte()}, r"_scales torch\.uint8 of shape \[4, 64, 2\]; both are uint8"),
    ({f"{EXPERTS}_scales": torch.ones(4, 64, 1)}, r"_scales torch\.float32 of shape \[4, 64, 1\]; both are uint8"),
]


@pytest.mark.parametrize(("tensors", "message"), MXFP4_LIES, ids=["no scales", "no blocks", "shape", "dtype"])
def test_mxfp4_that_is_not_stored_as_its_config_says_is_refused(tensors, message, tmp_path):
    mxfp4(gpt_oss(tmp_path / "g"))
    check_stored({"quant_method": "mxfp4"}, specs_of(tmp_path / "g"), "g")
    changed(tmp_path / "g", tensors)
    with pytest.raises(CheckpointError, match=rf"g is not stored as its config says \(mxfp4\): .*{message}"):
        check_stored({"quant_method": "mxfp4"}, specs_of(tmp_path / "g"), "g")


@pytest.mark.parametrize("quantizer", ["fp8", "mxfp4", "bitsandbytes"])
def test_plain_files_whose_config_says_that_they_are_quantised_are_refused(quantizer, plain):
    set_quantization(plain, {"quant_method": quantizer})
    for dequantize in (True, False):
        with pytest.raises(
            CheckpointError,
            match=rf"says that the weights are quantised \({quantizer}\), and the \d+ tensors .* plain \(float32\)",
        ):
            rp.load(plain, dequantize=dequantize)


def test_quantised_files_whose_config_names_no_quantiser_are_refused(plain, tmp_path):
    fp8(plain)
    set_quantization(plain, None)
    for dequantize in (True, False):
        with pytest.raises(
            QuantizedModel, match=r"names no quantiser.*or the config\.json that belongs to these files"
        ):
            rp.load(plain, dequantize=dequantize)
    mxfp4(gpt_oss(tmp_path / "g"))
    with pytest.raises(QuantizedModel, match=r"experts\.down_proj_blocks holds torch\.uint8, and the config names no"):
        check_unquantized(None, specs_of(tmp_path / "g"), "read")
