"""Caption retrieval accuracy against its definition, and the text encoders of others that it measures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from conftest import save_tokenizer
from llm2clip.cli import main
from llm2clip.evaluate.caption_retrieval import caption_retrieval_accuracy, mean_cosines, worst_mistakes
from llm2clip.evaluate.recall import bootstrap
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.clip_text_encoder import has_text_tower, load_clip_text_encoder


class Fake:
    """Vectors made up for each text; those of texts that end in the same word are near."""

    def __init__(self, dims: int = 5) -> None:
        self.dims = dims

    def vector(self, text: str) -> torch.Tensor:
        def drawn(seed: str) -> torch.Tensor:
            g = torch.Generator().manual_seed(sum(ord(c) * 31**n for n, c in enumerate(seed)) % 2**31)
            return torch.randn(self.dims, generator=g)

        return drawn(text.split()[-1]) + 0.7 * drawn(text)

    def encode(self, captions: Sequence[str], *, progress: bool = False) -> torch.Tensor:
        return torch.stack([self.vector(c) for c in captions])

    def count_truncated(self, captions: Sequence[str]) -> int:
        return sum(len(c) > 20 for c in captions)


RAGGED = [[f"caption {j} of {i}" for j in range(2 + i % 4)] for i in range(30)] + [["alone"]]


def test_cra_by_hand(llm: Path) -> None:
    """Against the definition, with a ragged list and an image of one caption left out."""
    encoder = CaptionEncoder.from_pretrained(llm, device="cpu")
    images = [
        ("a dog", "a dog", "the dog!"),
        ("only one", "only one"),
        ("two cats", "cats, two", "x"),
        ("a house", "homes"),
    ]
    figures = caption_retrieval_accuracy(images, encoder, progress=False)
    assert (figures["images"], figures["excluded"]) == (3, 1)
    first = F.normalize(encoder.encode(["a dog", "two cats", "a house"]).double(), dim=-1)
    second = F.normalize(encoder.encode(["the dog!", "cats, two", "homes"]).double(), dim=-1)
    scores, own = first @ second.T, torch.arange(3)
    forth, back = ((s.argmax(1) == own).double().mean().item() for s in (scores, scores.T))
    assert figures["CRA"] == pytest.approx(50 * (forth + back))
    assert figures["first to second"]["R@1"] == pytest.approx(100 * forth)


def test_all_pairs_by_hand() -> None:
    """Each caption among all others, itself left out; ragged; a text that stands with two images."""
    images = [*RAGGED, ["caption 0 of 3", "another"]]
    figures = caption_retrieval_accuracy(images, Fake(), all_pairs=True)
    flat = [(i, c) for i, captions in enumerate(images) if len(captions) > 1 for c in captions]
    vectors = F.normalize(torch.stack([Fake().vector(c) for _, c in flat]).double(), dim=-1)
    hits = []
    for q, (image, _) in enumerate(flat):
        scores = vectors @ vectors[q]
        right = [j for j, (i, _) in enumerate(flat) if i == image and j != q]
        wrong = [j for j, (i, _) in enumerate(flat) if i != image]
        best = scores[right].max() - 1e-9  # a tie with a wrong answer is a miss
        hits.append(int((scores[wrong] >= best).sum()))
    assert figures["captions"] == len(flat)
    for k in (1, 5, 10):
        share = 100 * sum(h < k for h in hits) / len(hits)
        assert figures["all pairs"][f"R@{k}"] == pytest.approx(share)
    others = [len(captions) - 1 for captions in images for _ in captions if len(captions) > 1]
    assert figures["all pairs chance"]["R@1"] == pytest.approx(100 * sum(others) / len(others) / (len(flat) - 1))


def test_mean_cosines_are_those_of_all_pairs() -> None:
    first, second = (F.normalize(torch.randn(9, 4), dim=-1) for _ in range(2))
    scores = first.double() @ second.double().T
    same, others = mean_cosines(first, second)
    assert same == pytest.approx(scores.diagonal().mean().item())
    assert others == pytest.approx(scores[~torch.eye(9, dtype=torch.bool)].mean().item())


@pytest.mark.parametrize("tile", [2, 4096])
def test_the_worst_mistakes_come_first(tile: int) -> None:
    first, second = (
        F.normalize(torch.randn(12, 3, generator=torch.Generator().manual_seed(s)), dim=-1) for s in (0, 1)
    )
    captions = [[f"a{i}", f"b{i}"] for i in range(12)]
    scores = first @ second.T
    margins = {}
    for i in range(12):
        found = max((j for j in range(12) if j != i), key=lambda j: scores[i, j].item())
        if scores[i, found] >= scores[i, i]:
            margins[i] = (scores[i, found] - scores[i, i]).item(), found
    expected = sorted(margins, key=lambda i: -margins[i][0])
    mistakes = worst_mistakes(first, second, captions, 100, tile)
    assert [m["caption"] for m in mistakes] == [f"a{i}" for i in expected]
    assert [m["found"] for m in mistakes] == [f"b{margins[i][1]}" for i in expected]
    assert [m["right cosine"] for m in mistakes] == pytest.approx([float(scores[i, i]) for i in expected])
    assert [m["found cosine"] for m in mistakes] == pytest.approx([float(scores[i, margins[i][1]]) for i in expected])
    assert all(m["right"] == "b" + m["caption"][1:] for m in mistakes)
    assert worst_mistakes(first, second, captions, 2, tile) == mistakes[:2]


# ---- the text towers of others --------------------------------------------------------------------------------------


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
    tokenizer = AutoTokenizer.from_pretrained(folder)  # a CLIP's text is the state of its end token
    end = [("<|end|>", 0)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|end|>", special_tokens=end)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_clips_text_tower(kind: str, tmp_path: Path) -> None:
    """The same vectors as one text at a time, and as many cut as are beyond the window."""
    from transformers import AutoModel, AutoTokenizer

    folder = str(make_clip(tmp_path / kind, kind))
    assert has_text_tower(folder)
    tower = load_clip_text_encoder(folder, torch.device("cpu"))
    texts = ["a dog", "two cats", "a text of more than the twenty-four tokens that there is room for"]
    vectors = tower.encode(texts)
    assert tower.count_truncated(texts) == 1 and vectors.shape == (3, 16)
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for text, vector in zip(texts, vectors, strict=True):
        padding = {"padding": "max_length"} if kind == "siglip" else {}
        ids = tokenizer(text, truncation=True, max_length=24, return_tensors="pt", **padding)["input_ids"]
        with torch.no_grad():
            found = model.get_text_features(input_ids=ids)
        found = found if isinstance(found, torch.Tensor) else found.pooler_output
        assert torch.allclose(found[0], vector, atol=1e-5)


def test_open_clips_text_tower(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    model = open_clip.create_model("ViT-S-32-alt").eval()
    config = {"model_cfg": open_clip.get_model_config("ViT-S-32-alt"), "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    tower = load_clip_text_encoder(f"open_clip:{tmp_path}", torch.device("cpu"))
    texts = ["a dog", "word " * 100]
    vectors = tower.encode(texts)
    assert tower.count_truncated(texts) == 1
    tokens = open_clip.get_tokenizer("ViT-S-32-alt")(texts)
    with torch.no_grad():
        assert torch.allclose(model.encode_text(tokens), vectors, atol=1e-5)
    with pytest.raises(ValueError, match="names no weights"):
        load_clip_text_encoder("open_clip:ViT-S-32-alt")


def test_images_of_one_caption_each_cannot_be_told_apart() -> None:
    with pytest.raises(ValueError, match="needs images with two captions"):
        caption_retrieval_accuracy([["a"], ["b", "b"]], Fake())


def test_of_equal_mistakes_the_first_image_comes_first_and_a_tie_is_one() -> None:
    first = torch.tensor([[1.0, 0.0]] * 40)
    mistakes = worst_mistakes(first, first, [[f"a{i}", f"b{i}"] for i in range(40)], 3)
    assert [(m["caption"], m["found"]) for m in mistakes] == [("a0", "b1"), ("a1", "b0"), ("a2", "b0")]


def test_llms_and_sentence_encoders_are_no_clips(llm: Path, tmp_path: Path) -> None:
    assert not has_text_tower(str(llm))
    CaptionEncoder.from_pretrained(llm, device="cpu").save_pretrained(tmp_path / "st")
    assert not has_text_tower(str(tmp_path / "st"))
    assert not has_text_tower(str(tmp_path / "nothing"))


def test_the_command_prints_the_table_and_the_mistakes(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_clip(tmp_path / "clip", "clip")
    command = ["evaluate", "--captions", str(pictures / "captions.jsonl"), "--encoder.path", str(folder)]
    assert main([*command, "--all_pairs", "--mistakes", "2"]) == 0
    said = capsys.readouterr().out
    assert main([*command, "--encoder.layers", "1"]) == 1
    assert "leave out --encoder.layers" in capsys.readouterr().err
    for words in ("CRA, %", "first to second", "all pairs", "Mean cosine", "should have found", "Cut to the encoder's"):
        assert words in said, words


def test_all_that_caption_accuracy_says_is_of_the_same_hits() -> None:
    figures = caption_retrieval_accuracy(RAGGED, Fake(), return_hits=True, num_mistakes=2)
    first, second = (F.normalize(torch.stack([Fake().vector(c[n]) for c in RAGGED[:-1]]), dim=-1) for n in (0, 1))
    scores = first @ second.T
    there, again = (s.argmax(1) == torch.arange(30) for s in (scores, scores.T))
    assert figures["hits"] == ((there.double() + again) / 2).tolist()
    assert {0.0, 0.5, 1.0} == set(figures["hits"]), "else nothing was asked"
    low, high = figures["CRA interval"]
    by_image = torch.tensor(figures["hits"], dtype=torch.float64)[:, None]
    assert (low, high) == pytest.approx((100 * bootstrap(by_image, torch.ones(30))).flatten().tolist())
    assert figures["CRA"] == pytest.approx(100 * sum(figures["hits"]) / 30) and low <= figures["CRA"] <= high <= 100
    assert (figures["first to second"]["R@1"], figures["second to first"]["R@1"]) == pytest.approx(
        (100 * float(there.double().mean()), 100 * float(again.double().mean()))
    )
    assert (figures["positive cosine"], figures["negative cosine"]) == mean_cosines(first, second)
    assert figures["chance"] == pytest.approx(100 / 30) and figures["excluded"] == 1
    assert figures["truncated"] == sum(len(c) > 20 for some in RAGGED[:-1] for c in some[:2])
    assert figures["mistakes"] == worst_mistakes(first, second, RAGGED[:-1], 2)
    assert not {"hits", "mistakes", "all pairs"} & caption_retrieval_accuracy(RAGGED, Fake()).keys()
