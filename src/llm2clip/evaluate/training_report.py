"""Reports on `fit` runs (metrics before and after training) and on `distill` runs (teacher and student)."""

import dataclasses
import itertools
import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.config import EncoderConfig
from llm2clip.data.records import Record
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate import plots
from llm2clip.evaluate.comparison import (
    MIN_IMAGES,
    MIN_ROUGH_IMAGES,
    K,
    describe_caption_retrieval,
    describe_percentage,
    describe_text_to_image_recall,
    get_informative_recalls,
)
from llm2clip.evaluate.embeddings import ModelEmbeddings
from llm2clip.evaluate.encoder_choice import describe_encoder, describe_encoder_choice
from llm2clip.evaluate.metrics import KS, retrieval_metrics, two_way_ranks
from llm2clip.evaluate.retrieval import RetrievalRanks, compute_field_ranks, read_example_searches
from llm2clip.evaluate.short_queries import evaluate_short_queries
from llm2clip.io_utils import atomic_write_text, format_bytes, format_count, format_duration, read_json
from llm2clip.models.dual_encoder import wrap_llm2clip
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.reports import (
    Block,
    CodeBlock,
    Figure,
    Heading,
    Paragraph,
    Table,
    format_interval,
    format_value_with_interval,
    render_markdown,
    write_report,
)
from llm2clip.runs.output_folder import CONFIG_FILE, ENCODER_CHOICE_FILE, read_metrics
from llm2clip.runs.ranks import print_once
from llm2clip.runs.run_description import DURATIONS_FILE, build_run_section, describe_run

OVERLAP_K = 10
TILE = 1024  # number of texts in each matmul
SPEED_QUERIES, MIN_SPEED_SECONDS = 64, 3.0


# ---- fit -------------------------------------------------------------------------------------------------------------


def write_fit_report(run_dir: Path, trained: Sequence[dict[str, Any]], data: str, encoder: EncoderConfig) -> None:
    """Write report.md and report.html to the run directory, and print a summary of the metrics.

    Args:
        trained: Result of `evaluate_caption_fields` after the `align` stage.
        data: One-line description of the training and held-out data.
        encoder: Caption encoder before tuning.
    """
    tune_dir, evaluations = run_dir / "tune", run_dir / "evaluate"
    cra_files = [tune_dir / "cra_raw.json", tune_dir / "cra_tuned.json"]  # without tuning, only the first file exists
    cra = [read_json(file) for file in cra_files if file.exists()]
    losses = {stage: read_metrics(run_dir / stage / "metrics.jsonl") for stage in ("tune", "align")}
    choice_file = run_dir / ENCODER_CHOICE_FILE
    choice = read_json(choice_file) if choice_file.exists() else {}
    untrained = read_json(evaluations / "untrained.json")
    templates_file = evaluations / "query_templates.json"
    short_queries = read_json(templates_file) if templates_file.exists() else {}
    durations = read_json(run_dir / DURATIONS_FILE)
    blocks: list[Block] = [Heading("Retrieval"), *_build_retrieval_section(untrained, trained)]
    if short_queries.get("short queries"):
        blocks += _build_short_query_section(short_queries)
    blocks += [
        Heading("Example searches"),
        Paragraph(
            "Held-out captions, and the images that the model retrieves for each caption. The image to which the "
            "caption belongs is marked, but other images may also match the caption."
        ),
        *read_example_searches(read_json(evaluations / "examples.json")),
        Heading("Caption encoder"),
        Paragraph("Caption retrieval accuracy (CRA): how often an image's first two captions retrieve each other."),
        *_build_caption_retrieval_section(cra, describe_encoder(encoder)),
        *([Paragraph(describe_encoder_choice(choice))] if choice else []),
        Heading("Training"),
    ]
    for stage, rows in losses.items():
        if rows:
            blocks.append(plot_training_loss(stage, rows))
    stages = ", ".join(f"{stage} {format_duration(seconds)}" for stage, seconds in durations.items())
    settings = (run_dir / CONFIG_FILE).read_text(encoding="utf-8")
    blocks += [
        *_build_usage_section(run_dir),
        *build_run_section(describe_run(sum(durations.values())), f"Stages: {stages}. {data}", settings),
    ]
    verdict = describe_text_to_image_recall("The model", trained[0], "held-out captions")
    if trained[0]["images"] >= MIN_ROUGH_IMAGES:
        verdict += f" Before training: {describe_percentage(untrained[0]['T2I'][f'R@{K}'])}."
    if trained[0]["images"] < MIN_IMAGES:
        verdict += " To evaluate the model on other images, pass their sources to `--evaluate.data`."
    verdict += describe_failed_tuning(cra)
    page = run_dir / "report.html"
    write_report(page, f"Training results: {run_dir.resolve().name}", verdict, blocks)
    summary = build_fit_summary_table(cra, untrained, trained)
    print_once(render_markdown("Results", [summary], verdict), f"Report: {page}")


