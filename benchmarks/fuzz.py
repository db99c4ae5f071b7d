"""Fuzz test of the readers: mutated images, caption files, tables, tar files and model configs.

A reader may accept an input, or reject it with an exception that it documents. Each reader runs in its own process with
limits on memory and on CPU time per input. The table shows how many inputs were read, were rejected, or failed with
another exception, a crash or an exceeded limit. The failures are printed to stderr. `tests/test_formats.py` runs this
test on a few inputs.

    python benchmarks/fuzz.py [--readers NAME ...] [--count 100000] [--seconds 600]
"""

import copy
import csv
import gzip
import io
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file

from llm2clip.data.images import ImageError, decode_image
from llm2clip.data.pairs import read_text_pairs
from llm2clip.data.records import open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.model_folder import LLM2CLIPConfig, is_model_folder
from llm2clip.models.official_layout import read_official_checkpoint
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.search.metadata import read_exif
from measurements import memory_mb
from shared import make_parser, print_header, print_row

MEMORY_LIMIT = 2 << 30  # address space in bytes, in addition to the imported libraries
TIME_LIMIT = 10.0  # CPU seconds per input
MAX_FAILURES = 20  # number of failures to print per reader
# Exceptions that no reader raises on purpose. They are also searched for in messages about skipped rows.
UNEXPECTED = re.compile(r"\b(?:Type|Key|Index|Attribute|Memory|Recursion|Overflow|Runtime|Unicode\w+)Error: .*")
NUMBERS = (0, 1, 2, 127, 128, 255, 4096, 65535, 1 << 31, (1 << 32) - 1)
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 1e400, float("nan"), 10**400, "", " ", "\0", "\ud800", "x.png", "../x.png", "/dev/zero",
    "https://x.org/a.jpg", "train", "long " * 2000, [], {}, [[]], [None], [{}], {"bytes": None, "path": []}, ["a", "b"],
    "[f'{1}']", "[{1,{2}}]", "['a', None]",
)  # fmt: skip
TOKENS = (
    b'"', b"'", b",", b";", b"\t", b"|", b"\n", b"\r\n", b"\r", b"\0", b"\\", b"{", b"}", b"[", b"]", b":", b"\xff",
    b"\xef\xbb\xbf", b"\xff\xfe", b"sep=;\n", b"NaN", b"null", b"1e999", b"9" * 5000, b"[" * 3000, b"x" * 70000,
    b"[f'{1}']", b"['a', 'b']", b"[{1,{2}}]", b"\xed\xa0\x80", "\u2028é一".encode(), b"caption", b"image", b"split",
)  # fmt: skip


# ---- mutations -----------------------------------------------------------------------------------------------------


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Change, insert, delete or repeat a few bytes, most often near the start or the end of the data."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        end = len(result)
        near = rng.randrange(min(end, 300))
        position = rng.choice((rng.randrange(end), near, end - 1 - near))
        kind = rng.random()
        if kind < 0.5:
            result[position] = rng.choice((0, 255, 127, 128, rng.randrange(256)))
        elif kind < 0.7:
            result[position : position + 4] = struct.pack(rng.choice("<>") + "I", rng.choice(NUMBERS))
        elif kind < 0.8:
            del result[position : position + rng.randrange(1, 20)]
        elif kind < 0.9:
            result[position:position] = rng.randbytes(rng.randrange(1, 20))
        else:
            result[position:position] = result[max(0, position - 40) : position]
        if rng.random() < 0.02:
            del result[position:]
        result = result or bytearray(b"x")
    return bytes(result)


