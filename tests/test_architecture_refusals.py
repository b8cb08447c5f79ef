"""Models that no row describes are refused when they are wrapped, whatever their config says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repedit as rp
from repedit.arch.infer import infer
from repedit.errors import OffloadedTensors, UnknownArchitecture, UnknownSite
from tests.every_causal_type import tiny_causal
from tests.every_wrapper_type import tiny_wrapper
from tests.family_laws import tiny_of
from tests.tiny import tiny

KNOWN_AND_INFERRED = ("llama", "ministral3")


class WithAdapter(nn.Linear):
    """A projection that adds a product of two small matrices, as an adapter does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.a @ self.b


def with_adapter(model: Any) -> None:
    """Replace one projection by one with an adapter."""
    old = model.model.layers[1].self_attn.o_proj
    new = WithAdapter(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    new.a, new.b = nn.Parameter(torch.randn(old.in_features, 2)), nn.Parameter(torch.randn(2, old.out_features))
    model.model.layers[1].self_attn.o_proj = new


def twice(model: Any) -> None:
    """Replace one block by one that adds its input twice."""
    block = model.model.layers[1]
    old = type(block)
    new = {"forward": lambda self, x, **rest: old.forward(self, x, **rest) + x, "__module__": __name__}
    block.__class__ = type("AddsTwice", (old,), new)


def shared(model: Any) -> None:
    """Let two layers write with one tensor."""
    first, second = (layer.mlp.down_proj for layer in model.model.layers)
    second.weight = first.weight


@pytest.mark.parametrize("model_type", KNOWN_AND_INFERRED)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_adapter, r"does not describe this model at 1\.attn\.neurons .*1\.attn\.out"),
        (twice, r"1\.resid\.post .*sum of the outputs|layers\.1 \(AddsTwice\)"),
    ],
)
def test_other_modules_behind_a_known_name(model_type: str, change: Any, message: str):
    rp.wrap(tiny_causal(model_type))  # that this model passed says nothing about the next
    model = tiny_causal(model_type)
    change(model)
    with pytest.raises(UnknownArchitecture, match=message):
        rp.wrap(model)


def test_layers_that_share_a_writer():
    model = tiny_causal("ministral3")
    shared(model)
    with pytest.raises(UnknownArchitecture, match="are one tensor, so that an edit of one layer edits another"):
        infer(model)


def test_offloaded_experts():
    model = tiny_causal("qwen2_moe")
    model.model.layers[1].mlp.experts.to("meta")
    with pytest.raises(OffloadedTensors, match=r"2 tensors are not in memory .*experts.* without device_map to infer"):
        rp.wrap(model)


def test_two_decoders_in_one_wrapper():
    model = tiny_causal("ministral3")
    second = tiny_causal("ministral3").model
    model.model.second = second
    first = model.model.norm.forward
    model.model.norm.forward = lambda x: first(x) + second(inputs_embeds=x, use_cache=False).last_hidden_state
    with pytest.raises(
        UnknownArchitecture,
        match=r"a row describes one decoder and the model has several: model.layers, model.second.layers",
    ):
        infer(model)


def test_a_head_tied_to_the_embedding_of_the_decoder_in_a_wrapper():
    subjects = [rp.wrap(tiny_wrapper("qwen2_vl", tie_word_embeddings=tied)) for tied in (False, True)]
    assert [subject.architecture.tied for subject in subjects] == [False, True]


def test_sites_of_layers_without_attention():
    subject = tiny_of("granitemoehybrid")
    assert [str(site) for site in subject.select("*.attn.out")] == ["1.attn.out"]
    for selector in ("0.attn.out", "0-1.attn.out"):
        with pytest.raises(UnknownSite, match=r"layers \[0\] of this model have no attn\.out; layers \[1\] have one"):
            subject.select(selector)
    edit = rp.Edit({rp.Site.parse("0.attn.out"): rp.LowRank.projection(torch.randn(24, 2))})
    with pytest.raises(UnknownSite, match=r"layers \[1\] have one"):
        rp.apply(edit, subject)
    with pytest.raises(UnknownSite, match=r"this family has no mixer\.out; its points are"):
        tiny("llama").select("*.mixer.out")
