"""Distillation losses of ProCLIP (arXiv 2510.18795), which keep embeddings close to those of a frozen teacher.

They have two uses. In the `align` stage, they keep the vision tower's features close to those of the pretrained tower
(self-distillation). Before the `align` stage, they can train the adapter to reproduce the embeddings of a CLIP model's
text tower (representation inheritance; see `inherit.py`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.runs.gather import RaggedGather


def distillation_loss(student: Tensor, teacher: Tensor, gather: bool = True) -> Tensor:
    """Return the sum of ProCLIP's instance loss and structure loss between L2-normalised embeddings.

    With student embeddings s_i and teacher embeddings t_i of N items:

        instance loss:   mean over i of |s_i - t_i|^2
        structure loss:  mean over pairs i != j of smooth_l1(|s_i - s_j| - |t_i - t_j|)

    The formulas are taken from `train_one_epoch_stage1` and `train_one_epoch_stage2` in training/train.py of
    https://github.com/VisionXLab/ProCLIP. ProCLIP's code sums over items and over the pairs of each rank, whereas this
    function averages over items and over the pairs of all ranks, so that the loss does not scale with the batch size or
    the number of ranks. In its second stage, ProCLIP's code compares image embeddings, whereas `align` compares the
    tower's features before the projection, because a new projection has no teacher. Memory use is quadratic in N.

    Args:
        student: Embeddings, (N, D). They are L2-normalised here.
        teacher: Embeddings of the same items, (N, D), without gradients. They are L2-normalised here.
        gather: If True, use the pairs of all ranks; all ranks must then call this function. If all ranks have the same
            number of items, the loss and its gradients, averaged over ranks, equal those of a single process with all
            items.

    Returns:
        The loss as a float32 scalar. With a single item, the structure loss is 0.
    """
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = F.normalize(student.float(), dim=-1), F.normalize(teacher.float(), dim=-1)
        instance = (student - teacher).square().sum(-1).mean()

        ranks = RaggedGather(len(student), student.device, gather)
        all_student, all_teacher = ranks.gather(student, gradients=True), ranks.gather(teacher)
        student_distances = _distances(student, all_student)  # (items of this rank, items of all ranks)
        teacher_distances = _distances(teacher, all_teacher)
        # The pair of an item with itself adds 0 to the sum.
        total = F.smooth_l1_loss(student_distances, teacher_distances, reduction="sum")
        structure = total / max(1, len(student) * (ranks.total_size - 1))
    return instance + structure


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the Euclidean distances between L2-normalised vectors, (N, D) and (M, D), as (N, M).

    Almost equal vectors have a distance of 0 and no gradient, because the gradient of the square root is infinite at 0.
    """
    squares = 2 - 2 * a @ b.T
    is_distinct = squares > 1e-6  # float32 has an absolute error of about 1e-7
    return torch.where(is_distinct, squares.where(is_distinct, 1.0).sqrt(), 0.0)
