"""Notebooks as pages: their text, their code, and the outputs with which they are committed."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "notebooks"
PICTURE, MARKDOWN, TEXT = "image/png", "text/markdown", "text/plain"


def files() -> dict[str, str | bytes]:
    """Every page and picture by its path in the site, such as notebooks/3_is_it_really_gone.md."""
    found: dict[str, str | bytes] = {}
    for path in sorted(FOLDER.glob("*.ipynb")):
        found |= page(path.stem, json.loads(path.read_text()))
    return found


def navigation() -> list[dict[str, str]]:
    """The pages by their titles, in the order of their numbers."""
    pages = {name: text for name, text in files().items() if isinstance(text, str)}
    return [{text.splitlines()[0].removeprefix("# "): name} for name, text in pages.items()]


def page(stem: str, notebook: dict[str, Any]) -> dict[str, str | bytes]:
    """The page of one notebook and its pictures; a picture is described by the sentence that follows it."""
    lines: list[str] = []
    pictures: dict[str, str | bytes] = {}
    cells = notebook["cells"]
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "markdown":
            lines += [source(cell), ""]
            continue
        lines += [*fenced("python", source(cell)), ""]
        for output in cell["outputs"]:
            data = output.get("data", {})
            if PICTURE in data:
                name = f"{stem}-{len(pictures) + 1}.png"
                pictures[f"notebooks/{name}"] = base64.b64decode(data[PICTURE])
                lines += [f"![{description(cells[number + 1 :])}]({name})", ""]
            elif MARKDOWN in data:
                lines += [demoted("".join(data[MARKDOWN])), ""]
            elif output.get("name") != "stderr":
                lines += [*fenced("text", "".join(output.get("text") or data.get(TEXT, ""))), ""]
    lines += [f"*This page is the notebook `notebooks/{stem}.ipynb`, as it ran on the real model.*", ""]
    return {f"notebooks/{stem}.md": "\n".join(lines), **pictures}


def source(cell: dict[str, Any]) -> str:
    """The text of a cell."""
    return "".join(cell["source"]).strip("\n")


def fenced(language: str, text: str) -> list[str]:
    """A fenced block, whose fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [f"{fence}{language}", text.strip("\n"), fence]


def description(cells: list[dict[str, Any]]) -> str:
    """What a picture shows: the first sentence of the next text."""
    text = next((source(cell) for cell in cells if cell["cell_type"] == "markdown"), "")
    sentence = re.split(r"(?<=\.)\s", re.sub(r"[\[\]`*]|^#+ .*$", "", text, flags=re.M).strip())[0]
    return " ".join(sentence.split()) or "Output of the cell above"


def demoted(text: str) -> str:
    """A report inside a page: its headings are below those of the page."""
    return re.sub(r"^(#+) ", lambda match: "#" * min(6, len(match[1]) + 1) + " ", text, flags=re.M)
