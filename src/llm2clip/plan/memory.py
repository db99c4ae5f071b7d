"""What each device must hold, part by part, in bytes: estimates from what the code keeps, not measurements.

A weight that learns takes 4 bytes itself, 4 for its gradient and 8 for AdamW's two means; among several processes
DistributedDataParallel holds gradients twice, the second time in the buckets that it exchanges.
"""

from __future__ import annotations

from llm2clip.models.batches import GPU_BATCH_TOKENS
from llm2clip.plan.work import CaptionWork, ImageWork
from llm2clip.recipes import AlignRecipe, TuneRecipe
from llm2clip.train.losses import STRIP

LIBRARIES = 1e9  # CUDA's context, and what PyTorch loads on a device
ROOM = 0.93  # of a device's memory, what may be planned with: the rest is lost between pieces
NF4 = 0.5 + (1 + 4 / 256) / 64  # bytes of a weight: 4 bits, and a scale for 64 of them in 8 bits, those scaled again
SMALLEST_EMBED = 8192  # tokens in the smallest batch that embed tries on a GPU


def bytes_of(precision: str) -> int:
    """Of a number in products."""
    return 4 if precision == "fp32" else 2


def learning(trained: float, count: int, shared_out: bool) -> dict[str, float]:
    """Gradients and AdamW of so many weights, without the weights."""
    if shared_out:
        return {"gradients": 4 * trained / count, "AdamW": 8 * trained / count}
    return {"gradients": 4 * trained * (2 if count > 1 else 1), "AdamW": 8 * trained}


def _passing(activations: float, trained: float) -> float:
    """What comes and goes in a step: activations, and when they are gone AdamW's step, which takes as much again as the
    weights that it moves."""
    return max(activations, 4 * trained)


def tune_memory(
    work: CaptionWork, recipe: TuneRecipe, tokens: float, precision: str, count: int, shared_out: bool = False
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
    low, shares = bytes_of(precision), count if shared_out else 1
    apart = work.parameters - work.linear
    in_pass = 2 * recipe.batch * tokens  # two texts of each pair
    if recipe.grad_cache:
        in_pass = min(in_pass, recipe.batch_tokens or GPU_BATCH_TOKENS)
    block = work.kept_per_token  # and again, for the gradients on their way back through it
    kept = work.layers * work.input_per_token + block if recipe.recompute else work.layers * work.kept_per_token
    parts: dict[str, float] = {}
    if recipe.lora_r:
        of_linear = NF4 if recipe.quantize else low
        parts["LLM"] = (of_linear * work.linear + 4 * apart) / shares
        parts["LoRA"] = 4 * work.trained / shares
    else:
        parts["LLM"] = 4 * work.parameters / shares
        if low == 2:
            parts["copies in half precision"] = 2 * (work.largest_linear if shared_out else work.linear)
    if shared_out:
        parts["gathered"] = 2 * low * work.largest_linear  # one block in use, the next on its way
    parts |= learning(work.trained, count, shared_out)
    parts["activations"] = _passing(in_pass * (kept + block + work.kept_outside), work.trained / shares)
    parts["libraries"] = LIBRARIES
    parts["loading"] = 0.0 if recipe.quantize or shared_out else 4 * work.parameters + LIBRARIES
    return parts


def embed_memory(work: CaptionWork, precision: str) -> dict[str, float]:
    """Bytes by part while captions are encoded, in the smallest batch that embed tries; larger ones where they fit."""
    parts = {"LLM": 4.0 * work.parameters}
    if precision != "fp32":
        parts["copies in half precision"] = 2.0 * work.linear
    return {**parts, "activations": SMALLEST_EMBED * work.kept_per_token, "libraries": LIBRARIES, "loading": 0.0}


def align_memory(
    work: ImageWork, recipe: AlignRecipe, captions: float, text_width: int, count: int, shared_out: bool = False
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
    size = min(recipe.micro_batch or recipe.batch, recipe.batch)
    images, texts = recipe.batch * count, recipe.batch * count * captions
    kept = work.kept
    if recipe.recompute and work.kept > work.block_input:
        kept = work.block_input + work.block_kept
    parts = {"model": 4 * parameters / shares, **learning(work.trained, count, shared_out)}
    if recipe.ema:
        parts["running mean"] = 4 * work.trained / shares
    if recipe.precision != "fp32":
        parts["copies in half precision"] = work.copies / shares
    parts["activations"] = _passing(size * (kept + work.block_kept), work.trained / shares)
    if recipe.loss != "cosine":  # vectors, gathered vectors and their gradients; a strip of logits and two like it
        strip = min(STRIP["cuda"], recipe.batch * texts)
        parts["loss"] = 12 * work.shared * (images + texts) + 12 * strip
    parts["captions"] = 4 * text_width * size * captions
    return {**parts, "libraries": LIBRARIES, "loading": 0.0}


def peak(parts: dict[str, float]) -> float:
    """The most that is held at once."""
    return max(sum(size for part, size in parts.items() if part != "loading"), parts["loading"])


def fits(parts: dict[str, float], memory: float) -> bool:
    """Whether a device with so many GB holds it."""
    return peak(parts) <= ROOM * memory * 1e9
