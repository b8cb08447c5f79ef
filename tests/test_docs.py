"""The documentation: every public name says what it is and has an entry, and the site builds without a broken link."""

import html
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from mkdocs.exceptions import MkDocsException

import repedit as rp
from docs import build, notebooks, reference
from repedit import cli
from repedit.cli.application import EXAMPLES, exit_codes
from tests.layers import PACKAGE, block

ROOT = Path(__file__).parents[1]
NAMESPACES = reference.namespaces()


def check_first_line(name: str, text: str) -> None:
    """A docstring begins with a sentence that ends in its first line."""
    line = text.split("\n")[0]
    assert line and not line.startswith(f"{name}("), f"{name} has no docstring"
    assert re.search(r"[.?!:](\s+[A-Z`].*)?$", line), f"{name}: {line!r}"


@pytest.mark.parametrize("module", NAMESPACES, ids=lambda module: module.__name__)
def test_a_public_name_says_what_it_is_in_its_first_line(module):
    check_first_line(module.__name__, module.__doc__ or "")
    for name in reference.public(module):
        check_first_line(name, reference.docstring(module, name))


@pytest.mark.parametrize(
    "text", ["", "Wide(x: int)", "no sentence at all", "A sentence that goes on\nin the next line."]
)
def test_a_docstring_without_a_first_line_is_caught(text):
    with pytest.raises(AssertionError):
        check_first_line("Wide", text)


def test_headings_stand_above_names_that_exist_and_none_is_before_the_first():
    assert set(reference.TASKS) <= set(rp.__all__) and next(iter(reference.TASKS)) == rp.__all__[0]


def check_entries(pages: dict[str, str]) -> None:
    """Every public name has one entry in the reference, and every verb its section."""
    paths = [path for text in pages.values() for path in re.findall(r"^::: (\S+)", text, re.M)]
    assert len(set(paths)) == len(paths), "a name has two entries"
    wanted = {reference.entry(module, name).path for module in NAMESPACES for name in reference.public(module)}
    assert wanted == set(paths), wanted ^ set(paths)
    assert set(re.findall(r"^## repedit (.+)$", pages["reference/command-line.md"], re.M)) == set(cli.verbs())


def test_every_public_name_and_verb_has_an_entry():
    check_entries(reference.pages())


@pytest.mark.parametrize(
    "line", ["::: repedit.neurons.selection.prune", "::: repedit.errors.NotFoldable", "## repedit diff"]
)
def test_a_public_name_or_verb_without_an_entry_is_caught(line):
    pages = {name: text.replace(f"{line}\n", "") for name, text in reference.pages().items()}
    with pytest.raises(AssertionError):
        check_entries(pages)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("sites *.mlp.out and *.attn.out", r"sites \*.mlp.out and \*.attn.out"),
        ("a list [x][y] with x < y", r"a list \[x\]\[y\] with x &lt; y"),
        ("cov(x, z) of `z*g*h` and z_j", "cov(x, z) of `z*g*h` and z_j"),
        ("as rp.prune does", "as [`rp.prune`][repedit.neurons.selection.prune] does"),
        ("see rp.metrics.tofu", "see [`rp.metrics.tofu`][rpmetricstofu]"),
        ("`NotFoldable`, or `nothing`", "[`NotFoldable`][repedit.errors.NotFoldable], or `nothing`"),
    ],
)
def test_a_docstring_is_shown_as_it_is_written_with_links(text, shown):
    assert reference.literal(text) == shown


def test_a_bar_ends_a_cell_only_outside_of_code():
    assert reference.cell("mean |z|, `a | b`") == r"mean \|z\|, `a | b`"


def test_code_spans_become_links_outside_of_blocks_and_links():
    page = "`rp.prune` and [`rp.prune`](x.md)\n\n```python\nx = `rp.prune`\n```\n"
    assert reference.with_links(page) == page.replace(
        "`rp.prune` and", "[`rp.prune`][repedit.neurons.selection.prune] and"
    )


