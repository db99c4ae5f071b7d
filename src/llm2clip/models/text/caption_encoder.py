"""Caption encoder, which maps a text to a single embedding.

By default, a caption encoder is a decoder LLM with bidirectional attention and mean pooling. Other caption encoders are
BERT-like models and, for fast queries, static encoders, which average one embedding per token. All encoders except
NV-Embed (see `models/text/latent_attention.py`) are saved as ordinary `SentenceTransformer` models, which
sentence-transformers can load without llm2clip.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from torch import Tensor, nn

from llm2clip.cpu_tuning import is_flex_attention_correct, use_onednn_matmul
from llm2clip.io_utils import atomic_write_text, check_texts, read_json
from llm2clip.models.loading import (
    check_model_source,
    explain_load_errors,
    fingerprint,
    hash_text,
    hash_weights,
    hide_loading_progress_bars,
    select_output_entries,
)
from llm2clip.models.model_folder import read_model_config
from llm2clip.models.precision import (
    FP32,
    Precision,
    autocast_llm,
    calibrate_precision,
    cast_linear_weights,
    resolve_precision,
)
from llm2clip.models.pretrained import resolve_gguf_folder, resolve_pretrained_name
from llm2clip.models.text.latent_attention import LatentAttentionPooling
from llm2clip.models.text.packing import (
    PACKED,
    TokenizedTexts,
    copy_to_device,
    get_default_encoding_batch_tokens,
    pack_captions,
    remove_prompt_hidden_states,
    supports_packed_attention,
)
from llm2clip.models.text.sentence_transformer import (
    REQUIREMENTS,
    append_truncation_layer,
    count_prompt_tokens,
    has_consistent_prompt_length,
    is_encoder_only,
    load_sentence_transformer,
    set_bidirectional_attention,
    set_prompt_template,
    truncate_transformer_layers,
)
from llm2clip.progress import ProgressBar

MAX_EMBEDDINGS_ON_DEVICE = 8192  # number of embeddings to accumulate on the device before copying to the CPU


class CaptionEncoder(nn.Module):
    """Text encoder with a caption template and a pooling layer.

    Attributes:
        st: SentenceTransformer. Either `st[0]` is the LLM and `st[1]` is the pooling layer, or `st[0]` is a
            `StaticEmbedding`, which includes pooling. Other layers may follow.
        weights_precision: Highest precision that the weights support. `move_for_encoding` can lower this precision.
    """

    def __init__(self, st: SentenceTransformer) -> None:
        super().__init__()
        self.st: Any = st
        self._prompt_lengths: dict[str, int] = {}
        self.weights_precision = FP32

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, device: str | torch.device | None = None, **options: Any
    ) -> CaptionEncoder:
        """Load a decoder LLM, a sentence-transformers model or a `.gguf` file as a caption encoder in float32.

        If an option is missing or None, the value saved with the model is used. The defaults for plain LLMs are
        bidirectional attention, mean pooling, no template and a maximum length of 512 tokens.

        Args:
            path: Folder or hub id of a transformers or sentence-transformers model, an llm2clip model folder, a `.gguf`
                file, or the name of a model that llm2clip can download (see `models/pretrained.py`).
            device: Device to load the encoder on. Default: a GPU if available.
            options: `bidirectional`, `layers`, `template`, `pooling`, `max_length` and `truncate_dim`, as in
                `EncoderConfig`, and `attention`.

                The value of `attention` is `packed` (see `models/text/packing.py`) or a transformers attention
                implementation such as sdpa, eager, flex_attention or flash_attention_2. The default is `packed` for
                decoders that support packed attention. Flash attention requires bf16.

        Raises:
            ValueError: An option is not valid for the model.
            OSError: The model does not exist.
        """
        path = _resolve_model_path(path)
        check_model_source(path)
        pooling = options.get("pooling") or "mean"
        with explain_load_errors(path):
            encoder = cls(load_sentence_transformer(path, pooling, None if device is None else str(device)))
        if encoder.is_static:
            invalid = [name for name, value in options.items() if value is not None and name != "truncate_dim"]
            if invalid:
                raise ValueError(f"{path} is a static encoder: omit the unsupported options ({', '.join(invalid)})")
        encoder._set_options(path, **options)
        return encoder.eval()

    def _set_options(
        self,
        path: str,
        *,
        bidirectional: bool | None = None,
        layers: int | None = None,
        template: str | None = None,
        pooling: str | None = None,
        max_length: int | None = None,
        truncate_dim: int | None = None,
        attention: str | None = None,
    ) -> None:
        if layers is not None:
            truncate_transformer_layers(self.llm, layers)
        if bidirectional is not None:
            set_bidirectional_attention(self.llm, bidirectional)
        if pooling is not None:
            self._set_pooling(pooling, path)
        if template is not None:
            set_prompt_template(self.st, template)
        if max_length is not None:
            self.st.max_seq_length = max_length
        if truncate_dim is not None:
            append_truncation_layer(self.st, truncate_dim)
        self._set_attention(attention)

    def _set_pooling(self, mode: str, path: str) -> None:
        pooling = self.st[1]
        if mode == pooling.pooling_mode:
            return
        if isinstance(pooling, LatentAttentionPooling):
            raise ValueError(f"{path} uses latent attention pooling, which cannot be replaced with {mode!r} pooling")
        self.st[1] = Pooling(self.embed_dim, mode, include_prompt=pooling.include_prompt)

    def _set_attention(self, attention: str | None) -> None:
        if self.is_static:
            return
        # An encoder loaded on the CPU may be moved to a GPU later.
        cpu_only = self.device.type == "cpu" and not torch.cuda.is_available()
        if attention == "flex_attention" and cpu_only and not is_flex_attention_correct():
            raise ValueError(
                "flex_attention returns NaN on CPUs without AVX-512 (torch 2.13): use another attention implementation"
            )
        if attention is not None:
            self.llm.set_attn_implementation(attention)
        elif supports_packed_attention(self.llm):
            self.llm.set_attn_implementation(PACKED)

    @property
    def is_static(self) -> bool:
        """True if the encoder averages one embedding per token instead of running an LLM."""
        return isinstance(self.st[0], StaticEmbedding)

    @property
    def llm(self) -> Any:
        """Transformers model without a PEFT wrapper. For static encoders, the `StaticEmbedding` module."""
        if self.is_static:
            return self.st[0]
        model = self.st[0].model
        return model.get_base_model() if isinstance(model, PeftModel) else model

    @property
    def tokenizer(self) -> Any:
        return self.st.tokenizer

    @property
    def embed_dim(self) -> int:
        return int(self.st.get_embedding_dimension())

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def default_batch_tokens(self) -> int:
        return get_default_encoding_batch_tokens(self.device, self.st[0].get_embedding_dimension())

    @property
    def attention(self) -> str:
        """Name of the transformers attention implementation, or "" for static encoders."""
        return "" if self.is_static else str(self.llm.config._attn_implementation)

    @property
    def prefix(self) -> str:
        """Template text before the caption."""
        name = self.st.default_prompt_name
        return (self.st.prompts[name] or "") if name else ""

    def tokenize(self, captions: Sequence[str], prompts: Sequence[str] | None = None) -> TokenizedTexts:
        """Tokenize captions with the template and special tokens, and truncate them to the encoder's `max_length`.

        As in the LLM2CLIP authors' code, leading and trailing whitespace is stripped. Truncation removes tokens from
        the end of the caption, but not the special token that follows the caption.

        `prompts` contains an instruction, or "", for each caption. An instruction is inserted between the template's
        prefix and the caption, and excluded from pooling.
        """
        captions = list(check_texts(captions))
        if not captions:
            return TokenizedTexts([], [], [])
        prefixes = [self.prefix + p for p in prompts] if prompts else [self.prefix] * len(captions)
        texts = [prefix + caption.strip() for prefix, caption in zip(prefixes, captions, strict=True)]
        if self.is_static:
            encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
            return TokenizedTexts([encoding.ids for encoding in encodings], [], [0] * len(captions))
        ids = self.tokenizer(texts, verbose=False, return_attention_mask=False)["input_ids"]
        max_length = self.st.max_seq_length
        truncated = [i for i, row in enumerate(ids) if max_length and len(row) > max_length]
        for i in truncated:
            ids[i] = self.tokenizer(texts[i], truncation=True, max_length=max_length)["input_ids"]
        return TokenizedTexts(ids, truncated, [self.count_prompt_tokens(prefix) for prefix in prefixes])

    def count_truncated_texts(self, captions: Sequence[str]) -> int:
        return len(self.tokenize(captions).truncated)

    def count_prompt_tokens(self, prompt: str) -> int:
        if prompt not in self._prompt_lengths:
            self._prompt_lengths[prompt] = count_prompt_tokens(self.tokenizer, prompt)
        return self._prompt_lengths[prompt]

    def exclude_prompts_from_pooling(self, prompts: Iterable[str]) -> None:
        """Exclude instruction tokens from pooling. The setting is saved with the encoder."""
        for prompt in prompts:
            if not has_consistent_prompt_length(self.st, self.prefix + prompt):
                raise ValueError(
                    f"sentence-transformers would miscount the tokens in the instruction {prompt!r}, because the "
                    "instruction ends in a space or a special token. End the instruction with a line break"
                )
        self.st[1].include_prompt = False

    def collate(self, ids: Sequence[Sequence[int]], prompt_length: int | None = None) -> dict[str, Any]:
        """Build the model inputs for a batch from the token ids of B captions.

        For `packed` and flash attention, the captions form a single row without padding (see `pack_captions`). For
        other attention implementations, input_ids and attention_mask are padded to shape (B, T), int64. For static
        encoders, the inputs are the concatenated input_ids and the offset of each caption, int64.

        `prompt_length` is the number of leading tokens to exclude from pooling in each caption. Default: the number of
        tokens in the template's prefix.
        """
        if self.is_static:
            lengths = torch.tensor([len(row) for row in ids])
            flat_ids = torch.tensor([token for row in ids for token in row], dtype=torch.int64)
            inputs = {"input_ids": flat_ids, "offsets": lengths.cumsum(0) - lengths}
            return {name: copy_to_device(tensor, self.device) for name, tensor in inputs.items()}
        if self.attention == PACKED or "flash" in self.attention:
            batch = pack_captions(ids, self.attention, self.device)
        else:
            padded = self.tokenizer.pad({"input_ids": list(ids)}, return_tensors="pt")
            batch = {name: copy_to_device(padded[name], self.device) for name in ("input_ids", "attention_mask")}
        if prompt_length is None:
            prompt_length = self.count_prompt_tokens(self.prefix)
        if prompt_length:
            batch["prompt_length"] = prompt_length
        return batch

    def forward(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Encode B captions, given their token ids. Return embeddings of shape (B, embed_dim), with gradients."""
        embeddings: Tensor = self.st(self.collate(ids))["sentence_embedding"]
        return embeddings

    @torch.no_grad()
    @use_onednn_matmul()
    def encode(
        self,
        captions: str | Sequence[str] | TokenizedTexts,
        *,
        batch_tokens: int | None = None,
        precision: str | None = None,
        progress: bool | ProgressBar = False,
    ) -> Tensor:
        """Encode N captions. Return unnormalised embeddings of shape (N, embed_dim), float32, on the CPU.

        Captions of similar length are batched together to avoid padding. The other captions in a batch change an
        embedding by at most about 1e-5. The embedding of a text without tokens is a zero vector.

        Args:
            captions: Texts, or the output of `tokenize`.
            batch_tokens: Maximum number of tokens per batch, including padding. Default: `default_batch_tokens`.
            precision: fp32, bf16 (two to three times as fast as fp32), or bf16+N for LLMs that are too inaccurate in
                bf16 (see `models/precision.py`). Default: `weights_precision`.
            progress: True to show a progress bar, or an existing `ProgressBar` to update.

        Raises:
            TypeError: A caption is not a string.
            ValueError: A caption is not valid Unicode, or the attention implementation does not support the precision.
        """
        checked_precision = self._check_encoding_precision(precision or self.weights_precision)
        if "flash" in self.attention and checked_precision == "fp32":
            raise ValueError(f"{self.attention} does not support fp32: use bf16 or another attention implementation")
        if isinstance(captions, str):
            captions = [captions]
        tokens = captions if isinstance(captions, TokenizedTexts) else self.tokenize(list(captions))
        embeddings = torch.zeros(len(tokens.ids), self.embed_dim)
        on_device: list[tuple[list[int], Tensor]] = []  # (row indices, embeddings) of each batch
        if isinstance(progress, ProgressBar):
            bar = progress
        else:
            bar = ProgressBar(total=len(tokens.ids), desc="encode", unit="caption", disable=not progress)

        self.eval()
        with autocast_llm(self.llm, self.device, checked_precision):
            for prompt_length, rows in tokens.batches(batch_tokens or self.default_batch_tokens):
                rows_with_tokens = [row for row in rows if len(tokens.ids[row])]
                if rows_with_tokens:
                    batch = self.collate([tokens.ids[row] for row in rows_with_tokens], prompt_length)
                    on_device.append((rows_with_tokens, self._encode_batch(batch).float()))
                if sum(len(rows) for rows, _ in on_device) >= MAX_EMBEDDINGS_ON_DEVICE:
                    _copy_embeddings_to_cpu(on_device, embeddings)
                bar.update(len(rows))
            _copy_embeddings_to_cpu(on_device, embeddings)
        return embeddings

    def _encode_batch(self, batch: dict[str, Any]) -> Tensor:
        """Encode a batch. Exclude prompts from mean pooling without a GPU synchronisation."""
        first, *modules = self.st
        features = first(batch)
        if {"prompt_length", "caption_lengths"} <= features.keys():
            pooling = modules[0]
            if pooling.pooling_mode == "mean" and not pooling.include_prompt:
                remove_prompt_hidden_states(features)
        for module in modules:
            features = module(features)
        embeddings: Tensor = features["sentence_embedding"]
        return embeddings

    def move_for_encoding(self, device: str | torch.device, precision: str) -> None:
        """Cast the weights for encoding in `precision`, and move the encoder to a device.

        For bf16, the LLM's linear layers are cast to bf16. Encoding then needs less than half the memory and returns
        bit-identical embeddings. However, the encoder can no longer be saved, trained or used in fp32, and `identity`
        raises an error.
        """
        self.weights_precision = self._check_encoding_precision(precision)
        cast_linear_weights(self.llm, self.weights_precision)
        self.to(device)

    @property
    def has_full_precision(self) -> bool:
        """True if all weights are in fp32, False after a call to `move_for_encoding` with bf16 or bf16+N."""
        return self.weights_precision == "fp32"

    def _check_encoding_precision(self, name: str) -> Precision:
        precision, available = Precision(name), self.weights_precision
        if precision == "fp16":
            raise ValueError("the caption encoder's precision must be fp32, bf16 or bf16+N (got 'fp16')")
        if available != "fp32" and (precision == "fp32" or precision.num_fp32_layers > available.num_fp32_layers):
            raise ValueError(
                f"the encoder cannot run in {precision}, because its weights were converted to {available}. Load the "
                "encoder again"
            )
        return precision

    def identity(self, precision: str = "fp32") -> dict[str, Any]:
        """Return a dict of everything that affects the embeddings. Raise ValueError if weights are in bf16."""
        self._check_encoding_precision("fp32")
        common = {
            "weights": hash_weights(self.st),
            "tokenizer": hash_text(_serialize_tokenizer(self.tokenizer)),
            "modules": [type(m).__name__ for m in self.st],
            "precision": precision,
        }
        if self.is_static:
            _, *layers = self.st
            configs = [layer.get_config_dict() for layer in layers]
            return {**common, "config": hash_text(json.dumps(configs, sort_keys=True))}
        return {
            **common,
            "bidirectional": not getattr(self.llm.config, "is_causal", not is_encoder_only(self.llm)),
            "layers": self.llm.config.num_hidden_layers,
            "config": fingerprint(select_output_entries(self.llm.config)),
            "header": self.prefix,
            "pooling": self.st[1].get_config_dict(),
            "max_length": self.st.max_seq_length,
        }

    @hide_loading_progress_bars()
    def save_pretrained(self, folder: str | Path) -> None:
        """Save the encoder in the sentence-transformers format. Raise ValueError if weights are in bf16."""
        self._check_encoding_precision("fp32")
        self.st.save_pretrained(str(folder), create_model_card=False)
        if not self.is_static and not is_encoder_only(self.llm) and not getattr(self.llm.config, "is_causal", True):
            file = Path(folder) / "config_sentence_transformers.json"  # sentence-transformers omits the requirements
            atomic_write_text(file, json.dumps({**read_json(file), "requirements": REQUIREMENTS}, indent=2))


