"""Acceptance script for GPUs: check the results on a GPU, and measure speed and memory compared with other libraries.

    python benchmarks/gpu.py --out results/gpu [--parts encode align] [--minutes 25] [--tiny]

All weights are random and all data are generated, so nothing is downloaded. If open_clip is missing, it is skipped.
The parts run in order of importance until the time is up:

    environment   versions, GPU, memory, and the matmul rate that this GPU reaches
    tests         the tests marked `gpu`, which compare the GPU with the CPU: embeddings, losses and a short fit
    encode        caption encoding with 135M, 1B and 8B LLMs, compared with SentenceTransformer.encode
    align         a step of ViT-B/16, L/14 and L/14-336 (eager, compiled, gradient caching), compared with open_clip
    tune          a step of 135M and 1B LLMs, compared with CachedMultipleNegativesRankingLoss
    losses        contrastive losses for 32,768 images, compared with open_clip (benchmarks/losses.py)
    data          images decoded per second by the loader of `align`
    search        search of a million vectors: on the GPU, and with the index on the CPU; recall relative to float64
    plan          memory and speed predicted by `llm2clip plan`, compared with the measurements of `align`

Each part runs in its own process with a time limit, so a part that fails or hangs does not affect the others. Each
measurement adds a row to OUT/PART.jsonl; after each part, OUT/results.md and OUT/results.json are rewritten.

--tiny uses tiny models and also works without a GPU, to test this script.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from shared import format_table, make_parser, read_rows

PARTS = {  # name -> time limit in seconds
    "environment": 90,
    "tests": 240,
    "encode": 420,
    "align": 480,
    "tune": 240,
    "losses": 180,
    "data": 120,
    "search": 150,
    "plan": 60,
}
REPOSITORY = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for tables, JSON and logs")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=25, help="time limit for all parts together")
    parser.add_argument("--tiny", action="store_true", help="tiny models; also works without a GPU")
    parser.add_argument("--run_part", choices=list(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run_part:
        run_part(args.run_part, args.out, args.tiny)
        return

    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    statuses: dict[str, str] = {}
    for part in args.parts:
        seconds_left = deadline - time.monotonic()
        if seconds_left < 5:
            statuses[part] = "not run: no time left"
            continue
        statuses[part] = start_part(part, args.out, args.tiny, min(PARTS[part], seconds_left))
        write_results(args.out, statuses)
        print(format_part(args.out, part, statuses[part]), flush=True)
    write_results(args.out, statuses)
    print(f"Results: {args.out / 'results.md'}, {args.out / 'results.json'}")


def start_part(part: str, out: Path, tiny: bool, limit: float) -> str:
    """Run one part in a new process group, which is killed after `limit` seconds. Return how the part ended."""
    (out / f"{part}.jsonl").unlink(missing_ok=True)
    command = [sys.executable, __file__, "--out", str(out), "--run_part", part, *(["--tiny"] if tiny else [])]
    start = time.monotonic()
    with (out / f"{part}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped after its time limit of {limit:.0f} s"
    if code:
        return f"failed with exit code {code}, see {part}.log"
    return f"completed in {time.monotonic() - start:.0f} s"


def run_part(part: str, out: Path, tiny: bool) -> None:
    """Run one part in this process. Each row is written to OUT/PART.jsonl as soon as it has been measured."""
    if part == "tests":
        run_gpu_tests(out)
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from gpu_parts import MEASUREMENTS, PartSettings

    settings = PartSettings(tiny=tiny, out=out)
    for row in MEASUREMENTS[part](settings):
        append_row(out / f"{part}.jsonl", row)
        print(row, flush=True)


def run_gpu_tests(out: Path) -> None:
    """Run the tests marked `gpu`. Without a GPU, they are skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "gpu", "tests/test_gpu.py", "-p", "no:xdist"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    print(result.stdout, result.stderr)
    append_row(out / "tests.jsonl", {"tests": result.stdout.strip().splitlines()[-1]})
    if result.returncode:
        raise SystemExit(result.returncode)


def append_row(file: Path, row: dict[str, Any]) -> None:
    with file.open("a") as lines:
        lines.write(json.dumps(row) + "\n")


def read_part(out: Path, part: str) -> list[dict[str, Any]]:
    file = out / f"{part}.jsonl"
    return list(read_rows(file)) if file.exists() else []


def write_results(out: Path, statuses: dict[str, str]) -> None:
    results = {part: {"status": status, "rows": read_part(out, part)} for part, status in statuses.items()}
    (out / "results.json").write_text(json.dumps(results, indent=1))
    tables = [format_part(out, part, status) for part, status in statuses.items()]
    (out / "results.md").write_text("\n".join(tables))


def format_part(out: Path, part: str, status: str) -> str:
    """Return the Markdown table of a part. The columns are all keys of the part's rows, in order of appearance."""
    rows = read_part(out, part)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[format_cell(row.get(name, "")) for name in columns] for row in rows]
    return f"## {part}\n\n{status}\n\n" + (format_table(columns, cells) if rows else "")


def format_cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value).replace("|", "/").replace("\n", " ")


if __name__ == "__main__":
    main()
