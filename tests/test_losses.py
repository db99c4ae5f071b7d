"""The losses against their definitions in float64, against open_clip, and over several ranks."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import open_clip.loss
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import run_distributed
from llm2clip.train import losses
from llm2clip.train.losses import LOSSES, distillation_loss, info_nce, matryoshka_loss, sigmoid_loss

SCALE, BIAS = 14.3, -3.0
# Images 0 and 2 share a text, images 3 and 4 have a single text, which is the same, and image 1 has a text twice.
IMAGE_OF_TEXT = [0, 0, 0, 1, 1, 2, 2, 3, 4, 5, 5]
TEXT_IDS = [1, 2, 3, 4, 4, 3, 5, 6, 6, 7, 8]
LAYOUTS = [
    (IMAGE_OF_TEXT, TEXT_IDS),
    (IMAGE_OF_TEXT, list(range(11))),
    (list(range(6)), [0, 1, 0, 2, 2, 2]),
    (list(range(5)), [7] * 5),
]
# Pairs of an image and a text that it also has: texts of other images, its own text, and a text that no image has.
OTHER_TEXTS = [[0, 4], [0, 6], [1, 1], [1, 4], [2, 99], [3, 0]]


# ---- definitions of the losses ---------------------------------------------------------------------------------------


def info_nce_reference(image: Tensor, text: Tensor, scale: Any, *layout: Tensor | None) -> Tensor:
    """Compute `info_nce` text by text: a cross-entropy over the text's own logit and its negatives, per direction."""
    logits, total = scale * image @ text.T, image.new_zeros(())
    for n, own, weight, other_texts, other_images in list_negatives(len(image), *layout):
        for candidates in (logits[own, [n, *other_texts]], logits[[own, *other_images], n]):
            total = total + weight / 2 * (candidates.logsumexp(0) - logits[own, n])
    return total


def sigmoid_reference(image: Tensor, text: Tensor, scale: Any, bias: Any, *layout: Tensor | None) -> Tensor:
    """Compute `sigmoid_loss` text by text: a binary classification of the pairs with its own and all other images."""
    logits, total = scale * image @ text.T + bias, image.new_zeros(())
    for n, own, weight, _, other_images in list_negatives(len(image), *layout):
        total = total - weight * (F.logsigmoid(logits[own, n]) + F.logsigmoid(-logits[other_images, n]).sum())
    return total


def list_negatives(
    images: int, image_of_text: Tensor, text_ids: Tensor, other_texts: Tensor | None = None
) -> Iterator[tuple[int, int, float, list[int], list[int]]]:
    """Yield each text, its image, its weight, the texts that its image does not have, and the images without it."""
    owners, ids = image_of_text.tolist(), text_ids.tolist()
    ids_of_image = [{id_ for id_, owner in zip(ids, owners, strict=True) if owner == i} for i in range(images)]
    for i, id_ in [] if other_texts is None else other_texts.tolist():
        ids_of_image[i].add(id_)
    for n, (id_, own) in enumerate(zip(ids, owners, strict=True)):
        negative_texts = [k for k, other in enumerate(ids) if other not in ids_of_image[own]]
        negative_images = [i for i in range(images) if id_ not in ids_of_image[i]]
        yield n, own, 1 / (images * owners.count(own)), negative_texts, negative_images


REFERENCES: dict[str, Any] = {"infonce": info_nce_reference, "sigmoid": sigmoid_reference}

# ---- tests -----------------------------------------------------------------------------------------------------------


