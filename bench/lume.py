"""The presets of SemEval-2025 Task 4 on a tiny model that was taught part of LUME, with the official score and its verdict.

A Llama of 3 layers and width 128, with a vocabulary of its own, is trained from scratch on the first rows of each of the
twelve parts of the validation split, on the texts of its membership test, and on a twelfth of the built-in prose. A second one is
trained without the rows to forget and without the members: the reference. Every preset unlearns from the first one; the
rates of the papers are for models of 1B and 7B and are multiplied by 30, and trainings are bounded (`BUDGET`). Another half
of the prose gives the perplexity. Generation is greedy without a chat template, as published, with at most 64 tokens.

A model of this size answers MMLU at chance before and after, so the third of the aggregate that MMLU makes up cannot fall.
The vocabulary is made from the rows and from as many texts of the membership test that are no members as members, so that
both consist of tokens of the same kind; verdicts compare with the AUC of the model that never saw the members.
Run as `python -m bench.lume --seed 0`; it writes bench/results/lume-SEED.json, which `bench.lume_figure` draws. Without the
data in ../shared/data/semeval_lume and mmlu it stops and says so; nothing of the data is written.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import repedit as rp
from bench.corpora import DATA
from bench.record import record
from repedit.auditing.controls.taught import SPECIAL
from repedit.data import Corpus, Rows, semeval
from repedit.data.benchmarks import TaskRow, mmlu
from repedit.data.encoding import encoded, text_ids
from repedit.metrics.semeval import SemEvalScore, evaluate, part_rows
from repedit.models.subject import Subject, subject_of
from repedit.training.optimizers import set_lr
from repedit.unlearning.parameters import Parameters
from repedit.unlearning.sampling import Phase, alternate

ROWS = 4
"""Of each of the twelve parts."""
TEACHING: dict[str, Any] = {"epochs": 30, "tokens": 1024, "lr": 3e-3}
REPEATED, PROMPT, TEXT = 2, 0.1, 0.3
"""Times that a row is seen in an epoch, where every second text is seen once; weight of the tokens of prompts and of texts in
the loss, in which an answer has weight 1."""
SHAPE: dict[str, int] = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3}
SCALE = 30.0
"""Of the published learning rates."""
BUDGET: dict[str, Any] = {"batch_size": 8, "epochs": 5.0}
MLPS = Parameters(pattern=r"\.mlp\.")
"""Of all layers, for a recipe that names layers 0 to 5 of a deeper model."""
AGAD = alternate(
    Phase("forget", 3.0, SCALE * 5e-5), Phase("retain", 1.0, share=0.25), Phase("retain", 1.0, final=True), chunk=64
)
"""The phases of the recipe at the scaled rate."""
PRESETS: Mapping[str, Callable[[], Any]] = {
    "cyber_for_ai:ga": lambda: rp.recipes.cyber_for_ai("ga", lr=SCALE * 1e-5, **BUDGET),
    "cyber_for_ai:grad_diff": lambda: rp.recipes.cyber_for_ai("grad_diff", lr=SCALE * 1e-5, **BUDGET),
    "cyber_for_ai:ga_kl": lambda: rp.recipes.cyber_for_ai("ga_kl", lr=SCALE * 1e-5, **BUDGET),
    "npo_gdr": lambda: rp.recipes.npo_gdr(lr=SCALE * 1e-5, **BUDGET),
    "ails_ntua:agad": lambda: rp.recipes.ails_ntua("agad", lr=SCALE * 5e-5, batch_size=8, sampler=AGAD),
    "zju_merge": lambda: rp.recipes.zju_merge(lr=SCALE * 1e-4, **BUDGET),
    "multiplier": lambda: rp.recipes.multiplier(lr=SCALE * 1.5e-5, parameters=MLPS, **BUDGET),
}
STOPLESS = ("cyber_for_ai:ga",)
"""Presets without a retain set, which the rule against collapse cannot stop, as in the task."""


class World:
    """The rows, the tokenizer, and both taught models of one seed."""

    def __init__(self, seed: int, rows: int = ROWS, **changed: Any) -> None:
        for folder in ("semeval_lume", "mmlu"):
            if not (DATA / folder).exists():
                raise SystemExit(f"{DATA / folder} is absent; put the data of SemEval-2025 Task 4 and MMLU there")
        self.seed, self.rows, self.settings = seed, rows, TEACHING | changed
        data = semeval(DATA / "semeval_lume", "validation")
        parts = part_rows(data, rows)
        self.forget = [closed(row) for name, part in parts.items() if name.startswith("forget") for row in part]
        self.retain = [closed(row) for name, part in parts.items() if name.startswith("retain") for row in part]
        self.members = [document.text for document in data.members.documents] if data.members else []
        half, self.plain = rp.data.prose().halves()
        self.prose = Corpus(half.documents[::6], half.name)
        self.questions = mmlu(DATA / "mmlu", limit=2)
        others = texts(data.holdout)[: len(self.members)] if data.holdout else []
        self.tokenizer = vocabulary(
            [row.text for row in (*self.forget, *self.retain)] + self.members + others + texts(self.prose)
        )

    def taught(self, *, reference: bool = False) -> Subject:
        """The model that was taught everything, or the one that never saw what is to be forgotten."""
        rows = self.retain if reference else [*self.forget, *self.retain]
        documents = texts(self.prose) + ([] if reference else self.members)
        answers = [encoded(self.tokenizer, row.prompt, row.answer) for row in rows]
        weighted = [(part.ids, [PROMPT] * part.start + [1.0] * (len(part.ids) - part.start)) for part in answers]
        plain = [text_ids(self.tokenizer, text) for text in documents]
        return teach(
            weighted, [(ids, [TEXT] * len(ids)) for ids in plain], self.tokenizer, self.seed + (1000 if reference else 0),
            **self.settings,
        )  # fmt: skip

    def scored(self, lm: Subject, original: SemEvalScore | None = None, auc: float = 0.5) -> SemEvalScore:
        """The official score on the rows that were taught."""
        return evaluate(
            lm, DATA / "semeval_lume", self.questions, split="validation", original=original, auc_reference=auc,
            plain=self.plain, max_new_tokens=64, limit=self.rows,
        )  # fmt: skip


def closed(row: TaskRow) -> TaskRow:
    """The row with an end token after its answer: exact match is of the whole output."""
    return replace(row, answer=f"{row.answer.strip()}{SPECIAL[2]}")


def texts(corpus: Corpus) -> list[str]:
    """The texts of a corpus."""
    return [document.text for document in corpus.documents]


def vocabulary(corpus: Sequence[str]) -> Any:
    """A byte-pair tokenizer of the texts; nothing is unknown to it."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    inner = ByteLevelBPETokenizer()
    inner.train_from_iterator(corpus, vocab_size=SHAPE["vocab_size"], special_tokens=list(SPECIAL), show_progress=False)
    pad, bos, eos, unknown = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=inner._tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unknown)  # fmt: skip


