"""One forward pass over texts with common beginnings, as a prefix tree: nothing is padded and no beginning is read twice.

The nodes of the tree are tokens. A token attends to itself and to those before it in its text (tree attention) and has
the position that it has there, so every hidden state, log-probability and gradient is that of the texts read one by one,
up to rounding. A model that mixes tokens by anything but attention under this mask cannot be read so; `tree_capacity`
compares both ways of reading on the model itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from repedit.activations.forward import at_least_float32, is_out_of_memory, max_positions
from repedit.errors import is_whole
from repedit.hooks import evaluating
from repedit.models.subject import Subject


class PrefixTree(NamedTuple):
    """Texts as a tree; a parent stands before its children."""

    tokens: list[int]
    """The token of each node."""
    parents: list[int]
    """The node before each node; -1 where a text begins."""
    paths: list[list[int]]
    """The nodes of each text, from the first token on."""


def prefix_tree(texts: Sequence[Sequence[int]]) -> PrefixTree:
    """The tree of texts in tokens; tokens with the same tokens before them are one node."""
    nodes: dict[tuple[int, int], int] = {}
    paths = _add(nodes, texts)
    return PrefixTree([token for _, token in nodes], [parent for parent, _ in nodes], paths)


def tree_logits(subject: Subject, tree: PrefixTree, nodes: Sequence[int]) -> Float[Tensor, "n v"]:
    """The logits that predict what follows some nodes; the model must read trees."""
    count, device = len(tree.tokens), subject.device
    before, depth = np.eye(count, dtype=bool), np.zeros(count, dtype=np.int64)
    for node, parent in enumerate(tree.parents):
        if parent >= 0:
            before[node] |= before[parent]
            depth[node] = depth[parent] + 1
    dtype = next(subject.model.parameters()).dtype
    # Added to attention scores: some implementations take no boolean mask.
    mask = torch.zeros(count, count, dtype=dtype).masked_fill_(~torch.from_numpy(before), torch.finfo(dtype).min)
    out = subject.model(
        input_ids=torch.tensor([tree.tokens], device=device), attention_mask=mask[None, None].to(device),
        position_ids=torch.from_numpy(depth)[None].to(device), use_cache=False,
        logits_to_keep=torch.tensor(nodes, device=device),
    )  # fmt: skip
    return out.logits[0]


def tree_log_probs(
    subject: Subject, texts: Sequence[Sequence[int]], scored: Sequence[Sequence[bool]]
) -> Float[Tensor, " n"]:
    """The log-probability of every scored token given those before it, text after text; first tokens have none.

    The output matrix is applied once to each node that a scored token follows and to no other.

    Args:
        scored: which tokens of each text are scored; the first of a text must not be.
    """
    ends = [max((i for i, on in enumerate(marks) if on), default=0) for marks in scored]
    # Nothing is read after the last token that predicts a scored one.
    tree = prefix_tree([text[:end] for text, end in zip(texts, ends, strict=True)])
    predictions = [
        (path[i - 1], text[i])
        for text, marks, path in zip(texts, scored, tree.paths, strict=True) for i, on in enumerate(marks) if on
    ]  # fmt: skip
    rows = {node: row for row, node in enumerate(dict.fromkeys(node for node, _ in predictions))}
    logits = at_least_float32(tree_logits(subject, tree, list(rows)))
    picked = torch.tensor([rows[node] for node, _ in predictions], device=logits.device)
    return (
        logits[picked, torch.tensor([token for _, token in predictions], device=logits.device)]
        - logits.logsumexp(-1)[picked]
    )


def tree_groups(items: Sequence[Sequence[Sequence[int]]], *, most: int, extra: int) -> Iterator[list[int]]:
    """The items, each of several texts, in groups to be read as one tree: those that begin alike come together.

    Args:
        most: items in a group.
        extra: nodes that a tree may have beyond those of its first item.
    """
    group, nodes, room = list[int](), dict[tuple[int, int], int](), 0
    for number in sorted(range(len(items)), key=lambda i: [list(text) for text in items[i]]):
        _add(nodes, items[number])
        if group and (len(nodes) > room or len(group) == most):
            yield group
            group, nodes = [], {}
            _add(nodes, items[number])
        if not group:
            room = len(nodes) + extra
        group.append(number)
    if group:
        yield group


def _add(nodes: dict[tuple[int, int], int], texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Put texts into a tree; the path of each."""
    paths = []
    for text in texts:
        path, parent = [], -1
        for token in text:
            parent = nodes.setdefault((parent, token), len(nodes))
            path.append(parent)
        paths.append(path)
    return paths


# --- Whether a model reads trees


_READS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_PROOF = ((0, 1, 2, 3, 4), (0, 1, 5), (0, 1, 2, 6, 7, 8), (9, 1, 2, 3))
"""Texts that share beginnings, and tokens under other beginnings."""
# Reading in another order changes the logits by 2e-6 of their norm in float32 (SmolLM2-135M); half types round by as much
# as a wrong mask might change, so they are not read as trees.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


_WINDOWS = ("window", "window_size", "chunk_size", "local_attention", "index_topk")
"""Ends of the names under which configs keep how far, or to how many tokens, a token attends."""


def tree_capacity(subject: Subject) -> int:
    """How many nodes a tree may have for a model to read it as it reads the texts one by one; 0 where it reads none.

    That it reads trees is proved on a few tokens of its own vocabulary, once a model. It reads none with hooks, which
    may look at places, and none in half types.
    """
    model = subject.model
    dtype = getattr(next(model.parameters(), None), "dtype", None)
    if dtype not in _TOLERANCE or any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return 0
    if model not in _READS:
        _READS[model] = _is_proved(subject, _TOLERANCE[dtype])
    return min(_limits(subject), default=sys.maxsize) if _READS[model] else 0


def _limits(subject: Subject) -> Iterator[int]:
    """Numbers of tokens beyond which a token may not attend to all before it."""
    positions = max_positions(subject)
    if positions is not None:
        yield positions
    for name, value in subject.model.config.get_text_config().to_dict().items():
        if name.endswith(_WINDOWS) and is_whole(value, 1):
            yield value


def _is_proved(subject: Subject, tolerance: float) -> bool:
    """Whether a tree gives the last tokens of texts the logits that reading the texts one by one gives them."""
    vocabulary = subject.model.get_input_embeddings().weight.shape[0]
    texts = [[(7 * place + 3) % vocabulary for place in text] for text in _PROOF]
    tree = prefix_tree(texts)
    with torch.no_grad(), evaluating(subject.model):
        alone = (torch.tensor([text], device=subject.device) for text in texts)
        expected = torch.cat([subject.model(input_ids=ids, use_cache=False).logits[:, -1] for ids in alone])
        try:
            logits = tree_logits(subject, tree, [path[-1] for path in tree.paths])
        except (
            ArithmeticError,
            AssertionError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            # A model that takes no such mask says so in its own way; its texts are then read row by row.
            if is_out_of_memory(error):
                raise
            return False
    return logits.shape == expected.shape and bool((logits - expected).norm() <= tolerance * expected.norm())
