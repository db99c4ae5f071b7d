"""Sources of embeddings to evaluate: a model with an optional cache on disk, or precomputed embeddings.

Embeddings are L2-normalised float32 tensors of shape (N, D) on the CPU.
"""

from __future__ import annotations

import copy
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.data.image_refs import ImageRef
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate.metrics import check_embeddings_are_finite
from llm2clip.models.dual_encoder import DualEncoder, open_dual_encoder
from llm2clip.models.llm2clip import check_truncate_dim, truncate_and_normalize
from llm2clip.models.loading import fingerprint
from llm2clip.models.prompts import NO_TEMPLATES
from llm2clip.progress import ProgressBar
from llm2clip.runs.ranks import process_state
from llm2clip.store.encode import encode_image_batches, store_image_features, store_text_embeddings
from llm2clip.store.layout import make_image_keys

BATCH_SIZE = 64  # number of images per forward pass
PRECOMPUTED_SUFFIX = ".npz"
PRECOMPUTED_ARRAYS = ("images", "image_names", "texts", "captions")


def open_embedding_source(
    model: str, log: SkipLog, cache_dir: Path | None, trust_remote_code: bool = False
) -> EmbeddingSource:
    """Open a model (see `open_dual_encoder`), or an .npz file of precomputed embeddings.

    If `cache_dir` is set, the embeddings of a model are cached there.

    Raises:
        ValueError: The model is not an image-text model, or the .npz file is invalid.
        OSError: The model or the .npz file does not exist.
        ImportError: A library that the model requires is not installed.
    """
    if model.endswith(PRECOMPUTED_SUFFIX):
        return PrecomputedEmbeddings(Path(model), log)
    dual_encoder = open_dual_encoder(model, process_state().device, trust_remote_code=trust_remote_code)
    return ModelEmbeddings(dual_encoder, log, cache_dir)


