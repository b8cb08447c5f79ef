"""The reference: every public name is on a page, says what it is in its first line, and no link of a page is broken."""

import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import repedit as rp
from docs import build
from repedit import cli
from repedit.cli.application import EXAMPLES, exit_codes
from tests.layers import PACKAGE, block

ROOMS = build.rooms(rp)
VALUES = ("__version__",)
"""Names of __all__ that need no docstring."""


def public(module) -> list[str]:
    """The names a module gives: those it lists, or what is written in it."""
    own = [n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__ and n[0] != "_"]
    found = getattr(module, "__all__", own)
    return [name for name in found if name not in VALUES and getattr(module, name) not in ROOMS]


def check_first_line(name: str, text: str) -> None:
    """A docstring begins with a sentence that ends in its first line."""
    line = text.split("\n")[0]
    assert line and not line.startswith(f"{name}("), f"{name} has no docstring"
    assert re.search(r"[.?!:](\s+[A-Z`].*)?$", line), f"{name}: {line!r}"


@pytest.fixture(scope="module")
def documented():
    return {room.__name__: build.documented(room) for room in ROOMS}


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.__name__)
def test_a_public_name_says_what_it_is_in_its_first_line(room, documented):
    check_first_line(room.__name__, room.__doc__ or "")
    for name in public(room):
        check_first_line(name, documented[room.__name__].members[name].docstring)


@pytest.mark.parametrize(
    "text", ["", "Wide(x: int)", "no sentence at all", "A sentence that goes on\nin the next line."]
)
def test_a_docstring_without_a_first_line_is_caught(text):
    with pytest.raises(AssertionError):
        check_first_line("Wide", text)


def test_headings_stand_above_names_that_exist_and_none_is_before_the_first():
    assert set(build.TASKS) <= set(rp.__all__) and next(iter(build.TASKS)) == rp.__all__[0]


class Links(HTMLParser):
    """The anchors of a page and where its links go."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if "href" in given else []


def check_links(folder) -> int:
    """Every link leads to a file and, where it names one, to an anchor in it; returns how many there are."""
    pages = {path.resolve(): Links(path.read_text()) for path in folder.rglob("*.html")}
    count = 0
    for path, page in pages.items():
        assert len(set(page.anchors)) == len(page.anchors), path
        for link in page.links:
            file, _, anchor = link.partition("#")
            if not file.startswith(("https:", "data:")):
                goal = (path.parent / file).resolve() if file else path
                assert goal in pages and (not anchor or anchor in pages[goal].anchors), f"{path}: {link}"
                count += 1
    return count


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs") / "built"
    build.build(folder)
    return folder


@pytest.mark.slow
def test_no_link_is_broken(built):
    assert check_links(built) > 2000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "said"), [('id="mrp"', 'id="mpr"', "#mrp"), ("repedit/data.html", "repedit/date.html", "date")]
)
def test_a_broken_page_is_caught(built, tmp_path, old, new, said):
    for path in built.rglob("*.html"):
        copy = tmp_path / path.relative_to(built)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text())
    page = tmp_path / "repedit.html"
    page.write_text(page.read_text().replace(old, new))
    with pytest.raises(AssertionError, match=said):
        check_links(tmp_path)


@pytest.mark.slow
def test_every_public_name_is_shown_in_its_order(built):
    for room in ROOMS:
        page = Links((built / f"{room.__name__.replace('.', '/')}.html").read_text())
        names = public(room)
        shown = [anchor for anchor in page.anchors if anchor in names]
        assert set(shown) == set(names), room.__name__
        assert not hasattr(room, "__all__") or shown == names, room.__name__
        assert not any(part.startswith("_") and part[:2] != "__" for a in page.anchors for part in a.split("."))


@pytest.mark.slow
def test_a_docstring_is_shown_as_it_is_written_with_links(built):
    page = (built / "repedit.html").read_text()
    entry = html.unescape(re.search('<section id="mrp">.*?</section>', page, re.DOTALL)[0])
    assert "-min(CE_f, cap) + retain_weight CE_r + kl_weight KL(original || edited)" in entry
    assert 'href="repedit/errors.html#RankError"' in entry and 'href="repedit/fit.html#FITS">rp.fit.FITS</a>' in entry
    assert "\n    `- MissingDependency (ImportError)</samp>" in (built / "repedit" / "errors.html").read_text()
    assert 'href="#Edit"' in entry and 'href="repedit/data.html#Batches"' in entry  # of the signature
    assert 'href="metrics/tofu.html"' in (built / "repedit" / "metrics.html").read_text().partition("<main")[2]
    assert all(f"<h2>{html.escape(title)}</h2>" in page for title in build.TASKS.values())


@pytest.mark.slow
def test_every_verb_is_shown_with_its_options_example_and_exit_codes(built):
    page = (built / "command-line.html").read_text()
    for verb, command in cli.verbs().items():
        entry = re.search(f'<section id="{verb.replace(" ", "-")}">.*?</section>', page, re.DOTALL)[0]
        shown = " ".join(html.unescape(re.sub("<[^>]*>", "", entry)).split())
        options = [p.opts[0] if p.param_type_name == "option" else p.name.upper() for p in command.params]
        assert EXAMPLES[verb] in shown and all(option in shown for option in options), verb
        assert all(f"{code} {text}" in shown for code, text in exit_codes(verb).items()), verb


def test_every_guarantee_has_its_test():
    root = Path(__file__).parents[1]
    lines = [line for line in (root / "docs" / "guarantees.md").read_text().splitlines() if line.startswith("| ")]
    rows = [line for line in lines if "| promise |" not in line]
    named = [re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", line) for line in rows]
    assert rows and all(named), [row for row, tests in zip(rows, named, strict=True) if not tests]
    absent = [
        f"{file}::{test}" for tests in named for file, test in tests if f"def {test}(" not in (root / file).read_text()
    ]
    assert absent == []


def paths_of_tree(lines: list[str]) -> set[str]:
    """Paths of the files and packages that an indented tree lists."""
    parts: list[str] = []
    paths = set()
    for line in lines:
        depth = (len(line) - len(line.lstrip())) // 2
        parts = [*parts[:depth], line.split()[0]]
        paths.add("".join(parts))
    return paths


def check_tree(lines: list[str]) -> None:
    """A tree lists every module of the package and every folder that holds one, and nothing else."""
    files = {
        path.relative_to(PACKAGE.parent)
        for path in PACKAGE.rglob("*.py")
        if path.parent == PACKAGE or path.name != "__init__.py"
    }
    assert paths_of_tree(lines) == {str(path) for path in files} | {f"{path.parent}/" for path in files}


def test_the_tree_of_the_design_lists_every_module():
    check_tree(block("tree"))


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [line for line in lines if "scores.py" not in line],
        lambda lines: [*lines, "  absent.py  a module that does not exist"],
        lambda lines: [line.replace("    scores.py", "  scores.py") for line in lines],
        lambda lines: [line.replace("neurons/ ", "neuron/ ") for line in lines],
    ],
    ids=["missing", "added", "in another folder", "folder with another name"],
)
def test_a_tree_that_differs_from_the_package_is_caught(change):
    assert change(block("tree")) != block("tree")
    with pytest.raises(AssertionError):
        check_tree(change(block("tree")))
