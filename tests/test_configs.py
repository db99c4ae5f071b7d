"""Settings and built-in configs: names, number, parsing, and the values that the paper publishes."""

import dataclasses
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from config_headers import update_header
from llm2clip.cli import build_parser, main
from llm2clip.cli.commands import format_column_flags, format_command, read_builtin_configs
from llm2clip.config import (
    AlignConfig,
    EmbedConfig,
    EncoderConfig,
    EvaluateConfig,
    FitConfig,
    TuneConfig,
)
from llm2clip.data.transforms import MIN_CROP_SCALE
from llm2clip.llava import LlavaConfig
from llm2clip.runs.output_folder import ConfigChangedError, save_or_check_config
from llm2clip.tools import plan as planner
from test_plan import measure_image_costs, measure_text_costs

FIT_CONFIGS = [name for name in read_builtin_configs() if not name.startswith("llava-")]
LLMS = [
    "deepseek-r1-distill-llama-8b",
    "llama-3-8b",
    "llama-3.1-8b",
    "llama-3.2-1b",
    "mistral-nemo-12b",
    "qwen2.5-0.5b",
]
ENCODERS = ["bge-en-icl", "llm2vec-llama-3-8b", "nv-embed-v2"]  # not tuned
TOWERS = [name for name in FIT_CONFIGS if name.startswith("tower-")]
RECIPES = Path(__file__).parents[1] / "docs/recipes.md"
STAGES = (EncoderConfig, TuneConfig, EmbedConfig, AlignConfig, EvaluateConfig)
MAX_FIT_SETTINGS = 59  # fixed, see CONTRIBUTING.md: a new setting must replace an existing one


@cache
def get_parser() -> Any:
    return build_parser()[0]


@cache
def parse_fit(*configs: str) -> FitConfig:
    parser = get_parser()
    flags = [word for config in configs for word in ("--config", config)]
    args = parser.instantiate(parser.parse_args(["fit", "a.jsonl", "--out", "r", *flags])).fit
    return FitConfig(**{field.name: args[field.name] for field in dataclasses.fields(FitConfig)})


# ---- settings ------------------------------------------------------------------------------------------------------


def test_fit_settings_are_frozen() -> None:
    top_level = [name for name, value in vars(FitConfig()).items() if not dataclasses.is_dataclass(value)]
    assert sum(len(dataclasses.fields(stage)) for stage in STAGES) + len(top_level) == MAX_FIT_SETTINGS


def test_every_setting_is_documented_in_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        get_parser().parse_args(["fit", "--help"])
    text = capsys.readouterr().out
    for section, stage in zip(("encoder", "tune", "embed", "align", "evaluate"), STAGES, strict=True):
        for field in dataclasses.fields(stage):
            entry = re.search(rf"^  --{section}\.{field.name}\b(.*?)(?=^  --|^\S|\Z)", text, re.M | re.S)
            assert entry, f"{section}.{field.name} is not in the help"
            assert len(entry[1].split()) > 4, f"{section}.{field.name} has no description"
    assert "type:" not in text and "null" not in text


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'numpy'}"
    code = f"import sys, llm2clip.cli as c; c.build_parser(); print({heavy} & sys.modules.keys());"
    code += (
        "import llm2clip.caption.run; assert 'transformers' not in sys.modules"  # with --endpoint, no model is loaded
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (AlignConfig, {"epochs": 0}, r"--align.epochs must be greater than 0 \(got 0\)"),
        (TuneConfig, {"warmup_ratio": 2}, r"--tune.warmup_ratio must be between 0 and 1 \(got 2\)"),
        (TuneConfig, {"qlora": True, "lora_r": 0}, r"--tune.qlora requires LoRA"),
        (AlignConfig, {"lora_r": 4, "tower_lr": 0}, r"--align.lora_r requires a trainable tower"),
        (AlignConfig, {"distill_weight": 1, "tower_lr": 0}, r"requires a trainable tower: set --align.tower_lr"),
        (EmbedConfig, {"precision": "fp8"}, r"--embed.precision must be auto, fp32"),
        (AlignConfig, {"lr": float("nan")}, r"--align.lr must be at least 0 \(got nan\)"),
        (AlignConfig, {"logit_scale": 0.5}, r"--align.logit_scale must be between 1 and 100"),
        (AlignConfig, {"logit_scale": 101}, r"--align.logit_scale must be between 1 and 100"),
        (AlignConfig, {"layer_decay": 1.1}, r"--align.layer_decay must be between 0 and 1"),
        (EncoderConfig, {"pooling": "median"}, r"--encoder.pooling must be one of mean, .*'median'"),
        (EncoderConfig, {"template": "hello"}, r"--encoder.template must contain \{caption\} exactly once"),
        (AlignConfig, {"matryoshka_dims": [64, 0]}, r"--align.matryoshka_dims must be at least 1"),
    ],
)
def test_config_rejects_values_out_of_range(config: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**values)


