"""The benchmarks of multimodal LLMs that LLaVA-1.5 reports, each in its official form and with its official scoring."""

from __future__ import annotations

from llm2clip.llava.tasks import choices, judged, vqa, yesno
from llm2clip.llava.tasks.base import Asked, Task

__all__ = ["TASKS", "Asked", "Task"]

TASKS: dict[str, Task] = {task.name: task for task in (*vqa.TASKS, *choices.TASKS, *yesno.TASKS, *judged.TASKS)}
