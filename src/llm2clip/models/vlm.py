"""Loading of vision-language models: image-text-to-text models of transformers and their processors."""

from typing import Any

import torch

from llm2clip.models.hub.loading import hide_loading_bars, load_config
from llm2clip.models.precision import resolve_precision


@hide_loading_bars()
def load_vision_language_model(name: str, device: torch.device, precision: str = "auto") -> tuple[Any, Any]:
    """Load a vision-language model for inference. Code in its folder is never run.

    LLaVA models with a tower from timm can be loaded only after importing `llm2clip.llava.modeling_patches`.

    Args:
        name: Model folder or hub id.
        precision: fp32, bf16 or auto. auto means bf16 if the hardware supports it, and fp32 otherwise.

    Returns:
        The model and its processor.

    Raises:
        ValueError: The type of the model is not supported.
        OSError: The model does not exist.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    bf16 = resolve_precision("tune", precision, device) == "bf16"
    model: Any = AutoModelForImageTextToText.from_pretrained(
        name,
        config=load_config(name),
        dtype=torch.bfloat16 if bf16 else torch.float32,
        trust_remote_code=False,
    )
    return model.to(device).eval(), AutoProcessor.from_pretrained(name, trust_remote_code=False)
