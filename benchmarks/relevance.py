"""Test how well search tells queries with an answer in the index from queries without one.

    python benchmarks/relevance.py DATA MODEL [MODEL ...] --out runs/relevance

DATA contains flickr8k (its validation split is used) and coco_img, each with a captions.jsonl and images. Of each data
set, the images of 400 queries are removed from the index, and the images of 400 other queries stay in. A query is one
caption. A second set of queries without an answer are captions of the other data set. The indexes are built without and
with captions. The following scores of a query are compared:

    relevance     largest relevance of the first 10 hits (see llm2clip.search.relevance)
    top cosine    similarity of the first hit
    margin        difference between the similarities of the first two hits

AUROC is the probability that a query with an answer has a higher score than one without, and is limited by R@1: a model
that never ranks the answer first cannot tell whether it is there. For F1, the threshold is chosen on half of the
queries, and F1 is measured on the other half. "Fixed" is the threshold that search uses for the relevance, and for the
top cosine the threshold that is best on the other data set. The columns "hidden" state how many queries get the answer
"nothing close". With the filter, each search is limited to 1% of the images: those with the answer, or others.

The tables are written to OUT/relevance.md, and the reliability diagrams to OUT/relevance.svg.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llm2clip.data.image_refs import FileImage
from llm2clip.data.images import load_image
from llm2clip.models.dual_encoder import DualEncoder, open_dual_encoder
from llm2clip.search.backends import Filter, IndexedContent, IndexedImage
from llm2clip.search.query import QueryVectors
from llm2clip.search.relevance import MIN_RELEVANCE, Calibration, calibrate, search_relevant
from llm2clip.search.sqlite_backend import SqliteBackend

QUERIES = 400
FOLDERS = 100  # each contains 1% of the images
BATCH_SIZE = 32
SCORES = ("relevance", "top cosine", "margin")
BINS = np.linspace(0, 1, 11)


class Data(NamedTuple):
    """Embeddings of a data set: images of shape (N, D), one caption of each image of shape (N, D), and captions."""

    images: np.ndarray
    texts: np.ndarray
    captions: list[list[str]]


class Scores(NamedTuple):
    """Scores of Q queries, each of shape (Q,), and the ids of the first hits."""

    values: dict[str, np.ndarray]
    first: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("models", nargs="+", type=str)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    curves: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for number, name in enumerate(args.models):
        model = open_dual_encoder(name)
        data = {}
        for data_set in ("flickr8k", "coco_img"):
            data[data_set] = embed_data(model, args.data / data_set, args.out / f"{number}-{data_set}.npz")
        lines += [f"## {Path(name).parent.name}/{Path(name).name}", ""]
        lines += test_model(model, data, args.out / f"{number}-index", curves, label=f"model {number + 1}")
    table = "\n".join(lines)
    (args.out / "relevance.md").write_text(table)
    draw_reliability(curves, args.out / "relevance.svg")
    print(table)


def embed_data(model: DualEncoder, folder: Path, cache: Path) -> Data:
    """Embed the images of a data set, and the last caption of each. The others can be captions of the index."""
    rows = []
    for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if folder.name != "flickr8k" or row["split"] == "val":
            rows.append(row)
    captions = [row["captions"] for row in rows]
    if not cache.exists():
        images = []
        for start in range(0, len(rows), BATCH_SIZE):
            batch = [load_image(str(folder / row["image"])) for row in rows[start : start + BATCH_SIZE]]
            images.append(model.encode_images([model.transform(image) for image in batch]).numpy())
        texts = model.encode_texts([texts[-1] for texts in captions]).numpy()
        np.savez(cache, images=np.concatenate(images), texts=texts)
    with np.load(cache) as arrays:
        return Data(arrays["images"], arrays["texts"], captions)


def test_model(
    model: DualEncoder,
    data: dict[str, Data],
    folder: Path,
    curves: dict[str, tuple[np.ndarray, np.ndarray]],
    label: str,
) -> list[str]:
    """Return the tables of one model as lines of Markdown, and add its reliability curves."""
    results: list[tuple[str, str, dict[str, np.ndarray], dict[str, np.ndarray], str]] = []
    for name, other in (("flickr8k", "coco_img"), ("coco_img", "flickr8k")):
        order = np.random.default_rng(0).permutation(len(data[name].images))
        absent, present, kept = order[:QUERIES], order[QUERIES : 2 * QUERIES], order[QUERIES:]
        foreign = np.random.default_rng(1).permutation(len(data[other].texts))[:QUERIES]
        for with_captions in (False, True):
            backend = build_backend(folder / f"{name}-{with_captions}", data[name], kept, with_captions)
            calibration = calibrate(backend, model)
            assert calibration is not None
            queries = {
                "taken out": data[name].texts[absent],
                "other data set": data[other].texts[foreign],
            }
            positive = score_queries(backend, calibration, data[name].texts[present])
            names = [backend.images(hit_id)[0].name for hit_id in positive.first]
            r1 = np.mean([hit == make_path(kept, image) for hit, image in zip(names, present, strict=True)])
            source = f"{name}, {'with' if with_captions else 'no'} captions"
            for kind, vectors in queries.items():
                negative = score_queries(backend, calibration, vectors)
                results.append((source, kind, positive.values, negative.values, f"{r1:.3f}"))
                curve = positive.values["relevance"], negative.values["relevance"]
                curves[f"{label}: {source}, {kind}"] = curve
            folders = [f"/{get_folder(kept, image)}" for image in present]
            positive = score_queries(backend, calibration, data[name].texts[present], folders)
            others = [f"/{(get_folder(kept, image) + 1) % FOLDERS}" for image in present]
            negative = score_queries(backend, calibration, data[name].texts[present], others)
            results.append((source, "filtered out (1% left)", positive.values, negative.values, ""))
    return [*make_table(results), "", *make_reliability_table(results), ""]


def get_folder(kept: np.ndarray, image: int) -> int:
    """Return the folder of an image of the index. `kept` contains the numbers of all its images."""
    return int(np.flatnonzero(kept == image)[0]) % FOLDERS


def make_path(kept: np.ndarray, image: int) -> str:
    return f"/{get_folder(kept, image)}/{image}.jpg"


def build_backend(folder: Path, data: Data, kept: np.ndarray, with_captions: bool) -> SqliteBackend:
    """Create an index of the images with the given numbers. All captions but the last are stored in the index."""
    backend = SqliteBackend(folder, write=True)
    if not backend.metadata():
        backend.initialize({"model": "", "fingerprint": "", "embed_dim": data.images.shape[1]})
        contents, images = [], []
        for number in kept.tolist():
            digest = number.to_bytes(32)
            contents.append(IndexedContent(digest, data.images[number].astype(np.float16), b"", 1, 1))
            path = make_path(kept, number)
            captions = tuple(data.captions[number][:-1] or data.captions[number]) if with_captions else ()
            images.append((IndexedImage(path, FileImage(path), "/", "", captions), digest))
        backend.add(contents, images)
    return backend


def score_queries(
    backend: SqliteBackend, calibration: Calibration, vectors: np.ndarray, folders: Sequence[str] | None = None
) -> Scores:
    """Search with query vectors of shape (Q, D), each optionally limited to a folder, and return their scores."""
    rows: list[tuple[float, float, float]] = []
    first = []
    for index, vector in enumerate(vectors):
        image_filter = Filter() if folders is None else Filter(path=folders[index])
        query = QueryVectors(vector, vector, None)
        hits = search_relevant(backend, calibration, query, 10, image_filter, show_weak=True).hits
        cosines = [hit.score or 0.0 for hit in hits]
        rows.append((max(hit.relevance or 0.0 for hit in hits), cosines[0], cosines[0] - cosines[1]))
        first.append(hits[0].id)
    return Scores(dict(zip(SCORES, np.array(rows).T, strict=True)), first)


def compute_auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Return the fraction of pairs in which the positive value is larger. Ties count half."""
    difference = positive[:, None] - negative[None]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def compute_f1(positive: np.ndarray, negative: np.ndarray, threshold: float) -> float:
    """Return the F1 score of "has an answer" for values of at least the threshold."""
    true_positives, false_positives = (positive >= threshold).sum(), (negative >= threshold).sum()
    return float(2 * true_positives / (true_positives + false_positives + len(positive)))


