"""`tune`, `embed`, `align` and `index` after kill -9, after a simulated power failure, and when the clock is set back.

Each command is killed before a random write, rename, fsync or unlink in its output folder. Then the same command is run
again, once on the folder as it is, and once on a folder that a disk could contain after a power failure. Both results
must be equal to the result of an uninterrupted run. In two more runs, the clock is set back by an hour: while the
command runs, and between the kill and the second run. By hand, with 30 points per command:

    LLM2CLIP_POWER_CUTS=30 python -m pytest tests/test_power_cut.py -s

In the simulation, a file or folder certainly contains what it contained at its last fsync. All changes after this fsync
survive at random: each entry of a folder, and each block of a file, independently of all others.
"""

import ctypes
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
POINTS = int(os.environ.get("LLM2CLIP_POWER_CUTS", "1"))
BLOCK = 4096
STAGES = ("tune", "embed", "align", "index")


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("the simulation needs Linux and gcc")
    library = tmp_path_factory.mktemp("shim") / "power_cut.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, TESTS / "power_cut.c", "-ldl"], check=True)
    return library


def command(stage: str, data: Path, llm: Path, tower: Path, model_folder: Path, store: Path, out: Path) -> list[str]:
    arguments = {
        "tune": f"{data} --encoder.path {llm} --tune.steps 2 --tune.batch_size 8 --tune.save_steps 1",
        "embed": f"{data} --encoder.path {llm}",
        "align": f"{data}@train --store {store} --encoder.path {llm} --align.tower {tower} --align.image_size 64 "
        "--align.embed_dim 16 --align.epochs 1 --align.batch_size 15 --align.save_steps 1 --align.workers 0",
        "index": f"{data} --model {model_folder} --workers 0 --batch_size 4",
    }
    return [stage, *arguments[stage].split(), "--out", str(out)]


