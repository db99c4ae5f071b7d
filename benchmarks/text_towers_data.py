"""Variants, training and tests of `text_towers.py`. Each result is computed once and saved:

OUT/
  features/, features.json     image features of the frozen tower
  NAME/tune/, tune.json        tuned encoder
  NAME/store/, embed.json      caption embeddings; cra.json has the CRA on the held-out captions
  NAME/frozen-SEED.json        hits of each test image with the tower frozen; trained-SEED.json with the tower trained
  NAME/align-trained-SEED/     trained model
  NAME/speed.json              queries per second
"""

import os
import random
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from llm2clip.cli.commands import read_builtin_configs
from llm2clip.config import AlignConfig, EncoderConfig, EvaluateConfig, TuneConfig
from llm2clip.data.build_table import DataSplits, build_record_table, read_data_splits
from llm2clip.data.image_facts import find_matching_images
from llm2clip.data.image_refs import ImageRef
from llm2clip.data.noun_phrases import add_noun_phrases
from llm2clip.data.pairs import read_tuning_sources
from llm2clip.data.records import TEXT_FIELDS, Record
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.table import RecordTable
from llm2clip.evaluate.caption_retrieval import caption_retrieval_accuracy
from llm2clip.evaluate.embeddings import ModelEmbeddings
from llm2clip.evaluate.retrieval import RetrievalRanks, build_dual_encoder_from_store, compute_field_ranks
from llm2clip.evaluate.short_queries import CANDIDATES, build_short_queries, evaluate_short_queries
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.precision import FP32
from llm2clip.models.prompts import QueryTemplates, build_query_prompts
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.pipeline import open_encoder
from llm2clip.runs.ranks import load_or_compute_json
from llm2clip.store.encode import TowerEncoder, embed, store_image_features
from llm2clip.store.layout import make_image_keys
from llm2clip.store.store import EmbeddingStore, drop_refused_captions
from llm2clip.train.align import align
from llm2clip.train.initial_model import create_initial_model
from llm2clip.train.tune import tune
from measurements import Timer
from reproduce_data import StoreTextEncoder, replace_captions
from shared import read_rows

CPU_CONFIG = yaml.safe_load(read_builtin_configs()["cpu-llm"])
TRAINED = AlignConfig(**CPU_CONFIG["align"], eval_steps=0)
FROZEN = replace(TRAINED, tower_lr=0.0, epochs=10)
TUNING = TuneConfig(**CPU_CONFIG["tune"])
MINILM_TUNING = replace(TUNING, steps=100, lr=2e-4)
TEMPLATES = QueryTemplates(CANDIDATES[1])

FLICKR, NEW, CHINESE, GERMAN = "Flickr8k", "Flickr8k, not in Flickr30k", "Chinese", "German"
COCO, SENTENCES, ADE20K = "COCO", "ADE20K, sentences", "ADE20K, long captions"
TESTS = (FLICKR, NEW, COCO, SENTENCES, ADE20K, CHINESE, GERMAN)
DEFAULT = "smollm2-12-tuned"  # text tower of the `cpu-llm` config


@dataclass(frozen=True)
class Variant:
    """Text tower: the caption encoder, and how it is tuned (if at all).

    Variants with `is_point` are only points of `choice`: one `frozen` run, tested on the English captions of Flickr8k.
    """

    encoder: str
    layers: int | None = None
    tuning: TuneConfig | None = None
    is_point: bool = False
    bidirectional: bool | None = None

    @property
    def seeds(self) -> int:
        return 1 if self.is_point else 3


