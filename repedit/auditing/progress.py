"""The progress bar of an audit: the verdict so far, the running attack, and the time that is left."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from types import TracebackType
from typing import NamedTuple

from tqdm.auto import tqdm

from repedit.auditing.attack import Attack

STEP = 20
"""Questions that take as long as a training step; used until a finding of either kind has been measured."""
_FORMAT = "{desc}: {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class Part(NamedTuple):
    """A part of an audit: an attack on one model, and how many facts it is asked."""

    model: str
    attack: Attack
    facts: int

    @property
    def work(self) -> float:
        """Its work in questions."""
        return float(self.attack.work.questions * self.facts + STEP * self.attack.work.steps)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What its rate is taken from, the most alike first: the same attack, those that train or do not, all."""
        same = f"{self.attack.name} {sorted(self.attack.options.items(), key=str)}"
        return same, "trains" if self.attack.record.trains else "asks", ""


class TimeLeft:
    """Seconds that parts of an audit take, learned from the seconds that others took.

    seconds = work * rate; the rate is seconds over work of the parts that were made with the same attack, else of those
    that train, or that do not, else of all.
    """

    def __init__(self) -> None:
        self._totals: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))

    def learn(self, part: Part, seconds: float) -> None:
        """Take note of how long a part took."""
        for kind in part.kinds if seconds > 0 and part.work > 0 else ():
            total, work = self._totals[kind]
            self._totals[kind] = total + seconds, work + part.work

    def seconds(self, parts: Iterable[Part]) -> float | None:
        """How long these parts take; None before anything was learned."""
        rates = {kind: seconds / work for kind, (seconds, work) in self._totals.items()}
        if not rates:
            return None
        return float(sum(part.work * next(rates[kind] for kind in part.kinds if kind in rates) for part in parts))


class Bar:
    """A progress bar over the parts of an audit; those that are stored take no time, and teach how long others take."""

    def __init__(self, parts: Iterable[Part], stored: Iterable[tuple[Part, float]], shown: bool | None) -> None:
        self._left, self._time, self.verdict = list(parts), TimeLeft(), ""
        """The verdict so far, empty while there is none."""
        self._stored = set()
        for part, seconds in stored:
            self._time.learn(part, seconds)
            self._stored.add(id(part))
        disable = None if shown is None else not shown
        self._bar = tqdm(total=len(self._left), desc="audit", leave=False, disable=disable, bar_format=_FORMAT)

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def begin(self, part: Part) -> None:
        """Show which part is at work."""
        seconds = self._time.seconds(p for p in self._left if id(p) not in self._stored)
        so_far = f"{self.verdict} so far" if self.verdict else ""
        left = "" if seconds is None else f"at most {_duration(seconds)} left"
        self._bar.set_postfix_str("; ".join(filter(None, (so_far, f"{part.model}: {part.attack.name}", left))))

    def end(self, part: Part, seconds: float) -> None:
        """Take note of a part that is done."""
        if id(part) not in self._stored:
            self._time.learn(part, seconds)
        self._left = [p for p in self._left if p is not part]
        self._bar.update()


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