@pytest.mark.parametrize("config", [*STAGES, FitConfig, LlavaConfig])
def test_every_numeric_setting_has_a_range(config: type) -> None:
    for field in dataclasses.fields(config):
        if re.search(r"\b(int|float)\b", str(field.type)):
            value: Any = -1e9
            if "dict" in str(field.type) or "list" in str(field.type):
                value = {"captions": value} if "dict" in str(field.type) else [value]
            with pytest.raises(ValueError, match=field.name):
                config(**{field.name: value})


# ---- built-in configs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIT_CONFIGS)
def test_builtin_config_parses_and_flags_override_it(name: str) -> None:
    parser = get_parser()
    args = parser.parse_args(["fit", "a.jsonl", "--out", "r", "--config", name, "--align.epochs", "7"]).fit
    assert args.align.epochs == 7
    assert args.data == ["a.jsonl"]
    template = args.encoder.template
    assert template is None or template.count("{caption}") == 1


@pytest.mark.parametrize("name", [name for name in FIT_CONFIGS if not name.startswith("cpu")])
def test_builtin_config_states_the_estimates_of_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "measure_text_costs", measure_text_costs)  # measure what configs share only once
    monkeypatch.setattr(planner, "measure_image_costs", measure_image_costs)
    text = read_builtin_configs()[name]
    count = 0 if name in ("qwen2.5-0.5b", "tower-openai-b16") else 1  # all estimates, or the first one, to save time
    updated = update_header(name, text, count)
    assert updated == text, "run benchmarks/config_headers.py"
    assert "does not fit" not in text.split("# - 8 x h100")[1].split("# - 1 x")[0]


def test_llm_and_tower_configs_combine() -> None:
    """Configs of LLMs and of towers have different sections, so neither overrides the settings of the other."""
    configs = read_builtin_configs()
    assert len(TOWERS) == 6
    assert all(yaml.safe_load(configs[name]).keys() <= {"encoder", "tune", "embed"} for name in LLMS + ENCODERS)
    assert all(yaml.safe_load(configs[name]).keys() == {"align"} for name in TOWERS)
    combined, llm_only, tower_only = parse_fit(LLMS[0], TOWERS[0]), parse_fit(LLMS[0]), parse_fit(TOWERS[0])
    assert (combined.encoder, combined.tune, combined.align) == (llm_only.encoder, llm_only.tune, tower_only.align)


def test_tower_configs_have_the_settings_of_the_paper() -> None:
    for tower in TOWERS:
        align = parse_fit(tower).align
        assert align.batch_size * 8 == 4096
        siglip = "siglip" in tower
        assert (align.embed_dim, align.normalize_input) == ((0, False) if siglip else (1280, True))
        assert align.logit_scale == (100 if tower in ("tower-eva02-l14-336", "tower-pe-core-l14") else "inherit")
        assert (align.tower_lr, align.lr, align.layer_decay) == (1e-5, 1e-5, 0.85)
        assert (align.loss, align.adapter_depth) == ("sigmoid" if siglip else "infonce", 4)
        assert (MIN_CROP_SCALE, align.captions_per_image) == (0.9, 1)
        assert align.caption_mix == {"captions": 1, "long_captions": 1}


