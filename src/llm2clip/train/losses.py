"""Contrastive losses between the images and texts of a batch.

An image may have any number of texts. All images have equal weight in the loss, and all texts of an image have equal
weight. If several images share a text, the text is not a negative for any of these images. Further known texts of
an image (`other_texts`) are not negatives for that image, either. Logits are always float32.

`info_nce` and `sigmoid_loss` are efficient for large batches and multiple ranks. Simple definitions of the same losses
are in `tests/test_losses.py`.

- The full logit matrix is never stored, so memory is linear in the batch size instead of quadratic. Rows are computed
  in chunks. With the hand-written gradient, InfoNCE takes four matmuls instead of the six of automatic differentiation.
- In a distributed run, ranks gather the embeddings without gradients and exchange sums of exponentials. Each rank then
  computes the gradients with respect to its own embeddings. Averaged over ranks, as in DistributedDataParallel, the
  loss and its gradients equal those of a single process with the complete batch.

`LOSSES` lists the losses that `--align.loss` can select. The `tune` stage has its own loss, `tune.pair_loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.models.llm2clip import truncate_and_normalize
from llm2clip.runs.ranks import RaggedGather

LOGITS_PER_CHUNK = {"cpu": 1 << 21, "cuda": 1 << 26}  # 8 MB, which fits in a CPU's cache, and 256 MB on a GPU


def info_nce(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    image_of_text: Tensor | None = None,
    text_ids: Tensor | None = None,
    other_texts: Tensor | None = None,
    gather: bool = True,
) -> Tensor:
    """Compute symmetric InfoNCE (CLIP, arXiv 2103.00020) for any number of texts per image.

    In the image-to-text direction, an image must retrieve each of its texts from candidates consisting of that text and
    the texts of all other images. In the text-to-image direction, each text must retrieve its image from all images.
    With one text per image, the loss is the same as CLIP's.

    Args:
        image, text: Embeddings of shapes (N, D) and (M, D), L2-normalised.
        logit_scale: Factor applied to the cosine similarities (1 / temperature).
        image_of_text: Index of each text's image, of shape (M,), int64, ascending. Every image must have at least one
            text. Default: text i belongs to image i.
        text_ids: Id of each text, of shape (M,), int64. Identical texts must have the same id. Default: all texts are
            treated as distinct, which avoids a GPU synchronisation. Must be None on all ranks or on none.
        other_texts: (image index, text id) pairs of texts that match an image, whether or not they are in this batch,
            of shape (K, 2), int64. They are not used as negatives for that image. Default: None. Pass it on every rank
            or on no rank. Requires `text_ids`.
        gather: Use the texts and images of all ranks as negatives. If True, all ranks must call this function.

    Returns:
        The loss as a float32 scalar, averaged over both directions and over this rank's images.
    """
    return _apply_loss(_InfoNCEFunction, image, text, [logit_scale], image_of_text, text_ids, other_texts, gather)


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    image_of_text: Tensor | None = None,
    text_ids: Tensor | None = None,
    other_texts: Tensor | None = None,
    gather: bool = True,
) -> Tensor:
    """Compute the pairwise sigmoid loss (SigLIP, arXiv 2303.15343), a binary classification of every image-text pair.

    `logit_bias` is added to the logits. For the other arguments, see `info_nce`.

    Returns:
        The loss as a float32 scalar: the weighted sum over all pairs, divided by the number of images. The weight of a
        pair is 1 / (number of texts of the image to which the pair's text belongs).
    """
    scalars = [logit_scale, logit_bias]
    return _apply_loss(_SigmoidLossFunction, image, text, scalars, image_of_text, text_ids, other_texts, gather)


def _apply_loss(
    function: type[torch.autograd.Function],
    image: Tensor,
    text: Tensor,
    scalars: Sequence[Tensor | float],
    image_of_text: Tensor | None,
    *layout: Any,
) -> Tensor:
    tensors = [torch.as_tensor(x, device=image.device, dtype=torch.float32).reshape(()) for x in scalars]
    if image_of_text is None:
        image_of_text = torch.arange(len(text), device=text.device)
    with torch.autocast(image.device.type, enabled=False):
        pairs = _ImageTextLayout(len(image), image_of_text, *layout)
        return function.apply(image.float(), text.float(), *tensors, pairs)


@dataclass(frozen=True)
class Loss:
    """Loss that can be selected with `--align.loss`.

    Attributes:
        function: Function with the same arguments as `sigmoid_loss`, or as `info_nce` if `needs_bias` is False.
        needs_bias: True if a learned bias is added to the logits.
        matmuls: Numbers of matmuls between image and text embeddings for the loss and its gradient: in a single-process
            run, and per rank in a distributed run.
        chunk_tensors: Number of tensors with `LOGITS_PER_CHUNK` elements that are in memory at the same time.
    """

    function: Callable[..., Tensor]
    needs_bias: bool
    matmuls: tuple[int, int]
    chunk_tensors: int

    def __call__(self, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, *layout: Tensor | None) -> Tensor:
        scalars = (scale, bias) if self.needs_bias else (scale,)
        return self.function(image, text, *scalars, *layout)


def matryoshka_loss(
    loss: Loss,
    dims: Sequence[int],
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    *layout: Tensor | None,
) -> Tensor:
    """Return the mean of a loss over the full embeddings and all truncated sizes (Matryoshka, arXiv 2205.13147).

    Truncated embeddings are normalised again.
    """
    value = loss(image, text, scale, bias, *layout)
    if not dims:
        return value
    values = [value]
    for dim in dims:
        truncated_image, truncated_text = truncate_and_normalize(image, dim), truncate_and_normalize(text, dim)
        values.append(loss(truncated_image, truncated_text, scale, bias, *layout))
    return torch.stack(values).mean()


LOSSES = {
    "infonce": Loss(info_nce, needs_bias=False, matmuls=(4, 5), chunk_tensors=3),
    "sigmoid": Loss(sigmoid_loss, needs_bias=True, matmuls=(3, 4), chunk_tensors=3),
}


def get_loss(name: str) -> Loss:
    if name not in LOSSES:
        raise ValueError(f"--align.loss must be one of {', '.join(LOSSES)} (got {name})")
    return LOSSES[name]


# ---- chunked losses --------------------------------------------------------------------------------------------------


class _InfoNCEFunction(torch.autograd.Function):
    """Multi-positive InfoNCE.

    Let p be the logit of a text t and its image i, and let n be the logits of the negatives. In each direction, the
    text contributes the following term to the loss:

        -log(exp(p) / (exp(p) + sum exp(n))) = softplus(lse - p)    with lse = log(sum exp(n))

    lse is `image_lse` (one value per image) in the image-to-text direction, and `text_lse` (one value per text) in the
    text-to-image direction. If w_t is the weight of text t, the derivatives of the loss, before averaging over the two
    directions, are

        with respect to p:                      -w_t * (sigmoid(image_lse_i - p) + sigmoid(text_lse_t - p))   =: -coef_t
        with respect to a negative logit l_it:  a_i * exp(l_it - image_lse_i) + b_t * exp(l_it - text_lse_t)

    where a_i is the sum of w_t * sigmoid(image_lse_i - p) over the texts of image i, and b_t is
    w_t * sigmoid(text_lse_t - p). `_shift_log_sum_exp` moves the factors a and b into the exponents.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, layout: _ImageTextLayout) -> Tensor:
        all_text = layout.text_gather.gather(text)
        image_lse = image.new_empty(len(image))
        text_lse = image.new_full((len(all_text),), -torch.inf)
        for rows in layout.iterate_row_chunks(len(image), len(all_text)):
            logits = layout.compute_image_logits(image, all_text, scale, rows)
            image_lse[rows] = logits.logsumexp(1)
            text_lse = torch.logaddexp(text_lse, logits.logsumexp(0))
        text_lse = layout.text_gather.log_sum_exp(text_lse)

        local = layout.text_gather.local_slice
        image_of_text, weights = layout.image_of_text, layout.weights[local]
        pair_logit = scale * layout.compute_positive_cosines(image, text)
        image_margin = image_lse[image_of_text] - pair_logit  # (texts of this rank,)
        text_margin = text_lse[local] - pair_logit

        coef = weights * image_margin.sigmoid()
        a = image.new_zeros(len(image)).index_add(0, image_of_text, coef)
        b = layout.text_gather.gather(weights * text_margin.sigmoid())
        coef = coef + weights * text_margin.sigmoid()
        image_shift, text_shift = _shift_log_sum_exp(image_lse, a), _shift_log_sum_exp(text_lse, b)
        ctx.layout = layout
        ctx.save_for_backward(image, text, scale, all_text, image_shift, text_shift, coef)
        return (weights * (F.softplus(image_margin) + F.softplus(text_margin))).sum() / 2

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        image, text, scale, all_text, image_shift, text_shift, coef = ctx.saved_tensors
        layout: _ImageTextLayout = ctx.layout
        single_process = layout.text_gather.single_process
        grad_image, grad_text = torch.empty_like(image), torch.zeros_like(text)

        # Logits between this rank's images and the texts of all ranks.
        for rows in layout.iterate_row_chunks(len(image), len(all_text)):
            logits = layout.compute_image_logits(image, all_text, scale, rows)
            grad_logits = torch.exp(logits - image_shift[rows, None]).add_(logits.sub_(text_shift).exp_())
            grad_image[rows] = grad_logits @ all_text
            if single_process:
                grad_text.addmm_(grad_logits.T, image[rows])
            _add_positive_pair_gradients(grad_image, grad_text, image, text, coef, layout, rows)

        # Logits between this rank's texts and the images of all ranks.
        if not single_process:
            all_image, all_image_shift = layout.image_gather.gather(image), layout.image_gather.gather(image_shift)
            local_text_shift = text_shift[layout.text_gather.local_slice]
            for rows in layout.iterate_row_chunks(len(text), len(all_image)):
                logits = layout.compute_text_logits(text, all_image, scale, rows)
                grad_logits = torch.exp(logits - local_text_shift[rows, None]).add_(logits.sub_(all_image_shift).exp_())
                grad_text[rows].addmm_(grad_logits, all_image)
        return *_scale_gradients(grad_image, grad_text, image, scale, grad_output / 2), None


