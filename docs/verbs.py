"""The page of the command line, read from the commands themselves."""

from __future__ import annotations

import html
import inspect
from typing import Any

from docs.prose import Linked, inline, rendered
from repedit.cli.examples import EXAMPLES, codes


def summary(command: Any) -> str:
    """The first line of a verb's help."""
    return str(command.help).split("\n\n")[0].replace("\n", " ")


def verb(name: str, command: Any, linked: Linked) -> str:
    """A verb with its example, its parameters and its exit codes."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = " ".join([f"repedit {name}", *(_argument(p) for p in arguments), "[OPTIONS]"])
    ends = "".join(f"<dt><code>{code}</code></dt><dd>{html.escape(text)}</dd>" for code, text in codes(name).items())
    return f"""<section class="entry" id="{name}">
<h3><a href="#{name}">repedit {name}</a></h3>
{rendered(inspect.cleandoc(command.help), linked)}
<h5>Example</h5><pre>{html.escape(EXAMPLES.get(name, ""))}</pre>
<h5>Usage</h5><pre>{html.escape(usage)}</pre>
<table class="options"><thead><tr><th>Argument or option</th><th>Default</th><th>What it says</th></tr></thead>
<tbody>{"".join(_row(parameter, linked) for parameter in command.params)}</tbody></table>
<h5>Exit codes</h5><dl class="codes">{ends}</dl>
</section>"""


def _argument(parameter: Any) -> str:
    shown = parameter.name.upper() + ("..." if parameter.nargs == -1 else "")
    return shown if parameter.required else f"[{shown}]"


def _row(parameter: Any, linked: Linked) -> str:
    if parameter.param_type_name == "argument":
        shown, kind = parameter.name.upper(), "" if parameter.required else "optional"
    else:
        shown = ", ".join((*parameter.opts, *parameter.secondary_opts))
        kind = "repeatable" if parameter.multiple else ""
    default = "needed" if parameter.required else _default(parameter.default)
    note = f' <span class="kind">{kind}</span>' if kind else ""
    return f"<tr><td><code>{html.escape(shown)}</code>{note}</td><td>{default}</td><td>{inline(parameter.help or '', linked)}</td></tr>"


def _default(value: Any) -> str:
    if value is None or value is False or value == []:
        return ""
    return "yes" if value is True else f"<code>{html.escape(str(value))}</code>"
