"""Image and text embeddings for evaluation, optionally cached on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from llm2clip.data.image_refs import ImageRef
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.texts import unique_captions
from llm2clip.evaluate.precomputed import PRECOMPUTED_SUFFIX, PrecomputedEmbeddings
from llm2clip.evaluate.ranks import check_finite
from llm2clip.models.dual_encoder import DualEncoder, open_dual_encoder
from llm2clip.models.hub.fingerprint import fingerprint
from llm2clip.models.prompts import QueryTemplates
from llm2clip.progress import ProgressBar
from llm2clip.runs.ranks import process_state
from llm2clip.store.image_features import encode_image_batches, image_keys, store_image_features, store_text_embeddings

BATCH_SIZE = 64  # images per forward pass


class EmbeddingSource(Protocol):
    """Interface for sources of image and text embeddings. Embeddings are (N, D) float32, L2-normalised, on the CPU."""

    log: SkipLog
    """Records images that cannot be decoded."""
    query_templates: QueryTemplates
    """Prompt templates for short search queries that were saved with the model. `encode_texts` does not apply them."""

    def encode_images(self, refs: Sequence[ImageRef]) -> tuple[Tensor, list[int]]:
        """Return embeddings of the decodable images, and the indices of these images in `refs`."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the embedding of each text."""
        ...

    def count_truncated(self, texts: Sequence[str]) -> int | None:
        """Return the number of texts truncated to the model's maximum length, or None if unknown."""
        ...


def open_embedding_source(
    model: str, log: SkipLog, cache_dir: Path | None, trust_remote_code: bool = False
) -> EmbeddingSource:
    """Load a model or a file of precomputed embeddings.

    Args:
        model: Model as accepted by `open_dual_encoder`, or an .npz file.
        log: Skip log for images that cannot be decoded.
        cache_dir: Folder in which the model's embeddings are cached. If None, embeddings are not cached.
        trust_remote_code: If True, run the Python code that comes with a model. Jina-CLIP requires this setting.

    Raises:
        ValueError: If the model is not an image-text model, or the .npz file is invalid.
        OSError: If the model or .npz file does not exist.
        ImportError: If a library that the model needs is not installed.
    """
    if model.endswith(PRECOMPUTED_SUFFIX):
        return PrecomputedEmbeddings(Path(model), log)
    dual_encoder = open_dual_encoder(model, process_state().device, trust_remote_code=trust_remote_code)
    return ModelEmbeddings(dual_encoder, log, cache_dir)


class ModelEmbeddings:
    """Embedding source that runs a model. Embeddings are (N, D) float32, L2-normalised, on the CPU."""

    def __init__(self, model: DualEncoder, log: SkipLog, cache_dir: Path | None = None, progress: bool = True) -> None:
        """
        Args:
            model: Image-text model.
            log: Skip log for images that cannot be decoded.
            cache_dir: Folder for the embedding stores, one store per model. If None, embeddings are not cached.
            progress: If True, show progress bars.
        """
        self.model, self.log, self.progress = model, log, progress
        self.query_templates = model.query_templates
        self.identity = model.identity() if cache_dir is not None else {}
        if model.precision != "fp32":
            self.identity["precision"] = model.precision
        self.folder = cache_dir / fingerprint(self.identity)[:12] if cache_dir is not None else None

    def encode_images(self, refs: Sequence[ImageRef]) -> tuple[Tensor, list[int]]:
        """Return embeddings of the decodable images, and the indices of these images in `refs`.

        Raises:
            TooManySkipped: If too many images cannot be decoded.
            ValueError: If an embedding contains NaN or infinity.
        """
        self.log.count_at_least(len(refs))  # benchmark readers do not count the rows that they read
        if self.folder is None:
            with ProgressBar(total=len(refs), desc="images", unit="image", disable=not self.progress) as bar:
                embeddings, indices = encode_image_batches(refs, self.model, self.log, bar, BATCH_SIZE)
            self.log.check()
        else:
            store = store_image_features(
                refs,
                self.model,
                self.identity,
                self.folder / "images",
                self.log,
                dtype="float32",
                batch_size=BATCH_SIZE,
            )
            rows = store.find(image_keys(refs))  # -1 for images that could not be decoded
            indices = (rows >= 0).nonzero()[0].tolist()
            embeddings = torch.from_numpy(store.take(rows[rows >= 0]))
        check_finite(embeddings)
        return embeddings, indices

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the embedding of each text.

        Raises:
            ValueError: If an embedding contains NaN or infinity.
        """
        if self.folder is None:
            embeddings = self.model.encode_texts(texts, self.progress)
        else:
            store = store_text_embeddings(
                unique_captions(texts),
                self.model.encode_texts,
                self.model.embed_dim,
                self.identity,
                self.folder / "texts",
            )
            embeddings = torch.from_numpy(store.take(store.rows(texts)))
        check_finite(embeddings)
        return embeddings

    def count_truncated(self, texts: Sequence[str]) -> int | None:
        return self.model.count_truncated(texts)
