"""Zero-shot accuracy and compositional accuracy, compared with sorting and worked examples."""

import pytest
import torch
import torch.nn.functional as F

from llm2clip.data.image_refs import FileImage
from llm2clip.evaluate.benchmarks.base import CompositionalExample
from llm2clip.evaluate.classification import (
    compute_classification_accuracy,
    compute_compositional_accuracy,
    encode_class_names,
)
from llm2clip.evaluate.metrics import bootstrap_intervals


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


class FakeEmbeddings:
    """Returns fixed text embeddings, whose norms must not matter."""

    vectors = random(6, 5) * torch.arange(1, 7)[:, None]

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        assert texts == ["a dog.", "the dog!", "dog dog", "a big cat.", "the big cat!", "big cat big cat"]
        return self.vectors


def test_class_embedding_is_the_mean_of_its_prompts() -> None:
    classes = encode_class_names(FakeEmbeddings(), ["dog", "big cat"], ["a {}.", "the {}!", "{} {}"])  # type: ignore[arg-type]
    for n in range(2):
        vectors = [vector.double() / vector.double().norm() for vector in FakeEmbeddings.vectors[3 * n : 3 * n + 3]]
        mean = sum(vectors) / 3
        torch.testing.assert_close(classes[n].double(), mean / mean.norm(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("chunk_size", [7, 4096])
def test_classification_accuracy_matches_sorting(chunk_size: int) -> None:
    images, classes = random(60, 5, seed=1), random(9, 5, seed=2)
    used = (0, 1, 2, 4, 5, 6, 7)
    labels = [used[n % 7] if n else 7 for n in range(60)]  # classes of different size, and two without images
    scores = images.double() @ classes.double().T
    order = scores.argsort(descending=True)
    hits = {k: [labels[i] in order[i, :k] for i in range(60)] for k in (1, 5)}
    result = compute_classification_accuracy(images, labels, classes, range(60), chunk_size)
    accuracy = result.values
    assert accuracy["top-1"] == pytest.approx(100 * sum(hits[1]) / 60)
    assert accuracy["top-5"] == pytest.approx(100 * sum(hits[5]) / 60)
    class_hits = [[hit for hit, c in zip(hits[1], labels, strict=True) if c == label] for label in used]
    assert accuracy["mean per class"] == pytest.approx(100 * sum(sum(h) / len(h) for h in class_hits) / 7)
    low, high = (
        bootstrap_intervals(torch.tensor(hits[1], dtype=torch.float64)[:, None], torch.ones(60))
        .flatten()
        .mul(100)
        .tolist()
    )
    assert result.intervals["top-1"] == pytest.approx((low, high))


def test_classification_accuracy_ranks_the_first_of_equal_classes_first() -> None:
    classes = random(3, 4)
    classes[2] = classes[0]
    accuracy = compute_classification_accuracy(classes, [0, 1, 2], classes, range(3))
    assert accuracy.values["top-1"] == pytest.approx(200 / 3)


def test_compositional_accuracy_of_sugarcrepe_is_averaged_over_kinds() -> None:
    ref = FileImage("/x/a")
    texts = {"good": torch.tensor([0.9]), "bad": torch.tensor([0.1]), "same": torch.tensor([0.9])}
    pairs = [
        ("add_att", "good", "bad"),
        ("add_att", "bad", "good"),
        ("swap_obj", "good", "bad"),
        ("add_att", "good", "same"),
    ]
    examples = [CompositionalExample(kind, ref, *captions) for kind, *captions in pairs]
    accuracy = compute_compositional_accuracy(examples, {ref.key: torch.tensor([1.0])}, texts)
    assert accuracy == pytest.approx({"add_att": 100 / 3, "swap_obj": 100.0, "mean": 200 / 3})
