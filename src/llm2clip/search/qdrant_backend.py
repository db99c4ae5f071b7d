"""Index backend that uses a Qdrant collection, for data sets that are too large to search on one machine.

Each distinct image content is stored as one point, whose payload lists the images with that content. An additional
point contains the metadata of the index.
"""

from __future__ import annotations

import base64
import fnmatch
import json
import math
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from qdrant_client import QdrantClient, models

from llm2clip.runs.output_folder import check_format_version
from llm2clip.search.backends import (
    FORMAT_VERSION,
    MAX_LOCATIONS,
    NEW_INDEX_ADVICE,
    Filter,
    Hit,
    ImageState,
    IndexedContent,
    IndexedImage,
    path_glob,
)

# The metadata point's id is derived from this key. All other point ids are derived from content hashes.
METADATA_KEY = b"llm2clip"
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
PAGE_SIZE = 1000  # points per request
# Payload fields used by filters. "paths" lists the folders and files that contain an image, and "shorter_side" is a
# length in pixels.
PAYLOAD_INDEXES: dict[str, models.PayloadSchemaType | models.TextIndexParams] = {
    "sources": models.PayloadSchemaType.KEYWORD,
    "names": models.PayloadSchemaType.KEYWORD,
    "paths": models.PayloadSchemaType.KEYWORD,
    "taken": models.PayloadSchemaType.FLOAT,
    "shorter_side": models.PayloadSchemaType.INTEGER,
    "captions": models.TextIndexParams(type=models.TextIndexType.TEXT, phrase_matching=True),
}
WITHOUT_THUMBNAIL = models.PayloadSelectorExclude(exclude=["thumbnail"])


