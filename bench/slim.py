"""What cutting code neurons out of SmolLM2-135M costs prose, and what it saves: the frontier of slimmed models.

Neurons are scored on the development halves and each layer gives up the same share, so that the widths stay uniform and
plain transformers loads the export; perplexity is on documents that no score saw. The time of a forward pass of 8 x 128
tokens is a paired ratio of CPU time on one thread. Run as `python -m bench.slim --seed 0`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

import repedit as rp
from bench.corpora import chunks, splits
from bench.record import record
from bench.timing import paired
from repedit.edit import Edit
from repedit.models.subject import Subject

FRACTIONS = (80 / 1536, 160 / 1536, 320 / 1536)
"""Of a layer: multiples of 8 neurons, so that nothing is padded."""
SCORES: dict[str, dict[str, Any]] = {"|z|": {}, "|z g|": {"importance": "gxa"}}
FILLS = {"|z|": ("zero", "mean"), "|z g|": ("mean",)}
COLLECTED, MEASURED = 64, 32
"""Chunks of 128 tokens."""
BARS = dict(zip(FRACTIONS, (1.35, 1.15, None), strict=True))


def edits(lm: Subject, seed: int) -> Iterator[tuple[dict[str, Any], Edit]]:
    """What is cut, and the edit."""
    fit = {name: chunks(development, COLLECTED, seed) for name, (development, _) in splits().items()}
    f, r = (rp.collect(lm, fit[name], gradients=True, progress=False) for name in ("code", "prose"))
    for name, options in SCORES.items():
        scores = rp.score(f, r, combine="ratio", **options)
        for fraction in FRACTIONS:
            for fill in FILLS[name]:
                values = {"values": r} if fill == "mean" else {}
                edit = rp.prune(scores, fraction=fraction, scope="layer", fill=fill, **values)
                yield {"score": name, "fraction": fraction, "fill": fill}, edit


def scopes(lm: Subject, seed: int) -> list[dict[str, Any]]:
    """A tenth of the MLP neurons, as equal shares or chosen over all layers, on development documents that no score saw.

    Both as zeros filled with the mean of prose: what is lost does not depend on the layout, and only ragged widths can
    hold the second without carrying zeros.
    """
    parts = {name: development.halves(seed + 1) for name, (development, _) in splits().items()}
    fit, held = (
        {name: chunks(part[i], n, seed) for name, part in parts.items()} for i, n in ((0, COLLECTED), (1, MEASURED))
    )
    f, r = (rp.collect(lm, fit[name], progress=False) for name in ("code", "prose"))
    scores = rp.score(f, r, combine="ratio")
    before = {name: rp.predictions(lm, corpus, progress=False).perplexity for name, corpus in held.items()}
    rows = []
    for scope in ("layer", "global"):
        edit = rp.prune(scores, fraction=FRACTIONS[1], scope=scope, fill="mean", values=r)
        after = {
            name: rp.predictions(lm, corpus, edit=edit, progress=False).perplexity for name, corpus in held.items()
        }
        counts = sorted(map_.rank_removed for map_ in edit.maps.values())
        ratios = {f"{name} perplexity ratio": after[name] / before[name] for name in held}
        rows.append({"scope": scope, "fraction": FRACTIONS[1], **ratios, "pruned in a layer": [counts[0], counts[-1]]})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure every cut, write bench/results/slim.json and print a table; or compare scopes, bench/results/slim-scope.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", choices=("cuts", "scope"), default="cuts")
    options = parser.parse_args()
    seed = options.seed
    torch.set_num_threads(1)
    lm = rp.load("smollm2-135m")
    if options.part == "scope":
        print(record("slim-scope", scopes(lm, seed), module="slim", seed=seed))
        return
    test = {name: chunks(evaluation, MEASURED, seed) for name, (_, evaluation) in splits().items()}
    before = {name: rp.predictions(lm, corpus, progress=False) for name, corpus in test.items()}
    ids = torch.randint(100, 40000, (8, 128), generator=torch.Generator().manual_seed(0))
    rows = []
    for row, edit in edits(lm, seed):
        small = rp.slimmed(edit, lm)
        after = {name: rp.predictions(small, corpus, progress=False) for name, corpus in test.items()}
        row |= {"mlp_parameters_removed": 1 - mlp(small) / mlp(lm), "parameters": small.model.num_parameters()}
        row |= {f"{name} perplexity ratio": after[name].perplexity / before[name].perplexity for name in test}
        row |= {f"{name} top-1": after[name].top1 for name in test}
        if row["score"] == "|z|" and row["fill"] == "zero":
            row["time"] = vars(paired(lambda: forward(lm, ids), lambda: forward(small, ids), pairs=5))  # noqa: B023
        row["bar"] = BARS[row["fraction"]]
        rows.append(row)
        print(row, flush=True)
    print(record("slim", rows, before={name: p.top1 for name, p in before.items()}))
    print(
        "| score | share of each layer | fill | MLP parameters removed | prose perplexity | code perplexity | forward time |"
    )
    print("|---" * 7 + "|")
    for row in rows:
        time = f"{row['time']['median']:.2f}" if "time" in row else ""
        print(f"| {row['score']} | {row['fraction']:.1%} | {row['fill']} | {row['mlp_parameters_removed']:.1%} | "
              f"x{row['prose perplexity ratio']:.3f} | x{row['code perplexity ratio']:.3f} | {time} |")  # fmt: skip


def mlp(lm: Subject) -> int:
    """Entries of the MLP matrices of all layers."""
    return sum(p.numel() for name, p in lm.model.named_parameters() if ".mlp." in name and name.endswith(".weight"))


def forward(lm: Subject, ids: torch.Tensor) -> None:
    """One pass without gradients."""
    with torch.no_grad():
        lm.model(ids)


if __name__ == "__main__":
    main()
