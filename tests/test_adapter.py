"""An edit as a LoRA adapter: PEFT loads it, with it the model is the edited one, without it the original."""

import json
from dataclasses import replace

import pytest
import torch

import repedit as rp
from repedit.delta import Delta
from repedit.edit import Edit
from repedit.errors import CheckpointError, FingerprintError, NoOpEdit, NotFinite, NotFoldable, TargetExists
from repedit.rewrite import adapter
from repedit.rewrite.adapter import export_adapter, factors
from repedit.sites import Site
from tests.edits import mask, projection
from tests.tiny import ids, tiny


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_needs_a_bias_has_one_in_the_adapter(family, tmp_path):
    lm = tiny(family)
    check_served(lm, projection(lm, "0.mlp.out", center=True), tmp_path / "a", merges=family == "gpt2")
    width = lm.layout.width_of(0, Site.parse("0.mlp.neurons").point)
    few = rp.Diagonal.fill(torch.arange(width) > 2, torch.ones(width))
    check_served(lm, Edit({Site.parse("0.mlp.neurons"): few}, {}), tmp_path / "b", merges=family == "gpt2")


FAMILIES = ("llama", "gpt2", "qwen2", "phi3", "gemma2")
EDITS = {
    "mask": lambda lm: mask(lm, "1.mlp.neurons", share=0.05),
    "projection": lambda lm: projection(lm, "0.mlp.out") | projection(lm, "1.attn.out"),
}


def logits(model):
    with torch.no_grad():
        return model(ids()).logits


def check_served(lm, edit, folder, merges=True):
    from peft import PeftModel

    before, edited = logits(lm.model), logits(rp.apply(edit, lm).model)
    record = export_adapter(edit, lm, folder)
    served = PeftModel.from_pretrained(tiny_again(lm), folder)
    assert (logits(served) - edited).abs().max() < 1e-5 * edited.abs().max()
    with served.disable_adapter():
        assert torch.equal(logits(served), before)
    assert (edited - before).abs().max() > 1e-3 * before.abs().max()
    if not merges:
        return record
    merged = dict(served.merge_and_unload().named_parameters())
    for name, value in rp.apply(edit, lm).model.named_parameters():
        assert (merged[name] - value).abs().max() < 1e-6
    return record


def tiny_again(lm):
    import copy

    return copy.deepcopy(lm.model)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_is_the_edit(family, edit, tmp_path):
    lm = tiny(family)
    record = check_served(lm, EDITS[edit](lm), tmp_path / "adapter")
    assert record.residual < 1e-9 and record.parameters == sum(
        t.numel() for t in rp_tensors(tmp_path / "adapter").values()
    )
    if edit == "projection":
        assert set(record.ranks.values()) == {3}


def rp_tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_a_factor_that_is_lost_is_caught(tmp_path, monkeypatch):
    true = adapter._low_rank_factors

    def short(difference, max_rank):
        found = true(difference, max_rank)
        return found and replace(found, a=found.a[:-1], b=found.b[:, :-1])

    monkeypatch.setattr(adapter, "_low_rank_factors", short)
    lm = tiny("llama")
    with pytest.raises(AssertionError):
        check_served(lm, EDITS["projection"](lm), tmp_path / "adapter")


def test_cut_neurons_are_bitwise_zero_when_merged():
    lm = tiny("llama")
    edit = mask(lm, "1.mlp.neurons", share=0.05)
    gone = ~edit.maps[Site.parse("1.mlp.neurons")].kept
    weight = lm.model.model.layers[1].mlp.down_proj.weight.detach()
    found = factors(rp.apply(edit, lm).model.model.layers[1].mlp.down_proj.weight.detach() - weight, "down")
    assert found.residual == 0 and found.a.shape[0] == int(gone.sum())
    assert not (weight + (found.b @ found.a).float())[:, gone].any()


