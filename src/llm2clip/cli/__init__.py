"""The command: what is typed, room by room. Heavy imports wait until a verb runs, so that help is instant."""

from __future__ import annotations

import logging
import os
import sys

from jsonargparse import ArgumentParser

from llm2clip.cli import evaluate as evaluating
from llm2clip.cli import export as models
from llm2clip.cli import llava
from llm2clip.cli import search as searching
from llm2clip.cli import setup as starting
from llm2clip.cli import train as training
from llm2clip.cli.commands import Commands, HelpFormatter, Run

ABOUT = """Give any CLIP a large language model's understanding of text.

In the order of things:

  llm2clip doctor                         is this machine ready? what is missing, and what to do
  llm2clip quickstart                     see it work on a small real data set
  llm2clip fit DATA --out RUN             your own pictures and captions: all stages below, in one run
  llm2clip tune | embed | align           one stage at a time
  llm2clip evaluate MODEL DATA
  llm2clip index PHOTOS --model MODEL --out INDEX    then: search INDEX "a whole sentence", serve --index INDEX
  llm2clip reproduce SETS                 does the paper hold? its claims, tested
  llm2clip plan --config RECIPE --images N --device h100     what all that would take, before it runs
  llm2clip store verify | repair | merge | export | import
  llm2clip convert CHECKPOINT --out MODEL   published LLM2CLIP checkpoints, and back
  llm2clip export MODEL --to FORM --out FOLDER   for transformers, sentence-transformers, ONNX, open_clip; push
  llm2clip llava build | train | evaluate   the vision tower inside a multimodal LLM

DATA is a .jsonl, .csv, .tsv or .parquet file, a folder of images with captions beside them, webdataset tars, or
hf:NAME. DATA@train+none takes only some splits. Every verb takes --config FILE.yaml and dotted overrides such as
--align.epochs 20, and goes on where it was stopped when the same command is given again. A verb's help shows the
settings that matter most; --print_config shows all."""


def build() -> tuple[ArgumentParser, dict[str, Run]]:
    """The parser, and what each verb runs."""
    parser = ArgumentParser(  # all verbs' are like it: without abbreviations, a misspelt setting is not another
        prog="llm2clip", description=ABOUT, formatter_class=HelpFormatter, allow_abbrev=False
    )
    commands = Commands(parser, "VERB")
    for room in (starting, training, evaluating, searching, models, llava):
        room.add(commands)
    return parser, commands.run


def main(args: list[str] | None = None) -> int:
    """Run the command; returns the exit status. Errors that a user can mend are one message, not a traceback."""
    parser, run = build()
    given = parser.parse_args(args)
    try:
        settings = parser.instantiate(given)
    except ValueError as error:  # a setting that makes no sense
        parser.error(str(error))
    verb = settings.subcommand
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it speaks of kernels not used here
    try:
        goodbye = run[verb](settings[verb])
        from llm2clip.distributed import print_once, shutdown

        print_once(*goodbye)
        shutdown()
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        if os.environ.get("LLM2CLIP_TRACEBACK"):
            raise
        print(f"llm2clip {verb}: {error}\n(LLM2CLIP_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1
    return 0
