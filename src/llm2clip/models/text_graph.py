"""ONNX graph of a model's text encoder, which encodes search queries without PyTorch.

PyTorch and transformers take seconds to import, but ONNX Runtime and tokenizers take only a fifth of a second. A search
uses the graph instead of the model if all of the following conditions are met:

- The query has no images, and the user requests neither a device nor a precision.
- The model is a local llm2clip model whose text encoder can be exported and has at most MAX_TEXT_BYTES.
- The graph is in the user's cache folder. `llm2clip index` saves the graph if the `onnx` extra is installed.

The graph is stored with the sizes and modification times of all model files that affect text embeddings or
fingerprints, so an outdated graph is never used. The identities of the model's encoders are also stored, so an index
accepts the graph if and only if the index accepts the model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm2clip.io_utils import EXTRAS, atomic_dir, check_texts, get_cache_dir, read_json_object, remove_path
from llm2clip.models.loading import fingerprint, hash_text
from llm2clip.models.prompts import QueryTemplates, normalize

if TYPE_CHECKING:
    from llm2clip.models.dual_encoder import DualEncoder

FORMAT_VERSION = 1  # increase the version when the files, the export or the identities change
MAX_TEXT_BYTES = 300_000_000  # maximum size of the text encoder's weights; larger encoders take minutes to export
TEXTS_PER_BATCH = 16  # large batches, padded to the longest text, take gigabytes of memory
MAX_DIFFERENCE = 1e-4  # maximum absolute difference from PyTorch's embeddings
CHECKED_TEXTS = ("dog", " two words\n", "Two children in red jackets are playing in the snow.", "一只猫", "a b " * 600)


@dataclass(frozen=True)
class OnnxTextEncoder:
    """ONNX text encoder with the same attribute and method names as `DualEncoder`.

    Attributes:
        identities: Return value of `DualEncoder.part_identities()`.
        tokenizer: `tokenizers.Tokenizer` that adds the template, truncates and pads texts.
        session: `onnxruntime.InferenceSession` for the graph.
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

    def truncate(self, dim: int) -> OnnxTextEncoder:
        identities = [{**identity, "dim": dim} for identity in self.identities]
        return dataclasses.replace(self, embed_dim=dim, identities=identities)

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Encode N texts. Return L2-normalised float32 embeddings of shape (N, embed_dim)."""
        texts, embeddings = list(check_texts(texts)), []
        for start in range(0, len(texts), TEXTS_PER_BATCH):
            encodings = self.tokenizer.encode_batch(texts[start : start + TEXTS_PER_BATCH])
            ids = np.array([encoding.ids for encoding in encodings], np.int64)
            mask = np.array([encoding.attention_mask for encoding in encodings], np.int64)
            embeddings += self.session.run(None, {"input_ids": ids, "attention_mask": mask})
        return normalize(np.concatenate(embeddings)[:, : self.embed_dim])


def open_text_graph(name: str) -> OnnxTextEncoder | None:
    """Open the saved graph of a model's text encoder. Return None if no graph matches the current model files."""
    settings = _read_graph_settings(name)
    return None if settings is None else _try_load_graph(name, settings)


def save_text_graph(model: DualEncoder) -> None:
    """Export a small text encoder to a graph if the `onnx` extra is installed and no up-to-date graph exists.

    If the model cannot be exported, the error is printed and saved, so that the export is not attempted again.
    """
    name = model.name
    weights = [file.stat().st_size for file in Path(name, "text").rglob("*.safetensors")]
    if not 0 < sum(weights) <= MAX_TEXT_BYTES or not all(map(find_spec, EXTRAS["onnx"])):
        return
    settings = _read_graph_settings(name)
    if settings is not None and ("error" in settings or _try_load_graph(name, settings) is not None):
        return
    try:
        folder = _get_graph_folder(name)
    except RuntimeError:  # raised if the user has no home folder
        return
    print("Exporting the text encoder to speed up searches with this model...", flush=True)
    try:
        _remove_graphs_of_deleted_models(folder.parent)
        remove_path(folder)
        with atomic_dir(folder) as temporary:
            settings = {**_get_model_file_states(name), **_export_graph(model, temporary)}
            (temporary / "graph.json").write_text(json.dumps(settings), encoding="utf-8")
    except (OSError, MemoryError) as error:  # a later attempt may succeed
        print(f"The text encoder could not be exported: {error}")
    except Exception as error:  # torch.onnx can raise any exception for an unsupported model
        print(f"The text encoder cannot be exported: {error}")
        with suppress(OSError), atomic_dir(folder) as temporary:
            settings = {**_get_model_file_states(name), "error": repr(error)}
            (temporary / "graph.json").write_text(json.dumps(settings), encoding="utf-8")


