"""Test how well search tells queries with an answer in the index from queries without one.

    python benchmarks/relevance.py DATA MODEL [MODEL ...]

DATA contains flickr8k (its validation split is used) and coco_img, each with a captions.jsonl and images. A query is
the last caption of an image. The images of 400 queries are in the index. Queries without an answer are captions of 400
removed images and of the other dataset. The indexes are built without and with the other captions of their images.

Two scores of a query are compared: the largest relevance of the first 10 hits (see llm2clip.search.relevance), and the
cosine similarity of the most similar image. AUROC is the probability that a query with an answer has a higher score
than one without. The last columns show how many queries get the answer "nothing close".
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llm2clip.data.records import Record, open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate.embeddings import ModelEmbeddings
from llm2clip.models.dual_encoder import DualEncoder, open_dual_encoder
from llm2clip.search.metadata import Filter
from llm2clip.search.query import QueryVectors
from llm2clip.search.relevance import MIN_RELEVANCE, Calibration, calibrate_index, search_and_rate_hits
from llm2clip.search.sqlite_backend import SqliteBackend
from shared import make_parser, print_header, print_row
from vectors import add_images, initialize_index

SOURCES = {"flickr8k": "flickr8k/captions.jsonl@val", "coco_img": "coco_img/captions.jsonl"}
QUERIES = 400
RESAMPLES = 300  # for confidence intervals


class Data(NamedTuple):
    """Images and captions of a dataset: embeddings of shape (N, D) of the images and of their last captions."""

    records: list[Record]
    images: np.ndarray
    texts: np.ndarray


class Scores(NamedTuple):
    """Relevance and cosine similarity of Q queries, each of shape (Q,), and the most similar images."""

    relevance: np.ndarray
    cosine: np.ndarray
    first: list[str]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("models", nargs="+")
    args = parser.parse_args()
    columns = ("model", "index", "R@1", "without an answer", "AUROC, cosine", "AUROC, relevance", "difference")
    print_header(*columns, "hidden, answer", "hidden, no answer")
    for name in args.models:
        model = open_dual_encoder(name)
        data = {key: embed_data(model, str(args.data / source)) for key, source in SOURCES.items()}
        for key, other in (("flickr8k", "coco_img"), ("coco_img", "flickr8k")):
            for with_captions in (False, True):
                test_index(f"{name} | {key}", model, data[key], data[other], with_captions)


def embed_data(model: DualEncoder, source: str) -> Data:
    records = list(open_records(source))
    embeddings = ModelEmbeddings(model, SkipLog())
    images, indices = embeddings.encode_images([record.image for record in records if record.image is not None])
    assert len(indices) == len(records)
    texts = embeddings.encode_texts([record.captions[-1] for record in records])
    return Data(records, images.numpy(), texts.numpy())


def test_index(label: str, model: DualEncoder, data: Data, other: Data, with_captions: bool) -> None:
    """Search in an index of a dataset, and print a table row for each kind of queries without an answer."""
    order = np.random.default_rng(0).permutation(len(data.records))
    absent, present, indexed = order[:QUERIES], order[QUERIES : 2 * QUERIES], order[QUERIES:]
    foreign = np.random.default_rng(1).permutation(len(other.records))[:QUERIES]
    with tempfile.TemporaryDirectory() as folder:
        backend = build_backend(Path(folder), data, indexed, with_captions)
        calibration = calibrate_index(backend, model)
        assert calibration is not None
        answered = score_queries(backend, calibration, data, present)
        recall = np.mean([name == f"/{number}.jpg" for name, number in zip(answered.first, present, strict=True)])
        label += f", {len(indexed):,} images, {'with' if with_captions else 'no'} captions | {100 * recall:.1f}"
        for kind, source, numbers in (("removed", data, absent), ("other set", other, foreign)):
            compare_scores(f"{label} | {kind}", answered, score_queries(backend, calibration, source, numbers))


def build_backend(folder: Path, data: Data, numbers: np.ndarray, with_captions: bool) -> SqliteBackend:
    """Create an index of the images with these numbers. Their last captions, the queries, are not in the index."""
    backend = SqliteBackend(folder, write=True)
    initialize_index(backend, data.images.shape[1])
    captions = [data.records[number].captions[:-1] for number in numbers] if with_captions else None
    add_images(backend, [f"/{number}.jpg" for number in numbers], data.images[numbers], captions)
    return backend


def score_queries(backend: SqliteBackend, calibration: Calibration, data: Data, numbers: Sequence[int]) -> Scores:
    """Search with the last captions of the images with these numbers, and return the scores."""
    relevances, cosines, first = [], [], []
    for number in numbers:
        vectors = QueryVectors(data.texts[number], data.texts[number], None)
        words = [data.records[number].captions[-1]]
        hits = search_and_rate_hits(backend, calibration, vectors, 10, Filter(), words=words, show_weak=True).hits
        relevances.append(max(hit.relevance or 0.0 for hit in hits))
        closest = backend.search(vectors.combined, 1, Filter())[0]
        cosines.append(closest.score or 0.0)
        first.append(closest.images[0].name)
    return Scores(np.array(relevances), np.array(cosines), first)


def compare_scores(label: str, positive: Scores, negative: Scores) -> None:
    """Print a table row: the AUROC of both scores, and the bootstrap 95% confidence interval of their difference."""
    rng, differences = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        rows, others = rng.integers(QUERIES, size=(2, QUERIES))
        cosine = compute_auroc(positive.cosine[rows], negative.cosine[others])
        differences.append(compute_auroc(positive.relevance[rows], negative.relevance[others]) - cosine)
    low, high = np.percentile(differences, (2.5, 97.5))
    baseline = compute_auroc(positive.cosine, negative.cosine)
    auroc = compute_auroc(positive.relevance, negative.relevance)
    hidden = [f"{np.mean(scores.relevance < MIN_RELEVANCE):.1%}" for scores in (positive, negative)]
    difference = f"{auroc - baseline:+.3f} ({low:+.3f} to {high:+.3f})"
    print_row(label, f"{baseline:.3f}", f"{auroc:.3f}", difference, *hidden)


def compute_auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Return the fraction of pairs in which the positive value is larger. Ties count half."""
    difference = positive[:, None] - negative[None]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


if __name__ == "__main__":
    main()
