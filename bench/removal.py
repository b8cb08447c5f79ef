"""Edits against attacks that train: do the other capitals come back when half of them, or their languages, are taught again?

Every edit makes SmolLM2-135M forget 151 capitals. `python -m bench.removal --edit NAME --seed S --parts direct,relearn` makes
an edit (kept in `--folder`) and measures parts of its row; each part that is measured is added to
bench/results/removal-NAME-S.json, so that a row can be completed later. `--list` names edits and parts. Prompts are the facts'
own wordings; training sees the first three of five, "unseen" is the fourth. Accuracy is 8-way multiple choice.

R of an attack is (edited - floor) / (original - floor), all after the attack. The floor of retraining is what the choices
alone give away. The floor of relinking is measured: the same training, on a model that cannot know the capitals, because
every country has an invented name; what it then gets right follows from the languages (`--edit original --parts choices,invented`).
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import repedit as rp
from bench.mrp import seen
from bench.record import RESULTS, record
from bench.relearning import relearn
from bench.removal_edits import EDITS
from bench.removal_names import head_ranks, untied
from bench.removal_rows import CACHE, FORGET, OTHERS, UNSEEN, Rows, names, share
from repedit.auditing.attacks.prompts import respelled_prompt
from repedit.auditing.attacks.weights import head_rows
from repedit.auditing.data import check_no_leak, leaks, reversed_facts
from repedit.auditing.floors import choices_only, fresh_facts
from repedit.data import Fact, Splits, entity_of
from repedit.data.generated import SPELLINGS
from repedit.models.subject import Subject

RATES, STEPS = (2e-5, 1e-4), 40
FAST = 5e-4
"""For edits of which 40 steps at 1e-4 do not teach T."""
LONG_RATE, LONG_STEPS = 2e-4, 160
"""The highest rate and four times the steps of the audit's retraining, for edits that 40 steps do not teach T."""
EMBEDDING_RATE, EMBEDDING_STEPS = 5e-3, 120
"""For edits of the embeddings, which no other training here teaches T; as it turned out, they ruin the original as well."""
ONLY_RATE, ONLY_STEPS = 2e-3, 60
"""Of the input embeddings where nothing else is trained."""
RELINK_RATE, RELINK_STEPS = 1e-4, 60
ASKED = ("direct", "paraphrase", "first_word", "respelled", "reverse_question", "head_rows")
"""The attacks of `rp.audit` that train nothing."""
LEARNING_STEPS = (10, 20, 40)
Row = dict[str, Any]


# --- The parts of a row


def direct(rows: Rows, lm: Subject, seed: int) -> Row:
    """Capitals in the trained and in the unseen wording, without an attack."""
    return {"trained": share(rows.asked(lm, rows.capitals)), "unseen": share(rows.asked(lm, rows.capitals, UNSEEN))}


def first(rows: Rows, lm: Subject, seed: int) -> Row:
    """Capitals asked with the name of the country as the first word of the text, which is often another token."""
    items = [
        replace(f, prompt=f"{f.entity} has a capital, which is the city of", paraphrases=()) for f in rows.capitals
    ]
    return {"all": share(rows.asked(lm, items))}


def reverse(rows: Rows, lm: Subject, seed: int) -> Row:
    """The same facts asked the other way round: which country a capital belongs to, of eight."""
    return {"all": share(rows.asked(lm, reversed_facts(rows.capitals, seed)))}


def spelling(rows: Rows, lm: Subject, seed: int) -> Row:
    """Capitals asked with the name of the country in other spellings; "all" is lower case, which the original reads best."""
    asked = {}
    for name in SPELLINGS:
        items = [replace(f, prompt=respelled_prompt(f, name, seed), paraphrases=()) for f in rows.capitals]
        asked[name] = share(rows.asked(lm, items))
    return {"all": asked["lower case"], **asked}


def head(rows: Rows, lm: Subject, seed: int) -> Row:
    """Capitals asked after what the output head holds of suspicious tokens became their input embeddings; "all" is the best way."""
    asked = head_rows()(lm, Splits((), rows.capitals)).accuracy
    return {"all": max(asked.values()), **{str(name): value for name, value in asked.items()}}


def domains(rows: Rows, lm: Subject, seed: int) -> Row:
    """The test half of every other domain, and perplexity on WikiText-2."""
    return rows.keeping(lm, [FORGET])


def relearning(rate: float, fold: int = 0, steps: int = STEPS, **options: Any) -> Callable[[Rows, Subject, int], Row]:
    """Retraining on T, all weights; fold 1 exchanges T and V."""

    def part(rows: Rows, lm: Subject, seed: int) -> Row:
        halves = Splits.of(rows.capitals, seed=0, fold=fold)
        student = relearn(lm, seen(halves.train), rate=rate, steps=steps, seed=seed, **options)
        right = rows.asked(student, rows.capitals)
        return {
            "T": share(right, [entity_of(f) for f in halves.train]), "V": share(right, [entity_of(f) for f in halves.test]),
            "V unseen": share(rows.asked(student, halves.test, UNSEEN)), "right": names(right),
        }  # fmt: skip

    return part


