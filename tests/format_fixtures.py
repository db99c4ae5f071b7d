"""Three records, and how they are written in every format that is read."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llm2clip.data.records import open_records
from llm2clip.data.skip_log import SkipLog

ROWS: list[dict[str, Any]] = [  # ragged on purpose
    {"id": "a", "image": "images/a.jpg", "captions": ["a cat", "一只猫, sitting"], "split": "train"},
    {"id": "b", "image": "images/b.png", "captions": ['a "dog"'], "split": "val"},
    {"id": "c", "image": "images/c.jpg", "captions": ["one", "two", "three"], "split": None},
]


def image_bytes(seed: int, kind: str = "JPEG") -> bytes:
    data = io.BytesIO()
    Image.linear_gradient("L").resize((24 + seed, 32)).convert("RGB").save(data, kind)
    return data.getvalue()


def embedded(folder: Path) -> list[dict[str, Any]]:
    return [
        row | {"image": {"bytes": (folder / row["image"]).read_bytes(), "path": Path(row["image"]).name}}
        for row in ROWS
    ]


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def tar_members(folder: Path, rows: Iterable[dict[str, Any]]) -> Iterable[tuple[str, bytes]]:
    for row in rows:
        suffix = row["image"].rpartition(".")[2]
        yield f"x/{row['id']}.{suffix}", (folder / row["image"]).read_bytes()
        yield f"x/{row['id']}.json", json.dumps({"captions": row["captions"], "split": row["split"]}).encode()


def logged(path: Path) -> list[tuple[str, int, str]]:
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(entry.keys() == {"file", "row", "reason", "value"} for entry in entries)
    return [(entry["file"], entry["row"], entry["reason"]) for entry in entries]


def refused(source: Path, log: Path, **options: Any) -> tuple[list[str], list[tuple[str, int, str]]]:
    """The ids that come through with no limit on skips, and the (file name, row, reason) of what does not."""
    ids = [record.id for record in open_records(source, SkipLog(log, max_skipped=1.0), **options)]
    return ids, [(os.path.basename(file), row, reason) for file, row, reason in logged(log)]


def as_jsonl(folder: Path) -> str:
    return str(write_jsonl(folder / "x.jsonl", ROWS))


def as_jsonl_gz(folder: Path) -> str:
    (folder / "x.jsonl.gz").write_bytes(gzip.compress(write_jsonl(folder / "x.jsonl", ROWS).read_bytes()))
    return str(folder / "x.jsonl.gz")


def as_json(folder: Path) -> str:
    (folder / "x.json").write_text(json.dumps(ROWS))
    return str(folder / "x.json")


def as_csv_of_rows(folder: Path, name: str = "x.csv", delimiter: str = ",") -> str:
    """A row a caption, the first captions of all images before the second ones."""
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["id", "filename", "caption", "split"])
        for place in range(3):
            for row in ROWS:
                for caption in row["captions"][place : place + 1]:
                    writer.writerow([row["id"], row["image"], caption, row["split"] or ""])
    return str(folder / name)


def as_tsv_of_rows(folder: Path) -> str:
    return as_csv_of_rows(folder, "x.tsv", "\t")


def as_csv_of_lists(folder: Path) -> str:
    with (folder / "x.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "image", "captions", "split"])
        for place, row in enumerate(ROWS):  # as JSON, and as pandas prints a list
            written = json.dumps(row["captions"]) if place else repr(row["captions"])
            writer.writerow([row["id"], row["image"], written, row["split"] or "none"])
    return str(folder / "x.csv")


def as_parquet_of_paths(folder: Path) -> str:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "x.parquet")
    return str(folder / "x.parquet")


def as_parquet_of_bytes(folder: Path) -> str:
    pq.write_table(pa.Table.from_pylist(embedded(folder)), folder / "x.parquet", row_group_size=2)
    return str(folder / "x.parquet")


def as_folder_of_parquet(folder: Path) -> str:
    (folder / "tables").mkdir()
    rows = embedded(folder)
    pq.write_table(pa.Table.from_pylist(rows[:2]), folder / "tables/0.parquet")
    pq.write_table(pa.Table.from_pylist(rows[2:]), folder / "tables/1.parquet")
    return str(folder / "tables")


def as_images_with_json(folder: Path) -> str:
    for row in ROWS:
        side = {"captions": row["captions"], "split": row["split"]}
        (folder / row["image"]).with_suffix(".json").write_text(json.dumps(side))
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


def as_saved_dataset(folder: Path) -> str:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        id=datasets.Value("string"),
        image=datasets.Image(),
        captions=datasets.Sequence(datasets.Value("string")),
        split=datasets.Value("string"),
    )
    datasets.Dataset.from_list(embedded(folder), features=features).save_to_disk(folder / "saved")
    return str(folder / "saved")


FORMATS = [value for name, value in list(globals().items()) if name.startswith("as_")]
