"""Experiments for testing the claims: caption encoders, caption retrieval, aligned models and retrieval ranks.

Each result is computed once and saved in the run directory, so interrupted runs can be resumed:

    OUT/
      encoders/NAME/               tuned caption encoders
      cra/NAME.json                caption retrieval accuracy of each encoder
      stores/NAME/                 embedding store of each encoder
      features/                    cached image features of the frozen vision tower
      models/NAME-SEED/            aligned model for each encoder and seed
      ranks/NAME-SEED-TEST.json    retrieval ranks of each model on each test
      vectors/                     image and text embeddings of each model
      work/                        temporary run directories of the `align` stage
      claims/N.json                result of testing claim N
"""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip.config import AlignConfig, EmbedConfig, EncoderConfig, ReproduceConfig, TuneConfig
from llm2clip.data.pairs import TuningItem
from llm2clip.data.table import RecordTable
from llm2clip.data.texts import deduplicate_captions
from llm2clip.evaluate.caption_retrieval import caption_retrieval_accuracy
from llm2clip.evaluate.embeddings import ModelEmbeddings
from llm2clip.evaluate.retrieval_eval import dual_encoder_from_store, rank_caption_fields
from llm2clip.models.hub.loading import get_display_names
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.runs.ranks import load_or_compute_json, print_once
from llm2clip.stages import align, embed, open_encoder, tune
from llm2clip.store.layout import make_caption_keys
from llm2clip.store.store import EmbeddingStore, drop_refused_captions
from llm2clip.tools.reproduce.datasets import CAPTIONS_TEST, FOREIGN_TEST, ClaimData

# Names of the caption encoders. CC encoders are tuned on captions; TC encoders are tuned on general text pairs.
BASELINE = "baseline"
LLM_RAW, LLM_CC = "llm raw", "llm cc"
MULTILINGUAL_RAW, MULTILINGUAL_TC, MULTILINGUAL_CC = "multilingual raw", "multilingual tc", "multilingual cc"


