"""Conversion of the LLM2CLIP authors' official checkpoints to and from `LLM2CLIP` models.

The architecture is inferred from config.json and the tensor shapes. Each tensor must match a model parameter or a
computed buffer, or have a name that the layout ignores.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor

from llm2clip.data.transforms import PreprocessConfig
from llm2clip.io_utils import atomic_dir, atomic_path
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.model_folder import AdapterConfig, LLM2CLIPConfig
from llm2clip.models.official_layout import (
    EVA,
    HF,
    SIGLIP2,
    OfficialCheckpoint,
    OfficialLayout,
    compute_checkpoint_buffers,
    format_tensor_shapes,
    get_official_name,
    read_official_checkpoint,
)
from llm2clip.models.published_encoders import (
    find_lora_adapter,
    find_published_template,
    load_encoder_with_lora,
    suggest_published_encoders,
)
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.vision.vision_tower import VisionTower

# Absolute tolerance for buffers. Official checkpoints may store cosines and sines in bfloat16, with errors up to 2**-8.
BUFFER_TOLERANCE = 4e-3
SAVED_LAYOUTS = {"hf": HF, "eva": EVA}
# Dimension of the attention heads in the CLIP and EVA-02 towers released with LLM2CLIP.
HEAD_DIM = 64

# Fields of a transformers CLIP vision config that define the architecture.
CLIP_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)
# timm EVA-02 arguments that official checkpoints may set to values other than timm's defaults.
EVA_ARGS = ("num_classes", "img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")

# timm model names, keyed by (patch size, width, depth, MLP width) and then by image size in pixels.
_TIMM_EVA_TOWERS = {
    (16, 768, 12, 2048): {224: "eva02_base_patch16_clip_224"},
    (14, 1024, 24, 2730): {224: "eva02_large_patch14_clip_224", 336: "eva02_large_patch14_clip_336"},
}
_TIMM_SIGLIP_TOWERS = {
    (14, 1152, 27, 4304): {224: "vit_so400m_patch14_siglip_224", 378: "vit_so400m_patch14_siglip_378"},
    (16, 1152, 27, 4304): {size: f"vit_so400m_patch16_siglip_{size}" for size in (256, 384, 512)},
    (16, 1024, 24, 4096): {size: f"vit_large_patch16_siglip_{size}" for size in (256, 384, 512)},
    (16, 768, 12, 3072): {size: f"vit_base_patch16_siglip_{size}" for size in (224, 256, 384, 512)},
}


def load_official_checkpoint(
    source: str | Path, *, text: str | Path | None = None, normalize_input: bool | None = None
) -> LLM2CLIP:
    """Load an official checkpoint as a float32 model on the CPU, in eval mode.

    Args:
        source: Folder, hub id or weight file (see `read_official_checkpoint`).
        text: Caption encoder that the adapter was trained with (see `attach_caption_encoder`). Default: no encoder.
        normalize_input: L2-normalise the input of the adapter. Default: see `infer_model_config`.
    """
    checkpoint = OfficialCheckpoint.from_tensors(str(source), *read_official_checkpoint(source))
    model_config = infer_model_config(checkpoint, normalize_input)
    model = LLM2CLIP(model_config, VisionTower.from_config(model_config.tower)).eval()
    copy_checkpoint_tensors(model, checkpoint)
    if text is not None:
        attach_caption_encoder(model, text, source)
    return model


def attach_caption_encoder(model: LLM2CLIP, path: str | Path, checkpoint: str | Path = "") -> None:
    """Load a caption encoder and attach it to the model.

    `path` is the folder or hub id of a caption encoder, or of a PEFT LoRA adapter, which is merged into its base LLM.
    LLMs released with LLM2CLIP use the published template. Raise ValueError if the embedding size is not `text_dim`.
    """
    if find_lora_adapter(path) is not None:
        encoder = load_encoder_with_lora([path], model.device)
    else:
        encoder = CaptionEncoder.from_pretrained(path, template=find_published_template(path), device=model.device)
    expected = model.config.text_dim
    if encoder.embed_dim != expected:
        suggested = suggest_published_encoders(checkpoint, expected, model.config.tower)
        published = " or ".join(suggested) or f"no published encoder has embeddings of size {expected}"
        raise ValueError(
            f"{path} has embeddings of size {encoder.embed_dim}, but the adapter's input size is {expected}. Pass the "
            f"encoder that the adapter was trained with ({published})"
        )
    model.set_encoder(encoder)


@torch.no_grad()
def copy_checkpoint_tensors(model: LLM2CLIP, checkpoint: OfficialCheckpoint) -> None:
    """Copy a checkpoint's tensors into a model. Raise ValueError if the model has a different architecture."""
    layout = checkpoint.layout
    unused = dict(checkpoint.tensors)
    pairs: list[tuple[Tensor, Tensor]] = []  # (model parameter, checkpoint tensor)
    missing: dict[str, Tensor] = {}
    mismatches: list[str] = []

    for name, parameter in model.state_dict().items():
        official = get_official_name(name, layout, model.config.adapter)
        tensor = unused.pop(official, None)
        if tensor is None:
            missing[official] = parameter
        elif name in ("logit_scale", "logit_bias") and tensor.numel() == 1:
            pairs.append((parameter, tensor.reshape(parameter.shape)))
        elif tensor.shape != parameter.shape or not tensor.is_floating_point():
            mismatches.append(
                f"{official} must be a floating-point tensor of shape {tuple(parameter.shape)} (got {tensor.dtype}, "
                f"{tuple(tensor.shape)})"
            )
        else:
            pairs.append((parameter, tensor))

    for name, expected in compute_checkpoint_buffers(model, layout).items():
        tensor = unused.pop(name, None)
        if tensor is None:
            continue
        if tensor.shape != expected.shape or not torch.allclose(
            tensor.to(expected.dtype), expected, rtol=0, atol=BUFFER_TOLERANCE
        ):
            mismatches.append(f"{name} of shape {tuple(tensor.shape)} does not match the architecture")

    unexpected = {name: tensor for name, tensor in unused.items() if not layout.ignored.match(name)}
    problems = []
    if missing:
        problems.append(f"missing {format_tensor_shapes(missing)}")
    if unexpected:
        problems.append(f"unexpected {format_tensor_shapes(unexpected)}")
    problems += mismatches
    if problems:
        raise ValueError(f"{checkpoint.source} does not match the {layout.name!r} layout: {'; '.join(problems)}")
    for parameter, tensor in pairs:
        parameter.copy_(tensor)


