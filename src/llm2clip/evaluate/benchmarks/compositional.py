"""Winoground and SugarCrepe: images with captions that differ only in a few words or in word order.

A tie between the correct answer and a wrong answer counts as an error.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch import Tensor

from llm2clip.data.image_refs import MemoryImage
from llm2clip.evaluate.benchmarks.base import (
    Benchmark,
    CompositionalExample,
    check_files,
    find_coco_roots,
    resolve_image,
)
from llm2clip.io_utils import MissingFileError, find_first, read_json, read_jsonl

SUGARCREPE_KINDS = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


def _read_winoground(folder: Path) -> list[CompositionalExample]:
    """Read 400 examples. Each has two images and two captions, which consist of the same words (arXiv 2204.03162)."""
    try:
        file = find_first(folder, "examples.jsonl", "data/examples.jsonl")
    except MissingFileError:
        return _read_winoground_parquet(find_first(folder, "data/test-*.parquet", "test-*.parquet"))
    image_dir = find_first(file.parent, "images")
    examples = []
    for _, row in read_jsonl(file):
        names = [row["image_0"], row["image_1"]]
        refs = tuple(resolve_image(image_dir, name if Path(name).suffix else f"{name}.png") for name in names)
        captions = (row["caption_0"], row["caption_1"])
        examples.append(CompositionalExample(str(row["id"]), "winoground", refs, captions))
    _check_image_files(examples, file)
    return examples


def _read_winoground_parquet(file: Path) -> list[CompositionalExample]:
    """Read the version on the Hugging Face Hub, a Parquet table that includes the images."""
    examples = []
    columns = ["id", "image_0", "image_1", "caption_0", "caption_1"]
    for row in pq.read_table(file, columns=columns).to_pylist():
        refs = tuple(MemoryImage(row[key]["bytes"], f"{file}, {row['id']}, {key}") for key in ("image_0", "image_1"))
        captions = (row["caption_0"], row["caption_1"])
        examples.append(CompositionalExample(str(row["id"]), "winoground", refs, captions))
    return examples


def _read_sugarcrepe(folder: Path) -> list[CompositionalExample]:
    """Read 7,511 examples, each with a COCO val2017 image, a correct caption and a wrong caption (arXiv 2306.14610).

    In the wrong captions, words have been added, replaced or swapped. Each file contains one category of changes.
    """
    data_dir = folder / "data" if (folder / "data").is_dir() else folder
    image_dir = next((root / "val2017" for root in find_coco_roots(folder) if (root / "val2017").is_dir()), None)
    if image_dir is None:
        raise MissingFileError(f"no val2017 folder in {folder} or in a coco folder next to it")
    examples = []
    for kind in SUGARCREPE_KINDS:
        file = find_first(data_dir, f"{kind}.json")
        for key, row in read_json(file).items():
            refs = (resolve_image(image_dir, row["filename"]),)
            captions = (row["caption"].strip(), row["negative_caption"].strip())
            examples.append(CompositionalExample(f"{kind} {key}", kind, refs, captions))
    _check_image_files(examples, data_dir)
    return examples


def _check_image_files(examples: list[CompositionalExample], source: Path) -> None:
    check_files([image for example in examples for image in example.images], source)


def compute_compositional_accuracy(
    examples: Sequence[CompositionalExample],
    image_embeddings: Mapping[str, Tensor],
    text_embeddings: Mapping[str, Tensor],
) -> dict[str, float]:
    """Return the accuracies on Winoground or SugarCrepe, in percent.

    In Winoground (arXiv 2204.03162), each example has two images and two captions. For "text", each image must be more
    similar to its own caption than to the other caption. For "image", each caption must be more similar to its own
    image than to the other image. For "group", both conditions must hold. The chance levels are 25, 25 and 16.7.

    In SugarCrepe (arXiv 2306.14610), each example has one image, a correct caption and a wrong caption. The result
    contains the accuracy for each category, and "mean", the average over the categories. The chance level is 50.

    Args:
        examples: All examples of a single benchmark.
        image_embeddings: Image embeddings of shape (D,), L2-normalised, keyed by `ImageRef.key`.
        text_embeddings: Caption embeddings of shape (D,), L2-normalised, keyed by caption.
    """
    hits: dict[str, list[bool]] = {}
    for example in examples:
        images = torch.stack([image_embeddings[ref.key] for ref in example.images])
        captions = torch.stack([text_embeddings[caption] for caption in example.captions])
        scores = images @ captions.T  # (images, captions)
        if len(images) == 1:
            hits.setdefault(example.kind, []).append(bool(scores[0, 0] > scores[0, 1:].max()))
        else:
            for name, is_hit in _compute_pair_scores(scores).items():
                hits.setdefault(name, []).append(is_hit)
    accuracies = {name: 100.0 * sum(values) / len(values) for name, values in hits.items()}
    if "group" not in accuracies:
        accuracies["mean"] = sum(accuracies.values()) / len(accuracies)
    return accuracies


def _compute_pair_scores(scores: Tensor) -> dict[str, bool]:
    """Return Winoground's three scores for an example, given its similarities of shape (images, captions)."""
    correct = scores.diagonal()
    off_diagonal = ~torch.eye(len(scores), dtype=torch.bool)
    text = bool((correct[:, None] > scores)[off_diagonal].all())
    image = bool((correct[None] > scores)[off_diagonal].all())
    return {"text": text, "image": image, "group": text and image}


BENCHMARKS = (
    Benchmark(
        name="winoground",
        kind="compositional",
        description="400 pairs of images, each with two captions that consist of the same words",
        folders=("winoground", "Winoground"),
        read=_read_winoground,
        source="examples.jsonl and images/ (huggingface.co/datasets/facebook/winoground; you must accept its licence)",
    ),
    Benchmark(
        name="sugarcrepe",
        kind="compositional",
        description="7,511 images, each with a correct and a wrong caption",
        folders=("sugarcrepe", "sugar-crepe", "SugarCrepe"),
        read=_read_sugarcrepe,
        source="data/*.json (github.com/RAIVNLab/sugar-crepe) and COCO's val2017/",
    ),
)
