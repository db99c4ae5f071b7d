"""An index in Qdrant, for collections that outgrow one machine: one point for each different content, the pictures that
have it in the payload."""

from __future__ import annotations

import base64
import json
import math
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from qdrant_client import QdrantClient, models

from llm2clip.search.types import Filter, Hit, IndexedContent, IndexedImage, container_path, ref_from_json, ref_to_json

ABOUT = "llm2clip"  # key of the collection's own point, which says what made it
PAGE = 1000


class QdrantBackend:
    """An engine (`entries.Engine`) in a collection of Qdrant's."""

    def __init__(self, client: QdrantClient, collection: str) -> None:
        """
        Args:
            client: of a server, of a folder, or in memory.
            collection: made by `begin` if it is not there.
        """
        self.client, self.collection = client, collection

    @classmethod
    def of_url(cls, url: str, write: bool = False) -> QdrantBackend:
        """At `http(s)://HOST:PORT/COLLECTION`; QDRANT_API_KEY is sent if it is set.

        Raises:
            ValueError: the URL names no collection.
            FileNotFoundError: there is no such collection, and `write` is off.
            OSError: nobody answers.
        """
        import os

        named = re.fullmatch(r"(https?://[^/]+)/([\w-]+)", url)
        if named is None:
            raise ValueError(f"{url}: write it as http://HOST:6333/COLLECTION")
        index = cls(QdrantClient(named[1], api_key=os.environ.get("QDRANT_API_KEY")), named[2])
        try:
            exists = index.client.collection_exists(index.collection)
        except Exception as error:  # the client's own, and those of two libraries below it
            raise OSError(f"{named[1]}: {error}") from error
        if not write and not (exists and index.about()):
            raise FileNotFoundError(f"{named[1]} has no index of pictures in a collection {named[2]}")
        return index

    # -- filling it

    def about(self) -> dict[str, Any]:
        if not self.client.collection_exists(self.collection):
            return {}
        found = self.client.retrieve(self.collection, [_point(ABOUT.encode())], with_payload=True)
        return dict((found[0].payload or {})["about"]) if found else {}

    def begin(self, about: Mapping[str, Any]) -> None:
        if not self.client.collection_exists(self.collection):
            params = models.VectorParams(
                size=about["width"], distance=models.Distance.DOT, datatype=models.Datatype.FLOAT16
            )
            self.client.create_collection(self.collection, vectors_config=params)
            for field, kind in (
                ("sources", models.PayloadSchemaType.KEYWORD),
                ("names", models.PayloadSchemaType.KEYWORD),
                ("within", models.PayloadSchemaType.KEYWORD),
                ("taken", models.PayloadSchemaType.FLOAT),
                ("side", models.PayloadSchemaType.INTEGER),
            ):
                self.client.create_payload_index(self.collection, field, kind)
            words = models.TextIndexParams(type=models.TextIndexType.TEXT, phrase_matching=True)
            self.client.create_payload_index(self.collection, "captions", words)
        nowhere = [0.0] * int(about["width"])
        point = models.PointStruct(id=_point(ABOUT.encode()), vector=nowhere, payload={"about": dict(about)})
        self.client.upsert(self.collection, [point])

    def known(self, sources: Sequence[str]) -> dict[str, tuple[str, tuple[str, ...]]]:
        keys = ("sources", "within")
        asked: list[Any] = [models.FieldCondition(key=key, match=models.MatchAny(any=list(sources))) for key in keys]
        return {
            p.name: (p.stamp, p.captions)
            for payload in self._all(models.Filter(should=asked, must_not=[_not_about()]))
            for p in _pictures(payload)
            if p.source in sources or set(_within(p)) & set(sources)
        }

    def have(self, hashes: Iterable[bytes]) -> set[bytes]:
        by_id = {_point(digest): digest for digest in hashes}
        ids, found = list(by_id), set()
        for start in range(0, len(ids), PAGE):
            points = self.client.retrieve(self.collection, ids[start : start + PAGE], with_payload=False)
            found |= {by_id[str(point.id)] for point in points}
        return found

    def put(self, contents: Sequence[IndexedContent], pictures: Sequence[tuple[IndexedImage, bytes]]) -> None:
        self._take_out({p.name for p, _ in pictures}, keep={digest for _, digest in pictures})
        points = {
            _point(c.hash): models.PointStruct(
                id=_point(c.hash),
                vector=c.vector.astype(np.float32).tolist(),
                payload={
                    "thumbnail": base64.b64encode(c.thumbnail).decode(),
                    "width": c.width,
                    "height": c.height,
                    "side": min(c.width, c.height),
                },
            )
            for c in contents
        }
        by_point: dict[str, list[IndexedImage]] = {}
        for picture, digest in pictures:
            by_point.setdefault(_point(digest), []).append(picture)
        old = [i for i in by_point if i not in points]
        held = (
            {str(p.id): _pictures(p.payload or {}) for p in self.client.retrieve(self.collection, old)} if old else {}
        )
        for i, some in by_point.items():
            named = {p.name: p for p in [*held.get(i, ()), *some]}
            if i in points:
                points[i].payload = {**(points[i].payload or {}), **_payload(list(named.values()))}
            else:
                self.client.set_payload(self.collection, _payload(list(named.values())), points=[i])
        if points:
            self.client.upsert(self.collection, list(points.values()), wait=True)

    def forget(self, names: Sequence[str]) -> None:
        self._take_out(set(names))

    def finish(self) -> None:
        """Qdrant keeps its own graph; what is counted here is how many pictures there are."""
        sizes = [len(_pictures(payload)) for payload in self._all(None)]
        self.begin({**self.about(), "pictures": sum(sizes), "contents": len(sizes)})

    # -- asking it

    def count(self) -> tuple[int, int]:
        about = self.about()
        return about.get("pictures", 0), about.get("contents", 0)

    def copies(self, limit: int = 10) -> list[list[str]]:
        groups = [sorted(p.name for p in _pictures(payload)) for payload in self._all(None)]
        return sorted((g for g in groups if len(g) > 1), key=lambda g: (-len(g), g))[:limit]

    def search(self, vector: np.ndarray, count: int, only: Filter) -> list[Hit]:
        found = self.client.query_points(
            self.collection,
            query=vector.astype(np.float32).tolist(),
            query_filter=_filter(only),
            limit=count,
            with_payload=models.PayloadSelectorExclude(exclude=["thumbnail"]),
        )
        return [
            Hit(str(p.id), p.score, _pictures(p.payload), p.payload["width"], p.payload["height"])
            for p in found.points
            if p.payload and any(_lets_through(only, picture) for picture in _pictures(p.payload))
        ]

    def vector(self, hit: str) -> np.ndarray | None:
        point = self._one(hit, vector=True)
        return None if point is None else np.array(point.vector, dtype=np.float32)

    def thumbnail(self, hit: str) -> bytes | None:
        point = self._one(hit)
        return None if point is None else base64.b64decode(point.payload["thumbnail"])

    def pictures(self, hit: str) -> tuple[IndexedImage, ...]:
        point = self._one(hit)
        return () if point is None else _pictures(point.payload)

    # -- points

    def _one(self, hit: str, vector: bool = False) -> Any:
        """The point of a hit, None where there is none."""
        try:
            name = str(uuid.UUID(hit))
        except ValueError:
            return None
        found = self.client.retrieve(self.collection, [name], with_vectors=vector)
        return found[0] if found and "pictures" in (found[0].payload or {}) else None

    def _all(self, asked: models.Filter | None, points: bool = False) -> Iterator[Any]:
        """Payloads (or points) of all contents that a filter lets through."""
        offset = None
        while True:
            found, offset = self.client.scroll(
                self.collection,
                scroll_filter=asked or _filter(Filter()),
                limit=PAGE,
                offset=offset,
                with_payload=models.PayloadSelectorExclude(exclude=["thumbnail"]),
            )
            yield from (point if points else point.payload for point in found)
            if offset is None:
                return

    def _take_out(self, names: set[str], keep: Iterable[bytes] = ()) -> None:
        """Pictures out of their points, and points without pictures out of the collection, but for some."""
        kept, sought = {_point(digest) for digest in keep}, sorted(names)
        for start in range(0, len(sought), PAGE):
            asked = models.FieldCondition(key="names", match=models.MatchAny(any=sought[start : start + PAGE]))
            self._take_out_of(list(self._all(models.Filter(must=[asked]), points=True)), names, kept)

    def _take_out_of(self, points: Sequence[Any], names: set[str], kept: set[str]) -> None:
        for point in points:
            some = _pictures(point.payload)
            left = [p for p in some if p.name not in names]
            if left:
                if len(left) < len(some):
                    self.client.set_payload(self.collection, _payload(left), points=[point.id])
            elif str(point.id) not in kept:
                self.client.delete(self.collection, models.PointIdsList(points=[point.id]))