def infer_model_config(checkpoint: OfficialCheckpoint, normalize_input: bool | None = None) -> LLM2CLIPConfig:
    """Infer the model config from a checkpoint's tensor shapes and config.json.

    `normalize_input` specifies whether the adapter L2-normalises its input. As in the LLM2CLIP authors' code, the
    default is False for adapters that were trained with the LLM in the training loop, and True for other adapters.
    """
    layout, prefix = checkpoint.layout, checkpoint.layout.adapter
    adapter, text_dim, embed_dim = AdapterConfig.from_official(
        [name.removeprefix(prefix) for name in checkpoint.tensors if name.startswith(prefix)],
        lambda name: checkpoint.get_shape(prefix + name),
        normalize_input=not checkpoint.online if normalize_input is None else normalize_input,
    )
    tower = _infer_timm_tower(checkpoint, embed_dim) if layout in (EVA, SIGLIP2) else _infer_clip_tower(checkpoint)
    return LLM2CLIPConfig(
        tower=tower,
        text_dim=text_dim,
        embed_dim=embed_dim,
        adapter=adapter,
        projection=layout is not SIGLIP2,
        projection_bias=layout is EVA,
        logit_bias="logit_bias" in checkpoint.tensors,
    )


def _infer_clip_tower(checkpoint: OfficialCheckpoint) -> dict[str, Any]:
    from transformers import CLIPVisionConfig

    vision_config = checkpoint.config.get("vision_config")
    if vision_config:
        model_type = vision_config.get("model_type", "clip_vision_model")
        if model_type != "clip_vision_model":
            raise ValueError(
                f"{checkpoint.source}: the vision tower's model type must be 'clip_vision_model' (got {model_type!r})"
            )
        fields = {key: value for key, value in vision_config.items() if key in CLIP_FIELDS}
    else:  # without a config.json, the tower must have the head dimension and activation function of OpenAI's CLIP
        width, _, patch_size, _ = checkpoint.get_shape("vision_model.embeddings.patch_embedding.weight")
        positions = checkpoint.get_shape("vision_model.embeddings.position_embedding.weight")[0]
        fields = {
            "hidden_size": width,
            "intermediate_size": checkpoint.get_shape("vision_model.encoder.layers.0.mlp.fc1.weight")[0],
            "num_hidden_layers": checkpoint.count_blocks("vision_model.encoder.layers."),
            "num_attention_heads": _compute_num_heads(checkpoint, width, HEAD_DIM),
            "image_size": _compute_grid_size(checkpoint, positions - 1) * patch_size,
            "patch_size": patch_size,
        }
    config = CLIPVisionConfig(**fields)
    architecture: dict[str, Any] = {key: getattr(config, key) for key in CLIP_FIELDS}
    architecture["model_type"] = "clip_vision_model"
    preprocess = _infer_preprocess_config(checkpoint, architecture["image_size"])
    return {"library": "transformers", "architecture": architecture, "preprocess": preprocess}


