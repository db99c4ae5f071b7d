"""The distillation losses against ProCLIP's formulas in float64, and on several ranks."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from conftest import run_distributed
from llm2clip.train.losses import distillation_loss


def random_pair(items: int, dim: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, items, dim, generator=generator)
    return student, teacher


def reference(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the loss from a list of all pairs, as ProCLIP's code does, but with means instead of sums."""
    student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    pairs = F.smooth_l1_loss(F.pdist(student), F.pdist(teacher))
    return (student - teacher).square().sum(1).mean() + pairs


def value_and_gradient(function: object, student: Tensor, teacher: Tensor) -> list[Tensor]:
    student = student.clone().requires_grad_()
    value = function(student, teacher)  # type: ignore[operator]
    return [value.detach().double(), *(x.double() for x in torch.autograd.grad(value, [student]))]


def test_distillation_loss_matches_the_reference() -> None:
    student, teacher = random_pair(9)
    student[:4] *= torch.tensor([0.1, 3, 20, 1])[:, None]  # lengths have no effect
    expected = value_and_gradient(reference, student.double(), teacher.double())
    torch.testing.assert_close(value_and_gradient(distillation_loss, student, teacher), expected, atol=1e-6, rtol=1e-5)


def test_distillation_loss_by_hand() -> None:
    """Two items: the student's are orthogonal, the teacher's are opposite, and the first is in the same place."""
    student, teacher = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[1.0, 0], [-1, 0]])
    instance = (0 + 2) / 2
    structure = 0.5 * (2**0.5 - 2) ** 2
    assert abs(distillation_loss(student, teacher).item() - (instance + structure)) < 1e-6
    assert distillation_loss(student, 3 * student).item() == 0
    assert distillation_loss(student[:1], teacher[:1]).item() == 0


def test_gradient_of_duplicates_is_finite() -> None:
    """An image that cannot be decoded is replaced with a duplicate of another image."""
    student, teacher = random_pair(6)
    student[5], teacher[5] = student[2], teacher[2]
    _, gradient = value_and_gradient(distillation_loss, student, teacher)
    _, expected = value_and_gradient(reference, student.double(), teacher.double())
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


def test_two_ranks_match_a_single_process() -> None:
    run_distributed(2, _compare_on_rank)


def _compare_on_rank() -> None:
    student, teacher = random_pair(10)
    mine = slice(dist.get_rank(), None, 2)
    value, gradient = value_and_gradient(distillation_loss, student[mine], teacher[mine])
    dist.all_reduce(value)
    expected, expected_gradient = value_and_gradient(reference, student.double(), teacher.double())
    torch.testing.assert_close(value / 2, expected, atol=1e-6, rtol=1e-5)
    # Ranks average their gradients, so a rank's gradient is twice the gradient of the mean loss.
    torch.testing.assert_close(gradient / 2, expected_gradient[mine], atol=1e-6, rtol=1e-5)
