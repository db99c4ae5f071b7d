"""Memory estimates per device and component, in bytes, based on what the code allocates.

A trained fp32 weight takes 4 bytes, its gradient 4 bytes, and AdamW's two moments 8 bytes. With several processes,
DistributedDataParallel keeps a second copy of the gradients in its communication buckets. The backward pass frees
activations while it creates gradients, so only the larger of the two counts in a single pass. With gradient caching,
the gradients of earlier passes are in memory together with the activations of the current pass.

On a CPU, weights also take up this memory while they are loaded, hashed and saved.
"""

from __future__ import annotations

from llm2clip.config import AlignConfig, TuneConfig
from llm2clip.models.text.batching import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS
from llm2clip.tools.plan.flops import ImageCosts, TextCosts
from llm2clip.train.losses import CHUNK

FRAMEWORK_OVERHEAD = 1e9  # bytes per device for the CUDA context and PyTorch's libraries
CPU_FRAMEWORK_OVERHEAD = 0.75e9  # bytes per process for PyTorch, transformers and the interpreter
USABLE_FRACTION = 0.93  # usable fraction of a device's memory; the rest is lost to fragmentation
NF4_BYTES = 0.5 + (1 + 4 / 256) / 64  # bytes per weight: 4 bits, plus a double-quantised 8-bit scale per 64 weights
MIN_EMBED_TOKENS = 8192  # smallest batch that `embed` tries on GPUs, in tokens


def bytes_per_value(precision: str) -> int:
    """Return the size of one matmul input value, in bytes."""
    return 4 if precision == "fp32" else 2


def optimizer_memory(trained: float, count: int, use_fsdp: bool) -> dict[str, float]:
    """Return the size of the gradients and AdamW state of `trained` weights in bytes, without the weights."""
    if use_fsdp:
        return {"gradients": 4 * trained / count, "AdamW": 8 * trained / count}
    return {"gradients": 4 * trained * (2 if count > 1 else 1), "AdamW": 8 * trained}


def tune_memory(
    text: TextCosts,
    config: TuneConfig,
    tokens: float,
    precision: str,
    count: int,
    use_fsdp: bool = False,
    is_cpu: bool = False,
) -> dict[str, float]:
    """Return the memory per component in the `tune` stage, in bytes.

    The component `loading` is the peak before training, while the weights are loaded in fp32.

    Args:
        text: costs of the language model.
        config: settings for the `tune` stage.
        tokens: number of tokens per caption.
        precision: matmul precision: fp32, bf16 or fp16.
        count: number of devices.
        use_fsdp: True if the weights are sharded with FSDP2.
        is_cpu: True if the device is a CPU.
    """
    value_bytes, shards = bytes_per_value(precision), count if use_fsdp else 1
    other_weights = text.parameters - text.linear
    tokens_per_step = 2 * config.batch_size * tokens  # two texts per pair
    tokens_per_pass = tokens_per_step
    if config.grad_cache:
        tokens_per_pass = min(
            tokens_per_step, config.batch_tokens or (CPU_BATCH_TOKENS if is_cpu else GPU_BATCH_TOKENS)
        )
    one_layer = text.saved_per_token
    if config.gradient_checkpointing:
        saved = text.layers * text.input_per_token + one_layer
    else:
        saved = text.layers * text.saved_per_token
    # The additional layer accounts for the gradients of the layer that is being processed in the backward pass.
    activations = tokens_per_pass * (saved + one_layer + text.saved_outside)

    parts: dict[str, float] = {}
    if config.lora_r:
        linear_bytes = NF4_BYTES if config.qlora else value_bytes
        parts["LLM"] = (linear_bytes * text.linear + 4 * other_weights) / shards
        parts["LoRA"] = 4 * text.trained / shards
        if config.qlora:
            parts["dequantised matrix"] = value_bytes * text.largest_matrix
    else:
        parts["LLM"] = 4 * text.parameters / shards
        if value_bytes == 2:
            parts["half-precision copies"] = 2 * (text.largest_linear if use_fsdp else text.linear)
    if use_fsdp:
        parts["gathered"] = 2 * value_bytes * text.largest_linear  # one layer in use and the next layer prefetched
    parts |= optimizer_memory(text.trained, count, use_fsdp)
    several_passes = tokens_per_pass < tokens_per_step
    parts["activations"] = _beyond_gradients(activations, text.trained / shards, several_passes)
    return parts | _fixed_parts(is_cpu, loading_memory(text) if is_cpu else 0.0)