def _infer_timm_tower(checkpoint: OfficialCheckpoint, embed_dim: int) -> dict[str, Any]:
    is_eva, prefix = checkpoint.layout is EVA, checkpoint.layout.tower
    width, _, patch_size, _ = checkpoint.get_shape(f"{prefix}patch_embed.proj.weight")
    if not is_eva and width != embed_dim:
        raise ValueError(
            f"{checkpoint.source}: the tower's output size ({width}) must equal the adapter's output size "
            f"({embed_dim}), because the {checkpoint.layout.name!r} layout has no image projection"
        )
    positions = checkpoint.get_shape(f"{prefix}pos_embed")[1]
    num_patches = positions - 1 if is_eva else positions  # EVA also has a position embedding for the class token
    image_size = _compute_grid_size(checkpoint, num_patches) * patch_size
    depth = checkpoint.count_blocks(f"{prefix}blocks.")
    hidden = checkpoint.get_shape(f"{prefix}blocks.0.mlp.{'w1' if is_eva else 'fc1'}.weight")[0]
    rotary = checkpoint.tensors.get("visual.rope.freqs_cos")  # shape (positions, head dimension), only for EVA
    head_dim = HEAD_DIM if rotary is None else rotary.shape[-1]

    known_towers = _TIMM_EVA_TOWERS if is_eva else _TIMM_SIGLIP_TOWERS
    name = known_towers.get((patch_size, width, depth, hidden), {}).get(image_size)
    args: dict[str, Any] = {"num_classes": 0, "img_size": image_size}
    if name is None or head_dim != HEAD_DIM:
        name = "eva02_large_patch14_clip_336" if is_eva else "vit_base_patch16_siglip_224"
        heads = _compute_num_heads(checkpoint, width, head_dim)
        args |= {"patch_size": patch_size, "embed_dim": width, "depth": depth, "num_heads": heads}
        # timm rounds width * mlp_ratio down to an integer. Adding 0.5 prevents an off-by-one error.
        args["mlp_ratio"] = (hidden + 0.5) / width
    preprocess = _infer_preprocess_config(checkpoint, image_size)
    return {"library": "timm", "architecture": name, "args": args, "preprocess": preprocess}


