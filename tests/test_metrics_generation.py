"""What a model writes does not depend on who is read with it, and overlap of words is counted as published."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from repedit.auditing.attacks.samples import samples
from repedit.data import Fact
from repedit.data.corpus import padded
from repedit.errors import ArgumentError, DataError, MissingDependency, NotFinite
from repedit.metrics import generation
from repedit.metrics.benchmarks import compare
from repedit.metrics.facts import facts_accuracy
from repedit.metrics.generation import continuations, exact_match, generate, prompt_tokens, rouge, side_by_side
from repedit.metrics.membership import scores
from tests.test_attack_weights import small

PROMPTS = ["hello there", "a", "some longer prompt, of many words", "zz top"]
# reference | output: ROUGE-1 recall, ROUGE-L recall, ROUGE-L F1; measured with rouge-score 0.1.2.
TABLE = {
    ("the cat sat on the mat", "the cat"): (1 / 3, 1 / 3, 0.5),
    ("317-111-9877", "Her phone is 317-111-9877."): (1, 1, 2 / 3),
    ("a b c d", "d c b a"): (1, 0.25, 0.25),
    ("Basil Mahfouz Al-Kuwaiti", "The author is Basil Al-Kuwaiti"): (0.75, 0.75, 0.6),
    ("running quickly", "he runs quick"): (0.5, 0.5, 0.4),
    ("", "text"): (0, 0, 0),
    ("text", ""): (0, 0, 0),
}


def check_alone(family: str) -> None:
    subject = small(family)
    together = generate(subject, PROMPTS, max_new_tokens=6)
    assert together == continuations(subject, PROMPTS, tokens=6) and len(set(together)) == len(PROMPTS)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_prompt_is_continued_as_it_is_alone(family):
    check_alone(family)


def on_the_right(tokens, *, left):
    return padded(tokens)


def unmasked(tokens, *, left):
    ids, mask = padded(tokens, left=left)
    return ids, torch.ones_like(mask)


@pytest.mark.parametrize("broken", [on_the_right, unmasked])
def test_padding_that_is_read_is_caught(broken, monkeypatch):
    monkeypatch.setattr(generation, "padded", broken)
    with pytest.raises(AssertionError):
        check_alone("gpt2")


SETTINGS = {
    "repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "suppress_tokens": list(range(130, 258)), "min_new_tokens": 20,
    "min_length": 40, "begin_suppress_tokens": list(range(3, 200)), "bad_words_ids": [[i] for i in range(3, 200)],
    "forced_bos_token_id": 7, "forced_eos_token_id": 9, "num_beams": 3, "do_sample": True, "temperature": 5.0, "top_k": 3,
    "encoder_repetition_penalty": 1.4, "exponential_decay_length_penalty": (1, 2.0), "max_length": 3, "prompt_lookup_num_tokens": 2,
    "sequence_bias": [[[5], 90.0]], "encoder_no_repeat_ngram_size": 2, "guidance_scale": 3.0, "max_new_tokens": 1,
}  # fmt: skip
FACTS = [Fact(id=p, prompt=p, answer="z") for p in PROMPTS]


def everything_greedy(subject) -> tuple:
    """What is written wherever greedy is said, and what is drawn."""
    *_, streamed = side_by_side([subject], ["hello there"], max_new_tokens=8)
    *_, drawn = side_by_side([subject], ["hello there"], max_new_tokens=8, temperature=1.0)
    graded = facts_accuracy(subject, FACTS, how="greedy")
    return generate(subject, PROMPTS, max_new_tokens=8), streamed, drawn, graded.correct.tolist()


def argmax(subject, prompt: str, tokens: int) -> str:
    """The most likely token, again and again, nothing kept between steps."""
    ids = prompt_tokens(subject, prompt, max_new_tokens=tokens)
    start = len(ids)
    while len(ids) < start + tokens and ids[-1] != 2:
        with torch.no_grad():
            ids.append(int(subject.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return subject.tokenizer.decode(ids[start:], skip_special_tokens=True)


def check_greedy_is_argmax(subject) -> None:
    assert generate(subject, PROMPTS, max_new_tokens=8) == tuple(argmax(subject, p, 8) for p in PROMPTS)


@pytest.mark.parametrize("setting", SETTINGS)
def test_greedy_is_argmax_whatever_the_checkpoint_asks_of_generation(setting):
    subject = small("gpt2")
    before = everything_greedy(subject)
    setattr(subject.model.generation_config, setting, SETTINGS[setting])
    assert everything_greedy(subject) == before
    check_greedy_is_argmax(subject)


def test_a_penalty_that_is_followed_is_caught(monkeypatch):
    subject = small("gpt2")
    subject.model.generation_config.repetition_penalty = 1.7

    def follows(subject, prompts, tokens, names):
        ids, mask = padded(prompts, left=True)
        out = subject.model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return subject.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)

    monkeypatch.setattr(generation, "greedy_continuations", follows)
    with pytest.raises(AssertionError):
        check_greedy_is_argmax(subject)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_are_no_text(value):
    subject = small("llama")
    with torch.no_grad():
        subject.model.lm_head.weight.fill_(value)
    calls = (
        lambda: generate(subject, PROMPTS, max_new_tokens=2), lambda: compare(subject, subject, prompts=["hi"], tokens=2),
        lambda: list(side_by_side([subject], ["hi"], max_new_tokens=2)), lambda: samples(subject, FACTS, 2),
        lambda: list(side_by_side([subject], ["hi"], max_new_tokens=2, temperature=1.0)),
        lambda: facts_accuracy(subject, FACTS, how="greedy"), lambda: scores(subject, ["hello", "there"]),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(NotFinite, match=r"(is|are) (not finite|nan|inf|-inf|\[)"):
            call()


def test_the_prompt_after_which_logits_are_not_finite_is_named():
    subject = small("llama")
    subject.model.lm_head.weight = torch.nn.Parameter(subject.model.lm_head.weight.detach().clone())
    with torch.no_grad():
        subject.model.model.embed_tokens.weight[int(subject.tokenizer("q")["input_ids"][0])] = float("nan")
    with pytest.raises(NotFinite, match="the logits after the prompt 'a q' and 0 further tokens are not finite"):
        generate(subject, ["hello", "a q"], max_new_tokens=1)


def check_table(pair, stemmer: bool = True) -> None:
    found = rouge([pair[0]], [pair[1]], stemmer=stemmer)
    assert [v[0] for v in vars(found).values()] == pytest.approx(TABLE[pair], abs=1e-12)


@pytest.mark.parametrize("pair", TABLE, ids=" | ".join)
def test_rouge_is_the_published_one(pair):
    check_table(pair)


def test_stems_matter():
    with pytest.raises(AssertionError):
        check_table(("running quickly", "he runs quick"), stemmer=False)
    assert rouge(["running quickly"], ["he runs quick"], stemmer=False).rougeL_f1 == 0


def test_rouge_keeps_every_text():
    found = rouge(*zip(*TABLE, strict=True))
    assert found.rougeL_f1 == pytest.approx([values[2] for values in TABLE.values()], abs=1e-12)
    assert "7 texts" in repr(found)


def test_an_exact_match_is_the_whole_output():
    references = ["Madera", "Lorianne.", "a b", "x"]
    found = exact_match(references, [" madera\n", "Lorianne", "a  b", "x and more"])
    assert np.array_equal(found, [True, False, False, False])


CHAT = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def test_the_chat_template_is_used_where_asked_for_alone():
    subject = small("llama")
    subject.tokenizer.chat_template = CHAT
    asked = continuations(subject, ["<s>user: hello\nassistant:"], tokens=4)
    assert generate(subject, ["hello"], max_new_tokens=4, chat=True) == asked
    assert generate(subject, ["hello"], max_new_tokens=4) != asked


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: generate(small("llama"), ["a"], max_new_tokens=0), ArgumentError, "max_new_tokens=0; give at least 1"),
    (lambda: generate(small("llama"), ["a"], batch_size=0), ArgumentError, "batch_size=0; give at least 1"),
    (lambda: generate(replace(small("llama"), tokenizer=None), ["a"]), ArgumentError, "this needs a tokenizer"),
    (lambda: generate(small("llama"), ["a"], chat=True), ArgumentError, "the tokenizer has no chat template; leave chat out"),
    (lambda: generate(small("llama"), [""]), DataError, "the prompt '' has no token; give a text"),
    (lambda: generate(small("llama"), ["a" * 200], max_new_tokens=100), DataError,
     "has 200 tokens, the model reads 256: no room for max_new_tokens=100"),
    (lambda: rouge(["a"], []), DataError, "1 references and 0 outputs; give one output for each reference"),
    (lambda: exact_match([], []), DataError, "0 references and 0 outputs"),
])  # fmt: skip
def test_what_cannot_be_written_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_without_the_package_rouge_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(MissingDependency, match=r"pip install rouge-score==0\.1\.2"):
        rouge(["a"], ["a"])
