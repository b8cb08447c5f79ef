"""Structured damage: JSON values, texts and files that are almost right, for the fuzz of every door."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("REPEDIT_FUZZ_EXAMPLES", "30"))
"""Examples a door: `make fuzz` asks for 2,000."""
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES < 1000,
    database=None,
    suppress_health_check=list(HealthCheck),
)


class Raw(str):
    """A piece of JSON text that is written as it is."""


class Pairs(list[tuple[str, Any]]):
    """An object whose keys may repeat."""


DEEP = 150
VALUES: list[Any] = [
    None, True, -1, 0, 1, 3, 2**63, 2**70, 1.5, "", "x", "é\u2028", [], {}, ["a"], {"a": 1}, [[1]], [0, 4], "F64",
    *map(Raw, (
        "NaN", "-Infinity", "1e999", "-0", "1.0", "7" * 5000, '"\\ud800"', '"\\udc00\\ud83d"', '"\\ud83d\\ude00"', '"\\u0000"',
        "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "[" * 100_000 + "]" * 100_000,
    )),
]  # fmt: skip
"""What takes the place of a value."""


def emitted(value: Any) -> str:
    """A damaged value as JSON text."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict | Pairs):
        pairs = value.items() if isinstance(value, dict) else value
        return "{" + ", ".join(f"{json.dumps(str(k))}: {emitted(v)}" for k, v in pairs) + "}"
    return "[" + ", ".join(map(emitted, value)) + "]" if isinstance(value, list) else json.dumps(value)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a value, and of itself."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, child in inner for path in places(child, (*at, key)))]


def changed(value: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """The value with another one at a path."""
    if not path:
        return change(value)
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(copy[path[0]], path[1:], change)
    return copy


def without(container: Any, key: Any) -> Any:
    if isinstance(container, dict):
        return {k: v for k, v in container.items() if k != key}
    return [v for i, v in enumerate(container) if i != key]


def repeated(container: Any, key: Any) -> Any:
    """The value of a key a second time, somewhat changed."""
    if isinstance(container, dict):
        return Pairs([*container.items(), (key, container[key])])
    return [*container, container[key]]


@st.composite
def tables(draw: Callable[..., Any], value: Any, values: list[Any] = VALUES) -> str:
    """JSON text of a value in which something was replaced, left out, repeated or added."""
    for _ in range(draw(st.integers(0, 2))):
        path = draw(st.sampled_from(places(value)))
        kind = draw(st.sampled_from(("replace", "replace", "remove", "repeat", "add")))
        new = draw(st.sampled_from([*values, *_siblings(value, path)]))
        if kind == "replace" or not path:
            value = changed(value, path, lambda _, new=new: new)
        elif kind == "add":
            extra = draw(st.sampled_from(("x", "", "a/b", "0.mlp.out", "__metadata__", "\u202e")))
            value = changed(value, path[:-1], lambda c, n=new, e=extra: {**c, e: n} if isinstance(c, dict) else [*c, n])
        else:
            damage = without if kind == "remove" else repeated
            value = changed(value, path[:-1], lambda c, k=path[-1], f=damage: f(c, k))
            if kind == "repeat":
                return emitted(value)  # the keys of Pairs have no paths
    return emitted(value)


def _siblings(value: Any, path: tuple[Any, ...]) -> list[Any]:
    """The values beside a place: what belongs to another is the best of wrong values."""
    if not path:
        return []
    for key in path[:-1]:
        value = value[key]
    return list(value.values()) if isinstance(value, dict) else list(value)


@st.composite
def damaged_bytes(draw: Callable[..., Any], text: str) -> bytes:
    """A text as a file that may be cut, changed, padded or encoded otherwise."""
    data = text.encode(errors="surrogatepass")
    kind = draw(st.sampled_from(("none",) * 6 + ("cut", "change", "insert", "mark", "utf-16", "latin", "lines")))
    at = draw(st.integers(0, max(0, len(data) - 1)))
    byte = bytes([draw(st.integers(0, 255))])
    return {
        "none": data, "cut": data[:at], "change": data[:at] + byte + data[at + 1 :], "insert": data[:at] + byte + data[at:],
        "mark": b"\xef\xbb\xbf" + data, "utf-16": text.encode("utf-16", "surrogatepass"), "latin": data + b"\xe9",
        "lines": data + b"\n\n" + byte,
    }[kind]  # fmt: skip


def strictly_read(data: bytes) -> Any:
    """The value of a JSON text that a door has taken; fails if the door should not have."""
    text = data.decode().removeprefix("\ufeff")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len({key for key, _ in pairs}) == len(pairs), "a key is given twice"
        return dict(pairs)

    value = json.loads(text, object_pairs_hook=once)
    level, depth = [value], 0
    while level := [
        child
        for item in level
        for child in (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
    ]:
        depth += 1
        assert not any(isinstance(item, float) and not math.isfinite(item) for item in level), "a number is not finite"
    assert depth <= 100, "the value is nested deeply"
    json.dumps(value, ensure_ascii=False).encode()
    return value
