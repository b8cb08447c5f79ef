"""Runs: the verbs of the command line listed in one TOML file, carried out in order and resumed where they stopped.

    model = "smollm2-135m"

    [[step]]
    verb = "prune"
    fraction = 0.01
    out = "edited"

Paths are relative to the file. Beside it lies the journal of the run, run.journal.jsonl: one JSON line for each step that
was carried out, with the hashes of what it read and wrote and with what it displayed. A step whose inputs, options and
predecessors are unchanged, and whose output still has the hashes of the journal, is not repeated.

The verbs are passed in: `Commands` describe their options and `Execute` calls one of them.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from filelock import FileLock, Timeout

from repedit import __version__
from repedit.arguments import checked
from repedit.auditing.report import Report
from repedit.errors import ArgumentError, CheckpointError, DataError, NotFound, RepeditError, TargetExists, check_names
from repedit.hashing import package_versions
from repedit.io import archive
from repedit.io.files import exists, file_hash, file_hashes, is_file, is_folder, user_path
from repedit.io.known_hashes import remembered_hash
from repedit.io.store import JsonLog, content_hash
from repedit.io.text import parse_json, read_json, read_text, read_toml
from repedit.rewrite.certificate import TensorCertificate
from repedit.rewrite.manifest import PACKAGES
from repedit.rewrite.verification import MANIFEST, Verification, verification
from repedit.sites import Site

NOT_STEPS = ("run", "reproduce", "demo", "fetch", "chat", "tasks", "push", "vision demo")
"""Verbs that cannot be a step of a run."""
OUTPUT_OPTIONS = ("out", "resume", "log")
"""Options that name what a verb writes; every other option that names a file is an input."""
RESUMABLE = ("audit",)
"""Verbs that continue in the folder that an earlier, interrupted call left."""
TIMED = ("audit", "report")
"""Verbs whose files hold durations, so that they cannot be reproduced to the byte."""
JOURNAL, EARLIER_JOURNALS = ".journal.jsonl", (".done.jsonl", ".account.jsonl")
"""Endings of the journal of a run, and of those that earlier versions wrote."""
_BACKUP = ".replaced"
"""Name of an earlier output inside the folder of the step that replaces it."""


@runtime_checkable
class Parameter(Protocol):
    """An option or argument of a verb, as click describes it."""

    name: str | None
    opts: list[str]
    secondary_opts: list[str]
    required: bool
    param_type_name: str


@runtime_checkable
class Command(Protocol):
    """The options and arguments of a verb."""

    params: list[Parameter]


Commands = Mapping[str, Command]
"""Verb -> its options and arguments."""
Execute = Callable[["Step", list[str]], tuple[int, list[dict[str, Any]]]]
"""Calls the verb of a step with the words of its command line; returns the exit code and what the verb displayed."""


# --- The steps of a file


@dataclass(frozen=True)
class Step:
    """One verb with its options."""

    number: int
    verb: str
    options: Mapping[str, Any]
    """Value of each parameter of the verb that is given."""
    key: str
    """Hash of the verb, its options, its inputs and all steps before it."""
    table: Mapping[str, Any] = field(default_factory=dict)
    """Its table in the file, with the `model` of the file."""

    @property
    def out(self) -> Path | None:
        """What it writes, relative to the file of the run."""
        return Path(self.options["out"]) if "out" in self.options else None

    @property
    def outputs(self) -> list[Path]:
        """Everything that it writes: its output, the file it resumes from, its log."""
        return [Path(self.options[name]) for name in OUTPUT_OPTIONS if name in self.options]

    @property
    def staging_folder(self) -> Path:
        """Folder beside the output in which the output is written first; its name holds the key of the step."""
        out = Path(self.options["out"])
        return out.parent / f".{out.name}.step-{self.key[:16]}"

    @property
    def staged(self) -> Path | None:
        """Where the output is until it is complete and in the journal."""
        return None if self.out is None else self.staging_folder / self.out.name

    def relocated(self, folder: Path, outputs: Sequence[Path]) -> Step:
        """The same step with every path below `outputs` moved into a folder, and all other paths absolute."""

        def moved(value: object) -> object:
            if isinstance(value, list):
                return [moved(item) for item in value]
            if not isinstance(value, str):
                return value
            if _is_below(value, outputs):
                return str(folder / value)
            return str(Path(value).absolute()) if exists(value) else value

        return replace(self, options={key: moved(value) for key, value in self.options.items()})

    def arguments(self, command: Command) -> list[str]:
        """The words after the verb on the command line; a value is never taken for an option, whatever it begins with."""
        arguments: list[str] = []
        options: list[str] = []
        for parameter in command.params:
            value = self.options.get(str(parameter.name))
            values = value if isinstance(value, list) else [] if value is None else [value]
            if parameter.param_type_name == "argument":
                arguments += map(str, values)
            elif getattr(parameter, "is_flag", False):
                for value in values:
                    options += (parameter.opts if value else parameter.secondary_opts)[:1]
            else:
                name = parameter.opts[0]
                for text in map(str, values):
                    options += [f"{name}={text}"] if text.startswith("-") else [name, text]
        if any(text.startswith("-") for text in arguments):
            return [*options, "--", *arguments]
        return [*arguments, *options]


def step_tables(file: Path) -> list[dict[str, Any]]:
    """The [[step]] tables of a file, each with the `model` of the file.

    Raises:
        NotFound: if there is no such file. UnknownName: if it has another key than `model` and `step`.
        DataError: if it is not TOML or holds no steps.
    """
    model, tables = _content(file)
    return [model | table for table in tables]


def _content(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The `model` of a file, empty if it has none, and its [[step]] tables."""
    if not is_file(file):
        raise NotFound(f"{file.absolute()} is not a file; give the TOML file of a run, or the folder that holds it")
    content = read_toml(file)
    check_names(str(file), content, ("model", "step"), "key")
    tables = content.pop("step", None)
    if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) and "verb" in t for t in tables):
        raise DataError(f"{file} is not the file of a run: it holds no [[step]] tables with a verb")
    return content, tables


