"""From text to the token ids that a model reads; no other module calls a tokenizer to encode.

The special tokens that a tokenizer adds before a text appear once, even if the text already contains them. The ones
that it adds after a text are left out, because something follows: an answer, a continuation or the next chunk.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from operator import methodcaller
from typing import Any, NamedTuple, Protocol, runtime_checkable

from repedit.data.grading import SPACELESS, mentions
from repedit.errors import ArgumentError, DataError
from repedit.io.text import check_text

# Texts by which the added special tokens are located; the first one that has ordinary tokens is used.
_PROBES = ("a", "1", "the", "一")
# No space follows these: letters of scripts without spaces, their punctuation, full-width forms.
_NO_SPACE = re.compile(f"[{SPACELESS}\u3000-\u303f\uff00-\uff65]$")


@runtime_checkable
class Tokenizer(Protocol):
    """What repedit needs of a tokenizer; those of transformers have it."""

    # Other members, such as decode and pad_token_id, may be proxied by __getattr__, which a runtime check cannot see.
    def __call__(self, text: str, /, *, add_special_tokens: bool = True) -> Any: ...


class Encoded(NamedTuple):
    """The token ids of a text, and where its answer begins."""

    ids: list[int]
    start: int


def prefix_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that the tokenizer adds before every text; a repeated special token counts once.

    Raises:
        DataError: if the ids of a text without special tokens do not occur among its ids with them.
    """
    special = set(getattr(tokenizer, "all_special_ids", ()))
    probes = [(probe, _bare(tokenizer, probe)) for probe in _PROBES]
    probe, bare = next(((p, ids) for p, ids in probes if ids and not special & set(ids)), (_PROBES[0], probes[0][1]))
    whole = list(tokenizer(probe)["input_ids"])
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), len(whole)) if bare else len(whole)
    if bare and at == len(whole):
        raise DataError(
            f"the tokenizer gives {bare} for {probe!r} without its special tokens and {whole} with them; it changes the text "
            "itself, so no prompt can be continued: give one that only adds tokens"
        )
    added = whole[:at]
    if not bare:
        # No probe has an ordinary token: the added tokens can be recognized by name only.
        ends, starts = _named_ids(tokenizer, "eos", "sep"), _named_ids(tokenizer, "bos", "cls")
        added = [i for i in added if i not in ends - starts]
    return [i for n, i in enumerate(added) if not n or i != added[n - 1] or i not in special]


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text without the prefix that the tokenizer adds, even if the text contains that prefix."""
    ids = _bare(tokenizer, text)
    special = getattr(tokenizer, "all_special_ids", ())
    if not ids or ids[0] not in special:
        return ids
    start = prefix_ids(tokenizer)
    size = next((k for k in range(len(start), 0, -1) if ids[:k] == start[-k:]), 0)
    if size:
        written = _decoded(tokenizer, start[-size:])
        # The rest is tokenized as the start of a text, which it is.
        return text_ids(tokenizer, text.removeprefix(written)) if text.startswith(written) else ids[size:]
    return _once(tokenizer, ids)


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text to be continued: the tokenizer's prefix once, the text, and no end token."""
    return prefix_ids(tokenizer) + text_ids(tokenizer, text)


def check_not_ended(tokenizer: Tokenizer, ids: Sequence[int], where: str) -> None:
    """Refuse a prompt whose last token ends a text.

    Raises:
        DataError: with the token.
    """
    ends, starts = _named_ids(tokenizer, "eos", "sep"), _named_ids(tokenizer, "bos", "cls")
    if ids and ids[-1] in ends - starts and ids[-1] not in prefix_ids(tokenizer):
        raise DataError(f"{where} ends in {_decoded(tokenizer, [ids[-1]])!r}, which ends a text; remove it")


