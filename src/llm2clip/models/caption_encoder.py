"""The caption encoder: text in, one vector out.

A decoder LLM read in both directions, mean-pooled, held as an ordinary `SentenceTransformer` so that the folder it
saves is read by sentence-transformers with the same vectors and none of our code (but where LoRA is kept apart). What
is ours is how it is built (attention, depth, template, pooling: all explicit), how it is fed (batches of similar length
under a token budget, end to end) and how it is identified (a fingerprint of everything that changes an embedding).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from tqdm.auto import tqdm

from llm2clip.cpu_tuning import flex_attention_is_correct, onednn_matmul
from llm2clip.models import lora
from llm2clip.models.length_batching import TokenizedTexts, default_batch_tokens
from llm2clip.models.packing import PACKED, can_pack, pack_batch
from llm2clip.models.precision import autocast_precision, parse_precision
from llm2clip.models.pretrained import resolve_pretrained

CAPTION = "{caption}"
COLLECTED = 8192  # vectors that wait on the device


class CaptionEncoder(nn.Module):
    """LLM + pooling + template. Build it with `from_pretrained`; `encode` gives the vectors."""

    def __init__(self, st: SentenceTransformer) -> None:
        super().__init__()
        self.st: Any = st
        self._prefixes: dict[str, int] = {}  # texts before a caption, and their tokens

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        bidirectional: bool | None = None,
        layers: int | None = None,
        template: str | None = None,
        pooling: str | None = None,
        max_length: int | None = None,
        truncate_dim: int | None = None,
        attention: str | None = None,
        device: str | torch.device | None = None,
    ) -> CaptionEncoder:
        """Open a decoder LLM, a sentence-transformers encoder, or a `.gguf` file as a caption encoder in float32.

        Options left at None are what the folder says; for a bare LLM: both directions, mean pooling, no template,
        512 tokens.

        Args:
            path: folder or hub id of a transformers or sentence-transformers model, a model folder of ours, a
                `.gguf` file, or a name of `models/assets.py`, which is fetched.
            bidirectional: every token attends to every token (True) or only to earlier ones (False).
            layers: keep only the first N blocks; the final norm stays.
            template: text around the caption, such as `"<|im_start|>user\\n{caption}<|im_end|>"`. What stands before
                `{caption}` is read but left out of the pooling, what stands after it, one special token, is pooled (as
                the paper does). It takes the place of special tokens that the tokenizer adds by itself.
            pooling: a pooling mode of sentence-transformers: mean, weightedmean, lasttoken, cls, max.
            max_length: longest input in tokens, template included.
            truncate_dim: keep only the first so many numbers of a vector, as one tuned for it (Matryoshka) allows.
            attention: how it is computed, a name that transformers knows, such as sdpa, eager, flex_attention or
                flash_attention_2; by default `packed` (see `models/packing.py`) for decoders that can. Under `packed`
                and flash attention, which takes bf16 alone, no token is padding.
            device: where to put it; by default a GPU when there is one.

        Raises:
            ValueError: an option does not fit the model.
            OSError: there is no such model.
        """
        path = resolve_pretrained(str(path))
        if (Path(path) / "text/modules.json").is_file():  # a model folder
            path = Path(path) / "text"
        if str(path).endswith(".gguf"):
            from llm2clip.models.pretrained import resolve_gguf

            path = resolve_gguf(Path(path))
        st = _open(str(path), pooling or "mean", device)
        encoder = cls(st)
        if layers is not None:
            _keep_layers(encoder.llm, layers)
        if bidirectional is not None:
            _set_bidirectional(encoder.llm, bidirectional)
        if pooling is not None:
            st[1] = Pooling(encoder.embed_dim, pooling, include_prompt=st[1].include_prompt)
        if template is not None:
            _set_template(st, template)
        if max_length is not None:
            st.max_seq_length = max_length
        if truncate_dim is not None:
            _cut(st, truncate_dim)
        if attention is not None:
            if attention == "flex_attention" and encoder.device.type == "cpu" and not flex_attention_is_correct():
                raise ValueError(
                    "flex_attention gives NaN on CPUs without AVX-512 (torch 2.13): leave --encoder.attention out"
                )
            encoder.llm.set_attn_implementation(attention)
        elif can_pack(encoder.llm):
            encoder.llm.set_attn_implementation(PACKED)
        return encoder.eval()

    @property
    def llm(self) -> Any:
        """The transformers model inside, without what is around it where LoRA is on it."""
        model = self.st[0].model
        return model.get_base_model() if isinstance(model, PeftModel) else model

    @property
    def tokenizer(self) -> Any:
        return self.st.tokenizer

    @property
    def embed_dim(self) -> int:
        """Width of a caption's vector."""
        dimension = self.st.get_embedding_dimension()
        assert dimension is not None
        return dimension

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def attention(self) -> str:
        """How attention is computed, by transformers' name."""
        return str(self.llm.config._attn_implementation)

    @property
    def prefix(self) -> str:
        """The template's text before the caption."""
        name = self.st.default_prompt_name
        return (self.st.prompts[name] or "") if name else ""

    def count_truncated(self, captions: Sequence[str]) -> int:
        """How many of some captions are longer than `max_length`, and lose their end."""
        return len(self.tokenize(captions).truncated)

    def tokenize(self, captions: Sequence[str], prompts: Sequence[str] | None = None) -> TokenizedTexts:
        """Captions to token ids, header and special tokens included, cut to the encoder's `max_length`.

        Args:
            captions: the texts.
            prompts: an instruction before each, or "" for none; it is read and left out of the pooling, as the header
                and whatever special token comes before it.
        """
        if not captions:
            return TokenizedTexts([], [], [])
        prefixes = [self.prefix + p for p in prompts] if prompts else [self.prefix] * len(captions)
        texts = [prefix + caption for prefix, caption in zip(prefixes, captions, strict=True)]
        ids = self.tokenizer(texts, verbose=False, return_attention_mask=False)["input_ids"]
        limit = self.st.max_seq_length
        truncated = [i for i, row in enumerate(ids) if limit and len(row) > limit]
        for i in truncated:
            ids[i] = self.tokenizer(texts[i], truncation=True, max_length=limit)["input_ids"]
        unpooled = {prefix: self.prompt_length(prefix) for prefix in dict.fromkeys(prefixes)}
        return TokenizedTexts(ids, truncated, [unpooled[prefix] for prefix in prefixes])

    def prompt_length(self, prefix: str) -> int:
        """How many tokens a text before the caption takes, the special token that may begin it among them.

        They are those that do not depend on the caption. Counting the tokens of the prefix alone is wrong where it ends
        in a space, which joins the next word.
        """
        if not prefix:
            return 0
        if prefix not in self._prefixes:
            one, other = self.tokenizer([prefix + "a", prefix + "1"], return_attention_mask=False)["input_ids"]
            self._prefixes[prefix] = next(n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
        return self._prefixes[prefix]

    def collate(self, ids: Sequence[Sequence[int]], unpooled: int | None = None) -> dict[str, Any]:
        """A batch of token ids as the model reads it: padded, with input_ids and attention_mask, both (B, T) int64; or
        in one row, where attention can do it, as `packed` describes.

        Args:
            ids: from `tokenize`.
            unpooled: tokens at the start of each that are not pooled; None is those of the header.
        """
        if self.attention == PACKED or "flash" in self.attention:
            batch = pack_batch(ids, self.attention, self.device)
        else:
            batch = dict(self.tokenizer.pad({"input_ids": list(ids)}, return_tensors="pt"))
            batch = {k: v.to(self.device) for k, v in batch.items() if k in ("input_ids", "attention_mask")}
        if length := self.prompt_length(self.prefix) if unpooled is None else unpooled:
            batch["prompt_length"] = length
        return batch

    def exclude_prompts_from_pooling(self, prompts: Iterable[str]) -> None:
        """Pool the caption's tokens alone where a text is read after an instruction, here and in the saved folder.

        Raises:
            ValueError: sentence-transformers would count the tokens of one of `prompts` wrongly.
        """
        for prompt in prompts:
            whole = self.prefix + prompt
            if self.st[0]._get_prompt_length(whole) != self.prompt_length(whole):
                raise ValueError(
                    f"sentence-transformers would count the tokens of the instruction {prompt!r} wrongly: it may not "
                    "end in a space or in a special token; end it with a line break"
                )
        self.st[1].include_prompt = False

    def forward(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Token ids of B captions to their vectors, (B, width), with gradients when enabled."""
        vectors: Tensor = self.st(self.collate(ids))["sentence_embedding"]
        return vectors

    @torch.no_grad()
    @onednn_matmul()
    def encode(
        self,
        captions: str | Sequence[str] | TokenizedTexts,
        *,
        batch_tokens: int | None = None,
        precision: str = "fp32",
        progress: bool | tqdm = False,
    ) -> Tensor:
        """Captions to vectors, (N, width) float32 on the CPU, in the order given and not normalised.

        Captions are batched with others of their length, so that hardly a token is padding; a caption's vector does
        not depend on its neighbours (to 1e-5). That of a text without any token is zero.

        Args:
            captions: texts, or what `tokenize` made of them.
            batch_tokens: tokens in a batch, padding included.
            precision: fp32; bf16 for two to three times the speed; or bf16+N, the first N blocks in fp32, where plain
                bf16 is too coarse: see `models/precision.py`.
            progress: show a bar, or the bar to move on.

        Raises:
            ValueError: the attention does not do the precision.
        """
        parse_precision(precision)
        if "flash" in self.attention and precision == "fp32":
            raise ValueError(f"{self.attention} does not multiply fp32: ask for bf16, or for another attention")
        if isinstance(captions, str):
            captions = [captions]
        tokens = captions if isinstance(captions, TokenizedTexts) else self.tokenize(list(captions))
        out = torch.zeros(len(tokens.ids), self.embed_dim)
        done: list[tuple[list[int], Tensor]] = []

        def collect() -> None:
            """From the device in one go: each copy waits for all the work before it."""
            if done:
                out[[r for rows, _ in done for r in rows]] = torch.cat([vectors for _, vectors in done]).cpu()
                done.clear()

        self.eval()
        budget = batch_tokens or default_batch_tokens(self.device)
        bar = (
            progress
            if isinstance(progress, tqdm)
            else tqdm(total=len(tokens.ids), desc="encode", unit="caption", disable=not progress)
        )
        with autocast_precision(self.llm, self.device, precision):
            for length, rows in tokens.batches(budget):
                if some := [r for r in rows if len(tokens.ids[r])]:
                    features = self.collate([tokens.ids[r] for r in some], length)
                    done.append((some, self.st(features)["sentence_embedding"].float()))
                if sum(len(rows) for rows, _ in done) >= COLLECTED:
                    collect()
                bar.update(len(rows))
            collect()
        return out

    def identity(self, precision: str = "fp32") -> dict[str, Any]:
        """All that changes an embedding, by name: hash of the weights and of the tokenizer, and the settings."""
        weights = hashlib.sha256()
        for name, tensor in sorted(self.st.state_dict().items()):
            weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            weights.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        tokenizer = self.tokenizer.backend_tokenizer
        return {
            "weights": weights.hexdigest()[:32],
            "tokenizer": hashlib.sha256(_canonical_tokenizer(tokenizer).encode()).hexdigest()[:32],
            "bidirectional": not getattr(self.llm.config, "is_causal", not _is_encoder(self.llm)),
            "layers": self.llm.config.num_hidden_layers,
            "config": hashlib.sha256(json.dumps(_forward_config(self.llm), sort_keys=True).encode()).hexdigest()[:32],
            "header": self.prefix,
            "modules": [type(m).__name__ for m in self.st],
            "pooling": self.st[1].get_config_dict(),
            "max_length": self.st.max_seq_length,
            "precision": precision,
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the encoder in sentence-transformers layout (safetensors only); with LoRA that was not merged, its
        weights and the name of its LLM."""
        self.st.save_pretrained(str(folder), create_model_card=False)


def _open(path: str, pooling: str, device: str | torch.device | None) -> SentenceTransformer:
    """A sentence-transformers model as saved, or a bare transformers model with the pooling put on."""
    from transformers.utils import cached_file

    dev = str(device) if device is not None else None
    if lora.is_lora_folder(path):
        return lora.load_lora(path, dev)
    modules = cached_file(path, "modules.json", _raise_exceptions_for_missing_entries=False)
    if modules is not None:
        return SentenceTransformer(path, device=dev, trust_remote_code=False, model_kwargs={"dtype": torch.float32})
    transformer = _Whole(
        path,
        model_kwargs={"dtype": torch.float32, "trust_remote_code": False},
        processor_kwargs={"trust_remote_code": False},
        config_kwargs={"trust_remote_code": False},
        # Text goes in as it is: with a chat template in sight, sentence-transformers would wrap every caption in it.
        modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        module_output_name="token_embeddings",
    )
    transformer.__class__ = Transformer
    tokenizer: Any = transformer.tokenizer
    tokenizer.chat_template = None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    st = SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension(), pooling)], device=dev)
    st.max_seq_length = min(512, transformer.max_seq_length or 512)
    _set_bidirectional(transformer.model, True)
    return st


