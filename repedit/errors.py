"""Every error repedit raises, in one hierarchy.

Each message states what was asked, what is there and what to do. A second base class lets `except ValueError` and the like
work.

    RepeditError
    |- ArgumentError (ValueError)              a value out of range, or a missing partner argument
    |  |- FractionError, RankError
    |  |- UnknownName                          an option, method or corpus name; names the nearest valid ones
    |  |  `- UnknownSite
    |  |- SelectionError                       nothing selected, or constraints that cannot be met together
    |  `- UnsuitableImportance                 a score known to mislead here; states the measured number
    |- ShapeError, DeviceError (ValueError), DtypeError (TypeError)
    |- DataError (ValueError)                  a bad row, field or empty set
    |  |- OverlapError, NotEnoughRows, NotFinite
    |  |- NothingLeft, NoSignal                a fit that has nothing to remove
    |- MetricError (ValueError)                values that give no metric: NaN, out of range, of different questions
    |- NotConverged, TrainingError (RuntimeError), TooLarge (MemoryError)
    |- HookError (RuntimeError)                a hook that a forward pass did not run, or could not
    |  `- ModelBusy                            another thread uses the model
    |- MissingStatistic (ValueError), NoGradient (RuntimeError)
    |- NotFound (FileNotFoundError), NotAModel (TypeError), UnknownArchitecture (ValueError)
    |- QuantizedModel, OffloadedTensors, FingerprintError (ValueError)
    |- CheckpointError (OSError), TargetExists (FileExistsError)
    |- NotFoldable (ValueError)
    |  |- NoBiasSlot
    |  `- NotSlimmable, NotSliceable           the removed neurons or directions cannot be cut out exactly
    |- PlanMismatch (RuntimeError), NoOpEdit, BadReference (ValueError)
    |- ReportError (RuntimeError)              a page or figure of a report could not be written; the other files exist
    |- HubError (OSError)                      the hub refuses an upload, or cannot be reached
    |- KernelUnavailable (RuntimeError)        a kernel was asked for by name and cannot run here
    `- MissingDependency (ImportError)
"""

import difflib
import math
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any


class RepeditError(Exception):
    """The root of every error repedit raises on purpose."""


class ArgumentError(RepeditError, ValueError):
    """An argument is out of range, or needs another argument that is missing."""


class FractionError(ArgumentError):
    """A fraction lies outside [0, 1]."""


class RankError(ArgumentError):
    """A rank is negative or larger than the width."""


class UnknownName(ArgumentError):
    """An option, method or corpus name that does not exist."""


class UnknownSite(UnknownName):
    """A site or selector that names nothing in this model."""


class SelectionError(ArgumentError):
    """Nothing was selected, or the constraints cannot be met together."""


class UnsuitableImportance(ArgumentError):
    """An importance that is known to mislead in this setting."""


class ShapeError(RepeditError, ValueError):
    """Two shapes that must agree do not."""


class DtypeError(RepeditError, TypeError):
    """A tensor has a dtype that the operation does not support."""


class DeviceError(RepeditError, ValueError):
    """Two tensors that must be on one device are not."""


class DataError(RepeditError, ValueError):
    """A data set is empty, or a row of it is malformed."""


class OverlapError(DataError):
    """Two sets that must be disjoint share rows."""


class NotEnoughRows(DataError):
    """Too few rows remain after the counting rule."""


class NotFinite(DataError):
    """A weight, activation or loss is NaN or infinite."""


class NothingLeft(DataError):
    """The forget set has no energy outside what the retain set uses."""


class NoSignal(DataError):
    """The labels or classes do not differ, so there is nothing to erase."""


class MetricError(RepeditError, ValueError):
    """Values from which no meaningful metric can be computed."""


class TrainingError(RepeditError, RuntimeError):
    """Training cannot continue: the loss is not finite, or a batch has nothing to learn from."""

    delta: object | None = None
    """What gradient unlearning had changed up to the last good step, a Delta; None elsewhere."""


class HookError(RepeditError, RuntimeError):
    """A hook did not run in the forward pass it was installed for, or had nothing to act on."""


class ModelBusy(HookError):
    """Another thread uses the model."""


class NotConverged(RepeditError, RuntimeError):
    """An eigen-solver stopped before its residual was small."""


class TooLarge(RepeditError, MemoryError):
    """A statistic would need more memory than is free."""


class MissingStatistic(RepeditError, ValueError):
    """A score or fill needs a statistic that was not collected."""


class NoGradient(RepeditError, RuntimeError):
    """Gradients were asked for where none can be computed."""


class NotFound(RepeditError, FileNotFoundError):
    """A model, file or corpus does not exist."""


class NotAModel(RepeditError, TypeError):
    """The object is not a model that repedit can wrap."""


class UnknownArchitecture(RepeditError, ValueError):
    """No row of the family table fits this model."""


class QuantizedModel(RepeditError, ValueError):
    """The weights are quantised and cannot be edited."""


class OffloadedTensors(RepeditError, ValueError):
    """Some weights are not in memory (meta device)."""


class FingerprintError(RepeditError, ValueError):
    """Values that belong to different models were used together."""


class CheckpointError(RepeditError, OSError):
    """A checkpoint on disk is missing a file, corrupt, unsafe or cannot be written."""

    delta: object | None = None
    """What a gradient unlearning had changed when its log or its saved state could not be written; None elsewhere."""