def read_steps(file: Path, commands: Commands) -> list[Step]:
    """The steps of a file.

    Raises:
        NotFound, DataError: see `step_tables`.
        UnknownName: if no verb, or no option of the verb, has that name.
        ArgumentError: if a required option is missing, or two steps write to the same path.
    """
    steps: list[Step] = []
    model, tables = _content(file)
    for number, table in enumerate(tables, 1):
        steps.append(_step(number, table, model, commands, steps, file.parent))
    outputs = [str(path) for step in steps for path in step.outputs]
    repeated = sorted({path for path in outputs if outputs.count(path) > 1})
    if repeated:
        raise ArgumentError(f"several steps write {repeated[0]}; give each its own out")
    return steps


def _step(
    number: int, table: dict[str, Any], model: dict[str, Any], commands: Commands, before: Sequence[Step], folder: Path
) -> Step:
    verb = str(table["verb"])
    check_names(f"step {number}: a run", [verb], [name for name in commands if name not in NOT_STEPS], "verb")
    parameters = {name: str(p.name) for p in commands[verb].params for name in _names_in_file(p)}
    values = (model if "model" in parameters else {}) | {key: table[key] for key in table if key != "verb"}
    check_names(f"step {number}, {verb},", values, parameters)
    options = {parameters[key]: value for key, value in values.items()}
    missing = [str(p.name) for p in commands[verb].params if p.required and p.name not in options]
    if missing:
        raise ArgumentError(f"step {number}, {verb}, needs {', '.join(missing)}")
    for name in OUTPUT_OPTIONS:
        if name in options and not (isinstance(options[name], str) and Path(options[name]).name):
            raise ArgumentError(f"step {number}, {verb}: {name} = {options[name]!r}; give the path of a file or folder")
    outputs = [path for step in before for path in step.outputs]
    texts = [text for key, value in sorted(options.items()) if key not in OUTPUT_OPTIONS for text in _texts(value)]
    inputs = [_input_state(folder / text) for text in texts if not _is_below(text, outputs)]
    key = content_hash([before[-1].key if before else __version__, verb, options, inputs])
    return Step(number, verb, options, key, model | table)


def _names_in_file(parameter: Parameter) -> list[str]:
    """The names of a parameter in a file: those of the command line, with _ for -."""
    if parameter.param_type_name == "argument":
        return [str(parameter.name)]
    return [name.removeprefix("--").replace("-", "_") for name in parameter.opts if name.startswith("--")]


