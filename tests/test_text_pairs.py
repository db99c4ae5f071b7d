"""Reading of general text pairs."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm2clip.data.pairs import Pair
from llm2clip.data.skip_log import SkipLog, TooManySkipped
from llm2clip.data.text_pairs import read_text_pairs


def test_read_text_pairs_reads_the_e5_format(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [
        {"query": " who? ", "positive": "she", "negatives": ["he", "she", ""], "instruction": "Find who:"},
        {"query": "where?", "positive": ["here", "there"], "negatives": None},
    ]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert list(read_text_pairs(str(file))) == [Pair("who?", "she", ("he",), "Find who:\n"), Pair("where?", "here")]


def test_read_text_pairs_accepts_other_column_names_and_formats(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("anchor,document,task\nq,d,T:\n")
    assert list(read_text_pairs(str(tmp_path / "a.csv"))) == [Pair("q", "d", (), "T:\n")]
    table = pa.table({"question": ["a", "c"], "answer": ["b", "d"], "split": ["train", "test"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert list(read_text_pairs(f"{tmp_path / 'a.parquet'}@train")) == [Pair("a", "b")]


def test_read_text_pairs_rejects_sentence_pairs_with_scores(tmp_path: Path) -> None:
    """They include contradictions and pairs with a similarity of 0."""
    (tmp_path / "a.csv").write_text("sentence1,sentence2,score\na,b,0.0\n")
    with pytest.raises(ValueError, match="no column for query"):
        list(read_text_pairs(str(tmp_path / "a.csv")))


def test_read_text_pairs_counts_and_lists_bad_rows(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    good = [json.dumps({"query": f"q{n}", "positive": f"p{n}"}) for n in range(97)]
    bad = [json.dumps({"query": "q", "positive": "q"}), json.dumps({"positive": "p"}), "{"]
    file.write_text("\n".join([*good, *bad]))
    log = SkipLog(tmp_path / "skipped.jsonl")
    assert len(list(read_text_pairs(str(file), log))) == 97
    assert log.skipped == {"missing or identical texts": 2, "malformed row": 1}
    with pytest.raises(TooManySkipped):
        list(read_text_pairs(str(file), SkipLog(max_skipped=0.01)))


def test_read_text_pairs_rejects_files_without_pairs(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"image": "a.jpg", "caption": "x"}')
    with pytest.raises(ValueError, match="no column for query"):
        list(read_text_pairs(str(tmp_path / "a.jsonl")))


def test_read_text_pairs_counts_all_rows_in_an_unclosed_quote(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('query;positive\nq;"open\nlost;lost\nq;"also lost"\nq;d\n')
    log = SkipLog(max_skipped=1.0)
    assert list(read_text_pairs(str(tmp_path / "a.csv"), log)) == [Pair("q", "d")]
    assert log.summary().startswith("3 of 4 rows skipped (malformed row: 3)")
    assert log.summary().endswith("a.csv: read as separated by semicolons")


def test_read_text_pairs_skips_invalid_unicode(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"anchor,positive\nq,d\nq,caf\xe9\n")
    log = SkipLog(max_skipped=1.0)
    assert list(read_text_pairs(str(tmp_path / "a.csv"), log)) == [Pair("q", "d")]
    assert log.skipped == {"not UTF-8": 1}
