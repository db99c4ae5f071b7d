"""benchmarks/reproduce.py on generated images and random models, and verdicts of small cases computed by hand."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

import reproduce
import reproduce_claims
from conftest import make_llm, make_tower
from llm2clip.runs.output_folder import ConfigChangedError
from reproduce_claims import (
    CONTRADICTED,
    HOLDS,
    INCONCLUSIVE,
    PARTLY_HOLDS,
    WEAK_SUPPORT,
    Claim,
    Comparison,
    bootstrap_interval,
    compare_hits,
)
from reproduce_data import ReproduceConfig, join_halves, read_wordnet
from shared import split_sentences

WORDNET_ENTRIES = (  # one with two words and two examples, one without an example
    '00001740 03 n 02 entity 0 thing_of(a) 0 001 ~ 00001930 n 0000 | that which is; "one"; "a second one"\n'
    "00001930 03 n 01 physical_entity 0 000 | an entity that has existence\n"
)


@pytest.fixture
def config(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ReproduceConfig:
    """Settings for images with captions, random models and few steps."""
    for name, layers, seed in (("llm", 3, 0), ("baseline", 1, 1), ("multilingual", 4, 2)):
        make_llm(tmp_path / name, layers=layers, seed=seed)
    make_tower(tmp_path / "tower")
    small = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    monkeypatch.setattr("reproduce_data.FOREIGN_COLUMN", "captions_xx")
    monkeypatch.setattr(reproduce_claims, "CLIPTextConfig", partial(transformers.CLIPTextConfig, **small))
    train, held_out = ["captions.jsonl@train"], ["captions.jsonl@val"]
    return ReproduceConfig(
        tune=train, exclude=held_out, cra=held_out, train=train, test=held_out, long_captions=held_out,
        llm=str(tmp_path / "llm"), layers=2, baseline_encoder=str(tmp_path / "baseline"),
        multilingual_llm=str(tmp_path / "multilingual"), tower=str(tmp_path / "tower"), image_size=32, embed_dim=8,
        steps=2, batch_size=4, epochs=2, seeds=1, cost_images=4, cost_steps=2,
    )  # fmt: skip


def test_reproduce_tests_claims_and_caches_results(
    config: ReproduceConfig, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    report = reproduce.test_claims(image_folder, out, config, [1, 3, 4, 5, 6])
    claims = {int(file.stem): json.loads(file.read_text()) for file in (out / "claims").iterdir()}
    assert sorted(claims) == [1, 3, 4, 5, 6]
    assert [row[0] for row in claims[1]["rows"]] == [
        "llm, first 2 layers, raw",
        "baseline",
        "llm, first 2 layers after 2 steps of captions",
        "multilingual, raw",
        "multilingual after 2 steps of captions",
        "chance",
    ]
    assert "6. With cached teacher embeddings" in report and "the same gain, whole caption" in report

    ranks = json.loads((out / "ranks/llm-cc-0-captions.json").read_text())
    assert len(ranks["image_ranks"]) == 6 and len(ranks["text_ranks"]) == 15  # two or three captions per image
    _, i2t, t2i, *_ = claims[5]["rows"][0]
    assert i2t == pytest.approx(100 * ranks["image_ranks"].count(0) / 6)
    assert t2i == pytest.approx(100 * ranks["text_ranks"].count(0) / 15)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("this result should have been cached")

    for name in ("tune", "embed", "align", "caption_retrieval_accuracy"):
        monkeypatch.setattr(f"reproduce_data.{name}", fail)
    assert reproduce.test_claims(image_folder, out, config, [1, 6]) == report
    with pytest.raises(ConfigChangedError, match=r"different settings \(reproduce.steps: 2 saved, 3 now\)"):
        reproduce.test_claims(image_folder, out, dataclasses.replace(config, steps=3), [1])


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
    for part_of_speech in ("noun", "verb", "adj", "adv"):
        text = licence + (WORDNET_ENTRIES if part_of_speech == "noun" else "")
        (tmp_path / f"data.{part_of_speech}").write_text(text)
    pairs = list(read_wordnet(tmp_path))
    assert [(pair.anchor, pair.positive) for pair in pairs] == [
        ("entity, thing of", "that which is"),
        ("one", "entity: that which is"),
        ("physical entity", "an entity that has existence"),
    ]
