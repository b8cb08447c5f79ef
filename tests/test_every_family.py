"""Every causal and image-text type that `repedit.wrap` accepts obeys the laws of edits at every branch.

Types of another structure than those before them run always, the others under `slow`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import repedit as rp
from repedit.arch import check
from repedit.errors import UnknownArchitecture
from repedit.lower import lower
from tests.every_causal_type import NOT_A_DECODER as NO_CAUSAL_MODEL
from tests.every_causal_type import tiny_causal
from tests.every_wrapper_type import NOT_A_DECODER as NO_WRAPPER
from tests.family_laws import (
    branches_agree,
    every_writer_is_proved,
    exported_equals_applied,
    hooked_equals_applied,
    reload_without_repedit,
    subspaces_are_gone,
    tiny_of,
)
from tests.test_families import PAGE, sections, tables
from tests.tolerances import short


def listed(number: int) -> tuple[str, ...]:
    """The types that docs/families.md lists as proved (0) or refused (1)."""
    causal, wrappers = (tables(section)[number] for section in sections(PAGE).values())
    return (*causal, *(f"wrapper:{name}" for name in wrappers))


ACCEPTED = listed(0)
REFUSED = [name for name in listed(1) if name.removeprefix("wrapper:") not in {**NO_CAUSAL_MODEL, **NO_WRAPPER}]
_FAST = """
bloom cohere2_moe deepseek_v3 falcon falcon_h1 flex_olmo gemma4_text glm4 gpt2 gpt_oss granite granitemoehybrid jamba
lfm2_moe llama4_text mamba2 mpt nemotron_h olmo3 qwen2_moe qwen3_next recurrent_gemma zamba2 wrapper:gemma3
wrapper:qwen3_5_moe wrapper:step3p7
"""
FAST = tuple(_FAST.split())
"""Fused, transposed, interleaved and biased experts, shared ones, state spaces, convolutions and linear attention, latent
attention, parallel branches, norms around and between branches, multipliers, per-layer embeddings, wrappers."""


def types(without: dict[str, str] | None = None) -> list[Any]:
    """The types that pass, as parameters; those named in a table are expected to fail, with its reason."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST) + _expected(name, without or {}))
        for name in ACCEPTED
    ]


def _expected(name: str, without: dict[str, str]) -> list[Any]:
    return [pytest.mark.xfail(reason=without[name])] if name in without else []


NO_BFLOAT16 = {"xlstm": "the kernel in plain torch of transformers itself fails in bfloat16"}


@pytest.mark.numeric
@pytest.mark.parametrize("model_type", types())
def test_hooked_equals_applied(model_type: str):
    subject = tiny_of(model_type)
    hooked_equals_applied(subject)
    subspaces_are_gone(subject)


@pytest.mark.numeric
@pytest.mark.parametrize("model_type", types(NO_BFLOAT16))
def test_branches_agree_in_bfloat16(model_type: str):
    subject = tiny_of(model_type, torch.bfloat16)
    branches_agree(subject)
    subspaces_are_gone(subject)


DTYPES = (torch.float32, torch.bfloat16)
NO_FILES = {
    "wrapper:molmo2": "queries, keys and values are one tensor in its files, which no plan divides",
    "wrapper:shieldgemma2": "transformers does not find the tensors again that it saves of the language model",
}


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("model_type", types(NO_FILES))
def test_exported_equals_applied(model_type: str, dtype: torch.dtype, tmp_path: Path, request: pytest.FixtureRequest):
    if dtype == torch.bfloat16 and model_type in NO_BFLOAT16:
        request.applymarker(pytest.mark.xfail(reason=NO_BFLOAT16[model_type]))
    exported_equals_applied(tiny_of(model_type, dtype), tmp_path)


def exported(dtype: torch.dtype, names: Iterable[str] = ACCEPTED) -> list[str]:
    """The types whose exports can be run."""
    without = {**NO_FILES, **(NO_BFLOAT16 if dtype == torch.bfloat16 else {})}
    return [name for name in names if name not in without]


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_some_types_reload_without_repedit(dtype: torch.dtype, tmp_path: Path):
    reload_without_repedit(exported(dtype, FAST), dtype, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_every_type_reloads_without_repedit(dtype: torch.dtype, tmp_path: Path):
    reload_without_repedit(exported(dtype), dtype, tmp_path)


@pytest.mark.parametrize("model_type", types())
def test_the_proof_notices_every_writer(model_type: str):
    every_writer_is_proved(tiny_of(model_type))


def test_experts_without_tokens_would_be_refused(monkeypatch):
    monkeypatch.setattr(check, "_portions", lambda parts, size: [])
    with pytest.raises(UnknownArchitecture, match=r"mlp\.experts: experts \[\d\] received no token, so that nothing"):
        rp.check_architecture(tiny_causal("minimax_m2"))  # proved again although its row may be known


@pytest.mark.slow
@pytest.mark.parametrize("model_type", REFUSED)
def test_every_other_type_is_refused(model_type: str):
    with pytest.raises((UnknownArchitecture, rp.errors.NotAModel)):
        tiny_of(model_type)


@pytest.mark.parametrize("law", [hooked_equals_applied, branches_agree])
def test_an_expert_that_is_not_edited_breaks_the_laws(law: Any):
    def all_but_the_last_expert(edit: rp.Edit, subject: Any) -> Any:
        edited = rp.apply(edit, subject)
        name = "model.layers.1.mlp.experts.down_proj"
        edited.model.get_parameter(name).data[-1] = subject.model.get_parameter(name)[-1]
        return edited

    with pytest.raises(AssertionError, match=r"1\.mlp"):
        law(tiny_of("qwen2_moe"), all_but_the_last_expert)


def but_one(edit: rp.Edit, subject: Any, target: Path) -> None:
    """Export an edit without its last map."""
    *kept, _ = edit.maps
    rp.export(rp.Edit({site: edit.maps[site] for site in kept}), subject, target)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "wrapper:gemma3"])
def test_an_export_that_leaves_out_a_site_breaks_the_laws(model_type: str, tmp_path: Path):
    with pytest.raises(AssertionError, match=r"down_proj"):
        exported_equals_applied(tiny_of(model_type), tmp_path, but_one)
    with pytest.raises(AssertionError, match=model_type):
        reload_without_repedit([model_type], torch.float32, tmp_path, but_one)


def test_files_that_do_not_load_break_the_law(tmp_path: Path):
    def truncated(edit: rp.Edit, subject: Any, target: Path) -> None:
        rp.export(edit, subject, target)
        path = next(target.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-8])

    with pytest.raises(AssertionError, match=r"llama.*Error"):
        reload_without_repedit(["llama", "gpt2"], torch.float32, tmp_path, truncated)


@pytest.mark.parametrize("model_type", ["glm4", "olmo3"])
def test_a_projection_that_forgets_the_norm_breaks_the_law(model_type: str):
    def without_gain(edit: rp.Edit, subject: Any) -> Any:
        plan = lower(edit, subject.architecture, subject.specs)
        bare = {name: tuple(replace(op, gain=None) for op in ops) for name, ops in plan.operations.items()}
        return rp.apply(replace(plan, operations=bare), subject)

    with pytest.raises(AssertionError):
        subspaces_are_gone(tiny_of(model_type), without_gain)
