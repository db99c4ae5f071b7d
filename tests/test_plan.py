"""Plans: parameters and FLOPs against published numbers and formulas. For memory, see also test_memory.py."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from llm2clip.cli import main
from llm2clip.config import AlignConfig, EncoderConfig, FitConfig, TuneConfig
from llm2clip.tools import plan as planner
from llm2clip.tools import plan_costs as model_costs
from llm2clip.tools.plan import FitPlan, format_plan, plan_fit
from llm2clip.tools.plan_costs import (
    LLMS,
    TOWERS,
    ImageCosts,
    TextCosts,
    build_llm_on_meta_device,
    build_tower_on_meta_device,
    count_flops,
    count_parameters,
    get_llm_config,
)
from llm2clip.tools.plan_memory import (
    DEVICES,
    Machine,
    compute_peak_memory,
    estimate_align_memory,
    estimate_tune_memory,
)

PAPER_ALIGN = AlignConfig(adapter_depth=4, embed_dim=1280, captions_per_image=1, precision="bf16")
SMALL = FitConfig(encoder=EncoderConfig(), align=AlignConfig(tower="test_vit", captions_per_image=1))
BF16 = TuneConfig(precision="bf16")
GPU = Machine("h100")
TINY = LlamaConfig(
    hidden_size=64,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
    intermediate_size=96,
    vocab_size=50,
)


@pytest.fixture(autouse=True, scope="module")
def measure_each_model_once() -> Iterator[None]:
    """Cache the costs of models, which many plans have in common."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(planner, "measure_text_costs", measure_text_costs)
        monkeypatch.setattr(planner, "measure_image_costs", measure_image_costs)
        yield


def measure_text_costs(encoder: EncoderConfig, tune: TuneConfig, tokens: float, is_cpu: bool = False) -> TextCosts:
    """Measure each architecture once: several names in `LLMS` stand for the same one."""
    architecture = LLMS.get(encoder.path.lower(), encoder.path)
    lora = tune.lora_r, tune.lora_dropout
    key = repr((architecture, encoder.layers, encoder.truncate_dim, lora, tune.precision, tokens, is_cpu))
    if key not in _costs:
        _costs[key] = model_costs.measure_text_costs(encoder, tune, tokens, is_cpu)
    return _costs[key]


def measure_image_costs(config: AlignConfig, text_dim: int, captions: float) -> ImageCosts:
    """Measure each model once: the costs of an image do not depend on batches and epochs."""
    default = AlignConfig()
    same = {name: getattr(default, name) for name in ("lr", "epochs", "batch_size", "micro_batch_size")}
    key = repr((dataclasses.replace(config, **same), text_dim, captions))
    if key not in _costs:
        _costs[key] = model_costs.measure_image_costs(config, text_dim, captions)
    return _costs[key]


_costs: dict[str, Any] = {}


def plan_small(config: FitConfig = SMALL, device: str = "h100", count: int = 1, **more: Any) -> FitPlan:
    return plan_fit(config, Machine(device, count, **more), 10_000, 2, 30)


def change_align(**settings: object) -> FitConfig:
    return dataclasses.replace(SMALL, align=dataclasses.replace(SMALL.align, **settings))


# ---- parameters and FLOPs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "gigaflop"),
    [  # parameters of the published weights without an untied head, and the paper's FLOPs per caption of 84 tokens
        ("meta-llama/Llama-3.1-8B", 8_030_261_248 - 128_256 * 4096, 1172),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400, 164),
        ("mistralai/Mistral-Nemo-Instruct-2407", 12_247_782_400 - 131_072 * 5120, None),
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768, None),
        ("smollm2-135m", 134_515_008, None),
        ("gemma3-270m", 268_098_176, None),
        ("all-minilm-l6-v2", 22_713_216, None),
    ],
)
def test_llm_costs_match_published_values(name: str, parameters: int, gigaflop: float | None) -> None:
    encoder = EncoderConfig(path=name)
    assert count_parameters(build_llm_on_meta_device(get_llm_config(encoder))) == parameters
    if gigaflop:
        costs = measure_text_costs(encoder, BF16, 84)
        assert costs.parameters == parameters
        assert costs.forward / 1e9 == pytest.approx(gigaflop, rel=0.01)


