"""Published caption encoders: the LLM2CLIP authors' encoders, LLMs with PEFT LoRA adapters, and NV-Embed-v2.

The text adapter of an official checkpoint works only with the encoder that the adapter was trained with.

LLM2Vec and the first training stage of the LLM2CLIP authors' code produce LoRA adapters. Several adapters can form a
chain, such as LLM2Vec's MNTP and supervised adapters, and must be merged in the order in which they were trained.

NV-Embed-v2 is a bidirectional Mistral model with latent attention pooling. llm2clip does not run the Python code in the
NV-Embed-v2 repository, but loads the weights into transformers' Mistral model and `LatentAttentionPooling`.
"""

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import save_file
from sentence_transformers.base.modules import Normalize
from torch import Tensor, nn

from llm2clip.io_utils import read_json
from llm2clip.models.loading import download_hub_snapshot, find_model_file, read_config
from llm2clip.models.official_layout import read_official_checkpoint
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.text.latent_attention import LatentAttentionPooling
from llm2clip.models.text.sentence_transformer import ADAPTER_CONFIG, NV_EMBED

LLAMA_3_8B = "microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned"
LLAMA_3_2_1B = "microsoft/LLM2CLIP-Llama-3.2-1B-Instruct-CC-Finetuned"
# LoRA adapter for Llama-3.1-8B-Instruct, in a subfolder of the SigLIP 2 checkpoint's repository.
LLAMA_3_1_8B = "microsoft/LLM2CLIP-Llama3.1-8B-siglip2-so400m-patch14-224/LLM2CLIP-Llama-3.1-8B"
PUBLISHED_ENCODERS = {LLAMA_3_8B: 4096, LLAMA_3_1_8B: 4096, LLAMA_3_2_1B: 2048}  # embedding sizes

# Template that the published LLMs were tuned with. The model folders do not contain the template.
TEMPLATE = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{caption}<|eot_id|>"
TEMPLATE_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

# Pattern for checkpoint names -> encoder that the checkpoints were trained with. The first matching pattern is used.
_CHECKPOINT_NAMES = {
    re.compile(r"llama-?3[._]1", re.IGNORECASE): LLAMA_3_1_8B,
    re.compile(r"llama-?3-8b|LLM2CLIP-(openai|eva02)-", re.IGNORECASE): LLAMA_3_8B,
}

_LLM2VEC_CONFIG = "llm2vec_config.json"
_ADAPTER_FILES = (ADAPTER_CONFIG, _LLM2VEC_CONFIG, "adapter_model.safetensors", "adapter_model.bin")
_HUB_PATH = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w./-]+))?")  # OWNER/NAME or OWNER/NAME/SUBFOLDER

# NV-Embed-v2
_LLM_PREFIX = "embedding_model."
_POOLING_PREFIX = "latent_attention_model."
_ROTARY_BUFFER = "rotary_emb.inv_freq"  # skipped because transformers computes the buffer from the config
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
# LLM config entries that determine the architecture.
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


def suggest_published_encoders(source: str | Path, text_dim: int, tower: dict[str, Any]) -> list[str]:
    """Return the published caption encoders that a checkpoint may have been trained with.

    If several encoders have embeddings of size `text_dim`, the vision tower or the checkpoint's name determines the
    encoder. For an unknown checkpoint, return all encoders with embeddings of size `text_dim`.
    """
    candidates = [name for name, size in PUBLISHED_ENCODERS.items() if size == text_dim]
    if len(candidates) < 2:
        return candidates
    if "siglip" in str(tower["architecture"]):  # only one published checkpoint has a SigLIP 2 tower
        return [LLAMA_3_1_8B]
    for pattern, encoder in _CHECKPOINT_NAMES.items():
        if pattern.search(str(source)):
            return [encoder]
    return candidates


def find_published_template(path: str | Path) -> str | None:
    """Return the template of LLM2CLIP's published LLMs if a model is a plain Llama 3 LLM, or None for other models."""
    from transformers import AutoTokenizer

    if (Path(path) / "text" / "modules.json").is_file() or str(path).endswith(".gguf"):
        return None
    if find_model_file(path, "modules.json") is not None:
        return None
    vocabulary = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False).get_vocab()
    return TEMPLATE if all(token in vocabulary for token in TEMPLATE_TOKENS) else None


