"""Recall equals that of mteb's own evaluation of the same model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llm2clip.data.images import load_image
from llm2clip.evaluate.metrics import retrieval_metrics, two_way_ranks

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


def test_mteb_evaluates_our_model(model_folder: Path, image_folder: Path) -> None:
    """mteb's evaluation of a local text-to-image task gives the same recall as ours."""
    import mteb
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageColumn
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata

    from llm2clip.evaluate.mteb import get_model_meta

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

    model: Any = get_model_meta(str(model_folder)).load_model(device="cpu")
    result = mteb.evaluate(model, LocalTask(), cache=None, show_progress_bar=False)
    scores = result.task_results[0].scores["test"][0]
    images = model.model.encode_images([model.model.transform(load_image(image)) for image, _ in items])
    ours = measure_retrieval(images, model.model.encode_texts(texts), IMAGE_OF_TEXT)
    for k in (1, 5, 10):
        assert scores[f"hit_rate_at_{k}"] == pytest.approx(ours["T2I"][f"R@{k}"] / 100, abs=1e-4)
