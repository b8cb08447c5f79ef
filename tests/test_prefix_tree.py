"""Texts read as a prefix tree: the log-probabilities and gradients of the texts read one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from repedit.activations import forward as trees
from repedit.activations.forward import prefix_tree, tree_capacity, tree_groups, tree_log_probs
from repedit.models.subject import Subject
from tests.tiny import FAMILIES, tiny
from tests.tolerances import close, within

TEXTS = [[5, 9, 33, 7, 12], [5, 9, 33, 8], [5, 40, 41, 42, 43, 9], [11, 9, 33], [5, 9, 33, 7, 12, 3]]
SCORED = [[False, *[i % 3 != 1 for i in range(len(text) - 1)]] for text in TEXTS]
tokens = st.lists(st.integers(0, 3), min_size=2, max_size=6)


def one_by_one(subject, texts, scored):
    values = []
    for text, marks in zip(texts, scored, strict=True):
        logs = subject.model(input_ids=torch.tensor([text]), use_cache=False).logits[0].log_softmax(-1)
        values += [logs[i - 1, text[i]] for i, on in enumerate(marks) if on]
    return torch.stack(values)


def check_tree(subject, texts=TEXTS, scored=SCORED):
    """The law: log-probabilities and gradients are those of reading the texts one by one."""
    found, expected = tree_log_probs(subject, texts, scored), one_by_one(subject, texts, scored)
    close(found, expected, "gradient, float32")
    trained = [p.requires_grad_(True) for p in subject.model.parameters()]
    pair = [torch.autograd.grad(x.sum(), trained, allow_unused=True) for x in (found, expected)]
    flat = [torch.cat([g.flatten() for g in grads if g is not None]) for grads in pair]
    within(float((flat[0] - flat[1]).norm() / flat[1].norm()), "gradient, float32")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_is_read_as_its_texts(family):
    subject = tiny(family)
    assert tree_capacity(subject) >= 20
    with torch.enable_grad():
        check_tree(subject)


BROKEN = {
    "every token sees all before it in the tree": lambda tree: tree._replace(parents=list(range(-1, len(tree.parents) - 1))),
    "texts that begin unlike share their middle": lambda tree: tree._replace(parents=[min(p, 2) for p in tree.parents]),
    "paths end one token early": lambda tree: tree._replace(paths=[[path[0], *path[:-1]] for path in tree.paths]),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_trees_are_caught(name, monkeypatch):
    monkeypatch.setattr(trees, "prefix_tree", lambda texts: BROKEN[name](prefix_tree(texts)))
    with torch.enable_grad(), pytest.raises(AssertionError):
        check_tree(tiny("llama"))


def test_shifted_marks_are_caught():
    shifted = [[False, False, *marks[1:-1]] for marks in SCORED]
    found = tree_log_probs(tiny("llama"), TEXTS, shifted)
    expected = one_by_one(tiny("llama"), TEXTS, SCORED)
    assert found.shape != expected.shape or not torch.allclose(found, expected)


@given(st.lists(tokens, min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_a_node_is_a_beginning(texts):
    tree = prefix_tree(texts)
    beginnings = {tuple(text[: i + 1]) for text in texts for i in range(len(text))}
    assert len(tree.tokens) == len(beginnings) and all(p < i for i, p in enumerate(tree.parents))
    for text, path in zip(texts, tree.paths, strict=True):
        assert [tree.tokens[node] for node in path] == text
        assert [tree.parents[node] for node in path] == [-1, *path[:-1]]


@given(
    st.lists(st.lists(tokens, min_size=1, max_size=3), min_size=1, max_size=8), st.integers(1, 4), st.integers(0, 20)
)
@settings(max_examples=50, deadline=None)
def test_groups_hold_each_item_once_and_no_more_than_fits(items, most, extra):
    def nodes(numbers):
        return len(prefix_tree([text for number in numbers for text in items[number]]).tokens)

    groups = list(tree_groups(items, most=most, extra=extra))
    assert sorted(number for group in groups for number in group) == list(range(len(items)))
    assert all(len(group) <= most and nodes(group) <= nodes(group[:1]) + extra for group in groups)


def subject_around(model):
    return Subject(model.eval(), None, tiny("llama").architecture)


def strong(model):
    """Random weights large enough for attention to matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return subject_around(model)


def test_models_that_do_not_read_trees_are_known():
    sizes = {"hidden_size": 24, "vocab_size": 61}
    assert tree_capacity(strong(BloomForCausalLM(BloomConfig(**sizes, n_layer=2, n_head=4)))) == 0
    assert tree_capacity(strong(MambaForCausalLM(MambaConfig(**sizes, num_hidden_layers=2, state_size=4)))) == 0


def test_trees_are_not_longer_than_attention_reaches():
    config = MistralConfig(
        hidden_size=24, vocab_size=61, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=40, sliding_window=32,
    )  # fmt: skip
    assert tree_capacity(strong(MistralForCausalLM(config))) == 32
    assert tree_capacity(tiny("gpt2")) == tiny("gpt2").model.config.n_positions


def test_hooks_and_half_types_are_read_row_by_row():
    subject = tiny("llama")
    assert tree_capacity(subject)
    handle = subject.model.register_forward_pre_hook(lambda module, inputs: None)
    assert not tree_capacity(subject)
    handle.remove()
    assert tree_capacity(subject) and not tree_capacity(tiny("llama", dtype=torch.bfloat16))


def test_the_output_matrix_reads_no_token_twice(monkeypatch):
    asked = []
    plain = trees.tree_logits
    monkeypatch.setattr(trees, "tree_logits", lambda s, tree, nodes: asked.append(nodes) or plain(s, tree, nodes))
    tree_log_probs(tiny("llama"), [[1, 2, 3], [1, 2, 4], [1, 2, 5]], [[False, False, True]] * 3)
    assert np.array_equal(asked, [[1]])
