"""Caption encoders published by the LLM2CLIP authors, and the checkpoints trained with each encoder.

An adapter works only with the encoder with which it was trained. Two encoders have embeddings of the same size (4096),
so the right encoder cannot be determined from the adapter's tensors. It is inferred from the vision tower and the
checkpoint's name instead.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

LLAMA_3_8B = "microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned"
LLAMA_3_2_1B = "microsoft/LLM2CLIP-Llama-3.2-1B-Instruct-CC-Finetuned"
# LoRA adapter for Llama-3.1-8B-Instruct, in a subfolder of the SigLIP 2 checkpoint's repository.
LLAMA_3_1_8B = "microsoft/LLM2CLIP-Llama3.1-8B-siglip2-so400m-patch14-224/LLM2CLIP-Llama-3.1-8B"
PUBLISHED_ENCODERS = {LLAMA_3_8B: 4096, LLAMA_3_1_8B: 4096, LLAMA_3_2_1B: 2048}

# Template with which these caption encoders were tuned. The encoders' folders do not contain it.
TEMPLATE = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{caption}<|eot_id|>"
TEMPLATE_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

# Pattern for checkpoint names -> encoder with which these checkpoints were trained. The first matching pattern is used.
_CHECKPOINT_NAMES = {
    re.compile(r"llama-?3[._]1", re.IGNORECASE): LLAMA_3_1_8B,
    re.compile(r"llama-?3-8b|LLM2CLIP-(openai|eva02)-", re.IGNORECASE): LLAMA_3_8B,
}


def suggest_encoders(source: str | Path, text_dim: int, tower: dict[str, Any]) -> list[str]:
    """Return the published caption encoders with which a checkpoint was probably trained.

    Args:
        source: file, folder or hub id of the checkpoint.
        text_dim: input size of the checkpoint's adapter.
        tower: config of the checkpoint's vision tower.

    Returns:
        Names of encoders. If the checkpoint cannot be identified, the list contains all published encoders whose
        embeddings have size `text_dim`. It is empty if there are none.
    """
    candidates = [name for name, size in PUBLISHED_ENCODERS.items() if size == text_dim]
    if len(candidates) < 2:
        return candidates
    if "siglip" in str(tower["architecture"]):  # the only published checkpoint with a SigLIP 2 tower
        return [LLAMA_3_1_8B]
    for pattern, encoder in _CHECKPOINT_NAMES.items():
        if pattern.search(str(source)):
            return [encoder]
    return candidates


def published_template(path: str | Path) -> str | None:
    """Return the template of the LLMs released with LLM2CLIP, or None if it does not apply to the encoder at `path`.

    The template applies to plain LLMs with Llama 3's special tokens. It does not apply to GGUF files, nor to model
    folders and sentence-transformers folders, which contain their own template.
    """
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    if (Path(path) / "text" / "modules.json").is_file() or str(path).endswith(".gguf"):
        return None
    if cached_file(str(path), "modules.json", _raise_exceptions_for_missing_entries=False) is not None:
        return None
    vocabulary = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False).get_vocab()
    return TEMPLATE if all(token in vocabulary for token in TEMPLATE_TOKENS) else None
