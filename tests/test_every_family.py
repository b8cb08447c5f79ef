"""Every causal and image-text type that `repedit.wrap` accepts obeys the laws of edits at every branch.

Types of another structure than those before them run always, the others under `slow`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import repedit as rp
from repedit.errors import UnknownArchitecture
from tests.every_causal_type import DECODERS
from tests.every_wrapper_type import NOT_A_DECODER, WRAPPER_TYPES
from tests.family_laws import branches_agree, hooked_equals_applied, subspaces_are_gone, tiny_of

TYPES = (*DECODERS, *(f"wrapper:{name}" for name in WRAPPER_TYPES if name not in NOT_A_DECODER))
_REFUSED = """
beam bert bert-generation big_bird blt camembert cpmant data2vec-text dbrx deepseek_v4 doge electra ernie
gemma3n_text git gpt_neox_japanese hrm_text hy_v4 inkling2_text inkling_text jetmoe longcat_flash minimax openai-gpt
qwen4_exp_text reformer rembert roberta roc_bert roformer rwkv xlm xlm-roberta xlnet xmod zaya wrapper:gemma3n
wrapper:git wrapper:glm5_next wrapper:inkling2 wrapper:inkling_mm_model wrapper:mllama wrapper:muse_spark
wrapper:qwen4_exp
"""
REFUSED = tuple(_REFUSED.split())
"""Types that no row describes."""
_FAST = """
bloom cohere2_moe deepseek_v3 falcon falcon_h1 flex_olmo gemma4_text glm4 gpt2 gpt_oss granite granitemoehybrid jamba
lfm2_moe llama4_text mamba2 mpt nemotron_h olmo3 qwen2_moe qwen3_next recurrent_gemma zamba2 wrapper:ernie4_5_vl_moe
wrapper:gemma3 wrapper:qwen3_5_moe wrapper:step3p7
"""
FAST = tuple(_FAST.split())
"""Fused, transposed, interleaved and biased experts, shared ones, state spaces, convolutions and linear attention, latent
attention, parallel branches, norms around and between branches, multipliers, per-layer embeddings, wrappers."""
TYPES_THAT_PASS = [name for name in TYPES if name not in REFUSED]


def types(without: dict[str, str] | None = None) -> list[Any]:
    """The types that pass, as parameters; those named in a table are expected to fail, with its reason."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST) + _expected(name, without or {}))
        for name in TYPES_THAT_PASS
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