def find_threshold(positive: np.ndarray, negative: np.ndarray) -> float:
    """Return the threshold with the highest F1 score."""
    candidates = np.unique(np.concatenate([positive, negative]))
    return float(max(candidates, key=lambda threshold: compute_f1(positive, negative, threshold)))


def make_table(results: Sequence[tuple[str, str, dict[str, Any], dict[str, Any], str]]) -> list[str]:
    lines = [
        "| index | queries without an answer | R@1 | score | AUROC | F1 | F1, fixed | hidden, answer | hidden, none |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for source, kind, positive, negative, r1 in results:
        for score in SCORES:
            values, others = positive[score], negative[score]
            best = find_threshold(values[::2], others[::2])
            f1 = compute_f1(values[1::2], others[1::2], best)
            fixed, hidden = "", ("", "")
            threshold = None
            if score == "relevance":
                threshold = MIN_RELEVANCE
            elif score == "top cosine":
                start = source.split(",")[0]
                transferred = next(r for r in results if not r[0].startswith(start) and r[1] == kind)
                threshold = find_threshold(transferred[2][score], transferred[3][score])
            if threshold is not None:
                fixed = f"{compute_f1(values, others, threshold):.3f}"
                hidden = f"{np.mean(values < threshold):.1%}", f"{np.mean(others < threshold):.1%}"
            auroc = compute_auroc(values, others)
            cells = (source, kind, r1, score, f"{auroc:.3f}", f"{f1:.3f}", fixed, *hidden)
            lines.append(f"| {' | '.join(cells)} |")
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


def make_reliability_table(results: Sequence[tuple[str, str, dict[str, Any], dict[str, Any], str]]) -> list[str]:
    lines = [
        "| index | queries without an answer | relevance | queries | mean relevance | with an answer |",
        "|---|---|---|---|---|---|",
    ]
    for source, kind, positive, negative, _ in results:
        for count, mean, fraction in compute_reliability(positive["relevance"], negative["relevance"]):
            low = min(int(10 * mean), 9) / 10
            bounds = f"{low:.1f} to {low + 0.1:.1f}"
            lines.append(f"| {source} | {kind} | {bounds} | {count} | {mean:.2f} | {fraction:.2f} |")
    return lines


def draw_reliability(curves: dict[str, tuple[np.ndarray, np.ndarray]], file: Path) -> None:
    """Draw the fraction of queries with an answer by relevance. Bins of fewer than 10 queries are skipped."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":")
    for label, (positive, negative) in curves.items():
        points = [(mean, fraction) for count, mean, fraction in compute_reliability(positive, negative) if count >= 10]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    axes.set(xlabel="relevance", ylabel="fraction of queries with an answer", xlim=(0, 1), ylim=(0, 1))
    axes.legend(fontsize=6)
    figure.savefig(file)


if __name__ == "__main__":
    main()
