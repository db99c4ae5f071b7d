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
import gc
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip.cache.format import keys_of
from llm2clip.cache.store import EmbeddingStore
from llm2clip.data.captions import unique
from llm2clip.data.pairs import Item
from llm2clip.evaluate.captions import caption_accuracy
from llm2clip.evaluate.model import Ranked, rank, with_store
from llm2clip.evaluate.vectors import Vectors
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.text import CaptionEncoder
from llm2clip.page import short
from llm2clip.processes import once, say
from llm2clip.recipes import AlignRecipe, EmbedRecipe, EncoderRecipe, ReproduceRecipe, TuneRecipe
from llm2clip.reproduce.data import Sets
from llm2clip.stages import fill, new_model, open_encoder, readable
from llm2clip.train.align import align
from llm2clip.train.tune import tune


class Lab:
    """Caption encoders by name: `plain`, `raw`, `cc`, `larger raw`, `larger tc`, `larger cc`."""

    def __init__(self, sets: Sets, recipe: ReproduceRecipe, out: Path) -> None:
        self.sets, self.recipe, self.out = sets, recipe, out
        llm = EncoderRecipe(path=recipe.llm, layers=recipe.layers)
        larger, plain = EncoderRecipe(path=recipe.larger), EncoderRecipe(path=recipe.plain)
        every = TuneRecipe(
            steps=recipe.steps, batch=recipe.batch, warmup=0.05, alike=32, lengths=[2.0, 0.0, 1.0], merge=True
        )
        whole = dataclasses.replace(every, lr=recipe.lr, lora_r=0)
        part = dataclasses.replace(every, lr=recipe.larger_lr)
        self.encoders: dict[str, tuple[EncoderRecipe, TuneRecipe | None]] = {
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
        paths = [self.recipe.llm, self.recipe.plain, self.recipe.larger]
        short_name = short(paths)[paths.index(encoder.path)]
        blocks = f", first {encoder.layers} blocks" if encoder.layers else ""
        kind = "captions" if name.endswith("cc") else "general text pairs"
        how = f" after {tuning.steps} steps of {kind}" if tuning else "" if name == "plain" else ", raw"
        return f"{short_name}{blocks}{how}"

    def encoder(self, name: str) -> CaptionEncoder:
        """A caption encoder, tuned first where it is to be."""
        recipe, tuning = self.encoders[name]
        if tuning is None:
            return open_encoder(recipe)
        folder = self.out / "encoders" / _file(name)
        if not (folder / "encoder").exists():
            say(f"tune: {self.label(name)}")
            items: Sequence[Item] = self.sets.pairs if name.endswith("tc") else self.sets.tune
            if not items and name.endswith("tc"):
                raise ValueError(
                    "no general text pairs: apt-get install wordnet-base, or name some with --reproduce.pairs"
                )
            tune([items], open_encoder(recipe, tuning), tuning, folder)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return CaptionEncoder.from_pretrained(folder / "encoder")

    def cra(self, name: str) -> dict[str, Any]:
        """Caption retrieval of one encoder, as of `caption_accuracy`, with its hits."""

        def measure() -> dict[str, Any]:
            say(f"caption retrieval: {self.label(name)}")
            store = self.store(name, [c for captions in self.sets.cra for c in unique(captions)[:2]])
            return caption_accuracy(self.sets.cra, _Stored(store), hits=True)

        return dict(once(self.out / "cra" / f"{_file(name)}.json", measure))

    def store(self, name: str, texts: Sequence[str]) -> EmbeddingStore:
        """The store of one encoder, with these texts among others."""
        folder = self.out / "stores" / _file(name)
        if (folder / "manifest.json").exists():
            store = EmbeddingStore(folder)
            if (store.find(keys_of(unique(texts))) >= 0).all():
                return store
        say(f"embed: {self.label(name)}")
        return fill(texts, partial(self.encoder, name), folder, EmbedRecipe())

    def model(self, name: str, seed: int) -> LLM2CLIP:
        """Heads trained between the frozen tower and one caption encoder's store."""
        folder = self.out / "models" / f"{_file(name)}-{seed}"
        if not folder.exists():
            store = self.store(name, [t for r in self.sets.train for t in r.texts])
            say(f"align: {self.label(name)}, seed {seed}")
            recipe = self.align_recipe(seed)
            model, work = new_model(recipe, store), self.out / "work" / folder.name
            align(
                readable(self.sets.train, store),
                store,
                model,
                recipe,
                work,
                self.sets.log,
                features=self.out / "features",
            )
            model.save_pretrained(folder)
            shutil.rmtree(work)
            gc.collect()
        return LLM2CLIP.from_pretrained(folder)

    def align_recipe(self, seed: int) -> AlignRecipe:
        r = self.recipe
        return AlignRecipe(
            tower=r.tower,
            image_size=r.image_size,
            width=r.width,
            tower_lr=0.0,
            cache_features=True,
            captions=0,
            batch=min(512, len(self.sets.train)),
            epochs=r.epochs,
            evaluate_every=0,
            track=[],
            seed=seed,
        )

    def ranked(self, name: str, seed: int, test: str) -> Ranked:
        """A model's ranks on one test, with its vectors."""
        model, records = self.model(name, seed), self.sets.test(test)
        together = [test] if test in ("captions", "foreign") else list(self.sets.dense)  # are embedded
        store = self.store(name, [t for some in together for r in self.sets.test(some) for t in r.captions])
        vectors = Vectors(with_store(model, store), self.sets.log, self.out / "vectors")
        return rank(vectors, {test: readable(records, store)})[test]

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
        for seed in range(self.recipe.seeds):

            def measure(seed: int = seed) -> dict[str, list[int]]:
                found = self.ranked(name, seed, test)
                tensors = {"of_image": found.of_image, "of_text": found.of_text, "owner": found.image_of_text}
                return {key: tensor.tolist() for key, tensor in tensors.items()}

            found = once(self.out / "ranks" / f"{_file(name)}-{seed}-{_file(test)}.json", measure)
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

    def cut(self, captions: Sequence[str]) -> None:
        return None


def _file(name: str) -> str:
    return name.replace(" ", "-")