@pytest.mark.parametrize(
    ("tower", "parameters", "gigaflop"),
    [  # parameters of the published checkpoints, and FLOPs per image in a training step of the tower
        ("openai/clip-vit-large-patch14-336", 578_587_905, 1144),
        ("openai/clip-vit-base-patch16", 360_552_193, 105),
        ("eva02_large_patch14_clip_336.merged2b", 578_727_361, None),
    ],
)
def test_align_costs_match_published_checkpoints(tower: str, parameters: int | None, gigaflop: float | None) -> None:
    costs = measure_image_costs(dataclasses.replace(PAPER_ALIGN, tower=tower), 4096, 1)
    assert costs.trained == costs.parameters + 1 and costs.adapter == 273_769_728
    if parameters:
        assert costs.trained == parameters
    if gigaflop:
        heads = 3 * 2 * (costs.projection + costs.adapter)
        assert (costs.forward + costs.backward - heads) / 1e9 == pytest.approx(gigaflop, rel=0.01)


@pytest.mark.parametrize("is_cpu", [False, True])
@pytest.mark.parametrize("rank", [0, 8])
def test_llm_flops_and_trained_parameters_match_formulas(rank: int, is_cpu: bool, tmp_path: Path) -> None:
    TINY.save_pretrained(tmp_path)
    tune, tokens = TuneConfig(lora_r=rank, precision="bf16"), 40
    costs = measure_text_costs(EncoderConfig(str(tmp_path)), tune, tokens, is_cpu)
    # Queries and outputs have 4 heads of 24, keys and values have 2. The MLP has three matrices.
    shapes = [(64, 96), (64, 48), (64, 48), (96, 64), (64, 96), (64, 96), (96, 64)]
    linear = 5 * sum(rows * columns for rows, columns in shapes)
    lora = 5 * sum(rank * (rows + columns) for rows, columns in shapes)
    assert costs.linear == linear == 5 * costs.largest_linear
    assert costs.trained == (lora or costs.parameters - 50 * 64)
    attention = 5 * 4 * tokens**2 * 96
    assert costs.forward == pytest.approx(2 * linear * tokens + attention)
    assert costs.tune_forward == pytest.approx(costs.forward + 2 * lora * tokens)
    # Gradients of the inputs and of the trained weights. With LoRA, the first layer's normalisation is frozen, so that
    # the inputs of its queries, keys and values need no gradient.
    inputs, weights = 2 * linear, 2 * linear
    if rank:
        inputs -= 2 * sum(rows * columns for rows, columns in shapes[:3])
        weights = 4 * lora - 2 * 3 * 64 * rank
    assert costs.tune_backward == pytest.approx((inputs + weights) * tokens + 2 * attention)


def test_repeated_passes_of_tune_are_counted() -> None:
    costs = measure_text_costs(EncoderConfig(), BF16, 40)
    step = costs.count_tune_flops(BF16)
    assert step == costs.tune_forward + costs.tune_backward
    repeated = dataclasses.replace(BF16, gradient_checkpointing=True, grad_cache=True, batch_tokens=40)
    assert costs.count_tune_flops(repeated) == pytest.approx(step + 2 * costs.tune_forward)
    single_pass = dataclasses.replace(BF16, grad_cache=True, batch_tokens=2 * BF16.batch_size * 40)
    assert costs.count_tune_flops(single_pass) == step


def test_grouped_convolutions_are_counted_per_group() -> None:
    for groups in (1, 8):
        layer = nn.Conv2d(8, 16, 3, groups=groups, device="meta")
        x = torch.zeros(2, 8, 10, 10, device="meta", requires_grad=True)
        forward = count_flops(lambda layer=layer, x=x: layer(x))
        assert forward == 2 * 2 * 16 * 8 * 8 * 8 * 9 / groups
        assert count_flops(layer(x).sum().backward) == 2 * forward


def test_text_costs_respect_layers_and_truncate_dim() -> None:
    encoder = EncoderConfig("smollm2-135m", layers=12, truncate_dim=256)
    costs = measure_text_costs(encoder, TuneConfig(lora_r=0, precision="fp32"), 30)
    assert costs.layers == 12 and costs.embed_dim == 256
    assert costs.trained == costs.parameters - 49_152 * 576


