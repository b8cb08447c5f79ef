"""Pages of audits, of several audits side by side, and of two checkpoints: HTML, Markdown, and all files of an audit.

An HTML page is one file that needs no network and no script. The templates are in `templates/`; every value that they
write is escaped once, by jinja2, and invisible characters are shown as in `repedit.escaping.for_terminal`."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from repedit.arguments import checked
from repedit.auditing.report import RETAIN_CHECK, Report
from repedit.errors import ArgumentError, ReportError, TargetExists
from repedit.escaping import for_markdown, for_terminal, shortened
from repedit.io.files import atomic_write, make_folder, user_path
from repedit.io.text import parse_json
from repedit.metrics.benchmarks import Comparison
from repedit.outcomes import INCONCLUSIVE, NOT_YET, PASS
from repedit.plot.canvas import NEUTRAL, SERIES
from repedit.plot.reports import (
    Curves,
    audits_forest,
    bars,
    curves,
    drops,
    forest_rows,
    grouped_forest_rows,
    layer_curves,
    recoveries_by_strength,
    recovery_forest,
    relearning_curves,
    thresholds,
)
from repedit.report import tables
from repedit.report.redaction import redacted
from repedit.report.tables import (
    COLUMNS,
    INTERVALS,
    Table,
    comparison_table,
    format_recovery,
    format_value,
    recovery_row,
    retain_check,
    table_of,
)
from repedit.rewrite.verification import Difference

# --- Templates, and figures of matplotlib as inline SVG


PAGE_WIDTH, PHONE_WIDTH = 8.6, 4.2
"""Inches of a figure as wide as a page; at these widths no text is smaller than 10 pixels on a screen."""
_COLORS = {
    "#000000": "ink", "#ffffff": "paper", "#b0b0b0": "rule", "#bdbdbd": "rule", "#d0d0d0": "hatch", NEUTRAL: "faint",
    **{color.lower(): f"series-{n}" for n, color in enumerate(SERIES)},
}  # fmt: skip
"""Colours of figures and the variables of style.css in their place, which differ between light, dark and print."""


def _visible(value: object) -> object:
    return value if isinstance(value, Markup) else for_terminal(value, lines=True)


def tone(report: Report) -> str:
    """The style of a verdict: "good", "open" or "bad"."""
    return {PASS: "good", NOT_YET: "open", INCONCLUSIVE: "open"}.get(report.verdict.word, "bad")


ENVIRONMENT = Environment(
    loader=PackageLoader("repedit.report"), autoescape=True, undefined=StrictUndefined, finalize=_visible,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
ENVIRONMENT.globals |= {"tables": tables, "tone": tone}


def render(template: str, **values: object) -> str:
    """The text of a page."""
    return ENVIRONMENT.get_template(f"{template}.html.jinja2").render(**values)


def svg(figure: Figure) -> Markup:
    """The figure as an SVG element in the colours of the page; the label of the figure is its text for screen readers.

    The output depends on the figure alone. Texts stay texts, in the font of the page. Identifiers are those that
    something refers to; they differ between figures that differ.
    """
    buffer, label = io.StringIO(), str(figure.get_label())
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": f"{figure.get_figwidth()} {label}"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("metadata", "style")):  # matplotlib's style would hold for the whole page
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        styles = [element.attrib.pop("style", "")]
        # A pattern has its colour in an attribute, where not every reader takes a variable.
        styles += [f"{name}: {element.attrib.pop(name)}" for name in ("fill", "stroke") if name in element.attrib]
        style = re.sub(r"font-family: [^;]*;? ?", "", "; ".join(filter(None, styles)))
        if style:
            element.set("style", re.sub(r"#[0-9a-f]{6}(?![\w-])", _variable, style))
    values = (value for element in root.iter() for name, value in element.attrib.items() if name != "id")
    referenced = {name for value in values for name in re.findall(r"#([\w-]+)", value)}
    for element in root.iter():
        if element.get("id") not in referenced:
            element.attrib.pop("id", None)
    width = float(root.get("viewBox", "").split()[2])
    root.attrib = {
        "viewBox": root.get("viewBox", ""), "role": "img", "aria-label": for_terminal(label, lines=True),
        "style": f"max-width: {1.6 * width:.0f}px",
    }  # fmt: skip
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _variable(color: re.Match[str]) -> str:
    return f"var(--{_COLORS[color[0]]})" if color[0] in _COLORS else color[0]


# --- An audit: the verdict first, then what it rests on, then what was not tried


@dataclass(frozen=True)
class AuditFigures:
    """An audit with its figures as SVG, as the templates take it."""

    report: Report
    forest: tuple[Markup, ...]
    """The forest plot for pages and for phones; empty if no attack is drawn."""
    relearning: list[tuple[str, Markup]]
    """(attack, curves)."""
    layers: list[tuple[str, Markup]]
    """(attack and stream, curves)."""

    @classmethod
    def of(cls, report: Report) -> AuditFigures:
        """Draw the figures of a report."""
        widths = (PAGE_WIDTH, PHONE_WIDTH) if forest_rows(report) and not report.gaps else ()
        x = "epoch" if report.gaps else "training step"
        return cls(
            report,
            tuple(svg(recovery_forest(report, width=width)) for width in widths),
            [(chart.name, svg(curves(chart, x))) for chart in relearning_curves(report)],
            [(chart.name, svg(curves(chart, "layer"))) for chart in layer_curves(report)],
        )


@checked
def page(report: Report, *, hide_items: bool = False) -> str:
    """The text of audit.html.

    Args:
        hide_items: leave out the texts of facts, see `redacted`.
    """
    report = redacted(report) if hide_items else report
    elsewhere = ("notes", "command", "withheld")
    origin = {key: value for key, value in report.context.items() if key not in elsewhere}
    return render("audit", title=f"{report.title}: audit", audit=AuditFigures.of(report), origin=origin)


@checked
def markdown(report: Report, *, hide_items: bool = False) -> str:
    """The text of audit.md: the tables of the page, and its curves as tables.

    Args:
        hide_items: leave out the texts of facts, see `redacted`.
    """
    report = redacted(report) if hide_items else report
    verdict = report.verdict
    parts = [f"# {for_markdown(report.title)}", for_markdown(verdict.sentence), f"Rule: {for_markdown(verdict.rule)}"]
    parts += [f"What would settle it: {for_markdown(verdict.settle)}"] if verdict.settle else []
    parts.append("\n".join(f"- {for_markdown(fact)}" for fact in tables.headline(report)))
    for title, texts in (_gap_sections(report) if report.gaps else _recovery_sections(report)).items():
        if any(texts):
            parts += [f"## {title}", *filter(None, texts)]
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """A table in Markdown with its note; only the note if there are no rows."""
    head, *lines = [f"| {' | '.join(map(for_markdown, cells))} |" for cells in (table.columns, *table.rows)]
    text = "\n".join([head, f"| {' | '.join(['---'] * len(table.columns))} |", *lines]) if lines else ""
    return "\n\n".join(filter(None, (text, for_markdown(table.note))))


def _recovery_sections(report: Report) -> dict[str, list[str]]:
    contents = {
        "What each attack brings back": [tables.summary(report), tables.recoveries(report)],
        "What was not tried, or counts for nothing": [tables.not_run(report)],
        "What should have been kept": [tables.retain_check(report)],
        "Relearning: highest accuracy over learning rates at each step": list(map(_curves_table, relearning_curves(report))),
        "Layer by layer": list(map(_curves_table, layer_curves(report))),
        "Facts that came back": [tables.examples(report)],
        "Settings": [tables.chosen_settings(report), tables.attack_settings(report)],
        "Guesses that need no knowledge": [tables.heuristics(report)],
    }  # fmt: skip
    sections = {title: list(map(markdown_table, content)) for title, content in contents.items()}
    return {**sections, "Diagnostics, which decide nothing": [_markdown_list(report.diagnostics)], **_origin(report)}


def _gap_sections(report: Report) -> dict[str, list[str]]:
    contents = {
        "Gap to the retrained model": [tables.gaps(report)], "Membership": [tables.memberships(report)],
        "What was not tried, or counts for nothing": [tables.not_run(report)],
        "Settings": [tables.attack_settings(report)], "Relearning": list(map(_curves_table, relearning_curves(report))),
    }  # fmt: skip
    return {title: list(map(markdown_table, content)) for title, content in contents.items()} | _origin(report)


def _origin(report: Report) -> dict[str, list[str]]:
    context = {key: value for key, value in report.context.items() if value or key != "command"}
    return {"How this was made": [_markdown_list(context)]}


def _curves_table(chart: Curves) -> Table:
    steps = sorted({x for points in chart.series.values() for x, _ in points})
    rows = []
    for role, points in chart.series.items():
        accuracies = dict(points)
        rows.append([role, *(f"{accuracies[x]:.2f}" if x in accuracies else "" for x in steps)])
    return Table([chart.name, *map(str, steps)], rows)


def _markdown_list(values: Mapping[str, object]) -> str:
    """A list of values; a nested mapping is a list inside it."""
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines.append(f"- {for_markdown(key)}:")
            lines += [f"  - {for_markdown(' '.join(filter(None, row)))}" for row in table_of(value).rows]
        else:
            lines.append(f"- {for_markdown(key)}: {for_markdown(format_value(value))}")
    return "\n".join(lines)


# --- All files of an audit, and the schema of its JSON


@checked
def write(report: Report, folder: str | Path, hide_items: bool = False) -> list[Path]:
    """Write audit.json, audit.md, audit.html and recovery.png; the folder is made if it is absent.

    For a classifier, gap.png and membership.png take the place of recovery.png. The data are written first, and each
    file by one rename; a page or a figure that fails leaves the others.

    Args:
        hide_items: redact every text of an item in all of them, see `redacted`.
    Raises:
        TargetExists: if texts are to be redacted and the folder holds an audit, or findings of one, that has them: it
            would be lost, or lie beside the pages.
        CheckpointError: if the folder or audit.json cannot be written.
        ReportError: if a page or a figure cannot be made or written, once everything else is.
    """
    from repedit.plot import gap, membership, recovery

    target = user_path(folder)
    if hide_items:
        _check_holds_no_texts(target)
        report = redacted(report)
    makers: dict[str, Callable[[], bytes]] = {
        "audit.md": lambda: markdown(report).encode(),
        "audit.html": lambda: page(report).encode(),
    }
    if report.gaps:
        makers["gap.png"] = lambda: png(gap({"edited": report}))
        makers["membership.png"] = lambda: png(membership(report))
    else:
        makers["recovery.png"] = lambda: png(recovery(report))
    return [report.save(target), *write_parts(target, makers, "audit.json")]


def write_parts(target: Path, makers: Mapping[str, Callable[[], bytes]], data_file: str = "") -> list[Path]:
    """Make each file and write it by one rename; one that fails leaves the others.

    Args:
        makers: what makes the content of each file, by its name in the folder.
        data_file: the file that holds all the data of the others, for the message.
    Raises:
        ReportError: naming each file that could not be made or written, once all others are.
    """
    written, failures = [], []
    for name, make in makers.items():
        try:
            content = make()
            with atomic_write(target / name) as file:
                file.write(content)
            written.append(target / name)
        except Exception as error:  # no failure of one page may cost the others
            failures.append((name, error))
    if failures:
        reasons = "; ".join(f"{name}: {type(error).__name__}: {shortened(error, 300)}" for name, error in failures)
        names = ", ".join(path.name for path in written) or "nothing else"
        rest = f"{names} and {data_file}, which holds all of it, are" if data_file else f"{names} is"
        raise ReportError(
            f"{target} lacks {len(failures)} of {len(makers)} files ({reasons}); {rest} written"
        ) from failures[0][1]
    return written


def png(figure: Figure) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


@checked
def schema() -> dict[str, object]:
    """The JSON schema (draft 2020-12) of audit.json."""
    text = files("repedit.report").joinpath("schema.json").read_text(encoding="utf-8")
    return dict(parse_json(text, "schema.json"))


def _check_holds_no_texts(target: Path) -> None:
    audit = target / "audit.json"
    if audit.exists() and "withheld" not in Report.load(audit).context:
        raise TargetExists(
            f"{audit.absolute()} holds the texts of its facts, which would be lost; give another directory to write to"
        )
    findings = target / "findings"
    if findings.exists():
        raise TargetExists(
            f"{findings.absolute()} names the facts of an earlier audit; give another directory to write to"
        )


# --- Several audits of the same facts side by side: one table, one plot


@dataclass(frozen=True, eq=False)
@checked
class ReportComparison:
    """Reports over the same facts, by name."""

    reports: Mapping[str, Report]

    @property
    def verdicts(self) -> Table:
        """One row per report: its verdict, and its retain check."""
        rows = []
        for name, report in self.reports.items():
            retain = "; ".join(f"{r[0]} {r[2]} to {r[3]}" for r in retain_check(report).rows)
            rows.append([name, report.title, report.verdict.sentence, retain])
        return Table(("model", "verdict", "what has been shown", "kept, original to edited"), rows)

    @property
    def recoveries(self) -> Table:
        """One row per attack, one column per report: R with its interval."""
        by_report = {
            name: {r.attack: r for r in recoveries_by_strength(report)} for name, report in self.reports.items()
        }
        ordered = dict.fromkeys(row.group for row in grouped_forest_rows(self.reports))
        attacks = dict.fromkeys([*ordered, *(attack for recoveries in by_report.values() for attack in recoveries)])
        rows = [
            [attack, *(format_recovery(of[attack]) if attack in of else "not run" for of in by_report.values())]
            for attack in attacks
        ]
        return Table(("attack", *self.reports), rows, INTERVALS)

    @property
    def summary(self) -> Table:
        """One row per attack and report, as on the console."""
        order = [row[0] for row in self.recoveries.rows]
        pairs = [(name, r) for name, report in self.reports.items() for r in recoveries_by_strength(report)]
        pairs.sort(key=lambda pair: order.index(pair[1].attack))
        rows = [[r.attack, name, *recovery_row(r)[1:]] for name, r in pairs]
        return Table((COLUMNS[0], "model", *COLUMNS[1:]), rows, INTERVALS)

    def markdown(self) -> str:
        """Both tables."""
        parts = [
            f"# Audits of {len(self.reports)} models over the same facts", markdown_table(self.verdicts),
            "## What each attack brings back", markdown_table(self.recoveries),
        ]  # fmt: skip
        return "\n\n".join(parts) + "\n"

    def page(self) -> str:
        """Verdicts, one forest plot, one table, as one HTML page."""
        widths = (PAGE_WIDTH, PHONE_WIDTH) if grouped_forest_rows(self.reports) else ()
        forest = [svg(audits_forest(self.reports, width=width)) for width in widths]
        return render("comparison", title="Audits side by side", comparison=self, forest=forest)

    @checked
    def write(self, folder: str | Path) -> list[Path]:
        """Write audits.md, audits.html and recovery.png, each by one rename; they hold no text of a fact.

        Raises:
            CheckpointError: if the folder cannot be made.
            ReportError: if a file cannot be made or written, once the others are.
        """
        from repedit.plot import audits

        makers = {
            "audits.md": lambda: self.markdown().encode(), "audits.html": lambda: self.page().encode(),
            "recovery.png": lambda: png(audits(self.reports)),
        }  # fmt: skip
        return write_parts(make_folder(user_path(folder)), makers)


@checked
def compare_reports(reports: Mapping[str, Report]) -> ReportComparison:
    """Several reports side by side, by name.

    Raises:
        ArgumentError: if there are fewer than two, if their facts or thresholds differ, or if one is of a classifier.
    """
    if len(reports) < 2:
        raise ArgumentError(f"compare_reports() was given {len(reports)} report; give at least two, or use page()")
    classifiers = [name for name, report in reports.items() if report.gaps]
    if classifiers:
        raise ArgumentError(
            f"{', '.join(map(repr, classifiers))}: audits of classifiers are compared by rp.plot.gap(reports), not here"
        )
    (name, first), *others = reports.items()
    for other, report in others:
        ids, other_ids = _fact_ids(first), _fact_ids(report)
        if ids != other_ids:
            raise ArgumentError(
                f"{name!r} was asked {len(ids)} facts and {other!r} {len(other_ids)}, {len(ids & other_ids)} of them the same; "
                "only audits over the same facts can be compared"
            )
        if thresholds(first) != thresholds(report):
            raise ArgumentError(
                f"{name!r} has thresholds {thresholds(first)} and {other!r} {thresholds(report)}; audit both with the same "
                "recovery_threshold and pass_threshold"
            )
    return ReportComparison(dict(reports))


def _fact_ids(report: Report) -> set[str]:
    """Ids of the facts that the edited model was asked in any attack; fresh facts have another role."""
    return {item for f in report.findings.get("edited", ()) if f.attack != RETAIN_CHECK for item in f.items}


# --- `repedit compare` and `repedit diff`: two checkpoints on the same texts, and the tensors that differ


SHOWN = "A comparison shows what both models answer now. Only an audit shows what retraining or other words bring back."
_LAYER = re.compile(r"\.(\d+)\.")


@checked
def comparison_page(comparison: Comparison, names: tuple[str, str]) -> str:
    """The drops on each text with their intervals, accuracy and perplexity before and after, and the generations.

    Args:
        names: of the two checkpoints, the original first.
    """
    effects = {corpus: comparison.effect(corpus) for corpus in comparison.base}
    measured = [("edited", corpus, e.drop, e.low, e.high) for corpus, e in effects.items() if not math.isnan(e.drop)]
    return render(
        "checkpoints", title=f"{names[0]} against {names[1]}", names=names, values=comparison_table(comparison), shown=SHOWN,
        lead="The share of next tokens that each model predicts right, and its perplexity, on the same texts.",
        figures=[("Relative drop, with 95 % intervals", svg(drops(measured)))] if measured else [],
        written=list(zip(comparison.prompts, comparison.base_text, comparison.edited_text, strict=True)),
    )  # fmt: skip


@checked
def difference_page(differences: Sequence[Difference], names: tuple[str, str]) -> str:
    """Every tensor that differs, and the norm of the change by layer, sqrt(sum of squares over the tensors of a layer).

    Args:
        names: of the two checkpoints, the original first.
    """
    squares: dict[int, float] = {}
    for difference in differences:
        layer = _LAYER.search(difference.tensor)
        if layer is not None:
            squares[int(layer[1])] = squares.get(int(layer[1]), 0.0) + difference.norm**2
    norms = {layer: math.sqrt(value) for layer, value in sorted(squares.items())}
    rows = [
        [d.tensor, f"{d.norm:.4g}", f"{d.relative:.4g}", "n/a" if d.rank is None else str(d.rank), f"{d.rows:,}", f"{d.columns:,}"]
        for d in differences
    ]  # fmt: skip
    count = len(differences)
    return render(
        "checkpoints", title=f"{names[0]} against {names[1]}", names=names, written=[],
        lead=f"{count} tensor{'' if count == 1 else 's'} differ{'s' if count == 1 else ''}, the largest relative change first."
        if count else "Both checkpoints hold the same values in every tensor.",
        figures=[("Norm of the change by layer", svg(bars(norms, "layer", "norm of the change")))] if norms else [],
        values=Table(("tensor", "norm of the change", "relative to the tensor", "rank", "rows changed", "columns changed"), rows),
        shown="Equal values are equal to the bit; a tensor that is not listed is unchanged.",
    )  # fmt: skip
