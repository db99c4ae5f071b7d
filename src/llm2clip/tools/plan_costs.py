"""Parameter counts, FLOPs and activation memory, measured by running models on fake tensors.

Fake tensors have shapes but no values, so models of any size run without weights, memory or a GPU. The fake device is a
CPU, but the results also apply to GPUs, because CPU attention kernels save as little for the backward pass as GPU
kernels, and CPU autocast lowers the precision in the same way as GPU autocast.

A multiply-add counts as 2 FLOPs. Only matmuls and convolutions are counted. All layers of an LLM cost the same, so the
cost of an LLM is extrapolated from versions with two and three layers.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from llm2clip.config import AlignConfig, EncoderConfig, TuneConfig
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.loading import load_transformers_config
from llm2clip.models.precision import Precision, get_llm_layers
from llm2clip.models.text.packing import GPU_BATCH_TOKENS, PACKED, pack_captions, supports_packed_attention
from llm2clip.models.text.sentence_transformer import cast_frozen_linear_layers
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.train.initial_model import make_model_config
from llm2clip.train.optim import select_trainable_weights


@dataclass(frozen=True)
class PassCosts:
    """FLOPs and memory of a forward and backward pass, per item such as an image or a caption."""

    trained: int  # number of trained parameters
    forward: float
    backward: float
    saved: float  # bytes of activations saved by autograd
    copies: float  # bytes of half-precision weight copies saved by autograd, independent of the number of items


@dataclass(frozen=True)
class TextCosts:
    """Costs of running and fine-tuning the language model."""

    tokens: float  # number of tokens per caption, including the template
    embed_dim: int  # dimension of the stored embeddings
    parameters: int  # number of parameters, excluding the language modelling head
    linear: int  # number of weights in linear layers
    largest_linear: int  # number of linear weights in the largest transformer layer
    layers: int  # number of transformer layers
    trained: int  # number of parameters trained in the `tune` stage
    forward: float  # forward-pass FLOPs per caption, without LoRA
    tune_forward: float  # forward-pass FLOPs per caption in a `tune` step
    tune_backward: float  # FLOPs per caption of the backward pass in a `tune` step
    saved_per_token: float  # bytes saved by autograd per token and transformer layer
    hidden_size: int  # dimension of the hidden states, which are float32 at any precision

    def count_tune_flops(self, config: TuneConfig) -> float:
        """Return the FLOPs of a `tune` step per caption, including repeated forward passes."""
        tokens_per_batch = 2 * config.batch_size * self.tokens  # a pair consists of two texts
        several_passes = tokens_per_batch > (config.batch_tokens or GPU_BATCH_TOKENS)
        num_forwards = 1 + config.gradient_checkpointing + (config.grad_cache and several_passes)
        return self.tune_forward * num_forwards + self.tune_backward


@dataclass(frozen=True)
class ImageCosts(PassCosts):
    """Costs of an image and its captions in the `align` stage. `forward` excludes a frozen tower."""

    tower: int  # number of parameters in the tower
    projection: int  # number of parameters in the projection
    adapter: int  # number of parameters in the adapter
    feature_dim: int  # dimension of the tower's image features
    embed_dim: int  # dimension of the shared embedding space
    captions: float  # number of captions per image in each step
    tower_forward: float  # FLOPs of the tower's forward pass
    saved_per_layer: float  # bytes saved by autograd in each tower layer; 0 if the tower is frozen

    @property
    def parameters(self) -> int:
        return self.tower + self.projection + self.adapter


def measure_text_costs(encoder: EncoderConfig, tune: TuneConfig, tokens: float, is_cpu: bool = False) -> TextCosts:
    """Measure the costs of a caption encoder for captions of `tokens` tokens, including the template.

    `tune.precision` must be fp32, bf16 or fp16. If `is_cpu` is True, decoders use the CPU attention for packed
    sequences, which is not fused.
    """
    config = get_llm_config(encoder)
    llm = build_llm_on_meta_device(config)
    layers, parameters = get_llm_layers(llm), count_parameters(llm)
    linear, largest_linear = _count_linear_weights(layers), max(_count_linear_weights(layer) for layer in layers)
    length = max(1, round(tokens))
    two, three = (_measure_shortened_llm(config, tune, n, length, is_cpu) for n in (2, 3))

    def extrapolate(costs: Callable[[PassCosts], float]) -> float:
        total = costs(two) + (len(layers) - 2) * (costs(three) - costs(two))
        return total * tokens / length

    trained = two.trained + (len(layers) - 2) * (three.trained - two.trained)
    tune_forward = extrapolate(lambda costs: costs.forward)
    return TextCosts(
        tokens=tokens,
        embed_dim=encoder.truncate_dim or config.hidden_size,
        parameters=parameters,
        linear=linear,
        largest_linear=largest_linear,
        layers=len(layers),
        trained=trained,
        forward=tune_forward - (2 * trained * tokens if tune.lora_r else 0),
        tune_forward=tune_forward,
        tune_backward=extrapolate(lambda costs: costs.backward),
        saved_per_token=(three.saved - two.saved) / length,
        hidden_size=config.hidden_size,
    )


def measure_image_costs(config: AlignConfig, text_dim: int, captions: float) -> ImageCosts:
    """Measure the costs per image in the `align` stage, for `captions` captions per image."""
    model = build_align_model(config, text_dim)
    tower = model.tower
    tower_parameters = count_parameters(tower)
    with torch.device("meta"):
        select_trainable_weights(model, config)  # freezes the tower or adds LoRA layers, depending on the config

    def make_dummy_pixels(images: int) -> Tensor:
        return torch.zeros(images, 3, tower.preprocess.size, tower.preprocess.size, dtype=torch.uint8)

    def embed_images(images: int) -> Tensor:
        if config.tower_lr == 0:
            embeddings = model(features=torch.zeros(images, tower.feature_dim))[0]
        else:
            embeddings = model(pixels=make_dummy_pixels(images))[0]
        return cast(Tensor, embeddings)

    def embed_texts(texts: int) -> Tensor:
        return cast(Tensor, model(embeddings=torch.zeros(texts, text_dim))[1])

    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        image = measure_pass_costs(model, embed_images, config.precision)
        text = measure_pass_costs(model, embed_texts, config.precision)
        tower.requires_grad_(False)  # with `no_grad`, the FLOP counter would fail for attention pooling
        tower_forward = count_flops(lambda: tower(make_dummy_pixels(1)))
    return ImageCosts(
        tower=tower_parameters,
        projection=count_parameters(model.projection),
        adapter=count_parameters(model.adapter),
        trained=image.trained,
        feature_dim=tower.feature_dim,
        embed_dim=model.config.embed_dim,
        captions=captions,
        tower_forward=tower_forward,
        forward=image.forward + captions * text.forward,
        backward=image.backward + captions * text.backward,
        saved=image.saved + captions * text.saved,
        saved_per_layer=image.saved / max(1, len(tower.get_blocks())) if config.tower_lr else 0.0,
        copies=image.copies + text.copies,
    )


def measure_pass_costs(model: nn.Module, run: Callable[[int], Tensor], precision: str) -> PassCosts:
    """Measure the costs per item of a forward and backward pass. Must be called in a `FakeTensorMode` context.

    `run` calls the model with the specified number of items. `precision` must be fp32, bf16 or fp16.
    """
    weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    saved_bytes = {}
    for items in (2, 1):  # the bytes for 2 items minus the bytes for 1 item are the bytes per item
        sizes: dict[int, int] = {}  # storage id -> bytes, so that shared storages are counted once

        def record_saved_tensor_size(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                sizes[storage._cdata] = storage.nbytes()
            return tensor

        # fp16 and bf16 values have the same size, so bf16 autocast represents both.
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32")
        hooks = torch.autograd.graph.saved_tensors_hooks(record_saved_tensor_size, lambda tensor: tensor)
        counter = FlopCounterMode(display=False, custom_mapping=_FLOP_FORMULAS)
        with autocast, hooks, counter:
            output = run(items)  # the output keeps the saved tensors alive
        forward = float(counter.get_total_flops())
        saved_bytes[items] = sum(sizes.values())
    backward = count_flops(output.sum().backward) if output.requires_grad else 0.0
    per_item = saved_bytes[2] - saved_bytes[1]
    return PassCosts(
        trained=count_parameters(model, only_trained=True),
        forward=forward,
        backward=backward,
        saved=per_item,
        copies=saved_bytes[1] - per_item,
    )


def count_flops(run: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False, custom_mapping=_FLOP_FORMULAS) as counter:
        run()
    return float(counter.get_total_flops())


def count_parameters(module: nn.Module, only_trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not only_trained)


def _measure_shortened_llm(config: Any, tune: TuneConfig, num_layers: int, tokens: int, is_cpu: bool) -> PassCosts:
    short_config = type(config).from_dict(config.to_dict())
    short_config.num_hidden_layers, short_config.is_causal = num_layers, False
    if getattr(short_config, "layer_types", None):
        short_config.layer_types = (config.layer_types * num_layers)[:num_layers]
    llm = build_llm_on_meta_device(short_config).train()
    is_packed = is_cpu and supports_packed_attention(llm)
    if is_packed:
        llm.set_attn_implementation(PACKED)
    llm.get_input_embeddings().requires_grad_(False)
    net: Any = llm
    if tune.lora_r:
        lora = LoraConfig(r=tune.lora_r, lora_dropout=tune.lora_dropout, target_modules="all-linear")
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses a deprecated transformers API
            net = get_peft_model(llm, lora)
        cast_frozen_linear_layers(net, Precision(tune.precision).dtype)

    def encode_captions(captions: int) -> Tensor:
        if is_packed:
            inputs = pack_captions([[0] * tokens] * captions, PACKED, torch.device("cpu"))
        else:
            inputs = {"input_ids": torch.zeros(captions, tokens, dtype=torch.long)}
        hidden_states: Tensor = net(**inputs).last_hidden_state
        return hidden_states

    with FakeTensorMode(allow_non_fake_inputs=True):
        net.to_empty(device="cpu")
        return measure_pass_costs(net, encode_captions, tune.precision)


def _count_linear_weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _count_attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Return the FLOPs of the attention matmuls QK^T and PV. Arguments are shapes of the form (..., tokens, dim)."""
    return int(2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))