def test_frozen_parts_cost_no_backward_pass() -> None:
    config = dataclasses.replace(PAPER_ALIGN, tower="test_vit", embed_dim=64)
    trained = measure_image_costs(config, 96, 2)
    frozen = measure_image_costs(dataclasses.replace(config, tower_lr=0), 96, 2)
    lora = measure_image_costs(dataclasses.replace(config, lora_r=4), 96, 2)
    assert frozen.forward == trained.forward - trained.tower_forward
    assert frozen.backward < 2 * frozen.forward
    assert frozen.backward < lora.backward < trained.backward
    assert frozen.saved < trained.saved
    assert frozen.trained < lora.trained < trained.trained


def test_every_model_in_the_tables_can_be_built() -> None:
    for name in LLMS:
        assert get_llm_config(EncoderConfig(name)).num_hidden_layers > 1
    for name, (_, size) in TOWERS.items():
        assert build_tower_on_meta_device(AlignConfig(tower=name)).preprocess.size == size


def test_unknown_model_error_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"--encoder\.path no/such .*meta-llama/llama-3\.2-1b"):
        get_llm_config(EncoderConfig("no/such"))
    with pytest.raises(ValueError, match=r"--align\.tower no/such .*openai/clip-vit-base-patch16"):
        build_tower_on_meta_device(AlignConfig(tower="no/such"))


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_sharding_divides_weights_and_optimizer_state() -> None:
    config = dataclasses.replace(SMALL.align, precision="fp32")
    text, image = measure_text_costs(EncoderConfig(), BF16, 30), measure_image_costs(config, 576, 1)
    single = estimate_align_memory(image, text, config, GPU)
    replicated = estimate_align_memory(image, text, config, Machine("h100", 8))
    sharded = estimate_align_memory(image, text, config, Machine("h100", 8, use_fsdp=True))
    assert replicated["gradients"] == 2 * single["gradients"]
    assert sharded["AdamW"] * 8 == replicated["AdamW"] and sharded["model"] * 8 == replicated["model"]


def test_tune_memory_depends_on_trained_weights_and_device() -> None:
    text = measure_text_costs(EncoderConfig(), BF16, 30)

    def tune(machine: Machine = GPU, **settings: object) -> dict[str, float]:
        return estimate_tune_memory(text, dataclasses.replace(BF16, **settings), machine)

    assert tune(qlora=True)["LLM"] < tune()["LLM"] < tune(lora_r=0)["LLM"]
    assert "loading" not in tune()
    assert tune(Machine("cpu", tflops=1, memory=8))["loading"] > 4 * text.parameters


# ---- fit ------------------------------------------------------------------------------------------------------------


def test_hours_are_flops_over_throughput() -> None:
    config = change_align(epochs=3, precision="bf16")
    plan = plan_small(config, mfu=0.5, tflops=100)
    throughput, tune = 0.5 * 100e12, config.tune
    assert plan.stage_hours["align"] * 3600 == pytest.approx(10_000 * 3 * plan.step_flops["total"] / throughput)
    assert plan.stage_hours["embed"] * 3600 == pytest.approx(20_000 * plan.text.forward / throughput)
    assert plan.stage_hours["tune"] * 3600 == pytest.approx(
        2 * tune.steps * tune.batch_size * plan.text.count_tune_flops(tune) / throughput
    )
    assert plan.images_per_second == pytest.approx(30_000 / (3600 * plan.stage_hours["align"]))
    assert plan.store_bytes == 20_000 * (576 * 2 + 16)
    int8 = dataclasses.replace(
        plan, config=dataclasses.replace(config, embed=dataclasses.replace(config.embed, dtype="int8"))
    )
    assert int8.store_bytes == 20_000 * (576 + 4 + 16)


def test_repeated_forward_passes_of_align_are_counted() -> None:
    plan = plan_small(change_align(batch_size=64))
    in_parts = plan_small(change_align(batch_size=64, micro_batch_size=16))
    assert plan.step_flops["repeated"] == 0
    assert in_parts.step_flops["repeated"] == plan.image.forward
    cached = plan_small(change_align(batch_size=64, tower_lr=0.0))
    assert cached.step_flops["total"] < 0.1 * plan.step_flops["total"]
    assert cached.feature_bytes == 10_000 * (2 * cached.image.feature_dim + 16) and cached.images_per_second == 0


