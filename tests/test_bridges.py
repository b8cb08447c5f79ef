"""Law: a model seen through TransformerLens or nnsight is the same model, down to the bit, and nobody changes it on the way."""

from __future__ import annotations

import builtins
import copy

import pytest
import torch

import repedit as rp
from repedit import bridges
from repedit.arch.hooks import hooks_at
from repedit.errors import ArgumentError, MissingDependency, NotAModel, UnknownArchitecture, UnknownSite
from repedit.hooks import installed
from tests.edits import fill, mask, projection
from tests.every_causal_type import tiny_causal
from tests.every_wrapper_type import tiny_wrapper
from tests.tiny import ids, logits, tiny
from tests.tolerances import close

pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES = ("llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "olmo2", "phi3", "mixtral", "opt")
SITES = ("1.attn.neurons", "0.attn.out", "1.mlp.neurons", "1.mlp.out", "1.resid.pre", "0.resid.post")


def seen(lens, edit, subject):
    with torch.no_grad():
        return lens.run_with_hooks(ids(), fwd_hooks=rp.lens_hooks(edit, subject))


def states(model):
    return {
        "keys": list(model.state_dict()),
        "bytes": {n: p.data_ptr() for n, p in model.named_parameters()},
        "values": {n: p.detach().clone() for n, p in model.named_parameters()},
        "grads": {n: p.requires_grad for n, p in model.named_parameters()},
        "attention": model.config._attn_implementation,
        "training": model.training,
    }


def check_unchanged(before, after):
    old, new = before.pop("values"), after.pop("values")
    assert before == after
    assert all(torch.equal(value, new[name]) for name, value in old.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bridge_is_the_model_and_back(family):
    subject = tiny(family)
    before = states(subject.model)
    lens = rp.to_lens(subject)
    check_unchanged(before, states(subject.model))
    with torch.no_grad():
        first = lens(ids())
    close(first, logits(subject), "model, float32")
    again = rp.wrap(lens)
    assert torch.equal(logits(again), logits(subject)) and again.architecture == subject.architecture
    assert again.fingerprint() == subject.fingerprint()
    with torch.no_grad():
        assert torch.equal(lens(ids()), first)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", SITES)
def test_an_edit_is_the_same_edit_in_a_run_of_transformerlens(family, site):
    subject = tiny(family)
    if subject.architecture.n_experts and site.endswith("mlp.neurons"):
        pytest.skip("the neurons of experts are refused below")
    make = mask if site.endswith("neurons") else projection
    edit, lens = make(subject, site), rp.to_lens(subject)
    with edit.hooked(subject):
        expected = logits(subject)
    close(seen(lens, edit, subject), expected, "model, float32")
    assert (expected - logits(subject)).abs().max() > 1e-3


def test_an_edit_in_place_is_seen_everywhere():
    subject = tiny("llama")
    lens, nn = rp.to_lens(subject), rp.to_nnsight(subject)
    rp.apply(mask(subject, "1.mlp.neurons"), subject, inplace=True)
    with torch.no_grad():
        assert torch.equal(lens(ids()), logits(subject))
        with nn.trace(ids()):
            found = nn.lm_head.output.save()
    assert torch.equal(found, logits(subject)) and not torch.equal(found, logits(tiny("llama")))


def test_a_bias_that_is_added_in_place_is_seen_too():
    subject = tiny("llama")
    lens, edit = rp.to_lens(subject), fill(subject, "1.mlp.neurons")
    expected = logits(rp.apply(edit, subject))
    rp.apply(edit, subject, inplace=True)
    with torch.no_grad():
        assert torch.equal(lens(ids()), expected)


def test_views_of_others_do_not_follow():
    subject = tiny("llama")
    lens = rp.to_lens(subject)
    other = rp.apply(mask(subject, "0.mlp.neurons"), subject)
    rp.apply(mask(subject, "1.mlp.neurons"), other, inplace=True)
    with torch.no_grad():
        assert torch.equal(lens(ids()), logits(subject)) and torch.equal(logits(subject), logits(tiny("llama")))


def test_experts_are_copied_and_said_to_be(recwarn):
    subject = tiny("mixtral")
    with pytest.warns(UserWarning, match="mixtral has experts: the bridge holds a copy of the weights"):
        lens = rp.to_lens(subject)
    held = {p.data_ptr() for p in lens.original_model.parameters()}
    assert not held & {p.data_ptr() for p in subject.model.parameters()}


def captured(subject, sites, run=None):
    """The tensors at some sites of one forward pass."""
    found = {}

    def keep(site):
        def visit(x, _at, _tokens):
            found[site] = x.detach().clone()

        return visit

    hooks = [h for s in sites for h in hooks_at(subject.model, subject.layout, s, keep(s), replaces=False)]
    with installed(subject.model, hooks):
        logits(subject, run)
    return found


def check_captures(subject, tokens, layer):
    sites = tuple(
        rp.Site.parse(f"{layer}.{p}") for p in ("attn.neurons", "attn.out", "mlp.neurons", "mlp.out", "resid.post")
    )
    mine, names = captured(subject, sites, tokens), [site.hook_name for site in sites]
    with torch.no_grad():
        _, cache = rp.to_lens(subject).run_with_cache(tokens, names_filter=lambda name: name in names)
    nn = rp.to_nnsight(subject)
    with torch.no_grad(), nn.trace(tokens):
        heads = nn.model.layers[layer].self_attn.o_proj.input.save()
        attention = nn.model.layers[layer].self_attn.output[0].save()
        neurons = nn.model.layers[layer].mlp.down_proj.input.save()
        mlp = nn.model.layers[layer].mlp.output.save()
        stream = nn.model.layers[layer].output.save()
    theirs = (heads, attention, neurons, mlp, stream)
    for site, other in zip(sites, theirs, strict=True):
        lens = cache[site.hook_name].reshape(mine[site].shape)
        assert torch.equal(mine[site], lens) and torch.equal(mine[site], other), site


def test_captures_agree_to_the_bit():
    check_captures(tiny("llama"), ids(), 1)


@pytest.mark.slow
@pytest.mark.model
def test_captures_agree_to_the_bit_on_smollm2():
    subject = rp.load("smollm2-135m", attention="eager")
    before = states(subject.model)
    side = subject.tokenizer.padding_side
    check_captures(subject, torch.arange(40, 72)[None], 14)
    check_unchanged(before, states(subject.model))
    assert subject.tokenizer.padding_side == side


def test_bridging_without_a_clone_would_be_caught(monkeypatch):
    monkeypatch.setattr(bridges, "shared_clone", lambda model: model)
    subject = tiny("llama")
    before = states(subject.model)
    rp.to_lens(subject)
    with pytest.raises(AssertionError):
        check_unchanged(before, states(subject.model))


def test_nnsight_holds_the_very_model():
    subject = tiny("llama")
    before, nn = states(subject.model), rp.to_nnsight(subject)
    check_unchanged(before, states(subject.model))
    assert rp.wrap(nn).model is subject.model and rp.wrap(nn).tokenizer is None


def test_a_bridge_that_computes_something_else_is_refused():
    with pytest.raises(
        UnknownArchitecture, match=r"bridge of stablelm gives other logits than the model \(relative error"
    ):
        rp.to_lens(tiny("stablelm"))


def test_what_transformerlens_cannot_say_is_refused():
    subject = tiny("llama")
    with pytest.raises(UnknownSite, match=r"1\.resid\.mid: a change at blocks\.1\.hook_resid_mid .*1\.attn\.out"):
        rp.lens_hooks(projection(subject, "1.resid.mid"), subject)
    experts = tiny("mixtral")
    with pytest.raises(UnknownSite, match=r"no neurons of experts, and blocks\.1\.mlp\.hook_post .*1\.mlp\.out"):
        rp.lens_hooks(mask(experts, "1.mlp.neurons"), experts)


def test_the_middle_of_the_stream_would_be_wrong_there():
    subject = tiny("llama")
    edit, lens = projection(subject, "1.resid.mid"), rp.to_lens(subject)
    hooks = [(site.hook_name, bridges._lens_hook(map_)) for site, map_ in edit.maps.items()]
    with edit.hooked(subject):
        expected = logits(subject)
    with torch.no_grad():
        assert (lens.run_with_hooks(ids(), fwd_hooks=hooks) - expected).abs().max() > 0.1


def test_what_is_no_model_is_refused():
    with pytest.raises(NotAModel, match="Linear is not a transformers model"):
        rp.wrap(torch.nn.Linear(2, 2))
    lens = rp.to_lens(tiny("llama"))
    del lens.original_model.lm_head
    with pytest.raises(NotAModel, match=r"the bridge holds no tensor for \['lm_head.*pass the transformers model"):
        rp.wrap(lens)


def test_a_model_that_transformer_lens_does_not_know_is_refused():
    with pytest.raises(UnknownArchitecture, match="TransformerLens cannot bridge biogpt"):
        rp.to_lens(rp.wrap(tiny_causal("biogpt")))


def test_nothing_is_installed_for_a_multimodal_model(monkeypatch):
    """TransformerLens would run pip in the environment of the user."""
    commands = []
    monkeypatch.setattr("subprocess.check_call", lambda command: commands.append(command))
    monkeypatch.setattr(bridges, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="would run pip to install torchvision for the images of llava"):
        rp.to_lens(rp.wrap(tiny_wrapper("llava")))
    assert commands == []


@pytest.mark.parametrize(("view", "package"), [(rp.to_lens, "transformer_lens"), (rp.to_nnsight, "nnsight")])
def test_absent_packages_are_named(view, package, monkeypatch):
    plain = builtins.__import__

    def absent(name, *args, **options):
        if name.partition(".")[0] == package:
            raise ImportError(f"No module named {name!r}")
        return plain(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ArgumentError, match=rf"{package} is not installed .*pip install {package.replace('_', '-')}"):
        view(tiny("llama"))


def test_a_fill_keeps_its_values_in_transformerlens():
    subject = tiny("llama")
    edit = fill(subject, "0.mlp.neurons")
    with edit.hooked(subject):
        expected = logits(subject)
    assert torch.equal(seen(rp.to_lens(subject), edit, subject), expected)


def test_a_copy_of_the_subject_is_no_bridge():
    subject = tiny("llama")
    assert rp.wrap(subject) is subject and rp.wrap(copy.copy(subject.model)).tokenizer is None