@pytest.mark.parametrize("rank", [1, 5, 9, 17, 34])
def test_the_rank_is_the_smallest(rank):
    draws = torch.Generator().manual_seed(rank)
    b, a = (torch.randn(*s, generator=draws, dtype=torch.float64) for s in ((60, rank), (rank, 80)))
    found = factors(b @ a, "w")
    assert found.a.shape == (rank, 80) and (found.b @ found.a - b @ a).norm() < 1e-9 * (b @ a).norm()


def test_the_files_say_what_they_are(tmp_path):
    lm = tiny("llama")
    export_adapter(projection(lm, "0.mlp.out"), lm, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {"model.layers.0.mlp.down_proj": 3}
    assert json.loads((tmp_path / "adapter" / "repedit.json").read_text())["structure"] == "adapter"
    with pytest.raises(TargetExists, match="overwrite=True"):
        export_adapter(projection(lm, "0.mlp.out"), lm, tmp_path / "adapter")
    export_adapter(projection(lm, "0.mlp.out", rank=2), lm, tmp_path / "adapter", overwrite=True)
    assert set(json.loads((tmp_path / "adapter" / "repedit.json").read_text())["ranks"].values()) == {2}


def refusals():
    llama, gpt2 = tiny("llama"), tiny("gpt2")
    whole = {
        "model.layers.0.mlp.down_proj.weight": torch.randn(llama.specs["model.layers.0.mlp.down_proj.weight"].shape)
    }
    return [
        (gpt2, projection(gpt2, "0.resid.pre"), {}, NotFoldable, "unties lm_head.weight"),
        (llama, projection(llama, "0.resid.pre"), {"tied": "both"}, NotFoldable, "belongs to no linear module"),
        (
            llama,
            projection(llama, "0.mlp.out"),
            {"max_rank": 2},
            NotFoldable,
            "rank 3, an adapter here may have max_rank=2",
        ),
        (llama, Delta(whole, {}), {"any_model": True}, NotFoldable, "beyond which it is larger than the weight"),
        (llama, projection(llama, "0.mlp.out", rank=0), {}, NoOpEdit, "changes nothing"),
    ]


@pytest.mark.parametrize("case", range(5))
def test_what_is_no_adapter_is_refused(case, tmp_path):
    lm, edit, options, error, match = refusals()[case]
    with pytest.raises(error, match=match):
        export_adapter(edit, lm, tmp_path / "adapter", **options)
    assert not (tmp_path / "adapter").exists()


# Back from an adapter to a delta.


def check_round_trip(lm, edit, folder):
    """The weights with the delta of an adapter are those of the edit that the adapter was made from."""
    export_adapter(edit, lm, folder)
    delta = rp.import_adapter(folder, lm)
    imported = dict(rp.apply(delta, lm).model.named_parameters())
    for name, value in rp.apply(edit, lm).model.named_parameters():
        assert (imported[name] - value).abs().max() < 1e-6, name
    assert delta.provenance["model"] == lm.fingerprint()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("edit", EDITS)
def test_an_adapter_comes_back_as_a_delta(family, edit, tmp_path):
    lm = tiny(family)
    check_round_trip(lm, EDITS[edit](lm), tmp_path / "adapter")


def test_a_wrong_scale_is_caught(tmp_path, monkeypatch):
    lm = tiny("llama")
    monkeypatch.setattr(adapter, "_scale", lambda config, module, rank: 0.5)
    with pytest.raises(AssertionError):
        check_round_trip(lm, EDITS["mask"](lm), tmp_path / "adapter")


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_trained_comes_back_as_peft_merges_it(rslora, tmp_path):
    from peft import LoraConfig, get_peft_model

    lm = tiny("llama")
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], alpha_pattern={"down_proj": 7}, use_rslora=rslora, init_lora_weights=False
    )  # fmt: skip
    trained = get_peft_model(tiny_again(lm), config)
    trained.save_pretrained(tmp_path / "trained")
    imported = dict(rp.apply(rp.import_adapter(tmp_path / "trained", lm), lm).model.named_parameters())
    for name, value in trained.merge_and_unload().named_parameters():
        assert (imported[name] - value).abs().max() < 1e-6, name


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"peft_type": "IA3"}, NotFoldable, "peft_type='IA3', which is no plain LoRA"),
        ({"use_dora": True}, NotFoldable, "use_dora=True, which is no plain LoRA; merge it with PEFT"),
        ({"modules_to_save": ["lm_head"]}, NotFoldable, "modules_to_save="),
        ({"lora_alpha": "much", "alpha_pattern": {}}, CheckpointError, "gives no number as lora_alpha: 'much'"),
    ],
)
def test_an_adapter_that_is_no_plain_lora_is_refused(change, error, match, tmp_path):
    lm = tiny("llama")
    export_adapter(EDITS["mask"](lm), lm, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(error, match=match):
        rp.import_adapter(tmp_path / "a", lm)


def check_served_or_refused(lm, folder, options):
    """An adapter that PEFT made with some options is imported as the difference that PEFT serves, or refused."""
    from peft import LoraConfig, PeftModel, get_peft_model

    trained = get_peft_model(tiny_again(lm), LoraConfig(**({"r": 2, "lora_alpha": 3, "target_modules": ["o_proj", "down_proj"]} | options)))  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for value in trained.parameters():
        if value.requires_grad:
            value.data += 0.1 * torch.randn(value.shape, generator=generator).to(value)
    trained.save_pretrained(folder)
    served = logits(PeftModel.from_pretrained(tiny_again(lm), folder))
    try:
        delta = rp.import_adapter(folder, lm)
    except NotFoldable as error:
        return str(error)
    assert (logits(rp.apply(delta, lm).model) - served).abs().max() < 1e-4 * served.abs().max()
    return ""


TRAINED = {
    "plain": ({}, ""), "gaussian": ({"init_lora_weights": "gaussian"}, ""), "orthogonal": ({"init_lora_weights": "orthogonal"}, ""),
    "patterns": ({"rank_pattern": {"layers.1.mlp.down_proj": 4}, "alpha_pattern": {"^model.layers.0.mlp.down_proj": 9}}, ""),
    "layers": ({"layers_to_transform": [1], "exclude_modules": ["o_proj"]}, ""),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    "alora": ({"alora_invocation_tokens": [5, 6]}, r"alora_invocation_tokens=[5, 6]"),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_an_adapter_is_imported_as_peft_serves_it_or_refused(name, tmp_path):
    options, refused = TRAINED[name]
    reason = check_served_or_refused(tiny("llama"), tmp_path / "a", options)
    assert refused in reason and bool(refused) == bool(reason)


@pytest.mark.parametrize("name", ["pissa", "olora", "alora"])
def test_what_is_refused_would_be_another_model(name, tmp_path, monkeypatch):
    monkeypatch.setattr(adapter, "_check_plain_lora", lambda *given: None)
    with pytest.raises(AssertionError):
        check_served_or_refused(tiny("llama"), tmp_path / "a", TRAINED[name][0])


def damaged(lm, folder, change=lambda tensors: None, **config):
    """An exported adapter with other tensors, or another config."""
    from safetensors.torch import load_file, save_file

    export_adapter(EDITS["projection"](lm), lm, folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    settings = folder / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | config))
    return folder


def test_the_class_of_a_module_says_how_its_weight_is_stored(tmp_path):
    """As in PEFT: the projections of gpt2's attention are square, so that a shape would not tell."""
    lm = tiny("gpt2")
    right, lie = (damaged(lm, tmp_path / str(is_in), fan_in_fan_out=is_in) for is_in in (True, False))
    deltas = [rp.import_adapter(folder, lm).tensors for folder in (right, lie)]
    assert all(torch.equal(value, deltas[1][name]) for name, value in deltas[0].items())


B = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"
TORN = {
    "no A": (lambda t: t.pop(B.replace("_B.", "_A.")), CheckpointError, r"has lora_B.weight and no lora_A.weight beside it; the file is not whole"),
    "no B": (lambda t: t.pop(B), CheckpointError, r"has lora_A.weight and no lora_B.weight beside it; the file is not whole"),
    "nothing": (lambda t: t.clear(), CheckpointError, "holds no matrix of a LoRA"),
    "ranks": (lambda t: t.update({B: t[B][:, :2]}), CheckpointError, "do not fit together"),
    "a row": (lambda t: t.update({B: t[B][:, 0]}), CheckpointError, "do not fit together"),
    "rank 0": (lambda t: t.update({B: t[B][:, :0], B.replace("_B.", "_A."): torch.zeros(0, 3)}), CheckpointError, "do not fit together"),
    "embeddings": (lambda t: t.update({"base_model.model.wte.lora_embedding_A": t[B].clone()}), NotFoldable, "lora_embedding_A is no matrix of a LoRA"),
    "whole numbers": (lambda t: t.update({B: t[B].int()}), NotFoldable, "is no matrix of a LoRA"),
    "not finite": (lambda t: t[B].mul_(float("nan")), NotFinite, "is not finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", TORN)
def test_the_file_of_an_adapter_that_is_not_whole_is_refused(name, tmp_path):
    change, error, match = TORN[name]
    with pytest.raises(error, match=match):
        rp.import_adapter(damaged(tiny("llama"), tmp_path / "a", change), tiny("llama"))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"rank_pattern": {}, "r": 7}, "gives model.layers.0.mlp.down_proj the rank 7, its matrices have rank 3"),
        ({"lora_alpha": True, "alpha_pattern": {}}, "gives no number as lora_alpha: True"),
        ({"alpha_pattern": [1]}, "two objects and two truth values were expected"),
        ({"use_rslora": "no"}, "two objects and two truth values were expected"),
        ({"alpha_pattern": {"(": 2}}, "alpha_pattern of adapter_config.json holds no pattern"),
    ],
)
def test_the_config_of_an_adapter_that_contradicts_its_file_is_refused(config, match, tmp_path):
    with pytest.raises(CheckpointError, match=match):
        rp.import_adapter(damaged(tiny("llama"), tmp_path / "a", **config), tiny("llama"))


