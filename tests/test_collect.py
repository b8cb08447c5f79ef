"""Collecting: planted neurons are found, the counting rule holds, and what goes wrong is said."""

import pytest
import torch
from torch import Tensor

import repedit as rp
from repedit.data import Corpus, Document
from repedit.data.corpus import tokens
from repedit.errors import (  # fmt: skip
    ArgumentError,
    FingerprintError,
    NoGradient,
    NotEnoughRows,
    NotFinite,
    QuantizedModel,
    UnknownSite,
)
from repedit.models.subject import Subject, subject_of
from tests.char_tokenizer import CharTokenizer
from tests.edits import mask
from tests.every_causal_type import tiny_causal
from tests.planted_neurons import NEURONS, planted, texts
from tests.tiny import ids, tiny

PLANTED = ("llama", "gpt_neox", "opt", "gpt2", "qwen3")
SITE = rp.Site.parse("1.mlp.neurons")


def _found(family: str, importance: str, combine: str) -> set[tuple[rp.Site, int]]:
    subject = planted(family)
    sides = [rp.collect(subject, texts(forget=side), gradients=importance == "gxa") for side in (True, False)]
    scores = rp.score(sides[0], sides[1], importance=importance, combine=combine, warn=False)
    fraction = len(NEURONS) / sum(len(found.values) for found in scores.values())
    return {(site, int(i)) for site, keep in rp.top(scores, fraction=fraction).items() for i in (~keep).nonzero()[:, 0]}


@pytest.mark.parametrize("combine", ["ratio", "difference"])
@pytest.mark.parametrize("importance", ["abs", "rms", "std", "gxa"])
@pytest.mark.parametrize("family", PLANTED)
def test_planted_neurons_are_found_exactly(family, importance, combine):
    assert _found(family, importance, combine) == {(SITE, neuron) for neuron in NEURONS}


@pytest.mark.parametrize("combine", ["ratio", "difference"])
@pytest.mark.parametrize("family", ["gpt_neox", "opt", "gpt2"])
def test_planted_neurons_are_found_by_frequency_where_nothing_is_gated(family, combine):
    assert _found(family, "frequency", combine) == {(SITE, neuron) for neuron in NEURONS}


@pytest.mark.parametrize("family", PLANTED)
def test_planted_neurons_fire_on_the_forget_set_only(family):
    subject = planted(family)
    forget, retain = (rp.collect(subject, texts(forget=side))[SITE].abs[list(NEURONS)] for side in (True, False))
    assert float(forget.min()) > 100 and float(retain.max()) < 1e-5 * float(forget.min())


@pytest.mark.parametrize(
    ("family", "chosen"), [("qwen2_moe", 2), ("llama4_text", 2), ("gpt_oss", 2), ("gemma4_text", 2)]
)
def test_experts_count_the_tokens_routed_to_them_and_shared_projections_all(family, chosen):
    subject = subject_of(tiny_causal(family))
    layer = next(i for i in range(9) if subject.layout.routed(rp.Site(i, rp.Point.MLP_NEURONS)))
    collection = rp.collect(
        subject, tokens([{"input_ids": ids()}]), f"{layer}.mlp.neurons", first_position=True, special_tokens=True
    )
    activity, parts = (
        collection[rp.Site(layer, rp.Point.MLP_NEURONS)],
        subject.layout.branch(layer, rp.Point.MLP_OUT).parts,
    )
    counts = [int(activity.count[part.start]) for part in parts]
    assert all(bool((activity.count[p.start : p.stop] == n).all()) for p, n in zip(parts, counts, strict=True))
    assert sum(n for n, part in zip(counts, parts, strict=True) if part.expert is not None) == chosen * ids().numel()
    assert all(n == ids().numel() for n, part in zip(counts, parts, strict=True) if part.expert is None)


