"""What a run left behind, as one value, and what it has not shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repedit.auditing.report import Report
from repedit.errors import ArgumentError, CheckpointError, NotFound, RepeditError
from repedit.io import archive
from repedit.io.files import file_hash, file_hashes, is_file, is_folder, user_path
from repedit.io.text import read_text
from repedit.report.redaction import redacted_values
from repedit.report.run_journal import Entry, account_of, entries, tables
from repedit.rewrite.certificate import TensorCertificate
from repedit.rewrite.verification import MANIFEST, Verification, verification
from repedit.sites import Site

# --- What a run left behind, as one value: what was asked, what was done, what lies there now, and whether that is still the same


@dataclass(frozen=True)
class Stage:
    """One step: what the file asks for now, what was carried out, and what does not hold of it any more."""

    number: int
    asked: Mapping[str, Any]
    entry: Entry | None
    faults: tuple[str, ...]
    """Sentences; empty where what the step left is what lies there."""

    @property
    def verb(self) -> str:
        """The verb that the file asks for."""
        return str(self.asked["verb"])

    @property
    def done(self) -> bool:
        """Whether it was carried out to its end; an audit ends with the code of its verdict."""
        return self.entry is not None and (self.entry.code == 0 or self.verb == "audit")

    @property
    def state(self) -> str:
        """A few words."""
        if self.entry is None:
            return "not run"
        if not self.done:
            return f"ended with code {self.entry.code}"
        return "done, not as it was left" if self.faults else "done"


@dataclass(frozen=True, eq=False)
class RunReport:
    """Everything a page tells of a run."""

    file: Path
    """The file of the run."""
    text: str
    """What it says."""
    stages: tuple[Stage, ...]
    checkpoints: Mapping[str, Verification]
    """Exported directories by what the file calls them."""
    saved: Mapping[str, Path]
    """Files with a value of repedit: edits, deltas, scores, collections."""
    audits: Mapping[str, Report]
    unreadable: Mapping[str, str]
    """What lies there and cannot be read, with the reason."""
    hidden: bool = False
    """Whether the texts of items are withheld, see `repedit.report.redaction`."""

    @property
    def faults(self) -> tuple[str, ...]:
        """Whatever does not hold any more; nothing on the page may be relied on before this is empty."""
        found = [fault for stage in self.stages for fault in stage.faults]
        found += [f"{name} cannot be read: {why}" for name, why in self.unreadable.items()]
        found += [
            f"{name} is not what its {MANIFEST} says: {held.describe()}"
            for name, held in self.checkpoints.items()
            if not held.whole
        ]
        return tuple(found)

    @property
    def origins(self) -> dict[str, Mapping[str, Any]]:
        """The provenance of everything that was found or written, by what the file calls it; of a composition, its parts."""
        found: dict[str, Mapping[str, Any]] = {}
        for name, held in self.checkpoints.items():
            found[name] = held.manifest.get("edit", {})
        for name, path in self.saved.items():
            found[name] = archive.header_of(path).get("provenance", {})
        parts = dict[str, Mapping[str, Any]]()
        for name, origin in found.items():
            parents = origin.get("parents") or []
            parts |= (
                {f"{name}, part {n}": part for n, part in enumerate(parents, 1)}
                if origin.get("method") == "composition"
                else {name: origin}
            )
        return {name: redacted_values(origin) for name, origin in parts.items()} if self.hidden else parts

    def called(self, out: str) -> str:
        """The name of an output, along with the warning that it is not as the run left it, where it is not."""
        faulty = any(stage.faults for stage in self.stages if str(stage.asked.get("out")) == out)
        return f"{out} (not as the run left it)" if faulty else out

    def of_kind(self, kind: str) -> Iterator[tuple[str, Path]]:
        """The saved values of one kind: "edit", "delta", "scores" or "collection"."""
        return ((name, path) for name, path in self.saved.items() if archive.kind_of(path) == kind)

    def shown(self, *verbs: str) -> Iterator[tuple[Stage, Mapping[str, Any]]]:
        """What the steps with these verbs showed, in order."""
        for stage in self.stages:
            if stage.entry is not None and stage.verb in verbs:
                yield from ((stage, item) for item in stage.entry.shown)


def find(path: str | Path) -> Path:
    """The file of a run: itself, or that of the folder that holds the account of exactly one.

    Raises:
        NotFound: if there is none. ArgumentError: if there are several.
    """
    place = user_path(path)
    if not is_folder(place):
        if not is_file(place):
            raise NotFound(
                f"{place.absolute()} does not exist; give the TOML file of a run, or the folder that holds it"
            )
        return place
    end = account_of(Path("x")).name.removeprefix("x")
    held = [p.with_name(p.name.removesuffix(end) + ".toml") for p in sorted(place.glob(f"*{end}"))]
    if not held:
        raise NotFound(
            f"{place.absolute()} holds no account of a run (*{end}); `repedit run FILE.toml` leaves one beside the file"
        )
    if len(held) > 1:
        raise ArgumentError(f"{place.absolute()} holds {len(held)} runs; name one: {', '.join(p.name for p in held)}")
    return held[0]


def gather(path: str | Path) -> RunReport:
    """Read what a run left and hash every file of it again; no model is loaded, nothing is measured.

    Args:
        path: the file of a run, or the folder that holds one.
    Raises:
        NotFound, ArgumentError: see `find`. DataError, CheckpointError: if the file or its account is none of a run.
    """
    file = find(path)
    asked, known, home = tables(file), entries(file), file.parent
    order = list(known)
    stages = tuple(_stage(n, table, known.get(n), order, home) for n, table in enumerate(asked, 1))
    outs = dict.fromkeys(str(stage.asked["out"]) for stage in stages if stage.asked.get("out"))
    checkpoints, saved, audits, unreadable = (
        dict[str, Verification](),
        dict[str, Path](),
        dict[str, Report](),
        dict[str, str](),
    )
    for out in outs:
        there = home / out
        try:
            if (there / MANIFEST).is_file():
                checkpoints[out] = _told(verification(there))
            elif (there / "audit.json").is_file():
                audits[out] = Report.load(there)
            elif there.is_file() and archive.kind_of(there):
                saved[out] = there
        except RepeditError as error:
            # A page is for others, whose paths are others.
            unreadable[out] = str(error).replace(f"{home.absolute()}/", "")
    return RunReport(file, read_text(file), stages, checkpoints, saved, audits, unreadable)


def _told(held: Verification) -> Verification:
    """The same, if its manifest says all that a page tells.

    Raises:
        CheckpointError: if it does not.
    """
    found = held.manifest
    try:
        for part, keys in (("sites", ("map", "exactness")), ("plan", ("relative_change", "operations"))):
            for row in dict(found.get(part) or {}).values():
                _ = [row[key] for key in keys]
        _ = [Site.parse(site) for site in found.get("sites") or {}]
        _ = [TensorCertificate(**row) for row in ((found.get("certificate") or {"tensors": {}})["tensors"]).values()]
        _ = dict(found.get("edit") or {}), dict((found.get("base") or {"files": {}})["files"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"its {MANIFEST} is not one of an export: {error!r}") from error
    return held


def _stage(number: int, asked: Mapping[str, Any], entry: Entry | None, order: Sequence[int], home: Path) -> Stage:
    if entry is None:
        return Stage(number, asked, None, ())
    name, faults = f"Step {number}, {entry.verb}", []
    if dict(entry.asked) != dict(asked):
        faults.append(
            f"{name}: the file asks for something else now than what was carried out: {_words(entry.asked, asked)}."
        )
    later = [n for n in order[order.index(number) + 1 :] if n < number]
    if later:
        faults.append(
            f"{name} was carried out before step {later[0]} was last carried out: it speaks of what was there then."
        )
    if entry.out is not None and (entry.code == 0 or entry.verb == "audit"):
        faults += [f"{name}: {what}." for what in _altered(entry.out, entry.files, file_hashes(home / entry.out))]
    for given, digest in entry.inputs.items():
        here = home / given
        if not here.is_file() or file_hash(here) != digest:
            faults.append(f"{name}: its input {given} is {'gone' if not here.is_file() else 'not the one it read'}.")
    return Stage(number, asked, entry, tuple(faults))


def _words(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The options that differ."""
    keys = [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]
    return ", ".join(f"{key} was {before.get(key, 'not given')}, is {now.get(key, 'not given')}" for key in keys)