def _remove_graphs_of_deleted_models(folder: Path) -> None:
    for file in folder.glob("*/graph.json"):
        with suppress(OSError, ValueError, KeyError):
            if not Path(read_json_object(file)["model"]).exists():
                remove_path(file.parent)


def _get_graph_folder(name: str) -> Path:
    source = Path(name).resolve()
    return get_cache_dir() / "text_graphs" / f"{source.name}-{hash_text(str(source))[:12]}"


def _read_graph_settings(name: str) -> dict[str, Any] | None:
    """Return the settings of a saved graph, or None if no graph matches the current model files."""
    with suppress(OSError, ValueError, RuntimeError):  # RuntimeError: the user has no home folder
        settings = read_json_object(_get_graph_folder(name) / "graph.json")
        if settings.items() >= _get_model_file_states(name).items():
            return settings
    return None


def _get_model_file_states(name: str) -> dict[str, Any]:
    """Return the format version, and the sizes and modification times of the model files that affect the graph."""
    root = Path(name).resolve()
    files = [root / "config.json", root / "model.safetensors"]
    files += sorted(file for file in (root / "text").rglob("*") if file.is_file())
    states = []
    for file in files:
        status = file.stat()
        states.append([str(file.relative_to(root)), status.st_size, status.st_mtime_ns, status.st_ctime_ns])
    return {"version": FORMAT_VERSION, "model": str(root), "files": states}


def _try_load_graph(name: str, settings: dict[str, Any]) -> OnnxTextEncoder | None:
    if "error" not in settings:
        with suppress(Exception):  # the exceptions of onnxruntime and tokenizers have no common base class
            return _load_graph(name, _get_graph_folder(name), settings)
    return None


def _load_graph(name: str, folder: Path, settings: dict[str, Any]) -> OnnxTextEncoder:
    import onnxruntime
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=settings["pad_id"], pad_token="")
    tokenizer.enable_truncation(settings["max_length"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # additional threads would mostly busy-wait, because a query is short
    return OnnxTextEncoder(
        name=name,
        embed_dim=settings["embed_dim"],
        identities=settings["identities"],
        query_templates=QueryTemplates.from_dict(settings["query_templates"]),
        tokenizer=tokenizer,
        session=onnxruntime.InferenceSession(str(folder / "text.onnx"), options, providers=["CPUExecutionProvider"]),
    )


def _export_graph(model: DualEncoder, folder: Path) -> dict[str, Any]:
    """Write text.onnx and tokenizer.json. Return the graph's settings. Raise ValueError if the graph is inaccurate."""
    from llm2clip.models.export.onnx import export_text_encoder
    from llm2clip.models.export.transformers import build_tokenizer
    from llm2clip.models.llm2clip import LLM2CLIP

    source = model.llm2clip
    if source is None or source.device.type != "cpu" or model.precision != "fp32":
        source = LLM2CLIP.from_pretrained(model.name, device="cpu")
    export_text_encoder(source, folder)
    tokenizer = build_tokenizer(source.encoder)
    settings = {
        "embed_dim": model.embed_dim,
        "identities": model.part_identities(),
        "query_templates": dataclasses.asdict(model.query_templates),
        "pad_id": tokenizer.pad_token_id,
        "max_length": tokenizer.model_max_length,
    }
    graph = _load_graph(model.name, folder, json.loads(json.dumps(settings)))
    expected = source.encode_text(CHECKED_TEXTS).numpy()
    difference = float(np.abs(graph.encode_texts(CHECKED_TEXTS) - expected).max())
    if not difference <= MAX_DIFFERENCE:  # `not <=` also catches NaN
        raise ValueError(f"the graph's embeddings differ from PyTorch's embeddings by {difference:g}")
    return settings
