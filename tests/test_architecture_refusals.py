"""Models that no row describes are refused when they are wrapped, whatever their config says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model, hooks
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.cohere.modeling_cohere import CohereDecoderLayer

import repedit as rp
from repedit.arch.infer import infer
from repedit.errors import CheckpointError, OffloadedTensors, UnknownArchitecture, UnknownSite
from repedit.hooks import primary, with_primary
from repedit.models import modifications
from repedit.models import subject as subject_module
from repedit.rewrite import export
from tests import laws
from tests.edits import mask
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


def shared_memory(model: Any) -> None:
    """Let the tensors of two layers be different objects in one place of memory."""
    first, second = (layer.mlp.down_proj for layer in model.model.layers)
    second.weight = nn.Parameter(first.weight.data[:])


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


@pytest.mark.parametrize("model_type", KNOWN_AND_INFERRED)
@pytest.mark.parametrize("change", [shared, shared_memory])
def test_layers_that_share_a_writer(model_type: str, change: Any):
    rp.wrap(tiny_causal(model_type))
    model = tiny_causal(model_type)
    change(model)
    message = r"1\.mlp\.down_proj\.weight and model\.layers\.0\.mlp\.down_proj\.weight are one tensor, so that an edit"
    for use in (rp.wrap, rp.check_architecture):
        with pytest.raises(UnknownArchitecture, match=message):
            use(model)


def test_layers_whose_weights_are_halves_of_one_tensor():
    model = tiny_causal("llama")
    first, second = (layer.mlp.down_proj for layer in model.model.layers)
    one = torch.cat([first.weight.data, second.weight.data], 1)
    first.weight, second.weight = (nn.Parameter(half) for half in one.chunk(2, 1))
    laws.hooked_equals_rewritten(rp.wrap(model), mask(rp.wrap(model), "1.mlp.neurons"))


def test_shared_writers_would_be_edited_together(monkeypatch):
    monkeypatch.setattr(subject_module, "check_unshared", lambda *_: None)
    model = tiny("llama").model  # its embeddings are tied, so every name of an edited tensor gets the new one
    shared(model)
    subject = rp.wrap(model)
    with pytest.raises(AssertionError):
        laws.hooked_equals_rewritten(subject, mask(subject, "1.mlp.neurons"))


# --- Methods and hooks of single objects

PLACES = (
    "layers.1",
    "layers.1.self_attn",
    "layers.0.mlp.down_proj",
    "layers.1.self_attn.v_proj",
    "embed_tokens",
    "norm",
)


def doubled(module: nn.Module) -> None:
    """Let one object return twice what its class returns."""
    old = module.forward
    module.forward = lambda *args, **kwargs: with_primary(out := old(*args, **kwargs), 2 * primary(out))


@pytest.mark.parametrize("model_type", KNOWN_AND_INFERRED)
@pytest.mark.parametrize("place", PLACES)
def test_a_method_of_one_object_is_refused(model_type: str, place: str):
    rp.wrap(tiny_causal(model_type))
    model = tiny_causal(model_type)
    doubled(model.model.get_submodule(place))
    with pytest.raises(
        UnknownArchitecture, match=rf"model\.{place}\.forward is not the method of its class .*del model"
    ):
        rp.wrap(model)
    del model.model.get_submodule(place).forward
    rp.wrap(model)


def test_a_replaced_method_would_be_lost_in_files(monkeypatch, tmp_path):
    for module, check in (
        (subject_module, "check_unmodified"),
        (export, "check_unmodified"),
        (export, "check_computed"),
    ):
        monkeypatch.setattr(module, check, lambda *_: None)
    model = tiny("llama").model
    doubled(model.model.layers[0].mlp.down_proj)
    subject = rp.wrap(model)
    laws.hooked_equals_rewritten(subject, mask(subject, "1.mlp.neurons"))
    with pytest.raises(AssertionError):
        laws.rewritten_equals_exported(subject, mask(subject, "1.mlp.neurons"), tmp_path)


def halve_output(_module: nn.Module, _args: Any, output: Any) -> Any:
    return with_primary(output, 0.5 * primary(output))


def halve_input(_module: nn.Module, args: Any) -> Any:
    return (0.5 * args[0], *args[1:])


def halve_in_place(_module: nn.Module, _args: Any, output: Any) -> None:
    primary(output).mul_(0.5)


HOOKS = {
    "output": lambda m: m.register_forward_hook(halve_output),
    "input": lambda m: m.register_forward_pre_hook(halve_input),
    "in place": lambda m: m.register_forward_hook(halve_in_place),
}


@pytest.mark.parametrize("model_type", KNOWN_AND_INFERRED)
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_that_change_the_model_are_refused(model_type: str, name: str):
    rp.wrap(tiny_causal(model_type))
    model = tiny_causal(model_type)
    place = model.model.layers[1].mlp.down_proj
    handle, before = HOOKS[name](place), list(place._forward_hooks) + list(place._forward_pre_hooks)
    message = r"forward hooks change .* at model\.layers\.1\.mlp\.down_proj \(1 modules"
    with pytest.raises(UnknownArchitecture, match=message):
        rp.wrap(model)
    assert list(place._forward_hooks) + list(place._forward_pre_hooks) == before, "the user's hook is gone"
    handle.remove()
    rp.wrap(model)


def test_hooks_that_observe_are_accepted():
    model, seen = tiny_causal("llama"), []
    model.model.layers[1].register_forward_hook(lambda _module, _args, output: seen.append(primary(output).mean()))
    rp.wrap(model)
    assert seen


def test_hooks_taken_for_observers_would_pass(monkeypatch):
    monkeypatch.setattr(modifications, "_hooks_act", lambda *_: False)
    model = tiny_causal("llama")
    HOOKS["output"](model.model.layers[1].mlp.down_proj)
    assert rp.wrap(model)


def test_hooks_of_an_edit_are_accepted():
    subject = tiny("llama")
    with mask(subject, "1.mlp.neurons").hooked(subject):
        rp.wrap(subject.model)


def offloaded(model: Any, folder: Path) -> Any:
    """The model with its second layer on disk, which Accelerate brings when it runs."""
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head"), "cpu")
    return dispatch_model(model, {**places, "model.layers.1": "disk"}, main_device="cpu", offload_dir=folder)


def test_methods_of_accelerate_are_known(tmp_path):
    model = offloaded(tiny_causal("llama"), tmp_path)
    assert "forward" in vars(model.model.layers[1].mlp.down_proj)
    rp.wrap(model)
    kept = tiny_causal("llama")
    hooks.add_hook_to_module(kept.model.layers[1].mlp, hooks.AlignDevicesHook())
    rp.wrap(copy.deepcopy(kept))
    hooks.remove_hook_from_module(kept.model.layers[1].mlp)
    assert "forward" in vars(kept.model.layers[1].mlp), "Accelerate leaves the method of the class on the object"
    rp.wrap(kept)


class Halving(hooks.ModelHook):
    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return 0.5 * output


def under_accelerate(model: Any) -> None:
    doubled(model.model.layers[1].mlp)
    hooks.add_hook_to_module(model.model.layers[1].mlp, hooks.AlignDevicesHook())


def over_accelerate(model: Any) -> None:
    hooks.add_hook_to_module(model.model.layers[1].mlp, hooks.AlignDevicesHook())
    doubled(model.model.layers[1].mlp)


def with_a_hook_of_accelerate(model: Any) -> None:
    hooks.add_hook_to_module(model.model.layers[1].mlp, hooks.SequentialHook(hooks.AlignDevicesHook(), Halving()))


@pytest.mark.parametrize("change", [under_accelerate, over_accelerate, with_a_hook_of_accelerate])
def test_a_method_behind_accelerate_is_refused(change: Any):
    model = tiny_causal("llama")
    change(model)
    with pytest.raises(UnknownArchitecture, match=r"model\.layers\.1\.mlp\.forward is not the method of its class"):
        rp.wrap(model)


def test_a_shared_writer_that_is_offloaded_is_refused():
    model = tiny_causal("llama")
    shared(model)
    model.model.layers[0].mlp.to("meta")
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    with pytest.raises(UnknownArchitecture, match="are one tensor"):
        rp.wrap(model)


# --- Modules of transformers in a place where its config has others


def parallel_block(model: Any) -> None:
    """Replace a block by one of Cohere with the same names, in which attention and MLP read the same stream."""
    config = AutoConfig.for_model(**model.config.to_dict() | {"model_type": "cohere"})
    config._attn_implementation = "eager"
    model.model.layers[1] = CohereDecoderLayer(config, 1).eval()


@pytest.mark.parametrize(
    "taken", [parallel_block, lambda m: setattr(m.model.layers[1], "mlp", nn.Sequential(m.model.layers[1].mlp))]
)
def test_modules_of_transformers_in_another_family(taken: Any):
    rp.wrap(tiny_causal("llama"))
    model = tiny_causal("llama")
    taken(model)
    with pytest.raises(UnknownArchitecture, match=r"1\.resid\.post .*parallel=False|down_proj.weight' .* is missing"):
        rp.wrap(model)


def test_modules_of_another_family_would_pass_without_the_proof(monkeypatch):
    monkeypatch.setattr(subject_module, "other_modules", lambda model: [])
    model = tiny_causal("llama")
    parallel_block(model)
    assert rp.wrap(model)


def test_a_method_of_a_class_that_is_replaced_is_proved(monkeypatch):
    kind = type(rp.wrap(tiny_causal("llama")).model.model.layers[1])
    old = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x, **rest: old(self, x, **rest) + x)
    with pytest.raises(UnknownArchitecture, match=r"1\.resid\.post .*sum of the outputs"):
        rp.wrap(tiny_causal("llama"))


def test_a_method_of_a_class_that_is_replaced_is_inferred_again(monkeypatch):
    before = rp.wrap(tiny_causal("ministral3"))
    kind, old = type(before.model.model.layers[1]), type(before.model.model.layers[1]).forward
    monkeypatch.setattr(kind, "forward", lambda self, x, **rest: old(self, x, **rest) + x)
    assert (before.architecture.block_scale, rp.wrap(tiny_causal("ministral3")).architecture.block_scale) == (
        1.0,
        pytest.approx(2.0),
    )


class Doubling(nn.Linear):
    """A projection that returns twice what its weight says: its row holds, and files of its weight are another model."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Same(nn.Linear):
    """A projection of another class that computes the same."""


