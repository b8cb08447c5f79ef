"""The reference: every public name is on a page, says what it is in its first line, and no link of a page is broken."""

import html
import re
from html.parser import HTMLParser
from types import ModuleType

import pytest

import repedit as rp
from docs import build, groups, verbs
from docs.prose import rendered, signature
from docs.reading import Entry, entry, first_sentence
from repedit import cli
from repedit.cli.examples import EXAMPLES

PAGES = groups.pages()


def nowhere(name: str) -> None:
    return None


def entries(page) -> list[Entry]:
    return [entry(name, getattr(page.home, name), page.home) for name in page.names]


def check_first_line(name: str, text: str) -> None:
    """A docstring begins with a sentence that ends in its first line."""
    line = text.split("\n")[0]
    assert line and not line.startswith(f"{name}("), f"{name} has no docstring"
    assert re.search(r"[.?!:]$", first_sentence(text)) and line.startswith(first_sentence(text)), f"{name}: {line!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.slug)
def test_a_public_name_says_what_it_is_in_its_first_line(page):
    if page.room:
        check_first_line(page.prefix, page.home.__doc__ or "")
    for shown in entries(page):
        check_first_line(shown.name, shown.text)


@pytest.mark.parametrize(
    "text", ["", "Wide(x: int)", "no sentence at all", "A sentence that goes on\nin the next line."]
)
def test_a_docstring_without_a_first_line_is_caught(text):
    with pytest.raises(AssertionError):
        check_first_line("Wide", text)


def test_every_public_name_has_one_place():
    tasks = [name for page in PAGES if not page.room for name in page.names]
    rooms = {page.prefix.removeprefix("rp.") for page in PAGES if page.room and page.prefix.count(".") == 1}
    assert sorted([*tasks, *rooms, "__version__"]) == sorted(rp.__all__)
    assert all(isinstance(getattr(rp, room), ModuleType) for room in rooms)


def test_a_name_that_no_task_lists_is_shown_all_the_same(monkeypatch):
    title, names = groups.TASKS["score"]
    monkeypatch.setitem(groups.TASKS, "score", (title, tuple(name for name in names if name != "agreement")))
    assert [page.names for page in groups.pages() if page.slug == "more"] == [("agreement",)]


def test_names_of_the_tasks_exist():
    listed = {name for slug, (_, names) in groups.TASKS.items() if slug != "vision" for name in names}
    assert listed <= set(rp.__all__)


def test_a_docstring_is_shown_as_it_is_written():
    long = "x " * 55 + "goes on"
    text = f"y = P x * _z_ < 1.\n\nfirst: a\nsecond: b\n{long}\nhere\n\n    code  here\n\nArgs:\n    x: of\n        two lines\n"
    shown = rendered(text, nowhere)
    assert "<p>y = P x * _z_ &lt; 1.</p>" in shown and "first: a<br>\nsecond: b<br>" in shown
    assert "goes on here</p>" in shown and "<pre>code  here</pre>" in shown
    assert "<dt><code>x</code></dt><dd>of two lines</dd>" in shown


def test_errors_of_one_line_are_told_apart_and_linked():
    shown = rendered(
        "A.\n\nRaises:\n    OneError, Two: if a. Three: if b.\n    as `score`, sometimes.", lambda n: f"#{n}"
    )
    assert re.findall("<dd>(.*?)</dd>", shown)[:2] == ["if a.", "if b."]
    assert re.findall('href="#(.*?)"', shown) == ["OneError", "Two", "Three", "score"]
    assert (
        signature("(x: Score | None)", lambda n: "#s" if n == "Score" else None) == '(x: <a href="#s">Score</a> | None)'
    )


def test_signatures_are_those_of_the_source():
    found = {
        shown.name: shown for page in PAGES for shown in entries(page) if page.slug in ("score", "project", "load")
    }
    assert (
        found["agreement"].signature
        == "(forget: Collection, retain: Collection, *, importance: str = 'abs') -> dict[Place, float]"
    )
    members = {m.name: m for m in found["LowRank"].members}
    assert members["width"].kind == "property" and members["projection"].kind == "method"
    assert "self" not in members["left"].signature and "cls" not in members["projection"].signature
    assert {m.name for m in found["Subject"].members} >= {"source", "device", "select"}
    assert "u: Float[Tensor, 'd k']" in found["LowRank"].signature and "u" not in members
    assert all(not m.name.startswith("_") or m.name in ("__call__", "__matmul__") for m in found["LowRank"].members)


@pytest.mark.parametrize("verb", cli.verbs())
def test_a_verb_is_shown_with_every_option(verb):
    command = cli.verbs()[verb]
    shown = html.unescape(verbs.verb(verb, command, nowhere))
    assert EXAMPLES[verb] in shown and all(p.opts[0] in shown or p.name.upper() in shown for p in command.params)
    assert "<dt><code>2</code></dt>" in shown


class Links(HTMLParser):
    """The anchors of a page and where its links go."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if "href" in given else []
        self.open += [] if tag in ("meta", "link", "br") else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_links(folder) -> int:
    """Every link of every page leads to a file and, where it names one, to an anchor in it; returns how many there are."""
    pages = {path.name: Links(path.read_text()) for path in folder.glob("*.html")}
    count = 0
    for name, page in pages.items():
        assert not page.open and len(set(page.anchors)) == len(page.anchors), name
        for link in page.links:
            file, _, anchor = link.partition("#")
            assert (folder / (file or name)).is_file(), f"{name}: {link}"
            assert not anchor or anchor in pages[file or name].anchors, f"{name}: {link}"
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
    assert len(list(built.glob("*.html"))) == len(PAGES) + 2


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new"), [('id="mrp"', 'id="mpr"'), ("style.css", "styles.css"), ("</section>", "")])
def test_a_broken_page_is_caught(built, tmp_path, old, new):
    for path in built.iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    page = tmp_path / "project.html"
    page.write_text(page.read_text().replace(old, new))
    with pytest.raises(AssertionError):
        check_links(tmp_path)
