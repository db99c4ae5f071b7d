"""Our figures against those of the field's benchmarks, on the same vectors, and our models inside them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

from llm2clip import LLM2CLIP
from llm2clip.data.images import load_image
from llm2clip.evaluate.adapters import clip_benchmark as adapter
from llm2clip.evaluate.benchmarks import BENCHMARKS, DataFormatError
from llm2clip.evaluate.eccv_caption import eccv_metrics
from llm2clip.evaluate.recall import evaluate_retrieval
from llm2clip.evaluate.top_k import top_k_neighbors
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.dual_encoder import open_dual_encoder
from llm2clip.models.llm2clip import LLM2CLIPConfig
from llm2clip.models.vision_tower import VisionTower

os.environ.setdefault("HF_HUB_OFFLINE", "1")
COUNTS = [5, 1, 3, 7, 2, 5, 4, 6, 1, 2, 3, 5]
OWNER = torch.repeat_interleave(torch.arange(len(COUNTS)), torch.tensor(COUNTS))


@pytest.fixture(scope="module")
def vectors() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(len(COUNTS), 8, generator=g), dim=-1)
    texts = F.normalize(images[OWNER] + 0.6 * torch.randn(len(OWNER), 8, generator=g), dim=-1)
    return images, texts


@pytest.fixture(scope="module")
def folder(llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of ours with random weights."""
    torch.manual_seed(0)
    encoder = CaptionEncoder.from_pretrained(llm, layers=1)
    tower = VisionTower.from_pretrained("timm:test_efficientnet", pretrained=False, image_size=32)
    config = LLM2CLIPConfig(tower.config, encoder.embed_dim, embed_dim=8, encoder=encoder.identity())
    return LLM2CLIP(config, tower).save_pretrained(tmp_path_factory.mktemp("model") / "model", encoder=encoder)


def captioned_pictures(image_folder: Path) -> list[tuple[Image.Image, list[str]]]:
    files = sorted(image_folder.glob("*.png"))[: len(COUNTS)]
    return [
        (Image.open(file).convert("RGB"), [f"caption {n} of {file.stem}" for n in range(count)])
        for file, count in zip(files, COUNTS, strict=True)
    ]


