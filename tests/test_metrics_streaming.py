"""Text streamed token by token is the text that transformers generates, and no model changes what another writes."""

import copy
from dataclasses import replace

import pytest
import torch

import repedit as rp
from repedit.errors import ArgumentError, DataError
from repedit.metrics import generation
from repedit.metrics import generation as streaming
from repedit.metrics.generation import Writing, prompt_tokens, side_by_side, stream
from tests.saved_models import byte_tokenizer
from tests.test_attack_weights import small
from tests.test_metrics_generation import CHAT
from tests.tiny import FAMILIES

TOKENS = 12


def expected(subject, ids, tokens: int = TOKENS) -> list[int]:
    """The new tokens of transformers' own greedy search."""
    given = torch.tensor([ids])
    out = subject.model.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, len(ids) :].tolist()


def last(writings):
    found = list(writings)
    assert all(not w.ended for w in found[:-1]) and [len(w.tokens) for w in found] == list(range(1, len(found) + 1))
    return found[-1]


def check_greedy(subject) -> None:
    for prompt in ("hello there", "a", "zz top: "):
        ids = prompt_tokens(subject, prompt, max_new_tokens=TOKENS)
        written = last(stream(subject, ids, max_new_tokens=TOKENS))
        assert list(written.tokens) == expected(subject, ids)
        assert written.text == subject.tokenizer.decode(written.tokens, skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_text_is_the_one_that_is_generated(family):
    check_greedy(small(family))


def without_the_cache(subject, seen, fresh, cache):
    """Every step forgets what was read before."""
    return plain_step(subject, fresh, fresh, None)


def one_behind(subject, seen, fresh, cache):
    """The last prompt token is never read."""
    return plain_step(subject, seen[:, :-1], fresh[:, :-1] if cache is None else fresh, cache)


plain_step = streaming._step


@pytest.mark.parametrize("broken", [without_the_cache, one_behind])
def test_a_cache_that_is_lost_or_shifted_is_caught(broken, monkeypatch):
    monkeypatch.setattr(streaming, "_step", broken)
    with pytest.raises(AssertionError):
        check_greedy(small("llama"))


@pytest.mark.parametrize("as_list", [False, True])
def test_a_token_that_ends_a_text_ends_it(as_list):
    subject = small("qwen3")
    ids = prompt_tokens(subject, "hello", max_new_tokens=TOKENS)
    third = expected(subject, ids)[2]
    subject.model.generation_config.eos_token_id = [259, third] if as_list else third
    written = last(stream(subject, ids, max_new_tokens=TOKENS))
    assert list(written.tokens) == expected(subject, ids) and written.ended == "stop"
    assert last(stream(subject, ids, max_new_tokens=1)).ended == "length"


def test_models_write_side_by_side_what_each_writes_alone():
    subjects = [small("llama"), small("gpt2")]
    subjects[0].model.generation_config.eos_token_id = expected(
        subjects[0], prompt_tokens(subjects[0], "a", max_new_tokens=9)
    )[1]
    steps = list(side_by_side(subjects, ["a", "other"], max_new_tokens=6))
    alone = [list(side_by_side([s], [p], max_new_tokens=6)) for s, p in zip(subjects, ["a", "other"], strict=True)]
    assert [[step[i] for step in steps[: len(alone[i])]] for i in (0, 1)] == [[w for (w,) in one] for one in alone]
    assert len(alone[0]) == 2 and len(steps) == 6 and steps[-1][0] == steps[1][0], "the first waits for the second"
    assert [w.text for w in steps[-1][1:]] == list(generation.generate(subjects[1], ["other"], max_new_tokens=6))


def test_draws_are_the_seed_s_and_no_other_model_s():
    subject = small("gpt2")
    one, two = ([last(side_by_side_only(subject, 2, seed)) for _ in range(2)] for seed in (0, 1))
    assert one[0] == one[1] and two[0] == two[1] and one[0] != two[0]
    together = list(side_by_side([small("llama"), subject], ["a", "a"], max_new_tokens=TOKENS, temperature=2.0))[-1]
    assert together[1] == one[0]


def side_by_side_only(subject, temperature, seed):
    for (written,) in side_by_side([subject], ["a"], max_new_tokens=TOKENS, temperature=float(temperature), seed=seed):
        yield written


def test_draws_follow_the_temperature():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    draws = torch.Generator().manual_seed(0)
    found = torch.bincount(torch.tensor([streaming._next_token(logits, 0.5, draws) for _ in range(4000)]), minlength=3)
    # 4 standard deviations of the least certain share, sqrt(.13 * .87 / 4000) = .005.
    assert (found / 4000 - (logits[0] / 0.5).softmax(0)).abs().max() < 0.022


def test_a_character_is_shown_when_it_is_whole():
    subject, tokens = small("gpt2"), byte_tokenizer()("aé€b")["input_ids"]
    script = iter(tokens)
    fixed = replace(subject, model=copy.copy(subject.model))
    texts = [w.text for w in scripted(fixed, script, len(tokens))]
    assert texts == ["a", "a", "aé", "aé", "aé", "aé€", "aé€b"]


def scripted(subject, script, count):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "_next_token", lambda *a: next(script))
        yield from list(stream(subject, [5], max_new_tokens=count))


