"""Selective pruning of SmolLM2-135M: forget = CPython standard library, retain = WikiText-2 test.

Scores are collected on 64 chunks of 128 tokens a set, drops are measured on 32 other chunks of other documents, for
three chunk seeds. Run as `python -m bench.pruning [--part scores | reversed | learned]`; a seed of scores takes about 6
minutes on two cores, one of a learned mask 12.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

import repedit as rp
from bench.corpora import chunks, splits
from bench.record import record, spread
from repedit.activations.prediction import Predictions, drop, predictions
from repedit.data import Corpus
from repedit.edit import Edit
from repedit.models.subject import Subject

COLLECT, EVALUATE = 64, 32
TOKENS = {"collect": 8128, "evaluate": 4064}
BARS: dict[str, tuple[str, Callable[[dict[str, float]], bool]]] = {
    "abs ratio, MLP, 5 %": (
        "selectivity >= 35, prose drop <= 12",
        lambda r: r["selectivity"] >= 35 and r["prose"] <= 12,
    ),
    "abs difference, MLP, 1 %": (
        "selectivity >= 36, prose drop <= 11",
        lambda r: r["selectivity"] >= 36 and r["prose"] <= 11,
    ),
    "random like abs ratio 5 %": ("|selectivity| <= 8", lambda r: abs(r["selectivity"]) <= 8),
    "reversed abs ratio, MLP, 5 %": ("prose minus code >= 22", lambda r: -r["selectivity"] >= 22),
    "reversed abs ratio, sinks guarded, MLP, 5 %": ("prose minus code >= 22", lambda r: -r["selectivity"] >= 22),
    "MLP minus attention, abs ratio 5 %": ("selectivity >= 20", lambda r: r["selectivity"] >= 20),
    "rms ratio, MLP, 3 %, sinks guarded": ("prose drop <= 8", lambda r: r["prose"] <= 8),
    "rms ratio, MLP, 3 %, sinks not guarded": ("prose drop >= 20", lambda r: r["prose"] >= 20),
    "signed attribution, MLP, 1 %": ("selectivity <= 10", lambda r: r["selectivity"] <= 10),
    "learned mask, MLP and attention": (
        "selectivity >= 59.6, prose drop <= 10; moonshot 75",
        lambda r: r["selectivity"] >= 59.6 and r["prose"] <= 10,
    ),
}


def reversed_edits(subject: Subject, code: Corpus, prose: Corpus) -> dict[str, Edit]:
    """Forget prose and keep code; sink neurons, which serve both, count as prose unless they are guarded."""
    f, r = (rp.collect(subject, c, limit_tokens=TOKENS["collect"], progress=False) for c in (code, prose))
    return {
        f"reversed abs ratio, sinks {name}, MLP, 5 %": rp.prune(
            rp.score(r, f, combine="ratio", protect_sinks=guard), fraction=0.05
        )
        for name, guard in (("guarded", True), ("not guarded", False))
    }


def edits(subject: Subject, code: Corpus, prose: Corpus) -> dict[str, Edit]:
    """The edits to compare, by name."""
    options = {"limit_tokens": TOKENS["collect"], "progress": False}
    both = [rp.collect(subject, c, "*.mlp.neurons,*.attn.neurons", gradients=True, **options) for c in (code, prose)]
    f, r = (collection.only("mlp.neurons") for collection in both)
    fa, ra = (collection.only("attn.neurons") for collection in both)
    ratio = rp.prune(rp.score(f, r, combine="ratio", protect_sinks=False), fraction=0.05)
    rms = [rp.score(f, r, importance="rms", combine="ratio", protect_sinks=guard) for guard in (True, False)]
    signed = rp.score(f, r, importance="attribution", signed=True, protect_sinks=False)
    found = {
        "abs ratio, MLP, 5 %": ratio,
        "abs difference, MLP, 1 %": rp.prune(rp.score(f, r, protect_sinks=False), fraction=0.01),
        "abs difference, sinks guarded, MLP, 1 %": rp.prune(rp.score(f, r, protect_sinks=True), fraction=0.01),
        "gxa difference, MLP, 1 %": rp.prune(rp.score(f, r, importance="gxa", protect_sinks=False), fraction=0.01),
        "rank of abs ratio and gxa, MLP, 5 %": rp.prune(
            rp.score(f, r, combine="rank", protect_sinks=False), fraction=0.05
        ),
        "reversed abs ratio, MLP, 5 %": rp.prune(rp.score(r, f, combine="ratio", protect_sinks=False), fraction=0.05),
        "abs ratio, attention, 5 %": rp.prune(rp.score(fa, ra, combine="ratio", protect_sinks=False), fraction=0.05),
        "rms ratio, MLP, 3 %, sinks guarded": rp.prune(rms[0], fraction=0.03),
        "rms ratio, MLP, 3 %, sinks not guarded": rp.prune(rms[1], fraction=0.03),
        "signed attribution, MLP, 1 %": rp.prune(signed, fraction=0.01),
    }
    return found | {f"random like abs ratio 5 % #{i}": rp.random_like(ratio, seed=i) for i in range(5)}


def measured(subject: Subject, base: dict[str, Predictions], test: dict[str, Corpus], edit: Edit) -> dict[str, float]:
    """Relative drops, selectivity and loss rises of an edit."""
    after = {name: _predicted(subject, corpus, edit) for name, corpus in test.items()}
    drops = {name: drop(base[name], after[name]) for name in test}
    rises = {f"{name} loss rise": after[name].mean_loss - base[name].mean_loss for name in test}
    return (
        drops
        | rises
        | {"selectivity": drops["code"] - drops["prose"], "neurons": sum(m.rank_removed for m in edit.maps.values())}
    )


def one_seed(subject: Subject, seed: int, part: str) -> dict[str, dict[str, float]]:
    """Every row of a part for one draw of chunks."""
    halves = splits()
    fit = {name: chunks(development, COLLECT, seed) for name, (development, _) in halves.items()}
    test = {name: chunks(evaluation, EVALUATE, seed) for name, (_, evaluation) in halves.items()}
    base = {name: _predicted(subject, corpus, None) for name, corpus in test.items()}
    if part == "learned":
        found = {
            "learned mask, MLP and attention": rp.fit.gates(subject, halves["code"][0], halves["prose"][0], seed=seed)
        }
    else:
        found = {"scores": edits, "reversed": reversed_edits}[part](subject, fit["code"], fit["prose"])
    rows = {}
    for name, edit in found.items():
        rows[name] = row = measured(subject, base, test, edit)
        numbers = f"code {row['code']:6.1f}  prose {row['prose']:6.1f}  selectivity {row['selectivity']:6.1f}"
        print(f"seed {seed}  {name:45s} {numbers}", flush=True)
    return with_derived(rows) if part == "scores" else rows


def with_derived(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The mean of the random controls, and MLP against attention."""
    random = [rows.pop(name) for name in list(rows) if name.startswith("random like")]
    rows["random like abs ratio 5 %"] = {key: sum(r[key] for r in random) / len(random) for key in random[0]}
    mlp, attention = rows["abs ratio, MLP, 5 %"], rows["abs ratio, attention, 5 %"]
    rows["MLP minus attention, abs ratio 5 %"] = {"selectivity": mlp["selectivity"] - attention["selectivity"]}
    return rows


