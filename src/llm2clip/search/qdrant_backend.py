"""Qdrant index backend, for data sets that are too large to search on one machine.

Each distinct image content is stored as one point, whose payload lists the images with that content. Two additional
points store the index metadata and the calibration of relevance.

Path filters must be absolute paths without wildcards, and caption filters match complete words. Without a query, hits
are ordered by the latest capture time of their images, including images that do not match the filter. Hits are ranked
by their vectors only: words of the query and recognised texts are not supported.
"""

from __future__ import annotations

import base64
import functools
import itertools
import os
import re
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any, ParamSpec, TypeVar
from urllib.parse import urlsplit

import numpy as np
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from llm2clip.runs.output_folder import check_format_version
from llm2clip.search.backends import (
    FORMAT_VERSION,
    LOOPBACK_HOSTS,
    MAX_LOCATIONS,
    NEW_INDEX_ADVICE,
    Filter,
    Hit,
    ImageState,
    IndexedContent,
    IndexedImage,
    IndexUnavailableError,
    ref_from_json,
    ref_to_json,
)

# The ids of the metadata point and the calibration point are derived from these keys. All other point ids are derived
# from content hashes.
METADATA_KEY, CALIBRATION_KEY = b"llm2clip", b"llm2clip calibration"
PAGE_SIZE = 1000  # number of points per request
# Payload fields for filtering and sorting. "paths" lists the folders and files that contain an image, "latest" is the
# maximum of "taken" over a point's images, and "shorter_side" is in pixels.
PAYLOAD_INDEXES: dict[str, models.PayloadSchemaType | models.TextIndexParams] = {
    "images[].name": models.PayloadSchemaType.KEYWORD,
    "images[].source": models.PayloadSchemaType.KEYWORD,
    "images[].paths": models.PayloadSchemaType.KEYWORD,
    "images[].captions": models.TextIndexParams(type=models.TextIndexType.TEXT, phrase_matching=True),
    "images[].taken": models.PayloadSchemaType.FLOAT,
    "latest": models.PayloadSchemaType.FLOAT,
    "shorter_side": models.PayloadSchemaType.INTEGER,
}
UNAVAILABLE_STATUSES = (502, 503, 504)
WITHOUT_THUMBNAIL = models.PayloadSelectorExclude(exclude=["thumbnail"])
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def _convert_errors(method: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Make a method raise IndexUnavailableError if the server does not respond or reports that it is unavailable."""

    @functools.wraps(method)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return method(*args, **kwargs)
        except ResponseHandlingException as error:
            raise IndexUnavailableError(f"Qdrant does not respond: {error.source}") from error
        except UnexpectedResponse as error:
            if error.status_code not in UNAVAILABLE_STATUSES:
                raise
            raise IndexUnavailableError(f"Qdrant is unavailable: {error}") from error

    return call


def open_index(location: str, write: bool, approximate_above: int | None) -> QdrantBackend:
    """Open the collection at `qdrant+http(s)://HOST:PORT/COLLECTION`. Qdrant decides when to search approximately."""
    return QdrantBackend.from_url(location.removeprefix("qdrant+"), write)


class QdrantBackend:
    """Index backend based on a Qdrant collection."""

    def __init__(self, client: QdrantClient, collection: str) -> None:
        """
        Args:
            client: Qdrant client for a server, local folder or in-memory database.
            collection: Collection name. `initialize` creates the collection if it does not exist.
        """
        self.client, self.collection = client, collection

    @classmethod
    def from_url(cls, url: str, write: bool = False) -> QdrantBackend:
        """Open the collection at `http(s)://HOST:PORT/COLLECTION`.

        The API key is read from the environment variable QDRANT_API_KEY, if set.

        Raises:
            ValueError: The URL does not have the form `http(s)://HOST:PORT/COLLECTION`, or the API key would be sent
                unencrypted.
            FileNotFoundError: `write` is False, and the collection does not exist or does not contain an index.
            FormatVersionError: The index has a different format version.
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
                f"{server}: QDRANT_API_KEY would be sent over the network unencrypted. Use https, forward a local port "
                f"(ssh -L 6333:localhost:6333 {address.hostname}), or unset QDRANT_API_KEY"
            )
        backend = cls(QdrantClient(server, api_key=api_key), collection)
        try:
            exists = backend.client.collection_exists(collection)
        except Exception as error:  # raised by the client or one of its two HTTP libraries
            raise OSError(f"{server}: {error}") from error
        if not write and not (exists and backend.metadata()):
            raise FileNotFoundError(f"{server} has no llm2clip index in the collection {collection!r}")
        return backend

    # ---- building

    def lock(self) -> AbstractContextManager[None]:
        return nullcontext()  # Qdrant has no locks

    @_convert_errors
    def metadata(self) -> dict[str, Any]:
        if not self.client.collection_exists(self.collection):
            return {}
        points = self.client.retrieve(self.collection, [_make_point_id(METADATA_KEY)], with_payload=True)
        if not points:
            return {}
        payload = points[0].payload or {}
        check_format_version(self.collection, payload.get("format_version"), FORMAT_VERSION, NEW_INDEX_ADVICE)
        return dict(payload["metadata"])

    @_convert_errors
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

    def prepare_words(self) -> None:
        pass  # words are not searched

    @_convert_errors
    def indexed(self, sources: Sequence[str]) -> dict[str, ImageState]:
        match = models.MatchAny(any=list(sources))
        conditions: list[Any] = [
            models.FieldCondition(key=f"images[].{key}", match=match) for key in ("source", "paths")
        ]
        states = {}
        for point in self._scroll_points(models.Filter(should=conditions)):
            for image in _read_images(point.payload):  # a point can match because of a single image, so check each one
                if image.source in sources or not set(_list_containing_paths(image)).isdisjoint(sources):
                    states[image.name] = ImageState(image.file_version, image.captions)
        return states

    @_convert_errors
    def existing(self, hashes: Iterable[bytes]) -> set[bytes]:
        hash_of_point = {_make_point_id(digest): digest for digest in hashes}
        points = self.client.retrieve(self.collection, list(hash_of_point), with_payload=False)
        return {hash_of_point[str(point.id)] for point in points}

    @_convert_errors
    def add(self, contents: Sequence[IndexedContent], images: Sequence[tuple[IndexedImage, bytes]]) -> None:
        new_images: dict[str, list[IndexedImage]] = {}  # keyed by point id
        for image, digest in images:
            new_images.setdefault(_make_point_id(digest), []).append(image)
        # Images whose files have changed must move from the old content's point to the new content's point.
        self.remove([image.name for image, _ in images], keep_points=new_images.keys())
        new_points = []
        for content in contents:
            point_id = _make_point_id(content.hash)
            new_points.append(_make_point(point_id, content, new_images.pop(point_id, [])))
        if new_points:
            self.client.upsert(self.collection, new_points, wait=True)
        if new_images:
            for point in self.client.retrieve(self.collection, list(new_images)):
                by_name = {image.name: image for image in (*_read_images(point.payload), *new_images[str(point.id)])}
                payload = _make_image_payload(list(by_name.values()))
                self.client.set_payload(self.collection, payload, points=[point.id])

    @_convert_errors
    def remove(self, names: Sequence[str], keep_points: Collection[str] = ()) -> None:
        # Points that no longer have images are deleted, unless they are in `keep_points`.
        for start in range(0, len(names), PAGE_SIZE):
            page = set(names[start : start + PAGE_SIZE])
            condition = models.FieldCondition(key="images[].name", match=models.MatchAny(any=list(page)))
            # List all points before changing any, because changes while scrolling could cause points to be skipped.
            for point in list(self._scroll_points(models.Filter(must=[condition]))):
                remaining = [image for image in _read_images(point.payload) if image.name not in page]
                if remaining:
                    self.client.set_payload(self.collection, _make_image_payload(remaining), points=[point.id])
                elif str(point.id) not in keep_points:
                    self.client.delete(self.collection, models.PointIdsList(points=[point.id]))

    def contents_without_text(self, sources: Sequence[str]) -> list[tuple[bytes, IndexedImage]]:
        return []

    def set_texts(self, texts: Mapping[bytes, str]) -> None:
        raise ValueError(f"{self.collection}: recognised texts (--ocr) cannot be stored in Qdrant")

    @_convert_errors
    def finish(self) -> None:
        """Store the image counts. Qdrant updates its HNSW graph automatically."""
        images_per_content = [len(_read_images(point.payload)) for point in self._scroll_points()]
        counts = {"images": sum(images_per_content), "contents": len(images_per_content)}
        self.initialize({**self.metadata(), **counts})

    # ---- searching

    @_convert_errors
    def count(self) -> tuple[int, int]:
        metadata = self.metadata()
        return metadata.get("images", 0), metadata.get("contents", 0)

    @_convert_errors
    def duplicates(self, limit: int = 10) -> list[list[str]]:
        groups = []
        for point in self._scroll_points():
            names = sorted(image.name for image in _read_images(point.payload))
            if len(names) > 1:
                groups.append(names)
        groups.sort(key=lambda names: (-len(names), names))
        return groups[:limit]

    @_convert_errors
    def search(
        self,
        vector: np.ndarray | None,
        count: int,
        image_filter: Filter,
        offset: int = 0,
        words: Sequence[str] = (),
    ) -> list[Hit]:
        condition = _make_qdrant_filter(image_filter)
        if vector is not None:
            points: list[Any] = self.client.query_points(
                self.collection,
                query=vector.astype(np.float32).tolist(),
                query_filter=condition,
                limit=count,
                offset=offset,
                with_payload=WITHOUT_THUMBNAIL,
            ).points
        else:
            points, _ = self.client.scroll(  # scroll does not support order_by together with an offset
                self.collection,
                scroll_filter=condition,
                limit=offset + count,
                order_by=models.OrderBy(key="latest", direction=models.Direction.DESC),
                with_payload=WITHOUT_THUMBNAIL,
            )
            points = points[offset:]
        hits = []
        for point in points:
            images = sorted(
                _read_images(point.payload), key=lambda image: not _matches_path_and_time(image, image_filter)
            )
            score = None if vector is None else point.score
            locations = tuple(images[:MAX_LOCATIONS])
            width, height = point.payload["width"], point.payload["height"]
            hits.append(Hit(str(point.id), score, locations, len(images), width, height))
        return hits

    @_convert_errors
    def count_matches(self, image_filter: Filter) -> int:
        return self.client.count(self.collection, _make_qdrant_filter(image_filter)).count

    @_convert_errors
    def vector(self, hit_id: str) -> np.ndarray | None:
        point = self._retrieve_point(hit_id, with_vector=True)
        return None if point is None else np.array(point.vector, dtype=np.float32)

    @_convert_errors
    def vectors(self, hit_ids: Sequence[str]) -> dict[str, np.ndarray]:
        vectors = {}
        for start in range(0, len(hit_ids), PAGE_SIZE):
            page = list(hit_ids[start : start + PAGE_SIZE])
            for point in self.client.retrieve(self.collection, page, with_payload=False, with_vectors=True):
                vectors[str(point.id)] = np.array(point.vector, dtype=np.float32)
        return {hit_id: vectors[hit_id] for hit_id in hit_ids if hit_id in vectors}

    @_convert_errors
    def sample_ids(self, count: int) -> list[str]:
        # Point ids are hashes, and points are listed by id, so the first points are a random sample.
        points = itertools.islice(self._scroll_points(), count)
        return [str(point.id) for point in points]

    def newest_ids(self, count: int) -> list[str]:
        return [hit.id for hit in self.search(None, count, Filter())]

    @_convert_errors
    def save_calibration(self, data: bytes) -> None:
        dim = int(self.metadata()["embed_dim"])
        payload = {"calibration": base64.b64encode(data).decode()}
        point = models.PointStruct(id=_make_point_id(CALIBRATION_KEY), vector=[0.0] * dim, payload=payload)
        self.client.upsert(self.collection, [point], wait=True)

    @_convert_errors
    def load_calibration(self) -> bytes | None:
        points = self.client.retrieve(self.collection, [_make_point_id(CALIBRATION_KEY)], with_payload=True)
        return base64.b64decode((points[0].payload or {})["calibration"]) if points else None

    @_convert_errors
    def thumbnail(self, hit_id: str) -> bytes | None:
        point = self._retrieve_point(hit_id)
        return None if point is None else base64.b64decode(point.payload["thumbnail"])

    @_convert_errors
    def images(self, hit_id: str) -> tuple[IndexedImage, ...]:
        point = self._retrieve_point(hit_id)
        return () if point is None else _read_images(point.payload)[:MAX_LOCATIONS]

    # ---- points

    def _retrieve_point(self, hit_id: str, with_vector: bool = False) -> Any:
        """Return the point with the given hit id, or None if there is no such point."""
        try:
            point_id = str(uuid.UUID(hit_id))
        except ValueError:
            return None
        points = self.client.retrieve(self.collection, [point_id], with_vectors=with_vector)
        return points[0] if points and "images" in (points[0].payload or {}) else None

    def _scroll_points(self, condition: models.Filter | None = None) -> Iterator[Any]:
        """Yield all points that match a condition (default: all but the metadata point), without thumbnails."""
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


