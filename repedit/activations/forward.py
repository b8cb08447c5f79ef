"""Forward passes over a corpus: batches on the device of the model, smaller ones when memory runs out, the loss, and prefix trees."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from repedit.arch import HookFn, hooks_at
from repedit.data import Batch, Batches, Corpus, Facts, Rows
from repedit.errors import DataError, OffloadedTensors, RepeditError, check_whole, during, is_whole
from repedit.hooks import evaluating, installed
from repedit.models.subject import Subject
from repedit.sites import Site

T = TypeVar("T")

# --- Smaller batches when memory runs out


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine ran out of memory; errors that repedit raises itself do not count."""
    if isinstance(error, RepeditError):
        return False
    # On a CPU torch raises a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


def retry_with_smaller_batch(run: Callable[[int], T], size: int) -> tuple[T, int]:
    """(run(size), size), where the size is halved until memory suffices.

    Raises:
        Exception: the error of `run`, if memory does not suffice for a size of 1 either or the error is another one.
    """
    while True:
        try:
            return run(size), size
        except (MemoryError, RuntimeError) as error:
            if size <= 1 or not is_out_of_memory(error):
                raise
        size //= 2


# --- Feeding a corpus to a model


def batches(
    subject: Subject, corpus: Batches, length: int, batch_size: int, progress: bool | None, label: str
) -> Iterator[Batch]:
    """The batches of a corpus on the device of the model, with a progress bar if the output is a terminal.

    Raises:
        ArgumentError: if the length or the batch size is not an integer of at least 1.
        OffloadedTensors: if the model has no values.
    """
    check_whole(length=length, batch_size=batch_size)
    if subject.device.type == "meta":
        raise OffloadedTensors(
            "the model is on the meta device, where weights have shapes and no values; load its weights"
        )
    items = list(batches_of(subject, corpus, length=length, batch_size=batch_size))
    for batch in tqdm(
        items, desc=f"{label} {corpus.name}", disable=None if progress is None else not progress, leave=False
    ):
        values = {f.name: getattr(batch, f.name) for f in fields(batch)}
        yield replace(batch, **{name: v.to(subject.device) for name, v in values.items() if isinstance(v, Tensor)})


def batches_of(subject: Subject, corpus: Batches, *, length: int = 128, batch_size: int = 8) -> Iterator[Batch]:
    """The batches of a corpus in the tokens of a model, each checked before it is used.

    Raises:
        ArgumentError: if the corpus is text and the model has no tokenizer.
        DataError: if a token id or position is out of the model's range, with the document or row.
    """
    tokenizer = subject.need_tokenizer() if isinstance(corpus, Corpus | Rows | Facts) else subject.tokenizer
    for batch in corpus.batches(tokenizer, length=length, batch_size=batch_size):
        ids, mask = batch.input_ids, batch.attention_mask
        unpadded_left = not ids.numel() or bool(mask[:, 0].all())
        for row, name in enumerate(batch.document):
            # Padding on the right takes up positions, on the left none; both kinds go through the embedding.
            size = ids.shape[1] if unpadded_left else int(mask[row].sum())
            check_ids(subject, ids[row].tolist(), f"corpus {corpus.name!r}, row {name!r}", size=size)
        yield batch


def check_ids(subject: Subject, ids: Sequence[int], where: str, *, size: int | None = None) -> None:
    """Refuse token ids without an embedding, and sequences longer than the model has positions.

    Args:
        size: number of positions taken; the number of ids when None.
    Raises:
        DataError: with the first such id and its index, or both lengths.
    """
    table, limit = subject.model.get_input_embeddings(), max_positions(subject)
    rows = getattr(table, "num_embeddings", None) or table.weight.shape[0]
    if ids and not (min(ids) >= 0 and max(ids) < rows):
        at = next(i for i, token in enumerate(ids) if not 0 <= token < rows)
        raise DataError(
            f"{where}: token {at} has the id {ids[at]}, the model has embeddings for 0 to {rows - 1}; give the tokenizer that "
            "belongs to the model, or resize its embeddings (model.resize_token_embeddings)"
        )
    size = len(ids) if size is None else size
    if limit is not None and size > limit:
        raise DataError(
            f"{where} has {size} tokens, the model has {limit} positions; shorten it, or give a lower length"
        )


