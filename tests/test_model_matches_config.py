"""What is loaded and what is written is the model that the config describes."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM

import repedit as rp
from repedit.edit import Edit
from repedit.errors import CheckpointError, NotAModel, PlanMismatch, UnknownArchitecture
from repedit.io.checkpoint import SINGLE, open_shards
from repedit.lower import lower
from repedit.rewrite import export
from repedit.rewrite.checkpoint_architecture import used_specs
from tests.damaged_checkpoints import config
from tests.edits import mask, projection, pruned_layers
from tests.tiny import logits, tiny


def directory(folder, family="llama", **changes):
    """A tiny model on disk."""
    tiny(family, **changes).model.save_pretrained(folder)
    return folder


def with_tensors(folder, **extra):
    """More tensors in the files of a directory, by name with "__" for a point."""
    tensors = load_file(folder / SINGLE) | {name.replace("__", "."): value for name, value in extra.items()}
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def steering(model):
    model.model.layers[1].mlp.down_proj.bias = nn.Parameter(torch.ones(24))


def buffer(model):
    model.model.layers[0].register_buffer("steering", torch.ones(24))


def hidden_buffer(model):
    model.model.layers[0].register_buffer("steering", torch.ones(24), persistent=False)


def module(model):
    model.model.layers[0].adapter = nn.Linear(24, 24)


def wider_head(model):
    model.lm_head = nn.Linear(24, 70, bias=False)
    model.config.tie_word_embeddings = False


def head_bias(model):
    model.lm_head.bias = nn.Parameter(torch.ones(61))


def another_layer(model):
    model.model.layers.append(tiny("llama").model.model.layers[0])


def no_norm(model):
    model.model.norm = nn.Identity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (steering, r"the config lacks \['model\.layers\.1\.mlp\.down_proj\.bias'\] \(1 in all\).*attention_bias, mlp_bias add"),
        (buffer, r"the config lacks \['model\.layers\.0\.steering'\]"),
        (hidden_buffer, r"the config lacks \['model\.layers\.0\.steering'\]"),
        (module, r"the config lacks \['model\.layers\.0\.adapter\.bias', 'model\.layers\.0\.adapter\.weight'\]"),
        (wider_head, r"of another shape are \['lm_head\.weight'\]"),
        (head_bias, r"the config lacks \['lm_head\.bias'\]"),
        (no_norm, r"the model lacks \['model\.norm\.weight'\]"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("from_files", [False, True])
def test_a_model_that_its_config_does_not_describe_is_not_exported(change, message, from_files, tmp_path):
    subject = rp.load(directory(tmp_path / "in")) if from_files else tiny("llama")
    change(subject.model)
    subject = rp.wrap(subject.model) if not from_files else subject
    with pytest.raises(CheckpointError, match=f"is not the one that its config describes.*{message}"):
        rp.export(mask(subject, "1.mlp.neurons"), subject, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def louder(module, _inputs, output):
    return output * 2


def slower_rotation(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def other_norm(model):
    model.model.norm.variance_epsilon = 0.5


def other_config(model):
    model.config.rms_norm_eps = 0.5


def rope_config(model):
    model.config.rope_parameters["rope_theta"] = 5.0


UNWRITTEN = {
    "rotation": slower_rotation, "norm": other_norm, "config": other_config, "rope": rope_config,
    "head hook": lambda m: m.lm_head.register_forward_hook(louder),
    "norm hook": lambda m: m.model.norm.register_forward_hook(louder),
    "rope hook": lambda m: m.model.rotary_emb.register_forward_hook(lambda _m, _i, o: (0.5 * o[0], o[1])),
    "head method": lambda m: setattr(m.lm_head, "forward", lambda x: 2 * nn.Linear.forward(m.lm_head, x)),
    "root method": lambda m: setattr(m, "forward", partial(scaled, m)),
}  # fmt: skip


def scaled(model, **inputs):
    output = type(model).forward(model, **inputs)
    output.logits *= 2
    return output


@pytest.mark.parametrize("change", UNWRITTEN)
@pytest.mark.parametrize("wrapped_first", [False, True])
def test_a_model_that_computes_what_no_file_holds_is_not_exported(change, wrapped_first, tmp_path):
    subject = tiny("llama")
    UNWRITTEN[change](subject.model)
    with pytest.raises((CheckpointError, UnknownArchitecture), match=r"computes|is not the method of its class"):
        subject = subject if wrapped_first else rp.wrap(subject.model)
        rp.export(mask(subject, "1.mlp.neurons"), subject, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["rotation", "norm", "config", "rope"])
def test_its_files_would_be_another_model(change, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "check_computed", lambda subject: None)
    subject = tiny("llama")
    UNWRITTEN[change](subject.model)
    rp.export(Edit({}), subject, tmp_path / "out", allow_identity=True)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (logits(rp.wrap(written)) - logits(subject)).abs().max() > 1e-3


@pytest.mark.parametrize("change", ["head hook", "root method"])
def test_a_hook_that_came_after_loading_is_not_lost_in_files(change, tmp_path):
    subject = rp.load(directory(tmp_path / "in"))
    UNWRITTEN[change](subject.model)
    with pytest.raises(UnknownArchitecture, match=r"hooks change what the model computes|is not the method"):
        rp.export(mask(subject, "1.mlp.neurons"), subject, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_that_was_cast_whole_is_exported(dtype, tmp_path):
    """Its rotary frequencies are rounded as well, which they are not when its files are loaded."""
    subject = rp.wrap(tiny("llama").model.to(dtype))
    rp.export(mask(subject, "1.mlp.neurons"), subject, tmp_path / "out")


def test_a_head_that_is_tied_against_the_config_is_not_exported(tmp_path):
    subject = tiny("llama", tie_word_embeddings=False)
    subject.model.lm_head.weight = subject.model.model.embed_tokens.weight
    with pytest.raises(CheckpointError, match=r"Set model\.config\.tie_word_embeddings = True"):
        rp.export(mask(subject, "1.mlp.neurons"), rp.wrap(subject.model), tmp_path / "out")


def test_a_model_with_another_layer_is_refused_when_wrapped():
    model = tiny("llama").model
    another_layer(model)
    with pytest.raises(
        rp.errors.UnknownArchitecture, match=r"config has 2 layers, the weights hold layers \[0, 1, 2\]"
    ):
        rp.wrap(model)


@pytest.mark.parametrize("resized", [50, 80])
def test_a_resized_vocabulary_is_exported(resized, tmp_path):
    subject = tiny("qwen3")
    subject.model.resize_token_embeddings(resized, mean_resizing=False)
    rp.export(mask(subject, "1.mlp.neurons"), subject, tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).get_input_embeddings().weight.shape[0] == resized


def hidden_biases(folder):
    """A directory with biases that its config denies."""
    config(attention_bias=False)(directory(folder, attention_bias=True))
    return folder


def test_an_edit_that_needs_a_tensor_which_the_config_hides_is_refused(tmp_path, caplog):
    subject = rp.load(hidden_biases(tmp_path / "in"))
    assert "holds tensors that its config does not describe" in caplog.text
    edit = projection(subject, "0.attn.out", center=True)
    for source in (subject, tmp_path / "in"):
        with pytest.raises(
            CheckpointError, match=r"the edit needs .*_proj\.bias \(8 tensors in all\).* bring them back"
        ):
            rp.export(edit, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("site", ["0.attn.out", "0.attn.neurons", "1.mlp.neurons"])
def test_a_tensor_that_no_module_reads_is_streamed_as_it_is(site, tmp_path):
    subject = rp.load(hidden_biases(tmp_path / "in"), attention="eager")
    edit = projection(subject, site) if site.endswith("out") else mask(subject, site)
    rp.export(edit, subject, tmp_path / "out")
    before, after = load_file(tmp_path / "in" / SINGLE), load_file(tmp_path / "out" / SINGLE)
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith("bias"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert torch.equal(logits(rp.wrap(loaded)), logits(rp.apply(edit, subject)))


def test_layers_beyond_the_config_are_refused(tmp_path):
    folder = directory(tmp_path / "in")
    config(num_hidden_layers=1)(folder)
    for act in (rp.load, lambda f: rp.export(mask(tiny("llama"), "0.mlp.neurons"), f, tmp_path / "out")):
        with pytest.raises(
            CheckpointError, match=r"config has 1 layers, the files also hold \['model\.layers\.1\..*\(9 tensors"
        ):
            act(folder)
    assert not (tmp_path / "out").exists()


def test_tensors_that_transformers_says_to_ignore_load_and_travel(tmp_path):
    old = {"transformer__h__0__attn__bias": torch.ones(1, 1, 8, 8), "transformer__h__7__attn__bias": torch.ones(2)}
    folder = with_tensors(directory(tmp_path / "in", "gpt2"), **old)
    subject = rp.load(folder)
    rp.export(mask(subject, "1.mlp.neurons"), subject, tmp_path / "out")
    assert "transformer.h.7.attn.bias" in load_file(tmp_path / "out" / SINGLE)


def test_rotary_buffers_of_old_checkpoints_load_and_travel(tmp_path):
    folder = with_tensors(directory(tmp_path / "in"), model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(3))
    rp.export(mask(rp.load(folder), "1.mlp.neurons"), folder, tmp_path / "out")
    rp.load(tmp_path / "out")


def test_a_plan_that_its_config_does_not_describe_is_refused(tmp_path):
    from dataclasses import replace

    folder = directory(tmp_path / "in")
    edit = projection(rp.load(folder), "0.attn.out", center=True)
    plan = replace(lower(edit, tiny("llama").architecture, used_specs(open_shards(folder))), config={})
    with pytest.raises(PlanMismatch, match=r"not described \['model\.layers\.0\.self_attn\.k_proj\.bias'"):
        rp.export(plan, folder, tmp_path / "out")


def lora(model, module, **options):
    from peft import LoraConfig

    model.add_adapter(LoraConfig(target_modules=[module], r=2, init_lora_weights=False), **options)


def two_adapters(model):
    lora(model, "q_proj", adapter_name="one")
    lora(model, "v_proj", adapter_name="two")


def disabled(model):
    lora(model, "q_proj")
    model.disable_adapters()


def injected(model):
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(target_modules=["up_proj"], r=2), model)


def unloaded(model):
    lora(model, "q_proj")
    for layer in model.model.layers:
        layer.self_attn.q_proj = layer.self_attn.q_proj.get_base_layer()


def parametrized(model):
    nn.utils.parametrize.register_parametrization(model.model.layers[0].self_attn.q_proj, "weight", nn.Identity())


def masked(model):
    prune.l1_unstructured(model.model.layers[0].self_attn.q_proj, "weight", 0.5)


WRAPPED = {
    "adapter": (lambda m: lora(m, "q_proj"), "q_proj holds an adapter of peft.* Merge it first"),
    "two adapters": (two_adapters, "q_proj holds an adapter of peft.* Merge it first"),
    "disabled": (disabled, "q_proj holds an adapter of peft.* Merge it first"),
    "injected": (injected, "up_proj holds an adapter of peft.* Merge it first"),
    "parametrized": (parametrized, r"q_proj is parametrized.*remove_parametrizations\(module"),
    "masked": (masked, r"q_proj is computed by torch\.nn\.utils.* prune\.remove"),
}


@pytest.mark.parametrize(("wrap", "message"), WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("from_files", [False, True])
def test_weights_that_are_computed_from_others_are_not_edited(wrap, message, from_files, tmp_path):
    subject = rp.load(directory(tmp_path / "in")) if from_files else tiny("llama")
    edit = pruned_layers(subject)
    wrap(subject.model)
    for act in (
        lambda: rp.apply(edit, subject),
        lambda: rp.export(edit, subject, tmp_path / "out"),
        lambda: slim(edit, subject),
    ):
        with pytest.raises(NotAModel, match=message):
            act()
    assert not (tmp_path / "out").exists()


def test_a_model_that_transformers_would_save_as_an_adapter_is_not_exported(tmp_path):
    subject = tiny("llama")
    unloaded(subject.model)
    with pytest.raises(NotAModel, match=r"LlamaForCausalLM holds an adapter of peft.* Merge it first"):
        rp.export(mask(subject, "1.mlp.neurons"), subject, tmp_path / "out")


def slim(edit, subject):
    return rp.slimmed(edit, subject, multiple=1)


@pytest.mark.parametrize("wrap", [lambda m: lora(m, "down_proj"), lambda m: lora(m, "o_proj")])
def test_a_model_whose_writers_hold_an_adapter_is_not_wrapped(wrap):
    model = tiny("llama").model
    wrap(model)
    with pytest.raises(NotAModel, match=r"_proj holds an adapter of peft.* Merge it first"):
        rp.wrap(model)


def test_a_model_of_peft_is_merged_first(tmp_path):
    from peft import LoraConfig, PrefixTuningConfig, get_peft_model

    settings = {
        "num_layers": 2,
        "token_dim": 24,
        "num_attention_heads": 4,
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 2,
    }
    for adapter in (
        LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False),
        PrefixTuningConfig(**settings),
    ):
        wrapped = get_peft_model(tiny("llama").model, adapter)
        with pytest.raises(NotAModel, match=r"PeftModel.* holds an adapter of peft.* Merge it first"):
            rp.wrap(wrapped)
    merged = get_peft_model(tiny("llama").model, LoraConfig(target_modules=["q_proj"], r=2)).merge_and_unload()
    subject = rp.wrap(merged)
    rp.export(mask(subject, "1.mlp.neurons"), subject, tmp_path / "out")
