"""Phrases taken from captions, and the losses and batches that use them."""

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import phrase_reference
from align_fixtures import ALIGN, fresh_model, run_align
from conftest import make_tower
from format_fixtures import write_jsonl
from llm2clip.cli import main
from llm2clip.config import AlignConfig
from llm2clip.data import phrase_table
from llm2clip.data.noun_phrases import MIN_IMAGES, to_word_set
from llm2clip.data.phrase_table import add_phrases
from llm2clip.data.records import Record, open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.table import RecordTable
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.store.caption_rows import find_caption_rows
from llm2clip.store.encode import embed
from llm2clip.store.store import EmbeddingStore
from llm2clip.train.sampling import AlignBatches
from test_losses import info_nce_reference

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
        patch.setattr(phrase_table, "is_english", lambda captions: True)
        return [record.phrases for record in add_phrases(RecordTable.from_records(records))]


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


FUNCTION_WORDS = sorted(to_word_set("a the an his two of in on and or is with THE A ten 3 12 ² . , !"))
UNUSUAL_WORDS = """
dog hat red old side view photo front-view man's t-shirt cat's- 'hat' -the the- rock--dog x-ray-x a'b-c snake_case hat2
2hat ½ Ⅷ Ⅷx straße STRASSE İstanbul ΣΑΣ ΑΣ café cafe\u0301 l’eau 猫 كلب 𝔡𝔬𝔤 🐕 e\u200bf \x00
"""
CONTENT_WORDS = [*sorted(to_word_set(UNUSUAL_WORDS)), "\n", "\r\n", "\x1c", "\u2028", ""]


def make_random_captions(num_images: int, seed: int) -> list[list[str]]:
    """Return captions of function words and content words with unusual characters. Some images have no captions."""
    rng = random.Random(seed)
    words = FUNCTION_WORDS * 4 + CONTENT_WORDS
    captions = []
    for _ in range(num_images):
        lengths = rng.choices([0, 1, 3, 8, 20], k=rng.choice([0, 1, 2, 3]))
        captions.append([rng.choice([" ", " ", ""]).join(rng.choices(words, k=length)) for length in lengths])
    return captions


@pytest.mark.parametrize("batch_images", [1, 7, 10_000])
def test_phrases_match_a_reference_on_unusual_words(batch_images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phrase_table, "BATCH_IMAGES", batch_images)
    monkeypatch.setattr(phrase_table, "PART_IMAGES", 1000)
    captions = make_random_captions(3000, seed=batch_images)
    phrases = extract_phrases(captions)
    assert phrases == phrase_reference.extract_phrases(captions)
    assert {"man's", "t-shirt", "straße", "strasse", "σας", "l’eau", "a'b-c", "café", "猫", "𝔡𝔬𝔤"} <= {
        *sum(phrases, ())
    }


def test_phrases_match_a_reference_on_many_characters() -> None:
    """Many characters of Unicode stand within, before and after a noun, and alone."""
    valid = [code for code in range(0, 0x110000, 211) if not 0xD800 <= code < 0xE000]
    captions = []
    for character in map(chr, [*range(0x100), *valid]):
        text = f"a d{character}g in {character} hat on the {character} of the hat{character} {character}hat"
        captions += three_times(text, "the hat.")
    assert extract_phrases(captions) == phrase_reference.extract_phrases(captions)


@pytest.mark.parametrize("captions", [[], [()], [("",)], [(), ("\n",), ("", " ")], [("...",)] * 3])
def test_captions_without_words_have_no_phrases(captions: list[tuple[str, ...]]) -> None:
    assert extract_phrases(captions) == [()] * len(captions)


def test_phrase_column_takes_precedence(tmp_path: Path) -> None:
    rows = [{"captions": ["a dog on a sofa"], "phrases": ["Rex"] if n == 1 else []} for n in range(4)]
    records = add_phrases(RecordTable.from_records(open_records(write_jsonl(tmp_path / "data.jsonl", rows))))
    assert [record.phrases for record in records] == [(), ("Rex",), (), ()]
    assert records[1].texts == ("a dog on a sofa",)
    rows[1]["phrases"] = []
    records = add_phrases(RecordTable.from_records(open_records(write_jsonl(tmp_path / "data.jsonl", rows))))
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
    assert add_phrases(records) == records
    assert "add a `phrases` column" in capsys.readouterr().out


def test_phrases_are_sampled_and_are_no_negatives_of_images_that_have_them(
    records: list[Record], llm: Path, tmp_path: Path
) -> None:
    """The loss of the first step is the reference loss with all phrases of all images, on sampled texts."""
    records = [dataclasses.replace(r, phrases=("picture", f"kind {n % 3}")) for n, r in enumerate(records)]
    encoder = CaptionEncoder.from_pretrained(llm, device="cpu")
    store = embed([text for r in records for text in (*r.texts, *r.phrases)], encoder, tmp_path / "store")
    batch = next(
        AlignBatches(RecordTable.from_records(records), store, fresh_model().tower.preprocess, WITH_PHRASES).batches(0)
    )
    batch = batch.to(torch.device("cpu"))
    rows_of = [set(store.find_rows(r.phrases)) for r in records]
    number = {str(record.image): n for n, record in enumerate(records)}
    images = [number[name] for name in batch.image_names]
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
    batches = list(
        AlignBatches(RecordTable.from_records(records), store, fresh_model().tower.preprocess, config).batches(0)
    )
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
