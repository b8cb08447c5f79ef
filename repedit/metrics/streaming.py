"""What models write, token by token and side by side; a step of a model reads one token, the rest is in its cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from repedit.activations.passes import check_ids
from repedit.data.encoding import chat_ids, check_open, prompt_ids
from repedit.errors import ArgumentError, DataError, NotFinite, check_seed, is_finite, is_whole
from repedit.hooks import evaluating
from repedit.io.text import check_text
from repedit.models import Subject

Message = Mapping[str, str]
"""A turn of a conversation: "role" (user, assistant or system) and "content"."""


@dataclass(frozen=True)
class Writing:
    """What a model has written so far."""

    tokens: tuple[int, ...] = ()
    """The token that ended it is the last one, if one did."""
    text: str = ""
    """Without special tokens, and without a character of which some bytes are still to come."""
    ended: str = ""
    """"" while it goes on, "stop" after a token that ends a text, "length" where no more tokens were allowed."""


def side_by_side(
    subjects: Sequence[Subject],
    prompts: Sequence[str | Sequence[Message]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[tuple[Writing, ...]]:
    """What every model has written, after each step in which each of them wrote one token more.

    At temperature 0 the most likely token is taken; otherwise one is drawn from softmax(logits / temperature), by a generator
    of its own for each model, so that no model's draws depend on another's. Of the model's own settings for generation
    only the tokens that end a text are used: no penalty, suppression or beam plays a part.

    Args:
        prompts: one for each model: a text to continue, or the messages of a conversation, for the chat template.
    Raises:
        ArgumentError: if a number is out of range, or a tokenizer or chat template is missing.
        DataError: if a prompt has no token, is over, leaves the model no room to go on, or the chat template refuses it.
        NotFinite: while it goes on, if logits are not finite.
    """
    if len(subjects) != len(prompts):
        raise ArgumentError(f"{len(subjects)} models and {len(prompts)} prompts; give one prompt a model")
    asked = [prompt_tokens(s, prompt, room=max_new_tokens) for s, prompt in zip(subjects, prompts, strict=True)]
    writers = [
        stream(subject, ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        for subject, ids in zip(subjects, asked, strict=True)
    ]
    return _together(writers)


def stream(
    subject: Subject, ids: Sequence[int], *, max_new_tokens: int = 256, temperature: float = 0.0, seed: int = 0
) -> Iterator[Writing]:
    """What a model has written after each further token; see `side_by_side`.

    Raises:
        ArgumentError: if a number is out of range.
        DataError: if there is no token, one that the model has no embedding for, or more tokens than it has positions.
        NotFinite: while it goes on, if logits are not finite.
    """
    check_seed(seed=seed)
    if not is_whole(max_new_tokens) or not is_finite(temperature) or temperature < 0:
        raise ArgumentError(
            f"max_new_tokens={max_new_tokens}, temperature={temperature}; give at least 1, and a number from 0 on"
        )
    if not ids:
        raise DataError("there is no token to go on from; give at least one")
    # The last token that is written is not read.
    check_ids(subject, ids, "the prompt", size=len(ids) + max_new_tokens - 1)
    return _written(subject, list(ids), max_new_tokens, temperature, seed)


def prompt_tokens(
    subject: Subject, prompt: str | Sequence[Message], *, room: int, called: str = "the prompt"
) -> list[int]:
    """The tokens of a text, or of a conversation in the tokenizer's chat template, up to where the model is to go on.

    Raises:
        ArgumentError: without a tokenizer, or for a conversation without a chat template.
        DataError: if there is no token, the last one ends a text, one is out of the model's range, or there is no room for so
            many more.
    """
    tokenizer = subject.need_tokenizer()
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        ids = chat_ids(tokenizer, prompt)
    else:
        check_text(prompt, called)
        ids = prompt_ids(tokenizer, prompt)
        check_open(tokenizer, ids, called)
    limit = getattr(subject.model.config.get_text_config(), "max_position_embeddings", None)
    if not ids:
        raise DataError(f"the prompt {prompt!r} has no token; give a text")
    check_ids(subject, ids, called)
    if limit is not None and len(ids) + room - 1 > limit:
        raise DataError(
            f"{called} has {len(ids)} tokens, the model reads {limit}: no room for max_new_tokens={room}; shorten either"
        )
    return ids


def ends(subject: Subject) -> set[int]:
    """The tokens after which a text of this model is over, as its settings for generation and its tokenizer say."""
    config = getattr(subject.model, "generation_config", None)
    named = [getattr(config, "eos_token_id", None), getattr(subject.need_tokenizer(), "eos_token_id", None)]
    return {int(i) for ids in named if ids is not None for i in (ids if isinstance(ids, list | tuple) else [ids])}


def check_logits(logits: Float[Tensor, "b v"], where: str) -> None:
    """Refuse logits that are no distribution: NaN, infinite, or all of them minus infinite.

    Raises:
        NotFinite: with what they follow.
    """
    if not bool(torch.isfinite(logits.logsumexp(-1)).all()):
        raise NotFinite(f"the logits after {where} are not finite; load the model in float32?")


def _together(writers: Sequence[Iterator[Writing]]) -> Iterator[tuple[Writing, ...]]:
    """One step of every writer that goes on, until none does."""
    states = [Writing() for _ in writers]
    while not all(state.ended for state in states):
        states = [state if state.ended else next(writer) for state, writer in zip(states, writers, strict=True)]
        yield tuple(states)


def _written(subject: Subject, ids: list[int], room: int, temperature: float, seed: int) -> Iterator[Writing]:
    tokenizer, last = subject.need_tokenizer(), ends(subject)
    draws = torch.Generator().manual_seed(seed)
    seen = torch.tensor([ids], device=subject.device)
    fresh, cache = seen, None
    while True:
        logits, cache = _step(subject, seen, fresh, cache)
        check_logits(logits, f"the prompt and {seen.shape[1] - len(ids)} tokens more")
        token = _chosen(logits, temperature, draws)
        fresh = torch.tensor([[token]], device=subject.device)
        seen = torch.cat([seen, fresh], dim=1)
        tokens = seen[0, len(ids) :].tolist()
        ended = "stop" if token in last else "length" if len(tokens) == room else ""
        text = tokenizer.decode(tokens[:-1] if ended == "stop" else tokens, skip_special_tokens=True)
        yield Writing(tuple(tokens), text if ended else text.rstrip("\ufffd"), ended)
        if ended:
            return


def _step(subject: Subject, seen: Int[Tensor, "1 t"], fresh: Int[Tensor, "1 n"], cache: Any) -> tuple[Tensor, Any]:
    """(logits of the next token, the cache) after reading the tokens that the cache does not hold yet."""
    # Not around the loop: a generator that waits would leave its caller without gradients, and the model in eval mode.
    with torch.no_grad(), evaluating(subject.model):
        out = subject.model(
            input_ids=fresh,
            attention_mask=torch.ones_like(seen),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    # float32, as transformers compares them.
    return out.logits[:, -1].float(), out.past_key_values


def _chosen(logits: Float[Tensor, "1 v"], temperature: float, draws: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    shares = (logits[0].double().cpu() / temperature).softmax(-1)
    return int(torch.multinomial(shares, 1, generator=draws))
