"""Deterministic weights, images and texts that the reference numbers in fixtures/official_reference.json belong to.

The same numbers come out on every machine and with every version of PyTorch, because only integer arithmetic, one
multiplication and one addition are involved. This module imports nothing from llm2clip, so that
fixtures/make_official_reference.py can use it in the environment of the LLM2CLIP authors' code.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FIXTURE = Path(__file__).parent / "fixtures/official_reference.json"

TEXT_DIM, EMBED_DIM, WIDTH, LAYERS, PATCH, IMAGE_SIZE = 32, 24, 128, 2, 8, 32
SPECIAL_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LLM_CONFIG = {
    "vocab_size": 260,
    "hidden_size": TEXT_DIM,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_theta": 500000.0,
    "bos_token_id": 256,
    "eos_token_id": 259,
    "pad_token_id": 259,
}
LATENTS, LATENT_HEADS, LATENT_HEAD_DIM = 6, 2, 24
NV_EMBED_FIXTURE = Path(__file__).parent / "fixtures/nv_embed_reference.json"
LORA_TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
MAX_LENGTH = 64  # tokens
TEXTS = {
    "short": "a dog",
    "longer": "Two children play in the snow.",
    "other script": "一只猫",
    "spaces at the end": "a dog  \n",
    "spaces at both ends": "  a dog ",
    "longer than the window": "An old man watches the children. " * 4,
}
# The official code cuts the end token off texts that are longer than the window.
NV_EMBED_TEXTS = {name: text for name, text in TEXTS.items() if name != "longer than the window"}


def uniform(name: str, count: int) -> np.ndarray:
    """Return `count` float32 values in [-1, 1) that depend only on the name: SplitMix64 of its CRC-32 and an index."""
    with np.errstate(over="ignore"):
        z = (np.uint64(zlib.crc32(name.encode())) << np.uint64(32)) + np.arange(count, dtype=np.uint64)
        z = z * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)


def make_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the weight with this name.

    Matrices and convolutions have a variance of 1 / fan-in. Other weights are close to 1 and biases close to 0.
    """
    if name == "logit_scale":
        return torch.tensor(3.25)
    if name == "logit_bias":
        return torch.tensor(-9.0)
    values = torch.from_numpy(uniform(name, math.prod(shape))).reshape(shape)
    if len(shape) > 1:
        return values * math.sqrt(3 / math.prod(shape[1:]))
    return values * 0.2 + (1 if name.endswith("weight") else 0)


def make_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: make_weight(name, shape) for name, shape in shapes.items()}


def make_dummy_pixels(count: int = 3, size: int = IMAGE_SIZE) -> Tensor:
    """Return images, (count, 3, size, size) uint8."""
    values = torch.from_numpy(uniform("pixels", count * 3 * size * size)).reshape(count, 3, size, size)
    return ((values + 1) * 128).to(torch.uint8)


def make_embeddings(count: int = 5, dim: int = TEXT_DIM) -> Tensor:
    """Return caption embeddings, (count, dim) float32."""
    return torch.from_numpy(uniform("embeddings", count * dim)).reshape(count, dim) * 3


