"""llm2clip: give any CLIP a large language model's understanding of text (LLM2CLIP, arXiv 2411.04997)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm2clip.models.caption_encoder import CaptionEncoder
    from llm2clip.models.llm2clip import LLM2CLIP

__all__ = ["LLM2CLIP", "CaptionEncoder"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The public classes, imported at first use: importing the package alone is instant."""
    if name == "LLM2CLIP":
        from llm2clip.models.llm2clip import LLM2CLIP

        return LLM2CLIP
    if name == "CaptionEncoder":
        from llm2clip.models.caption_encoder import CaptionEncoder

        return CaptionEncoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
