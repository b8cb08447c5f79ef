"""Verbs that attack an edited checkpoint and report what was recovered: audit, report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from repedit.cli.application import Budget, Device, Json, hide_progress_bars
from repedit.io.files import is_folder
from repedit.io.text import parse_json

if TYPE_CHECKING:
    from repedit.auditing.report import Report
    from repedit.data import Facts


# --- The options of `audit`, in the order of its page of help


Edited = Annotated[
    str | None, typer.Argument(help="The edited checkpoint: directory or hub id. Needed unless --selftest.")
]
Original = Annotated[str | None, typer.Option(help="The model before the edit. Needed unless --selftest.")]
FactsToForget = Annotated[
    str | None,
    typer.Option(
        help="The facts that should be gone: a built-in domain such as capitals, or a .jsonl file. Needed unless --selftest."
    ),
]
FactsToKeep = Annotated[
    str | None,
    typer.Option(
        help="The facts that should be kept: a domain or a file; by default the retain rows of the file, or the other domains."
    ),
]
Reference = Annotated[str | None, typer.Option(help="A model that never saw the facts; it makes the floor exact.")]
Unrelated = Annotated[
    str | None,
    typer.Option(help="Text for the attack that fine-tunes on something unrelated; by default the built-in prose."),
]
Holdout = Annotated[str | None, typer.Option(help="Text that neither model was trained on, for the membership attack.")]
Attributes = Annotated[str | None, typer.Option(help="Other facts about the same entities, for the relinking attack.")]
Until = Annotated[
    Literal["verdict", "all"] | None,
    typer.Option(
        help="verdict: stop when no further attack can change the verdict; all: run every attack. The default is verdict for quick and fast, else all."
    ),
]
AttackNames = Annotated[
    str | None, typer.Option(help="Run only these attacks: names joined by commas, such as direct,paraphrase.")
]
EditedSites = Annotated[
    str | None,
    typer.Option(
        help="Where the edit is, such as '0-11.mlp.out'; by default what repedit.json in the checkpoint says."
    ),
]
Folds = Annotated[
    int,
    typer.Option(
        help="2: train on each half of the facts and test on the other, so that every fact is tested; 1: test one half only, which is faster."
    ),
]
AllowSmall = Annotated[bool, typer.Option(help="Give a verdict for fewer than 100 facts to forget as well.")]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder for the findings and the pages; give it again to resume an interrupted audit."),
]
SelftestOnly = Annotated[
    bool,
    typer.Option(help="Instead, audit models whose verdict is known, to see whether the audit works on this machine."),
]
Workers = Annotated[
    int | None, typer.Option(help="Processes of the self-test; by default one for each core.", show_default=False)
]


def audit(
    edited: Edited = None,
    original: Original = None,
    facts: FactsToForget = None,
    retain: FactsToKeep = None,
    reference: Reference = None,
    unrelated: Unrelated = None,
    holdout: Holdout = None,
    attributes: Attributes = None,
    budget: Budget = "fast",
    until: Until = None,
    attacks: AttackNames = None,
    sites: EditedSites = None,
    folds: Folds = 2,
    seeds: Annotated[str | None, typer.Option(help="Seeds of the attacks, joined by commas.")] = None,
    allow_small: AllowSmall = False,
    out: Out = None,
    hide_items: Annotated[bool, typer.Option(help="Leave the texts of the facts out of the pages.")] = False,
    dry_run: Annotated[
        bool, typer.Option(help="Show what would be run and about how long it takes; attack nothing.")
    ] = False,
    selftest: SelftestOnly = False,
    seed: Annotated[int, typer.Option(help="Seed of the self-test.")] = 0,
    workers: Workers = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Attack an edited checkpoint and say what has been shown."""
    hide_progress_bars()
    if selftest:
        _selftest(seed, workers, json)
        return
    fact_sets = _facts(edited, original, facts, retain)
    names = None if attacks is None else attacks.split(",")
    if dry_run:
        _estimate(str(edited), fact_sets, budget, names, device, allow_small, json)
        return
    from repedit import data
    from repedit.auditing.api import audit as run_audit
    from repedit.auditing.store import private_folder
    from repedit.io.targets import check_folder

    check_folder(out, "findings", "audit.json", read=(str(edited), str(original)))
    carried_out = partial(
        run_audit,
        str(edited), original=str(original), facts=fact_sets, reference=reference, budget=budget, attacks=names,
        until=until or ("verdict" if budget in ("quick", "fast") else "all"),
        unrelated=None if unrelated is None else data.builtin_corpus(unrelated),
        holdout=None if holdout is None else data.builtin_corpus(holdout),
        attributes=None if attributes is None else data.facts(attributes), sites=sites, folds=folds,
        seeds=_whole_numbers(seeds), allow_small=allow_small, device=device,
        out=private_folder(out) if hide_items and out is not None else out, save=False, command=_command_line(),
    )  # fmt: skip
    _carry_out(carried_out, out, hide_items, json)


