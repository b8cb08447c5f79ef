"""Every causal-LM model type of the installed transformers has a tiny model, or a reason why it has none."""

from __future__ import annotations

import pytest
import torch

from tests.every_causal_type import CAUSAL_TYPES, DECODERS, EXTRA, NOT_A_DECODER, VOCABULARY, tiny_causal


def test_every_type_is_known():
    unknown = set(CAUSAL_TYPES) - set(DECODERS) - set(NOT_A_DECODER)
    assert not unknown, (
        f"transformers has new causal-LM types {sorted(unknown)}; add each to DECODERS, with what its tiny config needs "
        "in EXTRA, or to NOT_A_DECODER with the reason, in tests/every_causal_type.py"
    )


def test_no_type_is_in_both_tables():
    assert not set(DECODERS) & set(NOT_A_DECODER)
    assert set(EXTRA) <= set(DECODERS)


@pytest.mark.parametrize("model_type", [name for name in DECODERS if name in CAUSAL_TYPES])
def test_tiny_model_is_finite(model_type: str):
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = tiny_causal(model_type)(input_ids=ids, use_cache=False).logits
    assert logits.shape == (2, 9, VOCABULARY)
    assert logits.isfinite().all()
    assert logits.std() > 0.01