def save_llm(folder: Path) -> Path:
    """Save a Llama with these weights, and a byte-level tokenizer with Llama 3's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    model = LlamaModel(LlamaConfig(**LLM_CONFIG))
    model.load_state_dict(make_weights({name: tuple(t.shape) for name, t in model.state_dict().items()}))
    model.save_pretrained(folder)

    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    begin = SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=SPECIAL_TOKENS[3],
        pad_token=SPECIAL_TOKENS[3],
        additional_special_tokens=list(SPECIAL_TOKENS[1:3]),
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.save_pretrained(folder)
    return folder


def save_nv_embed(folder: Path) -> Path:
    """Save an NV-Embed-v2 with these weights in its published layout, with a byte-level tokenizer."""
    from safetensors.torch import save_file
    from transformers import MistralConfig, MistralModel

    llm = {**LLM_CONFIG, "rope_theta": 10000.0, "model_type": "bidir_mistral", "sliding_window": 4}
    architecture = {name: value for name, value in llm.items() if name not in ("model_type", "rope_theta")}
    states = MistralModel(MistralConfig(**architecture)).state_dict()
    shapes = {f"embedding_model.{name}": tuple(tensor.shape) for name, tensor in states.items()}
    pooling = {
        "latents": (LATENTS, TEXT_DIM),
        "cross_attend_blocks.0.norm.weight": (TEXT_DIM,),
        "cross_attend_blocks.0.norm.bias": (TEXT_DIM,),
        "cross_attend_blocks.0.norm_context.weight": (TEXT_DIM,),
        "cross_attend_blocks.0.norm_context.bias": (TEXT_DIM,),
        "cross_attend_blocks.0.fn.to_q.weight": (LATENT_HEADS * LATENT_HEAD_DIM, TEXT_DIM),
        "cross_attend_blocks.0.fn.to_kv.weight": (2 * LATENT_HEADS * LATENT_HEAD_DIM, TEXT_DIM),
        "cross_attend_blocks.0.fn.to_out.weight": (TEXT_DIM, LATENT_HEADS * LATENT_HEAD_DIM),
        "cross_attend_blocks.1.norm.weight": (TEXT_DIM,),
        "cross_attend_blocks.1.norm.bias": (TEXT_DIM,),
        "cross_attend_blocks.1.fn.net.0.weight": (8 * TEXT_DIM, TEXT_DIM),
        "cross_attend_blocks.1.fn.net.0.bias": (8 * TEXT_DIM,),
        "cross_attend_blocks.1.fn.net.2.weight": (TEXT_DIM, 4 * TEXT_DIM),
        "cross_attend_blocks.1.fn.net.2.bias": (TEXT_DIM,),
    }
    shapes |= {f"latent_attention_model.{name}": shape for name, shape in pooling.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(make_weights(shapes), folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "nvembed",
        "architectures": ["NVEmbedModel"],
        "auto_map": {"AutoModel": "modeling_nvembed.NVEmbedModel"},
        "padding_side": "right",
        "is_mask_instruction": True,
        "add_eos": True,
        "add_pad_token": True,
        "text_config": {**llm, "_name_or_path": str(folder)},
        "latent_attention_config": {
            "model_type": "latent_attention",
            "num_latents_value": LATENTS,
            "num_cross_heads": LATENT_HEADS,
            "cross_dim_head": LATENT_HEAD_DIM,
            "hidden_dim": TEXT_DIM,
            "latent_dim": TEXT_DIM,
            "output_normalize": False,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    # The published repository also has the layout of sentence-transformers, which requires its code.
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    save_llama2_tokenizer(folder)
    return folder


def save_llama2_tokenizer(folder: Path, adds_end_token: bool = False) -> None:
    """Save a byte-level tokenizer with the special tokens of Llama 2 and Mistral. It adds the begin token to texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    special_tokens = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if adds_end_token else "<s> $A", special_tokens=special_tokens
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_input_names=["input_ids", "attention_mask"]
    ).save_pretrained(folder)


def save_lora(folder: Path, base: Path, seed: str) -> Path:
    """Save a LoRA adapter for `save_llm`'s model, in PEFT's layout. Each seed gives another adapter."""
    from safetensors.torch import save_file

    sizes = {
        "self_attn.q_proj": (TEXT_DIM, TEXT_DIM),
        "self_attn.v_proj": (TEXT_DIM, TEXT_DIM // 2),
        "mlp.up_proj": (TEXT_DIM, 64),
        "mlp.down_proj": (64, TEXT_DIM),
    }
    tensors = {}
    for layer in range(2):
        for module, (in_features, out_features) in sizes.items():
            name = f"base_model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = make_weight(f"{seed} {name} A", (4, in_features))
            tensors[f"{name}.lora_B.weight"] = make_weight(f"{seed} {name} B", (out_features, 4))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 4, "lora_alpha": 8, "lora_dropout": 0.05}
    config |= {"target_modules": LORA_TARGETS, "bias": "none", "task_type": None, "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