def _texts(value: object) -> Iterator[str]:
    """The texts among the values of an option, which may be given several times."""
    yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str))


def _is_below(text: str, outputs: Sequence[Path]) -> bool:
    """Whether a text names an output of an earlier step, or something inside it."""
    return any(Path(text).is_relative_to(path) for path in outputs)


def _input_state(path: Path) -> str | None:
    """Distinguishes the states of an input: the hash of a file; of a folder, such as a model, names and hashes of its files."""
    if is_folder(path):
        files = [p for p in sorted(path.rglob("*")) if p.is_file() and not p.name.startswith(".")]
        return " ".join(f"{p.relative_to(path)} {remembered_hash(p)}" for p in files)
    return remembered_hash(path) if is_file(path) else None


# --- The journal of a run


@dataclass(frozen=True)
class StepRecord:
    """One step as it was carried out."""

    number: int
    verb: str
    key: str
    """`Step.key` at that time."""
    table: Mapping[str, Any]
    """`Step.table` at that time."""
    command: tuple[str, ...]
    """The command line after `repedit`."""
    exit_code: int
    seconds: float
    out: str | None
    files: Mapping[str, str]
    """sha256 of every file it wrote, by path below `out`; "" is `out` itself if it is a file."""
    inputs: Mapping[str, str]
    """sha256 of every single file it was given."""
    display: tuple[Mapping[str, Any], ...]
    """Tables, generations, lines and JSON that were shown on the console."""
    versions: Mapping[str, str]

    @property
    def done(self) -> bool:
        """Whether the step was completed; the exit code of an audit is its verdict."""
        return self.exit_code == 0 or self.verb == "audit"


_TYPES = {
    "number": int, "verb": str, "key": str, "table": dict, "command": list[str], "exit_code": int, "seconds": int | float,
    "out": str | None, "files": dict[str, str], "inputs": dict[str, str], "display": list[dict], "versions": dict[str, str],
}  # fmt: skip
"""Of the fields of a record, as JSON gives them back."""


def journal_path(file: Path) -> Path:
    """The journal of a run: run.toml -> run.journal.jsonl."""
    return file.with_suffix(JOURNAL)


