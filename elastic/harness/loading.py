"""Loading of the harness's tasks by name, and of files of questions by path."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from lm_eval.api.task import ConfigurableTask

from elastic.harness.names import path_of, unknown
from elastic.harness.questions import file_task
from elastic.reporting.progress import Say
from teachers import hub
from teachers.quiet import first_line, quiet


def load_tasks(items: Sequence[str], say: Say = print) -> dict[str, ConfigurableTask]:
    """Return zero-shot tasks by name for items that are names of the harness's tasks or paths of files of questions.

    ValueError if an item is neither, cannot be loaded, is no multiple-choice task, or has the name of another.
    """
    if not items:
        raise ValueError(
            "--tasks names no task: give names of the harness and paths of files, with commas between them"
        )
    paths = {item: path_of(item) for item in items}
    found = [(path.stem, file_task(path)) for item in items if (path := paths[item]) is not None]
    names = [item for item in items if paths[item] is None]
    if names:
        say("reading the harness's list of tasks ...")
        found += _harness_tasks(names)
    tasks: dict[str, ConfigurableTask] = {}
    for name, task in found:
        if name in tasks:
            raise ValueError(f"two tasks are called {name}: measure them one after the other")
        if task.OUTPUT_TYPE != "multiple_choice":
            raise ValueError(
                f"{name} is no multiple-choice task but one of {task.OUTPUT_TYPE}, which --tasks is not for"
            )
        task.set_config(key="num_fewshot", value=0)
        tasks[name] = task
    return tasks


def _harness_tasks(names: Sequence[str]) -> list[tuple[str, ConfigurableTask]]:
    """Return (name, task) of the harness's own tasks; for a group or tag, of all tasks in it."""
    from lm_eval.tasks import TaskManager

    with quiet(stderr=True):
        manager = TaskManager()
    for name in names:
        if name not in manager.task_index:
            raise unknown(name, manager.all_tasks)
    reason = hub.unreachable()
    found = []
    for name in names:
        try:
            with quiet(stderr=True), hub.offline() if reason else nullcontext():
                found += manager.load([name])["tasks"].items()
        except Exception as error:  # datasets, the HTTP library and the tasks' code raise classes of their own
            if reason:
                raise ValueError(
                    f"the data of {name} comes from the hub, which cannot be reached ({reason}), and is not in the "
                    "cache; a file of questions goes by its path: --tasks FILE.jsonl"
                ) from error
            raise ValueError(f"the task {name} cannot be loaded: {first_line(error)}") from error
    return found