def _build_usage_section(run_dir: Path) -> list[Block]:
    model, index = shlex.quote(str(run_dir / "model")), shlex.quote(str(run_dir / "index"))
    commands = (
        f"llm2clip index PHOTOS --model {model} --out {index}\n"
        f"llm2clip search {index} 'a description of an image'\n"
        f"llm2clip serve {index}"
    )
    code = (
        "from llm2clip import LLM2CLIP\n\n"
        f'model = LLM2CLIP.from_pretrained("{run_dir / "model"}")\n'
        'images = model.encode_image(["photo.jpg"])\n'
        'texts = model.encode_text(["a full sentence about the photo"])\n'
        "model.similarity(texts, images)"
    )
    return [
        Heading("How to use the model"),
        Paragraph("Search a folder of images on the command line or on a web page:"),
        CodeBlock(commands, "bash"),
        Paragraph("In Python:"),
        CodeBlock(code, "python"),
    ]


def build_fit_summary_table(
    cra: Sequence[dict[str, Any]], untrained: Sequence[dict[str, Any]], trained: Sequence[dict[str, Any]]
) -> Table:
    """Return a table of the main metrics of a `fit` run. `cra` contains results before and, if tuned, after tuning."""
    rows: list[list[Any]] = []
    if len(cra) == 2:
        name = f"CRA ({format_count(cra[0]['images'], 'image')})"
        rows.append([name, cra[0]["chance"], cra[0]["CRA"], cra[1]["CRA"]])
    for before, after in zip(untrained, trained, strict=True):
        for direction in ("I2T", "T2I"):
            name = f"{after['captions']}: {direction} R@1 ({format_count(after['images'], 'image')})"
            chance, *_ = get_informative_recalls(after, direction, " chance")
            rows.append([name, chance, *(get_informative_recalls(row, direction)[0] for row in (before, after))])
    return Table(["held-out images, %", "chance", "before training", "after training"], rows)


def describe_failed_tuning(cra: Sequence[Mapping[str, Any]]) -> str:
    """Return a warning if tuning did not increase the CRA, or an empty string otherwise."""
    if len(cra) < 2 or cra[0]["images"] < MIN_IMAGES or cra[1]["CRA"] > cra[0]["CRA"]:
        return ""
    before, after = (metrics["CRA"] for metrics in cra)
    return (
        f" Tuning did not improve the caption encoder: the CRA was {before:.1f} before tuning and {after:.1f} after "
        "tuning. Use `--tune.steps 0`, or lower `--tune.lr`."
    )


def _build_caption_retrieval_section(cra: Sequence[dict[str, Any]], encoder: str) -> list[Block]:
    if not cra:
        return [Paragraph("CRA was not measured, because too few held-out images have two captions.")]
    rows: list[list[Any]] = [["chance", cra[0]["chance"], None]]
    for name, metrics in zip((encoder, "after tuning"), cra, strict=False):
        rows.append([name, metrics["CRA"], format_interval(metrics["CRA interval"])])
    header = [f"caption encoder ({format_count(cra[0]['images'], 'image')})", "CRA top-1, %", "95% interval"]
    return [
        Paragraph(describe_caption_retrieval("The encoder", cra[-1])),
        Table(header, rows, frozenset([2] if len(cra) == 2 else [])),
    ]


def _build_retrieval_section(untrained: Sequence[dict[str, Any]], trained: Sequence[dict[str, Any]]) -> list[Block]:
    rows: list[list[Any]] = []
    for before, after in zip(untrained, trained, strict=True):
        name = f"{after['captions']} ({format_count(after['images'], 'image')}, {format_count(after['texts'], 'text')})"
        rows.append([name, "chance", *_format_recall_cells(after, " chance")])
        rows.append(["", "untrained", *_format_recall_cells(before)])
        rows.append(["", "trained", *_format_recall_cells(after)])
    header = ["captions", "model"]
    for direction in ("I2T", "T2I"):
        header += [f"{direction} R@1", "95% interval", *(f"{direction} R@{k}" for k in KS[1:])]
    return [
        Paragraph(
            "Recall on held-out images, in percent. I2T is image-to-text retrieval, and T2I is text-to-image "
            "retrieval. A tie with a wrong answer counts as a miss. Confidence intervals are 95% bootstrap intervals "
            "over images. A dash instead of a recall means that there are so few images that a random order reaches "
            "100%. The recall is computed from stored embeddings. `evaluate` encodes the captions again (on a CPU in "
            "fp32), so its results can differ slightly."
        ),
        Table(header, rows, highlight=frozenset(range(2, len(rows), 3))),
    ]


