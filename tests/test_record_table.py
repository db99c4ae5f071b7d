"""Record tables: the view of the rows, building, opening again, merging rows with the same image, and splits."""

import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from format_fixtures import image_bytes, image_row, write_images_and_jsonl, write_jsonl, write_tar
from llm2clip.config import EvaluateConfig
from llm2clip.data import build_table, image_facts
from llm2clip.data.build_table import DataSplits, build_record_table, load_source_indices, read_data_splits
from llm2clip.data.formats import build_file_part, split_file_into_parts
from llm2clip.data.image_facts import find_matching_images, get_distinct_image_hashes
from llm2clip.data.image_refs import FileImage, InMemoryImage, ParquetImage, TarImage
from llm2clip.data.records import CAPTION_FIELDS, EARLY_CHECK_ROWS, ImageCheck, Record, Source, open_records
from llm2clip.data.skip_log import SkipLog, TooManySkippedError
from llm2clip.data.table import RecordTable, decode_file_name

RECORDS = [
    Record("a", FileImage("x/a.jpg"), ("one", "two"), ("s",), ("a long one",), "train", ("dog",)),
    Record("b", TarImage("t/0.tar", 512, 99, "b.png"), ("drei",), id_from_source=False),
    Record("c", None, ("四", "")),
    Record("odd \udcff", FileImage("odd \udcff.jpg"), ("x",), split="odd \udcff"),
    Record("e", ParquetImage("p.parquet", 7, "image", "ab" * 32), ("y",)),
    Record("f", InMemoryImage(b"bytes"), ("z",)),
]


def write_shards(folder: Path, shards: int = 4, samples: int = 5) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        members = []
        for n in range(samples):
            number = shard * samples + n
            members += [(f"{number}.jpg", image_bytes(number)), (f"{number}.txt", f"image {number}".encode())]
        write_tar(folder / f"{shard}.tar", members)
    return str(folder)


def list_rows(table: RecordTable) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(record.id, str(record.image), record.texts) for record in table]


# ---- views -----------------------------------------------------------------------------------------------------------


def test_table_returns_the_records_it_was_made_from() -> None:
    table = RecordTable.from_records(RECORDS)
    assert list(table) == RECORDS
    assert [table[n] for n in range(-6, 6)] == RECORDS + RECORDS
    assert list(table[1:5:2]) == RECORDS[1:5:2]
    assert list(table.get_images()) == [record.image for record in RECORDS]
    with pytest.raises(IndexError, match="6 records"):
        table[6]


def test_select_takes_positions_and_masks_in_any_order() -> None:
    table = RecordTable.from_records(RECORDS)
    assert list(table.select(np.array([4, 0, 0, 2]))) == [RECORDS[4], RECORDS[0], RECORDS[0], RECORDS[2]]
    assert list(table.select(table.has_image)) == [record for record in RECORDS if record.image is not None]
    assert list(table.select(np.array([], np.int64))) == []


def test_columns_are_those_of_the_selected_rows() -> None:
    table = RecordTable.from_records(RECORDS).select(np.array([3, 1, 0]))
    assert [decode_file_name(name) for name in table.column("id").to_pylist()] == ["odd \udcff", "b", "a"]
    assert table.column("captions").to_pylist() == [["x"], ["drei"], ["one", "two"]]
    assert table.count_texts("captions").tolist() == [1, 1, 2]
    assert list(table.iterate_texts(CAPTION_FIELDS)) == ["x", "drei", "one", "two", "s", "a long one"]
    assert table.get_numeric_column("size").tolist() == [0, 99, 0]


def test_rows_in_random_order_over_many_batches_equal_a_list(tmp_path: Path) -> None:
    table = build_record_table(
        [write_shards(tmp_path, shards=40, samples=3)], {}, SkipLog(), folder=tmp_path / "tables"
    )
    records = list(table)
    order = np.random.default_rng(0).permutation(len(records)).repeat(2)
    assert list(table.select(order)) == [records[n] for n in order]
    assert list(table.select(order).get_images()) == [records[n].image for n in order]
    assert table.select(order).column("captions").to_pylist() == [list(records[n].captions) for n in order]


def test_use_field_as_captions_replaces_all_captions() -> None:
    table = RecordTable.from_records(RECORDS).use_field_as_captions("long_captions")
    assert [record.captions for record in table[:2]] == [("a long one",), ()]
    assert [record.texts for record in table[:2]] == [("a long one",), ()]
    assert list(table.iterate_texts(CAPTION_FIELDS)) == ["a long one"]


