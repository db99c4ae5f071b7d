"""Command that writes captions for images with a multimodal model: `llm2clip caption`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from llm2clip.cli.checks import check_sources, resolve_model
from llm2clip.cli.commands import (
    ArgumentParser,
    Commands,
    add_reading_arguments,
    format_column_flags,
    format_command,
    select_arguments,
)
from llm2clip.runs.output_folder import has_outputs

if TYPE_CHECKING:
    from llm2clip.caption.answers import Captioner
    from llm2clip.caption.prompts import Prompt
    from llm2clip.caption.run import CaptionSettings
    from llm2clip.models.dual_encoder import DualEncoder

CAPTIONS_FILE = "captions.jsonl"  # captions written by `fit --caption` in the run directory
BATCH_SIZE = 32  # number of images; smaller batches are slower on CPUs


def add_commands(commands: Commands) -> None:
    """Add this module's command."""
    parser = commands.add(
        "caption", _caption, "Caption images with a multimodal model. Run the command again to resume."
    )
    parser.add_argument("data", nargs="+", type=str, help="Image sources, with or without captions.")
    parser.add_argument("--out", type=str, required=True, help="JSON Lines file with the captions to write.")
    parser.add_argument(
        "--model",
        type=str,
        required=True,
        help="Name of the model on the server in --endpoint. Without --endpoint: folder or hub id of an "
        "image-text-to-text model of transformers, which runs in this process.",
    )
    parser.add_argument(
        "--endpoint",
        type=str,
        help="URL of a server with OpenAI's chat API, such as http://localhost:8000/v1. The images are sent to it. Its "
        "key is read from the environment variable LLM2CLIP_API_KEY.",
    )
    parser.add_argument(
        "--prompts", type=str, help="YAML file with prompts. Default: two short captions and a dense one per image."
    )
    parser.add_argument("--language", type=str, help='Language of the captions, such as "German".')
    parser.add_argument(
        "--use_captions",
        action="store_true",
        help="Give the first caption of each image in the source to the model, in prompts that contain {caption}.",
    )
    parser.add_argument(
        "--image_size", type=PositiveInt, default=768, help="Shrink images to at most this size, in pixels per side."
    )
    parser.add_argument(
        "--batch_size",
        type=PositiveInt,
        default=BATCH_SIZE,
        help="Number of images per batch. Not used with --endpoint.",
    )
    parser.add_argument(
        "--concurrency", type=PositiveInt, default=8, help="Number of requests to the server at the same time."
    )
    parser.add_argument(
        "--max_requests_per_minute", type=PositiveFloat, help="Limit on requests to the server. Default: no limit."
    )
    parser.add_argument(
        "--retries", type=NonNegativeInt, default=6, help="Number of further attempts after a failed request."
    )
    parser.add_argument(
        "--timeout", type=PositiveFloat, default=300.0, help="Maximum time for an answer of the server, in seconds."
    )
    parser.add_argument(
        "--price",
        nargs=2,
        type=float,
        metavar=("INPUT", "OUTPUT"),
        help="Price of a million input tokens and of a million output tokens, to show the cost.",
    )
    parser.add_argument(
        "--max_cost",
        type=PositiveFloat,
        help="Stop when the stored answers of this model have cost this much in total. Requires --price. Requests "
        "that have already been sent can exceed it.",
    )
    parser.add_argument(
        "--check",
        type=str,
        help="Dual encoder that compares each caption with its image: an llm2clip model, or any other model that "
        "`evaluate` accepts. Default: only the texts are checked.",
    )
    parser.add_argument(
        "--check_max_rank",
        type=float,
        default=0.25,
        help="Reject captions that more than this fraction of other images match better than their own image.",
    )
    add_reading_arguments(parser)


