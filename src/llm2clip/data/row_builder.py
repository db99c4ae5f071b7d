"""Writing records as rows of a record table. See `table.py`."""

import hashlib
import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from llm2clip.data.blocks import BATCH_ROWS, NO_IMAGE, SCHEMA, encode_name
from llm2clip.data.image_facts import ImageFacts
from llm2clip.data.image_refs import (
    MAX_BATCH_BYTES,
    DatasetImage,
    FileImage,
    ImageRef,
    ParquetImage,
    TarImage,
    compute_content_digest,
)
from llm2clip.data.records import Record

_HALVES = struct.Struct(">QQ")


class RowBuilder:
    """Collects records as rows of a batch. The bytes of images that are only in memory are stored."""

    def __init__(self) -> None:
        self.num_bytes = 0  # size of the stored images
        self._rows: list[tuple[Any, ...]] = []
        self._containers: dict[str, int] = {}

    @property
    def containers(self) -> list[str]:
        """Paths of the containers of all images added so far."""
        return list(self._containers)

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, record: Record, source: str = "", facts: ImageFacts = ImageFacts()) -> None:  # noqa: B008 - frozen
        """Add a record. Rows without an image are merged only within the same `source`."""
        key_high, key_low = hash_merge_key(record, source)
        self._rows.append(
            (
                encode_name(record.id),
                record.id_from_source,
                None if record.split is None else encode_name(record.split),
                record.captions,
                record.short_captions,
                record.long_captions,
                record.phrases,
                *self._encode_image(record.image, facts.digest),
                facts.width,
                facts.height,
                facts.hash,
                key_high,
                key_low,
                hash_draw(record),
            )
        )

    def take_batch(self) -> pa.RecordBatch:
        """Return the collected rows as a batch, and start a new one. The containers remain numbered."""
        columns = zip(*self._rows, strict=True) if self._rows else [()] * len(SCHEMA)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
        self._rows, self.num_bytes = [], 0
        return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)

    def _encode_image(self, image: ImageRef | None, digest: bytes | None) -> tuple[Any, ...]:
        """Return the values of the columns from `image_kind` to `image_data`."""
        if image is None:
            return NO_IMAGE, 0, b"", 0, 0, None, None
        if type(image) is FileImage:
            end = image.path.rfind("/") + 1
            container = self._number_container(image.path[:end])
            return 0, container, encode_name(image.path[end:]), 0, 0, digest, None
        if type(image) is TarImage:
            container = self._number_container(image.path)
            return 1, container, encode_name(image.name), image.offset, image.size, digest, None
        if type(image) is ParquetImage:
            container = self._number_container(image.path)
            digest = bytes.fromhex(image.digest) or None
            return 2, container, encode_name(image.column), image.row, 0, digest, None
        if type(image) is DatasetImage:
            container = self._number_container(json.dumps([image.folder, image.split]))
            digest = bytes.fromhex(image.digest) or None
            return 3, container, encode_name(image.column), image.row, 0, digest, None
        data = image.read()
        self.num_bytes += len(data)
        return 4, 0, encode_name(str(image)), 0, 0, bytes.fromhex(compute_content_digest(data)), data

    def _number_container(self, path: str) -> int:
        return self._containers.setdefault(path, len(self._containers))


def write_rows(file: Path, rows: Iterable[tuple[Record, str, ImageFacts]], metadata: Callable[[], Any]) -> None:
    """Write rows, given as the arguments of `RowBuilder.add`, to an Arrow file that can be mapped into memory.

    `metadata` is called at the end. Its value is saved with the rows; see `read_metadata`.
    """
    builder = RowBuilder()
    with pa.OSFile(str(file), "wb") as stream, pa.ipc.new_file(stream, SCHEMA) as writer:
        for record, source, facts in rows:
            builder.add(record, source, facts)
            if len(builder) >= BATCH_ROWS or builder.num_bytes >= MAX_BATCH_BYTES:
                writer.write_batch(builder.take_batch())
        if len(builder):
            writer.write_batch(builder.take_batch())
        values = {"containers": builder.containers, "summary": metadata()}
        encoded = {name: json.dumps(value) for name, value in values.items()}
        # An Arrow file starts with its schema, so what is known only at the end belongs to an empty last batch.
        writer.write_batch(builder.take_batch(), custom_metadata=encoded)


def hash_merge_key(record: Record, source: str) -> tuple[int, int]:
    """Return a 128-bit hash of what identifies a record: its image or, without an image, its source, split and id.

    Return (0, 0) if nothing identifies the record. Such records are never merged.
    """
    if record.image is not None and record.image.identifies_image:
        return _hash_128(record.image.key)
    if not record.id_from_source:
        return 0, 0
    return _hash_128("\0".join(["id", source, record.split or "", record.id]))


def _hash_128(text: str) -> tuple[int, int]:
    high, low = _HALVES.unpack(hashlib.blake2b(encode_name(text), digest_size=16).digest())
    return high, low


def hash_draw(record: Record) -> int:
    """Return the hash by which held-out images are chosen: the first 64 bits of SHA-256 of the id and the captions."""
    # The captions are included because several records may have the same id.
    text = "\0".join([record.id, *record.texts])
    return int.from_bytes(hashlib.sha256(encode_name(text)).digest()[:8], "big")