def test_notebooks_are_pages_with_their_outputs_and_every_picture_is_described():
    pages = {name: text for name, text in notebooks.files().items() if isinstance(text, str)}
    assert len(pages) == len(list(notebooks.FOLDER.glob("*.ipynb"))) == len(notebooks.navigation())
    shown = [match for text in pages.values() for match in re.findall(r"!\[(.*?)\]\((.+?)\)", text)]
    assert {f"notebooks/{name}" for _, name in shown} == set(notebooks.files()) - set(pages)
    assert all(len(described) > 20 for described, _ in shown)
    assert "HIDDEN: at this budget" in pages["notebooks/3_is_it_really_gone.md"]


def test_an_output_with_a_fence_or_without_text_after_it_is_shown():
    picture = {"output_type": "display_data", "data": {"image/png": "AAAA"}}
    text = {"output_type": "stream", "name": "stdout", "text": ["```\n", "inside"]}
    cells = [
        {"cell_type": "markdown", "source": ["# Title"]},
        {"cell_type": "code", "source": ["x"], "outputs": [picture, text]},
    ]
    page = notebooks.page("1_a", {"cells": cells})
    assert page["notebooks/1_a-1.png"] == b"\0\0\0"
    assert "![Output of the cell above](1_a-1.png)" in page["notebooks/1_a.md"]
    assert "````text\n```\ninside\n````" in page["notebooks/1_a.md"]


# --- The site


class Page(HTMLParser):
    """The anchors of a page, where its links go, what it loads, its headings, and its pictures without a description."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []
        self.headings: list[int] = []
        self.undescribed: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors += [given["id"]] if "id" in given else []
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif given.get("rel") not in ("canonical", "prev", "next"):
            self.loads += [given[name] for name in ("src", "href") if given.get(name)]
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if (tag == "img" and not given.get("alt")) or (
            tag == "svg" and given.get("role") == "img" and not given.get("aria-label")
        ):
            self.undescribed.append(str(given.get("src") or given.get("class")))


def check_site(folder: Path) -> int:
    """Every link leads to a file and an anchor, nothing is loaded from elsewhere, headings descend by one, pictures are described."""
    pages = {path.resolve(): Page(path.read_text()) for path in folder.rglob("*.html") if path.name != "404.html"}
    count = 0
    for path, page in pages.items():
        assert not page.undescribed, f"{path}: {page.undescribed}"
        assert page.headings[0] == 1, path
        steps = list(zip(page.headings, page.headings[1:], strict=False))
        assert all(b <= a + 1 for a, b in steps), f"{path}: {page.headings}"
        for link in page.links + page.loads:
            file, _, anchor = link.partition("#")
            outside = re.match(r"\w+:|//", link)
            assert not outside or link in page.links or link.startswith("data:"), f"{path} loads {link}"
            if not outside and not link.startswith("javascript"):
                goal = (path.parent / html.unescape(file)).resolve() if file else path
                assert goal.exists(), f"{path}: {link}"
                assert not anchor or goal.suffix != ".html" or anchor in pages[goal].anchors, f"{path}: {link}"
                count += 1
    return count


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return build.build(tmp_path_factory.mktemp("docs") / "site")


@pytest.mark.slow
def test_every_page_is_sound(site):
    assert check_site(site) > 5000
    assert len(list(site.rglob("*.html"))) > 50


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('href="guides/prune.html"', 'href="guides/prunes.html"', "prunes.html"),
        ('href="assets/', 'href="https://example.org/', "loads https"),
        ('<h2 id="install">', '<h4 id="install">', "headings|index.html"),
        (' alt="Accuracy', ' title="Accuracy', "overview.png"),
        ('"javascripts/iframe-worker.js"', '"https://unpkg.com/iframe-worker/shim"', "loads https://unpkg"),
    ],
)
def test_a_page_that_is_not_sound_is_caught(site, tmp_path, old, new, said):
    shutil.copytree(site, tmp_path / "site")
    page = tmp_path / "site" / "index.html"
    assert old in page.read_text()
    page.write_text(page.read_text().replace(old, new))
    with pytest.raises(AssertionError, match=said):
        check_site(tmp_path / "site")


@pytest.mark.slow
def test_every_public_name_and_verb_is_shown(site):
    anchors = {anchor for path in (site / "reference").glob("*.html") for anchor in Page(path.read_text()).anchors}
    for module in NAMESPACES:
        assert {reference.entry(module, name).path for name in reference.public(module)} <= anchors, module.__name__
    page = (site / "reference" / "command-line.html").read_text()
    shown = " ".join(html.unescape(re.sub("<[^>]*>", "", page)).split())
    for verb, command in cli.verbs().items():
        options = [p.opts[0] if p.param_type_name == "option" else p.name.upper() for p in command.params]
        assert EXAMPLES[verb] in shown and all(option in shown for option in options), verb
        assert all(f"{code} {text.replace('`', '')}" in shown for code, text in exit_codes(verb).items()), verb


@pytest.mark.slow
def test_formulas_are_shown_as_they_are_written(site):
    page = (site / "reference" / "edit-unlearn-and-project.html").read_text()
    shown = " ".join(html.unescape(re.sub("<[^>]*>", "", page)).split())
    assert "-min(CE_f, cap) + retain_weight CE_r + kl_weight KL(original || edited)" in shown
    assert "`- MissingDependency (ImportError)" in html.unescape((site / "reference" / "rp.errors.html").read_text())


@pytest.fixture
def small_docs(tmp_path, monkeypatch):
    """A copy of the pages, without the reference, so that a site is built in seconds."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(reference, "pages", lambda: {"reference/index.md": "# Reference\n"})
    monkeypatch.setattr(reference, "navigation", lambda: ["reference/index.md"])
    monkeypatch.setattr(reference, "links", dict)
    return tmp_path / "docs"