def _count_attention_backward_flops(_grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return 2 * _count_attention_flops(query, key, value)


def _count_convolution_backward_flops(grad: Any, _input: Any, weight: Any, _bias: Any, *settings: Any, **_: Any) -> int:
    """Return the forward FLOPs times the number of requested gradients (of the input, the weight, or both).

    PyTorch's own formula ignores groups, so it greatly overestimates the FLOPs of depthwise convolutions.
    """
    output_mask = settings[-1]
    return int(2 * math.prod(grad) * math.prod(weight[1:]) * (bool(output_mask[0]) + bool(output_mask[1])))


# Formulas for operations that PyTorch's FLOP counter omits or counts incorrectly.
_FLOP_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _count_attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _count_attention_backward_flops,
    torch.ops.aten.convolution_backward: _count_convolution_backward_flops,
}


# ---- models without weights ------------------------------------------------------------------------------------------


_MODELS = yaml.safe_load(Path(__file__).with_name("plan_models.yaml").read_text(encoding="utf-8"))
LLMS: dict[str, dict[str, Any]] = _MODELS["llms"]
TOWERS: dict[str, tuple[str, int]] = _MODELS["towers"]


def get_llm_config(encoder: EncoderConfig) -> Any:
    """Return the transformers config of an encoder's language model, limited to the first `encoder.layers` layers.

    Raises:
        ValueError: The model is neither in `LLMS` nor a folder, and its config cannot be loaded from the hub.
    """
    from transformers import AutoConfig

    path, name = encoder.path, encoder.path.lower()
    known = LLMS.get(name) or LLMS.get(name.removesuffix("-instruct"))
    # Folders of llm2clip models contain the LLM in a subfolder.
    folder = Path(path) / "text" if (Path(path) / "text/config.json").is_file() else Path(path)
    if known is not None and not folder.exists():
        config = AutoConfig.for_model(**known)
    else:
        try:
            if folder.suffix == ".gguf":
                config = load_transformers_config(folder.parent, gguf_file=folder.name)
            else:
                config = load_transformers_config(folder)
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


def build_llm_on_meta_device(config: Any) -> Any:
    from transformers import AutoModel

    with torch.device("meta"):
        return AutoModel.from_config(config, dtype=torch.float32)


def build_tower_on_meta_device(align: AlignConfig) -> VisionTower:
    """Build the vision tower on the meta device.

    Raises:
        ValueError: The tower is not supported, or it is unknown and cannot be loaded from the hub.
    """
    name, size = TOWERS.get(align.tower.lower().removeprefix("hf:"), (align.tower, None))
    try:
        with torch.device("meta"):
            return VisionTower.from_pretrained(name, image_size=align.image_size or size, pretrained=False)
    except OSError as error:
        raise ValueError(
            f"--align.tower {align.tower} is not a folder, a timm model or one of {', '.join(TOWERS)}, and "
            f"loading it from the hub failed: {str(error).splitlines()[0]}"
        ) from error


def build_align_model(align: AlignConfig, text_dim: int) -> LLM2CLIP:
    """Build the model of the `align` stage on the meta device and in training mode."""
    tower = build_tower_on_meta_device(align)
    config = make_model_config(align, tower, text_dim)
    with torch.device("meta"):
        return LLM2CLIP(config, tower).train()
