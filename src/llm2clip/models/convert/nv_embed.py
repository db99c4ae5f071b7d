"""Conversion of NV-Embed-v2 to a caption encoder.

NV-Embed-v2 is a bidirectional Mistral with latent attention pooling. Its repository contains Python code for
transformers 4, which llm2clip does not run. Instead, the weights are loaded into transformers' Mistral and into
`LatentAttentionPooling`.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sentence_transformers.base.modules import Normalize
from torch import Tensor, nn

from llm2clip.models.convert.checkpoint_io import read_checkpoint
from llm2clip.models.hub.loading import read_config
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.text.latent_attention import LatentAttentionPooling
from llm2clip.models.text.sentence_transformer import NV_EMBED

_LLM_PREFIX = "embedding_model."
_POOLING_PREFIX = "latent_attention_model."
_ROTARY_BUFFER = "rotary_emb.inv_freq"  # not loaded, because transformers computes it from the config
# Module name in NV-Embed-v2 (without `_POOLING_PREFIX`) -> name in LatentAttentionPooling.
_POOLING_NAMES = {
    "cross_attend_blocks.0.norm": "norm",
    "cross_attend_blocks.0.norm_context": "norm_latents",
    "cross_attend_blocks.0.fn.to_q": "to_q",
    "cross_attend_blocks.0.fn.to_kv": "to_kv",
    "cross_attend_blocks.0.fn.to_out": "to_out",
    "cross_attend_blocks.1.norm": "norm_mlp",
    "cross_attend_blocks.1.fn.net.0": "mlp_in",
    "cross_attend_blocks.1.fn.net.2": "mlp_out",
}
# LLM config entries that determine the architecture. All other entries affect only text generation.
_LLM_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
)


def is_nv_embed(source: str | Path) -> bool:
    """Return True if a folder or hub repository contains NV-Embed-v2 in its published format."""
    return read_config(source).get("model_type") == NV_EMBED


def load_nv_embed(source: str | Path) -> CaptionEncoder:
    """Load NV-Embed-v2 in its published format as a float32 caption encoder on the CPU.

    As in NV-Embed's code, each text consists of the begin token, the caption and the end token, and pooling includes
    all of these tokens.

    Raises:
        FileNotFoundError: the folder or repository does not exist.
        ValueError: a tensor is missing, unexpected or of the wrong shape, or the architecture is not supported.
    """
    tensors, config, _ = read_checkpoint(source)
    llm_tensors, pooling_tensors = _split_tensors(tensors)
    del tensors
    settings = config["latent_attention_config"]
    if settings["latent_dim"] != settings["hidden_dim"]:
        raise ValueError(
            f"latent_attention_config: latent_dim ({settings['latent_dim']}) must equal hidden_dim "
            f"({settings['hidden_dim']})"
        )
    pooling = LatentAttentionPooling(
        settings["hidden_dim"],
        num_latents=settings["num_latents_value"],
        num_heads=settings["num_cross_heads"],
        head_dim=settings["cross_dim_head"],
    )
    _load_weights(source, pooling, pooling_tensors)
    encoder = _load_llm(source, llm_tensors, config["text_config"])
    encoder.st[1] = pooling
    if settings.get("output_normalize"):
        encoder.st.append(Normalize())
    return encoder.eval()


def _split_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Separate the tensors of the LLM from those of the pooling layer, and rename both to llm2clip's names."""
    llm: dict[str, Tensor] = {}
    pooling: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(_LLM_PREFIX):
            if not name.endswith(_ROTARY_BUFFER):
                llm[name.removeprefix(_LLM_PREFIX)] = tensor
            continue
        name = name.removeprefix(_POOLING_PREFIX)
        module, _, kind = name.rpartition(".")
        pooling[f"{_POOLING_NAMES[module]}.{kind}" if module in _POOLING_NAMES else name] = tensor.float()
    return llm, pooling


def _load_weights(source: str | Path, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load tensors into a module. Raise ValueError if a name or shape does not match."""
    try:
        module.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{source} is not NV-Embed-v2: {error}") from error


def _load_llm(source: str | Path, tensors: dict[str, Tensor], settings: Mapping[str, Any]) -> CaptionEncoder:
    """Load the LLM and the tokenizer as a bidirectional caption encoder with mean pooling."""
    from transformers import AutoModel, MistralConfig

    config = MistralConfig(
        **{name: settings[name] for name in _LLM_SETTINGS if settings.get(name) is not None},
        rope_parameters={"rope_type": "default", "rope_theta": settings.get("rope_theta", 10000.0)},
        sliding_window=None,  # NV-Embed's code does not use a sliding window
    )
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    _load_weights(source, model, tensors)
    # Save to a temporary folder, because transformers and sentence-transformers load models only from folders.
    with tempfile.TemporaryDirectory() as folder:
        config.architectures = ["MistralModel"]
        config.save_pretrained(folder)
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        _load_tokenizer(source).save_pretrained(folder)
        tensors.clear()  # free this memory before the LLM is loaded again
        del model
        return CaptionEncoder.from_pretrained(folder, device="cpu")


def _load_tokenizer(source: str | Path) -> Any:
    """Load the tokenizer and configure it to add the begin and end tokens to every text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(source))
    begin, end = tokenizer.bos_token, tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A {end}",
        special_tokens=[(begin, tokenizer.bos_token_id), (end, tokenizer.eos_token_id)],
    )
    tokenizer.pad_token = end
    tokenizer.padding_side = "right"
    return tokenizer
