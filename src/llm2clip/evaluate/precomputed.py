"""Vectors that some other program made, in a file: a competitor that need not run here.

np.savez("theirs.npz", images=vectors, image_names=paths, texts=vectors, captions=strings)
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

SAVED = ".npz"
ARRAYS = ("images", "image_names", "texts", "captions")


class PrecomputedEmbeddings:
    """Of images (N, width) by their names, and of texts (M, width) by what they say.

    An image is looked for by its whole path, then without its first folder, and so on to its bare name.
    """

    def __init__(self, file: Path, log: SkipLog) -> None:
        """
        Raises:
            ValueError: the file is not such a file, or a vector is not finite; the message says what is wrong.
        """
        self.file, self.log = file, log
        try:
            with np.load(file, allow_pickle=False) as arrays:
                if lacking := [name for name in ARRAYS if name not in arrays]:
                    raise ValueError(f"no array {lacking[0]!r}; it takes {', '.join(ARRAYS)}")
                images, names, texts, captions = (arrays[name] for name in ARRAYS)
        except (AttributeError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:  # a .npy by another name
            raise ValueError(f"{file}: {error}") from error
        for what, vectors, keys in (("images", images, names), ("texts", texts, captions)):
            if vectors.ndim != 2 or keys.ndim != 1 or len(vectors) != len(keys):
                raise ValueError(f"{file}: {what} are {vectors.shape}, for {keys.shape} names")
        if images.shape[1] != texts.shape[1]:
            raise ValueError(f"{file}: images are {images.shape[1]} wide, texts {texts.shape[1]}")
        self._images, self._texts = (F.normalize(torch.from_numpy(v).float(), dim=-1) for v in (images, texts))
        check_finite(self._images, self._texts)
        self._names = {PurePosixPath(str(name)).as_posix(): n for n, name in enumerate(names)}
        self._captions: dict[str, int] = {}
        for n, caption in enumerate(captions):  # stripped, as those of records are
            first = self._captions.setdefault(str(caption).strip(), n)
            if not torch.allclose(self._texts[first], self._texts[n], atol=1e-3):
                raise ValueError(f"{file}: the caption {str(caption)!r} has two vectors")
        if len(self._names) < len(names):
            raise ValueError(f"{file}: of {len(names):,} image_names some are the same; give more of their paths")

    def images(self, refs: Sequence[ImageRef]) -> tuple[Tensor, list[int]]:
        """
        Raises:
            ValueError: the file lacks an image, or has one vector for two.
        """
        rows = [self._row(ref) for ref in refs]
        if lacking := [str(ref) for ref, row in zip(refs, rows, strict=True) if row is None]:
            raise ValueError(
                f"{self.file} has no vector of {len(lacking):,} of {len(refs):,} images, {lacking[0]} for one"
            )
        taken: dict[int | None, ImageRef] = {}
        for ref, row in zip(refs, rows, strict=True):
            if taken.setdefault(row, ref).key != ref.key:
                raise ValueError(f"{self.file} has one vector for {taken[row]} and {ref}: give more of their paths")
        return self._images[torch.tensor(rows)], list(range(len(refs)))

    def _row(self, ref: ImageRef) -> int | None:
        for path in (PurePosixPath(str(ref)), PurePosixPath(str(ref).replace("!", "/"))):  # a tar's member after it
            for start in range(len(path.parts)):
                name = PurePosixPath(*path.parts[start:]).as_posix()
                if name in self._names:
                    return self._names[name]
        return None

    def texts(self, texts: Sequence[str]) -> Tensor:
        """
        Raises:
            ValueError: the file lacks a text.
        """
        rows = [self._captions.get(text) for text in texts]
        if lacking := [text for text, row in zip(texts, rows, strict=True) if row is None]:
            raise ValueError(
                f"{self.file} has no vector of {len(lacking):,} of {len(texts):,} texts, {lacking[0]!r} for one"
            )
        return self._texts[torch.tensor(rows)]

    def count_truncated(self, texts: Sequence[str]) -> int | None:
        return None
