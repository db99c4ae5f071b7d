"""Record tables: building, opening again, merging, and the view of the rows."""

import multiprocessing
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from format_fixtures import image_bytes, write_jsonl, write_tar
from llm2clip.data import build_table
from llm2clip.data.build_table import load_source_indices, mask_same_images, open_table
from llm2clip.data.columns import CAPTION_FIELDS
from llm2clip.data.image_hashes import hash_images
from llm2clip.data.image_refs import FileImage, MemoryImage, ParquetImage, TarImage
from llm2clip.data.records import Record, Source, open_records
from llm2clip.data.skip_log import SkipLog, TooManySkipped
from llm2clip.data.table import RecordTable, decode_name

RECORDS = [
    Record("a", FileImage("x/a.jpg"), ("one", "two"), ("s",), ("a long one",), "train", ("dog",)),
    Record("b", TarImage("t/0.tar", 512, 99, "b.png"), ("drei",), id_from_source=False),
    Record("c", None, ("四", "")),
    Record("odd \udcff", FileImage("odd \udcff.jpg"), ("x",), split="odd \udcff"),
    Record("e", ParquetImage("p.parquet", 7, "image", "ab" * 32), ("y",)),
    Record("f", MemoryImage(b"bytes"), ("z",)),
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
    assert [decode_name(name) for name in table.column("id").to_pylist()] == ["odd \udcff", "b", "a"]
    assert table.column("captions").to_pylist() == [["x"], ["drei"], ["one", "two"]]
    assert table.count_texts("captions").tolist() == [1, 1, 2]
    assert list(table.iterate_texts(CAPTION_FIELDS)) == ["x", "drei", "one", "two", "s", "a long one"]
    assert table.numbers("size").tolist() == [0, 99, 0]


def test_rows_in_random_order_over_many_batches_equal_a_list(tmp_path: Path) -> None:
    table = open_table([write_shards(tmp_path, shards=40, samples=3)], {}, SkipLog(), folder=tmp_path / "tables")
    records = list(table)
    order = np.random.default_rng(0).permutation(len(records)).repeat(2)
    assert list(table.select(order)) == [records[n] for n in order]
    assert list(table.select(order).get_images()) == [records[n].image for n in order]
    assert table.select(order).column("captions").to_pylist() == [list(records[n].captions) for n in order]


def test_use_as_captions_replaces_all_captions() -> None:
    table = RecordTable.from_records(RECORDS).use_as_captions("long_captions")
    assert [record.captions for record in table[:2]] == [("a long one",), ()]
    assert [record.texts for record in table[:2]] == [("a long one",), ()]
    assert list(table.iterate_texts(CAPTION_FIELDS)) == ["a long one"]


def test_phrases_follow_their_records() -> None:
    phrases = pa.chunked_array([pa.array([[f"phrase {n}"] * n for n in range(6)], pa.list_(pa.string()))])
    table = RecordTable.from_records(RECORDS).with_phrases(phrases).select(np.array([5, 2, 3])).select(np.array([2, 0]))
    assert [record.phrases for record in table] == [("phrase 3",) * 3, ("phrase 5",) * 5]
    assert table.count_texts("phrases").tolist() == [3, 5]


def test_identity_depends_on_the_values_only(tmp_path: Path) -> None:
    source = write_shards(tmp_path)
    table = open_table([source], {}, SkipLog(), folder=tmp_path / "tables")
    identity = table.compute_identity("captions", "container", "offset")
    assert (
        open_table([source], {}, SkipLog(), folder=tmp_path / "other").compute_identity(
            "captions", "container", "offset"
        )
        == identity
    )
    assert table.select(np.arange(19)).compute_identity("captions", "container", "offset") != identity
    order = np.arange(20)[::-1]
    assert table.select(order).select(order).compute_identity("captions", "container", "offset") == identity


def test_images_are_small_when_pickled(tmp_path: Path) -> None:
    table = open_table([write_shards(tmp_path)], {}, SkipLog(), folder=tmp_path / "tables")
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
    table = open_table(sources, {}, SkipLog(), folder=tmp_path / "tables")
    expected = [record for source in sources for record in open_records(source)]
    assert list(table) == expected
    assert load_source_indices(table).tolist() == [0] * 20 + [1] + [2] * 3
    assert [image.read() for image in table.get_images()] == [record.image.read() for record in expected]
    assert np.array_equal(table.hash_images(), hash_images(record.image for record in expected))
    assert np.array_equal(RecordTable.from_records(expected).hash_images(), table.hash_images())
    assert (table.numbers("width") > 0).all() and (table.numbers("height") > 0).all()


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_table_or_the_log(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_table, "PART_BYTES", 300)
    rows: list[object] = [{"id": n, "caption": [f"row {n}", ""], "split": "val" if n % 3 else None} for n in range(60)]
    rows[7], rows[50] = "no object", {"id": 50}
    source = str(write_jsonl(tmp_path / "x.jsonl", [*rows, *rows[10:20]]))
    log = SkipLog(tmp_path / "skipped.jsonl")
    table = open_table([source], {}, log, "unchecked", tmp_path / "tables", workers)
    assert len(list((tmp_path / "tables/parts").iterdir())) > 5
    expected_log = SkipLog(tmp_path / "expected.jsonl")
    expected = list(open_records(source, expected_log, "unchecked"))
    assert [record.id for record in table] == list(dict.fromkeys(record.id for record in expected))
    assert (tmp_path / "skipped.jsonl").read_text() == (tmp_path / "expected.jsonl").read_text()
    assert log.summary() == expected_log.summary()


def test_opening_again_reads_no_source_and_repeats_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[object] = [{"id": n, "caption": f"row {n}"} for n in range(40)]
    source = str(write_jsonl(tmp_path / "x.jsonl", ["no object", *rows]))
    logs = [SkipLog(), SkipLog()]
    table = open_table([source], {}, logs[0], "unchecked", tmp_path / "tables")
    monkeypatch.setattr(build_table, "map_in_processes", lambda *_: iter(()))
    assert list(open_table([source], {}, logs[1], "unchecked", tmp_path / "tables")) == list(table)
    assert logs[0].summary() == logs[1].summary() and logs[1].skipped["malformed row"] == 1


def test_only_changed_files_are_read_again(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "tars")
    open_table([source], {}, SkipLog(), folder=tmp_path / "tables")
    parts = set((tmp_path / "tables/parts").iterdir())
    write_tar(tmp_path / "tars/2.tar", [("new.jpg", image_bytes(70)), ("new.txt", b"new")])
    table = open_table([source], {}, SkipLog(), folder=tmp_path / "tables")
    assert len(set((tmp_path / "tables/parts").iterdir()) - parts) == 1
    assert [record.captions[0] for record in table][9:12] == ["image 9", "new", "image 15"]


def test_repaired_images_are_used_at_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "good.jpg").write_bytes(image_bytes(0))
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    rows = [{"image": f"{name}.jpg", "caption": name} for name in ("good", "bad", "missing")]
    source = str(write_jsonl(tmp_path / "x.jsonl", rows))

    def read_captions() -> list[str]:
        table = open_table([source], {}, SkipLog(max_skipped=1.0), folder=tmp_path / "tables")
        return list(table.iterate_texts(["captions"]))

    assert read_captions() == ["good"]
    (tmp_path / "bad.jpg").write_bytes(image_bytes(1))
    assert read_captions() == ["good", "bad"]
    (tmp_path / "missing.jpg").write_bytes(image_bytes(2))
    assert read_captions() == ["good", "bad", "missing"]


