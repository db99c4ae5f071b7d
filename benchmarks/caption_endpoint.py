"""Caption images with a failing server, killing the command several times.

    python benchmarks/caption_endpoint.py

The server fails for 30% of the requests: error statuses, malformed, large and slow answers, and closed connections. The
command is killed with SIGKILL after equal parts of the work, and run again each time.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared import print_header, print_row

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))
from caption_fixtures import make_photos  # noqa: E402

IMAGES, KILLS = 1000, 5
CAPTIONS_PER_IMAGE = 3  # of the default prompts
CONCURRENCY = 8


@contextmanager
def start_server() -> Iterator[str]:
    """Start a server in a process of its own and yield its URL."""
    command = [sys.executable, str(TESTS / "caption_fixtures.py"), "--fault_rate", "0.3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def read_counts(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/counts") as response:
        counts: dict[str, Any] = json.load(response)
    return counts


def start_command(url: str, photos: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "llm2clip", "caption", str(photos), "--out", str(out), "--endpoint", url]
    command += ["--model", "tiny", "--concurrency", str(CONCURRENCY)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def measure_kills(folder: Path) -> None:
    """Kill and resume a run, and print how often each caption was requested."""
    photos, out = make_photos(folder / "photos", IMAGES), folder / "captions.jsonl"
    total = IMAGES * CAPTIONS_PER_IMAGE
    with start_server() as url:
        for kill in range(KILLS):
            process = start_command(url, photos, out)
            while len(read_counts(url)["answered"]) < total * (kill + 1) / (KILLS + 1):
                if process.poll() is not None:
                    raise RuntimeError(f"the command ended with status {process.returncode}")
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
        status = start_command(url, photos, out).wait()
        # Requests that failed after all retries are sent again by another run.
        while status == 0 and (folder / "captions_failures.jsonl").exists():
            status = start_command(url, photos, out).wait()
        counts = read_counts(url)
    answered = counts["answered"]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    complete = sum(len(row["captions"]) == 2 and len(row["long_captions"]) == 1 for row in rows)
    answers = sum(answered.values())
    columns = ("records with all captions", "requests", "captions", "answered twice")
    print_header(*columns, "most that could be answered twice")
    cells = (f"{complete:,} of {IMAGES:,}", f"{counts['requests']:,}", f"{len(answered):,} of {total:,}")
    print_row(*cells, answers - len(answered), KILLS * CONCURRENCY)


def main() -> None:
    os.environ["PYTHONPATH"] = str(TESTS.parent / "src")
    with tempfile.TemporaryDirectory() as folder:
        measure_kills(Path(folder))


if __name__ == "__main__":
    main()
