"""Writing embedding stores: shards for new captions, plus the manifest and the key index that summarise all shards.

`open_store_for_writing` prepares a store for any number of processes. The main process reads all captions once and
writes the captions that have no embedding yet to a folder:

    store/.incoming/
      captions.parquet   all captions, in input order; deleted once all duplicates have been found
      00012.parquet      captions of shard 12, which has not been encoded yet

Input order is preserved, so captions of the same image stay together. Memory use: 17 bytes per caption for the keys
(2 GB for 120 million captions), plus the captions of a few shards.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm2clip.io_utils import atomic_path, atomic_write_text, check_texts
from llm2clip.models.loading import fingerprint
from llm2clip.progress import ProgressBar
from llm2clip.runs.output_folder import hold_folder_lock
from llm2clip.runs.ranks import process_state, wait_for_everyone
from llm2clip.store import layout
from llm2clip.store.layout import StoreError
from llm2clip.store.store import EmbeddingStore

CHUNK_SIZE = 1 << 14  # number of captions to hash at once
TEXTS_FILE = "captions.parquet"

# ---- shards --------------------------------------------------------------------------------------------------------


class StoreWriter:
    """Writer that adds shards to a store.

    Several processes can write to the same store concurrently if they use different shard numbers. Afterwards, one
    process must call `finish`.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any], embed_dim: int, dtype: str = "float16") -> None:
        """Create a store at `folder`, or prepare to add shards to an existing store.

        Args:
            identity: All properties of the encoder that affect the embeddings; see `fingerprint`.
            dtype: Storage dtype: float16, float32 or int8. int8 uses one scale factor per row.

        Raises:
            StoreError: An existing store has a different encoder, dimension or dtype. The message lists the
                differences.
        """
        if dtype not in layout.DTYPES:
            raise StoreError(f"the dtype of a store must be one of {', '.join(layout.DTYPES)} (got {dtype!r})")
        identity = json.loads(json.dumps(identity))  # converts tuples to lists, as in the stored identity
        self.folder, self.identity, self.embed_dim, self.dtype = Path(folder), identity, embed_dim, dtype
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / layout.MANIFEST).is_file():
            layout.check_store_spec(layout.read_manifest(self.folder), (identity, embed_dim, dtype), self.folder)
        elif layout.list_shard_numbers(self.folder):
            raise StoreError(
                f"{self.folder} has shards but no {layout.MANIFEST}. Run `llm2clip store repair {self.folder}`"
            )
        else:
            self.finish()

    def write(
        self,
        number: int,
        captions: Sequence[str],
        token_counts: Sequence[int],
        embeddings: np.ndarray,
        keys: np.ndarray | None = None,
    ) -> None:
        """Atomically write a new shard of N captions. A shard with the same shard number must not exist.

        `embeddings` has shape (N, embed_dim) and a floating-point dtype. The N token counts are stored for resource
        estimates and for plots by caption length. If `keys` (uint8, of shape (N, 16)) are passed, `captions` are used
        only in error messages.

        Raises:
            StoreError: A value is not finite in the store's dtype, or a shape does not match the store.
        """
        keys = layout.make_caption_keys(captions) if keys is None else keys
        self._check_shapes(keys, token_counts, embeddings)
        self._check_values(keys, embeddings, captions)
        stored, scales = convert_to_store_dtype(embeddings, self.dtype)
        with atomic_path(layout.get_embeddings_path(self.folder, number)) as temporary:
            np.save(temporary, stored, allow_pickle=False)
        if scales is not None:
            with atomic_path(layout.get_scales_path(self.folder, number)) as temporary:
                np.save(temporary, scales, allow_pickle=False)
        # The keys are written last, because they mark the shard as complete.
        buffer = pa.py_buffer(np.ascontiguousarray(keys).tobytes())
        key_column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(layout.KEY_BYTES), len(keys), [None, buffer])
        table = pa.table({"key": key_column, "tokens": pa.array(token_counts, pa.int32())})
        metadata = {
            "format_version": str(layout.FORMAT_VERSION),
            "sha256": layout.compute_shard_checksum(self.folder, number),
            "rows": str(len(keys)),
            "embed_dim": str(self.embed_dim),
            "dtype": self.dtype,
            "identity": json.dumps(self.identity),
        }
        with atomic_path(layout.get_keys_path(self.folder, number)) as temporary:
            pq.write_table(table.replace_schema_metadata(metadata), temporary, write_page_checksum=True)

    def finish(self) -> None:
        """Write the key index and the manifest for the complete shards."""
        write_manifest(self.folder, self.identity, self.embed_dim, self.dtype)

    def _check_shapes(self, keys: np.ndarray, token_counts: Sequence[int], embeddings: np.ndarray) -> None:
        count = len(embeddings)
        if (
            keys.shape != (count, layout.KEY_BYTES)
            or embeddings.shape[1:] != (self.embed_dim,)
            or len(token_counts) != count
        ):
            raise StoreError(
                f"{self.folder} requires {self.embed_dim}-dimensional embeddings, each with a key and a token count "
                f"(got embeddings of shape {embeddings.shape}, keys of shape {keys.shape} and "
                f"{len(token_counts)} token counts)"
            )

    def _check_values(self, keys: np.ndarray, embeddings: np.ndarray, captions: Sequence[str]) -> None:
        invalid = ~np.isfinite(embeddings).all(axis=1)
        if self.dtype == "float16":
            with np.errstate(over="ignore"):
                invalid |= ~np.isfinite(embeddings.astype(np.float16)).all(axis=1)
        if invalid.any():
            row = int(invalid.argmax())
            name = repr(captions[row][:120]) if captions else f"key {keys[row].tobytes().hex()}"
            raise StoreError(
                f"the embedding of {name} contains non-finite values in {self.dtype}. Check the encoder's weights"
            )


