"""The tasks of lm-evaluation-harness on a model in memory: nothing is saved, and local tasks need no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repedit.errors import ArgumentError, DataError, MissingDependency, NotFound, UnknownName, nearest
from repedit.models import Subject


def evaluate(
    subject: Subject,
    tasks: str | Sequence[str],
    *,
    limit: int | None = None,
    include: str | Path | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Results of tasks as the harness gives them: "results" by task, and "samples", the values of every document.

    Args:
        tasks: names of tasks or groups. Those that come with the harness fetch their data from the hub; one in
            `include` that says `dataset_path: json` and `data_files` reads it from there.
        limit: documents a task, the first ones; None for all.
        include: directory with YAML files of tasks of your own.
    Raises:
        MissingDependency: without the package lm-eval.
        ArgumentError: without a tokenizer or tasks, or with a number below 1.
        NotFound: if there is no such directory.
        UnknownName: if there is no such task.
        DataError: if the data of a task cannot be had.
    Reference: Gao et al. 2024, doi:10.5281/zenodo.12608602.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not names or (limit is not None and limit < 1) or batch_size < 1:
        raise ArgumentError(
            f"tasks={names}, limit={limit}, batch_size={batch_size}; give a task, and numbers of at least 1"
        )
    if include is not None and not Path(include).is_dir():
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
    # The harness's own tasks are fourteen thousand files; they are listed only where a name is none of yours.
    manager = TaskManager(include_path=str(include), include_defaults=False) if include is not None else TaskManager()
    if include is not None and not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=str(include))
    unknown = next((name for name in names if name not in manager.all_tasks), None)
    if unknown is not None:
        raise UnknownName(f"no task is called {unknown!r}; {nearest(unknown, manager.all_tasks)}")
    model = HFLM(pretrained=subject.model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = lm_eval.simple_evaluate(
            model, tasks=names, limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=True
        )
    except (OSError, FileNotFoundError) as error:
        raise DataError(
            f"tasks {names}: the data could not be read: {error}; write a task with dataset_path: json and local data_files, "
            "and name its directory with include="
        ) from error
    return dict(found)
