"""Zero-shot accuracy, linear probes and compositional accuracy, compared with sorting and worked examples."""

import math

import pytest
import torch
import torch.nn.functional as F

from llm2clip.data.image_refs import FileImage
from llm2clip.evaluate.benchmarks.base import CompositionalExample
from llm2clip.evaluate.classification import (
    classification_accuracy,
    compute_compositional_accuracy,
    encode_classes,
    fit_linear_probe,
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
    classes = encode_classes(FakeEmbeddings(), ["dog", "big cat"], ["a {}.", "the {}!", "{} {}"])  # type: ignore[arg-type]
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
    result = classification_accuracy(images, labels, classes, range(60), chunk_size)
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
    assert classification_accuracy(classes, [0, 1, 2], classes, range(3)).values["top-1"] == pytest.approx(200 / 3)


def test_linear_probe_chooses_regularisation_on_validation_images() -> None:
    """With small values and unequal classes, strong regularisation predicts only the larger class."""
    g = torch.Generator().manual_seed(0)
    labels = (torch.arange(400) % 3 == 0).long()
    x = 0.05 * (torch.randn(400, 4, generator=g) + 4 * labels[:, None])
    probe = fit_linear_probe(x[:300], labels[:300].tolist(), x[300:], labels[300:].tolist())
    assert probe["top-1"] > 95 and probe["C"] >= 1 and math.log10(probe["C"]) in range(5)
    labels = torch.arange(500) % 2  # a weak signal in noise, which weak regularisation overfits
    x = torch.randn(500, 100, generator=g)
    x[:, 0] += 1.5 * labels
    assert fit_linear_probe(x[:100], labels[:100].tolist(), x[100:], labels[100:].tolist())["C"] < 1


def test_linear_probe_on_few_images() -> None:
    """Five classes of three images: the validation part cannot have one image of each class."""
    images, labels = random(15, 4), [n % 5 for n in range(15)]
    assert 0 <= fit_linear_probe(images, labels, images, labels)["top-1"] <= 100


def test_compositional_accuracy_of_winoground() -> None:
    """Text, image and group scores of given similarity matrices; a tie is wrong."""
    cases = {  # similarities of image 0 and of image 1 with both captions; expected text, image and group
        "all": (((0.9, 0.1), (0.2, 0.8)), (True, True, True)),
        "text": (((0.9, 0.8), (0.1, 0.2)), (True, False, False)),
        "image": (((0.2, 0.8), (0.1, 0.9)), (False, True, False)),
        "tie": (((0.5, 0.5), (0.2, 0.8)), (False, True, False)),
    }
    examples, images, texts, hits = [], {}, {}, [0, 0, 0]
    for n, (name, (scores, expected)) in enumerate(cases.items()):
        refs = (FileImage(f"/x/{name}0"), FileImage(f"/x/{name}1"))
        captions = (f"{name} 0", f"{name} 1")
        for i in range(2):
            images[refs[i].key] = torch.cat([torch.zeros(2 * n), torch.tensor(scores[i]), torch.zeros(6 - 2 * n)])
            texts[captions[i]] = F.one_hot(torch.tensor(2 * n + i), 8).float()
        examples.append(CompositionalExample(name, "winoground", refs, captions))
        hits = [a + b for a, b in zip(hits, expected, strict=True)]
    assert compute_compositional_accuracy(examples, images, texts) == {
        name: 25.0 * count for name, count in zip(("text", "image", "group"), hits, strict=True)
    }


def test_compositional_accuracy_of_sugarcrepe_is_averaged_over_kinds() -> None:
    ref = FileImage("/x/a")
    texts = {"good": torch.tensor([0.9]), "bad": torch.tensor([0.1]), "same": torch.tensor([0.9])}
    pairs = [
        ("add_att", "good", "bad"),
        ("add_att", "bad", "good"),
        ("swap_obj", "good", "bad"),
        ("add_att", "good", "same"),
    ]
    examples = [CompositionalExample(str(n), kind, (ref,), (a, b)) for n, (kind, a, b) in enumerate(pairs)]
    accuracy = compute_compositional_accuracy(examples, {ref.key: torch.tensor([1.0])}, texts)
    assert accuracy == pytest.approx({"add_att": 100 / 3, "swap_obj": 100.0, "mean": 200 / 3})