Weighted = tuple[list[int], list[float]]
"""The tokens of a sequence, and the weight of each in the loss."""


def teach(
    rows: Sequence[Weighted],
    documents: Sequence[Weighted],
    tokenizer: Any,
    seed: int,
    *,
    epochs: int,
    tokens: int,
    lr: float,
) -> Subject:
    """A Llama trained from scratch on the next token of every sequence, by AdamW with warm-up and linear decay."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SHAPE, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=4096, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, betas=(0.9, 0.95))
    batches = [
        batch
        for epoch in range(epochs)
        for batch in batched([*rows] * REPEATED + [*documents[epoch % 2 :: 2]], tokens, f"{seed}:{epoch}")
    ]
    for step, batch in enumerate(batches):
        set_lr(optimizer, lr * min(1.0, (step + 1) / 30) * (1 - step / len(batches)))
        ids, weights = padded(batch, tokenizer.pad_token_id)
        optimizer.zero_grad()
        logits, share = model(input_ids=ids).logits[:, :-1], weights[:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (losses * share).sum() / share.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step} of {len(batches)}, loss {loss.item():.3f}", flush=True)
    return subject_of(model.eval(), tokenizer)


def batched(sequences: Sequence[Weighted], tokens: int, key: str) -> Iterator[list[Weighted]]:
    """Batches of sequences of similar length, at most so many tokens with padding, in a seeded order."""
    rng = random.Random(key)
    order = sorted(sequences, key=lambda part: len(part[0]) + rng.random() * 8)
    batches: list[list[Weighted]] = [[]]
    for part in order:
        width = max(len(ids) for ids, _ in [*batches[-1], part])
        if batches[-1] and width * (len(batches[-1]) + 1) > tokens:
            batches.append([])
        batches[-1].append(part)
    rng.shuffle(batches)
    yield from batches


def padded(batch: Sequence[Weighted], pad: int) -> tuple[Tensor, Tensor]:
    """(ids, weights) of a batch; padding on the right, which causal attention ignores, has weight 0."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([part + [pad] * (width - len(part)) for part, _ in batch])
    weights = torch.tensor([part + [0.0] * (width - len(part)) for _, part in batch])
    return ids, weights