def test_phrases_follow_their_records() -> None:
    phrases = pa.chunked_array([pa.array([[f"phrase {n}"] * n for n in range(6)], pa.list_(pa.string()))])
    table = RecordTable.from_records(RECORDS).with_phrases(phrases).select(np.array([5, 2, 3])).select(np.array([2, 0]))
    assert [record.phrases for record in table] == [("phrase 3",) * 3, ("phrase 5",) * 5]
    assert table.count_texts("phrases").tolist() == [3, 5]


def test_split_tables_are_pickled_without_phrases() -> None:
    phrases = pa.chunked_array([pa.array([["phrase" * 10_000]] * 6, pa.list_(pa.string()))])
    parts = RecordTable.from_records(RECORDS[:6]).with_phrases(phrases).split(4)
    assert [len(part) for part in parts] == [4, 2]
    assert all(len(pickle.dumps(part)) < 10_000 for part in parts)


def test_identity_depends_on_the_values_only(tmp_path: Path) -> None:
    source = write_shards(tmp_path)
    table = build_record_table([source], {}, SkipLog(), folder=tmp_path / "tables")
    identity = table.compute_identity("captions", "container", "offset")
    assert (
        build_record_table([source], {}, SkipLog(), folder=tmp_path / "other").compute_identity(
            "captions", "container", "offset"
        )
        == identity
    )
    assert table.select(np.arange(19)).compute_identity("captions", "container", "offset") != identity
    order = np.arange(20)[::-1]
    assert table.select(order).select(order).compute_identity("captions", "container", "offset") == identity


def test_images_are_small_when_pickled(tmp_path: Path) -> None:
    table = build_record_table([write_shards(tmp_path)], {}, SkipLog(), folder=tmp_path / "tables")
    images = table.select(np.arange(20)[::-1]).get_images()
    restored = pickle.loads(pickle.dumps(images))
    assert list(restored) == list(images) and [restored[n] for n in (0, 19)] == [images[0], images[19]]
    in_memory = RecordTable.from_records(RECORDS).get_images()
    assert list(pickle.loads(pickle.dumps(in_memory))) == list(in_memory)


# ---- building and opening --------------------------------------------------------------------------------------------


def test_table_equals_the_records_of_its_sources(tmp_path: Path) -> None:
    """Tar files, JSON lines and Parquet with image sizes and hashes."""
    tars = write_shards(tmp_path / "tars")
    (tmp_path / "x.jpg").write_bytes(image_bytes(90))
    jsonl = str(write_jsonl(tmp_path / "x.jsonl", [{"image": "x.jpg", "captions": ["a", "b"], "split": "val"}]))
    cells = [{"image": {"bytes": image_bytes(80 + n), "path": f"{n}.jpg"}, "caption": f"cell {n}"} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(cells), tmp_path / "x.parquet")
    sources = [tars, jsonl, str(tmp_path / "x.parquet")]
    table = build_record_table(sources, {}, SkipLog(), folder=tmp_path / "tables")
    expected = [record for source in sources for record in open_records(source)]
    assert list(table) == expected
    assert load_source_indices(table).tolist() == [0] * 20 + [1] + [2] * 3
    assert [image.read() for image in table.get_images()] == [record.image.read() for record in expected]
    assert np.array_equal(
        table.get_distinct_image_hashes(), get_distinct_image_hashes(record.image for record in expected)
    )
    assert np.array_equal(
        RecordTable.from_records(expected).get_distinct_image_hashes(), table.get_distinct_image_hashes()
    )
    assert (table.get_numeric_column("width") > 0).all() and (table.get_numeric_column("height") > 0).all()


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_table_or_the_log(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_table, "PART_BYTES", 300)
    rows: list[object] = [{"id": n, "caption": [f"row {n}", ""], "split": "val" if n % 3 else None} for n in range(60)]
    rows[7], rows[50] = "no object", {"id": 50}
    source = str(write_jsonl(tmp_path / "x.jsonl", [*rows, *rows[10:20]]))
    log = SkipLog(tmp_path / "skipped.jsonl")
    table = build_record_table([source], {}, log, "unchecked", tmp_path / "tables", workers)
    assert len(list((tmp_path / "tables/parts").iterdir())) > 5
    expected_log = SkipLog(tmp_path / "expected.jsonl")
    expected = list(open_records(source, expected_log, "unchecked"))
    assert [record.id for record in table] == list(dict.fromkeys(record.id for record in expected))
    assert (tmp_path / "skipped.jsonl").read_text() == (tmp_path / "expected.jsonl").read_text()
    assert log.summary() == expected_log.summary()


