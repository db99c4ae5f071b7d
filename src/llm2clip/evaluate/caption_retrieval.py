"""Caption retrieval accuracy (CRA) of a text encoder (arXiv 2411.04997, section 3.1).

The first caption of each image must retrieve the second caption of that image, and vice versa. A tie with a wrong
caption counts as an error.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.config import EncoderConfig
from llm2clip.evaluate.embeddings import PRECOMPUTED_SUFFIX
from llm2clip.evaluate.metrics import compute_mean_interval, compute_recall, two_way_ranks
from llm2clip.models.clip_models import ClipTextEncoder, has_text_tower, load_clip_text_encoder
from llm2clip.models.dual_encoder import SENTENCE_TRANSFORMERS_PREFIX
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.model_folder import is_model_folder
from llm2clip.models.pretrained import resolve_pretrained_name
from llm2clip.models.text.caption_encoder import CaptionEncoder, load_encoder_for_evaluation
from llm2clip.runs.ranks import process_state

TextEncoder = CaptionEncoder | ClipTextEncoder


def open_text_encoder(model: str | None, encoder: EncoderConfig, trust_remote_code: bool) -> TextEncoder:
    """Load the text encoder of a model. If `model` is None, load the caption encoder specified by `encoder`.

    Raises:
        ValueError: The model has no separate text encoder, or a setting in `encoder` is not supported by a CLIP tower.
    """
    device = process_state().device
    if model is not None:
        if model.endswith(PRECOMPUTED_SUFFIX) or model.startswith(SENTENCE_TRANSFORMERS_PREFIX):
            raise ValueError(f"{model} has no separate text encoder: remove --captions")
        if has_text_tower(model, trust_remote_code):
            return load_clip_text_encoder(model, trust_remote_code=trust_remote_code)
        if Path(model).is_dir() and not is_model_folder(model):
            return load_encoder_for_evaluation(model, device)
        clip = LLM2CLIP.from_pretrained(model, device)
        clip.load_encoder(stage="evaluate")
        return clip.encoder
    path = resolve_pretrained_name(encoder.path)
    if not has_text_tower(path, trust_remote_code):
        return load_encoder_for_evaluation(device=device, **dataclasses.asdict(encoder))
    defaults = vars(EncoderConfig(path=encoder.path))
    changed = [f"--encoder.{name}" for name, value in vars(encoder).items() if value != defaults[name]]
    if changed:
        raise ValueError(f"some settings are not supported by the CLIP text tower {path}: remove {', '.join(changed)}")
    return load_clip_text_encoder(path, trust_remote_code=trust_remote_code)


def caption_retrieval_accuracy(
    images: Sequence[Sequence[str]],
    encoder: TextEncoder,
    *,
    num_mistakes: int = 0,
    return_hits: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Compute how often the first two captions of an image retrieve each other, in percent.

    Args:
        images: Captions of each image. Images with fewer than two distinct captions are excluded.
        return_hits: Add "hits" to the result.

    Returns:
        A dict with the following keys:
            "CRA": Top-1 accuracy, averaged over both directions.
            "CRA interval": 95% bootstrap confidence interval of the CRA over images.
            "chance": Expected CRA of a random ranking.
            "first to second", "second to first": R@1, R@5 and R@10 in each direction.
            "positive cosine": Mean cosine similarity between captions of the same image.
            "negative cosine": Mean cosine similarity between captions of different images.
            "images", "excluded": Number of evaluated images, and number of excluded images.
            "truncated": Number of truncated captions.
            "hits": Accuracy of each image (0, 0.5 or 1), if `return_hits` is True.
            "mistakes": Result of `find_worst_retrieval_mistakes`, if `num_mistakes` is greater than 0.

    Raises:
        ValueError: No image has two distinct captions.
    """
    pairs = [captions[:2] for captions in map(list, map(dict.fromkeys, images)) if len(captions) > 1]
    if not pairs:
        raise ValueError("cannot measure caption retrieval, because no image has two distinct captions")
    texts = list(dict.fromkeys(caption for captions in pairs for caption in captions))
    row_of_text = {text: row for row, text in enumerate(texts)}
    embeddings = F.normalize(encoder.encode(texts, progress=progress), dim=-1)
    first, second = (embeddings[[row_of_text[captions[n]] for captions in pairs]] for n in (0, 1))
    first_ranks, second_ranks = two_way_ranks(first, second, range(len(first)))
    first_recall, second_recall = compute_recall(first_ranks), compute_recall(second_ranks)
    hits = ((first_ranks < 1).double() + (second_ranks < 1)) / 2
    positive_cosine, negative_cosine = compute_mean_cosine_similarities(first, second)
    metrics: dict[str, Any] = {
        "CRA": (first_recall["R@1"] + second_recall["R@1"]) / 2,
        "CRA interval": compute_mean_interval(hits),
        "chance": 100.0 / len(pairs),
        "first to second": first_recall,
        "second to first": second_recall,
        "positive cosine": positive_cosine,
        "negative cosine": negative_cosine,
        "images": len(pairs),
        "excluded": len(images) - len(pairs),
        "truncated": encoder.count_truncated_texts(texts),
    }
    if return_hits:
        metrics["hits"] = hits.tolist()
    if num_mistakes:
        metrics["mistakes"] = find_worst_retrieval_mistakes(first, second, pairs, num_mistakes)
    return metrics


def compute_mean_cosine_similarities(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Return the mean of first[i] · second[i], and the mean of first[i] · second[j] over all pairs with i != j."""
    a, b = first.double(), second.double()
    diagonal_sum = float((a * b).sum())
    total_sum = float(a.sum(0) @ b.sum(0))
    n = len(a)
    return diagonal_sum / n, (total_sum - diagonal_sum) / max(1, n * (n - 1))


def find_worst_retrieval_mistakes(
    first: Tensor, second: Tensor, captions: Sequence[Sequence[str]], count: int, chunk_size: int = 4096
) -> list[dict[str, Any]]:
    """Return the queries for which a wrong caption is at least as similar as the correct caption, worst first.

    Each mistake has "caption" (the query), "correct" (the correct caption), "retrieved" (the wrong caption), and the
    cosine similarities "correct cosine" and "retrieved cosine". `chunk_size` is the number of queries in each matmul.
    """
    correct_scores = (first * second).sum(1)
    wrong_scores, wrong_indices = torch.empty(len(first)), torch.empty(len(first), dtype=torch.int64)
    for start in range(0, len(first), chunk_size):
        scores = first[start : start + chunk_size] @ second.T  # (queries, captions)
        rows = torch.arange(len(scores))
        scores[rows, rows + start] = -torch.inf
        wrong_scores[start : start + chunk_size], wrong_indices[start : start + chunk_size] = scores.max(1)
    order = (wrong_scores - correct_scores).argsort(descending=True, stable=True)
    mistakes = []
    for i in order[:count].tolist():
        if wrong_scores[i] < correct_scores[i]:
            break
        mistakes.append(
            {
                "caption": captions[i][0],
                "correct": captions[i][1],
                "correct cosine": float(correct_scores[i]),
                "retrieved": captions[int(wrong_indices[i])][1],
                "retrieved cosine": float(wrong_scores[i]),
            }
        )
    return mistakes
