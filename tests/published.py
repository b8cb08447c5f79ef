"""Where published data for tests lies: beside the project, never in it."""

from __future__ import annotations

from pathlib import Path

import pytest

PUBLISHED = Path(__file__).parents[2] / "shared" / "data"


def published(*parts: str) -> Path:
    """A path in the published data; the test is skipped where it is absent."""
    path = PUBLISHED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs the published data {'/'.join(parts)} in {PUBLISHED}")
    return path
