"""Phrases taken from captions, their files, and the losses and batches that use them."""

import dataclasses
import json
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align_fixtures import ALIGN, fresh_model, run_align
from conftest import make_tower
from format_fixtures import write_jsonl
from llm2clip.cli import main
from llm2clip.config import AlignConfig
from llm2clip.data import noun_phrases
from llm2clip.data.build_table import build_record_table
from llm2clip.data.noun_phrases import MIN_IMAGES, add_noun_phrases, make_word_set
from llm2clip.data.records import Record, open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.table import RecordTable
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.parallel import map_in_processes
from llm2clip.store.encode import embed
from llm2clip.store.store import EmbeddingStore, find_caption_rows
from llm2clip.train.sampling import AlignBatches
from test_losses import info_nce_reference

# Extracts the phrases of a source, and kills its own process after the first chunk has been written.
KILLED_PROCESS = """
import os, signal, sys
from pathlib import Path
from llm2clip.data import noun_phrases
from llm2clip.data.build_table import build_record_table
from llm2clip.data.build_table import build_record_table
from llm2clip.data.skip_log import SkipLog

extract = noun_phrases._extract_phrases

def extract_and_stop(records):
    yield next(extract(records))
    os.kill(os.getpid(), signal.SIGKILL)

noun_phrases._extract_phrases = extract_and_stop
noun_phrases.PART_IMAGES = 100
noun_phrases.add_noun_phrases(build_record_table([sys.argv[1]], {}, SkipLog(), "ignore", Path(sys.argv[2])))
"""


WITH_PHRASES = dataclasses.replace(ALIGN, caption_mix={"captions": 1, "phrases": 1})


def three_times(*captions: str) -> list[tuple[str, ...]]:
    """Return three images with these captions, so that every phrase is frequent enough."""
    return [captions] * MIN_IMAGES