def mutate_text(data: bytes, rng: random.Random) -> bytes:
    """Insert tokens that have a meaning in caption files, or change bytes."""
    if rng.random() < 0.4:
        return mutate_bytes(data, rng)
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        position = rng.randrange(len(result) + 1)
        length = rng.choice((0, 0, 1, 8))
        result[position : position + length] = rng.choice(TOKENS)
    return bytes(result)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Replace, remove or rename values in a JSON document, or mutate it as text."""
    if rng.random() < 0.3:
        return mutate_text(data, rng)
    lines = [json.loads(line) for line in data.splitlines()]
    for _ in range(rng.choice((1, 1, 2, 4))):
        parents: list[Any] = [lines]
        for parent in parents:
            children = parent.values() if isinstance(parent, dict) else parent
            parents += [child for child in children if isinstance(child, dict | list) and child]
        parent = rng.choice(parents)
        key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        if rng.random() < 0.8:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
        elif isinstance(parent, dict):
            parent[rng.choice(("id", "image", "captions", "split", "file_name", "x"))] = parent.pop(key)
        elif len(parent) > 1:
            del parent[key]
    return "\n".join(json.dumps(line) for line in lines).encode() + b"\n"


def mutate_parquet(data: bytes, rng: random.Random) -> bytes:
    """Change a few bytes, mostly without shifting other bytes, because a Parquet file contains many offsets."""
    if rng.random() < 0.2:
        return mutate_bytes(data, rng)
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2))):
        result[rng.randrange(4, len(result) - 8)] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    return bytes(result)


def mutate_tar(data: bytes, rng: random.Random) -> bytes:
    """Mutate a tar file, and usually update its header checksums."""
    result = bytearray(mutate_bytes(data, rng)) if rng.random() < 0.5 else bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        header = 512 * rng.randrange(max(1, len(result) // 512))
        start = header + rng.choice((0, 100, 124, 136, 156, 157, 257, 345, rng.randrange(512)))
        value = rng.choice((b"\xff" * 8, b"\0", b"77777777777", b"x", b"L", b"S", b"g", b"0", b"\x80" + bytes(10)))
        result[start : start + len(value)] = value
        if rng.random() < 0.8 and len(result) >= header + 512:
            block = bytes(result[header : header + 512])
            checksum = 256 + sum(block[:148]) + sum(block[156:])
            result[header + 148 : header + 156] = b"%06o\0 " % checksum
    return bytes(result)


def mutate_image(data: bytes, rng: random.Random) -> bytes:
    """Mutate an image, sometimes within its EXIF data. The checksums of PNG chunks are usually updated."""
    result = mutate_bytes(data, rng)
    exif = re.search(rb"Exif\0\0|EXIF|eXIf", result)
    if exif and rng.random() < 0.3:
        end = min(len(result), exif.end() + 200)
        result = result[: exif.end()] + mutate_bytes(result[exif.end() : end] or b"x", rng) + result[end:]
    if result.startswith(b"\x89PNG") and rng.random() < 0.8:
        fixed, position = bytearray(result), 8
        while position + 12 <= len(fixed):
            end = position + 8 + int.from_bytes(fixed[position : position + 4], "big")
            if end + 4 > len(fixed):
                break
            fixed[end : end + 4] = struct.pack(">I", zlib.crc32(fixed[position + 4 : end]))
            position = end + 4
        result = bytes(fixed)
    return result


# ---- seeds ---------------------------------------------------------------------------------------------------------


def image_seeds() -> list[bytes]:
    """Return small images in all formats and modes, with and without EXIF data."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x8825] = 6, "x" * 50, {1: "N", 2: (1.0, 2.0, 3.0)}
    exif[0x8769] = {0x9003: "2020:01:01 00:00:00"}
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True}),
        ("GIF", {}), ("BMP", {}), ("AVIF", {}), ("PPM", {}), ("TIFF", {}),
    ]  # fmt: skip
    kinds += [("TIFF", {"compression": name}) for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "group4")]
    try:
        import pillow_heif
    except ImportError:
        pass
    else:
        pillow_heif.register_heif_opener()
        kinds.append(("HEIF", {}))
    noise = Image.effect_noise((48, 32), 80).convert("RGB")
    seeds = []
    for mode in ("RGB", "L", "RGBA", "P", "1", "CMYK", "I;16", "LA"):
        for kind, options in kinds:
            for data in (None, exif.tobytes()):
                stream = io.BytesIO()
                try:
                    noise.convert(mode).save(stream, kind, **options, **({"exif": data} if data else {}))
                except Exception:  # the format does not support this mode
                    continue
                seeds.append(stream.getvalue())
    stream = io.BytesIO()
    noise.save(stream, "WEBP", save_all=True, append_images=[noise] * 3, exif=exif.tobytes())
    return [*seeds, stream.getvalue()]


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(stream, "PNG")
    return stream.getvalue()


