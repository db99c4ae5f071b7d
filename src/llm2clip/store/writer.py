"""Writing a store: shard by shard, each whole or absent; damaged ones dropped; other stores taken in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm2clip.models.fingerprint import fingerprint
from llm2clip.store.key_index import build_key_index
from llm2clip.store.layout import (
    DTYPES,
    MANIFEST,
    StoreError,
    atomic_path,
    check_identity,
    checksum,
    embeddings_path,
    fsync_folder,
    index_path,
    keys_of,
    keys_path,
    read_keys,
    read_manifest,
    read_shards,
    scales_path,
    shard_numbers,
)


class StoreWriter:
    """Adds shards to a store. Several processes may write shards of different numbers at once; one then finishes."""

    def __init__(self, folder: str | Path, identity: dict[str, Any], width: int, dtype: str = "float16") -> None:
        """Create the store at `folder`, or go on with it.

        Args:
            folder: of the store.
            identity: of the encoder.
            width: of the vectors.
            dtype: float16, float32, or int8 with a scale for each row.

        Raises:
            StoreError: the store there was made by another encoder, or has another width or dtype; the message names
                what differs.
        """
        if dtype not in DTYPES:
            raise StoreError(f"vectors are stored as {' or '.join(DTYPES)}, not {dtype!r}")
        identity = json.loads(json.dumps(identity))  # as it is read again
        self.folder, self.identity, self.width, self.dtype = Path(folder), identity, width, dtype
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / MANIFEST).is_file():
            manifest = read_manifest(self.folder)
            check_identity(manifest["identity"], identity, self.folder)
            for name, ours in (("dtype", dtype), ("width", width)):
                if manifest[name] != ours:
                    raise StoreError(f"{self.folder} holds {name} {manifest[name]}, not {ours}; choose another folder")
        elif shard_numbers(self.folder):
            raise StoreError(f"{self.folder} has shards but no {MANIFEST}; `llm2clip store repair {self.folder}`")
        else:
            self.finish()

    def write(self, number: int, captions: Sequence[str], tokens: Sequence[int], embeddings: np.ndarray) -> None:
        """Write one shard of captions, whole or not at all.

        Args:
            number: of the shard; not one that is there.
            captions: N texts.
            tokens: N lengths in tokens, kept for planning and for curves against length.
            embeddings: (N, width) floats.

        Raises:
            StoreError: a value is not finite, or too large for float16.
        """
        self.write_keyed(number, keys_of(captions), tokens, embeddings, captions)

    def write_keyed(
        self,
        number: int,
        keys: np.ndarray,
        tokens: Sequence[int],
        embeddings: np.ndarray,
        names: Sequence[str] | None = None,
    ) -> None:
        """The same by keys, (N, 16) uint8, in place of texts; `names` are for an error's message.

        Raises:
            StoreError: a value is not finite, or too large for float16, or the sizes do not fit the store.
        """
        if keys.shape != (len(embeddings), 16) or embeddings.shape[1:] != (self.width,) or len(tokens) != len(keys):
            raise StoreError(
                f"{self.folder} takes vectors of {self.width} numbers, each with a key and a number of tokens; not an "
                f"array {embeddings.shape} with keys {keys.shape} and {len(tokens)} numbers of tokens"
            )
        bad = ~np.isfinite(embeddings).all(axis=1)
        if self.dtype == "float16":
            with np.errstate(over="ignore"):
                bad |= ~np.isfinite(embeddings.astype(np.float16)).all(axis=1)
        if bad.any():
            first = int(bad.argmax())
            name = repr(names[first][:120]) if names else f"the key {keys[first].tobytes().hex()}"
            raise StoreError(f"the vector of {name} does not fit {self.dtype}; is the encoder broken?")
        stored, scales = stored_bytes(embeddings, self.dtype)
        for path, array in ((embeddings_path(self.folder, number), stored), (scales_path(self.folder, number), scales)):
            if array is not None:
                with atomic_path(path) as tmp, tmp.open("wb") as f:
                    np.save(f, array, allow_pickle=False)
                    fsync_folder(f)
        column = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(16), len(keys), [None, pa.py_buffer(np.ascontiguousarray(keys).tobytes())]
        )
        table = pa.table({"key": column, "tokens": pa.array(tokens, pa.int32())})
        meta = {
            "sha256": checksum(self.folder, number), "rows": str(len(keys)), "width": str(self.width),
            "dtype": self.dtype, "identity": json.dumps(self.identity),
        }  # fmt: skip
        with atomic_path(keys_path(self.folder, number)) as tmp, tmp.open("wb") as f:
            pq.write_table(table.replace_schema_metadata(meta), f, write_page_checksum=True)
            fsync_folder(f)

    def finish(self) -> None:
        """Write the index and the manifest from the shards that are there."""
        write_manifest(self.folder, self.identity, self.width, self.dtype)


def write_manifest(folder: Path, identity: dict[str, Any], width: int, dtype: str) -> None:
    """Write the index and the manifest of a folder's whole shards.

    Raises:
        StoreError: a shard is not of this encoder, width and dtype.
    """
    shards = read_shards(folder, (identity, width, dtype))
    index = index_path(folder, shards)
    different = build_key_index(index, (read_keys(folder, shard) for shard in shards))
    manifest = {
        "fingerprint": fingerprint(identity),
        "identity": identity,
        "width": width,
        "dtype": dtype,
        "captions": different,
        "shards": [asdict(shard) for shard in shards],
    }
    with atomic_path(folder / MANIFEST) as tmp, tmp.open("w") as f:
        json.dump(manifest, f, indent=1)
        fsync_folder(f)
    for old in set(folder.glob("index-*.npy")) - {index}:
        old.unlink()


def stored_bytes(embeddings: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Vectors (N, width) as they are stored: float16 or float32; or int8, each row with its scale, which makes its
    largest value 127."""
    if dtype != "int8":
        return np.ascontiguousarray(embeddings, DTYPES[dtype]), None
    exact = np.asarray(embeddings, np.float32)
    scales = np.abs(exact).max(axis=1) / 127
    return np.rint(exact / np.where(scales > 0, scales, 1)[:, None]).astype(np.int8), scales.astype(np.float32)
