"""Evaluation of a model on a benchmark. The kind of benchmark determines the protocol."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from llm2clip.config import EvaluateOptions
from llm2clip.data.image_refs import ImageRef
from llm2clip.data.texts import deduplicate_captions
from llm2clip.evaluate.benchmarks.base import (
    Benchmark,
    ClassificationData,
    CompositionalExample,
    DetectionData,
    RegionData,
    SegmentationData,
)
from llm2clip.evaluate.bootstrap import BootstrapMetrics
from llm2clip.evaluate.classification import (
    classification_accuracy,
    compute_compositional_accuracy,
    encode_classes,
    fit_linear_probe,
)
from llm2clip.evaluate.dense.detection import (
    build_detection_blocks,
    compute_detection_metrics,
    detect_objects,
    drop_images,
    write_detections,
)
from llm2clip.evaluate.dense.regions import (
    build_wrong_region_blocks,
    classify_regions,
    compute_class_accuracy,
    compute_region_metrics,
)
from llm2clip.evaluate.dense.segmentation import (
    build_segmentation_blocks,
    compute_class_iou,
    compute_segmentation_metrics,
    evaluate_segmentation,
)
from llm2clip.evaluate.embeddings import EmbeddingSource
from llm2clip.evaluate.reporting.error_analysis import ErrorAnalysis
from llm2clip.evaluate.retrieval import RetrievalRanks, compute_field_metrics, rank_caption_fields
from llm2clip.evaluate.short_queries import ShortQueryResult
from llm2clip.io_utils import DataFormatError, MissingFileError
from llm2clip.models.prompts import fill_templates
from llm2clip.reports import Block
from llm2clip.runs.ranks import print_once, process_state


@dataclass
class BenchmarkResult:
    """Result of a model on a benchmark.

    Args:
        summary: Entry for results.json, with "benchmark" and "kind". Metrics are in percent, except "linear probe C".
            Retrieval entries have "rows" (see `compute_field_metrics`). All other entries have the counts "images",
            "texts" and "truncated" (texts that exceed the model's maximum length). Compositional and classification
            entries have "metrics". Classification entries also have "intervals" (95% confidence intervals).
            Compositional entries also have "examples" (number of decodable examples). Region, segmentation and
            detection entries have "rows", one per method, with "method", "metrics", "intervals", per-class metrics
            ("class top-1", "IoU" or "class AP50") and, if it affects the metrics, "logit scale".
        images: All images in the benchmark, including undecodable images.
        ranks: Retrieval ranks, keyed by caption field. Empty if the benchmark is not a retrieval benchmark.
        bootstrap: Metrics and their bootstrap resamples, keyed by method ("" for classification). Used to compute
            paired differences between models.
        draw_examples: Function that returns a report section with example images.
        model: Display name of the model.
        error_analysis, short_queries: Results of `analyze_errors` and `score_short_queries`, keyed by caption field.
        examples: Result of `draw_examples`. Empty if the report shows no example images.
    """

    summary: dict[str, Any]
    images: Sequence[ImageRef] = ()
    ranks: dict[str, RetrievalRanks] = field(default_factory=dict)
    bootstrap: dict[str, BootstrapMetrics] = field(default_factory=dict)
    draw_examples: Callable[[], list[Block]] | None = None
    model: str = ""
    error_analysis: dict[str, ErrorAnalysis] = field(default_factory=dict)
    short_queries: dict[str, ShortQueryResult] = field(default_factory=dict)
    examples: list[Block] = field(default_factory=list)


def run_benchmark(
    benchmark: Benchmark,
    folder: Path,
    embeddings: EmbeddingSource,
    options: EvaluateOptions,
    predictions_dir: Path | None = None,
) -> BenchmarkResult:
    """Evaluate a model on a benchmark.

    Args:
        predictions_dir: Folder for segmentation and detection predictions. If None, predictions are not saved. See
            `LabelMapWriter` and `write_detections`.

    Raises:
        MissingFileError: If a file is missing.
        DataFormatError: If a file does not have the expected format.
        TooManySkipped: If too many images cannot be decoded.
    """
    data = benchmark.load(folder)
    variants = options.dense_variants
    if benchmark.kind == "retrieval":
        ranks = rank_caption_fields(embeddings, data)
        images = [record.image for records in data.values() for record in records if record.image is not None]
        result = BenchmarkResult({"rows": compute_field_metrics(embeddings, ranks)}, images, ranks)
    elif benchmark.kind == "compositional":
        result = _evaluate_compositional(data, embeddings)
    elif benchmark.kind == "classification":
        train = _load_probe_data(benchmark, folder) if options.linear_probe else None
        result = _evaluate_classification(data, embeddings, train)
    elif benchmark.kind == "regions":
        result = _evaluate_regions(data, embeddings, variants)
    elif benchmark.kind == "segmentation":
        result = _evaluate_segmentation(data, embeddings, variants, predictions_dir)
    else:
        result = _evaluate_detection(data, embeddings, options, predictions_dir)
    result.summary = {"benchmark": benchmark.name, "kind": benchmark.kind, **result.summary}
    return result


def _count_texts(
    embeddings: EmbeddingSource, names: Sequence[str], templates: Sequence[str] = ("{}",)
) -> dict[str, int | None]:
    """Insert names into templates. Return the number of resulting texts ("texts") and of truncated texts."""
    texts = fill_templates(names, templates)
    return {"texts": len(texts), "truncated": embeddings.count_truncated(texts)}


def _evaluate_compositional(examples: Sequence[CompositionalExample], embeddings: EmbeddingSource) -> BenchmarkResult:
    refs = list({ref.key: ref for example in examples for ref in example.images}.values())
    texts = deduplicate_captions(caption for example in examples for caption in example.captions)
    images, indices = embeddings.encode_images(refs)
    image_embeddings = {refs[i].key: image for i, image in zip(indices, images, strict=True)}
    text_embeddings = dict(zip(texts, embeddings.encode_texts(texts), strict=True))
    complete = [example for example in examples if all(ref.key in image_embeddings for ref in example.images)]
    counts = {"examples": len(complete), "images": len(images), **_count_texts(embeddings, texts)}
    metrics = compute_compositional_accuracy(complete, image_embeddings, text_embeddings)
    return BenchmarkResult(counts | {"metrics": metrics}, [image for example in examples for image in example.images])


def _evaluate_classification(
    data: ClassificationData, embeddings: EmbeddingSource, train: ClassificationData | None
) -> BenchmarkResult:
    images, indices = embeddings.encode_images(data.images)
    labels = [data.labels[i] for i in indices]
    classes = encode_classes(embeddings, data.names, data.templates)
    accuracy = classification_accuracy(images, labels, classes, indices)
    metrics = dict(accuracy.values)
    metrics["chance"] = 100.0 / len(set(labels))
    if train is not None:
        if list(train.names) != list(data.names):
            raise DataFormatError("the linear probe requires training and test images with the same classes")
        train_images, train_indices = embeddings.encode_images(train.images)
        probe = fit_linear_probe(train_images, [train.labels[i] for i in train_indices], images, labels)
        metrics |= {"linear probe": probe["top-1"], "linear probe C": probe["C"]}
    summary = {
        "intervals": accuracy.intervals,
        "images": len(images),
        **_count_texts(embeddings, data.names, data.templates),
    }
    return BenchmarkResult(summary | {"metrics": metrics}, data.images, bootstrap={"": accuracy})


def _evaluate_regions(data: RegionData, embeddings: EmbeddingSource, variants: Sequence[str]) -> BenchmarkResult:
    predictions = classify_regions(data, embeddings, variants)
    rows, bootstrap = [], {}
    for method, method_predictions in predictions.items():
        bootstrap[method] = compute_region_metrics(data, method_predictions)
        accuracies = dict(zip(data.names, compute_class_accuracy(data, method_predictions), strict=True))
        rows.append(_make_method_row(method, bootstrap[method]) | {"class top-1": accuracies})
    first_method, first_predictions = next(iter(predictions.items()))
    summary = {
        "images": len(set(first_predictions.image.tolist())),
        "regions": len(first_predictions.image),
        "excluded regions": dict(data.excluded),
        **_count_texts(embeddings, data.names, data.templates),
        "chance": 100.0 / len(data.names),
        "rows": rows,
    }
    draw_examples = partial(build_wrong_region_blocks, data, first_method, first_predictions)
    return BenchmarkResult(summary, data.images, bootstrap=bootstrap, draw_examples=draw_examples)


def _evaluate_segmentation(
    data: SegmentationData, embeddings: EmbeddingSource, variants: Sequence[str], predictions_dir: Path | None
) -> BenchmarkResult:
    result = evaluate_segmentation(data, embeddings, variants, predictions_dir)
    rows, bootstrap = [], {}
    class_names = [data.get_class_name(label) for label in range(len(data.names))]
    for method, counts in result.counts.items():
        bootstrap[method] = compute_segmentation_metrics(counts, result.images)
        row = _make_method_row(method, bootstrap[method])
        row["IoU"] = dict(zip(class_names, compute_class_iou(counts), strict=True))
        if data.min_probability > 0:  # without a threshold, the logit scale does not affect predictions
            row["logit scale"] = result.logit_scales[method]
        rows.append(row)
    all_names = [name for names in data.names for name in names]
    summary = {"images": len(result.images), **_count_texts(embeddings, all_names, data.templates), "rows": rows}
    draw_examples = partial(build_segmentation_blocks, data, result)
    return BenchmarkResult(summary, data.images, bootstrap=bootstrap, draw_examples=draw_examples)


def _evaluate_detection(
    data: DetectionData, embeddings: EmbeddingSource, options: EvaluateOptions, predictions_dir: Path | None
) -> BenchmarkResult:
    if options.proposals is None:
        raise ValueError(
            "a detection benchmark needs boxes: pass --proposals FILE.json (COCO's results format), "
            "--proposals DETECTOR, or --proposals ground-truth"
        )
    results = detect_objects(data, embeddings, options.proposals, options.dense_variants, options.crop_proposals)
    description = results.describe_proposals(options.proposals)
    usable = drop_images(data, results.failures)
    rows, bootstrap = [], {}
    for method, detections in results.by_method.items():
        if predictions_dir is not None and process_state().is_main_process:
            write_detections(predictions_dir, method, usable, detections)
        metrics, class_ap50 = compute_detection_metrics(usable, detections)
        values = {**metrics.values, "proposal recall": description["recall"]}
        bootstrap[method] = dataclasses.replace(metrics, values=values)
        row = _make_method_row(method, bootstrap[method])
        rows.append(row | {"class AP50": class_ap50, "logit scale": results.logit_scales[method]})
    first_method, first_detections = next(iter(results.by_method.items()))
    summary = {
        "images": len(first_detections),
        **_count_texts(embeddings, data.names, data.templates),
        "proposals": description,
        "rows": rows,
    }
    draw_examples = partial(build_detection_blocks, usable, first_method, first_detections)
    return BenchmarkResult(summary, data.images, bootstrap=bootstrap, draw_examples=draw_examples)


def _make_method_row(method: str, metrics: BootstrapMetrics) -> dict[str, Any]:
    return {"method": method, "metrics": dict(metrics.values), "intervals": metrics.intervals}


def _load_probe_data(benchmark: Benchmark, folder: Path) -> ClassificationData | None:
    """Load the training images for a linear probe. If no probe can be trained, print the reason and return None."""
    try:
        train: ClassificationData | None = benchmark.load(folder, train=True)
    except MissingFileError as error:
        print_once(f"{benchmark.name}: linear probe skipped: {error}")
        return None
    if train is None or len(set(train.labels)) < 2:
        print_once(f"{benchmark.name}: linear probe skipped: it needs training images from at least two classes")
        return None
    return train
