"""The README: its code runs, it is short, and every number in it is that of the file that it names."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import repedit as rp
from repedit import demo
from tests.guides import small_settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.mark.filterwarnings("ignore::repedit.neurons.scores.CollinearWarning")
def test_the_example_runs(tmp_path, monkeypatch):
    small_settings(tmp_path, monkeypatch)
    exec(BLOCKS[0], {})
    assert (tmp_path / "edited" / "repedit.json").exists() and (tmp_path / "specialization.png").exists()


def test_the_example_is_fifteen_lines():
    assert len(BLOCKS) == 1 and len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= 15


def test_it_is_short_and_has_one_picture():
    assert len(README.splitlines()) <= 160
    assert README.count("![") == 1


def test_its_guarantees_are_five_and_what_is_not_guaranteed_three():
    sections = dict(part.partition("\n")[::2] for part in README.split("\n## "))
    assert len(re.findall(r"^- ", sections["What is guaranteed"], re.M)) == 5
    assert len(re.findall(r"^- ", sections["What is not guaranteed"], re.M)) == 3


# --- Every number is that of a file


Rows = Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """A phrase of the README, made from the rows of a result file, and the command that wrote the file."""

    file: str
    command: str
    phrase: Callable[[Rows], str]


def _row(text: str) -> Callable[[Rows], str]:
    """The row of the demo's table for one text."""

    def phrase(rows: Rows) -> str:
        row = rows[f"pruned, {text}"]
        before, after = (f"{100 * value:.1f} %" for value in row["top1"])
        low, high = row["interval"]
        drop, control = row["drop_percent"], row["random_drop_percent"]
        return f"| {text} | {before} | {after} | {drop:.1f} % ({low:.1f} to {high:.1f}) | {control:.1f} % |"

    return phrase


def _recovered(rows: Rows) -> str:
    """What the audit of the projection found, asked directly and after retraining."""
    found = {row["attack"]: row for row in rows["first"]["recoveries"]}
    direct, original, again = found["direct"]["edited"], found["direct"]["original"], found["rtt"]["edited"]
    return (
        f"{rows['first']['verdict']}: asked directly, the model answers {direct:.0%} of the capitals ({original:.0%} before), "
        f"but retrained on half of them it answers {again:.0%} of the other half"
    ).replace("%", " %")


DEMO = ("bench/results/demo.json", "python -m bench.demo")
CLAIMS = (
    Claim(*DEMO, _row("code")),
    Claim(*DEMO, _row("prose")),
    Claim(*DEMO, lambda rows: f"seed 0, {rows['pruned, code']['tokens']:,} evaluated tokens in each row"),
    Claim(
        *DEMO, lambda rows: f"prunes {100 * demo.FRACTION:g} % of the MLP neurons, {rows['pruned']['neurons']} in all"
    ),
    Claim("bench/results/audit-projected.json", "python -m bench.audit --part projected", _recovered),
)
CONSTANTS = {
    "(95 % interval)": "the level of every interval of an effect",
    f"over {len(rp.arch.families())} model families": "rows of the family table",
    f"Python {tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['requires-python'][2:]} or newer": "pyproject",
    "Pochinkov and Schoots 2024": "a source",
    "arXiv 2403.01267": "a source",
}
"""Phrases with numbers that no measurement gives, and what they are."""
NUMBER = re.compile(r"(?<![\w.\-])\d[\d.,]*(?![\w])")


def results(file: str) -> Rows:
    return {row["name"]: row for row in json.loads((ROOT / file).read_text())["rows"]}


def check_numbers(readme: str, read: Callable[[str], Rows] = results) -> None:
    """Every number of the text is in a phrase that its file gives, and the text names the file and its command."""
    text = re.sub(r"```.*?```|\]\([^)]*\)", "", readme, flags=re.S)
    text = " ".join(text.split())
    for claim in CLAIMS:
        phrase = claim.phrase(read(claim.file))
        assert phrase in text, f"{claim.file} gives: {phrase}"
        assert claim.file in readme and claim.command in readme, claim
        text = text.replace(phrase, "")
    for phrase in CONSTANTS:
        assert phrase in text, phrase
        text = text.replace(phrase, "")
    assert not NUMBER.findall(text), f"numbers without a file: {NUMBER.findall(text)}"


def test_every_number_is_that_of_its_file():
    check_numbers(README)


@pytest.mark.parametrize(
    ("old", "new"),
    [("48.3 %", "48.4 %"), ("it answers 80 %", "it answers 8 %"), ("## Links", "It is 12 times faster.\n\n## Links"),
     ("python -m bench.audit", "python -m bench.audits"), ("22 model", "23 model")],
)  # fmt: skip
def test_a_number_that_no_file_gives_is_caught(old, new):
    assert old in README
    with pytest.raises(AssertionError):
        check_numbers(README.replace(old, new))


def test_a_result_that_changed_is_caught():
    def changed(file: str) -> Rows:
        rows = dict(results(file))
        for name in ("pruned, code", "first"):
            if name in rows:
                rows[name] = json.loads(json.dumps(rows[name]).replace("0.49", "0.59"))
        return rows

    with pytest.raises(AssertionError, match=r"59\.2 %"):
        check_numbers(README, changed)


# --- Links


def broken_links(page: Path, text: str | None = None) -> list[str]:
    """Relative links of a page that lead to no file, or to a heading that the file does not have."""
    text = page.read_text() if text is None else text
    broken = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S)):
        name, _, anchor = link.partition("#")
        goal = page.parent / name if name else page
        known = (
            anchors(goal.read_text() if name else text)
            if anchor and goal.suffix == ".md" and goal.exists()
            else {anchor}
        )
        if not goal.exists() or anchor not in known:
            broken.append(link)
    return broken


def anchors(text: str) -> set[str]:
    """The anchors that Python-Markdown and GitHub give to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_everything_that_a_page_links_to_is_there(page):
    assert broken_links(page) == []


@pytest.mark.parametrize("link", ["docs/guide/prune.md", "docs/guides/prune.md#no-such-heading", "#no-such-heading"])
def test_a_link_that_leads_nowhere_is_caught(link):
    assert broken_links(ROOT / "README.md", f"# Title\n\n[text]({link})") == [link]
    assert (
        broken_links(ROOT / "README.md", "# A title\n\n[text](docs/guides/prune.md#write-the-checkpoint) [a](#a-title)")
        == []
    )
