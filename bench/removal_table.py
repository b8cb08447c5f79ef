"""The rows of `bench.removal` in one table and one figure: what comes back, against what else is lost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.mrp_report import shown
from bench.record import RESULTS
from bench.removal_rows import OTHERS

FIGURE = Path(__file__).parents[1] / "figures" / "removal.png"
PAGE = Path(__file__).parents[1] / "docs" / "removal.md"
START, END = "<!-- table: python -m bench.removal --table -->", "<!-- end of table -->"
TOLD = {
    "original": "original", "MRP": "trained projection (`rp.mrp`)", "gradient difference": "gradient difference",
    "exchange": "exchange, regression", "linear-mean": "mean, closed form", "solved-exchange": "exchange, solved from zero",
    "solved-mean": "mean, solved from zero", "names-mean": "embeddings of the names averaged", "names-language": "embeddings of the names averaged by language", "names-both": "embeddings of countries and capitals averaged",
    "names-erased": "names averaged and overwritten",
    "names-4000": "countries and capitals averaged, tokens from 4,000 on",
    "names-2000": "countries and capitals averaged, tokens from 2,000 on",
    "names-merged": "names merged (`rp.fit.merge`)",
    "names-unread": "names merged in the input alone",
    "names-tied": "names averaged in the input and in the output",
    "answers-mean": "embeddings of the capitals averaged", "localized": "localised wrong answers",
    "block_by_block": "block by block (KUnBR)", "cir": "common part removed (CIR)", "rep_select": "common gradients removed (RepSelect)", "mudman": "fork and mask (MUDMAN)",
    "sam": "sharpness-aware NPO (SAM)", "undo": "noise and distillation (UNDO)", "layered": "layered", "blur_npo": "BLUR-NPO", "npo_gdr": "NPO + GD", "npo_klr": "NPO + KL",
}  # fmt: skip
"""What rows are called in the table."""
RETRAINED = ("relearn-slow", "relearn", "relearn-fast", "relearn-only-embeddings", "relearn-long")
"""The trainings on T that share a column, in its order."""
SWAPPED = ("relearn-slow-swapped", "relearn-swapped")
QUESTIONS = ("first", "spelling", "reverse", "head")
"""Attacks that train nothing."""
ATTACKS = (*RETRAINED, *SWAPPED, "relink", "everything", *QUESTIONS)
DRAWS = 4000


@dataclass(frozen=True)
class Setting:
    """One edit with one seed: accuracy by attack, and on other domains."""

    edit: str
    seed: int
    parts: Mapping[str, Mapping[str, Any]]
    source: str
    """The module that measured it."""
    recovery: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Attack -> (R, its upper 97.5 % bound)."""

    def after(self, attack: str) -> float | None:
        """Accuracy on what the attack did not train on."""
        part = self.parts.get(attack)
        return None if part is None else part["V" if "V" in part else "all"]

    @property
    def worst(self) -> tuple[str, float, float] | None:
        """(attack, R, bound) of the training that recovers most."""
        return self._worst([name for name in self.recovery if name not in QUESTIONS])

    @property
    def worst_question(self) -> tuple[str, float, float] | None:
        """(attack, R, bound) of the question that recovers most, without training."""
        return self._worst([name for name in self.recovery if name in QUESTIONS])

    @property
    def worst_attack(self) -> tuple[str, float, float] | None:
        """That of trainings and questions together."""
        return self._worst(list(self.recovery))

    def _worst(self, names: Sequence[str]) -> tuple[str, float, float] | None:
        return max(((name, *self.recovery[name]) for name in names), key=lambda row: row[1], default=None)


def settings() -> list[Setting]:
    """Every row measured, those of bench.mrp first, each with its R."""
    found = [*_of_mrp(), *_of_removal(), *_of_unlearn()]
    originals = {}
    for setting in found:
        if setting.edit == "original":
            originals |= dict(setting.parts)
    return [replace(s, recovery=s.recovery or _recoveries(s, originals)) for s in found]


def _of_removal() -> Iterator[Setting]:
    paths = sorted(RESULTS.glob("removal-*.json"))
    for path in sorted(paths, key=lambda path: not path.name.startswith("removal-original-")):
        row = json.loads(path.read_text())["rows"][0]
        yield Setting(row["edit"], row["seed"], {k: v for k, v in row.items() if isinstance(v, dict)}, "bench.removal")


