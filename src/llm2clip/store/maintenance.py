"""Looking after stores: damaged shards dropped, those of several machines put together.

Nothing here encodes: what repair drops, `llm2clip embed` encodes again, and only that.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from llm2clip.io_utils import atomic_write_jsonl
from llm2clip.store.layout import (
    Shard,
    StoreError,
    StoreSpec,
    atomic_path,
    check_identity,
    embeddings_path,
    keys_path,
    read_keys,
    read_manifest,
    read_meta,
    read_shards,
    remove_temp_files,
    scales_path,
    shard_numbers,
    store_spec,
)
from llm2clip.store.lock import folder_lock
from llm2clip.store.store import EmbeddingStore, damaged_shards, refused_rows
from llm2clip.store.writer import StoreWriter, write_manifest


def repair_store(folder: str | Path, progress: bool = False) -> list[str]:
    """Drop what is damaged or half-written, and write manifest and index again from what is sound.

    Returns:
        The names of the files that were dropped.

    Raises:
        StoreError: nothing there says which encoder the store is of, or another run is filling it.
    """
    folder, dropped = Path(folder), []

    def drop(*paths: Path) -> None:
        for path in paths:
            if path.exists():
                path.unlink()
                dropped.append(path.name)

    with folder_lock(folder):
        kinds: list[StoreSpec] = []
        for number in shard_numbers(folder):
            try:
                kinds.append(read_meta(folder, number)[2])
            except StoreError:
                drop(keys_path(folder, number))
        try:
            kind = store_spec(read_manifest(folder))
        except StoreError as error:
            if not kinds:
                raise StoreError(f"nothing of {folder} is whole: delete it and run `llm2clip embed`") from error
            kind = max(kinds, key=kinds.count)
        for number in damaged_shards(folder, read_shards(folder), kind, progress):
            drop(keys_path(folder, number))
        dropped += remove_temp_files(folder)
        whole = set(shard_numbers(folder))
        for path in sorted(folder.iterdir()):  # keys come last: vectors without them are of a kill, or of a drop above
            name = re.fullmatch(r"(?:embeddings|scales|keys)-(\d{5,})\.(?:npy|parquet)", path.name)
            if name and int(name[1]) not in whole:
                drop(path)
        for index in folder.glob("index-*.npy"):
            index.unlink()
        write_manifest(folder, *kind)
    return dropped


def merge_stores(out: str | Path, sources: Sequence[str | Path]) -> EmbeddingStore:
    """Put the shards of `sources` into the store at `out`, as links where the file system has them, else as copies.

    A shard that `out` holds already is passed over, so that a merge can be given again; a caption of several stores
    is found in the first of them.

    Raises:
        StoreError: a source is of another encoder, width or dtype, or is damaged.
    """
    out, folders = Path(out), [Path(source) for source in sources]
    manifests = [read_manifest(folder) for folder in folders]
    if not manifests:
        raise StoreError("name the stores to merge")
    for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
        check_identity(manifest["identity"], manifests[0]["identity"], folder)
        for name in ("width", "dtype"):
            if manifest[name] != manifests[0][name]:
                raise StoreError(f"{folder} has {name} {manifest[name]}, {folders[0]} {manifests[0][name]}")
    for folder, manifest in zip(folders, manifests, strict=True):
        # All that lie there, of which the manifest may not know.
        if damaged := damaged_shards(folder, read_shards(folder), store_spec(manifest)):
            raise StoreError(f"{folder}: damaged shards {damaged}; `llm2clip store repair {folder}` drops them")
    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out):
        first = manifests[0]
        writer = StoreWriter(out, first["identity"], first["width"], first["dtype"])
        there = {_content(out, shard) for shard in read_shards(out)}
        number = max(shard_numbers(out), default=-1) + 1
        for folder in folders:
            for shard in read_shards(folder):
                if (content := _content(folder, shard)) in there:
                    continue
                for path_of in (embeddings_path, scales_path, keys_path):
                    if path_of(folder, shard.number).is_file():
                        _put(path_of(folder, shard.number), path_of(out, number))
                there.add(content)
                number += 1
        refused = {row["caption"]: row for folder in (out, *folders) for row in refused_rows(folder)}
        if refused:
            atomic_write_jsonl(out / "refused-merged.jsonl", refused.values())
        writer.finish()
    return EmbeddingStore(out)


def _content(folder: Path, shard: Shard) -> tuple[str, str]:
    """What a shard holds: checksums of its vectors and of its keys."""
    return shard.sha256, hashlib.sha256(read_keys(folder, shard).tobytes()).hexdigest()


def _put(source: Path, target: Path) -> None:
    with atomic_path(target) as tmp:
        try:
            os.link(source, tmp)
        except OSError:
            shutil.copyfile(source, tmp)