def _calls(module: torch.nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize(("gradients", "runs"), [(False, 0), (True, 1)])
def test_the_head_runs_only_for_gradients(gradients, runs):
    subject = tiny("llama")
    calls = _calls(subject.model.get_output_embeddings())
    rp.collect(subject, tokens([{"input_ids": ids()}]), gradients=gradients)
    assert len(calls) == runs


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_an_edit_is_active_while_collecting(family):
    subject, corpus = tiny(family), tokens([{"input_ids": ids()}])
    edit = mask(subject, "0.mlp.neurons") | mask(subject, "1.mlp.neurons")
    hooked, rewritten = rp.collect(subject, corpus, edit=edit), rp.collect(rp.apply(edit, subject), corpus)
    for site, map_ in edit.maps.items():
        assert not bool(hooked[site].abs[~map_.kept].any())
        torch.testing.assert_close(hooked[site].abs, rewritten[site].abs, rtol=1e-5, atol=1e-5)
    assert (hooked.edit, rewritten.edit) == (edit.hash, "") and hooked.model == subject.fingerprint()


def test_frozen_weights_have_gradient_sums_too():
    subject, corpus = tiny("llama"), tokens([{"input_ids": ids()}])
    expected = rp.collect(subject, corpus, gradients=True)[SITE]
    subject.model.requires_grad_(False)
    with torch.no_grad():
        found = rp.collect(subject, corpus, gradients=True)[SITE]
    assert torch.equal(found.gxa, expected.gxa) and bool(found.gxa.any())
    assert all(p.grad is None for p in subject.model.parameters())


@pytest.mark.parametrize(("limit", "counted"), [(None, 120), (1, 40), (40, 40), (41, 80), (1000, 120)])
def test_limit_tokens_stops_after_the_batch_that_reaches_it(limit, counted):
    corpus = tokens([{"input_ids": ids(4, 11, seed)} for seed in range(3)])
    found = rp.collect(tiny("llama"), corpus, limit_tokens=limit)
    assert found.counted == counted and found.seen == counted * 11 // 10
    assert found[SITE].count.tolist() == [counted] * 40


RULES = {
    "default": ({}, [[0, 1, 0, 1, 0], [0, 1, 1, 0, 0]]),
    "first position": ({"first_position": True}, [[1, 1, 0, 1, 0], [0, 1, 1, 0, 0]]),
    "special tokens": ({"special_tokens": True}, [[0, 1, 1, 1, 0], [0, 1, 1, 0, 0]]),
    "both": ({"first_position": True, "special_tokens": True}, [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]),
    "custom": ({"count": lambda batch: (batch.input_ids == 5).int()}, [[0, 1, 0, 0, 0], [0, 1, 0, 0, 0]]),
}


@pytest.mark.parametrize(("options", "expected"), RULES.values(), ids=RULES)
def test_the_counting_rule(options, expected):
    batch = {"input_ids": torch.tensor([[3, 5, 2, 7, 5], [1, 5, 6, 5, 5]])}
    batch["attention_mask"] = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    subject = Subject(tiny("llama").model, CharTokenizer(), tiny("llama").architecture)
    found = rp.collect(subject, tokens([batch]), **options)
    counted = torch.tensor(expected).bool()
    explicit = rp.collect(subject, tokens([batch]), count=lambda _: counted)
    assert (found.seen, found.counted) == (7, int(counted.sum()))
    assert torch.equal(found[SITE].total, explicit[SITE].total)
    assert found[SITE].first_count.tolist() == [2] * 40
    on = {name for name, value in found.rule.items() if value}
    assert on == {name.replace("count", "custom") for name in options}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"corpus 'tokens': 2 tokens seen, 0 counted \(padding, first positions, special tokens do not count\)"),
        ({"first_position": True, "count": lambda batch: batch.attention_mask & False}, "your count rule removed the rest"),
    ],
)  # fmt: skip
def test_a_corpus_without_counted_tokens_is_refused(options, message):
    corpus = tokens([{"input_ids": torch.tensor([[3], [4]])}])
    with pytest.raises(NotEnoughRows, match=message):
        rp.collect(tiny("llama"), corpus, **options)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("5.mlp.neurons", r"asks for layers 5..5; layers are 0..1"),
        ("*.mlp.neuron", "did you mean 'mlp.neurons'"),
        (
            "0.resid.pre",
            "0.resid.pre is not made of neurons: activity is collected at attn.neurons, mixer.neurons, mlp.neurons",
        ),
        ("*.mlp.out", "0.mlp.out is not made of neurons"),
    ],
)
def test_sites_without_neurons_are_refused(site, message):
    with pytest.raises(UnknownSite, match=message):
        rp.collect(tiny("llama"), texts(forget=True), site)