def test_self_distillation_runs_the_pretrained_tower() -> None:
    plain = plan_small(change_align(batch_size=64))
    distilled = plan_small(change_align(batch_size=64, distill_weight=1.0))
    assert distilled.step_flops["total"] - plain.step_flops["total"] == pytest.approx(plain.image.tower_forward)
    peaks = [compute_peak_memory(plan.stage_memory["align"]) for plan in (distilled, plain)]
    assert peaks[0] - peaks[1] == 4 * plain.image.tower + 24 * 64**2
    assert distilled.feature_bytes == 0


def test_few_images_reduce_the_batch_size() -> None:
    plan = plan_fit(change_align(batch_size=64), Machine("h100", 8), 100, 2, 30)
    assert plan.config.align.batch_size == 12


def test_peak_flops_depend_on_precision() -> None:
    h100, t4 = DEVICES["h100"], DEVICES["t4"]
    assert h100.get_peak_flops("auto") == h100.get_peak_flops("bf16") == h100.get_peak_flops("bf16+3") == 989.5e12
    assert h100.get_peak_flops("fp32") == 67e12
    assert t4.get_peak_flops("auto") == t4.get_peak_flops("fp32") == 8.1e12
    with pytest.raises(ValueError, match="t4 does not support bf16"):
        t4.get_peak_flops("bf16")


def test_machine_options_override_the_device_table_and_have_ranges() -> None:
    assert Machine("H100", memory=40).device_spec.memory == 40
    assert Machine("cpu", tflops=1.5, memory=24).device_spec.get_peak_flops("fp32") == 1.5e12
    with pytest.raises(ValueError, match=r"--device must be one of h100, .*--tflops"):
        Machine("gtx1080", memory=24)
    cpu = Machine("cpu").device_spec  # measured
    assert 1e-4 < cpu.full < 1e3 and 0.01 < cpu.memory < 1e5
    for name, value in (("mfu", 0), ("mfu", 2), ("tflops", 0), ("count", -1)):
        with pytest.raises(ValueError, match=f"--{name} must be"):
            Machine("l4", **{name: value})


def test_plan_counts_the_captions_in_the_data(image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config", "cpu", "--device", "cpu", "--max_skipped", "1"]
    assert main(["plan", str(image_folder), *flags]) == 0
    rows = [json.loads(line) for line in (image_folder / "captions.jsonl").read_text().splitlines()]
    training = [row for row in rows if row["split"] != "val"]
    texts = [text for row in training for text in row["captions"] + row.get("long_captions", [])]
    output = capsys.readouterr().out
    assert f"4 epochs of {len(training)} images" in output and f" {len(texts)} captions" in output
    assert f"caption of {round(sum(map(len, texts)) / len(texts) / 4, 1):g} tokens" in output
    assert main(["plan", *flags]) == 1
    assert "pass DATA with captions, or the number of training images with --images" in capsys.readouterr().err


def test_plan_rejects_too_few_images() -> None:
    with pytest.raises(ValueError, match="--images must be greater than 0"):
        plan_fit(SMALL, GPU, 0, 2, 30)
    with pytest.raises(ValueError, match="the data has 1"):
        plan_fit(SMALL, GPU, 1, 2, 30)


def test_format_plan_shows_tables_and_advice() -> None:
    page = format_plan(plan_small())
    for part in ("134,515,008", "GFLOP", "peak", "Embedding store", "(MFU)", "captions of 30 tokens"):
        assert part in page
    assert "OUT OF MEMORY" not in page
    page = format_plan(plan_fit(change_align(batch_size=16384), Machine("l4"), 100_000, 2, 30))
    assert "OUT OF MEMORY in align. To reduce memory use, set a lower --align.micro_batch_size" in page
    untuned = plan_small(dataclasses.replace(SMALL, tune=TuneConfig(steps=0)))
    assert "tune" not in untuned.stage_memory and format_plan(untuned)
