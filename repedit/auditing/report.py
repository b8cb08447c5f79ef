"""What an audit concludes: recoveries, the retain check, the verdict, and the report of all of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from repedit.arguments import checked
from repedit.auditing.attack import Finding
from repedit.errors import CheckpointError
from repedit.io.files import is_folder, make_folder, user_path, write_text
from repedit.io.text import check_fields, parse_json, read_text
from repedit.outcomes import EXIT_CODES

SCHEMA, READABLE = 2, (1, 2)
"""The version that is written, and those that are read; version 1 knew complete audits only."""
COMPLETE, ENDED_EARLY, INTERRUPTED = "complete", "ended early", "interrupted"
STATES = (COMPLETE, ENDED_EARLY, INTERRUPTED)
RETAIN_CHECK = "retain"
"""The name under which the findings of the retain check are stored."""


@dataclass(frozen=True)
class Recovery:
    """How much of the forgotten an attack brings back.

    R = (A - B) / (C - B) with A, C, B the accuracies on V of edited, original and floor, each after the same attack:
    0 is a model that never knew, 1 the original. Not clipped.
    """

    attack: str
    status: str
    reason: str = ""
    value: float = float("nan")
    interval: tuple[float, float] = (float("nan"), float("nan"))
    """Bootstrap percentiles of this attack alone."""
    bound: tuple[float, float] = (float("nan"), float("nan"))
    """Simultaneous over all deciding attacks."""
    edited: float = float("nan")
    original: float = float("nan")
    floor: float = float("nan")
    floor_name: str = ""
    """Where the floor comes from: "reference", "fresh facts" or the name of a heuristic."""
    settings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The settings chosen, by role; one a half of V."""
    level: str = ""
    decides: bool = True

    @property
    def ratio(self) -> float:
        """A / C, the recovery rate papers print; guessing is not taken out of it."""
        return self.edited / self.original if self.original else float("nan")


FORGET, RETAIN, TEST, AUC, RELEARNING = (
    "forget accuracy", "retain accuracy", "test accuracy", "AUC of the loss", "relearn",
)  # fmt: skip
ROUNDED = "forget accuracy, {}"
"""What the gaps of a classifier are measured in; the last for each scheme of rounding."""


@dataclass(frozen=True)
class Gap:
    """One measure of a classifier beside the same measure of models that were retrained without the forget images.

    The gap is edited - reference, and two-sided: 0 is a model that never saw the images, and below 0 is no better.
    """

    measure: str
    edited: float
    original: float
    reference: float = float("nan")
    """Median over the retrained models: one of them may have trained badly."""
    value: float = float("nan")
    """edited - reference."""
    interval: tuple[float, float] = (float("nan"), float("nan"))
    """Bootstrap percentiles of the gap; the same rows are drawn for all models."""
    spread: tuple[float, float] = (float("nan"), float("nan"))
    """Lowest and highest among the retrained models, where there are several."""
    error: float = float("nan")
    """Standard error of the edited value, by Hanley and McNeil for an AUC."""
    members: str = ""
    """What it is measured on, such as "120 forget images"."""
    others: str = ""
    """What members are told from; empty where nothing is."""
    decides: bool = True


@dataclass(frozen=True)
class RetainCheck:
    """What should have been kept, before and after; None where it was not given."""

    accuracy: tuple[float, float] | None = None
    """(original, edited) on the retain facts."""
    perplexity: tuple[float, float] | None = None
    """(original, edited) on the retain text."""
    facts: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Verdict:
    """An outcome, with the rule that gave it."""

    word: str
    """One of `repedit.outcomes.OUTCOMES`."""
    sentence: str
    """What has been shown, in one sentence that says at which budget."""
    rule: str
    """The rule, with its numbers."""
    settle: str = ""
    """What would settle an open question; empty where nothing is open."""

    @property
    def exit_code(self) -> int:
        """0 no recovery found; 3 hidden, not or over-forgotten; 4 inconclusive; 5 invalid or destroyed; 6 unsound."""
        return EXIT_CODES[self.word]


