"""Export of stores to Parquet files, and import from them."""

import json
from collections.abc import Iterator
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llm2clip.io_utils import atomic_path
from llm2clip.runs.output_folder import folder_lock
from llm2clip.store.layout import (
    KEY_BYTES,
    StoreError,
    check_identity,
    get_next_shard_number,
    keys_path,
    make_caption_keys,
    read_keys,
    read_shards,
    remove_temp_files,
)
from llm2clip.store.store import EmbeddingStore
from llm2clip.store.writer import StoreWriter

SHARD_SIZE = 8192

# Batch of N rows: keys of shape (N, 16), uint8; N token counts; embeddings of shape (N, embed_dim).
Rows = tuple[np.ndarray, list[int], np.ndarray]


# ---- Parquet -------------------------------------------------------------------------------------------------------


def export_parquet(store: EmbeddingStore, file: str | Path) -> None:
    """Export a store to a Parquet file.

    The columns are `key` (the first 16 bytes of the caption's SHA-256 hash), `tokens` (the caption's token count) and
    `embedding` (a list of float16 values). The file's metadata contains the encoder's identity.

    Raises:
        StoreError: The store is corrupt.
    """
    store.verify()
    embedding_type = pa.list_(pa.float16(), store.embed_dim)
    fields = [("key", pa.binary(KEY_BYTES)), ("tokens", pa.int32()), ("embedding", embedding_type)]
    metadata = {"identity": json.dumps(store.manifest["identity"]), "embed_dim": str(store.embed_dim)}
    schema = pa.schema(fields, metadata=metadata)
    with atomic_path(file) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for shard in store.shards:
            keys = pq.read_table(keys_path(store.folder, shard.number), page_checksum_verification=True)
            embeddings = store.take(np.arange(shard.start, shard.start + shard.rows)).astype(np.float16)
            column = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), store.embed_dim)
            table = pa.table([keys["key"], keys["tokens"], column], schema=schema)
            writer.write_table(table, row_group_size=SHARD_SIZE)


def import_parquet(
    file: str | Path, out: str | Path, identity: dict[str, Any] | None = None, dtype: str = "float16"
) -> EmbeddingStore:
    """Create a store from a Parquet file.

    Args:
        file: Parquet file. It must have an `embedding` column and either a `key` column (as in `export_parquet`) or a
            `caption` column. A `tokens` column is optional.
        out: Folder of the new store.
        identity: Identity of the encoder. If None, it is read from the file's metadata.
        dtype: Storage dtype: float16, float32 or int8.

    Raises:
        StoreError: A column is missing or contains nulls, or the encoder is unknown or differs from `identity`.
    """
    source = pq.ParquetFile(file)
    columns, metadata = set(source.schema_arrow.names), source.schema_arrow.metadata or {}
    if "embedding" not in columns or not columns & {"key", "caption"}:
        raise StoreError(f"{file} must have an embedding column and a key or caption column (got {sorted(columns)})")
    if b"identity" in metadata:
        file_identity = json.loads(metadata[b"identity"])
        check_identity(file_identity, identity or file_identity, file)
        identity = file_identity
    elif identity is None:
        raise StoreError(f"{file} does not name the encoder of its embeddings. Specify the encoder with --encoder.path")
    return _fill_store(Path(out), identity, dtype, _iter_parquet_rows(file, source))


def _iter_parquet_rows(file: str | Path, source: pq.ParquetFile) -> Iterator[Rows]:
    """Yield the rows of a Parquet file in batches of at most `SHARD_SIZE` rows."""
    try:
        for batch in source.iter_batches(SHARD_SIZE):
            yield _convert_batch(file, batch)
    except pa.ArrowException as error:  # pyarrow < 26 also raises this for nulls in fixed-size lists
        raise StoreError(f"{file} has a row without an embedding, or is corrupt ({error})") from error


def _convert_batch(file: str | Path, batch: pa.RecordBatch) -> Rows:
    columns = batch.schema.names
    names, embedding = batch["key" if "key" in columns else "caption"], batch["embedding"]
    lengths = pc.unique(pc.list_value_length(embedding))
    if embedding.null_count or names.null_count or len(lengths) != 1:
        raise StoreError(
            f"{file} has a row without an embedding, key or caption, or has embeddings of different dimensions"
        )
    if "key" in columns:
        values = b"".join(names.to_pylist())
        if len(values) != KEY_BYTES * len(batch):
            raise StoreError(f"{file}: keys must be the first 16 bytes of the caption's SHA-256 hash")
        keys = np.frombuffer(values, np.uint8).reshape(-1, KEY_BYTES)
    else:
        keys = make_caption_keys([caption.strip() for caption in names.to_pylist()])
    tokens = batch["tokens"].fill_null(0).to_pylist() if "tokens" in columns else [0] * len(batch)
    return keys, tokens, embedding.flatten().to_numpy(zero_copy_only=False).reshape(len(batch), -1)


# ---- writing -------------------------------------------------------------------------------------------------------


def _fill_store(out: Path, identity: dict[str, Any], dtype: str, batches: Iterator[Rows]) -> EmbeddingStore:
    """Write each batch as a shard of the store at `out`. Skip batches with the same keys as an existing shard."""
    with folder_lock(out):
        remove_temp_files(out)
        batch = next(batches, None)
        if batch is None:
            raise StoreError("there are no embeddings to import")
        writer = StoreWriter(out, identity, batch[2].shape[1], dtype)
        number = get_next_shard_number(out)
        existing = {sha256(read_keys(out, shard).tobytes()).digest() for shard in read_shards(out)}
        for keys, tokens, embeddings in chain([batch], batches):
            if sha256(keys.tobytes()).digest() not in existing:
                writer.write_keyed(number, keys, tokens, embeddings)
                number += 1
        writer.finish()
    return EmbeddingStore(out)
