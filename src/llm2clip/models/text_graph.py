"""Text encoder of a saved model as an ONNX graph, which encodes search queries without PyTorch.

PyTorch and transformers take seconds to import, ONNX Runtime and tokenizers a fifth of a second. A search uses the
graph instead of the model under these conditions:

- The query has no images, and neither a device nor a precision was requested.
- The model is a local llm2clip model whose text encoder has at most MAX_TEXT_BYTES and can be exported.
- The graph is in the user's cache folder. After its first search with a model, `llm2clip search` saves the graph, if
  the packages of the `onnx` extra are installed.

A graph is stored with a hash of all files of the model that affect text embeddings or fingerprints, so it is not used
once the model has changed. It is also stored with the identities of the model's parts, so an index accepts or rejects
a graph exactly like the model. Embeddings differ from PyTorch's by at most MAX_DIFFERENCE.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip.io_utils import EXTRAS, atomic_dir, check_texts, get_cache_dir, read_json_object, remove_path
from llm2clip.models.loading import fingerprint, hash_text
from llm2clip.models.prompts import QueryTemplates, normalize

FORMAT_VERSION = 1  # of the graph's folder; graphs of other versions are replaced
MAX_TEXT_BYTES = 300_000_000  # of the text encoder's weights; larger encoders take minutes to export
MAX_DIFFERENCE = 1e-4  # of an element of an embedding
CHECKED_TEXTS = ("dog", " two words\n", "Two children in red jackets are playing in the snow.", "一只猫", "a b " * 600)


@dataclass(frozen=True)
class TextGraph:
    """The part of a `DualEncoder` that encodes texts, with attributes and methods of the same names.

    Attributes:
        identities: `DualEncoder.part_identities()` of the model.
        tokenizer: `tokenizers.Tokenizer` that adds the template, truncates and pads.
        session: `onnxruntime.InferenceSession` of the graph.
    """

    name: str
    embed_dim: int
    identities: Sequence[dict[str, Any]]
    query_templates: QueryTemplates
    tokenizer: Any
    session: Any

    @cached_property
    def part_fingerprints(self) -> tuple[str, str]:
        image, text = self.identities
        return fingerprint(image), fingerprint(text)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint({"parts": self.part_fingerprints})

    def truncate(self, dim: int) -> TextGraph:
        identities = [{**identity, "dim": dim} for identity in self.identities]
        return dataclasses.replace(self, embed_dim=dim, identities=identities)

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Encode N texts. Return L2-normalised embeddings of shape (N, embed_dim), float32."""
        encodings = self.tokenizer.encode_batch(list(check_texts(texts)))
        ids = np.array([encoding.ids for encoding in encodings], np.int64)
        mask = np.array([encoding.attention_mask for encoding in encodings], np.int64)
        (embeddings,) = self.session.run(None, {"input_ids": ids, "attention_mask": mask})
        return normalize(embeddings[:, : self.embed_dim])


def open_text_graph(name: str) -> TextGraph | None:
    """Return the graph of a model's text encoder, or None if there is no graph for the model in its current state."""
    settings = _read_settings(name)
    if settings is None or "error" in settings:
        return None
    try:
        return _load_graph(name, _get_folder(name), settings)
    except Exception:  # the exceptions of onnxruntime and tokenizers have no common base class
        return None


def can_save_text_graph(name: str) -> bool:
    """Return True if `save_text_graph` should be called: there is no graph, and exporting it has not failed before."""
    if not all(map(find_spec, EXTRAS["onnx"])):
        return False
    weights = [file.stat().st_size for file in Path(name, "text").rglob("*.safetensors")]
    return 0 < sum(weights) <= MAX_TEXT_BYTES and _read_settings(name) is None


def save_text_graph(name: str) -> None:
    """Save the graph of a model's text encoder. If it cannot be exported, save the error, to export it only once."""
    settings = {"version": FORMAT_VERSION, "files": _hash_files(name)}
    remove_path(_get_folder(name))
    with suppress(OSError), atomic_dir(_get_folder(name)) as folder:
        try:
            settings |= _export_graph(name, folder)
        except OSError:
            raise
        except Exception as error:  # torch.onnx can raise any exception for a model that it does not support
            settings["error"] = repr(error)
        (folder / "graph.json").write_text(json.dumps(settings), encoding="utf-8")


def _get_folder(name: str) -> Path:
    source = Path(name).resolve()
    return get_cache_dir() / "text_graphs" / f"{source.name}-{hash_text(str(source))[:12]}"


def _read_settings(name: str) -> dict[str, Any] | None:
    """Return the settings of a saved graph, or None if there are none for the model in its current state."""
    with suppress(OSError, ValueError):
        settings = read_json_object(_get_folder(name) / "graph.json")
        if settings.get("version") == FORMAT_VERSION and settings.get("files") == _hash_files(name):
            return settings
    return None


def _hash_files(name: str) -> str:
    files = [Path(name, "config.json"), Path(name, "model.safetensors")]
    files += sorted(file for file in Path(name, "text").rglob("*") if file.is_file())
    digests = {}
    for file in files:
        with file.open("rb") as stream:
            digests[file.relative_to(name).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return fingerprint(digests)


def _load_graph(name: str, folder: Path, settings: dict[str, Any]) -> TextGraph:
    import onnxruntime
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=settings["pad_id"], pad_token="")
    tokenizer.enable_truncation(settings["max_length"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # a query is too short for more threads, which would only wait actively
    return TextGraph(
        name=name,
        embed_dim=settings["embed_dim"],
        identities=settings["identities"],
        query_templates=QueryTemplates.from_dict(settings["query_templates"]),
        tokenizer=tokenizer,
        session=onnxruntime.InferenceSession(str(folder / "text.onnx"), options, providers=["CPUExecutionProvider"]),
    )


def _export_graph(name: str, folder: Path) -> dict[str, Any]:
    """Write text.onnx and tokenizer.json, and return the graph's settings. Raise ValueError if embeddings differ."""
    from llm2clip.models.dual_encoder import wrap_llm2clip
    from llm2clip.models.export.onnx import export_text
    from llm2clip.models.export.transformers import build_tokenizer
    from llm2clip.models.llm2clip import LLM2CLIP

    model = LLM2CLIP.from_pretrained(name, device="cpu")
    export_text(model, folder)
    tokenizer = build_tokenizer(model.encoder)
    settings = {
        "embed_dim": model.config.embed_dim,
        "identities": wrap_llm2clip(model, name).part_identities(),
        "query_templates": dataclasses.asdict(model.config.query_templates),
        "pad_id": tokenizer.pad_token_id,
        "max_length": tokenizer.model_max_length,
    }
    graph = _load_graph(name, folder, json.loads(json.dumps(settings)))
    expected = model.encode_text(CHECKED_TEXTS).numpy()
    difference = float(np.abs(graph.encode_texts(CHECKED_TEXTS) - expected).max())
    if not difference <= MAX_DIFFERENCE:  # this form also catches NaN
        raise ValueError(f"the graph's embeddings differ from PyTorch's by {difference:g}")
    return settings
