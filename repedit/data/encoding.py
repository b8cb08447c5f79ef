"""Text as the token ids a model is to read: the one place where a tokenizer is asked.

The special tokens that a tokenizer puts before a text by itself stand there once, also where the text carries them in
writing; those that it puts after a text are left out, since something follows: an answer, a continuation, a next chunk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from repedit.data.grading import SPACELESS
from repedit.errors import ArgumentError, DataError
from repedit.io.text import check_text

# Texts whose tokens are looked for among those that the tokenizer adds; the first one that it has ordinary tokens for.
_PROBES = ("a", "1", "the", "一")
# After these no space is written: letters of scripts without spaces, their punctuation, full-width forms.
_NO_SPACE = re.compile(f"[{SPACELESS}\u3000-\u303f\uff00-\uff65]$")


class Encoded(NamedTuple):
    """The token ids of a text, and where its answer begins."""

    ids: list[int]
    start: int


def beginning(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before every text by itself, a special one that is repeated only once.

    Raises:
        DataError: if the tokens of a text are not among those that it gives with its special tokens.
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
        # No ordinary token at all: whatever it adds can only be told by name.
        ends, starts = _named_ids(tokenizer, "eos", "sep"), _named_ids(tokenizer, "bos", "cls")
        added = [i for i in added if i not in ends - starts]
    return [i for n, i in enumerate(added) if not n or i != added[n - 1] or i not in special]


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text alone, without the beginning that the tokenizer adds, also where the text carries it."""
    ids = _bare(tokenizer, text)
    special = getattr(tokenizer, "all_special_ids", ())
    if not ids or ids[0] not in special:
        return ids
    start = beginning(tokenizer)
    size = next((k for k in range(len(start), 0, -1) if ids[:k] == start[-k:]), 0)
    if size:
        written = tokenizer.decode(start[-size:])
        # What follows is tokenised as the beginning of a text, which it is.
        return text_ids(tokenizer, text.removeprefix(written)) if text.startswith(written) else ids[size:]
    return _once(tokenizer, ids)


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text that goes on: the tokenizer's own beginning once, the text, and no end."""
    return beginning(tokenizer) + text_ids(tokenizer, text)


def check_open(tokenizer: Any, ids: Sequence[int], where: str) -> None:
    """Refuse a prompt that is over: its last token ends a text and begins none.

    Raises:
        DataError: with the token.
    """
    ends, starts = _named_ids(tokenizer, "eos", "sep"), _named_ids(tokenizer, "bos", "cls")
    if ids and ids[-1] in ends - starts and ids[-1] not in beginning(tokenizer):
        raise DataError(f"{where} ends in {tokenizer.decode([ids[-1]])!r}, after which a text is over; take it out")


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation in the tokenizer's chat template, up to where the model is to answer.

    Raises:
        ArgumentError: if there is no chat template.
        DataError: if a message is none, or the template refuses the conversation.
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
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    # A template is a program of the checkpoint's author and fails in any way it likes.
    except Exception as error:
        roles = [turn["role"] for turn in turns]
        raise DataError(
            f"the chat template of the tokenizer refuses messages of the roles {roles}: {type(error).__name__}: {error}; give "
            "a conversation that it takes, or a text to continue"
        ) from error


def chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The ids of a conversation; the template writes the special tokens itself.

    Raises:
        ArgumentError, DataError: as `chat_text` does.
    """
    return _once(tokenizer, _bare(tokenizer, chat_text(tokenizer, messages)))


def joined(prompt: str, answer: str) -> str:
    """Prompt, one space and answer.

    The space is not written where the prompt is empty, ends in white space or in a script that writes none, or where the
    answer begins with a line break or tab; a space that the answer brings is taken for this one.
    """
    if not prompt or (prompt[-1].isspace() and prompt[-1] != " ") or answer[:1] in ("\n", "\t", "\r"):
        return prompt + answer
    return prompt + ("" if prompt[-1] == " " or _NO_SPACE.search(prompt) else " ") + answer.lstrip(" ")


def encoded(tokenizer: Any, prompt: str, answer: str) -> Encoded:
    """The tokens of prompt and answer as one text, and the index of the answer's first token.

    The answer begins where the tokens of the whole text leave those of the prompt alone.

    Raises:
        DataError: if the prompt is over.
    """
    start, asked, ids = beginning(tokenizer), text_ids(tokenizer, prompt), text_ids(tokenizer, joined(prompt, answer))
    check_open(tokenizer, asked, f"the prompt {prompt[-40:]!r}")
    return Encoded(start + ids, len(start) + shared(ids, asked))


def question_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The ids after which a model writes the answer itself; the last spaces are the answer's.

    Raises:
        DataError: if the prompt is over.
    """
    ids = text_ids(tokenizer, prompt.rstrip(" "))
    check_open(tokenizer, ids, f"the prompt {prompt[-40:]!r}")
    return beginning(tokenizer) + ids


def entity_end(tokenizer: Any, prompt: str, entity: str) -> int | None:
    """Index of the token that holds the last letter of the entity's last mention in the prompt; None without one."""
    mentions = list(re.finditer(rf"(?<!\w){re.escape(entity)}(?!\w)", prompt, re.IGNORECASE)) if entity else []
    if not mentions:
        return None
    upto = text_ids(tokenizer, prompt[: mentions[-1].end()])
    same = shared(upto, text_ids(tokenizer, prompt))
    return len(beginning(tokenizer)) + min(same, len(upto) - 1)


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _bare(tokenizer: Any, text: str) -> list[int]:
    """What the tokenizer gives for a text without the special tokens that it adds."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _named_ids(tokenizer: Any, *names: str) -> set[int]:
    """The ids of special tokens by name, those that the tokenizer has."""
    ids = (getattr(tokenizer, f"{name}_token_id", None) for name in names)
    return {i for i in ids if i is not None}


def _once(tokenizer: Any, ids: list[int]) -> list[int]:
    """Ids that begin with the beginning-of-sequence token at most once."""
    bos = getattr(tokenizer, "bos_token_id", None)
    while bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
        ids = ids[1:]
    return ids
