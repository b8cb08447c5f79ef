"""A report as rows of text: what the console, the Markdown and the HTML page list alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from repedit.auditing.attack import RAN, Finding
from repedit.auditing.report import Recovery, Report
from repedit.plot.reports import KEPT, ROLES, measured, ordered, span

COLUMNS = ("attack", "edited", "original", "floor", "R [95 %]", "setting")
INTERVALS = (
    "R = (edited - floor) / (original - floor), all three after the same attack: 0 is a model that never knew, 1 the original. "
    "Intervals hold over all attacks at once; * marks that of the attack alone."
)
EXAMPLE = ("attack", "prompt", "answer", "edited", "attacked", "reference")
"""The columns of an example, where it has them; whatever else it holds follows."""
MOST = 10
"""Examples a page shows."""
WITHHELD = "the texts of the facts are withheld"


class Table(NamedTuple):
    """Rows of text under a heading."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def number(value: Any, digits: int = 2) -> str:
    """ "0.42"; "n/a" where nothing was measured."""
    if value is None or not measured(value):
        return "n/a"
    return f"{value:.{digits}f}"


def interval(recovery: Recovery) -> str:
    """ "[0.31, 0.55]"; a star where it holds for this attack alone, nothing where there is none or R is not defined."""
    low, high = span(recovery)
    if not measured(recovery.value, low, high):
        return ""
    return f"[{low:.2f}, {high:.2f}]" + ("" if measured(*recovery.bound) else "*")


def recovered(recovery: Recovery) -> str:
    """R with its interval, or why there is none."""
    text = f"{number(recovery.value)} {interval(recovery)}".strip()
    if recovery.status != RAN:
        return f"{recovery.status}: {text}" if measured(recovery.value) else recovery.status
    return text if recovery.decides else f"{text}, not deciding"


def setting(recovery: Recovery, role: str = "edited") -> str:
    """What was chosen, one a half of V."""
    return " / ".join(dict.fromkeys(recovery.settings.get(role, ())))