def load_encoder_for_evaluation(path: str | Path, device: torch.device, **options: Any) -> CaptionEncoder:
    """Load a caption encoder onto a device in the precision of the `evaluate` stage."""
    encoder = CaptionEncoder.from_pretrained(path, device="cpu", **options)
    precision = resolve_precision("evaluate", "auto", device, lambda: calibrate_precision(encoder, device))
    encoder.move_for_encoding(device, precision)
    return encoder


def _resolve_model_path(path: str | Path) -> str:
    path = resolve_pretrained_name(str(path))
    if (Path(path) / "text/modules.json").is_file():  # an llm2clip model folder
        read_model_config(Path(path), path)  # raises an error for an unsupported format version
        return str(Path(path) / "text")
    return str(resolve_gguf_folder(path)) if path.endswith(".gguf") else path


def _copy_embeddings_to_cpu(on_device: list[tuple[list[int], Tensor]], embeddings: Tensor) -> None:
    if on_device:
        rows = [row for batch_rows, _ in on_device for row in batch_rows]
        # The batches are concatenated before the copy because each copy synchronises with the GPU.
        embeddings[rows] = torch.cat([batch for _, batch in on_device]).cpu()
        on_device.clear()


def _serialize_tokenizer(tokenizer: Any) -> str:
    """Serialise a tokenizer without the padding and truncation settings, which calls to the tokenizer may change."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)  # a static encoder's tokenizer is the backend
    values = json.loads(backend.to_str())
    return json.dumps({k: v for k, v in values.items() if k not in ("padding", "truncation")}, sort_keys=True)
