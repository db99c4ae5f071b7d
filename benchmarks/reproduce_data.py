"""Data, settings and experiments for the tests of the paper's claims: caption encoders, aligned models, their ranks.

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip.config import AlignConfig, EncoderConfig, EvaluateConfig, TuneConfig
from llm2clip.data.build_table import build_record_table, read_data_splits
from llm2clip.data.image_facts import find_matching_images
from llm2clip.data.pairs import ImageCaptions, Pair, TuningItem, read_tuning_sources
from llm2clip.data.records import Record
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.table import RecordTable
from llm2clip.evaluate.caption_retrieval import caption_retrieval_accuracy
from llm2clip.evaluate.embeddings import ModelEmbeddings
from llm2clip.evaluate.retrieval import build_dual_encoder_from_store, compute_field_ranks
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.loading import get_display_names
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.pipeline import open_encoder, rotate_embedding_space
from llm2clip.runs.ranks import load_or_compute_json, print_once, process_state
from llm2clip.store.encode import embed
from llm2clip.store.layout import make_caption_keys
from llm2clip.store.store import EmbeddingStore, drop_refused_captions
from llm2clip.train.align import align
from llm2clip.train.initial_model import create_initial_model
from llm2clip.train.tune import tune
from shared import split_sentences

PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
CAPTIONS_TEST, FOREIGN_TEST = "captions", "foreign"
LONG_CAPTION_TESTS = ("first sentence", "whole caption")
FOREIGN_COLUMN = "captions_zh"  # captions in a language that is absent from the training captions
# Names of the caption encoders. CC encoders are tuned on captions; TC encoders are tuned on general text pairs.
BASELINE = "baseline"
LLM_RAW, LLM_CC = "llm raw", "llm cc"
MULTILINGUAL_RAW, MULTILINGUAL_TC, MULTILINGUAL_CC = "multilingual raw", "multilingual tc", "multilingual cc"


@dataclass
class ReproduceConfig:
    """Settings for small-scale tests of the paper's claims. Paths of sources are relative to the data folder.

    Args:
        tune, exclude: Caption sources for tuning the LLMs, and sources of images whose captions are excluded.
        cra: Caption sources for measuring caption retrieval accuracy (CRA).
        train, test: Sources of captioned images for `align`, and for evaluating retrieval.
        long_captions: Sources of images with one long caption each, for evaluation.
        llm, layers, lr: LLM whose first layers are used, and the learning rate for tuning all its weights.
        baseline_encoder: Text encoder that is not an LLM.
        multilingual_llm, multilingual_lr: Larger, multilingual LLM, and the learning rate for tuning it with LoRA.
        steps, batch_size: Number of tuning steps, and of text pairs per step.
        epochs, seeds: Number of epochs for training the heads, and of models per encoder.
        cost_images, cost_steps: Number of images per step, and of steps, when measuring the training cost.
    """

    tune: Sequence[str] = ("flickr30k_text/captions.jsonl@train",)
    exclude: Sequence[str] = ("flickr8k/captions.jsonl@val", "flickr8k_text/captions.jsonl")
    cra: Sequence[str] = ("coco_text/captions.jsonl@karpathy_test",)
    train: Sequence[str] = ("flickr8k/captions.jsonl@train+none", "coco_img/captions.jsonl")
    test: Sequence[str] = ("flickr8k/captions.jsonl@val",)
    long_captions: Sequence[str] = ("ade20k_ids/captions.jsonl",)
    wordnet: Path = Path("/usr/share/wordnet")  # from Debian's wordnet-base package
    llm: str = "smollm2-135m"
    layers: int = 12
    lr: float = 4e-4
    baseline_encoder: str = "all-minilm-l6-v2"
    multilingual_llm: str = "gemma3-270m"
    multilingual_lr: float = 1e-3
    tower: str = "efficientnet-lite0"
    image_size: int = 160
    embed_dim: int = 256
    steps: int = 60
    batch_size: int = 128
    epochs: float = 10
    seeds: int = 3
    cost_images: int = 64
    cost_steps: int = 8


class ClaimData:
    """Data sets for all claims. Each is read on first access, which raises ValueError if a source is missing."""

    def __init__(self, folder: Path, config: ReproduceConfig, log: SkipLog) -> None:
        self.folder = folder
        self.config = config
        self.log = log

    @cached_property
    def tuning_captions(self) -> list[ImageCaptions]:
        """Captions for the `tune` stage.

        Images with at least four short captions and no long captions get two long captions from `join_halves`.
        """
        excluded = [*self.config.exclude, *self.config.test, *self.config.cra, *self.config.long_captions]
        config = TuneConfig(data=self._resolve_paths(self.config.tune), exclude=self._resolve_paths(excluded), steps=0)
        (items,) = read_tuning_sources(None, [], config, {}, self.log)
        images = [item for item in items if isinstance(item, ImageCaptions)]
        return [dataclasses.replace(image, long=image.long or join_halves(image.short)) for image in images]

    @cached_property
    def text_pairs(self) -> list[Pair]:
        """General text pairs from WordNet."""
        return list(read_wordnet(self.config.wordnet))

    @cached_property
    def cra_captions(self) -> list[tuple[str, ...]]:
        """Captions of each image used to measure caption retrieval accuracy (CRA)."""
        return [record.captions for record in self._read_records(self.config.cra, images=False)]

    @cached_property
    def train_records(self) -> list[Record]:
        """Training images for the `align` stage, excluding test images.

        Every third image gets a long caption, made by joining its short captions, unless it already has one. Doing this
        for all images would double the embedding time.
        """
        tested = [*self.config.test, *self.config.long_captions]
        records = self._read_records(self.config.train)
        records = records.select(records.has_image)
        train = list(records.select(~find_matching_images(self._read_records(tested), records)))
        if len(train) < len(records):
            print_once(f"{len(records) - len(train):,} test images excluded from training")
        for n, record in enumerate(train):
            if n % 3 == 0 and not record.long_captions and len(record.captions) > 1:
                train[n] = dataclasses.replace(record, long_captions=(" ".join(record.captions),))
        return train

    @cached_property
    def tests(self) -> dict[str, Sequence[Record]]:
        """Images of each test, with English, Chinese or long captions, or with the first sentences of long captions."""
        fields = EvaluateConfig(data=self._resolve_paths(self.config.test), fields=[FOREIGN_COLUMN])
        held_out = read_data_splits([], fields, {}, self.log).held_out
        records = [record for record in self._read_records(self.config.long_captions) if record.long_captions]
        captions = [record.long_captions[0] for record in records]
        sentences = [split_sentences(caption)[0] for caption in captions]
        long_tests = {
            test: [replace_captions(record, (text,)) for record, text in zip(records, texts, strict=True)]
            for test, texts in zip(LONG_CAPTION_TESTS, (sentences, captions), strict=True)
        }
        return {CAPTIONS_TEST: held_out["captions"], FOREIGN_TEST: held_out[FOREIGN_COLUMN], **long_tests}

    def _resolve_paths(self, sources: Sequence[str]) -> list[str]:
        return [str(self.folder / source) for source in sources]

    def _read_records(self, sources: Sequence[str], images: bool = True) -> RecordTable:
        return build_record_table(self._resolve_paths(sources), {}, self.log, "header" if images else "unchecked")


def join_halves(captions: Sequence[str]) -> tuple[str, ...]:
    """Join each half of an image's captions into a long caption. Return () if there are fewer than four captions."""
    if len(captions) < 4:
        return ()
    middle = len(captions) // 2
    return " ".join(captions[:middle]), " ".join(captions[middle:])