def random_embeddings(images: int, texts: int, dim: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(images, dim, generator=generator), torch.randn(texts, dim, generator=generator)
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


def value_and_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Return the value and the gradients by all inputs, in float64."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    gradients = torch.autograd.grad(3 * value, leaves)  # 3: the gradient of the output must be passed on
    return [value.detach().double(), *(gradient.double() / 3 for gradient in gradients)]


def as_double(*inputs: Tensor) -> list[Tensor]:
    return [x.double() for x in inputs]


@pytest.fixture(params=[5, 1 << 20])
def chunk_size(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a single row, and one chunk for all rows."""
    monkeypatch.setitem(losses.LOGITS_PER_CHUNK, "cpu", request.param)


@pytest.mark.usefixtures("chunk_size")
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("image_of_text", "text_ids"), LAYOUTS)
@pytest.mark.parametrize("scale", [1.0, SCALE, 100.0])
@pytest.mark.parametrize("other_texts", [None, OTHER_TEXTS], ids=["", "other_texts"])
def test_loss_matches_its_reference(
    other_texts: list[list[int]] | None, scale: float, image_of_text: list[int], text_ids: list[int], name: str
) -> None:
    image, text = random_embeddings(image_of_text[-1] + 1, len(image_of_text))
    layout = torch.tensor(image_of_text), torch.tensor(text_ids), other_texts and torch.tensor(other_texts)
    inputs = [image, text, torch.tensor(scale), torch.tensor(BIAS)][: 4 if LOSSES[name].needs_bias else 3]
    actual = value_and_gradients(lambda *args: LOSSES[name].function(*args, *layout), *inputs)
    expected = value_and_gradients(lambda *args: REFERENCES[name](*args, *layout), *as_double(*inputs))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6 * max(1, scale), rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_matryoshka_loss_is_the_mean_over_truncated_embeddings(name: str) -> None:
    """The first 3, 5 and all 8 dimensions, divided by their norm, in float64."""
    image, text = random_embeddings(6, 11)
    layout = torch.tensor(IMAGE_OF_TEXT), torch.tensor(TEXT_IDS), torch.tensor(OTHER_TEXTS)
    scalars = torch.tensor(SCALE), torch.tensor(BIAS)

    def reference(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        scalars = (scale, bias) if LOSSES[name].needs_bias else (scale,)
        total = image.new_zeros(())
        for dim in (3, 5, 8):
            i, t = image[:, :dim], text[:, :dim]
            if dim < 8:
                i, t = (x / x.square().sum(1, keepdim=True).sqrt() for x in (i, t))
            total = total + REFERENCES[name](i, t, *scalars, *layout) / 3
        return total + 0 * bias

    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return matryoshka_loss(LOSSES[name], (3, 5), image, text, scale, bias, *layout) + 0 * bias

    actual = value_and_gradients(loss, image, text, *scalars)
    expected = value_and_gradients(reference, *as_double(image, text, *scalars))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=3e-5, rtol=1e-5)
    full = matryoshka_loss(LOSSES[name], (), image, text, *scalars, *layout)
    assert torch.equal(full, LOSSES[name](image, text, *scalars, *layout))


@pytest.mark.usefixtures("chunk_size")
def test_losses_match_open_clip_for_one_text_per_image() -> None:
    image, text = random_embeddings(12, 12, 16)
    scale, bias = torch.tensor(SCALE), torch.tensor(BIAS)
    clip_loss: Any = open_clip.loss.ClipLoss()
    siglip_loss: Any = open_clip.loss.SigLipLoss()
    actual = value_and_gradients(info_nce, image, text, scale)
    expected = value_and_gradients(clip_loss, image, text, scale)
    actual += value_and_gradients(sigmoid_loss, image, text, scale, bias)
    expected += value_and_gradients(siglip_loss, image, text, scale, bias)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_losses_match_the_closed_form_for_two_orthogonal_pairs() -> None:
    """At scale 1 each softmax row is log(1 + e^-1), and each sigmoid pair is log(1 + e^-1) or log 2."""
    eye = torch.eye(2)
    assert info_nce(eye, eye, 1.0).item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert sigmoid_loss(eye, eye, 1.0, 0.0).item() == pytest.approx(math.log(1 + math.exp(-1)) + math.log(2))


def test_info_nce_is_finite_and_exact_at_extreme_logits() -> None:
    """At scale 100, a text can be 200 logits below the others: float32 would lose the exponentials of its column."""
    image = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 1e-3], [0.9, -0.1], [-1.0, 0.0]]), dim=-1)
    text = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.01], [1.0, 0.1]]), dim=-1)
    inputs, index = [image, text, torch.tensor(100.0)], torch.arange(4)
    actual = value_and_gradients(info_nce, *inputs)
    expected = value_and_gradients(lambda i, t, s: info_nce_reference(i, t, s, index, index), *as_double(*inputs))
    for a, b in zip(actual, expected, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_losses_use_float32_logits_under_autocast() -> None:
    image, text = random_embeddings(64, 64, 32)
    index = torch.arange(64)
    expected = info_nce_reference(*as_double(image, text), 100.0, index, index).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(image, text, 100.0)
        assert sigmoid_loss(image, text, 100.0, -10.0).dtype == torch.float32
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_convert_16_bit_embeddings_to_float32(dtype: torch.dtype) -> None:
    image, text = (x.to(dtype) for x in random_embeddings(6, 6))
    for loss in LOSSES.values():
        value = loss(image, text, torch.tensor(SCALE), torch.tensor(BIAS))
        expected = loss(image.float(), text.float(), torch.tensor(SCALE), torch.tensor(BIAS))
        assert value.dtype == torch.float32 and torch.equal(value, expected)


def test_sigmoid_loss_rejects_a_second_backward() -> None:
    image, text = (x.requires_grad_() for x in random_embeddings(4, 4))
    loss = sigmoid_loss(image, text, 10.0, 0.0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_losses_use_memory_linear_in_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor has more than a tenth of the elements of the matrix of logits."""
    monkeypatch.setitem(losses.LOGITS_PER_CHUNK, "cpu", 1 << 12)
    largest = 0

    class LargestTensor(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, Tensor) else 0)
            return out

    image, text = (x.requires_grad_() for x in random_embeddings(512, 512))
    with LargestTensor():
        for loss in LOSSES.values():
            loss(image, text, torch.tensor(10.0), torch.tensor(0.0), torch.arange(512), None, None).backward()
    assert largest <= 512 * 512 / 10


def test_losses_on_four_ranks_match_one_process(tmp_path: Path) -> None:
    """Averaged over ranks as DDP does, with ragged numbers of texts, duplicates across ranks and other texts."""
    run_distributed(4, _save_gradients, str(tmp_path))
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(4)]
    for name, expected in _gradients(slice(0, 8)).items():
        actual = torch.stack([part[name] for part in parts]).mean(0)
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def _gradients(images: slice) -> dict[str, Tensor]:
    """Return losses of a slice of eight images, and gradients by a weight behind the embeddings and by the scalars."""
    image_of_text = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 5, 6, 7])
    text_ids = torch.tensor([1, 2, 3, 4, 5, 1, 6, 7, 8, 3, 9, 10])
    image, text = random_embeddings(8, 12)
    texts = (image_of_text >= images.start) & (image_of_text < images.stop)
    other_texts = torch.tensor([[0, 6], [0, 8], [2, 2], [5, 2], [5, 9], [7, 1]])
    other_texts = other_texts[(other_texts[:, 0] >= images.start) & (other_texts[:, 0] < images.stop)]
    layout = image_of_text[texts] - images.start, text_ids[texts], other_texts - torch.tensor([images.start, 0])
    results: dict[str, Tensor] = {}
    losses: dict[str, Any] = {**LOSSES, "matryoshka": partial(matryoshka_loss, LOSSES["infonce"], (3, 5))}
    for name, loss_function in losses.items():
        weight, scalars = torch.eye(8).requires_grad_(), torch.tensor([10.0, -2.0]).requires_grad_()
        i, t = F.normalize(image[images] @ weight, dim=-1), F.normalize(text[texts] @ weight.T, dim=-1)
        loss = loss_function(i, t, scalars[0], scalars[1], *layout)
        loss.backward()
        assert weight.grad is not None and scalars.grad is not None
        results |= {f"{name} weight": weight.grad, f"{name} loss": loss.detach(), f"{name} scalars": scalars.grad}
    return results


