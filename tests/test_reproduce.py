"""benchmarks/reproduce.py on generated images and random models, and verdicts of small cases computed by hand."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

import reproduce
from conftest import make_llm, make_tower
from llm2clip.data.skip_log import SkipLog
from llm2clip.published_results import CRA_NOTE
from llm2clip.runs.output_folder import ConfigChangedError
from reproduce_claims import (
    CONTRADICTED,
    HOLDS,
    INCONCLUSIVE,
    NOT_TESTED,
    PARTLY_HOLDS,
    WEAK_SUPPORT,
    Claim,
    Comparison,
    bootstrap_interval,
    compare_hits,
)
from reproduce_data import ClaimData, ReproduceConfig, join_halves, read_wordnet, split_sentences


@pytest.fixture
def command(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of the script: images with captions, random models and tiny settings."""
    pairs = [{"query": f"word {n}", "positive": f"what the word {n} means"} for n in range(8)]
    (image_folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for name, layers, seed in (("llm", 3, 0), ("baseline", 1, 1), ("multilingual", 4, 2)):
        make_llm(tmp_path / name, layers=layers, seed=seed)
    make_tower(tmp_path / "tower")
    small = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    monkeypatch.setattr(transformers, "CLIPTextConfig", partial(transformers.CLIPTextConfig, **small))
    train, held_out = '["captions.jsonl@train"]', '["captions.jsonl@val"]'
    settings = {
        "tune": train, "exclude": held_out, "text_pairs": '["pairs.jsonl"]', "cra": held_out, "train": train,
        "test": held_out, "long_caption_sources": held_out, "foreign_column": "captions_yy",
        "llm": tmp_path / "llm", "layers": 2, "baseline_encoder": tmp_path / "baseline",
        "multilingual_llm": tmp_path / "multilingual", "tower": tmp_path / "tower", "image_size": 32,
        "embed_dim": 8, "steps": 2, "batch_size": 4, "epochs": 2, "seeds": 1, "cost_images": 4, "cost_steps": 2,
    }  # fmt: skip
    options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return [str(image_folder), "--out", str(tmp_path / "run"), *options]


def test_reproduce_tests_claims_and_caches_results(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    reproduce.main([*command, "--claims", "1", "4", "5", "6"])
    assert "claim 4: not tested (" in capsys.readouterr().out
    claims = {int(file.stem): json.loads(file.read_text()) for file in (out / "claims").iterdir()}
    assert sorted(claims) == [1, 5, 6]  # no source has the column of claim 4
    assert [row[0] for row in claims[1]["rows"]] == [
        "llm, first 2 layers, raw",
        "baseline",
        "llm, first 2 layers after 2 steps of captions",
        "multilingual, raw",
        "multilingual after 2 steps of captions",
        "chance",
    ]

    ranks = json.loads((out / "ranks/llm-cc-0-captions.json").read_text())
    assert len(ranks["image_ranks"]) == 6 and len(ranks["text_ranks"]) == 15  # two or three captions per image
    _, i2t, t2i, *_ = claims[5]["rows"][0]
    assert i2t == pytest.approx(100 * ranks["image_ranks"].count(0) / 6)
    assert t2i == pytest.approx(100 * ranks["text_ranks"].count(0) / 15)

    page = (out / "report.html").read_text()
    assert "<script" not in page and "<svg" in page and "http://" not in page.replace("http://www.w3.org", "")
    report = (out / "report.md").read_text()
    assert "6. With cached teacher embeddings" in report and "| not tested |" in report and "captions_yy" in report

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("this result should have been cached")

    for name in ("tune", "embed", "align", "caption_retrieval_accuracy"):
        monkeypatch.setattr(f"reproduce_data.{name}", fail)
    reproduce.main([*command, "--claims", "1", "6"])
    assert "claim 6:" in capsys.readouterr().out
    with pytest.raises(ConfigChangedError, match=r"different settings \(reproduce.steps: 2 saved, 3 now\)"):
        reproduce.main([*command, "--steps", "3"])
    with pytest.raises(ValueError, match="no claim could be tested: 4: "):
        reproduce.main([*command, "--out", str(tmp_path / "other"), "--claims", "4"])
    with pytest.raises(SystemExit, match="unknown claim 7: available claims are 1, 2"):
        reproduce.main([*command, "--claims", "7"])


def test_long_caption_tests_add_a_sentence_at_a_time(image_folder: Path) -> None:
    config = ReproduceConfig(long_caption_sources=["captions.jsonl@val"])
    tests = ClaimData(image_folder, config, SkipLog(None, 0.0)).long_caption_tests
    assert list(tests) == ["1 sentence", "whole caption"]
    for sentence, caption in zip(tests["1 sentence"], tests["whole caption"], strict=True):
        assert caption.captions[0].startswith(sentence.captions[0]) and len(caption.captions) == 1


def hits(count: int, start: int = 0) -> torch.Tensor:
    """Return the hits of one seed on 200 images, of which `count` are correct."""
    values = torch.zeros(1, 200, dtype=torch.float64)
    values[:, start : start + count] = 1
    return values


def compare(low: torch.Tensor, high: torch.Tensor) -> Comparison:
    return compare_hits("a", "b", "R@1", low, high)


def test_comparison_verdicts() -> None:
    assert compare(hits(20), hits(100)).verdict == HOLDS
    assert compare(hits(100), hits(20)).verdict == CONTRADICTED
    assert compare(hits(50), hits(60)).verdict == WEAK_SUPPORT  # the same images and ten more
    assert compare(hits(50), hits(60, start=100)).verdict == INCONCLUSIVE  # different images
    assert compare(hits(0), hits(1)).verdict == INCONCLUSIVE  # by the rule of three
    assert compare(hits(0), hits(12)).verdict == HOLDS


def test_claim_verdict_combines_comparisons() -> None:
    holds, contradicted = compare(hits(20), hits(100)), compare(hits(100), hits(20))
    weak, inconclusive = compare(hits(50), hits(60)), compare(hits(50), hits(60, start=100))
    for comparisons, verdict in (
        ([], NOT_TESTED),
        ([holds], HOLDS),
        ([weak], WEAK_SUPPORT),
        ([inconclusive], INCONCLUSIVE),
        ([contradicted], CONTRADICTED),
        ([holds, contradicted], PARTLY_HOLDS),
        ([holds, weak], PARTLY_HOLDS),
        ([weak, inconclusive], INCONCLUSIVE),
        ([weak, contradicted], CONTRADICTED),
    ):
        claim = Claim(1, comparisons=comparisons)
        assert claim.verdict == verdict
        restored = Claim.from_dict(json.loads(json.dumps(dataclasses.asdict(claim))))
        assert restored.verdict == verdict


def test_bootstrap_interval_matches_the_binomial_and_widens_with_seed_variance() -> None:
    values = hits(50)
    half_width = 196 * (0.25 * 0.75 / 200) ** 0.5
    assert bootstrap_interval(values) == pytest.approx((25, 25 - half_width, 25 + half_width), abs=0.8)
    assert bootstrap_interval(values.repeat(3, 1)) == pytest.approx(bootstrap_interval(values), abs=1e-9)
    mean, low, high = bootstrap_interval(torch.cat([hits(0), hits(50), hits(100)]))
    assert mean == 25 and high - low > 1.5 * 2 * half_width


def test_split_in_two_and_split_sentences() -> None:
    assert join_halves(("a", "b", "c", "d", "e")) == ("a b", "c d e")
    assert join_halves(("a", "b", "c")) == ()
    assert split_sentences("A room. It has 2 chairs! Is it red?") == ["A room.", "It has 2 chairs!", "Is it red?"]


def test_read_wordnet_yields_definitions_and_examples(tmp_path: Path) -> None:
    licence = "  1 This software and database is being provided to you\n"
    entries = (  # one with two words and two examples, one without an example
        '00001740 03 n 02 entity 0 thing_of(a) 0 001 ~ 00001930 n 0000 | that which is; "one"; "a second one"\n'
        "00001930 03 n 01 physical_entity 0 000 | an entity that has existence\n"
    )
    for part_of_speech in ("noun", "verb", "adj", "adv"):
        text = licence + (entries if part_of_speech == "noun" else "")
        (tmp_path / f"data.{part_of_speech}").write_text(text)
    pairs = list(read_wordnet(tmp_path))
    assert [(pair.anchor, pair.positive) for pair in pairs] == [
        ("entity, thing of", "that which is"),
        ("one", "entity: that which is"),
        ("physical entity", "an entity that has existence"),
    ]


@pytest.mark.parametrize(
    ("claim", "sentence", "text"),
    [
        (1, 0, "Llama3-8B-CC 29.5"),
        (1, 0, "24.3 points for Llama3-8B"),
        (1, 1, CRA_NOTE),
        (2, 0, "e5 (XLM-R) 74.0 / 71.7"),
        (2, 1, "Llama3-8B 66.3"),
        (3, 0, "COCO +3.3"),  # by hand: (62.7 + 51.9) / 2 - (59.4 + 48.6) / 2
        (3, 0, "DOCCI +15.7"),
        (4, 0, "EVA-L-224 0.9, EVA-L-224 + LLM2CLIP 75.6"),
        (4, 1, "JinaCLIP 0.7"),
        (5, 0, "Qwen2.5-0.5B-CC 75.6 / 73.0"),
        (5, 1, "Mistral-Nemo-12B-CC 86.0"),
        (6, 0, "once, before training"),
    ],
)
def test_quote_paper_states_published_results(claim: int, sentence: int, text: str) -> None:
    assert text in reproduce.quote_paper(claim)[sentence]
