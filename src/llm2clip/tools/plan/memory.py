"""What each device must hold, part by part, in bytes: estimates from what the code keeps, not measurements.

A weight that learns takes 4 bytes itself, 4 for its gradient and 8 for AdamW's two means; among several processes
DistributedDataParallel holds gradients twice, the second time in the buckets that it exchanges.
"""

from __future__ import annotations

from llm2clip.config import AlignConfig, TuneConfig
from llm2clip.models.length_batching import GPU_BATCH_TOKENS
from llm2clip.tools.plan.flops import ImageCosts, TextCosts
from llm2clip.train.losses import CHUNK

FRAMEWORK_OVERHEAD = 1e9  # CUDA's context, and what PyTorch loads on a device
USABLE_FRACTION = 0.93  # of a device's memory, what may be planned with: the rest is lost between pieces
NF4 = 0.5 + (1 + 4 / 256) / 64  # bytes of a weight: 4 bits, and a scale for 64 of them in 8 bits, those scaled again
SMALLEST_EMBED = 8192  # tokens in the smallest batch that embed tries on a GPU


def tensor_bytes(precision: str) -> int:
    """Of a number in products."""
    return 4 if precision == "fp32" else 2


def optimizer_memory(trained: float, count: int, shared_out: bool) -> dict[str, float]:
    """Gradients and AdamW of so many weights, without the weights."""
    if shared_out:
        return {"gradients": 4 * trained / count, "AdamW": 8 * trained / count}
    return {"gradients": 4 * trained * (2 if count > 1 else 1), "AdamW": 8 * trained}


def _passing(activations: float, trained: float) -> float:
    """What comes and goes in a step: activations, and when they are gone AdamW's step, which takes as much again as the
    weights that it moves."""
    return max(activations, 4 * trained)


def tune_memory(
    work: TextCosts, config: TuneConfig, tokens: float, precision: str, count: int, shared_out: bool = False
) -> dict[str, float]:
    """Bytes by part while tune trains; `loading` is what it takes before, when the weights come in as fp32.

    Args:
        work: of the language model.
        recipe: of tune.
        tokens: of a caption.
        precision: fp32, bf16 or fp16.
        count: devices.
        shared_out: FSDP2.
    """
    low, shares = tensor_bytes(precision), count if shared_out else 1
    apart = work.parameters - work.linear
    in_pass = 2 * config.batch_size * tokens  # two texts of each pair
    if config.grad_cache:
        in_pass = min(in_pass, config.batch_tokens or GPU_BATCH_TOKENS)
    block = work.kept_per_token  # and again, for the gradients on their way back through it
    kept = (
        work.layers * work.input_per_token + block
        if config.gradient_checkpointing
        else work.layers * work.kept_per_token
    )
    parts: dict[str, float] = {}
    if config.lora_r:
        of_linear = NF4 if config.qlora else low
        parts["LLM"] = (of_linear * work.linear + 4 * apart) / shares
        parts["LoRA"] = 4 * work.trained / shares
    else:
        parts["LLM"] = 4 * work.parameters / shares
        if low == 2:
            parts["copies in half precision"] = 2 * (work.largest_linear if shared_out else work.linear)
    if shared_out:
        parts["gathered"] = 2 * low * work.largest_linear  # one block in use, the next on its way
    parts |= optimizer_memory(work.trained, count, shared_out)
    parts["activations"] = _passing(in_pass * (kept + block + work.kept_outside), work.trained / shares)
    parts["libraries"] = FRAMEWORK_OVERHEAD
    parts["loading"] = 0.0 if config.qlora or shared_out else 4 * work.parameters + FRAMEWORK_OVERHEAD
    return parts


def embed_memory(work: TextCosts, precision: str) -> dict[str, float]:
    """Bytes by part while captions are encoded, in the smallest batch that embed tries; larger ones where they fit."""
    parts = {"LLM": 4.0 * work.parameters}
    if precision != "fp32":
        parts["copies in half precision"] = 2.0 * work.linear
    return {
        **parts,
        "activations": SMALLEST_EMBED * work.kept_per_token,
        "libraries": FRAMEWORK_OVERHEAD,
        "loading": 0.0,
    }


def align_memory(
    work: ImageCosts, config: AlignConfig, captions: float, text_width: int, count: int, shared_out: bool = False
) -> dict[str, float]:
    """Bytes by part while align trains.

    Args:
        work: of the model.
        recipe: of align.
        captions: of an image in a step.
        text_width: of the store's vectors.
        count: devices.
        shared_out: FSDP2.
    """
    parameters, shares = work.tower + work.projection + work.adapter, count if shared_out else 1
    size = min(config.micro_batch_size or config.batch_size, config.batch_size)
    images, texts = config.batch_size * count, config.batch_size * count * captions
    kept = work.kept
    if config.gradient_checkpointing and work.kept > work.block_input:
        kept = work.block_input + work.block_kept
    parts = {"model": 4 * parameters / shares, **optimizer_memory(work.trained, count, shared_out)}
    if config.precision != "fp32":
        parts["copies in half precision"] = work.copies / shares
    parts["activations"] = _passing(size * (kept + work.block_kept), work.trained / shares)
    # Embeddings, gathered embeddings and their gradients; a chunk of logits and two tensors of its size.
    chunk = min(CHUNK["cuda"], config.batch_size * texts)
    parts["loss"] = 12 * work.shared * (images + texts) + 12 * chunk
    parts["captions"] = 4 * text_width * size * captions
    return {**parts, "libraries": FRAMEWORK_OVERHEAD, "loading": 0.0}


def peak_memory(parts: dict[str, float]) -> float:
    """The most that is held at once."""
    return max(sum(size for part, size in parts.items() if part != "loading"), parts["loading"])


def fits(parts: dict[str, float], memory: float) -> bool:
    """Whether a device with so many GB holds it."""
    return peak_memory(parts) <= USABLE_FRACTION * memory * 1e9
