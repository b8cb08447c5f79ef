"""Edits in the weights of a model in memory: what is kept, what is refused, what fine-tuning can bring back."""

import copy

import pytest
import torch

import repedit as rp
from repedit.edit import Edit
from repedit.errors import (
    ArgumentError,
    FingerprintError,
    NoBiasSlot,
    NoOpEdit,
    NotFoldable,
    NotFound,
    OffloadedTensors,
    PlanMismatch,
    ShapeError,
    UnknownSite,
)
from repedit.io.checkpoint import open_shards
from repedit.lower import lower
from repedit.models.subject import Subject
from repedit.rewrite import apply
from repedit.rewrite.checkpoint_architecture import used_specs
from tests import laws
from tests.edits import fill, mask, projection
from tests.tiny import ids, logits, tiny


def one(site, map_):
    """An edit of one site."""
    return Edit({rp.Site.parse(site): map_})


def test_inplace_edits_the_model_itself():
    subject, model = tiny("llama"), tiny("llama").model
    edit = mask(subject, "1.mlp.neurons") | projection(subject, "0.resid.pre")
    edited = rp.apply(edit, subject, inplace=True)
    assert edited.model is subject.model and edited.source is None
    assert torch.equal(logits(subject), logits(rp.apply(edit, rp.wrap(model))))


def test_an_identity_edit_is_refused_unless_allowed():
    subject = tiny("llama")
    with pytest.raises(NoOpEdit, match=r"changes nothing: 1 tensors came out equal .*allow_identity=True"):
        rp.apply(mask(subject, "1.mlp.neurons", share=0.0), subject)
    same = rp.apply(mask(subject, "1.mlp.neurons", share=0.0), subject, allow_identity=True)
    assert torch.equal(logits(same), logits(subject))


def test_tensors_that_are_not_in_memory_are_refused():
    subject = tiny("llama")
    edit, model = mask(subject, "1.mlp.neurons"), copy.deepcopy(subject.model).to("meta")
    with pytest.raises(
        OffloadedTensors, match=r"21 tensors are not in memory \(model\.embed.*export\(edit, source=dir"
    ):
        rp.apply(edit, rp.wrap(model))


@pytest.mark.parametrize("site", ["0.resid.mid", "0.resid.post", "1.resid.pre", "1.resid.mid", "1.resid.post"])
def test_the_middle_of_the_stream_cannot_be_folded(site):
    subject = tiny("llama")
    with pytest.raises(NotFoldable, match=rf"{site} is a residual .*\({site[0]}\.attn\.out, .*edit\.hooked\(subject\)"):
        rp.apply(projection(subject, site), subject)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "mixtral"])
@pytest.mark.parametrize("site", ["1.mlp.neurons", "1.attn.neurons"])
def test_a_fill_needs_a_bias(family, site):
    subject = tiny(family)
    with pytest.raises(NoBiasSlot, match=rf"{site}: {family} has no bias at .* fill value .*edit\.hooked\(subject\)"):
        rp.apply(fill(subject, site), subject)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "mixtral"])
def test_a_center_needs_a_bias(family):
    subject = tiny(family)
    with pytest.raises(
        NoBiasSlot, match=r"1\.mlp\.out: .*(has no bias at|outputs of) .*offset \(fit without a center, affine=False\)"
    ):
        rp.apply(projection(subject, "1.mlp.out", center=True), subject)


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_a_center_cannot_pass_a_post_norm(family):
    subject = tiny(family)
    with pytest.raises(
        NotFoldable, match=r"1\.mlp\.out follows the post-norm .*post_feedforward_layernorm.*affine=False"
    ):
        rp.apply(projection(subject, "1.mlp.out", center=True), subject)


def test_a_map_of_another_width_is_refused():
    edit = one("1.mlp.out", rp.LowRank.projection(torch.eye(25, 2)))
    for use in (rp.apply, lambda e, s: e.hooks(s)):
        with pytest.raises(
            ShapeError, match=r"1\.mlp\.out has width 25, the site has width 24; was the edit fitted on"
        ):
            use(edit, tiny("llama"))


