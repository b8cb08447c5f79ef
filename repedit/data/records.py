"""Facts read from a file: one JSON object a line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repedit.data.domains import Fact
from repedit.errors import DataError
from repedit.io.text import json_rows

# Other names that published data sets give to the same fields.
_ALIASES = {"question": "prompt", "input": "prompt", "output": "answer"}


def recorded(path: Path) -> tuple[tuple[Fact, ...], tuple[Fact, ...]]:
    """The facts of a file, (forget, retain): rows with `"role": "retain"` are to retain, all others to forget.

    `question` and `input` are read as `prompt`, `output` as `answer`; an integer `answer` is an index into `choices`.
    Without an `id` a row has the file's name and its number, without an `entity` it is its own.

    Raises:
        DataError: if the file cannot be read; with the row, the id, the field and what was found.
    """
    sides: dict[str, list[Fact]] = {"forget": [], "retain": []}
    for number, row in json_rows(path):
        try:
            role, fact = _fact(row, path.stem, number)
        except DataError as error:
            raise DataError(f"{path}, row {number}: {error}") from error
        sides[role].append(fact)
    return tuple(sides["forget"]), tuple(sides["retain"])


def _fact(row: Mapping[str, Any], stem: str, number: int) -> tuple[str, Fact]:
    found: dict[str, Any] = {_ALIASES.get(key, key): v for key, v in row.items() if v is not None}
    name = str(found.get("id", f"{stem}/{number}"))
    role = found.get("role", "forget")
    if role not in ("forget", "retain"):
        raise DataError(f"fact {name!r}: the field 'role' is {role!r}; give 'forget' or 'retain'")
    translations = found.get("translations", {})
    if not isinstance(translations, dict) or not all(isinstance(text, str) for text in translations.values()):
        raise DataError(
            f"fact {name!r}: the field 'translations' must map languages to prompts; found {translations!r}"
        )
    choices = _texts(found, "choices", name)
    fact = Fact(
        id=name,
        prompt=_text(found, "prompt", name),
        answer=_text(found | {"answer": _chosen(found.get("answer"), choices, name)}, "answer", name),
        entity=_text(found, "entity", name, name),
        domain=_text(found, "domain", name, stem),
        choices=choices,
        paraphrases=_texts(found, "paraphrases", name),
        translations=translations,
        alternative=_text(found, "alternative", name) if "alternative" in found else None,
        split=_text(found, "split", name) if "split" in found else None,
    )
    return role, fact


def _text(found: Mapping[str, Any], field: str, name: str, default: str | None = None) -> str:
    value = found.get(field, default)
    if not isinstance(value, str):
        what = f"found {value!r}" if value is not None else f"it is missing; found {sorted(found)}"
        raise DataError(f"fact {name!r}: the field {field!r} must be a text; {what}")
    return value


def _texts(found: Mapping[str, Any], field: str, name: str) -> tuple[str, ...]:
    value = found.get(field, ())
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise DataError(f"fact {name!r}: the field {field!r} must be a list of texts; found {value!r}")
    return tuple(value)


def _chosen(answer: Any, choices: tuple[str, ...], name: str) -> Any:
    """The answer, read as an index where it is an integer and there are choices."""
    if not isinstance(answer, int) or isinstance(answer, bool) or not choices:
        return answer
    if not 0 <= answer < len(choices):
        raise DataError(f"fact {name!r}: the answer {answer} is no index into {len(choices)} choices")
    return choices[answer]
