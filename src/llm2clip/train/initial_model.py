"""Initial model for the `align` stage: a pretrained vision tower with new heads or with a CLIP model's heads.

By default, the projection and the adapter are randomly initialised. With representation inheritance (`config.inherit`),
the first stage of ProCLIP (arXiv 2510.18795), the projection is taken from the tower's CLIP model. The adapter is first
trained to map the LLM embedding of each caption and phrase to the CLIP model's embedding of the same text.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llm2clip.config import AlignConfig
from llm2clip.cpu_tuning import free_memory, use_onednn_matmul
from llm2clip.data.records import Record
from llm2clip.data.table import RecordTable
from llm2clip.io_utils import atomic_path
from llm2clip.models.clip_models import (
    ClipTextEncoder,
    build_model_in_clip_space,
    load_clip_to_inherit,
    read_pretrained_logit_scale_and_bias,
)
from llm2clip.models.llm2clip import LLM2CLIP, needs_projection_bias
from llm2clip.models.loading import fingerprint, hash_weights
from llm2clip.models.model_folder import AdapterConfig, LLM2CLIPConfig
from llm2clip.models.precision import resolve_precision
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.progress import ProgressBar
from llm2clip.runs.ranks import print_once, process_state, wait_for_everyone
from llm2clip.store.encode import store_text_embeddings
from llm2clip.store.layout import LOOKUP_CHUNK_SIZE, iter_chunks, make_caption_keys, read_refused_captions
from llm2clip.store.store import EmbeddingStore
from llm2clip.train.losses import distillation_loss, get_loss
from llm2clip.train.optim import ADAM_BETAS, MAX_GRAD_NORM, WEIGHT_DECAY, make_cosine_schedule

WEIGHTS = "inherited_adapter.safetensors"
EPOCHS = 4
MIN_STEPS = 500  # minimum number of steps; a small dataset may therefore be used for more than `EPOCHS` epochs
BATCH_SIZE = 1024
LR = 1e-3
WARMUP_RATIO = 0.05
MAX_REPEATS = 16  # maximum number of times that a phrase occurs per epoch
MAX_TEST_TEXTS = 1000  # maximum number of held-out texts for measuring the cosine similarity


@dataclass
class PretrainedParts:
    """Pretrained weights, on the CPU, from which a model is built."""

    tower: VisionTower
    clip: ClipTextEncoder | None  # CLIP model whose embedding space is inherited, or None without `--align.inherit`
    logits: tuple[float, float | None] | None  # logit scale and bias of the tower's CLIP model; None if not inherited
    random_state: Tensor  # state of PyTorch's random number generator for initialising new weights


@torch.random.fork_rng(devices=[])
def load_pretrained_parts(config: AlignConfig) -> PretrainedParts:
    """Load the pretrained weights that `create_initial_model` needs.

    Raises:
        OSError: A model does not exist or cannot be downloaded.
        ValueError: A model does not support the settings.
    """
    torch.manual_seed(config.seed)
    tower = VisionTower.from_pretrained(config.tower, image_size=config.image_size)
    clip = load_clip_to_inherit(config.tower, config.inherit, torch.device("cpu")) if config.inherit else None
    random_state = torch.get_rng_state()
    _check_tower_supports_config(tower, config)
    logits = read_pretrained_logit_scale_and_bias(config.tower) if config.logit_scale == "inherit" else None
    return PretrainedParts(tower, clip, logits, random_state)


@torch.no_grad()
def _check_tower_supports_config(tower: VisionTower, config: AlignConfig) -> None:
    if config.image_size is None:
        return
    try:
        tower(torch.zeros(1, 3, config.image_size, config.image_size, dtype=torch.uint8))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--align.image_size: {config.tower} cannot encode images at {config.image_size} pixels ({error})"
        ) from error


def create_initial_model(
    config: AlignConfig,
    store: EmbeddingStore,
    train: Sequence[Record] = (),
    out: Path | None = None,
    parts: PretrainedParts | None = None,
) -> LLM2CLIP:
    """Create a model from a pretrained tower and heads that are randomly initialised with the config's seed.

    With `config.inherit`, the heads come from a CLIP model instead (see `inherit_text_space`).

    Args:
        train: Training records. With `config.inherit`, the adapter is trained on their texts.
        out: Folder for the adapter's weights and the cached CLIP text embeddings. Required with `config.inherit`.
        parts: Result of `load_pretrained_parts`. The model uses its tower without copying it. Default: load the parts.
    """
    parts = parts or load_pretrained_parts(config)
    device = process_state().device
    torch.manual_seed(config.seed)  # seeds all devices
    torch.set_rng_state(parts.random_state)
    model_config = make_model_config(config, parts.tower, store.embed_dim, store.manifest["identity"])
    if parts.clip is not None:
        assert out is not None
        parts.clip.model.to(device)
        model = build_model_in_clip_space(model_config, parts.tower, parts.clip)
        precision = resolve_precision("align", config.precision, device)
        inherit_text_space(model, parts.clip, train, store, config.seed, precision, out)
        parts.clip = None  # frees the CLIP model's memory, even if the caller still holds `parts`
        free_memory()
    else:
        model = LLM2CLIP(model_config, parts.tower)
    if parts.logits is not None:
        model.set_logits(*parts.logits)
    elif config.logit_scale is not None:
        assert not isinstance(config.logit_scale, str)
        model.set_logits(config.logit_scale)
    return model.to(device)


def make_model_config(
    config: AlignConfig, tower: VisionTower, text_dim: int, encoder: dict[str, Any] | None = None
) -> LLM2CLIPConfig:
    """Return the config of the model that `align` trains. `encoder` is the caption encoder's identity, if known."""
    embed_dim = config.embed_dim or tower.feature_dim
    if config.adapter_depth == 0:  # the shared embedding space is that of the caption encoder
        embed_dim = text_dim
    return LLM2CLIPConfig(
        tower=tower.config,
        text_dim=text_dim,
        embed_dim=embed_dim,
        adapter=AdapterConfig(depth=config.adapter_depth, normalize_input=config.normalize_input),
        projection=config.embed_dim > 0,
        projection_bias=config.embed_dim > 0 and needs_projection_bias(tower.config),
        logit_bias=get_loss(config.loss).needs_bias,
        matryoshka_dims=config.matryoshka_dims,
        encoder=encoder or {},
    )