def _altered(out: str, before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    if before and not now:
        return [f"{out} is gone"]
    changed = [str(Path(out) / name) for name in before if name in now and now[name] != before[name]]
    missing = [str(Path(out) / name) for name in before if name not in now]
    added = [str(Path(out) / name) for name in now if name not in before]
    kinds = ((changed, "changed since the run, its sha256 is another"), (missing, "gone"), (added, "new since the run"))
    return [f"{', '.join(names)}: {words}" for names, words in kinds if names]


# --- What a run has not shown, as sentences: each follows from what is, and what is not, among its files


MEASURES = ("compare", "prune", "project")
"""Verbs that measure an edited model beside the original."""


def limits(run: RunReport) -> list[str]:
    """Everything a reader might believe after the page, and must not."""
    return [*_of_steps(run), *_of_measuring(run), *_of_audits(run), *_of_weights(run), *_always(run)]


def _of_steps(run: RunReport) -> Iterator[str]:
    open_ = [f"{s.number}, {s.verb}" for s in run.stages if not s.done]
    if open_:
        yield f"Anything that rests on steps that were not carried out: {'; '.join(open_)}."
    if run.faults:
        yield "That the files of today are those of the run: see the top of this page."


def _of_measuring(run: RunReport) -> Iterator[str]:
    done = [s.verb for s in run.stages if s.done]
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
    attacked = {Path(str(s.asked.get("edited"))) for s in run.stages if s.verb == "audit" and s.done}
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
