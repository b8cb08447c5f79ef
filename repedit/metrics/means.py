"""The mean of named terms that one bad term pulls down."""

from __future__ import annotations

from collections.abc import Mapping

from repedit.errors import MetricError


def harmonic(terms: Mapping[str, float | None]) -> float:
    """Harmonic mean of named terms in [0, 1]; 0 if one is 0.

    Raises:
        MetricError: if a term is missing or outside [0, 1].
    """
    for name, value in terms.items():
        if value is None or not 0 <= value <= 1:
            raise MetricError(f"the term {name!r} is {value}; give a fraction in [0, 1], not a percentage")
    values = [float(value) for value in terms.values() if value is not None]
    return len(values) / sum(1 / value for value in values) if all(values) else 0.0
