"""A run written down: verbs of the command line with their options, in order, in one TOML file, taken up where it stopped."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from repedit import __version__
from repedit.errors import ArgumentError, DataError, NotFound, TargetExists, check_names
from repedit.io.files import exists, file_hashes, is_file, is_folder
from repedit.io.text import JsonLines, read_toml

UNSUITED = ("run", "reproduce", "demo", "fetch", "chat", "tasks", "push", "vision demo")
"""Verbs that are no step of a run."""
WRITTEN = ("out", "resume", "log")
"""Options that name what a verb writes; everything else that names a file is read."""
ASIDE = ".replaced"
"""What an earlier output is called in the folder of the step that replaces it."""
CONTINUED = ("audit",)
"""Verbs that go on in the folder that an earlier, unfinished one left."""


@dataclass(frozen=True)
class Step:
    """One verb with its options."""

    number: int
    verb: str
    options: Mapping[str, Any]
    key: str
    """What it does and everything before it, as a hash."""

    @property
    def out(self) -> Path | None:
        """What it writes, relative to the file of the run."""
        return Path(self.options["out"]) if "out" in self.options else None

    @property
    def written(self) -> list[Path]:
        """Everything that it writes: its output, the file it goes on from, its log."""
        return [Path(self.options[name]) for name in WRITTEN if name in self.options]

    @property
    def place(self) -> Path:
        """The folder of its own, beside its target, in which its output is made; the key in its name says whose it is."""
        out = Path(self.options["out"])
        return out.parent / f".{out.name}.step-{self.key[:16]}"

    @property
    def staged(self) -> Path | None:
        """Where its output stands until it is whole and entered."""
        return None if self.out is None else self.place / self.out.name

    def moved(self, place: Path, outs: Sequence[Path]) -> Step:
        """The same step elsewhere: what it and earlier steps write is there, everything else where it was."""

        def there(value: Any) -> Any:
            if isinstance(value, list):
                return [there(item) for item in value]
            if not isinstance(value, str):
                return value
            if _written(value, outs):
                return str(place / value)
            return str(Path(value).absolute()) if exists(value) else value

        return replace(self, options={key: there(value) for key, value in self.options.items()})

    def arguments(self, command: Any) -> list[str]:
        """The words that follow the verb on the command line; a value is never read as an option, whatever it begins with."""
        arguments: list[str] = []
        words: list[str] = []
        for parameter in command.params:
            value = self.options.get(str(parameter.name))
            values = value if isinstance(value, list) else [] if value is None else [value]
            if parameter.param_type_name == "argument":
                arguments += map(str, values)
            elif parameter.is_flag:
                words += [
                    flag for value in values for flag in (parameter.opts if value else parameter.secondary_opts)[:1]
                ]
            else:
                pairs = ((parameter.opts[0], str(value)) for value in values)
                words += [
                    word for name, text in pairs for word in ([f"{name}={text}"] if text[:1] == "-" else [name, text])
                ]
        if any(text.startswith("-") for text in arguments):
            return [*words, "--", *arguments]
        return [*arguments, *words]


def read(path: Path, commands: Mapping[str, Any]) -> list[Step]:
    """The steps of a file: `model`, for every verb that takes one, and a list of [[step]] tables with a `verb` each.

    Raises:
        NotFound, DataError: if the file is absent, is no TOML or holds something else.
        UnknownName: naming what no verb or no option is called.
        ArgumentError: if an option that a verb needs is missing, or two steps write the same place.
    """
    if not is_file(path):
        raise NotFound(f"{path.absolute()} is not a file; give a TOML file with [[step]] tables")
    found = read_toml(path)
    steps, model = found.pop("step", None), found.pop("model", None)
    check_names(str(path), found, ("model", "step"), "key")
    if not isinstance(steps, list) or not steps or not all(isinstance(s, dict) and "verb" in s for s in steps):
        raise DataError(f"{path} holds no [[step]] tables with a verb; a run is a list of them")
    made: list[Step] = []
    for number, table in enumerate(steps, 1):
        made.append(_step(number, dict(table), model, commands, made, path.parent))
    outs = [str(out) for step in made for out in step.written]
    twice = sorted({out for out in outs if outs.count(out) > 1})
    if twice:
        raise ArgumentError(f"several steps write {twice[0]}; give each its own out")
    return made


def _step(
    number: int,
    table: dict[str, Any],
    model: Any,
    commands: Mapping[str, Any],
    before: Sequence[Step],
    place: Path,
) -> Step:
    verb = str(table.pop("verb"))
    check_names(f"step {number}: a run", [verb], [name for name in commands if name not in UNSUITED], "verb")
    names = {called: str(p.name) for p in commands[verb].params for called in _called(p)}
    check_names(f"step {number}, {verb},", table, names)
    table = {names[key]: value for key, value in table.items()}
    if model is not None and "model" in names.values():
        table.setdefault("model", model)
    missing = [str(p.name) for p in commands[verb].params if p.required and p.name not in table]
    if missing:
        raise ArgumentError(f"step {number}, {verb}, needs {', '.join(missing)}")
    for name in WRITTEN:
        if name in table and not (isinstance(table[name], str) and Path(table[name]).name):
            raise ArgumentError(f"step {number}, {verb}: {name} = {table[name]!r}; give the path of a file or folder")
    outs = [out for step in before for out in step.written]
    given = [word for key, value in sorted(table.items()) if key not in WRITTEN for word in _words(value)]
    inputs = [_input(place / word) for word in given if not _written(word, outs)]
    start = before[-1].key if before else __version__
    text = json.dumps([start, verb, table, inputs], sort_keys=True, default=str)
    return Step(number, verb, table, hashlib.sha256(text.encode()).hexdigest())


def _called(parameter: Any) -> list[str]:
    """What a parameter is called in a file: as on the command line, with _ for -."""
    if parameter.param_type_name == "argument":
        return [str(parameter.name)]
    return [name.removeprefix("--").replace("-", "_") for name in parameter.opts if name.startswith("--")]


def _words(value: Any) -> Iterator[str]:
    """The words of an option's value: of an option that may be repeated, all of them."""
    yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str))