ROWS: list[dict[str, Any]] = [
    {"id": "a", "image": "x.png", "captions": ["a cat", "一只猫"], "split": "train"},
    {"id": 2, "image": "x.png", "long_captions": "a dog that runs", "split": None, "phrases": ["a dog"]},
    {"id": "c", "image": {"bytes": None, "path": "x.png"}, "captions": 'one "two"', "boxes": [[1, 2, 3.5, 4]]},
]
PAIRS: list[dict[str, Any]] = [{"query": "q", "positive": "p", "negatives": ["n"], "instruction": "i"}] * 2
COCO: dict[str, Any] = {
    "images": [{"id": n, "file_name": "x.png", "coco_url": "http://x.org/train2017/x.png"} for n in (1, 2)],
    "annotations": [{"id": n, "image_id": n % 2 + 1, "caption": f"caption {n}"} for n in range(4)],
}
SENTENCES = [{"raw": "a dog", "tokens": ["a", "dog"]}, {"raw": "it runs"}]
KARPATHY: dict[str, Any] = {
    "dataset": "coco",
    "images": [
        {"filepath": ".", "filename": "x.png", "cocoid": n, "split": "train", "sentences": SENTENCES} for n in (1, 2)
    ],
}


def csv_seeds() -> list[bytes]:
    seeds = []
    for delimiter in ",;\t":
        stream = io.StringIO()
        writer = csv.writer(stream, delimiter=delimiter)
        writer.writerows([["image", "caption", "caption", "split"], ["x.png", "a cat", "it, sits", "train"]])
        writer.writerows([["x.png", "['a dog', \"it's\"]", "NaN", "val"], ["x.png", 'a "third"\nline', "", ""]])
        text = stream.getvalue()
        seeds += [text.encode(), text.encode("utf-16"), b"sep=;\n" + text.encode()]
    return [*seeds, b"image_name| comment\nx.png| Two men .\n", b"x.png,a cat\nx.png#1\ta dog\n"]


def parquet_seeds() -> list[bytes]:
    image = png()
    structs = pa.array([{"bytes": image, "path": "x.png"}, {"bytes": None, "path": "x.png"}, None])
    columns = {
        "image": [structs, pa.array([image] * 3), pa.array([image] * 3, pa.large_binary()), pa.array(["x.png"] * 3)],
        "caption": [
            pa.array(["a", "b", None]), pa.array([["a", "b"], [], None]), pa.array(["a"] * 3).dictionary_encode(),
            pa.array([1, 2, 3]), pa.array([{"a": "b"}] * 3), pa.array(["a"] * 3, pa.large_string()), pa.nulls(3),
            pa.array([[["a"]]] * 3), pa.array([1.5, None, 2]), pa.array(["a", "b", "c"]), pa.array(["é"] * 3),
        ],
        "split": [pa.array(["train", "val", None]), pa.array([b"x", b"\xff", None])],
    }  # fmt: skip
    rng = random.Random(0)
    seeds = []
    for number in range(40):
        names = [*columns, "caption"] if number % 8 == 7 else list(columns)
        table = pa.Table.from_arrays([rng.choice(columns[name]) for name in names], names=names)
        stream = io.BytesIO()
        compression = rng.choice(("none", "snappy", "zstd", "gzip"))
        version = rng.choice(("1.0", "2.6"))
        pq.write_table(table, stream, compression=compression, version=version, row_group_size=rng.choice((1, 3)))
        seeds.append(stream.getvalue())
    return seeds