def test_work_of_a_source_counts_each_file_once(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"caption": [f"caption {n}" for n in range(100)]}), tmp_path / "x.parquet", row_group_size=5
    )
    (tmp_path / "x.tar").write_bytes(bytes(10240))
    parts = [
        part
        for name in ("x.parquet", "x.tar")
        for part in split_file_into_parts(build_file_part(str(tmp_path / name)), 1)
    ]
    assert len(parts) == 21
    assert build_table._estimate_read_bytes(parts) == (tmp_path / "x.parquet").stat().st_size + 10240 / 8


def test_opening_again_reads_no_source_and_repeats_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[object] = [{"id": n, "caption": f"row {n}"} for n in range(40)]
    source = str(write_jsonl(tmp_path / "x.jsonl", ["no object", *rows]))
    logs = [SkipLog(), SkipLog()]
    table = build_record_table([source], {}, logs[0], "unchecked", tmp_path / "tables")
    monkeypatch.setattr(build_table, "map_in_processes", lambda *_: iter(()))
    assert list(build_record_table([source], {}, logs[1], "unchecked", tmp_path / "tables")) == list(table)
    assert logs[0].summary() == logs[1].summary() and logs[1].skipped["malformed row"] == 1


def test_only_changed_files_are_read_again(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "tars")
    build_record_table([source], {}, SkipLog(), folder=tmp_path / "tables")
    parts = set((tmp_path / "tables/parts").iterdir())
    write_tar(tmp_path / "tars/2.tar", [("new.jpg", image_bytes(70)), ("new.txt", b"new")])
    table = build_record_table([source], {}, SkipLog(), folder=tmp_path / "tables")
    assert len(set((tmp_path / "tables/parts").iterdir()) - parts) == 1
    assert [record.captions[0] for record in table][9:12] == ["image 9", "new", "image 15"]


def test_repaired_images_are_used_at_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "good.jpg").write_bytes(image_bytes(0))
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    rows = [{"image": f"{name}.jpg", "caption": name} for name in ("good", "bad", "missing")]
    source = str(write_jsonl(tmp_path / "x.jsonl", rows))

    def read_captions() -> list[str]:
        table = build_record_table([source], {}, SkipLog(max_skipped=1.0), folder=tmp_path / "tables")
        return list(table.iterate_texts(["captions"]))

    assert read_captions() == ["good"]
    (tmp_path / "bad.jpg").write_bytes(image_bytes(1))
    assert read_captions() == ["good", "bad"]
    (tmp_path / "missing.jpg").write_bytes(image_bytes(2))
    assert read_captions() == ["good", "bad", "missing"]


