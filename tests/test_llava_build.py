"""Tests of building LLaVA models from vision towers and LLMs."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import make_llm
from llava_fixtures import load_model, load_tokenizer, make_vision_tower
from llm2clip import LLM2CLIP
from llm2clip.cli import main
from llm2clip.data.image_refs import FileImage
from llm2clip.data.skip_log import SkipLog
from llm2clip.llava import LlavaConfig
from llm2clip.llava.build import assemble_llava, build_llava, load_causal_llm
from llm2clip.llava.conversations import IMAGE_TOKEN, Conversation
from llm2clip.llava.dataset import LlavaTransform
from llm2clip.llava.train import train_llava
from llm2clip.models.vision.vision_tower import VisionTower
from search_fixtures import make_model
from test_export import hf_tower, run_without_llm2clip, timm_tower

TOWERS = ["timm", "timm transformer", "clip_vision_model", "resized clip", "siglip_vision_model", "dinov2"]


@pytest.mark.parametrize("kind", TOWERS)
def test_build_llava_replaces_image_tokens_by_projected_patches(
    kind: str, llm: Path, image_folder: Path, tmp_path: Path
) -> None:
    """The logits equal those computed from the parts: patch features before the last block, projector, text, LLM."""
    tower = make_vision_tower(kind, tmp_path)
    model, processor = load_model(build_llava(tower, str(llm), tmp_path / "built"))
    image = Image.open(image_folder / "3.png").convert("RGB").crop((4, 0, 44, 40))
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**inputs).logits
        patches = reference_patches(kind, tower, inputs["pixel_values"])
        projector = model.model.multi_modal_projector
        hidden = F.gelu(F.linear(patches, projector.linear_1.weight, projector.linear_1.bias))
        projected = F.linear(hidden, projector.linear_2.weight, projector.linear_2.bias)
        embeddings = model.get_input_embeddings()(inputs["input_ids"])[0]
        image_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        positions = (inputs["input_ids"][0] == image_id).nonzero()[:, 0]
        assert len(positions) == patches.shape[1] == model.config.image_seq_length
        embeddings = torch.cat([embeddings[: positions[0]], projected[0], embeddings[positions[-1] + 1 :]])
        hidden_states = model.model.language_model(inputs_embeds=embeddings[None]).last_hidden_state
        expected = hidden_states @ model.get_input_embeddings().weight.T
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert generated.shape[1] <= inputs["input_ids"].shape[1] + 3


def reference_patches(kind: str, tower: VisionTower, pixels: torch.Tensor) -> torch.Tensor:
    """Compute patch features with the tower's own backbone."""
    backbone: Any = tower.backbone
    if kind == "timm":
        features: torch.Tensor = backbone.forward_features(pixels)
        return features.flatten(2).mT
    if kind == "timm transformer":
        block_inputs: list[torch.Tensor] = []
        backbone.blocks[-1].register_forward_pre_hook(lambda _, args: block_inputs.append(args[0]))
        backbone(pixels)
        return block_inputs[0][:, backbone.num_prefix_tokens :]
    interpolate = tower.preprocess.size != 32 and kind != "dinov2"
    options: dict[str, Any] = {"interpolate_pos_encoding": True} if interpolate else {}
    states: torch.Tensor = backbone(pixel_values=pixels, output_hidden_states=True, **options).hidden_states[-2]
    return states if kind == "siglip_vision_model" else states[:, 1:]


def test_build_llava_works_with_the_transformers_pipeline(llm: Path, image_folder: Path, tmp_path: Path) -> None:
    from transformers import pipeline

    folder = build_llava(timm_tower(76), str(llm), tmp_path / "built")
    messages = [{"role": "user", "content": [{"type": "image", "path": str(image_folder / "1.png")}]}]
    output = pipeline("image-text-to-text", model=str(folder))(text=messages, max_new_tokens=4)
    assert output[0]["generated_text"][-1]["role"] == "assistant"


