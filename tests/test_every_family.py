"""Every causal and image-text type that `repedit.wrap` accepts obeys the laws of edits at every branch.

Types of another structure than those before them run always, the others under `slow`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import repedit as rp
from repedit.arch import check
from repedit.errors import UnknownArchitecture
from tests.every_causal_type import NOT_A_DECODER as NO_CAUSAL_MODEL
from tests.every_wrapper_type import NOT_A_DECODER as NO_WRAPPER
from tests.family_laws import (
    branches_agree,
    every_writer_is_proved,
    exported_equals_applied,
    hooked_equals_applied,
    subspaces_are_gone,
    tiny_of,
)
from tests.test_families import PAGE, sections, tables


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


NO_FILES = {"wrapper:molmo2": "queries, keys and values are one tensor in its files, which no plan divides"}


@pytest.mark.parametrize("model_type", types(NO_FILES))
def test_exported_equals_applied(model_type: str, tmp_path: Path):
    exported_equals_applied(tiny_of(model_type), tmp_path)


@pytest.mark.parametrize("model_type", types())
def test_the_proof_notices_every_writer(model_type: str):
    every_writer_is_proved(tiny_of(model_type))


def test_experts_without_tokens_would_be_refused(monkeypatch):
    monkeypatch.setattr(check, "_portions", lambda parts, size: [])
    with pytest.raises(UnknownArchitecture, match=r"mlp\.experts: experts \[\d\] received no token, so that nothing"):
        tiny_of("minimax_m2")


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
