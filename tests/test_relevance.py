"""Tests of the relevance of search results: formulas, calibration, and searches for what an index does not contain."""

import dataclasses
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llm2clip.data.image_refs import FileImage
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.search import relevance, sqlite_backend
from llm2clip.search.backends import IndexBackend
from llm2clip.search.metadata import Filter
from llm2clip.search.query import QueryVectors
from llm2clip.search.relevance import (
    MIN_RELEVANCE,
    NEAR_DUPLICATE,
    Calibration,
    RelevanceScale,
    calibrate_index,
    compute_adjusted_similarities,
    compute_stem_overlap,
    extract_stems,
    find_near_duplicates,
    fit_logistic_regression,
    get_captions,
    load_calibration,
    search_and_rate_hits,
    update_calibration,
)
from llm2clip.search.sqlite_backend import SqliteBackend
from llm2clip.search.types import IndexedContent, IndexedImage
from search_fixtures import BACKENDS, create_backend, index_sources

DIM = 16
COUNT = 120
ABSENT = np.eye(DIM, dtype=np.float32)[-1]  # no image and no other query has this direction


def normalize(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def make_images(seed: int = 0, count: int = COUNT) -> np.ndarray:
    """Random embeddings that do not use the last dimension."""
    vectors = np.random.default_rng(seed).normal(size=(count, DIM))
    vectors[:, -1] = 0
    return normalize(vectors)


IMAGES = make_images()


@pytest.fixture(scope="module", autouse=True)
def few_queries() -> Iterator[None]:
    """Calibrate with fewer queries than by default, which are searches in the entire index."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relevance, "BACKGROUND_QUERIES", relevance.BACKGROUND_QUERIES[:60])
        patch.setattr(relevance, "MAX_QUERIES", 60)
        yield


@pytest.fixture(scope="module")
def model(dual_encoder: DualEncoder) -> DualEncoder:
    """A model whose text embeddings are random, except that texts such as `nr 7` have the embedding of image 7."""

    def encode(texts: Sequence[str], show_progress: bool) -> Tensor:
        rows = []
        for text in texts:
            seed = zlib.crc32(text.encode())
            rows.append(IMAGES[int(text.split()[1])] if text.startswith("nr ") else make_images(seed, 1)[0])
        return torch.from_numpy(np.stack(rows))

    return dataclasses.replace(dual_encoder, encode_texts_raw=encode)


def add_images(backend: IndexBackend, vectors: np.ndarray, captions: Sequence[str] = (), start: int = 0) -> None:
    """Add images with the given embeddings. Every tenth image is in the folder /tenth, the others are in /rest.

    `{}` in a caption is replaced with the number of the image.
    """
    if not backend.read_metadata():
        backend.initialize({"model": "m", "fingerprint": "f", "embed_dim": DIM})
    contents, images = [], []
    for number, vector in enumerate(vectors, start):
        digest = number.to_bytes(32)
        contents.append(IndexedContent(digest, vector.astype(np.float16), b"jpeg", width=1, height=1))
        path = f"/{'rest' if number % 10 else 'tenth'}/{number}.png"
        texts = tuple(caption.replace("{}", str(number)) for caption in captions)
        images.append((IndexedImage(path, FileImage(path), "/", "1", texts), digest))
    backend.add_images(contents, images)
    backend.finish_indexing()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> IndexBackend:
    """An index of IMAGES without captions, which tests do not change."""
    backend = create_backend("sqlite", tmp_path_factory.mktemp("index"))
    add_images(backend, IMAGES)
    return backend


@pytest.fixture(scope="module")
def calibration(index: IndexBackend, model: DualEncoder) -> Calibration:
    return calibrate_or_fail(index, model)


def make_query(vector: np.ndarray) -> QueryVectors:
    return QueryVectors(vector, vector, None)


def calibrate_or_fail(backend: IndexBackend, model: DualEncoder) -> Calibration:
    calibration = calibrate_index(backend, model)
    assert calibration is not None
    return calibration


# ---- formulas -------------------------------------------------------------------------------------------------------


def test_relevance_scale_matches_the_formula() -> None:
    """x = (0.3 - 0.2) / 0.05 + 8 * overlap = 2 or 4, so the relevance is 1 / (1 + exp(-(1.5 x - 4)))."""
    scale = RelevanceScale(mean=0.2, deviation=0.05, slope=1.5, intercept=-4.0)
    values = scale.compute_relevance(np.array([0.3, 0.3]), np.array([0.0, 0.25]))
    np.testing.assert_allclose(values, [1 / (1 + np.e), 1 / (1 + np.exp(-2))])


def test_compute_adjusted_similarities_matches_the_formula() -> None:
    rng = np.random.default_rng(1)
    background, hits = (normalize(rng.normal(size=(n, DIM))) for n in (20, 5))
    query = normalize(rng.normal(size=DIM))
    values = compute_adjusted_similarities(query, hits, background)
    for hit, value in zip(hits, values, strict=True):
        hubness = max(float(hit @ text) for text in background)
        assert value == pytest.approx(hit @ query - 0.25 * hubness, abs=1e-5)

    # A background query does not count if the user searches for the same text.
    repeated = compute_adjusted_similarities(background[0], hits, background)
    assert repeated == pytest.approx(compute_adjusted_similarities(background[0], hits, background[1:]), abs=1e-5)


def test_find_near_duplicates_subtracts_the_mean() -> None:
    rng = np.random.default_rng(2)
    vectors = normalize(rng.normal(size=(50, DIM)) + 20)  # all similarities are above NEAR_DUPLICATE
    assert (vectors @ vectors[0]).min() > NEAR_DUPLICATE
    vectors[1] = normalize(vectors[0] + 0.001)
    mask = find_near_duplicates(vectors, vectors[0], vectors.mean(axis=0))
    assert np.flatnonzero(mask).tolist() == [0, 1]


def test_fit_logistic_regression_recovers_the_log_odds_of_two_normal_distributions() -> None:
    """For N(2, 1) and N(0, 1), the log odds are 2 * x - 2."""
    rng = np.random.default_rng(3)
    slope, intercept = fit_logistic_regression(rng.normal(2, 1, 5000), rng.normal(0, 1, 20000))
    assert (slope, intercept) == (pytest.approx(2, rel=0.05), pytest.approx(-2, rel=0.05))


def test_fit_logistic_regression_stays_finite_and_never_prefers_lower_values() -> None:
    slope, intercept = fit_logistic_regression(np.full(30, 3.0), np.full(30, -3.0))
    assert 0 < slope < 10 and abs(intercept) < 0.1
    assert fit_logistic_regression(np.zeros(30) - 2, np.zeros(30) + 2) == (0, 0)


# ---- calibration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("captions", [(), ("nr {}",)])
def test_search_finds_nothing_close_only_if_the_answer_was_taken_out(
    kind: str, captions: Sequence[str], model: DualEncoder, tmp_path: Path
) -> None:
    backend = create_backend(kind, tmp_path)
    add_images(backend, IMAGES, captions)
    update_calibration(backend, model)
    calibration = load_calibration(backend, model)
    assert calibration is not None
    hits, nothing_close = search_and_rate_hits(backend, calibration, make_query(IMAGES[5]), 3, Filter())
    assert not nothing_close and hits[0].images[0].name == "/rest/5.png"
    ratings = [hit.relevance or 0.0 for hit in hits]
    assert len(ratings) == 3 and ratings == sorted(ratings, reverse=True) and ratings[0] > 0.7 > MIN_RELEVANCE

    assert search_and_rate_hits(backend, calibration, make_query(ABSENT), 3, Filter()) == ([], True)
    hits, nothing_close = search_and_rate_hits(backend, calibration, make_query(ABSENT), 3, Filter(), show_weak=True)
    assert nothing_close and len(hits) == 3
    assert all(hit.relevance is not None and 0 <= hit.relevance < MIN_RELEVANCE for hit in hits)

    image_query = QueryVectors(IMAGES[5], None, IMAGES[5])
    assert not search_and_rate_hits(backend, calibration, image_query, 3, Filter()).nothing_close
    assert search_and_rate_hits(backend, calibration, QueryVectors(ABSENT, None, ABSENT), 3, Filter()).nothing_close


def test_captions_change_only_their_own_scale(model: DualEncoder, calibration: Calibration, tmp_path: Path) -> None:
    calibrations = [calibration]
    for name, captions in (("one", ("nr {}",)), ("two", ("nr {}", "another text"))):
        backend = create_backend("sqlite", tmp_path / name)
        add_images(backend, IMAGES, captions)
        calibrations.append(calibrate_or_fail(backend, model))
    without, single, fitted = calibrations
    assert without.images == single.images == fitted.images and without.texts == single.texts == fitted.texts
    fixed = (relevance.CAPTION_SLOPE, relevance.CAPTION_INTERCEPT)
    assert (without.captions.slope, without.captions.intercept) == fixed
    assert single.captions == without.captions  # no other caption remains if the query's caption is excluded
    assert fitted.captions.slope > relevance.CAPTION_SLOPE  # each caption has exactly its image's embedding


def test_fit_excludes_the_caption_that_is_the_query(model: DualEncoder, tmp_path: Path) -> None:
    """A word that occurs only in the query's own caption does not change the fit."""
    scales = []
    for name, caption in (("unique", "nr {} {}xyz"), ("short", "nr {} {}")):  # words of up to two letters do not count
        backend = create_backend("sqlite", tmp_path / name)
        add_images(backend, IMAGES[:99], (caption, "other"))
        scales.append(calibrate_or_fail(backend, model).captions)
    assert scales[0] == scales[1] and scales[0].slope != relevance.CAPTION_SLOPE


def test_compute_stem_overlap_weighs_words_by_length() -> None:
    stems = extract_stems(["Two CHILDREN on a sled"])
    assert stems == {"two", "child", "on", "a", "sled"}  # with the weights 1, 3, 0, 0 and 2
    assert compute_stem_overlap(stems, ["A child's red sled", "two"]) == 1
    assert compute_stem_overlap(stems, ["a child", "on a boat"]) == pytest.approx(3 / 6)
    assert compute_stem_overlap(stems, ["a dog"]) == 0
    assert compute_stem_overlap(extract_stems(["雪地里的狗"]), ["一只狗在雪地上"]) == pytest.approx(3 / 5)
    assert compute_stem_overlap(extract_stems(["हिन्दी किताब"]), ["एक हिन्दी किताब"]) == 1
    assert compute_stem_overlap(extract_stems(["café"]), ["a Cafe\u0301"]) == 1
    for word, other in (("バス", "パス"), ("バス", "ハス"), ("ぶた", "ふた")):  # bus, pass, lotus; pig, lid
        assert compute_stem_overlap(extract_stems([word]), [unicodedata.normalize("NFD", word)]) == 1
        assert compute_stem_overlap(extract_stems([word]), [other]) == pytest.approx(1 / 2)
    assert np.isnan(compute_stem_overlap(stems, [])) and np.isnan(compute_stem_overlap(extract_stems(["24"]), ["24"]))


def test_get_captions_returns_few_different_captions() -> None:
    texts = ["a dog", "x" * 10_000, *(f"caption {number}" for number in range(500))]
    images = [IndexedImage(f"{n:03}", FileImage(""), "", "", ("a dog", text)) for n, text in enumerate(texts)]
    captions = get_captions(images[::-1])
    assert captions == ["a dog", "x" * 500, "caption 0", "caption 1", "caption 2"]


def test_captions_with_the_words_of_a_query_increase_the_relevance(model: DualEncoder, tmp_path: Path) -> None:
    backend = create_backend("sqlite", tmp_path)
    add_images(backend, IMAGES)
    vector = normalize(IMAGES[5] + 1e-3)
    for number, captions in ((200, ("a red sled",)), (201, ("a boat",))):
        add_images(backend, vector[None], captions, start=number)
    calibration = calibrate_or_fail(backend, model)

    def rate(texts: Sequence[str]) -> dict[str, float | None]:
        page = search_and_rate_hits(backend, calibration, make_query(vector), 5, Filter(), words=texts, show_weak=True)
        return {hit.images[0].name: hit.relevance for hit in page.hits}

    ratings, without_words = rate(["red sled"]), rate([])
    similarities = compute_adjusted_similarities(vector, vector[None], calibration.background)
    expected = calibration.captions.compute_relevance(similarities, np.array([1.0]))
    assert ratings["/tenth/200.png"] == pytest.approx(float(expected[0]), abs=0.01)
    assert ratings["/rest/201.png"] == pytest.approx(
        float(calibration.captions.compute_relevance(similarities)[0]), abs=0.01
    )
    assert ratings["/rest/5.png"] == without_words["/rest/5.png"]  # has no captions
    assert without_words["/tenth/200.png"] == pytest.approx(without_words["/rest/201.png"])


def test_filter_does_not_change_the_relevance_of_a_hit(index: IndexBackend, calibration: Calibration) -> None:
    query, tenth = make_query(IMAGES[5]), Filter(path="/tenth")
    everything = search_and_rate_hits(index, calibration, query, COUNT, Filter()).hits
    ratings = {hit.id: hit.relevance for hit in everything}
    hits, nothing_close = search_and_rate_hits(index, calibration, query, COUNT, tenth, show_weak=True)
    assert len(hits) == COUNT // 10 and len(everything) == COUNT
    assert [hit.relevance for hit in hits] == pytest.approx([ratings[hit.id] for hit in hits])
    assert nothing_close  # the answer, /rest/5.png, does not match the filter
    assert not search_and_rate_hits(index, calibration, query, 1, Filter(path="/rest")).nothing_close


@pytest.mark.parametrize("max_locations", [100, 2])
def test_filter_does_not_change_the_captions_that_are_rated(
    calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_locations: int
) -> None:
    monkeypatch.setattr(sqlite_backend, "MAX_LOCATIONS", max_locations)
    backend = create_backend("sqlite", tmp_path)
    add_images(backend, IMAGES[:1])
    copies = []
    for path, captions in (
        ("/a", ("xray", "yacht", "zebra")),
        ("/b", ("violin", "whale", "unicorn")),
        ("/trip", ("a lighthouse",)),
    ):
        copies.append((IndexedImage(path, FileImage(path), "/", "1", captions), (0).to_bytes(32)))
    backend.add_images([], copies)
    for words in (["lighthouse"], ["yacht violin unicorn"]):
        ratings = []
        for image_filter in (Filter(), Filter(path="/trip"), Filter(path="/b")):
            [hit] = search_and_rate_hits(backend, calibration, make_query(IMAGES[0]), 5, image_filter, words=words).hits
            ratings.append(hit.relevance)
        assert ratings == [ratings[0]] * 3


def test_later_pages_get_the_same_answer_with_one_scan_of_the_vectors(
    index: IndexBackend, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank, depths = SqliteBackend._rank_nearest_vectors, []

    def count_scans(backend: SqliteBackend, query: np.ndarray, count: int, allowed_ids: np.ndarray | None) -> Any:
        depths.append(count)
        return rank(backend, query, count, allowed_ids)

    monkeypatch.setattr(SqliteBackend, "_rank_nearest_vectors", count_scans)
    hits, nothing_close = search_and_rate_hits(index, calibration, make_query(IMAGES[5]), 10, Filter(), offset=100)
    assert not nothing_close and len(hits) == 10
    assert depths == [110]
    first = search_and_rate_hits(index, calibration, make_query(IMAGES[5]), 110, Filter()).hits
    assert first[100:] == hits and depths == [110]
    filtered = search_and_rate_hits(index, calibration, make_query(IMAGES[5]), 10, Filter(path="/tenth"))
    assert {hit.images[0].name.split("/")[1] for hit in filtered.hits} == {"tenth"}
    assert search_and_rate_hits(index, calibration, make_query(ABSENT), 10, Filter(), offset=100) == ([], True)


def test_only_positive_parts_of_a_query_count(index: IndexBackend, calibration: Calibration) -> None:
    negative_only = QueryVectors(ABSENT, None, None)
    hits, nothing_close = search_and_rate_hits(index, calibration, negative_only, 3, Filter())
    assert len(hits) == 3 and not nothing_close and {hit.relevance for hit in hits} == {None}

    vectors = IMAGES[:4]
    mixed = calibration.compute_relevance(QueryVectors(IMAGES[0], IMAGES[1], IMAGES[2]), vectors)
    texts = calibration.compute_relevance(QueryVectors(IMAGES[0], IMAGES[1], None), vectors)
    images = calibration.compute_relevance(QueryVectors(IMAGES[0], None, IMAGES[2]), vectors)
    assert mixed == pytest.approx(np.maximum(texts, images))
    with_negative = QueryVectors(normalize(IMAGES[1] - 0.5 * IMAGES[2]), IMAGES[1], None)
    assert calibration.compute_relevance(with_negative, vectors) == pytest.approx(texts)


def test_calibration_survives_serialization(index: IndexBackend, calibration: Calibration) -> None:
    loaded = Calibration.from_bytes(calibration.to_bytes())
    query = make_query(IMAGES[5])
    assert loaded.compute_relevance(query, IMAGES) == pytest.approx(
        calibration.compute_relevance(query, IMAGES), abs=5e-3
    )
    assert (loaded.texts, loaded.captions) == (calibration.texts, calibration.captions)
    assert loaded.sample_ids == calibration.sample_ids


def test_calibration_is_renewed_when_the_index_has_changed(
    model: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relevance, "MAX_QUERIES", 256)  # of the sample, in which captions are counted
    backend = create_backend("sqlite", tmp_path)
    add_images(backend, IMAGES)
    assert backend.load_calibration() is None
    update_calibration(backend, model)
    first = backend.load_calibration()
    add_images(backend, make_images(5, 5), start=COUNT)
    update_calibration(backend, model)
    assert backend.load_calibration() == first  # only 4% of the images are new

    add_images(backend, make_images(6, 20), start=COUNT + 5)
    update_calibration(backend, model, changed=False)
    assert backend.load_calibration() == first
    update_calibration(backend, model)
    second = backend.load_calibration()
    assert second not in (first, None, b"")

    backend.remove_images([f"/{'rest' if number % 10 else 'tenth'}/{number}.png" for number in range(50)])
    add_images(backend, make_images(7, 50), start=200)
    update_calibration(backend, model)
    third = backend.load_calibration()
    assert third != second  # the number of images is the same, but their content is not
    add_images(backend, make_images(7, 50), ("a red sled", "a boat"), start=200)
    update_calibration(backend, model)
    assert backend.load_calibration() != third  # the images are the same, but now have captions

    other = dataclasses.replace(model, part_identities=lambda: ({"name": "another model"}, {}))
    assert load_calibration(backend, model) is not None and load_calibration(backend, other) is None
    update_calibration(backend, other, changed=False)
    assert load_calibration(backend, other) is not None


@pytest.mark.parametrize("kind", BACKENDS)
def test_backends_return_samples_and_vectors_in_order(kind: str, tmp_path: Path) -> None:
    backend = create_backend(kind, tmp_path)
    add_images(backend, IMAGES)
    ids = backend.sample_ids(30)
    assert len(set(ids)) == 30 and ids == backend.sample_ids(30)
    assert len(set(backend.sample_ids(1000))) == COUNT
    order = ids[::-1]
    vectors = backend.read_vectors([order[0], "99999999", *order[1:]] if kind == "sqlite" else order)
    assert list(vectors) == order
    for hit_id, vector in vectors.items():
        number = int(Path(backend.read_images(hit_id)[0].name).stem)
        assert vector == pytest.approx(IMAGES[number], abs=2e-3)
    backend.save_calibration(b"x")
    assert backend.count_matches(Filter()) == COUNT  # the calibration is not an image
    assert len(backend.search(ABSENT, 1000, Filter())) == COUNT


@pytest.mark.parametrize("removed", [0, COUNT // 10, COUNT - 9])
def test_samples_contain_only_images_that_are_in_the_index(removed: int, tmp_path: Path) -> None:
    backend = create_backend("sqlite", tmp_path)
    add_images(backend, IMAGES)
    names = [image.name for hit in backend.search(None, COUNT, Filter()) for image in hit.images]
    backend.remove_images(names[:removed])
    remaining = {hit.id for hit in backend.search(None, COUNT, Filter())}
    ids = backend.sample_ids(8)
    assert len(set(ids)) == 8 and set(ids) <= remaining and ids == backend.sample_ids(8)


# ---- unusual indexes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("kind", BACKENDS)
def test_small_indexes_have_no_relevance(
    kind: str, count: int, model: DualEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = create_backend(kind, tmp_path)
    add_images(backend, IMAGES[:count])
    update_calibration(backend, model)
    assert backend.load_calibration() == b"" and load_calibration(backend, model) is None
    assert "Relevance is not calibrated, because the index has fewer than 50 images" in capsys.readouterr().out
    hits, nothing_close = search_and_rate_hits(backend, None, make_query(ABSENT), 10, Filter())
    assert len(hits) == count and not nothing_close
    assert all(hit.relevance is None for hit in hits)


def test_index_of_equal_embeddings_has_no_relevance(
    model: DualEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = create_backend("sqlite", tmp_path)
    add_images(backend, np.repeat(IMAGES[:1], 60, axis=0))
    assert calibrate_index(backend, model) is None
    assert "Relevance is not calibrated, because too many images in the index are similar." in capsys.readouterr().out


def test_unchanged_index_that_cannot_be_calibrated_is_not_calibrated_again(
    model: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = create_backend("sqlite", tmp_path)
    add_images(backend, np.repeat(IMAGES[:1], 60, axis=0))
    update_calibration(backend, model)
    calls: list[IndexBackend] = []
    monkeypatch.setattr(relevance, "calibrate_index", lambda backend, model: calls.append(backend))
    update_calibration(backend, model, changed=False)
    assert not calls
    update_calibration(backend, model, changed=True)
    assert len(calls) == 1


def test_unreadable_calibration_is_ignored_and_replaced(
    model: DualEncoder, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = create_backend("sqlite", tmp_path)
    add_images(backend, IMAGES)
    data = calibration.to_bytes()
    monkeypatch.setattr(relevance, "VERSION", relevance.VERSION + 1)
    for unreadable in (b"PK", b"text", data[: len(data) // 2], bytes(100) + data[100:], data):
        backend.save_calibration(unreadable)
        assert load_calibration(backend, model) is None
        update_calibration(backend, model, changed=False)
        assert load_calibration(backend, model) is not None


def test_nan_is_reported(model: DualEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backend = create_backend("sqlite", tmp_path)
    add_images(backend, IMAGES)
    broken = dataclasses.replace(
        model, encode_texts_raw=lambda texts, show_progress: torch.full((len(texts), DIM), torch.nan)
    )
    assert calibrate_index(backend, broken) is None
    assert "the model returns NaN or infinity for texts" in capsys.readouterr().out


def test_build_index_calibrates_the_index(
    image_folder: Path, dual_encoder: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relevance, "MIN_IMAGES", 30)
    monkeypatch.setattr(relevance, "MIN_RELEVANCE", 0.3)
    backend = SqliteBackend(tmp_path, write=True)
    index_sources([image_folder], dual_encoder, backend)
    calibration = load_calibration(backend, dual_encoder)
    assert calibration is not None and calibration.image_count == 36
    image = backend.read_vectors(backend.sample_ids(1)).popitem()[1]
    assert not search_and_rate_hits(backend, calibration, QueryVectors(image, None, image), 5, Filter()).nothing_close
    opposite = -image
    assert search_and_rate_hits(backend, calibration, QueryVectors(opposite, None, opposite), 5, Filter()).nothing_close
