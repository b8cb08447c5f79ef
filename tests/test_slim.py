"""Slim equals zeroed: neurons, groups of heads and neurons of experts, cut out in every family that allows it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import repedit as rp
from repedit.arch import families
from repedit.errors import ArgumentError, NoBiasSlot, NotSlimmable, PlanMismatch
from repedit.rewrite.apply import rebuilt
from repedit.rewrite.slim import Cut, slim_plan
from tests import laws
from tests.edits import fill, mask, projection, pruned_groups, pruned_layers
from tests.test_laws import BIASED, ROUTED, every_family
from tests.test_sabotage import caught
from tests.tiny import FAMILIES, logits, tiny

CUT_HEADS = tuple(f for f in FAMILIES if not families()[f].shrink.whole_heads)
WHOLE_HEADS = tuple(f for f in FAMILIES if f not in CUT_HEADS)


def widths(subject: rp.Subject) -> list[int]:
    return [mlp.parts[0].stop for _, mlp in subject.layout.layers]


def kept(edit: rp.Edit, subject: rp.Subject) -> list[int]:
    """Neurons that stay in each layer; of the fullest expert where there are experts."""
    maps = {site.layer: map_.kept for site, map_ in edit.maps.items()}
    parts = [mlp.parts for _, mlp in subject.layout.layers]
    return [max(int(maps[i][p.start : p.stop].sum()) for p in found) for i, found in enumerate(parts)]


@every_family
def test_uniform_widths_equal_zeros(family):
    subject = tiny(family)
    edit = pruned_layers(subject)
    small = laws.slim_equals_zeroed(subject, edit, lambda e, s: rp.slimmed(e, s, multiple=4))
    for routed in {mlp.routed for _, mlp in subject.layout.layers}:
        layers = [i for i, (_, mlp) in enumerate(subject.layout.layers) if mlp.routed is routed]
        largest = max(kept(edit, subject)[i] for i in layers)
        assert {widths(small)[i] for i in layers} == {min(-(-largest // 4) * 4, widths(subject)[layers[0]])}


@every_family
def test_ragged_widths_equal_zeros_and_waste_nothing(family):
    subject = tiny(family)
    edit = pruned_layers(subject)
    small = laws.slim_equals_zeroed(subject, edit, lambda e, s: rp.slimmed(e, s, layout="ragged"))
    assert widths(small) == kept(edit, subject)


@pytest.mark.parametrize("family", CUT_HEADS)
def test_groups_of_heads_are_cut(family):
    subject = tiny(family)
    small = laws.slim_equals_zeroed(subject, pruned_groups(subject) | pruned_layers(subject), rp.slimmed)
    config = small.model.config
    heads = subject.architecture.n_heads // 2
    assert (config.num_attention_heads, config.num_key_value_heads, small.architecture.n_heads) == (heads, 1, heads)
    assert config.head_dim == subject.layout.layers[0][0].head_width


@pytest.mark.parametrize("family", ["llama", "smollm3", *BIASED])
def test_a_fill_value_survives_the_cut(family):
    subject = tiny(family)
    laws.slim_equals_zeroed(subject, fill(subject, "0.mlp.neurons") | fill(subject, "1.mlp.neurons", 1), rp.slimmed)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_fill_value_survives_the_cut_of_heads(family):
    subject = tiny(family)
    edit = pruned_groups(subject)
    values = {site: torch.randn(m.width, generator=torch.Generator().manual_seed(3)) for site, m in edit.maps.items()}
    laws.slim_equals_zeroed(
        subject, rp.Edit({site: rp.Diagonal.fill(m.kept, values[site]) for site, m in edit.maps.items()})
    )


@pytest.mark.parametrize("family", ROUTED)
def test_an_expert_without_neurons_stays_for_the_router(family):
    subject = tiny(family)
    (_, mlp) = subject.layout.layers[1]
    keep = torch.rand(mlp.width, generator=torch.Generator().manual_seed(0)) > 0.6
    keep[mlp.parts[1].start : mlp.parts[1].stop] = False
    edit = rp.Edit({rp.Site.parse("1.mlp.neurons"): rp.Diagonal.mask(keep)})
    layout = "uniform" if family == "qwen3_moe" else "ragged"
    small = laws.slim_equals_zeroed(subject, edit, lambda e, s: rp.slimmed(e, s, layout=layout, multiple=2))
    assert len(small.layout.layers[1][1].parts) == 4


def test_two_groups_of_three_go():
    subject = tiny("mistral", num_attention_heads=6, num_key_value_heads=3)
    assert laws.slim_equals_zeroed(subject, pruned_groups(subject, 2)).architecture.n_heads == 2


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_a_slim_model_generates_what_the_zeroed_one_does(family):
    subject = tiny(family)
    edit = pruned_layers(subject)
    assert torch.equal(laws.generated(rp.slimmed(edit, subject)), laws.generated(rp.apply(edit, subject)))


def test_the_original_and_the_random_numbers_are_untouched():
    subject = tiny("llama")
    before = subject.fingerprint()
    torch.manual_seed(0)
    small = rp.slimmed(pruned_layers(subject), subject)
    assert torch.equal(torch.rand(3), torch.manual_seed(0) and torch.rand(3)) and subject.fingerprint() == before
    mine, theirs = (dict(s.model.named_parameters(remove_duplicate=False)) for s in (small, subject))
    assert mine["lm_head.weight"] is mine["model.embed_tokens.weight"] is theirs["lm_head.weight"]


def test_a_ragged_model_can_be_edited_again():
    subject = tiny("gpt2")
    ragged = rp.slimmed(pruned_layers(subject), subject, layout="ragged")
    laws.hooked_equals_rewritten(ragged, mask(ragged, "1.mlp.neurons") | projection(ragged, "0.mlp.out"))
    again = laws.slim_equals_zeroed(ragged, pruned_layers(ragged), lambda e, s: rp.slimmed(e, s, layout="ragged"))
    assert all(b < a for a, b in zip(widths(ragged), widths(again), strict=True))


def wrong(change):
    """A `slimmed` whose cuts are changed."""

    def slim(edit, subject):
        plan = slim_plan(edit, subject.architecture, subject.specs)
        return rebuilt(replace(plan, resized={n: change(n, cut) for n, cut in plan.resized.items()}), subject)

    return slim


def test_other_columns_than_rows_are_caught():
    subject = tiny("llama")
    shifted = wrong(lambda n, cut: Cut(cut.axis, (cut.keep + 1) % 40) if "down_proj" in n else cut)
    caught(laws.slim_equals_zeroed, subject, pruned_layers(subject), shifted)


def test_fused_rows_taken_for_plain_ones_are_caught():
    subject = tiny("phi3")
    plain = wrong(lambda n, cut: Cut(cut.axis, cut.keep.sort().values % 40) if "gate_up" in n else cut)
    caught(laws.slim_equals_zeroed, subject, pruned_layers(subject), plain)


def test_query_heads_of_another_group_are_caught():
    subject = tiny("qwen2")
    flipped = wrong(lambda n, cut: Cut(cut.axis, cut.keep.max() - cut.keep) if "q_proj" in n else cut)
    caught(laws.slim_equals_zeroed, subject, pruned_groups(subject), flipped)


def test_a_bias_left_long_is_refused():
    subject = tiny("gpt2")
    plan = slim_plan(pruned_layers(subject), subject.architecture, subject.specs)
    short = replace(plan, resized={n: cut for n, cut in plan.resized.items() if not n.endswith("bias")})
    with pytest.raises(PlanMismatch, match=r"2 tensors have other shapes than the config gives .*c_fc\.bias.*\(96,\)"):
        rebuilt(short, subject)


def test_a_plan_that_changes_shapes_is_not_applied():
    subject = tiny("llama")
    plan = slim_plan(pruned_layers(subject), subject.architecture, subject.specs)
    with pytest.raises(ArgumentError, match=r"this plan changes shapes; use repedit\.slimmed or repedit\.sliced"):
        rp.apply(plan, subject)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: projection(s, "1.mlp.out"), r"1\.mlp\.out: only pruned neurons .* structure='keep'"),
        (lambda s: projection(s, "1.mlp.neurons"), r"1\.mlp\.neurons holds a LowRank that is not a mask"),
        (
            lambda s: rp.Edit({rp.Site.parse("1.mlp.neurons"): rp.Diagonal(torch.full((40,), 0.5))}),
            "holds a Diagonal that is not a mask of zeros and ones",
        ),
        (lambda s: mask(s, "1.attn.neurons"), r"1\.attn\.neurons loses part of a group .* unit='kv_group'"),
        (lambda s: mask(s, "1.mlp.neurons", 1.1), r"1\.mlp\.neurons would keep none of its 40 .* set cap_per_layer"),
        (lambda s: mask(s, "1.attn.neurons", 1.1), r"1\.attn\.neurons would keep none of its 2 groups of heads"),
        (
            lambda s: rp.Edit(dict([*pruned_groups(s).maps.items()][:1])),
            r"different numbers of groups of heads \(\[1, 2\]\), .*scope='layer'",
        ),
        (lambda s: mask(s, "1.mlp.neurons"), r"nothing would be cut: .* \[40, 40\] of \[40, 40\]; prune every layer"),
    ],
)
def test_what_cannot_be_cut_is_refused(edit, message):
    subject = tiny("llama")
    with pytest.raises(NotSlimmable, match=message):
        rp.slimmed(edit(subject), subject)


@pytest.mark.parametrize("family", WHOLE_HEADS)
def test_heads_of_these_families_stay(family):
    subject = tiny(family)
    with pytest.raises(NotSlimmable, match=rf"heads of {family} cannot be cut out: .*; use structure='keep'"):
        rp.slimmed(pruned_groups(subject), subject)


def test_a_config_that_refuses_the_heads_is_heard_before_anything_is_cut():
    # 24 is no multiple of 5, so one group of six has to go together with another.
    subject = tiny("llama", num_attention_heads=6, num_key_value_heads=6)
    with pytest.raises(NotSlimmable, match="5 heads would remain, the width is 24; prune another number"):
        rp.slimmed(pruned_groups(subject), subject)
    row = replace(subject.architecture, shrink=replace(subject.architecture.shrink, heads_must_divide_width=False))
    unaware = replace(subject, architecture=row)
    with pytest.raises(NotSlimmable, match=r"the config of llama refuses num_attention_heads=5.*not a multiple"):
        rp.slimmed(pruned_groups(unaware), unaware)


def test_options_and_families_that_do_not_fit_are_refused():
    subject = tiny("mistral")
    edit = pruned_layers(subject)
    with pytest.raises(ArgumentError, match="layout='even', multiple=8: layout is 'uniform' or 'ragged'"):
        rp.slimmed(edit, subject, layout="even")
    with pytest.raises(ArgumentError, match="multiple=0: layout is 'uniform' or 'ragged', multiple at least 1"):
        rp.slimmed(edit, subject, multiple=0)
    with pytest.raises(NoBiasSlot, match="mistral has no bias"):
        rp.slimmed(fill(subject, "1.mlp.neurons"), subject, layout="ragged")
    bare = replace(subject, architecture=replace(subject.architecture, shrink=None))
    with pytest.raises(NotSlimmable, match="the row of mistral does not say what changes with its widths"):
        rp.slimmed(edit, bare)
    ragged = rp.slimmed(edit, subject, layout="ragged")
    with pytest.raises(
        NotSlimmable, match=r"hold \d+ to \d+ neurons and a uniform width would be \d+; use layout='ragged'"
    ):
        rp.slimmed(pruned_groups(ragged), ragged)


def test_logits_of_a_slim_model_are_bitwise_those_of_its_own_zeros():
    """Cut neurons change no sum where the kernel adds in order; the law's tolerance is for those that do not."""
    subject = tiny("llama", torch.float64)
    edit = pruned_layers(subject)
    difference = logits(rp.slimmed(edit, subject)) - logits(rp.apply(edit, subject))
    assert float(difference.abs().max()) < 1e-12
