"""Construction of untrained LLaVA models from a vision tower, a randomly initialised projector and a causal LLM.

As in LLaVA-1.5 (arXiv 2310.03744), patch features from the tower's second-to-last layer are mapped by a two-layer
projector to embeddings that replace the `<image>` tokens in the LLM's input. The model class depends on the tower:

- Towers from transformers: `LlavaForConditionalGeneration`.
- Convolutional towers from timm: `FastVlmForConditionalGeneration`, which uses the tower's last feature map.
- Vision transformers from timm: `PatchLlava`, because transformers' LLaVA classes do not support such towers. Loading
  a `PatchLlava` without llm2clip requires `trust_remote_code=True`.

All models can be loaded with `AutoModelForImageTextToText.from_pretrained` and `pipeline("image-text-to-text")`, even
without llm2clip.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm2clip.io_utils import atomic_dir
from llm2clip.llava import modeling_patches
from llm2clip.llava.conversations import IMAGE_TOKEN, find_end_of_turn_token, get_chat_template
from llm2clip.models.export.transformers import build_vision_model
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.loading import load_transformers_config
from llm2clip.models.model_folder import is_model_folder
from llm2clip.models.pretrained import resolve_pretrained_name
from llm2clip.models.vision.vision_tower import VisionTower


def load_vision_tower(name: str, image_size: int | None = None) -> VisionTower:
    """Load the vision tower from an LLM2CLIP model folder, or a pretrained tower (see `VisionTower.from_pretrained`).

    Raises:
        ValueError: `image_size` (pixels) differs from the LLM2CLIP model's training resolution.
    """
    if not is_model_folder(name):
        return VisionTower.from_pretrained(name, image_size=image_size)
    tower = LLM2CLIP.from_pretrained(name, device="cpu").tower
    trained_size = tower.preprocess.size
    if image_size not in (None, trained_size):
        raise ValueError(f"{name} was trained at {trained_size} pixels: --image_size must be {trained_size} or unset")
    return tower


def build_llava(tower: VisionTower, llm: str, out: str | Path, seed: int = 0, pad: bool = True) -> Path:
    """Build an untrained LLaVA model, save it to `out`, and return `out`. Only the projector is randomly initialised.

    The tower is converted to the LLM's dtype. The saved model is reloaded to check that its logits for a sample text
    match those of the LLM. If the check fails, `out` is not created.

    Args:
        llm: Folder, hub id or short name of a causal LLM with a tokenizer. Its dtype is not changed.
        seed: Random seed for the initialisation of the projector.
        pad: Pad images to squares, as in LLaVA-1.5. If False, use the tower's own preprocessing, which may include a
            centre crop.

    Raises:
        ValueError: The LLM has no language modelling head, or transformers' LLaVA classes do not support the tower or
            the head.
        FileExistsError: `out` already exists.
    """
    from transformers import AutoTokenizer

    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} already exists. Choose another folder")
    llm = resolve_pretrained_name(llm)
    tokenizer = AutoTokenizer.from_pretrained(llm, trust_remote_code=False)
    decoder = load_causal_llm(llm)
    text_ids = tokenizer("A photograph of a dog and two cats.", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        expected_logits = decoder(input_ids=text_ids).logits.float()
    model, processor = assemble_llava(tower, decoder, tokenizer, seed, pad)
    with atomic_dir(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        del model, decoder
        _check_saved_model(folder, llm, text_ids, expected_logits)
    return out


def load_causal_llm(name: str) -> Any:
    """Load a causal LLM in the dtype of its checkpoint. Raise ValueError if any weights are missing."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        name, config=load_transformers_config(name), dtype="auto", trust_remote_code=False, output_loading_info=True
    )
    llm, loading_info = loaded
    missing = sorted(loading_info["missing_keys"])
    if missing:
        raise ValueError(f"{name} is not a complete causal LLM: its checkpoint has no {', '.join(missing[:3])}")
    return llm