def extract_phrases(captions: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Return the phrases of each image, without checking that the captions are in English.

    The captions of every second image are in three fields.
    """
    records = []
    for n, texts in enumerate(map(tuple, captions)):
        fields = (texts[:1], texts[1:2], texts[2:]) if n % 2 else (texts,)
        records.append(Record(str(n), None, *fields))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noun_phrases, "is_english", lambda captions: True)
        return [record.phrases for record in add_noun_phrases(RecordTable.from_records(records))]


def test_phrases_are_noun_phrases_and_their_nouns() -> None:
    phrases = extract_phrases(
        three_times(
            "A student with a red hat runs.",
            "The brown dog jumps over the fence, and two cats watch it from a wooden chair",
            "a dog in the grass",
            "the hat of the student is on the chair by a fence",
        )
    )
    assert phrases[0] == ("student", "red hat", "hat", "brown dog", "dog", "fence", "wooden chair", "chair", "grass")


def test_verbs_and_adjectives_are_not_taken_for_nouns() -> None:
    """Neither 'runs' nor 'white' ever stands alone after an article and before a function word."""
    captions = ("a white dog runs through the snow", "the black and white dog", "his dog", "a white photo of the snow")
    assert extract_phrases(three_times(*captions))[0] == ("white dog", "dog", "snow")


def test_phrases_of_few_images_are_dropped() -> None:
    """Several captions of an image count once."""
    captions = [("a dog on a sofa",)] * MIN_IMAGES + [("a cat on a sofa",) * MIN_IMAGES] * (MIN_IMAGES - 1)
    phrases = extract_phrases(captions)
    assert set(phrases[:MIN_IMAGES]) == {("dog", "sofa")}
    assert set(phrases[MIN_IMAGES:]) == {("sofa",)}


FUNCTION_WORDS = sorted(make_word_set("a the an his two of in on and or is with THE A ten 3 12 ² . , !"))
UNUSUAL_WORDS = """
dog hat red old side view photo front-view man's t-shirt cat's- 'hat' -the the- rock--dog x-ray-x a'b-c snake_case hat2
2hat ½ Ⅷ Ⅷx straße STRASSE İstanbul ΣΑΣ ΑΣ café cafe\u0301 l’eau 猫 كلب 𝔡𝔬𝔤 🐕 e\u200bf \x00
"""
CONTENT_WORDS = [*sorted(make_word_set(UNUSUAL_WORDS)), "\n", "\r\n", "\x1c", "\u2028", ""]


def make_random_captions(num_images: int, seed: int) -> list[list[str]]:
    """Return captions of function words and content words with unusual characters. Some images have no captions."""
    rng = random.Random(seed)
    words = FUNCTION_WORDS * 4 + CONTENT_WORDS
    captions = []
    for _ in range(num_images):
        lengths = rng.choices([0, 1, 3, 8, 20], k=rng.choice([0, 1, 2, 3]))
        captions.append([rng.choice([" ", " ", ""]).join(rng.choices(words, k=length)) for length in lengths])
    return captions


def test_phrases_of_unusual_words_do_not_depend_on_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    captions = make_random_captions(3000, seed=7)
    phrases = extract_phrases(captions)
    assert {"man's", "t-shirt", "straße", "strasse", "σας", "l’eau", "a'b-c", "café", "猫", "𝔡𝔬𝔤"} <= {
        *sum(phrases, ())
    }
    monkeypatch.setattr(noun_phrases, "PART_IMAGES", 7)
    assert extract_phrases(captions) == phrases


@pytest.mark.parametrize("captions", [[], [()], [("",)], [(), ("\n",), ("", " ")], [("...",)] * 3])
def test_captions_without_words_have_no_phrases(captions: list[tuple[str, ...]]) -> None:
    assert extract_phrases(captions) == [()] * len(captions)


def test_phrase_column_takes_precedence(tmp_path: Path) -> None:
    rows = [{"captions": ["a dog on a sofa"], "phrases": ["Rex"] if n == 1 else []} for n in range(4)]
    records = add_noun_phrases(RecordTable.from_records(open_records(write_jsonl(tmp_path / "data.jsonl", rows))))
    assert [record.phrases for record in records] == [(), ("Rex",), (), ()]
    assert records[1].texts == ("a dog on a sofa",)
    rows[1]["phrases"] = []
    records = add_noun_phrases(RecordTable.from_records(open_records(write_jsonl(tmp_path / "data.jsonl", rows))))
    assert [record.phrases for record in records] == [("dog", "sofa")] * 4


def test_column_with_other_values_than_phrases_does_not_cost_the_row(tmp_path: Path) -> None:
    """The row is used without phrases, and the log counts the dropped values."""
    rows = [{"captions": ["a dog"], "phrases": phrases} for phrases in ([{"phrase": "a dog", "box": [0, 1]}], 7, "dog")]
    log = SkipLog()
    records = list(open_records(write_jsonl(tmp_path / "data.jsonl", rows), log))
    assert [record.captions for record in records] == [("a dog",)] * 3
    assert [record.phrases for record in records] == [(), (), ("dog",)]
    assert log.dropped["malformed phrases"] == 2


@pytest.mark.parametrize(
    "caption", ["Hund {}", "un homme a un chapeau . {}", "a kutya a {} fehér ház előtt áll a fűben ."]
)
def test_captions_in_other_languages_have_no_phrases(caption: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The French "a" (has) and the Hungarian "a" (the) are not the English article."""
    records = RecordTable.from_records(Record(str(n), None, (caption.format(n),)) for n in range(5))
    assert add_noun_phrases(records) == records
    assert "add a `phrases` column" in capsys.readouterr().out


def test_phrases_are_sampled_and_are_no_negatives_of_images_that_have_them(
    records: list[Record], llm: Path, tmp_path: Path
) -> None:
    """The loss of the first step is the reference loss with all phrases of all images, on sampled texts."""
    records = [dataclasses.replace(r, phrases=("picture", f"kind {n % 3}")) for n, r in enumerate(records)]
    encoder = CaptionEncoder.from_pretrained(llm, device="cpu")
    store = embed([text for r in records for text in (*r.texts, *r.phrases)], encoder, tmp_path / "store")
    table, preprocess = RecordTable.from_records(records), fresh_model().tower.preprocess
    batch = next(AlignBatches(table, store, preprocess, WITH_PHRASES).iterate_batches(0))
    batch = batch.to(torch.device("cpu"))
    rows_of = [set(store.find_rows(r.phrases)) for r in records]
    number = {str(record.image): n for n, record in enumerate(records)}
    images = [number[name] for name in map(str, batch.image_refs)]
    expected = sorted((i, row) for i, image in enumerate(images) for row in rows_of[image])
    assert [tuple(pair) for pair in batch.phrases.tolist()] == expected
    captions = zip(batch.caption_rows.tolist(), batch.image_of_caption.tolist(), strict=True)
    is_phrase = [row in rows_of[images[i]] for row, i in captions]
    assert 0 < sum(is_phrase) < len(is_phrase)

    run_align(records, store, tmp_path / "run", WITH_PHRASES)
    loss = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])["loss"]
    model = fresh_model()
    image, text, scale, _ = model(pixels=batch.images, embeddings=batch.embeddings)
    layout = batch.image_of_caption, batch.caption_rows
    with_phrases = info_nce_reference(image, text, scale, *layout, batch.phrases).item()
    assert loss == pytest.approx(with_phrases, abs=1e-4)
    assert abs(info_nce_reference(image, text, scale, *layout).item() - with_phrases) > 1e-2


