"""`reproduce` on generated images and random models, and verdicts of small cases computed by hand."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from scipy.stats import binomtest

from conftest import make_llm, make_tower
from llm2clip.cli import main
from llm2clip.tools.reproduce.claims import (
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
from llm2clip.tools.reproduce.datasets import join_halves, read_wordnet, split_sentences


def reproduce_command(data: Path, models: Path, out: Path, *more: str) -> list[str]:
    """Return the arguments of `llm2clip reproduce` with tiny settings."""
    train, held_out = '["captions.jsonl@train"]', '["captions.jsonl@val"]'
    settings = {
        "tune": train, "exclude": held_out, "text_pairs": '["pairs.jsonl"]', "cra": held_out, "train": train,
        "test": held_out, "long_caption_sources": held_out, "foreign_column": "captions_xx",
        "llm": str(models / "llm"), "layers": "2", "baseline_encoder": str(models / "baseline"),
        "multilingual_llm": str(models / "multilingual"), "tower": str(models / "tower"), "image_size": "32",
        "embed_dim": "8", "steps": "2", "batch_size": "4", "epochs": "2", "seeds": "2", "cost_images": "4",
        "cost_steps": "2",
    }  # fmt: skip
    options = [part for name, value in settings.items() for part in (f"--reproduce.{name}", value)]
    return ["reproduce", str(data), "--out", str(out), *options, *more]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of random language models and a random vision tower."""
    folder = tmp_path_factory.mktemp("models")
    for name, layers, seed in (("llm", 3, 0), ("baseline", 1, 1), ("multilingual", 4, 2)):
        make_llm(folder / name, layers=layers, seed=seed)
    make_tower(folder / "tower")
    return folder


@pytest.fixture(scope="module")
def data(image_folder: Path) -> Path:
    """Images with captions, and general text pairs."""
    pairs = [{"query": f"word {n}", "positive": f"what the word {n} means"} for n in range(8)]
    (image_folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return image_folder


def test_reproduce_tests_all_claims_and_caches_results(
    data: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(reproduce_command(data, models, out)) == 0
    claims = {int(file.stem): json.loads(file.read_text()) for file in (out / "claims").iterdir()}
    assert sorted(claims) == [1, 2, 3, 4, 5, 6]
    assert [row[0] for row in claims[2]["rows"]] == [
        "llm, first 2 layers, raw",
        "llm, first 2 layers after 2 steps of captions",
        "multilingual, raw",
        "baseline",
        "multilingual after 2 steps of general text pairs",
        "multilingual after 2 steps of captions",
    ]
    assert claims[3]["points"] == ["1 sentence", "whole caption"]

    # The table has the mean recall of both seeds.
    ranks = [json.loads((out / f"ranks/llm-cc-{seed}-captions.json").read_text()) for seed in range(2)]
    image_ranks, text_ranks = ([rank for seed in ranks for rank in seed[f"{name}_ranks"]] for name in ("image", "text"))
    assert len(image_ranks) == 2 * 6 and len(text_ranks) == 2 * 15  # two or three captions per image
    _, i2t, t2i, *_ = claims[2]["rows"][1]
    assert i2t == pytest.approx(100 * image_ranks.count(0) / len(image_ranks))
    assert t2i == pytest.approx(100 * text_ranks.count(0) / len(text_ranks))

    page = (out / "report.html").read_text()
    assert "<script" not in page and "<svg" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert "6. With cached teacher embeddings" in (out / "report.md").read_text()

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("this result should have been cached")

    for name in ("tune", "embed", "align", "caption_retrieval_accuracy"):
        monkeypatch.setattr(f"llm2clip.tools.reproduce.experiments.{name}", fail)
    capsys.readouterr()
    assert main(reproduce_command(data, models, out)) == 0
    assert "claim 6:" in capsys.readouterr().out
    assert main(reproduce_command(data, models, out, "--reproduce.steps", "3")) == 1
    assert "different settings (reproduce.steps: 2 saved, 3 now)" in capsys.readouterr().err


def test_reproduce_reports_claims_without_data_as_not_tested(
    data: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing_column = ("--reproduce.foreign_column", "captions_yy")
    command = reproduce_command(data, models, tmp_path / "run", *missing_column, "--claims")
    assert main([*command, "4"]) == 1
    assert "no claim could be tested: 4: " in capsys.readouterr().err
    assert main([*command, "1", "4"]) == 0
    assert "claim 4: not tested (" in capsys.readouterr().out
    report = (tmp_path / "run/report.md").read_text()
    assert "| not tested |" in report and "captions_yy" in report
    assert main([*command, "7"]) == 1
    assert "unknown claim 7: available claims are 1, 2" in capsys.readouterr().err


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


def test_bootstrap_interval_of_equal_values_is_exact() -> None:
    low, high = binomtest(100, 100).proportion_ci(method="exact")
    assert bootstrap_interval(torch.zeros(2, 100)) == pytest.approx((0, 0, 100 * (1 - low)))
    assert bootstrap_interval(torch.ones(2, 100)) == pytest.approx((100, 100 * low, 100 * high))
    assert bootstrap_interval(-torch.ones(2, 100)) == pytest.approx((-100, -100, -100 + 200 * (1 - low)))


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
