"""Attacks that a user writes: registered beside those of the package, given T only if they say so, and never stored."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

import repedit as rp
from repedit.auditing.attack import _RECORDS, _of_package, records
from repedit.auditing.attacks.prompts import DIRECT, direct
from repedit.errors import ArgumentError
from tests.taught_models import facts, original, reference


@pytest.fixture(autouse=True)
def own_records(tmp_path, monkeypatch):
    """What a test registers is gone after it, and it shares no findings."""
    monkeypatch.setenv("REPEDIT_CACHE", str(tmp_path / "cache"))
    before = dict(records())
    yield
    _RECORDS.clear()
    _RECORDS.update(before)


def registered(answers, *, name="mine", **record):
    """A registered attack that asks what `answers` makes of its splits."""

    def run(subject, splits, seed):
        return rp.attack.AttackResult({"only": rp.attack.ask(subject, answers(splits))})

    made = rp.attack.AttackRecord(
        name, build=lambda setup: [rp.attack.Attack(made, {}, run, rp.attack.Work(1))], draws=False, **record
    )
    return rp.attack.register(made)


def audited(tmp_path, **options):
    few = replace(facts(), forget=facts().forget[:20], retain=facts().retain[:16])
    given = {
        "original": original(),
        "facts": few,
        "attacks": ["mine"],
        "allow_small": True,
        "draws": 200,
        "progress": False,
    }
    return rp.audit(reference(), **(given | {"out": tmp_path / "audit"} | options))


def test_an_attack_that_reads_t_says_so_or_is_refused(tmp_path):
    def asked_after_reading(splits):
        assert len(splits.train) > 0
        return splits.test

    registered(asked_after_reading)
    with pytest.raises(
        ArgumentError,
        match=r"attacking the .* model: attack 'mine': splits.train is read.*uses_train=False.*uses_train=True",
    ):
        audited(tmp_path)
    registered(asked_after_reading, uses_train=True)
    assert audited(tmp_path).finding("edited", "mine").status == "ran"


def test_splits_without_t_are_otherwise_those_of_the_audit():
    splits = rp.data.Splits((), facts().forget[:4], facts().retain[:3], holdout=("text",))
    given = []
    record = registered(lambda given_splits: given.append(given_splits) or given_splits.test)
    record.build(rp.attack.Setup())[0](original(), splits)
    names = ("test", "retain", "unrelated", "holdout", "attributes")
    assert isinstance(given[0], rp.data.Splits) and all(getattr(given[0], n) == getattr(splits, n) for n in names)
    with pytest.raises(ArgumentError, match=r"^splits\.train is read"):
        replace(given[0], test=())


def test_a_changed_attack_is_made_anew(tmp_path):
    """The code of an attack of the package is part of the key of its findings; that of others is not."""
    calls = []
    for version in (1, 2):
        registered(lambda splits, version=version: calls.append(version) or splits.test)
        audited(tmp_path)
    assert calls.count(1) == calls.count(2) > 0
    assert not registered(lambda splits: splits.test).build(rp.attack.Setup())[0].storable and direct().storable


def test_names_of_the_package_are_taken_before_it_is_used_and_own_ones_are_replaced():
    for name in ("prefix", "gcg"):
        with pytest.raises(ArgumentError, match=f"attack {name!r} is registered already"):
            registered(lambda splits: splits.test, name=name)
    first, second = (registered(lambda splits: splits.test) for _ in range(2))
    assert _RECORDS["mine"] is second is not first


def test_of_package_tells_functions_of_the_package_from_others():
    assert _of_package(DIRECT.build) and _of_package(direct().run) and not _of_package(registered)


def test_a_name_is_taken_before_the_attacks_of_the_package_were_needed():
    script = "import repedit as rp\nrp.attack.register(rp.attack.AttackRecord('prefix', build=lambda setup: []))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode and "attack 'prefix' is registered already; give another name" in done.stderr
