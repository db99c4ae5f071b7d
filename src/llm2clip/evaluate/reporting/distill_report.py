"""Comparison of a distilled text encoder (student) with the text encoder that it replaces (teacher)."""

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.data.records import Record
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate.embeddings import ModelEmbeddings
from llm2clip.evaluate.recall import KS, retrieval_metrics, two_way_ranks
from llm2clip.evaluate.retrieval_eval import RetrievalRanks, rank_caption_fields
from llm2clip.evaluate.short_queries import score_short_queries
from llm2clip.html_report import Block, Code, Heading, Paragraph, Table, render_markdown, write_report
from llm2clip.io_utils import atomic_write_text, format_bytes
from llm2clip.models.dual_encoder import wrap_llm2clip
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.runs.ranks import print_once
from llm2clip.runs.run_description import describe_run, format_run

OVERLAP_K = 10
TILE = 1024  # number of texts per matmul
SPEED_QUERIES, MIN_SPEED_SECONDS = 64, 3.0


def write_distill_report(
    folder: Path,
    teacher: LLM2CLIP,
    encode_teacher_texts: Callable[[Sequence[str]], Tensor],
    teacher_folder: Path,
    held_out: Mapping[str, Sequence[Record]],
    log: SkipLog,
    seconds: float,
) -> None:
    """Compare the model in `folder/model` with its teacher. Write report.json, report.md and report.html to `folder`.

    Args:
        encode_teacher_texts: Function that takes N texts and returns the teacher's L2-normalised embeddings (N, D).
        held_out: Records on which to evaluate, keyed by caption field. May be empty.
        log: Log of images that cannot be decoded.
        seconds: Duration of the run so far.
    """
    student = LLM2CLIP.from_pretrained(folder / "model", teacher.device)
    result: dict[str, Any] = {"fields": [], "short queries": []}
    captions: list[str] = []
    if held_out:
        teacher_model = dataclasses.replace(
            wrap_llm2clip(teacher, str(teacher_folder)),
            encode_texts_raw=lambda texts, progress: encode_teacher_texts(list(texts)),
        )
        teacher_source = ModelEmbeddings(teacher_model, log)
        student_source = ModelEmbeddings(wrap_llm2clip(student, str(folder / "model"), "fp32"), log)
        ranked = rank_caption_fields(teacher_source, held_out)
        for name, ranks in ranked.items():
            result["fields"].append(compare_text_embeddings(name, ranks, student_source.encode_texts(ranks.captions)))
        first = next(iter(ranked.values()))
        captions = first.captions
        result["short queries"] = _compare_short_queries(teacher_source, student_source, first)
    queries = captions[:SPEED_QUERIES] or ["a dog", "two children play in the snow while a man watches them"]
    for name, model_folder in (("teacher", teacher_folder), ("student", folder / "model")):
        result[name] = measure_text_encoder(model_folder, queries)
    atomic_write_text(folder / "report.json", json.dumps(result, indent=1))
    tables = _build_tables(result)
    run = describe_run(seconds)
    blocks: list[Block] = [Paragraph(format_run(run)), Code(run["command"]), *tables]
    write_report(folder, "report", f"Distillation of {folder.resolve().name}", blocks)
    print_once(render_markdown("Teacher and student", tables), f"Report: {folder / 'report.html'}")


def compare_text_embeddings(name: str, ranks: RetrievalRanks, texts: Tensor) -> dict[str, Any]:
    """Compare a student's embeddings of the texts in `ranks` with the teacher's, on the same image embeddings.

    Args:
        name: Name of the caption field.
        ranks: Retrieval ranks of the teacher.
        texts: The student's embeddings of `ranks.captions`, L2-normalised, of shape (T, D).

    Returns:
        "captions", "images" and "texts" (name of the field and counts); "teacher" and "student" (see
        `retrieval_metrics`); "cosine" (mean similarity of the student's embeddings to the teacher's); and "overlap@10",
        the mean percentage of the teacher's ten best images of a text that are among the student's.
    """
    image_ranks, text_ranks = two_way_ranks(ranks.images, texts, ranks.image_of_text)
    k = min(OVERLAP_K, len(ranks.images))
    overlaps, cosines = [], []
    for ours, theirs in zip(texts.split(TILE), ranks.texts.split(TILE), strict=True):
        best = [(vectors @ ranks.images.T).topk(k, dim=1).indices for vectors in (ours, theirs)]
        overlaps.append((best[0][:, :, None] == best[1][:, None, :]).any(2).float().mean(1))
        cosines.append(F.cosine_similarity(ours, theirs, dim=1))
    return {
        "captions": name,
        "images": len(ranks.records),
        "texts": len(texts),
        "teacher": retrieval_metrics(ranks.image_ranks, ranks.text_ranks, ranks.image_of_text),
        "student": retrieval_metrics(image_ranks, text_ranks, ranks.image_of_text),
        "cosine": float(torch.cat(cosines).mean()),
        f"overlap@{OVERLAP_K}": 100 * float(torch.cat(overlaps).mean()),
    }