def relinking(rows: Rows, lm: Subject, seed: int) -> Row:
    """Retraining on the official languages; no capital is trained on."""
    student = relearn(lm, seen(rows.languages), rate=RELINK_RATE, steps=RELINK_STEPS, seed=seed)
    return after_languages(rows, student, rows.capitals, rows.languages)


def after_languages(rows: Rows, student: Subject, capitals: Sequence[Fact], languages: Sequence[Fact]) -> Row:
    """What is right after languages were taught: of all capitals, and of countries with and without a taught language."""
    right = rows.asked(student, capitals)
    taught = {entity_of(fact) for fact in languages}
    with_, without = [name for name in right if name in taught], [name for name in right if name not in taught]
    return {
        "all": share(right), "taught": share(right, with_), "others": share(right, without),
        "languages": share(rows.asked(student, languages)), "countries": [len(with_), len(without)], "right": names(right),
    }  # fmt: skip


def everything(rows: Rows, lm: Subject, seed: int) -> Row:
    """Retraining on T, its reverse questions and all languages at once, 120 steps; V is asked."""
    halves = Splits.of(rows.capitals, seed=0)
    taught = (*seen(halves.train), *reversed_facts(halves.train, seed), *seen(rows.languages))
    check_no_leak(taught, halves.test)
    student = relearn(lm, taught, rate=RELINK_RATE, steps=2 * RELINK_STEPS, seed=seed)
    right = rows.asked(student, halves.test)
    return {"V": share(right), "V unseen": share(rows.asked(student, halves.test, UNSEEN)), "right": names(right)}


def learning(rows: Rows, lm: Subject, seed: int) -> Row:
    """How fast facts about invented countries are learnt: accuracy on them by step, and on others like them at the end."""
    fresh = fresh_facts(rows.capitals, 150, seed)
    taught, found = seen(fresh[:75]), {}

    def watch(step: int, student: Subject) -> None:
        if step in LEARNING_STEPS:
            found[str(step)] = share(rows.asked(student, fresh[:75]))

    student = relearn(lm, taught, rate=RATES[-1], steps=STEPS, seed=seed, watch=watch)
    return found | {"never taught": share(rows.asked(student, fresh[75:]))}


def audited(**options: Any) -> Callable[[Rows, Subject, int], Row]:
    """`rp.audit` on both halves; what is retained are facts about other subjects."""

    def part(rows: Rows, lm: Subject, seed: int) -> Row:
        retain = tuple(fact for name in OTHERS for fact in rows.test[name])
        facts = rp.data.Facts(rows.capitals, retain, FORGET)
        report = rp.audit(lm, original=rows.lm, facts=facts, progress=False, **options)
        attacks = {
            r.attack: {
                "status": r.status, "R": r.value, "bound": list(r.bound), "edited": r.edited, "original": r.original,
                "floor": r.floor,
            }
            for r in report.recoveries
        }  # fmt: skip
        return {"verdict": report.verdict.sentence, **attacks}

    return part


PARTS: dict[str, Callable[[Rows, Subject, int], Row]] = {
    "direct": direct,
    "first": first,
    "reverse": reverse,
    "spelling": spelling,
    "head": head,
    "domains": domains,
    "relearn": relearning(RATES[1]),
    "relink": relinking,
    "relearn-slow": relearning(RATES[0]),
    "relearn-fast": relearning(FAST),
    "relearn-long": relearning(LONG_RATE, steps=LONG_STEPS),
    "relearn-embeddings": relearning(RATES[1], steps=EMBEDDING_STEPS, embedding_rate=EMBEDDING_RATE),
    "relearn-only-embeddings": relearning(0.0, steps=ONLY_STEPS, embedding_rate=ONLY_RATE),
    "everything": everything,
    "relearn-swapped": relearning(RATES[1], fold=1),
    "relearn-slow-swapped": relearning(RATES[0], fold=1),
    "learning": learning,
    "questions": audited(attacks=ASKED),
    "audit": audited(budget="fast"),
}


# --- The original alone: what a model gets right that cannot know


def named_anew(facts: Sequence[Fact], names_: Mapping[str, str]) -> tuple[Fact, ...]:
    """The facts with an invented name in place of each entity."""

    def renamed(fact: Fact) -> Fact:
        new = names_[entity_of(fact)]
        texts = [re.sub(rf"(?<!\w)(the )?{re.escape(fact.entity)}(?!\w)", new, text) for text in fact.prompts]
        return replace(fact, entity=new, prompt=texts[0], paraphrases=tuple(texts[1:]), translations={})

    return tuple(map(renamed, facts))


def choices_alone(rows: Rows, lm: Subject, seed: int) -> Row:
    """What the choices give away without a question, and how many sentences of the prose that edits retain state a capital."""
    texts = [Fact(prompt=text, answer="x", id=str(number)) for number, text in enumerate(sentences())]
    return {"V": choices_only(lm, rows.capitals).accuracy, "prose states": len(leaks(texts, rows.capitals))}