def test_a_layer_that_does_not_exist_is_refused():
    with pytest.raises(UnknownSite, match=r"layers are 0\.\.1"):
        rp.apply(one("2.mlp.out", rp.LowRank.projection(torch.eye(24, 2))), tiny("llama"))


def test_a_map_that_mixes_experts_is_refused():
    subject = tiny("mixtral")
    with pytest.raises(
        NotFoldable, match=r"1\.mlp\.neurons holds the neurons of several projections or experts.*or edit 1\.mlp\.out"
    ):
        rp.apply(projection(subject, "1.mlp.neurons"), subject)


@pytest.mark.parametrize("option", [{"tied": "no"}, {"sides": "inputs"}])
def test_an_unknown_option_is_refused(option):
    plain = lower.__wrapped__ if hasattr(lower, "__wrapped__") else lower  # beneath the type check of the tests
    with pytest.raises(ArgumentError, match="tied is 'untie' or 'both', sides is 'all' or 'output'"):
        plain(mask(tiny("llama"), "1.mlp.neurons"), tiny("llama").architecture, tiny("llama").specs, **option)


def test_a_plan_for_files_is_not_for_a_model(tmp_path):
    subject = tiny("mixtral")
    subject.model.save_pretrained(tmp_path)
    plan = lower(mask(subject, "1.mlp.neurons"), subject.architecture, used_specs(open_shards(tmp_path)))
    with pytest.raises(PlanMismatch, match="names tensors this disk store does not hold"):
        rp.apply(plan, subject)


def test_a_tensor_that_was_skipped_is_found_out(monkeypatch):
    subject = tiny("llama")
    monkeypatch.setattr(apply, "_set_parameter", lambda model, name, value, before: None)
    with pytest.raises(PlanMismatch, match=r"planned but untouched: \['model\.layers\.1\.mlp\.down_proj"):
        rp.apply(mask(subject, "1.mlp.neurons"), subject)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_requires_grad_and_training_are_kept(dtype):
    subject = tiny("llama", dtype)
    subject.model.train().requires_grad_(False).model.layers[1].requires_grad_(True)
    edited = rp.apply(fill(subject, "0.mlp.neurons") | mask(subject, "1.attn.neurons"), subject).model
    assert edited.training and {p.dtype for p in edited.parameters()} == {dtype}
    assert {n for n, p in edited.named_parameters() if p.requires_grad} == {
        n for n, p in edited.named_parameters() if ".layers.1." in n and not n.endswith(("mlp.bias",))
    }


def test_ties_survive_an_edit_elsewhere():
    model = rp.apply(mask(tiny("llama"), "1.mlp.neurons"), tiny("llama")).model
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings


def test_an_edit_of_the_embedding_unties_the_head_and_keeps_it():
    subject = tiny("llama")
    edited = rp.apply(projection(subject, "0.resid.pre"), subject)
    assert torch.equal(edited.model.lm_head.weight, subject.model.lm_head.weight)
    assert edited.model.lm_head.weight is not edited.model.model.embed_tokens.weight
    assert not edited.model.config.tie_word_embeddings and not edited.architecture.tied


def test_tied_both_edits_the_head_too():
    subject = tiny("llama")
    edited = rp.apply(projection(subject, "0.resid.pre"), subject, tied="both").model
    assert edited.lm_head.weight is edited.model.embed_tokens.weight and edited.config.tie_word_embeddings
    assert not torch.equal(edited.lm_head.weight, subject.model.lm_head.weight)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox", "mixtral"])
def test_pruned_neurons_stay_dead_under_fine_tuning(family):
    subject = tiny(family)
    # The same three dimensions of every head: one that another head of its group still reads would come back.
    heads = one("0.attn.neurons", rp.Diagonal.mask(torch.arange(24) % 6 > 2))
    edit = mask(subject, "1.mlp.neurons") | heads
    assert revived(rp.apply(edit, subject), edit) == 0.0
    assert revived(rp.apply(edit, subject, sides="output"), edit) > 1e-3  # the control: one side alone comes back


