"""The tables of a report: rows of text, which the console, Markdown and the pages show alike."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

from repedit.auditing.attack import RAN, Finding
from repedit.auditing.report import COMPLETE, ENDED_EARLY, INTERRUPTED, RETAIN_CHECK, Recovery, Report
from repedit.auditing.verdict import retain_damage
from repedit.metrics.benchmarks import Comparison
from repedit.plot.reports import ROLES, interval_text, is_measured, recoveries_by_strength

COLUMNS = ("attack", "edited", "original", "floor", "R [95 %]", "setting")
INTERVALS = (
    "R = (edited - floor) / (original - floor), all three after the same attack: 0 is a model that never knew, 1 the original. "
    "Intervals hold over all attacks at once; * marks that of the attack alone."
)
RATIO = (
    "The last column is the ratio that papers print; it is not corrected for guessing, and nothing is decided by it."
)
EXAMPLE_COLUMNS = ("attack", "prompt", "answer", "edited", "attacked", "reference")
"""The first columns of examples; any other field follows."""
MAX_EXAMPLES = 10
"""Examples that are shown."""
MAX_ROWS = 400
"""Rows of a diagnostic that are shown; audit.json has the rest."""
INCOMPLETE = {
    ENDED_EARLY: "ended early: no attack left out could change the verdict; how much all attacks bring back was not measured",
    INTERRUPTED: "interrupted: the verdict is that of the attacks made so far; how much all attacks bring back was not measured",
}
"""What a reader of an audit that is not complete must know, by its state."""
WITHHELD = "the texts of the facts are withheld"
_NUMBER = re.compile(r"-?[\d,]+(\.\d+)?(e[+-]?\d+)?%?|n/a|\[.*\]\*?|")


class Table(NamedTuple):
    """Rows of text under a heading."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    @property
    def kinds(self) -> list[str]:
        """What each column holds: "number", "text", or "long" for texts of more than 30 characters."""
        columns = ([row[n] for row in self.rows] for n in range(len(self.columns)))
        return [
            "number"
            if any(cells) and all(map(_NUMBER.fullmatch, cells))
            else ("long" if max(map(len, cells), default=0) > 30 else "text")
            for cells in columns
        ]


# --- Values as text


def format_number(value: float | None, digits: int = 2) -> str:
    """ "0.42"; "n/a" if nothing was measured."""
    return "n/a" if value is None or not is_measured(value) else f"{value:.{digits}f}"


def format_recovery(recovery: Recovery) -> str:
    """R with its interval, or why there is none."""
    text = f"{format_number(recovery.value)} {interval_text(recovery)}".strip()
    if recovery.status != RAN:
        return f"{recovery.status}: {text}" if is_measured(recovery.value) else recovery.status
    return text if recovery.decides else f"{text}, not deciding"


def format_value(value: object) -> str:
    """Any JSON value in one line."""
    if isinstance(value, bool) or value is None:
        return "n/a" if value is None else "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {format_value(inner)}" for key, inner in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(format_value, value))
    return str(value)


def tables_of(values: Mapping[str, object]) -> list[tuple[str, Table]]:
    """Titled tables of a mapping: one without a title for its single values, then one for each nested value."""
    single = [[str(key), format_value(value)] for key, value in values.items() if _is_single(value)]
    nested = [(str(key), table_of(value)) for key, value in values.items() if not _is_single(value)]
    return ([("", Table(("what", "value"), single))] if single else []) + nested


def table_of(value: object) -> Table:
    """A mapping or a list as a table; mappings that all have the same keys become its columns."""
    pairs = list(
        value.items() if isinstance(value, Mapping) else enumerate(value if isinstance(value, Sequence) else ())
    )
    note = f"{len(pairs) - MAX_ROWS} more rows are in audit.json." if len(pairs) > MAX_ROWS else ""
    pairs = pairs[:MAX_ROWS]
    first = pairs[0][1] if pairs else None
    if isinstance(first, Mapping) and all(isinstance(v, Mapping) and set(v) == set(first) for _, v in pairs):
        rows = [[str(key), *(format_value(row[name]) for name in first)] for key, row in pairs]
        return Table(["", *map(str, first)], rows, note)
    return Table(("", "value"), [[str(key), format_value(inner)] for key, inner in pairs], note)


def _is_single(value: object) -> bool:
    """Whether a value fits in one cell: it is no mapping, and no list of lists or mappings."""
    if isinstance(value, Mapping):
        return False
    inner = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
    return len(inner) <= 12 and not any(isinstance(v, Mapping | list | tuple) for v in inner)


# --- Two models on the same texts