@pytest.fixture(scope="module")
def results(
    shim: Path,
    image_folder: Path,
    llm: Path,
    tower: Path,
    model_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """Results of all stages. One process runs them, so that the imports take place once."""
    from llm2clip.cli import main

    folder = tmp_path_factory.mktemp("power_cut")
    data, store, out = image_folder / "captions.jsonl", folder / "store", folder / "work" / "out"
    assert main(command("embed", data, llm, tower, model_folder, store, store)) == 0
    commands = [command(stage, data, llm, tower, model_folder, store, out) for stage in STAGES]
    plan = {"commands": commands, "points": POINTS, "shim": str(shim)}
    environment = {**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"}
    driver = [sys.executable, __file__, json.dumps(plan), str(folder / "work")]
    completed = subprocess.run(driver, env=environment, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return dict(json.loads(completed.stdout.splitlines()[-1]))


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_command_completes_an_interrupted_run(stage: str, results: dict[str, Any]) -> None:
    print(f"\n{stage}: {len(results[stage])} points, the result is the same")
    same = dict.fromkeys(["kill", "power", "clock after kill", "clock while running"], "same")
    assert results[stage] == [{"point": result["point"], "killed": True, **same} for result in results[stage]]
    assert len(results[stage]) == POINTS


# ---- driver: runs with the library, and forks a process for each run, so that the imports take place once ----------


class Driver:
    """Runs a command, kills it and compares the results."""

    def __init__(self, command: list[str], shim: str, work: Path) -> None:
        self.command, self.work, self.out = command, work, work / "out"
        self.durable = work / "durable"  # copies of what has been flushed, written by the library
        self.library = ctypes.CDLL(shim)
        self.random = random.Random(command[0])

    def test(self, points: int) -> list[dict[str, Any]]:
        """Kill the command at random points, and resume it. Return a dict for each point."""
        self.empty(self.out)
        assert self.run() == 0, self.log()
        calls = int((self.work / "calls").read_text())
        expected = digest(self.command[0], self.out)
        results = []
        for point in sorted(self.random.sample(range(1, calls + 1), points)):
            self.empty(self.out)
            killed = self.run(point) == -signal.SIGKILL
            survivor = self.work / "survivor"
            self.empty(survivor)
            if self.out.exists():
                paths = {self.key(path): path for path in self.out.rglob("*")}
                self.survive(self.key(self.out), self.out, survivor, paths)
            interrupted = self.work / "interrupted"
            self.empty(interrupted)
            if self.out.exists():
                shutil.copytree(self.out, interrupted)
            result = {"point": point, "killed": killed, "kill": self.resume(expected)}
            self.replace_output(survivor)
            result["power"] = self.resume(expected)
            self.replace_output(interrupted)
            self.library.make_newer(str(self.out).encode())
            result["clock after kill"] = self.resume(expected)
            self.empty(self.out)
            result["clock while running"] = self.resume(expected, set_back_at=point)
            results.append(result)
        return results

    def replace_output(self, folder: Path) -> None:
        """Move `folder`, if it exists, to the output folder."""
        self.empty(self.out)
        if folder.exists():
            folder.rename(self.out)

    def resume(self, expected: str, set_back_at: int = 0) -> str:
        """Run the command again. Return "same" if its result is the expected one."""
        code = self.run(set_back_at=set_back_at)
        if code:
            return f"exit status {code}: {self.log()}"
        return "same" if digest(self.command[0], self.out) == expected else "another result"

    def run(self, kill_at: int = 0, set_back_at: int = 0) -> int:
        """Run the command in a new process, and return its exit status.

        Args:
            kill_at: Number of the observed call before which the process is killed. 0: never.
            set_back_at: Number of the observed call before which the clock is set back by an hour. 0: never.
        """
        self.empty(self.durable)
        self.durable.mkdir()
        process = os.fork()
        if process == 0:
            log = os.open(self.work / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            folders = [str(folder).encode() for folder in (self.out, self.durable)]
            self.library.observe(*folders, ctypes.c_long(kill_at), ctypes.c_long(set_back_at))
            code = 99
            try:
                code = main(self.command)
            finally:
                (self.work / "calls").write_text(str(self.library.count_calls()))
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    def survive(self, key: str, folder: Path | None, target: Path, paths: dict[str, Path]) -> None:
        """Write to `target` what could survive of a folder. `folder` is None if it has been removed since its fsync."""
        target.mkdir()
        flushed: dict[str, tuple[str, bool]] = {}
        if (self.durable / key).exists():
            for line in (self.durable / key).read_text().splitlines():
                entry_key, is_folder, name = line.split(" ", 2)
                flushed[name] = entry_key, is_folder == "1"
        current = {path.name: (self.key(path), path.is_dir()) for path in folder.iterdir()} if folder else {}
        for name in sorted(flushed.keys() | current.keys()):
            entry = self.random.choice([flushed.get(name), current.get(name)])
            if entry is None:
                continue
            entry_key, is_folder = entry
            if is_folder:
                self.survive(entry_key, paths.get(entry_key), target / name, paths)
            else:
                (target / name).write_bytes(self.surviving_content(entry_key, paths.get(entry_key)))

    def surviving_content(self, key: str, path: Path | None) -> bytes:
        flushed = (self.durable / key).read_bytes() if (self.durable / key).exists() else b""
        current = flushed if path is None else path.read_bytes()
        if flushed == current:
            return current
        sizes = sorted((len(flushed), len(current)))
        size = self.random.choice([*sizes, self.random.randint(*sizes)])
        blocks = [
            self.random.choice([flushed, current])[start : start + BLOCK].ljust(BLOCK, b"\0")
            for start in range(0, size, BLOCK)
        ]
        return b"".join(blocks)[:size]

    def key(self, path: Path) -> str:
        buffer = ctypes.create_string_buffer(128)
        assert self.library.key_of(str(path).encode(), buffer, len(buffer)) == 0
        return buffer.value.decode()

    def log(self) -> str:
        return (self.work / "log").read_text(errors="replace")[-3000:]

    def empty(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)


def digest(stage: str, out: Path) -> str:
    """Return a hash of the result of a command."""
    total = hashlib.sha256()
    if stage == "index":
        database = sqlite3.connect(out / "index.sqlite")
        query = """SELECT name, location, captions, file_version, hash, vector, jpeg
            FROM images JOIN contents ON contents.id = content JOIN thumbnails ON thumbnails.id = content
            ORDER BY name"""
        for row in database.execute(query):
            total.update(repr(row).encode())
        database.close()
    for path in sorted([*out.rglob("*.safetensors"), *out.glob("embeddings-*"), *out.glob("keys-*")]):
        if "checkpoints" not in path.parts:
            total.update(f"{path.relative_to(out)} {hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
    return total.hexdigest()


if __name__ == "__main__":
    # ruff: noqa: F401
    import gc

    import torch
    import transformers.models.llama.modeling_llama
    from PIL import Image

    import llm2clip.data.formats.csv_files
    import llm2clip.data.formats.image_files
    import llm2clip.data.formats.tables
    import llm2clip.evaluate.retrieval
    import llm2clip.search.build
    from llm2clip import pipeline
    from llm2clip.cli import main

    torch.set_num_threads(1)
    pipeline.embed_locally = functools.partial(pipeline.embed_locally, shard_size=40)  # several shards
    plan = json.loads(sys.argv[1])
    Path(sys.argv[2]).mkdir()
    Image.init()
    gc.freeze()  # otherwise garbage collection takes most of the time of the runs
    drivers = [Driver(arguments, plan["shim"], Path(sys.argv[2])) for arguments in plan["commands"]]
    print(json.dumps({driver.command[0]: driver.test(plan["points"]) for driver in drivers}))