def _format_recall_cells(row: Mapping[str, Any], suffix: str = "") -> list[Any]:
    cells: list[Any] = []
    for direction in ("I2T", "T2I"):
        first, *others = get_informative_recalls(row, direction, suffix)
        interval = None if suffix or first is None else format_interval(row[f"{direction} interval"]["R@1"])
        cells += [first, interval, *others]
    return cells


def _build_short_query_section(result: Mapping[str, Any]) -> list[Block]:
    """Return the report section on short queries. `result` is the output of `ShortQueryResult.to_dict`."""
    literal, with_templates = result["short queries"], result["short queries with templates"]
    header = ["query", *(f"{row['words']} {'word' if row['words'] == '1' else 'words'}: mAP" for row in literal)]
    rows = [
        ["chance", *(row["mAP chance"] for row in literal)],
        ["without templates", *(format_value_with_interval(row["mAP"], row["mAP interval"]) for row in literal)],
    ]
    text = (
        "Queries are words and short phrases from held-out captions. All images whose captions mention the query are "
        "correct answers. "
    )
    if with_templates:
        rows.append(
            ["with templates", *(format_value_with_interval(row["mAP"], row["mAP interval"]) for row in with_templates)]
        )
        templates = ", ".join(map(repr, result["templates"]))
        limit = "one word" if result["max_words"] == 1 else f"up to {result['max_words']} words"
        text += (
            f"In searches, queries of {limit} are also encoded with the templates {templates}, and the embeddings "
            "are averaged. The mAP with templates is slightly too high, because the templates were chosen on the same "
            "images."
        )
    else:
        text += "Searches do not use templates, because no templates improve the mAP."
    return [Heading("Short queries"), Paragraph(text), Table(header, rows, frozenset([len(rows) - 1]))]


