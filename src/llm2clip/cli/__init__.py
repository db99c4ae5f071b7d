"""The command `llm2clip`. Slow imports are deferred until a command runs, so that `--help` is fast."""

import logging
import os
import sys
import traceback
import warnings
from functools import cache

from llm2clip import __version__
from llm2clip.cli import caption, evaluate, export, llava, search, serve, tools, train
from llm2clip.cli.commands import ArgumentParser, CommandFunction, CommandGroup, HelpFormatter

DESCRIPTION = """Give a CLIP model a large language model's understanding of text.

Getting started:
  llm2clip doctor                       check this machine and explain how to fix any problems
  llm2clip quickstart                   train on a small, real dataset

Training on your own images and captions:
  llm2clip data DATA                    show what is in your data
  llm2clip caption PHOTOS --model NAME --out captions.jsonl    generate captions with a multimodal model
  llm2clip plan --config NAME --images N --device h100    estimate training time and memory
  llm2clip fit DATA --out RUN           all stages: tune, embed, align, evaluate
  llm2clip tune | embed | align         one stage at a time
  llm2clip distill MODEL DATA --student NAME --out STUDENT    replace the LLM with a small text encoder
  llm2clip store                        check, repair and merge embedding stores
  llm2clip configs [NAME]               list the built-in configs, or print one
  llm2clip runs [FOLDER]                list runs with their state, progress and result

Using a model:
  llm2clip evaluate MODEL DATA          measure retrieval on your data or on public benchmarks
  llm2clip benchmarks                   list the public benchmarks that `evaluate` supports
  llm2clip index PHOTOS --out INDEX     make images searchable, with your own model (--model) or a small CLIP
  llm2clip search INDEX "a full sentence"    search by text or image; with --server URL, on a running `serve`
  llm2clip serve INDEX                  search page and API over HTTP
  llm2clip export MODEL --to FORMAT --out FOLDER    transformers, sentence-transformers, ONNX, gallery
  llm2clip convert CHECKPOINT --out MODEL           import a published LLM2CLIP checkpoint
  llm2clip push MODEL REPO              upload a model to the hub
  llm2clip llava build | train                      use the vision tower in a multimodal LLM

Run `llm2clip COMMAND --help` for the options of a command.

DATA is a .jsonl, .csv, .tsv or .parquet file, a folder of images with captions next to them, webdataset tars, a URL of
one of these (s3://, gs://, hf://, https://), or hf:NAME. DATA@train+none selects the splits `train` and `none`. Every
command accepts --config FILE_OR_NAME and dotted overrides such as --align.epochs 20. To resume an interrupted command,
run it again."""


@cache  # building the parser takes 0.3 s
def build_parser() -> tuple[ArgumentParser, dict[str, CommandFunction]]:
    """Return the argument parser and a dict that maps each command name to the function that runs it."""
    parser = ArgumentParser(
        prog="llm2clip",
        version=__version__,
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
        allow_abbrev=False,  # argparse would otherwise accept misspelt settings as abbreviations
    )
    commands = CommandGroup(parser, is_listed=False)  # the description lists the commands
    for module in (tools, caption, train, evaluate, search, serve, export, llava):
        module.add_commands(commands)
    return parser, commands.run


def silence_library_warnings() -> None:
    # transformers warns about layers without tensor parallelism, which llm2clip does not use.
    logging.getLogger("transformers.distributed.tensor_parallel").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.|torch\.|accelerate\.")


def main(args: list[str] | None = None) -> int:
    """Run a command and return its exit status. Errors that users can fix are printed without a traceback."""
    try:
        return _run_command(args)
    except KeyboardInterrupt:  # Ctrl-C may also be pressed while the parser is built
        print("\nInterrupted. Run the same command again to resume.", file=sys.stderr)
        return 130


def _run_command(args: list[str] | None) -> int:
    parser, run = build_parser()
    if not (sys.argv[1:] if args is None else args):
        parser.print_help()
        return 0
    parsed = parser.parse_args(args)
    try:
        settings = parser.instantiate(parsed)
    except ValueError as error:  # a setting is out of range
        parser.error(str(error))
    command = settings.subcommand
    try:
        silence_library_warnings()
        _print_closing_lines(run[command](settings[command]))
    except BrokenPipeError:  # the program reading the output, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        if os.environ.get("LLM2CLIP_TRACEBACK"):
            raise
        from llm2clip.io_utils import escape_control_characters

        name = f"{command} {settings[command].get('subcommand') or ''}".rstrip()  # for example, `store verify`
        print(f"llm2clip {name}: {escape_control_characters(str(error))}", file=sys.stderr)
        # Error messages of libraries may be unclear.
        if not _was_raised_in_packages({"llm2clip", *sys.stdlib_module_names}, error):
            print("(set LLM2CLIP_TRACEBACK=1 to see the traceback)", file=sys.stderr)
        return 1
    except RuntimeError as error:
        from llm2clip.runs.ranks import PEER_FAILED, is_distributed

        if is_distributed() and PEER_FAILED not in str(error):
            error.add_note(f"Possible cause, if a collective operation raised this error: {PEER_FAILED}")
        raise
    return 0


def _print_closing_lines(lines: list[str]) -> None:
    if "torch" in sys.modules:
        from llm2clip.runs.ranks import print_once, shut_down_process_group

        print_once(*lines)
        shut_down_process_group()
    elif lines:  # avoids importing PyTorch, which takes seconds
        from llm2clip.io_utils import escape_control_characters

        print(escape_control_characters("\n".join(lines)), flush=True)


def _was_raised_in_packages(packages: set[str], error: BaseException) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__")).partition(".")[0] in packages