LONG = "a_name_of_more_letters_than_any_screen_is_wide_" * 8
BROKEN = {
    "a link to a page": "[text](no-such-page.md)",
    "a link to a heading": "[text](glossary.md#no-such-heading)",
    "a figure": "![text](../figures/no_such_figure.png)",
    "a file of results": "[text](../bench/results/no_such.json)",
    "a name of the reference": "[`rp.prunes`][repedit.neurons.selection.prunes]",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", BROKEN)
def test_a_page_that_refers_to_nothing_stops_the_build(what, small_docs, tmp_path):
    page = small_docs / "glossary.md"
    page.write_text(f"{page.read_text()}\n{BROKEN[what]}\n")
    with pytest.raises((MkDocsException, SystemExit)):
        build.build(tmp_path / "site", docs=small_docs)


@pytest.mark.slow
def test_a_page_outside_the_navigation_stops_the_build(small_docs, tmp_path):
    (small_docs / "orphan.md").write_text("# A page that nobody finds\n")
    with pytest.raises((MkDocsException, SystemExit)):
        build.build(tmp_path / "site", docs=small_docs)


@pytest.mark.slow
def test_long_names_are_shown_whole(small_docs, tmp_path):
    page = small_docs / "glossary.md"
    page.write_text(f"{page.read_text()}\n## {LONG}\n\n`{LONG}`\n\n| `{LONG}` | x |\n|---|---|\n| y | {LONG} |\n")
    built = build.build(tmp_path / "site", docs=small_docs) / "glossary.html"
    assert html.unescape(built.read_text()).count(LONG) >= 4


# --- The pages themselves


def test_every_guarantee_has_its_test():
    lines = [line for line in (ROOT / "docs" / "guarantees.md").read_text().splitlines() if line.startswith("| ")]
    rows = [line for line in lines if "| promise |" not in line]
    named = [re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", line) for line in rows]
    assert rows and all(named), [row for row, tests in zip(rows, named, strict=True) if not tests]
    absent = [
        f"{file}::{test}" for tests in named for file, test in tests if f"def {test}(" not in (ROOT / file).read_text()
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


IMAGES = ROOT / "docs" / "images"


def check_images(folder, text):
    """Every screenshot is shown by a page, and smaller than 150 KB."""
    for path in folder.iterdir():
        assert path.suffix == ".png" and path.stat().st_size < 150_000, path
        assert f"images/{path.name})" in text, f"no page shows {path.name}"


def test_screenshots_are_small_and_shown():
    check_images(IMAGES, "".join(path.read_text() for path in (ROOT / "docs").rglob("*.md")))


@pytest.mark.parametrize(("size", "text"), [(10, "no page"), (150_000, "![a page](../images/a.png)")])
def test_a_screenshot_that_is_large_or_not_shown_is_caught(tmp_path, size, text):
    (tmp_path / "a.png").write_bytes(b"0" * size)
    with pytest.raises(AssertionError):
        check_images(tmp_path, text)