# ---- LoRA adapters --------------------------------------------------------------------------------------------------


def find_lora_adapter(source: str | Path) -> Path | None:
    """Return the local folder of a PEFT adapter (folder, hub id or OWNER/NAME/SUBFOLDER), or None for other sources."""
    folder = Path(source)
    if not folder.is_dir():
        folder = _download_lora_adapter(str(source)) or folder
    # A folder with a modules.json was saved by sentence-transformers, which loads the adapter itself.
    is_adapter = (folder / ADAPTER_CONFIG).is_file() and not (folder / "modules.json").is_file()
    return folder if is_adapter else None


def load_encoder_with_lora(sources: Sequence[str | Path], device: str | torch.device = "cpu") -> CaptionEncoder:
    """Load a caption encoder in float32 and merge a chain of LoRA adapters into its LLM.

    `sources` are the adapters (see `find_lora_adapter`), in the order in which they were trained. The base LLM may
    precede the adapters. Otherwise, the base LLM is taken from the first adapter's adapter_config.json.
    """
    base, adapters = _resolve_adapter_chain(sources)
    try:
        template = find_published_template(base)
        encoder = CaptionEncoder.from_pretrained(
            base, template=template, device=device, **_read_llm2vec_settings(adapters[-1])
        )
    except OSError as error:
        raise FileNotFoundError(
            f"{adapters[0]} is a LoRA adapter for {base}, which could not be loaded ({error}). If you have a copy of "
            f"this LLM, pass its path before the adapter: llm2clip convert LLM {sources[0]} --out ENCODER"
        ) from error
    for adapter in adapters:
        _merge_lora_adapter(encoder, adapter)
    return encoder


def _merge_lora_adapter(encoder: CaptionEncoder, folder: Path) -> None:
    config: Any = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{folder} is not a LoRA adapter, so it cannot be merged into an LLM (got {config.peft_type})")
    config.task_type = None  # PEFT's causal LM task type requires an LM head, which the encoder's LLM lacks
    weights = load_peft_weights(str(folder), device="cpu")
    head_prefix = "base_model.model.model."  # tensor name prefix if the adapter was trained on an LLM with an LM head
    if all(name.startswith(head_prefix) for name in weights):
        weights = {name.replace(head_prefix, "base_model.model.", 1): tensor for name, tensor in weights.items()}
    model = get_peft_model(encoder.llm, config)
    expected = get_peft_model_state_dict(model)
    # PEFT silently ignores tensors that do not match, so the LLM might remain unchanged.
    differing = sorted(weights.keys() ^ expected.keys())
    differing += sorted(
        name for name in weights.keys() & expected.keys() if weights[name].shape != expected[name].shape
    )
    if differing:
        raise ValueError(
            f"{folder} does not match the LLM (missing, unexpected or wrongly shaped tensors: {len(differing)}, "
            f"including {differing[0]}). Use the LLM that the adapter was trained on: {config.base_model_name_or_path}"
        )
    set_peft_model_state_dict(model, weights)
    encoder.st[0].model = model.merge_and_unload()


def _resolve_adapter_chain(sources: Sequence[str | Path]) -> tuple[str, list[Path]]:
    """Return the base LLM, and the adapter folders in the order in which the adapters must be merged."""
    base = None
    if len(sources) > 1 and find_lora_adapter(sources[0]) is None:
        base, sources = str(sources[0]), sources[1:]
    chain: list[Path] = []
    for source in sources:
        folder = find_lora_adapter(source)
        if folder is None:
            raise ValueError(f"{source} is not a PEFT adapter: it has no {ADAPTER_CONFIG}")
        chain.append(folder)
    while base is None:
        parent_name = str(read_json(chain[0] / ADAPTER_CONFIG)["base_model_name_or_path"])
        parent = find_lora_adapter(parent_name)  # an adapter's base model can itself be an adapter
        if parent is None:
            base = parent_name
        elif parent in chain:
            raise ValueError(
                f"the chain of adapters is circular: the base model {parent_name} in {chain[0] / ADAPTER_CONFIG} is "
                "already in the chain. Set base_model_name_or_path to the LLM that the adapter was trained on"
            )
        else:
            chain.insert(0, parent)
    return base, chain