class _Whole(Transformer):
    """Refuses a folder that lacks weights: transformers only warns, and leaves these random."""

    def _load_model(self, model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        loaded: Any = super()._load_model(model_name_or_path, *args, **kwargs, output_loading_info=True)
        model, report = loaded
        if missing := sorted(name for name in report["missing_keys"] if not name.startswith("pooler.")):  # unused
            raise ValueError(f"{model_name_or_path} lacks {len(missing):,} weights, {missing[0]} among them")
        return model


def _is_encoder(llm: Any) -> bool:
    """Whether the model reads both ways by nature (BERT and its kin), so that there is no switch to set."""
    return not hasattr(llm, "layers") and hasattr(llm, "encoder")


def _set_bidirectional(llm: Any, bidirectional: bool) -> None:
    """The switch that transformers >= 5.2 reads at every forward, under every attention backend, and saves."""
    if _is_encoder(llm):
        if not bidirectional:
            raise ValueError(f"{type(llm).__name__} is an encoder: it cannot be made causal")
        return
    llm.config.is_causal = not bidirectional
    llm.config.use_cache = False


def _keep_layers(llm: Any, layers: int) -> None:
    """Cut the model to its first `layers` blocks, in the config too, so that the saved folder loads as it is."""
    owner, name = (llm.encoder, "layer") if _is_encoder(llm) else (llm, "layers")
    blocks = getattr(owner, name)
    if not 1 <= layers <= len(blocks):
        raise ValueError(f"layers must be between 1 and {len(blocks)}, the depth of this model; got {layers}")
    setattr(owner, name, blocks[:layers])
    llm.config.num_hidden_layers = layers
    if getattr(llm.config, "layer_types", None):
        llm.config.layer_types = llm.config.layer_types[:layers]


def _cut(st: Any, width: int) -> None:
    """Put a matrix of ones and zeros at the end, which a saved folder carries: sentence-transformers' own setting is
    not saved."""
    whole = st.get_embedding_dimension()
    if not 0 < width <= whole:
        raise ValueError(f"width must be between 1 and {whole}, the encoder's own; got {width}")
    first = torch.eye(width, whole)
    st.append(Dense(whole, width, bias=False, activation_function=nn.Identity(), init_weight=first).to(st.device))


def _set_template(st: Any, template: str) -> None:
    """Put the header into the prompt that sentence-transformers reads, and the end into the tokenizer itself."""
    if template.count(CAPTION) != 1:
        raise ValueError(f"template must contain {CAPTION} exactly once; got {template!r}")
    header, end = template.split(CAPTION)
    tokenizer = st.tokenizer
    if end:
        from tokenizers.processors import TemplateProcessing

        ids = tokenizer(end, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] not in tokenizer.all_special_ids:
            raise ValueError(f"what follows {CAPTION} must be one special token; {end!r} is {len(ids)} tokens")
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, ids[0])]
        )
    st.default_prompt_name, st[1].include_prompt = None, True
    if header:
        st.prompts["caption"] = header
        st.default_prompt_name = "caption"
        st[1].include_prompt = False
        if st[0]._get_prompt_length(header) != CaptionEncoder(st).prompt_length(header):
            raise ValueError(
                f"sentence-transformers would count the tokens of the template's header {header!r} wrongly: it may not "
                f"end in a space, nor in a special token where nothing follows {CAPTION}"
            )


def _forward_config(llm: Any) -> dict[str, Any]:
    """The settings of the model that its forward pass reads, without where it came from and how it is run."""
    apart = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "is_causal")
    config: dict[str, Any] = json.loads(llm.config.to_json_string(use_diff=False))
    return {k: v for k, v in config.items() if k not in apart}


def _canonical_tokenizer(tokenizer: Any) -> str:
    """The tokenizer as JSON, without the padding and truncation that a previous call happened to leave set."""
    state = json.loads(tokenizer.to_str())
    state.pop("padding", None)
    state.pop("truncation", None)
    return json.dumps(state, sort_keys=True)
