"""What `plan` says: counts against the models themselves, formulas against counters, memory against a real backward
pass, and settings that it names as a way out against itself."""

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

from llm2clip.config import AlignConfig, EncoderConfig, FitConfig, LlavaConfig, TuneConfig
from llm2clip.models.llm2clip import LLM2CLIP, LLM2CLIPConfig
from llm2clip.models.vision_tower import VisionTower
from llm2clip.tools.plan.activations import SavedTensorBytes
from llm2clip.tools.plan.devices import DEVICES, Machine
from llm2clip.tools.plan.flops import count_flops, image_costs, text_costs
from llm2clip.tools.plan.llava import plan_llava
from llm2clip.tools.plan.memory import align_memory, peak_memory, tune_memory
from llm2clip.tools.plan.model_configs import LLMS, TOWERS, build_llm, build_tower, get_llm_config
from llm2clip.tools.plan.plan import Plan, plan_fit
from llm2clip.tools.plan.report import format_plan

PAPERS = AlignConfig(adapter_depth=4, embed_dim=1280, captions_per_image=1, precision="bf16")
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


def planned(recipe: FitConfig = SMALL, device: str = "h100", count: int = 1, **more: Any) -> Plan:
    return plan_fit(recipe, Machine(device, count, **more), 10_000, 2, 30)


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
def test_language_models_have_their_parameters(name: str, parameters: int) -> None:
    found = text_costs(EncoderConfig(path=name), TuneConfig(), "bf16")
    assert (
        found.parameters
        == parameters
        == sum(p.numel() for p in build_llm(get_llm_config(EncoderConfig(name))).parameters())
    )


@pytest.mark.parametrize(
    ("tower", "parameters"),
    [("openai/clip-vit-large-patch14-336", 578_587_905), ("openai/clip-vit-base-patch16", 360_552_193)],
)
def test_the_papers_models_have_their_published_parameters(tower: str, parameters: int) -> None:
    found = image_costs(dataclasses.replace(PAPERS, tower=tower), 4096, 1)
    assert found.trained == found.tower + found.projection + found.adapter + 1 == parameters
    assert found.adapter == 273_769_728


def test_lora_is_on_the_layers_that_were_named() -> None:
    """Of Qwen2.5-0.5B, 24 blocks: queries 896 to 896, values 896 to 128."""
    some, all_of_them = (
        text_costs(EncoderConfig("qwen/qwen2.5-0.5b"), TuneConfig(lora_r=16, lora_targets=targets), "bf16")
        for targets in (["q_proj", "v_proj"], "all-linear")
    )
    assert some.trained == 24 * 16 * (896 + 896 + 896 + 128) < all_of_them.trained
    assert some.kept_per_token < all_of_them.kept_per_token


@pytest.mark.parametrize(
    ("llm", "parameters"),
    [("qwen/qwen2.5-0.5b", 494_032_768), ("smollm2-135m", 134_515_008), ("lmsys/vicuna-7b-v1.5", 6_738_415_616)],
)
def test_a_head_that_is_the_table_of_tokens_counts_once(llm: str, parameters: int) -> None:
    many = dict.fromkeys(("pretrain", "instruct"), 1000)
    found = plan_llava(LlavaConfig(), Machine("h100"), llm, "openai/clip-vit-base-patch32", None, many, many)
    assert found.parameters["language model"] == parameters


def test_features_of_both_stages_are_kept_or_of_neither() -> None:
    many, said = dict.fromkeys(("pretrain", "instruct"), 200_000), dict.fromkeys(("pretrain", "instruct"), 300)

    def towers(gigabytes: float) -> list[bool]:
        recipe = LlavaConfig(cache_gb=gigabytes)
        found = plan_llava(recipe, Machine("h100"), "smollm2-135m", "openai/clip-vit-base-patch32", None, many, said)
        return ["tower" in parts for parts in found.memory.values()]

    assert towers(20) == [True, True] and towers(31) == [False, False]  # 15 GB each


def test_every_name_in_the_tables_is_built() -> None:
    for name in LLMS:
        assert get_llm_config(EncoderConfig(name)).num_hidden_layers > 1
    for name, (_, size) in TOWERS.items():
        assert build_tower(AlignConfig(tower=name)).preprocess.size == size


