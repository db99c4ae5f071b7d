"""Phrases of record tables: parallel extraction, and files that are saved with the table."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import phrase_reference
from format_fixtures import write_jsonl
from llm2clip.data import phrase_table
from llm2clip.data.build_table import open_table
from llm2clip.data.noun_phrases import PhraseCounts
from llm2clip.data.phrase_table import add_phrases
from llm2clip.data.records import Record
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.table import RecordTable

# Extracts the phrases of a source, and kills its own process after the first chunk has been written.
KILLED_PROCESS = """
import os, signal, sys
from pathlib import Path
from llm2clip.data import phrase_table
from llm2clip.data.build_table import open_table
from llm2clip.data.skip_log import SkipLog

extract = phrase_table._extract_phrases

def extract_and_stop(records):
    yield next(extract(records))
    os.kill(os.getpid(), signal.SIGKILL)

phrase_table._extract_phrases = extract_and_stop
phrase_table.PART_IMAGES = 100
phrase_table.add_phrases(open_table([sys.argv[1]], {}, SkipLog(), "ignore", Path(sys.argv[2])))
"""


def make_captions(num_images: int) -> list[list[str]]:
    rng = random.Random(0)
    texts = ["a red {} on the {}", "the {} of a {} is old", "two small {}s and a {}.", "his {}", "The {}"]
    nouns = ["dog", "cat", "hat", "sofa", "t-shirt", "café", "giraffe"]
    return [
        [rng.choice(texts).format(*rng.choices(nouns, k=2)) for _ in range(n % 4)] for n in range(1, num_images + 1)
    ]


def make_source(folder: Path, num_images: int = 300, files: int = 3) -> tuple[str, list[list[str]]]:
    """Write captions to several files. Return the source and the captions of the records, without rows without any."""
    captions = [texts for texts in make_captions(num_images) if texts]
    (folder / "source").mkdir()
    for number in range(files):
        rows = [{"captions": texts} for texts in captions[number::files]]
        write_jsonl(folder / f"source/{number}.jsonl", rows)
    return str(folder / "source/*.jsonl"), [texts for number in range(files) for texts in captions[number::files]]


def read_table(source: str, folder: Path) -> RecordTable:
    return open_table([source], {}, SkipLog(), "ignore", folder)


def list_phrases(records: RecordTable) -> list[tuple[str, ...]]:
    return [record.phrases for record in records]


def forbid_extraction(records: RecordTable) -> None:
    raise AssertionError("phrases are extracted again")


def test_phrases_are_saved_with_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, captions = make_source(tmp_path)
    phrases = list_phrases(add_phrases(read_table(source, tmp_path)))
    assert phrases == phrase_reference.extract_phrases(captions)
    with monkeypatch.context() as patch:
        patch.setattr(phrase_table, "_extract_phrases", forbid_extraction)
        assert list_phrases(add_phrases(read_table(source, tmp_path))) == phrases


def test_saved_phrases_belong_to_the_selected_rows_and_the_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, captions = make_source(tmp_path)
    records = read_table(source, tmp_path)
    add_phrases(records)
    selected = np.arange(len(records)) % 5 > 0
    expected = phrase_reference.extract_phrases([texts for texts, used in zip(captions, selected, strict=True) if used])
    assert list_phrases(add_phrases(records.select(selected))) == expected
    assert len(list(records.folder.glob("phrases-*.arrow"))) == 2  # type: ignore[union-attr]
    assert not add_phrases(records.use_as_captions("short_captions")).count_texts("phrases").any()
    monkeypatch.setattr(phrase_table, "RULES_VERSION", -1)
    monkeypatch.setattr(phrase_table, "_extract_phrases", forbid_extraction)
    with pytest.raises(AssertionError, match="extracted again"):
        add_phrases(records)


def test_worker_processes_find_the_same_phrases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, captions = make_source(tmp_path)
    monkeypatch.setattr(phrase_table, "MIN_PARALLEL_IMAGES", 1)
    monkeypatch.setattr(phrase_table, "PART_IMAGES", 41)
    assert list_phrases(add_phrases(read_table(source, tmp_path))) == phrase_reference.extract_phrases(captions)


def test_killed_process_leaves_no_incomplete_file(tmp_path: Path) -> None:
    source, captions = make_source(tmp_path)
    process = subprocess.run([sys.executable, "-c", KILLED_PROCESS, source, str(tmp_path)], check=False)
    assert process.returncode == -signal.SIGKILL
    records = read_table(source, tmp_path)
    assert records.folder is not None
    assert len(list(records.folder.glob(".phrases-*.part.arrow"))) == 1
    assert not list(records.folder.glob("phrases-*.arrow"))
    assert list_phrases(add_phrases(records)) == phrase_reference.extract_phrases(captions)
    assert not list(records.folder.glob(".phrases-*"))


def test_captions_without_phrases_are_not_searched_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, caption in (("german", "ein Hund auf dem Sofa {}"), ("rare", "the picture of thing{}")):
        source = str(write_jsonl(tmp_path / f"{name}.jsonl", [{"captions": [caption.format(n)]} for n in range(9)]))
        for is_saved in (False, True):
            with monkeypatch.context() as patch:
                if is_saved:
                    patch.setattr(phrase_table, "_extract_phrases", forbid_extraction)
                assert not add_phrases(read_table(source, tmp_path)).count_texts("phrases").any()
            assert "No short phrases are used" in capsys.readouterr().out


def test_language_samples_are_evenly_spaced_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phrase_table, "LANGUAGE_SAMPLES", 10)
    captions = [tuple(f"{n} {k}" for k in range(n % 4)) for n in range(40)]
    records = [Record(str(n), None, texts[:2], (), texts[2:]) for n, texts in enumerate(captions)]
    all_texts = [text for texts in captions for text in texts]
    for number in (0, 1, 2, 3, 7, 40):
        texts = all_texts[: sum(map(len, captions[:number]))]
        sample = phrase_table._sample_captions(RecordTable.from_records(records[:number]))
        assert sample == texts[:: len(texts) // 10 + 1]


def test_phrase_counts_are_added_up_and_limited() -> None:
    rng = np.random.default_rng(0)
    parts, totals = [], np.zeros(50, int)
    for size in (5, 30, 0, 1, 20, 50, 50):
        hashes = np.sort(rng.choice(50, size, replace=False))
        counts = rng.integers(1, 4, size)
        totals[hashes] += counts
        parts.append(PhraseCounts(hashes.astype(np.uint64), counts.astype(np.uint8)))
    merged = PhraseCounts.merge(parts[:5])
    first = np.zeros(50, int)
    for part in parts[:5]:
        first[part.hashes.astype(int)] += part.counts
    assert merged.hashes.tolist() == np.flatnonzero(first).tolist()
    assert merged.counts.tolist() == np.minimum(first[first > 0], 3).tolist()
    assert PhraseCounts.merge(parts).select_frequent().tolist() == np.flatnonzero(totals >= 3).tolist()
    assert not len(PhraseCounts.merge([]).select_frequent())


def test_split_tables_contain_only_the_files_of_their_records(tmp_path: Path) -> None:
    source, _ = make_source(tmp_path)
    records = read_table(source, tmp_path)
    selected = records.select(np.arange(len(records))[::-2])
    for table in (records, selected, RecordTable.from_records(records)):
        parts = table.split(40)
        assert [record for part in parts for record in part] == list(table)
        assert [len(part) for part in parts[:-1]] == [40] * (len(parts) - 1)
    assert len(dict(records.blocks.paths)) == 3
    assert [len(dict(part.blocks.paths)) for part in records.split(75)] == [1, 1, 1]
