"""Tasks of lm-evaluation-harness on a model in memory, without saving it; local tasks need no network.

`write_tasks` writes built-in or your own facts as tasks that the harness runs without repedit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from repedit.arguments import checked
from repedit.data import DOMAINS, Fact
from repedit.data import facts as facts_named
from repedit.data.encoding import prompt_with_answer
from repedit.errors import ArgumentError, DataError, MissingDependency, NotFound, TargetExists, UnknownName, nearest
from repedit.io.files import is_folder, make_folder, user_path, write_text
from repedit.io.targets import check_folder
from repedit.io.text import read_text
from repedit.models.subject import Subject

TAG = "repedit_facts"
"""The tag of all tasks of `write_tasks`."""


@checked
def evaluate(
    subject: Subject,
    tasks: str | Sequence[str],
    *,
    limit: int | None = None,
    include: str | Path | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Results of tasks in the format of the harness: "results" by task, and "samples" with the values of every document.

    Args:
        tasks: names of tasks or groups. Tasks of the harness download their data from the hub; a task in `include` with
            `dataset_path: json` and `data_files` reads local files.
        limit: documents per task, the first ones; None for all.
        include: directory with YAML files of your own tasks.
    Raises:
        MissingDependency: without the package lm-eval.
        ArgumentError: without a tokenizer or tasks, or with a number below 1.
        NotFound: if there is no such directory.
        UnknownName: if there is no such task.
        DataError: if the data of a task cannot be read.
    Reference: Gao et al. 2024, doi:10.5281/zenodo.12608602.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not names or (limit is not None and limit < 1) or batch_size < 1:
        raise ArgumentError(
            f"tasks={names}, limit={limit}, batch_size={batch_size}; give a task, and numbers of at least 1"
        )
    if include is not None and not is_folder(include):
        raise NotFound(
            f"{Path(include).absolute()} is not a directory; give the one that holds the YAML files of the tasks"
        )
    tokenizer = subject.need_tokenizer()
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingDependency(f"the harness needs lm-eval: pip install lm-eval==0.4.13 ({error})") from error
    # The harness has fourteen thousand task files; they are listed only if a name is not in `include`.
    manager = TaskManager(include_path=str(include), include_defaults=False) if include is not None else TaskManager()
    if include is not None and not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=str(include))
    unknown = next((name for name in names if name not in manager.all_tasks), None)
    if unknown is not None:
        raise UnknownName(f"no task is called {unknown!r}; {nearest(unknown, manager.all_tasks)}")
    model = HFLM(pretrained=subject.model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        results = lm_eval.simple_evaluate(
            model, tasks=names, limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=True
        )
    except (OSError, FileNotFoundError) as error:
        raise DataError(
            f"tasks {names}: the data could not be read: {error}; write a task with dataset_path: json and local data_files, "
            "and name its directory with include="
        ) from error
    return dict(results)


_BUILTIN = """# {count} facts, {name}, in the words and with the wrong choices of repedit: rp.facts_accuracy(lm, rp.data.facts({name!r})).
# The facts were written for repedit, and are licensed as it is: Apache-2.0."""
_OWN = """# {count} facts of the file {name}, in its words: rp.facts_accuracy(lm, rp.data.facts({name!r})).
# They are under the terms of that file."""
_TASK = """{note}
# The path of the data is whole, so write the tasks again where you move them. Run them without repedit:
#   lm-eval run --model hf --model_args pretrained=MODEL --include_path {folder} --tasks {task}
task: {task}
tag: {tag}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: "{space}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


@checked
def write_tasks(
    folder: str | Path, names: str | Path | Iterable[str | Path] = DOMAINS, *, seed: int = 0
) -> tuple[str, ...]:
    """Write facts as tasks of the harness, a YAML and a JSONL file each; returns the names of the tasks.

    A task measures the same as `rp.facts_accuracy`: whether the choice with the highest summed log-probability after
    the prompt is the right one. Accuracies are equal except for ties, which the harness gives to the first choice.

    Args:
        folder: created if missing; existing tasks with other content are not replaced.
        names: built-in domains, or .jsonl files of facts (those to forget); the task of "capitals" is
            "repedit_capitals". The tag `TAG` runs all of them.
        seed: of the order of the choices, as in `rp.data.facts`.
    Raises:
        UnknownName, NotFound, DataError: as `rp.data.facts` does; DataError also for a fact without choices.
        ArgumentError: without names, or if two tasks have the same name.
        TargetExists: if a file with that name has other content. CheckpointError: if the folder cannot be written.
    """
    check_folder(folder)
    root = user_path(folder).absolute()
    sources = [names] if isinstance(names, str | Path) else list(names)
    tasks = [f"repedit_{Path(name).stem if _is_file(name) else name}" for name in sources]
    if not tasks or len(set(tasks)) < len(tasks):
        raise ArgumentError(f"names={[str(name) for name in sources]}; give at least one, each once")
    files: dict[Path, str] = {}
    for name, task in zip(sources, tasks, strict=True):
        rows = facts_named(name, seed=seed).forget
        note = (_OWN if _is_file(name) else _BUILTIN).format(count=len(rows), name=str(name))
        data = root / f"{task}.jsonl"
        files[data] = "".join(_row(fact) for fact in rows)
        files[root / f"{task}.yaml"] = _TASK.format(
            note=note, folder=root, task=task, tag=TAG, data=json.dumps(str(data), ensure_ascii=False),
            space=_space(rows, task),
        )  # fmt: skip
    taken = next((path for path, text in files.items() if os.path.lexists(path) and read_text(path) != text), None)
    if taken is not None:
        raise TargetExists(f"{taken} exists and holds something else; move it away, or give another folder")
    make_folder(root)
    for path, text in files.items():
        write_text(path, text)
    return tuple(tasks)


def _is_file(name: str | Path) -> bool:
    return isinstance(name, Path) or name.endswith(".jsonl")


def _space(rows: Sequence[Fact], task: str) -> str:
    """The delimiter between prompts and choices: a space, or nothing in scripts without spaces."""
    # The harness itself moves a space at the end of a prompt to the choice.
    prompts = [fact.prompt.rstrip(" ") for fact in rows]
    spaces = {prompt_with_answer(prompt, "a").removeprefix(prompt)[:-1] for prompt in prompts}
    if len(spaces) > 1:
        raise DataError(
            f"task {task!r}: some prompts end in a script with spaces and some in one without, but a task has one delimiter; "
            "write them as two files"
        )
    return spaces.pop()


def _row(fact: Fact) -> str:
    """A fact as a line of a task's data."""
    if not fact.choices:
        raise DataError(f"fact {fact.id!r} has no choices, and its domain has no other answers; give it some")
    row = {"id": fact.id, "prompt": fact.prompt, "choices": fact.choices, "label": fact.choices.index(fact.answer)}
    return json.dumps(row, ensure_ascii=False) + "\n"
