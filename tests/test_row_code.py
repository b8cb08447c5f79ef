"""Law: a row printed as code is that row again; and `repedit doctor` prints the row that was inferred from a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import repedit as rp
from repedit.arch import row_code
from repedit.cli import app
from tests.every_causal_type import tiny_causal

NAMES = {name: getattr(rp.arch, name) for name in rp.arch.__all__} | {"Point": rp.Point}
INFERRED = ("qwen3_5_moe_text", "gemma4_text", "deepseek_v3", "mamba2", "falcon_h1", "bloom", "gpt_oss")


def is_the_row_again(row: rp.arch.Architecture, code=row_code) -> None:
    assert eval(code(row), NAMES) == row


@pytest.mark.parametrize("family", rp.arch.families())
def test_the_code_of_a_curated_row_is_that_row(family):
    is_the_row_again(rp.arch.families()[family])


@pytest.mark.parametrize("model_type", INFERRED)
def test_the_code_of_an_inferred_row_is_that_row(model_type):
    row = rp.arch.infer(tiny_causal(model_type))
    is_the_row_again(row)
    code = row_code(row)
    assert max(map(len, code.splitlines())) <= 110
    assert "part=0" not in code and "norm=''" not in code


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        ("gpt_neox", "part=2", "part=1"),
        ("gemma2", ", norm='post_attention_layernorm'", ""),
        ("mixtral", "num_local_experts", "num_experts"),
        ("stablelm", "centered=True", "centered=False"),
        ("olmoe", "Experts()", "Experts(gated=False)"),
    ],
)
def test_code_that_leaves_something_out_is_found(family, old, new):
    row = rp.arch.families()[family]
    assert old in row_code(row)
    with pytest.raises(AssertionError):
        is_the_row_again(row, lambda row: row_code(row).replace(old, new, 1))


def doctor(model_type: str, folder: Path, *options: str):
    tiny_causal(model_type).save_pretrained(folder)
    return CliRunner().invoke(app, ["doctor", str(folder), *options])


def test_doctor_prints_the_inferred_row_and_what_was_proved(tmp_path):
    result = doctor("qwen2_moe", tmp_path)
    assert result.exit_code == 0
    shown = result.stdout
    assert "inferred from the model and proved on it" in shown and "largest error" in shown
    code = shown[shown.index("Architecture(") : shown.index("\n)\n", shown.index("Architecture(")) + 2]
    assert eval(code, NAMES) == rp.arch.infer(tiny_causal("qwen2_moe"))


def test_doctor_gives_the_same_fields_to_machines(tmp_path):
    found = json.loads(doctor("mamba2", tmp_path, "--json").stdout)
    assert eval(found["inferred_row"], NAMES).model_type == "mamba2"
    assert found["passed"] and found["largest_error"] == max(row[2] for row in found["proofs"])
    assert json.loads(doctor("llama", tmp_path, "--json").stdout)["inferred_row"] is None


def test_doctor_refuses_a_model_with_the_proof_that_failed_and_a_row_to_start_from(tmp_path):
    result = doctor("beam", tmp_path)
    said = str(result.exception)
    assert "no row describes beam" in said and "1.resid.post" in said
    assert eval(said[said.index("Architecture(") :], NAMES).model_type == "beam"


def test_doctor_says_why_no_row_can_be_tried(tmp_path):
    assert "a norm follows the sum" in str(doctor("bert", tmp_path).exception)