SMOLLM, GEMMA, MINILM = "smollm2-135m", "gemma3-270m", "all-minilm-l6-v2"
VARIANTS = {
    "minilm": Variant(MINILM),
    "smollm2-12": Variant(SMOLLM, 12),
    "smollm2-30": Variant(SMOLLM),
    "gemma3-18": Variant(GEMMA),
    "gemma3-12": Variant(GEMMA, 12),
    "smollm2-2": Variant(SMOLLM, 2, is_point=True),
    "smollm2-4": Variant(SMOLLM, 4, is_point=True),
    "smollm2-8": Variant(SMOLLM, 8, is_point=True),
    "gemma3-2": Variant(GEMMA, 2, is_point=True),
    "gemma3-4": Variant(GEMMA, 4, is_point=True),
    "gemma3-8": Variant(GEMMA, 8, is_point=True),
    "minilm-tuned": Variant(MINILM, tuning=MINILM_TUNING),
    "mpnet": Variant("all-mpnet-base-v2"),
    "minilm-3": Variant(MINILM, 3, is_point=True),
    "smollm2-18": Variant(SMOLLM, 18, is_point=True),
    "smollm2-24": Variant(SMOLLM, 24, is_point=True),
    "smollm2-4-tuned": Variant(SMOLLM, 4, TUNING),
    "smollm2-12-tuned": Variant(SMOLLM, 12, TUNING),
    "smollm2-12-causal": Variant(SMOLLM, 12, is_point=True, bidirectional=False),
    "smollm2-30-causal": Variant(SMOLLM, is_point=True, bidirectional=False),
    "gemma3-4-tuned": Variant(GEMMA, 4, TUNING),
    "gemma3-12-tuned": Variant(GEMMA, 12, TUNING),
    "gemma3-18-tuned": Variant(GEMMA, tuning=TUNING),
    "smollm2-30-tuned": Variant(SMOLLM, tuning=TUNING),
}