# ---- representation inheritance --------------------------------------------------------------------------------------


@use_onednn_matmul()
def inherit_text_space(
    model: LLM2CLIP,
    clip: ClipTextEncoder,
    records: Sequence[Record],
    store: EmbeddingStore,
    seed: int,
    precision: str,
    folder: Path,
) -> None:
    """Train the adapter of `model` to reproduce a CLIP model's text embeddings. Must be called by all ranks.

    The main process trains the adapter and saves its weights in `folder`, together with a signature of the data, models
    and settings. If `folder` already contains weights with the same signature, the saved weights are loaded instead.

    Args:
        model: Model with a new adapter and the same `embed_dim` as the CLIP model, modified in place.
        store: Store of LLM embeddings of the captions and phrases in `records`. Captions that the tokenizer could not
            encode and phrases that are not in the store are skipped.
        precision: "bf16" enables autocast. For "fp32" and "fp16", the adapter is trained in float32.
    """
    table = records if isinstance(records, RecordTable) else RecordTable.from_records(records)
    texts = (text for chunk in iterate_training_texts(table, store) for text in chunk.texts)
    identity = {"clip": hash_weights(clip.model), "precision": "fp32"}
    clip_folder = folder / f"clip-texts-{fingerprint(identity)[:8]}"
    clip_store = store_text_embeddings(texts, clip.encode, clip.embed_dim, identity, clip_folder, dtype="float16")
    file = folder / WEIGHTS
    if process_state().is_main_process:
        training_texts = find_training_texts(table, store, clip_store)
        signature = {
            "clip": identity,
            "encoder": store.manifest["fingerprint"],
            "texts": training_texts.text_hash,
            "adapter": hash_weights(model.adapter),  # untrained weights, which depend on the architecture and the seed
            "training": [EPOCHS, MIN_STEPS, BATCH_SIZE, LR, WARMUP_RATIO, MAX_REPEATS, seed, precision],
        }
        if _read_weights_signature(file) != signature:
            similarity = _train_adapter(model.adapter, training_texts, model.device, seed, precision)
            state = {name: tensor.cpu().contiguous() for name, tensor in model.adapter.state_dict().items()}
            with atomic_path(file) as temporary:
                save_file(state, temporary, {"signature": json.dumps(signature), "similarity": f"{similarity:.4f}"})
    wait_for_everyone()
    model.adapter.load_state_dict(load_file(file))


@dataclass(frozen=True)
class TextChunk:
    texts: list[str]
    keys: np.ndarray  # keys of the texts in embedding stores, of shape (N, 16), uint8
    rows: np.ndarray  # row numbers of the LLM embeddings, of shape (N,), int64
    are_captions: bool


