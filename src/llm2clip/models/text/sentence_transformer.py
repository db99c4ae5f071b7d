"""Functions for SentenceTransformer models: loading, templates, layer truncation and LoRA training."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn

from llm2clip.io_utils import read_json
from llm2clip.models.loading import (
    WITHOUT_HUB_CODE,
    check_not_quantized,
    check_tokenizer_normalizer,
    hide_load_report,
    hide_loading_progress_bars,
    read_config,
)
from llm2clip.models.precision import get_llm_layers, set_llm_layers
from llm2clip.models.text.latent_attention import MODULE_TYPE, LatentAttentionPooling

ADAPTER_CONFIG = "adapter_config.json"  # file written by PEFT
NV_EMBED = "nvembed"  # model_type in the config.json of NV-Embed-v2 (see published_encoders.py)
CAPTION_PLACEHOLDER = "{caption}"
# Requirements of encoders with bidirectional attention. sentence-transformers checks them before loading the weights.
REQUIREMENTS = {
    "transformers": {"specifier": ">=5.2", "reason": "Earlier versions ignore `is_causal` and return wrong embeddings."}
}


@hide_loading_progress_bars()
def load_sentence_transformer(path: str, pooling: str, device: str | None) -> SentenceTransformer:
    """Load a model from a folder or hub id as a float32 SentenceTransformer.

    A plain transformers model gets bidirectional attention and a pooling layer with the mode `pooling`. Raise
    ValueError if weights are missing, or if the user must convert the model first.
    """
    from transformers.utils import cached_file

    if (Path(path) / ADAPTER_CONFIG).is_file() and not (Path(path) / "modules.json").is_file():
        raise ValueError(
            f"{path} contains only a PEFT adapter. Merge the adapter into the LLM and use the result: llm2clip convert "
            f"{path} --out ENCODER"
        )
    config = read_config(path)
    check_not_quantized(config, path)
    if config.get("model_type") == NV_EMBED:
        raise ValueError(f"{path} is NV-Embed-v2, which must be converted first: llm2clip convert {path} --out ENCODER")
    modules_file = cached_file(path, "modules.json", _raise_exceptions_for_missing_entries=False)
    if modules_file is not None:
        for module in read_json(Path(modules_file)):
            check_not_quantized(read_config(path, module["path"]), path)
            check_tokenizer_normalizer(path, module["path"])
        # llm2clip's pooling class is passed directly so that no remote code is needed.
        return SentenceTransformer._load_with_module_classes(
            path,
            {MODULE_TYPE: LatentAttentionPooling},
            device=device,
            trust_remote_code=False,
            model_kwargs={"dtype": torch.float32, **WITHOUT_HUB_CODE},
        )

    check_tokenizer_normalizer(path)
    transformer = _load_transformer(path)
    pooling_module = Pooling(transformer.get_embedding_dimension(), pooling)
    st = SentenceTransformer(modules=[transformer, pooling_module], device=device)
    st.max_seq_length = min(512, transformer.max_seq_length or 512)
    set_bidirectional_attention(transformer.model, True)
    return st


def _load_transformer(path: str) -> Transformer:
    transformer = _StrictTransformer(
        path,
        model_kwargs={"dtype": torch.float32, **WITHOUT_HUB_CODE},
        processor_kwargs={"trust_remote_code": False},
        config_kwargs={"trust_remote_code": False},
        # Without `modality_config`, sentence-transformers would apply the tokenizer's chat template.
        modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        module_output_name="token_embeddings",
    )
    transformer.__class__ = Transformer  # the saved class name must be importable without llm2clip
    tokenizer: Any = transformer.tokenizer
    tokenizer.chat_template = None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return transformer


class _StrictTransformer(Transformer):
    """Transformer module that raises ValueError if weights are missing, instead of initialising them randomly."""

    @hide_load_report()
    def _load_model(self, model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        loaded: Any = super()._load_model(model_name_or_path, *args, **kwargs, output_loading_info=True)
        model, report = loaded
        # The weights of the pooler may be missing because the pooler is unused.
        missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
        if missing:
            count = f"{len(missing):,} missing in total"
            raise ValueError(f"{model_name_or_path} lacks the model weight {missing[0]} ({count})")
        return model


def append_truncation_layer(st: Any, dim: int) -> None:
    """Append a linear layer that truncates embeddings to the first `dim` dimensions and is saved with the model."""
    full_dim = st.get_embedding_dimension()
    if not 0 < dim <= full_dim:
        raise ValueError(f"truncate_dim must be between 1 and {full_dim}, the encoder's embedding size (got {dim})")
    selection = torch.eye(dim, full_dim)
    layer = Dense(full_dim, dim, bias=False, activation_function=nn.Identity(), init_weight=selection)
    st.append(layer.to(st.device))


def set_prompt_template(st: Any, template: str) -> None:
    """Set the template of a SentenceTransformer. The template is saved with the model.

    The text before the caption becomes the default prompt and is excluded from pooling. If a special token follows the
    caption, the tokenizer appends this special token to every text.
    """
    if template.count(CAPTION_PLACEHOLDER) != 1:
        raise ValueError(f"template must contain {CAPTION_PLACEHOLDER} exactly once (got {template!r})")
    prefix, suffix = template.split(CAPTION_PLACEHOLDER)
    if suffix:
        _set_template_suffix(st.tokenizer, suffix)
    st.default_prompt_name, st[1].include_prompt = None, True
    if prefix:
        st.prompts["caption"] = prefix
        st.default_prompt_name = "caption"
        st[1].include_prompt = False
        if not has_consistent_prompt_length(st, prefix):
            raise ValueError(
                f"sentence-transformers would miscount the tokens of the template's prefix {prefix!r}: the prefix must "
                f"not end in a space. If it ends in a special token, one must also follow {CAPTION_PLACEHOLDER}"
            )


def _set_template_suffix(tokenizer: Any, suffix: str) -> None:
    """Make the tokenizer append the special token `suffix` instead of the default special tokens."""
    from tokenizers.processors import TemplateProcessing

    ids = tokenizer(suffix, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] not in tokenizer.all_special_ids:
        raise ValueError(f"template: only a single special token may follow {CAPTION_PLACEHOLDER} (got {suffix!r})")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {suffix}", special_tokens=[(suffix, ids[0])]
    )


def count_prompt_tokens(tokenizer: Any, prompt: str) -> int:
    """Count the leading tokens that do not depend on the caption: special tokens and prompt tokens."""
    if not prompt:
        return 0
    # A prompt's trailing space can merge with the next token, so the prompt must not be tokenized on its own.
    first, second = tokenizer([prompt + "a", prompt + "1"], return_attention_mask=False)["input_ids"]
    return next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)


def has_consistent_prompt_length(st: Any, prompt: str) -> bool:
    """Return True if sentence-transformers and `count_prompt_tokens` count the same number of tokens in a prompt."""
    return bool(st[0]._get_prompt_length(prompt) == count_prompt_tokens(st.tokenizer, prompt))


def is_encoder_only(llm: Any) -> bool:
    """Return True for BERT-like models, whose bidirectional attention cannot be made causal."""
    return not hasattr(llm, "layers") and hasattr(llm, "encoder")


def truncate_transformer_layers(llm: Any, count: int) -> None:
    """Remove all but the first `count` transformer layers. Models with fewer layers are unchanged."""
    layers = get_llm_layers(llm)
    if count < 1:
        raise ValueError(f"layers must be at least 1 (got {count})")
    if count >= len(layers):
        return
    set_llm_layers(llm, layers[:count])
    llm.config.num_hidden_layers = count
    if getattr(llm.config, "layer_types", None):
        llm.config.layer_types = llm.config.layer_types[:count]


def set_bidirectional_attention(llm: Any, bidirectional: bool) -> None:
    """Make a model's attention bidirectional or causal. The setting is saved in the model's config."""
    if is_encoder_only(llm):
        if not bidirectional:
            raise ValueError(f"the attention of {type(llm).__name__}, a bidirectional encoder, cannot be made causal")
        return
    llm.config.is_causal = not bidirectional
    llm.config.use_cache = False


class LoraSession:
    """LoRA training of an encoder's LLM. The constructor adds LoRA layers, and `finish` merges the layers into the LLM.

    With QLoRA (arXiv 2305.14314), the frozen weights are stored in 4 bits during training, and the LoRA layers are
    merged into the original weights. Without QLoRA, the frozen weights can be stored in 16 bits, and the LoRA layers
    are merged into the rounded weights. Rounding has no effect if the LLM was released in the same 16-bit format.
    """

    def __init__(self, encoder: Any, config: LoraConfig, dtype: torch.dtype, device: torch.device, quantize: bool):
        """Add LoRA to a `CaptionEncoder`'s LLM in place, and move the LLM to the training device.

        The frozen weights are cast to `dtype` before the move, so float32 weights on the CPU need not fit in the
        device's memory. If `quantize` is True, the frozen weights are stored in 4 bits, their matmuls are computed in
        `dtype`, and the original weights remain on the CPU.
        """
        self.encoder, self.config = encoder, config
        transformer = encoder.st[0]
        self.original_layers = _quantize_linear_layers(transformer.model, dtype, device) if quantize else {}
        transformer.model = get_peft_model(transformer.model, config)
        if not quantize:
            cast_frozen_linear_layers(transformer.model, dtype)
        transformer.model.to(device)

    def finish(self) -> None:
        """Move the LLM to the CPU, and merge the LoRA layers into the LLM's weights in float32."""
        transformer = self.encoder.st[0]
        model = transformer.model
        model = self._restore_original_layers(model) if self.original_layers else model.to("cpu")
        cast_frozen_linear_layers(model, torch.float32)  # 16-bit weights would lose small updates to rounding
        transformer.model = model.merge_and_unload()
        self.encoder.to("cpu")

    def _restore_original_layers(self, model: Any) -> Any:
        lora_weights = {name: weight.cpu() for name, weight in get_peft_model_state_dict(model).items()}
        llm = model.unload().to("cpu")
        for name, layer in self.original_layers.items():
            llm.set_submodule(name, layer)
        llm.is_loaded_in_4bit = False
        model = get_peft_model(llm, self.config)
        set_peft_model_state_dict(model, lora_weights)
        return model


def cast_frozen_linear_layers(llm: nn.Module, dtype: torch.dtype) -> None:
    """Cast frozen linear layers. Norms and embeddings are excluded because rounding them affects all later layers."""
    for module in llm.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.to(dtype)


def _quantize_linear_layers(llm: Any, dtype: torch.dtype, device: torch.device) -> dict[str, nn.Linear]:
    """Replace linear layers with 4-bit layers on `device`. Return a dict of the original layers on the CPU."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    original_layers = {name: module.to("cpu") for name, module in llm.named_modules() if isinstance(module, nn.Linear)}
    for name, layer in original_layers.items():
        has_bias = layer.bias is not None
        quantized = Linear4bit(layer.in_features, layer.out_features, has_bias, compute_dtype=dtype, quant_type="nf4")
        quantized.weight = Params4bit(layer.weight.data.clone(), requires_grad=False, quant_type="nf4")
        if has_bias:
            quantized.bias = nn.Parameter(layer.bias.data.clone(), requires_grad=False)
        llm.set_submodule(name, quantized.to(device))
    llm.is_loaded_in_4bit = True  # PEFT checks this attribute
    return original_layers
