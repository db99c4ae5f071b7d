"""Server-side inference with worker threads, batches that combine requests, resource limits and metrics.

Each request runs in a worker thread, which calls the Python interface (`search.index`). The model passes its inputs to
an `InferenceBatcher`, so that a single forward pass encodes the texts of many requests.

Each queue holds at most `ServerLimits.max_queue` requests, texts or images. Further items raise `QueueFullError`
(status 429).

`RequestMiddleware` cancels a request after `ServerLimits.timeout` (status 504). A queued request then never starts. A
running request stops waiting for the model, a decoder, the index or a database connection (`types.Deadline`). However,
a forward pass, a scan or the decoding of an image continues until it is complete.
"""

import asyncio
import dataclasses
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from torch import Tensor

from llm2clip.cpu_tuning import use_onednn_matmul
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.search.backends import IndexBackend
from llm2clip.search.images import load_query_image, open_original_image
from llm2clip.search.index import Index, SearchResources
from llm2clip.search.query import QueryEncoder
from llm2clip.search.types import FairSemaphore, IndexUnavailableError, NotFoundError, current_deadline

Item = TypeVar("Item")
Result = TypeVar("Result")
DECODERS = 2  # number of threads that can read or decode an image at the same time
SCANS = 2  # number of concurrent scans of the index; more scans would only compete for memory bandwidth
WORKERS_PER_BATCH_ITEM = 2  # enough worker threads to collect the next batch while a batch is encoded
MAX_WAIT = 0.03  # maximum time that a batch waits for more items, in seconds


class QueueFullError(Exception):
    """Raised when too many items are waiting. A later attempt may succeed."""


@dataclasses.dataclass(frozen=True)
class ServerLimits:
    """Resource limits for requests to a server. To limit individual clients, use a proxy (see `deploy/`)."""

    max_body_bytes: int = 32 << 20  # maximum size of a request body; larger requests are rejected with status 413
    # Maximum total size of all request and response bodies in memory, in bytes.
    # If the limit is exceeded, requests of more than 64 KB are rejected with status 429.
    max_bytes_in_flight: int = 512 << 20
    max_pixels: int = 50_000_000  # maximum number of pixels per image; larger images are rejected with status 413
    max_queue: int = 512  # maximum number of requests, texts or images per queue; if full, requests get status 429
    timeout: float = 30.0  # time limit per request, in seconds; slower requests fail with status 504
    batch_size: int = 32  # number of texts or images per forward pass
    max_connections: int = 512  # if more connections are open, the server aborts idle connections
    idle_timeout: float = 10.0  # seconds to wait for request headers, or for a client to read more of a response


