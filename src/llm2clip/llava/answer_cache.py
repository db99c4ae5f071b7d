"""On-disk cache of model answers, so that an interrupted evaluation can resume where it left off.

The cache consists of JSONL files with one answer per line. Each rank writes its own file in the cache folder: rank 0
writes NAME.jsonl, rank 1 writes NAME.1.jsonl, rank 2 writes NAME.2.jsonl, and so on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llm2clip.llava.tasks import Question
from llm2clip.models.hub.fingerprint import fingerprint
from llm2clip.progress import ProgressBar
from llm2clip.runs.ranks import process_state, wait_for_everyone
from llm2clip.store.image_features import image_name


def cached_answers(
    file: Path,
    questions: Sequence[Question],
    answer: Callable[[list[Question]], Iterator[tuple[int, Any]]],
    description: str,
) -> list[Any]:
    """Return the answers to `questions`, in order. Generate and cache the missing answers.

    Must be called on all ranks, which share the questions without a cached answer. A question is identified by its id,
    prompt and image. Damaged lines from interrupted runs are ignored.

    Args:
        file: cache file of the main process (rank 0).
        questions: questions to answer.
        answer: function that takes a list of questions and yields (index in that list, answer). An answer of None is
            returned but not cached, so the next run tries that question again.
        description: label of the progress bar.
    """
    state = process_state()
    file.parent.mkdir(parents=True, exist_ok=True)
    cache = _read_cache(file)
    keys = [_question_key(question) for question in questions]
    missing = [n for n, key in enumerate(keys) if key not in cache]
    wait_for_everyone()  # all ranks must read the cache before any rank writes to it
    share = missing[state.process_index :: state.num_processes]
    if share:
        rank_file = file if state.is_main_process else file.with_suffix(f".{state.process_index}.jsonl")
        bar = ProgressBar(total=len(share), desc=description, unit="question", disable=not state.is_main_process)
        with rank_file.open("a", encoding="utf-8") as stream, bar:
            if stream.tell():
                stream.write("\n")  # terminate a line that an interrupted run may have left incomplete
            for k, text in answer([questions[n] for n in share]):
                bar.update()
                if text is None:
                    continue
                n = share[k]
                row = {"question": keys[n], "id": questions[n].id, "answer": text}
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                stream.flush()
    wait_for_everyone()
    cache = _read_cache(file)
    return [cache.get(key) for key in keys]


def _question_key(question: Question) -> str:
    image = image_name(question.image) if question.image else ""
    return fingerprint({"id": question.id, "prompt": question.prompt, "image": image})


def _read_cache(file: Path) -> dict[str, Any]:
    """Read the cached answers of all ranks. Return a dict that maps question keys to answers."""
    cache: dict[str, Any] = {}
    for path in sorted(file.parent.glob(f"{file.stem}*.jsonl")):
        rank_suffix = path.stem[len(file.stem) :]
        if not re.fullmatch(r"(\.\d+)?", rank_suffix):
            continue  # files with judge scores, whose names also start with the cache file's name
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                row = json.loads(line)
                cache[row["question"]] = row["answer"]
            except (ValueError, KeyError, TypeError):
                continue
    return cache
