"""The page of a whole run: what was asked, what was done, what it shows, and what it does not; for who must defend an edit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from repedit.io.files import make_folder, user_path, write_text
from repedit.report.pages import TONES, document, opening, told
from repedit.report.runs import asked, changing, choosing
from repedit.report.runs.gathering import RunReport, find, gather
from repedit.report.runs.limits import MEASURES, limits
from repedit.report.runs.showing import first_tables, items
from repedit.report.sections import element, listed, note, section
from repedit.report.withholding import withheld_run

ABSENT = {
    "The model": "No step of this run says which model it is about.",
    "How it was found": "Nothing this run left says by which method it was found.",
    "How neurons were scored": "Not run: no score step of this run left scores, and no edit needed any from a file.",
    "What was selected": "Not run: this run left no edit of sites.",
    "How it was trained": "Not run, or not kept: no training of this run left its losses. unlearn keeps them in a .safetensors file, or in the file that log names.",
    "What changed in the weights": "Not run: this run left no edit, no difference and no checkpoint.",
    "How exact it is": "Not run: without an exported checkpoint nothing says how exactly weights equal an edit.",
    "Before and after": "Not run: no step measured the edited model beside the original (compare, prune or project).",
    "Under attack": "Not run: nobody attacked the edited model, so nothing is known of what brings the removed back. An audit step does it.",
}
"""What stands in place of a part that a run does not have."""


def run_page(path: str | Path, *, hide_items: bool = False) -> str:
    """One HTML page that tells a whole run and needs no network: asked, chosen, changed, measured, attacked, not shown.

    Every file of the run is hashed again; what is not as the run left it stands first.

    Args:
        path: the TOML file of a run, or the folder that holds one.
        hide_items: withhold every text of an item, see `repedit.report.withholding`.
    Raises:
        NotFound: if there is no run. ArgumentError: if the folder holds several.
        DataError, CheckpointError: if the file or its account is not that of a run.
    """
    return rendered(gather(path), hide_items=hide_items)


def write_run(path: str | Path, target: str | Path | None = None, *, hide_items: bool = False) -> Path:
    """Write the page of a run; beside its file, as NAME.report.html, where no target is given. A folder gets report.html.

    Raises:
        As `run_page`; CheckpointError: if it cannot be written.
    """
    file = find(path)
    place = file.with_suffix(".report.html") if target is None else user_path(target)
    place = place / "report.html" if place.is_dir() else place
    text = run_page(file, hide_items=hide_items)
    make_folder(place.parent)
    write_text(place, text)
    return place


def rendered(run: RunReport, *, hide_items: bool = False) -> str:
    """The page of a run that was gathered."""
    run = withheld_run(run) if hide_items else run
    parts = {
        "What was asked": asked.request(run),
        "The model": asked.model(run),
        "How it was found": choosing.settings(run),
        "How neurons were scored": choosing.scores(run),
        "What was selected": choosing.selection(run),
        "How it was trained": choosing.training(run),
        "What changed in the weights": changing.tensors(run),
        "How exact it is": changing.exactness(run),
        "Before and after": items(run, *MEASURES),
        "Under attack": _attacks(run),
        "What has not been shown": [listed(limits(run), "plain")],
        "How to make it again": [
            element(
                "pre",
                text=f"repedit run {run.file.name}\nrepedit reproduce {run.file.name}\nrepedit report {run.file.name}",
            )
        ],
    }
    return document(
        f"{run.file.stem}: {_outcome(run)[0]}", [_head(run), *(_part(title, inside) for title, inside in parts.items())]
    )


def _part(title: str, inside: Sequence[str]) -> str:
    """A section, which says so where it has nothing to say."""
    return section(title, *inside) if any(inside) else section(title, element("p", text=ABSENT[title], class_="absent"))


def _head(run: RunReport) -> str:
    """Name, outcome, and whatever does not hold any more, before anything else."""
    word, tone, sentence = _outcome(run)
    done = sum(stage.done for stage in run.stages)
    names = dict.fromkeys(str(stage.asked["model"]) for stage in run.stages if stage.asked.get("model"))
    facts = [
        f"run {run.file.name}",
        f"{done} of {len(run.stages)} steps carried out",
        *(f"model {name}" for name in names),
    ]
    facts += [f"{name}: {origin['method']}" for name, origin in run.origins.items() if origin.get("method")]
    alarm = (
        element("div", element("h2", text="Not as the run left it"), listed(run.faults, "plain"), class_="alarm")
        if run.faults
        else ""
    )
    intact = (
        ""
        if run.faults or not done
        else note(
            "Every file that the steps were given, and all they wrote, still has the sha256 it had then; models are told by the hashes below."
        )
    )
    return element(
        "header", element("h1", text=f"{run.file.stem}: {word}", class_=tone), element("p", text=sentence, class_="lead"), alarm, intact,
        listed(facts, "facts"), section("In brief", listed(_brief(run), "plain"), *first_tables(run, *MEASURES)),
    )  # fmt: skip


def _brief(run: RunReport) -> list[str]:
    """The numbers a reader asks for first, each told in full below."""
    found = [f"{name}: {words}" for name, words in choosing.totals(run).items()]
    for name, held in run.checkpoints.items():
        plan, certificate = held.manifest.get("plan") or {}, held.manifest.get("certificate")
        most = max((row["relative_change"] or 0.0 for row in plan.values()), default=0.0)
        found.append(
            f"{run.called(name)}: {len(plan)} tensors changed, by {most:.3f} of their size at most; {held.describe()}."
        )
        if certificate:
            found.append(
                f"{name}: {certificate['form']}, {certificate['exactness']}, largest leak along a removed direction {certificate['worst_leak']:.1e}."
            )
    for name, report in run.audits.items():
        found.append(f"{run.called(name)}: {report.verdict.word}; {report.verdict.rule}".rstrip(".") + ".")
    return found or ["Nothing: no step left anything that can be read."]


def _outcome(run: RunReport) -> tuple[str, str, str]:
    """(words, tone, sentence): what the worst audit says; that there was none."""
    if run.faults:
        return (
            "CHANGED SINCE THE RUN",
            "bad",
            "Something this page speaks of is not what the run left. Carry the run out again before you rely on it.",
        )
    if not run.audits:
        return (
            "NOT AUDITED",
            "open",
            "The edit was made and measured as told below; nobody attacked it, so nothing shows that anything is gone.",
        )
    words = dict.fromkeys(report.verdict.word for report in run.audits.values())
    worst = max(run.audits.values(), key=lambda report: report.verdict.exit_code)
    return " / ".join(words), TONES.get(worst.verdict.word, "bad"), worst.verdict.sentence


def _attacks(run: RunReport) -> list[str]:
    """Every audit: its verdict, the forest, the tables."""
    parts = []
    for name, report in run.audits.items():
        parts += [opening(report, "h3", f"{run.called(name)}: "), *told(report, "h3")]
        parts.append(note(f"Settings, guesses that need no knowledge and diagnostics are in {name}/audit.html."))
    return parts