class QdrantBackend:
    """Index backend that uses a Qdrant collection."""

    def __init__(self, client: QdrantClient, collection: str) -> None:
        """
        Args:
            client: Qdrant client for a server, a local folder or an in-memory database.
            collection: Name of the collection. `initialize` creates it if it does not exist.
        """
        self.client, self.collection = client, collection

    @classmethod
    def from_url(cls, url: str, write: bool = False) -> QdrantBackend:
        """Open the collection at `http(s)://HOST:PORT/COLLECTION`.

        The API key is read from the environment variable QDRANT_API_KEY, if it is set.

        Raises:
            ValueError: The URL does not have the form `http(s)://HOST:PORT/COLLECTION`, or the API key would be sent
                without encryption.
            FileNotFoundError: `write` is False, and the collection does not exist or does not contain an index.
            FormatVersionError: The index has another format version.
            OSError: The server does not respond.
        """
        match = re.fullmatch(r"(https?://[^/]+)/([\w-]+)", url)
        if match is None:
            raise ValueError(f"{url}: the URL must have the form http://HOST:6333/COLLECTION")
        server, collection = match.groups()
        api_key = os.environ.get("QDRANT_API_KEY")
        address = urlsplit(server)
        if api_key and address.scheme == "http" and address.hostname not in LOOPBACK_HOSTS:
            raise ValueError(
                f"{server}: QDRANT_API_KEY would be sent over the network without encryption. Use https, forward a "
                f"local port (ssh -L 6333:localhost:6333 {address.hostname}), or unset QDRANT_API_KEY"
            )
        backend = cls(QdrantClient(server, api_key=api_key), collection)
        try:
            exists = backend.client.collection_exists(collection)
        except Exception as error:  # raised by the client or by either of its two HTTP libraries
            raise OSError(f"{server}: {error}") from error
        if not write and not (exists and backend.metadata()):
            raise FileNotFoundError(f"{server} has no llm2clip index in the collection {collection!r}")
        return backend

    # ---- building

    def lock(self) -> AbstractContextManager[None]:
        return nullcontext()  # Qdrant has no locks

    def metadata(self) -> dict[str, Any]:
        if not self.client.collection_exists(self.collection):
            return {}
        points = self.client.retrieve(self.collection, [_make_point_id(METADATA_KEY)], with_payload=True)
        if not points:
            return {}
        payload = points[0].payload or {}
        check_format_version(self.collection, payload.get("format_version"), FORMAT_VERSION, NEW_INDEX_ADVICE)
        return dict(payload["metadata"])

    def initialize(self, metadata: Mapping[str, Any]) -> None:
        dim = int(metadata["embed_dim"])
        if not self.client.collection_exists(self.collection):
            vectors = models.VectorParams(size=dim, distance=models.Distance.DOT, datatype=models.Datatype.FLOAT16)
            self.client.create_collection(self.collection, vectors_config=vectors)
            for field, schema in PAYLOAD_INDEXES.items():
                self.client.create_payload_index(self.collection, field, schema)
        payload = {"format_version": FORMAT_VERSION, "metadata": dict(metadata)}
        point = models.PointStruct(id=_make_point_id(METADATA_KEY), vector=[0.0] * dim, payload=payload)
        self.client.upsert(self.collection, [point])

    def indexed(self, sources: Sequence[str]) -> dict[str, ImageState]:
        conditions: list[Any] = [
            models.FieldCondition(key=key, match=models.MatchAny(any=list(sources))) for key in ("sources", "paths")
        ]
        states = {}
        for point in self._scroll_points(models.Filter(should=conditions, must_not=[_is_metadata_point()])):
            for image in _read_images(point.payload):  # a point matches if any of its images does, so check each image
                if image.source in sources or not set(_list_containing_paths(image)).isdisjoint(sources):
                    states[image.name] = ImageState(image.file_version, image.captions)
        return states

    def existing(self, hashes: Iterable[bytes]) -> set[bytes]:
        hash_of_point = {_make_point_id(digest): digest for digest in hashes}
        point_ids, existing = list(hash_of_point), set()
        for start in range(0, len(point_ids), PAGE_SIZE):
            page = point_ids[start : start + PAGE_SIZE]
            for point in self.client.retrieve(self.collection, page, with_payload=False):
                existing.add(hash_of_point[str(point.id)])
        return existing

    def add(self, contents: Sequence[IndexedContent], images: Sequence[tuple[IndexedImage, bytes]]) -> None:
        new_images: dict[str, list[IndexedImage]] = {}  # keyed by point id
        for image, digest in images:
            new_images.setdefault(_make_point_id(digest), []).append(image)
        # If an image file has changed, the image must move from the old content's point to the new content's point.
        self._remove_images({image.name for image, _ in images}, keep_points=new_images.keys())
        new_points = {}
        for content in contents:
            point = _make_point(content)
            new_points[str(point.id)] = point
        old_images = {}
        old_points = [point_id for point_id in new_images if point_id not in new_points]
        if old_points:
            for record in self.client.retrieve(self.collection, old_points):
                old_images[str(record.id)] = _read_images(record.payload)
        for point_id, added in new_images.items():
            by_name = {image.name: image for image in [*old_images.get(point_id, ()), *added]}
            payload = _make_image_payload(list(by_name.values()))
            if point_id in new_points:
                new_points[point_id].payload = {**(new_points[point_id].payload or {}), **payload}
            else:
                self.client.set_payload(self.collection, payload, points=[point_id])
        if new_points:
            self.client.upsert(self.collection, list(new_points.values()), wait=True)

    def remove(self, names: Sequence[str]) -> None:
        self._remove_images(set(names))

    def finish(self) -> None:
        """Store the number of images and the number of distinct images. Qdrant updates its HNSW graph automatically."""
        images_per_content = [len(_read_images(point.payload)) for point in self._scroll_points()]
        counts = {"images": sum(images_per_content), "contents": len(images_per_content)}
        self.initialize({**self.metadata(), **counts})

    # ---- searching

    def count(self) -> tuple[int, int]:
        metadata = self.metadata()
        return metadata.get("images", 0), metadata.get("contents", 0)

    def duplicates(self, limit: int = 10) -> list[list[str]]:
        groups = []
        for point in self._scroll_points():
            names = sorted(image.name for image in _read_images(point.payload))
            if len(names) > 1:
                groups.append(names)
        groups.sort(key=lambda names: (-len(names), names))
        return groups[:limit]

    def search(self, vector: np.ndarray | None, count: int, image_filter: Filter, offset: int = 0) -> list[Hit]:
        end = limit = offset + count
        while True:
            points = (
                self._query_newest(image_filter, limit)
                if vector is None
                else self._query_nearest(vector, image_filter, limit)
            )
            hits: dict[str, Hit] = {}
            for point in points:
                payload, hit_id = point.payload or {}, str(point.id)
                images = _read_images(payload)
                times = [image.taken for image in images if _matches(image, image_filter)]
                # A point with several images is returned once per image, at the image's time, even if the image does
                # not match the filter.
                if times and (vector is not None or point.order_value <= max(times)):
                    score = None if vector is None else point.score
                    locations = sorted(images, key=lambda image: not _matches(image, image_filter))[:MAX_LOCATIONS]
                    size = payload["width"], payload["height"]
                    hits.setdefault(hit_id, Hit(hit_id, score, tuple(locations), len(images), *size))
            if len(hits) >= end or len(points) < limit:
                return list(hits.values())[offset:end]
            limit *= 4

    def _query_nearest(self, vector: np.ndarray, image_filter: Filter, limit: int) -> list[Any]:
        return self.client.query_points(
            self.collection,
            query=vector.astype(np.float32).tolist(),
            query_filter=_make_qdrant_filter(image_filter),
            limit=limit,
            with_payload=WITHOUT_THUMBNAIL,
        ).points

    def _query_newest(self, image_filter: Filter, limit: int) -> list[Any]:
        return self.client.scroll(
            self.collection,
            scroll_filter=_make_qdrant_filter(image_filter),
            limit=limit,
            order_by=models.OrderBy(key="taken", direction=models.Direction.DESC),
            with_payload=WITHOUT_THUMBNAIL,
        )[0]

    def count_matches(self, image_filter: Filter) -> int:
        condition, path = _make_qdrant_filter(image_filter), image_filter.path
        has_times = image_filter.after is not None or image_filter.before is not None
        if path is None or (_is_exact(path) and not has_times):
            return self.client.count(self.collection, condition).count
        points = self._scroll_points(condition)
        return sum(any(_matches(image, image_filter) for image in _read_images(point.payload)) for point in points)

    def vector(self, hit_id: str) -> np.ndarray | None:
        point = self._retrieve_point(hit_id, with_vector=True)
        return None if point is None else np.array(point.vector, dtype=np.float32)

    def thumbnail(self, hit_id: str) -> bytes | None:
        point = self._retrieve_point(hit_id)
        return None if point is None else base64.b64decode(point.payload["thumbnail"])

    def images(self, hit_id: str) -> tuple[IndexedImage, ...]:
        point = self._retrieve_point(hit_id)
        return () if point is None else _read_images(point.payload)[:MAX_LOCATIONS]

    # ---- points

    def _retrieve_point(self, hit_id: str, with_vector: bool = False) -> Any:
        """Return the point for the given hit id, or None if there is no such point."""
        try:
            point_id = str(uuid.UUID(hit_id))
        except ValueError:
            return None
        points = self.client.retrieve(self.collection, [point_id], with_vectors=with_vector)
        return points[0] if points and "images" in (points[0].payload or {}) else None

    def _scroll_points(self, condition: models.Filter | None = None) -> Iterator[Any]:
        """Yield all points that meet a condition, without their thumbnails.

        Without a condition, yield all points except the metadata point.
        """
        offset = None
        while True:
            points, offset = self.client.scroll(
                self.collection,
                scroll_filter=condition or _make_qdrant_filter(Filter()),
                limit=PAGE_SIZE,
                offset=offset,
                with_payload=WITHOUT_THUMBNAIL,
            )
            yield from points
            if offset is None:
                return

    def _remove_images(self, names: set[str], keep_points: Iterable[str] = ()) -> None:
        """Remove images from their points, and delete points without images unless they are in `keep_points`."""
        kept_ids, sorted_names = set(keep_points), sorted(names)
        for start in range(0, len(sorted_names), PAGE_SIZE):
            page = sorted_names[start : start + PAGE_SIZE]
            condition = models.FieldCondition(key="names", match=models.MatchAny(any=page))
            # List all points before changing any of them, because changes during a scroll could make it skip some.
            for point in list(self._scroll_points(models.Filter(must=[condition]))):
                images = _read_images(point.payload)
                remaining = [image for image in images if image.name not in names]
                if not remaining and str(point.id) not in kept_ids:
                    self.client.delete(self.collection, models.PointIdsList(points=[point.id]))
                elif remaining and len(remaining) < len(images):
                    self.client.set_payload(self.collection, _make_image_payload(remaining), points=[point.id])