class Journal:
    """The steps that were carried out, in order, one JSON line each; an incomplete last line is removed.

    A step writes its output into a staging folder. When the output is complete, its hashes are added to the journal, and
    then it is moved to its target. Whenever the run is killed, the staging folder holds our work, and the target holds an
    earlier output or a file of the user.
    """

    def __init__(self, file: Path) -> None:
        """Read the journal of a run.

        Raises:
            CheckpointError: if it is damaged, or an earlier version of repedit began this run.
        """
        path = journal_path(file)
        earlier = [file.with_suffix(ending) for ending in EARLIER_JOURNALS if exists(file.with_suffix(ending))]
        if earlier and not exists(path):
            names = " and ".join(str(path) for path in earlier)
            raise CheckpointError(
                f"{file.absolute()} was begun by an earlier version of repedit, which left {names}; move them and the outputs of "
                "the run away and run it again, or continue with that version"
            )
        self._log = JsonLog(path, _TYPES, "the journal of a run", "move it away")
        tuples = ("command", "display")
        self.records = [StepRecord(**(row | {name: tuple(row[name]) for name in tuples})) for row in self._log.rows]

    def add(self, record: StepRecord) -> None:
        """Append a step that ended; it is on the disk when this returns."""
        self._log.add(asdict(record))
        self.records.append(record)

    def latest(self) -> dict[int, StepRecord]:
        """The last record of every step by its number, in the order in which they were carried out."""
        records: dict[int, StepRecord] = {}
        for record in self.records:
            records.pop(record.number, None)
            records[record.number] = record
        return records

    def completed(self, step: Step) -> StepRecord | None:
        """The last record of a step that was completed with these inputs and options; None if there is none."""
        return next((r for r in reversed(self.records) if r.key == step.key and r.done), None)

    def position(self, step: Step, after: int) -> int | None:
        """The index of the record of a step that need not be carried out again; None if it must.

        Args:
            after: index of the record of the step before; a step that was carried out earlier than that must be repeated.
        """
        record = self.completed(step)
        index = next((n for n, other in enumerate(self.records) if other is record), -1)
        if record is None or index < after:
            return None
        written = [path for path in (step.out, step.staged) if path is not None]
        return index if not written or record.files in [file_hashes(path) for path in written] else None

    def stage(self, step: Step) -> Step:
        """The step with its output in its staging folder, which is empty except for what an interrupted audit left.

        Raises:
            TargetExists: if the target holds something that no step of this file wrote.
        """
        if step.out is None or step.staged is None:
            return step
        self._check_replaceable(step)
        step.staging_folder.mkdir(parents=True, exist_ok=True)
        if step.verb not in RESUMABLE:
            _remove(step.staged)
        elif step.out.exists() and not step.staged.exists():
            shutil.copytree(step.out, step.staged)
        for folder in step.out.parent.glob(f".{glob.escape(step.out.name)}.step-*"):
            if folder != step.staging_folder:
                _clear(folder, step.out.name)
        return replace(step, options={**step.options, "out": str(step.staged)})

    def install(self, step: Step) -> None:
        """Move the output of a completed step to its target, unless it is there already, and remove the staging folder.

        Raises:
            TargetExists: if the target holds something that no step of this file wrote; the output stays where it is.
        """
        record = self.completed(step)
        if step.out is None or step.staged is None or record is None or not step.staging_folder.exists():
            return
        if record.files and file_hashes(step.staged) == record.files != file_hashes(step.out):
            self._check_replaceable(step)
            if step.out.exists():
                step.out.rename(step.staging_folder / _BACKUP)
            step.staged.rename(step.out)
        _clear(step.staging_folder, step.out.name)

    def _check_replaceable(self, step: Step) -> None:
        if step.out is None or step.staged is None or not os.path.lexists(step.out):
            return
        written = [record.files for record in self.records if record.done and record.out == str(step.out)]
        if step.out.is_symlink() or file_hashes(step.out) not in written:
            staged = f"; the output of the step is in {step.staged}" if step.staged.exists() else ""
            raise TargetExists(
                f"step {step.number}, {step.verb}: {step.out} exists and is not what an earlier run of this file left there; "
                f"move it away, or give another out{staged}"
            )


def _clear(folder: Path, name: str) -> None:
    """Remove a staging folder; anything else in it, such as a result that was saved after an error, stays."""
    for part in (name, _BACKUP):
        _remove(folder / part)
    with contextlib.suppress(OSError):  # it holds something else
        folder.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- Carrying a run out


def run(
    file: Path,
    commands: Commands,
    execute: Execute,
    say: Callable[[str], None],
    *,
    check: Callable[[Step], None],
    dry_run: bool = False,
) -> int:
    """Carry out the steps of a file that are not done yet; returns the exit code of the last audit, or of a step that failed.

    Args:
        say: called with one line before each step, and with the reason if a step fails.
        check: called with every step before the first is carried out; raises if the options of a step cannot be meant.
        dry_run: only say which steps are done and which are to do.
    Raises:
        NotFound, DataError, UnknownName, ArgumentError: see `read_steps`.
        TargetExists: if another process carries out the file, or a step would replace a file of the user.
        CheckpointError: if the journal is damaged or of an earlier version.
    """
    steps, exit_code = read_steps(file, commands), 0
    with contextlib.chdir(file.absolute().parent):
        for step in steps:
            check(step)
    with contextlib.chdir(file.absolute().parent), _locked(Path(file.name), dry_run):
        journal = Journal(Path(file.name))
        previous: int | None = -1  # index of the record of the step before; None after a step that is to do
        for step in steps:
            previous = None if previous is None else journal.position(step, previous)
            state, target = "to do" if previous is None else "done", f" -> {step.out}" if step.out else ""
            say(f"{step.number} of {len(steps)}, {step.verb}: {state}{target}")
            if previous is None and dry_run:
                continue
            if previous is None:
                record = _carried_out(step, commands[step.verb], execute, journal, [s.table.get("out") for s in steps])
                if not record.done:
                    say(
                        f"step {step.number}, {step.verb}, ended with exit code {record.exit_code}; the steps before it are "
                        "done, run again to continue"
                    )
                    return record.exit_code
            else:
                record = journal.records[previous]
            if not dry_run:
                journal.install(step)
            exit_code = record.exit_code if step.verb == "audit" else exit_code
    return exit_code


