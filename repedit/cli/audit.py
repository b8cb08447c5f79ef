"""The verbs that attack a checkpoint and say what has been shown, and that show audits again without a model."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from repedit.cli.options import Device, Json, quiet
from repedit.io.files import is_folder
from repedit.io.text import parse_json


def audit(
    edited: Annotated[str | None, typer.Argument(help="The edited checkpoint: directory or hub id.")] = None,
    original: Annotated[str | None, typer.Option(help="The model that was edited.")] = None,
    facts: Annotated[str | None, typer.Option(help="What should be gone: a built-in domain, or a .jsonl file.")] = None,
    retain: Annotated[str | None, typer.Option(help="Facts that should be kept: a domain or a file.")] = None,
    reference: Annotated[str | None, typer.Option(help="A model that never saw the facts.")] = None,
    unrelated: Annotated[str | None, typer.Option(help="Text for harmless fine-tuning; the built-in prose.")] = None,
    holdout: Annotated[str | None, typer.Option(help="Text that no model saw, for membership inference.")] = None,
    budget: Annotated[str, typer.Option(help="fast, standard or full.")] = "fast",
    attacks: Annotated[str | None, typer.Option(help="Names of attacks, joined by commas.")] = None,
    sites: Annotated[str | None, typer.Option(help="Where the edit is, if repedit.json does not say.")] = None,
    folds: Annotated[int, typer.Option(help="2 tests every fact once; 1 only those of V.")] = 2,
    seeds: Annotated[str | None, typer.Option(help="Seeds of the attacks, joined by commas.")] = None,
    allow_small: Annotated[bool, typer.Option(help="Let fewer than 100 facts count.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where findings and pages go; a broken audit goes on there.")] = None,
    hide_items: Annotated[bool, typer.Option(help="Leave the texts of the facts out of the pages.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Say what would be run and about how long; attack nothing.")] = False,
    selftest: Annotated[bool, typer.Option(help="Audit models of which the answer is known, nothing else.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the self-test.")] = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Attack an edited checkpoint and say what has been shown."""
    quiet()
    if selftest:
        _selftest(seed, json)
        return
    asked = _asked(edited, original, facts, retain)
    chosen = None if attacks is None else attacks.split(",")
    if dry_run:
        _estimate(str(edited), asked, budget, chosen, device, json)
        return
    from repedit import data
    from repedit.auditing.api import audit as audited
    from repedit.auditing.store import private_folder
    from repedit.cli import output
    from repedit.io.targets import check_folder
    from repedit.report import redacted, write

    check_folder(out, "findings", "audit.json", read=(str(edited), str(original)))
    found = audited(
        str(edited), original=str(original), facts=asked, reference=reference, budget=budget, attacks=chosen,
        unrelated=None if unrelated is None else data.builtin_corpus(unrelated),
        holdout=None if holdout is None else data.builtin_corpus(holdout), sites=sites, folds=folds,
        seeds=_numbers(seeds), allow_small=allow_small,
        device=device, out=private_folder(out) if hide_items and out is not None else out, save=False, command=_command(),
    )  # fmt: skip
    written = [] if out is None else _written(partial(write, found, out, hide_items=hide_items))
    shown = redacted(found) if hide_items else found
    if json:
        output.out.write(shown.to_json())
    else:
        show(shown, written)
    raise typer.Exit(found.verdict.exit_code)


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
    reports = {name: Report.load(path) for name, path in zip(_names(audits), audits, strict=True)}
    if hide_items:
        reports = {f"audit {n}": redacted(found) for n, found in enumerate(reports.values(), 1)}
    if len(reports) > 1:
        comparison = compare_reports(reports)
        written = [] if out is None else _written(partial(comparison.write, out))
    else:
        home = audits[0] if is_folder(audits[0]) else audits[0].parent
        only = next(iter(reports.values()))
        written = _written(partial(write, only, home if out is None else out, hide_items=hide_items))
    if json:
        output.show_json(_plain(reports))
        return
    if len(reports) > 1:
        output.table("Verdicts", comparison.verdicts.columns, comparison.verdicts.rows)
        output.table("What each attack brings back", comparison.summary.columns, comparison.summary.rows)
        _name_files(written)
    else:
        show(next(iter(reports.values())), written)