class _SigmoidLossFunction(torch.autograd.Function):
    """Pairwise sigmoid loss.

    The loss of a positive pair (a text and its image) is softplus(-logit). The loss of a negative pair is
    softplus(logit). Each term depends on a single pair, so the loss and its gradients are computed together with three
    matmuls.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, layout: _ImageTextLayout) -> Tensor:
        all_text, single_process = layout.text_gather.gather(text), layout.text_gather.single_process
        weights, local_weights = layout.weights, layout.weights[layout.text_gather.local_slice]
        grad_image, grad_text = torch.empty_like(image), torch.zeros_like(text)

        # Positive pairs: the derivative of softplus(-logit) is -sigmoid(-logit).
        pair_logit = scale * layout.compute_positive_cosines(image, text) + bias
        coef = local_weights * (-pair_logit).sigmoid()
        loss, grad_bias = (local_weights * F.softplus(-pair_logit)).sum(), -coef.sum()

        # Negative pairs: the derivative of softplus(logit) is sigmoid(logit).
        for rows in layout.iterate_row_chunks(len(image), len(all_text)):
            logits = layout.compute_image_logits(image, all_text, scale, rows).add_(bias)
            grad_logits = logits.sigmoid().mul_(weights)
            loss += F.softplus(logits).sum(0) @ weights
            grad_bias += grad_logits.sum()
            grad_image[rows] = grad_logits @ all_text
            if single_process:
                grad_text.addmm_(grad_logits.T, image[rows])
            _add_positive_pair_gradients(grad_image, grad_text, image, text, coef, layout, rows)
        if not single_process:
            all_image = layout.image_gather.gather(image)
            for rows in layout.iterate_row_chunks(len(text), len(all_image)):
                logits = layout.compute_text_logits(text, all_image, scale, rows).add_(bias)
                grad_text[rows].addmm_(logits.sigmoid_().mul_(local_weights[rows, None]), all_image)
        ctx.save_for_backward(image, scale)
        ctx.gradients = [grad_image, grad_text, grad_bias]
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        image, scale = ctx.saved_tensors
        if not ctx.gradients:
            raise RuntimeError("sigmoid_loss does not support a second backward(): its saved gradients have been freed")
        grad_image, grad_text, grad_bias = ctx.gradients
        ctx.gradients = None  # scaling the gradients in place makes them unusable for a second backward pass
        return *_scale_gradients(grad_image, grad_text, image, scale, grad_output), grad_bias * grad_output, None


class _ImageTextLayout:
    """Positive image-text pairs on all ranks, with methods that compute logits in chunks of rows.

    Attributes:
        image_gather, text_gather: All-gather for tensors with one row per image or text.
        image_of_text: For each text on this rank, the index of its image among this rank's images, int64.
        all_image_of_text: For each text on all ranks, the index of its image among the images of all ranks, int64.
        weights: Loss weights of the texts on all ranks, float32. A rank's loss is the weighted sum over its own texts.
    """

    def __init__(
        self,
        num_images: int,
        image_of_text: Tensor,
        text_ids: Tensor | None,
        other_texts: Tensor | None,
        gather: bool,
    ) -> None:
        device = image_of_text.device
        self.image_gather = RaggedGather(num_images, device, gather)
        self.text_gather = RaggedGather(len(image_of_text), device, gather)
        self.image_of_text = image_of_text
        self.all_image_of_text = self.text_gather.gather(image_of_text + self.image_gather.offset)
        self.weights = self.text_gather.gather(_compute_text_weights(image_of_text, num_images))
        self.num_images = num_images

        # `group` contains a group number for each text, or is None if all texts are distinct.
        # Identical texts have the same group number. `by_group` lists all text indices, sorted by group number.
        # `group_starts` contains the position in `by_group` of each group's first text.
        self.group: Tensor | None = None
        if text_ids is not None:
            unique_ids, group = self.text_gather.gather(text_ids).unique(return_inverse=True)
            if len(unique_ids) < len(group):
                self.group, self.by_group = group, group.argsort(stable=True)
                self.group_starts = F.pad(torch.bincount(group).cumsum(0), (1, 0))

        # Pairs in `other_texts` whose text is in the batch of all ranks: int64 vectors of image and text indices.
        self.other_pairs: tuple[Tensor, Tensor] | None = None
        if other_texts is not None and text_ids is not None:
            self.other_pairs = self._find_other_pairs(text_ids, other_texts, gather)

    def _find_other_pairs(self, text_ids: Tensor, other_texts: Tensor, gather: bool) -> tuple[Tensor, Tensor]:
        all_ids, by_id = self.text_gather.gather(text_ids).sort()
        other_gather = RaggedGather(len(other_texts), other_texts.device, gather)
        image, text_id = other_gather.gather(other_texts + other_texts.new_tensor([self.image_gather.offset, 0])).T
        first = torch.searchsorted(all_ids, text_id.contiguous())
        counts = torch.searchsorted(all_ids, text_id.contiguous(), right=True) - first
        repeated, sorted_position = _concatenate_ranges(first, counts)
        return image[repeated], by_id[sorted_position]

    def iterate_row_chunks(self, num_rows: int, num_columns: int) -> Iterator[slice]:
        """Yield slices of at least one row and, if possible, at most LOGITS_PER_CHUNK logits."""
        chunk = LOGITS_PER_CHUNK.get(self.image_of_text.device.type, LOGITS_PER_CHUNK["cuda"])
        size = max(1, chunk // max(1, num_columns))
        for start in range(0, num_rows, size):
            yield slice(start, min(start + size, num_rows))

    def get_text_slice(self, images: slice) -> slice:
        """Return the slice of this rank's texts that belong to a slice of this rank's images."""
        if images.stop - images.start == self.num_images:
            return slice(0, len(self.image_of_text))
        return slice(self.text_starts[images.start], self.text_starts[images.stop])

    @cached_property
    def text_starts(self) -> list[int]:
        """Index of each image's first text. Image i has texts text_starts[i] to text_starts[i + 1] - 1.

        Computed on first use, because the computation synchronises with the GPU and is unnecessary with a single chunk.
        """
        images = torch.arange(self.num_images + 1, device=self.image_of_text.device)
        starts: list[int] = torch.searchsorted(self.image_of_text, images).tolist()
        return starts

    def pair_identical_texts(self, texts: slice) -> tuple[Tensor, Tensor]:
        """Pair each text in a slice of this rank's texts with all identical texts on all ranks, including itself.

        Returns:
            Two int64 vectors with one element per pair: the position of the text in the slice, and the index of the
            identical text among the texts of all ranks.
        """
        offset = self.text_gather.offset
        if self.group is None:
            positions = torch.arange(texts.stop - texts.start, device=self.image_of_text.device)
            return positions, positions + texts.start + offset
        groups = self.group[texts.start + offset : texts.stop + offset]
        starts = self.group_starts[groups]
        positions, group_position = _concatenate_ranges(starts, self.group_starts[groups + 1] - starts)
        return positions, self.by_group[group_position]

    def compute_image_logits(self, image: Tensor, all_text: Tensor, scale: Tensor, rows: slice) -> Tensor:
        """Return the logits between a slice of this rank's images and all texts, with -inf for positive pairs."""
        logits = (image[rows] * scale) @ all_text.T  # (rows, texts of all ranks)
        texts = self.get_text_slice(rows)
        positions, equal = self.pair_identical_texts(texts)
        logits[self.image_of_text[texts][positions] - rows.start, equal] = -torch.inf
        if self.other_pairs is not None:
            other_image, other_text = self.other_pairs
            _mask_logits_in_place(logits, other_image - self.image_gather.offset - rows.start, other_text)
        return logits

    def compute_text_logits(self, text: Tensor, all_image: Tensor, scale: Tensor, rows: slice) -> Tensor:
        """Return the logits between a slice of this rank's texts and all images, with -inf for positive pairs."""
        logits = (text[rows] * scale) @ all_image.T  # (rows, images of all ranks)
        positions, equal = self.pair_identical_texts(rows)
        logits[positions, self.all_image_of_text[equal]] = -torch.inf
        if self.other_pairs is not None:
            other_image, other_text = self.other_pairs
            _mask_logits_in_place(logits, other_text - self.text_gather.offset - rows.start, other_image)
        return logits

    def compute_positive_cosines(self, image: Tensor, text: Tensor) -> Tensor:
        return (image[self.image_of_text] * text).sum(1)  # (texts of this rank,)