def assemble_llava(tower: VisionTower, llm: Any, tokenizer: Any, seed: int = 0, pad: bool = True) -> tuple[Any, Any]:
    """Build a LLaVA model and its processor. The LLM and the tokenizer are modified in place."""
    modeling_patches.register_llava_classes()
    vision = _convert_vision_tower(tower)
    num_patches, num_registers = _count_image_tokens(vision, tower.preprocess.size)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if len(tokenizer) > llm.get_input_embeddings().num_embeddings:
        llm.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    end_token = find_end_of_turn_token(tokenizer)
    model = _create_llava_model(vision, llm, tokenizer, num_image_tokens=num_patches + num_registers, seed=seed)
    model.generation_config = _make_generation_config(llm, tokenizer, end_token)
    processor = _build_processor(tower, model, tokenizer, num_patches, num_registers, pad)
    return model.eval(), processor


def _convert_vision_tower(tower: VisionTower) -> Any:
    """Copy a tower to a transformers model on the CPU, in float32 and in eval mode.

    Vision transformers from timm are copied to a `PatchTower`. Position embeddings are interpolated to the tower's
    input size here, because transformers' LLaVA classes do not interpolate position embeddings.
    """
    backbone: Any = tower.backbone
    if tower.config["library"] == "timm" and hasattr(getattr(backbone, "patch_embed", None), "num_patches"):
        config = modeling_patches.PatchTowerConfig(
            architecture=tower.config["architecture"],
            model_args={name: value for name, value in tower.config["args"].items() if name != "num_classes"},
            hidden_size=backbone.embed_dim,
        )
        patch_tower = modeling_patches.PatchTower(config)
        patch_tower.timm_model.load_state_dict(
            {name: tensor.detach().cpu() for name, tensor in backbone.state_dict().items()}
        )
        return patch_tower.float().eval()
    vision = build_vision_model(tower)
    size = tower.preprocess.size
    kind = vision.config.model_type
    if kind in ("clip_vision_model", "siglip_vision_model") and vision.config.image_size != size:
        _resize_position_embeddings(vision, size)
    return vision


