"""Test how well search tells queries with an answer in the index from queries without one.

    python benchmarks/relevance.py DATA MODEL [MODEL ...] --out runs/relevance

DATA contains flickr8k (its validation split is used) and coco_img, each with a captions.jsonl and images. Of each data
set, the images of 400 queries are removed from the index, and the images of 400 other queries stay in. A query is one
caption, which is not in the index. The indexes are built without and with the other captions. Queries without an
answer:

    removed     captions of the removed images
    other set   captions of the other data set
    filter      the queries with an answer, but the search is limited to 1% of the images, without the answer. The
                queries with an answer are limited to 1% with the answer
    crops       images as queries: the centre of a removed image (70% of its width and height). The queries with an
                answer are the centres of images in the index

Two scores of a query are compared: the largest relevance of the first 10 hits (see llm2clip.search.relevance), and the
cosine similarity of the most similar image. AUROC is the probability that a query with an answer has a higher score
than one without. It is limited by R@1: a model that never ranks the answer first cannot tell whether it is there. The
columns "hidden" state how many queries get the answer "nothing close".

The tables are written to OUT/relevance.md, and the reliability diagrams to OUT/relevance.svg.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llm2clip.data.image_refs import FileImage
from llm2clip.data.images import load_image
from llm2clip.models.dual_encoder import DualEncoder, open_dual_encoder
from llm2clip.search.metadata import Filter
from llm2clip.search.query import QueryVectors
from llm2clip.search.relevance import MIN_RELEVANCE, Calibration, calibrate, search_relevant
from llm2clip.search.sqlite_backend import SqliteBackend
from llm2clip.search.types import IndexedContent, IndexedImage

QUERIES = 400
FOLDERS = 100  # each contains 1% of the images
CROP = 0.7  # fraction of the width and height of images as queries
BATCH_SIZE = 32
BINS = np.linspace(0, 1, 11)
RESAMPLES = 300  # for confidence intervals


class Data(NamedTuple):
    """Embeddings of a data set, each of shape (N, D), and captions: N images, their last captions, and their crops."""

    images: np.ndarray
    texts: np.ndarray
    crops: np.ndarray
    captions: list[list[str]]


class Query(NamedTuple):
    vectors: QueryVectors
    texts: list[str]


class Scores(NamedTuple):
    """Relevance and cosine similarity of Q queries, each of shape (Q,), and the names of the most similar images."""

    relevance: np.ndarray
    cosine: np.ndarray
    first: list[str]


class Result(NamedTuple):
    """Scores of the queries with and without an answer, for one kind of queries in one index."""

    index: str
    r1: str
    kind: str
    positive: Scores
    negative: Scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("models", nargs="+", type=str)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    results: dict[str, list[Result]] = {}
    for number, name in enumerate(args.models):
        model = open_dual_encoder(name)
        data = {}
        for data_set in ("flickr8k", "coco_img"):
            data[data_set] = embed_data(model, args.data / data_set, args.out / f"{number}-{data_set}.npz")
        results[f"model {number + 1}"] = test_model(model, data, args.out / f"{number}-index")
        lines += [f"## Model {number + 1}: {name}", "", *make_table(results[f"model {number + 1}"]), ""]
        (args.out / "relevance.md").write_text("\n".join(lines))
        draw_reliability(results, args.out / "relevance.svg")
    print("\n".join(lines))


def embed_data(model: DualEncoder, folder: Path, cache: Path) -> Data:
    """Embed the images of a data set, the last caption of each, and the crops of those that are used as queries."""
    rows = []
    for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if folder.name != "flickr8k" or row["split"] == "val":
            rows.append(row)
    captions = [row["captions"] for row in rows]
    if not cache.exists():
        files = [folder / row["image"] for row in rows]
        crops = np.zeros((len(files), model.embed_dim), np.float32)
        queries = np.random.default_rng(0).permutation(len(files))[: 2 * QUERIES]
        crops[queries] = embed_images(model, [files[number] for number in queries], CROP)
        texts = model.encode_texts([texts[-1] for texts in captions]).numpy()
        np.savez(cache, images=embed_images(model, files), texts=texts, crops=crops)
    with np.load(cache) as arrays:
        return Data(arrays["images"], arrays["texts"], arrays["crops"], captions)


def embed_images(model: DualEncoder, files: Sequence[Path], crop: float = 1.0) -> np.ndarray:
    """Embed the centres of images, of the given fraction of their width and height."""
    embeddings = []
    for start in range(0, len(files), BATCH_SIZE):
        batch = []
        for file in files[start : start + BATCH_SIZE]:
            image = load_image(str(file))
            top, left = (round(side * (1 - crop) / 2) for side in image.shape[-2:])
            batch.append(model.transform(image[:, top : image.shape[-2] - top, left : image.shape[-1] - left]))
        embeddings.append(model.encode_images(batch).numpy())
    return np.concatenate(embeddings)


def test_model(model: DualEncoder, data: dict[str, Data], folder: Path) -> list[Result]:
    results = []
    for name, other in (("flickr8k", "coco_img"), ("coco_img", "flickr8k")):
        order = np.random.default_rng(0).permutation(len(data[name].images))
        absent, present, remaining = order[:QUERIES], order[QUERIES : 2 * QUERIES], order[QUERIES:]
        foreign = np.random.default_rng(1).permutation(len(data[other].texts))[:QUERIES]
        queries, removed = make_caption_queries(data[name], present), make_caption_queries(data[name], absent)
        folders = [get_folder(remaining, image) for image in present]
        for with_captions in (False, True):
            backend = build_backend(folder / f"{name}-{with_captions}", data[name], remaining, with_captions)
            calibration = calibrate(backend, model)
            assert calibration is not None
            index = f"{name}, {len(remaining):,} images, {'with' if with_captions else 'no'} captions"
            positive = score_queries(backend, calibration, queries)
            for kind, items in (("removed", removed), ("other set", make_caption_queries(data[other], foreign))):
                negative = score_queries(backend, calibration, items)
                results.append(Result(index, format_r1(positive, present), kind, positive, negative))
            right = score_queries(backend, calibration, queries, [f"/{number}" for number in folders])
            wrong = score_queries(backend, calibration, queries, [f"/{(number + 1) % FOLDERS}" for number in folders])
            results.append(Result(index, "", "filter", right, wrong))
            if not with_captions:
                positive = score_queries(backend, calibration, make_crop_queries(data[name], present))
                negative = score_queries(backend, calibration, make_crop_queries(data[name], absent))
                results.append(Result(index, format_r1(positive, present), "crops", positive, negative))
    return results


def make_caption_queries(data: Data, numbers: np.ndarray) -> list[Query]:
    return [Query(QueryVectors(data.texts[i], data.texts[i], None), [data.captions[i][-1]]) for i in numbers]


def make_crop_queries(data: Data, numbers: np.ndarray) -> list[Query]:
    return [Query(QueryVectors(data.crops[i], None, data.crops[i]), []) for i in numbers]


def format_r1(scores: Scores, images: np.ndarray) -> str:
    correct = [Path(name).stem == str(image) for name, image in zip(scores.first, images, strict=True)]
    return f"{100 * np.mean(correct):.1f}"


def get_folder(remaining: np.ndarray, image: int) -> int:
    """Return the folder of an image of the index. `remaining` contains the numbers of all its images."""
    return int(np.flatnonzero(remaining == image)[0]) % FOLDERS


def build_backend(folder: Path, data: Data, remaining: np.ndarray, with_captions: bool) -> SqliteBackend:
    """Create an index of the images with the given numbers. All captions but the last are stored in the index."""
    backend = SqliteBackend(folder, write=True)
    if not backend.metadata():
        backend.initialize({"model": "", "fingerprint": "", "embed_dim": data.images.shape[1]})
        contents, images = [], []
        for number in remaining.tolist():
            digest = number.to_bytes(32)
            contents.append(IndexedContent(digest, data.images[number].astype(np.float16), b"", width=1, height=1))
            path = f"/{get_folder(remaining, number)}/{number}.jpg"
            captions = tuple(data.captions[number][:-1]) if with_captions else ()
            images.append((IndexedImage(path, FileImage(path), "/", "", captions), digest))
        backend.add(contents, images)
    return backend


def score_queries(
    backend: SqliteBackend,
    calibration: Calibration,
    queries: Sequence[Query],
    folders: Sequence[str] | None = None,
) -> Scores:
    """Search with each query, optionally limited to its folder, and return the scores."""
    relevances, cosines, first = [], [], []
    for index, query in enumerate(queries):
        image_filter = Filter() if folders is None else Filter(path=folders[index])
        vectors, words = query
        hits = search_relevant(backend, calibration, vectors, 10, image_filter, words=words, show_weak=True).hits
        relevances.append(max(hit.relevance or 0.0 for hit in hits))
        closest = backend.search(vectors.combined, 1, image_filter)[0]
        cosines.append(closest.score or 0.0)
        first.append(closest.images[0].name)
    return Scores(np.array(relevances), np.array(cosines), first)


def compute_auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Return the fraction of pairs in which the positive value is larger. Ties count half."""
    difference = positive[:, None] - negative[None]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def compute_interval(positive: Scores, negative: Scores) -> tuple[float, float]:
    """Return the bootstrap 95% confidence interval of the relevance's AUROC minus that of the cosine similarity."""
    rng, differences = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        rows, others = (rng.integers(len(scores.cosine), size=len(scores.cosine)) for scores in (positive, negative))
        auroc = compute_auroc(positive.relevance[rows], negative.relevance[others])
        differences.append(auroc - compute_auroc(positive.cosine[rows], negative.cosine[others]))
    low, high = np.percentile(differences, (2.5, 97.5))
    return float(low), float(high)