def _compare_short_queries(
    teacher: ModelEmbeddings, student: ModelEmbeddings, ranks: RetrievalRanks
) -> list[dict[str, Any]]:
    """Return both models' mAP for each query length, with the model's templates. Without queries, return []."""
    scores = []
    for source in (teacher, student):
        try:
            result = score_short_queries(source, ranks, source.query_templates)
        except ValueError as error:
            print_once(f"Short queries are not compared: {error}")
            return []
        scores.append(result.with_templates or result.plain)
    return [
        {
            "words": first.words,
            "queries": len(first.scores),
            "teacher mAP": 100 * float(first.scores[:, 0].mean()),
            "student mAP": 100 * float(second.scores[:, 0].mean()),
        }
        for first, second in zip(*scores, strict=True)
    ]


def measure_text_encoder(folder: Path, queries: Sequence[str]) -> dict[str, Any]:
    """Measure the text side of a model: queries per second on one CPU core, parameters, and bytes of memory and disk.

    Queries are encoded one at a time in fp32, for at least three seconds. The memory is that of the weights in fp32.
    Activations and libraries need additional memory.
    """
    model = LLM2CLIP.from_pretrained(folder, "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model.encode_text(queries[0], precision="fp32")  # warm-up
        count, start = 0, time.perf_counter()
        for query in itertools.cycle(queries):
            model.encode_text(query, precision="fp32")
            count += 1
            seconds = time.perf_counter() - start
            if seconds >= MIN_SPEED_SECONDS:
                break
    finally:
        torch.set_num_threads(threads)
    weights = [weight for module in (model.encoder.st, model.adapter) for weight in module.parameters()]
    adapter_bytes = sum(parameter.nbytes for parameter in model.adapter.parameters())
    text_files = [path for path in (folder / "text").rglob("*") if path.is_file()]
    return {
        "queries per second": count / seconds,
        "parameters": sum(weight.numel() for weight in weights),
        "bytes of weights": sum(weight.nbytes for weight in weights),
        "bytes on disk": adapter_bytes + sum(path.stat().st_size for path in text_files),
    }


def _build_tables(result: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = [Heading("Text encoders")]
    rows: list[list[Any]] = []
    for label, name in (("queries per second on one core", "queries per second"), ("parameters", "parameters")):
        rows.append([label, *(f"{result[side][name]:,.0f}" for side in ("teacher", "student"))])
    for label, name in (("memory of the weights in fp32", "bytes of weights"), ("size on disk", "bytes on disk")):
        rows.append([label, *(format_bytes(result[side][name]) for side in ("teacher", "student"))])
    blocks.append(Table(["", "teacher", "student"], rows))
    if result["fields"]:
        rows = []
        for entry in result["fields"]:
            for direction in ("T2I", "I2T"):
                for k in KS:
                    values = [entry[side][direction][f"R@{k}"] for side in ("teacher", "student")]
                    rows.append([f"{entry['captions']}: {direction} R@{k}", *values])
        for entry in result["short queries"]:
            rows.append([f"{entry['words']}-word queries: mAP", entry["teacher mAP"], entry["student mAP"]])
        agreement = [
            [entry["captions"], entry["texts"], f"{entry['cosine']:.3f}", entry[f"overlap@{OVERLAP_K}"]]
            for entry in result["fields"]
        ]
        blocks += [
            Heading("Retrieval"),
            Paragraph("Held-out images, in percent. Both models use the same image embeddings."),
            Table(["metric", "teacher", "student"], rows),
            Heading("Agreement"),
            Paragraph(
                f"Mean cosine similarity of the student's text embeddings to the teacher's, and percentage of the "
                f"teacher's {OVERLAP_K} best images that are among the student's."
            ),
            Table(["captions", "texts", "cosine", f"overlap@{OVERLAP_K}"], agreement),
        ]
    return blocks