def reversed_choices_alone(rows: Rows, lm: Subject, seed: int) -> Row:
    """What the choices of the reverse questions give away."""
    return {"all": choices_only(lm, reversed_facts(rows.capitals, seed)).accuracy}


def invented_names(steps: int) -> Callable[[Rows, Subject, int], Row]:
    """Relinking of countries with invented names: what the languages and the choices give away."""

    def part(rows: Rows, lm: Subject, seed: int) -> Row:
        known = list(dict.fromkeys(entity_of(fact) for fact in (*rows.capitals, *rows.languages)))
        fresh = fresh_facts(rows.capitals, len(known), seed)
        names_ = {entity: new.entity for entity, new in zip(known, fresh, strict=True)}
        capitals, languages = named_anew(rows.capitals, names_), named_anew(rows.languages, names_)
        before = share(rows.asked(lm, capitals))
        student = relearn(lm, seen(languages), rate=RELINK_RATE, steps=steps, seed=seed)
        return after_languages(rows, student, capitals, languages) | {"before": before}

    return part


ORIGINAL = {
    "choices": choices_alone,
    "choices-reverse": reversed_choices_alone,
    "head-ranks": head_ranks,
    "invented": invented_names(RELINK_STEPS),
    "invented-long": invented_names(2 * RELINK_STEPS),
}


def sentences() -> list[str]:
    """The sentences of the built-in prose."""
    return [part for document in rp.data.prose().documents for part in re.split(r"(?<=[.!?])\s", document.text)]


# --- Running


def main() -> None:
    """Make an edit, measure parts of its row, and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edit", default="original", help="See --list.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", default="direct,domains,relearn,relink", help="Comma-separated, see --list.")
    parser.add_argument("--folder", type=Path, default=CACHE, help="Where edits are kept.")
    parser.add_argument("--list", action="store_true")
    parser.add_argument(
        "--table", action="store_true", help="Print the table of everything measured, and write it to docs/removal.md."
    )
    parser.add_argument("--figure", action="store_true", help="Draw figures/removal.png.")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.list:
        print("edits:", *EDITS, "\nparts:", *PARTS, "\nof the original alone:", *ORIGINAL)
    elif options.table or options.figure:
        from bench import removal_table

        if options.figure:
            removal_table.figure()
        if options.table:
            removal_table.PAGE.write_text(removal_table.page(removal_table.PAGE.read_text()))
            print(removal_table.table())
    else:
        measure(options.edit, options.seed, options.parts.split(","), options.folder)


def measure(edit: str, seed: int, parts: Sequence[str], folder: Path) -> None:
    """Measure the parts of a row that are not in its file."""
    rows = Rows()
    row = earlier(edit, seed)
    lm = edited(rows, edit, seed, folder, row)
    for name in parts:
        if name not in row:
            start, busy = time.time(), time.process_time()
            row[name] = (PARTS | ORIGINAL)[name](rows, lm, seed) | {"core seconds": round(time.process_time() - busy)}
            brief = {key: round(v, 3) if isinstance(v, float) else v for key, v in row[name].items() if key != "right"}
            print(edit, seed, name, brief, f"{time.time() - start:.0f} s", flush=True)
            keep(row, edit, seed)


def edited(rows: Rows, edit: str, seed: int, folder: Path, row: Row) -> Subject:
    """The edited model: made, or what an earlier run kept."""
    if edit == "original":
        return rows.lm
    saved = folder / f"{edit}-{seed}.pt"
    if saved.exists() and "made" in row:
        lm = untied(rows.lm) if row["made"].get("untied") else rp.load("smollm2-135m")
        lm.model.load_state_dict(torch.load(saved), strict=False)
        return lm
    start, busy = time.time(), time.process_time()
    lm, notes = EDITS[edit](rows, seed)
    row["made"] = {"minutes": (time.time() - start) / 60, "core minutes": (time.process_time() - busy) / 60, **notes}
    old = rows.lm.model.state_dict()
    changed = {name: value for name, value in lm.model.state_dict().items() if not torch.equal(value, old[name])}
    row["made"] |= {
        "tensors": len(changed),
        "change": float(torch.cat([(v - old[n]).flatten() for n, v in changed.items()]).norm()),
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(changed, saved)
    print(edit, seed, "made", row["made"], flush=True)
    keep(row, edit, seed)
    return lm


def earlier(edit: str, seed: int) -> Row:
    """What is measured already."""
    path = RESULTS / f"removal-{edit}-{seed}.json"
    return dict(json.loads(path.read_text())["rows"][0]) if path.exists() else {"edit": edit, "seed": seed}


def keep(row: Row, edit: str, seed: int) -> None:
    """Write the row."""
    record(f"removal-{edit}-{seed}", [row], module="removal")


if __name__ == "__main__":
    main()