def tar_seeds() -> list[bytes]:
    seeds = []
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=kind, pax_headers={"comment": "x"}) as tar:
            caption = json.dumps({"captions": ["a", "b"], "id": 7}).encode()
            for name, data in (("0.png", png()), ("0.txt", b"a cat"), ("b/1.png", png()), ("b/1.json", caption)):
                member = tarfile.TarInfo(name if kind == tarfile.USTAR_FORMAT else f"{name}/" * 20 + name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        seeds.append(stream.getvalue())
    return seeds


# ---- readers -------------------------------------------------------------------------------------------------------


@dataclass
class Reader:
    """A reader under test.

    `read` reads an input, using a folder that contains only an image x.png. It returns descriptions of the unexpected
    exceptions for which rows were skipped, and raises one of the `documented` exceptions to reject the input.
    """

    seeds: Callable[[], list[bytes]]
    mutate: Callable[[bytes, random.Random], bytes]
    read: Callable[[bytes, Path, random.Random], list[str]]
    documented: tuple[type[Exception], ...]


def read_image(data: bytes, folder: Path, rng: random.Random) -> list[str]:
    read_exif(data)
    decode_image(data)
    return []


def read_rows(*names: str) -> Callable[[bytes, Path, random.Random], list[str]]:
    """Return a function that reads a caption file with one of these names, as text pairs or as records."""

    def read(data: bytes, folder: Path, rng: random.Random) -> list[str]:
        name = rng.choice(names)
        (folder / name).write_bytes(gzip.compress(data, 1) if name.endswith(".gz") else data)
        log = SkipLog(max_skipped=1.0)
        try:
            if b"query" in data:
                for _ in read_text_pairs(str(folder / name), log):
                    pass
            else:
                check = rng.choice(("header", "unchecked", "ignore"))
                for record in open_records(folder / name, log, check, require_captions=rng.random() < 0.8):
                    if record.image is not None and check == "header":
                        record.image.read()
        finally:
            (folder / name).unlink()
        return UNEXPECTED.findall("\n".join(log.examples))

    return read


def config_seeds() -> list[bytes]:
    tower = VisionTower.from_pretrained("timm:test_vit", image_size=32, pretrained=False)
    config = {"model_type": "llm2clip", **asdict(LLM2CLIPConfig(tower=tower.config, text_dim=8, embed_dim=16))}
    clip = {"model_type": "clip", "projection_dim": 8, "vision_config": {"hidden_size": 8, "patch_size": 8}}
    index = {"metadata": {"total_size": 8}, "weight_map": {"a": "shard.safetensors"}}
    preprocess = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    return [json.dumps(value).encode() for value in (config, config, clip, index, preprocess)]


def read_config(data: bytes, folder: Path, rng: random.Random) -> list[str]:
    """Read a mutated config.json, index file or preprocessor_config.json of a checkpoint."""
    shard = folder / "shard.safetensors"
    if not shard.exists():
        save_file({"a": torch.zeros(2)}, shard)
        save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
    files = {b"weight_map": "model.safetensors.index.json", b"image_mean": "preprocessor_config.json"}
    name = next((name for key, name in files.items() if key in data), "config.json")
    (folder / name).write_bytes(data)
    weights, hidden = folder / "model.safetensors", folder / "hidden"
    try:
        if name.endswith(".index.json"):
            weights.rename(hidden)
        if is_model_folder(folder) and rng.random() < 0.2:
            LLM2CLIP.from_pretrained(folder)
        read_official_checkpoint(folder)
    finally:
        if hidden.exists():
            hidden.rename(weights)
        (folder / name).unlink()
    return []


def _encode(*values: Any) -> Callable[[], list[bytes]]:
    return lambda: [json.dumps(value).encode() for value in values]


def _encode_lines(*values: list[dict[str, Any]]) -> Callable[[], list[bytes]]:
    return lambda: [b"".join(json.dumps(row).encode() + b"\n" for row in rows) for rows in values]


REJECTED = (ValueError, OSError)
READERS = {
    "images": Reader(image_seeds, mutate_image, read_image, (ImageError,)),
    "json": Reader(_encode(ROWS, PAIRS), mutate_json, read_rows("d.json"), REJECTED),
    "jsonl": Reader(_encode_lines(ROWS, PAIRS), mutate_json, read_rows("d.jsonl", "d.jsonl", "d.jsonl.gz"), REJECTED),
    "csv": Reader(csv_seeds, mutate_text, read_rows("d.csv", "d.csv", "d.tsv", "captions.txt"), REJECTED),
    "parquet": Reader(parquet_seeds, mutate_parquet, read_rows("d.parquet"), REJECTED),
    "tar": Reader(tar_seeds, mutate_tar, read_rows("d.tar"), REJECTED),
    "coco": Reader(_encode(COCO, KARPATHY), mutate_json, read_rows("captions_train2017.json"), REJECTED),
    "config": Reader(config_seeds, mutate_json, read_config, REJECTED),
}


# ---- running -------------------------------------------------------------------------------------------------------


class Fuzzer:
    """Creates and reads mutated inputs. An input depends only on the seed, the reader's name and the input's number."""

    def __init__(self, name: str, seed: int, folder: Path) -> None:
        warnings.simplefilter("ignore")
        self.name, self.seed, self.folder, self.reader = name, seed, folder, READERS[name]
        self.seeds = self.reader.seeds()
        (folder / "x.png").write_bytes(png())

    def create_input(self, number: int) -> tuple[bytes, random.Random]:
        """Return an input, and a random number generator for the reader's choices."""
        rng = random.Random(f"{self.seed} {self.name} {number}")
        return self.reader.mutate(rng.choice(self.seeds), rng), rng

    def run(self, number: int) -> tuple[str, list[str]]:
        """Read an input. Return "read", "rejected" or "failed" (undocumented exception), and unexpected exceptions."""
        data, rng = self.create_input(number)
        try:
            return "read", self.reader.read(data, self.folder, rng)
        except self.reader.documented as error:
            return "rejected", UNEXPECTED.findall(str(error))
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            return "failed", [f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"]


def read_inputs(name: str, start: int, count: int, end: float, results: Connection) -> None:
    """Read the inputs from `start` until `count` or the time `end`, and send their results through a connection."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # image libraries print warnings
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        fuzzer = Fuzzer(name, 0, Path(folder))
        for warm_up in range(20):
            fuzzer.run(-1 - warm_up)  # imports libraries before the limits are set
        limit = psutil.Process().memory_info().vms + MEMORY_LIMIT
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        before = memory_mb("VmHWM")
        for number in range(start, count):
            if time.monotonic() > end:
                break
            signal.setitimer(signal.ITIMER_PROF, TIME_LIMIT)  # ends the process with SIGPROF
            begin = time.process_time()
            outcome, errors = fuzzer.run(number)
            results.send((outcome, errors, time.process_time() - begin, memory_mb("VmHWM") - before))


def fuzz(name: str, count: int, seconds: float) -> None:
    """Read mutated inputs in a separate process, which is restarted after a crash, and print a table row."""
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    slowest = peak = 0.0
    end = time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    exit_code, number = -1, 0
    while exit_code != 0 and number < count:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=read_inputs, args=(name, number, count, end, sender))
        process.start()
        sender.close()
        while True:
            try:
                outcome, errors, elapsed, memory = receiver.recv()
            except EOFError:
                break
            outcomes[outcome] += 1
            failures += [f"input {number}: {outcome}: {error}" for error in errors]
            slowest, peak = max(slowest, elapsed), max(peak, memory)
            number += 1
        process.join()
        exit_code = process.exitcode or 0
        if exit_code > 0:
            raise SystemExit(f"the process for {name} stopped with exit status {exit_code}")
        if exit_code < 0:
            outcomes["failed"] += 1
            failures.append(f"input {number}: {signal.Signals(-exit_code).name}")
            number += 1
    counts = [number, outcomes["read"], outcomes["rejected"], outcomes["failed"]]
    print_row(name, *(f"{value:,}" for value in counts), f"{slowest:.2f} s", f"{peak:.0f} MB")
    for failure in failures[:MAX_FAILURES]:
        print(failure[:300], file=sys.stderr)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--readers", nargs="+", choices=list(READERS), default=list(READERS))
    parser.add_argument("--count", type=int, default=100_000, help="number of inputs per reader")
    parser.add_argument("--seconds", type=float, default=600, help="wall-clock time per reader")
    args = parser.parse_args()
    print_header("reader", "inputs", "read", "rejected", "failed", "slowest", "memory")
    for name in args.readers:
        fuzz(name, args.count, args.seconds)


if __name__ == "__main__":
    main()