def plot_training_loss(stage: str, rows: Sequence[dict[str, Any]]) -> Figure:
    """Plot a stage's loss at each step, and its moving average over about 5% of the steps."""
    losses = [row["loss"] for row in rows]
    window = max(1, len(losses) // 20) + 1
    averages = []
    for n in range(len(losses)):
        recent = losses[max(0, n + 1 - window) : n + 1]
        averages.append(sum(recent) / len(recent))
    curves = {"each step": losses, f"mean of {window} steps": averages}
    svg = plots.plot_curves(curves, [row["step"] for row in rows], "step", "loss")
    return Figure(svg, f"Training loss during {stage}.")


# ---- distill ---------------------------------------------------------------------------------------------------------


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
        encode_teacher_texts: Function that encodes N texts as L2-normalised embeddings of shape (N, D).
        held_out: Held-out records, keyed by caption field. May be empty.
        seconds: Duration of the run.
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
        ranked = compute_field_ranks(teacher_source, held_out)
        for name, ranks in ranked.items():
            result["fields"].append(compare_text_embeddings(name, ranks, student_source.encode_texts(ranks.captions)))
        first = next(iter(ranked.values()))
        captions = first.captions
        result["short queries"] = _compare_short_query_results(teacher_source, student_source, first)
    queries = captions[:SPEED_QUERIES] or ["a dog", "two children play in the snow while a man watches them"]
    for name, model_folder in (("teacher", teacher_folder), ("student", folder / "model")):
        result[name] = measure_text_encoder_cost(model_folder, queries)
    atomic_write_text(folder / "report.json", json.dumps(result, indent=1))
    tables, verdict = _build_comparison_section(result), describe_distillation_result(result)
    page = folder / "report.html"
    run_section = build_run_section(describe_run(seconds))
    blocks = [*tables, *_build_usage_section(folder), *run_section]
    write_report(page, f"Distillation results: {folder.resolve().name}", verdict, blocks)
    print_once(render_markdown("Teacher and student", tables, verdict), f"Report: {page}")


def describe_distillation_result(result: Mapping[str, Any]) -> str:
    """Describe how much of the teacher's recall the student retains, and how much faster it encodes queries."""
    speedup = result["student"]["queries per second"] / result["teacher"]["queries per second"]
    speed = f"{speedup:.0f} times" if speedup >= 10 else f"{speedup:.1f} times"
    speed_text = f"encodes {speed} as many queries per second as the teacher on one CPU core"
    if not result["fields"]:
        return f"The student {speed_text}. Its recall is unknown, because no images were held out."
    entry = result["fields"][0]
    if entry["images"] < MIN_IMAGES:
        few = f"there are fewer than {MIN_IMAGES} held-out images ({entry['images']:,})"
        return f"The student {speed_text}. Its recall cannot be judged, because {few}."
    teacher, student = (entry[side]["T2I"]["R@1"] for side in ("teacher", "student"))
    quality = f"reaches {student:.1f}% T2I R@1 on {entry['images']:,} held-out images (teacher: {teacher:.1f}%)"
    if teacher:
        quality = f"retains {100 * student / teacher:.0f}% of the teacher's T2I R@1 ({student:.1f} of {teacher:.1f})"
    return f"The student {quality} and {speed_text}."


def compare_text_embeddings(name: str, ranks: RetrievalRanks, texts: Tensor) -> dict[str, Any]:
    """Compare the text embeddings of a student and its teacher, which have the same image embeddings.

    Args:
        ranks: Retrieval ranks of the teacher on the caption field `name`.
        texts: Student's embeddings of `ranks.captions`, L2-normalised, of shape (T, D).

    Returns:
        A dict with the following keys:
            "captions", "images", "texts": Name of the caption field, number of images and number of texts.
            "teacher", "student": Results of `retrieval_metrics`.
            "cosine": Mean cosine similarity between the student's and the teacher's embeddings.
            "overlap@10": Mean percentage of the teacher's top 10 images that are also in the student's top 10.
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


def _compare_short_query_results(
    teacher: ModelEmbeddings, student: ModelEmbeddings, ranks: RetrievalRanks
) -> list[dict[str, Any]]:
    """Return each model's mAP by query length, using its own templates, or [] if no queries can be built."""
    scores = []
    for source in (teacher, student):
        try:
            result = evaluate_short_queries(source, ranks, source.query_templates)
        except ValueError as error:
            print_once(f"Skipped the evaluation of short queries: {error}")
            return []
        scores.append(result.with_templates or result.plain)
    entries = []
    for first, second in zip(*scores, strict=True):
        counts = {"words": first.words, "queries": len(first.scores)}
        entries.append(counts | {"teacher mAP": first.mean_ap, "student mAP": second.mean_ap})
    return entries


def measure_text_encoder_cost(folder: Path, queries: Sequence[str]) -> dict[str, Any]:
    """Measure the speed (on one CPU core) and the size of a model's text encoder.

    Queries are encoded one at a time in fp32 for at least three seconds. "bytes of weights" is the size of the weights
    in fp32, and "bytes on disk" is the size of the adapter's weights and the saved caption encoder.
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


def _build_comparison_section(result: Mapping[str, Any]) -> list[Block]:
    sides = (result["teacher"], result["student"])
    rows: list[list[Any]] = [
        ["queries per second on one core", *(f"{side['queries per second']:,.0f}" for side in sides)],
        ["parameters", *(f"{side['parameters']:,}" for side in sides)],
        ["memory of the weights in fp32", *(format_bytes(side["bytes of weights"]) for side in sides)],
        ["size on disk", *(format_bytes(side["bytes on disk"]) for side in sides)],
    ]
    text = "Queries are encoded one at a time in fp32. Teacher and student have the same image encoder."
    encoders: list[Block] = [
        Heading("Text encoders"),
        Paragraph(text),
        Table(["text encoder", "teacher", "student"], rows),
    ]
    if not result["fields"]:
        return encoders
    recalls: list[list[Any]] = []
    for entry in result["fields"]:
        for direction in ("T2I", "I2T"):
            chances = get_informative_recalls(entry["student"], direction, " chance")
            values = [get_informative_recalls(entry[side], direction) for side in ("teacher", "student")]
            for k, *cells in zip(KS, chances, *values, strict=True):
                recalls.append([f"{entry['captions']}: {direction} R@{k}", *cells])
    for entry in result["short queries"]:
        recalls.append([f"{entry['words']}-word queries: mAP", None, entry["teacher mAP"], entry["student mAP"]])
    agreement = [
        [entry["captions"], entry["texts"], f"{entry['cosine']:.3f}", entry[f"overlap@{OVERLAP_K}"]]
        for entry in result["fields"]
    ]
    return [
        Heading("Retrieval"),
        Paragraph("Metrics on held-out images, in percent. Both models use the same image embeddings."),
        Table(["metric", "chance", "teacher", "student"], recalls),
        *encoders,
        Heading("Agreement"),
        Paragraph(
            "Mean cosine similarity between the text embeddings of teacher and student, and mean percentage of the "
            f"teacher's top {OVERLAP_K} images that are also in the student's top {OVERLAP_K}."
        ),
        Table(["captions", "texts", "cosine", f"overlap@{OVERLAP_K}"], agreement),
    ]