def test_a_dimension_that_another_head_still_reads_comes_back():
    edit = one("0.attn.neurons", rp.Diagonal.mask(torch.arange(24) != 2))
    assert revived(rp.apply(edit, tiny("llama")), edit) > 1e-3


def revived(edited, edit):
    """The largest weight that a pruned neuron writes with, after twenty steps of AdamW."""
    optimizer = torch.optim.AdamW(edited.model.parameters(), lr=1e-2, weight_decay=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        edited.model(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
    return max(pruned(edited, site, ~map_.kept) for site, map_ in edit.maps.items())


def pruned(edited: Subject, site, dead):
    """The largest weight in the columns of dead neurons."""
    parameters = dict(edited.model.named_parameters())
    parts = edited.layout.branch(site.layer, site.point).parts
    columns = [p.out.read(parameters[p.out.tensor])[:, dead[p.start : p.stop]] for p in parts]
    return max(float(c.detach().abs().max()) for c in columns if c.numel())


def test_a_summary_lists_what_will_change():
    subject = tiny("llama")
    plan = lower(
        projection(subject, "0.resid.pre") | fill(subject, "1.mlp.neurons"), subject.architecture, subject.specs
    )
    text = plan.summary(subject.specs)
    assert "0.resid.pre: LowRank of width 24, removes rank 3; exact" in text and "lm_head.weight: untied" in text
    assert "config: mlp_bias = true" in text and f"{len(plan.touched)} tensors touched" in text


def test_diff_lists_the_touched_tensors_and_their_rank(tmp_path):
    subject = tiny("llama")
    edit = mask(subject, "0.attn.neurons") | projection(subject, "1.mlp.out", rank=3)
    touched = {d.tensor: d for d in rp.diff(subject, rp.apply(edit, subject))}
    assert touched.keys() == lower(edit, subject.architecture, subject.specs).touched
    assert touched["model.layers.1.mlp.down_proj.weight"].rank == 3
    dead = int((~edit.maps[rp.Site.parse("0.attn.neurons")].kept).sum())
    assert (touched["model.layers.0.self_attn.o_proj.weight"].columns, dead) == (dead, dead)


def test_diff_reads_directories(source, tmp_path):
    edit = mask(tiny("llama"), "1.mlp.neurons")
    rp.export(edit, source, tmp_path / "out")
    assert {d.tensor for d in rp.diff(source, tmp_path / "out")} == {
        d.tensor for d in rp.diff(tiny("llama"), rp.apply(edit, tiny("llama")))
    }
    assert rp.diff(source, source) == []


def test_diff_refuses_another_model():
    with pytest.raises(FingerprintError, match=r"of different models: .* tensors are missing"):
        rp.diff(tiny("llama"), tiny("gpt2"))


def test_diff_says_what_to_do_instead(source, tmp_path):
    edit = mask(tiny("llama"), "1.mlp.neurons")
    edit.save(tmp_path / "edit.safetensors")
    with pytest.raises(
        NotFound, match=r"edit\.safetensors is a saved edit and no model; .*: repedit apply .*edit\.safetensors MODEL"
    ):
        rp.diff(source, tmp_path / "edit.safetensors")
    with pytest.raises(
        NotFound, match=r"owner/model is not a directory; .*: repedit\.load\('owner/model'\)\.save\(directory\)"
    ):
        rp.diff(source, "owner/model")
    small = rp.slimmed(edit, tiny("llama"), layout="ragged", multiple=1)
    with pytest.raises(
        FingerprintError, match=r"tensors are missing, .* another shape .* made smaller .* repedit\.compare"
    ):
        rp.diff(tiny("llama"), small)


def test_an_edit_of_every_layer_equals_its_hooks():
    subject = tiny("llama")
    edit = mask(subject, "0.mlp.neurons") | mask(subject, "1.attn.neurons") | projection(subject, "0.attn.out")
    laws.hooked_equals_rewritten(subject, edit | fill(subject, "1.mlp.neurons") | projection(subject, "0.resid.pre"))