def test_phrases_without_weight_are_never_sampled(records: list[Record], store: EmbeddingStore) -> None:
    """Not even for images that have no captions of a kind with a weight."""
    records = [dataclasses.replace(record, phrases=("not in the store",)) for record in records]
    config = dataclasses.replace(ALIGN, caption_mix={"short_captions": 1, "phrases": 0})
    table, preprocess = RecordTable.from_records(records), fresh_model().tower.preprocess
    batches = list(AlignBatches(table, store, preprocess, config).iterate_batches(0))
    assert batches and all(batch.phrases is None for batch in batches)


def test_missing_phrases_are_dropped(
    records: list[Record], store: EmbeddingStore, capsys: pytest.CaptureFixture[str]
) -> None:
    known, unknown = records[0].captions[0], "no such text"
    for phrases, remaining in (((unknown,), ()), ((unknown, known), (known,))):
        with_phrases = RecordTable.from_records([dataclasses.replace(records[0], phrases=phrases)])
        rows = find_caption_rows(with_phrases, store, ("phrases",), "identity")["phrases"]
        assert rows[0].tolist() == store.find_rows(remaining).tolist()
        assert ("has no phrase embeddings" in capsys.readouterr().out) == (not remaining)


def test_embed_and_align_commands_with_phrases(
    image_folder: Path, llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, encoder = str(image_folder / "captions.jsonl"), ["--encoder.path", str(llm)]
    tower = str(make_tower(tmp_path / "vit", "test_vit"))
    settings = ["--align.tower", tower, "--align.image_size", "64", "--align.batch_size", "10", "--align.workers", "0"]
    for phrases in ("true", "false"):
        store = str(tmp_path / f"store_{phrases}")
        assert main(["embed", data, "--out", store, *encoder, "--phrases", phrases]) == 0
        out = str(tmp_path / f"run_{phrases}")
        assert main(["align", data, "--store", store, "--out", out, *encoder, *settings, "--align.epochs", "1"]) == 0
        assert ("No short phrases are used" in capsys.readouterr().out) == (phrases == "false")
    assert len(EmbeddingStore(tmp_path / "store_true")) > len(EmbeddingStore(tmp_path / "store_false"))


def test_uses_phrases() -> None:
    sampled = AlignConfig(caption_mix={"captions": 1, "phrases": 0.1})
    assert sampled.uses_phrases and sampled.samples_phrases
    assert not AlignConfig(caption_mix={"captions": 1, "phrases": 0}).uses_phrases
    assert AlignConfig().samples_phrases
    inherited = AlignConfig(inherit=True, caption_mix={"captions": 1})
    assert inherited.uses_phrases and not inherited.samples_phrases


# ---- phrases of tables -----------------------------------------------------------------------------------------------


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
    return build_record_table([source], {}, SkipLog(), "ignore", folder)


def list_phrases(records: RecordTable) -> list[tuple[str, ...]]:
    return [record.phrases for record in records]


def forbid_extraction(records: RecordTable) -> None:
    raise AssertionError("phrases are extracted again")


def test_phrases_are_saved_with_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, captions = make_source(tmp_path)
    phrases = list_phrases(add_noun_phrases(read_table(source, tmp_path)))
    assert phrases == extract_phrases(captions)
    with monkeypatch.context() as patch:
        patch.setattr(noun_phrases, "_extract_phrases", forbid_extraction)
        assert list_phrases(add_noun_phrases(read_table(source, tmp_path))) == phrases
    (file,) = read_table(source, tmp_path).folder.glob("phrases-*.arrow")  # type: ignore[union-attr]
    file.write_bytes(file.read_bytes().replace(b"dog", b"cat"))
    assert list_phrases(add_noun_phrases(read_table(source, tmp_path))) == phrases
    lock = file.with_name("phrases.lock")
    lock.unlink(missing_ok=True)
    lock.mkdir()
    with pytest.raises(OSError, match="cannot lock"):
        add_noun_phrases(read_table(source, tmp_path))


def test_saved_phrases_belong_to_the_selected_rows_and_the_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, captions = make_source(tmp_path)
    records = read_table(source, tmp_path)
    add_noun_phrases(records)
    selected = np.arange(len(records)) % 5 > 0
    expected = extract_phrases([texts for texts, used in zip(captions, selected, strict=True) if used])
    assert list_phrases(add_noun_phrases(records.select(selected))) == expected
    assert len(list(records.folder.glob("phrases-*.arrow"))) == 2  # type: ignore[union-attr]
    assert not add_noun_phrases(records.use_field_as_captions("short_captions")).count_texts("phrases").any()
    monkeypatch.setattr(noun_phrases, "RULES_VERSION", -1)
    monkeypatch.setattr(noun_phrases, "_extract_phrases", forbid_extraction)
    with pytest.raises(AssertionError, match="extracted again"):
        add_noun_phrases(records)


def test_worker_processes_find_the_same_phrases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, captions = make_source(tmp_path)
    expected = extract_phrases(captions)
    monkeypatch.setattr(noun_phrases, "MIN_PARALLEL_IMAGES", 1)
    monkeypatch.setattr(noun_phrases, "PART_IMAGES", 41)
    sizes: list[int] = []

    def map_and_measure(function: Any, items: Any, workers: int | None) -> Any:
        sizes.append(len(pickle.dumps(function)))
        return map_in_processes(function, items, workers)

    monkeypatch.setattr(noun_phrases, "map_in_processes", map_and_measure)
    assert list_phrases(add_noun_phrases(read_table(source, tmp_path))) == expected
    assert len(sizes) == 3 and max(sizes) < 1000, "the words are not sent with each part"


def test_killed_process_leaves_no_incomplete_file(tmp_path: Path) -> None:
    source, captions = make_source(tmp_path)
    process = subprocess.run([sys.executable, "-c", KILLED_PROCESS, source, str(tmp_path)], check=False)
    assert process.returncode == -signal.SIGKILL
    records = read_table(source, tmp_path)
    assert records.folder is not None
    assert len(list(records.folder.glob(".phrases-*.part.arrow"))) == 1
    assert not list(records.folder.glob("phrases-*.arrow"))
    assert list_phrases(add_noun_phrases(records)) == extract_phrases(captions)
    assert not list(records.folder.glob(".phrases-*"))


def test_captions_without_phrases_are_not_searched_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, caption in (("german", "ein Hund auf dem Sofa {}"), ("rare", "the picture of thing{}")):
        source = str(write_jsonl(tmp_path / f"{name}.jsonl", [{"captions": [caption.format(n)]} for n in range(9)]))
        for is_saved in (False, True):
            with monkeypatch.context() as patch:
                if is_saved:
                    patch.setattr(noun_phrases, "_extract_phrases", forbid_extraction)
                assert not add_noun_phrases(read_table(source, tmp_path)).count_texts("phrases").any()
            assert "No short phrases are used" in capsys.readouterr().out


def test_language_samples_are_the_captions_of_evenly_spaced_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noun_phrases, "LANGUAGE_SAMPLES", 10)
    records = [Record(str(n), None, (f"{n} a",), (), (f"{n} b",)) for n in range(40)]
    for number in (0, 1, 9, 40):
        expected = [text for record in records[: number : number // 10 + 1] for text in record.texts]
        assert noun_phrases._sample_captions(RecordTable.from_records(records[:number])) == expected


def test_split_tables_contain_only_the_files_of_their_records(tmp_path: Path) -> None:
    source, _ = make_source(tmp_path)
    records = read_table(source, tmp_path)
    selected = records.select(np.arange(len(records))[::-2])
    for table in (records, selected, RecordTable.from_records(records)):
        parts = table.split(40)
        assert [record for part in parts for record in part] == list(table)
        assert [len(part) for part in parts[:-1]] == [40] * (len(parts) - 1)
    assert len(dict(records.record_batches.paths)) == 3
    assert [len(dict(part.record_batches.paths)) for part in records.split(75)] == [1, 1, 1]