class TargetExists(RepeditError, FileExistsError):
    """The target of an export exists already."""


class ReportError(RepeditError, RuntimeError):
    """A page or a figure of a report could not be written; its other files exist."""


class NotFoldable(RepeditError, ValueError):
    """No weight equals this edit at this site."""


class NoBiasSlot(NotFoldable):
    """The edit needs a bias that this family does not have."""


class NotSlimmable(NotFoldable):
    """Pruned neurons cannot be cut out of the tensors of this model, or not by this edit."""


class NotSliceable(NotFoldable):
    """The residual stream of this model cannot be made narrower, or not by this edit."""


class PlanMismatch(RepeditError, RuntimeError):
    """The tensors touched are not the tensors planned."""


class NoOpEdit(RepeditError, ValueError):
    """The edit changes nothing."""


class ProcessFailed(RepeditError, RuntimeError):
    """Another process of the same work failed."""


class BadReference(RepeditError, ValueError):
    """A reference model is the original, or knows the facts it should never have seen."""


class HubError(RepeditError, OSError):
    """The hub refuses an upload, or cannot be reached."""


class KernelUnavailable(RepeditError, RuntimeError):
    """A kernel was asked for by name and cannot run here."""


class MissingDependency(RepeditError, ImportError):
    """An optional package is not installed, or not in a supported version."""


@contextmanager
def during(place: str, note: str) -> Iterator[None]:
    """Prefix the message of an error of repedit with a place, and add a note to any other error; every error is raised.

    Raises:
        RepeditError: of the same type, "place: message".
    """
    try:
        yield
    except RepeditError as error:
        raise type(error)(f"{place}: {error}") from error
    except Exception as error:
        error.add_note(note)
        raise


def check_names(what: str, given: Iterable[str], valid: Iterable[str], kind: str = "option") -> None:
    """Refuse a name that is not among the valid ones.

    Raises:
        UnknownName: with the nearest names.
    """
    names = list(valid)
    for name in given:
        if name not in names:
            raise UnknownName(f"{what} has no {kind} {name!r}; {nearest(name, names)}")


def check_choice(valid: Iterable[object], /, **values: str) -> None:
    """Refuse values that are not among the valid ones.

    Raises:
        UnknownName: with the name of the argument, the value and the nearest valid ones.
    """
    options = list(valid)
    for name, value in values.items():
        if value not in options:
            raise UnknownName(f"{name}={shown(value)}; {nearest(value, options)}")


def is_whole(value: object, least: int = 1) -> bool:
    """Whether a value is a whole number of at least `least` and below 2^63; True and False are not numbers."""
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) < 2**63


def is_finite(value: object) -> bool:
    """Whether a value is a finite real number; True and False are not numbers."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def plain_scalar(value: Any) -> Any:
    """A number of numpy as the number of Python that it is; any other value as it is."""
    is_scalar = type(value).__module__ == "numpy" and hasattr(value, "item") and not hasattr(value, "__len__")
    return value.item() if is_scalar else value


def given(**values: object) -> dict[str, object]:
    """The values that are not None, for checks of arguments that may be left out."""
    return {name: value for name, value in values.items() if value is not None}


def check_whole(least: int = 1, /, **values: object) -> None:
    """Refuse values that are not whole numbers of at least `least`; None is none, see `given`.

    Raises:
        ArgumentError: with the name and the value.
    """
    for name, value in values.items():
        if not is_whole(value, least):
            raise ArgumentError(f"{name}={shown(value)}; give at least {least}, a whole number below 2^63")


def check_positive(**values: object) -> None:
    """Refuse values that are not finite numbers above 0.

    Raises:
        ArgumentError: with the name and the value.
    """
    for name, value in values.items():
        if not (is_finite(value) and value > 0):  # type: ignore[operator]
            raise ArgumentError(f"{name}={shown(value)}; give a number above 0 and below infinity")


def check_finite_numbers(**values: object) -> None:
    """Refuse values that are not finite real numbers.

    Raises:
        ArgumentError: with the name and the value.
    """
    for name, value in values.items():
        if not is_finite(value):
            raise ArgumentError(f"{name}={shown(value)}; give a finite number")


def check_seed(**values: object) -> None:
    """Refuse seeds that some generators do not accept, or that are equivalent to others, as -1 and 1 are in `random`.

    Raises:
        ArgumentError: with the name and the value.
    """
    for name, value in values.items():
        if not is_whole(value, 0):
            raise ArgumentError(f"{name}={shown(value)}; give a whole number from 0 to 2^63 - 1")


def nearest(name: str, valid: Iterable[object], *, every: bool = False) -> str:
    """The names of `valid` closest to `name`, for an error message: "did you mean 'a' or 'b'?", or else the list.

    Args:
        every: list all names also beside the closest.
    """
    names = [str(item) for item in valid]
    if not names:
        return "there are none"
    listed = ", ".join(names[:40]) + (f" and {len(names) - 40} more" if len(names) > 40 else "")
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(item) for item in close) + "?" + (f" All: {listed}" if every else "")
    return f"valid names: {listed}"


_short = reprlib.Repr()
_short.maxstring = _short.maxlong = _short.maxother = 60


def shown(value: object) -> str:
    """A value in a message: its `repr`, shortened; Python writes no whole number of thousands of digits."""
    try:
        return _short.repr(value)
    except ValueError:
        return "a number of thousands of digits"