def _make_point_id(digest: bytes) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, digest.hex()))


def _make_point(content: IndexedContent) -> models.PointStruct:
    """Return a point for an image content, whose payload does not list any images yet."""
    payload = {
        "thumbnail": base64.b64encode(content.thumbnail).decode(),
        "width": content.width,
        "height": content.height,
        "shorter_side": min(content.width, content.height),
    }
    vector = content.vector.astype(np.float32).tolist()
    return models.PointStruct(id=_make_point_id(content.hash), vector=vector, payload=payload)


def _make_image_payload(images: Sequence[IndexedImage]) -> dict[str, Any]:
    """Return the payload fields that describe the images of a point, including the fields used by filters."""
    return {
        "images": json.dumps([image.to_row() for image in images]),
        "names": [image.name for image in images],
        "sources": sorted({image.source for image in images}),
        "paths": sorted({path for image in images for path in _list_containing_paths(image)}),
        "captions": [caption for image in images for caption in image.captions],
        "taken": [image.taken for image in images],
    }


def _read_images(payload: Any) -> tuple[IndexedImage, ...]:
    """Return the images stored in a point's payload."""
    return tuple(map(IndexedImage.from_row, json.loads((payload or {}).get("images", "[]"))))


def _list_containing_paths(image: IndexedImage) -> list[str]:
    """Return all paths that contain an image: its parent folders, its tar file or table, and its name."""
    slashes = [match.start() for match in re.finditer("/", image.name)]
    folders = [image.name[:position] for position in slashes if position > 0]
    return [*folders, image.container, image.name]


