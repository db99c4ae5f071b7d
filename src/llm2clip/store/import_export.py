"""Store export and import, as Parquet files or as tar files for the LLM2CLIP authors' code.

The authors' code trains on pairs of webdataset tar files. For each sample, `X.tar` contains an image and a JSON file
with captions. `X_text_embeddings.tar` contains the same samples in the same order. Its members `KEY.shortsv_captions`
and `KEY.longsv_captions` each contain one embedding as raw float32 values. The authors' code looks up embeddings by
sample position and name, whereas a store looks them up by a hash of the caption.
"""

import io
import json
import os
import tarfile
from collections.abc import Collection, Iterator, Sequence
from hashlib import sha256
from itertools import chain, groupby
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
    iter_chunks,
    keys_path,
    make_caption_keys,
    read_keys,
    read_shards,
    remove_temp_files,
)
from llm2clip.store.store import EmbeddingStore
from llm2clip.store.writer import StoreWriter

SHARD_SIZE = 8192
MAX_MEMBER_BYTES = 64 << 20  # size limit for tar members that are read into memory
CAPTION_FIELDS = ("shortSV_captions", "longSV_captions")  # field names in the JSON files of the authors' code

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


# ---- tar files of the authors' code --------------------------------------------------------------------------------


def export_official_tars(store: EmbeddingStore, tars: Sequence[str | Path]) -> list[Path]:
    """Write `X_text_embeddings.tar` next to each sample file `X.tar`; return the paths of the new files.

    Raises:
        StoreError: The store is corrupt, a sample's caption is not in the store, or an output file already exists.
            Existing files are not overwritten, because the authors' code may have written them.
    """
    store.verify()
    targets = [_get_embeddings_tar(Path(tar)) for tar in tars]
    existing = [str(target) for target in targets if os.path.lexists(target)]
    if existing:
        raise StoreError(f"output files already exist: {', '.join(existing[:3])}. Delete them, or pass other --tars")
    for tar, target in zip(map(Path, tars), targets, strict=True):
        with atomic_path(target) as temporary, tarfile.open(temporary, "w") as stream:
            for name, members in _read_samples(tar, ["json"]):
                for field, caption in _extract_sample_captions(tar, name, members).items():
                    data = store.take(store.find_rows([caption])).astype("<f4").tobytes()
                    member = tarfile.TarInfo(f"{name}.{field.lower()}")
                    member.size = len(data)
                    stream.addfile(member, io.BytesIO(data))
    return targets


def import_official_tars(
    tars: Sequence[str | Path], out: str | Path, identity: dict[str, Any], dtype: str = "float16"
) -> EmbeddingStore:
    """Create a store from tar files in the format of the authors' code.

    Args:
        tars: Tar files with samples. Each `X.tar` must have a corresponding `X_text_embeddings.tar` in the same folder.
        out: Folder of the new store.
        identity: Identity of the encoder that created the embeddings.
        dtype: Storage dtype: float16, float32 or int8.

    Raises:
        StoreError: The two tar files of a pair contain different samples, or an embedding is missing.
    """
    return _fill_store(Path(out), identity, dtype, _iter_official_batches([Path(tar) for tar in tars]))


def _iter_official_batches(tars: Sequence[Path]) -> Iterator[Rows]:
    """Yield the rows of all captions in batches without duplicate captions. All token counts are 0."""
    pairs = (pair for tar in tars for pair in _iter_captions_with_embeddings(tar))
    for chunk in iter_chunks(pairs, SHARD_SIZE):
        embeddings = dict(chunk)
        if len({len(embedding) for embedding in embeddings.values()}) > 1:
            raise StoreError("the tar files contain embeddings of different dimensions")
        yield make_caption_keys(list(embeddings)), [0] * len(embeddings), np.stack(list(embeddings.values()))


def _iter_captions_with_embeddings(tar: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each caption in a tar file with its embedding from the corresponding embeddings file."""
    other = _get_embeddings_tar(tar)
    embedding_samples = _read_samples(other, [field.lower() for field in CAPTION_FIELDS])
    for name, members in _read_samples(tar, ["json"]):
        other_name, embeddings = next(embedding_samples, (None, {}))
        if other_name != name:
            raise StoreError(f"{other} has sample {other_name} where {tar} has {name}: the two tar files do not match")
        for field, caption in _extract_sample_captions(tar, name, members).items():
            if field.lower() not in embeddings:
                raise StoreError(f"{other}: sample {name} has no member {field.lower()}")
            yield caption, np.frombuffer(embeddings[field.lower()], "<f4")
    extra = next(embedding_samples, None)
    if extra is not None:
        raise StoreError(f"{other} has sample {extra[0]}, which is not in {tar}: the two tar files do not match")


def _get_embeddings_tar(tar: Path) -> Path:
    return tar.with_name(f"{tar.stem}_text_embeddings.tar")


def _extract_sample_captions(tar: Path, name: str, members: dict[str, bytes]) -> dict[str, str]:
    """Return a sample's captions as a dict {field name: caption}. If a field contains a list, use its first item."""
    try:
        fields = json.loads(members["json"])
        captions = {}
        for field in CAPTION_FIELDS:
            if field in fields:
                value = fields[field]
                captions[field] = (value if isinstance(value, str) else value[0]).strip()
        return captions
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise StoreError(f"{tar}: sample {name} has no valid JSON file with captions ({error!r})") from error


def _read_samples(tar: Path, suffixes: Collection[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield (name, {suffix: contents}) for each sample in a webdataset tar file, in file order."""
    with tarfile.open(tar) as stream:
        files = (member for member in stream if member.isfile())
        for name, members in groupby(files, lambda member: _split_member_name(member)[0]):
            contents = {}
            for member in members:
                suffix = _split_member_name(member)[1].lower()
                data = stream.extractfile(member)
                if suffix not in suffixes or data is None:
                    continue
                if member.size > MAX_MEMBER_BYTES:
                    raise StoreError(
                        f"{tar}: {member.name} is too large for a caption or embedding file ({member.size:,} bytes)"
                    )
                contents[suffix] = data.read()
            yield name, contents


def _split_member_name(member: tarfile.TarInfo) -> tuple[str, str]:
    """Split the name of a tar member at the first dot after the last slash."""
    folder, slash, base = member.name.removeprefix("./").rpartition("/")
    name, _, suffix = base.partition(".")
    return folder + slash + name, suffix


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