def _carry_out(audited: Callable[[], Report], out: Path | None, hide_items: bool, json: bool) -> None:
    """Audit, write and show the report, and exit with its code; after Ctrl-C with what is known and how to go on."""
    from repedit.auditing.report import AuditInterrupted

    try:
        result = audited()
    except AuditInterrupted as error:
        if error.report is not None:
            _finish(error.report, out, hide_items, json)
        _say_how_to_go_on(error.report, out)
        raise
    _finish(result, out, hide_items, json)
    raise typer.Exit(result.verdict.exit_code)


def _finish(result: Report, out: Path | None, hide_items: bool, json: bool) -> None:
    """Write the pages of a report and show it."""
    from repedit.cli import output
    from repedit.report import redacted, write

    files = [] if out is None else _written(partial(write, result, out, hide_items=hide_items))
    shown = redacted(result) if hide_items else result
    if json:
        output.out.write(shown.to_json())
    else:
        show(shown, files)


def _say_how_to_go_on(report: Report | None, out: Path | None) -> None:
    """After Ctrl-C: how far the audit came, and the command that continues it."""
    from repedit.cli import output

    progress = (
        "before the facts were asked" if report is None else f"after {', '.join(r.attack for r in report.recoveries)}"
    )
    command = _command_line() or "the same command"
    stored = f"; {command} goes on from there" if out is not None else "; with --out it could go on from there"
    output.err.print(f"The audit was interrupted {progress}{stored}.", soft_wrap=True)


def report(
    audits: Annotated[
        list[Path],
        typer.Argument(help="The --out of an audit, several side by side; or a run: its TOML file, or its folder."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Where to write the pages; by default an audit's own directory, NAME.report.html beside a run.",
        ),
    ] = None,
    hide_items: Annotated[bool, typer.Option("--hide-items", help="Leave out the texts of the facts.")] = False,
    json: Json = False,
) -> None:
    """Show an audit again and write its pages; several over the same facts in one table and one plot; or the page of a run."""
    from repedit.auditing.report import Report
    from repedit.cli import output
    from repedit.cli.run import show_run
    from repedit.report import compare_reports, redacted, write
    from repedit.runs import is_run

    if any(map(is_run, audits)):
        show_run(audits, out, hide_items, json)
        return
    reports = {name: Report.load(path) for name, path in zip(_distinct_names(audits), audits, strict=True)}
    if hide_items:
        reports = {f"audit {number}": redacted(one) for number, one in enumerate(reports.values(), 1)}
    first = next(iter(reports.values()))
    if len(reports) > 1:
        comparison = compare_reports(reports)
        files = [] if out is None else _written(partial(comparison.write, out))
    else:
        folder = audits[0] if is_folder(audits[0]) else audits[0].parent
        files = _written(partial(write, first, folder if out is None else out, hide_items=hide_items))
    if json:
        output.show_json(_audit_values(reports))
    elif len(reports) > 1:
        output.table("Verdicts", comparison.verdicts.columns, comparison.verdicts.rows)
        output.table("What each attack brings back", comparison.summary.columns, comparison.summary.rows)
        output.show_files(files)
    else:
        show(first, files)


def show(report: Report, files: Sequence[Path]) -> None:
    """Show the verdict, the recoveries, what was not run, and the files that were written."""
    from repedit.cli import output
    from repedit.report import tables

    verdict = report.verdict
    sentence = verdict.sentence.removeprefix(f"{verdict.word}: ")
    needed = f"What would settle it: {verdict.settle}" if verdict.settle else ""
    for line in (f"{report.title}: {sentence}", f"Rule: {verdict.rule}", needed):
        if line:
            output.out.print(line)
    for fact in tables.headline(report):
        output.out.print(f"- {fact}")
    for title, table in (
        ("What each attack brings back", tables.summary(report)),
        ("Gap to the retrained model", tables.gaps(report)),
        ("Not run, or not counted", tables.not_run(report)),
    ):
        if table.rows:
            output.table(title, table.columns, table.rows)
    output.show_files(files)