def test_an_adapter_of_another_model_is_refused(tmp_path):
    export_adapter(EDITS["mask"](tiny("gpt2")), tiny("gpt2"), tmp_path / "a")
    with pytest.raises(
        FingerprintError, match=r"the model has no such tensor; was the adapter trained on another model"
    ):
        rp.import_adapter(tmp_path / "a", tiny("llama"))


def test_an_imported_delta_belongs_to_the_weights_it_was_imported_for(tmp_path):
    lm, other = tiny("llama"), tiny("llama")
    with torch.no_grad():
        other.model.model.layers[0].mlp.down_proj.weight.add_(1)
    delta = rp.import_adapter(damaged(lm, tmp_path / "a"), lm)
    with pytest.raises(FingerprintError, match="any_model=True"):
        rp.apply(delta, other)
    rp.apply(delta, other, any_model=True)
    assert str(tmp_path) not in json.dumps(dict(delta.provenance))  # deltas are published


def imported_head(folder):
    """(the model that PEFT gives, that of the imported delta) for an adapter of a head that is tied to the embeddings."""
    from peft import LoraConfig, get_peft_model

    lm = tiny("llama", tie_word_embeddings=True)
    config = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    trained = get_peft_model(tiny_again(lm), config)
    trained.save_pretrained(folder, save_embedding_layers=False)
    return trained, rp.apply(rp.import_adapter(folder, lm), lm).model


def test_an_adapter_of_a_tied_head_is_refused(tmp_path):
    with pytest.raises(NotFoldable, match=r"changes lm_head\.weight, which the model ties to another tensor"):
        imported_head(tmp_path / "a")


def test_an_adapter_of_a_tied_head_would_change_the_embeddings_too(tmp_path, monkeypatch):
    monkeypatch.setattr(adapter, "_check_untied", lambda *given: None)
    trained, imported = imported_head(tmp_path / "a")
    assert (logits(trained) - logits(imported)).abs().max() > 0.1 * logits(trained).abs().max()
