"""Model export to the formats of other libraries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from llm2clip.io_utils import atomic_dir

if TYPE_CHECKING:
    from llm2clip.models.llm2clip import LLM2CLIP


@dataclass(frozen=True)
class ExportFormat:
    """Third-party format to which a model can be exported.

    The export function takes a model and an empty folder, writes the exported model to the folder, and returns a list
    of messages for the user, or None. The function is specified by name, so that the command line can list the formats
    without importing PyTorch.
    """

    function: str  # MODULE:FUNCTION
    load_code: str  # example code that loads the exported model from the folder {out}


FORMATS = {
    "transformers": ExportFormat(
        "transformers:export_transformers", 'AutoModel.from_pretrained("{out}", trust_remote_code=True)'
    ),
    "sentence-transformers": ExportFormat(
        "transformers:export_sentence_transformers", 'SentenceTransformer("{out}", trust_remote_code=True)'
    ),
    "vision": ExportFormat("transformers:export_vision_tower", 'AutoModel.from_pretrained("{out}")'),
    "onnx": ExportFormat("onnx:export_onnx", 'onnxruntime.InferenceSession("{out}/text.onnx"), see {out}/USE.md'),
}


def export_model(model: LLM2CLIP, to: str, out: str | Path, int8: bool = False, dim: int | None = None) -> list[str]:
    """Export a model atomically to another library's format.

    Args:
        int8: Also write ONNX graphs with 8-bit weights. Supported only for "onnx".
        dim: Dimension to which the exported model truncates embeddings. Default: no truncation. Not supported for
            "vision".

    Returns:
        Messages for the user, such as the cosine similarity between embeddings of the exported and original models.

    Raises:
        ValueError: The format is unknown or cannot represent the model.
        FileExistsError: `out` exists.
    """
    if to not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)} (got {to!r})")
    if int8 and to != "onnx":
        raise ValueError("--int8 can only be used with --to onnx")
    if dim is not None and to == "vision":
        raise ValueError("--dim cannot be used with --to vision, which exports features instead of embeddings")
    if Path(out).exists():
        raise FileExistsError(f"{out} exists: choose another folder")
    export: Callable[..., list[str] | None] = resolve_name(f"{__name__}.{FORMATS[to].function}")
    if dim is not None:
        from llm2clip.models.llm2clip import truncate_model

        model = truncate_model(model, dim)
    with atomic_dir(out) as folder:
        return (export(model, folder, int8=True) if int8 else export(model, folder)) or []