def _facts(edited: str | None, original: str | None, facts: str | None, retain: str | None) -> Facts:
    """The facts of an audit, if everything that it needs is given."""
    from repedit import data
    from repedit.errors import ArgumentError

    missing = [name for name, value in (("EDITED", edited), ("--original", original), ("--facts", facts)) if not value]
    if missing:
        raise ArgumentError(f"{' and '.join(missing)} missing; give the edited checkpoint, --original and --facts")
    return data.facts(str(facts)) if retain is None else data.facts(str(facts), retain=data.facts(retain).forget)


def _whole_numbers(seeds: str | None) -> list[int] | None:
    from repedit.errors import ArgumentError

    try:
        return None if seeds is None else [int(number) for number in seeds.split(",")]
    except ValueError as error:
        raise ArgumentError(f"--seeds {seeds!r}; give whole numbers, joined by commas, such as 0,1,2") from error


def _command_line() -> str:
    """The command line of this process; empty if it is one of another program."""
    return shlex.join(["repedit", *sys.argv[1:]]) if sys.argv[1:2] == ["audit"] else ""


def _estimate(
    edited: str, facts: Facts, budget: str, attacks: Sequence[str] | None, device: str, allow_small: bool, json: bool
) -> None:
    from repedit.auditing.api import estimate
    from repedit.cli import output

    costs = estimate(edited, facts, budget=budget, attacks=attacks, device=device)
    if json:
        output.show_json(costs)
        return
    rows = [[name, cost["questions"], cost["steps"], round(cost["seconds"])] for name, cost in costs["attacks"].items()]
    output.table(
        f"{budget}: {costs['facts']} facts, about {costs['minutes']:.0f} minutes; nothing was attacked",
        ("attack", "questions", "training steps", "seconds"), rows,
    )  # fmt: skip
    if not allow_small:
        _warn_of_few(costs["facts"])


def _warn_of_few(count: int) -> None:
    """Say before an audit that its verdict will be INVALID because of the number of facts."""
    from repedit.auditing.verdict import LEAST_ITEMS
    from repedit.cli import output

    if count < LEAST_ITEMS:
        output.out.print(
            f"The verdict will be INVALID: a verdict needs at least {LEAST_ITEMS} facts to forget, and there are {count}. "
            "Give more facts, or --allow-small to judge these."
        )


def _selftest(seed: int, workers: int | None, json: bool) -> None:
    from dataclasses import asdict

    from repedit.auditing.selftest import selftest
    from repedit.cli import output

    result = selftest(seed, workers=workers)
    if json:
        output.show_json({**asdict(result), "passed": result.passed})
    else:
        columns = ("control", "passed", "expected", "found", "attack", "R", "least", "seconds", "what it is")
        rows = [
            [c.control, c.passed, c.expected, c.found, c.attack, round(c.recovered, 2), c.least, round(c.seconds, 1), c.description]
            for c in result.checks
        ]  # fmt: skip
        output.table(f"{sum(c.passed for c in result.checks)} of {len(result.checks)} controls pass", columns, rows)
        output.out.print(f"{result.seconds:.0f} seconds; {result.failures or 'the audit is sound here'}")
    raise typer.Exit(0 if result.passed else 6)


def _written(write: Callable[[], list[Path]]) -> list[Path]:
    """The files that were written; a page or figure that cannot be made costs neither the others nor the verdict."""
    from repedit.cli import output
    from repedit.errors import ReportError

    try:
        return write()
    except ReportError as error:
        output.err.print(f"ReportError: {error}", soft_wrap=True)
        return []


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as distinguish all paths."""
    folders = [path.absolute() if is_folder(path) else path.absolute().parent for path in paths]
    for count in range(1, max(len(path.parts) for path in folders) + 1):
        names = ["/".join(path.parts[-count:]) for path in folders]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {path}" for number, path in enumerate(folders, 1)]


def _audit_values(reports: Mapping[str, Report]) -> object:
    """One audit as its own JSON, several by name."""
    plain = {name: parse_json(report.to_json(), name) for name, report in reports.items()}
    return plain if len(plain) > 1 else next(iter(plain.values()))