def max_positions(subject: Subject) -> int | None:
    """Number of positions of the model; None where positions are computed, as rotary ones are."""
    config = subject.model.config.get_text_config()
    if getattr(config, "rope_parameters", None):
        return None
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)


def inputs_of(batch: Batch) -> dict[str, Any]:
    """The arguments of a model's forward pass for a batch.

    Position ids are given where a row is padded on the left: GPT-2 and GPT-Neo would count the padding.
    """
    mask = batch.attention_mask
    inputs = {"input_ids": batch.input_ids, "attention_mask": mask.long(), "use_cache": False}
    return inputs if bool(mask[:, 0].all()) else inputs | {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def at_least_float32(x: Tensor) -> Tensor:
    """x, with half-precision types widened: log-probabilities in bfloat16 are coarse."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def loss_of(logits: Float[Tensor, "b t v"], batch: Batch, mask: Bool[Tensor, "b t"]) -> Float[Tensor, ""]:
    """Summed negative log-likelihood, each token predicted from the position before it.

    The tokens are the answers if the batch marks them, and the counted tokens otherwise.
    """
    use = batch.attention_mask[:, :-1] & (mask if batch.answer is None else batch.answer)[:, 1:]
    picked = at_least_float32(logits[:, :-1][use]).log_softmax(-1)
    return -picked.gather(1, batch.input_ids[:, 1:][use][:, None]).sum()


def note_batch_on_error(number: int) -> AbstractContextManager[None]:
    """Add the number of the batch to an error; no batch is skipped."""
    return during(f"batch {number}", f"in batch {number} of the corpus; no batch was skipped")


# --- Prompts of equal length together, so that none is padded


def lengths(prompts: Sequence[Sequence[int]], rows: int) -> Iterator[list[int]]:
    """Groups of at most `rows` indices of prompts of equal length, so that no prompt is padded."""
    for length in sorted({len(ids) for ids in prompts}):
        group = [i for i, ids in enumerate(prompts) if len(ids) == length]
        yield from (group[i : i + rows] for i in range(0, len(group), rows))


def captured(
    subject: Subject,
    prompts: Sequence[list[int]],
    sites: Sequence[Site],
    keep: Callable[[Tensor], Tensor] = lambda x: x,
    rows: int = 32,
) -> Iterator[tuple[list[int], dict[Site, Tensor]]]:
    """(indices of prompts, keep(x) at each site) for prompts of equal length, so that no padding is needed.

    x has shape (b, t, d). Results are on the CPU in at least float32. The head is not run, and all hooks are removed.
    """
    for i, tokens in enumerate(prompts):
        check_ids(subject, tokens, f"prompt {i}")
    for part in lengths(prompts, rows):
        ids = torch.tensor([prompts[i] for i in part], device=subject.device)
        by_site: dict[Site, Tensor] = {}
        visits = {site: _storing(by_site, site, ids.shape, keep) for site in sites}
        hooks = [
            hook
            for site, visit in visits.items()
            for hook in hooks_at(subject.model, subject.layout, site, visit, replaces=False)
        ]
        with torch.no_grad(), evaluating(subject.model), installed(subject.model, hooks):
            subject.model.base_model(input_ids=ids, use_cache=False)
        yield part, by_site


def _storing(by_site: dict[Site, Tensor], site: Site, shape: torch.Size, keep: Callable[[Tensor], Tensor]) -> HookFn:
    def visit(x: Tensor, _at: slice, _tokens: Tensor | None) -> None:
        # OPT flattens its tokens before the MLP.
        by_site[site] = at_least_float32(keep(x.reshape(*shape, -1)).detach()).cpu().clone()

    return visit


# --- Texts that begin alike, read as a prefix tree: nothing is padded and no beginning is read twice. The nodes are tokens.
# A token attends to itself and to those before it in its text (tree attention) and has the position that it has there, so
# every hidden state, log-probability and gradient is that of the texts read one by one, up to rounding. A model that mixes
# tokens by anything but attention under this mask cannot be read so; `tree_capacity` compares both ways on the model.


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
