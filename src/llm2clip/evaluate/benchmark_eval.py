"""Evaluation of a model on a benchmark. The kind of benchmark determines the protocol."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm2clip.data.image_refs import ImageRef
from llm2clip.data.texts import unique_captions
from llm2clip.evaluate.benchmarks import (
    Benchmark,
    ClassificationData,
    CompositionalExample,
    DataFormatError,
    DetectionData,
    JudgedRetrieval,
    MissingFileError,
    RegionData,
    SegmentationData,
)
from llm2clip.evaluate.bootstrap import BootstrapMetrics
from llm2clip.evaluate.compositional import compositional_accuracy
from llm2clip.evaluate.dense.average_precision import detection_metrics
from llm2clip.evaluate.dense.detection import detect_objects, detection_blocks, without_images, write_detections
from llm2clip.evaluate.dense.regions import class_accuracy, classify_regions, region_metrics, wrong_region_blocks
from llm2clip.evaluate.dense.segmentation import (
    class_iou,
    evaluate_segmentation,
    segmentation_blocks,
    segmentation_metrics,
)
from llm2clip.evaluate.eccv_caption import eccv_metrics
from llm2clip.evaluate.embeddings import EmbeddingSource
from llm2clip.evaluate.retrieval_eval import RetrievalRanks, caption_field_metrics, rank_caption_fields
from llm2clip.evaluate.zero_shot import class_embeddings, class_prompts, classification_accuracy, linear_probe
from llm2clip.html_report import Block
from llm2clip.runs.ranks import print_once, process_state


@dataclass
class BenchmarkResult:
    """Result of a model on a benchmark.

    Args:
        summary: Entry for results.json. It always has "benchmark" and "kind". Retrieval results also have "rows" (see
            `caption_field_metrics`). Results for other types of benchmarks have "images" and "texts" (number of images
            and texts) and "truncated" (number of texts that exceed the model's maximum length). Compositional
            benchmarks have "examples" (number of examples whose images can be decoded). They also have "metrics" (in
            classification, with "intervals", the 95% confidence intervals) or, if the benchmark is evaluated with
            several methods, "rows". Each of these rows has "method", "metrics", "intervals" and a metric of each class
            ("class top-1", "IoU" or "class AP50"). Rows whose metrics depend on the logit scale also have "logit
            scale". All metrics are in percent, except "linear probe C".
        images: Images of the benchmark, including images that cannot be decoded.
        ranks: Ranks for each caption field. Only set for retrieval benchmarks.
        bootstrap: Metrics of each method, for paired differences. Only set for classification, whose only method is "",
            and for benchmarks about parts of images.
        draw_examples: Function that returns a section of the report with example images.
    """

    summary: dict[str, Any]
    images: Sequence[ImageRef] = ()
    ranks: dict[str, RetrievalRanks] = field(default_factory=dict)
    bootstrap: dict[str, BootstrapMetrics] = field(default_factory=dict)
    draw_examples: Callable[[], list[Block]] | None = None


def run_benchmark(
    benchmark: Benchmark,
    folder: Path,
    embeddings: EmbeddingSource,
    with_linear_probe: bool = False,
    dense_variants: Sequence[str] = ("plain",),
    proposals: str | None = None,
    crop_proposals: bool = False,
    predictions_dir: Path | None = None,
) -> BenchmarkResult:
    """Evaluate a model on a benchmark.

    Args:
        benchmark: Benchmark to evaluate on.
        folder: Folder that contains the benchmark's files.
        embeddings: Source of the model's embeddings.
        with_linear_probe: If True, also fit a linear probe for classification benchmarks with training images.
        dense_variants: Variants of the dense features to evaluate. See `DENSE_VARIANTS`.
        proposals: For detection benchmarks, the source of the boxes. See `open_proposals`.
        crop_proposals: If True, also classify each box by its crop in detection benchmarks.
        predictions_dir: Folder for the predictions in segmentation and detection. If None, they are not saved. See
            `LabelMapWriter` and `write_detections`.

    Raises:
        MissingFileError: If a file is missing.
        DataFormatError: If a file does not have the expected format.
        TooManySkipped: If too many images cannot be decoded.
    """
    summary: dict[str, Any] = {"benchmark": benchmark.name, "kind": benchmark.kind}
    bootstrap: dict[str, BootstrapMetrics] = {}
    data = benchmark.load(folder)
    images = _benchmark_images(benchmark, data)
    if benchmark.kind == "retrieval":
        ranks = rank_caption_fields(embeddings, data)
        return BenchmarkResult(summary | {"rows": caption_field_metrics(embeddings, ranks)}, images, ranks)
    if benchmark.kind in ("regions", "segmentation", "detection"):
        if benchmark.kind == "regions":
            result = _evaluate_regions(data, embeddings, dense_variants)
        elif benchmark.kind == "segmentation":
            result = _evaluate_segmentation(data, embeddings, dense_variants, predictions_dir)
        else:
            result = _evaluate_detection(data, embeddings, dense_variants, proposals, crop_proposals, predictions_dir)
        return dataclasses.replace(result, summary=summary | result.summary, images=images)
    if benchmark.kind == "judged retrieval":
        metrics, num_images, texts = _evaluate_judged_retrieval(data, embeddings)
    elif benchmark.kind == "compositional":
        metrics, num_images, texts, summary["examples"] = _evaluate_compositional(data, embeddings)
    else:
        train = _load_probe_data(benchmark, folder) if with_linear_probe else None
        metrics, num_images, texts, bootstrap[""] = _evaluate_classification(data, embeddings, train)
        summary["intervals"] = bootstrap[""].intervals
    summary |= {
        "images": num_images,
        "texts": len(texts),
        "truncated": embeddings.count_truncated(texts),
        "metrics": metrics,
    }
    return BenchmarkResult(summary, images, bootstrap=bootstrap)


def _benchmark_images(benchmark: Benchmark, data: Any) -> list[ImageRef]:
    """Return the images of a benchmark. The type of `data` depends on the benchmark's kind."""
    if benchmark.kind == "retrieval":
        return [record.image for records in data.values() for record in records if record.image is not None]
    if benchmark.kind == "compositional":
        return [image for example in data for image in example.images]
    return list(data.images)


# Each of the following functions returns the metrics, the number of images that could be decoded, and the texts.
# `_evaluate_compositional` also returns the number of examples whose images could be decoded, and
# `_evaluate_classification` the accuracies with their resamples.


def _evaluate_judged_retrieval(
    data: JudgedRetrieval, embeddings: EmbeddingSource
) -> tuple[dict[str, float], int, list[str]]:
    images, indices = embeddings.encode_images(data.images)
    undecodable = set(range(len(data.images))) - set(indices)
    if undecodable:
        raise DataFormatError(
            f"{len(undecodable):,} images cannot be decoded, e.g. {data.images[min(undecodable)]}; "
            "this benchmark requires all of its images"
        )
    texts = list(data.captions)
    return eccv_metrics(data, images, embeddings.encode_texts(texts)), len(images), texts


def _evaluate_compositional(
    examples: Sequence[CompositionalExample], embeddings: EmbeddingSource
) -> tuple[dict[str, float], int, list[str], int]:
    refs = list({ref.key: ref for example in examples for ref in example.images}.values())
    texts = unique_captions(caption for example in examples for caption in example.captions)
    images, indices = embeddings.encode_images(refs)
    image_embeddings = {refs[i].key: image for i, image in zip(indices, images, strict=True)}
    text_embeddings = dict(zip(texts, embeddings.encode_texts(texts), strict=True))
    complete = [example for example in examples if all(ref.key in image_embeddings for ref in example.images)]
    metrics = compositional_accuracy(complete, image_embeddings, text_embeddings)
    return metrics, len(image_embeddings), texts, len(complete)


def _evaluate_classification(
    data: ClassificationData, embeddings: EmbeddingSource, train: ClassificationData | None
) -> tuple[dict[str, float], int, list[str], BootstrapMetrics]:
    images, indices = embeddings.encode_images(data.images)
    labels = [data.labels[i] for i in indices]
    prompts = class_prompts(data.names, data.templates)
    classes = class_embeddings(embeddings.encode_texts(prompts), len(data.names))
    accuracy = classification_accuracy(images, labels, classes, indices)
    metrics = dict(accuracy.values)
    images_per_class = torch.bincount(torch.tensor(labels))
    metrics["chance"] = 100.0 / int((images_per_class > 0).sum())
    if train is not None:
        if list(train.names) != list(data.names):
            raise DataFormatError(
                "the training images and the test images do not have the same classes in the same order"
            )
        train_images, train_indices = embeddings.encode_images(train.images)
        probe = linear_probe(train_images, [train.labels[i] for i in train_indices], images, labels)
        metrics |= {"linear probe": probe["top-1"], "linear probe C": probe["C"]}
    return metrics, len(images), prompts, accuracy


def _evaluate_regions(data: RegionData, embeddings: EmbeddingSource, variants: Sequence[str]) -> BenchmarkResult:
    predictions = classify_regions(data, embeddings, variants)
    rows, bootstrap = [], {}
    for method, method_predictions in predictions.items():
        bootstrap[method] = region_metrics(data, method_predictions)
        accuracies = dict(zip(data.names, class_accuracy(data, method_predictions), strict=True))
        rows.append(_method_row(method, bootstrap[method]) | {"class top-1": accuracies})
    prompts = class_prompts(data.names, data.templates)
    first_method, first_predictions = next(iter(predictions.items()))
    summary = {
        "images": len(set(first_predictions.image.tolist())),
        "regions": len(first_predictions.image),
        "excluded regions": dict(data.excluded),
        "texts": len(prompts),
        "truncated": embeddings.count_truncated(prompts),
        "chance": 100.0 / len(data.names),
        "rows": rows,
    }
    draw_examples = partial(wrong_region_blocks, data, first_method, first_predictions)
    return BenchmarkResult(summary, bootstrap=bootstrap, draw_examples=draw_examples)


def _evaluate_segmentation(
    data: SegmentationData, embeddings: EmbeddingSource, variants: Sequence[str], predictions_dir: Path | None
) -> BenchmarkResult:
    result = evaluate_segmentation(data, embeddings, variants, predictions_dir)
    rows, bootstrap = [], {}
    class_names = [data.class_name(label) for label in range(len(data.names))]
    for method, counts in result.counts.items():
        bootstrap[method] = segmentation_metrics(counts, result.images)
        row = _method_row(method, bootstrap[method])
        row["IoU"] = dict(zip(class_names, class_iou(counts), strict=True))
        if data.min_probability > 0:  # otherwise, the scale does not affect the predictions
            row["logit scale"] = result.logit_scales[method]
        rows.append(row)
    prompts = class_prompts([name for names in data.names for name in names], data.templates)
    summary = {
        "images": len(result.images),
        "texts": len(prompts),
        "truncated": embeddings.count_truncated(prompts),
        "rows": rows,
    }
    return BenchmarkResult(summary, bootstrap=bootstrap, draw_examples=partial(segmentation_blocks, data, result))


def _evaluate_detection(
    data: DetectionData,
    embeddings: EmbeddingSource,
    variants: Sequence[str],
    proposals: str | None,
    with_crops: bool,
    predictions_dir: Path | None,
) -> BenchmarkResult:
    if proposals is None:
        raise ValueError(
            "a detection benchmark needs boxes: pass --proposals with a JSON file in COCO's results format, a "
            "detector, or ground-truth"
        )
    results = detect_objects(data, embeddings, proposals, variants, with_crops)
    description = results.describe_proposals(proposals)
    data = without_images(data, results.failures)
    rows, bootstrap = [], {}
    for method, detections in results.by_method.items():
        if predictions_dir is not None and process_state().is_main_process:
            write_detections(predictions_dir, method, data, detections)
        groups = detection_metrics(data, detections)
        metrics = {f"AP50 {group}": values["AP50"] for group, values in groups.items()}
        metrics |= {f"AP {group}": values["AP"] for group, values in groups.items()}
        metrics["proposal recall"] = description["recall"]
        resamples = {f"AP50 {group}": values["AP50 resamples"] for group, values in groups.items()}
        bootstrap[method] = BootstrapMetrics(tuple(data.image_ids), metrics, resamples)
        row = _method_row(method, bootstrap[method]) | {"class AP50": groups["all"]["class AP50"]}
        rows.append(row | {"logit scale": results.logit_scales[method]})
    prompts = class_prompts(data.names, data.templates)
    first_method, first_detections = next(iter(results.by_method.items()))
    summary = {
        "images": len(first_detections),
        "texts": len(prompts),
        "truncated": embeddings.count_truncated(prompts),
        "proposals": description,
        "rows": rows,
    }
    draw_examples = partial(detection_blocks, data, first_method, first_detections)
    return BenchmarkResult(summary, bootstrap=bootstrap, draw_examples=draw_examples)


def _method_row(method: str, metrics: BootstrapMetrics) -> dict[str, Any]:
    return {"method": method, "metrics": dict(metrics.values), "intervals": metrics.intervals}


def _load_probe_data(benchmark: Benchmark, folder: Path) -> ClassificationData | None:
    """Return the training images for a linear probe. If there are none, print the reason and return None."""
    try:
        train = benchmark.load_train_split(folder)
    except MissingFileError as error:
        print_once(f"{benchmark.name}: linear probe skipped: {error}")
        return None
    if train is None or len(set(train.labels)) < 2:
        print_once(f"{benchmark.name}: linear probe skipped: it needs training images from at least two classes")
        return None
    return train
