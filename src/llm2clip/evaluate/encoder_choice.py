"""Choice of a caption encoder before training (`fit --encoder.path auto`).

The pretrained vision tower encodes a sample of the training images, and each candidate encodes their captions. The
score of a candidate is the mutual nearest-neighbour alignment of the caption and image embeddings (arXiv 2405.07987).
For encoders that are not tuned, the score predicts which encoder leads to better retrieval after `align` (see
docs/results/quality.md).
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.config import AUTO, EncoderConfig, FitConfig
from llm2clip.cpu_tuning import free_memory, use_onednn_matmul
from llm2clip.data.records import CAPTION_FIELDS, Record
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.table import RecordTable
from llm2clip.io_utils import format_count
from llm2clip.models.precision import FP32
from llm2clip.models.pretrained import AssetUnavailableError, resolve_pretrained_name
from llm2clip.models.text.caption_encoder import load_encoder_for_evaluation
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.progress import ProgressBar
from llm2clip.runs.ranks import print_once, process_state
from llm2clip.store.encode import TowerEncoder, encode_image_batches

# An English sentence encoder, and an LLM whose tokenizer covers all languages. The largest encoder must be last.
CANDIDATES = (EncoderConfig("all-minilm-l6-v2"), EncoderConfig("smollm2-135m", layers=4))
MAX_IMAGES = 1000
MIN_IMAGES = 100  # with fewer images, the first candidate is chosen without comparison
MAX_SECONDS = 60  # time limit for encoding the images
BLOCK_SIZE = 50  # the sample consists of blocks of consecutive records, so that few remote shards are read
MAX_CAPTIONS = 5  # maximum number of captions per image
NEIGHBOURS = 10


def resolve_auto_encoder(config: FitConfig, encoder: EncoderConfig = CANDIDATES[-1]) -> FitConfig:
    """If the encoder path is "auto", replace the encoder, by default with the largest candidate."""
    return replace(config, encoder=encoder) if config.encoder.path == AUTO else config


def describe_encoder(encoder: EncoderConfig) -> str:
    layers = "" if encoder.layers is None else f", {format_count(encoder.layers, 'layer')}"
    return f"{encoder.path}{layers}"


def download_candidate_encoders() -> list[EncoderConfig]:
    """Download all candidate encoders that are not cached. Return the encoders that are available.

    Raises:
        AssetUnavailableError: No encoder is available.
    """
    candidates = []
    for config in CANDIDATES:
        try:
            resolve_pretrained_name(config.path)
            candidates.append(config)
        except AssetUnavailableError as error:
            print_once(f"Skipped the candidate encoder {config.path}: {error}")
    if not candidates:
        raise AssetUnavailableError("no caption encoder can be downloaded: set --encoder.path to a local folder")
    return candidates


def choose_caption_encoder(
    train: RecordTable, tower: VisionTower, candidates: Sequence[EncoderConfig]
) -> dict[str, Any]:
    """Score all candidates on a random sample of the training records, and choose the best candidate.

    Args:
        tower: Vision tower on the CPU. The tower is moved to this process's device and back.

    Returns:
        A dict with "encoder" (chosen candidate, as a dict of `EncoderConfig` fields), "images" (number of encoded
        images) and "scores" (scores between 0 and 1, best first, keyed by the result of `describe_encoder`). "scores"
        is empty if fewer than `MIN_IMAGES` images could be encoded.
    """
    records, images = _encode_images_until_deadline(_sample_records(train), tower)
    choice: dict[str, Any] = {"encoder": asdict(candidates[0]), "images": len(records), "scores": {}}
    if len(records) < MIN_IMAGES:
        return choice
    scores = [compute_mutual_knn_alignment(images, _encode_captions(records, candidate)) for candidate in candidates]
    order = sorted(range(len(candidates)), key=lambda n: -scores[n])
    choice["encoder"] = asdict(candidates[order[0]])
    choice["scores"] = {describe_encoder(candidates[n]): scores[n] for n in order}
    return choice


def describe_encoder_choice(choice: Mapping[str, Any]) -> str:
    chosen = f"Caption encoder: {describe_encoder(EncoderConfig(**choice['encoder']))} (not tuned)."
    if not choice["scores"]:
        return (
            f"{chosen} No other encoder was evaluated, because only {choice['images']:,} images could be encoded "
            f"within a minute. At least {MIN_IMAGES} are required."
        )
    (_, score), *others = choice["scores"].items()
    compared = f" ({', '.join(f'{name}: {other:.1%}' for name, other in others)})" if others else ""
    return f"{chosen} Nearest-neighbour agreement between images and captions: {score:.1%}{compared}."


def _sample_records(train: RecordTable) -> list[Record]:
    num_captions = sum(train.count_texts(field) for field in CAPTION_FIELDS)
    usable = np.flatnonzero(train.has_image & (num_captions > 0))
    blocks = [usable[start : start + BLOCK_SIZE] for start in range(0, len(usable), BLOCK_SIZE)]
    order = np.random.default_rng(0).permutation(len(blocks))
    sample = [blocks[n] for n in order[: MAX_IMAGES // BLOCK_SIZE]]
    return list(train.select(np.concatenate([usable[:0], *sample])))


@use_onednn_matmul()
def _encode_images_until_deadline(records: Sequence[Record], tower: VisionTower) -> tuple[list[Record], Tensor]:
    """Encode images for up to `MAX_SECONDS`. Return the records of all encoded images, and features of shape (N, D)."""
    encoder, log = TowerEncoder(tower.to(process_state().device), FP32), SkipLog(max_skipped=1.0)
    decoded: list[Record] = []
    features = [torch.empty(0, tower.feature_dim)]
    deadline = time.monotonic() + MAX_SECONDS
    with ProgressBar(total=len(records), desc="choosing the encoder", unit="image") as bar:
        for start in range(0, len(records), BLOCK_SIZE):
            if time.monotonic() > deadline:
                break
            block = records[start : start + BLOCK_SIZE]
            refs = [record.image for record in block if record.image is not None]
            block_features, indices = encode_image_batches(refs, encoder, log, bar)
            decoded += [block[n] for n in indices]
            features.append(block_features)
    tower.cpu()
    free_memory()
    return decoded, torch.cat(features)


def _encode_captions(records: Sequence[Record], config: EncoderConfig) -> Tensor:
    """Return the mean caption embedding of each record as a tensor of shape (records, D)."""
    captions = [record.texts[:MAX_CAPTIONS] for record in records]
    encoder = load_encoder_for_evaluation(device=process_state().device, **asdict(config))
    texts = [text for texts in captions for text in texts]
    embeddings = F.normalize(encoder.encode(texts, progress=True), dim=-1)
    del encoder
    free_memory()
    return torch.stack([each.mean(0) for each in embeddings.split(list(map(len, captions)))])


def compute_mutual_knn_alignment(first: Tensor, second: Tensor, neighbours: int = NEIGHBOURS) -> float:
    """Return the mutual nearest-neighbour alignment of two sets of embeddings (arXiv 2405.07987).

    The alignment of an item is the fraction of its nearest neighbours by cosine similarity that are the same in both
    sets. The result is the mean alignment of all items.

    Args:
        first, second: Embeddings of the same N items, of shape (N, D1) and (N, D2).
        neighbours: Number of nearest neighbours per item. Must be less than N.
    """
    masks = []
    for embeddings in (first, second):
        unit = F.normalize(embeddings.float(), dim=-1)
        similarities = (unit @ unit.T).fill_diagonal_(-torch.inf)  # (N, N)
        masks.append(torch.zeros_like(similarities).scatter_(1, similarities.topk(neighbours).indices, 1.0))
    return float((masks[0] * masks[1]).sum(1).mean()) / neighbours
