"""Text files: UTF-8, JSON, JSON Lines, TOML and YAML, each with one reader.

Text is refused if it is not Unicode. JSON is refused if it is nested deeper than 100 levels, gives a key twice, or holds a
number that is not finite. Every message names the file and, if it has one, the line.
"""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from repedit.errors import ArgumentError, CheckpointError, DataError, RepeditError, plain_scalar
from repedit.io.files import append_line, read_bytes

DEPTH = 100
"""Deepest nesting that is read."""
DIGITS = 300
"""Digits of the longest integer that is read; longer ones do not fit a float64."""
_SURROGATE = "holds half of a surrogate pair ({!a}), which is not a character; was a text cut within an emoji? Mend it"
# A pair of escaped surrogates, or a surrogate without its partner, or any other escape.
_ESCAPE = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(?P<lone>u[dD][89a-fA-F]..)|.)", re.DOTALL)


def read_text(path: str | Path, error: type[RepeditError] = DataError) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        RepeditError: of the type `error`, if it cannot be read or is not UTF-8.
    """
    return _decoded(path, read_bytes(path, error), error).removeprefix("\ufeff")


def parse_json(text: str, where: str, error: type[RepeditError] = DataError, *, finite: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        where: named in messages: the file, and the line if the text is one line of it.
        finite: refuse NaN and infinity, which JSON does not have.
    Raises:
        RepeditError: of the type `error`.
    """
    lone = _lone_surrogate(text)
    if lone is not None:
        raise error(f"{where}{_line(text, lone)} {_SURROGATE.format(text[lone : lone + 6])}")
    try:
        value = json.loads(
            text,
            parse_constant=_refused if finite else None,
            parse_float=_finite if finite else None,
            parse_int=_integer,
            object_pairs_hook=_unique,
        )
        _check_depth(text, value)
    except RecursionError as reason:
        raise error(f"{where} is nested deeper than {DEPTH} levels") from reason
    except ValueError as reason:
        raise error(f"{where}: not JSON: {reason}") from reason
    return value


def read_json(
    path: str | Path,
    error: type[RepeditError] = CheckpointError,
    *,
    finite: bool = True,
    remedy: str = "download it again",
) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        RepeditError: of the type `error`, if the file is absent, cannot be read as JSON or holds something else.
    """
    text = _decoded(path, read_bytes(path, error), error)
    try:
        value = parse_json(text, str(path), error, finite=finite)
    except error as reason:
        raise error(f"{path} cannot be read as JSON: {str(reason).removeprefix(f'{path}: ')}; {remedy}") from reason
    if not isinstance(value, dict):
        raise error(f"{path} holds a JSON {type(value).__name__}, an object was expected; {remedy}")
    return value


def json_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line of a JSON Lines file that is not blank.

    Raises:
        DataError: with the first line that is not a JSON object.
    """
    # Not splitlines: a JSON string may hold U+2028 and the like unescaped.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip(" \t\r"):  # JSON has no other white space
            where = f"{path}, row {number}"
            try:
                row = parse_json(line, where)
            except DataError as reason:
                raise DataError(f"{reason}; one object a line is expected") from reason
            if not isinstance(row, dict):
                raise DataError(f"{where}: found a {type(row).__name__}; one object a line is expected")
            yield number, row


def read_toml(path: str | Path) -> dict[str, Any]:
    """The table in a TOML file.

    Raises:
        DataError: if the file cannot be read as TOML, or holds a number that is not finite.
    """
    return parse_toml(read_text(path), str(path))


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """The table of a TOML text."""
    try:
        table = tomllib.loads(text, parse_float=_finite)
        _check_depth(text, table)
    except RecursionError as reason:
        raise DataError(f"{where} is nested deeper than {DEPTH} levels") from reason
    except ValueError as reason:
        raise DataError(f"{where} is no readable TOML file: {reason}") from reason
    return table


def parse_yaml(text: str) -> Any:
    """The value of a YAML text whose scalars are all texts ("no" is a language); None if it is not YAML."""
    import yaml

    try:
        return yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None


def check_text(text: object, where: str) -> None:
    """Refuse what is no Unicode text: another type, or a text with half of a surrogate pair or a null character.

    Raises:
        DataError: with `where`.
    """
    if not isinstance(text, str):
        raise DataError(f"{where} is a {type(text).__name__}; a text was expected")
    try:
        text.encode()
    except UnicodeEncodeError as reason:
        raise DataError(f"{where} {_SURROGATE.format(text[reason.start : reason.start + 1])}") from reason
    if "\0" in text:
        raise DataError(f"{where} holds a null character at place {text.index(chr(0))}; take it out")


