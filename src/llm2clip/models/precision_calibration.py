"""Choice of the fastest encoding precision that keeps a caption encoder's embeddings.

In some layers of an LLM, the MLP outputs values for a few tokens that are a thousand times larger than those for the
others (massive activations, arXiv 2402.17762). Whether a token gets such a value, and how large it is, depends on a
threshold. A raw LLM with bidirectional attention has many tokens near that threshold, and there the small rounding
errors of all earlier layers become large. Layer 11 of raw SmolLM2-135M is such a layer. The lowest cosine similarity of
48 captions to their fp32 embeddings is

- 0.984 with all 30 layers in bf16, and the same with layers 12 to 29 in fp32;
- 0.9999 with layers 0 to 11 in fp32;
- 0.9999 with all layers in bf16, if the model has causal attention or is tuned.

So the number of first layers that stay in fp32 is measured, once per encoder, on a fixed set of captions.
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F

from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.llm_layers import get_layers
from llm2clip.models.precision import resolve_device_precision

MIN_COSINE = 0.999
# A change of these captions can change the precision that is chosen, and with it the fingerprint of a store.
CALIBRATION_CAPTIONS = tuple(
    Path(__file__).with_name("calibration_captions.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
)


def fastest_precision(encoder: CaptionEncoder) -> str:
    """Return what precision `auto` stands for: fp32 if the device has no fast bf16, else the calibrated precision."""
    if resolve_device_precision("auto", encoder.device) == "fp32":
        return "fp32"
    return calibrate_precision(encoder)


def calibrate_precision(encoder: CaptionEncoder) -> str:
    """Return the fastest of `bf16`, `bf16+N` (smallest N) and `fp32` that is accurate enough.

    A precision is accurate enough if the embedding of every calibration caption has a cosine similarity of at least
    0.999 to the one in fp32.
    """
    exact = encoder.encode(CALIBRATION_CAPTIONS)

    def is_accurate_enough(precision: str) -> bool:
        embeddings = encoder.encode(CALIBRATION_CAPTIONS, precision=precision)
        return bool(F.cosine_similarity(embeddings, exact).min() >= MIN_COSINE)

    if is_accurate_enough("bf16"):
        return "bf16"
    depth = len(get_layers(encoder.llm))
    low, high = 0, depth  # `low` fp32 layers are too few; `high` are enough, because `depth` is fp32 throughout
    while high - low > 1:
        middle = (low + high) // 2
        if is_accurate_enough(f"bf16+{middle}"):
            high = middle
        else:
            low = middle
    return f"bf16+{high}" if high < depth else "fp32"
