"""Every verb has one line that works: its options exist, and its names too."""

import inspect
import re
import shlex

import pytest
from typer.testing import CliRunner

from repedit import cli
from repedit.cli import application
from repedit.data import BUILTIN, DOMAINS
from repedit.demo import RECIPES
from repedit.models.default_model import DEFAULT
from repedit.outcomes import EXIT_CODES
from repedit.unlearning.recipes import by_name

COMMANDS = cli.verbs()


def parsed(verb: str) -> dict:
    """The parameters of a verb's example; nothing is run."""
    program, *words = shlex.split(application.EXAMPLES[verb])
    name, words = words[: len(verb.split())], words[len(verb.split()) :]
    assert (program, " ".join(name)) == ("repedit", verb)
    return COMMANDS[verb].make_context(verb, words).params


def test_every_verb_has_an_example():
    missing = set(COMMANDS) ^ set(application.EXAMPLES)
    assert not missing, f"write one line for {sorted(missing)} in repedit/cli/application.py"


@pytest.mark.parametrize("verb", application.EXAMPLES)
def test_an_example_parses_and_its_names_exist(verb):
    given = parsed(verb)
    for key in ("model", "base", "original"):
        assert given.get(key) in (None, DEFAULT)
    for key in ("facts", "forget", "retain", "text"):
        for name in given[key] if isinstance(given.get(key), list) else (given.get(key) or "").split(","):
            assert name.split(":")[0] in ("", "class", "mislabelled", *BUILTIN, *DOMAINS)
    if verb == "vision demo":
        assert set(given["recipe"]) <= set(RECIPES)
    elif "recipe" in given:
        assert by_name(given["recipe"])


@pytest.mark.parametrize(
    "broken", ["repedit fetch --nothing", "repedit fetch a b", "repedit inspect", "repedit prune m"]
)
def test_an_example_that_does_not_parse_is_caught(broken, monkeypatch):
    verb = broken.split()[1]
    monkeypatch.setitem(application.EXAMPLES, verb, broken)
    with pytest.raises(Exception, match=r"No such option|unexpected extra argument|Missing|required"):
        parsed(verb)


@pytest.mark.parametrize("verb", application.EXAMPLES)
def test_help_ends_with_the_example(verb):
    shown = CliRunner().invoke(cli.app, [*verb.split(), "--help"], terminal_width=200).output
    assert re.sub(r"\s+", " ", application.EXAMPLES[verb]) in re.sub(r"\s+", " ", shown)


def test_exit_codes_are_those_of_the_source():
    for verb, module in (("prune", cli.neurons), ("unlearn", cli.unlearn)):
        raised = {int(n) for n in re.findall(r"typer.Exit\((\d)\)", inspect.getsource(module))}
        assert raised == set(application.VERB_EXIT_CODES[verb])
    told = set(EXIT_CODES.values())
    assert told == set(application.VERB_EXIT_CODES["audit"]) and application.exit_codes("audit").keys() == told | {
        1,
        2,
        130,
        141,
    }
    assert set(application.VERB_EXIT_CODES) <= set(COMMANDS)
