"""A report without the texts of its facts, for readers who must not see them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from repedit.attacks.attack import Finding
from repedit.attacks.judging.evidence import Report

HIDDEN_TEXT = "(withheld)"


def withheld(report: Report) -> Report:
    """The same report with no text of a fact: no examples, digests for ids, and no words in details and diagnostics.

    A digest is the first 16 digits of sha256 of the id: two reports without texts can still be told to be over the same
    facts. Who knows the ids can find them again. Words that a summary needs, such as the kind of a probe, go as well,
    since what an attack wrote there cannot be known here.
    """
    names = {item: digest(item) for found in report.findings.values() for f in found for item in f.items}
    if "withheld" in report.context:
        return report
    return replace(
        report,
        findings={role: tuple(_finding(f, names) for f in found) for role, found in report.findings.items()},
        examples=(),
        diagnostics=_wordless(report.diagnostics, names),
        context={**report.context, "withheld": len(report.examples)},
    )


def digest(item: str) -> str:
    """What stands for the id of a fact."""
    return hashlib.sha256(item.encode()).hexdigest()[:16]


def _finding(found: Finding, names: Mapping[str, str]) -> Finding:
    return replace(found, items=tuple(names[item] for item in found.items), details=_wordless(found.details, names))


def _wordless(value: Any, names: Mapping[str, str]) -> Any:
    """The value with every text replaced; keys stay unless they are ids."""
    if isinstance(value, Mapping):
        return {names.get(str(k), str(k)): _wordless(v, names) for k, v in value.items()}
    if isinstance(value, str):
        return HIDDEN_TEXT
    return [_wordless(v, names) for v in value] if isinstance(value, Sequence) else value
