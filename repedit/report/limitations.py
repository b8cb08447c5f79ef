"""What a run has not shown, as sentences: each follows from what is, and what is not, among its files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from repedit.runs import RunReport

MEASURES = ("compare", "prune", "project")
"""Verbs that measure an edited model beside the original."""


def limitations(run: RunReport) -> list[str]:
    """Everything a reader might believe after the page, and must not."""
    return [*_of_steps(run), *_of_measuring(run), *_of_audits(run), *_of_weights(run), *_always(run)]


def _of_steps(run: RunReport) -> Iterator[str]:
    open_ = [f"{s.number}, {s.verb}" for s in run.steps if not s.done]
    if open_:
        yield f"Anything that rests on steps that were not carried out: {'; '.join(open_)}."
    if run.faults:
        yield "That the files of today are those of the run: see the top of this page."


def _of_measuring(run: RunReport) -> Iterator[str]:
    done = [s.verb for s in run.steps if s.done]
    if not set(done) & set(MEASURES):
        yield "What the edit does to the answers of the model, and what it costs: no step compared the two models."
    if "project" in done:
        yield "How the kept facts that training never saw fare: project asks the very facts it trained on."
    if set(done) & set(MEASURES) and "compare" not in done:
        yield "What the exported files answer: prune and project measure the model in memory; a compare step reads the files."


def _of_audits(run: RunReport) -> Iterator[str]:
    if not run.audits:
        yield "That anything is gone. Nobody attacked the edited model: a few steps of training, or other words, may bring all of it back."
    for name, report in run.audits.items():
        yield f"That no attack brings it back: the verdict of {name} ({report.verdict.word}) holds for the attacks that ran, at the budget {report.context.get('budget', 'unknown')}."
        if len(report.context.get("seeds") or ()) == 1:
            yield f"How much the result of {name} varies with the seed of the attacks: there was one."
    attacked = {Path(str(s.table.get("edited"))) for s in run.steps if s.verb == "audit" and s.done}
    spared = [out for out in run.checkpoints if Path(out) not in attacked]
    if run.audits and spared:
        yield f"Anything about attacks on {', '.join(spared)}: no audit of this run attacked it."


def _of_weights(run: RunReport) -> Iterator[str]:
    for name, held in run.checkpoints.items():
        kinds = {row["exactness"] for row in (held.manifest.get("sites") or {}).values()}
        if "subspace-exact" in kinds:
            yield f"That the weights of {name} equal the edit to the last digit: at some sites the subspace is erased and the scale differs."
        if held.manifest.get("certificate"):
            yield f"That the knowledge has no other place: the certificate of {name} speaks of tensors along given directions, not of copies elsewhere."
        if held.unlisted:
            yield f"Where these files of {name} come from, which its manifest does not list: {', '.join(held.unlisted)}."
    if not run.checkpoints:
        yield "That there is a checkpoint with the edit in its weights: none was written, and whoever has the original has everything."


def _always(run: RunReport) -> Iterator[str]:
    yield "What the model does in languages, formats and tasks that no step asked for."
    yield f"That the same bytes come out again: repedit reproduce {run.file.name} carries the run out once more and compares."
    yield (
        "Who made these files: hashes say whether they are still what the account beside them says, and whoever can write "
        "there can write both."
    )
