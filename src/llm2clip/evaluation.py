"""`llm2clip evaluate`: models on one's own data and on public benchmarks, and caption retrieval of any text encoder."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm2clip.data.captions import unique
from llm2clip.data.records import Source
from llm2clip.data.skips import SkipLog
from llm2clip.evaluate.benchmarks import Absent, Benchmark
from llm2clip.evaluate.captions import TextEncoder, caption_accuracy
from llm2clip.evaluate.comparison import Result, blocks, caption_blocks
from llm2clip.evaluate.details import details
from llm2clip.evaluate.measure import measure, named
from llm2clip.evaluate.report import captions_report
from llm2clip.evaluate.saved import SavedVectors
from llm2clip.evaluate.vectors import Vectors, VectorSource
from llm2clip.models.clip_text import ClipText, clip_text, has_text_tower
from llm2clip.models.dual import open_dual
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.page import Block, Command, Heading, Table, Text, markdown, short, write_page
from llm2clip.processes import processes, say
from llm2clip.recipes import EncoderRecipe, EvaluateRecipe
from llm2clip.split import read, read_data
from llm2clip.stages import open_text

SAVED, OWN = ".npz", "data"


def evaluate(
    models: Sequence[str],
    data: Sequence[str],
    names: Sequence[str],
    root: Path,
    captions: Sequence[str],
    out: Path | None,
    encoder: EncoderRecipe,
    recipe: EvaluateRecipe,
    columns: dict[str, str],
    max_skipped: float,
) -> dict[str, Any]:
    """Print tables and, with `out`, write results.json, report.md and report.html there, where vectors are kept, too.

    All processes of a run make vectors; each then works out the figures, and the main one tells them.

    Args:
        models: the first is the one in question, the others stand beside it; as of `open_dual`, or a .npz of vectors.
        data: sources of images and captions; of those without named splits, what a fit of them holds out.
        names: of benchmarks.
        root: folder of their folders.
        captions: sources for caption retrieval.
        out: folder.
        encoder: for caption retrieval, where no model is named.
        recipe: the settings.
        columns, max_skipped: as of `read_data`.

    Returns:
        {"captions": figures of `caption_accuracy`, "results": [{"model", ...what `Measured` has}, ...]}, either only
        where it was asked for.

    Raises:
        ValueError: there is nothing to evaluate, no benchmark of a name, or none of those asked for can be measured.
        OSError: there is no model of a name.
    """
    asked = bool(data or recipe.data or names)
    if asked and not models:
        raise ValueError("name the model to measure, before the data or --benchmarks")
    if not captions and not asked:
        raise ValueError("name a model folder and data or --benchmarks to test it on, or --captions and --encoder.path")
    if processes().num_processes > 1 and out is None:
        raise ValueError("several processes share their work through a folder: name one with --out")
    found: dict[str, Any] = {}
    report: list[Block] = [Command(shlex.join(["llm2clip", *sys.argv[1:]]))]
    log = _log(out, "records", max_skipped)
    if captions:
        figures = _caption_retrieval(models, captions, encoder, recipe, columns, log)
        found["captions"] = figures
        say(*captions_report(figures))
        report += caption_blocks(short(models or [encoder.path])[0], figures)
    failures: list[str] = []
    if asked:
        places, failures = _places([*_own(data, recipe, columns, log), *named(names)], root)
        measuring = _Measuring(places, out, recipe, log, max_skipped)
        for n, model in enumerate(models if places else []):
            measuring.measure(model, short(models)[n], first=n == 0)
            found["results"] = measuring.results()
            _write(out, found)  # what is done is not lost with the next model
        if not measuring.found:
            raise ValueError(
                f"none of these benchmarks could be measured: `llm2clip benchmarks --root {root}` says more. "
                + "; ".join([*failures, *measuring.failures])
            )
        parts = [
            block for n, (_, b) in enumerate(places) if (some := measuring.found.get(n)) for block in blocks(b, some)
        ]
        failures += measuring.failures
        report += [*(Text(line) for line in [*measuring.skipped(), *failures]), *parts]
        say(markdown("Results", [b for b in parts if isinstance(b, Heading | Table)], ""))
    say(log.summary(), *failures)
    if out is not None and processes().is_main_process:
        _write(out, found)
        title = f"{short(models or [encoder.path])[0]}, measured"
        say(f"Report: {write_page(out, 'report', title, report)[1]}")
    return found


class _Measuring:
    """Models on benchmarks, one pair at a time; one that fails is noted, and the others go on."""

    def __init__(
        self,
        places: Sequence[tuple[Path, Benchmark]],
        out: Path | None,
        recipe: EvaluateRecipe,
        log: SkipLog,
        max_skipped: float,
    ) -> None:
        self.places, self.out, self.recipe, self.log, self.max_skipped = places, out, recipe, log, max_skipped
        self.found: dict[int, list[Result]] = {}
        self.failures: list[str] = []
        self.logs = {
            n: log if b.name == OWN else _log(out, f"{n}-{b.name}", max_skipped) for n, (_, b) in enumerate(places)
        }

    def measure(self, model: str, name: str, first: bool) -> None:
        """One model on all benchmarks; of the first, pictures are kept."""
        vectors = open_vectors(model, self.log, self.out, self.recipe.batch)
        wanted = self.out is not None and processes().is_main_process
        for n, (folder, benchmark) in enumerate(self.places):
            say(f"{name}: {benchmark.name}")
            vectors.log = self.logs[n]
            try:
                measured = measure(benchmark, folder, vectors, self.recipe.linear_probe)
            except (Absent, ValueError) as error:
                self.failures.append(f"{name} on {benchmark.name} is left out: {error}. It takes {benchmark.get}")
                continue
            shown = {k: details(r, queries=6 if first else 0) for k, r in measured.ranked.items()} if wanted else {}
            self.found.setdefault(n, []).append(Result(name, measured.figures, shown))

    def results(self) -> list[dict[str, Any]]:
        return [{"model": r.model, **r.figures} for some in self.found.values() for r in some]

    def skipped(self) -> list[str]:
        """A line for each benchmark of which something was left out, and one for the rows of one's own data."""
        logs = {self.places[n][1].name: log for n, log in self.logs.items()}
        return [f"{name}: {log.summary()}." for name, log in logs.items() if log.skipped or name == OWN]


