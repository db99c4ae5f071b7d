"""Row numbers of a table's captions in a store, looked up once and kept beside the table."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from format_fixtures import write_jsonl
from llm2clip.data.build_table import build_record_table
from llm2clip.data.records import TEXT_FIELDS
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.table import RecordTable
from llm2clip.store import store as store_module
from llm2clip.store.layout import StoreError
from llm2clip.store.store import EmbeddingStore, find_caption_rows
from llm2clip.store.writer import StoreWriter

ROWS: list[dict[str, Any]] = [
    {"id": "0", "captions": ["a dog", "a cat", "a dog"], "long_captions": ["a long dog"], "phrases": ["dog", "rare"]},
    {"id": "1", "captions": ["a cat"], "phrases": []},
    {"id": "2", "captions": ["refused"], "long_captions": ["a long cat"], "phrases": ["cat", "dog"]},
    {"id": "3", "captions": ["refused"]},
]
TEXTS = ["a dog", "a cat", "a long cat", "a long dog", "cat", "dog"]


def write_store(folder: Path, texts: list[str]) -> EmbeddingStore:
    writer = StoreWriter(folder, {"test": 1}, 2, dtype="float32")
    embeddings = np.array([[len(text), sum(map(ord, text))] for text in texts], np.float32)
    writer.write(0, texts, [1] * len(texts), embeddings)
    writer.finish()
    (folder / "refused-00000.jsonl").write_text(json.dumps({"caption": "refused", "why": "no tokens"}) + "\n")
    return EmbeddingStore(folder)


def read_table(folder: Path, rows: list[dict[str, Any]]) -> RecordTable:
    source = str(write_jsonl(folder / "data.jsonl", rows))
    return build_record_table([source], {}, SkipLog(), "ignore", folder / "tables")


def list_rows(table: RecordTable, store: EmbeddingStore) -> dict[str, list[list[int]]]:
    rows = find_caption_rows(table, store, TEXT_FIELDS, table.compute_identity(*TEXT_FIELDS))
    return {field: [captions[n].tolist() for n in range(len(table))] for field, captions in rows.items()}


EXPECTED = {
    "captions": [[0, 1], [1], [], []],
    "long_captions": [[3], [], [2], []],
    "phrases": [[5], [], [4, 5], []],
}


def test_rows_are_distinct_and_leave_out_refused_captions_and_rare_phrases(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", TEXTS)
    table = read_table(tmp_path, ROWS)
    assert list_rows(table, store) == EXPECTED
    assert list_rows(RecordTable.from_records(list(table)), store) == EXPECTED
    selected = table.select(np.array([2, 0]))
    assert list_rows(selected, store) == {field: [rows[2], rows[0]] for field, rows in EXPECTED.items()}


def test_rows_found_in_several_processes_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MIN_PARALLEL_CAPTIONS", 1)
    monkeypatch.setattr(store_module, "BATCH_ROWS", 1)
    monkeypatch.setattr(store_module, "count_cores", lambda: 1)
    store = write_store(tmp_path / "store", TEXTS)
    assert list_rows(read_table(tmp_path, ROWS), store) == EXPECTED


def test_refused_captions_are_read_once_and_each_phrase_is_looked_up_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once per batch of records."""
    store = write_store(tmp_path / "store", TEXTS)
    table = read_table(tmp_path, ROWS)
    monkeypatch.setattr(RecordTable.iterate_batches, "__defaults__", (1,))
    reads: list[Path] = []
    looked_up: list[int] = []
    find_keys = store.find_keys

    def read_refused_captions(folder: Path) -> dict[str, Any]:
        reads.append(folder)
        return {"refused": {}}

    def count_keys(keys: np.ndarray) -> np.ndarray:
        looked_up.append(len(keys))
        return find_keys(keys)

    monkeypatch.setattr(store_module.layout, "read_refused_captions", read_refused_captions)
    monkeypatch.setattr(store, "find_keys", count_keys)
    for field, num_keys in (("captions", 6), ("phrases", 3)):
        reads.clear()
        looked_up.clear()
        store_module._look_up_field(table, field, store)
        assert len(reads) == 1 and sum(looked_up) == num_keys, field


def test_missing_caption_is_an_error(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", TEXTS[1:])
    table = read_table(tmp_path, ROWS)
    for records in (table, RecordTable.from_records(list(table))):
        with pytest.raises(StoreError, match=r"has no embedding for the caption 'a dog'\. Run `llm2clip embed`"):
            list_rows(records, store)
    assert table.folder is not None and not list(table.folder.glob("caption-rows-*/*")), (
        "nothing is kept after an error"
    )
    lock = table.folder / "caption-rows.lock"
    lock.unlink(missing_ok=True)
    lock.mkdir()
    with pytest.raises(OSError, match="cannot lock"):
        list_rows(table, store)


def test_rows_are_looked_up_again_only_if_captions_or_store_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_store(tmp_path / "store", TEXTS)
    table = read_table(tmp_path, ROWS)
    list_rows(table, store)

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("looked up again")

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "_look_up_field", fail)
        same = build_record_table([str(tmp_path / "data.jsonl")], {}, SkipLog(), "ignore", tmp_path / "tables")
        assert list_rows(same, EmbeddingStore(store.folder)) == EXPECTED
    reversed_store = write_store(tmp_path / "reversed", TEXTS[::-1])
    reversed_rows = [[sorted(5 - row for row in rows) for rows in EXPECTED[field]] for field in EXPECTED]
    assert list(list_rows(table, reversed_store).values()) == reversed_rows
    changed = read_table(tmp_path, [{**ROWS[0], "captions": ["a cat"]}, *ROWS[1:]])
    assert list_rows(changed, store)["captions"] == [[1], [1], [], []]
    assert list_rows(table.select(np.array([1])), store) == {"captions": [[1]]}
