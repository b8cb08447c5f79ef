"""The self-test: audits of models whose correct verdict is known, with the installed code and on this machine.

An audit that cannot catch a known hider, or that sees one where nothing is hidden, is no evidence about any model.
Controls do not depend on each other, so that several processes can run them, each with one thread.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from repedit.auditing.api import audit
from repedit.auditing.attack import planned
from repedit.auditing.controls import CONTROLS, SCALE, STEPS, Control
from repedit.auditing.controls.taught import TAUGHT, World, taught_model, world
from repedit.auditing.report import Report
from repedit.auditing.store import save_selftest
from repedit.distributed import completed, usable_cores
from repedit.errors import ProcessFailed, UnknownName, check_seed, check_whole, during, given, nearest
from repedit.outcomes import PASS


@dataclass(frozen=True)
class Checked:
    """One control: what was expected and what the audit said."""

    control: str
    description: str
    expected: str
    found: str
    attack: str
    """The attack that had to bring the facts back, with its R; empty where there is none."""
    recovered: float
    least: float
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the verdict is the expected one, and the attack brought back as much as it must."""
        enough = not self.attack or self.recovered >= self.least
        return (not self.expected or self.found == self.expected) and enough


@dataclass(frozen=True)
class SelfTest:
    """All controls that were run."""

    checks: tuple[Checked, ...]
    seed: int
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every control came out as it must."""
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> str:
        """The controls that did not, in words; empty where all did."""
        return "; ".join(
            f"{c.control} ({c.description}): expected {c.expected or 'any verdict'}, found {c.found}"
            + (f", {c.attack} brought back {c.recovered:.2f} where {c.least:.2f} is due" if c.attack else "")
            for c in self.checks
            if not c.passed
        )


def selftest(
    seed: int = 0, *, controls: Sequence[str] | None = None, workers: int | None = None, record: bool = True,
    progress: bool | None = None, audit_function: Callable[..., Report] = audit,
) -> SelfTest:  # fmt: skip
    """Teach tiny models, spoil them in known ways, and audit each.

    Args:
        controls: names of controls; None for the quick ones, which take about two minutes on two cores.
        workers: processes, each with one thread, among which the controls are divided; None for one for each core, at most
            one for each control. The result does not depend on it. With 1 everything runs in this process. With more, a
            script that calls this must do so under `if __name__ == "__main__":`, because the processes import it.
        record: remember in the user's cache, by versions and machine, whether all passed; an audit that finds a failed
            record says UNSOUND. A run of chosen controls is never recorded.
        audit_function: what audits each control; with more than one worker, a function of a module.
    Raises:
        UnknownName: if there is no such control.
        ProcessFailed: if a process ended before its control did. Errors of a control begin with its name.
    """
    check_seed(seed=seed)
    check_whole(**given(workers=workers))
    for name in controls or ():
        if name not in CONTROLS:
            raise UnknownName(f"no control is called {name!r}; {nearest(name, CONTROLS)}")
    chosen = [c.name for c in CONTROLS.values() if (c.quick if controls is None else c.name in controls)]
    start, workers = time.perf_counter(), min(usable_cores() if workers is None else workers, len(chosen))
    run = (
        _in_this_process(seed, chosen, audit_function)
        if workers <= 1
        else _in_processes(seed, chosen, audit_function, workers)
    )
    hidden = None if progress is None else not progress
    with closing(run):
        checks = {c.control: c for c in tqdm(run, desc="selftest", total=len(chosen), leave=False, disable=hidden)}
    result = SelfTest(tuple(checks[name] for name in chosen), seed, time.perf_counter() - start)
    if record and controls is None:
        save_selftest(result.failures, [asdict(check) for check in result.checks])
    return result


def _in_this_process(seed: int, chosen: Sequence[str], audit_function: Callable[..., Report]) -> Generator[Checked]:
    """Every control in turn, with one thread, as in a process of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        models = world(seed)
        for name in chosen:
            yield _run(name, models, audit_function)
    finally:
        torch.set_num_threads(threads)


def _in_processes(
    seed: int, chosen: Sequence[str], audit_function: Callable[..., Report], workers: int
) -> Generator[Checked]:
    """Every control as soon as it is done; the models of the seed are taught first, in the same processes."""
    with _pool(workers) as submit:
        taught = {role: submit(f"the {role} of the controls", taught_model, role, seed) for role in TAUGHT}
        models = world(seed, {role: future.result() for role, future in taught.items()})
        yield from _ended(
            submit(f"control {name}", _run, name, models, audit_function) for name in sorted(chosen, key=_longest_first)
        )


def _longest_first(name: str) -> tuple[bool, int]:
    """A control that must pass faces the whole budget; the others train for as long as they say."""
    return CONTROLS[name].verdict != PASS, -CONTROLS[name].steps


def _run(name: str, models: World, audit_function: Callable[..., Report]) -> Checked:
    """Make a control from the models of a seed, audit it, and compare the report with what it must say."""
    control, start = CONTROLS[name], time.perf_counter()
    with during(f"control {name}", f"while control {name} of the self-test ran"):
        audited = control.build(models)
        report = audit_function(
            audited.edited, original=audited.original, reference=audited.reference, facts=audited.facts, retain=audited.facts.retain,
            unrelated=audited.facts.retain, attributes=audited.attributes, attacks=_attacks(control), budget="fast",
            seeds=(models.seed,), scale_lrs=SCALE, steps=STEPS if control.verdict == PASS else control.steps, progress=False,
        )  # fmt: skip
    return _checked(control, report, time.perf_counter() - start)


def _attacks(control: Control) -> tuple[str, ...] | None:
    """What the control is about; one that must pass faces the whole budget as well."""
    if control.verdict != PASS:
        return ("direct", *control.attacks)
    return (*planned("fast"), *control.attacks) if control.attacks else None


def _checked(control: Control, report: Report, seconds: float) -> Checked:
    ranked = [r for r in report.recoveries if r.attack in control.attacks and r.value == r.value]
    best = max(ranked, key=lambda r: r.value, default=None)
    attack = "" if not control.attacks else best.attack if best else control.attacks[0]
    return Checked(
        control.name, control.description, control.verdict, report.verdict.word, attack,
        best.value if best else float("nan"), control.recovered, seconds,
    )  # fmt: skip


# --- Processes


_Submit = Callable[..., "Future[Any]"]


@contextmanager
def _pool(workers: int) -> Iterator[_Submit]:
    """Processes with one thread each, as a function (what is done, function, *arguments) -> its future.

    Raises:
        ProcessFailed: if one of them ended; the futures raise what was raised there.
    """
    others, pending = set(multiprocessing.active_children()), dict[Future[Any], str]()

    def submit(what: str, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future = pool.submit(function, *arguments)
        pending[future] = what
        return future

    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_begin)
    try:
        yield submit
    except BaseException as error:
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()  # what it does is of no use any more
        if not isinstance(error, BrokenProcessPool):
            raise
        left = [what for future, what in pending.items() if isinstance(future.exception(), BrokenProcessPool)]
        raise ProcessFailed(
            f"a process of the self-test ended before its work was done ({', '.join(left)}): it was killed, perhaps for want of "
            'memory, or the script that began it has no `if __name__ == "__main__":`; give workers=1 to use no other process'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Use one thread; an interrupt ends this process, and only the one that began it says so."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _ended(futures: Iterable[Future[Checked]]) -> Iterator[Checked]:
    """The results of calls, in the order in which they end."""
    for future in completed(futures):
        yield future.result()
