"""Commands for embedding stores: `llm2clip store verify | repair | merge | export | import`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jsonargparse import Namespace

from llm2clip.cli.checks import check_output_folder, check_stores
from llm2clip.cli.commands import Commands
from llm2clip.config import EncoderConfig

if TYPE_CHECKING:
    from llm2clip.store.store import EmbeddingStore


def add_commands(commands: Commands) -> None:
    group = commands.add_group("store", "Check, repair, merge, export and import embedding stores.")

    parser = group.add("verify", _verify_store, "Read every shard and verify its checksum.")
    parser.add_argument("folder", type=str, help="Store folder.")

    parser = group.add(
        "repair", _repair_store, "Delete corrupt shards. To re-encode their captions, run `llm2clip embed`."
    )
    parser.add_argument("folder", type=str, help="Store folder.")

    parser = group.add("merge", _merge_stores, "Merge stores written by several machines with the same encoder.")
    parser.add_argument("folders", nargs="+", type=str, help="Store folders to merge.")
    parser.add_argument("--out", type=str, required=True, help="Folder for the merged store.")

    parser = group.add("export", _export_store, "Export a store as a Parquet file.")
    parser.add_argument("folder", type=str, help="Store folder.")
    parser.add_argument("--parquet", type=str, required=True, help="Parquet file to write.")

    parser = group.add("import", _import_store, "Create a store from a Parquet file.")
    parser.add_argument(
        "--parquet",
        type=str,
        required=True,
        help="Parquet file with an `embedding` column and either a `key` or `caption` column.",
    )
    parser.add_argument("--out", type=str, required=True, help="Store folder.")
    parser.add_argument(
        "--precision", type=str, default="fp32", help="Precision at which the embeddings were computed."
    )
    parser.add_class_arguments(EncoderConfig, "encoder")


def _verify_store(args: Namespace) -> list[str]:
    check_stores(args.folder)
    from llm2clip.store.store import EmbeddingStore

    store = EmbeddingStore(args.folder)
    store.verify(progress=True)
    return [f"{args.folder}: {len(store):,} captions in {len(store.shards)} shards, all checksums match"]


def _repair_store(args: Namespace) -> list[str]:
    check_stores(args.folder)
    from llm2clip.store.maintenance import repair_store
    from llm2clip.store.store import EmbeddingStore

    deleted = repair_store(args.folder, progress=True)
    count = len(EmbeddingStore(args.folder))
    return [
        f"Deleted: {', '.join(deleted) or 'nothing'}",
        f"The store has {count:,} captions; run `llm2clip embed` to re-encode the deleted ones",
    ]


def _merge_stores(args: Namespace) -> list[str]:
    check_output_folder(args.out, "store")
    check_stores(*args.folders)
    from llm2clip.store.maintenance import merge_stores

    return _format_summary(args.out, merge_stores(args.out, args.folders))


def _export_store(args: Namespace) -> list[str]:
    check_stores(args.folder)
    from llm2clip.store.maintenance import export_parquet
    from llm2clip.store.store import EmbeddingStore

    export_parquet(EmbeddingStore(args.folder), args.parquet)
    return [args.parquet]


def _import_store(args: Namespace) -> list[str]:
    check_output_folder(args.out, "store")
    from llm2clip.pipeline import open_encoder
    from llm2clip.store.maintenance import import_parquet

    identity = None  # the file's metadata identifies the encoder
    if args.encoder != EncoderConfig():
        identity = open_encoder(args.encoder, "cpu").identity(args.precision)
    return _format_summary(args.out, import_parquet(args.parquet, args.out, identity))


def _format_summary(out: str, store: EmbeddingStore) -> list[str]:
    return [f"{out}: {len(store):,} captions"]