class Benchmark:
    """Data, caption encoders, embedding stores and results of a benchmark run."""

    def __init__(self, data: Path, out: Path, captions: str = "captions") -> None:
        """`captions` is the column of Flickr8k to train on. With other captions, only these are tested."""
        self.data, self.out, self.captions = data, out, captions
        self.log = SkipLog(max_skipped=0.1)  # 8% of the images have no German captions

    @property
    def is_english(self) -> bool:
        return self.captions == "captions"

    @cached_property
    def splits(self) -> DataSplits:
        config = EvaluateConfig(fields=["captions_zh", "captions_de"] if self.is_english else [])
        columns = {} if self.is_english else {"captions": self.captions}
        splits = read_data_splits([str(self.data / "flickr8k/captions.jsonl")], config, columns, self.log)
        splits.train = add_noun_phrases(splits.train)
        print(splits.summary, flush=True)
        return splits

    @cached_property
    def tests(self) -> dict[str, Sequence[Record]]:
        """Records of each test, except for NEW, which is a subset of the queries of FLICKR."""
        held_out = self.splits.held_out
        if not self.is_english:
            return {FLICKR: list(held_out["captions"])}
        coco = build_record_table([str(self.data / "coco_img/captions.jsonl")], {}, self.log)
        coco = coco.select(~find_matching_images(self.splits.train, coco))
        ade20k = build_record_table([str(self.data / "ade20k_ids/captions.jsonl")], {"captions": "sentences"}, self.log)
        return {
            FLICKR: list(held_out["captions"]),
            COCO: list(coco),
            SENTENCES: list(ade20k),
            ADE20K: [replace_captions(record, record.long_captions) for record in ade20k],
            CHINESE: list(held_out["captions_zh"]),
            GERMAN: list(held_out["captions_de"]),
        }

    @cached_property
    def known_ids(self) -> set[str]:
        """Ids of the Flickr8k images that are also in Flickr30k, on whose captions MiniLM and mpnet were trained."""
        rows = read_rows(self.data / "flickr8k/captions.jsonl")
        return {row["id"] for row in rows if row.get("flickr30k_split")}

    @cached_property
    def features(self) -> EmbeddingStore:
        """Features of all images from the frozen tower, with the same identity as in `align`, which reuses them."""
        tower = TowerEncoder(VisionTower.from_pretrained(FROZEN.tower, image_size=FROZEN.image_size), FP32)
        records = chain(self.splits.train, *self.tests.values())
        refs = [record.image for record in records if record.image is not None]
        folder = self.out / "features"

        def run() -> dict[str, Any]:
            store_image_features(refs, tower, tower.identity(), folder, self.log)
            return {"images": len(refs)}

        load_or_compute_json(self.out / "features.json", partial(run_timed, run, folder))
        return EmbeddingStore(folder)

    def measure_frozen(self, name: str) -> None:
        store, folder = self._embed(name, self._prepare_encoder(name)), self.out / name
        measure_cra = partial(caption_retrieval_accuracy, self._captions(), StoreTextEncoder(store))
        load_or_compute_json(folder / "cra.json", measure_cra)
        for seed in range(VARIANTS[name].seeds if self.is_english else 1):
            train = partial(self._train, name, store, replace(FROZEN, seed=seed))
            load_or_compute_json(folder / f"frozen-{seed}.json", train)

    def measure_trained(self, name: str, seeds: int) -> None:
        store = EmbeddingStore(self.out / name / "store")
        for seed in range(seeds):
            train = partial(self._train, name, store, replace(TRAINED, seed=seed))
            load_or_compute_json(self.out / name / f"trained-{seed}.json", train)

    def measure_speed(self, name: str, num_queries: int = 300) -> None:
        """Measure single queries, as in an interactive search, after as many warm-up queries."""
        queries = [query.text for each in build_short_queries(self._captions()).values() for query in each]
        queries = random.Random(0).sample(queries, num_queries)
        encoder = open_encoder(self._prepare_encoder(name), "cpu")

        def measure() -> dict[str, float]:
            seconds = []
            for query in [*queries, *queries]:
                start = time.perf_counter()
                encoder.encode([query])
                seconds.append(time.perf_counter() - start)
            return {"queries per second": 1 / statistics.median(seconds[num_queries:])}

        load_or_compute_json(self.out / name / "speed.json", lambda: run_timed(measure))

    def _prepare_encoder(self, name: str) -> EncoderConfig:
        """Return the encoder's config, after tuning the encoder if necessary."""
        variant, folder = VARIANTS[name], self.out / name
        local = self.out / variant.encoder
        path = str(local) if local.is_dir() else variant.encoder
        config = EncoderConfig(path, bidirectional=variant.bidirectional, layers=variant.layers)
        if variant.tuning is None:
            return config
        tuning = variant.tuning

        def run() -> dict[str, Any]:
            held_out = list(self.splits.held_out.values())
            items = read_tuning_sources(self.splits.train, held_out, tuning, {}, self.log)
            tune(items, open_encoder(config, "cpu"), tuning, folder / "tune")
            shutil.rmtree(folder / "tune/checkpoints", ignore_errors=True)
            return {"steps": tuning.steps}

        load_or_compute_json(folder / "tune.json", lambda: run_timed(run, folder / "tune/checkpoints"))
        return EncoderConfig(str(folder / "tune/encoder"))

    def _embed(self, name: str, encoder: EncoderConfig) -> EmbeddingStore:
        """Embed the texts of `fit`, then all other texts, so that embed.json contains only the duration for `fit`."""
        folder = self.out / name
        texts = {"embed": [*self.splits.train.iterate_texts(TEXT_FIELDS), *chain(*self._captions())]}
        if self.is_english and not VARIANTS[name].is_point:
            queries = [query.text for each in build_short_queries(self._captions()).values() for query in each]
            prompts, _ = build_query_prompts(queries, TEMPLATES)
            captions = [text for records in self.tests.values() for record in records for text in record.captions]
            texts["embed-tests"] = [*captions, *queries, *prompts]

        def run(step: str) -> dict[str, Any]:
            store = embed(texts[step], open_encoder(encoder, "cpu"), folder / "store")
            return {"texts": len(set(texts[step])), "precision": store.manifest["identity"]["precision"]}

        for step in texts:
            started = folder / "store/manifest.json" if step == "embed" else None
            run_step = partial(run_timed, partial(run, step), started)
            load_or_compute_json(folder / f"{step}.json", run_step)
        return EmbeddingStore(folder / "store")

    def _captions(self) -> list[tuple[str, ...]]:
        return [record.captions for record in self.tests[FLICKR]]

    def _train(self, name: str, store: EmbeddingStore, config: AlignConfig) -> dict[str, Any]:
        kind = "frozen" if config.tower_lr == 0 else "trained"
        tests = [FLICKR] if VARIANTS[name].is_point else list(self.tests)
        return self.train_and_test(
            self.splits.train, store, config, self.out / name / f"align-{kind}-{config.seed}", tests
        )

    def train_and_test(
        self, records: RecordTable, store: EmbeddingStore, config: AlignConfig, run_dir: Path, tests: Sequence[str]
    ) -> dict[str, Any]:
        """Train a model and return its results. If the tower is trained, the model is saved in `run_dir`, too."""
        is_frozen = config.tower_lr == 0
        features = self.features.folder if is_frozen else None
        model = create_initial_model(config, store)

        def run() -> dict[str, Any]:
            align(records, store, model, config, run_dir, self.log, features=features)
            return {}

        result = run_timed(run, run_dir / "checkpoints")
        embeddings: Any
        if is_frozen:
            embeddings = FrozenEmbeddings(model, self.features, store)
            shutil.rmtree(run_dir)
        else:
            embeddings = ModelEmbeddings(build_dual_encoder_from_store(model, store), self.log)
            model.save_pretrained(run_dir / "model")
        return {**result, **self._measure_tests(embeddings, store, tests)}

    def _measure_tests(self, embeddings: Any, store: EmbeddingStore, tests: Sequence[str]) -> dict[str, Any]:
        """Return the hits of each image in each test and, if there are other tests, the precision of short queries."""
        hits: dict[str, dict[str, list[float]]] = {}
        precisions: dict[str, list[float]] = {}
        for test in tests:
            records = drop_refused_captions(self.tests[test], store)
            ranks = compute_field_ranks(embeddings, {test: records})[test]
            hits[test] = compute_hits(ranks)
            if test != FLICKR:
                continue
            # The queries are those of the other images, but all images are searched.
            new = [n for n, record in enumerate(ranks.records) if record.id not in self.known_ids]
            hits[NEW] = {direction: [values[n] for n in new] for direction, values in hits[test].items()}
            if len(tests) > 1:
                short = evaluate_short_queries(embeddings, ranks, TEMPLATES)
                precisions = {length.words: length.scores.tolist() for length in short.plain[:3]}
                for length in (short.with_templates or [])[:3]:
                    precisions[f"{length.words}, templates"] = length.scores.tolist()
        return {"hits": hits, "average precision": precisions}