def _carried_out(
    step: Step, command: Command, execute: Execute, journal: Journal, outs: Sequence[object]
) -> StepRecord:
    """Carry a step out in its staging folder and enter it in the journal."""
    staged, start = journal.stage(step), time.perf_counter()
    exit_code, display = execute(step, staged.arguments(command))
    seconds = time.perf_counter() - start
    if step.staged is not None:  # readers know the output by its final name
        text = json.dumps(display).replace(json.dumps(str(step.staged))[1:-1], json.dumps(str(step.out))[1:-1])
        display = parse_json(text, "the display of a step", finite=False)
    inputs = [text for value in step.table.values() for text in _texts(value) if text not in outs and is_file(text)]
    record = StepRecord(
        step.number, step.verb, step.key, step.table, (step.verb, *step.arguments(command)), exit_code, seconds,
        None if step.out is None else str(step.out), {} if step.staged is None else file_hashes(step.staged),
        {text: file_hash(Path(text)) for text in inputs}, tuple(display), package_versions(*PACKAGES),
    )  # fmt: skip
    journal.add(record)
    return record


@contextlib.contextmanager
def _locked(file: Path, dry_run: bool) -> Iterator[None]:
    """Keep other processes from carrying out the same file; the system releases the lock of a process that dies.

    Raises:
        TargetExists: if another process holds the lock.
    """
    if dry_run:
        yield
        return
    try:
        with FileLock(file.with_name(f".{file.name}.lock"), blocking=False):
            yield
    except Timeout as error:
        raise TargetExists(f"{file} is being carried out by another process; wait until it has ended") from error


def reproduce(file: Path, commands: Commands, execute: Execute, say: Callable[[str], None]) -> bool:
    """Carry out the steps of a completed run again in a temporary folder; True if everything they write has the same hashes.

    Args:
        say: called with one line for each step.
    Raises:
        ArgumentError: if a step was not carried out, or it or a step before it changed since.
    """
    steps, identical = read_steps(file, commands), True
    with contextlib.chdir(file.absolute().parent), tempfile.TemporaryDirectory() as name:
        journal, folder = Journal(Path(file.name)), Path(name)
        expected = [_completed_files(journal, step) for step in steps]
        outputs = [path for step in steps for path in step.outputs]
        for step, files in zip(steps, expected, strict=True):
            if step.out is None or step.verb in TIMED:
                say(f"{step.number}, {step.verb}: not compared")
                continue
            execute(step, step.relocated(folder, outputs).arguments(commands[step.verb]))
            equal = _equal_files(folder / step.out, Path(step.out), files)
            identical = identical and equal
            say(f"{step.number}, {step.verb}: {step.out} {'is the same' if equal else 'differs'}")
    return identical


def _equal_files(again: Path, first: Path, files: Mapping[str, str]) -> bool:
    """Whether a step wrote the same again; which files of an export are hard links depends on where it lies."""
    written = file_hashes(again)
    different = {name for name in {*written, *files} if written.get(name) != files.get(name)}
    if different != {MANIFEST} or MANIFEST not in written or MANIFEST not in files:
        return not different
    one, other = (read_json(folder / MANIFEST, finite=False) | {"hard_links": []} for folder in (again, first))
    return one == other


def _completed_files(journal: Journal, step: Step) -> Mapping[str, str]:
    record = journal.completed(step)
    if record is None:
        raise ArgumentError(
            f"step {step.number}, {step.verb}, was not run, or it or something before it changed; run it first"
        )
    return record.files


# --- What a run left behind


