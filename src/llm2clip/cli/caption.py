"""Captioning with a multimodal model: `llm2clip caption` and `fit --caption`."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from jsonargparse import Namespace

from llm2clip.caption.options import CaptionOptions, format_connection_error
from llm2clip.cli.checks import check_data_sources, check_path_can_be_created, resolve_model_name
from llm2clip.cli.commands import (
    ArgumentParser,
    CommandGroup,
    add_data_reading_arguments,
    add_dataclass_flags,
    format_command,
    make_options_from_args,
)
from llm2clip.io_utils import require_extra
from llm2clip.runs.output_folder import has_outputs

CAPTIONS_FILE = "captions.jsonl"  # file in the run directory to which `fit --caption` writes captions


def add_commands(commands: CommandGroup) -> None:
    parser = commands.add(
        "caption", _run_caption, "Caption images with a multimodal model. Run the command again to resume."
    )
    parser.add_argument("data", nargs="+", type=str, help="Image sources, with or without captions.")
    parser.add_argument("--out", type=str, required=True, help="JSON Lines file to which the captions are written.")
    parser.add_argument(
        "--model",
        type=str,
        required=True,
        help="Name of the model on the server at --endpoint. Without --endpoint: folder or hub id of a transformers "
        "image-text-to-text model, which runs in this process.",
    )
    add_dataclass_flags(parser, CaptionOptions, skip={"columns", "max_skipped"})
    add_data_reading_arguments(parser)


def _run_caption(args: Namespace) -> list[str]:
    require_extra("caption", "`caption`")
    check_data_sources(args, require_captions=False)
    options = make_options_from_args(CaptionOptions, args)
    if options.endpoint is None and args.model.startswith(("http://", "https://")):
        raise ValueError(f"--model {args.model} is a URL. Pass the URL to --endpoint, and the model's name to --model")
    if options.check is not None:
        options.check = resolve_model_name(options.check)
    model = resolve_model_name(args.model, allow_revision=False) if options.endpoint is None else args.model
    out = Path(args.out).expanduser()
    if str(out) in args.data:
        raise ValueError(
            f"--out {args.out} is also the source. Pass the images as the source, or choose another output file"
        )
    check_path_can_be_created(args.out)
    _check_connection(options.endpoint, out)
    return [*_run_captioning(args.data, out, model, options), f"Next: {format_command('fit', out, '--out', 'RUN')}"]


def _check_connection(endpoint: str | None, out: Path) -> None:
    """Raise OSError if an http:// server cannot be reached. The check is skipped for resumed runs."""
    url = urlsplit(endpoint or "")
    if url.scheme != "http" or out.with_name(f"{out.name}.sqlite").exists():
        return
    try:
        socket.create_connection((url.hostname, url.port or 80), timeout=3).close()
    except (OSError, ValueError) as error:  # ValueError: the port is not a number
        raise OSError(format_connection_error(url.netloc.rpartition("@")[2], error)) from error


def _run_captioning(sources: Sequence[str], out: Path, model: str, options: CaptionOptions) -> list[str]:
    if options.endpoint is None:
        from llm2clip.llava.modeling_patches import register_llava_classes

        register_llava_classes()
    from llm2clip.caption.run import run_captioning

    return run_captioning(sources, out, model, options)


# ---- fit -------------------------------------------------------------------------------------------------------------


def add_caption_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--caption",
        type=str,
        help="Multimodal model that generates captions for the images before training: a model folder, a hub id or the "
        "URL of a server. The settings are the defaults of `llm2clip caption`. The output is OUT/captions.jsonl.",
    )
    parser.add_argument("--caption_model", type=str, help="Name of the model on the server at --caption.")


def prepare_captioning(args: Namespace) -> Callable[[], None] | None:
    """Check the caption arguments of `fit`, and make `args.data` refer to the generated captions.

    After a stage has written outputs, no more captions are generated, because a resumed run requires the same data.

    Returns:
        A function that generates and writes the captions, or None if no captions are needed.
    """
    is_server = (args.caption or "").startswith(("http://", "https://"))
    if args.caption_model and not is_server:
        raise ValueError(f"--caption_model requires the URL of a server in --caption (got {args.caption})")
    if not args.caption:
        return None
    require_extra("caption", "--caption")
    if is_server and not args.caption_model:
        raise ValueError(f"--caption {args.caption} is a URL. Pass the name of the server's model with --caption_model")
    _check_evaluation_fields(args)
    sources, columns = args.data, args.columns
    out = Path(args.out).expanduser() / CAPTIONS_FILE
    args.data, args.columns = [_select_caption_splits(out, sources)], {}
    if has_outputs(out.parent):
        if not out.exists():
            raise ValueError(f"{args.out} contains a run without --caption. Use another --out, or omit --caption")
        return None
    model = args.caption_model if is_server else resolve_model_name(args.caption, allow_revision=False)
    options = CaptionOptions(
        endpoint=args.caption if is_server else None, columns=columns, max_skipped=args.max_skipped
    )
    _check_connection(options.endpoint, out)

    def write_captions() -> None:
        from llm2clip.cpu_tuning import free_memory
        from llm2clip.runs.ranks import print_once

        print_once(*_run_captioning(sources, out, model, options))
        free_memory()

    return write_captions


def _check_evaluation_fields(args: Namespace) -> None:
    from llm2clip.data.records import CAPTION_FIELDS

    lost_fields = set(args.evaluate.fields) - set(CAPTION_FIELDS)
    if lost_fields and not args.evaluate.data:
        raise ValueError(
            f"with --caption, --evaluate.fields can contain only {', '.join(CAPTION_FIELDS)} (got "
            f"{', '.join(sorted(lost_fields))}). To evaluate other captions, pass their sources with --evaluate.data"
        )


def _select_caption_splits(captions: Path, sources: Sequence[str]) -> str:
    """Return the caption file as a source, with the same splits selected as in `sources`.

    Raises:
        ValueError: Some sources select splits, but others do not.
    """
    from llm2clip.data.records import Source

    parsed = [Source.parse(source) for source in sources]
    splits = dict.fromkeys(name for source in parsed for name in source.splits)
    if not splits:
        return str(captions)
    if not all(source.splits for source in parsed):
        raise ValueError(
            f"with --caption, select splits either in all data sources or in none of them (got "
            f"{', '.join(map(str, parsed))}). PATH@none selects the images without a split"
        )
    return f"{captions}@{'+'.join(splits)}"