def _matches(image: IndexedImage, image_filter: Filter) -> bool:
    """Return True if an image meets both the path condition and the time conditions.

    Qdrant checks each condition separately, so a point can match even if none of its images meets all conditions. For
    relative paths and wildcards, it finds only candidates.
    """
    pattern = path_glob(image_filter.path or "")
    after = -math.inf if image_filter.after is None else image_filter.after
    before = math.inf if image_filter.before is None else image_filter.before
    is_inside = not pattern or any(fnmatch.fnmatchcase(path, pattern) for path in _list_containing_paths(image))
    return is_inside and after <= image.taken <= before


def _make_path_conditions(path: str) -> list[Any]:
    """Return Qdrant conditions that all images inside a path meet. See `path_glob` for the syntax of the path."""
    path = path.rstrip("/")
    if not path:
        return []
    if _is_exact(path):
        return [models.FieldCondition(key="paths", match=models.MatchValue(value=path))]
    # Qdrant searches for words and not for patterns, so search for the words in all folder names without wildcards.
    names = [name for name in path.split("/") if re.search(r"[^\W_]", name) and not re.search("[*?]", name)]
    return [models.FieldCondition(key="paths", match=models.MatchText(text=name)) for name in names]


def _is_exact(path: str) -> bool:
    """Return True if a path filter is an absolute path without wildcards."""
    return path.startswith("/") and not re.search("[*?]", path)


def _make_qdrant_filter(image_filter: Filter) -> models.Filter:
    """Convert a filter to a Qdrant filter that also excludes the metadata point."""
    conditions = _make_path_conditions(image_filter.path or "")
    if image_filter.caption is not None:
        phrase = models.MatchPhrase(phrase=image_filter.caption)
        conditions.append(models.FieldCondition(key="captions", match=phrase))
    if image_filter.after is not None or image_filter.before is not None:
        time_range = models.Range(gte=image_filter.after, lte=image_filter.before)
        conditions.append(models.FieldCondition(key="taken", range=time_range))
    if image_filter.min_side is not None:
        conditions.append(models.FieldCondition(key="shorter_side", range=models.Range(gte=image_filter.min_side)))
    return models.Filter(must=conditions, must_not=[_is_metadata_point()])


def _is_metadata_point() -> models.HasIdCondition:
    return models.HasIdCondition(has_id=[_make_point_id(METADATA_KEY)])