def comparison_table(comparison: Comparison) -> Table:
    """One row per text: top-1 accuracy and perplexity of both models, and the drop with its interval."""
    columns = (
        "text", "next token right, before", "after", "relative drop (95 % interval)", "perplexity, before", "after", "tokens",
    )  # fmt: skip
    rows = []
    for name, before in comparison.base.items():
        after = comparison.edited[name]
        rows.append([
            name, f"{before.top1:.1%}", f"{after.top1:.1%}", comparison.effect(name).percentage, f"{before.perplexity:.1f}",
            f"{after.perplexity:.1f}", str(int(before.count.sum())),
        ])  # fmt: skip
    return Table(columns, rows)


# --- What attacks bring back


def recovery_row(recovery: Recovery) -> list[str]:
    """The cells of `COLUMNS`."""
    accuracies = (format_number(v) for v in (recovery.edited, recovery.original, recovery.floor))
    return [recovery.attack, *accuracies, format_recovery(recovery), _setting(recovery)]


def summary(report: Report) -> Table:
    """One row per attack, as on the console."""
    return Table(COLUMNS, [recovery_row(r) for r in recoveries_by_strength(report)], INTERVALS)


def recoveries(report: Report) -> Table:
    """One row per attack, also with its level, both intervals and the uncorrected ratio."""
    columns = ("attack", "attacker has", "edited", "original", "floor", "R", "95 %, all attacks", "95 %, this attack", "edited / original")  # fmt: skip
    rows = []
    for r in recoveries_by_strength(report):
        name = r.attack if r.status == RAN else f"{r.attack} ({r.status})"
        name = name if r.decides else f"{name} (not deciding)"
        level = {"B": "prompts", "W": "weights"}.get(r.level, "")
        numbers = [format_number(v) for v in (r.edited, r.original, r.floor, r.value)]
        intervals = [
            f"[{low:.2f}, {high:.2f}]" if is_measured(r.value, low, high) else "" for low, high in (r.bound, r.interval)
        ]
        rows.append([name, level, *numbers, *intervals, format_number(r.ratio)])
    return Table(columns, rows, RATIO)


def examples(report: Report) -> Table:
    """The first facts that came back, and what the models answered."""
    first = report.examples[:MAX_EXAMPLES]
    keys = {key: None for example in first for key in example if key != "id"}
    columns = [key for key in EXAMPLE_COLUMNS if key in keys] + [key for key in keys if key not in EXAMPLE_COLUMNS]
    more = len(report.examples) - len(first)
    note = f"{more} more are in audit.json." if more else ""
    if "withheld" in report.context:
        note = f"{report.context['withheld']} facts came back; {WITHHELD}."
    rows = [[format_value(example.get(key, "")) for key in columns] for example in first]
    return Table([key.replace("_", " ") for key in columns], rows, note)


def _setting(recovery: Recovery, role: str = "edited") -> str:
    """The settings that were chosen for a model, one for each half of V."""
    return " / ".join(dict.fromkeys(recovery.settings.get(role, ())))


# --- What became of a classifier


def gaps(report: Report) -> Table:
    """Each measure of a classifier beside that of the retrained model, and the images it is measured on."""
    columns = ("measure", "edited", "retrained", "original", "gap", "95 %", "all retrained", "measured on")
    rows = []
    for gap in report.gaps:
        low, high = gap.interval
        rows.append([
            gap.measure if gap.decides else f"{gap.measure} (not deciding)",
            *(format_number(v, 3) for v in (gap.edited, gap.reference, gap.original)),
            f"{gap.value:+.3f}" if is_measured(gap.value) else "n/a",
            f"[{low:+.3f}, {high:+.3f}]" if is_measured(low, high) else "",
            f"{gap.spread[0]:.3f} to {gap.spread[1]:.3f}" if is_measured(*gap.spread) else "",
            f"{gap.members} against {gap.others}" if gap.others else gap.members,
        ])  # fmt: skip
    note = "Gap = edited - retrained: 0 is a model that never saw the images; below 0 is no better than above."
    return Table(columns, rows, note if rows else "")


def memberships(report: Report) -> Table:
    """The AUC of every membership score of a classifier, and the accuracy of the regression on the loss."""
    details = {
        role: [f.details for f in findings if f.attack == "membership"] for role, findings in report.findings.items()
    }
    roles = [role for role in ("edited", "reference", "original") if details.get(role)]
    if not roles:
        return Table((), [])
    first = details[roles[0]][0]
    counts = [f"{first['members']} forget images", f"{first['others']} holdout images"]
    attacks = {f"AUC of {name}": name for name in first["auc"]}
    attacks |= {"accuracy of a regression on the loss": "loss_lr"} if "loss_lr" in first else {}
    rows = []
    for attack, key in attacks.items():
        medians = (median({**d["auc"], **d}[key] for d in details[role]) for role in roles)
        rows.append([attack, *(format_number(value, 3) for value in medians), *counts])
    heads = [{"reference": "retrained"}.get(role, role) for role in roles]
    note = "0.5 is no sign of membership; what counts is the retrained column."
    return Table(("attack", *heads, "members", "non-members"), rows, note)


