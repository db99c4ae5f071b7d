"""Writer for store shards, and for the manifest and key index that summarize them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm2clip.io_utils import atomic_path, atomic_write_text
from llm2clip.models.hub.fingerprint import fingerprint
from llm2clip.runs.output_folder import MANIFEST
from llm2clip.store.key_index import build_key_index
from llm2clip.store.layout import (
    DTYPES,
    FORMAT_VERSION,
    KEY_BYTES,
    StoreError,
    caption_keys,
    check_spec,
    embeddings_path,
    index_path,
    keys_path,
    read_keys,
    read_manifest,
    read_shards,
    scales_path,
    shard_checksum,
    shard_numbers,
)


class StoreWriter:
    """Writer that adds shards to a store.

    Several processes may write shards with distinct numbers at the same time. Afterwards, one process must call
    `finish`.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any], embed_dim: int, dtype: str = "float16") -> None:
        """Create a store at `folder`, or prepare to add shards to an existing store.

        Args:
            folder: Folder of the store. It is created if it does not exist.
            identity: Everything about the encoder that affects the embeddings; see `fingerprint`.
            embed_dim: Dimension of the embeddings.
            dtype: dtype of the stored embeddings: float16, float32 or int8. int8 uses one scale factor per row.

        Raises:
            StoreError: An existing store has a different encoder, dimension or dtype. The message lists the
                differences.
        """
        if dtype not in DTYPES:
            raise StoreError(f"the dtype of a store must be one of {', '.join(DTYPES)} (got {dtype!r})")
        identity = json.loads(json.dumps(identity))  # converts tuples to lists, as in the stored identity
        self.folder, self.identity, self.embed_dim, self.dtype = Path(folder), identity, embed_dim, dtype
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / MANIFEST).is_file():
            check_spec(read_manifest(self.folder), (identity, embed_dim, dtype), self.folder)
        elif shard_numbers(self.folder):
            raise StoreError(f"{self.folder} has shards but no {MANIFEST}. Run `llm2clip store repair {self.folder}`")
        else:
            self.finish()

    def write(self, number: int, captions: Sequence[str], tokens: Sequence[int], embeddings: np.ndarray) -> None:
        """Write a shard atomically.

        Args:
            number: Number of the new shard. No shard with this number may exist.
            captions: N captions.
            tokens: N token counts, which are stored for resource estimates and for plots by caption length.
            embeddings: Floating-point embeddings of shape (N, embed_dim).

        Raises:
            StoreError: See `write_keyed`.
        """
        self.write_keyed(number, caption_keys(captions), tokens, embeddings, captions)

    def write_keyed(
        self,
        number: int,
        keys: np.ndarray,
        tokens: Sequence[int],
        embeddings: np.ndarray,
        captions: Sequence[str] | None = None,
    ) -> None:
        """Write a shard from keys of shape (N, 16), uint8. `captions` is used only in error messages.

        Raises:
            StoreError: A value is not finite in the store's dtype, or a shape does not match the store.
        """
        self._check_shapes(keys, tokens, embeddings)
        self._check_values(keys, embeddings, captions)
        stored, scales = quantize_rows(embeddings, self.dtype)
        with atomic_path(embeddings_path(self.folder, number)) as temporary:
            np.save(temporary, stored, allow_pickle=False)
        if scales is not None:
            with atomic_path(scales_path(self.folder, number)) as temporary:
                np.save(temporary, scales, allow_pickle=False)
        # The keys are written last, because they mark the shard as complete.
        buffer = pa.py_buffer(np.ascontiguousarray(keys).tobytes())
        key_column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(keys), [None, buffer])
        table = pa.table({"key": key_column, "tokens": pa.array(tokens, pa.int32())})
        metadata = {
            "format_version": str(FORMAT_VERSION),
            "sha256": shard_checksum(self.folder, number),
            "rows": str(len(keys)),
            "embed_dim": str(self.embed_dim),
            "dtype": self.dtype,
            "identity": json.dumps(self.identity),
        }
        with atomic_path(keys_path(self.folder, number)) as temporary:
            pq.write_table(table.replace_schema_metadata(metadata), temporary, write_page_checksum=True)

    def finish(self) -> None:
        """Write the key index and the manifest for the complete shards."""
        write_manifest(self.folder, self.identity, self.embed_dim, self.dtype)

    def _check_shapes(self, keys: np.ndarray, tokens: Sequence[int], embeddings: np.ndarray) -> None:
        count = len(embeddings)
        if keys.shape != (count, KEY_BYTES) or embeddings.shape[1:] != (self.embed_dim,) or len(tokens) != count:
            raise StoreError(
                f"{self.folder} needs embeddings with {self.embed_dim} dimensions, each with a key and a token count "
                f"(got embeddings of shape {embeddings.shape}, keys of shape {keys.shape}, {len(tokens)} token counts)"
            )

    def _check_values(self, keys: np.ndarray, embeddings: np.ndarray, captions: Sequence[str] | None) -> None:
        invalid = ~np.isfinite(embeddings).all(axis=1)
        if self.dtype == "float16":
            with np.errstate(over="ignore"):
                invalid |= ~np.isfinite(embeddings.astype(np.float16)).all(axis=1)
        if invalid.any():
            row = int(invalid.argmax())
            name = repr(captions[row][:120]) if captions else f"key {keys[row].tobytes().hex()}"
            raise StoreError(
                f"the embedding of {name} has values that are not finite in {self.dtype}. Check the encoder's weights"
            )


def write_manifest(folder: Path, identity: dict[str, Any], embed_dim: int, dtype: str) -> None:
    """Write the key index and the manifest for all complete shards in a folder; delete older indexes.

    Raises:
        StoreError: A shard has a different identity, dimension or dtype.
    """
    shards = read_shards(folder, (identity, embed_dim, dtype))
    index = index_path(folder, shards)
    distinct = build_key_index(index, (read_keys(folder, shard) for shard in shards))
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint(identity),
        "identity": identity,
        "embed_dim": embed_dim,
        "dtype": dtype,
        "captions": distinct,
        "shards": [asdict(shard) for shard in shards],
    }
    atomic_write_text(folder / MANIFEST, json.dumps(manifest, indent=1))
    for old_index in set(folder.glob("index-*.npy")) - {index}:
        old_index.unlink()


def quantize_rows(embeddings: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Convert embeddings of shape (N, embed_dim) to the dtype of a store.

    Returns:
        The converted embeddings, and the scale factors of shape (N,), float32, by which int8 rows must be multiplied.
        They are chosen such that the largest absolute int8 value in each row is 127. None for other dtypes.
    """
    if dtype != "int8":
        return np.ascontiguousarray(embeddings, DTYPES[dtype]), None
    exact = np.asarray(embeddings, np.float32)
    scales = np.abs(exact).max(axis=1) / 127
    divisors = np.where(scales > 0, scales, 1)  # an all-zero row stays zero
    return np.rint(exact / divisors[:, None]).astype(np.int8), scales.astype(np.float32)
