"""Python interface for searching an image index."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from llm2clip.data.image_header import MAX_IMAGE_BYTES
from llm2clip.models.text_graph import open_text_graph
from llm2clip.search.backends import IndexBackend, open_backend
from llm2clip.search.metadata import Filter
from llm2clip.search.query import (
    READ_FACTOR,
    HitGroups,
    QueryEncoder,
    QueryVectors,
    SearchQuery,
    group_similar_hits,
    truncate_model_to_index,
)
from llm2clip.search.relevance import Calibration, load_calibration, search_and_rate_hits
from llm2clip.search.types import FairSemaphore, Hit, NotFoundError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llm2clip.models.dual_encoder import DualEncoder
    from llm2clip.search.explain import Explanation

CALIBRATION_SECONDS = 60.0  # maximum age of the cached relevance calibration, in seconds
COUNT_SECONDS = 1.0  # maximum age of the cached image count, in seconds


@dataclass(frozen=True)
class SearchOptions:
    """Options of a search.

    Attributes:
        words: Rank an image higher if each word of the query occurs in its captions, recognised text, file name, camera
            or date. Ignored if the query has negative parts.
        group_similar: Return a burst, or the edited copies of an image, as one hit whose `similar` field lists the
            other images. Ignored if there is no query.
        show_weak: Return hits even if no image in the index is close to the query.
    """

    words: bool = True
    group_similar: bool = True
    show_weak: bool = False


@dataclass(frozen=True)
class SearchPage:
    """A page of search results.

    Attributes:
        hits: Hits, best first, or newest first without a query. For each hit, `images` lists its files,
            `score` is the cosine similarity, and `relevance` is the estimated probability of being an answer.
        nothing_close: True if no image that matches the filter is close to the query. The page then has no hits, unless
            `SearchOptions.show_weak` is True or the search has a filter.
        total: Number of distinct images in the index that match the filter.
        next_offset: `offset` of the next page, or None if there are no further hits. Offsets count ungrouped hits, so a
            page can end before or after `offset` + `top`.
    """

    hits: list[Hit]
    nothing_close: bool
    total: int
    next_offset: int | None


@dataclass(frozen=True)
class SearchResources:
    """Image decoder and resource limits of searches. A server sets stricter limits than the defaults."""

    # Function that decodes an image to a uint8 tensor of shape (3, H, W). Default: `data.images.load_image`.
    load: Callable[[Any], Tensor] | None = None
    # Context managers that limit how many threads decode an image or scan the index at the same time.
    decoding: AbstractContextManager[Any] = field(default_factory=nullcontext)
    scanning: AbstractContextManager[Any] = field(default_factory=nullcontext)
    max_file_bytes: int = MAX_IMAGE_BYTES  # maximum size of an indexed image file that is decoded, in bytes


class Index:
    """An image index and the model that embeds its queries. Thread-safe if the model is.

        index = Index.open("runs/mine/index")
        page = index.search("two children in the snow", top=10)
        for hit in page.hits:
            print(hit.images[0].name, hit.score, hit.relevance)

        query = SearchQuery(texts=["a beach"], images=["sunset.jpg"], negative_texts=["people"], like=[page.hits[0].id])
        page = index.search(query, filter=Filter(min_side=1000), options=SearchOptions(group_similar=False))

    `SearchQuery` is in `llm2clip.search.query`, `Filter` in `llm2clip.search.metadata`, and `SearchOptions` in
    `llm2clip.search.index`. Build an index with the command `llm2clip index`.
    """

    def __init__(
        self,
        backend: IndexBackend,
        model: str | DualEncoder | None = None,
        device: torch.device | str | None = None,
        precision: str = "auto",
        resources: SearchResources | None = None,
    ) -> None:
        """Create an index from a backend. See `open` for the other arguments."""
        self.backend, self.resources = backend, resources or SearchResources()
        self._model, self._device, self._precision = model, device, precision
        self._count_slot, self._calibration_slot = FairSemaphore(1), FairSemaphore(1)
        self._counts, self._counts_time = (0, 0), -math.inf
        self._calibration: Calibration | None = None
        self._calibration_time = -math.inf

    @classmethod
    def open(
        cls,
        location: str | Path,
        model: str | DualEncoder | None = None,
        device: torch.device | str | None = None,
        precision: str = "auto",
    ) -> Index:
        """Open an index. The model is loaded when it is first needed.

        Args:
            location: Index folder or postgresql:// URL.
            model: Model that built the index, as a loaded model or a name as in `open_dual_encoder`. Default: the model
                name that is stored in the index.
            device: Device of the model. Default: a GPU if available.
            precision: Precision of the text encoder, as in `open_dual_encoder`.

        Raises:
            FileNotFoundError: There is no index at the location.
            ImportError: A required package is not installed (extra `search`, or `postgres` for PostgreSQL).
            ValueError: The URL is invalid.
        """
        return cls(open_backend(str(location)), model, device, precision)

    @property
    def _model_name(self) -> str | None:
        """Name of the model, or None if the index was opened with a loaded model."""
        if self._model is None:
            return str(self.backend.read_metadata()["model"])
        return self._model if isinstance(self._model, str) else None

    @cached_property
    def encoder(self) -> QueryEncoder:
        """Query encoder whose embeddings are truncated to the dimension of the index.

        Raises:
            ValueError: The index was built with a different model.
            OSError: The model does not exist.
        """
        from llm2clip.models.dual_encoder import open_dual_encoder

        model, name = self._model, self._model_name
        if name is not None:
            model = open_dual_encoder(name, device=self._device, precision=self._precision)
        model = truncate_model_to_index(self.backend.read_metadata(), cast("DualEncoder", model))
        return QueryEncoder(model, self.resources.load, self.resources.decoding)

    @cached_property
    def _text_encoder(self) -> QueryEncoder:
        """Encoder for queries without images. If the model has an ONNX text encoder, PyTorch is not needed."""
        metadata, name = self.backend.read_metadata(), self._model_name
        if name is not None and self._device is None and self._precision == "auto" and "image_fingerprint" in metadata:
            graph = open_text_graph(name)
            if graph is not None:  # a text graph has all attributes that text queries need
                return QueryEncoder(truncate_model_to_index(metadata, cast("DualEncoder", graph)))
        return self.encoder

    def search(
        self,
        query: str | SearchQuery | None = None,
        top: int = 10,
        offset: int = 0,
        filter: Filter | None = None,
        options: SearchOptions | None = None,
    ) -> SearchPage:
        """Return a page of the images that are most similar to a query.

        Args:
            query: A text, or a query with texts, images and earlier hits. Default: return the newest images.
            top: Maximum number of hits, not counting similar images.
            offset: Number of hits to skip. For the next page, pass `next_offset` of the previous page.
            filter: Conditions that every hit must meet.
            options: Search options. Default: `SearchOptions()`.

        Raises:
            ValueError: A text is empty, the index was built with a different model, or the model returned NaN or
                infinity.
            ImageError: An image of the query cannot be decoded.
            NotFoundError: The index does not contain one of the earlier hits in the query.
            IndexUnavailableError: The index cannot be read at the moment.
        """
        query = _make_search_query(query)
        image_filter, options = filter or Filter(), options or SearchOptions()
        vectors = self.embed(query) if query else None
        calibration = self.calibration if query else None
        groups = options.group_similar and bool(query)
        count = top * (READ_FACTOR if groups else 1)
        with self.resources.scanning:
            hits, nothing_close = search_and_rate_hits(
                self.backend,
                calibration,
                vectors,
                count=count,
                image_filter=image_filter,
                offset=offset,
                words=query.texts if options.words and not query.has_negative_parts else (),
                show_weak=options.show_weak,
            )
            page = HitGroups(hits, len(hits))
            if groups:
                mean = None if calibration is None else calibration.sample_mean
                page = group_similar_hits(hits, self.backend, top, mean)
            total = self.backend.count_matches(image_filter) if image_filter else self.count()[1]
        # The backend skips images that another process has just removed, so any page may be shorter than requested.
        end = offset + (count if page.size == len(hits) else page.size)
        return SearchPage(
            hits=page.hits,
            nothing_close=nothing_close,
            total=total,
            next_offset=end if page.hits and end < total else None,
        )

    def explain(self, query: str | SearchQuery, hit_id: str) -> Explanation:
        """Return the effect of each word of the query's texts on the score of a hit.

        Raises:
            UnsupportedQueryError: The query has no texts.
            NotFoundError: The index does not contain the hit.
        """
        from llm2clip.search.explain import explain_hit

        query = _make_search_query(query)
        vector, *hits = self._read_vectors([hit_id, *query.like, *query.negative_like])
        return explain_hit(self.encoder, query, vector, hits)

    def compute_heatmap(self, query: str | SearchQuery, hit_id: str) -> np.ndarray:
        """Return the cosine similarity between a query and each cell of a hit's image, of shape (h, w), float32.

        Raises:
            ValueError: The model cannot embed image regions.
            NotFoundError: The index does not contain the hit, or the image file has been changed or removed.
        """
        from llm2clip.search.explain import compute_heatmap, require_dense_encoder
        from llm2clip.search.images import read_original_image

        vector, dense = self.embed(query).combined, require_dense_encoder(self.encoder.model)
        with self.resources.decoding:
            data = read_original_image(self.backend, hit_id, self.resources.max_file_bytes)
            pixels = dense.resize(self.encoder.load(data), dense.localization_image_size)
        return compute_heatmap(dense, pixels, vector)

    def embed(self, query: str | SearchQuery) -> QueryVectors:
        """Return the embeddings of a query. For the exceptions, see `search`."""
        query = _make_search_query(query)
        encoder = self.encoder if query.images or query.negative_images else self._text_encoder
        return encoder.embed(query, self._read_vectors([*query.like, *query.negative_like]))

    def count(self) -> tuple[int, int]:
        """Return the number of images and the number of distinct images. The counts may be up to a second old."""
        with self._count_slot:
            if time.monotonic() - self._counts_time > COUNT_SECONDS:
                self._counts, self._counts_time = self.backend.count_images(), time.monotonic()
            return self._counts

    @property
    def calibration(self) -> Calibration | None:
        """Relevance calibration, or None if the index is not calibrated. The value may be up to a minute old."""
        encoder = self._text_encoder
        with self._calibration_slot:
            if time.monotonic() - self._calibration_time > CALIBRATION_SECONDS:
                self._calibration = load_calibration(self.backend, encoder.model)
                self._calibration_time = time.monotonic()
            return self._calibration

    def _read_vectors(self, hit_ids: Sequence[str]) -> list[np.ndarray]:
        vectors = self.backend.read_vectors(hit_ids) if hit_ids else {}
        for hit_id in hit_ids:
            if hit_id not in vectors:
                raise NotFoundError(f"the index contains no image with id {hit_id}")
        return [vectors[hit_id] for hit_id in hit_ids]


def _make_search_query(query: str | SearchQuery | None) -> SearchQuery:
    if query is None:
        return SearchQuery()
    return SearchQuery([query]) if isinstance(query, str) else query
