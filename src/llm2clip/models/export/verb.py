"""`llm2clip export` and `llm2clip push`: a model in the forms of other tools, and on the hub."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm2clip.models.export.model_card import render_model_card
from llm2clip.models.export.onnx import export_onnx
from llm2clip.models.export.open_clip import export_open_clip
from llm2clip.models.export.transformers import export_sentence_transformers, export_transformers, export_vision
from llm2clip.models.llm2clip import LLM2CLIP

FORMS: dict[str, tuple[Callable[..., Any], str]] = {
    "transformers": (export_transformers, 'AutoModel.from_pretrained("{out}", trust_remote_code=True)'),
    "sentence-transformers": (export_sentence_transformers, 'SentenceTransformer("{out}", trust_remote_code=True)'),
    "vision": (export_vision, 'AutoModel.from_pretrained("{out}")'),
    "onnx": (export_onnx, 'onnxruntime.InferenceSession("{out}/text.onnx"); see {out}/USE.md'),
    "open_clip": (export_open_clip, 'open_clip.create_model_and_transforms("local-dir:{out}")'),
}


def export_model(model: LLM2CLIP, form: str, out: str | Path, **options: Any) -> list[str]:
    """Write a model in a form of `FORMS`: whole, or not at all.

    Args:
        model: to write.
        form: its name.
        out: folder, not there yet.
        options: of the form; `int8` of onnx.

    Returns:
        What the form has to say.

    Raises:
        ValueError: there is no such form, or it has no place for something in the model.
        FileExistsError: `out` is there.
        ImportError: a library that the form takes is not installed.
    """
    out = Path(out)
    if form not in FORMS:
        raise ValueError(f"there is no form {form!r}; there are {', '.join(FORMS)}")
    if out.exists():
        raise FileExistsError(f"{out} is there already; choose another place")
    tmp = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        lines = FORMS[form][0](model, tmp, **options) or []
        os.replace(tmp, out)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return list(lines)


def export_verb(source: str, form: str, out: str, int8: bool) -> list[str]:
    """Lines that say what was written and how it is opened."""
    if int8 and form != "onnx":
        raise ValueError("--int8 is for --to onnx")
    lines = export_model(LLM2CLIP.from_pretrained(source, device="cpu"), form, out, **({"int8": True} if int8 else {}))
    return [*lines, f"Exported: {out}", f"Open it with: {FORMS[form][1].format(out=out)}"]


def push_verb(source: str, name: str, private: bool, licence: str | None) -> list[str]:
    """Put a folder, ours or an exported one, on the hub with a model card."""
    from huggingface_hub import HfApi

    folder = Path(source)
    if not any((folder / name).is_file() for name in ("config.json", "open_clip_config.json", "text.onnx")):
        raise FileNotFoundError(f"{source} is not a model folder: it has no config.json")
    api = HfApi()
    url = api.create_repo(name, private=private, exist_ok=True)
    text = render_model_card(folder, name, licence)
    api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=name)
    api.upload_folder(folder_path=folder, repo_id=name, ignore_patterns=["README.md", ".*"])
    return [f"Pushed: {url}"]
