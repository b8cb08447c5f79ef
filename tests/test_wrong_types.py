"""Every public function, method and dataclass refuses an argument of another type by name, before it does anything."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from beartype import BeartypeConf
from beartype.door import is_bearable
from jaxtyping import Bool
from torch import Tensor

import repedit as rp
from repedit.arguments import checked
from repedit.errors import ArgumentError, DataError, NotAModel, RepeditError
from repedit.io.text import json_copy
from tests.public_callables import Public, public_callables, sample
from tests.teachable_models import blank, facts

PUBLIC = public_callables()
WRONG: tuple[Any, ...] = (None, 5, object(), "text", {}, 0.5, b"bytes", [object()])
TOWER = BeartypeConf(is_pep484_tower=True)
pytestmark = pytest.mark.usefixtures("unchecked")


def needed(public: Public, name: str) -> dict[str, Any]:
    """A value for every other parameter that has no default."""
    parameters = inspect.signature(public.call).parameters
    empty = [p.name for p in parameters.values() if p.default is p.empty]
    return {
        key: sample(hint) for key, hint in public.hints.items() if key in empty and key not in (name, public.repeated)
    }


def given(public: Public, name: str, value: Any) -> None:
    """Call with one argument, and a value of the right type for every other that is needed."""
    others = needed(public, name)
    if name == public.repeated:
        public.call(*public.fixed, *map(sample, public.ahead.values()), value)
    elif name in public.positional:
        public.call(*public.fixed, value, **others)
    else:
        ahead = [others.pop(key) for key in public.positional]
        public.call(*public.fixed, *ahead, **{name: value}, **others)


def refuses_other_types(public: Public) -> None:
    """The law: beartype says which values do not have the type of a parameter; each is refused with its name."""
    for name, hint in public.hints.items():
        for value in WRONG:
            if not is_bearable(value, hint, conf=TOWER):
                with pytest.raises(RepeditError) as caught:
                    given(public, name, value)
                assert re.search(rf"\b{re.escape(name)}\b", str(caught.value)), (name, value, caught.value)


@pytest.mark.parametrize("name", PUBLIC)
def test_an_argument_of_another_type_is_refused(name):
    refuses_other_types(PUBLIC[name])


def test_the_walk_finds_the_doors():
    assert {
        "repedit.score",
        "repedit.Edit",
        "repedit.Site.parse",
        "repedit.fit.leace",
        "repedit.unlearning.recipes.npo",
    } <= {*PUBLIC}
    assert len(PUBLIC) > 300


def test_a_door_without_the_check_is_caught():
    def door(scores: Sequence[float]) -> float:
        return scores[0]

    with pytest.raises(TypeError, match="not subscriptable"):
        refuses_other_types(Public(door, {"scores": Sequence[float]}))


@checked
def door(
    number: int = 1, share: float | None = None, *names: str, paths: Sequence[str | Path] = (), sides: Literal["all", "output"] = "all",
    table: Mapping[str, int] | None = None, pair: tuple[float, float] = (0, 1), facts: rp.data.Facts | Iterable[rp.data.Fact] = (),
    change: rp.Edit | rp.Delta | None = None, lm: rp.Subject | None = None, keep: Bool[Tensor, " d"] | None = None,
) -> bool:  # fmt: skip
    return True


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"number": 1.5}, ArgumentError, r"^number=1\.5: a float was given where a whole number is needed$"),
        ({"number": True}, ArgumentError, r"^number=True: a bool was given where a whole number is needed$"),
        ({"number": None}, ArgumentError, r"^number: None was given where a whole number is needed$"),
        ({"share": "0.1"}, ArgumentError, r"^share='0\.1': a str was given where a number or None is needed$"),
        ({"paths": "a"}, ArgumentError, r"^paths='a': a str was given where a list of str or Path is needed$"),
        ({"paths": ["a", 5]}, ArgumentError, r"^paths\[1\]=5: an int was given where a str or a path is needed$"),
        ({"sides": "none"}, ArgumentError, r"^sides='none': a str was given where 'all' or 'output' is needed$"),
        ({"table": {"a": "b"}}, ArgumentError, r"^table\['a'\]='b': a str was given where a whole number is needed$"),
        ({"table": {1: 2}}, ArgumentError, r"^a key of table=1: an int was given where a str is needed$"),
        ({"pair": (0.0,)}, ArgumentError, r"^pair: a tuple was given where a list of 2 is needed$"),
        ({"facts": "capitals"}, DataError, r"was given where Facts or a list of Fact is needed; give repedit\.data\.facts"),
        ({"facts": [3]}, DataError, r"^facts\[0\]=3: an int was given where a Fact is needed; .* is a list of facts$"),
        ({"change": {}}, ArgumentError, r"where an Edit, a Delta or None is needed; .*Edit\.load .*; .*Delta\.load"),
        ({"lm": "model"}, NotAModel, r"where a Subject or None is needed; make one with repedit\.load\(path\)"),
        ({"keep": [True]}, ArgumentError, r"^keep: a list was given where a tensor or None is needed$"),
        ({"number": "9" * 500}, ArgumentError, r"^number='9+\.\.\.9+': a str was given"),
    ],
)  # fmt: skip
def test_the_message_says_what_was_given_and_what_is_needed(wrong, error, message):
    with pytest.raises(error, match=message):
        door(**wrong)


def test_each_of_any_number_of_arguments_is_checked():
    with pytest.raises(ArgumentError, match=r"^names=3: an int was given where a str is needed$"):
        door(1, 0.5, "a", 3)


@pytest.mark.parametrize(
    "right",
    [
        {"number": np.int64(3)}, {"share": 1}, {"share": np.float32(0.5)}, {"paths": (Path("a"), "b")}, {"paths": np.array(["a"])},
        {"pair": [0, 1]}, {"pair": np.zeros(2)}, {"facts": iter(())}, {"facts": rp.data.facts("capitals")}, {"keep": torch.ones(3, dtype=torch.bool)},
    ],
    ids=lambda given: ",".join(f"{name}-{type(value).__name__}" for name, value in given.items()),
)  # fmt: skip
def test_values_that_python_uses_in_their_place_are_taken(right):
    assert door(**right)


def numbers_of_numpy_are_those_of_python(call: Callable[..., object]) -> None:
    for value in (np.int64(3), np.float32(0.5), np.float64(0.5), np.uint8(3)):
        assert type(call(value)) in (int, float)
    assert call(np.bool_(True)) is True


def test_numbers_of_numpy_arrive_as_those_of_python():
    """A record that holds one could not be written."""

    @checked
    def same(value: Any) -> Any:
        return value

    @dataclass(frozen=True)
    @checked
    class Holds:
        value: Any

    numbers_of_numpy_are_those_of_python(same)
    numbers_of_numpy_are_those_of_python(lambda value: Holds(value).value)
    numbers_of_numpy_are_those_of_python(lambda value: json_copy({"a": [value]}, "x")["a"][0])
    with pytest.raises(AssertionError):
        numbers_of_numpy_are_those_of_python(lambda value: value)
    for value in (np.str_("a"), np.zeros(2), np.array(3)):
        assert same(value) is value


def test_an_edit_of_a_rank_of_numpy_is_made_and_saved(tmp_path):
    subject = blank()
    edit = rp.mrp(
        subject, forget=facts(0, 4), retain=facts(8, 12), rank=np.int64(1), sites="0.mlp.out", text=None,
        config={"steps": np.int64(1), "seed": np.int32(0)},
    )  # fmt: skip
    edit.save(tmp_path / "e.safetensors")
    assert rp.Edit.load(tmp_path / "e.safetensors").provenance["rank"] == 1


def test_a_checked_function_keeps_its_signature_and_its_name():
    assert inspect.signature(rp.score) == inspect.signature(inspect.unwrap(rp.score))
    assert rp.score.__name__ == "score" and rp.score.__doc__