@dataclass(frozen=True, eq=False)
@checked
class Report:
    """Everything an audit did and found; the same seed gives the same report, except for its times."""

    verdict: Verdict
    recoveries: tuple[Recovery, ...]
    """One an attack, the strongest first; "direct" is among them."""
    retain: RetainCheck
    findings: Mapping[str, tuple[Finding, ...]]
    """By role: "edited", "original", "reference" or "fresh facts"."""
    not_run: Mapping[str, str]
    """Attacks of the budget that did not run, or count for nothing, with the reason; and what no budget tries."""
    heuristics: Mapping[str, float]
    """Accuracy on V of guesses that need no knowledge."""
    examples: tuple[Mapping[str, Any], ...] = ()
    """Facts that came back: id, prompt, answer, and what the models answered before and after the attack."""
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    """Shown, never deciding."""
    context: Mapping[str, Any] = field(default_factory=dict)
    """budget, seeds, n_test, recovery_threshold, pass_threshold, alpha, notes, versions, hashes, seconds, ..."""
    gaps: tuple[Gap, ...] = ()
    """Of a classifier: what decides there, in place of recoveries."""
    state: str = COMPLETE
    """"complete", "ended early" (no attack left out could change the verdict) or "interrupted" (the verdict is that of the
    attacks made); only a complete audit says how much all attacks bring back."""

    def __repr__(self) -> str:
        return f"Report({self.title}: {self.verdict.sentence})"

    @property
    def title(self) -> str:
        """The word of the verdict; an audit that is not complete says so."""
        return {
            ENDED_EARLY: f"{self.verdict.word} (ended early, the verdict being certain)",
            INTERRUPTED: f"PARTIAL AUDIT, interrupted: {self.verdict.word} so far",
        }.get(self.state, self.verdict.word)

    @property
    def direct(self) -> Recovery:
        """What the edited model knows when simply asked."""
        return next(r for r in self.recoveries if r.attack == "direct")

    @checked
    def finding(self, role: str, attack: str) -> Finding | None:
        """The finding of an attack on a model; None where it did not run."""
        return next((f for f in self.findings.get(role, ()) if f.attack == attack), None)

    def to_json(self) -> str:
        """The text of audit.json: sorted keys, NaN as null."""
        content = {
            "schema": SCHEMA, "state": self.state, "verdict": {**asdict(self.verdict), "exit_code": self.verdict.exit_code},
            "recoveries": [{**asdict(r), "ratio": r.ratio} for r in self.recoveries], "retain": asdict(self.retain),
            "findings": {role: [finding_json(f) for f in findings] for role, findings in self.findings.items()},
            "not_run": self.not_run, "heuristics": self.heuristics, "examples": self.examples,
            "diagnostics": self.diagnostics, "context": self.context, "gaps": [asdict(gap) for gap in self.gaps],
        }  # fmt: skip
        return json.dumps(_json_values(content), indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    @checked
    def from_json(cls, text: str) -> Report:
        """The report of a text that `to_json` made.

        Raises:
            CheckpointError: if it is not such a text.
        """
        try:
            content = parse_json(text, "the audit", CheckpointError)
            if content["schema"] not in READABLE:
                raise CheckpointError(f"the audit has schema {content['schema']}, this version reads {READABLE}")
            state = COMPLETE if content["schema"] == 1 else content["state"]
            if state not in STATES:
                raise ValueError(f"state {state!r}")
            _check_types(content)
            verdict = {k: v for k, v in content["verdict"].items() if k != "exit_code"}
            retain: dict[str, Any] = {
                k: tuple(map(_number, v)) if isinstance(v, list) else v for k, v in content["retain"].items()
            }
            return cls(
                Verdict(**verdict), tuple(_recovery(r) for r in content["recoveries"]), RetainCheck(**retain),
                {role: tuple(finding_of(f) for f in items) for role, items in content["findings"].items()},
                content["not_run"], {name: float(value) for name, value in content["heuristics"].items()}, tuple(content["examples"]), content["diagnostics"], content["context"],
                tuple(_gap(g) for g in content.get("gaps", ())), state,
            )  # fmt: skip
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"this is not the JSON of an audit: {type(error).__name__} {error}") from error

    @checked
    def save(self, folder: str | Path) -> Path:
        """Write audit.json into the folder, which is made where it is absent, by one rename.

        Raises:
            CheckpointError: if it cannot be written.
        """
        path = make_folder(user_path(folder)) / "audit.json"
        write_text(path, self.to_json())
        return path

    @classmethod
    @checked
    def load(cls, path: str | Path) -> Report:
        """The report of an audit.json, or of a directory that holds one.

        Raises:
            CheckpointError: if there is none, or it cannot be read.
        """
        place = user_path(path)
        file = place / "audit.json" if is_folder(place) else place
        try:
            return cls.from_json(read_text(file, CheckpointError))
        except CheckpointError as error:
            reason = str(error).removeprefix(f"{file} ")
            raise CheckpointError(f"{file.absolute()} cannot be read: {reason}; give the --out of an audit") from error


_NUMBER, _PAIR = int | float | str | None, list[int | float | str | None]
"""A number of JSON here: NaN is null, an infinity a text."""
_TYPES: Mapping[str, Mapping[str, Any]] = {
    "verdict": {"word": str, "sentence": str, "rule": str, "settle": str, "exit_code": int},
    "retain": {"accuracy": _PAIR | None, "perplexity": _PAIR | None, "facts": int, "tokens": int},
    "recovery": {
        "attack": str, "status": str, "reason": str, "value": _NUMBER, "interval": _PAIR, "bound": _PAIR, "edited": _NUMBER,
        "original": _NUMBER, "floor": _NUMBER, "floor_name": str, "settings": dict[str, list[str]], "level": str, "decides": bool,
        "ratio": _NUMBER,
    },
    "finding": {
        "attack": str, "seed": int, "status": str, "reason": str, "items": list, "settings": list, "train_accuracy": _NUMBER,
        "tokens": int | float, "seconds": int | float, "details": dict, "correct": list[str], "graded": list[list],
    },
    "context": {
        "budget": str, "seeds": list[int], "n_test": int, "recovery_threshold": int | float, "pass_threshold": int | float,
        "alpha": int | float, "sites": list[int | str] | None, "notes": list[str], "command": str,
    },
    "other": {
        "not_run": dict[str, str], "heuristics": dict[str, int | float], "examples": list[dict], "diagnostics": dict, "context": dict,
    },
}  # fmt: skip
"""The types of the values of audit.json that pages are made of."""