def _add_positive_pair_gradients(
    grad_image: Tensor,
    grad_text: Tensor,
    image: Tensor,
    text: Tensor,
    coef: Tensor,
    layout: _ImageTextLayout,
    rows: slice,
) -> None:
    """Add the positive pairs' gradients for the images in `rows` in place. d(loss)/d(logit) of each pair is -coef."""
    texts = layout.get_text_slice(rows)
    image_of_text, coef = layout.image_of_text[texts], coef[texts, None]
    grad_image.index_add_(0, image_of_text, text[texts] * coef, alpha=-1)
    grad_text[texts] -= image[image_of_text] * coef


def _scale_gradients(
    grad_image: Tensor, grad_text: Tensor, image: Tensor, scale: Tensor, grad_output: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale the embeddings' gradients in place. Return the gradients of image, text and logit scale."""
    grad_scale = torch.linalg.vecdot(image, grad_image).sum() * grad_output  # logits = scale * cosines
    factor = scale * grad_output
    return grad_image.mul_(factor), grad_text.mul_(factor), grad_scale


def _shift_log_sum_exp(lse: Tensor, coef: Tensor) -> Tensor:
    """Return lse - log(coef), so that exp(logit - result) = coef * exp(logit - lse). The result is inf if coef is 0."""
    return torch.where(coef > 0, lse - coef.log(), torch.inf)


def _compute_text_weights(image_of_text: Tensor, num_images: int) -> Tensor:
    """Return the weight of each text: 1 / (number of images * number of texts of its image)."""
    # Unlike bincount, index_add does not synchronise with the GPU.
    texts_per_image = image_of_text.new_zeros(num_images).index_add_(0, image_of_text, torch.ones_like(image_of_text))
    return 1 / (num_images * texts_per_image[image_of_text]).float()


def _concatenate_ranges(starts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Concatenate the ranges starts[k], ..., starts[k] + counts[k] - 1. Return k and the value of each element."""
    range_of_element = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    first_element = counts.cumsum(0) - counts
    offset = torch.arange(len(range_of_element), device=counts.device) - first_element[range_of_element]
    return range_of_element, starts[range_of_element] + offset


def _mask_logits_in_place(logits: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Set logits[rows[k], columns[k]] to -inf for every k, ignoring out-of-range rows."""
    is_inside = (rows >= 0) & (rows < len(logits))
    logits[rows[is_inside], columns[is_inside]] = -torch.inf


# ---- self-distillation -----------------------------------------------------------------------------------------------


def distillation_loss(student: Tensor, teacher: Tensor, gather: bool = True) -> Tensor:
    """Return the sum of ProCLIP's instance loss and structure loss between embeddings, after L2 normalisation.

    With student embeddings s_i and teacher embeddings t_i of N items:

        instance loss:   mean over i of |s_i - t_i|^2
        structure loss:  mean over pairs i != j of smooth_l1(|s_i - s_j| - |t_i - t_j|)

    The formulas are taken from `train_one_epoch_stage1` and `train_one_epoch_stage2` in training/train.py of
    https://github.com/VisionXLab/ProCLIP. ProCLIP's code sums over items and over the pairs of each rank. This function
    averages over items and over the pairs of all ranks, so that the loss does not grow with the batch size or the
    number of ranks. ProCLIP's second stage compares image embeddings, whereas `align` compares the tower's features
    before the projection, because a new projection has no teacher. Memory use is quadratic in N.

    Args:
        student, teacher: Embeddings of the same N items, of shape (N, D), not necessarily normalised. Only the
            student's embeddings receive gradients.
        gather: Use the pairs of all ranks. All ranks must then call this function. If all ranks have the same number of
            items, the loss and its gradients, averaged over ranks, equal those of a single process with all items.

    Returns:
        The loss as a float32 scalar. With a single item, the structure loss is 0.
    """
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = F.normalize(student.float(), dim=-1), F.normalize(teacher.float(), dim=-1)
        instance = (student - teacher).square().sum(-1).mean()

        ranks = RaggedGather(len(student), student.device, gather)
        all_student, all_teacher = ranks.gather(student, gradients=True), ranks.gather(teacher)
        # Both matrices have the shape (items of this rank, items of all ranks).
        student_distances = _compute_pairwise_distances(student, all_student)
        teacher_distances = _compute_pairwise_distances(teacher, all_teacher)
        # The distance from an item to itself is 0 and does not change the sum.
        total = F.smooth_l1_loss(student_distances, teacher_distances, reduction="sum")
        structure = total / max(1, len(student) * (ranks.total_size - 1))
    return instance + structure


def _compute_pairwise_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the Euclidean distances (N, M) between L2-normalised vectors of shapes (N, D) and (M, D).

    Distances between nearly identical vectors are 0 and have no gradient, because the gradient of the square root at 0
    is infinite.
    """
    squares = 2 - 2 * a @ b.T
    is_distinct = squares > 1e-6  # in float32, the absolute error is about 1e-7
    return torch.where(is_distinct, squares.where(is_distinct, 1.0).sqrt(), 0.0)