@pytest.mark.parametrize("kind", ["timm", "siglip_vision_model"])
def test_llava_transform_matches_the_processor(kind: str, llm: Path, image_folder: Path, tmp_path: Path) -> None:
    tower = timm_tower(76) if kind == "timm" else hf_tower(tmp_path, kind, 40)
    processor = assemble_llava(tower, load_causal_llm(str(llm)), load_tokenizer(llm))[1]
    assert processor.image_processor.to_dict()["do_pad"] is (kind == "timm")
    image = Image.open(image_folder / "1.png").convert("RGB")
    for variant in (image.crop((4, 0, 44, 40)), image):  # a square and a wide image
        pixels = LlavaTransform(processor)(torch.tensor(np.asarray(variant)).permute(2, 0, 1))
        expected = processor.image_processor(variant, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(pixels, expected, atol=0.02, rtol=0)
    unpadded = assemble_llava(tower, load_causal_llm(str(llm)), load_tokenizer(llm), pad=False)[1]
    assert not unpadded.image_processor.to_dict()["do_pad"]


def test_build_llava_rejects_llms_with_scaled_logits(tmp_path: Path) -> None:
    """Cohere scales its logits, which the LLaVA classes do not."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    make_llm(tmp_path / "llm")  # for its tokenizer
    config = AutoConfig.for_model(
        "cohere", vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, logit_scale=0.25, pad_token_id=0, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "cohere")
    load_tokenizer(tmp_path / "llm").save_pretrained(tmp_path / "cohere")
    with pytest.raises(ValueError, match="its logits differ"):
        build_llava(timm_tower(64), str(tmp_path / "cohere"), tmp_path / "built")
    assert not (tmp_path / "built").exists()


def test_build_llava_rejects_towers_without_a_patch_grid(llm: Path, tmp_path: Path) -> None:
    hierarchical = VisionTower.from_pretrained("swin_tiny_patch4_window7_224", pretrained=False)
    with pytest.raises(ValueError, match="does not return patch features for each block"):
        build_llava(hierarchical, str(llm), tmp_path / "built")
    assert not (tmp_path / "built").exists()


def test_generation_config_stops_at_the_end_token_of_the_template(llm: Path) -> None:
    tokenizer = load_tokenizer(llm)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|stop|>"]}, replace_extra_special_tokens=False)
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}<|stop|>{% endfor %}"
    decoder = load_causal_llm(str(llm))
    decoder.generation_config.eos_token_id = [0, 7]
    model, processor = assemble_llava(timm_tower(64), decoder, tokenizer)
    stop = processor.tokenizer.convert_tokens_to_ids("<|stop|>")
    assert model.generation_config.eos_token_id == sorted([0, 7, stop])


def test_build_command_uses_the_tower_of_an_llm2clip_model(
    llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_folder = make_model(tmp_path)
    command = ["llava", "build", "--vision", str(model_folder), "--llm", str(llm), "--out"]
    assert main([*command, str(tmp_path / "built")]) == 0
    assert "1 tokens per image" in capsys.readouterr().out
    weights = load_model(tmp_path / "built")[0].model.vision_tower.timm_model.state_dict()
    for name, tensor in LLM2CLIP.from_pretrained(model_folder).tower.backbone.state_dict().items():
        assert torch.equal(tensor, weights[name])

    assert main([*command, str(tmp_path / "built")]) == 1
    assert "already exists" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "other"), "--image_size", "96"]) == 1
    assert "was trained at 32 pixels" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_trained_patch_llava_loads_without_llm2clip(llm: Path, image_folder: Path, tmp_path: Path) -> None:
    built = build_llava(make_vision_tower("timm transformer", tmp_path), str(llm), tmp_path / "built")
    file = image_folder / "3.png"
    conversation = Conversation("", FileImage(str(file)), (("What?", "Red."),))
    config = LlavaConfig(pretrain_batch_size=4, micro_batch_size=2, precision="fp32")
    folder = train_llava(str(built), [conversation], [], config=config, out=tmp_path / "run", log=SkipLog())
    model, processor = load_model(folder)
    assert type(model).__module__ == "llm2clip.llava.modeling_patches"
    text = f"<|user|>{IMAGE_TOKEN}What?<|end|>"
    with torch.no_grad():
        image = Image.open(file).convert("RGB")
        expected = model(**processor(images=image, text=text, return_tensors="pt")).logits
    code = f"""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(FOLDER)
    with torch.no_grad():
        results["logits"] = model(**processor(images=images[0], text={text!r}, return_tensors="pt")).logits.numpy()
    """
    outputs = run_without_llm2clip(textwrap.dedent(code), {"trained": folder}, [file], tmp_path)
    torch.testing.assert_close(torch.tensor(outputs["trained"]["logits"]), expected, atol=1e-5, rtol=1e-4)
