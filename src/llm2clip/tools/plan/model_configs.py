"""Models without weights, used for planning. Models in the tables `LLMS` and `TOWERS` need no network access.

Models are built on PyTorch's meta device, where tensors have shapes but no values. For language models that are not
listed, the config is read from a local folder or from the hub. Hub ids of vision towers are mapped to timm models of
the same shape.
"""

from pathlib import Path
from typing import Any

import torch

from llm2clip.config import AlignConfig, EncoderConfig
from llm2clip.models.hub.loading import load_config
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.train.initial_model import make_model_config


def _make_config(
    kind: str, width: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int, **extra: int
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        **extra,
    }


_LLAMA_8B = _make_config("llama", 4096, 32, 32, 8, 14336, 128256)
_LLAMA_1B = _make_config("llama", 2048, 16, 32, 8, 8192, 128256, head_dim=64, tie_word_embeddings=True)
_VICUNA_7B = _make_config("llama", 4096, 32, 32, 32, 11008, 32000)
_VICUNA_13B = _make_config("llama", 5120, 40, 40, 40, 13824, 32000)
_MISTRAL_7B = _make_config("mistral", 4096, 32, 32, 8, 14336, 32000)
_NEMO = _make_config("mistral", 5120, 40, 32, 8, 14336, 131072, head_dim=128)
_QWEN = _make_config("qwen2", 896, 24, 14, 2, 4864, 151936, tie_word_embeddings=True)
_SMOLLM2 = _make_config("llama", 576, 30, 9, 3, 1536, 49152, tie_word_embeddings=True)
_GEMMA3 = _make_config("gemma3_text", 640, 18, 4, 1, 2048, 262144, head_dim=256)
_MINILM = _make_config("bert", 384, 6, 12, 12, 1536, 30522)

# Configs of language models, keyed by lower-case hub id or by llm2clip's short model name.
LLMS = {
    "meta-llama/meta-llama-3-8b": _LLAMA_8B,
    "meta-llama/meta-llama-3-8b-instruct": _LLAMA_8B,
    "meta-llama/llama-3.1-8b": _LLAMA_8B,
    "meta-llama/llama-3.1-8b-instruct": _LLAMA_8B,
    "meta-llama/llama-3.2-1b": _LLAMA_1B,
    "meta-llama/llama-3.2-1b-instruct": _LLAMA_1B,
    "deepseek-ai/deepseek-r1-distill-llama-8b": _LLAMA_8B,
    "encoders/llm2vec-llama-3-8b": _LLAMA_8B,  # folder created by `convert`; see the built-in configs
    "encoders/nv-embed-v2": _MISTRAL_7B,
    "baai/bge-en-icl": {**_MISTRAL_7B, "vocab_size": 32003},
    "lmsys/vicuna-7b-v1.5": _VICUNA_7B,
    "lmsys/vicuna-13b-v1.5": _VICUNA_13B,
    "mistralai/mistral-nemo-base-2407": _NEMO,
    "mistralai/mistral-nemo-instruct-2407": _NEMO,
    "qwen/qwen2.5-0.5b": _QWEN,
    "qwen/qwen2.5-0.5b-instruct": _QWEN,
    "qwen/qwen3-embedding-8b": _make_config("qwen3", 4096, 36, 32, 8, 12288, 151665, head_dim=128),
    "smollm2-135m": _SMOLLM2,
    "huggingfacetb/smollm2-135m-instruct": _SMOLLM2,
    "gemma3-270m": _GEMMA3,
    "google/gemma-3-270m": _GEMMA3,
    "all-minilm-l6-v2": _MINILM,
    "sentence-transformers/all-minilm-l6-v2": _MINILM,
}

# (timm model, image size) of vision towers, keyed by lower-case hub id or by llm2clip's short model name.
TOWERS: dict[str, tuple[str, int]] = {
    "openai/clip-vit-base-patch32": ("vit_base_patch32_clip_quickgelu_224", 224),
    "openai/clip-vit-base-patch16": ("vit_base_patch16_clip_quickgelu_224", 224),
    "openai/clip-vit-large-patch14": ("vit_large_patch14_clip_quickgelu_224", 224),
    "openai/clip-vit-large-patch14-336": ("vit_large_patch14_clip_quickgelu_336", 336),
    "google/siglip2-base-patch16-224": ("vit_base_patch16_siglip_224", 224),
    "google/siglip2-so400m-patch14-224": ("vit_so400m_patch14_siglip_224", 224),
    "google/siglip2-so400m-patch14-384": ("vit_so400m_patch14_siglip_378", 378),
    "google/siglip2-so400m-patch16-256": ("vit_so400m_patch16_siglip_256", 256),
    "google/siglip2-so400m-patch16-384": ("vit_so400m_patch16_siglip_384", 384),
    "facebook/dinov2-base": ("vit_base_patch14_dinov2", 224),
    "facebook/dinov2-large": ("vit_large_patch14_dinov2", 224),
    "efficientnet-lite0": ("tf_efficientnet_lite0", 224),
    "efficientnet-lite2": ("tf_efficientnet_lite2", 260),
}


def get_llm_config(encoder: EncoderConfig) -> Any:
    """Return the Hugging Face config of an encoder's language model, limited to the first `encoder.layers` layers.

    Raises:
        ValueError: The model is neither in `LLMS` nor a folder, and it cannot be loaded from the hub.
    """
    from transformers import AutoConfig

    path = encoder.path
    # llm2clip models store the LLM in a subfolder.
    folder = Path(path) / "text" if (Path(path) / "text/config.json").is_file() else Path(path)
    if not folder.exists() and path.lower() in LLMS:
        config = AutoConfig.for_model(**LLMS[path.lower()])
    else:
        try:
            if folder.suffix == ".gguf":
                config = load_config(folder.parent, gguf_file=folder.name)
            else:
                config = load_config(folder)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--encoder.path {path} is neither a folder with a config.json nor one of {', '.join(LLMS)}, and "
                f"loading it from the hub failed: {str(error).splitlines()[0]}"
            ) from error
    config = getattr(config, "text_config", config)
    if encoder.layers is not None:
        config.num_hidden_layers = min(encoder.layers, config.num_hidden_layers)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
    config.use_cache = False
    return config


def build_llm(config: Any) -> Any:
    """Build a language model on the meta device from its config, without the language modelling head."""
    from transformers import AutoModel

    with torch.device("meta"):
        return AutoModel.from_config(config, dtype=torch.float32)


def build_tower(align: AlignConfig) -> VisionTower:
    """Build the vision tower on the meta device.

    Raises:
        ValueError: The tower is not supported, or it is unknown and cannot be loaded from the hub.
    """
    name, size = TOWERS.get(align.tower.lower().removeprefix("hf:"), (align.tower, None))
    try:
        with torch.device("meta"):
            tower = VisionTower.from_pretrained(name, image_size=align.image_size or size, pretrained=False)
    except OSError as error:
        raise ValueError(
            f"--align.tower {align.tower} is not a folder, a timm model or one of {', '.join(TOWERS)}, and "
            f"loading it from the hub failed: {str(error).splitlines()[0]}"
        ) from error
    return tower


def build_model(align: AlignConfig, text_dim: int) -> LLM2CLIP:
    """Build the model of the `align` stage on the meta device, in training mode."""
    tower = build_tower(align)
    config = make_model_config(align, tower, text_dim)
    with torch.device("meta"):
        return LLM2CLIP(config, tower).train()