@dataclass(frozen=True)
class TrainingTexts:
    """Distinct training texts: first the captions, then the phrases that are not also captions."""

    store: EmbeddingStore  # LLM embeddings
    clip_store: EmbeddingStore
    rows: np.ndarray  # row numbers of the LLM embeddings, of shape (N,), int64
    clip_rows: np.ndarray  # row numbers of the CLIP embeddings, of shape (N,), int64
    num_captions: int
    text_hash: str

    def load_embeddings(self, items: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the LLM and CLIP embeddings of the texts with the given indices."""
        embeddings = torch.from_numpy(self.store.take(self.rows[items])).to(device)
        return embeddings, torch.from_numpy(self.clip_store.take(self.clip_rows[items])).to(device)


def iterate_training_texts(records: RecordTable, store: EmbeddingStore) -> Iterator[TextChunk]:
    """Yield chunks of training captions, followed by chunks of phrases.

    Long captions are used only if there are no other captions, because CLIP text towers read at most 77 tokens.

    Raises:
        StoreError: A caption is not in the store.
    """
    caption_fields: tuple[str, ...] = ("captions", "short_captions")
    if not any(records.count_texts(field).any() for field in caption_fields):
        caption_fields = ("long_captions",)
    refused = read_refused_captions(store.folder)
    for fields in (caption_fields, ("phrases",)):
        for texts in iter_chunks(records.iterate_texts(fields), LOOKUP_CHUNK_SIZE):
            keys = make_caption_keys(texts)
            rows = store.find_keys(keys)
            is_found = rows >= 0
            if fields == caption_fields:
                missing = [texts[n] for n in np.flatnonzero(~is_found).tolist()]
                store.find_rows(caption for caption in missing if caption not in refused)  # raises StoreError
            found_texts = [texts[n] for n in np.flatnonzero(is_found).tolist()]
            yield TextChunk(found_texts, keys[is_found], rows[is_found], fields == caption_fields)


def find_training_texts(records: RecordTable, store: EmbeddingStore, clip_store: EmbeddingStore) -> TrainingTexts:
    """Find the embeddings of all training texts. Memory use: about 50 bytes per text, including duplicates."""
    rows, clip_rows = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    num_captions = 0
    digest = hashlib.sha256()
    for chunk in iterate_training_texts(records, store):
        rows.append(chunk.rows)
        clip_rows.append(clip_store.find_keys(chunk.keys))
        num_captions += len(chunk.texts) if chunk.are_captions else 0
        digest.update(chunk.keys.tobytes())
    all_rows = np.concatenate(rows)
    first = np.sort(np.unique(all_rows, return_index=True)[1])  # first occurrence of each text
    return TrainingTexts(
        store,
        clip_store,
        rows=all_rows[first],
        clip_rows=np.concatenate(clip_rows)[first],
        num_captions=int(np.searchsorted(first, num_captions)),
        text_hash=f"{digest.hexdigest()} {num_captions}",
    )


def _read_weights_signature(file: Path) -> object:
    if not file.exists():
        return None
    with safe_open(file, "pt") as weights:
        return json.loads(weights.metadata()["signature"])


def _train_adapter(adapter: nn.Module, texts: TrainingTexts, device: torch.device, seed: int, precision: str) -> float:
    """Train the adapter. Print and return the mean cosine similarity of its outputs to the CLIP text embeddings.

    The similarity is measured on held-out texts or, if there are fewer than 20 texts in total, on the training texts.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(texts.rows))
    test_size = min(MAX_TEST_TEXTS, len(order) // 20)
    test, train = order[:test_size], repeat_phrases(order[test_size:], texts.num_captions)
    batch_size = min(BATCH_SIZE, len(train))
    steps_per_epoch = len(train) // batch_size
    steps = max(MIN_STEPS, EPOCHS * steps_per_epoch)

    matrices = [p for p in adapter.parameters() if p.ndim > 1]
    vectors = [p for p in adapter.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=ADAM_BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, make_cosine_schedule(steps, WARMUP_RATIO))
    # fp16 would require loss scaling, and the adapter is small enough to train in fp32 on GPUs without bf16.
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    adapter.train()
    for step in ProgressBar(range(steps), desc="inherit", unit="step"):
        epoch_step = step % steps_per_epoch
        if epoch_step == 0:
            train = rng.permutation(train)
        embeddings, teacher = texts.load_embeddings(train[epoch_step * batch_size :][:batch_size], device)
        with autocast:
            student = adapter(embeddings)
        distillation_loss(student, teacher, gather=False).backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    adapter.eval()
    with torch.no_grad():
        embeddings, teacher = texts.load_embeddings(test if test_size else train, device)
        similarity = F.cosine_similarity(adapter(embeddings), teacher).mean().item()
    split = "held-out" if test_size else "training"
    print_once(f"inherit: cosine similarity {similarity:.3f} to the CLIP text embeddings of the {split} texts")
    return similarity


def repeat_phrases(texts: np.ndarray, num_captions: int) -> np.ndarray:
    """Repeat all phrases up to `MAX_REPEATS` times, so that they make up about half of the texts if possible.

    `texts` contains int64 indices. Indices below `num_captions` are captions, and all other indices are phrases.
    """
    captions, phrases = texts[texts < num_captions], texts[texts >= num_captions]
    repeats = min(MAX_REPEATS, max(1, len(captions) // max(1, len(phrases))))
    return np.concatenate([captions, np.repeat(phrases, repeats)])