def test_settings_that_affect_reading_have_their_own_table(tmp_path: Path) -> None:
    source = str(write_jsonl(tmp_path / "x.jsonl", [{"id": 1, "caption": "a", "other": "b", "split": "val"}]))
    folder = tmp_path / "tables"
    assert open_table([source], {}, SkipLog(), "unchecked", folder)[0].captions == ("a",)
    assert open_table([source], {"captions": "other"}, SkipLog(), "unchecked", folder)[0].captions == ("b",)
    assert open_table([Source(source, ("val",))], {}, SkipLog(), "unchecked", folder)[0].split == "val"


def test_errors_are_those_of_the_first_bad_source(tmp_path: Path) -> None:
    good = str(write_jsonl(tmp_path / "a.jsonl", [{"caption": "x"}] * 30))
    bad = str(write_jsonl(tmp_path / "b.jsonl", ["no object"] * 30 + [{"caption": "x"}]))
    with pytest.raises(TooManySkipped, match=r"b\.jsonl, row 1"):
        open_table([good, bad], {}, SkipLog(), "unchecked", tmp_path / "tables")
    with pytest.raises(FileNotFoundError, match="did you mean"):
        open_table([good, str(tmp_path / "b.json1")], {}, SkipLog(), "unchecked", tmp_path / "tables")


