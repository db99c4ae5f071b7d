"""CLIP models with a large language model as the text encoder (LLM2CLIP, arXiv 2411.04997)."""

from __future__ import annotations

import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm2clip.models.dual_encoder import open_dual_encoder
    from llm2clip.models.llm2clip import LLM2CLIP
    from llm2clip.models.text.caption_encoder import CaptionEncoder
    from llm2clip.search.index import Index

__all__ = ["LLM2CLIP", "CaptionEncoder", "Index", "open_dual_encoder"]
__version__ = "0.3.0"

# peft imports bitsandbytes, which logs a warning about an optional 4-bit inference kernel.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# If other programs use the CPU, busy-waiting OpenMP threads make training many times slower.
# GOMP_SPINCOUNT must be set before torch is imported (see `benchmarks/busy_machine.py`).
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "0"


_MODULES = {
    "LLM2CLIP": "llm2clip.models.llm2clip",
    "CaptionEncoder": "llm2clip.models.text.caption_encoder",
    "Index": "llm2clip.search.index",
    "open_dual_encoder": "llm2clip.models.dual_encoder",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that importing the package is fast."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