def test_fewer_blocks_and_numbers_of_a_vector() -> None:
    found = text_costs(EncoderConfig("smollm2-135m", layers=12, truncate_dim=256), TuneConfig(lora_r=0), "fp32")
    assert found.layers == 12 and found.width == 256
    assert found.trained == found.parameters - 49_152 * 576


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(ValueError, match=r"--encoder\.path no/such: .*meta-llama/llama-3\.2-1b"):
        text_costs(EncoderConfig("no/such"), TuneConfig(), "fp32")
    with pytest.raises(ValueError, match=r"--align\.tower no/such: .*openai/clip-vit-base-patch16"):
        build_tower(AlignConfig(tower="no/such"))


# ---- products -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tower", "gigaflop"),
    [("large-patch14-336", 1144), ("large-patch14", 485), ("base-patch16", 105)],
)
def test_a_training_step_of_the_papers_towers(tower: str, gigaflop: float) -> None:
    recipe = dataclasses.replace(PAPERS, tower=f"openai/clip-vit-{tower}")
    found = image_costs(recipe, 4096, 1)
    heads = 3 * found.heads_forward
    assert (found.tower_forward + found.heads_forward + found.backward - heads) / 1e9 == pytest.approx(
        gigaflop, rel=0.01
    )


@pytest.mark.parametrize(("name", "gigaflop"), [("llama-3.1-8b", 1172), ("llama-3.2-1b", 164)])
def test_a_caption_through_the_papers_language_models(name: str, gigaflop: float) -> None:
    found = text_costs(EncoderConfig(f"meta-llama/{name}"), TuneConfig(), "bf16")
    assert found.forward(84) / 1e9 == pytest.approx(gigaflop, rel=0.01)


@pytest.mark.parametrize("rank", [0, 8])
def test_formulas_of_the_language_model_against_a_counter(rank: int, tmp_path: Path) -> None:
    TINY.save_pretrained(tmp_path)
    tune, tokens = TuneConfig(lora_r=rank), 40
    found = text_costs(EncoderConfig(str(tmp_path)), tune, "fp32")
    with torch.device("meta"):
        llm = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path))
        ids = torch.zeros(1, tokens, dtype=torch.long)
    llm.config.is_causal, llm.config.use_cache = False, False
    near = 1e-6 if Version(torch.__version__) >= Version("2.13") else 1e-4  # torch 2.10 counts a bit more
    assert count_flops(lambda: llm(input_ids=ids)) == pytest.approx(found.forward(tokens), rel=near)
    if rank:
        with torch.device("meta"):
            llm = get_peft_model(llm, LoraConfig(r=rank, target_modules="all-linear"))
    llm.get_input_embeddings().requires_grad_(False)
    assert sum(p.numel() for p in llm.parameters() if p.requires_grad) == found.trained
    # Recomputing, or whatever comes before the first block, makes it give gradients by what goes in.
    llm.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    out = llm(input_ids=ids).last_hidden_state.sum()
    assert count_flops(out.backward) == pytest.approx(found.backward(tokens, rank > 0))
    step, forward = found.step(tokens, tune), found.forward(tokens)
    again = dataclasses.replace(tune, gradient_checkpointing=True, grad_cache=True)
    assert found.step(tokens, again) - step == pytest.approx(
        2 * (forward + (2 * found.trained * tokens if rank else 0))
    )


def test_convolutions_in_groups_are_not_counted_as_one() -> None:
    for groups in (1, 8):
        layer = nn.Conv2d(8, 16, 3, groups=groups, device="meta")
        x = torch.zeros(2, 8, 10, 10, device="meta", requires_grad=True)
        forward = count_flops(lambda layer=layer, x=x: layer(x))
        assert forward == 2 * 2 * 16 * 8 * 8 * 8 * 9 / groups
        assert count_flops(layer(x).sum().backward) == 2 * forward