def write_manifest(folder: Path, identity: dict[str, Any], embed_dim: int, dtype: str) -> None:
    """Write the key index and the manifest for all complete shards in a folder. Delete older indexes.

    Raises:
        StoreError: A shard has a different identity, dimension or dtype.
    """
    shards = layout.read_shards(folder, (identity, embed_dim, dtype))
    index = layout.get_index_path(folder, shards)
    distinct = layout.build_key_index(index, layout.read_all_keys(folder, shards))
    manifest = {
        "format_version": layout.FORMAT_VERSION,
        "fingerprint": fingerprint(identity),
        "identity": identity,
        "embed_dim": embed_dim,
        "dtype": dtype,
        "captions": distinct,
        "shards": [asdict(shard) for shard in shards],
    }
    atomic_write_text(folder / layout.MANIFEST, json.dumps(manifest, indent=1))
    for old_index in set(folder.glob("index-*.npy")) - {index}:
        old_index.unlink()


def convert_to_store_dtype(embeddings: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Convert embeddings of shape (N, embed_dim) to a store's dtype.

    Returns:
        The converted embeddings and, for int8, the float32 scale factors of shape (N,), otherwise None. To restore an
        embedding, multiply the int8 row by its scale factor. The maximum absolute int8 value in each row is 127.
    """
    if dtype != "int8":
        return np.ascontiguousarray(embeddings, layout.DTYPES[dtype]), None
    exact = np.asarray(embeddings, np.float32)
    scales = np.abs(exact).max(axis=1) / 127
    divisors = np.where(scales > 0, scales, 1)  # an all-zero row stays zero
    return np.rint(exact / divisors[:, None]).astype(np.int8), scales.astype(np.float32)


# ---- shards to write -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WritePlan:
    """New shards to encode and write to a store."""

    writer: StoreWriter
    incoming: Path  # folder with the captions of the new shards
    shards: list[int]  # numbers of the new shards

    def list_local_shards(self) -> list[int]:
        """Return the numbers of this process's shards: every n-th shard if there are n processes."""
        state = process_state()
        return self.shards[state.process_index :: state.num_processes]

    def read_captions(self, shard: int) -> list[str]:
        captions: list[str] = pq.read_table(get_shard_path(self.incoming, shard))["text"].to_pylist()
        return captions

    def create_progress_bar(self, description: str, unit: str) -> ProgressBar:
        """Create a progress bar for the captions of this process's shards, shown only on the main process."""
        paths = [get_shard_path(self.incoming, shard) for shard in self.list_local_shards()]
        total = sum(pq.read_metadata(path).num_rows for path in paths)
        hide = not process_state().is_main_process or not total
        return ProgressBar(total=total, desc=description, unit=unit, disable=hide)


@contextmanager
def open_store_for_writing(
    captions: Iterable[str],
    folder: str | Path,
    identity: dict[str, Any],
    embed_dim: int,
    *,
    dtype: str,
    shard_size: int,
    keys: np.ndarray | None = None,
) -> Iterator[WritePlan]:
    """Read the captions and yield a plan of the shards to write. On success, write the manifest and the index.

    All processes must enter and exit the context together. The main process locks the store, verifies the existing
    shards and deduplicates the captions. Captions that are already in the store, or that the tokenizer could not
    encode in an earlier run, are skipped.

    Args:
        captions: Texts or image names, possibly with duplicates. Only the main process reads them, and only once.
        folder: Store folder, created if it does not exist.
        identity, embed_dim, dtype: See `StoreWriter`.
        keys: Key of each caption, uint8 of shape (N, 16). Default: keys from `make_caption_keys`.

    Raises:
        TypeError, ValueError: A caption is not a string or is not valid Unicode.
        StoreError: The store is corrupt or was created with a different encoder.
        FolderInUseError: Another run is writing to the store.
    """
    state, folder = process_state(), Path(folder)
    incoming = folder / ".incoming"
    with hold_folder_lock(folder) if state.is_main_process else nullcontext():
        with state.main_process_first():
            writer = StoreWriter(folder, identity, embed_dim, dtype)
        if state.is_main_process:
            _prepare_incoming_captions(writer, captions, keys, incoming, shard_size)
        wait_for_everyone()
        shards = sorted(int(path.stem) for path in incoming.glob("[0-9]*.parquet"))
        yield WritePlan(writer, incoming, shards)
        wait_for_everyone()
        if state.is_main_process:
            writer.finish()
            shutil.rmtree(incoming, ignore_errors=True)  # open files may remain on network file systems
        wait_for_everyone()


def _prepare_incoming_captions(
    writer: StoreWriter, captions: Iterable[str], keys: np.ndarray | None, incoming: Path, shard_size: int
) -> None:
    """Clean up after an interrupted run, verify the existing shards, and write the captions of the new shards."""
    folder = writer.folder
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir(exist_ok=True)
    layout.remove_temp_files(folder)
    writer.finish()
    store = None
    if layout.list_shard_numbers(folder):
        store = EmbeddingStore(folder)
        store.verify()
    stream: Iterable[str] = check_texts(ProgressBar(captions, "read", unit="caption", leave=False, delay=1))
    if keys is None:
        refused = layout.read_refused_captions(folder)
        stream = (caption for caption in stream if caption not in refused)
    write_incoming_captions(stream, incoming, store, shard_size, layout.get_next_shard_number(folder), keys)


# ---- deduplication -------------------------------------------------------------------------------------------------


def write_incoming_captions(
    captions: Iterable[str],
    incoming: Path,
    store: EmbeddingStore | None,
    shard_size: int,
    first_shard: int,
    keys: np.ndarray | None = None,
) -> None:
    """Write the captions that have no embedding in `store` to the empty folder `incoming`, in one file per new shard.

    The new shards are numbered consecutively, starting with `first_shard`. For `keys`, see `open_store_for_writing`.
    """
    key_bytes = bytearray()
    masks = [np.empty(0, np.bool_)]
    file = incoming / TEXTS_FILE
    with pq.ParquetWriter(file, pa.schema([("text", pa.string())]), compression="zstd") as writer:
        for texts in layout.iter_chunks(captions, CHUNK_SIZE):
            writer.write_table(pa.table({"text": texts}))
            start = len(key_bytes) // layout.KEY_BYTES
            chunk = layout.make_caption_keys(texts) if keys is None else keys[start : start + len(texts)]
            key_bytes += chunk.tobytes()
            masks.append(np.ones(len(texts), np.bool_) if store is None else store.find_keys(chunk) < 0)
    is_new = np.concatenate(masks)
    for records in layout.sort_keys(np.frombuffer(key_bytes, np.uint8).reshape(-1, layout.KEY_BYTES)):
        repeated = layout.mask_repeated_keys(records)
        is_new[records[2, repeated].astype(np.int64)] = False
    for number, texts in enumerate(layout.iter_chunks(_select_captions(file, is_new), shard_size), first_shard):
        pq.write_table(pa.table({"text": texts}), get_shard_path(incoming, number), compression="zstd")
    file.unlink()


def get_shard_path(incoming: Path, shard: int) -> Path:
    return incoming / f"{shard:05d}.parquet"


def _select_captions(file: Path, mask: np.ndarray) -> Iterator[str]:
    start = 0
    with pq.ParquetFile(file) as captions:
        for batch in captions.iter_batches(CHUNK_SIZE):
            yield from batch["text"].filter(pa.array(mask[start : start + len(batch)])).to_pylist()
            start += len(batch)