def _written(value: str, outs: Sequence[Path]) -> bool:
    """Whether a word names something that an earlier step writes."""
    return any(Path(value).is_relative_to(out) for out in outs)


def _input(path: Path) -> str | None:
    """What tells a file that is read from another: its hash; of a directory, such as a model, names, sizes and times."""
    if is_folder(path):
        files = [p for p in sorted(path.rglob("*")) if p.is_file() and not p.name.startswith(".")]
        return " ".join(f"{p.relative_to(path)} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files)
    return tree_hash(path) if is_file(path) else None


class Log:
    """What is finished of a run: a line of JSON a step, in a file beside it.

    A step makes its output in a folder of its own. Once it is whole its hash is entered, and then it is moved to its target:
    whenever the run is killed, what is in the folder is ours, and what stands at the target is an earlier output or foreign.
    """

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path.with_suffix(".done.jsonl"))

    def code(self, step: Step, since: int = -1) -> int | None:
        """The exit code of a step that is done and whose output is as it was left, or waits to be moved; None of one to do.

        Args:
            since: the line of the step before; one that was done before that line is to do again.
        """
        row = self._row(step)
        if row is None or self.line(step) < since:
            return None
        if (
            step.out is not None
            and step.staged is not None
            and row["output"] not in map(tree_hash, (step.out, step.staged))
        ):
            return None
        return int(row["code"])

    def line(self, step: Step) -> int:
        """The line of a step that is done, from 0; -1 of one to do."""
        row = self._row(step)
        return -1 if row is None else next(n for n, other in enumerate(self._lines.rows) if other is row)

    def begin(self, step: Step) -> Step:
        """The step with its output in its own folder, which is empty now but for what an unfinished audit goes on from.

        Raises:
            TargetExists: if something stands at its target that no step of this file left there.
        """
        if step.out is None or step.staged is None:
            return step
        self._check_ours(step)
        step.place.mkdir(parents=True, exist_ok=True)
        if step.verb not in CONTINUED:
            _remove(step.staged)
        elif step.out.exists() and not step.staged.exists():
            shutil.copytree(step.out, step.staged)
        for old in step.out.parent.glob(f".{glob.escape(step.out.name)}.step-*"):
            if old != step.place:
                _clear(old, step.out.name)
        return replace(step, options={**step.options, "out": str(step.staged)})

    def settle(self, step: Step) -> None:
        """Move the output of a step that is entered to its target, if it is not there yet, and remove its folder.

        Raises:
            TargetExists: if something stands there that no step of this file left; the output is kept in the folder.
        """
        row = self._row(step)
        if step.out is None or step.staged is None or row is None or not step.place.exists():
            return
        if row["output"] is not None and tree_hash(step.staged) == row["output"] != tree_hash(step.out):
            self._check_ours(step)
            if step.out.exists():
                step.out.rename(step.place / ASIDE)
            step.staged.rename(step.out)
        _clear(step.place, step.out.name)

    def output(self, step: Step) -> str:
        """The hash of what a step wrote.

        Raises:
            ArgumentError: if it is not done.
        """
        row = self._row(step)
        if row is None:
            raise ArgumentError(
                f"step {step.number}, {step.verb}, was not run, or it or something before it changed; run it first"
            )
        return str(row["output"])

    def enter(self, step: Step, code: int) -> None:
        """A step is done, and its output is whole in its folder."""
        out = None if step.out is None else str(step.out)
        row = {"step": step.number, "verb": step.verb, "key": step.key, "code": code, "out": out}
        row["output"] = None if step.staged is None else tree_hash(step.staged)
        self._lines.add(row)

    def _check_ours(self, step: Step) -> None:
        if step.out is None or not os.path.lexists(step.out):
            return
        left = {row["output"] for row in self._lines.rows if row["out"] == str(step.out)}
        if step.out.is_symlink() or tree_hash(step.out) not in left:
            kept = (
                f"; what the step made is in {step.staged}" if step.staged is not None and step.staged.exists() else ""
            )
            raise TargetExists(
                f"step {step.number}, {step.verb}: {step.out} exists and is not what an earlier run of this file left there; "
                f"move it away, or give another out{kept}"
            )

    def _row(self, step: Step) -> dict[str, Any] | None:
        return next((row for row in reversed(self._lines.rows) if row["key"] == step.key), None)


def _clear(place: Path, name: str) -> None:
    """Remove the folder of a step; what else it holds, such as a result that was kept after an error, stays."""
    for part in (name, ASIDE):
        _remove(place / part)
    with contextlib.suppress(OSError):  # it holds something else
        place.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def tree_hash(path: Path) -> str | None:
    """sha256 over the names and bytes of a file or of every file of a directory; None where there is nothing."""
    if not path.exists():
        return None
    digest = hashlib.sha256()
    for name, found in file_hashes(path).items():
        digest.update(f"{name or '.'} ".encode() + bytes.fromhex(found))
    return digest.hexdigest()
