"""Plans: parameter and FLOP counts against the models, memory against a real backward pass, and suggestions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, LlamaConfig

from llm2clip.config import AlignConfig, EncoderConfig, FitConfig, TuneConfig
from llm2clip.llava.config import LlavaConfig
from llm2clip.models.heads import AdapterConfig
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.model_folder import LLM2CLIPConfig
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.tools.plan.activations import SavedTensorBytes
from llm2clip.tools.plan.devices import DEVICES, Machine
from llm2clip.tools.plan.flops import count_flops, image_costs, text_costs
from llm2clip.tools.plan.llava import plan_llava
from llm2clip.tools.plan.memory import align_memory, peak_memory, tune_memory
from llm2clip.tools.plan.model_configs import LLMS, TOWERS, build_llm, build_tower, get_llm_config
from llm2clip.tools.plan.plan import Plan, plan_fit
from llm2clip.tools.plan.report import format_plan

PAPER_ALIGN = AlignConfig(adapter_depth=4, embed_dim=1280, captions_per_image=1, precision="bf16")
SMALL = FitConfig(align=AlignConfig(tower="test_vit", captions_per_image=1))
TINY = LlamaConfig(
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
    intermediate_size=96,
    vocab_size=50,
    is_causal=False,
    use_cache=False,
)


def planned(config: FitConfig = SMALL, device: str = "h100", count: int = 1, **more: Any) -> Plan:
    return plan_fit(config, Machine(device, count, **more), 10_000, 2, 30)


def small(**settings: object) -> FitConfig:
    return dataclasses.replace(SMALL, align=dataclasses.replace(SMALL.align, **settings))


# ---- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # of the published weights, without the head where it is not the table of tokens
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248 - 128_256 * 4096),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248 - 128_256 * 4096),
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
        ("mistralai/Mistral-Nemo-Instruct-2407", 12_247_782_400 - 131_072 * 5120),
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("smollm2-135m", 134_515_008),
        ("gemma3-270m", 268_098_176),
        ("all-minilm-l6-v2", 22_713_216),
    ],
)
def test_llm_parameters_match_published_weights(name: str, parameters: int) -> None:
    costs = text_costs(EncoderConfig(path=name), TuneConfig(), "bf16")
    assert (
        costs.parameters
        == parameters
        == sum(p.numel() for p in build_llm(get_llm_config(EncoderConfig(name))).parameters())
    )


@pytest.mark.parametrize(
    ("tower", "parameters"),
    [
        ("openai/clip-vit-large-patch14-336", 578_587_905),
        ("openai/clip-vit-base-patch16", 360_552_193),
        ("eva02_large_patch14_clip_336.merged2b", 578_727_361),
    ],
)
def test_align_parameters_match_published_checkpoints(tower: str, parameters: int) -> None:
    costs = image_costs(dataclasses.replace(PAPER_ALIGN, tower=tower), 4096, 1)
    assert costs.trained == costs.tower + costs.projection + costs.adapter + 1 == parameters
    assert costs.adapter == 273_769_728


@pytest.mark.parametrize(
    ("llm", "parameters"),
    [("qwen/qwen2.5-0.5b", 494_032_768), ("smollm2-135m", 134_515_008), ("lmsys/vicuna-7b-v1.5", 6_738_415_616)],
)
def test_tied_lm_head_is_counted_once(llm: str, parameters: int) -> None:
    many = dict.fromkeys(("pretrain", "instruct"), 1000)
    plan = plan_llava(
        LlavaConfig(),
        Machine("h100"),
        llm=llm,
        vision="openai/clip-vit-base-patch32",
        image_size=None,
        conversations=many,
        text_tokens=many,
    )
    assert plan.parameters["language model"] == parameters


def test_llava_plan_caches_features_of_both_stages_or_none() -> None:
    many, lengths = dict.fromkeys(("pretrain", "instruct"), 200_000), dict.fromkeys(("pretrain", "instruct"), 300)

    def towers(gigabytes: float) -> list[bool]:
        config = LlavaConfig(cache_gb=gigabytes)
        plan = plan_llava(
            config,
            Machine("h100"),
            llm="smollm2-135m",
            vision="openai/clip-vit-base-patch32",
            image_size=None,
            conversations=many,
            text_tokens=lengths,
        )
        return ["tower" in parts for parts in plan.memory.values()]

    assert towers(20) == [True, True] and towers(31) == [False, False]  # 15 GB each


def test_every_model_in_the_tables_can_be_built() -> None:
    for name in LLMS:
        assert get_llm_config(EncoderConfig(name)).num_hidden_layers > 1
    for name, (_, size) in TOWERS.items():
        assert build_tower(AlignConfig(tower=name)).preprocess.size == size


def test_text_costs_respect_layers_and_truncate_dim() -> None:
    costs = text_costs(EncoderConfig("smollm2-135m", layers=12, truncate_dim=256), TuneConfig(lora_r=0), "fp32")
    assert costs.layers == 12 and costs.embed_dim == 256
    assert costs.trained == costs.parameters - 49_152 * 576


def test_unknown_model_error_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"--encoder\.path no/such: .*meta-llama/llama-3\.2-1b"):
        text_costs(EncoderConfig("no/such"), TuneConfig(), "fp32")
    with pytest.raises(ValueError, match=r"--align\.tower no/such: .*openai/clip-vit-base-patch16"):
        build_tower(AlignConfig(tower="no/such"))


# ---- products -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tower", "gigaflop"),
    [("large-patch14-336", 1144), ("large-patch14", 485), ("base-patch16", 105)],
)
def test_tower_training_flops_match_the_paper(tower: str, gigaflop: float) -> None:
    config = dataclasses.replace(PAPER_ALIGN, tower=f"openai/clip-vit-{tower}")
    costs = image_costs(config, 4096, 1)
    heads = 3 * costs.heads_forward
    assert (costs.tower_forward + costs.heads_forward + costs.backward - heads) / 1e9 == pytest.approx(
        gigaflop, rel=0.01
    )


@pytest.mark.parametrize(("name", "gigaflop"), [("llama-3.1-8b", 1172), ("llama-3.2-1b", 164)])
def test_llm_forward_flops_match_the_paper(name: str, gigaflop: float) -> None:
    costs = text_costs(EncoderConfig(f"meta-llama/{name}"), TuneConfig(), "bf16")
    assert costs.forward(84) / 1e9 == pytest.approx(gigaflop, rel=0.01)


@pytest.mark.parametrize("rank", [0, 8])
def test_llm_flop_formulas_match_a_flop_counter(rank: int, tmp_path: Path) -> None:
    TINY.save_pretrained(tmp_path)
    tune, tokens = TuneConfig(lora_r=rank), 40
    costs = text_costs(EncoderConfig(str(tmp_path)), tune, "fp32")
    with torch.device("meta"):
        llm = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path))
        ids = torch.zeros(1, tokens, dtype=torch.long)
    llm.config.is_causal, llm.config.use_cache = False, False
    near = 1e-6 if Version(torch.__version__) >= Version("2.13") else 1e-4  # torch 2.10 counts a bit more
    assert count_flops(lambda: llm(input_ids=ids)) == pytest.approx(costs.forward(tokens), rel=near)
    if rank:
        with torch.device("meta"):
            llm = get_peft_model(llm, LoraConfig(r=rank, target_modules="all-linear"))
    llm.get_input_embeddings().requires_grad_(False)
    assert sum(p.numel() for p in llm.parameters() if p.requires_grad) == costs.trained
    # Recomputing, or whatever comes before the first block, makes it give gradients by what goes in.
    llm.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    out = llm(input_ids=ids).last_hidden_state.sum()
    assert count_flops(out.backward) == pytest.approx(costs.backward(tokens, rank > 0))
    step, forward = costs.step(tokens, tune), costs.forward(tokens)
    again = dataclasses.replace(tune, gradient_checkpointing=True, grad_cache=True, batch_tokens=tokens)
    assert costs.step(tokens, again) - step == pytest.approx(
        2 * (forward + (2 * costs.trained * tokens if rank else 0))
    )
    single_pass = dataclasses.replace(tune, grad_cache=True, batch_tokens=2 * tune.batch_size * tokens)
    assert costs.step(tokens, single_pass) == step


def test_grouped_convolutions_are_counted_per_group() -> None:
    for groups in (1, 8):
        layer = nn.Conv2d(8, 16, 3, groups=groups, device="meta")
        x = torch.zeros(2, 8, 10, 10, device="meta", requires_grad=True)
        forward = count_flops(lambda layer=layer, x=x: layer(x))
        assert forward == 2 * 2 * 16 * 8 * 8 * 8 * 9 / groups
        assert count_flops(layer(x).sum().backward) == 2 * forward


def test_frozen_parts_cost_no_backward_pass() -> None:
    config = dataclasses.replace(PAPER_ALIGN, tower="test_vit", embed_dim=64)
    trained = image_costs(config, 96, 2)
    frozen = image_costs(dataclasses.replace(config, tower_lr=0), 96, 2)
    lora = image_costs(dataclasses.replace(config, lora_r=4), 96, 2)
    assert frozen.backward < 2 * frozen.heads_forward
    assert frozen.backward < lora.backward < trained.backward
    assert frozen.saved < trained.saved
    assert frozen.trained < lora.trained < trained.trained
    one, more, two = (image_costs(dataclasses.replace(config, tower_lr=0), 96, n) for n in (1, 1.25, 2))
    for name in ("heads_forward", "backward", "saved"):
        low, middle, high = (getattr(work, name) for work in (one, more, two))
        assert middle == pytest.approx(low + 0.25 * (high - low)), name


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_saved_bytes_match_a_real_forward_pass(precision: str) -> None:
    config = AlignConfig(tower="test_vit", embed_dim=32, precision=precision)  # type: ignore[arg-type]
    tower = VisionTower.from_pretrained("test_vit", pretrained=False)
    model = LLM2CLIP(LLM2CLIPConfig(tower.config, 48, 32, adapter=AdapterConfig(depth=1)), tower).train()
    kept = []
    for images in (1, 2):
        seen = SavedTensorBytes(model)
        size = tower.preprocess.size
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), seen.hooks:
            out = model(torch.zeros(images, 3, size, size, dtype=torch.uint8), torch.ones(images, 48))
        kept.append(seen.bytes)
        del out
    costs = image_costs(config, 48, 1)
    assert costs.saved == pytest.approx(kept[1] - kept[0], rel=0.01)
    assert costs.copies == pytest.approx(2 * kept[0] - kept[1], rel=0.01, abs=64)


def test_align_memory_follows_the_settings() -> None:
    config = dataclasses.replace(SMALL.align, batch_size=1024)
    costs = image_costs(config, 64, 1)

    def align(count: int = 1, use_fsdp: bool = False, **settings: object) -> dict[str, float]:
        return align_memory(costs, dataclasses.replace(config, **settings), 1, 64, count, use_fsdp)

    assert (
        peak_memory(align(micro_batch_size=64)) < peak_memory(align(gradient_checkpointing=True)) < peak_memory(align())
    )
    assert align(8)["gradients"] == 2 * align()["gradients"]
    several, shared = align(8), align(8, True)
    assert shared["AdamW"] * 8 == several["AdamW"] and shared["model"] * 8 == several["model"]


def test_tune_memory_follows_the_settings() -> None:
    config = TuneConfig(precision="bf16", batch_size=64)
    costs = text_costs(EncoderConfig(), config, "bf16")

    def tune(**settings: object) -> dict[str, float]:
        return tune_memory(costs, dataclasses.replace(config, **settings), 30, "bf16", 1)

    assert tune(qlora=True)["LLM"] < tune()["LLM"] < tune(lora_r=0)["LLM"]
    assert tune(qlora=True)["loading"] == tune()["loading"] == 0
    assert tune_memory(costs, config, 30, "bf16", 1, is_cpu=True)["loading"] > 4 * costs.parameters
    assert tune(gradient_checkpointing=True)["activations"] < tune()["activations"]
    assert tune(grad_cache=True, batch_tokens=512)["activations"] < tune()["activations"]


@pytest.mark.parametrize("too_much", ["activations", "weights"])
def test_every_suggestion_fits(too_much: str, tmp_path: Path) -> None:
    TINY.save_pretrained(tmp_path)
    memory, align = 2, AlignConfig(tower="test_vit", batch_size=2048, captions_per_image=1)
    config = FitConfig(
        encoder=EncoderConfig(str(tmp_path)), tune=TuneConfig(batch_size=4096, precision="bf16"), align=align
    )
    if too_much == "weights":
        memory, tune = 6, TuneConfig(batch_size=8, lora_r=0, precision="bf16")
        align = dataclasses.replace(align, adapter_depth=75, batch_size=8)
        config = FitConfig(encoder=EncoderConfig("Qwen/Qwen2.5-0.5B"), tune=tune, align=align)
    plan = planned(config, count=8, memory=memory)
    assert not plan.fits["tune"] and not plan.fits["align"]
    assert plan.suggestions["tune"] and plan.suggestions["align"]
    assert ("--use_fsdp" in dict(plan.suggestions["align"])) == (too_much == "weights")
    for stage, ways in plan.suggestions.items():
        for name, size in ways:
            words = [word for word in name.split() if word != "--use_fsdp"]
            options = dict(zip(words[::2], words[1::2], strict=True))
            change = {k.split(".")[1]: True if v == "true" else int(v) for k, v in options.items()}
            changed = dataclasses.replace(config, **{stage: dataclasses.replace(getattr(config, stage), **change)})
            again = planned(changed, count=8, memory=memory, use_fsdp="--use_fsdp" in name)
            assert again.fits[stage], name
            assert peak_memory(again.memory[stage]) == pytest.approx(size)


# ---- hours ----------------------------------------------------------------------------------------------------------


def test_hours_are_flops_over_throughput() -> None:
    config = small(epochs=3, precision="bf16")
    plan = planned(config, mfu=0.5, tflops=100)
    assert plan.hours["align"] * 3600 == pytest.approx(10_000 * 3 * plan.flop["step"] / (0.5 * 100e12))
    assert plan.hours["embed"] * 3600 == pytest.approx(20_000 * plan.flop["caption forward"] / (0.5 * 100e12))
    tune = config.tune
    assert plan.hours["tune"] * 3600 == pytest.approx(
        2 * tune.steps * tune.batch_size * plan.flop["caption tune"] / (0.5 * 100e12)
    )
    assert plan.images_per_second == pytest.approx(30_000 / (3600 * plan.hours["align"]))
    assert plan.store == 20_000 * (576 * 2 + 16)
    int8 = dataclasses.replace(config, embed=dataclasses.replace(config.embed, dtype="int8"))
    assert planned(int8).store == 20_000 * (576 + 4 + 16)


def test_repeated_forward_passes_are_counted() -> None:
    plan = planned(small(batch_size=64))
    both = planned(small(batch_size=64, micro_batch_size=16, gradient_checkpointing=True))
    assert plan.flop["image again"] == 0
    assert both.flop["image again"] == pytest.approx(2 * plan.flop["tower forward"], rel=0.35)
    cached = planned(small(batch_size=64, tower_lr=0.0))
    assert cached.flop["step"] < 0.1 * plan.flop["step"]
    assert cached.features == 10_000 * (2 * build_tower(SMALL.align).feature_dim + 16) and cached.images_per_second == 0


def test_self_distillation_runs_or_caches_the_pretrained_tower() -> None:
    plain, distilled = planned(small(batch_size=64)), planned(small(batch_size=64, distill_weight=1.0))
    tower = 4.0 * plain.parameters["vision tower"]
    assert distilled.flop["step"] - plain.flop["step"] == pytest.approx(plain.flop["tower forward"])
    assert peak_memory(distilled.memory["align"]) - peak_memory(plain.memory["align"]) == tower + 24 * 64**2
    assert distilled.features == 0
    cached = planned(small(batch_size=64, distill_weight=1.0, min_crop_scale=1.0))
    assert cached.flop["step"] == plain.flop["step"] and cached.hours["align"] > plain.hours["align"]
    assert cached.memory["align"]["pretrained tower"] == 0 and cached.features > 0 and cached.images_per_second > 0


def test_comparison_with_an_online_llm() -> None:
    plan = planned()
    step, caption = plan.flop["step"], plan.flop["caption forward"]
    assert plan.online["step"] == pytest.approx((step + caption) / step)
    every = planned(small(captions_per_image=0, epochs=1.0))  # two captions, each once: nothing is saved, nor lost
    assert every.online["hours"] == pytest.approx(1)


def test_device_rate_depends_on_precision() -> None:
    h100, t4 = DEVICES["h100"], DEVICES["t4"]
    assert h100.rate("auto") == h100.rate("bf16") == h100.rate("bf16+3") == 989.5e12 and h100.rate("fp32") == 67e12
    assert t4.rate("auto") == t4.rate("fp32") == 8.1e12


def test_machine_uses_the_given_numbers_or_the_table() -> None:
    assert Machine("H100", memory=40).device_spec.memory == 40
    assert Machine("cpu", tflops=1.5, memory=24).device_spec.rate("fp32") == 1.5e12
    with pytest.raises(ValueError, match="t4 does not support bf16"):
        DEVICES["t4"].rate("bf16")
    with pytest.raises(ValueError, match=r"--device must be one of h100, .*--tflops"):
        Machine("cpu", memory=24)
    with pytest.raises(ValueError, match="--tflops must be greater than 0"):
        Machine("h100", tflops=0)


@pytest.mark.parametrize(("name", "value"), [("mfu", 0), ("mfu", 2), ("images", 0), ("count", -1)])
def test_plan_rejects_values_out_of_range(name: str, value: float) -> None:
    values: dict[str, Any] = {"images": 10, "count": 1, "mfu": 0.4, name: value}
    with pytest.raises(ValueError, match=f"--{name} must be"):
        plan_fit(SMALL, Machine("l4", values["count"], values["mfu"]), values["images"], 1, 9)


def test_format_plan_shows_tables_and_suggestions() -> None:
    page = format_plan(planned())
    for part in ("134,515,008", "GFLOP", "peak", "Embedding store", "Without the store", "(MFU)", "not measured"):
        assert part in page
    assert "OUT OF MEMORY" not in page
    page = format_plan(planned(small(batch_size=16384), "l4"))
    assert "OUT OF MEMORY in align" in page and "would fit: --align.gradient_checkpointing true" in page
    untouched = dataclasses.replace(SMALL, tune=TuneConfig(steps=0))
    assert "tune" not in planned(untouched).memory and format_plan(planned(untouched))
