"""Rows of the family table: each is proved on a forward pass, and each wrong field is found out."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import repedit as rp
from repedit.arch import (
    BranchRow,
    Experts,
    Reader,
    TensorSpec,
    attention,
    check,
    families,
    hooks_at,
    match_layout,
    mlp,
    register,
    resolve,
    spec,
)
from repedit.edit import Edit
from repedit.errors import UnknownArchitecture, UnknownSite
from repedit.hooks import installed
from repedit.models.subject import subject_of
from tests import family_laws as laws_of_families
from tests import laws
from tests.edits import mask
from tests.tiny import FAMILIES, ids, logits, tiny
from tests.tolerances import close, within

ROUTED = ("mixtral", "olmoe", "qwen3_moe")
GATE = Reader("mlp.gate_proj")


@pytest.fixture
def table(monkeypatch):
    """A copy of the table, so that a test may register rows."""
    monkeypatch.setattr(spec, "_ROWS", dict(families()))
    return families()


@pytest.mark.numeric
@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_is_proved(family):
    report = rp.check_architecture(tiny(family).model)
    assert report.passed and report.model_type == family
    assert [str(p.site) for p in report.proofs if p.site.layer == 1] == [f"1.{point}" for point in PROVED]
    within(max(p.error for p in report.proofs), "model, float32")


PROVED = ("attn.neurons", "attn.out", "mlp.neurons", "mlp.out", "resid.post")


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma2"])
def test_half_types_are_proved_in_float32_and_left_as_they_were(family):
    model = tiny(family, torch.bfloat16).model
    before = {name: p.clone() for name, p in model.named_parameters()}
    within(max(p.error for p in rp.check_architecture(model).proofs), "model, float32")
    assert all(torch.equal(p, before[name]) and p.dtype == torch.bfloat16 for name, p in model.named_parameters())


def pruned(family, share):
    """A tiny model of which a share of the neurons of every MLP and of the heads of every attention are zero."""
    subject = tiny(family)
    for layer in range(2):
        for point in ("attn", "mlp"):
            width = subject.layout.width_of(layer, rp.Point(f"{point}.neurons"))
            keep = torch.arange(width) >= share * width
            subject = rp.apply(Edit({rp.Site.parse(f"{layer}.{point}.neurons"): rp.Diagonal.mask(keep)}), subject)
    return subject.model


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3_moe"])
def test_pruned_neurons_are_proved(family, share):
    model = pruned(family, share)
    before = {name: p.clone() for name, p in model.named_parameters()}
    proofs = [p for p in rp.check_architecture(model).proofs if p.site.point.endswith("neurons")]
    within(max(p.error for p in proofs), "model, float32")
    assert len(proofs) == 4 and min(p.moved for p in proofs) > 1e-3
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_wrong_reader_of_pruned_neurons_is_found_out(share, table):
    model = pruned("llama", share)
    rp.register(replace(table["llama"], **block(attention(values="self_attn.k_proj"))), replace=True)
    with pytest.raises(UnknownArchitecture, match=r"does not describe this model at 0\.attn\.neurons"):
        rp.check_architecture(model)


def test_pruned_neurons_without_numbers_would_prove_nothing(monkeypatch):
    monkeypatch.setattr(check, "_without_pruned", lambda *_: {})
    with pytest.raises(UnknownArchitecture, match=r"0\.attn\.neurons \(moved nan"):
        rp.check_architecture(pruned("llama", 1.0))


def block(first=None, second=None):
    """A block of an attention and an MLP."""
    return {"block": ((first or attention(), second or mlp()),)}


def routed(experts, output="mlp"):
    """A block of an attention and experts."""
    return block(second=BranchRow("mlp", (experts,), outputs=(output,)))


LOCAL = "num_local_experts"
POST_MLP = "post_feedforward_layernorm"
GPT2_MLP = mlp("mlp.c_proj", "mlp.c_fc")

WRONG = [
    ("llama", block(attention("self_attn.q_proj")), r"does not describe this model at 0\.attn\.neurons"),
    ("llama", block(second=mlp("mlp.up_proj")), "gate_proj has 40 rows, 1 x 24 neurons were expected"),
    ("llama", block(attention(values="self_attn.k_proj")), r"does not describe this model at 0\.attn\.neurons"),
    ("llama", {"transposed": True}, "o_proj is a Linear; the llama row says transposed=True"),
    ("llama", block(second=mlp("mlp.down_proj", GATE)), "has 1 readers; the llama row with gated=True needs 2"),
    ("llama", block(second=mlp("mlp.down_proj", GATE, "mlp.down_proj")), "down_proj has 24 rows, 1 x 40 neurons"),
    ("llama", {"gated": False}, "has 2 readers; the llama row with gated=False needs 1"),
    ("llama", {"parallel": True}, r"0\.resid\.post .*parallel=True"),
    ("llama", {"embeddings": ("wte",)}, r"tensor 'model\.wte\.weight' of the llama row is missing"),
    ("llama", {"head": "output"}, "names the module 'output', which the model lacks"),
    ("llama", {"blocks": "h"}, r"the config has 2 layers, the weights hold layers \[\]"),
    ("llama", {"block": ((replace(attention(), scale=0.5), mlp()),)}, r"0\.resid\.post .*sum of the outputs"),
    ("llama", {"block": ((attention(),),)}, r"0\.resid\.post .*sum of the outputs against the stream"),
    ("gpt2", {"transposed": False}, "c_attn has 24 rows, which 4 heads of width 6 cannot share"),
    ("gpt2", block(attention("attn.c_proj", "attn.c_attn"), GPT2_MLP), "c_attn has 72 rows, which 4 heads"),
    ("gpt2", {"embeddings": ("wte",)}, r"does not describe this model at 0\.resid\.pre"),
    ("gpt_neo", {"transposed": True}, "is a Linear; the gpt_neo row says transposed=True"),
    (
        "gpt_neox",
        block(
            attention("attention.dense", Reader("attention.query_key_value", 1, 3, "per_head")),
            mlp("mlp.dense_4h_to_h", "mlp.dense_h_to_4h"),
        ),
        r"0\.attn\.neurons",
    ),
    ("gpt_neox", {"parallel": False}, r"0\.resid\.post .*parallel=False"),
    ("gptj", {"parallel": False}, r"0\.resid\.post .*parallel=False"),
    ("phi", {"gated": True}, "has 1 readers; the phi row with gated=True needs 2"),
    (
        "phi3",
        block(
            attention(values=Reader("self_attn.qkv_proj", layout="tail")),
            mlp("mlp.down_proj", *(Reader("mlp.gate_up_proj", 0, 2),) * 2),
        ),
        "has 1 readers; the phi3 row",
    ),
    ("phi3", block(attention(values="self_attn.qkv_proj")), "qkv_proj has 48 rows, which 4 heads"),
    ("gemma", {"embedding_scaled": False}, r"does not describe this model at 0\.resid\.pre"),
    ("gemma", {"embedding_scaled": "head_dim"}, r"does not describe this model at 0\.resid\.pre"),
    (
        "gemma2",
        block(attention(norm="post_attention_layernorm")),
        r"0\.resid\.post .*sum of the outputs against the stream",
    ),
    ("gemma2", block(second=mlp(norm=POST_MLP)), r"0\.resid\.post .*sum of the outputs"),
    ("gemma2", {"unit_gain": False}, r"0\.attn\.out .*leak of the subspace"),
    ("olmo2", {"unit_gain": True}, r"0\.attn\.out .*leak of the subspace"),
    (
        "olmo2",
        block(attention(norm="post_attention_layernorm"), mlp(norm="post_attention_layernorm")),
        r"0\.mlp\.out .*leak|0\.resid\.post",
    ),
    ("mixtral", routed(Experts(count=LOCAL), "mlp.gate"), "a tensor of another width"),
    ("mixtral", routed(Experts(count=LOCAL), "moe"), "module 'model.layers.0.moe'"),
    ("mixtral", routed(Experts("mlp.router", count=LOCAL)), "must match one way, it matches 0"),
    ("mixtral", routed(Experts(count="num_experts_per_tok")), "the config has 2 experts, the weights hold 4"),
    (
        "mixtral",
        routed(Experts(count=LOCAL, transposed=True)),
        "gate_up_proj has 24 rows, 2 x 24 neurons were expected",
    ),
    ("mixtral", routed(Experts(count=LOCAL, interleaved=True)), "stores its experts with {'is_concatenated': True}"),
]


@pytest.mark.parametrize(("family", "fields", "message"), WRONG, ids=[f"{f}-{next(iter(d))}" for f, d, _ in WRONG])
def test_a_wrong_field_is_found_out(family, fields, message, table):
    model = tiny(family).model
    rp.register(replace(table[family], **fields), replace=True)
    with pytest.raises(UnknownArchitecture, match=message):
        rp.check_architecture(model)


@pytest.mark.parametrize("fields", [{"transposed": True}, block(second=mlp("mlp.down_proj", GATE)), {"head": "output"}])
def test_wrapping_finds_what_needs_no_forward_pass(fields, table):
    model = tiny("llama").model
    rp.register(replace(table["llama"], **fields), replace=True)
    with pytest.raises(UnknownArchitecture, match="llama row"):
        subject_of(model)


def test_experts_that_no_token_chose_are_proved_too():
    subject = tiny("mixtral", num_local_experts=40, num_experts_per_tok=1)
    laws_of_families.every_writer_is_proved(subject)


@pytest.mark.parametrize(
    ("family", "old", "message"),
    [
        ("llama", "model.layers.1.self_attn.o_proj.weight", "o_proj.weight' of the llama row is missing; did you mean"),
        (
            "llama",
            "model.layers.1.mlp.down_proj.weight",
            "mlp.down_proj.weight' of the llama row is missing; did you mean",
        ),
        (
            "qwen3_moe",
            "model.layers.0.mlp.down_proj.weight",
            r"model\.layers\.0 must match one way, it matches 0.*; attn self_attn.o_proj, mlp mlp.experts",
        ),
        ("llama", "model.layers.0.mlp.up_proj.weight", "up_proj.weight' of the llama row is missing"),
        ("llama", "model.layers.0.self_attn.v_proj.weight", "v_proj.weight' of the llama row is missing"),
        (
            "gemma2",
            "model.layers.1.post_feedforward_layernorm.weight",
            "layernorm.weight' of the gemma2 row is missing",
        ),
        ("gpt2", "transformer.wpe.weight", "wpe.weight' of the gpt2 row is missing"),
        ("mixtral", "model.layers.0.mlp.experts.gate_up_proj", "gate_up_proj' of the mixtral row is missing"),
    ],
)
def test_a_renamed_tensor_raises(family, old, message):
    subject = tiny(family)
    specs = {("renamed" if name == old else name): spec for name, spec in subject.specs.items()}
    with pytest.raises(UnknownArchitecture, match=message):
        match_layout(subject.architecture, specs)


def test_a_missing_layer_raises():
    subject = tiny("llama")
    specs = {name: spec for name, spec in subject.specs.items() if ".layers.1." not in name}
    with pytest.raises(UnknownArchitecture, match=r"has 2 layers, the weights hold layers \[0\].* is a shard missing"):
        match_layout(subject.architecture, specs)


def test_a_layer_that_is_dense_and_routed_raises():
    subject = tiny("qwen3_moe")
    specs = {**subject.specs, "model.layers.1.mlp.down_proj.weight": TensorSpec((24, 40), torch.float32)}
    with pytest.raises(
        UnknownArchitecture, match=r"must match one way, it matches 2: attn .*mlp mlp\.down_proj; .*mlp\.experts"
    ):
        match_layout(subject.architecture, specs)


def test_an_extra_expert_raises():
    subject = tiny("mixtral")
    extra = {"model.layers.1.mlp.experts.down_proj": TensorSpec((5, 24, 40), torch.float32)}
    with pytest.raises(UnknownArchitecture, match=r"layers\.1: the config has 4 experts, the weights hold 5"):
        match_layout(subject.architecture, subject.specs | extra)


def test_the_post_norm_opt_is_refused():
    with pytest.raises(UnknownArchitecture, match="do_layer_norm_before=False is not supported: this is the post-norm"):
        tiny("opt", do_layer_norm_before=False)


def test_an_unknown_model_type_names_the_fields_of_a_row():
    fields = "base=.*blocks=.*block=.*attention.*mlp.*check_architecture"
    with pytest.raises(UnknownArchitecture, match=f"no row for model_type 'lama'; did you mean 'llama'.*{fields}"):
        resolve(SimpleNamespace(model_type="lama", tie_word_embeddings=False))


def test_a_row_is_registered_once_unless_replaced(table):
    with pytest.raises(UnknownArchitecture, match="'llama' already has a row; pass replace=True"):
        register(table["llama"])
    register(replace(table["llama"], gated=False), replace=True)
    assert not families()["llama"].gated


def test_parallel_families_have_no_middle_of_the_stream():
    subject, site = tiny("gptj"), rp.Site.parse("0.resid.mid")
    with pytest.raises(UnknownSite, match=r"gptj adds attention and MLP in parallel, so resid\.mid does not exist"):
        hooks_at(subject.model, subject.layout, site, lambda x, at, tokens: None, replaces=False)


@pytest.mark.parametrize("family", ROUTED)
def test_expert_neurons_equal_a_naive_loop(family):
    subject, seen, inputs = tiny(family), {}, []
    branch = subject.layout.layers[1][1]
    module = subject.model.get_submodule(branch.writer)
    module.register_forward_pre_hook(lambda _, args: inputs.extend(args))
    site = rp.Site(1, rp.Point.MLP_NEURONS)
    with installed(subject.model, hooks_at(subject.model, subject.layout, site, note(seen), replaces=False)):
        logits(subject)
    expected = naive(module, branch, inputs[0], inputs[1])
    assert seen.keys() == expected.keys() and len(seen) == 2 * ids().numel()
    for key, value in expected.items():
        close(seen[key], value, "model, float32")


def note(seen):
    """A visit that keeps the neurons of each (expert, token)."""

    def visit(x, at, tokens):
        seen.update({(at.start, int(token)): row for token, row in zip(tokens, x, strict=True)})

    return visit


def naive(module, branch, hidden, index):
    """Neurons of each (first neuron of the expert, token), one matrix times one vector at a time."""
    found = {}
    for token, experts in enumerate(index.tolist()):
        for e in experts:
            gate, up = (module.gate_up_proj[e] @ hidden[token]).chunk(2)
            found[branch.parts[e].start, token] = (module.act_fn(gate) * up).detach()
    return found


@pytest.mark.parametrize("family", ROUTED)
def test_nested_edits_of_the_same_experts_compose(family):
    subject = tiny(family, torch.float64)
    width = subject.layout.width_of(1, rp.Point.MLP_NEURONS)
    scales = [torch.rand(width, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    first, second, third = (Edit({rp.Site.parse("1.mlp.neurons"): rp.Diagonal(scale)}) for scale in scales)
    with first.hooked(subject), second.hooked(subject), third.hooked(subject):
        nested = logits(subject)
    product = Edit({rp.Site.parse("1.mlp.neurons"): rp.Diagonal(scales[0] * scales[1] * scales[2])})
    laws.assert_close(nested, logits(rp.apply(product, subject)), torch.float32)


@pytest.mark.parametrize(("heads", "zeroed"), [((0,), False), ((1,), False), ((0, 1), True)])
def test_a_value_row_is_zeroed_only_with_all_heads_that_share_it(heads, zeroed):
    subject, keep = tiny("llama"), torch.ones(24, dtype=torch.bool)
    keep[[6 * head + 2 for head in heads]] = False
    edit = Edit({rp.Site.parse("1.attn.neurons"): rp.Diagonal.mask(keep)})
    block = rp.apply(edit, subject).model.model.layers[1].self_attn
    assert not block.o_proj.weight[:, ~keep].any()
    assert bool(block.v_proj.weight[2].any()) is not zeroed
    laws.hooked_equals_rewritten(subject, edit)


def test_dense_and_routed_layers_live_in_one_model():
    subject = tiny("qwen3_moe")
    dense, routed = (pair[1] for pair in subject.layout.layers)
    assert (dense.routed, dense.width, len(dense.parts)) == (False, 40, 1)
    assert (routed.routed, routed.width, len(routed.parts)) == (True, 64, 4)
    laws.hooked_equals_rewritten(subject, mask(subject, "0.mlp.neurons") | mask(subject, "1.mlp.neurons"))
