"""The losses of a TOFU evaluation as a JSON file, laid out as the published logs are.

One object by set of questions: "eval_log_forget.json" and so on; inside, one mapping by quantity from the number of
the question to its value. So a published log of a retrained model serves as the reference of a forget quality.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from repedit.errors import MetricError, NotFound
from repedit.io.files import user_path, write_text
from repedit.io.text import read_json
from repedit.metrics.tofu.definitions import Part, Values

# Name of the part -> its name in a published log.
FILES = {
    "forget": "eval_log_forget.json",
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
}
QUANTITIES = {
    "answer": "avg_gt_loss",
    "rougeL_recall": "rougeL_recall",
    "paraphrased": "avg_paraphrased_loss",
    "perturbed": "average_perturb_loss",
}


def read_log(source: str | Path | Mapping[str, Any]) -> dict[str, Part]:
    """The parts of a log: a file, or the object in it.

    Raises:
        NotFound: if there is no such file.
        MetricError: if it holds no such object, or a quantity is missing.
    """
    log = source if isinstance(source, Mapping) else _content(user_path(source))
    names = [name for name in FILES if FILES[name] in log]
    if not names:
        raise MetricError(f"a log holds {', '.join(FILES.values())}; found {sorted(log)[:5]}")
    return {name: _part(name, log[FILES[name]]) for name in names}


def write_log(parts: Mapping[str, Part], path: str | Path) -> None:
    """Write parts as `read_log` reads them, with the name of the split beside."""
    log = {}
    for name, part in parts.items():
        values = {QUANTITIES[q]: dict(enumerate(getattr(part, q).tolist())) for q in QUANTITIES}
        log[FILES[name]] = {"split": part.split} | values
    write_text(path, json.dumps(log))


def _content(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise NotFound(f"{path.absolute()} is not a file; give the log of a model that never saw the forget set")
    # finite=False: a published log may hold NaN for a question; what is computed from it refuses that.
    return read_json(path, MetricError, finite=False, remedy="give a log written by an evaluation")


def _part(name: str, log: Mapping[str, Any]) -> Part:
    if not isinstance(log, Mapping):
        raise MetricError(f"the log of {name!r} is a {type(log).__name__}; an object was expected")
    missing = [quantity for quantity in QUANTITIES.values() if quantity not in log]
    if missing:
        raise MetricError(f"the log of {name!r} lacks {', '.join(missing)}; found {sorted(log)}")
    values: dict[str, Any] = {field: _values(name, quantity, log[quantity]) for field, quantity in QUANTITIES.items()}
    if len({len(value) for value in values.values()}) > 1:
        counts = {field: len(value) for field, value in values.items()}
        raise MetricError(f"the log of {name!r} holds {counts} values; every question needs one of each")
    return Part(str(log.get("split", "")), **values, **of_set(name))


def of_set(name: str) -> dict[str, Any]:
    """How a set of questions is scored: its aggregate, and whether the probability is among the answers."""
    forget = name == "forget"
    return {
        "aggregate": "closer_to_one" if forget else "true_better",
        "options": name in ("real_authors", "world_facts"),
    }


def _values(name: str, quantity: str, found: Mapping[str, Any]) -> Values:
    try:
        return np.array([found[key] for key in sorted(found, key=int)], dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise MetricError(f"the log of {name!r}: {quantity} is no table of numbers: {error}") from error
