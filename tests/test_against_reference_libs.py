"""Our metrics equal those of eccv-caption for the same embeddings, and of mteb for our models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from llm2clip.data.images import load_image
from llm2clip.evaluate.benchmarks import BENCHMARKS
from llm2clip.evaluate.benchmarks.eccv_caption import compute_eccv_metrics
from llm2clip.evaluate.recall import retrieval_metrics, two_way_ranks
from llm2clip.io_utils import DataFormatError

CAPTIONS_PER_IMAGE = [5, 1, 3, 7, 2, 5, 4, 6, 1, 2, 3, 5]
IMAGE_OF_TEXT = torch.repeat_interleave(torch.arange(len(CAPTIONS_PER_IMAGE)), torch.tensor(CAPTIONS_PER_IMAGE))


def measure_retrieval(images: torch.Tensor, texts: torch.Tensor, image_of_text: Any) -> dict[str, dict[str, Any]]:
    return retrieval_metrics(*two_way_ranks(images, texts, image_of_text), image_of_text)


def captioned_images(image_folder: Path) -> list[tuple[Image.Image, list[str]]]:
    files = sorted(image_folder.glob("*.png"))[: len(CAPTIONS_PER_IMAGE)]
    items = []
    for file, count in zip(files, CAPTIONS_PER_IMAGE, strict=True):
        captions = [f"caption {n} of {file.stem}" for n in range(count)]
        items.append((Image.open(file).convert("RGB"), captions))
    return items


def test_eccv_metrics_from_top_k_match_full_rankings(tmp_path: Path) -> None:
    """On random embeddings with COCO's ids, our top-k lists give the metrics that eccv-caption computes from full
    rankings."""
    from eccv_caption import Metrics

    metrics = Metrics()
    rows = [(int(n), metrics.coco_gts["t2i"][int(n)][0]) for n in metrics.coco_ids]
    names = {image: f"COCO_val2014_{image:012d}.jpg" for _, image in rows}
    (tmp_path / "coco/val2014").mkdir(parents=True)
    for name in names.values():
        (tmp_path / "coco/val2014" / name).touch()
    annotations: dict[str, Any] = {
        "images": [{"id": image, "file_name": name} for image, name in names.items()],
        "annotations": [{"id": n, "image_id": image, "caption": f"caption {n} "} for n, image in rows[::-1]],
    }
    file = tmp_path / "coco/annotations/captions_val2014.json"
    file.parent.mkdir()
    file.write_text(json.dumps(annotations))
    data = BENCHMARKS["eccv-caption"].read(BENCHMARKS["eccv-caption"].find(tmp_path))
    assert (len(data.images), len(data.captions)) == (5000, 25000)
    assert data.captions[0] == f"caption {rows[0][0]}" and str(data.images[0]).endswith(names[rows[0][1]])

    g = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(5000, 16, generator=g), dim=-1)
    index_of = {image: n for n, image in enumerate(data.image_ids)}
    image_of_caption = torch.tensor([index_of[image] for _, image in rows])
    captions = F.normalize(images[image_of_caption] + 0.35 * torch.randn(25000, 16, generator=g), dim=-1)
    ours = compute_eccv_metrics(data, images, captions)

    caption_ids = torch.tensor(data.caption_ids)
    scores = images @ captions.T
    rankings = {
        image: caption_ids[scores[n].argsort(descending=True)].tolist()
        for n, image in enumerate(data.image_ids)
        if image in metrics.eccv_gts["i2t"]
    }
    theirs = metrics.eccv_metrics({"i2t": rankings}, "i2t")
    for key, name in (("eccv_map_at_r", "mAP@R"), ("eccv_rprecision", "R-precision")):
        assert ours[f"I2T ECCV {name}"] == pytest.approx(100 * theirs[key]["i2t"], abs=1e-6)

    by_caption = scores.argmax(0)
    assert ours["T2I COCO R@1"] == pytest.approx(
        100 * float((by_caption == image_of_caption).double().mean()), abs=1e-6
    )
    best = {n: data.image_ids[i] for n, i in zip(data.caption_ids, by_caption.tolist(), strict=True)}
    hits = [best[n] in correct for n, correct in Metrics().cxc_gts["t2i"].items()]
    assert ours["T2I CxC R@1"] == pytest.approx(100 * sum(hits) / len(hits), abs=1e-6)
    recall = measure_retrieval(images, captions, image_of_caption)
    for direction in ("I2T", "T2I"):
        for k in (1, 5, 10):
            assert ours[f"{direction} COCO R@{k}"] == pytest.approx(recall[direction][f"R@{k}"], abs=1e-6)
    file.write_text(json.dumps({**annotations, "annotations": annotations["annotations"][1:]}))
    with pytest.raises(DataFormatError, match="does not contain 1 of the 25,000"):
        BENCHMARKS["eccv-caption"].read(tmp_path / "coco")


def test_mteb_evaluates_our_model(model_folder: Path, image_folder: Path) -> None:
    """mteb's evaluation of a local text-to-image task gives the same recall as ours."""
    import mteb
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageColumn
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata

    from llm2clip.evaluate.mteb import MTEBModel

    items = captioned_images(image_folder)
    texts = [caption for _, captions in items for caption in captions]

    class LocalTask(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="LocalT2IRetrieval", description="Images of colours", reference=None,
            dataset={"path": "local", "revision": "1"}, type="Any2AnyRetrieval", category="t2i",
            modalities=["text", "image"], eval_splits=["test"], eval_langs=["eng-Latn"], main_score="hit_rate_at_1",
            date=None, domains=None, task_subtypes=None, license=None, annotations_creators=None, dialect=None,
            sample_creation=None, bibtex_citation=None,
        )  # fmt: skip

        def load_data(self, **_: Any) -> None:
            features = Features({"id": Value("string"), "image": ImageColumn()})
            corpus = Dataset.from_dict(
                {"id": [f"i{n}" for n in range(len(items))], "image": [image for image, _ in items]}, features
            )
            queries = Dataset.from_dict({"id": [f"q{n}" for n in range(len(texts))], "text": texts})
            correct = {f"q{n}": {f"i{int(i)}": 1} for n, i in enumerate(IMAGE_OF_TEXT)}
            self.dataset = {
                "default": {
                    "test": RetrievalSplitData(corpus=corpus, queries=queries, relevant_docs=correct, top_ranked=None)
                }
            }
            self.data_loaded = True

    model = MTEBModel(str(model_folder), "cpu")
    result = mteb.evaluate(model, LocalTask(), cache=None, show_progress_bar=False)  # type: ignore[arg-type]
    scores = result.task_results[0].scores["test"][0]
    images = model.model.encode_images([model.model.transform(load_image(image)) for image, _ in items])
    ours = measure_retrieval(images, model.model.encode_texts(texts), IMAGE_OF_TEXT)
    for k in (1, 5, 10):
        assert scores[f"hit_rate_at_{k}"] == pytest.approx(ours["T2I"][f"R@{k}"] / 100, abs=1e-4)