def test_llm_configs_have_the_settings_of_the_paper() -> None:
    for llm in LLMS:
        tune = parse_fit(llm).tune
        assert (tune.temperature, tune.lora_r, tune.lora_dropout) == (0.02, 16, 0.05)
        assert tune.lr == 2e-4 and tune.batch_size * 8 == 512 and round(tune.warmup_ratio * tune.steps) == 300
        assert (tune.symmetric, tune.lr_scheduler_type, tune.steps) == (False, "linear", 8500)
    assert [parse_fit(name).tune.steps for name in ENCODERS] == [0] * len(ENCODERS)


def recipe_rows() -> list[tuple[list[str], str, Any]]:
    """Return the config names, the setting and our value of each row in the tables of docs/recipes.md."""
    groups = {"All LLM configs:": LLMS, "All encoder configs:": ENCODERS, "All tower configs:": TOWERS}
    group: list[str] = []
    rows = []
    for line in RECIPES.read_text(encoding="utf-8").splitlines():
        group = groups.get(line, group)
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        setting = next(
            (cell.strip("`") for cell in cells[:2] if re.fullmatch(r"`(encoder|tune|align)\.\w+`", cell)), None
        )
        if setting is None:
            continue
        value = cells[-1].split("`")[1].replace("\\|", "|").replace("\\n", "\n")
        names = group if len(cells) == 4 else select_configs(cells[0], group)
        is_text = setting.endswith((".path", ".template", ".tower"))
        rows.append((names, setting, value if is_text else yaml.safe_load(value)))
    return rows


def select_configs(text: str, group: list[str]) -> list[str]:
    """Return the configs that the first cell of a row describes."""
    if text.startswith("all except "):
        return [name for name in group if name not in text.removeprefix("all except ").split(" and ")]
    openai = ", ".join(name for name in group if "openai" in name)
    return text.replace("OpenAI towers", openai).split(", ")


def test_recipes_page_has_the_values_of_the_configs() -> None:
    configs = {name: parse_fit(name) for name in (*LLMS, *ENCODERS, *TOWERS)}
    covered = set()
    for names, setting, value in recipe_rows():
        stage, field = setting.split(".")
        for name in names:
            assert getattr(getattr(configs[name], stage), field) == value, f"{setting} of {name} in docs/recipes.md"
            assert (name, setting) not in covered, f"docs/recipes.md has {setting} of {name} twice"
            covered.add((name, setting))
    for name in configs:
        for stage, settings in yaml.safe_load(read_builtin_configs()[name]).items():
            for field in settings:
                assert (name, f"{stage}.{field}") in covered, (
                    f"docs/recipes.md has no row for {stage}.{field} of {name}"
                )


def test_llava_config_equals_the_defaults_except_for_hardware_settings() -> None:
    parser = get_parser()
    command = ["llava", "train", "b", "--out", "r"]
    config = parser.parse_args([*command, "--config", "llava-1.5-7b"]).llava.train.llava
    default = parser.parse_args(command).llava.train.llava
    hardware = ("precision", "gradient_checkpointing", "cache_gb", "workers", "micro_batch_size")
    assert all(config[name] == default[name] for name in vars(default) if name not in hardware)
    assert (config.pretrain_batch_size, config.pretrain_lr, config.batch_size, config.lr) == (256, 1e-3, 128, 2e-5)


# ---- arguments -----------------------------------------------------------------------------------------------------


def test_command_without_arguments_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "Getting started:" in capsys.readouterr().out


