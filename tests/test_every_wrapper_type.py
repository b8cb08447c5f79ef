"""Every image-text-to-text type of the installed transformers is built tiny and runs on text, or is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests import every_wrapper_type
from tests.every_causal_type import PER_LAYER, VOCABULARY
from tests.every_wrapper_type import LARGEST, NOT_A_DECODER, WRAPPER_TYPES, small_config, tiny_wrapper
from tests.tiny import ids

BUILT = [model_type for model_type in WRAPPER_TYPES if model_type not in NOT_A_DECODER]


@contextmanager
def named(model_type: str) -> Iterator[None]:
    """A type that cannot be built says what to add."""
    try:
        yield
    except Exception as error:
        pytest.fail(
            f"no tiny model of the type {model_type!r}: in tests/every_wrapper_type.py add what its text decoder, its "
            f"encoders or the wrapper itself need to DECODERS, _ENCODERS or _WRAPPERS, or the reason to NOT_A_DECODER "
            f"({error})"
        )


@pytest.mark.parametrize("model_type", WRAPPER_TYPES)
def test_every_type_has_a_small_config_or_a_reason(model_type: str):
    if model_type in NOT_A_DECODER:
        assert NOT_A_DECODER[model_type].startswith("it ")
        return
    with named(model_type):
        config = small_config(model_type)
    assert config.model_type == model_type
    assert VOCABULARY <= config.get_text_config().vocab_size < VOCABULARY + 10


def test_an_unknown_type_says_what_to_add():
    with pytest.raises(pytest.fail.Exception, match=r"'new_vl'.*NOT_A_DECODER"), named("new_vl"):
        small_config("new_vl")


def test_reasons_are_about_types_of_transformers():
    assert set(NOT_A_DECODER) < set(WRAPPER_TYPES)


@pytest.mark.parametrize("model_type", BUILT)
def test_text_alone_gives_finite_logits(model_type: str):
    with named(model_type):
        model = tiny_wrapper(model_type)
    assert sum(parameter.numel() for parameter in model.parameters()) <= LARGEST
    with torch.no_grad():
        logits = model(input_ids=ids(), use_cache=False).logits
    assert logits.shape[:2] == ids().shape
    assert logits.isfinite().all()
    assert logits.std() > 0.05


@pytest.mark.parametrize(
    ("model_type", "text_type"),
    [
        ("internvl", "gpt_oss"),
        ("internvl", "qwen3"),
        ("llava_next", "granite"),
        ("llava_next", "mistral"),
        ("mistral3", "ministral3"),
        ("paligemma", "gemma2"),
    ],
)
def test_published_wrappers_have_other_text_decoders(model_type: str, text_type: str):
    model = tiny_wrapper(model_type, text_type=text_type)
    assert model.config.text_config.model_type == text_type
    with torch.no_grad():
        assert model(input_ids=ids(), use_cache=False).logits.isfinite().all()


def test_the_wrapper_decides_whether_the_head_is_tied():
    for tied in (False, True):
        model = tiny_wrapper("qwen2_vl", tie_word_embeddings=tied)
        assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied


def test_large_model_is_refused(monkeypatch):
    monkeypatch.setattr(every_wrapper_type, "LARGEST", 10)
    with pytest.raises(ValueError, match=r"the tiny llava has \d+ parameters; make more of its fields small"):
        tiny_wrapper("llava", image_seq_length=4)


def test_no_kind_of_layer_is_lost():
    for model_type in BUILT:
        default, small = CONFIG_MAPPING[model_type]().get_text_config(), small_config(model_type).get_text_config()
        for name in PER_LAYER:
            kinds = [set(map(str, getattr(config, name, None) or ())) for config in (default, small)]
            assert kinds[0] <= kinds[1], (model_type, name)


def test_half_precision_is_what_transformers_loads():
    model = tiny_wrapper("ernie4_5_vl_moe", torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.language_model.layers[1].mlp.text_moe.gate.weight.dtype == torch.float32


def test_each_caller_has_a_model_of_its_own():
    first, second = tiny_wrapper("llava"), tiny_wrapper("llava")
    first.lm_head.weight.data.zero_()
    assert second.lm_head.weight.any()
