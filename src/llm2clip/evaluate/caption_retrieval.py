"""Caption retrieval accuracy (CRA) of a text encoder (arXiv 2411.04997, section 3.1).

In the paper's protocol, the first caption of each image is used to retrieve the second one, and vice versa. In the "all
pairs" protocol, each caption is a query for which all other captions are ranked, and any other caption of the same
image is a correct answer. In both protocols, a tie between a correct and a wrong caption counts as an error.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.config import EncoderConfig
from llm2clip.data.texts import deduplicate_captions
from llm2clip.evaluate.embeddings import PRECOMPUTED_SUFFIX
from llm2clip.evaluate.metrics import (
    bootstrap_intervals,
    compute_chance_recall,
    compute_positive_ranks,
    recall,
    two_way_ranks,
)
from llm2clip.models.clip_models import has_text_tower, load_clip_text_encoder
from llm2clip.models.dual_encoder import SENTENCE_TRANSFORMERS_PREFIX
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.model_folder import is_model_folder
from llm2clip.models.pretrained import resolve_pretrained
from llm2clip.models.text.caption_encoder import load_for_evaluation
from llm2clip.runs.ranks import process_state


class TextEncoder(Protocol):
    """Interface for text encoders. `encode` returns float32 embeddings of shape (N, D) on the CPU.

    `count_truncated` returns the number of texts truncated to the maximum length, or None if unknown.
    """

    def encode(self, captions: Sequence[str], *, progress: bool = ...) -> Tensor: ...

    def count_truncated(self, captions: Sequence[str]) -> int | None: ...


def open_text_encoder(model: str | None, encoder: EncoderConfig, trust_remote_code: bool) -> TextEncoder:
    """Load the text encoder of a model. If `model` is None, load the caption encoder that `encoder` describes.

    Raises:
        ValueError: If the model has no separate text encoder, or settings of `encoder` do not apply to it.
    """
    device = process_state().device
    if model is not None:
        if model.endswith(PRECOMPUTED_SUFFIX) or model.startswith(SENTENCE_TRANSFORMERS_PREFIX):
            raise ValueError(f"{model} has no separate caption encoder: remove --captions")
        if has_text_tower(model, trust_remote_code):
            return load_clip_text_encoder(model, trust_remote_code=trust_remote_code)
        if Path(model).is_dir() and not is_model_folder(model):
            return load_for_evaluation(model, device)
        clip = LLM2CLIP.from_pretrained(model, device)
        clip.load_encoder(stage="evaluate")
        return clip.encoder
    path = resolve_pretrained(encoder.path)
    if not has_text_tower(path, trust_remote_code):
        return load_for_evaluation(device=device, **dataclasses.asdict(encoder))
    defaults = vars(EncoderConfig(path=encoder.path))
    changed = [f"--encoder.{name}" for name, value in vars(encoder).items() if value != defaults[name]]
    if changed:
        raise ValueError(
            f"{path} is a CLIP text tower, which does not support these settings: remove {', '.join(changed)}"
        )
    return load_clip_text_encoder(path, trust_remote_code=trust_remote_code)


def caption_retrieval_accuracy(
    images: Sequence[Sequence[str]],
    encoder: TextEncoder,
    *,
    all_pairs: bool = False,
    num_mistakes: int = 0,
    return_hits: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure how well a text encoder matches captions of the same image, in percent.

    Args:
        images: List of captions for each image. Images with fewer than two distinct captions are excluded.
        all_pairs: If True, also compute metrics for the "all pairs" protocol.
        num_mistakes: Maximum number of mistakes to return (for the paper's protocol). The worst are returned first.
        return_hits: If True, also return the accuracy for each image.

    Returns:
        A dict with the results of the paper's protocol. "CRA" is the top-1 accuracy, averaged over both directions.
        "CRA interval" is its 95% bootstrap confidence interval over images, and "chance" is its chance level. "first to
        second" and "second to first" are R@1/5/10 in each direction. "positive cosine" and "negative cosine" are the
        mean cosine similarities between captions of the same image and between captions of different images. "images",
        "excluded" and "truncated" are the numbers of evaluated images, excluded images and truncated captions.

        With `all_pairs`, "all pairs" and "all pairs chance" are R@1/5/10 and its chance levels in the "all pairs"
        protocol, and "captions" is the number of captions. With `return_hits`, "hits" is each image's accuracy (0, 0.5
        or 1). If `num_mistakes` is greater than 0, "mistakes" is the result of `find_worst_mistakes`.

    Raises:
        ValueError: If no image has two distinct captions.
    """
    caption_lists = [captions for captions in map(deduplicate_captions, images) if len(captions) > 1]
    if not caption_lists:
        raise ValueError("caption retrieval needs images with two distinct captions, but there are none")
    used = caption_lists if all_pairs else [captions[:2] for captions in caption_lists]
    texts = deduplicate_captions(caption for captions in used for caption in captions)
    row_of_text = {text: row for row, text in enumerate(texts)}
    embeddings = F.normalize(encoder.encode(texts, progress=progress), dim=-1)
    first = embeddings[[row_of_text[captions[0]] for captions in caption_lists]]
    second = embeddings[[row_of_text[captions[1]] for captions in caption_lists]]
    metrics, hits = _compute_paper_metrics(first, second)
    metrics |= {"excluded": len(images) - len(caption_lists), "truncated": encoder.count_truncated(texts)}
    metrics["chance"] = 100.0 / len(caption_lists)
    if all_pairs:
        rows = [row_of_text[caption] for captions in caption_lists for caption in captions]
        metrics |= _compute_all_pairs_metrics(embeddings[rows], [len(captions) for captions in caption_lists])
    if return_hits:
        metrics["hits"] = hits.tolist()
    if num_mistakes:
        metrics["mistakes"] = find_worst_mistakes(first, second, caption_lists, num_mistakes)
    return metrics


