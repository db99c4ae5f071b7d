"""Repair and merging of stores, without encoding captions."""

import os
import re
import shutil
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from llm2clip.io_utils import atomic_path, atomic_write_jsonl
from llm2clip.runs.output_folder import hold_folder_lock
from llm2clip.store import layout
from llm2clip.store.layout import Shard, StoreError, StoreSpec
from llm2clip.store.store import EmbeddingStore, find_corrupt_shards
from llm2clip.store.writer import StoreWriter, write_manifest

# ---- repair --------------------------------------------------------------------------------------------------------


def repair_store(folder: str | Path) -> list[str]:
    """Delete corrupt shards and incomplete files. Rewrite the manifest and the index from the intact shards.

    To encode the captions of deleted shards again, run `llm2clip embed`.

    Returns:
        The names of the deleted files.

    Raises:
        StoreError: The manifest and all shards are corrupt, so the encoder is unknown.
        FormatVersionError: The format version of the manifest or a shard is not supported.
        FolderInUseError: Another run is writing to the store.
    """
    folder = Path(folder)
    deleted: list[str] = []
    with hold_folder_lock(folder):
        specs, unreadable = _read_store_specs(folder)
        try:
            spec = layout.get_store_spec(layout.read_manifest(folder))
        except StoreError as error:
            if not specs:
                raise StoreError(
                    f"{folder} has no intact manifest and no intact shard. Delete the folder and run `llm2clip embed`"
                ) from error
            spec = max(specs, key=specs.count)
        for number in unreadable:
            deleted.append(_delete_keys_file(folder, number))
        for number in find_corrupt_shards(folder, layout.read_shards(folder), spec):
            deleted.append(_delete_keys_file(folder, number))
        deleted += layout.remove_temp_files(folder) + _delete_incomplete_shards(folder)
        for index in folder.glob("index-*.npy"):
            index.unlink()
        write_manifest(folder, *spec)
    return deleted


def _read_store_specs(folder: Path) -> tuple[list[StoreSpec], list[int]]:
    specs, unreadable = [], []
    for number in layout.list_shard_numbers(folder):
        try:
            specs.append(layout.read_shard_metadata(folder, number)[2])
        except StoreError:
            unreadable.append(number)
    return specs, unreadable


def _delete_keys_file(folder: Path, number: int) -> str:
    """Mark a shard as incomplete by deleting its keys file. Return the name of the deleted file."""
    path = layout.get_keys_path(folder, number)
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
    """Add the shards of `sources` to the store at `out`. Files are hard-linked if possible, otherwise copied.

    Shards that are already in `out` are skipped, so a merge can be repeated. If several stores contain the same
    caption, lookups return the embedding from the first of these stores.

    Raises:
        StoreError: A source is corrupt, or the stores differ in encoder, dimension or dtype.
    """
    out, folders = Path(out), [Path(source) for source in sources]
    identity, embed_dim, dtype = _check_source_stores(folders)
    with hold_folder_lock(out):
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
        refused: dict[str, dict[str, Any]] = {}
        for folder in (out, *folders):
            refused |= layout.read_refused_captions(folder)
        if refused:
            atomic_write_jsonl(out / "refused-merged.jsonl", refused.values())
        writer.finish()
    return EmbeddingStore(out)


def _check_source_stores(folders: Sequence[Path]) -> StoreSpec:
    if not folders:
        raise StoreError("no stores to merge")
    spec = layout.get_store_spec(layout.read_manifest(folders[0]))
    for folder in folders[1:]:
        layout.check_store_spec(layout.read_manifest(folder), spec, folder)
    for folder in folders:
        # Check all shards in the folder, because the manifest may be incomplete after an interruption.
        corrupt = find_corrupt_shards(folder, layout.read_shards(folder), spec)
        if corrupt:
            raise StoreError(f"{folder} has corrupt shards: {corrupt}. Run `llm2clip store repair {folder}`")
    return spec


def _compute_shard_checksums(folder: Path, shard: Shard) -> tuple[str, str]:
    """Return the checksums of a shard's embeddings and keys. Shards with equal checksums are duplicates."""
    return shard.sha256, sha256(layout.read_keys(folder, shard).tobytes()).hexdigest()


def _link_shard(source: Path, source_number: int, out: Path, number: int) -> None:
    """Link or copy a shard's files to another store. The keys file, written last, marks the new shard as complete."""
    for file_path in (layout.get_embeddings_path, layout.get_scales_path, layout.get_keys_path):
        file = file_path(source, source_number)
        if not file.is_file():  # only int8 stores have scales files
            continue
        with atomic_path(file_path(out, number)) as temporary:
            try:
                temporary.unlink()  # os.link cannot replace the empty temporary file
                os.link(file, temporary)
            except OSError:
                shutil.copyfile(file, temporary)