def show(found: Any, written: list[Path]) -> None:
    """Verdict, recoveries, what was not run, and the files that were written."""
    from repedit.cli import output
    from repedit.report import tables

    for line in (
        f"{found.verdict.word}: {found.verdict.sentence}",
        f"Rule: {found.verdict.rule}",
        found.verdict.settle,
    ):
        if line:
            output.out.print(line)
    output.out.print("; ".join(tables.headline(found)))
    for title, shown in (
        ("What each attack brings back", tables.summary(found)),
        ("Gap to the retrained model", tables.gaps(found)),
        ("Not run, or not counted", tables.not_run(found)),
    ):
        if shown.rows:
            output.table(title, shown.columns, shown.rows)
    _name_files(written)


def _asked(edited: str | None, original: str | None, facts: str | None, retain: str | None) -> Any:
    """The facts, if everything is there that an audit cannot do without."""
    from repedit import data
    from repedit.errors import ArgumentError

    missing = [name for name, value in (("EDITED", edited), ("--original", original), ("--facts", facts)) if not value]
    if missing:
        raise ArgumentError(f"{' and '.join(missing)} missing; give the edited checkpoint, --original and --facts")
    return data.facts(str(facts)) if retain is None else data.facts(str(facts), retain=retain)


def _numbers(seeds: str | None) -> list[int] | None:
    from repedit.errors import ArgumentError

    try:
        return None if seeds is None else [int(number) for number in seeds.split(",")]
    except ValueError as error:
        raise ArgumentError(f"--seeds {seeds!r}; give whole numbers, joined by commas, such as 0,1,2") from error


def _command() -> str:
    """The words this process was started with; empty where they are those of another program."""
    return shlex.join(["repedit", *sys.argv[1:]]) if sys.argv[1:2] == ["audit"] else ""


def _estimate(edited: str, asked: Any, budget: str, chosen: list[str] | None, device: str, json: bool) -> None:
    from repedit.auditing.estimate import estimate
    from repedit.cli import output

    found = estimate(edited, asked, budget=budget, attacks=chosen, device=device)
    if json:
        output.show_json(found)
        return
    rows = [[name, cost["questions"], cost["steps"], round(cost["seconds"])] for name, cost in found["attacks"].items()]
    output.table(
        f"{budget}: {found['facts']} facts, about {found['minutes']:.0f} minutes; nothing was attacked",
        ("attack", "questions", "training steps", "seconds"), rows,
    )  # fmt: skip


def _selftest(seed: int, json: bool) -> None:
    from dataclasses import asdict

    from repedit.auditing.selftest import selftest
    from repedit.cli import output

    found = selftest(seed)
    if json:
        output.show_json({**asdict(found), "passed": found.passed})
    else:
        columns = ("control", "passed", "expected", "found", "attack", "R", "least", "seconds", "what it is")
        rows = [
            [c.control, c.passed, c.expected, c.found, c.attack, round(c.recovered, 2), c.least, round(c.seconds, 1), c.description]
            for c in found.checks
        ]  # fmt: skip
        output.table(f"{sum(c.passed for c in found.checks)} of {len(found.checks)} controls pass", columns, rows)
        output.out.print(f"{found.seconds:.0f} seconds; {found.failures or 'the audit is sound here'}")
    raise typer.Exit(0 if found.passed else 6)


def _written(write: Callable[[], list[Path]]) -> list[Path]:
    """What was written; a page or figure that could not be made costs neither the rest nor the verdict."""
    from repedit.cli import output
    from repedit.errors import ReportError

    try:
        return write()
    except ReportError as error:
        output.err.print(f"ReportError: {error}", soft_wrap=True)
        return []


def _name_files(written: list[Path]) -> None:
    from repedit.cli import output

    for path in written:
        output.out.print(f"wrote {path}", soft_wrap=True)


def _names(paths: list[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    whole = [path.absolute() if is_folder(path) else path.absolute().parent for path in paths]
    for count in range(1, max(len(path.parts) for path in whole) + 1):
        names = ["/".join(path.parts[-count:]) for path in whole]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {path}" for number, path in enumerate(whole, 1)]


def _plain(reports: dict[str, Any]) -> Any:
    """One audit as its own JSON, several by name."""

    found = {name: parse_json(report.to_json(), name) for name, report in reports.items()}
    return found if len(found) > 1 else next(iter(found.values()))
