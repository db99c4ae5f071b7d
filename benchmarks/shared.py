"""Arguments, tables, captions, JSONL files, llm2clip commands and search servers for benchmarks."""

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm2clip.io_utils import atomic_write_jsonl


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that prints the description of a script with its line breaks."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def print_header(*columns: str) -> None:
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def print_row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_table(file: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a Markdown table to a file, and print it."""
    text = format_table(header, rows)
    file.write_text(text)
    print(f"\n{file}\n{text}", flush=True)


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSONL file."""
    with file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def split_sentences(text: str) -> list[str]:
    """Split a text into sentences at full stops, exclamation marks and question marks."""
    return re.split(r"(?<=[.!?])\s+", text.strip())


def split_paragraphs(data: Path, split: str) -> Iterator[dict[str, Any]]:
    """Yield the two halves of each paragraph of a split as captions."""
    for row in read_rows(data / "stanford_paragraphs_text/captions.jsonl"):
        sentences = split_sentences(row["long_captions"][0])
        middle = len(sentences) // 2
        if middle and row["split"] == split:
            yield {"id": row["id"], "captions": [" ".join(sentences[:middle]), " ".join(sentences[middle:])]}


def pair_languages(data: Path, language: str) -> Iterator[dict[str, Any]]:
    """Yield a caption in another language and an English caption of each image in Flickr8k's test split."""
    for row in read_rows(data / "flickr8k_text/captions.jsonl"):
        if row.get(f"captions_{language}"):
            yield {"id": row["id"], "captions": [row[f"captions_{language}"][0], row["captions"][0]]}


def write_rows_once(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows to a JSONL file unless the file already exists. Return its path."""
    if not file.exists():
        atomic_write_jsonl(file, rows)
    return file


def run_llm2clip(command: Sequence[str], log: Path) -> None:
    """Run an `llm2clip` command and append its output to a log file. Exit with a message if the command fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        process = subprocess.run([sys.executable, "-m", "llm2clip", *command], stdout=output, stderr=output)
    if process.returncode:
        raise SystemExit(f"command failed (see {log}): llm2clip {shlex.join(command)}")


def make_flags(section: str, settings: Mapping[str, object]) -> list[str]:
    """Return the command-line flags of settings of a section, such as `--align.epochs=1`."""
    return [f"--{section}.{name}={value}" for name, value in settings.items()]


def format_median(values: Sequence[float], number_format: str = ",.0f") -> str:
    """Return the median, and the minimum and maximum in parentheses."""
    median, low, high = (format(x, number_format) for x in (statistics.median(values), min(values), max(values)))
    return f"{median} ({low} to {high})"


def format_mean_std(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}"


def start_server(
    index: str | None, token: str, port: int = 0, flags: Sequence[str] = ("--precision", "fp32")
) -> tuple[subprocess.Popen[str], int]:
    """Start `llm2clip serve` on a port (0 means any free port), and return its process and port."""
    arguments = [*([index] if index else []), "--port", str(port), *flags]
    command = [sys.executable, "-m", "llm2clip", "serve", *arguments]
    environment = {**os.environ, "LLM2CLIP_TOKEN": token}
    # The server's error messages are discarded, because a full pipe that is never read would block the server.
    server = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert server.stdout is not None
    for line in server.stdout:
        if match := re.match(r"Serving at http://127.0.0.1:(\d+)/", line):
            threading.Thread(target=server.stdout.read, daemon=True).start()
            return server, int(match[1])
    raise SystemExit(f"the server stopped with exit status {server.wait()}")