def _of_mrp() -> Iterator[Setting]:
    """The original, the trained projection and gradient difference, which bench.mrp attacked in the same way."""
    made = {row["name"]: row for row in json.loads((RESULTS / "mrp-one-0.json").read_text())["rows"]}
    attacked = json.loads((RESULTS / "mrp-attack-0.json").read_text())["rows"]
    for name, under in (
        ("original", "original"),
        ("MRP", "MRP, folded"),
        ("gradient difference", "gradient difference"),
    ):
        forget = made[name]["forget"]
        parts: dict[str, Any] = {
            "direct": {"trained": forget["phrasing 0"], "unseen": forget["phrasing 3"]},
            "domains": made[name]["retain"],
        }
        for row in attacked:
            if row["name"] == under:
                parts["relearn" if row["rate"] == 1e-4 else "relearn-slow"] = {
                    "T": row["T"],
                    "V": row["V"],
                    "V unseen": row["V unseen"],
                }
        if "core_minutes" in made[name]:
            parts["made"] = {"core minutes": made[name]["core_minutes"]}
        yield Setting(name, 0, parts, "bench.mrp")


def _of_unlearn() -> Iterator[Setting]:
    """The recipes of bench.unlearn, whose R is that of the audit's retraining: T taught at three rates, both folds."""
    for path in sorted(RESULTS.glob("unlearn-smollm2-*.json")):
        row = json.loads(path.read_text())["rows"][0]
        after = row["after"]
        parts = {
            "direct": {"trained": after["forget"]["phrasing 0"], "unseen": after["forget"]["phrasing 3"]},
            "domains": after["retain"], "made": {"core minutes": row["core_minutes"]},
        }  # fmt: skip
        back = {r["attack"]: (r["value"], r["bound"][1]) for r in row.get("audit", {}).get("recoveries", ())}
        yield Setting(
            row["name"], row["seed"], parts, "bench.unlearn", {"audit rtt": back["rtt"]} if "rtt" in back else {}
        )


# --- R