def _make_point_id(digest: bytes) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, digest.hex()))


def _make_point(point_id: str, content: IndexedContent, images: Sequence[IndexedImage]) -> models.PointStruct:
    payload = {
        **_make_image_payload(images),
        "thumbnail": base64.b64encode(content.thumbnail).decode(),
        "width": content.width,
        "height": content.height,
        "shorter_side": min(content.width, content.height),
    }
    return models.PointStruct(id=point_id, vector=content.vector.astype(np.float32).tolist(), payload=payload)


def _make_image_payload(images: Sequence[IndexedImage]) -> dict[str, Any]:
    """Return the payload fields that describe the images of a point."""
    rows = []
    for image in images:
        rows.append({**asdict(image), "ref": ref_to_json(image.ref), "paths": _list_containing_paths(image)})
    return {"images": rows, "latest": max(image.taken for image in images)}


def _read_images(payload: Any) -> tuple[IndexedImage, ...]:
    """Return the images stored in a point's payload."""
    images = []
    for row in payload["images"]:
        fields = {**row, "ref": ref_from_json(row["ref"]), "captions": tuple(row["captions"])}
        del fields["paths"]
        images.append(IndexedImage(**fields))
    return tuple(images)


def _list_containing_paths(image: IndexedImage) -> list[str]:
    """Return the paths of all folders and files that contain an image, and the image's name."""
    slashes = [match.start() for match in re.finditer("/", image.name)]
    folders = [image.name[:position] for position in slashes if position > 0]
    return [*folders, image.container, image.name]