def _point(digest: bytes) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, digest.hex()))


def _payload(pictures: Sequence[IndexedImage]) -> dict[str, Any]:
    """What is kept of a content's pictures, and what filters look at."""
    fields = [[p.name, ref_to_json(p.place), p.source, p.stamp, list(p.captions), p.taken] for p in pictures]
    return {
        "pictures": json.dumps(fields),
        "names": [p.name for p in pictures],
        "sources": sorted({p.source for p in pictures}),
        "within": sorted({part for p in pictures for part in _within(p)}),
        "captions": [caption for p in pictures for caption in p.captions],
        "taken": [p.taken for p in pictures],
    }


def _pictures(payload: Any) -> tuple[IndexedImage, ...]:
    return tuple(
        IndexedImage(name, ref_from_json(place), source, stamp, tuple(captions), taken)
        for name, place, source, stamp, captions, taken in json.loads(payload.get("pictures", "[]"))
    )


def _within(picture: IndexedImage) -> list[str]:
    """All folders, tars and files that a picture lies in, and itself."""
    name = picture.name
    return [name[: m.start()] for m in re.finditer("/", name) if m.start()] + [
        container_path(name, picture.place),
        name,
    ]


def _lets_through(only: Filter, picture: IndexedImage) -> bool:
    """Whether one picture meets what Qdrant asks of all copies of a content together."""
    under = only.under.rstrip("/") if only.under is not None else ""
    after = -math.inf if only.after is None else only.after
    before = math.inf if only.before is None else only.before
    return (not under or under in _within(picture)) and after <= picture.taken <= before


def _filter(only: Filter) -> models.Filter:
    must: list[Any] = []
    if only.under is not None and only.under.rstrip("/"):
        must.append(models.FieldCondition(key="within", match=models.MatchValue(value=only.under.rstrip("/"))))
    if only.caption is not None:
        must.append(models.FieldCondition(key="captions", match=models.MatchPhrase(phrase=only.caption)))
    if only.after is not None or only.before is not None:
        must.append(models.FieldCondition(key="taken", range=models.Range(gte=only.after, lte=only.before)))
    if only.larger is not None:
        must.append(models.FieldCondition(key="side", range=models.Range(gte=only.larger)))
    return models.Filter(must=must, must_not=[_not_about()])


def _not_about() -> models.HasIdCondition:
    return models.HasIdCondition(has_id=[_point(ABOUT.encode())])