def test_merged_rows_keep_the_place_and_source_of_the_first(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jpg").write_bytes(image_bytes(ord(name)))
    (tmp_path / "copy.jpg").write_bytes(image_bytes(ord("a")))
    first = write_jsonl(tmp_path / "1.jsonl", [{"image": f"{n}.jpg", "caption": n, "id": n} for n in "ab"])
    rows = [{"image": "c.jpg", "caption": "c"}, {"image": "copy.jpg", "caption": "copied"}]
    second = write_jsonl(tmp_path / "2.jsonl", [*rows, {"image": "b.jpg", "caption": "more"}, *rows])
    table = open_table([str(first), str(second)], {}, SkipLog(), folder=tmp_path / "tables")
    assert [record.captions for record in table] == [("a", "copied"), ("b", "more"), ("c",)]
    assert [record.id for record in table] == ["a", "b", "c"] and load_source_indices(table).tolist() == [0, 0, 1]
    assert (table.numbers("width") > 0).all()


def test_merging_finds_keys_that_differ_in_one_half_only() -> None:
    high = np.array([5, 5, 0, 5, 0, 0, 7], np.uint64)
    low = np.array([1, 2, 0, 1, 0, 3, 2], np.uint64)
    assert build_table._find_first_rows(high, low).tolist() == [0, 1, 2, 0, 4, 5, 6]


def test_mask_same_images_finds_paths_and_copies(tmp_path: Path) -> None:
    for name, number in {"a": 1, "b": 2, "copy of a": 1, "c": 3}.items():
        (tmp_path / f"{name}.jpg").write_bytes(image_bytes(number))
    known = write_jsonl(tmp_path / "known.jsonl", [{"image": f"{n}.jpg", "caption": n} for n in "ab"])
    names = ("c", "copy of a", "b")
    rows = [*({"image": f"{n}.jpg", "caption": n} for n in names), {"id": "text only", "caption": "x"}]
    candidates = write_jsonl(tmp_path / "candidates.jsonl", rows)
    tables = [open_table([str(path)], {}, SkipLog(), "unchecked", tmp_path / "t") for path in (known, candidates)]
    assert mask_same_images(*tables).tolist() == [False, True, True, False]


def test_unused_tables_are_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    sources = [str(write_jsonl(tmp_path / f"{n}.jsonl", [{"caption": "x"}])) for n in range(2)]
    open_table([sources[0]], {}, SkipLog(), "unchecked", folder)
    old = time.time() - (build_table.UNUSED_DAYS + 1) * 86_400
    stale = [*(folder / "parts").iterdir(), *(folder / "tables").iterdir()]
    for path in stale:
        os.utime(path, (old, old))
    open_table([sources[1]], {}, SkipLog(), "unchecked", folder)
    assert not any(path.exists() for path in stale)
    assert len(list((folder / "parts").iterdir())) == 1


def test_killed_build_continues_with_the_complete_parts(tmp_path: Path) -> None:
    """At any number of complete parts, the next build gives the same table."""
    source = write_shards(tmp_path / "tars", shards=12, samples=8)
    parts = tmp_path / "tables/parts"
    complete: set[str] = set()
    for num_complete in (1, 4, 9):
        arguments = ([source], {}, SkipLog(), "header", tmp_path / "tables", 1)
        process = multiprocessing.get_context("fork").Process(target=open_table, args=arguments)
        process.start()
        while process.is_alive() and (not parts.is_dir() or len(list(parts.glob("[!.]*.arrow"))) < num_complete):
            time.sleep(0.0001)
        process.kill()
        process.join()
        previous, complete = complete, {path.name for path in parts.glob("[!.]*.arrow")}
        assert previous <= complete and len(complete) >= num_complete
    table = open_table([source], {}, SkipLog(), folder=tmp_path / "tables")
    assert list(table) == list(open_records(source))
    assert complete <= {path.name for path in parts.glob("[!.]*.arrow")}