def _caption(args: Namespace) -> list[str]:
    check_sources(args.data)
    if args.max_cost is not None and args.price is None:
        raise ValueError("--max_cost requires --price INPUT OUTPUT")
    if args.price is not None and min(args.price) < 0:
        raise ValueError(f"--price must be two numbers of at least 0 (got {args.price[0]:g} {args.price[1]:g})")
    if not 0 <= args.check_max_rank <= 1:
        raise ValueError(f"--check_max_rank must be between 0 and 1 (got {args.check_max_rank:g})")
    from llm2clip.caption.prompts import load_prompts
    from llm2clip.caption.records import CaptionOutput
    from llm2clip.caption.run import CaptionSettings
    from llm2clip.runs.ranks import process_state

    if args.endpoint and process_state().num_processes > 1:
        raise ValueError(
            "--endpoint requires a single process, because --max_cost and --max_requests_per_minute hold per process. "
            "Run the command without torchrun. --concurrency sets the number of requests at the same time"
        )
    out = Path(args.out).expanduser()
    CaptionOutput(out).check()
    settings = CaptionSettings(
        columns=args.columns,
        max_skipped=args.max_skipped,
        use_captions=args.use_captions,
        image_size=args.image_size,
        max_cost=args.max_cost,
        price=None if args.price is None else (args.price[0], args.price[1]),
        language=args.language,
        max_rank=args.check_max_rank,
    )
    prompts = load_prompts(args.prompts, args.language, args.use_captions)
    open_encoder = _check_encoder(args.check)
    options = select_arguments(args, "concurrency", "max_requests_per_minute", "retries", "timeout")
    model = resolve_model(args.model) if args.endpoint is None else args.model
    captioner = _open_captioner(model, args.endpoint, args.batch_size, **options)
    lines = _caption_images(args.data, out, captioner, prompts, settings, open_encoder)
    return [*lines, f"Next: {format_command('fit', out, '--out', 'RUN')}"]


# ---- fit -------------------------------------------------------------------------------------------------------------


def add_fit_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `fit` for captions by a model."""
    parser.add_argument(
        "--caption",
        type=str,
        help="Let a multimodal model write captions for the images first: a model folder, a hub id or the URL of a "
        "server, with the defaults of `llm2clip caption`. The captions are written to OUT/captions.jsonl.",
    )
    parser.add_argument("--caption_model", type=str, help="Name of the model on the server in --caption.")
    parser.add_argument("--caption_prompts", type=str, help="YAML file with prompts for --caption.")
    parser.add_argument("--caption_language", type=str, help='Language of the new captions, such as "German".')
    parser.add_argument(
        "--caption_check", type=str, help="Dual encoder that compares the new captions with the images."
    )


def prepare_captions(args: Namespace) -> Callable[[], None] | None:
    """Check the arguments of `fit` for captions, and make the captions its data.

    After a stage has written outputs, the captions are not changed any more, because a resumed run needs the same data.

    Returns:
        A function that writes the captions, or None if there is nothing to write.
    """
    _check_fit_arguments(args)
    if not args.caption:
        return None
    sources, columns = args.data, args.columns
    out = Path(args.out).expanduser() / CAPTIONS_FILE
    args.data, args.columns = [_select_splits(out, sources)], {}
    if has_outputs(out.parent):
        if not out.exists():
            raise ValueError(f"{args.out} contains a run without --caption. Use another --out, or omit --caption")
        return None
    from llm2clip.caption.prompts import load_prompts
    from llm2clip.caption.run import CaptionSettings

    settings = CaptionSettings(columns=columns, max_skipped=args.max_skipped, language=args.caption_language)
    prompts = load_prompts(args.caption_prompts, args.caption_language)
    open_encoder = _check_encoder(args.caption_check)
    model, endpoint = args.caption_model, args.caption
    if not _is_url(args.caption):
        model, endpoint = resolve_model(args.caption), None

    def write_captions() -> None:
        import torch

        from llm2clip.cpu_tuning import free_memory
        from llm2clip.runs.ranks import print_once

        captioner = _open_captioner(model, endpoint)
        try:
            print_once(*_caption_images(sources, out, captioner, prompts, settings, open_encoder))
        except ValueError as error:
            if not isinstance(error.__cause__, torch.OutOfMemoryError):
                raise
            flags = [*format_column_flags(columns), "--out", out, "--model", model, *_format_caption_flags(args)]
            command = format_command("caption", *sources, *flags, "--batch_size", BATCH_SIZE // 4)
            raise ValueError(f"{error}. Run `{command}`, and then the same `fit` command again") from error
        free_memory()

    return write_captions


def _check_fit_arguments(args: Namespace) -> None:
    """Raise ValueError if arguments of `fit` do not fit together."""
    if not args.caption:
        for name in ("caption_model", "caption_prompts", "caption_language", "caption_check"):
            if args[name]:
                raise ValueError(f"--{name} requires --caption MODEL")
        return
    if _is_url(args.caption) and not args.caption_model:
        raise ValueError(f"--caption {args.caption} is a server. Pass the name of its model with --caption_model")
    if args.caption_model and not _is_url(args.caption):
        raise ValueError(f"--caption_model requires the URL of a server in --caption (got {args.caption})")
    from llm2clip.data.columns import CAPTION_FIELDS

    lost_fields = set(args.evaluate.fields) - set(CAPTION_FIELDS)
    if lost_fields and not args.evaluate.data:
        raise ValueError(
            f"--evaluate.fields: with --caption, the data has only the columns {', '.join(CAPTION_FIELDS)} (got "
            f"{', '.join(sorted(lost_fields))}). Pass the captions to evaluate on with --evaluate.data"
        )


def _format_caption_flags(args: Namespace) -> list[str]:
    """Return the flags of `caption` for the settings of `fit --caption`."""
    flags = ["--max_skipped", str(args.max_skipped)]
    for name in ("prompts", "language", "check"):
        if value := args[f"caption_{name}"]:
            flags += [f"--{name}", value]
    return flags


def _select_splits(captions: Path, sources: Sequence[str]) -> str:
    """Return the captions of the sources as a source with the same records in the selected splits.

    Raises:
        ValueError: Splits are selected in only some of the sources. The captions do not contain each record's source.
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


