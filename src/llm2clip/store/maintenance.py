"""Repair, merging, export and import of stores. None of these operations encodes captions."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llm2clip.io_utils import atomic_path, atomic_write_jsonl
from llm2clip.runs.output_folder import FormatVersionError, folder_lock
from llm2clip.store import layout
from llm2clip.store.layout import Shard, StoreError, StoreSpec
from llm2clip.store.store import EmbeddingStore, find_corrupt_shards
from llm2clip.store.writer import StoreWriter, write_manifest

PARQUET_BATCH_ROWS = 8192

# Batch of N rows: keys of shape (N, 16), uint8; N token counts; embeddings of shape (N, embed_dim).
Rows = tuple[np.ndarray, list[int], np.ndarray]

# ---- repair --------------------------------------------------------------------------------------------------------


def repair_store(folder: str | Path, progress: bool = False) -> list[str]:
    """Delete corrupt shards and incomplete files; rewrite the manifest and the index from the intact shards.

    To encode the captions of deleted shards again, run `llm2clip embed`.

    Returns:
        The names of the deleted files.

    Raises:
        StoreError: The manifest and all shards are corrupt, so the encoder is unknown.
        FormatVersionError: The manifest and all shards have a different format version.
        FolderInUseError: Another run is writing to the store.
    """
    folder = Path(folder)
    deleted: list[str] = []
    with folder_lock(folder):
        specs, unreadable = _read_specs(folder)
        try:
            spec = layout.get_store_spec(layout.read_manifest(folder))
        except (StoreError, FormatVersionError) as error:
            if not specs and isinstance(error, FormatVersionError):
                raise
            if not specs:
                raise StoreError(
                    f"{folder} has no intact manifest and no intact shard. Delete it and run `llm2clip embed`"
                ) from error
            spec = max(specs, key=specs.count)  # the spec of most shards
        for number in unreadable:
            deleted.append(_delete_keys(folder, number))
        for number in find_corrupt_shards(folder, layout.read_shards(folder), spec, progress):
            deleted.append(_delete_keys(folder, number))
        deleted += layout.remove_temp_files(folder) + _delete_incomplete_shards(folder)
        for index in folder.glob("index-*.npy"):
            index.unlink()
        write_manifest(folder, *spec)
    return deleted


def _read_specs(folder: Path) -> tuple[list[StoreSpec], list[int]]:
    specs, unreadable = [], []
    for number in layout.list_shard_numbers(folder):
        try:
            specs.append(layout.read_shard_metadata(folder, number)[2])
        except StoreError:
            unreadable.append(number)
    return specs, unreadable


def _delete_keys(folder: Path, number: int) -> str:
    """Delete a shard's keys file, which makes the shard incomplete; return the file's name."""
    path = layout.keys_path(folder, number)
    path.unlink()
    return path.name


def _delete_incomplete_shards(folder: Path) -> list[str]:
    complete = set(layout.list_shard_numbers(folder))
    deleted = []
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(r"(?:embeddings|scales|keys)-(\d{5,})\.(?:npy|parquet)", path.name)
        if match and int(match[1]) not in complete:
            path.unlink()
            deleted.append(path.name)
    return deleted


# ---- merging -------------------------------------------------------------------------------------------------------


def merge_stores(out: str | Path, sources: Sequence[str | Path]) -> EmbeddingStore:
    """Add the shards of `sources` to the store at `out`. Files are hard-linked where possible, and otherwise copied.

    Shards that are already in `out` are skipped, so the merge can be repeated. If several stores contain the same
    caption, lookups return the embedding from the first such store.

    Raises:
        StoreError: A source is corrupt, or the sources differ in encoder, dimension or dtype.
    """
    out, folders = Path(out), [Path(source) for source in sources]
    identity, embed_dim, dtype = _check_sources(folders)
    with folder_lock(out):
        layout.remove_temp_files(out)
        writer = StoreWriter(out, identity, embed_dim, dtype)
        existing = {_compute_shard_checksums(out, shard) for shard in layout.read_shards(out)}
        number = layout.get_next_shard_number(out)
        for folder in folders:
            for shard in layout.read_shards(folder):
                content = _compute_shard_checksums(folder, shard)
                if content not in existing:
                    _link_shard(folder, shard.number, out, number)
                    existing.add(content)
                    number += 1
        refused = {row["caption"]: row for folder in (out, *folders) for row in layout.read_refused_captions(folder)}
        if refused:
            atomic_write_jsonl(out / "refused-merged.jsonl", refused.values())
        writer.finish()
    return EmbeddingStore(out)


def _check_sources(folders: Sequence[Path]) -> StoreSpec:
    if not folders:
        raise StoreError("no stores to merge")
    spec = layout.get_store_spec(layout.read_manifest(folders[0]))
    for folder in folders[1:]:
        layout.check_spec(layout.read_manifest(folder), spec, folder)
    for folder in folders:
        # Check all shards in the folder, because the manifest may be incomplete after an interruption.
        corrupt = find_corrupt_shards(folder, layout.read_shards(folder), spec)
        if corrupt:
            raise StoreError(f"{folder} has corrupt shards: {corrupt}. Run `llm2clip store repair {folder}`")
    return spec


def _compute_shard_checksums(folder: Path, shard: Shard) -> tuple[str, str]:
    """Return the checksums of a shard's embeddings and keys. Shards with the same checksums are duplicates."""
    return shard.sha256, sha256(layout.read_keys(folder, shard).tobytes()).hexdigest()