def test_what_is_frozen_costs_no_backward_pass() -> None:
    recipe = dataclasses.replace(PAPERS, tower="test_vit", embed_dim=64)
    learns = image_costs(recipe, 96, 2)
    frozen = image_costs(dataclasses.replace(recipe, tower_lr=0), 96, 2)
    cached = image_costs(dataclasses.replace(recipe, tower_lr=0, cache_features=True), 96, 2)
    lora = image_costs(dataclasses.replace(recipe, lora_r=4), 96, 2)
    some = image_costs(dataclasses.replace(recipe, train_layers=1), 96, 2)
    assert frozen.backward == cached.backward < 2 * frozen.heads_forward
    assert frozen.backward < some.backward < learns.backward
    assert frozen.backward < lora.backward < learns.backward
    assert frozen.kept <= some.kept < learns.kept
    assert frozen.trained < lora.trained < learns.trained
    one, more, two = (image_costs(dataclasses.replace(recipe, tower_lr=0), 96, n) for n in (1, 1.25, 2))
    for name in ("heads_forward", "backward", "kept"):
        low, middle, high = (getattr(work, name) for work in (one, more, two))
        assert middle == pytest.approx(low + 0.25 * (high - low)), name


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_autograd_keeps_is_what_a_real_pass_keeps(precision: str) -> None:
    recipe = AlignConfig(tower="test_vit", embed_dim=32, precision=precision)  # type: ignore[arg-type]
    tower = VisionTower.from_pretrained("test_vit", pretrained=False)
    model = LLM2CLIP(LLM2CLIPConfig(tower.config, 48, 32, adapter_depth=1), tower).train()
    kept = []
    for images in (1, 2):
        seen = SavedTensorBytes(model)
        size = tower.preprocess.size
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), seen.hooks:
            out = model(torch.zeros(images, 3, size, size, dtype=torch.uint8), torch.ones(images, 48))
        kept.append(seen.bytes)
        del out
    found = image_costs(recipe, 48, 1)
    assert found.kept == pytest.approx(kept[1] - kept[0], rel=0.01)
    assert found.copies == pytest.approx(2 * kept[0] - kept[1], rel=0.01, abs=64)


def test_settings_change_the_memory_of_align_as_they_should() -> None:
    recipe = dataclasses.replace(SMALL.align, batch_size=1024)
    found = image_costs(recipe, 64, 1)

    def align(count: int = 1, shared_out: bool = False, **settings: object) -> dict[str, float]:
        return align_memory(found, dataclasses.replace(recipe, **settings), 1, 64, count, shared_out)

    assert (
        peak_memory(align(micro_batch=64))
        < peak_memory(align(recompute=True))
        < peak_memory(align())
        < peak_memory(align(ema=0.99))
    )
    assert align(8)["gradients"] == 2 * align()["gradients"]
    several, shared = align(8), align(8, True)
    assert shared["AdamW"] * 8 == several["AdamW"] and shared["model"] * 8 == several["model"]


def test_settings_change_the_memory_of_tune_as_they_should() -> None:
    recipe = TuneConfig(precision="bf16", batch_size=64)
    found = text_costs(EncoderConfig(), recipe, "bf16")

    def tune(**settings: object) -> dict[str, float]:
        return tune_memory(found, dataclasses.replace(recipe, **settings), 30, "bf16", 1)

    assert tune(quantize=True)["LLM"] < tune()["LLM"] < tune(lora_r=0)["LLM"]
    assert tune(quantize=True)["loading"] == 0 < tune()["loading"]
    assert tune(recompute=True)["activations"] < tune()["activations"]
    assert tune(grad_cache=True, batch_tokens=512)["activations"] < tune()["activations"]


@pytest.mark.parametrize("too_much", ["activations", "weights"])
def test_every_way_out_fits(too_much: str, tmp_path: Path) -> None:
    TINY.save_pretrained(tmp_path)
    memory, align = 2, AlignConfig(tower="test_vit", batch_size=2048, captions_per_image=1)
    recipe = FitConfig(
        encoder=EncoderConfig(str(tmp_path)), tune=TuneConfig(batch_size=4096, precision="bf16"), align=align
    )
    if too_much == "weights":
        memory, tune = 6, TuneConfig(batch_size=8, lora_r=0, precision="bf16")
        align = dataclasses.replace(align, adapter_expansion=200, batch_size=8)
        recipe = FitConfig(encoder=EncoderConfig("Qwen/Qwen2.5-0.5B"), tune=tune, align=align)
    found = planned(recipe, count=8, memory=memory)
    assert not found.fits["tune"] and not found.fits["align"]
    assert found.ways_out["tune"] and found.ways_out["align"]
    assert ("--use_fsdp" in dict(found.ways_out["align"])) == (too_much == "weights")
    for stage, ways in found.ways_out.items():
        for name, size in ways:
            words = [word for word in name.split() if word != "--use_fsdp"]
            options = dict(zip(words[::2], words[1::2], strict=True))
            change = {k.split(".")[1]: True if v == "true" else int(v) for k, v in options.items()}
            changed = dataclasses.replace(recipe, **{stage: dataclasses.replace(getattr(recipe, stage), **change)})
            again = planned(changed, count=8, memory=memory, use_fsdp="--use_fsdp" in name)
            assert again.fits[stage], name
            assert peak_memory(again.memory[stage]) == pytest.approx(size)