def main() -> None:
    """Measure, print one line a method, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--part", choices=("scores", "reversed", "learned"), default="scores")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    subject = rp.load("smollm2-135m")
    name = "pruning" if arguments.part == "scores" else f"pruning_{arguments.part}"
    runs: list[dict[str, dict[str, float]]] = []
    for seed in range(arguments.seeds):
        runs.append(one_seed(subject, seed, arguments.part))
        # Written after every seed, so that a run cut short keeps what it measured.
        context = {"seeds": list(range(len(runs))), "model": subject.fingerprint(), "tokens": TOKENS}
        unit = "per cent of the original top-1 accuracy"
        print(record(name, summary(runs), module="pruning", unit=unit, **context), flush=True)


def summary(runs: list[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """One row a method: means and spreads over the seeds, and whether the bar is met by the mean."""
    rows: list[dict[str, Any]] = []
    for name, keys in runs[0].items():
        row: dict[str, Any] = {"name": name, **{key: spread([run[name][key] for run in runs]) for key in keys}}
        bar, passes = BARS.get(name, ("", None))
        status = "recorded" if passes is None else ("pass" if passes({k: row[k]["mean"] for k in keys}) else "fail")
        rows.append(row | {"bar": bar, "status": status})
        numbers = "  ".join(f"{key} {row[key]['mean']:.1f}" for key in ("code", "prose", "selectivity") if key in row)
        print(f"{status:9s} {name:45s} {numbers}  {bar}")
    return rows


def _predicted(subject: Subject, corpus: Corpus, edit: Edit | None) -> Predictions:
    return predictions(subject, corpus, edit=edit, limit_tokens=TOKENS["evaluate"], progress=False)


if __name__ == "__main__":
    main()