def read_wordnet(folder: Path) -> Iterator[Pair]:
    """Yield text pairs from WordNet's data files.

    Each entry yields the pair (words, definition). Entries with an example sentence also yield the pair (sentence, word
    that it illustrates). The line format is `offset file type count word id word id ... | definition; "example"; ...`;
    see the manual page wndb(5WN).
    """
    for part_of_speech in PARTS_OF_SPEECH:
        for line in (folder / f"data.{part_of_speech}").read_text(encoding="latin-1").splitlines():
            if line.startswith(" "):  # lines of the licence text start with a space
                continue
            entry, _, gloss = line.partition("|")
            fields = entry.split()
            num_words = int(fields[3], 16)
            words = [word.split("(")[0].replace("_", " ") for word in fields[4 : 4 + 2 * num_words : 2]]
            definition, _, examples = gloss.strip().partition('; "')
            meaning = definition.strip()
            yield Pair(", ".join(words), meaning, (), "Given a word, find its meaning:")
            if examples:
                first_example = examples.rstrip('"').split('"; "')[0]
                instruction = "Given a sentence, find the word that it is an example of:"
                yield Pair(first_example, f"{words[0]}: {meaning}", (), instruction)


# ---- experiments -----------------------------------------------------------------------------------------------------


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
            texts = [text for captions in self.data.cra_captions for text in list(dict.fromkeys(captions))[:2]]
            encoder = StoreTextEncoder(self.embed_texts(name, texts))
            return caption_retrieval_accuracy(self.data.cra_captions, encoder, return_hits=True)

        metrics: dict[str, Any] = load_or_compute_json(self.out / "cra" / f"{_make_file_name(name)}.json", measure)
        return metrics

    def embed_texts(self, name: str, texts: Sequence[str]) -> EmbeddingStore:
        """Embed the texts that are not yet in a caption encoder's embedding store, and return the store."""
        folder = self.out / "stores" / _make_file_name(name)
        if (folder / "manifest.json").exists():
            store = EmbeddingStore(folder)
            if (store.find_keys(make_caption_keys(list(dict.fromkeys(texts)))) >= 0).all():
                return store
        print_once(f"embed: {self.get_label(name)}")
        encoder = open_encoder(self._prepare_encoder(name), "cpu")
        return embed(texts, encoder, folder, device=process_state().device)

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
            model = create_initial_model(config, store, train)
            model = align(train, store, model, config, run_dir, self.data.log, features=features)
            rotate_embedding_space(model, train, store, config)
            model.save_pretrained(folder)
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

        `test` is a key of `ClaimData.tests`, and `direction` is "I2T" or "T2I" (see `compute_hits`).
        """
        hits = []
        for seed in range(self.config.seeds):
            ranks = self._load_or_compute_ranks(name, seed, test)
            hits.append(compute_hits(**{field: torch.tensor(values) for field, values in ranks.items()})[direction])
        return torch.stack(hits)

    def _load_or_compute_ranks(self, name: str, seed: int, test: str) -> dict[str, list[int]]:
        """Return a model's retrieval ranks on a test, keyed by the names of `RetrievalRanks` fields."""

        def compute_ranks() -> dict[str, list[int]]:
            records = self.data.tests[test]  # fails before anything is trained if the data is missing
            model = self.train_model(name, seed)
            # Embed the texts of all long-caption tests in a single call.
            tests = LONG_CAPTION_TESTS if test in LONG_CAPTION_TESTS else (test,)
            texts = [text for each in tests for record in self.data.tests[each] for text in record.captions]
            store = self.embed_texts(name, texts)
            embeddings = ModelEmbeddings(
                build_dual_encoder_from_store(model, store), self.data.log, self.out / "vectors"
            )
            ranks = compute_field_ranks(embeddings, {test: drop_refused_captions(records, store)})[test]
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
            tune([items], open_encoder(config, "cpu"), tuning, folder)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return EncoderConfig(path=str(folder / "encoder"))


