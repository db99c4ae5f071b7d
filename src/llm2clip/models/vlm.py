"""Loading of vision-language models: image-text-to-text models of transformers and their processors."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from llm2clip.models.hub.fingerprint import hash_text
from llm2clip.models.hub.loading import find_file, get_display_names, hide_loading_bars, load_config
from llm2clip.models.precision import Precision


@hide_loading_bars()
def load_vision_language_model(name: str, device: torch.device, precision: Precision) -> tuple[Any, Any]:
    """Load a vision-language model for inference. Code in its folder is never run.

    LLaVA models with a tower from timm can be loaded only after importing `llm2clip.llava.modeling_patches`.

    Args:
        name: Model folder or hub id.

    Returns:
        The model and its processor.

    Raises:
        ValueError: The type of the model is not supported.
        OSError: The model does not exist.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model: Any = AutoModelForImageTextToText.from_pretrained(
        name,
        config=load_config(name),
        dtype=precision.dtype,
        trust_remote_code=False,
    )
    return model.to(device).eval(), AutoProcessor.from_pretrained(name, trust_remote_code=False)


def name_vision_language_model(source: str) -> str:
    """Return a model's name with a hash of its files, such as `llava-9f3a12cd` for the folder `llava` or `llava/model`.

    A copy has the same name if the last part of its path is the same. The hash depends neither on the precision nor on
    the device. Reading the weights takes about a second per gigabyte.

    Args:
        source: Model folder or hub id. Files on the hub must have been downloaded.
    """
    config_file = find_file(source, "config.json")
    folder = Path(source) if config_file is None else config_file.parent
    weights = sorted(folder.glob("*model*.safetensors")) or sorted(folder.glob("*model*.bin"))
    settings = [folder / name for name in ("config.json", "generation_config.json", "chat_template.jinja")]
    hashes = []
    for file in [*settings, *weights]:
        if file.exists():
            with file.open("rb") as stream:
                hashes.append(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}")
    short_name = get_display_names([source])[0].rpartition("/")[2]
    return f"{short_name}-{hash_text(' '.join(hashes))[:8]}"
