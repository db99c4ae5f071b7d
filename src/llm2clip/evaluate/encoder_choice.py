"""Choice of a caption encoder before training (`fit --encoder.path auto`).

The pretrained vision tower encodes a sample of the training images, and each candidate encodes their captions. The
score of a candidate is its mutual nearest-neighbour alignment with the tower (arXiv 2405.07987): images that are close
to each other should have captions that are close to each other. The score predicts which encoder leads to better
retrieval after `align` if the encoders are not tuned; see docs/results/quality.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.config import AUTO, EncoderConfig, FitConfig
from llm2clip.cpu_tuning import free_memory
from llm2clip.data.records import CAPTION_FIELDS, Record
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.table import RecordTable
from llm2clip.models.precision import FP32
from llm2clip.models.pretrained import AssetUnavailableError
from llm2clip.models.text.caption_encoder import load_for_evaluation
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.progress import ProgressBar
from llm2clip.runs.ranks import print_once, process_state
from llm2clip.store.encode import TowerEncoder, encode_image_batches

# A sentence encoder trained on English text, and an LLM whose tokenizer covers all languages. Both are small.
CANDIDATES = {
    "all-minilm-l6-v2": EncoderConfig("all-minilm-l6-v2"),
    "smollm2-135m, first 4 layers": EncoderConfig("smollm2-135m", layers=4),
}
ENCODER_CHOICE_FILE = "encoder_choice.json"  # result of `score_candidates`
SAMPLE_SIZE = 1000  # maximum number of images
MAX_CAPTIONS = 5  # maximum number of captions per image
NEIGHBOURS = 10


def resolve_auto(config: FitConfig, candidate: str | None = None) -> FitConfig:
    """Replace `--encoder.path auto` by a candidate, which is not tuned. Default: the first candidate."""
    if config.encoder.path != AUTO:
        return config
    encoder = CANDIDATES[candidate or next(iter(CANDIDATES))]
    return replace(config, encoder=encoder, tune=replace(config.tune, steps=0))


def score_candidates(train: RecordTable, tower: VisionTower) -> dict[str, float]:
    """Return the score of each candidate between 0 and 1, best first. Candidates that cannot be downloaded are skipped.

    `train` are the training records, of which a random sample is used. The tower is moved to this process's device.

    Raises:
        AssetUnavailableError: No candidate can be downloaded.
    """
    device = process_state().device
    num_captions = sum(train.count_texts(field) for field in CAPTION_FIELDS)
    usable = np.flatnonzero(train.has_image & (num_captions > 0))
    records = list(train.select(np.sort(np.random.default_rng(0).permutation(usable)[:SAMPLE_SIZE])))
    with ProgressBar(total=len(records), desc="choosing the encoder", unit="image") as bar:
        refs = [record.image for record in records if record.image is not None]
        encoder = TowerEncoder(tower.to(device), FP32)
        images, decoded = encode_image_batches(refs, encoder, SkipLog(max_skipped=1.0), bar)
    records = [records[n] for n in decoded]
    scores = {}
    for name, config in CANDIDATES.items():
        try:
            scores[name] = mutual_knn(images, _encode_captions(records, config, device))
        except AssetUnavailableError as error:
            print_once(f"{name} is not a candidate for the caption encoder: {error}")
    if not scores:
        raise AssetUnavailableError("no caption encoder can be downloaded: set --encoder.path to a local folder")
    return dict(sorted(scores.items(), key=lambda item: item[1], reverse=True))


def describe_choice(scores: Mapping[str, float]) -> str:
    """Describe the result of `score_candidates` in two sentences."""
    (chosen, score), *others = scores.items()
    compared = f" ({', '.join(f'{name}: {other:.1%}' for name, other in others)})" if others else ""
    return (
        f"Caption encoder: {chosen}, without tuning. Its captions have {score:.1%} of their nearest neighbours in "
        f"common with the images{compared}."
    )


def _encode_captions(records: Sequence[Record], config: EncoderConfig, device: torch.device) -> Tensor:
    """Return the mean caption embedding of each record, of shape (records, D)."""
    captions = [record.texts[:MAX_CAPTIONS] for record in records]
    encoder = load_for_evaluation(device=device, **asdict(config))
    embeddings = F.normalize(encoder.encode([text for texts in captions for text in texts]), dim=-1)
    del encoder
    free_memory()
    means = [each.mean(0, keepdim=True) for each in embeddings.split(list(map(len, captions)))]
    return torch.cat([embeddings[:0], *means])


def mutual_knn(first: Tensor, second: Tensor) -> float:
    """Return the mutual nearest-neighbour alignment of two sets of embeddings (arXiv 2405.07987).

    This is the fraction of an item's nearest neighbours by cosine similarity that are the same in both sets, averaged
    over the items.

    Args:
        first, second: Embeddings of the same N items, of shape (N, D1) and (N, D2). With fewer than 100 items, a tenth
            of them are neighbours.
    """
    neighbours = max(1, min(NEIGHBOURS, len(first) // 10))
    if len(first) <= neighbours:
        return 0.0
    masks = []
    for embeddings in (first, second):
        unit = F.normalize(embeddings.float(), dim=-1)
        similarities = (unit @ unit.T).fill_diagonal_(-torch.inf)  # (N, N)
        masks.append(torch.zeros_like(similarities).scatter_(1, similarities.topk(neighbours).indices, 1.0))
    return float((masks[0] * masks[1]).sum(1).mean()) / neighbours
