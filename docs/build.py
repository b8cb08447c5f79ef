"""Write the reference: `python -m docs.build [folder]`; build/docs by default, where no file of it is kept by git."""

from __future__ import annotations

import html
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import repedit as rp
from docs import groups, verbs
from docs.groups import Page
from docs.prose import Linked, inline, rendered, signature
from docs.reading import Entry, entry, first_sentence
from repedit import cli

VERBS = "command-line"
START = """import repedit as rp

lm = rp.load("smollm2-135m")
scores = rp.score(rp.collect(lm, rp.data.code()), rp.collect(lm, rp.data.prose()))
edit = rp.prune(scores, fraction=0.05)
rp.export(edit, source=lm, target="edited/")"""


def build(folder: Path) -> list[Path]:
    """Every page, written to a folder that is made anew; returns their paths."""
    pages = groups.pages()
    entries = {page.slug: [entry(name, getattr(page.home, name), page.home) for name in page.names] for page in pages}
    places = _places(pages, entries)
    written = {"index": _index(pages, entries, places)}
    for page in pages:
        written[page.slug] = _page(page, entries[page.slug], places, pages)
    linked = _linked(places, VERBS, "rp")
    body = "".join(verbs.verb(name, command, linked) for name, command in cli.verbs().items())
    written[VERBS] = f"<h1>Command line</h1>{_verb_list()}{body}"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("style.css"), folder)
    for slug, text in written.items():
        (folder / f"{slug}.html").write_text(_whole(slug, text, pages), encoding="utf-8")
    return sorted(folder.glob("*.html"))


def _places(pages: list[Page], entries: Mapping[str, list[Entry]]) -> dict[str, str]:
    """Dotted name -> page and anchor, of every name, member, room and verb."""
    found = {f"repedit {name}": f"{VERBS}.html#{name}" for name in cli.verbs()}
    for page in pages:
        if page.room:
            found[page.prefix] = f"{page.slug}.html"
        for shown in entries[page.slug]:
            found[f"{page.prefix}.{shown.name}"] = f"{page.slug}.html#{shown.name}"
            found |= {
                f"{page.prefix}.{shown.name}.{m.name}": f"{page.slug}.html#{shown.name}.{m.name}" for m in shown.members
            }
    return found


def _linked(places: Mapping[str, str], slug: str, prefix: str) -> Linked:
    """What a name on one page stands for: a name of that page's room, or of rp."""

    def place(text: str) -> str | None:
        words = text.split()
        if words[:1] == ["repedit"] and len(words) > 1:
            return places.get(f"repedit {words[1]}")
        name = re.sub(r"\(.*", "", text).removeprefix("repedit.").removeprefix("rp.").strip()
        found = places.get(f"{prefix}.{name}") or places.get(f"rp.{name}") or places.get(f"rp.errors.{name}")
        return found.removeprefix(f"{slug}.html") if found and "#" in found else found

    return place


def _page(page: Page, shown: list[Entry], places: Mapping[str, str], pages: list[Page]) -> str:
    linked = _linked(places, page.slug, page.prefix)
    opening = rendered((page.module.__doc__ or "").strip(), linked) if page.module is not None else ""
    inside = [other for other in pages if page.room and other.prefix.rpartition(".")[0] == page.prefix]
    rows = "".join(_room(room, linked) for room in inside)
    if len(shown) > 1:
        rows += "".join(_line(e, f"#{e.name}", e.name, linked) for e in shown)
    overview = f'<table class="overview">{rows}</table>' if rows else ""
    body = "\n".join(_entry(e, page.prefix, linked) for e in shown)
    return f"<h1>{_title(page)}</h1>{opening}{overview}{body}"


def _index(pages: list[Page], entries: Mapping[str, list[Entry]], places: Mapping[str, str]) -> str:
    linked = _linked(places, "index", "rp")
    found = [
        f"<h1>repedit {rp.__version__}</h1>",
        rendered(rp.__doc__ or "", linked),
        f"<pre>{html.escape(START)}</pre>",
    ]
    for page in pages:
        if page.room:
            continue
        rows = "".join(_line(e, f"{page.slug}.html#{e.name}", f"rp.{e.name}", linked) for e in entries[page.slug])
        found.append(f'<h2><a href="{page.slug}.html">{page.title}</a></h2><table class="overview">{rows}</table>')
    rows = "".join(_room(page, linked) for page in pages if page.room)
    found.append(
        f'<h2>Rooms</h2><table class="overview">{rows}</table><h2><a href="{VERBS}.html">Command line</a></h2>'
    )
    return "\n".join([*found, _verb_list(f"{VERBS}.html")])


def _room(page: Page, linked: Linked) -> str:
    """A room with its first sentence."""
    text = inline(first_sentence((page.home.__doc__ or "").strip()), linked)
    return f'<tr><td><a href="{page.slug}.html"><code>{page.prefix}</code></a></td><td>{text}</td></tr>'


def _verb_list(file: str = "") -> str:
    rows = "".join(
        f'<tr><td><a href="{file}#{name}"><code>{name}</code></a></td><td>{html.escape(verbs.summary(command))}</td></tr>'
        for name, command in cli.verbs().items()
    )
    return f'<table class="overview">{rows}</table>'


def _line(shown: Entry, place: str, name: str, linked: Linked) -> str:
    return f'<tr><td><a href="{place}"><code>{name}</code></a></td><td>{inline(shown.summary, linked)}</td></tr>'


def _entry(shown: Entry, prefix: str, linked: Linked) -> str:
    members = "\n".join(_member(shown.name, m, linked) for m in shown.members)
    return f"""<section class="entry" id="{shown.name}">
<h3><a href="#{shown.name}"><span class="prefix">{prefix}.</span>{shown.name}</a> <span class="kind">{shown.kind}</span></h3>
<pre class="signature"><b>{shown.name}</b>{signature(shown.signature, linked)}</pre>
{rendered(shown.text, linked)}
{f'<div class="members">{members}</div>' if members else ""}
</section>"""


def _member(owner: str, shown: Entry, linked: Linked) -> str:
    name = f"{owner}.{shown.name}"
    return f"""<div class="member" id="{name}">
<pre class="signature"><a href="#{name}"><b>{shown.name}</b></a>{signature(shown.signature, linked)}</pre>
{rendered(shown.text, linked)}
</div>"""


def _title(page: Page) -> str:
    return f"<code>{page.title}</code>" if page.room else page.title


def _whole(slug: str, body: str, pages: list[Page]) -> str:
    """A page with its way to the others."""
    tasks = [("index", "Overview"), *((p.slug, p.title) for p in pages if not p.room), (VERBS, "Command line")]
    rooms = [(p.slug, p.prefix) for p in pages if p.room]

    def items(rows: list[tuple[str, str]]) -> str:
        return "".join(
            f'<li><a {"class=here " if s == slug else ""}href="{s}.html">{html.escape(title)}</a></li>'
            for s, title in rows
        )

    title = next(title for s, title in (*tasks, *rooms) if s == slug)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)} - repedit</title><link rel="stylesheet" href="style.css"></head>
<body><nav><a class="brand" href="index.html">repedit</a><ul>{items(tasks)}</ul><h4>Rooms</h4><ul class="rooms">{items(rooms)}</ul></nav>
<main>{body}</main></body></html>
"""


if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "build" / "docs"
    print(f"{len(build(place))} pages in {place}")
