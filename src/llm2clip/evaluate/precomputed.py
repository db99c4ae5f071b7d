"""Precomputed embeddings from an .npz file, for comparisons with models that llm2clip cannot run.

To create the file:

np.savez("other.npz", images=image_embeddings, image_names=paths, texts=text_embeddings, captions=strings)
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.data.image_refs import ImageRef
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate.ranks import check_finite
from llm2clip.models.prompts import LITERAL

PRECOMPUTED_SUFFIX = ".npz"
ARRAYS = ("images", "image_names", "texts", "captions")


class PrecomputedEmbeddings:
    """Embedding source that looks up image embeddings, (N, D), by image name, and text embeddings, (M, D), by text.

    The name of an image is its full path. If it is not found, leading folders are removed one by one until only the
    file name remains.
    """

    def __init__(self, file: Path, log: SkipLog) -> None:
        """
        Args:
            file: An .npz file with the arrays images, image_names, texts and captions.
            log: Skip log. It remains empty, because no images are decoded.

        Raises:
            ValueError: If an array is missing or has the wrong shape, an embedding contains NaN or infinity, an image
                name is repeated, or a caption has two different embeddings.
        """
        self.file, self.log = file, log
        self.query_templates = LITERAL
        images, names, texts, captions = self._read_arrays()
        for name, embeddings, keys in (("images", images, names), ("texts", texts, captions)):
            if embeddings.ndim != 2 or keys.ndim != 1 or len(embeddings) != len(keys):
                raise ValueError(
                    f"{file}: {name} have shape {embeddings.shape}, but the array of names has shape {keys.shape}"
                )
        if images.shape[1] != texts.shape[1]:
            raise ValueError(f"{file}: images have {images.shape[1]} dimensions, but texts have {texts.shape[1]}")
        self._images = F.normalize(torch.from_numpy(images).float(), dim=-1)
        self._texts = F.normalize(torch.from_numpy(texts).float(), dim=-1)
        check_finite(self._images, self._texts)
        self._row_of_image = {PurePosixPath(str(name)).as_posix(): row for row, name in enumerate(names)}
        if len(self._row_of_image) < len(names):
            raise ValueError(f"{file}: some of the {len(names):,} image_names are duplicates; use longer paths")
        self._row_of_text: dict[str, int] = {}
        for row, caption in enumerate(captions):
            first_row = self._row_of_text.setdefault(str(caption).strip(), row)  # captions in records are stripped, too
            if not torch.allclose(self._texts[first_row], self._texts[row], atol=1e-3):
                raise ValueError(f"{file}: the caption {str(caption)!r} has two different embeddings")

    def _read_arrays(self) -> list[np.ndarray]:
        try:
            with np.load(self.file, allow_pickle=False) as arrays:
                for name in ARRAYS:
                    if name not in arrays:
                        raise ValueError(f"no array {name!r}; the file must contain {', '.join(ARRAYS)}")
                return [arrays[name] for name in ARRAYS]
        # A .npy file renamed to .npz loads as a plain array and raises AttributeError or TypeError.
        except (AttributeError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.file}: {error}") from error

    def encode_images(self, refs: Sequence[ImageRef]) -> tuple[Tensor, list[int]]:
        """Return the embedding of each image in `refs`, and the indices of all images in `refs`.

        Raises:
            ValueError: If the file contains no embedding for an image, or two images match the same embedding.
        """
        rows = [self._find_image(ref) for ref in refs]
        missing = [ref for ref, row in zip(refs, rows, strict=True) if row is None]
        if missing:
            raise ValueError(
                f"{self.file} has no embedding for {len(missing):,} of {len(refs):,} images, e.g. {missing[0]}"
            )
        image_of_row: dict[int | None, ImageRef] = {}
        for ref, row in zip(refs, rows, strict=True):
            other = image_of_row.setdefault(row, ref)
            if other.key != ref.key:
                raise ValueError(
                    f"{self.file} has only one embedding for {other} and {ref}: use longer paths in image_names"
                )
        return self._images[torch.tensor(rows)], list(range(len(refs)))

    def _find_image(self, ref: ImageRef) -> int | None:
        """Return the row of an image's embedding, or None if the file contains no embedding for the image.

        An image in a tar file (FILE.tar!MEMBER) can also be found by its path within the tar file.
        """
        for path in (PurePosixPath(str(ref)), PurePosixPath(str(ref).replace("!", "/"))):
            for start in range(len(path.parts)):
                name = PurePosixPath(*path.parts[start:]).as_posix()
                if name in self._row_of_image:
                    return self._row_of_image[name]
        return None

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the embedding of each text.

        Raises:
            ValueError: If the file contains no embedding for a text.
        """
        missing = [text for text in texts if text not in self._row_of_text]
        if missing:
            raise ValueError(
                f"{self.file} has no embedding for {len(missing):,} of {len(texts):,} texts, e.g. {missing[0]!r}"
            )
        return self._texts[torch.tensor([self._row_of_text[text] for text in texts])]

    def count_truncated(self, texts: Sequence[str]) -> int | None:
        return None