class Experiments:
    """Runs experiments with each caption encoder and caches the results in the run directory."""

    def __init__(self, data: ClaimData, config: ReproduceConfig, out: Path) -> None:
        self.data = data
        self.config = config
        self.out = out
        llm = EncoderConfig(path=config.llm, layers=config.layers)
        multilingual = EncoderConfig(path=config.multilingual_llm)
        lora_tuning = TuneConfig(
            steps=config.steps,
            batch_size=config.batch_size,
            warmup_ratio=0.05,
            hard_negative_group_size=32,
            lr=config.multilingual_lr,
        )
        full_tuning = dataclasses.replace(lora_tuning, lr=config.lr, lora_r=0)
        self.encoders: dict[str, tuple[EncoderConfig, TuneConfig | None]] = {
            BASELINE: (EncoderConfig(path=config.baseline_encoder), None),
            LLM_RAW: (llm, None),
            LLM_CC: (llm, full_tuning),
            MULTILINGUAL_RAW: (multilingual, None),
            MULTILINGUAL_TC: (multilingual, lora_tuning),
            MULTILINGUAL_CC: (multilingual, lora_tuning),
        }

    def get_label(self, name: str) -> str:
        """Return a caption encoder's display name, such as "gemma3-270m after 60 steps of captions"."""
        encoder, tuning = self.encoders[name]
        paths = [self.config.llm, self.config.baseline_encoder, self.config.multilingual_llm]
        label = get_display_names(paths)[paths.index(encoder.path)]
        if encoder.layers:
            label += f", first {encoder.layers} layers"
        if tuning is not None:
            data = "general text pairs" if name == MULTILINGUAL_TC else "captions"
            label += f" after {tuning.steps} steps of {data}"
        elif name != BASELINE:
            label += ", raw"
        return label

    def load_encoder(self, name: str) -> CaptionEncoder:
        """Load a caption encoder, tuning it first if needed."""
        return open_encoder(self._prepare_encoder(name))

    def measure_caption_retrieval(self, name: str) -> dict[str, Any]:
        """Return the metrics of `caption_retrieval_accuracy` for a caption encoder, including "hits"."""

        def measure() -> dict[str, Any]:
            print_once(f"caption retrieval: {self.get_label(name)}")
            texts = [text for captions in self.data.cra_captions for text in deduplicate_captions(captions)[:2]]
            encoder = _StoreTextEncoder(self.embed_texts(name, texts))
            return caption_retrieval_accuracy(self.data.cra_captions, encoder, return_hits=True)

        metrics: dict[str, Any] = load_or_compute_json(self.out / "cra" / f"{_make_file_name(name)}.json", measure)
        return metrics

    def embed_texts(self, name: str, texts: Sequence[str]) -> EmbeddingStore:
        """Embed the texts that are not yet in a caption encoder's embedding store, and return the store."""
        folder = self.out / "stores" / _make_file_name(name)
        if (folder / "manifest.json").exists():
            store = EmbeddingStore(folder)
            if (store.find_keys(make_caption_keys(deduplicate_captions(texts))) >= 0).all():
                return store
        print_once(f"embed: {self.get_label(name)}")
        return embed(texts, folder, self._prepare_encoder(name), EmbedConfig())

    def train_model(self, name: str, seed: int) -> LLM2CLIP:
        """Return the aligned model for a caption encoder and seed, training it first if needed.

        The vision tower is frozen. Only the heads are trained, using the caption encoder's stored embeddings.
        """
        folder = self.out / "models" / f"{_make_file_name(name)}-{seed}"
        if not folder.exists():
            store = self.embed_texts(name, [text for record in self.data.train_records for text in record.texts])
            print_once(f"align: {self.get_label(name)}, seed {seed}")
            run_dir = self.out / "work" / folder.name
            config, features = self.make_align_config(seed), self.out / "features"
            train = RecordTable.from_records(self.data.train_records)
            align(train, store, run_dir, config, self.data.log, model_dir=folder, features=features)
            shutil.rmtree(run_dir, ignore_errors=True)
        return LLM2CLIP.from_pretrained(folder)

    def make_align_config(self, seed: int) -> AlignConfig:
        """Return the `align` settings, which are the same for all models except for the seed."""
        return AlignConfig(
            tower=self.config.tower,
            image_size=self.config.image_size,
            embed_dim=self.config.embed_dim,
            tower_lr=0.0,
            captions_per_image=0,
            batch_size=min(512, len(self.data.train_records)),
            epochs=self.config.epochs,
            eval_steps=0,
            report_to=[],
            seed=seed,
        )

    def measure_hits(self, name: str, test: str, direction: str) -> Tensor:
        """Return per-image hits of the models trained with a caption encoder, float64 of shape (seeds, images).

        For I2T, an image's hit value is 1 if the top-ranked caption is correct, and 0 otherwise. For T2I, the hit value
        is the number of the image's captions that rank it first, divided by the mean number of captions per image. The
        mean hit value is R@1.

        Args:
            test: Test name. See `ClaimData.get_test_records`.
            direction: "I2T" or "T2I".
        """
        hits = []
        for seed in range(self.config.seeds):
            ranks = self._load_or_compute_ranks(name, seed, test)
            image_hits = (torch.tensor(ranks["image_ranks"]) < 1).double()
            if direction == "I2T":
                hits.append(image_hits)
                continue
            text_hits = (torch.tensor(ranks["text_ranks"]) < 1).double()
            image_of_text = torch.tensor(ranks["image_of_text"])
            sums = torch.zeros(len(image_hits), dtype=torch.float64).index_add_(0, image_of_text, text_hits)
            hits.append(sums * len(image_hits) / len(image_of_text))
        return torch.stack(hits)

    def _load_or_compute_ranks(self, name: str, seed: int, test: str) -> dict[str, list[int]]:
        """Return a model's retrieval ranks on a test, keyed by the names of `RetrievalRanks` fields."""

        def compute_ranks() -> dict[str, list[int]]:
            model, records = self.train_model(name, seed), self.data.get_test_records(test)
            # For a long-caption test, embed the texts of all long-caption tests in a single call.
            tests = [test] if test in (CAPTIONS_TEST, FOREIGN_TEST) else list(self.data.long_caption_tests)
            texts = [text for each in tests for record in self.data.get_test_records(each) for text in record.captions]
            store = self.embed_texts(name, texts)
            embeddings = ModelEmbeddings(dual_encoder_from_store(model, store), self.data.log, self.out / "vectors")
            ranks = rank_caption_fields(embeddings, {test: drop_refused_captions(records, store)})[test]
            names = ("image_ranks", "text_ranks", "image_of_text")
            return {name: getattr(ranks, name).tolist() for name in names}

        file = self.out / "ranks" / f"{_make_file_name(name)}-{seed}-{_make_file_name(test)}.json"
        ranks: dict[str, list[int]] = load_or_compute_json(file, compute_ranks)
        return ranks

    def _prepare_encoder(self, name: str) -> EncoderConfig:
        """Return a caption encoder's config, tuning the encoder first if needed."""
        config, tuning = self.encoders[name]
        if tuning is None:
            return config
        folder = self.out / "encoders" / _make_file_name(name)
        if not (folder / "encoder").exists():
            print_once(f"tune: {self.get_label(name)}")
            items: Sequence[TuningItem] = self.data.tuning_captions
            if name == MULTILINGUAL_TC:
                items = self.data.text_pairs
                if not items:
                    raise ValueError(
                        "there are no general text pairs: install Debian's wordnet-base, or set --reproduce.text_pairs"
                    )
            tune([items], folder, config, tuning)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return EncoderConfig(path=str(folder / "encoder"))


class _StoreTextEncoder:
    """Text encoder that reads embeddings from a store instead of computing them."""

    def __init__(self, store: EmbeddingStore) -> None:
        self.store = store

    def encode(self, captions: Sequence[str], *, progress: bool = False) -> Tensor:
        """Return the stored embeddings of N captions as a float32 tensor of shape (N, D)."""
        return torch.from_numpy(self.store.take(self.store.find_rows(captions))).float()

    def count_truncated(self, captions: Sequence[str]) -> None:
        """Return None, because the store does not record which texts were truncated."""


def _make_file_name(name: str) -> str:
    return name.replace(" ", "-")
