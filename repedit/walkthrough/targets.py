"""Where the acts of the demo may write."""

from __future__ import annotations

from pathlib import Path

from repedit.errors import TargetExists


def free(target: str | Path) -> Path:
    """The target, which is absent or an earlier export.

    Raises:
        TargetExists: if it holds something else.
    """
    out = Path(target)
    if out.exists() and not (out / "repedit.json").exists():
        raise TargetExists(f"{out.absolute()} exists and is not an export of repedit; give another --out")
    return out
