"""Commands for models and embedding stores: `convert`, `export`, `push` and `store`."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from jsonargparse.typing import PositiveFloat, PositiveInt

from llm2clip.cli.checks import check_index_exists, check_output_folder, check_stores_exist, resolve_model_name
from llm2clip.cli.commands import CommandGroup, format_command
from llm2clip.io_utils import format_count, require_extra
from llm2clip.models.export import FORMATS, export_model
from llm2clip.models.loading import describe_hub_error, find_hub_problem, is_hub_id

if TYPE_CHECKING:
    from llm2clip.models.llm2clip import LLM2CLIP
    from llm2clip.models.text.caption_encoder import CaptionEncoder


def add_commands(commands: CommandGroup) -> None:
    parser = commands.add(
        "convert",
        _run_convert,
        "Convert an official LLM2CLIP checkpoint to a model folder, or vice versa. Also converts caption encoders "
        "(LoRA adapters, NV-Embed-v2).",
    )
    parser.add_argument(
        "source",
        type=str,
        nargs="+",
        help="Official checkpoint (folder, file or hub id), model folder, one or more LoRA adapters in training order, "
        "or nvidia/NV-Embed-v2.",
    )
    parser.add_argument("--out", type=str, required=True, help="Output model folder or, with --to, output checkpoint.")
    parser.add_argument(
        "--text", type=str, help="Caption encoder with which the checkpoint was trained, or the encoder's LoRA adapter."
    )
    parser.add_argument(
        "--to", choices=["hf", "eva"], help="Convert a model folder to an official checkpoint in this layout."
    )

    parser = commands.add(
        "export",
        _run_export,
        "Export a model to transformers, sentence-transformers or ONNX, or an index to a static web page or Parquet.",
    )
    parser.add_argument("model", nargs="?", type=str, help="Model folder or hub id. Not used with --to vectors.")
    parser.add_argument(
        "--to",
        choices=[*FORMATS, "gallery", "vectors"],
        required=True,
        help="Export format. vision exports only the vision tower. gallery exports a web page that searches --index in "
        "the browser, without a server. vectors exports vectors and metadata from --index to a Parquet file.",
    )
    parser.add_argument("--out", type=str, required=True, help="Folder to create. With --to vectors, file to create.")
    parser.add_argument("--int8", action="store_true", help="With --to onnx: also export graphs with 8-bit weights.")
    parser.add_argument(
        "--dim", type=PositiveInt, help="Truncate embeddings to this number of dimensions. Default: all dimensions."
    )
    parser.add_argument("--index", type=str, help="With --to gallery or vectors: index folder or URL.")
    parser.add_argument(
        "--max_mb",
        type=PositiveFloat,
        help="With --to gallery: maximum size of the folder in MB. Default: 1000.",
    )
    parser.add_argument("--gps", action="store_true", help="With --to gallery or vectors: include GPS positions.")

    parser = commands.add("push", _run_push, "Upload a model folder or exported model to the hub, with a model card.")
    parser.add_argument("model", type=str, help="Folder to upload.")
    parser.add_argument("repo_id", type=str, help="Hub repository USER/NAME, which is created if it does not exist.")
    parser.add_argument("--private", action="store_true", help="Create a private repository.")
    parser.add_argument("--license", type=str, help="License identifier on the hub, such as apache-2.0.")
    _add_store_commands(commands)


def _add_store_commands(commands: CommandGroup) -> None:
    group = commands.add_group("store", "Check, repair and merge embedding stores.")

    parser = group.add("verify", _verify_store, "Read every shard and verify its checksum.")
    parser.add_argument("folder", type=str, help="Store folder.")

    parser = group.add(
        "repair", _repair_store, "Delete corrupt shards. To re-encode their captions, run `llm2clip embed`."
    )
    parser.add_argument("folder", type=str, help="Store folder.")

    parser = group.add("merge", _merge_stores, "Merge stores written by several machines with the same encoder.")
    parser.add_argument("folders", nargs="+", type=str, help="Store folders to merge.")
    parser.add_argument("--out", type=str, required=True, help="Folder for the merged store.")


def _run_convert(args: Namespace) -> list[str]:
    for source in args.source:
        if "/" not in source:  # a name with a slash may refer to a file in a hub repository
            resolve_model_name(source)
    from llm2clip.models.export.model_card import write_model_card
    from llm2clip.models.llm2clip import LLM2CLIP
    from llm2clip.models.model_folder import is_model_folder
    from llm2clip.models.official_checkpoint import load_official_checkpoint, save_official_checkpoint
    from llm2clip.models.published_encoders import find_lora_adapter, is_nv_embed, load_encoder_with_lora, load_nv_embed

    source = args.source[0]
    if len(args.source) > 1 or find_lora_adapter(source) is not None:
        return _convert_caption_encoder(args, "LoRA adapters", lambda: load_encoder_with_lora(args.source))
    if is_nv_embed(source):
        return _convert_caption_encoder(args, "NV-Embed-v2", lambda: load_nv_embed(source))
    if args.to is not None:
        if args.text is not None:
            raise ValueError("official checkpoints do not contain a caption encoder: use --text or --to, but not both")
        written = save_official_checkpoint(LLM2CLIP.from_pretrained(source, device="cpu"), args.out, args.to)
        return [f"Official checkpoint ({args.to} layout): {written}"]
    if Path(args.out).exists() and not is_model_folder(args.out):
        raise FileExistsError(f"{args.out} exists and is not a model folder: choose another folder")
    if is_model_folder(source):
        model = _add_caption_encoder(source, args.text)
    else:
        model = load_official_checkpoint(source, text=args.text)
    folder = model.save_pretrained(args.out)
    write_model_card(folder, folder.name)
    return _format_closing_lines(model, folder, source)


def _convert_caption_encoder(args: Namespace, kind: str, load: Callable[[], CaptionEncoder]) -> list[str]:
    from llm2clip.io_utils import atomic_dir

    if args.to is not None or args.text is not None:
        raise ValueError(f"--to and --text cannot be used with {kind}, because the output is a caption encoder")
    if Path(args.out).exists():
        raise FileExistsError(f"{args.out} exists: choose another folder")
    encoder = load()
    with atomic_dir(args.out) as folder:
        encoder.save_pretrained(folder)
    return [
        f"Caption encoder: {args.out}",
        f"Next: {format_command('convert', 'CHECKPOINT', '--out', 'MODEL', '--text', args.out)}",
        f"  or: {format_command('fit', 'DATA', '--out', 'RUN', '--encoder.path', args.out)}",
    ]


def _add_caption_encoder(source: str, text: str | None) -> LLM2CLIP:
    from llm2clip.models.llm2clip import LLM2CLIP
    from llm2clip.models.official_checkpoint import attach_caption_encoder

    if text is None:
        raise ValueError(
            f"{source} is already a model folder: use --to hf or --to eva to convert it to an official checkpoint "
            "format, or --text ENCODER to add a caption encoder"
        )
    model = LLM2CLIP.from_pretrained(source, device="cpu")
    if model.has_encoder:
        raise ValueError(f"{source} already has a caption encoder: {Path(source) / 'text'}")
    attach_caption_encoder(model, text, source)
    return model


def _format_closing_lines(model: LLM2CLIP, folder: Path, source: str) -> list[str]:
    from llm2clip.models.published_encoders import suggest_published_encoders

    if model.has_encoder:
        return [f"Model: {folder}", f"Next: {format_command('evaluate', folder, 'DATA')}"]
    text_dim = model.config.text_dim
    suggested = suggest_published_encoders(source, text_dim, model.config.tower)
    encoder = " or ".join(suggested) or f"an encoder whose embeddings have {text_dim} dimensions"
    return [
        f"Model: {folder}",
        "The model cannot encode text yet. Add the caption encoder with which the adapter was trained:",
        f"Next: {format_command('convert', folder, '--out', folder, '--text', 'ENCODER')}      ({encoder})",
    ]


def _run_export(args: Namespace) -> list[str]:
    if args.to == "vectors":
        return _export_vectors(args)
    if args.model is None:
        raise ValueError(f"--to {args.to} requires a model: llm2clip export MODEL --to {args.to} --out FOLDER")
    args.model = resolve_model_name(args.model)
    if args.to in ("onnx", "gallery"):
        require_extra("onnx", f"--to {args.to}")
    if args.to == "gallery":
        return _export_gallery(args)
    for name in ("index", "max_mb", "gps"):
        if args[name]:
            raise ValueError(f"--{name} cannot be used with --to {args.to}, which exports a model")
    from llm2clip.models.llm2clip import LLM2CLIP

    model = LLM2CLIP.from_pretrained(args.model, device="cpu")
    messages = export_model(model, args.to, args.out, int8=args.int8, dim=args.dim)
    return [*messages, f"Exported: {args.out}", f"Load it with: {FORMATS[args.to].load_code.format(out=args.out)}"]


def _export_gallery(args: Namespace) -> list[str]:
    if args["index"] is None:
        raise ValueError("--to gallery requires --index INDEX, the index to search")
    if args.int8 or args.dim is not None:
        raise ValueError(
            "--int8 and --dim cannot be used with --to gallery: a gallery always has 8-bit weights, and uses the "
            "vectors of the index. To truncate the vectors, build the index with `llm2clip index --dim`"
        )
    check_index_exists(args["index"])
    from llm2clip.search.gallery import MAX_MB, export_gallery

    messages = export_gallery(args.model, args["index"], args.out, args.max_mb or MAX_MB, args.gps)
    return [
        *messages,
        f"Exported: {args.out}",
        "Upload the folder to any static web host, or serve it on this machine:",
        f"Next: python -m http.server --directory {shlex.quote(args.out)}      (then open http://localhost:8000)",
    ]


def _export_vectors(args: Namespace) -> list[str]:
    if args["index"] is None:
        raise ValueError("--to vectors requires --index INDEX, the index to export")
    for name in ("model", "int8", "dim", "max_mb"):
        if args[name]:
            raise ValueError(f"{'MODEL' if name == 'model' else '--' + name} cannot be used with --to vectors")
    check_index_exists(args["index"])
    from llm2clip.search.export_vectors import export_vectors

    count = export_vectors(args["index"], args.out, args.gps)
    return [f"Exported: {args.out} ({format_count(count, 'image')})"]


def _run_push(args: Namespace) -> list[str]:
    args.model = resolve_model_name(args.model)
    if not is_hub_id(args.repo_id):
        raise ValueError(f"the name of the hub repository must be of the form USER/NAME (got {args.repo_id})")
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HTTPError

    from llm2clip.models.export.model_card import render_model_card
    from llm2clip.models.model_folder import TRAINING_IMAGES_FILE

    folder = Path(args.model)
    if not any((folder / name).is_file() for name in ("config.json", "modules.json", "text.onnx")):
        raise FileNotFoundError(f"{args.model} is not a model folder: it has no config.json")
    _check_for_home_paths(folder)
    problem = find_hub_problem()
    if problem:
        raise OSError(f"cannot push to {args.repo_id}: {problem}")
    files: dict[str, Any] = _list_files_to_upload(folder)
    files["README.md"] = render_model_card(folder, args.repo_id, args.license).encode()
    operations: list[Any] = [CommitOperationAdd(name, files[name]) for name in sorted(files)]
    api = HfApi()
    try:
        url = api.create_repo(args.repo_id, private=args.private, exist_ok=True)
        info = api.model_info(args.repo_id)
        if args.private and not info.private:
            raise ValueError(
                f"{args.repo_id} exists and is public. Make it private on the hub first, or remove --private"
            )
        if "config.json" in files:  # delete old files that would be loaded together with the new model
            outdated = (TRAINING_IMAGES_FILE, "modules.json", ".safetensors", ".safetensors.index.json")
            for name in [file.rfilename for file in info.siblings or ()]:
                is_outdated = name.startswith("text/") or ("/" not in name and name.endswith(outdated))
                if is_outdated and name not in files:
                    operations.append(CommitOperationDelete(name))
        # With parent_commit, the commit fails if a concurrent push has changed the repository.
        commit = api.create_commit(args.repo_id, operations, commit_message="Upload model", parent_commit=info.sha)
    except (HTTPError, OSError, RuntimeError, JSONDecodeError) as error:
        message = describe_hub_error(error, "you lack write access to this repository or account")
        raise OSError(f"cannot push to {args.repo_id}: {message}") from error
    return [f"Pushed: {url} (revision {commit.oid})"]


def _list_files_to_upload(folder: Path) -> dict[str, Path]:
    """Return the files in a folder, keyed by relative path. Hidden files and folders are omitted.

    Raises:
        ValueError: A symbolic link is broken, or points to a folder or to a file outside the folder and the hub cache.
    """
    files = {}
    for path in folder.rglob("*"):
        name, target = path.relative_to(folder), path.resolve()
        if any(part.startswith(".") for part in name.parts):
            continue
        is_inside = target.is_relative_to(folder.resolve()) or target.parent.name == "blobs"
        if path.is_symlink() and not (target.is_file() and is_inside):
            raise ValueError(f"{path} is a symbolic link to {target}: replace the link with a copy of the file")
        if path.is_file():
            files[name.as_posix()] = path
    return files


def _check_for_home_paths(folder: Path) -> None:
    """Raise ValueError if a JSON file contains a path in the home folder, which would reveal the user name."""
    for file in sorted(folder.rglob("*.json")):
        is_config = file.stat().st_size < 1 << 20  # larger JSON files are tokenizer vocabularies
        if is_config and f"{Path.home()}/" in file.read_text(encoding="utf-8", errors="replace"):
            raise ValueError(
                f"{file} contains a path in {Path.home()}, which would become public. Replace the path, for example "
                "with the model's hub id"
            )


# ---- embedding stores ------------------------------------------------------------------------------------------------


def _verify_store(args: Namespace) -> list[str]:
    check_stores_exist(args.folder)
    from llm2clip.store.store import EmbeddingStore

    store = EmbeddingStore(args.folder)
    store.verify()
    shards = format_count(len(store.shards), "shard")
    return [f"{args.folder}: {format_count(len(store), 'caption')} in {shards}, all checksums match"]


def _repair_store(args: Namespace) -> list[str]:
    check_stores_exist(args.folder)
    from llm2clip.store.maintenance import repair_store
    from llm2clip.store.store import EmbeddingStore

    deleted = repair_store(args.folder)
    count = len(EmbeddingStore(args.folder))
    if not deleted:
        return [f"Nothing to repair: the store is intact and contains {format_count(count, 'caption')}"]
    return [
        f"Deleted: {', '.join(deleted)}",
        f"The store contains {format_count(count, 'caption')}. To re-encode the deleted captions, run `llm2clip embed`",
    ]


def _merge_stores(args: Namespace) -> list[str]:
    check_output_folder(args.out, "store")
    check_stores_exist(*args.folders)
    from llm2clip.store.maintenance import merge_stores

    store = merge_stores(args.out, args.folders)
    return [f"{args.out}: {format_count(len(store), 'caption')}"]