def test_recall_is_clip_benchmarks(vectors: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Ragged captions, through its own code as its evaluation calls it."""
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

    images, texts = vectors
    ours = evaluate_retrieval(images, texts, OWNER)
    scores = texts @ images.T
    right = torch.zeros_like(scores, dtype=torch.bool)
    right[torch.arange(len(OWNER)), OWNER] = True
    for k in (1, 5, 10):
        t2i = (batchify(recall_at_k, scores, right, 4, "cpu", k=k) > 0).float().mean().item()
        i2t = (batchify(recall_at_k, scores.T, right.T, 4, "cpu", k=k) > 0).float().mean().item()
        assert ours["T2I"][f"R@{k}"] == pytest.approx(100 * t2i, abs=1e-4)
        assert ours["I2T"][f"R@{k}"] == pytest.approx(100 * i2t, abs=1e-4)


def test_recall_is_mtebs_hit_rate(vectors: tuple[torch.Tensor, torch.Tensor]) -> None:
    """`hit_rate_at_k`; what mteb calls recall divides by the number of captions."""
    from mteb._evaluators.retrieval_metrics import calculate_retrieval_scores

    images, texts = vectors
    ours, scores = evaluate_retrieval(images, texts, OWNER), (images @ texts.T).double()
    found = {str(i): {str(t): float(scores[i, t]) for t in range(len(texts))} for i in range(len(images))}
    right = {str(i): {str(t): 1 for t in range(len(texts)) if OWNER[t] == i} for i in range(len(images))}
    theirs = calculate_retrieval_scores(found, right, [1, 5, 10])
    for k in (1, 5, 10):
        assert theirs.hit_rate[f"HitRate@{k}"] == pytest.approx(ours["I2T"][f"R@{k}"] / 100, abs=1e-4)


def test_judged_figures_are_those_of_whole_lists(tmp_path: Path) -> None:
    """On random vectors of COCO's true numbers: from our short lists what eccv-caption makes of everything sorted; and
    our own mAP@R and R-precision are its."""
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
    at = {image: n for n, image in enumerate(data.image_ids)}
    owner = torch.tensor([at[image] for _, image in rows])
    captions = F.normalize(images[owner] + 0.35 * torch.randn(25000, 16, generator=g), dim=-1)
    ours = eccv_metrics(data, images, captions)

    caption_ids = torch.tensor(data.caption_ids)
    scores = images @ captions.T
    whole = {
        image: caption_ids[scores[n].argsort(descending=True)].tolist()
        for n, image in enumerate(data.image_ids)
        if image in metrics.eccv_gts["i2t"]
    }
    theirs = metrics.eccv_metrics({"i2t": whole}, "i2t")  # from whole lists
    for name, shown in (("eccv_map_at_r", "mAP@R"), ("eccv_rprecision", "R-precision")):
        assert ours[f"I2T ECCV {shown}"] == pytest.approx(100 * theirs[name]["i2t"], abs=1e-6)

    _, by_caption = top_k_neighbors(captions, images, 1)
    assert ours["T2I COCO R@1"] == pytest.approx(100 * float((by_caption[:, 0] == owner).double().mean()), abs=1e-6)
    best = {n: data.image_ids[i] for n, i in zip(data.caption_ids, by_caption[:, 0].tolist(), strict=True)}
    hits = [best[n] in right for n, right in Metrics().cxc_gts["t2i"].items()]
    assert ours["T2I CxC R@1"] == pytest.approx(100 * sum(hits) / len(hits), abs=1e-6)
    plain = evaluate_retrieval(images, captions, owner)
    for way in ("I2T", "T2I"):
        for k in (1, 5, 10):
            assert ours[f"{way} COCO R@{k}"] == pytest.approx(plain[way][f"R@{k}"], abs=1e-6)
    file.write_text(json.dumps({**annotations, "annotations": annotations["annotations"][1:]}))
    with pytest.raises(DataFormatError, match="lacks 1 of the 25,000"):
        BENCHMARKS["eccv-caption"].read(tmp_path / "coco")


def test_our_model_in_clip_benchmark(folder: Path, image_folder: Path) -> None:
    """Its own evaluation of our folder gives our figures."""
    from clip_benchmark.metrics import zeroshot_retrieval
    from clip_benchmark.models import load_clip

    adapter.register_model()
    model, transform, tokenizer = load_clip("llm2clip", str(folder), "", "", "cpu")
    items = captioned_pictures(image_folder)

    def collate(rows: list[Any]) -> tuple[torch.Tensor, list[list[str]]]:
        return torch.stack([transform(picture) for picture, _ in rows]), [captions for _, captions in rows]

    loader: DataLoader[Any] = DataLoader(items, batch_size=5, collate_fn=collate)  # type: ignore[arg-type]
    theirs = zeroshot_retrieval.evaluate(model, loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5])
    dual = open_dual_encoder(str(folder), "cpu")
    images = dual.encode_images([dual.transform(load_image(picture)) for picture, _ in items])
    texts = dual.encode_texts([caption for _, captions in items for caption in captions])
    ours = evaluate_retrieval(images, texts, OWNER)
    for k in (1, 5):
        assert theirs[f"image_retrieval_recall@{k}"] == pytest.approx(ours["T2I"][f"R@{k}"] / 100, abs=1e-6)
        assert theirs[f"text_retrieval_recall@{k}"] == pytest.approx(ours["I2T"][f"R@{k}"] / 100, abs=1e-6)


def test_our_model_in_mteb(folder: Path, image_folder: Path) -> None:
    """A local text-to-image task, run by mteb itself."""
    import mteb
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageColumn
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata

    from llm2clip.evaluate.adapters.mteb import MTEBModel

    items = captioned_pictures(image_folder)
    texts = [caption for _, captions in items for caption in captions]

    class Local(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="LocalT2IRetrieval", description="Pictures of colours", reference=None,
            dataset={"path": "local", "revision": "1"}, type="Any2AnyRetrieval", category="t2i",
            modalities=["text", "image"], eval_splits=["test"], eval_langs=["eng-Latn"], main_score="hit_rate_at_1",
            date=None, domains=None, task_subtypes=None, license=None, annotations_creators=None, dialect=None,
            sample_creation=None, bibtex_citation=None,
        )  # fmt: skip

        def load_data(self, **_: Any) -> None:
            features = Features({"id": Value("string"), "image": ImageColumn()})
            corpus = Dataset.from_dict(
                {"id": [f"i{n}" for n in range(len(items))], "image": [picture for picture, _ in items]}, features
            )
            queries = Dataset.from_dict({"id": [f"q{n}" for n in range(len(texts))], "text": texts})
            right = {f"q{n}": {f"i{int(i)}": 1} for n, i in enumerate(OWNER)}
            self.dataset = {
                "default": {
                    "test": RetrievalSplitData(corpus=corpus, queries=queries, relevant_docs=right, top_ranked=None)
                }
            }
            self.data_loaded = True

    model = MTEBModel(str(folder), "cpu")
    result = mteb.evaluate(model, Local(), cache=None, show_progress_bar=False)  # type: ignore[arg-type]
    scores = result.task_results[0].scores["test"][0]
    images = model.model.encode_images([model.model.transform(load_image(picture)) for picture, _ in items])
    ours = evaluate_retrieval(images, model.model.encode_texts(texts), OWNER)
    for k in (1, 5, 10):
        assert scores[f"hit_rate_at_{k}"] == pytest.approx(ours["T2I"][f"R@{k}"] / 100, abs=1e-4)
