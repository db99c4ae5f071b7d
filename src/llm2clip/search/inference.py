"""Inference service that computes embeddings and runs searches for concurrent requests."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import numpy as np
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.concurrency import run_in_threadpool
from torch import Tensor

from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.models.prompts import NO_TEMPLATES, QueryTemplates
from llm2clip.models.truncation import truncate_and_normalize
from llm2clip.search.backends import Backend, Hit, IndexUnavailableError
from llm2clip.search.build import truncate_to_index
from llm2clip.search.explain import Explanation, prepare_explanation
from llm2clip.search.heatmap import compute_heatmap, require_dense_encoder
from llm2clip.search.query import QueryVectors, SearchQuery
from llm2clip.search.queues import Batcher, FairThreadPool
from llm2clip.search.relevance import Calibration, SearchResult, load_calibration, search_relevant
from llm2clip.search.request_images import (
    BadRequest,
    NotFound,
    RequestImage,
    TooLarge,
    load_request_image,
    open_original,
)
from llm2clip.search.rerank import IMAGES_PER_BATCH, RERANKED, PreparedImage, RerankCache, Reranking, sort_hits
from llm2clip.search.schemas import MAX_OFFSET, ExplainRequest, HeatmapRequest, SearchRequest, SearchResponse
from llm2clip.search.similar import READ_FACTOR, HitPage, group_similar_hits
from llm2clip.search.vlm import RerankModel, VisionLanguageModel, make_question

DECODE_THREADS = 2
MAX_HEATMAP_CELLS = 4096  # maximum for requests that set image_size; memory can grow quadratically with the cell count
CALIBRATION_SECONDS = 60.0  # maximum age of the cached calibration of relevance, in seconds
COUNT_SECONDS = 1.0  # maximum age of the cached image count, in seconds
SEARCH_THREADS = 2  # each search scans all vectors, so more threads would only compete for memory bandwidth


@dataclass(frozen=True)
class Limits:
    """Resource limits for requests to a server.

    Args:
        max_body_bytes: Maximum request body size in bytes. Larger requests are rejected with status 413.
        max_bytes_in_flight: Maximum total size of all request and response bodies in memory, in bytes. A single client
            address may use a quarter of this budget. Requests of at most 64 KB are always accepted. Larger requests
            that exceed the budget are rejected with status 429.
        max_pixels: Maximum number of pixels per image. Larger images are rejected with status 413.
        max_queue: Maximum length of each of the four queues (texts, images, heat maps and searches). Requests that need
            a full queue are rejected with status 429.
        timeout: Maximum duration of a request in seconds. Slower requests fail with status 504.
        batch_size: Maximum number of texts or images per forward pass.
        max_connections: Maximum number of connections. Beyond this limit, the server aborts a connection of the client
            with the most connections.
        idle_timeout: Maximum time in seconds to wait for a client to send request headers or to read more of a
            response. After this time, the connection is aborted.
    """

    max_body_bytes: int = 32 << 20
    max_bytes_in_flight: int = 512 << 20
    max_pixels: int = 50_000_000
    max_queue: int = 512
    timeout: float = 30.0
    batch_size: int = 32
    max_connections: int = 512
    idle_timeout: float = 10.0


class InferenceService:
    """A server's model, index, request queues and metrics.

    Methods raise the exceptions listed in `search.errors.STATUS_CODES`. The server converts them to error responses.
    """

    def __init__(
        self,
        model: DualEncoder,
        backend: Backend | None,
        limits: Limits,
        model_thread: ThreadPoolExecutor | None = None,
        templates: QueryTemplates = NO_TEMPLATES,
        rerank_model: RerankModel | None = None,
    ) -> None:
        """
        Args:
            backend: Index to search. If None, the server only computes embeddings.
            model_thread: Single-threaded executor that loaded the model and will run it. On a CPU, each thread that
                runs PyTorch operations has its own OpenMP thread pool. With more OpenMP threads than cores, the threads
                do not busy-wait between operations, which halves the model's speed.
            templates: Prompt templates for requests without templates. See `build_query_prompts`.
            rerank_model: Re-ranking model, loaded by `model_thread`. If None, requests for re-ranking are rejected.

        Raises:
            ValueError: The index was built with a different model.
        """
        self.model, self.backend, self.limits = model, backend, limits
        # Embedding requests may ask for any number of dimensions, whereas queries have that of the index.
        self._query_model = model if backend is None else truncate_to_index(backend.metadata(), model)
        self.templates = templates
        # Use a single thread, because running two batches in parallel is slower than running them in sequence.
        self._model_thread = model_thread or ThreadPoolExecutor(1, "model")
        # The model thread must set its OpenMP thread count before the decoder threads set theirs to one.
        self._model_thread.submit(torch.get_num_threads).result()
        self._decoders = FairThreadPool(DECODE_THREADS, "images", limits.max_queue, lambda: torch.set_num_threads(1))
        # Searches need their own thread pool, because a search occupies its thread until it ends, even after a timeout.
        self._searchers = FairThreadPool(SEARCH_THREADS, "searches", limits.max_queue)
        self._counts, self._counts_time, self._counts_lock = (0, 0), -math.inf, threading.Lock()
        self._calibration: Calibration | None = None
        self._calibration_time, self._calibration_lock = -math.inf, threading.Lock()
        self._create_metrics()
        encoders: dict[str, Callable[[list[Any]], Any]] = {
            "text": lambda texts: model.encode_texts(texts).numpy(),
            "image": lambda images: model.encode_images(images).numpy(),
            "heatmap": lambda items: [compute_heatmap(*item) for item in items],  # not batched, because sizes differ
        }
        self._rerank_cache = None if rerank_model is None else RerankCache(rerank_model)
        if isinstance(rerank_model, VisionLanguageModel):
            encoders["rerank_image"] = rerank_model.rate
        elif rerank_model is not None:
            encoders["rerank_text"] = lambda texts: rerank_model.encode_texts(texts).numpy()
            encoders["rerank_image"] = lambda images: rerank_model.encode_images(images).numpy()
        self._batchers: dict[str, Batcher[Any, np.ndarray]] = {}
        for kind, encode in encoders.items():
            on_batch = self.batch_sizes.labels(kind).observe
            is_vlm = kind == "rerank_image" and isinstance(rerank_model, VisionLanguageModel)
            batch_size = 1 if is_vlm else limits.batch_size  # an image takes seconds, during which other requests wait
            batcher = Batcher(encode, self._model_thread, batch_size, limits.max_queue, on_batch)
            self._batchers[kind] = batcher
            self.queue_size.labels(kind).set_function(batcher.__len__)

    def _create_metrics(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.request_count = Counter(
            "llm2clip_http_requests", "Number of HTTP requests.", ["method", "path", "status"], registry=registry
        )
        self.request_duration = Histogram(
            "llm2clip_http_request_duration_seconds",
            "Duration of HTTP requests in seconds.",
            ["path"],
            registry=registry,
        )
        self.batch_sizes = Histogram(
            "llm2clip_batch_size",
            "Number of items per forward pass.",
            ["kind"],
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.queue_size = Gauge(
            "llm2clip_queue_size", "Number of items waiting for the model.", ["kind"], registry=registry
        )
        index_images = Gauge("llm2clip_index_images", "Number of images in the index.", registry=registry)
        index_images.set_function(self._count_images_for_metrics)

    async def close(self) -> None:
        """Cancel all queued work and stop all idle threads.

        Busy threads stop once they finish their current work. This method does not wait for them.
        """
        for batcher in self._batchers.values():
            await batcher.close()
        self._model_thread.shutdown(wait=False, cancel_futures=True)
        self._decoders.shutdown()
        self._searchers.shutdown()

    async def embed_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return a float32 embedding of shape (D,) for each text."""
        return _check_finite(await self._batchers["text"].submit(texts), "a text")

    async def embed_images(
        self, images: Sequence[RequestImage], rerank_model: DualEncoder | None = None
    ) -> list[np.ndarray]:
        """Decode images and return a float32 embedding of shape (D,) for each image.

        Args:
            rerank_model: Re-ranking model, which then embeds the images. Default: the server's model.
        """
        model, kind = (self.model, "image") if rerank_model is None else (rerank_model, "rerank_image")

        def prepare(image: RequestImage) -> Any:
            return model.transform(image.load(self.limits.max_pixels))

        prepared = await self._decoders.map(prepare, images)
        return _check_finite(await self._batchers[kind].submit(prepared), "an image")

    async def search(self, request: SearchRequest) -> bytes:
        """Embed a query and search the index. Without a query, return the newest images first.

        Return a `SearchResponse` as JSON, serialized in the search thread because it can be large.
        """
        backend, query, image_filter = self.require_backend(), request.to_query(), request.filter.to_filter()
        if not query and not image_filter:
            raise ValueError("the query is empty: provide at least one text, image, hit id or filter")
        if request.rerank and self._rerank_cache is None:
            raise BadRequest("this server has no re-ranking model. Start it with: llm2clip serve --rerank MODEL")
        rerank_cache = self._rerank_cache if query and request.rerank and request.offset < RERANKED else None
        query_vectors = await self._embed_query(query) if query else None

        has_negatives = bool(query.negative_texts or query.negative_images or query.negative_like)
        words = request.texts if request.words and not has_negatives else ()
        is_grouped = request.group_similar and bool(query)
        count = request.top * (READ_FACTOR if is_grouped else 1)
        # All pages with re-ranked hits are parts of one ranking, so these pages read it from the start.
        offset = request.offset if rerank_cache is None else 0
        skipped = request.offset - offset

        def find_hits(vectors: QueryVectors | None) -> SearchResult:
            return search_relevant(
                backend,
                self._get_calibration(),
                vectors,
                count=skipped + count if rerank_cache is None else max(RERANKED, skipped + count),
                image_filter=image_filter,
                offset=offset,
                words=words,
                show_weak=request.show_weak,
            )

        def make_response(result: SearchResult, reranking: Reranking | None = None) -> bytes:
            hits = (result if reranking is None else reranking).hits[skipped : skipped + count]
            page = HitPage(hits, len(hits))
            if is_grouped:
                page = group_similar_hits(hits, backend, request.top, self._get_calibration())
            total = backend.count_matches(image_filter) if image_filter else self.count_images()[1]
            # A backend skips images that another process has just removed, so a complete page may have fewer hits.
            end = request.offset + (count if page.size == len(hits) else page.size)
            values = {
                "hits": page.hits,
                "nothing_close": result.nothing_close,
                "total": total,
                "next_offset": end if page.hits and end < min(total, MAX_OFFSET + 1) else None,
                "rerank_seconds": None if reranking is None else reranking.seconds,
                "rerank_missing": None if reranking is None else reranking.missing,
            }
            response = SearchResponse.model_validate(values, from_attributes=True)
            return response.model_dump_json().encode()

        if rerank_cache is None:
            [response] = await self._searchers.map(lambda vectors: make_response(find_hits(vectors)), [query_vectors])
            return response
        [result] = await self._searchers.map(find_hits, [query_vectors])
        reranking = await self._rerank(rerank_cache, query, result.hits)
        [response] = await self._searchers.map(lambda result: make_response(result, reranking), [result])
        return response

    async def _rerank(self, rerank_cache: RerankCache, query: SearchQuery, hits: list[Hit]) -> Reranking:
        """Sort the first hits with the re-ranking model."""
        start, first = time.perf_counter(), [hit.id for hit in hits[:RERANKED]]
        if isinstance(rerank_cache.model, VisionLanguageModel):
            ratings = await self._process_originals(rerank_cache, first, make_question(query))
            return sort_hits(hits, {hit_id: float(rating) for hit_id, rating in ratings.items()}, start)
        vector = await self._embed_query_for_reranking(rerank_cache, rerank_cache.model, query)
        vectors = await self._process_originals(rerank_cache, first)
        scores = {hit_id: float(vector @ hit_vector) for hit_id, hit_vector in vectors.items()}
        return sort_hits(hits, scores, start)

    async def _embed_query_for_reranking(
        self, rerank_cache: RerankCache, model: DualEncoder, query: SearchQuery
    ) -> np.ndarray:
        """Return the re-ranking model's query vector. The model embeds the image files of earlier hits."""
        prompts, counts = query.build_prompts(model.query_templates)
        like = [*query.like, *query.negative_like]
        like_vectors = await self._process_originals(rerank_cache, like)
        for hit_id in like:
            if hit_id not in like_vectors:
                raise NotFound(
                    f"re-ranking needs the image file of hit {hit_id}, which is part of the query, but the file cannot "
                    "be decoded, or has been changed or removed since it was indexed"
                )
        images = await self.embed_images(_list_images(query), model)
        texts = _check_finite(await self._batchers["rerank_text"].submit(prompts), "a text")
        return query.combine(texts, counts, images, [like_vectors[hit_id] for hit_id in like]).combined

    async def _process_originals(
        self, rerank_cache: RerankCache, hit_ids: Sequence[str], question: str = ""
    ) -> dict[str, np.ndarray]:
        """Return the re-ranking model's results for the image files of hits, without those that cannot be decoded.

        Args:
            question: Question to a vision-language model, whose results are probabilities. Default: the results are
                the embeddings of a dual encoder.
        """
        decode = partial(load_request_image, max_pixels=self.limits.max_pixels)

        def prepare(hit_id: str) -> PreparedImage | None:
            return rerank_cache.prepare(hit_id, question, self._read_original, decode)

        results: dict[str, np.ndarray] = {}
        step = min(IMAGES_PER_BATCH, self.limits.max_queue)
        for start in range(0, len(hit_ids), step):
            batch = hit_ids[start : start + step]
            new: dict[str, PreparedImage] = {}
            for hit_id, image in zip(batch, await self._decoders.map(prepare, batch), strict=True):
                if image is not None and image.result is not None:
                    results[hit_id] = image.result
                elif image is not None:
                    new[hit_id] = image
            items = [(image.pixels, question) if question else image.pixels for image in new.values()]
            new_results = await self._batchers["rerank_image"].submit(items)
            for (hit_id, image), result in zip(new.items(), new_results, strict=True):
                if np.isfinite(result).all():
                    rerank_cache.add(image.key, result)
                    results[hit_id] = result
        return results

    async def explain(self, request: ExplainRequest) -> Explanation:
        """Embed a query, and the query without each of its words. Return the effect of each word on a hit's score."""
        query = request.to_query()
        explainer = prepare_explanation(query, self.templates)
        vector, *hits = await self._read_vectors([request.id, *query.like, *query.negative_like])
        images = await self._embed_query_images(query)
        prompts: list[np.ndarray] = []
        step = min(self.limits.batch_size, self.limits.max_queue)  # leaves space in the queue for other requests
        for start in range(0, len(explainer.prompts), step):
            prompts += await self.embed_texts(explainer.prompts[start : start + step])
        prompts = truncate_vectors(prompts, self._query_model.embed_dim)
        return explainer.explain(np.stack(prompts), images, hits, vector)

    async def compute_heatmap(self, request: HeatmapRequest) -> np.ndarray:
        """Embed a query. Return its cosine similarity to each image cell, as a float32 array of shape (h, w)."""
        dense = require_dense_encoder(self._query_model)
        variant = request.variant or dense.localization_variant
        if variant not in dense.variants:
            raise ValueError(f"this model does not support the variant {variant}: use {' or '.join(dense.variants)}")
        if request.id is not None:
            self.require_backend()
        query_vector = (await self._embed_query(request.to_query())).combined
        image_size = request.image_size or dense.localization_size

        def prepare(request: HeatmapRequest) -> Tensor:
            if request.image is not None:
                image = RequestImage(request.image, "image").load(self.limits.max_pixels)
            else:
                image = self._load_original(request.id or "")
            rows, columns = dense.compute_grid_shape(image.shape[-2], image.shape[-1], image_size)
            if request.image_size is not None and rows * columns > MAX_HEATMAP_CELLS:
                raise ValueError(
                    f"image_size {image_size} results in {rows:,} x {columns:,} cells; the limit is "
                    f"{MAX_HEATMAP_CELLS:,} cells. Use a smaller image_size"
                )
            return dense.resize(image, image_size)

        [pixels] = await self._decoders.map(prepare, [request])
        item = dense, pixels, query_vector, variant
        [heatmap] = _check_finite(await self._batchers["heatmap"].submit([item]), "an image")
        return heatmap

    async def open_original(self, hit_id: str) -> tuple[BinaryIO, str]:
        """Open a hit's image file. See `request_images.open_original` for the return values.

        This runs in a decoder thread, because reading a table cell requires decoding the table.
        """
        [original] = await self._decoders.map(partial(open_original, self.require_backend()), [hit_id])
        return original

    def _load_original(self, hit_id: str) -> Tensor:
        """Decode a hit's image file to a tensor of shape (3, H, W), uint8."""
        return load_request_image(self._read_original(hit_id), self.limits.max_pixels)

    def _read_original(self, hit_id: str) -> bytes:
        """Return the contents of a hit's image file."""
        stream, _ = open_original(self.require_backend(), hit_id)
        max_bytes = self.limits.max_body_bytes
        with stream:
            data = stream.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise TooLarge(f"the image file is too large; the limit is {max_bytes:,} bytes")
        return data

    async def _embed_query(self, query: SearchQuery) -> QueryVectors:
        """Return the embeddings of a query and its positive parts."""
        prompts, counts = query.build_prompts(self.templates)
        hits = await self._read_vectors([*query.like, *query.negative_like])
        dim = self._query_model.embed_dim
        prompt_vectors = truncate_vectors(await self.embed_texts(prompts), dim)
        return query.combine(prompt_vectors, counts, await self._embed_query_images(query), hits)

    async def _embed_query_images(self, query: SearchQuery) -> list[np.ndarray]:
        """Return the embeddings of a query's images, then of its negative images."""
        return truncate_vectors(await self.embed_images(_list_images(query)), self._query_model.embed_dim)

    async def _read_vectors(self, hit_ids: Sequence[str]) -> list[np.ndarray]:
        """Return the embeddings of hits. Raise NotFound if the index does not contain one of them."""
        vectors = []
        for hit_id in hit_ids:
            vector = await run_in_threadpool(self.require_backend().vector, hit_id)
            if vector is None:
                raise NotFound(f"the index contains no image with id {hit_id}")
            vectors.append(vector)
        return vectors

    def _get_calibration(self) -> Calibration | None:
        """Return the calibration of relevance, which may be up to a minute old, or None if the index has none."""
        with self._calibration_lock:
            if time.monotonic() - self._calibration_time > CALIBRATION_SECONDS:
                self._calibration = load_calibration(self.require_backend(), self._query_model)
                self._calibration_time = time.monotonic()
            return self._calibration

    def require_backend(self) -> Backend:
        """Return the index. Raise NotFound if the server was started without an index."""
        if self.backend is None:
            raise NotFound("this server has no index. To search, start it with: llm2clip serve --index INDEX")
        return self.backend

    def count_images(self) -> tuple[int, int]:
        """Return the numbers of images and of distinct images in the index, which may be up to a second old.

        Without an index, both are 0.
        """
        if self.backend is None:
            return 0, 0
        with self._counts_lock:
            if time.monotonic() - self._counts_time > COUNT_SECONDS:
                self._counts, self._counts_time = self.backend.count(), time.monotonic()
            return self._counts

    def _count_images_for_metrics(self) -> float:
        """Return the number of images, or NaN if the index is unavailable, so that the other metrics stay available."""
        try:
            return self.count_images()[0]
        except IndexUnavailableError:
            return math.nan


def truncate_vectors(vectors: list[np.ndarray], dim: int) -> list[np.ndarray]:
    """Truncate L2-normalised float32 vectors to their first `dim` dimensions and normalise them again."""
    if not vectors or len(vectors[0]) == dim:
        return vectors
    return list(truncate_and_normalize(torch.from_numpy(np.stack(vectors)), dim).numpy())


def _list_images(query: SearchQuery) -> list[RequestImage]:
    """Return a query's images, then its negative images."""
    images = [RequestImage(uri, f"images.{index}") for index, uri in enumerate(query.images)]
    return images + [RequestImage(uri, f"negative_images.{index}") for index, uri in enumerate(query.negative_images)]


def _check_finite(vectors: list[np.ndarray], what: str) -> list[np.ndarray]:
    for vector in vectors:
        if not np.isfinite(vector).all():
            raise ValueError(f"the model returned NaN or infinity for {what}")
    return vectors