def test_a_conversation_is_put_in_the_chat_template():
    subject = small("llama")
    subject.tokenizer.chat_template = CHAT
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "a"},
    ]
    plain = "<s>user: hi\n<s>assistant: yes\n<s>user: a\nassistant:"
    assert prompt_tokens(subject, turns, max_new_tokens=3) == prompt_tokens(subject, plain, max_new_tokens=3)


def test_the_model_is_left_as_it_was():
    subject = small("llama")
    before = subject.fingerprint()
    writings = stream(subject, [5], max_new_tokens=4)
    assert next(writings) == Writing(*vars(next(stream(subject, [5]))).values()) and torch.is_grad_enabled()
    assert subject.fingerprint() == before


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: stream(small("llama"), [5], max_new_tokens=0), ArgumentError, "max_new_tokens=0, temperature=0.0; give at"),
    (lambda: stream(small("llama"), [5], temperature=-1.0), ArgumentError, r"temperature=-1.0; give at least 1, and a number"),
    (lambda: stream(small("llama"), []), DataError, "there is no token to continue from; give at least one"),
    (lambda: side_by_side([small("llama")], []), ArgumentError, "1 models and 0 prompts; give one prompt for each model"),
    (lambda: side_by_side([small("llama")], [[{"role": "user", "content": "a"}]]), ArgumentError,
     "the tokenizer has no chat template for a conversation; give a text to continue"),
    (lambda: side_by_side([replace(small("llama"), tokenizer=None)], ["a"]), ArgumentError, "this needs a tokenizer"),
    (lambda: side_by_side([small("llama")], [""]), DataError, "the prompt '' has no token; give a text"),
    (lambda: side_by_side([small("llama")], ["a" * 200], max_new_tokens=100), DataError,
     "the prompt has 200 tokens, the model reads 256: no room for max_new_tokens=100; shorten either"),
    (lambda: stream(small("llama"), [5, 260]), DataError, "the prompt: token 1 has the id 260, the model has embeddings for 0 to"),
    (lambda: stream(small("llama"), [-1]), DataError, "the prompt: token 0 has the id -1"),
    (lambda: stream(small("opt"), [5] * 200, max_new_tokens=58), DataError, "the prompt has 257 tokens, the model has 256 positions"),
])  # fmt: skip
def test_what_cannot_be_streamed_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_model_writes_up_to_its_last_position():
    """The last token that is written is not read."""
    lm = small("opt")
    *_, (written,) = side_by_side([lm], ["a" * 250], max_new_tokens=7)
    assert written.ended
    with pytest.raises(DataError, match="no room for max_new_tokens=8"):
        side_by_side([lm], ["a" * 250], max_new_tokens=8)


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize(
    "prompt", ["The capital of France is", [{"role": "user", "content": "What is the capital of France?"}]]
)
def test_smollm2_streams_what_it_generates(prompt):
    lm = rp.load("smollm2-135m")
    ids = prompt_tokens(lm, prompt, max_new_tokens=40)
    written = last(stream(lm, ids, max_new_tokens=40))
    assert list(written.tokens) == expected(lm, ids, 40) and "Paris" in written.text
    assert written.ended == "stop"