def test_broken_links_in_a_folder_are_missing_images(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(image_bytes(0))
    for name, target in {"b.jpg": "nothing.jpg", "c.jpg": "c.jpg", "no image": "nothing", "folder": "folder"}.items():
        (tmp_path / "photos" / name).symlink_to(target)
    for name in "abc":
        (tmp_path / f"photos/{name}.txt").write_text(name)
    logs = [SkipLog(max_skipped=1.0) for _ in range(2)]
    table = build_record_table([str(tmp_path / "photos")], {}, logs[0], folder=tmp_path / "tables")  # `fit` and `data`
    assert list(table.iterate_texts(["captions"])) == ["a"]
    assert len(list(open_records(tmp_path / "photos", logs[1], require_captions=False))) == 1  # `index` and `caption`
    assert all(log.skipped == {"missing image": 2} for log in logs)


def test_settings_that_affect_reading_have_their_own_table(tmp_path: Path) -> None:
    source = str(write_jsonl(tmp_path / "x.jsonl", [{"id": 1, "caption": "a", "other": "b", "split": "val"}]))
    folder = tmp_path / "tables"
    assert build_record_table([source], {}, SkipLog(), "unchecked", folder)[0].captions == ("a",)
    assert build_record_table([source], {"captions": "other"}, SkipLog(), "unchecked", folder)[0].captions == ("b",)
    assert build_record_table([Source(source, ("val",))], {}, SkipLog(), "unchecked", folder)[0].split == "val"


def test_errors_are_those_of_the_first_bad_source(tmp_path: Path) -> None:
    good = str(write_jsonl(tmp_path / "a.jsonl", [{"caption": "x"}] * 30))
    bad = str(write_jsonl(tmp_path / "b.jsonl", ["no object"] * 30 + [{"caption": "x"}]))
    with pytest.raises(TooManySkippedError, match=r"b\.jsonl, row 1"):
        build_record_table([good, bad], {}, SkipLog(), "unchecked", tmp_path / "tables")
    with pytest.raises(FileNotFoundError, match="did you mean"):
        build_record_table([good, str(tmp_path / "b.json1")], {}, SkipLog(), "unchecked", tmp_path / "tables")


def test_merged_rows_keep_the_place_and_source_of_the_first(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jpg").write_bytes(image_bytes(ord(name)))
    (tmp_path / "copy.jpg").write_bytes(image_bytes(ord("a")))
    first = write_jsonl(tmp_path / "1.jsonl", [{"image": f"{n}.jpg", "caption": n, "id": n} for n in "ab"])
    rows = [{"image": "c.jpg", "caption": "c"}, {"image": "copy.jpg", "caption": "copied"}]
    second = write_jsonl(tmp_path / "2.jsonl", [*rows, {"image": "b.jpg", "caption": "more"}, *rows])
    table = build_record_table([str(first), str(second)], {}, SkipLog(), folder=tmp_path / "tables")
    assert [record.captions for record in table] == [("a", "copied"), ("b", "more"), ("c",)]
    assert [record.id for record in table] == ["a", "b", "c"] and load_source_indices(table).tolist() == [0, 0, 1]
    assert (table.get_numeric_column("width") > 0).all()


def test_merging_finds_keys_that_differ_in_one_half_only() -> None:
    high = np.array([5, 5, 0, 5, 0, 0, 7], np.uint64)
    low = np.array([1, 2, 0, 1, 0, 3, 2], np.uint64)
    assert image_facts.find_first_occurrences(high, low).tolist() == [0, 1, 2, 0, 4, 5, 6]


def test_find_matching_images_compares_paths_and_contents(tmp_path: Path) -> None:
    for name, number in {"a": 1, "b": 2, "copy of a": 1, "c": 3}.items():
        (tmp_path / f"{name}.jpg").write_bytes(image_bytes(number))
    known = write_jsonl(tmp_path / "known.jsonl", [{"image": f"{n}.jpg", "caption": n} for n in "ab"])
    names = ("c", "copy of a", "b")
    rows = [*({"image": f"{n}.jpg", "caption": n} for n in names), {"id": "text only", "caption": "x"}]
    candidates = write_jsonl(tmp_path / "candidates.jsonl", rows)
    tables = [
        build_record_table([str(path)], {}, SkipLog(), "unchecked", tmp_path / "t") for path in (known, candidates)
    ]
    assert find_matching_images(*tables).tolist() == [False, True, True, False]


def test_unused_tables_are_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    sources = [str(write_jsonl(tmp_path / f"{n}.jsonl", [{"caption": "x"}])) for n in range(2)]
    build_record_table([sources[0]], {}, SkipLog(), "unchecked", folder)
    old = time.time() - (build_table.UNUSED_DAYS + 1) * 86_400
    stale = [*(folder / "parts").iterdir(), *(folder / "tables").iterdir()]
    (tmp_path / "mine").mkdir()
    for name, target in {
        "parts/broken": "nothing",
        "tables/broken": "nothing",
        "tables/link": tmp_path / "mine",
    }.items():
        (folder / name).symlink_to(target)
        stale.append(folder / name)
    for path in stale:
        os.utime(path, (old, old), follow_symlinks=False)
    build_record_table([sources[1]], {}, SkipLog(), "unchecked", folder)
    assert not any(os.path.lexists(path) for path in stale) and (tmp_path / "mine").exists()
    assert len(list((folder / "parts").iterdir())) == 1


@pytest.mark.parametrize("name", ["*/*.arrow", "*/*/merged.arrow", "*/*/rows.npy", "*/*/sources.npy", "*/*/copies.npy"])
def test_damaged_files_of_a_table_are_built_again(tmp_path: Path, name: str) -> None:
    for n in "ab":
        (tmp_path / f"{n}.jpg").write_bytes(image_bytes(0))
    source = str(write_jsonl(tmp_path / "x.jsonl", [{"image": f"{n}.jpg", "caption": n} for n in "ab"]))
    folder = tmp_path / "tables"
    rows = list_rows(build_record_table([source], {}, SkipLog(), folder=folder))
    (file,) = folder.glob(name)
    data = file.read_bytes()
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    for damaged in (bytes(changed), data[:-100], b"", data + b"more"):
        file.write_bytes(damaged)
        log = SkipLog()
        assert list_rows(build_record_table([source], {}, log, folder=folder)) == rows
        assert f"{file if file.parent.name == 'parts' else file.parent}: corrupt, and therefore" in log.summary()
        (file,) = folder.glob(name)  # the table's name depends on when its parts were read
        assert "corrupt" not in str([build_record_table([source], {}, log := SkipLog(), folder=folder), log.summary()])


def test_truncated_parts_of_a_large_table_are_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checksums of parts beyond a limit are not compared, but the parts must be Arrow files."""
    monkeypatch.setattr(build_table, "MAX_VERIFIED_BYTES", 0)
    source = str(write_jsonl(tmp_path / "x.jsonl", [{"caption": "x"}]))
    for _ in range(2):
        log = SkipLog()
        assert len(build_record_table([source], {}, log, "unchecked", tmp_path / "tables")) == 1
        (part,) = (tmp_path / "tables/parts").iterdir()
        part.write_bytes(part.read_bytes()[:-9])
    assert f"{part}: corrupt" in log.summary()


def test_killed_build_continues_with_the_complete_parts(tmp_path: Path) -> None:
    """At any number of complete parts, the next build gives the same table."""
    source = write_shards(tmp_path / "tars", shards=12, samples=8)
    parts = tmp_path / "tables/parts"
    complete: set[str] = set()
    for num_complete in (1, 4, 9):
        arguments = ([source], {}, SkipLog(), "header", tmp_path / "tables", 1)
        process = multiprocessing.get_context("fork").Process(target=build_record_table, args=arguments)
        process.start()
        while process.is_alive() and (not parts.is_dir() or len(list(parts.glob("[!.]*.arrow"))) < num_complete):
            time.sleep(0.0001)
        process.kill()
        process.join()
        previous, complete = complete, {path.name for path in parts.glob("[!.]*.arrow")}
        assert previous <= complete and len(complete) >= num_complete
    table = build_record_table([source], {}, SkipLog(), folder=tmp_path / "tables")
    assert list(table) == list(open_records(source))
    assert complete <= {path.name for path in parts.glob("[!.]*.arrow")}


# ---- merging ---------------------------------------------------------------------------------------------------------


def test_tar_images_have_the_same_key_by_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "x.tar", [("0.jpg", image_bytes(0)), ("0.txt", b"x")])
    (tmp_path / "link.tar").symlink_to(tmp_path / "x.tar")
    monkeypatch.chdir(tmp_path)
    images = [next(open_records(path)).image for path in ("x.tar", str(tmp_path / "x.tar"), "link.tar")]
    relative, absolute, link = [image.key for image in images if image is not None]
    assert relative == absolute
    assert link.startswith(str(tmp_path / "link.tar")), "links to files are not resolved"


def test_build_record_table_reads_a_second_source_with_a_bad_first_row(tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "a.jsonl", [{"caption": "x"}] * (EARLY_CHECK_ROWS + 1))
    bad = write_jsonl(tmp_path / "b.jsonl", ["not a JSON object", *[{"caption": "x"}] * 50])
    log = SkipLog()
    assert len(build_record_table([str(good), str(bad)], {}, log, "unchecked")) == EARLY_CHECK_ROWS + 51
    assert log.skipped.total() == 1


def test_sources_without_images_name_the_columns(tmp_path: Path) -> None:
    rows = "".join(f"{n}.jpg,a dog\n" for n in range(3))
    (tmp_path / "x.csv").write_text("img_file,sentence\n" + rows)
    message = (
        r"no record has an image \(3 records\).*no image column; the file has the columns img_file, sentence\. "
        "Select a column with --columns image=img_file"
    )
    with pytest.raises(ValueError, match=f"(?s){message}"):
        build_record_table([str(tmp_path / "x.csv")], {}, SkipLog())
    assert len(build_record_table([str(tmp_path / "x.csv")], {}, SkipLog(), "unchecked")) == 3, "enough for `tune`"


def test_unchecked_rows_are_merged_by_image_path_or_id(tmp_path: Path) -> None:
    """The images do not exist."""
    cells = [{"image": {"bytes": None, "path": f"{n}.jpg"}, "caption": f"{n} {k}"} for n in range(4) for k in range(2)]
    pq.write_table(pa.Table.from_pylist(cells), tmp_path / "cells.parquet")
    paths = [{"image": f"{n}.jpg", "caption": f"{n} {k}"} for n in range(4) for k in range(2)]
    write_jsonl(tmp_path / "paths.jsonl", paths)
    write_jsonl(tmp_path / "ids.jsonl", [{"id": n, "caption": f"{n} {k}"} for n in range(4) for k in range(2)])
    for source in ("cells.parquet", "paths.jsonl", "ids.jsonl"):
        records = build_record_table([str(tmp_path / source)], {}, SkipLog(), "unchecked")
        assert [r.captions for r in records] == [(f"{n} 0", f"{n} 1") for n in range(4)]


def test_rows_without_id_and_image_are_never_merged(tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    for n in range(2):
        write_jsonl(tmp_path / f"some/data.{n}.jsonl", [{"caption": f"{n} {k}"} for k in range(3)])
    assert len(build_record_table([str(tmp_path / "some/data.{0..1}.jsonl")], {}, SkipLog(), "unchecked")) == 6
    cells = [{"image": {"bytes": image_bytes(n), "path": "image.png"}, "caption": f"{n}"} for n in range(6)]
    pq.write_table(pa.Table.from_pylist(cells), tmp_path / "x.parquet")
    for image_check in ("header", "unchecked", "ignore"):
        records = build_record_table([str(tmp_path / "x.parquet")], {}, SkipLog(), image_check)  # type: ignore[arg-type]
        assert len(records) == 6


def write_copies(folder: Path) -> Path:
    """Write an image, a copy, a symbolic link and a hard link to it, and two images that are only of the same size."""
    image = image_bytes(0)
    (folder / "a.jpg").write_bytes(image)
    (folder / "copy.jpg").write_bytes(image)
    (folder / "link.jpg").symlink_to(folder / "a.jpg")
    (folder / "hard.jpg").hardlink_to(folder / "copy.jpg")
    for position in (len(image) // 2, -1):  # a different byte in the middle, and at the end
        other = bytearray(image)
        other[position] ^= 1
        (folder / f"other{position}.jpg").write_bytes(other)
    names = sorted(path.name for path in folder.iterdir())
    return write_jsonl(folder / "x.jsonl", [{"image": name, "caption": f"{name} {k}"} for name in names for k in "xy"])


@pytest.mark.parametrize("image_check", ["header", "unchecked"])
def test_copies_of_an_image_are_merged_and_counted(tmp_path: Path, image_check: ImageCheck) -> None:
    source, log = str(write_copies(tmp_path)), SkipLog()
    for _ in range(2):  # the copies are counted once
        records = build_record_table([source], {}, log, image_check)
        assert [record.id for record in records] == ["a", "other-1", f"other{len(image_bytes(0)) // 2}"]
    assert records[0].captions == tuple(f"{name}.jpg {k}" for name in ("a", "copy", "hard", "link") for k in "xy")
    assert log.summary() == "0 of 12 rows skipped; 3 duplicate images merged with the originals"


def test_copies_in_a_tar_file_are_merged_with_files(tmp_path: Path) -> None:
    image, other = image_bytes(0), image_bytes(1)
    members = []
    for n, data in enumerate((image, other, other)):
        members += [(f"{n}.jpg", data), (f"{n}.txt", f"{n}".encode())]
    write_tar(tmp_path / "x.tar", members)
    (tmp_path / "a.jpg").write_bytes(image)
    write_jsonl(tmp_path / "x.jsonl", [{"image": "a.jpg", "caption": "a"}])
    records = build_record_table([str(tmp_path / "x.jsonl"), str(tmp_path / "x.tar")], {}, SkipLog())
    assert [record.captions for record in records] == [("a", "0"), ("1", "2")]


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which the size of each image that is later hashed in full is appended."""
    lengths: list[int] = []
    compute_digest = hashlib.file_digest

    def count(stream: Any, name: str) -> Any:
        digest = compute_digest(stream, name)
        lengths.append(stream.tell())
        return digest

    monkeypatch.setattr(hashlib, "file_digest", count)
    return lengths


def test_links_have_the_contents_of_their_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target is read once, and what cannot be read has no hash."""
    data = image_bytes(0)
    (tmp_path / "target.jpg").write_bytes(data)
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder").symlink_to(tmp_path)
    (tmp_path / "link.jpg").symlink_to("folder/target.jpg")
    (tmp_path / "broken.jpg").symlink_to("nothing.jpg")
    lengths = count_reads(monkeypatch)
    names = ("link", "target", "broken", "empty", "missing")
    expected = [hashlib.sha256(data).digest()] * 2 + [b""] * 3
    assert [image_facts._hash_file_content(FileImage(str(tmp_path / f"{name}.jpg"))) for name in names] == expected
    assert sorted(lengths) == [0, len(data)]  # the empty file and the target


def test_only_images_with_equal_hashes_are_read_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images have the same size and middle, but different ends."""
    end = b"\xff\xd9" + bytes(4096)
    images = [image_bytes(0) + end, image_bytes(0) + end[:-1] + b"x", image_bytes(1) + end, image_bytes(0) + end]
    write_jsonl(tmp_path / "x.jsonl", [{"image": f"{n}.jpg", "caption": f"{n}"} for n in range(4)])
    for n, data in enumerate(images):
        (tmp_path / f"{n}.jpg").write_bytes(data)
    lengths = count_reads(monkeypatch)
    records = build_record_table([str(tmp_path / "x.jsonl")], {}, SkipLog())
    assert [record.captions for record in records] == [("0", "3"), ("1",), ("2",)]
    assert lengths == [len(images[0])] * 3


# ---- splits ----------------------------------------------------------------------------------------------------------


def splits_of(*sources: str | Path, held_out: tuple[str | Path, ...] = ()) -> DataSplits:
    config = EvaluateConfig(data=[str(source) for source in held_out])
    return read_data_splits([str(source) for source in sources], config, {}, SkipLog())


def ids(splits: DataSplits) -> tuple[list[str], list[str]]:
    return [r.id for r in splits.train], [r.id for r in splits.held_out["captions"]]


def test_read_data_splits_uses_the_split_names(tmp_path: Path) -> None:
    """The names are compared without case, except for those that are selected."""
    rows = [image_row(1, "train"), image_row(2), image_row(3, "none"), image_row(4, "Val"), image_row(5, "test")]
    file = write_images_and_jsonl(tmp_path / "a.jsonl", *rows)
    splits = splits_of(file)
    assert ids(splits) == (["1", "2", "3"], ["4"])
    assert "1 record from other splits (test) not used" in splits.summary
    assert ids(splits_of(f"{file}@train+Val", held_out=(f"{file}@test",))) == (["1", "4"], ["5"])


def test_read_data_splits_holds_out_a_tenth_without_split_names(tmp_path: Path) -> None:
    rows = [*(image_row(n) for n in range(40)), image_row(40, "extra")]
    file = write_images_and_jsonl(tmp_path / "a.jsonl", *rows)
    splits = splits_of(file)
    assert "1 record from other splits (extra) not used" in splits.summary
    train, held_out = ids(splits)
    assert (len(train), len(held_out)) == (36, 4)
    assert not set(train) & set(held_out)
    assert ids(splits_of(file)) == (train, held_out)


def test_the_held_out_tenth_is_random_if_ids_repeat(tmp_path: Path) -> None:
    rows = []
    for side in ("front", "back"):
        for n in range(20):
            (tmp_path / f"sku{n}").mkdir(exist_ok=True)
            rows.append({"image": f"sku{n}/{side}.png", "captions": [f"{side} of {n}"]})
    splits = splits_of(write_images_and_jsonl(tmp_path / "a.jsonl", *rows))
    assert len({r.captions[0].split()[0] for r in splits.held_out["captions"]}) == 2


def test_rows_of_an_image_in_a_table_are_in_the_same_split(tmp_path: Path) -> None:
    """Hugging Face data sets often repeat the image in a row for each caption."""
    images = [image_bytes(seed) for seed in range(20)]
    rows = [{"image": images[n], "caption": f"{n} {k}"} for n in range(20) for k in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    splits = splits_of(tmp_path / "x.parquet")
    held_out = splits.held_out["captions"]
    assert (len(splits.train), len(held_out)) == (18, 2)
    assert all(len(r.captions) == 5 for r in [*splits.train, *held_out])


def test_an_image_with_several_spellings_of_its_path_is_in_one_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = write_images_and_jsonl(tmp_path / "a.jsonl", image_row(1, "train"), image_row(2, "val"))
    (tmp_path / "sub").mkdir()
    rows = [{"image": f"../{n}.png", "captions": [f"{n} c"], "split": s} for n, s in ((1, "val"), (2, "train"))]
    b = write_jsonl(tmp_path / "sub/b.jsonl", rows)
    splits = splits_of(a, b)
    assert ids(splits) == (["1"], ["2"])
    assert splits.held_out["captions"][0].captions == ("2 a", "2 b", "2 c")
    monkeypatch.chdir(tmp_path)
    splits = splits_of("a.jsonl@train+val", held_out=("sub/b.jsonl@train",))
    assert [r.id for r in splits.train] == ["1"]
    assert "1 held-out image removed from training" in splits.summary


def test_file_names_that_are_not_utf8_can_be_held_out(tmp_path: Path) -> None:
    for n in range(20):
        stem = os.fsencode(tmp_path) + b"/\xff%d" % n
        Image.new("RGB", (8, 8), (n, 0, 0)).save(tmp_path / "x.png")
        os.rename(tmp_path / "x.png", stem + b".png")
        Path(os.fsdecode(stem + b".txt")).write_text("one\ntwo")
    assert len(splits_of(tmp_path).held_out["captions"]) == 2


def test_read_data_splits_reads_caption_columns_of_held_out_images(tmp_path: Path) -> None:
    rows = [image_row(1, "train", captions_de=["eins"]), image_row(2, "val", captions_de=["zwei"])]
    rows[1]["long_captions"] = ["two, at length"]
    file = write_images_and_jsonl(tmp_path / "a.jsonl", *rows)
    held_out = read_data_splits([file], EvaluateConfig(fields=["captions_de"]), {}, SkipLog()).held_out
    captions = {name: [r.captions for r in records] for name, records in held_out.items()}
    assert captions == {
        "captions": [("2 a", "2 b")],
        "long_captions": [("two, at length",)],
        "captions_de": [("zwei",)],
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"captions_de": ["kein Bild"]}, "no record has an image"),
        ({"image": "https://example.invalid/1.png", "captions_de": ["eine URL"]}, "no records; "),
        ({"image": "missing.png", "captions_de": ["fehlt"]}, "no records; .*missing image"),
    ],
)
def test_read_data_splits_rejects_a_caption_column_that_no_usable_image_has(
    tmp_path: Path, row: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.create_connection", lambda *_, **__: pytest.fail("URLs must not be opened"))
    file = write_images_and_jsonl(tmp_path / "a.jsonl", image_row(1, "train"), image_row(2, "val"))
    with open(file, "a") as stream:
        stream.write(json.dumps({**row, "split": "val"}) + "\n")
    with pytest.raises(ValueError, match=message):
        read_data_splits([file], EvaluateConfig(fields=["captions_de"]), {}, SkipLog(max_skipped=1.0))


def test_copies_of_held_out_images_are_not_used_for_training(tmp_path: Path) -> None:
    """A copy in the training split of the same source, and one in another source."""
    rows = [image_row(n, "val" if n < 3 else "train") for n in range(6)]
    file = Path(write_images_and_jsonl(tmp_path / "a.jsonl", *rows))
    for n in (0, 3):
        shutil.copy(tmp_path / f"{n}.png", tmp_path / f"copy{n}.png")
    copies = [{"image": f"copy{n}.png", "captions": [f"copy {n}"]} for n in (0, 3)]
    write_jsonl(file, [*rows, {**copies[0], "split": "train"}, {**copies[1], "split": "val"}])
    splits = splits_of(file)
    assert ids(splits) == (["3", "4", "5"], ["0", "1", "2"])
    assert splits.held_out["captions"][0].captions == ("0 a", "0 b", "copy 0")
    write_jsonl(tmp_path / "b.jsonl", copies)
    splits = splits_of(f"{file}@train+val", held_out=(tmp_path / "b.jsonl",))
    assert ids(splits) == (["1", "2", "4", "5"], ["copy0", "copy3"])
    assert "2 held-out images removed from training" in splits.summary