def _count_image_tokens(vision: Any, size: int) -> tuple[int, int]:
    """Return the number of patch tokens and the number of register tokens per image in the LLM's input.

    Raises:
        ValueError: transformers' LLaVA classes do not support the tower's features.
    """
    kind = vision.config.model_type
    pixels = torch.zeros(1, 3, size, size)
    if isinstance(vision, modeling_patches.PatchTower):
        try:
            with torch.inference_mode():
                features = vision(pixels).hidden_states[-2]  # (1, patches, width)
        except (AssertionError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"{vision.config.architecture} does not return patch features for each block: {error}"
            ) from error
        return int(features.shape[1]), 0
    if kind == "timm_wrapper":
        with torch.inference_mode():
            features = vision(pixels).last_hidden_state  # (1, channels, rows, columns)
        if features.ndim != 4 or features.shape[1] != vision.timm_model.num_features:
            raise ValueError(
                f"{vision.config.architecture} does not return a channels-first feature map. Use a convolutional "
                "network or vision transformer from timm, or a CLIP, SigLIP or DINO tower from transformers"
            )
        return features.shape[2] * features.shape[3], 0
    return (size // vision.config.patch_size) ** 2, getattr(vision.config, "num_register_tokens", 0)


def _resize_position_embeddings(vision: Any, size: int) -> None:
    embeddings = vision.embeddings
    old = embeddings.position_embedding.weight  # (class tokens + patches, width)
    patch_size = vision.config.patch_size
    num_patches = (size // patch_size) ** 2
    class_tokens = len(old) - (vision.config.image_size // patch_size) ** 2
    dummy = torch.zeros(1, num_patches + class_tokens, old.shape[1])
    with torch.no_grad():
        new = embeddings.interpolate_pos_encoding(dummy, size, size)[0]
    embeddings.position_embedding = nn.Embedding.from_pretrained(new.contiguous(), freeze=False)
    embeddings.image_size = vision.config.image_size = size
    embeddings.num_patches = num_patches
    embeddings.num_positions = len(new)
    embeddings.register_buffer("position_ids", torch.arange(len(new)).expand((1, -1)), persistent=False)


def _create_llava_model(vision: Any, llm: Any, tokenizer: Any, *, num_image_tokens: int, seed: int) -> Any:
    from transformers import FastVlmConfig, FastVlmForConditionalGeneration, LlavaConfig, LlavaForConditionalGeneration

    arguments: dict[str, Any] = {
        "vision_config": vision.config,
        "text_config": llm.config,
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        "image_seq_length": num_image_tokens,
        "tie_word_embeddings": llm.config.tie_word_embeddings,
    }
    config_class: Any = LlavaConfig
    model_class: Any = LlavaForConditionalGeneration
    if vision.config.model_type == "timm_wrapper":
        vision.config.hidden_size = vision.timm_model.num_features
        config_class, model_class = FastVlmConfig, FastVlmForConditionalGeneration
    else:
        has_class_token = vision.config.model_type not in ("siglip_vision_model", "llm2clip_patches")
        arguments["vision_feature_layer"] = -2
        arguments["vision_feature_select_strategy"] = "default" if has_class_token else "full"
        if isinstance(vision, modeling_patches.PatchTower):
            config_class, model_class = modeling_patches.PatchLlavaConfig, modeling_patches.PatchLlava
    config = config_class(**arguments)
    with torch.device("meta"):  # avoids allocating weights that will be replaced
        model = model_class(config)
    model.model.vision_tower = vision
    model.model.language_model = llm.get_decoder()
    model.lm_head = llm.get_output_embeddings()
    torch.manual_seed(seed)
    model.model.multi_modal_projector = type(model.model.multi_modal_projector)(config)
    model.config.dtype = llm.dtype
    return model.to(llm.dtype)


def _make_generation_config(llm: Any, tokenizer: Any, end_token: int) -> Any:
    """Return the LLM's generation config, with the chat template's end-of-turn token as an additional EOS token."""
    from transformers import GenerationConfig

    config = GenerationConfig.from_model_config(llm.config)
    llm_eos = llm.generation_config.eos_token_id
    end_tokens = {tokenizer.eos_token_id, end_token, *(llm_eos if isinstance(llm_eos, list) else [llm_eos])}
    config.update(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(token for token in end_tokens if token is not None),
        pad_token_id=tokenizer.pad_token_id,
    )
    return config


def _build_processor(
    tower: VisionTower, model: Any, tokenizer: Any, num_patches: int, num_registers: int, pad: bool
) -> Any:
    from transformers import LlavaImageProcessor, LlavaProcessor

    size = tower.preprocess.size
    patch_size = size // math.isqrt(num_patches)
    if (size // patch_size) ** 2 != num_patches:
        raise ValueError(
            f"the tower returns {num_patches} patches for {size} x {size} pixels. The patches must form a square grid, "
            "because LlavaProcessor computes the number of image tokens as (size // patch_size)^2. Use another tower"
        )
    settings = tower.preprocess.to_dict() | {"image_processor_type": "LlavaImageProcessor"}
    settings["do_pad"] = pad and tower.preprocess.resize == "shortest"
    strategy = model.config.vision_feature_select_strategy
    return LlavaProcessor(
        image_processor=LlavaImageProcessor.from_dict(settings),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=num_registers + (strategy == "default"),  # "default" removes the class token
        image_token=IMAGE_TOKEN,
        chat_template=get_chat_template(tokenizer),
    )


def _check_saved_model(folder: Path, llm: str, text_ids: torch.Tensor, expected_logits: torch.Tensor) -> None:
    """Reload a saved model, check that its logits for a text match those of the LLM, and run it on an image."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", trust_remote_code=False).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    with torch.inference_mode():
        # The vocabulary of the model may be larger than that of the LLM, due to the image token and padding.
        logits = model(input_ids=text_ids).logits.float()[..., : expected_logits.shape[-1]]
        tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
        has_shape = logits.shape == expected_logits.shape
        if not has_shape or (logits - expected_logits).norm() > tolerance * expected_logits.norm():
            raise ValueError(
                f"{llm} is not supported, because its logits differ in a LLaVA model: transformers' LLaVA classes do "
                "not support output biases or scaled logits. Use another LLM"
            )
        inputs = processor(images=Image.new("RGB", (64, 48)), text=IMAGE_TOKEN, return_tensors="pt")
        model(**inputs.to(model.dtype))
