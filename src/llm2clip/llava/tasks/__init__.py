"""The benchmarks of multimodal LLMs that LLaVA-1.5 reports, each in its official form and with its official scoring."""

from __future__ import annotations

from llm2clip.llava.tasks import llm_judge as judged
from llm2clip.llava.tasks import multiple_choice as choices
from llm2clip.llava.tasks import vqa
from llm2clip.llava.tasks import yes_no as yesno
from llm2clip.llava.tasks.base import Question, Task

__all__ = ["TASKS", "Question", "Task"]

TASKS: dict[str, Task] = {task.name: task for task in (*vqa.TASKS, *choices.TASKS, *yesno.TASKS, *judged.TASKS)}
