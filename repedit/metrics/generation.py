"""What a model writes: token by token, side by side with another model, and how far it agrees with a reference text."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from repedit.activations.forward import check_ids
from repedit.data.encoding import chat_ids, check_not_ended, prompt_ids
from repedit.errors import ArgumentError, DataError, MissingDependency, NotFinite, check_seed, is_finite, is_whole
from repedit.hooks import evaluating
from repedit.io.text import check_text
from repedit.models.subject import Subject

# --- What models write, token by token and side by side; a step of a model reads one token, the rest is in its cache


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
        check_not_ended(tokenizer, ids, called)
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


# --- What a model writes, and how far that agrees with a reference text


def generate(
    subject: Subject,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    chat: bool = False,
    progress: bool | None = None,
) -> tuple[str, ...]:
    """The greedy continuation of each prompt, without the prompt and without special tokens.

    Prompts of like length are read together, padded on the left; a padded prompt is continued as it is alone.

    Args:
        chat: put each prompt in the tokenizer's chat template, as a message of the user. This moves scores: say so
            beside them.
    Raises:
        ArgumentError: without a tokenizer, or one with a chat template where it is asked for, or with a number below 1.
        DataError: if a prompt is no text, has no token, is over, or leaves the model no room to go on.
        NotFinite: if logits are not finite.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if not is_whole(value):
            raise ArgumentError(f"{name}={value}; give at least 1")
    if isinstance(prompts, str):
        raise ArgumentError(f"prompts={prompts[:40]!r} is one text; give a list of prompts")
    tokens = [_tokens(subject, prompt, max_new_tokens, chat) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(tokens[i]))
    found: dict[int, str] = {}
    quiet = None if progress is None else not progress
    for start in tqdm(range(0, len(order), batch_size), desc="generate", disable=quiet, leave=False):
        part = order[start : start + batch_size]
        names = [_named(prompts[i]) for i in part]
        found |= zip(part, written(subject, [tokens[i] for i in part], max_new_tokens, names), strict=True)
    return tuple(found[i] for i in range(len(prompts)))


def written(subject: Subject, prompts: Sequence[Sequence[int]], tokens: int, names: Sequence[str]) -> list[str]:
    """The greedy continuation of each prompt: the most likely token, until one ends the text or there are so many.

    Prompts of several lengths are padded on the left. `model.generate` is not used: it follows the checkpoint's settings
    for generation, which can penalise, forbid or force tokens also where do_sample is False.

    Args:
        names: what each prompt is called in an error message.
    Raises:
        NotFinite: if logits are not finite.
    """
    tokenizer, last = subject.need_tokenizer(), ends(subject)
    fresh, mask = _padded(subject, prompts)
    padded = not bool(mask.all()) and "position_ids" in inspect.signature(subject.model.forward).parameters
    texts: list[list[int]] = [[] for _ in prompts]
    live, cache = list(range(len(prompts))), None
    with torch.no_grad(), evaluating(subject.model):
        while live and len(texts[live[0]]) < tokens:
            places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -fresh.shape[1] :]} if padded else {}
            out = subject.model(
                input_ids=fresh, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1, **places
            )
            logits, cache = out.logits[:, -1].float(), out.past_key_values
            for row in live:
                check_logits(logits[row : row + 1], f"{names[row]} and {len(texts[row])} tokens more")
            chosen = logits.argmax(-1)
            for row, token in zip(live, chosen[live].tolist(), strict=True):
                texts[row].append(token)
            live = [row for row in live if texts[row][-1] not in last]
            fresh, mask = chosen[:, None], torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    cut = [text[:-1] if text and text[-1] in last else text for text in texts]
    return list(tokenizer.batch_decode(cut, skip_special_tokens=True))


def continuations(subject: Subject, prompts: Sequence[str], *, tokens: int = 40) -> tuple[str, ...]:
    """The greedy continuation of each prompt, without the prompt, each read alone.

    Raises:
        ArgumentError, DataError: as `generate` does.
    """
    return generate(subject, prompts, max_new_tokens=tokens, batch_size=1, progress=False)


@dataclass(frozen=True, eq=False)
class Rouge:
    """Overlap of words of each output with its reference, in [0, 1]."""

    rouge1_recall: NDArray[np.float64]
    """Share of the reference's words that the output has."""
    rougeL_recall: NDArray[np.float64]
    """Share of the reference's words that the output has in the same order."""
    rougeL_f1: NDArray[np.float64]
    """Harmonic mean of that and the same share of the output's words."""

    def __repr__(self) -> str:
        means = ", ".join(f"{name} {values.mean():.4f}" for name, values in vars(self).items())
        return f"Rouge({means}; {len(self.rougeL_f1)} texts)"


def rouge(references: Sequence[str], outputs: Sequence[str], *, stemmer: bool = True) -> Rouge:
    """ROUGE-1 recall, ROUGE-L recall and ROUGE-L F1 of each output; 0 where a side has no word.

    Args:
        stemmer: compare stems of words, as TOFU and SemEval do; MUSE compares words.
    Raises:
        MissingDependency: without the package rouge-score.
        DataError: if the two lists differ in length, or are empty.
    Reference: Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries.
    """
    _check_pairs(references, outputs)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingDependency("ROUGE needs rouge-score: pip install rouge-score==0.1.2") from error
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=stemmer)
    found = [scorer.score(reference, output) for reference, output in zip(references, outputs, strict=True)]
    values = [[s["rouge1"].recall, s["rougeL"].recall, s["rougeL"].fmeasure] for s in found]
    return Rouge(*np.array(values, dtype=np.float64).T)


def exact_match(references: Sequence[str], outputs: Sequence[str]) -> NDArray[np.bool_]:
    """Whether each whole output is its reference, white space around them and case apart.

    Raises:
        DataError: if the two lists differ in length, or are empty.
    """
    _check_pairs(references, outputs)
    pairs = zip(references, outputs, strict=True)
    return np.array([reference.strip().lower() == output.strip().lower() for reference, output in pairs])


def _check_pairs(references: Sequence[str], outputs: Sequence[str]) -> None:
    if len(references) != len(outputs) or not references:
        raise DataError(f"{len(references)} references and {len(outputs)} outputs; give one output a reference")


def _tokens(subject: Subject, prompt: str, room: int, chat: bool) -> list[int]:
    if chat and not subject.need_tokenizer().chat_template:
        raise ArgumentError("chat=True and the tokenizer has no chat template; leave chat out")
    asked = [{"role": "user", "content": prompt}] if chat else prompt
    return prompt_tokens(subject, asked, room=room, called=_named(prompt))


def _named(prompt: Any) -> str:
    return f"the prompt {str(prompt)[:40]!r}"


def _padded(subject: Subject, tokens: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
    """Ids padded on the left, and their mask."""
    width = max(map(len, tokens))
    ids = [[0] * (width - len(row)) + list(row) for row in tokens]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in tokens]
    return torch.tensor(ids, device=subject.device), torch.tensor(mask, device=subject.device)
