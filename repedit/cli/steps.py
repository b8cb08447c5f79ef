"""A run written down: verbs of the command line with their options, in order, in one TOML file, taken up where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from repedit import __version__
from repedit.errors import ArgumentError, DataError, NotFound, TargetExists, check_names
from repedit.io.files import file_hashes
from repedit.io.text import JsonLines, read_toml

UNSUITED = ("run", "reproduce", "demo", "fetch", "chat", "tasks", "push", "vision demo")
"""Verbs that are no step of a run."""


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
        return Path(self.options["out"]) if self.options.get("out") else None

    def moved(self, place: Path, outs: Sequence[Path]) -> Step:
        """The same step elsewhere: what it and earlier steps write is there, everything else where it was."""

        def there(value: Any) -> Any:
            if isinstance(value, list):
                return [there(item) for item in value]
            if not isinstance(value, str):
                return value
            if _written(value, outs):
                return str(place / value)
            return str(Path(value).absolute()) if Path(value).exists() else value

        return replace(self, options={key: there(value) for key, value in self.options.items()})

    def arguments(self, command: Any, overwrite: bool) -> list[str]:
        """The words that follow the verb on the command line."""
        given = dict(self.options) | ({"overwrite": True} if overwrite and _has(command, "overwrite") else {})
        words: list[str] = []
        for parameter in command.params:
            name = str(parameter.name)
            if name not in given or given[name] is None:
                continue
            values = given[name] if isinstance(given[name], list) else [given[name]]
            if parameter.param_type_name == "argument":
                words += map(str, values)
            elif parameter.is_flag:
                flags = parameter.opts if given[name] else parameter.secondary_opts
                words += flags[:1]
            else:
                words += [word for value in values for word in (parameter.opts[0], str(value))]
        return words


def read(path: Path, commands: Mapping[str, Any]) -> list[Step]:
    """The steps of a file: `model`, for every verb that takes one, and a list of [[step]] tables with a `verb` each.

    Raises:
        NotFound, DataError: if the file is absent, is no TOML or holds something else.
        UnknownName: naming what no verb or no option is called.
        ArgumentError: if an option that a verb needs is missing, or two steps write the same place.
    """
    if not path.is_file():
        raise NotFound(f"{path.absolute()} is not a file; give a TOML file with [[step]] tables")
    found = read_toml(path)
    steps, model = found.pop("step", None), found.pop("model", None)
    check_names(str(path), found, ("model", "step"), "key")
    if not isinstance(steps, list) or not steps or not all(isinstance(s, dict) and "verb" in s for s in steps):
        raise DataError(f"{path} holds no [[step]] tables with a verb; a run is a list of them")
    made: list[Step] = []
    for number, table in enumerate(steps, 1):
        made.append(_step(number, dict(table), model, commands, made, path.parent))
    outs = [str(step.out) for step in made if step.out is not None]
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
    outs = [step.out for step in before if step.out is not None]
    given = [word for key, value in sorted(table.items()) if key != "out" for word in _words(value)]
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
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.is_file() and not p.name.startswith(".")]
        return " ".join(f"{p.relative_to(path)} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files)
    return tree_hash(path) if path.is_file() else None


def _has(command: Any, name: str) -> bool:
    return any(p.name == name for p in command.params)


class Log:
    """What is finished of a run: a line of JSON a step, in a file beside it."""

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path.with_suffix(".done.jsonl"))

    def code(self, step: Step) -> int | None:
        """The exit code of a step that is done and whose output is as it was left; None of one to do."""
        row = self._row(step)
        if row is None or (step.out is not None and row["output"] != tree_hash(step.out)):
            return None
        return int(row["code"])

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

    def ours(self, step: Step) -> bool:
        """Whether what stands where a step writes was left there by an earlier one of this file, and not changed since.

        Raises:
            TargetExists: if something else stands there.
        """
        if step.out is None or not step.out.exists():
            return False
        rows = [r for r in self._lines.rows if r["out"] == str(step.out)]
        if not rows or rows[-1]["output"] != tree_hash(step.out):
            raise TargetExists(
                f"step {step.number}, {step.verb}: {step.out} exists and is not what an earlier run of this file left there; "
                "move it away, or give another out"
            )
        return True

    def enter(self, step: Step, code: int) -> None:
        """A step is done."""
        out = None if step.out is None else str(step.out)
        row = {"step": step.number, "verb": step.verb, "key": step.key, "code": code, "out": out}
        row["output"] = None if step.out is None else tree_hash(step.out)
        self._lines.add(row)

    def _row(self, step: Step) -> dict[str, Any] | None:
        return next((row for row in reversed(self._lines.rows) if row["key"] == step.key), None)


def tree_hash(path: Path) -> str | None:
    """sha256 over the names and bytes of a file or of every file of a directory; None where there is nothing."""
    if not path.exists():
        return None
    digest = hashlib.sha256()
    for name, found in file_hashes(path).items():
        digest.update(f"{name or '.'} ".encode() + bytes.fromhex(found))
    return digest.hexdigest()
