"""`llm2clip evaluate`: models on one's own data and on public benchmarks, and caption retrieval of any text encoder."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm2clip.data.captions import unique
from llm2clip.data.records import Source
from llm2clip.data.skips import SkipLog
from llm2clip.evaluate.benchmarks import Absent, Benchmark
from llm2clip.evaluate.captions import caption_accuracy
from llm2clip.evaluate.comparison import Result, blocks, caption_blocks
from llm2clip.evaluate.details import details
from llm2clip.evaluate.measure import measure, named
from llm2clip.evaluate.page import Block, Command, Heading, Table, Text, markdown, write_page
from llm2clip.evaluate.report import captions_report
from llm2clip.evaluate.saved import SavedVectors
from llm2clip.evaluate.vectors import Vectors, VectorSource
from llm2clip.models.clip_text import ClipText
from llm2clip.models.dual import open_dual
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.processes import processes, say
from llm2clip.recipes import EncoderRecipe, EvaluateRecipe
from llm2clip.split import read, read_data
from llm2clip.stages import open_text

SAVED = ".npz"


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
        ValueError: there is nothing to evaluate, no benchmark of a name, or none of those asked for is there.
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
    log = SkipLog(None, max_skipped)
    if captions:
        figures = _caption_retrieval(models, captions, encoder, recipe, columns, log)
        found["captions"] = figures
        say(*captions_report(figures))
        report += caption_blocks(short(models or [encoder.path])[0], figures)
    if asked:
        benchmarks = [*_own(data, recipe, columns, log), *named(names)]
        results = _results(models, benchmarks, root, out, recipe, log)
        if not results:
            raise ValueError(f"none of these benchmarks is under {root}: `llm2clip benchmarks --root {root}` says more")
        found["results"] = [{"model": r.model, **r.figures} for some in results.values() for r in some]
        parts = [block for name, some in results.items() for block in blocks(_of(benchmarks, name), some)]
        report += [_skipped(log), *parts]
        say(markdown("Results", [b for b in parts if isinstance(b, Heading | Table)], ""), log.summary())
    if out is not None and processes().is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(json.dumps(found, indent=1, ensure_ascii=False))
        title = f"{short(models or [encoder.path])[0]}, measured"
        say(f"Report: {write_page(out, 'report', title, report)[1]}")
    return found


def _caption_retrieval(
    models: Sequence[str],
    captions: Sequence[str],
    encoder: EncoderRecipe,
    recipe: EvaluateRecipe,
    columns: dict[str, str],
    log: SkipLog,
) -> dict[str, Any]:
    texts = [r.captions for _, r in read(captions, columns, log, "ignore")]
    text = LLM2CLIP.from_pretrained(models[0]).encoder if models else open_text(encoder)
    figures = caption_accuracy(texts, text, all_pairs=recipe.all_pairs, mistakes=recipe.mistakes)
    if isinstance(text, ClipText):
        figures["truncated"] = text.cut(unique(c for some in texts for c in some))
    return figures


def _own(data: Sequence[str], recipe: EvaluateRecipe, columns: dict[str, str], log: SkipLog) -> list[Benchmark]:
    """One's own data as a benchmark, if there are any."""
    if not data and not recipe.data:
        return []
    if all(Source.parse(d).splits for d in data):
        recipe, data = dataclasses.replace(recipe, data=[*recipe.data, *data]), []
    records = read_data(data, recipe, columns, log)
    about = f"{len(records.held_out['captions']):,} images of your own"
    return [Benchmark("data", "retrieval", about, (str(Path.cwd()),), lambda _: records.held_out, "")]


def _results(
    models: Sequence[str],
    benchmarks: Sequence[Benchmark],
    root: Path,
    out: Path | None,
    recipe: EvaluateRecipe,
    log: SkipLog,
) -> Mapping[str, list[Result]]:
    """By benchmark, model by model; what is absent is said, once."""
    found: dict[str, list[Result]] = {}
    names = short(models)
    places: list[tuple[Path, Benchmark]] = []
    for benchmark in benchmarks:
        try:
            places.append((benchmark.find(root), benchmark))
        except Absent as error:
            say(f"{benchmark.name} is left out: {error}. It takes {benchmark.get}")
    for n, model in enumerate(models if places else []):
        vectors = open_vectors(model, log, out, recipe.batch)
        for folder, benchmark in places:
            say(f"{model}: {benchmark.name}")
            try:
                measured = measure(benchmark, folder, vectors, recipe.linear_probe)
            except Absent as error:
                if n == 0:
                    say(f"{benchmark.name} is left out: {error}. It takes {benchmark.get}")
                continue
            wanted = out is not None and processes().is_main_process
            shown = {k: details(r, queries=6 if n == 0 else 0) for k, r in measured.ranked.items()} if wanted else {}
            found.setdefault(benchmark.name, []).append(Result(names[n], measured.figures, shown))
    return found


def short(models: Sequence[str]) -> list[str]:
    """Names for tables: of a path its last part, or of RUN/model the run's; whole where two would be the same."""
    names = [Path(m).parent.name if Path(m).name == "model" and Path(m).parent.name else Path(m).name for m in models]
    found = [name if Path(m).exists() else m for m, name in zip(models, names, strict=True)]
    return found if len(set(found)) == len(found) else list(models)


def open_vectors(model: str, log: SkipLog, out: Path | None, batch: int) -> VectorSource:
    """A model's vectors, or a file of them.

    Raises:
        ValueError: it is no model, or no such file.
        OSError: there is none of that name.
    """
    if model.endswith(SAVED):
        return SavedVectors(Path(model), log)
    return Vectors(open_dual(model, processes().device), log, out / "vectors" if out else None, batch)


def _of(benchmarks: Sequence[Benchmark], name: str) -> Benchmark:
    return next(b for b in benchmarks if b.name == name)


def _skipped(log: SkipLog) -> Text:
    return Text(f"{log.summary()}.")
