"""The benchmarks in LLaVA-1.5's results table, with their official file formats and scoring rules."""

from __future__ import annotations

from collections.abc import Sequence

from llm2clip.data.skip_log import SkipLog
from llm2clip.llava.tasks import llm_judge, multiple_choice, vqa, yes_no
from llm2clip.llava.tasks.base import Question, Task

__all__ = ["TASKS", "Question", "Task", "read_benchmarks"]

TASKS: dict[str, Task] = {
    task.name: task for task in (*vqa.TASKS, *multiple_choice.TASKS, *yes_no.TASKS, *llm_judge.TASKS)
}


def read_benchmarks(names: Sequence[str], root: str, log: SkipLog) -> list[tuple[Task, list[Question]]]:
    """Read the questions of one or more benchmarks.

    Args:
        names: names of the benchmarks, or ["all"] for every benchmark whose folder exists.
        root: folder that contains one folder per benchmark.
        log: log of skipped questions.

    Raises:
        ValueError: a name is unknown, or a file is not in the official format.
        FileNotFoundError: files are missing.
    """
    if list(names) == ["all"]:
        names = [name for name, task in TASKS.items() if task.folder(root).is_dir()]
    benchmarks = []
    for name in names:
        if name not in TASKS:
            raise ValueError(f"unknown benchmark {name!r}; available: {', '.join(TASKS)}")
        task = TASKS[name]
        folder = task.folder(root)
        try:
            benchmarks.append((task, task.read(folder, log)))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{name}: the files in {folder} are not in the official format ({error!r})") from error
    return benchmarks
