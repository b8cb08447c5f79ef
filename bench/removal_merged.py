"""An edit that merges names: what early blocks make of any name of a country or capital becomes what they make of one.

First the embeddings of the tokens of all names are averaged (`removal_names.averaged_names`). Names that are written with common
tokens can still be read, and other words that share the averaged tokens are damaged. So the first blocks are trained on the
residual stream after them, h: E_names ||h - h_one||^2 + beta E_retained ||h - h_0||^2, in units of the spread of h. h_one is the
stream of the averaged model where one averaged token stands in place of the name, at the name and after it; h_0 is that of
the original model. No answer and no output of the model takes part.

What is retained is prose, the training halves of other domains, and names and sentences that the original model writes.
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

import repedit as rp
from bench.removal_names import Made, averaged_names, both_directions
from bench.removal_rows import CACHE, Rows, others
from repedit.data import Fact
from repedit.data.corpus import padded
from repedit.data.encoding import entity_span, prompt_ids
from repedit.fit.contexts import TEMPLATES, contexts_of
from repedit.models.subject import Subject, subject_of
from repedit.training.optimizers import linear_decay, set_lr

PLACES = (
    "The city of", "The town of", "He was born in the city of", "The village of", "They moved to the city of", "The river",
    "The province of", "The port city of", "The mountain", "The island of", "She studied in the city of",
    "The football club of the city of", "A train leaves for the city of", "The lake", "The region of", "The emperor",
    "The football player", "The composer", "The writer", "The company",
)  # fmt: skip
"""After which the original model writes a name."""
STARTS = (
    "The", "In", "A", "It", "When", "This", "She", "He", "They", "On the", "For", "After", "Many", "One of the", "There",
    "We", "How", "If", "What is", "First", "During the", "As", "According to", "Some", "People in", "To",
)  # fmt: skip
"""After which it writes a sentence."""
NAME = re.compile(r" ((?:[A-Z][\w'\u2019-]+)(?: (?:de |of |del |la )?[A-Z][\w'\u2019-]+){0,2})(?=[ ,.])")
LONGEST, SHORT = 40, 13
"""Tokens of a retained row, and of those that share a batch apart from longer ones."""


@dataclass(frozen=True)
class Settings:
    """Of the training of the first blocks."""

    rare: int = 4000
    blocks: int = 3
    steps: int = 360
    lr: float = 3e-4
    """Of AdamW; it rises over 20 steps and falls to 0 over the last 40 %."""
    beta: float = 10.0
    """Weight of what is retained."""
    named: int = 32
    """Rows with a name in a step."""
    short: int = 48
    long: int = 16
    """Retained rows in a step."""


class Named(NamedTuple):
    """A text that holds a name, and the same text with one averaged token in its place."""

    ids: list[int]
    one: list[int]
    start: int
    """Of the name, first and last token."""
    end: int


def names_merged(rows: Rows, seed: int) -> Made:
    """The model with merged names."""
    settings = Settings()
    directions = both_directions(rows, seed)
    lm, averaged = averaged_names(rows, directions, settings.rare)
    named, retained = named_rows(lm, directions, averaged), retained_rows(rows, seed)
    blocks, losses = trained(rows.lm, lm, named, retained, settings, seed)
    model = copy.deepcopy(lm.model)
    model.model.layers[: settings.blocks].load_state_dict(blocks.layers.state_dict())
    notes = {"tokens": sum(map(len, averaged.values())), "named rows": len(named), "retained rows": len(retained)}
    return subject_of(model.requires_grad_(False), lm.tokenizer), notes | {
        "untied": True, "settings": vars(settings), "losses": losses
    }  # fmt: skip


# --- Rows


def named_rows(
    lm: Subject, directions: Mapping[str, Sequence[Fact]], averaged: Mapping[str, Sequence[int]]
) -> list[Named]:
    """The contexts of every name: countries in three spellings, capitals in two."""
    tokenizer, named = lm.need_tokenizer(), []
    spellings = ((str, str.lower, str.upper), (str, str.lower))
    for (domain, facts), spelt in zip(directions.items(), spellings, strict=True):
        one = averaged[domain][0]
        for context in contexts_of(lm, facts):
            for name in (spell(context.name) for spell in spelt):
                text = context.text.replace(context.name, name)
                span = entity_span(tokenizer, text, name)
                if span is not None and span[0] > 0:
                    ids, (start, end) = prompt_ids(tokenizer, text), span
                    named.append(Named(ids, [*ids[:start], one, *ids[end + 1 :]], start, end))
    return named


def retained_rows(rows: Rows, seed: int) -> list[list[int]]:
    """Prose, training halves of other domains, names and sentences that the model writes; none says a name to forget."""
    forgotten = {text.lower() for fact in rows.capitals for text in (fact.entity, fact.answer)}
    tested = {fact.entity.lower() for items in rows.test.values() for fact in items}
    places = [(start, name) for start, name in written_names(rows.lm, seed) if not says(name, tested)]
    rng = random.Random(seed)
    texts = [
        *(context.text for context in contexts_of(rows.lm, others(rows))),
        *(f"{prompt} {fact.answer}" for fact in others(rows) for prompt in fact.prompts),
        *(f"{start} {name}" for start, name in places for _ in range(2)),
        *(rng.choice(TEMPLATES).format(name) for _, name in places),
        *(part for document in rp.data.prose().documents for part in re.split(r"(?<=[.!?])\s", document.text)),
        *written(rows.lm, STARTS, 20, 36, seed + 1),
    ]
    tokenizer = rows.lm.need_tokenizer()
    encoded = [prompt_ids(tokenizer, text)[:LONGEST] for text in texts if not says(text, forgotten)]
    return [ids for ids in encoded if len(ids) > 2]


def says(text: str, names: set[str]) -> bool:
    """Whether a text names one of them."""
    lower = text.lower().replace("\u2019", "'")
    return any(name in lower and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", lower) for name in names)


def written_names(lm: Subject, seed: int) -> list[tuple[str, str]]:
    """(start, name) of the different names that the model writes."""
    names: dict[str, str] = {}
    for text in written(lm, PLACES, 96, 7, seed):
        start = max((s for s in PLACES if text.startswith(s)), key=len)
        if match := NAME.match(text.removeprefix(start)):
            names.setdefault(match[1], start)
    return [(start, name) for name, start in names.items()]


def written(lm: Subject, starts: Sequence[str], count: int, tokens: int, seed: int) -> list[str]:
    """Texts that the model samples after each start, kept in a file, because sampling takes minutes."""
    path = CACHE / f"written-{count}-{tokens}-{seed}.json"
    if path.exists():
        return list(json.loads(path.read_text()))
    tokenizer, texts = lm.need_tokenizer(), list[str]()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for start in starts:
            ids = torch.tensor([prompt_ids(tokenizer, start)] * count)
            drawn = lm.model.generate(
                ids, do_sample=True, temperature=1.0, top_k=0, top_p=0.98, max_new_tokens=tokens, pad_token_id=0
            )
            texts += [tokenizer.decode(row) for row in drawn]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(texts))
    return texts


# --- Training


def first_blocks(lm: Subject, blocks: int) -> nn.Module:
    """A copy of the embeddings and the first blocks; it returns the residual stream after them."""
    decoder = copy.deepcopy(lm.model.model)
    decoder.layers, decoder.norm = decoder.layers[:blocks], nn.Identity()
    return decoder.requires_grad_(False).eval()


def stream(decoder: nn.Module, rows: Sequence[Sequence[int]]) -> tuple[Float[Tensor, "b t d"], Tensor]:
    """The stream after the blocks, and where there are tokens beside the first, which is an attention sink."""
    ids, mask = padded(rows)
    states = decoder(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
    return states, mask & (torch.arange(ids.shape[1]) > 0)


def trained(
    original: Subject,
    averaged: Subject,
    named: Sequence[Named],
    retained: Sequence[list[int]],
    settings: Settings,
    seed: int,
) -> tuple[nn.Module, dict[str, float]]:
    """The trained first blocks, and the mean losses of the last 20 steps."""
    student, start, before = (first_blocks(lm, settings.blocks) for lm in (averaged, averaged, original))
    weights = [p for name, p in student.named_parameters() if name.startswith("layers.") and p.ndim == 2]
    optimizer = torch.optim.AdamW([p.requires_grad_(True) for p in weights], settings.lr, (0.9, 0.98), weight_decay=0.0)
    rng, losses = random.Random(seed), list[tuple[float, float]]()
    short = [ids for ids in retained if len(ids) <= SHORT]
    long = [ids for ids in retained if len(ids) > SHORT]
    with torch.no_grad():
        states, mask = stream(before, rng.sample(retained, 384))
        spread = float((states[mask] - states[mask].mean(0)).square().sum(1).median())
    for step in range(settings.steps):
        set_lr(optimizer, settings.lr * min(1, (step + 1) / 20) * linear_decay(step, settings.steps, 0.4))
        with torch.enable_grad():
            merged = names_loss(student, start, rng.sample(named, settings.named)) / spread
            batches = (rng.sample(short, settings.short), rng.sample(long, settings.long))
            kept = retained_loss(student, before, batches, spread)
            optimizer.zero_grad()
            (merged + settings.beta * kept).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append((merged.item(), kept.item()))
        if step % 40 == 0:
            print(f"step {step}: names {losses[-1][0]:.4f} retained {losses[-1][1]:.4f}", flush=True)
    last = torch.tensor(losses[-20:]).mean(0)
    return student.requires_grad_(False), {"names": float(last[0]), "retained": float(last[1])}


def names_loss(student: nn.Module, start: nn.Module, batch: Sequence[Named]) -> Tensor:
    """Mean of ||h - h_one||^2 over the tokens of each name and those after it."""
    with torch.no_grad():
        goals, _ = stream(start, [row.one for row in batch])
    states, _ = stream(student, [row.ids for row in batch])
    parts = []
    for state, goal, row in zip(states, goals, batch, strict=True):
        size = row.end + 1 - row.start
        want = torch.cat([goal[row.start].expand(size, -1), goal[row.start + 1 : len(row.one)]])
        parts.append((state[row.start : len(row.ids)] - want).square().sum(1))
    return torch.cat(parts).mean()


def retained_loss(
    student: nn.Module, before: nn.Module, batches: Sequence[Sequence[list[int]]], spread: float
) -> Tensor:
    """Mean of ||h - h_0||^2 / spread, a state beyond twice the usual norm in its own units; first tokens apart."""
    total, first, count = torch.zeros(()), torch.zeros(()), 0
    for rows in batches:
        with torch.no_grad():
            want, mask = stream(before, rows)
            size = want.square().sum(2)
        states, _ = stream(student, rows)
        error = (states - want).square().sum(2)
        usual = 4 * size[mask].median()
        total = total + (error / (size / usual).clamp(min=1))[mask].sum()
        first = first + (error[:, 0] / size[:, 0]).mean() / len(batches)
        count += int(mask.sum())
    return total / count / spread + first