@pytest.mark.parametrize("model_type", KNOWN_AND_INFERRED)
def test_modules_that_files_do_not_hold_are_not_exported(model_type: str, tmp_path: Path):
    for kind in (Doubling, Same):
        model = tiny_causal(model_type)
        model.model.layers[1].mlp.down_proj.__class__ = kind
        subject = rp.wrap(model)
        edit = mask(subject, "1.mlp.neurons")
        laws.hooked_equals_rewritten(subject, edit)
        if kind is Same:
            rp.export(edit, subject, tmp_path / "same")
            continue
        with pytest.raises(CheckpointError, match=r"computes something else .*1\.mlp\.down_proj \(Doubling, 1 modules"):
            rp.export(edit, subject, tmp_path / "doubled")


def test_an_accepted_module_of_ones_own_is_proved_once_for_each_model(monkeypatch):
    proofs = []
    monkeypatch.setattr(subject_module, "prove", lambda *_: proofs.append(1))
    model = tiny_causal("llama")
    model.model.layers[1].mlp.down_proj.__class__ = type("Same", (nn.Linear,), {"__module__": __name__})
    for _ in range(2):
        rp.wrap(model)
    rp.wrap(copy.deepcopy(model))
    assert len(proofs) == 2


def test_offloaded_experts():
    model = tiny_causal("qwen2_moe")
    model.model.layers[1].mlp.experts.to("meta")
    with pytest.raises(OffloadedTensors, match=r"2 tensors are not in memory .*experts.* without device_map to infer"):
        rp.wrap(model)


def test_offloaded_experts_of_a_curated_type():
    model = tiny("mixtral").model
    edit = mask(tiny("mixtral"), "1.mlp.neurons")
    model.model.layers[1].mlp.experts.to("meta")
    subject = rp.wrap(model)
    for act in (lambda: rp.apply(edit, subject), lambda: rp.check_architecture(model)):
        with pytest.raises(OffloadedTensors, match=r"2 tensors are not in memory .*layers\.1\.mlp\.experts"):
            act()


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