def _compute_paper_metrics(first: Tensor, second: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Return the metrics of the paper's protocol, and the accuracy of each image of shape (N,)."""
    first_ranks, second_ranks = two_way_ranks(first, second, range(len(first)))
    first_recall, second_recall = recall(first_ranks), recall(second_ranks)
    hits = ((first_ranks < 1).double() + (second_ranks < 1)) / 2
    low, high = (100 * bootstrap_intervals(hits[:, None], torch.ones(len(hits)))).flatten().tolist()
    positive_cosine, negative_cosine = compute_mean_cosines(first, second)
    metrics = {
        "CRA": (first_recall["R@1"] + second_recall["R@1"]) / 2,
        "CRA interval": (low, high),
        "first to second": first_recall,
        "second to first": second_recall,
        "positive cosine": positive_cosine,
        "negative cosine": negative_cosine,
        "images": len(first),
    }
    return metrics, hits


def _compute_all_pairs_metrics(embeddings: Tensor, captions_per_image: Sequence[int]) -> dict[str, Any]:
    """Compute recall for the "all pairs" protocol. In `embeddings`, captions of the same image must be adjacent."""
    positives: list[list[int]] = []
    for count in captions_per_image:
        start = len(positives)
        group = range(start, start + count)
        positives += [[other for other in group if other != caption] for caption in group]
    total = len(positives)
    ranks = compute_positive_ranks(embeddings, embeddings, positives, self_index=range(total))
    best_ranks = torch.stack([query_ranks[0] for query_ranks in ranks])
    return {
        "captions": total,
        "all pairs": recall(best_ranks),
        "all pairs chance": compute_chance_recall([len(others) for others in positives], total - 1),
    }


def compute_mean_cosines(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Return the mean of first[i] · second[i] over all i, and the mean of first[i] · second[j] over all i != j."""
    a, b = first.double(), second.double()
    diagonal_sum = float((a * b).sum())
    total_sum = float(a.sum(0) @ b.sum(0))
    n = len(a)
    return diagonal_sum / n, (total_sum - diagonal_sum) / max(1, n * (n - 1))


def find_worst_mistakes(
    first: Tensor, second: Tensor, captions: Sequence[Sequence[str]], count: int, chunk_size: int = 4096
) -> list[dict[str, Any]]:
    """Return the queries for which a wrong caption is at least as similar as the correct caption, worst first.

    Each mistake has "caption" (the query), "correct" (the correct caption), "retrieved" (the wrong caption), and the
    cosine similarities "correct cosine" and "retrieved cosine". `chunk_size` is the number of queries per matmul.
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