def check_fields(row: object, types: Mapping[str, Any], where: str) -> None:
    """Refuse anything but a JSON object of exactly these fields, each of its type; true and false are not numbers.

    Raises:
        CheckpointError: naming the field.
    """
    if not isinstance(row, Mapping) or set(row) != set(types):
        content = sorted(row) if isinstance(row, Mapping) else f"a {type(row).__name__}"
        raise CheckpointError(f"{where} must hold {', '.join(types)}; found {content!s:.200}")
    for name, kind in types.items():
        if not _is_of(row[name], kind):
            raise CheckpointError(f"{where}: {name} is {row[name]!r:.50}")


def json_copy(value: object, what: str) -> Any:
    """A copy of a value after a round trip through JSON: tuples become lists, keys become texts.

    Raises:
        ArgumentError: if the value holds anything that JSON cannot.
    """
    try:
        return json.loads(json.dumps(value, default=_of_numpy))
    except (TypeError, ValueError, RecursionError) as reason:
        raise ArgumentError(f"{what} must hold plain JSON values: {reason}") from reason


def _of_numpy(value: object) -> Any:
    plain = plain_scalar(value)
    if plain is value:
        raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")
    return plain


class JsonLines:
    """The rows of a file of JSON lines that are appended one at a time; an incomplete last line does not count."""

    def __init__(self, path: Path) -> None:
        """Read the rows.

        Raises:
            CheckpointError: if a complete line is not a JSON object, with its number.
        """
        self.path = path
        self.rows: list[dict[str, Any]] = []
        data = read_bytes(path) if os.path.lexists(path) else b""
        for number, line in enumerate(
            _decoded(path, data[: data.rfind(b"\n") + 1], CheckpointError).split("\n")[:-1], 1
        ):
            row = parse_json(line, f"{path}, line {number}", CheckpointError, finite=False)
            if not isinstance(row, dict):
                raise CheckpointError(f"{path}, line {number}: found a {type(row).__name__}, an object was expected")
            self.rows.append(row)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row, which is on the disk when this returns."""
        self.rows.append(dict(row))
        append_line(self.path, row)


def _decoded(path: str | Path, data: bytes, error: type[RepeditError]) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as reason:
        line = data.count(b"\n", 0, reason.start) + 1
        raise error(f"{path} is not UTF-8: line {line}: {reason}; convert it first") from reason


def _lone_surrogate(text: str) -> int | None:
    """The position of half of a surrogate pair, escaped or not; None if there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as reason:
        return reason.start
    if "\\ud" not in text and "\\uD" not in text:
        return None
    return next((match.start() for match in _ESCAPE.finditer(text) if match["lone"]), None)


def _line(text: str, place: int) -> str:
    """The line of a position, if the text has several lines."""
    return f", line {text.count(chr(10), 0, place) + 1}" if "\n" in text.strip() else ""


def _is_of(value: object, kind: object) -> bool:
    """Whether a JSON value is of a type such as str, int | float, list[int] or dict[str, str]."""
    parts, origin = get_args(kind), get_origin(kind)
    if isinstance(kind, UnionType):
        return any(_is_of(value, part) for part in parts)
    if parts:
        items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
        return isinstance(origin, type) and isinstance(value, origin) and all(_is_of(item, parts[-1]) for item in items)
    return isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _check_depth(text: str, value: object) -> None:
    if text.count("[") + text.count("{") + text.count(".") <= DEPTH:
        return  # too few brackets and dotted keys
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEPTH):
        inner = (child for item in level for child in (item.values() if isinstance(item, dict) else item))
        level = [child for child in inner if isinstance(child, dict | list)]
        if not level:
            return
    raise RecursionError


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is given twice")
    return table


def _refused(name: str) -> float:
    raise ValueError(f"the number {name} is not finite")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refused(text)


def _integer(text: str) -> int | float:
    if text == "-0":  # JSON has a negative zero and Python's integers have none
        return -0.0
    if len(text) > DIGITS:
        raise ValueError(f"an integer of {len(text)} digits is longer than {DIGITS}")
    return int(text)