class ModelEmbeddings:
    """Source of embeddings computed by a model. The model's `query_templates` are not applied to texts."""

    def __init__(self, model: DualEncoder, log: SkipLog, cache_dir: Path | None = None, progress: bool = True) -> None:
        self.model, self.log, self.progress = model, log, progress
        self._full_model = model  # the cache contains embeddings that are not truncated
        self.query_templates = model.query_templates
        self.identity = model.identity() if cache_dir is not None else {}
        if model.precision != "fp32":
            self.identity["precision"] = model.precision
        self.folder = cache_dir / fingerprint(self.identity)[:12] if cache_dir is not None else None

    @property
    def embed_dim(self) -> int:
        return self.model.embed_dim

    def encode_images(self, refs: Sequence[ImageRef]) -> tuple[Tensor, list[int]]:
        """Return the embeddings of all images that can be decoded, and the indices of these images in `refs`.

        Raises:
            TooManySkippedError: Too many images cannot be decoded.
            ValueError: An embedding contains NaN or infinity.
        """
        self.log.count_at_least(len(refs))  # counted here, because benchmark readers do not count images
        if self.folder is None:
            with ProgressBar(total=len(refs), desc="images", unit="image", disable=not self.progress) as bar:
                embeddings, indices = encode_image_batches(refs, self.model, self.log, bar, BATCH_SIZE)
            self.log.check()
        else:
            folder = self.folder / "images"
            store = store_image_features(
                refs, self._full_model, self.identity, folder, self.log, dtype="float32", batch_size=BATCH_SIZE
            )
            rows = store.find_keys(make_image_keys(refs))  # -1 for images that cannot be decoded
            indices = (rows >= 0).nonzero()[0].tolist()
            embeddings = self._truncate_embeddings(store.take(rows[rows >= 0]))
        check_embeddings_are_finite(embeddings)
        return embeddings, indices

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return one embedding per text. Raise ValueError if an embedding contains NaN or infinity."""
        if self.folder is None:
            embeddings = self.model.encode_texts(texts, self.progress)
        else:
            store = store_text_embeddings(
                list(dict.fromkeys(texts)),
                self._full_model.encode_texts,
                self._full_model.embed_dim,
                self.identity,
                self.folder / "texts",
            )
            embeddings = self._truncate_embeddings(store.take(store.find_rows(texts)))
        check_embeddings_are_finite(embeddings)
        return embeddings

    def _truncate_embeddings(self, embeddings: np.ndarray) -> Tensor:
        full = torch.from_numpy(embeddings)
        dim = self.model.embed_dim
        return full if dim == self._full_model.embed_dim else truncate_and_normalize(full, dim)

    def count_truncated_texts(self, texts: Sequence[str]) -> int | None:
        return self.model.count_truncated_texts(texts)

    def truncate(self, dim: int) -> ModelEmbeddings:
        """Return a copy whose embeddings are truncated to `dim` dimensions and renormalised.

        Raises:
            ValueError: The embeddings have fewer than `dim` dimensions.
        """
        truncated = copy.copy(self)
        truncated.model = self._full_model.truncate(dim)
        return truncated


class PrecomputedEmbeddings:
    """Embedding source that reads precomputed embeddings from an .npz file, for models that llm2clip cannot run.

    Create the file with np.savez("other.npz", images=image_embeddings, image_names=paths, texts=text_embeddings,
    captions=strings). The arrays must have shapes (N, D), (N,), (M, D) and (M,).

    Images are looked up by path. If a path is not in `image_names`, its leading folders are removed one by one, until
    only the file name remains. `encode_images` and `encode_texts` raise ValueError if an image or text is not in the
    file, or if two images match the same entry. See `ModelEmbeddings` for the methods.
    """

    def __init__(self, file: Path, log: SkipLog) -> None:
        """Read the .npz file. Raise ValueError if the file is invalid."""
        self.file, self.log = file, log
        self.query_templates = NO_TEMPLATES
        try:
            with np.load(file, allow_pickle=False) as arrays:
                images, names, texts, captions = (arrays[name] for name in PRECOMPUTED_ARRAYS)
        # For an .npy file renamed to .npz, np.load returns an array, and `with` raises AttributeError or TypeError.
        except (AttributeError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{file} must contain the arrays {', '.join(PRECOMPUTED_ARRAYS)} ({error})") from error
        for name, embeddings, keys in (("images, image_names", images, names), ("texts, captions", texts, captions)):
            if embeddings.ndim != 2 or keys.ndim != 1 or len(embeddings) != len(keys):
                raise ValueError(
                    f"{file}: {name} must have the shapes (N, D) and (N,) (got {embeddings.shape} and {keys.shape})"
                )
        if images.shape[1] != texts.shape[1]:
            raise ValueError(
                f"{file}: image embeddings ({images.shape[1]}) and text embeddings ({texts.shape[1]}) must have the "
                "same dimension"
            )
        self._images = F.normalize(torch.from_numpy(images).float(), dim=-1)
        self._texts = F.normalize(torch.from_numpy(texts).float(), dim=-1)
        check_embeddings_are_finite(self._images, self._texts)
        self._row_of_image = {PurePosixPath(str(name)).as_posix(): row for row, name in enumerate(names)}
        if len(self._row_of_image) < len(names):
            raise ValueError(f"{file} contains duplicate image_names: use longer paths")
        self._row_of_text: dict[str, int] = {}
        for row, caption in enumerate(captions):
            first_row = self._row_of_text.setdefault(str(caption).strip(), row)  # records also strip captions
            if not torch.allclose(self._texts[first_row], self._texts[row], atol=1e-3):
                raise ValueError(f"{file}: the caption {str(caption)!r} has two different embeddings")

    @property
    def embed_dim(self) -> int:
        return self._images.shape[1]

    def encode_images(self, refs: Sequence[ImageRef]) -> tuple[Tensor, list[int]]:
        rows = [self._find_image_row(ref) for ref in refs]
        self._check_all_have_embeddings("images", refs, rows)
        image_of_row: dict[int | None, ImageRef] = {}
        for ref, row in zip(refs, rows, strict=True):
            other = image_of_row.setdefault(row, ref)
            if other.key != ref.key:
                raise ValueError(
                    f"{other} and {ref} match the same entry of image_names in {self.file}: use longer paths"
                )
        return self._images[torch.tensor(rows)], list(range(len(refs)))

    def _find_image_row(self, ref: ImageRef) -> int | None:
        """Return the row of an image, or None. An image in a tar file may be named FILE.tar!MEMBER or MEMBER."""
        for path in (PurePosixPath(str(ref)), PurePosixPath(str(ref).replace("!", "/"))):
            for start in range(len(path.parts)):
                name = PurePosixPath(*path.parts[start:]).as_posix()
                if name in self._row_of_image:
                    return self._row_of_image[name]
        return None

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        rows = [self._row_of_text.get(text) for text in texts]
        self._check_all_have_embeddings("texts", [repr(text) for text in texts], rows)
        return self._texts[torch.tensor(rows)]

    def _check_all_have_embeddings(self, kind: str, names: Sequence[object], rows: Sequence[int | None]) -> None:
        missing = [name for name, row in zip(names, rows, strict=True) if row is None]
        if missing:
            raise ValueError(
                f"{self.file} has no embedding for {len(missing):,} of {len(rows):,} {kind}, e.g. {missing[0]}"
            )

    def count_truncated_texts(self, texts: Sequence[str]) -> int | None:
        return None

    def truncate(self, dim: int) -> PrecomputedEmbeddings:
        check_truncate_dim(dim, self._images.shape[1], str(self.file))
        truncated = copy.copy(self)
        truncated._images = truncate_and_normalize(self._images, dim)
        truncated._texts = truncate_and_normalize(self._texts, dim)
        return truncated


EmbeddingSource = ModelEmbeddings | PrecomputedEmbeddings