def _matches_path_and_time(image: IndexedImage, image_filter: Filter) -> bool:
    """Return True if an image matches the path and time conditions. Such images come first in a hit."""
    path, after, before = image_filter.path, image_filter.after, image_filter.before
    is_inside = not path or path.rstrip("/") in ("", *_list_containing_paths(image))
    return is_inside and (after is None or after <= image.taken) and (before is None or image.taken <= before)


def _make_qdrant_filter(image_filter: Filter) -> models.Filter:
    """Convert a filter to a Qdrant filter that also excludes the metadata and calibration points.

    Raise ValueError if the path is relative or contains wildcards.
    """
    conditions: list[Any] = []  # conditions that must all be met by a single image
    path = image_filter.path
    if path is not None:
        if not path.startswith("/") or re.search("[*?]", path):
            raise ValueError(f"{path}: with Qdrant, a path filter must be an absolute path without wildcards")
        if path.rstrip("/"):
            conditions.append(models.FieldCondition(key="paths", match=models.MatchValue(value=path.rstrip("/"))))
    if image_filter.after is not None or image_filter.before is not None:
        time_range = models.Range(gte=image_filter.after, lte=image_filter.before)
        conditions.append(models.FieldCondition(key="taken", range=time_range))
    must: list[Any] = []
    if conditions:
        nested = models.Nested(key="images", filter=models.Filter(must=conditions))
        must.append(models.NestedCondition(nested=nested))
    if image_filter.caption is not None:
        phrase = models.MatchPhrase(phrase=image_filter.caption)
        must.append(models.FieldCondition(key="images[].captions", match=phrase))
    if image_filter.min_side is not None:
        must.append(models.FieldCondition(key="shorter_side", range=models.Range(gte=image_filter.min_side)))
    return models.Filter(must=must, must_not=[_make_internal_points_condition()])


def _make_internal_points_condition() -> models.HasIdCondition:
    return models.HasIdCondition(has_id=[_make_point_id(METADATA_KEY), _make_point_id(CALIBRATION_KEY)])
