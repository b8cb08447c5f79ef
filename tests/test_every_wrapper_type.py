"""Every image-text-to-text type of the installed transformers is built tiny and runs on text, or is refused by name."""

from contextlib import contextmanager

import pytest
import torch

from tests.every_wrapper_type import LARGEST, NOT_A_DECODER, WORDS, WRAPPER_TYPES, small_config, tiny_wrapper
from tests.tiny import ids

BUILT = [model_type for model_type in WRAPPER_TYPES if model_type not in NOT_A_DECODER]


@contextmanager
def named(model_type):
    """A type that cannot be built says what to add."""
    try:
        yield
    except Exception as error:
        pytest.fail(
            f"no tiny model of the type {model_type!r}: add a row for its text decoder, its encoder or itself to "
            f"_DECODERS, _SIDES or _WRAPPERS of tests/every_wrapper_type.py, or the reason to NOT_A_DECODER ({error})"
        )


@pytest.mark.parametrize("model_type", WRAPPER_TYPES)
def test_every_type_is_built_or_named(model_type):
    """Configurations alone are made: this takes milliseconds."""
    if model_type in NOT_A_DECODER:
        assert NOT_A_DECODER[model_type].startswith("it"), "a sentence about the type"
        return
    with named(model_type):
        config = small_config(model_type)
    assert config.model_type == model_type
    assert WORDS <= config.get_text_config().vocab_size < WORDS + 10


def test_the_reasons_name_existing_types():
    assert set(NOT_A_DECODER) < set(WRAPPER_TYPES)


@pytest.mark.parametrize("model_type", BUILT)
def test_text_alone_gives_finite_logits(model_type):
    with named(model_type):
        model = tiny_wrapper(model_type)
    assert sum(parameter.numel() for parameter in model.parameters()) <= LARGEST
    with torch.no_grad():
        logits = model(input_ids=ids(), use_cache=False).logits
    assert logits.shape[:2] == ids().shape
    assert logits.isfinite().all()
    assert logits.std() > 0.05


def test_an_unknown_type_says_what_to_add():
    with pytest.raises(pytest.fail.Exception, match=r"'new_vl'.*NOT_A_DECODER"), named("new_vl"):
        small_config("new_vl")
