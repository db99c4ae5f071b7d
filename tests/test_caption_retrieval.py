"""Caption retrieval accuracy compared with its definition, and the text towers of other models."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conftest import save_tokenizer
from llm2clip.cli import main
from llm2clip.evaluate.caption_retrieval import (
    caption_retrieval_accuracy,
    compute_mean_cosine_similarities,
    find_worst_retrieval_mistakes,
)
from llm2clip.evaluate.metrics import bootstrap_intervals
from llm2clip.models.clip_models import has_text_tower, load_clip_text_encoder
from llm2clip.models.text.caption_encoder import CaptionEncoder


class RandomEncoder:
    """Random embeddings of texts; texts with the same last word are near each other."""

    def __init__(self, dims: int = 5) -> None:
        self.dims = dims

    def vector(self, text: str) -> torch.Tensor:
        def draw(seed: str) -> torch.Tensor:
            g = torch.Generator().manual_seed(sum(ord(c) * 31**n for n, c in enumerate(seed)) % 2**31)
            return torch.randn(self.dims, generator=g)

        return draw(text.split()[-1]) + 0.7 * draw(text)

    def encode(self, captions: Sequence[str], *, progress: bool = False) -> torch.Tensor:
        return torch.stack([self.vector(c) for c in captions])

    def count_truncated_texts(self, captions: Sequence[str]) -> int:
        return sum(len(c) > 20 for c in captions)


# Images with two to five captions, and one image with a single caption.
IMAGES = [[f"caption {j} of {i}" for j in range(2 + i % 4)] for i in range(30)] + [["alone"]]


def test_mean_cosines_match_the_full_matrix() -> None:
    first, second = (F.normalize(torch.randn(9, 4), dim=-1) for _ in range(2))
    scores = first.double() @ second.double().T
    positive, negative = compute_mean_cosine_similarities(first, second)
    assert positive == pytest.approx(scores.diagonal().mean().item())
    assert negative == pytest.approx(scores[~torch.eye(9, dtype=torch.bool)].mean().item())


@pytest.mark.parametrize("chunk_size", [2, 4096])
def test_worst_mistakes_are_ordered_by_margin(chunk_size: int) -> None:
    first, second = (
        F.normalize(torch.randn(12, 3, generator=torch.Generator().manual_seed(s)), dim=-1) for s in (0, 1)
    )
    captions = [[f"a{i}", f"b{i}"] for i in range(12)]
    scores = first @ second.T
    margins = {}
    for i in range(12):
        best = max((j for j in range(12) if j != i), key=lambda j: scores[i, j].item())
        if scores[i, best] >= scores[i, i]:
            margins[i] = (scores[i, best] - scores[i, i]).item(), best
    expected = sorted(margins, key=lambda i: -margins[i][0])
    mistakes = find_worst_retrieval_mistakes(first, second, captions, 100, chunk_size)
    assert [m["caption"] for m in mistakes] == [f"a{i}" for i in expected]
    assert [m["retrieved"] for m in mistakes] == [f"b{margins[i][1]}" for i in expected]
    assert [m["correct cosine"] for m in mistakes] == pytest.approx([float(scores[i, i]) for i in expected])
    assert [m["retrieved cosine"] for m in mistakes] == pytest.approx(
        [float(scores[i, margins[i][1]]) for i in expected]
    )
    assert all(m["correct"] == "b" + m["caption"][1:] for m in mistakes)
    assert find_worst_retrieval_mistakes(first, second, captions, 2, chunk_size) == mistakes[:2]


def test_worst_mistakes_count_ties_and_keep_the_order_of_equal_margins() -> None:
    first = torch.tensor([[1.0, 0.0]] * 40)
    mistakes = find_worst_retrieval_mistakes(first, first, [[f"a{i}", f"b{i}"] for i in range(40)], 3)
    assert [(m["caption"], m["retrieved"]) for m in mistakes] == [("a0", "b1"), ("a1", "b0"), ("a2", "b0")]


def test_cra_metrics_are_consistent_with_each_other() -> None:
    metrics = caption_retrieval_accuracy(IMAGES, RandomEncoder(), return_hits=True, num_mistakes=2)
    first, second = (
        F.normalize(torch.stack([RandomEncoder().vector(captions[n]) for captions in IMAGES[:-1]]), dim=-1)
        for n in (0, 1)
    )
    scores = first @ second.T
    first_hits, second_hits = (s.argmax(1) == torch.arange(30) for s in (scores, scores.T))
    assert metrics["hits"] == ((first_hits.double() + second_hits) / 2).tolist()
    assert {0.0, 0.5, 1.0} == set(metrics["hits"]), "the example must have all three cases"
    low, high = metrics["CRA interval"]
    hits = torch.tensor(metrics["hits"], dtype=torch.float64)[:, None]
    assert (low, high) == pytest.approx((100 * bootstrap_intervals(hits, torch.ones(30))).flatten().tolist())
    assert metrics["CRA"] == pytest.approx(100 * sum(metrics["hits"]) / 30) and low <= metrics["CRA"] <= high <= 100
    assert (metrics["first to second"]["R@1"], metrics["second to first"]["R@1"]) == pytest.approx(
        (100 * float(first_hits.double().mean()), 100 * float(second_hits.double().mean()))
    )
    assert (metrics["positive cosine"], metrics["negative cosine"]) == compute_mean_cosine_similarities(first, second)
    assert metrics["chance"] == pytest.approx(100 / 30) and metrics["excluded"] == 1
    assert metrics["truncated"] == sum(len(c) > 20 for captions in IMAGES[:-1] for c in captions[:2])
    assert metrics["mistakes"] == find_worst_retrieval_mistakes(first, second, IMAGES[:-1], 2)
    assert not {"hits", "mistakes"} & caption_retrieval_accuracy(IMAGES, RandomEncoder()).keys()
    with pytest.raises(ValueError, match="two distinct captions"):
        caption_retrieval_accuracy([["a dog", "a dog"], ["alone"]], RandomEncoder())


# ---- text towers of other models -------------------------------------------------------------------------------------


def make_clip(folder: Path, kind: str) -> Path:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    torch.manual_seed(0)
    text = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 24, "eos_token_id": 0, "bos_token_id": 1,
            "pad_token_id": 0, "projection_size": 16}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16}  # fmt: skip
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, projection_dim=16)
    AutoModel.from_config(config).save_pretrained(folder)
    save_tokenizer(folder, chat_template=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)  # CLIP's text feature is the state of the end token
    end = [("<|end|>", 0)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|end|>", special_tokens=end)
    tokenizer.save_pretrained(folder)
    return folder


def test_has_text_tower_is_false_for_llms_and_sentence_encoders(llm: Path, tmp_path: Path) -> None:
    assert not has_text_tower(str(llm))
    CaptionEncoder.from_pretrained(llm, device="cpu").save_pretrained(tmp_path / "st")
    assert not has_text_tower(str(tmp_path / "st"))
    with pytest.raises(FileNotFoundError, match="neither an existing path nor a hub id"):
        has_text_tower(str(tmp_path / "nothing"))


def test_open_clip_text_encoder_needs_weights() -> None:
    pytest.importorskip("open_clip", reason="open_clip is not installed")
    with pytest.raises(ValueError, match="weights"):
        load_clip_text_encoder("open_clip:ViT-S-32-alt")


def test_evaluate_captions_command_prints_metrics_and_mistakes(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_clip(tmp_path / "clip", "clip")
    command = ["evaluate", "--captions", str(image_folder / "captions.jsonl"), "--encoder.path", str(folder)]
    assert main(command) == 0
    output = capsys.readouterr().out
    for words in ("CRA, %", "first to second", "mean cosine similarity", "retrieved", "Captions truncated"):
        assert words in output, words
    assert main([*command, "--encoder.layers", "1"]) == 1
    assert "remove --encoder.layers" in capsys.readouterr().err