def test_gradients_that_cannot_be_had_are_refused():
    with (
        torch.inference_mode(),
        pytest.raises(NoGradient, match=r"under torch.inference_mode, where no tensor has one"),
    ):
        rp.collect(tiny("llama"), texts(forget=True), gradients=True)
    with pytest.raises(NoGradient, match=r"0.mlp.neurons holds expert neurons, .*; collect without gradients"):
        rp.collect(tiny("mixtral"), texts(forget=True), gradients=True)
    quantized = tiny("llama")
    quantized.model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(
        QuantizedModel, match=r"weights are quantised \(gptq\) and cannot be differentiated; use the unquantised base"
    ):
        rp.collect(quantized, texts(forget=True), gradients=True)


def _hooks_left(subject: Subject) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in subject.model.modules())


@pytest.mark.parametrize("gradients", [False, True])
def test_an_exception_names_the_batch_and_leaves_no_hook(gradients):
    subject, corpus = tiny("llama"), tokens([{"input_ids": ids()}, {"input_ids": ids(seed=1)}])
    passes = []

    def fail_in_the_second(*_: object) -> None:
        passes.append(None)
        if len(passes) == 2:
            raise IndexError("as it happens")

    handle = subject.model.model.layers[1].register_forward_pre_hook(fail_in_the_second)
    with pytest.raises(IndexError) as caught:
        rp.collect(subject, corpus, gradients=gradients, edit=mask(subject, "1.mlp.neurons"))
    handle.remove()
    assert caught.value.__notes__ == ["in batch 1 of the corpus; no batch was skipped"]
    assert _hooks_left(subject) == 0


def test_an_exception_in_a_counting_rule_names_the_batch():
    with pytest.raises(ZeroDivisionError) as caught:
        rp.collect(tiny("llama"), texts(forget=True), count=lambda batch: 1 / 0)
    assert caught.value.__notes__ == ["in batch 0 of the corpus; no batch was skipped"]


def _spoiled(name: str, value: float) -> Subject:
    subject = tiny("llama")
    with torch.no_grad():
        dict(subject.model.named_parameters())[name][3] = value
    return subject


def test_values_that_are_not_finite_are_refused_with_batch_and_site():
    spoiled = _spoiled("model.layers.1.mlp.gate_proj.weight", torch.nan)
    with pytest.raises(
        NotFinite, match=r"batch 0: 1.mlp.neurons: the sum '\w+' of neuron 3 is not finite; load .*float32"
    ):
        rp.collect(spoiled, texts(forget=True))
    with pytest.raises(NotFinite, match=r"batch 0: the loss is nan; load the model in float32"):
        rp.collect(spoiled, texts(forget=True), gradients=True)


def test_a_text_corpus_needs_a_tokenizer():
    corpus = Corpus((Document("a", "some text"),))
    with pytest.raises(ArgumentError, match="this needs a tokenizer and the model was wrapped without one"):
        rp.collect(tiny("llama"), corpus)


def test_collections_of_two_corpora_add_up():
    subject, parts = tiny("llama"), [tokens([{"input_ids": ids(seed=seed)}]) for seed in (1, 2)]
    first, second = (rp.collect(subject, part) for part in parts)
    both = rp.collect(subject, tokens([{"input_ids": ids(seed=seed)} for seed in (1, 2)]))
    assert (first + second).counted == both.counted and (first + second).data_hash == (second + first).data_hash
    torch.testing.assert_close((first + second)[SITE].abs, both[SITE].abs, rtol=1e-12, atol=0)
    other = rp.collect(subject, parts[0], first_position=True)
    with pytest.raises(FingerprintError, match=r"cannot merge collections: rule is .*; collect both alike"):
        first + other
    with pytest.raises(FingerprintError, match="cannot merge collections: model is"):
        first + rp.collect(tiny("mistral"), parts[0])


def test_a_collection_is_read_by_site_or_name():
    found = rp.collect(tiny("llama"), texts(forget=True), ["1.mlp.neurons", "blocks.0.attn.hook_z"])
    assert list(map(str, found)) == ["0.attn.neurons", "1.mlp.neurons"]
    assert found["1.mlp.neurons"] is found[SITE] is found["blocks.1.mlp.hook_post"]
    assert found.group_sizes[rp.Site.parse("0.attn.neurons")] == {"head": 6, "kv_group": 12}
    assert isinstance(found[SITE].abs, Tensor) and found[SITE].abs.dtype == torch.float64