def _save_gradients(folder: str) -> None:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.save(_gradients(slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)), f"{folder}/{rank}.pt")


# ---- distillation ----------------------------------------------------------------------------------------------------


def random_pair(items: int, dim: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, items, dim, generator=generator)
    return student, teacher


def distillation_reference(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the loss from a list of all pairs, as ProCLIP's code does, but with means instead of sums."""
    student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    pairs = F.smooth_l1_loss(F.pdist(student), F.pdist(teacher))
    return (student - teacher).square().sum(1).mean() + pairs


def distill_with_gradient(function: object, student: Tensor, teacher: Tensor) -> list[Tensor]:
    student = student.clone().requires_grad_()
    value = function(student, teacher)  # type: ignore[operator]
    return [value.detach().double(), *(x.double() for x in torch.autograd.grad(value, [student]))]


def test_distillation_loss_matches_the_reference() -> None:
    student, teacher = random_pair(9)
    student[:4] *= torch.tensor([0.1, 3, 20, 1])[:, None]  # lengths have no effect
    expected = distill_with_gradient(distillation_reference, student.double(), teacher.double())
    torch.testing.assert_close(
        distill_with_gradient(distillation_loss, student, teacher), expected, atol=1e-6, rtol=1e-5
    )


def test_distillation_loss_by_hand() -> None:
    """Two items: the student's are orthogonal, the teacher's are opposite, and the first is in the same place."""
    student, teacher = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[1.0, 0], [-1, 0]])
    instance = (0 + 2) / 2
    structure = 0.5 * (2**0.5 - 2) ** 2
    assert abs(distillation_loss(student, teacher).item() - (instance + structure)) < 1e-6
    assert distillation_loss(student, 3 * student).item() == 0
    assert distillation_loss(student[:1], teacher[:1]).item() == 0


def test_distillation_gradient_of_duplicates_is_finite() -> None:
    """An image that cannot be decoded is replaced with a duplicate of another image."""
    student, teacher = random_pair(6)
    student[5], teacher[5] = student[2], teacher[2]
    _, gradient = distill_with_gradient(distillation_loss, student, teacher)
    _, expected = distill_with_gradient(distillation_reference, student.double(), teacher.double())
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


def test_distillation_loss_on_two_ranks_matches_a_single_process() -> None:
    run_distributed(2, _compare_distillation_on_rank)


def _compare_distillation_on_rank() -> None:
    student, teacher = random_pair(10)
    mine = slice(dist.get_rank(), None, 2)
    value, gradient = distill_with_gradient(distillation_loss, student[mine], teacher[mine])
    dist.all_reduce(value)
    expected, expected_gradient = distill_with_gradient(distillation_reference, student.double(), teacher.double())
    torch.testing.assert_close(value / 2, expected, atol=1e-6, rtol=1e-5)
    # Ranks average their gradients, so a rank's gradient is twice the gradient of the mean loss.
    torch.testing.assert_close(gradient / 2, expected_gradient[mine], atol=1e-6, rtol=1e-5)
