"""The pieces that the claims are made of: caption encoders, their caption retrieval, models aligned with them, ranks.

Each is worked out once and kept in the run's folder, so that a run which was stopped goes on:

    OUT/
      encoders/NAME/       tuned caption encoders
      cra/NAME.json        caption retrieval of each
      stores/NAME/         embedded captions
      features/            the frozen tower's features
      models/NAME-SEED/    aligned models
      ranks/NAME-SEED-TEST.json
      vectors/             of images and texts, by model
      work/                an alignment under way
      claims/N.json        what each claim came to
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip.config import AlignConfig, EmbedConfig, EncoderConfig, ReproduceConfig, TuneConfig
from llm2clip.data.hashing import unique_captions
from llm2clip.data.pairs import TuningItem
from llm2clip.distributed import cached_json, print_once
from llm2clip.evaluate.caption_retrieval import caption_retrieval_accuracy
from llm2clip.evaluate.embeddings import ModelEmbeddings
from llm2clip.evaluate.retrieval_eval import RetrievalRanks, dual_encoder_from_store, rank_caption_fields
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.display_names import display_names
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.pipeline import align, embed, open_encoder, tune
from llm2clip.store.layout import caption_keys
from llm2clip.store.store import EmbeddingStore, drop_refused_captions
from llm2clip.tools.reproduce.datasets import ClaimData


class Experiments:
    """Caption encoders by name: `plain`, `raw`, `cc`, `larger raw`, `larger tc`, `larger cc`."""

    def __init__(self, sets: ClaimData, config: ReproduceConfig, out: Path) -> None:
        self.sets, self.config, self.out = sets, config, out
        llm = EncoderConfig(path=config.llm, layers=config.layers)
        larger, plain = EncoderConfig(path=config.multilingual_llm), EncoderConfig(path=config.baseline_encoder)
        every = TuneConfig(
            steps=config.steps,
            batch_size=config.batch_size,
            warmup_ratio=0.05,
            hard_negative_group_size=32,
        )
        whole = dataclasses.replace(every, lr=config.lr, lora_r=0)
        part = dataclasses.replace(every, lr=config.multilingual_lr)
        self.encoders: dict[str, tuple[EncoderConfig, TuneConfig | None]] = {
            "plain": (plain, None),
            "raw": (llm, None),
            "cc": (llm, whole),
            "larger raw": (larger, None),
            "larger tc": (larger, part),
            "larger cc": (larger, part),
        }

    def label(self, name: str) -> str:
        """What a caption encoder is called in a table."""
        encoder, tuning = self.encoders[name]
        paths = [self.config.llm, self.config.baseline_encoder, self.config.multilingual_llm]
        short_name = display_names(paths)[paths.index(encoder.path)]
        blocks = f", first {encoder.layers} blocks" if encoder.layers else ""
        kind = "captions" if name.endswith("cc") else "general text pairs"
        how = f" after {tuning.steps} steps of {kind}" if tuning else "" if name == "plain" else ", raw"
        return f"{short_name}{blocks}{how}"

    def encoder(self, name: str) -> CaptionEncoder:
        """Open a caption encoder, tuned first if it is one of the tuned ones."""
        return open_encoder(self._encoder_config(name))

    def _encoder_config(self, name: str) -> EncoderConfig:
        """Return the config of a caption encoder; tune the encoder first if needed."""
        config, tuning = self.encoders[name]
        if tuning is None:
            return config
        folder = self.out / "encoders" / _file(name)
        if not (folder / "encoder").exists():
            print_once(f"tune: {self.label(name)}")
            items: Sequence[TuningItem] = self.sets.pairs if name.endswith("tc") else self.sets.tune
            if not items and name.endswith("tc"):
                raise ValueError(
                    "no general text pairs: install Debian's wordnet-base, or give sources with --reproduce.text_pairs"
                )
            tune([items], folder, config, tuning)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return EncoderConfig(path=str(folder / "encoder"))

    def cra(self, name: str) -> dict[str, Any]:
        """Caption retrieval of one encoder, as of `caption_accuracy`, with its hits."""

        def measure() -> dict[str, Any]:
            print_once(f"caption retrieval: {self.label(name)}")
            store = self.store(name, [c for captions in self.sets.cra for c in unique_captions(captions)[:2]])
            return caption_retrieval_accuracy(self.sets.cra, _Stored(store), return_hits=True)

        return dict(cached_json(self.out / "cra" / f"{_file(name)}.json", measure))

    def store(self, name: str, texts: Sequence[str]) -> EmbeddingStore:
        """The store of one encoder, with these texts among others."""
        folder = self.out / "stores" / _file(name)
        if (folder / "manifest.json").exists():
            store = EmbeddingStore(folder)
            if (store.find(caption_keys(unique_captions(texts))) >= 0).all():
                return store
        print_once(f"embed: {self.label(name)}")
        return embed(texts, folder, self._encoder_config(name), EmbedConfig())

    def model(self, name: str, seed: int) -> LLM2CLIP:
        """Heads trained between the frozen tower and one caption encoder's store."""
        folder = self.out / "models" / f"{_file(name)}-{seed}"
        if not folder.exists():
            store = self.store(name, [text for record in self.sets.train for text in record.texts])
            print_once(f"align: {self.label(name)}, seed {seed}")
            work = self.out / "work" / folder.name
            align(
                drop_refused_captions(self.sets.train, store),
                store,
                work,
                self.align_config(seed),
                self.sets.log,
                model_dir=folder,
                features=self.out / "features",
            )
            shutil.rmtree(work, ignore_errors=True)
        return LLM2CLIP.from_pretrained(folder)

    def align_config(self, seed: int) -> AlignConfig:
        r = self.config
        return AlignConfig(
            tower=r.tower,
            image_size=r.image_size,
            embed_dim=r.embed_dim,
            tower_lr=0.0,
            captions_per_image=0,
            batch_size=min(512, len(self.sets.train)),
            epochs=r.epochs,
            eval_steps=0,
            report_to=[],
            seed=seed,
        )

    def ranked(self, name: str, seed: int, test: str) -> RetrievalRanks:
        """A model's ranks on one test, with its vectors."""
        model, records = self.model(name, seed), self.sets.test(test)
        together = [test] if test in ("captions", "foreign") else list(self.sets.dense)  # are embedded
        store = self.store(name, [t for some in together for r in self.sets.test(some) for t in r.captions])
        vectors = ModelEmbeddings(dual_encoder_from_store(model, store), self.sets.log, self.out / "vectors")
        return rank_caption_fields(vectors, {test: drop_refused_captions(records, store)})[test]

    def hits(self, name: str, test: str, way: str) -> Tensor:
        """How often the first answer is right, by image; their mean is R@1.

        Args:
            name: of a caption encoder.
            test: which texts.
            way: I2T; or T2I, the captions that found an image, over how many an image has on average.

        Returns:
            float64 (seeds, images).
        """
        parts = []
        for seed in range(self.config.seeds):

            def measure(seed: int = seed) -> dict[str, list[int]]:
                found = self.ranked(name, seed, test)
                tensors = {"of_image": found.image_ranks, "of_text": found.text_ranks, "owner": found.image_of_text}
                return {key: tensor.tolist() for key, tensor in tensors.items()}

            found = cached_json(self.out / "ranks" / f"{_file(name)}-{seed}-{_file(test)}.json", measure)
            of_image, of_text, owner = (torch.tensor(found[k]) for k in ("of_image", "of_text", "owner"))
            by_text = torch.zeros(len(of_image), dtype=torch.float64).index_add_(0, owner, (of_text < 1).double())
            parts.append((of_image < 1).double() if way == "I2T" else by_text * len(of_image) / len(owner))
        return torch.stack(parts)


class _Stored:
    """A text encoder that reads a store."""

    def __init__(self, store: EmbeddingStore) -> None:
        self.store = store

    def encode(self, captions: Sequence[str], *, progress: bool = False) -> Tensor:
        return torch.from_numpy(self.store.take(self.store.rows(captions))).float()

    def count_truncated(self, captions: Sequence[str]) -> None:
        return None


def _file(name: str) -> str:
    return name.replace(" ", "-")
