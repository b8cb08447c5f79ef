"""Each law must catch its broken twin; a law that cannot fail proves nothing."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import repedit as rp
from repedit.edit import Edit
from repedit.lower import lower
from repedit.plan import Plan
from repedit.rewrite.apply import apply
from tests import laws
from tests.edits import mask, projection
from tests.tiny import logits, tiny


def without(plan: Plan, wrong) -> Plan:
    """A plan some of whose operations are left out."""
    kept = {name: tuple(op for op in ops if not wrong(name, op)) for name, ops in plan.operations.items()}
    return replace(plan, operations={name: ops for name, ops in kept.items() if ops})


def planned(edit: Edit, subject: rp.Subject) -> Plan:
    return lower(edit, subject.architecture, subject.specs)


def caught(law, *arguments, **keywords) -> None:
    with pytest.raises(AssertionError):
        law(*arguments, **keywords)


def test_a_projection_that_forgets_the_norm_gain_leaks():
    subject = tiny("olmo2")

    def naive(edit, s):
        plan = planned(edit, s)
        bare = {name: tuple(replace(op, gain=None) for op in ops) for name, ops in plan.operations.items()}
        return apply(replace(plan, operations=bare), s)

    caught(laws.subspace_is_gone, subject, projection(subject, "1.mlp.out"), naive)


def test_a_projection_of_the_wrong_side_is_caught():
    subject = tiny("gpt2")

    def wrong(edit, s):
        plan = planned(edit, s)
        flipped = {
            n: tuple(replace(op, view=replace(op.view, transposed=False)) for op in ops)
            for n, ops in plan.operations.items()
        }
        return apply(replace(plan, operations=flipped), s)

    edit = Edit({rp.Site.parse("0.attn.out"): rp.LowRank.projection(torch.randn(24, 2))})
    caught(laws.hooked_equals_rewritten, subject, edit, wrong)


def test_a_skipped_expert_is_caught():
    subject = tiny("mixtral")
    skip = lambda edit, s: apply(without(planned(edit, s), lambda n, op: op.view.expert == 1), s)  # noqa: E731
    caught(laws.hooked_equals_rewritten, subject, projection(subject, "1.mlp.out"), skip)


def test_a_skipped_bias_is_caught():
    subject = tiny("gpt_neox")
    skip = lambda edit, s: apply(without(planned(edit, s), lambda n, op: n.endswith("bias")), s)  # noqa: E731
    caught(laws.hooked_equals_rewritten, subject, projection(subject, "1.mlp.out"), skip)


def test_a_head_left_tied_is_caught():
    subject = tiny("llama")
    tied = lambda edit, s: apply(lower(edit, s.architecture, s.specs, tied="both"), s)  # noqa: E731
    caught(laws.hooked_equals_rewritten, subject, projection(subject, "0.resid.pre"), tied)


def test_a_tie_flag_left_on_in_the_export_is_caught(tmp_path: Path):
    subject = tiny("llama")

    def flagged(edit, s, target):
        rp.export(edit, s, target)
        config = target / "config.json"
        config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))

    caught(laws.rewritten_equals_exported, subject, projection(subject, "0.resid.pre"), tmp_path, flagged)


def test_a_stale_file_is_caught(tmp_path: Path):
    subject = tiny("qwen3")
    stale = lambda edit, s, target: s.model.save_pretrained(target)  # noqa: E731
    caught(laws.rewritten_equals_exported, subject, mask(subject, "1.mlp.neurons"), tmp_path, stale)


def test_an_edit_of_the_original_is_caught():
    subject = tiny("opt")
    inplace = lambda edit, s: apply(edit, s, inplace=True)  # noqa: E731
    caught(laws.original_is_untouched, subject, mask(subject, "1.mlp.neurons"), inplace)


def test_a_copy_of_what_the_edit_does_not_touch_is_caught():
    subject = tiny("opt")
    copied = lambda edit, s: rp.wrap(copy.deepcopy(apply(edit, s).model))  # noqa: E731
    caught(laws.original_is_untouched, subject, mask(subject, "1.mlp.neurons"), copied)


def test_an_edit_that_does_nothing_is_caught():
    subject = tiny("phi")
    nothing = Edit({rp.Site.parse("1.mlp.neurons"): rp.Diagonal.mask(torch.ones(40, dtype=torch.bool))})
    caught(laws.hooked_equals_rewritten, subject, nothing, lambda e, s: apply(e, s, allow_identity=True))


def test_composition_in_the_wrong_order_is_caught():
    subject = tiny("llama", torch.float64)
    first, second = mask(subject, "1.mlp.out", 0.3), projection(subject, "1.mlp.out")
    caught(laws.composition, subject, first, second, lambda a, b: b | a)


def test_a_save_that_loses_the_center_is_caught(tmp_path: Path):
    subject = tiny("gpt2")

    def lossy(edit, path):
        bare = {site: rp.LowRank(m.u, m.v) for site, m in edit.maps.items()}
        Edit(bare, edit.provenance).save(path)

    caught(laws.round_trip, projection(subject, "1.mlp.out", center=True), tmp_path / "e.safetensors", lossy)


def test_a_hook_that_stays_is_caught(monkeypatch):
    subject = tiny("llama")
    monkeypatch.setattr("torch.utils.hooks.RemovableHandle.remove", lambda self: None)
    caught(laws.hooks_are_gone, subject, mask(subject, "1.mlp.neurons"))


def test_hooks_that_compiled_code_passes_over_are_caught():
    subject = tiny("llama")
    subject.model.model.layers[1].compile(backend="eager")

    @contextmanager
    def bare(edit, s):
        handles = [hook.module.register_forward_pre_hook(lambda *_: None) for hook in edit.hooks(s)]
        yield
        for handle in handles:
            handle.remove()

    caught(laws.hooks_act_or_refuse, subject, projection(subject, "1.mlp.out"), lambda: logits(subject), bare)


def test_a_measurement_with_dropout_on_is_caught():
    caught(laws.mode_does_not_matter, tiny("gpt2"), lambda s: logits(s).sum())


def test_a_measurement_that_leaves_the_model_in_another_mode_is_caught():
    def wrong(subject):
        subject.model.eval()
        total = logits(subject).sum()
        subject.model.train()
        return total

    caught(laws.mode_does_not_matter, tiny("gpt2"), wrong)
