"""Token ids and positions that a model does not have are refused by document or row, before it reads them."""

import pytest
import torch

import repedit as rp
from repedit.auditing.attacks.probing import logit_lens
from repedit.auditing.attacks.samples import samples
from repedit.data import Fact, Row, Rows, Splits
from repedit.errors import DataError
from repedit.metrics.answers import answer_nll
from repedit.metrics.facts import facts_accuracy
from repedit.metrics.generation import generate, side_by_side
from repedit.metrics.membership import scores
from repedit.training.sampler import BatchSampler, check_disjoint
from tests.saved_models import byte_tokenizer
from tests.test_attack_weights import small


def extended():
    """A model whose tokenizer knows a token that it has no embedding for."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>"])
    subject = small("llama")
    assert tokenizer.convert_tokens_to_ids("<think>") == 259
    subject.model.resize_token_embeddings(259)
    return rp.wrap(subject.model, tokenizer)


BAD = "hello <think> there"
FACT = Fact(id="odd", prompt=BAD, answer="a", choices=("a", "b"))
ROW = Rows((Row("fine", "row", "even"), Row("hello", "<think>", "odd")), "mine")
CALLS = {
    "collect": lambda lm: rp.collect(lm, rp.data.read(["fine", BAD])),
    "predictions": lambda lm: rp.predictions(lm, rp.data.read(["fine", BAD])),
    "rows": lambda lm: rp.predictions(lm, ROW),
    "training": lambda lm: BatchSampler(lm, ROW, 1, length=64, seed=0),
    "generate": lambda lm: generate(lm, ["fine", BAD], max_new_tokens=2),
    "chat": lambda lm: side_by_side([lm], [BAD], max_new_tokens=2),
    "choices": lambda lm: facts_accuracy(lm, [FACT]),
    "greedy": lambda lm: facts_accuracy(lm, [FACT], how="greedy"),
    "an answer": lambda lm: facts_accuracy(
        lm, [Fact(id="odd", prompt="a", answer="<think>", choices=("<think>", "b"))]
    ),
    "answer_nll": lambda lm: answer_nll(lm, ROW),
    "membership": lambda lm: scores(lm, ["fine", BAD]),
    "samples": lambda lm: samples(lm, [FACT], 2),
    "lens": lambda lm: logit_lens().run(lm, Splits((FACT,), (FACT,)), 0),
}


@pytest.mark.parametrize("door", CALLS)
def test_an_id_without_an_embedding_is_refused_by_name(door, monkeypatch):
    lm = extended()
    monkeypatch.setattr(lm.model, "forward", None)
    name = r"(row '1'|row 'odd'|fact 'odd'|text 1|the prompt( 'hello <think> there')?)"
    with pytest.raises(
        DataError, match=rf"{name}: token \d+ has the id 259, the model has embeddings for 0 to 258; give"
    ):
        CALLS[door](lm)


@pytest.mark.parametrize("token", [-1, -100, 260, 10**6])
def test_tokens_of_yours_are_checked(token):
    ids = torch.full((2, 5), 7)
    ids[1, 3] = token
    lm = small("gpt2")
    for call in (rp.collect, rp.predictions):
        with pytest.raises(DataError, match=rf"corpus 'tokens', row '0.1': token 3 has the id {token}"):
            call(lm, rp.data.read([{"input_ids": ids}]))


@pytest.mark.parametrize(("batch", "message"), [
    ({"input_ids": [[1.5, 2.0]]}, "batch 0: input_ids are torch.float32 of shape"), ({"input_ids": [1, 2]}, "of shape .2,.; give"),
    ({"input_ids": [[1, 2], [3]]}, "batch 0: input_ids are not a table of integers"),
    ({"input_ids": [["a"]]}, "batch 0: input_ids are not a table of integers"),
    ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, r"batch 0: attention_mask has shape \(1, 1\), input_ids \(1, 2\)"),
    ({"input_ids": [[True]]}, "torch.bool"), ({"input_ids": [[]]}, "give at least one token"),
])  # fmt: skip
def test_tokens_that_are_no_table_are_refused(batch, message):
    with pytest.raises(DataError, match=message):
        rp.data.read([batch])


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_text_longer_than_learned_positions_is_refused(family):
    lm = small(family)
    long = rp.data.read(["a" * 300], name="long")
    message = "row '0' has 300 tokens, the model has 256 positions; shorten it, or give a lower length"
    for call in (lambda: rp.collect(lm, long, length=512), lambda: rp.predictions(lm, long, length=512)):
        with pytest.raises(DataError, match=message):
            call()
    with pytest.raises(DataError, match="text 0 has 300 tokens, the model has 256 positions"):
        scores(lm, ["a" * 300])
    for how in ("choice", "greedy"):
        with pytest.raises(DataError, match=r"fact 'it' has \d+ tokens, the model has 256 positions"):
            facts_accuracy(lm, [Fact(id="it", prompt="a" * 255, answer="ab", choices=("ab", "ba"))], how=how)
    assert rp.predictions(lm, long, length=256).count.sum() == 298


def test_rotary_positions_have_no_end():
    assert rp.predictions(small("llama"), rp.data.read(["a" * 300]), length=512).count.sum() == 299


def as_tokens(tokenizer, *texts: str, ends: bool = False):
    return rp.data.read([{"input_ids": [[1] * ends + tokenizer(text)["input_ids"] + [2] * ends]} for text in texts])


@pytest.mark.parametrize("kind", ["tokens", "with special tokens", "texts", "rows", "facts"])
def test_a_row_that_both_sides_share_is_found_in_any_kind_of_data(kind):
    lm = small("llama")
    t, asked = lm.tokenizer, tuple(Fact(id=str(i), prompt=f"p{i}", answer="a") for i in range(2))
    other = {
        "tokens": as_tokens(t, "other", "p1 a"), "with special tokens": as_tokens(t, "p1 a", ends=True), "facts": rp.data.Facts(asked),
        "texts": rp.data.read(["other", "p1 a"]), "rows": Rows((Row("p1", "a", "r"), Row("x", "y", "s"))),
    }[kind]  # fmt: skip
    mine = as_tokens(t, "p1 a", "mine")
    for one, two in ((mine, other), (other, mine)):
        with pytest.raises(rp.errors.OverlapError, match="share 1 rows, the first is"):
            check_disjoint(lm, one, two)
    check_disjoint(lm, as_tokens(t, "p1 b", "mine"), other)


def test_training_on_shared_tokens_is_refused():
    lm = small("llama")
    forget, retain = as_tokens(lm.tokenizer, "one text", "two text"), as_tokens(lm.tokenizer, "two text", "three text")
    for call in (
        lambda: rp.mrp(lm, forget=forget, retain=retain, rank=1),
        lambda: rp.unlearn(lm, recipe=rp.recipes.grad_diff(), forget=forget, retain=retain),
    ):
        with pytest.raises(rp.errors.OverlapError, match=r"share 1 rows, the first is '1\.0'"):
            call()
