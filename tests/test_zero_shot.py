"""Zero-shot accuracy, the probe and compositional scores against naive loops and cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from llm2clip.data.image_refs import FileImage
from llm2clip.evaluate.benchmarks.base import ClassificationData, CompositionalExample
from llm2clip.evaluate.compositional import compositional_accuracy
from llm2clip.evaluate.zero_shot import class_embeddings, class_prompts, classification_accuracy, linear_probe


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_a_class_is_the_mean_of_its_prompts() -> None:
    classes = ClassificationData([], [], ["dog", "big cat"], ["a {}.", "the {}!", "{} {}"])
    assert class_prompts(classes) == ["a dog.", "the dog!", "dog dog", "a big cat.", "the big cat!", "big cat big cat"]
    texts = random(6, 5) * torch.arange(1, 7)[:, None]  # a long vector weighs no more than a short one
    found = class_embeddings(texts, 2)
    for n in range(2):
        mean = sum(texts[3 * n + t].double() / texts[3 * n + t].double().norm() for t in range(3)) / 3
        torch.testing.assert_close(found[n].double(), mean / mean.norm(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("tile", [7, 4096])
def test_accuracy_against_sorting(tile: int) -> None:
    images, vectors = random(60, 5, seed=1), random(9, 5, seed=2)
    used = (0, 1, 2, 4, 5, 6, 7)
    labels = [used[n % 7] if n else 7 for n in range(60)]  # unequal classes, and two without images
    scores = images.double() @ vectors.double().T
    order = scores.argsort(descending=True)
    hits = {k: [labels[i] in order[i, :k] for i in range(60)] for k in (1, 5)}
    found = classification_accuracy(images, labels, vectors, tile)
    assert found["top-1"] == pytest.approx(100 * sum(hits[1]) / 60)
    assert found["top-5"] == pytest.approx(100 * sum(hits[5]) / 60)
    shares = [[h for h, c in zip(hits[1], labels, strict=True) if c == label] for label in used]
    assert found["mean per class"] == pytest.approx(100 * sum(sum(s) / len(s) for s in shares) / 7)


def test_of_two_classes_of_one_name_the_first_is_found() -> None:
    vectors = random(3, 4)
    vectors[2] = vectors[0]
    assert classification_accuracy(vectors, [0, 1, 2], vectors)["top-1"] == pytest.approx(200 / 3)


def test_the_probe_finds_what_a_line_parts() -> None:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    x = torch.randn(300, 6, generator=g) + 4 * F.one_hot(labels, 6)
    found = linear_probe(x[:240], labels[:240].tolist(), x[240:], labels[240:].tolist())
    assert found["top-1"] > 90 and math.log10(found["C"]) in range(-3, 5)
    noise = linear_probe(x[:240], labels[:240].tolist(), torch.randn(60, 6, generator=g), labels[240:].tolist())
    assert noise["top-1"] < 70


def test_the_probe_takes_the_penalty_that_does_best_on_what_it_holds_back() -> None:
    """Classes of different sizes and small numbers: a strong penalty calls all of them the larger one."""
    g = torch.Generator().manual_seed(0)
    labels = (torch.arange(400) % 3 == 0).long()
    x = 0.05 * (torch.randn(400, 4, generator=g) + 4 * labels[:, None])
    found = linear_probe(x[:300], labels[:300].tolist(), x[300:], labels[300:].tolist())
    assert found["top-1"] > 95 and found["C"] >= 1
    labels = torch.arange(500) % 2  # a weak signal in much noise, which a weak penalty learns by heart
    x = torch.randn(500, 100, generator=g)
    x[:, 0] += 1.5 * labels
    assert linear_probe(x[:100], labels[:100].tolist(), x[100:], labels[100:].tolist())["C"] < 1


def test_winogrounds_three_scores() -> None:
    """Cosines with the captions, image by image; a tie is wrong."""
    cases = {  # (c0, c1) of image 0, of image 1: text, image, group
        "all": (((0.9, 0.1), (0.2, 0.8)), (True, True, True)),
        "text": (((0.9, 0.8), (0.1, 0.2)), (True, False, False)),
        "image": (((0.2, 0.8), (0.1, 0.9)), (False, True, False)),
        "tie": (((0.5, 0.5), (0.2, 0.8)), (False, True, False)),
    }
    items, image, text, sums = [], {}, {}, [0, 0, 0]
    for n, (name, (rows, right)) in enumerate(cases.items()):
        refs = (FileImage(f"/x/{name}0"), FileImage(f"/x/{name}1"))
        captions = (f"{name} 0", f"{name} 1")
        for i in range(2):
            image[refs[i].key] = torch.cat([torch.zeros(2 * n), torch.tensor(rows[i]), torch.zeros(6 - 2 * n)])
            text[captions[i]] = F.one_hot(torch.tensor(2 * n + i), 8).float()
        items.append(CompositionalExample(name, "winoground", refs, captions))
        sums = [a + b for a, b in zip(sums, right, strict=True)]
    assert compositional_accuracy(items, image, text) == {
        k: 25.0 * s for k, s in zip(("text", "image", "group"), sums, strict=True)
    }


def test_sugarcrepe_is_averaged_over_its_files() -> None:
    ref = FileImage("/x/a")
    text = {"good": torch.tensor([0.9]), "bad": torch.tensor([0.1]), "same": torch.tensor([0.9])}
    pairs = [
        ("add_att", "good", "bad"),
        ("add_att", "bad", "good"),
        ("swap_obj", "good", "bad"),
        ("add_att", "good", "same"),
    ]
    items = [CompositionalExample(str(n), kind, (ref,), (a, b)) for n, (kind, a, b) in enumerate(pairs)]
    found = compositional_accuracy(items, {ref.key: torch.tensor([1.0])}, text)
    assert found == pytest.approx({"add_att": 100 / 3, "swap_obj": 100.0, "mean": 200 / 3})


def test_a_probe_on_few_images() -> None:
    """Five classes of three: a fifth of them cannot hold one of each."""
    vectors = random(15, 4)
    found = linear_probe(vectors, [n % 5 for n in range(15)], vectors, [n % 5 for n in range(15)])
    assert 0 <= found["top-1"] <= 100
