"""Stores to and from other forms: parquet, and the tars of the official LLM2CLIP code.

The official code trains from pairs of tars: `X.tar` with images and, for each sample, a JSON of captions, and
`X_text_embeddings.tar` with the same samples in the same order, whose members `KEY.shortsv_captions` and
`KEY.longsv_captions` are one vector each, raw float32. Its vectors are found by position and by the samples' names;
here the captions themselves are hashed, so that they are found by text from then on.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llm2clip.store.dedup import iter_groups
from llm2clip.store.layout import (
    StoreError,
    atomic_path,
    check_identity,
    keys_of,
    keys_path,
    read_keys,
    read_shards,
    shard_numbers,
)
from llm2clip.store.lock import folder_lock
from llm2clip.store.store import EmbeddingStore
from llm2clip.store.writer import StoreWriter

SHARD = 8192
LARGEST = 64 << 20  # bytes of a member
OFFICIAL = ("shortSV_captions", "longSV_captions")


def to_parquet(store: EmbeddingStore, file: str | Path) -> None:
    """One row for each of the store's: `key`, 16 bytes, the first of the caption's SHA-256; `tokens`; `embedding`, a
    list of float16. The encoder's identity is in the file's metadata.

    Raises:
        StoreError: the store is damaged.
    """
    store.verify()
    kind = pa.list_(pa.float16(), store.width)
    meta = {"identity": json.dumps(store.manifest["identity"]), "width": str(store.width)}
    schema = pa.schema([("key", pa.binary(16)), ("tokens", pa.int32()), ("embedding", kind)], metadata=meta)
    with atomic_path(Path(file)) as tmp, pq.ParquetWriter(tmp, schema) as writer:
        for shard in store.shards:
            known = pq.read_table(keys_path(store.folder, shard.number), page_checksum_verification=True)
            vectors = store.take(np.arange(shard.start, shard.start + shard.rows)).astype(np.float16)
            embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), store.width)
            writer.write_table(
                pa.table([known["key"], known["tokens"], embedding], schema=schema), row_group_size=SHARD
            )


def from_parquet(
    file: str | Path, out: str | Path, identity: dict[str, Any] | None = None, dtype: str = "float16"
) -> EmbeddingStore:
    """A store of the rows of a parquet file, as `to_parquet` writes it, or with a column `caption` in place of `key`.

    Args:
        file: with columns `key` or `caption`, `embedding` and perhaps `tokens`.
        out: folder of the store.
        identity: of the encoder; None takes it from the file's metadata.
        dtype: of the store.

    Raises:
        StoreError: a column is missing or has gaps, the file is of another encoder, or nothing says of which.
    """
    source = pq.ParquetFile(file)
    names, meta = set(source.schema_arrow.names), source.schema_arrow.metadata or {}
    if "embedding" not in names or not names & {"key", "caption"}:
        raise StoreError(f"{file} has columns {sorted(names)}; needed are embedding, and key or caption")
    if b"identity" in meta:
        own = json.loads(meta[b"identity"])
        check_identity(own, identity or own, file)
        identity = own
    elif identity is None:
        raise StoreError(f"{file} does not say which encoder its vectors are of; name it")

    def batches() -> Iterator[pa.RecordBatch]:
        try:
            yield from source.iter_batches(SHARD)
        except pa.ArrowException as error:  # also what pyarrow before 26 says of a null among lists of one length
            raise StoreError(f"{file}: a row without embedding, or a file that is damaged ({error})") from error

    def rows() -> Iterator[tuple[np.ndarray, list[int], np.ndarray]]:
        for batch in batches():
            named = batch["key" if "key" in names else "caption"]
            lengths = pc.unique(pc.list_value_length(batch["embedding"]))
            if batch["embedding"].null_count or named.null_count or len(lengths) != 1:
                raise StoreError(f"{file}: a row without embedding, key or caption, or of another width")
            vectors = batch["embedding"].flatten().to_numpy(zero_copy_only=False).reshape(len(batch), -1)
            if "key" in names:
                whole = b"".join(named.to_pylist())
                if len(whole) != 16 * len(batch):
                    raise StoreError(f"{file}: a key is 16 bytes, the first of the caption's SHA-256")
                keys = np.frombuffer(whole, np.uint8).reshape(-1, 16)
            else:
                keys = keys_of([caption.strip() for caption in named.to_pylist()])
            tokens = batch["tokens"].fill_null(0).to_pylist() if "tokens" in names else [0] * len(batch)
            yield keys, tokens, vectors

    return _filled(Path(out), identity, dtype, rows())


def from_official(
    tars: Sequence[str | Path], out: str | Path, identity: dict[str, Any], dtype: str = "float16"
) -> EmbeddingStore:
    """A store of the official code's tars.

    Args:
        tars: the tars with the samples; beside each `X.tar` lies `X_text_embeddings.tar`.
        out: folder of the store.
        identity: of the encoder that made them.
        dtype: of the store.

    Raises:
        StoreError: the two tars of a pair do not hold the same samples, or a vector is missing.
    """

    def pairs() -> Iterator[tuple[str, np.ndarray]]:
        for tar in map(Path, tars):
            other = tar.with_name(f"{tar.stem}_text_embeddings.tar")
            vectors = _members(other, [name.lower() for name in OFFICIAL])
            for name, parts in _members(tar, ["json"]):
                theirs, found = next(vectors, (None, {}))
                if theirs != name:
                    raise StoreError(f"{other}: {theirs} where {tar} has {name}: not a pair")
                captions = _captions(tar, name, parts)
                for kind in OFFICIAL:
                    if kind in captions:
                        if kind.lower() not in found:
                            raise StoreError(f"{other}: {name} has no {kind.lower()}")
                        yield captions[kind], np.frombuffer(found[kind.lower()], "<f4")
            if (more := next(vectors, None)) is not None:
                raise StoreError(f"{other}: {more[0]}, which {tar} has not: not a pair")

    def rows() -> Iterator[tuple[np.ndarray, list[int], np.ndarray]]:
        for group in iter_groups(pairs(), SHARD):
            fresh: dict[str, np.ndarray] = dict(group)
            if len({len(vector) for vector in fresh.values()}) > 1:
                raise StoreError("the tars' vectors are not all of one width")
            yield keys_of(list(fresh)), [0] * len(fresh), np.stack(list(fresh.values()))

    return _filled(Path(out), identity, dtype, rows())


def to_official(store: EmbeddingStore, tars: Sequence[str | Path]) -> list[Path]:
    """Write beside each `X.tar` an `X_text_embeddings.tar` as the official code reads it, from a store that holds the
    captions of its samples.

    Raises:
        StoreError: the store is damaged, or lacks a caption.
    """
    store.verify()
    written = []
    for tar in map(Path, tars):
        target = tar.with_name(f"{tar.stem}_text_embeddings.tar")
        with atomic_path(target) as tmp, tarfile.open(tmp, "w") as out:
            for name, parts in _members(tar, ["json"]):
                captions = _captions(tar, name, parts)
                for kind in OFFICIAL:
                    if kind in captions:
                        data = store.take(store.rows([captions[kind]]))[0].astype("<f4").tobytes()
                        info = tarfile.TarInfo(f"{name}.{kind.lower()}")
                        info.size = len(data)
                        out.addfile(info, io.BytesIO(data))
        written.append(target)
    return written


def _captions(tar: Path, name: str, parts: dict[str, bytes]) -> dict[str, Any]:
    """A sample's JSON, of which OFFICIAL's are texts or lists that begin with one."""
    try:
        captions: dict[str, Any] = json.loads(parts["json"])
        kinds = {k: (v if isinstance(v, str) else v[0]).strip() for k, v in captions.items() if k in OFFICIAL}
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise StoreError(f"{tar}: {name} has no JSON of captions ({error!r})") from error
    return kinds


def _members(tar: Path, suffixes: Iterable[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """A tar's samples, in its order: what members of one name and different endings hold."""
    wanted, current = set(suffixes), None
    parts: dict[str, bytes] = {}
    with tarfile.open(tar) as source:
        for member in source:
            folder, _, base = member.name.removeprefix("./").rpartition("/")
            name, _, suffix = base.partition(".")
            name = f"{folder}/{name}" if folder else name
            if not member.isfile():
                continue
            if name != current:
                if current is not None:
                    yield current, parts
                current, parts = name, {}
            if suffix.lower() in wanted and member.size > LARGEST:
                raise StoreError(f"{tar}: {member.name} has {member.size:,} bytes; a caption or a vector has fewer")
            if suffix.lower() in wanted and (data := source.extractfile(member)) is not None:
                parts[suffix.lower()] = data.read()
    if current is not None:
        yield current, parts


def _filled(
    out: Path, identity: dict[str, Any], dtype: str, rows: Iterator[tuple[np.ndarray, list[int], np.ndarray]]
) -> EmbeddingStore:
    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out):
        first = next(rows, None)
        if first is None:
            raise StoreError("there is not one vector to take in")
        writer = StoreWriter(out, identity, first[2].shape[1], dtype)
        number = max(shard_numbers(out), default=-1) + 1
        there = {sha256(read_keys(out, shard).tobytes()).digest() for shard in read_shards(out)}
        while first is not None:
            keys, tokens, vectors = first
            if sha256(keys.tobytes()).digest() not in there:
                writer.write_keyed(number, keys, tokens, vectors)
                number += 1
            first = next(rows, None)
        writer.finish()
    return EmbeddingStore(out)