class WorkerPool:
    """Thread pool that runs functions for coroutines and limits how many calls can wait."""

    def __init__(self, threads: int, unit: str, max_waiting: int) -> None:
        self.waiting = 0  # number of queued and running calls whose callers have not been cancelled
        self._unit, self._max_waiting = unit, max_waiting
        # Each thread that runs PyTorch operations has its own OpenMP threads, so each worker thread uses only one.
        self._pool = ThreadPoolExecutor(threads, unit, initializer=partial(torch.set_num_threads, 1))

    async def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """Call a function in a worker thread. Raise QueueFullError if too many calls are waiting or running."""
        check_queue_capacity(1, self.waiting, self._max_waiting, self._unit)
        future = self._pool.submit(copy_context().run, function, *args)
        self.waiting += 1
        try:
            return await asyncio.wrap_future(future)
        finally:
            self.waiting -= 1

    def shutdown(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def check_queue_capacity(count: int, waiting: int, limit: int, unit: str) -> None:
    """Raise ValueError if `count` exceeds the limit of a queue, or QueueFullError if too many items are waiting."""
    if count > limit:
        raise ValueError(f"too many {unit} in one request: {count:,}; the limit is {limit:,}")
    if waiting + count > limit:
        raise QueueFullError(f"the server is busy: {waiting:,} {unit} are waiting; try again later")


# ---- batches


class _PendingItem(NamedTuple, Generic[Item, Result]):
    item: Item
    result: Future[Result]


class InferenceBatcher(Generic[Item, Result]):
    """Batcher that combines items from several threads and processes each batch with a single call to `work`.

    While a batch is being processed, items for the next batch are collected. If the next batch would be smaller than
    the previous batch, the batcher waits for more items, for up to a tenth of the duration of the previous batch.
    Without the wait, the first new item would form its own batch and delay the following items.

    If `work` raises an exception for a batch, `work` is called again for each item, so that only invalid items fail.
    """

    def __init__(
        self,
        work: Callable[[list[Item]], Sequence[Result]],
        executor: Executor,
        max_batch_size: int = 32,
        max_queue: int = 256,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        """Create a batcher. If calls to `work` must not overlap, use a single-threaded executor.

        Batchers that share an executor process batches in turn. `on_batch` is called with the size of each batch.
        """
        self._work, self._executor, self._on_batch = work, executor, on_batch
        self._max_batch_size, self._max_queue = max_batch_size, max_queue
        self._queue: deque[_PendingItem[Item, Result]] = deque()
        self._changed = threading.Condition()  # guards the queue
        self._is_scheduled = False  # True if a call to `_process_next_batch` is pending or running
        self._is_closed = False
        self._last_size, self._last_seconds = 0, 0.0  # size and duration of the last batch

    def __len__(self) -> int:
        return len(self._queue)

    def submit(self, items: Sequence[Item]) -> list[Result]:
        """Process items and return their results in the same order.

        Raises:
            ValueError: There are more than `max_queue` items.
            QueueFullError: The queue does not have enough space for the items, or is closed.
            DeadlineExceededError: The deadline of the request has passed. Items that are still waiting are cancelled.
            CancelledError: The queue was closed while the items were waiting.
            Exception: Any exception that `work` raises for one of the items.
        """
        entries: list[_PendingItem[Item, Result]] = [_PendingItem(item, Future()) for item in items]
        with self._changed:
            if self._is_closed:
                raise QueueFullError("the server is stopping; try again later")
            check_queue_capacity(len(items), len(self), self._max_queue, "items")
            self._queue.extend(entries)
            self._changed.notify()
            if entries and not self._is_scheduled:
                self._schedule_next_batch()
        deadline = current_deadline.get()
        _, unfinished = wait([entry.result for entry in entries], deadline.remaining_seconds, FIRST_EXCEPTION)
        try:
            results = [entry.result.result() for entry in entries if entry.result.done()]
            if unfinished:
                raise deadline.make_error()
            return results
        finally:
            self._cancel_unfinished_items(entries)

    def _cancel_unfinished_items(self, entries: Sequence[_PendingItem[Item, Result]]) -> None:
        """Cancel the entries that are still waiting, and remove them from the queue."""
        cancelled = [entry.result.cancel() for entry in entries]
        if not any(cancelled):
            return
        with self._changed:
            waiting = [entry for entry in self._queue if not entry.result.cancelled()]
            self._queue.clear()
            self._queue.extend(waiting)

    def _schedule_next_batch(self) -> None:
        self._is_scheduled = True
        self._executor.submit(self._process_next_batch)

    def _process_next_batch(self) -> None:
        try:
            entries = self._take_next_batch()
            if entries:
                self._on_batch(len(entries))
                start = time.perf_counter()
                self._process_batch(entries)
                self._last_size, self._last_seconds = len(entries), time.perf_counter() - start
        finally:
            with self._changed:
                self._is_scheduled = False
                if self._queue:
                    self._schedule_next_batch()  # runs after the pending batches of other batchers

    def _take_next_batch(self) -> list[_PendingItem[Item, Result]]:
        """Return the next batch. If the queue is smaller than the last batch, first wait for more items."""
        with self._changed:
            self._changed.wait_for(lambda: len(self) >= self._last_size, min(MAX_WAIT, self._last_seconds / 10))
            count = min(len(self), self._max_batch_size)
            entries = [self._queue.popleft() for _ in range(count)]
        return [entry for entry in entries if entry.result.set_running_or_notify_cancel()]

    def _process_batch(self, entries: Sequence[_PendingItem[Item, Result]]) -> None:
        try:
            results = self._work([entry.item for entry in entries])
            if len(results) != len(entries):
                raise RuntimeError(f"`work` returned {len(results)} results for {len(entries)} items")
        except BaseException as error:  # a panic in the tokenizer's Rust code raises a BaseException
            if len(entries) > 1:
                for entry in entries:
                    self._process_batch([entry])
                return
            if not isinstance(error, Exception):
                error = RuntimeError(f"the model failed: {type(error).__name__}: {error}")
            entries[0].result.set_exception(error)
            return
        for entry, result in zip(entries, results, strict=True):
            entry.result.set_result(result)

    def close(self) -> None:
        """Reject new items and cancel all waiting items."""
        with self._changed:
            self._is_closed = True
            for entry in self._queue:
                if entry.result.cancel():
                    entry.result.set_running_or_notify_cancel()  # wakes the caller
            self._queue.clear()


# ---- service


class InferenceService:
    """Model, index, worker threads and metrics of a server. Without an index, the server only computes embeddings."""

    def __init__(
        self,
        model: DualEncoder,
        backend: IndexBackend | None,
        limits: ServerLimits,
        model_thread: ThreadPoolExecutor | None = None,
    ) -> None:
        """
        Args:
            model_thread: Single-threaded executor in which the model was loaded and will run. A different thread
                would create a second OpenMP thread pool. With more OpenMP threads than CPU cores, the model runs at
                half the speed, because the threads do not busy-wait between operations.

        Raises:
            ValueError: The index was built with a different model.
        """
        self.limits = limits
        self.model_name = Path(model.name).resolve().name
        # Batches run in a single thread, because two parallel batches would be slower than two consecutive batches.
        self._model_thread = model_thread or ThreadPoolExecutor(1, "model")
        # The model thread must set its OpenMP thread count before the worker threads set their thread count to one.
        self._model_thread.submit(torch.get_num_threads).result()
        # Embedding requests have their own threads, because searches can take seconds in a large index.
        threads = WORKERS_PER_BATCH_ITEM * limits.batch_size
        self.searchers = WorkerPool(threads, "searches", limits.max_queue)
        self.embedders = WorkerPool(threads, "requests", limits.max_queue)
        # Files are opened in separate threads, because reading an image from a table requires decoding the table.
        self._file_readers = WorkerPool(DECODERS, "files", limits.max_queue)
        self._create_prometheus_metrics()
        self._batchers: list[InferenceBatcher[Any, Any]] = []
        self._decoding = FairSemaphore(DECODERS)
        resources = SearchResources(
            load=partial(load_query_image, max_pixels=limits.max_pixels),
            decoding=self._decoding,
            scanning=FairSemaphore(SCANS),
            max_file_bytes=limits.max_body_bytes,
        )
        model = self._make_batching_model(model)
        self.encoder = QueryEncoder(model, resources.load, resources.decoding)
        self.index: Index | None = None
        if backend is not None:
            self.index = Index(backend, model, resources=resources)
            self.index.encoder  # noqa: B018  (raises an error if the model does not fit the index)

    def _make_batching_model(self, model: DualEncoder) -> DualEncoder:
        """Return a copy of a model whose encoders run in batches in the model thread."""

        @torch.inference_mode()
        def encode_texts(texts: list[str]) -> list[Tensor]:
            return list(model.encode_texts_raw(texts, False).float().cpu())

        @torch.inference_mode()
        @use_onednn_matmul()
        def encode_images(images: list[Any]) -> list[Tensor]:
            return list(model.encode_images_raw(images).float().cpu())

        text_batcher = self._add_batcher("text", encode_texts)
        image_batcher = self._add_batcher("image", encode_images)
        dense = model.dense
        if dense is not None:
            features = torch.inference_mode()(use_onednn_matmul()(dense.features))
            # Images are not batched, because their sizes differ.
            dense_batcher = self._add_batcher("heatmap", lambda items: [features(*item) for item in items])
            dense = dataclasses.replace(
                dense, features=lambda pixels, variant: dense_batcher.submit([(pixels, variant)])[0]
            )

        def submit_in_batches(batcher: InferenceBatcher[Any, Tensor], items: Sequence[Any]) -> Tensor:
            # Items are submitted in several steps, so that the queue has space for other requests.
            step = min(self.limits.batch_size, self.limits.max_queue)
            vectors: list[Tensor] = []
            for start in range(0, len(items), step):
                vectors += batcher.submit(items[start : start + step])
            return torch.stack(vectors)

        return dataclasses.replace(
            model,
            encode_texts_raw=lambda texts, progress: submit_in_batches(text_batcher, texts),
            encode_images_raw=lambda images: submit_in_batches(image_batcher, images),
            dense=dense,
        )

    def _add_batcher(self, kind: str, work: Callable[[list[Any]], Sequence[Any]]) -> InferenceBatcher[Any, Any]:
        on_batch = self.batch_sizes.labels(kind).observe
        batcher = InferenceBatcher(work, self._model_thread, self.limits.batch_size, self.limits.max_queue, on_batch)
        self.queue_size.labels(kind).set_function(batcher.__len__)
        self._batchers.append(batcher)
        return batcher

    def _create_prometheus_metrics(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.request_count = Counter(
            "llm2clip_http_requests", "Number of HTTP requests.", ["method", "path", "status"], registry=registry
        )
        name = "llm2clip_http_request_duration_seconds"
        self.request_duration = Histogram(name, "Duration of HTTP requests in seconds.", ["path"], registry=registry)
        sizes = (1, 2, 4, 8, 16, 32, 64)
        self.batch_sizes = Histogram(
            "llm2clip_batch_size", "Number of items per forward pass.", ["kind"], buckets=sizes, registry=registry
        )
        self.queue_size = Gauge(
            "llm2clip_queue_size", "Number of items waiting for the model.", ["kind"], registry=registry
        )
        index_images = Gauge("llm2clip_index_images", "Number of images in the index.", registry=registry)
        index_images.set_function(self._count_images_for_metrics)

    async def open_original_image(self, hit_id: str) -> tuple[BinaryIO, str]:
        backend = self.require_index().backend

        def open_file() -> tuple[BinaryIO, str]:
            with self._decoding:
                return open_original_image(backend, hit_id)

        return await self._file_readers.run(open_file)

    def close(self) -> None:
        for batcher in self._batchers:
            batcher.close()
        self._model_thread.shutdown(wait=False, cancel_futures=True)
        for pool in (self.searchers, self.embedders, self._file_readers):
            pool.shutdown()

    def require_index(self) -> Index:
        if self.index is None:
            raise NotFoundError("this server has no index. To search, start the server with: llm2clip serve INDEX")
        return self.index

    def count_images(self) -> int:
        """Return the number of images in the index, or 0 without an index. The count may be up to a second old."""
        return 0 if self.index is None else self.index.count()[0]

    def _count_images_for_metrics(self) -> float:
        try:
            return self.count_images()
        except IndexUnavailableError:
            return math.nan