class FrozenEmbeddings:
    """Source of the embeddings of a model with a frozen tower, from cached image features and caption embeddings."""

    def __init__(self, model: LLM2CLIP, features: EmbeddingStore, captions: EmbeddingStore) -> None:
        self.model, self.features = model.eval(), features
        self.encode_texts = build_dual_encoder_from_store(model, captions).encode_texts

    @torch.inference_mode()
    def encode_images(self, refs: Sequence[ImageRef]) -> tuple[Tensor, list[int]]:
        """Return embeddings of shape (N, D), and the indices in `refs` of the images that could be decoded."""
        rows = self.features.find_keys(make_image_keys(refs))
        features = torch.from_numpy(self.features.take(rows[rows >= 0])).float()
        image, *_ = self.model(features=features)
        return image, (rows >= 0).nonzero()[0].tolist()


def compute_hits(ranks: RetrievalRanks) -> dict[str, list[float]]:
    """Return the hits of each image. The mean over the images is R@1 (see `Experiments.measure_hits`)."""
    text_hits = (ranks.text_ranks < 1).double()
    sums = torch.zeros(len(ranks.records), dtype=torch.float64).index_add_(0, ranks.image_of_text, text_hits)
    per_image = sums * len(ranks.records) / len(ranks.image_of_text)
    return {"I2T": (ranks.image_ranks < 1).double().tolist(), "T2I": per_image.tolist()}


def run_timed(function: Callable[[], dict[str, Any]], resumed_if: Path | None = None) -> dict[str, Any]:
    """Run a step and return its result with its duration. A resumed step's duration covers only its last part."""
    is_resumed = resumed_if is not None and resumed_if.exists()
    busy_before = read_busy_seconds()
    timer = Timer()
    with timer:
        result = function()
    others = read_busy_seconds() - busy_before - timer.cpu
    busy = max(0.0, others) / (timer.seconds * (os.cpu_count() or 1))
    return {**result, "seconds": timer.seconds, "CPU seconds": timer.cpu, "busy": busy, "resumed": is_resumed}


def read_busy_seconds() -> float:
    """Return the CPU seconds that all programs have used since this machine started."""
    user, nice, system, _idle, _wait, *interrupts = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:8]
    )
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
