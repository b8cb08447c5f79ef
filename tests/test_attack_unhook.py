"""Stripping: what only wraps the weights comes off a copy, and the model given keeps it."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import repedit as rp
from repedit.auditing import runner
from repedit.auditing.attacks import prompts, unhook
from repedit.auditing.attacks.unhook import strip, stripped, wrapped
from repedit.auditing.data import audit_data
from repedit.auditing.report import finding_json
from repedit.auditing.runner import Audited
from repedit.auditing.store import FindingStore
from repedit.data import Splits
from repedit.models.subject import subject_of
from tests.saved_models import byte_tokenizer
from tests.tiny import tiny

MANY = rp.data.invented(people=40, relations=1).forget
FACTS = rp.data.invented(people=8, relations=1).forget[:3]
SPLITS = Splits((), FACTS)
IDS = torch.arange(5, 25)[None]


def subject(family: str = "llama"):
    return subject_of(tiny(family, vocab_size=260).model, byte_tokenizer())


def logits(subject):
    with torch.no_grad():
        return subject.model(input_ids=IDS, use_cache=False).logits


def writer(subject, layer: int = 0) -> nn.Module:
    """The module of the MLP's last matrix."""
    name = subject.layout.layers[layer][1].parts[0].out.tensor
    return subject.model.get_submodule(name.rpartition(".")[0])


class Halved(nn.Module):
    def forward(self, w):
        return 0.5 * w


def project(_module, _args, output):
    """Take the first coordinate out: a projection that is no weight."""
    return output * torch.tensor([0.0] + [1.0] * (output.shape[-1] - 1))


def _hooked(model):
    writer(model).register_forward_hook(project)


def _hooked_with_options(model):
    writer(model).register_forward_hook(lambda m, a, k, out: project(m, a, out), with_kwargs=True, always_call=True)


def _prehooked(model):
    writer(model).register_forward_pre_hook(lambda m, args, kwargs: ((args[0] * 0,), kwargs), with_kwargs=True)


def _parametrized(model):
    parametrize.register_parametrization(writer(model), "weight", Halved())
    parametrize.register_parametrization(writer(model), "weight", Halved())
    parametrize.register_parametrization(writer(model, 1), "weight", Halved())


def _pruned(model):
    prune.random_unstructured(writer(model), "weight", 0.5)


def _replaced(model):
    own = writer(model).forward
    writer(model).forward = lambda x: 0.5 * own(x)


def _adapted(model):
    from peft import LoraConfig

    name = model.layout.layers[0][1].parts[0].out.tensor.split(".")[-2]
    model.model.add_adapter(LoraConfig(target_modules=[name], init_lora_weights=False, r=2))


WRAPPERS = {
    "hooks": (_hooked, 1), "hooks with options": (_hooked_with_options, 1), "pre-hooks": (_prehooked, 1),
    "parametrizations": (_parametrized, 3), "masks": (_pruned, 2), "replaced forwards": (_replaced, 1),
    "adapters": (_adapted, 2),
}  # fmt: skip
CASES = [(name, family) for name in WRAPPERS for family in ("llama", "gpt2") if (name, family) != ("adapters", "gpt2")]


def check_strip(name: str, family: str) -> None:
    """The law: bare logits are bitwise those before wrapping; the model given is as wrapped as before."""
    model = subject(family)
    before = logits(model)
    wrap, count = WRAPPERS[name]
    assert not wrapped(model)
    wrap(model)
    after = logits(model)
    assert not torch.equal(after, before) and wrapped(model)
    bare, removed, kept = stripped(model)
    assert torch.equal(logits(bare), before) and torch.equal(logits(model), after)
    assert not kept and sum(removed.values()) == count and not wrapped(bare)
    assert subject_of(bare.model).fingerprint() == subject(family).fingerprint()
    assert not any(m._forward_hooks_with_kwargs or m._forward_hooks_always_called for m in bare.model.modules())
    again, _, _ = stripped(bare)
    assert torch.equal(logits(again), before)


@pytest.mark.parametrize(("name", "family"), CASES)
def test_stripping_gives_back_what_was_there_before(name, family):
    check_strip(name, family)


def _library_removal(name, module, kept):
    for tensor in list(getattr(module, "parametrizations", ())):
        parametrize.remove_parametrizations(module, tensor, leave_parametrized=False)
    return 3


def _in_place(monkeypatch):
    monkeypatch.setattr(unhook, "deep_copy", lambda subject: subject)