def _check_types(content: Mapping[str, Any]) -> None:
    """Refuse values of other types, of which a page could not be made.

    Raises:
        CheckpointError: naming the field.
    """
    check_fields(content["verdict"], _TYPES["verdict"], "its verdict")
    if content["verdict"]["word"] not in EXIT_CODES:
        raise ValueError(f"the verdict {content['verdict']['word']!r}")
    check_fields(content["retain"], _TYPES["retain"], "its retain check")
    for name, kind in _TYPES["other"].items():
        check_fields({name: content[name]}, {name: kind}, "it")
    types = {name: kind for name, kind in _TYPES["context"].items() if name in content["context"]}
    check_fields({name: content["context"][name] for name in types}, types, "its context")
    for number, row in enumerate(content["recoveries"], 1):
        check_fields(row, _TYPES["recovery"], f"its recovery {number}")
    for row in (row for rows in content["findings"].values() for row in rows):
        check_fields(row, _TYPES["finding"], "a finding")
    pairs = [row[name] for row in content["recoveries"] for name in ("interval", "bound")]
    pairs += [pair for pair in (content["retain"]["accuracy"], content["retain"]["perplexity"]) if pair is not None]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("a pair of numbers has another length")


class AuditInterrupted(KeyboardInterrupt):
    """Ctrl-C during an audit. `report` is that of the attacks made so far; None before the facts were simply asked."""

    def __init__(self, report: Report | None) -> None:
        super().__init__("the audit was interrupted")
        self.report = report


def finding_json(finding: Finding) -> dict[str, Any]:
    """A finding as plain JSON values; the rows of `correct` are texts of 0 and 1."""
    rows = ["".join(str(int(c)) for c in row) for row in finding.correct]
    grades = [[round(float(g), 5) for g in row] for row in finding.graded]
    return _json_values({**{k: getattr(finding, k) for k in _FIELDS}, "correct": rows, "graded": grades})


def finding_of(value: Mapping[str, Any]) -> Finding:
    """The finding of such values.

    Raises:
        TypeError: if an item or a setting is not a text.
    """
    if not all(isinstance(name, str) for name in (*value["items"], *value["settings"])):
        raise TypeError("an item or a setting of a finding is not a text")
    shape = (len(value["settings"]), len(value["items"]))
    correct = np.array([[int(c) for c in row] for row in value["correct"]], dtype=np.int8).reshape(shape)
    graded = np.array([[_number(g) for g in row] for row in value["graded"]], dtype=np.float64).reshape(shape)
    plain: dict[str, Any] = {k: tuple(value[k]) if isinstance(value[k], list) else value[k] for k in _FIELDS}
    return Finding(**plain, correct=correct, graded=graded)


_FIELDS = ("attack", "seed", "status", "reason", "items", "settings", "train_accuracy", "tokens", "seconds", "details")


def _recovery(value: Mapping[str, Any]) -> Recovery:
    fields = {k: v for k, v in value.items() if k != "ratio"}
    for name in ("value", "edited", "original", "floor"):
        fields[name] = _number(fields[name])
    for name in ("interval", "bound"):
        fields[name] = tuple(_number(v) for v in fields[name])
    fields["settings"] = {role: tuple(names) for role, names in fields["settings"].items()}
    return Recovery(**fields)


def _gap(value: Mapping[str, Any]) -> Gap:
    numbers = {k: _number(value[k]) for k in ("edited", "original", "reference", "value", "error")}
    pairs = {k: tuple(_number(v) for v in value[k]) for k in ("interval", "spread")}
    return Gap(**{**value, **numbers, **pairs})


def _number(value: float | str | None) -> float:
    return float("nan") if value is None else float(value)


def _json_values(value: object) -> Any:
    """JSON values: tuples as lists, numpy numbers as Python's, NaN as null, infinities as texts."""
    # Single values first: an audit holds a number a fact and setting, and looking for an abstract class is slow.
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None if math.isnan(value) else str(float(value))
    if isinstance(value, np.generic):
        return _json_values(value.item())
    if isinstance(value, Mapping):
        return {str(k): _json_values(v) for k, v in value.items()}
    return [_json_values(v) for v in value] if isinstance(value, Sequence) else value