def compute_hits(image_ranks: Tensor, text_ranks: Tensor, image_of_text: Tensor) -> dict[str, Tensor]:
    """Return the hits of N images in each direction, of shape (N,), float64. Their mean is R@1.

    The hit value of an image is 1 if its top-ranked caption is correct ("I2T"), or the number of its captions that rank
    it first, divided by the mean number of captions per image ("T2I").
    """
    image_hits, text_hits = ((ranks < 1).double() for ranks in (image_ranks, text_ranks))
    sums = torch.zeros_like(image_hits).index_add_(0, image_of_text, text_hits)
    return {"I2T": image_hits, "T2I": sums * len(image_hits) / len(image_of_text)}


class StoreTextEncoder:
    """Text encoder that reads embeddings from a store instead of computing them."""

    def __init__(self, store: EmbeddingStore) -> None:
        self.store = store

    def encode(self, captions: Sequence[str], *, progress: bool = False) -> Tensor:
        """Return the stored embeddings of N captions as a float32 tensor of shape (N, D)."""
        return torch.from_numpy(self.store.take(self.store.find_rows(captions))).float()

    def count_truncated_texts(self, captions: Sequence[str]) -> None:
        """Return None, because the store does not record which texts were truncated."""


def replace_captions(record: Record, captions: tuple[str, ...]) -> Record:
    """Return a copy of a record with all captions replaced by `captions`."""
    return dataclasses.replace(record, captions=captions, short_captions=(), long_captions=())


def _make_file_name(name: str) -> str:
    return name.replace(" ", "-")