def _link_shard(source: Path, source_number: int, out: Path, number: int) -> None:
    """Link or copy a shard's files to another store. The keys file is written last: it marks the shard as complete."""
    for file_path in (layout.embeddings_path, layout.scales_path, layout.keys_path):
        file = file_path(source, source_number)
        if not file.is_file():  # only int8 stores have scales files
            continue
        with atomic_path(file_path(out, number)) as temporary:
            try:
                temporary.unlink()  # os.link cannot replace the empty temporary file
                os.link(file, temporary)
            except OSError:
                shutil.copyfile(file, temporary)


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
    fields = [("key", pa.binary(layout.KEY_BYTES)), ("tokens", pa.int32()), ("embedding", embedding_type)]
    metadata = {"identity": json.dumps(store.manifest["identity"]), "embed_dim": str(store.embed_dim)}
    schema = pa.schema(fields, metadata=metadata)
    with atomic_path(file) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for shard in store.shards:
            keys = pq.read_table(layout.keys_path(store.folder, shard.number), page_checksum_verification=True)
            embeddings = store.take(np.arange(shard.start, shard.start + shard.rows)).astype(np.float16)
            column = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), store.embed_dim)
            table = pa.table([keys["key"], keys["tokens"], column], schema=schema)
            writer.write_table(table, row_group_size=PARQUET_BATCH_ROWS)


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
        layout.check_identity(file_identity, identity or file_identity, file)
        identity = file_identity
    elif identity is None:
        raise StoreError(f"{file} does not name the encoder of its embeddings. Specify the encoder with --encoder.path")
    return _fill_store(Path(out), identity, dtype, _iter_parquet_rows(file, source))


def _iter_parquet_rows(file: str | Path, source: pq.ParquetFile) -> Iterator[Rows]:
    try:
        for batch in source.iter_batches(PARQUET_BATCH_ROWS):
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
        if len(values) != layout.KEY_BYTES * len(batch):
            raise StoreError(f"{file}: keys must be the first 16 bytes of the caption's SHA-256 hash")
        keys = np.frombuffer(values, np.uint8).reshape(-1, layout.KEY_BYTES)
    else:
        keys = layout.make_caption_keys([caption.strip() for caption in names.to_pylist()])
    tokens = batch["tokens"].fill_null(0).to_pylist() if "tokens" in columns else [0] * len(batch)
    return keys, tokens, embedding.flatten().to_numpy(zero_copy_only=False).reshape(len(batch), -1)


def _fill_store(out: Path, identity: dict[str, Any], dtype: str, batches: Iterator[Rows]) -> EmbeddingStore:
    """Write each batch as a shard of the store at `out`. Skip batches with the same keys as an existing shard."""
    with folder_lock(out):
        layout.remove_temp_files(out)
        batch = next(batches, None)
        if batch is None:
            raise StoreError("there are no embeddings to import")
        writer = StoreWriter(out, identity, batch[2].shape[1], dtype)
        number = layout.get_next_shard_number(out)
        existing = {sha256(layout.read_keys(out, shard).tobytes()).digest() for shard in layout.read_shards(out)}
        for keys, tokens, embeddings in chain([batch], batches):
            if sha256(keys.tobytes()).digest() not in existing:
                writer.write_keyed(number, keys, tokens, embeddings)
                number += 1
        writer.finish()
    return EmbeddingStore(out)
