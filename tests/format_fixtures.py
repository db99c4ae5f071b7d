"""Three records, and functions that write them in every supported format."""

import csv
import gzip
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from llm2clip.data.records import Source, open_records
from llm2clip.data.skip_log import SkipLog

ROWS: list[dict[str, Any]] = [  # different numbers of captions on purpose
    {"id": "a", "image": "images/a.jpg", "captions": ["a cat", "一只猫, sitting"], "split": "train"},
    {"id": "b", "image": "images/b.png", "captions": ['a "dog"'], "split": "val"},
    {"id": "c", "image": "images/c.jpg", "captions": ["one", "two", "three"], "split": None},
]


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def image_bytes(seed: int, kind: str = "JPEG") -> bytes:
    """Encode a small image whose width depends on the seed."""
    return encode(Image.linear_gradient("L").resize((24 + seed, 32)).convert("RGB"), kind)


def rows_with_image_bytes(folder: Path) -> list[dict[str, Any]]:
    """Return `ROWS` with the images as Hugging Face's {"bytes", "path"}."""
    rows = []
    for row in ROWS:
        image = {"bytes": (folder / row["image"]).read_bytes(), "path": Path(row["image"]).name}
        rows.append(row | {"image": image})
    return rows


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def image_row(n: int, split: str | None = None, **more: object) -> dict[str, Any]:
    """Return a row of image `n`, which `write_images_and_jsonl` creates, with two captions."""
    return {"image": f"{n}.png", "id": str(n), "captions": [f"{n} a", f"{n} b"], "split": split, **more}


def write_images_and_jsonl(path: Path, *rows: dict[str, Any]) -> str:
    """Write rows to a .jsonl file and create the images that they name, each different; return the path."""
    for row in rows:
        if row.get("image"):
            colour = tuple(zlib.crc32(row["image"].encode()).to_bytes(4, "big")[:3])
            Image.new("RGB", (8, 8), colour).save(path.parent / row["image"])
    return str(write_jsonl(path, rows))


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def tar_members(folder: Path, rows: Iterable[dict[str, Any]]) -> Iterable[tuple[str, bytes]]:
    """Yield the name and content of an image and a JSON member for each row."""
    for row in rows:
        suffix = row["image"].rpartition(".")[2]
        yield f"x/{row['id']}.{suffix}", (folder / row["image"]).read_bytes()
        yield f"x/{row['id']}.json", json.dumps({"captions": row["captions"], "split": row["split"]}).encode()


def read_skip_log(path: Path) -> list[tuple[str, int, str]]:
    """Return (file, row, reason) of every entry."""
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(entry.keys() == {"file", "row", "reason", "value"} for entry in entries)
    return [(entry["file"], entry["row"], entry["reason"]) for entry in entries]


def ids_and_skips(source: Source, log: Path, **options: Any) -> tuple[list[str], list[tuple[str, int, str]]]:
    """Read a source without a limit on skipped rows; return the ids and (file name, row, reason) of all skips."""
    ids = [record.id for record in open_records(source, SkipLog(log, max_skipped=1.0), **options)]
    return ids, [(os.path.basename(file), row, reason) for file, row, reason in read_skip_log(log)]


def as_jsonl(folder: Path) -> str:
    return str(write_jsonl(folder / "x.jsonl", ROWS))


def as_jsonl_gz(folder: Path) -> str:
    (folder / "x.jsonl.gz").write_bytes(gzip.compress(write_jsonl(folder / "x.jsonl", ROWS).read_bytes()))
    return str(folder / "x.jsonl.gz")


def as_json(folder: Path) -> str:
    (folder / "x.json").write_text(json.dumps(ROWS))
    return str(folder / "x.json")


def as_csv_of_rows(folder: Path, name: str = "x.csv", delimiter: str = ",") -> str:
    """Write a row for each caption: the first caption of every image, then the second, and so on."""
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["id", "filename", "caption", "split"])
        for index in range(3):
            for row in ROWS:
                for caption in row["captions"][index : index + 1]:
                    writer.writerow([row["id"], row["image"], caption, row["split"] or ""])
    return str(folder / name)


def as_tsv_of_rows(folder: Path) -> str:
    return as_csv_of_rows(folder, "x.tsv", "\t")


def as_csv_of_lists(folder: Path) -> str:
    with (folder / "x.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "image", "captions", "split"])
        for index, row in enumerate(ROWS):  # the first list as pandas writes it, the others as JSON
            captions = json.dumps(row["captions"]) if index else repr(row["captions"])
            writer.writerow([row["id"], row["image"], captions, row["split"] or "none"])
    return str(folder / "x.csv")


def as_parquet_of_paths(folder: Path) -> str:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "x.parquet")
    return str(folder / "x.parquet")


def as_parquet_of_bytes(folder: Path) -> str:
    pq.write_table(pa.Table.from_pylist(rows_with_image_bytes(folder)), folder / "x.parquet", row_group_size=2)
    return str(folder / "x.parquet")


def as_folder_of_parquet(folder: Path) -> str:
    (folder / "tables").mkdir()
    rows = rows_with_image_bytes(folder)
    pq.write_table(pa.Table.from_pylist(rows[:2]), folder / "tables/0.parquet")
    pq.write_table(pa.Table.from_pylist(rows[2:]), folder / "tables/1.parquet")
    return str(folder / "tables")


def as_images_with_json(folder: Path) -> str:
    for row in ROWS:
        captions = {"captions": row["captions"], "split": row["split"]}
        (folder / row["image"]).with_suffix(".json").write_text(json.dumps(captions))
    return str(folder / "images")


def as_folder_with_captions(folder: Path) -> str:
    write_jsonl(folder / "captions.jsonl", ROWS)
    return str(folder)


def as_tar(folder: Path) -> str:
    return str(write_tar(folder / "x.tar", tar_members(folder, ROWS)))


def as_tars_in_braces(folder: Path) -> str:
    for number, row in enumerate(ROWS):
        write_tar(folder / f"shard-{number:03}.tar", tar_members(folder, [row]))
    return str(folder / "shard-{000..002}.tar")


def as_glob_of_tars(folder: Path) -> str:
    as_tars_in_braces(folder)
    return str(folder / "shard-*.tar")


FORMATS = [
    as_jsonl, as_jsonl_gz, as_json, as_csv_of_rows, as_tsv_of_rows, as_csv_of_lists, as_parquet_of_paths,
    as_parquet_of_bytes, as_folder_of_parquet, as_images_with_json, as_folder_with_captions, as_tar, as_glob_of_tars,
    as_tars_in_braces,
]  # fmt: skip
