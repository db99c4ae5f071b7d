"""A model's vectors of images and texts, worked out once and kept where there is a folder for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from llm2clip.data.hashing import unique_captions
from llm2clip.data.image_refs import ImageRef
from llm2clip.data.skip_log import SkipLog
from llm2clip.distributed import process_state
from llm2clip.evaluate.precomputed import SAVED, PrecomputedEmbeddings
from llm2clip.evaluate.ranks import check_finite
from llm2clip.models.dual_encoder import DualEncoder, open_dual_encoder
from llm2clip.models.fingerprint import fingerprint
from llm2clip.store.image_features import encode_image_batches, image_keys, store_image_features, store_text_embeddings


class EmbeddingSource(Protocol):
    """Whatever has vectors of images and texts, (N, width) float32, L2-normalised, on the CPU."""

    log: SkipLog

    def images(self, refs: Sequence[ImageRef]) -> tuple[Tensor, list[int]]:
        """Of those images that can be decoded, and which they are."""
        ...

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Of texts, in their order."""
        ...

    def count_truncated(self, texts: Sequence[str]) -> int | None:
        """How many of some texts are longer than the model's window, and lose their end; None where nobody can say."""
        ...


def open_embeddings(model: str, log: SkipLog, out: Path | None, batch: int) -> EmbeddingSource:
    """A model's vectors, or a file of them.

    Args:
        model: as of `open_dual`, or FILE.npz.
        log: where images that cannot be decoded are counted and listed.
        out: folder whose `vectors/` keeps them; None keeps none.
        batch: images in a forward pass.

    Raises:
        ValueError: it is no model, or no such file.
        OSError: there is none of that name.
        ImportError: the library that it takes is not installed.
    """
    if model.endswith(SAVED):
        return PrecomputedEmbeddings(Path(model), log)
    return ModelEmbeddings(
        open_dual_encoder(model, process_state().device), log, out / "vectors" if out else None, batch
    )


class ModelEmbeddings:
    """Vectors by a model, (N, width) float32, L2-normalised, on the CPU."""

    def __init__(
        self, model: DualEncoder, log: SkipLog, folder: Path | None = None, batch: int = 64, progress: bool = True
    ) -> None:
        """
        Args:
            model: any.
            log: where images that cannot be decoded are counted and listed.
            folder: for stores of vectors, by model; None keeps none.
            batch: images in a forward pass.
            progress: show bars.
        """
        self.model, self.log, self.batch, self.progress = model, log, batch, progress
        self.identity = model.identity() if folder is not None else {}
        self.folder = folder / fingerprint(self.identity)[:12] if folder is not None else None

    def images(self, refs: Sequence[ImageRef]) -> tuple[Tensor, list[int]]:
        """Of those images that can be decoded, and which they are.

        Raises:
            TooManySkipped: too many cannot.
            ValueError: a vector is not finite.
        """
        self.log.count_at_least(len(refs))  # of a benchmark nobody counted rows
        if self.folder is not None:
            store = store_image_features(
                refs, self.model, self.identity, self.folder / "images", self.log, dtype="float32", batch=self.batch
            )
            rows = store.find(image_keys(refs))
            return self._finite(torch.from_numpy(store.take(rows[rows >= 0]))), (rows >= 0).nonzero()[0].tolist()
        with tqdm(total=len(refs), desc="images", unit="image", disable=not self.progress) as bar:
            found = encode_image_batches(refs, self.model, self.log, bar, self.batch)
        self.log.check()
        return self._finite(found[0]), found[1]

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Of texts, in their order."""
        if self.folder is None:
            return self._finite(self.model.encode_texts(texts, self.progress))
        store = store_text_embeddings(
            unique_captions(texts), self.model.encode_texts, self.model.embed_dim, self.identity, self.folder / "texts"
        )
        return self._finite(torch.from_numpy(store.take(store.rows(texts))))

    def count_truncated(self, texts: Sequence[str]) -> int | None:
        return self.model.count_truncated(texts)

    @staticmethod
    def _finite(vectors: Tensor) -> Tensor:
        check_finite(vectors)
        return vectors
