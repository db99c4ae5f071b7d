"""Exact top-k search by dot product, in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from llm2clip.cpu_tuning import onednn_matmul


@onednn_matmul()
def top_k_neighbors(queries: Tensor, items: Tensor, k: int, chunk_size: int = 2048) -> tuple[Tensor, Tensor]:
    """Return the `k` items with the highest scores for each query, sorted by score. The order of ties is arbitrary.

    Args:
        queries: Query embeddings, (Q, D), L2-normalised.
        items: Item embeddings, (N, D), L2-normalised.
        k: Number of items to return for each query. If there are fewer items, all items are returned.
        chunk_size: Number of queries and number of items per matmul. At most chunk_size * (chunk_size + k) scores are
            in memory at a time.

    Returns:
        Scores, float32 (Q, k), and item indices, int64 (Q, k).
    """
    k = min(k, len(items))
    all_scores = torch.empty(len(queries), k)
    all_indices = torch.empty(len(queries), k, dtype=torch.int64)
    for start in range(0, len(queries), chunk_size):
        chunk = queries[start : start + chunk_size].float()
        best_scores = torch.empty(len(chunk), 0)
        best_indices = torch.empty(len(chunk), 0, dtype=torch.int64)
        for offset in range(0, len(items), chunk_size):
            scores = chunk @ items[offset : offset + chunk_size].float().T  # (queries, items)
            new_scores, new_indices = scores.topk(min(k, scores.shape[1]))
            merged_scores = torch.cat([best_scores, new_scores], 1)
            merged_indices = torch.cat([best_indices, new_indices + offset], 1)
            best_scores, order = merged_scores.topk(min(k, merged_scores.shape[1]))
            best_indices = merged_indices.gather(1, order)
        all_scores[start : start + chunk_size] = best_scores
        all_indices[start : start + chunk_size] = best_indices
    return all_scores, all_indices