def _is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


# ---- shared ----------------------------------------------------------------------------------------------------------


def _open_captioner(model: str, endpoint: str | None, batch_size: int = BATCH_SIZE, **options: Any) -> Captioner:
    """Open a model on a server or, without an endpoint, in this process. `options` are for the server."""
    if endpoint is None:
        import llm2clip.llava.modeling_patches  # noqa: F401  (registers its classes with transformers)
        from llm2clip.caption.local import LocalCaptioner

        return LocalCaptioner(model, batch_size)
    from llm2clip.caption.endpoint import EndpointCaptioner
    from llm2clip.runs.ranks import print_once

    captioner = EndpointCaptioner(endpoint, model, **options)
    print_once(*captioner.describe())
    return captioner


def _check_encoder(name: str | None) -> Callable[[], DualEncoder] | None:
    """Check that the dual encoder of --check can be opened, and return a function that opens it."""
    if name is None:
        return None
    from llm2clip.cpu_tuning import free_memory
    from llm2clip.models.dual_encoder import open_dual_encoder
    from llm2clip.runs.ranks import process_state

    open_encoder = partial(open_dual_encoder, resolve_model(name), process_state().device)
    if process_state().is_main_process:
        open_encoder()  # it is needed only after captioning, which can take hours
        free_memory()
    return open_encoder


def _caption_images(
    sources: Sequence[str],
    out: Path,
    captioner: Captioner,
    prompts: Sequence[Prompt],
    settings: CaptionSettings,
    open_encoder: Callable[[], DualEncoder] | None,
) -> list[str]:
    """Caption images, and return lines that summarise the result."""
    from llm2clip.caption.records import CaptionOutput
    from llm2clip.caption.run import caption_images

    summary = caption_images(sources, out, captioner, prompts, settings, open_encoder)
    lines = [summary.report, ""] if summary.report else []
    lines += [
        f"Captions: {out} ({summary.captions:,} captions of {summary.records:,} records)",
        f"Report: {CaptionOutput(out).report}",
        summary.skipped,
    ]
    if summary.failures:
        lines.append(
            f"Failed requests: {summary.failures:,}, listed in {CaptionOutput(out).failures}. To ask again, run the "
            "same command again"
        )
    return lines