@dataclass(frozen=True)
class StepReport:
    """One step: what the file asks for now, what was carried out, and which of it no longer holds."""

    number: int
    table: Mapping[str, Any]
    """Its table in the file, with the `model` of the file."""
    record: StepRecord | None
    faults: tuple[str, ...]
    """Sentences; empty if everything the step wrote is unchanged."""

    @property
    def verb(self) -> str:
        """The verb in the file."""
        return str(self.table["verb"])

    @property
    def out(self) -> str | None:
        """The output in the file."""
        return str(self.table["out"]) if self.table.get("out") else None

    @property
    def done(self) -> bool:
        """Whether the step was completed."""
        return self.record is not None and self.record.done

    @property
    def state(self) -> str:
        """The same in a few words."""
        if self.record is None:
            return "not run"
        if not self.done:
            return f"ended with code {self.record.exit_code}"
        return "done, not as it was left" if self.faults else "done"


@dataclass(frozen=True, eq=False)
@checked
class RunReport:
    """What a run was asked, what it did and what it wrote; the content of its page."""

    file: Path
    """The file of the run."""
    text: str
    """The content of that file."""
    steps: tuple[StepReport, ...]
    checkpoints: Mapping[str, Verification]
    """Exported directories by their name in the file."""
    saved: Mapping[str, Path]
    """Files with a value of repedit: edits, deltas, scores, collections."""
    audits: Mapping[str, Report]
    unreadable: Mapping[str, str]
    """Outputs that exist and cannot be read, with the reason."""
    redact: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    """Removes the texts of items from a provenance, if they are withheld; see `repedit.report.redaction`."""

    @property
    def redacted(self) -> bool:
        """Whether the texts of items are withheld."""
        return self.redact is not None

    @property
    def faults(self) -> tuple[str, ...]:
        """What no longer holds; the page can be relied on only if this is empty."""
        return (
            *(fault for step in self.steps for fault in step.faults),
            *(f"{name} cannot be read: {reason}" for name, reason in self.unreadable.items()),
            *(
                f"{name} is not what its {MANIFEST} says: {checkpoint.describe()}"
                for name, checkpoint in self.checkpoints.items()
                if not checkpoint.whole
            ),
        )

    @property
    def provenances(self) -> dict[str, Mapping[str, Any]]:
        """The provenance of every output by its name in the file; a composition gives one for each of its parts."""
        provenances = {name: checkpoint.manifest.get("edit", {}) for name, checkpoint in self.checkpoints.items()}
        provenances |= {name: archive.header_of(path).get("provenance", {}) for name, path in self.saved.items()}
        parts = dict[str, Mapping[str, Any]]()
        for name, provenance in provenances.items():
            if provenance.get("method") == "composition":
                parents = enumerate(provenance.get("parents") or [], 1)
                parts |= {f"{name}, part {number}": part for number, part in parents}
            else:
                parts[name] = provenance
        return parts if self.redact is None else {name: self.redact(part) for name, part in parts.items()}

    @checked
    def label(self, out: str) -> str:
        """The name of an output, with a warning if it was changed since the run."""
        faulty = any(step.faults for step in self.steps if step.out == out)
        return f"{out} (not as the run left it)" if faulty else out

    @checked
    def of_kind(self, kind: str) -> Iterator[tuple[str, Path]]:
        """The saved values of one kind: "edit", "delta", "scores" or "collection"."""
        return ((name, path) for name, path in self.saved.items() if archive.kind_of(path) == kind)

    @checked
    def display(self, *verbs: str) -> Iterator[tuple[StepReport, Mapping[str, Any]]]:
        """What the steps with these verbs displayed, in order."""
        for step in self.steps:
            if step.record is not None and step.verb in verbs:
                yield from ((step, item) for item in step.record.display)


def is_run(path: Path) -> bool:
    """Whether a path given to `repedit report` means a run: a TOML file, or a folder with a journal and no audit."""
    if not is_folder(path):
        return path.suffix == ".toml"
    endings = (JOURNAL, *EARLIER_JOURNALS)
    return not (path / "audit.json").exists() and any(any(path.glob(f"*{ending}")) for ending in endings)


def run_file(path: str | Path) -> Path:
    """The TOML file of a run: the path itself, or the file of the one journal in that folder.

    Raises:
        NotFound: if there is none. ArgumentError: if there are several.
    """
    root = user_path(path)
    if not is_folder(root):
        if not is_file(root):
            raise NotFound(
                f"{root.absolute()} does not exist; give the TOML file of a run, or the folder that holds it"
            )
        return root
    endings = (JOURNAL, *EARLIER_JOURNALS)
    files = sorted({p.with_name(p.name.removesuffix(end) + ".toml") for end in endings for p in root.glob(f"*{end}")})
    if not files:
        raise NotFound(
            f"{root.absolute()} holds no journal of a run (*{JOURNAL}); `repedit run FILE.toml` leaves one beside the file"
        )
    if len(files) > 1:
        raise ArgumentError(f"{root.absolute()} holds {len(files)} runs; name one: {', '.join(p.name for p in files)}")
    return files[0]