def _read_llm2vec_settings(adapter: Path) -> dict[str, Any]:
    file = adapter / _LLM2VEC_CONFIG
    if not file.is_file():
        return {}
    settings = read_json(file)
    if settings.get("pooling_mode", "mean") != "mean":
        raise ValueError(f"{file}: pooling_mode must be 'mean' (got {settings['pooling_mode']!r})")
    if not settings.get("skip_instruction", True):
        raise ValueError(f"{file}: skip_instruction must be true, because instructions are excluded from pooling")
    return {"pooling": "mean", "max_length": settings.get("max_length")}


def _download_lora_adapter(source: str) -> Path | None:
    match = _HUB_PATH.fullmatch(source)
    if match is None or Path(source).exists():
        return None
    repository, subfolder = match[1], match[2] or ""
    patterns = [str(PurePosixPath(subfolder, name)) for name in _ADAPTER_FILES]
    try:
        return download_hub_snapshot(repository, patterns) / subfolder
    except FileNotFoundError:
        return None


# ---- NV-Embed-v2 -----------------------------------------------------------------------------------------------------


def is_nv_embed(source: str | Path) -> bool:
    return read_config(source).get("model_type") == NV_EMBED


def load_nv_embed(source: str | Path) -> CaptionEncoder:
    """Load the published NV-Embed-v2 checkpoint as a float32 caption encoder on the CPU.

    As in the NV-Embed code, the begin and end tokens are added to each text and included in pooling. Raise ValueError
    if the checkpoint does not match the architecture of NV-Embed-v2.
    """
    tensors, config, _ = read_official_checkpoint(source)
    llm_tensors, pooling_tensors = _split_nv_embed_tensors(tensors)
    del tensors
    settings = config["latent_attention_config"]
    if settings["latent_dim"] != settings["hidden_dim"]:
        raise ValueError(
            f"{source}: latent_dim ({settings['latent_dim']}) must equal hidden_dim ({settings['hidden_dim']}) in "
            "latent_attention_config"
        )
    pooling = LatentAttentionPooling(
        settings["hidden_dim"],
        num_latents=settings["num_latents_value"],
        num_heads=settings["num_cross_heads"],
        head_dim=settings["cross_dim_head"],
    )
    _load_nv_embed_weights(source, pooling, pooling_tensors)
    encoder = _load_nv_embed_llm(source, llm_tensors, config["text_config"])
    encoder.st[1] = pooling
    if settings.get("output_normalize"):
        encoder.st.append(Normalize())
    return encoder.eval()


def _split_nv_embed_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
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


def _load_nv_embed_weights(source: str | Path, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    try:
        module.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{source} is not NV-Embed-v2: {error}") from error


def _load_nv_embed_llm(source: str | Path, tensors: dict[str, Tensor], settings: Mapping[str, Any]) -> CaptionEncoder:
    from transformers import AutoModel, MistralConfig

    config = MistralConfig(
        **{name: settings[name] for name in _LLM_SETTINGS if settings.get(name) is not None},
        rope_parameters={"rope_type": "default", "rope_theta": settings.get("rope_theta", 10000.0)},
        sliding_window=None,  # as in the NV-Embed code
    )
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    _load_nv_embed_weights(source, model, tensors)
    # The model is saved to a temporary folder because `CaptionEncoder.from_pretrained` loads only from folders.
    with tempfile.TemporaryDirectory() as folder:
        config.architectures = ["MistralModel"]
        config.save_pretrained(folder)
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        _load_nv_embed_tokenizer(source).save_pretrained(folder)
        tensors.clear()  # free memory before the LLM is loaded again
        del model
        return CaptionEncoder.from_pretrained(folder, device="cpu")


def _load_nv_embed_tokenizer(source: str | Path) -> Any:
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