def embed_memory(text: TextCosts, precision: str, is_cpu: bool = False) -> dict[str, float]:
    """Return the memory per component in the `embed` stage, in bytes.

    On GPUs, the estimate is for the smallest batch, because `embed` uses larger batches only if they fit into memory.
    The LLM is loaded on the CPU, and the device holds linear weights only in the matmul precision.
    """
    other_weights = text.parameters - text.linear
    parts = {"LLM": bytes_per_value(precision) * text.linear + 4.0 * other_weights}
    parts["activations"] = (CPU_BATCH_TOKENS if is_cpu else MIN_EMBED_TOKENS) * text.saved_per_token
    return parts | _fixed_parts(is_cpu, loading_memory(text) if is_cpu else 0.0)


def align_memory(
    image: ImageCosts,
    config: AlignConfig,
    captions: float,
    text_dim: int,
    count: int,
    use_fsdp: bool = False,
    loading: float = 0.0,
    is_cpu: bool = False,
) -> dict[str, float]:
    """Return the memory per component in the `align` stage, in bytes.

    Args:
        image: costs of the model that `align` trains.
        config: settings for the `align` stage; `config.precision` must be fp32, bf16 or fp16.
        captions: number of captions used per image in each step.
        text_dim: dimension of the stored embeddings.
        count: number of devices.
        use_fsdp: True if the weights are sharded with FSDP2.
        loading: device memory required for loading the LLM before training.
        is_cpu: True if the device is a CPU.
    """
    parameters, shards = image.tower + image.projection + image.adapter, count if use_fsdp else 1
    micro_batch = min(config.micro_batch_size or config.batch_size, config.batch_size)
    images = config.batch_size * count
    texts = images * captions
    saved = image.saved
    if config.gradient_checkpointing and image.saved > image.layer_inputs:
        saved = image.layer_inputs + image.saved_per_layer

    parts = {"model": 4 * parameters / shards, **optimizer_memory(image.trained, count, use_fsdp)}
    if config.precision != "fp32":
        parts["half-precision copies"] = image.copies / shards
    several_passes = micro_batch < config.batch_size
    activations = micro_batch * (saved + image.saved_per_layer)
    parts["activations"] = _beyond_gradients(activations, image.trained / shards, several_passes)
    # Embeddings, gathered embeddings and their gradients, plus a chunk of logits and two tensors of that chunk's size.
    chunk = min(CHUNK["cpu" if is_cpu else "cuda"], config.batch_size * texts)
    parts["loss"] = 12 * image.embed_dim * (images + texts) + 12 * chunk
    parts["captions"] = 4 * text_dim * micro_batch * captions
    if config.distill_weight:
        # Distances from this rank's features to those of all images, for both towers, with intermediate results and
        # gradients.
        parts["loss"] += 24 * config.batch_size * images
        parts["pretrained tower"] = 0.0 if config.caches_features else 4.0 * image.tower
    return parts | _fixed_parts(is_cpu, loading)


def _beyond_gradients(activations: float, trained: float, several_passes: bool) -> float:
    """Return the memory that activations take in addition to the gradients, in bytes.

    Args:
        activations: size of the activations of a pass, in bytes.
        trained: number of trained weights on the device.
        several_passes: True if gradients are accumulated over several passes.
    """
    return activations if several_passes else max(0.0, activations - 4 * trained)


def loading_memory(text: TextCosts) -> float:
    """Return the memory required for loading an LLM in fp32 from 16-bit files, in bytes.

    The files are memory-mapped and count towards the memory of the process until all weights have been converted.
    """
    return 6.0 * text.parameters


def _fixed_parts(is_cpu: bool, loading: float) -> dict[str, float]:
    """Return the components `libraries` and `loading`, in bytes."""
    libraries = CPU_FRAMEWORK_OVERHEAD if is_cpu else FRAMEWORK_OVERHEAD
    return {"libraries": libraries, "loading": loading + libraries if loading else 0.0}


def peak_memory(parts: dict[str, float]) -> float:
    """Return the peak memory in bytes, either during training or while loading."""
    training = sum(size for part, size in parts.items() if part != "loading")
    return max(training, parts["loading"])


def fits(parts: dict[str, float], memory: float) -> bool:
    """Return True if all components fit on a device with `memory` GB."""
    return peak_memory(parts) <= USABLE_FRACTION * memory * 1e9
