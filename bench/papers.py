"""The claims of nine published systems beside what was measured here: docs/papers.md, made from bench/results alone.

`python -m bench.papers` rewrites the page; it trains and attacks nothing. A system is a function of `bench.papers_rows` that
reads result files and returns a `Row`: its claims in its own terms, each with the numbers that decide it, the verdict of the
audit, and the defects of the published code that are corrected here. A claim is met or not by a rule on the numbers, which
stands beside it; a system *holds* where every claim is met, *fails* where none is, and *partly* holds otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bench.record import RESULTS

PAGE = RESULTS.parents[1] / "docs" / "papers.md"
INTRODUCTION = """# What the papers claim, and what holds here

<!-- Written by `python -m bench.papers` from bench/results; change that script, not this page. -->

Each system is compared with its own claims, on models that a CPU can train. A difference from the paper's own numbers is
therefore not a refutation: the models, the data and the budgets are smaller, and each section states them. ± is the standard
deviation over seeds; a value of a single seed is marked. R is the share of the removed knowledge that an attack recovers
([glossary](glossary.md)).
"""


@dataclass(frozen=True)
class Claim:
    """What a paper states, and whether it is met."""

    text: str
    measured: str
    """The numbers, and the rule that decides."""
    met: bool


@dataclass(frozen=True)
class Row:
    """One system."""

    name: str
    source: str
    """Its arXiv number."""
    claims: tuple[Claim, ...]
    setting: str
    numbers: str
    """The few numbers of the table."""
    audit: str
    mended: tuple[str, ...]
    """Defects of the published code that are corrected here."""
    picture: str = ""
    """A line of Markdown."""

    @property
    def verdict(self) -> str:
        """holds, partly or fails."""
        met = sum(claim.met for claim in self.claims)
        return "holds" if met == len(self.claims) else "partly" if met else "fails"


@dataclass
class Results:
    """The result files, and which of them were read."""

    folder: Path = RESULTS
    read: list[str] = field(default_factory=list)

    def file(self, name: str) -> dict[str, Any]:
        """The content of a result file.

        Raises:
            SystemExit: if it is absent.
        """
        path = self.folder / f"{name}.json"
        if not path.exists():
            raise SystemExit(f"{path} is absent; run the benchmark that writes it, or restore it with git")
        if name not in self.read:
            self.read.append(name)
        return dict(json.loads(path.read_text()))

    def rows(self, *names: str) -> list[dict[str, Any]]:
        """The rows of several files, one after the other."""
        return [row for name in names for row in self.file(name)["rows"]]


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Mean ± standard deviation over seeds; a single value is marked."""
    found = list(values)
    text = f"{mean(found):.{digits}f}"
    return f"{text} (one seed)" if len(found) == 1 else f"{text} ± {stdev(found):.{digits}f}"


def summary(values: dict[str, Any], digits: int = 1) -> str:
    """The same of a mean and deviation that a result file holds."""
    return f"{values['mean']:.{digits}f} ± {values['sd']:.{digits}f}"


def page(systems: Sequence[Callable[[Results], Row]], folder: Path = RESULTS) -> str:
    """The whole page."""
    made = []
    for system in systems:
        results = Results(folder)
        made.append((system(results), results))
    lines = [INTRODUCTION, "| system | claims | measured here | audit | verdict |", "|---|---|---|---|---|"]
    for row, _ in made:
        claims = "; ".join(f"{claim.text} (**{'yes' if claim.met else 'no'}**)" for claim in row.claims)
        link = f"[{row.name}](#{anchor(row.name)})"
        lines.append(f"| {link} | {claims} | {row.numbers} | {row.audit} | **{row.verdict}** |")
    return "\n".join([*lines, *(section(row, results) for row, results in made)]) + "\n"


def section(row: Row, results: Results) -> str:
    """What is said of one system below the table."""
    lines = [f"\n## {row.name}\n", f"[arXiv {row.source}](https://arxiv.org/abs/{row.source}). {row.setting}\n"]
    lines += ["| claim | measured | met |", "|---|---|---|"]
    lines += [f"| {claim.text} | {claim.measured} | {'yes' if claim.met else 'no'} |" for claim in row.claims]
    lines.append(f"\nAudit: {row.audit}. Verdict on the claims: **{row.verdict}**.\n")
    lines += [f"{row.picture}\n"] if row.picture else []
    if row.mended:
        lines += ["Defects of the published code that are corrected here:\n", *(f"- {text}" for text in row.mended), ""]
    lines.append("Files and commands:\n")
    for name in results.read:
        lines.append(f"- [{name}.json](../bench/results/{name}.json): `{results.file(name)['command']}`")
    return "\n".join(lines)


def anchor(heading: str) -> str:
    """The anchor that Markdown renderers give a heading."""
    kept = "".join(c for c in heading.lower() if c.isalnum() or c in " -")
    return kept.replace(" ", "-")


def main() -> None:
    """Rewrite the page."""
    from bench.papers_rows import SYSTEMS

    PAGE.write_text(page(SYSTEMS))
    print(PAGE)


if __name__ == "__main__":
    main()
