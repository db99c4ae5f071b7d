"""Contrastive losses between images and the texts of a step, exact for any batch and any number of processes.

An image may have several texts, of any number; a text that several images have is no negative of any of them. Each
image weighs the same, and each of its texts the same part of that. Logits are float32 whatever the precision.

The matrix of all logits is never there. It is made strip by strip, some images against all texts, once for the loss
and once more for its gradient, which is written out by hand: memory grows with the batch and not with its square, and
four products of matrices are done where automatic differentiation does six. Among processes the vectors are gathered
without gradients and the sums of exponentials exchanged, after which each process's gradient is its own affair.

Averaged over processes, as DistributedDataParallel does, values and gradients are those of one process with the whole
batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.train.distributed import RaggedGather

CHUNK = {"cpu": 1 << 21, "cuda": 1 << 26}  # logits in a strip: what stays in a CPU's cache; 256 MB


def info_nce(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    owner: Tensor | None = None,
    ids: Tensor | None = None,
    gather: bool = True,
) -> Tensor:
    """Symmetric InfoNCE (CLIP, arXiv 2103.00020), with any number of texts an image.

    Each text of an image must be found by the image among the texts of all other images, the image's other texts being
    no candidates; and each text must find its image among all images. With one text an image this is CLIP's loss.

    Args:
        image: (N, D), L2-normalised.
        text: (M, D), L2-normalised.
        scale: factor on the cosines, 1 / temperature.
        owner: int64 (M,), ascending: the image of each text; every image has one. None: text i is image i's.
        ids: int64 (M,) naming the texts; equal ones are one text. None: all differ.
        gather: take the negatives of all processes, which then must all call this.

    Returns:
        float32 scalar, the mean of both directions over this process's images.
    """
    return _apply(_InfoNCE, image, text, scale, owner, ids, gather)


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    owner: Tensor | None = None,
    ids: Tensor | None = None,
    gather: bool = True,
) -> Tensor:
    """The pairwise sigmoid loss (SigLIP, arXiv 2303.15343): each pair of an image and a text is a question of its own.

    Args:
        bias: added to the logits.
        image, text, scale, owner, ids, gather: as in `info_nce`.

    Returns:
        float32 scalar: the sum over all pairs, each text weighing 1 / (its image's texts), over the number of images.
    """
    return _apply(_Sigmoid, image, text, scale, owner, ids, gather, bias)


def cosine_loss(image: Tensor, text: Tensor, owner: Tensor | None = None) -> Tensor:
    """1 - cosine of each text and its image, and no negatives (LIFT, arXiv 2506.04209).

    The texts' side must stay as it is, or all vectors become one. Arguments as in `info_nce`.
    """
    if owner is None:
        owner = torch.arange(len(text), device=text.device)
    cosines = (image.float()[owner] * text.float()).sum(1)
    return (_weights(owner, len(image)) * (1 - cosines)).sum()


def _apply(
    function: type[torch.autograd.Function],
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    owner: Tensor | None,
    ids: Tensor | None,
    gather: bool,
    *more: Tensor | float,
) -> Tensor:
    numbers = [torch.as_tensor(x, device=image.device, dtype=torch.float32).reshape(()) for x in (scale, *more)]
    if owner is None:
        owner = torch.arange(len(text), device=text.device)
    with torch.autocast(image.device.type, enabled=False):
        between = _Between(len(image), owner, ids, gather)
        return function.apply(image.float(), text.float(), *numbers, between)


def _weights(owner: Tensor, images: int) -> Tensor:
    """Of each text: 1 / (images * texts of its image)."""
    counts = torch.bincount(owner, minlength=images)
    return 1 / (images * counts[owner]).float()


class _Between:
    """Which texts belong to which images, on all processes, and strips of the logits between them."""

    def __init__(self, images: int, owner: Tensor, ids: Tensor | None, gather: bool) -> None:
        device = owner.device
        self.images, self.texts = RaggedGather(images, device, gather), RaggedGather(len(owner), device, gather)
        self.mine = owner
        self.owner = self.texts.all(owner + self.images.first)
        self.weights = self.texts.all(_weights(owner, images))
        self.starts = torch.searchsorted(owner, torch.arange(images + 1, device=device)).tolist()  # of images' texts
        self.names: Tensor | None = None  # a number from 0 of each text, where some are equal
        if ids is not None:
            different, names = self.texts.all(ids).unique(return_inverse=True)
            if len(different) < len(names):
                self.names, self.order = names, names.argsort(stable=True)
                self.first = F.pad(torch.bincount(names).cumsum(0), (1, 0))

    def strips(self, rows: int, columns: int) -> Iterator[slice]:
        """Slices of rows, a strip of logits each."""
        size = max(1, CHUNK.get(self.owner.device.type, CHUNK["cuda"]) // max(1, columns))
        for start in range(0, rows, size):
            yield slice(start, min(start + size, rows))

    def of_images(self, strip: slice) -> slice:
        """This process's texts of a strip of its images."""
        return slice(self.starts[strip.start], self.starts[strip.stop])

    def equals(self, texts: slice) -> tuple[Tensor, Tensor]:
        """For some of this process's texts, counted from the first of them: each, as often as there are texts equal to
        it among all, and where those are."""
        device, first = self.owner.device, self.texts.first
        here = torch.arange(texts.stop - texts.start, device=device)
        if self.names is None:
            return here, here + texts.start + first
        names = self.names[texts.start + first : texts.stop + first]
        counts = self.first[names + 1] - self.first[names]
        which = here.repeat_interleave(counts)
        nth = torch.arange(len(which), device=device) - (counts.cumsum(0) - counts)[which]
        return which, self.order[self.first[names][which] + nth]

    def to_texts(self, image: Tensor, texts: Tensor, scale: Tensor, strip: slice) -> Tensor:
        """Logits of a strip of this process's images against all texts, -inf where the text is the image's."""
        logits = (image[strip] * scale) @ texts.T
        own = self.of_images(strip)
        which, equal = self.equals(own)
        logits[self.mine[own][which] - strip.start, equal] = -torch.inf
        return logits

    def to_images(self, text: Tensor, images: Tensor, scale: Tensor, strip: slice) -> Tensor:
        """Logits of a strip of this process's texts against all images, -inf where the text is the image's."""
        logits = (text[strip] * scale) @ images.T
        which, equal = self.equals(strip)
        logits[which, self.owner[equal]] = -torch.inf
        return logits

    def positives(self, image: Tensor, text: Tensor) -> Tensor:
        """Cosines of this process's texts and their images, (M,)."""
        out = image.new_empty(len(text))
        for strip in self.strips(len(image), text.shape[1]):
            own = self.of_images(strip)
            out[own] = (image[self.mine[own]] * text[own]).sum(1)
        return out


class _InfoNCE(torch.autograd.Function):
    """softplus(n - p) for each text, from its image's side and from its own: p its logit, n the log-sum-exp of the
    negatives' logits there."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, between: _Between) -> Tensor:
        texts = between.texts.all(text)
        of_image, of_text = image.new_empty(len(image)), image.new_full((len(texts),), -torch.inf)
        for strip in between.strips(len(image), len(texts)):
            logits = between.to_texts(image, texts, scale, strip)
            of_image[strip], columns = _log_sums(logits)
            of_text = torch.logaddexp(of_text, columns)
        of_text = between.texts.log_sum_exp(of_text)
        positive = scale * between.positives(image, text)
        owner, own, weights = between.mine, between.texts.own, between.weights[between.texts.own]
        from_image, from_text = of_image[owner] - positive, of_text[own] - positive
        # The derivative by a negative's logit is exp(logit - its image's) + exp(logit - its text's) of these two.
        pulls = weights * from_image.sigmoid()
        by_image = _over(of_image, image.new_zeros(len(image)).index_add(0, owner, pulls))
        by_text = _over(of_text, between.texts.all(weights * from_text.sigmoid()))
        pulls = pulls + weights * from_text.sigmoid()
        ctx.between = between
        ctx.save_for_backward(image, text, scale, texts, by_image, by_text, pulls)
        return (weights * (F.softplus(from_image) + F.softplus(from_text))).sum() / 2

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        image, text, scale, texts, by_image, by_text, pulls = ctx.saved_tensors
        between: _Between = ctx.between
        to_image, to_text = torch.empty_like(image), torch.zeros_like(text)
        alone = between.texts.alone
        for strip in between.strips(len(image), len(texts)):
            logits = between.to_texts(image, texts, scale, strip)
            pull = torch.exp(logits - by_image[strip, None]).add_(logits.sub_(by_text).exp_())
            to_image[strip] = pull @ texts
            if alone:
                to_text.addmm_(pull.T, image[strip])
            _pull_together(to_image, to_text, image, text, pulls, between, strip)
        if not alone:
            images, by_images = between.images.all(image), between.images.all(by_image)
            own = by_text[between.texts.own]
            for strip in between.strips(len(text), len(images)):
                logits = between.to_images(text, images, scale, strip)
                pull = torch.exp(logits - own[strip, None]).add_(logits.sub_(by_images).exp_())
                to_text[strip].addmm_(pull, images)
        return *_scaled(to_image, to_text, image, scale, upstream / 2), None


class _Sigmoid(torch.autograd.Function):
    """softplus(logit) for each pair that is none, softplus(-logit) for each that is one. Nothing has to be known of the
    others, so the gradient is worked out with the value, in one sweep of three products."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, between: _Between) -> Tensor:
        texts, alone = between.texts.all(text), between.texts.alone
        weights, own = between.weights, between.weights[between.texts.own]
        positive = scale * between.positives(image, text) + bias
        pulls = own * (-positive).sigmoid()
        loss, to_bias = (own * F.softplus(-positive)).sum(), -pulls.sum()
        to_image, to_text = torch.empty_like(image), torch.zeros_like(text)
        for strip in between.strips(len(image), len(texts)):
            logits = between.to_texts(image, texts, scale, strip).add_(bias)
            pull = logits.sigmoid().mul_(weights)
            loss += F.softplus(logits).sum(0) @ weights
            to_bias += pull.sum()
            to_image[strip] = pull @ texts
            if alone:
                to_text.addmm_(pull.T, image[strip])
            _pull_together(to_image, to_text, image, text, pulls, between, strip)
        if not alone:
            images = between.images.all(image)
            for strip in between.strips(len(text), len(images)):
                logits = between.to_images(text, images, scale, strip).add_(bias)
                to_text[strip].addmm_(logits.sigmoid_().mul_(own[strip, None]), images)
        ctx.save_for_backward(image, scale)
        ctx.gradients = [to_image, to_text, to_bias]
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        image, scale = ctx.saved_tensors
        if not ctx.gradients:
            raise RuntimeError("sigmoid_loss goes backward once: its gradients were given away")
        to_bias, to_text, to_image = (ctx.gradients.pop() for _ in range(3))
        return *_scaled(to_image, to_text, image, scale, upstream), to_bias * upstream, None


def _pull_together(
    to_image: Tensor, to_text: Tensor, image: Tensor, text: Tensor, pulls: Tensor, between: _Between, strip: slice
) -> None:
    """The part of the gradients that is of a strip of images and their own texts."""
    own = between.of_images(strip)
    owner, pull = between.mine[own], pulls[own, None]
    to_image.index_add_(0, owner, text[own] * pull, alpha=-1)
    to_text[own] -= image[owner] * pull


def _scaled(
    to_image: Tensor, to_text: Tensor, image: Tensor, scale: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the images, the texts and the scale, in place from those of logits that are the cosines alone."""
    to_scale = torch.linalg.vecdot(image, to_image).sum() * upstream  # logits are scale * cosines
    factor = scale * upstream
    return to_image.mul_(factor), to_text.mul_(factor), to_scale


def _over(log_sum: Tensor, pulls: Tensor) -> Tensor:
    """log_sum - log(pulls), so that exp(logit - this) is pulls * softmax; infinite where nothing pulls."""
    return torch.where(pulls > 0, log_sum - pulls.log(), torch.inf)


def _log_sums(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the rows and of the columns."""
    return logits.logsumexp(1), logits.logsumexp(0)