BROKEN = {
    "the model itself is stripped": ("hooks", _in_place),
    "hooks stay": ("hooks", lambda m: m.setattr(unhook, "_of_library", lambda f: True)),
    "pre-hooks stay": ("pre-hooks", lambda m: m.setattr(unhook, "_HOOKS", ("_forward_hooks",))),
    "torch removes the property of the shared class": ("parametrizations", lambda m: m.setattr(unhook, "_unparametrize", _library_removal)),
    "the mask stays": ("masks", lambda m: m.setattr(unhook, "_unmask", lambda module: 1)),
    "the forward stays": ("replaced forwards", lambda m: m.setattr(unhook, "_unwrap", lambda module: 1)),
    "the adapters stay": ("adapters", lambda m: m.setattr(unhook, "_bare_layers", lambda model: 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_stripping_is_caught(name, monkeypatch):
    wrapper, sabotage = BROKEN[name]
    sabotage(monkeypatch)
    # Torch removes the property for every model of the class, so that the one that was given has no weight at all.
    error = AttributeError if name.startswith("torch removes") else AssertionError
    with pytest.raises(error, match="no attribute 'weight'" if error is AttributeError else None):
        check_strip(wrapper, "llama")


def test_a_hooked_model_is_asked_bare_and_keeps_its_hook():
    plain = prompts.direct()(subject(), SPLITS)
    model = subject()
    writer(model).register_forward_hook(project)
    hooked, found = prompts.direct()(model, SPLITS), strip()(model, SPLITS)
    assert (found.graded == plain.graded).all() and not (hooked.graded == plain.graded).all()
    assert (
        found.settings == ("prompt",) and found.reason == "removed: 1 hooks" and found.details["removed"]["hooks"] == 1
    )
    assert (prompts.direct()(model, SPLITS).graded == hooked.graded).all()


def test_the_hook_stays_also_when_asking_fails(monkeypatch):
    model = subject()
    _hooked(model)
    before, name = logits(model), model.fingerprint()
    monkeypatch.setattr(unhook, "ask", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        strip()(model, SPLITS)
    assert torch.equal(logits(model), before) and model.fingerprint() == name


def test_where_nothing_is_wrapped_the_finding_is_that_of_direct():
    found, plain = strip()(subject(), SPLITS), prompts.direct()(subject(), SPLITS)
    assert found.reason == "no hooks, no wrappers"
    assert (found.graded == plain.graded).all() and (found.correct == plain.correct).all()
    assert found.settings == plain.settings and set(found.details["removed"].values()) == {0}


def test_hooks_by_which_transformers_records_outputs_are_no_wrappers():
    model = subject()
    model.model(input_ids=IDS, output_hidden_states=True)
    assert any(m._forward_hooks for m in model.model.modules())
    bare, removed, _ = stripped(model)
    assert set(removed.values()) == {0}
    assert len(bare.model(input_ids=IDS, output_hidden_states=True).hidden_states) == 3


def test_a_hook_that_says_it_is_of_a_library_is_removed_all_the_same():
    def own(module, args, output):
        return project(module, args, output)

    own.__module__ = "transformers.utils.output_capturing"
    model = subject()
    before = logits(model)
    writer(model).register_forward_hook(own)
    assert torch.equal(logits(stripped(model)[0]), before)


def test_what_has_no_original_is_kept_and_said():
    model = subject()
    parametrizations.weight_norm(writer(model))
    before = logits(model)
    bare, removed, kept = stripped(model)
    assert (
        not wrapped(model)
        and removed["parametrizations"] == 0
        and len(kept) == 1
        and kept[0].endswith("down_proj.weight")
    )
    assert torch.equal(logits(bare), before)
    assert strip()(model, SPLITS).reason.endswith(f"kept, since nothing lies under them: {kept[0]}")


def test_a_masked_weight_that_still_carries_a_graph_can_be_stripped():
    model = subject()
    before = logits(model)
    _pruned(model)
    assert not writer(model).weight.is_leaf
    assert torch.equal(logits(stripped(model)[0]), before)


def test_an_adapter_merged_into_its_layer_is_taken_out_again():
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = subject()
    before = logits(model)
    _adapted(model)
    for module in model.model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    bare, removed, _ = stripped(model)
    assert not torch.allclose(logits(model), before, atol=0.1) and removed["adapters"] == 2
    torch.testing.assert_close(logits(bare), before, atol=1e-4, rtol=1e-4)


def test_wrappers_are_found_without_a_copy_of_the_model(monkeypatch):
    model = subject()
    monkeypatch.setattr(unhook, "deep_copy", lambda subject: 1 / 0)
    assert not Audited("edited", model).hooked
    _hooked(model)
    assert Audited("edited", model).hooked


def test_peft_is_not_imported_to_find_that_there_are_no_adapters(monkeypatch):
    monkeypatch.delitem(sys.modules, "peft", raising=False)
    stripped(subject())
    assert "peft" not in sys.modules


def counted_audit(lm, monkeypatch):
    """(the findings of `direct` and `strip` in an audit, how often `strip` was made, the facts)."""
    made, attacked = [], runner._attacked
    monkeypatch.setattr(runner, "_attacked", lambda a, *rest: (made.append(a.name), attacked(a, *rest))[1])
    options = {"unrelated": rp.data.prose(), "holdout": None, "folds": 2, "train_fraction": 0.5, "seed": 0}
    model, data = Audited("edited", lm), audit_data(MANY, None, most=None, **options)
    role = runner.Role("edited", model, data, (prompts.direct(), strip()))
    found = runner.run((role,), (0,), FindingStore(None), progress=False)["edited"]
    return found, made.count("strip"), data.whole


def plain_json(finding):
    return finding_json(replace(finding, seconds=0.0))


def test_an_audit_asks_a_model_without_wrappers_once_and_finds_what_stripping_finds(monkeypatch):
    (direct, found), times, splits = counted_audit(subject(), monkeypatch)
    assert times == 0 and plain_json(found) == plain_json(strip()(subject(), splits))
    assert (found.correct == direct.correct).all() and found.reason == "no hooks, no wrappers"


def test_an_audit_strips_a_model_with_wrappers(monkeypatch):
    lm = subject()
    _hooked(lm)
    (direct, found), times, splits = counted_audit(lm, monkeypatch)
    assert times == 1 and (found.graded != direct.graded).any()
    assert plain_json(found) == plain_json(strip()(lm, splits))