def _recoveries(setting: Setting, original: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """R of every attack for which edited model, original and floor are measured."""
    if setting.edit == "original":
        return {}
    found = {}
    floors = {
        "relink": original.get("invented", {}).get("all"),
        "reverse": original.get("choices-reverse", {}).get("all"),
    }
    plain = original.get("choices", {}).get("V")
    counts = {"relink": 151, "first": 151, "spelling": 151, "reverse": 151, "head": 151, "everything": 75}
    for attack in ATTACKS:
        edited, floor = setting.after(attack), floors.get(attack, plain)
        reference = Setting("original", 0, original, "").after(attack.removesuffix("-swapped"))
        if edited is not None and floor is not None and reference is not None:
            found[attack] = recovery(edited, reference, floor, counts.get(attack, 75))
    return found


def recovery(edited: float, original: float, floor: float, count: int) -> tuple[float, float]:
    """(R, upper 97.5 % bound), R = (edited - floor) / (original - floor).

    The bound is that of resampled answers of all three models, each on `count` facts, as if they were independent.
    """
    rng = np.random.default_rng(0)
    a, b, c = (rng.binomial(count, p, DRAWS) / count for p in (edited, original, floor))
    drawn = (a - c) / np.maximum(b - c, 1 / count)
    return (edited - floor) / (original - floor), float(np.quantile(drawn, 0.975))


# --- The table


def table() -> str:
    """A Markdown table, a line for each setting."""
    head = (
        "edit", "seed", "direct", "unseen wording", "name as first word", "name in lower case", "embeddings from the head", "reverse question", "V after retraining on T (2e-5, 1e-4, 5e-4, 2e-3 for the input embeddings alone, 2e-4 for 160 steps)", "T", "relinking: all (taught, others)", "R of relinking: all (taught, others)",
        "R, worst training (bound)", "R, worst question (bound)", "other subjects, worst kept", "languages kept", "perplexity", "core minutes",
    )  # fmt: skip
    found = settings()
    before = next(s for s in found if s.edit == "original" and "domains" in s.parts).parts["domains"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    merged: dict[tuple[str, int], Setting] = {}
    for s in found:
        known = merged.get((s.edit, s.seed))
        merged[s.edit, s.seed] = replace(s, parts={**(known.parts if known else {}), **s.parts})
    reference = merged["original", 0].parts
    return "\n".join(
        [*lines, f"| {' | '.join(_floor(reference, len(head)))} |"]
        + [f"| {' | '.join(_cells(s, before, reference))} |" for s in merged.values()]
    )


def _floor(original: Mapping[str, Mapping[str, Any]], columns: int) -> list[str]:
    """What a model gets right that knows no capital."""
    alone, invented = original.get("choices"), original.get("invented")
    plain = "-" if alone is None else shown([alone["V"]])
    back = "-" if (part := original.get("choices-reverse")) is None else shown([part["all"]])
    asked, trained = [plain] * 5, ", ".join([plain] * len(RETRAINED))
    cells = ["floor", "0", *asked, back, trained, "-", _relinked(invented), "0"]
    return cells + ["-"] * (columns - len(cells))


def _relinked(part: Mapping[str, Any] | None) -> str:
    return "-" if part is None else f"{shown([part['all']])} ({shown([part['taught']])}, {shown([part['others']])})"


def page(text: str) -> str:
    """The page with the table in its place."""
    before, rest = text.split(START)
    return f"{before}{START}\n{table()}\n{END}{rest.split(END)[1]}"


def _cells(s: Setting, before: Mapping[str, float], original: Mapping[str, Mapping[str, Any]]) -> list[str]:
    def value(part: str, key: str) -> str:
        return shown([s.parts[part][key]]) if part in s.parts and key in s.parts[part] else "-"

    relink, ends = s.parts.get("relink"), [original.get(name) for name in ("relink", "invented")]
    back = None
    if relink is not None and ends[0] is not None and ends[1] is not None:
        high, low = ends
        back = {key: (relink[key] - low[key]) / (high[key] - low[key]) for key in ("all", "taught", "others")}
    kept = worst_kept(s, before)
    return [
        TOLD.get(s.edit, s.edit), str(s.seed), value("direct", "trained"), value("direct", "unseen"), value("first", "all"), value("spelling", "all"), value("head", "all"), value("reverse", "all"),
        *(", ".join(value(part, side) for part in RETRAINED) for side in "VT"),
        _relinked(relink), _relinked(back),
        _bounded(s.worst), _bounded(s.worst_question),
        "-" if kept is None else f"{shown([kept[1]])} ({kept[0]})",
        "-" if kept is None else shown([s.parts["domains"]["languages"] / before["languages"]]),
        "-" if kept is None else f"x{shown([s.parts['domains']['perplexity'] / before['perplexity']])}",
        value("made", "core minutes"),
    ]  # fmt: skip


def _bounded(worst: tuple[str, float, float] | None) -> str:
    return "-" if worst is None else f"{shown([worst[1]])} ({shown([worst[2]])}), {worst[0]}"


def worst_kept(s: Setting, before: Mapping[str, float]) -> tuple[str, float] | None:
    """(domain, share of its accuracy) of the domain about other subjects that lost most."""
    if "domains" not in s.parts:
        return None
    shares = {name: s.parts["domains"][name] / before[name] for name in OTHERS}
    name = min(shares, key=lambda n: shares[n])
    return name, shares[name]


# --- The figure


def figure() -> None:
    """R of the worst attack against the worst kept domain, one point a setting."""
    from repedit.plot.canvas import MARKERS, NEUTRAL, SERIES, canvas

    found = settings()
    before = next(s for s in found if s.edit == "original" and "domains" in s.parts).parts["domains"]
    sheet = canvas(9.0, 5.0)
    axes = sheet.subplots()
    for number, s in enumerate([s for s in found if s.worst_attack is not None and worst_kept(s, before) is not None]):
        (attack, r, bound), (_, kept) = s.worst_attack, worst_kept(s, before)  # type: ignore[misc]
        label = f"{TOLD.get(s.edit, s.edit).replace(chr(96), '')} (worst: {attack})"
        colour, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
        axes.errorbar(kept, r, yerr=[[0], [max(bound - r, 0)]], fmt=marker, color=colour, label=label, capsize=3)
    axes.axhline(1, color=NEUTRAL, lw=0.8, ls=":")
    axes.axhline(0, color=NEUTRAL, lw=0.8, ls=":")
    axes.axvline(0.9, color=NEUTRAL, lw=0.8, ls="--")
    axes.set_xlabel("accuracy kept on the worst domain about other subjects")
    axes.set_ylabel("R of the worst attack")
    axes.set_yticks([0.0, 0.5, 1.0])
    facts = [
        "SmolLM2-135M, 151 capitals, one point a seed",
        "0: floor, 1: original",
        "bars: up to the 97.5 % bound",
        "not every attack was run on every edit",
    ]
    sheet.finish("What attacks bring back, and what else is lost", facts, legend=axes)
    FIGURE.parent.mkdir(exist_ok=True)
    sheet.savefig(FIGURE, dpi=110, metadata={"Description": "python -m bench.removal --figure"})
    print(FIGURE)