def make_table(results: Sequence[Result]) -> list[str]:
    lines = [
        "| index | R@1 | queries without an answer | AUROC, relevance | AUROC, cosine | difference | hidden, answer | "
        "hidden, no answer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for index, r1, kind, positive, negative in results:
        auroc = compute_auroc(positive.relevance, negative.relevance)
        baseline = compute_auroc(positive.cosine, negative.cosine)
        low, high = compute_interval(positive, negative)
        difference = f"{auroc - baseline:+.3f} ({low:+.3f} to {high:+.3f})"
        hidden = [f"{np.mean(scores.relevance < MIN_RELEVANCE):.1%}" for scores in (positive, negative)]
        lines.append(f"| {' | '.join((index, r1, kind, f'{auroc:.3f}', f'{baseline:.3f}', difference, *hidden))} |")
    return lines


def compute_reliability(positive: np.ndarray, negative: np.ndarray) -> list[tuple[int, float, float]]:
    """Return the number of queries, mean relevance and fraction of queries with an answer of each non-empty bin."""
    values = np.concatenate([positive, negative])
    targets = np.concatenate([np.ones(len(positive)), np.zeros(len(negative))])
    bins = np.digitize(values, BINS[1:-1])
    rows = []
    for number in range(len(BINS) - 1):
        selected = bins == number
        if selected.any():
            rows.append((int(selected.sum()), float(values[selected].mean()), float(targets[selected].mean())))
    return rows


def draw_reliability(results: dict[str, list[Result]], file: Path) -> None:
    """Draw the fraction of Flickr8k's queries with an answer by relevance. Skip bins of fewer than 20 queries."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(7, 7), layout="constrained", sharex=True, sharey=True)
    for row, kind in enumerate(("removed", "other set")):
        for column, ending in enumerate(("no captions", "with captions")):
            panel = axes[row, column]
            panel.plot([0, 1], [0, 1], color="grey", linestyle=":")
            for label, items in results.items():
                for index, _, result_kind, positive, negative in items:
                    if index.startswith("flickr8k") and index.endswith(ending) and result_kind == kind:
                        bins = compute_reliability(positive.relevance, negative.relevance)
                        points = [(mean, fraction) for count, mean, fraction in bins if count >= 20]
                        panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
            panel.set(title=f"{ending}, without an answer: {kind}", xlim=(0, 1), ylim=(0, 1))
    axes[0, 0].legend(fontsize=8)
    figure.supxlabel("relevance")
    figure.supylabel("fraction of queries with an answer")
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
