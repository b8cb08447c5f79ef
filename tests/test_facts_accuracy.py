"""facts_accuracy: known answers on a handmade model, and one reading of a text a time as the reference."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PretrainedConfig

import repedit as rp
from repedit.data import Fact, Facts
from repedit.edit import Edit
from repedit.errors import ArgumentError, DataError, NotFinite, UnknownName
from repedit.metrics import facts
from repedit.metrics.facts import FactsAccuracy, facts_accuracy
from repedit.metrics.generation import continuations
from repedit.models.subject import Subject
from tests.char_tokenizer import CharTokenizer
from tests.saved_models import byte_tokenizer, merging_tokenizer
from tests.tiny import FAMILIES, VOCABULARY, tiny
from tests.tolerances import close

letters = st.text("abcde", min_size=1, max_size=4)


class Bigrams(torch.nn.Module):
    """A model whose next token depends on the last one alone, by a table of log-probabilities (v, v)."""

    config = PretrainedConfig()

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = table

    def get_input_embeddings(self):
        return SimpleNamespace(weight=self.table)

    def forward(self, input_ids, logits_to_keep=0, **_):
        cache = SimpleNamespace(batch_select_indices=lambda rows: None)
        return SimpleNamespace(logits=self.table[input_ids][:, -logits_to_keep:], past_key_values=cache)


def bigrams(chances: dict[str, float], tokenizer=None) -> Subject:
    """A subject that gives the letter b after the letter a the chance chances["ab"], the rest shared evenly."""
    tokenizer = tokenizer or CharTokenizer()
    table = torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.float64)
    for first in {pair[0] for pair in chances}:
        row = {tokenizer(pair[1])["input_ids"][-1]: p for pair, p in chances.items() if pair[0] == first}
        line = torch.full((VOCABULARY,), (1 - sum(row.values())) / (VOCABULARY - len(row)), dtype=torch.float64)
        line[list(row)] = torch.tensor(list(row.values()), dtype=torch.float64)
        table[tokenizer(first)["input_ids"][-1]] = line
    return Subject(Bigrams(table.log()), tokenizer, tiny("llama").architecture)


def fact(number: int = 0, **changes) -> Fact:
    values = {"id": f"f{number}", "prompt": "q", "answer": "a", "choices": ("a", "b")}
    return Fact(**(values | changes))


def plainly(subject: Subject, item: Fact, choice: str) -> float:
    """The log-probability of a choice: the whole text read alone, nothing shared, nothing padded."""
    prefix = subject.tokenizer("")["input_ids"]
    ids, start = (
        [*prefix, *subject.tokenizer(text, add_special_tokens=False)["input_ids"]]
        for text in (f"{item.prompt} {choice}", item.prompt)
    )
    with torch.no_grad():
        logs = subject.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
    return float(sum(logs[i - 1, ids[i]] for i in range(len(start), len(ids))))


def check_scores(subject: Subject, items, **options) -> None:
    """The law: the graded score is the plain one, and right means strictly above every other choice."""
    found = facts_accuracy(subject, items, **options)
    for i, item in enumerate(items):
        scores = {choice: plainly(subject, item, choice) for choice in item.choices}
        own = scores.pop(item.answer)
        close(found.graded[i], own, "model, float32")
        margin = own - max(scores.values())
        assert abs(margin) < 4e-4 or bool(found.correct[i]) == (margin > 0)
    assert found.ids == tuple(item.id for item in items)


ITEMS = (
    fact(0, prompt="where is it", answer="bad", choices=("bad", "bade", "bac", "c", "cab")),
    fact(1, prompt="or", answer="cab", choices=("abba", "abca", "cab")),
    fact(2, prompt="what is it", answer="e", choices=("d", "e")),
    fact(3, prompt="where am i", answer="dec", choices=("dea", "dec", "ecd")),
)


def read_row_by_row(monkeypatch):
    monkeypatch.setattr(facts, "tree_capacity", lambda subject: 0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tree", [True, False], ids=["tree", "rows"])
def test_scores_are_those_of_reading_each_text_alone(family, tree, monkeypatch):
    if not tree:
        read_row_by_row(monkeypatch)
    check_scores(replace(tiny(family), tokenizer=CharTokenizer(bos=family != "gpt2")), ITEMS)


@given(
    asked=st.lists(st.tuples(letters, st.lists(letters, min_size=2, max_size=5, unique=True)), min_size=1, max_size=5),
    batch_size=st.integers(1, 5),
)
@settings(max_examples=25, deadline=None)
def test_batch_size_and_company_do_not_matter(asked, batch_size):
    items = tuple(fact(i, prompt=p, answer=c[0], choices=tuple(c)) for i, (p, c) in enumerate(asked))
    check_scores(replace(tiny("qwen2"), tokenizer=CharTokenizer()), items, batch_size=batch_size)


BROKEN = {
    "every beginning on the first prompt's cache": ("_children", lambda plain: lambda n, q: ([0] * len(plain(n, q)[0]), plain(n, q)[1])),
    "the last token of a choice only": ("_next_tokens", lambda plain: lambda n, q: [e for e in plain(n, q) if len(n[1]) + 1 == len(q[n[0]].answers[e[0]])]),
    "logits for log-probabilities": ("_token_logs", lambda plain: lambda x, rows, tokens: x[rows, tokens].double().tolist()),
    "prompts of all lengths together, cut to the shortest": (
        "_question",
        lambda plain: lambda *a: plain(*a)._replace(prompt=plain(*a).prompt[:3]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_scoring_is_caught(name, monkeypatch):
    part, broken = BROKEN[name]
    read_row_by_row(monkeypatch)
    monkeypatch.setattr(facts, part, broken(getattr(facts, part)))
    with pytest.raises(AssertionError):
        check_scores(replace(tiny("llama"), tokenizer=CharTokenizer()), ITEMS)


def test_known_answers():
    subject = bigrams({"q ": 1.0, " a": 0.5, " b": 0.3, "bc": 0.9, " c": 0.1})
    found = facts_accuracy(subject, (fact(0), fact(1, answer="b"), fact(2, answer="bc", choices=("bc", "c"))))
    assert found.correct.tolist() == [True, False, True]
    assert found.graded.tolist() == pytest.approx([math.log(0.5), math.log(0.3), math.log(0.27)], abs=1e-6)
    assert found.accuracy == pytest.approx(2 / 3)


def test_a_mean_a_token_can_prefer_what_the_sum_does_not():
    # " " and "a": 0.5; " ", "b" and "c": 0.4 * 0.8.
    subject = bigrams({"q ": 1.0, " a": 0.4, " b": 0.3, "bc": 0.99})
    item = fact(answer="bc", choices=("a", "bc"))
    found = {rule: facts_accuracy(subject, (item,), rule=rule) for rule in ("sum", "mean")}
    assert [bool(found[rule].correct[0]) for rule in ("sum", "mean")] == [False, True]
    assert found["mean"].graded[0] == pytest.approx(math.log(0.297) / 3, abs=1e-6)


def test_ties_are_wrong():
    subject = bigrams({"q ": 1.0, " a": 0.25, " b": 0.25, " c": 0.1})
    assert not facts_accuracy(subject, (fact(),)).correct[0]
    assert facts_accuracy(subject, (fact(choices=("a", "c")),)).correct[0]


def test_choices_merged_with_the_prompt_are_compared_from_one_place():
    subject = replace(tiny("llama", vocab_size=300), tokenizer=merging_tokenizer(("s", " ")))
    item = fact(prompt="it is", answer="dog", choices=("dog", "cat"))
    found = facts_accuracy(subject, (item,))
    ids = subject.tokenizer("it is dog")["input_ids"]
    with torch.no_grad():
        logs = subject.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    own = sum(float(logs[i - 1, ids[i]]) for i in range(4, len(ids)))
    assert subject.tokenizer.decode(ids[4:]) == "s dog"
    close(found.graded[0], own, "model, float32")


def test_an_active_edit_is_seen():
    subject = replace(tiny("llama"), tokenizer=CharTokenizer())
    edit = Edit({rp.Site.parse("0.mlp.neurons"): rp.Diagonal.mask(torch.arange(40) > 20)})
    before = facts_accuracy(subject, ITEMS).graded
    with edit.hooked(subject):
        check_scores(subject, ITEMS)
        assert abs(facts_accuracy(subject, ITEMS).graded - before).max() > 0.01
    assert (facts_accuracy(subject, ITEMS).graded == before).all()


def test_bfloat16_is_scored_in_float32():
    subject = replace(tiny("llama", torch.bfloat16), tokenizer=CharTokenizer())
    found = facts_accuracy(subject, (fact(prompt="what is it ", answer="e", choices=("d", "e")),))
    ids = [subject.tokenizer(text)["input_ids"] for text in ("what is it ", "e")]
    with torch.no_grad():
        logits = subject.model(input_ids=torch.tensor(ids[:1])).logits[0, -1]
    close(found.graded[0], float(logits.double().log_softmax(-1)[ids[1][-1]]), "model, float32")


@pytest.mark.parametrize(("text", "correct"), [
    (" Paris, which", True), ("\nparís!", True), (" It is Paris", True), (" Parisian", False), ("", False),
])  # fmt: skip
def test_greedy_looks_for_the_answer_as_words(text, correct, monkeypatch):
    monkeypatch.setattr(facts, "greedy_continuations", lambda subject, ids, tokens, names: [text] * len(ids))
    item = fact(answer="Paris", choices=())
    found = facts_accuracy(replace(tiny("llama"), tokenizer=CharTokenizer()), (item,), how="greedy")
    assert bool(found.correct[0]) is correct and found.graded[0] < 0


def test_greedy_writes_as_many_tokens_as_the_longest_answer_and_four(monkeypatch):
    subject = replace(tiny("llama", vocab_size=260), tokenizer=byte_tokenizer())
    items = [fact(i, prompt="ab" * (1 + i % 2), answer="abcde", choices=()) for i in range(5)]
    seen, plain = [], facts.greedy_continuations
    monkeypatch.setattr(facts, "greedy_continuations", lambda *a: seen.append((a[1], a[2], plain(*a))) or seen[-1][2])
    facts_accuracy(subject, items, how="greedy", batch_size=2)
    assert [(len(ids), len(ids[0])) for ids, _, _ in seen] == [(2, 2), (1, 2), (2, 4)]
    for ids, tokens, texts in seen:
        prompt = subject.tokenizer.decode(ids[0])
        assert tokens == 6 + 4 and texts == list(continuations(subject, [prompt] * len(ids), tokens=10))


def test_facts_stand_for_those_to_forget():
    subject = replace(tiny("llama"), tokenizer=CharTokenizer())
    assert facts_accuracy(subject, Facts(ITEMS[:2], ITEMS[2:])).ids == ("f0", "f1")
    assert facts_accuracy(subject, iter(ITEMS)).ids == ("f0", "f1", "f2", "f3")


@pytest.mark.parametrize(
    ("right", "count", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (96, 100, 0.9016, 0.9843)]
)
def test_the_interval_is_wilsons(right, count, low, high):
    import numpy as np

    found = FactsAccuracy(np.arange(count) < right, np.zeros(count), tuple(map(str, range(count))))
    assert found.interval == pytest.approx((low, high), abs=1e-4)
    assert repr(found).startswith(f"FactsAccuracy({right / count:.3f} of {count} facts, 95 % interval {low:.3f}")


@pytest.mark.parametrize(
    ("items", "options", "error", "message"),
    [
        (ITEMS, {"how": "chioce"}, UnknownName, "how='chioce'; did you mean 'choice'"),
        (ITEMS, {"rule": "max"}, UnknownName, "rule='max'; did you mean 'mean'"),
        (ITEMS, {"batch_size": 0}, ArgumentError, "batch_size=0; give 'auto' or a number of rows, at least 1"),
        (ITEMS, {"batch_size": "all"}, ArgumentError, "batch_size='all'; give 'auto'"),
        ((), {}, DataError, "there are no facts to score; give at least one"),
        ((fact(choices=()),), {}, DataError, "fact 'f0' has no choices; give some, or how='greedy'"),
        ((fact(choices=("a", chr(ord("a") + 58))),), {}, DataError, "fact 'f0': the choices 'a' and .* are the same tokens; reword one"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused(items, options, error, message):
    with pytest.raises(error, match=message):
        facts_accuracy(replace(tiny("llama"), tokenizer=CharTokenizer()), items, **options)


def test_a_prompt_without_a_token_is_refused():
    tokenizer = merging_tokenizer(("q", " "))
    with pytest.raises(DataError, match="fact 'f0': no token stands before the answer; give a longer prompt"):
        facts_accuracy(replace(tiny("llama", vocab_size=300), tokenizer=tokenizer), (fact(),))


def test_an_infinite_logarithm_is_refused():
    subject = bigrams({"q ": 1.0, " a": 0.5, " b": 0.0})
    with pytest.raises(NotFinite, match=r"fact 'f0': the log-probabilities of \['a', 'b'\] are .*-inf.*float32"):
        facts_accuracy(subject, (fact(),))
