"""Run the `llm2clip` commands of the README, the tutorial and the how-to guides on a few photos.

    python benchmarks/docs_commands.py DATA/flickr8k/captions.jsonl --out /tmp/commands

The tests parse all documented commands and run many of them with tiny models. This script also runs those that train,
export and serve, with the weights that the quickstart downloads. `fit` gets the config `cpu`, if it has no config, and
trains for one epoch. A command with a reason in `SKIPPED` is not run.
"""

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from shared import make_parser, print_header, print_row

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs/tutorial.md", *sorted(ROOT.glob("docs/howto/*.md"))]
SKIPPED = {
    "^(?!plan ).*(llama|siglip2|nv-embed|SmolVLM|SmolLM2-135M-Instruct|openai/clip)": "needs a model hub",
    r"localhost:|https://HOST|^caption |--server|--immich_upstream": "needs another server",
    "^push": "needs a model hub account",
    "--benchmarks": "needs benchmark files",
    r"postgresql://|s3://|\.parquet|annotations/": "needs other data or a database",
    r"short_captions=|ray|^align |^store |^embed |^convert ": "needs the files of an earlier stage",
    "^llava|blip_": "needs an LLM of another size",
    r" /shared/| /photos/|--model /model|@test": "has paths of an example",
    "--dim 128|DATA[.]{3}": "has dimensions or names of an example",
}
MODELS = ("MODEL", "RUN/model", "STUDENT/model", "runs/photos/model")  # names of the trained model in the pages
FOLDERS = ("PHOTOS", "photos", "some_photos", "DATA")
PHOTOS = 200


def find_commands(page: Path) -> Iterator[str]:
    """Yield the arguments of each llm2clip command in the code blocks of a page."""
    for block in re.findall(r"^ *```\w*\n(.*?)^ *```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            match = re.search(r"^\s*llm2clip +([a-z]+(?: .*)?)$", line)
            if match:
                yield shlex.join(shlex.split(match[1], comments=True))


def create_workspace(captions: Path, folder: Path) -> None:
    """Create the files that the pages name, from the first photos of a JSONL file."""
    with captions.open() as file:
        records = [json.loads(line) for _, line in zip(range(PHOTOS), file, strict=False)]
    for name in FOLDERS:
        (folder / name).mkdir(parents=True)
        for record in records:
            shutil.copy(captions.parent / record["image"], folder / name)
    names = [Path(record["image"]).name for record in records]
    for file_name, images in (("DATA/captions.jsonl", ""), ("captions.jsonl", "photos/"), ("photos.jsonl", "photos/")):
        with (folder / file_name).open("w") as lines:
            for name, record in zip(names, records, strict=True):
                lines.write(json.dumps({"image": images + name, "captions": record["captions"]}) + "\n")
    with (folder / "photos.csv").open("w", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(["image", "caption"])
        for name, record in zip(names, records, strict=True):
            writer.writerows((f"photos/{name}", caption) for caption in record["captions"])
    for name in ("mine.jsonl", "multi.jsonl"):
        shutil.copy(folder / "captions.jsonl", folder / name)
    for name in ("cat.jpg", "sunset.jpg", "beach.jpg"):
        shutil.copy(folder / "photos" / names[0], folder / name)
    (folder / "queries.txt").write_text("".join(record["captions"][0] + "\n" for record in records))
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"captions": record["captions"]}) + "\n" for record in records)
    )


def run(command: str, folder: Path) -> str:
    """Run a command in the workspace, and return its result for the table."""
    arguments = shlex.split(command)
    if "--out" in arguments and arguments[0] != "index":
        shutil.rmtree(folder / arguments[arguments.index("--out") + 1], ignore_errors=True)
    if arguments[0] == "fit":
        arguments += [*([] if "--config" in arguments else ["--config", "cpu"]), "--align.epochs", "1"]
    start = time.perf_counter()
    with (folder / "log.txt").open("a") as log:
        print(f"$ llm2clip {shlex.join(arguments)}", file=log, flush=True)
        try:
            timeout = 20 if arguments[0] == "serve" else None
            process = subprocess.run(
                [sys.executable, "-m", "llm2clip", *arguments], cwd=folder, stdout=log, stderr=log, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            return f"serves for {timeout} s"
    duration = f"{time.perf_counter() - start:.0f} s"
    return duration if process.returncode == 0 else f"**failed** with status {process.returncode}, {duration}"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("captions", type=Path, help="JSONL file with captioned photos")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the files of the examples")
    args = parser.parse_args()
    create_workspace(args.captions, args.out)
    setup = ["fit captions.jsonl --out runs/mine --config cpu", "index PHOTOS --model runs/mine/model --out INDEX"]
    print_header("page", "command", "result")
    for command in setup:
        print_row("all", f"`{command}`", run(command, args.out))
    for name in MODELS:
        shutil.copytree(args.out / "runs/mine/model", args.out / name)
    for page in PAGES:
        for command in dict.fromkeys(find_commands(page)):
            reasons = [reason for pattern, reason in SKIPPED.items() if re.search(pattern, command)]
            print_row(page.name, f"`{command}`", f"not run: {reasons[0]}" if reasons else run(command, args.out))


if __name__ == "__main__":
    main()
