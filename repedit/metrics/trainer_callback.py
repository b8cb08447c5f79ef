"""Accuracy on facts while a `transformers.Trainer` fine-tunes a model: does what was forgotten come back?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from repedit.data import Facts
from repedit.errors import ArgumentError, DataError, check_whole
from repedit.metrics.facts import facts_accuracy
from repedit.models.subject import Subject

if TYPE_CHECKING:
    from transformers import TrainerCallback


def trainer_callback(subject: Subject, facts: Mapping[str, Facts] | Facts, *, every: int = 10) -> TrainerCallback:
    """A callback that measures a model on facts before the first step, every few steps, and after the last one.

    The accuracies go to `trainer.state.log_history`, one row for each measurement: {"step": 10, "facts/capitals": 0.42}. It
    is saved with the state of the Trainer; loggers such as TensorBoard, to which the Trainer sends rows of its own, do not
    get these. A LoRA adapter that PEFT injected into the model is measured with it.

    Args:
        subject: `rp.wrap(model, tokenizer)` of the model that the Trainer trains.
        facts: the facts, of which those to forget are asked; several sets by name.
        every: optimizer steps between two measurements.
    Raises:
        ArgumentError: if `every` is not a positive whole number; when training begins, if the Trainer trains another model.
            If the subject has no tokenizer.
        DataError: if there are no facts.
    """
    from transformers import TrainerCallback

    check_whole(every=every)
    subject.need_tokenizer()
    if not isinstance(facts, Facts | Mapping):
        raise DataError(f"trainer_callback() was given a {type(facts).__name__}; give Facts, or several by name")
    sets = {facts.name: facts} if isinstance(facts, Facts) else dict(facts)
    wrong = next((name for name, part in sets.items() if not isinstance(part, Facts)), None)
    if wrong is not None:
        raise DataError(f"trainer_callback() was given a {type(sets[wrong]).__name__} as {wrong!r}; give Facts")
    if not sets or not all(part.forget for part in sets.values()):
        raise DataError("trainer_callback() was given no facts to ask; give at least one to each set")

    class FactsCallback(TrainerCallback):  # type: ignore[misc,unused-ignore]
        """Measures `sets` on the model of `subject`."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **held: Any) -> None:
            trained = {p.data_ptr() for p in held["model"].parameters()}
            if not {p.data_ptr() for p in subject.model.parameters()} & trained:
                raise ArgumentError(
                    "the Trainer trains another model than the callback measures; wrap the model that the Trainer has"
                )
            _measure(state)

        def on_step_end(self, args: Any, state: Any, control: Any, **held: Any) -> None:
            if state.global_step % every == 0:
                _measure(state)

        def on_train_end(self, args: Any, state: Any, control: Any, **held: Any) -> None:
            if state.global_step % every:
                _measure(state)

    def _measure(state: Any) -> None:
        accuracies = {f"facts/{name}": facts_accuracy(subject, part).accuracy for name, part in sets.items()}
        state.log_history.append({"step": state.global_step, **accuracies})

    return FactsCallback()