def run_report(path: str | Path) -> RunReport:
    """Read what a run left and hash every file of it again; no model is loaded and nothing is measured.

    Args:
        path: the file of a run, or the folder that holds one.
    Raises:
        NotFound, ArgumentError: see `run_file`. DataError, CheckpointError: if the file or its journal is not one of a run.
    """
    file = run_file(path)
    tables, records, home = step_tables(file), Journal(file).latest(), file.parent
    order = list(records)
    steps = []
    for number, table in enumerate(tables, 1):
        record = records.get(number)
        steps.append(StepReport(number, table, record, tuple(_faults(record, table, order, home) if record else ())))
    checkpoints, saved = dict[str, Verification](), dict[str, Path]()
    audits, unreadable = dict[str, Report](), dict[str, str]()
    for out in dict.fromkeys(step.out for step in steps if step.out is not None):
        output = home / out
        try:
            if (output / MANIFEST).is_file():
                checkpoints[out] = _checked(verification(output))
            elif (output / "audit.json").is_file():
                audits[out] = Report.load(output)
            elif output.is_file() and archive.kind_of(output):
                saved[out] = output
        except RepeditError as error:
            # A page is read by others, whose paths are others.
            unreadable[out] = str(error).replace(f"{home.absolute()}/", "")
    return RunReport(file, read_text(file), tuple(steps), checkpoints, saved, audits, unreadable)


def _checked(checkpoint: Verification) -> Verification:
    """The same, if its manifest holds everything that a page shows.

    Raises:
        CheckpointError: if it does not.
    """
    manifest = checkpoint.manifest
    try:
        for part, keys in (("sites", ("map", "exactness")), ("plan", ("relative_change", "operations"))):
            for row in dict(manifest.get(part) or {}).values():
                _ = [row[key] for key in keys]
        _ = [Site.parse(site) for site in manifest.get("sites") or {}]
        _ = [TensorCertificate(**row) for row in ((manifest.get("certificate") or {"tensors": {}})["tensors"]).values()]
        _ = dict(manifest.get("edit") or {}), dict((manifest.get("base") or {"files": {}})["files"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"its {MANIFEST} is not one of an export: {error!r}") from error
    return checkpoint


def _faults(record: StepRecord, table: Mapping[str, Any], order: Sequence[int], home: Path) -> Iterator[str]:
    """What no longer holds of a step; `order` lists the numbers of the steps as they were last carried out."""
    step = f"Step {record.number}, {record.verb}"
    if dict(record.table) != dict(table):
        yield f"{step}: the file asks for something else now than what was carried out: {_changes(record.table, table)}."
    later = [number for number in order[order.index(record.number) + 1 :] if number < record.number]
    if later:
        yield f"{step} was carried out before step {later[0]} was last carried out: it speaks of what was there then."
    if record.out is not None and record.done:
        yield from (
            f"{step}: {change}." for change in _file_changes(record.out, record.files, file_hashes(home / record.out))
        )
    for name, digest in record.inputs.items():
        path = home / name
        if not path.is_file() or file_hash(path) != digest:
            yield f"{step}: its input {name} is {'not the one it read' if path.is_file() else 'gone'}."


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The options that differ."""
    keys = [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]
    return ", ".join(f"{key} was {before.get(key, 'not given')}, is {now.get(key, 'not given')}" for key in keys)


def _file_changes(out: str, before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    if before and not now:
        return [f"{out} is gone"]
    changes = {
        "changed since the run, its sha256 is another": [n for n in before if n in now and now[n] != before[n]],
        "gone": [name for name in before if name not in now],
        "new since the run": [name for name in now if name not in before],
    }
    return [f"{', '.join(str(Path(out) / n) for n in names)}: {text}" for text, names in changes.items() if names]
