"""A delta is a value: it applies, exports, saves, scales and adds like any edit."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import repedit as rp
from repedit.delta import Delta
from repedit.errors import ArgumentError, CheckpointError, FingerprintError, NoOpEdit, NotFoldable
from repedit.hashing import value_hash
from repedit.lower import lower
from repedit.quantization import update_cosine
from tests import edits, laws
from tests.tiny import FAMILIES, logits, tiny
from tests.tolerances import DTYPES

SMALL = ("llama", "gpt2", "gemma2", "mixtral")


def made(subject, size=0.01, names=None, seed=0):
    """A delta of random differences in some tensors."""
    generator = torch.Generator().manual_seed(seed)
    named = {n: p for n, p in subject.model.named_parameters() if names is None or n in names}
    tensors = {
        n: size * torch.randn(p.shape, generator=generator, dtype=torch.promote_types(p.dtype, torch.float32))
        for n, p in named.items()
    }
    start = {n: value_hash(p) for n, p in named.items()}
    return Delta(tensors, {"method": "test", "model": subject.fingerprint(), "start": start})


def parameters(model):
    """Tensors by name, without what requires a gradient."""
    return {n: p.detach() for n, p in model.named_parameters()}


def export_equals_apply(subject, delta, folder, apply=rp.apply):
    """apply == export == reload, bitwise, and start + delta rounded once."""
    applied = apply(delta, subject)
    rp.export(delta, subject, folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager").eval()
    found, expected = parameters(loaded), parameters(applied.model)
    assert set(found) == set(expected)
    for name, start in parameters(subject.model).items():
        wide = delta.tensors[name].dtype if name in delta.tensors else start.dtype
        value = (start.to(wide) + delta.tensors[name]).to(start.dtype) if name in delta.tensors else start
        assert torch.equal(expected[name], value), f"{name} is not start + delta rounded once"
        assert torch.equal(found[name], value), f"{name} differs on disk"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", SMALL)
def test_apply_equals_export_equals_reload(family, dtype, tmp_path):
    subject = tiny(family, dtype)
    before = {n: p.clone() for n, p in parameters(subject.model).items()}
    export_equals_apply(subject, made(subject), tmp_path / "out")
    assert all(torch.equal(p, before[n]) for n, p in parameters(subject.model).items())


def test_rounding_twice_is_caught(tmp_path):
    subject = tiny("llama", torch.bfloat16)

    def twice(delta, subject):
        half = Delta({n: (0.5 * v).bfloat16().float() for n, v in delta.tensors.items()})
        return rp.apply(half, rp.apply(half, subject))

    with pytest.raises(AssertionError, match="rounded once"):
        export_equals_apply(subject, made(subject), tmp_path / "out", apply=twice)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_a_delta_of_all_tensors(family):
    subject = tiny(family)
    assert not torch.equal(logits(rp.apply(made(subject), subject)), logits(subject))


def test_untouched_tensors_are_shared():
    subject = tiny("llama")
    name = "model.layers.0.mlp.down_proj.weight"
    after = dict(rp.apply(made(subject, names={name}), subject).model.named_parameters())
    for n, p in subject.model.named_parameters():
        assert (after[n] is p) == (n != name)


def test_save_and_load(tmp_path):
    subject = tiny("llama")
    delta = Delta(made(subject).tensors, {"method": "test"}, ({"step": 0, "losses": {"a": 1.5}},))
    delta.save(tmp_path / "d.safetensors")
    again = Delta.load(tmp_path / "d.safetensors")
    assert dict(again.provenance) == dict(delta.provenance) and again.log == delta.log
    assert all(torch.equal(again.tensors[n], v) for n, v in delta.tensors.items())
    with pytest.raises(CheckpointError, match="is not a saved edit"):
        rp.Edit.load(tmp_path / "d.safetensors")


def test_adding_the_negative_changes_nothing():
    subject = tiny("llama", torch.bfloat16)
    delta = made(subject)
    with pytest.raises(NoOpEdit, match="changes nothing"):
        rp.apply(delta + (-delta), subject)


def test_scaling():
    delta = made(tiny("llama"))
    name = next(iter(delta.tensors))
    assert torch.equal((0.5 * delta).tensors[name], 0.5 * delta.tensors[name])
    assert torch.equal((delta * 2).tensors[name], (delta + delta).tensors[name])


def test_a_delta_is_bound_to_its_model():
    subject, other = tiny("llama"), tiny("llama")
    with torch.no_grad():
        other.model.model.layers[1].mlp.down_proj.weight[3, 2] += 1e-3
    delta = made(subject)
    with pytest.raises(FingerprintError, match=r"layers\.1\.mlp\.down_proj\.weight holds other values"):
        rp.apply(delta, other)
    rp.apply(delta, other, any_model=True)
    with pytest.raises(FingerprintError, match="made for another model: its"):
        rp.apply(delta, tiny("llama", hidden_size=32, intermediate_size=56))
    with pytest.raises(FingerprintError, match="no tensor is called"):
        rp.apply(delta, tiny("gpt2"))


def test_deltas_of_two_models_do_not_add():
    a, b = made(tiny("llama")), made(tiny("mistral"))
    with pytest.raises(FingerprintError, match="different models"):
        a + b
    part = Delta(dict(list(a.tensors.items())[:2]), a.provenance)
    with pytest.raises(FingerprintError, match="do not match: "):
        Delta.ties([a, part], [1.0, 1.0])


def test_ties_by_hand():
    first, second = (Delta({"w": torch.tensor(v)}) for v in ([4.0, -3.0, 0.1, 2.0], [2.0, 5.0, 3.0, -0.2]))
    merged = Delta.ties([first, second], [1.0, 0.5], density=0.75)
    # Trimmed: the smallest of four goes. Signs of 4+1, -3+2.5, 1.5, 2: the second entry keeps the first delta alone.
    assert merged.tensors["w"].tolist() == [2.5, -3.0, 1.5, 2.0]
    with pytest.raises(ArgumentError, match="2 deltas, 1 weights"):
        Delta.ties([first, second], [1.0])


def test_an_edit_and_a_delta_compose():
    subject = tiny("llama", torch.float64)
    edit, delta = edits.projection(subject, "1.mlp.out"), made(subject)
    for pair in ((edit, delta), (delta, edit)):
        expected = logits(rp.apply(pair[1], rp.apply(pair[0], subject), any_model=True))
        laws.assert_close(logits(rp.apply(list(pair), subject)), expected, torch.float64)


def test_an_edit_that_would_read_stale_weights_is_refused():
    subject = tiny("gpt2", torch.float64)
    with pytest.raises(NotFoldable, match="apply them one after the other"):
        rp.apply([made(subject), edits.fill(subject, "1.mlp.neurons")], subject)


def test_summary_tells_what_survives_rounding():
    subject = tiny("llama", torch.bfloat16)
    text = made(subject, 1e-5, {"model.layers.0.mlp.down_proj.weight"}).summary(subject)
    assert "changed 1.7%" in text and "4 bit" in text and "tensors are untouched" in text
    assert "made by" in made(subject).summary()


def test_survival_of_gaussian_weights():
    """Reference values: Gaussian 576 x 1536, group 64, |dw|/std .025 and .5: cosines .29 and .96 at 4 bit, .91 at 8 bit."""
    generator = torch.Generator().manual_seed(0)
    old, noise = (torch.randn(576, 1536, generator=generator) for _ in range(2))
    assert update_cosine(old, old + 0.025 * noise, "int4") == pytest.approx(0.29, abs=0.03)
    assert update_cosine(old, old + 0.5 * noise, "int4") == pytest.approx(0.96, abs=0.02)
    assert update_cosine(old, old + 0.025 * noise, "int8") == pytest.approx(0.91, abs=0.02)


def test_dry_run():
    subject = tiny("llama")
    text = lower(made(subject), subject.architecture, subject.specs).summary(subject.specs)
    assert "add: a difference found by training" in text