@pytest.mark.parametrize("columns", ["captions=text,image=file name", "{'captions': 'text', 'image': 'file name'}"])
def test_columns_are_pairs_or_a_mapping(columns: str, tmp_path: Path) -> None:
    parser = get_parser()
    config = tmp_path / "columns.yaml"
    config.write_text("columns: {captions: text, image: file name}\n")
    for option in (["--columns", columns], ["--config", str(config)]):
        args = parser.instantiate(parser.parse_args(["embed", "d", "--out", "s", *option])).embed
        assert args.columns == {"captions": "text", "image": "file name"}


def test_hints_quote_paths_and_keep_the_column_mapping() -> None:
    columns = format_column_flags({"captions": "the text"})
    assert format_command("evaluate", Path("my run/model"), "my data@test", *columns) == (
        "llm2clip evaluate 'my run/model' 'my data@test' --columns 'captions=the text'"
    )


# ---- --config ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["tune"], ["embed", "d"], ["align", "d", "--store", "s"], ["evaluate", "m"]])
def test_one_config_file_serves_every_stage(command: list[str], tmp_path: Path) -> None:
    parser = get_parser()
    save_or_check_config({"data": ["x.csv"], **dataclasses.asdict(FitConfig())}, tmp_path)
    out = [] if command[0] == "evaluate" else ["--out", "o"]
    texts = {**{name: read_builtin_configs()[name] for name in FIT_CONFIGS}}
    texts[str(tmp_path / "config.yaml")] = (tmp_path / "config.yaml").read_text()
    for config, text in texts.items():
        args = parser.parse_args([*command, *out, "--config", config])[command[0]]
        expected = yaml.safe_load(text).get(command[0], {})
        assert all(args[command[0]][name] == value for name, value in expected.items() if name != "data")


@pytest.mark.parametrize("text", ["embed:\n  shrd: 1\n", "tunee:\n  steps: 1\n"])
def test_config_file_with_unknown_settings_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(SystemExit):
        get_parser().parse_args(["tune", "--out", "o", "--config", str(tmp_path / "bad.yaml")])


def test_configs_command_lists_each_config_with_a_description(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(read_builtin_configs())
    assert any(line.startswith("llama-3.2-1b ") and "Llama-3.2-1B" in line for line in lines)
    assert all(line.endswith(".") for line in lines)  # the description is a complete sentence
    assert main(["configs", "cpu"]) == 0
    assert capsys.readouterr().out == read_builtin_configs()["cpu"]
    assert main(["configs", "cpuu"]) == 1
    assert "no built-in config 'cpuu' (did you mean cpu?)" in capsys.readouterr().err


# ---- the config saved in a run directory ---------------------------------------------------------------------------


def test_align_settings_may_change_until_align_has_outputs(tmp_path: Path) -> None:
    save_or_check_config({"tune": {"lr": 1}, "align": {"batch_size": 4096}}, tmp_path)
    (tmp_path / "store").mkdir()
    save_or_check_config({"tune": {"lr": 1}, "align": {"batch_size": 64}}, tmp_path)
    with pytest.raises(ConfigChangedError, match=r"tune\.lr"):
        save_or_check_config({"tune": {"lr": 2}, "align": {"batch_size": 64}}, tmp_path)
    (tmp_path / "align/checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigChangedError, match=r"align\.batch_size: 64 saved, 32 now"):
        save_or_check_config({"tune": {"lr": 1}, "align": {"batch_size": 32}}, tmp_path)


def test_run_directory_without_outputs_accepts_a_new_config(tmp_path: Path) -> None:
    save_or_check_config({"data": "typo", "embed": {"batch_tokens": 1}}, tmp_path)
    save_or_check_config({"data": "right", "embed": {"batch_tokens": 1}}, tmp_path)
    (tmp_path / "tune").mkdir()
    save_or_check_config({"data": "right", "embed": {"batch_tokens": 2}}, tmp_path)  # affects speed only
    with pytest.raises(ConfigChangedError, match="data: 'right' saved, 'wrong' now"):
        save_or_check_config({"data": "wrong", "embed": {"batch_tokens": 2}}, tmp_path)
