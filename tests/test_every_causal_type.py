"""Every causal-LM model type of the installed transformers has a tiny model, or a reason why it has none."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests import every_causal_type
from tests.every_causal_type import (
    CAUSAL_TYPES,
    DECODERS,
    EXTRA,
    NOT_A_DECODER,
    PER_LAYER,
    VOCABULARY,
    small_config,
    tiny_causal,
)

INSTALLED = [name for name in DECODERS if name in CAUSAL_TYPES]


def test_every_type_is_known():
    unknown = set(CAUSAL_TYPES) - set(DECODERS) - set(NOT_A_DECODER)
    assert not unknown, (
        f"transformers has new causal-LM types {sorted(unknown)}; in tests/every_causal_type.py add each to DECODERS, "
        "with what its tiny config needs in EXTRA, or to NOT_A_DECODER with the reason"
    )


def test_tables_do_not_overlap():
    assert not set(DECODERS) & set(NOT_A_DECODER)
    assert set(EXTRA) <= set(DECODERS)


@pytest.mark.parametrize("model_type", INSTALLED)
def test_tiny_model_is_finite(model_type: str):
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = tiny_causal(model_type)(input_ids=ids, use_cache=False).logits
    assert logits.shape == (2, 9, VOCABULARY)
    assert logits.isfinite().all()
    assert logits.std() > 0.01


def lost_kinds(default: PreTrainedConfig, small: PreTrainedConfig) -> set[str]:
    """Kinds of layers of the default config that the small one lacks."""
    kinds = [
        {str(kind) for name in PER_LAYER for kind in getattr(config, name, None) or ()} for config in (default, small)
    ]
    return kinds[0] - kinds[1]


def test_no_kind_of_layer_is_lost():
    assert {name: lost for name in INSTALLED if (lost := lost_kinds(CONFIG_MAPPING[name](), small_config(name)))} == {}


def test_lost_kind_is_found():
    only_full = small_config("qwen3_next", layer_types=["full_attention", "full_attention"])
    assert lost_kinds(CONFIG_MAPPING["qwen3_next"](), only_full) == {"linear_attention"}


def test_each_caller_has_the_same_model_of_its_own():
    first, second = tiny_causal("qwen2_moe"), tiny_causal("qwen2_moe")
    first.lm_head.weight.data.zero_()
    assert second.lm_head.weight.any()
    assert torch.equal(tiny_causal("qwen2_moe").lm_head.weight, second.lm_head.weight)


def test_half_precision_keeps_what_transformers_keeps_in_float32():
    model = tiny_causal("hunyuan_v1_moe", torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.gate.wg.weight.dtype == torch.float32


def test_large_model_is_refused(monkeypatch):
    monkeypatch.setattr(every_causal_type, "LARGEST", 10)
    with pytest.raises(ValueError, match=r"the tiny llama has \d+ parameters; make it smaller in EXTRA"):
        tiny_causal("llama", intermediate_size=44)
