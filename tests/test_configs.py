"""The recipes in the repository are read by the command, overrides act on them, and they can be planned."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import yaml

from llm2clip.cli import build
from llm2clip.config import AlignConfig, FitConfig, LlavaConfig, ReproduceConfig
from llm2clip.run_config import save_or_check_config
from llm2clip.tools.plan.devices import Machine
from llm2clip.tools.plan.plan import plan_fit

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(config for config in FOLDER.glob("*.yaml") if not config.name.startswith("llava-"))
LLMS = {"llama-3-8b", "llama-3.1-8b", "llama-3.2-1b", "mistral-nemo-12b", "qwen2.5-0.5b"}
TOWERS = [config for config in RECIPES if config.name.startswith("tower-")]


def read(*recipes: Path, more: tuple[str, ...] = ()) -> FitConfig:
    parser, _ = build()
    files = [word for config in recipes for word in ("--config", str(config))]
    given = parser.instantiate(parser.parse_args(["fit", "a.jsonl", "--out", "r", *files, *more])).fit
    return FitConfig(**{field.name: given[field.name] for field in dataclasses.fields(FitConfig)})


@pytest.mark.parametrize("config", RECIPES, ids=lambda p: p.stem)
def test_recipes_parse(config: Path) -> None:
    parser, _ = build()
    given = parser.parse_args(["fit", "a.jsonl", "--out", "r", "--config", str(config), "--align.epochs", "7"]).fit
    assert given.align.epochs == 7
    assert given.data == ["a.jsonl"]
    assert config in TOWERS or config.stem in ("sail", "lift", "lit") or given.align.batch_size == 128
    AlignConfig(**vars(given.align))
    template = given.encoder.template
    assert template is None or template.count("{caption}") == 1


@pytest.mark.parametrize("config", RECIPES, ids=lambda p: p.stem)
def test_recipes_can_be_planned_and_fit_into_an_h100(config: Path) -> None:
    with_llm = [config.parent / "qwen2.5-0.5b.yaml"] if config in TOWERS or config.stem == "lit" else []
    found = plan_fit(read(*with_llm, config), Machine("h100", 8), 3_000_000, 2, 84)
    assert all(found.fits.values()) and not found.ways_out


def test_llava_s_recipe_has_its_authors_settings() -> None:
    """And those are the defaults."""
    parser, _ = build()
    line = ["llava", "train", "b", "--out", "r"]
    given = parser.parse_args([*line, "--config", str(FOLDER / "llava-1.5-7b.yaml")]).llava.train.llava
    usual = parser.parse_args(line).llava.train.llava
    machine = ("precision", "recompute", "cache_gb", "workers", "micro_batch")
    assert all(given[name] == usual[name] for name in vars(usual) if name not in machine)
    assert (given.pretrain_batch, given.pretrain_lr, given.batch, given.lr) == (256, 1e-3, 128, 2e-5)


def test_pairs_of_a_language_model_and_a_tower_are_both() -> None:
    assert len(TOWERS) == 6
    for llm, tower in product((config for config in RECIPES if config.name.removesuffix(".yaml") in LLMS), TOWERS):
        both, one, other = read(llm, tower), read(llm), read(tower)
        assert (both.encoder, both.tune) == (one.encoder, one.tune)
        assert both.align == other.align
        assert both.encoder != other.encoder and both.align != one.align


def test_the_papers_towers_are_aligned_as_it_says() -> None:
    for tower in TOWERS:
        align = read(tower).align
        assert align.batch_size * 8 == 4096 and align.embed_dim == (1152 if "siglip" in tower.stem else 1280)
        assert (align.tower_lr, align.lr, align.layer_decay, align.weight_decay) == (1e-5, 1e-5, 0.85, 0.05)
        assert (align.loss, align.adapter, align.adapter_depth, align.adapter_expansion) == (
            "infonce",
            "residual",
            4,
            2,
        )
        assert (align.min_crop_scale, align.hflip, align.max_grad_norm, align.captions_per_image) == (
            0.9,
            False,
            5.0,
            1,
        )
        assert align.caption_mix == {"captions": 1, "long_captions": 1}


def test_the_papers_text_towers_have_recipes_that_tune_reads() -> None:
    parser, _ = build()
    papers = [r for r in RECIPES if r.name.removesuffix(".yaml") in LLMS]
    assert len(papers) == len(LLMS)
    for config in papers:
        tune = parser.parse_args(["tune", "a.jsonl", "--out", "r", "--config", str(config)]).tune.tune
        assert (tune.temperature, tune.lora_r, tune.lora_alpha, tune.lora_dropout) == (0.02, 16, 32, 0.05)
        assert tune.lr == 2e-4 and tune.batch_size * 8 == 512 and tune.warmup_ratio * tune.steps == 300


def test_there_are_recipes() -> None:
    assert RECIPES


def test_an_unknown_setting_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    parser, _ = build()
    with pytest.raises(SystemExit):
        parser.parse_args(["fit", "a.jsonl", "--out", "r", "--align.epocs", "7"])
    assert "align.epocs" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["tune"], ["embed", "d"], ["align", "d", "--store", "s"], ["evaluate", "m"]])
def test_one_file_serves_every_stage(verb: list[str], tmp_path: Path) -> None:
    """What is fit's and not the verb's is left out; what nobody knows is not."""
    parser, _ = build()
    whole = tmp_path / "config.yaml"
    save_or_check_config({"data": ["x.csv"], **dataclasses.asdict(FitConfig())}, whole)
    out = [] if verb[0] == "evaluate" else ["--out", "o"]
    for config in (*RECIPES, whole):
        given = parser.parse_args([*verb, *out, "--config", str(config)])[verb[0]]
        expected = yaml.safe_load(config.read_text()).get(verb[0], {})
        assert all(given[verb[0]][name] == value for name, value in expected.items() if name != "data")
    for bad in (
        "embed:\n  shrd: 1\n",
        "tunee:\n  steps: 1\n",
        "align:\n  epochs: x\n" if verb[0] == "align" else "x: 1\n",
    ):
        whole.write_text(bad)
        with pytest.raises(SystemExit):
            parser.parse_args([*verb, *out, "--config", str(whole)])
    with pytest.raises(SystemExit):
        parser.parse_args([*verb, *out, "--llava.lr", "1"])


def test_rare_settings_are_settings() -> None:
    known = {"encoder", "tune", "embed", "align", "evaluate", "llava", "reproduce"}
    recipes = {**vars(FitConfig()), "llava": LlavaConfig(), "reproduce": ReproduceConfig()}


def test_help_shows_about_forty_settings(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("fit", "tune", "embed", "align", "plan", "evaluate", "reproduce"):
        with pytest.raises(SystemExit):
            build()[0].parse_args([verb, "--help"])
        shown = re.findall(r"^  (--[\w.]+)", capsys.readouterr().out, re.M)
        assert len(shown) <= 48, (verb, len(shown))


def test_help_waits_for_nothing_heavy() -> None:
    code = "import sys, llm2clip.cli as c; c.build(); print({'torch', 'transformers', 'numpy'} & sys.modules.keys())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"