def plain(value: Any) -> str:
    """Any JSON value in one line."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "n/a"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(inner)}" for key, inner in value.items())
    return ", ".join(map(plain, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def row(recovery: Recovery) -> list[str]:
    """The cells of `COLUMNS`."""
    values = (number(v) for v in (recovery.edited, recovery.original, recovery.floor))
    return [recovery.attack, *values, recovered(recovery), setting(recovery)]


def short(report: Report) -> Table:
    """What the console shows."""
    return Table(COLUMNS, [row(r) for r in ordered(report)], INTERVALS)


def attacks(report: Report) -> Table:
    """Everything of the recoveries: also level, the uncorrected ratio and the interval of each attack alone."""
    columns = ("attack", "attacker has", "edited", "original", "floor", "R", "95 %, all attacks", "95 %, this attack", "edited / original")  # fmt: skip
    rows = []
    for found in ordered(report):
        spans = [
            f"[{s[0]:.2f}, {s[1]:.2f}]" if measured(found.value, *s) else "" for s in (found.bound, found.interval)
        ]
        name = found.attack if found.status == RAN else f"{found.attack} ({found.status})"
        name = name if found.decides else f"{name} (not deciding)"
        values = [number(v) for v in (found.edited, found.original, found.floor, found.value)]
        level = {"B": "prompts", "W": "weights"}.get(found.level, "")
        rows.append([name, level, *values, *spans, number(found.ratio)])
    return Table(
        columns,
        rows,
        "The last column is the rate papers print; guessing is not taken out of it, and nothing is decided by it.",
    )


def gaps(report: Report) -> Table:
    """Of a classifier: every measure beside that of the retrained model, with what it is measured on."""
    columns = ("measure", "edited", "retrained", "original", "gap", "95 %", "all retrained", "measured on")
    rows = []
    for gap in report.gaps:
        low, high = gap.interval
        rows.append([
            gap.measure if gap.decides else f"{gap.measure} (not deciding)", *(number(v, 3) for v in (gap.edited, gap.reference, gap.original)),
            f"{gap.value:+.3f}" if measured(gap.value) else "n/a", f"[{low:+.3f}, {high:+.3f}]" if measured(low, high) else "",
            f"{gap.spread[0]:.3f} to {gap.spread[1]:.3f}" if measured(*gap.spread) else "",
            f"{gap.members} against {gap.others}" if gap.others else gap.members,
        ])  # fmt: skip
    note = "Gap = edited - retrained: 0 is a model that never saw the images; below 0 is no better than above."
    return Table(columns, rows, note if rows else "")


def memberships(report: Report) -> Table:
    """Of a classifier: the AUC of every score, and the accuracy of the regression on the loss."""
    found = {role: [f.details for f in held if f.attack == "membership"] for role, held in report.findings.items()}
    roles = [role for role in ("edited", "reference", "original") if found.get(role)]
    if not roles:
        return Table((), [])
    first = found[roles[0]][0]
    sides = [f"{first['members']} forget images", f"{first['others']} holdout images"]
    kinds = {f"AUC of {name}": name for name in first["auc"]}
    kinds |= {"accuracy of a regression on the loss": "loss_lr"} if "loss_lr" in first else {}
    rows = []
    for name, kind in kinds.items():
        values = {role: [{**d["auc"], **d}[kind] for d in found[role]] for role in roles}
        rows.append([name, *(number(median(held), 3) for held in values.values()), *sides])
    heads = [{"reference": "retrained"}.get(role, role) for role in roles]
    return Table(
        ("attack", *heads, "members", "non-members"),
        rows,
        "0.5 is no sign of membership; what counts is the retrained column.",
    )


def kept(report: Report) -> Table:
    """The retain check."""
    found, rows = report.retain, []
    if found.accuracy:
        rows.append(["accuracy on retain facts", f"{found.facts:,} facts", *(number(v, 3) for v in found.accuracy)])
    if found.perplexity:
        rows.append(
            ["perplexity of retain text", f"{found.tokens:,} tokens", *(number(v, 1) for v in found.perplexity)]
        )
    note = f"Destroyed: {found.destroyed}." if found.destroyed else ""
    return Table(("what", "of", "original", "edited"), rows, note or ("" if rows else "No retain set was given."))


def settings(report: Report) -> Table:
    """One row an attack: how much it tried, how it trained and what it cost, on the edited model."""
    columns = ("attack", "seeds", "settings", "right on T", "tokens", "seconds", "remark")
    known = {r.attack: r for r in report.recoveries}
    by_attack: dict[str, list[Finding]] = {}
    for finding in report.findings.get("edited", ()):
        if finding.attack != KEPT:
            by_attack.setdefault(finding.attack, []).append(finding)
    rows = []
    for attack, found in by_attack.items():
        recovery = known.get(attack, Recovery(attack, found[0].status))
        trained = [f.train_accuracy for f in found if f.train_accuracy is not None]
        remarks = dict.fromkeys([recovery.reason, *(f.reason for f in found), *(_kind(f) for f in found)])
        rows.append([
            attack, ", ".join(str(f.seed) for f in found), str(max(len(f.settings) for f in found)),
            number(min(trained)) if trained else "", f"{sum(f.tokens for f in found):,}", f"{sum(f.seconds for f in found):.1f}", "; ".join(r for r in remarks if r),
        ])  # fmt: skip
    return Table(columns, rows)


def chosen(report: Report) -> Table:
    """The settings that were scored, of each model."""
    held = [r for r in ordered(report) if any(r.settings.values())]
    roles = [role for role in (*ROLES, "floor") if any(r.settings.get(role) for r in held)]
    rows = [[r.attack, *(setting(r, role) for role in roles)] for r in held]
    return Table(
        ("attack", *roles),
        rows,
        "Two settings: each half of V was scored in the setting that is best on the other half.",
    )


def guesses(report: Report) -> Table:
    """What can be had without knowledge."""
    rows = sorted(report.heuristics.items(), key=lambda item: -item[1])
    return Table(("guess", "right on V"), [[name, number(value, 3)] for name, value in rows])


def untried(report: Report) -> Table:
    """What was not run, or counts for nothing."""
    return Table(("what", "why not"), [[name, reason] for name, reason in report.not_run.items()])


def examples(report: Report) -> Table:
    """At most ten facts that came back, and what the models answered."""
    shown = report.examples[:MOST]
    keys = {key: None for example in shown for key in example if key != "id"}
    columns = [key for key in EXAMPLE if key in keys] + [key for key in keys if key not in EXAMPLE]
    more = f"{len(report.examples) - MOST} more are in audit.json." if len(report.examples) > MOST else ""
    note = f"{report.context['withheld']} facts came back; {WITHHELD}." if "withheld" in report.context else more
    named = [key.replace("_", " ") for key in columns]
    return Table(named, [[plain(example.get(key, "")) for key in columns] for example in shown], note)


def headline(report: Report) -> list[str]:
    """What a reader must know beside the verdict: budget, facts, seeds, floor, and the notes."""
    known: Mapping[str, Any] = report.context
    facts = [f"budget {known['budget']}"] if "budget" in known else []
    facts += [f"{known['n_test']:,} facts tested"] if "n_test" in known else []
    facts += [f"seeds {', '.join(map(str, known['seeds']))}"] if known.get("seeds") else []
    floors = sorted({r.floor_name for r in report.recoveries if r.floor_name})
    facts += [f"floor: {', '.join(floors)}"] if floors else []
    return [*facts, f"{len(report.not_run)} not run or not counted", *map(str, known.get("notes", ()))]


def _kind(finding: Finding) -> str:
    """The words among the details of a finding, such as the kind of a probe; numbers are in audit.json."""
    details = finding.details.get("folds", [finding.details])[0] if finding.details else {}
    return ", ".join(f"{k} {v}" for k, v in details.items() if isinstance(v, str) and len(v) <= 60)
