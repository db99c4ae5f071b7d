"""Encoding in bf16, with the blocks that cannot bear it in fp32.

LLMs have blocks whose MLP answers some tokens with values a thousand times the others' (massive activations, arXiv
2402.17762). Whether a token gets one, and how large, depends on a threshold, and a raw LLM that is made to read both
ways sets many tokens near it: there the small errors of all blocks before become large ones. SmolLM2-135M raw is such a
case: its block 11 does it. With all 30 blocks in bf16 the least cosine of 48 captions with their fp32 vectors is 0.984;
with blocks 12 to 29 in fp32, the same; with blocks 0 to 11 in fp32 it is 0.9999. Read causally, or tuned, it is 0.9999
with all of them in bf16. So the number of first blocks that stay in fp32 is measured, once for an encoder, on captions
that are always the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from llm2clip.models.caption_encoder import CaptionEncoder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LEAST_COSINE = 0.999
CAPTIONS = (
    "Two ducks floating together on a body of water.",
    "Two kayaks, one pink the other yellow, on bank of water.",
    "A bird in a pot eating a fruit.",
    "A man riding a wave on top of a surfboard.",
    "A kitchen with a stove, a sink and white cabinets.",
    "Several people are standing around a table full of food.",
    "A dog",
    "A red double-decker bus drives down a street in the rain.",
    "Children in yellow jackets wait at a crossing; a woman with a bicycle smiles at them.",
    "The photograph shows an old wooden house at the edge of a forest. Its roof is covered in moss, and smoke rises "
    "from the chimney. In front of it two horses graze on a meadow behind a fence that has lost some of its boards.",
    "A close-up of a plate with rice, beans, a fried egg and half an avocado.",
    "A tennis player in white swings her racket.",
    "Black and white picture of a train station, crowded with travellers and their luggage.",
    "Ein Mann liest auf einer Bank im Park die Zeitung.",
    "一只猫坐在窗台上看着外面的雪。",
    "Three zebras drink at a water hole while a giraffe watches them from behind a tree.",
)


def resolve_device_precision(precision: str, device: torch.device) -> str:
    """fp32, bf16 or fp16: `auto` is bf16 where the device multiplies it in hardware, as GPUs do, and CPUs with AMX or
    with AVX-512's instructions for it."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    able = device.type == "cpu" and any(capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))
    return "bf16" if able else "fp32"


def parse_precision(precision: str) -> tuple[bool, int]:
    """Whether it is bf16, and how many first blocks stay in fp32: of `fp32`, `bf16`, or `bf16+12`.

    Raises:
        ValueError: it is none of them.
    """
    found = re.fullmatch(r"fp32|bf16(?:\+(\d+))?", precision)
    if found is None:
        raise ValueError(f"precision is fp32, bf16, or bf16+N for N first blocks in fp32; not {precision!r}")
    return precision != "fp32", int(found[1] or 0)


@contextmanager
def autocast_precision(llm: Any, device: torch.device, precision: str) -> Iterator[None]:
    """Run a transformers model in a precision as `parse` has it."""
    low, blocks = parse_precision(precision)
    if not low:
        yield
        return
    whole = get_layers(llm)[:blocks]
    for block in whole:
        block.forward = _in_fp32(block.forward, device)
    try:
        with torch.autocast(device.type, torch.bfloat16):
            yield
    finally:
        for block in whole:
            del block.forward


def fastest_precision(encoder: CaptionEncoder) -> str:
    """What `auto` stands for: the fastest on this device that keeps the encoder's vectors."""
    return "fp32" if resolve_device_precision("auto", encoder.device) == "fp32" else calibrate_precision(encoder)


def calibrate_precision(encoder: CaptionEncoder) -> str:
    """The fastest precision in which all of some captions keep a cosine of 0.999 with their fp32 vectors: `bf16`,
    `bf16+N`, or `fp32` if only that does."""
    exact = encoder.encode(CAPTIONS)

    def holds(precision: str) -> bool:
        found = encoder.encode(CAPTIONS, precision=precision)
        return bool(F.cosine_similarity(found, exact).min() >= LEAST_COSINE)

    if holds("bf16"):
        return "bf16"
    low, high = 0, len(get_layers(encoder.llm))  # low does not hold; high is fp32
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(f"bf16+{middle}") else (middle, high)
    return f"bf16+{high}" if high < len(get_layers(encoder.llm)) else "fp32"


def get_layers(llm: Any) -> Any:
    """The blocks of a decoder, or of BERT and its kin."""
    return llm.layers if hasattr(llm, "layers") else llm.encoder.layer


def _in_fp32(forward: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device.type, enabled=False):
            return forward(*args, **kwargs)

    return run
