"""Command that shows what is in a data set: `llm2clip data`."""

from pathlib import Path

from jsonargparse import Namespace

from llm2clip.cli.checks import check_sources
from llm2clip.cli.commands import DATA_HELP, Commands, add_reading_arguments


def add_commands(commands: Commands) -> None:
    """Add this module's command."""
    parser = commands.add("data", _describe_data, "Show what is in your data before you train on it.")
    parser.add_argument("data", nargs="+", type=str, help=DATA_HELP)
    parser.add_argument("--report", type=str, help="HTML page to write, with plots and example images.")
    add_reading_arguments(parser, max_skipped=1.0)


def _describe_data(args: Namespace) -> list[str]:
    check_sources(args.data)
    page = None if args.report is None else Path(args.report).expanduser()
    if page is not None and page.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--report must be an .html file (got {args.report})")
    from llm2clip.tools.data_report import format_overview, inspect_data, write_page

    overview, table = inspect_data(args.data, args.columns, args.max_skipped)
    lines = [format_overview(overview)]
    if page is not None:
        write_page(page, overview, table)
        lines.append(f"Report: {page}")
    else:
        lines.append("To see plots and example images, add --report data.html")
    return lines
