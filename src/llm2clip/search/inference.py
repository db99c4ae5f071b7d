"""The model and the index behind the requests of many clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.concurrency import run_in_threadpool

from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.search.batching import Batcher, QueueFull
from llm2clip.search.query_embedding import combine
from llm2clip.search.schemas import HitResponse, Limits, NotFound, SearchRequest, decode_data_uri, load_request_image
from llm2clip.search.types import Backend


class InferenceService:
    """The model and the index behind the requests of many clients."""

    def __init__(
        self, model: DualEncoder, engine: Backend | None, limits: Limits, thread: ThreadPoolExecutor | None = None
    ) -> None:
        """
        Args:
            model: whose vectors are given.
            engine: the index; None serves embeddings alone.
            limits: what it puts up with.
            thread: an executor of one thread, in which the model was opened, and in which it will work. On a CPU each
                thread that computes has OpenMP threads of its own, and where there are more of all than cores, none
                waits awake for its next piece of work: two computing threads make one half as fast.
        """
        self.model, self.engine, self.limits = model, engine, limits
        self.registry = CollectorRegistry()
        self.requests = Counter("llm2clip_requests", "Requests.", ["method", "path", "status"], registry=self.registry)
        self.seconds = Histogram("llm2clip_request_seconds", "How long they took.", ["path"], registry=self.registry)
        self.batches = Histogram(
            "llm2clip_batch_size",
            "Items in a batch.",
            ["kind"],
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        self._one = thread or ThreadPoolExecutor(1, "model")  # two batches beside each other take longer than in turn
        self._one.submit(torch.get_num_threads).result()  # it counts its threads before the decoders have theirs
        self._decoders = ThreadPoolExecutor(2, "decode", torch.set_num_threads, (1,))
        self._decoding = self._queries = 0
        # Two at a time: each reads all vectors, and more only wait for the memory. Threads of their own, which one that
        # was given up on keeps until it ends.
        self._searching = ThreadPoolExecutor(2, "search")
        self.texts: Batcher[str, np.ndarray] = self._batcher("text", lambda some: model.encode_texts(some).numpy())
        self.images: Batcher[Any, np.ndarray] = self._batcher("image", lambda some: model.encode_images(some).numpy())
        waiting = Gauge("llm2clip_waiting", "Items that wait for the model.", ["kind"], registry=self.registry)
        waiting.labels("text").set_function(lambda: len(self.texts))
        waiting.labels("image").set_function(lambda: len(self.images))
        pictures = Gauge("llm2clip_pictures", "Pictures in the index.", registry=self.registry)
        pictures.set_function(lambda: self.engine.count()[0] if self.engine else 0)

    def _batcher(self, kind: str, work: Callable[[list[Any]], Any]) -> Batcher[Any, np.ndarray]:
        seen = self.batches.labels(kind).observe
        return Batcher(work, self._one, self.limits.batch_size, self.limits.max_queue, seen)

    async def close(self) -> None:
        await self.texts.close()
        await self.images.close()
        for pool in (self._one, self._decoders, self._searching):
            pool.shutdown(cancel_futures=True)

    async def read(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Vectors of texts.

        Raises:
            ValueError: one of them is nothing to the model.
        """
        return _finite(await self.texts.ask(texts), "a text")

    async def see(self, encoded: Sequence[bytes]) -> list[np.ndarray]:
        """Vectors of pictures.

        Raises:
            ImageError, TooLarge: one cannot be read.
            Busy: too many wait.
        """
        loop = asyncio.get_running_loop()
        if len(encoded) > self.limits.max_queue:
            raise ValueError(f"{len(encoded):,} pictures at once; {self.limits.max_queue:,} at most")
        if self._decoding + len(encoded) > self.limits.max_queue:
            raise QueueFull(f"{self._decoding:,} pictures are waiting")
        self._decoding += len(encoded)
        try:
            prepared = [await loop.run_in_executor(self._decoders, self._prepare, data) for data in encoded]
        finally:
            self._decoding -= len(encoded)
        return _finite(await self.images.ask(prepared), "a picture")

    def _prepare(self, data: bytes) -> Any:
        return self.model.transform(load_request_image(data, self.limits.max_pixels))

    async def search(self, request: SearchRequest) -> list[HitResponse]:
        """The answer to a search.

        Raises:
            Missing: there is no index, or what it is to be like is not in it.
            ValueError: nothing is wanted.
        """
        engine = self.indexed()

        async def vectors(texts: Sequence[str], uris: Sequence[str]) -> list[np.ndarray]:
            return [*await self.read(texts), *await self.see([decode_data_uri(uri) for uri in uris])]

        liked = []
        for hit in request.like:
            if (vector := await run_in_threadpool(engine.vector, hit)) is None:
                raise NotFound(f"there is no picture {hit}")
            liked.append(vector)
        wanted = [*liked, *await vectors(request.texts, request.images)]
        query = combine(wanted, await vectors(request.without_texts, request.without_images))
        if self._queries >= self.limits.max_queue:
            raise QueueFull(f"{self._queries:,} searches are waiting")
        self._queries += 1
        try:
            loop, only = asyncio.get_running_loop(), request.only.filter()
            hits = await loop.run_in_executor(self._searching, engine.search, query, request.top, only)
        finally:
            self._queries -= 1
        return [HitResponse.of(hit) for hit in hits]

    def indexed(self) -> Backend:
        if self.engine is None:
            raise NotFound("this server has no index: llm2clip serve --index INDEX")
        return self.engine


def _finite(vectors: list[np.ndarray], of: str) -> list[np.ndarray]:
    if not all(np.isfinite(vector).all() for vector in vectors):
        raise ValueError(f"{of} is nothing to the model: its vector is not finite")
    return vectors
