"""The parts of the SemEval score as bars: an aggregate hides which of them is zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repedit.data.tasks import TASKS
from repedit.errors import ArgumentError
from repedit.metrics.semeval import SemEvalScore
from repedit.metrics.semeval.score import MEASURES, SIDES
from repedit.plot.canvas import SERIES, canvas, entitle, legend_below, named, plain_texts
from repedit.plot.cells import counted

HATCHES = ("", "//", "..", "xx", "--", "\\\\")
MOST = len(HATCHES)
"""Models in one figure; more bars could not be told apart."""


@plain_texts
def semeval(scores: Mapping[str, SemEvalScore] | SemEvalScore, *, notes: Sequence[str] = ()) -> Figure:
    """The 12 parts of each model's score as bars, forget above and retain below, with every verdict in the title.

    Bars are as measured: on the forget side less is better. Below stand the numbers that the parts are made into.

    Args:
        scores: name -> score, or one score.
        notes: what else the title should tell.
    Raises:
        ArgumentError: if there is no score, or there are more than 6.
    """
    by_name = {"model": scores} if isinstance(scores, SemEvalScore) else dict(scores)
    if not 1 <= len(by_name) <= MOST:
        raise ArgumentError(f"semeval() was given {len(by_name)} scores; it draws 1 to {MOST}")
    figure = canvas(9.0, 6.6 + 0.2 * len(by_name))
    for axes, side in zip(figure.subplots(2, 1), SIDES, strict=True):
        _bars(axes, side, by_name)
    legend_below(figure, figure.axes[0], columns=1)
    verdicts = [
        score.verdict if len(by_name) == 1 else f"{named(name)}: {score.verdict}" for name, score in by_name.items()
    ]
    entitle(figure, "SemEval-2025 Task 4, part by part", [*verdicts, counted(len(by_name), "model"), *notes])
    return figure


def _bars(axes: Axes, side: str, scores: Mapping[str, SemEvalScore]) -> None:
    """Six groups, one bar a model in each."""
    groups = [(task, measure) for measure in MEASURES for task in TASKS]
    width = 0.8 / len(scores)
    for number, (name, score) in enumerate(scores.items()):
        shift = (number - (len(scores) - 1) / 2) * width
        values = [score.parts[f"{side}/{task}/{measure}"] for task, measure in groups]
        bars = axes.bar(
            [i + shift for i in range(len(groups))], values, 0.92 * width, color=SERIES[number], hatch=HATCHES[number],
            edgecolor="white", label=named(_label(name, score), 90),
        )  # fmt: skip
        # Room for two digits above a bar of .8 / 3 of a group; with more models they would touch.
        if len(scores) <= 3:
            axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=1)
    axes.set_xticks(range(len(groups)), [f"{task}\n{measure}" for task, measure in groups])
    better = "less" if side == "forget" else "more"
    axes.set(ylim=(0, 1.12), yticks=(0, 0.25, 0.5, 0.75, 1), ylabel=f"{side}: {better} is better")
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)


def _label(name: str, score: SemEvalScore) -> str:
    return (
        f"{name}: task aggregate {score.task_aggregate:.3f}, membership {score.membership:.3f}, MMLU {score.mmlu:.3f}, "
        f"final {score.final:.3f}; {score.verdict}"
    )