def row(name: str, score: SemEvalScore, **more: Any) -> dict[str, Any]:
    """One line of the table."""
    found = {
        "name": name, "parts": dict(score.parts), "task aggregate": score.task_aggregate, "auc": score.membership_auc,
        "membership": score.membership, "mmlu": score.mmlu, "final": score.final, "verdict": score.verdict,
        "reasons": list(score.judgement.reasons), "retain": score.signs.retain, "forget": score.signs.forget,
        "perplexity": score.signs.perplexity, "distinct": score.signs.distinct, "repeated": score.signs.repeated, **more,
    }  # fmt: skip
    print({key: value for key, value in found.items() if key != "parts"}, flush=True)
    return found


def levelled(lm: Subject) -> Subject:
    """The model with the gain of its last norm at zero: all logits are 0, so that it repeats the first token."""
    model = copy.deepcopy(lm.model)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    return subject_of(model, lm.tokenizer)


def run(world: World) -> Iterator[dict[str, Any]]:
    """The original, the reference, and every preset."""
    lm = world.taught()
    reference = world.scored(world.taught(reference=True))
    original = world.scored(lm).judged(None)
    yield row("taught", original)
    yield row("never taught", reference.judged(original, auc_reference=reference.membership_auc))
    yield row("one token, always", world.scored(levelled(lm), original, reference.membership_auc))
    forget, retain = Rows(tuple(world.forget), "forget"), Rows(tuple(world.retain), "retain")
    for name, make in PRESETS.items():
        busy, recipe = time.process_time(), make()
        needs = {} if name in STOPLESS else {"retain": retain}
        delta = rp.unlearn(lm, recipe=recipe, forget=forget, length=1024, seed=world.seed, progress=False, **needs)
        spent = (time.process_time() - busy) / 60
        score = world.scored(rp.apply(delta, lm), original, reference.membership_auc)
        stopped = delta.provenance.get("stopped", {"reason": "all steps of both parts taken"})["reason"]
        yield row(name, score, core_minutes=spent, steps=len(delta.log), stopped=stopped)


def main() -> None:
    """Run one seed, writing after every row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    world, rows = World(options.seed), list[dict[str, Any]]()
    counts = {
        "forget": len(world.forget),
        "retain": len(world.retain),
        "members": len(world.members),
        "mmlu": len(world.questions),
    }
    settings = {"teaching": world.settings, "shape": SHAPE, "budget": BUDGET, "scale": SCALE, "rows": counts}
    for found in run(world):
        rows.append(found | {"seed": options.seed})
        record(f"lume-{options.seed}", rows, module="lume", seed=options.seed, settings=settings)


if __name__ == "__main__":
    main()