def _places(benchmarks: Sequence[Benchmark], root: Path) -> tuple[list[tuple[Path, Benchmark]], list[str]]:
    """Where benchmarks are, and a line on each that is not there."""
    found, missing = [], []
    for benchmark in benchmarks:
        try:
            found.append((benchmark.find(root), benchmark))
        except Absent as error:
            missing.append(f"{benchmark.name} is left out: {error}. It takes {benchmark.get}")
    return found, missing


def _caption_retrieval(
    models: Sequence[str],
    captions: Sequence[str],
    encoder: EncoderRecipe,
    recipe: EvaluateRecipe,
    columns: dict[str, str],
    log: SkipLog,
) -> dict[str, Any]:
    texts = [r.captions for _, r in read(captions, columns, log, "ignore")]
    text: TextEncoder
    if models and not has_text_tower(models[0]):
        text = LLM2CLIP.from_pretrained(models[0]).encoder
    else:
        text = clip_text(models[0]) if models else open_text(encoder)
    figures = caption_accuracy(texts, text, all_pairs=recipe.all_pairs, mistakes=recipe.mistakes)
    if isinstance(text, ClipText):
        figures["truncated"] = text.cut(unique(c for some in texts for c in some))
    return figures


def _own(data: Sequence[str], recipe: EvaluateRecipe, columns: dict[str, str], log: SkipLog) -> list[Benchmark]:
    """One's own data as a benchmark, if there are any.

    Raises:
        ValueError: of some sources the splits are named, and of others not.
    """
    if not data and not recipe.data:
        return []
    whole = [d for d in data if not Source.parse(d).splits]
    if whole and (recipe.data or len(whole) < len(data)):
        raise ValueError(
            f"{whole[0]}: name the splits to test on (PATH@test) of all sources or of none; of a source without, "
            "what a fit holds out is tested on"
        )
    if not whole:
        recipe, data = dataclasses.replace(recipe, data=[*recipe.data, *data]), []
    records = read_data(data, recipe, columns, log)
    say(records.summary)
    about = f"{len(records.held_out['captions']):,} images of your own"
    return [Benchmark(OWN, "retrieval", about, (str(Path.cwd()),), lambda _: records.held_out, "images with captions")]


def open_vectors(model: str, log: SkipLog, out: Path | None, batch: int) -> VectorSource:
    """A model's vectors, or a file of them.

    Raises:
        ValueError: it is no model, or no such file.
        OSError: there is none of that name.
    """
    if model.endswith(SAVED):
        return SavedVectors(Path(model), log)
    return Vectors(open_dual(model, processes().device), log, out / "vectors" if out else None, batch)


def _log(out: Path | None, name: str, limit: float) -> SkipLog:
    """What is skipped of one source, listed in a file by its name where there is a folder."""
    file = re.sub(r"[^\w.-]+", "-", name)
    return SkipLog(out / "skipped" / f"{file}.jsonl" if out and processes().is_main_process else None, limit)


def _write(out: Path | None, found: dict[str, Any]) -> None:
    if out is not None and processes().is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        part = out / ".results.json.part"
        part.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
        part.replace(out / "results.json")
