"""`llm2clip evaluate`: models on one's own data and on public benchmarks, and caption retrieval of any text encoder."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm2clip.config import EncoderConfig, EvaluateConfig
from llm2clip.data.merged_records import read_merged_records
from llm2clip.data.records import Source
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.splits import read_splits
from llm2clip.distributed import command_line, print_once, process_state
from llm2clip.evaluate.benchmarks import Benchmark, get_benchmarks
from llm2clip.evaluate.caption_retrieval import TextEncoder, caption_retrieval_accuracy
from llm2clip.evaluate.embeddings import open_embeddings
from llm2clip.evaluate.precomputed import SAVED
from llm2clip.evaluate.reporting.comparison import ModelResult, caption_blocks, result_blocks
from llm2clip.evaluate.reporting.error_analysis import analyze_errors
from llm2clip.evaluate.runner import run_benchmark
from llm2clip.html_report import Block, Code, Heading, Paragraph, Table, to_markdown, write_report
from llm2clip.io_utils import MissingFileError, atomic_write_text
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.clip_text_encoder import has_text_tower, load_clip_text_encoder
from llm2clip.models.display_names import display_names
from llm2clip.models.dual_encoder import SENTENCES
from llm2clip.models.llm2clip import LLM2CLIP, is_model_folder
from llm2clip.models.pretrained import resolve_pretrained

OWN = "data"


def evaluate_models(
    models: Sequence[str],
    data: Sequence[str],
    *,
    benchmarks: Sequence[str],
    root: Path,
    captions: Sequence[str],
    out: Path | None,
    encoder: EncoderConfig,
    config: EvaluateConfig,
    columns: dict[str, str],
    max_skipped: float,
    all_pairs: bool,
    mistakes: int,
    linear_probe: bool,
) -> list[str]:
    """Print tables and, with `out`, write results.json, report.md and report.html there, where vectors are kept, too.

    All processes of a run make vectors; each then works out the figures, and the main one tells them.

    Args:
        models: the first is the one in question, the others stand beside it; as of `open_dual`, or a .npz of vectors.
        data: sources of images and captions; of those without named splits, what a fit of them holds out.
        benchmarks: by name.
        root: folder of their folders.
        captions: sources for caption retrieval.
        out: folder.
        encoder: for caption retrieval, where no model is named.
        recipe: kinds of captions, and images in a forward pass.
        columns, max_skipped: as of `read_splits`.
        all_pairs, mistakes: of caption retrieval, as of `caption_accuracy`.
        linear_probe: of classes, fit one, too.

    Returns:
        Lines to end with: what was skipped, what failed, and where the report is. results.json is {"captions": figures
        of `caption_accuracy`, "results": [{"model", ...what `Measured` has}, ...]}, either only where it was asked for.

    Raises:
        ValueError: there is nothing to evaluate, no benchmark of a name, or nothing of what was asked for could be
            measured.
    """
    asked = bool(data or benchmarks)
    if asked and not models:
        raise ValueError("name the model to measure, before the data or --benchmarks")
    if not captions and not asked:
        raise ValueError("name a model folder and data or --benchmarks to test it on, or --captions and --encoder.path")
    if process_state().num_processes > 1 and out is None:
        raise ValueError("several processes share their work through a folder: name one with --out")
    found: dict[str, Any] = {}
    report: list[Block] = [Code(command_line())]
    log = _log(out, "records", max_skipped)
    if captions:
        texts = [r.captions for _, r in read_merged_records(captions, columns, log, "unchecked")]
        text = _text_side(models[0] if models else None, encoder)
        figures = caption_retrieval_accuracy(texts, text, all_pairs=all_pairs, num_mistakes=mistakes)
        found["captions"] = figures
        shown = caption_blocks(display_names(models or [encoder.path])[0], figures)
        print_once(to_markdown("Caption retrieval", shown, ""))
        report += shown
        _write(out, found)
    failures: list[str] = []
    if asked:
        places, failures = _places([*_own(data, config, columns, log), *get_benchmarks(benchmarks)], root)
        measuring = _Measuring(places, out, 64, linear_probe, log, max_skipped)
        for n, model in enumerate(models if places else []):
            measuring.measure(model, display_names(models)[n], first=n == 0)
            found["results"] = measuring.results()
            _write(out, found)  # what is done is not lost with the next model
        failures += measuring.failures
        if not measuring.found:
            raise ValueError("\n".join(["nothing could be measured:", *failures]))
        parts = [
            block
            for n, (_, b) in enumerate(places)
            if (some := measuring.found.get(n))
            for block in result_blocks(b, some)
        ]
        report += [*(Paragraph(line) for line in [*measuring.skipped(), *failures]), *parts]
        print_once(to_markdown("Results", [b for b in parts if isinstance(b, Heading | Table)], ""))
    lines = [*([log.summary()] if log.rows_seen else []), *failures]
    if out is not None and process_state().is_main_process:
        _write(out, found)
        title = f"{display_names(models or [encoder.path])[0]}, measured"
        lines.append(f"Report: {write_report(out, 'report', title, report)[1]}")
    return lines


class _Measuring:
    """Models on benchmarks, one pair at a time; one that fails is noted, and the others go on."""

    def __init__(
        self,
        places: Sequence[tuple[Path, Benchmark]],
        out: Path | None,
        batch: int,
        probe: bool,
        log: SkipLog,
        max_skipped: float,
    ) -> None:
        self.places, self.out, self.batch, self.probe, self.log = places, out, batch, probe, log
        self.found: dict[int, list[ModelResult]] = {}
        self.failures: list[str] = []
        self.logs = {
            n: log if b.name == OWN else _log(out, f"{n}-{b.name}", max_skipped) for n, (_, b) in enumerate(places)
        }

    def measure(self, model: str, name: str, first: bool) -> None:
        """One model on all benchmarks; of the first, pictures are kept."""
        try:
            vectors = open_embeddings(model, self.log, self.out, self.batch)
        except (OSError, ValueError, ImportError) as error:
            if first or process_state().num_processes > 1:  # others would wait for one that goes on without them
                raise
            self.failures.append(f"{name} is left out: {error}")
            return
        wanted = self.out is not None and process_state().is_main_process
        for n, (folder, benchmark) in enumerate(self.places):
            print_once(f"{name}: {benchmark.name}")
            vectors.log = self.logs[n]
            try:
                measured = run_benchmark(benchmark, folder, vectors, self.probe)
            except (OSError, ValueError) as error:
                if process_state().num_processes > 1 and not isinstance(error, MissingFileError | ValueError):
                    raise
                self.failures.append(_left_out(f"{name} on {benchmark.name}", benchmark, error))
                continue
            kinds = list(measured.ranked.items()) if wanted else []
            # Pictures of the first kind alone: a set in 36 languages would fill the page with two thousand.
            shown = {k: analyze_errors(r, queries=6 if first and i == 0 else 0) for i, (k, r) in enumerate(kinds)}
            self.found.setdefault(n, []).append(ModelResult(name, measured.figures, shown))

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
        except MissingFileError as error:
            missing.append(_left_out(benchmark.name, benchmark, error))
    return found, missing


def _left_out(what: str, benchmark: Benchmark, error: Exception) -> str:
    way = f". It takes {benchmark.get}" if isinstance(error, MissingFileError) else ""
    return f"{what} is left out: {error}{way}"


def _text_side(model: str | None, encoder: EncoderConfig) -> TextEncoder:
    """What encodes captions: of a model that is named, its own; else the encoder of the settings, ours or a CLIP's.

    Raises:
        ValueError: there is none, or settings are given for an encoder that takes none.
    """
    if model is not None:
        if model.endswith(SAVED) or model.startswith(SENTENCES):
            raise ValueError(f"{model} has no caption encoder that can be opened alone: leave out --captions")
        if has_text_tower(model):
            return load_clip_text_encoder(model)
        return CaptionEncoder.from_pretrained(model) if _is_encoder(model) else LLM2CLIP.from_pretrained(model).encoder
    path, usual = resolve_pretrained(encoder.path), EncoderConfig(path=encoder.path)
    if not has_text_tower(path):
        return CaptionEncoder.from_pretrained(**dataclasses.asdict(encoder))
    if options := [f"--encoder.{name}" for name, value in vars(encoder).items() if value != getattr(usual, name)]:
        raise ValueError(f"{path} is taken as it is: leave out {', '.join(options)}")
    return load_clip_text_encoder(path)


def _is_encoder(model: str) -> bool:
    """Whether a folder is a caption encoder's, and not a model's that has one."""
    return Path(model).is_dir() and not is_model_folder(model)


def _own(data: Sequence[str], config: EvaluateConfig, columns: dict[str, str], log: SkipLog) -> list[Benchmark]:
    """One's own data as a benchmark, if there are any.

    Raises:
        ValueError: of some sources the splits are named, and of others not.
    """
    if not data:
        return []
    whole = [d for d in data if not Source.parse(d).splits]
    if whole and len(whole) < len(data):
        raise ValueError(
            f"{whole[0]}: name the splits to test on (PATH@test) of all sources or of none; of a source without, "
            "what a fit holds out is tested on"
        )
    of = (whole, config) if whole else ([], dataclasses.replace(config, data=list(data)))
    records = read_splits(*of, columns, log)
    print_once(records.summary)
    about = f"{len(records.held_out['captions']):,} images of your own"
    return [Benchmark(OWN, "retrieval", about, (str(Path.cwd()),), lambda _: records.held_out, "images with captions")]


def _log(out: Path | None, name: str, limit: float) -> SkipLog:
    """What is skipped of one source, listed in a file by its name where there is a folder."""
    file = re.sub(r"[^\w.-]+", "-", name)
    return SkipLog(out / "skipped" / f"{file}.jsonl" if out and process_state().is_main_process else None, limit)


def _write(out: Path | None, found: dict[str, Any]) -> None:
    if out is not None and process_state().is_main_process:
        atomic_write_text(out / "results.json", json.dumps(found, indent=1, ensure_ascii=False))