# ---- hours ----------------------------------------------------------------------------------------------------------


def test_hours_are_products_over_rate() -> None:
    recipe = small(epochs=3, precision="bf16")
    found = planned(recipe, mfu=0.5, tflops=100)
    assert found.hours["align"] * 3600 == pytest.approx(10_000 * 3 * found.flop["step"] / (0.5 * 100e12))
    assert found.hours["embed"] * 3600 == pytest.approx(20_000 * found.flop["caption forward"] / (0.5 * 100e12))
    tune = recipe.tune
    assert found.hours["tune"] * 3600 == pytest.approx(
        2 * tune.steps * tune.batch_size * found.flop["caption tune"] / (0.5 * 100e12)
    )
    assert found.decoded == pytest.approx(30_000 / (3600 * found.hours["align"]))
    assert found.store == 20_000 * (576 * 2 + 16)
    int8 = dataclasses.replace(recipe, embed=dataclasses.replace(recipe.embed, dtype="int8"))
    assert planned(int8).store == 20_000 * (576 + 4 + 16)


def test_passes_that_are_made_again_are_counted() -> None:
    found = planned(small(batch=64))
    both = planned(small(batch=64, micro_batch=16, recompute=True))
    assert found.flop["image again"] == 0
    assert both.flop["image again"] == pytest.approx(2 * found.flop["tower forward"], rel=0.35)
    cached = planned(small(batch=64, tower_lr=0.0, cache_features=True))
    assert cached.flop["step"] < 0.1 * found.flop["step"]
    assert cached.features == 10_000 * (2 * cached.recipe.align.captions_per_image * 64 + 16) and cached.decoded == 0
    heads = planned(small(batch=64, head_epochs=5))
    assert found.hours["align"] < heads.hours["align"] < 2 * found.hours["align"]


def test_caching_against_an_online_language_model() -> None:
    found = planned()
    step, caption = found.flop["step"], found.flop["caption forward"]
    assert found.online["step"] == pytest.approx((step + caption) / step)
    every = planned(small(captions=0, epochs=1.0))  # two captions, each once: nothing is saved, nor lost
    assert every.online["hours"] == pytest.approx(1)


def test_precision_decides_the_rate() -> None:
    h100, t4 = DEVICES["h100"], DEVICES["t4"]
    assert h100.rate("auto") == h100.rate("bf16") == h100.rate("bf16+3") == 989.5e12 and h100.rate("fp32") == 67e12
    assert t4.rate("auto") == t4.rate("fp32") == 8.1e12


def test_devices() -> None:
    assert Machine("H100", memory=40).each.memory == 40
    assert Machine("cpu", tflops=1.5, memory=24).each.rate("fp32") == 1.5e12
    with pytest.raises(ValueError, match="t4 has no bf16"):
        DEVICES["t4"].rate("bf16")
    with pytest.raises(ValueError, match=r"--device cpu is not one of h100, .*--tflops"):
        Machine("cpu", memory=24)
    with pytest.raises(ValueError, match="--tflops is more than 0"):
        Machine("h100", tflops=0)


@pytest.mark.parametrize(("name", "value"), [("mfu", 0), ("mfu", 2), ("images", 0), ("count", -1)])
def test_numbers_that_make_no_sense(name: str, value: float) -> None:
    given: dict[str, Any] = {"images": 10, "count": 1, "mfu": 0.4, name: value}
    with pytest.raises(ValueError, match=f"--{name} is"):
        plan_fit(SMALL, Machine("l4", given["count"], given["mfu"]), given["images"], 1, 9)


def test_the_page() -> None:
    page = format_plan(planned())
    for part in ("134,515,008", "GFLOP", "most at once", "Store", "instead of a store", "(MFU)", "not measured"):
        assert part in page
    assert "OUT OF MEMORY" not in page
    page = format_plan(planned(small(batch=8192), "l4"))
    assert "OUT OF MEMORY in align" in page and "would fit: --align.gradient_checkpointing true" in page
    untouched = dataclasses.replace(SMALL, tune=TuneConfig(steps=0))
    assert "tune" not in planned(untouched).memory and format_plan(planned(untouched))