def _infer_preprocess_config(checkpoint: OfficialCheckpoint, size: int) -> dict[str, Any]:
    # Default preprocessing in the LLM2CLIP authors' code. timm's default crop for 224-pixel EVA towers is 90%.
    default = PreprocessConfig(size, "shortest", 1.0, "bicubic", OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    return (checkpoint.preprocess or default).to_dict()


def _compute_grid_size(checkpoint: OfficialCheckpoint, patches: int) -> int:
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(
            f"{checkpoint.source} has position embeddings for {patches} patches, which do not form a square grid"
        )
    return side


def _compute_num_heads(checkpoint: OfficialCheckpoint, width: int, head_dim: int) -> int:
    if width % head_dim:
        raise ValueError(
            f"{checkpoint.source}: the tower's width ({width}) must be a multiple of the head dimension ({head_dim})"
        )
    return width // head_dim


def save_official_checkpoint(model: LLM2CLIP, out: str | Path, layout_name: str) -> Path:
    """Save a model atomically as a checkpoint with the tensor names of the LLM2CLIP authors' code. Return `out`.

    The "hf" layout requires a transformers CLIP tower. The checkpoint is a folder with model.safetensors, config.json
    and preprocessor_config.json.

    The "eva" layout requires a timm EVA-02 CLIP tower. The checkpoint is a .pt file with a state dict, including the
    rotary embeddings that the LLM2CLIP authors' code expects, but without a preprocessing config.

    Raises:
        ValueError: The layout is unknown or cannot represent the model.
        FileExistsError: `out` exists.
    """
    out = Path(out)
    layout = SAVED_LAYOUTS.get(layout_name)
    if layout is None:
        raise ValueError(f"layout must be one of {', '.join(SAVED_LAYOUTS)} (got {layout_name!r})")
    _check_layout_supports_model(model, layout)
    if layout is EVA and out.suffix != ".pt":
        raise ValueError(f"a checkpoint in the 'eva' layout is a single file, whose name must end in .pt (got {out})")
    if out.exists():
        raise FileExistsError(f"{out} already exists: choose another path")

    tensors = _build_official_tensors(model, layout)
    if layout is EVA:
        with atomic_path(out) as file:
            torch.save(tensors, file)
        return out
    architecture = model.tower.config["architecture"]
    vision_config = {"model_type": "clip_vision_model"} | {key: architecture[key] for key in CLIP_FIELDS}
    config = {"model_type": "clip", "projection_dim": model.config.embed_dim, "vision_config": vision_config}
    with atomic_dir(out) as folder:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        (folder / "preprocessor_config.json").write_text(json.dumps(model.tower.preprocess.to_dict(), indent=1))
    return out


def _check_layout_supports_model(model: LLM2CLIP, layout: OfficialLayout) -> None:
    config, tower = model.config, model.tower.config
    architecture = tower["architecture"]
    is_timm = tower["library"] == "timm"
    tower_name = f"timm:{architecture}" if is_timm else architecture["model_type"]
    problems = []
    if layout is HF:
        if tower_name != "clip_vision_model":
            problems.append(f"the vision tower is {tower_name}, but must be a transformers CLIP tower")
        elif architecture["image_size"] != model.tower.preprocess.size:
            problems.append("the image sizes of the preprocessing and of the vision tower's position embeddings differ")
        if config.projection_bias:
            problems.append("the projection has a bias")
    elif not re.match("timm:eva02_(base|large)_.*_clip_", tower_name) or tower["args"].keys() - set(EVA_ARGS):
        problems.append(
            f"the vision tower is {tower_name}, but must be a timm EVA-02 CLIP tower whose only custom arguments are "
            "sizes"
        )
    if not config.projection:
        problems.append("there is no image projection")
    if config.logit_bias:
        problems.append("the logits have a bias")
    if config.adapter.depth == 0:
        problems.append("there is no adapter")
    elif not config.adapter.normalize_input:
        problems.append("the adapter does not normalise its input, but official adapters do")
    if problems:
        raise ValueError(f"the model cannot be saved in the {layout.name!r} layout: {'; '.join(problems)}")


def _build_official_tensors(model: LLM2CLIP, layout: OfficialLayout) -> dict[str, Tensor]:
    tensors = {
        get_official_name(name, layout, model.config.adapter): tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    tensors["logit_scale"] = tensors["logit_scale"].reshape(())
    if layout is EVA:
        if not model.config.projection_bias:  # in the "eva" layout, the projection always has a bias
            tensors["visual.head.bias"] = torch.zeros(model.config.embed_dim)
        tensors |= {name: tensor.cpu().clone() for name, tensor in compute_checkpoint_buffers(model, layout).items()}
    return tensors