def chat_text(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation in the tokenizer's chat template, up to the point where the model answers.

    Raises:
        ArgumentError: if there is no chat template.
        DataError: if a message is malformed, or the template refuses the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ArgumentError("the tokenizer has no chat template for a conversation; give a text to continue")
    turns = list(messages)
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not {"role", "content"} <= set(turn):
            raise DataError(f"message {number} is {turn!r}; give a mapping with role and content")
        for field in ("role", "content"):
            check_text(turn[field], f"message {number}: the {field}")
    try:
        apply: Any = getattr(tokenizer, "apply_chat_template")  # noqa: B009
        return str(apply(turns, tokenize=False, add_generation_prompt=True))
    # A template is a program in the checkpoint and can fail in any way.
    except Exception as error:
        roles = [turn["role"] for turn in turns]
        raise DataError(
            f"the chat template of the tokenizer refuses messages of the roles {roles}: {type(error).__name__}: {error}; give "
            "a conversation that it takes, or a text to continue"
        ) from error


def chat_ids(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The ids of a conversation; the template contains the special tokens.

    Raises:
        ArgumentError, DataError: as `chat_text` does.
    """
    return _once(tokenizer, _bare(tokenizer, chat_text(tokenizer, messages)))


def prompt_with_answer(prompt: str, answer: str) -> str:
    """Prompt, one space and answer.

    No space is added if the prompt is empty, or ends in white space or in a script without spaces, or if the answer
    begins with a line break or tab; a space at the start of the answer is not doubled.
    """
    if not prompt or (prompt[-1].isspace() and prompt[-1] != " ") or answer[:1] in ("\n", "\t", "\r"):
        return prompt + answer
    return prompt + ("" if prompt[-1] == " " or _NO_SPACE.search(prompt) else " ") + answer.lstrip(" ")


def encoded(tokenizer: Tokenizer, prompt: str, answer: str) -> Encoded:
    """The tokens of prompt and answer as one text, and the index of the answer's first token.

    The answer begins at the first token where the whole text and the prompt alone differ.

    Raises:
        DataError: if the prompt ends in an end token.
    """
    return encoded_choices(tokenizer, [(prompt, (answer,))])[0][0]


def encoded_choices(tokenizer: Tokenizer, questions: Sequence[tuple[str, Sequence[str]]]) -> list[tuple[Encoded, ...]]:
    """`encoded` for every prompt with each of its answers; a fast tokenizer is called once for all texts.

    Raises:
        DataError: if a prompt ends in an end token.
    """
    prefix = prefix_ids(tokenizer)
    whole_texts = [[prompt_with_answer(prompt, answer) for answer in answers] for prompt, answers in questions]
    prompts = [prompt for prompt, _ in questions]
    ids_of = _ids_by_text(tokenizer, chain(prompts, *whole_texts))
    encoded = []
    for prompt, texts in zip(prompts, whole_texts, strict=True):
        alone = ids_of[prompt]
        check_not_ended(tokenizer, alone, f"the prompt {prompt[-40:]!r}")
        encoded.append(
            tuple(Encoded(prefix + ids_of[text], len(prefix) + common_prefix(ids_of[text], alone)) for text in texts)
        )
    return encoded


def question_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids after which a model generates the answer; spaces at the end of the prompt are left to the answer.

    Raises:
        DataError: if the prompt ends in an end token.
    """
    ids = text_ids(tokenizer, prompt.rstrip(" "))
    check_not_ended(tokenizer, ids, f"the prompt {prompt[-40:]!r}")
    return prefix_ids(tokenizer) + ids


def entity_end(tokenizer: Tokenizer, prompt: str, entity: str) -> int | None:
    """Index of the token that holds the last letter of the entity's last mention in the prompt; None without one."""
    span = entity_span(tokenizer, prompt, entity)
    return None if span is None else span[1]


def entity_span(tokenizer: Tokenizer, prompt: str, entity: str) -> tuple[int, int] | None:
    """Indices of the tokens with the first and the last letter of the entity's last mention in the prompt; None without one.

    The tokenizer's prefix counts, as in `prompt_ids`.
    """
    span = mention(prompt, entity)
    if span is None:
        return None
    whole, offset = text_ids(tokenizer, prompt), len(prefix_ids(tokenizer))
    before, head = (text_ids(tokenizer, prompt[:at]) for at in span)
    last = min(common_prefix(head, whole), len(head) - 1)
    return offset + min(common_prefix(before, whole), last), offset + last


def mention(prompt: str, entity: str) -> tuple[int, int] | None:
    """Where the entity's last mention in the prompt begins and ends, in characters; None without one."""
    return next(reversed(mentions(prompt, entity)), None)


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """Length of the longest common prefix of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _decoded(tokenizer: Tokenizer, ids: list[int]) -> str:
    return str(methodcaller("decode", ids)(tokenizer))


def _bare(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text without added special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _ids_by_text(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, list[int]]:
    """`text_ids` of every text, each tokenized once."""
    distinct = [text for text in dict.fromkeys(texts) if text]
    special = frozenset(getattr(tokenizer, "all_special_ids", ()))
    # A wrapper that passes attributes on may take one text only, so its class is asked.
    if distinct and hasattr(type(tokenizer), "is_fast") and getattr(tokenizer, "is_fast", False):
        # One call for 2,000 texts takes a tenth of the time of 2,000 calls.
        call: Any = tokenizer
        ids = call(distinct, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    else:
        ids = [_bare(tokenizer, text) for text in distinct]
    ids_of = {
        text: text_ids(tokenizer, text) if i and i[0] in special else i for text, i in zip(distinct, ids, strict=True)
    }
    return {"": [], **ids_of}


def _named_ids(tokenizer: Tokenizer, *names: str) -> set[int]:
    """The ids of special tokens by name; names that the tokenizer lacks are skipped."""
    ids = (getattr(tokenizer, f"{name}_token_id", None) for name in names)
    return {i for i in ids if i is not None}


def _once(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The ids with at most one beginning-of-sequence token at their start."""
    bos = getattr(tokenizer, "bos_token_id", None)
    while bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
        ids = ids[1:]
    return ids
