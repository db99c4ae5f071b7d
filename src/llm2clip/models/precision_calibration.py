"""Choice of the fastest encoding precision that is accurate enough for a caption encoder.

In some layers of an LLM, the MLP's output for a few tokens is a thousand times larger than for other tokens (massive
activations, arXiv 2402.17762). Whether a token gets such an output, and how large the output is, depends on a
threshold. A raw LLM with bidirectional attention has many tokens near that threshold, where the small rounding errors
of all earlier layers are amplified. Layer 11 of raw SmolLM2-135M is such a layer. Over 48 captions, the lowest cosine
similarity between an embedding and its fp32 version is

- 0.984 with all 30 layers in bf16, and also with layers 12 to 29 in fp32;
- 0.9999 with layers 0 to 11 in fp32;
- 0.9999 with all layers in bf16, if the model has causal attention or is tuned.

The number of first layers that stay in fp32 is therefore measured once per encoder, on a fixed set of captions.
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F

from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.llm_layers import get_layers
from llm2clip.models.precision import resolve_device_precision

MIN_COSINE = 0.999
# Changing these captions can change the chosen precision, and with it the fingerprint of a store.
CALIBRATION_CAPTIONS = tuple(
    Path(__file__).with_name("calibration_captions.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
)


def fastest_precision(encoder: CaptionEncoder) -> str:
    """Resolve precision `auto`: fp32 if the device has no bf16 hardware, otherwise the calibrated precision."""
    if resolve_device_precision("auto", encoder.device) == "fp32":
        return "fp32"
    return calibrate_precision(encoder)


def calibrate_precision(encoder: CaptionEncoder) -> str:
    """Return the fastest precision that is accurate enough: `bf16`, `bf16+N` with the smallest N, or `fp32`.

    A precision is accurate enough if the embedding of every calibration caption has a cosine similarity of at least
    0.999 to the caption's fp32 embedding.
    """
    exact = encoder.encode(CALIBRATION_CAPTIONS)

    def is_accurate_enough(precision: str) -> bool:
        embeddings = encoder.encode(CALIBRATION_CAPTIONS, precision=precision)
        return bool(F.cosine_similarity(embeddings, exact).min() >= MIN_COSINE)

    if is_accurate_enough("bf16"):
        return "bf16"
    depth = len(get_layers(encoder.llm))
    low, high = 0, depth  # `low` fp32 layers are too few; `high` are enough (`depth` means all layers in fp32)
    while high - low > 1:
        middle = (low + high) // 2
        if is_accurate_enough(f"bf16+{middle}"):
            high = middle
        else:
            low = middle
    return f"bf16+{high}" if high < depth else "fp32"