# --- What an audit rests on


def headline(report: Report) -> list[str]:
    """What a reader must know beside the verdict: budget, facts, seeds, floor, and the notes."""
    context = report.context
    facts = [] if report.state == COMPLETE else [INCOMPLETE[report.state]]
    facts += [f"budget {context['budget']}"] if "budget" in context else []
    facts += [f"{context['n_test']:,} facts tested"] if "n_test" in context else []
    facts += [f"seeds {', '.join(map(str, context['seeds']))}"] if context.get("seeds") else []
    floors = sorted({r.floor_name for r in report.recoveries if r.floor_name})
    facts += [f"floor: {', '.join(floors)}"] if floors else []
    return [*facts, f"{len(report.not_run)} not run or not counted", *map(str, context.get("notes", ()))]


def not_run(report: Report) -> Table:
    """Attacks that did not run or do not count, with the reason; those with the same reason in one row."""
    names: dict[str, list[str]] = {}
    for name, reason in report.not_run.items():
        names.setdefault(reason, []).append(name)
    return Table(("what", "why not"), [[", ".join(group), reason] for reason, group in names.items()])


def retain_check(report: Report) -> Table:
    """Accuracy and perplexity on what should have been kept."""
    retain, rows = report.retain, []
    if retain.accuracy:
        accuracies = (format_number(v, 3) for v in retain.accuracy)
        rows.append(["accuracy on retain facts", f"{retain.facts:,} facts", *accuracies])
    if retain.perplexity:
        perplexities = (format_number(v, 1) for v in retain.perplexity)
        rows.append(["perplexity of retain text", f"{retain.tokens:,} tokens", *perplexities])
    damage = retain_damage(retain)
    note = f"Destroyed: {damage}." if damage else "" if rows else "No retain set was given."
    return Table(("what", "of", "original", "edited"), rows, note)


def attack_settings(report: Report) -> Table:
    """One row per attack on the edited model: seeds, number of settings, training accuracy and cost."""
    columns = ("attack", "seeds", "settings", "right on T", "tokens", "seconds", "remark")
    recovery_of = {r.attack: r for r in report.recoveries}
    by_attack: dict[str, list[Finding]] = {}
    for finding in report.findings.get("edited", ()):
        if finding.attack != RETAIN_CHECK:
            by_attack.setdefault(finding.attack, []).append(finding)
    rows = []
    for attack, findings in by_attack.items():
        recovery = recovery_of.get(attack, Recovery(attack, findings[0].status))
        trained = [f.train_accuracy for f in findings if f.train_accuracy is not None]
        remarks = dict.fromkeys([recovery.reason, *(f.reason for f in findings), *map(_details, findings)])
        rows.append([
            attack, ", ".join(str(f.seed) for f in findings), str(max(len(f.settings) for f in findings)),
            format_number(min(trained)) if trained else "", f"{sum(f.tokens for f in findings):,}",
            f"{sum(f.seconds for f in findings):.1f}", "; ".join(filter(None, remarks)),
        ])  # fmt: skip
    return Table(columns, rows)


def chosen_settings(report: Report) -> Table:
    """The settings that were scored, for each model."""
    chosen = [r for r in recoveries_by_strength(report) if any(r.settings.values())]
    roles = [role for role in (*ROLES, "floor") if any(r.settings.get(role) for r in chosen)]
    rows = [[r.attack, *(_setting(r, role) for role in roles)] for r in chosen]
    note = "Two settings: each half of V was scored in the setting that is best on the other half."
    return Table(("attack", *roles), rows, note)


def heuristics(report: Report) -> Table:
    """Accuracy that needs no knowledge of the facts."""
    rows = sorted(report.heuristics.items(), key=lambda item: -item[1])
    return Table(("guess", "right on V"), [[name, format_number(value, 3)] for name, value in rows])


def _details(finding: Finding) -> str:
    """The texts among the details of a finding, such as the kind of a probe; numbers are in audit.json."""
    details = finding.details.get("folds", [finding.details])[0] if finding.details else {}
    return ", ".join(f"{key} {text}" for key, text in details.items() if isinstance(text, str) and len(text) <= 60)
